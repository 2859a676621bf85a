"""Progress of long work: a bar on a terminal or in a notebook, elsewhere a line on stderr every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm_lab.core import processes

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_INTERVAL_SECONDS = 10.0
REDRAW_SECONDS = 0.25

Advance = Callable[..., None]  # advance(amount, note="text shown behind the bar")
Item = TypeVar("Item")


def counted(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    """The items, each counted after the caller has used it."""
    for item in items:
        yield item
        advance(1)


@contextmanager
def progress(description: str, total: int, unit: str, start: int = 0) -> Iterator[Advance]:
    """Show the progress of work and the remaining time.

    Args:
        description: the work, in a few words.
        total: the count at the end.
        unit: what is counted, in the plural.
        start: the count at the beginning.
    Yields:
        A function to call with the number of items just completed, and optionally a note.
    """
    if not processes.is_rank0():
        yield lambda amount, note=None: None
    elif sys.stderr.isatty() or _in_notebook():
        with _bar(description, total, unit, start) as advance:
            yield advance
    else:
        yield _plain(description, total, unit, start)


def _in_notebook() -> bool:
    """Whether the work runs in a Jupyter kernel, as in Colab."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


@contextmanager
def _bar(description: str, total: int, unit: str, start: int) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),  # a folder's name may look like [/markup]
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn(unit),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}", markup=False),
    )
    bar = rich.Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
    task = bar.add_task(description, total=total, completed=start, note="")
    with _drawn(bar) as draw:

        def advance(amount: int, note: str | None = None) -> None:
            if note is not None:
                bar.update(task, note=note)
            bar.update(task, advance=amount)
            draw()

        yield advance


@contextmanager
def _drawn(bar: "Progress") -> Iterator[Callable[[], None]]:
    """Draw a bar on the terminal, or in the output of a notebook's cell in the place of its earlier states.

    The bar's own way into a notebook would need widgets, which not every notebook has.

    Yields:
        A function to call after each change. In a notebook, work that ends before the first redrawing shows no bar.
    """
    if not bar.console.is_jupyter:
        with bar:
            yield lambda: None
        return
    from IPython.display import display

    outputs: list[Any] = []
    last = time.monotonic()

    def draw() -> None:
        nonlocal last
        if time.monotonic() - last < REDRAW_SECONDS:
            return
        last = time.monotonic()
        if outputs:
            outputs[0].update(bar)
        else:
            outputs.append(display(bar, display_id=True))

    try:
        yield draw
    finally:
        for output in outputs:
            output.update(bar)


def _plain(description: str, total: int, unit: str, start: int) -> Advance:
    """Lines without a terminal: one in every interval, and one at the end of work longer than an interval."""
    begun = shown = time.monotonic()
    done, last_note = start, ""

    def advance(amount: int, note: str | None = None) -> None:
        nonlocal shown, done, last_note
        done += amount
        last_note = last_note if note is None else note
        now = time.monotonic()
        ended = done >= total and now - begun > PLAIN_INTERVAL_SECONDS
        if now - shown < PLAIN_INTERVAL_SECONDS and not ended:
            return
        shown = now
        left = (now - begun) * (total - done) / max(done - start, 1)
        with suppress(OSError):  # the reader has gone, which must not end the work
            print(f"{description}: {done}/{total} {unit}, {duration(left)} left  {last_note}".rstrip(), file=sys.stderr)

    return advance


def duration(seconds: float) -> str:
    """Seconds in readable units: 8 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    minutes, s = divmod(round(seconds), 60)
    hours, min_ = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{h} h {min_} min"
    return f"{min_} min {s} s" if minutes else f"{s} s"

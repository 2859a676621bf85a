"""Parts that the tabs share: boxes for pictures, handlers with their errors, and command lines."""

import functools
import inspect
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ddpm_lab.core.errors import InputError, RunError, is_out_of_memory

QUIET: dict[str, Any] = {"show_progress": "hidden"}  # for handlers that are too fast for an animation


def command_line(*words: str, **options: object) -> str:
    """A `ddpm` command for a shell, with a flag for each option; options without a value are left out."""
    command = ["ddpm", *words]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        flag = f"--{name.rstrip('_').replace('_', '-')}"
        if len(values) == 1 and str(values[0]).startswith("-"):  # a class may have such a name
            command.append(f"{flag}={values[0]}")
        elif values:
            command += [flag, *map(str, values)]
    return shlex.join(command)


def image_box(alt_text: str, **options: Any) -> gr.Image:
    """A box that shows a picture, without a label."""
    return gr.Image(
        show_label=False, interactive=False, format="png", buttons=["fullscreen"], alt_text=alt_text, **options
    )


@contextmanager
def _errors_on_page() -> Iterator[None]:
    """Within it, an error is shown on the page, as the line that the command line would print."""
    try:
        yield
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not isinstance(error, RunError) and not out_of_memory:
            raise  # a bug, with its traceback
        raise gr.Error("not enough memory" if out_of_memory else str(error), print_exception=False) from error


def show_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are shown on the page; it may be a generator."""
    if not inspect.isgeneratorfunction(handler):
        return _errors_on_page()(handler)

    @functools.wraps(handler)
    def generator(*values: Any) -> Any:
        with _errors_on_page():
            yield from handler(*values)

    return generator


def whole(value: float | None, name: str) -> int:
    """The whole number in a box.

    Raises:
        InputError: the box is empty.
    """
    if value is None:
        raise InputError(f"{name} is empty; enter a number")
    return int(value)

"""What the studio may open: packaged weights, and what lies below the folder of runs; and where it writes."""

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from ddpm_lab.core.errors import InputError, RunError, is_out_of_memory
from ddpm_lab.core.log import read_lines
from ddpm_lab.data.datasets import DATASETS, available_datasets
from ddpm_lab.data.image_folder import files_below
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.trained import TrainedModel, load, packaged_names
from ddpm_lab.studio import HELD

DEPTH = 4  # of folders below that of the runs: a cell of a study is at runs/STUDY/cells/NAME


def new_folder() -> Path:
    """An empty folder for what one press of a button makes; it lasts as long as the studio."""
    return Path(tempfile.mkdtemp(dir=HELD.name))


def inside(runs: Path, path: Path) -> bool:
    """Whether a path is below the folder, also where links lead."""
    return path.resolve().is_relative_to(runs.resolve())


def run_folders(runs: Path) -> list[Path]:
    """Folders below `runs` that hold a config.json or a pipeline, in order; links that lead away are not followed."""
    found: list[Path] = []
    waiting = [(runs, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
            held = [folder / name for name in ("config.json", "model_index.json") if (folder / name).is_file()]
            away = held and not all(inside(runs, path) for path in _read_of(folder))
        except OSError:
            continue
        if held and not away:
            found.append(folder)
        elif depth < DEPTH:
            waiting += [(entry, depth + 1) for entry in entries if not entry.name.startswith(".")]
    return sorted(found)


def _read_of(folder: Path) -> Iterator[Path]:
    """What the page reads of a run or a pipeline, as far as it is there."""
    yield from folder.iterdir()
    for below in ("checkpoints", "averages", "samples", "unet", "scheduler"):
        for path in (folder / below).glob("*"):
            yield path
            yield from path.glob("*") if path.is_dir() else ()


def check_data(runs: Path, trained: TrainedModel) -> None:
    """Refuse images that a run's config.json names and that are neither a known data set nor below the folder.

    A run may be a stranger's, and this page shows what it finds.

    Raises:
        InputError: they are elsewhere, or not fetched yet.
    """
    dataset = trained.config.data.dataset
    if dataset in DATASETS:
        if dataset not in available_datasets():
            raise InputError(f"{dataset} is not on this machine yet: ddpm data {dataset} fetches it")
        return
    folder = Path(dataset)
    if not inside(runs, folder) or (folder.is_dir() and not all(inside(runs, file) for file in files_below(folder))):
        raise InputError(
            f"the images that {trained.name} was trained on lie outside the folder of runs, in {dataset}; "
            "the studio reads nothing there"
        )


def entries_of(runs: Path, path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file of JSON lines; none where it cannot be read, or is not below `runs`."""
    try:
        return read_lines(path) if inside(runs, path) else []
    except OSError:
        return []


def model_names(runs: Path) -> list[str]:
    """What can be generated from: packaged weights, and runs that have a checkpoint, by their path below `runs`.

    A run that is called like packaged weights has ./ before its name.
    """
    packaged = packaged_names()
    names = [str(path.relative_to(runs)) for path in run_folders(runs) if _weights_file(path) is not None]
    return [*packaged, *(f"./{name}" if name in packaged else name for name in names)]


def guide_names(runs: Path) -> list[str]:
    """What can guide a model: all of `model_names`, and the averages that runs kept early, `RUN/averages/step_...`."""
    kept = [
        str(folder.relative_to(runs))
        for run in run_folders(runs)
        for folder in sorted((run / "averages").glob("step_*"))
        if (folder / "meta.json").is_file() and inside(runs, folder / "meta.json")
    ]
    return [*model_names(runs), *kept]


def _weights_file(path: Path) -> Path | None:
    """A file that changes when the weights do."""
    try:
        if is_diffusers(path):
            return next(iter(sorted(path.rglob("*.safetensors"))), path / "model_index.json")
        steps = checkpoint_steps(path)
    except (InputError, OSError):
        return None
    return path / "checkpoints" / f"step_{steps[-1]:08d}" / "meta.json" if steps else None


def source_of(runs: Path, name: str) -> str:
    """What a name of `guide_names` is for a command: packaged weights, or a path of a run.

    Raises:
        InputError: no such name, so that no other path can be asked for.
    """
    if name in packaged_names():
        return name
    if name not in guide_names(runs):
        raise InputError(f"there is no model {name!r} here")
    return str(runs / name)


def open_model(runs: Path, name: str, device: str) -> TrainedModel:
    """The model of a name of `model_names`.

    Raises:
        InputError: no such name; or a broken one.
    """
    source = source_of(runs, name)
    if source == name:
        return _loaded(source, (), device)
    weights = _weights_file(Path(source))
    try:
        stamp = () if weights is None else (str(weights), weights.stat().st_mtime_ns)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    return _loaded(source, stamp, device)


@lru_cache(maxsize=2)
def _loaded(source: str, stamp: tuple[Any, ...], device: str) -> TrainedModel:
    """Kept until its weights have changed."""
    return load(source, device=device)


@contextmanager
def _telling() -> Iterator[None]:
    """Within it, faults are told on the page in a line, as the command line would tell them."""
    try:
        yield
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        memory = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not isinstance(error, RunError) and not memory:
            raise  # a fault of ours, with its traceback
        raise gr.Error("not enough memory for that" if memory else str(error), print_exception=False) from error


def show_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose faults are told on the page."""
    if not inspect.isgeneratorfunction(handler):
        return _telling()(handler)

    @functools.wraps(handler)
    def generator(*values: Any) -> Any:
        with _telling():
            yield from handler(*values)

    return generator


def whole(value: float | None, name: str) -> int:
    """The number in a box.

    Raises:
        InputError: the box is empty.
    """
    if value is None:
        raise InputError(f"{name} is empty: give a number")
    return int(value)

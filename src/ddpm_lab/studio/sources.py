"""What the studio may open: packaged weights, and what lies below the folder of runs; and where it writes."""

import tempfile
from functools import lru_cache
from pathlib import Path

from ddpm_lab.checkpoint import checkpoint_steps
from ddpm_lab.interop import is_diffusers
from ddpm_lab.settings import InputError
from ddpm_lab.trained import TrainedModel, load, packaged_names

DEPTH = 4  # of folders below that of the runs: a cell of a study is at runs/STUDY/cells/NAME


@lru_cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ddpm-studio-")  # removed when the process ends


def new_folder() -> Path:
    """An empty folder for what one press of a button makes; it lasts as long as the studio."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))


def run_folders(runs: Path) -> list[Path]:
    """Folders below `runs` that hold a config.json or a pipeline, in order; links that lead away are not followed."""
    found: list[Path] = []
    waiting = [(runs, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
        except OSError:
            continue
        if (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
            found.append(folder)
        elif depth < DEPTH:
            waiting += [(entry, depth + 1) for entry in entries if not entry.name.startswith(".")]
    return sorted(found)


def model_names(runs: Path) -> list[str]:
    """What can be generated from: packaged weights, and runs that have a checkpoint, by their path below `runs`."""
    return [*packaged_names(), *(str(path.relative_to(runs)) for path in run_folders(runs) if _has_weights(path))]


def _has_weights(path: Path) -> bool:
    try:
        return is_diffusers(path) or bool(checkpoint_steps(path))
    except InputError:
        return False


def open_model(runs: Path, name: str, device: str) -> TrainedModel:
    """The model of a name of `model_names`.

    Raises:
        InputError: no such name, so that no other path can be asked for; or a broken one.
    """
    if name in packaged_names():
        return _loaded(name, "", device)
    if name not in model_names(runs):
        raise InputError(f"there is no model {name!r} here")
    path = runs / name
    newest = "" if is_diffusers(path) else str(checkpoint_steps(path)[-1])
    return _loaded(str(path), newest, device)


@lru_cache(maxsize=2)
def _loaded(source: str, newest: str, device: str) -> TrainedModel:
    return load(source, checkpoint=int(newest) if newest else None, device=device)

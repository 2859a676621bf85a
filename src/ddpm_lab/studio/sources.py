"""What the studio may open: packaged weights and what lies below the folder of runs; and where it writes."""

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import read_lines
from ddpm_lab.data.datasets import DATASETS, available_datasets
from ddpm_lab.data.image_folder import files_below
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.trained import TrainedModel, load, packaged_names
from ddpm_lab.studio import TEMPORARY

DEPTH = 4  # levels of folders below that of the runs: a cell of a study is at runs/STUDY/cells/NAME


def new_folder() -> Path:
    """An empty folder for the files that one click makes; it is deleted when the studio ends."""
    return Path(tempfile.mkdtemp(dir=TEMPORARY.name))


def inside(runs: Path, path: Path) -> bool:
    """Whether a path lies below the folder of runs, after links are followed."""
    return path.resolve().is_relative_to(runs.resolve())


def run_folders(runs: Path) -> list[Path]:
    """Folders below `runs` that hold a run or a pipeline of diffusers, sorted.

    Links to folders are not followed, and a folder with a link that leads out of `runs` is left out.
    """
    run_paths = []
    for path, folders, files in os.walk(runs):
        folder = Path(path)
        if not {"config.json", "model_index.json"}.isdisjoint(files) and _stays_inside(runs, folder):
            run_paths.append(folder)
            folders.clear()
        elif len(folder.relative_to(runs).parts) == DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(run_paths)


def _stays_inside(runs: Path, folder: Path) -> bool:
    """Whether all that the page reads of a run or a pipeline lies below `runs`."""
    below = ("checkpoints", "averages", "samples", "unet", "scheduler")
    patterns = ["*", *(f"{name}/*" for name in below), *(f"{name}/*/*" for name in below)]
    try:
        return all(inside(runs, path) for pattern in patterns for path in folder.glob(pattern))
    except OSError:
        return False


def check_data(runs: Path, trained: TrainedModel) -> None:
    """Refuse training images outside the folder of runs: a run's config.json may come from a stranger.

    Raises:
        InputError: the images are neither a known data set nor below the folder, or the data set is not here yet.
    """
    dataset = trained.config.data.dataset
    if dataset in DATASETS:
        if dataset not in available_datasets():
            raise InputError(f"{dataset} is not on this machine; fetch it with: ddpm data {dataset}")
        return
    folder = Path(dataset)
    if not inside(runs, folder) or (folder.is_dir() and not all(inside(runs, file) for file in files_below(folder))):
        raise InputError(
            f"the training images of {trained.name} lie outside the folder of runs, in {dataset}; "
            "the studio does not read them"
        )


def read_entries(runs: Path, path: Path) -> list[dict[str, Any]]:
    """The entries of a run's file of JSON lines; none if it cannot be read or lies outside `runs`."""
    try:
        return read_lines(path) if inside(runs, path) else []
    except OSError:
        return []


def model_names(runs: Path) -> list[str]:
    """Models that can generate: packaged weights, and runs with a checkpoint, by their path below `runs`.

    A run with the name of packaged weights gets the prefix ./ to tell them apart.
    """
    packaged = packaged_names()
    names = [str(path.relative_to(runs)) for path in run_folders(runs) if _weights_file(path) is not None]
    return [*packaged, *(f"./{name}" if name in packaged else name for name in names)]


def guide_names(runs: Path) -> list[str]:
    """Models that can guide another: all of `model_names`, and the early averages of runs, `RUN/averages/step_...`."""
    averages = [
        str(folder.relative_to(runs))
        for run in run_folders(runs)
        for folder in sorted((run / "averages").glob("step_*"))
        if (folder / "meta.json").is_file() and inside(runs, folder / "meta.json")
    ]
    return [*model_names(runs), *averages]


def _weights_file(path: Path) -> Path | None:
    """A file that changes when the weights do; None if there are no weights."""
    try:
        if is_diffusers(path):
            return next(iter(sorted(path.rglob("*.safetensors"))), path / "model_index.json")
        steps = checkpoint_steps(path)
    except (InputError, OSError):
        return None
    return path / "checkpoints" / f"step_{steps[-1]:08d}" / "meta.json" if steps else None


def source_of(runs: Path, name: str) -> str:
    """The SOURCE argument of a command for a name of `guide_names`: packaged weights, or the path of a run.

    Raises:
        InputError: no such name; no other path can be opened.
    """
    if name in packaged_names():
        return name
    if name not in guide_names(runs):
        raise InputError(f"there is no model {name!r} here")
    return str(runs / name)


def open_model(runs: Path, name: str, device: str) -> TrainedModel:
    """The model of a name of `model_names`.

    Raises:
        InputError: no such name, or the model is damaged.
    """
    source = source_of(runs, name)
    weights = None if source == name else _weights_file(Path(source))
    return _loaded(source, None if weights is None else (weights, weights.stat().st_mtime_ns), device)


@lru_cache(maxsize=2)
def _loaded(source: str, version: tuple[Path, int] | None, device: str) -> TrainedModel:
    """Load a model; it is kept until its weights change."""
    return load(Path(source), device=device)  # a Path is never looked up on the hub

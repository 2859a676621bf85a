"""Checkpoints: one folder a step, in safetensors, that appears whole or not at all.

A checkpoint is written to a temporary folder, flushed to the disk, and renamed into place; a kill or a full disk at any
moment leaves the ones before it untouched. Its bytes are a function of the training state alone: no clock, no host.
`meta.json` holds the SHA-256 of each file, so damage is found on loading, by name. In a run the writing goes on beside
the training; what is written is the state as it was when it was asked for.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.files import TEMPORARY_PREFIX, flush_folder, read_json, write_durably


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """`checkpoints/step_00010000` of a run folder."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps a run folder has checkpoints of, ascending.

    Raises:
        InputError: `checkpoints` is there and cannot be listed; to take it for empty would begin the run anew.
    """
    folder = run_dir / "checkpoints"
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error.strerror}") from error
    numbers = (int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name))
    return sorted(step for step in numbers if checkpoint_path(run_dir, step).name in names)


def last_step(run_dir: Path) -> str:
    """The step of the newest checkpoint, in words."""
    steps = checkpoint_steps(run_dir)
    return str(steps[-1]) if steps else "none yet"


def average_path(run_dir: Path, step: int) -> Path:
    """`averages/step_00000625` of a run folder: averaged weights alone, that no later checkpoint replaces."""
    return run_dir / "averages" / f"step_{step:08d}"


def snapshot(model: nn.Module, ema: nn.Module, kept: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The training state as it is now, by file and name: copies on the CPU, which no later step changes.

    Args:
        kept: what the training keeps beside its networks, see `training.TrainingState.kept`.
    """
    return {
        "model.safetensors": _copies(dict(model.named_parameters())),
        "ema.safetensors": _copies(dict(ema.named_parameters())),
        "optimizer.safetensors": _copies(kept),
    }


def save_checkpoint(final: Path, step: int, state: dict[str, dict[str, Tensor]]) -> Path:
    """Write the training state after `step` steps; an existing checkpoint there is kept as it is.

    Args:
        final: the folder it is to be, see `checkpoint_path` and `average_path`.
        state: of `snapshot`, or one file of it.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: the disk is full or refuses; nothing but the temporary folder was touched, and that is removed.
    """
    if final.exists():
        return final
    temporary = final.with_name(TEMPORARY_PREFIX + final.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        hashes = {}
        for name, tensors in state.items():
            content = tensor_bytes(tensors)
            hashes[name] = hashlib.sha256(content).hexdigest()
            write_durably(temporary / name, content)
        meta = json.dumps({"step": step, "sha256": hashes}, indent=2) + "\n"
        write_durably(temporary / "meta.json", meta.encode())
        flush_folder(temporary)
        temporary.rename(final)
        flush_folder(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


class CheckpointWriter:
    """Writes a run's checkpoints one after another while training goes on; as a context it ends with all written."""

    def __init__(self, run_dir: Path, keep: int, averages_at: Sequence[int] = ()) -> None:
        """keep: see `remove_old_checkpoints`, which follows every checkpoint; averages_at: of `keep_average`."""
        self.run_dir, self.keep, self.averages_at = run_dir, keep, averages_at
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0

    def save(self, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        """Begin to write a `snapshot`, once what was begun before is written.

        Raises:
            RunError: that could not be written.
        """
        self.wait()
        self._step = step
        self._writing = self._thread.submit(self._write, step, state)

    def keep_average(self, step: int, ema: nn.Module) -> None:
        """Write the averaged weights alone, where they are to stay; see `save`."""
        if step in self.averages_at:
            self.wait()
            self._step = step
            files = {"ema.safetensors": _copies(dict(ema.named_parameters()))}
            self._writing = self._thread.submit(self._write_average, step, files)

    def _write(self, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        save_checkpoint(checkpoint_path(self.run_dir, step), step, state)
        remove_old_checkpoints(self.run_dir, self.keep)

    def _write_average(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        save_checkpoint(average_path(self.run_dir, step), step, files)

    def check(self) -> None:
        """Tell of a checkpoint that could not be written, without waiting for one under way.

        Raises:
            RunError: there is one.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is left to write.

        Raises:
            RunError: the checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            raise RunError(
                f"{self.run_dir} cannot be written at step {self._step}: {error.strerror or error}; "
                f"the last checkpoint is of step {last_step(self.run_dir)}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all), and what killed writers left half done."""
    folder = run_dir / "checkpoints"
    if keep > 0:
        for step in checkpoint_steps(run_dir)[:-keep]:
            path = checkpoint_path(run_dir, step)
            path.rename(folder / (TEMPORARY_PREFIX + path.name))  # a kill while deleting leaves no half checkpoint
    for leftover in folder.glob(TEMPORARY_PREFIX + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a checkpoint folder.

    Raises:
        InputError: it is absent, or not what a checkpoint has.
    """
    path = folder / "meta.json"
    meta = read_json(path)
    hashes = meta.get("sha256") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int) or not isinstance(hashes, dict):
        raise InputError(f"{path} is not a checkpoint's: it must hold step and sha256")
    return meta


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of a checkpoint folder, proved by the hash in its `meta.json`.

    Raises:
        InputError: absent, damaged, or not safetensors.
    """
    path = folder / name
    expected = read_meta(folder)["sha256"].get(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise InputError(
            f"{path} is damaged: its {len(content)} bytes do not have the SHA-256 in meta.json; "
            "move this checkpoint's folder away to use the one before it"
        )
    try:
        return parse_tensors(content)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error


def load_parameters(module: nn.Module, folder: Path, name: str) -> None:
    """Copy a checkpoint's tensors into a network, cast to its dtype.

    Raises:
        InputError: as `load_tensors`, or tensors of another network.
    """
    tensors, parameters = load_tensors(folder, name), dict(module.named_parameters())
    _same_names(folder / name, tensors, {key: p.shape for key, p in parameters.items()})
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def load_kept(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """What the training kept beside its networks, see `snapshot`.

    Args:
        shapes: what there must be, see `training.TrainingState.kept_shapes`.
    Raises:
        InputError: as `load_tensors`, or tensors of another network or another optimiser.
    """
    name = "optimizer.safetensors"
    tensors = load_tensors(folder, name)
    _same_names(folder / name, tensors, shapes)
    return tensors


def parameters_sha256(module: nn.Module) -> str:
    """SHA-256 of the file that a checkpoint would hold a network's parameters in."""
    return hashlib.sha256(tensor_bytes(_on_cpu(dict(module.named_parameters())))).hexdigest()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _same_names(path: Path, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    for name in sorted(tensors.keys() | shapes.keys()):
        found, expected = tensors.get(name), shapes.get(name)
        if found is None or expected is None or found.shape != expected:
            described = [
                None if s is None else tuple(s) for s in (found.shape if found is not None else None, expected)
            ]
            raise InputError(
                f"{path} belongs to another network: {name} is {described[0] or 'absent'} there, "
                f"{described[1] or 'absent'} in this one"
            )

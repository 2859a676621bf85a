"""Checkpoints: a folder for each saved step, with tensors in safetensors, that appears whole or not at all.

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so a kill or a full disk at any moment
leaves the earlier ones untouched. Its bytes depend on the training state alone, not on the clock or the host.
`meta.json` holds the SHA-256 of each file, so that loading detects damage. During training a thread writes a copy of
the state, and training continues.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.files import TEMPORARY_PREFIX, flush_folder, move, read_json, write_durably

MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
LOSS_SCALE_FILE = "loss_scale.safetensors"  # only of a run in float16


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """`checkpoints/step_00010000` of a run folder."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def average_path(run_dir: Path, step: int) -> Path:
    """`averages/step_00000625` of a run folder: averaged weights alone, which are never deleted."""
    return run_dir / "averages" / f"step_{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps that a run folder has checkpoints of, ascending.

    Raises:
        InputError: `checkpoints` exists and cannot be listed. (Were it taken as empty, the run would start again.)
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
    """The step of the newest checkpoint, for messages."""
    steps = checkpoint_steps(run_dir)
    return str(steps[-1]) if steps else "none yet"


def save_checkpoint(folder: Path, step: int, state: dict[str, dict[str, Tensor]]) -> Path:
    """Write the training state after `step` steps; a checkpoint that exists is left as it is.

    Args:
        folder: the checkpoint's, see `checkpoint_path` and `average_path`.
        state: the tensors by file and name, on the CPU.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: the disk is full or refuses; only the temporary folder was touched, and it is removed.
    """
    if folder.exists():
        return folder
    temporary = folder.with_name(TEMPORARY_PREFIX + folder.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_files(temporary, step, state)
        move(temporary, folder)
        flush_folder(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def write_files(folder: Path, step: int, state: dict[str, dict[str, Tensor]]) -> None:
    """Write the files of a checkpoint into an empty folder; the other arguments are those of `save_checkpoint`."""
    hashes = {}
    for name, tensors in state.items():
        content = tensor_bytes(tensors)
        hashes[name] = hashlib.sha256(content).hexdigest()
        write_durably(folder / name, content)
    meta = json.dumps({"step": step, "sha256": hashes}, indent=2) + "\n"
    write_durably(folder / "meta.json", meta.encode())
    flush_folder(folder)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time; leaving its context waits for the last one."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """keep: how many of the newest checkpoints stay; 0: all."""
        self.run_dir, self.keep = run_dir, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0

    def save(self, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        """Start writing a checkpoint, after the previous one is written.

        Args:
            state: the tensors by file and name; copied, so that later steps may change them.
        Raises:
            RunError: the previous one could not be written.
        """
        self._start(checkpoint_path(self.run_dir, step), step, state)

    def save_average(self, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        """Start writing the averaged weights alone; else as `save`."""
        self._start(average_path(self.run_dir, step), step, {EMA_FILE: state[EMA_FILE]})

    def _start(self, folder: Path, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        self.wait()
        self._step = step
        copies = {name: _copies(tensors) for name, tensors in state.items()}
        self._writing = self._thread.submit(self._write, folder, step, copies)

    def _write(self, folder: Path, step: int, state: dict[str, dict[str, Tensor]]) -> None:
        save_checkpoint(folder, step, state)
        remove_old_checkpoints(self.run_dir, self.keep)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written; do not wait for one in progress.

        Raises:
            RunError: a checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            RunError: the checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            raise not_writable(self.run_dir, self._step, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()


def not_writable(run_dir: Path, step: int, error: OSError) -> RunError:
    """The error of a run folder that cannot be written, to be raised."""
    return RunError(
        f"{run_dir} cannot be written at step {step}: {error.strerror or error}; "
        f"the last checkpoint is of step {last_step(run_dir)}"
    )


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all), and the temporary folders of killed writers."""
    folder = run_dir / "checkpoints"
    if keep > 0:
        for step in checkpoint_steps(run_dir)[:-keep]:
            path = checkpoint_path(run_dir, step)
            move(path, folder / (TEMPORARY_PREFIX + path.name))  # a kill while deleting leaves no half checkpoint
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
        raise InputError(f"{path} is not a checkpoint's meta.json: it must hold step and sha256")
    return meta


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of a checkpoint folder, verified by the hash in its `meta.json`.

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


def load_tensors(folder: Path, name: str, targets: dict[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint's file into those of a network or an optimizer, cast to their dtype.

    Args:
        targets: by name; changed in place.
    Raises:
        InputError: as `read_tensors`, or the file belongs to another network.
    """
    tensors = read_tensors(folder, name)
    check_shapes(f"{folder / name} belongs to another network", tensors, targets)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])


def check_shapes(message: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two sets of tensors by name and shape.

    Args:
        message: how the error starts.
    Raises:
        InputError: they differ; the message names the first difference.
    """
    shapes, expected_shapes = ({k: tuple(v.shape) for k, v in each.items()} for each in (tensors, expected))
    for name in sorted(shapes.keys() | expected_shapes.keys()):
        shape, expected_shape = shapes.get(name, "absent"), expected_shapes.get(name, "absent")
        if shape != expected_shape:
            raise InputError(f"{message}: {name} is {shape} there, {expected_shape} in this network")


def parameters_sha256(module: nn.Module) -> str:
    """SHA-256 of the file in which a checkpoint would hold a network's parameters."""
    return hashlib.sha256(tensor_bytes(_copies(dict(module.named_parameters())))).hexdigest()


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }

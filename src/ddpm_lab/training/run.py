"""A run: a folder that training writes, and that the same command can continue at any time.

    config.json   log.jsonl   scores.jsonl   checkpoints/step_00010000/   samples/step_00010000.png

`train` opens the folder or continues the run in it, and hands over to a session. Invariant: the newest checkpoint is
whole, and the log reaches it or goes beyond; on resume what goes beyond is cut, and is written again.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config
from ddpm_lab.core.device import deterministic_algorithms, resolve_device, resolve_precision, uses_tf32
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import locked, replace_atomically
from ddpm_lab.core.log import LOG, SCORES, cut_lines
from ddpm_lab.core.messages import listed
from ddpm_lab.data.datasets import ImageSet, load_images, pixel_deviation
from ddpm_lab.diffusion.process import input_scale
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.evaluation.scores import training_scorer
from ddpm_lab.models.checkpoint import LOSS_SCALE_FILE, checkpoint_path, checkpoint_steps, load_tensors, read_meta
from ddpm_lab.models.trained import load
from ddpm_lab.training.cost import training_cost
from ddpm_lab.training.fine_tuning import start_from_model
from ddpm_lab.training.loop import TrainingState, is_compiled, new_state
from ddpm_lab.training.resume import continue_schedule, read_previous, resume_record
from ddpm_lab.training.session import Session
from ddpm_lab.training.tracking import check_tracker


@processes.peer_failure_guard("the same command continues from the newest checkpoint, with any number of processes")
def train(
    config: Config,
    run_dir: str | Path,
    *,
    start_from: str | Path | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Train a run to its last step, from its newest checkpoint if it has one.

    Args:
        config: the configuration; it must agree with that of a run that exists.
        run_dir: the run's folder, created if necessary.
        start_from: a model (see `load`) whose averaged weights a new run starts with; None: random weights.
        device: auto, cpu, cuda or mps.
        data_dir: see `load_images`.
        say: called with lines of text for the user.
    Returns:
        The folder of the last checkpoint.
    Raises:
        InputError: data, device, model, source or run folder do not fit, or the processes cannot share the batch;
            everything that existed is unchanged.
        RunError: the loss or a gradient is not finite, the disk is full, or another process ended; the newest
            checkpoint stays.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    torch_device, is_rank0 = resolve_device(device), processes.is_rank0()
    if config.training.batch_size % processes.world_size():
        raise InputError(
            f"training.batch_size must be a multiple of the {processes.world_size()} processes, "
            f"not {config.training.batch_size}"
        )
    processes.join(torch_device)
    run_dir, start_from = Path(run_dir), None if start_from is None else str(start_from)
    check_tracker(config.evaluation.tracker)
    previous = read_previous(run_dir) if is_rank0 else None  # only rank 0 needs the folder

    # The data, and the settings that depend on it or on the run so far
    training_set, held_out = (
        load_images(config.data.dataset, split, data_dir, config.data.image_size) for split in ("train", "test")
    )
    asked = config.model.num_classes
    if asked == "auto" and training_set.labels is None and previous is not None:  # a run with classes needs them
        config = replace(config, model=replace(config.model, num_classes=previous.config.model.num_classes))
    config = _with_sigma_data(with_num_classes(config, training_set), training_set)
    labels = training_set.labels if config.model.num_classes else None
    config, restarts = (config, []) if previous is None else continue_schedule(previous, config)
    warmup_steps = processes.broadcast_number(config.training.warmup_steps)
    config = replace(config, training=replace(config.training, warmup_steps=warmup_steps))

    # The network at step 0
    schedule = build_schedule(config.diffusion)
    channels, image_size = training_set.images.shape[1:3]
    scale = input_scale(config.diffusion.predicted, schedule)
    torch.manual_seed(config.training.seed)
    model = build_unet(config.model, channels, image_size, config.diffusion.num_timesteps, scale).to(torch_device)
    state = new_state(model, config.training)
    scaled = state.loss_scale is not None
    if processes.any_rank(scaled) and processes.any_rank(not scaled):
        raise InputError("--training.precision auto differs between these GPUs; give fp16 or float32")
    state.schedule_start = processes.broadcast_number(restarts[-1] if restarts else 0)

    # What config.json will hold; whatever can be refused is refused here, before the folder is written
    record = _run_record(config, training_set, torch_device)
    if restarts:
        record["continued_at"] = restarts
    changed = resume_record(run_dir, record, start_from) if is_rank0 else {}
    if is_rank0 and start_from is not None and not checkpoint_steps(run_dir):
        record["from"] = start_from_model(state, load(start_from, device="cpu"), config)
    scorer = training_scorer(config, training_set, held_out, data_dir, torch_device)

    # The folder, the newest checkpoint, and a session
    lock = locked(run_dir, "--run") if is_rank0 else nullcontext()
    with lock, deterministic_algorithms(config.training.deterministic):
        seconds_before = 0.0
        if is_rank0:
            resume_record(run_dir, record, start_from)  # again, for another process may have written before the lock
            seconds_before = _open_folder(run_dir, record, state)
        _broadcast_state(state)
        if state.step >= config.training.num_steps:
            say(f"{run_dir} has all its {state.step} steps; give more --training.num-steps to continue")
        else:
            cost = training_cost(config, state, schedule, training_set, torch_device)
            say(f"{run_dir} {_beginning(state, start_from)}: {cost}")
            if labels is not None:
                say(f"{config.model.num_classes} classes: {listed(training_set.class_names or ())}")
            elif asked == "auto":
                say(f"without classes: {config.data.dataset} has no labels: {training_set.unlabelled}")
            if changed:
                values = [f"{name} {record['computed'][name]} (was {old})" for name, old in changed.items()]
                say(f"from here on with {', '.join(values)}: not bit for bit the weights of an uninterrupted run")
        session = Session(config, run_dir, state, schedule, held_out, record, seconds_before, scorer)
        session.run(training_set.images, labels)
    return checkpoint_path(run_dir, state.step)


def with_num_classes(config: Config, training_set: ImageSet) -> Config:
    """The configuration with the number of classes of the data set in the place of auto; None if it has no labels.

    Raises:
        InputError: a number for a data set that has no labels or another number, or a class without training images.
    """
    num_classes, dataset, names = config.model.num_classes, config.data.dataset, training_set.class_names
    if num_classes is None:
        return config
    if training_set.labels is None or names is None:
        if num_classes == "auto":
            return replace(config, model=replace(config.model, num_classes=None))
        raise InputError(
            f"model.num_classes requires a data set with labels; {dataset} has none: {training_set.unlabelled}"
        )
    if num_classes not in ("auto", len(names)):
        raise InputError(f"model.num_classes must be {len(names)} for {dataset}, not {num_classes}")
    for name, count in zip(names, training_set.labels.bincount(minlength=len(names)).tolist(), strict=True):
        if count == 0:
            raise InputError(f"no image of the class {name} is left for training, as some are held out; add more")
    return replace(config, model=replace(config.model, num_classes=len(names)))


def _with_sigma_data(config: Config, training_set: ImageSet) -> Config:
    """The configuration with the standard deviation of the pixels, if the prediction needs it and it is not set."""
    diffusion = config.diffusion
    if diffusion.prediction != "edm" or diffusion.sigma_data is not None:
        return config
    deviation = pixel_deviation(training_set.images)
    if deviation == 0:
        raise InputError(f"all pixels of {training_set.name} have one value; the prediction edm needs other images")
    return replace(config, diffusion=replace(diffusion, sigma_data=deviation))


def _run_record(config: Config, training_set: ImageSet, device: torch.device) -> dict[str, Any]:
    """What the `config.json` of a new run holds."""
    dtype = resolve_precision(config.training.precision, device)
    classes = {}
    if config.model.num_classes and training_set.labels is not None:
        labels_sha256 = hashlib.sha256(training_set.labels.numpy().tobytes()).hexdigest()
        classes = {"class_names": training_set.class_names, "labels_sha256": labels_sha256}
    return {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "first_num_steps": config.training.num_steps,
        "data": {
            "name": training_set.name,
            "num_images": len(training_set),
            "image_shape": list(training_set.images.shape[1:]),
            "sha256": training_set.sha256,
            **classes,
        },
        "versions": versions(),
        "computed": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processes": processes.world_size(),
            "compiled": is_compiled(config.training, device),
            "tf32": uses_tf32(),
            "deterministic": config.training.deterministic,
        },
    }


def versions() -> dict[str, str]:
    """The versions of the packages that a run's numbers depend on."""
    packages = ("ddpm-lab", "torch", "numpy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def _open_folder(run_dir: Path, record: dict[str, Any], state: TrainingState) -> float:
    """Load the newest checkpoint, write config.json, and cut later lines of the logs.

    Returns:
        The seconds of training so far.
    """
    steps = checkpoint_steps(run_dir)
    if steps:
        folder = checkpoint_path(run_dir, steps[-1])
        if read_meta(folder)["step"] != steps[-1]:
            raise InputError(f"{folder}/meta.json is of step {read_meta(folder)['step']}, unlike the folder's name")
        for name, tensors in state.tensors().items():
            if name != LOSS_SCALE_FILE or name in read_meta(folder)["sha256"]:  # else another dtype was used so far
                load_tensors(folder, name, tensors)
        state.set_step(steps[-1])
    path, text = run_dir / "config.json", json.dumps(record, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_atomically(path, text.encode())
    log = cut_lines(run_dir / LOG, state.step)
    cut_lines(run_dir / SCORES, state.step)
    return float(log[-1]["seconds"]) if log else 0.0


def _broadcast_state(state: TrainingState) -> None:
    """Send rank 0's state to all processes, so that only rank 0 needs the run's folder."""
    if processes.is_distributed():
        for tensors in state.tensors().values():
            processes.broadcast_tensors(tensors.values())
        state.set_step(processes.broadcast_number(state.step))


def _beginning(state: TrainingState, start_from: str | None) -> str:
    """How the session begins, for a message."""
    if state.step == 0:
        return "starts" if start_from is None else f"starts from {start_from}"
    restarted = state.step == state.schedule_start
    return f"continues from step {state.step}" + ", where its learning rate starts again after falling to 0" * restarted

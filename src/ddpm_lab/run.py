"""A run: a folder that training writes, continues and can always be continued from.

    config.json   log.jsonl   scores.jsonl   checkpoints/step_00010000/   samples/step_00010000.png

`train` drives `training_loop`, and does between its steps all that training itself does not know about. Invariant: the
newest checkpoint is whole, and the log ends at or after it; on resume what is later is cut, and comes again.
"""

import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddpm_lab.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_optimizer,
    load_parameters,
    read_meta,
    remove_old_checkpoints,
    save_checkpoint,
)
from ddpm_lab.config import Config, SamplingConfig
from ddpm_lab.cost import training_cost
from ddpm_lab.data import ImageSet, load_images
from ddpm_lab.files import TEMPORARY_PREFIX, locked, replace_atomically
from ddpm_lab.generation import generate
from ddpm_lab.images import image_grid, save_png, visible_scale
from ddpm_lab.log import append_line, cut_lines, read_lines
from ddpm_lab.progress import progress
from ddpm_lab.schedule import NoiseSchedule, build_schedule
from ddpm_lab.settings import InputError, RunError
from ddpm_lab.trained import TrainedModel, read_run_record
from ddpm_lab.training import (
    TrainingState,
    TrainingStep,
    new_state,
    resolve_device,
    training_loop,
    validation_loss,
)
from ddpm_lab.unet import build_unet

LOG, SCORES = "log.jsonl", "scores.jsonl"
BANDS = 10  # of timesteps, in loss_by_t
FREE_TO_CHANGE = {"training": ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints"), "evaluation": None}


class Interrupted(RuntimeError):
    """The user stopped the run; a checkpoint was written."""


@dataclass
class Interval:
    """What is summed up between two lines of the log."""

    steps: list[TrainingStep]
    begun: float


def train(
    config: Config,
    run_dir: Path,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Train a run to its last step, from its newest checkpoint where it has one.

    Args:
        config: what to train; it must agree with the run's, where there is one.
        run_dir: made where it does not exist.
        device: auto, cpu, cuda or mps.
        data_dir: see `data.load_images`.
        say: takes a line of text for the user, now and then.
    Returns:
        The folder of the last checkpoint.
    Raises:
        InputError: data, device, model or run folder do not fit; what existed is as it was.
        RunError: the loss or a gradient is not finite, or the disk is full; the newest checkpoint stays.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    on = resolve_device(device)
    _check_folder(run_dir)
    training_set = load_images(config.data.dataset, "train", data_dir, config.data.image_size)
    held_out = load_images(config.data.dataset, "test", data_dir, config.data.image_size)
    channels, image_size = training_set.images.shape[1:3]
    schedule = build_schedule(config.diffusion)
    torch.manual_seed(config.training.seed)
    model = build_unet(config.model, channels, image_size, config.diffusion.num_timesteps).to(on)
    if on.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    state = new_state(model, config.training)
    record = _run_record(config, training_set)
    _check_agreement(run_dir, record)

    with locked(run_dir, "--run"):
        _check_agreement(run_dir, record)
        steps = checkpoint_steps(run_dir)
        if steps:
            _restore(state, checkpoint_path(run_dir, steps[-1]), steps[-1])
        if _read_text(run_dir / "config.json") != _as_json(record):
            replace_atomically(run_dir / "config.json", _as_json(record).encode())
        logged = cut_lines(run_dir / LOG, state.step)
        cut_lines(run_dir / SCORES, state.step)
        seconds = float(logged[-1]["seconds"]) if logged else 0.0
        if state.step >= config.training.num_steps:
            say(f"{run_dir} has all its {state.step} steps; give more --training.num-steps to go on")
        else:
            beginning = f"continues from step {state.step}" if state.step else "starts"
            say(f"{run_dir} {beginning}: {training_cost(config, state, schedule, training_set, on)}")
        scorer = _scorer(config, training_set, data_dir, on)
        session = _Session(
            config, run_dir, state, schedule, held_out.images.to(on), training_set, record, seconds, scorer
        )
        try:
            session.catch_up()
            if state.step < config.training.num_steps:
                session.run(training_set.images.to(on))
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be written at step {state.step}: {error.strerror or error}; "
                f"the last checkpoint is of step {_last_step(run_dir)}"
            ) from error
    return checkpoint_path(run_dir, state.step)


class _Session:
    """One sitting of a run: the loop, and what happens between its steps."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        state: TrainingState,
        schedule: NoiseSchedule,
        held_out: Tensor,
        training_set: ImageSet,
        record: dict[str, Any],
        seconds: float,
        scorer: Callable[[TrainedModel], dict[str, Any]] | None,
    ) -> None:
        self.config, self.run_dir, self.state, self.schedule = config, run_dir, state, schedule
        self.held_out = held_out[: config.evaluation.validation_images]
        channels, height, width = training_set.images.shape[1:]
        self.image_shape = (channels, height, width)
        self.record, self.seconds_before, self.begun = record, seconds, time.monotonic()
        self.scorer = scorer

    def catch_up(self) -> None:
        """Draw and score what was due at the newest checkpoint, where a kill came before it."""
        step, last = self.state.step, self.state.step == self.config.training.num_steps
        if step and (last or step % self.config.evaluation.sample_every == 0) and not self._grid_path().exists():
            self._sample_grid()
        if step and self._scoring(step) and not self._scored():
            self._score()

    def run(self, images: Tensor) -> None:
        """Train to the end, logging, validating, sampling and saving when each is due."""
        training, evaluation, state = self.config.training, self.config.evaluation, self.state
        interval = Interval([], time.monotonic())
        with (
            _stop_signals() as stopped,
            progress("training", training.num_steps, "steps", start=state.step) as advance,
        ):
            for step in training_loop(state, self.schedule, images, self.config):
                interval.steps.append(step)
                k, last = step.step, step.step == training.num_steps
                stopping = stopped.is_set()  # read once: a signal that comes later is served after the next step
                saving = k % training.checkpoint_every == 0 or last or stopping
                validating = k % evaluation.validate_every == 0 or last
                sampling = k % evaluation.sample_every == 0 or last
                scoring = self._scoring(k)
                logging = k % training.log_every == 0 or saving or validating or sampling or scoring
                if logging:
                    line = self._summary(interval)
                    if validating:
                        line["validation_loss"] = self._validation_loss()
                    append_line(self.run_dir / LOG, line)
                    advance(0, f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
                if saving:
                    save_checkpoint(self.run_dir, state.step, state.model, state.ema, state.optimizer)
                    remove_old_checkpoints(self.run_dir, training.keep_checkpoints)
                if sampling:
                    self._sample_grid()
                if scoring:
                    self._score()
                if logging:  # what was drawn and scored since is not counted as time of training
                    interval = Interval([], time.monotonic())
                advance(1)
                if stopping and not last:
                    raise Interrupted(
                        f"stopped at step {state.step}; its checkpoint is written, the same command goes on"
                    )

    def _summary(self, interval: Interval) -> dict[str, Any]:
        """A line of the log; stops the run where a loss or a gradient was not finite."""
        steps, config = interval.steps, self.config
        losses = torch.stack([step.losses for step in steps]).double().cpu()
        grad_norms = torch.stack([step.grad_norm for step in steps]).double().cpu()
        for values, what in ((losses.mean(1), "loss"), (grad_norms, "gradient")):
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                self._stop_not_finite(what, steps[int(bad[0])].step)
        elapsed = time.monotonic() - interval.begun
        t = torch.stack([step.t for step in steps]).cpu()
        bands = t * BANDS // config.diffusion.num_timesteps
        by_t = [losses[bands == band].mean().item() if bool((bands == band).any()) else None for band in range(BANDS)]
        return {
            "step": steps[-1].step,
            "images": steps[-1].step * config.training.batch_size,
            "loss": losses.mean().item(),
            "loss_by_t": by_t,
            "grad_norm": grad_norms.mean().item(),
            "lr": steps[-1].learning_rate,
            "images_per_second": losses.numel() / elapsed,
            "seconds": self.seconds_before + time.monotonic() - self.begun,
        }

    def _validation_loss(self) -> float:
        loss = validation_loss(self.state.ema, self.schedule, self.held_out, self.config.diffusion.prediction)
        if not math.isfinite(loss):
            self._stop_not_finite("validation loss", self.state.step)
        return loss

    def _stop_not_finite(self, what: str, step: int) -> NoReturn:
        raise RunError(
            f"the {what} is not finite at step {step} (seed {self.config.training.seed}); "
            f"the last checkpoint is of step {_last_step(self.run_dir)}; a lower --training.learning-rate may help"
        )

    def _grid_path(self) -> Path:
        return self.run_dir / "samples" / f"step_{self.state.step:08d}.png"

    def _trained(self) -> TrainedModel:
        return TrainedModel(
            str(self.run_dir), self.config, self.state.ema, self.schedule, self.image_shape, self.state.step,
            "ema", self.run_dir, self.record,
        )  # fmt: skip

    def _scoring(self, step: int) -> bool:
        every = self.config.evaluation.score_every
        return every > 0 and (step % every == 0 or step == self.config.training.num_steps)

    def _scored(self) -> bool:
        return any(
            line["step"] == self.state.step and line.get("by") == "training"
            for line in read_lines(self.run_dir / SCORES)
        )

    def _score(self) -> None:
        assert self.scorer is not None
        try:
            record = self.scorer(self._trained())
        except OSError as error:
            raise RunError(
                f"step {self.state.step} could not be scored: {error.filename or 'cache'}: {error.strerror or error} "
                f"(DDPM_CACHE_DIR names another cache); the last checkpoint is of step {_last_step(self.run_dir)}"
            ) from error
        append_line(self.run_dir / SCORES, record)

    def _sample_grid(self) -> None:
        evaluation = self.config.evaluation
        sampling = SamplingConfig(num_steps=evaluation.sample_steps, batch_size=min(evaluation.sample_images, 64))
        images = torch.cat(list(generate(self._trained(), evaluation.sample_images, sampling)))
        self._grid_path().parent.mkdir(exist_ok=True)
        save_png(self._grid_path(), image_grid(images, scale=visible_scale(self.image_shape[1])))


def _scorer(
    config: Config, training_set: ImageSet, data_dir: Path | None, device: torch.device
) -> Callable[[TrainedModel], dict[str, Any]] | None:
    """What scores a network in the course of a run: built at its start, so that what is amiss is told then."""
    if config.evaluation.score_every == 0:
        return None
    from ddpm_lab.scores import training_scorer

    return training_scorer(config, training_set, data_dir, device)


def _last_step(run_dir: Path) -> str:
    steps = checkpoint_steps(run_dir)
    return str(steps[-1]) if steps else "none yet"


def _restore(state: TrainingState, folder: Path, step: int) -> None:
    if read_meta(folder)["step"] != step:
        raise InputError(f"{folder} says in its meta.json that it is of step {read_meta(folder)['step']}")
    load_parameters(state.model, folder, "model.safetensors")
    load_parameters(state.ema, folder, "ema.safetensors")
    load_optimizer(state.optimizer, state.model, folder, step)
    state.step = step


def _run_record(config: Config, training_set: ImageSet) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "data": {
            "name": training_set.name,
            "num_images": len(training_set),
            "image_shape": list(training_set.images.shape[1:]),
            "sha256": training_set.sha256,
        },
        "versions": {
            "ddpm-lab": version("ddpm-lab"),
            "torch": version("torch"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
    }


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _check_folder(run_dir: Path) -> None:
    """Refuse a folder that is something else than a run, before anything is made in it."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run {run_dir} is a file; name a folder, new or of a run")
    if run_dir.is_dir() and not (run_dir / "config.json").exists():
        # What a run killed at its very start leaves behind is no stranger.
        names = (path.name for path in run_dir.iterdir())
        others = sorted(name for name in names if name != ".lock" and not name.startswith(TEMPORARY_PREFIX))
        if others:
            raise InputError(
                f"--run {run_dir} holds {others[0]} but no config.json: it is not a run; name another folder"
            )


def _check_agreement(run_dir: Path, record: dict[str, Any]) -> None:
    """Refuse settings or data other than those the run was begun with, except where changing them is harmless."""
    if not (run_dir / "config.json").exists():
        return
    old_record, old, _ = read_run_record(run_dir / "config.json")
    new = Config.from_dict(record["config"])
    if new.training.num_steps != old.training.num_steps:
        steps = checkpoint_steps(run_dir)
        if old.training.decay != "constant":
            raise InputError(
                f"run {run_dir} was planned for {old.training.num_steps} steps, and its learning rate falls to 0 there "
                f"(training.decay {old.training.decay}); {new.training.num_steps} need another --run"
            )
        if steps and new.training.num_steps < steps[-1]:
            raise InputError(
                f"run {run_dir} has {steps[-1]} steps already; training.num_steps can only grow, "
                f"not be {new.training.num_steps}"
            )
    for group, values in new.to_dict().items():
        free = FREE_TO_CHANGE.get(group, ())
        for name, value in values.items():
            there = old.to_dict()[group][name]
            if value != there and free is not None and name not in free:
                raise InputError(
                    f"run {run_dir} exists with {group}.{name} {json.dumps(there)}, not {json.dumps(value)}; "
                    f"give --{group}.{name.replace('_', '-')} {json.dumps(there)}, or another --run"
                )
    if old_record["data"].get("sha256") != record["data"]["sha256"]:
        raise InputError(f"run {run_dir} was begun on other images than those of {record['data']['name']} now")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event, so that the step under way can end; a second SIGINT interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask(signum: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

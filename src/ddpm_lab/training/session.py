"""A session of a run: from its start or newest checkpoint until the last step, an interruption or an error.

The training loop only trains. A session logs, validates, saves, samples and scores between its steps. Invariant: a step
is logged before its checkpoint is written, so the log never ends before the newest checkpoint. If the process dies
before a checkpoint's samples or scores are complete, the next session makes them.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, SamplingConfig
from ddpm_lab.core.errors import Interrupted, RunError
from ddpm_lab.core.log import BANDS, LOG, SCORES, append_line, read_lines
from ddpm_lab.core.progress import Advance, progress
from ddpm_lab.data.datasets import ImageSet
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.models.checkpoint import CheckpointWriter, last_step, not_writable
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.film import save_film
from ddpm_lab.pictures.picture_settings import SHORT_FILM
from ddpm_lab.pictures.reverse import record_trajectory, reverse_frames
from ddpm_lab.sampling.generation import generate
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.training.loop import TrainingState, TrainingStep, training_loop, validation_loss
from ddpm_lab.training.optimizer import LEAST_SCALE
from ddpm_lab.training.tracking import Tracking


def average_steps(record: dict[str, Any]) -> set[int]:
    """The steps whose averaged weights a run keeps: 1/16, 1/8 and 1/4 of the number of steps it started with.

    They serve as guiding networks (`--guide`) for the trained one.

    Args:
        record: the run's `config.json`.
    """
    num_steps = record.get("first_num_steps", 0)
    return {num_steps // divisor for divisor in (16, 8, 4)}


@dataclass
class Session:
    """Trains a run in this process, with all that happens between the steps.

    Attributes:
        config: the run's.
        run_dir: its folder.
        state: the training state at the newest checkpoint, changed in place by `run`.
        schedule: the forward process.
        held_out: images for the validation loss.
        record: the run's `config.json`.
        seconds_before: training time of earlier sessions.
        scorer: scores a model, and returns the record on rank 0; None where the run is not scored.
    """

    config: Config
    run_dir: Path
    state: TrainingState
    schedule: NoiseSchedule
    held_out: ImageSet
    record: dict[str, Any]
    seconds_before: float
    scorer: Callable[[TrainedModel], dict[str, Any] | None] | None

    def __post_init__(self) -> None:
        """Raises InputError where the tracker does not start."""
        self.checkpoints = CheckpointWriter(self.run_dir, self.config.training.keep_checkpoints)
        self.tracking = Tracking(self.config, self.run_dir, self.state.step)
        self._unlogged: list[TrainingStep] = []  # steps since the last line of the log
        self._start_time = self._unlogged_time = time.monotonic()  # of the session, and of the first such step

    def run(self, images: Tensor, labels: Tensor | None) -> None:
        """Make what is missing at the newest checkpoint, then train to the last step.

        Args:
            images: the training set, (N, C, H, W) uint8; labels: (N,) int64, for a conditional network.
        Raises:
            RunError: a loss or gradient is not finite, or the folder cannot be written.
            Interrupted: a signal stopped it; a checkpoint was written.
        """
        try:
            self._catch_up()
            if self.state.step < self.config.training.num_steps:
                self._train(images, labels)
        except OSError as error:
            raise not_writable(self.run_dir, self.state.step, error) from error
        finally:
            self.tracking.close()

    def _catch_up(self) -> None:
        """Sample and score the newest checkpoint if that was due and an earlier session died before it."""
        evaluation, is_rank0 = self.config.evaluation, processes.is_rank0()
        if is_rank0 and self._due(evaluation.sample_every) and not self._grid_path().exists():
            self._sample_grid()
        scored = [score["step"] for score in read_lines(self.run_dir / SCORES) if score.get("by") == "training"]
        missing = is_rank0 and self._due(evaluation.score_every) and self.state.step not in scored
        if processes.any_rank(missing):
            self._score()

    def _train(self, images: Tensor, labels: Tensor | None) -> None:
        """Run the loop. All processes train and score; rank 0 does the rest."""
        training, state = self.config.training, self.state
        device = next(state.model.parameters()).device
        images, labels = images.to(device), None if labels is None else labels.to(device)
        self._unlogged_time, agreement = time.monotonic(), processes.PeriodicAgreement()
        with (
            _StopSignals() as stop,
            self.checkpoints,
            progress("training", training.num_steps, "steps", start=state.step) as advance,
        ):
            for step in training_loop(state, self.schedule, images, self.config, labels):
                self._unlogged.append(step)
                logging = self._logging_due()
                # Decided by all at the same step: a signal may come to one process only.
                stopping = agreement.any_rank(stop.requested, logging)
                losses = self._gathered_losses() if logging or stopping else None
                if processes.is_rank0():
                    self._log_and_save(losses, stopping, advance)
                if losses is not None:
                    self._unlogged.clear()
                if self._due(self.config.evaluation.score_every) and self._score_unless_stopped(stop):
                    self._save()
                    stopping = True
                if not self._unlogged:  # time spent on samples and scores is not training time
                    self._unlogged_time = time.monotonic()
                advance(1)
                self.checkpoints.check()
                if stopping and state.step < training.num_steps:
                    self.checkpoints.wait()
                    raise Interrupted(f"stopped at step {state.step} with a checkpoint; the same command continues")
        if processes.any_rank(stop.requested):  # during the last step: a study must not go on to the next cell
            raise Interrupted(f"stopped after step {state.step}, the last; the same command makes what is missing")

    def _due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the last one, happens after this step."""
        step = self.state.step
        return every > 0 and step > 0 and (step % every == 0 or step == self.config.training.num_steps)

    def _logging_due(self) -> bool:
        """Whether a line of the log is due after this step; the same in every process."""
        training, evaluation = self.config.training, self.config.evaluation
        intervals = (training.log_every, training.checkpoint_every, evaluation.validate_every)
        return any(self._due(every) for every in (*intervals, evaluation.sample_every, evaluation.score_every))

    def _gathered_losses(self) -> Tensor:
        """The losses of all processes in the steps since the last line of the log, (steps, B) float64."""
        losses = torch.stack([step.losses for step in self._unlogged], dim=1)  # (B / processes, steps)
        return processes.gather(losses).T.cpu().double()

    def _log_and_save(self, losses: Tensor | None, stopping: bool, advance: Advance) -> None:
        """Log, validate, save and sample after a step, each if it is due.

        Args:
            losses: see `_gathered_losses`, where a line of the log is due; else None.
            stopping: whether the run stops after this step.
            advance: of the progress bar.
        """
        step, seed = self._unlogged[-1], self.config.training.seed
        if step.loss_scale is not None and step.loss_scale < LEAST_SCALE:
            raise RunError(
                f"in float16 the gradients overflow at step {step.step} (seed {seed}) however the loss is scaled, "
                f"so the network has diverged; the last checkpoint is of step {self._last_step()}; a lower "
                "--training.learning-rate may help"
            )
        if losses is not None:
            line = self._log_line(losses)
            if self._due(self.config.evaluation.validate_every):
                line["validation_loss"] = self._validation_loss()
            append_line(self.run_dir / LOG, line)
            self.tracking.line(line)
            loss = "" if line["loss"] is None else f"loss {line['loss']:.4f}, "
            advance(0, f"{loss}{line['images_per_second']:.0f} images/s")
        if stopping or self._due(self.config.training.checkpoint_every):
            self._save()
        if self.state.step in average_steps(self.record):
            self.checkpoints.save_average(self.state.step, self._finite_tensors())
        if self._due(self.config.evaluation.sample_every):
            self._sample_grid()

    def _save(self) -> None:
        self.checkpoints.save(self.state.step, self._finite_tensors())

    def _finite_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint.

        Raises:
            RunError: one of them is not finite.
        """
        files = self.state.tensors()
        for name, tensors in files.items():
            largest = torch.stack([tensor.detach().abs().max().float() for tensor in tensors.values()]).max()
            self._check_finite(name.removesuffix(".safetensors"), largest.item(), self.state.step)
        return files

    def _log_line(self, losses: Tensor) -> dict[str, Any]:
        """A line of the log, on the steps since the last one; means are over those that were not skipped.

        Raises:
            RunError: a loss or a gradient was not finite.
        """
        now = time.monotonic()  # the device has computed the losses
        steps, config = self._unlogged, self.config
        taken = torch.tensor([not step.skipped for step in steps])
        t = torch.stack([step.t for step in steps]).cpu()[taken]
        losses, grad_norms = losses[taken], torch.stack([step.grad_norm for step in steps]).cpu().double()[taken]
        for index, step in enumerate(step for step in steps if not step.skipped):
            self._check_finite("loss", losses[index].mean().item(), step.step)
            self._check_finite("gradient", grad_norms[index].item(), step.step)
        bands = t * BANDS // config.diffusion.num_timesteps
        line = {
            "step": steps[-1].step,
            "images": steps[-1].step * config.training.batch_size,
            "loss": _mean(losses),
            "loss_by_t": [_mean(losses[bands == band]) for band in range(BANDS)],
            "grad_norm": _mean(grad_norms),
            "lr": steps[-1].learning_rate,
            "images_per_second": len(steps) * config.training.batch_size / (now - self._unlogged_time),
            "seconds": self.seconds_before + now - self._start_time,
        }
        if steps[-1].loss_scale is not None:
            line |= {"skipped_steps": sum(step.skipped for step in steps), "loss_scale": steps[-1].loss_scale}
        return line

    def _validation_loss(self) -> float:
        ema, count = self.state.ema, self.config.evaluation.validation_images
        device = next(ema.parameters()).device
        labels = None
        if self.config.model.num_classes is not None and self.held_out.labels is not None:
            labels = self.held_out.labels[:count].to(device)
        images = self.held_out.images[:count].to(device)
        loss = validation_loss(ema, self.schedule, images, self.config.diffusion.predicted, labels=labels)
        self._check_finite("validation loss", loss, self.state.step)
        return loss

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise RunError(
                f"the {name} is not finite at step {step} (seed {self.config.training.seed}); "
                f"the last checkpoint is of step {self._last_step()}; a lower --training.learning-rate may help"
            )

    def _last_step(self) -> str:
        self.checkpoints.wait()
        return last_step(self.run_dir)

    def _trained_model(self) -> TrainedModel:
        channels, height, width = self.record["data"]["image_shape"]
        return TrainedModel(
            str(self.run_dir), self.config, self.state.ema, self.schedule, (channels, height, width), self.state.step,
            "ema", self.run_dir, self.record,
        )  # fmt: skip

    def _score_unless_stopped(self, stop: "_StopSignals") -> bool:
        """Score, which takes minutes; a signal ends it at once, and the next session scores. Returns whether one came.

        Several processes compute a score together, so there a signal waits for its end.
        """
        if processes.world_size() > 1:
            self._score()
            return False
        stop.interrupts = True
        try:
            if not stop.requested:  # a signal may have come during logging or sampling
                self._score()
            return stop.requested
        except KeyboardInterrupt:
            return True
        finally:
            stop.interrupts = False

    def _score(self) -> None:
        assert self.scorer is not None
        try:
            record = self.scorer(self._trained_model())
        except OSError as error:
            raise RunError(
                f"step {self.state.step} could not be scored: {error.filename or 'cache'}: {error.strerror or error} "
                f"(DDPM_CACHE_DIR names another cache); the last checkpoint is of step {self._last_step()}"
            ) from error
        if record is not None:  # on rank 0
            append_line(self.run_dir / SCORES, record)
            self.tracking.score(record)

    def _grid_path(self) -> Path:
        return self.run_dir / "samples" / f"step_{self.state.step:08d}.png"

    def _sample_grid(self) -> None:
        """Sample the averaged weights into a PNG; after the last step a tracker also gets a film."""
        trained, evaluation = self._trained_model(), self.config.evaluation
        scale = visible_scale(trained.image_shape[1])
        sampling = SamplingConfig(num_steps=evaluation.sample_steps, batch_size=min(evaluation.sample_images, 64))
        images = torch.cat(list(generate(trained, evaluation.sample_images, sampling)))
        self._grid_path().parent.mkdir(exist_ok=True)
        grid = image_grid(images, scale=scale)
        save_png(self._grid_path(), grid)
        self.tracking.picture("samples", grid, trained.step)
        if evaluation.tracker != "none" and trained.step == self.config.training.num_steps:
            film = self.run_dir / "samples" / "reverse.gif"
            trajectory = record_trajectory(trained, sampling, 4, SHORT_FILM.frames or 2)
            save_film(film, reverse_frames([trajectory], scale), SHORT_FILM)
            self.tracking.film("reverse", film, trained.step)


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None


class _StopSignals:
    """In its context SIGINT and SIGTERM ask the session to stop after the current step; a second one interrupts it.

    Attributes:
        requested: whether one came.
        interrupts: whether already the first raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = self.interrupts = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or self.interrupts:
            raise KeyboardInterrupt

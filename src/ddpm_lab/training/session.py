"""One sitting of a run: the training loop, and what happens between its steps, of which the loop knows nothing.

Invariant: a step is logged before its checkpoint is begun, so that the log is never behind the newest checkpoint; its
samples and scores come again on resume, where the checkpoint did not come to be.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, SamplingConfig
from ddpm_lab.core.errors import Interrupted, RunError
from ddpm_lab.core.log import BANDS, LOG, SCORES, append_line, read_lines
from ddpm_lab.core.progress import Advance, progress
from ddpm_lab.data.datasets import ImageSet
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.models.checkpoint import CheckpointWriter, last_step, snapshot
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.film import save_film
from ddpm_lab.pictures.picture_settings import SHORT_FILM
from ddpm_lab.pictures.reverse import record_trajectory, reverse_frames
from ddpm_lab.sampling.generation import generate
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.training.loop import TrainingState, TrainingStep, training_loop, validation_loss
from ddpm_lab.training.tracking import Tracking


def averages_at(record: dict[str, Any]) -> list[int]:
    """The steps whose averaged weights a run keeps: a sixteenth, an eighth and a quarter of those it began with.

    They serve as guides (`--guide`) of the network that comes of it.

    Args:
        record: the run's `config.json`.
    """
    planned = record.get("first_num_steps", 0)
    return sorted({planned // share for share in (16, 8, 4)} - {0})


@dataclass
class Interval:
    """What is summed up between two lines of the log."""

    steps: list[TrainingStep]
    begun: float


class Session:
    """One sitting of a run: the loop, and what happens between its steps."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        state: TrainingState,
        schedule: NoiseSchedule,
        held_out: ImageSet,
        training_set: ImageSet,
        record: dict[str, Any],
        seconds: float,
        scorer: Callable[[TrainedModel], dict[str, Any] | None] | None,
    ) -> None:
        self.config, self.run_dir, self.state, self.schedule = config, run_dir, state, schedule
        self.held_out = held_out
        channels, height, width = training_set.images.shape[1:]
        self.image_shape = (channels, height, width)
        self.record, self.seconds_before, self.begun = record, seconds, time.monotonic()
        self.scorer = scorer
        self.checkpoints = CheckpointWriter(run_dir, config.training.keep_checkpoints, averages_at(record))
        self.tracking = Tracking(config, run_dir, state.step)

    def catch_up(self) -> None:
        """Draw and score what was due at the newest checkpoint, where a kill came before it."""
        step, last = self.state.step, self.state.step == self.config.training.num_steps
        due = step > 0 and (last or step % self.config.evaluation.sample_every == 0)
        if due and processes.is_rank0() and not self._grid_path().exists():
            self._sample_grid()
        missing = processes.is_rank0() and step > 0 and self._scoring(step) and not self._scored()
        if processes.any_rank(missing):
            self._score()

    def run(self, images: Tensor, labels: Tensor | None) -> None:
        """Train to the end, logging, validating, sampling and saving when each is due.

        All processes go through the steps and the scores; what else there is to do the leader does.
        """
        training, state = self.config.training, self.state
        interval = Interval([], time.monotonic())
        with (
            _stop_signals() as stop,
            self.checkpoints,
            progress("training", training.num_steps, "steps", start=state.step) as advance,
        ):
            for step in training_loop(state, self.schedule, images, self.config, labels):
                k, last = step.step, step.step == training.num_steps
                # asked once, and of all: a signal that comes later, or to one process only, is served alike by all
                stopping = processes.any_rank(stop.asked)
                logged = False
                if processes.is_rank0():
                    interval.steps.append(step)
                    logged = self._keep(interval, stopping, advance)
                if self._scoring(k) and self._score_unless(stop):
                    self._save()
                    stopping = True
                if logged:  # what was drawn and scored since is not counted as time of training
                    interval = Interval([], time.monotonic())
                advance(1)
                self.checkpoints.check()
                if stopping and not last:
                    self.checkpoints.wait()
                    raise Interrupted(
                        f"stopped at step {state.step}; its checkpoint is written, the same command goes on"
                    )
        if processes.any_rank(stop.asked):  # in the midst of the last step: a study is not to go on
            raise Interrupted(
                f"stopped after step {state.step}, the last; the same command makes what is missing of it"
            )

    def _keep(self, interval: Interval, stopping: bool, advance: Advance) -> bool:
        """Log, save and draw what is due after a step; whether it was logged."""
        training, evaluation, state = self.config.training, self.config.evaluation, self.state
        k, last = state.step, state.step == training.num_steps
        saving = k % training.checkpoint_every == 0 or last or stopping
        validating = k % evaluation.validate_every == 0 or last
        sampling = k % evaluation.sample_every == 0 or last
        logging = k % training.log_every == 0 or saving or validating or sampling or self._scoring(k)
        if logging:
            line = self._summary(interval)
            if validating:
                line["validation_loss"] = self._validation_loss()
            append_line(self.run_dir / LOG, line)
            self.tracking.line(line)
            advance(0, f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
        if saving:
            self._save()
        self.checkpoints.keep_average(k, state.ema)
        if sampling:
            self._sample_grid()
        return logging

    def _save(self) -> None:
        state = self.state
        self.checkpoints.save(state.step, snapshot(state.model, state.ema, state.kept()))

    def _summary(self, interval: Interval) -> dict[str, Any]:
        """A line of the log; stops the run where a loss or a gradient was not finite."""
        steps, config = interval.steps, self.config
        losses = torch.stack([step.losses for step in steps]).cpu().double()
        grad_norms = torch.stack([step.grad_norm for step in steps]).cpu().double()
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
        count, on = self.config.evaluation.validation_images, next(self.state.ema.parameters()).device
        labels = self.held_out.labels if self.config.model.num_classes is not None else None
        loss = validation_loss(
            self.state.ema, self.schedule, self.held_out.images[:count].to(on), self.config.diffusion.predicted,
            labels=None if labels is None else labels[:count].to(on),
        )  # fmt: skip
        if not math.isfinite(loss):
            self._stop_not_finite("validation loss", self.state.step)
        return loss

    def _stop_not_finite(self, what: str, step: int) -> NoReturn:
        raise RunError(
            f"the {what} is not finite at step {step} (seed {self.config.training.seed}); "
            f"the last checkpoint is of step {self._last_step()}; a lower --training.learning-rate may help"
        )

    def _last_step(self) -> str:
        self.checkpoints.wait()
        return last_step(self.run_dir)

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

    def _score_unless(self, stop: "_Stop") -> bool:
        """Score, but for a signal, which ends at once what takes minutes; whether one came. It is scored on resume.

        Among several processes all go through it, for they compute it together.
        """
        stop.at_once = processes.world_size() == 1
        try:
            if stop.at_once and stop.asked:  # a signal that came while the step was logged or drawn
                return True
            self._score()
        except KeyboardInterrupt:
            if not stop.at_once:
                raise
            return True
        finally:
            stop.at_once = False
        return False

    def _score(self) -> None:
        assert self.scorer is not None
        try:
            record = self.scorer(self._trained())
        except OSError as error:
            raise RunError(
                f"step {self.state.step} could not be scored: {error.filename or 'cache'}: {error.strerror or error} "
                f"(DDPM_CACHE_DIR names another cache); the last checkpoint is of step {self._last_step()}"
            ) from error
        if record is not None:  # the leader's
            append_line(self.run_dir / SCORES, record)
            self.tracking.score(record)

    def _sample_grid(self) -> None:
        evaluation = self.config.evaluation
        sampling = SamplingConfig(num_steps=evaluation.sample_steps, batch_size=min(evaluation.sample_images, 64))
        images = torch.cat(list(generate(self._trained(), evaluation.sample_images, sampling)))
        self._grid_path().parent.mkdir(exist_ok=True)
        grid = image_grid(images, scale=visible_scale(self.image_shape[1]))
        save_png(self._grid_path(), grid)
        self.tracking.picture("samples", grid, self.state.step)
        if self.config.evaluation.tracker != "none" and self.state.step == self.config.training.num_steps:
            film = self.run_dir / "samples" / "reverse.gif"
            shown = record_trajectory(self._trained(), sampling, 4, SHORT_FILM.frames or 2)
            save_film(film, reverse_frames([shown], visible_scale(self.image_shape[1])), SHORT_FILM)
            self.tracking.film("reverse", film, self.state.step)


@dataclass
class _Stop:
    """What signals ask for.

    Attributes:
        asked: to stop.
        at_once: whether a signal interrupts what is under way.
    """

    asked: bool = False
    at_once: bool = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask to stop once the step under way has ended; a second one interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: object) -> None:
        again, stop.asked = stop.asked, True
        if again or stop.at_once:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`ddpm tune`: learn the timesteps and coefficients of a sampler with few evaluations; the network stays as it is.

The student, a linear multistep sampler (see `diffusion.multistep`), starts as DPM-Solver++. Its images, from the noise
of image i, are drawn towards those that a teacher with many steps makes from the same noise. Tens of numbers are
learned, so a few hundred images suffice; images that are held out choose the best state on the way.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from ddpm_lab.core.config import SamplingConfig, Spacing, TuningConfig
from ddpm_lab.core.errors import require
from ddpm_lab.core.progress import duration, progress
from ddpm_lab.data.datasets import to_float
from ddpm_lab.diffusion.multistep import (
    Multistep,
    log_snr_at,
    multistep_sample,
    second_order,
    spaced_timesteps,
    timesteps_at,
)
from ddpm_lab.diffusion.schedule import LEAST_LOG_SNR, NoiseSchedule
from ddpm_lab.evaluation.evaluate import generated_images
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.models.tuned import save_tuned
from ddpm_lab.sampling.generation import ImageNoise, build_sampler, class_labels
from ddpm_lab.training.cost import evaluation_seconds

TEACHER_STEPS = 50
LEAST_GAP = 0.02  # as a share of the chain in log-SNR
STARTS: tuple[Spacing, ...] = ("logsnr", "karras")
CHECK_EVERY = 10  # iterations between losses of the held-out images


@dataclass(frozen=True)
class Examples:
    """Noises with the images that the teacher makes of them.

    Attributes:
        x_T: (N, C, H, W) float32.
        images: (N, C, H, W) float32 in [-1, 1].
        labels: (N,) int64, or None.
    """

    x_T: Tensor
    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.x_T)

    def take(self, indices: range) -> "Examples":
        """Those with these indices, in a cycle."""
        chosen = torch.tensor([i % len(self) for i in indices])
        return Examples(self.x_T[chosen], self.images[chosen], None if self.labels is None else self.labels[chosen])


class Student:
    """The numbers that are learned: gaps between timesteps in log-SNR, and corrections of DPM-Solver++'s coefficients.

    The first timestep is T-1. The gaps are those between the N timesteps and the end of the chain, as a softmax.

    Args:
        timesteps: those to start with, (N,) float64.
    """

    def __init__(self, schedule: NoiseSchedule, timesteps: Tensor) -> None:
        self.schedule, num_steps = schedule, len(timesteps)
        log_snr = torch.cat([log_snr_at(schedule, timesteps), log_snr_at(schedule, torch.zeros(1).double())])
        log_snr = log_snr.clamp(min=LEAST_LOG_SNR / 2)
        share = (log_snr[1:] - log_snr[:-1]) / (log_snr[-1] - log_snr[0])
        self.gaps = share.clamp(min=LEAST_GAP).log()  # also after the last, which may be at t = 0
        self.state = torch.zeros(num_steps, dtype=torch.float64)
        self.images = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        for numbers in (self.gaps, self.state, self.images):
            numbers.requires_grad_()

    def solver(self) -> Multistep:
        """The sampler of these numbers, with gradients."""
        T = self.schedule.num_timesteps
        first, last = log_snr_at(self.schedule, torch.tensor([T - 1.0, 0.0], dtype=torch.float64))
        first = first.clamp(min=LEAST_LOG_SNR / 2)
        log_snr = first + (last - first) * self.gaps.softmax(0).cumsum(0)[:-1]
        timesteps = torch.cat([torch.tensor([T - 1.0], dtype=torch.float64), timesteps_at(self.schedule, log_snr)])
        start = second_order(self.schedule, timesteps)
        return Multistep(timesteps, start.state + self.state, start.images + self.images.tril())


def distances(images: Tensor, others: Tensor) -> Tensor:
    """Root mean square difference of two images, (B,), of (B, C, H, W)."""
    return (images - others).square().flatten(1).mean(1).sqrt()


def fit(
    schedule: NoiseSchedule,
    num_steps: int,
    sample: Callable[[Multistep, Examples], Tensor],
    examples: Examples,
    held_out: Examples,
    config: TuningConfig,
    on_step: Callable[..., object] = lambda amount, note=None: None,
) -> tuple[Multistep, dict[str, float]]:
    """Learn a sampler.

    Args:
        schedule: of the network.
        num_steps: N, evaluations of the network.
        sample: the images that a sampler makes of the noise of examples, with gradients.
        examples, held_out: to learn from, and to choose by.
        config: iterations, batch size, learning rate.
        on_step: called after each iteration.
    Returns:
        The sampler with the least loss of the held-out images, and those losses: of DPM-Solver++ at the better of two
        spacings (start), and of it (tuned).
    """

    def held_out_loss(solver: Multistep) -> float:
        size = config.batch_size
        with torch.no_grad():
            parts = [held_out.take(range(i, min(i + size, len(held_out)))) for i in range(0, len(held_out), size)]
            return float(torch.cat([distances(sample(solver, part), part.images) for part in parts]).mean())

    starts = [second_order(schedule, spaced_timesteps(schedule, num_steps, spacing)) for spacing in STARTS]
    losses = [held_out_loss(solver) for solver in starts]
    start = least = min(losses)
    best = starts[losses.index(least)]
    student = Student(schedule, best.timesteps)
    groups = [
        {"params": [student.gaps], "lr": 5 * config.learning_rate},
        {"params": [student.state, student.images], "lr": config.learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)

    for k in range(1, config.iterations + 1):
        batch = examples.take(range((k - 1) * config.batch_size, k * config.batch_size))
        loss = distances(sample(student.solver(), batch), batch.images).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        falling.step()
        if k % CHECK_EVERY == 0 or k == config.iterations:
            with torch.no_grad():
                solver = student.solver()
            reached = held_out_loss(solver)
            if reached < least:
                best, least = solver, reached
        on_step(1, f"distance {least:.4f}, at first {start:.4f}")
    return best, {"start": start, "tuned": least}


def tune(
    trained: TrainedModel, config: TuningConfig, say: Callable[[str], object] = lambda line: None
) -> list[dict[str, Any]]:
    """Tune a sampler for each number of steps, and save it beside the weights.

    The teacher's images are kept in the cache, and each sampler is saved as soon as it is tuned.

    Args:
        trained: the network.
        config: numbers of steps, guidance, and the settings of tuning.
        say: called with lines of text for the user.
    Returns:
        The entries of `tuned.json`, see `models.tuned`.
    Raises:
        InputError: settings that do not fit the network, or a file of other weights.
    """
    T, schedule = trained.schedule.num_timesteps, trained.schedule
    require(max(config.num_steps) <= T, f"num_steps must be at most the {T} timesteps of {trained.name}")
    common = ("guidance", "guide", "guidance_interval", "seed", "precision")
    teacher = build_sampler(
        trained,
        SamplingConfig(
            sampler="dpmpp", num_steps=min(TEACHER_STEPS, T), **{name: getattr(config, name) for name in common}
        ),
    )
    count = config.num_images + config.held_out
    say(_cost(trained, config, teacher.num_evaluations, count))
    images = to_float(torch.cat(list(generated_images(trained, count, teacher.config).batches())))
    labels = class_labels(trained, teacher.config, range(count))
    device = next(trained.model.parameters()).device
    noise = ImageNoise(config.seed, range(count), trained.image_shape, device)(-1)
    both = Examples(noise, images.to(device), labels)
    examples, held_out = both.take(range(config.num_images)), both.take(range(config.num_images, count))

    def sample(solver: Multistep, batch: Examples) -> Tensor:
        model = teacher.model(batch.labels, len(batch))
        if solver.state.requires_grad:
            return multistep_sample(
                lambda x_t, t: recomputed(model, x_t, t, use_reentrant=False),
                schedule, batch.x_T, solver, prediction=trained.prediction,
            )  # fmt: skip
        return multistep_sample(model, schedule, batch.x_T, solver, prediction=trained.prediction)

    entries = []
    for num_steps in config.num_steps:
        with progress(f"tuning {num_steps} steps", config.iterations, "iterations") as advance:
            solver, losses = fit(schedule, num_steps, sample, examples, held_out, config, advance)
        entry = {
            "weights_sha256": trained.weights_sha256,
            "num_timesteps": T,
            "num_steps": num_steps,
            "guidance": teacher.config.guidance or 1.0,
            "guide_sha256": None if teacher.guide is None else teacher.guide.weights_sha256,
            "guidance_interval": list(config.guidance_interval),
            "timesteps": solver.timesteps.tolist(),
            "state": solver.state.tolist(),
            "images": [row[: i + 1] for i, row in enumerate(solver.images.tolist())],
            "loss": losses,
            "teacher": {"sampler": "dpmpp", "num_steps": teacher.num_steps},
            "tuning": dataclasses.asdict(config),
            "versions": {name: version(name) for name in ("ddpm-lab", "torch")},
        }
        path = save_tuned(trained, entry)
        reached, at_first = losses["tuned"], losses["start"]
        say(f"{path}: {num_steps} steps, distance to the teacher {reached:.4f} (at first {at_first:.4f})")
        entries.append(entry)
    return entries


def _cost(trained: TrainedModel, config: TuningConfig, teacher_evaluations: int, count: int) -> str:
    """What tuning costs, in a line."""
    device = next(trained.model.parameters()).device
    seconds = evaluation_seconds(trained.model, trained.image_shape, config.precision, device)
    steps = sum(config.num_steps)
    # with recomputation a learning step takes two evaluations forward and a backward pass, which costs about two
    learning = 4 * config.iterations * config.batch_size + config.iterations // CHECK_EVERY * config.held_out
    per_step = teacher_evaluations / min(TEACHER_STEPS, trained.schedule.num_timesteps)  # 2 with guidance
    return (
        f"{count} images of the teacher ({teacher_evaluations} evaluations each) and {config.iterations} iterations of "
        f"{config.batch_size} images for {', '.join(map(str, config.num_steps))} steps: about "
        f"{duration(seconds * (count * teacher_evaluations + steps * per_step * learning))}"
    )

"""The training loop: Algorithm 1 of Ho et al. 2020. It yields after every step; the caller logs, saves and samples.

Invariant: step k is a pure function of (config, weights, moments, k), in float16 also of the loss scale. Its random
numbers come from (seed, k), the order of the images from (seed, epoch), and the learning rate and the decay of the
average from k. So no random state is saved, and on a CPU a run that was killed and resumed ends in the same weights as
an uninterrupted one (on a GPU with `training.deterministic`).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, Predicted, TrainingConfig
from ddpm_lab.core.device import autocast, compiled, resolve_precision
from ddpm_lab.core.seeds import PERMUTATION, STEP, VALIDATION, random_seed
from ddpm_lab.data.datasets import to_float, training_batch
from ddpm_lab.diffusion.guidance import conditional, drop_labels, guided
from ddpm_lab.diffusion.process import Model, denoising_losses, min_snr_weights, per_image, timestep_probabilities
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.diffusion.unet import UNet
from ddpm_lab.models.checkpoint import EMA_FILE, LOSS_SCALE_FILE, MODEL_FILE, OPTIMIZER_FILE
from ddpm_lab.training.optimizer import LossScale, Optimizer, learning_rate

LOSS_BANDS = 32  # of noise levels, each drawn equally often, in which learned weights are constant


@dataclass
class TrainingState:
    """What a checkpoint holds: networks, the optimizer's moments, the step, and the losses behind learned weights.

    Attributes:
        model: the network that is trained.
        ema: its moving average.
        optimizer: of the network.
        step: optimizer steps done.
        mean_losses: with learned weights, the mean loss in each of LOSS_BANDS bands of noise levels, (LOSS_BANDS,)
            float32 on the network's device; else None.
        loss_scale: in float16; else None.
        schedule_start: the step at which the learning rate last started its schedule, see `learning_rate`.
    """

    model: UNet
    ema: UNet
    optimizer: Optimizer
    step: int = 0
    mean_losses: Tensor | None = None
    loss_scale: LossScale | None = None
    schedule_start: int = 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint by file and name; not copies, so that a checkpoint can be loaded into them."""
        mean_losses = {} if self.mean_losses is None else {"mean_losses": self.mean_losses}
        loss_scale = {} if self.loss_scale is None else {LOSS_SCALE_FILE: self.loss_scale.tensors()}
        return {
            MODEL_FILE: dict(self.model.named_parameters()),
            EMA_FILE: dict(self.ema.named_parameters()),
            OPTIMIZER_FILE: self.optimizer.tensors() | mean_losses,
            **loss_scale,
        }

    def set_step(self, step: int) -> None:
        """Set the number of steps done, after the tensors are loaded: of the steps some may have been skipped."""
        self.step = step
        self.optimizer.set_count(step if self.loss_scale is None else step - int(self.loss_scale.skipped_steps))


@dataclass(frozen=True)
class TrainingStep:
    """The result of one training step.

    Attributes:
        step: steps done, counted from 1.
        losses: of this process's part of the batch, (B / processes,) float32, on the device.
        t: timesteps of the whole batch, (B,) int64, on the device.
        grad_norm: Euclidean norm of the gradient before clipping, a scalar on the device.
        learning_rate: of this step.
        skipped: whether the gradient overflowed in float16, so that nothing but the step and the loss scale changed.
        loss_scale: after this step, in float16; else None.
    """

    step: int
    losses: Tensor
    t: Tensor
    grad_norm: Tensor
    learning_rate: float
    skipped: bool = False
    loss_scale: float | None = None


def new_state(model: UNet, config: TrainingConfig) -> TrainingState:
    """A state at step 0, whose average equals the network."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    mean_losses = torch.ones(LOSS_BANDS, device=device) if config.weighting == "learned" else None
    loss_scale = LossScale(device) if resolve_precision(config.precision, device) == torch.float16 else None
    return TrainingState(model, ema, Optimizer(model, config), mean_losses=mean_losses, loss_scale=loss_scale)


def ema_decay(config: TrainingConfig, k: int) -> float:
    """The decay of the average at step k: small at first, so that the average forgets the initial weights."""
    return min(config.ema_decay, (1 + k) / (10 + k))


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(random_seed(seed, PERMUTATION, epoch))
    return torch.randperm(num_images, generator=generator)


def batch_indices(num_images: int, batch_size: int, seed: int, k: int) -> Tensor:
    """The images of step k: positions k B .. (k + 1) B in a sequence of permutations, one an epoch, (B,) int64."""
    pieces, position, stop = [], k * batch_size, (k + 1) * batch_size
    while position < stop:
        epoch, offset = divmod(position, num_images)
        pieces.append(_permutation(num_images, seed, epoch)[offset : offset + stop - position])
        position += len(pieces[-1])
    return torch.cat(pieces)


class NoiseLevelSampler:
    """Draws the timesteps of training and weighs their losses (config: noise_levels, weighting)."""

    def __init__(
        self, config: TrainingConfig, schedule: NoiseSchedule, prediction: Predicted, device: torch.device | str = "cpu"
    ) -> None:
        """device: where timesteps are drawn and losses are."""
        self.num_timesteps = schedule.num_timesteps
        self._cumulative: Tensor | None = None
        probabilities = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if config.noise_levels == "lognormal":
            probabilities = timestep_probabilities(schedule, config.log_sigma_mean, config.log_sigma_std)
            self._cumulative = (probabilities.cumsum(0) / probabilities.sum()).float().to(device)
        middles = probabilities.cumsum(0) - probabilities / 2
        self._bands = (middles * LOSS_BANDS).long().clamp(max=LOSS_BANDS - 1).to(device)  # (T,)
        self._weights = min_snr_weights(prediction, schedule) if config.weighting == "min_snr" else None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps, (count,) int64 on the generator's device."""
        if self._cumulative is None:
            return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)
        uniform = torch.rand(count, generator=generator, device=generator.device)
        t = torch.searchsorted(self._cumulative, uniform, right=True)
        return t.clamp(max=self.num_timesteps - 1)

    def weights(self, t: Tensor, mean_losses: Tensor | None) -> Tensor | None:
        """The weight of each loss, (B,) float32; None where all weights are 1.

        A learned weight is one over the mean loss of its band, scaled so that the mean over the timesteps drawn is 1:
        the minimum of the criterion that Karras et al. 2024 (arXiv:2312.02696, eq. 21) minimise by descent.
        """
        if mean_losses is not None:
            inverse = 1 / mean_losses.clamp(min=1e-6)
            return (inverse / inverse.mean())[self._bands[t]]
        if self._weights is None:
            return None
        return per_image(self._weights, t, torch.empty(len(t), device=t.device))

    def learn(self, mean_losses: Tensor, t: Tensor, losses: Tensor, k: int) -> None:
        """Move the mean losses of the bands drawn in step k towards the losses of that step, in place."""
        band = self._bands[t]
        count = torch.zeros_like(mean_losses).index_add_(0, band, torch.ones_like(losses))
        batch_means = torch.zeros_like(mean_losses).index_add_(0, band, losses) / count.clamp(min=1)
        updated = torch.lerp(mean_losses, batch_means, 1 - min(0.99, (1 + k) / (10 + k)))
        mean_losses.copy_(torch.where(count > 0, updated, mean_losses))


def is_compiled(config: TrainingConfig, device: torch.device) -> bool:
    """Whether training steps run in kernels made by torch.compile: so far 'auto' compiles on no device."""
    return config.compile == "yes"


def training_loop(
    state: TrainingState, schedule: NoiseSchedule, images: Tensor, config: Config, labels: Tensor | None = None
) -> Iterator[TrainingStep]:
    """Train from `state.step` to `num_steps` (Ho et al. 2020, Algorithm 1), yielding after each step.

    Args:
        state: changed in place.
        schedule: the forward process.
        images: the training set, (N, C, H, W) uint8, on the network's device.
        config: the run's.
        labels: (N,) int64 on the same device, for a conditional network.
    Yields:
        A `TrainingStep` after each step.
    """
    training, seed, device = config.training, config.training.seed, images.device
    dtype = resolve_precision(training.precision, device)
    network: nn.Module = compiled(state.model) if is_compiled(training, device) else state.model
    network = processes.data_parallel(network)
    parameters: list[Tensor] = list(state.model.parameters())
    averages: list[Tensor] = list(state.ema.parameters())
    prediction, num_classes = config.diffusion.predicted, config.model.class_count
    levels = NoiseLevelSampler(training, schedule, prediction, device)
    state.model.train()
    for k in range(state.step, training.num_steps):
        generator = torch.Generator(device).manual_seed(random_seed(seed, STEP, k))
        torch.manual_seed(random_seed(seed, STEP, k, 1 + processes.rank()))  # dropout uses the global generator

        # x_0 ~ q(x_0)
        indices = batch_indices(len(images), training.batch_size, seed, k)
        indices = indices.to(device, non_blocking=images.is_cuda)
        x_0 = training_batch(images, indices, config.data.horizontal_flip, generator)

        # t ~ Uniform (or as configured), eps ~ N(0, I)
        t = levels.draw(len(x_0), generator)
        eps = torch.randn(x_0.shape, generator=generator, device=device)

        model: Model = network
        if num_classes is not None:
            assert labels is not None
            y = drop_labels(labels[indices], num_classes, training.class_dropout, generator)
            model = guided(network, processes.rank_slice(y), num_classes)

        # Random numbers are drawn for the global batch, so that they do not depend on the number of processes.
        x_0, rank_t, eps = processes.rank_slice(x_0), processes.rank_slice(t), processes.rank_slice(eps)

        # Gradient descent on || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2
        with autocast(device, dtype):
            losses = denoising_losses(model, schedule, x_0, rank_t, eps, prediction)
        weights = levels.weights(rank_t, state.mean_losses)
        state.optimizer.zero_grad()
        # The backward pass averages the gradients over the processes, so that all of them skip a step or none.
        loss, scale = (losses if weights is None else weights * losses).mean(), state.loss_scale
        torch.autograd.backward(loss if scale is None else scale.scale * loss)
        if scale is not None:
            scale.unscale(parameters)
        grad_norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        rate = learning_rate(training, k, state.schedule_start)
        losses, skipped = losses.detach(), scale is not None and not math.isfinite(grad_norm)
        if not skipped:
            state.optimizer.step(rate)
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - ema_decay(training, k))
            if state.mean_losses is not None:
                levels.learn(state.mean_losses, t, processes.gather(losses), k)
        if scale is not None:
            scale.update(not skipped)
        state.step = k + 1
        yield TrainingStep(k + 1, losses, t, grad_norm, rate, skipped, None if scale is None else float(scale.scale))


def validation_loss(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    prediction: Predicted,
    batch_size: int = 250,
    labels: Tensor | None = None,
) -> float:
    """The simple loss (Ho et al. 2020, eq. 14) on held-out images, always with the same timesteps and noise.

    Image i has a timestep in the i-th of N equal parts of the chain (in a fixed shuffled order). The noise depends on
    neither seed nor run, so the losses of two networks differ by their denoising alone.

    Args:
        model: called as model(x_t, t).
        schedule: the forward process.
        images: (N, C, H, W) uint8, on the model's device.
        prediction: what the model predicts.
        batch_size: images per evaluation of the model.
        labels: (N,) int64 on the same device, for a conditional network.
    Returns:
        Mean squared error, in units of the prediction.
    """
    generator = torch.Generator().manual_seed(random_seed(VALIDATION))
    N, T = len(images), schedule.num_timesteps
    t = (torch.randperm(N, generator=generator) * T + T // 2) // N
    total = 0.0
    with torch.no_grad():
        for first in range(0, N, batch_size):
            batch = slice(first, first + batch_size)
            x_0 = to_float(images[batch])
            eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
            denoiser = conditional(model, None if labels is None else labels[batch])
            total += float(denoising_losses(denoiser, schedule, x_0, t[batch].to(x_0.device), eps, prediction).sum())
    return total / N

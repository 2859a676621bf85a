"""Training: Algorithm 1 of Ho et al. 2020, in a loop that yields after every step; the caller logs, saves and looks.

Invariant: step k is a pure function of (config, weights, moments, k). Everything random in it comes from (seed, k), the
order of the images from (seed, epoch), the learning rate and the decay of the average from k; so no random state is
kept, and a run that was killed and resumed ends in the very weights of the run that was not.
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
from ddpm_lab.training.optimizer import Optimizer

MEAN_LOSSES = "mean_losses"
LOSS_BANDS = 32  # of noise levels, each drawn equally often, in which learned weights are constant


@dataclass
class TrainingState:
    """What a checkpoint holds: networks, moments, how many steps are done, and what weights are learned from.

    Attributes:
        mean_losses: with learned weights, the mean loss in each of LOSS_BANDS bands of noise levels, (LOSS_BANDS,)
            float32 on the network's device; else None.
        begun: the step at which the learning rate last began anew, see `learning_rate`.
    """

    model: UNet
    ema: UNet
    optimizer: Optimizer
    step: int = 0
    mean_losses: Tensor | None = None
    begun: int = 0

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the networks, by name: the optimiser's tensors, and the mean losses."""
        return self.optimizer.tensors() | ({} if self.mean_losses is None else {MEAN_LOSSES: self.mean_losses})

    def kept_shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of `kept`, known before any step."""
        losses = {} if self.mean_losses is None else {MEAN_LOSSES: self.mean_losses.shape}
        return self.optimizer.shapes() | losses

    def restore(self, step: int, kept: dict[str, Tensor]) -> None:
        """Take what was `kept` after so many steps; the optimiser's tensors are zero where there are none."""
        self.step = step
        self.optimizer.restore(step, kept)
        if self.mean_losses is not None and MEAN_LOSSES in kept:
            self.mean_losses.copy_(kept[MEAN_LOSSES])


@dataclass(frozen=True)
class TrainingStep:
    """What one step did.

    Attributes:
        step: steps done, counted from 1.
        losses: of each image of the batch, those of all processes, (B,) float32; t: their timesteps, (B,) int64; both
            on the device.
        grad_norm: Euclidean norm before clipping, a scalar on the device.
        learning_rate: used in this step.
    """

    step: int
    losses: Tensor
    t: Tensor
    grad_norm: Tensor
    learning_rate: float


def new_state(model: UNet, config: TrainingConfig) -> TrainingState:
    """A state at step 0: the average equal to the network."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    learned = torch.ones(LOSS_BANDS, device=device) if config.weighting == "learned" else None
    return TrainingState(model, ema, Optimizer(model, config), mean_losses=learned)


def falling_from(config: TrainingConfig, begun: int = 0) -> int:
    """The step at which the learning rate begins to fall, where it does."""
    after_warmup = config.num_steps - begun - min(config.warmup_steps, config.num_steps - begun)
    return config.num_steps - round(after_warmup * config.decay_share)


def learning_rate(config: TrainingConfig, k: int, begun: int = 0) -> float:
    """Of step k = 0, 1, ...: a linear rise over the warm-up, then constant, then perhaps falling to 0 at num_steps.

    Args:
        begun: the step at which all this begins, for a run that is trained on after its rate had fallen to 0.
    """
    rise = min(config.warmup_steps, config.num_steps - begun)
    if k - begun < rise:
        return config.learning_rate * (k - begun + 1) / rise
    fall = falling_from(config, begun)
    if config.decay == "constant" or k < fall:
        return config.learning_rate
    share = (k - fall) / max(config.num_steps - fall, 1)
    return config.learning_rate * (1 - share if config.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)


def ema_decay(config: TrainingConfig, k: int) -> float:
    """Of step k: short at first, so that the average forgets the random start."""
    return min(config.ema_decay, (1 + k) / (10 + k))


@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(random_seed(seed, PERMUTATION, epoch))
    return torch.randperm(num_images, generator=generator)


def batch_indices(num_images: int, batch_size: int, seed: int, k: int) -> Tensor:
    """Which images step k sees: positions k B .. (k + 1) B of one permutation after another, (B,) int64."""
    positions = range(k * batch_size, (k + 1) * batch_size)
    pieces, position = [], positions.start
    while position < positions.stop:
        epoch, offset = divmod(position, num_images)
        piece = _permutation(num_images, seed, epoch)[offset : offset + positions.stop - position]
        pieces.append(piece)
        position += len(piece)
    return torch.cat(pieces)


class NoiseLevelSampler:
    """Which timesteps training draws, and how it weighs the losses there (config: noise_levels, weighting)."""

    def __init__(self, config: TrainingConfig, schedule: NoiseSchedule, prediction: Predicted) -> None:
        self.num_timesteps, self.learned = schedule.num_timesteps, config.weighting == "learned"
        self._cumulative: Tensor | None = None
        probabilities = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if config.noise_levels == "lognormal":
            probabilities = timestep_probabilities(schedule, config.log_sigma_mean, config.log_sigma_std)
            self._cumulative = probabilities.cumsum(0) / probabilities.sum()
        middles = probabilities.cumsum(0) - probabilities / 2
        self._band = (middles * LOSS_BANDS).long().clamp(max=LOSS_BANDS - 1)  # (T,)
        weighted = config.weighting == "min_snr"
        self._weights = min_snr_weights(prediction, schedule) if weighted else None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps, (count,) int64 on the generator's device."""
        if self._cumulative is None:
            return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)
        uniform = torch.rand(count, generator=generator, device=generator.device)
        found = torch.searchsorted(self._cumulative.to(uniform), uniform, right=True)
        return found.clamp(max=self.num_timesteps - 1)

    def weights(self, t: Tensor, mean_losses: Tensor | None) -> Tensor | None:
        """The weight of each loss, (B,) float32; None: they all count alike.

        Learned ones are one over the mean loss of their band, and 1 in the mean over the timesteps drawn: Karras et al.
        2024 (arXiv:2312.02696, eq. 21) find that weight by descent, and it is the minimum of their criterion.
        """
        if mean_losses is not None:
            inverse = 1 / mean_losses.clamp(min=1e-6)
            return (inverse / inverse.mean())[self._band.to(t.device)[t]]
        if self._weights is None:
            return None
        return per_image(self._weights, t, torch.zeros(len(t), device=t.device))

    def learn(self, mean_losses: Tensor, t: Tensor, losses: Tensor, k: int) -> None:
        """Move the mean losses of the bands that were drawn towards what was found there, in place."""
        band = self._band.to(t.device)[t]
        count = torch.zeros_like(mean_losses).index_add_(0, band, torch.ones_like(losses))
        found = torch.zeros_like(mean_losses).index_add_(0, band, losses) / count.clamp(min=1)
        moved = torch.lerp(mean_losses, found, 1 - min(0.99, (1 + k) / (10 + k)))
        mean_losses.copy_(torch.where(count > 0, moved, mean_losses))


def engine(model: UNet, config: TrainingConfig, device: torch.device) -> nn.Module:
    """What computes a training step: the network, compiled where that is asked for, and averaging its gradients over
    the processes where there are several."""
    network: nn.Module = compiled(model) if is_compiled(config, device) else model
    return processes.data_parallel(network)


def is_compiled(config: TrainingConfig, device: torch.device) -> bool:
    """Whether a training step is computed by kernels of torch.compile."""
    return config.compile == "yes" or (config.compile == "auto" and device.type == "cuda")


def training_loop(
    state: TrainingState, schedule: NoiseSchedule, images: Tensor, config: Config, labels: Tensor | None = None
) -> Iterator[TrainingStep]:
    """Train from `state.step` to `num_steps` (Ho et al. 2020, Algorithm 1), yielding after each step.

    Args:
        state: changed in place.
        schedule: the forward process.
        images: the training set, (N, C, H, W) uint8, on the network's device.
        config: the run's.
        labels: (N,) int64 on the same device, where the network is told classes.
    Yields:
        A `TrainingStep` after each.
    """
    training, seed, device = config.training, config.training.seed, images.device
    dtype = resolve_precision(training.precision, device)
    network = engine(state.model, training, device)
    parameters: list[Tensor] = list(state.model.parameters())
    averages: list[Tensor] = list(state.ema.parameters())
    prediction = config.diffusion.predicted
    levels = NoiseLevelSampler(training, schedule, prediction)
    state.model.train()
    for k in range(state.step, training.num_steps):
        generator = torch.Generator(device).manual_seed(random_seed(seed, STEP, k))
        torch.manual_seed(random_seed(seed, STEP, k, 1 + processes.rank()))  # dropout has no generator of its own

        # x_0 ~ q(x_0)
        chosen = batch_indices(len(images), training.batch_size, seed, k)
        indices = chosen.to(device, non_blocking=images.is_cuda)
        x_0 = training_batch(images, indices, config.data.horizontal_flip, generator)

        # t ~ Uniform (or as configured), eps ~ N(0, I)
        t = levels.draw(len(x_0), generator)
        eps = torch.randn(x_0.shape, generator=generator, device=device)

        model: Model = network
        if config.model.num_classes is not None:
            assert labels is not None
            y = drop_labels(labels[indices], config.model.num_classes, training.class_dropout, generator)
            model = guided(network, processes.rank_slice(y), config.model.num_classes)

        # All was drawn for the whole batch, so that it does not depend on how many processes share it.
        x_0, own_t, eps = processes.rank_slice(x_0), processes.rank_slice(t), processes.rank_slice(eps)

        # Gradient descent on || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2
        with autocast(device, dtype):
            losses = denoising_losses(model, schedule, x_0, own_t, eps, prediction)
        weights = levels.weights(own_t, state.mean_losses)
        state.optimizer.zero_grad()
        torch.autograd.backward(
            (losses if weights is None else weights * losses).mean()
        )  # among processes gradients are averaged on the way
        grad_norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        rate = learning_rate(training, k, state.begun)
        state.optimizer.step(rate)

        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay(training, k))
        losses = processes.gather(losses.detach())
        if state.mean_losses is not None:
            levels.learn(state.mean_losses, t, losses, k)
        state.step = k + 1
        yield TrainingStep(k + 1, losses, t, grad_norm, rate)


def validation_loss(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    prediction: Predicted,
    batch_size: int = 250,
    labels: Tensor | None = None,
) -> float:
    """The simple loss on held-out images, with timesteps and noise that are always the same.

    Image i has a timestep of the i-th of N equal parts of the chain (in a fixed shuffled order), so two networks differ
    by their denoising and not by their draw; the noise depends on neither seed nor run.

    Args:
        images: (N, C, H, W) uint8, on the model's device.
        labels: (N,) int64 there, for a network that is to be told its classes.
    Returns:
        Mean squared error, in units of the prediction.
    """
    generator = torch.Generator().manual_seed(random_seed(VALIDATION))
    N, T = len(images), schedule.num_timesteps
    t = (torch.randperm(N, generator=generator) * T + T // 2) // N
    total = 0.0
    with torch.no_grad():
        for first in range(0, N, batch_size):
            x_0 = to_float(images[first : first + batch_size])
            eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
            t_batch = t[first : first + batch_size].to(x_0.device)
            asked = conditional(model, None if labels is None else labels[first : first + batch_size])
            total += float(denoising_losses(asked, schedule, x_0, t_batch, eps, prediction).sum())
    return total / N

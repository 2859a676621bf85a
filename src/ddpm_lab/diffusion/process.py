"""The diffusion process: the forward process, its posterior, the meaning of a network's output, and the training loss.

Symbols (Ho et al. 2020, arXiv:2006.11239): x_0 clean image, x_t noised to t, eps the noise in it, x_s a less noisy
state (s < t), alpha_bar as in `schedule`. A hat marks an estimate. Invariant: coefficients are computed in float64 and
cast to the dtype of the images last, so that the same functions serve float32 training and float64 tests.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ddpm_lab.core.config import EDM, Predicted
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.schedule import NoiseSchedule

Coefficient = TypeVar("Coefficient", float, Tensor)  # one for all images, or one for each
Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, H, W), t (B,) int64) -> (B, C, H, W)


def per_image(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries `table[t]` in the dtype and on the device of `like`, (B, 1, 1, 1)."""
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise InputError(f"t must be ({len(like)},) int64, not {tuple(t.shape)} {t.dtype}")
    if t.device.type == "cpu" and t.numel() and not (int(t.min()) >= 0 and int(t.max()) < len(table)):
        raise InputError(f"t must lie in [0, {len(table)}), not {int(t.min())} .. {int(t.max())}")
    return _on_device(table, like.dtype, like.device)[t].view(-1, *[1] * (like.ndim - 1))


@lru_cache(maxsize=32)  # by the table's identity: each step of training needs the same few
def _on_device(table: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return table.to(dtype).to(device)


@lru_cache(maxsize=8)
def _output_tables(prediction: Predicted, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    return output_coefficients(prediction, alpha_bar)


def _same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise InputError(f"{name} is {tuple(x.shape)}, {other_name} is {tuple(other.shape)}; they must be equal")


def q_sample(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Noise clean images to timestep t in one jump (Ho et al. 2020, eq. 4).

    x_t = sqrt(alpha_bar[t]) * x_0 + sqrt(1 - alpha_bar[t]) * eps

    Args:
        x_0: clean images, (B, C, H, W) floating, in [-1, 1].
        t: timesteps, (B,) int64 in [0, T).
        eps: standard normal noise, shape and dtype of x_0.
    Returns:
        x_t, shape and dtype of x_0, not clipped.
    Raises:
        InputError: t out of range (checked on the CPU), or shapes that differ.
    """
    _same_shape("x_0", x_0, "eps", eps)
    return per_image(schedule.signal, t, x_0) * x_0 + per_image(schedule.noise, t, x_0) * eps


def q_step(schedule: NoiseSchedule, x_s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """One step of the forward process, from x_{t-1} to x_t (Ho et al. 2020, eq. 2).

    x_t = sqrt(1 - beta[t]) * x_{t-1} + sqrt(beta[t]) * eps

    Args:
        x_s: the previous state, x_{t-1} (for t = 0 the clean image), (B, C, H, W) floating.
        t: the timestep after the step, (B,) int64 in [0, T).
        eps: standard normal noise, shape and dtype of x_s.
    Returns:
        x_t, shape and dtype of x_s.
    Raises:
        InputError: t out of range (checked on the CPU), or shapes that differ.
    """
    _same_shape("x_s", x_s, "eps", eps)
    return per_image(schedule.alpha.sqrt(), t, x_s) * x_s + per_image(schedule.beta.sqrt(), t, x_s) * eps


def posterior(
    x_0: Tensor, x_t: Tensor, alpha_bar_t: Coefficient, alpha_bar_s: Coefficient
) -> tuple[Tensor, Coefficient]:
    """Mean and variance of q(x_s | x_t, x_0), s < t (Ho et al. 2020, eqs. 6-7, with s = t - 1 there).

    With alpha = alpha_bar_t / alpha_bar_s and beta = 1 - alpha of this step:
    mean = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x_0 + sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta, called beta-tilde in the paper

    Args:
        x_0, x_t: images of one shape.
        alpha_bar_t, alpha_bar_s: 0 < alpha_bar_t < alpha_bar_s <= 1; alpha_bar_s is 1 for the clean image. Numbers, or
            tensors that broadcast against the images.
    Returns:
        mean (shape and dtype of x_t), variance (0 if s is the clean image).
    """
    alpha = alpha_bar_t / alpha_bar_s
    weight_0 = alpha_bar_s**0.5 * (1 - alpha) / (1 - alpha_bar_t)
    weight_t = alpha**0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return weight_0 * x_0 + weight_t * x_t, (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)


def output_coefficients(prediction: Predicted, alpha_bar: Coefficient) -> tuple[Coefficient, Coefficient]:
    """The meaning of a network's output as a sum a x_0 + b eps; no other function depends on the kind of prediction.

    eps: (0, 1). x_0: (1, 0). v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, arXiv:2202.00512,
    appendix D). `EDM(sigma_data)`: the F of Karras et al. 2022 (arXiv:2206.00364, eq. 7 and table 1) at the noise level
    sigma = sqrt((1 - alpha_bar) / alpha_bar) of the chain, a combination with variance 1 at every noise level; with
    sigma_data = 1 it is -v.

    Args:
        prediction: what the network predicts.
        alpha_bar: at the timestep, in (0, 1): a number, or a tensor.
    Returns:
        a and b, of the type of alpha_bar.
    Raises:
        InputError: unknown prediction.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction == "eps":
        return 0 * alpha_bar, 0 * alpha_bar + 1
    if prediction == "x_0":
        return 0 * alpha_bar + 1, 0 * alpha_bar
    if prediction == "v":
        return -noise, signal
    if isinstance(prediction, EDM):
        deviation = prediction.deviation(alpha_bar)
        return noise / (deviation * prediction.sigma_data), -signal * prediction.sigma_data / deviation
    raise InputError(f"prediction must be eps, x_0, v or EDM(sigma_data), not {prediction!r}")


def predict_x_0_eps(
    prediction: Predicted, output: Tensor, x_t: Tensor, alpha_bar: Coefficient, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that follow from a network's output.

    x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat holds for the results, clipped or not.

    Args:
        prediction: what the network predicts, see `output_coefficients`.
        output, x_t: (B, C, H, W).
        alpha_bar: at the timestep, in (0, 1): a number, or a tensor that broadcasts against the images.
        clip_x_0: clip x_0_hat to [-1, 1], and recompute eps_hat from it.
    Returns:
        x_0_hat, eps_hat, in the dtype of x_t.
    Raises:
        InputError: unknown prediction, or shapes that differ.
    """
    _same_shape("the network's output", output, "x_t", x_t)
    output = output.to(x_t.dtype)
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    a, b = output_coefficients(prediction, alpha_bar)
    # Two equations, x_t = signal x_0 + noise eps and output = a x_0 + b eps, solved for x_0 and eps.
    determinant = signal * b - noise * a
    x_0_hat = (b / determinant) * x_t - (noise / determinant) * output
    if clip_x_0:
        x_0_hat = x_0_hat.clamp(-1, 1)
        return x_0_hat, (x_t - signal * x_0_hat) / noise
    return x_0_hat, (signal / determinant) * output - (a / determinant) * x_t


def input_scale(prediction: Predicted, schedule: NoiseSchedule) -> Tensor | None:
    """The factor of x_t at the input of the network, (T,) float64; None: no factor.

    For `EDM(sigma_data)`, the c_in of Karras et al. 2022 (table 1) in terms of x_t: one over its standard deviation.
    """
    return 1 / prediction.deviation(schedule.alpha_bar) if isinstance(prediction, EDM) else None


def timestep_probabilities(
    schedule: NoiseSchedule, log_sigma_mean: float, log_sigma_std: float, uniform_share: float = 0.1
) -> Tensor:
    """The probability of each timestep in training such that ln sigma is nearly normal (Karras et al. 2022, table 1).

    sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t). Each timestep represents the interval of ln sigma that is nearer to
    it than to its neighbours. A share of the draws is uniform in t, so that training reaches every timestep that
    Algorithm 2 or the bound on the likelihood visits.

    Args:
        log_sigma_mean, log_sigma_std: mean and standard deviation of ln sigma; -1.2 and 1.2 in the paper.
        uniform_share: the share of uniform draws, in [0, 1].
    Returns:
        (T,) float64 with sum 1, all positive if uniform_share is positive.
    """
    log_sigma = -schedule.snr.log() / 2  # increasing in t
    midpoints = (log_sigma[1:] + log_sigma[:-1]) / 2
    inside = torch.special.ndtr((midpoints - log_sigma_mean) / log_sigma_std)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cumulative = torch.cat([ends[:1], inside, ends[1:]])
    return uniform_share / schedule.num_timesteps + (1 - uniform_share) * (cumulative[1:] - cumulative[:-1])


def min_snr_weights(prediction: Predicted, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """Weights that turn the squared error of any prediction into min(SNR, gamma) times that of x_0, (T,) float64.

    Hang et al. 2023 (arXiv:2303.09556, section 3.4). An error e of the output is an error (noise / determinant) e of
    x_0, by the algebra of `predict_x_0_eps`: for eps the weight is min(SNR, gamma) / SNR, for v min(SNR, gamma) /
    (SNR + 1).
    """
    a, b = output_coefficients(prediction, schedule.alpha_bar)
    return schedule.snr.clamp(max=gamma) * (schedule.noise / (schedule.signal * b - schedule.noise * a)).square()


def denoising_losses(
    model: Model, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, prediction: Predicted = "eps"
) -> Tensor:
    """The simple loss of each image, for a given timestep and noise (Ho et al. 2020, eq. 14).

    Args:
        model: called as model(x_t, t).
        x_0, eps: (B, C, H, W); t: (B,) int64 in [0, T).
        prediction: what the model predicts; the squared error is taken in that quantity.
    Returns:
        (B,) in the dtype of x_0: mean over pixels and channels.
    """
    output = model(q_sample(schedule, x_0, t, eps), t)
    a, b = (per_image(table, t, x_0) for table in _output_tables(prediction, schedule.alpha_bar))
    target = a * x_0 + b * eps
    _same_shape("the network's output", output, "the images", target)
    return (output.to(target.dtype) - target).square().flatten(1).mean(1)


def diffusion_loss(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    *,
    prediction: Predicted = "eps",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss of one training step: t uniform, eps normal, mean squared error (Ho et al. 2020, Algorithm 1).

    Args:
        model: called as model(x_t, t).
        x_0: clean images, (B, C, H, W) floating, in [-1, 1].
        prediction: what the model predicts.
        generator: draws t, then eps, on the device of x_0; None: torch's global generator.
    Returns:
        A scalar with gradients.
    """
    t = torch.randint(schedule.num_timesteps, x_0.shape[:1], generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
    return denoising_losses(model, schedule, x_0, t, eps, prediction).mean()

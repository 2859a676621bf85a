"""The diffusion process: noising, its posterior, what a network's output means, and the training loss.

Symbols (Ho et al. 2020, arXiv:2006.11239): x_0 clean image, x_t noised to t, eps the noise in it, x_s a less noisy
state (s < t), alpha_bar as in `schedule`. A hat marks an estimate. One invariant: coefficients are computed in float64
and cast to the dtype of the images last, so that the same functions serve float32 training and float64 tests.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ddpm_lab.config import Prediction
from ddpm_lab.schedule import NoiseSchedule
from ddpm_lab.settings import InputError

Coefficient = TypeVar("Coefficient", float, Tensor)  # one for all images, or one for each
Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, H, W), t (B,) int64) -> (B, C, H, W)


def per_image(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries `table[t]` in the dtype and on the device of `like`, (B, 1, 1, 1)."""
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise InputError(f"t must be ({len(like)},) int64, not {tuple(t.shape)} {t.dtype}")
    if t.device.type == "cpu" and t.numel() and not (int(t.min()) >= 0 and int(t.max()) < len(table)):
        raise InputError(f"t must lie in [0, {len(table)}), not {int(t.min())} .. {int(t.max())}")
    moved = table.to(like.dtype).to(like.device, non_blocking=like.is_cuda)  # so short a copy need not be waited for
    return moved[t].view(-1, *[1] * (like.ndim - 1))


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
    signal = per_image(schedule.alpha_bar.sqrt(), t, x_0)
    noise = per_image((1 - schedule.alpha_bar).sqrt(), t, x_0)
    return signal * x_0 + noise * eps


def q_step(schedule: NoiseSchedule, x_s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """One step of the forward process, from x_{t-1} to x_t (Ho et al. 2020, eq. 2).

    x_t = sqrt(1 - beta[t]) * x_{t-1} + sqrt(beta[t]) * eps

    Args:
        x_s: the state before, x_{t-1} (for t = 0 the clean image), (B, C, H, W) floating.
        t: the timestep reached, (B,) int64 in [0, T).
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

    With alpha = alpha_bar_t / alpha_bar_s and beta = 1 - alpha, the step's own:
    mean = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x_0 + sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta, which the paper calls beta-tilde

    Args:
        x_0, x_t: images of one shape.
        alpha_bar_t, alpha_bar_s: 0 < alpha_bar_t < alpha_bar_s <= 1; alpha_bar_s is 1 for the clean image. Numbers, or
            tensors that broadcast against the images.
    Returns:
        mean (shape and dtype of x_t), variance (0 where s is the clean image).
    """
    alpha = alpha_bar_t / alpha_bar_s
    weight_0 = alpha_bar_s**0.5 * (1 - alpha) / (1 - alpha_bar_t)
    weight_t = alpha**0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return weight_0 * x_0 + weight_t * x_t, (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)


def prediction_target(prediction: Prediction, x_0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """What the network ought to have said: eps, x_0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

    v is that of Salimans and Ho 2022 (arXiv:2202.00512, appendix D).

    Args:
        x_0, eps: (B, C, H, W).
        signal, noise: sqrt(alpha_bar) and sqrt(1 - alpha_bar), which broadcast against the images; both are given, for
            in float32 the second cannot be had from the first near the clean image.
    Returns:
        Shape and dtype of x_0.
    Raises:
        InputError: unknown prediction.
    """
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    if prediction == "v":
        return signal * eps - noise * x_0
    raise InputError(f"prediction must be eps, x_0 or v, not {prediction!r}")


def predict_x_0_eps(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Coefficient, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a network's output stands for: the one place where its meaning is known.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps holds between the two returned, clipped or not.

    Args:
        prediction: what `output` is: eps, x_0 or v.
        output, x_t: (B, C, H, W).
        alpha_bar: there, in (0, 1): a number, or a tensor that broadcasts against the images.
        clip_x_0: bring x_0 into [-1, 1], and derive eps again from it.
    Returns:
        x_0_hat, eps_hat, in the dtype of x_t.
    Raises:
        InputError: unknown prediction, or shapes that differ.
    """
    _same_shape("the network's output", output, "x_t", x_t)
    output = output.to(x_t.dtype)
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction == "eps":
        x_0_hat, eps_hat = (x_t - noise * output) / signal, output
    elif prediction == "x_0":
        x_0_hat, eps_hat = output, (x_t - signal * output) / noise
    elif prediction == "v":
        x_0_hat, eps_hat = signal * x_t - noise * output, noise * x_t + signal * output
    else:
        raise InputError(f"prediction must be eps, x_0 or v, not {prediction!r}")
    if clip_x_0:
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps_hat = (x_t - signal * x_0_hat) / noise
    return x_0_hat, eps_hat


def denoising_losses(
    model: Model, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, prediction: Prediction = "eps"
) -> Tensor:
    """The simple loss of each image, given its timestep and noise (Ho et al. 2020, eq. 14).

    Args:
        model: called as model(x_t, t).
        x_0, eps: (B, C, H, W); t: (B,) int64 in [0, T).
        prediction: what the model predicts; the squared error is taken in that quantity.
    Returns:
        (B,) float32 (or the dtype of x_0, where that is wider): mean over pixels and channels.
    """
    output = model(q_sample(schedule, x_0, t, eps), t)
    signal = per_image(schedule.alpha_bar.sqrt(), t, x_0)
    noise = per_image((1 - schedule.alpha_bar).sqrt(), t, x_0)
    target = prediction_target(prediction, x_0, eps, signal, noise)
    _same_shape("the network's output", output, "the images", target)
    return (output.to(target.dtype) - target).square().flatten(1).mean(1)


def diffusion_loss(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    *,
    prediction: Prediction = "eps",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss of one training step: t uniform, eps normal, mean squared error (Ho et al. 2020, Algorithm 1).

    Args:
        model: called as model(x_t, t).
        x_0: clean images, (B, C, H, W) in [-1, 1].
        generator: draws t, then eps, on the device of x_0; None: torch's own.
    Returns:
        A scalar that can be differentiated.
    """
    t = torch.randint(schedule.num_timesteps, x_0.shape[:1], generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
    return denoising_losses(model, schedule, x_0, t, eps, prediction).mean()

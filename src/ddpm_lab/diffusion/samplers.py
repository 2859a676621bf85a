"""Samplers: from noise to images, each a generator of steps in the form of the paper's algorithm.

A sampler takes a model, called as model(x_t, t), a schedule and x_T, visits decreasing timesteps t, and yields a `Step`
for each. Films, progress bars and pages use the steps; `ddpm_sample` and `ddim_sample` return the last state. Samplers
do not depend on what the network predicts (see `predict_x_0_eps`). States have the dtype and device of x_T.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Spacing, Variance
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import Model, posterior, predict_x_0_eps
from ddpm_lab.diffusion.schedule import NoiseSchedule, sampling_timesteps

P = ParamSpec("P")
Noise = Callable[[int], Tensor]  # step i = 0, 1, ... -> standard normal noise, (B, C, H, W)


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        t: the timestep at the start of the step; T-1 in the first step, but for the spacing 'leading'.
        x_t: the state at t, (B, C, H, W).
        x_s: the state at the end of the step; the sample itself in the last step.
        x_0_hat: the clean image predicted at t, clipped if the sampler clips.
    """

    t: int
    x_t: Tensor
    x_s: Tensor
    x_0_hat: Tensor


def estimate(
    model: Model, x_t: Tensor, t: int, alpha_bar_t: float, clip_x_0: bool, prediction: Predicted
) -> tuple[Tensor, Tensor]:
    """Evaluate the model at one timestep, without gradients, and convert its output.

    Args:
        model: called as model(x_t, t) with t (B,) int64, all equal.
        x_t: the states, (B, C, H, W) floating.
        t: the timestep, in [0, T).
        alpha_bar_t: alpha_bar of the schedule at t, in (0, 1).
        clip_x_0: clip the predicted image to [-1, 1], and recompute the noise from it.
        prediction: what the model predicts, see `process.output_coefficients`.
    Returns:
        x_0_hat, eps_hat: the predicted clean image and noise, each (B, C, H, W) in the dtype of x_t, with
        x_t = sqrt(alpha_bar_t) x_0_hat + sqrt(1 - alpha_bar_t) eps_hat (Ho et al. 2020, eq. 4).
    Raises:
        InputError: unknown prediction, or an output of another shape than x_t.
    """
    with torch.no_grad():
        output = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    return predict_x_0_eps(prediction, output, x_t, alpha_bar_t, clip_x_0)


def step_pairs(schedule: NoiseSchedule, num_steps: int | None, spacing: Spacing) -> list[tuple[int, int, float, float]]:
    """The timesteps at which each step of a sampler starts and ends, with their alpha_bar.

    Args:
        schedule: of T timesteps.
        num_steps: number of steps, from 1 to T; None: T.
        spacing: see `schedule.sampling_timesteps`, which chooses the timesteps.
    Returns:
        (t, s, alpha_bar_t, alpha_bar_s) of each step, with t > s and each s the t of the next step. The last s is -1,
        the clean image, with alpha_bar_s = 1.
    Raises:
        InputError: num_steps out of range, or unknown spacing.
    """
    num_steps = schedule.num_timesteps if num_steps is None else num_steps
    timesteps = sampling_timesteps(schedule, num_steps, spacing)
    return [
        (t, s, schedule.alpha_bar_at(t), schedule.alpha_bar_at(s))
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True)
    ]


def ddpm_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int | None = None,
    *,
    clip_x_0: bool = True,
    noise: Noise | None = None,
    spacing: Spacing = "uniform",
    variance: Variance | None = None,
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2), step by step.

    x_s = mean of q(x_s | x_t, x_0_hat) + sigma z, without noise in the last step. Without clipping and with all T
    steps, this is line 4 of Algorithm 2. With fewer steps, beta is that of the shortened chain,
    1 - alpha_bar_t / alpha_bar_s (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 19).

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, from 1 to T; None: T.
        clip_x_0: clip the predicted image to [-1, 1] before the mean is computed.
        noise: returns the noise z of step i = 0, 1, ...; None: torch's global generator.
        spacing: see `sampling_timesteps`.
        variance: sigma^2 is 'beta' of the step (default with all T steps) or 'beta_tilde', the variance of the
            posterior (default with fewer steps, where 'beta' warns: it leaves noise in the images).
        prediction: what the model predicts.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps out of range, unknown spacing, variance or prediction.
    """
    pairs = step_pairs(schedule, num_steps, spacing)
    shortened = len(pairs) < schedule.num_timesteps
    if variance is None:
        variance = "beta_tilde" if shortened else "beta"
    elif variance not in ("beta", "beta_tilde"):
        raise InputError(f"variance must be beta or beta_tilde, not {variance!r}")
    elif variance == "beta" and shortened:
        warnings.warn(
            f"variance beta with {len(pairs)} of {schedule.num_timesteps} steps leaves noise in the images; "
            "beta_tilde does not",
            stacklevel=2,
        )
    x_t = x_T
    for i, (t, s, alpha_bar_t, alpha_bar_s) in enumerate(pairs):
        x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        x_s, sigma_squared = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_s)
        if s >= 0:
            if variance == "beta":
                sigma_squared = 1 - alpha_bar_t / alpha_bar_s
            z = torch.randn_like(x_t) if noise is None else noise(i)
            x_s = x_s + sigma_squared**0.5 * z
        yield Step(t, x_t, x_s, x_0_hat)
        x_t = x_s


def ddim_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    clip_x_0: bool = True,
    noise: Noise | None = None,
    spacing: Spacing = "uniform",
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2020, arXiv:2010.02502, eq. 12), step by step.

    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z, with
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, from 1 to T; None: T.
        eta: in [0, 1]; 0 is deterministic, 1 is ancestral sampling with variance beta_tilde.
        clip_x_0: clip the predicted image to [-1, 1], and recompute eps_hat from it.
        noise: returns the noise z of step i = 0, 1, ... if eta > 0; None: torch's global generator.
        spacing: see `sampling_timesteps`.
        prediction: what the model predicts.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps or eta out of range, unknown spacing or prediction.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, not {eta}")
    x_t = x_T
    for i, (t, s, alpha_bar_t, alpha_bar_s) in enumerate(step_pairs(schedule, num_steps, spacing)):
        x_0_hat, eps_hat = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)) ** 0.5
        x_s = alpha_bar_s**0.5 * x_0_hat + max(1 - alpha_bar_s - sigma**2, 0.0) ** 0.5 * eps_hat
        if s >= 0 and eta > 0:
            x_s = x_s + sigma * (torch.randn_like(x_t) if noise is None else noise(i))
        yield Step(t, x_t, x_s, x_0_hat)
        x_t = x_s


def run_sampler(steps: Callable[P, Iterator[Step]]) -> Callable[P, Tensor]:
    """The function that runs all steps of a sampler and returns the last state.

    Args:
        steps: the sampler, such as `ddpm_steps`.
    Returns:
        A function with the same parameters that returns x_0, (B, C, H, W).
    """

    def sample(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        for step in steps(*args, **kwargs):
            x_0 = step.x_s
        return x_0

    sample.__name__ = sample.__qualname__ = steps.__name__.replace("steps", "sample")
    sample.__doc__ = f"Run all of `{steps.__name__}`; returns x_0, (B, C, H, W), in [-1, 1] if x_0 is clipped."
    sample.__module__ = steps.__module__
    signature = inspect.signature(steps).replace(return_annotation=Tensor)
    sample.__signature__ = signature  # type: ignore[attr-defined]
    return sample


ddpm_sample = run_sampler(ddpm_steps)
ddim_sample = run_sampler(ddim_steps)

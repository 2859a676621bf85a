"""Few-step samplers: second-order solvers of the probability-flow ODE, in the form of `samplers`.

With signal alpha = sqrt(alpha_bar), noise sigma = sqrt(1 - alpha_bar) and lambda = log(alpha / sigma), the ODE is
linear but for what the network says; each solver integrates the linear part exactly. Without `eta` they ask for no
noise. The way from the last timestep to the clean image is of first order, for there lambda is infinite.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Spacing
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.samplers import Noise, Step, estimate, run_sampler, step_pairs
from ddpm_lab.diffusion.schedule import LEAST_LOG_SNR, NoiseSchedule


def _log_snr(alpha_bar: float) -> float:
    """lambda, half the logarithm of the signal-to-noise ratio; infinite for the clean image."""
    return math.inf if alpha_bar == 1 else 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _towards(x_0: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_s: float, eta: float = 0.0) -> Tensor:
    """The exact way from t to s for a predicted image that stays the same, without the noise that eta adds.

    Of the ODE for eta = 0 (arXiv:2211.01095, eq. 9, order 1), of the reverse-time SDE for eta = 1 (eq. 18 there).
    """
    # exp(-2 h), with h = lambda_s - lambda_t
    snr_ratio = alpha_bar_t * (1 - alpha_bar_s) / (alpha_bar_s * (1 - alpha_bar_t))
    ratio = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * math.pow(snr_ratio, eta / 2)
    return ratio * x_t + math.sqrt(alpha_bar_s) * (1 - math.pow(snr_ratio, (1 + eta) / 2)) * x_0


def dpmpp_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int = 20,
    *,
    clip_x_0: bool = True,
    noise: Noise | None = None,
    eta: float = 0.0,
    spacing: Spacing = "logsnr",
    singlestep: bool = False,
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095), step by step.

    The predicted image is extrapolated along lambda: from the step before (multistep, 2M, algorithm 2: one evaluation
    a step), or from a timestep on the way (singlestep, 2S, algorithm 1: two evaluations a step).

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: from 1 to T; to T / 2 where singlestep.
        clip_x_0: bring each predicted image into [-1, 1].
        noise: called with the step's number where eta is not 0, for noise of the shape of x_T; None: drawn.
        eta: 0 solves the ODE; 1 the SDE that has the same marginals (multistep only), which forgets errors made early.
        spacing: of all timesteps that are evaluated, see `sampling_timesteps`.
        singlestep: take two evaluations a step in place of memory.
        prediction: what the model predicts.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps out of range, unknown spacing or prediction, eta not in [0, 1] or with singlestep.
    """
    if not (eta == 0 or (0 < eta <= 1 and not singlestep)):
        raise InputError(f"eta must be from 0 to 1, and 0 where singlestep, not {eta}")
    x_t = x_T
    if singlestep:
        way = step_pairs(schedule, 2 * num_steps, spacing)
        for (t, m, alpha_bar_t, alpha_bar_m), (_, s, _, alpha_bar_s) in zip(way[::2], way[1::2], strict=True):
            x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
            x_m = _towards(x_0_hat, x_t, alpha_bar_t, alpha_bar_m)
            middle, _ = estimate(model, x_m, m, alpha_bar_m, clip_x_0, prediction)
            if s < 0:
                x_s = middle
            else:
                start, end = _log_snr(alpha_bar_t), _log_snr(alpha_bar_s)
                r = (_log_snr(alpha_bar_m) - start) / (end - start)
                x_s = _towards(x_0_hat + (middle - x_0_hat) / (2 * r), x_t, alpha_bar_t, alpha_bar_s)
            yield Step(t, x_t, x_s, x_0_hat)
            x_t = x_s
        return
    before, lambda_before = None, math.nan
    for step, (t, s, alpha_bar_t, alpha_bar_s) in enumerate(step_pairs(schedule, num_steps, spacing)):
        x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        lambda_t = _log_snr(alpha_bar_t)
        extrapolated = x_0_hat
        if before is not None and s >= 0:
            r = (lambda_t - lambda_before) / (_log_snr(alpha_bar_s) - lambda_t)
            extrapolated = x_0_hat + (x_0_hat - before) / (2 * r)
        x_s = _towards(extrapolated, x_t, alpha_bar_t, alpha_bar_s, eta)
        if eta > 0 and s >= 0:
            h = _log_snr(alpha_bar_s) - lambda_t
            z = torch.randn_like(x_t) if noise is None else noise(step)
            x_s = x_s + math.sqrt((1 - alpha_bar_s) * -math.expm1(-2 * eta * h)) * z
        yield Step(t, x_t, x_s, x_0_hat)
        x_t, before, lambda_before = x_s, x_0_hat, lambda_t


def heun_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int = 10,
    *,
    clip_x_0: bool = True,
    spacing: Spacing = "logsnr",
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """Heun's method on d(x / alpha) = eps d(sigma / alpha) (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    A step goes along the noise predicted at t, then along the mean of that and the noise predicted where it led: two
    evaluations a step, but for the last, which ends at the clean image and has one.

    Args:
        num_steps: from 1 to T; 2 num_steps - 1 evaluations.
        the rest: as in `dpmpp_steps`.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps out of range, unknown spacing or prediction.
    """
    x_t = x_T
    for t, s, alpha_bar_t, alpha_bar_s in step_pairs(schedule, num_steps, spacing):
        x_0_hat, eps_t = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        scale = (alpha_bar_s / alpha_bar_t) ** 0.5
        distance = (1 - alpha_bar_s) ** 0.5 - scale * (1 - alpha_bar_t) ** 0.5
        x_s = scale * x_t + distance * eps_t
        if s >= 0:
            x_0_hat_s, eps_s = estimate(model, x_s, s, alpha_bar_s, clip_x_0, prediction)
            if 2 * _log_snr(alpha_bar_t) > LEAST_LOG_SNR:
                x_s = scale * x_t + distance * (eps_t + eps_s) / 2
            else:  # through pure noise the mean of x_0: that of eps would divide their difference by next to nothing
                x_s = _towards((x_0_hat + x_0_hat_s) / 2, x_t, alpha_bar_t, alpha_bar_s)
        yield Step(t, x_t, x_s, x_0_hat)
        x_t = x_s


dpmpp_sample = run_sampler(dpmpp_steps)
heun_sample = run_sampler(heun_steps)

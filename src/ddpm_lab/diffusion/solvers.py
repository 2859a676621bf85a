"""Few-step samplers: solvers of the probability-flow ODE of second to fourth order, in the form of `samplers`.

With signal alpha = sqrt(alpha_bar), noise sigma = sqrt(1 - alpha_bar) and lambda = log(alpha / sigma), the ODE is
linear except for the output of the network; each solver integrates the linear part exactly. With eta = 0 they add no
noise. The last step, to the clean image, is of first order, because lambda is infinite there.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Sampler, Spacing
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.samplers import Noise, Step, ddim_steps, ddpm_steps, estimate, run_sampler, step_pairs
from ddpm_lab.diffusion.schedule import LEAST_LOG_SNR, NoiseSchedule

ADAMS_BASHFORTH = (  # weights of the newest derivative, the one before, ..., by order, for even steps
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _log_snr(alpha_bar: float) -> float:
    """lambda, half the logarithm of the signal-to-noise ratio; infinite for the clean image."""
    return math.inf if alpha_bar == 1 else 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _first_order_step(x_0: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_s: float, eta: float = 0.0) -> Tensor:
    """The exact solution from t to s for a constant predicted image x_0, without the noise that eta adds.

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

    The predicted image is extrapolated along lambda, from the previous step (multistep, 2M, algorithm 2: one evaluation
    per step) or from an intermediate timestep (singlestep, 2S, algorithm 1: two evaluations per step).

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, from 1 to T; with singlestep to T / 2.
        clip_x_0: clip each predicted image to [-1, 1].
        noise: returns the noise of step i = 0, 1, ... if eta > 0; None: torch's global generator.
        eta: in [0, 1]; 0 solves the ODE, 1 the SDE with the same marginals, which reduces early errors; 0 with
            singlestep.
        spacing: of all timesteps at which the model is evaluated, see `sampling_timesteps`.
        singlestep: use an intermediate timestep instead of the previous step.
        prediction: what the model predicts.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps out of range, unknown spacing or prediction, eta not in [0, 1] or with singlestep.
    """
    if not (eta == 0 or (0 < eta <= 1 and not singlestep)):
        raise InputError(f"eta must be from 0 to 1, and 0 with singlestep, not {eta}")
    x_t = x_T
    if singlestep:
        pairs = step_pairs(schedule, 2 * num_steps, spacing)
        for (t, m, alpha_bar_t, alpha_bar_m), (_, s, _, alpha_bar_s) in zip(pairs[::2], pairs[1::2], strict=True):
            x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
            x_m = _first_order_step(x_0_hat, x_t, alpha_bar_t, alpha_bar_m)
            middle, _ = estimate(model, x_m, m, alpha_bar_m, clip_x_0, prediction)
            if s < 0:
                x_s = middle
            else:
                start, end = _log_snr(alpha_bar_t), _log_snr(alpha_bar_s)
                r = (_log_snr(alpha_bar_m) - start) / (end - start)
                x_s = _first_order_step(x_0_hat + (middle - x_0_hat) / (2 * r), x_t, alpha_bar_t, alpha_bar_s)
            yield Step(t, x_t, x_s, x_0_hat)
            x_t = x_s
        return
    x_0_previous, lambda_previous = None, math.nan
    for i, (t, s, alpha_bar_t, alpha_bar_s) in enumerate(step_pairs(schedule, num_steps, spacing)):
        x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        lambda_t = _log_snr(alpha_bar_t)
        extrapolated = x_0_hat
        if x_0_previous is not None and s >= 0:
            r = (lambda_t - lambda_previous) / (_log_snr(alpha_bar_s) - lambda_t)
            extrapolated = x_0_hat + (x_0_hat - x_0_previous) / (2 * r)
        x_s = _first_order_step(extrapolated, x_t, alpha_bar_t, alpha_bar_s, eta)
        if eta > 0 and s >= 0:
            h = _log_snr(alpha_bar_s) - lambda_t
            z = torch.randn_like(x_t) if noise is None else noise(i)
            x_s = x_s + math.sqrt((1 - alpha_bar_s) * -math.expm1(-2 * eta * h)) * z
        yield Step(t, x_t, x_s, x_0_hat)
        x_t, x_0_previous, lambda_previous = x_s, x_0_hat, lambda_t


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

    The noise predicted at t gives a first x_s; the step is then repeated with the mean of that noise and the noise
    predicted at s. Each step takes two evaluations, except the last, to the clean image, which takes one.

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, from 1 to T, with 2 num_steps - 1 evaluations.
        clip_x_0: clip each predicted image to [-1, 1].
        spacing: see `sampling_timesteps`.
        prediction: what the model predicts.
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
            else:  # in pure noise average x_0: the mean of eps would divide their difference by almost 0
                x_s = _first_order_step((x_0_hat + x_0_hat_s) / 2, x_t, alpha_bar_t, alpha_bar_s)
        yield Step(t, x_t, x_s, x_0_hat)
        x_t = x_s


def ipndm_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int = 10,
    *,
    clip_x_0: bool = True,
    spacing: Spacing = "logsnr",
    order: int = 4,
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """Improved PNDM, Adams-Bashforth on d(x / alpha) = eps d(sigma / alpha) (Zhang and Chen 2023, arXiv:2204.13902).

    The noise predicted at the last steps is combined with the weights that belong to even steps in sigma / alpha. The
    first step takes one prediction, the second two, and so on (Liu et al. 2022, arXiv:2202.09778, start with
    Runge-Kutta steps instead, which take more evaluations). On even steps the method is of the given order, on others
    of a lower one.

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, each one evaluation, from 1 to T.
        clip_x_0: clip each predicted image to [-1, 1], and recompute the noise from it.
        spacing: see `sampling_timesteps`.
        order: the largest number of predictions to combine, from 1 (DDIM) to 4.
        prediction: what the model predicts.
    Yields:
        A `Step` for each step.
    Raises:
        InputError: num_steps or order out of range, unknown spacing or prediction.
    """
    if order not in range(1, 5):
        raise InputError(f"order must be from 1 to 4, not {order}")
    x_t, predicted = x_T, list[Tensor]()  # the newest first
    for t, s, alpha_bar_t, alpha_bar_s in step_pairs(schedule, num_steps, spacing):
        x_0_hat, eps_t = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        predicted = [eps_t, *predicted[: order - 1]]
        x_s = alpha_bar_s**0.5 * x_0_hat + (1 - alpha_bar_s) ** 0.5 * eps_t  # the step with eps_t alone
        if s >= 0:
            distance = (1 - alpha_bar_s) ** 0.5 - (alpha_bar_s / alpha_bar_t * (1 - alpha_bar_t)) ** 0.5
            for weight, eps in zip(ADAMS_BASHFORTH[len(predicted) - 1][1:], predicted[1:], strict=True):
                x_s = x_s + distance * weight * (eps - eps_t)
        yield Step(t, x_t, x_s, x_0_hat)
        x_t = x_s


def _mean_image(images: Sequence[tuple[float, Tensor]], lambda_s: float) -> Tensor:
    """The constant image whose first-order step to lambda_s equals that of the polynomial through predicted images.

    UniPC (arXiv:2302.04867) with data prediction and B(h) = e^h - 1: there the weights solve the same equations.

    Args:
        images: (lambda, x_0_hat) of several timesteps; the step starts at the first.
        lambda_s: at the end of the step; may be infinite if there is one image.
    """
    (lambda_t, first), *others = images
    if not others:
        return first
    h = lambda_s - lambda_t
    ratios = torch.tensor([(at - lambda_t) / h for at, _ in others], dtype=torch.float64)
    weights = torch.tensor([0.5], dtype=torch.float64)  # of the paper for two images, also of second order
    if len(others) > 1:
        moment = [-math.expm1(-h)]  # of the position in the step, in [0, 1], weighted by e^lambda, times e^-lambda_s
        for k in range(1, len(others) + 1):
            moment.append(1 - k / h * moment[-1])
        moments = torch.tensor(moment[1:], dtype=torch.float64) / moment[0]
        weights = torch.linalg.solve(torch.linalg.vander(ratios).T, moments)
    image = first
    for weight, (_, other) in zip((weights / ratios).tolist(), others, strict=True):
        image = image + weight * (other - first)
    return image


def unipc_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    num_steps: int = 10,
    *,
    clip_x_0: bool = True,
    spacing: Spacing = "logsnr",
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """UniPC-3, multistep, with data prediction and B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867), step by step.

    The predictor extrapolates the predicted image along lambda through those of up to three steps. The image predicted
    at the end of a step serves twice: the corrector repeats the step with it, and the next step starts from there. So
    each step takes one evaluation. The order falls to 2 and 1 in the last two steps.

    Args:
        model: called as model(x_t, t), t (B,) int64 in [0, T).
        x_T: standard normal noise, (B, C, H, W).
        num_steps: number of steps, each one evaluation, from 1 to T.
        clip_x_0: clip each predicted image to [-1, 1].
        spacing: see `sampling_timesteps`.
        prediction: what the model predicts.
    Yields:
        A `Step` for each step; its states are those of the predictor, at which the model is evaluated.
    Raises:
        InputError: num_steps out of range, unknown spacing or prediction.
    """
    pairs = step_pairs(schedule, num_steps, spacing)
    x_t, images = x_T, list[tuple[float, Tensor]]()  # the newest first
    start, alpha_bar_start = x_T, math.nan
    for remaining, (t, _, alpha_bar_t, alpha_bar_s) in zip(range(len(pairs), 0, -1), pairs, strict=True):
        x_0_hat, _ = estimate(model, x_t, t, alpha_bar_t, clip_x_0, prediction)
        lambda_t, corrected = _log_snr(alpha_bar_t), x_t
        if images:
            image = _mean_image([*images, (lambda_t, x_0_hat)], lambda_t)
            corrected = _first_order_step(image, start, alpha_bar_start, alpha_bar_t)
        images = [(lambda_t, x_0_hat), *images][: min(3, remaining)]
        x_s = _first_order_step(_mean_image(images, _log_snr(alpha_bar_s)), corrected, alpha_bar_t, alpha_bar_s)
        yield Step(t, x_t, x_s, x_0_hat)
        x_t, start, alpha_bar_start = x_s, corrected, alpha_bar_t


STEPS: dict[Sampler, Callable[..., Iterator[Step]]] = {
    "ddim": ddim_steps,
    "ddpm": ddpm_steps,
    "dpmpp": dpmpp_steps,
    "heun": heun_steps,
    "ipndm": ipndm_steps,
    "unipc": unipc_steps,
}
dpmpp_sample = run_sampler(dpmpp_steps)
heun_sample = run_sampler(heun_steps)
ipndm_sample = run_sampler(ipndm_steps)
unipc_sample = run_sampler(unipc_steps)

"""Linear multistep samplers with free timesteps and coefficients, the form in which a sampler is tuned.

After each evaluation of the network the state is a linear combination of the state before it and of all images
predicted so far. With exact starting values every multistep solver of the probability-flow ODE has this form, among
them DDIM and DPM-Solver++; tuning changes the numbers and leaves the network as it is (as Oganov et al. 2025,
arXiv:2510.17699, do).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Spacing
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import Model, predict_x_0_eps
from ddpm_lab.diffusion.samplers import Step, run_sampler
from ddpm_lab.diffusion.schedule import NoiseSchedule, sampling_timesteps


@dataclass(frozen=True)
class Multistep:
    """A sampler of N evaluations: x_{i+1} = state[i] x_i + sum over j <= i of images[i, j] x_0_hat_j.

    Args:
        timesteps: where the network is evaluated, (N,) float64, decreasing, in [0, T - 1]; fractions are allowed.
        state: coefficients of the state, (N,) float64.
        images: coefficients of the predicted images, (N, N) float64; only those with j <= i are used.
    Raises:
        InputError: shapes that differ, no evaluation, or timesteps that do not decrease or are negative.
    """

    timesteps: Tensor
    state: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        N = len(self.timesteps)
        if N < 1 or self.timesteps.shape != (N,) or self.state.shape != (N,) or self.images.shape != (N, N):
            raise InputError("a multistep sampler has N timesteps, N coefficients of the state and N x N of the images")
        if not bool((self.timesteps[1:] < self.timesteps[:-1]).all() & (self.timesteps >= 0).all()):
            raise InputError("the timesteps of a multistep sampler must decrease, and end at 0 or above")


def log_snr_at(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """lambda = log(alpha_bar / (1 - alpha_bar)) / 2 at timesteps between those of the chain, linear in between.

    Args:
        t: any shape, float64 in [0, T - 1].
    Returns:
        The shape of t, float64, with gradients with respect to t.
    """
    table = schedule.snr.log() / 2
    below = t.detach().floor().long().clamp(0, schedule.num_timesteps - 2)
    return table[below] + (t - below) * (table[below + 1] - table[below])


def timesteps_at(schedule: NoiseSchedule, log_snr: Tensor) -> Tensor:
    """The inverse of `log_snr_at`; values beyond the ends of the chain become its ends."""
    falling = -schedule.snr.log() / 2  # increasing in t
    wanted = (-log_snr).clamp(float(falling[0]), float(falling[-1]))
    above = torch.searchsorted(falling, wanted.detach().contiguous(), right=True)
    below = (above - 1).clamp(0, schedule.num_timesteps - 2)
    return below + (wanted - falling[below]) / (falling[below + 1] - falling[below])


def second_order(schedule: NoiseSchedule, timesteps: Tensor) -> Multistep:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2) as a `Multistep`, at any timesteps.

    Args:
        timesteps: (N,) float64, decreasing; the coefficients have gradients with respect to them.
    """
    N, log_snr = len(timesteps), log_snr_at(schedule, timesteps)
    alpha_bar = torch.sigmoid(2 * log_snr)
    h = log_snr[1:] - log_snr[:-1]
    state = ((1 - alpha_bar[1:]) / (1 - alpha_bar[:-1])).sqrt()
    whole = alpha_bar[1:].sqrt() * -torch.expm1(-h)  # of the extrapolated image
    rows = [torch.zeros(N, dtype=torch.float64) for _ in range(N)]
    for i in range(N - 1):
        share = h[i] / (2 * h[i - 1]) if i > 0 else torch.zeros((), dtype=torch.float64)
        row = {i: whole[i] * (1 + share)} | ({i - 1: -whole[i] * share} if i > 0 else {})
        rows[i] = torch.stack([row.get(j, torch.zeros((), dtype=torch.float64)) for j in range(N)])
    rows[-1] = torch.eye(N, dtype=torch.float64)[-1]  # the last step ends at the clean image, as predicted
    return Multistep(timesteps, torch.cat([state, torch.zeros(1, dtype=torch.float64)]), torch.stack(rows))


def spaced_timesteps(schedule: NoiseSchedule, num_steps: int, spacing: Spacing) -> Tensor:
    """The timesteps of `sampling_timesteps`, (num_steps,) float64."""
    return torch.tensor(sampling_timesteps(schedule, num_steps, spacing), dtype=torch.float64)


def multistep_steps(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    solver: Multistep,
    *,
    clip_x_0: bool = True,
    prediction: Predicted = "eps",
) -> Iterator[Step]:
    """A linear multistep sampler, step by step.

    Args:
        model: called as model(x_t, t), t (B,) in the dtype of x_T, in [0, T - 1]; it may be a fraction.
        x_T: standard normal noise, (B, C, H, W).
        solver: timesteps and coefficients; if they require gradients, the states have them.
        clip_x_0: clip each predicted image to [-1, 1].
        prediction: what the model predicts.
    Yields:
        A `Step` for each evaluation; its t is the nearest timestep of the chain.
    Raises:
        InputError: unknown prediction.
    """
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (solver.timesteps, solver.state, solver.images))
    alpha_bar = torch.sigmoid(2 * log_snr_at(schedule, solver.timesteps))
    x_t, predicted = x_T, []
    for i, t in enumerate(solver.timesteps):
        with torch.set_grad_enabled(learning):
            output = model(x_t, t.to(x_T).expand(len(x_T)))
            level, state, *images = (
                number.to(x_T) if learning else float(number)
                for number in (alpha_bar[i], solver.state[i], *solver.images[i, : i + 1])
            )
            x_0_hat, _ = predict_x_0_eps(prediction, output, x_t, level, clip_x_0)
            predicted.append(x_0_hat)
            x_s = state * x_t
            for weight, image in zip(images, predicted, strict=True):
                x_s = x_s + weight * image
        yield Step(round(float(t.detach())), x_t, x_s, x_0_hat)
        x_t = x_s


multistep_sample = run_sampler(multistep_steps)

"""Noise schedules: beta_t and the quantities derived from it.

Symbols: T is `num_timesteps`; t = 0 .. T-1 in code, where t = 0 is already one step of noise (papers and figures count
1 .. T, and call the clean image 0). beta[t] is the variance added at step t, alpha = 1 - beta, alpha_bar its product.
Invariant: tables are float64 on the CPU, computed once, cast when used; alpha_bar falls strictly inside (0, 1).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpm_lab.core.config import DiffusionConfig, Spacing
from ddpm_lab.core.errors import InputError

LEAST_LOG_SNR = -10.2  # at the end of the linear chain of T = 1000; below it nothing of the image remains


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (Ho et al. 2020, eq. 2).

    Args:
        beta: variances, (T,) float64 in (0, 1).
    Raises:
        InputError: another shape or dtype, or a value outside (0, 1).
    """

    beta: Tensor

    def __post_init__(self) -> None:
        if self.beta.ndim != 1 or len(self.beta) < 2 or self.beta.dtype != torch.float64:
            raise InputError(f"beta must be (T,) float64 with T >= 2, not {tuple(self.beta.shape)} {self.beta.dtype}")
        if not bool(((self.beta > 0) & (self.beta < 1)).all()):
            raise InputError("every beta must lie in (0, 1)")

    @property
    def num_timesteps(self) -> int:
        """T, the length of the chain."""
        return len(self.beta)

    @cached_property
    def alpha(self) -> Tensor:
        """1 - beta, (T,) float64."""
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of alpha, (T,) float64: the fraction of the image's variance that remains at t."""
        return torch.cumprod(self.alpha, dim=0)

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(alpha_bar), (T,) float64: the factor of x_0 in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noise(self) -> Tensor:
        """sqrt(1 - alpha_bar), (T,) float64: the factor of eps in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (T,) float64."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar[t], and 1 for t = -1, the clean image."""
        return 1.0 if t < 0 else float(self.alpha_bar[t])


def linear_schedule(num_timesteps: int = 1000, rescale_betas: bool = True) -> NoiseSchedule:
    """Betas evenly spaced from 1e-4 to 0.02 (Ho et al. 2020, section 4).

    That is the range of the paper for T = 1000. For another T there are two conventions, with different results.

    Args:
        num_timesteps: T, from 2 to 10,000.
        rescale_betas: multiply the range by 1000 / T, so that the process is nearly the same for every T, with T as its
            resolution (requires T > 20); False: 1e-4 .. 0.02 for every T, so that a short chain ends before the image
            is lost (sqrt(alpha_bar) ends at 0.0797 for T = 500), and a long chain spends its end in pure noise.
    Raises:
        InputError: T out of range, or too small to rescale.
    """
    return build_schedule(DiffusionConfig(num_timesteps=num_timesteps, rescale_betas=rescale_betas))


def cosine_schedule(num_timesteps: int = 1000) -> NoiseSchedule:
    """alpha_bar(t) = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008, betas clipped at 0.999 (arXiv:2102.09672, eq. 17).

    Args:
        num_timesteps: T, from 2 to 10,000.
    Raises:
        InputError: T out of range.
    """
    return build_schedule(DiffusionConfig(num_timesteps=num_timesteps, schedule="cosine"))


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The schedule of a configuration; see `linear_schedule` and `cosine_schedule`."""
    T = config.num_timesteps
    if config.schedule == "linear":
        scale = 1000 / T if config.rescale_betas else 1.0
        return NoiseSchedule(torch.linspace(scale * 1e-4, scale * 0.02, T, dtype=torch.float64))
    s = 0.008
    time = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return NoiseSchedule((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


def sampling_timesteps(schedule: NoiseSchedule, num_steps: int, spacing: Spacing = "uniform") -> list[int]:
    """The timesteps that a sampler visits, from noise to image; the clean image follows the last.

    Args:
        schedule: of T timesteps.
        num_steps: number of timesteps, from 1 to T.
        spacing: 'uniform' (every T / num_steps, from T-1), 'leading' (every T / num_steps, down to 0), 'quadratic'
            (denser near the image; Song et al. 2020, arXiv:2010.02502, appendix D.2), 'logsnr' (even in the logarithm
            of the signal-to-noise ratio, from T-1 to 0; Lu et al. 2022, arXiv:2206.00927), or 'karras' (even in
            sigma^(1/7), sigma = sqrt((1 - alpha_bar) / alpha_bar), from T-1 to 0; Karras et al. 2022, arXiv:2206.00364,
            eq. 5). These two cross the part of a chain that is pure noise, as in the cosine schedule, in one step.
            Timesteps that would coincide move to the next free one.
    Returns:
        `num_steps` distinct integers, decreasing, the first T-1 but for 'leading'.
    Raises:
        InputError: num_steps outside 1 .. T, or an unknown spacing.
    """
    T = schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise InputError(f"num_steps must be from 1 to the {T} timesteps the network was trained on, not {num_steps}")
    fractions = [(i + 1) / num_steps for i in range(num_steps)]  # (0, 1], increasing
    if spacing == "uniform":
        wanted = [round(T * fraction) - 1 for fraction in fractions]
    elif spacing == "leading":
        wanted = [T * i // num_steps for i in range(num_steps)]
    elif spacing == "quadratic":
        wanted = [round(T * fraction**2) - 1 for fraction in fractions]
    elif spacing in ("logsnr", "karras"):
        levels = -schedule.snr.log()  # 2 ln sigma, increasing in t
        last = min(levels[-1], torch.tensor(-LEAST_LOG_SNR, dtype=torch.float64))
        if spacing == "karras":
            levels, last = (levels / 14).exp(), (last / 14).exp()  # sigma^(1/7)
        targets = torch.linspace(float(levels[0]), float(last), num_steps, dtype=torch.float64)
        wanted = [int((levels - target).abs().argmin()) for target in targets[:-1]] + [T - 1]
    else:
        raise InputError(f"spacing must be uniform, leading, quadratic, logsnr or karras, not {spacing!r}")
    increasing: list[int] = []
    for index, nearest in enumerate(wanted):
        free = max(nearest, increasing[-1] + 1) if increasing else max(nearest, 0)
        increasing.append(min(free, T - num_steps + index))  # and leave room for the following ones
    return increasing[::-1]

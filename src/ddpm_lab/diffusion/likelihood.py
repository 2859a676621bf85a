"""The variational bound on the negative log-likelihood, in bits per dimension (Ho et al. 2020, eqs. 5, 8, 13).

L = L_T + sum over t of L_{t-1} + L_0: what of the image is left at the end, what each step back costs, and the
last step's discrete decoder. A longer chain makes the bound tighter by itself, so bounds of two T do not compare as
models do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Variance
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.data.datasets import to_float
from ddpm_lab.diffusion.guidance import conditional
from ddpm_lab.diffusion.process import Model, per_image, posterior, predict_x_0_eps, q_sample
from ddpm_lab.diffusion.schedule import NoiseSchedule

ALONE = 12  # of the first terms of the sum, each of which is evaluated for every image


@dataclass(frozen=True)
class Bound:
    """The bound, in bits per dimension.

    Attributes:
        value: its mean over images.
        standard_error: of that mean, over the choice of images, timesteps and noise.
        prior, decoder: the parts L_T and L_0 of it.
        num_images: how many.
        num_drawn: at how many timesteps of each image the sum was estimated.
    """

    value: float
    standard_error: float
    prior: float
    decoder: float
    num_images: int
    num_drawn: int


def variational_bound(
    model: Model,
    schedule: NoiseSchedule,
    images: Tensor,
    *,
    prediction: Predicted = "eps",
    variance: Variance = "beta",
    num_drawn: int = 50,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 250,
    on_batch: Callable[[int], object] = lambda rows: None,
) -> Bound:
    """Estimate the bound: the sum over t is cut into `strata`, and one t drawn from each, anew for each image.

    Args:
        model: called as model(x_t, t).
        images: (N, C, H, W) uint8, N at least 2; held-out ones, on the device of the model.
        prediction: what the model predicts.
        variance: of the steps back, 'beta' or 'beta_tilde'; that of the last is beta_tilde of the one before it, for
            its own is 0 (as Ho et al. evaluate it).
        num_drawn: parts of the sum, and timesteps of each image; all there are where the chain is no longer.
        labels: (N,) int64, for a network that is to be told its classes, on its device.
        seed: of timesteps and noise.
        on_batch: called after each batch with its number of evaluations.
    Raises:
        InputError: fewer than 2 images, no timestep, or an unknown variance.
    """
    require(len(images) >= 2, f"a bound needs at least 2 images for its error, not {len(images)}")
    require(num_drawn >= 1, f"num_drawn must be at least 1, not {num_drawn}")
    if variance not in ("beta", "beta_tilde"):
        raise InputError(f"variance must be beta or beta_tilde, not {variance!r}")
    device, images = images.device, images.cpu()

    def of_rows(rows: slice) -> Model:
        """The model asked for some of the images; all else is float64 on the CPU, for some devices have none."""
        asked = conditional(model, None if labels is None else labels[rows])

        def on_device(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return asked(x_t.to(device), t.to(device)).cpu()

        return on_device

    N, later = len(images), schedule.num_timesteps - 1  # timesteps 1 .. T-1 of code have a step back that is Gaussian
    parts = min(num_drawn, later)
    generator = torch.Generator().manual_seed(seed)
    edges = strata(later, parts)
    width = edges[1:] - edges[:-1]
    drawn = edges[:-1] + (torch.rand(N, parts, generator=generator) * width).long() + 1  # (N, parts), in 1 .. T-1
    bits = torch.zeros(N, dtype=torch.float64)
    decoders = torch.zeros(N, dtype=torch.float64)
    for first in range(0, N, batch_size):
        rows = slice(first, min(first + batch_size, N))
        x_0, asked = to_float(images[rows]), of_rows(rows)
        for part in range(parts):
            costs = _step_costs(asked, schedule, x_0, drawn[rows, part], generator, prediction, variance)
            bits[rows] += costs * float(width[part])
            on_batch(len(x_0))
        decoders[rows] = _decoder_costs(asked, schedule, x_0, generator, prediction)
        on_batch(len(x_0))
    alpha_bar = float(schedule.alpha_bar[-1])
    mean_square = to_float(images).double().square().flatten(1).mean(1)
    priors = (alpha_bar * mean_square - alpha_bar - math.log1p(-alpha_bar)) / 2 / math.log(2)
    total = bits + decoders + priors
    return Bound(
        value=float(total.mean()),
        standard_error=float(total.std()) / N**0.5,
        prior=float(priors.mean()),
        decoder=float(decoders.mean()),
        num_images=N,
        num_drawn=parts,
    )


def strata(num_terms: int, parts: int) -> Tensor:
    """Cut a sum over 1 .. num_terms into parts: the first twelve terms alone, then parts that grow geometrically.

    The cost of a step back falls about as 1/t, so equal parts would leave nearly all of the bound to one draw from the
    first of them. With few parts a quarter of them are terms alone.

    Args:
        parts: from 1 to num_terms.
    Returns:
        (parts + 1,) int64 edges, increasing from 0 to num_terms; part i holds terms edges[i] + 1 .. edges[i + 1].
    """
    alone = num_terms if parts == num_terms else min(ALONE, parts // 4)
    edges = list(range(alone + 1))
    growth = (num_terms / max(alone, 1)) ** (1 / max(parts - alone, 1))
    for i in range(1, parts - alone + 1):
        wanted = max(round(max(alone, 1) * growth**i), edges[-1] + 1)
        edges.append(min(wanted, num_terms - (parts - alone - i)))  # and leave a term to each of those that follow
    return torch.tensor(edges)


def _step_costs(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    t: Tensor,
    generator: torch.Generator,
    prediction: Predicted,
    variance: Variance,
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each image, bits per dimension, (B,) float64."""
    x_t = q_sample(schedule, x_0, t, torch.randn(x_0.shape, generator=generator))
    output, x_0, x_t = model(x_t, t).double(), x_0.double(), x_t.double()
    alpha_bar_t, alpha_bar_s = (per_image(schedule.alpha_bar, at, x_0) for at in (t, t - 1))
    x_0_hat, _ = predict_x_0_eps(prediction, output, x_t, alpha_bar_t, clip_x_0=True)
    mean, beta_tilde = posterior(x_0, x_t, alpha_bar_t, alpha_bar_s)
    mean_hat, _ = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_s)
    sigma_squared = per_image(schedule.beta, t, x_0) if variance == "beta" else beta_tilde
    ratio = beta_tilde / sigma_squared
    nats = (mean - mean_hat).square() / sigma_squared / 2 + (ratio - 1 - ratio.log()) / 2
    return nats.flatten(1).mean(1) / math.log(2)


def _decoder_costs(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    generator: torch.Generator,
    prediction: Predicted,
) -> Tensor:
    """-log2 p(x_0 | x_1) per dimension: a normal density over each of 256 levels, open at both ends; (B,) float64."""
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.zeros(len(x_0), dtype=torch.int64)
    x_1 = q_sample(schedule, x_0, t, eps)
    a_t, a_s = float(schedule.alpha_bar[1]), float(schedule.alpha_bar[0])
    output = model(x_1, t).double()
    # the mean of the posterior at s = 0 is x_0_hat
    mean, _ = predict_x_0_eps(prediction, output, x_1.double(), a_s, clip_x_0=True)
    sigma = ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5
    clean = x_0.double()
    above = torch.where(clean > 0.999, torch.inf, (clean + 1 / 255 - mean) / sigma)
    below = torch.where(clean < -0.999, -torch.inf, (clean - 1 / 255 - mean) / sigma)
    # log(F(above) - F(below)) by whichever tail is lighter: two numbers near 1 would leave nothing, and a level far
    # from the mean has a probability that no float64 holds.
    near, far = torch.where(below > 0, -below, above), torch.where(below > 0, -above, below)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    nats: Tensor = -(log_near + torch.log1p(-torch.exp(log_far - log_near)))
    return (nats / math.log(2)).flatten(1).mean(1)

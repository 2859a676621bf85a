"""The variational bound on the negative log-likelihood, in bits per dimension (Ho et al. 2020, eqs. 5, 8, 13).

L = L_T + sum over t of L_{t-1} + L_0: the cost of the last state, of each reverse step, and of the discrete decoder of
the last step. A longer chain makes the bound tighter by itself, so bounds of two T do not compare the models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lab.core.config import Predicted, Variance
from ddpm_lab.core.errors import require
from ddpm_lab.data.datasets import to_float
from ddpm_lab.diffusion.guidance import conditional
from ddpm_lab.diffusion.process import Model, per_image, posterior, predict_x_0_eps, q_sample
from ddpm_lab.diffusion.schedule import NoiseSchedule

SINGLE_TERMS = 12  # the first terms of the sum, each evaluated for every image


@dataclass(frozen=True)
class Bound:
    """The bound, in bits per dimension.

    Attributes:
        value: the mean over the images.
        standard_error: of that mean, over the choice of images, timesteps and noise.
        prior, decoder: the parts L_T and L_0.
        num_images: the number of images.
        num_drawn: the number of timesteps drawn for each image.
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
    """Estimate the bound: the sum over t is divided into `strata`, and one t is drawn from each for each image.

    Args:
        model: called as model(x_t, t).
        images: (N, C, H, W) uint8, held out from training, N at least 2, on the device of the model.
        prediction: what the model predicts.
        variance: of the reverse steps, 'beta' or 'beta_tilde'; the last step has beta_tilde of the step before, because
            its own is 0 (as Ho et al. evaluate it).
        num_drawn: number of strata, and of timesteps drawn for each image; at most T - 1 are used.
        labels: (N,) int64 on the device of the model, for a conditional network; None: no labels.
        seed: of timesteps and noise.
        batch_size: images in one evaluation of the model.
        on_batch: called after each evaluation with the number of images.
    Raises:
        InputError: fewer than 2 images, num_drawn below 1, or an unknown variance.
    """
    require(len(images) >= 2, f"a bound needs at least 2 images for its error, not {len(images)}")
    require(num_drawn >= 1, f"num_drawn must be at least 1, not {num_drawn}")
    require(variance in ("beta", "beta_tilde"), f"variance must be beta or beta_tilde, not {variance!r}")
    device, images = images.device, images.cpu()

    def model_of(rows: slice) -> Model:
        """The model with the labels of some images; all else is float64 on the CPU, for some devices lack float64."""
        with_labels = conditional(model, None if labels is None else labels[rows])

        def on_device(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return with_labels(x_t.to(device), t.to(device)).cpu()

        return on_device

    N, num_terms = len(images), schedule.num_timesteps - 1  # timesteps 1 .. T-1 in code have a Gaussian reverse step
    parts = min(num_drawn, num_terms)
    generator = torch.Generator().manual_seed(seed)
    edges = strata(num_terms, parts)
    width = edges[1:] - edges[:-1]
    drawn = edges[:-1] + (torch.rand(N, parts, generator=generator) * width).long() + 1  # (N, parts), in 1 .. T-1
    bits = torch.zeros(N, dtype=torch.float64)
    decoders = torch.zeros(N, dtype=torch.float64)
    for first in range(0, N, batch_size):
        rows = slice(first, min(first + batch_size, N))
        x_0, batch_model = to_float(images[rows]), model_of(rows)
        for part in range(parts):
            costs = _step_costs(batch_model, schedule, x_0, drawn[rows, part], generator, prediction, variance)
            bits[rows] += costs * float(width[part])
            on_batch(len(x_0))
        decoders[rows] = _decoder_costs(batch_model, schedule, x_0, generator, prediction)
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
    """Divide a sum over 1 .. num_terms into parts: twelve single terms first, then parts that grow geometrically.

    The cost of a reverse step falls about as 1/t, so that with equal parts nearly all of the bound would depend on one
    draw from the first part. With fewer than 48 parts, a quarter of them are single terms.

    Args:
        num_terms: number of terms.
        parts: number of parts, from 1 to num_terms.
    Returns:
        (parts + 1,) int64 edges, increasing from 0 to num_terms; part i holds terms edges[i] + 1 .. edges[i + 1].
    """
    single = num_terms if parts == num_terms else min(SINGLE_TERMS, parts // 4)
    edges = list(range(single + 1))
    growth = (num_terms / max(single, 1)) ** (1 / max(parts - single, 1))
    for i in range(1, parts - single + 1):
        edge = max(round(max(single, 1) * growth**i), edges[-1] + 1)
        edges.append(min(edge, num_terms - (parts - single - i)))  # at least one term remains for each later part
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
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each image in bits per dimension, (B,) float64."""
    x_t = q_sample(schedule, x_0, t, torch.randn(x_0.shape, generator=generator))
    output, x_0, x_t = model(x_t, t).double(), x_0.double(), x_t.double()
    alpha_bar_t, alpha_bar_s = (per_image(schedule.alpha_bar, step, x_0) for step in (t, t - 1))
    x_0_hat, _ = predict_x_0_eps(prediction, output, x_t, alpha_bar_t, clip_x_0=True)
    mean, beta_tilde = posterior(x_0, x_t, alpha_bar_t, alpha_bar_s)
    mean_hat, _ = posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_s)
    sigma_squared = per_image(schedule.beta, t, x_0) if variance == "beta" else beta_tilde
    ratio = beta_tilde / sigma_squared
    nats = (mean - mean_hat).square() / sigma_squared / 2 + (ratio - 1 - ratio.log()) / 2
    return nats.flatten(1).mean(1) / math.log(2)


def _decoder_costs(
    model: Model, schedule: NoiseSchedule, x_0: Tensor, generator: torch.Generator, prediction: Predicted
) -> Tensor:
    """-log2 p(x_0 | x_1) per dimension, (B,) float64: a normal density over 256 levels, the outer two unbounded."""
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
    # log(F(above) - F(below)) is computed in the lighter tail: the difference of two numbers near 1 would be 0, and so
    # would be the probability of a level far from the mean.
    near, far = torch.where(below > 0, -below, above), torch.where(below > 0, -above, below)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    nats: Tensor = -(log_near + torch.log1p(-torch.exp(log_far - log_near)))
    return (nats / math.log(2)).flatten(1).mean(1)

"""Scores from features: Frechet distance, Inception Score, KID, precision, recall, density, coverage; their intervals.

Images become features elsewhere; here features, (N, d), become statistics, and statistics or features a number.
Nothing here knows which network made them: over the FID network's features the Frechet distance is "FID", over others
it is not.
Invariant: statistics are float64 with ddof 1, and no score is ever NaN: what cannot be computed is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.config import InputError


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Attributes:
        num_images: N, at least 2.
        mean: (d,) float64.
        cov: (d, d) float64, symmetric, ddof 1.
    """

    num_images: int
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.ndim != 1 or self.cov.shape != (d, d):
            raise InputError(f"mean must be (d,), cov (d, d), not {tuple(self.mean.shape)}, {tuple(self.cov.shape)}")
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise InputError(f"statistics must be float64, not {self.mean.dtype} and {self.cov.dtype}")
        if not (bool(self.mean.isfinite().all()) and bool(self.cov.isfinite().all())):
            raise InputError("statistics hold values that are not finite")

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = cov, (d, r) float64, r the rank; computed once, for a reference serves many comparisons."""
        eigenvalues, eigenvectors = torch.linalg.eigh(self.cov)
        kept = eigenvalues > eigenvalues[-1].clamp(min=0) * len(eigenvalues) * torch.finfo(torch.float64).eps
        factor: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return factor


class RunningStatistics:
    """Mean and covariance gathered batch by batch; memory does not grow with the number of images.

    Merging two gives what one would have given over all (Chan et al. 1979), up to summation order.
    """

    def __init__(self, num_features: int) -> None:
        self.num_images = 0
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch, (B, d) of any float dtype.

        Raises:
            InputError: another number of features, or values that are not finite.
        """
        batch = _checked(features, len(self._mean))
        if len(batch):
            mean = batch.mean(0)
            centred = batch - mean
            self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "RunningStatistics") -> None:
        """Add all that another has gathered."""
        if other.num_images:
            self._add(other.num_images, other._mean, other._scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.num_images + count
        difference = mean - self._mean
        self._scatter += scatter + torch.outer(difference, difference) * (self.num_images * count / total)
        self._mean += difference * (count / total)
        self.num_images = total

    def finish(self) -> Statistics:
        """The statistics so far.

        Raises:
            InputError: fewer than 2 images.
        """
        if self.num_images < 2:
            raise InputError(f"a covariance needs at least 2 images, not {self.num_images}")
        return Statistics(self.num_images, self._mean.clone(), self._scatter / (self.num_images - 1))


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of features, (N, d) of any float dtype, N at least 2."""
    running = RunningStatistics(_checked(features).shape[1])
    running.update(features)
    return running.finish()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With C = F F^T the last trace is the sum of the singular values of F_a^T F_b: nothing is squared that a root would
    have to undo, so it stays exact for singular covariances (N < d) and identical sets.

    Returns:
        A finite number, never below zero by more than rounding; 0 for equal statistics up to 1e-6 of the traces.
    Raises:
        InputError: statistics of different dimension.
    """
    if len(a.mean) != len(b.mean):
        raise InputError(f"statistics of {len(a.mean)} and {len(b.mean)} features cannot be compared")
    cross = a.factor.T @ b.factor
    shared = torch.linalg.svdvals(cross).sum() if cross.numel() else torch.zeros((), dtype=torch.float64)
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * shared)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016, arXiv:1606.03498), over splits.

    Args:
        logits: (N, K), before the softmax; K is what the score can reach at most.
        splits: the images are shuffled and scored in this many parts; 1: all together.
        seed: of the shuffling.
    Returns:
        Mean and standard deviation over the splits (0 for one).
    Raises:
        InputError: more splits than images.
    """
    logits = _checked(logits)
    N = len(logits)
    if not 1 <= splits <= N:
        raise InputError(f"splits must be from 1 to the {N} images, not {splits}")
    order = np.random.RandomState(seed).permutation(N)
    log_p = logits[torch.from_numpy(order)].log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * N // splits : (i + 1) * N // splits]
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 2020
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).

    Args:
        a, b: features, (N, d) and (M, d).
        subsets: how many pairs of random subsets are averaged.
        subset_size: images in each; None: the smaller of 1000, N and M.
        seed: of the choice of subsets.
    Returns:
        Mean and standard deviation over the subsets; the mean may be slightly below 0 for equal distributions.
    Raises:
        InputError: dimensions differ, or a subset larger than a set or below 2.
    """
    a = _checked(a)
    b = _checked(b, a.shape[1])
    limit = min(len(a), len(b))
    size = min(1000, limit) if subset_size is None else subset_size
    if not 2 <= size <= limit or subsets < 1:
        raise InputError(f"KID needs at least one subset, of 2 to {limit} images; not {subsets} of {size}")
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.from_numpy(generator.choice(len(a), size, replace=False))]
        y = b[torch.from_numpy(generator.choice(len(b), size, replace=False))]
        xx, yy, xy = (_cubic_kernel(p, q) for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Manifold:
    """How two sets of features lie in each other's neighbourhoods; each in [0, 1] but density, which may exceed 1.

    Attributes:
        precision: share of generated images inside the balls of the real ones (quality).
        recall: share of real images inside the balls of the generated ones (variety).
        density: mean number of real balls a generated image lies in, over k.
        coverage: share of real images whose ball holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(generated: Tensor, real: Tensor, k: int = 3, block: int = 1000) -> Manifold:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020).

    The ball of an image reaches to its k-th nearest neighbour in its own set. Memory is block x N distances at a time.

    Args:
        generated, real: features, (N, d) and (M, d); they should be equally many, for each measure depends on both.
        k: neighbours.
        block: images whose distances are held at once.
    Raises:
        InputError: dimensions differ, or a set of k images or fewer.
    """
    generated = _checked(generated)
    real = _checked(real, generated.shape[1])
    if min(len(generated), len(real)) <= k or k < 1:
        raise InputError(f"neighbourhoods of {k} need more than {k} images in each set, and k of at least 1")
    real_radius, generated_radius = (_radii(features, k, block) for features in (real, generated))
    in_real, held_by_real, recalled = 0, 0, 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    for part in torch.split(generated, block):
        inside = torch.cdist(part, real) <= real_radius  # (block, M)
        in_real += int(inside.any(1).sum())
        held_by_real += int(inside.sum())
        covered |= inside.any(0)
    for part in torch.split(real, block):
        recalled += int((torch.cdist(part, generated) <= generated_radius).any(1).sum())
    return Manifold(
        precision=in_real / len(generated),
        recall=recalled / len(real),
        density=held_by_real / (k * len(generated)),
        coverage=float(covered.double().mean()),
    )


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Distance of each to its k-th nearest other, (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in torch.split(features, block)])


@dataclass(frozen=True)
class Interval:
    """A score with its interval: it covers the choice of images, not the training seed.

    Attributes:
        value: the estimate from all images.
        low, high: value -+ z bootstrap standard deviations.
    """

    value: float
    low: float
    high: float


def bootstrap_interval(
    score: Callable[[Tensor], float], num_images: int, replicates: int = 50, z: float = 1.96, seed: int = 0
) -> Interval:
    """Estimate +- z times the bootstrap standard deviation.

    Percentiles of the replicates would miss: drawing with replacement repeats images, which biases a Frechet distance
    upward, so the replicates lie above the estimate they are to surround; their spread is right all the same.

    Args:
        score: a number from indices, (N,) int64, of the images to use.
        num_images: N.
        replicates: draws, at least 2.
        z: standard deviations; 1.96 for 95 %.
    """
    if replicates < 2:
        raise InputError(f"a bootstrap needs at least 2 replicates, not {replicates}")
    generator = torch.Generator().manual_seed(seed)
    value = score(torch.arange(num_images))
    draws = [score(torch.randint(num_images, (num_images,), generator=generator)) for _ in range(replicates)]
    half = z * float(np.std(draws, ddof=1))
    return Interval(value, value - half, value + half)


def extrapolated_frechet_distance(features: Tensor, reference: Statistics, sizes: int = 10, seed: int = 0) -> float:
    """The Frechet distance extrapolated to infinitely many images (Chong and Forsyth 2020, arXiv:1911.07023).

    The bias falls as 1/n: distances of subsets of half to all of the images are fitted by a line in 1/n, whose value at
    0 is returned. Always label it as such; it is not what publications call FID.

    Raises:
        InputError: fewer than 20 images.
    """
    features = _checked(features)
    if len(features) < 20:
        raise InputError(f"an extrapolation needs at least 20 images, not {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    counts = np.linspace(len(features) // 2, len(features), sizes).astype(int)
    distances = [
        frechet_distance(statistics(features[torch.randperm(len(features), generator=generator)[:count]]), reference)
        for count in counts
    ]
    return float(np.polyfit(1 / counts, distances, 1)[1])


def _checked(features: Tensor, num_features: int | None = None) -> Tensor:
    """Features as float64, refused where they are not (N, d) or not finite."""
    if features.ndim != 2 or (num_features is not None and features.shape[1] != num_features):
        wanted = "(N, d)" if num_features is None else f"(N, {num_features})"
        raise InputError(f"features must be {wanted}, not {tuple(features.shape)}")
    if not bool(features.isfinite().all()):
        raise InputError("features hold values that are not finite")
    return features.detach().cpu().double()

"""Scores from features: Frechet distance, Inception Score, KID; and intervals.

Images become features elsewhere; here features, (N, d), become statistics, and statistics or features a number.
Nothing here knows which network made them: over the FID network's features the Frechet distance is "FID", over others
it is not.
Invariant: statistics are float64 with ddof 1, and no score is ever NaN: what cannot be computed is refused by name.
Features may lie in a memory-mapped file: none here makes a float64 copy of more rows than there are columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.errors import InputError

BLOCK = 1024  # rows that are held in float64 at once


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Attributes:
        num_images: N, at least 2; None: unknown, of statistics from a file.
        mean: (d,) float64.
        cov: (d, d) float64, symmetric, ddof 1.
    """

    num_images: int | None
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or len(self.mean) == 0 or self.cov.shape != (len(self.mean), len(self.mean)):
            raise InputError(f"mean must be (d,), cov (d, d), not {tuple(self.mean.shape)}, {tuple(self.cov.shape)}")
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise InputError(f"statistics must be float64, not {self.mean.dtype} and {self.cov.dtype}")
        if not (bool(self.mean.isfinite().all()) and bool(self.cov.isfinite().all())):
            raise InputError("statistics hold values that are not finite")

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = cov, (d, r) float64; computed once, for a reference serves many comparisons.

        Cholesky's where the covariance is positive definite, an order of magnitude faster; else from eigenvectors.
        """
        cholesky, failed = torch.linalg.cholesky_ex(self.cov)
        if not failed:
            return torch.as_tensor(cholesky)
        eigenvalues, eigenvectors = torch.linalg.eigh(self.cov)
        kept = eigenvalues > eigenvalues[-1].clamp(min=0) * len(eigenvalues) * torch.finfo(torch.float64).eps
        factor: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return factor


def statistics(features: Tensor, indices: Tensor | None = None) -> Statistics:
    """Mean and covariance of features, (N, d) of any float dtype, N at least 2; of chosen rows, where these are given.

    Gathered block by block (Chan et al. 1979): a block at a time is held in float64, or all rows where they are fewer
    than the features.

    Raises:
        InputError: fewer than 2 rows, or values that are not finite.
    """
    features = checked(features)
    chosen = torch.arange(len(features)) if indices is None else indices
    if len(chosen) < 2:
        raise InputError(f"a covariance needs at least 2 images, not {len(chosen)}")
    num_features, seen = features.shape[1], 0
    mean = torch.zeros(num_features, dtype=torch.float64)
    scatter = torch.zeros(num_features, num_features, dtype=torch.float64)
    for part in torch.split(chosen, BLOCK):
        batch = features[part].double()
        count, centre = len(batch), batch.mean(0)
        centred, difference = batch - centre, centre - mean
        scatter += centred.T @ centred + torch.outer(difference, difference) * (seen * count / (seen + count))
        mean += difference * (count / (seen + count))
        seen += count
    found = Statistics(seen, mean, scatter / (seen - 1))
    if len(chosen) < features.shape[1]:  # the images themselves are a factor, smaller and more exact than cov's
        vars(found)["factor"] = ((features[chosen].double() - found.mean) / float(np.sqrt(len(chosen) - 1))).T
    return found


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    d^2 = norm(mu_a - mu_b)^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

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


def inception_score(
    logits: Tensor, splits: int = 10, seed: int = 2020, indices: Tensor | None = None
) -> tuple[float, float]:
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016, arXiv:1606.03498), over splits.

    Args:
        logits: (N, K), before the softmax; K is what the score can reach at most.
        splits: the images are shuffled and scored in this many parts; 1: all together.
        seed: of the shuffling.
        indices: (M,) int64, rows to use; None: all.
    Returns:
        Mean and standard deviation over the splits (0 for one).
    Raises:
        InputError: more splits than images.
    """
    logits = checked(logits)
    chosen = torch.arange(len(logits)) if indices is None else indices
    N = len(chosen)
    if not 1 <= splits <= N:
        raise InputError(f"splits must be from 1 to the {N} images, not {splits}")
    order = chosen[torch.from_numpy(np.random.RandomState(seed).permutation(N))]
    scores = []
    for i in range(splits):
        part = order[i * N // splits : (i + 1) * N // splits]
        # E[KL(p(y|x) || p(y))] = H(p(y)) - E[H(p(y|x))], so that sums over blocks are enough
        total, negative_entropy = torch.zeros(logits.shape[1], dtype=torch.float64), 0.0
        for rows in torch.split(part, BLOCK):
            p = logits[rows].double().softmax(1)
            total += p.sum(0)
            negative_entropy += float(torch.xlogy(p, p).sum())
        marginal = total / len(part)
        divergence = negative_entropy / len(part) - float(torch.xlogy(marginal, marginal).sum())
        scores.append(float(np.exp(divergence)))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 2020,
    on_subset: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).

    Args:
        a, b: features, (N, d) and (M, d).
        subsets: how many pairs of random subsets are averaged.
        subset_size: images in each; None: the smaller of 1000, N and M.
        seed: of the choice of subsets.
        on_subset: called after each.
    Returns:
        Mean and standard deviation over the subsets; the mean may be slightly below 0 for equal distributions.
    Raises:
        InputError: dimensions differ, or a subset larger than a set or below 2.
    """
    a = checked(a)
    b = checked(b, a.shape[1])
    limit = min(len(a), len(b))
    size = min(1000, limit) if subset_size is None else subset_size
    if not 2 <= size <= limit or subsets < 1:
        raise InputError(f"KID needs at least one subset, of 2 to {limit} images; not {subsets} of {size}")
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.from_numpy(generator.choice(len(a), size, replace=False))].double()
        y = b[torch.from_numpy(generator.choice(len(b), size, replace=False))].double()
        xx, yy, xy = (_cubic_kernel(p, q) for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * xy.mean()))
        on_subset()
    return float(np.mean(values)), float(np.std(values))


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance_deviation(a: Tensor, b: Tensor, replicates: int = 50, seed: int = 0, at_most: int = 5000) -> float:
    """Bootstrap standard deviation of the squared MMD of all images of `a` from `b`, which is held fixed.

    Counts of the images drawn weigh the kernel matrix, which is computed once, block by block, for all replicates;
    pairs of an image with itself are left out, so that repeats do not bias it.

    Args:
        a, b: features, (N, d) and (M, d).
        at_most: of each set this many images are used; the deviation is scaled to N by the square root.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        features[torch.randperm(len(features), generator=generator)[:at_most]]
        for features in (checked(a), checked(b, a.shape[1]))
    )
    draws = torch.randint(len(x), (replicates, len(x)), generator=generator)
    counts = torch.zeros(replicates, len(x), dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones(1, 1, dtype=torch.float64).expand_as(draws))
    within = torch.zeros(replicates, dtype=torch.float64)
    across = torch.zeros(replicates, dtype=torch.float64)
    first = 0
    for part in blocks(x):
        weights = counts[:, first : first + len(part)]
        kernel = torch.cat([_cubic_kernel(part, other) for other in blocks(x)], dim=1)
        kernel[torch.arange(len(part)), torch.arange(first, first + len(part))] = 0
        within += ((weights @ kernel) * counts).sum(1)
        across += weights @ torch.stack([_cubic_kernel(part, other).sum(1) for other in blocks(y)]).sum(0)
        first += len(part)
    pairs = len(x) ** 2 - counts.square().sum(1)
    values = (within / pairs - 2 * across / (len(x) * len(y)))[pairs > 0]  # without those of one image over and over
    if len(values) < 2:
        raise InputError(f"no interval of KID can be drawn from {len(x)} images; leave kid out, or give --bootstrap 0")
    return float(values.std()) * float(np.sqrt(len(x) / len(a)))


@dataclass(frozen=True)
class Interval:
    """A score with its interval: it covers the choice of images, not the training seed.

    Attributes:
        value: the estimate from all images.
        low, high: value -+ z bootstrap standard deviations; None where they were not asked for.
    """

    value: float
    low: float | None
    high: float | None


def bootstrap_interval(
    score: Callable[[Tensor], float], num_images: int, replicates: int = 50, z: float = 1.96, seed: int = 0
) -> Interval:
    """Estimate +- z times the bootstrap standard deviation.

    Percentiles of the replicates would miss: drawing with replacement repeats images, which biases a Frechet distance
    upward, so the replicates lie above the estimate they are to surround. Their spread is about right for many more
    images than features (20 times as many), and too wide for fewer: the interval errs on the safe side.

    Args:
        score: a number from indices, (N,) int64, of the images to use.
        num_images: N.
        replicates: draws, at least 2; 0 leaves the interval out.
        z: standard deviations; 1.96 for 95 %.
    """
    if replicates == 0:
        return Interval(score(torch.arange(num_images)), None, None)
    if replicates < 2:
        raise InputError(f"a bootstrap needs at least 2 replicates, not {replicates}")
    generator = torch.Generator().manual_seed(seed)
    value = score(torch.arange(num_images))
    draws = [score(torch.randint(num_images, (num_images,), generator=generator)) for _ in range(replicates)]
    half = z * float(np.std(draws, ddof=1))
    return Interval(value, value - half, value + half)


def mean_interval(values: Tensor, z: float = 1.96) -> Interval:
    """Mean of a measure of each image, (N,), and its interval.

    Of a share, of bools, Wilson's (1927), which stays in [0, 1] and has a width at its ends too; else -+ z times what
    the bootstrap's deviation of a mean tends to.
    """
    N, mean = len(values), float(values.double().mean())
    if values.dtype == torch.bool:
        centre, half = mean + z**2 / (2 * N), z * float(np.sqrt(mean * (1 - mean) / N + (z / (2 * N)) ** 2))
        return Interval(mean, *(min(max((centre + end) / (1 + z**2 / N), 0.0), 1.0) for end in (-half, half)))
    half = z * float(values.double().std(correction=0)) / float(np.sqrt(N))
    return Interval(mean, max(mean - half, 0.0), mean + half)


def extrapolated_frechet_distance(features: Tensor, reference: Statistics, sizes: int = 10, seed: int = 0) -> float:
    """The Frechet distance extrapolated to infinitely many images (Chong and Forsyth 2020, arXiv:1911.07023).

    The bias falls as 1/n: distances of subsets of half to all of the images are fitted by a line in 1/n, whose value at
    0 is returned. Always label it as such; it is not what publications call FID.

    Raises:
        InputError: fewer than 20 images.
    """
    features = checked(features)
    if len(features) < 20:
        raise InputError(f"an extrapolation needs at least 20 images, not {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    counts = np.linspace(len(features) // 2, len(features), sizes).astype(int)
    distances = [
        frechet_distance(statistics(features, torch.randperm(len(features), generator=generator)[:count]), reference)
        for count in counts
    ]
    return float(np.polyfit(1 / counts, distances, 1)[1])


def checked(features: Tensor, num_features: int | None = None) -> Tensor:
    """Features as they are, on the CPU, refused where they are not (N, d) or not finite."""
    if features.ndim != 2 or (num_features is not None and features.shape[1] != num_features):
        wanted = "(N, d)" if num_features is None else f"(N, {num_features})"
        raise InputError(f"features must be {wanted}, not {tuple(features.shape)}")
    if not features.is_floating_point():
        raise InputError(f"features must be floating-point numbers, not {features.dtype}")
    if not all(bool(part.isfinite().all()) for part in torch.split(features, BLOCK)):
        raise InputError("features hold values that are not finite")
    return features.detach().cpu()


def blocks(features: Tensor) -> Iterator[Tensor]:
    """Rows in float64, some at a time."""
    for part in torch.split(features, BLOCK):
        if len(part):
            yield part.double()

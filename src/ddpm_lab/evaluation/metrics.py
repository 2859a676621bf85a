"""Scores from features: Frechet distance, Inception Score, KID, MIND, and their intervals.

Features, (N, d), become statistics; statistics or features become a number. These functions do not know which network
computed the features; the Frechet distance is an "FID" only over those of the FID network.
Invariant: statistics are float64 with ddof 1, and no score is ever NaN: what cannot be computed raises InputError.
Features may lie in a memory-mapped file, so no function makes a float64 copy of more rows than there are columns.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.errors import require
from ddpm_lab.evaluation.record import Interval

BLOCK = 1024  # rows that are held in float64 at once
MOST_PROJECTIONS = 2**22  # in memory at once for each set, 32 MiB of them
SEED = 2020  # of Inception Score, KID and MIND, as in torch-fidelity
Z95 = 1.96  # standard deviations on either side of the mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    Attributes:
        num_images: N, at least 2; None: unknown, as for statistics from a file.
        mean: (d,) float64.
        cov: (d, d) float64, symmetric, ddof 1.
    """

    num_images: int | None
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        d = self.mean.shape[0] if self.mean.ndim == 1 else 0
        shapes, dtypes = [tuple(x.shape) for x in (self.mean, self.cov)], [x.dtype for x in (self.mean, self.cov)]
        require(d > 0 and shapes[1] == (d, d), f"mean must be (d,), cov (d, d), not {shapes[0]}, {shapes[1]}")
        require(dtypes == [torch.float64] * 2, f"statistics must be float64, not {dtypes[0]} and {dtypes[1]}")
        finite = bool(self.mean.isfinite().all()) and bool(self.cov.isfinite().all())
        require(finite, "statistics hold values that are not finite")

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = cov, (d, r) float64; computed once, because a reference serves many comparisons.

        The Cholesky factor where the covariance is positive definite, which is ten times faster; else from the
        eigenvectors.
        """
        cholesky, failed = torch.linalg.cholesky_ex(self.cov)
        if not failed:
            return torch.as_tensor(cholesky)
        eigenvalues, eigenvectors = torch.linalg.eigh(self.cov)
        kept = eigenvalues > eigenvalues[-1].clamp(min=0) * len(eigenvalues) * torch.finfo(torch.float64).eps
        factor: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return factor


def statistics(features: Tensor, indices: Tensor | None = None) -> Statistics:
    """Mean and covariance of features.

    Accumulated block by block (Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances"): one block is held in float64, or all rows where there are fewer rows than features.

    Args:
        features: (N, d) of any floating dtype, N at least 2.
        indices: (M,) int64, rows to use; None: all.
    Raises:
        InputError: fewer than 2 rows, or values that are not finite.
    """
    features = checked(features)
    chosen = torch.arange(len(features)) if indices is None else indices
    require(len(chosen) >= 2, f"a covariance needs at least 2 images, not {len(chosen)}")
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
    result = Statistics(seen, mean, scatter / (seen - 1))
    if len(chosen) < features.shape[1]:  # the centred rows are a factor, smaller and more exact than one of cov
        vars(result)["factor"] = ((features[chosen].double() - result.mean) / float(np.sqrt(len(chosen) - 1))).T
    return result


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    d^2 = norm(mu_a - mu_b)^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With C = F F^T the last trace is the sum of the singular values of F_a^T F_b. No root has to undo a square, so the
    distance stays exact for singular covariances (N < d) and identical sets.

    Returns:
        A finite number, not below 0 by more than rounding; for equal statistics 0 up to 1e-6 of the traces.
    Raises:
        InputError: statistics of different dimension.
    """
    d_a, d_b = len(a.mean), len(b.mean)
    require(d_a == d_b, f"statistics of {d_a} and {d_b} features cannot be compared")
    cross = a.factor.T @ b.factor
    shared = torch.linalg.svdvals(cross).sum() if cross.numel() else torch.zeros((), dtype=torch.float64)
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * shared)


def inception_score(logits: Tensor, splits: int = 10, indices: Tensor | None = None) -> tuple[float, float]:
    """Inception Score, exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv:1606.03498, section 4), over splits.

    Args:
        logits: (N, K), before the softmax; the score is at most K.
        splits: number of parts into which the shuffled images are divided; 1: one score of all.
        indices: (M,) int64, rows to use; None: all.
    Returns:
        Mean and standard deviation over the splits (0 for one).
    Raises:
        InputError: more splits than images.
    """
    logits = checked(logits)
    chosen = torch.arange(len(logits)) if indices is None else indices
    N = len(chosen)
    require(1 <= splits <= N, f"splits must be from 1 to the {N} images, not {splits}")
    order = chosen[torch.from_numpy(np.random.RandomState(SEED).permutation(N))]
    scores = []
    for i in range(splits):
        part = order[i * N // splits : (i + 1) * N // splits]
        # E[KL(p(y|x) || p(y))] = H(p(y)) - E[H(p(y|x))], so sums over blocks suffice
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
    on_subset: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """KID: the squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401, section 4).

    It is estimated without bias (Gretton et al. 2012, "A Kernel Two-Sample Test", lemma 6).

    Args:
        a, b: features, (N, d) and (M, d).
        subsets: number of pairs of random subsets to average.
        subset_size: images in each subset; None: the smallest of 1000, N and M.
        on_subset: called after each subset.
    Returns:
        Mean and standard deviation over the subsets; for equal distributions the mean may be slightly below 0.
    Raises:
        InputError: dimensions differ, or a subset is larger than a set or smaller than 2.
    """
    a = checked(a)
    b = checked(b, a.shape[1])
    limit = min(len(a), len(b))
    size = min(1000, limit) if subset_size is None else subset_size
    require(
        2 <= size <= limit and subsets >= 1,
        f"KID needs at least one subset of 2 to {limit} images, not {subsets} of {size}",
    )
    generator = np.random.RandomState(SEED)
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


def kernel_distance_deviation(a: Tensor, b: Tensor, replicates: int = 50, at_most: int = 5000) -> float:
    """Bootstrap standard deviation of the squared MMD between all of `a` and a fixed `b`.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", algorithm 6.1. The kernel matrix is computed
    once, block by block, for all replicates; each replicate weights it by how often it drew each image. Pairs of an
    image with itself are left out, so that repeated images do not bias the estimate.

    Args:
        a, b: features, (N, d) and (M, d).
        replicates: number of bootstrap draws.
        at_most: use at most this many images of each set, and scale the deviation to N by the square root.
    Raises:
        InputError: so few images that no replicate has two different ones.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (
        features[torch.randperm(len(features), generator=generator)[:at_most]]
        for features in (checked(a), checked(b, a.shape[1]))
    )
    draws = torch.randint(len(x), (replicates, len(x)), generator=generator)
    counts = torch.stack([draw.bincount(minlength=len(x)) for draw in draws]).double()  # (replicates, N)
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
    values = (within / pairs - 2 * across / (len(x) * len(y)))[pairs > 0]  # without draws of one image only
    require(
        len(values) >= 2, f"{len(x)} images are too few for an interval of KID; leave out kid or give --bootstrap 0"
    )
    return float(values.std()) * float(np.sqrt(len(x) / len(a)))


def monge_distance(
    a: Tensor,
    b: Tensor,
    num_directions: int = 1000,
    replicates: int = 0,
    on_directions: Callable[[int], object] = lambda count: None,
) -> Interval:
    """MIND, a sliced Wasserstein distance (Berthet et al. 2026, "Monge Inception Distance", arXiv:2605.06797).

    3 d times the mean over directions u of (1/n) sum_j (x_j - y_j)^2, with the sorted projections x of u . a and y of
    u . b: in one dimension sorting gives the optimal transport. The factor 3 d brings it to the size of a Frechet
    distance. Directions are uniform on the sphere, and the same in each call. Like the Frechet distance it is too large
    by a bias that falls with n.

    Args:
        a, b: features, (n, d) each: equally many.
        num_directions: number of directions; from 100 to 1000 in publications.
        replicates: bootstrap draws of `a` for the interval, see `bootstrap_interval`; 0: no interval.
        on_directions: called with the number of directions done since the last call.
    Returns:
        A number not below 0, and 0 for equal sets.
    Raises:
        InputError: dimensions or numbers of images differ.
    """
    a = checked(a)
    b = checked(b, a.shape[1])
    n, d = a.shape
    require(len(b) == n and n > 0, f"MIND needs equally many images in both sets, not {n} and {len(b)}")
    directions = torch.randn(num_directions, d, generator=torch.Generator().manual_seed(SEED))
    directions /= directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    draws = torch.randint(n, (replicates, n), generator=torch.Generator().manual_seed(0))
    counts = [draw.bincount(minlength=n) for draw in draws]
    sums = torch.zeros(1 + replicates, dtype=torch.float64)  # of all images, then of each draw
    for u in torch.split(directions.double(), max(1, MOST_PROJECTIONS // n)):
        (x, order), (y, _) = (torch.cat([u @ part.T for part in blocks(z)], dim=1).sort(dim=1) for z in (a, b))
        sums[0] += (x - y).square().sum()
        for i, count in enumerate(counts, 1):  # a draw repeats images, and so repeats entries of what is sorted already
            drawn = x.flatten().repeat_interleave(count[order].flatten()).view_as(y)
            sums[i] += (drawn - y).square().sum()
        on_directions(len(u))
    value, *drawn_values = (3 * d * sums / (n * num_directions)).tolist()
    if not replicates:
        return Interval(value=value, low=None, high=None)
    return symmetric_interval(value, Z95 * float(np.std(drawn_values, ddof=1)))


def bootstrap_interval(
    score: Callable[[Tensor], float],
    num_images: int,
    replicates: int = 50,
    seed: int = 0,
    on_score: Callable[[], object] = lambda: None,
) -> Interval:
    """The estimate +- 1.96 bootstrap standard deviations.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", algorithm 6.1 for the standard deviation and
    section 13.2, "Standard normal intervals".

    Percentiles of the replicates would miss: drawing with replacement repeats images, which biases a Frechet distance
    upward, so the replicates lie above the estimate. Their spread is about right for 20 times as many images as
    features or more, and too wide for fewer: the interval errs on the safe side.

    Args:
        score: computes the score of the images of some indices, (N,) int64.
        num_images: N.
        replicates: number of bootstrap draws, at least 2; 0: no interval.
        seed: seed of the draws.
        on_score: called after each score, replicates + 1 times.
    Raises:
        InputError: one replicate.
    """
    require(replicates == 0 or replicates >= 2, f"a bootstrap needs at least 2 replicates, not {replicates}")
    generator = torch.Generator().manual_seed(seed)
    resamples = (torch.randint(num_images, (num_images,), generator=generator) for _ in range(replicates))
    values = []
    for indices in itertools.chain([torch.arange(num_images)], resamples):
        values.append(score(indices))
        on_score()
    if replicates == 0:
        return Interval(value=values[0], low=None, high=None)
    return symmetric_interval(values[0], Z95 * float(np.std(values[1:], ddof=1)))


def symmetric_interval(value: float, half: float) -> Interval:
    """An interval from value - half to value + half."""
    return Interval(value=value, low=value - half, high=value + half)


def mean_interval(values: Tensor) -> Interval:
    """The mean of a measure of each image, (N,), and its interval.

    For a share (values of dtype bool) it is the score interval of Wilson 1927, "Probable Inference, the Law of
    Succession, and Statistical Inference", JASA 22, pp. 209-212, which stays in [0, 1] and has a width at 0 and 1 too.
    For other measures it is mean +- z s / sqrt(N), cut off at 0, with the standard deviation s (ddof 0): what the
    bootstrap tends to (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 5).
    """
    N, mean, z = len(values), float(values.double().mean()), Z95
    if values.dtype == torch.bool:
        centre, half = mean + z**2 / (2 * N), z * float(np.sqrt(mean * (1 - mean) / N + (z / (2 * N)) ** 2))
        low, high = (min(max((centre + end) / (1 + z**2 / N), 0.0), 1.0) for end in (-half, half))
        return Interval(value=mean, low=low, high=high)
    half = z * float(values.double().std(correction=0)) / float(np.sqrt(N))
    return Interval(value=mean, low=max(mean - half, 0.0), high=mean + half)


def extrapolated_frechet_distance(features: Tensor, reference: Statistics, seed: int = 0) -> float:
    """The Frechet distance extrapolated to infinitely many images (Chong and Forsyth 2020, arXiv:1911.07023).

    The bias falls as 1/n: a line in 1/n is fitted to the distances of subsets of half to all images, and its value at
    1/n = 0 is returned. Always label it as extrapolated; publications call something else FID.

    Raises:
        InputError: fewer than 20 images.
    """
    features = checked(features)
    require(len(features) >= 20, f"an extrapolation needs at least 20 images, not {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    counts = np.linspace(len(features) // 2, len(features), 10).astype(int)
    distances = [
        frechet_distance(statistics(features, torch.randperm(len(features), generator=generator)[:count]), reference)
        for count in counts
    ]
    return float(np.polyfit(1 / counts, distances, 1)[1])


def checked(features: Tensor, num_features: int | None = None) -> Tensor:
    """The features on the CPU.

    Raises:
        InputError: they are not (N, d) with d = num_features, not floating-point, or not finite.
    """
    fits = features.ndim == 2 and num_features in (None, features.shape[1])
    require(fits, f"features must be (N, {num_features or 'd'}), not {tuple(features.shape)}")
    require(features.is_floating_point(), f"features must be floating-point numbers, not {features.dtype}")
    finite = all(bool(part.isfinite().all()) for part in torch.split(features, BLOCK))
    require(finite, "features hold values that are not finite")
    return features.detach().cpu()


def blocks(features: Tensor) -> Iterator[Tensor]:
    """The rows in float64, at most `BLOCK` at a time."""
    for part in torch.split(features, BLOCK):
        if len(part):
            yield part.double()

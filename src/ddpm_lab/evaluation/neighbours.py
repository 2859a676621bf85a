"""Scores from who is near whom: precision, recall, density, coverage, and the nearest training image.

Distances are Euclidean, in float64, and computed a block at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.evaluation.metrics import Interval, blocks, checked, mean_interval

HUNDREDTH = 0.01
HELD = 2**22  # distances, 32 MiB of them
OnRows = Callable[[int], object]  # called with how many images more were compared with all others


@dataclass(frozen=True)
class Manifold:
    """How two sets of features lie in each other's neighbourhoods; each in [0, 1] but density, which may exceed 1.

    Attributes:
        precision: share of generated images inside the balls of the real ones (quality).
        recall: share of real images inside the balls of the generated ones (variety).
        density: mean number of real balls a generated image lies in, over k.
        coverage: share of real images whose ball holds a generated one.
    """

    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval


def manifold(
    generated: Tensor, real: Tensor, k: int = 3, held: int = HELD, on_rows: OnRows = lambda rows: None
) -> Manifold:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020).

    The ball of an image reaches to its k-th nearest neighbour in its own set. Memory does not grow with N.
    Each measure is a mean over images, precision and density over generated ones, recall and coverage over real ones,
    and its interval is that of such a mean, the balls being held fixed; so it is somewhat too narrow.

    Args:
        generated, real: features, (N, d) and (M, d); they should be equally many, for each measure depends on both.
        k: neighbours.
        held: distances in memory at once.
        on_rows: called with the number of images after some were compared; 2 N + 2 M in all.
    Raises:
        InputError: dimensions differ, or a set of k images or fewer.
    """
    generated = checked(generated)
    real = checked(real, generated.shape[1])
    if min(len(generated), len(real)) <= k or k < 1:
        raise InputError(f"neighbourhoods of {k} need more than {k} images in each set, and k of at least 1")
    real_radius, generated_radius = (radii(features, features, k, held, on_rows) for features in (real, generated))
    holding = torch.zeros(len(generated), dtype=torch.int64)
    covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in _distances(generated, real, held, on_rows):
        inside = distances <= real_radius  # (rows, M)
        holding[rows] = inside.sum(1)
        covered |= inside.any(0)
    for rows, distances in _distances(real, generated, held, on_rows):
        recalled[rows] = (distances <= generated_radius).any(1)
    return Manifold(
        precision=mean_interval(holding > 0),
        recall=mean_interval(recalled),
        density=mean_interval(holding.double() / k),
        coverage=mean_interval(covered),
    )


def radii(members: Tensor, features: Tensor, k: int, held: int = HELD, on_rows: OnRows = lambda rows: None) -> Tensor:
    """Distance of each member of a set of features to its k-th nearest other, (N,) float64."""
    found = torch.zeros(len(members), dtype=torch.float64)
    for rows, distances in _distances(members, features, held, on_rows):
        found[rows] = distances.kthvalue(k + 1).values
    return found


def nearest(
    features: Tensor, others: Tensor, held: int = HELD, on_rows: OnRows = lambda rows: None
) -> tuple[Tensor, Tensor]:
    """For each row the nearest of the others.

    Returns:
        Euclidean distances, (N,) float64, and indices into `others`, (N,) int64.
    Raises:
        InputError: dimensions differ.
    """
    features = checked(features)
    others = checked(others, features.shape[1])
    found, indices = torch.zeros(len(features), dtype=torch.float64), torch.zeros(len(features), dtype=torch.int64)
    for rows, distances in _distances(features, others, held, on_rows):
        found[rows], indices[rows] = distances.min(1)
    return found, indices


def memorisation(
    generated: Tensor, training: Tensor, held_out: Tensor, on_rows: OnRows = lambda rows: None
) -> tuple[dict[str, Any], list[Any]]:
    """How many images lie nearer to a training image than the nearest hundredth of held-out images do.

    A generator of little variety, or of typical images only, has more of these without having copied anything; so it is
    also told how many lie at less than half the distance that their training image has to its own nearest one.

    Args:
        generated, training, held_out: features, (N, d), (M, d) and (K, d).
        on_rows: called with the number of images after some were compared; 2 N + K in all.
    Returns:
        What the record says, and the 16 closest as [index, index of its nearest training image, distance].

    The intervals of the two shares are of the generated images drawn (Wilson). The hundredth of K held-out images is
    uncertain as well: images distributed as they are have the share `expected` in the mean, and in 95 of 100 draws of N
    one from `expected_low` to `expected_high`. (What lies below the r-th of K draws is a share of the distribution
    Beta(r, K + 1 - r), so the count of N is beta-binomial.)
    """
    from scipy.stats import betabinom

    distances, neighbours = nearest(generated, training, on_rows=on_rows)
    usual = nearest(held_out, training, on_rows=on_rows)[0]
    threshold = float(torch.quantile(usual, HUNDREDTH))
    nearest_neighbour_distance = radii(training[neighbours], training, 1, on_rows=on_rows)
    closest = [[int(i), int(neighbours[i]), float(distances[i])] for i in distances.argsort()[:16]]
    nearer, much_nearer = (mean_interval(distances < limit) for limit in (threshold, nearest_neighbour_distance / 2))
    N, K = len(distances), len(usual)
    rank = 1 + HUNDREDTH * (K - 1)  # where `quantile` reads among the sorted, from 1
    usual_share = betabinom(N, rank, K + 1 - rank)
    return {
        "nearer_than_test": nearer.value,
        "nearer_than_test_low": nearer.low,
        "nearer_than_test_high": nearer.high,
        "expected": rank / (K + 1),
        "expected_low": float(usual_share.ppf(0.025)) / N,
        "expected_high": float(usual_share.ppf(0.975)) / N,
        "much_nearer": much_nearer.value,
        "much_nearer_low": much_nearer.low,
        "much_nearer_high": much_nearer.high,
        "threshold": threshold,
        "median_distance": float(distances.median()),
        "median_distance_of_test": float(usual.median()),
        "closest": closest,
    }, closest


def _distances(members: Tensor, features: Tensor, held: int, on_rows: OnRows) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances of some rows at a time to all features, (rows, N) float64, in one buffer used again.

    Fresh memory for each would leave the heap in pieces: 12 GB of it were seen with 50,000 images.
    """
    step = max(1, min(held // len(features), len(members)))
    buffer = torch.empty(step, len(features), dtype=torch.float64)
    for first in range(0, len(members), step):
        part = members[first : first + step].double()
        column = 0
        for other in blocks(features):
            buffer[: len(part), column : column + len(other)] = torch.cdist(part, other)
            column += len(other)
        yield slice(first, first + len(part)), buffer[: len(part)]
        on_rows(len(part))

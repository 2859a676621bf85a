"""Scores from nearest neighbours: precision, recall, density, coverage, and the nearest training image.

Distances are Euclidean and in float64, and are computed one block at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddpm_lab.core.errors import require
from ddpm_lab.evaluation.metrics import blocks, checked, mean_interval
from ddpm_lab.evaluation.record import Interval, Memorisation

QUANTILE = 0.01  # of held-out distances, below which an image counts as near to the training images
MAX_DISTANCES = 2**22  # in memory at once, 32 MiB of them
OnRows = Callable[[int], object]  # called with the number of images that were compared with all others


def manifold(generated: Tensor, real: Tensor, k: int = 3, on_rows: OnRows = lambda rows: None) -> dict[str, Interval]:
    """How two sets of features lie in each other's neighbourhoods.

    Precision and recall are those of Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2; density and coverage
    those of Naeem et al. 2020, arXiv:2002.09797, section 3. The neighbourhood of an image is the ball that reaches to
    its k-th nearest neighbour in its own set.

    Each measure is a mean over images (precision and density over generated ones, recall and coverage over real ones),
    and its interval is that of a mean, see `mean_interval`. The balls are held fixed, so it is somewhat too narrow.

    Args:
        generated, real: features, (N, d) and (M, d); take N = M, because each measure depends on both.
        k: number of neighbours.
        on_rows: called with the number of images that were compared since the last call; 2 N + 2 M in all.
    Returns:
        `precision`, `recall`, `density` and `coverage`, see `record.Scores`.
    Raises:
        InputError: dimensions differ, or a set has k images or fewer.
    """
    generated = checked(generated)
    real = checked(real, generated.shape[1])
    fewest = min(len(generated), len(real))
    require(1 <= k < fewest, f"neighbourhoods of {k} need more than {k} images in each set, and k of at least 1")
    real_radius, generated_radius = (radii(x, x, k, on_rows) for x in (real, generated))
    num_balls = torch.zeros(len(generated), dtype=torch.int64)
    covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in _distances(generated, real, on_rows):
        inside = distances <= real_radius  # (rows, M)
        num_balls[rows] = inside.sum(1)
        covered |= inside.any(0)
    for rows, distances in _distances(real, generated, on_rows):
        recalled[rows] = (distances <= generated_radius).any(1)
    measures = {
        "precision": num_balls > 0,
        "recall": recalled,
        "density": num_balls.double() / k,
        "coverage": covered,
    }
    return {name: mean_interval(values) for name, values in measures.items()}


def radii(members: Tensor, features: Tensor, k: int, on_rows: OnRows = lambda rows: None) -> Tensor:
    """Distance of each member of a set of features to its k-th nearest other, (N,) float64."""
    radius = torch.zeros(len(members), dtype=torch.float64)
    for rows, distances in _distances(members, features, on_rows):
        radius[rows] = distances.kthvalue(k + 1).values
    return radius


def nearest(features: Tensor, others: Tensor, on_rows: OnRows = lambda rows: None) -> tuple[Tensor, Tensor]:
    """For each row the nearest of the others.

    Returns:
        Euclidean distances, (N,) float64, and indices into `others`, (N,) int64.
    Raises:
        InputError: dimensions differ.
    """
    features = checked(features)
    others = checked(others, features.shape[1])
    nearest_distance = torch.zeros(len(features), dtype=torch.float64)
    indices = torch.zeros(len(features), dtype=torch.int64)
    for rows, distances in _distances(features, others, on_rows):
        nearest_distance[rows], indices[rows] = distances.min(1)
    return nearest_distance, indices


def memorisation(
    generated: Tensor, training: Tensor, held_out: Tensor, on_rows: OnRows = lambda rows: None
) -> Memorisation:
    """How many images lie closer to a training image than held-out images do.

    Two shares are given. The first counts images that are nearer to a training image than all but the nearest 1 % of
    the held-out images, after the comparison of generated, held-out and training images by Meehan et al. 2020,
    arXiv:2004.05675. A generator of little variety has a large share without copying anything. So the second counts
    images at less than half the distance that their training image has to its own nearest training neighbour, after the
    ratio of distances by Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize" (who
    take a third of the distance to the second nearest training image).

    The intervals of both shares cover the choice of generated images (Wilson, see `mean_interval`). The 1 % quantile of
    K held-out images is uncertain too. The share of a distribution that lies below the r-th smallest of K draws has the
    distribution Beta(r, K + 1 - r) (Wilks 1941, "Determination of Sample Sizes for Setting Tolerance Limits", Annals of
    Mathematical Statistics 12, pp. 91-96), so the count among N images of that distribution is beta-binomial:
    `expected` is its mean, and `expected_low` to `expected_high` its central 95 %, both divided by N.

    Args:
        generated, training, held_out: features, (N, d), (M, d) and (K, d).
        on_rows: called with the number of images that were compared since the last call; 2 N + K in all.
    Raises:
        InputError: dimensions differ.
    """
    from scipy.stats import betabinom

    distances, neighbours = nearest(generated, training, on_rows)
    held_out_distances, _ = nearest(held_out, training, on_rows)
    threshold = float(torch.quantile(held_out_distances, QUANTILE))
    nearest_neighbour_distance = radii(training[neighbours], training, 1, on_rows)
    closest = [[int(i), int(neighbours[i]), float(distances[i])] for i in distances.argsort()[:16]]
    nearer, much_nearer = (mean_interval(distances < limit) for limit in (threshold, nearest_neighbour_distance / 2))
    N, K = len(distances), len(held_out_distances)
    rank = 1 + QUANTILE * (K - 1)  # of the quantile among the sorted distances, counted from 1
    count = betabinom(N, rank, K + 1 - rank)
    return {
        "nearer_than_test": nearer["value"],
        "nearer_than_test_low": nearer["low"],
        "nearer_than_test_high": nearer["high"],
        "expected": rank / (K + 1),
        "expected_low": float(count.ppf(0.025)) / N,
        "expected_high": float(count.ppf(0.975)) / N,
        "much_nearer": much_nearer["value"],
        "much_nearer_low": much_nearer["low"],
        "much_nearer_high": much_nearer["high"],
        "threshold": threshold,
        "median_distance": float(distances.median()),
        "median_distance_of_test": float(held_out_distances.median()),
        "closest": closest,
    }


def _distances(members: Tensor, features: Tensor, on_rows: OnRows) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances of some rows at a time to all features, (rows, N) float64, in one buffer that is reused.

    New memory for each block would fragment the heap, which then grew to 12 GB with 50,000 images.
    """
    step = max(1, min(MAX_DISTANCES // len(features), len(members)))
    buffer = torch.empty(step, len(features), dtype=torch.float64)
    for first in range(0, len(members), step):
        part = members[first : first + step].double()
        column = 0
        for other in blocks(features):
            buffer[: len(part), column : column + len(other)] = torch.cdist(part, other)
            column += len(other)
        yield slice(first, first + len(part)), buffer[: len(part)]
        on_rows(len(part))

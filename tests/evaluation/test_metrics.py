"""Scores against closed forms, against theory, and against torch-fidelity."""

import math

import numpy as np
import pytest
import torch

from ddpm_lab.core.errors import InputError
from ddpm_lab.evaluation import metrics, neighbours
from ddpm_lab.evaluation.metrics import (
    Statistics,
    bootstrap_interval,
    extrapolated_frechet_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_deviation,
    mean_interval,
    monge_distance,
    statistics,
)
from ddpm_lab.evaluation.neighbours import manifold, memorisation


def normal(n, d, mean=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def gaussian(mean, cov):
    return Statistics(1000, torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64))


def covariance(d, seed):
    root = normal(d, d, seed=seed)
    return root @ root.T / d


def test_statistics_are_those_of_numpy():
    features = normal(50, 7)
    result = statistics(features.float())
    assert result.mean.dtype == result.cov.dtype == torch.float64
    np.testing.assert_allclose(result.cov.numpy(), np.cov(features.float().double().numpy(), rowvar=False), atol=1e-12)
    np.testing.assert_allclose(result.mean.numpy(), features.float().double().numpy().mean(0), atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 59])
def test_blocks_give_the_same_statistics(block, monkeypatch):
    """Also far from the origin, where sums of squares would lose their digits."""
    features = 1e6 + normal(60, 5)
    whole = statistics(features)
    monkeypatch.setattr(metrics, "BLOCK", block)
    pieces = statistics(features)
    assert pieces.num_images == 60
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(pieces.cov, whole.cov, rtol=1e-7, atol=1e-9)


def test_equal_covariances_leave_the_distance_of_the_means():
    cov = covariance(6, 1)
    a, b = gaussian(torch.arange(6.0), cov), gaussian(torch.zeros(6), cov)
    assert frechet_distance(a, b) == pytest.approx(55, rel=1e-12)


def test_diagonal_covariances_have_a_closed_form():
    """|mu|^2 + sum of (sigma_a - sigma_b)^2."""
    a, b = gaussian([1.0, 2.0], np.diag([4.0, 9.0])), gaussian([0.0, 0.0], np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 1, rel=1e-12)


def test_commuting_covariances_have_a_closed_form():
    basis = torch.linalg.qr(normal(5, 5, seed=3)).Q
    s, t = torch.rand(2, 5, dtype=torch.float64) + 0.1
    a, b = (gaussian(torch.zeros(5), basis @ torch.diag(v**2) @ basis.T) for v in (s, t))
    assert frechet_distance(a, b) == pytest.approx(float((s - t).square().sum()), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(10, 64), (64, 64), (500, 64), (2, 64)])
def test_a_set_has_distance_zero_from_itself(n, d):
    """Also where N < d makes the covariance singular."""
    result = statistics(normal(n, d, mean=3.0))
    assert abs(frechet_distance(result, result)) < 1e-6 * 2 * float(result.cov.trace())


def test_singular_covariances_have_a_closed_form():
    """Two flat distributions on perpendicular axes: nothing is shared."""
    a, b = gaussian([0.0, 0.0], np.diag([4.0, 0.0])), gaussian([0.0, 0.0], np.diag([0.0, 9.0]))
    assert frechet_distance(a, b) == pytest.approx(13)
    zero = gaussian([0.0, 0.0], np.zeros((2, 2)))
    assert frechet_distance(zero, zero) == 0
    assert frechet_distance(zero, a) == pytest.approx(4)


def test_distance_is_symmetric_and_grows():
    a, b, c = (statistics(normal(200, 8, mean=m, seed=i)) for i, m in enumerate((0.0, 0.5, 2.0)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) < frechet_distance(a, c)


def test_frechet_distance_is_that_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = normal(300, 32, seed=1) @ covariance(32, 2), 0.2 + normal(400, 32, seed=3)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-6
    )


def test_bias_falls_as_one_over_n_and_extrapolation_removes_it():
    """Of two samples of one distribution in d dimensions the distance is all bias."""
    d, reference = 10, gaussian(torch.zeros(10), torch.eye(10))
    means = {
        n: np.mean([frechet_distance(statistics(normal(n, d, seed=s)), reference) for s in range(30)])
        for n in (200, 400, 800)
    }
    assert means[200] / means[400] == pytest.approx(2, rel=0.15)
    assert means[400] / means[800] == pytest.approx(2, rel=0.15)
    extrapolated = np.mean(
        [extrapolated_frechet_distance(normal(800, d, seed=s), reference, seed=s) for s in range(30)]
    )
    assert abs(extrapolated) < 0.35 * means[800]


def test_inception_score_of_uniform_and_of_certain_predictions():
    assert inception_score(torch.zeros(100, 10)) == pytest.approx((1, 0))
    certain = 1000 * torch.eye(10).repeat(50, 1)
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    assert inception_score(certain[:10], splits=10)[0] == pytest.approx(1), "one image a split has no variety"


def test_inception_score_is_that_of_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * normal(503, 10)
    for splits in (1, 10):
        theirs = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)
        mean, deviation = inception_score(logits, splits=splits)
        assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_kernel_distance_is_that_of_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(120, 16, seed=1), 0.1 + normal(90, 16, seed=2)
    theirs = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=50, rng_seed=2020, verbose=False)
    mean, deviation = kernel_distance(a, b, subsets=20, subset_size=50)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Of equal distributions its mean is 0, not above it, within three standard errors."""
    values = [kernel_distance(normal(100, 8, seed=s), normal(100, 8, seed=1000 + s), subsets=1)[0] for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_deviation_of_kernel_distances_is_that_of_new_draws(shift):
    """Of the squared MMD of all of N images from a fixed reference, estimated from one draw alone."""
    reference, N = normal(400, 8, seed=10_000), 200

    def squared_mmd(a):
        return kernel_distance(a, reference[:N], subsets=1, subset_size=N)[0]

    real = np.std([squared_mmd(normal(N, 8, shift, seed=s)) for s in range(200)])
    estimates = [kernel_distance_deviation(normal(N, 8, shift, seed=s), reference[:N]) for s in range(20)]
    assert np.mean(estimates) == pytest.approx(real, rel=0.3)
    larger = kernel_distance_deviation(normal(4 * N, 8, shift), reference[:N], at_most=N)
    assert larger == pytest.approx(np.mean(estimates) / 2, rel=0.4), "scaled where not all are used"


def test_the_deviation_of_kernel_distances_is_that_of_naive_resampling():
    """The same draws one by one: pairs of different images within, all pairs across."""
    a, b, N = normal(12, 3, 1.0, seed=1), normal(9, 3, seed=2), 12
    generator = torch.Generator().manual_seed(0)
    x, y = (features[torch.randperm(len(features), generator=generator)] for features in (a, b))
    draws = torch.randint(N, (50, N), generator=generator)
    values = []
    for draw in draws:
        drawn = x[draw]
        within, across = ((drawn @ other.T / 3 + 1) ** 3 for other in (drawn, y))
        differ = draw[:, None] != draw[None, :]
        values.append(within[differ].mean() - 2 * across.mean())
    assert kernel_distance_deviation(a, b) == pytest.approx(float(torch.stack(values).std()), rel=1e-9)


def mind(a, b, num_directions=1000):
    return monge_distance(a, b, num_directions)["value"]


def test_mind_in_one_dimension_is_three_times_the_optimal_transport():
    """By the assignment problem, and of Gaussians: 3 ((mu_a - mu_b)^2 + (sigma_a - sigma_b)^2)."""
    from scipy.optimize import linear_sum_assignment

    a, b = normal(40, 1, seed=1), normal(40, 1, 0.5, 2.0, seed=2)
    costs = ((a - b.T) ** 2).numpy()
    assert mind(a, b, 3) == pytest.approx(3 * costs[linear_sum_assignment(costs)].mean(), rel=1e-9)
    assert mind(normal(200_000, 1, seed=1), normal(200_000, 1, 2.0, 3.0, seed=2), 1) == pytest.approx(3 * 8, rel=0.02)


def test_mind_of_a_shift_and_of_a_scale_have_closed_forms():
    """Means over directions of (u . v)^2 and of (1 - s)^2 (u . a)^2; the mean of (u . v)^2 is |v|^2 / d."""
    a, v = normal(300, 16), normal(1, 16, seed=5)
    assert mind(a, a) == 0
    assert mind(a, a + v, 20_000) == pytest.approx(3 * float(v.square().sum()), rel=0.05)
    expected = 3 * (1 - 0.25) ** 2 * float(a.square().sum(1).mean())
    assert mind(a, 0.25 * a, 20_000) == pytest.approx(expected, rel=0.05)
    assert mind(a, a + v) == pytest.approx(mind(a + v, a), rel=1e-12)
    assert mind(a, a[torch.randperm(300)] + v) == pytest.approx(mind(a, a + v), rel=1e-12), "order does not matter"


@pytest.mark.parametrize("most", [1, 130, 2**22])
def test_mind_is_its_definition_direction_by_direction(most, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_PROJECTIONS", most)
    a, b, counted = normal(60, 5, seed=1), normal(60, 5, 0.3, seed=2), []
    directions = torch.randn(7, 5, generator=torch.Generator().manual_seed(2020))
    distances = [
        float((((a @ u).sort().values - (b @ u).sort().values) ** 2).mean())
        for u in (directions / directions.norm(dim=1, keepdim=True)).double()
    ]
    interval = monge_distance(a, b, 7, replicates=4, on_directions=counted.append)
    assert interval["value"] == pytest.approx(15 * np.mean(distances), rel=1e-6)
    assert sum(counted) == 7
    draws = torch.randint(60, (4, 60), generator=torch.Generator().manual_seed(0))
    deviation = np.std([mind(a[draw], b, 7) for draw in draws], ddof=1)
    assert interval["high"] - interval["value"] == pytest.approx(1.96 * deviation, rel=1e-6)


def test_precision_and_recall_are_not_exchanged():
    """Generated images crowd one corner of the real ones: all are good, and little is covered."""
    real = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    generated = torch.linspace(0, 0.1, 101, dtype=torch.float64)[:, None]
    scores = manifold(generated, real)
    assert scores["precision"]["value"] == 1.0
    assert scores["recall"]["value"] < 0.15
    assert scores["coverage"]["value"] < 0.2
    assert manifold(real, generated)["precision"]["value"] < 0.15
    assert manifold(real, generated)["recall"]["value"] == 1.0


def test_equal_sets_are_covered():
    features = normal(50, 4)
    scores = manifold(features, features)
    assert (scores["precision"]["value"], scores["recall"]["value"], scores["coverage"]["value"]) == (1.0, 1.0, 1.0)
    assert scores["density"]["value"] >= 1


def test_density_and_coverage_by_hand():
    """Real at 0, 1, 2, 3 (k = 1: balls of radius 1); one generated at 0.5, one far away, one at 1."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    scores = manifold(torch.tensor([[0.5], [99.0], [1.0]]), real, k=1)
    assert scores["precision"]["value"] == pytest.approx(2 / 3)
    assert scores["density"]["value"] == pytest.approx((2 + 0 + 3) / 3)
    assert scores["coverage"]["value"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("max_distances", [1, 70, 2**22])
def test_progress_counts_every_row(max_distances, monkeypatch):
    monkeypatch.setattr(neighbours, "MAX_DISTANCES", max_distances)
    a, b, c = normal(30, 4), normal(20, 4, seed=1), normal(9, 4, seed=2)
    counts: list[int] = []
    manifold(a, b, on_rows=counts.append)
    assert sum(counts) == 2 * (30 + 20)
    counts.clear()
    memorisation(a, b, c, on_rows=counts.append)
    assert sum(counts) == 2 * 30 + 9
    counts.clear()
    kernel_distance(a, b, subsets=7, on_subset=lambda: counts.append(1))
    assert sum(counts) == 7


@pytest.mark.parametrize("max_distances", [1, 700, 2**22])
def test_precision_and_recall_are_those_of_torch_fidelity(max_distances, monkeypatch):
    from torch_fidelity.metric_prc import prc_features_to_metric

    monkeypatch.setattr(neighbours, "MAX_DISTANCES", max_distances)
    a, b = normal(80, 5, seed=1), 0.7 + normal(80, 5, seed=2)
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    scores = manifold(a, b)
    assert scores["precision"]["value"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert scores["recall"]["value"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0.05 < scores["precision"]["value"] < 0.95


def test_95_percent_intervals_cover_95_percent():
    """Of 100 draws of 100 images about 95 intervals hold the expected distance at that n."""
    reference = gaussian(torch.zeros(3), torch.eye(3))
    expected = np.mean(
        [frechet_distance(statistics(normal(100, 3, 1.0, seed=s)), reference) for s in range(2000, 2400)]
    )
    covered = 0
    for seed in range(100):
        features = normal(100, 3, 1.0, seed=seed)

        def score(indices, features=features):
            return frechet_distance(statistics(features[indices]), reference)

        interval = bootstrap_interval(score, 100, replicates=40, seed=seed)
        covered += interval["low"] <= expected <= interval["high"]
    assert 88 <= covered <= 100


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: statistics(torch.zeros(1, 3)), "at least 2 images"),
        (lambda: statistics(torch.zeros(3)), r"\(N, d\)"),
        (lambda: statistics(torch.tensor([[1.0], [float("nan")]])), "not finite"),
        (lambda: frechet_distance(statistics(normal(9, 3)), statistics(normal(9, 4))), "3 and 4 features"),
        (lambda: Statistics(2, torch.zeros(2).double(), torch.zeros(3, 3).double()), r"cov \(d, d\)"),
        (lambda: Statistics(2, torch.zeros(2), torch.zeros(2, 2)), "float64"),
        (lambda: Statistics(2, torch.tensor(0.0).double(), torch.zeros(1, 1).double()), r"cov \(d, d\)"),
        (lambda: inception_score(torch.zeros(5, 3)), "splits"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 3), subset_size=6), "2 to 5 images"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 4)), r"\(N, 3\)"),
        (lambda: manifold(normal(3, 2), normal(9, 2)), "more than 3"),
        (lambda: monge_distance(normal(3, 2), normal(9, 2)), "equally many images in both sets, not 3 and 9"),
        (lambda: monge_distance(normal(9, 2), normal(9, 3)), r"\(N, 2\)"),
        (lambda: extrapolated_frechet_distance(normal(5, 2), statistics(normal(9, 2))), "at least 20"),
        (lambda: bootstrap_interval(lambda i: 0.0, 5, replicates=1), "at least 2"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_deviation_of_few_images_is_a_number(count):
    """A draw of one image over and over has no pair."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(count, 4, generator=generator), torch.randn(9, 4, generator=generator)
    assert math.isfinite(kernel_distance_deviation(a, b, 50))


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (1, 100), (99, 100), (1000, 1000)])
def test_the_interval_of_a_share_is_that_of_wilson(hits, count):
    from scipy.stats import binomtest

    interval = mean_interval(torch.arange(count) < hits)
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert interval["value"] == hits / count
    assert (interval["low"], interval["high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert 0 <= interval["low"] < interval["high"] <= 1

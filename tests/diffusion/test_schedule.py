"""Laws of the noise schedules, and of the timesteps samplers visit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, sampling_timesteps


def test_linear_betas_of_the_paper():
    beta = linear_schedule(1000).beta
    assert beta.dtype == torch.float64
    torch.testing.assert_close(beta[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))
    torch.testing.assert_close(beta.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))


@pytest.mark.parametrize(("T", "end", "gone"), [(500, 0.0797, 0.0), (1000, 0.0064, 0.175), (2000, 4e-5, 0.42)])
def test_fixed_range_depends_on_T(T, end, gone):
    """A short chain ends before the image is gone, a long one wastes its end."""
    alpha_bar = linear_schedule(T, rescale_betas=False).alpha_bar
    assert float(alpha_bar[-1].sqrt()) == pytest.approx(end, rel=0.05)
    assert float((alpha_bar < 1e-3).double().mean()) == pytest.approx(gone, abs=0.005)


@pytest.mark.parametrize("T", [500, 2000])
def test_rescaled_chains_are_nearly_one_process(T):
    """alpha_bar at equal t/T agrees with that of T = 1000 up to the resolution of the chain."""
    reference, other = linear_schedule(1000).alpha_bar, linear_schedule(T).alpha_bar
    at = torch.arange(1, 11) * T // 10 - 1
    torch.testing.assert_close(other[at].log(), reference[torch.arange(1, 11) * 100 - 1].log(), rtol=0.02, atol=0.001)
    assert float(other[-1].sqrt()) == pytest.approx(0.0064, rel=0.05)


def test_both_conventions_are_the_same_at_1000():
    assert torch.equal(linear_schedule(1000, True).beta, linear_schedule(1000, False).beta)


def test_cosine_is_its_formula_where_not_clipped():
    T = 1000
    time = torch.arange(1, T + 1, dtype=torch.float64) / T
    f = lambda u: torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2  # noqa: E731
    expected = f(time) / f(torch.zeros(1, dtype=torch.float64))
    schedule = cosine_schedule(T)
    torch.testing.assert_close(schedule.alpha_bar[:-10], expected[:-10], rtol=1e-9, atol=0)
    assert float(schedule.beta.max()) == 0.999


@pytest.mark.parametrize(
    "schedule",
    [linear_schedule(T, r) for T in (21, 500, 10_000) for r in (True, False)]
    + [linear_schedule(2, False), cosine_schedule(2), cosine_schedule(10_000)],
)
def test_alpha_bar_falls_strictly_inside_0_1(schedule):
    alpha_bar = schedule.alpha_bar
    assert bool((alpha_bar.diff() < 0).all())
    assert 0 < float(alpha_bar[-1]) < float(alpha_bar[0]) < 1
    assert bool((schedule.snr.diff() < 0).all())
    assert schedule.alpha_bar_at(-1) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: linear_schedule(1), "from 2 to 10000"),
        (lambda: linear_schedule(10_001), "from 2 to 10000"),
        (lambda: linear_schedule(20), "--diffusion.no-rescale-betas"),
        (lambda: cosine_schedule(0), "from 2 to 10000"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.0], dtype=torch.float64)), "lie in"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 0.2])), "float64"),
    ],
)
def test_impossible_chains_are_refused_by_name(make, words):
    with pytest.raises(InputError, match=words):
        make()


@given(st.data(), st.integers(2, 3000), st.sampled_from(["uniform", "quadratic", "logsnr", "karras"]))
def test_timesteps_are_distinct_and_start_at_the_noise(data, T, spacing):
    num_steps = data.draw(st.integers(1, min(T, 60) if spacing in ("logsnr", "karras") else T))
    timesteps = sampling_timesteps(cosine_schedule(T), num_steps, spacing)
    assert len(timesteps) == num_steps
    assert timesteps[0] == T - 1
    assert timesteps[-1] >= 0
    assert all(t > s for t, s in itertools.pairwise(timesteps))


def test_timesteps_by_hand():
    schedule = linear_schedule(1000)
    assert sampling_timesteps(cosine_schedule(10), 10) == list(range(9, -1, -1))
    assert sampling_timesteps(schedule, 4) == [999, 749, 499, 249]
    assert sampling_timesteps(schedule, 5, "quadratic") == [999, 639, 359, 159, 39]
    assert sampling_timesteps(schedule, 4, "leading") == [750, 500, 250, 0]
    assert sampling_timesteps(cosine_schedule(10), 4, "leading") == [7, 5, 2, 0]
    for spacing in ("uniform", "leading", "quadratic", "logsnr", "karras"):
        assert sampling_timesteps(schedule, 1000, spacing) == list(range(999, -1, -1))


def test_logsnr_spacing_is_even_where_timesteps_are_dense():
    schedule = linear_schedule(10_000)
    timesteps = sampling_timesteps(schedule, 20, "logsnr")
    assert (timesteps[0], timesteps[-1]) == (9999, 0)
    gaps = schedule.snr[timesteps].log().diff()
    assert float(gaps[:-3].std() / gaps.mean()) < 0.03


@pytest.mark.parametrize("schedule", [linear_schedule(10_000), cosine_schedule(10_000)])
def test_karras_spacing_follows_the_paper_as_far_as_there_are_timesteps(schedule):
    """Equation 5 of Karras et al. 2022 with rho = 7; a chain that ends in pure noise goes there in its first step."""
    timesteps = sampling_timesteps(schedule, 18, "karras")
    assert (timesteps[0], timesteps[-1]) == (9999, 0)
    sigma = schedule.snr.numpy() ** -0.5
    lowest, highest = sigma[0], min(sigma[-1], np.exp(5.1))
    ramp = np.arange(18) / 17
    wanted = (highest ** (1 / 7) + ramp * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[timesteps][1:10], wanted[1:10], rtol=0.03)


@pytest.mark.parametrize(("num_steps", "spacing"), [(0, "uniform"), (11, "uniform"), (11, "logsnr"), (5, "cubic")])
def test_impossible_timesteps_are_refused(num_steps, spacing):
    with pytest.raises(InputError):
        sampling_timesteps(cosine_schedule(10), num_steps, spacing)

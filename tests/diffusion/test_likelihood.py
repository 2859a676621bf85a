"""The variational bound: closed forms where the network is perfect, and never below the truth on Gaussian data."""

import math

import pytest
import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import to_float, to_uint8
from ddpm_lab.diffusion import likelihood
from ddpm_lab.diffusion.likelihood import strata, variational_bound
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.diffusion.unet import UNet
from ddpm_lab.models.trained import load, with_timesteps
from ddpm_lab.sampling.generation import generate

DEVIATION = 0.3


@pytest.fixture
def images():
    return to_uint8(torch.randn(64, 1, 8, 8) * DEVIATION)


def gaussian_model(schedule):
    """Predicts E[x_0 | x_t] of normal pixels."""

    def model(x_t, t):
        alpha_bar = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        return DEVIATION**2 * alpha_bar.sqrt() / (alpha_bar * DEVIATION**2 + 1 - alpha_bar) * x_t

    return model


def true_bits(images):
    """-log2 of the probability of each pixel's level, on average."""
    x = to_float(images).double()
    cumulative = torch.special.ndtr
    mass = cumulative((x + 1 / 255) / DEVIATION) - cumulative((x - 1 / 255) / DEVIATION)
    return float(-mass.log2().mean())


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("T", [50, 400])
def test_the_sum_is_that_of_normal_data_in_closed_form(images, variance, T):
    schedule = linear_schedule(T)
    bound = variational_bound(
        gaussian_model(schedule), schedule, images, prediction="x_0", variance=variance, num_drawn=T
    )
    a_t, a_s, beta = schedule.alpha_bar[1:], schedule.alpha_bar[:-1], schedule.beta[1:]
    tilde = (1 - a_s) / (1 - a_t) * beta
    weight = a_s.sqrt() * beta / (1 - a_t)  # of x_0 in the posterior's mean
    uncertain = DEVIATION**2 * (1 - a_t) / (a_t * DEVIATION**2 + 1 - a_t)  # variance of x_0 given x_t
    sigma_squared = beta if variance == "beta" else tilde
    ratio = tilde / sigma_squared
    nats = weight**2 * uncertain / sigma_squared / 2 + (ratio - 1 - ratio.log()) / 2
    expected = float(nats.sum()) / math.log(2)
    assert abs(bound.value - bound.decoder - bound.prior - expected) < 4 * bound.standard_error
    assert bound.standard_error < 0.02 * expected
    assert bound.value > true_bits(images)


def test_a_longer_chain_tightens_the_bound(images):
    bounds = [
        variational_bound(
            gaussian_model(schedule), schedule, images, prediction="x_0", variance="beta_tilde", num_drawn=200
        )
        for schedule in (linear_schedule(50), linear_schedule(200), linear_schedule(1000))
    ]
    assert bounds[0].value > bounds[1].value + 0.5 > bounds[2].value + 0.7


def test_a_network_that_knows_the_image_pays_for_variances_alone(images):
    schedule = linear_schedule(100)
    x_0 = to_float(images)

    def knows(x_t, t):
        return x_0

    small, large = (
        variational_bound(knows, schedule, images, prediction="x_0", variance=variance, num_drawn=99)
        for variance in ("beta_tilde", "beta")
    )
    assert small.value == pytest.approx(small.prior + small.decoder, abs=1e-9)
    tilde = (1 - schedule.alpha_bar[:-1]) / (1 - schedule.alpha_bar[1:]) * schedule.beta[1:]
    ratio = tilde / schedule.beta[1:]
    expected = float(((ratio - 1 - ratio.log()) / 2).sum()) / math.log(2)
    assert large.value - small.value == pytest.approx(expected, rel=1e-9)
    alpha_bar = schedule.alpha_bar[-1]
    prior = (alpha_bar * x_0.double().square() - alpha_bar - (1 - alpha_bar).log()) / 2 / math.log(2)
    assert large.prior == pytest.approx(float(prior.mean()), rel=1e-9)


def test_the_decoder_is_a_normal_density_over_levels():
    schedule = linear_schedule(100)
    levels = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).view(5, 1, 1, 1)
    guess = to_float(levels) * 0.99 + 0.003

    def off(x_t, t):
        return guess.to(x_t.dtype)

    a_1, a_2 = schedule.alpha_bar[:2].tolist()
    sigma = ((1 - a_1) / (1 - a_2) * (1 - a_2 / a_1)) ** 0.5
    normal = torch.distributions.Normal(guess.double(), sigma)
    x = to_float(levels).double()
    upper = torch.where(levels == 255, 1.0, normal.cdf(x + 1 / 255))
    lower = torch.where(levels == 0, 0.0, normal.cdf(x - 1 / 255))
    bound = variational_bound(off, schedule, levels, prediction="x_0", num_drawn=1)
    assert bound.decoder == pytest.approx(float(-(upper - lower).log2().mean()), rel=1e-6)


@pytest.mark.parametrize("error", [0.05, 0.3])
def test_the_decoder_has_no_ceiling(error):
    schedule = linear_schedule(5000)  # its first step back is narrow: an error is many deviations
    levels = torch.full((2, 1, 2, 2), 100, dtype=torch.uint8)

    def off(x_t, t):
        return to_float(levels).double() + error

    a_1, a_2 = schedule.alpha_bar[:2].tolist()
    sigma = ((1 - a_1) / (1 - a_2) * (1 - a_2 / a_1)) ** 0.5
    away = (error - 1 / 255) / sigma  # deviations to the near edge of the level
    decoder = variational_bound(off, schedule, levels, prediction="x_0", num_drawn=1).decoder
    tail = (away**2 / 2 + math.log(away * (2 * math.pi) ** 0.5)) / math.log(2)  # -log2 of the normal tail beyond
    assert decoder == pytest.approx(tail, rel=0.01)


def test_few_timesteps_estimate_the_whole_sum(images):
    schedule = linear_schedule(200)
    model = gaussian_model(schedule)
    whole = variational_bound(model, schedule, images, prediction="x_0", num_drawn=500)
    assert whole.num_drawn == 199
    for seed in (1, 2):
        part = variational_bound(model, schedule, images, prediction="x_0", num_drawn=20, seed=seed)
        assert abs(part.value - whole.value) < 4 * part.standard_error
        assert part.standard_error < 0.5
    again = variational_bound(model, schedule, images, prediction="x_0", num_drawn=20, seed=2, batch_size=64)
    assert again == part


@pytest.mark.parametrize("num_terms", [1, 5, 49, 199, 1999, 9999])
@pytest.mark.parametrize("parts", [1, 3, 4, 20, 50, 199, 1999])
def test_strata_hold_each_term_once(num_terms, parts):
    parts = min(parts, num_terms)
    edges = strata(num_terms, parts)
    assert (len(edges), int(edges[0]), int(edges[-1])) == (parts + 1, 0, num_terms)
    widths = edges[1:] - edges[:-1]
    assert int(widths.min()) >= 1
    if parts < num_terms:
        assert set(widths[: min(12, parts // 4)].tolist()) <= {1}
        assert int(widths[-1]) == int(widths.max())


def test_costs_that_lie_in_the_first_timesteps_are_not_missed(images, monkeypatch):
    """Costs that fall as 1/t, of which half of the sum over T = 2000 lies in the first 25: the exact sum to 1 %."""

    def costs(model, schedule, x_0, t, *rest):
        return 1 / t.double()

    monkeypatch.setattr(likelihood, "_step_costs", costs)
    schedule = linear_schedule(2000)
    bound = variational_bound(gaussian_model(schedule), schedule, images, prediction="x_0", num_drawn=50)
    exact = float((1 / torch.arange(1, 2000).double()).sum())
    estimate = bound.value - bound.decoder - bound.prior
    assert abs(estimate - exact) < 4 * bound.standard_error
    assert bound.standard_error < 0.01 * exact


def test_impossible_bounds_are_refused(images):
    schedule = linear_schedule(50)
    model = gaussian_model(schedule)
    for settings in ({"num_drawn": 0}, {"variance": "learned"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            variational_bound(model, schedule, images, **settings)
    with pytest.raises(InputError, match="at least 2 images"):
        variational_bound(model, schedule, images[:1])


def test_a_network_gets_the_same_noise_level_on_another_chain(tiny_run):
    trained = load(tiny_run, device="cpu")
    shorter = with_timesteps(trained, 500)
    x_t = torch.randn(2, 1, 8, 8)
    expected = trained.model(x_t, torch.tensor([1, 999]))
    torch.testing.assert_close(shorter.model(x_t, torch.tensor([0, 499])), expected)
    assert (trained.model.num_timesteps, shorter.schedule.num_timesteps) == (1000, 500)
    for t in (0, 100, 499):
        level = float(trained.schedule.snr[2 * t + 1] / shorter.schedule.snr[t])
        assert level == pytest.approx(1, abs=0.08) or t == 0
    longer = with_timesteps(trained, 2000)
    a, b = (torch.cat(list(generate(m, 4, SamplingConfig(num_steps=20)))).int() for m in (trained, longer))
    assert float((a - b).abs().float().mean()) < 8
    fixed = load(tiny_run, device="cpu")
    object.__setattr__(fixed.config.diffusion, "rescale_betas", False)
    with pytest.raises(InputError, match="another process"):
        with_timesteps(fixed, 500)


def test_a_conditional_network_is_bounded_with_the_labels_of_the_images(images):
    model = UNet(1, 32, (1, 1), num_blocks=1, attention_levels=(), norm_groups=8, num_classes=10).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    labels, schedule = torch.full((len(images),), 3), linear_schedule(50)
    bounds = [
        variational_bound(tested, schedule, images, prediction="x_0", labels=y, num_drawn=4, batch_size=16).value
        for tested, y in (
            (model, labels),
            (lambda x_t, t: model(x_t, t, torch.full_like(t, 3)), None),
            (model, None),
        )
    ]
    assert bounds[0] == bounds[1]
    assert bounds[0] != bounds[2]

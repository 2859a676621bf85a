"""Laws of the forward process, its posterior, the meanings of a prediction, and the loss."""

import pytest
import torch

from ddpm_lab.core.config import EDM
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import (
    denoising_losses,
    diffusion_loss,
    input_scale,
    min_snr_weights,
    output_coefficients,
    posterior,
    predict_x_0_eps,
    q_sample,
    q_step,
    timestep_probabilities,
)
from ddpm_lab.diffusion.schedule import cosine_schedule, linear_schedule

SCHEDULES = [linear_schedule(50), linear_schedule(50, False), cosine_schedule(50)]
ONE, ZERO = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

PREDICTIONS = ["eps", "x_0", "v", EDM(0.5)]


def at(t):
    return torch.tensor([t])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_jump_is_as_many_single_steps(schedule):
    """Both are linear in (image, noise), so gain and variance of the chain follow from those of its steps, exactly."""
    gain, variance = 1.0, 0.0
    for t in range(schedule.num_timesteps):
        step_gain, step_noise = (float(q_step(schedule, x, at(t), e)) for x, e in ((ONE, ZERO), (ZERO, ONE)))
        gain, variance = gain * step_gain, step_gain**2 * variance + step_noise**2
        assert float(q_sample(schedule, ONE, at(t), ZERO)) == pytest.approx(gain, rel=1e-12)
        assert float(q_sample(schedule, ZERO, at(t), ONE)) ** 2 == pytest.approx(variance, rel=1e-12)


def test_one_jump_and_single_steps_agree_on_samples():
    schedule = linear_schedule(50, False)
    x_0 = torch.full((200_000, 1, 1, 1), 0.7)
    x_t = x_0
    for t in range(50):
        x_t = q_step(schedule, x_t, torch.full((len(x_0),), t), torch.randn_like(x_0))
    jumped = q_sample(schedule, x_0, torch.full((len(x_0),), 49), torch.randn_like(x_0))
    assert float(x_t.mean()) == pytest.approx(float(jumped.mean()), abs=0.01)
    assert float(x_t.var()) == pytest.approx(float(jumped.var()), rel=0.01)


def test_each_image_has_its_own_timestep():
    schedule, x_0, eps = linear_schedule(), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 500, 999])
    together = q_sample(schedule, x_0, t, eps)
    alone = torch.cat([q_sample(schedule, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(49, 48), (49, 10), (7, 0), (1, 0)])
def test_posterior_is_bayes_rule(schedule, t, s):
    """q(x_s | x_t, x_0) is the product of q(x_t | x_s) and q(x_s | x_0), by their precisions."""
    ab_t, ab_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    alpha = ab_t / ab_s
    x_0, x_t = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    precision = alpha / (1 - alpha) + 1 / (1 - ab_s)
    expected = (alpha**0.5 * x_t / (1 - alpha) + ab_s**0.5 * x_0 / (1 - ab_s)) / precision
    mean, variance = posterior(x_0, x_t, ab_t, ab_s)
    torch.testing.assert_close(mean, expected)
    assert variance == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_of_the_last_step_is_the_image():
    x_0, x_t = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    mean, variance = posterior(x_0, x_t, linear_schedule().alpha_bar_at(0), 1.0)
    torch.testing.assert_close(mean, x_0)
    assert variance == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_predictions_round_trip(prediction, t):
    """From (x_0, eps) to what the network would say, and back."""
    schedule = linear_schedule()
    alpha_bar = schedule.alpha_bar_at(t)
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, torch.full((3,), t), eps)
    a, b = output_coefficients(prediction, alpha_bar)
    output = a * x_0 + b * eps
    x_0_hat, eps_hat = predict_x_0_eps(prediction, output, x_t, alpha_bar)
    torch.testing.assert_close(x_0_hat, x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_hat, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_keeps_image_and_noise_consistent(prediction):
    alpha_bar = 0.3
    output, x_t = 3 * torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    x_0_hat, eps_hat = predict_x_0_eps(prediction, output, x_t, alpha_bar, clip_x_0=True)
    assert float(x_0_hat.abs().max()) == 1.0
    torch.testing.assert_close(alpha_bar**0.5 * x_0_hat + (1 - alpha_bar) ** 0.5 * eps_hat, x_t)


def test_v_is_its_definition():
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    angle = torch.tensor(0.4, dtype=torch.float64)  # alpha = cos, sigma = sin of one angle; v = d x / d angle
    a, b = output_coefficients("v", angle.cos() ** 2)
    torch.testing.assert_close(a * x_0 + b * eps, angle.cos() * eps - angle.sin() * x_0)


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_the_preconditioning_of_karras(t, sigma_data):
    """Their D = c_skip x + c_out F(c_in x), with x = x_0 + sigma n, is our prediction of x_0 (table 1 of the paper)."""
    schedule = linear_schedule()
    alpha_bar = schedule.alpha_bar_at(t)
    sigma, total = ((1 - alpha_bar) / alpha_bar) ** 0.5, sigma_data**2 + (1 - alpha_bar) / alpha_bar
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total**0.5, 1 / total**0.5
    x_t, F = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x = x_t / alpha_bar**0.5
    x_0_hat, eps_hat = predict_x_0_eps(EDM(sigma_data), F, x_t, alpha_bar)
    torch.testing.assert_close(x_0_hat, c_skip * x + c_out * F)
    torch.testing.assert_close(x_0_hat + sigma * eps_hat, x)
    torch.testing.assert_close(input_scale(EDM(sigma_data), schedule)[t] * x_t, c_in * x)
    if sigma_data == 1:
        torch.testing.assert_close(x_0_hat, predict_x_0_eps("v", -F, x_t, alpha_bar)[0])


def test_edm_has_variance_1_at_every_level():
    """Of what the network sees and of what it is to say, for images of deviation sigma_data."""
    schedule = linear_schedule()
    a, b = output_coefficients(EDM(0.3), schedule.alpha_bar)
    torch.testing.assert_close(a**2 * 0.3**2 + b**2, torch.ones_like(a))
    variance = schedule.alpha_bar * 0.3**2 + 1 - schedule.alpha_bar
    torch.testing.assert_close(input_scale(EDM(0.3), schedule) ** 2 * variance, torch.ones_like(a))
    assert input_scale("eps", schedule) is None
    with pytest.raises(InputError, match="above 0"):
        EDM(0.0)


@pytest.mark.parametrize("schedule", [linear_schedule(), linear_schedule(500, False), cosine_schedule(200)])
def test_lognormal_timesteps_have_the_given_moments(schedule):
    """ln sigma has nearly the mean and deviation asked for where the chain holds them; every timestep is drawn."""
    probabilities = timestep_probabilities(schedule, -1.2, 1.2, uniform_share=0.0)
    log_sigma = -schedule.snr.log() / 2
    mean = float(probabilities @ log_sigma)
    assert float(probabilities.sum()) == pytest.approx(1)
    assert mean == pytest.approx(-1.2, abs=0.02)
    assert float((probabilities @ (log_sigma - mean).square()).sqrt()) == pytest.approx(1.2, abs=0.03)
    shared = timestep_probabilities(schedule, -1.2, 1.2)
    torch.testing.assert_close(shared, 0.9 * probabilities + 0.1 / schedule.num_timesteps)
    assert float(timestep_probabilities(schedule, -1.2, 1.2, 1.0).std()) == pytest.approx(0, abs=1e-12)


def test_min_snr_weighs_every_prediction_alike():
    """One error in x_0 costs min(SNR, 5) times its square, whatever the network predicts; the paper's for eps and v."""
    schedule = linear_schedule()
    alpha_bar, snr = schedule.alpha_bar, schedule.snr
    x_0, x_0_hat, eps = torch.randn(3, 1000, dtype=torch.float64)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    eps_hat = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
    expected = snr.clamp(max=5) * (x_0_hat - x_0).square()
    for prediction in PREDICTIONS:
        a, b = output_coefficients(prediction, alpha_bar)
        error = (a * x_0_hat + b * eps_hat) - (a * x_0 + b * eps)
        torch.testing.assert_close(min_snr_weights(prediction, schedule) * error.square(), expected)
    torch.testing.assert_close(min_snr_weights("eps", schedule), snr.clamp(max=5) / snr)
    torch.testing.assert_close(min_snr_weights("v", schedule), snr.clamp(max=5) / (snr + 1))


@pytest.mark.parametrize("schedule", [linear_schedule(10_000), cosine_schedule(10_000)])
def test_float32_targets_have_float64_coefficients(schedule):
    """At t = 0 of a long chain 1 - alpha_bar has few digits left in float32: it must be taken before the cast."""
    x_0, eps, t = torch.rand(8, 1, 2, 2), torch.zeros(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64)
    losses = denoising_losses(lambda x, t: torch.zeros_like(x), schedule, x_0, t, eps, "v")
    expected = (1 - schedule.alpha_bar[0]) * x_0.double().square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


def test_loss_is_the_mean_squared_error_with_the_noise():
    schedule, x_0, eps = linear_schedule(), torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    assert float(denoising_losses(lambda x, t: eps, schedule, x_0, t, eps).sum()) == 0
    losses = denoising_losses(lambda x, t: torch.zeros_like(x), schedule, x_0, t, eps)
    torch.testing.assert_close(losses, eps.square().mean((1, 2, 3)))


def test_loss_draws_every_timestep_from_its_generator():
    schedule, seen = linear_schedule(50), []

    def model(x_t, t):
        seen.append(t)
        return torch.zeros_like(x_t)

    for _ in range(2):
        diffusion_loss(model, schedule, torch.zeros(2000, 1, 1, 1), generator=torch.Generator().manual_seed(3))
    assert torch.equal(*seen)
    assert set(seen[0].tolist()) == set(range(50))


@pytest.mark.parametrize(
    ("x_0", "t", "eps", "words"),
    [
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 50]), torch.zeros(2, 1, 4, 4), r"in \[0, 50\)"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([-1, 0]), torch.zeros(2, 1, 4, 4), r"in \[0, 50\)"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0.0, 1.0]), torch.zeros(2, 1, 4, 4), "int64"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0]), torch.zeros(2, 1, 4, 4), r"\(2,\) int64"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), torch.zeros(2, 1, 4, 5), "must be equal"),
    ],
)
def test_q_sample_refuses_what_does_not_fit(x_0, t, eps, words):
    with pytest.raises(InputError, match=words):
        q_sample(linear_schedule(50), x_0, t, eps)


def test_unknown_predictions_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="eps, x_0, v or EDM"):
        predict_x_0_eps("noise", x, x, 0.5)
    with pytest.raises(InputError, match="must be equal"):
        denoising_losses(lambda x, t: x[:, :, :1], linear_schedule(50), x, torch.tensor([0]), x)

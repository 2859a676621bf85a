"""Laws of the samplers: perfect denoisers, Gaussian data, equivalences, Algorithm 2, and agreement with diffusers."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddpm_lab.core.config import EDM
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.process import output_coefficients
from ddpm_lab.diffusion.samplers import ddim_sample, ddim_steps, ddpm_sample, ddpm_steps
from ddpm_lab.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, sampling_timesteps
from ddpm_lab.diffusion.solvers import (
    STEPS,
    dpmpp_sample,
    dpmpp_steps,
    heun_sample,
    heun_steps,
    ipndm_sample,
    ipndm_steps,
    unipc_sample,
    unipc_steps,
)

SAMPLERS = {
    "ddpm beta": lambda *a, **k: ddpm_sample(*a, variance="beta", **k),
    "ddpm beta_tilde": lambda *a, **k: ddpm_sample(*a, variance="beta_tilde", **k),
    "ddim eta=0": ddim_sample,
    "ddim eta=0.5": lambda *a, **k: ddim_sample(*a, eta=0.5, **k),
    "ddim eta=1": lambda *a, **k: ddim_sample(*a, eta=1.0, **k),
}
SOLVERS = {
    "dpmpp 2M": dpmpp_steps,
    "dpmpp 2S": lambda *a, **k: dpmpp_steps(*a, singlestep=True, **k),
    "heun": heun_steps,
    "ipndm": ipndm_steps,
    "unipc": unipc_steps,
}


def fixed_noise(shape, seed=1):
    """Noise of step i as a pure function of i."""
    return lambda i: torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)


def knowing_model(schedule, x_0, prediction):
    """A perfect denoiser: it knows the image, and says the noise that must be in x_t."""

    def model(x_t, t):
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        a, b = output_coefficients(prediction, alpha_bar)
        return a * x_0 + b * eps

    return model


@pytest.mark.filterwarnings("ignore:variance beta")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", EDM(0.5)])
@pytest.mark.parametrize("num_steps", [1, 3, 50])
@pytest.mark.parametrize("clip", [True, False])
def test_a_perfect_denoiser_brings_back_the_image(name, prediction, num_steps, clip):
    schedule = linear_schedule(50, False)
    x_0 = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    model = knowing_model(schedule, x_0, prediction)
    result = SAMPLERS[name](model, schedule, x_T, num_steps, clip_x_0=clip, prediction=prediction)
    torch.testing.assert_close(result, x_0, rtol=1e-7, atol=1e-7)


def gaussian_model(schedule, mean, deviation):
    """The exact eps for images whose pixels are N(mean, deviation^2)."""

    def model(x_t, t):
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (x_t - ab.sqrt() * mean) / (ab * deviation**2 + 1 - ab)

    return model


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_data_is_sampled_with_its_mean_and_deviation(name):
    """With all steps every sampler is right up to the resolution of the chain and the error of 10,000 samples."""
    schedule, mean, deviation = linear_schedule(1000), 0.3, 0.2
    x_T = torch.randn(10_000, 1, 1, 1, dtype=torch.float64)
    x_0 = SAMPLERS[name](gaussian_model(schedule, mean, deviation), schedule, x_T, clip_x_0=False)
    assert float(x_0.mean()) == pytest.approx(mean, abs=0.006)
    assert float(x_0.std()) == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("prediction", ["eps", "x_0"])
def test_heun_passes_through_pure_noise(prediction):
    """The first step, even in log SNR, leads through a stretch where 1e-21 of the image's variance is left."""
    schedule, mean, deviation = linear_schedule(4000, rescale_betas=False), 0.3, 0.2
    exact = gaussian_model(schedule, mean, deviation)

    def model(x_t, t):
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        eps = exact(x_t, t)
        return eps if prediction == "eps" else (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()

    x_T = torch.randn(2_000, 1, 1, 1, dtype=torch.float64)
    x_0 = heun_sample(model, schedule, x_T, 20, prediction=prediction)
    assert float(x_0.mean()) == pytest.approx(mean, abs=0.03)
    assert float(x_0.std()) == pytest.approx(deviation, rel=0.1)


def test_ddim_converges_at_first_order():
    """Against the exact solution of the probability-flow ODE, twice the steps leave half the error."""
    schedule, mean, deviation = cosine_schedule(10_000), 0.3, 0.5
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    ab = schedule.alpha_bar_at(schedule.num_timesteps - 1)
    x_T = ab**0.5 * mean + (ab * deviation**2 + 1 - ab) ** 0.5 * z
    errors = [
        float((ddim_sample(gaussian_model(schedule, mean, deviation), schedule, x_T, n, clip_x_0=False) - mean
               - deviation * z).abs().max())
        for n in (25, 50, 100, 200)
    ]  # fmt: skip
    orders = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.15), (errors, orders)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("num_steps", [1, 3, 25])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
def test_solvers_with_a_perfect_denoiser_bring_back_the_image(name, prediction, num_steps, spacing):
    schedule = linear_schedule(50, False)
    x_0 = torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1
    x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    model = knowing_model(schedule, x_0, prediction)
    steps = list(SOLVERS[name](model, schedule, x_T, num_steps, spacing=spacing, prediction=prediction))
    assert len(steps) == num_steps
    torch.testing.assert_close(steps[-1].x_s, x_0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_converge_at_second_order(name):
    """Against the exact solution of the probability-flow ODE at the last timestep; twice the steps, a quarter."""
    schedule, mean, deviation = linear_schedule(10_000), 0.3, 0.5
    model = gaussian_model(schedule, mean, deviation)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)

    def exact(t):
        ab = schedule.alpha_bar_at(t)
        return ab**0.5 * mean + (ab * deviation**2 + 1 - ab) ** 0.5 * z

    errors = []
    for n in (20, 40, 80):
        steps = list(SOLVERS[name](model, schedule, exact(9999), n, clip_x_0=False))
        assert steps[-1].t < 40
        errors.append(float((steps[-1].x_t - exact(steps[-1].t)).abs().max()))
    orders = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > 1.8, (errors, orders)


def even_chain(alpha_bar):
    """A chain with given alpha_bar, (T,) float64, of which samplers take every timestep."""
    return NoiseSchedule(1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]]))


def orders(errors):
    """The order of convergence that each halving of the step shows."""
    return [float(np.log2(a / b)) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_its_order_on_even_steps(order):
    """dX/dsigma = -c (2 - sigma)^4 X for X = x / alpha rests at the start, so the first, lower steps are exact."""
    X_T, errors = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1), []
    for n in (40, 80, 160):
        sigma = torch.linspace(0.1, 2, n, dtype=torch.float64)

        def model(x_t, t, sigma=sigma):
            at = sigma[t].view(-1, 1, 1, 1)
            return -0.1 * (2 - at) ** 4 * x_t * (1 + at**2).sqrt()

        schedule = even_chain(1 / (1 + sigma**2))
        *_, last = ipndm_steps(model, schedule, X_T / 5**0.5, n, spacing="uniform", order=order, clip_x_0=False)
        exact = X_T * float(np.exp(0.02 * 1.9**5))
        errors.append(float((last.x_t * 1.01**0.5 - exact).abs().max()))
    assert last.t == 0
    assert orders(errors)[-1] == pytest.approx(order, abs=0.15), (errors, orders(errors))


def test_unipc_is_of_fourth_order_on_even_steps():
    """Its corrector adds one to the three of the predictor. x_0_hat = psi x / alpha, with psi = 0 at the start."""
    x_T, errors = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1), []
    for n in (80, 160, 320):
        log_snr = torch.linspace(1.5, -1.5, n, dtype=torch.float64)
        alpha_bar = torch.sigmoid(2 * log_snr)

        def model(x_t, t, log_snr=log_snr, alpha_bar=alpha_bar):
            at = log_snr[t].view(-1, 1, 1, 1)
            return 0.025 * (at + 1.5) ** 4 * x_t / alpha_bar[t].sqrt().view(-1, 1, 1, 1)

        *_, step, _ = unipc_steps(model, even_chain(alpha_bar), x_T, n, clip_x_0=False, prediction="x_0")
        noise = (1 - alpha_bar).sqrt()  # step.x_t is the last state before the order falls
        exact = x_T * noise[step.t] / noise[-1] * (0.005 * (log_snr[step.t] + 1.5) ** 5).exp()
        errors.append(float((step.x_t - exact).abs().max()))
    assert orders(errors)[-1] == pytest.approx(4, abs=0.3), (errors, orders(errors))


@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
def test_ipndm_is_adams_bashforth_in_sigma(spacing):
    """By hand in NumPy, in the parametrisation of Karras et al.: D(X; sigma) of Gaussian data, dX = (X - D)/sigma."""
    schedule, mean, deviation = linear_schedule(1000), 0.3, 0.2
    x_T = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    steps = list(
        ipndm_steps(gaussian_model(schedule, mean, deviation), schedule, x_T, 9, spacing=spacing, clip_x_0=False)
    )
    alpha_bar = schedule.alpha_bar[[step.t for step in steps]].numpy()
    sigma = np.sqrt(1 / alpha_bar - 1)
    X, slopes = x_T.numpy().ravel() / np.sqrt(alpha_bar[0]), []
    weights = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -4 / 3, 23 / 12], 4: [-3 / 8, 37 / 24, -59 / 24, 55 / 24]}
    for i, step in enumerate(steps):
        np.testing.assert_allclose(step.x_t.numpy().ravel(), np.sqrt(alpha_bar[i]) * X, rtol=1e-9, atol=1e-9)
        denoised = (deviation**2 * X + sigma[i] ** 2 * mean) / (deviation**2 + sigma[i] ** 2)
        slopes = [*slopes[-3:], (X - denoised) / sigma[i]]
        if i < 8:
            X = X + (sigma[i + 1] - sigma[i]) * (np.array(weights[len(slopes)]) @ np.array(slopes))
    np.testing.assert_allclose(step.x_s.numpy().ravel(), denoised, rtol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 10, 25])
def test_every_state_of_unipc_is_that_of_diffusers(num_steps, clip):
    """Its UniPCMultistepScheduler of order 3, with final sigma zero, at the same timesteps."""
    schedule = linear_schedule(1000)
    theirs = UniPCMultistepScheduler(
        1000, solver_order=3, predict_x0=True, solver_type="bh2", lower_order_final=True, final_sigmas_type="zero",
        timestep_spacing="trailing",
    )  # fmt: skip
    ours_in(theirs, schedule).set_timesteps(num_steps)
    theirs.sigmas = torch.cat([schedule.snr[theirs.timesteps] ** -0.5, torch.zeros(1, dtype=torch.float64)])
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    steps = list(unipc_steps(odd_model, schedule, x, num_steps, spacing="uniform", clip_x_0=clip))
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    for step, t in zip(steps, theirs.timesteps, strict=True):
        x = theirs.step(clipped_noise(schedule, x, t) if clip else odd_model(x, t.expand(2)), t, x).prev_sample
        torch.testing.assert_close(step.x_s, x, rtol=1e-8, atol=1e-8)


def clipped_noise(schedule, x_t, t):
    """The noise that belongs to the clipped image of `odd_model`, for schedulers that do not clip."""
    alpha_bar = schedule.alpha_bar[t]
    x_0 = ((x_t - (1 - alpha_bar).sqrt() * odd_model(x_t, t.expand(2))) / alpha_bar.sqrt()).clamp(-1, 1)
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def test_first_steps_of_the_solvers_are_ddim():
    """With one step, and at the first step of the multistep solvers, nothing is known but one prediction."""
    schedule, x_T = linear_schedule(50), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for n in (1, 5):
        implicit, *others = (
            next(STEPS[name](odd_model, schedule, x_T, n, spacing="uniform"))
            for name in ("ddim", "dpmpp", "ipndm", "unipc")
        )
        for multi in others:
            torch.testing.assert_close(multi.x_s, implicit.x_s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        ipndm_sample(odd_model, schedule, x_T, 5, order=1, spacing="uniform"), ddim_sample(odd_model, schedule, x_T, 5)
    )
    torch.testing.assert_close(
        heun_sample(odd_model, schedule, x_T, 1, spacing="uniform"), ddim_sample(odd_model, schedule, x_T, 1)
    )
    torch.testing.assert_close(  # singlestep ends, and so with one step is, two steps of first order
        dpmpp_sample(odd_model, schedule, x_T, 1, singlestep=True, spacing="uniform"),
        ddim_sample(odd_model, schedule, x_T, 2),
    )


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("num_steps", "eta"), [(3, 0.0), (10, 0.0), (25, 0.0), (3, 1.0), (10, 1.0), (25, 1.0)])
def test_every_state_of_dpmpp_is_that_of_diffusers(num_steps, eta, clip):
    """Its DPMSolverMultistepScheduler of order 2, lower_order_final, final sigma zero, at the same timesteps."""
    schedule = linear_schedule(1000)
    theirs = DPMSolverMultistepScheduler(
        1000, solver_order=2, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_type="midpoint", lower_order_final=True,
        euler_at_final=True, final_sigmas_type="zero", timestep_spacing="trailing",
    )  # fmt: skip
    ours_in(theirs, schedule).set_timesteps(num_steps)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    z = torch.randn(num_steps, *x.shape, dtype=torch.float64)
    steps = list(
        dpmpp_steps(
            odd_model, schedule, x, num_steps, spacing="uniform", clip_x_0=clip, eta=eta, noise=lambda step: z[step]
        )
    )
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    theirs.sigmas = torch.tensor([*(((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()[theirs.timesteps]), 0.0])
    for step, t, noise in zip(steps, theirs.timesteps, z, strict=True):
        eps = clipped_noise(schedule, x, t) if clip else odd_model(x, t.expand(2))
        x = theirs.step(eps, t, x, variance_noise=noise if eta else None).prev_sample.double()
        within = 1e-4 if eta else 1e-5  # its coefficients of the noise are float32
        torch.testing.assert_close(step.x_s, x, rtol=within, atol=within)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_dpmpp_ends_in_the_distribution_of_the_data_whatever_eta(eta):
    """Gaussian data of deviation 0.5, and the network that is exact for it."""
    schedule = linear_schedule(1000)

    def exact(x_t, t):
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return x_t * (1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)

    x_T = torch.randn(4, 1, 100, 100, dtype=torch.float64)
    x_0 = dpmpp_sample(exact, schedule, x_T, 100, eta=eta, clip_x_0=False)
    assert float(x_0.std()) == pytest.approx(0.5, rel=0.02)
    assert float(x_0.mean()) == pytest.approx(0, abs=0.02)
    kept = float(torch.corrcoef(torch.stack([x_0.flatten(), x_T.flatten()]))[0, 1])
    assert kept > 0.99 if eta == 0 else kept < 0.5  # noise on the way makes the image forget where it began


def test_dpmpp_refuses_an_eta_that_means_nothing():
    for eta, singlestep in ((-0.1, False), (1.1, False), (float("nan"), False), (0.5, True)):
        with pytest.raises(InputError, match="eta must be from 0 to 1"):
            next(
                dpmpp_steps(odd_model, linear_schedule(50), torch.zeros(1, 1, 2, 2), 5, eta=eta, singlestep=singlestep)
            )


def test_even_in_log_snr_spends_one_step_on_pure_noise():
    """The cosine chain of T = 1000 ends at log SNR -20; even spacing down to there would spend half the steps on it."""
    schedule = cosine_schedule(1000)
    log_snr = [float(schedule.snr[t].log()) for t in sampling_timesteps(schedule, 20, "logsnr")]
    assert log_snr[0] < -19
    assert log_snr[1] > -10.3
    assert max(a - b for a, b in itertools.pairwise(reversed(log_snr[1:]))) < 1.5


@pytest.mark.parametrize(("num_steps", "singlestep", "calls"), [(4, False, 4), (4, True, 8)])
def test_dpmpp_takes_the_documented_number_of_evaluations(num_steps, singlestep, calls):
    times = []

    def model(x_t, t):
        times.append(int(t[0]))
        return x_t

    dpmpp_sample(model, linear_schedule(50), torch.randn(1, 1, 2, 2), num_steps, singlestep=singlestep)
    assert len(times) == len(set(times)) == calls
    times.clear()
    heun_sample(model, linear_schedule(50), torch.randn(1, 1, 2, 2), num_steps)
    assert len(times) == 2 * num_steps - 1
    for sample in (ipndm_sample, unipc_sample):
        times.clear()
        sample(model, linear_schedule(50), torch.randn(1, 1, 2, 2), num_steps)
        assert times == sampling_timesteps(linear_schedule(50), num_steps, "logsnr")


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("clip", [True, False])
def test_eta_1_is_algorithm_2_with_the_small_variance(num_steps, clip):
    schedule, x_T = linear_schedule(50), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    model = lambda x_t, t: torch.sin(3 * x_t) + t.view(-1, 1, 1, 1) / 50  # noqa: E731
    noise = fixed_noise(x_T.shape)
    ancestral = ddpm_steps(model, schedule, x_T, num_steps, clip_x_0=clip, noise=noise, variance="beta_tilde")
    implicit = ddim_steps(model, schedule, x_T, num_steps, eta=1.0, clip_x_0=clip, noise=noise)
    for a, b in zip(ancestral, implicit, strict=True):
        torch.testing.assert_close(a.x_s, b.x_s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_without_clipping_each_step_is_line_4_of_algorithm_2(variance):
    schedule, x_T = linear_schedule(1000), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    noise = fixed_noise(x_T.shape)
    steps = ddpm_steps(lambda x_t, t: torch.sin(x_t), schedule, x_T, clip_x_0=False, noise=noise, variance=variance)
    for i, step in enumerate(steps):
        alpha, beta, ab = schedule.alpha[step.t], schedule.beta[step.t], schedule.alpha_bar[step.t]
        before = schedule.alpha_bar[step.t - 1] if step.t > 0 else torch.tensor(1.0, dtype=torch.float64)
        sigma = (beta if variance == "beta" else (1 - before) / (1 - ab) * beta).sqrt()
        z = noise(i) if step.t > 0 else 0  # line 3
        line_4 = (step.x_t - (1 - alpha) / (1 - ab).sqrt() * torch.sin(step.x_t)) / alpha.sqrt() + sigma * z
        torch.testing.assert_close(step.x_s, line_4, rtol=1e-9, atol=1e-9)
        assert step.t == 999 - i
    assert i == 999


def ours_in(scheduler, schedule):
    """Give a scheduler of diffusers our float64 tables in place of its float32 ones."""
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.beta, schedule.alpha, schedule.alpha_bar
    return scheduler


def odd_model(x_t, t):
    """Some smooth function that is nobody's noise, large enough for clipping to act."""
    return torch.sin(2 * x_t) + torch.cos(t.view(-1, 1, 1, 1) / 100) * x_t


THEIR_NAME = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("schedule", [linear_schedule(1000), linear_schedule(500, False)])
@pytest.mark.parametrize(("variance", "theirs"), [("beta", "fixed_large"), ("beta_tilde", "fixed_small")])
@pytest.mark.parametrize("num_steps", [None, 50])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.filterwarnings("ignore:variance beta")
def test_every_state_of_ddpm_is_that_of_diffusers(schedule, variance, theirs, num_steps, clip, prediction):
    """Its DDPMScheduler with timestep_spacing='trailing'; fixed_large is our beta, fixed_small our beta_tilde.

    One step differs by choice: with fewer steps than T, theirs adds the noise of fixed_large at the last step too.
    """
    T = schedule.num_timesteps
    scheduler = DDPMScheduler(
        T, variance_type=theirs, clip_sample=clip, timestep_spacing="trailing", prediction_type=THEIR_NAME[prediction]
    )
    ours_in(scheduler, schedule).set_timesteps(num_steps or T)
    generator = torch.Generator().manual_seed(5)
    sample = x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(5)
    noise = lambda i: torch.randn(x_T.shape, generator=drawn, dtype=torch.float64)  # noqa: E731
    steps = ddpm_steps(
        odd_model, schedule, x_T, num_steps, clip_x_0=clip, noise=noise, variance=variance, prediction=prediction
    )
    for step, t in zip(steps, scheduler.timesteps, strict=True):
        assert step.t == int(t)
        output = scheduler.step(odd_model(sample, t.expand(2)), int(t), sample, generator=generator)
        torch.testing.assert_close(step.x_0_hat, output.pred_original_sample, rtol=1e-5, atol=1e-5)
        if variance == "beta_tilde" or num_steps is None or t > scheduler.timesteps[-1]:
            torch.testing.assert_close(step.x_s, output.prev_sample, rtol=1e-5, atol=1e-5)
        sample = step.x_s


@pytest.mark.parametrize("schedule", [linear_schedule(1000), linear_schedule(500, False)])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("num_steps", "spacing"), [(20, "uniform"), (50, "leading")])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_every_state_of_ddim_is_that_of_diffusers(schedule, eta, num_steps, spacing, clip, prediction):
    """Its DDIMScheduler with set_alpha_to_one and use_clipped_model_output; its name for 'uniform' is 'trailing'."""
    T = schedule.num_timesteps
    scheduler = DDIMScheduler(
        T, clip_sample=clip, set_alpha_to_one=True, prediction_type=THEIR_NAME[prediction],
        timestep_spacing="trailing" if spacing == "uniform" else spacing,
    )  # fmt: skip
    ours_in(scheduler, schedule).set_timesteps(num_steps)
    sample = x_T = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    noise = fixed_noise(x_T.shape)
    steps = ddim_steps(
        odd_model, schedule, x_T, num_steps, eta=eta, clip_x_0=clip, noise=noise, spacing=spacing, prediction=prediction
    )  # fmt: skip
    for i, (step, t) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        output = scheduler.step(
            odd_model(sample, t.expand(2)), int(t), sample, eta=eta, use_clipped_model_output=True,
            variance_noise=noise(i) if eta > 0 else None,
        )  # fmt: skip
        torch.testing.assert_close(step.x_0_hat, output.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.x_s, output.prev_sample, rtol=1e-5, atol=1e-5)
        sample = step.x_s


def test_the_last_step_adds_no_noise():
    schedule, x_T = linear_schedule(50), torch.randn(1, 1, 2, 2)
    calls = []

    def noise(i):
        calls.append(i)
        return torch.randn(1, 1, 2, 2)

    ddpm_sample(lambda x, t: x, schedule, x_T, noise=noise)
    assert calls == list(range(49))
    calls.clear()
    ddim_sample(lambda x, t: x, schedule, x_T, 10, noise=noise)
    assert calls == []


def test_beta_with_few_steps_warns_and_is_not_the_default():
    schedule, x_T = linear_schedule(50), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    noise = fixed_noise(x_T.shape)
    with pytest.warns(UserWarning, match="leaves noise"):
        ddpm_sample(lambda x, t: x, schedule, x_T, 10, variance="beta", noise=noise)
    default = ddpm_sample(lambda x, t: x, schedule, x_T, 10, noise=noise)
    assert torch.equal(default, ddpm_sample(lambda x, t: x, schedule, x_T, 10, variance="beta_tilde", noise=noise))
    full = ddpm_sample(lambda x, t: x, schedule, x_T, noise=noise)
    assert torch.equal(full, ddpm_sample(lambda x, t: x, schedule, x_T, variance="beta", noise=noise))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, s, x: ddim_sample(m, s, x, 10, eta=1.5),
        lambda m, s, x: ddim_sample(m, s, x, 51),
        lambda m, s, x: ddim_sample(m, s, x, 10, spacing="cubic"),
        lambda m, s, x: ddpm_sample(m, s, x, 0),
        lambda m, s, x: dpmpp_sample(m, s, x, 26, singlestep=True),
        lambda m, s, x: heun_sample(m, s, x, 51),
        lambda m, s, x: unipc_sample(m, s, x, 0),
        lambda m, s, x: ipndm_sample(m, s, x, 5, order=5),
        lambda m, s, x: ipndm_sample(m, s, x, 5, order=0),
        lambda m, s, x: ipndm_sample(m, s, x, 5, spacing="cubic"),
        lambda m, s, x: ddpm_sample(m, s, x, variance="learned"),
        lambda m, s, x: ddpm_sample(m, s, x, prediction="noise"),
    ],
)
def test_unknown_options_are_refused(call):
    with pytest.raises(InputError):
        call(lambda x, t: x, linear_schedule(50), torch.zeros(1, 1, 2, 2))

"""Laws of the linear multistep sampler: equal to known solvers, exact at the chain's timesteps, with gradients."""

import dataclasses

import pytest
import torch

from ddpm_lab.core.config import EDM
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.multistep import (
    Multistep,
    log_snr_at,
    multistep_sample,
    multistep_steps,
    second_order,
    spaced_timesteps,
    timesteps_at,
)
from ddpm_lab.diffusion.process import input_scale
from ddpm_lab.diffusion.samplers import ddim_steps
from ddpm_lab.diffusion.schedule import cosine_schedule, linear_schedule, sampling_timesteps
from ddpm_lab.diffusion.solvers import dpmpp_steps
from ddpm_lab.diffusion.unet import UNet

SCHEDULES = {"linear": linear_schedule(50), "cosine": cosine_schedule(50)}


def model(x_t, t):
    """Not linear in x_t, and it depends on t."""
    return torch.sin(3 * x_t + t.to(x_t.dtype)[:, None, None, None] / 10)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "x_0", EDM(0.5)])
@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_the_start_of_tuning_is_dpm_solver(schedule, prediction, num_steps):
    x_T = noise(2, 1, 4, 4)
    solver = second_order(schedule, spaced_timesteps(schedule, num_steps, "logsnr"))
    ours = list(multistep_steps(model, schedule, x_T, solver, prediction=prediction))
    theirs = list(dpmpp_steps(model, schedule, x_T, num_steps, prediction=prediction))
    for our, their in zip(ours, theirs, strict=True):
        assert our.t == their.t
        for name in ("x_t", "x_s", "x_0_hat"):
            torch.testing.assert_close(getattr(our, name), getattr(their, name), rtol=1e-9, atol=1e-9)


def test_ddim_has_this_form_too():
    schedule, N, x_T = SCHEDULES["linear"], 5, noise(2, 1, 4, 4)
    timesteps = sampling_timesteps(schedule, N, "uniform")
    alpha_bar = schedule.alpha_bar[timesteps]
    nearer = torch.cat([alpha_bar[1:], torch.ones(1, dtype=torch.float64)])
    state = ((1 - nearer) / (1 - alpha_bar)).sqrt()
    images = torch.diag(nearer.sqrt() - state * alpha_bar.sqrt())
    solver = Multistep(torch.tensor(timesteps, dtype=torch.float64), state, images)
    expected = list(ddim_steps(model, schedule, x_T, N))[-1].x_s
    torch.testing.assert_close(multistep_sample(model, schedule, x_T, solver), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_noise_levels_between_timesteps(schedule):
    T = schedule.num_timesteps
    whole = torch.arange(T, dtype=torch.float64)
    torch.testing.assert_close(torch.sigmoid(2 * log_snr_at(schedule, whole)), schedule.alpha_bar)
    between = torch.linspace(0, T - 1, 173, dtype=torch.float64)
    levels = log_snr_at(schedule, between)
    assert bool((levels[1:] < levels[:-1]).all())
    torch.testing.assert_close(timesteps_at(schedule, levels), between)
    beyond = timesteps_at(schedule, torch.tensor([1e3, -1e3], dtype=torch.float64))
    torch.testing.assert_close(beyond, torch.tensor([0.0, T - 1.0], dtype=torch.float64))


def test_gradients_are_those_of_finite_differences():
    schedule, x_T = SCHEDULES["linear"], noise(2, 1, 2, 2)
    start = second_order(schedule, torch.tensor([48.7, 20.3, 3.6], dtype=torch.float64))

    def loss(timesteps, state, images):
        return multistep_sample(model, schedule, x_T, Multistep(timesteps, state, images), clip_x_0=False).sum()

    values = [getattr(start, field.name).detach().requires_grad_() for field in dataclasses.fields(start)]
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_network_takes_noise_levels_between_timesteps(num_classes):
    schedule = linear_schedule(1000)
    network = UNet(1, 8, (1, 1), 1, (), norm_groups=4, num_classes=num_classes, num_timesteps=1000).eval()
    network.scale_input(input_scale(EDM(0.5), schedule))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_t = noise(2, 1, 4, 4).float()
    with torch.no_grad():
        at = [network(x_t, torch.full((2,), t)) for t in (20, 20.0, 20.1, 20.2)]
    assert torch.equal(at[0], at[1])
    assert not torch.equal(at[0], at[2])
    assert float((at[2] - (at[0] + at[3]) / 2).abs().max()) < 0.2 * float((at[3] - at[0]).abs().max())


def test_solvers_that_cannot_be():
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match="N x N"):
        Multistep(one, one, torch.ones(1, 2))
    with pytest.raises(InputError, match="decrease"):
        Multistep(torch.tensor([3.0, 3.0]), torch.ones(2), torch.ones(2, 2))
    with pytest.raises(InputError, match="decrease"):
        Multistep(-one, one, one[None])

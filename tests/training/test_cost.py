"""The cost told before a run: of the network that runs, with this process's share of the batch."""

import timeit
from dataclasses import replace

import pytest
import torch

from ddpm_lab.core.config import load_recipe
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.training import cost
from ddpm_lab.training.loop import new_state


@pytest.mark.parametrize(("compile_", "measured", "seconds"), [("no", 32, 50 / 32), ("yes", 50, 1.0)])
def test_a_step_is_measured_as_it_runs(tiny_recipe, monkeypatch, compile_, measured, seconds):
    """Of 200 images four processes take 50 each; compiled, all 50 are measured, for another shape compiles anew."""
    config = load_recipe(str(tiny_recipe))
    config = replace(config, training=replace(config.training, batch_size=200, compile=compile_))
    state, networks = new_state(build_unet(config.model, 1, 8, 1000), config.training), []

    def compiled(model):
        networks.append(model)
        return torch.nn.Sequential(model)  # another object

    def loss(network, schedule, x_0):
        networks.append((type(network), len(x_0)))
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(cost.processes, "world_size", lambda: 4)
    monkeypatch.setattr(cost, "compiled", compiled)
    monkeypatch.setattr(cost, "diffusion_loss", loss)
    monkeypatch.setattr(timeit, "repeat", lambda act, number, repeat: [act() or 1.0])
    schedule, device = build_schedule(config.diffusion), torch.device("cpu")
    assert cost.step_seconds(state, schedule, (1, 8, 8), config, device) == seconds
    if compile_ == "yes":
        assert networks == [state.model, (torch.nn.Sequential, measured)]
    else:
        assert networks == [(type(state.model), measured)]

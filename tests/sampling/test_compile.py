"""torch.compile: the same numbers from one graph. The compiler's back end, slow and not ours, is left out here."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import SamplingConfig, load_recipe
from ddpm_lab.sampling.generation import generate
from ddpm_lab.training.run import train


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Graphs are captured and differentiated as always, and then computed by PyTorch's own kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_step_trains_the_same_weights_by_one_graph(tiny_recipe, tmp_path):
    config = load_recipe(str(tiny_recipe))
    model = dataclasses.replace(config.model, dropout=0.0)
    averages = {}
    for choice in ("no", "yes"):
        training = dataclasses.replace(config.training, compile=choice, precision="float32", num_steps=5)
        folder = tmp_path / choice
        train(dataclasses.replace(config, model=model, training=training), folder, device="cpu")
        averages[choice] = list(load(folder, device="cpu").model.parameters())
    assert counters["stats"]["unique_graphs"] == 1, "one for all timesteps"
    assert not counters["graph_break"]
    for plain, compiled in zip(averages["no"], averages["yes"], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp", "heun", "ipndm", "unipc"])
def test_a_compiled_network_samples_the_same_images_by_one_graph(tiny_run, sampler):
    trained = load(tiny_run, device="cpu")
    images = {}
    for engine in ("torch", "compile"):
        config = SamplingConfig(sampler=sampler, num_steps=4, batch_size=4, engine=engine)
        images[engine] = torch.cat(list(generate(trained, 6, config))).numpy().astype(int)
    assert counters["stats"]["unique_graphs"] == 1, "one for all timesteps, and for the last batch, which is not full"
    assert np.abs(images["torch"] - images["compile"]).max() <= 1


def test_a_failing_compiler_is_reported_in_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile.func, backend=broken))
    out = ["--out", str(tmp_path / "x.png"), "--num-steps", "2", "--engine", "compile", "--device", "cpu"]
    assert run_command(["sample", str(tiny_run), *out]) == 1
    message = capsys.readouterr().err
    assert len([line for line in message.splitlines() if "error:" in line]) == 1
    assert "torch.compile failed" in message
    assert "give --training.compile no or --engine torch" in message
    assert not (tmp_path / "x.png").exists()

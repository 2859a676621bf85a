"""Runs that start from a trained network: as the same function, recorded, and refused where the networks differ."""

import dataclasses
import json
import shutil

import pytest
import torch

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.models.checkpoint import checkpoint_path, checkpoint_steps
from ddpm_lab.models.trained import describe, load
from ddpm_lab.training.run import train


@pytest.fixture
def config(tiny_recipe):
    return load_recipe(str(tiny_recipe))


def with_settings(config, group, **values):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


def without_learning(config, num_steps=1):
    """The same run with a learning rate of almost 0, so that its weights are those it started with."""
    return with_settings(config, "training", learning_rate=1e-30, num_steps=num_steps)


def test_a_run_starts_with_the_weights_of_its_source(tmp_path, config, tiny_run):
    """The averaged weights, in both the network and its average; config.json says from where."""
    train(without_learning(config), tmp_path / "run", start_from=tiny_run, device="cpu")
    source = load(tiny_run, device="cpu")
    for weights in ("ema", "raw"):
        tuned = load(tmp_path / "run", weights=weights, device="cpu")
        for name, parameter in source.model.named_parameters():
            assert torch.equal(parameter, dict(tuned.model.named_parameters())[name]), name
    assert tuned.record["from"] == {
        "source": str(tiny_run), "step": 12, "weights": "ema", "sha256": source.weights_sha256, "variance": "beta",
            "unconditional": True,
    }  # fmt: skip
    assert f"started from {tiny_run}, step 12" in "\n".join(describe(str(tmp_path / "run")))
    assert run_command(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(tmp_path / "card")]) == 0
    assert f"it began with the weights of {tiny_run}, step 12" in (tmp_path / "card" / "README.md").read_text()


def test_a_conditional_network_starts_as_an_unconditional_one(tmp_path, config, tiny_run):
    """For every label and for none it is the same function, until it is trained."""
    conditional = with_settings(without_learning(config), "model", num_classes=10)
    train(conditional, tmp_path / "run", start_from=tiny_run, device="cpu")
    source, tuned = load(tiny_run, device="cpu"), load(tmp_path / "run", device="cpu")
    x_t, t = torch.randn(11, 1, 8, 8), torch.arange(11) * 90
    expected = source.model(x_t, t)
    assert torch.equal(tuned.model(x_t, t), expected)
    assert torch.equal(tuned.model(x_t, t, torch.arange(11)), expected)
    train(with_settings(config, "model", num_classes=10), tmp_path / "longer", start_from=tiny_run, device="cpu")
    longer = load(tmp_path / "longer", device="cpu").model
    assert not torch.equal(longer(x_t, t, torch.zeros_like(t)), longer(x_t, t, torch.ones_like(t)))


def test_it_continues_with_and_without_its_source(tmp_path, config, tiny_run):
    """It ends in the same bits, also where the source is gone; until its first checkpoint it needs the source."""
    source = tmp_path / "source"
    shutil.copytree(tiny_run, source)
    train(config, tmp_path / "whole", start_from=source, device="cpu")
    for name, again in (("same", source), ("gone", None)):
        parts = tmp_path / name
        train(with_settings(config, "training", num_steps=4), parts, start_from=source, device="cpu")
        if again is None:
            shutil.rmtree(source)
        train(config, parts, start_from=again, device="cpu")
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            ends = [checkpoint_path(folder, 12) / file for folder in (tmp_path / "whole", parts)]
            assert ends[0].read_bytes() == ends[1].read_bytes()
        assert json.loads((parts / "config.json").read_text())["from"]["source"] == str(source)
    for step in checkpoint_steps(parts):
        shutil.rmtree(checkpoint_path(parts, step))
    with pytest.raises(InputError, match=r"has no checkpoint yet; give --from .*source again"):
        train(config, parts, device="cpu")
    shutil.copytree(tiny_run, source)
    train(with_settings(config, "training", num_steps=4), parts, start_from=f"{source}/", device="cpu")
    assert (checkpoint_path(parts, 4) / "ema.safetensors").is_file(), "written otherwise it is the same source"
    shutil.rmtree(checkpoint_path(parts, 4))
    shutil.rmtree(checkpoint_path(source, 12))  # now its newest checkpoint is another
    with pytest.raises(InputError, match=r"source/ has changed since run .* started from step 12 of it"):
        train(config, parts, start_from=source, device="cpu")


@pytest.mark.parametrize(
    ("group", "change", "words"),
    [
        ("model", {"base_channels": 16}, "model.base_channels 32, not 16"),
        ("model", {"patch_size": 2}, "model.patch_size 1, not 2"),
        ("diffusion", {"prediction": "v"}, 'diffusion.prediction "eps", not "v"'),
    ],
)
def test_another_network_is_refused(tmp_path, config, tiny_run, group, change, words):
    with pytest.raises(InputError, match=words):
        train(with_settings(config, group, **change), tmp_path / "run", start_from=tiny_run, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_only_once(tmp_path, config, tiny_run, capsys, tiny_recipe):
    """A source is refused in one line if the run started without one, or from another."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    command = ["train", str(tiny_recipe), "--run", str(copy), "--device", "cpu", "--from", str(tiny_run)]
    assert run_command(command) == 2
    assert f"started from random weights, not from {tiny_run}" in capsys.readouterr().err
    train(without_learning(config), tmp_path / "run", start_from=tiny_run, device="cpu")
    with pytest.raises(InputError, match=f"started from {tiny_run}, not from {copy}"):
        train(without_learning(config), tmp_path / "run", start_from=copy, device="cpu")
    for wrong, words in (("nowhere", "nowhere"), ("mnist", "--from mnist has model.base_channels 64, not 32")):
        assert run_command([*command[:3], str(tmp_path / "new"), *command[4:-1], wrong]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    conditional = with_settings(without_learning(config), "model", num_classes=10)
    train(conditional, tmp_path / "conditional", start_from=tiny_run, device="cpu")
    with pytest.raises(InputError, match=r"model\.num_classes 10, not null"):
        train(without_learning(config), tmp_path / "unconditional", start_from=tmp_path / "conditional", device="cpu")

"""Checkpoints: equal bytes, all or nothing, and damage found by name."""

import dataclasses
import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_lab.core import files
from ddpm_lab.core.config import load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import load_images
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.models import checkpoint
from ddpm_lab.models.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_tensors,
    remove_old_checkpoints,
    save_checkpoint,
)
from ddpm_lab.training.loop import new_state, training_loop
from tests.conftest import tree_hash


@pytest.fixture
def trained(tiny_recipe):
    config = load_recipe(str(tiny_recipe))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=2))
    state = new_state(build_unet(config.model, 1, 8, 1000), config.training)
    for _ in training_loop(state, linear_schedule(), load_images("digits").images, config):
        pass
    return state, config


def save(run_dir, state, step=None):
    step = step or state.step
    return save_checkpoint(checkpoint_path(run_dir, step), step, state.tensors())


def test_saving_and_loading_gives_the_same_state(trained, tmp_path):
    state, config = trained
    folder = save(tmp_path, state)
    fresh = new_state(build_unet(config.model, 1, 8, 1000), config.training)
    fresh.set_step(state.step)
    for name, tensors in fresh.tensors().items():
        load_tensors(folder, name, tensors)
    again = save(tmp_path / "again", fresh)
    assert tree_hash(folder) == tree_hash(again)
    assert sorted(tree_hash(folder)) == ["ema.safetensors", "meta.json", "model.safetensors", "optimizer.safetensors"]


def test_only_the_newest_stay(trained, tmp_path):
    state, _ = trained
    for step in (1, 2, 3, 10):
        save(tmp_path, state, step)
    remove_old_checkpoints(tmp_path, 0)
    assert checkpoint_steps(tmp_path) == [1, 2, 3, 10]
    remove_old_checkpoints(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [3, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("call", ["fsync", "move"])
def test_a_full_disk_leaves_the_checkpoints_before(trained, tmp_path, monkeypatch, call):
    state, _ = trained
    save(tmp_path, state, 1)
    before = tree_hash(tmp_path)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((files.os, "fsync") if call == "fsync" else (checkpoint, "move")), fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, state)
    assert tree_hash(tmp_path) == before


def test_what_a_killed_writer_left_is_no_checkpoint(trained, tmp_path):
    state, _ = trained
    folder = save(tmp_path, state)
    shutil.copytree(folder, folder.with_name(".partial-step_00000009"))
    assert checkpoint_steps(tmp_path) == [2]
    remove_old_checkpoints(tmp_path, 3)
    assert [p.name for p in folder.parent.iterdir()] == ["step_00000002"]


def rename_tensor(path):
    tensors = load_file(path)
    tensors["other"] = tensors.pop("conv_in.bias")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "ema.safetensors").write_bytes((f / "ema.safetensors").read_bytes()[:-1]), "is damaged"),
        (lambda f: (f / "ema.safetensors").write_bytes(b""), "is damaged"),
        (lambda f: (f / "ema.safetensors").unlink(), "No such file"),
        (lambda f: (f / "meta.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "meta.json").write_text("[]"), "must hold step"),
        (lambda f: (f / "meta.json").write_text('{"step": "two", "sha256": {}}'), "must hold step"),
        (lambda f: (f / "meta.json").unlink(), "cannot be read"),
        (lambda f: rename_tensor(f / "ema.safetensors"), "is damaged"),
    ],
)
def test_damage_is_named(trained, tmp_path, damage, words):
    state, _ = trained
    folder = save(tmp_path, state)
    damage(folder)
    with pytest.raises(InputError, match=words):
        load_tensors(folder, "ema.safetensors", dict(state.ema.named_parameters()))


def test_weights_of_another_network_are_refused(trained, tmp_path, tiny_recipe):
    """Also where the hash is right: foreign tensors, or a network of another width."""
    state, config = trained
    folder = save(tmp_path, state)
    wide = build_unet(dataclasses.replace(config.model, base_channels=64), 1, 8, 1000)
    with pytest.raises(InputError, match="belongs to another network"):
        load_tensors(folder, "ema.safetensors", dict(wide.named_parameters()))
    rename_tensor(folder / "ema.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["ema.safetensors"] = tree_hash(folder)["ema.safetensors"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"conv_in.bias is absent there"):
        load_tensors(folder, "ema.safetensors", dict(state.ema.named_parameters()))


def test_half_precision_weights_are_cast(trained, tmp_path):
    state, _ = trained
    folder = save(tmp_path, state)
    half = {name: tensor.half() for name, tensor in load_file(folder / "ema.safetensors").items()}
    save_file(half, folder / "ema.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["ema.safetensors"] = tree_hash(folder)["ema.safetensors"]
    (folder / "meta.json").write_text(json.dumps(meta))
    load_tensors(folder, "ema.safetensors", dict(state.ema.named_parameters()))
    for name, parameter in state.ema.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, half[name].float())


def test_the_path_is_the_documented_one(tmp_path):
    assert checkpoint_path(tmp_path, 10_000) == tmp_path / "checkpoints" / "step_00010000"

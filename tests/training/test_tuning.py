"""Tuned samplers: learning reaches the teacher where it can; the file is for its weights and guidance alone."""

import json
import shutil

import pytest
import torch

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import SamplingConfig, TuningConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.diffusion.multistep import multistep_sample
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.models.checkpoint import checkpoint_path, checkpoint_steps
from ddpm_lab.models.trained import load
from ddpm_lab.sampling.generation import build_sampler
from ddpm_lab.sampling.output import sampling_identity
from ddpm_lab.training.tuning import Examples, distances, fit

TUNE = "--num-steps 2 3 --num-images 8 --held-out 4 --iterations 3 --batch-size 4 --precision float32"


@pytest.mark.parametrize("num_steps", [1, 3])
def test_learning_finds_the_exact_solution_for_gaussian_data(num_steps):
    """Of images with variance s^2 the ODE is linear, and ends at s x_T: a sampler of any length can meet it."""
    schedule, s = linear_schedule(1000), 0.3
    table = torch.cat([schedule.alpha_bar, schedule.alpha_bar[-1:]])

    def model(x_t, t):  # x_0_hat = E[x_0 | x_t], at noise levels between timesteps, too
        below = t.floor().long()
        alpha_bar = torch.lerp(table[below], table[below + 1], t - below)[:, None, None, None]
        return alpha_bar.sqrt() * s**2 / (alpha_bar * s**2 + 1 - alpha_bar) * x_t

    x_T = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    both = Examples(x_T, s * x_T, None)

    def sample(solver, batch):
        return multistep_sample(model, schedule, batch.x_T, solver, prediction="x_0", clip_x_0=False)

    config = TuningConfig(iterations=300, batch_size=16, learning_rate=0.01)
    solver, losses = fit(schedule, num_steps, sample, both.take(range(48)), both.take(range(48, 64)), config)
    assert losses["tuned"] < 0.1 * losses["start"]
    reached = distances(sample(solver, both.take(range(48, 64))), both.images[48:]).mean()
    assert float(reached) == pytest.approx(losses["tuned"])


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory, tiny_run):
    run = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny_run, run)
    assert run_command(["tune", str(run), *TUNE.split(), "--device", "cpu"]) == 0
    return run


def file_of(run):
    return checkpoint_path(run, checkpoint_steps(run)[-1]) / "tuned.json"


def test_a_tuned_sampler_is_saved_and_sampled_with(tuned_run, tmp_path):
    entries = json.loads(file_of(tuned_run).read_text())["samplers"]
    assert [entry["num_steps"] for entry in entries] == [2, 3]
    assert all(entry["loss"]["tuned"] <= entry["loss"]["start"] for entry in entries)
    trained = load(tuned_run, device="cpu")
    sampler = build_sampler(trained, SamplingConfig(sampler="tuned"))
    assert (sampler.num_steps, sampler.num_evaluations, sampler.config.num_steps) == (3, 3, 3)
    for out in ("images.npz", "folder"):
        command = ["sample", str(tuned_run), "--out", str(tmp_path / out), "--num-images", "2", "--sampler", "tuned"]
        assert run_command([*command, "--num-steps", "2", "--device", "cpu"]) == 0
    film = ["reverse", str(tuned_run), "--out", str(tmp_path / "film.gif"), "--sampler", "tuned", "--num-images", "1"]
    assert run_command([*film, "--device", "cpu"]) == 0


def test_images_of_another_tuning_are_other_images(tuned_run, tmp_path):
    """A folder of samples knows which tuning made them."""
    shutil.copytree(tuned_run, tmp_path / "run")
    config = SamplingConfig(sampler="tuned", num_steps=2)
    before = sampling_identity(load(tmp_path / "run", device="cpu"), config)
    again = ["tune", str(tmp_path / "run"), *TUNE.split(), "--num-steps", "2", "--seed", "5", "--device", "cpu"]
    assert run_command(again) == 0
    after = sampling_identity(load(tmp_path / "run", device="cpu"), config)
    assert {name for name in before if before[name] != after[name]} <= {"tuned"}
    entries = json.loads(file_of(tmp_path / "run").read_text())["samplers"]
    assert [entry["num_steps"] for entry in entries] == [2, 3]  # one was replaced


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 5}, "no sampler tuned for 5 steps.*it has: 2 steps, guidance 1; 3 steps, guidance 1"),
        ({"num_steps": 2, "eta": 0.5}, "eta applies to"),
        ({"num_steps": 2, "spacing": "logsnr"}, "spacing applies to"),
    ],
)
def test_other_settings_are_refused(tuned_run, change, words):
    with pytest.raises(InputError, match=words):
        build_sampler(load(tuned_run, device="cpu"), SamplingConfig(sampler="tuned", **change))


def test_other_weights_are_refused(tuned_run, tiny_run):
    with pytest.raises(InputError, match="tuned for other weights"):
        build_sampler(load(tuned_run, weights="raw", device="cpu"), SamplingConfig(sampler="tuned"))
    with pytest.raises(InputError, match=r"no sampler tuned for any steps.*`ddpm tune"):
        build_sampler(load(tiny_run, device="cpu"), SamplingConfig(sampler="tuned"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"num_steps": 2', '"num_steps": 4', 1),
        lambda text: text.replace('"timesteps": [', '"timesteps": [true, ', 1),
        lambda text: text.replace('"guidance": 1.0', '"guidance": NaN', 1),
    ],
)
def test_damaged_files_are_refused(tuned_run, tmp_path, damage):
    shutil.copytree(tuned_run, tmp_path / "run")
    path = file_of(tmp_path / "run")
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"tuned\.json"):
        build_sampler(load(tmp_path / "run", device="cpu"), SamplingConfig(sampler="tuned"))

"""ONNX graphs: the coefficients reproduce the sampler, the graphs compute what PyTorch does, the example runs."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import EDM
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.diffusion.samplers import ddim_sample, run_sampler
from ddpm_lab.diffusion.schedule import cosine_schedule, linear_schedule
from ddpm_lab.diffusion.solvers import STEPS
from ddpm_lab.models.checkpoint import checkpoint_path, read_tensors, tensor_bytes
from ddpm_lab.models.onnx_format import linear_steps, network_graph, sampler_graph

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ipndm", "unipc"])
@pytest.mark.parametrize(
    "schedule", [linear_schedule(), cosine_schedule(1000), linear_schedule(500, rescale_betas=False)]
)
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", EDM(0.5)])
def test_the_numbers_are_those_of_the_sampler(sampler, schedule, prediction):
    """By hand in float64, with clipping, around a network that is not linear."""

    def model(x_t, t):
        return torch.tanh(x_t * (1 + t.view(-1, 1, 1, 1) / 300)) * 0.8

    steps = linear_steps(sampler, schedule, 7, prediction)
    x_T = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, memory = x_T, [torch.zeros_like(x_T)] * 3
    for i, t in enumerate(steps.t):
        output = model(x, torch.full((5,), int(t)))
        x_0_hat = (steps.image_of_state[i] * x + steps.image_of_output[i] * output).clamp(-1, 1)
        recalled = sum(weight * earlier for weight, earlier in zip(steps.recall[i], memory, strict=True))
        memory = [steps.memory_of_state[i] * x + steps.memory_of_image[i] * x_0_hat, *memory[:2]]
        x = steps.keep[i] * x + steps.add[i] * x_0_hat + recalled
    expected = run_sampler(STEPS[sampler])(model, schedule, x_T, 7, prediction=prediction)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """A run that was scored once with these weights and once with others, exported with DDIM of 6 steps."""
    folder = tmp_path_factory.mktemp("onnx")
    shutil.copytree(tiny_run, folder / "run")
    score = {"value": 7.25, "low": 7.0, "high": 7.5}
    sha256_of_run = load(tiny_run, device="cpu").weights_sha256
    with (folder / "run" / "scores.jsonl").open("w") as stream:
        for sha256, sampler in ((sha256_of_run, "heun"), ("0" * 64, "ddpm")):
            record = {
                "step": 12, "seconds": 1.0, "weights_sha256": sha256, "sampler": sampler, "num_evaluations": 19,
                "num_images": 5000, "fid_label": "FD-classifier (n=5,000)", "fid": score,
                "inception_score_whole": score, "floor": {"fid": 0.5, "num_images": 360},
                "features": {"num_classes": 10},
            }  # fmt: skip
            stream.write(json.dumps(record) + "\n")
        del record["sampler"]  # and lines that no run writes
        stream.write(json.dumps(record | {"weights_sha256": sha256_of_run}) + "\n")
        stream.write(
            json.dumps(record | {"weights_sha256": sha256_of_run, "sampler": "ddim", "num_images": "many"}) + "\n"
        )
        for half_formed in ({"floor": 3}, {"floor": {"num_images": 3, "fid": "a"}}, {"floor": {"fid": 1.0}},
                            {"fid": {"value": 1.0, "low": 1.0}}, {"fid": {"low": 1.0, "high": 2.0}}):  # fmt: skip
            stream.write(json.dumps(record | {"weights_sha256": sha256_of_run, "sampler": "ddim"} | half_formed) + "\n")
    command = ["export", str(folder / "run"), "--to", "onnx", "--out", str(folder / "out")]
    assert run_command([*command, "--sampler", "ddim", "--num-steps", "6", "--license", "cc-by-4.0"]) == 0
    return folder / "out"


def test_graphs_compute_what_pytorch_does(exported, tiny_run):
    trained = load(tiny_run, device="cpu")
    network = onnxruntime.InferenceSession(exported / "network.onnx")
    sampler = onnxruntime.InferenceSession(exported / "sampler.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, *trained.image_shape)
        t = torch.randint(1000, (batch,))
        (output,) = network.run(None, {"x_t": x.numpy(), "t": t.numpy()})
        np.testing.assert_allclose(output, trained.model(x, t).numpy(), rtol=0, atol=1e-4)
        (images,) = sampler.run(None, {"noise": x.numpy()})
        expected = to_uint8(ddim_sample(trained.model, trained.schedule, x, 6)).permute(0, 2, 3, 1).numpy()
        assert images.dtype == np.uint8
        assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert np.array_equal(np.load(exported / "alpha_bar.npy"), trained.schedule.alpha_bar.numpy())


def test_graphs_remember_what_three_steps_predicted(tiny_run):
    trained = load(tiny_run, device="cpu")
    with torch.no_grad():
        for parameter in trained.model.parameters():  # so that its output matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, network, images = torch.randn(3, *trained.image_shape), network_graph(trained), {}
    for sampler in ("dpmpp", "ipndm", "unipc"):
        steps = linear_steps(sampler, trained.schedule, 6, trained.prediction)
        session = onnxruntime.InferenceSession(sampler_graph(network, steps, trained.image_shape))
        images[sampler] = session.run(None, {"noise": x.numpy()})[0].astype(int)
        x_0 = run_sampler(STEPS[sampler])(trained.model, trained.schedule, x, 6, prediction=trained.prediction)
        assert np.abs(images[sampler] - to_uint8(x_0).permute(0, 2, 3, 1).numpy()).max() <= 1
    assert np.abs(images["dpmpp"] - images["ipndm"]).max() > 1 < np.abs(images["dpmpp"] - images["unipc"]).max()


def test_the_example_runs_where_the_package_is_not_used(tiny_run, tmp_path, monkeypatch):
    """In another folder; its own DDIM loop, along its own timesteps, is that of DDIM around a network that matters."""
    shutil.copytree(tiny_run, tmp_path / "run")
    checkpoint = checkpoint_path(tmp_path / "run", 12)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(read_tensors(checkpoint, "ema.safetensors").items())
    }
    content = tensor_bytes(tensors)
    (checkpoint / "ema.safetensors").write_bytes(content)
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["sha256"]["ema.safetensors"] = hashlib.sha256(content).hexdigest()
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    folder = tmp_path / "exported"
    assert run_command(["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(folder)]) == 0
    command = [sys.executable, str(folder / "example.py")]  # from another folder
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "sampler.onnx: (4, 8, 8, 1) uint8" in result.stdout
    images = np.load(folder / "images.npz")["images"]
    trained = load(tmp_path / "run", device="cpu")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, 8, 8), dtype=np.float32))

    def along(timesteps, model):
        monkeypatch.setattr("ddpm_lab.diffusion.samplers.sampling_timesteps", lambda *_: timesteps)
        return to_uint8(ddim_sample(model, trained.schedule, x, len(timesteps))).permute(0, 2, 3, 1).numpy().astype(int)

    timesteps = np.linspace(999, 0, 25).round().astype(int).tolist()
    assert np.abs(images.astype(int) - along(timesteps, trained.model)).max() <= 1
    for different in (along(timesteps, lambda x, t: torch.zeros_like(x)), along(timesteps[::3], trained.model)):
        assert np.abs(images.astype(int) - different).max() > 5
    text = (folder / "example.py").read_text()
    assert "ddpm_lab" not in text
    assert len(text.splitlines()) < 30


def test_the_card_says_what_it_is_and_what_it_scores(exported, tiny_run):
    card = (exported / "README.md").read_text()
    for words in ("license: cc-by-4.0", load(tiny_run, device="cpu").weights_sha256, "digits:train, 1,437 images",
                  "12 steps of 8 images", "6 steps of ddim", "1 x 8 x 8", "FD-classifier (n=5,000) 7.25 (7 to 7.5)",
                  "7.25 (7 to 7.5), of 10 classes | 0.5 (n=360) |",
                  '"sampler": "heun"'):  # fmt: skip
        assert words in card, words
    assert '"sampler": "ddpm"' not in card, "a score of other weights"
    assert '"sampler": "ddim"' not in card, "what is no score"
    assert "- unconditional-image-generation" in card
    assert (exported / "samples.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "onnx", "--num-steps", "1001"], "1001"),
        (["--to", "onnx", "--num-steps", "0"], "not 0"),
        (["--to", "onnx", "--sampler", "heun"], "heun"),
        (["--to", "coreml"], "coreml"),
    ],
)
def test_what_cannot_be_exported_is_refused(tiny_run, tmp_path, capsys, flags, words):
    assert run_command(["export", str(tiny_run), "--out", str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert words in err[0]
    assert not list(tmp_path.iterdir())


def test_an_extra_that_is_absent_is_named(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddpm_lab.models.onnx_format.missing_packages", lambda: ["onnx", "onnxscript"])
    assert run_command(["export", str(tiny_run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "onnx, onnxscript not installed: pip install 'ddpm-lab[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_linear_is_noticed(monkeypatch):
    from ddpm_lab.models import onnx_format as onnx_export

    real = onnx_export.STEPS["ddim"]

    def bent(*given, **settings):
        for step in real(*given, **settings):
            yield type(step)(step.t, step.x_t, step.x_s**3, step.x_0_hat)

    monkeypatch.setitem(onnx_export.STEPS, "ddim", bent)
    with pytest.raises(InputError, match="not linear"):
        linear_steps("ddim", linear_schedule(), 3, "eps")

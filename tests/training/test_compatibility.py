"""Files of an earlier version are still read: a run, a study, an exported pipeline, and the packaged weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.log import read_lines
from ddpm_lab.models.checkpoint import checkpoint_path
from ddpm_lab.models.trained import read_run_record
from ddpm_lab.studies.report import write_report
from ddpm_lab.training.run import train

FIXTURES = Path(__file__).parent.parent / "fixtures"
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def test_a_run_of_before_resumes_to_its_stored_weights(tmp_path):
    """From its checkpoint of step 6 to 12, in float32: to the last bits, which differ between processors."""
    stored, run_dir = FIXTURES / "run", tmp_path / "run"
    shutil.copytree(stored, run_dir)
    shutil.rmtree(checkpoint_path(run_dir, 12))
    (run_dir / "samples" / "step_00000012.png").unlink()
    _, config, _ = read_run_record(stored / "config.json")
    train(config, run_dir, device="cpu")
    for name in TENSORS:
        resumed, expected = (load_file(checkpoint_path(folder, 12) / name) for folder in (run_dir, stored))
        assert resumed.keys() == expected.keys()
        for key, tensor in resumed.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)
    log, log_before = (read_lines(folder / "log.jsonl") for folder in (run_dir, stored))
    assert [line["step"] for line in log] == [line["step"] for line in log_before]
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in log_before], rel=1e-5)
    (score,), (score_before,) = (read_lines(folder / "scores.jsonl") for folder in (run_dir, stored))
    assert score["fid"]["value"] == pytest.approx(score_before["fid"]["value"], rel=1e-3)


def test_a_study_of_before_is_reported_with_the_same_numbers(tmp_path):
    shutil.copytree(FIXTURES / "study", tmp_path / "study")
    for name in ("results.json", "results.csv"):
        (tmp_path / "study" / name).unlink()
    answer = write_report(tmp_path / "study")
    for name in ("results.json", "results.csv"):
        assert (tmp_path / "study" / name).read_bytes() == (FIXTURES / "study" / name).read_bytes()
    records = json.loads((FIXTURES / "study" / "results.json").read_text())
    for record in records:
        if record["key"] == "ddim-50":
            assert f"{record['fid']['value']:.3g} for T = {record['num_timesteps']}" in answer


def test_a_pipeline_of_before_samples_the_images_of_its_run(tmp_path):
    pipeline, run = (load(FIXTURES / name, device="cpu") for name in ("pipeline", "run"))
    assert pipeline.weights_sha256 == run.weights_sha256
    flags = ["--num-images", "16", "--sampler", "dpmpp", "--num-steps", "20", "--device", "cpu"]
    for name in ("pipeline", "run"):
        assert run_command(["sample", str(FIXTURES / name), *flags, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "pipeline.png").read_bytes() == (tmp_path / "run.png").read_bytes()
    with Image.open(tmp_path / "run.png") as drawn, Image.open(FIXTURES / "pipeline" / "samples.png") as stored:
        assert np.abs(np.asarray(drawn, np.int16) - np.asarray(stored, np.int16)).max() <= 1


def test_packaged_weights_load():
    mnist = load("mnist", device="cpu")
    assert (mnist.image_shape, mnist.step, mnist.schedule.num_timesteps) == ((1, 28, 28), 4000, 1000)
    assert mnist.weights_sha256 == "544455d57e05834fd89a8a50cef3673f1a432ecc7eb382becadbcccbe425db97"
    output = mnist.model(torch.zeros(1, 1, 28, 28), torch.tensor([5]))
    assert float(output.sum()) == pytest.approx(-311.43, abs=0.05)

"""Trackers get what the files hold, once, also after an interruption; without one nothing is written."""

import dataclasses
import shutil

import pytest
from PIL import Image

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import load_recipe
from ddpm_lab.core.log import read_lines
from ddpm_lab.models.checkpoint import checkpoint_path
from ddpm_lab.training.run import train


def tracked(recipe, tracker, **evaluation):
    config = load_recipe(str(recipe))
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tracker=tracker, **evaluation))


def test_tensorboard_gets_what_the_files_hold_once(tiny_recipe, tiny_run, tmp_path):
    """After a kill that lost the last four steps the events show each step once, and no weight changes."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tracked(tiny_recipe, "tensorboard", score_every=6, score_images=24)
    train(config, tmp_path, device="cpu")
    shutil.rmtree(checkpoint_path(tmp_path, 12))
    train(config, tmp_path, device="cpu")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    log = read_lines(tmp_path / "log.jsonl")
    for name in ("loss", "grad_norm", "validation_loss"):
        expected = {line["step"]: line[name] for line in log if name in line}
        values = {event.step: event.value for event in events.Scalars(name)}
        assert len(events.Scalars(name)) == len(values), "each step once"
        assert values == pytest.approx(expected, rel=1e-6)
    band = {event.step: event.value for event in events.Scalars("loss_by_t/0")}
    assert band == pytest.approx({x["step"]: x["loss_by_t"][0] for x in log if x["loss_by_t"][0] is not None}, rel=1e-6)
    scores = {line["step"]: line["fid"]["value"] for line in read_lines(tmp_path / "scores.jsonl")}
    assert {e.step: e.value for e in events.Scalars("scores/FD-classifier (n=24 against 1,437)")} == pytest.approx(
        scores, rel=1e-6
    )
    assert [image.step for image in events.Images("samples")] == [6, 12]
    (film,) = events.Images("reverse")
    assert film.encoded_image_string == (tmp_path / "samples" / "reverse.gif").read_bytes()
    with Image.open(tmp_path / "samples" / "reverse.gif") as picture:
        assert picture.n_frames == 3, "noise and two steps"
    name = "checkpoints/step_00000012/model.safetensors"
    assert (tmp_path / name).read_bytes() == (tiny_run / name).read_bytes()
    assert not (tiny_run / "tensorboard").exists()


def test_a_run_killed_before_its_first_checkpoint_is_shown_once(tiny_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tracked(tiny_recipe, "tensorboard")
    train(config, tmp_path, device="cpu")
    shutil.rmtree(tmp_path / "checkpoints")
    train(config, tmp_path, device="cpu")
    steps = [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_weights_and_biases_gets_pictures_and_the_film(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    train(tracked(tiny_recipe, "wandb"), run, device="cpu")
    media = {path.name.split("_")[0]: path for path in (run / "wandb").rglob("media/*/*")}
    assert media.keys() == {"samples", "reverse"}
    assert media["reverse"].read_bytes() == (run / "samples" / "reverse.gif").read_bytes()
    assert len(list((run / "wandb").rglob("*.wandb"))) == 1
    assert len((run / ".wandb-id").read_text()) == 16


def test_a_tracker_that_is_absent_is_named(tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), "--evaluation.tracker", "wandb"]
    assert run_command(command) == 2
    assert "tracker wandb is not installed: pip install 'ddpm-lab[trackers]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_reported(tiny_recipe, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")

    def refuse(tracker):
        raise PermissionError("not\nhere")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", refuse)
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert run_command([*command, "--evaluation.tracker", "tensorboard"]) == 2
    assert "evaluation.tracker tensorboard does not start: not here" in capsys.readouterr().err
    assert run_command([*command, "--evaluation.tracker", "carrier-pigeon"]) == 2

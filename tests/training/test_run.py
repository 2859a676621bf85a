"""Runs: their files, resuming bit for bit after any interruption, and what is refused."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core import processes
from ddpm_lab.core.config import load_recipe
from ddpm_lab.core.device import resolve_precision
from ddpm_lab.core.errors import InputError, Interrupted, RunError
from ddpm_lab.core.files import locked
from ddpm_lab.core.log import read_lines
from ddpm_lab.data.datasets import load_images
from ddpm_lab.evaluation import scores
from ddpm_lab.models import checkpoint
from ddpm_lab.models.checkpoint import checkpoint_path, checkpoint_steps
from ddpm_lab.training import cost, optimizer, session
from ddpm_lab.training.resume import as_flag
from ddpm_lab.training.run import train
from tests.commands import Command
from tests.conftest import tree_hash


def tiny(recipe, **training):
    config = load_recipe(str(recipe))
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def weights(run_dir: Path, step: int) -> dict[str, str]:
    return tree_hash(checkpoint_path(run_dir, step))


def test_a_run_has_the_documented_files(tiny_run):
    record = json.loads((tiny_run / "config.json").read_text())
    assert record["config"]["diffusion"]["rescale_betas"] is True, "resolved, not as typed"
    assert record["data"]["name"] == "digits:train"
    assert len(record["data"]["sha256"]) == 64
    assert {"ddpm-lab", "torch", "numpy", "python"} <= record["versions"].keys()
    dtype = resolve_precision("auto", torch.device("cpu"))
    assert record["computed"] == {
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": 1,
        "compiled": False,
        "tf32": False,
        "deterministic": False,
    }
    assert checkpoint_steps(tiny_run) == [8, 12], "the newest two, as keep_checkpoints says"
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
    with Image.open(tiny_run / "samples" / "step_00000012.png") as grid:
        assert grid.size == (2 * 8 * 7 + 2 * 7, 2 * 8 * 7 + 2 * 7), "2 x 2 images of 8, gaps of 2, seven times as large"


def test_the_log_has_the_documented_entries(tiny_run):
    log = read_lines(tiny_run / "log.jsonl")
    assert [entry["step"] for entry in log] == [2, 4, 6, 8, 10, 12]
    for entry in log:
        assert entry["images"] == 8 * entry["step"]
        assert len(entry["loss_by_t"]) == 10
        assert {"loss", "grad_norm", "lr", "images_per_second", "seconds"} <= entry.keys()
    assert [entry["step"] for entry in log if "validation_loss" in entry] == [6, 12]


def start(recipe: Path, run_dir: Path, *more: str) -> Command:
    arguments = ["train", str(recipe), "--run", str(run_dir), "--device", "cpu", *more]
    return Command(arguments, OMP_NUM_THREADS="1")


def wait_for_log(process: Command, run_dir: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "log.jsonl").exists() and (run_dir / "log.jsonl").read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)
    raise AssertionError(f"the log did not grow: {process.communicate()}")


def finish(process: Command) -> int:
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bits(tmp_path, tiny_recipe):
    """SIGKILL at several steps, after the log has grown; resumed, all tensors equal those of an uninterrupted run."""
    steps = ("--training.num-steps", "40", "--training.log-every", "1", "--training.checkpoint-every", "7")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(tiny_recipe, whole, *steps)) == 0
    deaths = []
    for lines in (3, 11, 22, 33):
        process = start(tiny_recipe, killed, *steps)
        wait_for_log(process, killed, lines)
        process.send_signal(signal.SIGKILL)
        finish(process)
        deaths.append(len(read_lines(killed / "log.jsonl")))
    assert finish(start(tiny_recipe, killed, *steps)) == 0
    assert deaths == sorted(set(deaths)), f"a kill came before the run had gone on: {deaths}"
    assert deaths[-1] < 40, f"the last kill came too late to prove anything: {deaths}"
    assert weights(killed, 40) == weights(whole, 40)
    for entry, other in zip(read_lines(killed / "log.jsonl"), read_lines(whole / "log.jsonl"), strict=True):
        for name in ("step", "images", "loss", "loss_by_t", "grad_norm", "lr"):
            assert entry[name] == other[name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_writes_a_checkpoint(tmp_path, tiny_recipe, number):
    process = start(tiny_recipe, tmp_path, "--training.num-steps", "100000", "--training.log-every", "1")
    wait_for_log(process, tmp_path, 3)
    process.send_signal(number)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (step,) = checkpoint_steps(tmp_path)[-1:]
    assert err.splitlines()[-1] == f"error: stopped at step {step} with a checkpoint; the same command continues"
    assert read_lines(tmp_path / "log.jsonl")[-1]["step"] == step


def test_resuming_at_another_interval_changes_nothing(tmp_path, tiny_recipe, tiny_run):
    """Steps 1-4, then on to 12 with other intervals: the weights of an uninterrupted run."""
    first = tiny(tiny_recipe, num_steps=4)
    train(first, tmp_path, device="cpu")
    train(tiny(tiny_recipe, log_every=5, checkpoint_every=3), tmp_path, device="cpu")
    assert weights(tmp_path, 12) == weights(tiny_run, 12)


def test_a_finished_run_is_unchanged(tmp_path, tiny_recipe, tiny_run):
    shutil.copytree(tiny_run, tmp_path / "copy")
    before, messages = tree_hash(tmp_path / "copy"), []
    train(tiny(tiny_recipe), tmp_path / "copy", device="cpu", say=messages.append)
    assert tree_hash(tmp_path / "copy") == before
    assert "has all its 12 steps; give more --training.num-steps" in messages[0]


def test_a_finished_run_whose_rate_fell_to_0_says_how_to_continue(tmp_path, tiny_recipe):
    messages = []
    for _ in range(2):
        train(tiny(tiny_recipe, num_steps=2, decay="cosine"), tmp_path / "run", device="cpu", say=messages.append)
    assert messages[-1].endswith("has all its 2 steps; give more --training.num-steps to continue")


def test_log_lines_after_the_checkpoint_and_torn_ones_are_cut(tmp_path, tiny_recipe, tiny_run):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    shutil.rmtree(checkpoint_path(copy, 12))
    with (copy / "log.jsonl").open("a") as stream:
        stream.write('{"step": 13, "lo')
    train(tiny(tiny_recipe), copy, device="cpu")
    assert [e["step"] for e in read_lines(copy / "log.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert weights(copy, 12) == weights(tiny_run, 12)
    lines = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    same = ("step", "loss", "loss_by_t", "validation_loss")
    assert [[e.get(n) for n in same] for e in lines] == [
        [e.get(n) for n in same] for e in read_lines(tiny_run / "log.jsonl")
    ]


def test_the_cost_is_estimated_first(tmp_path, tiny_recipe):
    messages = []
    train(tiny(tiny_recipe, num_steps=1), tmp_path, device="cpu", say=messages.append)
    assert re.search(
        r"starts: digits:train, 1437 images of 1 x 8 x 8; [\d,]+ parameters, [\d.e-]+ GFLOP an image forward.*"
        r"steps 0 to 1 of 8 images on cpu in .*: about .*; up to [\d.]+ MB of checkpoints",
        messages[0],
    )


def test_flops_are_counted_as_by_hand():
    """A 3x3 convolution from 4 to 8 channels on 5x5 positions is 2 * 9 * 4 * 8 * 25 operations."""

    class OneConvolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x)

    assert cost.forward_flops(OneConvolution(), (4, 5, 5)) == 2 * 9 * 4 * 8 * 25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: dataclasses.replace(c, training=dataclasses.replace(c.training, batch_size=4)),
         "training.batch_size 8, not 4"),
        (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, dropout=0.0)), "model.dropout"),
        (lambda c: dataclasses.replace(c, diffusion=dataclasses.replace(c.diffusion, num_timesteps=500)),
         "diffusion.num_timesteps 1000, not 500"),
        (lambda c: dataclasses.replace(c, training=dataclasses.replace(c.training, seed=1)), "training.seed"),
        (lambda c: dataclasses.replace(c, training=dataclasses.replace(c.training, num_steps=9)), "cannot be"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused(tiny_recipe, tiny_run, change, words):
    before = tree_hash(tiny_run)
    with pytest.raises(InputError, match=words):
        train(change(tiny(tiny_recipe)), tiny_run, device="cpu")
    assert tree_hash(tiny_run) == before


@contextlib.contextmanager
def stop_at(monkeypatch, step):
    """Have the next training be interrupted after a step."""
    real = session.training_loop

    def stopping(*arguments):
        for done in real(*arguments):
            if done.step == step:
                os.kill(os.getpid(), signal.SIGINT)
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(session, "training_loop", stopping)
        yield


@pytest.mark.parametrize(
    ("reached", "share", "num_steps", "words"),
    [
        (8, 1.0, 20, "is falling to 0 at step 12"),
        (11, 0.25, 20, "is falling to 0 at step 12"),
        (9, 0.25, 10, "should have started to fall at step 8"),
        (9, 0.25, 8, "cannot be"),
    ],
)
def test_num_steps_with_another_learning_rate_so_far_is_refused(
    tmp_path, tiny_recipe, monkeypatch, reached, share, num_steps, words
):
    settings = {"decay": "linear", "decay_share": share}
    with stop_at(monkeypatch, reached), pytest.raises(Interrupted):
        train(tiny(tiny_recipe, **settings), tmp_path, device="cpu")
    before = tree_hash(tmp_path)
    with pytest.raises(InputError, match=words):
        train(tiny(tiny_recipe, num_steps=num_steps, **settings), tmp_path, device="cpu")
    assert tree_hash(tmp_path) == before


def test_num_steps_may_change_while_the_rate_is_constant(tmp_path, tiny_recipe, monkeypatch):
    """A run planned for 30 steps, stopped at 7 and given 12, ends in the bits of a run planned for 12."""
    settings = {"decay": "linear", "decay_share": 0.5}
    with stop_at(monkeypatch, 7), pytest.raises(Interrupted):
        train(tiny(tiny_recipe, num_steps=30, **settings), tmp_path / "moved", device="cpu")
    for name in ("moved", "planned"):
        train(tiny(tiny_recipe, **settings), tmp_path / name, device="cpu")
    assert weights(tmp_path / "moved", 12) == weights(tmp_path / "planned", 12)


def test_a_run_whose_rate_fell_to_0_restarts_its_schedule(tmp_path, tiny_recipe, monkeypatch):
    """The rate rises and falls again, config.json holds the step, and a kill in between changes no bit."""
    first, then = (tiny(tiny_recipe, num_steps=n, decay="linear") for n in (6, 16))
    lines = []
    for name in ("whole", "killed"):
        train(first, tmp_path / name, device="cpu")
    with stop_at(monkeypatch, 11), pytest.raises(Interrupted):
        train(then, tmp_path / "killed", device="cpu")
    for name in ("whole", "killed"):
        train(then, tmp_path / name, device="cpu", say=lines.append)
    assert weights(tmp_path / "killed", 16) == weights(tmp_path / "whole", 16)
    assert "learning rate starts again after falling to 0" in lines[0]
    record = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert (record["continued_at"], record["first_num_steps"]) == ([6], 6)
    rates = {line["step"]: line["lr"] for line in read_lines(tmp_path / "whole" / "log.jsonl")}
    assert rates[8] == pytest.approx(2e-4 * 2 / 4), "of the new warm-up"
    assert rates[10] == pytest.approx(2e-4)
    assert rates[16] == pytest.approx(2e-4 / 6), "of the new fall"
    train(dataclasses.replace(then, training=dataclasses.replace(then.training, num_steps=18)), tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["continued_at"] == [6, 16]


def test_a_warm_up_cut_to_a_short_run_stays_when_num_steps_grows(tmp_path, tiny_recipe):
    train(tiny(tiny_recipe, num_steps=6, warmup_steps=100), tmp_path, device="cpu")
    train(tiny(tiny_recipe, num_steps=8, warmup_steps=100), tmp_path, device="cpu")
    train(tiny(tiny_recipe, num_steps=9, warmup_steps=100), tmp_path, device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (config["training"]["warmup_steps"], config["training"]["num_steps"]) == (6, 9)
    with pytest.raises(InputError, match=r"training.warmup_steps 6, not 3"):
        train(tiny(tiny_recipe, num_steps=9, warmup_steps=3), tmp_path, device="cpu")


def test_averages_of_a_sixteenth_an_eighth_and_a_quarter_are_kept(tmp_path, tiny_recipe):
    """They are those of the run at that step, whatever num_steps becomes later, and can be loaded."""
    train(tiny(tiny_recipe, num_steps=16), tmp_path, device="cpu")
    train(tiny(tiny_recipe, num_steps=20), tmp_path, device="cpu")
    names = sorted(path.name for path in (tmp_path / "averages").iterdir())
    assert names == ["step_00000001", "step_00000002", "step_00000004"]
    train(tiny(tiny_recipe, num_steps=4), tmp_path / "short", device="cpu")
    kept = load(tmp_path / "averages" / "step_00000004", device="cpu")
    assert (kept.step, kept.weights_sha256) == (4, load(tmp_path / "short", device="cpu").weights_sha256)


@pytest.mark.parametrize(
    "settings",
    [
        {"diffusion": {"prediction": "edm"}, "training": {"noise_levels": "lognormal", "adam_beta2": 0.99}},
        {"training": {"weighting": "learned", "decay": "linear", "decay_share": 0.5}},
        {"training": {"weighting": "min_snr"}, "model": {"time_conditioning": "scale_shift"}},
        {"training": {"optimizer": "muon"}},
        {"training": {"precision": "fp16"}},
        {"training": {"precision": "fp16", "weighting": "learned", "optimizer": "muon"}},
    ],
    ids=["edm", "learned", "min_snr", "muon", "fp16", "fp16-learned-muon"],
)
def test_resuming_gives_the_same_bits_with_every_option(tmp_path, tiny_recipe, monkeypatch, settings):
    monkeypatch.setattr(optimizer, "FIRST_SCALE", 2.0**20)  # in float16 the first four steps are skipped,
    monkeypatch.setattr(optimizer, "STEPS_TO_GROW", 6)  # and step 11, before which the scale doubles
    config = load_recipe(str(tiny_recipe))
    groups = {name: dataclasses.replace(getattr(config, name), **values) for name, values in settings.items()}
    config = dataclasses.replace(config, **groups)
    train(config, tmp_path / "whole", device="cpu")
    for stop in (3, 9):
        with stop_at(monkeypatch, stop), pytest.raises(Interrupted):
            train(config, tmp_path / "killed", device="cpu")
    train(config, tmp_path / "killed", device="cpu")
    assert weights(tmp_path / "killed", 12) == weights(tmp_path / "whole", 12)
    if config.training.precision == "fp16":
        for name in ("whole", "killed"):
            assert sum(entry["skipped_steps"] for entry in read_lines(tmp_path / name / "log.jsonl")) == 5
        log = read_lines(tmp_path / "whole" / "log.jsonl")
        assert [(entry["skipped_steps"], entry["loss"] is None) for entry in log] == [
            (2, True), (2, True), (0, False), (0, False), (0, False), (1, False)]  # fmt: skip
    if "diffusion" in settings:
        sigma_data = json.loads((tmp_path / "whole" / "config.json").read_text())["config"]["diffusion"]["sigma_data"]
        pixels = load_images("digits", "train").images.double() / 127.5 - 1
        assert sigma_data == pytest.approx(float(pixels.std(correction=0)), abs=1e-4)


def test_data_may_move_but_not_change(tmp_path, tiny_recipe):
    """The hash of the images decides, not the name of the folder."""
    for index in range(24):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(tmp_path / "pictures" / f"{index:02d}.png")
    config = tiny(tiny_recipe, num_steps=2)

    def config_of(folder, num_steps):
        data = dataclasses.replace(config.data, dataset=str(folder))
        return dataclasses.replace(
            config, data=data, training=dataclasses.replace(config.training, num_steps=num_steps)
        )

    train(config_of(tmp_path / "pictures", 2), tmp_path / "run", device="cpu")
    shutil.copytree(tmp_path / "pictures", tmp_path / "moved")
    train(config_of(f"{tmp_path}/./moved/", 4), tmp_path / "run", device="cpu")
    assert load(tmp_path / "run", device="cpu").step == 4
    Image.new("L", (8, 8), 255).save(tmp_path / "moved" / "00.png")
    with pytest.raises(InputError, match="was started on other images"):
        train(config_of(tmp_path / "moved", 6), tmp_path / "run", device="cpu")


def test_another_process_is_refused(tmp_path, tiny_recipe):
    with locked(tmp_path, "--run"), pytest.raises(InputError, match="being written by another process"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")


def poison(monkeypatch, number, change):
    """Have training report step `number` changed."""
    real = session.training_loop

    def poisoned(*arguments):
        for step in real(*arguments):
            yield change(step) if step.step == number else step

    monkeypatch.setattr(session, "training_loop", poisoned)


def test_a_loss_that_is_not_finite_stops_with_step_and_seed(tmp_path, tiny_recipe, monkeypatch):
    poison(monkeypatch, 7, lambda step: dataclasses.replace(step, losses=step.losses * float("nan")))
    with pytest.raises(RunError, match=r"not finite at step 7 \(seed 0\); the last checkpoint is of step 4"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert run_command(["train", str(tiny_recipe), "--run", str(tmp_path), "--device", "cpu"]) == 1
    assert checkpoint_steps(tmp_path) == [4]
    monkeypatch.undo()
    train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [8, 12]


def test_weights_after_a_gradient_that_is_not_finite_are_not_saved(tmp_path, tiny_recipe, monkeypatch):
    poison(monkeypatch, 8, lambda step: dataclasses.replace(step, grad_norm=step.grad_norm * float("inf")))
    with pytest.raises(RunError, match=r"the gradient is not finite at step 8 .*; the last checkpoint is of step 4"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [4]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tiny_recipe, monkeypatch):
    """Loss and gradient of the last step before a checkpoint are finite, and its weights are not."""

    def spoil(training):
        next(training.state.ema.parameters()).data.view(-1)[0] = float("nan")

    real = session.Session._gathered_losses
    monkeypatch.setattr(
        session.Session,
        "_gathered_losses",
        lambda training: (training.state.step == 8 and spoil(training), real(training))[1],
    )
    with pytest.raises(RunError, match=r"the ema is not finite at step 8 .*; the last checkpoint is of step 4"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [4]


def test_a_network_that_diverges_in_float16_ends_the_run(tmp_path, tiny_recipe, monkeypatch):
    """Overflows alone only skip steps. When no scale helps any more, the run ends, and its last checkpoint stays."""
    monkeypatch.setattr(optimizer, "FIRST_SCALE", 4.0)
    config = tiny(tiny_recipe, precision="fp16", learning_rate=1e4, num_steps=40, warmup_steps=1, log_every=40)
    with pytest.raises(
        RunError, match=r"overflow at step \d+ \(seed 0\) however the loss is scaled.* of step \d+; a lower"
    ):
        train(config, tmp_path, device="cpu")
    skipped = [entry["skipped_steps"] for entry in read_lines(tmp_path / "log.jsonl")]
    assert skipped[-1] > 0, "and the overflows before that did not end it"


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_run_continues_on_a_device_of_another_precision(tmp_path, tiny_recipe, before, after):
    """What `auto` is may change with the device; the loss scale then begins anew, or is no longer needed."""
    train(tiny(tiny_recipe, num_steps=4, precision=before), tmp_path, device="cpu")
    config_path = tmp_path / "config.json"
    config_path.write_text(config_path.read_text().replace(f'"precision": "{before}"', f'"precision": "{after}"'))
    train(tiny(tiny_recipe, num_steps=8, precision=after), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [4, 8]
    assert [(checkpoint_path(tmp_path, step) / "loss_scale.safetensors").exists() for step in (4, 8)] == [
        before == "fp16",
        after == "fp16",
    ]


def test_processes_of_different_precisions_are_refused(tmp_path, tiny_recipe, monkeypatch):
    """Some scale their losses in float16 and others do not."""
    monkeypatch.setattr(processes, "any_rank", lambda flag: True)
    with pytest.raises(InputError, match="precision auto differs between these GPUs"):
        train(tiny(tiny_recipe), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_deterministic_training_is_recorded_and_may_change(tmp_path, tiny_recipe, tiny_run, monkeypatch):
    """On a CPU it changes no bit; that PyTorch was told is seen from inside a step."""
    seen, real = [], session.Session._gathered_losses
    monkeypatch.setattr(
        session.Session,
        "_gathered_losses",
        lambda training: (seen.append(torch.are_deterministic_algorithms_enabled()), real(training))[1],
    )
    for num_steps, deterministic in ((4, True), (12, False)):
        train(tiny(tiny_recipe, num_steps=num_steps, deterministic=deterministic), tmp_path, device="cpu")
        computed = json.loads((tmp_path / "config.json").read_text())["computed"]
        assert (computed["deterministic"], computed["tf32"]) == (deterministic, False)
    assert seen == [True, True, False, False, False, False]
    assert weights(tmp_path, 12) == weights(tiny_run, 12)


def signal_during(monkeypatch, moment, step, number):
    """Send a signal during what a session does after a step."""
    real = getattr(session.Session, moment)

    def interrupted(training):
        if training.state.step == step:
            os.kill(os.getpid(), number)
        return real(training)

    monkeypatch.setattr(session.Session, moment, interrupted)


@pytest.mark.parametrize("moment", ["_validation_loss", "_sample_grid"])
def test_a_signal_during_validation_or_sampling_stops_after_the_next_step(tmp_path, tiny_recipe, monkeypatch, moment):
    """Step 6 validates and samples, and has no checkpoint; the signal comes meanwhile."""
    signal_during(monkeypatch, moment, 6, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 7"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [4, 7]


@pytest.mark.parametrize(("step", "words"), [(6, "stopped at step 6 with"), (12, "after step 12, the last")])
def test_a_signal_ends_scoring_which_resuming_repeats(tmp_path, tiny_recipe, monkeypatch, step, words):
    config = tiny(tiny_recipe)
    scored = dataclasses.replace(config.evaluation, score_every=6, score_images=20)
    config, real = dataclasses.replace(config, evaluation=scored), scores.generate

    def interrupted(trained, *rest):
        if trained.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(trained, *rest)

    monkeypatch.setattr(scores, "generate", interrupted)
    start_time = time.monotonic()
    with pytest.raises(Interrupted, match=words):
        train(config, tmp_path, device="cpu")
    assert time.monotonic() - start_time < 50
    assert checkpoint_steps(tmp_path)[-1] == step
    monkeypatch.undo()
    train(config, tmp_path, device="cpu")
    assert [line["step"] for line in read_lines(tmp_path / "scores.jsonl")] == [6, 12]


def test_a_signal_before_scoring_leaves_it_for_later(tmp_path, tiny_recipe, monkeypatch):
    """Step 6 is sampled and scored; the signal comes during sampling."""
    config = tiny(tiny_recipe)
    scored = dataclasses.replace(config.evaluation, score_every=6, score_images=20)
    signal_during(monkeypatch, "_sample_grid", 6, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 6 with a checkpoint"):
        train(dataclasses.replace(config, evaluation=scored), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path)[-1] == 6
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_run_records_all_versions_it_was_trained_with(tmp_path, tiny_recipe):
    def written():
        return json.loads((tmp_path / "config.json").read_text())

    train(tiny(tiny_recipe, num_steps=4), tmp_path, device="cpu")
    now, then = written()["versions"], written()["versions"] | {"torch": "1.0"}
    assert "earlier_versions" not in written()
    (tmp_path / "config.json").write_text(json.dumps(written() | {"versions": then}))
    train(tiny(tiny_recipe, num_steps=4), tmp_path, device="cpu")  # the run is complete: nothing is computed
    assert written()["versions"] == then
    train(tiny(tiny_recipe, num_steps=8), tmp_path, device="cpu")
    train(tiny(tiny_recipe, num_steps=10), tmp_path, device="cpu")
    assert (written()["versions"], written()["earlier_versions"]) == (
        now,
        [then | written()["computed"]],
    )
    computed = written()["computed"]
    assert computed["device"] == "cpu"
    other_dtype = {"float32": "bfloat16", "bfloat16": "float32"}[computed["dtype"]]
    (tmp_path / "config.json").write_text(json.dumps(written() | {"computed": computed | {"dtype": other_dtype}}))
    messages: list[str] = []
    train(tiny(tiny_recipe, num_steps=12), tmp_path, device="cpu", say=messages.append)
    assert written()["computed"] == computed
    assert [earlier["dtype"] for earlier in written()["earlier_versions"]] == [computed["dtype"], other_dtype]
    assert any(
        line.startswith(f"from here on with dtype {computed['dtype']} (was {other_dtype}): not bit for bit")
        for line in messages
    )
    (tmp_path / "config.json").write_text(
        json.dumps(written() | {"computed": computed | {"threads": 99, "processes": 3}})
    )
    train(tiny(tiny_recipe, num_steps=13), tmp_path, device="cpu", say=messages.append)
    assert any(f"threads {computed['threads']} (was 99), processes 1 (was 3)" in line for line in messages)
    messages.clear()
    train(tiny(tiny_recipe, num_steps=14), tmp_path, device="cpu", say=messages.append)
    assert not any("from here on with" in line for line in messages)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written().items() if k != "computed"}))
    train(tiny(tiny_recipe, num_steps=14), tmp_path, device="cpu")
    assert written()["computed"] == {}, "nothing is known of a computation elsewhere"


def test_a_signal_during_the_last_step_is_not_forgotten(tmp_path, tiny_recipe, monkeypatch):
    """Everything is written, but a study that trains the run must not continue with its measures."""
    signal_during(monkeypatch, "_sample_grid", 12, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after step 12, the last; the same command makes"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path)[-1] == 12
    assert (tmp_path / "samples" / "step_00000012.png").is_file()


def test_a_run_that_cannot_be_scored_is_refused_and_unchanged(tmp_path, tiny_recipe, tiny_run, monkeypatch):
    monkeypatch.setenv("DDPM_INCEPTION_WEIGHTS", str(tmp_path / "nothing.pth"))
    config = load_recipe(str(tiny_recipe))
    scored = dataclasses.replace(config.evaluation, score_every=4, score_images=20, score_features="inception")
    shutil.copytree(tiny_run, tmp_path / "copy")
    before = tree_hash(tmp_path / "copy")
    for run_dir in (tmp_path / "copy", tmp_path / "new"):
        with pytest.raises(InputError, match="cannot be read"):
            train(dataclasses.replace(config, evaluation=scored), run_dir, device="cpu")
    assert tree_hash(tmp_path / "copy") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.num_classes", None, "leave --model.num-classes out"),
        ("model.attention_levels", [], "leave --model.attention-levels out"),
        ("model.channel_multipliers", [1, 2], "give --model.channel-multipliers 1 2"),
        ("data.horizontal_flip", False, "give --data.no-horizontal-flip"),
        ("training.learning_rate", 2e-4, "give --training.learning-rate 0.0002"),
    ],
)
def test_settings_are_given_as_flags(name, value, words):
    assert as_flag(name, value) == words


def test_a_run_killed_while_writing_its_first_file_starts(tmp_path, tiny_recipe):
    (tmp_path / ".partial-123-config.json").write_text("{")
    train(tiny(tiny_recipe, num_steps=1), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [1]


def test_resuming_samples_a_grid_that_a_kill_prevented(tmp_path, tiny_recipe):
    train(tiny(tiny_recipe, num_steps=6), tmp_path, device="cpu")
    (tmp_path / "samples" / "step_00000006.png").unlink()
    train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]


def test_grids_come_at_their_own_intervals(tmp_path, tiny_recipe):
    config = tiny(tiny_recipe, log_every=100, checkpoint_every=100)
    evaluation = dataclasses.replace(config.evaluation, sample_every=5, validate_every=100)
    train(dataclasses.replace(config, evaluation=evaluation), tmp_path, device="cpu")
    assert [p.name[11:13] for p in sorted((tmp_path / "samples").iterdir())] == ["05", "10", "12"]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, tiny_recipe, tiny_run, monkeypatch):
    real = checkpoint.write_durably

    def full(path, content):
        if "step_00000008" in str(path):
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(RunError, match="No space left on device; the last checkpoint is of step 4"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert checkpoint_steps(tmp_path) == [4]
    assert run_command(["train", str(tiny_recipe), "--run", str(tmp_path), "--device", "cpu"]) == 1
    assert checkpoint_steps(tmp_path) == [4]
    assert not list(tmp_path.glob("checkpoints/.partial*"))
    monkeypatch.undo()
    train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert weights(tmp_path, 12) == weights(tiny_run, 12)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, tiny_recipe, tiny_run, monkeypatch):
    """The first checkpoint is written after two more steps are logged; it holds the state of its own step."""
    real, seen = checkpoint.write_durably, threading.Event()

    def slow(path, content):
        if "step_00000004" in str(path) and not seen.is_set():
            until = time.monotonic() + 30
            while read_lines(tmp_path / "log.jsonl")[-1]["step"] < 6:
                assert time.monotonic() < until, "no step was taken meanwhile"
                time.sleep(0.01)
            seen.set()
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_durably", slow)
    train(tiny(tiny_recipe, keep_checkpoints=0), tmp_path, device="cpu")
    assert seen.is_set()
    assert checkpoint_steps(tmp_path) == [4, 8, 12]
    assert weights(tmp_path, 12) == weights(tiny_run, 12)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000012")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    monkeypatch.undo()
    train(tiny(tiny_recipe, keep_checkpoints=0), tmp_path, device="cpu")
    assert weights(tmp_path, 12) == weights(tiny_run, 12)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, tiny_recipe, monkeypatch):
    """The message names its step, and comes before the last step."""

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(RunError, match=r"cannot be written at step 1: No space left on device; .* is of step none yet"):
        train(tiny(tiny_recipe), tmp_path, device="cpu")
    assert read_lines(tmp_path / "log.jsonl")[-1]["step"] < 12


def test_a_run_scores_itself_without_changing_its_weights(tiny_recipe, tiny_run, tmp_path, monkeypatch):
    """Scores come at the configured steps, none twice and none lost; the weights are those of a run without scores."""
    config = load_recipe(str(tiny_recipe))
    evaluation = dataclasses.replace(config.evaluation, score_every=5, score_images=30)
    config = dataclasses.replace(config, evaluation=evaluation)
    train(config, tmp_path / "scored", device="cpu")
    scores = read_lines(tmp_path / "scored" / "scores.jsonl")
    assert [line["step"] for line in scores] == [5, 10, 12]
    for line in scores:
        assert line["fid_label"] == "FD-classifier (n=30 against 1,437)"
        assert line["num_images"] == 30
        assert line["fid"]["value"] > line["floor"]["fid"]
    assert scores[-1]["weights_sha256"] == load(tmp_path / "scored", device="cpu").weights_sha256
    for line in scores:
        assert (line["weights"], line["sampler"], line["num_steps"]) == ("ema", "ddim", 2)
    name = "checkpoints/step_00000012/model.safetensors"
    assert (tmp_path / "scored" / name).read_bytes() == (tiny_run / name).read_bytes()

    # A kill at step 10, after its score and before a checkpoint: the score of step 10 is cut, and comes again.
    shutil.rmtree(tmp_path / "scored" / "checkpoints" / "step_00000012")
    train(config, tmp_path / "scored", device="cpu")
    again = read_lines(tmp_path / "scored" / "scores.jsonl")
    unchanging = ("step", "fid", "kid", "inception_score", "images")
    assert [[line[n] for n in unchanging] for line in again] == [[line[n] for n in unchanging] for line in scores]
    assert again[0]["seconds"] == scores[0]["seconds"]

    # A kill after the last checkpoint, before its picture and its score: the same command makes both.
    (tmp_path / "scored" / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again[:2]))
    (tmp_path / "scored" / "samples" / "step_00000012.png").unlink()
    train(config, tmp_path / "scored", device="cpu")
    last = read_lines(tmp_path / "scored" / "scores.jsonl")
    assert [line["fid"] for line in last] == [line["fid"] for line in scores]
    assert (tmp_path / "scored" / "samples" / "step_00000012.png").is_file()
    assert again[1]["seconds"] != scores[1]["seconds"]

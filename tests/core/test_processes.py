"""Several processes: what one would have made, and what happens when one of them ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_lab.cli.main import run_command
from ddpm_lab.core import processes
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import read_lines
from ddpm_lab.models.checkpoint import checkpoint_path, checkpoint_steps
from tests.commands import Command

FLAGS = ["--device", "cpu", "--model.dropout", "0", "--model.num-classes", "10", "--training.precision", "float32"]


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def launch(*arguments: str, count: int = 2) -> list[Command]:
    """Start a command as a launcher does."""
    return [Command(arguments, **environment) for environment in environments(count)]


def outcome(started: list[Command] | list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    results = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, out, err) for process, (out, err) in zip(started, results, strict=True)]


def largest_difference(one: Path, other: Path) -> float:
    """Between the weights, averages and moments of two runs' last checkpoints."""
    worst = 0.0
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(checkpoint_path(run, 12) / f"{name}.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        worst = max(worst, *(float((a[key] - b[key]).abs().max()) for key in a))
    return worst


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory):
    """The same run by one process and by two; scored twice."""
    folder = tmp_path_factory.mktemp("runs")
    scored = ["--evaluation.score-every", "6", "--evaluation.score-images", "24", *FLAGS]
    assert run_command(["train", str(tiny_recipe), "--run", str(folder / "one"), *scored]) == 0
    results = outcome(launch("train", str(tiny_recipe), "--run", str(folder / "two"), *scored))
    assert [code for code, _, _ in results] == [0, 0], results
    assert "trained:" in results[0][1]
    assert results[1][1:] == ("", ""), "only the leader speaks"
    return folder


def test_two_processes_end_where_one_does(runs):
    assert largest_difference(runs / "one", runs / "two") < 2e-5
    assert sorted(p.name for p in (runs / "two").rglob("*")) == sorted(p.name for p in (runs / "one").rglob("*"))


@pytest.mark.slow
def test_two_processes_start_from_the_weights_that_process_0_has_read(runs, tiny_recipe, tmp_path):
    command = ["train", str(tiny_recipe), "--from", str(runs / "one"), *FLAGS, "--run"]
    assert run_command([*command, str(tmp_path / "one")]) == 0
    results = outcome(launch(*command, str(tmp_path / "two")))
    assert [code for code, _, _ in results] == [0, 0], results
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 2e-5


def test_two_processes_log_the_loss_of_the_whole_batch(runs):
    one, two = (read_lines(runs / name / "log.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert [x is None for x in a["loss_by_t"]] == [x is None for x in b["loss_by_t"]]


def test_two_processes_score_as_one_does(runs):
    one, two = (read_lines(runs / name / "scores.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [6, 12]
    for a, b in zip(one, two, strict=True):
        assert b["fid"]["value"] == pytest.approx(a["fid"]["value"], rel=1e-3)


@pytest.mark.parametrize("out", ["images.npz", "folder", "grid.png"])
def test_two_processes_sample_the_same_images(runs, tmp_path, out):
    command = ["sample", str(runs / "one"), "--num-images", "11", "--batch-size", "4", "--num-steps", "3"]
    command += ["--device", "cpu", "--out"]
    assert run_command([*command, str(tmp_path / f"one-{out}")]) == 0
    results = outcome(launch(*command, str(tmp_path / f"two-{out}")))
    assert [code for code, _, _ in results] == [0, 0], results
    one, two = tmp_path / f"one-{out}", tmp_path / f"two-{out}"
    if out == "images.npz":
        assert np.array_equal(np.load(one)["images"], np.load(two)["images"])
    elif out == "folder":
        names = sorted(path.name for path in one.glob("*.png"))
        assert len(names) == 11
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    else:
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.filterwarnings("ignore:.*is not the official")
def test_two_processes_evaluate_alike(runs, tmp_path, monkeypatch, dinov2_weights):
    command = ["evaluate", str(runs / "one"), "--features", "classifier", "dinov2", "--num-images", "50"]
    command += ["--dinov2-weights", str(dinov2_weights), "--num-steps", "2", "--kid-subsets", "5", "--bootstrap", "3"]
    command += ["--batch-size", "8", "--metrics", "fid", "is", "kid", "--device", "cpu", "--json", "--scores"]
    assert run_command([*command, str(tmp_path / "one.jsonl")]) == 0
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "another"))  # so that all is computed again
    results = outcome(launch(*command, str(tmp_path / "two.jsonl")))
    assert [code for code, _, _ in results] == [0, 0], results
    together, alone = results[0][1].splitlines(), (tmp_path / "one.jsonl").read_text().splitlines()
    assert len(together) == len(alone) == 2
    for record, expected in zip(map(json.loads, together), map(json.loads, alone), strict=True):
        for score in ("fid", "inception_score", "kid", "floor"):
            assert record[score] == expected[score], score
        assert record["images"]["sha256"] == expected["images"]["sha256"]
        assert record["features"] == expected["features"]


def wait_for_checkpoint(run: Path) -> None:
    until = time.monotonic() + 60
    while not checkpoint_steps(run):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_ends_the_run_and_another_number_resumes_it(tiny_recipe, runs, tmp_path, victim):
    long = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *FLAGS, "--training.keep-checkpoints", "0"]
    started = launch(*long, "--training.num-steps", "100000")
    wait_for_checkpoint(tmp_path / "run")
    started[victim].send_signal(signal.SIGKILL)
    results = outcome(started)
    assert results[victim][0] == -signal.SIGKILL
    code, _, err = results[1 - victim]
    assert code == 1, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1, err
    assert "another of the 2 processes ended; the same command continues from the newest checkpoint" in errors[0]
    # One process takes up what two left at step 4, and ends where one alone would have.
    steps = checkpoint_steps(tmp_path / "run")
    assert steps[0] == 4
    for step in steps[1:]:
        shutil.rmtree(checkpoint_path(tmp_path / "run", step))
    assert run_command([*long, "--training.num-steps", "12"]) == 0
    assert largest_difference(runs / "one", tmp_path / "run") < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_ends_sampling(runs, tmp_path, victim):
    command = ["sample", str(runs / "one"), "--batch-size", "4", "--num-steps", "3", "--device", "cpu", "--out"]
    started = launch(*command, str(tmp_path / "images"), "--num-images", "100000")
    until = time.monotonic() + 60
    while len(list((tmp_path / "images").glob("0*.png"))) < 4:  # the first batch, whole
        assert time.monotonic() < until, "no image"
        time.sleep(0.05)
    started[victim].send_signal(signal.SIGKILL)
    code, _, err = outcome(started)[1 - victim]
    assert code == 1, err
    last_line = err.splitlines()[-1]
    assert "error:" in last_line
    assert last_line.endswith("another of the 2 processes ended; give the same command again"), err
    assert "Traceback" not in err
    made = {path.name: path.read_bytes() for path in (tmp_path / "images").glob("*.png")}
    assert run_command([*command, str(tmp_path / "alone"), "--num-images", "4"]) == 0
    for path in (tmp_path / "alone").glob("*.png"):
        assert made[path.name] == path.read_bytes()


def test_a_command_that_fails_among_others_ends_with_its_own_code(tmp_path):
    """Python's teardown of the threads that wait for the others may abort the process: it is left out."""
    lines = [
        "import atexit, os",
        "from ddpm_lab.cli import main as cli",
        "from ddpm_lab.core import processes",
        "atexit.register(os.abort)",
    ]
    lines += ["processes._host_group = 'the others'", "cli.main(['sample', 'nowhere'])"]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")


@pytest.mark.slow
def test_another_number_of_processes_resumes(tiny_recipe, runs, tmp_path):
    """From step 8 of what two processes trained one goes on, and from what one trained two."""
    command = ["train", str(tiny_recipe), *FLAGS, "--run"]
    scored = ["--evaluation.score-every", "6", "--evaluation.score-images", "24"]
    for name, number in (("one", 2), ("two", 1)):
        run = tmp_path / name
        shutil.copytree(runs / name, run)
        shutil.rmtree(checkpoint_path(run, 12))
        assert checkpoint_steps(run) == [8]
        results = outcome(launch(*command, str(run), *scored, count=number))
        assert [code for code, _, _ in results] == [0] * number, results
        assert largest_difference(runs / "one", run) < 2e-5


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(tiny_recipe, tmp_path):
    """No line of the log is due for a long time, so that they agree because some seconds have passed."""
    rarely = [f"--{name}-every=1000000" for name in ("training.log", "training.checkpoint", "evaluation.validate")]
    rarely += ["--evaluation.sample-every=1000000", "--training.num-steps=1600"]
    started = launch("train", str(tiny_recipe), "--run", str(tmp_path / "run"), *FLAGS, *rarely)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "averages").exists():  # of step 100
        assert time.monotonic() < until
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    results = outcome(started)
    assert [code for code, _, _ in results] == [130, 130], results
    stopped = re.search(r"stopped at step (\d+)", results[0][2])
    assert stopped is not None, results
    assert checkpoint_steps(tmp_path / "run") == [int(stopped[1])]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "log.jsonl")] == [int(stopped[1])]


def test_processes_agree_at_steps_that_all_know(monkeypatch):
    """Two processes of different speed ask after the same steps, about every 2 seconds of process 0, or where told."""
    asked, clock, sent = {0: [], 1: []}, {0: 0.0, 1: 0.0}, []
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    agreements = {}
    for rank, pace in ((0, 0.125), (1, 0.4375)):
        told = iter(list(sent))
        monkeypatch.setattr(processes.time, "monotonic", lambda rank=rank: clock[rank])
        if rank == 0:
            monkeypatch.setattr(processes, "broadcast_number", lambda number: sent.append(number) or number)
        else:
            monkeypatch.setattr(processes, "broadcast_number", lambda number, told=told: next(told))
        agreements[rank] = processes.PeriodicAgreement()
        for step in range(1, 101):
            clock[rank] += pace
            monkeypatch.setattr(
                processes, "any_rank", lambda flag, rank=rank, step=step: asked[rank].append(step) or True
            )
            answer = agreements[rank].any_rank(False, now=step == 50)
            assert answer is (step in asked[rank][-1:])
    assert asked[0] == asked[1] == [1, 17, 33, 49, 50, 66, 82, 98]


@pytest.mark.slow
def test_an_overflow_in_one_process_skips_the_step_in_all(tiny_recipe, tmp_path):
    """In float16. The last process alone overflows, at step 6; the runs end as one that lacks this step."""
    code = """
import sys
from ddpm_lab.cli.main import main
from ddpm_lab.core import processes
from ddpm_lab.training import loop, optimizer
optimizer.FIRST_SCALE = 2.0**12  # at which no other step overflows
real, calls = loop.denoising_losses, []
def losses(*arguments):
    calls.append(None)
    return real(*arguments) * (1e30 if len(calls) == 6 and processes.rank() == processes.world_size() - 1 else 1)
loop.denoising_losses = losses
main(sys.argv[1:])
"""
    for name, count in (("one", 1), ("two", 2)):
        command = ["train", str(tiny_recipe), "--run", str(tmp_path / name), *FLAGS[:-1], "fp16"]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, *command],
                env=os.environ | environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for environment in environments(count)
        ]
        assert [code for code, _, _ in outcome(started)] == [0] * count
        log = read_lines(tmp_path / name / "log.jsonl")
        assert [line["skipped_steps"] for line in log] == [0, 0, 1, 0, 0, 0]
        assert log[-1]["loss_scale"] == 2.0**11
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-3


@pytest.mark.parametrize(
    ("arguments", "count", "message"),
    [
        (["train", "digits", "--run", "RUN", "--training.batch-size", "9"], 2, "must be a multiple of the 2 processes"),
        (
            ["study", "digits", "--out", "RUN"],
            2,
            "study runs in one process; only train, sample, evaluate",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch, capsys, arguments, count, message):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_invalid_environment_is_refused(monkeypatch, capsys, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    assert run_command(["info", "mnist"]) == 2
    assert f"error: environment variable {name} must be a whole number, not 'two'" in capsys.readouterr().err


def test_leftover_variables_of_a_launcher_are_ignored(monkeypatch):
    """A lone process of rank 1 would train to the end, and write nothing."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for count in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE") if count is None and "WORLD_SIZE" in os.environ else None
        monkeypatch.setenv("WORLD_SIZE", count) if count else None
        assert processes.is_rank0()
        assert processes.local_rank() == 0


def test_processes_connect_only_on_supported_devices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="not mps; give --device cpu"):
        processes.join(torch.device("mps"))


def waiting(seconds: float) -> subprocess.Popen:
    """A process that waits for another one, which never connects."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = "import datetime, torch, accelerate, sys; from ddpm_lab.core import processes\n"
    code += "from ddpm_lab.cli import main as cli\n"
    code += f"processes.MEETING = datetime.timedelta(seconds={seconds}); meet = accelerate.PartialState\n"
    code += "accelerate.PartialState = lambda **how: (print('here', flush=True), meet(**how))\n"
    code += "cli.main(['sample', 'mnist', '--out', 'a.png', '--device', 'cpu'])"
    others = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    others |= {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([sys.executable, "-c", code], env=os.environ | others, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "here\n"
    return started


def test_missing_processes_are_an_error():
    ((code, _, err),) = outcome([waiting(1.0)])
    assert code == 1
    assert "error: process 0 of 2 could not connect to the others" in err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_can_be_stopped(sent):
    started = waiting(100.0)
    time.sleep(1)  # until it waits
    begun = time.monotonic()
    started.send_signal(sent)
    started.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert started.returncode == -sent


def test_a_single_process_shares_nothing():
    rows = torch.arange(6)
    assert processes.rank_slice(rows) is rows
    assert processes.gather(rows) is rows
    assert list(processes.map_across_ranks("double", lambda x: 2 * x, iter([1, 2, 3]))) == [2, 4, 6]
    assert processes.run_on_rank0(lambda: 5, double=abs) == 5
    assert not processes.any_rank(False)
    assert not processes.is_on_another_rank(1)

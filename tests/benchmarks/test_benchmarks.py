"""The benchmark: turns and ratios by a clock of our own, contestants that do the same thing, a record of all of it."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.contest
from benchmarks import cases, gpu, scaling
from benchmarks.__main__ import main
from benchmarks.cases import (
    Subject,
    evaluation_contest,
    input_contest,
    sampling_contest,
    scoring_contest,
    statistics_contest,
    subject,
    training_contest,
)
from benchmarks.contest import Contest, installed_peers, run_contest, share_of_peak, table
from ddpm_lab.core.config import ModelConfig
from ddpm_lab.core.errors import RunError
from ddpm_lab.core.log import append_line
from ddpm_lab.training.cost import forward_flops

CPU = torch.device("cpu")
TINY = Subject("tiny", ModelConfig(base_channels=16, channel_multipliers=(1, 2), num_blocks=1, attention_levels=(1,),
                                   attention_head_channels=8, dropout=0.0, norm_groups=4), (3, 8, 8), 4)  # fmt: skip


def test_turns_are_taken_alternately_and_ratios_are_of_one_turn(monkeypatch):
    """A machine that is twice as slow from the second counted turn on leaves the ratios as they are."""
    clock, order = [0.0], []
    monkeypatch.setattr(benchmarks.contest.time, "perf_counter", lambda: clock[0])

    def contestant(name, seconds):
        def act():
            order.append(name)
            clock[0] += seconds * (2 if order.count(name) > 2 else 1) * (100 if order.count(name) == 1 else 1)

        return act

    record = run_contest(
        Contest("case", "images", 6, {"ours": contestant("ours", 2.0), "theirs": contestant("theirs", 3.0)}), 4
    )
    assert order == ["ours", "theirs"] * 5
    assert record["times_as_fast"] == {"theirs": {"median": 1.5, "low": 1.5, "high": 1.5}}
    assert record["seconds"]["ours"] == {"median": 4.0, "low": 3.5, "high": 4.0}  # 2, 4, 4, 4; the 200 does not count
    assert record["per_second"]["theirs"]["median"] == 1.0
    assert table(record)[1].split() == ["1.5", "(1.5", "to", "1.5)", "times", "as", "fast", "as", "theirs"]


def test_one_turn_is_its_own_spread():
    record = run_contest(Contest("case", "images", 1, {"ours": lambda: None}), 1)
    assert len(set(record["seconds"]["ours"].values())) == 1


def test_the_convolutions_are_all_found_and_their_operations_counted():
    model, x_t, t = TINY.build(CPU).eval(), torch.randn(2, 3, 8, 8), torch.tensor([0, 9])
    counted = 0
    for layer, shape, count in benchmarks.contest._convolutions(model, x_t, t):
        out = layer(torch.zeros(shape))
        counted += count * 2 * layer.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x_t, t)
    expected = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert counted == expected > 0


def test_share_of_peak_is_the_ratio_of_two_rates(monkeypatch):
    model, x_t, t = TINY.build(CPU).eval(), torch.randn(2, 3, 8, 8), torch.tensor([0, 9])
    monkeypatch.setattr(benchmarks.contest, "_fastest", lambda act, repeats=5: (act(), 1.0)[1])
    step = benchmarks.contest.evaluation_step(model, x_t, t, torch.float32)
    found = share_of_peak(model, x_t, t, torch.float32, step, training=False)
    layers = sum(count for *_, count in benchmarks.contest._convolutions(model, x_t, t))
    assert found["convolutions_alone_milliseconds"] == 1000 * layers
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x_t, t)
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert found["share"] == pytest.approx(
        2 * benchmarks.contest.forward_flops(model, (3, 8, 8)) * layers / convolutions
    )
    assert found["by_kind_milliseconds"]["convolutions"] > 0
    assert "the rest" in found["by_kind_milliseconds"]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("silu_backward", "activation"),
        ("silu_", "activation"),
        ("native_group_norm_backward", "normalisation"),
        ("convolution_backward", "convolutions"),
        ("_softmax_backward_data", "attention"),
        ("mm", "matrix products"),
        ("mmap", "the rest"),
        ("copy_", "copies and conversions"),
        ("lerp_", "optimiser, average, gradient norm"),
        ("Optimizer.step#Adam.step", "optimiser, average, gradient norm"),
        ("add_", "the rest"),
    ],
)
def test_operators_are_of_the_kind_of_their_work_on_the_way_back_and_in_place_too(operator, kind):
    assert benchmarks.contest._kind(operator) == kind


def test_operations_are_counted_as_by_hand(monkeypatch):
    """One level of 16 channels on 4x4 images of 3: every product that there is, attention's included, padding not."""
    of = Subject("one", ModelConfig(base_channels=16, channel_multipliers=(1,), num_blocks=1, attention_levels=(),
                                    attention_head_channels=8, dropout=0.0, norm_groups=4), (3, 4, 4), 2)  # fmt: skip
    model, x_t, t = of.build(CPU).eval(), torch.randn(2, 3, 4, 4), torch.tensor([0, 9])
    pixels, taps = 16, 9
    convolutions = taps * pixels * (3 * 16 + 16 * 3)  # in and out
    convolutions += taps * pixels * (3 * (16 * 16 + 16 * 16))  # down, two in the middle
    convolutions += 2 * pixels * (taps * (32 * 16 + 16 * 16) + 32 * 16)  # up, with shortcuts
    linear = 16 * 64 + 64 * 64 + 5 * 64 * 16  # time embedding, and what five blocks make of it
    attention = pixels * 16 * 48 + pixels * 16 * 16 + 2 * pixels * pixels * 16
    by_hand = 2 * (convolutions + linear + attention)
    assert forward_flops(model, (3, 4, 4)) == by_hand
    monkeypatch.setattr(benchmarks.contest, "_fastest", lambda act, repeats=5: (act(), 0.5)[1])
    for training in (False, True):
        step = benchmarks.contest.evaluation_step(model, x_t, t, torch.float32)
        found = share_of_peak(model, x_t, t, torch.float32, step, training)
        assert found["step_flops_per_second"] == 2 * by_hand * (3 if training else 1) / 0.5


@pytest.mark.skipif(len(installed_peers()) < 2, reason="needs both peers")
def test_contestants_are_peers_of_the_same_size():
    contest = evaluation_contest(TINY, CPU, torch.float32)
    assert list(contest.contestants) == ["ddpm-lab", "diffusers", "denoising-diffusion-pytorch"]
    from benchmarks.cases import _peer_networks

    model = TINY.build(CPU).eval()
    for parameter in model.parameters():  # as built, the last layer is zero
        torch.nn.init.normal_(parameter, std=0.2)
    peers = _peer_networks(TINY, model)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        torch.testing.assert_close(peers["diffusers"](x_t, t).sample, model(x_t, t), rtol=1e-4, atol=1e-4)
        assert peers["denoising-diffusion-pytorch"](x_t, t).shape == x_t.shape
    small = subject("small")
    with torch.device("meta"):
        ours = sum(p.numel() for p in small.build(torch.device("meta")).parameters())
    theirs = sum(p.numel() for p in _peer_networks(small, small.build(CPU))["denoising-diffusion-pytorch"].parameters())
    assert 1.7e6 < ours < 1.72e6
    assert 0.75 < theirs / ours < 1.33


def test_every_contest_runs():
    held = [
        training_contest(TINY, CPU, torch.float32),
        training_contest(TINY, CPU, torch.bfloat16),
        sampling_contest(TINY, CPU, num_images=2, num_steps=2),
        statistics_contest(num_features=8, num_images=32),
    ]
    with input_contest(TINY, CPU, batches=2) as reading:
        for contest in (*held, reading):
            record = run_contest(contest, 1)
            assert set(record["seconds"]) == set(contest.contestants)
            assert all(spread["median"] > 0 for spread in record["seconds"].values())
            assert len(contest.contestants) >= 1 + len(installed_peers()) * (contest.case[:10] != "statistics")


@pytest.mark.slow
def test_those_who_score_find_the_same():
    with scoring_contest(CPU, 12) as contest:
        ours, theirs = (contestant() for contestant in contest.contestants.values())
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.parametrize("name", ["_our_step", "_diffusers_step", "_denoising_step"])
def test_a_training_step_moves_the_weights(name, monkeypatch):
    """A contestant that did nothing would win."""
    if name != "_our_step" and len(installed_peers()) < 2:
        pytest.skip("needs both peers")
    trained: list[list[torch.nn.Parameter]] = []
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):

        def note(parameters, *args, optimizer=optimizer, **kwargs):
            trained.append(list(parameters))
            return optimizer(trained[-1], *args, **kwargs)

        monkeypatch.setattr(f"torch.optim.{optimizer.__name__}", note)
    act = getattr(cases, name)(TINY, CPU, torch.float32)
    before = [parameter.detach().clone() for parameter in trained[0]]
    act()
    act()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained[0], strict=True))


def test_the_command_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.statistics_contest", lambda: statistics_contest(8, 32))
    monkeypatch.setattr("benchmarks.cases.scoring_contest", lambda on: nullcontext(statistics_contest(8, 32)))
    out = tmp_path / "bench.json"
    flags = ["--network", "digits", "--batch-size", "4", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    assert main(flags) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    held = [contest["case"].split(",")[0] for contest in record["contests"]]
    assert {"evaluation", "training step", "sampling", "input path"} <= set(held)
    assert held.count("statistics and Frechet distance") == 2, "in place of the long scoring, too"
    assert set(record["peak"]) == {"evaluation", "training step"}
    assert record["network"]["name"] == "digits"
    assert record["conditions"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "times as fast as diffusers" in said
    assert "% of the measured peak" in said


def test_absent_peers_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.contest, "PEERS", {})
    monkeypatch.setattr("benchmarks.cases.PEERS", {"diffusers": "diffusers"})
    flags = ["--network", "digits", "--batch-size", "4", "--repeats", "1", "--device", "cpu", "--cases", "evaluation"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "not installed, and so left out: diffusers" in said
    assert "times as fast" not in said


@pytest.mark.parametrize(("flags", "told"), [
    ("--network nothing", "--network must be small or one of the recipes"),
    ("--repeats 0", "--repeats must be from 1 to 1000"),
    ("--batch-size 0", "--batch-size must be from 1 to 65536"),
    ("--out nowhere/b.json", "does not exist"),
    ("--out b.txt", "must end in .json"),
])  # fmt: skip
def test_wrong_input_is_told_in_one_line(flags, told, capsys):
    assert main(flags.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert told in said


def test_a_command_is_measured_with_its_processes():
    """Two that take 60 MiB more in one of them, and half a second; a failure is told by its last line."""
    code = "import os, time; time.sleep(0.5); x = bytearray(int(os.environ['RANK']) * 60 * 2**20); print(len(x))"
    alone = scaling.cost_of((sys.executable, "-c", code.replace("os.environ['RANK']", "0")))
    shared = scaling.cost_of((sys.executable, "-c", code), processes=2)
    assert alone.seconds > 0.5
    assert 50 < shared.mebibytes - alone.mebibytes < 70
    scaling.cost_of((sys.executable, "-c", "import os; assert os.environ['DDPM_CACHE_DIR'] == 'own'"), cache="own")
    with pytest.raises(RunError, match="failed: ZeroDivisionError: division by zero"):
        scaling.cost_of((sys.executable, "-c", "1 / 0"))


def test_scaling_counts_a_rate_without_the_start(monkeypatch):
    """Commands that take 3 seconds and a thousandth an image, half of it with two processes; nothing is started."""
    begun = []

    def cost_of(command, processes=1, cache=None):
        assert not Path(cache).exists(), "what was kept from another time would cost nothing"
        begun.append(command)
        count = int(command[command.index("--num-images") + 1]) if "--num-images" in command else 0
        if "train" in command:
            run = Path(command[command.index("--run") + 1])
            run.mkdir()
            rates = (1, 200 * processes, 200 * processes, 7000)
            for step, rate in enumerate(rates):
                append_line(run / "log.jsonl", {"step": step, "seconds": 1.0, "images_per_second": rate})
        return scaling.Cost(3 + count / 1000 / processes, 100.0)

    monkeypatch.setattr(scaling, "cost_of", cost_of)
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)
    said = []
    records = scaling.scaling("cpu", said.append, images=(100, 1200), num_steps=4)
    rates = {(r["what"], r["processes"]): r["images_per_second"] for r in records if r["images_per_second"]}
    assert rates["training", 1] == 200
    assert rates["training", 2] == 400
    assert rates["sampling", 1] == pytest.approx(1000)
    assert rates["sampling", 2] == pytest.approx(2000)
    assert len(said) == len(records) == 4 + 2 * 2 + 1
    assert len(begun) == 2 + 4 + 4 + 1
    assert "sampling, 2 processes: 1,200 images in 3.6 s, 2,000 images/s, 100 MiB at most" in said
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 1)
    records = scaling.scaling("cpu", said.append, images=(100, 1200), num_steps=4)
    assert {record["processes"] for record in records} == {1}
    assert any(line.startswith("more than 1 processes are not measured") for line in said)


@pytest.mark.slow
def test_the_gpu_measurements_run_dry_and_go_on(tmp_path):
    """Every part of `benchmarks.gpu` on the CPU; what is there already is not measured again."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    environment = os.environ | {"DDPM_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    records = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in gpu.PARTS}
    assert all(record["part"] == part for part, record in records.items())
    contests = [records["training"], records["sampling"], *records["noise"]["by_batch_size"].values()]
    contests += [records["files"]["writing"], records["files"]["scoring"], records["scoring"]]
    assert [contest["failed"] for contest in contests] == [{}] * 7
    trained = {name.removeprefix("ddpm-lab, ") for name in records["training"]["seconds"]}
    named = {"ddpm-lab", "float32", "bf16", "float32 with TF32", "compiled", "channels last", "CUDA graphs"}
    assert named <= trained
    assert "diffusers" in trained or "diffusers" not in installed_peers()
    assert sum(kernel["share"] for kernel in records["profile"]["kernels"]) > 0.8
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.count("is there") == len(gpu.PARTS)


def test_a_contestant_that_fails_leaves_the_others(tmp_path, capsys):
    measured = gpu.Measurements(tmp_path, "cpu", "digits", steps=1, images=4, dry=True)

    def fail():
        raise RuntimeError("no compiler")

    record = measured.contest("case", 1, {"ours": lambda: None, "compiled": fail, "theirs": lambda: None})
    assert list(record["seconds"]) == ["ours", "theirs"]
    assert record["failed"] == {"compiled": "RuntimeError: no compiler"}
    assert "compiled failed" in capsys.readouterr().out


def test_tf32_is_on_only_within_its_turn():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    assert gpu.within(lambda: gpu.tf32(matmul=False), flags)() == (False, True)
    assert gpu.within(gpu.tf32, flags)() == (True, True)
    assert flags() == before

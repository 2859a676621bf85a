"""A study: its cells, what is never computed twice, what a failure leaves alone, and what is concluded."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ddpm_lab import study as study_module
from ddpm_lab.cell import _left, planned_evaluations
from ddpm_lab.charts import Series, line_chart
from ddpm_lab.grid import Study, cell_folder, is_done, open_study, read_study
from ddpm_lab.lease import leased
from ddpm_lab.log import read_lines
from ddpm_lab.page import short
from ddpm_lab.report import (
    _cost_series,
    _other_answers,
    _repeating,
    _training_series,
    report_page,
    write_report,
)
from ddpm_lab.results import SUMMARY, CellResult, Results, answer, as_csv, compare, gather
from ddpm_lab.settings import InputError, RunError, packaged
from ddpm_lab.study import run_study

from .conftest import TINY_RECIPE

DIGITS = read_study("digits")
TINY_STUDY = """
recipe = "tiny.toml"
question = "Is it <quick>?"

[grid]
num_timesteps = [30, 60]

[measures]
checkpoints = 2
images = 20
final_images = 20
samplers = ["ddim-5", "ddim-50", "dpmpp-5"]
ancestral_images = 20
bound_images = 4

[settings.training]
num_steps = 4
checkpoint_every = 2
"""


@pytest.fixture
def study_file(tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    (tmp_path / "small.toml").write_text(TINY_STUDY.replace("[30, 60]", "[50, 60]"))
    return tmp_path / "small.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished study; tests must not change it."""
    place = tmp_path_factory.mktemp("study")
    (place / "tiny.toml").write_text(TINY_RECIPE)
    (place / "small.toml").write_text(TINY_STUDY.replace("[30, 60]", "[50, 60]"))
    run_study(read_study(str(place / "small.toml")), place / "out", device="cpu")
    return place / "out"


def test_a_thousand_steps_are_one_cell_for_both_conventions():
    study = dataclasses.replace(read_study("digits"))
    assert [cell.name for cell in study.cells] == [
        "T500-rescaled-seed0", "T1000-seed0", "T2000-rescaled-seed0", "T500-fixed-seed0", "T2000-fixed-seed0",
        "continuous-seed0",
    ]  # fmt: skip
    assert [cell.index for cell in study.cells] == list(range(6))
    chains = [cell.config.diffusion for cell in study.cells]
    assert [chain.rescale_betas for chain in chains] == [True, True, True, False, False, True]
    assert study.cells[-1].sampled_as == (500, 1000, 2000)
    everything_else = {json.dumps(c.config.to_dict() | {"diffusion": None}, sort_keys=True) for c in study.cells}
    assert len(everything_else) == 1  # the same images, steps and seed for all


@pytest.mark.parametrize("name", packaged("study"))
def test_packaged_studies_are_whole(name):
    study = read_study(name)
    again = Study(
        study.name, study.question, study.recipe, type(study.grid).from_dict(study.to_dict()["grid"]), study.measures
    )
    assert again.cells == study.cells
    for cell in study.cells:
        assert len(range(0, cell.config.training.num_steps, cell.config.evaluation.score_every)) >= 3


def test_a_study_is_computed_whole_and_reported(finished):
    study = open_study(finished)
    assert len(study.cells) == 5
    for cell in study.cells:
        folder = cell_folder(finished, cell)
        done = json.loads((folder / "done.json").read_text())
        assert done["images"] == 32
        assert done["seconds_of_training"] > 0
        scores = [line["step"] for line in read_lines(folder / "scores.jsonl") if line.get("by") == "training"]
        assert scores == [2, 4]
        keys = [line["key"] for line in read_lines(folder / "measures.jsonl")]
        if cell.sampled_as:
            assert keys == ["speed", "ddim-50 as T=50", "ddim-50 as T=60", "bound"]
        else:
            assert keys == ["speed", "ddim-5", "ddim-50", "dpmpp-5", "ancestral", "bound"]
        for name in ("samples.png", "forward.gif", "reverse.gif") + ("ancestral.png",) * (not cell.sampled_as):
            assert (folder / name).stat().st_size > 500
    records = json.loads((finished / "results.json").read_text())
    assert len(records) == 5 * 2 + 4 * 6 + 4
    assert {record["num_timesteps"] for record in records if record["key"].startswith("ddim-50")} == {50, 60}
    rows = (finished / "results.csv").read_text().splitlines()
    assert len(rows) == len(records) + 1
    assert rows[0].startswith("cell,seed,trained_timesteps")


def test_the_page_needs_nothing_but_itself(finished):
    page = (finished / "report.html").read_text()
    assert "Is it &lt;quick&gt;?" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert page.count("data:image/gif") == 5 * 2
    assert page.count("<svg") == 5
    assert len(re.findall(r"<title>[^<]*fixed-seed0[^<]*</title>", page)) > 4  # dots say what they are
    for target in re.findall(r'href="#(record-\d+)"', page):
        assert f'id="{target}"' in page


def test_a_finished_cell_is_never_computed_twice(finished, monkeypatch):
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed again"))
    said = []
    run_study(open_study(finished), finished, device="cpu", say=said.append)
    assert "5 cells, 5 done" in said[0]


def test_what_a_study_found_can_be_kept_and_continued_without_its_networks(finished, tmp_path, monkeypatch):
    """Checkpoints and grids of a finished cell may go: the study is reported alike, and goes on with the rest."""
    kept = tmp_path / "kept"
    shutil.copytree(finished, kept, ignore=shutil.ignore_patterns("checkpoints", "samples", "*.lease", "report.html"))
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed again"))
    run_study(open_study(kept), kept, device="cpu")
    for name in ("results.json", "results.csv", "report.html"):
        assert (kept / name).read_bytes() == (finished / name).read_bytes()
    missing = open_study(kept).cells[3]
    shutil.rmtree(kept / "cells" / missing.name)
    again = []
    monkeypatch.setattr(study_module, "compute_cell", lambda study, cell, *given, **more: again.append(cell.name))
    monkeypatch.setattr(study_module, "write_report", lambda out: "reported")
    run_study(open_study(kept), kept, device="cpu")
    assert again == [missing.name]


def test_what_fails_is_told_and_stops_no_other(study_file, tmp_path, monkeypatch):
    study = read_study(str(study_file))
    done = []

    def compute(study, cell, folder, *rest, **more):
        if cell.index == 1:
            raise RunError("the loss is not finite")
        folder.mkdir()
        (folder / "done.json").write_text(json.dumps({name: kind() for name, kind in SUMMARY.items()}))
        done.append(cell.index)

    monkeypatch.setattr(study_module, "compute_cell", compute)
    monkeypatch.setattr(study_module, "write_report", lambda out: "reported")
    out = tmp_path / "out"
    with pytest.raises(RunError, match="1 of 5 cells failed: T60-rescaled-seed0"):
        run_study(study, out, device="cpu")
    assert done == [0, 2, 3, 4]
    failure = json.loads((out / "cells" / "T60-rescaled-seed0.failed.json").read_text())
    assert failure["error"] == "the loss is not finite"
    assert [result.failure for result in gather(out).cells][1] == "the loss is not finite"
    monkeypatch.setattr(
        study_module,
        "compute_cell",
        lambda study, cell, folder, *a, **k: (folder.mkdir(), (folder / "done.json").write_text("{}")),
    )
    run_study(study, out, device="cpu")
    assert not list((out / "cells").glob("*.failed.json"))
    with pytest.raises(InputError, match=r"T60-rescaled-seed0/done.json is not what a study writes"):
        gather(out)


def test_a_study_that_nobody_listens_to_ends_and_its_cell_has_not_failed(study_file, tmp_path, monkeypatch):
    def compute(*given, **more):
        raise BrokenPipeError

    monkeypatch.setattr(study_module, "compute_cell", compute)
    with pytest.raises(BrokenPipeError):
        run_study(read_study(str(study_file)), tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out" / "cells").glob("*.failed.json"))


def test_a_cell_that_another_holds_is_left_to_it(study_file, tmp_path, monkeypatch):
    study, out, said = read_study(str(study_file)), tmp_path / "out", []
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed"))
    study_module._claim_folder(study, out)
    monkeypatch.setattr(study_module, "SECONDS", 0.5)
    with leased(out / "cells" / f"{study.cells[2].name}.lease"):
        run_study(study, out, cell=2, device="cpu", say=said.append)
    assert said[-1] == f"left to other workers, which are at it: {study.cells[2].name}"


def test_a_cell_whose_worker_dies_meanwhile_is_taken_up(study_file, tmp_path, monkeypatch):
    study, out, computed = read_study(str(study_file)), tmp_path / "out", []

    def compute(study, cell, folder, *rest, **more):
        computed.append(cell.index)
        folder.mkdir()
        (folder / "done.json").write_text(json.dumps({name: kind() for name, kind in SUMMARY.items()}))
        if cell.index == 4:
            in_a_second = time.time() - 119.0  # from when it counts as dead
            os.utime(lease, (in_a_second, in_a_second))

    monkeypatch.setattr(study_module, "compute_cell", compute)
    monkeypatch.setattr(study_module, "write_report", lambda out: "reported")
    monkeypatch.setattr(study_module, "SECONDS", 5.0)
    study_module._claim_folder(study, out)
    lease = out / "cells" / f"{study.cells[1].name}.lease"
    lease.write_text('{"owner": "another-machine/pid:[1] 1 x"}')
    run_study(study, out, device="cpu")
    assert computed == [0, 2, 3, 4, 1]


def worker(study_file, out, *more):
    command = [sys.executable, "-m", "ddpm_lab", "study", str(study_file), "--out", str(out), "--device", "cpu", *more]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # as in this process, for sums of two threads differ in their bits
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_killed_studies_end_in_the_same_results(study_file, tmp_path, finished):
    out = tmp_path / "out"
    cells = [cell_folder(out, cell) for cell in read_study(str(study_file)).cells]
    for awaited in (cells[0] / "checkpoints", cells[0] / "measures.jsonl", cells[2] / "samples.png"):
        process = worker(study_file, out)
        deadline = time.monotonic() + 120
        while not awaited.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # in the midst of it, not after its end
        process.communicate()
    process = worker(study_file, out)
    process.communicate()
    assert process.returncode == 0
    assert essential(out) == essential(finished)


@pytest.mark.slow
def test_two_workers_share_a_folder_and_each_cell_is_computed_once(study_file, tmp_path, finished):
    out = tmp_path / "out"
    workers = [worker(study_file, out) for _ in range(2)]
    said = [process.communicate()[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    study = open_study(out)
    started = [re.findall(r"cell \d of 0 \.\. 4: (\S+)", text) for text in said]
    assert sorted(started[0] + started[1]) == sorted(cell.name for cell in study.cells)
    assert all(is_done(out, cell) for cell in study.cells)
    assert essential(out) == essential(finished)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts jobs of an array as Slurm would: `srun` runs what follows its options, `scontrol` notes what it hears."""
    commands = tmp_path / "commands"
    commands.mkdir()
    ddpm = Path(sys.executable).with_name("ddpm")
    options = 'while [[ "$1" == --* ]]; do shift; done; [ "$1" = ddpm ] && shift'
    (commands / "srun").write_text(f'#!/usr/bin/env bash\n[ -z "$FAIL" ] || exit $FAIL\n{options}\nexec {ddpm} "$@"\n')
    (commands / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/told\n')
    for path in commands.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    script = Path(__file__).parent.parent / "scripts" / "study.slurm"

    def submit(study, out, *indices, **environment):
        common = os.environ | {"SLURM_ARRAY_JOB_ID": "7", "OMP_NUM_THREADS": "1", "FAIL": ""} | environment
        jobs = [
            subprocess.Popen(
                ["bash", str(script), str(study), str(out)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=common | {"SLURM_ARRAY_TASK_ID": str(index)},
            )
            for index in indices
        ]  # fmt: skip
        said = [job.communicate(timeout=240)[0] for job in jobs]
        return [job.returncode for job in jobs], said

    return submit


@pytest.mark.slow
def test_an_array_of_jobs_computes_a_cell_each(slurm, study_file, tmp_path):
    codes, said = slurm(study_file, tmp_path / "out", 0, 1)
    assert codes == [0, 0], said
    assert "cell 0 of" in said[0]
    cells = open_study(tmp_path / "out").cells
    assert [is_done(tmp_path / "out", cell) for cell in cells] == [True, True, False, False, False]
    codes, said = slurm(study_file, tmp_path / "out", 0)
    assert codes == [0]
    assert "cell 0 of" not in said[0], "a finished cell is not computed again"


def test_a_job_that_ran_out_of_time_goes_back_into_the_queue(slurm, study_file, tmp_path):
    assert slurm(study_file, tmp_path / "out", 3, FAIL="130")[0] == [130]
    assert (tmp_path / "told").read_text() == "requeue 7_3\n"
    (tmp_path / "told").unlink()
    assert slurm(study_file, tmp_path / "out", 3, FAIL="1")[0] == [1]
    assert not (tmp_path / "told").exists()


def essential(out):
    """All records without what depends on the clock or on where the folder lies."""
    volatile = {"seconds", "seconds_an_image", "seconds_an_evaluation", "source"}
    kept = []
    for record in json.loads((out / "results.json").read_text()):
        images = record.get("images")
        kept.append({k: v for k, v in record.items() if k not in volatile})
        if isinstance(images, dict):
            kept[-1]["images"] = images["sha256"]
    return kept


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("done.json", {"seconds_of_training": float("nan")}, "it has no seconds_of_training, or one of another kind"),
        ("done.json", {"images": "many"}, "it has no images"),
        ("done.json", {"versions": 3}, "it has no versions"),
        ("measures.jsonl", {"num_timesteps": None}, "it has no ddim-5: num_timesteps"),
        ("measures.jsonl", {"fid": 3}, "it has no ddim-5: fid: value"),
        ("measures.jsonl", {"kid": {"value": 1.0, "low": "x", "high": 2.0}}, "it has no ddim-5: kid: low"),
        ("measures.jsonl", {"fid": {"value": 1.0, "low": None, "high": None}}, "it has no ddim-5: fid: low"),
        ("measures.jsonl", {"floor": []}, "it has no ddim-5: floor: num_images"),
        ("scores.jsonl", {"fid_label": 7}, "it has no 2: fid_label"),
    ],
)
def test_records_that_no_study_writes_are_told(finished, tmp_path, name, change, message):
    """Found by scripts/fuzz.py."""
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "cells" / "T50-rescaled-seed0" / name
    lines = [path.read_text()] if name == "done.json" else path.read_text().splitlines(keepends=True)
    row = 1 if name == "measures.jsonl" else 0  # the first is of the speed
    lines[row] = json.dumps(json.loads(lines[row]) | change) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        write_report(tmp_path / "out")
    assert str(path) in str(refused.value)


def made_up(values, betas=("rescaled", "fixed"), seeds=(0, 1, 2)):
    """Results with given scores: {(T, kind of betas, seed): (value, half of its interval)}."""
    study = dataclasses.replace(DIGITS, grid=dataclasses.replace(DIGITS.grid, seeds=seeds, betas=betas))
    cells = []
    for cell in study.cells:
        diffusion, seed = cell.config.diffusion, cell.config.training.seed
        kind = {"fixed range": "fixed"}.get(diffusion.beta_convention, diffusion.beta_convention)
        records = []
        if (diffusion.num_timesteps, kind, seed) in values and not cell.sampled_as:
            value, half = values[diffusion.num_timesteps, kind, seed]
            found = {"value": value, "low": value - half, "high": value + half}
            chain = {"num_timesteps": diffusion.num_timesteps, "trained_convention": diffusion.beta_convention}
            records = [{"key": "ddim-50", "fid": found, "fid_label": "FD-classifier (n=360)", **chain}]
        cells.append(CellResult(cell, Path(), {}, None, records))
    return Results(study, cells)


def rescaled(values):
    return {(T, "rescaled", seed): score for (T, seed), score in values.items()}


def test_one_seed_is_compared_by_the_intervals_of_the_images():
    values = rescaled({(500, 0): (3.0, 0.392), (1000, 0): (1.0, 0.392), (2000, 0): (1.2, 0.392)})
    compared = compare(made_up(values), "fid", "ddim-50")
    # Deviations of 0.2; the studentised range of three with no end of freedom is 3.314.
    assert compared.half == pytest.approx(3.314 * 0.2, rel=2e-3)
    assert compared.extremes == (1000, 500)
    sentence = answer(made_up(values))
    assert "T = 1000 scores better than T = 500 by 2 (95 % interval 2 +- 0.66)" in sentence
    assert "not the training seed" in sentence


def test_a_difference_within_its_interval_is_none():
    sentence = answer(made_up(rescaled({(500, 0): (1.1, 0.3), (1000, 0): (1.0, 0.4), (2000, 0): (1.2, 0.1)})))
    assert "between T = 500, 1000 and 2000 there is no difference larger than" in sentence
    assert "scores better" not in sentence


def test_seeds_are_compared_by_their_spread_and_only_those_that_all_share():
    values = {(500, s): (v, 9.0) for s, v in enumerate((1.0, 1.2, 1.4))} | {
        (1000, s): (v, 9.0) for s, v in enumerate((3.0, 3.2, 3.4))
    }
    compared = compare(made_up(rescaled(values)), "fid", "ddim-50")
    # Pooled variance 0.04 with 4 degrees of freedom; the studentised range of two is t sqrt(2) = 2.776 * 1.414.
    assert compared.half == pytest.approx(2.776 * 2**0.5 * (0.04 / 3) ** 0.5, rel=1e-3)
    assert compared.means == pytest.approx({500: 1.2, 1000: 3.2})
    assert "3 training seeds" in answer(made_up(rescaled(values)))
    del values[1000, 2], values[1000, 1]
    alone = compare(made_up(rescaled(values)), "fid", "ddim-50")
    assert alone.means == pytest.approx({500: 1.0, 1000: 3.0})  # of seed 0, though T = 500 has three
    assert compare(made_up(rescaled({(500, 0): (1.0, 0.1)})), "fid", "ddim-50") is None


def test_the_interval_holds_for_the_largest_of_the_differences():
    """Among equal lengths a difference is called one about once in twenty, though the largest of three is told."""
    generator, called = random.Random(0), 0
    for _ in range(400):
        values = rescaled({(T, 0): (generator.gauss(5, 0.2), 0.392) for T in (500, 1000, 2000)})
        called += "scores better" in answer(made_up(values, seeds=(0,)))
    assert 6 <= called <= 36


@pytest.mark.parametrize("betas", [("rescaled", "cosine"), ("cosine", "rescaled"), ("fixed", "rescaled"), ("fixed",)])
def test_lengths_are_compared_within_one_kind_of_betas(betas):
    scores = {"rescaled": 1.0, "cosine": 5.0, "fixed": 9.0}
    values = {(T, kind, 0): (scores[kind] + T / 1e5, 0.1) for kind in scores for T in (500, 1000, 2000)}
    compared = compare(made_up(values, betas, (0,)), "fid", "ddim-50")
    kind = betas[0] if betas[0] != "fixed" else betas[-1]
    assert set(compared.means) == {500, 1000, 2000}
    assert compared.means[500] == pytest.approx(scores[kind] + 0.005)
    assert compared.seeds == 1


def test_a_kind_of_chain_is_named_though_its_first_seed_failed():
    """Of seed 0 there are scores in the course of training only; the legend of the end's charts is seed 1's."""
    results = made_up(rescaled({(500, 1): (1.0, 0.1), (1000, 1): (2.0, 0.1)}), seeds=(0, 1))
    (failed,) = (r for r in results.cells if r.cell.name == "T500-rescaled-seed0")
    found = {"value": 3.0, "low": 2.0, "high": 4.0}
    failed.records.append({"key": "training", "fid": found, "fid_label": "FD (n=20)", "images_seen": 80})
    for result in results.cells:
        for record in result.records:
            record |= {"sampler": "ddim", "num_evaluations": 50}
    for series in (_training_series(results), _cost_series(results, "num_evaluations", "evaluations")):
        assert [one.name for one in series].count(failed.cell.label) == 1


def test_charts_say_what_their_dots_are():
    points = [(1, 2, 1.5, 2.5, "T < 5: 2"), (2, 3, None, None, "b")]
    svg = line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")
    assert svg.startswith("<svg")
    assert "<title>T &lt; 5: 2</title>" in svg
    assert "one &amp; two" in svg
    assert svg == line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")


@pytest.mark.parametrize(("level", "told"), [(1.5, "floor"), (0.125, "floor, 0.12")])
def test_a_level_far_below_is_told_and_not_drawn(level, told):
    """Else most of a logarithmic chart is the way down to it."""
    series = [Series("a", "#0072B2", [(1, 2, 1.9, 2.1, "here"), (2, 3, 2.9, 3.1, "there")])]
    svg = line_chart("a", series, "x", "y", log_y=True, level=(level, "floor"))
    assert f">{told}</text>" in svg
    assert svg.count("stroke-dasharray: 1,2") == (2 if told == "floor" else 0)  # the line, and its piece in the legend


def test_a_page_of_a_study_under_way_says_what_is_missing(study_file, tmp_path):
    study = read_study(str(study_file))
    out = tmp_path / "out"
    run_study(study, out, cell=0, device="cpu")
    results = gather(out)
    assert sum(result.done is not None for result in results.cells) == 1
    page = report_page(results)
    assert "Not all is done" in page
    assert "Fewer than two lengths" in page


def test_csv_has_a_cell_for_each_column(finished):
    lines = as_csv(gather(finished).records).splitlines()
    assert len({line.count(",") for line in lines}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('recipe = "none"', "no recipe 'none'"),
        ("recipe = 3", "must name a recipe"),
        ("[grid]\nnum_timesteps = []", "is empty"),
        ("[grid]\nnum_timesteps = [20]", "more than 20"),
        ("[grid]\nnum_timesteps = [50, 50]", "twice"),
        ("[grid]\nbetas = ['sigmoid']", "betas"),
        ("[grid]\nseeds = [-1]", "at least 0"),
        ("[grid]\nT = 3", "no setting 'T'"),
        ("[measures]\nsamplers = ['ddim-10']", "must name ddim-50"),
        ("[measures]\nsamplers = ['ddim', 'ddim-50']", "as 'ddim-50'"),
        ("[measures]\nsamplers = ['euler-5', 'ddim-50']", "sampler"),
        ("[measures]\nsamplers = ['ddim-600', 'ddim-50']", "more steps than the shortest chain"),
        ("[measures]\nimages = 3", "at least 20"),
        ("[settings.training]\nlr = 3", "no setting 'lr'"),
        ("[settings]\ntraining = 3", "must be a table"),
        ("[settings.diffusion]\nschedule = 'cosine'", "settings.diffusion.schedule is what grid.betas decides"),
        ("[settings.training]\nseed = 7", "settings.training.seed is what grid.seeds decides"),
        ("[settings.evaluation]\nscore_every = 9", "is what measures.checkpoints decides"),
        ("cells = 5", "no setting 'cells'"),
        ('recipe = "flat.toml"', "training must be a table"),
        ("[grid", "not a TOML file"),
    ],
)
def test_bad_studies_are_refused(tmp_path, change, words):
    path = tmp_path / "bad.toml"
    (tmp_path / "flat.toml").write_text("training = 3")
    path.write_text(change if change.startswith("recipe") else f'recipe = "digits"\n{change}\n')
    with pytest.raises(InputError, match=re.escape(words)):
        read_study(str(path))


@pytest.mark.parametrize(
    ("betas", "process", "named"),
    [
        (("rescaled", "fixed"), "rescaled", "of each length with rescaled betas, "),
        (("cosine",), "cosine", "of each length with cosine betas, "),
        (("fixed",), "rescaled", "of each length with rescaled betas, "),
    ],
)
def test_continuous_time_is_the_process_that_it_is_compared_with(betas, process, named):
    grid = dataclasses.replace(DIGITS.grid, betas=betas, continuous=True)
    study = dataclasses.replace(DIGITS, grid=grid)
    cell = study.cells[-1]
    assert cell.sampled_as == grid.num_timesteps
    assert cell.config.diffusion.beta_convention == process
    assert cell.label == f"continuous time, {process}"
    record = {"key": "ddim-50 as T=1000", "num_timesteps": 1000, "fid": {"value": 1.5}, "fid_label": "FD"}
    said = _other_answers(Results(study, [CellResult(cell, Path(), None, None, [record])]))
    assert [named in line for line in said] == [True]


def test_a_floor_stands_beside_the_scores_of_all_steps(finished):
    page = report_page(gather(finished))
    (record,) = [r for r in gather(finished).cells[0].records if r["key"] == "ancestral"]
    assert (
        page.count(f"<td>{short(record['floor']['kid'])}<small>n=20</small></td><td></td><td></td><td></td></tr>") == 1
    )


def test_a_page_names_every_machine_and_precision(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert write_report(out)
    alone = (out / "report.html").read_text()
    assert alone.count(">Computed on cpu (") == 1
    assert "others in" not in alone
    other = out / "cells" / "T60-fixed-seed0"
    done = json.loads((other / "done.json").read_text())
    (other / "done.json").write_text(json.dumps(done | {"machine": "aarch64, NEON", "threads": 7}))
    lines = [json.loads(line) for line in (other / "measures.jsonl").read_text().splitlines()]
    changed = [line | ({"dtype": "bfloat16"} if "dtype" in line else {}) for line in lines]
    (other / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    write_report(out)
    page = (out / "report.html").read_text()
    assert "T60-fixed-seed0: computed on cpu (aarch64, NEON) with 7 threads; " in page
    assert page.count(": computed on cpu (") == 2
    assert "Some cells were sampled in bfloat16, others in float32" in page


def test_the_cost_of_a_study_is_of_what_is_left(study_file, finished, tmp_path):
    study = read_study(str(study_file))
    cell = study.cells[0]
    planned = planned_evaluations(study, cell)
    assert _left(study, cell, tmp_path / "nothing") == (4, sum(planned.values()))
    folder = tmp_path / "cell"
    shutil.copytree(cell_folder(finished, cell), folder)
    assert _left(study, cell, folder) == (0, 0)
    measures = [line for line in read_lines(folder / "measures.jsonl") if line["key"] not in ("dpmpp-5", "bound")]
    (folder / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measures))
    assert _left(study, cell, folder) == (0, planned["dpmpp-5"] + planned["bound"])
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    half = planned["while training"] // 2  # the second of two scores is taken again
    assert _left(study, cell, folder) == (2, half + planned["dpmpp-5"] + planned["bound"])


def test_the_example_of_the_docs_is_a_study(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "studies.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "mine.toml").write_text(example)
    study = read_study(str(tmp_path / "mine.toml"))
    assert len(study.cells) == 3 * 6  # rescaled and fixed are one at 1000, rescaled and cosine are not
    assert study.cells[-1].config.diffusion.schedule == "cosine"
    assert study.cells[0].config.data.dataset == "my-pictures/"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[settings.data]\ndataset = 'FOLDER'\nimage_size = 8", "a bound of likelihood needs 2"),
        ("[settings.data]\ndataset = 'FOLDER'\nimage_size = 12", "no packaged classifier takes images of (1, 12, 12)"),
        ("[settings.data]\ndataset = 'nothing-here'", "nothing-here"),
        ("[settings.model]\nnum_classes = 4", "model.num_classes must be 10"),
        ("[settings.evaluation]\ntracker = 'wandb'", "wandb is not installed"),
    ],
)
def test_what_no_cell_could_end_with_is_told_before_the_first(tmp_path, monkeypatch, change, words):
    """Nothing is written, so that the study, corrected, is taken."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    (tmp_path / "pictures").mkdir()
    for index in range(20 if "size = 8" in change else 60):  # a twentieth of which is held out
        Image.new("L", (12, 12), index).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "bad.toml").write_text(f'recipe = "digits"\n{change}\n'.replace("FOLDER", str(tmp_path / "pictures")))
    with pytest.raises(InputError, match=re.escape(words)):
        run_study(read_study(str(tmp_path / "bad.toml")), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "words"), [("[]", "is not what a study writes"), ("{", "cannot be read")])
def test_a_damaged_word_of_failure_is_told_in_the_report(finished, tmp_path, content, words):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0" / "done.json").unlink()
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0.failed.json").write_text(content)
    write_report(tmp_path / "out")
    assert words in (tmp_path / "out" / "report.html").read_text()


def test_a_record_without_a_key_is_no_measure(finished, tmp_path, monkeypatch):
    """As `ddpm evaluate --scores` would add one."""
    shutil.copytree(finished, tmp_path / "out")
    cell = tmp_path / "out" / "cells" / "T50-rescaled-seed0"
    (cell / "done.json").unlink()
    with (cell / "measures.jsonl").open("a") as stream:
        stream.write('{"step": 4}\n')
    run_study(open_study(finished), tmp_path / "out", cell=0, device="cpu")
    assert (cell / "done.json").is_file()


def test_all_samplers_are_drawn_at_their_cost_and_scores_keep_their_label(finished, tmp_path):
    """heun costs two evaluations a step but one; the ancestral one with few steps is a sampler as any other."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    told = json.loads((out / "study.json").read_text())
    told["measures"]["samplers"] += ["heun-5"]
    (out / "study.json").write_text(json.dumps(told))
    study = open_study(out)
    assert planned_evaluations(study, study.cells[0])["heun-5"] == 20 * 9
    path = out / "cells" / "T50-rescaled-seed0" / "measures.jsonl"
    (measured,) = [line for line in read_lines(path) if line["key"] == "dpmpp-5"]
    with path.open("a") as stream:
        stream.write(json.dumps(measured | {"key": "heun-5", "sampler": "heun", "num_evaluations": 9}) + "\n")
    page = report_page(gather(out))
    assert "heun-5, 9 evaluations: " in page
    assert "crosses: heun" in page
    label = measured["fid_label"]
    assert label.endswith("(n=20)")
    assert page.count(f"{label}, ddim-50</th>") == 1
    assert f"<h3>{label} by sampler</h3>" in page
    (said,) = re.findall(r"With betas of a fixed range, at equal evaluations, ([^<]*)", page)
    assert f" in {label}: " in said


def test_a_fixed_range_is_told_with_the_chain_that_both_betas_share():
    values = {(500, "fixed", 0): (5.0, 1.0), (1000, "rescaled", 0): (10.0, 1.0), (2000, "fixed", 0): (20.0, 1.0)}
    said = _other_answers(made_up(values, seeds=(0,)))
    assert any(line.endswith("5 for T = 500, 10 for T = 1000, 20 for T = 2000.") for line in said)
    # Deviations of 1 / 1.96, and the studentised range of three: 1.69
    beginning = "With betas of a fixed range, at equal evaluations, T = 500 scores better than T = 2000 by 15 (95 % "
    assert any(line.startswith(beginning + "interval 15 +- 1.7)") for line in said)


@pytest.mark.parametrize(
    ("betas", "named"), [(("rescaled", "fixed"), "rescaled betas"), (("fixed",), "betas of a fixed range")]
)
def test_the_answer_names_the_betas_it_is_about(betas, named):
    kind = betas[0]
    values = {(T, kind if T != 1000 else "rescaled", 0): (1.0 + T / 1000, 0.1) for T in (500, 1000, 2000)}
    results = made_up(values, betas, (0,))
    assert f"and with {named}, T = 500 scores better than T = 2000" in answer(results)
    assert not any("fixed range" in sentence for sentence in _other_answers(results))  # it is not said twice


def test_bounds_and_speeds_name_their_chain(finished):
    study = open_study(finished)
    for cell, result in zip(study.cells, gather(finished).cells, strict=True):
        diffusion = cell.config.diffusion
        for key in ("speed", "bound"):
            record = result.at_end(key)
            assert record["num_timesteps"] == diffusion.num_timesteps
            assert record["beta_convention"] == diffusion.beta_convention
        assert result.at_end("bound")["num_drawn"] == min(50, diffusion.num_timesteps - 1)


def test_a_page_says_over_what_its_scores_are_and_has_the_floor_in_each_table(finished):
    page = report_page(gather(finished))
    assert page.count("real images (floor)") == 2
    assert "Inception Score, 10 classes" in page
    assert "over the features of classifier (digits), and compare with no published ones" in page
    steps = open_study(finished).cells[0].config.evaluation.sample_steps
    assert f"DDIM with {steps} steps of the averaged weights" in page


def test_a_page_names_the_packaged_study_only_where_it_is_that_one(finished):
    own = dataclasses.replace(open_study(finished), name="digits")
    assert "ddpm study digits.toml --out DIR" in report_page(Results(own, gather(finished).cells))
    assert [_repeating(study) for study in (DIGITS, own)] == ["digits", "digits.toml"]


def test_other_folders_are_refused(study_file, tmp_path, finished):
    study = read_study(str(study_file))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("keep")
    for out, words in ((tmp_path / "other", "holds a.txt"), (study_file, "is a file"), (finished, "another name")):
        changed = dataclasses.replace(study, name="changed") if out == finished else study
        with pytest.raises(InputError, match=words):
            run_study(changed, out, device="cpu")
    with pytest.raises(InputError, match="from 0 to 4"):
        run_study(study, tmp_path / "out", cell=5, device="cpu")
    with pytest.raises(InputError, match="is not a study"):
        write_report(tmp_path / "other")
    (tmp_path / "torn").mkdir()
    for change in ({"recipe": 3}, {"grid": None}, {"measures": {"images": 1}}):
        (tmp_path / "torn" / "study.json").write_text(json.dumps(study.to_dict() | change))
        with pytest.raises(InputError, match="not what a study writes"):
            write_report(tmp_path / "torn")

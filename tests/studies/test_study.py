"""A study: its cells, no repeated work, failures of cells, and several workers."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.log import read_lines
from ddpm_lab.studies import study as study_module
from ddpm_lab.studies.cell import missing_work, planned_evaluations, planned_scores
from ddpm_lab.studies.comparison import other_answers
from ddpm_lab.studies.grid import STUDIES, Study, cell_folder, is_done, open_study, read_study
from ddpm_lab.studies.lease import leased
from ddpm_lab.studies.record_reader import SUMMARY
from ddpm_lab.studies.report import write_report
from ddpm_lab.studies.results import CellResult, Results, gather
from ddpm_lab.studies.study import run_study
from tests.commands import Command

DIGITS = read_study("digits")


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


@pytest.mark.parametrize("name", STUDIES)
def test_packaged_studies_are_valid(name):
    study = read_study(name)
    again = Study(
        study.name, study.question, study.recipe, type(study.grid).from_dict(study.to_dict()["grid"]), study.measures
    )
    assert again.cells == study.cells
    for cell in study.cells:
        assert len(range(0, cell.config.training.num_steps, cell.config.evaluation.score_every)) >= 3


def test_a_study_is_computed_and_reported(finished_study):
    study = open_study(finished_study)
    assert len(study.cells) == 5
    for cell in study.cells:
        folder = cell_folder(finished_study, cell)
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
    records = json.loads((finished_study / "results.json").read_text())
    assert len(records) == 5 * 2 + 4 * 6 + 4
    assert {record["num_timesteps"] for record in records if record["key"].startswith("ddim-50")} == {50, 60}
    rows = (finished_study / "results.csv").read_text().splitlines()
    assert len(rows) == len(records) + 1
    assert rows[0].startswith("cell,seed,trained_timesteps")


def test_a_finished_cell_is_never_computed_twice(finished_study, monkeypatch):
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed again"))
    messages = []
    run_study(open_study(finished_study), finished_study, device="cpu", say=messages.append)
    assert "5 cells, 5 done" in messages[0]


def test_a_study_can_be_reported_and_continued_without_its_checkpoints(finished_study, tmp_path, monkeypatch):
    """Without checkpoints and pictures of finished cells, the report is the same and missing cells are computed."""
    kept = tmp_path / "kept"
    shutil.copytree(
        finished_study, kept, ignore=shutil.ignore_patterns("checkpoints", "samples", "*.lease", "report.html")
    )
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed again"))
    run_study(open_study(kept), kept, device="cpu")
    for name in ("results.json", "results.csv", "report.html"):
        assert (kept / name).read_bytes() == (finished_study / name).read_bytes()
    missing = open_study(kept).cells[3]
    shutil.rmtree(kept / "cells" / missing.name)
    again = []
    monkeypatch.setattr(study_module, "compute_cell", lambda study, cell, *given, **more: again.append(cell.name))
    monkeypatch.setattr(study_module, "write_report", lambda out: "reported")
    run_study(open_study(kept), kept, device="cpu")
    assert again == [missing.name]


def test_a_study_keeps_the_precision_that_it_was_begun_in(study_file, tmp_path, monkeypatch):
    """Cells from machines with and without bfloat16 instructions can be compared."""
    precisions = []

    def compute(study, cell, folder, *rest, **more):
        sampled = {sampling.precision for _, _, sampling in planned_scores(study, cell).values()}
        precisions.append((cell.config.training.precision, sampled))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done.json").write_text(json.dumps({name: kind() for name, kind in SUMMARY.items()}))

    monkeypatch.setattr(study_module, "compute_cell", compute)
    monkeypatch.setattr(study_module, "write_report", lambda out: "")
    study = read_study(str(study_file))
    assert study.precision == "auto"
    for cell, fast in enumerate((True, False)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda fast=fast: {"amx_bf16": fast})
        run_study(study, tmp_path / "out", cell=cell, device="cpu")
    assert precisions == [("bf16", {"bf16"})] * 2
    assert open_study(tmp_path / "out").in_precision("float32").precision == "bf16"
    with pytest.raises(InputError, match="another recipe"):
        run_study(study.in_precision("float32"), tmp_path / "out", device="cpu")
    # a folder that was begun before precision was kept is what each machine makes of it
    (tmp_path / "out" / "study.json").write_text(json.dumps(study.to_dict()))
    run_study(study, tmp_path / "out", cell=2, device="cpu")
    assert precisions[2] == ("auto", {"auto"})


def test_of_two_machines_that_begin_a_study_one_sets_its_precision(study_file, tmp_path, monkeypatch):
    study, precisions = read_study(str(study_file)), []

    def cost(study, cells, out, device, data_dir):  # while this one measures, the other begins
        out.mkdir()
        (out / "study.json").write_text(json.dumps(study.in_precision("bf16").to_dict()))
        return []

    def compute(study, cell, folder, *rest, **more):
        precisions.append((study.precision, cell.config.training.precision))
        raise RunError("enough")

    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {})
    monkeypatch.setattr(study_module, "study_cost", cost)
    monkeypatch.setattr(study_module, "compute_cell", compute)
    with pytest.raises(RunError, match="1 of 1 cells failed"):
        run_study(study, tmp_path / "out", cell=0, device="cpu")
    assert precisions == [("bf16", "bf16")]


def test_a_failed_cell_is_reported_and_stops_no_other(study_file, tmp_path, monkeypatch):
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
    with pytest.raises(InputError, match=r"T60-rescaled-seed0/done.json: images is missing"):
        gather(out)


def test_a_closed_output_ends_the_study_without_a_failed_cell(study_file, tmp_path, monkeypatch):
    def compute(*given, **more):
        raise BrokenPipeError

    monkeypatch.setattr(study_module, "compute_cell", compute)
    with pytest.raises(BrokenPipeError):
        run_study(read_study(str(study_file)), tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out" / "cells").glob("*.failed.json"))


def test_a_cell_that_another_worker_holds_is_not_computed(study_file, tmp_path, monkeypatch):
    study, out, messages = read_study(str(study_file)), tmp_path / "out", []
    monkeypatch.setattr(study_module, "compute_cell", lambda *given, **more: pytest.fail("computed"))
    study_module._claim_folder(study, out, "cpu")
    monkeypatch.setattr(study_module, "SECONDS", 0.5)
    with leased(out / "cells" / f"{study.cells[2].name}.lease"):
        run_study(study, out, cell=2, device="cpu", say=messages.append)
    assert messages[-1] == f"other workers are still computing: {study.cells[2].name}"


def test_the_cell_of_a_worker_that_dies_is_taken_over(study_file, tmp_path, monkeypatch):
    study, out, computed, messages = read_study(str(study_file)), tmp_path / "out", [], []
    first = cell_folder(out, study.cells[0])

    def compute(study, cell, folder, *rest, **more):
        computed.append(cell.index)
        for done in [folder, first] if cell.index == 3 else [folder]:  # meanwhile another has done the first
            done.mkdir()
            (done / "done.json").write_text(json.dumps({name: kind() for name, kind in SUMMARY.items()}))
        if cell.index == 4:
            in_a_second = time.time() - 119.0  # from when it counts as dead
            os.utime(lease, (in_a_second, in_a_second))

    monkeypatch.setattr(study_module, "compute_cell", compute)
    monkeypatch.setattr(study_module, "write_report", lambda out: "reported")
    monkeypatch.setattr(study_module, "SECONDS", 5.0)
    study_module._claim_folder(study, out, "cpu")
    for other in study.cells[:2]:
        lease = out / "cells" / f"{other.name}.lease"
        lease.write_text('{"owner": "another-machine/pid:[1] 1 x"}')
    run_study(study, out, device="cpu", say=messages.append)
    assert computed == [2, 3, 4, 1]
    waiting = "waiting for cells that other workers hold, in case one of these has died"
    assert f"{waiting}: {study.cells[1].name}" in messages


def worker(study_file, out, *more):
    arguments = ["study", str(study_file), "--out", str(out), "--device", "cpu", *more]
    return Command(arguments, OMP_NUM_THREADS="1")  # as in this process, for sums of two threads differ in their bits


@pytest.mark.slow
def test_a_killed_study_is_finished_by_two_workers_with_the_same_results(study_file, tmp_path, finished_study):
    """Killed in training, in scoring and before the pictures; then two workers share what is left, each cell once."""
    out = tmp_path / "out"
    cells = [cell_folder(out, cell) for cell in read_study(str(study_file)).cells]
    for awaited in (cells[0] / "checkpoints", cells[0] / "measures.jsonl", cells[1] / "samples.png"):
        process = worker(study_file, out)
        deadline = time.monotonic() + 120
        while not awaited.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended before"
        process.communicate()
    missing = [cell.name for cell in open_study(out).cells if not is_done(out, cell)]
    workers = [worker(study_file, out) for _ in range(2)]
    outputs = [process.communicate()[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    started = [re.findall(r"cell \d of 0 \.\. 4: (\S+)", text) for text in outputs]
    assert sorted(started[0] + started[1]) == sorted(missing)
    assert all(is_done(out, cell) for cell in open_study(out).cells)
    assert essential(out) == essential(finished_study)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Start the jobs of an array as Slurm does: `srun` runs its command, `scontrol` writes its arguments to a file."""
    commands = tmp_path / "commands"
    commands.mkdir()
    ddpm = Path(sys.executable).with_name("ddpm")
    options = 'while [[ "$1" == --* ]]; do shift; done; [ "$1" = ddpm ] && shift'
    (commands / "srun").write_text(f'#!/usr/bin/env bash\n[ -z "$FAIL" ] || exit $FAIL\n{options}\nexec {ddpm} "$@"\n')
    (commands / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/scontrol\n')
    for path in commands.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    script = Path(__file__).parents[2] / "scripts" / "study.slurm"

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
        outputs = [job.communicate(timeout=240)[0] for job in jobs]
        return [job.returncode for job in jobs], outputs

    return submit


@pytest.mark.slow
def test_an_array_of_jobs_computes_a_cell_each(slurm, study_file, tmp_path):
    codes, outputs = slurm(study_file, tmp_path / "out", 0, 1)
    assert codes == [0, 0], outputs
    assert "cell 0 of" in outputs[0]
    cells = open_study(tmp_path / "out").cells
    assert [is_done(tmp_path / "out", cell) for cell in cells] == [True, True, False, False, False]
    codes, outputs = slurm(study_file, tmp_path / "out", 0)
    assert codes == [0]
    assert "cell 0 of" not in outputs[0], "a finished cell is not computed again"


def test_a_job_that_ran_out_of_time_is_requeued(slurm, study_file, tmp_path):
    assert slurm(study_file, tmp_path / "out", 3, FAIL="130")[0] == [130]
    assert (tmp_path / "scontrol").read_text() == "requeue 7_3\n"
    (tmp_path / "scontrol").unlink()
    assert slurm(study_file, tmp_path / "out", 3, FAIL="1")[0] == [1]
    assert not (tmp_path / "scontrol").exists()


def essential(out):
    """All records without fields that depend on the clock or on the path of the folder."""
    volatile = {"seconds", "seconds_an_image", "seconds_an_evaluation", "source"}
    kept = []
    for record in json.loads((out / "results.json").read_text()):
        images = record.get("images")
        kept.append({k: v for k, v in record.items() if k not in volatile})
        if isinstance(images, dict):
            kept[-1]["images"] = images["sha256"]
    return kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('recipe = "none"', "no recipe 'none'"),
        ("recipe = 3", "must be the name or the path of a recipe"),
        ("[grid]\nnum_timesteps = []", "is empty"),
        ("[grid]\nnum_timesteps = [20]", "more than 20"),
        ("[grid]\nnum_timesteps = [50, 50]", "twice"),
        ("[grid]\nbetas = ['sigmoid']", "betas"),
        ("[grid]\nseeds = [-1]", "at least 0"),
        ("[grid]\nT = 3", "no setting 'T'"),
        ("[measures]\nsamplers = ['ddim-10']", "must contain ddim-50"),
        ("[measures]\nsamplers = ['ddim', 'ddim-50']", "as 'ddim-50'"),
        ("[measures]\nsamplers = ['euler-5', 'ddim-50']", "sampler"),
        ("[measures]\nsamplers = ['ddim-600', 'ddim-50']", "more steps than the shortest chain"),
        ("[measures]\nimages = 3", "at least 20"),
        ("[settings.training]\nlr = 3", "no setting 'lr'"),
        ("[settings]\ntraining = 3", "must be a table"),
        ("[settings.diffusion]\nschedule = 'cosine'", "settings.diffusion.schedule is set by grid.betas"),
        ("[settings.training]\nseed = 7", "settings.training.seed is set by grid.seeds"),
        ("[settings.evaluation]\nscore_every = 9", "is set by measures.checkpoints"),
        ("cells = 5", "no setting 'cells'"),
        ('recipe = "flat.toml"', "training must be a table"),
        ("[grid", "not a TOML file"),
    ],
)
def test_invalid_studies_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.toml"
    (tmp_path / "flat.toml").write_text("training = 3")
    path.write_text(change if change.startswith("recipe") else f'recipe = "digits"\n{change}\n')
    with pytest.raises(InputError, match=re.escape(message)):
        read_study(str(path))


@pytest.mark.parametrize(
    ("betas", "process", "named"),
    [
        (("rescaled", "fixed"), "rescaled", "of each length with rescaled betas, "),
        (("cosine",), "cosine", "of each length with cosine betas, "),
        (("fixed",), "rescaled", "of each length with rescaled betas, "),
    ],
)
def test_continuous_time_has_the_betas_that_are_compared(betas, process, named):
    grid = dataclasses.replace(DIGITS.grid, betas=betas, continuous=True)
    study = dataclasses.replace(DIGITS, grid=grid)
    cell = study.cells[-1]
    assert cell.sampled_as == grid.num_timesteps
    assert cell.config.diffusion.beta_convention == process
    assert cell.label == f"continuous time, {process}"
    record = {"key": "ddim-50 as T=1000", "num_timesteps": 1000, "fid": {"value": 1.5}, "fid_label": "FD"}
    sentences = other_answers(Results(study, [CellResult(cell, Path(), None, None, [record])]))
    assert [named in line for line in sentences] == [True]


def test_the_cost_of_a_study_counts_missing_work_only(study_file, finished_study, tmp_path):
    study = read_study(str(study_file))
    cell = study.cells[0]
    planned = planned_evaluations(study, cell)
    assert missing_work(study, cell, tmp_path / "nothing") == (4, sum(planned.values()))
    folder = tmp_path / "cell"
    shutil.copytree(cell_folder(finished_study, cell), folder)
    assert missing_work(study, cell, folder) == (0, 0)
    measures = [line for line in read_lines(folder / "measures.jsonl") if line["key"] not in ("dpmpp-5", "bound")]
    (folder / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measures))
    assert missing_work(study, cell, folder) == (0, planned["dpmpp-5"] + planned["bound"])
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    half = planned["while training"] // 2  # the second of two scores is taken again
    assert missing_work(study, cell, folder) == (2, half + planned["dpmpp-5"] + planned["bound"])


def test_the_example_in_the_docs_is_a_valid_study(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "mine.toml").write_text(example)
    study = read_study(str(tmp_path / "mine.toml"))
    assert len(study.cells) == 3 * 6  # rescaled and fixed are one at 1000, rescaled and cosine are not
    assert study.cells[-1].config.diffusion.schedule == "cosine"
    assert study.cells[0].config.data.dataset == "my-pictures/"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[settings.data]\ndataset = 'FOLDER'\nimage_size = 8", "the bound of the likelihood needs 2"),
        ("[settings.data]\ndataset = 'FOLDER'\nimage_size = 12", "no packaged classifier takes images of (1, 12, 12)"),
        ("[settings.data]\ndataset = 'nothing-here'", "nothing-here"),
        ("[settings.model]\nnum_classes = 4", "model.num_classes must be 10"),
        ("[settings.evaluation]\ntracker = 'wandb'", "wandb is not installed"),
    ],
)
def test_a_study_that_no_cell_could_finish_is_refused_at_the_start(tmp_path, monkeypatch, change, message):
    """Nothing is written, so that the corrected study can use the folder."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    (tmp_path / "pictures").mkdir()
    for index in range(20 if "size = 8" in change else 60):  # a twentieth of which is held out
        Image.new("L", (12, 12), index).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "bad.toml").write_text(f'recipe = "digits"\n{change}\n'.replace("FOLDER", str(tmp_path / "pictures")))
    with pytest.raises(InputError, match=re.escape(message)):
        run_study(read_study(str(tmp_path / "bad.toml")), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(study_file, tmp_path, finished_study):
    study = read_study(str(study_file))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("keep")
    for out, message in (
        (tmp_path / "other", "holds a.txt"),
        (study_file, "is a file"),
        (finished_study, "another name"),
    ):
        changed = dataclasses.replace(study, name="changed") if out == finished_study else study
        with pytest.raises(InputError, match=message):
            run_study(changed, out, device="cpu")
    with pytest.raises(InputError, match="from 0 to 4"):
        run_study(study, tmp_path / "out", cell=5, device="cpu")
    with pytest.raises(InputError, match="is not a study"):
        write_report(tmp_path / "other")
    (tmp_path / "torn").mkdir()
    for change in ({"recipe": 3}, {"grid": None}, {"measures": {"images": 1}}):
        (tmp_path / "torn" / "study.json").write_text(json.dumps(study.to_dict() | change))
        with pytest.raises(InputError, match="is not a valid study"):
            write_report(tmp_path / "torn")

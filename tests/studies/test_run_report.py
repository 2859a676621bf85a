"""`ddpm report` of runs: the content of the page, and folders without runs."""

import errno
import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import RECIPES, Config, load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import locked
from ddpm_lab.core.log import append_line
from ddpm_lab.pictures.curves import read_runs, training_figure
from ddpm_lab.studies.run_report import as_toml, write_run_report
from tests.conftest import tree_hash


def score(step, value, **rest):
    fid = {"value": value, "low": value - 1, "high": value + 1}
    return {"step": step, "seconds": 1.0, "fid": fid, "fid_label": "FD-classifier (n=20)", "num_images": 20} | rest


@pytest.fixture
def scored_run(tiny_run, tmp_path) -> Path:
    run = tmp_path / "one"
    shutil.copytree(tiny_run, run)
    for step, value in ((6, 41.5), (12, 30.25)):
        append_line(run / "scores.jsonl", score(step, value, by="training", floor={"fid": 1.125}))
    return run


def page(folder):
    return (folder / "report.html").read_text()


def test_the_page_of_a_run_is_self_contained(scored_run, capsys):
    before = tree_hash(scored_run)
    assert run_command(["report", str(scored_run)]) == 0
    assert capsys.readouterr().out == f"{scored_run / 'report.html'}: one\n"
    after = tree_hash(scored_run)
    assert after.pop("report.html")
    assert after == before
    text = page(scored_run)
    for address in ('src="http', 'href="http', "@import", "url(h"):
        assert address not in text
    assert text.count("data:image/png;base64,") == 2  # the curves, and the newest grid
    assert "step 12, averaged weights, DDIM with 2 steps" in text
    assert ">12<small>of 12</small>" in text
    for shown in ("30.2", "29.2 to 31.2", "1.12"):  # value, interval and floor
        assert shown in text
    assert 'href="#record-1"' in text
    assert 'id="record-1"' in text
    assert "<svg" in text
    assert "one, 96 images: 30.2" in text  # what a dot says: 12 steps of 8


def test_a_run_in_training_can_be_reported(scored_run):
    with locked(scored_run, "--run"):
        write_run_report(scored_run)
    assert "30.2" in page(scored_run)


def test_runs_are_shown_together(scored_run):
    other = scored_run.with_name("<two> & more")
    shutil.copytree(scored_run, other)
    (other / "scores.jsonl").unlink()
    (other / "log.jsonl").unlink()
    shutil.rmtree(other / "samples")
    write_run_report(scored_run.parent)
    text = page(scored_run.parent)
    assert "<two>" not in text
    assert text.count("&lt;two&gt; &amp; more") == 3  # what it is, samples, recipe
    assert "none yet" in text
    assert not (scored_run / "report.html").exists()


def test_invalid_scores_are_left_out(scored_run):
    unlabelled = {
        "fid": {"value": 7.5},
        "floor": 3,
        "num_images": None,
        "fid_label": 3,
        "reference": "x",
        "by": "training",
    }
    for invalid in ({"fid": "low"}, {"fid": {"value": "a"}}, unlabelled):
        append_line(scored_run / "scores.jsonl", score(12, 1.0) | invalid)
    for name in ("step_final.png", "step_00000012_big.png"):
        shutil.copy(scored_run / "samples" / "step_00000012.png", scored_run / "samples" / name)
    write_run_report(scored_run)
    assert page(scored_run).count('<div class="record"') == 3
    assert page(scored_run).count("<svg") == 1
    assert ">7.50</a></td>" in page(scored_run)  # without an interval


def test_links_are_left_out_and_names_need_not_be_valid_text(scored_run):
    renamed = scored_run.with_name(os.fsdecode(b"caf\xe9"))
    shutil.copytree(scored_run, renamed)
    (scored_run.parent / "latest").symlink_to(renamed.name)
    message = write_run_report(scored_run.parent)
    assert message.endswith(": caf\\udce9, one")
    assert page(scored_run.parent).count("caf\\udce9") >= 3


def test_a_smaller_floor_and_the_number_of_classes_are_shown(scored_run):
    for n in (12, 20):
        floor = {"fid": 0.5, "inception_score": 9.5, "num_images": n}
        features = {"name": "classifier (digits)", "num_classes": 10}
        others = {"floor": floor, "features": features, "inception_score": {"value": 8.5, "low": 8.0, "high": 9.0}}
        append_line(scored_run / "scores.jsonl", score(12, 3.0) | others)
    write_run_report(scored_run)
    assert page(scored_run).count(">0.500<small>n=12</small></td>") == 1
    assert page(scored_run).count(">9.50<small>n=12</small></td>") == 1
    assert page(scored_run).count(">0.500</td>") == 1  # of as many as were scored
    assert page(scored_run).count("<small>of 10 classes</small>") == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["_old", "run$_$", "$a$ and $b", "a\\$b"])
def test_names_are_drawn_literally(scored_run, name):
    """Matplotlib reads text between dollars as mathematics, and leaves names that begin with _ out of legends."""
    renamed = scored_run.with_name(name)
    scored_run.rename(renamed)
    legend = training_figure(read_runs([renamed])).axes[0].get_legend()
    assert [text.get_text().strip().replace(r"\$", "$") for text in legend.get_texts()] == [name]
    write_run_report(renamed)
    chart = page(renamed).partition("<svg")[2]
    assert f"{name}</text>" in chart
    assert f"{name}, 96 images: 30.2" in chart


def test_the_page_names_the_weights_that_a_run_started_from(scored_run):
    record = json.loads((scored_run / "config.json").read_text())
    origin = {"from": {"source": "runs/first", "step": 8}, "earlier_versions": [{"torch": "1.0"}]}
    (scored_run / "config.json").write_text(json.dumps(record | origin))
    write_run_report(scored_run)
    assert "--run DIR --from runs/first" in page(scored_run)
    assert "It started from the weights of runs/first, step 8." in page(scored_run)
    assert "earlier: torch 1.0" in page(scored_run)
    (scored_run / "config.json").write_text(json.dumps(record | {"imported": "a pipeline"}))
    write_run_report(scored_run)
    assert "ddpm train" not in page(scored_run)


@pytest.mark.parametrize(("number", "refused"), [(errno.ENOSPC, OSError), (errno.EACCES, InputError)])
def test_a_page_that_cannot_be_written_is_an_error(scored_run, monkeypatch, number, refused):
    def fails(path, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ddpm_lab.studies.run_report.replace_atomically", fails)
    with pytest.raises(refused) as raised:
        write_run_report(scored_run)
    assert type(raised.value) is refused


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_on_the_page_equals_that_of_the_run(recipe):
    config = load_recipe(recipe)
    assert Config.from_dict(tomllib.loads(as_toml(config))) == config


def test_a_folder_without_a_run_is_refused(tmp_path, tiny_run, capsys):
    for folder in (tmp_path / "absent", tmp_path):
        assert run_command(["report", str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"error: {folder} is not a study (no study.json), not a run (no config.json), and contains no runs\n"
        )
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "config.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(InputError, match="is not a run's"):
        write_run_report(run)
    assert not (run / "report.html").exists()

"""The page of a study: its content, and that it is self-contained."""

import dataclasses
import json
import re
import shutil

import pytest

from ddpm_lab.core.log import read_lines
from ddpm_lab.studies.cell import planned_evaluations
from ddpm_lab.studies.charts import Series, line_chart
from ddpm_lab.studies.grid import open_study, read_study
from ddpm_lab.studies.html import format_number
from ddpm_lab.studies.report import _source, report_page, write_report
from ddpm_lab.studies.results import Results, gather
from ddpm_lab.studies.study import run_study

DIGITS = read_study("digits")


def test_the_page_is_self_contained(finished_study):
    page = (finished_study / "report.html").read_text()
    assert "Is it &lt;quick&gt;?" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert page.count("data:image/gif") == 5 * 2
    assert page.count("<svg") == 5
    assert len(re.findall(r"<title>[^<]*fixed-seed0[^<]*</title>", page)) > 4  # dots say what they are
    for target in re.findall(r'href="#(record-\d+)"', page):
        assert f'id="{target}"' in page


@pytest.mark.parametrize(
    ("value", "text"), [(12.95, "12.9"), (13.0, "13.0"), (250.4, "250"), (0.5, "0.500"), (0.02, "0.020"), (None, "")]
)
def test_numbers_keep_trailing_zeros(value, text):
    assert format_number(value) == text


def test_points_of_a_chart_have_texts():
    points = [(1, 2, 1.5, 2.5, "T < 5: 2"), (2, 3, None, None, "b")]
    svg = line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")
    assert svg.startswith("<svg")
    assert "<title>T &lt; 5: 2</title>" in svg
    assert "one &amp; two" in svg
    assert svg == line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")


@pytest.mark.parametrize(("letters", "columns"), [(12, 3), (25, 2), (90, 1)])
def test_a_legend_has_as_many_columns_as_its_names_leave_room_for(letters, columns):
    points = [(1, 2, None, None, "a"), (2, 3, None, None, "b")]
    series = [Series(f"{number:_<{letters}}", "#0072B2", points) for number in range(6)]
    svg = line_chart("a", series, "x", "y")
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', svg)
    begins = {float(x) for x in re.findall(r'<text [^>]*(?: x="|translate\()([\d.]+)[^>]*>\d_', svg)}
    assert len(begins) == columns
    assert max(begins) + 4 * min(letters, 60) < float(width)  # longer names are broken into lines


@pytest.mark.parametrize(("level", "name"), [(1.5, "floor"), (0.125, "floor, 0.12")])
def test_a_level_far_below_the_points_is_a_number_in_the_legend(level, name):
    """A line would leave most of a logarithmic chart empty."""
    series = [Series("a", "#0072B2", [(1, 2, 1.9, 2.1, "here"), (2, 3, 2.9, 3.1, "there")])]
    svg = line_chart("a", series, "x", "y", log_y=True, level=(level, "floor"))
    assert f">{name}</text>" in svg
    assert svg.count("stroke-dasharray: 1,2") == (2 if name == "floor" else 0)  # the line, and its piece in the legend


def test_the_page_of_an_unfinished_study_names_what_is_missing(study_file, tmp_path):
    study = read_study(str(study_file))
    out = tmp_path / "out"
    run_study(study, out, cell=0, device="cpu")
    results = gather(out)
    assert sum(result.summary is not None for result in results.cells) == 1
    page = report_page(results)
    assert "The study is not finished" in page
    assert "Fewer than two lengths" in page


def test_the_floor_of_ancestral_sampling_is_in_the_table(finished_study):
    page = report_page(gather(finished_study))
    (record,) = [r for r in gather(finished_study).cells[0].records if r["key"] == "ancestral"]
    assert (
        page.count(
            f"<td>{format_number(record['floor']['kid'])}<small>n=20</small></td><td></td><td></td><td></td></tr>"
        )
        == 1
    )


def test_the_page_names_every_machine_and_precision(finished_study, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished_study, out)
    assert write_report(out)
    alone = (out / "report.html").read_text()
    assert alone.count(">Computed on cpu (") == 1
    assert "others in" not in alone
    other = out / "cells" / "T60-fixed-seed0"
    done = json.loads((other / "done.json").read_text())
    (other / "done.json").write_text(json.dumps(done | {"machine": "aarch64, NEON", "threads": 7}))
    lines = [json.loads(line) for line in (other / "measures.jsonl").read_text().splitlines()]
    (dtype,) = {line["dtype"] for line in lines if "dtype" in line}  # the device's own
    other_dtype = {"float32": "bf16", "bf16": "float32"}[dtype]
    changed = [line | ({"dtype": other_dtype} if "dtype" in line else {}) for line in lines]
    (other / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    write_report(out)
    page = (out / "report.html").read_text()
    assert "T60-fixed-seed0: computed on cpu (aarch64, NEON) with 7 threads; " in page
    assert page.count(": computed on cpu (") == 2
    assert "Some cells of seed 0 were sampled in bf16, others in float32" in page
    assert "was trained and sampled in" not in page
    results = gather(out)  # had they another seed, no comparison would mix precisions
    cells = [
        dataclasses.replace(c, records=[r | {"seed_of_training": 1} for r in c.records]) if c.folder == other else c
        for c in results.cells
    ]
    page = report_page(dataclasses.replace(results, cells=cells))
    assert "others in" not in page
    assert f"Seed 0 was trained and sampled in {dtype}" in page
    assert f"Seed 1 was trained and sampled in {other_dtype}" in page


@pytest.mark.parametrize(("content", "message"), [("[]", "error is missing"), ("{", "cannot be read")])
def test_a_damaged_failure_file_is_reported(finished_study, tmp_path, content, message):
    shutil.copytree(finished_study, tmp_path / "out")
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0" / "done.json").unlink()
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0.failed.json").write_text(content)
    write_report(tmp_path / "out")
    assert message in (tmp_path / "out" / "report.html").read_text()


def test_all_samplers_are_drawn_at_their_cost_and_scores_keep_their_label(finished_study, tmp_path):
    """heun takes two evaluations in every step except one."""
    out = tmp_path / "out"
    shutil.copytree(finished_study, out)
    content = json.loads((out / "study.json").read_text())
    content["measures"]["samplers"] += ["heun-5"]
    (out / "study.json").write_text(json.dumps(content))
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
    assert label.endswith("(n=20 against 1,437)")
    assert page.count(f"{label}, ddim-50</th>") == 1
    assert f"<h3>{label} by sampler</h3>" in page
    (text,) = re.findall(r"With betas of a fixed range, at equal evaluations, ([^<]*)", page)
    assert f" in {label}: " in text


def test_bounds_and_speeds_name_their_chain(finished_study):
    study = open_study(finished_study)
    for cell, result in zip(study.cells, gather(finished_study).cells, strict=True):
        diffusion = cell.config.diffusion
        for key in ("speed", "bound"):
            record = result.measure(key)
            assert record["num_timesteps"] == diffusion.num_timesteps
            assert record["beta_convention"] == diffusion.beta_convention
        assert result.measure("bound")["num_drawn"] == min(50, diffusion.num_timesteps - 1)


def test_the_page_names_its_features_and_has_the_floor_in_each_table(finished_study):
    page = report_page(gather(finished_study))
    assert page.count("real images (floor)") == 2
    assert "Inception Score, 10 classes" in page
    assert "over the features of classifier (digits) and cannot be compared with published scores" in page
    steps = open_study(finished_study).cells[0].config.evaluation.sample_steps
    assert f"by DDIM with {steps} steps" in page


def test_the_page_names_a_packaged_study_only_if_it_is_equal(finished_study):
    own = dataclasses.replace(open_study(finished_study), name="digits")
    assert "ddpm study digits.toml --out DIR" in report_page(Results(own, gather(finished_study).cells))
    assert [_source(study) for study in (DIGITS, own)] == ["digits", "digits.toml"]

"""The page of a study: what it shows, what it says of its numbers, and that it needs nothing but itself."""

import dataclasses
import json
import re
import shutil

import pytest

from ddpm_lab.core.log import read_lines
from ddpm_lab.pictures.charts import Series, line_chart
from ddpm_lab.studies.cell import planned_evaluations
from ddpm_lab.studies.grid import open_study, read_study
from ddpm_lab.studies.html import format_number
from ddpm_lab.studies.report import _repeating, report_page, write_report
from ddpm_lab.studies.results import Results, gather
from ddpm_lab.studies.study import run_study

DIGITS = read_study("digits")


def test_the_page_needs_nothing_but_itself(finished_study):
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
    ("value", "said"), [(12.95, "12.9"), (13.0, "13.0"), (250.4, "250"), (0.5, "0.500"), (0.02, "0.020"), (None, "")]
)
def test_numbers_keep_the_zeros_that_were_measured(value, said):
    assert format_number(value) == said


def test_charts_say_what_their_dots_are():
    points = [(1, 2, 1.5, 2.5, "T < 5: 2"), (2, 3, None, None, "b")]
    svg = line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")
    assert svg.startswith("<svg")
    assert "<title>T &lt; 5: 2</title>" in svg
    assert "one &amp; two" in svg
    assert svg == line_chart("a", [Series("one & two", "#0072B2", points)], "x", "y")


@pytest.mark.parametrize(("letters", "columns"), [(25, 3), (45, 2), (90, 1)])
def test_a_legend_has_as_many_columns_as_its_names_leave_room_for(letters, columns):
    points = [(1, 2, None, None, "a"), (2, 3, None, None, "b")]
    series = [Series(f"{number:_<{letters}}", "#0072B2", points) for number in range(6)]
    svg = line_chart("a", series, "x", "y")
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', svg)
    begins = {float(x) for x in re.findall(r'<text [^>]* x="([\d.]+)"[^>]*>\d_', svg)}
    assert len(begins) == columns
    assert max(begins) + 4 * letters < float(width)


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


def test_a_floor_stands_beside_the_scores_of_all_steps(finished_study):
    page = report_page(gather(finished_study))
    (record,) = [r for r in gather(finished_study).cells[0].records if r["key"] == "ancestral"]
    assert (
        page.count(
            f"<td>{format_number(record['floor']['kid'])}<small>n=20</small></td><td></td><td></td><td></td></tr>"
        )
        == 1
    )


def test_a_page_names_every_machine_and_precision(finished_study, tmp_path):
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
    (here,) = {line["dtype"] for line in lines if "dtype" in line}  # the device's own
    there = {"float32": "bf16", "bf16": "float32"}[here]
    changed = [line | ({"dtype": there} if "dtype" in line else {}) for line in lines]
    (other / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    write_report(out)
    page = (out / "report.html").read_text()
    assert "T60-fixed-seed0: computed on cpu (aarch64, NEON) with 7 threads; " in page
    assert page.count(": computed on cpu (") == 2
    assert "Some cells of seed 0 were sampled in bf16, others in float32" in page
    assert "was trained and sampled in" not in page
    results = gather(out)  # were it another seed's, what is compared would be alike
    cells = [
        dataclasses.replace(c, records=[r | {"seed_of_training": 1} for r in c.records]) if c.folder == other else c
        for c in results.cells
    ]
    page = report_page(dataclasses.replace(results, cells=cells))
    assert "others in" not in page
    assert f"Seed 0 was trained and sampled in {here}" in page
    assert f"Seed 1 was trained and sampled in {there}" in page


@pytest.mark.parametrize(("content", "words"), [("[]", "is not what a study writes"), ("{", "cannot be read")])
def test_a_damaged_word_of_failure_is_told_in_the_report(finished_study, tmp_path, content, words):
    shutil.copytree(finished_study, tmp_path / "out")
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0" / "done.json").unlink()
    (tmp_path / "out" / "cells" / "T50-rescaled-seed0.failed.json").write_text(content)
    write_report(tmp_path / "out")
    assert words in (tmp_path / "out" / "report.html").read_text()


def test_all_samplers_are_drawn_at_their_cost_and_scores_keep_their_label(finished_study, tmp_path):
    """heun costs two evaluations a step but one; the ancestral one with few steps is a sampler as any other."""
    out = tmp_path / "out"
    shutil.copytree(finished_study, out)
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
    assert label.endswith("(n=20 against 1,437)")
    assert page.count(f"{label}, ddim-50</th>") == 1
    assert f"<h3>{label} by sampler</h3>" in page
    (said,) = re.findall(r"With betas of a fixed range, at equal evaluations, ([^<]*)", page)
    assert f" in {label}: " in said


def test_bounds_and_speeds_name_their_chain(finished_study):
    study = open_study(finished_study)
    for cell, result in zip(study.cells, gather(finished_study).cells, strict=True):
        diffusion = cell.config.diffusion
        for key in ("speed", "bound"):
            record = result.at_end(key)
            assert record["num_timesteps"] == diffusion.num_timesteps
            assert record["beta_convention"] == diffusion.beta_convention
        assert result.at_end("bound")["num_drawn"] == min(50, diffusion.num_timesteps - 1)


def test_a_page_says_over_what_its_scores_are_and_has_the_floor_in_each_table(finished_study):
    page = report_page(gather(finished_study))
    assert page.count("real images (floor)") == 2
    assert "Inception Score, 10 classes" in page
    assert "over the features of classifier (digits), and compare with no published ones" in page
    steps = open_study(finished_study).cells[0].config.evaluation.sample_steps
    assert f"DDIM with {steps} steps of the averaged weights" in page


def test_a_page_names_the_packaged_study_only_where_it_is_that_one(finished_study):
    own = dataclasses.replace(open_study(finished_study), name="digits")
    assert "ddpm study digits.toml --out DIR" in report_page(Results(own, gather(finished_study).cells))
    assert [_repeating(study) for study in (DIGITS, own)] == ["digits", "digits.toml"]

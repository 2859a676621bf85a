"""The results of a study: reading records, comparing lengths of chain, and the answer in a sentence."""

import csv
import dataclasses
import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpm_lab.core.errors import InputError
from ddpm_lab.studies.cell import planned_scores
from ddpm_lab.studies.charts import line_chart
from ddpm_lab.studies.comparison import answer, compare, half_interval, other_answers
from ddpm_lab.studies.grid import open_study, read_study
from ddpm_lab.studies.report import cost_series, training_series, write_report
from ddpm_lab.studies.results import CellResult, Results, as_csv, gather
from ddpm_lab.studies.study import run_study

DIGITS = read_study("digits")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("done.json", {"seconds_of_training": float("nan")}, "seconds_of_training is missing or has the wrong type"),
        ("done.json", {"images": "many"}, "images is missing"),
        ("done.json", {"versions": 3}, "versions is missing"),
        ("measures.jsonl", {"num_timesteps": None}, "ddim-5: num_timesteps is missing"),
        ("measures.jsonl", {"fid": 3}, "ddim-5: fid: value is missing"),
        (
            "measures.jsonl",
            {"kid": {"value": 1.0, "low": "x", "high": 2.0}},
            "ddim-5: kid: low is missing",
        ),
        (
            "measures.jsonl",
            {"fid": {"value": 1.0, "low": None, "high": None}},
            "ddim-5: fid: low is missing",
        ),
        ("measures.jsonl", {"floor": []}, "ddim-5: floor: num_images is missing"),
        ("scores.jsonl", {"fid_label": 7}, "2: fid_label is missing"),
    ],
)
def test_invalid_records_are_refused(finished_study, tmp_path, name, change, message):
    """Found by scripts/fuzz.py."""
    shutil.copytree(finished_study, tmp_path / "out")
    path = tmp_path / "out" / "cells" / "T50-rescaled-seed0" / name
    lines = [path.read_text()] if name == "done.json" else path.read_text().splitlines(keepends=True)
    row = 1 if name == "measures.jsonl" else 0  # the first is of the speed
    lines[row] = json.dumps(json.loads(lines[row]) | change) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        write_report(tmp_path / "out")
    assert str(path) in str(refused.value)


def synthetic_results(values, betas=("rescaled", "fixed"), seeds=(0, 1, 2), own_noise=True):
    """Results with given scores: {(T, betas, seed): (value, half width of its interval)}.

    Args:
        own_noise: each training seed was sampled from its own noise; else all from that of seed 0.
    """
    study = dataclasses.replace(DIGITS, grid=dataclasses.replace(DIGITS.grid, seeds=seeds, betas=betas))
    cells = []
    for cell in study.cells:
        diffusion, seed = cell.config.diffusion, cell.config.training.seed
        kind = {"fixed range": "fixed"}.get(diffusion.beta_convention, diffusion.beta_convention)
        records = []
        if (diffusion.num_timesteps, kind, seed) in values and not cell.sampled_as:
            value, half = values[diffusion.num_timesteps, kind, seed]
            interval = {"value": value, "low": value - half, "high": value + half}
            chain = {"num_timesteps": diffusion.num_timesteps, "trained_convention": diffusion.beta_convention}
            noise = seed if own_noise else 0
            records = [
                {"key": "ddim-50", "fid": interval, "fid_label": "FD-classifier (n=360)", "seed": noise, **chain}
            ]
        cells.append(CellResult(cell, Path(), {}, None, records))
    return Results(study, cells)


def rescaled(values):
    return {(T, "rescaled", seed): score for (T, seed), score in values.items()}


def test_one_seed_is_compared_by_the_intervals_of_the_images():
    values = rescaled({(500, 0): (3.0, 0.392), (1000, 0): (1.0, 0.392), (2000, 0): (1.2, 0.392)})
    compared = compare(synthetic_results(values), "fid", "ddim-50")
    # Deviations of 0.2; the studentised range of three with no end of freedom is 3.314.
    assert compared.half == pytest.approx(3.314 * 0.2, rel=2e-3)
    assert min(compared.means, key=compared.means.get) == 1000
    sentence = answer(synthetic_results(values))
    expected = "the network of T = 1000 scored better than that of T = 500 by 2.0 (95 % interval 2.0 +- 0.66)"
    assert expected in sentence, "with one network per length only the networks are compared"
    assert "the training seed was not varied" in sentence


def test_a_difference_within_its_interval_is_reported_as_a_limit():
    sentence = answer(synthetic_results(rescaled({(500, 0): (1.1, 0.3), (1000, 0): (1.0, 0.4), (2000, 0): (1.2, 0.1)})))
    assert "there is no difference larger than" in sentence
    assert "better" not in sentence


def test_several_seeds_are_compared_by_their_spread():
    values = {(500, s): (v, 9.0) for s, v in enumerate((1.0, 1.2, 1.4))} | {
        (1000, s): (v, 9.0) for s, v in enumerate((3.1, 3.1, 3.4))
    }
    compared = compare(synthetic_results(rescaled(values)), "fid", "ddim-50")
    # Of two lengths it is the paired t: differences 2.1, 1.9, 2.0, deviation 0.1, t = 4.303 with 2 degrees of freedom.
    assert compared.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert compared.means == pytest.approx({500: 1.2, 1000: 3.2})
    assert "T = 500 scores better than T = 1000 by 2.0" in answer(synthetic_results(rescaled(values)))
    assert "3 training seeds, each sampled from noise of its own" in answer(synthetic_results(rescaled(values)))
    shared = compare(synthetic_results(rescaled(values), own_noise=False), "fid", "ddim-50")
    # Deviations of 9 / 1.96 of each score come on top; the studentised range of two with no end of freedom is 2.772.
    assert shared.half == pytest.approx(((4.303 * 0.1 / 3**0.5) ** 2 + (2.772 * 9 / 1.96) ** 2) ** 0.5, rel=1e-3)
    assert "as they were sampled from the same noise, the choice of images" in shared.covers
    del values[1000, 2], values[1000, 1]
    alone = compare(synthetic_results(rescaled(values)), "fid", "ddim-50")
    assert alone.means == pytest.approx({500: 1.0, 1000: 3.1})  # of seed 0, though T = 500 has three
    assert compare(synthetic_results(rescaled({(500, 0): (1.0, 0.1)})), "fid", "ddim-50") is None


def test_the_interval_holds_for_the_largest_of_the_differences():
    """Between equal lengths a difference is reported in about 5 % of studies, although it is the largest of three."""
    generator, called = random.Random(0), 0
    for _ in range(400):
        values = rescaled({(T, 0): (generator.gauss(5, 0.2), 0.392) for T in (500, 1000, 2000)})
        called += "scored better" in answer(synthetic_results(values, seeds=(0,)))
    assert 6 <= called <= 36


@pytest.mark.parametrize("lengths", [2, 3])
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("shared_noise", [0.0, 1.0])
def test_intervals_hold_in_simulated_studies(lengths, seeds, shared_noise):
    """All differences lie within their intervals in 95 of 100 studies, with a true difference or without.

    A score is that of its length, plus what training does to it, plus what the choice of images does: partly the same
    for all lengths of one seed, for they start from the same noise.
    """
    generator = np.random.default_rng(lengths * 100 + seeds * 10 + int(shared_noise))
    held, studies = 0, 2000
    true = np.arange(lengths) * 0.3
    for _ in range(studies):
        values = true[:, None] + 0.1 * generator.standard_normal((lengths, seeds))  # training, and sampling of its own
        values = values + shared_noise * generator.standard_normal((1, seeds))  # of all lengths alike
        errors = values.mean(1) - true
        held += float(errors.max() - errors.min()) <= half_interval(values.tolist(), None)
    assert 0.93 <= held / studies <= 0.97


@pytest.mark.parametrize("betas", [("rescaled", "cosine"), ("cosine", "rescaled"), ("fixed", "rescaled"), ("fixed",)])
def test_lengths_are_compared_within_one_kind_of_betas(betas):
    scores = {"rescaled": 1.0, "cosine": 5.0, "fixed": 9.0}
    values = {(T, kind, 0): (scores[kind] + T / 1e5, 0.1) for kind in scores for T in (500, 1000, 2000)}
    compared = compare(synthetic_results(values, betas, (0,)), "fid", "ddim-50")
    kind = betas[0] if betas[0] != "fixed" else betas[-1]
    assert set(compared.means) == {500, 1000, 2000}
    assert compared.means[500] == pytest.approx(scores[kind] + 0.005)
    assert compared.seeds == 1


def test_a_chain_is_in_the_legend_although_its_first_seed_failed():
    """Seed 0 has scores during training only; in charts of the final scores seed 1 names the chain."""
    results = synthetic_results(rescaled({(500, 1): (1.0, 0.1), (1000, 1): (2.0, 0.1)}), seeds=(0, 1))
    (failed,) = (r for r in results.cells if r.cell.name == "T500-rescaled-seed0")
    interval = {"value": 3.0, "low": 2.0, "high": 4.0}
    failed.records.append({"key": "training", "fid": interval, "fid_label": "FD (n=20)", "images_seen": 80})
    for result in results.cells:
        for record in result.records:
            record |= {"sampler": "ddim", "num_evaluations": 50}
    for series in (training_series(results), cost_series(results, "num_evaluations", "evaluations")):
        assert line_chart("a", series, "x", "y").count(f">{failed.cell.label}</text>") == 1


def test_csv_has_a_cell_for_each_column(finished_study):
    rows = list(csv.reader(io.StringIO(as_csv(gather(finished_study).records))))
    assert {len(row) for row in rows} == {len(rows[0])}


def test_a_record_without_a_key_is_ignored(finished_study, tmp_path, monkeypatch):
    """`ddpm evaluate --scores` can add one."""
    shutil.copytree(finished_study, tmp_path / "out")
    cell = tmp_path / "out" / "cells" / "T50-rescaled-seed0"
    (cell / "done.json").unlink()
    with (cell / "measures.jsonl").open("a") as stream:
        stream.write('{"step": 4}\n')
    run_study(open_study(finished_study), tmp_path / "out", cell=0, device="cpu")
    assert (cell / "done.json").is_file()


def test_the_fixed_range_is_compared_together_with_the_shared_chain():
    values = {(500, "fixed", 0): (5.0, 1.0), (1000, "rescaled", 0): (10.0, 1.0), (2000, "fixed", 0): (20.0, 1.0)}
    sentences = other_answers(synthetic_results(values, seeds=(0,)))
    assert any(line.endswith("5.00 for T = 500, 10.0 for T = 1000, 20.0 for T = 2000.") for line in sentences)
    # Deviations of 1 / 1.96, and the studentised range of three: 1.69
    beginning = "With betas of a fixed range, at equal evaluations, the network of T = 500 scored better than "
    assert any(line.startswith(beginning + "that of T = 2000 by 15 (95 % interval 15 +- 1.7)") for line in sentences)


@pytest.mark.parametrize(
    ("betas", "named"), [(("rescaled", "fixed"), "rescaled betas"), (("fixed",), "betas of a fixed range")]
)
def test_the_answer_names_the_betas_it_is_about(betas, named):
    kind = betas[0]
    values = {(T, kind if T != 1000 else "rescaled", 0): (1.0 + T / 1000, 0.1) for T in (500, 1000, 2000)}
    results = synthetic_results(values, betas, (0,))
    assert f"and with {named}, the network of T = 500 scored better than that of T = 2000" in answer(results)
    assert not any("fixed range" in sentence for sentence in other_answers(results))  # the answer is about it already


def test_each_training_seed_is_sampled_from_its_own_noise():
    """All lengths of one training seed share it, with every sampler, ancestral and in continuous time."""
    study = dataclasses.replace(DIGITS, grid=dataclasses.replace(DIGITS.grid, seeds=(0, 3)))
    for cell in study.cells:
        seeds = {sampling.seed for _, _, sampling in planned_scores(study, cell).values()}
        assert seeds == {cell.config.training.seed}

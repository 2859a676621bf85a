"""`ddpm report` of a study: a self-contained page, with results.json and results.csv beside it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import locked, replace_atomically
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.pictures.drawing import COLOURS
from ddpm_lab.studies.charts import Series, line_chart
from ddpm_lab.studies.comparison import answer, other_answers
from ddpm_lab.studies.grid import HEADLINE, STUDIES, Study, difference, open_study, read_study
from ddpm_lab.studies.html import format_number, render
from ddpm_lab.studies.results import Results, as_csv, gather

STYLES = {"rescaled": "-", "cosine": "-.", "fixed range": "--"}
MARKERS = {"-": "o", "-.": "v", "--": "D", ":": "s"}  # by line style
SAMPLER_MARKERS = {"dpmpp": "^", "heun": "P", "ipndm": "P", "unipc": "P", "ddpm": "X"}  # DDIM is drawn as a line


def write_report(out: Path) -> str:
    """Write report.html, results.json and results.csv of a study, finished or not.

    Returns:
        A line with the path of the page and the answer.
    Raises:
        InputError: not a study, or one without a score.
    """
    open_study(out)
    with locked(out, "--out", wait=True):  # of two workers that end together, the second writes the results of both
        results = gather(out)
        records = results.records
        if not records:
            raise InputError(f"study {out} has no score yet")
        replace_atomically(out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
        replace_atomically(out / "results.csv", as_csv(records).encode())
        replace_atomically(out / "report.html", report_page(results).encode("utf-8", "backslashreplace"))
    return f"{out / 'report.html'}: {answer(results)}"


def report_page(results: Results) -> str:
    """The page, as HTML."""
    return render(
        "study.html",
        results=results,
        headline=HEADLINE,
        source=_source(results.study),
        answer=answer(results),
        other_answers=other_answers(results),
        charts=_charts(results),
        chains=_chains(results.study),
    )


def _source(study: Study) -> str:
    """The argument of `ddpm study` that repeats a study: a packaged name only where the packaged study is equal."""
    same = study.name in STUDIES and difference(read_study(study.name), study) is None
    return study.name if same else f"{study.name}.toml"


def _charts(results: Results) -> dict[str, str]:
    """The charts, by name."""
    measures, label, floor = results.study.measures, results.label, results.first("floor", HEADLINE)
    level = (floor["fid"], "floor: real images") if floor and floor.get("fid") else None
    lengths = sorted(results.study.grid.num_timesteps)
    trained = sorted({*lengths, *(record["trained_timesteps"] for record in results.records)})
    costs = sorted({r["num_evaluations"] for r in results.records if r["key"] in measures.samplers})
    kid = f"KID over {results.features['name']} (n={measures.ancestral_images})"
    return {
        "training": line_chart(
            "training", training_series(results), "training images seen",
            results.first("fid_label", "training") or "FD", log_y=True,
        ),
        "evaluations": line_chart(
            "evaluations", cost_series(results, "num_evaluations", "evaluations"), "network evaluations per image",
            label, log_x=True, log_y=True, x_ticks=costs, level=level,
        ),
        "seconds": line_chart(
            "seconds", cost_series(results, "seconds_an_image", "s"), "seconds per image", label, log_x=True,
            log_y=True, level=level,
        ),
        "native": line_chart(
            "native", _series(results, ["ancestral"], "kid", "num_timesteps", "{key}"),
            "steps of ancestral sampling (all T)", kid, log_x=True, x_ticks=lengths,
        ),
        "bounds": line_chart(
            "bounds", _series(results, ["bound"], "bits_per_dimension", "trained_timesteps", "{key}"),
            "T of the chain", "bits per dimension, upper bound", log_x=True, x_ticks=trained,
        ),
    }  # fmt: skip


def training_series(results: Results) -> list[Series]:
    """Scores during training over the images seen."""
    return _series(results, ["training"], "fid", "images_seen", "{images_seen:,} images")


def cost_series(results: Results, cost: str, unit: str) -> list[Series]:
    """Scores at the end over the cost of an image: lines for DDIM, dots for other samplers.

    Args:
        cost: field of the records; unit: of that.
    """
    keys, note = results.study.measures.samplers, f"{{key}}, {{{cost}:.3g}} {unit}"
    series = _series(results, keys, "fid", cost, note, "ddim")
    for sampler, marker in SAMPLER_MARKERS.items():
        dots = _series(results, keys, "fid", cost, note, sampler)
        series += [dataclasses.replace(line, name="", style="", marker=marker) for line in dots]
    return series


def _series(
    results: Results, keys: Sequence[str], score: str, x: str, note: str, sampler: str | None = None
) -> list[Series]:
    """A line for each cell, or dots where x is the length of the chain.

    Args:
        keys: of the records to show; sampler: of these, where only one is wanted.
        score, x: fields of the records; those that lack one are left out.
        note: the text of a point, a format string over the fields of its record.
    """
    series, over_length = [], x.endswith("timesteps")
    for result in results.cells:
        cell, T = result.cell, result.cell.config.diffusion.num_timesteps
        style = ":" if cell.sampled_as else STYLES[cell.config.diffusion.beta_convention]
        colour = COLOURS[6] if cell.sampled_as else COLOURS[results.study.grid.num_timesteps.index(T) % 6]
        shift = 1.04 if over_length and style != "-" else 1.0  # so that dots of one T do not cover each other
        points = []
        for record in result.records:
            chosen = record["key"] in keys and sampler in (None, record.get("sampler"))
            if chosen and record.get(x) and record.get(score):
                value, low, high = (record[score][name] for name in ("value", "low", "high"))
                interval = f"{format_number(value)} ({format_number(low)} to {format_number(high)})"
                text = f"{cell.name}, {note.format_map(record)}: {interval}"
                points.append((record[x] * shift, value, low, high, text))
        series.append(Series(cell.label, colour, points, "" if over_length else style, MARKERS[style]))
    return series


def _chains(study: Study) -> list[dict[str, Any]]:
    """The state of an image at the end of each kind of chain, by length and convention."""
    chains = {}
    for cell in study.cells:
        diffusion = cell.config.diffusion
        schedule = build_schedule(diffusion)
        chains[diffusion.num_timesteps, diffusion.beta_convention] = {
            "label": cell.label,
            "signal": math.sqrt(schedule.alpha_bar[-1]),
            "snr": float(schedule.snr[-1]),
            "share_of_noise": float((schedule.alpha_bar < 1e-3).double().mean()),
        }
    return [chains[key] for key in sorted(chains)]

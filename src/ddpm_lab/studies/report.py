"""`ddpm report` of a study: one page that needs nothing but itself, with results.json and results.csv beside it."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import locked, replace_atomically
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.pictures.charts import Series, line_chart
from ddpm_lab.pictures.drawing import COLOURS
from ddpm_lab.studies.grid import HEADLINE, STUDIES, Cell, Study, difference, open_study, read_study
from ddpm_lab.studies.html import embedded, format_number, record_as_text, render
from ddpm_lab.studies.results import (
    BETAS,
    CellResult,
    Results,
    answer,
    as_csv,
    compare,
    compared_convention,
    gather,
    in_words,
)

STYLES = {"rescaled": "-", "cosine": "-.", "fixed range": "--"}
MARKERS = {"-": "o", "-.": "v", "--": "D", ":": "s"}  # by the style of the line
DOTS = {"ddim": "", "dpmpp": "^", "heun": "P", "ddpm": "X"}  # by the sampler
PICTURES = ("samples.png", "ancestral.png", "forward.gif", "reverse.gif")


def write_report(out: Path) -> str:
    """Write report.html, results.json and results.csv of a study, as far as it has come.

    Returns:
        A line that says what was made and what was found.
    Raises:
        InputError: not a study, or one of which nothing is done yet.
    """
    open_study(out)
    with locked(out, "--out", wait=True):  # of two workers that end together, the last writes what both have done
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
    finished = [result for result in results.cells if result.done]
    records = results.records
    return render(
        "study.html",
        study=results.study,
        source=_repeating(results.study),
        answer=answer(results),
        others=_other_answers(results),
        charts=_charts(results),
        rows=[_row(result, records) for result in finished],
        keys=results.study.measures.samplers,
        headline=HEADLINE,
        label=_headline_label(results),
        features=_features(results),
        sample_steps=results.cells[0].cell.config.evaluation.sample_steps,
        other_samplers=", ".join(sorted({r["sampler"] for r in records if r.get("fid")} - {"ddim", "dpmpp"})),
        unfinished=[result for result in results.cells if not result.done],
        chains=_chains(results),
        pictures=[_pictures(result) for result in {r.cell.label: r for r in reversed(finished)}.values()][::-1],
        records=[
            record_as_text(f"{record['cell']}, {record['key']}", record, ("cell", "key", "traceback"))
            for record in records
        ],
        places=_places(finished),
        dtypes=_dtypes(records),
        floor=_floor(records, HEADLINE),
        native_floor=_floor(records, "ancestral"),
    )


def _floor(records: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """What real images score, in as many as a measure has."""
    return next((record["floor"] for record in records if record["key"] == key and record.get("floor")), None)


def _places(finished: list[CellResult]) -> dict[str, list[str]]:
    """Where cells were computed and with what, in words, each with the names of its cells."""
    places: dict[str, list[str]] = {}
    for result in finished:
        done = result.done or {}
        threads = f"{done['threads']} thread{'s' * (done['threads'] != 1)}"
        versions = ", ".join(f"{name} {number}" for name, number in done["versions"].items())
        place = f"on {done['device']} ({done['machine']}) with {threads}; {versions}."
        places.setdefault(place, []).append(result.cell.name)
    return places


def _dtypes(records: list[dict[str, Any]]) -> dict[int, tuple[str, ...]]:
    """What the cells of each training seed were sampled in."""
    found: dict[int, set[str]] = {}
    for record in records:
        if record["key"] != "training" and record.get("dtype"):
            found.setdefault(record["seed_of_training"], set()).add(str(record["dtype"]))
    return {seed: tuple(sorted(dtypes)) for seed, dtypes in sorted(found.items())}


def _headline_label(results: Results) -> str:
    """What the headline's distance is called, with the number of images."""
    scored = [r for r in results.records if r["key"] != "training" and r.get("fid")]
    headline = [r for r in scored if r["key"].startswith(HEADLINE)]
    return next((r["fid_label"] for r in headline + scored), "FD")


def _features(results: Results) -> dict[str, Any]:
    """The network that scores are taken over, as records name it."""
    named = (record["features"] for record in results.records if isinstance(record.get("features"), dict))
    return {"name": "features", "num_classes": None} | next(named, {})


def _repeating(study: Study) -> str:
    """What `ddpm study` is to be given: the packaged name only where the packaged study is this one."""
    same = study.name in STUDIES and difference(read_study(study.name), study) is None
    return study.name if same else f"{study.name}.toml"


def _colour(results: Results, cell: Cell) -> str:
    if cell.sampled_as:
        return COLOURS[6]
    lengths = list(results.study.grid.num_timesteps)
    return COLOURS[lengths.index(cell.config.diffusion.num_timesteps) % 6]


def _style(cell: Cell) -> str:
    return ":" if cell.sampled_as else STYLES[cell.config.diffusion.beta_convention]


def _point(x: float, record: dict[str, Any], score: str, what: str) -> tuple[float, float, Any, Any, str]:
    found = record[score]
    interval = f"{format_number(found['low'])} to {format_number(found['high'])}"
    return x, found["value"], found["low"], found["high"], f"{what}: {format_number(found['value'])} ({interval})"


def _charts(results: Results) -> dict[str, str]:
    """Each chart by its name."""
    records, measures = results.records, results.study.measures
    label = next((record["fid_label"] for record in records if record["key"] == "training" and record.get("fid")), "FD")
    final = _headline_label(results)
    floor = _floor(records, HEADLINE)
    level = (floor["fid"], "floor: real images") if floor and floor["fid"] else None
    lengths = sorted(results.study.grid.num_timesteps)
    costs = sorted({r["num_evaluations"] for r in records if r["key"] in measures.samplers})
    return {
        "training": line_chart(
            "training", _training_series(results), "training images seen", label, log_y=True
        ),
        "evaluations": line_chart(
            "evaluations", _cost_series(results, "num_evaluations", "evaluations"),
            "evaluations of the network an image", final, log_x=True, log_y=True, x_ticks=costs, level=level,
        ),
        "seconds": line_chart(
            "seconds", _cost_series(results, "seconds_an_image", "s"), "seconds an image", final,
            log_x=True, log_y=True, level=level,
        ),
        "native": line_chart(
            "native", _single_series(results, "ancestral", "kid", "num_timesteps"),
            "steps of ancestral sampling, all of the chain",
            f"KID over {_features(results)['name']} (n={measures.ancestral_images})",
            log_x=True, x_ticks=lengths,
        ),
        "bounds": line_chart(
            "bounds", _single_series(results, "bound", "bits_per_dimension", "trained_timesteps"), "T of the chain",
            "bits per dimension, upper bound", log_x=True,
            x_ticks=sorted({*lengths, *(record["trained_timesteps"] for record in records)}),
        ),
    }  # fmt: skip


def _named_once(series: list[Series]) -> list[Series]:
    """The series that have points, with each name in the legend once, for all seeds."""
    shown: list[Series] = []
    for one in series:
        if one.points:
            shown.append(dataclasses.replace(one, name="" if one.name in {s.name for s in shown} else one.name))
    return shown


def _training_series(results: Results) -> list[Series]:
    """Scores over the images seen, a line for each cell."""
    series = []
    for result in results.cells:
        points = [
            _point(r["images_seen"], r, "fid", f"{result.cell.name}, {r['images_seen']:,} images")
            for r in result.records
            if r["key"] == "training" and r.get("fid")
        ]
        colour, style = _colour(results, result.cell), _style(result.cell)
        series.append(Series(result.cell.label, colour, points, style, MARKERS[style]))
    return _named_once(series)


def _cost_series(results: Results, cost: str, unit: str) -> list[Series]:
    """Scores at the end over what an image costs: a line for DDIM, dots for the others."""
    series = []
    for result in results.cells:
        records = [record for key in results.study.measures.samplers if (record := result.at_end(key))]
        for sampler, dot in DOTS.items():
            points = [
                _point(r[cost], r, "fid", f"{result.cell.name}, {r['key']}, {r[cost]:.3g} {unit}")
                for r in records
                if r.get("sampler") == sampler and r.get(cost) and r.get("fid")
            ]
            name = result.cell.label if sampler == "ddim" else ""
            style = _style(result.cell)
            shape = (style, MARKERS[style]) if sampler == "ddim" else ("", dot)
            series.append(Series(name, _colour(results, result.cell), points, *shape))
    return _named_once(series)


def _single_series(results: Results, key: str, score: str, x: str) -> list[Series]:
    """One kind of measure, a dot for each record of it."""
    series = []
    for result in results.cells:
        aside = 1.0 if _style(result.cell) == "-" else 1.04  # or dots of one T would cover each other
        points = [
            _point(r[x] * aside, r, score, f"{result.cell.name}, {r['key']}")
            for r in result.records
            if r["key"].partition(" ")[0] == key and r.get(score)
        ]
        marker = MARKERS[_style(result.cell)]
        series.append(Series(result.cell.label, _colour(results, result.cell), points, "", marker))
    return _named_once(series)


def _other_answers(results: Results) -> list[str]:
    """A sentence each for the native axis, the bound, the fixed range and continuous time, where they were measured."""
    said, convention = [], compared_convention(results.study)
    betas = BETAS[convention]
    native = compare(results, "kid", "ancestral")
    if native is not None:
        listed = ", ".join(f"{format_number(value)} for T = {T}" for T, value in sorted(native.means.items()))
        said.append(
            f"With all T steps of each chain (ancestral, n={results.study.measures.ancestral_images}) and {betas}, KID "
            f"over {_features(results)['name']}: {listed}; "
            f"the 95 % interval of the largest difference is +- {format_number(native.half)}, "
            f"and covers {native.covers}."
        )
    label = _headline_label(results)
    kept = None if convention == "fixed range" else compare(results, "fid", HEADLINE, "fixed range")
    if kept is not None:  # else it is the answer, or was not measured
        said.append(f"With {BETAS['fixed range']}, at equal evaluations, {in_words(kept, label)}.")
    means = _continuous_means(results)
    if means:
        listed = ", ".join(f"{format_number(value)} for T = {T}" for T, value in sorted(means.items()))
        of = BETAS["cosine" if convention == "cosine" else "rescaled"]
        what = "One network of continuous time (T = 10,000), sampled at equal evaluations as a chain of each length"
        said.append(f"{what} with {of}, {label}: {listed}.")
    return said


def _continuous_means(results: Results) -> dict[int, float]:
    """Scores at equal evaluations of networks of continuous time, by the T they were sampled as, means over seeds."""
    found: dict[int, list[float]] = {}
    for record in results.records:
        if record["key"].startswith(f"{HEADLINE} as T=") and record.get("fid"):
            found.setdefault(record["num_timesteps"], []).append(record["fid"]["value"])
    return {T: fmean(values) for T, values in found.items()}


def _row(result: CellResult, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table of cells: each number with the record behind it."""
    own = f" as T={result.cell.shown_as}" if result.cell.sampled_as else ""

    def number(key: str, score: str) -> dict[str, Any] | None:
        record = result.at_end(key) or result.at_end(key + own)
        if record is None or not record.get(score):
            return None
        return {**record[score], "record": records.index(record)}

    return {
        "name": result.cell.name,
        "label": result.cell.label,
        "shown_as": f"as T = {result.cell.shown_as}, " if own else "",
        "done": result.done,
        "fid": number(HEADLINE, "fid"),
        "inception_score": number(HEADLINE, "inception_score"),
        "kid": number(HEADLINE, "kid"),
        "native": number("ancestral", "kid"),
        "bound": number("bound", "bits_per_dimension"),
        "samplers": {
            r["key"]: number(r["key"], "fid") for r in result.records if r.get("fid") and r["key"] != "training"
        },
    }


def _chains(results: Results) -> list[dict[str, Any]]:
    """What each kind of chain does to an image by its end."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results.cells:
        diffusion = result.cell.config.diffusion
        schedule = build_schedule(diffusion)
        gone = float((schedule.alpha_bar < 1e-3).double().mean())
        last = float(schedule.alpha_bar[-1])
        seen[(diffusion.num_timesteps, diffusion.beta_convention)] = {
            "label": result.cell.label,
            "signal": math.sqrt(last),
            "snr": float(schedule.snr[-1]),
            "gone": gone,
        }
    return [seen[key] for key in sorted(seen)]


def _pictures(result: CellResult) -> dict[str, Any]:
    """The pictures of a cell, as data in the page."""
    shown = f"{result.cell.label}, as T = {result.cell.shown_as}" if result.cell.sampled_as else result.cell.label
    return {
        "label": shown,
        "name": result.cell.name,
        **{Path(name).stem: embedded(result.folder / name) for name in PICTURES},
    }

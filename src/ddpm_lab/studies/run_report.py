"""`ddpm report` of a run, or of a folder of runs: one page with curves, scores, samples and settings."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.config import Config
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import replace_atomically, writable
from ddpm_lab.core.log import SCORES, read_lines
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.evaluation.score_table import class_count, floor_count
from ddpm_lab.models.trained import read_run_record
from ddpm_lab.pictures.charts import Series, line_chart
from ddpm_lab.pictures.curves import RunLog, read_run, training_figure
from ddpm_lab.pictures.drawing import COLOURS, printable
from ddpm_lab.studies.html import as_data, embedded, format_number, record_as_text, render

COLUMNS = ("fid", "inception_score", "kid")  # of the table of scores


@dataclass(frozen=True)
class Run:
    """A run and what is known of it.

    Attributes:
        name: of its folder.
        folder: where it lies.
        config: its own.
        record: `config.json` whole.
        log: of its training; None where nothing is logged yet.
        scores: the lines of scores.jsonl that hold a score.
    """

    name: str
    folder: Path
    config: Config
    record: dict[str, Any]
    log: RunLog | None
    scores: list[dict[str, Any]]


def write_run_report(folder: Path) -> str:
    """Write report.html into the folder of a run, or into one that holds runs, whether or not they are being trained.

    Returns:
        A line that says what was made.
    Raises:
        InputError: no run, or one that is damaged; the folder cannot be written.
        OSError: the disk is full.
    """
    runs = [_open_run(path) for path in _run_folders(folder)]
    page = run_page(folder.resolve().name, runs).encode("utf-8", "backslashreplace")
    with writable(str(folder / "report.html")):
        replace_atomically(folder / "report.html", page)
    return f"{folder / 'report.html'}: {', '.join(run.name for run in runs)}"


def _run_folders(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file():
        return [folder]
    within = sorted(folder.iterdir()) if folder.is_dir() else []
    runs = [path for path in within if (path / "config.json").is_file() and not path.name.startswith(".")]
    runs = list({path.resolve(): path for path in reversed(runs)}.values())[::-1]  # a link to one of them is no other
    if not runs:
        raise InputError(
            f"{folder} is neither a study nor a run, and holds none: there is no study.json in it, and no config.json"
        )
    return runs


def _open_run(folder: Path) -> Run:
    record, config, _ = read_run_record(folder / "config.json")
    scores = [line for line in read_lines(folder / SCORES) if any(_score(line, name) for name in COLUMNS)]
    name = folder.name or folder.resolve().name  # of '.', too
    return Run(printable(name), folder, config, record, read_run(folder), scores)


def _label(record: dict[str, Any]) -> str:
    """What a record calls its distance; '' where it does not say."""
    label = record.get("fid_label")
    return printable(label) if isinstance(label, str) else ""


def _score(record: dict[str, Any], name: str) -> dict[str, Any] | None:
    """One score of a record, {value, low, high}, the ends None where no interval is known; None where it has none."""
    score = record.get(name)
    if not isinstance(score, dict) or not fits(score.get("value"), float):
        return None
    known = all(fits(score.get(end), float) for end in ("low", "high"))
    return {"value": score["value"], **{end: score[end] if known else None for end in ("low", "high")}}


def run_page(title: str, runs: Sequence[Run]) -> str:
    """The page, as HTML."""
    # scores have charts of their own
    logs = [dataclasses.replace(run.log, scores=[], name=run.name) for run in runs if run.log is not None]
    curves = io.BytesIO()
    if logs:
        training_figure(logs).savefig(curves, format="png", dpi=150)
    numbered = [(run, record) for run in runs for record in run.scores]
    return render(
        "run.html",
        title=title,
        runs=[_summary(run) for run in runs],
        curves=as_data(curves.getvalue(), ".png") if logs else None,
        charts=_charts(runs),
        rows=[_row(index, run, record) for index, (run, record) in enumerate(numbered)],
        records=[record_as_text(f"{run.name}, step {record['step']}", record, ("step",)) for run, record in numbered],
    )


def _summary(run: Run) -> dict[str, Any]:
    """What a run is, how far it came, its newest samples, and its settings as a recipe."""
    channels, size, _ = run.record["data"]["image_shape"]
    with torch.device("meta"):
        model = build_unet(run.config.model, channels, size, run.config.diffusion.num_timesteps)
    done = run.log.lines[-1]["step"] if run.log is not None else 0
    grids = sorted(
        path for path in (run.folder / "samples").glob("step_*.png") if path.stem.removeprefix("step_").isdecimal()
    )
    begun_from = run.record.get("from", {})
    diffusion = run.config.diffusion
    return {
        "name": run.name,
        "data": run.record["data"].get("name"),
        "shape": f"{channels} x {size} x {size}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "process": f"T = {diffusion.num_timesteps}, {diffusion.beta_convention} betas, predicts {diffusion.prediction}",
        "step": done,
        "of": run.config.training.num_steps,
        "images": done * run.config.training.batch_size,
        "grid": embedded(grids[-1]) if grids else None,
        "grid_step": int(grids[-1].stem.removeprefix("step_")) if grids else None,
        "grid_steps": run.config.evaluation.sample_steps,
        "film": embedded(run.folder / "samples" / "reverse.gif"),
        "recipe": as_toml(run.config),
        "begun_from": begun_from.get("source"),
        "begun_step": begun_from.get("step"),
        "imported": "imported" in run.record,
        "versions": [
            {**run.record.get("versions", {}), **run.record.get("computed", {})},
            *run.record.get("earlier_versions", []),
        ],
    }


def as_toml(config: Config) -> str:
    """A configuration as a recipe, which `load_recipe` reads back to the same one; JSON's values are TOML's."""
    groups = []
    for group, settings in config.to_dict().items():
        given = {name: value for name, value in settings.items() if value is not None}
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
        groups.append("\n".join([f"[{group}]", *lines]))
    return "\n\n".join(groups)


def _charts(runs: Sequence[Run]) -> list[str]:
    """Frechet distances in the course of training over images seen; a chart for each label, for they do not compare."""
    scored = [record for run in runs for record in run.scores if _in_training(record)]
    labels = list(dict.fromkeys(label for record in scored if (label := _label(record))))
    charts = []
    for number, label in enumerate(labels):
        series = []
        for index, run in enumerate(runs):
            points = []
            for record in run.scores:
                score = _score(record, "fid")
                if score is not None and _in_training(record) and _label(record) == label:
                    seen = record["step"] * run.config.training.batch_size
                    told = f"{run.name}, {seen:,} images: {format_number(score['value'])}"
                    points.append((seen, score["value"], score["low"], score["high"], told))
            series.append(Series(run.name, COLOURS[index % len(COLOURS)], points))
        charts.append(line_chart(f"scores{number}", series, "training images seen", label, log_y=True))
    return charts


def _in_training(record: dict[str, Any]) -> bool:
    return record.get("by") == "training" and _score(record, "fid") is not None


def _row(index: int, run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of scores: each number with the record behind it, and the floor's beside it."""
    told = record.get("floor")
    floor = told if isinstance(told, dict) else {}
    scores = {name: _score(record, name) for name in COLUMNS}
    sampler, count = record.get("sampler"), record.get("num_images")
    return {
        "run": run.name,
        "step": record["step"],
        "label": _label(record),
        "reference": reference.get("name") if isinstance(reference := record.get("reference"), dict) else None,
        "num_images": f"{count:,}" if isinstance(count, int) else "",
        "sampled": f"{sampler}, {record.get('num_evaluations')} evaluations{guidance_label(record)}" if sampler else "",
        "floor": {name: floor[name] for name in COLUMNS if fits(floor.get(name), float)},
        "floor_images": floor_count(record),
        "classes": class_count(record),
        **{name: score and score | {"record": index} for name, score in scores.items()},
    }

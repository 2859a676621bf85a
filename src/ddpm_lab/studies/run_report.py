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
from ddpm_lab.core.files import printable, replace_atomically, writable
from ddpm_lab.core.log import SCORES, read_lines
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.models.trained import read_run_record
from ddpm_lab.pictures.curves import RunLog, read_run, training_figure
from ddpm_lab.pictures.drawing import COLOURS
from ddpm_lab.studies.charts import Series, line_chart
from ddpm_lab.studies.html import as_data, format_number, render
from ddpm_lab.studies.record_reader import FLOOR, SCORE_NAMES, read_score, valid_fields

ROW = {"fid_label": str, "sampler": str, "num_evaluations": int, "num_images": int, "reference": {"name": str}}


@dataclass(frozen=True)
class Run:
    """A run and its content.

    Attributes:
        name: of its folder.
        folder: its path.
        config: its settings.
        record: the whole of `config.json`.
        log: of its training; None where nothing is logged yet.
        scores: the lines of scores.jsonl that hold a score; the page calls them by `cell` and `key`.
    """

    name: str
    folder: Path
    config: Config
    record: dict[str, Any]
    log: RunLog | None
    scores: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step in its log."""
        return int(self.log.lines[-1]["step"]) if self.log is not None else 0

    @property
    def num_parameters(self) -> int:
        """The number of parameters of its network."""
        channels, size, _ = self.record["data"]["image_shape"]
        with torch.device("meta"):
            model = build_unet(self.config.model, channels, size, self.config.diffusion.num_timesteps)
        return sum(parameter.numel() for parameter in model.parameters())

    @property
    def grid(self) -> Path | None:
        """The newest picture of samples."""
        grids = (path for path in (self.folder / "samples").glob("step_*.png") if path.stem[5:].isdecimal())
        return max(grids, default=None)

    @property
    def versions(self) -> list[dict[str, Any]]:
        """Package versions of its training, the latest first."""
        latest = self.record.get("versions", {}) | self.record.get("computed", {})
        return [latest, *self.record.get("earlier_versions", [])]


def write_run_report(folder: Path) -> str:
    """Write report.html into the folder of a run or a folder of runs, which may be in training.

    Returns:
        A line with the path of the page and the names of the runs.
    Raises:
        InputError: no run, a damaged run, or a folder that cannot be written.
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
    if not runs:
        raise InputError(f"{folder} is not a study (no study.json), not a run (no config.json), and contains no runs")
    return list({path.resolve(): path for path in reversed(runs)}.values())[::-1]  # a link to one of them is not shown


def _open_run(folder: Path) -> Run:
    record, config, _ = read_run_record(folder / "config.json")
    name = printable(folder.name or folder.resolve().name)  # '.' has no name
    scores = [
        line | {"cell": name, "key": f"step {line['step']}"}
        for line in read_lines(folder / SCORES)
        if any(read_score(line, score) for score in SCORE_NAMES)
    ]
    return Run(name, folder, config, record, read_run(folder), scores)


def run_page(title: str, runs: Sequence[Run]) -> str:
    """The page, as HTML."""
    # scores have charts of their own
    logs = [dataclasses.replace(run.log, scores=[], name=run.name) for run in runs if run.log is not None]
    curves = io.BytesIO()
    if logs:
        training_figure(logs).savefig(curves, format="png", dpi=150)
    records = [record for run in runs for record in run.scores]
    rows = [valid_fields(record, ROW) | {"floor": valid_fields(record.get("floor"), FLOOR)} for record in records]
    return render(
        "run.html",
        title=title,
        runs=runs,
        curves=as_data(curves.getvalue(), ".png") if logs else None,
        charts=_charts(runs),
        records=records,
        rows=list(zip(records, rows, strict=True)),
        as_toml=as_toml,
    )


def as_toml(config: Config) -> str:
    """A configuration as a recipe that `load_recipe` can read; values in JSON are valid in TOML."""
    groups = []
    for group, settings in config.to_dict().items():
        lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in settings.items() if v is not None]
        groups.append("\n".join([f"[{group}]", *lines]))
    return "\n\n".join(groups)


def _charts(runs: Sequence[Run]) -> list[str]:
    """Frechet distances during training over images seen; a chart for each label, as labels do not compare."""
    series: dict[str, dict[str, Series]] = {}  # by label, then by run
    for index, run in enumerate(runs):
        for record in run.scores:
            score, label = read_score(record, "fid"), record.get("fid_label")
            if score is None or record.get("by") != "training" or not isinstance(label, str):
                continue
            seen = record["step"] * run.config.training.batch_size
            text = f"{run.name}, {seen:,} images: {format_number(score['value'])}"
            line = Series(run.name, COLOURS[index % len(COLOURS)], [])
            line = series.setdefault(printable(label), {}).setdefault(run.name, line)
            line.points.append((seen, score["value"], score["low"], score["high"], text))
    return [
        line_chart(f"scores{number}", list(lines.values()), "training images seen", label, log_y=True)
        for number, (label, lines) in enumerate(series.items())
    ]

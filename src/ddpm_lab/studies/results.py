"""The results of a study: what its cells have recorded, read, checked and written as a table."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import read_json
from ddpm_lab.core.log import SCORES, read_lines
from ddpm_lab.studies.cell import MEASURES
from ddpm_lab.studies.grid import HEADLINE, Cell, Study, cell_folder, failure_path, is_done, open_study
from ddpm_lab.studies.record_reader import INTERVALS, MEASURE, SCORE_NAMES, SCORED, SUMMARY, first_fault

COLUMNS = (
    "cell", "seed", "trained_timesteps", "beta_convention", "key", "step", "images_seen", "num_timesteps", "sampler",
    "num_steps", "num_evaluations", "num_images", "fid_label", "fid", "fid_low", "fid_high", "inception_score",
    "inception_score_low", "inception_score_high", "kid", "kid_low", "kid_high", "bits_per_dimension",
    "bits_per_dimension_low", "bits_per_dimension_high", "seconds_an_image", "floor_fid", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class CellResult:
    """A cell and what is known of it.

    Attributes:
        cell: its settings.
        folder: where its files are.
        summary: the content of done.json; None while the cell is not finished.
        failure: why it failed, or None.
        records: its scores during training, then its measures, each in the order of the file.
    """

    cell: Cell
    folder: Path
    summary: dict[str, Any] | None
    failure: str | None
    records: list[dict[str, Any]]

    @property
    def place(self) -> str:
        """Where and with which versions a finished cell was computed."""
        summary = self.summary or {}
        versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        threads = f"{summary['threads']} thread{'s' * (summary['threads'] != 1)}"
        return f"on {summary['device']} ({summary['machine']}) with {threads}; {versions}."

    def measure(self, key: str) -> dict[str, Any] | None:
        """The record with a key, or None."""
        return next((record for record in self.records if record["key"] == key), None)


@dataclass(frozen=True)
class Results:
    """A study with the results of all its cells."""

    study: Study
    cells: list[CellResult]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of all cells."""
        return [record for result in self.cells for record in result.records]

    def first(self, field: str, key: str | None = None) -> Any:
        """The first value of a field, among all records or those with one key; None where no record has it."""
        return next((r[field] for r in self.records if r.get(field) and key in (None, r["key"])), None)

    @property
    def features(self) -> dict[str, Any]:
        """The network over whose features scores are taken, as records name it."""
        return {"name": "features", "num_classes": None} | (self.first("features") or {})

    @property
    def label(self) -> str:
        """What the Frechet distance at the end is called, with the number of images, as in 'FID (n=1,000)'."""
        scored = [record for record in self.records if record["key"] != "training" and record.get("fid")]
        headline = [record for record in scored if record["key"].startswith(HEADLINE)]
        return next((record["fid_label"] for record in headline + scored), "FD")


def gather(out: Path) -> Results:
    """Read the results in the folder of a study.

    Raises:
        InputError: not a study, or a record that no study writes.
    """
    study = open_study(out)
    return Results(study, [_read_cell(out, cell) for cell in study.cells])


def _read_cell(out: Path, cell: Cell) -> CellResult:
    folder, summary, failure = cell_folder(out, cell), None, None
    if is_done(out, cell):
        summary = read_json(folder / "done.json")
        _check(folder / "done.json", summary, SUMMARY)
    elif failure_path(out, cell).is_file():
        failure = _read_failure(failure_path(out, cell))
    return CellResult(cell, folder, summary, failure, list(_read_records(cell, folder)))


def _read_failure(path: Path) -> str:
    """Why a cell failed."""
    try:
        failure = read_json(path)
    except InputError:
        return f"{path.name} cannot be read"
    fault = first_fault(failure, {"error": str})
    return f"{path.name}: {fault} is missing or has the wrong type" if fault else str(failure["error"])


def _check(path: Path, values: object, declared: dict[str, Any], where: str = "") -> None:
    """Refuse a file that no study writes."""
    fault = first_fault(values, declared)
    if fault is not None:
        raise InputError(
            f"{path}: {where}{fault} is missing or has the wrong type; delete the file and run the study again"
        )


def _read_records(cell: Cell, folder: Path) -> Iterator[dict[str, Any]]:
    """Each record with its cell; the key of scores during training is 'training'. The last measure of a key counts."""
    training, diffusion = cell.config.training, cell.config.diffusion
    common = {
        "cell": cell.name,
        "label": cell.label,
        "seed_of_training": training.seed,
        "trained_timesteps": diffusion.num_timesteps,
        "trained_convention": diffusion.beta_convention,
    }
    measures = [line for line in read_lines(folder / MEASURES) if isinstance(line.get("key"), str)]
    scores = [line for line in read_lines(folder / SCORES) if line.get("by") == "training"]
    for path, lines in ((folder / MEASURES, measures), (folder / SCORES, scores)):
        for line in lines:
            scored = any(line.get(name) is not None for name in SCORE_NAMES)
            _check(path, line, SCORED if scored else MEASURE, f"{line.get('key', line['step'])}: ")
    for line in scores:
        yield common | {"key": "training", "images_seen": line["step"] * training.batch_size} | line
    last = {line["key"]: line for line in measures}
    speed = last.get("speed", {}).get("seconds_an_evaluation")
    for line in last.values():
        evaluations = line.get("num_evaluations")
        cost = None if speed is None or evaluations is None else speed * evaluations
        yield common | {"images_seen": line["step"] * training.batch_size, "seconds_an_image": cost} | line


def as_csv(records: list[dict[str, Any]]) -> str:
    """The records as a table with one line each and `COLUMNS`."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        floor = record.get("floor") or {}
        row = record | {"seed": record["seed_of_training"], "floor_fid": floor.get("fid")}
        for name in INTERVALS:
            score = record.get(name)
            if score is not None:
                row |= {name: score["value"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        writer.writerow(row)
    return stream.getvalue()

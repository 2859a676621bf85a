"""What a study found: its records, gathered; the comparison, with its uncertainty; the answer in a sentence."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import read_json
from ddpm_lab.core.log import SCORES, read_lines
from ddpm_lab.core.settings import fits
from ddpm_lab.studies.cell import MEASURES
from ddpm_lab.studies.grid import HEADLINE, Cell, Study, cell_folder, failure_path, is_done, open_study
from ddpm_lab.studies.html import format_number

COLUMNS = (
    "cell", "seed", "trained_timesteps", "beta_convention", "key", "step", "images_seen", "num_timesteps", "sampler",
    "num_steps", "num_evaluations", "num_images", "fid_label", "fid", "fid_low", "fid_high", "inception_score",
    "inception_score_low", "inception_score_high", "kid", "kid_low", "kid_high", "bits_per_dimension",
    "bits_per_dimension_low", "bits_per_dimension_high", "seconds_an_image", "floor_fid", "dtype",
)  # fmt: skip
SUMMARY: dict[str, Any] = {
    "images": int,
    "seed": int,
    "seconds_of_training": float,
    "seconds_of_scoring": float,
    "device": str,
    "machine": str,
    "threads": int,
    "versions": dict,
}
BETAS = {"rescaled": "rescaled betas", "cosine": "cosine betas", "fixed range": "betas of a fixed range"}
INTERVAL: dict[str, Any] = {"value": float, "low": float, "high": float}
INTERVALS = ("fid", "inception_score", "kid", "bits_per_dimension")
FLOOR: dict[str, Any] = {"num_images": int, "fid": float | None, "inception_score": float | None, "kid": float | None}
SCORED: dict[str, Any] = {"fid_label": str, "sampler": str, "num_timesteps": int, "num_evaluations": int}


@dataclass(frozen=True)
class CellResult:
    """A cell and what is known of it.

    Attributes:
        cell: which.
        folder: where it lies.
        done: the summary, or None where it is not finished.
        failure: why it failed, or None.
        records: of its scores and measures, in the order they were made.
    """

    cell: Cell
    folder: Path
    done: dict[str, Any] | None
    failure: str | None
    records: list[dict[str, Any]]

    def at_end(self, key: str) -> dict[str, Any] | None:
        """The record of a measure, or None."""
        return next((record for record in self.records if record["key"] == key), None)


@dataclass(frozen=True)
class Results:
    """A study with all its cells."""

    study: Study
    cells: list[CellResult]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for result in self.cells for record in result.records]


def gather(out: Path) -> Results:
    """Read what a study's folder holds.

    Raises:
        InputError: it is not a study.
    """
    study = open_study(out)
    cells = []
    for cell in study.cells:
        folder, failure = cell_folder(out, cell), failure_path(out, cell)
        done = _read_done(folder / "done.json") if is_done(out, cell) else None
        why = _read_failure(failure) if done is None else None
        cells.append(CellResult(cell, folder, done, why, list(_records(cell, folder))))
    return Results(study, cells)


def _read_failure(path: Path) -> str | None:
    """Why a cell failed; None where it did not, or another worker has done it since."""
    try:
        failure = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return f"{path.name} cannot be read"
    return str(failure.get("error")) if isinstance(failure, dict) else f"{path.name} is not what a study writes"


def _read_done(path: Path) -> dict[str, Any]:
    done = read_json(path)
    _check(path, done, SUMMARY)
    return dict(done)


def _check(path: Path, held: object, kinds: dict[str, Any], where: str = "") -> None:
    """Refuse what a study did not write, by naming what is amiss first."""
    for name, kind in kinds.items():
        if not isinstance(held, dict) or name not in held or not fits(held[name], kind):
            raise InputError(
                f"{path} is not what a study writes: it has no {where}{name}, or one of another kind; "
                "delete it, and study goes on"
            )


def _check_record(path: Path, record: dict[str, Any]) -> None:
    """A score or measure: what reports and comparisons take from it must be there."""
    where = f"{record.get('key', record['step'])}: "
    if any(record.get(name) is not None for name in ("fid", "inception_score", "kid")):
        _check(path, record, SCORED, where)
    if record.get("floor") is not None:
        _check(path, record["floor"], FLOOR, where + "floor: ")
    for name in INTERVALS:
        if record.get(name) is not None:
            _check(path, record[name], INTERVAL, f"{where}{name}: ")
    for name, kind in (("num_evaluations", int), ("seconds_an_evaluation", float), ("sampler", str)):
        if record.get(name) is not None:
            _check(path, record, {name: kind}, where)


def _records(cell: Cell, folder: Path) -> Iterable[dict[str, Any]]:
    """Each record with the cell it is of; scores in the course of training have the key 'training'."""
    training, data = cell.config.training, cell.config.diffusion
    common = {
        "cell": cell.name,
        "label": cell.label,
        "seed_of_training": training.seed,
        "trained_timesteps": data.num_timesteps,
        "trained_convention": data.beta_convention,
    }
    measures = [line for line in read_lines(folder / MEASURES) if isinstance(line.get("key"), str)]
    scores = [line for line in read_lines(folder / SCORES) if line.get("by") == "training"]
    for path, lines in ((folder / MEASURES, measures), (folder / SCORES, scores)):
        for line in lines:
            _check_record(path, line)
    speed = next((line.get("seconds_an_evaluation") for line in measures if line["key"] == "speed"), None)
    for line in scores:
        yield common | {"key": "training", "images_seen": line["step"] * training.batch_size} | line
    for line in {line["key"]: line for line in measures}.values():
        evaluations = line.get("num_evaluations")
        cost = None if speed is None or evaluations is None else speed * evaluations
        yield common | {"images_seen": line["step"] * training.batch_size, "seconds_an_image": cost} | line


def as_csv(records: list[dict[str, Any]]) -> str:
    """One line a record, with the columns that most people plot."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {name: record.get(name) for name in COLUMNS}
        row["seed"] = record["seed_of_training"]
        for name in INTERVALS:
            score = record.get(name)
            if isinstance(score, dict):
                row |= {name: score["value"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        floor = record.get("floor")
        row["floor_fid"] = floor.get("fid") if isinstance(floor, dict) else None
        writer.writerow(row)
    return stream.getvalue()


@dataclass(frozen=True)
class Compared:
    """A score at several lengths of chain.

    Attributes:
        means: by T, the mean over seeds.
        half: half of the 95 % interval of the largest difference between two of them.
        seeds: how many.
        covers: what the interval covers, in words.
    """

    means: dict[int, float]
    half: float
    seeds: int
    covers: str

    @property
    def extremes(self) -> tuple[int, int]:
        """T of the least and of the greatest mean."""
        return min(self.means, key=self.means.__getitem__), max(self.means, key=self.means.__getitem__)


def compared_convention(study: Study) -> str:
    """The kind of betas whose lengths are compared, as records name it."""
    return {"rescaled": "rescaled", "cosine": "cosine", "fixed": "fixed range"}[study.grid.compared]


def compare(results: Results, score: str, key: str, convention: str | None = None) -> Compared | None:
    """Compare a score between the lengths of the chains of one kind of betas, over the seeds that all of them share.

    The interval is that of the largest of all differences (see `half_interval`), for it is the largest that is told.
    With several training seeds, each sampled from noise of its own, it covers both the training and the sampled images;
    with one, the sampled images only.

    Args:
        convention: the kind of betas; None: that of `compared_convention`.
    Returns:
        None where fewer than two lengths have the score.
    """
    convention = convention or compared_convention(results.study)
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for result in results.cells:
        diffusion, record = result.cell.config.diffusion, result.at_end(key)
        both = diffusion.num_timesteps == 1000 and diffusion.schedule == "linear" and convention != "cosine"
        if result.cell.sampled_as or not record or not record.get(score):
            continue
        if both or diffusion.beta_convention == convention:
            noise = {"noise": record.get("seed")}
            found.setdefault(diffusion.num_timesteps, {})[result.cell.config.training.seed] = record[score] | noise
    shared = set.intersection(*(set(scores) for scores in found.values())) if found else set()
    if len(found) < 2 or not shared:
        return None
    values = [[scores[seed]["value"] for seed in sorted(shared)] for scores in found.values()]
    means = {T: statistics.fmean(of_T) for T, of_T in zip(found, values, strict=True)}
    deviations = [(found[T][seed]["high"] - found[T][seed]["low"]) / 2 / 1.96 for T in found for seed in shared]
    seeds, noises = len(shared), {found[T][seed]["noise"] for T in found for seed in shared}
    own_noise = seeds > 1 and len(noises) == seeds
    half = half_interval(values, None if own_noise else statistics.fmean(d * d for d in deviations))
    covers = {
        (True, True): f"{seeds} training seeds, each sampled from noise of its own",
        (True, False): f"{seeds} training seeds and, as they were sampled from the same noise, the choice of images",
        (False, False): "the choice of sampled images only: the training seed was not varied, so networks are compared "
        "and not lengths",
    }[seeds > 1, own_noise]
    return Compared(means, half, seeds, covers)


def half_interval(values: Sequence[Sequence[float]], sampling_variance: float | None) -> float:
    """Half of the simultaneous 95 % interval of all differences between the means of several lengths of chain.

    Tukey's studentised range for a two-way layout (lengths by training seeds): what a seed adds to all lengths alike,
    such as the noise that they were sampled from, cancels in their differences and is taken out first; the spread that
    remains holds what training and sampling do to each network.

    Args:
        values: a row for each length, a column for each training seed.
        sampling_variance: of one score over the choice of sampled images, where the columns do not show it: with one
            seed, or where all seeds were sampled from the same noise. It is then added, as if the noise of two lengths
            had nothing in common. None: the columns show it.
    """
    lengths, seeds = len(values), len(values[0])
    squared = 0.0
    if seeds > 1:
        of_length = [statistics.fmean(row) for row in values]
        of_seed = [statistics.fmean(column) for column in zip(*values, strict=True)]
        middle = statistics.fmean(of_length)
        freedom = (lengths - 1) * (seeds - 1)
        residuals = (values[i][j] - of_length[i] - of_seed[j] + middle for i in range(lengths) for j in range(seeds))
        variance = sum(r * r for r in residuals) / freedom
        squared = _largest_range(lengths, freedom) ** 2 * variance / seeds
    if sampling_variance is not None:
        squared += _largest_range(lengths, 10_000) ** 2 * sampling_variance
    return math.sqrt(squared)


@cache  # it is an integral, and takes a tenth of a second
def _largest_range(count: int, freedom: int) -> float:
    """What the range of so many standard normal numbers, studentised, exceeds once in twenty."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(0.95, count, freedom))


def answer(results: Results) -> str:
    """The study's answer in one sentence, with its uncertainty and its axis."""
    compared = compare(results, "fid", HEADLINE)
    if compared is None:
        return "Fewer than two lengths of the chain have been scored yet."
    label = next(r["fid_label"] for r in results.records if r["key"] == HEADLINE and r.get("fid"))
    betas = BETAS[compared_convention(results.study)]
    alike = f"At equal evaluations ({HEADLINE.replace('-', ' with ')} steps) and with {betas}"
    return f"{alike}, {in_words(compared, label)}; the interval covers {compared.covers}."


def in_words(compared: Compared, label: str) -> str:
    """A comparison in words: the largest difference, with its interval or as the limit that it sets, and all means.

    With one training seed it speaks of the networks, for which length is better cannot be told from them.
    """
    least, greatest = compared.extremes
    difference = compared.means[greatest] - compared.means[least]
    listed = ", ".join(f"{format_number(value)} for T = {T}" for T, value in sorted(compared.means.items()))
    *first, last = sorted(compared.means)
    lengths = f"{', '.join(map(str, first))} and {last}"
    one = compared.seeds == 1
    measured, half = format_number(difference, 2), format_number(compared.half, 2)
    if difference > compared.half:
        names = f"the network of T = {least} scored", f"that of T = {greatest}"
        names = names if one else (f"T = {least} scores", f"T = {greatest}")
        found = f"{names[0]} better than {names[1]} by {measured} (95 % interval {measured} +- {half})"
    else:
        between = "between the networks of" if one else "between"
        limit = format_number(difference + compared.half, 2)
        found = (
            f"{between} T = {lengths} there is no difference larger than {limit} "
            f"(largest measured {measured}, 95 % interval +- {half})"
        )
    return f"{found} in {label}: {listed}"

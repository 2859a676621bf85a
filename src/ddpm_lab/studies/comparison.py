"""How a study compares lengths of chain: intervals of their differences, and the answer in a sentence."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ddpm_lab.studies.grid import HEADLINE
from ddpm_lab.studies.html import format_number
from ddpm_lab.studies.results import Results

BETAS = {"rescaled": "rescaled betas", "cosine": "cosine betas", "fixed range": "betas of a fixed range"}


@dataclass(frozen=True)
class Comparison:
    """One score at several lengths of chain.

    Attributes:
        means: mean over training seeds, by T.
        half: half width of the simultaneous 95 % interval of all differences between two means.
        seeds: number of training seeds.
        covers: the sources of variation that the interval covers, in words.
    """

    means: dict[int, float]
    half: float
    seeds: int
    covers: str


def compare(results: Results, score: str, key: str, convention: str | None = None) -> Comparison | None:
    """Compare one score between the lengths of chain of one convention, over the training seeds that all of them share.

    The interval is that of the largest of all differences (see `half_interval`), because the largest is reported. With
    several training seeds, each sampled from its own noise, it covers training and sampling; with one seed, sampling
    only.

    Args:
        score: field of the records, such as 'fid'.
        key: of the measures to compare.
        convention: of the betas; None: `GridConfig.compared`.
    Returns:
        None where fewer than two lengths have the score.
    """
    convention = convention or results.study.grid.compared
    records: dict[int, dict[int, dict[str, Any]]] = {}  # by T, then by training seed
    for result in results.cells:
        diffusion, record = result.cell.config.diffusion, result.measure(key)
        both = diffusion.num_timesteps == 1000 and diffusion.schedule == "linear" and convention != "cosine"
        if result.cell.sampled_as or not record or not record.get(score):
            continue
        if both or diffusion.beta_convention == convention:
            records.setdefault(diffusion.num_timesteps, {})[result.cell.config.training.seed] = record
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in records.values()))) if records else []
    if len(records) < 2 or not shared:
        return None
    compared = [[by_seed[seed] for seed in shared] for by_seed in records.values()]
    values = [[record[score]["value"] for record in row] for row in compared]
    means = {T: statistics.fmean(row) for T, row in zip(records, values, strict=True)}
    seeds, noises = len(shared), {record.get("seed") for row in compared for record in row}
    own_noise = seeds > 1 and len(noises) == seeds
    deviations = [(record[score]["high"] - record[score]["low"]) / 2 / 1.96 for row in compared for record in row]
    half = half_interval(values, None if own_noise else statistics.fmean(d * d for d in deviations))
    covers = f"{seeds} training seeds, each sampled from noise of its own"
    if seeds == 1:
        covers = (
            "the choice of sampled images only: the training seed was not varied, so networks are compared and not "
            "lengths"
        )
    elif not own_noise:
        covers = f"{seeds} training seeds and, as they were sampled from the same noise, the choice of images"
    return Comparison(means, half, seeds, covers)


def half_interval(values: Sequence[Sequence[float]], sampling_variance: float | None) -> float:
    """Half width of the simultaneous 95 % interval of all differences between the means of several lengths of chain.

    Tukey's studentised range for a two-way layout without interaction (lengths by training seeds; Tukey 1953, The
    problem of multiple comparisons). An effect that a seed has on all lengths alike, such as shared sampling noise,
    cancels in their differences and is removed first. The remaining spread holds the effects of training and sampling
    on each network.

    Args:
        values: a row for each length, a column for each training seed.
        sampling_variance: variance of one score over the choice of sampled images, where the columns do not show it:
            with one seed, or where all seeds were sampled from the same noise. It is then added, as if the noise of
            two lengths were independent. None: the columns show it.
    """
    lengths, seeds = len(values), len(values[0])
    squared = 0.0
    if seeds > 1:
        length_means = [statistics.fmean(row) for row in values]
        seed_means = [statistics.fmean(column) for column in zip(*values, strict=True)]
        mean = statistics.fmean(length_means)
        freedom = (lengths - 1) * (seeds - 1)
        residuals = (
            values[i][j] - length_means[i] - seed_means[j] + mean for i in range(lengths) for j in range(seeds)
        )
        variance = sum(r * r for r in residuals) / freedom
        squared = _studentised_range(lengths, freedom) ** 2 * variance / seeds
    if sampling_variance is not None:
        squared += _studentised_range(lengths, 10_000) ** 2 * sampling_variance
    return math.sqrt(squared)


@cache  # it is an integral that takes 0.1 s
def _studentised_range(count: int, freedom: int) -> float:
    """The 95th percentile of the studentised range of `count` normal numbers."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(0.95, count, freedom))


def answer(results: Results) -> str:
    """The study's answer in one sentence, with its axis and its uncertainty."""
    comparison = compare(results, "fid", HEADLINE)
    if comparison is None:
        return "Fewer than two lengths of the chain have been scored yet."
    betas = BETAS[results.study.grid.compared]
    sampler, _, steps = HEADLINE.partition("-")
    conditions = f"At equal evaluations ({sampler.upper()} with {steps} steps) and with {betas}"
    return f"{conditions}, {describe(comparison, results.label)}; the interval covers {comparison.covers}."


def describe(comparison: Comparison, label: str) -> str:
    """A comparison in words: the largest difference with its interval, or an upper limit of it; and all means.

    With one training seed it speaks of the networks, which do not tell which length is better.
    """
    least, *_, greatest = sorted(comparison.means, key=comparison.means.__getitem__)
    difference = comparison.means[greatest] - comparison.means[least]
    *first, last = sorted(comparison.means)
    lengths = f"T = {', '.join(map(str, first))} and {last}"
    single = comparison.seeds == 1
    measured, half = format_number(difference, 2), format_number(comparison.half, 2)
    if difference > comparison.half:
        better, worse = f"T = {least} scores", f"T = {greatest}"
        if single:
            better, worse = f"the network of T = {least} scored", f"that of T = {greatest}"
        finding = f"{better} better than {worse} by {measured} (95 % interval {measured} +- {half})"
    else:
        limit = format_number(difference + comparison.half, 2)
        finding = (
            f"there is no difference larger than {limit} between {'the networks of ' * single}{lengths} "
            f"(largest measured {measured}, 95 % interval +- {half})"
        )
    return f"{finding} in {label}: {_listed(comparison.means)}"


def _listed(means: dict[int, float]) -> str:
    return ", ".join(f"{format_number(value)} for T = {T}" for T, value in sorted(means.items()))


def other_answers(results: Results) -> list[str]:
    """Sentences on sampling with all T steps, on the fixed range and on continuous time, where they were measured."""
    sentences, convention = [], results.study.grid.compared
    native = compare(results, "kid", "ancestral")
    if native is not None:
        sentences.append(
            f"With all T steps of each chain (ancestral, n={results.study.measures.ancestral_images}) and "
            f"{BETAS[convention]}, KID over {results.features['name']}: {_listed(native.means)}; the 95 % interval of "
            f"the largest difference is +- {format_number(native.half)}, and covers {native.covers}."
        )
    fixed = None if convention == "fixed range" else compare(results, "fid", HEADLINE, "fixed range")
    if fixed is not None:
        sentences.append(f"With {BETAS['fixed range']}, at equal evaluations, {describe(fixed, results.label)}.")
    continuous: dict[int, list[float]] = {}
    for record in results.records:
        if record["key"].startswith(f"{HEADLINE} as T=") and record.get("fid"):
            continuous.setdefault(record["num_timesteps"], []).append(record["fid"]["value"])
    if continuous:
        betas = BETAS["cosine" if convention == "cosine" else "rescaled"]
        means = _listed({T: statistics.fmean(values) for T, values in continuous.items()})
        sentences.append(
            "One network of continuous time (T = 10,000), sampled at equal evaluations as a chain of each length with "
            f"{betas}, {results.label}: {means}."
        )
    return sentences

"""A score record as text: the table of `ddpm evaluate`, and notes that go beside a number wherever it is shown."""

from collections.abc import Mapping
from typing import Any, cast

from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.evaluate import CONFIDENCE_THRESHOLD
from ddpm_lab.evaluation.record import Interval, ScoreRecord, Scores


def floor_count(record: Mapping[str, Any]) -> str:
    """The number of images of a record's floor, as "n=500"; empty where as many images were scored.

    Takes any line of scores.jsonl: fields that are absent, or not as in a score record, are ignored.
    """
    floor = record.get("floor")
    count = floor.get("num_images") if isinstance(floor, dict) else None
    return f"n={count:,}" if fits(count, int) and count != record.get("num_images") else ""


def class_count(record: Mapping[str, Any]) -> str:
    """The number of classes of an Inception Score, as "of 10 classes"; empty for the official Inception network.

    Takes any line of scores.jsonl, as `floor_count` does.
    """
    features = record.get("features")
    count = features.get("num_classes") if isinstance(features, dict) else None
    return f"of {count} classes" if fits(count, int) and not str(record.get("fid_label")).startswith("FID") else ""


def score_table(record: ScoreRecord) -> list[str]:
    """A record as lines of text: what was scored, a table with the floor beside each score, and notes."""
    return [*_heading(record), "", *_rows(record), *_notes(record)]


def _heading(record: ScoreRecord) -> list[str]:
    features, reference = record["features"], record["reference"]
    scored = f"{record['source']}: {record['num_images']:,} images"
    if record["sampler"] is not None:
        scored += (
            f" at step {record['step']} ({record['weights']}), {record['sampler']}, {record['num_steps']} of "
            f"{record['num_timesteps']} steps ({record['beta_convention']} betas){guidance_label(record)}, "
            f"seed {record['seed']}"
        )
    lines = [scored]
    if reference is not None:
        count = f"{reference['num_images']:,} images" if reference["num_images"] else "statistics"
        lines.append(f"against {reference['name']} ({count})")
    classes = f", {features['num_classes']} classes" if features["num_classes"] else ""
    accuracy = f", {features['test_accuracy']:.2%} accuracy on test images" if "test_accuracy" in features else ""
    return [*lines, f"features: {features['name']}, {features['num_features']} features{classes}{accuracy}"]


def _rows(record: ScoreRecord) -> list[str]:
    labels = {
        "fid": record["fid_label"],
        "fid_extrapolated": f"{record['fid_label'].partition(' (')[0]}, extrapolated to infinite n",
        "inception_score": f"Inception Score, {record['scoring']['is_splits']} splits",
        "inception_score_whole": "Inception Score, whole",
        "kid": "KID",
        "mind": "MIND",
    }
    width = max(len(label) for label in labels.values())
    scores, floor = cast(Mapping[str, Interval | None], record), cast(Mapping[str, float | None], record["floor"] or {})
    fewer = floor_count(record)
    rows = [("", "score", "95 % interval", f"floor ({fewer})" if fewer else "floor")]
    for name in Scores.__annotations__:
        score = scores.get(name)  # older records lack some
        if score is not None:
            interval = "" if score["low"] is None else f"{_number(score['low'])} .. {_number(score['high'])}"
            rows.append((labels.get(name, name), _number(score["value"]), interval, _number(floor.get(name))))
    if len(rows) == 1:
        return []
    return [*(f"{a:{width}}  {b:>10}  {c:>24}  {d:>10}".rstrip() for a, b, c, d in rows), ""]


def _notes(record: ScoreRecord) -> list[str]:
    notes = []
    if record["floor"] is not None:
        count, images = record["floor"]["num_images"], record["floor"]["images"]
        notes.append(f"floor: {count:,} images of {images}, real ones outside the reference, scored in the same way")
    if record["scoring"]["bootstrap"]:
        notes.append("intervals cover the choice of images, not the training seed")
    if "classes" in record:
        classes = record["classes"]
        shares = " ".join(f"{share:.1%}" for share in classes["shares"])
        note = f"classes: {shares}; {classes['sure']:.1%} have a probability over {CONFIDENCE_THRESHOLD:.0%}"
        if "as_asked" in classes:
            note += f"; {classes['as_asked']:.1%} are labelled as the class they were conditioned on"
        notes.append(note)
    if "memorisation" in record:
        memorised = cast(Mapping[str, float], record["memorisation"])
        nearer, expected, much_nearer = (
            f"{memorised[f'{name}_low']:.2%} to {memorised[f'{name}_high']:.2%}"
            for name in ("nearer_than_test", "expected", "much_nearer")
        )
        notes.append(
            f"memorisation: {memorised['nearer_than_test']:.2%} ({nearer}) lie nearer to a training image than 99 % of "
            f"the test images do (of images distributed like these, {expected} would); "
            f"{memorised['much_nearer']:.2%} ({much_nearer}) lie at less than half the distance from that training "
            "image to its own nearest neighbour"
        )
    return notes


def _number(value: float | None) -> str:
    """Four significant digits, without an exponent unless the value is tiny; empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"

"""A score's record in words: the table people read, and what goes beside a number wherever one is shown."""

from typing import Any

from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.evaluate import CONFIDENCE_THRESHOLD

ROWS = (
    ("inception_score", "Inception Score"),
    ("inception_score_whole", "Inception Score, whole"),
    ("kid", "KID"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
)


def floor_count(record: dict[str, Any]) -> str:
    """Of how many images the floor of a record is, as "n=500"; nothing where it is of as many as what is scored.

    Any line of scores.jsonl will do: what is not as `evaluation.evaluate` writes it says nothing.
    """
    floor = record.get("floor")
    count = floor.get("num_images") if isinstance(floor, dict) else None
    return f"n={count:,}" if fits(count, int) and count != record.get("num_images") else ""


def class_count(record: dict[str, Any]) -> str:
    """Over how many classes an Inception Score is, as "of 10 classes"; nothing for the field's own network.

    Any line of scores.jsonl will do, as above.
    """
    features = record.get("features")
    count = features.get("num_classes") if isinstance(features, dict) else None
    return f"of {count} classes" if fits(count, int) and not str(record.get("fid_label")).startswith("FID") else ""


def score_table(record: dict[str, Any]) -> list[str]:
    """A record as lines for a person, with the floor beside each score."""
    features, reference, floor = record["features"], record["reference"], record["floor"]
    lines = [_images_line(record)]
    if reference is not None:
        count = f" ({reference['num_images']:,} images)" if reference["num_images"] else " (statistics)"
        lines.append(f"against {reference['name']}{count}")
    classes = f", {features['num_classes']} classes" if features["num_classes"] else ""
    accuracy = f", right for {features['test_accuracy']:.2%} of test images" if "test_accuracy" in features else ""
    lines += [f"features: {features['name']}, {features['num_features']} of them{classes}{accuracy}", ""]
    names = {
        "fid": record["fid_label"],
        "fid_extrapolated": f"{record['fid_label'].partition(' (')[0]}, extrapolated to infinite n",
        **dict(ROWS),
    }
    names["inception_score"] += f", {record['scoring']['is_splits']} splits"
    width = max(len(name) for name in names.values())
    fewer = floor_count(record)
    title = f"floor ({fewer})" if fewer else "floor"
    if any(record[key] is not None for key in names):
        lines.append(f"{'':{width}}  {'score':>10}  {'95 % interval':>24}  {title:>10}".rstrip())
    for key, name in names.items():
        score = record[key]
        if score is None:
            continue
        known = score["low"] is not None
        interval = f"{_number(score['low'])} .. {_number(score['high'])}" if known else ""
        beside = _number(floor[key]) if floor is not None and floor[key] is not None else ""
        lines.append(f"{name:{width}}  {_number(score['value']):>10}  {interval:>24}  {beside:>10}".rstrip())
    if lines[-1]:
        lines.append("")
    if floor is not None:
        lines.append(
            f"floor: {floor['num_images']:,} images of {floor['images']}, real ones outside the reference, scored alike"
        )
    if record["scoring"]["bootstrap"]:
        lines.append("intervals cover the choice of images, not the training seed")
    if "classes" in record:
        shares = " ".join(f"{share:.1%}" for share in record["classes"]["shares"])
        agreed = record["classes"].get("as_asked")
        told = "" if agreed is None else f"; {agreed:.1%} are taken for the class that was asked for"
        lines.append(
            f"classes: {shares}; {record['classes']['sure']:.1%} are over {CONFIDENCE_THRESHOLD:.0%} sure{told}"
        )
    if "memorisation" in record:
        found = record["memorisation"]

        def share(name: str) -> str:
            return f"{found[name]:.2%} ({found[f'{name}_low']:.2%} to {found[f'{name}_high']:.2%})"

        lines.append(
            f"memorisation: {share('nearer_than_test')} lie nearer to a training image than 1 % of the test images do, "
            f"of images distributed as those {found['expected_low']:.2%} to {found['expected_high']:.2%} would; "
            f"{share('much_nearer')} at less than half that image's distance to its own nearest"
        )
    return lines


def _images_line(record: dict[str, Any]) -> str:
    count = f"{record['source']}: {record['num_images']:,} images"
    if record["sampler"] is None:
        return count
    return (
        f"{count} at step {record['step']} ({record['weights']}), {record['sampler']}, {record['num_steps']} of "
        f"{record['num_timesteps']} steps ({record['beta_convention']} betas){guidance_label(record)}, "
        f"seed {record['seed']}"
    )


def _number(value: float) -> str:
    """Four significant digits, without an exponent where that is short."""
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"

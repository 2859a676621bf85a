"""The fields that reports and comparisons read from score records, declared once, and the check against them.

A declaration maps each field to an annotation, such as `float | None`, or to the declaration of a nested table. A table
may be absent or null.
"""

from typing import Any

from ddpm_lab.core.settings import fits

SCORE_NAMES = ("fid", "inception_score", "kid")
INTERVALS = (*SCORE_NAMES, "bits_per_dimension")
INTERVAL: dict[str, Any] = {"value": float, "low": float, "high": float}
FLOOR: dict[str, Any] = {"num_images": int, **dict.fromkeys(SCORE_NAMES, float | None)}
MEASURE: dict[str, Any] = {
    "sampler": str | None,
    "num_evaluations": int | None,
    "seconds_an_evaluation": float | None,
    "features": {"name": str, "num_classes": int | None},
    "floor": FLOOR,
    **dict.fromkeys(INTERVALS, INTERVAL),
}
SCORED = MEASURE | {"fid_label": str, "sampler": str, "num_timesteps": int, "num_evaluations": int}
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


def first_fault(values: object, declared: dict[str, Any]) -> str | None:
    """The first declared field that is missing or of the wrong type, such as 'floor: num_images'; None: there is none.

    Args:
        values: what was read; anything but a dict lacks every field.
        declared: the fields; others are not looked at.
    """
    table = values if isinstance(values, dict) else {}
    for name, kind in declared.items():
        value = table.get(name)
        if not isinstance(kind, dict):
            if not fits(value, kind):
                return name
        elif value is not None and (fault := first_fault(value, kind)):
            return f"{name}: {fault}"
    return None


def valid_fields(values: object, declared: dict[str, Any]) -> dict[str, Any]:
    """The declared fields, None where they are missing or of the wrong type: for files that others may have edited."""
    table = values if isinstance(values, dict) else {}
    return {name: None if first_fault(table, {name: kind}) else table.get(name) for name, kind in declared.items()}


def read_score(record: dict[str, Any], name: str) -> dict[str, Any] | None:
    """One score of a record, {value, low, high}, or None; both ends are None where either is unknown."""
    score = valid_fields(record.get(name), INTERVAL)
    if None in (score["low"], score["high"]):
        score |= {"low": None, "high": None}
    return None if score["value"] is None else score

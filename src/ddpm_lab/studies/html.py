"""Self-contained pages: templates filled in, pictures embedded as data, numbers rounded for readers."""

import base64
from pathlib import Path

from ddpm_lab.core.progress import duration
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.score_table import class_count, floor_count
from ddpm_lab.studies.record_reader import read_score

MIME = {".png": "image/png", ".gif": "image/gif"}


def render(template: str, **values: object) -> str:
    """Fill in a template of this package, as HTML; values are escaped.

    File names may hold characters that UTF-8 cannot encode: encode the page with `backslashreplace`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ddpm_lab.studies"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "score": read_score,
        "short": format_number,
        "thousands": lambda value: f"{value:,}",
        "percent": lambda value: f"{value:.1%}",
        "duration": duration,
        "embedded": embedded,
        "guidance": guidance_label,
        "floor_count": floor_count,
        "class_count": class_count,
    }
    return environment.get_template(template).render(**values)


def as_data(content: bytes, suffix: str) -> str:
    """A picture as a data URL."""
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"


def embedded(path: Path | None) -> str | None:
    """A picture file as a data URL; None where there is no such file."""
    return as_data(path.read_bytes(), path.suffix) if path is not None and path.is_file() else None


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, trailing zeros included; two digits below 0.05; '' for None."""
    if value is None:
        return ""
    return f"{value:#.{digits if abs(value) >= 0.05 else 2}g}".removesuffix(".")

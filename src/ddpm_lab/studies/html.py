"""Pages that need nothing but themselves: templates filled in, pictures as data, numbers as short as they are exact."""

import base64
from pathlib import Path
from typing import Any

from ddpm_lab.core.progress import duration

MIME = {".png": "image/png", ".gif": "image/gif"}


def render(template: str, **values: object) -> str:
    """A template of this package, as HTML; what is put in is escaped.

    Names of files may hold what is no text: let `backslashreplace` encode it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ddpm_lab.studies"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": format_number, "percent": lambda x: f"{x:.1%}", "duration": duration}
    return environment.get_template(template).render(**values)


def as_data(content: bytes, ending: str) -> str:
    """A picture as an address that holds it."""
    return f"data:{MIME[ending]};base64,{base64.b64encode(content).decode()}"


def embedded(path: Path) -> str | None:
    """A picture's file likewise; None where there is none."""
    return as_data(path.read_bytes(), path.suffix) if path.is_file() else None


def format_number(value: float | None, digits: int = 3) -> str:
    """So many digits, zeros at the end too, for they were measured; two below 0.05; nothing for None."""
    if value is None:
        return ""
    return f"{value:#.{digits if abs(value) >= 0.05 else 2}g}".removesuffix(".")


def record_as_text(name: str, record: dict[str, Any], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record for the end of a page, without what is empty."""
    told = {key: str(value) for key, value in record.items() if value is not None and key not in left_out}
    return {"name": name, "told": told}

"""The JSON lines of a run folder, `log.jsonl` and `scores.jsonl`, in the order of the steps.

A kill may leave the last line incomplete; an incomplete line is ignored.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_lab.core.files import replace_atomically

LOG, SCORES = "log.jsonl", "scores.jsonl"  # files of a run folder
BANDS = 10  # bands of timesteps in loss_by_t of the log


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, oldest first; none if the file does not exist."""
    return [entry for _, entry in _whole_lines(_text(path))]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append an entry and wait until the disk confirms it, so that no later checkpoint exists without it.

    After an incomplete line the entry starts a new line.
    """
    with path.open("ab+") as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - 1, 0))
        torn = stream.read() not in (b"", b"\n")
        stream.write(("\n" * torn + json.dumps(line) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove entries after `step` and lines that are not entries; returns the remaining entries.

    A score record without a step, such as of real images, remains in the file.
    """
    text = _text(path)
    kept = [(line, entry) for line, entry in _whole_lines(text, of_no_step=True) if (entry["step"] or 0) <= step]
    if "".join(line for line, _ in kept) != text:
        replace_atomically(path, "".join(line for line, _ in kept).encode())
    return [entry for _, entry in kept if entry["step"] is not None]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _whole_lines(text: str, of_no_step: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each complete line with its entry."""
    known = int | None if of_no_step else int
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            whole = line.endswith("\n") and isinstance(entry["step"], known) and isinstance(entry["seconds"], float)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if whole:
            yield line, entry

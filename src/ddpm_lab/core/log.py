"""Files of JSON lines in a run folder, `log.jsonl` and `scores.jsonl`, in the order of the steps.

A kill may tear the last line; a torn line is no line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_lab.core.files import replace_atomically

LOG, SCORES = "log.jsonl", "scores.jsonl"  # of a run folder
BANDS = 10  # of timesteps, in the log's loss_by_t


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, oldest first; none where it does not exist."""
    return [entry for _, entry in _whole_lines(_text(path))]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add an entry, confirmed by the disk: a checkpoint that follows must not outlive it.

    After a torn line it starts a new one.
    """
    with path.open("ab+") as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - 1, 0))
        torn = stream.read() not in (b"", b"\n")
        stream.write(("\n" * torn + json.dumps(line) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop entries after `step`, and what is no entry; returns what stays.

    A record that is of no step, as of real images scored beside a run, stays in the file.
    """
    text = _text(path)
    kept = [(line, entry) for line, entry in _whole_lines(text, of_no_step=True) if (entry["step"] or 0) <= step]
    if "".join(line for line, _ in kept) != text:
        replace_atomically(path, "".join(line for line, _ in kept).encode())
    return [entry for _, entry in kept if entry["step"] is not None]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _whole_lines(text: str, of_no_step: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with what it says."""
    known = int | None if of_no_step else int
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            whole = line.endswith("\n") and isinstance(entry["step"], known) and isinstance(entry["seconds"], float)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if whole:
            yield line, entry

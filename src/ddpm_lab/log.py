"""The log of a run, `log.jsonl`: one JSON object a line, in the order of the steps; a kill may tear the last one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_lab.files import replace_atomically


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run's `log.jsonl`, oldest first; a torn line is left out."""
    path = run_dir / "log.jsonl"
    return (
        [entry for _, entry in _log_lines(path.read_text(encoding="utf-8", errors="replace"))] if path.exists() else []
    )


def _log_lines(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with what it says."""
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            whole = line.endswith("\n") and isinstance(entry["step"], int) and isinstance(entry["seconds"], float)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if whole:
            yield line, entry


def append_line(run_dir: Path, line: dict[str, Any]) -> None:
    """Add a line to a run's log."""
    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def cut_log(run_dir: Path, step: int) -> float:
    """Drop lines after `step`, and those that are no lines of a log; returns the seconds of training logged before."""
    path = run_dir / "log.jsonl"
    if not path.exists():
        return 0.0
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = [(line, entry) for line, entry in _log_lines(text) if entry["step"] <= step]
    if "".join(line for line, _ in kept) != text:
        replace_atomically(path, "".join(line for line, _ in kept).encode())
    return float(kept[-1][1]["seconds"]) if kept else 0.0

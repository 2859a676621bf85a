"""`ddpm cache`: what is kept, by kind, and the way to be rid of it.

All of it can be made or fetched again. Each entry, a file or a folder, is removed whole; one that another process
writes at that moment stays.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import TEMPORARY_PREFIX, InUse, cache_dir, locked
from ddpm_lab.core.progress import size

WRITING = 1 / 24  # days that what is not whole yet may be in the writing
KINDS = {
    "generated": "sampled images that were scored",
    "features": "features of images, and their statistics",
    "onnx": "graphs that earlier versions kept",
    "inception": "the weights of the FID network",
    "data": "data sets that were fetched",
}


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        path: its file or folder.
        kind: one of KINDS.
        num_bytes: in all its files.
        days: since any of them was written.
    """

    path: Path
    kind: str
    num_bytes: int
    days: float


def entries(kind: str) -> Iterator[Entry]:
    """What is kept of a kind."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted((cache_dir() / kind).iterdir()):
            if path.name.endswith(".lock"):
                continue
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            stats = []
            for file in files:
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    stats.append(file.stat())
            newest = max((stat.st_mtime for stat in stats), default=0.0)
            yield Entry(path, kind, sum(stat.st_size for stat in stats), (time.time() - newest) / 86_400)


def describe_cache() -> list[str]:
    """Lines for a person: where the cache is, and how much there is of each kind."""
    lines, total = [f"{cache_dir()}"], 0
    for kind, words in KINDS.items():
        found = list(entries(kind))
        held = sum(entry.num_bytes for entry in found)
        total += held
        if found:
            oldest = max(entry.days for entry in found)
            count = f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}"
            lines.append(f"  {kind:10} {size(held):>9}  {count}, the oldest {oldest:.0f} days old: {words}")
        else:
            lines.append(f"  {kind:10} {'nothing':>9}  {words}")
    return [*lines, f"{size(total)} in all; `ddpm cache --clear KIND ...` or `--clear all` removes it"]


def clear_cache(kinds: tuple[str, ...], older_than: float | None = None) -> list[str]:
    """Remove entries; returns lines on what was removed.

    Args:
        kinds: of KINDS, or 'all'.
        older_than: only what was written so many days ago or earlier; None: whatever its age.
    Raises:
        InputError: an unknown kind, or an age below 0.
    """
    for kind in kinds:
        require(kind == "all" or kind in KINDS, f"--clear takes all, {', '.join(KINDS)}, not {kind!r}")
    require(older_than is None or older_than >= 0, f"--older-than must be at least 0 days, not {older_than}")
    lines = []
    for kind in KINDS if "all" in kinds else kinds:
        removed, freed, kept = 0, 0, 0
        for entry in entries(kind):
            if older_than is not None and entry.days < older_than:
                continue
            being_written = entry.path.name.startswith(TEMPORARY_PREFIX) and entry.days < WRITING
            if not being_written and _remove(entry.path):
                removed, freed = removed + 1, freed + entry.num_bytes
            else:
                kept += 1
        in_use = f"; {kept} in use stay" if kept else ""
        lines.append(f"{kind}: {removed} removed, {size(freed)}{in_use}")
    return lines


def _remove(path: Path) -> bool:
    """Whether it could be removed: not where another process writes it."""
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        with locked(path, "DDPM_CACHE_DIR"):  # which whoever fills it holds
            shutil.rmtree(path)
        return True
    except InUse:
        return False
    except OSError as error:
        raise InputError(f"{path} cannot be removed: {error.strerror or error}") from error

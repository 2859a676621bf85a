"""`ddpm cache`: list the contents of the cache by kind, and delete them.

Everything in the cache can be computed or downloaded again. An entry, a file or a folder, is deleted as a whole, unless
another process is writing it.
"""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import LOCK, TEMPORARY_PREFIX, InUse, cache_dir, locked

DAY = 86_400  # seconds
WRITING = 1 / 24  # days for which an incomplete entry counts as being written
KINDS = {
    "generated": "sampled images that were scored",
    "features": "features of images, and their statistics",
    "hub": "models from the Hugging Face hub",
    "onnx": "graphs that earlier versions kept",
    "inception": "the weights of the FID network",
    "dinov2": "the weights of the network of FD-DINOv2",
    "data": "data sets that were downloaded",
}


@dataclass(frozen=True)
class Entry:
    """A file or folder in the cache.

    Attributes:
        path: the file or folder.
        num_bytes: the size of all its files.
        days: the time since any of them was written.
    """

    path: Path
    num_bytes: int
    days: float


def entries(kind: str) -> list[Entry]:
    """The entries of a kind."""
    found = []
    folder = cache_dir() / kind
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(".lock"):
            continue
        num_bytes, newest = 0, 0.0
        for file in (path, *path.rglob("*")):
            with suppress(FileNotFoundError):  # another process has deleted it
                if file.is_file() and not file.is_symlink():  # links are to files that count already
                    status = file.stat()
                    num_bytes, newest = num_bytes + status.st_size, max(newest, status.st_mtime)
        found.append(Entry(path, num_bytes, (time.time() - newest) / DAY))
    return found


def describe_cache() -> list[str]:
    """Lines of text: the folder of the cache, and the number, size and age of the entries of each kind."""
    lines, total = [f"{cache_dir()}"], 0
    for kind, words in KINDS.items():
        found = entries(kind)
        num_bytes = sum(entry.num_bytes for entry in found)
        total += num_bytes
        amount, count = "nothing", ""
        if found:
            oldest = max(entry.days for entry in found)
            amount = decimal(num_bytes)
            count = f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}, the oldest {oldest:.0f} days old: "
        lines.append(f"  {kind:10} {amount:>9}  {count}{words}")
    return [*lines, f"{decimal(total)} in all; `ddpm cache --clear KIND ...` or `--clear all` deletes it"]


def clear_cache(kinds: tuple[str, ...], older_than: float | None = None) -> list[str]:
    """Delete entries; returns lines of text with what was deleted.

    Args:
        kinds: of KINDS, or 'all'.
        older_than: delete only entries written at least this number of days ago; None: entries of any age.
    Raises:
        InputError: an unknown kind, or an age below 0.
    """
    for kind in kinds:
        require(kind == "all" or kind in KINDS, f"--clear takes all, {', '.join(KINDS)}, not {kind!r}")
    require(older_than is None or older_than >= 0, f"--older-than must be at least 0 days, not {older_than}")
    lines = []
    for kind in KINDS if "all" in kinds else kinds:
        old = [entry for entry in entries(kind) if older_than is None or entry.days >= older_than]
        deleted = [entry.num_bytes for entry in old if _delete(entry)]
        in_use = f"; {len(old) - len(deleted)} in use remain" if len(deleted) < len(old) else ""
        lines.append(f"{kind}: {len(deleted)} deleted, {decimal(sum(deleted))}{in_use}")
    return lines


def _delete(entry: Entry) -> bool:
    """Whether the entry was deleted: not if another process is writing it."""
    if entry.path.name.startswith(TEMPORARY_PREFIX) and entry.days < WRITING:
        return False
    try:
        if not entry.path.is_dir():
            entry.path.unlink(missing_ok=True)
            return True
        with locked(entry.path, "DDPM_CACHE_DIR"):  # a process that fills it holds this lock
            for path in entry.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:  # which Windows deletes only once it is released
                    path.unlink()
        with suppress(OSError):  # another process has begun to fill it again
            (entry.path / LOCK).unlink(missing_ok=True)
            entry.path.rmdir()
        return True
    except InUse:
        return False
    except OSError as error:
        raise InputError(f"{entry.path} cannot be deleted: {error.strerror or error}") from error

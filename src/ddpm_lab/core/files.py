"""Files and folders that appear whole or not at all, locks between processes, and the reading of JSON."""

import errno
import json
import os
import shutil
import sys
import tempfile
import time
import unicodedata
import uuid
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError

TEMPORARY_PREFIX = ".partial-"
LOCK = ".lock"
OTHER = "another process"
SOON = 5.0  # seconds of waiting for a lock, after which a message names its holder
ATTEMPTS = 20 if os.name == "nt" else 1  # to rename, 0.05 s apart
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # not the fault of the user's input


class InUse(InputError):
    """Another process holds the lock of a folder."""


def cache_dir() -> Path:
    """The folder DDPM_CACHE_DIR, or the user's cache folder if that is unset; everything in it can be deleted.

    For a user without a home folder, as in many containers, it is a folder below the system's temporary folder.
    """
    if named := os.environ.get("DDPM_CACHE_DIR"):
        return Path(named)
    from platformdirs import user_cache_path

    try:
        return user_cache_path("ddpm-lab")
    except (RuntimeError, KeyError):
        return Path(tempfile.gettempdir()) / f"ddpm-lab-{getattr(os, 'getuid', int)()}"  # Windows has no such numbers


@contextmanager
def writable(place: str, advice: str = "") -> Iterator[None]:
    """Within it, an OSError becomes an InputError that names the place.

    Args:
        place: the file or folder that is written, for the message.
        advice: the end of the message.
    Raises:
        InputError: the place cannot be written.
        OSError: the disk is full.
    """
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{place} cannot be written: {reason}{advice}") from error


def cache_writable() -> AbstractContextManager[None]:
    """`writable` for the cache."""
    return writable(f"the cache {cache_dir()}", "; DDPM_CACHE_DIR names another cache")


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for a file that is still being written."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file at the target is replaced.

    Windows refuses while another program, such as a virus scanner, has either open; there it is tried for a second.

    Raises:
        OSError: it cannot be renamed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(0.05)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`with atomic_file(path) as temporary:` yields a path to write, which replaces `path` unless an error occurs."""
    temporary = temporary_path(path)
    try:
        yield temporary
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_atomically(path: Path, content: bytes) -> None:
    """Write a file such that a reader, or a kill at any moment, finds the old content or the new one.

    Raises:
        OSError: the file cannot be written; the old file remains.
    """
    with atomic_file(path) as temporary:
        write_durably(temporary, content)
    flush_folder(path.parent)


@contextmanager
def atomic_directory(folder: Path, option: str) -> Iterator[Path]:
    """`with atomic_directory(folder, "--out") as temporary:` yields a folder to fill, renamed unless an error occurs.

    Args:
        option: the flag that named the folder, for messages.
    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InputError(f"{option} {folder} exists; name a new folder")
    if folder.resolve() == Path.cwd():
        raise InputError(f"{option} {folder} is the current folder; name a new folder")
    temporary = temporary_path(folder.resolve())
    with writable(f"{option} {folder}"):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        move(temporary, folder.resolve())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path, option: str, wait: bool = False) -> Iterator[None]:
    """Create a folder and hold its lock; the system releases the lock when the process ends.

    Args:
        option: the flag that named the folder, for messages.
        wait: whether to wait for another process that holds the lock.
    Raises:
        InUse: another process holds the lock, and `wait` is false.
        InputError: the folder cannot be written.
        OSError: the disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder} is a file; name a folder")
    with writable(f"{option} {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder / LOCK, wait)
    with lock:
        yield


def acquire_lock(path: Path, wait: bool = True) -> AbstractContextManager[Any]:
    """Acquire the lock of a file; `with acquire_lock(path):` releases it at the end.

    Some network file systems have no locks that end with their process. There the existence of the file is the lock,
    which remains if its machine fails: a warning says so, and messages say which file to delete.

    Args:
        wait: whether to wait for another process that holds the lock.
    Raises:
        InUse: another process holds the lock, and `wait` is false.
        OSError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            acquired = lock.acquire(timeout=SOON if wait else 0)
        except Timeout as error:
            holder = _holder(path)
            if not wait:
                message = f"{path.parent} is being written by {holder}; wait for it, or name another folder"
                raise InUse(message) from error
            if holder != OTHER:  # else the system releases the lock when that process ends
                print(f"waiting for {holder}", file=sys.stderr)
            acquired = lock.acquire()
    if any("flock" in str(warning.message) for warning in caught):
        warnings.warn(
            f"the file system of {path.parent} has no file locks: {path.name} marks the folder as in use, and remains "
            "if the machine fails",
            stacklevel=2,
        )
    return acquired


def _holder(path: Path) -> str:
    """The holder of a lock, for messages; of a lock that is a file, with the way to remove it."""
    try:
        pid, host, *_ = path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return OTHER
    return f"process {pid} on {host} (if that process no longer runs, delete {path})"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk confirms it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk confirms the names in a folder."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(name: str) -> str:
    """The name of a file as text of one line: invalid bytes, line breaks and control characters become escapes."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from error

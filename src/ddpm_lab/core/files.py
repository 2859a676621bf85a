"""Files that appear whole or not at all, however the writer ends, and JSON read with its faults told in one line."""

import errno
import json
import os
import shutil
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_lab.core.errors import InputError

TEMPORARY_PREFIX = ".partial-"
OTHER = "another process"
SOON = 5.0  # seconds after which it is said who is waited for
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # nothing that the user typed is at fault


class InUse(InputError):
    """Another process holds the folder."""


def cache_dir() -> Path:
    """DDPM_CACHE_DIR where it is set, else the user's cache folder; all in it can be deleted, and is made again.

    A user without a home, as in many containers, has a folder of temporary files.
    """
    if named := os.environ.get("DDPM_CACHE_DIR"):
        return Path(named)
    from platformdirs import user_cache_path

    try:
        return user_cache_path("ddpm-lab")
    except (RuntimeError, KeyError):
        return Path(tempfile.gettempdir()) / f"ddpm-lab-{os.getuid()}"


@contextmanager
def cache_writable() -> Iterator[None]:
    """Within it, a cache that cannot be written is told with the way out.

    Raises:
        InputError: so it is.
        OSError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        place = error.filename or cache_dir()
        raise InputError(
            f"{place} cannot be written: {error.strerror or error}; DDPM_CACHE_DIR names another cache"
        ) from error


def temporary_path(path: Path) -> Path:
    """A name beside `path` to write under first, a new one each time, so that no two writers meet in it."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` gives a path to write, which takes the place of `path` if all went well."""
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole: a reader, or a kill at any moment, sees the old one or the new one.

    Raises:
        OSError: the disk is full or refuses; the old file stays.
    """
    with atomic_file(path) as temporary:
        write_durably(temporary, content)
    flush_folder(path.parent)


@contextmanager
def atomic_directory(folder: Path, option: str) -> Iterator[Path]:
    """`with appearing(folder, "--out") as temporary:` gives a folder to fill, which takes its name if all went well.

    Args:
        option: the flag that named it, for messages.
    Raises:
        InputError: there is something of that name, other than an empty folder; or it cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InputError(f"{option} {folder} exists; name a new folder")
    if folder.resolve() == Path.cwd():
        raise InputError(f"{option} {folder} is where you are; name a new folder")
    temporary = temporary_path(folder.resolve())
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{option} {folder} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        temporary.rename(folder.resolve())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path, option: str, wait: bool = False) -> Iterator[None]:
    """Make a folder and hold it for this process; the system lets go when the process ends, however it ends.

    Args:
        option: the flag that named it, for messages.
        wait: until another process lets go of it, rather than refuse.
    Raises:
        InUse: another process holds it.
        InputError: it cannot be written.
        OSError: the disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        release = _acquire(folder / ".lock", wait)
    except Busy as error:
        raise InUse(f"{folder} is being written by {error}; wait for it, or name another {option}") from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in NO_SPACE:
            raise
        raise InputError(f"{option} {folder} cannot be written: {getattr(error, 'strerror', error)}") from error
    try:
        yield
    finally:
        release()


@contextmanager
def waiting_for(lock: Path) -> Iterator[None]:
    """Hold a lock file, once no other process does."""
    release = _acquire(lock, wait=True)
    try:
        yield
    finally:
        release()


class Busy(Exception):
    """Who holds a lock."""


def _acquire(path: Path, wait: bool) -> Callable[[], None]:
    """Take a lock; returns what lets go of it.

    Where the file system has no locks that end with their process (some network mounts), the file itself is the lock,
    which a machine that is gone leaves behind: that is said, and how to go on.

    Raises:
        Busy: another process holds it, and is not waited for.
        OSError: it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lock.acquire(timeout=SOON if wait else 0)
        except Timeout as error:
            if not wait:
                raise Busy(_holder(path)) from error
            holder = _holder(path)
            if holder != OTHER:  # else the system lets go when that process ends
                print(f"waiting for {holder}", file=sys.stderr)
            lock.acquire()
    if any("flock" in str(warning.message) for warning in caught):
        warnings.warn(
            f"the file system of {path.parent} has no locks of its own: {path.name} marks who writes there, and stays "
            "where its machine is gone",
            stacklevel=2,
        )
    return lock.release


def _holder(path: Path) -> str:
    """Who holds a lock, in words: a lock that is a file says so, and how to go on where its holder is gone."""
    try:
        pid, host, *_ = path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return OTHER
    return f"process {pid} on {host} (if that is gone, delete {path})"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and have the disk confirm it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Have the disk confirm the names in a folder."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: absent, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from error

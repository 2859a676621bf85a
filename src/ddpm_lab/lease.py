"""Leases: which of several workers, on one machine or many, does a piece of work in a shared folder.

A lease is a file that its holder touches again and again. One that was not touched for a while belongs to a worker that
is dead, and is taken over. Ages are read from the file system's own clock, for those of machines may differ.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from ddpm_lab.files import TEMPORARY_PREFIX, read_json
from ddpm_lab.settings import InputError, RunError

SECONDS = 120.0


class Lease:
    """A lease that is held.

    Attributes:
        path: its file.
    """

    def __init__(self, path: Path, owner: str, seconds: float) -> None:
        self.path, self._owner = path, owner
        self._lost, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, args=(seconds,), daemon=True)
        self._thread.start()

    def _renew(self, seconds: float) -> None:
        while not self._ended.wait(seconds / 5):
            try:
                if _owner(self.path) != self._owner:
                    raise FileNotFoundError
                os.utime(self.path)
            except FileNotFoundError:
                self._lost.set()
                return
            except OSError:  # a file system that does not answer for a moment
                continue

    def check(self) -> None:
        """Raise where another worker has taken the work over, because this one stood still for too long.

        Raises:
            RunError: the lease is lost.
        """
        if self._lost.is_set() or _owner(self.path) != self._owner:
            raise RunError(f"{self.path} was taken over by another worker; this one stood still for too long")

    def release(self) -> None:
        """End it; the file goes, if it is still this worker's."""
        self._ended.set()
        self._thread.join()
        if _owner(self.path) == self._owner:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def leased(path: Path, seconds: float = SECONDS) -> Iterator[Lease | None]:
    """Hold a lease while the block runs.

    Args:
        path: of its file; the folder exists.
        seconds: without a touch after which a lease counts as dead.
    Yields:
        The lease, or None where another worker holds it.
    """
    lease = _acquire(path, seconds)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _acquire(path: Path, seconds: float) -> Lease | None:
    owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    mine = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    mine.write_text(json.dumps({"owner": owner}) + "\n")
    try:
        for _ in range(3):
            try:
                os.link(mine, path)  # fails where the file exists, on network file systems too
                return Lease(path, owner, seconds)
            except FileExistsError:
                os.utime(mine)
                try:
                    age = mine.stat().st_mtime - path.stat().st_mtime
                except FileNotFoundError:
                    continue  # released just now
                if age < seconds:
                    return None
                dead = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
                with contextlib.suppress(FileNotFoundError):  # another takes it away
                    path.rename(dead)
                    if dead.stat().st_mtime - mine.stat().st_mtime > -seconds:  # it was another, new one
                        with contextlib.suppress(FileExistsError):
                            os.link(dead, path)
                    dead.unlink(missing_ok=True)
        return None
    finally:
        mine.unlink(missing_ok=True)


def _owner(path: Path) -> str | None:
    try:
        held = read_json(path)
    except InputError:
        return None
    return str(held.get("owner")) if isinstance(held, dict) else None

"""Leases: which of several workers, on one machine or many, does a piece of work in a shared folder.

A lease is a file that its holder touches again and again. One that was not touched for a while belongs to a worker that
is dead, and is taken over; at once, where it was a process of this machine, since that was started, and is gone. Ages
are read from the file system's own clock, for those of machines may differ.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from ddpm_lab.core.errors import RunError
from ddpm_lab.core.files import TEMPORARY_PREFIX, acquire_lock

SECONDS = 120.0


class LeaseLost(RunError):
    """Another worker took the work over."""


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
                    self._lost.set()
                    return
                os.utime(self.path)
            except OSError:  # a file system that does not answer for a moment
                continue

    def check(self) -> None:
        """Raise where another worker has taken the work over, because this one stood still for too long.

        Raises:
            LeaseLost: so it is.
        """
        with contextlib.suppress(OSError):  # a file system that does not answer says nothing about who holds it
            if _owner(self.path) != self._owner:
                self._lost.set()
        if self._lost.is_set():
            raise LeaseLost(f"{self.path} was taken over by another worker; this one stood still for too long")

    def release(self) -> None:
        """End it; the file goes, if it is still this worker's."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _owner(self.path) == self._owner:
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def leased(path: Path, seconds: float = SECONDS) -> Iterator[Lease | None]:
    """Hold a lease while the block runs.

    Args:
        path: of its file; the folder exists. Beside it lies PATH.lock, held only while a lease is taken.
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
    owner = f"{_this_machine()} {os.getpid()} {uuid.uuid4().hex}"
    mine = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with acquire_lock(path.with_name(path.name + ".lock")):  # of two who find a dead lease, one takes it
        mine.write_text(json.dumps({"owner": owner}) + "\n")
        try:
            with contextlib.suppress(FileNotFoundError):
                age = mine.stat().st_mtime - path.stat().st_mtime
                if age < seconds and not _is_gone(_owner(path)):
                    return None
            mine.replace(path)
        finally:
            mine.unlink(missing_ok=True)
    return Lease(path, owner, seconds)


def _owner(path: Path) -> str | None:
    """Who holds a lease; None where there is none, or one that cannot be understood.

    Raises:
        OSError: the file system does not answer.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return str(held.get("owner")) if isinstance(held, dict) else None


def _this_machine() -> str:
    """A name of this machine since it started and of its table of processes: containers have their own, and machines
    may share a name."""
    processes, start = "-", f"{uuid.getnode():x}"
    with contextlib.suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{processes}/{start}"


def _is_gone(owner: str | None) -> bool:
    """Whether a holder is a process of this machine that is no more."""
    machine, _, rest = (owner or "").partition(" ")
    pid = rest.partition(" ")[0]
    if machine != _this_machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False

"""Leases: which of several workers, on one machine or many, does a piece of work in a shared folder.

A lease is a file that its holder touches regularly. A lease that was not touched for some time belongs to a dead worker
and can be taken over; if its holder was a process of this machine, since the last boot, that no longer exists, at once.
Ages come from the clock of the file system, because the clocks of machines may differ.
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
from ddpm_lab.core.files import TEMPORARY_PREFIX, acquire_lock, move

SECONDS = 120.0


class LeaseLost(RunError):
    """Another worker has taken over the work."""


class Lease:
    """A lease that this process holds, and touches from a thread.

    Attributes:
        path: its file.
    """

    def __init__(self, path: Path, owner: str, seconds: float) -> None:
        self.path, self._owner = path, owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, args=(seconds,), daemon=True)
        self._thread.start()

    def _renew(self, seconds: float) -> None:
        while not self._ended.wait(seconds / 5):
            with contextlib.suppress(OSError):  # a network file system may fail for a moment
                if _owner(self.path) == self._owner:
                    os.utime(self.path)

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            LeaseLost: another worker has taken it over, because this one did not touch it for too long.
        """
        with contextlib.suppress(OSError):  # no answer is no evidence that it is lost
            if _owner(self.path) != self._owner:
                raise LeaseLost(f"{self.path} was taken over by another worker: this one did not renew it in time")

    def release(self) -> None:
        """Stop renewing it, and delete the file if it is still this process's."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _owner(self.path) == self._owner:
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def leased(path: Path, seconds: float = SECONDS) -> Iterator[Lease | None]:
    """Hold a lease while the block runs.

    Args:
        path: of its file, in a folder that exists. PATH.lock beside it is held only while a lease is acquired.
        seconds: after so long without a touch a lease expires.
    Yields:
        The lease, or None if another worker holds it.
    """
    lease = _acquire(path, seconds)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _acquire(path: Path, seconds: float) -> Lease | None:
    owner = f"{_this_machine()} {os.getpid()} {uuid.uuid4().hex}"
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with acquire_lock(path.with_name(path.name + ".lock")):  # of two that find an expired lease, one takes it
        temporary.write_text(json.dumps({"owner": owner}) + "\n")
        try:
            with contextlib.suppress(FileNotFoundError):
                age = temporary.stat().st_mtime - path.stat().st_mtime
                if age < seconds and not _is_gone(_owner(path)):
                    return None
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return Lease(path, owner, seconds)


def _owner(path: Path) -> str | None:
    """The holder named in a lease file; None if there is no file or no valid one.

    Raises:
        OSError: the file system does not answer.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return str(content.get("owner")) if isinstance(content, dict) else None


def _this_machine() -> str:
    """A name of this machine, its boot and its process namespace: containers have their own, and host names repeat."""
    namespace, boot = "-", f"{uuid.getnode():x}"
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{namespace}/{boot}"


def _is_gone(owner: str | None) -> bool:
    """Whether a holder is a process of this machine that no longer exists; on Windows never known, so leases expire."""
    if os.name == "nt":  # where os.kill would end the process
        return False
    machine, _, rest = (owner or "").partition(" ")
    pid = rest.partition(" ")[0]
    if machine != _this_machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # a process of another user raises PermissionError
        return isinstance(error, ProcessLookupError)
    return False

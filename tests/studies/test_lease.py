"""Leases: one holder at a time, and takeover from dead holders only."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_lab.core.errors import RunError
from ddpm_lab.studies import lease
from ddpm_lab.studies.lease import leased

HOLD = """
import sys, time
from pathlib import Path
from ddpm_lab.studies.lease import leased
with leased(Path(sys.argv[1]), float(sys.argv[2])) as lease:
    print("held" if lease else "refused", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def holder(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_has_one_holder_at_a_time(tmp_path):
    path = tmp_path / "a.lease"
    with leased(path) as first:
        assert first is not None
        first.check()
        with leased(path) as second:
            assert second is None
        assert path.exists()
    assert names(tmp_path) == ["a.lease.lock"]
    with leased(path) as third:
        assert third is not None


def test_a_holder_renews_its_lease(tmp_path):
    path = tmp_path / "a.lease"
    with leased(path, 2.0) as lease:
        for _ in range(6):
            time.sleep(0.5)
            with leased(path, 2.0) as other:
                assert other is None
        lease.check()


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    path = tmp_path / "a.lease"
    process = holder(path, 100.0)
    with leased(path, 100.0) as lease:
        assert lease is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    with leased(path, 100.0) as lease:
        assert lease is not None
    assert names(tmp_path) == ["a.lease.lock"]


def test_the_lease_of_a_worker_on_another_machine_is_taken_over_when_it_expires(tmp_path):
    path = tmp_path / "a.lease"
    path.write_text('{"owner": "another-machine/pid:[1] 1 x"}\n')
    with leased(path, 1.0) as lease:
        assert lease is None  # not at once: it might live
    os.utime(path, (time.time() - 2, time.time() - 2))
    with leased(path, 1.0) as lease:
        assert lease is not None


def test_another_machine_with_the_same_name_is_recognised(tmp_path):
    """Its process ids mean nothing on this machine."""
    from ddpm_lab.studies import lease as module

    path, dead_pid = tmp_path / "a.lease", 2**22 + 1  # a number above those of processes
    name, _, start = module._this_machine().rpartition("/")
    boot = Path("/proc/sys/kernel/random/boot_id")
    assert not boot.exists() or start == boot.read_text().strip()
    for other, taken in ((module._this_machine(), True), (f"{name}/another-start", False)):
        path.write_text(json.dumps({"owner": f"{other} {dead_pid} x"}))
        with leased(path, 100.0) as lease:
            assert (lease is not None) is taken


def test_a_short_file_system_failure_loses_no_lease(tmp_path, monkeypatch):
    from ddpm_lab.studies import lease as module

    path, read, failures = tmp_path / "a.lease", module._owner, []

    def fails_three_times(of):
        if len(failures) < 3:
            failures.append(1)
            raise OSError(116, "Stale file handle")
        return read(of)

    with leased(path, 0.5) as lease:
        monkeypatch.setattr(module, "_owner", fails_three_times)
        time.sleep(0.8)
        assert failures == [1, 1, 1]
        lease.check()
    assert names(tmp_path) == ["a.lease.lock"]


def test_a_stalled_worker_loses_its_lease_and_keeps_the_new_one(tmp_path):
    path = tmp_path / "a.lease"
    with leased(path, 1.0) as lease:
        os.utime(path, (0, 0))  # as if it had not been touched for long
        with leased(path, 1.0) as other:
            if other is None:  # touched between the two lines
                pytest.skip("too slow a machine")
            with pytest.raises(RunError, match="taken over"):
                lease.check()
            time.sleep(0.5)
            other.check()
    assert names(tmp_path) == ["a.lease.lock"]


def _try(path, seconds, results, all_tried):
    with leased(path, seconds) as lease:
        results.put(lease is not None)
        all_tried.wait(20)


def test_one_of_many_workers_takes_over_an_expired_lease(tmp_path):
    path = tmp_path / "a.lease"
    path.write_text('{"owner": "dead"}\n')
    os.utime(path, (0, 0))
    context = multiprocessing.get_context("fork")
    results, all_tried = context.Queue(), context.Event()
    workers = [context.Process(target=_try, args=(path, 30.0, results, all_tried)) for _ in range(6)]
    for worker in workers:
        worker.start()
    acquired = [results.get(timeout=20) for _ in workers]
    all_tried.set()
    for worker in workers:
        worker.join()
    assert sum(acquired) == 1


def test_windows_is_not_asked_for_a_process_by_a_signal(monkeypatch):
    """There os.kill ends the process."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    owner = f"{lease._this_machine()} {child.pid} x"
    assert lease._is_gone(owner)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", None)
        patch.setattr(os, "name", "nt")
        assert not lease._is_gone(owner)

"""Leases: one holder at a time, taken over from the dead, never from the living."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from ddpm_lab.lease import leased
from ddpm_lab.settings import RunError

HOLD = """
import sys, time
from pathlib import Path
from ddpm_lab.lease import leased
with leased(Path(sys.argv[1]), float(sys.argv[2])) as lease:
    print("held" if lease else "refused", flush=True)
    time.sleep(60)
"""


def holder(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_holds_and_the_next_is_refused_until_it_ends(tmp_path):
    path = tmp_path / "a.lease"
    with leased(path) as first:
        assert first is not None
        first.check()
        with leased(path) as second:
            assert second is None
        assert path.exists()
    assert list(tmp_path.iterdir()) == []
    with leased(path) as third:
        assert third is not None


def test_a_holder_keeps_its_lease_for_longer_than_it_lasts(tmp_path):
    path = tmp_path / "a.lease"
    with leased(path, 1.0) as lease:
        for _ in range(5):
            time.sleep(0.4)
            with leased(path, 1.0) as other:
                assert other is None
        lease.check()


def test_the_lease_of_the_dead_is_taken_over(tmp_path):
    path = tmp_path / "a.lease"
    process = holder(path, 1.0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    with leased(path, 1.0) as lease:
        assert lease is None  # not at once: it might live
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with leased(path, 1.0) as lease:
            if lease is not None:
                break
        time.sleep(0.1)
    assert lease is not None
    assert list(tmp_path.iterdir()) == []


def test_who_stood_still_finds_its_lease_lost_and_leaves_the_new_one(tmp_path):
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
    assert list(tmp_path.iterdir()) == []


def _try(path, seconds, results):
    with leased(path, seconds) as lease:
        results.put(lease is not None)
        time.sleep(1.0)


def test_of_many_who_come_at_once_one_takes_over(tmp_path):
    path = tmp_path / "a.lease"
    path.write_text('{"owner": "dead"}\n')
    os.utime(path, (0, 0))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_try, args=(path, 30.0, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    won = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(won) == 1

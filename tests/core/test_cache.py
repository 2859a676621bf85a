"""`ddpm cache`, and the locks that keep two processes from writing one folder."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ddpm_lab.cli.main import run_command
from ddpm_lab.core import files, log
from ddpm_lab.core.files import InUse, acquire_lock, locked


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A cache with two entries of features, one of them old, an image folder, and a data set."""
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    for name, num_bytes in {
        "features/new/features.f32": 3000,
        "features/old/features.f32": 5000,
        "generated/one/00000000.png": 700,
        "data/mnist/train.gz": 900,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(num_bytes))
    long_ago = time.time() - 40 * 86_400
    os.utime(tmp_path / "features" / "old" / "features.f32", (long_ago, long_ago))
    return tmp_path


def test_the_cache_is_listed_by_kind(filled, capsys):
    assert run_command(["cache"]) == 0
    output = capsys.readouterr().out
    assert str(filled) in output
    (line,) = [line for line in output.splitlines() if line.split()[0] == "features"]
    assert "2 entries, the oldest 40 days old" in line
    assert "nothing" in next(line for line in output.splitlines() if "onnx" in line)


def test_it_is_cleared_by_kind_and_age(filled, capsys):
    assert run_command(["cache", "--clear", "features", "--older-than", "30"]) == 0
    assert "features: 1 deleted" in capsys.readouterr().out
    assert sorted(path.name for path in (filled / "features").iterdir()) == ["new"]
    assert run_command(["cache", "--clear", "all"]) == 0
    assert not any(path.is_file() for path in filled.rglob("*"))


def test_what_another_process_writes_stays(filled, capsys):
    program = "import sys, time\nfrom pathlib import Path\nfrom ddpm_lab.core.files import locked\n"
    program += "with locked(Path(sys.argv[1]), '--out'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    folder = str(filled / "generated" / "one")
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert run_command(["cache", "--clear", "generated", "features"]) == 0
        other.kill()
    output = capsys.readouterr().out
    assert "generated: 0 deleted, 0 bytes; 1 in use remain" in output
    assert (filled / "generated" / "one" / "00000000.png").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clear", "everything"], "--clear takes all, generated"),
        (["--clear", "all", "--older-than", "-1"], "at least 0 days"),
        (["--older-than", "3"], "requires --clear"),
    ],
)
def test_what_cannot_be_cleared_is_refused(filled, capsys, flags, words):
    assert run_command(["cache", *flags]) == 2
    assert words in capsys.readouterr().err
    assert (filled / "features" / "new" / "features.f32").is_file()


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def no_home(name):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("DDPM_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    assert files.cache_dir() == Path(tempfile.gettempdir()) / f"ddpm-lab-{os.getuid()}"


EVALUATE = [
    "digits:test",
    "--reference",
    "digits:train",
    "--features",
    "classifier",
    "--metrics",
    "fid",
    "--bootstrap",
    "0",
]


def refuse_writing(monkeypatch):
    """As a folder of another user, or on a disk that is read-only: root may write anywhere but here."""

    def refused(*arguments, **settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)


def test_what_is_in_another_user_s_cache_can_be_used(tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    sampled = [str(tiny_run), "--features", "classifier", "--metrics", "is", "--num-images", "20", "--num-steps", "2"]
    commands = [["evaluate", *EVALUATE], ["evaluate", *sampled, "--scores", str(tmp_path / "s.jsonl")]]
    for command in commands:
        assert run_command(command) == 0
    refuse_writing(monkeypatch)
    for command in commands:
        assert run_command(command) == 0, capsys.readouterr().err


def test_an_unwritable_cache_is_an_error_that_names_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    refuse_writing(monkeypatch)
    assert run_command(["evaluate", *EVALUATE]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("cannot be written: Permission denied; DDPM_CACHE_DIR names another cache")


def without_flock(monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)


def test_a_weaker_lock_warns(tmp_path, monkeypatch, recwarn):
    without_flock(monkeypatch)
    who = r"process \d+ on .* \(if that process no longer runs, delete .*\.lock\)"
    with locked(tmp_path, "--run"), pytest.raises(InUse, match=who), locked(tmp_path, "--run"):
        pass
    assert any("has no file locks" in str(warning.message) for warning in recwarn)
    with locked(tmp_path, "--run"):
        assert (tmp_path / ".lock").is_file()


def test_a_lock_of_a_failed_host_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    without_flock(monkeypatch)
    lock = tmp_path / ".lock"
    lock.write_text("4242\nelsewhere.example\n")
    who = rf"process 4242 on elsewhere.example \(if that process no longer runs, delete {lock}\)"
    with pytest.raises(InUse, match=who), locked(tmp_path, "--run"):
        pass
    monkeypatch.setattr(files, "SOON", 0.1)
    threading.Timer(1.0, lock.unlink).start()
    with pytest.warns(UserWarning, match="no file locks"), acquire_lock(lock):
        assert lock.is_file()
    assert "waiting for process 4242 on elsewhere.example" in capsys.readouterr().err


def test_a_line_of_the_log_reaches_the_disk(tmp_path, monkeypatch):
    confirmed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (confirmed.append(os.fstat(number).st_size), real(number)))
    log.append_line(tmp_path / "log.jsonl", {"step": 1})
    assert confirmed == [(tmp_path / "log.jsonl").stat().st_size]


def test_a_rename_is_tried_again_while_another_program_has_the_file_open(tmp_path, monkeypatch):
    """As Windows refuses it; and an error that stays is raised, with the old file in place."""
    replace, refusals, waits = Path.replace, [], []

    def busy(path, target):
        if refusals:
            raise PermissionError(refusals.pop())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "ATTEMPTS", 3)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    path = tmp_path / "x"
    refusals += ["open", "open"]
    files.replace_atomically(path, b"new")
    assert (path.read_bytes(), len(waits)) == (b"new", 2)
    refusals += ["open"] * 3
    with pytest.raises(PermissionError):
        files.replace_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_deleted_only_after_its_release(tmp_path, monkeypatch, capsys):
    """Windows does not delete a file that is open."""
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "generated" / "some" / "below"
    folder.mkdir(parents=True)
    (folder / "image.png").write_bytes(b"")
    unlink, held = Path.unlink, []

    def careful(path, *args, **kwargs):
        if path.name == ".lock":
            with acquire_lock(path, wait=False):
                held.append(path)
        return unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", careful)
    assert run_command(["cache", "--clear", "generated"]) == 0
    assert len(held) == 1
    assert list((tmp_path / "generated").iterdir()) == []

"""The command `ddpm`: runs a command and turns errors into one line and an exit code.

Exit codes: 0 done; 1 a run failed; 2 the input is wrong, with one line on stderr; 130 interrupted.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress

from cyclopts import CycloptsError

from ddpm_lab.cli import picture_commands  # noqa: F401 - registers its commands
from ddpm_lab.cli.commands import app
from ddpm_lab.core import processes
from ddpm_lab.core.errors import InputError, Interrupted, RunError, is_out_of_memory
from ddpm_lab.core.messages import defer_warnings, show_deferred_warnings

LONGEST = 2000  # characters of an error
SHARED = ("train", "sample", "evaluate")  # commands that can run in several processes
LONG = ("train", "study", "demo", "classifier")  # commands whose purpose is not their output on stdout
FAILED_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ddpm` and `python -m ddpm_lab`."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # flush each line, also into a file, and print any file name
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)  # as a cluster ends jobs: treated as Ctrl-C, it releases leases
    code = run_command(sys.argv[1:] if arguments is None else arguments)
    if code and processes.is_distributed():
        # The threads of gloo still wait for processes that have ended; Python's teardown of them sometimes aborts.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(arguments: Sequence[str]) -> int:
    """Run one command, and turn an error into one line on stderr and an exit code.

    Of several processes that a launcher started, only process 0 prints, unless there is an error.
    """
    defer_warnings()
    try:
        shared, is_rank0 = processes.world_size() > 1, processes.is_rank0()
    except InputError as error:
        return _fail(2, str(error))
    if shared and arguments and arguments[0] not in SHARED:
        message = f"{arguments[0]} runs in one process; only {', '.join(SHARED)} run in several"
        return _fail(2, message) if is_rank0 else 2
    with nullcontext() if is_rank0 else redirect_stdout(io.StringIO()):
        code = _run(arguments)
    if code == 0:
        processes.leave()
    if code != 2:  # bad input gives only the one line of the error
        show_deferred_warnings()
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except (InputError, CycloptsError) as error:
        return _fail(2, str(error))
    except (KeyboardInterrupt, Interrupted) as error:
        return _fail(130, str(error) or "interrupted")
    except RunError as error:
        return _fail(1, str(error))
    except BrokenPipeError:  # the reader of stdout has gone; Python must not write there at its exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if arguments and arguments[0] in LONG else 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(1 if error.errno in FAILED_DISK else 2, f"{place}{error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        return _run_failure(error)
    return 0


def _run_failure(error: RuntimeError | MemoryError) -> int:
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first = str(error).strip().partition("\n")[0]
        return _fail(1, f"torch.compile failed: {first}; give --training.compile no or --engine torch")
    if is_out_of_memory(error):
        return _fail(2, "not enough memory; use a smaller batch size or network")
    raise error


def _fail(code: int, message: str) -> int:
    rank = os.environ.get("RANK", "0")
    which = f"process {rank}: " if rank.isdecimal() and int(rank) else ""
    line = " ".join(message.split())
    if code == 2 and len(line) > LONGEST:  # a message may quote a long value of the input
        line = f"{line[:LONGEST]}... ({len(line):,} characters)"
    with suppress(OSError):  # the reader of stderr has gone
        print(f"error: {which}{line}", file=sys.stderr)
    return code

"""The command `ddpm`: arguments in, one line a fault out.

Exit codes: 0 done; 2 the input is at fault, told in one line on stderr; 1 a run failed; 130 interrupted.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress

from cyclopts import CycloptsError

from ddpm_lab.cli import picture_commands  # noqa: F401 - it registers its commands
from ddpm_lab.cli.commands import app
from ddpm_lab.core import processes
from ddpm_lab.core.errors import InputError, Interrupted, RunError, is_out_of_memory
from ddpm_lab.core.messages import defer_warnings, show_deferred_warnings

LONGEST = 2000  # characters of an error
SHARED = ("train", "sample", "evaluate")  # commands that several processes can share
LONG = ("train", "study", "demo", "classifier")  # commands whose lines are not what one calls them for
FAILED_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ddpm` and `python -m ddpm_lab`."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # each line at once, also into a file; any name can be printed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)  # as a cluster ends jobs: leases are let go of, and it counts as Ctrl-C
    code = run_command(sys.argv[1:] if arguments is None else arguments)
    if code and processes.is_distributed():
        # Gloo's threads still wait for processes that have gone; torn down by Python they abort it now and then.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and turn what went wrong into a line on stderr and an exit code."""
    defer_warnings()
    code = _run_shared(arguments) if "WORLD_SIZE" in os.environ else _run(arguments)
    if code != 2:  # of bad input nothing is told but the one line
        show_deferred_warnings()
    return code


def _run_shared(arguments: Sequence[str]) -> int:
    """Run as one of several processes that a launcher started; all but the leader are silent when all goes well."""
    try:
        alone = processes.world_size() == 1
        leader = processes.is_rank0()
    except InputError as error:
        return _fail(2, str(error))
    if not alone and arguments and arguments[0] not in SHARED:
        return _fail(2, f"{arguments[0]} runs in one process; several share {', '.join(SHARED)}") if leader else 2
    with nullcontext() if leader else redirect_stdout(io.StringIO()):
        code = _run(arguments)
    if code == 0:
        processes.leave()
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
    except BrokenPipeError:  # the reader has seen enough; nothing may be written when Python exits, either
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
        return _fail(1, f"torch.compile failed: {first}; --training.compile no or --engine torch does without it")
    if is_out_of_memory(error):
        return _fail(2, "not enough memory for that; a smaller batch size or network needs less")
    raise error


def _fail(code: int, message: str) -> int:
    rank = os.environ.get("RANK", "0")
    which = f"process {rank}: " if rank.isdecimal() and int(rank) else ""
    line = " ".join(message.split())
    if code == 2 and len(line) > LONGEST:  # one of a run that failed may hold its record
        line = f"{line[:LONGEST]}... ({len(line):,} characters)"
    with suppress(OSError):  # whoever read it has gone
        print(f"error: {which}{line}", file=sys.stderr)
    return code

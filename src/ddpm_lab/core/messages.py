"""Lines for the user, and warnings held back until a command has found its input in order.

Of bad input nothing is told but one line, and no warning is told twice.
"""

import sys
import warnings

from ddpm_lab.core import processes

_held: list[str] = []  # warnings of the command under way that are not yet told
_told: list[str] = []  # and that are


def defer_warnings() -> None:
    """Begin a command: whatever is warned of from now on waits."""
    _held.clear()
    _told.clear()
    warnings.showwarning = lambda message, *rest, **kwargs: _hold(str(message))


def _hold(message: str) -> None:
    if message not in _held and message not in _told:
        _held.append(message)


def say(line: str) -> None:
    """Print a line of a command that has begun its work, and first the warnings held back until then."""
    show_deferred_warnings()
    print(line)


def show_deferred_warnings() -> None:
    """Tell the warnings that wait."""
    for message in _held if processes.is_rank0() else ():
        print(f"warning: {message}", file=sys.stderr)
    _told.extend(_held)
    _held.clear()

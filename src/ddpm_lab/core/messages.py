"""Lines for the user, and warnings that are deferred until a command has checked its input.

For bad input only the error is printed, and no warning is printed twice.
"""

import sys
import warnings
from collections.abc import Sequence

from ddpm_lab.core import processes

_deferred: list[str] = []  # warnings of the current command that are not printed yet
_shown: list[str] = []  # and those that are
MAX_LISTED = 20  # items of a list in a message


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """The first of some texts for a message, and the number of the others."""
    more = len(texts) - MAX_LISTED
    return separator.join(texts[:MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def defer_warnings() -> None:
    """At the start of a command: defer all warnings from now on."""
    _deferred.clear()
    _shown.clear()
    warnings.showwarning = lambda message, *rest, **kwargs: _defer(str(message))


def _defer(message: str) -> None:
    if message not in _deferred and message not in _shown:
        _deferred.append(message)


def say(line: str) -> None:
    """Print a line of a command that has checked its input, after the deferred warnings."""
    show_deferred_warnings()
    print(line)


def show_deferred_warnings() -> None:
    """Print the deferred warnings."""
    for message in _deferred if processes.is_rank0() else ():
        print(f"warning: {message}", file=sys.stderr)
    _shown.extend(_deferred)
    _deferred.clear()

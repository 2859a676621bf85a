"""What can go wrong, by whose fault it is; `cli` makes exit codes of these."""


class InputError(ValueError):
    """What the user gave cannot be used: the message says what, where, and what would be valid, in one line."""


class RunError(RuntimeError):
    """Work cannot go on, through no fault of what the user typed; what was saved stays."""


class Interrupted(RuntimeError):
    """The user stopped a run; a checkpoint was written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is not enough memory, of this machine or of its device."""
    told = isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    return told or isinstance(error, MemoryError)


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)

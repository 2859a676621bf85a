"""The errors that `cli` turns into exit codes."""


class InputError(ValueError):
    """The input of the user cannot be used; the message says in one line what is wrong, where, and what is valid."""


class RunError(RuntimeError):
    """Work cannot go on, for another reason than the input; everything saved remains."""


class Interrupted(RuntimeError):
    """The user interrupted a run; a checkpoint was written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the machine or its device has not enough memory."""
    of_torch = isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
    return of_torch or isinstance(error, MemoryError)


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message if the condition is false."""
    if not condition:
        raise InputError(message)

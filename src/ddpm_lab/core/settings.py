"""Groups of settings: frozen dataclasses that check the type and the range of each value on construction.

A field declares its range beside its type: `batch_size: Annotated[int, Range(1, 65_536)] = 128`.
Nothing here imports torch, so that the command line starts quickly.
"""

import dataclasses
import math
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from ddpm_lab.core.errors import InputError, require

WORDING = {type(None): "nothing", int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts; a setting that is a list accepts each of its items in the range.

    Attributes:
        low, high: the smallest and the largest number.
        open_low, open_high: whether the range excludes that end.
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high < math.inf and not (self.open_low or self.open_high):
            return f"from {self.low} to {self.high}"
        lower = f"{'above' if self.open_low else 'at least'} {self.low}"
        upper = f" and {'below' if self.open_high else 'at most'} {self.high}" if self.high < math.inf else ""
        return lower + upper


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the annotated type; a bool is no int, and a number must be finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint)


def _wording(hint: Any) -> str:
    """How an annotation reads in an error: 'a whole number or nothing', 'one of linear, cosine'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_wording, arguments))
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(arguments)
    return f"a list of {_wording(arguments[0])}" if origin is tuple else WORDING[hint]


@cache  # evaluating the annotations is most of the cost of constructing a group
def _hints(group: type) -> dict[str, Any]:
    return typing.get_type_hints(group, include_extras=True)


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """A group of settings. Construction checks types, then ranges, then what `_check` of the group adds."""

    _grouped: ClassVar[bool] = True  # whether its flags are --group.name

    def __post_init__(self) -> None:
        hints = _hints(typing.cast(type, type(self)))  # mypy takes no dataclass for hashable
        for field in dataclasses.fields(self):
            value, hint, ranges = getattr(self, field.name), hints[field.name], []
            if typing.get_origin(hint) is Annotated:
                hint, *ranges = typing.get_args(hint)
            name = f"{self._label()}." * self._grouped + field.name.rstrip("_")
            require(fits(value, hint), f"{name} must be {_wording(hint)}, not {value!r}")
            for number in value if isinstance(value, tuple) else (value,):
                for allowed in ranges:
                    inside = not isinstance(number, int | float) or number in allowed
                    require(inside, f"{name} must be {allowed}, not {number}")
        self._check()

    def _check(self) -> None:
        """Raise InputError where settings do not fit each other."""

    @classmethod
    def _label(cls) -> str:
        return cls.__name__.removesuffix("Config").lower()

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Build the group from parsed JSON or TOML.

        Raises:
            InputError: not a table, an unknown setting, a wrong type, or a value out of range.
        """
        if not isinstance(values, dict):
            raise InputError(f"{cls._label()} must be a table of settings, not {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            require(key in known, f"{cls._label()} has no setting {key!r}; it has {', '.join(known)}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def read_toml(kind: str, packaged: dict[str, Path], name: str) -> tuple[Path, dict[str, Any]]:
    """Read a packaged recipe or study, or a TOML file of the user.

    Args:
        kind: "recipe" or "study", for messages.
        packaged: the files that come with the package, by name.
        name: one of those names, or a path.
    Returns:
        The path of the file, and its tables, not yet checked.
    Raises:
        InputError: no such file, a file that cannot be read, or one that is not TOML.
    """
    path = packaged.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"no {kind} {name!r}: name one of {', '.join(packaged)}, or the path of a TOML file")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind} {name} is not a TOML file: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise InputError(f"{kind} {name} cannot be read: {error.strerror}") from error

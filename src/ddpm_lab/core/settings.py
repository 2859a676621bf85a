"""Groups of settings: frozen dataclasses that refuse a wrong type or value on construction, in a user's words.

Nothing here imports torch, so that the command line answers at once.
"""

import dataclasses
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ddpm_lab.core.errors import InputError, require


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of the annotated type; a bool is no int, and a number must be finite."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint)


def _wording(hint: Any) -> str:
    """How an annotation reads in an error: 'int or nothing', 'linear, cosine'."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wording(option) for option in typing.get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if origin is tuple:
        return f"a list of {_wording(typing.get_args(hint)[0])}"
    return {
        type(None): "nothing",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        bool: "true or false",
    }[hint]


@cache  # evaluating the annotations is most of what constructing a group costs
def _hints(group: type) -> dict[str, Any]:
    return typing.get_type_hints(group)


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """A group of settings; construction refuses a value of the wrong type, then `_check` one out of range."""

    _grouped: ClassVar[bool] = True  # whether its flags are --group.name

    def __post_init__(self) -> None:
        hints = _hints(typing.cast(type, type(self)))  # mypy takes no dataclass for hashable
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            require(fits(value, hint), f"{self._told(field.name)} must be {_wording(hint)}, not {value!r}")
        self._check()

    @classmethod
    def _label(cls) -> str:
        return cls.__name__.removesuffix("Config").lower()

    def _told(self, name: str) -> str:
        return f"{self._label()}." * self._grouped + name.rstrip("_")

    def _check(self) -> None:
        raise NotImplementedError

    def _at_most(self, high: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value is None or value <= high, f"{self._told(name)} must be at most {high}, not {value}")

    def _at_least(self, low: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= low, f"{self._told(name)} must be at least {low}, not {value}")

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Build the group from parsed JSON or TOML; an unknown key is refused, naming the known."""
        require(isinstance(values, dict), f"{cls._label()} must be a table of settings, not {type(values).__name__}")
        assert isinstance(values, dict)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            require(key in known, f"{cls._label()} has no setting {key!r}; it has {', '.join(known)}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def read_toml(kind: str, packaged: dict[str, Path], name: str) -> tuple[Path, dict[str, Any]]:
    """A packaged recipe or study, or a TOML file of the user's: where it lies, and its tables, not yet checked.

    Args:
        kind: what messages call it.
        packaged: the files that come with the package, by name.
        name: one of those, or a path.

    Raises:
        InputError: there is none of that name, it cannot be read, or it is no TOML.
    """
    path = packaged.get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"no {kind} {name!r}: name one of {', '.join(packaged)}, or the path of a TOML file that exists"
        )
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind} {name} is not a TOML file: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise InputError(f"{kind} {name} cannot be read: {error.strerror}") from error

"""The schema of a score record: records have the fields that it lists, and its documentation lists them all."""

import importlib.util
import types
import typing
from pathlib import Path

from ddpm_lab.evaluation.record import Evaluation, Floor, Interval, Memorisation, ScoreRecord


def assert_fits(value, hint):
    """A value from JSON has the fields and types of a TypedDict; of a type variable, those of an interval or number."""
    if typing.is_typeddict(hint):
        assert hint.__required_keys__ <= value.keys() <= hint.__annotations__.keys()
        for name, field in typing.get_type_hints(hint).items():
            if name in value:
                assert_fits(value[name], field)
    elif isinstance(hint, typing.TypeVar):
        assert value is None or isinstance(value, float) or value.keys() == Interval.__annotations__.keys()
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        assert value is None or len(options) > 1 or assert_fits(value, options[0]) is None
    elif hint is float:
        assert isinstance(value, float | int)
    else:
        assert isinstance(value, typing.get_origin(hint) or hint)


def test_every_field_is_documented():
    path = Path(__file__).parents[2] / "scripts" / "record_schema.py"
    spec = importlib.util.spec_from_file_location("record_schema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables = module.schema_tables()
    for part in (ScoreRecord, Evaluation, Floor, Memorisation, Interval):
        assert all(f"| `{name}` |" in tables for name in part.__annotations__)
    assert "| `fid` | [Interval](#interval) or null |" in tables
    assert "| `test_accuracy` | float; may be absent |" in tables

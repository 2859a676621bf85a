"""Render the schema of a score record, `ddpm_lab.evaluation.record`, as Markdown tables; docs/record.md shows them.

python scripts/record_schema.py
"""

import ast
import itertools
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src/ddpm_lab/evaluation/record.py"
HEAD = ["| field | type | meaning |", "|---|---|---|"]


def schema_tables() -> str:
    """A section with a table for each part of a record, the whole record first; inherited fields are shown once."""
    module = ast.parse(SOURCE.read_text(encoding="utf-8"))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    bases = {_name(base) for node in classes.values() for base in node.bases}
    fields = {name: _fields(node) for name, node in classes.items()} | _functional(module.body)
    parts = [name for name in classes if name not in bases]
    lines, shown = [], set()

    def rows(name: str, value: str) -> list[str]:
        """Rows of a type and of those it inherits from; `value` is the type of a score."""
        found = []
        for base in classes[name].bases if name in classes else ():
            if _name(base) in fields and _name(base) not in shown:
                shown.add(_name(base))
                found += rows(_name(base), ast.unparse(base.slice) if isinstance(base, ast.Subscript) else value)
        return found + [
            f"| `{field}` | {_kind(kind.replace('Value', value))} | {doc} |" for field, kind, doc in fields[name]
        ]

    def _kind(kind: str) -> str:
        optional = kind.startswith("NotRequired[")
        kind = kind.removeprefix("NotRequired[").removesuffix("]") if optional else kind
        kind = kind.replace(" | ", " or ").replace("None", "null").replace("Any", "any")
        linked = re.sub(rf"\b({'|'.join(parts)})\b", lambda match: f"[{match[0]}](#{match[0].lower()})", kind)
        return linked + "; may be absent" * optional

    for name in [
        "ScoreRecord",
        "TrainingRecord",
        *(part for part in parts if part not in ("ScoreRecord", "TrainingRecord")),
    ]:
        lines += [f"## {name}", "", " ".join((ast.get_docstring(classes[name]) or "").split()), ""]
        lines += [*HEAD, *rows(name, "number"), ""]
    return "\n".join(lines)


def _name(node: ast.expr) -> str:
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node)


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Name, type and docstring of each field."""
    optional = any(keyword.arg == "total" for keyword in node.keywords)
    return [
        (
            ast.unparse(field.target),
            ("NotRequired[{}]" if optional else "{}").format(ast.unparse(field.annotation)),
            _text(doc),
        )
        for field, doc in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
    ]


def _functional(body: list[ast.stmt]) -> dict[str, list[tuple[str, str, str]]]:
    """The same for NAME = TypedDict("NAME", {"class": type}), for names that Python reserves; it has one docstring."""
    return {
        ast.unparse(node.targets[0]): [
            (ast.literal_eval(key), ast.unparse(kind), _text(doc))
            for key, kind in zip(node.value.args[1].keys, node.value.args[1].values, strict=True)
        ]
        for node, doc in itertools.pairwise(body)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("TypedDict")
    }


def _text(node: ast.stmt) -> str:
    """The docstring of a field: the string that follows it."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
        raise ValueError(f"{SOURCE}: a field before line {node.lineno} has no docstring")
    return " ".join(node.value.value.split())


if __name__ == "__main__":
    print(schema_tables())

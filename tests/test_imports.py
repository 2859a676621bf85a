"""Imports run one way: a module imports only from its own folder and from those before it."""

import ast
from pathlib import Path

import pytest

import ddpm_lab
from ddpm_lab.core.source_version import FOLDERS

PACKAGE = Path(ddpm_lab.__file__).parent


def wrong_imports(package):
    """Every import that does not point to the module's own folder or to one before it, wherever in the file it is."""
    found = []
    for path in sorted(package.rglob("*.py")):
        folder, *_ = path.relative_to(package).parts
        if folder.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                package_name, *rest = module.split(".")
                if package_name == "ddpm_lab" and (not rest or FOLDERS.index(rest[0]) > FOLDERS.index(folder)):
                    found.append(f"{path.relative_to(package)}: {module}")
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{path.relative_to(package)}: relative")
    return found


def test_imports_run_one_way():
    assert wrong_imports(PACKAGE) == []
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert {path.name for path in PACKAGE.glob("*.*")} == {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize(
    "line",
    ["from ddpm_lab.training import loop", "import ddpm_lab.cli.main", "from ddpm_lab import load", "from . import x"],
)
def test_a_wrong_import_is_found(tmp_path, line):
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "a.py").write_text(f"def f():\n    {line}\n")
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_says_what_lives_there(folder):
    said = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
    assert "May import " in said
    assert "Start with " in said

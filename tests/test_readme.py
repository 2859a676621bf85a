"""What README and docs show works: their Python runs, their commands are ones the program takes."""

import ast
import base64
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from ddpm_lab.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCKS = [found for text in PAGES.values() for found in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)]
EXAMPLES = {
    path.name: found for path, text in PAGES.items()
    if (found := re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
}  # fmt: skip
LAST_LINES = {
    "README.md": r"^49 0\.\d+$",
    "scores.md": r"^FD-rows \(n=360 against 1,437\) \{'value': ",
    "start.md": r"^4 images of 1 x 28 x 28 torch\.uint8$",
    "extending.md": r"^at most \d\.\d\d \+- 0\.\d\d bits per dimension$",
}
COMMANDS = [
    line.partition("#")[0].strip() for kind, block in BLOCKS if kind == "" for line in block.splitlines()
    if line.startswith("ddpm ")
]  # fmt: skip


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_examples_run(page, capsys, tmp_path, monkeypatch):
    """Each in a namespace and a folder of its own; the last line that it prints is the one expected of the page."""
    monkeypatch.chdir(tmp_path)
    for number, example in enumerate(EXAMPLES[page]):
        namespace = {"__name__": "example"}
        exec(compile(example, f"{page}, example {number}", "exec"), namespace)
    said = capsys.readouterr().out.splitlines()
    assert re.search(LAST_LINES[page], said[-1])
    if page == "README.md":  # a digit on black; read as noise, what this network predicts is no image
        assert (namespace["step"].x_0_hat < -0.9).float().mean() > 0.5


def code_cells():
    cells = json.loads((ROOT / "docs" / "story.ipynb").read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def run_cell(source, name, namespace):
    """Run a cell as a notebook does; returns the value that it would show, that of a last line without a name."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def picture_size(bundle):
    """(width, height) of the PNG or of the GIF in the output of a cell."""
    text = bundle.get("image/png") or re.search('base64,([^"]*)"', "".join(bundle["text/html"]))[1]
    return Image.open(io.BytesIO(base64.b64decode(text))).size


@pytest.mark.slow
def test_the_notebook_runs(capsys):
    """Its cells in order; what they print of the chains is what it shows, and so are the sizes of all its pictures."""
    namespace, pictures = {}, 0
    for number, cell in enumerate(code_cells()):
        value = run_cell(cell["source"], f"story.ipynb, cell {number}", namespace)
        said = capsys.readouterr().out
        shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        if "amplitude left" in shown:
            assert said == shown
        assert bool(said) == bool(shown)
        bundles = [output["data"] for output in cell["outputs"] if "data" in output]
        assert (value is not None) == bool(bundles)
        if value is not None:
            png = getattr(value, "_repr_png_", lambda: None)()
            made = {"image/png": base64.b64encode(png)} if png else value._repr_mimebundle_()
            assert picture_size(made) == picture_size(bundles[0])
            pictures += 1
    assert pictures == 9
    assert namespace["fid"]["value"] > 2 * namespace["floor"]


def test_the_first_cell_installs_the_package_where_it_is_absent(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append((command, check)))
    first, *_ = code_cells()
    run_cell(first["source"], "first", {})
    assert calls == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ddpm_lab" else 1)
    run_cell(first["source"], "first", {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    ((command, check),) = calls
    assert command == [sys.executable, "-m", "pip", "install", "--quiet", project]
    assert check is True


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, bound, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target

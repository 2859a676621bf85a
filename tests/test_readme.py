"""What README and docs show works: their Python runs, their commands are ones the program takes."""

import json
import re
import shlex
from pathlib import Path

import pytest

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
    "start.md": r"^torch\.Size\(\[16, 1, 8, 8\]\) torch\.uint8$",
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


@pytest.mark.slow
def test_the_notebook_runs(capsys):
    """Its cells in order; what they print of the chains is what it shows, and all its pictures are there."""
    cells = json.loads((ROOT / "docs" / "story.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    namespace = {}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"story.ipynb, cell {number}", "exec"), namespace)
        said = capsys.readouterr().out
        shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        if "amplitude left" in shown:
            assert said == shown
        assert bool(said) == bool(shown)
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    assert namespace["fid"]["value"] > 2 * namespace["floor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, bound, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target

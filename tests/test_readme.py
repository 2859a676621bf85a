"""What README and docs show works: their Python runs, their commands are ones the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from ddpm_lab.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCKS = [found for text in PAGES.values() for found in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)]
COMMANDS = [
    line.partition("#")[0].strip() for kind, block in BLOCKS if kind == "" for line in block.splitlines()
    if line.startswith("ddpm ")
]  # fmt: skip


def python_examples(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def test_python_examples_run(capsys):
    (example,) = python_examples(README)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_the_example_of_scores_runs(capsys):
    (example,) = python_examples((ROOT / "docs" / "scores.md").read_text())
    exec(compile(example, "scores.md", "exec"), {})
    assert capsys.readouterr().out.startswith("FD-rows (n=360) {'value': ")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, bound, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target

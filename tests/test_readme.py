"""What the README shows works: its Python runs, its commands are ones the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from ddpm_lab.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
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
    (example,) = python_examples((Path(__file__).parent.parent / "docs" / "scores.md").read_text())
    exec(compile(example, "scores.md", "exec"), {})
    assert capsys.readouterr().out.startswith("FD-rows (n=360) {'value': ")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _, bound, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target

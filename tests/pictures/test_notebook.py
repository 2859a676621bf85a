"""Curves and films in one call, and progress as a notebook draws it."""

import base64
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import ddpm_lab
from ddpm_lab.cli.main import run_command
from ddpm_lab.core import progress as module
from ddpm_lab.core.errors import InputError


def test_curves_are_those_of_the_command(tiny_run, tmp_path):
    assert run_command(["curves", "training", str(tiny_run), "--out", str(tmp_path / "a.png")]) == 0
    curves = ddpm_lab.curves(tiny_run)
    assert curves.content == (tmp_path / "a.png").read_bytes()
    assert base64.b64decode(curves._repr_mimebundle_()["image/png"]) == curves.content
    curves.save(tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == curves.content
    with pytest.raises(InputError, match="not a run folder"):
        ddpm_lab.curves(tmp_path)


def test_a_film_is_that_of_the_command(tiny_run, tmp_path):
    flags = ["--num-images", "2", "--num-steps", "3", "--device", "cpu", "--out"]
    assert run_command(["reverse", str(tiny_run), *flags, str(tmp_path / "a.gif")]) == 0
    film = ddpm_lab.film(tiny_run, num_images=2, num_steps=3, device="cpu")
    assert film.content == (tmp_path / "a.gif").read_bytes()
    html = film._repr_mimebundle_()["text/html"]
    encoded = html.removeprefix('<img src="data:image/gif;base64,').removesuffix('">')
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 4)
    assert "content" not in repr(film)
    with pytest.raises(InputError, match="name at least one model"):
        ddpm_lab.film()
    with pytest.raises(InputError, match="frames must be from 2 to 4"):
        ddpm_lab.film(tiny_run, num_steps=3, frames=5, device="cpu")


@pytest.fixture
def cell(monkeypatch):
    """The output of a notebook's cell: for each display its states, as HTML.

    It stands in for IPython's display and its handle, which are no dependencies; rich takes this for a Jupyter kernel.
    """
    outputs = []

    class Output:
        def __init__(self, shown):
            self.states = []
            self.update(shown)

        def update(self, shown):
            self.states.append(shown._repr_mimebundle_(include=None, exclude=None)["text/html"])

    def display(shown, *, display_id):
        assert display_id is True
        outputs.append(Output(shown))
        return outputs[-1]

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return outputs


def test_a_notebook_draws_one_bar_that_moves(cell, monkeypatch, capsys):
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    with module.progress("reading [/red] <b>", 3, "images") as advance:
        for number in range(3):
            advance(1, note=f"loss {number}")
    (output,) = cell
    assert ["1/3" in output.states[0], "2/3" in output.states[1]] == [True, True]
    assert "3/3" in output.states[-1]
    assert "reading [/red] &lt;b&gt;" in output.states[-1]
    assert "loss 2" in output.states[-1]
    assert capsys.readouterr() == ("", "")


def test_short_work_shows_no_bar_and_a_failure_leaves_its_state(cell, monkeypatch):
    with module.progress("short", 2, "images") as advance:
        advance(2)
    assert cell == []
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)

    def fail():
        with module.progress("long", 9, "images") as advance:
            advance(4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "4/9" in cell[0].states[-1]


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    assert not module._in_notebook()
    assert not Console().is_jupyter


def test_sampling_shows_its_progress(tiny_run, cell, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    images = ddpm_lab.sample(tiny_run, 2, num_steps=4, device="cpu")
    assert np.asarray(images).shape == (2, 1, 8, 8)
    assert "8/8" in cell[-1].states[-1]

"""What the studio opens, reads and refuses, below the page."""

import dataclasses
import io
import json
import math
import re
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from ddpm_lab.cli.main import app, run_command
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import append_line
from ddpm_lab.models.trained import load
from ddpm_lab.pictures.drawing import image_table
from ddpm_lab.studio.forward import dataset_image, drawn, fitted, noised, uploaded
from ddpm_lab.studio.generate import ALL_CLASSES, sample_command, sampling_config
from ddpm_lab.studio.page import remove_other_formats
from ddpm_lab.studio.runs import curves, grid_at, grid_steps, report, report_names, run_table
from ddpm_lab.studio.scores import nearest, record_text, records, score_row, scored_runs
from ddpm_lab.studio.sources import guide_names, model_names, open_model, source_of
from tests.conftest import png


def test_models_are_those_below_the_folder(studio_runs):
    assert model_names(studio_runs) == ["mnist", "cifar10", "broken", "study/cells/one", "tiny"]
    averages = [name for name in guide_names(studio_runs) if "averages" in name]
    assert averages[-2:] == ["tiny/averages/step_00000001", "tiny/averages/step_00000003"]
    assert source_of(studio_runs, averages[-1]) == str(studio_runs / averages[-1])
    with pytest.raises(InputError, match="there is no model"):
        source_of(studio_runs, "../outside")
    assert open_model(studio_runs, "tiny", "cpu").step == 12
    for name in ("../outside", "away", "/etc", "", "tiny/../../outside", str(studio_runs / "tiny"), "notes.txt"):
        with pytest.raises(InputError, match="there is no model"):
            open_model(studio_runs, name, "cpu")
    with pytest.raises(InputError, match="damaged"):
        open_model(studio_runs, "broken", "cpu")


@pytest.mark.parametrize("what", ["data", "link in data", "log.jsonl", "checkpoints", "samples"])
def test_what_a_stranger_s_run_points_to_elsewhere_is_not_read(tiny_run, tmp_path, what):
    """A folder of images named in its config.json, or a link among its files, that leads out of the folder of runs."""
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    shutil.copytree(tiny_run, runs / "a")
    outside.mkdir()
    for index in range(30):
        Image.new("L", (8, 8), index).save(outside / f"{index}.png")
    if what in ("data", "link in data"):
        record = json.loads((runs / "a" / "config.json").read_text())
        record["config"]["data"]["dataset"] = str(outside if what == "data" else runs / "a" / "images")
        (runs / "a" / "config.json").write_text(json.dumps(record))
        if what == "link in data":
            (runs / "a" / "images").mkdir()
            (runs / "a" / "images" / "more").symlink_to(outside)
        with pytest.raises(InputError, match="outside the folder of runs"):
            nearest(runs, "a", 20, 0, "cpu")
        return
    shutil.move(runs / "a" / what, outside / what)
    (runs / "a" / what).symlink_to(outside / what)
    assert model_names(runs) == ["mnist", "cifar10"]


@pytest.mark.parametrize("name", ["red panda", "--x", "it's", "7"])
def test_the_command_names_the_chosen_class(name):
    """The page holds its number; what the command line makes of the name is that number again."""
    mnist = load("mnist", device="cpu")
    names = [*"abcde", name, *"ghij"]
    trained = dataclasses.replace(mnist, record={"data": {"class_names": names}})
    config = sampling_config(trained, None, "ddim", 5, 0, 0, 4, "5", 1)
    assert config.class_ == (5,)
    words = shlex.split(sample_command(trained, config, "cpu"))[1:]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert trained.class_numbers(bound.arguments["sampling"].class_) == (5,)
    assert sampling_config(trained, None, "ddim", 5, 0, 0, 4, ALL_CLASSES, 1).class_ == ()


def test_the_server_itself_knows_no_other_formats(monkeypatch):
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    remove_other_formats()
    assert {"EPS", "WMF"}.isdisjoint(Image.OPEN)
    assert {"EPS", "WMF"}.isdisjoint(Image.ID)
    assert Image.open(io.BytesIO(png(Image.new("L", (3, 3))))).size == (3, 3)


def test_a_run_called_like_packaged_weights_is_not_taken_for_them(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "mnist")
    assert model_names(tmp_path) == ["mnist", "cifar10", "./mnist"]
    assert open_model(tmp_path, "mnist", "cpu").image_shape == (1, 28, 28)
    assert open_model(tmp_path, "./mnist", "cpu").image_shape == (1, 8, 8)


def test_weights_are_read_again_when_they_change(tiny_run, tmp_path):
    """A run that was made anew in its old folder, to the same step."""
    shutil.copytree(tiny_run, tmp_path / "run")
    before = open_model(tmp_path, "run", "cpu")
    assert open_model(tmp_path, "run", "cpu") is before
    sha256 = before.weights_sha256
    folder = tmp_path / "run" / "checkpoints" / "step_00000012"
    shutil.copy(folder / "model.safetensors", folder / "ema.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["ema.safetensors"] = meta["sha256"]["model.safetensors"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert open_model(tmp_path, "run", "cpu").weights_sha256 != sha256


def test_the_table_of_runs_shows_what_is_wrong(studio_runs, tmp_path):
    """Their table, curves, grids of one step and reports; nothing outside, and a broken one harms no other."""
    here = tmp_path / "runs"
    shutil.copytree(studio_runs, here, symlinks=True)
    (here / "broken" / "config.json").write_text("{")
    (here / "broken" / "log.jsonl").unlink()
    (here / "tiny" / "samples" / "step_00000006.png").write_bytes(b"no picture")
    (here / "study" / "report.html").write_text("<p>What?</p>")
    (here / "linked").mkdir()
    (tmp_path / "secret.html").write_text("secret")
    (here / "linked" / "report.html").symlink_to(tmp_path / "secret.html")
    rows = {row[0]: row[1:] for row in run_table(here)}
    assert rows.keys() == {"broken", "study/cells/one", "tiny"}
    assert rows["tiny"][:1] + rows["tiny"][2:5] == ["12 of 12", "1000", "rescaled", "eps"]
    assert rows["broken"][0] == "broken"
    assert "is not JSON" in rows["broken"][-1]
    assert curves(here, ["tiny", "broken", "study/cells/one"]).shape[2] == 3
    assert curves(here, ["broken"]) is None
    assert grid_steps(here, ["tiny", "study/cells/one"]) == [6, 12]
    assert grid_at(here, "tiny", 6) is None
    assert grid_at(here, "tiny", 12).shape == grid_at(here, "study/cells/one", 12).shape
    assert grid_at(here, "../secret", 12) is None
    assert report_names(here) == ["study"]
    assert "&lt;p&gt;What?" in report(here, "study")
    assert "sandbox" in report(here, "study")
    assert "default-src &#x27;none&#x27;" in report(here, "study")
    linked = here / "study" / "cells" / "one" / "samples" / "step_00000012.png"
    shutil.copy(linked, tmp_path / "secret.png")
    linked.unlink()
    linked.symlink_to(tmp_path / "secret.png")
    assert grid_at(here, "study/cells/one", 12) is None, "it leads out of the folder"
    for name in ("linked", "../", "tiny"):
        with pytest.raises(InputError, match="there is no report"):
            report(here, name)
    with pytest.raises(InputError, match="choose up to 7"):
        curves(here, ["../secret"])


def test_scores_are_shown_with_their_records(studio_runs, tmp_path):
    """What `ddpm evaluate` prints, with the floor; a record with other fields is shown as far as possible."""
    here = tmp_path / "runs"
    shutil.copytree(studio_runs, here, symlinks=True)
    foreign = {"step": 3, "seconds": 1.0, "fid_label": "FID", "fid": 7, "floor": [], "kid": {"value": "?"}}
    append_line(here / "study" / "cells" / "one" / "scores.jsonl", foreign)
    assert scored_runs(here) == ["study/cells/one", "tiny"]
    (record,) = records(here, "tiny")
    step, count, label, value, interval, floor, _, _, sampler = score_row(record)
    assert (step, count, label, sampler) == ("12", "40", "FD-classifier", "ddim, 5 evaluations")
    assert (float(value), float(floor)) == pytest.approx((record["fid"]["value"], record["floor"]["fid"]), rel=1e-3)
    assert " to " in interval
    assert "95 % interval" in record_text(record)
    (other,) = records(here, "study/cells/one")
    assert score_row(other) == ["3", "", "", "", "", "", "", "", ""]
    assert "lacks fields" in record_text(other)
    fewer = record | {"inception_score": {"value": 7.5}, "floor": record["floor"] | {"num_images": 1360}}
    *_, floor, inception_score, _, _ = score_row(fewer)
    assert floor.endswith(" (n=1,360)")
    assert inception_score == "7.5 of 10 classes"
    with pytest.raises(InputError, match="there is no run"):
        records(here, "../outside")


def test_the_nearest_training_images_are_found_and_the_run_left_alone(studio_runs, tmp_path, monkeypatch):
    """By the command that is shown beside them, to the byte."""
    before = (studio_runs / "tiny" / "scores.jsonl").read_bytes()
    picture, text, command = nearest(studio_runs, "tiny", 20, 3, "cpu")
    with Image.open(picture) as opened:
        assert opened.width > 6 * opened.height, "sixteen above sixteen"
    assert "lie nearer to a training image" in text
    assert (studio_runs / "tiny" / "scores.jsonl").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert run_command(command.split()[1:]) == 0
    assert (studio_runs / "tiny" / "scores.jsonl").read_bytes() == before
    assert (tmp_path / "nearest.png").read_bytes() == Path(picture).read_bytes()
    for name in ("../outside", "away"):
        with pytest.raises(InputError, match="there is no model"):
            nearest(studio_runs, name, 20, 0, "cpu")


def test_a_picture_is_cut_scaled_and_noised():
    picture = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1)))
    image = fitted(picture, (3, 8, 8))
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])
    assert bool((image[0, 0].diff() > 0).all())
    pictures = [noised(uploaded(png(picture)), fraction) for fraction in (0.0, 0.37, 1.0)]
    assert [len(kinds) for kinds in pictures] == [2, 2, 2]
    assert len({kind.shape for kinds in pictures for kind in kinds}) == 1, "the picture does not jump while t moves"


def test_the_captions_of_the_six_chains_agree_with_their_formulas(monkeypatch):
    """t, alpha_bar and SNR of each, from linear betas computed here; and the state shown has that much of the image."""
    seen = []

    def recorded(states, *, title, captions, **rest):
        seen.append((states, title, captions[0][1][0]))
        return image_table(states, title=title, captions=captions, **rest)

    monkeypatch.setattr("ddpm_lab.studio.forward.image_table", recorded)
    noised(Image.new("L", (28, 28), 255), 0.4)
    assert len(seen) == 6
    for (states, title, caption), (T, fixed) in zip(
        seen, [(T, f) for f in (0, 1) for T in (500, 1000, 2000)], strict=True
    ):
        low, high = (1e-4, 0.02) if fixed else (0.1 / T, 20 / T)
        t = round(0.4 * T)
        alpha_bar = np.prod(1 - np.linspace(low, high, T)[:t])
        caption_match = re.fullmatch(r"t = (\d+) +alpha_bar (\S+) +SNR (\S+)", caption)
        assert title.startswith(f"T = {T}, linear, {'fixed range' if fixed else 'rescaled'}")
        assert int(caption_match[1]) == t
        assert float(caption_match[2]) == pytest.approx(alpha_bar, rel=0.05)
        assert float(caption_match[3]) == pytest.approx(alpha_bar / (1 - alpha_bar), rel=0.05)
        share_white = float((states == 255).double().mean())  # of N(sqrt(alpha_bar), 1 - alpha_bar): what is cut at 1
        expected = 0.5 * math.erfc((1 - alpha_bar**0.5) / (2 * (1 - alpha_bar)) ** 0.5)
        assert share_white == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", png(Image.new("L", (9, 9)))[:40], b"\x89PNG\r\n\x1a\n" + bytes(50)]
)
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(InputError, match="this picture cannot be read"):
        uploaded(content)


def test_sixteen_bits_and_transparency_are_seen_as_they_are():
    grey = uploaded(png(Image.fromarray(np.full((9, 9), 30000, np.uint16))))
    assert set(np.asarray(grey).ravel().tolist()) == {117}, "30000 of 65535"
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[:, :32, 3] = 255  # black on the left, nothing on the right
    seen = np.asarray(uploaded(png(Image.fromarray(ink))).convert("L"))
    assert (int(seen[30, 10]), int(seen[30, 60])) == (0, 255)


def test_an_index_without_an_image_is_refused():
    with pytest.raises(InputError, match="test images 0 to 359, not 360"):
        dataset_image("digits", 360)


def test_a_picture_that_is_too_large_is_refused():
    with pytest.raises(InputError, match="30,000,000 are the most"):
        uploaded(png(Image.new("1", (6000, 6000))))


def test_a_drawing_becomes_a_light_digit_in_the_middle():
    sheet = np.full((280, 280, 4), 255, np.uint8)
    sheet[20:120, 30:50, :3] = 0
    digit = np.asarray(drawn({"composite": sheet}))
    assert digit.shape == (28, 28)
    rows, columns = np.nonzero(digit > 128)
    assert (rows.min(), rows.max()) == (4, 23)
    assert abs(columns.mean() - 13.5) < 1
    for nothing in (None, {"composite": None}, {"composite": np.full((280, 280, 4), 255, np.uint8)}):
        with pytest.raises(InputError, match="the drawing is empty"):
            drawn(nothing)


@pytest.mark.parametrize(
    ("port", "words"),
    [("0", "from 1 to 65535"), ("70000", "from 1 to 65535"), ("TAKEN", "is not available (Address already")],
)
def test_a_port_that_cannot_be_is_refused(tmp_path, capsys, port, words):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        number = str(held.getsockname()[1]) if port == "TAKEN" else port
        assert run_command(["studio", "--runs", str(tmp_path), "--port", number]) == 2
    assert words in capsys.readouterr().err

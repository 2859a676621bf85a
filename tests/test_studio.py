"""The studio as a person uses it, in a headless browser; what it opens and what it does not."""

import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from ddpm_lab.cli import run_command
from ddpm_lab.drawing import image_table
from ddpm_lab.log import append_line
from ddpm_lab.settings import InputError
from ddpm_lab.studio.forward import chosen, drawn, fitted, noised, uploaded
from ddpm_lab.studio.runs import curves, grid_at, grid_steps, report, report_names, run_table
from ddpm_lab.studio.scores import nearest, records, scored_runs, table, told
from ddpm_lab.studio.sources import model_names, open_model

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """A folder of runs: a sound one, a damaged one, one below, and a link that leads away."""
    folder = tmp_path_factory.mktemp("studio") / "runs"
    shutil.copytree(tiny_run, folder / "tiny")
    scoring = ["--features", "classifier", "--metrics", "fid", "is", "kid", "--num-images", "40", "--num-steps", "5"]
    assert run_command(["evaluate", str(folder / "tiny"), *scoring, "--device", "cpu"]) == 0
    shutil.copytree(tiny_run, folder / "study" / "cells" / "one")
    shutil.copytree(tiny_run, folder / "broken")
    (folder / "broken" / "checkpoints" / "step_00000012" / "ema.safetensors").write_bytes(b"nothing")
    shutil.copytree(tiny_run, folder.parent / "outside")
    (folder / "away").symlink_to(folder.parent / "outside")
    (folder / "notes.txt").write_text("no run")
    (folder / "tiny" / "samples" / "step_0000 (1).png").write_bytes(b"a copy somebody made")
    (folder / "broken" / "scores.jsonl").mkdir()
    return folder


def test_models_are_those_below_the_folder(runs):
    assert model_names(runs) == ["mnist", "broken", "study/cells/one", "tiny"]
    assert open_model(runs, "tiny", "cpu").step == 12
    for name in ("../outside", "away", "/etc", "", "tiny/../../outside", str(runs / "tiny"), "notes.txt"):
        with pytest.raises(InputError, match="there is no model"):
            open_model(runs, name, "cpu")
    with pytest.raises(InputError, match="damaged"):
        open_model(runs, "broken", "cpu")


def test_a_run_called_like_packaged_weights_is_not_taken_for_them(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "mnist")
    assert model_names(tmp_path) == ["mnist", "./mnist"]
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


def test_runs_are_told_with_what_is_wrong(runs, tmp_path):
    """Their table, curves, grids of one step and reports; nothing outside, and a broken one harms no other."""
    here = tmp_path / "runs"
    shutil.copytree(runs, here, symlinks=True)
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


def test_scores_are_told_with_the_record_behind_them(runs, tmp_path):
    """What `ddpm evaluate` tells, with the floor; of a record of another make no more than that."""
    here = tmp_path / "runs"
    shutil.copytree(runs, here, symlinks=True)
    foreign = {"step": 3, "seconds": 1.0, "fid_label": "FID", "fid": 7, "floor": [], "kid": {"value": "?"}}
    append_line(here / "study" / "cells" / "one" / "scores.jsonl", foreign)
    assert scored_runs(here) == ["study/cells/one", "tiny"]
    (record,) = records(here, "tiny")
    ((step, count, label, value, interval, floor, _, _, sampler),) = table([record])
    assert (step, count, label, sampler) == ("12", "40", "FD-classifier", "ddim, 5 evaluations")
    assert (float(value), float(floor)) == pytest.approx((record["fid"]["value"], record["floor"]["fid"]), rel=1e-3)
    assert " to " in interval
    assert "95 % interval" in told(record)
    (other,) = records(here, "study/cells/one")
    assert table([other]) == [["3", "", "", "", "", "", "", "", ""]]
    assert "lacks what" in told(other)
    with pytest.raises(InputError, match="there is no run"):
        records(here, "../outside")


def test_the_nearest_training_images_are_found_and_the_run_left_alone(runs, tmp_path, monkeypatch):
    """By the command that is shown beside them, to the byte."""
    before = (runs / "tiny" / "scores.jsonl").read_bytes()
    picture, text, command = nearest(runs, "tiny", 20, 3, "cpu")
    with Image.open(picture) as opened:
        assert opened.width > 6 * opened.height, "sixteen above sixteen"
    assert "lie nearer to a training image" in text
    assert (runs / "tiny" / "scores.jsonl").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert run_command(command.split()[1:]) == 0
    assert (runs / "tiny" / "scores.jsonl").read_bytes() == before
    assert (tmp_path / "nearest.png").read_bytes() == Path(picture).read_bytes()
    for name in ("../outside", "away"):
        with pytest.raises(InputError, match="there is no model"):
            nearest(runs, name, 20, 0, "cpu")


def test_a_picture_is_cut_scaled_and_noised():
    picture = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1)))
    image = fitted(picture, (3, 8, 8))
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])
    assert bool((image[0, 0].diff() > 0).all())
    pictures = [noised(uploaded(png(picture)), fraction) for fraction in (0.0, 0.37, 1.0)]
    assert [len(kinds) for kinds in pictures] == [2, 2, 2]
    assert len({kind.shape for kinds in pictures for kind in kinds}) == 1, "the picture does not jump while t moves"


def test_the_six_chains_are_told_as_their_formulas_say(monkeypatch):
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
        told_of = re.fullmatch(r"t = (\d+) +alpha_bar (\S+) +SNR (\S+)", caption)
        assert title.startswith(f"T = {T}, linear, {'fixed range' if fixed else 'rescaled'}")
        assert int(told_of[1]) == t
        assert float(told_of[2]) == pytest.approx(alpha_bar, rel=0.05)
        assert float(told_of[3]) == pytest.approx(alpha_bar / (1 - alpha_bar), rel=0.05)
        share_white = float((states == 255).double().mean())  # of N(sqrt(alpha_bar), 1 - alpha_bar): what is cut at 1
        expected = 0.5 * math.erfc((1 - alpha_bar**0.5) / (2 * (1 - alpha_bar)) ** 0.5)
        assert share_white == pytest.approx(expected, abs=0.06)


def png(picture):
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", png(Image.new("L", (9, 9)))[:40], b"\x89PNG\r\n\x1a\n" + bytes(50)]
)
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(InputError, match="no picture that can be read"):
        uploaded(content)


def test_sixteen_bits_and_transparency_are_seen_as_they_are():
    grey = uploaded(png(Image.fromarray(np.full((9, 9), 30000, np.uint16))))
    assert set(np.asarray(grey).ravel().tolist()) == {116}, "30000 of 65535"
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[:, :32, 3] = 255  # black on the left, nothing on the right
    seen = np.asarray(uploaded(png(Image.fromarray(ink))).convert("L"))
    assert (int(seen[30, 10]), int(seen[30, 60])) == (0, 255)


def test_a_number_that_there_is_no_image_of_is_refused():
    with pytest.raises(InputError, match="test images 0 to 359, not 360"):
        chosen("digits", 360)


def test_a_picture_that_is_too_large_is_refused():
    with pytest.raises(InputError, match="30,000,000 are the most"):
        uploaded(png(Image.new("1", (6000, 6000))))


def test_a_drawing_becomes_a_light_digit_in_the_middle():
    sheet = np.full((280, 280, 4), 255, np.uint8)
    sheet[20:120, 30:50, :3] = 0
    found = np.asarray(drawn({"composite": sheet}))
    assert found.shape == (28, 28)
    rows, columns = np.nonzero(found > 128)
    assert (rows.min(), rows.max()) == (4, 23)
    assert abs(columns.mean() - 13.5) < 1
    for nothing in (None, {"composite": None}, {"composite": np.full((280, 280, 4), 255, np.uint8)}):
        with pytest.raises(InputError, match="nothing is drawn"):
            drawn(nothing)


@pytest.mark.parametrize(
    ("port", "words"),
    [("0", "from 1 to 65535"), ("70000", "from 1 to 65535"), ("TAKEN", "cannot be had (Address already")],
)
def test_a_port_that_cannot_be_is_refused(tmp_path, capsys, port, words):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        number = str(held.getsockname()[1]) if port == "TAKEN" else port
        assert run_command(["studio", "--runs", str(tmp_path), "--port", number]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(runs, tmp_path_factory):
    """Its address, and the process of the command that serves it; when it ends, nothing is left of what it wrote."""
    scratch = tmp_path_factory.mktemp("scratch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ddpm_lab", "studio", "--runs", str(runs), "--port", str(port), "--device", "cpu"]
    serving = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"TMPDIR": str(scratch)}
    )
    assert serving.stdout.readline().startswith(f"http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}", serving
    serving.send_signal(signal.SIGINT)
    said = serving.communicate(timeout=30)[0]
    assert serving.returncode == 130, said
    assert [path.name for path in scratch.iterdir()] == []
    assert "ddpm_lab" not in said, (
        "nothing of ours failed; the server itself complains of browsers that close in the midst"
    )


@pytest.fixture(scope="module")
def studio(served):
    return served[0]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, studio):
    """A visitor's page; it may ask nothing of any other machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, elsewhere = context.new_page(), []
    opened.on(
        "request", lambda r: elsewhere.append(r.url) if r.url.startswith("http") and studio not in r.url else None
    )
    opened.goto(studio)
    opened.wait_for_selector("#generate")
    yield opened
    assert elsewhere == []
    context.close()


def post_file(studio, name, content):
    """Upload a file under a name that no browser would give it; where the server keeps it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    request = urllib.request.Request(
        f"{studio}/gradio_api/upload", head.encode() + content + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)[0]


def choose(page, where, option):
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def fill(page, where, value):
    page.locator(f"{where} input").first.fill(str(value))
    page.locator(f"{where} input").first.press("Tab")


def seconds_used(process):
    """Of the processors, by a process and its threads; None where that cannot be read."""
    path = Path(f"/proc/{process.pid}/stat")
    if not path.is_file():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def source(page, where):
    return page.locator(f"{where} img").first.get_attribute("src")


@pytest.mark.slow
def test_images_are_made_looked_back_at_and_repeated(page, studio, runs, tmp_path):
    """The picture that is offered is the one that the command line shown makes, byte for byte."""
    choose(page, "#model", "tiny")
    fill(page, "#steps", 7)
    fill(page, "#seed", 3)
    page.click("#generate")
    page.wait_for_selector("#command .cm-content", timeout=60_000)
    assert "16 images by 7 evaluations each" in page.inner_text("#told")
    command = page.inner_text("#command .cm-content").split()
    assert command[:3] == ["ddpm", "sample", str(runs / "tiny")]
    last = source(page, "#x_t")
    page.locator("#back input[type=number]").fill("0")
    page.locator("#back input[type=number]").press("Tab")
    page.wait_for_function("before => document.querySelector('#x_t img').src !== before", arg=last, timeout=60_000)
    with page.expect_download() as download:
        page.locator("#downloads a").first.click()
    download.value.save_as(tmp_path / "offered.png")
    command[command.index("--out") + 1] = str(tmp_path / "made.png")
    assert run_command(command[1:]) == 0
    assert (tmp_path / "offered.png").read_bytes() == (tmp_path / "made.png").read_bytes()
    page.click("#films")
    page.wait_for_function("() => document.querySelectorAll('#downloads a').length >= 3", timeout=60_000)


@pytest.mark.slow
def test_sampling_is_seen_and_stopped(page, served):
    """A long sampling shows pictures at once and changes them; stopped it stops, here and there; the next one works."""
    choose(page, "#sampler", "ddpm")
    fill(page, "#steps", 1000)
    page.click("#generate")
    page.wait_for_selector("#x_t img", timeout=60_000)
    first = source(page, "#x_t")
    page.wait_for_function("before => document.querySelector('#x_t img').src !== before", arg=first, timeout=60_000)
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('#told').innerText.includes('stopped')", timeout=60_000)
    time.sleep(1)
    held, used = source(page, "#x_t"), seconds_used(served[1])
    time.sleep(2)
    assert source(page, "#x_t") == held
    if used is not None:
        assert seconds_used(served[1]) - used < 0.5, "the server goes on sampling"
    fill(page, "#steps", 3)
    page.click("#generate")
    page.wait_for_function(
        "() => document.querySelector('#told').innerText.includes('by 3 evaluations')", timeout=60_000
    )


@pytest.mark.slow
def test_two_visitors_do_not_disturb_each_other(browser, studio):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for seed, page in enumerate(pages):
        page.goto(studio)
        page.wait_for_selector("#generate")
        choose(page, "#model", "tiny")
        fill(page, "#seed", seed)
        fill(page, "#steps", 5 + seed)
    for page in pages:
        page.click("#generate")
    for seed, page in enumerate(pages):
        page.wait_for_selector("#command .cm-content", timeout=60_000)
        assert f"by {5 + seed} evaluations" in page.inner_text("#told")
        assert f"--seed {seed} " in page.inner_text("#command .cm-content")
    ends = [page.evaluate("async () => (await (await fetch(document.querySelector('#x_t img').src)).blob()).size")
            for page in pages]  # fmt: skip
    for steps, page in zip((5, 6), pages, strict=True):  # each goes back through what is its own
        last = source(page, "#x_t")
        assert page.locator("#back input[type=number]").input_value() == str(steps)
        page.locator("#back input[type=number]").fill("0")
        page.locator("#back input[type=number]").press("Tab")
        page.wait_for_function("before => document.querySelector('#x_t img').src !== before", arg=last, timeout=60_000)
        assert page.inner_text("#told") == "t = 1000"
        page.context.close()
    assert len(set(ends)) == 2, "other seeds are other pictures"


@pytest.mark.slow
def test_faults_are_told_and_harm_nothing(page):
    """A damaged run, and more steps than there are timesteps: a line each, and the page goes on."""
    choose(page, "#model", "broken")
    page.click("#generate")
    page.get_by_text("is damaged").first.wait_for(timeout=60_000)
    choose(page, "#model", "tiny")
    fill(page, "#steps", 5000)
    page.click("#generate")
    page.get_by_text("num_steps must be from 1 to the 1000").first.wait_for(timeout=60_000)
    page.locator("#steps input").first.fill("")
    page.click("#generate")
    page.get_by_text("steps is empty").first.wait_for(timeout=60_000)
    fill(page, "#steps", 2)
    page.click("#generate")
    page.wait_for_selector("#command .cm-content", timeout=60_000)


def clear_upload(page):
    page.locator("#upload button[aria-label=Clear]").click()
    page.wait_for_function("() => !document.querySelector('#upload button[aria-label=Clear]')")
    page.locator("#upload input[type=file]").wait_for(state="attached")
    time.sleep(1)  # until it listens


@pytest.mark.slow
def test_the_forward_tab(page, tmp_path):
    """A picture is there at once; it changes with t, with an upload and a drawing; a model denoises it."""
    page.get_by_role("tab", name="Forward").click()
    page.wait_for_selector("#chains img", timeout=60_000)

    def changes(act):
        before = source(page, "#chains")
        act()
        page.wait_for_function("b => document.querySelector('#chains img').src !== b", arg=before, timeout=60_000)

    choose(page, "#dataset", "digits")
    changes(lambda: fill(page, "#index", 5))
    changes(lambda: fill(page, "#fraction", 0.8))
    page.get_by_role("tab", name="Upload").click()
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (50, 30), (250, 100, 0)).save(good)
    bad.write_bytes(b"\x89PNG no")
    changes(lambda: page.locator("#upload input[type=file]").set_input_files(good))
    clear_upload(page)
    page.locator("#upload input[type=file]").set_input_files(bad)
    page.get_by_text("no picture that can be read").first.wait_for(timeout=60_000)
    clear_upload(page)
    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(11 * 2**20))
    page.locator("#upload input[type=file]").set_input_files(huge)
    page.get_by_text("exceed").first.wait_for(timeout=60_000)
    page.get_by_role("tab", name="Draw").click()
    page.click("#use-drawing")
    page.get_by_text("nothing is drawn yet").first.wait_for(timeout=60_000)
    page.locator("#sketch button[aria-label=Brush]").click()
    box = page.locator("#sketch canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 90)
    page.mouse.down()
    page.mouse.move(middle, box["y"] + 250, steps=8)
    page.mouse.up()
    time.sleep(1)
    changes(lambda: page.click("#use-drawing"))
    choose(page, "#denoiser", "tiny")
    page.click("#denoise")
    page.wait_for_selector("#denoised img", timeout=60_000)
    assert "of 1000 by tiny" in page.inner_text("#forward-told")


@pytest.mark.slow
def test_the_runs_tab(page, runs):
    """Table and curves are there; grids change with their step; a run that trains shows its new line by itself."""
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#curves img", timeout=60_000)
    page.wait_for_selector("#left-grid img", timeout=60_000)
    assert "step 12" in page.inner_text("#grid-told")
    before = source(page, "#left-grid")
    page.locator("#place input[type=number]").fill("0")
    page.locator("#place input[type=number]").press("Tab")
    page.wait_for_function("b => document.querySelector('#left-grid img').src !== b", arg=before, timeout=60_000)
    assert "step 6" in page.inner_text("#grid-told")
    log = runs / "study" / "cells" / "one" / "log.jsonl"
    line = log.read_text().splitlines()[-1].replace('"step": 12', '"step": 4321')
    with log.open("a") as stream:
        stream.write(line + "\n")
    page.wait_for_function("() => document.querySelector('#runs').innerText.includes('4,321 of 12')", timeout=60_000)
    shutil.copytree(runs / "tiny", runs / "later")  # begun while somebody looks
    try:
        page.wait_for_function("() => document.querySelector('#runs').innerText.includes('later')", timeout=60_000)
        choose(page, "#left", "later")
        page.get_by_role("tab", name="Generate").click()
        page.wait_for_timeout(1000)
        choose(page, "#model", "later")
        page.locator("#steps input").first.fill("2")
        page.click("#generate")
        page.wait_for_selector("#command .cm-content", timeout=60_000)
        assert str(runs / "later") in page.inner_text("#command .cm-content")
    finally:
        shutil.rmtree(runs / "later")


@pytest.mark.slow
def test_the_scores_tab(page):
    """The newest record of the run is told; a search shows pairs and the command that repeats it."""
    page.get_by_role("tab", name="Scores").click()
    page.wait_for_function(
        "() => document.querySelector('#record-told').innerText.includes('95 % interval')", timeout=60_000
    )
    assert "ddim, 5 evaluations" in page.inner_text("#scores")
    choose(page, "#nearest-of", "tiny")
    page.click("#find")
    page.wait_for_selector("#pairs img", timeout=120_000)
    assert "lie nearer to a training image" in page.inner_text("#nearest-told")
    choose(page, "#nearest-of", "broken")
    page.click("#find")
    page.get_by_text("is damaged").first.wait_for(timeout=60_000)


@pytest.mark.slow
def test_nothing_else_can_be_read_and_nobody_else_can_ask(studio, runs):
    for path in ("/etc/hostname", str(runs / "tiny" / "config.json"), f"{runs}/../outside/config.json"):
        request = urllib.request.Request(f"{studio}/gradio_api/file={path}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        with refused.value as answer:
            assert answer.code in (403, 404)
    stranger = urllib.request.Request(studio, headers={"Host": "elsewhere.example"})  # a name led to this machine
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(stranger, timeout=20)
    with refused.value as answer:
        assert answer.code == 400
    kept = post_file(studio, "../../../escaped.png", png(Image.new("L", (9, 9))))
    assert Path(kept).name == "escaped.png"
    assert ".." not in kept, "a path in a file's name leads nowhere"
    assert not (runs.parent / "escaped.png").exists()
    port = int(studio.rpartition(":")[2])
    if os.name == "posix" and sys.platform == "linux":
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))

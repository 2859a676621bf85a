"""The studio as a person uses it, in a headless browser; what it does not give away."""

import json
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

import pytest
from PIL import Image

pytest.importorskip("gradio")

from ddpm_lab.cli.main import run_command
from tests.conftest import png

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def served(studio_runs, tmp_path_factory):
    """Its address, and the process of the command that serves it; when it ends, nothing is left of what it wrote."""
    scratch = tmp_path_factory.mktemp("scratch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "ddpm_lab",
        "studio",
        "--runs",
        str(studio_runs),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    serving = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"TMPDIR": str(scratch), "ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "[::1]:x,*.foo,,"},
    )  # fmt: skip
    assert serving.stdout.readline().startswith(f"http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}", serving
    serving.send_signal(signal.SIGINT)
    output = serving.communicate(timeout=30)[0]
    assert serving.returncode == 130, output
    assert [path.name for path in scratch.iterdir()] == []
    # The server itself complains of browsers that close in the midst, and SameOrigin.__call__ is on its way to all.
    ours = [
        line for line in output.splitlines() if "ddpm_lab" in line and not re.search(r"page.py.* in __call__$", line)
    ]
    assert ours == [], output


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


def choose(page, control, option):
    page.locator(f"{control} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def fill(page, control, value):
    page.locator(f"{control} input").first.fill(str(value))
    page.locator(f"{control} input").first.press("Tab")


def seconds_used(process):
    """Of the processors, by a process and its threads; None where that cannot be read."""
    path = Path(f"/proc/{process.pid}/stat")
    if not path.is_file():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def source(page, picture):
    return page.locator(f"{picture} img").first.get_attribute("src")


@pytest.mark.slow
def test_classes_can_be_asked_for_of_the_model_that_comes_first(page):
    """The packaged network is conditional, unlike the run chosen then."""
    page.wait_for_selector("#class", state="visible")
    choose(page, "#class", "7")
    choose(page, "#model", "tiny")
    page.wait_for_selector("#class", state="hidden")


@pytest.mark.slow
def test_images_are_made_looked_back_at_and_repeated(page, studio, studio_runs, tmp_path):
    """The picture that is offered is the one that the command line shown makes, byte for byte."""
    choose(page, "#model", "tiny")
    fill(page, "#steps", 7)
    fill(page, "#seed", 3)
    page.click("#generate")
    page.wait_for_selector("#command .cm-content", timeout=60_000)
    assert "16 images by 7 evaluations each" in page.inner_text("#status")
    command = page.inner_text("#command .cm-content").split()
    assert command[:3] == ["ddpm", "sample", str(studio_runs / "tiny")]
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
def test_a_guide_can_be_chosen(page, studio_runs):
    """An early average of the run itself, with a guidance; the command line that is shown says both."""
    choose(page, "#model", "tiny")
    choose(page, "#guide", "tiny/averages/step_00000003")
    page.locator("#guidance input[type=number]").fill("2")
    page.locator("#guidance input[type=number]").press("Tab")
    fill(page, "#steps", 7)
    page.click("#generate")
    page.wait_for_selector("#command .cm-content", timeout=60_000)
    assert "16 images by 14 evaluations each" in page.inner_text("#status")
    words = page.inner_text("#command .cm-content")
    assert f"--guidance 2.0 --guide {studio_runs / 'tiny' / 'averages' / 'step_00000003'}" in " ".join(words.split())


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
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('stopped')", timeout=60_000)
    time.sleep(1)
    held, used = source(page, "#x_t"), seconds_used(served[1])
    time.sleep(2)
    assert source(page, "#x_t") == held
    if used is not None:
        assert seconds_used(served[1]) - used < 0.5, "the server goes on sampling"
    fill(page, "#steps", 3)
    page.click("#generate")
    page.wait_for_function(
        "() => document.querySelector('#status').innerText.includes('by 3 evaluations')", timeout=60_000
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
        assert f"by {5 + seed} evaluations" in page.inner_text("#status")
        assert f"--seed {seed} " in page.inner_text("#command .cm-content")
    ends = [page.evaluate("async () => (await (await fetch(document.querySelector('#x_t img').src)).blob()).size")
            for page in pages]  # fmt: skip
    for steps, page in zip((5, 6), pages, strict=True):  # each goes back through what is its own
        last = source(page, "#x_t")
        assert page.locator("#back input[type=number]").input_value() == str(steps)
        page.locator("#back input[type=number]").fill("0")
        page.locator("#back input[type=number]").press("Tab")
        page.wait_for_function("before => document.querySelector('#x_t img').src !== before", arg=last, timeout=60_000)
        assert page.inner_text("#status") == "t = 1000"
        page.context.close()
    assert len(set(ends)) == 2, "other seeds are other pictures"


@pytest.mark.slow
def test_errors_are_shown_and_harm_nothing(page):
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
    page.get_by_text("this picture cannot be read").first.wait_for(timeout=60_000)
    clear_upload(page)
    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(11 * 2**20))
    page.locator("#upload input[type=file]").set_input_files(huge)
    page.get_by_text("exceed").first.wait_for(timeout=60_000)
    page.get_by_role("tab", name="Draw").click()
    page.click("#use-drawing")
    page.get_by_text("the drawing is empty").first.wait_for(timeout=60_000)
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
    assert "of 1000 by tiny" in page.inner_text("#forward-status")


@pytest.mark.slow
def test_the_runs_tab(page, studio_runs):
    """Table and curves are there; grids change with their step; a run that trains shows its new line by itself."""
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#curves img", timeout=60_000)
    page.wait_for_selector("#left-grid img", timeout=60_000)
    assert "step 12" in page.inner_text("#grid-step")
    before = source(page, "#left-grid")
    page.locator("#place input[type=number]").fill("0")
    page.locator("#place input[type=number]").press("Tab")
    page.wait_for_function("b => document.querySelector('#left-grid img').src !== b", arg=before, timeout=60_000)
    assert "step 6" in page.inner_text("#grid-step")
    log = studio_runs / "study" / "cells" / "one" / "log.jsonl"
    line = log.read_text().splitlines()[-1].replace('"step": 12', '"step": 4321')
    with log.open("a") as stream:
        stream.write(line + "\n")
    page.wait_for_function("() => document.querySelector('#runs')?.innerText.includes('4,321 of 12')", timeout=60_000)
    shutil.copytree(studio_runs / "tiny", studio_runs / "later")  # begun while somebody looks
    try:
        page.wait_for_function("() => document.querySelector('#runs')?.innerText.includes('later')", timeout=60_000)
        choose(page, "#left", "later")
        page.get_by_role("tab", name="Generate").click()
        page.wait_for_timeout(1000)
        choose(page, "#model", "later")
        page.locator("#steps input").first.fill("2")
        page.click("#generate")
        page.wait_for_selector("#command .cm-content", timeout=60_000)
        assert str(studio_runs / "later") in page.inner_text("#command .cm-content")
    finally:
        shutil.rmtree(studio_runs / "later")


@pytest.mark.slow
def test_the_scores_tab(page):
    """The newest record of the run is shown; a search shows pairs and the command that repeats it."""
    page.get_by_role("tab", name="Scores").click()
    page.wait_for_function(
        "() => document.querySelector('#record-text')?.innerText.includes('95 % interval')", timeout=60_000
    )
    assert "ddim, 5 evaluations" in page.inner_text("#scores")
    choose(page, "#nearest-of", "tiny")
    page.click("#find")
    page.wait_for_selector("#pairs img", timeout=120_000)
    assert "lie nearer to a training image" in page.inner_text("#nearest-text")
    choose(page, "#nearest-of", "broken")
    page.click("#find")
    page.get_by_text("is damaged").first.wait_for(timeout=60_000)


@pytest.mark.slow
def test_nothing_else_can_be_read_and_nobody_else_can_ask(studio, studio_runs):
    for path in ("/etc/hostname", str(studio_runs / "tiny" / "config.json"), f"{studio_runs}/../outside/config.json"):
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
    for origin in ("http://elsewhere.example", "null", studio.replace("127.0.0.1", "127.0.0.1.example")):
        request = urllib.request.Request(f"{studio}/gradio_api/upload", b"x", {"Origin": origin})
        with pytest.raises(urllib.error.HTTPError) as refused:  # any page may have a browser post here
            urllib.request.urlopen(request, timeout=20)
        with refused.value as answer:
            assert answer.code == 403
    kept = post_file(studio, "../../../escaped.png", png(Image.new("L", (9, 9))))
    assert Path(kept).name == "escaped.png"
    assert ".." not in kept, "a path in a file's name leads nowhere"
    assert not (studio_runs.parent / "escaped.png").exists()
    port = int(studio.rpartition(":")[2])
    if os.name == "posix" and sys.platform == "linux":
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))

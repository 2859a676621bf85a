"""The tab of runs: how far each has come, curves side by side, sample grids of the same seeds by step, reports."""

import dataclasses
import html
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import LOG, SCORES
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.trained import read_run_record
from ddpm_lab.pictures.curves import RunLog, read_runs, training_figure
from ddpm_lab.pictures.drawing import Picture, rendered
from ddpm_lab.studio.sources import entries_of, inside, run_folders, show_errors

COLUMNS = ("run", "steps", "loss", "T", "betas", "predicts", "last score, or what is wrong")
MOST_CURVES = 7  # as many as there are colours
REPORT = '<iframe title="report" sandbox="allow-scripts" style="width:100%;height:80vh;border:0" srcdoc="{}"></iframe>'
# What comes first in it: it may ask nothing of any machine, and its links to its own parts stay in it.
POLICY = "default-src 'none'; img-src data:; media-src data:; font-src data:; " + (
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
ALONE = f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{POLICY}"><base href="about:srcdoc">'
GRID = re.compile(r"step_(\d{8})\.png")


def run_names(runs: Path) -> list[str]:
    """Runs below the folder, by their path there; folders of diffusers have no log and are left out."""
    return [
        str(path.relative_to(runs))
        for path in run_folders(runs)
        if (path / "config.json").is_file() and not is_diffusers(path)
    ]


def run_table(runs: Path) -> list[list[str]]:
    """A row for each run, with `COLUMNS`; of a broken one what is wrong with it."""
    return [_row(runs, name) for name in run_names(runs)]


def _row(runs: Path, name: str) -> list[str]:
    path = runs / name
    try:
        _, config, _ = read_run_record(path / "config.json")
        steps = checkpoint_steps(path)
    except (InputError, OSError) as error:
        return [name, "broken", "", "", "", "", str(error)]
    lines = entries_of(runs, path / LOG)
    scores = [line for line in entries_of(runs, path / SCORES) if isinstance(line.get("fid"), dict)]
    step = max([line["step"] for line in lines[-1:]] + steps[-1:], default=0)
    loss = lines[-1].get("loss") if lines else None
    fid = scores[-1]["fid"].get("value") if scores else None
    return [
        name,
        f"{step:,} of {config.training.num_steps:,}",
        f"{loss:.4f}" if isinstance(loss, float) else "",
        str(config.diffusion.num_timesteps),
        config.diffusion.beta_convention,
        config.diffusion.prediction,
        f"{scores[-1].get('fid_label')} {fid:.3g} at {scores[-1]['step']:,}" if isinstance(fid, float) else "",
    ]


def curves(runs: Path, names: list[str]) -> Picture | None:
    """Curves of training and scores of some runs; None where there is nothing to draw.

    Raises:
        InputError: more runs than there are colours, or one that is not there.
    """
    known = set(run_names(runs))
    if len(names) > MOST_CURVES or not set(names) <= known:
        raise InputError(f"choose up to {MOST_CURVES} of the runs that are here")
    drawn: list[RunLog] = []
    for name in names:
        if not inside(runs, runs / name / LOG):
            continue
        try:
            drawn += [dataclasses.replace(log, name=name) for log in read_runs([runs / name])]
        except (InputError, OSError):
            continue  # which has no line yet, or none that can be read
    return rendered(training_figure(drawn)) if drawn else None


def grid_steps(runs: Path, names: list[str]) -> list[int]:
    """The steps at which all of some runs have a sample grid, ascending."""
    found = [
        {int(known[1]) for path in (runs / name / "samples").glob("*.png") if (known := GRID.fullmatch(path.name))}
        for name in names
    ]
    return sorted(set.intersection(*found)) if found else []


def grid_at(runs: Path, name: str, step: int) -> Picture | None:
    """A run's sample grid; None where there is none, or it is damaged."""
    path = runs / name / "samples" / f"step_{step:08d}.png"
    if name not in run_names(runs) or not inside(runs, path):
        return None
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError):
        return None


def report_names(runs: Path) -> list[str]:
    """Studies and runs below the folder that have a report."""
    return sorted(
        str(path.parent.relative_to(runs))
        for path in runs.glob("**/report.html")
        if path.is_file() and inside(runs, path)
    )


def report(runs: Path, name: str) -> str:
    """A report as a frame that can reach nothing of this page.

    Raises:
        InputError: there is none of that name.
    """
    if name not in report_names(runs):
        raise InputError(f"there is no report {name!r} here")
    return REPORT.format(html.escape(ALONE + (runs / name / "report.html").read_text("utf-8", errors="replace")))


def _stamp(runs: Path) -> list[tuple[str, int, int]]:
    """What changes when anything that the tab shows does."""
    found = []
    for folder in (*run_folders(runs), *(runs / name for name in report_names(runs))):
        for name in ("report.html", LOG, SCORES, "config.json", "samples", "checkpoints"):
            with suppress(OSError):
                held = (folder / name).stat()
                found.append((str(folder / name), held.st_mtime_ns, held.st_size))
    return found


def runs_tab(page: gr.Blocks, tab: gr.Tab, timer: gr.Timer, runs: Path) -> None:
    """Lay out the tab and say what its controls do; at each tick of the timer it looks at the disk."""
    names, reports = run_names(runs), report_names(runs)
    first = next((name for name in names if grid_steps(runs, [name])), None)  # whose grids are shown
    second = next((name for name in reversed(names) if first and grid_steps(runs, [first, name])), None)
    logged = [name for name in names if (runs / name / LOG).is_file()]
    table = gr.Dataframe(
        run_table(runs), headers=list(COLUMNS), interactive=False, wrap=True, elem_id="runs", label="Runs"
    )
    with gr.Accordion("Curves", open=True):
        drawn = gr.Dropdown(
            names, value=logged[:3], multiselect=True, max_choices=MOST_CURVES, label="Runs", elem_id="curves-of"
        )
        figure = gr.Image(show_label=False, interactive=False, format="png", elem_id="curves", buttons=["fullscreen"],
                          alt_text="loss, loss by timestep, speed and scores of the runs chosen")  # fmt: skip
    with gr.Accordion("Samples of the same seeds", open=True):
        with gr.Row():
            left = gr.Dropdown(names, value=first, label="Left", elem_id="left")
            right = gr.Dropdown(names, value=second, label="Right", elem_id="right")
        place = gr.Slider(0, 1, value=1, step=0.01, label="From the first grid to the last", elem_id="place")
        told = gr.Markdown("", elem_id="grid-told")
        with gr.Row():
            grids = [
                gr.Image(show_label=False, interactive=False, format="png", elem_id=f"{side}-grid",
                         elem_classes="pixels", buttons=["fullscreen"], alt_text=f"samples of the run at the {side}")
                for side in ("left", "right")
            ]  # fmt: skip
    with gr.Accordion("Reports", open=False):
        chosen = gr.Dropdown(reports, value=None, label="Report", elem_id="report-of")
        shown = gr.HTML("", elem_id="report")

    seen = gr.State(None)

    @show_errors
    def draw(wanted: list[str] | None) -> Any:
        return curves(runs, wanted or [])

    def look(one: str | None, other: str | None, at: float) -> Any:
        pair = [name for name in (one, other) if name in run_names(runs)]
        steps = grid_steps(runs, pair)
        if len(pair) < 2 or not steps:
            return "these runs have no sample grid of one step", None, None
        step = steps[round(at * (len(steps) - 1))]
        return f"step {step:,}", grid_at(runs, pair[0], step), grid_at(runs, pair[1], step)

    @show_errors
    def open_report(name: str | None) -> str:
        return report(runs, name) if name else ""

    def again(wanted: list[str] | None, before: Any) -> Any:
        """The table, curves, choices and stamp anew, where anything on the disk has changed."""
        now = _stamp(runs)
        if now == before:
            return [gr.skip()] * 7
        there = run_names(runs)
        kept = [name for name in wanted or [] if name in there][:MOST_CURVES]
        choices = gr.Dropdown(there)
        return run_table(runs), curves(runs, kept), choices, choices, choices, gr.Dropdown(report_names(runs)), now

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    shown_again = [table, figure, drawn, left, right, chosen, seen]
    drawn.change(draw, drawn, figure, **quiet)
    for control in (left, right, place):
        control.change(look, [left, right, place], [told, *grids], **quiet)
    chosen.change(open_report, chosen, shown, **quiet)
    gr.on([page.load, tab.select, timer.tick], again, [drawn, seen], shown_again, **quiet)
    page.load(look, [left, right, place], [told, *grids], **quiet)

"""The tab of runs: their progress, curves side by side, sample grids of the same seeds by step, and reports."""

import dataclasses
import html
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.log import LOG, SCORES
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.trained import read_run_record
from ddpm_lab.pictures.curves import read_run, training_figure
from ddpm_lab.pictures.drawing import Picture, rendered
from ddpm_lab.studio.controls import QUIET, image_box, show_errors
from ddpm_lab.studio.sources import inside, read_entries, run_folders

COLUMNS = ("run", "steps", "loss", "T", "betas", "predicts", "last score, or what is wrong")
MAX_CURVES = 7  # as many as there are colours
REPORT = '<iframe title="report" sandbox="allow-scripts" style="width:100%;height:80vh;border:0" srcdoc="{}"></iframe>'
# The first line of a report in its frame: it can request nothing from any machine, and its links stay inside it.
POLICY = "default-src 'none'; img-src data:; media-src data:; font-src data:; " + (
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
ISOLATION = f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{POLICY}"><base href="about:srcdoc">'
GRID = re.compile(r"step_(\d{8})\.png")


def run_names(runs: Path) -> list[str]:
    """Runs below the folder, by their path there; pipelines of diffusers have no log and are left out."""
    return [
        str(path.relative_to(runs))
        for path in run_folders(runs)
        if (path / "config.json").is_file() and not is_diffusers(path)
    ]


def run_table(runs: Path) -> list[list[str]]:
    """A row for each run, with `COLUMNS`; the row of a damaged run shows what is wrong."""
    return [_row(runs, runs / name, name) for name in run_names(runs)]


def _row(runs: Path, path: Path, name: str) -> list[str]:
    try:
        _, config, _ = read_run_record(path / "config.json")
        steps = checkpoint_steps(path)
    except (InputError, OSError) as error:
        return [name, "broken", "", "", "", "", str(error)]
    lines = read_entries(runs, path / LOG)
    scores = [line for line in read_entries(runs, path / SCORES) if isinstance(line.get("fid"), dict)]
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
    """Curves of training and scores of some runs; None if there is nothing to draw.

    Raises:
        InputError: more runs than there are colours, or an unknown run.
    """
    require(
        len(names) <= MAX_CURVES and set(names) <= set(run_names(runs)),
        f"choose up to {MAX_CURVES} of the runs that are listed",
    )
    logs = []
    for name in names:
        with suppress(OSError):  # a run whose files cannot be read has no curves
            log = read_run(runs / name) if inside(runs, runs / name / LOG) else None
            if log is not None:
                logs.append(dataclasses.replace(log, name=name))
    return rendered(training_figure(logs)) if logs else None


def grid_steps(runs: Path, names: list[str]) -> list[int]:
    """The steps at which each of some runs has a sample grid, ascending."""
    steps = [
        {int(match[1]) for path in (runs / name / "samples").glob("*.png") if (match := GRID.fullmatch(path.name))}
        for name in names
    ]
    return sorted(set.intersection(*steps)) if steps else []


def grid_at(runs: Path, name: str, step: int) -> Picture | None:
    """A run's sample grid; None if there is none, or it is damaged."""
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
    paths = [path for path in runs.glob("**/report.html") if path.is_file() and inside(runs, path)]
    return sorted(str(path.parent.relative_to(runs)) for path in paths)


def report(runs: Path, name: str) -> str:
    """A report in a frame that has no access to this page.

    Raises:
        InputError: there is no report of that name.
    """
    require(name in report_names(runs), f"there is no report {name!r} here")
    text = (runs / name / "report.html").read_text("utf-8", errors="replace")
    return REPORT.format(html.escape(ISOLATION + text))


def _fingerprint(runs: Path) -> list[tuple[str, int, int]]:
    """Times and sizes of all files that the tab shows: it changes when one of them does."""
    entries = []
    for folder in (*run_folders(runs), *(runs / name for name in report_names(runs))):
        for name in ("report.html", LOG, SCORES, "config.json", "samples", "checkpoints"):
            with suppress(OSError):
                status = (folder / name).stat()
                entries.append((str(folder / name), status.st_mtime_ns, status.st_size))
    return entries


def runs_tab(page: gr.Blocks, tab: gr.Tab, timer: gr.Timer, runs: Path) -> None:
    """Lay out the tab and connect its controls; each tick of the timer reads the files again."""
    names = run_names(runs)
    # The two runs whose sample grids are shown first have grids of the same step.
    first = next((name for name in names if grid_steps(runs, [name])), None)
    second = next((name for name in reversed(names) if first and grid_steps(runs, [first, name])), None)
    logged = [name for name in names if (runs / name / LOG).is_file()]
    table = gr.Dataframe(
        run_table(runs), headers=list(COLUMNS), interactive=False, wrap=True, elem_id="runs", label="Runs"
    )
    with gr.Accordion("Curves", open=True):
        chosen = gr.Dropdown(
            names, value=logged[:3], multiselect=True, max_choices=MAX_CURVES, label="Runs", elem_id="curves-of"
        )
        figure = image_box("loss, loss by timestep, speed and scores of the runs chosen", elem_id="curves")
    with gr.Accordion("Samples of the same seeds", open=True):
        with gr.Row():
            left = gr.Dropdown(names, value=first, label="Left", elem_id="left")
            right = gr.Dropdown(names, value=second, label="Right", elem_id="right")
        fraction = gr.Slider(0, 1, value=1, step=0.01, label="From the first grid to the last", elem_id="place")
        step_text = gr.Markdown("", elem_id="grid-step")
        with gr.Row():
            grids = [
                image_box(f"samples of the run at the {side}", elem_id=f"{side}-grid", elem_classes="pixels")
                for side in ("left", "right")
            ]
    with gr.Accordion("Reports", open=False):
        report_name = gr.Dropdown(report_names(runs), value=None, label="Report", elem_id="report-of")
        report_frame = gr.HTML("", elem_id="report")
    fingerprint = gr.State(None)

    @show_errors
    def draw_curves(selected: list[str] | None) -> Any:
        return curves(runs, selected or [])

    def show_grids(left_name: str | None, right_name: str | None, at: float) -> Any:
        pair = [name for name in (left_name, right_name) if name in run_names(runs)]
        steps = grid_steps(runs, pair)
        if len(pair) < 2 or not steps:
            return "these runs have no sample grids of the same step", None, None
        step = steps[round(at * (len(steps) - 1))]
        return f"step {step:,}", grid_at(runs, pair[0], step), grid_at(runs, pair[1], step)

    @show_errors
    def open_report(name: str | None) -> str:
        return report(runs, name) if name else ""

    def refresh(selected: list[str] | None, before: Any) -> Any:
        """The table, curves, choices and fingerprint, if any file has changed."""
        now = _fingerprint(runs)
        if now == before:
            return [gr.skip()] * 7
        existing = run_names(runs)
        kept = [name for name in selected or [] if name in existing][:MAX_CURVES]
        choices = gr.Dropdown(existing)
        return run_table(runs), curves(runs, kept), choices, choices, choices, gr.Dropdown(report_names(runs)), now

    chosen.change(draw_curves, chosen, figure, **QUIET)
    gr.on(
        [page.load, left.change, right.change, fraction.change], show_grids, [left, right, fraction],
        [step_text, *grids], trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    report_name.change(open_report, report_name, report_frame, **QUIET)
    refreshed = [table, figure, chosen, left, right, report_name, fingerprint]
    gr.on([page.load, tab.select, timer.tick], refresh, [chosen, fingerprint], refreshed, **QUIET)

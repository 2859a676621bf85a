"""The tab of runs: how far each has come, curves side by side, sample grids of the same seeds by step, reports."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ddpm_lab.checkpoint import checkpoint_steps
from ddpm_lab.curves import read_runs, training_figure
from ddpm_lab.drawing import Picture, rendered
from ddpm_lab.log import read_lines
from ddpm_lab.session import LOG, SCORES
from ddpm_lab.settings import InputError
from ddpm_lab.studio.sources import run_folders
from ddpm_lab.trained import read_run_record

COLUMNS = ("run", "steps", "loss", "T", "betas", "predicts", "last score, or what is wrong")
MOST_CURVES = 7  # as many as there are colours
SECONDS = 5.0  # between looks at the disk
REPORT = '<iframe title="report" sandbox="allow-scripts" style="width:100%;height:80vh;border:0" srcdoc="{}"></iframe>'


def run_names(runs: Path) -> list[str]:
    """Runs below the folder, by their path there; folders of diffusers have no log and are left out."""
    return [str(path.relative_to(runs)) for path in run_folders(runs) if (path / "config.json").is_file()]


def run_table(runs: Path) -> list[list[str]]:
    """A row for each run, with `COLUMNS`; of a broken one what is wrong with it."""
    return [_row(runs / name, name) for name in run_names(runs)]


def _row(path: Path, name: str) -> list[str]:
    try:
        _, config, _ = read_run_record(path / "config.json")
        lines, steps = read_lines(path / LOG), checkpoint_steps(path)
    except (InputError, OSError) as error:
        return [name, "broken", "", "", "", "", str(error)]
    step = max([line["step"] for line in lines[-1:]] + steps[-1:], default=0)
    loss = lines[-1].get("loss") if lines else None
    scores = [line for line in read_lines(path / SCORES) if isinstance(line.get("fid"), dict)]
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
    """Curves of training of some runs; None where there is nothing to draw.

    Raises:
        InputError: more runs than there are colours, or one that is not there.
    """
    known = set(run_names(runs))
    if len(names) > MOST_CURVES or not set(names) <= known:
        raise InputError(f"choose up to {MOST_CURVES} of the runs that are here")
    drawn = []
    for name in names:
        try:
            drawn += read_runs([runs / name])
        except InputError:
            continue  # which has no line yet
    return rendered(training_figure(drawn)) if drawn else None


def grid_steps(runs: Path, names: list[str]) -> list[int]:
    """The steps at which all of some runs have a sample grid, ascending."""
    found = [{int(path.stem[5:]) for path in (runs / name / "samples").glob("step_????????.png")} for name in names]
    return sorted(set.intersection(*found)) if found else []


def grid_at(runs: Path, name: str, step: int) -> Picture | None:
    """A run's sample grid; None where there is none, or it is damaged."""
    if name not in run_names(runs):
        return None
    try:
        with Image.open(runs / name / "samples" / f"step_{step:08d}.png") as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError):
        return None


def report_names(runs: Path) -> list[str]:
    """Studies and runs below the folder that have a report."""
    return sorted(str(path.parent.relative_to(runs)) for path in runs.glob("**/report.html") if _inside(runs, path))


def _inside(runs: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(runs.resolve()) and path.is_file()


def report(runs: Path, name: str) -> str:
    """A report as a frame that can reach nothing of this page.

    Raises:
        InputError: there is none of that name.
    """
    if name not in report_names(runs):
        raise InputError(f"there is no report {name!r} here")
    return REPORT.format(html.escape((runs / name / "report.html").read_text(encoding="utf-8", errors="replace")))


def runs_tab(page: gr.Blocks, runs: Path) -> None:
    """Lay out the tab and say what its controls do."""
    names, reports = run_names(runs), report_names(runs)
    first = next((name for name in names if grid_steps(runs, [name])), None)  # whose grids are shown
    second = next((name for name in reversed(names) if first and grid_steps(runs, [first, name])), None)
    logged = [name for name in names if (runs / name / LOG).is_file()]
    table = gr.Dataframe(
        run_table(runs), headers=list(COLUMNS), interactive=False, wrap=True, elem_id="runs", label="Runs"
    )
    with gr.Accordion("Curves", open=True):
        drawn = gr.Dropdown(names, value=logged[:3], multiselect=True, label="Runs", elem_id="curves-of")
        figure = gr.Image(show_label=False, interactive=False, format="png", elem_id="curves", buttons=["fullscreen"],
                          alt_text="loss, loss by timestep and speed of the runs chosen")  # fmt: skip
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

    def draw(wanted: list[str] | None) -> Any:
        try:
            return curves(runs, wanted or [])
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def look(one: str | None, other: str | None, at: float) -> Any:
        pair = [name for name in (one, other) if name in run_names(runs)]
        steps = grid_steps(runs, pair)
        if len(pair) < 2 or not steps:
            return "these runs have no sample grid of one step", None, None
        step = steps[round(at * (len(steps) - 1))]
        return f"step {step:,}", grid_at(runs, pair[0], step), grid_at(runs, pair[1], step)

    def open_report(name: str | None) -> Any:
        try:
            return report(runs, name) if name else ""
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def again(wanted: list[str] | None) -> Any:
        return run_table(runs), draw(wanted)

    quiet = {"show_progress": "hidden"}
    drawn.change(draw, drawn, figure, **quiet)  # type: ignore[arg-type]
    for control in (left, right, place):
        control.change(look, [left, right, place], [told, *grids], **quiet)  # type: ignore[arg-type]
    chosen.change(open_report, chosen, shown, **quiet)  # type: ignore[arg-type]
    page.load(again, drawn, [table, figure], **quiet)  # type: ignore[arg-type]
    page.load(look, [left, right, place], [told, *grids], **quiet)  # type: ignore[arg-type]
    gr.Timer(SECONDS).tick(again, drawn, [table, figure], **quiet)  # type: ignore[arg-type]

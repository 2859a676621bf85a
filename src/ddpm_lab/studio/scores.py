"""The tab of scores: the records behind each number with their floors, and the training images nearest to samples."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gradio as gr

from ddpm_lab.core.config import SamplingConfig, ScoringConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import SCORES
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.record import ScoreRecord
from ddpm_lab.evaluation.score_table import class_count, floor_count, score_table
from ddpm_lab.evaluation.scores import evaluate_source
from ddpm_lab.studies.cell import MEASURES
from ddpm_lab.studio.runs import run_names
from ddpm_lab.studio.sources import (
    check_data,
    entries_of,
    model_names,
    new_folder,
    open_model,
    show_errors,
    source_of,
    whole,
)

COLUMNS = ("step", "images", "distance", "its value", "95 % interval", "floor", "Inception Score", "KID", "sampled by")
NEAREST = ScoringConfig(metrics=("memorisation",), bootstrap=0)


def scored_runs(runs: Path) -> list[str]:
    """Runs below the folder that have a score on record, by their path there."""
    return [name for name in run_names(runs) if _records(runs, name)]


def records(runs: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run: of its training, of `ddpm evaluate`, and of the end of a study's cell.

    Raises:
        InputError: no such run.
    """
    if name not in run_names(runs):
        raise InputError(f"there is no run {name!r} here")
    return _records(runs, name)


def _records(runs: Path, name: str) -> list[dict[str, Any]]:
    lines = entries_of(runs, runs / name / SCORES) + entries_of(runs, runs / name / MEASURES)
    return [line for line in lines if "fid_label" in line]


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each record, with `COLUMNS`."""
    return [_row(record) for record in found]


def _row(record: dict[str, Any]) -> list[str]:
    fid = _scores(record.get("fid"))
    floor, fewer = _number(_scores(record.get("floor")).get("fid")), floor_count(record)
    inception_score = _number(_scores(record.get("inception_score")).get("value"))
    sampler, evaluations = record.get("sampler"), record.get("num_evaluations")
    return [
        _number(record.get("step")),
        _number(record.get("num_images")),
        str(record["fid_label"]).partition(" (")[0] if fid else "",
        _number(fid.get("value")),
        f"{_number(fid.get('low'))} to {_number(fid.get('high'))}" if _number(fid.get("low")) else "",
        f"{floor} ({fewer})" if floor and fewer else floor,
        f"{inception_score} {class_count(record)}".rstrip() if inception_score else "",
        _number(_scores(record.get("kid")).get("value")),
        f"{sampler}, {evaluations} evaluations{guidance_label(record)}" if sampler else "",
    ]


def _scores(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else ""


def told(record: Mapping[str, Any]) -> str:
    """A record as `ddpm evaluate` tells it."""
    try:
        return "\n".join(score_table(cast(ScoreRecord, record)))
    except (KeyError, TypeError, ValueError, AttributeError):
        return "this record lacks what a record of this version has; it is below as it stands"


def nearest(runs: Path, name: str, num_images: float, seed: float | None, device: str) -> tuple[str, str, str]:
    """Sample, and find the training image nearest to each sample, among the features of the classifier.

    Returns:
        A picture's path, above samples and below their neighbours; the record as text; the command line that repeats
        it.
    Raises:
        InputError: no such model, or none whose training images and classifier are here.
    """
    trained, source = open_model(runs, name, device), source_of(runs, name)
    check_data(runs, trained)
    sampling = SamplingConfig(sampler="dpmpp", num_steps=20, seed=whole(seed, "seed"))
    checkpoint = trained.step if trained.run_dir is not None else None
    folder = new_folder()
    picture = folder / "nearest.png"
    record = evaluate_source(
        source, None, "classifier", int(num_images), NEAREST, sampling,
        pairs=picture, scores=folder / "scores.jsonl", device=device, checkpoint=checkpoint,
    )  # fmt: skip
    assert record is not None
    words = ["ddpm", "evaluate", source, "--num-images", str(int(num_images)), "--features", "classifier"]
    words += ["--checkpoint", str(checkpoint)] if checkpoint is not None else []
    words += ["--device", device] if device != "auto" else []
    words += ["--metrics", "memorisation", "--bootstrap", "0", "--pairs", "nearest.png", "--scores", "nearest.jsonl"]
    words += ["--sampler", "dpmpp", "--num-steps", "20", "--seed", str(sampling.seed)]
    return str(picture), told(record), shlex.join(words)


def scores_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and say what its controls do."""
    names, models = scored_runs(runs), model_names(runs)
    chosen = gr.Dropdown(names, value=names[0] if names else None, label="Run with scores", elem_id="scores-of")
    shown = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, elem_id="scores", label="Its records")
    which = gr.Dropdown([], label="Record", elem_id="record")
    words = gr.Code(label="What it says", language=None, interactive=False, elem_id="record-told", lines=4)
    with gr.Accordion("The record whole", open=False):
        entire = gr.JSON(show_label=False, elem_id="record-whole")
    with gr.Accordion("Nearest training images", open=True):
        gr.Markdown(
            "Are samples copies? Those that lie nearest to an image of the training set, nearest first, each above "
            "that image; among features of the classifier. The first time the features of all training images are "
            "computed: a minute or two on a CPU."
        )
        with gr.Row():
            source = gr.Dropdown(models, value=models[0], label="Model", elem_id="nearest-of")
            count = gr.Slider(16, 256, value=64, step=16, label="Samples", elem_id="nearest-count")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="nearest-seed")
        find = gr.Button("Find them", variant="primary", elem_id="find")
        pairs = gr.Image(
            show_label=False, interactive=False, format="png", elem_id="pairs", elem_classes="pixels",
            buttons=["fullscreen"], alt_text="above samples, below the nearest training images",
        )  # fmt: skip
        found = gr.Code(label="What was found", language=None, interactive=False, elem_id="nearest-told", lines=4)
        command = gr.Code(label="The same from the command line", language=None, interactive=False, visible=False)

    def choose(name: str | None) -> Any:
        held = records(runs, name) if name in run_names(runs) else []
        options = [f"{i + 1}: {' · '.join(cell for cell in row if cell)}" for i, row in enumerate(table(held))]
        return table(held), gr.Dropdown(options, value=options[-1] if options else None)

    def look(name: str | None, option: str | None) -> Any:
        held = records(runs, name) if name in run_names(runs) else []
        number = (option or "").partition(":")[0]
        if not number.isdecimal() or not 0 < int(number) <= len(held):
            return "no record", None
        return told(held[int(number) - 1]), held[int(number) - 1]

    @show_errors
    def search(name: str, num_images: float, number: float | None) -> Any:
        picture, text, line = nearest(runs, name, num_images, number, device)
        return picture, text, gr.Code(value=line, visible=True)

    def refresh(name: str | None) -> Any:
        there = scored_runs(runs)
        kept = name if name in there else (there[0] if there else None)
        return gr.Dropdown(there, value=kept), gr.Dropdown(model_names(runs))

    chosen.change(choose, chosen, [shown, which], show_progress="hidden")
    which.change(look, [chosen, which], [words, entire], show_progress="hidden")
    find.click(search, [source, count, seed], [pairs, found, command], concurrency_limit=1)
    gr.on([page.load, tab.select], refresh, chosen, [chosen, source], show_progress="hidden").then(
        choose, chosen, [shown, which], show_progress="hidden"
    )

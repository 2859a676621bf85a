"""The tab of scores: the record behind each number, with its floor, and the training images nearest to samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gradio as gr

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import require
from ddpm_lab.core.log import SCORES
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.record import ScoreRecord
from ddpm_lab.evaluation.score_table import class_count, floor_count, score_table
from ddpm_lab.evaluation.scores import evaluate_source
from ddpm_lab.studies.cell import MEASURES
from ddpm_lab.studio.controls import QUIET, command_line, image_box, show_errors, whole
from ddpm_lab.studio.runs import run_names
from ddpm_lab.studio.sources import check_data, model_names, new_folder, open_model, read_entries, source_of

COLUMNS = ("step", "images", "distance", "its value", "95 % interval", "floor", "Inception Score", "KID", "sampled by")
NEAREST = ScoringConfig(metrics=("memorisation",), bootstrap=0)


def scored_runs(runs: Path) -> list[str]:
    """Runs below the folder that have a score record, by their path there."""
    return [name for name in run_names(runs) if _records(runs, name)]


def records(runs: Path, name: str) -> list[dict[str, Any]]:
    """The score records of a run: of its training, of `ddpm evaluate`, and of the end of a study's cell.

    Raises:
        InputError: no such run.
    """
    require(name in run_names(runs), f"there is no run {name!r} here")
    return _records(runs, name)


def _records(runs: Path, name: str) -> list[dict[str, Any]]:
    lines = read_entries(runs, runs / name / SCORES) + read_entries(runs, runs / name / MEASURES)
    return [line for line in lines if "fid_label" in line]


def score_row(record: dict[str, Any]) -> list[str]:
    """The cells of a record, with `COLUMNS`; a cell is empty if the record does not have the value."""
    fid = _as_dict(record.get("fid"))
    floor, fewer_images = _format(_as_dict(record.get("floor")).get("fid")), floor_count(record)
    inception_score = _format(_as_dict(record.get("inception_score")).get("value"))
    sampler, evaluations = record.get("sampler"), record.get("num_evaluations")
    return [
        _format(record.get("step")),
        _format(record.get("num_images")),
        str(record["fid_label"]).partition(" (")[0] if fid else "",
        _format(fid.get("value")),
        f"{_format(fid.get('low'))} to {_format(fid.get('high'))}" if _format(fid.get("low")) else "",
        f"{floor} ({fewer_images})" if floor and fewer_images else floor,
        f"{inception_score} {class_count(record)}".rstrip() if inception_score else "",
        _format(_as_dict(record.get("kid")).get("value")),
        f"{sampler}, {evaluations} evaluations{guidance_label(record)}" if sampler else "",
    ]


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _format(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else ""


def record_text(record: Mapping[str, Any]) -> str:
    """A record as `ddpm evaluate` prints it."""
    try:
        return "\n".join(score_table(cast(ScoreRecord, record)))
    except (KeyError, TypeError, ValueError, AttributeError):
        return "this record lacks fields that this version writes; the full record is below"


def nearest(runs: Path, name: str, num_images: float, seed: float | None, device: str) -> tuple[str, str, str]:
    """Sample, and find the training image nearest to each sample in the classifier's feature space.

    Returns:
        The path of a picture with the samples above their neighbours; the record as text; the command line that makes
        the same.
    Raises:
        InputError: no such model, or its training images or classifier are not here.
    """
    trained, source = open_model(runs, name, device), source_of(runs, name)
    check_data(runs, trained)
    sampling = SamplingConfig(sampler="dpmpp", num_steps=20, seed=whole(seed, "seed"))
    checkpoint = trained.step if trained.run_dir is not None else None
    folder = new_folder()
    picture = folder / "nearest.png"
    (record,) = evaluate_source(
        source, None, ["classifier"], int(num_images), NEAREST, sampling,
        pairs=picture, scores=folder / "scores.jsonl", device=device, checkpoint=checkpoint,
    )  # fmt: skip
    command = command_line(
        "evaluate", source, num_images=int(num_images), features="classifier", checkpoint=checkpoint, device=device,
        metrics=NEAREST.metrics, bootstrap=NEAREST.bootstrap, pairs="nearest.png", scores="nearest.jsonl",
        sampler=sampling.sampler, num_steps=sampling.num_steps, seed=sampling.seed,
    )  # fmt: skip
    return str(picture), record_text(record), command


def scores_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and connect its controls."""
    names, models = scored_runs(runs), model_names(runs)
    run = gr.Dropdown(names, value=names[0] if names else None, label="Run with scores", elem_id="scores-of")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, elem_id="scores", label="Its records")
    choice = gr.Dropdown([], label="Record", elem_id="record")
    text = gr.Code(label="Scores", language=None, interactive=False, elem_id="record-text", lines=4)
    with gr.Accordion("The full record", open=False):
        full = gr.JSON(show_label=False, elem_id="record-whole")
    with gr.Accordion("Nearest training images", open=True):
        gr.Markdown(
            "Are samples copies of training images? The samples nearest to a training image, the nearest first, each "
            "above that image, compared by the features of the classifier. The first search computes the features of "
            "all training images, which takes a minute or two on a CPU."
        )
        with gr.Row():
            source = gr.Dropdown(models, value=models[0], label="Model", elem_id="nearest-of")
            count = gr.Slider(16, 256, value=64, step=16, label="Samples", elem_id="nearest-count")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="nearest-seed")
        find = gr.Button("Find them", variant="primary", elem_id="find")
        pairs = image_box("samples above their nearest training images", elem_id="pairs", elem_classes="pixels")
        result = gr.Code(label="Result", language=None, interactive=False, elem_id="nearest-text", lines=4)
        command = gr.Code(label="The same on the command line", language=None, interactive=False, visible=False)

    @show_errors
    def list_records(name: str | None) -> Any:
        rows = [score_row(record) for record in records(runs, name)] if name else []
        options = [(f"{i + 1}: {' · '.join(cell for cell in row if cell)}", i) for i, row in enumerate(rows)]
        return rows, gr.Dropdown(options, value=len(rows) - 1 if rows else None)

    @show_errors
    def show_record(name: str | None, index: int | None) -> Any:
        entries = records(runs, name) if name else []
        if index is None or not 0 <= index < len(entries):
            return "no record", None
        return record_text(entries[index]), entries[index]

    @show_errors
    def search(name: str, num_images: float, seed: float | None) -> Any:
        picture, text, line = nearest(runs, name, num_images, seed, device)
        return picture, text, gr.Code(value=line, visible=True)

    def refresh(name: str | None) -> Any:
        names = scored_runs(runs)
        chosen = name if name in names else next(iter(names), None)
        return gr.Dropdown(names, value=chosen), gr.Dropdown(model_names(runs))

    refreshed = gr.on([page.load, tab.select], refresh, run, [run, source], **QUIET)
    for event in (run.change, refreshed.then):
        listed = event(list_records, run, [table, choice], **QUIET)
        listed.then(show_record, [run, choice], [text, full], **QUIET)
    choice.input(show_record, [run, choice], [text, full], **QUIET)
    find.click(search, [source, count, seed], [pairs, result, command], concurrency_limit=1)

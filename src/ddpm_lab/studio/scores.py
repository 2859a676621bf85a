"""The tab of scores: the records behind each number with their floors, and the training images nearest to samples."""

import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from ddpm_lab.cell import MEASURES
from ddpm_lab.config import SamplingConfig, ScoringConfig
from ddpm_lab.log import read_lines
from ddpm_lab.scores import evaluate_source, score_table
from ddpm_lab.session import SCORES
from ddpm_lab.settings import InputError
from ddpm_lab.studio.runs import run_names
from ddpm_lab.studio.sources import model_names, new_folder, open_model
from ddpm_lab.trained import packaged_names

COLUMNS = ("step", "images", "distance", "its value", "95 % interval", "floor", "Inception Score", "KID", "sampled by")
NEAREST = ScoringConfig(metrics=("memorisation",), bootstrap=0)


def scored_runs(runs: Path) -> list[str]:
    """Runs below the folder that have a score on record, by their path there."""
    return [name for name in run_names(runs) if records(runs, name)]


def records(runs: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run: of its training, of `ddpm evaluate`, and of the end of a study's cell.

    Raises:
        InputError: no such run.
    """
    if name not in run_names(runs):
        raise InputError(f"there is no run {name!r} here")
    try:
        lines = read_lines(runs / name / SCORES) + read_lines(runs / name / MEASURES)
    except (InputError, OSError):
        return []
    return [line for line in lines if "fid_label" in line]


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each record, with `COLUMNS`."""
    return [_row(record) for record in found]


def _row(record: dict[str, Any]) -> list[str]:
    fid, floor = _scores(record.get("fid")), record.get("floor")
    known = _scores(floor).get("fid")
    sampler, evaluations = record.get("sampler"), record.get("num_evaluations")
    return [
        f"{record.get('step') or 0:,}",
        f"{record.get('num_images') or 0:,}",
        str(record["fid_label"]).partition(" (")[0] if fid else "",
        _number(fid.get("value")),
        f"{_number(fid['low'])} to {_number(fid['high'])}" if _number(fid.get("low")) else "",
        _number(known),
        _number(_scores(record.get("inception_score")).get("value")),
        _number(_scores(record.get("kid")).get("value")),
        f"{sampler}, {evaluations} evaluations" if sampler else "",
    ]


def _scores(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def told(record: dict[str, Any]) -> str:
    """A record as `ddpm evaluate` tells it."""
    try:
        return "\n".join(score_table(record))
    except (KeyError, TypeError, ValueError, AttributeError):
        return "this record lacks what a record of this version has; it is below as it stands"


def nearest(runs: Path, name: str, num_images: float, seed: float, device: str) -> tuple[str, str, str]:
    """Sample, and find the training image nearest to each sample, among the features of the classifier.

    Returns:
        A picture's path, above samples and below their neighbours; the record as text; the command line that repeats
        it.
    Raises:
        InputError: no such model, or none whose training images and classifier are here.
    """
    open_model(runs, name, device)  # refuses what is not to be opened
    source = name if name in packaged_names() else str(runs / name)
    sampling = SamplingConfig(sampler="dpmpp", num_steps=20, seed=int(seed))
    folder = new_folder()
    picture = folder / "nearest.png"
    record = evaluate_source(
        source, None, "classifier", int(num_images), NEAREST, sampling,
        pairs=picture, scores=folder / "scores.jsonl", device=device,
    )  # fmt: skip
    assert record is not None
    words = ["ddpm", "evaluate", source, "--num-images", str(int(num_images)), "--features", "classifier"]
    words += ["--metrics", "memorisation", "--pairs", "nearest.png", "--sampler", "dpmpp", "--num-steps", "20"]
    return str(picture), told(record), shlex.join([*words, "--seed", str(int(seed))])


def scores_tab(page: gr.Blocks, runs: Path, device: str) -> None:
    """Lay out the tab and say what its controls do."""
    names, models = scored_runs(runs), model_names(runs)
    chosen = gr.Dropdown(names, value=names[0] if names else None, label="Run with scores", elem_id="scores-of")
    shown = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, elem_id="scores", label="Its records")
    which = gr.Dropdown([], label="Record", elem_id="record")
    words = gr.Code(label="What it says", language=None, interactive=False, elem_id="record-told", lines=4)
    with gr.Accordion("The record whole", open=False):
        whole = gr.JSON(show_label=False, elem_id="record-whole")
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

    def search(name: str, num_images: float, number: float) -> Any:
        try:
            picture, text, line = nearest(runs, name, num_images, number, device)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return picture, text, gr.Code(value=line, visible=True)

    def refresh(name: str | None) -> Any:
        there = scored_runs(runs)
        return gr.Dropdown(there, value=name if name in there else (there[0] if there else None))

    chosen.change(choose, chosen, [shown, which], show_progress="hidden")
    which.change(look, [chosen, which], [words, whole], show_progress="hidden")
    find.click(search, [source, count, seed], [pairs, found, command], concurrency_limit=1)
    page.load(refresh, chosen, chosen, show_progress="hidden").then(
        choose, chosen, [shown, which], show_progress="hidden"
    )

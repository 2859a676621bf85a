"""The commands of `ddpm`: typed arguments in, a call of what does the work. What is heavy is imported inside them."""

import re
import typing
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from ddpm_lab.core.config import RECIPES, Config, SamplingConfig, ScoringConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.messages import say
from ddpm_lab.core.settings import read_toml

DataDir = Annotated[Path | None, Parameter(help="folder of data sets; default DDPM_DATA_DIR, else the user's cache")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], Parameter(help="where to compute; auto: a GPU where there is one")
]
Source = Annotated[
    str, Parameter(help="run folder, checkpoint folder in one, folder of diffusers, or packaged weights (mnist)")
]
Weights = Annotated[
    Literal["ema", "raw"],
    Parameter(help="the moving average of the parameters (ema), or the parameters themselves (raw)"),
]
Checkpoint = Annotated[int | None, Parameter(help="step of a checkpoint of a run folder; unset: the newest")]


def _settings(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """After parsing: put the recipe's values under the flags, and refuse fractions for whole numbers."""
    if commands == ("train",):
        recipe = next((token.value for a in arguments if a.name == "RECIPE" for token in a.tokens), None)
        if recipe is not None:
            _, values = read_toml("recipe", RECIPES, recipe)
            try:
                Config.from_dict(values)  # a recipe stands on its own, so that its faults are told as its own
            except InputError as error:
                raise InputError(f"recipe {recipe}: {error}") from error
            Dict({"train": values}, source=f"recipe {recipe}")(app, commands, arguments)
    for argument in arguments:
        hints = {argument.hint, *typing.get_args(argument.hint)}
        if Path in hints and any(token.value == "" for token in argument.tokens):
            raise InputError(f"{argument.name} must name a file or folder, and is empty")
        if int in hints and float not in hints:
            for token in argument.tokens:
                if token.value and not re.fullmatch(r"[+-]?\d+", token.value):
                    raise InputError(f"{argument.name} must be a whole number, not {token.value!r}")


app = App(
    name="ddpm",
    help="Train, sample, see and score denoising diffusion models on small images.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `cli` says in a line that it was interrupted
    config=_settings,
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
)
app["--help"].group = app["--version"].group = "About"


@app.command
def demo(*, out: Path = Path("runs/demo"), device: Device = "auto") -> None:
    """Run the study in small, on the embedded 8x8 digits: minutes on two CPU cores, no network; ends with report.html.

    Args:
        out: folder for everything it makes; running it again continues.
    """
    from ddpm_lab.studies.grid import read_study
    from ddpm_lab.studies.study import run_study

    run_study(read_study("digits"), out, device=device, say=say)


@app.command
def data(dataset: Literal["mnist", "cifar10", "digits"], /, *, data_dir: DataDir = None) -> None:
    """Fetch a data set once, verify it, and print what it holds.

    Args:
        dataset: which.
    """
    from ddpm_lab.data.datasets import describe

    for line in describe(dataset, data_dir):
        print(line)


@app.command
def train(
    recipe: str,
    /,
    *,
    run: Path,
    start_from: Annotated[str | None, Parameter(name="--from")] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    config: Annotated[Config, Parameter(name="*")] = Config(),  # noqa: B008 (frozen)
) -> None:
    """Train a network; a run that exists continues, to the same weights as if it had never stopped.

    Args:
        recipe: a packaged recipe (cifar10, cifar10-cpu, digits, mnist, mnist-cpu) or the path of a TOML file.
        run: folder of the run, new or to be continued.
        start_from: a trained network like this one, whose weights a new run begins with (fine-tuning): run folder,
            checkpoint folder in one, folder of diffusers, or packaged weights. One that was told no classes serves a
            run that is told them.
    """
    from ddpm_lab.training.run import train as train_run

    checkpoint = train_run(config, run, start_from=start_from, device=device, data_dir=data_dir, say=say)
    print(f"trained: {checkpoint}")


@app.command
def sample(
    source: Source,
    /,
    *,
    out: Path,
    num_images: int = 64,
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Draw images from a trained network.

    Args:
        out: FILE.png for a grid, FILE.npz for an array `images`, uint8 (N, H, W, C), or a folder of PNGs, which a
            second call goes on filling.
        num_images: how many; image i of a seed is the same in any number.
    """
    from ddpm_lab.sampling.output import sample_to_file

    made = sample_to_file(
        source, out, num_images, sampling,
        weights=weights, checkpoint=checkpoint, device=device,
    )  # fmt: skip
    print(made)


@app.command
def classifier(
    dataset: Literal["mnist", "cifar10", "digits"],
    /,
    *,
    out: Path | None = None,
    num_epochs: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Train the small feature network of a data set; stopped, the same command goes on from the last whole epoch.

    Args:
        dataset: whose images and labels.
        out: folder for classifier.safetensors (unset: runs/classifier-DATASET), which `ddpm evaluate --features` takes.
        num_epochs: passes over the training images; unset: 15 for mnist, 40 for cifar10 and digits.
        seed: of weights, order and distortions.
    """
    from ddpm_lab.evaluation.classifier import train_classifier

    folder = out or Path(f"runs/classifier-{dataset}")
    train_classifier(dataset, folder, num_epochs=num_epochs, seed=seed, device=device, data_dir=data_dir, say=say)


@app.command
def evaluate(
    source: Annotated[str, Parameter(help="a model as for sample; or DATASET:SPLIT, an .npz, a folder of images")],
    /,
    *,
    reference: str | None = None,
    features: str = "inception",
    num_images: int | None = None,
    scoring: Annotated[ScoringConfig, Parameter(name="*")] = ScoringConfig(),  # noqa: B008 (frozen)
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    inception_weights: Path | None = None,
    image_size: int | None = None,
    pairs: Path | None = None,
    scores: Path | None = None,
    json: bool = False,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Score a model or images against real ones: a table, and a record that says all the numbers depend on.

    Sampled images and features are kept in the cache (DDPM_CACHE_DIR), so that a command that was stopped goes on, and
    a second one with other metrics is quick.

    Args:
        reference: DATASET:SPLIT (mnist:train, cifar10:test, ...), a folder of images, an .npz of images, or an .npz of
            statistics (mu, sigma); unset: the images the model was trained on.
        features: inception (FID as published), classifier (the packaged one of the data set), or a folder that
            `ddpm classifier` made.
        num_images: how many; unset: 1000 of a model, all of a collection (fewer are drawn at random). Published FIDs
            take 50000.
        inception_weights: file of the FID network; unset: DDPM_INCEPTION_WEIGHTS, else fetched and verified.
        image_size: pixels to which the images of folders are cropped and scaled; unset: they have one size already.
        pairs: FILE.png for the samples nearest to training images, each above its neighbour (with memorisation).
        scores: FILE.jsonl that the record is added to; unset: scores.jsonl of the run, where the source is one.
        json: print the record, one line, in place of the table.
    """
    from ddpm_lab.evaluation.score_table import score_table
    from ddpm_lab.evaluation.scores import evaluate_source

    record = evaluate_source(
        source, reference, features, num_images, scoring, sampling,
        weights=weights, checkpoint=checkpoint, inception_weights=inception_weights, image_size=image_size,
        pairs=pairs, scores=scores, device=device, data_dir=data_dir,
    )  # fmt: skip
    if record is None:  # the leading process speaks
        return
    print(dumps(record) if json else "\n".join(score_table(record)))


@app.command
def study(
    name: str,
    /,
    *,
    out: Path,
    cell: int | None = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Train the same network with chains of several lengths, score them alike, and report; stopped, it goes on.

    Args:
        name: a packaged study (cifar10, cifar10-cpu, digits, mnist) or the path of a TOML file.
        out: folder of the study, new or to be continued; several workers may share it.
        cell: index of the only cell to compute, from 0; unset: all that are missing.
    """
    from ddpm_lab.studies.grid import read_study
    from ddpm_lab.studies.study import run_study

    run_study(read_study(name), out, cell=cell, device=device, data_dir=data_dir, say=say)


@app.command
def report(folder: Path, /) -> None:
    """Write report.html, one page that needs nothing but itself; of a study results.json and results.csv as well.

    Args:
        folder: of a study or a run, finished or not; or one that holds runs, which are shown together.
    """
    from ddpm_lab.studies.report import write_report
    from ddpm_lab.studies.run_report import write_run_report

    print(write_report(folder) if (folder / "study.json").is_file() else write_run_report(folder))


@app.command(name="import")
def import_(folder: Path, /, *, run: Path, dataset: str = "unknown") -> None:
    """Make a run of a generator that diffusers saved (DDPMPipeline, or UNet2DModel alone), to sample and to score.

    Algorithm 2 samples what the pipeline does from the same noise. What is not covered is refused by its name.

    Args:
        folder: as save_pretrained writes it, with safetensors.
        run: new folder for the run.
        dataset: what it was trained on, where known: mnist, cifar10, or the path of a folder of images.
    """
    from ddpm_lab.exchange.generators import import_generator

    print(import_generator(folder, run, dataset))


@app.command
def export(
    source: Source,
    /,
    *,
    to: Literal["diffusers", "onnx"],
    out: Path,
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    license: str | None = None,
    sampler: Literal["ddim", "dpmpp"] | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    guide: str | None = None,
    guidance_interval: tuple[float, ...] = (),
) -> None:
    """Write a generator as others read it, with a README that says what it is, ready to be uploaded.

    Args:
        to: diffusers, a folder for DDPMPipeline.from_pretrained; onnx, the network and a whole sampler as graphs, with
            an example that needs numpy and onnxruntime only.
        out: new folder.
        license: of the weights, for the README (mit, cc-by-4.0, ...); unset: mit for packaged weights, else unknown.
        sampler: onnx only: what the sampler's graph does, without noise on the way; unset: dpmpp.
        num_steps: onnx only: its steps; unset: 20 for dpmpp, 50 for ddim.
        guidance: onnx only, as in `ddpm sample`: how far to go away from a worse answer; unset: 1.
        guide: onnx only: the worse network of autoguidance; unset: the same network without a class.
        guidance_interval: onnx only: the lowest and the highest noise level at which guidance acts; unset: at all.
    """
    from ddpm_lab.exchange.generators import export_generator

    made = export_generator(
        source, to, out, weights=weights, checkpoint=checkpoint, licence=license,
        sampler=sampler, num_steps=num_steps, guidance=guidance, guide=guide, guidance_interval=guidance_interval,
    )  # fmt: skip
    print(made)


@app.command
def studio(*, runs: Path = Path("runs"), port: int = 7860, device: Device = "auto") -> None:
    """Serve a page on this machine: images as they come out of noise, the forward process, runs and their curves.

    Args:
        runs: folder whose runs it shows; nothing outside it can be read through the page.
        port: of http://127.0.0.1:PORT, which only this machine reaches.
    """
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise InputError("gradio is not installed: pip install 'ddpm-lab[studio]'")
    from ddpm_lab.studio.page import serve

    serve(runs, port, device)


@app.command
def cache(*, clear: tuple[str, ...] = (), older_than: float | None = None) -> None:
    """Say what the cache holds (DDPM_CACHE_DIR, else the user's cache folder), by kind; or clear it.

    Args:
        clear: kinds to remove: generated, features, onnx, inception, data; or all. Whatever is needed again is made or
            fetched again.
        older_than: remove only what was written so many days ago or earlier; unset: whatever its age.
    """
    from ddpm_lab.core.cache import clear_cache, describe_cache

    if older_than is not None and not clear:
        raise InputError("--older-than goes with --clear")
    for line in clear_cache(clear, older_than) if clear else describe_cache():
        print(line)


@app.command
def info(source: Source, /, *, checkpoint: Checkpoint = None) -> None:
    """Say what a model is: settings, parameters, steps trained, losses and scores so far."""
    from ddpm_lab.models.trained import describe

    for line in describe(source, checkpoint):
        print(line)

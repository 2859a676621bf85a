"""The commands of `ddpm`: typed arguments, and a call of the function that does the work.

Heavy imports are inside the commands, so that `ddpm --help` starts quickly.
"""

import re
import typing
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from ddpm_lab.core.config import RECIPES, Config, SamplingConfig, TuningConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.messages import say
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.core.settings import read_toml

Dataset = Literal["mnist", "cifar10", "digits"]
DataDir = Annotated[Path | None, Parameter(help="folder of data sets; unset: DDPM_DATA_DIR, else the user's cache")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], Parameter(help="device; auto: a GPU if there is one")]
Source = Annotated[
    str,
    Parameter(
        help="run folder, one of its checkpoint folders, diffusers folder, packaged weights (mnist), or USER/NAME or "
        "USER/NAME@REVISION on the Hugging Face hub"
    ),
]
Weights = Annotated[
    Literal["ema", "raw"], Parameter(help="moving average of the parameters (ema), or the parameters themselves (raw)")
]
Checkpoint = Annotated[int | None, Parameter(help="step of a checkpoint in a run folder; unset: the newest")]


def _settings(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """After parsing: use the values of the recipe as defaults, and refuse fractions for whole numbers."""
    if commands == ("train",):
        recipe = next((token.value for a in arguments if a.name == "RECIPE" for token in a.tokens), None)
        if recipe is not None:
            _, values = read_toml("recipe", RECIPES, recipe)
            try:
                Config.from_dict(values)  # the recipe by itself, so that an error names the recipe
            except InputError as error:
                raise InputError(f"recipe {recipe}: {error}") from error
            Dict({"train": values}, source=f"recipe {recipe}")(app, commands, arguments)
    for argument in arguments:
        hints = {argument.hint, *typing.get_args(argument.hint)}
        if Path in hints and any(token.value == "" for token in argument.tokens):
            raise InputError(f"{argument.name} must name a file or folder, and is empty")
        words = [word for hint in hints if typing.get_origin(hint) is Literal for word in typing.get_args(hint)]
        if int in hints and float not in hints:
            for token in argument.tokens:
                if token.value and token.value not in words and not re.fullmatch(r"[+-]?\d+", token.value):
                    valid = " or ".join(["a whole number", *words])
                    raise InputError(f"{argument.name} must be {valid}, not {token.value!r}")


app = App(
    name="ddpm",
    help="Train, sample, visualise and score denoising diffusion models on small images.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `main` handles it
    config=_settings,
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
)
app["--help"].group = app["--version"].group = "About"


@app.command
def demo(*, out: Path = Path("runs/demo"), device: Device = "auto") -> None:
    """Run a small study on the included 8x8 digits and write report.html: minutes on two CPU cores, no network.

    Args:
        out: folder for all results; an interrupted demo is continued.
    """
    from ddpm_lab.studies.grid import read_study
    from ddpm_lab.studies.study import run_study

    run_study(read_study("digits"), out, device=device, say=say)


@app.command
def data(dataset: Dataset, /, *, data_dir: DataDir = None) -> None:
    """Download a data set once, verify it, and print its sizes and hashes.

    Args:
        dataset: the data set.
    """
    from ddpm_lab.data.datasets import describe

    print("\n".join(describe(dataset, data_dir)))


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
    """Train a network. An existing run is continued, with the same weights as without the interruption.

    Args:
        recipe: packaged recipe (cifar10, cifar10-cpu, digits, mnist, mnist-cpu) or the path of a TOML file.
        run: folder of the run, new or to be continued.
        start_from: initial weights of a new run (fine-tuning), from a network of the same shape: run folder, one of its
            checkpoint folders, diffusers folder, packaged weights, or USER/NAME on the hub. An unconditional network
            can start a conditional run.
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
    """Sample images from a trained network.

    Args:
        out: FILE.png for a grid, FILE.npz for an array `images`, uint8 (N, H, W, C), or a folder of PNGs, which a
            second call continues to fill.
        num_images: number of images; image i of a seed does not depend on it.
    """
    from ddpm_lab.sampling.output import sample_to_file

    print(sample_to_file(source, out, num_images, sampling, weights=weights, checkpoint=checkpoint, device=device))


@app.command
def tune(
    source: Source,
    /,
    *,
    tuning: Annotated[TuningConfig, Parameter(name="*")] = TuningConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Tune samplers with few evaluations for a model, for `--sampler tuned`; the network stays as it is.

    Timesteps and coefficients are learned, so that from the same noise the images are like those of many steps. They
    are saved beside the weights, in tuned.json, and are for these weights and this guidance alone.
    """
    from ddpm_lab.models.trained import load
    from ddpm_lab.training.tuning import tune as tune_samplers

    tune_samplers(load(source, weights=weights, checkpoint=checkpoint, device=device), tuning, say)


@app.command
def classifier(
    dataset: Dataset,
    /,
    *,
    out: Path | None = None,
    num_epochs: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Train a small classifier whose features are used for scores. It continues from the last complete epoch.

    Args:
        dataset: data set with labels.
        out: folder for classifier.safetensors (unset: runs/classifier-DATASET), for `ddpm evaluate --features`.
        num_epochs: passes over the training images; unset: 15 for mnist, 40 for cifar10 and digits.
        seed: seed of the weights, the order of the images and their augmentation.
    """
    from ddpm_lab.evaluation.classifier import train_classifier

    out = out or Path(f"runs/classifier-{dataset}")
    train_classifier(dataset, out, num_epochs=num_epochs, seed=seed, device=device, data_dir=data_dir, say=say)


@app.command
def evaluate(
    source: Annotated[str, Parameter(help="a model as for sample; or DATASET:SPLIT, an .npz, a folder of images")],
    /,
    *,
    reference: str | None = None,
    features: tuple[str, ...] = ("inception",),
    num_images: int | None = None,
    scoring: Annotated[ScoringConfig, Parameter(name="*")] = ScoringConfig(),  # noqa: B008 (frozen)
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    inception_weights: Path | None = None,
    dinov2_weights: Path | None = None,
    image_size: int | None = None,
    pairs: Path | None = None,
    scores: Path | None = None,
    json: bool = False,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Score a model or images against real images; print a table, and store a record of scores and settings.

    Sampled images and features are kept in the cache (DDPM_CACHE_DIR): an interrupted command is continued, and other
    metrics of the same images are quick.

    Args:
        reference: DATASET:SPLIT (mnist:train, cifar10:test, ...), a folder of images, an .npz of images, or an .npz of
            statistics (mu, sigma); unset: the images the model was trained on.
        features: inception (FID as published), dinov2 (FD-DINOv2 as published), classifier (the packaged one of the
            data set), or a folder of `ddpm classifier`; several give a table or record each, from images read once.
        num_images: number of images; unset: 1000 of a model, all of a collection (a smaller number is drawn at random).
            Published FIDs use 50000.
        inception_weights: file of the FID network; unset: DDPM_INCEPTION_WEIGHTS, else downloaded and verified.
        dinov2_weights: file of the network of FD-DINOv2; unset: DDPM_DINOV2_WEIGHTS, else downloaded and verified.
        image_size: side in pixels to which images of folders are cropped and scaled; unset: all have one size already.
        pairs: FILE.png for the samples nearest to training images, each above its neighbour (requires memorisation).
        scores: FILE.jsonl to append each record to; unset: scores.jsonl of the run, if the source is a run.
        json: print each record as one line of JSON instead of the table: a line for each of --features.
    """
    from ddpm_lab.evaluation.score_table import score_table
    from ddpm_lab.evaluation.scores import evaluate_source

    records = evaluate_source(
        source, reference, features, num_images, scoring, sampling,
        weights=weights, checkpoint=checkpoint, inception_weights=inception_weights, dinov2_weights=dinov2_weights,
        image_size=image_size, pairs=pairs, scores=scores, device=device, data_dir=data_dir,
    )  # fmt: skip
    if records:  # only process 0 has them
        texts = [dumps(record) if json else "\n".join(score_table(record)) for record in records]
        print(("\n" if json else "\n\n").join(texts))


@app.command
def study(
    name: str, /, *, out: Path, cell: int | None = None, device: Device = "auto", data_dir: DataDir = None
) -> None:
    """Train the same network for chains of several lengths, score the networks, and report. It continues if stopped.

    Args:
        name: packaged study (cifar10, cifar10-cpu, digits, mnist) or the path of a TOML file.
        out: folder of the study, new or to be continued; several workers may share it.
        cell: index of the only cell to compute, from 0; unset: all missing cells.
    """
    from ddpm_lab.studies.grid import read_study
    from ddpm_lab.studies.study import run_study

    run_study(read_study(name), out, cell=cell, device=device, data_dir=data_dir, say=say)


@app.command
def report(folder: Path, /) -> None:
    """Write report.html, a self-contained page; for a study also results.json and results.csv.

    Args:
        folder: folder of a study, of a run, or of several runs, which share a page; finished or not.
    """
    from ddpm_lab.studies.report import write_report
    from ddpm_lab.studies.run_report import write_run_report

    print(write_report(folder) if (folder / "study.json").is_file() else write_run_report(folder))


@app.command(name="import")
def import_(source: str, /, *, run: Path, dataset: str = "unknown") -> None:
    """Import a model of diffusers (DDPMPipeline, DDIMPipeline, or UNet2DModel alone) as a run, to sample and to score.

    From the same noise, `ddpm sample --sampler ddpm`, or of a DDIMPipeline `--sampler ddim`, gives the images of the
    pipeline. Averaged weights in unet_ema become the weights ema, and those in unet the weights raw. A setting that is
    not supported is an error that names it.

    Args:
        source: folder written by save_pretrained, with safetensors; or USER/NAME on the Hugging Face hub.
        run: new folder for the run.
        dataset: training data, if known: mnist, cifar10, or the path of a folder of images.
    """
    from ddpm_lab.exchange.import_export import import_generator

    print(import_generator(source, run, dataset))


@app.command
def export(
    source: Source,
    /,
    *,
    to: Literal["diffusers", "run", "onnx"],
    out: Path | None = None,
    push: str | None = None,
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    license: str | None = None,
    sampler: Literal["ddim", "dpmpp", "ipndm", "unipc"] | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    guide: str | None = None,
    guidance_interval: tuple[float, ...] = (),
) -> None:
    """Export a model for other people and programs, with a model card (README.md); upload it to the Hugging Face hub.

    Args:
        to: diffusers: a folder for its DDPMPipeline or DDIMPipeline; run: a folder of the averaged weights for every
            command here, which can hold any network; onnx: the network and a complete sampler as graphs, with an
            example that requires only numpy and onnxruntime.
        out: new folder; unset: only push.
        push: USER/NAME of a repository on the hub to upload to, created if it does not exist (as a public one); a model
            in it is replaced. The login is that of `hf auth login`.
        license: license of the weights, for the model card (mit, cc-by-4.0, ...); unset: mit for packaged weights, else
            unknown.
        sampler: onnx: the sampler of the graph, without added noise; unset: dpmpp. diffusers: ddim makes a
            DDIMPipeline; unset: a DDPMPipeline, or the kind of the imported pipeline.
        num_steps: onnx only: number of steps; unset: 20 for dpmpp, 50 for ddim, 10 for ipndm and unipc.
        guidance: onnx only: guidance scale, as in `ddpm sample`; unset: 1.
        guide: onnx only: the weaker network of autoguidance; unset: classifier-free guidance.
        guidance_interval: onnx only: lowest and highest noise level at which guidance is applied; unset: all noise
            levels.
    """
    from ddpm_lab.exchange.import_export import export_generator

    made = export_generator(
        source, to, out, push_to=push, weights=weights, checkpoint=checkpoint, licence=license,
        sampler=sampler, num_steps=num_steps, guidance=guidance, guide=guide, guidance_interval=guidance_interval,
    )  # fmt: skip
    print(made)


@app.command
def studio(*, runs: Path = Path("runs"), port: int = 7860, device: Device = "auto") -> None:
    """Serve a local web page that shows sampling, the forward process, and runs with their curves.

    Args:
        runs: folder of the runs to show; the page cannot read anything outside it.
        port: port of http://127.0.0.1:PORT, which only this machine can reach.
    """
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise InputError("gradio is not installed: pip install 'ddpm-lab[studio]'")
    from ddpm_lab.studio.page import serve

    serve(runs, port, device)


@app.command
def cache(*, clear: tuple[str, ...] = (), older_than: float | None = None) -> None:
    """List the contents of the cache (DDPM_CACHE_DIR, else the user's cache folder) by kind, or delete them.

    Args:
        clear: kinds to delete: generated, features, hub, onnx, inception, dinov2, data; or all. Deleted entries are
            computed or downloaded again when needed.
        older_than: delete only entries written at least this number of days ago; unset: entries of any age.
    """
    from ddpm_lab.core.cache import clear_cache, describe_cache

    if older_than is not None and not clear:
        raise InputError("--older-than requires --clear")
    print("\n".join(clear_cache(clear, older_than) if clear else describe_cache()))


@app.command
def info(source: Source, /, *, checkpoint: Checkpoint = None) -> None:
    """Print the settings of a model, its parameters, trained steps, losses and scores."""
    from ddpm_lab.models.trained import describe

    print("\n".join(describe(source, checkpoint)))

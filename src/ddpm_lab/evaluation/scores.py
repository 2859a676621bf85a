"""Scores of a model or of images: sampling where needed, the record, and where it is kept."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, SamplingConfig, ScoringConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.log import append_line
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.data.datasets import DATASETS, ImageSet, here, load_images
from ddpm_lab.data.image_stream import open_images, tensor_stream
from ddpm_lab.evaluation.evaluate import check_scoring, evaluate, feature_network, generated_images
from ddpm_lab.evaluation.feature_store import features_of
from ddpm_lab.evaluation.features import FeatureNetwork
from ddpm_lab.evaluation.reference import Reference, open_reference
from ddpm_lab.models.diffusers_format import UNKNOWN, is_diffusers
from ddpm_lab.models.trained import TrainedModel, Weights, load, packaged_names
from ddpm_lab.sampling.generation import build_sampler, class_labels, generate, guidance_record, sampling_task
from ddpm_lab.sampling.image_files import check_writable
from ddpm_lab.sampling.output import MAX_IMAGES

MODEL_FIELDS = (
    "step", "weights", "weights_sha256", "sampler", "num_steps", "num_evaluations", "eta", "spacing", "singlestep",
    "variance", "num_timesteps", "schedule", "beta_convention", "seed", "batch_size", "dtype", "engine", "class",
    "guidance", "guide", "guidance_interval",
)  # fmt: skip
DEFAULT_NUM_IMAGES = 1_000


def evaluate_source(
    source: str,
    reference: str | None,
    features: str,
    num_images: int | None,
    scoring: ScoringConfig,
    sampling: SamplingConfig,
    *,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    inception_weights: Path | None = None,
    image_size: int | None = None,
    pairs: Path | None = None,
    scores: Path | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
) -> dict[str, Any] | None:
    """Score a model, or images, against a reference.

    Args:
        source: a model, see `trained.load`; or images, see `image_stream.open_images`.
        reference: see `reference.open_reference`; None: the images a model was trained on.
        features: 'inception', 'classifier', or the folder of a classifier.
        num_images: how many; None: 1,000 of a model, all of a collection.
        scoring, sampling: settings; those of sampling are for models.
        weights, checkpoint: of a model.
        inception_weights, image_size, pairs, data_dir: see `evaluation`.
        scores: a file of JSON lines that gets the record; None: `scores.jsonl` of the run, where the source is one.
    Returns:
        The record; None in a process that only helps to make it.
    Raises:
        InputError: anything of it that does not exist or does not fit.
    """
    begun = time.monotonic()
    on = str(resolve_device(device))
    processes.join(torch.device(on))
    if pairs is not None and processes.is_rank0():
        check_writable(pairs, (".png",), "--pairs")
        if "memorisation" not in scoring.metrics:
            raise InputError("--pairs is a picture of memorisation; add it to --metrics")
    if scores is not None and processes.is_rank0():
        check_writable(scores, (".jsonl",), "--scores")
        _check_appendable(scores)
    if inception_weights is not None and features != "inception":
        raise InputError(f"--inception-weights is for --features inception, not for {features}")
    images_given = _is_images(source)
    folders = [
        name for name in (source if images_given else None, reference) if name is not None and Path(name).is_dir()
    ]
    if image_size is not None and not folders:
        raise InputError("--image-size is for folders of images, and there is none")
    if images_given:
        _check_no_model_is_meant(source, sampling, weights, checkpoint)
        compared = None if reference is None else open_reference(reference, data_dir, image_size)
        channels = compared.images.shape[0] if compared is not None and compared.images is not None else None
        images = open_images(source, data_dir, image_size, channels)
        images = images if num_images is None else images.draw(num_images)
        network = feature_network(features, images.shape, compared, inception_weights, on)
        check_scoring(images.name, images.num_images, images.shape, compared, network, scoring)
        _check_floor(compared, data_dir)
        show_deferred_warnings()
        record = processes.run_on_rank0(
            lambda: evaluate(images, compared, network, scoring, data_dir=data_dir, pairs=pairs), features=network
        )
        of_model: dict[str, Any] = {"source": source, **dict.fromkeys(MODEL_FIELDS)}
    else:
        trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
        build_sampler(trained, sampling)
        if reference is None:
            compared = own_reference(trained.config, data_dir)
        else:
            size = trained.config.data.image_size if image_size is None else image_size
            compared = open_reference(reference, data_dir, size, trained.image_shape[0])
        scores = scores or (_scores_file(trained) if processes.is_rank0() else None)
        network = feature_network(features, trained.image_shape, compared, inception_weights, on)
        wanted = DEFAULT_NUM_IMAGES if num_images is None else num_images
        if wanted > MAX_IMAGES:
            raise InputError(f"num_images must be from 2 to {MAX_IMAGES}, not {wanted}")
        check_scoring(f"images of {source}", wanted, trained.image_shape, compared, network, scoring)
        _check_floor(compared, data_dir)
        show_deferred_warnings()
        record = processes.run_on_rank0(
            lambda: score_model(trained, wanted, sampling, compared, network, scoring, data_dir, pairs),
            sample=sampling_task(trained, sampling),
            features=network,
        )
        of_model = {}
    if record is None:
        return None
    record |= of_model | {"image_size": image_size, "device": on, "seconds": time.monotonic() - begun}
    if scores is not None:
        try:
            append_line(scores, record)
        except OSError as error:  # the work is not lost: here it is
            raise RunError(f"{scores} cannot be written: {error.strerror}; the record: {json.dumps(record)}") from error
    return record


def score_model(
    trained: TrainedModel,
    num_images: int,
    sampling: SamplingConfig,
    reference: Reference | None,
    network: FeatureNetwork,
    scoring: ScoringConfig,
    data_dir: Path | None = None,
    pairs: Path | None = None,
) -> dict[str, Any]:
    """Sample, or take from the cache what was sampled, and score; see `evaluation.evaluate` for the rest."""
    images = generated_images(trained, num_images, sampling)
    asked = class_labels(trained, sampling, range(num_images))
    record = evaluate(images, reference, network, scoring, data_dir=data_dir, pairs=pairs, asked=asked)
    return record | {"source": trained.name, **model_record(trained, sampling)}


def _is_images(source: str) -> bool:
    """Whether a name stands for images rather than for a model.

    Raises:
        InputError: for nothing at all.
    """
    path = Path(source)
    if source.partition(":")[0] in DATASETS and ":" in source:
        return True
    if source in packaged_names():
        return False
    if not source or not path.exists():
        raise InputError(
            f"no model or images {source!r}: give a run or checkpoint folder, the name of packaged weights "
            f"({', '.join(packaged_names())}), DATASET:SPLIT, an .npz, or a folder of images"
        )
    return not is_diffusers(path) and not any(
        (path / name).is_file() for name in ("config.json", "ema.safetensors", "model.safetensors")
    )


def _check_no_model_is_meant(source: str, sampling: SamplingConfig, weights: Weights, checkpoint: int | None) -> None:
    """Refuse settings that would have no effect on images that exist.

    Raises:
        InputError: naming them.
    """
    usual = SamplingConfig()
    given = [field.name for field in fields(sampling) if getattr(sampling, field.name) != getattr(usual, field.name)]
    given += ["weights"] * (weights != "ema") + ["checkpoint"] * (checkpoint is not None)
    flags = ["--" + name.rstrip("_").replace("_", "-") for name in given]
    if flags:
        raise InputError(f"{', '.join(flags)}: for a model, and {source} holds images")


def _check_floor(reference: Reference | None, data_dir: Path | None) -> None:
    """Fetch the floor's images now where they are missing, so that what cannot be fetched is told before the work."""
    dataset = reference.images.dataset if reference is not None and reference.images is not None else None
    if reference is not None and dataset is not None and dataset not in here(data_dir):
        reference.floor(2, data_dir)


def own_reference(config: Config, data_dir: Path | None) -> Reference:
    """The images a model is trained on.

    Raises:
        InputError: it does not say, for it was imported; or they are not here.
    """
    data = config.data
    if data.dataset == UNKNOWN:
        raise InputError("this model was imported and does not say what it was trained on; give --reference")
    load_split = partial(load_images, data.dataset, data_dir=data_dir, image_size=data.image_size)
    held_out = None if data.dataset in DATASETS else load_split("test")
    return _training_reference(data.dataset, load_split("train"), held_out)


def _training_reference(dataset: str, training_set: ImageSet, held_out: ImageSet | None) -> Reference:
    """Of a known data set the held-out images are opened by name where they are needed; of a folder, they are given."""
    if dataset in DATASETS:
        stream, others = tensor_stream(training_set.name, training_set.images, dataset, "train"), None
    else:
        assert held_out is not None
        stream, others = (tensor_stream(images.name, images.images) for images in (training_set, held_out))
    return Reference(training_set.name, stream, None, stream.sha256, others)


def _scores_file(trained: TrainedModel) -> Path | None:
    """`scores.jsonl` of the run that a checkpoint belongs to, which must be writable before any work is done for it."""
    if trained.run_dir is None:
        return None
    path = trained.run_dir / "scores.jsonl"
    _check_appendable(path)
    return path


def _check_appendable(path: Path) -> None:
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give --scores FILE.jsonl elsewhere") from error


def model_record(trained: TrainedModel, sampling: SamplingConfig) -> dict[str, Any]:
    """What a record says of the model and of how it was sampled."""
    sampler = build_sampler(trained, sampling)
    diffusion = trained.config.diffusion
    return {
        "step": trained.step,
        "weights": trained.weights,
        "weights_sha256": trained.weights_sha256,
        "sampler": sampling.sampler,
        "num_steps": sampler.num_steps,
        "num_evaluations": sampler.num_evaluations,
        "eta": sampler.config.eta,
        "spacing": sampler.config.spacing,
        "singlestep": sampling.singlestep,
        "variance": sampler.config.variance,
        "num_timesteps": diffusion.num_timesteps,
        "schedule": diffusion.schedule,
        "beta_convention": diffusion.beta_convention,
        "seed": sampling.seed,
        "batch_size": sampling.batch_size,
        "dtype": sampler.config.precision,  # precision is a score
        "engine": sampler.config.engine,
        "class": list(sampling.class_) or None,
    } | guidance_record(sampler)


def training_scorer(
    config: Config, training_set: ImageSet, held_out: ImageSet, data_dir: Path | None, device: torch.device
) -> Callable[[TrainedModel], dict[str, Any] | None] | None:
    """What a run calls now and then to score the network it trains, by a few images sampled by DDIM.

    Returns:
        A function that gives the record, or None in a process that only helps to make it; None where nothing is scored.
    Raises:
        InputError: no network for such images, told before training starts.
    """
    evaluation = config.evaluation
    if evaluation.score_every == 0:
        return None
    reference = _training_reference(config.data.dataset, training_set, held_out)
    assert reference.images is not None
    network = feature_network(evaluation.score_features, reference.images.shape, reference, None, str(device))
    replicates = 10 if evaluation.score_features == "inception" else 50  # of 2,048 features each takes seconds
    scoring = ScoringConfig(metrics=("fid", "is", "kid"), bootstrap=replicates)
    training = config.training  # each training seed is sampled from noise of its own, or their spread would lack it
    sampling = SamplingConfig(num_steps=evaluation.sample_steps, precision=training.precision, seed=training.seed)
    check_scoring("samples", evaluation.score_images, reference.images.shape, reference, network, scoring)
    if processes.is_rank0():
        features_of(reference.images, network).statistics()  # made now, so that what cannot be made is told now

    def score(trained: TrainedModel) -> dict[str, Any]:
        begun = time.monotonic()
        images = torch.cat(list(generate(trained, evaluation.score_images, sampling)))
        stream = tensor_stream(f"images of step {trained.step}", images)
        record = evaluate(stream, reference, network, scoring, data_dir=data_dir, keep=False)
        record |= {"source": trained.name, "by": "training", "device": str(device), **model_record(trained, sampling)}
        return record | {"seconds": time.monotonic() - begun}

    return lambda trained: processes.run_on_rank0(
        lambda: score(trained), sample=sampling_task(trained, sampling), features=network
    )

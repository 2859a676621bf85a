"""Score a model or images: sample where needed, compute the record, and add it to `scores.jsonl`."""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, SamplingConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError, RunError, require
from ddpm_lab.core.log import SCORES, append_line
from ddpm_lab.core.messages import listed, show_deferred_warnings
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.datasets import DATASETS, ImageSet, available_datasets, load_images
from ddpm_lab.data.image_stream import open_images, tensor_stream
from ddpm_lab.evaluation.checks import check_networks, check_scoring
from ddpm_lab.evaluation.evaluate import evaluate, evaluate_each, feature_network, generated_images
from ddpm_lab.evaluation.feature_store import compute_item, features_of
from ddpm_lab.evaluation.features import FeatureNetwork
from ddpm_lab.evaluation.record import SamplingRecord, ScoreRecord, SourceScores, TrainingRecord
from ddpm_lab.evaluation.reference import Reference, open_reference
from ddpm_lab.models.diffusers_format import UNKNOWN, is_diffusers
from ddpm_lab.models.hub import is_hub_name
from ddpm_lab.models.trained import TrainedModel, Weights, load, packaged_names
from ddpm_lab.sampling.generation import build_sampler, class_labels, generate, guidance_record, sampling_task
from ddpm_lab.sampling.image_files import check_writable
from ddpm_lab.sampling.output import MAX_IMAGES

DEFAULT_NUM_IMAGES = 1_000


def evaluate_source(
    source: str,
    reference: str | None,
    features: Sequence[str],
    num_images: int | None,
    scoring: ScoringConfig,
    sampling: SamplingConfig,
    *,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    inception_weights: Path | None = None,
    dinov2_weights: Path | None = None,
    image_size: int | None = None,
    pairs: Path | None = None,
    scores: Path | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
) -> list[ScoreRecord]:
    """Score a model, or images, against a reference; images are sampled and read once for all feature networks.

    Args:
        source: a model, as for `trained.load`; or images, as for `image_stream.open_images`.
        reference: as for `reference.open_reference`; None: the images that the model was trained on.
        features: feature networks: 'inception', 'dinov2', 'classifier', or the folder of a classifier.
        num_images: how many images to score; None: 1,000 of a model, all of a collection.
        scoring: settings of the scores.
        sampling: settings of the sampler; only for a model.
        weights, checkpoint: of the model, as for `trained.load`.
        inception_weights, dinov2_weights: as for `features.inception_network` and `dinov2.dinov2_network`.
        image_size: side in pixels to which the images of a folder are cropped and scaled; None: they stay as they are.
        pairs, data_dir: as for `evaluate.evaluate`.
        scores: a file of JSON lines to add the records to; None: `scores.jsonl` of the run, if the source is one.
        device: auto, cpu, cuda or mps.
    Returns:
        The record of each network; none in a process other than rank 0.
    Raises:
        InputError: a source, reference or setting that does not exist or does not fit the others.
        RunError: a record cannot be written; the message holds it.
    """
    begun = time.monotonic()
    on = str(resolve_device(device))
    processes.join(torch.device(on))
    if processes.is_rank0():
        if pairs is not None:
            check_writable(pairs, (".png",), "--pairs")
        if scores is not None:
            check_writable(scores, (".jsonl",), "--scores")
            _check_appendable(scores)
    require(
        pairs is None or "memorisation" in scoring.metrics,
        "--pairs shows the images that memorisation finds; add it to --metrics",
    )
    weights_of = {"inception": inception_weights, "dinov2": dinov2_weights}
    for name, file in weights_of.items():
        unused = file is not None and name not in features
        require(not unused, f"--{name}-weights is for --features {name}, not for {', '.join(features)}")
    require(len(features) > 0, "--features names no feature network")
    require(pairs is None or len(features) == 1, "--pairs shows what one network finds; give one of --features")
    is_images = _is_images(source)
    folders = [name for name in (is_images and source, reference) if name and Path(name).is_dir()]
    require(image_size is None or folders != [], "--image-size is for folders of images, and there is none")
    tasks: dict[str, Callable[..., object]] = {}
    if is_images:
        _check_no_model_settings(source, sampling, weights, checkpoint)
        compared = None if reference is None else open_reference(reference, data_dir, image_size)
        channels = compared.images.shape[0] if compared is not None and compared.images is not None else None
        images = open_images(source, data_dir, image_size, channels)
        images = images if num_images is None else images.draw(num_images)
        name, count, shape = images.name, images.num_images, images.shape
    else:
        trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
        tasks["sample"] = sampling_task(trained, sampling)
        if reference is None:
            compared = own_reference(trained.config, data_dir)
        else:
            size = trained.config.data.image_size if image_size is None else image_size
            compared = open_reference(reference, data_dir, size, trained.image_shape[0])
        if scores is None and trained.run_dir is not None and processes.is_rank0():
            scores = trained.run_dir / SCORES
            _check_appendable(scores)
        if compared.images is not None and trained.num_classes:
            _warn_of_other_classes(trained, compared.name, compared.images.class_names)
        name, shape = f"images of {source}", trained.image_shape
        count = DEFAULT_NUM_IMAGES if num_images is None else num_images
        require(count <= MAX_IMAGES, f"num_images must be from 2 to {MAX_IMAGES}, not {count}")
    networks = [feature_network(each, shape, compared, on, weights_of) for each in features]
    check_networks(networks)
    for network in networks:
        check_scoring(name, count, shape, compared, network, scoring)
    dataset = compared.images.dataset if compared is not None and compared.images is not None else None
    if compared is not None and dataset is not None and dataset not in available_datasets(data_dir):
        compared.others(data_dir)  # so that a download that fails is reported before the work
    show_deferred_warnings()

    def score() -> list[SourceScores]:
        if not is_images:
            return score_model(trained, count, sampling, compared, networks, scoring, data_dir, pairs)
        evaluations = evaluate_each(images, compared, networks, scoring, data_dir=data_dir, pairs=pairs)
        no_model = cast(SamplingRecord, dict.fromkeys(SamplingRecord.__annotations__))
        return [{**evaluation, "source": source, **no_model} for evaluation in evaluations]

    scored = processes.run_on_rank0(score, features=partial(compute_item, networks), **tasks) or []
    seconds = time.monotonic() - begun
    records: list[ScoreRecord] = [
        {**each, "image_size": image_size, "device": on, "seconds": seconds} for each in scored
    ]
    for i, record in enumerate(records):
        if scores is not None:
            try:
                append_line(scores, dict(record))
            except OSError as error:  # the message keeps the work
                rest = "; ".join(json.dumps(record) for record in records[i:])
                raise RunError(f"{scores} cannot be written: {error.strerror}; the record: {rest}") from error
    return records


def score_model(
    trained: TrainedModel,
    num_images: int,
    sampling: SamplingConfig,
    reference: Reference | None,
    networks: Sequence[FeatureNetwork],
    scoring: ScoringConfig,
    data_dir: Path | None = None,
    pairs: Path | None = None,
) -> list[SourceScores]:
    """Score a model by images sampled into the cache; the arguments are those of `evaluate.evaluate_each`."""
    images = generated_images(trained, num_images, sampling)
    labels = class_labels(trained, sampling, range(num_images))
    if any(network.class_names not in (None, trained.class_names) for network in networks):
        labels = None  # a classifier tells other classes apart
    evaluations = evaluate_each(images, reference, networks, scoring, data_dir=data_dir, pairs=pairs, asked=labels)
    sampled = sampling_record(trained, sampling)
    return [{**evaluation, "source": trained.name, **sampled} for evaluation in evaluations]


def _is_images(source: str) -> bool:
    """Whether a name stands for images rather than for a model.

    Raises:
        InputError: it stands for neither.
    """
    if source in packaged_names() or is_hub_name(source):
        return False
    path, is_split = Path(source), ":" in source and source.partition(":")[0] in DATASETS
    if not is_split and (not source or not path.exists()):
        raise InputError(
            f"no model or images {source!r}: give a run or checkpoint folder, the name of packaged weights "
            f"({', '.join(packaged_names())}), USER/NAME of the hub, DATASET:SPLIT, an .npz, or a folder of images"
        )
    files = ("config.json", "ema.safetensors", "model.safetensors")
    return is_split or not (is_diffusers(path) or any((path / name).is_file() for name in files))


def _check_no_model_settings(source: str, sampling: SamplingConfig, weights: Weights, checkpoint: int | None) -> None:
    """Refuse settings that have no effect on existing images."""
    default = SamplingConfig()
    given = [field.name for field in fields(sampling) if getattr(sampling, field.name) != getattr(default, field.name)]
    given += ["weights"] * (weights != "ema") + ["checkpoint"] * (checkpoint is not None)
    flags = ", ".join("--" + name.rstrip("_").replace("_", "-") for name in given)
    require(not given, f"{flags}: for a model, and {source} holds images")


def _warn_of_other_classes(trained: TrainedModel, reference: str, names: tuple[str, ...] | None) -> None:
    """Warn if the images of a reference are of other classes than those that a conditional network was trained on."""
    ours, theirs = set(trained.class_names), set(names or trained.class_names)
    for whose, missing in ((reference, ours - theirs), (trained.name, theirs - ours)):
        if missing:
            classes = listed(sorted(missing))
            warnings.warn(f"{whose} lacks the classes {classes}: the scores include that difference", stacklevel=3)


def own_reference(config: Config, data_dir: Path | None) -> Reference:
    """The images that a model was trained on, as a reference.

    Raises:
        InputError: the model was imported and does not name them, or they cannot be loaded.
    """
    data = config.data
    require(data.dataset != UNKNOWN, "this model was imported and does not name its training images; give --reference")
    load_split = partial(load_images, data.dataset, data_dir=data_dir, image_size=data.image_size)
    held_out = None if data.dataset in DATASETS else load_split("test")
    return _training_reference(data.dataset, load_split("train"), held_out)


def _training_reference(dataset: str, training_set: ImageSet, held_out: ImageSet | None) -> Reference:
    """Of a known data set the held-out images are opened by name when needed; of a folder, they are passed."""
    if dataset in DATASETS:
        stream, others = tensor_stream(training_set.name, training_set.images, dataset, "train"), None
    else:
        assert held_out is not None
        stream, others = (tensor_stream(images.name, images.images) for images in (training_set, held_out))
    return Reference(training_set.name, stream, None, stream.sha256, others)


def _check_appendable(path: Path) -> None:
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give --scores FILE.jsonl elsewhere") from error


def sampling_record(trained: TrainedModel, sampling: SamplingConfig) -> SamplingRecord:
    """The fields of a record that describe the model and how it was sampled."""
    sampler, diffusion = build_sampler(trained, sampling), trained.config.diffusion
    chosen = trained.class_numbers(sampling.class_)
    names = [trained.class_names[number] for number in chosen or range(trained.num_classes)]
    values = asdict(sampler.config) | {
        "step": trained.step,
        "weights": trained.weights,
        "weights_sha256": trained.weights_sha256,
        "revision": trained.revision,
        "num_evaluations": sampler.num_evaluations,
        "num_timesteps": diffusion.num_timesteps,
        "schedule": diffusion.schedule,
        "beta_convention": diffusion.beta_convention,
        "dtype": sampler.config.precision,
        "class": list(chosen) or None,
        "class_names": names if trained.num_classes and sampling.guidance != 0 else None,
        **guidance_record(sampler),
    }
    return cast(SamplingRecord, {name: values[name] for name in SamplingRecord.__annotations__})


def training_scorer(
    config: Config, training_set: ImageSet, held_out: ImageSet, data_dir: Path | None, device: torch.device
) -> Callable[[TrainedModel], dict[str, Any] | None] | None:
    """The function that a run calls at intervals to score its network by a few images sampled with DDIM.

    Returns:
        A function that returns a `TrainingRecord`, or None in a process other than rank 0; None if `score_every` is 0.
    Raises:
        InputError: no feature network takes such images; raised before training starts.
    """
    evaluation = config.evaluation
    if evaluation.score_every == 0:
        return None
    reference = _training_reference(config.data.dataset, training_set, held_out)
    assert reference.images is not None
    network = feature_network(evaluation.score_features, reference.images.shape, reference, str(device))
    replicates = 10 if evaluation.score_features == "inception" else 50  # with 2,048 features each takes seconds
    scoring = ScoringConfig(metrics=("fid", "is", "kid"), bootstrap=replicates)
    training = config.training  # each training seed samples from its own noise, so that their spread includes it
    sampling = SamplingConfig(num_steps=evaluation.sample_steps, precision=training.precision, seed=training.seed)
    check_scoring("samples", evaluation.score_images, reference.images.shape, reference, network, scoring)
    if processes.is_rank0():
        features_of(reference.images, network).statistics()  # so that any fault is reported before training

    def score(trained: TrainedModel) -> TrainingRecord:
        begun = time.monotonic()
        images = torch.cat(list(generate(trained, evaluation.score_images, sampling)))
        stream = tensor_stream(f"images of step {trained.step}", images)
        scores = evaluate(stream, reference, network, scoring, data_dir=data_dir, keep=False)
        return {
            **scores,
            "source": trained.name,
            "by": "training",
            "device": str(device),
            **sampling_record(trained, sampling),
            "seconds": time.monotonic() - begun,
        }

    return lambda trained: processes.run_on_rank0(
        lambda: dict(score(trained)), sample=sampling_task(trained, sampling), features=partial(compute_item, [network])
    )

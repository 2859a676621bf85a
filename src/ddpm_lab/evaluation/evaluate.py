"""Score images against a reference; the result is a record that names everything its numbers depend on.

A score is never a bare number: the record (see `record.Evaluation`) names the images, the reference, the network, the
settings, and the floor: the scores of real images outside the reference. Invariant: a score is a function of the images
and the settings; caches change only how long it takes.
"""

import hashlib
import platform
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import cache_dir
from ddpm_lab.core.progress import progress
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.image_folder import unreadable
from ddpm_lab.data.image_stream import ImageStream, open_images, tensor_stream
from ddpm_lab.evaluation import metrics
from ddpm_lab.evaluation.feature_store import Features, features_of
from ddpm_lab.evaluation.features import FeatureNetwork, classifier_network, describe_shape, inception_network
from ddpm_lab.evaluation.neighbours import manifold, memorisation
from ddpm_lab.evaluation.record import Classes, Evaluation, Findings, Floor, Interval, Scores
from ddpm_lab.evaluation.reference import MIN_IMAGES, Reference, open_reference
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.sampling.output import sample_to_folder, sampling_identity

CONFIDENCE_THRESHOLD = 0.9  # probability from which the classifier counts as sure of a class
PUBLISHED_IMAGES = 50_000  # images behind a published FID, and in its reference
MIN_HELD_OUT = 100  # images for memorisation, which needs the nearest 1 % of them
PACKAGES = ("ddpm-lab", "torch", "numpy", "torch-fidelity")  # whose versions a record holds
DATASET_OF_SHAPE = {(1, 28, 28): "mnist", (3, 32, 32): "cifar10", (1, 8, 8): "digits"}
_floors: dict[tuple[Any, ...], dict[str, float | None]] = {}  # computed once for all scores of a run


def feature_network(
    features: str, shape: tuple[int, int, int], reference: Reference | None, weights: Path | None, device: str
) -> FeatureNetwork:
    """Open a feature network by name.

    Args:
        features: 'inception'; 'classifier' (the packaged one of the reference's data set, else the one for this image
            shape); or the folder or file that `ddpm classifier` wrote.
        shape: (C, H, W) of the images.
        weights: weights of Inception; None: as for `inception_network`.
    Raises:
        InputError: there is no such network, or its weights are damaged.
    """
    if features == "inception":
        return inception_network(weights, device)
    if features == "classifier":
        dataset = reference.images.dataset if reference is not None and reference.images is not None else None
        features = dataset or DATASET_OF_SHAPE.get(shape, "")
        require(
            features != "", f"no packaged classifier takes images of {shape}; give --features inception, or a folder"
        )
    return classifier_network(features, device)


def generated_images(trained: TrainedModel, num_images: int, config: SamplingConfig) -> ImageStream:
    """Sample images into the cache; images that an earlier call sampled are kept, damaged ones are replaced."""
    identity = sampling_identity(trained, config)
    key = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:40]
    folder = cache_dir() / "generated" / key
    sample = partial(sample_to_folder, trained, folder, num_images, config, wait=True, option="DDPM_CACHE_DIR")
    sample()
    if damaged := unreadable(folder):
        for path in damaged:
            path.unlink()
        sample()
    images = open_images(str(folder), channels=trained.image_shape[0]).take(num_images)
    return replace(images, name=f"images of {trained.name}")  # the path in the cache means nothing to others


def evaluate(
    images: ImageStream | Tensor,
    reference: Reference | str | None,
    network: FeatureNetwork,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 (frozen)
    *,
    data_dir: Path | None = None,
    pairs: Path | None = None,
    keep: bool = True,
    asked: Tensor | None = None,
) -> Evaluation:
    """Score images.

    Args:
        images: a stream, or (N, C, H, W) uint8.
        reference: a reference or its name, see `open_reference`; None where only the Inception Score is computed.
        network: the feature network, see `features`.
        config: the scores to compute, and their settings.
        data_dir: as for `data.load_images`.
        pairs: path for a picture of the images closest to training images; None: no picture.
        keep: whether to keep the features of the images in the cache.
        asked: (N,) int64, the class that each image was conditioned on; the record of a classifier then says how often
            it agrees.
    Returns:
        The record, ready for JSON.
    Raises:
        InputError: images, reference, network and settings do not fit each other.
    """
    stream = tensor_stream("images", images) if isinstance(images, Tensor) else images
    compared = open_reference(reference, data_dir) if isinstance(reference, str) else reference
    check_scoring(stream.name, stream.num_images, stream.shape, compared, network, config)
    floor_images = compared.floor(stream.num_images, data_dir) if compared is not None else None
    features = features_of(stream, network, keep)
    real_images = compared.images if compared is not None else None
    comparing = set(config.metrics) != {"is"}
    real = features_of(real_images, network) if comparing and real_images is not None else None
    real_statistics = compared.given if compared is not None else None
    if real is not None and "fid" in config.metrics:
        real_statistics = real.statistics()
    floor: Floor | None = None
    if compared is not None and floor_images is not None:
        settings = replace(config, bootstrap=0)
        key = (floor_images.sha256, compared.sha256, network.key, settings)
        if not network.persistent or key not in _floors:
            values = _scores(features_of(floor_images, network), real, real_statistics, settings)
            _floors[key] = {name: interval and interval["value"] for name, interval in values.items()}
        floor = {
            **cast(Scores[float | None], _floors[key]),
            "images": floor_images.name,
            "num_images": floor_images.num_images,
        }
    scores = _scores(features, real, real_statistics, config)
    findings: Findings = {}
    if features.logits is not None and network.distance == "FD-classifier":
        findings["classes"] = class_shares(features.logits, asked)
    if "memorisation" in config.metrics and compared is not None and real_images is not None:
        others = compared.others(data_dir)
        assert real is not None
        assert others is not None
        held_out = features_of(others, network).values
        with progress("nearest training images", 2 * len(features.values) + len(held_out), "images") as advance:
            findings["memorisation"] = memorisation(features.values, real.values, held_out, on_rows=advance)
        if pairs is not None:
            closest = findings["memorisation"]["closest"]
            rows = [_pick(stream, [int(i) for i, *_ in closest]), _pick(real_images, [int(j) for _, j, _ in closest])]
            save_png(pairs, image_grid(torch.cat(rows), len(closest), visible_scale(stream.shape[1])))
    return {
        **cast(Scores[Interval | None], scores),
        "fid_label": fid_label(network, stream.num_images, real_images.num_images if real_images is not None else None),
        "num_images": stream.num_images,
        "images": {"name": stream.name, "sha256": stream.sha256, "drawn_from": stream.drawn_from},
        "reference": compared.record() if compared is not None else None,
        "features": {
            "name": network.name,
            "sha256": network.sha256,
            "library": network.library,
            "version": network.version,
            "num_features": features.values.shape[1],
            "num_classes": features.logits.shape[1] if features.logits is not None else None,
            **network.details,
        },
        "floor": floor,
        **findings,
        "scoring": asdict(config),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def check_scoring(
    name: str,
    num_images: int,
    shape: tuple[int, int, int],
    reference: Reference | None,
    network: FeatureNetwork,
    config: ScoringConfig,
) -> None:
    """Check before any work that images can be scored.

    Args:
        name, num_images, shape: of the images, which need not exist yet; shape is (C, H, W).
        reference, network, config: as for `evaluate`.
    Raises:
        InputError: the images do not fit the reference, the network or the settings.
    """
    real = reference.images if reference is not None else None
    num_real = real.num_images if real is not None else None
    compared = [metric for metric in config.metrics if metric != "is"]
    if num_real is not None and num_real < MIN_IMAGES:
        raise InputError(f"the reference holds too few images ({num_real}); it needs at least {MIN_IMAGES}")
    if num_images < 2:
        raise InputError(f"{name} holds too few images ({num_images}); scores need at least 2")
    network.check(name, shape)
    if "is" in config.metrics and config.is_splits > num_images:
        raise InputError(f"--is-splits of {config.is_splits} exceeds the {num_images} images of {name}")
    if reference is None:
        require(not compared, f"{', '.join(compared)} need a --reference")
        return
    if real is None:
        missing = ", ".join(metric for metric in compared if metric != "fid")
        require(not missing, f"{reference.name} holds statistics only, and {missing} need its images")
    else:
        network.check(reference.name, real.shape)
        shapes = describe_shape(shape), describe_shape(real.shape)
        require(
            shape == real.shape,
            f"{name} holds images of {shapes[0]}, and {reference.name} of {shapes[1]}: they must have one shape "
            "(--image-size scales the images of a folder)",
        )
    if "memorisation" in compared:
        if reference.held_out is None and (real is None or real.split != "train"):
            raise InputError(
                "memorisation needs the training images as --reference: mnist:train, cifar10:train or digits:train, "
                f"not {reference.name}"
            )
        num_held_out = reference.held_out.num_images if reference.held_out is not None else MIN_HELD_OUT
        if num_held_out < MIN_HELD_OUT:
            raise InputError(f"memorisation needs {MIN_HELD_OUT} held-out images, and there are {num_held_out}")
    if "prdc" in compared and num_images < MIN_IMAGES:
        raise InputError(f"prdc needs at least {MIN_IMAGES} images, not {num_images}; give more, or leave it out")
    if reference.given is not None:
        given, computed = len(reference.given.mean), network(torch.zeros(2, *shape, dtype=torch.uint8))[0].shape[1]
        message = f"{reference.name} has {given} features, {network.name} {computed}: they are of another network"
        require(given == computed, message)
    limit = min(num_images, num_real or num_images)
    if "kid" in compared and (config.kid_subset_size or 2) > limit:
        raise InputError(f"--kid-subset-size of {config.kid_subset_size} exceeds the {limit} images there are")


def fid_label(network: FeatureNetwork, num_images: int, num_reference: int | None) -> str:
    """The name of the Frechet distance, with the numbers of images where there are fewer than 50,000.

    Args:
        network: the feature network.
        num_images: number of images scored.
        num_reference: number of reference images; None: unknown, as for published statistics.
    """
    few = num_reference is not None and num_reference < PUBLISHED_IMAGES
    if num_images >= PUBLISHED_IMAGES and not few:
        return network.distance
    return f"{network.distance} (n={num_images:,}{f' against {num_reference:,}' if few else ''})"


def _scores(
    features: Features, real: Features | None, real_statistics: metrics.Statistics | None, config: ScoringConfig
) -> dict[str, Interval | None]:
    """The scores, see `record.Scores`; null where not asked for. Without a bootstrap the intervals have no ends."""
    N, replicates = len(features.values), config.bootstrap
    scores: dict[str, Interval | None] = dict.fromkeys(Scores.__annotations__)
    if "fid" in config.metrics:
        assert real_statistics is not None
        with progress("Frechet distances", replicates + 1, "distances") as advance:
            scores["fid"] = metrics.bootstrap_interval(
                lambda rows: metrics.frechet_distance(metrics.statistics(features.values, rows), real_statistics),
                N,
                replicates,
                on_score=partial(advance, 1),
            )
        if max(10 * features.values.shape[1], 20) <= N:  # with fewer images the bias is not linear in 1/n
            extrapolated = metrics.extrapolated_frechet_distance(features.values, real_statistics)
            scores["fid_extrapolated"] = Interval(value=extrapolated, low=None, high=None)
    if "is" in config.metrics:
        logits = features.logits
        if logits is None:
            raise InputError("the Inception Score needs a network that gives logits; leave is out of the metrics")
        with progress("Inception Scores", 2 * (replicates + 1), "scores") as advance:
            for name, splits in (("inception_score", min(config.is_splits, N)), ("inception_score_whole", 1)):
                score = partial(_mean_inception_score, logits, splits)
                scores[name] = metrics.bootstrap_interval(score, N, replicates, on_score=partial(advance, 1))
    if "kid" in config.metrics:
        assert real is not None
        size = min(config.kid_subset_size or 1000, N, len(real.values))
        with progress("kernel distances", config.kid_subsets, "subsets") as advance:
            value, spread = metrics.kernel_distance(
                features.values, real.values, config.kid_subsets, size, on_subset=partial(advance, 1)
            )
        scores["kid"] = Interval(value=value, low=None, high=None)
        if replicates:  # two sources of variance: the images drawn, and the subsets drawn from them
            deviation = metrics.kernel_distance_deviation(features.values, real.values, replicates)
            half = metrics.Z95 * float(np.hypot(deviation, spread / config.kid_subsets**0.5))
            scores["kid"] = metrics.symmetric_interval(value, half)
    if "prdc" in config.metrics:
        assert real is not None
        n = min(N, len(real.values))
        generated, sample = (_subset(values, n) for values in (features.values, real.values))
        with progress("neighbours", 4 * n, "images") as advance:
            measures = manifold(generated, sample, on_rows=advance)
        for name, interval in measures.items():
            scores[name] = interval if replicates else Interval(value=interval["value"], low=None, high=None)
    return scores


def _mean_inception_score(logits: Tensor, splits: int, rows: Tensor) -> float:
    return metrics.inception_score(logits, splits, indices=rows)[0]


def _subset(features: Tensor, n: int, seed: int = 0) -> Tensor:
    """n random rows; all rows, in order, where there are n."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features if n == len(features) else features[order[:n]]


def class_shares(logits: Tensor, labels: Tensor | None = None) -> Classes:
    """How a classifier labels images.

    Args:
        logits: (N, K).
        labels: (N,) int64, the classes that the images were conditioned on; None: unconditional.
    """
    probability, predicted = logits.double().softmax(1).max(1)
    counts = torch.bincount(predicted, minlength=logits.shape[1])
    classes: Classes = {
        "shares": (counts / len(predicted)).tolist(),
        "sure": float((probability > CONFIDENCE_THRESHOLD).double().mean()),
        "sure_above": CONFIDENCE_THRESHOLD,
    }
    if labels is not None:
        classes["as_asked"] = float((predicted == labels.cpu()).double().mean())
    return classes


def _pick(images: ImageStream, indices: list[int]) -> Tensor:
    """Some images of a stream, in the order of the indices."""
    found: dict[int, Tensor] = {}
    first = 0
    for batch in images.batches():
        found |= {i: batch[i - first] for i in indices if first <= i < first + len(batch)}
        first += len(batch)
    return torch.stack([found[i] for i in indices])

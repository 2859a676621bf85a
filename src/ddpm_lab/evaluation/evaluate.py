"""Score images against a reference; the result is a record that names everything its numbers depend on.

A score is never a bare number: the record (see `record.Evaluation`) names the images, the reference, the network, the
settings, and the floor: the scores of real images outside the reference. Invariant: a score is a function of the images
and the settings; caches change only how long it takes.
"""

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
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
from ddpm_lab.evaluation.checks import applicable, check_networks, check_scoring
from ddpm_lab.evaluation.dinov2 import dinov2_network
from ddpm_lab.evaluation.feature_store import Features, features_of_each
from ddpm_lab.evaluation.features import FeatureNetwork, classifier_network, inception_network
from ddpm_lab.evaluation.neighbours import manifold, memorisation
from ddpm_lab.evaluation.record import Classes, Evaluation, Findings, Floor, Interval, Scores
from ddpm_lab.evaluation.reference import Reference, open_reference
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.sampling.output import sample_to_folder, sampling_identity

CONFIDENCE_THRESHOLD = 0.9  # probability from which the classifier counts as sure of a class
PUBLISHED_IMAGES = 50_000  # images behind a published FID, and in its reference
MOST_BYTES_IN_MEMORY = 2**28  # of sampled images
PACKAGES = ("ddpm-lab", "torch", "numpy", "torch-fidelity")  # whose versions a record holds
DATASET_OF_SHAPE = {(1, 28, 28): "mnist", (3, 32, 32): "cifar10", (1, 8, 8): "digits"}
_floors: dict[tuple[Any, ...], dict[str, float | None]] = {}  # computed once for all scores of a run


def feature_network(
    features: str,
    shape: tuple[int, int, int],
    reference: Reference | None,
    device: str,
    weights: Mapping[str, Path | None] = MappingProxyType({}),
) -> FeatureNetwork:
    """Open a feature network by name.

    Args:
        features: 'inception'; 'dinov2'; 'classifier' (the packaged one of the reference's data set, else the one for
            this image shape); or the folder or file that `ddpm classifier` wrote.
        shape: (C, H, W) of the images.
        weights: the files of 'inception' and 'dinov2'; None or absent: as for `inception_network`, `dinov2_network`.
    Raises:
        InputError: there is no such network, or its weights are damaged.
    """
    if features == "inception":
        return inception_network(weights.get(features), device)
    if features == "dinov2":
        return dinov2_network(weights.get(features), device)
    if features == "classifier":
        dataset = reference.images.dataset if reference is not None and reference.images is not None else None
        features = dataset or DATASET_OF_SHAPE.get(shape, "")
        require(
            features != "", f"no packaged classifier takes images of {shape}; give --features inception, or a folder"
        )
    return classifier_network(features, device)


def generated_images(trained: TrainedModel, num_images: int, config: SamplingConfig) -> ImageStream:
    """Sample images into the cache; images that an earlier call sampled are kept, damaged ones are replaced.

    Where all are sampled now and few enough for the memory, they are not read from their files again.
    """
    identity = sampling_identity(trained, config)
    key = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:40]
    folder, name = cache_dir() / "generated" / key, f"images of {trained.name}"  # to others the path means nothing
    in_memory, sampled = num_images * math.prod(trained.image_shape) <= MOST_BYTES_IN_MEMORY, list[Tensor]()
    sample = partial(sample_to_folder, trained, folder, num_images, config, wait=True, option="DDPM_CACHE_DIR")
    sample(on_batch=sampled.append if in_memory else lambda images: None)
    if sum(map(len, sampled)) == num_images:
        return tensor_stream(name, torch.cat(sampled))
    if damaged := unreadable(folder):
        for path in damaged:
            path.unlink()
        sample()
    return replace(open_images(str(folder), channels=trained.image_shape[0]).take(num_images), name=name)


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
    (record,) = evaluate_each(
        images, reference, [network], config, data_dir=data_dir, pairs=pairs, keep=keep, asked=asked
    )
    return record


def evaluate_each(
    images: ImageStream | Tensor,
    reference: Reference | str | None,
    networks: Sequence[FeatureNetwork],
    config: ScoringConfig,
    *,
    data_dir: Path | None = None,
    pairs: Path | None = None,
    keep: bool = True,
    asked: Tensor | None = None,
) -> list[Evaluation]:
    """Score images over several feature networks, and read them once: a record for each network, as by `evaluate`."""
    stream = tensor_stream("images", images) if isinstance(images, Tensor) else images
    compared = open_reference(reference, data_dir) if isinstance(reference, str) else reference
    check_networks(networks)
    for network in networks:
        check_scoring(stream.name, stream.num_images, stream.shape, compared, network, config)
    require(pairs is None or len(networks) == 1, "--pairs shows what one network finds; give one of --features")
    settings = [applicable(config, network) for network in networks]
    floor_images = compared.floor(stream.num_images, data_dir) if compared is not None else None
    others = compared.others(data_dir) if compared is not None and "memorisation" in config.metrics else None
    features = features_of_each(stream, networks, keep)
    real_images = compared.images if compared is not None else None
    real = _features(real_images if set(config.metrics) != {"is"} else None, networks)
    held_out = _features(others, networks)
    real_statistics = [compared.given if compared is not None else None] * len(networks)
    if "fid" in config.metrics and real_images is not None:
        real_statistics = [each.statistics() if each is not None else None for each in real]
    floors: list[Floor | None] = [None] * len(networks)
    if compared is not None and floor_images is not None:
        keys = [
            (floor_images.sha256, compared.sha256, network.key, replace(own, bootstrap=0))
            for network, own in zip(networks, settings, strict=True)
        ]
        new = [i for i, key in enumerate(keys) if not networks[i].persistent or key not in _floors]
        found = features_of_each(floor_images, networks) if new else []
        for i in new:
            values = _scores(found[i], real[i], real_statistics[i], keys[i][-1])
            _floors[keys[i]] = {name: interval and interval["value"] for name, interval in values.items()}
        counted = {"images": floor_images.name, "num_images": floor_images.num_images}
        floors = [cast(Floor, _floors[key] | counted) for key in keys]
    records: list[Evaluation] = []
    for i, network in enumerate(networks):
        logits = features[i].logits
        scores = _scores(features[i], real[i], real_statistics[i], settings[i])
        findings: Findings = {}
        if logits is not None and network.distance == "FD-classifier":
            findings["classes"] = class_shares(logits, asked)
        if (known := real[i]) is not None and (unseen := held_out[i]) is not None:
            count = 2 * len(features[i].values) + len(unseen.values)
            with progress("nearest training images", count, "images") as advance:
                near = memorisation(features[i].values, known.values, unseen.values, on_rows=advance)
            findings["memorisation"] = near
            if pairs is not None and real_images is not None:
                rows = [
                    _pick(images, [int(pair[k]) for pair in near["closest"]])
                    for k, images in enumerate((stream, real_images))
                ]
                save_png(pairs, image_grid(torch.cat(rows), len(rows[0]), visible_scale(stream.shape[1])))
        record: Evaluation = {
            **cast(Scores[Interval | None], scores),
            "fid_label": fid_label(network, stream.num_images, real_images.num_images if real_images else None),
            "num_images": stream.num_images,
            "images": {"name": stream.name, "sha256": stream.sha256, "drawn_from": stream.drawn_from},
            "reference": compared.record() if compared is not None else None,
            "features": {
                "name": network.name,
                "sha256": network.sha256,
                "library": network.library,
                "version": network.version,
                "num_features": features[i].values.shape[1],
                "num_classes": logits.shape[1] if logits is not None else None,
                **network.details,
            },
            "floor": floors[i],
            **findings,
            "scoring": asdict(settings[i]),
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        }
        records.append(record)
    return records


def _features(images: ImageStream | None, networks: Sequence[FeatureNetwork]) -> Sequence[Features | None]:
    return [None] * len(networks) if images is None else features_of_each(images, networks)


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
    if {"prdc", "mind"} & set(config.metrics):
        assert real is not None
        n = min(N, len(real.values))
        generated, sample = (_subset(values, n) for values in (features.values, real.values))
    if "mind" in config.metrics:
        directions = config.mind_directions
        with progress("sliced distances", directions, "directions") as advance:
            scores["mind"] = metrics.monge_distance(generated, sample, directions, replicates, on_directions=advance)
    if "prdc" in config.metrics:
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

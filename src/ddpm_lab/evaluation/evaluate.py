"""`ddpm evaluate`: images against a reference, as a record that says all that its numbers depend on.

A score is never a bare number: the record names the images, the reference, the network, the settings, and the floor,
which is what real images that were not trained on score in the same way. Invariant: a score is a function of the images
and the settings; caches change how long it takes, and nothing else.
"""

import hashlib
import platform
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig, ScoringConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import cache_dir
from ddpm_lab.core.progress import progress
from ddpm_lab.data.image_folder import unreadable
from ddpm_lab.data.image_stream import ImageStream, open_images, tensor_stream
from ddpm_lab.evaluation.feature_store import Features, features_of
from ddpm_lab.evaluation.features import FeatureNetwork, classifier_network, describe_shape, inception_network
from ddpm_lab.evaluation.metrics import (
    Interval,
    Statistics,
    bootstrap_interval,
    extrapolated_frechet_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_deviation,
    statistics,
)
from ddpm_lab.evaluation.neighbours import manifold, memorisation
from ddpm_lab.evaluation.reference import MIN_IMAGES, Reference, open_reference
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.sampling.output import sample_to_folder, sampling_identity

SCORES = (
    "fid", "fid_extrapolated", "inception_score", "inception_score_whole", "kid",
    "precision", "recall", "density", "coverage",
)  # fmt: skip
CONFIDENCE_THRESHOLD = 0.9  # of its class: how probable the classifier must find it
_floors: dict[tuple[Any, ...], dict[str, Any]] = {}  # one for all scores of a run, which differ in their images only
PUBLISHED = 50_000  # images behind a published FID, and in its reference
FEWEST_HELD_OUT = 100  # for memorisation, which asks how near the nearest hundredth of them lie


def feature_network(
    features: str, shape: tuple[int, int, int], reference: Reference | None, weights: Path | None, device: str
) -> FeatureNetwork:
    """The network that a name stands for.

    Args:
        features: 'inception', 'classifier' (that of the reference's data set, else the one that takes such images), or
            the folder or file that `ddpm classifier` made.
        shape: (C, H, W) of the images.
        weights: of Inception; None: see `inception_network`.
    Raises:
        InputError: there is none, or its weights are damaged.
    """
    if features == "inception":
        return inception_network(weights, device)
    if features != "classifier":
        return classifier_network(features, device)
    if reference is not None and reference.images is not None and reference.images.dataset is not None:
        return classifier_network(reference.images.dataset, device)
    by_shape = {(1, 28, 28): "mnist", (3, 32, 32): "cifar10", (1, 8, 8): "digits"}
    if shape not in by_shape:
        raise InputError(f"no packaged classifier takes images of {shape}; give --features inception, or a folder")
    return classifier_network(by_shape[shape], device)


def generated_images(trained: TrainedModel, num_images: int, config: SamplingConfig) -> ImageStream:
    """Sample what is to be scored, into the cache: what an earlier call has made is not made again."""
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
    return replace(images, name=f"images of {trained.name}")  # a path in somebody's cache says nothing to others


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
) -> dict[str, Any]:
    """Score images.

    Args:
        images: a stream, or (N, C, H, W) uint8.
        reference: or its name, see `open_reference`; None where only the Inception Score is asked for.
        network: see `features`.
        config: which scores, and their settings.
        data_dir: see `data.load_images`.
        pairs: where to save a picture of the samples nearest to training images; None: nowhere.
        keep: whether the features of the images stay in the cache.
        asked: (N,) int64, the class that each image was asked for; a classifier then says how often it agrees.
    Returns:
        The record: each score as {value, low, high} or None, and all that they depend on, ready for JSON.
    Raises:
        InputError: images, reference, network and settings do not fit each other.
    """
    stream = tensor_stream("images", images) if isinstance(images, Tensor) else images
    compared = open_reference(reference, data_dir) if isinstance(reference, str) else reference
    check_scoring(stream.name, stream.num_images, stream.shape, compared, network, config)
    floor = compared.floor(stream.num_images, data_dir) if compared is not None else None
    found = features_of(stream, network, keep)
    comparing = set(config.metrics) - {"is"}
    there = compared.images if comparing and compared is not None else None
    against = None if there is None else features_of(there, network)
    known = compared.given if compared is not None else None
    if against is not None and "fid" in config.metrics:
        known = against.statistics()
    floor_scores = None
    if floor is not None and compared is not None:
        settings = replace(config, bootstrap=0)
        asked_for = (floor.sha256, compared.sha256, network.key, settings)
        if not network.persistent or asked_for not in _floors:
            values = _scores(features_of(floor, network), against, known, settings)
            _floors[asked_for] = {name: interval and interval["value"] for name, interval in values.items()}
        floor_scores = _floors[asked_for] | {"images": floor.name, "num_images": floor.num_images}
    record: dict[str, Any] = _scores(found, against, known, config)
    there_are = compared.images.num_images if compared is not None and compared.images is not None else None
    record["fid_label"] = fid_label(network, stream.num_images, there_are)
    record["num_images"] = stream.num_images
    record["images"] = {"name": stream.name, "sha256": stream.sha256, "drawn_from": stream.drawn_from}
    record["reference"] = compared and {
        "name": compared.name,
        **{name: getattr(compared.images, name, None) for name in ("dataset", "split", "num_images")},
        "sha256": compared.sha256,
    }
    record["features"] = {
        "name": network.name,
        "sha256": network.sha256,
        "library": network.library,
        "version": network.version,
        "num_features": found.values.shape[1],
        "num_classes": None if found.logits is None else found.logits.shape[1],
        **network.details,
    }
    record["floor"] = floor_scores
    if found.logits is not None and network.distance == "FD-classifier":
        record["classes"] = class_shares(found.logits, asked)
    if "memorisation" in config.metrics and compared is not None and compared.images is not None:
        others = compared.others(data_dir)
        assert against is not None
        assert others is not None
        usual = features_of(others, network).values
        with progress("nearest training images", 2 * len(found.values) + len(usual), "images") as advance:
            record["memorisation"], closest = memorisation(found.values, against.values, usual, on_rows=advance)
        if pairs is not None:
            rows = [_pick(stream, [i for i, *_ in closest]), _pick(compared.images, [j for _, j, _ in closest])]
            save_png(pairs, image_grid(torch.cat(rows), len(closest), visible_scale(stream.shape[1])))
    record["scoring"] = asdict(config)
    record["versions"] = {name: version(name) for name in ("ddpm-lab", "torch", "numpy", "torch-fidelity")} | {
        "python": platform.python_version()
    }
    return record


def check_scoring(
    name: str,
    num_images: int,
    shape: tuple[int, int, int],
    reference: Reference | None,
    network: FeatureNetwork,
    config: ScoringConfig,
) -> None:
    """Refuse, before any work, what cannot be scored.

    Args:
        name, num_images, shape: of the images, which need not exist yet; shape is (C, H, W).
    Raises:
        InputError: they do not fit the reference, the network or the settings.
    """
    if reference is not None and reference.images is not None and reference.images.num_images < MIN_IMAGES:
        raise InputError(
            f"reference {reference.name} holds {reference.images.num_images} images; {MIN_IMAGES} are the fewest"
        )
    if num_images < 2:
        raise InputError(f"{name} holds {num_images} image{'s' * (num_images != 1)}; scores need at least 2")
    network.check(name, shape)
    comparing = [metric for metric in config.metrics if metric != "is"]
    if "is" in config.metrics and config.is_splits > num_images:
        raise InputError(f"--is-splits of {config.is_splits} exceeds the {num_images} images of {name}")
    if reference is None:
        if comparing:
            raise InputError(f"{', '.join(comparing)} need a --reference")
        return
    if reference.images is None:
        missing = [metric for metric in comparing if metric != "fid"]
        if missing:
            raise InputError(
                f"reference {reference.name} holds statistics only, and {', '.join(missing)} need its images; "
                "give --metrics fid,is"
            )
    else:
        network.check(reference.name, reference.images.shape)
        if shape != reference.images.shape:
            raise InputError(
                f"{name} holds images of {describe_shape(shape)}, and {reference.name} of "
                f"{describe_shape(reference.images.shape)}: they must be alike (--image-size brings a folder to a size)"
            )
    if "memorisation" in config.metrics:
        trained_on = reference.images is not None and reference.images.split == "train"
        if not trained_on and reference.held_out is None:
            raise InputError(
                f"memorisation needs the training images and the test images as reference: mnist:train, cifar10:train "
                f"or digits:train, not {reference.name}"
            )
        if reference.held_out is not None and reference.held_out.num_images < FEWEST_HELD_OUT:
            raise InputError(
                f"memorisation needs {FEWEST_HELD_OUT} images that were not trained on; {reference.held_out.name} "
                f"holds {reference.held_out.num_images}"
            )
    if "prdc" in config.metrics and num_images < MIN_IMAGES:
        raise InputError(f"prdc needs at least {MIN_IMAGES} images, not {num_images}; give more or leave it out")
    if reference.given is not None:
        there, own = len(reference.given.mean), network(torch.zeros(2, *shape, dtype=torch.uint8))[0].shape[1]
        words = f"{reference.name} has {there} features, {network.name} {own}: they are of another network"
        if there != own:
            raise InputError(words)
    limit = min(num_images, reference.images.num_images if reference.images is not None else num_images)
    if "kid" in config.metrics and (config.kid_subset_size or 2) > limit:
        raise InputError(f"--kid-subset-size of {config.kid_subset_size} exceeds the {limit} images there are")


def fid_label(network: FeatureNetwork, num_images: int, num_reference: int | None) -> str:
    """What the Frechet distance is called: with the number of images wherever there are fewer than 50,000.

    Args:
        num_reference: of the reference; None: not known, as of statistics that others published.
    """
    few = num_reference is not None and num_reference < PUBLISHED
    if num_images >= PUBLISHED and not few:
        return network.distance
    return f"{network.distance} (n={num_images:,}{f' against {num_reference:,}' if few else ''})"


def _scores(
    found: Features, against: Features | None, known: Statistics | None, config: ScoringConfig
) -> dict[str, Any]:
    """The scores asked for, each {value, low, high}, None where not asked for; without a bootstrap no low and high."""
    N, replicates = len(found.values), config.bootstrap
    scores: dict[str, Any] = dict.fromkeys(SCORES)

    def put(name: str, interval: Interval | float) -> None:
        whole = interval if isinstance(interval, Interval) else Interval(interval, None, None)
        scores[name] = asdict(whole)

    if "fid" in config.metrics:
        assert known is not None

        with progress("Frechet distances", replicates + 1, "distances") as advance:

            def distance(rows: Tensor) -> float:
                value = frechet_distance(statistics(found.values, rows), known)
                advance(1)
                return value

            put("fid", bootstrap_interval(distance, N, replicates))
        if max(10 * found.values.shape[1], 20) <= N:  # with fewer the bias is no line in 1/n
            put("fid_extrapolated", extrapolated_frechet_distance(found.values, known))
    if "is" in config.metrics:
        logits = found.logits
        if logits is None:
            raise InputError("the Inception Score needs a network that gives logits; leave is out of the metrics")
        with progress("Inception Scores", 2 * (replicates + 1), "scores") as advance:
            for name, splits in (("inception_score", min(config.is_splits, N)), ("inception_score_whole", 1)):

                def score(rows: Tensor, splits: int = splits) -> float:
                    assert logits is not None
                    value = inception_score(logits, splits, indices=rows)[0]
                    advance(1)
                    return value

                put(name, bootstrap_interval(score, N, replicates))
    if "kid" in config.metrics:
        assert against is not None
        size = min(config.kid_subset_size or 1000, N, len(against.values))
        with progress("kernel distances", config.kid_subsets, "subsets") as advance:
            value, spread = kernel_distance(
                found.values, against.values, config.kid_subsets, size, on_subset=partial(advance, 1)
            )
        if replicates:  # of the images drawn, and of the subsets drawn from them
            deviation = kernel_distance_deviation(found.values, against.values, replicates)
            half = 1.96 * float(np.hypot(deviation, spread / config.kid_subsets**0.5))
            put("kid", Interval(value, value - half, value + half))
        else:
            put("kid", value)
    if "prdc" in config.metrics:
        assert against is not None
        n = min(N, len(against.values))
        generated, real = (_subset(features.values, n) for features in (found, against))
        with progress("neighbours", 4 * n, "images") as advance:
            near = manifold(generated, real, on_rows=advance)
        for name, interval in asdict(near).items():
            put(name, Interval(**interval) if replicates else interval["value"])
    return scores


def _subset(features: Tensor, n: int, seed: int = 0) -> Tensor:
    """n rows chosen at random, all of them where there are no more."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features if n == len(features) else features[order[:n]]


def class_shares(logits: Tensor, asked: Tensor | None = None) -> dict[str, Any]:
    """What the classifier sees: the share of images in each class, of sure ones, and of those as asked for."""
    probability, label = logits.double().softmax(1).max(1)
    counts = torch.bincount(label, minlength=logits.shape[1])
    return {
        "shares": (counts / len(label)).tolist(),
        "sure": float((probability > CONFIDENCE_THRESHOLD).double().mean()),
        "sure_above": CONFIDENCE_THRESHOLD,
        **({} if asked is None else {"as_asked": float((label == asked.cpu()).double().mean())}),
    }


def _pick(images: ImageStream, indices: list[int]) -> Tensor:
    """Some images of a stream, in the order of the indices."""
    found: dict[int, Tensor] = {}
    first = 0
    for batch in images.batches():
        found |= {i: batch[i - first] for i in indices if first <= i < first + len(batch)}
        first += len(batch)
    return torch.stack([found[i] for i in indices])

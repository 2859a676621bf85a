"""Checks of images, reference, networks and settings against each other, before any work."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.evaluation.features import FeatureNetwork, describe_shape
from ddpm_lab.evaluation.reference import MIN_IMAGES, Reference

MIN_HELD_OUT = 100  # images for memorisation, which needs the nearest 1 % of them


def applicable(config: ScoringConfig, network: FeatureNetwork) -> ScoringConfig:
    """The settings, without the Inception Score where the network has no classes."""
    if network.classifies or "is" not in config.metrics:
        return config
    others = tuple(metric for metric in config.metrics if metric != "is")
    require(others != (), f"the Inception Score needs classes, and features {network.name} have none")
    return replace(config, metrics=others)


def check_networks(networks: Sequence[FeatureNetwork]) -> None:
    """Refuse a network that is given twice.

    Raises:
        InputError: two networks are the same.
    """
    names = {network.key: network.name for network in networks}
    require(len(names) == len(networks), f"--features names {', '.join(names.values())}, and one of them twice")


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
    config = applicable(config, network)
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

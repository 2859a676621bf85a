"""Fine-tuning: a run that begins from what another network has learnt, in place of a random one."""

import dataclasses
import json
from typing import Any

import torch

from ddpm_lab.core.config import Config
from ddpm_lab.core.errors import InputError
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.training.loop import TrainingState


def begin_from(state: TrainingState, source: TrainedModel, config: Config) -> dict[str, Any]:
    """Give a new run, and its average, the parameters of a trained network.

    A network that is to be told classes may begin from one that was told none: what it adds for each class is 0 at
    first, so that it begins as the very function of the other.

    Args:
        state: at step 0; changed in place.
        source: what to begin from; its chain may be another, its optimiser's moments are not taken.
        config: the new run's.
    Returns:
        What the run's `config.json` says of it: source, step, weights, sha256, variance, unconditional; the source's
        own `from` or `imported`, if any.
    Raises:
        InputError: another network, other images, or another prediction; `state` is as it was.
    """
    ours, theirs = config.model, source.config.model
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        may_differ = field.name == "dropout" or (field.name == "num_classes" and there is None)
        if here != there and not may_differ:
            raise InputError(
                f"--from {source.name} has model.{field.name} {json.dumps(there)}, not {json.dumps(here)}; "
                "a run begins from a network like its own"
            )
    if source.model.image_channels != state.model.image_channels:
        raise InputError(
            f"--from {source.name} has images of {source.model.image_channels} channels, not "
            f"{state.model.image_channels}"
        )
    if source.config.diffusion.prediction != config.diffusion.prediction:
        raise InputError(
            f"--from {source.name} predicts {source.config.diffusion.prediction}, not {config.diffusion.prediction}"
        )
    if source.config.diffusion.sigma_data != config.diffusion.sigma_data:
        raise InputError(
            f"--from {source.name} has diffusion.sigma_data {source.config.diffusion.sigma_data}, not "
            f"{config.diffusion.sigma_data}; give --diffusion.sigma-data {source.config.diffusion.sigma_data}"
        )
    learnt = dict(source.model.named_parameters())
    with torch.no_grad():
        for network in (state.model, state.ema):
            for name, parameter in network.named_parameters():
                if name in learnt:
                    parameter.copy_(learnt[name])
                else:
                    parameter.zero_()  # the classes
    found = {"source": source.name, "step": source.step, "weights": source.weights, "sha256": source.weights_sha256}
    before = {name: source.record[name] for name in ("from", "imported") if name in source.record}
    return found | {"variance": source.variance, "unconditional": source.unconditional} | before

"""Fine-tuning: a new run that starts with the weights of a trained network instead of random ones."""

import json
from typing import Any

import torch

from ddpm_lab.core.config import Config
from ddpm_lab.core.errors import InputError
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.training.loop import TrainingState
from ddpm_lab.training.resume import flat_settings


def start_from_model(state: TrainingState, source: TrainedModel, config: Config) -> dict[str, Any]:
    """Give a new run's network and its average the parameters of a trained network.

    A conditional network may start from an unconditional one: its class embedding is 0 at first, so that it is the same
    function of x_t and t for every class.

    Args:
        state: at step 0; changed in place.
        source: the trained network; its schedule may be another, and its optimizer's moments are not used.
        config: the new run's.
    Returns:
        What the run's `config.json` says of it: source, step, weights, sha256, variance, unconditional; `revision` if
        it is on the hub; and `from` or `imported` of the source, if it has them.
    Raises:
        InputError: another network, other images, or another prediction; `state` is unchanged.
    """
    old = flat_settings(source.config) | {"image channels": source.model.image_channels}
    new = flat_settings(config) | {"image channels": state.model.image_channels}
    network = [name for name in new if name.startswith("model.") and name != "model.dropout"]
    if old["model.num_classes"] is None:
        network.remove("model.num_classes")
    for name in (*network, "image channels", "diffusion.prediction", "diffusion.sigma_data"):
        if old[name] != new[name]:
            raise InputError(
                f"--from {source.name} has {name} {json.dumps(old[name])}, not {json.dumps(new[name])}; "
                "a run and the model that it starts from must agree on it"
            )
    source_parameters = dict(source.model.named_parameters())
    with torch.no_grad():
        for target in (state.model, state.ema):
            for name, parameter in target.named_parameters():
                if name in source_parameters:
                    parameter.copy_(source_parameters[name])
                else:
                    parameter.zero_()  # the class embedding
    return {
        "source": source.name,
        "step": source.step,
        "weights": source.weights,
        "sha256": source.weights_sha256,
        "variance": source.variance,
        "unconditional": source.unconditional,
        **({} if source.revision is None else {"revision": source.revision}),
        **{name: source.record[name] for name in ("from", "imported") if name in source.record},
    }

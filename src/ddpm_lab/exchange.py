"""`ddpm import` and `ddpm export`: generators in and out, each a folder that appears whole or not at all."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from ddpm_lab.checkpoint import save_checkpoint
from ddpm_lab.config import DataConfig
from ddpm_lab.files import appearing
from ddpm_lab.interop import is_diffusers, read_diffusers, save_diffusers
from ddpm_lab.run import versions
from ddpm_lab.settings import InputError
from ddpm_lab.trained import Weights, load
from ddpm_lab.training import resolve_device

Form = Literal["diffusers"]


def import_generator(folder: Path, run: Path, dataset: str) -> str:
    """Make a run, which can be sampled and scored but not trained, of a folder of diffusers.

    Args:
        folder: see `interop.read_diffusers`.
        run: new, or an empty folder.
        dataset: what it was trained on, where that is known.
    Returns:
        A line that says what was made.
    Raises:
        InputError: no such generator, or a run that is there.
    """
    if not is_diffusers(folder):
        raise InputError(
            f"{folder} is no folder of diffusers: it has neither model_index.json nor a UNet2DModel's config"
        )
    config, model, image_shape = read_diffusers(folder, resolve_device("cpu"))
    config = dataclasses.replace(config, data=DataConfig(dataset=dataset))
    record = {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "data": {"name": dataset, "image_shape": list(image_shape)},
        "versions": versions(),
        "imported": folder.resolve().name,
    }
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with appearing(run, "--run") as partial:
        (partial / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        save_checkpoint(partial, 0, {"model.safetensors": parameters, "ema.safetensors": parameters})
    count = sum(parameter.numel() for parameter in parameters.values())
    return f"{run}: {count:,} parameters of {folder}, images of {' x '.join(map(str, image_shape))}"


def export_generator(
    source: str, form: Form, out: Path, *, weights: Weights = "ema", checkpoint: int | None = None
) -> str:
    """Write a generator as others read it.

    Args:
        source, weights, checkpoint: see `trained.load`.
        form: 'diffusers', a folder for `DDPMPipeline.from_pretrained`.
        out: new, or an empty folder.
    Returns:
        A line that says what was made.
    Raises:
        InputError: no such generator, one that the form cannot express, or an `out` that is there.
    """
    trained = load(source, weights=weights, checkpoint=checkpoint, device="cpu")
    with appearing(out, "--out") as partial:
        save_diffusers(trained.model, trained.config, trained.image_shape[1], partial)
    return f"{out}: {source} at step {trained.step} ({weights}), for diffusers.DDPMPipeline.from_pretrained"

"""`ddpm import` and `ddpm export`: generators in and out, each a folder that appears whole or not at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

from ddpm_lab.core.config import DataConfig, SamplingConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import atomic_directory
from ddpm_lab.diffusion.guidance import guided_timesteps
from ddpm_lab.exchange.model_card import write_card
from ddpm_lab.models.checkpoint import checkpoint_path, save_checkpoint
from ddpm_lab.models.diffusers_format import has_scheduler, is_diffusers, read_diffusers, save_diffusers
from ddpm_lab.models.onnx_format import Guidance, LoopSampler, save_onnx
from ddpm_lab.models.trained import TrainedModel, Weights, load, packaged_names
from ddpm_lab.sampling.generation import Sampler, build_sampler
from ddpm_lab.training.run import versions

Form = Literal["diffusers", "onnx"]


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
    config, model, image_shape, variance = read_diffusers(folder, resolve_device("cpu"))
    config = dataclasses.replace(config, data=DataConfig(dataset=dataset))
    record = {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "data": {"name": dataset, "image_shape": list(image_shape)},
        "versions": versions(),
        "imported": folder.resolve().name,
        **({} if has_scheduler(folder) else {"process_assumed": True}),
        "variance": variance,
    }
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with atomic_directory(run, "--run") as partial:
        (partial / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        save_checkpoint(
            checkpoint_path(partial, 0), 0, {"model.safetensors": parameters, "ema.safetensors": parameters}
        )
    count = sum(parameter.numel() for parameter in parameters.values())
    return f"{run}: {count:,} parameters of {folder}, images of {' x '.join(map(str, image_shape))}"


def export_generator(
    source: str,
    form: Form,
    out: Path,
    *,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    licence: str | None = None,
    sampler: LoopSampler | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    guide: str | None = None,
    guidance_interval: tuple[float, ...] = (),
) -> str:
    """Write a generator as others read it, with a README that says what it is.

    Args:
        source, weights, checkpoint: see `trained.load`.
        form: 'diffusers', a folder for `DDPMPipeline.from_pretrained`; or 'onnx', the network and a sampler as graphs.
        out: new, or an empty folder.
        licence: of the weights, as the README is to say; None: that of the package for its own, else unknown.
        sampler, num_steps: of the sampler's graph; None: dpmpp; 20 steps of dpmpp, 50 of ddim.
        guidance, guide, guidance_interval: of the sampler's graph, see `SamplingConfig`.
    Returns:
        A line that says what was made.
    Raises:
        InputError: no such generator, one that the form cannot express, or an `out` that is there.
    """
    trained = load(source, weights=weights, checkpoint=checkpoint, device="cpu")
    if form == "diffusers" and any((sampler, num_steps is not None, guidance is not None, guide, guidance_interval)):
        raise InputError("--sampler, --num-steps, --guidance, --guide and --guidance-interval are for --to onnx")
    sampler = sampler or "dpmpp"
    if guidance == 0:
        raise InputError("a sampler's graph is asked for classes; guidance must be above 0")
    resolved = build_sampler(
        trained,
        SamplingConfig(
            sampler=sampler, num_steps=num_steps, guidance=guidance, guide=guide, guidance_interval=guidance_interval
        ),
    )
    num_steps = resolved.num_steps
    with atomic_directory(out, "--out") as partial:
        if form == "diffusers":
            save_diffusers(trained.model, trained.config, trained.image_shape[1], trained.variance, partial)
        else:
            save_onnx(trained, sampler, num_steps, _guidance(resolved, trained), partial)
        licence = licence or ("mit" if source in packaged_names() else "unknown")
        _let_umask_decide(partial)
        guiding = "" if guidance is None else f", guidance {guidance:g}"
        if resolved.guide is not None:
            guiding += f" by {resolved.guide.name} at step {resolved.guide.step}"
        if guidance_interval:
            guiding += " at noise levels {:g} to {:g}".format(*guidance_interval)
        write_card(trained, form, licence, f"{num_steps} steps of {sampler}{guiding}", partial)
    reader = {"diffusers": "diffusers.DDPMPipeline.from_pretrained", "onnx": "example.py and any ONNX runtime"}[form]
    return f"{out}: {source} at step {trained.step} ({weights}), for {reader}"


def _let_umask_decide(folder: Path) -> None:
    """Give files the rights that any new file has: some libraries write weights that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _guidance(sampler: Sampler, trained: TrainedModel) -> Guidance | None:
    """The guidance of a resolved sampler, as a graph takes it."""
    if sampler.config.guidance in (None, 1):
        return None
    timesteps = guided_timesteps(trained.schedule, sampler.config.guidance_interval)
    return Guidance(sampler.config.guidance, None if sampler.guide is None else sampler.guide.model, timesteps)

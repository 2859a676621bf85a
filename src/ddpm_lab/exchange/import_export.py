"""`ddpm import` and `ddpm export`: generators in other formats, each a folder that is written whole or not at all."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Literal

from ddpm_lab.core.config import DataConfig, SamplingConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import atomic_directory
from ddpm_lab.diffusion.guidance import guidance_label, guided_timesteps
from ddpm_lab.exchange.model_card import write_card
from ddpm_lab.models.checkpoint import EMA_FILE, checkpoint_path, read_tensors, save_checkpoint, write_files
from ddpm_lab.models.diffusers_format import has_average, has_scheduler, is_diffusers, read_diffusers, save_diffusers
from ddpm_lab.models.hub import check_push, locate, push
from ddpm_lab.models.onnx_format import Guidance, LoopSampler, save_onnx
from ddpm_lab.models.trained import TrainedModel, Weights, load, packaged_names
from ddpm_lab.sampling.generation import Sampler, build_sampler
from ddpm_lab.training.run import versions

Form = Literal["diffusers", "run", "onnx"]


def import_generator(source: str, run: Path, dataset: str) -> str:
    """Make a run from a folder of diffusers. It can be sampled and scored, but not trained further.

    Args:
        source: a folder as in `diffusers_format.read_diffusers`, or USER/NAME on the hub.
        run: a new or empty folder.
        dataset: the training data, if known.
    Returns:
        A line about the run.
    Raises:
        InputError: no such generator, or the run exists.
    """
    folder, revision = locate(source)
    require(
        is_diffusers(folder),
        f"{source} is not a diffusers folder: it has neither model_index.json nor the config.json of a UNet2DModel",
    )
    cpu = resolve_device("cpu")
    config, model, image_shape, sampling = read_diffusers(folder, cpu)
    other, raw = read_diffusers(folder, cpu, "raw")[:2] if has_average(folder) else (config, model)
    require(other == config, f"{folder}: unet and unet_ema have the settings of different networks")
    config = dataclasses.replace(config, data=DataConfig(dataset=dataset))
    record = {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "data": {"name": dataset, "image_shape": list(image_shape)},
        "versions": versions(),
        "imported": folder.resolve().name if revision is None else source,
        **({} if revision is None else {"revision": revision}),
        **({} if has_scheduler(folder) else {"process_assumed": True}),
        **sampling,
    }
    networks = {"model.safetensors": raw, "ema.safetensors": model}
    tensors = {name: dict(network.state_dict()) for name, network in networks.items()}
    with atomic_directory(run, "--run") as partial:
        (partial / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        save_checkpoint(checkpoint_path(partial, 0), 0, tensors)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{run}: {count:,} parameters of {source}, images of {' x '.join(map(str, image_shape))}"


def export_generator(
    source: str,
    form: Form,
    out: Path | None,
    *,
    push_to: str | None = None,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    licence: str | None = None,
    sampler: LoopSampler | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    guide: str | None = None,
    guidance_interval: tuple[float, ...] = (),
) -> str:
    """Write a generator in a format of other libraries, with a README that describes it.

    Args:
        source, weights, checkpoint: as in `trained.load`.
        form: 'diffusers', a folder for `DDPMPipeline.from_pretrained`, or for `DDIMPipeline` if the sampler is ddim or
            the model comes from such a pipeline; 'run', a checkpoint of the averaged weights that `trained.load` reads;
            or 'onnx', the network and a sampler as graphs.
        out: a new or empty folder; None: a temporary one, to be pushed.
        push_to: USER/NAME of a repository on the hub to upload the folder to; None: none.
        licence: of the weights, for the README; None: 'mit' for packaged weights, else 'unknown'.
        sampler: of the sampler's graph; None: dpmpp.
        num_steps: of the sampler's graph; None: 20 for dpmpp, 50 for ddim, 10 for ipndm and unipc.
        guidance, guide, guidance_interval: of the sampler's graph, as in `SamplingConfig`.
    Returns:
        A line about the folder or the repository.
    Raises:
        InputError: no such generator, one that the format cannot express, or `out` exists; or the hub refuses, and then
            `out` is not written.
    """
    require(out is not None or push_to is not None, "give --out FOLDER, or --push USER/NAME")
    require(form != "run" or weights == "ema", "--to run holds averaged weights only; leave --weights out")
    if push_to is not None:
        check_push(push_to)
    trained = load(source, weights=weights, checkpoint=checkpoint, device="cpu")
    for_graph = (num_steps, guidance, guide, guidance_interval or None)
    if form != "onnx" and any(option is not None for option in for_graph):
        raise InputError("--num-steps, --guidance, --guide and --guidance-interval are for --to onnx")
    if form == "run" or (form == "diffusers" and sampler != "ddim"):
        require(sampler is None, f"--sampler {sampler} is for --to onnx")
    spacing = trained.spacing or ("uniform" if sampler == "ddim" else None)
    sampling = {"spacing": spacing} if spacing else {"variance": trained.variance}
    require(guidance != 0, "--guidance must be above 0, as the sampler's graph takes classes")
    sampler = sampler or "dpmpp"
    config = SamplingConfig(
        sampler=sampler, num_steps=num_steps, guidance=guidance, guide=guide, guidance_interval=guidance_interval
    )
    resolved = build_sampler(trained, config)
    with tempfile.TemporaryDirectory() as scratch, atomic_directory(out or Path(scratch) / "model", "--out") as partial:
        if form == "diffusers":
            loop = save_diffusers(trained.model, trained.config, trained.image_shape[1], sampling, partial)
            reader = f"diffusers.{loop}.from_pretrained"
        elif form == "run":
            save_run(trained, partial)
            loop, reader = "", "every command that takes a model"
        else:
            save_onnx(trained, sampler, resolved.num_steps, _guidance(resolved, trained), partial)
            other = resolved.guide and {"name": resolved.guide.name, "step": resolved.guide.step}
            label = guidance_label({"guidance": guidance, "guide": other, "guidance_interval": list(guidance_interval)})
            loop, reader = f"{resolved.num_steps} steps of {sampler}{label}", "example.py and any ONNX runtime"
        _apply_umask(partial)
        licence = licence or ("mit" if source in packaged_names() else "unknown")
        write_card(trained, form, licence, loop, partial, push_to)
        address = "" if push_to is None else ", revision ".join(push(partial, push_to))
    places = " and ".join(str(place) for place in (out, address) if place)
    return f"{places}: {source} at step {trained.step} ({weights}), for {reader}"


def save_run(trained: TrainedModel, folder: Path) -> None:
    """Write a network into an empty folder as a checkpoint beside its `config.json`, which `trained.load` reads."""
    saved = (trained.folder / "meta.json").is_file()  # then the bytes stay the same, and with them the hash in records
    weights = read_tensors(trained.folder, EMA_FILE) if saved else trained.model.state_dict()
    write_files(folder, trained.step, {EMA_FILE: weights})
    (folder / "config.json").write_text(json.dumps(trained.record, indent=2) + "\n", encoding="utf-8")


def _apply_umask(folder: Path) -> None:
    """Give files the permissions of any new file: some libraries write weights that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _guidance(sampler: Sampler, trained: TrainedModel) -> Guidance | None:
    """The guidance of a resolved sampler, for a graph; None: there is none."""
    if sampler.config.guidance in (None, 1):
        return None
    timesteps = guided_timesteps(trained.schedule, sampler.config.guidance_interval)
    return Guidance(sampler.config.guidance, None if sampler.guide is None else sampler.guide.model, timesteps)

"""Images from a trained network: every image has a seed of its own, so it is the same in any batch, run or order.

Image i of seed s draws all its noise from a generator seeded by (s, i), on the CPU, in the order the sampler asks.
Batches always have the same number of rows, so that at one batch size an image is the same bit for bit in any number.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.device import autocast, compiled, precision_of, resolve_device, resolve_precision
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import TEMPORARY_PREFIX, locked, read_json, replace_atomically
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import duration, progress
from ddpm_lab.core.source_version import source_sha256
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.data.image_folder import SAMPLING
from ddpm_lab.diffusion.guidance import ClassModel, classes_in_turn, guidance_label, guided, guided_timesteps
from ddpm_lab.diffusion.samplers import Step, ddim_steps, ddpm_steps
from ddpm_lab.diffusion.schedule import NoiseSchedule, build_schedule, sampling_timesteps
from ddpm_lab.diffusion.solvers import dpmpp_steps, heun_steps
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.trained import TrainedModel, Weights, find_checkpoint, load
from ddpm_lab.sampling.image_files import check_writable, image_array, image_grid, save_npz, save_png, visible_scale

MAX_GRID_IMAGES = 16_384
MOST_IMAGES = 10_000_000
ABSENT = object()

UNSAID_BEFORE = ("code", "torch", "device")  # by folders of version 0.1.0 as it first was
STEPS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm_steps,
    "ddim": ddim_steps,
    "dpmpp": dpmpp_steps,
    "heun": heun_steps,
}


class ImageNoise:
    """Standard normal noise for a batch of images, from one generator an image.

    Calling it gives the next noise, (B, *shape) float32 on the device; the argument, the sampler's step, is not used,
    for the first call is x_T and the following ones come in the order of the steps.
    """

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device) -> None:
        self._generators = [np.random.default_rng(np.random.SeedSequence([seed, i])) for i in indices]
        self._shape, self._device = shape, device

    def __call__(self, step: int) -> Tensor:
        drawn = [generator.standard_normal(self._shape, dtype=np.float32) for generator in self._generators]
        return torch.from_numpy(np.stack(drawn)).to(self._device)


@dataclass(frozen=True)
class Sampler:
    """A sampler's steps with its settings resolved for one network.

    Attributes:
        config: with nothing left unset that the sampler uses.
        num_steps: per image.
        num_evaluations: of the network and its guide, per image.
        guide: the network of autoguidance, where there is one.
        steps: called as steps(x_T, noise), or steps(x_T, noise, y) with the images' classes, (B,) int64.
    """

    config: SamplingConfig
    num_steps: int
    num_evaluations: int
    guide: TrainedModel | None
    steps: Callable[..., Iterator[Step]]


def build_sampler(trained: TrainedModel, config: SamplingConfig) -> Sampler:
    """Resolve a sampler's settings.

    Raises:
        InputError: more steps than the network has timesteps; classes or guidance of a
            network that has none, or others than it has; a guide that does not fit.
    """
    _check_classes(trained, config)
    told = trained.num_classes > 0
    guide = None if config.guide is None else open_guide(trained, config.guide)
    # of the whole chain, also where a part of it is sampled
    acting = guided_timesteps(build_schedule(trained.config.diffusion), config.guidance_interval)
    T = trained.schedule.num_timesteps
    usual = {"ddpm": T, "ddim": min(50, T), "dpmpp": min(20, T), "heun": min(10, T)}[config.sampler]
    num_steps = config.num_steps or (max(usual // 2, 1) if config.singlestep else usual)
    limit = T // 2 if config.singlestep else T
    if num_steps > limit:
        raise InputError(
            f"num_steps must be from 1 to {'half ' * config.singlestep}the {T} timesteps {trained.name} was trained "
            f"on, not {num_steps}"
        )
    device = next(trained.model.parameters()).device
    dtype = resolve_precision(config.precision, device)
    settings: dict[str, Any] = {
        "spacing": config.spacing or ("logsnr" if config.sampler in ("dpmpp", "heun") else "uniform")
    }
    if config.sampler == "ddpm":
        settings["variance"] = config.variance or (trained.variance if num_steps == T else "beta_tilde")
    elif config.sampler != "heun":
        settings["eta"] = config.eta or 0.0
    resolved = dataclasses.replace(
        config,
        num_steps=num_steps,
        precision=precision_of(dtype),
        guidance=(1.0 if config.guidance is None else config.guidance) if told or guide is not None else None,
        **settings,
    )
    settings["prediction"] = trained.prediction
    if config.sampler == "dpmpp":
        settings["singlestep"] = config.singlestep

    network: ClassModel = trained.model if resolved.engine == "torch" else compiled(trained.model)

    def steps(x_T: Tensor, noise: Callable[[int], Tensor], y: Tensor | None = None) -> Iterator[Step]:
        guidance = resolved.guidance or 1.0
        if y is None and told:
            y = torch.full((len(x_T),), trained.num_classes, device=device)
            guidance = guidance if guide is not None else 1.0
        worse = None if guide is None else guided(guide.model, y if guide.num_classes else None, guide.num_classes)
        asked = guided(network, y, trained.num_classes, guidance, guide=worse, timesteps=acting)

        def model(x_t: Tensor, t: Tensor) -> Tensor:
            with autocast(device, dtype):
                return asked(x_t, t)

        drawn: dict[str, Any] = {"noise": noise} if config.sampler != "heun" else {}
        return STEPS[config.sampler](model, trained.schedule, x_T, num_steps, **settings, **drawn)

    visited = _evaluated_timesteps(resolved, trained.schedule, num_steps)
    twice = 0 if resolved.guidance in (None, 0, 1) else sum(t in acting for t in visited)
    return Sampler(resolved, num_steps, len(visited) + twice, guide, steps)


def _evaluated_timesteps(config: SamplingConfig, schedule: NoiseSchedule, num_steps: int) -> list[int]:
    """The timesteps at which a sampler evaluates the network."""
    timesteps = sampling_timesteps(schedule, num_steps * (1 + config.singlestep), config.spacing or "uniform")
    return timesteps + timesteps[1:] if config.sampler == "heun" else timesteps


def open_guide(trained: TrainedModel, source: str) -> TrainedModel:
    """The network that guides another (autoguidance).

    Args:
        trained: what it is to guide.
        source: see `trained.load`.
    Raises:
        InputError: no such network, or one of other images, another process, another prediction or other classes.
    """
    newest = source if is_diffusers(Path(source)) else str(find_checkpoint(source)[0])
    guide = _loaded(source, newest, next(trained.model.parameters()).device.type)
    ours, theirs = trained.config.diffusion, guide.config.diffusion
    others = {
        "images": (guide.image_shape, trained.image_shape),
        "process": (
            (theirs.num_timesteps, theirs.schedule, theirs.rescale_betas),
            (ours.num_timesteps, ours.schedule, ours.rescale_betas),
        ),
        "prediction": (theirs.predicted, ours.predicted),
        "number of classes": (guide.num_classes or trained.num_classes, trained.num_classes),
    }
    for name, (there, here) in others.items():
        if there != here:
            raise InputError(f"--guide {source} has another {name} than {trained.name}: {there}, not {here}")
    return guide


@lru_cache(maxsize=2)
def _loaded(source: str, newest: str, device: str) -> TrainedModel:
    """Kept, for a command asks for its guide more than once, until there is a newer checkpoint."""
    return load(source, device=device)


def guidance_record(sampler: Sampler) -> dict[str, Any]:
    """What a record says of how samples were guided."""
    config, guide = sampler.config, sampler.guide
    named = guide and {"name": guide.name, "step": guide.step, "sha256": guide.weights_sha256}
    return {
        "guidance": config.guidance,
        "guide": named,
        "guidance_interval": list(config.guidance_interval) or None,
    }


def evaluations_of(config: SamplingConfig, num_steps: int) -> int:
    """How often a sampler's steps evaluate the network for an image, guidance left out."""
    return {"heun": 2 * num_steps - 1, "dpmpp": num_steps * (1 + config.singlestep)}.get(config.sampler, num_steps)


def generate(
    trained: TrainedModel,
    num_images: int,
    config: SamplingConfig,
    on_step: Callable[[int], object] = lambda rows: None,
    begin: int = 0,
) -> Iterator[Tensor]:
    """Sample images begin .. num_images - 1 of a seed, batch by batch.

    Args:
        trained: the network and its process.
        num_images: at least 1.
        config: sampler, steps, seed, batch size.
        on_step: called after each step of each batch with the number of images wanted of it.
        begin: a multiple of the batch size.
    Yields:
        uint8 (b, C, H, W) on the CPU, `batch_size` images at most.
    Raises:
        InputError: num_images below 1, or settings that do not fit the network.
    """
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, not {num_images}")
    size = config.batch_size
    pieces = ((first, min(size, num_images - first)) for first in range(begin, num_images, size))
    for index, images in enumerate(
        processes.map_across_ranks("sample", sampling_task(trained, config, on_step), pieces)
    ):
        if processes.is_on_another_rank(index):
            on_step(len(images) * build_sampler(trained, config).num_steps)
        yield images


def sampling_task(
    trained: TrainedModel, config: SamplingConfig, on_step: Callable[[int], object] = lambda rows: None
) -> Callable[[tuple[int, int]], Tensor]:
    """What samples one batch: (first, how many are wanted) -> (b, C, H, W) uint8 on the CPU."""
    sampler = build_sampler(trained, config)

    def sample_batch(piece: tuple[int, int]) -> Tensor:
        first, wanted = piece
        for step in trajectory(trained, sampler, first):
            x_0 = step.x_s
            on_step(wanted)
        return to_uint8(x_0[:wanted]).cpu()

    return sample_batch


def trajectory(trained: TrainedModel, sampler: Sampler, first: int = 0) -> Iterator[Step]:
    """The steps of one batch, images first .. first + batch_size - 1 of the sampler's seed."""
    device = next(trained.model.parameters()).device
    indices = range(first, first + sampler.config.batch_size)
    noise = ImageNoise(sampler.config.seed, indices, trained.image_shape, device)
    return sampler.steps(noise(-1), noise, asked_classes(trained, sampler.config, indices))


def asked_classes(trained: TrainedModel, config: SamplingConfig, indices: range) -> Tensor | None:
    """The classes that images are asked for, (len(indices),) int64; None: they are asked for none."""
    if trained.num_classes == 0 or config.guidance == 0:
        return None
    return classes_in_turn(config.class_, trained.num_classes, indices).to(next(trained.model.parameters()).device)


def _check_classes(trained: TrainedModel, config: SamplingConfig) -> None:
    count = trained.num_classes
    if count == 0 and (config.class_ or (config.guidance is not None and config.guide is None)):
        raise InputError(f"{trained.name} was told no classes; leave --class and --guidance out, or give a --guide")
    if config.guidance not in (None, 1) and config.guide is None and not trained.unconditional:
        raise InputError(f"{trained.name} never learnt to do without a class (training.class_dropout 0); guidance is 1")
    strange = [label for label in config.class_ if label >= count]
    if strange:
        raise InputError(f"{trained.name} has the classes 0 .. {count - 1}, not {strange[0]}")


def sample_to_folder(
    trained: TrainedModel,
    folder: Path,
    num_images: int,
    config: SamplingConfig,
    *,
    wait: bool = False,
    option: str = "--out",
) -> int:
    """Sample into a folder of PNGs, `00000000.png` and on, continuing where an earlier call was stopped.

    `sampling.json` in it says of which weights and settings the images are; more images of the same are added to those
    that are there.

    Args:
        folder: made where it does not exist.
        trained, num_images, config: see `generate`.
        wait: for another process that samples into it, rather than refuse.
        option: the flag that named the folder, for messages.
    Returns:
        How many images there were before.
    Raises:
        InputError: the folder holds something else, or images of other weights or settings.
    """
    identity = sampling_identity(trained, config)
    if folder.is_dir() and not (folder / SAMPLING).exists():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise InputError(f"{option} {folder} holds {others[0]} but no {SAMPLING}: name an empty or new folder")
    with locked(folder, option, wait):
        record = folder / SAMPLING
        if not record.exists():
            replace_atomically(record, (json.dumps(identity, indent=2) + "\n").encode())
        held = read_json(record)
        if held != identity:
            before = held if isinstance(held, dict) else {}
            silent = {name for name in UNSAID_BEFORE if name not in before}  # a folder that does not say is as it was
            names = [
                name.rstrip("_")
                for name in identity | before
                if name not in silent and before.get(name, ABSENT) != identity.get(name, ABSENT)
            ]
            if names:
                raise InputError(
                    f"{option} {folder} holds images of another {' and '.join(names)}; name another folder"
                )
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        there = {path.name for path in folder.glob("*.png")}
        done = next((i for i in range(num_images) if _png_name(i) not in there), num_images)
        begin = done // config.batch_size * config.batch_size if done < num_images else num_images
        steps = build_sampler(trained, config).num_steps
        with (
            progress("sampling", num_images * steps, "steps", begin * steps) as advance,
            ThreadPoolExecutor(1, "writing") as writer,  # writes a batch while the next is sampled
        ):
            first, writing = begin, writer.submit(_save_pngs, folder, 0, ())
            for batch in generate(trained, num_images, config, on_step=advance, begin=begin):
                writing.result()
                writing = writer.submit(_save_pngs, folder, first, batch)
                first += len(batch)
            writing.result()
    return done


def is_sampled(trained: TrainedModel, folder: Path, num_images: int, config: SamplingConfig) -> bool:
    """Whether a folder holds these images already, all of them."""
    try:
        held = read_json(folder / SAMPLING)
    except InputError:
        return False
    there = {path.name for path in folder.glob("*.png")}
    return held == sampling_identity(trained, config) and all(_png_name(i) in there for i in range(num_images))


def _save_pngs(folder: Path, first: int, images: Iterable[Tensor]) -> None:
    for index, image in enumerate(images, first):
        save_png(folder / _png_name(index), image_array(image))


def sampling_identity(trained: TrainedModel, config: SamplingConfig) -> dict[str, Any]:
    """What decides which images come out: weights, network, process, settings, the code, torch's version and device."""
    process = trained.config.to_dict()
    sampler = build_sampler(trained, config)
    settings = dataclasses.asdict(sampler.config)
    settings["class_"] = list(config.class_)  # as JSON gives it back
    for name in ("guide", "guidance_interval"):  # folders from before these settings have neither
        del settings[name]
    if sampler.guide is not None:
        settings["guide"] = sampler.guide.weights_sha256
    if config.guidance_interval:
        settings["guidance_interval"] = list(config.guidance_interval)
    return {
        "weights_sha256": trained.weights_sha256,
        "step": trained.step,
        "model": process["model"],
        "diffusion": process["diffusion"],
        "version": version("ddpm-lab"),
        "code": source_sha256("sampling"),
        "torch": version("torch"),
        "device": next(trained.model.parameters()).device.type,
        **settings,
    }


def _png_name(index: int) -> str:
    return f"{index:08d}.png"


def sample_to_file(
    source: str,
    out: Path,
    num_images: int,
    config: SamplingConfig,
    *,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
) -> str:
    """Sample into a PNG grid, an .npz, or a folder of PNGs.

    Args:
        source, weights, checkpoint, device: see `trained.load`.
        out: ends in .png or .npz, and is replaced once the new one is whole; or a folder, to which images are added.
        num_images, config: see `generate`.
    Returns:
        A line that says what was made.
    Raises:
        InputError: a source, setting or path that cannot be used; told before any work.
    """
    processes.join(resolve_device(device))
    folder = out.is_dir() or out.suffix == ""
    if not folder and processes.is_rank0():
        if out.suffix.lower() not in (".png", ".npz"):
            raise InputError(f"--out {out} must end in .png or .npz; a new folder's name has no dot in it")
        check_writable(out, (".png", ".npz"))
    grid = out.suffix.lower() == ".png"
    if not 1 <= num_images <= (MAX_GRID_IMAGES if grid else MOST_IMAGES):
        limit = f"{MAX_GRID_IMAGES} in one picture (more go into an .npz)" if grid else str(MOST_IMAGES)
        raise InputError(f"num_images must be from 1 to {limit}, not {num_images}")
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    sampler = build_sampler(trained, config)
    show_deferred_warnings()
    begun = time.monotonic()
    before = processes.run_on_rank0(
        lambda: (
            sample_to_folder(trained, out, num_images, config)
            if folder
            else _sample_to_file(trained, out, num_images, config, grid)
        ),
        sample=sampling_task(trained, config),
    )
    made = f"{num_images} images" + (f" ({before} were there)" if before else "")
    return (
        f"{out}: {made} of {source} at step {trained.step} ({weights}), {config.sampler}, "
        f"{sampler.num_steps} of {trained.schedule.num_timesteps} steps{guidance_label(guidance_record(sampler))}, "
        f"seed {config.seed}, "
        f"{duration(time.monotonic() - begun)}"
    )


def _sample_to_file(trained: TrainedModel, out: Path, num_images: int, config: SamplingConfig, grid: bool) -> int:
    steps = num_images * build_sampler(trained, config).num_steps
    with progress("sampling", steps, "steps") as advance:
        batches = generate(trained, num_images, config, on_step=advance)
        if grid:
            save_png(out, image_grid(torch.cat(list(batches)), scale=visible_scale(trained.image_shape[1])))
        else:
            save_npz(out, batches, num_images, asked_classes(trained, config, range(num_images)))
    return 0

"""Samples written to files: a PNG grid, an .npz array, or a folder of PNGs that later calls can extend."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import TEMPORARY_PREFIX, locked, read_json, replace_atomically
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import duration, progress
from ddpm_lab.core.source_version import source_sha256
from ddpm_lab.data.image_folder import SAMPLING
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.models.trained import TrainedModel, Weights, load
from ddpm_lab.sampling.generation import build_sampler, class_labels, generate, guidance_record, sampling_task
from ddpm_lab.sampling.image_files import check_writable, image_grid, save_image, save_npz, save_png, visible_scale

MAX_GRID_IMAGES = 16_384
MAX_IMAGES = 10_000_000
WRITERS = 4  # threads that write a batch into a folder
ABSENT = object()
OPTIONAL_FIELDS = ("code", "torch", "device")  # that sampling.json of the first version 0.1.0 lacks


def sample_to_folder(
    trained: TrainedModel,
    folder: Path,
    num_images: int,
    config: SamplingConfig,
    *,
    wait: bool = False,
    option: str = "--out",
    on_batch: Callable[[Tensor], object] = lambda images: None,
) -> int:
    """Sample into a folder of PNGs, `00000000.png` and on; images that an earlier call wrote are kept.

    Batches are computed in full, so that the images stay the same bits when a later call adds more.

    `sampling.json` in the folder identifies the weights and settings of the images, and the revision of a model from
    the hub.

    Args:
        folder: created if it does not exist.
        trained, num_images, config: as for `generate`.
        wait: wait for another process that samples into the folder, instead of refusing.
        option: the flag that named the folder, for messages.
        on_batch: called with each batch that is sampled, (b, C, H, W) uint8.
    Returns:
        The number of images that the folder held already.
    Raises:
        InputError: the folder holds something else, or images of other weights or settings.
    """
    identity, record = sampling_identity(trained, config), folder / SAMPLING
    if record.is_file() and _recorded(record) == identity and _first_missing(folder, num_images) == num_images:
        return num_images  # without a lock: the folder may be in a cache that this user cannot write
    if folder.is_dir() and not record.exists():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise InputError(f"{option} {folder} holds {others[0]} but no {SAMPLING}: name an empty or new folder")
    with locked(folder, option, wait):
        if not record.exists():
            source = {} if trained.revision is None else {"revision": trained.revision}
            replace_atomically(record, (json.dumps(identity | source, indent=2) + "\n").encode())
        existing = {name: identity[name] for name in OPTIONAL_FIELDS} | _recorded(record)
        differing = [
            name.rstrip("_") for name in identity | existing if existing.get(name, ABSENT) != identity.get(name, ABSENT)
        ]
        if differing:
            raise InputError(
                f"{option} {folder} holds images of another {' and '.join(differing)}; name another folder"
            )
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        done = _first_missing(folder, num_images)
        begin = done // config.batch_size * config.batch_size if done < num_images else num_images
        steps = build_sampler(trained, config).num_steps
        with (
            progress("sampling", num_images * steps, "steps", begin * steps) as advance,
            ThreadPoolExecutor(WRITERS, "writing") as writers,  # they write a batch while the next is sampled
        ):
            first, writing = begin, list[Future[None]]()
            for batch in generate(trained, num_images, config, on_step=advance, begin=begin, pad=True):
                for part in writing:
                    part.result()
                # In turn, so that the folder has no long gaps if the process is killed.
                rows = (range(part, len(batch), WRITERS) for part in range(WRITERS))
                writing = [writers.submit(_save_images, folder, first, batch, part) for part in rows]
                on_batch(batch)
                first += len(batch)
            for part in writing:
                part.result()
    return done


def _recorded(path: Path) -> dict[str, Any]:
    """What a `sampling.json` says that images depend on: not the hub's revision, as each has its own README."""
    record = read_json(path)
    return {name: record[name] for name in record if name != "revision"} if isinstance(record, dict) else {}


def _first_missing(folder: Path, num_images: int) -> int:
    """Index of the first image that a folder lacks; num_images if it has all."""
    names = {path.name for path in folder.glob("*.png")}
    return next((i for i in range(num_images) if _png_name(i) not in names), num_images)


def _save_images(folder: Path, first: int, images: Tensor, rows: Iterable[int]) -> None:
    """Write some images of a batch that begins with image `first`."""
    for row in rows:
        save_image(folder / _png_name(first + row), images[row])


def _png_name(index: int) -> str:
    return f"{index:08d}.png"


def sampling_identity(trained: TrainedModel, config: SamplingConfig) -> dict[str, Any]:
    """All that the images depend on: weights, network, process, settings, our code, torch's version and the device."""
    process = trained.config.to_dict()
    sampler = build_sampler(trained, config)
    settings = dataclasses.asdict(sampler.config)
    settings["class_"] = list(sampler.config.class_)  # as JSON returns it
    for name in ("guide", "guidance_interval"):  # left out where unset: older folders have neither
        del settings[name]
    if sampler.guide is not None:
        settings["guide"] = sampler.guide.weights_sha256
    if sampler.tuned is not None:
        settings["tuned"] = sampler.tuned.sha256
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
        source, weights, checkpoint, device: as for `trained.load`.
        out: a path that ends in .png or .npz, replaced once the new file is complete; or a folder to add images to.
        num_images, config: as for `generate`.
    Returns:
        A line that describes what was written.
    Raises:
        InputError: a source, setting or path that cannot be used; raised before any sampling.
    """
    processes.join(resolve_device(device))
    folder = out.is_dir() or out.suffix == ""
    grid = out.suffix.lower() == ".png"
    if not folder and processes.is_rank0():
        if out.suffix.lower() not in (".png", ".npz"):
            raise InputError(f"--out {out} must end in .png or .npz; the name of a new folder must contain no dot")
        check_writable(out, (".png", ".npz"))
    if not 1 <= num_images <= (MAX_GRID_IMAGES if grid else MAX_IMAGES):
        limit = f"{MAX_GRID_IMAGES} in one picture (an .npz holds more)" if grid else str(MAX_IMAGES)
        raise InputError(f"num_images must be from 1 to {limit}, not {num_images}")
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    sampler = build_sampler(trained, config)
    show_deferred_warnings()
    begun = time.monotonic()

    def write() -> int:
        if folder:
            return sample_to_folder(trained, out, num_images, config)
        with progress("sampling", num_images * sampler.num_steps, "steps") as advance:
            batches = generate(trained, num_images, config, on_step=advance)
            if grid:
                save_png(out, image_grid(torch.cat(list(batches)), scale=visible_scale(trained.image_shape[1])))
            else:
                save_npz(out, batches, num_images, class_labels(trained, config, range(num_images)))
        return 0

    kept = processes.run_on_rank0(write, sample=sampling_task(trained, config))
    existing = f" ({kept} existed already)" if kept else ""
    return (
        f"{out}: {num_images} images{existing} of {source} at step {trained.step} ({weights}), {config.sampler}, "
        f"{sampler.num_steps} of {trained.schedule.num_timesteps} steps{guidance_label(guidance_record(sampler))}, "
        f"seed {config.seed}, {duration(time.monotonic() - begun)}"
    )

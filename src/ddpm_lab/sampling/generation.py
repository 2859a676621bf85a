"""Sample images from a trained network; each image has a seed of its own, so it is the same in any batch or run.

Image i of seed s draws all its noise from a generator seeded by (s, i), on the CPU, in the order of the sampler's
steps. Every batch has the same number of rows, so that at one batch size an image does not depend on how many are
sampled, bit for bit. Only where fewer images than a batch are asked for, a batch has as many rows as images.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.device import autocast, compiled, precision_of, resolve_precision
from ddpm_lab.core.errors import require
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.diffusion.guidance import ClassModel, classes_in_turn, guided, guided_timesteps
from ddpm_lab.diffusion.multistep import multistep_steps
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.samplers import Step
from ddpm_lab.diffusion.schedule import build_schedule, sampling_timesteps
from ddpm_lab.diffusion.solvers import STEPS
from ddpm_lab.models.diffusers_format import is_diffusers
from ddpm_lab.models.hub import is_hub_name
from ddpm_lab.models.trained import TrainedModel, find_checkpoint, load
from ddpm_lab.models.tuned import TunedSampler, find_tuned

DEFAULT_STEPS = {"ddim": 50, "dpmpp": 20}  # of the others 10, but all T of ddpm
STOCHASTIC = ("ddim", "ddpm", "dpmpp")  # samplers that can add noise
DRAWING_THREADS = 4  # at most; each draws the noise of at least as many images as follow
IMAGES_PER_THREAD = 64


class ImageNoise:
    """Standard normal noise for a batch of images, from one generator per image.

    Each call returns the next noise, (B, *shape) float32 on the device: first x_T, then the noise of each step that
    adds some. The argument, the index of the sampler's step, is not used. While the caller uses one noise, threads draw
    the next, so that a GPU need not wait. They end with the context, or with the object.

    Args:
        seed, indices: identify the images.
        shape: of an image.
        num_draws: calls to expect; only these are drawn ahead.
    """

    def __init__(
        self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device, num_draws: int = 1
    ) -> None:
        self._generators = [np.random.default_rng(np.random.SeedSequence([seed, i])) for i in indices]
        self._shape, self._device, self._to_come = (len(indices), *shape), device, num_draws
        self._threads = ThreadPoolExecutor(DRAWING_THREADS, "noise")
        self._drawing: tuple[Tensor, list[Future[None]]] | None = None

    def __call__(self, step: int) -> Tensor:
        noise, parts = self._drawing or self._start()
        for part in parts:
            part.result()
        self._to_come -= 1
        self._drawing = self._start() if self._to_come > 0 else None
        return noise.to(self._device, non_blocking=noise.is_pinned())

    def _start(self) -> tuple[Tensor, list[Future[None]]]:
        """Start to draw the next noise; returns its tensor, and the parts to wait for."""
        noise = torch.empty(self._shape, pin_memory=self._device.type == "cuda")
        size = max(-(-len(noise) // DRAWING_THREADS), IMAGES_PER_THREAD)
        rows = [slice(first, first + size) for first in range(0, len(noise), size)]
        return noise, [self._threads.submit(_draw, self._generators[part], noise[part].numpy()) for part in rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def _draw(generators: list[np.random.Generator], noise: np.ndarray) -> None:
    for generator, image in zip(generators, noise, strict=True):
        generator.standard_normal(out=image, dtype=np.float32)  # without the interpreter lock


@dataclass(frozen=True)
class Sampler:
    """A sampler for one network, with all settings resolved.

    Attributes:
        config: the settings; every one that the sampler uses has a value.
        num_steps: steps per image.
        num_evaluations: evaluations of the network and of its guide, per image.
        num_draws: how often it takes noise for each image, x_T included.
        guide: the network for autoguidance, or None.
        tuned: timesteps and coefficients of the sampler `tuned`, or None.
        model: called as model(y, B): the network as samplers call it for B images, with guidance and the sampler's
            precision; y are class labels, (B,) int64, or None.
        steps: called as steps(x_T, noise), or steps(x_T, noise, y).
    """

    config: SamplingConfig
    num_steps: int
    num_evaluations: int
    num_draws: int
    guide: TrainedModel | None
    tuned: TunedSampler | None
    model: Callable[[Tensor | None, int], Model]
    steps: Callable[..., Iterator[Step]]


def build_sampler(trained: TrainedModel, config: SamplingConfig) -> Sampler:
    """Resolve a sampler's settings for a network.

    Raises:
        InputError: more steps than the network has timesteps; classes or guidance for a network without classes;
            classes that the network does not have; a guide that does not fit; no sampler tuned for these settings.
    """
    _check_classes(trained, config)
    conditional = trained.num_classes > 0
    guide = None if config.guide is None else open_guide(trained, config.guide)
    tuned = None
    if config.sampler == "tuned":
        guide_sha256 = None if guide is None else guide.weights_sha256
        tuned = find_tuned(trained, config.num_steps, config.guidance, guide_sha256, config.guidance_interval)
        config = dataclasses.replace(
            config,
            num_steps=len(tuned.solver.timesteps),
            guidance=tuned.guidance if conditional or guide is not None else None,
            guidance_interval=tuned.guidance_interval,
        )
    # those of the whole chain, also where only a part of it is sampled
    guidance_timesteps = guided_timesteps(build_schedule(trained.config.diffusion), config.guidance_interval)
    guided_at = guidance_timesteps if config.guidance_interval else None  # None: the network need not wait to know t
    T = trained.schedule.num_timesteps
    limit = T // 2 if config.singlestep else T
    default = T if config.sampler == "ddpm" else min(DEFAULT_STEPS.get(config.sampler, 10), T)
    num_steps = config.num_steps or (max(default // 2, 1) if config.singlestep else default)
    require(
        num_steps <= limit,
        f"num_steps must be from 1 to {'half ' * config.singlestep}the {T} timesteps {trained.name} was trained on, "
        f"not {num_steps}",
    )
    device = next(trained.model.parameters()).device
    dtype = resolve_precision(config.precision, device)
    spacing = {"ddpm": "uniform", "ddim": trained.spacing or "uniform"}.get(config.sampler, "logsnr")
    settings: dict[str, Any] = {} if tuned is not None else {"spacing": config.spacing or spacing}
    if config.sampler == "ddpm":
        settings["variance"] = config.variance or (trained.variance if num_steps == T else "beta_tilde")
    elif config.sampler in STOCHASTIC:
        settings["eta"] = config.eta or 0.0
    scale = trained.guidance if config.guidance is None else config.guidance
    resolved = dataclasses.replace(
        config,
        num_steps=num_steps,
        precision=precision_of(dtype),
        guidance=scale if conditional or guide is not None else None,
        class_=trained.class_numbers(config.class_),
        **settings,
    )
    settings["prediction"] = trained.prediction
    if config.sampler == "dpmpp":
        settings["singlestep"] = config.singlestep
    network: ClassModel = trained.model if config.engine == "torch" else compiled(trained.model)

    def model(y: Tensor | None, B: int) -> Model:
        guidance = resolved.guidance or 1.0
        if y is None and conditional:
            y = torch.full((B,), trained.num_classes, device=device)  # the label that stands for no class
            guidance = guidance if guide is not None else 1.0
        guide_labels = y if guide is not None and guide.num_classes else None
        guide_model = None if guide is None else guided(guide.model, guide_labels, guide.num_classes)
        output = guided(network, y, trained.num_classes, guidance, guide=guide_model, timesteps=guided_at)

        def with_precision(x_t: Tensor, t: Tensor) -> Tensor:
            with autocast(device, dtype):
                return output(x_t, t)

        return with_precision

    def steps(x_T: Tensor, noise: Callable[[int], Tensor], y: Tensor | None = None) -> Iterator[Step]:
        whole = model(y, len(x_T))
        if tuned is not None:
            return multistep_steps(whole, trained.schedule, x_T, tuned.solver, prediction=trained.prediction)
        stochastic: dict[str, Any] = {"noise": noise} if config.sampler in STOCHASTIC else {}
        return STEPS[config.sampler](whole, trained.schedule, x_T, num_steps, **settings, **stochastic)

    if tuned is not None:
        visited = [int(t) for t in tuned.solver.timesteps]
    else:
        visited = sampling_timesteps(trained.schedule, num_steps * (1 + config.singlestep), settings["spacing"])
    if config.sampler == "heun":
        visited += visited[1:]  # each step but the last evaluates the network at its end too
    twice = 0 if resolved.guidance in (None, 0, 1) else sum(t in guidance_timesteps for t in visited)
    num_draws = num_steps if config.sampler == "ddpm" or config.eta else 1
    return Sampler(resolved, num_steps, len(visited) + twice, num_draws, guide, tuned, model, steps)


def _check_classes(trained: TrainedModel, config: SamplingConfig) -> None:
    require(
        trained.num_classes > 0 or not (config.class_ or (config.guidance is not None and config.guide is None)),
        f"{trained.name} was trained without classes: leave out --class and --guidance, or give a --guide",
    )
    require(
        config.guidance in (None, 1) or config.guide is not None or trained.unconditional,
        f"{trained.name} cannot sample without a class (training.class_dropout was 0), so guidance must be 1",
    )


def open_guide(trained: TrainedModel, source: str) -> TrainedModel:
    """Load the network that guides another (autoguidance, Karras et al. 2024, arXiv:2406.02507).

    Args:
        trained: the network to guide.
        source: as for `trained.load`.
    Raises:
        InputError: no such network, or its images, process, prediction or classes differ.
    """
    newest = source if is_hub_name(source) or is_diffusers(Path(source)) else str(find_checkpoint(source)[0])
    guide = _load_guide(source, newest, next(trained.model.parameters()).device.type)
    theirs, ours = guide.config.diffusion, trained.config.diffusion
    pairs: dict[str, tuple[Any, Any]] = {
        "image shape": (guide.image_shape, trained.image_shape),
        "number of timesteps": (theirs.num_timesteps, ours.num_timesteps),
        "schedule": (theirs.schedule, ours.schedule),
        "beta convention": (theirs.beta_convention, ours.beta_convention),
        "prediction": (theirs.predicted, ours.predicted),
        "number of classes": (guide.num_classes or trained.num_classes, trained.num_classes),
        "classes": (guide.class_names or trained.class_names, trained.class_names),
    }
    for name, (actual, expected) in pairs.items():
        require(
            actual == expected,
            f"--guide {source} differs from {trained.name} in its {name}: it has {actual}, not {expected}",
        )
    return guide


@lru_cache(maxsize=2)
def _load_guide(source: str, newest: str, device: str) -> TrainedModel:
    """Load a guide once per command; `newest` is its newest checkpoint, so that a newer one is loaded again."""
    return load(source, device=device)


def guidance_record(sampler: Sampler) -> dict[str, Any]:
    """The fields of a record that say how samples were guided: guidance, guide, guidance_interval."""
    config, guide = sampler.config, sampler.guide
    return {
        "guidance": config.guidance,
        "guide": guide
        and {"name": guide.name, "step": guide.step, "sha256": guide.weights_sha256, "revision": guide.revision},
        "guidance_interval": list(config.guidance_interval) or None,
    }


def evaluations_of(config: SamplingConfig, num_steps: int) -> int:
    """Number of evaluations of the network per image, without those that guidance adds."""
    return {"heun": 2 * num_steps - 1, "dpmpp": num_steps * (1 + config.singlestep)}.get(config.sampler, num_steps)


def generate(
    trained: TrainedModel,
    num_images: int,
    config: SamplingConfig,
    on_step: Callable[[int], object] = lambda rows: None,
    begin: int = 0,
    *,
    pad: bool = False,
) -> Iterator[Tensor]:
    """Sample images begin .. num_images - 1 of a seed, batch by batch.

    Args:
        trained: the network and its process.
        num_images: at least 1.
        config: sampler, steps, seed, batch size.
        on_step: called after each step of each batch with the number of its images that are kept.
        begin: a multiple of the batch size.
        pad: compute a full batch even for fewer images, so that they stay the same bits when more are sampled later.
    Yields:
        uint8 (b, C, H, W) on the CPU, with b at most `batch_size`.
    Raises:
        InputError: num_images below 1, or settings that do not fit the network.
    """
    require(num_images >= 1, f"num_images must be at least 1, not {num_images}")
    size = config.batch_size
    rows = size if pad else min(size, num_images)
    batches = ((first, min(size, num_images - first), rows) for first in range(begin, num_images, size))
    task = sampling_task(trained, config, on_step)
    for index, images in enumerate(processes.map_across_ranks("sample", task, batches)):
        if processes.is_on_another_rank(index):
            on_step(len(images) * build_sampler(trained, config).num_steps)
        yield images


def sampling_task(
    trained: TrainedModel, config: SamplingConfig, on_step: Callable[[int], object] = lambda rows: None
) -> Callable[[tuple[int, int, int]], Tensor]:
    """A function that samples one batch: (index of the first image, number kept, rows) -> (b, C, H, W) uint8, CPU."""
    sampler = build_sampler(trained, config)

    def sample_batch(batch: tuple[int, int, int]) -> Tensor:
        first, count, rows = batch
        for step in trajectory(trained, sampler, range(first, first + rows)):
            x_0 = step.x_s
            on_step(count)
        return to_uint8(x_0[:count]).cpu()

    return sample_batch


def trajectory(trained: TrainedModel, sampler: Sampler, indices: range) -> Iterator[Step]:
    """The steps of one batch: the images with these indices of the sampler's seed."""
    device = next(trained.model.parameters()).device
    with ImageNoise(sampler.config.seed, indices, trained.image_shape, device, sampler.num_draws) as noise:
        yield from sampler.steps(noise(-1), noise, class_labels(trained, sampler.config, indices))


def class_labels(trained: TrainedModel, config: SamplingConfig, indices: range) -> Tensor | None:
    """The class that each image is conditioned on, (len(indices),) int64; None: the images are unconditional."""
    if trained.num_classes == 0 or config.guidance == 0:
        return None
    classes = classes_in_turn(trained.class_numbers(config.class_), trained.num_classes, indices)
    return classes.to(next(trained.model.parameters()).device)

"""Images from a trained network: every image has a seed of its own, so it is the same in any batch, run or order.

Image i of seed s draws all its noise from a generator seeded by (s, i), on the CPU, in the order the sampler asks.
Batches always have the same number of rows, so that at one batch size an image is the same bit for bit in any number.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.config import InputError, SamplingConfig
from ddpm_lab.data import to_uint8
from ddpm_lab.images import check_writable, image_grid, save_npz, save_png, visible_scale
from ddpm_lab.progress import duration, progress
from ddpm_lab.samplers import Step, ddim_steps, ddpm_steps
from ddpm_lab.trained import TrainedModel, Weights, load

MAX_GRID_IMAGES = 16_384


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
        num_steps: steps, and evaluations of the network, per image.
        steps: called as steps(x_T, noise).
    """

    num_steps: int
    steps: Callable[[Tensor, Callable[[int], Tensor]], Iterator[Step]]


def build_sampler(trained: TrainedModel, config: SamplingConfig) -> Sampler:
    """Resolve a sampler's settings.

    Raises:
        InputError: more steps than the network has timesteps.
    """
    T = trained.schedule.num_timesteps
    num_steps = config.num_steps or (T if config.sampler == "ddpm" else min(50, T))
    if num_steps > T:
        raise InputError(
            f"num_steps must be from 1 to the {T} timesteps {trained.name} was trained on, not {num_steps}"
        )
    prediction = trained.config.diffusion.prediction
    model, schedule, spacing = trained.model, trained.schedule, config.spacing
    if config.sampler == "ddpm":
        return Sampler(
            num_steps,
            lambda x_T, noise: ddpm_steps(
                model, schedule, x_T, num_steps,
                noise=noise, spacing=spacing, variance=config.variance, prediction=prediction,
            ),
        )  # fmt: skip
    return Sampler(
        num_steps,
        lambda x_T, noise: ddim_steps(
            model, schedule, x_T, num_steps, eta=config.eta or 0.0, noise=noise, spacing=spacing, prediction=prediction
        ),
    )


def generate(
    trained: TrainedModel,
    num_images: int,
    config: SamplingConfig,
    on_step: Callable[[int], object] = lambda rows: None,
) -> Iterator[Tensor]:
    """Sample images 0 .. num_images - 1 of a seed, batch by batch.

    Args:
        trained: the network and its process.
        num_images: at least 1.
        config: sampler, steps, seed, batch size.
        on_step: called after each step of each batch with the number of images wanted of it.
    Yields:
        uint8 (b, C, H, W) on the CPU, `batch_size` images at most.
    Raises:
        InputError: num_images below 1, or settings that do not fit the network.
    """
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, not {num_images}")
    sampler = build_sampler(trained, config)
    device = next(trained.model.parameters()).device
    for first in range(0, num_images, config.batch_size):
        wanted = min(config.batch_size, num_images - first)
        noise = ImageNoise(config.seed, range(first, first + config.batch_size), trained.image_shape, device)
        x_0 = noise(-1)
        for step in sampler.steps(x_0, noise):
            x_0 = step.x_s
            on_step(wanted)
        yield to_uint8(x_0[:wanted]).cpu()


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
    """Sample into a PNG grid or an .npz.

    Args:
        source, weights, checkpoint, device: see `trained.load`.
        out: ends in .png or .npz; replaced once the new one is whole.
        num_images, config: see `generate`.
    Returns:
        A line that says what was made.
    Raises:
        InputError: a source, setting or path that cannot be used; told before any work.
    """
    check_writable(out, (".png", ".npz"))
    grid = out.suffix.lower() == ".png"
    if not 1 <= num_images <= (MAX_GRID_IMAGES if grid else 10_000_000):
        limit = f"{MAX_GRID_IMAGES} in one picture (more go into an .npz)" if grid else "10000000"
        raise InputError(f"num_images must be from 1 to {limit}, not {num_images}")
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    sampler = build_sampler(trained, config)
    begun = time.monotonic()
    with progress("sampling", num_images * sampler.num_steps, "evaluations") as advance:
        batches = generate(trained, num_images, config, on_step=advance)
        if grid:
            save_png(out, image_grid(torch.cat(list(batches)), scale=visible_scale(trained.image_shape[1])))
        else:
            save_npz(out, batches, num_images)
    return (
        f"{out}: {num_images} images of {source} at step {trained.step} ({weights}), {config.sampler}, "
        f"{sampler.num_steps} of {trained.schedule.num_timesteps} steps, seed {config.seed}, "
        f"{duration(time.monotonic() - begun)}"
    )

"""The peers as they are used: a training step and a sampler of each, as their own examples and trainers write them.

diffusers: its example of unconditional training. denoising-diffusion-pytorch: its `Trainer`, without the loader.
"""

import contextlib
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lab.core.device import autocast
from ddpm_lab.diffusion.unet import UNet
from ddpm_lab.models.diffusers_format import diffusers_network


@dataclass(frozen=True)
class Peer:
    """A peer at work on images of one shape.

    Attributes:
        step: trains on one batch: loss, gradient, its norm clipped, optimiser, moving average.
        sample: given a number of images and of DDIM steps, images of the averaged weights, (N, C, H, W) uint8.
        num_parameters: of its network.
    """

    step: Callable[[], object]
    sample: Callable[[int, int], Tensor]
    num_parameters: int


def diffusers_peer(
    like: UNet,
    image_shape: tuple[int, int, int],
    dtype: torch.dtype,
    batch: Callable[[], Tensor],
    num_steps: int = 100_000,
) -> Peer:
    """diffusers, with the network and first weights of `like`, and its example's settings.

    Args:
        batch: gives (B, C, H, W) float32 in [-1, 1], where `like` is.
        num_steps: over which the learning rate falls.
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = next(like.parameters()).device
    network = diffusers_network(like, image_shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=num_steps)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    schedule = DDPMScheduler(num_train_timesteps=1000)

    done = itertools.count(1)

    def step() -> None:
        x_0 = batch()
        eps = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=device)
        with autocast(device, dtype):
            output = network(schedule.add_noise(x_0, eps, t), t).sample
        torch.autograd.backward(nn.functional.mse_loss(output.float(), eps))
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if next(done) < num_steps:  # beyond them its cosine would rise again
            rates.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    def sample(num_images: int, num_steps: int) -> Tensor:
        average.store(network.parameters())
        average.copy_to(network.parameters())
        images = diffusers_images(network.eval(), num_images, num_steps)
        average.restore(network.parameters())
        network.train()
        return images

    return Peer(step, sample, sum(parameter.numel() for parameter in network.parameters()))


def diffusers_images(network: Any, num_images: int, num_steps: int) -> Tensor:
    """Images by its DDIMPipeline, (N, C, H, W) uint8."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(network, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=num_images, num_inference_steps=num_steps, output_type="np").images
    return torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)


def denoising_diffusion(
    num_parameters: int, levels: int, image_shape: tuple[int, int, int], num_steps: int | None = None
) -> Any:
    """denoising-diffusion-pytorch's process around its network of the width that comes nearest to a size.

    Args:
        levels: of its network, whose multipliers are 1, 2, 4, 8 by default.
        num_steps: of DDIM; None: it samples by all 1000 steps.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    def build(width: int) -> Any:
        return Unet(width, dim_mults=(1, 2, 4, 8)[:levels], channels=image_shape[0])

    def excess(width: int) -> int:
        with torch.device("meta"):
            return abs(int(sum(parameter.numel() for parameter in build(width).parameters())) - num_parameters)

    network = build(min(range(8, 160, 8), key=excess))
    return GaussianDiffusion(network, image_size=image_shape[1], sampling_timesteps=num_steps)


def denoising_peer(
    num_parameters: int,
    levels: int,
    image_shape: tuple[int, int, int],
    dtype: torch.dtype,
    batch: Callable[[], Tensor],
) -> Peer:
    """denoising-diffusion-pytorch, with its Trainer's settings; the rest as in `diffusers_peer`."""
    from ema_pytorch import EMA

    device = batch().device
    diffusion = denoising_diffusion(num_parameters, levels, image_shape).to(device).train()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)

    def step() -> None:
        with autocast(device, dtype):
            loss = diffusion((batch() + 1) / 2)  # it takes 0 .. 1
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    def sample(num_images: int, num_steps: int) -> Tensor:
        averaged = average.ema_model.eval()
        averaged.sampling_timesteps, averaged.is_ddim_sampling = num_steps, True
        return denoising_images(averaged, num_images)

    return Peer(step, sample, sum(parameter.numel() for parameter in diffusion.parameters()))


def denoising_images(diffusion: Any, num_images: int) -> Tensor:
    """Images by its sampler, (N, C, H, W) uint8."""
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        images = diffusion.sample(batch_size=num_images)
    quantised: Tensor = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return quantised

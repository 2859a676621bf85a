"""What training will cost, said before it starts: parameters, operations, time, disk."""

import time
from statistics import median

import torch
from rich.filesize import decimal

from ddpm_lab.core.config import Config
from ddpm_lab.core.device import autocast, resolve_precision
from ddpm_lab.core.progress import duration
from ddpm_lab.data.datasets import ImageSet
from ddpm_lab.diffusion.process import diffusion_loss
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.training.loop import TrainingState


def training_cost(
    config: Config,
    state: TrainingState,
    schedule: NoiseSchedule,
    training_set: ImageSet,
    device: torch.device,
) -> str:
    """One line on what a run will cost, counted or measured before it starts.

    Args:
        state: where training stands; its weights stay as they are.
        training_set: gives the shape of the images.
    """
    training = config.training
    parameters = sum(p.numel() for p in state.model.parameters())
    image_shape = tuple(training_set.images.shape[1:])
    dtype = resolve_precision(training.precision, device)
    seconds = step_seconds(state, schedule, image_shape, config, device) * (training.num_steps - state.step)
    kept = training.keep_checkpoints or -(-training.num_steps // training.checkpoint_every)
    kept = min(kept, -(-training.num_steps // training.checkpoint_every))
    stored = parameters * (16 * kept + 12)  # checkpoints, and three averages
    return (
        f"{training_set.name}, {len(training_set)} images of "
        f"{' x '.join(map(str, image_shape))}; {parameters:,} parameters, "
        f"{forward_flops(state.model, image_shape) / 1e9:.3g} GFLOP an image forward, about three times that to train; "
        f"steps {state.step} to {training.num_steps} of {training.batch_size} images on {device} in "
        f"{str(dtype).removeprefix('torch.')}: about {duration(seconds)}, without validation and samples; "
        f"up to {decimal(stored)} of checkpoints"
    )


def forward_flops(model: torch.nn.Module, image_shape: tuple[int, ...]) -> int:
    """Floating-point operations of one evaluation for one image: two for each multiplication."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Without data, and with attention as products: the fused kernel of the CPU is not counted.
    weights = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = torch.zeros(1, *image_shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, inputs)
    return int(counter.get_total_flops())


def step_seconds(
    state: TrainingState, schedule: NoiseSchedule, image_shape: tuple[int, ...], config: Config, device: torch.device
) -> float:
    """Time of a training step, from a forward and backward pass over part of a batch; weights stay as they are."""
    rows = min(config.training.batch_size, 32)
    x_0 = torch.zeros(rows, *image_shape, device=device)
    dtype = resolve_precision(config.training.precision, device)
    passes = []
    for _ in range(4):  # the first ones also warm up, and other programs may disturb any
        begun = time.monotonic()
        with autocast(device, dtype):
            loss = diffusion_loss(state.model, schedule, x_0)
        torch.autograd.backward(loss)
        float(loss.detach())
        passes.append(time.monotonic() - begun)
    state.optimizer.zero_grad()
    return min(passes) * config.training.batch_size / rows


def evaluation_seconds(
    model: torch.nn.Module, image_shape: tuple[int, ...], precision: str, device: torch.device, rows: int = 64
) -> float:
    """Time of one evaluation for one image, from batches of 64: the median of five, after one to warm up."""
    x_t, t = torch.zeros(rows, *image_shape, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    passes = []
    for _ in range(6):
        begun = time.monotonic()
        with torch.no_grad(), autocast(device, resolve_precision(precision, device)):
            float(model(x_t, t).float().sum())
        passes.append(time.monotonic() - begun)
    return median(passes[1:]) / rows

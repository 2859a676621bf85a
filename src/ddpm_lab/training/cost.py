"""An estimate of what training costs, before it starts: parameters, operations, time, disk."""

import timeit
from statistics import median

import torch
from rich.filesize import decimal

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config
from ddpm_lab.core.device import autocast, compiled, resolve_precision
from ddpm_lab.core.progress import duration
from ddpm_lab.data.datasets import ImageSet
from ddpm_lab.diffusion.process import diffusion_loss
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.training.loop import TrainingState, is_compiled


def training_cost(
    config: Config, state: TrainingState, schedule: NoiseSchedule, training_set: ImageSet, device: torch.device
) -> str:
    """What the rest of a run costs, counted or measured, in one line.

    Args:
        state: the training state; its weights are not changed.
        training_set: gives the shape of the images.
    """
    training = config.training
    parameters = sum(p.numel() for p in state.model.parameters())
    image_shape = tuple(training_set.images.shape[1:])
    dtype = resolve_precision(training.precision, device)
    seconds = step_seconds(state, schedule, image_shape, config, device) * (training.num_steps - state.step)
    checkpoints = -(-training.num_steps // training.checkpoint_every)
    checkpoints = min(training.keep_checkpoints or checkpoints, checkpoints)
    num_bytes = parameters * (16 * checkpoints + 12)  # network, average, two moments; and three kept averages
    return (
        f"{training_set.name}, {len(training_set)} images of "
        f"{' x '.join(map(str, image_shape))}; {parameters:,} parameters, "
        f"{forward_flops(state.model, image_shape) / 1e9:.3g} GFLOP an image forward, about three times that to train; "
        f"steps {state.step} to {training.num_steps} of {training.batch_size} images on {device} in "
        f"{str(dtype).removeprefix('torch.')}{', compiled' * is_compiled(training, device)}: "
        f"about {duration(seconds)}, without validation and samples; "
        f"up to {decimal(num_bytes)} of checkpoints"
    )


def forward_flops(model: torch.nn.Module, image_shape: tuple[int, ...]) -> int:
    """Floating-point operations of one evaluation for one image; a multiplication with its addition counts as two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device nothing is computed. The counter does not know the CPU's fused attention, but knows products.
    weights = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = torch.zeros(1, *image_shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, inputs)
    return int(counter.get_total_flops())


def step_seconds(
    state: TrainingState, schedule: NoiseSchedule, image_shape: tuple[int, ...], config: Config, device: torch.device
) -> float:
    """Seconds of a training step, from passes over this process's share of a batch; weights are not changed.

    A compiled network is measured with the whole share, as training compiles it, and others with up to 32 images of it.
    What several processes take to average their gradients is left out.
    """
    share = config.training.batch_size // processes.world_size()
    network: torch.nn.Module = state.model
    images = min(share, 32)
    if is_compiled(config.training, device):
        network, images = compiled(state.model), share
    x_0 = torch.zeros(images, *image_shape, device=device)
    dtype = resolve_precision(config.training.precision, device)

    def forward_and_backward() -> None:
        with autocast(device, dtype):
            loss = diffusion_loss(network, schedule, x_0)
        torch.autograd.backward(loss)
        float(loss.detach())  # waits for the device

    # The first passes warm up or compile, and other programs may disturb any.
    seconds = min(timeit.repeat(forward_and_backward, number=1, repeat=4))
    state.optimizer.zero_grad()
    return seconds * share / images


def evaluation_seconds(
    model: torch.nn.Module, image_shape: tuple[int, ...], precision: str, device: torch.device, batch_size: int = 64
) -> float:
    """Seconds of one evaluation for one image: the median of five batches, after one to warm up."""
    x_t = torch.zeros(batch_size, *image_shape, device=device)
    t = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def evaluate() -> None:
        with torch.no_grad(), autocast(device, resolve_precision(precision, device)):
            float(model(x_t, t).float().sum())  # waits for the device

    return median(timeit.repeat(evaluate, number=1, repeat=6)[1:]) / batch_size

"""Class labels and guidance.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), or autoguidance by a weaker network (Karras et al.
2024, arXiv:2406.02507); at all noise levels, or in an interval of them (Kynkaanniemi et al. 2024, arXiv:2404.07724).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.diffusion.unet import UNet


class ClassModel(Protocol):
    """A network with labels: x_t (B, C, H, W), t (B,) int64, y (B,) int64 or None (unconditional) -> (B, C, H, W)."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor: ...


def guided(
    network: ClassModel,
    y: Tensor | None,
    num_classes: int,
    guidance: float | Tensor = 1.0,
    *,
    guide: Model | None = None,
    timesteps: range | None = None,
) -> Model:
    """The network with fixed labels and with guidance, as a model of x_t and t.

    output = baseline + guidance (prediction - baseline). In classifier-free guidance `baseline` is the unconditional
    output of the same network (eq. 6 of the paper, whose w is guidance - 1); in autoguidance it is the output of
    another network, smaller or trained for a shorter time (eq. 3). The formula is the same for all kinds of prediction,
    because each is linear in the others.

    Args:
        network: the network to guide.
        y: (B,) int64 labels in [0, num_classes); None: an unconditional network.
        num_classes: the number of classes, which is also the label of an unconditional evaluation.
        guidance: the guidance scale, a number or (B,) floating; the number 1 takes one evaluation, others take two.
        guide: the other network, with the same labels; None: classifier-free guidance.
        timesteps: the timesteps with guidance; None: all. If given, all images of a batch must be at one timestep.
    Returns:
        A model, called as model(x_t, t) with B images.
    """

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        unguided = isinstance(guidance, int | float) and guidance == 1
        if unguided or (timesteps is not None and int(t[0]) not in timesteps):
            return network(x_t, t) if y is None else network(x_t, t, y)
        if guide is None:
            assert y is not None
            no_label = torch.full_like(y, num_classes)
            both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, no_label]))
            B = y.shape[0]  # len(y) would be a fixed number in an exported graph
            prediction, baseline = both[:B], both[B:]
        else:
            prediction, baseline = (network(x_t, t) if y is None else network(x_t, t, y)), guide(x_t, t)
        scale = guidance[:, None, None, None] if isinstance(guidance, Tensor) else guidance
        return baseline + scale * (prediction - baseline)

    return model


def guided_timesteps(schedule: NoiseSchedule, interval: Sequence[float]) -> range:
    """The timesteps whose noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) lies in an interval.

    Args:
        interval: the lowest and the highest noise level; empty: all timesteps.
    Raises:
        InputError: no timestep lies in the interval.
    """
    if not interval:
        return range(schedule.num_timesteps)
    sigma = schedule.snr**-0.5  # increasing in t
    first = int(torch.searchsorted(sigma, interval[0]))
    last = int(torch.searchsorted(sigma, interval[1], right=True))
    if first >= last:
        raise InputError(
            f"guidance_interval {interval[0]:g} {interval[1]:g} contains no timestep; the noise levels are from "
            f"{float(sigma[0]):.3g} to {float(sigma[-1]):.3g}"
        )
    return range(first, last)


def conditional(model: Model, labels: Tensor | None) -> Model:
    """The network with fixed labels, (B,) int64, as a model of x_t and t; the network itself if labels is None."""
    if labels is None:
        return model
    assert isinstance(model, UNet)
    return guided(model, labels, model.num_classes)


def drop_labels(y: Tensor, num_classes: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace labels, (B,) int64, by num_classes (no label) at random, so that the network also learns to do without.

    Ho and Salimans 2022, algorithm 1.
    """
    dropped = torch.rand(y.shape, generator=generator, device=y.device) < probability
    return torch.where(dropped, num_classes, y)


def classes_in_turn(chosen: Sequence[int], num_classes: int, indices: range) -> Tensor:
    """The class of each image, (len(indices),) int64: image i has class i of `chosen` (empty: all), in a cycle."""
    cycle = chosen or range(num_classes)
    return torch.tensor([cycle[i % len(cycle)] for i in indices])


def guidance_label(record: Mapping[str, Any]) -> str:
    """The guidance of a score record, to follow the name of a sampler: ", guidance 2 by runs/a at step 650".

    Without guidance it is empty. Entries of an unexpected form are left out.
    """
    scale, guide, interval = (record.get(name) for name in ("guidance", "guide", "guidance_interval"))
    if not fits(scale, float) or scale == 1:
        return ""
    by = f" by {guide.get('name')} at step {guide.get('step')}" if isinstance(guide, dict) else ""
    levels = ""
    if isinstance(interval, list) and len(interval) == 2 and all(fits(level, float) for level in interval):
        levels = f" at noise levels {interval[0]:g} to {interval[1]:g}"
    return f", guidance {scale:g}{by}{levels}"

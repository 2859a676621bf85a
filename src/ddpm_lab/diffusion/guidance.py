"""Classes: which one each image is asked for; and guidance.

Classifier-free (Ho and Salimans 2022, arXiv:2207.12598), or by a worse network (autoguidance, Karras et al. 2024,
arXiv:2406.02507); at all noise levels, or in an interval of them (Kynkaanniemi et al. 2024, arXiv:2404.07724).
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
    """A network that is told classes: x_t (B, C, H, W), t (B,) int64, y (B,) int64 or None for none -> (B, C, H, W)."""

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
    """The network asked for these classes, and driven away from a worse answer, as a model of x_t and t.

    output = worse + guidance (asked - worse). In classifier-free guidance `worse` is the output of the same network
    without a class (eq. 6 of the paper, whose w is guidance - 1); in autoguidance that of another network, trained for
    a shorter time or smaller (eq. 3). It holds for any prediction, for each is linear in the others.

    Args:
        network: to be asked.
        y: (B,) int64 classes in [0, num_classes); None: of a network that is told none.
        num_classes: whose number stands for none.
        guidance: 1 asks the network once, anything else twice; a number, or one for each image, (B,) floating.
        guide: the other network, given the same classes; None: the same network without a class.
        timesteps: those at which guidance acts; None: all. With them the images of a batch must be at one timestep.
    Returns:
        Called as model(x_t, t) with B images.
    """

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        alone = isinstance(guidance, int | float) and guidance == 1
        if alone or (timesteps is not None and int(t[0]) not in timesteps):
            return network(x_t, t) if y is None else network(x_t, t, y)
        if guide is None:
            assert y is not None
            none = torch.full_like(y, num_classes)
            both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, none]))
            B = y.shape[0]  # len(y) would be a fixed number in an exported graph
            asked, worse = both[:B], both[B:]
        else:
            asked, worse = (network(x_t, t) if y is None else network(x_t, t, y)), guide(x_t, t)
        scale = guidance[:, None, None, None] if isinstance(guidance, Tensor) else guidance
        return worse + scale * (asked - worse)

    return model


def guided_timesteps(schedule: NoiseSchedule, interval: Sequence[float]) -> range:
    """The timesteps whose noise level sigma = sqrt((1 - alpha_bar) / alpha_bar) lies in an interval.

    Args:
        interval: the lowest and the highest noise level; none: all.
    Raises:
        InputError: no timestep lies in it.
    """
    if not interval:
        return range(schedule.num_timesteps)
    sigma = schedule.snr**-0.5  # increasing in t
    first = int(torch.searchsorted(sigma, interval[0]))
    last = int(torch.searchsorted(sigma, interval[1], right=True))
    if first >= last:
        raise InputError(
            f"guidance_interval {interval[0]:g} {interval[1]:g} holds no timestep; their noise levels go from "
            f"{float(sigma[0]):.3g} to {float(sigma[-1]):.3g}"
        )
    return range(first, last)


def conditional(model: Model, labels: Tensor | None) -> Model:
    """A network told the classes of these images, (B,) int64, as a model that knows none of it; None: as it is."""
    if labels is None:
        return model
    assert isinstance(model, UNet)
    return guided(model, labels, model.num_classes)


def drop_labels(y: Tensor, num_classes: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace classes by none at random, (B,) int64, so that one network learns both sides of `guided`."""
    withheld = torch.rand(y.shape, generator=generator, device=y.device) < probability
    return torch.where(withheld, num_classes, y)


def classes_in_turn(chosen: Sequence[int], num_classes: int, indices: range) -> Tensor:
    """The class of each image: image i has the i-th of those chosen (all, where none are), again from the first after
    the last, (len(indices),) int64."""
    cycle = chosen or range(num_classes)
    return torch.tensor([cycle[i % len(cycle)] for i in indices])


def guidance_label(record: Mapping[str, Any]) -> str:
    """Guidance in words, for behind a sampler's name: ", guidance 2 by runs/a at step 650"; else nothing.

    Any record will do: what is not as a score's record has it says nothing.
    """
    scale, guide, interval = (record.get(name) for name in ("guidance", "guide", "guidance_interval"))
    if not fits(scale, float) or scale == 1:
        return ""
    by = f" by {guide.get('name')} at step {guide.get('step')}" if isinstance(guide, dict) else ""
    both = isinstance(interval, list) and len(interval) == 2 and all(fits(level, float) for level in interval)
    levels = f" at noise levels {interval[0]:g} to {interval[1]:g}" if both and isinstance(interval, list) else ""
    return f", guidance {scale:g}{by}{levels}"

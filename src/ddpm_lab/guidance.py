"""Classes: which one each image is asked for, and classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm_lab.diffusion import Model
from ddpm_lab.unet import UNet


class ClassModel(Protocol):
    """A network that is told classes: x_t (B, C, H, W), t (B,) int64, y (B,) int64 or None for none -> (B, C, H, W)."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor: ...


def guided(network: ClassModel, y: Tensor, num_classes: int, guidance: float = 1.0) -> Model:
    """The network asked for these classes, as a model that knows none of it.

    output = free + guidance (asked - free), with `free` what the network says where it is told no class: eq. 6 of the
    paper, whose w is guidance - 1. It holds for any prediction, for each is linear in the others.

    Args:
        network: to be asked.
        y: (B,) int64 classes in [0, num_classes).
        num_classes: whose number stands for none.
        guidance: 1 asks the network once; any other number asks it for twice as many images.
    Returns:
        Called as model(x_t, t) with B images.
    """

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return network(x_t, t, y)
        none = torch.full_like(y, num_classes)
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, none]))
        B = y.shape[0]  # len(y) would be a fixed number in an exported graph
        asked, free = both[:B], both[B:]
        return free + guidance * (asked - free)

    return model


def told(model: Model, labels: Tensor | None) -> Model:
    """A network told the classes of these images, (B,) int64, as a model that knows none of it; None: as it is."""
    if labels is None:
        return model
    assert isinstance(model, UNet)
    return guided(model, labels, model.num_classes)


def withhold(y: Tensor, num_classes: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace classes by none at random, (B,) int64, so that one network learns both sides of `guided`."""
    withheld = torch.rand(y.shape, generator=generator, device=y.device) < probability
    return torch.where(withheld, num_classes, y)


def classes_in_turn(chosen: Sequence[int], num_classes: int, indices: range) -> Tensor:
    """The class of each image: image i has the i-th of those chosen (all, where none are), again from the first after
    the last, (len(indices),) int64."""
    cycle = chosen or range(num_classes)
    return torch.tensor([cycle[i % len(cycle)] for i in indices])

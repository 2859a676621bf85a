"""Images in memory that a notebook shows, and the call that samples some."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import require
from ddpm_lab.core.progress import progress
from ddpm_lab.models.trained import TrainedModel, Weights, load
from ddpm_lab.sampling.generation import build_sampler, generate
from ddpm_lab.sampling.image_files import image_grid, visible_scale

MAX_SHOWN = 256  # images in a grid: more would be too small to see, and would fill the notebook


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Images that a notebook shows as a grid.

    `numpy.asarray(images)` is an array of the tensor's layout. An index, a slice or a mask selects images, as Images.

    Attributes:
        tensor: (N, C, H, W) uint8, C of 1 or 3.
        columns: images per row of the grid; None: those of the smallest square that holds all.
        scale: whole factor of enlargement; None: to 56 pixels or more.
    Raises:
        InputError: another shape or dtype.
    """

    tensor: Tensor
    columns: int | None = None
    scale: int | None = None

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.tensor.shape), self.tensor.dtype
        fits = len(shape) == 4 and shape[1] in (1, 3) and dtype == torch.uint8
        require(fits, f"images must be (N, 1 or 3, H, W) uint8, not {shape} {dtype}")

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> "Images":
        chosen = self.tensor[index]
        return replace(self, tensor=chosen[None] if isinstance(index, int) else chosen)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.tensor.cpu().numpy(), dtype, copy=copy)

    def __repr__(self) -> str:
        N, *shape = self.tensor.shape
        return f"{N} images of {' x '.join(map(str, shape))}"

    def _repr_png_(self) -> bytes | None:
        """The grid of the first 256 images, as a notebook asks for it."""
        from PIL import Image

        if not len(self):
            return None
        scale = self.scale or visible_scale(self.tensor.shape[2])
        content = io.BytesIO()
        Image.fromarray(image_grid(self.tensor[:MAX_SHOWN], self.columns, scale)).save(content, "PNG")
        return content.getvalue()


def sample(
    source: str | Path | TrainedModel,
    num_images: int = 16,
    *,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
    **settings: Any,
) -> Images:
    """Sample images from a trained network, as `ddpm sample` does.

    Args:
        source: as for `load`, or what `load` returned.
        num_images: at least 1; image i of a seed does not depend on it.
        weights, checkpoint, device: as for `load`.
        settings: fields of `SamplingConfig`: sampler, num_steps, seed, guidance and so on; `class_` may be one name or
            number.
    Raises:
        InputError: no such source, or a setting that does not exist or fit.
    """
    trained = opened(source, weights, checkpoint, device)
    config = sampling_config(settings)
    with progress("sampling", num_images * build_sampler(trained, config).num_steps, "steps") as advance:
        return Images(torch.cat(list(generate(trained, num_images, config, on_step=advance))))


def opened(source: str | Path | TrainedModel, weights: Weights, checkpoint: int | None, device: str) -> TrainedModel:
    """The model itself, or what `load` returns for its source."""
    if isinstance(source, TrainedModel):
        return source
    return load(source, weights=weights, checkpoint=checkpoint, device=device)


def sampling_config(settings: Mapping[str, Any]) -> SamplingConfig:
    """The settings of a call from Python, see `sample`."""
    chosen = settings.get("class_", ())
    return SamplingConfig.from_dict({**settings, "class_": chosen if isinstance(chosen, tuple | list) else (chosen,)})

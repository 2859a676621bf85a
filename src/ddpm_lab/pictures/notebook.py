"""Curves and films in one call, for a notebook, which shows what these functions return."""

import base64
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_lab.core.files import replace_atomically
from ddpm_lab.models.trained import TrainedModel, Weights
from ddpm_lab.pictures.curves import read_runs, save_figure, training_figure
from ddpm_lab.pictures.picture_settings import PictureConfig
from ddpm_lab.pictures.reverse import show_reverse
from ddpm_lab.sampling.images import opened, sampling_config


@dataclass(frozen=True)
class Shown:
    """A picture or film that a notebook shows.

    Attributes:
        content: of a PNG or GIF file.
    """

    content: bytes = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        replace_atomically(Path(path), self.content)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        encoded = base64.b64encode(self.content).decode()
        if self.content.startswith(b"GIF"):  # not every notebook takes image/gif
            return {"text/html": f'<img src="data:image/gif;base64,{encoded}">'}
        return {"image/png": encoded}


def curves(*runs: str | Path) -> Shown:
    """The curves of runs: loss, loss by timestep, images per second, and scores, as `ddpm curves training` draws them.

    Args:
        runs: run folders, which may still be training.
    Raises:
        InputError: none is named, or one is not a run or has logged nothing yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = save_figure(Path(folder) / "curves.png", training_figure(read_runs(list(map(Path, runs)))))
        return Shown(picture.read_bytes())


def film(
    *sources: str | Path | TrainedModel,
    num_images: int = 4,
    frames: int | None = None,
    fps: int = 20,
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
    **settings: Any,
) -> Shown:
    """A film of images that come out of noise, beside the predicted images, as `ddpm reverse` makes it.

    Args:
        sources: as for `load`, or what `load` returned; several advance together.
        num_images: from 1 to 64, of each.
        frames: None: one for each state, at most 101.
        fps: frames per second, from 1 to 50.
        weights, checkpoint, device: as for `load`.
        settings: of the sampler, as for `sample`.
    Raises:
        InputError: no such source, or a setting that does not exist or fit.
    """
    generators = [opened(source, weights, checkpoint, device) for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        out, picture = Path(folder) / "film.gif", PictureConfig(frames=frames, fps=fps)
        show_reverse(out, generators, sampling_config(settings), num_images=num_images, settings=picture)
        return Shown(out.read_bytes())

"""Show the forward process: real images that turn into noise, as a picture or a film.

Figures count timesteps as the paper does: t = 0 is the clean image, t = T is noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ddpm_lab.core.config import DiffusionConfig
from ddpm_lab.core.errors import require
from ddpm_lab.core.seeds import check_seed
from ddpm_lab.data.datasets import DATASETS, load_images, to_float, to_uint8
from ddpm_lab.diffusion.process import q_sample, q_step
from ddpm_lab.diffusion.schedule import NoiseSchedule, build_schedule, sampling_timesteps
from ddpm_lab.pictures import drawing
from ddpm_lab.pictures.film import check_output, save_drawing
from ddpm_lab.pictures.picture_settings import PictureConfig, check_num_images, is_film

Betas = Literal["rescaled", "fixed", "cosine"]
ColumnSpacing = Literal["uniform", "logsnr"]
BETAS: dict[Betas, dict[str, Any]] = {
    "rescaled": {"rescale_betas": True},
    "fixed": {"rescale_betas": False},
    "cosine": {"schedule": "cosine"},
}


def forward_processes(num_timesteps: Sequence[int], betas: Sequence[Betas]) -> list[DiffusionConfig]:
    """Forward processes for every combination of a kind of betas and a length of chain.

    Args:
        num_timesteps: T, from 2 to 10,000 (above 20 for 'rescaled').
        betas: 'rescaled' (linear, times 1000 / T), 'fixed' (linear, 1e-4 .. 0.02 at every T) or 'cosine'.
    Raises:
        InputError: T is out of range, or one of the two lists is empty.
    """
    require(bool(num_timesteps and betas), "name at least one number of timesteps and one kind of betas")
    return [DiffusionConfig(num_timesteps=T, **BETAS[kind]) for kind, T in product(betas, num_timesteps)]


def process_label(process: DiffusionConfig) -> str:
    """The label of a forward process in figures, such as 'T = 1000, linear, rescaled'."""
    convention = process.beta_convention
    return f"T = {process.num_timesteps}, {convention if convention == 'cosine' else f'linear, {convention}'}"


def shown_timesteps(schedule: NoiseSchedule, count: int, spacing: ColumnSpacing = "uniform") -> list[int]:
    """Timesteps for the columns of a picture or the frames of a film, from 0, the clean image, to T.

    Args:
        count: from 2 to T + 1.
        spacing: even in t, or (from the second on) even in the logarithm of the signal-to-noise ratio.
    Returns:
        `count` distinct integers, increasing.
    Raises:
        InputError: `count` is out of range.
    """
    T = schedule.num_timesteps
    require(2 <= count <= T + 1, f"columns must be from 2 to {T + 1}, the timesteps 0 .. {T}, not {count}")
    return [0, *(t + 1 for t in reversed(sampling_timesteps(schedule, count - 1, spacing)))]


def forward_states(
    schedule: NoiseSchedule, x_0: Tensor, timesteps: Sequence[int], seed: int = 0, closed_form: bool = False
) -> Tensor:
    """Images at some timesteps of the forward process.

    Args:
        x_0: (N, C, H, W) floating, in [-1, 1].
        timesteps: increasing, each from 0 (x_0 itself) to T.
        seed: of the noise.
        closed_form: True: jump to each timestep (Ho et al. 2020, eq. 4), with the same noise for all; False: go step by
            step (eq. 2), with new noise at each step.
    Returns:
        (len(timesteps), N, C, H, W), not clipped.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)

    def index(t: int) -> Tensor:
        return torch.full((len(x_0),), t - 1)  # code counts from 0, figures from 1

    if closed_form:
        eps = noise()
        return torch.stack([q_sample(schedule, x_0, index(t), eps) if t else x_0 for t in timesteps])
    states, x_t, wanted = {0: x_0}, x_0, set(timesteps)
    for t in range(1, timesteps[-1] + 1):
        x_t = q_step(schedule, x_t, index(t), noise())
        if t in wanted:
            states[t] = x_t
    return torch.stack([states[t] for t in timesteps])


def snr_at(schedule: NoiseSchedule, t: int) -> float:
    """Signal-to-noise ratio at a timestep as figures count it; infinite at 0."""
    return float(schedule.snr[t - 1]) if t else float("inf")


@dataclass(frozen=True)
class NoisedImages:
    """Images at some timesteps of a forward process.

    Attributes:
        label: of the process, for figures.
        schedule: of the process.
        timesteps: S timesteps as figures count them, increasing, from 0 to T.
        x_t: the states, (S, N, C, H, W) uint8.
    """

    label: str
    schedule: NoiseSchedule
    timesteps: list[int]
    x_t: Tensor

    def snr(self) -> list[str]:
        """The signal-to-noise ratio at each timestep, for captions."""
        return [drawing.short_number(snr_at(self.schedule, t)) for t in self.timesteps]


def noised_images(
    process: DiffusionConfig,
    x_0: Tensor,
    num_states: int,
    spacing: ColumnSpacing = "uniform",
    seed: int = 0,
    closed_form: bool = False,
) -> NoisedImages:
    """Images at `num_states` timesteps of a process, from the clean images to noise.

    Args:
        x_0: (N, C, H, W) floating, in [-1, 1].
        num_states: from 2 to T + 1.
        spacing: see `shown_timesteps`.
        seed, closed_form: see `forward_states`.
    """
    schedule = build_schedule(process)
    timesteps = shown_timesteps(schedule, num_states, spacing)
    x_t = to_uint8(forward_states(schedule, x_0, timesteps, seed, closed_form))
    return NoisedImages(process_label(process), schedule, timesteps, x_t)


def forward_picture(processes: Sequence[NoisedImages], scale: int | None = None) -> drawing.Picture:
    """A table for each process, one above another: a row for each image and a column for each timestep.

    Args:
        scale: whole factor of enlargement; None: to 56 pixels or more.
    """
    tables = []
    for noised in processes:
        captions = [("t", [str(t) for t in noised.timesteps]), ("SNR", noised.snr())]
        images = noised.x_t.transpose(0, 1)
        tables.append(drawing.image_table(images, scale=scale, title=noised.label, captions=captions))
    return drawing.framed(drawing.stacked(tables, gap=drawing.LINE))


def forward_frames(processes: Sequence[NoisedImages], scale: int | None = None) -> Iterator[drawing.Picture]:
    """The frames of a film: the images at t beside the curves of alpha_bar and SNR, on which a mark moves.

    All processes have the same number of states, so that chains of different lengths advance together in t / T.
    """
    captions = [
        [f"t = {t}    SNR {snr}" for t, snr in zip(noised.timesteps, noised.snr(), strict=True)] for noised in processes
    ]
    curves = [Curves(noised.schedule) for noised in processes]
    # All tables get the same width, so that the curves are aligned.
    titles = drawing.text_width((noised.label for noised in processes), drawing.TITLE_SIZE)
    min_width = max(titles, drawing.text_width(caption for texts in captions for caption in texts))
    for index in range(len(processes[0].timesteps)):
        lines = []
        for noised, texts, curve in zip(processes, captions, curves, strict=True):
            images, caption = noised.x_t[index][None], [("", [texts[index]])]
            table = drawing.image_table(images, scale=scale, title=noised.label, captions=caption, min_width=min_width)
            lines.append(drawing.side_by_side([table, curve.marked(noised.timesteps[index])]))
        yield drawing.framed(drawing.stacked(lines))


class Curves:
    """alpha_bar and SNR over t, drawn once, on which a mark can be put at any t.

    Args:
        schedule: of the process.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        from matplotlib.figure import Figure

        self.schedule = schedule
        T = schedule.num_timesteps
        t = np.arange(T + 1)
        alpha_bar = np.array([1.0, *schedule.alpha_bar])
        log_snr = schedule.snr.log10().numpy()
        self._blue, self._orange = drawing.COLOURS[:2]
        figure = Figure(figsize=(2.6, 1.0), dpi=100)
        left = figure.add_axes((0.11, 0.17, 0.78, 0.75))
        right = left.twinx()
        left.plot(t, alpha_bar, color=self._blue, linewidth=1.5)
        right.plot(t[1:], log_snr, color=self._orange, linewidth=1.5)
        left.set(xlim=(0, T), ylim=(-0.04, 1.04), xticks=[0, T // 2, T], yticks=[0, 1])
        ticks = sorted({round(float(log_snr[-1])), 0, round(float(log_snr[0]))})
        right.set_yticks(ticks, [f"1e{tick}" if tick else "1" for tick in ticks])
        for axes, colour in ((left, self._blue), (right, self._orange)):
            axes.tick_params(labelsize=7, length=2, pad=1.5)
            axes.tick_params(axis="y", colors=colour)
            axes.spines["top"].set_visible(False)
        left.text(0.04 * T, 0.05, "ᾱ", color=self._blue, fontsize=9)
        right.text(0.9 * T, log_snr[-1] * 0.55 + log_snr[0] * 0.45, "SNR", color=self._orange, fontsize=8, ha="right")
        self._picture = drawing.rendered(figure)
        # Pixels of the dots at t = 0 .. T; the SNR is infinite at 0, and its dot stays at the first point of the curve.
        self._alpha_bar_dots = left.transData.transform(np.column_stack([t, alpha_bar]))
        self._snr_dots = right.transData.transform(np.column_stack([t, [log_snr[0], *log_snr]]))
        self._line = left.transData.transform([(0, 1.04), (0, -0.04)])[:, 1]

    def marked(self, t: int) -> drawing.Picture:
        """The curves with a vertical line at t, 0 .. T, and a dot on each curve."""
        picture = Image.fromarray(self._picture)
        canvas = ImageDraw.Draw(picture)
        top, bottom = picture.height - self._line
        x = self._alpha_bar_dots[t, 0]
        canvas.line([(x, top), (x, bottom)], fill=drawing.INK, width=1)
        for colour, dots in ((self._blue, self._alpha_bar_dots), (self._orange, self._snr_dots)):
            x, y = dots[t, 0], picture.height - dots[t, 1]
            canvas.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour, outline=drawing.INK)
        return np.asarray(picture)


def show_forward(
    out: Path,
    processes: Sequence[DiffusionConfig],
    dataset: str,
    *,
    split: str | None = None,
    num_images: int = 4,
    spacing: ColumnSpacing = "uniform",
    closed_form: bool = False,
    settings: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> str:
    """Save the forward process of images drawn at random from a data set.

    Args:
        out: ends in .png for a picture, .gif or .mp4 for a film.
        processes: drawn one above another.
        dataset, split, num_images, data_dir, image_size: see `random_images`.
        spacing: see `shown_timesteps`.
        closed_form: see `forward_states`.
        settings: columns or frames, and the size and speed.
        seed: of the choice of images and of the noise.
    Returns:
        A line that describes the file.
    Raises:
        InputError: a setting, the data or the file cannot be used; raised before any work is done.
    """
    check_output(out, settings)
    count = settings.num_states(out, min(process.num_timesteps for process in processes) + 1)
    x_0 = random_images(dataset, split, num_images, seed, data_dir, image_size)
    shown = [noised_images(process, x_0, count, spacing, seed, closed_form) for process in processes]
    draw = forward_frames if is_film(out) else forward_picture
    save_drawing(out, draw(shown, settings.scale), settings, count)
    labels, images = ", ".join(noised.label for noised in shown), f"{dataset}:{split or default_split(dataset)}"
    return f"{out}: {num_images} images of {images} at {count} timesteps, {labels}, seed {seed}"


def default_split(dataset: str) -> str:
    """The split that is shown by default: test, but train for a folder, whose test split is a twentieth of it."""
    return "test" if dataset in DATASETS else "train"


def random_images(
    dataset: str,
    split: str | None,
    num_images: int,
    seed: int,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> Tensor:
    """Images drawn at random from a data set; with more images, the first ones of a seed stay the same.

    Args:
        split: 'train', 'test', or None for `default_split`.
        num_images: from 1 to 64.
        dataset, data_dir, image_size: see `load_images`.
    Returns:
        (N, C, H, W) float32 in [-1, 1].
    Raises:
        InputError: `num_images` is out of range or above the number of images; the seed is negative; `load_images`
            refuses the data set.
    """
    check_num_images(num_images)
    check_seed(seed)
    split = split or default_split(dataset)
    images = load_images(dataset, split, data_dir, image_size, "--image-size").images
    require(
        num_images <= len(images),
        f"num_images of {num_images} exceeds the {len(images)} images of {dataset}:{split}; give fewer",
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return to_float(images[order[:num_images]])

"""The forward process seen: real images on their way into noise, as a picture or a film.

Figures count as the paper does: t = 0 is the clean image, t = T noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import DiffusionConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.core.seeds import check_seed
from ddpm_lab.data.datasets import DATASETS, load_images, to_float, to_uint8
from ddpm_lab.diffusion.process import q_sample, q_step
from ddpm_lab.diffusion.schedule import NoiseSchedule, build_schedule, sampling_timesteps
from ddpm_lab.pictures.drawing import (
    COLOURS,
    INK,
    LINE,
    TITLE_SIZE,
    Picture,
    framed,
    image_table,
    rendered,
    short_number,
    side_by_side,
    stacked,
    text_width,
)
from ddpm_lab.pictures.film import check_kind, save_film
from ddpm_lab.pictures.picture_settings import COLUMNS, PictureConfig, num_columns
from ddpm_lab.sampling.image_files import save_png, visible_scale

Betas = Literal["rescaled", "fixed", "cosine"]
Columns = Literal["uniform", "logsnr"]


@dataclass(frozen=True)
class Process:
    """A forward process and what figures call it."""

    config: DiffusionConfig

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return build_schedule(self.config)

    @property
    def label(self) -> str:
        convention = self.config.beta_convention
        return f"T = {self.config.num_timesteps}, {convention if convention == 'cosine' else f'linear, {convention}'}"


def processes(num_timesteps: Sequence[int], betas: Sequence[Betas]) -> list[Process]:
    """Every kind of betas with every length of chain.

    Args:
        num_timesteps: T, from 2 to 10,000 (above 20 for 'rescaled').
        betas: 'rescaled' (linear, times 1000 / T), 'fixed' (linear, 1e-4 .. 0.02 at every T) or 'cosine'.
    Raises:
        InputError: a chain that cannot exist, or none.
    """
    settings: dict[str, dict[str, object]] = {
        "rescaled": {"rescale_betas": True},
        "fixed": {"rescale_betas": False},
        "cosine": {"schedule": "cosine"},
    }
    chosen = [
        Process(DiffusionConfig.from_dict({"num_timesteps": T} | settings[kind]))
        for kind, T in product(betas, num_timesteps)
    ]
    require(bool(chosen), "name at least one number of timesteps and one kind of betas")
    return chosen


def shown_timesteps(schedule: NoiseSchedule, count: int, spacing: Columns = "uniform") -> list[int]:
    """Timesteps of a figure's columns or a film's frames, from 0, the clean image, to T.

    Args:
        count: at least 2.
        spacing: even in t, or from the second on even in the logarithm of the signal-to-noise ratio.
    Returns:
        `count` distinct integers, increasing.
    Raises:
        InputError: fewer than 2, or more than there are.
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
        closed_form: jump to each timestep (eq. 4 of Ho et al. 2020), with one noise for all; False walks there step by
            step (eq. 2), with new noise at each.
    Returns:
        (len(timesteps), N, C, H, W), not clipped.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)

    def at(t: int) -> Tensor:
        return torch.full((len(x_0),), t - 1)  # code counts from 0 what figures count from 1

    if closed_form:
        eps = noise()
        return torch.stack([q_sample(schedule, x_0, at(t), eps) if t else x_0 for t in timesteps])
    states, x_t, wanted = {0: x_0}, x_0, set(timesteps)
    for t in range(1, timesteps[-1] + 1):
        x_t = q_step(schedule, x_t, at(t), noise())
        if t in wanted:
            states[t] = x_t
    return torch.stack([states[t] for t in timesteps])


def snr_at(schedule: NoiseSchedule, t: int) -> float:
    """Signal-to-noise ratio at a figure's timestep; infinite at 0."""
    return float(schedule.snr[t - 1]) if t else float("inf")


def forward_picture(
    shown: Sequence[Process],
    x_0: Tensor,
    columns: int = COLUMNS,
    *,
    spacing: Columns = "uniform",
    seed: int = 0,
    closed_form: bool = False,
    scale: int | None = None,
) -> Picture:
    """A row for each image and a column for each timestep, the processes above one another.

    Args:
        x_0: (N, C, H, W) floating, in [-1, 1].
        scale: whole factor of enlargement; None: to 56 pixels or more.
        The rest: see `shown_timesteps` and `forward_states`.
    """
    tables = []
    for process in shown:
        schedule = process.schedule
        timesteps = shown_timesteps(schedule, columns, spacing)
        states = forward_states(schedule, x_0, timesteps, seed, closed_form)
        captions = [
            ("t", [str(t) for t in timesteps]),
            ("SNR", [short_number(snr_at(schedule, t)) for t in timesteps]),
        ]
        images = to_uint8(states).transpose(0, 1)
        tables.append(
            image_table(images, scale=scale or visible_scale(x_0.shape[-1]), title=process.label, captions=captions)
        )
    return framed(stacked(tables, gap=LINE))


def forward_frames(
    shown: Sequence[Process],
    x_0: Tensor,
    num_frames: int,
    *,
    seed: int = 0,
    spacing: Columns = "uniform",
    closed_form: bool = False,
    scale: int | None = None,
) -> Iterator[Picture]:
    """The same as a film: the images at t, beside the curves of alpha_bar and SNR with a mark that runs along them.

    Processes of several lengths go in step, by t / T.
    """
    scale = scale or visible_scale(x_0.shape[-1])
    parts = []
    for process in shown:
        timesteps = shown_timesteps(process.schedule, num_frames, spacing)
        states = to_uint8(forward_states(process.schedule, x_0, timesteps, seed, closed_form))
        captions = [f"t = {t}    SNR {short_number(snr_at(process.schedule, t))}" for t in timesteps]
        parts.append((process, timesteps, states, captions, Curves(process.schedule)))
    least_width = max(
        text_width(caption for part in parts for caption in part[3]),
        text_width((process.label for process in shown), TITLE_SIZE),  # so that the curves are in line
    )
    for index in range(num_frames):
        rows = []
        for process, timesteps, states, captions, curves in parts:
            table = image_table(
                states[index][None],
                scale=scale,
                title=process.label,
                captions=[("", [captions[index]])],
                least_width=least_width,
            )
            rows.append(side_by_side([table, curves.marked(timesteps[index])]))
        yield framed(stacked(rows))


class Curves:
    """alpha_bar and SNR over t, drawn once, with a mark put on them as often as one likes.

    Args:
        schedule: whose.
        width, height: pixels.
    """

    def __init__(self, schedule: NoiseSchedule, width: int = 260, height: int = 100) -> None:
        from matplotlib.figure import Figure

        T = schedule.num_timesteps
        self._alpha_bar, self._log_snr = schedule.alpha_bar.numpy(), schedule.snr.log10().numpy()
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        left = figure.add_axes((0.11, 0.17, 0.78, 0.75))
        right = left.twinx()
        t = np.arange(1, T + 1)
        left.plot(np.arange(T + 1), [1.0, *self._alpha_bar], color=COLOURS[0], linewidth=1.5)
        right.plot(t, self._log_snr, color=COLOURS[1], linewidth=1.5)
        left.set(xlim=(0, T), ylim=(-0.04, 1.04), xticks=[0, T // 2, T], yticks=[0, 1])
        ends = (round(float(self._log_snr[-1])), round(float(self._log_snr[0])))
        right.set(yticks=sorted({ends[0], 0, ends[1]}))
        right.set_yticklabels([f"1e{tick}" if tick else "1" for tick in right.get_yticks().astype(int)])
        for axes, colour in ((left, COLOURS[0]), (right, COLOURS[1])):
            axes.tick_params(labelsize=7, length=2, pad=1.5)
            axes.tick_params(axis="y", colors=colour)
            axes.spines[["top"]].set_visible(False)
        left.text(0.04 * T, 0.05, "ᾱ", color=COLOURS[0], fontsize=9)
        right.text(
            0.9 * T, self._log_snr[-1] * 0.55 + self._log_snr[0] * 0.45, "SNR", color=COLOURS[1], fontsize=8, ha="right"
        )
        self._picture = rendered(figure)
        self._to_pixels = {"alpha_bar": left.transData, "snr": right.transData}

    def marked(self, t: int) -> Picture:
        """The curves with a line at t, 0 .. T, and a dot on each."""
        from PIL import Image, ImageDraw

        picture = Image.fromarray(self._picture)
        draw = ImageDraw.Draw(picture)
        height = picture.height
        points = {
            COLOURS[0]: self._to_pixels["alpha_bar"].transform((t, self._alpha_bar[t - 1] if t else 1.0)),
            COLOURS[1]: self._to_pixels["snr"].transform((t, self._log_snr[max(t - 1, 0)])),
        }
        x = points[COLOURS[0]][0]
        top, bottom = (self._to_pixels["alpha_bar"].transform((t, y))[1] for y in (1.04, -0.04))
        draw.line([(x, height - top), (x, height - bottom)], fill=INK, width=1)
        for colour, (left, up) in points.items():
            draw.ellipse([left - 3, height - up - 3, left + 3, height - up + 3], fill=colour, outline=INK)
        return np.asarray(picture)


def show_forward(
    out: Path,
    shown: Sequence[Process],
    dataset: str,
    *,
    split: str | None = None,
    num_images: int = 4,
    columns: int | None = None,
    spacing: Columns = "uniform",
    closed_form: bool = False,
    look: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> str:
    """Save the forward process of images drawn at random from a data set.

    Args:
        out: ends in .png for a picture, .gif or .mp4 for a film.
        seed: of the images chosen and of the noise.
        The rest: see `forward_picture`, `forward_frames`, `film.save_film` and `data.load_images`.
    Returns:
        A line that says what was made.
    Raises:
        InputError: what cannot be read, drawn or written, told before any work.
    """
    moving = check_kind(out, look, columns)
    shortest = min(shown, key=lambda process: process.config.num_timesteps).schedule
    states = shortest.num_timesteps + 1
    count = look.num_frames(states) if moving else num_columns(columns, states)
    x_0 = chosen_images(dataset, split, num_images, seed, data_dir, image_size)
    if moving:
        with progress("drawing", count, "frames") as advance:
            frames = forward_frames(
                shown, x_0, count, seed=seed, spacing=spacing, closed_form=closed_form, scale=look.scale
            )
            save_film(out, counted(frames, advance), look)
    else:
        picture = forward_picture(
            shown, x_0, count, spacing=spacing, seed=seed, closed_form=closed_form, scale=look.scale
        )
        save_png(out, picture)
    what, images = ", ".join(process.label for process in shown), f"{dataset}:{split or usual_split(dataset)}"
    return f"{out}: {num_images} images of {images} at {count} timesteps, {what}, seed {seed}"


def usual_split(dataset: str) -> str:
    """Of which images are shown where nobody says: test, but train of a folder, whose test split is a twentieth."""
    return "test" if dataset in DATASETS else "train"


def chosen_images(
    dataset: str,
    split: str | None,
    num_images: int,
    seed: int,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> Tensor:
    """Images drawn at random from a set, (N, C, H, W) float32 in [-1, 1]; the first of a seed stay the same.

    Raises:
        InputError: a number outside 1 .. 64 or above the set's, a negative seed; what `data.load_images` refuses.
    """
    require(1 <= num_images <= 64, f"num_images must be from 1 to 64 in one picture, not {num_images}")
    check_seed(seed)
    split = split or usual_split(dataset)
    images = load_images(dataset, split, data_dir, image_size, "--image-size").images
    if num_images > len(images):
        raise InputError(
            f"num_images of {num_images} exceeds the {len(images)} images of {dataset}:{split}; give fewer"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return to_float(images[order[:num_images]])

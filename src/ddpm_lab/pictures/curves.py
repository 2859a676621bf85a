"""Draw curves: noise schedules, the course of training, and the norm of x_t.

Functions return matplotlib figures; the caller saves them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddpm_lab.core.config import DiffusionConfig, SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import printable
from ddpm_lab.core.log import BANDS, LOG, SCORES, read_lines
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import progress
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.process import q_sample
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.drawing import COLOURS, escape_mathtext, rendered
from ddpm_lab.pictures.forward import process_label, random_images
from ddpm_lab.pictures.picture_settings import PICTURE_ENDINGS
from ddpm_lab.pictures.reverse import describe_generator
from ddpm_lab.sampling.generation import build_sampler, trajectory
from ddpm_lab.sampling.image_files import check_writable, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FIELDS: dict[str, Any] = {  # of a line of log.jsonl, with their types
    "images": int, "loss": float, "images_per_second": float, "validation_loss": float | None,
}  # fmt: skip
MARKS = ("o-", "s--", "^:", "d-.")  # line styles of scores with different labels
WIDTH, HEIGHT = 8.4, 2.9  # inches, of a row of panels


def _panels(labels: Sequence[tuple[str, str]], rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure with a panel for each pair of axis labels, (x, y)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * rows), dpi=100, layout="constrained")
    panels = []
    for index, (x, y) in enumerate(labels, 1):
        panel = figure.add_subplot(rows, len(labels) // rows, index)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, which="both")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.set_xlabel(x, fontsize=9)
        panel.set_ylabel(y, fontsize=9)
        panels.append(panel)
    return figure, panels


def save_figure(out: Path, figure: "Figure") -> Path:
    """Save a figure as PNG, and return the file's path.

    Raises:
        InputError: the file cannot be written.
    """
    check_writable(out, PICTURE_ENDINGS)
    save_png(out, rendered(figure))
    return out


def schedule_figure(processes: Sequence[DiffusionConfig]) -> "Figure":
    """alpha_bar over t and over t / T, SNR over t / T, beta over t: a line for each process.

    The colour shows the length of the chain, the line style the kind of betas.
    """
    figure, (by_t, by_fraction, snr, beta) = _panels(
        [("t", "alpha_bar"), ("t / T", "alpha_bar"), ("t / T", "signal-to-noise ratio"), ("t", "beta")], rows=2
    )
    lengths = sorted({process.num_timesteps for process in processes})
    conventions = list(dict.fromkeys(process.beta_convention for process in processes))
    for process in processes:
        T, schedule = process.num_timesteps, build_schedule(process)
        t = np.arange(1, T + 1)
        style: dict[str, Any] = {
            "color": COLOURS[lengths.index(T) % len(COLOURS)],
            "linestyle": ("-", "--", ":")[conventions.index(process.beta_convention)],
            "linewidth": 1.5,
        }
        by_t.plot(t, schedule.alpha_bar, label=process_label(process), **style)
        by_fraction.plot(t / T, schedule.alpha_bar, **style)
        snr.plot(t / T, schedule.snr, **style)
        beta.plot(t, schedule.beta, **style)
    snr.set_yscale("log")
    beta.set_yscale("log")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class RunLog:
    """What a run logged while it trained.

    Attributes:
        name: of its folder.
        lines: of log.jsonl, at least one.
        scores: (images seen, Frechet distance, label of the distance) of each score taken during training.
    """

    name: str
    lines: list[dict[str, Any]]
    scores: list[tuple[float, float, str]]


def read_runs(runs: Sequence[Path]) -> list[RunLog]:
    """The logs of run folders.

    Raises:
        InputError: no folder is named, a folder is not a run, or a run has logged nothing yet.
    """
    require(bool(runs), "name at least one run folder")
    logs = []
    for run in runs:
        require((run / "config.json").is_file(), f"{run} is not a run folder: it holds no config.json")
        log = read_run(run)
        if log is None:
            raise InputError(f"run {run} has no line in log.jsonl yet")
        logs.append(log)
    return logs


def read_run(run: Path) -> RunLog | None:
    """The log of one run folder; None if it has no line yet."""
    lines = [line for line in read_lines(run / LOG) if _is_valid(line)]
    return RunLog(printable(run.resolve().name), lines, _scores(run, lines[-1])) if lines else None


def _is_valid(line: dict[str, Any]) -> bool:
    """Whether a line of a log has the fields that a run writes; damaged lines are ignored."""
    bands = line.get("loss_by_t")
    return (
        all(fits(line.get(name), kind) for name, kind in LOG_FIELDS.items())
        and isinstance(bands, list)
        and len(bands) == BANDS
        and fits(tuple(bands), tuple[float | None, ...])
    )


def _scores(run: Path, last: dict[str, Any]) -> list[tuple[float, float, str]]:
    scores = []
    for record in read_lines(run / SCORES):
        fid, label, step = record.get("fid"), record.get("fid_label"), record["step"]
        if record.get("by") != "training" or not 0 < step <= last["step"]:
            continue
        if isinstance(fid, dict) and fits(fid.get("value"), float) and isinstance(label, str):
            scores.append((last["images"] * step / last["step"], fid["value"], label))
    return scores


def training_figure(logs: Sequence[RunLog]) -> "Figure":
    """Loss over images seen (validation dashed), final loss in ten bands of t, images per second, and scores.

    The Frechet distance has a panel if any run was scored during training; distances with different labels are
    different lines.
    """
    from matplotlib.ticker import LogLocator

    panels = [
        ("images seen", "loss (dashed: validation)"),
        ("t / T, ten bands", "loss, last tenth of the run"),
        ("images seen", "images per second"),
    ]
    styles = dict(zip(dict.fromkeys(label for log in logs for *_, label in log.scores), itertools.cycle(MARKS)))
    if styles:
        panels.append(("images seen", "Frechet distance"))
    figure, (loss, bands, speed, *distance) = _panels(panels, rows=2 if styles else 1)
    for log, colour in zip(logs, itertools.cycle(COLOURS)):
        images, losses = [line["images"] for line in log.lines], [line["loss"] for line in log.lines]
        loss.plot(images, losses, color=colour, linewidth=1, label=escape_mathtext(log.name))
        validated = [(line["images"], line["validation_loss"]) for line in log.lines if line.get("validation_loss")]
        if validated:
            loss.plot(*zip(*validated, strict=True), color=colour, linestyle="--", marker="o", markersize=3)
        last = log.lines[-max(1, len(log.lines) // 10) :]
        by_band = np.array([line["loss_by_t"] for line in last], dtype=float)  # None becomes NaN
        means = [np.nan if np.isnan(band).all() else float(np.nanmean(band)) for band in by_band.T]
        bands.plot((np.arange(BANDS) + 0.5) / BANDS, means, color=colour, marker="o", markersize=3)
        speed.plot(images, [line["images_per_second"] for line in log.lines], color=colour, linewidth=1)
        for label, style in styles.items():
            points = [(seen, value) for seen, value, name in log.scores if name == label]
            if points:
                distance[0].plot(*zip(*points, strict=True), style, color=colour, linewidth=1, markersize=4)
    loss.set(yscale="log")
    bands.set(yscale="log", xlim=(0, 1))
    speed.set_ylim(bottom=0)
    for axes in (loss, speed, *distance):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    loss.legend(fontsize=7, frameon=False)
    for axes in distance:
        for label, style in styles.items():  # empty lines: the legend shows the styles, without a run's colour
            axes.plot([], [], style, color="0.4", linewidth=1, markersize=4, label=escape_mathtext(label))
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")
        axes.legend(fontsize=7, frameon=False)
    return figure


@dataclass(frozen=True)
class StateNorms:
    """Root mean square of x_t per pixel, over timesteps as figures count them.

    Attributes:
        label: of the generator.
        t: 1 .. T.
        theory: sqrt(alpha_bar m + 1 - alpha_bar) at each t, with m the mean square of real pixels.
        noised: (t, norm) of real images noised by the closed form, at some timesteps.
        sampled: (t, norm) of the sampler's states.
    """

    label: str
    t: np.ndarray
    theory: np.ndarray
    noised: list[tuple[int, float]]
    sampled: list[tuple[int, float]]


def state_norms(
    trained: TrainedModel, config: SamplingConfig, num_images: int, data_dir: Path | None = None
) -> StateNorms:
    """Measure the norm of x_t in the forward and in the reverse process.

    Where the sampler's states leave the line of theory, the network gets inputs that it was not trained on.

    Args:
        num_images: number of real images and of sampled ones; from 1 to 64.
    Raises:
        InputError: `num_images` is out of range, or the training data is not known or cannot be read.
    """
    data, schedule = trained.config.data, trained.schedule
    if data.dataset == UNKNOWN:
        raise InputError(
            f"the training data of {trained.name} is not known, since it was imported; name it: ddpm import --dataset"
        )
    x_0 = random_images(data.dataset, "train", num_images, config.seed, data_dir, data.image_size)
    sampler = build_sampler(trained, config)
    show_deferred_warnings()
    T = schedule.num_timesteps
    theory = (schedule.alpha_bar * float(x_0.square().mean()) + 1 - schedule.alpha_bar).sqrt()
    generator = torch.Generator().manual_seed(config.seed)
    noised = []
    for t in sorted({round(x) for x in np.linspace(1, T, 21)}):
        eps = torch.randn(x_0.shape, generator=generator)
        x_t = q_sample(schedule, x_0, torch.full((num_images,), t - 1), eps)
        noised.append((t, float(x_t.square().mean().sqrt())))
    sums: dict[int, float] = {}
    with progress("sampling", num_images * sampler.num_steps, "steps") as advance:
        for first in range(0, num_images, sampler.config.batch_size):
            wanted = min(sampler.config.batch_size, num_images - first)
            for step in trajectory(trained, sampler, range(first, first + wanted)):
                sums[step.t + 1] = sums.get(step.t + 1, 0.0) + float(step.x_t.square().mean()) * wanted
                advance(wanted)
            sums[0] = sums.get(0, 0.0) + float(step.x_s.square().mean()) * wanted
    sampled = [(t, (total / num_images) ** 0.5) for t, total in sums.items()]
    return StateNorms(describe_generator(trained, sampler), np.arange(1, T + 1), theory.numpy(), noised, sampled)


def norm_figure(norms: StateNorms) -> "Figure":
    """Theory as a line, noised images as dots, and the sampler's states as a second line."""
    figure, (axes,) = _panels([("t", "root mean square of x_t")])
    axes.plot(norms.t, norms.theory, color=COLOURS[6], linewidth=1.2, label="theory")
    axes.plot(*zip(*norms.noised, strict=True), "o", color=COLOURS[0], markersize=4, label="real images, noised")
    axes.plot(*zip(*norms.sampled, strict=True), color=COLOURS[1], linewidth=1.5, label="the sampler's states")
    axes.set_title(escape_mathtext(norms.label), fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
    return figure

"""Curves: noise schedules, how training went, and the norm of x_t. Functions return figures; the caller saves them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.log import BANDS, LOG, SCORES, read_lines
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import progress
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.process import q_sample
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.drawing import COLOURS, escape_mathtext, printable, rendered
from ddpm_lab.pictures.film import PICTURE_ENDINGS
from ddpm_lab.pictures.forward import Process, chosen_images
from ddpm_lab.sampling.generation import build_sampler, trajectory
from ddpm_lab.sampling.image_files import check_writable, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN: dict[str, Any] = {"images": int, "loss": float, "images_per_second": float}  # of a line of log.jsonl
MARKS = ("o-", "s--", "^:", "d-.")  # of scores with different labels
WIDTH, HEIGHT = 8.4, 2.9  # inches, of a row of panels


def _panels(count: int, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * rows), dpi=100, layout="constrained")
    axes = [figure.add_subplot(rows, count // rows, i + 1) for i in range(count)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, which="both")
        panel.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def save_figure(out: Path, draw: Callable[[], "Figure"]) -> None:
    """Draw a figure and save it as PNG.

    Raises:
        InputError: a path that cannot be written, told before the drawing.
    """
    check_writable(out, PICTURE_ENDINGS)
    save_png(out, rendered(draw()))
    print(f"{out}")


def schedule_figure(shown: Sequence[Process]) -> "Figure":
    """alpha_bar over t and over t / T, SNR over t / T, beta over t: a line for each process.

    Colour tells the length of the chain, the kind of line its betas.
    """
    figure, (by_t, by_share, snr, beta) = _panels(4, rows=2)
    lengths = sorted({process.config.num_timesteps for process in shown})
    conventions = list(dict.fromkeys(process.config.beta_convention for process in shown))
    for process in shown:
        T = process.config.num_timesteps
        t = np.arange(1, T + 1)
        style: dict[str, Any] = {
            "color": COLOURS[lengths.index(T) % len(COLOURS)],
            "linestyle": ("-", "--", ":")[conventions.index(process.config.beta_convention)],
            "linewidth": 1.5,
        }
        schedule = process.schedule
        by_t.plot(t, schedule.alpha_bar, label=process.label, **style)
        by_share.plot(t / T, schedule.alpha_bar, **style)
        snr.plot(t / T, schedule.snr, **style)
        beta.plot(t, schedule.beta, **style)
    for axes, x, y in (
        (by_t, "t", "alpha_bar"),
        (by_share, "t / T", "alpha_bar"),
        (snr, "t / T", "signal-to-noise ratio"),
        (beta, "t", "beta"),
    ):
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
    snr.set_yscale("log")
    beta.set_yscale("log")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class RunLog:
    """What a run wrote as it went.

    Attributes:
        name: of its folder.
        lines: of log.jsonl.
        scores: images seen, Frechet distance and its label, of each score that was taken in the course of training.
    """

    name: str
    lines: list[dict[str, Any]]
    scores: list[tuple[float, float, str]]


def read_runs(runs: Sequence[Path]) -> list[RunLog]:
    """The logs of run folders.

    Raises:
        InputError: no folder, one that is not a run, or one without a line yet.
    """
    require(bool(runs), "name at least one run folder")
    logs = []
    for run in runs:
        if not (run / "config.json").is_file():
            raise InputError(f"{run} is not a run folder: it holds no config.json")
        log = read_run(run)
        if log is None:
            raise InputError(f"run {run} has no line in log.jsonl yet")
        logs.append(log)
    return logs


def read_run(run: Path) -> RunLog | None:
    """The log of one run folder; None where it has no line yet."""
    lines = [line for line in read_lines(run / LOG) if _is_drawn(line)]
    return RunLog(printable(run.resolve().name), lines, _scores(run, lines[-1])) if lines else None


def _is_drawn(line: dict[str, Any]) -> bool:
    """Whether a line is one that a run writes; what is none is passed over, as everywhere in a log."""
    bands = line.get("loss_by_t")
    return (
        all(fits(line.get(name), kind) for name, kind in DRAWN.items())
        and isinstance(bands, list)
        and len(bands) == BANDS
        and all(fits(band, float | None) for band in bands)
        and fits(line.get("validation_loss"), float | None)
    )


def _scores(run: Path, last: dict[str, Any]) -> list[tuple[float, float, str]]:
    found = []
    for record in read_lines(run / SCORES):
        fid, label = record.get("fid"), record.get("fid_label")
        if record.get("by") != "training" or not 0 < record["step"] <= last["step"]:
            continue
        if isinstance(fid, dict) and fits(fid.get("value"), float) and isinstance(label, str):
            found.append((last["images"] * record["step"] / last["step"], fid["value"], label))
    return found


def training_figure(logs: Sequence[RunLog]) -> "Figure":
    """Loss over images seen (validation dashed), loss in ten bands of t at the end, images per second; and scores.

    The Frechet distance has a panel where any run was scored as it trained; those of different labels are lines apart.
    """
    from matplotlib.ticker import LogLocator

    labels = list(dict.fromkeys(label for log in logs for _, _, label in log.scores))
    figure, (loss, bands, speed, *distance) = _panels(4, rows=2) if labels else _panels(3)
    for index, log in enumerate(logs):
        colour = COLOURS[index % len(COLOURS)]
        images = [line["images"] for line in log.lines]
        loss.plot(
            images, [line["loss"] for line in log.lines], color=colour, linewidth=1, label=escape_mathtext(log.name)
        )
        validated = [(line["images"], line["validation_loss"]) for line in log.lines if line.get("validation_loss")]
        if validated:
            loss.plot(*zip(*validated, strict=True), color=colour, linestyle="--", marker="o", markersize=3)
        last = log.lines[-max(1, len(log.lines) // 10) :]
        by_band = np.array([[np.nan if v is None else v for v in line["loss_by_t"]] for line in last], dtype=float)
        means = [float(np.nanmean(column)) if not np.isnan(column).all() else np.nan for column in by_band.T]
        bands.plot((np.arange(len(means)) + 0.5) / len(means), means, color=colour, marker="o", markersize=3)
        speed.plot(images, [line["images_per_second"] for line in log.lines], color=colour, linewidth=1)
        for label in labels:
            points = [(seen, value) for seen, value, named in log.scores if named == label]
            if points:
                style = MARKS[labels.index(label) % len(MARKS)]
                distance[0].plot(*zip(*points, strict=True), style, color=colour, linewidth=1, markersize=4)
    for index, label in enumerate(labels):
        style = MARKS[index % len(MARKS)]
        distance[0].plot([], [], style, color="0.4", linewidth=1, markersize=4, label=escape_mathtext(label))
    loss.set(xscale="linear", yscale="log")
    bands.set(yscale="log", xlim=(0, 1))
    speed.set_ylim(bottom=0)
    for axes, x, y in (
        (loss, "images seen", "loss (dashed: validation)"),
        (bands, "t / T, ten bands", "loss, last tenth of the run"),
        (speed, "images seen", "images per second"),
        *((axes, "images seen", "Frechet distance") for axes in distance),
    ):
        axes.set_xlabel(x, fontsize=9)
        axes.set_ylabel(y, fontsize=9)
    for axes in (loss, speed, *distance):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    loss.legend(fontsize=7, frameon=False)
    for axes in distance:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}")
        axes.legend(fontsize=7, frameon=False)
    return figure


@dataclass(frozen=True)
class StateNorms:
    """Root mean square of x_t per pixel, over figures' timesteps.

    Attributes:
        label: of the generator.
        t, theory: 1 .. T, and sqrt(alpha_bar m + 1 - alpha_bar), m the mean square of real pixels.
        noised: real images noised by the closed form, (t, value) at some timesteps.
        sampled: the sampler's states, likewise.
    """

    label: str
    t: np.ndarray
    theory: np.ndarray
    noised: list[tuple[int, float]]
    sampled: list[tuple[int, float]]


def state_norms(
    trained: TrainedModel,
    config: SamplingConfig,
    num_images: int,
    data_dir: Path | None = None,
) -> StateNorms:
    """Measure the norm of x_t on both ways; a sampler whose states leave theory's line sees inputs it never trained on.

    Args:
        num_images: real ones, and sampled ones; from 1 to 64.
    """
    from ddpm_lab.pictures.reverse import describe_generator

    data, schedule = trained.config.data, trained.schedule
    if data.dataset == UNKNOWN:
        raise InputError(f"{trained.name} was imported without what it was trained on; name it: ddpm import --dataset")
    x_0 = chosen_images(data.dataset, "train", num_images, config.seed, data_dir, data.image_size)
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
            for step in trajectory(trained, sampler, first):
                sums[step.t + 1] = sums.get(step.t + 1, 0.0) + float(step.x_t[:wanted].square().mean()) * wanted
                advance(wanted)
            sums[0] = sums.get(0, 0.0) + float(step.x_s[:wanted].square().mean()) * wanted
    sampled = [(t, (total / num_images) ** 0.5) for t, total in sums.items()]
    return StateNorms(describe_generator(trained, sampler), np.arange(1, T + 1), theory.numpy(), noised, sampled)


def norm_figure(norms: StateNorms) -> "Figure":
    """Theory as a line, noised images as dots on it, the sampler's states as a line of its own."""
    figure, (axes,) = _panels(1)
    axes.plot(norms.t, norms.theory, color=COLOURS[6], linewidth=1.2, label="theory")
    axes.plot(*zip(*norms.noised, strict=True), "o", color=COLOURS[0], markersize=4, label="real images, noised")
    axes.plot(*zip(*norms.sampled, strict=True), color=COLOURS[1], linewidth=1.5, label="the sampler's states")
    axes.set_xlabel("t", fontsize=9)
    axes.set_ylabel("root mean square of x_t", fontsize=9)
    axes.set_title(escape_mathtext(norms.label), fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
    return figure

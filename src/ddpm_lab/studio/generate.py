"""The tab where images come out of noise while one looks: the state beside the image predicted from it."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.drawing import Picture
from ddpm_lab.pictures.film import save_film
from ddpm_lab.pictures.picture_settings import SHORT_FILM
from ddpm_lab.pictures.reverse import Trajectory, describe_generator, reverse_frames
from ddpm_lab.sampling.generation import build_sampler, trajectory
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.studio.sources import guide_names, model_names, new_folder, open_model, show_errors, source_of, whole

MOST_IMAGES, KEPT_STATES = 64, 41
LEAST_SECONDS = 0.12  # between two pictures: more often nobody can see, and the page would lag behind
NO_GUIDE = "none"
SAMPLERS = ("ddim", "dpmpp", "ddpm", "heun")


@dataclass(frozen=True)
class Made:
    """What one press of the button made, kept for the visitor who pressed it."""

    seen: Trajectory
    command: str


def settings(
    trained: TrainedModel,
    sampler: str,
    steps: float | None,
    eta: float,
    seed: float | None,
    count: float,
    asked: str,
    guidance: float,
    guide: str | None = None,
) -> SamplingConfig:
    """The controls' values as a sampling configuration; those that do not apply are left out.

    Args:
        guide: what `load` takes.
    Raises:
        InputError: a value that cannot be used.
    """
    told = trained.num_classes > 0
    return SamplingConfig(
        sampler=sampler,  # type: ignore[arg-type]  # checked by the configuration
        num_steps=whole(steps, "steps"),
        eta=float(eta) if sampler in ("ddim", "dpmpp") and eta else None,
        seed=whole(seed, "seed"),
        batch_size=int(count),
        class_=(int(asked),) if told and asked.isdecimal() else (),
        guidance=float(guidance) if (told or guide is not None) and guidance != 1 else None,
        guide=guide,
    )


def command_line(trained: TrainedModel, config: SamplingConfig, device: str) -> str:
    """What repeats the images in a shell, to the bit, also when the run has gone on."""
    words = ["ddpm", "sample", trained.name]
    if trained.run_dir is not None:
        words += ["--checkpoint", str(trained.step)]
    if device != "auto":
        words += ["--device", device]
    words += ["--num-images", str(config.batch_size), "--batch-size", str(config.batch_size)]
    words += ["--sampler", config.sampler, "--num-steps", str(config.num_steps), "--seed", str(config.seed)]
    if config.eta is not None:
        words += ["--eta", repr(config.eta)]
    if config.class_:
        words += ["--class", *map(str, config.class_)]
    if config.guidance is not None:
        words += ["--guidance", repr(config.guidance)]
    if config.guide is not None:
        words += ["--guide", config.guide]
    return shlex.join([*words, "--out", "images.png"])


def watch(
    trained: TrainedModel, config: SamplingConfig, device: str
) -> Iterator[tuple[Picture, Picture, str, Made | None]]:
    """Sample, and show the state and the predicted image as they change.

    Yields:
        Pictures of x_t and of the predicted x_0, a line of text, and, at the end, what was made.
    """
    sampler = build_sampler(trained, config)
    every = max(1, -(-sampler.num_steps // (KEPT_STATES - 1)))
    kept: list[tuple[int, Tensor, Tensor]] = []
    begun = shown = time.monotonic()
    for index, step in enumerate(trajectory(trained, sampler)):
        last = index + 1 == sampler.num_steps
        if index % every == 0 or last:
            kept.append((step.t + 1, to_uint8(step.x_t).cpu(), to_uint8(step.x_0_hat).cpu()))
        if index == 0 or last or time.monotonic() - shown > LEAST_SECONDS:
            shown = time.monotonic()
            words = f"step {index + 1} of {sampler.num_steps}, {shown - begun:.1f} s"
            yield grid(to_uint8(step.x_s)), grid(to_uint8(step.x_0_hat)), words, None
    images = to_uint8(step.x_s).cpu()
    kept.append((0, images, images))
    timesteps, x_t, x_0_hat = zip(*kept, strict=True)
    seen = Trajectory(describe_generator(trained, sampler), list(timesteps), torch.stack(x_t), torch.stack(x_0_hat))
    done = f"{len(images)} images by {sampler.num_evaluations} evaluations each, {time.monotonic() - begun:.1f} s"
    yield grid(images), grid(images), done, Made(seen, command_line(trained, config, device))


def grid(images: Tensor) -> Picture:
    """Images, (N, C, H, W) uint8, as a picture that is large enough to see."""
    N, _, H, _ = images.shape
    columns = int(np.ceil(N**0.5))
    return image_grid(images, columns, max(1, min(visible_scale(H), 640 // (columns * H))))


def files(made: Made, films: bool) -> list[str]:
    """The images as a PNG, and both columns as films, in a folder of their own for this visitor."""
    folder = new_folder()
    images = made.seen.x_t[-1]
    save_png(folder / "images.png", image_grid(images, scale=visible_scale(images.shape[-1])))
    if films:
        for ending in ("gif", "mp4"):
            save_film(folder / f"reverse.{ending}", reverse_frames([made.seen]), SHORT_FILM)
    return [str(path) for path in sorted(folder.iterdir())]


def _picture(title: str, name: str, words: str) -> gr.Image:
    """A place for a picture under its title; pixels stay pixels."""
    with gr.Column(min_width=240):
        gr.Markdown(f"**{title}**")
        return gr.Image(
            show_label=False, interactive=False, format="png", elem_id=name, elem_classes="pixels", alt_text=words,
            buttons=["fullscreen"],
        )  # fmt: skip


def generate_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and say what its controls do."""

    names = model_names(runs)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
            with gr.Row():
                sampler = gr.Dropdown(list(SAMPLERS), value="dpmpp", label="Sampler", elem_id="sampler")
                steps = gr.Number(20, label="Steps", precision=0, minimum=1, elem_id="steps")
            with gr.Row():
                count = gr.Slider(1, MOST_IMAGES, value=16, step=1, label="Images", elem_id="count")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            eta = gr.Slider(0, 1, value=0, step=0.05, label="Noise on the way (eta), for ddim and dpmpp", elem_id="eta")
            with gr.Row(visible=False) as classes:
                asked = gr.Dropdown(["all in turn"], value="all in turn", label="Class", elem_id="class")
            with gr.Row():
                guide = gr.Dropdown(
                    [NO_GUIDE, *guide_names(runs)], value=NO_GUIDE, label="Guide (a worse model)", elem_id="guide"
                )
                guidance = gr.Slider(0, 8, value=1, step=0.25, label="Guidance", elem_id="guidance")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="stop")
            told = gr.Markdown("", elem_id="told")
        with gr.Column(scale=3):
            with gr.Row():
                x_t = _picture("x_t, the state", "x_t", "the noisy state of all images")
                x_0 = _picture("the predicted x_0", "x_0", "the clean images predicted from it")
            back = gr.Slider(
                0, 1, value=1, step=1, label="Go back through the trajectory", visible=False, elem_id="back"
            )
            command = gr.Code(label="The same from the command line", language=None, visible=False, elem_id="command")
            with gr.Row(visible=False) as after:
                films = gr.Button("Make the films", elem_id="films")
                downloads = gr.Files(label="Downloads", interactive=False, elem_id="downloads")
    made = gr.State(None)

    @show_errors
    def choose(name: str) -> Any:
        count = open_model(runs, name, device).num_classes
        return gr.Row(visible=count > 0), gr.Dropdown(["all in turn", *map(str, range(count))], value="all in turn")

    @show_errors
    def run(name: str, *values: Any) -> Iterator[Any]:
        trained = open_model(runs, name, device)
        worse = None if values[-1] == NO_GUIDE else source_of(runs, values[-1])
        config = settings(trained, *(*values[:-1], worse))
        hidden = gr.update(visible=False)
        for left, right, words, result in watch(trained, config, device):
            if result is None:
                yield left, right, words, None, hidden, hidden, hidden, None
            else:
                last = len(result.seen.timesteps) - 1
                slider = gr.Slider(minimum=0, maximum=last, value=last, visible=True)
                code = gr.Code(value=result.command, visible=True)
                yield left, right, words, result, slider, code, gr.Row(visible=True), files(result, films=False)

    @show_errors
    def film(held: Made | None) -> list[str] | None:
        return files(held, films=True) if held else None

    def look(held: Made | None, index: float) -> Any:
        if held is None:
            return gr.skip(), gr.skip(), gr.skip()
        at = min(int(index), len(held.seen.timesteps) - 1)
        return grid(held.seen.x_t[at]), grid(held.seen.x_0_hat[at]), f"t = {held.seen.timesteps[at]}"

    gr.on([page.load, source.change], choose, source, [classes, asked], show_progress="hidden")
    controls = [source, sampler, steps, eta, seed, count, asked, guidance, guide]
    results = [x_t, x_0, told, made, back, command, after, downloads]
    filming = films.click(film, made, downloads)
    running = go.click(run, controls, results, concurrency_limit=4, show_progress="hidden", cancels=[filming])
    # told afterwards, or the last line of what is being stopped may come later
    stopped = stop.click(None, cancels=[running], queue=False)
    stopped.then(lambda: "stopped", None, told, show_progress="hidden", queue=False)
    back.input(look, [made, back], [x_t, x_0, told], show_progress="hidden", queue=False, trigger_mode="always_last")
    gr.on([page.load, tab.select], lambda: gr.Dropdown(model_names(runs)), None, source, show_progress="hidden")
    named = [page.load, tab.select]
    gr.on(named, lambda: gr.Dropdown([NO_GUIDE, *guide_names(runs)]), None, guide, show_progress="hidden")

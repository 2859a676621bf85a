"""The tab that generates images and shows the state beside the predicted image while it samples."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.config import Sampler, SamplingConfig
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures.drawing import Picture
from ddpm_lab.pictures.film import save_film
from ddpm_lab.pictures.picture_settings import SHORT_FILM
from ddpm_lab.pictures.reverse import Trajectory, describe_generator, reverse_frames
from ddpm_lab.sampling.generation import build_sampler, trajectory
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.studio.controls import QUIET, command_line, image_box, show_errors, whole
from ddpm_lab.studio.sources import guide_names, model_names, new_folder, open_model, source_of

MAX_IMAGES, MAX_STATES = 64, 41  # on the page, and of a trajectory that is kept
PICTURE_SECONDS = 0.12  # between two pictures: more of them cannot be seen, and the page would lag behind
NO_GUIDE, ALL_CLASSES = "none", "all in turn"


def sampling_config(
    trained: TrainedModel,
    guide: str | None,
    sampler: str,
    steps: float | None,
    eta: float,
    seed: float | None,
    count: float,
    label: str,
    guidance: float,
) -> SamplingConfig:
    """The values of the controls as a sampling configuration; those that do not apply are left out.

    Args:
        guide: a source that `load` accepts, or None.
        label: the number of a class, or `ALL_CLASSES`.
    Raises:
        InputError: a value cannot be used.
    """
    conditional = trained.num_classes > 0
    return SamplingConfig(
        sampler=sampler,  # type: ignore[arg-type]  # checked by the configuration
        num_steps=whole(steps, "steps"),
        eta=float(eta) if sampler in ("ddim", "dpmpp") and eta else None,
        seed=whole(seed, "seed"),
        batch_size=int(count),
        class_=(int(label),) if conditional and label.isdecimal() else (),
        guidance=float(guidance) if (conditional or guide is not None) and guidance != 1 else None,
        guide=guide,
    )


def sample_command(trained: TrainedModel, config: SamplingConfig, device: str) -> str:
    """The command that makes the same images bit for bit, also after the run has trained further."""
    names = ("batch_size", "sampler", "num_steps", "seed", "eta", "class_", "guidance", "guide")
    options = {name: getattr(config, name) for name in names}
    options["class_"] = tuple(trained.class_names[number] for number in trained.class_numbers(config.class_))
    checkpoint = None if trained.run_dir is None else trained.step
    return command_line(
        "sample", trained.name, checkpoint=checkpoint, device=device, num_images=config.batch_size, **options,
        out="images.png",
    )  # fmt: skip


def watch(trained: TrainedModel, config: SamplingConfig) -> Iterator[tuple[Picture, Picture, str, Trajectory | None]]:
    """Sample, and show the state and the predicted image as they change.

    Yields:
        Pictures of x_t and of the predicted x_0, a status line, and, at the end, the trajectory.
    """
    sampler = build_sampler(trained, config)
    every = max(1, -(-sampler.num_steps // (MAX_STATES - 1)))
    kept: list[tuple[int, Tensor, Tensor]] = []
    begun = drawn = time.monotonic()
    for index, step in enumerate(trajectory(trained, sampler, range(config.batch_size))):
        is_last = index + 1 == sampler.num_steps
        if index % every == 0 or is_last:
            kept.append((step.t + 1, to_uint8(step.x_t).cpu(), to_uint8(step.x_0_hat).cpu()))
        if index == 0 or is_last or time.monotonic() - drawn > PICTURE_SECONDS:
            drawn = time.monotonic()
            status = f"step {index + 1} of {sampler.num_steps}, {drawn - begun:.1f} s"
            yield grid(to_uint8(step.x_s)), grid(to_uint8(step.x_0_hat)), status, None
    images = to_uint8(step.x_s).cpu()
    kept.append((0, images, images))
    timesteps, x_t, x_0_hat = zip(*kept, strict=True)
    states = Trajectory(describe_generator(trained, sampler), list(timesteps), torch.stack(x_t), torch.stack(x_0_hat))
    status = f"{len(images)} images by {sampler.num_evaluations} evaluations each, {time.monotonic() - begun:.1f} s"
    yield grid(images), grid(images), status, states


def grid(images: Tensor) -> Picture:
    """Images, (N, C, H, W) uint8, as one picture, enlarged to at most 640 pixels."""
    N, _, H, _ = images.shape
    columns = int(np.ceil(N**0.5))
    return image_grid(images, columns, max(1, min(visible_scale(H), 640 // (columns * H))))


def save_files(states: Trajectory, films: bool) -> list[str]:
    """Save the images as a PNG, and optionally the trajectory as films, in a new folder."""
    folder = new_folder()
    images = states.x_t[-1]
    save_png(folder / "images.png", image_grid(images, scale=visible_scale(images.shape[-1])))
    if films:
        for ending in ("gif", "mp4"):
            save_film(folder / f"reverse.{ending}", reverse_frames([states]), SHORT_FILM)
    return [str(path) for path in sorted(folder.iterdir())]


def generate_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and connect its controls."""
    names = model_names(runs)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
            with gr.Row():
                sampler = gr.Dropdown(list(get_args(Sampler)), value="dpmpp", label="Sampler", elem_id="sampler")
                steps = gr.Number(20, label="Steps", precision=0, minimum=1, elem_id="steps")
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, value=16, step=1, label="Images", elem_id="count")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            eta = gr.Slider(0, 1, value=0, step=0.05, label="Added noise (eta), for ddim and dpmpp", elem_id="eta")
            with gr.Row(visible=False) as classes:
                label = gr.Dropdown([ALL_CLASSES], value=ALL_CLASSES, label="Class", elem_id="class")
            with gr.Row():
                guides = [NO_GUIDE, *guide_names(runs)]
                guide = gr.Dropdown(guides, value=NO_GUIDE, label="Guide (a weaker model)", elem_id="guide")
                guidance = gr.Slider(0, 8, value=1, step=0.25, label="Guidance", elem_id="guidance")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", elem_id="stop")
            status = gr.Markdown("", elem_id="status")
        with gr.Column(scale=3):
            with gr.Row():
                with gr.Column(min_width=240):
                    gr.Markdown("**x_t, the state**")
                    x_t = image_box("the noisy state of all images", elem_id="x_t", elem_classes="pixels")
                with gr.Column(min_width=240):
                    gr.Markdown("**the predicted x_0**")
                    x_0 = image_box("the clean images predicted from it", elem_id="x_0", elem_classes="pixels")
            back = gr.Slider(0, 1, value=1, step=1, label="Earlier states", visible=False, elem_id="back")
            command = gr.Code(label="The same on the command line", language=None, visible=False, elem_id="command")
            with gr.Row(visible=False) as after:
                films = gr.Button("Make the films", elem_id="films")
                downloads = gr.Files(label="Downloads", interactive=False, elem_id="downloads")
    made = gr.State(None)  # the trajectory of the last click on Generate

    @show_errors
    def choose_model(name: str) -> Any:
        names = open_model(runs, name, device).class_names
        choices = [(ALL_CLASSES, ALL_CLASSES), *((name, str(number)) for number, name in enumerate(names))]
        return gr.Row(visible=bool(names)), gr.Dropdown(choices, value=ALL_CLASSES)

    @show_errors
    def generate(name: str, guide_name: str, *values: Any) -> Iterator[Any]:
        trained = open_model(runs, name, device)
        guide = None if guide_name == NO_GUIDE else source_of(runs, guide_name)
        config = sampling_config(trained, guide, *values)
        hidden = gr.update(visible=False)
        for left, right, text, states in watch(trained, config):
            if states is None:
                yield left, right, text, None, hidden, hidden, hidden, None
            else:
                last = len(states.timesteps) - 1
                slider = gr.Slider(minimum=0, maximum=last, value=last, visible=True)
                code = gr.Code(value=sample_command(trained, config, device), visible=True)
                yield left, right, text, states, slider, code, gr.Row(visible=True), save_files(states, films=False)

    @show_errors
    def make_films(states: Trajectory | None) -> list[str] | None:
        return save_files(states, films=True) if states else None

    def show_state(states: Trajectory | None, index: float) -> Any:
        if states is None:
            return gr.skip(), gr.skip(), gr.skip()
        at = min(int(index), len(states.timesteps) - 1)
        return grid(states.x_t[at]), grid(states.x_0_hat[at]), f"t = {states.timesteps[at]}"

    def refresh() -> Any:
        return gr.Dropdown(model_names(runs)), gr.Dropdown([NO_GUIDE, *guide_names(runs)])

    gr.on([page.load, source.change], choose_model, source, [classes, label], **QUIET)
    controls = [source, guide, sampler, steps, eta, seed, count, label, guidance]
    results = [x_t, x_0, status, made, back, command, after, downloads]
    filming = films.click(make_films, made, downloads)
    running = go.click(generate, controls, results, concurrency_limit=4, cancels=[filming], **QUIET)
    stopped = stop.click(None, cancels=[running], queue=False)
    # The status is set afterwards, or the last line of the sampling that is being stopped could replace it.
    stopped.then(lambda: "stopped", None, status, queue=False, **QUIET)
    back.input(show_state, [made, back], [x_t, x_0, status], queue=False, trigger_mode="always_last", **QUIET)
    gr.on([page.load, tab.select], refresh, None, [source, guide], **QUIET)

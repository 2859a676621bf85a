"""The tab of the forward process: choose or draw an image, noise it to any t, and denoise it from there."""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_lab.core.config import DiffusionConfig, SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.data.datasets import available_datasets, load_images, to_float, to_uint8
from ddpm_lab.data.image_formats import as_seen, open_picture
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.pictures.drawing import Picture, framed, image_table, short_number, side_by_side, stacked
from ddpm_lab.pictures.forward import Betas, Curves, forward_processes, forward_states, process_label, snr_at
from ddpm_lab.pictures.reverse import reconstruct
from ddpm_lab.sampling.image_files import image_array, visible_scale
from ddpm_lab.studio.controls import QUIET, image_box, show_errors, whole
from ddpm_lab.studio.sources import model_names, open_model

CHAINS = (500, 1000, 2000)
BETAS: tuple[Betas, ...] = ("rescaled", "fixed")
MAX_PIXELS = 30_000_000  # of an upload
DRAWN_SIZE, UPLOAD_SIZE = 28, 64  # pixels a side of a drawing, as those of MNIST, and of an upload


@lru_cache
def _curves(process: DiffusionConfig) -> Curves:
    return Curves(build_schedule(process))


def noised(picture: Image.Image, fraction: float, seed: int = 0) -> list[Picture]:
    """An image at the same fraction t / T of six chains: for each kind of betas, a picture of three lengths."""
    x_0 = to_float(fitted(picture, (1 if picture.mode == "L" else 3, *picture.size))[None])
    scale = 2 * visible_scale(x_0.shape[-1])
    pictures = []
    for betas in BETAS:
        rows = []
        for process in forward_processes(CHAINS, [betas]):
            curves = _curves(process)
            schedule, t = curves.schedule, round(fraction * process.num_timesteps)
            states = to_uint8(forward_states(schedule, x_0, [t], seed, closed_form=True))
            alpha_bar, snr = short_number(schedule.alpha_bar_at(t - 1)), short_number(snr_at(schedule, t))
            caption = f"t = {t}   alpha_bar {alpha_bar}   SNR {snr}"
            title = process_label(process)
            table = image_table(states, scale=scale, title=title, captions=[("", [caption])], min_width=280)
            rows.append(side_by_side([table, curves.marked(t)]))
        pictures.append(framed(stacked(rows)))
    return pictures


def fitted(picture: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """A picture as an image of a given shape, (C, H, W) uint8: its centre square, scaled, in grey or colour."""
    channels, height, width = shape
    square = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).reshape(height, width, channels).permute(2, 0, 1)


def uploaded(content: bytes) -> Image.Image:
    """A picture from the bytes of a file, 64 pixels wide and high; see `as_seen`.

    Raises:
        InputError: the file is no picture, or it is damaged or too large.
    """
    with open_picture(io.BytesIO(content), "this picture", MAX_PIXELS) as opened:
        return ImageOps.fit(as_seen(opened), (UPLOAD_SIZE, UPLOAD_SIZE), Image.Resampling.LANCZOS)


def drawn(sketch: dict[str, Any] | None) -> Image.Image:
    """A drawing, dark on light, as a light digit on a dark ground like those of MNIST.

    Raises:
        InputError: the drawing is empty.
    """
    ink = np.asarray(None if sketch is None else sketch.get("composite"))
    if ink.ndim != 3:
        raise InputError("the drawing is empty")
    has_transparency = ink.shape[2] == 4 and ink[..., 3].min() < 255
    grey = ink[..., 3] if has_transparency else 255 - ink[..., :3].mean(-1)
    picture = Image.fromarray(grey.astype(np.uint8), "L")
    box = picture.point(lambda value: 255 * (value > 30)).getbbox()
    if box is None:
        raise InputError("the drawing is empty")
    digit = ImageOps.contain(picture.crop(box), (20, 20), Image.Resampling.LANCZOS)  # 20 of 28 pixels, as in MNIST
    ground = Image.new("L", (DRAWN_SIZE, DRAWN_SIZE), 0)
    ground.paste(digit, ((DRAWN_SIZE - digit.width) // 2, (DRAWN_SIZE - digit.height) // 2))
    return ground


@lru_cache
def _images(dataset: str) -> Tensor:
    return load_images(dataset, "test").images


def dataset_image(dataset: str, index: int) -> Image.Image:
    """A test image of a data set.

    Raises:
        InputError: it has no image of that number.
    """
    images = _images(dataset)
    require(0 <= index < len(images), f"{dataset} has test images 0 to {len(images) - 1:,}, not {index:,}")
    return Image.fromarray(image_array(images[index]))


def denoised(
    runs: Path, device: str, name: str, picture: Image.Image, fraction: float
) -> Iterator[tuple[Picture | None, str]]:
    """Noise an image and denoise it with a model.

    Yields:
        A picture of the image, its noised state and the result (None at first), and a status line.
    Raises:
        InputError: no such model.
    """
    trained = open_model(runs, name, device)
    T = trained.schedule.num_timesteps
    t = max(2, round(fraction * T))
    yield None, f"denoising from t = {t} of {T}"
    x_0 = fitted(picture, trained.image_shape)
    sampling = SamplingConfig(num_steps=min(50, T), batch_size=1)
    x_t, result = reconstruct(trained, sampling, to_float(x_0[None]), t)
    row = torch.stack([x_0, to_uint8(x_t[0]), to_uint8(result[0])])[None]
    scale = 2 * visible_scale(x_0.shape[-1])
    table = image_table(row, scale=scale, captions=[("", ["the image", f"at t = {t}", "denoised"])])
    yield framed(table), f"denoised from t = {t} of {T} by {name}; its noise differs from that of the pictures above"


def forward_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and connect its controls."""
    datasets, names = available_datasets(), model_names(runs)
    picture = gr.State(dataset_image(datasets[0], 0))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Tab("Choose"), gr.Row():
                dataset = gr.Dropdown(datasets, value=datasets[0], label="Data set", elem_id="dataset")
                index = gr.Number(0, label="Image", precision=0, minimum=0, elem_id="index")
            with gr.Tab("Draw"):
                sketch = gr.Sketchpad(
                    label="Draw a digit", canvas_size=(280, 280), layers=False, elem_id="sketch",
                    brush=gr.Brush(default_size=22, colors=["#000000"], color_mode="fixed"),
                )  # fmt: skip
                use = gr.Button("Use the drawing", elem_id="use-drawing")
            with gr.Tab("Upload"):
                upload = gr.File(label="A picture", type="binary", elem_id="upload")
            fraction = gr.Slider(0, 1, value=0.3, step=0.01, label="t / T", elem_id="fraction")
            model = gr.Dropdown(names, value=names[0], label="Denoise with", elem_id="denoiser")
            denoise = gr.Button("Denoise from here", variant="primary", elem_id="denoise")
            status = gr.Markdown("", elem_id="forward-status")
        with gr.Column(scale=3):
            gr.Markdown("**The same image at the same t / T of six chains**")
            with gr.Row(elem_id="chains"):
                chains = [
                    image_box(
                        f"the image noised by chains of 500, 1000 and 2000 timesteps, betas {kind}", min_width=320
                    )
                    for kind in ("rescaled", "of a fixed range")
                ]
            result = image_box("the image, noised, and denoised again", elem_id="denoised", visible=False)

    # One handler chooses the picture and another shows it, so that neither a late picture nor a late t is lost.
    @show_errors
    def from_dataset(name: str, number: float | None) -> Image.Image:
        require(name in datasets, f"there is no data set {name!r} here")
        return dataset_image(name, whole(number, "image"))

    @show_errors
    def from_file(content: bytes | None) -> Any:
        return gr.skip() if content is None else uploaded(content)

    @show_errors
    def run(name: str, chosen: Image.Image, at: float) -> Iterator[Any]:
        for row, text in denoised(runs, device, name, chosen, at):
            yield gr.skip() if row is None else gr.Image(value=row, visible=True), text

    for event in (
        gr.on([dataset.change, index.change], from_dataset, [dataset, index], picture, **QUIET),
        use.click(show_errors(drawn), sketch, picture, **QUIET),
        upload.upload(from_file, upload, picture, **QUIET),
    ):
        event.success(noised, [picture, fraction], chains, **QUIET)
    fraction.change(noised, [picture, fraction], chains, trigger_mode="always_last", **QUIET)
    page.load(noised, [picture, fraction], chains, **QUIET)
    denoise.click(run, [model, picture, fraction], [result, status], **QUIET)
    gr.on([page.load, tab.select], lambda: gr.Dropdown(model_names(runs)), None, model, **QUIET)

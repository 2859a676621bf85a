"""The tab of the forward process: draw or choose an image, move t, see what is left, and denoise it from there."""

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

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import available_datasets, load_images, to_float, to_uint8
from ddpm_lab.data.image_formats import as_seen, open_picture
from ddpm_lab.pictures.drawing import Picture, framed, image_table, short_number, side_by_side, stacked
from ddpm_lab.pictures.forward import Curves, Process, forward_states, processes, snr_at
from ddpm_lab.pictures.reverse import reconstruct
from ddpm_lab.sampling.image_files import visible_scale
from ddpm_lab.studio.sources import model_names, open_model, show_errors, whole

CHAINS = (500, 1000, 2000)
MOST_PIXELS = 30_000_000  # of an upload
DRAWN, UPLOADED = 28, 64  # pixels a side of what is drawn, as MNIST's are, and of what is uploaded


@lru_cache
def _chains() -> list[list[tuple[Process, Curves]]]:
    """For each convention of the betas three lengths, with their curves."""
    kinds = (processes(CHAINS, ["rescaled"]), processes(CHAINS, ["fixed"]))
    return [[(process, Curves(process.schedule)) for process in kind] for kind in kinds]


def noised(picture: Image.Image, fraction: float, seed: int = 0) -> list[Picture]:
    """An image at the same fraction t / T of six chains: for each convention a picture of three lengths."""
    x_0 = to_float(fitted(picture, (1 if picture.mode == "L" else 3, *picture.size))[None])
    columns = []
    for kind in _chains():
        rows = []
        for process, curves in kind:
            t = round(fraction * process.schedule.num_timesteps)
            states = to_uint8(forward_states(process.schedule, x_0, [t], seed, closed_form=True))
            alpha_bar = process.schedule.alpha_bar_at(t - 1)
            caption = f"t = {t}   alpha_bar {short_number(alpha_bar)}   SNR {short_number(snr_at(process.schedule, t))}"
            scale = 2 * visible_scale(x_0.shape[-1])
            table = image_table(states, scale=scale, title=process.label, captions=[("", [caption])], least_width=280)
            rows.append(side_by_side([table, curves.marked(t)]))
        columns.append(framed(stacked(rows)))
    return columns


def fitted(picture: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """A picture as an image of a shape, (C, H, W) uint8: cut to its centre square, scaled, grey or colour."""
    channels, height, width = shape
    square = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).reshape(height, width, channels).permute(2, 0, 1)


def uploaded(content: bytes) -> Image.Image:
    """A picture from a file's bytes, 64 pixels wide and high, as `pictures.as_seen` has it.

    Raises:
        InputError: no picture, a damaged one, or one that is too large.
    """
    with open_picture(io.BytesIO(content), "this picture", MOST_PIXELS) as opened:
        return ImageOps.fit(as_seen(opened), (UPLOADED, UPLOADED), Image.Resampling.LANCZOS)


def drawn(sketch: dict[str, Any] | None) -> Image.Image:
    """What was drawn, dark on light, as a light digit on a dark ground like those of MNIST.

    Raises:
        InputError: nothing was drawn.
    """
    layers = None if sketch is None else sketch.get("composite")
    if layers is None:
        raise InputError("nothing is drawn yet")
    ink = np.asarray(layers)
    grey = (
        ink[..., 3] if ink.ndim == 3 and ink.shape[2] == 4 and ink[..., 3].min() < 255 else 255 - ink[..., :3].mean(-1)
    )
    if float(grey.max()) < 30:
        raise InputError("nothing is drawn yet")
    picture = Image.fromarray(grey.astype(np.uint8), "L")
    box = picture.point(lambda value: 255 * (value > 30)).getbbox()
    cut = ImageOps.contain(picture.crop(box), (20, 20), Image.Resampling.LANCZOS)  # as MNIST's are: 20 of 28 pixels
    ground = Image.new("L", (DRAWN, DRAWN), 0)
    ground.paste(cut, ((DRAWN - cut.width) // 2, (DRAWN - cut.height) // 2))
    return ground


@lru_cache
def _images(dataset: str) -> Tensor:
    return load_images(dataset, "test").images


def chosen(dataset: str, index: float) -> Image.Image:
    """A test image of a data set.

    Raises:
        InputError: it has no image of that number.
    """
    images = _images(dataset)
    if not 0 <= int(index) < len(images):
        raise InputError(f"{dataset} has test images 0 to {len(images) - 1:,}, not {int(index):,}")
    image = images[int(index)].permute(1, 2, 0).numpy()
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def denoised(
    runs: Path, device: str, name: str, picture: Image.Image, fraction: float
) -> Iterator[tuple[Picture | None, str]]:
    """The image, what it is when noised, and what a model makes of that.

    Raises:
        InputError: no such model.
    """
    trained = open_model(runs, name, device)
    T = trained.schedule.num_timesteps
    t = max(2, round(fraction * T))
    yield None, f"denoising from t = {t} of {T}"
    x_0 = fitted(picture, trained.image_shape)
    sampling = SamplingConfig(num_steps=min(50, T), batch_size=1)
    x_t, out = reconstruct(trained, sampling, to_float(x_0[None]), t)
    row = torch.stack([x_0, to_uint8(x_t[0]), to_uint8(out[0])])[None]
    scale = 2 * visible_scale(x_0.shape[-1])
    table = image_table(row, scale=scale, captions=[("", ["the image", f"at t = {t}", "denoised"])])
    yield framed(table), f"denoised from t = {t} of {T} by {name}, with noise of its own"


def forward_tab(page: gr.Blocks, tab: gr.Tab, runs: Path, device: str) -> None:
    """Lay out the tab and say what its controls do."""
    datasets, names = available_datasets(), model_names(runs)
    picture = gr.State(None)
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
            model = gr.Dropdown(names, value=names[0], label="Denoise it with", elem_id="denoiser")
            denoise = gr.Button("Denoise from here", variant="primary", elem_id="denoise")
            told = gr.Markdown("", elem_id="forward-told")
        with gr.Column(scale=3):
            gr.Markdown("**The same image, as far along six chains**")
            with gr.Row(elem_id="chains"):
                chains = [
                    gr.Image(
                        show_label=False, interactive=False, format="png", buttons=["fullscreen"], min_width=320,
                        alt_text=f"the image noised by chains of 500, 1000 and 2000 timesteps, betas {kind}",
                    )
                    for kind in ("rescaled", "of a fixed range")
                ]  # fmt: skip
            result = gr.Image(
                show_label=False, interactive=False, format="png", elem_id="denoised", buttons=["fullscreen"],
                visible=False, alt_text="the image, noised, and denoised again",
            )  # fmt: skip

    # A picture is chosen by one handler and shown by another, so that neither a late picture nor a late t is lost.
    @show_errors
    def from_dataset(name: str, number_: float | None) -> Image.Image:
        if name not in datasets:
            raise InputError("there is no such data set here")
        return chosen(name, whole(number_, "image"))

    @show_errors
    def from_file(content: bytes | None) -> Any:
        return gr.skip() if content is None else uploaded(content)

    @show_errors
    def show(found: Image.Image | None, at: float) -> Any:
        return noised(found or chosen(datasets[0], 0), at)

    @show_errors
    def run(name: str, found: Image.Image | None, at: float) -> Iterator[Any]:
        for row, words in denoised(runs, device, name, found or chosen(datasets[0], 0), at):
            yield gr.skip() if row is None else gr.Image(value=row, visible=True), words

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    for event in (
        gr.on([dataset.change, index.change], from_dataset, [dataset, index], picture, **quiet),
        use.click(show_errors(drawn), sketch, picture, **quiet),
        upload.upload(from_file, upload, picture, **quiet),
    ):
        event.success(show, [picture, fraction], chains, **quiet)
    fraction.change(show, [picture, fraction], chains, trigger_mode="always_last", **quiet)
    page.load(show, [picture, fraction], chains, **quiet)
    denoise.click(run, [model, picture, fraction], [result, told], **quiet)
    gr.on([page.load, tab.select], lambda: gr.Dropdown(model_names(runs)), None, model, **quiet)

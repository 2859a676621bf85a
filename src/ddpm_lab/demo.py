"""`ddpm demo`: the first, honest, small version of the study: train on the embedded digits, sample both ways, show."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_lab.config import SamplingConfig, load_recipe
from ddpm_lab.data import load_images
from ddpm_lab.generation import build_sampler, generate
from ddpm_lab.images import image_grid, save_png
from ddpm_lab.log import read_lines
from ddpm_lab.progress import duration, progress
from ddpm_lab.run import train
from ddpm_lab.trained import load

SAMPLERS = {
    "ddim": SamplingConfig(sampler="ddim", num_steps=50),
    "ddpm": SamplingConfig(sampler="ddpm"),
}
NUM_IMAGES = 64


def run_demo(out: Path, device: str, say: Callable[[str], object]) -> None:
    """Train the `digits` recipe in `out/run`, sample by DDIM and by Algorithm 2, and save one picture with real digits.

    Args:
        out: folder, made where it does not exist; an earlier demo in it continues.
        device: auto, cpu, cuda or mps.
        say: takes lines of text for the user.
    Raises:
        As `run.train`.
    """
    begun = time.monotonic()
    run_dir = out / "run"
    train(load_recipe("digits"), run_dir, device=device, say=say)
    trained = load(run_dir, device=device)
    real = load_images("digits", "test").images

    rows = {"real": real[:NUM_IMAGES]}
    for name, sampling in SAMPLERS.items():
        steps = build_sampler(trained, sampling).num_steps
        with progress(f"sampling ({name})", NUM_IMAGES * steps, "evaluations") as advance:
            rows[name] = torch.cat(list(generate(trained, NUM_IMAGES, sampling, on_step=advance)))

    validated = [entry for entry in read_lines(run_dir / "log.jsonl") if "validation_loss" in entry]
    say("images seen   training loss   validation loss")
    for entry in validated:
        say(f"{entry['images']:11,}   {entry['loss']:13.4f}   {entry['validation_loss']:15.4f}")
    say(f"{NUM_IMAGES} images      mean of pixels   standard deviation   (0 .. 255)")
    for name, images in rows.items():
        say(f"{name:14} {images.double().mean():14.1f}   {images.double().std():18.1f}")
    picture = out / "digits.png"
    save_png(picture, image_grid(torch.cat(list(rows.values())), columns=16, scale=4))
    say(
        f"done in {duration(time.monotonic() - begun)}: {picture} shows {NUM_IMAGES} real digits (top four "
        f"rows), as many by DDIM-50 and by ancestral sampling with all T = {trained.schedule.num_timesteps} steps"
    )

"""The commands of `ddpm` that show: pictures and films of both processes, and curves."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from ddpm_lab.cli.commands import Checkpoint, DataDir, Device, Source, Weights, app
from ddpm_lab.core.config import FewImagesConfig
from ddpm_lab.pictures.picture_settings import PictureConfig

NumTimesteps = Annotated[tuple[int, ...], Parameter(help="T, one or several chains above one another")]
Betas = Annotated[
    tuple[Literal["rescaled", "fixed", "cosine"], ...],
    Parameter(help="linear times 1000/T (rescaled), linear 1e-4 .. 0.02 at every T (fixed), cosine; one or several"),
]
Look = Annotated[PictureConfig, Parameter(name="*")]
Sampling = Annotated[FewImagesConfig, Parameter(name="*")]
curves = App(
    name="curves",
    help="Draw curves: noise schedules, training, the norm of x_t.",
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
)
app.command(curves)


@app.command
def forward(
    *,
    out: Path,
    dataset: str = "mnist",
    split: Literal["train", "test"] | None = None,
    num_images: int = 4,
    num_timesteps: NumTimesteps = (1000,),
    betas: Betas = ("rescaled",),
    columns: int | None = None,
    spacing: Literal["uniform", "logsnr"] = "uniform",
    closed_form: bool = False,
    look: Look = PictureConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    image_size: int | None = None,
    data_dir: DataDir = None,
) -> None:
    """Show real images on their way into noise: a row for each, a column for each timestep, or a film.

    Args:
        out: FILE.png for a picture; FILE.gif or FILE.mp4 for a film, with a mark on the curves of alpha_bar and SNR.
        dataset: mnist, cifar10, digits, or the path of a folder of images.
        split: which part of it; unset: test, but train of a folder, whose test part is a twentieth.
        num_images: drawn at random, from 1 to 64.
        columns: timesteps in a picture, the clean image and the last among them; unset: 11, or as many as there are.
        spacing: columns and frames even in t (uniform), or in the logarithm of the signal-to-noise ratio (logsnr).
        closed_form: jump from the image to each timestep with one noise, rather than walk step by step.
        seed: of the images and of the noise.
        image_size: pixels to which the images of a folder are cropped and scaled; unset: they have one size already.
    """
    from ddpm_lab.pictures.forward import processes, show_forward

    shown = processes(num_timesteps, betas)
    made = show_forward(
        out, shown, dataset, split=split, num_images=num_images, columns=columns, spacing=spacing,
        closed_form=closed_form, look=look, seed=seed, data_dir=data_dir, image_size=image_size,
    )  # fmt: skip
    print(made)


@app.command
def reverse(
    *sources: Source,
    out: Path,
    num_images: int = 4,
    columns: int | None = None,
    sampling: Sampling = FewImagesConfig(),  # noqa: B008 (frozen)
    look: Look = PictureConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Show images coming out of noise, x_t beside the predicted x_0; several models go in step.

    Args:
        out: FILE.png for a picture, FILE.gif or FILE.mp4 for a film.
        num_images: from 1 to 64; image i of a seed is that of `ddpm sample`.
        columns: states in a picture, the noise and the image among them; unset: 11, or as many as there are.
    """
    from ddpm_lab.pictures.reverse import show_reverse

    made = show_reverse(
        out, sources, sampling, num_images=num_images, columns=columns, look=look,
        weights=weights, checkpoint=checkpoint, device=device,
    )  # fmt: skip
    print(made)


@app.command
def interpolate(
    source: Source,
    /,
    *,
    out: Path,
    to_seed: int = 1,
    num_images: int = 4,
    columns: int | None = None,
    sampling: Sampling = FewImagesConfig(),  # noqa: B008 (frozen)
    look: Look = PictureConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Show what lies between the images of two seeds, along the great circle between their noises.

    Args:
        out: FILE.png for a picture, FILE.gif or FILE.mp4 for a film.
        to_seed: where it ends; it begins at --seed.
        num_images: from 1 to 64, each a row.
        columns: images of a row, the two ends among them; unset: 11.
    """
    from ddpm_lab.pictures.reverse import show_interpolation

    made = show_interpolation(
        out, source, sampling, to_seed, num_images=num_images, columns=columns, look=look,
        weights=weights, checkpoint=checkpoint, device=device,
    )  # fmt: skip
    print(made)


@app.command
def reconstruct(
    source: Source,
    /,
    *,
    out: Path,
    timesteps: tuple[int, ...] = (),
    dataset: str | None = None,
    split: Literal["train", "test"] | None = None,
    num_images: int = 4,
    sampling: Sampling = FewImagesConfig(),  # noqa: B008 (frozen)
    scale: int | None = None,
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Show how much of a real image survives: noised to t, and denoised again from there.

    Args:
        out: FILE.png.
        timesteps: from 2 to T; unset: ten even ones.
        dataset: whose images; unset: those the model was trained on. Those of a folder are cropped and scaled.
        split: which part of it; unset: test, but train of a folder, whose test part is a twentieth.
        num_images: drawn at random, from 1 to 64.
        scale: whole factor by which images are enlarged, without blur; unset: to 56 pixels or more.
    """
    from ddpm_lab.pictures.reverse import show_reconstruction

    made = show_reconstruction(
        out, source, sampling, timesteps, dataset=dataset, split=split, num_images=num_images,
        look=PictureConfig(scale=scale), weights=weights, checkpoint=checkpoint, device=device, data_dir=data_dir,
    )  # fmt: skip
    print(made)


@curves.command
def schedules(*, out: Path, num_timesteps: NumTimesteps = (500, 1000, 2000), betas: Betas = ("rescaled",)) -> None:
    """Draw alpha_bar over t and over t/T, the signal-to-noise ratio and beta.

    Args:
        out: FILE.png.
    """
    from ddpm_lab.pictures.curves import save_figure, schedule_figure
    from ddpm_lab.pictures.forward import processes

    save_figure(out, lambda: schedule_figure(processes(num_timesteps, betas)))


@curves.command
def training(*runs: Path, out: Path) -> None:
    """Draw loss over images seen, loss by timestep, and images per second, of run folders.

    Args:
        runs: run folders.
        out: FILE.png.
    """
    from ddpm_lab.pictures.curves import read_runs, save_figure, training_figure

    logs = read_runs(runs)
    save_figure(out, lambda: training_figure(logs))


@curves.command
def norms(
    source: Source,
    /,
    *,
    out: Path,
    num_images: int = 64,
    sampling: Sampling = FewImagesConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    data_dir: DataDir = None,
) -> None:
    """Draw the norm of x_t: noised real images, the sampler's states, and what theory says.

    Args:
        out: FILE.png.
        num_images: of each.
    """
    from ddpm_lab.models.trained import load
    from ddpm_lab.pictures.curves import norm_figure, save_figure, state_norms
    from ddpm_lab.sampling.image_files import check_writable

    check_writable(out, (".png",))
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    norms_of = state_norms(trained, sampling, num_images, data_dir)
    save_figure(out, lambda: norm_figure(norms_of))

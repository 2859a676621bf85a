"""The commands of `ddpm` that make pictures, films and curves."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from ddpm_lab.cli.commands import Checkpoint, DataDir, Device, Source, Weights, app
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.pictures.picture_settings import PICTURE_ENDINGS, PictureConfig

if TYPE_CHECKING:
    from ddpm_lab.models.trained import TrainedModel


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights of a model are loaded, and where they run."""

    weights: Weights = "ema"
    checkpoint: Checkpoint = None
    device: Device = "auto"

    def load(self, source: str) -> "TrainedModel":
        """Load a model."""
        from ddpm_lab.models.trained import load

        return load(source, weights=self.weights, checkpoint=self.checkpoint, device=self.device)


NumTimesteps = Annotated[tuple[int, ...], Parameter(help="T, one or several chains above one another")]
Betas = Annotated[
    tuple[Literal["rescaled", "fixed", "cosine"], ...],
    Parameter(help="linear times 1000/T (rescaled), linear 1e-4 .. 0.02 at every T (fixed), cosine; one or several"),
]
Picture = Annotated[PictureConfig, Parameter(name="*")]
Sampling = Annotated[SamplingConfig, Parameter(name="*")]
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
    spacing: Literal["uniform", "logsnr"] = "uniform",
    closed_form: bool = False,
    settings: Picture = PictureConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    image_size: int | None = None,
    data_dir: DataDir = None,
) -> None:
    """Show how real images turn into noise: a row for each image and a column for each timestep, or a film.

    Args:
        out: FILE.png for a picture; FILE.gif or FILE.mp4 for a film, with a mark on the curves of alpha_bar and SNR.
        dataset: mnist, cifar10, digits, or the path of a folder of images.
        split: part of the data set; unset: test, but train for a folder, whose test part is a twentieth of it.
        num_images: images drawn at random, from 1 to 64.
        spacing: columns and frames even in t (uniform), or in the logarithm of the signal-to-noise ratio (logsnr).
        closed_form: jump from the image to each timestep with one noise, instead of going step by step.
        seed: of the choice of images and of the noise.
        image_size: pixels to which the images of a folder are cropped and scaled; unset: they have one size already.
    """
    from ddpm_lab.pictures.forward import forward_processes, show_forward

    processes = forward_processes(num_timesteps, betas)
    print(show_forward(
        out, processes, dataset, split=split, num_images=num_images, spacing=spacing, closed_form=closed_form,
        settings=settings, seed=seed, data_dir=data_dir, image_size=image_size,
    ))  # fmt: skip


@app.command
def reverse(
    *sources: Source,
    out: Path,
    num_images: int = 4,
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    settings: Picture = PictureConfig(),  # noqa: B008 (frozen)
    model: ModelOptions = ModelOptions(),
) -> None:
    """Show how images come out of noise: x_t beside the predicted x_0; several models advance together.

    Args:
        out: FILE.png for a picture, FILE.gif or FILE.mp4 for a film.
        num_images: from 1 to 64; image i of a seed is that of `ddpm sample`.
    """
    from ddpm_lab.pictures.film import check_output
    from ddpm_lab.pictures.reverse import show_reverse

    check_output(out, settings)
    trained = [model.load(source) for source in sources]
    print(show_reverse(out, trained, sampling, num_images=num_images, settings=settings))


@app.command
def interpolate(
    source: Source,
    /,
    *,
    out: Path,
    to_seed: int = 1,
    num_images: int = 4,
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    settings: Picture = PictureConfig(),  # noqa: B008 (frozen)
    model: ModelOptions = ModelOptions(),
) -> None:
    """Show the images between those of two seeds, along the great circle between their noises.

    Args:
        out: FILE.png for a picture, FILE.gif or FILE.mp4 for a film.
        to_seed: the seed of the last column or frame; --seed is that of the first.
        num_images: from 1 to 64, each a row.
    """
    from ddpm_lab.pictures.film import check_output
    from ddpm_lab.pictures.reverse import show_interpolation

    check_output(out, settings)
    print(show_interpolation(out, model.load(source), sampling, to_seed, num_images=num_images, settings=settings))


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
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    scale: int | None = None,
    model: ModelOptions = ModelOptions(),
    data_dir: DataDir = None,
) -> None:
    """Show how well real images are restored after they were noised to t, for several t.

    Args:
        out: FILE.png.
        timesteps: from 2 to T; unset: ten evenly spaced ones.
        dataset: where the images come from; unset: the data set of the model. Images of a folder are cropped and
            scaled to the model's size.
        split: part of the data set; unset: test, but train for a folder, whose test part is a twentieth of it.
        num_images: images drawn at random, from 1 to 64.
        scale: whole factor by which images are enlarged, without blur; unset: to 56 pixels or more.
    """
    from ddpm_lab.pictures.reverse import show_reconstruction
    from ddpm_lab.sampling.image_files import check_writable

    check_writable(out, PICTURE_ENDINGS)
    print(show_reconstruction(
        out, model.load(source), sampling, timesteps, dataset=dataset, split=split, num_images=num_images,
        scale=PictureConfig(scale=scale).scale, data_dir=data_dir,
    ))  # fmt: skip


@curves.command
def schedules(*, out: Path, num_timesteps: NumTimesteps = (500, 1000, 2000), betas: Betas = ("rescaled",)) -> None:
    """Draw alpha_bar over t and over t/T, the signal-to-noise ratio and beta.

    Args:
        out: FILE.png.
    """
    from ddpm_lab.pictures.curves import save_figure, schedule_figure
    from ddpm_lab.pictures.forward import forward_processes

    print(save_figure(out, schedule_figure(forward_processes(num_timesteps, betas))))


@curves.command
def training(*runs: Path, out: Path) -> None:
    """Draw loss over images seen, loss by timestep, and images per second, of run folders.

    Args:
        runs: run folders.
        out: FILE.png.
    """
    from ddpm_lab.pictures.curves import read_runs, save_figure, training_figure

    print(save_figure(out, training_figure(read_runs(runs))))


@curves.command
def norms(
    source: Source,
    /,
    *,
    out: Path,
    num_images: int = 64,
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    model: ModelOptions = ModelOptions(),
    data_dir: DataDir = None,
) -> None:
    """Draw the norm of x_t: of noised real images, of the sampler's states, and as the theory predicts it.

    Args:
        out: FILE.png.
        num_images: number of real images, and of sampled ones.
    """
    from ddpm_lab.pictures.curves import norm_figure, save_figure, state_norms
    from ddpm_lab.sampling.image_files import check_writable

    check_writable(out, PICTURE_ENDINGS)
    print(save_figure(out, norm_figure(state_norms(model.load(source), sampling, num_images, data_dir))))

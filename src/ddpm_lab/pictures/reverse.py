"""Show the reverse process: noise that turns into images, as a picture or a film.

Also interpolation between two seeds, and the reconstruction of real images from a noised state. Figures count timesteps
as the paper does: t = 0 is the clean image, t = T is noise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import progress
from ddpm_lab.core.seeds import check_seed
from ddpm_lab.data.datasets import DATASETS, to_uint8
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.diffusion.process import q_sample
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.pictures import drawing
from ddpm_lab.pictures.film import save_drawing
from ddpm_lab.pictures.forward import process_label, random_images, snr_at
from ddpm_lab.pictures.picture_settings import PictureConfig, check_num_images, is_film
from ddpm_lab.sampling.generation import ImageNoise, Sampler, build_sampler, class_labels, guidance_record, trajectory
from ddpm_lab.sampling.image_files import save_png

X_T, X_0 = "x_t", "predicted x_0"
MAX_CAPTION = 24  # letters of the name of a class


@dataclass(frozen=True)
class Trajectory:
    """Some states of a reverse process, from noise to images.

    Attributes:
        label: of the generator, for figures.
        timesteps: S timesteps as figures count them, decreasing, from T to 0.
        x_t: the states, (S, N, C, H, W) uint8.
        x_0_hat: the clean images predicted from them, of the same shape; the last are the images themselves.
        classes: the names of the N images' classes; none for an unconditional network.
    """

    label: str
    timesteps: list[int]
    x_t: Tensor
    x_0_hat: Tensor
    classes: Sequence[str] = ()


def record_trajectory(
    trained: TrainedModel,
    config: SamplingConfig,
    num_images: int,
    num_states: int,
    on_step: Callable[[int], object] = lambda rows: None,
) -> Trajectory:
    """Sample images 0 .. num_images - 1 of a seed and keep some states, evenly spaced in the number of steps.

    Args:
        num_states: at least 2, with the noise and the images; where it exceeds the number of steps + 1, some repeat.
        trained, config, num_images, on_step: see `generate`.
    """
    sampler = build_sampler(trained, config)
    kept = [round(i * sampler.num_steps / (num_states - 1)) for i in range(num_states)]
    batches, rows = [], min(config.batch_size, num_images)
    for first in range(0, num_images, config.batch_size):
        wanted = min(config.batch_size, num_images - first)
        states = {}
        for index, step in enumerate(trajectory(trained, sampler, range(first, first + rows))):
            if index in kept:
                states[index] = (step.t + 1, to_uint8(step.x_t[:wanted]).cpu(), to_uint8(step.x_0_hat[:wanted]).cpu())
            on_step(wanted)
        images = to_uint8(step.x_s[:wanted]).cpu()
        states[sampler.num_steps] = (0, images, images)
        batches.append(states)
    x_t = torch.stack([torch.cat([states[index][1] for states in batches]) for index in kept])
    x_0_hat = torch.stack([torch.cat([states[index][2] for states in batches]) for index in kept])
    timesteps, classes = [states[index][0] for index in kept], class_captions(trained, config, num_images)
    return Trajectory(describe_generator(trained, sampler), timesteps, x_t, x_0_hat, classes)


def class_captions(trained: TrainedModel, config: SamplingConfig, num_images: int) -> list[str]:
    """The name of the class of each image, cut to a caption; empty where images have no class."""
    numbers = class_labels(trained, config, range(num_images))
    return [] if numbers is None else [_caption(trained.class_names[number]) for number in numbers]


def _caption(name: str) -> str:
    return name if len(name) <= MAX_CAPTION else f"{name[: MAX_CAPTION - 1]}…"


def describe_generator(trained: TrainedModel, sampler: Sampler) -> str:
    """The label of a generator in figures, such as 'mnist: T = 1000, cosine; ddim, 50 steps'."""
    eta = f", eta {sampler.config.eta:g}" if sampler.config.eta else ""
    name = Path(trained.name).name or trained.name
    process = process_label(trained.config.diffusion)
    guidance = guidance_label(guidance_record(sampler))
    chosen = [_caption(trained.class_names[number]) for number in trained.class_numbers(sampler.config.class_)]
    classes = f", class {', '.join(chosen[:4])}" + ", ..." * (len(chosen) > 4) if chosen else ""
    return f"{name}: {process}; {sampler.config.sampler}, {sampler.num_steps} steps{eta}{classes}{guidance}"


def reverse_picture(trajectories: Sequence[Trajectory], scale: int | None = None) -> drawing.Picture:
    """Two rows for each image, x_t above the predicted x_0, and a column for each state.

    Args:
        scale: whole factor of enlargement; None: to 56 pixels or more.
    """
    tables = []
    for shown in trajectories:
        pairs = torch.stack([shown.x_t, shown.x_0_hat], dim=2)  # (S, N, 2, C, H, W)
        rows = pairs.flatten(1, 2).transpose(0, 1)  # (2 N, S, C, H, W)
        firsts = [f"{name}: {X_T}" for name in shown.classes] or [X_T] * shown.x_t.shape[1]
        labels = [label for first in firsts for label in (first, X_0)]
        captions = [("t", [str(t) for t in shown.timesteps])]
        tables.append(drawing.image_table(rows, scale=scale, title=shown.label, row_labels=labels, captions=captions))
    return drawing.framed(drawing.stacked(tables, gap=drawing.LINE))


def reverse_frames(trajectories: Sequence[Trajectory], scale: int | None = None) -> Iterator[drawing.Picture]:
    """The frames of a film: x_t at the left, the predicted x_0 at the right, the generators one above another.

    All trajectories have the same number of states, so that chains of different lengths advance together.
    """
    captions = [[f"x_t at t = {t}" for t in shown.timesteps] for shown in trajectories]
    min_width = drawing.text_width([X_0, *(caption for texts in captions for caption in texts)])
    for index in range(len(trajectories[0].timesteps)):
        lines = []
        for shown, texts in zip(trajectories, captions, strict=True):
            halves = [
                drawing.image_table(_block(images), scale=scale, captions=[("", [text])], min_width=min_width)
                for images, text in ((shown.x_t[index], texts[index]), (shown.x_0_hat[index], X_0))
            ]
            lines.append(drawing.stacked([drawing.title_line(shown.label), drawing.side_by_side(halves)], gap=0))
        yield drawing.framed(drawing.stacked(lines))


def _block(images: Tensor) -> Tensor:
    """(N, C, H, W) as rows and columns, (R, N / R, C, H, W), at most twice as wide as high; white fills the gaps."""
    N = len(images)
    columns = min(N, max(4, round((2 * N) ** 0.5)))
    white = torch.full((-N % columns, *images.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images, white]).reshape(-1, columns, *images.shape[1:])


def check_interpolation(config: SamplingConfig, to_seed: int) -> None:
    """Refuse a sampler that adds noise, and an invalid second seed.

    Raises:
        InputError: one of the two.
    """
    check_seed(to_seed, "to_seed")
    if config.sampler == "ddpm" or config.eta:
        raise InputError("interpolation requires a deterministic sampler: any but ddpm, with eta 0")


def interpolate(
    trained: TrainedModel,
    config: SamplingConfig,
    to_seed: int,
    num_images: int,
    num_between: int,
    on_step: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Samples between image i of one seed and image i of another, along the great circle between their noises.

    Spherical interpolation (Song et al. 2020, arXiv:2010.02502, appendix D.5):
    x_T = (sin((1 - a) w) x + sin(a w) y) / sin(w), with w the angle between x and y, and a from 0 to 1.

    Args:
        config: of a deterministic sampler; its seed is the first.
        to_seed: the second seed.
        num_between: number of values of a, with both ends; at least 2.
        on_step: called after each step of each batch with its number of images.
    Returns:
        (num_images, num_between, C, H, W) uint8.
    Raises:
        InputError: `num_between` is below 2, or `check_interpolation` refuses the settings.
    """
    check_interpolation(config, to_seed)
    require(num_between >= 2, f"an interpolation needs at least 2 images, its two ends, not {num_between}")
    sampler = build_sampler(trained, config)
    device = next(trained.model.parameters()).device
    ends = [ImageNoise(seed, range(num_images), trained.image_shape, device)(-1) for seed in (config.seed, to_seed)]
    x_T = _great_circle(ends[0].flatten(1), ends[1].flatten(1), num_between).view(-1, *trained.image_shape)
    classes = class_labels(trained, config, range(num_images))
    y = None if classes is None else classes.repeat_interleave(num_between)
    images = []
    for first in range(0, len(x_T), config.batch_size):
        batch = slice(first, first + config.batch_size)
        for step in sampler.steps(x_T[batch], None, None if y is None else y[batch]):
            on_step(len(step.x_s))
        images.append(to_uint8(step.x_s).cpu())
    return torch.cat(images).reshape(num_images, num_between, *trained.image_shape)


def _great_circle(x: Tensor, y: Tensor, num_points: int) -> Tensor:
    """Points evenly spaced on the great circles from x to y, both (N, D): (N, num_points, D)."""
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()[:, None, None]  # (N, 1, 1)
    a = torch.linspace(0, 1, num_points, device=x.device)[None, :, None]
    equal = angle < 1e-4  # the same seed twice: the formula would divide by 0
    sine = torch.where(equal, torch.ones_like(angle), angle.sin())
    weight_x = torch.where(equal, 1 - a, ((1 - a) * angle).sin() / sine)
    weight_y = torch.where(equal, a, (a * angle).sin() / sine)
    return weight_x * x[:, None] + weight_y * y[:, None]


def check_reconstruction(trained: TrainedModel, config: SamplingConfig, timesteps: Sequence[int]) -> None:
    """Refuse timesteps outside 2 .. T, and guidance without classes: the classes of real images are not known.

    Raises:
        InputError: one of the two.
    """
    T = trained.schedule.num_timesteps
    for t in timesteps:
        require(2 <= t <= T, f"timesteps must be from 2 to the {T} of {trained.name}, not {t}")
    if config.guidance and not config.class_ and config.guide is None:
        raise InputError("--guidance requires --class for a reconstruction, because the images' classes are not known")


def reconstruct(
    trained: TrainedModel,
    config: SamplingConfig,
    x_0: Tensor,
    t: int,
    on_step: Callable[[int], object] = lambda rows: None,
) -> tuple[Tensor, Tensor]:
    """Noise real images to t by the closed form (Ho et al. 2020, eq. 4), and denoise them from there.

    Timesteps 1 .. t are sampled as a chain of their own, with a proportional part of the sampler's steps.

    Args:
        config: `class_` gives the classes of a conditional network, repeated in turn; without it the network is used
            unconditionally.
        x_0: (N, C, H, W) float32, in [-1, 1].
        t: a timestep as figures count it, from 2 to T.
        on_step: called after each step of each batch with its number of images.
    Returns:
        x_t and the denoised images, both (N, C, H, W) floating.
    Raises:
        InputError: `check_reconstruction` refuses the settings.
    """
    check_reconstruction(trained, config, [t])
    full = build_sampler(trained, config)
    shortened = dataclasses.replace(trained, schedule=NoiseSchedule(trained.schedule.beta[:t]))
    num_steps = max(1, min(round(full.num_steps * t / trained.schedule.num_timesteps), t // (1 + config.singlestep)))
    # Settings resolved for the full chain are kept, such as the variance that goes with all T steps.
    sampler = build_sampler(shortened, dataclasses.replace(full.config, num_steps=num_steps))
    device = next(trained.model.parameters()).device
    noised, denoised = [], []
    for first in range(0, len(x_0), config.batch_size):
        rows = range(first, min(first + config.batch_size, len(x_0)))
        noise = ImageNoise(config.seed, rows, trained.image_shape, device, sampler.num_draws)
        clean = x_0[first : rows.stop].to(device)
        x_t = q_sample(shortened.schedule, clean, torch.full((len(rows),), t - 1, device=device), noise(-1))
        classes = class_labels(trained, config, rows) if config.class_ else None
        for step in sampler.steps(x_t, noise, classes):
            on_step(len(step.x_s))
        noised.append(x_t.cpu())
        denoised.append(step.x_s.cpu())
    return torch.cat(noised), torch.cat(denoised)


def show_reverse(
    out: Path,
    generators: Sequence[TrainedModel],
    config: SamplingConfig,
    *,
    num_images: int = 4,
    settings: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
) -> str:
    """Save how the images of a seed come out of noise, for one generator or several.

    Args:
        out: ends in .png for a picture, .gif or .mp4 for a film; see `check_output`.
        generators: drawn one above another.
        config: sampler, seed and so on; image i of a seed is that of `ddpm sample`.
        num_images: from 1 to 64, of each generator.
        settings: columns or frames, and the size and speed.
    Returns:
        A line that describes the file.
    Raises:
        InputError: a setting cannot be used; raised before any work is done.
    """
    check_num_images(num_images)
    require(bool(generators), "name at least one model")
    steps = [build_sampler(trained, config).num_steps for trained in generators]
    count = settings.num_states(out, max(steps) + 1)
    show_deferred_warnings()
    with progress("sampling", num_images * sum(steps), "steps") as advance:
        shown = [record_trajectory(trained, config, num_images, count, advance) for trained in generators]
    draw = reverse_frames if is_film(out) else reverse_picture
    save_drawing(out, draw(shown, settings.scale), settings, count)
    labels = "; ".join(trajectory.label for trajectory in shown)
    return f"{out}: {num_images} images in {count} states, {labels}; seed {config.seed}"


def show_interpolation(
    out: Path,
    trained: TrainedModel,
    config: SamplingConfig,
    to_seed: int,
    *,
    num_images: int = 4,
    settings: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
) -> str:
    """Save the images between those of two seeds, as a picture with a row for each or as a film.

    Args:
        trained, config, to_seed: see `interpolate`.
        out, num_images, settings: see `show_reverse`.
    Returns:
        A line that describes the file.
    Raises:
        InputError: a setting cannot be used; raised before any work is done.
    """
    check_num_images(num_images)
    count = settings.num_states(out, 10_001 if is_film(out) else 101)
    check_interpolation(config, to_seed)
    sampler = build_sampler(trained, config)
    show_deferred_warnings()
    with progress("sampling", num_images * count * sampler.num_steps, "steps") as advance:
        images = interpolate(trained, config, to_seed, num_images, count, advance)
    title = f"{describe_generator(trained, sampler)}; seed {config.seed} to seed {to_seed}"
    classes = class_captions(trained, config, num_images)
    draw = _interpolation_frames if is_film(out) else partial(_interpolation_picture, row_labels=classes)
    save_drawing(out, draw(images, title, settings.scale), settings, count)
    return f"{out}: {num_images} images from seed {config.seed} to seed {to_seed}, {count} each"


def _interpolation_picture(images: Tensor, title: str, scale: int | None, row_labels: Sequence[str]) -> drawing.Picture:
    """(N, M, C, H, W) as a table, with the share of the second seed below each of the M columns."""
    num_columns = images.shape[1]
    captions = [("", [f"{index / (num_columns - 1):.2g}" for index in range(num_columns)])]
    table = drawing.image_table(images, scale=scale, title=title, row_labels=row_labels, captions=captions)
    return drawing.framed(table)


def _interpolation_frames(images: Tensor, title: str, scale: int | None) -> Iterator[drawing.Picture]:
    """A frame for each of the M columns, with the share of the second seed below."""
    num_frames = images.shape[1]
    for index in range(num_frames):
        block, captions = _block(images[:, index]), [("", [f"{index / (num_frames - 1):.2f}"])]
        yield drawing.framed(drawing.image_table(block, scale=scale, title=title, captions=captions))


def show_reconstruction(
    out: Path,
    trained: TrainedModel,
    config: SamplingConfig,
    timesteps: Sequence[int],
    *,
    dataset: str | None = None,
    split: str | None = None,
    num_images: int = 4,
    scale: int | None = None,
    data_dir: Path | None = None,
) -> str:
    """Save real images, noised to some timesteps and denoised from each.

    Args:
        out: ends in .png.
        timesteps: as figures count them, from 2 to T; none: ten evenly spaced ones.
        dataset: where the images come from; None: the data set that the network was trained on.
        split, num_images, data_dir: see `random_images`.
        scale: whole factor of enlargement; None: to 56 pixels or more.
    Returns:
        A line that names the file and the error at each timestep.
    Raises:
        InputError: a setting or the data cannot be used; raised before any work is done.
    """
    T, shape = trained.schedule.num_timesteps, trained.image_shape
    timesteps = sorted(set(timesteps)) or sorted({max(2, round(T * i / 10)) for i in range(1, 11)})
    check_reconstruction(trained, config, timesteps)
    sampler, dataset = build_sampler(trained, config), dataset or trained.config.data.dataset
    if dataset == UNKNOWN:
        raise InputError(f"the training data of {trained.name} is not known, since it was imported; give --dataset")
    x_0 = random_images(dataset, split, num_images, config.seed, data_dir, None if dataset in DATASETS else shape[-1])
    if tuple(x_0.shape[1:]) != shape:
        raise InputError(f"images of {dataset} are {tuple(x_0.shape[1:])}, {trained.name} makes {shape}")
    show_deferred_warnings()
    steps = sum(max(1, round(sampler.num_steps * t / T)) for t in timesteps)
    with progress("denoising", num_images * steps, "steps") as advance:
        pairs = [(x_0, x_0), *(reconstruct(trained, config, x_0, t, advance) for t in timesteps)]
    errors = [float((denoised - x_0).square().mean()) ** 0.5 / 2 for _, denoised in pairs]  # of pixels in [0, 1]
    columns = [torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs]  # (2 N, C, H, W) each
    shown = [0, *timesteps]
    table = drawing.image_table(
        to_uint8(torch.stack(columns, dim=1)),
        scale=scale,
        title=describe_generator(trained, sampler),
        row_labels=["noised", "denoised"] * num_images,
        captions=[
            ("t", [str(t) for t in shown]),
            ("SNR", [drawing.short_number(snr_at(trained.schedule, t)) for t in shown]),
            ("RMSE", [f"{error:.2g}" for error in errors]),
        ],
    )
    save_png(out, drawing.framed(table))
    described = ", ".join(f"{error:.3f} from t = {t}" for error, t in zip(errors[1:], timesteps, strict=True))
    return f"{out}: RMSE of pixels (0 .. 1) {described}"

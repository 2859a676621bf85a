"""The reverse process seen: from noise to images, x_t beside the image predicted at t, as a picture or a film.

Also what lies between two samples, and how much of a real image survives being noised and denoised again. Figures count
as the paper does: t = 0 is the clean image, t = T noise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.messages import show_deferred_warnings
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.core.seeds import check_seed
from ddpm_lab.data.datasets import DATASETS, to_uint8
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.diffusion.process import q_sample
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel, Weights, load
from ddpm_lab.pictures.drawing import (
    LINE,
    Picture,
    framed,
    image_table,
    short_number,
    side_by_side,
    stacked,
    text_line,
    text_width,
)
from ddpm_lab.pictures.film import PICTURE_ENDINGS, check_kind, save_film
from ddpm_lab.pictures.forward import Process, chosen_images, snr_at
from ddpm_lab.pictures.picture_settings import PictureConfig, num_columns
from ddpm_lab.sampling.generation import ImageNoise, Sampler, build_sampler, class_labels, guidance_record, trajectory
from ddpm_lab.sampling.image_files import check_writable, save_png, visible_scale

X_T, X_0 = "x_t", "predicted x_0"


@dataclass(frozen=True)
class Trajectory:
    """Some states of a reverse process, from noise to images.

    Attributes:
        label: of the generator, for figures.
        timesteps: S figures' timesteps, decreasing, from T to 0.
        x_t: the states, (S, N, C, H, W) uint8.
        x_0_hat: the clean images predicted there, likewise; the last are the images themselves.
    """

    label: str
    timesteps: list[int]
    x_t: Tensor
    x_0_hat: Tensor


def record_trajectory(
    trained: TrainedModel,
    config: SamplingConfig,
    num_images: int,
    num_states: int,
    on_step: Callable[[int], object] = lambda rows: None,
) -> Trajectory:
    """Sample images 0 .. num_images - 1 of a seed and keep states even in the number of steps.

    Args:
        num_states: at least 2, the noise and the images among them; more than there are repeats some.
        The rest: see `generation.generate`.
    """
    sampler = build_sampler(trained, config)
    kept = [round(i * sampler.num_steps / (num_states - 1)) for i in range(num_states)]
    x_t: list[list[Tensor]] = []
    x_0_hat: list[list[Tensor]] = []
    for first in range(0, num_images, config.batch_size):
        wanted = min(config.batch_size, num_images - first)
        states, timesteps = {}, {}
        for index, step in enumerate(trajectory(trained, sampler, first)):
            if index in kept:
                states[index] = step.x_t[:wanted], step.x_0_hat[:wanted]
                timesteps[index] = step.t + 1
            on_step(wanted)
        states[sampler.num_steps], timesteps[sampler.num_steps] = (step.x_s[:wanted],) * 2, 0
        x_t.append([to_uint8(states[index][0]).cpu() for index in kept])
        x_0_hat.append([to_uint8(states[index][1]).cpu() for index in kept])

    def joined(batches: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(parts) for parts in zip(*batches, strict=True)])

    return Trajectory(describe_generator(trained, sampler), [timesteps[i] for i in kept], joined(x_t), joined(x_0_hat))


def describe_generator(trained: TrainedModel, sampler: Sampler) -> str:
    """What a figure says of where images come from: 'mnist: T = 1000, cosine; ddim, 50 steps'."""
    eta = f", eta {sampler.config.eta:g}" if sampler.config.eta else ""
    name = Path(trained.name).name or trained.name
    process = Process(trained.config.diffusion).label
    guiding = guidance_label(guidance_record(sampler))
    return f"{name}: {process}; {sampler.config.sampler}, {sampler.num_steps} steps{eta}{guiding}"


def reverse_picture(trajectories: Sequence[Trajectory], scale: int | None = None) -> Picture:
    """Two rows for each image, x_t above the predicted x_0, and a column for each state."""
    tables = []
    for shown in trajectories:
        N = shown.x_t.shape[1]
        rows = torch.stack([shown.x_t, shown.x_0_hat], dim=2)  # (S, N, 2, C, H, W)
        images = rows.flatten(1, 2).transpose(0, 1)  # (2 N, S, C, H, W)
        captions = [("t", [str(t) for t in shown.timesteps])]
        enlargement = scale or visible_scale(images.shape[-1])
        tables.append(
            image_table(images, scale=enlargement, title=shown.label, row_labels=[X_T, X_0] * N, captions=captions)
        )
    return framed(stacked(tables, gap=LINE))


def reverse_frames(trajectories: Sequence[Trajectory], scale: int | None = None) -> Iterator[Picture]:
    """A film: at the left x_t, at the right the predicted x_0, the generators above one another.

    All have as many states; chains of several lengths go in step, by the fraction of their steps.
    """
    captions = [[f"x_t at t = {t}" for t in shown.timesteps] for shown in trajectories]
    least_width = text_width([X_0, *(caption for of_one in captions for caption in of_one)])
    for index in range(len(trajectories[0].timesteps)):
        rows = []
        for shown, of_one in zip(trajectories, captions, strict=True):
            left, right = (
                image_table(
                    _block(images[index]),
                    scale=scale or visible_scale(images.shape[-1]),
                    captions=[("", [caption])],
                    least_width=least_width,
                )
                for images, caption in ((shown.x_t, of_one[index]), (shown.x_0_hat, X_0))
            )
            rows.append(stacked([text_line(shown.label), side_by_side([left, right])], gap=0))
        yield framed(stacked(rows))


def _block(images: Tensor) -> Tensor:
    """(N, C, H, W) as rows and columns, (R, N / R, C, H, W), no more than twice as wide as high; gaps are white."""
    N = len(images)
    columns = min(N, max(4, round((2 * N) ** 0.5)))
    missing = -N % columns
    white = torch.full((missing, *images.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images, white]).reshape(-1, columns, *images.shape[1:])


def check_interpolation(config: SamplingConfig, to_seed: int) -> None:
    """Refuse a sampler with noise on the way, and a seed that is none."""
    check_seed(to_seed, "to_seed")
    if config.sampler == "ddpm" or config.eta:
        raise InputError("interpolation needs a sampler without noise on the way: ddim, dpmpp or heun with eta 0")


def interpolate(
    trained: TrainedModel,
    config: SamplingConfig,
    to_seed: int,
    num_images: int,
    num_between: int,
    on_step: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Samples between image i of one seed and image i of another, along the great circle between their noises.

    Slerp (Song et al. 2020, arXiv:2010.02502, appendix D.5): x_T = (sin((1 - a) w) x + sin(a w) y) / sin(w), w the
    angle between x and y, a from 0 to 1.

    Args:
        config: of a sampler without noise on the way; its seed is the first.
        to_seed: the second.
        num_between: how many values of a, the two ends included; at least 2.
    Returns:
        (num_images, num_between, C, H, W) uint8.
    Raises:
        InputError: what `check_interpolation` refuses, or a number below 2.
    """
    check_interpolation(config, to_seed)
    require(num_between >= 2, f"an interpolation needs 2 images, its ends, or more, not {num_between}")
    sampler = build_sampler(trained, config)
    device = next(trained.model.parameters()).device

    def end(seed: int) -> Tensor:
        return ImageNoise(seed, range(num_images), trained.image_shape, device)(-1).flatten(1)

    x, y = end(config.seed), end(to_seed)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()[:, None, None]  # (N, 1, 1)
    a = torch.linspace(0, 1, num_between, device=device)[None, :, None]
    same = angle < 1e-4  # two seeds that are one
    sine = torch.where(same, torch.ones_like(angle), angle.sin())
    weight_x = torch.where(same, 1 - a, ((1 - a) * angle).sin() / sine)
    weight_y = torch.where(same, a, (a * angle).sin() / sine)
    x_T = (weight_x * x[:, None] + weight_y * y[:, None]).view(-1, *trained.image_shape)

    def no_noise(step: int) -> Tensor:
        raise AssertionError("a deterministic sampler asked for noise")

    images = []
    classes = class_labels(trained, config, range(num_images))
    of_each = None if classes is None else torch.split(classes.repeat_interleave(num_between), config.batch_size)
    told = of_each or [None] * len(x_T)
    for part, asked in zip(torch.split(x_T, config.batch_size), told, strict=False):
        steps = sampler.steps(part, no_noise, asked)
        for step in steps:
            x_0 = step.x_s
            on_step(len(part))
        images.append(to_uint8(x_0).cpu())
    return torch.cat(images).reshape(num_images, num_between, *trained.image_shape)


def reconstruct(
    trained: TrainedModel,
    config: SamplingConfig,
    x_0: Tensor,
    t: int,
    on_step: Callable[[int], object] = lambda r: None,
) -> tuple[Tensor, Tensor]:
    """Noise real images to t by the closed form, and denoise them again from there.

    The rest of the chain, timesteps 1 .. t, is a chain of its own; of the sampler's steps it gets its share.

    Args:
        x_0: (N, C, H, W) float32, in [-1, 1].
        t: a figure's timestep, from 2 to T.
        config: of a network that is told classes: those given, in turn; else it is told none.
    Returns:
        x_t and the images that came out, both (N, C, H, W) floating.
    Raises:
        InputError: t out of range.
    """
    T = trained.schedule.num_timesteps
    require(2 <= t <= T, f"timesteps must be from 2 to the {T} of {trained.name}, not {t}")
    check_told(config)
    whole = build_sampler(trained, config)
    rest = dataclasses.replace(trained, schedule=NoiseSchedule(trained.schedule.beta[:t]))
    num_steps = max(1, min(round(whole.num_steps * t / T), t // (1 + config.singlestep)))
    # What was resolved stays as it is for the whole chain, such as the variance that goes with all T steps.
    sampler = build_sampler(rest, dataclasses.replace(whole.config, num_steps=num_steps))
    device = next(trained.model.parameters()).device
    found = []
    for first in range(0, len(x_0), config.batch_size):
        rows = range(first, min(first + config.batch_size, len(x_0)))
        noise = ImageNoise(config.seed, rows, trained.image_shape, device)
        clean = x_0[first : rows.stop].to(device)
        x_t = x_s = q_sample(rest.schedule, clean, torch.full((len(rows),), t - 1, device=device), noise(-1))
        asked = class_labels(trained, config, rows) if config.class_ else None
        for step in sampler.steps(x_t, noise, asked):
            x_s = step.x_s
            on_step(len(rows))
        found.append((x_t.cpu(), x_s.cpu()))
    noised, restored = (torch.cat(parts) for parts in zip(*found, strict=True))
    return noised, restored


def check_told(config: SamplingConfig) -> None:
    """Refuse guidance towards classes that nobody has named."""
    if config.guidance and not config.class_ and config.guide is None:
        raise InputError("guidance needs --class here, for nobody says what the images are")


def show_reverse(
    out: Path,
    sources: Sequence[str],
    config: SamplingConfig,
    *,
    num_images: int = 4,
    columns: int | None = None,
    look: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
) -> str:
    """Save how images of a seed come out of noise, for one generator or several.

    Args:
        out: ends in .png for a picture, .gif or .mp4 for a film.
        sources, weights, checkpoint, device: see `trained.load`.
        config: sampler, seed and so on; image i of a seed is that of `ddpm sample`.
        num_images: from 1 to 64, of each generator.
        columns: of a picture.
    Returns:
        A line that says what was made.
    Raises:
        InputError: a source, setting or path that cannot be used; told before any work.
    """
    moving = check_kind(out, look, columns)
    require(1 <= num_images <= 64, f"num_images must be from 1 to 64 in one picture, not {num_images}")
    require(bool(sources), "name at least one model")
    generators = [load(source, weights=weights, checkpoint=checkpoint, device=device) for source in sources]
    steps = [build_sampler(trained, config).num_steps for trained in generators]
    count = look.num_frames(max(steps) + 1) if moving else num_columns(columns, max(steps) + 1)
    show_deferred_warnings()
    with progress("sampling", num_images * sum(steps), "steps") as advance:
        shown = [record_trajectory(trained, config, num_images, count, advance) for trained in generators]
    if moving:
        with progress("drawing", count, "frames") as advance:
            save_film(out, counted(reverse_frames(shown, look.scale), advance), look)
    else:
        save_png(out, reverse_picture(shown, look.scale))
    return f"{out}: {num_images} images in {count} states, {'; '.join(t.label for t in shown)}; seed {config.seed}"


def show_interpolation(
    out: Path,
    source: str,
    config: SamplingConfig,
    to_seed: int,
    *,
    num_images: int = 4,
    columns: int | None = None,
    look: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
) -> str:
    """Save what lies between the images of two seeds, a row for each or a film; see `interpolate`, `show_reverse`."""
    moving = check_kind(out, look, columns)
    require(1 <= num_images <= 64, f"num_images must be from 1 to 64 in one picture, not {num_images}")
    count = look.num_frames(10_001) if moving else num_columns(columns, 101)
    check_interpolation(config, to_seed)
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    sampler = build_sampler(trained, config)
    show_deferred_warnings()
    with progress("sampling", num_images * count * sampler.num_steps, "steps") as advance:
        images = interpolate(trained, config, to_seed, num_images, count, advance)
    scale = look.scale or visible_scale(images.shape[-1])
    places = [i / (count - 1) for i in range(count)]
    title = f"{describe_generator(trained, sampler)}; seed {config.seed} to seed {to_seed}"
    if moving:
        frames = (
            framed(image_table(_block(images[:, i]), scale=scale, title=title, captions=[("", [f"{place:.2f}"])]))
            for i, place in enumerate(places)
        )
        save_film(out, frames, look)
    else:
        captions = [("", [f"{place:.2g}" for place in places])]
        save_png(out, framed(image_table(images, scale=scale, title=title, captions=captions)))
    return f"{out}: {num_images} images from seed {config.seed} to seed {to_seed}, {count} each"


def show_reconstruction(
    out: Path,
    source: str,
    config: SamplingConfig,
    timesteps: Sequence[int],
    *,
    dataset: str | None = None,
    split: str | None = None,
    num_images: int = 4,
    look: PictureConfig = PictureConfig(),  # noqa: B008 (frozen)
    weights: Weights = "ema",
    checkpoint: int | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
) -> str:
    """Save real images, noised to some timesteps, and denoised again from each.

    Args:
        timesteps: figures' timesteps, from 2 to T; none: ten even ones.
        dataset: whose images; None: those the network was trained on. The rest: see `show_reverse`.
    Returns:
        A line that says what was made and how much survived.
    """
    check_writable(out, PICTURE_ENDINGS)
    trained = load(source, weights=weights, checkpoint=checkpoint, device=device)
    T, shape = trained.schedule.num_timesteps, trained.image_shape
    chosen = sorted(set(timesteps)) or sorted({max(2, round(T * i / 10)) for i in range(1, 11)})
    for t in chosen:
        require(2 <= t <= T, f"timesteps must be from 2 to the {T} of {source}, not {t}")
    sampler, dataset = build_sampler(trained, config), dataset or trained.config.data.dataset
    check_told(config)
    if dataset == UNKNOWN:
        raise InputError(f"{source} was imported and does not say what it was trained on; give --dataset")
    size = None if dataset in DATASETS else shape[-1]
    x_0 = chosen_images(dataset, split, num_images, config.seed, data_dir, size)
    if tuple(x_0.shape[1:]) != shape:
        raise InputError(f"images of {dataset} are {tuple(x_0.shape[1:])}, {source} makes {shape}")
    show_deferred_warnings()
    steps = sum(max(1, round(sampler.num_steps * t / T)) for t in chosen)
    with progress("denoising", num_images * steps, "steps") as advance:
        pairs = [reconstruct(trained, config, x_0, t, advance) for t in chosen]
    original = torch.stack([x_0, x_0], dim=1).flatten(0, 1)  # (2 N, C, H, W)
    columns = [original] + [torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs]
    errors = [float((came - x_0).square().mean()) ** 0.5 / 2 for _, came in pairs]  # in [0, 1]: pixels span 2
    captions = [
        ("t", ["0", *map(str, chosen)]),
        ("SNR", [short_number(snr_at(trained.schedule, t)) for t in (0, *chosen)]),
        ("RMSE", ["0", *(f"{error:.2g}" for error in errors)]),
    ]
    table = image_table(
        to_uint8(torch.stack(columns, dim=1)),
        scale=look.scale or visible_scale(shape[-1]),
        title=describe_generator(trained, sampler),
        row_labels=["noised", "denoised"] * num_images,
        captions=captions,
    )
    save_png(out, framed(table))
    return f"{out}: RMSE of pixels (0 .. 1) " + ", ".join(
        f"{e:.3f} from t = {t}" for e, t in zip(errors, chosen, strict=True)
    )

"""Pictures in a row as a film: GIF, which everything shows, or MP4, which is smaller and has all colours."""

import itertools
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np

from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.files import atomic_file
from ddpm_lab.pictures.drawing import PAPER, Picture
from ddpm_lab.pictures.picture_settings import PictureConfig
from ddpm_lab.sampling.image_files import check_writable

FILM_ENDINGS = (".gif", ".mp4")
PICTURE_ENDINGS = (".png",)


def check_kind(path: Path, look: PictureConfig, columns: int | None) -> bool:
    """Whether a path is of a film; refuses settings that a picture, or a film, does not have.

    Raises:
        InputError: such a setting, or what `images.check_writable` refuses; or there is no program that encodes MP4.
    """
    check_writable(path, PICTURE_ENDINGS + FILM_ENDINGS)
    moving = path.suffix.lower() in FILM_ENDINGS
    usual = PictureConfig()
    given = ["columns"] if columns is not None else []
    if not moving:
        given = [name for name in ("frames", "fps", "hold") if getattr(look, name) != getattr(usual, name)]
    if given:
        kind, other = ("film", "picture") if moving else ("picture", "film")
        flags = ", ".join(f"--{name}" for name in given)
        raise InputError(f"{flags}: for a {other}, and {path} is a {kind}")
    if path.suffix.lower() == ".mp4":
        encoder_path()
    return moving


def save_film(path: Path, frames: Iterable[Picture], film: PictureConfig) -> None:
    """Write a film whose last frame stays a while; the old file stays until the new one is whole.

    A GIF keeps the last frame by its duration (durations are hundredths of a second), and repeats for ever; an MP4
    repeats it. MP4 is H.264 with yuv420p, which browsers play; odd sizes get a white line, for it knows even ones only.

    Args:
        path: ends in .gif or .mp4.
        frames: (height, width, 3) uint8, all of one size, one at least; memory holds one at a time for MP4.
        film: frames per second and seconds to hold; it does not count the frames.
    Raises:
        InputError: another ending, or no frame.
        ValueError: frames of two sizes.
        RunError: the encoder failed; it says why (a full disk, mostly).
    """
    if path.suffix.lower() not in FILM_ENDINGS:
        raise InputError(f"{path} must end in {' or '.join(FILM_ENDINGS)}")
    with atomic_file(path) as temporary:
        if path.suffix.lower() == ".gif":
            _save_gif(temporary, _alike(frames), film)
        else:
            _save_mp4(temporary, _held(_alike(frames), round(film.hold * film.fps)), film.fps)


def _alike(frames: Iterable[Picture]) -> Iterator[Picture]:
    """The frames, at least one, and all of the first one's size."""
    shape = None
    for frame in frames:
        if frame.shape != (shape or frame.shape):
            raise ValueError(f"a frame is {frame.shape}, the first was {shape}")
        shape = frame.shape
        yield frame
    if shape is None:
        raise InputError("a film needs at least one frame")


def _held(frames: Iterable[Picture], times: int) -> Iterator[Picture]:
    """The frames, the last of them `times` times more."""
    for frame in frames:
        yield frame
    yield from itertools.repeat(frame, times)


def _save_gif(path: Path, frames: Iterable[Picture], film: PictureConfig) -> None:
    from PIL import Image

    # One palette for all, so that what does not move does not flicker; no dithering, which would look like noise.
    pictures = list(frames)
    seen = np.concatenate([picture[::2] for picture in pictures[:: max(1, len(pictures) // 16)]])
    palette = Image.fromarray(seen).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    for exact in (PAPER, (0, 0, 0)):  # the nearest is a little off, and white would show on a white page
        colours[np.abs(colours - exact).sum(1).argmin()] = exact
    indexed = [Image.fromarray(_nearest(picture, colours)) for picture in pictures]
    for image in indexed:
        image.putpalette(colours.ravel().tolist())
    duration = round(100 / film.fps) * 10
    indexed[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=[duration] * (len(indexed) - 1) + [duration + round(film.hold * 100) * 10],
        loop=0,
        optimize=False,
    )


def _nearest(picture: Picture, colours: np.ndarray) -> np.ndarray:
    """The index of each pixel's nearest colour, (height, width) uint8: exactly, which Pillow's own search is not."""
    packed = picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    present, where = np.unique(packed, return_inverse=True)
    rgb = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
    nearest = [
        np.square(part[:, None] - colours[None]).sum(2).argmin(1) for part in np.array_split(rgb, -(-len(rgb) // 4096))
    ]
    index: np.ndarray = np.concatenate(nearest).astype(np.uint8)[where].reshape(packed.shape)
    return index


def encoder_path() -> str:
    """The program that encodes MP4.

    Raises:
        InputError: there is none.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        return str(get_ffmpeg_exe())
    except RuntimeError as error:
        raise InputError("an .mp4 needs ffmpeg, which is not installed here; name a .gif, or install it") from error


def _save_mp4(path: Path, frames: Iterable[Picture], frames_per_second: int) -> None:
    encoder = None
    try:
        for frame in frames:
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), constant_values=255)
            if encoder is None:
                raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(frames_per_second)]
                raw += ["-s", f"{even.shape[1]}x{even.shape[0]}", "-i", "-"]
                coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"]
                command = [encoder_path(), "-y", "-loglevel", "error", *raw, *coded, "-f", "mp4", str(path)]
                encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            cast(IO[bytes], encoder.stdin).write(even.tobytes())
        errors = cast(subprocess.Popen[bytes], encoder).communicate()[1]
    except BrokenPipeError:  # it has died, and says why
        errors = cast(subprocess.Popen[bytes], encoder).communicate()[1]
    except BaseException:
        if encoder is not None:
            encoder.kill()
            encoder.communicate()
        raise
    if encoder is not None and encoder.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise RunError(
            f"the film cannot be encoded: {lines[-1] if lines else f'ffmpeg ended with {encoder.returncode}'}"
        )

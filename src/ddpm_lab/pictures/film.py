"""Write pictures as the frames of a film: GIF, which every viewer shows, or MP4, which is smaller and has all colours.

A film is written frame by frame under a temporary name; an existing file stays until the new one is complete.
"""

import itertools
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ddpm_lab.core.errors import InputError, RunError, require
from ddpm_lab.core.files import atomic_file
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.pictures.drawing import PAPER, Picture
from ddpm_lab.pictures.picture_settings import FILM_ENDINGS, PICTURE_ENDINGS, PictureConfig, is_film
from ddpm_lab.sampling.image_files import check_writable, save_png


def check_output(out: Path, settings: PictureConfig) -> None:
    """Refuse an output file, or settings that its kind of file does not have, before any work is done.

    Raises:
        InputError: the file cannot be written (see `check_writable`); settings of a film are given for a picture, or
            the reverse; an .mp4 is asked for and no ffmpeg is installed.
    """
    check_writable(out, PICTURE_ENDINGS + FILM_ENDINGS)
    kind, unused = ("film", ["columns"]) if is_film(out) else ("picture", ["frames", "fps", "hold"])
    given = [f"--{name}" for name in unused if getattr(settings, name) != getattr(PictureConfig(), name)]
    require(not given, f"{', '.join(given)} cannot be used with {out}, which is a {kind}")
    if out.suffix.lower() == ".mp4":
        encoder_path()


def save_drawing(out: Path, drawing: Picture | Iterable[Picture], settings: PictureConfig, num_frames: int) -> None:
    """Save a picture as PNG, or the frames of a film with a progress bar."""
    if isinstance(drawing, np.ndarray):
        save_png(out, drawing)
    else:
        with progress("drawing", num_frames, "frames") as advance:
            save_film(out, counted(drawing, advance), settings)


def save_film(path: Path, frames: Iterable[Picture], settings: PictureConfig) -> None:
    """Write a film that holds its last frame.

    A GIF gives the last frame a longer duration (durations are hundredths of a second) and repeats for ever; an MP4
    repeats the frame. MP4 is H.264 with yuv420p, which browsers play; it needs even sizes, so an odd size gets a white
    line at the right or the bottom.

    Args:
        path: ends in .gif or .mp4.
        frames: (height, width, 3) uint8, at least one, all of one size; for MP4 memory holds one at a time.
        settings: frames per second, and seconds to hold the last frame; the number of frames in it is not used.
    Raises:
        InputError: the ending is another one, or there is no frame.
        ValueError: the frames differ in size.
        RunError: the encoder failed; the message is the encoder's (usually a full disk).
    """
    require(is_film(path), f"{path} must end in {' or '.join(FILM_ENDINGS)}")
    save = _save_gif if path.suffix.lower() == ".gif" else _save_mp4
    with atomic_file(path) as temporary:
        save(temporary, _checked(frames), settings)


def _checked(frames: Iterable[Picture]) -> Iterator[Picture]:
    """The frames; raises where there is none, or where one differs in size from the first."""
    shape = None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(f"all frames must have the shape of the first, {shape}, not {frame.shape}")
        yield frame
    require(shape is not None, "a film needs at least one frame")


def _save_gif(path: Path, frames: Iterator[Picture], settings: PictureConfig) -> None:
    from PIL import Image

    # One palette for all frames, so that still parts do not flicker; no dithering, which would look like noise.
    pictures = list(frames)
    sampled = np.concatenate([picture[::2] for picture in pictures[:: max(1, len(pictures) // 16)]])
    palette = Image.fromarray(sampled).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    for exact in (PAPER, (0, 0, 0)):  # the palette's nearest is slightly off, which would show on a white page
        colours[np.abs(colours - exact).sum(1).argmin()] = exact
    first, *others = [Image.fromarray(_nearest(picture, colours)) for picture in pictures]
    for image in (first, *others):
        image.putpalette(colours.ravel().tolist())
    duration = round(100 / settings.fps) * 10  # milliseconds
    durations = [duration] * len(others) + [duration + round(settings.hold * 100) * 10]
    first.save(
        path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False
    )  # fmt: skip


def _nearest(picture: Picture, colours: np.ndarray) -> np.ndarray:
    """The index of the nearest colour for each pixel, (height, width) uint8; Pillow's own search is inexact."""
    packed = picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    present, where = np.unique(packed, return_inverse=True)
    rgb = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
    distances = np.square(colours).sum(1) - 2 * rgb @ colours.T  # squared, less |rgb|^2, which is the same for all
    nearest: np.ndarray = distances.argmin(1).astype(np.uint8)[where].reshape(packed.shape)
    return nearest


def encoder_path() -> str:
    """The path of ffmpeg, which encodes MP4.

    Raises:
        InputError: it is not installed.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        return str(get_ffmpeg_exe())
    except RuntimeError as error:
        raise InputError("an .mp4 needs ffmpeg, which is not installed; install it, or name a .gif") from error


def _save_mp4(path: Path, frames: Iterator[Picture], settings: PictureConfig) -> None:
    first = next(frames)
    size, num_held = f"{first.shape[1]}x{first.shape[0]}", round(settings.hold * settings.fps)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(settings.fps), "-s", size, "-i", "-"]
    even = f"pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white,tpad=stop_mode=clone:stop={num_held}"
    coded = ["-vf", even, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"]
    command = [encoder_path(), "-y", "-loglevel", "error", *raw, *coded, "-f", "mp4", str(path)]
    encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert encoder.stdin is not None
    try:
        for frame in itertools.chain([first], frames):
            encoder.stdin.write(frame.tobytes())
    except BrokenPipeError:  # the encoder has ended; its error is read below
        pass
    except BaseException:
        encoder.kill()
        raise
    finally:
        errors = encoder.communicate()[1]
    if encoder.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        message = lines[-1] if lines else f"ffmpeg ended with exit code {encoder.returncode}"
        raise RunError(f"the film cannot be encoded: {message}")

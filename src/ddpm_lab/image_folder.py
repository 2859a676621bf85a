"""Folders of image files, read by name and never trusted: any fault is told with the file it is in."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ddpm_lab.progress import Advance, counted, progress
from ddpm_lab.settings import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFolder:
    """Image files of one size.

    Attributes:
        paths: in the order of their names.
        mode: what they are read as, 'L' or 'RGB'.
        image_size: side in pixels.
        resized: whether each is cropped to its centre square and scaled to that side.
    """

    paths: tuple[Path, ...]
    mode: str
    image_size: int
    resized: bool

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Iterable[int], advance: Advance = lambda amount: None) -> np.ndarray:
        """Decode some of the images, (N, C, H, W) uint8.

        Args:
            advance: told of each.
        Raises:
            InputError: one cannot be read.
        """
        size = self.image_size if self.resized else None
        chosen = [self.paths[i] for i in indices]
        stacked = np.stack(_read_pictures(chosen, lambda opened: np.asarray(_fitted(opened, self.mode, size)), advance))
        return stacked[:, None] if self.mode == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def open_folder(folder: Path, image_size: int | None, option: str, channels: int | None = None) -> ImageFolder:
    """List the images of a folder, searched to any depth, and read their headers.

    Args:
        image_size: crop to the centre square and scale to this side in pixels; None: they all have one size already.
        option: the flag that sets it, for messages.
        channels: 1 or 3, what to read them as; None: grey where all files are, else colour.
    Raises:
        InputError: no images, unreadable ones, or several sizes and no image_size.
    """
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_ENDINGS and not _hidden(path.relative_to(folder)) and path.is_file()
    )
    if not paths:
        raise InputError(f"folder {folder} holds no images ({' '.join(IMAGE_ENDINGS)})")
    with progress(f"looking through {folder}", len(paths), "files") as advance:
        headers = _read_pictures(paths, lambda opened: (_mode(opened), opened.size), advance)
    first = headers[0][1]
    for path, (_, size) in zip(paths, headers, strict=True):
        if image_size is None and (size[0] != size[1] or size != first):
            raise InputError(
                f"image {path} is {size[0]} x {size[1]}, the first one is {first[0]} x {first[1]}; "
                f"give {option} to crop and scale all to one square size"
            )
    mode = "L" if channels == 1 or (channels is None and all(mode == "L" for mode, _ in headers)) else "RGB"
    return ImageFolder(tuple(paths), mode, image_size or first[0], image_size is not None)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def unreadable(folder: Path) -> list[Path]:
    """Images of a folder that cannot be decoded."""
    bad = []
    for path in sorted(folder.glob("[!.]*.png")):
        try:
            _read_picture(path, lambda opened: opened.load())
        except InputError:
            bad.append(path)
    return bad


def _read_pictures(paths: Iterable[Path], read: Callable[["Image.Image"], T], advance: Advance) -> list[T]:
    """What is wanted of each, several at a time: decoding lets go of the interpreter lock."""
    from PIL import Image

    Image.init()  # before there are threads, for it fills tables
    with ThreadPoolExecutor(os.cpu_count(), "decoding") as pool:
        return list(counted(pool.map(lambda path: _read_picture(path, read), paths), advance))


def _read_picture(path: Path, read: Callable[["Image.Image"], T]) -> T:
    """Open an image and read from it what is wanted; whatever is wrong with the file is told by its name."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise InputError(f"image {path} has pixels of mode {opened.mode}; 8 bits a channel are needed")
            return read(opened)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {' '.join(str(error).split())}") from error


def _mode(picture: "Image.Image") -> str:
    """'L' for grey, 'RGB' for all else."""
    return "L" if picture.mode in ("1", "L", "LA") else "RGB"


def _upright(picture: "Image.Image") -> "Image.Image":
    """Turned as its camera meant it; as it lies where what it says of itself is damaged."""
    from PIL import ImageOps

    picture.load()  # outside: a second try to read damaged pixels would give black ones and no error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever damaged metadata makes Pillow raise
        return picture


def _fitted(picture: "Image.Image", mode: str, image_size: int | None) -> "Image.Image":
    """Pixels of the mode wanted, grey only where planes are equal; the centre square, scaled, where a size is asked."""
    from PIL import Image

    upright = _upright(picture)
    converted = upright.convert(_mode(upright))
    if mode == "L" and converted.mode == "RGB":
        red, green, blue = converted.split()
        if not red.tobytes() == green.tobytes() == blue.tobytes():
            raise ValueError("it is in colour, and grey images are asked for")
        converted = red
    converted = converted.convert(mode)
    if image_size is None:
        return converted
    side = min(converted.size)
    left, top = (converted.width - side) // 2, (converted.height - side) // 2
    square = converted.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.LANCZOS)

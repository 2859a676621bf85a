"""Folders of image files, identified by content; every error names the file."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import printable
from ddpm_lab.core.messages import listed
from ddpm_lab.core.progress import Advance, counted, progress
from ddpm_lab.data.image_formats import IMAGE_ENDINGS, NotAnImage, as_seen, formats, open_picture

if TYPE_CHECKING:
    from PIL import Image

SAMPLING = "sampling.json"  # the settings of the images in a folder of samples
LARGE_PICTURE = 2**24  # pixels; pictures that are larger are decoded one at a time, to bound the memory
COLOUR_CHUNK = 256  # images decoded at a time in search of one in colour

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFolder:
    """Image files of one size.

    Attributes:
        folder: the folder itself.
        paths: the files in it, in the order of their names.
        mode: what they are decoded to, 'L' or 'RGB'.
        image_size: side in pixels.
        resized: whether each is cropped to its centre square and scaled to that side.
    """

    folder: Path
    paths: tuple[Path, ...]
    mode: str
    image_size: int
    resized: bool

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        return (1 if self.mode == "L" else 3, self.image_size, self.image_size)

    @cached_property
    def classes(self) -> "Classes":
        """The classes, where each image lies in the folder of its class, at any depth below it.

        Classes are the folders at the first level, sorted by name, as torchvision's ImageFolder has them.

        Raises:
            InputError: images beside the folders, a folder without images, or fewer than two folders.
        """
        depth = len(self.folder.parts)
        at_top = [path.name for path in self.paths if len(path.parts) == depth + 1]
        if at_top:
            raise InputError(
                f"{at_top[0]} lies in {self.folder} itself; with classes, each image lies in the folder of its class"
            )
        of_image = [path.parts[depth] for path in self.paths]
        names = sorted(set(of_image))
        folders = {path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
        empty = sorted(folders - set(names))
        if empty:
            raise InputError(f"class folder {self.folder / empty[0]} holds no images; add some, or remove the folder")
        require(len(names) > 1, f"all images of {self.folder} lie in one folder, {names[0]}; classes need two or more")
        number = {name: index for index, name in enumerate(names)}
        return Classes(tuple(map(printable, names)), np.array([number[name] for name in of_image]))

    def read(self, indices: Iterable[int], advance: Advance = lambda amount: None) -> np.ndarray:
        """Decode some of the images, (N, C, H, W) uint8.

        Args:
            advance: called after each image.
        Raises:
            InputError: an image cannot be read.
        """
        size = self.image_size if self.resized else None
        paths = [self.paths[i] for i in indices]
        decoded = _read_pictures(paths, lambda picture: np.asarray(_fitted(picture, self.mode, size)), advance)
        _raise_errors([error for error in decoded if isinstance(error, InputError)], len(paths))
        stacked = np.stack([pixels for pixels in decoded if not isinstance(pixels, InputError)])
        return stacked[:, None] if self.mode == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Classes:
    """The classes of a folder of images.

    Attributes:
        names: of the classes.
        labels: (N,) int64, the class of each image, as an index of `names`.
    """

    names: tuple[str, ...]
    labels: np.ndarray


def open_folder(folder: Path, image_size: int | None, option: str, channels: int | None = None) -> ImageFolder:
    """List the images of a folder, searched to any depth, and read their headers.

    Links are followed; hidden files and folders are skipped. An image is known by its content: a file of a named format
    is read whatever its ending; another file is skipped with a warning, unless it has the ending of an image.

    Args:
        image_size: crop to the centre square and scale to this side in pixels; None: all images have one size already.
        option: the flag that sets image_size, for messages.
        channels: 1 or 3, the channels to decode to; None: 1 if all images are grey, else 3.
    Raises:
        InputError: no images, unreadable images, or images of several sizes and no image_size; image_size not in
            1 .. 4096.
    """
    require(image_size is None or 1 <= image_size <= 4096, f"{option} must be from 1 to 4096, not {image_size}")
    files = sorted(files_below(folder))
    headers: dict[Path, tuple[str, tuple[int, int]]] = {}
    skipped, errors = [], []
    with progress(f"reading headers in {folder}", len(files), "files") as advance:
        found = _read_pictures(files, lambda picture: (picture.mode, picture.size), advance)
    for path, header in zip(files, found, strict=True):
        if not isinstance(header, InputError):
            headers[path] = header
        elif not isinstance(header, NotAnImage) or path.suffix.lower() in IMAGE_ENDINGS:
            errors.append(header)
        elif path.name != SAMPLING:  # which `ddpm sample` writes beside its images
            skipped.append(str(path.relative_to(folder)))
    _raise_errors(errors, len(files))
    if not headers:
        raise InputError(f"folder {folder} holds no images ({', '.join(formats())})")
    if skipped:
        warnings.warn(f"skipped in {folder}, because they are not images: {listed(skipped)}", stacklevel=2)
    width, height = next(iter(headers.values()))[1]
    for path, (_, size) in headers.items():
        if image_size is None and size != (width, width):
            raise InputError(
                f"image {path} is {size[0]} x {size[1]}, the first one is {width} x {height}; "
                f"give {option} to crop and scale all to one square size"
            )
    grey = channels == 1 or (channels is None and not _any_in_colour(headers))
    return ImageFolder(folder, tuple(headers), "L" if grey else "RGB", image_size or width, image_size is not None)


def files_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below a folder that are not hidden; links are followed, except to a folder above."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as listed:
        entries = [entry for entry in listed if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir():
            yield from files_below(folder / entry.name, (*above, identity))
        elif entry.is_file():
            yield folder / entry.name


def _any_in_colour(headers: dict[Path, tuple[str, tuple[int, int]]]) -> bool:
    """Whether one of the images is in colour; some formats store grey pixels as three channels or a palette."""
    undecided = [path for path, (mode, _) in headers.items() if mode not in ("1", "L", "LA") and mode[0] != "I"]
    for first in range(0, len(undecided), COLOUR_CHUNK):
        modes = _read_pictures(undecided[first : first + COLOUR_CHUNK], lambda picture: as_seen(picture).mode)
        if "RGB" in modes:  # an unreadable image raises when it is read in earnest
            return True
    return False


def _raise_errors(errors: Sequence[InputError], count: int) -> None:
    """Raise one error for all unreadable files.

    Args:
        count: how many files were read.
    Raises:
        InputError: there are some.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError(f"{len(errors)} of {count} files cannot be used: {listed(list(map(str, errors)), '; ')}")


def unreadable(folder: Path) -> list[Path]:
    """The PNG files of a folder that cannot be decoded."""
    paths = sorted(folder.glob("[!.]*.png"))
    decoded = _read_pictures(paths, lambda picture: picture.load())
    return [path for path, result in zip(paths, decoded, strict=True) if isinstance(result, InputError)]


def _read_pictures(
    paths: Sequence[Path], read: Callable[["Image.Image"], T], advance: Advance = lambda amount: None
) -> list[T | InputError]:
    """The result of `read`, or the error, for each file; in threads, for decoding releases the interpreter lock."""

    def read_one(path: Path) -> T | InputError:
        try:
            with open_picture(path, f"image {path}") as picture:
                if picture.width * picture.height > LARGE_PICTURE:
                    return large_pool.submit(read, picture).result()
                return read(picture)
        except InputError as error:
            return error

    formats()
    # One thread for all large pictures: each thread would keep memory that it has freed.
    with ThreadPoolExecutor(1, "large") as large_pool, ThreadPoolExecutor(os.cpu_count(), "decoding") as pool:
        return list(counted(pool.map(read_one, paths), advance))


def _fitted(picture: "Image.Image", mode: str, image_size: int | None) -> "Image.Image":
    """The picture in a mode; with image_size, its centre square scaled to that side.

    Raises:
        ValueError: a picture in colour, and mode 'L'.
    """
    from PIL import Image

    seen = as_seen(picture)
    if mode == "L" and seen.mode == "RGB":
        raise ValueError("it is in colour, and grey images are required")
    converted = seen.convert(mode)
    if image_size is None:
        return converted
    side = min(converted.size)
    left, top = (converted.width - side) // 2, (converted.height - side) // 2
    square = converted.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.LANCZOS)

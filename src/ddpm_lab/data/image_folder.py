"""Folders of image files, read by content and never trusted: any fault is told with the file it is in."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import Advance, counted, progress
from ddpm_lab.data.image_formats import IMAGE_ENDINGS, NoPicture, as_seen, formats, opened_picture

if TYPE_CHECKING:
    from PIL import Image

SAMPLING = "sampling.json"  # says in a folder of samples of what they are
TOLD = 5  # files of a kind that a message names
LOOKED_AT = 256  # pictures decoded at a time to find a coloured one

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
        found = _read_pictures(chosen, lambda opened: np.asarray(_fitted(opened, self.mode, size)), advance)
        _refuse([fault for fault in found if isinstance(fault, InputError)], len(chosen))
        stacked = np.stack([pixels for pixels in found if not isinstance(pixels, InputError)])
        return stacked[:, None] if self.mode == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def open_folder(folder: Path, image_size: int | None, option: str, channels: int | None = None) -> ImageFolder:
    """List the images of a folder, searched to any depth, and read their headers.

    Links are followed, hidden files and folders left out. A picture is known by its content: one of the named formats
    is read whatever its ending; a file that is none, and is not called like one, is passed over with a warning.

    Args:
        image_size: crop to the centre square and scale to this side in pixels; None: they all have one size already.
        option: the flag that sets it, for messages.
        channels: 1 or 3, what to read them as; None: grey where all files are, else colour.
    Raises:
        InputError: no images, unreadable ones, or several sizes and no image_size.
    """
    files = sorted(files_below(folder))
    headers: dict[Path, tuple[str, tuple[int, int]]] = {}
    passed, faults = [], []
    with progress(f"looking through {folder}", len(files), "files") as advance:
        for path, found in zip(files, _read_pictures(files, _header, advance), strict=True):
            if not isinstance(found, InputError):
                headers[path] = found
            elif isinstance(found, NoPicture) and path.suffix.lower() not in IMAGE_ENDINGS:
                passed += [path] if path.name != SAMPLING else []  # which `ddpm sample` writes beside its images
            else:
                faults.append(found)
    _refuse(faults, len(files))
    if not headers:
        raise InputError(f"folder {folder} holds no images ({', '.join(formats())})")
    if passed:
        named = ", ".join(str(path.relative_to(folder)) for path in passed[:TOLD])
        more = f" and {len(passed) - TOLD} more" if len(passed) > TOLD else ""
        warnings.warn(f"passed over in {folder}, for they are no pictures: {named}{more}", stacklevel=2)
    paths = tuple(headers)
    first = headers[paths[0]][1]
    for path, (_, size) in headers.items():
        if image_size is None and (size[0] != size[1] or size != first):
            raise InputError(
                f"image {path} is {size[0]} x {size[1]}, the first one is {first[0]} x {first[1]}; "
                f"give {option} to crop and scale all to one square size"
            )
    grey = channels == 1 or (channels is None and not _any_in_colour(headers))
    return ImageFolder(paths, "L" if grey else "RGB", image_size or first[0], image_size is not None)


def files_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below a folder that are not hidden, links followed but not in a circle."""
    status = folder.stat()
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    with os.scandir(folder) as listed:
        entries = [entry for entry in listed if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir():
            yield from files_below(folder / entry.name, (*above, own))
        elif entry.is_file():
            yield folder / entry.name


def _header(picture: "Image.Image") -> tuple[str, tuple[int, int]]:
    return picture.mode, picture.size


def _any_in_colour(headers: dict[Path, tuple[str, tuple[int, int]]]) -> bool:
    """Whether one of the pictures is in colour; a format may well hold grey pixels as three planes or a palette."""
    undecided = [path for path, (mode, _) in headers.items() if mode not in ("1", "L", "LA") and mode[0] != "I"]
    for first in range(0, len(undecided), LOOKED_AT):
        modes = _read_pictures(undecided[first : first + LOOKED_AT], lambda opened: as_seen(opened).mode)
        if "RGB" in modes:  # what cannot be read is told where it is read
            return True
    return False


def _refuse(faults: Sequence[InputError], count: int) -> None:
    """Raise for all bad files at once.

    Raises:
        InputError: there are some.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        named = "; ".join(str(fault) for fault in faults[:TOLD])
        more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        raise InputError(f"{len(faults)} of {count} files cannot be used: {named}{more}")


def unreadable(folder: Path) -> list[Path]:
    """Images of a folder that cannot be decoded."""
    paths = sorted(folder.glob("[!.]*.png"))
    found = _read_pictures(paths, lambda opened: opened.load())
    return [path for path, loaded in zip(paths, found, strict=True) if isinstance(loaded, InputError)]


def _read_pictures(
    paths: Sequence[Path], read: Callable[["Image.Image"], T], advance: Advance = lambda amount: None
) -> list[T | InputError]:
    """What is wanted of each, or what is wrong with it, several at a time: decoding lets go of the interpreter lock."""

    def one(path: Path) -> T | InputError:
        try:
            with opened_picture(path, f"image {path}") as opened:
                return read(opened)
        except InputError as error:
            return error

    formats()
    with ThreadPoolExecutor(os.cpu_count(), "decoding") as pool:
        return list(counted(pool.map(one, paths), advance))


def _fitted(picture: "Image.Image", mode: str, image_size: int | None) -> "Image.Image":
    """Pixels of the mode wanted, grey only where planes are equal; the centre square, scaled, where a size is asked."""
    from PIL import Image

    seen = as_seen(picture)
    if mode == "L" and seen.mode == "RGB":
        raise ValueError("it is in colour, and grey images are asked for")
    converted = seen.convert(mode)
    if image_size is None:
        return converted
    side = min(converted.size)
    left, top = (converted.width - side) // 2, (converted.height - side) // 2
    square = converted.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.LANCZOS)

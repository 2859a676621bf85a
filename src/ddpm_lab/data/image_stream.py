"""Images to be scored or compared with, read in order and a batch at a time: memory does not grow with their number."""

import hashlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import DATASETS, load_images
from ddpm_lab.data.image_folder import ImageFolder, open_folder
from ddpm_lab.data.image_formats import MOST_PIXELS

ARRAYS = ("images", "arr_0")  # names under which an .npz holds images: ours, and the one other projects use
MOST_IMAGES, MOST_BYTES = 500, 2**27  # that are read at a time
MOST_COLUMN_MAJOR = 2**32  # bytes of an array that has to be in memory whole
FAULTS = (  # what a damaged archive makes zipfile and numpy raise; the header of an array is parsed as Python
    OSError, EOFError, ValueError, KeyError, RuntimeError, SyntaxError, tokenize.TokenError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class ImageStream:
    """Images in a fixed order.

    Attributes:
        name: as the user named them.
        num_images: N.
        shape: (C, H, W).
        read: gives the first n of them, (b, C, H, W) uint8 at a time.
        dataset, split: where they are of a known data set.
        drawn_from: how many there were before `draw`.
    """

    name: str
    num_images: int
    shape: tuple[int, int, int]
    read: Callable[[int], Iterator[Tensor]]
    dataset: str | None = None
    split: str | None = None
    drawn_from: int | None = None

    def batches(self) -> Iterator[Tensor]:
        """All images in order."""
        return self.read(self.num_images)

    def take(self, num_images: int) -> "ImageStream":
        """The first of them."""
        return replace(self, num_images=num_images)

    def draw(self, num_images: int, seed: int = 0) -> "ImageStream":
        """Some of them at random: the first ones may well be of one class, or the easier ones, as in MNIST's test set.

        Raises:
            InputError: more than there are, or fewer than one.
        """
        if not 1 <= num_images <= self.num_images:
            raise InputError(f"num_images must be from 1 to the {self.num_images} of {self.name}, not {num_images}")
        if num_images == self.num_images:
            return self
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))
        chosen = order[:num_images].sort().values

        def read(count: int) -> Iterator[Tensor]:
            first, wanted = 0, chosen[:count]
            for batch in self.batches():
                yield batch[wanted[(wanted >= first) & (wanted < first + len(batch))] - first]
                first += len(batch)

        return replace(
            self,
            num_images=num_images,
            read=lambda count: _chunks(read(count), chunk_size(self.shape)),
            drawn_from=self.num_images,
        )

    @cached_property
    def sha256(self) -> str:
        """Of the pixels in order, channels first, after the shape."""
        digest = hashlib.sha256(str((self.num_images, *self.shape)).encode())
        for batch in self.batches():
            digest.update(batch.contiguous().numpy().tobytes())
        return digest.hexdigest()


def chunk_size(shape: tuple[int, int, int]) -> int:
    """How many images of a (C, H, W) are read at a time."""
    C, H, W = shape
    return max(1, min(MOST_IMAGES, MOST_BYTES // (C * H * W)))


def _chunks(batches: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same images, so many at a time."""
    held: list[Tensor] = []
    for batch in batches:
        held.append(batch)
        while sum(map(len, held)) >= size:
            joined = torch.cat(held)
            yield joined[:size]
            held = [joined[size:]]
    if held and sum(map(len, held)):
        yield torch.cat(held)


def ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same batches, each read in a thread of its own while the one before is used."""
    with ThreadPoolExecutor(1, "reading") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def tensor_stream(name: str, images: Tensor, dataset: str | None = None, split: str | None = None) -> ImageStream:
    """Images in memory, (N, C, H, W) uint8.

    Raises:
        InputError: another shape or type, or no images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InputError(f"{name} must be (N, 1 or 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
    shape, held = (images.shape[1], images.shape[2], images.shape[3]), images.cpu()
    return ImageStream(name, len(held), shape, lambda n: iter(torch.split(held[:n], chunk_size(shape))), dataset, split)


def open_images(
    name: str, data_dir: Path | None = None, image_size: int | None = None, channels: int | None = None
) -> ImageStream:
    """Open images by name.

    Args:
        name: 'mnist:train' and its like, an .npz that holds `images` (or `arr_0`), uint8 (N, H, W, C), or a folder.
        data_dir: see `data.load_images`.
        image_size: for folders: crop to the centre square and scale to this side in pixels.
        channels: for folders and .npz: 1 or 3, what they are to be compared with; grey images become colour by
            repetition, and colour images whose planes are equal become grey. None: grey where all are.
    Raises:
        InputError: no such images, or unreadable ones.
    """
    if not name:
        raise InputError("a name of images is empty: give DATASET:SPLIT, an .npz, or a folder of images")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise InputError(f"--image-size must be from 1 to 4096, not {image_size}")
    dataset, _, split = name.partition(":")
    if dataset in DATASETS and (split or not Path(name).exists()):
        if split not in ("train", "test"):
            raise InputError(f"{name!r}: a data set is named with its split, {dataset}:train or {dataset}:test")
        return tensor_stream(name, load_images(dataset, split, data_dir).images, dataset, split)
    path = Path(name)
    if path.is_dir():
        folder = open_folder(path, image_size, "--image-size", channels)
        shape = (1 if folder.mode == "L" else 3, folder.image_size, folder.image_size)
        return ImageStream(name, len(folder), shape, partial(_read_folder, folder))
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path, channels)
    if path.is_file():
        raise InputError(f"{name} is neither an .npz nor a folder of images")
    raise InputError(
        f"no images {name!r}: give DATASET:SPLIT (mnist:train, cifar10:test, ...), an .npz, or a folder of images"
    )


def _read_folder(folder: ImageFolder, num_images: int) -> Iterator[Tensor]:
    size = chunk_size((1 if folder.mode == "L" else 3, folder.image_size, folder.image_size))
    for first in range(0, num_images, size):
        yield torch.from_numpy(folder.read(range(first, min(first + size, num_images))))


def _open_npz(path: Path, channels: int | None) -> ImageStream:
    with readable(path), zipfile.ZipFile(path) as archive:
        array = image_array_of(archive)
        if array is None:
            held = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5]) or "nothing"
            raise InputError(f"{path} must hold `images`, uint8 (N, H, W, C); it holds {held}")
        shape, column_major, dtype = array_header(archive, array, str(path))
    if dtype != np.uint8:
        raise InputError(
            f"{path} holds {array} of type {dtype}; images must be uint8, 0 .. 255 (round them as you mean it first)"
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or shape[1] != shape[2] or min(shape) < 1:
        raise InputError(f"{path} holds {array} of shape {shape}; images must be square, (N, H, W, 1 or 3)")
    N, H, W, C = shape
    if H * W > MOST_PIXELS:
        raise InputError(f"{path} holds images of {W} x {H} pixels; {MOST_PIXELS:,} are the most")
    if column_major and N * H * W * C > MOST_COLUMN_MAJOR:
        raise InputError(f"{path} holds {array} in Fortran order, which cannot be read a part at a time; save it as C")
    read = partial(_read_npz, path, f"{array}.npy", shape, column_major)
    stream = ImageStream(str(path), N, (C, H, W), read)
    if channels != 3 and C == 3:  # as in a folder: equal planes are grey, whatever holds them
        if all(map(_is_grey, stream.batches())):
            return replace(stream, shape=(1, H, W), read=lambda n: (batch[:, :1] for batch in read(n)))
        if channels == 1:
            raise InputError(f"{path} holds images in colour, and grey ones are asked for")
    if channels == 3 and C == 1:
        return replace(stream, shape=(3, H, W), read=lambda n: (batch.expand(-1, 3, -1, -1) for batch in read(n)))
    return stream


def image_array_of(archive: zipfile.ZipFile) -> str | None:
    """The array of an .npz that holds images, if one does."""
    return next((array for array in ARRAYS if f"{array}.npy" in archive.namelist()), None)


def _is_grey(batch: Tensor) -> bool:
    return torch.equal(batch[:, 0], batch[:, 1]) and torch.equal(batch[:, 0], batch[:, 2])


def _read_npz(path: Path, member: str, shape: tuple[int, ...], column_major: bool, num_images: int) -> Iterator[Tensor]:
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        _read_header(stream)
        N, H, W, C = shape
        size = chunk_size((C, H, W))
        whole = None
        if column_major:  # the pixels of one image lie far apart
            whole = np.frombuffer(stream.read(N * H * W * C), np.uint8).reshape(shape, order="F")
        for first in range(0, num_images, size):
            count = min(size, num_images - first)
            if whole is None:
                content = stream.read(count * H * W * C)
                batch = np.frombuffer(content, np.uint8).reshape(count, H, W, C)
            else:
                batch = whole[first : first + count]
            yield torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def array_header(archive: zipfile.ZipFile, array: str, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type of an array of an .npz, whose data must be as long as they say.

    Raises:
        InputError: they do not fit each other.
    """
    with archive.open(f"{array}.npy") as stream:
        shape, column_major, dtype = _read_header(stream)
        if archive.getinfo(f"{array}.npy").file_size - stream.tell() != dtype.itemsize * math.prod(shape):
            raise InputError(f"{name} is damaged: {array} is not as long as its shape {shape} says")
    return shape, column_major, dtype


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Any fault of the file met inside is told by its name."""
    try:
        yield
    except InputError:
        raise
    except FAULTS as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error

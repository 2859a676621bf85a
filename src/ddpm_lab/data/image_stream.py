"""Images to score or to compare with, read in order and in chunks, so that memory does not grow with their number."""

import hashlib
import math
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, compress, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import CLASS_NAMES, DATASETS, load_images
from ddpm_lab.data.image_folder import ImageFolder, open_folder
from ddpm_lab.data.image_formats import MOST_PIXELS

ARRAYS = ("images", "arr_0")  # names of the array of images in an .npz: ours, and the one other projects use
MOST_IMAGES, MOST_BYTES = 500, 2**27  # in a chunk
MOST_COLUMN_MAJOR = 2**32  # bytes of an array in Fortran order, which is unpacked into a temporary file
FAULTS = (  # what zipfile and numpy raise for a damaged archive; the header of an array is parsed as Python
    OSError, EOFError, ValueError, KeyError, RuntimeError, SyntaxError, tokenize.TokenError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ImageStream:
    """Images in a fixed order.

    Attributes:
        name: the name that the user gave.
        num_images: N.
        shape: (C, H, W).
        read: yields the first n images in chunks, (b, C, H, W) uint8.
        dataset, split: of images of a known data set.
        drawn_from: how many images there were before `draw`.
        class_names: of images with labels; None: there are no labels.
    """

    name: str
    num_images: int
    shape: tuple[int, int, int]
    read: Callable[[int], Iterator[Tensor]]
    dataset: str | None = None
    split: str | None = None
    drawn_from: int | None = None
    class_names: tuple[str, ...] | None = None

    def batches(self) -> Iterator[Tensor]:
        """All images in order, in chunks."""
        return self.read(self.num_images)

    def take(self, num_images: int) -> "ImageStream":
        """The first images."""
        return replace(self, num_images=num_images)

    def draw(self, num_images: int, seed: int = 0) -> "ImageStream":
        """A random subset, for the first images may all be of one class, or easier ones, as in the test set of MNIST.

        Raises:
            InputError: num_images exceeds the number of images, or is below 1.
        """
        if not 1 <= num_images <= self.num_images:
            raise InputError(f"num_images must be from 1 to the {self.num_images} of {self.name}, not {num_images}")
        if num_images == self.num_images:
            return self
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))
        is_drawn = torch.zeros(self.num_images, dtype=torch.bool)
        is_drawn[order[:num_images]] = True

        def read(count: int) -> Iterator[Tensor]:
            drawn = islice(compress(chain.from_iterable(self.batches()), is_drawn.tolist()), count)
            copies = (image.clone() for image in drawn)  # a view would keep its whole batch in memory
            while chunk := list(islice(copies, chunk_size(self.shape))):
                yield torch.stack(chunk)

        return replace(self, num_images=num_images, read=read, drawn_from=self.num_images)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the shape, then the pixels in order, channels first."""
        digest = hashlib.sha256(str((self.num_images, *self.shape)).encode())
        for batch in self.batches():
            digest.update(batch.contiguous().numpy().tobytes())
        return digest.hexdigest()


def chunk_size(shape: tuple[int, int, int]) -> int:
    """How many images of shape (C, H, W) a chunk holds."""
    C, H, W = shape
    return max(1, min(MOST_IMAGES, MOST_BYTES // (C * H * W)))


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each read in a thread while the one before is used."""
    with ThreadPoolExecutor(1, "reading") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def tensor_stream(name: str, images: Tensor, dataset: str | None = None, split: str | None = None) -> ImageStream:
    """Images in memory, (N, C, H, W) uint8.

    Raises:
        InputError: another shape or dtype, or no images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InputError(f"{name} must be (N, 1 or 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
    shape, on_cpu = (images.shape[1], images.shape[2], images.shape[3]), images.cpu()
    size = chunk_size(shape)
    return ImageStream(
        name, len(images), shape, lambda n: iter(torch.split(on_cpu[:n], size)), dataset, split,
        class_names=CLASS_NAMES.get(dataset or ""),
    )  # fmt: skip


def open_images(
    name: str, data_dir: Path | None = None, image_size: int | None = None, channels: int | None = None
) -> ImageStream:
    """Open images by name.

    Args:
        name: DATASET:SPLIT ('mnist:train'), an .npz that holds `images` (or `arr_0`), uint8 (N, H, W, C), or a folder.
        data_dir: see `datasets.load_images`.
        image_size: for folders: crop to the centre square and scale to this side in pixels.
        channels: for folders and .npz: 1 or 3, the channels of the images to compare with; grey images become colour by
            repetition, and colour images with equal channels become grey. None: 1 if all images are grey.
    Raises:
        InputError: no such images, or unreadable ones.
    """
    path = Path(name)
    dataset, _, split = name.partition(":")
    if dataset in DATASETS and (split or not path.exists()):
        if split not in ("train", "test"):
            raise InputError(f"{name!r}: a data set is named with its split, {dataset}:train or {dataset}:test")
        return tensor_stream(name, load_images(dataset, split, data_dir).images, dataset, split)
    if name and path.is_dir():
        folder = open_folder(path, image_size, "--image-size", channels)
        stream = ImageStream(name, len(folder), folder.shape, partial(_read_folder, folder))
        with suppress(InputError):
            stream = replace(stream, class_names=folder.classes.names)
        return stream
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path, channels)
    found = f"{name} is neither an .npz nor a folder of images" if path.is_file() else f"no images {name!r}"
    raise InputError(f"{found}: give DATASET:SPLIT (mnist:train, cifar10:test, ...), an .npz, or a folder of images")


def _read_folder(folder: ImageFolder, num_images: int) -> Iterator[Tensor]:
    size = chunk_size(folder.shape)
    for first in range(0, num_images, size):
        yield torch.from_numpy(folder.read(range(first, min(first + size, num_images))))


def _open_npz(path: Path, channels: int | None) -> ImageStream:
    with readable(path), zipfile.ZipFile(path) as archive:
        array = image_array_of(archive)
        if array is None:
            names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5]) or "nothing"
            raise InputError(f"{path} must hold `images`, uint8 (N, H, W, C); it holds {names}")
        shape, column_major, dtype = array_header(archive, array, str(path))
    if dtype != np.uint8:
        raise InputError(f"{path} holds {array} of type {dtype}; images must be uint8, 0 .. 255")
    if len(shape) != 4 or shape[3] not in (1, 3) or shape[1] != shape[2] or min(shape) < 1:
        raise InputError(f"{path} holds {array} of shape {shape}; images must be square, (N, H, W, 1 or 3)")
    N, H, W, C = shape
    if H * W > MOST_PIXELS:
        raise InputError(f"{path} holds images of {W} x {H} pixels; {MOST_PIXELS:,} are the most")
    if column_major and math.prod(shape) > MOST_COLUMN_MAJOR:
        raise InputError(f"{path} holds {array} in Fortran order, of more than 4 GiB; save it in C order")
    read = partial(_read_npz, path, f"{array}.npy", shape, column_major)
    stream = ImageStream(str(path), N, (C, H, W), read)
    if channels != 3 and C == 3:  # as in a folder, equal channels are grey
        if all(bool((batch == batch[:, :1]).all()) for batch in stream.batches()):
            return replace(stream, shape=(1, H, W), read=lambda n: (batch[:, :1] for batch in read(n)))
        if channels == 1:
            raise InputError(f"{path} holds images in colour, and grey images are required")
    if channels == 3 and C == 1:
        return replace(stream, shape=(3, H, W), read=lambda n: (batch.expand(-1, 3, -1, -1) for batch in read(n)))
    return stream


def image_array_of(archive: zipfile.ZipFile) -> str | None:
    """The name of the array of images in an .npz, or None."""
    return next((array for array in ARRAYS if f"{array}.npy" in archive.namelist()), None)


def _read_npz(path: Path, member: str, shape: tuple[int, ...], column_major: bool, num_images: int) -> Iterator[Tensor]:
    _, H, W, C = shape
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        _read_header(stream)
        size = chunk_size((C, H, W))
        counts = [min(size, num_images - first) for first in range(0, num_images, size)]
        batches = (
            _column_major_batches(stream, shape, counts) if column_major else _row_major_batches(stream, shape, counts)
        )
        for batch in batches:
            yield torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def _row_major_batches(stream: IO[bytes], shape: tuple[int, ...], counts: Sequence[int]) -> Iterator[np.ndarray]:
    """Batches of so many images each, (count, H, W, C), of an array in C order."""
    for count in counts:
        yield np.frombuffer(stream.read(count * math.prod(shape[1:])), np.uint8).reshape(count, *shape[1:])


def _column_major_batches(stream: IO[bytes], shape: tuple[int, ...], counts: Sequence[int]) -> Iterator[np.ndarray]:
    """The same of an array in Fortran order, in which each pixel of all images comes before the next pixel."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file)
        first = 0
        for count in counts:
            pixels = bytearray()
            for pixel in range(math.prod(shape[1:])):
                file.seek(pixel * shape[0] + first)
                pixels += file.read(count)
            yield np.frombuffer(pixels, np.uint8).reshape((count, *shape[1:]), order="F")
            first += count


def array_header(archive: zipfile.ZipFile, array: str, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an array of an .npz.

    Raises:
        InputError: the length of the data is not the one that the header says.
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
    """Within it, an error that a damaged file causes becomes an InputError that names the file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        yield
    except InputError:
        raise
    except FAULTS as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error

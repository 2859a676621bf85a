"""Images: from files to one uint8 tensor, and the only place where uint8 meets [-1, 1].

A set is one tensor in memory, (N, C, H, W) uint8; batches are gathered from it by index, on whatever device it lies.
What the official files must contain is pinned by the SHA-256 of their uncompressed bytes, so any compression will do.
"""

import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core.download import download
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import NO_SPACE, cache_dir, replace_atomically, waiting_for
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.data.image_folder import open_folder

DATASETS = ("mnist", "cifar10", "digits")


@dataclass(frozen=True)
class _File:
    """One official file: its name in the data folder, uncompressed length in bytes, and SHA-256."""

    name: str
    num_bytes: int
    sha256: str


MNIST_FILES: dict[str, tuple[_File, ...]] = {
    "train": (
        _File(
            "train-images-idx3-ubyte", 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        _File("train-labels-idx1-ubyte", 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ),
    "test": (
        _File("t10k-images-idx3-ubyte", 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        _File("t10k-labels-idx1-ubyte", 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
}
MNIST_NAMES = frozenset(file for files in MNIST_FILES.values() for file in files)
CIFAR10_FILES: dict[str, tuple[_File, ...]] = {
    "train": tuple(
        _File(f"data_batch_{i + 1}.bin", 30_730_000, digest)
        for i, digest in enumerate(
            (
                "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            )
        )
    ),
    "test": (_File("test_batch.bin", 30_730_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),),
}
OFFICIAL_FILES = {"mnist": MNIST_FILES, "cifar10": CIFAR10_FILES}
MNIST_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
ADVICE = "give --data-dir (or DDPM_DATA_DIR) a folder that holds it"
CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        name: data set and split, 'mnist:train'.
        images: (N, C, H, W) uint8, square, on the CPU.
        labels: (N,) int64, or None.
        sha256: of the images' bytes in that order.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    sha256: str

    def __len__(self) -> int:
        return len(self.images)


def to_float(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 -1 .. 1, same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floating -1 .. 1 to uint8 0 .. 255, rounded to the nearest and clipped, same shape: the inverse of `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def default_data_dir() -> Path:
    """DDPM_DATA_DIR where it is set, else the user's cache folder."""
    return Path(os.environ.get("DDPM_DATA_DIR") or cache_dir() / "data")


def load_images(
    dataset: str,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    option: str = "--data.image-size",
) -> ImageSet:
    """Load one split of a data set, fetching and verifying it first where needed.

    Args:
        dataset: mnist, cifar10, digits, or the path of a folder of images (searched to any depth). Of a folder, every
            twentieth image of a fixed permutation is the test split.
        split: train or test.
        data_dir: holds mnist/ and cifar10/; None: see `default_data_dir`.
        image_size: for folders: crop to the centre square and scale to this side in pixels.
        option: the flag that gives it, for messages.
    Raises:
        InputError: no such data set; files that are absent and cannot be fetched, or hold something else; a folder
            without images, with unreadable ones, or with several sizes and no image_size; one out of range, or for a
            set that has its own size.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be train or test, not {split!r}")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise InputError(f"{option} must be from 1 to 4096, not {image_size}")
    if image_size is not None and dataset in DATASETS:
        raise InputError(f"{option} is for a folder of images; {dataset} has its own size")
    folder = Path(data_dir or default_data_dir())
    if dataset == "mnist":
        images, labels = _read_mnist(folder / "mnist", split)
    elif dataset == "cifar10":
        images, labels = _read_cifar10(folder / "cifar10", split)
    elif dataset == "digits":
        images, labels = _read_digits(split)
    else:
        images, labels = _read_folder(Path(dataset), split, image_size, option), None
    return ImageSet(
        name=f"{dataset}:{split}",
        images=torch.from_numpy(images),
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def here(data_dir: Path | None = None) -> list[str]:
    """The data sets that need not be fetched first."""
    folder = data_dir or default_data_dir()

    def complete(dataset: str) -> bool:
        return all(_find(folder / dataset, file) for split in OFFICIAL_FILES[dataset].values() for file in split)

    return [name for name in DATASETS if name not in OFFICIAL_FILES or complete(name)]


def _read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """IDX files: a 16- or 8-byte header, then the bytes; the hash has already proved both."""
    images, labels = _official_files(folder, MNIST_FILES[split])
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy(),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def _read_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3072 bytes, planes R, G, B."""
    records = np.concatenate(
        [np.frombuffer(c, np.uint8).reshape(-1, 3073) for c in _official_files(folder, CIFAR10_FILES[split])]
    )
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0]


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """1,797 real 8x8 digits that scikit-learn ships (0 .. 16 there), split 1,437 to 360 by a fixed permutation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    chosen = order[:1437] if split == "train" else order[1437:]
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return images[:, None], digits.target[chosen]


def _read_folder(path: Path, split: str, image_size: int | None, option: str) -> np.ndarray:
    if not path.is_dir():
        raise InputError(f"no data set {str(path)!r}: name one of {', '.join(DATASETS)}, or a folder of images")
    folder = open_folder(path, image_size, option)
    if len(folder) < 2:
        raise InputError(f"folder {path} holds one image; training needs at least 2")
    order = np.random.RandomState(0).permutation(len(folder))
    num_test = max(len(folder) // 20, 1)
    chosen = order[:num_test] if split == "test" else order[num_test:]
    with progress(f"reading {path}:{split}", len(chosen), "images") as advance:
        return folder.read(chosen, advance)


def _official_files(folder: Path, files: tuple[_File, ...]) -> list[bytes]:
    """Contents of official files, fetched where absent, each proved by length and hash."""
    if any(_find(folder, file) is None for file in files):
        fetch(folder)
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,  # decompression lets go of the interpreter lock
        progress(f"reading {folder}", len(files), "files") as advance,
    ):
        contents = pool.map(lambda file: _read_verified(cast(Path, _find(folder, file)), file), files)
        return list(counted(contents, advance))


def _find(folder: Path, file: _File) -> Path | None:
    """Where a file lies: in its own folder, or as torchvision or the official archive lay it out beside or below it."""
    beside = {"mnist": ("MNIST/raw", "."), "cifar10": ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", ".")}
    places = [folder, *(folder.parent / place for place in beside[folder.name])]
    candidates = (place / (file.name + ending) for place in places for ending in ("", ".gz", ".xz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_verified(path: Path, file: _File) -> bytes:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            content: bytes = stream.read(file.num_bytes + 1)  # no further: the file may be anything
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, PermissionError):
            raise InputError(f"{path} cannot be read: permission denied") from error
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); delete it and fetch it again") from error
    _verify(content, file, str(path))
    return content


def _verify(content: bytes, file: _File, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        if len(content) == file.num_bytes and file in MNIST_NAMES:
            raise InputError(
                f"{where} is not MNIST's file: it is damaged, or of another data set that has the same file names "
                "(Fashion-MNIST, KMNIST); name another --data-dir for MNIST"
            )
        raise InputError(
            f"{where} does not hold the official {file.name}: {len(content)} bytes of SHA-256 {found[:16]}..., "
            f"expected {file.num_bytes} of {file.sha256[:16]}...; delete it and fetch it again"
        )


def fetch(folder: Path) -> None:
    """Download what `mnist/` or `cifar10/` lacks from its official places; files that are there stay as they are.

    CIFAR-10's archive, put there by hand, is unpacked.

    A download that broke off goes on where it stopped. Nothing gets its final name before its content is verified.

    Raises:
        InputError: no network, or content that is not the official one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_for(folder / ".lock"):  # a second process waits, and finds the files there
            missing = [
                file for split in OFFICIAL_FILES[folder.name].values() for file in split if not _find(folder, file)
            ]
            if folder.name == "mnist":
                for file in missing:
                    urls = [f"{mirror}{file.name}.gz" for mirror in MNIST_MIRRORS]
                    download(urls, folder / f"{file.name}.gz", partial(_read_verified, file=file), ADVICE)
            elif missing:
                archive = folder / CIFAR10_ARCHIVE.rpartition("/")[2]
                by_hand = next((path for path in (archive, folder.parent / archive.name) if path.is_file()), None)
                if by_hand is not None:
                    _unpack(by_hand, missing, folder)
                else:
                    advice = ADVICE + _pickles_there(folder)
                    download([CIFAR10_ARCHIVE], archive, lambda path: _unpack(path, missing, folder), advice)
                    archive.unlink()
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise InputError(
            f"data folder {folder} cannot be written: {error.strerror or error}; give another --data-dir"
        ) from error


def _pickles_there(folder: Path) -> str:
    """What to say where CIFAR-10 is there in its version for Python."""
    for place in (folder, folder.parent):
        if (place / "cifar-10-batches-py").is_dir():
            return (
                f"; {place / 'cifar-10-batches-py'} holds pickles, which are not read, for they can run any program: "
                "the binary version is needed"
            )
    return ""


def _unpack(archive: Path, files: list[_File], folder: Path) -> None:
    """Take members by name out of the CIFAR-10 archive; what else it may hold is never written."""
    try:
        with tarfile.open(archive) as tar:
            for file in files:
                member = tar.extractfile(f"cifar-10-batches-bin/{file.name}")
                content = member.read(file.num_bytes + 1) if member else b""
                _verify(content, file, f"{archive}:{file.name}")
                replace_atomically(folder / file.name, content)
    except (tarfile.TarError, KeyError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{archive} is not the official archive ({' '.join(str(error).split())}); fetch it again"
        ) from error


def pixel_deviation(images: Tensor) -> float:
    """Standard deviation of all pixels on the scale of -1 to 1, the same number on any machine; rounded to 4 digits.

    Args:
        images: uint8, of any shape.
    """
    counts = images.flatten().bincount(minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    share = counts / counts.sum()
    mean = share @ values
    return round(float((share @ (values - mean).square()).sqrt()), 4)


def training_batch(images: Tensor, indices: Tensor, horizontal_flip: bool, generator: torch.Generator) -> Tensor:
    """Gather a batch on the images' device, mirrored at random where asked for, as x_0.

    Args:
        images: (N, C, H, W) uint8.
        indices: (B,) int64, on the same device.
        generator: of that device; draws one bit an image where horizontal_flip is set.
    Returns:
        (B, C, H, W) float32 in [-1, 1].
    """
    batch = images[indices]
    if horizontal_flip:
        mirrored = torch.rand(len(batch), generator=generator, device=images.device) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    return to_float(batch)


def describe(dataset: str, data_dir: Path | None = None) -> list[str]:
    """Lines for a person: counts, sizes, means and hashes of both splits, all read from the files themselves.

    Raises:
        InputError: as `load_images`.
    """
    lines = []
    for split in ("train", "test"):
        chosen = load_images(dataset, split, data_dir)
        N, C, H, W = chosen.images.shape
        counts = torch.stack([plane.flatten().bincount(minlength=256) for plane in chosen.images.unbind(1)])  # (C, 256)
        share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
        mean = share @ value
        deviation = (share * (value - mean[:, None]).square()).sum(1).sqrt()
        means, deviations = (" ".join(f"{number:.4f}" for number in of) for of in (mean, deviation))
        lines.append(
            f"{chosen.name}: {N} images of {C} x {H} x {W}, uint8; mean {means}, standard deviation {deviations}"
        )
        if chosen.labels is not None:
            lines.append(f"  of each class: {' '.join(map(str, chosen.labels.bincount().tolist()))}")
        lines.append(f"  SHA-256 of the images: {chosen.sha256}")
        official = OFFICIAL_FILES[dataset][split] if dataset in OFFICIAL_FILES else ()
        lines += [f"  verified {file.sha256}  {file.name}" for file in official]
    return lines

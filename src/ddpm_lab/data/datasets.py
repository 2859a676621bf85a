"""Data sets: from files to one uint8 tensor, and the only conversion between uint8 and [-1, 1].

A data set is one tensor in memory, (N, C, H, W) uint8; batches are gathered from it by index, on any device.
Official files are verified by the SHA-256 of their uncompressed bytes, so that any compression is accepted.
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
from ddpm_lab.core.files import acquire_lock, cache_dir, replace_atomically, writable
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.data.image_folder import ImageFolder, open_folder

DATASETS = ("mnist", "cifar10", "digits")
DIGITS = tuple(map(str, range(10)))
CLASS_NAMES = {  # in the order of the labels
    "mnist": DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": DIGITS,
}


@dataclass(frozen=True)
class File:
    """An official file: its name, its length in bytes, and its SHA-256, all uncompressed."""

    name: str
    num_bytes: int
    sha256: str


OFFICIAL_FILES = {
    ("mnist", "train"): (
        File("train-images-idx3-ubyte", 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        File("train-labels-idx1-ubyte", 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ),
    ("mnist", "test"): (
        File("t10k-images-idx3-ubyte", 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        File("t10k-labels-idx1-ubyte", 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
    ("cifar10", "train"): (
        File("data_batch_1.bin", 30_730_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        File("data_batch_2.bin", 30_730_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        File("data_batch_3.bin", 30_730_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        File("data_batch_4.bin", 30_730_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        File("data_batch_5.bin", 30_730_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    ),
    ("cifar10", "test"): (
        File("test_batch.bin", 30_730_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    ),
}
MNIST_NAMES = frozenset(file.name for split in ("train", "test") for file in OFFICIAL_FILES["mnist", split])
MNIST_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OTHER_FOLDERS = {  # of torchvision and of the official archive, relative to the data folder
    "mnist": ("MNIST/raw", "."),
    "cifar10": ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "."),
}
ADVICE = "give --data-dir (or DDPM_DATA_DIR) a folder that holds it"


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set.

    Attributes:
        name: data set and split, 'mnist:train'.
        images: (N, C, H, W) uint8, square, on the CPU.
        labels: (N,) int64, or None.
        sha256: of the bytes of the images, in this order.
        class_names: the names of the labels 0, 1, ..., or None.
        unlabelled: why there are no labels; '' if there are.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    sha256: str
    class_names: tuple[str, ...] | None = None
    unlabelled: str = ""

    def __len__(self) -> int:
        return len(self.images)


def to_float(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 -1 .. 1, same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floating -1 .. 1 to uint8 0 .. 255, rounded to nearest and clipped, same shape: the inverse of `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def default_data_dir() -> Path:
    """DDPM_DATA_DIR, or the folder `data` of the cache if that is unset."""
    return Path(os.environ.get("DDPM_DATA_DIR") or cache_dir() / "data")


def load_images(
    dataset: str,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    option: str = "--data.image-size",
) -> ImageSet:
    """Load one split of a data set; files that are absent are downloaded and verified first.

    Args:
        dataset: mnist, cifar10, digits, or the path of a folder of images (searched to any depth). The test split of a
            folder is one image in twenty, by a fixed permutation. If each image lies in the folder of its class, the
            images have labels, see `ImageFolder.classes`.
        split: train or test.
        data_dir: folder that holds mnist/ and cifar10/; None: see `default_data_dir`.
        image_size: for folders: crop to the centre square and scale to this side in pixels.
        option: the flag that sets image_size, for messages.
    Raises:
        InputError: an unknown data set or split; files that are absent and cannot be downloaded, or have other
            content; a folder without images, with unreadable images, or with several sizes and no image_size; an
            image_size that is out of range, or given for a data set that has its own size.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be train or test, not {split!r}")
    if image_size is not None and dataset in DATASETS:
        raise InputError(f"{option} is for a folder of images; {dataset} has its own size")
    folder = Path(data_dir or default_data_dir())
    class_names, unlabelled = CLASS_NAMES.get(dataset), ""
    labels: np.ndarray | None
    if dataset == "mnist":
        images, labels = _read_mnist(folder / "mnist", split)
    elif dataset == "cifar10":
        images, labels = _read_cifar10(folder / "cifar10", split)
    elif dataset == "digits":
        images, labels = _read_digits(split)
    else:
        images, opened, chosen = _read_folder(Path(dataset), split, image_size, option)
        try:
            labels, class_names = opened.classes.labels[chosen], opened.classes.names
        except InputError as error:
            labels, unlabelled = None, str(error)
    return ImageSet(
        name=f"{dataset}:{split}",
        images=torch.from_numpy(images),
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        sha256=hashlib.sha256(images.tobytes()).hexdigest(),
        class_names=class_names,
        unlabelled=unlabelled,
    )


def available_datasets(data_dir: Path | None = None) -> list[str]:
    """The data sets that need no download."""
    folder = data_dir or default_data_dir()
    return [name for name in DATASETS if not _missing(folder / name)]


def _read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """IDX files: a header of 16 or 8 bytes, which the hash has verified, then the bytes."""
    images, labels = _official_files(folder, split)
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy(),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def _read_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3072 bytes of pixels, in planes R, G, B."""
    contents = _official_files(folder, split)
    records = np.concatenate([np.frombuffer(content, np.uint8).reshape(-1, 3073) for content in contents])
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0]


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """1,797 real 8x8 digits of scikit-learn (0 .. 16 there), split into 1,437 and 360 by a fixed permutation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    chosen = order[:1437] if split == "train" else order[1437:]
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return images[:, None], digits.target[chosen]


def _read_folder(
    path: Path, split: str, image_size: int | None, option: str
) -> tuple[np.ndarray, ImageFolder, np.ndarray]:
    """The images of a split, the folder, and the indices in it of these images."""
    if not path.is_dir():
        raise InputError(f"no data set {str(path)!r}: name one of {', '.join(DATASETS)}, or a folder of images")
    folder = open_folder(path, image_size, option)
    if len(folder) < 2:
        raise InputError(f"folder {path} holds one image; training needs at least 2")
    order = np.random.RandomState(0).permutation(len(folder))
    num_test = max(len(folder) // 20, 1)
    chosen = order[:num_test] if split == "test" else order[num_test:]
    with progress(f"reading {path}:{split}", len(chosen), "images") as advance:
        return folder.read(chosen, advance), folder, chosen


def _official_files(folder: Path, split: str) -> list[bytes]:
    """The contents of the files of a split, each verified; absent files are downloaded first."""
    files = OFFICIAL_FILES[folder.name, split]
    if any(_find(folder, file) is None for file in files):
        fetch(folder)
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,  # decompression releases the interpreter lock
        progress(f"reading {folder}", len(files), "files") as advance,
    ):
        contents = pool.map(lambda file: _read_verified(cast(Path, _find(folder, file)), file), files)
        return list(counted(contents, advance))


def _find(folder: Path, file: File) -> Path | None:
    """The path of a file, in its own folder or where torchvision or the official archive put it."""
    places = [folder, *(folder.parent / place for place in OTHER_FOLDERS[folder.name])]
    candidates = (place / (file.name + ending) for place in places for ending in ("", ".gz", ".xz"))
    return next((path for path in candidates if path.is_file()), None)


def _missing(folder: Path) -> list[File]:
    """The official files of both splits that are absent."""
    official = [files for (dataset, _), files in OFFICIAL_FILES.items() if dataset == folder.name]
    return [file for files in official for file in files if _find(folder, file) is None]


def _read_verified(path: Path, file: File) -> bytes:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as stream:
            content: bytes = stream.read(file.num_bytes + 1)  # no more than needed: the file may be anything
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); delete it and fetch it again") from error
    _verify(content, file, str(path))
    return content


def _verify(content: bytes, file: File, place: str) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == file.sha256:
        return
    if len(content) == file.num_bytes and file.name in MNIST_NAMES:
        raise InputError(
            f"{place} is not the file of MNIST: it is damaged, or belongs to another data set with the same file names "
            "(Fashion-MNIST, KMNIST); name another --data-dir for MNIST"
        )
    raise InputError(
        f"{place} does not hold the official {file.name}: {len(content)} bytes of SHA-256 {sha256[:16]}..., "
        f"expected {file.num_bytes} of {file.sha256[:16]}...; delete it and fetch it again"
    )


def fetch(folder: Path) -> None:
    """Download the official files that `mnist/` or `cifar10/` lacks; existing files stay as they are.

    An archive of CIFAR-10 that the user has put there is unpacked instead. An interrupted download is continued. A file
    gets its final name after its content is verified.

    Raises:
        InputError: no network, other content than the official one, or a folder that cannot be written.
    """
    with writable(f"data folder {folder}", "; name another --data-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        with acquire_lock(folder / ".lock"):  # a second process waits here, and then finds the files
            missing = _missing(folder)
            if folder.name == "mnist":
                for file in missing:
                    urls = [f"{mirror}{file.name}.gz" for mirror in MNIST_MIRRORS]
                    download(urls, folder / f"{file.name}.gz", partial(_read_verified, file=file), ADVICE)
            elif missing:
                _fetch_cifar10(folder, missing)


def _fetch_cifar10(folder: Path, missing: list[File]) -> None:
    archive = folder / CIFAR10_ARCHIVE.rpartition("/")[2]
    for path in (archive, folder.parent / archive.name):
        if path.is_file():  # the user has put it there
            return _unpack(path, missing, folder)
    advice = ADVICE
    for place in (folder, folder.parent):
        if (place / "cifar-10-batches-py").is_dir():
            advice += (
                f"; {place / 'cifar-10-batches-py'} holds pickles, which are not read, for they can run any program: "
                "the binary version is needed"
            )
    download([CIFAR10_ARCHIVE], archive, lambda path: _unpack(path, missing, folder), advice)
    archive.unlink()


def _unpack(archive: Path, files: list[File], folder: Path) -> None:
    """Extract members of the CIFAR-10 archive by name; nothing else in it is written."""
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


def _mean_and_deviation(pixels: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64, of uint8 pixels that stand for `values`, (256,) float64."""
    counts = pixels.flatten().bincount(minlength=256).double()
    share = counts / counts.sum()
    mean = share @ values
    return mean, (share @ (values - mean).square()).sqrt()


def pixel_deviation(images: Tensor) -> float:
    """Standard deviation of all pixels on the scale of -1 to 1, rounded to 4 digits; the same on any machine.

    Args:
        images: uint8, of any shape.
    """
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    return round(float(_mean_and_deviation(images, values)[1]), 4)


def training_batch(images: Tensor, indices: Tensor, horizontal_flip: bool, generator: torch.Generator) -> Tensor:
    """Gather the batch x_0 on the device of the images, with random horizontal flips if asked for.

    Args:
        images: (N, C, H, W) uint8.
        indices: (B,) int64, on the same device.
        generator: of that device; draws one bit per image with horizontal_flip.
    Returns:
        (B, C, H, W) float32 in [-1, 1].
    """
    batch = images[indices]
    if horizontal_flip:
        flipped = torch.rand(len(batch), generator=generator, device=images.device) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    return to_float(batch)


def describe(dataset: str, data_dir: Path | None = None) -> list[str]:
    """Lines of text with counts, sizes, means, standard deviations and hashes of both splits, from the files.

    Raises:
        InputError: as `load_images`.
    """
    lines = []
    for split in ("train", "test"):
        loaded = load_images(dataset, split, data_dir)
        N, C, H, W = loaded.images.shape
        values = torch.arange(256, dtype=torch.float64)
        moments = [_mean_and_deviation(channel, values) for channel in loaded.images.unbind(1)]
        means, deviations = (" ".join(f"{number:.4f}" for number in numbers) for numbers in zip(*moments, strict=True))
        lines.append(
            f"{loaded.name}: {N} images of {C} x {H} x {W}, uint8; mean {means}, standard deviation {deviations}"
        )
        if loaded.labels is not None:
            counts = zip(CLASS_NAMES[dataset], loaded.labels.bincount().tolist(), strict=True)
            lines.append(f"  images of each class: {', '.join(f'{name} {count}' for name, count in counts)}")
        lines.append(f"  SHA-256 of the images: {loaded.sha256}")
        lines += [f"  verified {file.sha256}  {file.name}" for file in OFFICIAL_FILES.get((dataset, split), ())]
    return lines

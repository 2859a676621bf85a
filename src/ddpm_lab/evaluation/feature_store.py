"""Features of images, computed once and kept in the cache under the hashes of the images and of the network.

Extraction appends to files batch by batch and continues where it was stopped. Features are read as mapped memory, so
neither computing nor using them needs memory that grows with the number of images.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ddpm_lab.core import processes
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import (
    TEMPORARY_PREFIX,
    acquire_lock,
    atomic_file,
    cache_dir,
    cache_writable,
    move,
    replace_atomically,
)
from ddpm_lab.core.progress import progress
from ddpm_lab.data.image_stream import ImageStream, ahead, chunk_size
from ddpm_lab.evaluation.features import FeatureNetwork
from ddpm_lab.evaluation.metrics import Statistics, statistics

FEATURES, LOGITS, META, STATISTICS = "features.f32", "logits.f32", "meta.json", "statistics.npz"
ABSENT_OR_DAMAGED = (OSError, ValueError, KeyError, TypeError)  # what reading such a folder raises


@dataclass(frozen=True)
class Features:
    """Features of some images.

    Attributes:
        values: (N, d) float32, mapped from a file.
        logits: (N, K) float32, mapped from a file, or None.
        folder: the folder in the cache; None: they are not kept.
    """

    values: Tensor
    logits: Tensor | None
    folder: Path | None

    def statistics(self) -> Statistics:
        """Mean, covariance and its factor; kept beside the features for the next call."""
        if self.folder is None:
            return statistics(self.values)
        path = self.folder / STATISTICS
        try:
            with np.load(path, allow_pickle=False) as arrays:
                kept = Statistics(len(self.values), *(torch.from_numpy(arrays[name]) for name in ("mean", "cov")))
                vars(kept)["factor"] = torch.from_numpy(arrays["factor"])
                return kept
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent or damaged
            computed = statistics(self.values)
            if os.access(self.folder, os.W_OK):
                with atomic_file(path) as temporary, temporary.open("wb") as stream:
                    arrays = {name: getattr(computed, name).numpy() for name in ("mean", "cov", "factor")}
                    np.savez(stream, **arrays)
            return computed


def features_of(images: ImageStream, network: FeatureNetwork, keep: bool = True) -> Features:
    """Features and logits of all images by one network; see `features_of_each`."""
    return features_of_each(images, [network], keep)[0]


def features_of_each(images: ImageStream, networks: Sequence[FeatureNetwork], keep: bool = True) -> list[Features]:
    """Features and logits of all images by each network, from the cache where they are known.

    The images are read once for all networks whose features are not known. With several processes the list of networks
    is that of `compute_item`.

    Args:
        images: (C, H, W) uint8 each.
        networks: the feature networks, each a different one.
        keep: whether to keep the features in the cache; those of a network that is not persistent are never kept.
    Raises:
        InputError: images that a network does not take, features that are not finite, or a cache that cannot be
            written.
    """
    for network in networks:
        network.check(images.name, images.shape)
    store = cache_dir() / "features"
    folders = [_folder(store, images, network) if keep and network.persistent else None for network in networks]
    with cache_writable(), ExitStack() as held:
        known = [_known(folder, images) for folder in folders]  # without a lock: this user may be unable to write
        if None in known:
            store.mkdir(parents=True, exist_ok=True)
            absent = {folder for folder, features in zip(folders, known, strict=True) if folder and not features}
            for folder in sorted(absent):  # in one order, so that no two processes wait for each other
                held.enter_context(acquire_lock(store / f".{folder.name}.lock"))  # the second finds the features
            known = [features or _known(folder, images) for folder, features in zip(folders, known, strict=True)]
            missing = {i: folders[i] for i, features in enumerate(known) if features is None}
            computed = _compute(images, networks, missing, store)
            known = [features or computed[i] for i, features in enumerate(known)]
        return [features for features in known if features is not None]


def compute_item(networks: Sequence[FeatureNetwork], item: tuple[int, Tensor]) -> tuple[int, Tensor, Tensor | None]:
    """The task "features" of several processes: the features and logits of a batch by one of the networks.

    Args:
        networks: the feature networks.
        item: the index of one, and images, (B, C, H, W) uint8.
    """
    index, batch = item
    return index, *networks[index](batch)


def _folder(store: Path, images: ImageStream, network: FeatureNetwork) -> Path:
    return store / hashlib.sha256(f"{images.sha256} {network.key}".encode()).hexdigest()[:40]


def _known(folder: Path | None, images: ImageStream) -> Features | None:
    """The features in a folder of the cache; None: there are none, or they are damaged."""
    with suppress(*ABSENT_OR_DAMAGED):
        return _open(folder, images.num_images) if folder is not None else None
    return None


def _open(folder: Path, num_images: int) -> Features:
    meta = json.loads((folder / META).read_text())
    shape = num_images, meta["num_features"], meta["num_classes"]
    return _mapped(folder / FEATURES, folder / LOGITS, *shape, folder)


def _mapped(
    values: Path | IO[bytes],
    logits: Path | IO[bytes],
    num_images: int,
    num_features: int,
    num_classes: int,
    folder: Path | None = None,
) -> Features:
    def rows(file: Path | IO[bytes], columns: int) -> Tensor:
        return torch.from_numpy(np.memmap(file, np.float32, "c", shape=(num_images, columns)))

    return Features(rows(values, num_features), rows(logits, num_classes) if num_classes else None, folder)


@dataclass
class _Files:
    """The files that the features of one network are appended to.

    Attributes:
        values, logits: the files.
        folder: the folder that is renamed once they are complete; None: they have no name, and the system removes them
            with the last use, however the process ends.
        start: how many images' features an earlier call left.
    """

    values: IO[bytes]
    logits: IO[bytes]
    folder: Path | None = None
    start: int = 0


def _compute(
    images: ImageStream, networks: Sequence[FeatureNetwork], folders: dict[int, Path | None], store: Path
) -> dict[int, Features]:
    """Features by some of the networks, in one pass over the images; the folders are by the index of the network."""
    results, shapes = {}, {}
    with ExitStack() as closing:
        files = {i: _files(images, folder, store, closing) for i, folder in folders.items()}
        starts = {i: file.start for i, file in files.items()}
        for i, features, logits in _computed(images, networks, starts):
            file, shapes[i] = files[i], (features.shape[1], 0 if logits is None else logits.shape[1])
            if file.folder is not None and file.values.tell() == 0:
                meta = dict(zip(("num_features", "num_classes"), shapes[i], strict=True))
                text = json.dumps({**meta, "network": networks[i].name, "images": images.name}, indent=2) + "\n"
                replace_atomically(file.folder / META, text.encode())
            _append(file.logits, logits)
            _append(file.values, features)
        for i, file in files.items():
            if file.folder is None:
                results[i] = _mapped(file.values, file.logits, images.num_images, *shapes[i])
    for i, folder in folders.items():
        if folder is not None and (temporary := files[i].folder) is not None:
            move(temporary, folder)
            results[i] = _open(folder, images.num_images)
    return results


def _files(images: ImageStream, folder: Path | None, store: Path, closing: ExitStack) -> _Files:
    if folder is None:
        return _Files(closing.enter_context(TemporaryFile(dir=store)), closing.enter_context(TemporaryFile(dir=store)))
    shutil.rmtree(folder, ignore_errors=True)  # it is damaged
    temporary = folder.with_name(TEMPORARY_PREFIX + folder.name)
    temporary.mkdir(exist_ok=True)
    start = _resumable_rows(temporary, chunk_size(images.shape))
    values, logits = (closing.enter_context((temporary / name).open("ab")) for name in (FEATURES, LOGITS))
    return _Files(values, logits, temporary, start)


def _append(file: IO[bytes], rows: Tensor | None) -> None:
    if rows is not None:
        file.write(rows.numpy().tobytes())
        file.flush()


def _computed(
    images: ImageStream, networks: Sequence[FeatureNetwork], starts: dict[int, int]
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The results of `compute_item` batch by batch, for the images from the start of each network on."""
    task, total, start = partial(compute_item, networks), images.num_images * len(starts), sum(starts.values())
    with progress(f"features of {images.name}", total, "images", start) as advance:
        items = ahead(_items(images, networks, starts))
        for i, features, logits in processes.map_across_ranks("features", task, items):
            if not bool(features.isfinite().all()):
                raise InputError(f"features {networks[i].name} of {images.name} are not finite")
            yield i, features, logits
            advance(len(features))


def _items(
    images: ImageStream, networks: Sequence[FeatureNetwork], starts: dict[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Batches for each network, chunk by chunk of the images, so that each image is read once."""
    first = 0
    for chunk in images.batches():
        for i, start in starts.items():
            if start < first + len(chunk):
                for batch in torch.split(chunk[max(start - first, 0) :], networks[i].batch_size):
                    yield i, batch.clone()  # to another process a view would be sent with the whole chunk
        first += len(chunk)


def _resumable_rows(partial: Path, chunk: int) -> int:
    """The rows that an earlier extraction left, rounded down to whole chunks; the files are cut off behind them."""
    try:
        meta = json.loads((partial / META).read_text())
        widths = {FEATURES: int(meta["num_features"]), LOGITS: int(meta["num_classes"])}
        rows = min((partial / name).stat().st_size // (4 * width) for name, width in widths.items() if width)
        rows = rows // chunk * chunk
    except ABSENT_OR_DAMAGED:
        widths, rows = {FEATURES: 0, LOGITS: 0}, 0
    for name, width in widths.items():
        (partial / name).touch()
        os.truncate(partial / name, 4 * rows * width)
    return rows

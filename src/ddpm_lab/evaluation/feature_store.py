"""Features of images, computed once and kept in the cache under the hashes of the images and of the network.

Extraction appends to files batch by batch and continues where it was stopped. Features are read as mapped memory, so
neither computing nor using them needs memory that grows with the number of images.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    """Features and logits of all images, from the cache where they are known.

    Args:
        images: (C, H, W) uint8 each.
        network: the feature network.
        keep: whether to keep them in the cache; those of a network that is not persistent are never kept.
    Raises:
        InputError: images that the network does not take, features that are not finite, or a cache that cannot be
            written.
    """
    network.check(images.name, images.shape)
    store = cache_dir() / "features"
    key = hashlib.sha256(f"{images.sha256} {network.key}".encode()).hexdigest()[:40]
    folder = store / key
    with cache_writable():
        if not (keep and network.persistent):
            store.mkdir(parents=True, exist_ok=True)
            return _transient_features(images, network, store)
        with suppress(*ABSENT_OR_DAMAGED):
            return _open(folder, images.num_images)  # without a lock: this user may not be able to write the cache
        store.mkdir(parents=True, exist_ok=True)
        with acquire_lock(store / f".{key}.lock"):  # a second process waits, and finds the features
            with suppress(*ABSENT_OR_DAMAGED):
                return _open(folder, images.num_images)
            shutil.rmtree(folder, ignore_errors=True)
            _extract(images, network, folder)
            return _open(folder, images.num_images)


def _open(folder: Path, num_images: int) -> Features:
    meta = json.loads((folder / META).read_text())
    classes = meta["num_classes"]
    return Features(
        values=_mapped(folder / FEATURES, num_images, meta["num_features"]),
        logits=_mapped(folder / LOGITS, num_images, classes) if classes else None,
        folder=folder,
    )


def _mapped(file: Path | IO[bytes], rows: int, columns: int) -> Tensor:
    return torch.from_numpy(np.memmap(file, np.float32, "c", shape=(rows, columns)))


def _transient_features(images: ImageStream, network: FeatureNetwork, store: Path) -> Features:
    """Features in files without a name, which the system removes with the last use, however the process ends."""
    with TemporaryFile(dir=store) as values_file, TemporaryFile(dir=store) as logits_file:
        for features, logits in _computed(images, network, 0):
            _append(values_file, features)
            _append(logits_file, logits)
        values = _mapped(values_file, images.num_images, features.shape[1])
        return Features(values, None if logits is None else _mapped(logits_file, len(values), logits.shape[1]), None)


def _extract(images: ImageStream, network: FeatureNetwork, folder: Path) -> None:
    """Append features batch by batch in a temporary folder, which is renamed once it holds all."""
    partial = folder.with_name(TEMPORARY_PREFIX + folder.name)
    partial.mkdir(exist_ok=True)
    start = _resumable_rows(partial, chunk_size(images.shape))
    with (partial / FEATURES).open("ab") as values_file, (partial / LOGITS).open("ab") as logits_file:
        for features, logits in _computed(images, network, start):
            if values_file.tell() == 0:
                meta = {
                    "num_features": features.shape[1],
                    "num_classes": 0 if logits is None else logits.shape[1],
                    "network": network.name,
                    "images": images.name,
                }
                replace_atomically(partial / META, (json.dumps(meta, indent=2) + "\n").encode())
            _append(logits_file, logits)
            _append(values_file, features)
    partial.rename(folder)


def _append(file: IO[bytes], rows: Tensor | None) -> None:
    if rows is not None:
        file.write(rows.numpy().tobytes())
        file.flush()


def _computed(images: ImageStream, network: FeatureNetwork, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Features and logits of the images from `start` on, batch by batch; `start` is a whole number of chunks."""
    batches = (batch for chunk in images.batches() for batch in torch.split(chunk, network.batch_size))
    skipped = 0
    while skipped < start:
        skipped += len(next(batches))
    with progress(f"features of {images.name}", images.num_images, "images", start=start) as advance:
        for features, logits in processes.map_across_ranks("features", network, ahead(batches)):
            if not bool(features.isfinite().all()):
                raise InputError(f"features {network.name} of {images.name} are not finite")
            yield features, logits
            advance(len(features))


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

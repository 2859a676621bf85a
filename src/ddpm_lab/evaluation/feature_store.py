"""Features computed once: kept in the cache under the hash of the images and of the network.

Extraction appends to files as it goes and goes on where it was stopped; features are read back as mapped memory, so
that neither making nor using them needs memory that grows with the number of images.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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

ABANDONED = 2 * 86_400.0  # seconds after which features that were not to be kept belong to nobody
FEATURES, LOGITS, META, STATISTICS = "features.f32", "logits.f32", "meta.json", "statistics.npz"


@dataclass(frozen=True)
class Features:
    """What a network sees in some images.

    Attributes:
        values: (N, d) float32, mapped from a file.
        logits: (N, K) float32, mapped from a file, or None.
        folder: where they lie.
    """

    values: Tensor
    logits: Tensor | None
    folder: Path

    def statistics(self) -> Statistics:
        """Mean, covariance and its factor, kept beside the features for the next time."""
        path = self.folder / STATISTICS
        try:
            with np.load(path, allow_pickle=False) as held:
                found = Statistics(len(self.values), *(torch.from_numpy(held[name]) for name in ("mean", "cov")))
                vars(found)["factor"] = torch.from_numpy(held["factor"])
                return found
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, or damaged: made anew
            made = statistics(self.values)
            if not self.folder.is_dir() or not os.access(self.folder, os.W_OK):
                return made
            with atomic_file(path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, mean=made.mean.numpy(), cov=made.cov.numpy(), factor=made.factor.numpy())
            return made


def features_of(images: ImageStream, network: FeatureNetwork, keep: bool = True) -> Features:
    """Features and logits of all images, from the cache where they are known.

    Args:
        keep: whether they go into the cache; never those of a network that is not persistent.
    Raises:
        InputError: images the network was not made for, or features that are not finite.
    """
    network.check(images.name, images.shape)
    with cache_writable():
        return _features_of(images, network, keep)


def _features_of(images: ImageStream, network: FeatureNetwork, keep: bool) -> Features:
    store = cache_dir() / "features"
    key = hashlib.sha256(f"{images.sha256} {network.key}".encode()).hexdigest()[:40]
    if keep and network.persistent:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return _open(store / key, images.num_images)  # also from a cache that this user cannot write
    store.mkdir(parents=True, exist_ok=True)
    if not (keep and network.persistent):
        _sweep(store)
        passing = store / f".passing-{uuid.uuid4().hex}"
        try:
            _extract(images, network, passing)
            return _open(passing, images.num_images)
        finally:  # what is mapped stays readable without its name
            for left in store.glob(f"*{passing.name}"):
                shutil.rmtree(left, ignore_errors=True)
    folder = store / key
    with acquire_lock(folder.with_name(f".{key}.lock")):  # a second process waits, and finds them there
        try:
            return _open(folder, images.num_images)
        except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged
            shutil.rmtree(folder, ignore_errors=True)
            _extract(images, network, folder)
            return _open(folder, images.num_images)


def _sweep(store: Path) -> None:
    """Remove what a process that was killed had not meant to keep."""
    for left in store.glob("*.passing-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _open(folder: Path, num_images: int) -> Features:
    meta = json.loads((folder / META).read_text())
    classes = meta["num_classes"]
    return Features(
        values=_mapped(folder / FEATURES, num_images, meta["num_features"]),
        logits=_mapped(folder / LOGITS, num_images, classes) if classes else None,
        folder=folder,
    )


def _mapped(path: Path, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(rows, columns)))


def _extract(images: ImageStream, network: FeatureNetwork, folder: Path) -> None:
    """Append features batch by batch in a temporary folder, which takes its name once all are there."""
    partial = folder.with_name(TEMPORARY_PREFIX + folder.name)
    partial.mkdir(exist_ok=True)
    done = _rows_done(partial, chunk_size(images.shape))
    waiting = (batch for chunk in images.batches() for batch in torch.split(chunk, network.batch_size))
    position = 0
    while position < done:  # whole chunks, so whole batches
        position += len(next(waiting))
    with (
        (partial / FEATURES).open("ab") as features_file,
        (partial / LOGITS).open("ab") as logits_file,
        progress(f"features of {images.name}", images.num_images, "images", start=done) as advance,
    ):
        for features, logits in processes.map_across_ranks("features", network, ahead(waiting)):
            if not bool(features.isfinite().all()):
                raise InputError(f"features {network.name} of {images.name} are not finite")
            if position == 0:
                meta = {
                    "num_features": features.shape[1],
                    "num_classes": 0 if logits is None else logits.shape[1],
                    "network": network.name,
                    "images": images.name,
                }
                replace_atomically(partial / META, (json.dumps(meta, indent=2) + "\n").encode())
            if logits is not None:
                logits_file.write(logits.numpy().tobytes())
                logits_file.flush()
            features_file.write(features.numpy().tobytes())
            features_file.flush()
            position += len(features)
            advance(len(features))
    partial.rename(folder)


def _rows_done(partial: Path, chunk: int) -> int:
    """Whole chunks of images an earlier extraction left behind; what is beyond them is cut off."""
    try:
        meta = json.loads((partial / META).read_text())
        widths = {FEATURES: int(meta["num_features"]), LOGITS: int(meta["num_classes"])}
        rows = min((partial / name).stat().st_size // (4 * width) for name, width in widths.items() if width)
        rows = rows // chunk * chunk
    except (OSError, ValueError, KeyError, TypeError):
        widths, rows = {FEATURES: 0, LOGITS: 0}, 0
    for name, width in widths.items():
        (partial / name).touch()
        os.truncate(partial / name, 4 * rows * width)
    return rows

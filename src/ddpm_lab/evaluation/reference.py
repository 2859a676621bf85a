"""What images are compared with: real images, or statistics of their features."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ddpm_lab.core.errors import InputError, require
from ddpm_lab.data.image_stream import ImageStream, array_header, image_array_of, open_images, readable
from ddpm_lab.evaluation.metrics import Statistics
from ddpm_lab.evaluation.record import ReferenceImages

MAX_FEATURES = 4096  # of statistics from a file: sigma grows with the square
MIN_IMAGES = 4  # precision and recall use the third neighbour of each image


@dataclass(frozen=True)
class Reference:
    """What images are compared with: images or statistics.

    Attributes:
        name: as the user named it.
        images: the reference images; None: only statistics are known.
        given: statistics from a file, or None.
        sha256: SHA-256 of the images' shape and pixels, or of the file.
        held_out: real images outside the reference that were held out of training on a folder; None for a known data
            set, where the other split takes their place.
    """

    name: str
    images: ImageStream | None
    given: Statistics | None
    sha256: str
    held_out: ImageStream | None = None

    def others(self, data_dir: Path | None) -> ImageStream | None:
        """All known real images outside the reference, or None."""
        if self.images is None or self.images.dataset is None:
            return self.held_out
        return open_images(f"{self.images.dataset}:{'test' if self.images.split == 'train' else 'train'}", data_dir)

    def floor(self, num_images: int, data_dir: Path | None) -> ImageStream | None:
        """At most num_images images drawn from `others`, to be scored as a floor; None where there are too few."""
        others = self.others(data_dir)
        if others is None or others.num_images < MIN_IMAGES:
            return None
        return others.draw(min(num_images, others.num_images))

    def record(self) -> ReferenceImages:
        """The reference as a record names it."""
        split = {name: getattr(self.images, name, None) for name in ("dataset", "split", "num_images")}
        return cast(ReferenceImages, {"name": self.name, **split, "sha256": self.sha256})


def open_reference(
    name: str, data_dir: Path | None = None, image_size: int | None = None, channels: int | None = None
) -> Reference:
    """Open a reference.

    Args:
        name: as for `open_images`; or an .npz of statistics, `mu` (d,) and `sigma` (d, d), as others publish them.
        data_dir, image_size, channels: as for `open_images`.
    Raises:
        InputError: no such images, images that cannot be read, or statistics that are not valid.
    """
    given = _read_statistics(Path(name)) if name.endswith(".npz") and Path(name).is_file() else None
    if given is not None:
        return Reference(name, None, given, hashlib.sha256(Path(name).read_bytes()).hexdigest())
    images = open_images(name, data_dir, image_size, channels)
    return Reference(name, images, None, images.sha256)


def _read_statistics(path: Path) -> Statistics | None:
    """Statistics in an .npz; None where it holds images or something else."""
    with readable(path), zipfile.ZipFile(path) as archive:
        if image_array_of(archive) is not None or not {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
            return None
        (mean_shape, _, mean_type), (shape, _, dtype) = (array_header(archive, n, str(path)) for n in ("mu", "sigma"))
    require(
        mean_type.kind == dtype.kind == "f" and len(mean_shape) == 1 and shape == mean_shape * 2,
        f"{path}: mu and sigma are no statistics: they must be (d,) and (d, d), floating-point numbers, not "
        f"{mean_type} {mean_shape} and {dtype} {shape}",
    )
    require(mean_shape[0] <= MAX_FEATURES, f"{path} has {mean_shape[0]} features; at most {MAX_FEATURES} are read")
    with readable(path), np.load(path, allow_pickle=False) as arrays:
        mean, cov = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    try:
        result = Statistics(None, mean, cov)
    except InputError as error:
        raise InputError(f"{path}: mu and sigma are no statistics: {error}") from error
    symmetric = torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-8) and bool((cov.diagonal() >= 0).all())
    require(symmetric, f"{path}: sigma is no covariance: it must be symmetric, with no negative variance")
    lowest, highest = (float(torch.linalg.eigvalsh(cov)[index]) for index in (0, -1))
    require(lowest >= -1e-6 * highest, f"{path}: sigma is no covariance: it has an eigenvalue of {lowest:.3g}")
    return result

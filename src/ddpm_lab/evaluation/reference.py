"""What generated images are compared with: real images, or statistics that others published."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_lab.core.errors import InputError
from ddpm_lab.data.image_stream import ImageStream, array_header, image_array_of, open_images, readable
from ddpm_lab.evaluation.metrics import Statistics

MOST_FEATURES = 4096  # of statistics from a file: sigma grows with the square
MIN_IMAGES = 4  # images that are compared: precision and recall look at the third neighbour of each


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        name: as the user named it.
        images: or None, where only statistics are known.
        given: statistics from a file, or None.
        sha256: of the images' pixels, or of the file.
        held_out: real images that are not in the reference, where they are not the other split of a known data set:
            those that were kept from training on a folder.
    """

    name: str
    images: ImageStream | None
    given: Statistics | None
    sha256: str
    held_out: ImageStream | None = None

    def others(self, data_dir: Path | None) -> ImageStream | None:
        """Real images that are not in the reference, all of them, or None where none are known."""
        if self.images is None or self.images.dataset is None:
            return self.held_out
        return open_images(f"{self.images.dataset}:{'test' if self.images.split == 'train' else 'train'}", data_dir)

    def floor(self, num_images: int, data_dir: Path | None) -> ImageStream | None:
        """Those of `others` that are scored as the images are, or None where there are too few."""
        others = self.others(data_dir)
        if others is None or others.num_images < MIN_IMAGES:
            return None
        return others.draw(min(num_images, others.num_images))


def open_reference(
    name: str, data_dir: Path | None = None, image_size: int | None = None, channels: int | None = None
) -> Reference:
    """Open a reference.

    Args:
        name: see `open_images`; or an .npz of statistics, `mu` (d,) and `sigma` (d, d), as others publish them.
        data_dir, image_size, channels: see `open_images`.
    Raises:
        InputError: no such images, or unreadable ones; statistics that are none.
    """
    given = _read_statistics(Path(name)) if name.endswith(".npz") and Path(name).is_file() else None
    if given is not None:
        return Reference(name, None, given, hashlib.sha256(Path(name).read_bytes()).hexdigest())
    images = open_images(name, data_dir, image_size, channels)
    return Reference(name, images, None, images.sha256)


def _read_statistics(path: Path) -> Statistics | None:
    """Statistics in an .npz, or None where it holds something else, or images as well."""
    with readable(path), zipfile.ZipFile(path) as archive:
        if image_array_of(archive) is not None or not {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
            return None
        (mean_shape, _, mean_type), (shape, _, dtype) = (array_header(archive, n, str(path)) for n in ("mu", "sigma"))
        if {mean_type.kind, dtype.kind} != {"f"} or len(mean_shape) != 1 or shape != mean_shape * 2:
            raise InputError(
                f"{path}: mu and sigma are no statistics: they must be (d,) and (d, d), floating-point numbers, not "
                f"{mean_type} {mean_shape} and {dtype} {shape}"
            )
        if mean_shape[0] > MOST_FEATURES:
            raise InputError(f"{path} has statistics of {mean_shape[0]} features; {MOST_FEATURES} are the most")
    with readable(path), np.load(path, allow_pickle=False) as held:
        mean, cov = (torch.from_numpy(np.asarray(held[name], np.float64)) for name in ("mu", "sigma"))
    try:
        found = Statistics(None, mean, cov)
    except InputError as error:
        raise InputError(f"{path}: mu and sigma are no statistics: {error}") from error
    if not torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-8) or bool((cov.diagonal() < 0).any()):
        raise InputError(f"{path}: sigma is no covariance: it must be symmetric, with no negative variance")
    eigenvalues = torch.linalg.eigvalsh(cov)
    if float(eigenvalues[0]) < -1e-6 * float(eigenvalues[-1]):
        raise InputError(f"{path}: sigma is no covariance: it has an eigenvalue of {float(eigenvalues[0]):.3g}")
    return found

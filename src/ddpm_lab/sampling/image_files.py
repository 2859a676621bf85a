"""Write images to files: grids as PNG, sets as .npz; a file appears only once it is complete.

In memory images are uint8 (N, C, H, W), as everywhere; files hold them channels last, as other tools expect.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import atomic_file, temporary_path


def image_grid(images: Tensor, columns: int | None = None, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Arrange images in rows.

    Args:
        images: (N, C, H, W) uint8, C of 1 or 3.
        columns: images per row; None: those of the smallest square grid that holds all images.
        scale: how often each pixel is repeated, in both directions.
        gap: white pixels between images, before scaling.
    Returns:
        (height, width) uint8 for grey images, (height, width, 3) for colour.
    """
    N, C, H, W = images.shape
    columns = min(columns or int(np.ceil(N**0.5)), N)
    rows = -(-N // columns)
    canvas = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, C), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = index // columns * (H + gap), index % columns * (W + gap)
        canvas[top : top + H, left : left + W] = image
    canvas = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    return canvas[:, :, 0] if C == 1 else canvas


def image_array(image: Tensor) -> np.ndarray:
    """Convert one image, (C, H, W) uint8, to a picture: (H, W) for grey, (H, W, 3) for colour."""
    picture = image.permute(1, 2, 0).cpu().numpy()
    return picture[:, :, 0] if picture.shape[2] == 1 else picture


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture, (H, W) or (H, W, 3) uint8, as PNG; an old file stays until the new one is complete."""
    from PIL import Image

    with atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)


def save_image(path: Path, image: Tensor) -> None:
    """Write one image, (C, H, W) uint8 on the CPU, as PNG; as `save_png`, but other threads run while it is encoded."""
    from torchvision.io import encode_png

    with atomic_file(path) as temporary:
        temporary.write_bytes(memoryview(encode_png(image).numpy()))


def save_npz(path: Path, batches: Iterable[Tensor], num_images: int, labels: Tensor | None = None) -> None:
    """Write batches to an .npz with an array `images`, (N, H, W, C) uint8; only one batch is in memory at a time.

    Args:
        path: an old file stays until the new one is complete.
        batches: (B, C, H, W) uint8.
        num_images: N, the number of images in all batches.
        labels: (N,) int64, written as a second array `labels`.
    Raises:
        ValueError: the batches do not hold `num_images` images.
    """
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        written = 0
        with archive.open("images.npy", "w", force_zip64=True) as stream:
            for batch in batches:
                array = np.ascontiguousarray(batch.permute(0, 2, 3, 1).cpu().numpy())
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *array.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(array.tobytes())
                written += len(array)
        if labels is not None:
            with archive.open("labels.npy", "w") as stream:
                np.lib.format.write_array(stream, labels.cpu().numpy(), allow_pickle=False)
        if written != num_images:
            raise ValueError(f"the batches hold {written} images, not {num_images}")


def check_writable(path: Path, endings: tuple[str, ...], option: str = "--out") -> None:
    """Check an output path before any work is done.

    Args:
        path: the file to be written.
        endings: the file name endings that are valid.
        option: the flag that named the path, for messages.
    Raises:
        InputError: the ending is not valid, the path is a folder, or its folder does not exist or cannot be written.
    """
    if path.suffix.lower() not in endings:
        raise InputError(f"{option} {path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: folder {path.parent} does not exist")
    try:
        probe = temporary_path(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror}") from error


def visible_scale(image_size: int, at_least: int = 56) -> int:
    """The smallest whole factor that enlarges images to `at_least` pixels a side."""
    return max(1, -(-at_least // image_size))

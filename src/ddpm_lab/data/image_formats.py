"""One picture from a file that nobody vouches for: named formats only, by content, as a person would see it.

Pillow opens some forty formats, and a few of them start other programs (Ghostscript for EPS) whatever the file is
called. Here only the formats below are ever asked, and each by its content.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ddpm_lab.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

NAMED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif",
)  # fmt: skip
MOST_PIXELS = 2**26  # of one picture, 8192 x 8192: decoded it takes three to four bytes each
BACKGROUND = "white"  # what is seen through transparent pixels


class NoPicture(InputError):
    """The file is of none of the named formats."""


def formats() -> tuple[str, ...]:
    """The named formats that this Pillow can read (AVIF is not in every build)."""
    from PIL import Image

    Image.init()  # before there are threads, for it fills tables
    return tuple(name for name in NAMED_FORMATS if name in Image.OPEN)


@contextmanager
def opened_picture(file: Path | IO[bytes], name: str, most_pixels: int = MOST_PIXELS) -> Iterator["Image.Image"]:
    """Open a picture: its header is read, its pixels when they are asked for.

    Args:
        name: what messages call it.
        most_pixels: a larger one is refused by its header.
    Raises:
        NoPicture: none of the named formats.
        InputError: it cannot be read, then or in the midst of what is done with it, or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats()) as opened:
            if opened.width * opened.height > most_pixels:
                size = f"{opened.width} x {opened.height}"
                raise InputError(f"{name} has {size} pixels; {most_pixels:,} are the most")
            yield opened
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise NoPicture(f"{name} cannot be read: it is no {', '.join(formats()[:-1])} or {formats()[-1]}") from error
    except Exception as error:  # of as many kinds as there are formats and faults
        raise InputError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


def as_seen(picture: "Image.Image") -> "Image.Image":
    """The picture as a person sees it, of mode L where it is grey and RGB where it is in colour.

    Turned as its camera meant it; transparent pixels over white; sixteen bits scaled to eight; of several frames the
    first. Grey is what has three equal planes, whatever the format calls it.

    Raises:
        ValueError: pixels that are no numbers from 0 to 255 or 65,535.
    """
    from PIL import Image

    picture = _upright(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range it does not say")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture)
    if picture.mode in ("1", "L"):
        return picture.convert("L")
    picture = picture.convert("RGB")
    planes = np.asarray(picture)
    grey = np.array_equal(planes[..., 0], planes[..., 1]) and np.array_equal(planes[..., 0], planes[..., 2])
    return picture.getchannel(0) if grey else picture


def _upright(picture: "Image.Image") -> "Image.Image":
    """Turned as its camera meant it; as it lies where what it says of itself is damaged."""
    from PIL import ImageOps

    picture.load()  # outside: a second try to read damaged pixels would give black ones and no error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever damaged metadata makes Pillow raise
        return picture

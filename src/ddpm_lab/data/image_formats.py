"""One picture from an untrusted file: a few formats, identified by content, converted to what a viewer shows.

Pillow opens some forty formats, and a few of them start other programs (Ghostscript for EPS) whatever the file is
called. Here only the formats below are ever tried, each by the content of the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
MOST_PIXELS = 2**26  # 8192 x 8192 in one picture; decoded, each takes three to four bytes
BACKGROUND = "white"  # behind transparent pixels


class NotAnImage(InputError):
    """The file has none of the named formats."""


def formats() -> tuple[str, ...]:
    """The named formats that the installed Pillow can read (AVIF is not in every build)."""
    from PIL import Image

    Image.init()  # fills tables, so it must come before any threads
    return tuple(name for name in NAMED_FORMATS if name in Image.OPEN)


@contextmanager
def open_picture(file: Path | IO[bytes], name: str, most_pixels: int = MOST_PIXELS) -> Iterator["Image.Image"]:
    """Open a picture: its header is read now, its pixels when they are used.

    Args:
        name: the name of the picture in messages.
        most_pixels: a picture with more pixels is refused before it is decoded.
    Raises:
        NotAnImage: the file has none of the named formats.
        InputError: the picture is too large, or cannot be read, now or when its pixels are used.
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
        raise NotAnImage(f"{name} cannot be read: it is not a file of {', '.join(formats())}") from error
    except Exception as error:  # each format raises its own kinds
        raise InputError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


def as_seen(picture: "Image.Image") -> "Image.Image":
    """The picture as a viewer shows it, in mode L if it is grey, else in mode RGB.

    The orientation of the camera is applied, transparent pixels become white, sixteen bits are scaled to eight, and of
    several frames the first is taken. A picture is grey if its three channels are equal, whatever its format says.

    Raises:
        ValueError: pixels that are not whole numbers from 0 to 255 or to 65,535.
    """
    from PIL import Image

    picture = _upright(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, BACKGROUND), picture)
    if picture.mode in ("1", "L"):
        return picture.convert("L")
    picture = picture.convert("RGB")
    red, green, blue = picture.split()
    is_grey = red.tobytes() == green.tobytes() == blue.tobytes()
    return red if is_grey else picture


def _upright(picture: "Image.Image") -> "Image.Image":
    """The picture in the orientation of the camera, or unchanged if its metadata are damaged."""
    from PIL import ImageOps

    picture.load()  # not within `try`: a second attempt to read damaged pixels returns black pixels and no error
    with suppress(Exception):  # whatever damaged metadata makes Pillow raise
        ImageOps.exif_transpose(picture, in_place=True)  # a copy of a large picture would take much memory
    return picture

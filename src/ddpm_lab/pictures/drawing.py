"""Pictures put together pixel for pixel: tables of images with captions, and curves beside them.

Images are enlarged by whole factors, without blur. All pictures are (height, width, 3) uint8 on white, so that they
look alike on light and on dark pages; colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, INK = (255, 255, 255), (32, 32, 32)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GAP, MARGIN, LINE = 2, 8, 16  # pixels between images, around panels, and from line to line of text
TEXT_SIZE, TITLE_SIZE = 12, 13
Picture = np.ndarray  # (height, width, 3) uint8


@cache
def font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    """The font of every picture: DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def enlarged(image: Tensor, scale: int) -> Picture:
    """One image, (C, H, W) uint8 with C of 1 or 3, every pixel repeated `scale` times each way."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)


def image_table(
    images: Tensor,
    *,
    scale: int = 1,
    title: str = "",
    row_labels: Sequence[str] = (),
    captions: Sequence[tuple[str, Sequence[str]]] = (),
    least_width: float = 0,
) -> Picture:
    """Images in rows and columns, with a title above, labels at the left and lines of captions under the columns.

    Args:
        images: (R, N, C, H, W) uint8, C of 1 or 3.
        scale: whole factor of enlargement.
        title: above; none where empty.
        row_labels: R of them, or none.
        captions: lines, each with what it is (at the left) and N texts; one text is for the line as a whole.
        least_width: pixels for images and captions, so that tables with other texts are as wide.
    """
    R, N, _, H, W = images.shape
    height, width = H * scale, W * scale
    names = [*row_labels, *(name for name, _ in captions)]
    left = MARGIN + (round(text_width(names)) + GAP * 2 if any(names) else 0)
    top = LINE + 4 if title else 0
    wide = left + max(N * (width + GAP) - GAP, round(least_width))
    wide = max(wide, MARGIN + round(text_width([title], TITLE_SIZE)))
    wide = max(wide, left + round(text_width(texts[0] for _, texts in captions if len(texts) == 1)))
    canvas = Image.new("RGB", (wide, top + R * (height + GAP) + LINE * len(captions)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, 0), title, INK, font(TITLE_SIZE))
    for row in range(R):
        y = top + row * (height + GAP)
        for column in range(N):
            canvas.paste(Image.fromarray(enlarged(images[row, column], scale)), (left + column * (width + GAP), y))
        if row_labels:
            draw.text((left - GAP * 2, y + height // 2), row_labels[row], INK, font(), anchor="rm")
    for index, (name, texts) in enumerate(captions):
        y = top + R * (height + GAP) + LINE * index + LINE // 2
        draw.text((left - GAP * 2, y), name, INK, font(), anchor="rm")
        if len(texts) == 1:
            draw.text((left, y), texts[0], INK, font(), anchor="lm")
            continue
        for column, text in enumerate(texts):
            size = TEXT_SIZE
            while size > 7 and font(size).getlength(text) > width:
                size -= 1
            draw.text((left + column * (width + GAP) + width // 2, y), text, INK, font(size), anchor="mm")
    return np.asarray(canvas)


def text_width(texts: Iterable[str], size: int = TEXT_SIZE) -> float:
    """Pixels that the longest of some texts takes."""
    return max((font(size).getlength(text) for text in texts), default=0.0)


def text_line(text: str) -> Picture:
    """A title of its own."""
    canvas = Image.new("RGB", (MARGIN + round(text_width([text], TITLE_SIZE)), LINE + 4), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, 0), text, INK, font(TITLE_SIZE))
    return np.asarray(canvas)


def side_by_side(pictures: Sequence[Picture], gap: int = MARGIN * 2) -> Picture:
    """Pictures from left to right, their tops in line."""
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, gap), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded, axis=1)[:, : -gap or None]


def stacked(pictures: Sequence[Picture], gap: int = MARGIN) -> Picture:
    """Pictures from top to bottom, their left edges in line."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, ((0, gap), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded)[: -gap or None]


def framed(picture: Picture, margin: int = MARGIN) -> Picture:
    """A picture with white around it."""
    return np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)


def rendered(figure: "Figure") -> Picture:
    """A matplotlib figure in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def printable(name: str) -> str:
    """A name as figures can draw it, though it be no text, as names of files need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def escape_mathtext(text: str) -> str:
    """A text that matplotlib draws as it stands: no mathematics between dollars, and in the legend whatever it begins
    with (what begins with an underscore it leaves out)."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def short_number(value: float) -> str:
    """A positive number in few characters: 12000, 310, 4.2, 0.016, 4e-05, ∞."""
    if value == float("inf"):
        return "∞"
    if 0.001 <= value < 100_000:
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
    return f"{value:.0e}"

"""Compose pictures: tables of images with captions, and pictures beside or above one another.

Images are enlarged by whole factors, without blur. All pictures are (height, width, 3) uint8 on a white background, so
that they look the same on light and dark pages. The colours are those of Okabe and Ito, which colour-blind readers can
tell apart.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_lab.sampling.image_files import visible_scale

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
    """One image, (C, H, W) uint8 with C of 1 or 3, with every pixel repeated `scale` times in both directions."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)


def image_table(
    images: Tensor,
    *,
    scale: int | None = None,
    title: str = "",
    row_labels: Sequence[str] = (),
    captions: Sequence[tuple[str, Sequence[str]]] = (),
    min_width: float = 0,
) -> Picture:
    """Images in rows and columns, with a title above, labels at the left and lines of captions below the columns.

    Args:
        images: (R, N, C, H, W) uint8, C of 1 or 3.
        scale: whole factor of enlargement; None: the smallest that gives 56 pixels or more.
        title: a line above the images; '' for none.
        row_labels: R labels, or none.
        captions: lines, each with a label at the left and N texts, one for each column; a single text belongs to the
            whole line.
        min_width: pixels for images and captions, so that tables with different texts get the same width.
    """
    R, N, _, H, W = images.shape
    scale = scale or visible_scale(W)
    height, width = H * scale, W * scale
    labels = [*row_labels, *(label for label, _ in captions)]
    left = MARGIN + (round(text_width(labels)) + GAP * 2 if any(labels) else 0)
    whole_lines = text_width(texts[0] for _, texts in captions if len(texts) == 1)
    inner_width = max(N * (width + GAP) - GAP, round(min_width), round(whole_lines))
    canvas = Image.new("RGB", (left + inner_width, R * (height + GAP) + LINE * len(captions)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row in range(R):
        y = row * (height + GAP)
        for column in range(N):
            canvas.paste(Image.fromarray(enlarged(images[row, column], scale)), (left + column * (width + GAP), y))
        if row_labels:
            draw.text((left - GAP * 2, y + height // 2), row_labels[row], INK, font(), anchor="rm")
    for index, (label, texts) in enumerate(captions):
        y = R * (height + GAP) + LINE * index + LINE // 2
        draw.text((left - GAP * 2, y), label, INK, font(), anchor="rm")
        if len(texts) == 1:
            draw.text((left, y), texts[0], INK, font(), anchor="lm")
            continue
        for column, text in enumerate(texts):
            size = TEXT_SIZE
            while size > 7 and font(size).getlength(text) > width:
                size -= 1
            draw.text((left + column * (width + GAP) + width // 2, y), text, INK, font(size), anchor="mm")
    table = np.asarray(canvas)
    return stacked([title_line(title, canvas.width), table], gap=0) if title else table


def text_width(texts: Iterable[str], size: int = TEXT_SIZE) -> float:
    """Width in pixels of the longest of some texts."""
    return max((font(size).getlength(text) for text in texts), default=0.0)


def title_line(text: str, min_width: int = 0) -> Picture:
    """A title as a picture of one line."""
    width = max(min_width, MARGIN + round(text_width([text], TITLE_SIZE)))
    canvas = Image.new("RGB", (width, LINE + 4), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, 0), text, INK, font(TITLE_SIZE))
    return np.asarray(canvas)


def side_by_side(pictures: Sequence[Picture], gap: int = MARGIN * 2) -> Picture:
    """Pictures from left to right, aligned at the top."""
    return stacked([picture.transpose(1, 0, 2) for picture in pictures], gap).transpose(1, 0, 2)


def stacked(pictures: Sequence[Picture], gap: int = MARGIN) -> Picture:
    """Pictures from top to bottom, aligned at the left."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, ((0, gap), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded)[: -gap or None]


def framed(picture: Picture) -> Picture:
    """A picture with a white margin."""
    return np.pad(picture, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)


def rendered(figure: "Figure") -> Picture:
    """A matplotlib figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def escape_mathtext(text: str) -> str:
    """A text that matplotlib draws as it is: dollars are no mathematics, and a leading underscore hides no legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def short_number(value: float) -> str:
    """A positive number in few characters: 12000, 310, 4.2, 0.016, 4e-05, ∞."""
    if value == float("inf"):
        return "∞"
    if 0.001 <= value < 100_000:
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
    return f"{value:.0e}"

"""Settings of pictures and films. Nothing here imports a drawing library, so that `ddpm --help` stays fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ddpm_lab.core.errors import require
from ddpm_lab.core.settings import Range, SettingsGroup

PICTURE_ENDINGS, FILM_ENDINGS = (".png",), (".gif", ".mp4")


def is_film(path: Path) -> bool:
    """Whether a file's name is that of a film, .gif or .mp4."""
    return path.suffix.lower() in FILM_ENDINGS


@dataclass(frozen=True, kw_only=True)
class PictureConfig(SettingsGroup):
    """Settings of a picture (.png) and of a film (.gif or .mp4)."""

    _grouped = False  # the flags are --scale, --columns and so on, without the name of a group
    scale: Annotated[int | None, Range(1, 16)] = None
    """whole factor by which images are enlarged, without blur; unset: to 56 pixels or more"""
    columns: int | None = None
    """columns of a picture, from one end of the chain to the other; unset: 11, or as many as there are states"""
    frames: Annotated[int | None, Range(2, 10_001)] = None
    """frames of a film, from one end of the chain to the other; unset: 101, or as many as there are states"""
    fps: Annotated[int, Range(1, 50)] = 20
    """frames per second, from 1 to 50"""
    hold: Annotated[float, Range(0, 60)] = 2.0
    """seconds for which a film shows its last frame, from 0 to 60"""

    def num_states(self, out: Path, available: int) -> int:
        """How many states of a chain a file shows: the frames of a film, or the columns of a picture.

        Args:
            out: the file to write.
            available: the number of states of the chain.
        Raises:
            InputError: the setting is below 2 or above `available`.
        """
        name, value, default = ("frames", self.frames, 101) if is_film(out) else ("columns", self.columns, 11)
        count = min(default, available) if value is None else value
        require(2 <= count <= available, f"{name} must be from 2 to {available}, the number of states, not {count}")
        return count


SHORT_FILM = PictureConfig(frames=31, fps=10, hold=2.0)  # a small file, for reports and downloads


def check_num_images(num_images: int) -> None:
    """Refuse a number of images that does not fit in one picture.

    Raises:
        InputError: it is not from 1 to 64.
    """
    require(1 <= num_images <= 64, f"num_images must be from 1 to 64 in one picture, not {num_images}")

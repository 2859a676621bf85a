"""Settings of pictures and films. Nothing here imports what draws, so that the command line answers at once."""

from dataclasses import dataclass
from typing import Annotated

from ddpm_lab.core.errors import require
from ddpm_lab.core.settings import Range, SettingsGroup


@dataclass(frozen=True, kw_only=True)
class PictureConfig(SettingsGroup):
    """How pictures look, and how films (.gif and .mp4) run."""

    _grouped = False  # its flags stand without a group
    scale: Annotated[int | None, Range(1, 16)] = None
    """whole factor by which images are enlarged, without blur; unset: to 56 pixels or more"""
    frames: Annotated[int | None, Range(2, 10_001)] = None
    """frames from one end of the chain to the other; unset: 101, or as many as there are states"""
    fps: Annotated[int, Range(1, 50)] = 20
    """frames per second, from 1 to 50"""
    hold: Annotated[float, Range(0, 60)] = 2.0
    """seconds that the last frame stays"""

    def num_frames(self, states: int) -> int:
        """How many frames there are, of a chain that has so many states.

        Raises:
            InputError: more frames than states.
        """
        frames = min(101, states) if self.frames is None else self.frames
        require(frames <= states, f"frames must be from 2 to {states}, one a state, not {frames}")
        return frames


COLUMNS = 11  # of a picture, unless told otherwise
SHORT_FILM = PictureConfig(frames=31, fps=10, hold=2.0)  # small enough to lie beside every generator


def num_columns(columns: int | None, states: int) -> int:
    """How many columns a picture has, of a chain that has so many states; None: 11, or as many as there are.

    Raises:
        InputError: fewer than 2, or more than states.
    """
    count = min(COLUMNS, states) if columns is None else columns
    require(2 <= count <= states, f"columns must be from 2 to {states}, the states there are, not {count}")
    return count

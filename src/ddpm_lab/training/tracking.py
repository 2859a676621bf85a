"""Experiment trackers, through accelerate: TensorBoard or Weights & Biases.

A tracker gets a copy of what `log.jsonl` and `scores.jsonl` hold; those are always written, and hold more.
"""

import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config, Tracker
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import replace_atomically

PROJECT = "ddpm-lab"  # in Weights & Biases
SCORES = ("fid", "inception_score_whole", "kid")


def check_tracker(tracker: Tracker) -> None:
    """Check that a tracker is installed, before a run is created.

    Raises:
        InputError: it is not; the message names the extra that installs it.
    """
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"evaluation.tracker {tracker} is not installed: pip install 'ddpm-lab[trackers]'")


class Tracking:
    """The tracker of a run; without one, and in processes other than rank 0, every method does nothing."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        """Start the tracker.

        Args:
            config: the run's; `evaluation.tracker` names the tracker.
            run_dir: TensorBoard writes to `tensorboard/` in it, Weights & Biases to `wandb/` (with WANDB_MODE=offline
                it stays off the network).
            step: steps done. TensorBoard drops what it got for later steps; Weights & Biases keeps what it got first.
        Raises:
            InputError: the tracker does not start.
        """
        self._tracker: Any = None
        self._kind = config.evaluation.tracker
        if self._kind == "none" or not processes.is_rank0():
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # accelerate's trackers read the rank from it
        if self._kind == "tensorboard":
            self._tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=step + 1)
        else:
            id_file = run_dir / ".wandb-id"  # stays with the run when its folder is moved
            if not id_file.is_file():
                replace_atomically(id_file, uuid.uuid4().hex[:16].encode())
            settings = {"name": run_dir.resolve().name, "dir": run_dir, "id": id_file.read_text(), "resume": "allow"}
            self._tracker = WandBTracker(PROJECT, **settings)
        try:
            self._tracker.start()
        except Exception as error:  # each tracker raises its own
            message = " ".join(str(error).split())
            raise InputError(f"evaluation.tracker {self._kind} does not start: {message}") from error
        if step == 0:
            settings = {
                f"{group}.{name}": v for group, values in config.to_dict().items() for name, v in values.items()
            }
            scalar = (bool, int, float, str)
            self._tracker.store_init_configuration(
                {name: v if isinstance(v, scalar) else json.dumps(v) for name, v in settings.items()}
            )

    def line(self, line: dict[str, Any]) -> None:
        """Send a line of log.jsonl: its numbers, and the loss in each band of timesteps."""
        if self._tracker is None:
            return
        values = {name: v for name, v in line.items() if isinstance(v, int | float) and name != "step"}
        bands = {f"loss_by_t/{band}": v for band, v in enumerate(line["loss_by_t"]) if v is not None}
        self._tracker.log(values | bands, step=line["step"])

    def score(self, record: dict[str, Any]) -> None:
        """Send the values of a record of scores.jsonl; the distance under its label."""
        if self._tracker is None:
            return
        labels = {name: record["fid_label"] if name == "fid" else name for name in SCORES if record[name] is not None}
        values = {f"scores/{label}": record[name]["value"] for name, label in labels.items()}
        self._tracker.log(values, step=record["step"])

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Send a picture, (H, W) or (H, W, 3) uint8."""
        if self._tracker is not None:
            colour = picture if picture.ndim == 3 else picture[:, :, None].repeat(3, axis=2)
            options = {"dataformats": "NHWC"} if self._kind == "tensorboard" else {}
            self._tracker.log_images({name: colour[None]}, step=step, **options)

    def film(self, name: str, path: Path, step: int) -> None:
        """Send a film, a GIF file."""
        if self._tracker is None:
            return
        if self._kind == "wandb":
            import wandb

            self._tracker.log({name: wandb.Video(str(path), format="gif")}, step=step)
            return
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        with Image.open(path, formats=("GIF",)) as film:
            width, height = film.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        writer = self._tracker.writer._get_file_writer()  # SummaryWriter.add_video needs moviepy and encodes again
        writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Send what is left, and stop the tracker."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

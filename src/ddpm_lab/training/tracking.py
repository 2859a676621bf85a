"""A run told to a tracker that people look at, through accelerate: TensorBoard, or Weights & Biases.

`log.jsonl` and `scores.jsonl` are always written, and hold more; a tracker gets a copy.
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
    """Refuse a tracker that is not installed, before anything is made for it.

    Raises:
        InputError: it is not; names the extra that brings it.
    """
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(f"evaluation.tracker {tracker} is not installed: pip install 'ddpm-lab[trackers]'")


class Tracking:
    """A tracker under way; where the run has none, every call does nothing."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        """Open it.

        Args:
            run_dir: TensorBoard's events lie in `tensorboard/` there, and what W&B keeps in `wandb/`, which
                WANDB_MODE=offline keeps off the network.
            step: steps done; what TensorBoard was told beyond them counts no more (W&B keeps what it was told first).
        Raises:
            InputError: it does not start.
        """
        self._told: Any = None
        kind = config.evaluation.tracker
        if kind == "none" or not processes.is_rank0():
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # which accelerate's trackers ask who leads
        if kind == "tensorboard":
            self._told = TensorBoardTracker("tensorboard", run_dir, purge_step=step + 1)
        else:
            identity = run_dir / ".wandb-id"  # of this run, wherever it is moved and whatever comes in its place
            if not identity.is_file():
                replace_atomically(identity, uuid.uuid4().hex[:16].encode())
            settings = {"name": run_dir.resolve().name, "dir": run_dir, "id": identity.read_text(), "resume": "allow"}
            self._told = WandBTracker(PROJECT, **settings)
        self._kind = kind
        try:
            self._told.start()
        except Exception as error:  # of kinds of its own
            raise InputError(f"evaluation.tracker {kind} does not start: {' '.join(str(error).split())}") from error
        if step == 0:
            flat = {f"{group}.{name}": v for group, values in config.to_dict().items() for name, v in values.items()}
            plain = (bool, int, float, str)
            self._told.store_init_configuration(
                {name: v if isinstance(v, plain) else json.dumps(v) for name, v in flat.items()}
            )

    def line(self, line: dict[str, Any]) -> None:
        """A line of log.jsonl: its numbers, and the loss in each band of timesteps."""
        if self._told is None:
            return
        values = {name: v for name, v in line.items() if isinstance(v, int | float) and name != "step"}
        bands = {f"loss_by_t/{band}": v for band, v in enumerate(line["loss_by_t"]) if v is not None}
        self._told.log(values | bands, step=line["step"])

    def score(self, record: dict[str, Any]) -> None:
        """A record of scores.jsonl: the scores' values, under the label of the distance."""
        if self._told is not None:
            found = {name: record[name]["value"] for name in SCORES if record[name] is not None}
            found = {record["fid_label"] if name == "fid" else name: value for name, value in found.items()}
            self._told.log({f"scores/{name}": value for name, value in found.items()}, step=record["step"])

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, (H, W) or (H, W, 3) uint8."""
        if self._told is not None:
            colour = picture if picture.ndim == 3 else picture[:, :, None].repeat(3, axis=2)
            given = {"dataformats": "NHWC"} if self._kind == "tensorboard" else {}
            self._told.log_images({name: colour[None]}, step=step, **given)

    def film(self, name: str, path: Path, step: int) -> None:
        """A film, a GIF."""
        if self._told is None:
            return
        if self._kind == "wandb":
            import wandb

            self._told.log({name: wandb.Video(str(path), format="gif")}, step=step)
            return
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        with Image.open(path, formats=("GIF",)) as film:
            width, height = film.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        writer = self._told.writer._get_file_writer()  # SummaryWriter itself takes films only through another package
        writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Tell what is left, and let go."""
        if self._told is not None:
            self._told.finish()
            self._told = None

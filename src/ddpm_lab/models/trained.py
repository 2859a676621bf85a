"""Trained networks: load one from a run, a checkpoint, a folder of diffusers, the hub, or the packaged weights."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ddpm_lab.core.config import Config, Predicted, Spacing, Variance
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import printable, read_json
from ddpm_lab.core.log import LOG, SCORES, read_lines
from ddpm_lab.core.messages import listed
from ddpm_lab.core.settings import fits
from ddpm_lab.data.datasets import CLASS_NAMES, DATASETS
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.diffusion.process import input_scale
from ddpm_lab.diffusion.schedule import NoiseSchedule, build_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import (
    EMA_FILE,
    MODEL_FILE,
    checkpoint_path,
    checkpoint_steps,
    load_tensors,
    parameters_sha256,
    read_meta,
)
from ddpm_lab.models.diffusers_format import (
    UNKNOWN,
    has_scheduler,
    is_diffusers,
    read_diffusers,
    warn_of_assumed_process,
)
from ddpm_lab.models.hub import NAME, locate

Weights = Literal["ema", "raw"]
WEIGHT_FILES = {"ema": EMA_FILE, "raw": MODEL_FILE}
PACKAGED = Path(__file__).parent / "weights"
# The types of what `config.json` may hold beside config and data, and of what `from` holds in it.
RECORD_TYPES: dict[str, Any] = {
    "versions": dict,
    "computed": dict,
    "earlier_versions": tuple[dict, ...],  # type: ignore[type-arg]  # isinstance takes no parameters
    "first_num_steps": int,
    "continued_at": tuple[int, ...],
    "variance": Variance,
    "spacing": Literal["uniform", "leading"],
    "guidance": float,
    "from": dict,
}
DATA_TYPES: dict[str, Any] = {"class_names": tuple[str, ...], "labels_sha256": str}
SOURCE_TYPES: dict[str, Any] = {"source": str, "variance": Variance}


@dataclass(frozen=True)
class TrainedModel:
    """A network with all that is needed to sample from it.

    Attributes:
        name: what was loaded, as the user named it.
        config: the run's.
        model: called as model(x_t, t), t int64 in [0, T); in evaluation mode.
        schedule: its forward process.
        image_shape: (C, H, W).
        step: optimizer steps trained.
        weights: 'ema' or 'raw'.
        folder: the checkpoint's.
        record: the whole `config.json`: config, data, versions, seed.
        revision: the commit on the hub; None: it was not loaded from there.
    """

    name: str
    config: Config
    model: UNet
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    step: int
    weights: Weights
    folder: Path
    record: dict[str, Any]
    revision: str | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes of a conditional network, 0 for an unconditional one."""
        return self.config.model.class_count or 0

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their numbers; where they are not known, the numbers."""
        names = self.record["data"].get("class_names") or CLASS_NAMES.get(self.config.data.dataset, ())
        return tuple(map(printable, names if len(names) == self.num_classes else map(str, range(self.num_classes))))

    def class_numbers(self, chosen: Sequence[str | int]) -> tuple[int, ...]:
        """The numbers of some classes.

        Args:
            chosen: numbers; or texts, each the name of a class, or, where no name is a number itself, its number.
        Raises:
            InputError: there is no such class.
        """
        names, count = self.class_names, self.num_classes
        named = {name: number for number, name in enumerate(names)}
        if not any(map(str.isdecimal, names)):
            named = {str(number): number for number in range(count)} | named
        numbers = [named.get(printable(label), count) if isinstance(label, str) else label for label in chosen]
        for label, number in zip(chosen, numbers, strict=True):
            if number >= count:
                raise InputError(f"{self.name} has the classes {listed(names)}, not {label}")
        return tuple(numbers)

    @property
    def prediction(self) -> Predicted:
        """What the model predicts, as samplers and losses take it."""
        return self.config.diffusion.predicted

    @property
    def variance(self) -> Variance:
        """The default variance of the reverse step with all T steps: that of the pipeline it was imported or started
        from, else beta."""
        return cast(Variance, self.record.get("variance", self.record.get("from", {}).get("variance", "beta")))

    @property
    def spacing(self) -> Spacing | None:
        """The default spacing of ddim: that of the DDIM pipeline it was imported from; None: it comes from no such."""
        return cast(Spacing | None, self.record.get("spacing"))

    @property
    def guidance(self) -> float:
        """The guidance scale where none is given: that in `config.json` of packaged weights, else 1."""
        return float(self.record.get("guidance", 1))

    @property
    def unconditional(self) -> bool:
        """Whether it can predict without a label: it is unconditional, was trained with label dropout, or started from
        a network that could."""
        trained = self.num_classes == 0 or self.config.training.class_dropout > 0
        return trained or bool(self.record.get("from", {}).get("unconditional"))

    @property
    def run_dir(self) -> Path | None:
        """The run that the checkpoint belongs to; None for packaged weights and folders of diffusers."""
        run = self.folder.parent.parent
        return run if self.folder.parent.name == "checkpoints" and (run / "config.json").is_file() else None

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the file that holds the parameters; during training, of the file that would hold them."""
        if not (self.folder / "meta.json").is_file():
            return parameters_sha256(self.model)
        return str(read_meta(self.folder)["sha256"][WEIGHT_FILES[self.weights]])


def with_timesteps(trained: TrainedModel, num_timesteps: int) -> TrainedModel:
    """The same network for a chain of another length T.

    The network takes t as a position that means a noise level whatever T is (to O(1/T)). So a network trained for one T
    can be sampled with another, if the schedule is one process at every T: rescaled linear betas, or cosine.

    Raises:
        InputError: betas of a fixed range, whose process depends on T; or a T out of range.
    """
    if trained.config.diffusion.beta_convention == "fixed range":
        raise InputError(f"{trained.name} has betas of a fixed range, which are another process for another T")
    diffusion = dataclasses.replace(trained.config.diffusion, num_timesteps=num_timesteps)
    model = copy.copy(trained.model)  # shares the parameters,
    model._buffers = dict(model._buffers)  # but not the table that scales the input
    model.num_timesteps, schedule = num_timesteps, build_schedule(diffusion)
    model.scale_input(input_scale(diffusion.predicted, schedule))
    return dataclasses.replace(
        trained, config=dataclasses.replace(trained.config, diffusion=diffusion), model=model, schedule=schedule
    )


def packaged_names() -> list[str]:
    """Names of the weights that come with the package, the smallest, which sample fastest, first."""
    weights = sorted(PACKAGED.glob(f"*/{EMA_FILE}"), key=lambda path: path.stat().st_size)
    return [path.parent.name for path in weights]


def find_checkpoint(source: str, checkpoint: int | None = None) -> tuple[Path, Path]:
    """The checkpoint folder and the `config.json` of a source.

    Args:
        source: a run folder, a checkpoint folder in one, or the name of packaged weights. A name takes precedence over
            a folder of that name (`mnist` may be a folder of data); write `./mnist` for the folder.
        checkpoint: a step of a run folder; None: the newest.
    Raises:
        InputError: no such source or checkpoint; the message names those that exist.
    """
    if source in packaged_names():
        if checkpoint is not None:
            raise InputError(f"packaged weights {source!r} have one checkpoint; leave --checkpoint out")
        return PACKAGED / source, PACKAGED / source / "config.json"
    path = Path(source).resolve()
    if not source or not path.is_dir():
        on_hub = NAME.fullmatch(source)
        raise InputError(
            f"no model {source!r}: give a run folder, a checkpoint folder in one, a folder of diffusers, USER/NAME of "
            f"the hub, or the name of packaged weights ({', '.join(packaged_names()) or 'none in this version'})"
            + (f"; for the hub, as there is a folder {on_hub['user']} here, write {source}@main" if on_hub else "")
        )
    if (path / "meta.json").is_file():
        if checkpoint is not None:
            raise InputError(f"{source} is one checkpoint; give --checkpoint with its run folder")
        config_path = path / "config.json"
        return path, config_path if config_path.is_file() else path.parent.parent / "config.json"
    if not (path / "config.json").is_file():
        raise InputError(f"{source} is not a run folder: it holds no config.json")
    steps = checkpoint_steps(path)
    if not steps:
        raise InputError(f"run {source} has no checkpoint yet")
    if checkpoint is not None and checkpoint not in steps:
        raise InputError(f"run {source} has no checkpoint of step {checkpoint}; it has {', '.join(map(str, steps))}")
    return checkpoint_path(path, steps[-1] if checkpoint is None else checkpoint), path / "config.json"


def read_run_record(path: Path) -> tuple[dict[str, Any], Config, tuple[int, int, int]]:
    """A run's `config.json`: all of it, the configuration in it, and the images' (C, H, W).

    Raises:
        InputError: absent, not JSON, or not what a run writes.
    """
    record = read_json(path)
    data = record.get("data") if isinstance(record, dict) else None
    shape = data.get("image_shape") if isinstance(data, dict) else None
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(fits(length, int) and 0 < length < 65_536 for length in shape)
        and shape[1] == shape[2]
    ):
        raise InputError(f"{path} is not a run's config.json: it must hold config, and data with image_shape")
    _check_types(path, record, RECORD_TYPES)
    _check_types(path, record["data"], DATA_TYPES, "data.")
    if "from" in record:
        _check_types(path, {"source": None} | record["from"], SOURCE_TYPES, "from.")
    try:
        config = Config.from_dict(record.get("config"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return record, config, (shape[0], shape[1], shape[2])


def _check_types(path: Path, table: dict[str, Any], types: dict[str, Any], prefix: str = "") -> None:
    """Refuse an entry that has another type than the one listed; it may be absent."""
    for name, hint in types.items():
        value = table.get(name)
        if name in table and not fits(tuple(value) if isinstance(value, list) else value, hint):
            raise InputError(f"{path}: {prefix}{name} cannot be {json.dumps(value)}")


def load(
    source: str | Path, *, weights: Weights = "ema", checkpoint: int | None = None, device: str = "auto"
) -> TrainedModel:
    """Load a trained network.

    Args:
        source: a run folder, a checkpoint folder in it, the name of packaged weights, a folder of diffusers, or
            USER/NAME or USER/NAME@REVISION on the hub, which is downloaded. What exists here takes precedence over the
            hub, and a `Path` is never looked up there.
        weights: 'ema' for the moving average, 'raw' for the network as trained.
        checkpoint: a step of a run folder; None: the newest.
        device: auto, cpu, cuda or mps.
    Raises:
        InputError: no such source, damaged files, or weights of another network; the hub cannot be reached.
    """
    if weights not in WEIGHT_FILES:
        raise InputError(f"weights must be ema or raw, not {weights!r}")
    torch_device, name = resolve_device(device), str(source)
    packaged = name in packaged_names()
    folder, revision = (Path(name), None) if packaged else locate(source)
    if not packaged and is_diffusers(folder):
        if checkpoint is not None:
            raise InputError(f"{name}, a folder of diffusers, has no steps to choose; leave --checkpoint out")
        step = 0
        config, model, image_shape, sampling = read_diffusers(folder, torch_device, weights)
        data = {"name": UNKNOWN, "image_shape": list(image_shape)}
        record = {"config": config.to_dict(), "data": data, **sampling}
        record |= {} if has_scheduler(folder) else {"process_assumed": True}
        schedule = build_schedule(config.diffusion)
    else:
        if revision is not None and (weights == "raw" or checkpoint is not None):
            raise InputError(f"{name} has one set of weights; leave --weights and --checkpoint out")
        folder, config_path = find_checkpoint(name if revision is None else str(folder), checkpoint)
        if weights == "raw" and packaged:
            raise InputError(f"packaged weights {name!r} are averaged weights only; leave --weights out")
        record, config, image_shape = read_run_record(config_path)
        if record.get("process_assumed"):
            warn_of_assumed_process()
        step = int(read_meta(folder)["step"])
        with torch.device("meta"):
            model = build_unet(config.model, image_shape[0], image_shape[1], config.diffusion.num_timesteps)
        model, schedule = model.to_empty(device=torch_device), build_schedule(config.diffusion)
        model.scale_input(input_scale(config.diffusion.predicted, schedule))
        load_tensors(folder, WEIGHT_FILES[weights], dict(model.named_parameters()))
    model = model.eval().requires_grad_(False)
    if revision is not None and config.data.dataset not in DATASETS:  # a folder on the machine of someone else
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=UNKNOWN))
    return TrainedModel(name, config, model, schedule, image_shape, step, weights, folder, record, revision)


def describe(source: str, checkpoint: int | None = None) -> list[str]:
    """What a model is, and how far it is trained, in lines of text.

    Raises:
        InputError: as `load`.
    """
    trained = load(source, checkpoint=checkpoint, device="cpu")
    record, config, run_dir = trained.record, trained.config, trained.run_dir
    parameters = sum(p.numel() for p in trained.model.parameters())
    lines = [
        f"{source}: {parameters:,} parameters, images of {' x '.join(map(str, trained.image_shape))}",
        f"trained {trained.step} steps, {trained.step * config.training.batch_size:,} images seen "
        f"of {record['data'].get('name')}",
        f"T = {config.diffusion.num_timesteps}, {config.diffusion.schedule} schedule "
        f"({config.diffusion.beta_convention}), predicts {config.diffusion.prediction}",
    ]
    if trained.revision is not None:
        lines.append(f"on the hub, revision {trained.revision}")
    if trained.num_classes:
        lines.append(f"classes: {listed(trained.class_names)}")
    if "from" in record:
        lines.append(f"started from {record['from'].get('source')}, step {record['from'].get('step')}")
    if run_dir is not None:
        lines.append(f"checkpoints: {', '.join(map(str, checkpoint_steps(run_dir)))}")
    for group, values in config.to_dict().items():
        lines.append(f"{group}: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items()))
    versions = record.get("versions", {}) | record.get("computed", {})
    lines.append("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    if run_dir is None:
        return lines
    log, scores = read_lines(run_dir / LOG), read_lines(run_dir / SCORES)
    validated = [line for line in log if "validation_loss" in line]
    lines += [f"last logged: {json.dumps(line)}" for line in validated[-1:] or log[-1:]]
    for score in scores[-6:]:
        fid = score.get("fid")
        if isinstance(fid, dict) and fits(fid.get("value"), float):
            sampling = f"{score.get('sampler')} with {score.get('num_evaluations')} evaluations{guidance_label(score)}"
            lines.append(
                f"scored at step {score['step']}: {score.get('fid_label')} {fid['value']:.4g}, {sampling}, "
                f"{score.get('weights')} weights"
            )
    return lines

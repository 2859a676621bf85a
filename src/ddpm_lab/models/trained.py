"""A trained network from wherever it lies: a run, one of its checkpoints, a pipeline of diffusers, or this package."""

import copy
import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from ddpm_lab.core.config import Config, Predicted, Variance
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import read_json
from ddpm_lab.core.log import read_lines
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.diffusion.process import input_scale
from ddpm_lab.diffusion.schedule import NoiseSchedule, build_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import checkpoint_path, checkpoint_steps, load_parameters, parameters_sha256, read_meta
from ddpm_lab.models.diffusers_format import UNKNOWN, is_diffusers, read_diffusers, warn_of_assumed_process

Weights = Literal["ema", "raw"]
SCORES_TOLD = 6  # the newest
WEIGHT_FILES = {"ema": "ema.safetensors", "raw": "model.safetensors"}


@dataclass(frozen=True)
class TrainedModel:
    """A network with all that is needed to sample from it.

    Attributes:
        name: what was loaded, as the user named it.
        config: the run's.
        model: called as model(x_t, t), t int64 in [0, T); in evaluation mode.
        schedule: its forward process.
        image_shape: (C, H, W).
        step: optimiser steps trained.
        weights: 'ema' or 'raw'.
        folder: the checkpoint's.
        record: `config.json` whole: config, data, versions, seed.
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

    @property
    def num_classes(self) -> int:
        """How many classes the network can be told, 0 where it is told none."""
        return self.config.model.num_classes or 0

    @property
    def prediction(self) -> Predicted:
        """What the model predicts, as samplers and losses take it."""
        return self.config.diffusion.predicted

    @property
    def variance(self) -> Variance:
        """Of the steps of Algorithm 2, where all are taken: that of the pipeline it was imported or began from, else
        beta."""
        return cast(Variance, self.record.get("variance", self.record.get("from", {}).get("variance", "beta")))

    @property
    def unconditional(self) -> bool:
        """Whether it can do without a class: it is told none, classes were withheld in training, or it began from a
        network that could."""
        learnt = self.num_classes == 0 or self.config.training.class_dropout > 0
        return learnt or bool(self.record.get("from", {}).get("unconditional"))

    @property
    def run_dir(self) -> Path | None:
        """The run that the checkpoint belongs to; None for packaged weights and folders of diffusers."""
        run = self.folder.parent.parent
        return run if self.folder.parent.name == "checkpoints" and (run / "config.json").is_file() else None

    @cached_property
    def weights_sha256(self) -> str:
        """Of the file the parameters came from, or, in the midst of training, of the file they would be saved to."""
        if not (self.folder / "meta.json").is_file():
            return parameters_sha256(self.model)
        return str(read_meta(self.folder)["sha256"][WEIGHT_FILES[self.weights]])


def with_timesteps(trained: TrainedModel, num_timesteps: int) -> TrainedModel:
    """The same network as a chain of another length.

    The network is told t as a position that means a noise level, whatever T (to O(1/T)), so a network trained on one
    chain can be sampled on another, where both are rescaled to the same process or cosine.

    Raises:
        InputError: betas of a fixed range, whose process is another for each T; or a T that cannot be.
    """
    if trained.config.diffusion.beta_convention == "fixed range":
        raise InputError(f"{trained.name} has betas of a fixed range: with another T they are another process")
    diffusion = dataclasses.replace(trained.config.diffusion, num_timesteps=num_timesteps)
    model = copy.copy(trained.model)  # with the same parameters
    model._buffers = dict(model._buffers)  # but with a table of its own
    model.num_timesteps, schedule = num_timesteps, build_schedule(diffusion)
    model.scale_input(input_scale(diffusion.predicted, schedule))
    return dataclasses.replace(
        trained, config=dataclasses.replace(trained.config, diffusion=diffusion), model=model, schedule=schedule
    )


def packaged_names() -> list[str]:
    """Names of the weights that come with the package."""
    folder = Path(__file__).parent / "weights"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and (entry / "meta.json").is_file())


def find_checkpoint(source: str, checkpoint: int | None = None) -> tuple[Path, Path]:
    """The checkpoint folder and the `config.json` that a SOURCE stands for.

    Args:
        source: a run folder, a checkpoint folder in it, or the name of packaged weights. A name wins over a folder of
            that name (`mnist` may well be one of data); `./mnist` is the folder.
        checkpoint: a step of a run folder; None: the newest.
    Raises:
        InputError: there is no such thing, or no such checkpoint; what there is is named.
    """
    if source in packaged_names():
        if checkpoint is not None:
            raise InputError(f"packaged weights {source!r} have one checkpoint; leave --checkpoint out")
        folder = Path(__file__).parent / "weights" / source
        return folder, folder / "config.json"
    path = Path(source).resolve() if source else Path("no such folder")
    if not path.is_dir():
        raise InputError(
            f"no model {source!r}: give a run folder, a checkpoint folder in one, a folder of diffusers, "
            f"or the name of packaged weights ({', '.join(packaged_names()) or 'none in this version'})"
        )
    if (path / "meta.json").is_file():
        if checkpoint is not None:
            raise InputError(f"{source} is one checkpoint; give --checkpoint with its run folder")
        own = path / "config.json"
        return path, own if own.is_file() else path.parent.parent / "config.json"
    if not (path / "config.json").is_file():
        raise InputError(f"{source} is not a run folder: it holds no config.json")
    steps = checkpoint_steps(path)
    if not steps:
        raise InputError(f"run {source} has no checkpoint yet")
    if checkpoint is not None and checkpoint not in steps:
        raise InputError(f"run {source} has no checkpoint of step {checkpoint}; it has {', '.join(map(str, steps))}")
    return checkpoint_path(path, steps[-1] if checkpoint is None else checkpoint), path / "config.json"


def read_run_record(path: Path) -> tuple[dict[str, Any], Config, tuple[int, int, int]]:
    """A `config.json`: the record whole, the configuration in it, and the images' (C, H, W).

    Raises:
        InputError: absent, not JSON, or not what a run writes.
    """
    record = read_json(path)
    data = record.get("data") if isinstance(record, dict) else None
    shape = data.get("image_shape") if isinstance(data, dict) else None
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(n, int) and 0 < n < 65536 for n in shape)
        and shape[1] == shape[2]
        and all(isinstance(record.get(name, {}), dict) for name in ("versions", "computed"))
        and all(isinstance(record.get(name, []), list) for name in ("earlier_versions", "continued_at"))
        and all(fits(step, int) and step > 0 for step in record.get("continued_at", []))
        and fits(record.get("first_num_steps", 0), int)
        and all(isinstance(versions, dict) for versions in record.get("earlier_versions", []))
    ):
        raise InputError(f"{path} is not a run's: it must hold config and data with image_shape")
    begun_from = record.get("from", {"source": ""})
    if not isinstance(begun_from, dict) or not isinstance(begun_from.get("source"), str):
        raise InputError(f"{path}: from must name the source that the run began from")
    for held in (record, begun_from):
        if held.get("variance", "beta") not in get_args(Variance):
            raise InputError(f"{path}: variance must be one of {', '.join(get_args(Variance))}")
    try:
        config = Config.from_dict(record.get("config"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return record, config, (shape[0], shape[1], shape[2])


def load(
    source: str | Path, *, weights: Weights = "ema", checkpoint: int | None = None, device: str = "auto"
) -> TrainedModel:
    """Load a trained network.

    Args:
        source: a run folder, a checkpoint folder in it, the name of packaged weights, or a folder of diffusers.
        weights: 'ema' the moving average, or 'raw' the network as it was trained.
        checkpoint: a step of a run folder; None: the newest.
        device: auto, cpu, cuda or mps.
    Raises:
        InputError: no such source, damaged files, weights of another network.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights must be ema or raw, not {weights!r}")
    on = resolve_device(device)
    if str(source) not in packaged_names() and is_diffusers(Path(source)):
        return _load_diffusers(Path(source), weights, checkpoint, on)
    folder, config_path = find_checkpoint(str(source), checkpoint)
    if weights == "raw" and str(source) in packaged_names():
        raise InputError(f"{source} comes with averaged weights only; leave --weights out")
    record, config, image_shape = read_run_record(config_path)
    if record.get("process_assumed"):
        warn_of_assumed_process()
    step = int(read_meta(folder)["step"])
    with torch.device("meta"):
        model = build_unet(config.model, image_shape[0], image_shape[1], config.diffusion.num_timesteps)
    model, schedule = model.to_empty(device=on), build_schedule(config.diffusion)
    model.scale_input(input_scale(config.diffusion.predicted, schedule))
    load_parameters(model, folder, WEIGHT_FILES[weights])
    if on.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return TrainedModel(
        name=str(source),
        config=config,
        model=model.eval().requires_grad_(False),
        schedule=schedule,
        image_shape=image_shape,
        step=step,
        weights=weights,
        folder=folder,
        record=record,
    )


def _load_diffusers(folder: Path, weights: Weights, checkpoint: int | None, device: torch.device) -> TrainedModel:
    if weights == "raw" or checkpoint is not None:
        raise InputError(f"{folder} is of diffusers and has one set of weights; leave --weights and --checkpoint out")
    config, model, image_shape, variance = read_diffusers(folder, device)
    return TrainedModel(
        name=str(folder),
        config=config,
        model=model,
        schedule=build_schedule(config.diffusion),
        image_shape=image_shape,
        step=0,
        weights="ema",
        folder=folder,
        record={
            "config": config.to_dict(),
            "data": {"name": UNKNOWN, "image_shape": list(image_shape)},
            "variance": variance,
        },
    )


def describe(source: str, checkpoint: int | None = None) -> list[str]:
    """Lines for a person: what a model is, and how far it came.

    Raises:
        InputError: as `load`.
    """
    trained = load(source, checkpoint=checkpoint, device="cpu")
    record, config = trained.record, trained.config
    parameters = sum(p.numel() for p in trained.model.parameters())
    lines = [
        f"{source}: {parameters:,} parameters, images of {' x '.join(map(str, trained.image_shape))}",
        f"trained {trained.step} steps, {trained.step * config.training.batch_size:,} images seen "
        f"of {record['data'].get('name')}",
        f"T = {config.diffusion.num_timesteps}, {config.diffusion.schedule} schedule "
        f"({config.diffusion.beta_convention}), predicts {config.diffusion.prediction}",
    ]
    if "from" in record:
        lines.append(f"began from {record['from'].get('source')}, step {record['from'].get('step')}")
    if trained.run_dir is not None:
        steps = checkpoint_steps(trained.run_dir)
        lines.append(f"checkpoints: {', '.join(map(str, steps))}")
    for group, values in config.to_dict().items():
        lines.append(f"{group}: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items()))
    made_with = {**record.get("versions", {}), **record.get("computed", {})}
    lines.append("versions: " + ", ".join(f"{name} {number}" for name, number in made_with.items()))
    log = None if trained.run_dir is None else trained.run_dir / "log.jsonl"
    if log is not None and log.is_file():
        entries = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.endswith("}")
        ]
        validated = [line for line in entries if "validation_loss" in line]
        lines += [f"last logged: {line}" for line in validated[-1:] or entries[-1:]]
    scored = [] if trained.run_dir is None else read_lines(trained.run_dir / "scores.jsonl")
    for score in scored[-SCORES_TOLD:]:
        fid = score.get("fid")
        if isinstance(fid, dict) and fits(fid.get("value"), float):
            how = f"{score.get('sampler')} with {score.get('num_evaluations')} evaluations{guidance_label(score)}"
            lines.append(
                f"scored at step {score['step']}: {score.get('fid_label')} {fid['value']:.4g}, {how}, "
                f"{score.get('weights')} weights"
            )
    return lines

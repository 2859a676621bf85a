"""The format of diffusers, read and written: the same weights under other names, the same process in other settings.

A folder of `DDPMPipeline` or `DDIMPipeline` (or of `UNet2DModel` alone) is read only if our network and process compute
exactly what its settings describe. Otherwise the error names the setting; nothing is approximated.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_lab.core.config import (
    Conditioning,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Prediction,
    Spacing,
    TrainingConfig,
    Variance,
)
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import read_json
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import check_shapes

Choice = TypeVar("Choice")
UNKNOWN = "unknown"  # the data set of an imported generator
# The settings of diffusers' UNet2DModel that are settings of ours: their name, our name, and the value where absent.
SETTINGS: dict[str, tuple[str, Any]] = {
    "attention_head_dim": ("attention_head_channels", 8),
    "downsample_padding": ("downsample_padding", 1),
    "dropout": ("dropout", 0.0),
    "flip_sin_to_cos": ("flip_sin_to_cos", True),
    "freq_shift": ("freq_shift", 0),
    "layers_per_block": ("num_blocks", 2),
    "norm_eps": ("norm_eps", 1e-5),
    "norm_num_groups": ("norm_groups", 32),
    "num_class_embeds": ("num_classes", None),
}
# Other settings: the value that our code computes, which is also the value where the setting is absent.
NETWORK = {
    "act_fn": "silu", "add_attention": True, "center_input_sample": False, "class_embed_type": None,
    "downsample_type": "conv", "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2D",
    "num_train_timesteps": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "upsample_type": "conv",
}  # fmt: skip
PROCESS = {
    "clip_sample": True, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False, "set_alpha_to_one": True,
    "steps_offset": 0, "thresholding": False, "trained_betas": None,
}  # fmt: skip
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES: dict[str, Variance] = {"fixed_large": "beta", "fixed_small": "beta_tilde"}
SPACINGS: dict[str, Spacing] = {"leading": "leading", "trailing": "uniform"}
CONDITIONING: dict[str, Conditioning] = {"default": "shift", "scale_shift": "scale_shift"}
# A scheduler's setting that says how it samples, our name for it, and its values.
SCHEDULERS: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "DDPMScheduler": ("variance_type", "variance", VARIANCES),
    "DDIMScheduler": ("timestep_spacing", "spacing", SPACINGS),
}
# The settings of a scheduler that its pipeline overrides: `DDIMPipeline` converts any scheduler.
PIPELINES: dict[str, dict[str, str]] = {"DDPMPipeline": {}, "DDIMPipeline": {"_class_name": "DDIMScheduler"}}
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Replacements that turn our name of a parameter into that of diffusers, applied in this order.
RENAMES = (
    (r"^time_embedding\.0\.", "time_embedding.linear_1."),
    (r"^time_embedding\.2\.", "time_embedding.linear_2."),
    (r"^(down|up)\.(\d+)\.blocks\.", r"\1_blocks.\2.resnets."),
    (r"^(down|up)\.(\d+)\.attentions\.", r"\1_blocks.\2.attentions."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0."),
    (r"^middle_in\.", "mid_block.resnets.0."),
    (r"^middle_attention\.", "mid_block.attentions.0."),
    (r"^middle_out\.", "mid_block.resnets.1."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"(resnets\.\d+)\.embedding\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
)


def _diffusers_names(name: str) -> list[str]:
    """What diffusers calls a parameter; our query_key_value is three layers there."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return [name.replace("query_key_value", f"to_{letter}") for letter in "qkv"] if "query_key" in name else [name]


def diffusers_parameters(model: UNet) -> dict[str, Tensor]:
    """The parameters under the names of `diffusers.UNet2DModel`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        names = _diffusers_names(name)
        renamed |= zip(names, tensor.chunk(len(names)), strict=True)
    return renamed


def diffusers_network(model: UNet, image_size: int) -> Any:
    """A `diffusers.UNet2DModel` that computes what `model` does, in training or evaluation mode alike.

    Raises:
        InputError: diffusers cannot express the network: it is conditional, has patches, or scales t.
    """
    from diffusers import UNet2DModel

    config, patch, T = model.config, model.config.patch_size, model.num_timesteps
    require(patch == 1, f"diffusers has no network on patches; this one has patches of {patch} x {patch}")
    require(not model.num_classes, "diffusers' DDPMPipeline passes no labels; this network is conditional")
    require(
        config.num_positions == T,
        f"diffusers' network does not scale t; for T = {T} it would have to be trained with --model.num-positions {T}",
    )
    levels = range(len(config.channel_multipliers))
    kinds = ["Attn" if level in config.attention_levels else "" for level in levels]
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        block_out_channels=tuple(config.base_channels * m for m in config.channel_multipliers),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        resnet_time_scale_shift=_inverse(CONDITIONING)[config.time_conditioning],
        # with scale_shift, diffusers' middle attention is normalised only if its groups are given
        attn_norm_num_groups=config.norm_groups if config.time_conditioning == "scale_shift" else None,
        **NETWORK,
        **{theirs: getattr(config, ours) for theirs, (ours, _) in SETTINGS.items()},
    )
    network.load_state_dict(diffusers_parameters(model))
    return network.train(model.training)


def _inverse(choices: Mapping[str, Choice]) -> dict[Choice, str]:
    return {ours: theirs for theirs, ours in choices.items()}


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, one of its networks, or a checkpoint of its training."""
    if (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file():
        return True
    try:
        config = read_json(folder / "config.json")
    except InputError:
        return False
    return isinstance(config, dict) and "_class_name" in config


def has_average(folder: Path) -> bool:
    """Whether a folder has averaged weights beside those as trained, as checkpoints of diffusers' examples have."""
    return all((folder / name / "config.json").is_file() for name in ("unet", "unet_ema"))


def read_diffusers(
    folder: Path, device: torch.device, weights: str = "ema"
) -> tuple[Config, UNet, tuple[int, int, int], dict[str, str]]:
    """Read a generator from a folder of `DDPMPipeline`, `DDIMPipeline` or `UNet2DModel`.

    Args:
        folder: as `save_pretrained` writes it, weights in safetensors.
        device: of the network.
        weights: 'ema' for the averaged weights if there are any, 'raw' for those beside them.
    Returns:
        The configuration (nothing is known of its training), the network, (C, H, W) of its images, and how the pipeline
        samples, in our terms: its `variance`, or of DDIM its `spacing`.
    Raises:
        InputError: files are absent or damaged, or a setting has a value that is not supported; the message names it.
    """
    index, average = folder / "model_index.json", has_average(folder)
    scheduler = _choose(index, "_class_name", _read_settings(index), PIPELINES) if index.is_file() else {}
    require(
        average or weights == "ema",
        f"{folder}, a folder of diffusers, has one set of weights (no unet_ema beside unet); leave --weights out",
    )
    unet = folder / "unet" if (folder / "unet").is_dir() else folder  # older folders have all files at the top
    unet = folder / "unet_ema" if average and weights == "ema" else unet
    diffusion, sampling = _process(_scheduler_path(folder), scheduler)
    model_config, channels, size = _model_config(unet / "config.json", diffusion.num_timesteps)
    # labels were never dropped: the embedding of no label, which diffusers lacks, must not be used
    training = TrainingConfig(class_dropout=0.0) if model_config.num_classes else TrainingConfig()
    config = Config(data=DataConfig(dataset=UNKNOWN), model=model_config, diffusion=diffusion, training=training)
    model = build_unet(model_config, channels, size, diffusion.num_timesteps).to(device)
    parameters, labels = _read_parameters(unet), "class_embedding.weight"
    if labels in parameters:
        parameters[labels] = torch.cat([parameters[labels], torch.zeros_like(parameters[labels][:1])])
    check_shapes(str(unet), parameters, diffusers_parameters(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([parameters[part] for part in _diffusers_names(name)]))
    return config, model.eval().requires_grad_(False), (channels, size, size), sampling


def has_scheduler(folder: Path) -> bool:
    """Whether a scheduler's file says which process the network of a folder belongs to."""
    return _scheduler_path(folder) is not None


def warn_of_assumed_process() -> None:
    """Warn, whenever such a network is loaded, that its process is a guess: images of a wrong one look plausible."""
    warnings.warn("no scheduler beside the network: taken for linear betas of T = 1000 that predict eps", stacklevel=3)


def _scheduler_path(folder: Path) -> Path | None:
    """The scheduler's file of a folder: in the pipeline, beside the network, or in the pipeline around the network.

    `unet` and `unet_ema` lie one folder below their pipeline, those of a checkpoint in training two. A folder with
    another name may lie in a pipeline that it does not belong to. A pipeline must have a scheduler.
    """
    name, parent = "scheduler_config.json", folder.resolve()
    paths = [folder / "scheduler" / name, folder / name]
    for prefix in ("unet", "checkpoint-"):
        if parent.name.startswith(prefix):
            parent = parent.parent
            paths.append(parent / "scheduler" / name)
    existing = [path for path in paths if path.exists()]
    return existing[0] if existing else paths[0] if (folder / "model_index.json").is_file() else None


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold a table of settings")
    return settings


def _check_settings(path: Path, settings: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Refuse the first setting that has another value than the supported one."""
    for name, value in supported.items():
        if settings.get(name) != value:
            raise _unsupported(path, settings, name, f"{_shown(value)} is")


def _choose(path: Path, name: str, settings: Mapping[str, Any], choices: Mapping[str, Choice]) -> Choice:
    """Our value for that of a setting; refuses a value without one."""
    choice = choices.get(str(settings.get(name)))
    if choice is None:
        raise _unsupported(path, settings, name, f"{' and '.join(choices)} are")
    return choice


def _unsupported(path: Path, settings: Mapping[str, Any], name: str, supported: str) -> InputError:
    return InputError(f"{path}: {name} {_shown(settings.get(name))} is not supported; {supported}")


def _shown(value: Any) -> str:
    """A value as JSON, cut where it is long, such as a thousand betas."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a file's settings raise into an error that names the file, and settings by their names there."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for theirs, (ours, _) in SETTINGS.items():
            message = message.replace(f"model.{ours} ", f"{theirs} ")
        raise InputError(message if str(path) in message else f"{path}: {message}") from error
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not a {kind}'s: {' '.join(str(error).split())}") from error


def _model_config(path: Path, num_timesteps: int) -> tuple[ModelConfig, int, int]:
    """The network's configuration, its image channels and size."""
    defaults = {theirs: value for theirs, (_, value) in SETTINGS.items()} | {"resnet_time_scale_shift": "default"}
    settings: dict[str, Any] = NETWORK | defaults | _read_settings(path)
    conditioning = _choose(path, "resnet_time_scale_shift", settings, CONDITIONING)
    groups = settings["norm_num_groups"] if conditioning == "scale_shift" else None
    required = {"_class_name": "UNet2DModel", "attn_norm_num_groups": groups}
    _check_settings(path, settings, required | NETWORK)
    with _reading(path, "UNet2DModel"):
        widths, channels, size = list(settings["block_out_channels"]), settings["in_channels"], settings["sample_size"]
        down = enumerate(settings["down_block_types"])
        attention_levels = tuple(level for level, kind in down if kind == "AttnDownBlock2D")
        kinds = ["Attn" if level in attention_levels else "" for level in range(len(widths))]
        consistent = {
            "out_channels": channels,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "block_out_channels": [width // widths[0] * widths[0] for width in widths],
        }
        _check_settings(path, settings, consistent)
        if channels not in (1, 3) or not fits(size, int) or not 0 < size < 65_536:
            raise InputError(
                f"in_channels {json.dumps(channels)} with sample_size {json.dumps(size)} is not supported; "
                "1 or 3 channels are, with the side of square images"
            )
        config = ModelConfig(
            base_channels=widths[0],
            channel_multipliers=tuple(width // widths[0] for width in widths),
            attention_levels=attention_levels,
            time_conditioning=conditioning,
            num_positions=num_timesteps,
            **{ours: settings[theirs] for theirs, (ours, _) in SETTINGS.items()},
        )
    return config, channels, size


def _process(path: Path | None, scheduler: dict[str, str]) -> tuple[DiffusionConfig, dict[str, str]]:
    """The process that a scheduler's file describes, and how it samples; `scheduler` overrides its settings."""
    if path is None:
        warn_of_assumed_process()
        return DiffusionConfig(), {"variance": "beta"}
    defaults = {"prediction_type": "epsilon", "timestep_spacing": "leading", "num_train_timesteps": 1000}
    settings: dict[str, Any] = PROCESS | defaults | _read_settings(path) | scheduler
    theirs, ours, values = _choose(path, "_class_name", settings, SCHEDULERS)
    _check_settings(path, settings, PROCESS)
    sampling = {ours: _choose(path, theirs, settings, values)}
    prediction, T = _choose(path, "prediction_type", settings, PREDICTIONS), settings["num_train_timesteps"]
    with _reading(path, "scheduler"):
        if settings.get("beta_schedule") == "squaredcos_cap_v2":
            return DiffusionConfig(num_timesteps=T, schedule="cosine", prediction=prediction), sampling
        rescaled = _linear_betas(T, True).items() <= settings.items()
        _check_settings(path, settings, _linear_betas(T, rescaled))
        return DiffusionConfig(num_timesteps=T, rescale_betas=rescaled, prediction=prediction), sampling


def _linear_betas(num_timesteps: int, rescale_betas: bool) -> dict[str, Any]:
    scale = 1000 / num_timesteps if rescale_betas else 1.0
    return {"beta_schedule": "linear", "beta_start": scale * 1e-4, "beta_end": scale * 0.02}


def _read_parameters(folder: Path) -> dict[str, Tensor]:
    """The network's parameters, under the names that diffusers has today."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise InputError(
            f"{folder} holds no diffusion_pytorch_model.safetensors but {files}; diffusers writes it there: "
            f"UNet2DModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    for old, new in OLD_ATTENTION_NAMES.items():
        tensors = {re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name): t for name, t in tensors.items()}
    return tensors


def save_diffusers(model: UNet, config: Config, image_size: int, sampling: Mapping[str, str], folder: Path) -> str:
    """Write a folder that diffusers' `DDPMPipeline` or `DDIMPipeline` loads, and that samples as ours do.

    Args:
        model: in evaluation mode.
        config: of its training.
        image_size: side of its images.
        sampling: the `variance` of Algorithm 2, or the `spacing` of DDIM.
        folder: an empty one.
    Returns:
        The class of the pipeline.
    Raises:
        InputError: diffusers is not installed, or cannot express the network: see `diffusers_network`.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InputError("diffusers is not installed: pip install 'ddpm-lab[diffusers]'") from error

    names, diffusion = _inverse(PREDICTIONS), config.diffusion
    require(
        diffusion.prediction in names,
        f"diffusers' schedulers have no prediction {diffusion.prediction}; they have {', '.join(names)}",
    )
    linear = diffusion.schedule == "linear"
    betas = _linear_betas(diffusion.num_timesteps, bool(diffusion.rescale_betas)) if linear else {}
    (name, (theirs, ours, values)), *_ = (item for item in SCHEDULERS.items() if item[1][1] in sampling)
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"} | betas
    settings |= {theirs: _inverse(values)[sampling[ours]]}
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=diffusion.num_timesteps, prediction_type=names[diffusion.prediction], **settings
    )
    pipeline = name.replace("Scheduler", "Pipeline")
    network = diffusers_network(model, image_size)
    getattr(diffusers, pipeline)(network, scheduler).save_pretrained(folder, safe_serialization=True)
    return pipeline

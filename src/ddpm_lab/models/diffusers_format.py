"""The format of diffusers, read and written: the same weights under other names, the same process in other settings.

A folder of `DDPMPipeline` (or of `UNet2DModel` alone) is read only if our network and process compute exactly what its
settings describe. Otherwise the error names the setting; nothing is approximated.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_lab.core.config import Conditioning, Config, DataConfig, DiffusionConfig, ModelConfig, Prediction, Variance
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import read_json
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import check_shapes

Choice = TypeVar("Choice")
UNKNOWN = "unknown"  # the data set of an imported generator
# Values of the settings of diffusers that our network and process compute. A setting in a table of defaults is missing
# in older folders, and then has the value that our code computes.
NETWORK = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "time_embedding_type": "positional",
}
NETWORK_DEFAULTS = {
    "add_attention": True,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "time_embedding_dim": None,
    "upsample_type": "conv",
}
PROCESS = {"_class_name": "DDPMScheduler", "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None}
PROCESS_DEFAULTS = {"clip_sample_range": 1.0, "rescale_betas_zero_snr": False, "thresholding": False}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # T = 1000: the same by both conventions
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES: dict[str, Variance] = {"fixed_large": "beta", "fixed_small": "beta_tilde"}
CONDITIONING: dict[str, Conditioning] = {"default": "shift", "scale_shift": "scale_shift"}
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
    """A `diffusers.UNet2DModel` that computes what `model` does, for T = 1000, in training or evaluation mode alike.

    Raises:
        InputError: diffusers cannot express the network: it is conditional, has patches, or another T (which would need
            a scaled t).
    """
    from diffusers import UNet2DModel

    config, patch, T = model.config, model.config.patch_size, model.num_timesteps
    require(patch == 1, f"diffusers has no network on patches; this one has patches of {patch} x {patch}")
    require(not model.num_classes, "diffusers' DDPMPipeline passes no labels; this network is conditional")
    require(T == 1000, f"diffusers' network does not scale t, and so has only T = 1000; this one has T = {T}")
    levels = range(len(config.channel_multipliers))
    kinds = ["Attn" if level in config.attention_levels else "" for level in levels]
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        block_out_channels=tuple(config.base_channels * m for m in config.channel_multipliers),
        layers_per_block=config.num_blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=config.attention_head_channels,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift=_inverse(CONDITIONING)[config.time_conditioning],
        # with scale_shift, diffusers' middle attention is normalised only if its groups are given
        attn_norm_num_groups=config.norm_groups if config.time_conditioning == "scale_shift" else None,
        dropout=config.dropout,
        **{name: value for name, value in NETWORK.items() if name != "_class_name"},
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


def read_diffusers(folder: Path, device: torch.device) -> tuple[Config, UNet, tuple[int, int, int], Variance]:
    """Read a generator from a folder of `DDPMPipeline` or `UNet2DModel`.

    Args:
        folder: as `save_pretrained` writes it, weights in safetensors.
        device: of the network.
    Returns:
        The configuration (nothing is known of its training), the network, (C, H, W) of its images, and the variance
        that the pipeline samples with.
    Raises:
        InputError: files are absent or damaged, or a setting has a value that is not supported; the message names it.
    """
    index = folder / "model_index.json"
    if index.is_file():
        _check_settings(index, _read_settings(index), {"_class_name": "DDPMPipeline"})
    unet = folder / "unet" if (folder / "unet").is_dir() else folder  # older folders have all files at the top
    model_config, channels, size = _model_config(unet / "config.json")
    diffusion, variance = _process(_scheduler_path(folder))
    config = Config(data=DataConfig(dataset=UNKNOWN), model=model_config, diffusion=diffusion)
    model = build_unet(model_config, channels, size, diffusion.num_timesteps).to(device)
    parameters = _read_parameters(unet)
    check_shapes(str(unet), parameters, diffusers_parameters(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([parameters[part] for part in _diffusers_names(name)]))
    return config, model.eval().requires_grad_(False), (channels, size, size), variance


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


def _model_config(path: Path) -> tuple[ModelConfig, int, int]:
    """The network's configuration, its image channels and size."""
    defaults = {"dropout": 0.0, "resnet_time_scale_shift": "default", "attn_norm_num_groups": None}
    settings: dict[str, Any] = NETWORK_DEFAULTS | defaults | _read_settings(path)
    conditioning = _choose(path, "resnet_time_scale_shift", settings, CONDITIONING)
    groups = settings.get("norm_num_groups") if conditioning == "scale_shift" else None
    _check_settings(path, settings, NETWORK | NETWORK_DEFAULTS | {"attn_norm_num_groups": groups})
    try:
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
            num_blocks=settings["layers_per_block"],
            attention_levels=attention_levels,
            attention_head_channels=settings["attention_head_dim"],
            dropout=float(settings["dropout"]),
            norm_groups=settings["norm_num_groups"],
            time_conditioning=conditioning,
        )
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not a UNet2DModel's: {' '.join(str(error).split())}") from error
    return config, channels, size


def _process(path: Path | None) -> tuple[DiffusionConfig, Variance]:
    """The process that a scheduler's file describes, and the variance of its reverse steps."""
    if path is None:
        warn_of_assumed_process()
        return DiffusionConfig(), "beta"
    settings = PROCESS_DEFAULTS | {"prediction_type": "epsilon"} | _read_settings(path)
    _check_settings(path, settings, PROCESS | PROCESS_DEFAULTS)
    prediction = _choose(path, "prediction_type", settings, PREDICTIONS)
    variance = _choose(path, "variance_type", settings, VARIANCES)
    if settings.get("beta_schedule") == "squaredcos_cap_v2":
        return DiffusionConfig(schedule="cosine", prediction=prediction), variance
    _check_settings(path, settings, LINEAR)
    return DiffusionConfig(prediction=prediction), variance


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


def save_diffusers(model: UNet, config: Config, image_size: int, variance: Variance, folder: Path) -> None:
    """Write a folder that `diffusers.DDPMPipeline.from_pretrained` loads, and that samples as our Algorithm 2 does.

    Args:
        model: in evaluation mode.
        config: of its training.
        image_size: side of its images.
        variance: of the reverse steps.
        folder: an empty one.
    Raises:
        InputError: diffusers is not installed, or cannot express the network: see `diffusers_network`.
    """
    try:
        from diffusers import DDPMPipeline, DDPMScheduler
    except ImportError as error:
        raise InputError("diffusers is not installed: pip install 'ddpm-lab[diffusers]'") from error

    names, prediction = _inverse(PREDICTIONS), config.diffusion.prediction
    require(prediction in names, f"diffusers' DDPMScheduler has no prediction {prediction}; it has {', '.join(names)}")
    betas = {"beta_schedule": "squaredcos_cap_v2"} if config.diffusion.schedule == "cosine" else LINEAR
    scheduler = DDPMScheduler(
        num_train_timesteps=config.diffusion.num_timesteps, prediction_type=names[prediction],
        variance_type=_inverse(VARIANCES)[variance], clip_sample=True, timestep_spacing="trailing", **betas,
    )  # fmt: skip
    DDPMPipeline(diffusers_network(model, image_size), scheduler).save_pretrained(folder, safe_serialization=True)

"""diffusers' form of our generators, both ways: the same weights under other names, the same process in its words.

A folder of `DDPMPipeline` (or of `UNet2DModel` alone) is read only where what it says is exactly what a network and a
process of ours compute; anything else is refused by the name of its setting, never approximated.
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
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import read_json
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.unet import UNet, build_unet

Choice = TypeVar("Choice")
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
LONGEST = 80  # characters of a setting in a message
UNKNOWN = "unknown"  # the data set that an imported generator was trained on
# What diffusers' network and process must say for ours to compute the same; entries of the second table in each pair
# are younger than some folders, which mean by their silence what diffusers does by default.
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
YOUNGER = {
    "add_attention": True,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "time_embedding_dim": None,
    "upsample_type": "conv",
}
CONDITIONING: dict[str, Conditioning] = {"default": "shift", "scale_shift": "scale_shift"}
PROCESS = {
    "_class_name": "DDPMScheduler",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # of T = 1000, whatever the convention
VARIANCES: dict[str, Variance] = {"fixed_large": "beta", "fixed_small": "beta_tilde"}
YOUNGER_PROCESS = {"clip_sample_range": 1.0, "rescale_betas_zero_snr": False, "thresholding": False}
ATTENTION_OF_OLD = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
# Ours to diffusers', applied one after another to each parameter's name.
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


def _their_names(name: str) -> list[str]:
    """What diffusers calls a parameter; queries, keys and values are three layers there."""
    for ours, theirs in RENAMES:
        name = re.sub(ours, theirs, name)
    return (
        [name.replace("query_key_value", f"to_{letter}") for letter in "qkv"] if "query_key_value" in name else [name]
    )


def diffusers_parameters(model: UNet) -> dict[str, Tensor]:
    """The parameters as `diffusers.UNet2DModel` names them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        names = _their_names(name)
        renamed |= zip(names, tensor.chunk(len(names)), strict=True)
    return renamed


def take_parameters(model: UNet, theirs: Mapping[str, Tensor], where: str) -> None:
    """Give a network the parameters that `diffusers_parameters` would make of it.

    Args:
        where: what they come from, for messages.
    Raises:
        InputError: they are of another network.
    """
    wanted = {name: tensor.shape for name, tensor in diffusers_parameters(model).items()}
    for name in sorted(wanted.keys() | theirs.keys()):
        found = theirs[name].shape if name in theirs else None
        if found != wanted.get(name):
            described = [None if shape is None else tuple(shape) for shape in (found, wanted.get(name))]
            raise InputError(
                f"{where}: {name} is {described[0] or 'absent'} there, {described[1] or 'absent'} in its config"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([theirs[part] for part in _their_names(name)]))


def diffusers_network(model: UNet, image_size: int) -> Any:
    """A `diffusers.UNet2DModel` that computes what `model` does, for T = 1000, in training or evaluation mode alike.

    Raises:
        InputError: a network that diffusers cannot express: patches, or another T, for it feeds t as it is.
    """
    from diffusers import UNet2DModel

    config = model.config
    if config.patch_size > 1:
        raise InputError(
            f"diffusers has no network on patches; this one folds {config.patch_size} x {config.patch_size}"
        )
    if model.num_classes:
        raise InputError("diffusers' DDPMPipeline passes no classes on; this network is told them")
    if model.num_timesteps != 1000:
        raise InputError(
            f"diffusers' network takes t as it is, and so only T = 1000; this one has T = {model.num_timesteps}"
        )
    levels = range(len(config.channel_multipliers))
    down = tuple("AttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels)
    up = tuple("AttnUpBlock2D" if level in config.attention_levels else "UpBlock2D" for level in reversed(levels))
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        block_out_channels=tuple(config.base_channels * m for m in config.channel_multipliers),
        layers_per_block=config.num_blocks,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=config.attention_head_channels,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift=next(k for k, ours in CONDITIONING.items() if ours == config.time_conditioning),
        # diffusers' middle attention has no normalisation with scale_shift, unless its groups are named
        attn_norm_num_groups=config.norm_groups if config.time_conditioning == "scale_shift" else None,
        dropout=config.dropout,
        **{name: value for name, value in NETWORK.items() if name != "_class_name"},
    )
    network.load_state_dict(diffusers_parameters(model))
    return network.train(model.training)


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
    """A generator from a folder of `DDPMPipeline` or `UNet2DModel`.

    Args:
        folder: as `save_pretrained` writes it, weights in safetensors.
    Returns:
        Its configuration (whose training is not known), the network on the device, (C, H, W) of its images, and the
        variance that its pipeline samples with.
    Raises:
        InputError: files are absent or damaged, or a setting says something that is not covered; each by its name.
    """
    if (folder / "model_index.json").is_file():
        _covered(folder / "model_index.json", _table(folder / "model_index.json"), {"_class_name": "DDPMPipeline"})
    unet = folder / "unet" if (folder / "unet").is_dir() else folder  # older folders have all files at the top
    model_config, channels, size = _model_config(unet)
    diffusion, variance = _process(_scheduler_of(folder))
    config = Config(data=DataConfig(dataset=UNKNOWN), model=model_config, diffusion=diffusion)
    model = build_unet(model_config, channels, size, diffusion.num_timesteps).to(device)
    take_parameters(model, _their_parameters(unet), str(unet))
    return config, model.eval().requires_grad_(False), (channels, size, size), variance


def process_is_told(folder: Path) -> bool:
    """Whether a scheduler says what process a folder's network is of."""
    return _scheduler_of(folder) is not None


def warn_of_assumed_process() -> None:
    """Warn that a network's process is a guess, whenever it is opened: images of the wrong process look plausible."""
    warnings.warn("no scheduler beside the network: taken for linear betas of T = 1000 that predict eps", stacklevel=3)


def _scheduler_of(folder: Path) -> Path | None:
    """Where the process is told: in the pipeline, beside the network, or in the pipeline that it lies in.

    `unet` and `unet_ema` lie one folder below their pipeline, those of a checkpoint in training two.
    """
    name, place = "scheduler_config.json", folder.resolve()
    places = [folder / "scheduler" / name, folder / name]
    for inner in (
        "unet",
        "checkpoint-",
    ):  # a folder of another name may lie beside a pipeline it has nothing to do with
        if place.name.startswith(inner):
            place = place.parent
            places.append(place / "scheduler" / name)
    found = next((path for path in places if path.exists()), None)
    return places[0] if found is None and (folder / "model_index.json").is_file() else found  # a pipeline must have one


def _table(path: Path) -> dict[str, Any]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise InputError(f"{path} must hold a table of settings")
    return table


def _covered(path: Path, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse the first setting that says anything else than what is wanted."""
    for name, value in wanted.items():
        if said.get(name) != value:
            raise InputError(f"{path}: {name} {_short(said.get(name))} is not covered; {_short(value)} is")


def _short(value: Any) -> str:
    """A value as JSON, cut where it is long: a thousand betas need not be read."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _one_of(path: Path, name: str, said: Mapping[str, Any], known: Mapping[str, Choice]) -> Choice:
    """What a setting's value stands for here.

    Raises:
        InputError: for nothing.
    """
    found = known.get(str(said.get(name)))
    if found is None:
        raise InputError(f"{path}: {name} {_short(said.get(name))} is not covered; {' and '.join(known)} are")
    return found


def _model_config(folder: Path) -> tuple[ModelConfig, int, int]:
    """The network's configuration, its image channels and size."""
    path = folder / "config.json"
    silent = {"dropout": 0.0, "resnet_time_scale_shift": "default", "attn_norm_num_groups": None}
    said: dict[str, Any] = YOUNGER | silent | _table(path)
    conditioning = _one_of(path, "resnet_time_scale_shift", said, CONDITIONING)
    in_middle = said.get("norm_num_groups") if conditioning == "scale_shift" else None
    _covered(path, said, NETWORK | YOUNGER | {"attn_norm_num_groups": in_middle})
    try:
        widths, down, channels = list(said["block_out_channels"]), list(said["down_block_types"]), said["in_channels"]
        attention = tuple(level for level, kind in enumerate(down) if kind == "AttnDownBlock2D")
        kinds = ["Attn" if level in attention else "" for level in range(len(widths))]
        mirrored = {
            "out_channels": channels,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "block_out_channels": [width // widths[0] * widths[0] for width in widths],
        }
        _covered(path, {name: list(v) if isinstance(v, tuple) else v for name, v in said.items()}, mirrored)
        size = said["sample_size"]
        if channels not in (1, 3) or not fits(size, int) or not 0 < size < 65_536:
            raise InputError(
                f"{path}: in_channels {json.dumps(channels)} with sample_size {json.dumps(size)} is not "
                "covered; 1 or 3 are, with the side of square images"
            )
        config = ModelConfig(
            base_channels=widths[0],
            channel_multipliers=tuple(width // widths[0] for width in widths),
            num_blocks=said["layers_per_block"],
            attention_levels=attention,
            attention_head_channels=said["attention_head_dim"],
            dropout=float(said["dropout"]),
            norm_groups=said["norm_num_groups"],
            time_conditioning=conditioning,
        )
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not a UNet2DModel's: {' '.join(str(error).split())}") from error
    return config, channels, said["sample_size"]


def _process(path: Path | None) -> tuple[DiffusionConfig, Variance]:
    """What a scheduler's file says of the chain, and of the variance of a step back."""
    if path is None:
        warn_of_assumed_process()
        return DiffusionConfig(), "beta"
    said = YOUNGER_PROCESS | {"prediction_type": "epsilon"} | _table(path)
    _covered(path, said, PROCESS | YOUNGER_PROCESS)
    prediction = _one_of(path, "prediction_type", said, PREDICTIONS)
    variance = _one_of(path, "variance_type", said, VARIANCES)
    if said.get("beta_schedule") == "squaredcos_cap_v2":
        return DiffusionConfig(schedule="cosine", prediction=prediction), variance
    _covered(path, said, LINEAR)
    return DiffusionConfig(prediction=prediction), variance


def _their_parameters(folder: Path) -> dict[str, Tensor]:
    """The network's parameters under the names that diffusers has today."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise InputError(
            f"{folder} holds no diffusion_pytorch_model.safetensors but {held}; diffusers writes it there: "
            f"UNet2DModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    for old, new in ATTENTION_OF_OLD:
        tensors = {re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name): t for name, t in tensors.items()}
    return tensors


def save_diffusers(model: UNet, config: Config, image_size: int, variance: Variance, folder: Path) -> None:
    """Fill a folder that `diffusers.DDPMPipeline.from_pretrained` loads, and that samples what Algorithm 2 does here.

    Args:
        model: in evaluation mode.
        folder: an empty one.
    Raises:
        InputError: diffusers is not installed, or cannot express the network: see `diffusers_network`.
    """
    try:
        from diffusers import DDPMPipeline, DDPMScheduler
    except ImportError as error:
        raise InputError("diffusers is not installed: pip install 'ddpm-lab[diffusers]'") from error

    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if config.diffusion.prediction not in names:
        raise InputError(
            f"diffusers' DDPMScheduler has no prediction {config.diffusion.prediction}; it has {', '.join(names)}"
        )
    betas = {"beta_schedule": "squaredcos_cap_v2"} if config.diffusion.schedule == "cosine" else LINEAR
    scheduler = DDPMScheduler(
        num_train_timesteps=config.diffusion.num_timesteps, prediction_type=names[config.diffusion.prediction],
        variance_type={ours: theirs for theirs, ours in VARIANCES.items()}[variance],
        clip_sample=True, timestep_spacing="trailing", **betas,
    )  # fmt: skip
    DDPMPipeline(diffusers_network(model, image_size), scheduler).save_pretrained(folder, safe_serialization=True)

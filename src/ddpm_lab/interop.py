"""diffusers' form of our networks: the same weights under other names."""

import re
from typing import Any

from torch import Tensor

from ddpm_lab.settings import InputError
from ddpm_lab.unet import UNet

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


def diffusers_parameters(model: UNet) -> dict[str, Tensor]:
    """The parameters as `diffusers.UNet2DModel` names them; queries, keys and values are three layers there."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in RENAMES:
            name = re.sub(ours, theirs, name)
        if "query_key_value" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("query_key_value", f"to_{letter}")] = part
        else:
            renamed[name] = tensor
    return renamed


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
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=config.norm_groups,
        act_fn="silu",
        dropout=config.dropout,
    )
    network.load_state_dict(diffusers_parameters(model))
    return network.train(model.training)

"""The network: the U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), eps_theta(x_t, t).

Its input is x_t and t, not the schedule. Strided convolutions halve the resolution on the way down, nearest-neighbour
upsampling doubles it on the way up; every state on the way down is kept on a stack and concatenated on the way up.
Shapes: (B, channels, height, width), and E for the width of the time embedding.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_lab.core.config import ModelConfig
from ddpm_lab.core.errors import InputError

NARROW_HEAD = 16  # channels of a head below which attention on a CPU is faster with padding
CACHED_WEIGHTS = 2**21  # attention weights that fit into the cache of a CPU

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def timestep_embedding(position: Tensor, channels: int, flip_sin_to_cos: bool = False, freq_shift: int = 1) -> Tensor:
    """Sines then cosines of a position at frequencies 1 .. 1/10000 (Vaswani et al. 2017; Ho et al.'s spacing).

    Args:
        position: (B,) float32, on the scale of 0 .. 999.
        channels: even, at least 4.
        flip_sin_to_cos: cosines then sines.
        freq_shift: 0: 1/10000 would be the frequency after the last.
    Returns:
        (B, channels) float32.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / (half - freq_shift)
    angle = position[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()], dim=1)


def _entries(table: Tensor, t: Tensor) -> Tensor:
    """table[t]; for a floating t interpolated linearly."""
    if not t.is_floating_point():
        return table[t]
    below = t.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], t - below)


def _table(rows: int, columns: int) -> nn.Embedding:
    """nn.Embedding with its usual initial values; without them on the meta device, where drawing takes seconds."""
    weight = torch.empty(rows, columns)
    return nn.Embedding(rows, columns, _weight=weight if weight.is_meta else weight.normal_())


def _convolution(in_channels: int, out_channels: int, kernel_size: int = 3, scale: float = 1.0) -> nn.Conv2d:
    return _initialised(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2), scale)


def _norm(channels: int, config: ModelConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)


def _initialised(layer: Layer, scale: float = 1.0) -> Layer:
    """The layer with uniform weights of variance scale / fan_avg, as Ho et al.; scale 0 makes a block the identity."""
    if scale > 0:
        nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; 1x1 shortcut where channels change.

    The embedding of time and class is added before the second normalisation (Ho et al. 2020), or scales and shifts its
    output (Dhariwal and Nichol 2021, arXiv:2105.05233, eq. 3, "AdaGN").
    """

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.scale_shift = config.time_conditioning == "scale_shift"
        self.norm1 = _norm(in_channels, config)
        self.conv1 = _convolution(in_channels, out_channels)
        self.embedding = _initialised(nn.Linear(4 * config.base_channels, out_channels * (1 + self.scale_shift)))
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _convolution(out_channels, out_channels, scale=0)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else _convolution(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        projected = self.embedding(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h += projected
            h = self.norm2(h)
        h = self.conv2(self.dropout(F.silu(h)))
        h += self.shortcut(x)
        return cast(Tensor, h)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for each image and head.

    Args:
        q, k, v: (B, heads, positions, d).
    Returns:
        (B, heads, positions, d).
    """
    d = q.shape[-1]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        if q.device.type == "cpu" and d < NARROW_HEAD:  # a kernel for wider heads, on zeros, is faster than none
            q, k, v = (F.pad(x, (0, NARROW_HEAD - d)) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]
    # On the CPU bfloat16 has fast products but no fast fused kernel: compute products, of as many images at a time as
    # keep the weights in the cache.
    images = max(1, CACHED_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[2]))
    parts = zip(*(torch.split(x, images) for x in (q * d**-0.5, k, v)), strict=True)
    return torch.cat([(a @ b.transpose(-1, -2)).softmax(-1) @ c for a, b, c in parts])


class SelfAttention(nn.Module):
    """Every position attends to every other: softmax(q k^T / sqrt(channels per head)) v, added to the input."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.heads = channels // (config.attention_head_channels or channels)
        self.norm = _norm(channels, config)
        self.query_key_value = _initialised(nn.Linear(channels, 3 * channels))
        self.out = _initialised(nn.Linear(channels, channels), scale=0)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.query_key_value(tokens).view(B, H * W, 3, self.heads, C // self.heads)
        attended = attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(B, H * W, C)
        return x + cast(Tensor, self.out(attended)).transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, with `downsample_padding` 0 padded as Ho et al. do."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.conv = _initialised(nn.Conv2d(channels, channels, 3, stride=2, padding=config.downsample_padding))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it, and the resampling."""

    def __init__(
        self, channels: Sequence[tuple[int, int]], config: ModelConfig, attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(i, o, config) for i, o in channels)
        self.attentions = nn.ModuleList(SelfAttention(o, config) if attention else nn.Identity() for _, o in channels)
        self.resample = resample


class UNet(nn.Module):
    """eps_theta(x_t, t) of Ho et al. 2020; the default arguments are their CIFAR-10 network (35,746,307 parameters).

    Args:
        image_channels: channels of the images.
        base_channels: channels of the first level, a multiple of 4 and of norm_groups.
        channel_multipliers: one per level; each level after the first halves height and width.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels with self-attention, counted from 0; the middle always has it.
        num_timesteps: T; the network takes integer t and scales it itself.
        **settings: the other settings of `ModelConfig`, such as dropout. Warns if norm_groups gives a level one channel
            per group: the normalisation then removes what the time embedding adds to a channel, and the level ignores
            t.
    Raises:
        InputError: a value out of range, or values that do not fit each other.
        TypeError: no such setting.
    """

    def __init__(
        self,
        image_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (1,),
        *,
        num_timesteps: int = 1000,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            base_channels=base_channels,
            channel_multipliers=tuple(channel_multipliers),
            num_blocks=num_blocks,
            attention_levels=tuple(attention_levels),
            **settings,
        )
        norm_groups, patch_size, num_classes = self.config.norm_groups, self.config.patch_size, self.config.class_count
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        if self.config.time_conditioning == "shift" and norm_groups in widths:
            warnings.warn(
                f"model.norm_groups of {norm_groups} equals the channels of a level, which then ignores the timestep; "
                "use fewer groups",
                stacklevel=2,
            )
        self.image_channels, self.num_timesteps = image_channels, num_timesteps
        embedding_channels = 4 * base_channels
        last = len(widths) - 1

        self.time_embedding = nn.Sequential(
            _initialised(nn.Linear(base_channels, embedding_channels)),
            nn.SiLU(),
            _initialised(nn.Linear(embedding_channels, embedding_channels)),
        )
        # the last row is for no label
        self.class_embedding = None if num_classes is None else _table(num_classes + 1, embedding_channels)
        self.conv_in = _convolution(image_channels * patch_size**2, base_channels)

        # `kept` holds the channels of every state on the way down; the way up concatenates the states in reverse order.
        kept = [base_channels]
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            blocks = [(kept[-1] if n == 0 else width, width) for n in range(num_blocks)]
            resample: nn.Module | None = Downsample(width, self.config) if index < last else None
            self.down.append(Level(blocks, self.config, index in attention_levels, resample))
            kept += [width] * (num_blocks + (index < last))

        middle = widths[-1]
        self.middle_in = ResidualBlock(middle, middle, self.config)
        self.middle_attention = SelfAttention(middle, self.config)
        self.middle_out = ResidualBlock(middle, middle, self.config)

        self.up = nn.ModuleList()
        current = middle
        for index, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(num_blocks + 1):
                blocks.append((current + kept.pop(), width))
                current = width
            resample = Upsample(width) if index > 0 else None
            self.up.append(Level(blocks, self.config, index in attention_levels, resample))
        assert not kept

        self.norm_out = _norm(widths[0], self.config)
        self.conv_out = _convolution(widths[0], image_channels * patch_size**2, scale=0)
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", None)

    def scale_input(self, scale: Tensor | None) -> None:
        """Set the factor of x_t at the input, scale[t] with scale (T,); None: no factor (see `process.input_scale`)."""
        device = self.conv_out.weight.device
        self.register_buffer("input_scale", None if scale is None else scale.float().to(device), persistent=False)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for an unconditional network."""
        return self.config.class_count or 0

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of this."""
        return int(self.config.patch_size * 2 ** (len(self.down) - 1))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noised images.

        Args:
            x_t: (B, C, H, W) float32; H and W multiples of `size_multiple`.
            t: (B,) int64 in [0, T); or floating, for noise levels between those of the chain.
            y: (B,) int64, the label of each image, or num_classes for none; None: no labels.
        Returns:
            (B, C, H, W), in the dtype of the last convolution.
        Raises:
            InputError: channels or size that do not fit the network, or labels for an unconditional network.
        """
        patch_size = self.config.patch_size
        _, C, H, W = x_t.shape
        if self.image_channels != C or H % self.size_multiple or W % self.size_multiple:
            raise InputError(
                f"this network takes (B, {self.image_channels}, H, W) with H and W multiples of {self.size_multiple}, "
                f"not {tuple(x_t.shape)}"
            )
        # The position stands for the noise level, for every T; in float32, for bfloat16 rounds 999 to 1000.
        config = self.config
        position = config.num_positions * (t.float() + 1) / self.num_timesteps - 1
        embedding = timestep_embedding(position, config.base_channels, config.flip_sin_to_cos, config.freq_shift)
        embedding = self.time_embedding(embedding)  # (B, E)
        if self.class_embedding is not None:
            no_label = torch.full_like(t, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedding(no_label if y is None else y)
        elif y is not None:
            raise InputError("this network is unconditional and takes no y")
        embedding = F.silu(embedding)

        if self.input_scale is not None:
            x_t = x_t * _entries(self.input_scale, t)[:, None, None, None]
        h = self.conv_in(F.pixel_unshuffle(x_t, patch_size) if patch_size > 1 else x_t)
        states = [h]
        for level in cast(Iterable[Level], self.down):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(h, embedding))
                states.append(h)
            if level.resample is not None:
                h = level.resample(h)
                states.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, embedding)), embedding)
        for level in cast(Iterable[Level], self.up):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(torch.cat([h, states.pop()], dim=1), embedding))
            if level.resample is not None:
                h = level.resample(h)
        assert not states
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, patch_size) if patch_size > 1 else cast(Tensor, h)


def build_unet(
    config: ModelConfig, image_channels: int, image_size: int, num_timesteps: int, input_scale: Tensor | None = None
) -> UNet:
    """The network of a configuration, for square images of one size.

    Args:
        config: the settings of the network.
        image_channels: channels of the images.
        image_size: side in pixels.
        num_timesteps: T.
        input_scale: see `UNet.scale_input`.
    Raises:
        InputError: the levels and patches do not divide image_size.
    """
    model = UNet(image_channels, **dataclasses.asdict(config), num_timesteps=num_timesteps)
    if image_size % model.size_multiple:
        raise InputError(
            f"images of {image_size} x {image_size} do not fit a network of {len(config.channel_multipliers)} levels "
            f"and patches of {config.patch_size}: the size must be a multiple of {model.size_multiple}"
        )
    model.scale_input(input_scale)
    return model

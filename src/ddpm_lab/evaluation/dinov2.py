"""DINOv2 as a feature network: the features of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675).

The network is the ViT-L/14 of Oquab et al. 2023, arXiv:2304.07193, and a feature is its class token after the last
normalisation. Images are prepared as Stein et al. published: Pillow scales the uint8 picture to 224 x 224 with its
bicubic filter, which widens where a picture becomes smaller, and rounds to uint8; then ImageNet's mean and standard
deviation are applied. Invariant: the file alone determines the size of the network.
"""

import importlib.util
import math
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.functional import pil_to_tensor

from ddpm_lab.core.errors import InputError
from ddpm_lab.evaluation.features import FeatureNetwork, PublishedWeights, another_layout

DINOV2 = PublishedWeights(
    "DINOv2",
    "https://huggingface.co/facebook/dinov2-large/resolve/47b73eefe95e8d44ec3623f8890bd894b6ea2d6c/model.safetensors",
    "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    1_217_522_888,
)
SIDE = 224  # pixels
HEAD = 64  # features of an attention head, in every DINOv2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels of ImageNet in [0, 1]
TIMM_NAMES = {  # what parts of the names in the file are called in timm
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


class _DINOv2(nn.Module):
    """Takes (B, 1 or 3, H, W) uint8, returns class tokens, (B, d) float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        width = state["embeddings.cls_token"].shape[-1]
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
        if SIDE % patch or width % HEAD:
            raise RuntimeError(f"patches of {patch} pixels, {width} features")
        with torch.device("meta"):  # the tensors of the file take the places of these, which hold nothing
            self.transformer = VisionTransformer(
                img_size=SIDE, patch_size=patch, embed_dim=width, depth=depth, num_heads=width // HEAD,
                init_values=1.0, num_classes=0,
            )  # fmt: skip
        self.transformer.load_state_dict(_in_timm(state, depth, SIDE // patch), assign=True)
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = torch.stack([scaled(image) for image in images.cpu()]).to(images.device)
        tokens: Tensor = self.transformer((pixels / 255 - self.mean) / self.std)
        return tokens


def scaled(image: Tensor) -> Tensor:
    """An image, (C, H, W) uint8 on the CPU, scaled to (C, 224, 224) by Pillow."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
    result: Tensor = pil_to_tensor(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return result


def _in_timm(state: dict[str, Tensor], depth: int, side: int) -> dict[str, Tensor]:
    """The tensors under timm's names: query, key and value are one matrix there, and positions those of a 224 image."""
    renamed = {}
    for name, tensor in state.items():
        if ".attention.attention." not in name and name != "embeddings.mask_token":  # the mask is for training
            for part, other in TIMM_NAMES.items():
                name = name.replace(part, other)
            renamed[name] = tensor.float()
    for i in range(depth):
        for kind in ("weight", "bias"):
            qkv = [state[f"encoder.layer.{i}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv).float()
    renamed["pos_embed"] = _positions(renamed["pos_embed"], side)
    return renamed


def _positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings of a class token and side x side patches, from those of another grid, (1, 1 + grid^2, d).

    The authors' code scales by (side + 0.1) / grid, bicubic without antialiasing, so the published features contain
    that 0.1; timm and transformers scale in another way.
    """
    grid = math.isqrt(table.shape[1] - 1)
    if grid == side:
        return table
    patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    patches = interpolate(patches, scale_factor=(side + 0.1) / grid, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def dinov2_network(weights: Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of FD-DINOv2; its features are 1,024 numbers.

    Args:
        weights: its file, safetensors with the names of `facebook/dinov2-large`; smaller and larger networks of the
            family load too; None: DDPM_DINOV2_WEIGHTS, else the cache, filled by a verified download.
        device: where it runs.
    Raises:
        InputError: timm is not installed, no file and no network, a file that is truncated or has another layout.
    """
    if importlib.util.find_spec("timm") is None:
        raise InputError("--features dinov2 needs timm: pip install 'ddpm-lab[dinov2]'")
    path, digest = DINOV2.find(weights)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"DINOv2 weights {path} are truncated or no safetensors file: {path.stat().st_size} bytes, the official "
            f"file has {DINOV2.num_bytes}"
        ) from error
    with another_layout(f"DINOv2 weights {path}, which must be those of facebook/dinov2-large,"):
        module = _DINOv2(state)
    name, distance = DINOV2.label(path, digest, "FD-DINOv2")
    return FeatureNetwork(
        name=name,
        module=module.eval().to(device),
        sha256=digest,
        library="timm",
        version=version("timm"),
        distance=distance,
        classifies=False,
        batch_size=25,
    )

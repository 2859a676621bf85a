"""The device, and the precision of convolutions and products on it.

Invariant: float32 is float32. On NVIDIA cards it never means TF32, whose significand has 11 bits in place of 24.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import nn

from ddpm_lab.core import processes
from ddpm_lab.core.config import Precision
from ddpm_lab.core.errors import InputError

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def disable_tf32() -> None:
    """Have products and convolutions in float32 keep all digits, in this process and from now on.

    By PyTorch's default, convolutions on CUDA would use TF32, and products would not.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def uses_tf32() -> bool:
    """Whether products or convolutions in float32 would use TF32 on a card that has it."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Within it, if enabled, PyTorch uses algorithms that give the same bits each time, and refuses others.

    On a CPU all that this package uses gives the same bits anyway. cuBLAS reads its setting before the first product on
    a GPU; where one was computed before, PyTorch refuses unless the environment has CUBLAS_WORKSPACE_CONFIG=:4096:8.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may differ between calls
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by their measured speed
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def resolve_device(device: str) -> torch.device:
    """The device of a name; 'auto' is a GPU if there is one, else the CPU. Each process of a node has its own GPU.

    All that computes comes through here, so this is where TF32 is disabled.

    Raises:
        InputError: an unknown name, a device that this machine lacks, or fewer GPUs than processes.
    """
    disable_tf32()
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name in present if present[name]]
    if device == "auto":
        device = available[0]
    if device not in present:
        raise InputError(f"device must be auto, cpu, cuda or mps, not {device!r}")
    if device not in available:
        raise InputError(f"device {device} is not on this machine; it has {', '.join(available)}")
    if device != "cuda" or processes.world_size() == 1:
        return torch.device(device)
    if processes.local_rank() >= torch.cuda.device_count():
        raise InputError(f"this machine has {torch.cuda.device_count()} GPUs, fewer than processes")
    return torch.device("cuda", processes.local_rank())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and products; 'auto' is the fastest that the device has instructions for.

    That is bfloat16, on a CUDA card of compute capability 7 (V100, T4, RTX 20) float16, and elsewhere float32.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    native = False
    if device.type == "cpu":
        # only newer versions of torch have this function
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def precision_of(dtype: torch.dtype) -> Precision:
    """The setting that resolves to `dtype` on any device."""
    return cast(Precision, next(name for name, known in DTYPES.items() if known == dtype))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Within it, convolutions, products and attention use `dtype`; normalisation computes statistics in float32.

    The backward pass in float16 needs a scaled loss, see `training.optimizer.LossScale`.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compiled(model: nn.Module) -> nn.Module:
    """The network compiled by torch.compile, at the first call with a batch size and dtype; it shares the parameters.

    The timesteps are a tensor, so that one graph serves all of them.
    """
    return cast(nn.Module, torch.compile(model, dynamic=False))

"""Where the work is done: the device, and the precision of convolutions and products there."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from ddpm_lab.core import processes
from ddpm_lab.core.config import Precision
from ddpm_lab.core.errors import InputError


def resolve_device(device: str) -> torch.device:
    """'auto' is the GPU where there is one, else Apple's, else the CPU.

    Raises:
        InputError: unknown, or not on this machine.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return _own(torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name])))
    if device not in available:
        raise InputError(f"device must be auto, cpu, cuda or mps, not {device!r}")
    if not available[device]:
        raise InputError(
            f"device {device} is not on this machine; it has {', '.join(k for k, v in available.items() if v)}"
        )
    return _own(torch.device(device))


def _own(device: torch.device) -> torch.device:
    """Of several processes on a node, each has a GPU to itself."""
    if device.type != "cuda" or processes.world_size() == 1:
        return device
    if processes.local_rank() >= torch.cuda.device_count():
        raise InputError(f"{torch.cuda.device_count()} GPUs are here, too few for a process {processes.local_rank()}")
    return torch.device("cuda", processes.local_rank())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and products: for 'auto', bfloat16 where the device has instructions for it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":
            # told by newer versions of torch only
            capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
            native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        else:
            native = False
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bf16": torch.bfloat16}[precision]


def precision_of(dtype: torch.dtype) -> Precision:
    """The setting that resolves to `dtype` on any device."""
    return "bf16" if dtype == torch.bfloat16 else "float32"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Convolutions, products and attention in `dtype`; normalisation takes its statistics in float32 all the same."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compiled(model: nn.Module) -> nn.Module:
    """The same network and parameters with kernels of its own, made at the first call for its batch size and dtype.

    The timesteps are a tensor, so there is one graph for all of them; batches have one size in training and sampling.
    """
    return cast(nn.Module, torch.compile(model, dynamic=False))

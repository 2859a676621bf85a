"""ONNX Runtime in place of PyTorch where nothing is trained: sampling and features on the CPU, in float32.

The graph is exported once, which takes some ten seconds, and kept in the cache under the hash of what it depends on.
"""

import hashlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddpm_lab.config import Engine
from ddpm_lab.files import cache_dir, replace_atomically
from ddpm_lab.settings import InputError, RunError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_packages() -> list[str]:
    """Those of the extra `onnx` that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def resolve_engine(engine: Engine, device: torch.device) -> Engine:
    """The engine that there is: warns, and names the extra that brings ONNX Runtime, where that is not installed.

    Raises:
        InputError: ONNX Runtime is asked for elsewhere than on the CPU.
    """
    if engine != "onnx":
        return engine
    if device.type != "cpu":
        raise InputError(f"--engine onnx is for the CPU, not for {device.type}; give --device cpu, or --engine torch")
    missing = missing_packages()
    if missing:
        warnings.warn(
            f"--engine onnx needs {', '.join(missing)} (pip install 'ddpm-lab[onnx]'); PyTorch computes instead",
            stacklevel=2,
        )
    return "torch" if missing else "onnx"


class OnnxNetwork(nn.Module):
    """A network whose evaluations ONNX Runtime computes; equal to PyTorch's to about 1e-5.

    Args:
        module: in evaluation mode, on the CPU.
        example: tensors it takes, of batch size 2; the batch may have any size later.
        identity: what the graph depends on beside the versions of the packages: weights, shape.
    Raises:
        RunError: it cannot be exported.
    """

    def __init__(self, module: nn.Module, example: Sequence[Tensor], identity: str) -> None:
        super().__init__()
        self.session = _session(module, example, identity)
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        feed = {name: tensor.numpy() for name, tensor in zip(self.inputs, tensors, strict=True)}
        found = [torch.from_numpy(array) for array in self.session.run(None, feed)]
        return found[0] if len(found) == 1 else tuple(found)


def _session(module: nn.Module, example: Sequence[Tensor], identity: str) -> Any:
    """A session on the graph in the cache, exported first where there is none or it cannot be read."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    parts = (identity, *(f"{tensor.dtype} {tuple(tensor.shape[1:])}" for tensor in example))
    parts += tuple(f"{package} {version(package)}" for package in ("torch", "ddpm-lab", *PACKAGES))
    path = cache_dir() / "onnx" / f"{hashlib.sha256('; '.join(parts).encode()).hexdigest()[:40]}.onnx"
    if path.is_file():
        try:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception:  # whatever a damaged file makes the parser raise: it is made anew
            path.unlink(missing_ok=True)
    try:
        content = export(module, example)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the exporter's and the runtime's own kinds
        raise RunError(
            f"this network cannot be exported to ONNX ({type(error).__name__}); give --engine torch"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, content)
    return session


def export(
    module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> bytes:
    """The ONNX graph of a network, weights included, for any batch size.

    Args:
        module: in evaluation mode, on the CPU.
        example: tensors it takes, of batch size 2.
        inputs, outputs: their names in the graph; none: made up.
    """
    names = list(inputs) or [f"input_{index}" for index in range(len(example))]
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own parts, about which a user can do nothing
        program = torch.onnx.export(
            module, tuple(example), dynamo=True, input_names=names, output_names=list(outputs) or None, verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in example),
        )  # fmt: skip
    assert program is not None
    return cast(bytes, program.model_proto.SerializeToString())

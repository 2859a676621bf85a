"""Generators as ONNX graphs: the network alone, and a whole sampler from noise to images, for any runtime.

A sampler that adds no noise is, at each step, linear in its state, in the predicted image and in the one of the step
before; the predicted image is a clipped linear function of the state and of what the network says. The numbers are read
off the sampler itself, which is run once on a made-up network in float64, so there is no second copy of it here. They
drive an ONNX `Loop` around the network's graph: a graph of 50 steps is as small as one of 5.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lab.core.config import Predicted, Spacing
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import progress
from ddpm_lab.diffusion.guidance import guided
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.samplers import Step, ddim_steps
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.diffusion.solvers import dpmpp_steps
from ddpm_lab.diffusion.unet import UNet
from ddpm_lab.models.trained import TrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LoopSampler = Literal["ddim", "dpmpp"]
SPACING: dict[LoopSampler, Spacing] = {"ddim": "uniform", "dpmpp": "logsnr"}
IMAGE_OF_OUTPUT: dict[str, str] = {  # in the example's words
    "eps": "(x - noise * output) / signal",
    "x_0": "output",
    "v": "signal * x - noise * output",
    "edm": "(signal * {0}**2 * x + noise * {0} * (signal**2 * {0}**2 + noise**2) ** 0.5 * output)"
    " / (signal**2 * {0}**2 + noise**2)",
}


@dataclass(frozen=True)
class LinearSteps:
    """A sampler's numbers, one for each of its S steps, (S,).

    x_0_hat = clip(image_of_state x_t + image_of_output output, -1, 1)
    x_s = keep x_t + add x_0_hat + recall (x_0_hat of the step before)

    Attributes:
        t: timesteps, int64; the others are float64.
    """

    t: np.ndarray
    image_of_state: np.ndarray
    image_of_output: np.ndarray
    keep: np.ndarray
    add: np.ndarray
    recall: np.ndarray


def linear_steps(sampler: LoopSampler, schedule: NoiseSchedule, num_steps: int, prediction: Predicted) -> LinearSteps:
    """Read a sampler's numbers off its steps.

    Raises:
        InputError: num_steps out of range.
    """
    generator = torch.Generator().manual_seed(0)
    outputs: list[Tensor] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        outputs.append(torch.randn(x_t.shape, generator=generator, dtype=torch.float64))
        return outputs[-1]

    x_T = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    settings: dict[str, Any] = {"clip_x_0": False, "prediction": prediction, "spacing": SPACING[sampler]}
    run: Callable[..., Iterator[Step]] = ddim_steps if sampler == "ddim" else dpmpp_steps
    steps = list(run(model, schedule, x_T, num_steps, **settings))
    of_image, of_state = [], []
    before: list[Tensor] = []
    for step, output in zip(steps, outputs, strict=True):
        of_image.append(_solve([step.x_t, output], step.x_0_hat))
        of_state.append([*_solve([step.x_t, step.x_0_hat, *before], step.x_s), 0.0][:3])  # nothing is before the first
        before = [step.x_0_hat]
    timesteps = np.array([step.t for step in steps])
    return LinearSteps(timesteps, *np.array(of_image).T, *np.array(of_state).T)


def _solve(columns: list[Tensor], result: Tensor) -> list[float]:
    """The numbers by which columns add up to a result, which they do but for rounding."""
    scales = [float(column.norm()) for column in columns]  # they differ by many orders of magnitude
    matrix = torch.stack([column.flatten() / scale for column, scale in zip(columns, scales, strict=True)], 1)
    found = torch.linalg.lstsq(matrix, result.flatten()).solution
    if float((matrix @ found - result.flatten()).norm()) > 1e-9 * float(result.norm()):
        raise InputError("this sampler is not linear in its state and predictions, and has no graph")
    return [float(number) / scale for number, scale in zip(found, scales, strict=True)]


def save_onnx(
    trained: TrainedModel, sampler: LoopSampler, num_steps: int, guidance: "Guidance | None", folder: Path
) -> None:
    """Fill a folder: network.onnx, sampler.onnx, alpha_bar.npy, and an example that uses them.

    Args:
        guidance: of the sampler's graph; None: none.
    Raises:
        InputError: num_steps out of range, or packages of the extra `onnx` are not installed.
    """
    missing = missing_packages()
    if missing:
        raise InputError(f"{', '.join(missing)} not installed: pip install 'ddpm-lab[onnx]'")
    numbers = linear_steps(sampler, trained.schedule, num_steps, trained.prediction)
    with progress("exporting", 1 + (guidance is not None), "graphs") as advance:
        network = guiding = network_graph(trained)
        advance(1)
        if guidance is not None:
            guiding = network_graph(trained, guidance)
            advance(1)
    (folder / "network.onnx").write_bytes(network)
    (folder / "sampler.onnx").write_bytes(sampler_graph(guiding, numbers, trained.image_shape))
    np.save(folder / "alpha_bar.npy", trained.schedule.alpha_bar.numpy())
    example = (Path(__file__).parent / "onnx_example.txt").read_text(encoding="utf-8")
    shape = ", ".join(map(str, trained.image_shape))
    diffusion = trained.config.diffusion
    image = IMAGE_OF_OUTPUT[diffusion.prediction].format(f"np.float32({diffusion.sigma_data})")
    count = trained.num_classes
    told = {"CLASSES": f"y = np.arange(4) % {count}\n", "AND_Y": ', "y": y'} if count else {"CLASSES": "", "AND_Y": ""}
    for mark, words in {"SHAPE": shape, "IMAGE_OF_OUTPUT": image, **told}.items():
        example = example.replace(mark, words)
    (folder / "example.py").write_text(example)


@dataclass(frozen=True)
class Guidance:
    """How a sampler's graph is guided, see `guidance.guided`.

    Attributes:
        scale: other than 1.
        guide: the network of autoguidance; None: classifier-free.
        timesteps: at which it acts.
    """

    scale: float
    guide: UNet | None
    timesteps: range


class _Guided(nn.Module):
    """A network together with its guidance."""

    def __init__(self, network: UNet, guidance: Guidance) -> None:
        super().__init__()
        self.network, self.guide = network, guidance.guide
        self.scale, self.timesteps = guidance.scale, guidance.timesteps

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        acts = (t >= self.timesteps.start) & (t < self.timesteps.stop)  # a graph cannot branch as `guided` does
        scale = torch.where(acts, self.scale, 1.0)
        worse: Model | None = None
        if self.guide is not None:
            worse = guided(self.guide, y if self.guide.num_classes else None, self.guide.num_classes)
        return guided(self.network, y, self.network.num_classes, scale, guide=worse)(x_t, t)


def network_graph(trained: TrainedModel, guidance: Guidance | None = None) -> bytes:
    """The network: x_t (B, C, H, W) float32 and t (B,) int64 in [0, T) -> output (B, C, H, W) float32.

    One that is told classes takes y (B,) int64 as well, in [0, num_classes], the last for none.

    Args:
        guidance: None: none.
    """
    example = [torch.zeros(2, *trained.image_shape), torch.zeros(2, dtype=torch.int64)]
    module = trained.model if guidance is None else _Guided(trained.model, guidance).eval()
    if trained.num_classes == 0:
        return export(module, example, ("x_t", "t"), ("output",))
    return export(module, [*example, torch.zeros(2, dtype=torch.int64)], ("x_t", "t", "y"), ("output",))


def sampler_graph(network: bytes, steps: LinearSteps, image_shape: tuple[int, int, int]) -> bytes:
    """A whole sampler: noise (B, C, H, W) float32, and y where the network takes it -> images (B, H, W, C) uint8.

    Args:
        network: of `network_graph`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_model_from_string(network)
    graph = model.graph
    classes = [entry for entry in graph.input if entry.name == "y"]  # the loop sees it from outside
    image: list[str | int | None] = ["batch", *image_shape]

    shared = {"x_t", "t", "y", "output", "noise", "images"}  # names that the network or the user knows

    def own(name: str) -> str:
        return name if name in shared else f"ddpm.{name}"  # the network has names of its own inside

    def constant(name: str, value: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), own(name))

    def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, [own(name) for name in inputs], [own(name) for name in outputs], **attributes)

    def value(name: str, kind: int, shape: list[str | int | None]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(own(name), kind, shape)

    tables = {name: getattr(steps, name) for name in ("image_of_state", "image_of_output", "keep", "add", "recall")}
    constants = [
        constant("timesteps", steps.t.astype(np.int64)),
        *(constant(name, table.astype(np.float32)) for name, table in tables.items()),
        constant("num_steps", np.int64(len(steps.t))),
        constant("minus_one", np.float32(-1)),
        constant("one", np.float32(1)),
        constant("half_range", np.float32(127.5)),
        constant("white", np.float32(255)),
        constant("black", np.float32(0)),
        constant("go_on", np.array(True)),
    ]
    body = [
        node("Gather", ["timesteps", "step"], ["t_now"]),
        node("Shape", ["x_t"], ["batch_size"], start=0, end=1),
        node("Expand", ["t_now", "batch_size"], ["t"]),
        *graph.node,  # x_t, t -> output
        *(node("Gather", [name, "step"], [f"{name}_now"]) for name in tables),
        node("Mul", ["image_of_state_now", "x_t"], ["image_a"]),
        node("Mul", ["image_of_output_now", "output"], ["image_b"]),
        node("Add", ["image_a", "image_b"], ["image_free"]),
        node("Clip", ["image_free", "minus_one", "one"], ["x_0_hat"]),
        node("Mul", ["keep_now", "x_t"], ["state_a"]),
        node("Mul", ["add_now", "x_0_hat"], ["state_b"]),
        node("Mul", ["recall_now", "x_0_before"], ["state_c"]),
        node("Sum", ["state_a", "state_b", "state_c"], ["x_s"]),
        node("Identity", ["going"], ["still_going"]),
    ]
    loop = helper.make_graph(
        body,
        "step",
        [
            value("step", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("x_t", TensorProto.FLOAT, image),
            value("x_0_before", TensorProto.FLOAT, image),
        ],
        [
            value("still_going", TensorProto.BOOL, []),
            value("x_s", TensorProto.FLOAT, image),
            value("x_0_hat", TensorProto.FLOAT, image),
        ],
    )
    channels, height, width = image_shape
    whole = helper.make_graph(
        [
            node("Mul", ["noise", "black"], ["no_image"]),
            node("Loop", ["num_steps", "go_on", "noise", "no_image"], ["x_0", "x_0_last"], body=loop),
            node("Add", ["x_0", "one"], ["from_zero"]),
            node("Mul", ["from_zero", "half_range"], ["levels"]),
            node("Round", ["levels"], ["rounded"]),
            node("Clip", ["rounded", "black", "white"], ["clipped"]),
            node("Cast", ["clipped"], ["planes"], to=TensorProto.UINT8),
            node("Transpose", ["planes"], ["images"], perm=[0, 2, 3, 1]),
        ],
        "sampler",
        [value("noise", TensorProto.FLOAT, image), *classes],
        [value("images", TensorProto.UINT8, ["batch", height, width, channels])],
        [*graph.initializer, *constants],
    )
    made = helper.make_model(whole, opset_imports=list(model.opset_import), producer_name="ddpm-lab")
    made.ir_version = model.ir_version
    made.functions.extend(model.functions)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def missing_packages() -> list[str]:
    """Those of the extra `onnx` that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


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

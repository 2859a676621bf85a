"""The ONNX format: graphs of the network alone, and of a whole sampler from noise to images, for any runtime.

Each step of a sampler that adds no noise is linear in its state, the predicted image and what was predicted in the
three steps before; the predicted image is a clipped linear function of the state and the network's output. The
coefficients are found by running the sampler once on random outputs in float64, so no sampler is written twice. They
drive an ONNX `Loop` around the network's graph: a graph of 50 steps is as small as one of 5.
"""

import importlib.util
import io
import logging
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lab.core.config import Predicted
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import counted, progress
from ddpm_lab.diffusion.guidance import guided
from ddpm_lab.diffusion.process import Model
from ddpm_lab.diffusion.schedule import NoiseSchedule
from ddpm_lab.diffusion.solvers import STEPS
from ddpm_lab.diffusion.unet import UNet
from ddpm_lab.models.trained import TrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LoopSampler = Literal["ddim", "dpmpp", "ipndm", "unipc"]
NUM_REMEMBERED = 3  # steps
IMAGE_OF_OUTPUT: dict[str, str] = {  # x_0_hat by prediction, with the names of the example; {0} is sigma_data
    "eps": "(x - noise * output) / signal",
    "x_0": "output",
    "v": "signal * x - noise * output",
    "edm": "(signal * {0}**2 * x + noise * {0} * (signal**2 * {0}**2 + noise**2) ** 0.5 * output)"
    " / (signal**2 * {0}**2 + noise**2)",
}


@dataclass(frozen=True)
class LinearSteps:
    """The coefficients of a sampler, one for each of its S steps, (S,).

    x_0_hat = clip(image_of_state x_t + image_of_output output, -1, 1)
    remembered = memory_of_state x_t + memory_of_image x_0_hat, which is x_0_hat or eps_hat
    x_s = keep x_t + add x_0_hat + sum over k of recall[k] (remembered of the step k + 1 before)

    Attributes:
        t: timesteps, int64; the others are float64.
        recall: (S, 3).
    """

    t: np.ndarray
    recall: np.ndarray
    image_of_state: np.ndarray
    image_of_output: np.ndarray
    keep: np.ndarray
    add: np.ndarray
    memory_of_state: np.ndarray
    memory_of_image: np.ndarray


def linear_steps(sampler: LoopSampler, schedule: NoiseSchedule, num_steps: int, prediction: Predicted) -> LinearSteps:
    """Find a sampler's coefficients by regression on its own steps.

    Raises:
        InputError: num_steps out of range.
    """
    generator = torch.Generator().manual_seed(0)
    outputs: list[Tensor] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        outputs.append(torch.randn(x_t.shape, generator=generator, dtype=torch.float64))
        return outputs[-1]

    x_T = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    steps = list(STEPS[sampler](model, schedule, x_T, num_steps, clip_x_0=False, prediction=prediction))
    numbers, recall = [], []
    remembered: list[Tensor] = []  # the newest first
    for step, output in zip(steps, outputs, strict=True):
        image = _coefficients([step.x_t, output], step.x_0_hat)
        keep, add, *recalled = _coefficients([step.x_t, step.x_0_hat, *remembered], step.x_s)
        recall.append(recalled + [0.0] * (NUM_REMEMBERED - len(remembered)))  # nothing comes before the first step
        alpha_bar, memory = schedule.alpha_bar_at(step.t), (0.0, 1.0)
        if sampler == "ipndm":  # eps_hat instead of x_0_hat
            memory = (1 - alpha_bar) ** -0.5, -((alpha_bar / (1 - alpha_bar)) ** 0.5)
        numbers.append([*image, keep, add, *memory])
        remembered = [memory[0] * step.x_t + memory[1] * step.x_0_hat, *remembered][:NUM_REMEMBERED]
    timesteps = np.array([step.t for step in steps], np.int64)
    return LinearSteps(timesteps, np.array(recall), *np.array(numbers).T)


def _coefficients(columns: list[Tensor], result: Tensor) -> list[float]:
    """The numbers by which the columns add up to a result, up to rounding."""
    scales = [float(column.norm()) for column in columns]  # they differ by many orders of magnitude
    matrix = torch.stack([column.flatten() / scale for column, scale in zip(columns, scales, strict=True)], 1)
    solution = torch.linalg.lstsq(matrix, result.flatten()).solution
    if float((matrix @ solution - result.flatten()).norm()) > 1e-9 * float(result.norm()):
        raise InputError("this sampler is not linear in its state and predictions, so it cannot be a graph")
    return [float(number) / scale for number, scale in zip(solution, scales, strict=True)]


def save_onnx(
    trained: TrainedModel, sampler: LoopSampler, num_steps: int, guidance: "Guidance | None", folder: Path
) -> None:
    """Write a folder: network.onnx, sampler.onnx, alpha_bar.npy, and an example that uses them.

    Args:
        guidance: in the sampler's graph; None: no guidance.
    Raises:
        InputError: num_steps out of range, or packages of the extra `onnx` are not installed.
    """
    missing = missing_packages()
    if missing:
        raise InputError(f"{', '.join(missing)} not installed: pip install 'ddpm-lab[onnx]'")
    steps = linear_steps(sampler, trained.schedule, num_steps, trained.prediction)
    guidances = (None,) if guidance is None else (None, guidance)
    with progress("exporting", len(guidances), "graphs") as advance:
        networks = [network_graph(trained, guidance) for guidance in counted(guidances, advance)]
    (folder / "network.onnx").write_bytes(networks[0])
    (folder / "sampler.onnx").write_bytes(sampler_graph(networks[-1], steps, trained.image_shape))
    np.save(folder / "alpha_bar.npy", trained.schedule.alpha_bar.numpy())
    diffusion, num_classes = trained.config.diffusion, trained.num_classes
    values = {
        "SHAPE": ", ".join(map(str, trained.image_shape)),
        "IMAGE_OF_OUTPUT": IMAGE_OF_OUTPUT[diffusion.prediction].format(f"np.float32({diffusion.sigma_data})"),
        "CLASSES": f"y = np.arange(4) % {num_classes}\n" if num_classes else "",
        "AND_Y": ', "y": y' if num_classes else "",
    }
    (folder / "example.py").write_text(_template("onnx_example.txt", values), encoding="utf-8")


def _template(name: str, values: dict[str, str]) -> str:
    """A text file of this folder with placeholders replaced."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


@dataclass(frozen=True)
class Guidance:
    """The guidance in a sampler's graph, see `guidance.guided`.

    Attributes:
        scale: the guidance scale, other than 1.
        guide: the network of autoguidance; None: classifier-free guidance.
        timesteps: those that are guided.
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
        in_interval = (t >= self.timesteps.start) & (t < self.timesteps.stop)
        scale = torch.where(in_interval, self.scale, 1.0)  # `guided` branches, which a graph cannot
        guide: Model | None = None
        if self.guide is not None:
            guide = guided(self.guide, y if self.guide.num_classes else None, self.guide.num_classes)
        return guided(self.network, y, self.network.num_classes, scale, guide=guide)(x_t, t)


def network_graph(trained: TrainedModel, guidance: Guidance | None = None) -> bytes:
    """The network: x_t (B, C, H, W) float32 and t (B,) int64 in [0, T) -> output (B, C, H, W) float32, for any B.

    A conditional network also takes y (B,) int64 in [0, num_classes]; num_classes itself means no label.

    Args:
        trained: in evaluation mode, on the CPU.
        guidance: None: no guidance.
    """
    module = trained.model if guidance is None else _Guided(trained.model, guidance).eval()
    inputs = {"x_t": torch.zeros(2, *trained.image_shape), "t": torch.zeros(2, dtype=torch.int64)}
    if trained.num_classes:
        inputs["y"] = torch.zeros(2, dtype=torch.int64)  # a tensor of its own, or the exporter would take it for t
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's internals
        program = torch.onnx.export(
            module, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=["output"],
            verbose=False, dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    assert program is not None
    return cast(bytes, program.model_proto.SerializeToString())


def sampler_graph(network: bytes, steps: LinearSteps, image_shape: tuple[int, int, int]) -> bytes:
    """A whole sampler: noise (B, C, H, W) float32, and y where the network takes it -> images (B, H, W, C) uint8.

    `onnx_sampler.txt` holds it, without the network. Its own names start with ddpm_, since the network's graph has many
    names; only x_t, t, y and output are shared.

    Args:
        network: of `network_graph`.
        steps: the sampler's coefficients.
        image_shape: (C, H, W).
    """
    import onnx

    model = onnx.load_model_from_string(network)
    sizes = dict(zip(("CHANNELS", "HEIGHT", "WIDTH"), map(str, image_shape), strict=True))
    graph = onnx.parser.parse_graph(_template("onnx_sampler.txt", sizes))
    (body,) = (node.attribute[0].g for node in graph.node if node.op_type == "Loop")
    index = next(index for index, node in enumerate(body.node) if node.op_type == "NETWORK")
    nodes = [*body.node[:index], *model.graph.node, *body.node[index + 1 :]]
    del body.node[:]
    body.node.extend(nodes)
    scalars = {"minus_one": -1, "one": 1, "half_range": 127.5, "black": 0, "white": 255}
    constants = {name: np.asarray(value, np.float32) for name, value in (asdict(steps) | scalars).items()}
    constants["recall"] = constants["recall"].reshape(-1, NUM_REMEMBERED, 1, 1, 1, 1)  # beside (B, C, H, W)
    constants |= {"t": steps.t, "num_steps": np.array(len(steps.t)), "go_on": np.array(True)}
    constants |= {"first": np.array([0]), "older": np.array([NUM_REMEMBERED - 1])}
    constants["all"] = np.array([NUM_REMEMBERED, 1, 1, 1, 1])
    graph.initializer.extend(model.graph.initializer)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, f"ddpm_{name}") for name, value in constants.items())
    graph.input.extend(entry for entry in model.graph.input if entry.name == "y")
    sampler = onnx.helper.make_model(graph, opset_imports=list(model.opset_import), producer_name="ddpm-lab")
    sampler.ir_version = model.ir_version
    sampler.functions.extend(model.functions)
    onnx.checker.check_model(sampler)
    return bytes(sampler.SerializeToString())


def missing_packages() -> list[str]:
    """The packages of the extra `onnx` that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]

"""A contest: one thing done by several in turns; and the share of the machine's peak that a step reaches.

Machines are shared and noisy, so no number stands alone: what is compared runs in turns, and the ratio of each turn is
what is summed up. Who the contestants are is in `cases`.
"""

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lab.core.device import autocast
from ddpm_lab.training.cost import forward_flops

OURS = "ddpm-lab"
PEERS = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}
KINDS = (  # of work in a step, by the names of PyTorch's operators; the first that fits counts
    ("convolutions", ("convolution",)),
    ("matrix products", ("mm", "addmm", "bmm", "linear")),
    ("attention", ("scaled_dot_product", "softmax")),
    ("normalisation", ("group_norm",)),
    ("activation", ("silu",)),
    ("optimiser, average, gradient norm", ("_fused_adam", "_foreach", "lerp", "linalg_vector_norm", "Optimizer.step")),
    ("copies and conversions", ("copy", "cat", "fill", "zero", "constant_pad", "upsample", "clone")),
)


@dataclass(frozen=True)
class Contest:
    """One thing, done by several.

    Attributes:
        case: what is done.
        unit: what is counted; `amount` of it is done in a turn.
        contestants: a name and what does the thing once; ours first.
    """

    case: str
    unit: str
    amount: int
    contestants: dict[str, Callable[[], object]]


def installed_peers() -> dict[str, str]:
    """Names and versions of the peers that are installed."""
    return {name: version(name) for name, module in PEERS.items() if importlib.util.find_spec(module) is not None}


def run_contest(
    contest: Contest,
    repeats: int,
    on_turn: Callable[[], object] = lambda: None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Let the contestants take turns, after one turn each that does not count.

    Args:
        repeats: turns that count, at least 1.
        on_turn: called after each.
        wait: until the device has done what it was given.
    Returns:
        A record: of each contestant the seconds of a turn and units a second, of each pair (ours against theirs) how
        many times as fast ours is; each as {median, low, high}, low and high being the quartiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contest.contestants}
    for turn in range(repeats + 1):
        for name, act in contest.contestants.items():
            wait()
            begun = time.perf_counter()
            act()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
            on_turn()
    first = next(iter(seconds))
    return {
        "case": contest.case,
        "unit": contest.unit,
        "amount": contest.amount,
        "repeats": repeats,
        "seconds": {name: _spread(times) for name, times in seconds.items()},
        "per_second": {name: _spread([contest.amount / s for s in times]) for name, times in seconds.items()},
        "times_as_fast": {
            name: _spread([theirs / ours for ours, theirs in zip(seconds[first], times, strict=True)])
            for name, times in seconds.items()
            if name != first
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def conditions(device: torch.device) -> dict[str, Any]:
    """The hardware class and the versions that the numbers hold for."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(n for n, has in capabilities.items() if has is True and n.startswith(("avx", "amx"))),
        "versions": {"ddpm-lab": version("ddpm-lab"), "torch": version("torch"), **installed_peers()},
    }


def share_of_peak(
    model: nn.Module, x_t: Tensor, t: Tensor, dtype: torch.dtype, step: Callable[[], object], training: bool
) -> dict[str, Any]:
    """How near a step comes to the speed at which its own convolutions, each alone, run on this machine.

    Args:
        model: the network of the step.
        x_t, t: a batch of it.
        dtype: what it computes convolutions in.
        step: does the step once.
        training: whether it goes backward as well, at twice the operations of forward.
    Returns:
        Operations a second of the step and of its convolutions alone, their ratio `share`, and the milliseconds of the
        step by kind of work.
    """
    factor = 3 if training else 1
    operations = factor * len(x_t) * forward_flops(model, tuple(x_t.shape[1:]))
    alone, alone_operations = 0.0, 0
    for layer, shape, count in _convolutions(model, x_t, t):
        x = torch.randn(shape, device=x_t.device, dtype=dtype)
        parameters = [p.detach().to(dtype) for p in (layer.weight, layer.bias) if p is not None]
        alone += count * _fastest(_convolution_alone(layer, x, parameters, training))
        height, width = layer(x.float()).shape[2:]
        alone_operations += count * factor * 2 * layer.weight.numel() * shape[0] * height * width
    step()
    took = _fastest(step)
    peak = alone_operations / alone
    return {
        "step_flops_per_second": operations / took,
        "convolutions_flops_per_second": peak,
        "share": operations / took / peak,
        "milliseconds": 1000 * took,
        "convolutions_alone_milliseconds": 1000 * alone,
        "by_kind_milliseconds": _by_kind(step),
    }


def _convolutions(model: nn.Module, x_t: Tensor, t: Tensor) -> list[tuple[nn.Conv2d, tuple[int, ...], int]]:
    """The different convolutions of an evaluation: a layer, the shape that goes in, and how often it happens."""
    found: dict[tuple[object, ...], tuple[nn.Conv2d, tuple[int, ...], int]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        shape = tuple(inputs[0].shape)
        key = (shape, layer.weight.shape, layer.stride)
        found[key] = (layer, shape, found[key][2] + 1 if key in found else 1)

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(x_t, t)
    for handle in handles:
        handle.remove()
    return list(found.values())


def _convolution_alone(layer: nn.Conv2d, x: Tensor, parameters: list[Tensor], training: bool) -> Callable[[], object]:
    weight = parameters[0]
    bias: Any = parameters[1] if len(parameters) == 2 else None

    def forward() -> Tensor:
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y

    def evaluate() -> None:
        with torch.no_grad():
            forward()

    if not training:
        return evaluate
    inputs = [tensor.requires_grad_() for tensor in (x, *parameters)]
    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def _fastest(act: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some repeats: what the machine can do, whatever else runs on it."""
    act()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step by kind of work, as PyTorch's profiler counts them (which slows the step somewhat)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent = {name: 0.0 for name, _ in KINDS} | {"the rest": 0.0}
    for event in profiler.key_averages():
        spent[_kind(event.key.removeprefix("aten::"))] += event.self_cpu_time_total / 1000
    return spent


def _kind(operator: str) -> str:
    """What an operator does; short names must be its own, but for the way back (silu_backward) and in place (copy_)."""
    own = operator.removesuffix("_backward").rstrip("_")

    def fits(part: str) -> bool:
        return own == part if len(part) < 7 else part in operator

    return next((kind for kind, parts in KINDS if any(map(fits, parts))), "the rest")


def evaluation_step(model: Callable[..., Any], x_t: Tensor, t: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """One evaluation of a network."""

    def act() -> None:
        with torch.no_grad(), autocast(x_t.device, dtype):
            model(x_t, t)

    return act


def table(record: dict[str, Any]) -> list[str]:
    """Lines for a person, ratios first."""
    lines = [f"{record['case']} ({record['amount']} {record['unit']} a turn, {record['repeats']} turns)"]
    for name, ratio in record["times_as_fast"].items():
        lines.append(f"  {_figures(ratio)} times as fast as {name}")
    for name, rate in record["per_second"].items():
        lines.append(f"  {_figures(rate)} {record['unit']}/s  {name}")
    return lines


def _figures(spread: dict[str, float]) -> str:
    return f"{spread['median']:8.3g} ({spread['low']:.3g} to {spread['high']:.3g})"


def peak_table(what: str, record: dict[str, Any]) -> list[str]:
    """Lines for a person on `share_of_peak`."""
    kinds: Iterable[tuple[str, float]] = sorted(record["by_kind_milliseconds"].items(), key=lambda item: -item[1])
    return [
        f"{what}: {100 * record['share']:.0f} % of the measured peak "
        f"({record['step_flops_per_second'] / 1e9:.0f} of {record['convolutions_flops_per_second'] / 1e9:.0f} GFLOP/s; "
        f"{record['milliseconds']:.0f} ms, of which its convolutions alone would take "
        f"{record['convolutions_alone_milliseconds']:.0f})",
        "  by kind, as the profiler counts: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in kinds if ms >= 0.5),
    ]

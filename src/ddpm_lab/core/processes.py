"""The processes of one command, started by `torchrun` or `accelerate launch` on any number of nodes.

Process 0 reads and writes the files of the run, prints, and decides; all processes hold the same network and each does
a share of the work. Invariant: the result is that of a single process, up to the order of summation. In a single
process the functions here do nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm_lab.core.errors import InputError, RunError

if TYPE_CHECKING:  # the command line needs the rank before anything heavy is imported
    import torch
    from torch import Tensor

Result = TypeVar("Result")
MEETING = timedelta(minutes=10)  # time limit for all processes to connect
AGREEMENT_SECONDS = 2.0  # between questions of `PeriodicAgreement`
PATIENCE = timedelta(days=7)  # time limit for one process at work; a closed connection shows one that has ended

_group: Any = None  # the process group for tensors on the device of the network; created by `join`
_host_group: Any = None  # the process group for tensors and objects on the CPU; created by `join`
_leading = False  # whether the other processes wait for tasks from `map_across_ranks`


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"environment variable {name} must be a whole number, not {text!r}")
    return int(text)


def world_size() -> int:
    """The number of processes (WORLD_SIZE)."""
    return max(_number("WORLD_SIZE", 1), 1)


def rank() -> int:
    """The number of this process, from 0 (RANK)."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process on its node, and of the GPU that it uses (LOCAL_RANK)."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def is_rank0() -> bool:
    """Whether this is process 0; a single process always is."""
    return rank() == 0


def join(device: "torch.device") -> None:
    """Connect to the other processes, by NCCL on GPUs and by gloo on CPUs.

    Args:
        device: the device of this process.
    Raises:
        InputError: processes cannot communicate on such a device.
        RunError: the other processes do not connect in time.
    """
    global _group, _host_group
    if world_size() == 1 or _host_group is not None:
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"several processes need NVIDIA GPUs or CPUs, not {device.type}; give --device cpu")
    import torch.distributed as dist
    from accelerate import PartialState

    try:
        with _default_signal_handlers():
            PartialState(cpu=device.type == "cpu", timeout=MEETING)
            dist.new_group(backend="gloo", timeout=MEETING)  # NCCL connects only at the first transfer
            _group = dist.new_group(timeout=PATIENCE)
            _host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"process {rank()} of {world_size()} could not connect to the others: {error}") from error


@contextmanager
def _default_signal_handlers() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM end the process at once: handlers in Python would wait for code in C++."""
    saved = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                saved[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def leave() -> None:
    """Disconnect from the other processes at the end of a command that succeeded."""
    global _group, _host_group
    if _host_group is not None:
        import torch.distributed as dist

        _group = _host_group = None
        dist.destroy_process_group()


@contextmanager
def peer_failure_guard(advice: str) -> Iterator[None]:
    """Within it, the end of another process becomes a RunError of one line.

    Args:
        advice: what the user can do then.
    Raises:
        RunError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if _host_group is None or not _is_connection_error(error):
            raise
        raise RunError(f"another of the {world_size()} processes ended; {advice}") from error


def _is_connection_error(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("closed by peer", "reset by peer", "gloo/transport", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must call this."""
    if _host_group is None:
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_host_group)
    return bool(flags)


class PeriodicAgreement:
    """Asks after a step whether any process has raised a flag, at steps that all processes know.

    That is where the caller says so, and about every AGREEMENT_SECONDS: process 0 measures the time of a step, and
    tells the others after how many steps to ask again.
    """

    def __init__(self) -> None:
        self._steps, self._ask_after, self._time = 0, 1, time.monotonic()

    def any_rank(self, flag: bool, now: bool) -> bool:
        """Whether any process has raised the flag and this step asks. Every process must call this after each step.

        Args:
            flag: of this process.
            now: whether to ask after this step in any case; the same in every process.
        """
        if not is_distributed():
            return flag
        self._steps += 1
        if self._steps < self._ask_after and not now:
            return False
        seconds_a_step = max((time.monotonic() - self._time) / self._steps, 1e-6)
        self._ask_after = broadcast_number(max(1, int(AGREEMENT_SECONDS / seconds_a_step)))
        self._steps, self._time = 0, time.monotonic()
        return any_rank(flag)


def broadcast_tensors(tensors: Iterable["Tensor"]) -> None:
    """Copy the values of process 0 to every process, in place."""
    if _host_group is not None:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0, group=_group)


def broadcast_number(number: int) -> int:
    """The number that process 0 holds."""
    numbers = [number]
    if _host_group is not None:
        import torch.distributed as dist

        dist.broadcast_object_list(numbers, src=0, group=_host_group)
    return numbers[0]


def data_parallel(network: "torch.nn.Module") -> "torch.nn.Module":
    """The network, with gradients averaged over the processes in the backward pass."""
    if _group is None:
        return network
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(network, process_group=_group, gradient_as_bucket_view=True)


def is_distributed() -> bool:
    """Whether this process is connected to others."""
    return _host_group is not None


def rank_slice(batch: "Tensor") -> "Tensor":
    """The rows of this process in a batch that every process holds, (B, ...) -> (B / world_size, ...)."""
    return batch if _host_group is None else batch.chunk(world_size())[rank()]


def gather(rows: "Tensor") -> "Tensor":
    """The rows of all processes in order, (b, ...) -> (b * world_size, ...): the inverse of `rank_slice`."""
    if _host_group is None:
        return rows
    import torch
    import torch.distributed as dist

    pieces = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(pieces, rows.contiguous(), group=_group)
    return torch.cat(pieces)


def run_on_rank0(work: Callable[[], Result], **tasks: Callable[[Any], Any]) -> Result | None:
    """Run `work` in process 0, while the other processes compute the tasks that its `map_across_ranks` distributes.

    Args:
        work: called in process 0 only.
        tasks: by name, the functions that every process can compute; the same in each process.
    Returns:
        The result of `work` in process 0; None in the others.
    Raises:
        RunError: another process ended.
    """
    global _leading
    if _host_group is None:
        return work()
    with peer_failure_guard("give the same command again"):
        if not is_rank0():
            while _compute_round(None, tasks):
                pass
            return None
        _leading = True
        try:
            result = work()
            _compute_round([None] * world_size(), {})
            return result
        finally:
            _leading = False


def map_across_ranks(name: str, task: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[Result]:
    """task(item) for each item, in order; within `run_on_rank0` every process computes one item at a time.

    Args:
        name: the name of the task in the call of `run_on_rank0`.
    """
    if not _leading:
        yield from map(task, items)
        return
    remaining = iter(items)
    while batch := list(islice(remaining, world_size())):
        # a view is cloned, for the whole tensor behind it would be sent
        assigned = [(name, item.clone() if hasattr(item, "clone") else item) for item in batch]
        idle = [()] * (world_size() - len(batch))
        yield from _compute_round([*assigned, *idle], {name: task})[: len(batch)]


def is_on_another_rank(index: int) -> bool:
    """Whether another process computed result `index` of `map_across_ranks`."""
    return _leading and index % world_size() != 0


def _compute_round(assignments: Sequence[Any] | None, tasks: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """Distribute one task to each process, compute the one of this process, and collect the results in process 0.

    Args:
        assignments: in process 0, (name, item) for each process, () for an idle one, or None for each to end.
        tasks: the functions by name.
    Returns:
        In process 0 the results, in the others a list of one; an empty list at the end.
    """
    import torch.distributed as dist

    received: list[Any] = [None]
    dist.scatter_object_list(received, None if assignments is None else list(assignments), src=0, group=_host_group)
    if received[0] is None:
        return []
    result = None
    if received[0]:
        name, item = received[0]
        result = tasks[name](item)
    results = [None] * (world_size() if is_rank0() else 1)
    dist.gather_object(result, results if is_rank0() else None, dst=0, group=_host_group)
    return results

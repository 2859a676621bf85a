"""The processes that share one command, started by `torchrun` or `accelerate launch` on any number of nodes.

Process 0 leads: it alone speaks, reads and writes the run's files, and decides; the others hold the same network and do
a share of its work. Invariant: what comes out is what one process would have made, up to the order of sums; started
alone, nothing here does anything.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm_lab.core.errors import InputError, RunError

if TYPE_CHECKING:  # the command line asks for the rank before anything heavy is imported
    import torch
    from torch import Tensor

Result = TypeVar("Result")
MEETING = timedelta(minutes=10)  # until all are there
PATIENCE = timedelta(days=7)  # with one at work alone; of one that has died the closed connection tells

_group: Any = None  # passes what lies where the network computes; made by `join`
_host_group: Any = None  # passes what lies in the memory of the hosts; likewise
_leading = False  # whether the others wait for work that `share_out` gives


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"environment variable {name} must be a whole number, not {text!r}")
    return int(text)


def world_size() -> int:
    """How many processes there are (WORLD_SIZE)."""
    return max(_number("WORLD_SIZE", 1), 1)


def rank() -> int:
    """Which of them this one is, from 0 (RANK)."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Which one it is on its node: the GPU it takes (LOCAL_RANK)."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def is_rank0() -> bool:
    """Whether this process leads: always, where it is alone."""
    return rank() == 0


def join(device: "torch.device") -> None:
    """Meet the others, by NCCL on GPUs and by gloo on CPUs; alone, nothing happens.

    Args:
        device: where this process computes.
    Raises:
        InputError: there is no way to meet on such a device.
        RunError: they do not come.
    """
    global _group, _host_group
    if world_size() == 1 or _host_group is not None:
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"several processes share GPUs of NVIDIA or CPUs, not {device.type}; give --device cpu")
    import torch.distributed as dist
    from accelerate import PartialState

    try:
        with _ended_by_signals():
            PartialState(cpu=device.type == "cpu", timeout=MEETING)
            dist.new_group(backend="gloo", timeout=MEETING)  # NCCL waits only when there is something to pass on
            _group = dist.new_group(timeout=PATIENCE)
            _host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"process {rank()} of {world_size()} did not meet the others: {error}") from error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it SIGINT and SIGTERM end the process at once: handlers in Python would wait for what waits in C++."""
    kept = {}
    if threading.current_thread() is threading.main_thread():  # else they cannot be set, and are another's concern
        kept = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
        kept = {one: handler for one, handler in kept.items() if handler not in (None, signal.SIG_IGN)}
    for one in kept:
        signal.signal(one, signal.SIG_DFL)
    try:
        yield
    finally:
        for one, handler in kept.items():
            signal.signal(one, handler)


def leave() -> None:
    """Part from the others at the end of a command that went well."""
    global _group, _host_group
    if _host_group is not None:
        import torch.distributed as dist

        _group = _host_group = None
        dist.destroy_process_group()


@contextmanager
def peer_failure_guard(advice: str) -> Iterator[None]:
    """Within it, another process that ends is told of in one line.

    Args:
        advice: what the user can do then.
    Raises:
        RunError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if _host_group is None or not _is_of_connection(error):
            raise
        raise RunError(f"another of the {world_size()} processes ended; {advice}") from error


def _is_of_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("closed by peer", "reset by peer", "gloo/transport", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if _host_group is None:
        return flag
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_host_group)
    return bool(found)


def broadcast_tensors(tensors: Iterable["Tensor"]) -> None:
    """Give every process the leader's values, in place."""
    if _host_group is not None:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0, group=_group)


def broadcast_number(number: int) -> int:
    """The leader's number, for all."""
    if _host_group is None:
        return number
    import torch
    import torch.distributed as dist

    held = torch.tensor(number)
    dist.broadcast(held, src=0, group=_host_group)
    return int(held)


def data_parallel(network: "torch.nn.Module") -> "torch.nn.Module":
    """The network, with its gradients averaged over the processes on the way back."""
    import torch

    if _group is None:
        return network
    return torch.nn.parallel.DistributedDataParallel(network, process_group=_group, gradient_as_bucket_view=True)


def is_distributed() -> bool:
    """Whether there are others, and this process has met them."""
    return _host_group is not None


def rank_slice(batch: "Tensor") -> "Tensor":
    """This process's rows of a batch that all of them hold, (B, ...) -> (B / count, ...)."""
    if _host_group is None:
        return batch
    each = len(batch) // world_size()
    return batch[rank() * each : (rank() + 1) * each]


def gather(rows: "Tensor") -> "Tensor":
    """The rows of all processes in order, (b, ...) -> (b * count, ...): what `share` took apart."""
    if _host_group is None:
        return rows
    import torch
    import torch.distributed as dist

    pieces = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(pieces, rows.contiguous(), group=_group)
    return torch.cat(pieces)


def run_on_rank0(work: Callable[[], Result], **tasks: Callable[[Any], Any]) -> Result | None:
    """Process 0 does the work, in which `share_out` gives the others tasks to compute; they return None.

    Args:
        work: what only the leader does.
        tasks: by name, what all processes can compute; the same in each.
    Raises:
        RunError: another process ended.
    """
    global _leading
    if _host_group is None:
        return work()
    with peer_failure_guard("give the same command again"):
        if not is_rank0():
            _serve(tasks)
            return None
        _leading = True
        try:
            result = work()
            _round([None] * world_size(), {})
            return result
        finally:
            _leading = False


def map_across_ranks(name: str, task: Callable[[Any], Result], items: Iterable[Any]) -> Iterator[Result]:
    """task(item) of each item, in order; within `led` every process computes one of them at a time.

    Args:
        name: under which `led` was given the task.
    """
    if not _leading:
        yield from map(task, items)
        return
    waiting = iter(items)
    while some := list(islice(waiting, world_size())):
        given: list[Any] = [(name, _alone(item)) for item in some] + [()] * (world_size() - len(some))
        yield from _round(given, {name: task})[: len(some)]


def is_on_another_rank(index: int) -> bool:
    """Whether another process computed result `index` of a `share_out`."""
    return _leading and index % world_size() != 0


def _round(given: Sequence[Any], tasks: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """Hand out one task a process and collect the results, as the leader."""
    import torch.distributed as dist

    own: list[Any] = [None]
    dist.scatter_object_list(own, list(given), src=0, group=_host_group)
    if own[0] is None:
        return []
    results: list[Any] = [None] * world_size()
    dist.gather_object(tasks[own[0][0]](own[0][1]), results, dst=0, group=_host_group)
    return results


def _serve(tasks: dict[str, Callable[[Any], Any]]) -> None:
    """Compute what the leader hands out until it has no more."""
    import torch.distributed as dist

    while True:
        own: list[Any] = [None]
        dist.scatter_object_list(own, None, src=0, group=_host_group)
        if own[0] is None:
            return
        result = tasks[own[0][0]](own[0][1]) if own[0] else None
        dist.gather_object(result, None, dst=0, group=_host_group)


def _alone(item: Any) -> Any:
    """A tensor without the memory that it is a view of, all of which would be sent."""
    return item.clone() if hasattr(item, "clone") else item

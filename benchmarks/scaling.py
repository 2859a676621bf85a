"""`python -m benchmarks --cases scaling`: how time and memory grow with images, features and processes.

Each figure is of whole commands, started anew as users start them, so time counts from the shell and memory is the
largest resident set that the system saw of any of their processes.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch

from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import RunError
from ddpm_lab.core.log import read_lines
from ddpm_lab.core.progress import progress

IMAGES = (64, 1_000, 10_000, 50_000)
PROCESSES = (1, 2)
STEPS = 4  # of sampling: it is the number of images that matters here, not what they show
DDPM = (sys.executable, "-m", "ddpm_lab")
WATCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stderr=subprocess.STDOUT)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""  # between us and a command, for Linux counts as a process's memory that of the one that it was forked from
STATISTICS = """
import sys, tempfile, numpy as np, torch
from ddpm_lab.metrics import frechet_distance, statistics
with tempfile.TemporaryFile() as file:
    for k in range(0, int(sys.argv[1]), 500):
        torch.randn(500, 2048).numpy().tofile(file)
    found = statistics(torch.from_numpy(np.memmap(file, np.float32, "c", shape=(int(sys.argv[1]), 2048))))
    frechet_distance(found, found)
"""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        mebibytes: the largest resident set of any of its processes.
    """

    seconds: float
    mebibytes: float


def cost_of(command: Sequence[str], processes: int = 1, cache: str | None = None) -> Cost:
    """Run a command in processes of its own, and measure it.

    Args:
        cache: the cache folder it gets; None: the user's.
        processes: how many share it, each with its part of the threads that PyTorch has here.
    Raises:
        RunError: it ended with an error; its last line is told.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // processes, 1))}
    if cache is not None:
        environment |= {"DDPM_CACHE_DIR": cache}
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    begun = time.monotonic()
    with ExitStack() as files:
        started = []
        for rank in range(processes):
            said = files.enter_context(TemporaryFile("w+"))
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            watched = (sys.executable, "-I", "-S", "-c", WATCH, *command)
            started.append((subprocess.Popen(watched, env=environment | of_rank, stdout=said), said))
        codes = [child.wait() for child, _ in started]
        seconds, most = time.monotonic() - begun, 0.0
        for code, (_, said) in zip(codes, started, strict=True):
            said.seek(0)
            *lines, memory = said.read().splitlines()
            most = max(most, float(memory))
            if code != 0:
                raise RunError(f"{' '.join(command)} failed: {lines[-1] if lines else 'nothing was said'}")
    return Cost(seconds, most)


def scaling(
    device: str,
    say: Callable[[str], object],
    images: Sequence[int] = IMAGES,
    processes: Sequence[int] = PROCESSES,
    num_steps: int = 200,
) -> list[dict[str, Any]]:
    """Measure all three on 8x8 digits, whose network is small enough for 50,000 images.

    Args:
        device: auto, cpu, cuda or mps.
        say: takes a line for a person.
        images: ascending numbers of images to sample and to score, and of features of 2,048 numbers to compare.
        processes: how many share training, then sampling; more than there are cores or GPUs are left out.
        num_steps: of training that is timed.
    Returns:
        Records {what, images, processes, seconds, mebibytes, images_per_second}: seconds from the shell; the rate of
        training from its log without the first line, that of sampling without what a command with few images takes.
    """
    found: list[dict[str, Any]] = []
    here = resolve_device(device)
    most = {"cpu": os.cpu_count() or 1, "cuda": torch.cuda.device_count()}.get(here.type, 1)
    if most < max(processes):
        say(f"more than {most} processes are not measured: there is nothing here for them to run on")
    processes = [number for number in processes if number <= most]
    on, compared = ("--device", device), [count for count in images if count >= 500]
    commands = 3 * len(processes) + 2 * len(images) + len(compared)
    with TemporaryDirectory() as folder, progress("scaling", commands, "commands") as advance:

        def measure(what: str, count: int, command: Sequence[str], number: int = 1) -> dict[str, Any]:
            cost = cost_of(command, number, f"{folder}/cache")  # what was kept from another time would cost nothing
            advance(1)
            return {"what": what, "images": count, "processes": number, **vars(cost), "images_per_second": None}

        def keep(record: dict[str, Any]) -> None:
            found.append(record)
            rate = record["images_per_second"]
            say(
                f"{record['what']}, {record['processes']} process{'es' * (record['processes'] > 1)}: "
                f"{record['images']:,} images in {record['seconds']:.1f} s"
                f"{f', {rate:,.0f} images/s' if rate else ''}, {record['mebibytes']:,.0f} MiB at most"
            )

        def sampled(count: int, number: int = 1) -> dict[str, Any]:
            flags = ("--num-images", str(count), "--num-steps", str(STEPS), "--out", f"{folder}/images.npz")
            return measure("sampling", count, (*DDPM, "sample", f"{folder}/run-1", *flags, *on), number)

        for number in processes:
            run, every = f"{folder}/run-{number}", str(max(num_steps // 4, 1))
            flags = ("--training.num-steps", str(num_steps), "--training.log-every", every, "--run", run)
            record = measure("training", 128 * num_steps, (*DDPM, "train", "digits", *flags, *on), number)
            rates = [line["images_per_second"] for line in read_lines(Path(run) / "log.jsonl")][1:]
            keep(record | {"images_per_second": median(rates)})
        for number in processes:
            few, many = sampled(images[0], number), sampled(images[-1], number)
            rate = (images[-1] - images[0]) / max(many["seconds"] - few["seconds"], 1e-9)
            keep(many | {"images_per_second": rate})
        for count in images:
            keep(sampled(count))
            scored = ("--reference", "digits:train", "--features", "classifier", "--metrics", "fid", "is", "kid", *on)
            keep(measure("scoring", count, (*DDPM, "evaluate", f"{folder}/images.npz", *scored)))
        for count in compared:
            keep(measure("statistics of features", count, (sys.executable, "-c", STATISTICS, str(count))))
    return found

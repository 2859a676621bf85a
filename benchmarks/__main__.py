"""Measure speed beside the peers that are installed, in turns and in one run: ratios first, then rates.

    python -m benchmarks --out bench.json                                      # minutes on two CPU cores
    python -m benchmarks --network cifar10 --cases evaluation training peak    # the paper's network

Numbers are medians of the turns, with quartiles. The peers come with the extra `bench`.
"""

import argparse
import json
import os
import sys
import typing
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler writes of GPUs that are not there

from benchmarks.cases import Case, run_cases
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import replace_atomically
from ddpm_lab.sampling.image_files import check_writable

CASES: tuple[Case, ...] = typing.get_args(Case)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases named on the command line; the exit code is 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[case for case in CASES if case != "scaling"],
        help="one evaluation of the network, one training step, sampling, statistics of features, scoring by Inception "
        "(five minutes on two CPU cores), the input path, the share of the machine's peak, and, where asked for, how "
        "time and memory grow with images and processes (a quarter of an hour); default: all but scaling",
    )  # fmt: skip
    parser.add_argument("--network", default="small", help="small (1.7 million parameters), or that of a recipe")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant; default 5")
    parser.add_argument("--batch-size", type=int, help="images in an evaluation or step; unset: one that fits")
    parser.add_argument("--out", type=Path, help="FILE.json for the record")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    given = parser.parse_args(arguments)
    try:
        if given.out is not None:
            check_writable(given.out, (".json",), "--out")
        record = run_cases(given.cases, given.network, given.repeats, given.batch_size, given.device, say=print)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.out is not None:
        replace_atomically(given.out, (json.dumps(record, indent=2) + "\n").encode())
        print(f"record: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of training steps, ours and the peers', each in a process of its own.

    python scripts/training_memory.py [small|cifar10|mnist-cpu] [--dtype float32|bf16] [--batch-size N]

prints the largest resident set after five steps, and what of it was there before the network was built (imports).
"""

import argparse
import resource
import subprocess
import sys

import torch

from ddpm_lab.contests import STEPS, subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="small")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--only", choices=list(STEPS))
    given = parser.parse_args()
    of = subject(given.network, given.batch_size)
    if given.only is None:
        for name in STEPS:
            if name == "diffusers" and of.config.patch_size > 1:
                continue
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
        return
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    STEPS[given.only](subject("small", 1), torch.device("cpu"), dtype)()  # whatever is imported on the way
    before = _peak()
    step = STEPS[given.only](of, torch.device("cpu"), dtype)
    for _ in range(5):
        step()
    print(
        f"{given.only}: {_peak():.0f} MiB at its peak, {before:.0f} MiB before; "
        f"{of.name}, batches of {of.batch_size}, {given.dtype}",
        flush=True,
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

"""Time and memory of scoring: `python scripts/score_costs.py distance`, and `python scripts/score_costs.py memory`.

distance: statistics and Frechet distance of 2,048 features (Gaussian, of a falling spectrum like real ones), beside
the matrix square root of SciPy; the reference's factor is computed first, as the cache keeps it.
memory: peak memory of `ddpm evaluate` on 1,000 to 50,000 random 32x32 images against cifar10:train, one process each.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def timed(what: str, call: Callable[[], T]) -> T:
    begun = time.perf_counter()
    result = call()
    print(f"{what:60} {time.perf_counter() - begun:8.2f} s", flush=True)
    return result


def distance(d: int = 2048, n: int = 10_000) -> None:
    import scipy.linalg

    from ddpm_lab.metrics import frechet_distance, statistics

    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1).float() ** -0.8
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q * spectrum
    features, others = (torch.randn(n, d, generator=generator) @ mixing.T + 0.01 * i for i in range(2))
    reference = timed(f"statistics of {n} reference features", lambda: statistics(others))
    timed("factor of the reference, cached", lambda: reference.factor)
    found = timed(f"statistics of {n} features", lambda: statistics(features))
    timed("their factor", lambda: found.factor)
    ours = timed("Frechet distance from the factors", lambda: frechet_distance(found, reference))
    product = found.cov.numpy() @ reference.cov.numpy()
    root = timed("scipy.linalg.sqrtm of the product", lambda: scipy.linalg.sqrtm(product))
    mean = float((found.mean - reference.mean).square().sum())
    theirs = mean + float(found.cov.trace() + reference.cov.trace()) - 2 * float(np.trace(root).real)
    print(f"distances: {ours:.10g} and, with the square root, {theirs:.10g}")


def memory() -> None:
    for n in (1_000, 5_000, 10_000, 50_000):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npz"
            np.savez(path, images=np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
            command = ["evaluate", str(path), "--reference", "cifar10:train", "--features", "classifier", "--json"]
            program = (
                "import resource, sys; from ddpm_lab.cli import run_command; code = run_command(sys.argv[1:]); "
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
            )
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
            peak = int(done.stderr.split()[-1]) / 1024
            print(f"{n:7,} images: {peak:6.0f} MiB at most, {time.perf_counter() - begun:5.0f} s", flush=True)


if __name__ == "__main__":
    {"distance": distance, "memory": memory}[sys.argv[1]]()

"""Seeds: which are valid, and a seed of its own for each random stream."""

from ddpm_lab.core.errors import require

PERMUTATION, STEP, VALIDATION = 0, 1, 2  # what a random stream is for; with the seed and an index it names the stream


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuse a seed that no generator takes; `name` is what messages call it.

    Raises:
        InputError: it is not in 0 .. 2^63 - 1.
    """
    require(0 <= seed < 2**63, f"{name} must be from 0 to 2^63 - 1, not {seed}")


def random_seed(*stream: int) -> int:
    """A 63-bit seed from the integers that name a stream."""
    import numpy as np

    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Seeds: the valid ones, and a separate seed for each random stream."""

from ddpm_lab.core.errors import require

PERMUTATION, STEP, VALIDATION = 0, 1, 2  # purposes of random streams; seed, purpose and index identify a stream


def check_seed(seed: int, name: str = "seed") -> None:
    """Check that a generator accepts a seed; `name` is the name of the seed in the message.

    Raises:
        InputError: the seed is not in 0 .. 2^63 - 1.
    """
    require(0 <= seed < 2**63, f"{name} must be from 0 to 2^63 - 1, not {seed}")


def random_seed(*stream: int) -> int:
    """A 63-bit seed from the integers that identify a stream."""
    import numpy as np

    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""The version of the code behind a cached result: a hash of the source of every folder that it may depend on.

The version of the package is not enough: after a change of a sampler, scores of the old one must not be reused.
"""

import hashlib
from functools import cache
from pathlib import Path

FOLDERS = (  # each may import only from itself and from those before it
    "core", "data", "diffusion", "models", "sampling", "evaluation", "pictures", "training", "studies", "exchange",
    "studio", "cli",
)  # fmt: skip


@cache
def source_sha256(folder: str, root: Path = Path(__file__).parent.parent) -> str:
    """SHA-256 of the source of a folder and of all folders that it may import.

    A change that does not matter counts too: the cached result is then computed again, which costs time but is never
    wrong.

    Args:
        folder: one of FOLDERS.
        root: the folder of the package.
    """
    digest = hashlib.sha256()
    for name in FOLDERS[: FOLDERS.index(folder) + 1]:
        for path in sorted((root / name).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()

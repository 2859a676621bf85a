"""The version of the code behind a cached result: a hash of the modules that compute it, found through their imports.

The version of the package is not enough: after a change of a sampler, scores of the old one must not be reused.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = "ddpm_lab"


@cache
def source_sha256(module: str, root: Path = Path(__file__).parent.parent) -> str:
    """SHA-256 of the source of a module and of all modules of this package that it imports, directly or not.

    Imports inside functions count. A changed comment counts too: the cached result is then computed again, which costs
    time but is never wrong.

    Args:
        module: a name below the package, such as "sampling.generation".
        root: the package's folder.
    """
    digest = hashlib.sha256()
    for name in imported_modules(module, root):
        digest.update(f"{name}\n".encode() + _path(name, root).read_bytes())
    return digest.hexdigest()


def imported_modules(module: str, root: Path = Path(__file__).parent.parent) -> list[str]:
    """The module and all modules of this package that it imports, directly or not, sorted by name."""
    found, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name not in found and _path(name, root).is_file():
            found.add(name)
            parents = [name.rpartition(".")[0]] if "." in name else []  # a package is run before its modules
            pending += parents + _imported(_path(name, root))
    return sorted(found)


def _path(name: str, root: Path) -> Path:
    path = root.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(path: Path) -> list[str]:
    """The names of this package that a file imports; some of them may not be modules."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")]

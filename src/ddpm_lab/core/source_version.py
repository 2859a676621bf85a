"""Which code made a cached result: the hash of the modules that compute it, found by following their imports.

The package's version says too little: whoever changes a sampler must not be given the scores of the old one.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = "ddpm_lab"


@cache
def source_sha256(module: str, root: Path = Path(__file__).parent.parent) -> str:
    """SHA-256 of a module's source and that of all modules of this package it imports, directly or not.

    Imports inside functions count. A comment counts too: a cached result is then made again for nothing, which costs
    time and is never wrong.

    Args:
        module: a name below the package, such as "sampling.generation".
        root: the package's folder.
    """
    digest = hashlib.sha256()
    for name in reached(module, root):
        digest.update(f"{name}\n".encode() + _path(name, root).read_bytes())
    return digest.hexdigest()


def reached(module: str, root: Path = Path(__file__).parent.parent) -> list[str]:
    """The module and all modules of this package that it imports, directly or not, in order of their names."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found and _path(name, root).is_file():
            found.add(name)
            parents = [name.rpartition(".")[0]] if "." in name else []  # a package is run before its modules
            waiting += parents + _imported(_path(name, root))
    return sorted(found)


def _path(name: str, root: Path) -> Path:
    path = root.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(path: Path) -> list[str]:
    """What a file may import of this package; names that turn out to be no modules are passed over by the caller."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")]

"""Models on the Hugging Face hub: download of the files that describe and hold a network, and upload of a folder.

Only JSON and safetensors are downloaded, so nothing in a repository can run code. The cache has a folder for each
repository, in the layout of the hub's client. Its `revisions.json` names the commits whose files are complete and match
the hashes that the hub lists. Only those are used, also without a network. The client finds the login by itself.
"""

import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from ddpm_lab.core.download import ANSWER_SECONDS, within
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import cache_dir, cache_writable, locked, read_json, replace_atomically
from ddpm_lab.core.progress import Advance, progress
from ddpm_lab.models.checkpoint import EMA_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(
    rf"(?!.*(?:\.\.|--))(?P<repo>(?P<user>{PART})/{PART}(?<!\.git))(?:@(?P<revision>\w[\w./-]{{0,99}}))?", re.ASCII
)
NETWORK, SCHEDULER = "diffusion_pytorch_model.safetensors", "scheduler_config.json"
# All that a model of diffusers or of ours consists of: what is downloaded, and what a push replaces.
MODEL_FILES = (
    "config.json", "meta.json", EMA_FILE, "model_index.json", "unet/config.json", f"unet/{NETWORK}", NETWORK,
    "unet_ema/config.json", f"unet_ema/{NETWORK}", f"scheduler/{SCHEDULER}", SCHEDULER,
)  # fmt: skip
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
REVISIONS = "revisions.json"
LOGIN = "log in with `hf auth login`"


class Unreachable(InputError):
    """The hub cannot be reached, or answers with an error of its own."""


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is USER/NAME or USER/NAME@REVISION on the hub.

    A `Path` is not, nor is what exists here. Without a revision, nor is a name below an existing folder USER: a run
    whose name is mistyped must not become a stranger's model.
    """
    match = NAME.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(source).exists():
        return False
    return match["revision"] is not None or not Path(match["user"]).is_dir()


def locate(source: str | Path) -> tuple[Path, str | None]:
    """The folder of a source; and its commit, if it is on the hub.

    Raises:
        InputError: as `fetch`.
    """
    return fetch(str(source)) if is_hub_name(source) else (Path(source), None)


def fetch(name: str) -> tuple[Path, str]:
    """Download a model, unless it is in the cache.

    Args:
        name: USER/NAME for the newest revision, or USER/NAME@REVISION for a branch, a tag or a commit.
    Returns:
        The folder with the model's files, and the commit.
    Raises:
        InputError: no such repository or revision; nothing to read there; damaged files; or the hub cannot be reached
            and the cache has no copy.
    """
    match = NAME.fullmatch(name)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    store = cache_dir() / "hub" / repo.replace("/", "--")
    known = _complete(store)
    if revision in known and known[revision].name == revision:  # a commit never changes
        return known[revision], revision
    asked = revision or "main"
    refused = f"no model {name!r}: there is no such folder here, and {{hub}} has no such repository that you may read; "
    try:
        with _answers(repo, refused + f"for a private one, {LOGIN}") as api:
            info = within(ANSWER_SECONDS, lambda: _info(api, repo, revision))
    except Unreachable as error:
        if asked not in known:
            raise InputError(
                f"no model {name!r}: there is no such folder here, no copy in the cache {cache_dir()}, and {error}"
            ) from error
        folder = known[asked]
        warnings.warn(f"{error}: {name} is revision {folder.name[:12]}, from the cache", stacklevel=2)
        return folder, folder.name
    _check_safe(repo, [file.rfilename for file in info.siblings or []])
    folder = _client_folder(store) / "snapshots" / str(info.sha)
    if known.get(asked) != folder:
        with cache_writable(), locked(store, "DDPM_CACHE_DIR", wait=True):
            if folder not in _complete(store).values():
                _download(repo, info, store)
            commits = {key: path.name for key, path in _complete(store).items()}
            content = json.dumps(commits | {asked: folder.name, folder.name: folder.name}, indent=2) + "\n"
            replace_atomically(store / REVISIONS, content.encode())
    return folder, folder.name


def _client_folder(store: Path) -> Path:
    """The folder of a repository's files in the layout of the client."""
    return store / f"models--{store.name}"


def _complete(store: Path) -> dict[str, Path]:
    """The folders with all files of a commit, by the revision that was asked for and by the commit."""
    with suppress(InputError):
        commits = read_json(store / REVISIONS)
        if isinstance(commits, dict):
            folders = {key: _client_folder(store) / "snapshots" / str(commit) for key, commit in commits.items()}
            return {key: folder for key, folder in folders.items() if folder.is_dir()}
    return {}


def _info(api: "HfApi", repo: str, revision: str | None) -> "ModelInfo":
    info = api.model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS)
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise ValueError("no commit")
    return info


def _download(repo: str, info: "ModelInfo", store: Path) -> None:
    """Download and verify a model's files; those that are complete are kept if another one fails."""
    files = [file for file in info.siblings or [] if file.rfilename in MODEL_FILES]
    missing = [file for file in files if not (_client_folder(store) / "blobs" / _hash(file)).exists()]
    num_bytes = sum(file.size or 0 for file in missing)
    if missing:
        count = f"{len(missing)} file{'s' * (len(missing) > 1)}"
        print(f"downloading {repo}, revision {info.sha}: {decimal(num_bytes)}, {count}", file=sys.stderr)
    try:
        with progress(repo, num_bytes, "bytes") as advance, _answers(repo, "{hub} refuses a file of {repo}") as api:
            bar = _bar(advance)
            for file in files:
                path = api.hf_hub_download(repo, file.rfilename, revision=info.sha, cache_dir=store, tqdm_class=bar)
                _verify(repo, file, Path(path))
    except Unreachable as error:
        raise InputError(f"the download of {repo} broke off: {error}; run the command again to complete it") from error


def _check_safe(repo: str, names: list[str]) -> None:
    """Refuse a repository without weights that can be read, by the name of the pickle where there is one."""
    if any(name in MODEL_FILES and name.endswith(".safetensors") for name in names):
        return
    for name in names:
        if name.endswith(PICKLES):
            raise InputError(
                f"{repo} on the hub has its weights in {name}, a pickle, which can run any code when it is loaded; "
                "only safetensors are read. If you trust it, diffusers converts it: "
                f"DDPMPipeline.from_pretrained({repo!r}).save_pretrained('FOLDER')"
            )
    listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    raise InputError(f"{repo} on the hub holds no model of diffusers or of ddpm-lab, but {listed or 'nothing'}")


def _hash(file: "RepoSibling") -> str:
    """SHA-256 of a large file; of a small one, the SHA-1 that git gives it."""
    return str(file.blob_id if file.lfs is None else file.lfs.sha256)


def _verify(repo: str, file: "RepoSibling", path: Path) -> None:
    """Delete a file and raise InputError if it has not the hash that the hub lists."""
    with path.open("rb") as stream:
        if file.lfs is None:
            content = stream.read()
            actual = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        else:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != _hash(file):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise InputError(
            f"{file.rfilename} of {repo} is damaged: its hash is {actual}, and the hub lists {_hash(file)}; "
            "it was deleted, so run the command again"
        )


def _bar(advance: Advance) -> type[Any]:
    """The class of progress bars that the client calls, which count in ours."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes before they are unpacked; its presence tells the client not to call `update` for them."""

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
            """The rate of those bytes."""

    return Bar


def check_push(repo: str) -> None:
    """Before the work: raise InputError if a name cannot be pushed to, or there is no login."""
    from huggingface_hub import get_token

    match = NAME.fullmatch(repo)
    require(match is not None and match["revision"] is None, f"--push takes USER/NAME, not {repo!r}")
    require(get_token() is not None, f"--push requires a login to the hub: {LOGIN}")


def push(folder: Path, repo: str) -> tuple[str, str]:
    """Upload a folder as the model of a repository, which is created if it does not exist.

    A model that it held before is replaced; its other files and its history remain.

    Returns:
        The address of the repository, and the commit.
    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = decimal(sum(path.stat().st_size for path in files))
    with _answers(repo, f"{{hub}} does not let this login write to {{repo}}: name one of yours, or {LOGIN}") as api:
        print(f"uploading {len(files)} files, {size}, to {api.endpoint}/{repo}", file=sys.stderr)
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a model from ddpm-lab",
            delete_patterns=list(MODEL_FILES),
        )  # fmt: skip
    return f"{api.endpoint}/{repo}", commit.oid


@contextmanager
def _answers(repo: str, refused: str) -> "Iterator[HfApi]":
    """The client of the hub; its errors become those of this module, and its log messages are not shown.

    Args:
        refused: the message where the hub says that there is no such thing or no right to it.
    Raises:
        InputError: the hub refuses.
        Unreachable: it gave no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    api = HfApi(library_name="ddpm-lab", library_version=version("ddpm-lab"))
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield api
    except InputError:
        raise
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} on {api.endpoint} has no such revision") from error
    except GatedRepoError as error:
        raise InputError(f"{api.endpoint}/{repo} requires that you accept its conditions there and {LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise InputError(refused.format(hub=api.endpoint, repo=repo)) from error
        raise Unreachable(f"{api.endpoint} answers with status {status}") from error
    except Exception as error:  # of the client's several libraries
        if isinstance(error, OSError) and error.errno is not None:  # a disk that is full, for example
            raise
        raise Unreachable(f"{api.endpoint} gives no answer ({type(error).__name__})") from error
    finally:
        logger.setLevel(level)

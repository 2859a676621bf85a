"""Feature networks: uint8 images in, features and logits out, with all that a record must say about the network.

Invariant: images enter as files hold them, uint8; what a network does to them first (scaling, resizing) is part of it.
"""

import hashlib
import io
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lab.core.download import download
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import cache_dir, locked
from ddpm_lab.core.source_version import source_sha256
from ddpm_lab.evaluation.classifier import WEIGHTS, load_classifier, packaged_classifiers, packaged_path

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES = 95_628_359
INCEPTION_LAYERS = ("64", "192", "768", "2048")


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that scores are taken over.

    Attributes:
        name: as records say it.
        module: takes (B, C, H, W) uint8, returns (B, d), or (B, d) and logits (B, K).
        sha256: of its weights.
        library, version: where it comes from.
        distance: what the Frechet distance over it is called; only the FID network's is an 'FID'.
        image_shape: (C, H, W) it takes, or None: any size, grey or colour.
        batch_size: images at a time.
        details: more for the record, such as its test accuracy.
        persistent: whether its features may be kept: name, weights and version say all of what it computes.
    """

    name: str
    module: nn.Module
    sha256: str
    library: str
    version: str
    distance: str
    image_shape: tuple[int, int, int] | None
    batch_size: int
    details: dict[str, Any]
    persistent: bool = True

    @property
    def key(self) -> str:
        """What decides its features and what is kept beside them: weights, versions, device, and the code."""
        made_by = f"{self.library} {self.version} torch {version('torch')} {source_sha256('evaluation')}"
        return f"{self.name} {self.sha256} {made_by} {self.device.type}"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse images that the network was not made for.

        Raises:
            InputError: another shape than the network's.
        """
        if self.image_shape is not None and shape != self.image_shape:
            raise InputError(
                f"{name} holds images of {describe_shape(shape)}, and features {self.name} take "
                f"{describe_shape(self.image_shape)}; --image-size brings a folder to a size, "
                "and --features inception takes any"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits of a batch.

        Args:
            images: (B, C, H, W) uint8.
        Returns:
            (B, d) float32 and, where the network classifies, (B, K) float32, both on the CPU.
        Raises:
            InputError: images that are not uint8, or a module that returns something else.
        """
        if images.dtype != torch.uint8:
            raise InputError(f"images must be uint8, 0 .. 255, not {images.dtype}")
        found = self.module(images.to(self.device))
        features, logits = found if isinstance(found, tuple) else (found, None)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"a feature network must return (B, d), one row an image, not {shape}")
        return features.float().cpu(), None if logits is None else logits.float().cpu()


def describe_shape(shape: tuple[int, int, int]) -> str:
    """(C, H, W) as a person says it: grey 28x28."""
    kind = {1: "grey", 3: "colour"}.get(shape[0], f"{shape[0]} channels,")
    return f"{kind} {shape[1]}x{shape[2]}"


def module_network(module: nn.Module, name: str = "module", batch_size: int = 100) -> FeatureNetwork:
    """Any module from Python: (B, C, H, W) uint8 in, (B, d) out, or (B, d) and logits (B, K).

    It is put into evaluation mode. Its hash is that of its parameters and buffers; what its code does is in no hash, so
    its features are never kept.
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return FeatureNetwork(
        name=name,
        module=module.eval(),
        sha256=digest.hexdigest(),
        library="torch",
        version=version("torch"),
        distance=f"FD-{name}",
        image_shape=None,
        batch_size=batch_size,
        details={},
        persistent=False,
    )


def classifier_network(which: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A classifier trained by `ddpm classifier`.

    Args:
        which: the data set of a packaged one, a `classifier.safetensors`, or the folder that holds it.
    Raises:
        InputError: there is none, or it is damaged.
    """
    packaged = which in packaged_classifiers()
    path = packaged_path(which) if packaged else Path(which)
    if path.is_dir():
        path /= WEIGHTS
    if not path.is_file():
        raise InputError(
            f"no classifier {which!r}: those of {', '.join(packaged_classifiers())} come with the package; others are "
            "the folder that `ddpm classifier` made; and there is inception"
        )
    trained = load_classifier(path)
    channels, height, width = trained.meta["image_shape"]
    return FeatureNetwork(
        name=f"classifier ({trained.meta['dataset']})",
        module=trained.network.to(device),
        sha256=trained.sha256,
        library="ddpm-lab",
        version=version("ddpm-lab"),
        distance="FD-classifier",
        image_shape=(channels, height, width),
        batch_size=500,
        details={"test_accuracy": trained.meta["test_accuracy"]},
    )


class _Inception(nn.Module):
    """torch-fidelity's port, which resizes to 299x299 as TensorFlow 1 did; grey images become colour by repetition."""

    def __init__(self, state: dict[str, Tensor], layer: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # It unpickles a file without restraint, so it gets one made here, of tensors that were read with restraint.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        self.extractor = FeatureExtractorInceptionV3("inception", [layer, "logits_unbiased"], buffer)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.extractor(images.expand(-1, 3, -1, -1))
        return features, logits


def inception_network(
    weights: Path | None = None, device: torch.device | str = "cpu", layer: str = "2048"
) -> FeatureNetwork:
    """The network of FID and Inception Score: TensorFlow's Inception of 2015-12-05, as ported by torch-fidelity.

    Args:
        weights: its file; None: DDPM_INCEPTION_WEIGHTS, else the cache, filled by a verified download.
        device: where it runs.
        layer: '2048' for FID; earlier ones, '64', '192', '768', make no FID and are named in the record.
    Raises:
        InputError: no file and no network; a file that is truncated, or of another layout.
    """
    if layer not in INCEPTION_LAYERS:
        raise InputError(f"layer must be one of {', '.join(INCEPTION_LAYERS)}, not {layer!r}")
    given = weights or (Path(p) if (p := os.environ.get("DDPM_INCEPTION_WEIGHTS")) else None)
    path = given or _downloaded_inception()
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if given is None and digest != INCEPTION_SHA256:
        raise InputError(f"{path} is damaged: its {len(content)} bytes are not the official file's; delete it")
    module = _build_inception(path, content, layer)
    name = "inception"
    if digest != INCEPTION_SHA256:
        name = f"inception (unofficial, sha256 {digest[:16]})"
        warnings.warn(
            f"{path} is not the official Inception file (SHA-256 {digest[:16]}..., expected "
            f"{INCEPTION_SHA256[:16]}...): scores over it compare with no published figure",
            stacklevel=2,
        )
    return FeatureNetwork(
        name=name if layer == "2048" else f"{name}, layer {layer}",
        module=module.to(device),
        sha256=digest,
        library="torch-fidelity",
        version=version("torch-fidelity"),
        distance="FD-inception" if layer != "2048" else "FID" + ", unofficial weights" * (digest != INCEPTION_SHA256),
        image_shape=None,
        batch_size=50,
        details={"layer": layer},
    )


def _downloaded_inception() -> Path:
    path = cache_dir() / "inception" / INCEPTION_FILE
    if path.is_file():
        return path
    advice = (
        f"put {INCEPTION_FILE} ({INCEPTION_BYTES} bytes, SHA-256 {INCEPTION_SHA256}) there, or name it by "
        "--inception-weights or DDPM_INCEPTION_WEIGHTS; or take --features classifier"
    )
    with locked(path.parent, "DDPM_CACHE_DIR", wait=True):  # a second process waits, and finds the file there
        if not path.is_file():
            download([INCEPTION_URL], path, _verify_download, advice)
    return path


def _verify_download(path: Path) -> None:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION_SHA256:
        raise InputError(f"{len(content)} bytes of SHA-256 {digest[:16]}..., not {INCEPTION_SHA256[:16]}...")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Inception weights {path} cannot be read: {error.strerror}") from error


def _refuse_bomb(content: bytes) -> None:
    """A file of PyTorch holds its tensors as they are: one that unpacks to far more was made to fill the memory."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 4 * len(content):
                raise ValueError("it unpacks to far more than its own size")


def _build_inception(path: Path, content: bytes, layer: str) -> nn.Module:
    try:
        _refuse_bomb(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes make the parser raise
        raise InputError(
            f"Inception weights {path} are truncated or no PyTorch file: {len(content)} bytes, "
            f"the official file has {INCEPTION_BYTES}"
        ) from error
    entries = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries):
        raise InputError(f"Inception weights {path} hold no table of tensors")
    try:
        return _Inception(state, layer).eval()
    except RuntimeError as error:
        found = re.search(r'"([\w.]+)"|size mismatch for ([\w.]+):', str(error))
        what = next((group for group in found.groups() if group), "") if found else ""
        raise InputError(
            f"Inception weights {path} are of another layout{f', first at {what}' if what else ''}"
        ) from error

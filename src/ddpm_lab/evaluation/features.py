"""Feature networks: uint8 images in, features and logits out, with all that a record says about the network.

Invariant: images enter as uint8, as files hold them; scaling and resizing are part of the network.
"""

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_lab.core.device import disable_tf32
from ddpm_lab.core.download import download
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import cache_dir, locked
from ddpm_lab.core.source_version import source_sha256
from ddpm_lab.data.datasets import CLASS_NAMES
from ddpm_lab.evaluation.classifier import PACKAGED, WEIGHTS, load_classifier
from ddpm_lab.evaluation.record import NetworkDetails

INCEPTION_LAYERS = ("64", "192", "768", "2048")


@dataclass(frozen=True)
class PublishedWeights:
    """The file of a network that publications use.

    Attributes:
        network: name of the network; in small letters it names the folder in the cache and the option.
        url: its address, which ends in the name of the file.
        sha256, num_bytes: its hash and size.
    """

    network: str
    url: str
    sha256: str
    num_bytes: int

    def find(self, given: Path | None) -> tuple[Path, str]:
        """The path and SHA-256 of the weights: a file that the user names, else the one in the cache, downloaded once.

        Args:
            given: the file; None: DDPM_NETWORK_WEIGHTS, else the cache.
        Raises:
            InputError: no file and no network, a file that cannot be read, or a damaged download.
        """
        named = given or (Path(p) if (p := os.environ.get(f"DDPM_{self.network.upper()}_WEIGHTS")) else None)
        path = named or self.download()
        try:
            digest = _file_sha256(path)
        except OSError as error:
            raise InputError(f"{self.network} weights {path} cannot be read: {error.strerror}") from error
        require(
            digest == self.sha256 or named is not None,
            f"{path} is damaged: its {path.stat().st_size} bytes are not those of the official file; delete it",
        )
        return path, digest

    def label(self, path: Path, digest: str, distance: str) -> tuple[str, str]:
        """The names in records of the network and of the Frechet distance over it; warns if the file is another."""
        name = self.network.lower()
        if digest == self.sha256:
            return name, distance
        warnings.warn(
            f"{path} is not the official {self.network} file (SHA-256 {digest[:16]}..., expected "
            f"{self.sha256[:16]}...): scores over it cannot be compared with published ones",
            stacklevel=3,
        )
        return f"{name} (unofficial, sha256 {digest[:16]})", f"{distance}, unofficial weights"

    def download(self) -> Path:
        """The file in the cache, downloaded if it is not there."""
        network = self.network.lower()
        path = cache_dir() / network / self.url.rpartition("/")[2]
        if path.is_file():
            return path
        advice = (
            f"put {path.name} ({self.num_bytes} bytes, SHA-256 {self.sha256}) there, or name it by "
            f"--{network}-weights or DDPM_{network.upper()}_WEIGHTS; or give --features classifier"
        )
        with locked(path.parent, "DDPM_CACHE_DIR", wait=True):  # a second process waits, and finds the file
            if not path.is_file():
                download([self.url], path, self._verify, advice)
        return path

    def _verify(self, path: Path) -> None:
        digest = _file_sha256(path)
        require(digest == self.sha256, f"it has SHA-256 {digest[:16]}..., not {self.sha256[:16]}...")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


INCEPTION = PublishedWeights(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that computes features for scores.

    Attributes:
        name: its name in records.
        module: takes (B, C, H, W) uint8, returns features (B, d), or a tuple of them and logits (B, K).
        sha256: SHA-256 of its weights.
        library, version: the package that it comes from.
        distance: the name of the Frechet distance over it; 'FID' only for the FID network.
        image_shape: the (C, H, W) that it takes; None: any size, grey or colour.
        classifies: whether it may give logits, which the Inception Score needs.
        batch_size: images at a time.
        details: further fields of the record, such as its test accuracy.
        persistent: whether its features may be kept in the cache: only if name, weights and version determine them.
        class_names: of the logits, where they are known.
    """

    name: str
    module: nn.Module
    sha256: str
    library: str
    version: str
    distance: str
    image_shape: tuple[int, int, int] | None = None
    classifies: bool = True
    batch_size: int = 100
    details: NetworkDetails = field(default_factory=NetworkDetails)
    persistent: bool = True
    class_names: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """All that determines its features and what is kept beside them: weights, versions, device, and our code."""
        made_by = f"{self.library} {self.version} torch {version('torch')} {source_sha256('evaluation')}"
        return f"{self.name} {self.sha256} {made_by} {self.device.type}"

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse images that the network does not take.

        Args:
            name: what messages call the images.
            shape: their (C, H, W).
        Raises:
            InputError: the shape is not the network's.
        """
        if self.image_shape is not None and shape != self.image_shape:
            raise InputError(
                f"{name} holds images of {describe_shape(shape)}, and features {self.name} take "
                f"{describe_shape(self.image_shape)}; --image-size scales the images of a folder, and "
                "--features inception takes any size"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits of a batch.

        Args:
            images: (B, C, H, W) uint8.
        Returns:
            Features (B, d) float32 and, where the network classifies, logits (B, K) float32, both on the CPU.
        Raises:
            InputError: images are not uint8, or the module returns something else.
        """
        require(images.dtype == torch.uint8, f"images must be uint8, 0 .. 255, not {images.dtype}")
        disable_tf32()  # also for a caller who has enabled it: scores are of true float32
        output = self.module(images.to(self.device))
        features, logits = output if isinstance(output, tuple) else (output, None)
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(shape) != 2 or shape[0] != len(images):
            returned = shape or type(features).__name__
            raise InputError(f"a feature network must return (B, d), one row per image, not {returned}")
        return features.float().cpu(), None if logits is None else logits.float().cpu()


def describe_shape(shape: tuple[int, int, int]) -> str:
    """(C, H, W) in words: grey 28x28."""
    kind = {1: "grey", 3: "colour"}.get(shape[0], f"{shape[0]} channels,")
    return f"{kind} {shape[1]}x{shape[2]}"


def module_network(module: nn.Module, name: str = "module", batch_size: int = 100) -> FeatureNetwork:
    """A feature network from any module.

    The module is put into evaluation mode. Its hash is that of its parameters and buffers; no hash covers its code, so
    its features are never kept in the cache.

    Args:
        module: takes (B, C, H, W) uint8, returns features (B, d), or a tuple of them and logits (B, K).
        name: its name in records.
        batch_size: images at a time.
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
        batch_size=batch_size,
        persistent=False,
    )


def classifier_network(which: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A classifier trained by `ddpm classifier`.

    Args:
        which: the data set of a packaged one, a `classifier.safetensors`, or the folder that holds it.
        device: where it runs.
    Raises:
        InputError: there is no such classifier, or its file is damaged.
    """
    path = PACKAGED.get(which, Path(which))
    if path.is_dir():
        path /= WEIGHTS
    if not path.is_file():
        raise InputError(
            f"no classifier {which!r}: name a packaged one ({', '.join(PACKAGED)}), a folder that `ddpm classifier` "
            "wrote, or inception"
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
        class_names=CLASS_NAMES.get(trained.meta["dataset"]),
    )


class _Inception(nn.Module):
    """The port of torch-fidelity, which resizes to 299x299 as TensorFlow 1 did; grey images are repeated to colour."""

    def __init__(self, state: dict[str, Tensor], layer: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # It unpickles its file without restriction, so it gets one made here of tensors that were read safely.
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
        layer: '2048' for FID; the earlier layers '64', '192' and '768' make no FID, and records name them.
    Raises:
        InputError: no file and no network; a file that is truncated or has another layout.
    """
    require(layer in INCEPTION_LAYERS, f"layer must be one of {', '.join(INCEPTION_LAYERS)}, not {layer!r}")
    path, digest = INCEPTION.find(weights)
    module = _build_inception(path, layer)
    name, distance = INCEPTION.label(path, digest, "FID")
    return FeatureNetwork(
        name=name if layer == "2048" else f"{name}, layer {layer}",
        module=module.to(device),
        sha256=digest,
        library="torch-fidelity",
        version=version("torch-fidelity"),
        distance=distance if layer == "2048" else "FD-inception",
        batch_size=50,
        details={"layer": layer},
    )


def _refuse_bomb(path: Path) -> None:
    """PyTorch stores tensors uncompressed, so a file that unpacks to far more was made to fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 4 * path.stat().st_size:
                raise ValueError("it unpacks to far more than its own size")


def _build_inception(path: Path, layer: str) -> nn.Module:
    try:
        _refuse_bomb(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser may raise anything for such bytes
        raise InputError(
            f"Inception weights {path} are truncated or no PyTorch file: {path.stat().st_size} bytes, "
            f"the official file has {INCEPTION.num_bytes}"
        ) from error
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    require(named, f"Inception weights {path} hold no table of tensors")
    with another_layout(f"Inception weights {path}"):
        return _Inception(state, layer).eval()


@contextmanager
def another_layout(weights: str) -> Iterator[None]:
    """Within it, PyTorch's error on a state that does not fit a module becomes one line.

    Args:
        weights: what the message calls the file.
    Raises:
        InputError: the state does not fit.
    """
    try:
        yield
    except (RuntimeError, LookupError, ArithmeticError) as error:
        match = re.search(r"[\"']([\w.]+)[\"']|size mismatch for ([\w.]+):", str(error))
        first = f", first at {match.group(1) or match.group(2)}" if match else ""
        raise InputError(f"{weights} are of another layout{first}") from error

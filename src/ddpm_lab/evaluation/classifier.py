"""Small classifiers, one per data set: the feature networks that come with the package, and their training.

A residual network after Page's ResNet-9 (2018, "How to Train Your ResNet"), narrowed so that its weights fit a package.
It takes uint8 images and is trained on their labels; Frechet distances are taken over its last pooled features.
Invariant: epoch e is a function of (settings, weights, momentum, e), so an interrupted training ends as any other.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from ddpm_lab.core.device import autocast, resolve_device, resolve_precision
from ddpm_lab.core.errors import InputError, RunError, require
from ddpm_lab.core.files import locked, replace_atomically
from ddpm_lab.core.progress import progress
from ddpm_lab.core.seeds import PERMUTATION, STEP, check_seed, random_seed
from ddpm_lab.data.datasets import ImageSet, load_images, to_float

WEIGHTS = "classifier.safetensors"
STATE = "training.safetensors"
PACKAGED = {path.stem: path for path in sorted((Path(__file__).parent / "weights").glob("*.safetensors"))}


class Classifier(nn.Module):
    """A residual network that maps images to features and logits.

    Args:
        image_channels: C.
        widths: channels of the stem, then of each stage; every stage halves the resolution.
        num_classes: K.
    """

    def __init__(self, image_channels: int, widths: tuple[int, ...], num_classes: int = 10) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.stem = _convolution(image_channels, widths[0])
        self.stem_norm = nn.BatchNorm2d(widths[0])
        self.halving = nn.ModuleList(_convolution(a, b) for a, b in pairs)
        self.halving_norm = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.residual = nn.ModuleList(_convolution(b, b) for _, b in pairs)
        self.residual_norm = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of uint8 images.

        Args:
            images: (B, C, H, W) uint8.
        Returns:
            Features (B, d) float32, the averages of the last feature maps, and logits (B, K) float32.
        """
        x = to_float(images).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.stem_norm(self.stem(x)))
        stages = zip(self.halving, self.halving_norm, self.residual, self.residual_norm, strict=True)
        for halving, halving_norm, residual, residual_norm in stages:
            x = F.relu(halving_norm(F.max_pool2d(halving(x), 2)))
            x = x + F.relu(residual_norm(residual(x)))
        features = x.float().mean((2, 3))
        return features, self.head(features).float()


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)


@dataclass(frozen=True)
class ClassifierSettings:
    """How a classifier is built and trained.

    Attributes:
        widths: as for `Classifier`.
        num_epochs: passes over the training images.
        shift: largest random translation in pixels, in both directions.
        border: padding at the edge: 'constant' (black) or 'reflect'.
        horizontal_flip: whether to mirror images with probability 1/2.
        batch_size: images per step.
        learning_rate: its highest value, see `learning_rate`; SGD with Nesterov momentum 0.9.
        weight_decay: L2 penalty on all parameters.
        seed: seed of weights, order, shifts and flips.
    """

    widths: tuple[int, ...]
    num_epochs: int
    shift: int
    border: str
    horizontal_flip: bool
    batch_size: int = 256
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    seed: int = 0


SETTINGS = {
    "mnist": ClassifierSettings((16, 32, 64, 96), 15, shift=2, border="constant", horizontal_flip=False),
    "cifar10": ClassifierSettings((32, 64, 128, 160), 40, shift=4, border="reflect", horizontal_flip=True),
    "digits": ClassifierSettings(
        (16, 32, 64), 40, shift=1, border="constant", horizontal_flip=False, batch_size=64, learning_rate=0.05
    ),
}


def learning_rate(settings: ClassifierSettings, done: float) -> float:
    """The rate after a fraction `done` of training, in [0, 1]: linear warm-up over the first fifth, then linear decay
    to 0."""
    return settings.learning_rate * min(done / 0.2, (1 - done) / 0.8)


def augmented(padded: Tensor, indices: Tensor, settings: ClassifierSettings, generator: torch.Generator) -> Tensor:
    """Gather a batch with random shifts and flips.

    Args:
        padded: the training images, (N, H + 2 shift, W + 2 shift, C) uint8.
        indices: (B,) int64.
        settings: shift and horizontal_flip.
        generator: source of the random numbers.
    Returns:
        (B, C, H, W) uint8.
    """
    B, shift = len(indices), settings.shift
    H, W = padded.shape[1] - 2 * shift, padded.shape[2] - 2 * shift
    top, left = (torch.randint(2 * shift + 1, (B, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(H), left + torch.arange(W)
    if settings.horizontal_flip:
        mirrored = torch.rand(B, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier.

    Attributes:
        network: in evaluation mode, on the CPU.
        meta: the header of its file: dataset, settings, test_accuracy, image_shape.
        sha256: SHA-256 of its file.
    """

    network: Classifier
    meta: dict[str, Any]
    sha256: str


def train_classifier(
    dataset: str,
    out: Path,
    *,
    num_epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> TrainedClassifier:
    """Train the classifier of a data set; an interrupted training continues after its last whole epoch.

    Args:
        dataset: mnist, cifar10 or digits.
        out: folder, created if it does not exist; gets `training.safetensors` after each epoch, and at the end
            `classifier.safetensors`, with weights in float16.
        num_epochs: passes over the images; None: as in `SETTINGS`.
        seed: seed of weights, order, shifts and flips.
        device: auto, cpu, cuda or mps.
        data_dir: as for `data.load_images`.
        say: called with a line of text at the end.
    Raises:
        InputError: no such data set; a folder of another training, or one that cannot be written.
        RunError: the loss is not finite.
    """
    require(
        dataset in SETTINGS,
        f"a classifier needs labels: the data set must be one of {', '.join(SETTINGS)}, not {dataset!r}",
    )
    require(num_epochs is None or 1 <= num_epochs <= 10_000, f"num_epochs must be from 1 to 10000, not {num_epochs}")
    check_seed(seed)
    settings = replace(SETTINGS[dataset], num_epochs=num_epochs or SETTINGS[dataset].num_epochs, seed=seed)
    on = resolve_device(device)
    training_set, test_set = (load_images(dataset, split, data_dir) for split in ("train", "test"))
    with locked(out, "--out"):
        require(
            not (out / WEIGHTS).exists() or (out / STATE).exists(),
            f"{out / WEIGHTS} exists without the {STATE} of its training; name another --out",
        )
        training = _Training(training_set, settings, out / STATE, on)
        with progress(f"classifier of {dataset}", settings.num_epochs, "epochs", start=training.epoch) as advance:
            while training.epoch < settings.num_epochs:
                loss = training.train_epoch()
                if not math.isfinite(loss):
                    raise RunError(
                        f"the loss is not finite in epoch {training.epoch} (seed {settings.seed}); "
                        f"{out / STATE} holds the state before it"
                    )
                training.save()
                advance(1, f"loss {loss:.4f}")
        weights = {  # matrices and kernels in half precision, vectors as they are
            name: (tensor.half() if tensor.ndim > 1 else tensor).cpu().contiguous()
            for name, tensor in training.network.state_dict().items()
        }
        rounded = Classifier(training_set.images.shape[1], settings.widths).eval()
        rounded.load_state_dict(weights)
        accuracy = accuracy_on(rounded, test_set)
        meta = {
            "dataset": dataset,
            "image_shape": list(training_set.images.shape[1:]),
            "test_accuracy": accuracy,
            "test_images": len(test_set),
            "settings": asdict(settings),
            "data_sha256": training_set.sha256,
        }
        replace_atomically(out / WEIGHTS, tensor_bytes(weights, {"ddpm_lab": json.dumps(meta)}))
    say(f"{out / WEIGHTS}: {accuracy:.2%} accuracy on {len(test_set)} test images, after {training.epoch} epochs")
    return load_classifier(out / WEIGHTS)


class _Training:
    """The state of a training: the network, its momentum, and the number of epochs done."""

    def __init__(self, training_set: ImageSet, settings: ClassifierSettings, path: Path, device: torch.device) -> None:
        assert training_set.labels is not None
        self.settings, self.path, self.epoch, self.device = settings, path, 0, device
        self.identity = json.dumps({"settings": asdict(settings), "data": training_set.sha256}, sort_keys=True)
        padded = F.pad(training_set.images.float(), (settings.shift,) * 4, mode=settings.border).to(torch.uint8)
        self.padded, self.labels = padded.permute(0, 2, 3, 1).contiguous(), training_set.labels
        torch.manual_seed(settings.seed)
        self.network = Classifier(training_set.images.shape[1], settings.widths).to(device)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
        if path.exists():
            self._restore()

    def train_epoch(self) -> float:
        """Train for one pass over the images and return its mean loss."""
        settings, dtype, total = self.settings, resolve_precision("auto", self.device), 0.0
        if dtype == torch.float16:  # small gradients would be lost in it
            dtype = torch.float32
        orders, draws = (
            torch.Generator().manual_seed(random_seed(settings.seed, stream, self.epoch))
            for stream in (PERMUTATION, STEP)
        )
        order = torch.randperm(len(self.labels), generator=orders)
        steps = len(order) // settings.batch_size
        self.network.train()
        for k, indices in enumerate(torch.split(order, settings.batch_size)[:steps]):  # full batches only
            images = augmented(self.padded, indices, settings, draws).to(self.device)
            with autocast(self.device, dtype):
                _, logits = self.network(images)
                loss = F.cross_entropy(logits, self.labels[indices].to(self.device))
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            done = (self.epoch + (k + 1) / steps) / settings.num_epochs
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(settings, done)
            self.optimizer.step()
            total += float(loss.detach())
        self.epoch += 1
        return total / steps

    def save(self) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            tensors[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        meta = {"ddpm_lab": json.dumps({"epoch": self.epoch, "identity": self.identity})}
        replace_atomically(self.path, tensor_bytes(tensors, meta))

    def _restore(self) -> None:
        tensors, meta, _ = _read(self.path)
        if meta.get("identity") != self.identity:
            raise InputError(f"{self.path} is of a training with other settings or images; name another --out")
        weights = {name: t for name, t in tensors.items() if name.startswith("network.")}
        _load_state({name.removeprefix("network."): t for name, t in weights.items()}, self.network, self.path)
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(self.device)
        self.epoch = int(meta["epoch"])


@torch.no_grad()
def accuracy_on(network: Classifier, test_set: ImageSet) -> float:
    """Share of images whose label has the highest logit, in [0, 1]."""
    assert test_set.labels is not None
    predicted = torch.cat([network(batch)[1].argmax(1) for batch in torch.split(test_set.images, 500)])
    return int((predicted == test_set.labels).sum()) / len(predicted)  # some devices lack float64


def load_classifier(path: Path) -> TrainedClassifier:
    """Read a `classifier.safetensors`.

    Raises:
        InputError: it is absent, damaged, or no classifier's.
    """
    tensors, meta, sha256 = _read(path)
    try:
        channels, _, _ = meta["image_shape"]
        network = Classifier(channels, tuple(meta["settings"]["widths"]))
        meta |= {"test_accuracy": float(meta["test_accuracy"]), "dataset": str(meta["dataset"])}
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a classifier's weights: its header does not describe one") from error
    _load_state(tensors, network, path)
    return TrainedClassifier(network.eval().requires_grad_(False), meta, sha256)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors, the header, and the SHA-256 of a file that this module wrote."""
    try:
        content = path.read_bytes()
        tensors = parse_tensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        meta = dict(json.loads(header["__metadata__"]["ddpm_lab"]))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or not a classifier's") from error
    return tensors, meta, hashlib.sha256(content).hexdigest()


def _load_state(tensors: dict[str, Tensor], network: Classifier, path: Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # names or shapes differ
        raise InputError(f"{path} belongs to another network: {' '.join(str(error).split())}") from error

"""Shared pieces: a network small enough for tests, a run of it, and hashes of whole folders."""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import load_recipe
from ddpm_lab.studies.grid import read_study
from ddpm_lab.studies.study import run_study
from ddpm_lab.training.run import train

TINY_RECIPE = """
[data]
dataset = "digits"
horizontal_flip = true  # wrong for digits, but it draws random bits that resuming must draw again

[model]
base_channels = 32
norm_groups = 8
channel_multipliers = [1, 1]
num_blocks = 1
attention_levels = []
dropout = 0.1

[training]
num_steps = 12
batch_size = 8
warmup_steps = 4
log_every = 2
checkpoint_every = 4
keep_checkpoints = 2

[evaluation]
validate_every = 6
validation_images = 16
sample_every = 6
sample_images = 4
sample_steps = 2
"""
TINY_STUDY = """
recipe = "tiny.toml"
question = "Is it <quick>?"

[grid]
num_timesteps = [50, 60]

[measures]
checkpoints = 2
images = 20
final_images = 20
samplers = ["ddim-5", "ddim-50", "dpmpp-5"]
ancestral_images = 20
bound_images = 4

[settings.training]
num_steps = 4
checkpoint_every = 2
"""


def tree_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


torch.set_num_threads(1)  # the shapes are too small to share, and threads that wait for each other cost minutes


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory) -> Iterator[None]:
    """Tests keep out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DDPM_INCEPTION_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of the layout of the FID network's weights, with random values that keep activations in range."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


DINOV2_SIZE = 128, 2, 56, 6  # features, layers, pixels of a patch (4 x 4 of an image), side of the position table


def random_dinov2(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors with the names and the layout of `facebook/dinov2-large`, of another size."""
    width, depth, patch, grid = DINOV2_SIZE
    names = {
        "embeddings.cls_token": (1, 1, width), "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + grid**2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,), "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }  # fmt: skip
    linear = {"attention.attention.query": (width, width), "attention.attention.key": (width, width),
              "attention.attention.value": (width, width), "attention.output.dense": (width, width),
              "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}  # fmt: skip
    for i in range(depth):
        names |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": (width,) for k in (1, 2)}
        names |= {f"encoder.layer.{i}.norm{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
        names |= {f"encoder.layer.{i}.{name}.weight": shape for name, shape in linear.items()}
        names |= {f"encoder.layer.{i}.{name}.bias": shape[:1] for name, shape in linear.items()}
    generator = torch.Generator().manual_seed(seed)
    gains = ("norm1.weight", "norm2.weight", "layernorm.weight", "lambda1")
    scale = {name: 1.0 if name.endswith(gains) else 0.02 if "projection" in name else 0.15 for name in names}
    return {name: scale[name] * torch.randn(shape, generator=generator) for name, shape in names.items()}


@pytest.fixture(scope="session")
def dinov2_weights(tmp_path_factory) -> Path:
    """A file of the layout of the weights of FD-DINOv2, with random values, of a small network."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("dinov2") / "random.safetensors"
    save_file(random_dinov2(), path)
    return path


def png(picture: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_recipe) -> Path:
    """A finished run of the tiny recipe; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train(load_recipe(str(tiny_recipe)), run_dir, device="cpu")
    return run_dir


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The folder of real MNIST and CIFAR-10; tests that need it are skipped where it is not named."""
    folder = os.environ.get("DDPM_DATA_DIR")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("needs the real data: set DDPM_DATA_DIR to a folder with mnist/ and cifar10/")
    return Path(folder)


@pytest.fixture(scope="session")
def studio_runs(tmp_path_factory, tiny_run) -> Path:
    """A folder of runs for the studio: a sound one, a damaged one, one below, and a link that leads away."""
    folder = tmp_path_factory.mktemp("studio") / "runs"
    shutil.copytree(tiny_run, folder / "tiny")
    scoring = ["--features", "classifier", "--metrics", "fid", "is", "kid", "--num-images", "40", "--num-steps", "5"]
    assert run_command(["evaluate", str(folder / "tiny"), *scoring, "--device", "cpu"]) == 0
    shutil.copytree(tiny_run, folder / "study" / "cells" / "one")
    shutil.copytree(tiny_run, folder / "broken")
    (folder / "broken" / "checkpoints" / "step_00000012" / "ema.safetensors").write_bytes(b"nothing")
    shutil.copytree(tiny_run, folder.parent / "outside")
    (folder / "away").symlink_to(folder.parent / "outside")
    (folder / "notes.txt").write_text("no run")
    (folder / "tiny" / "samples" / "step_0000 (1).png").write_bytes(b"a copy somebody made")
    (folder / "broken" / "scores.jsonl").mkdir()
    return folder


@pytest.fixture
def study_file(tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    (tmp_path / "small.toml").write_text(TINY_STUDY)
    return tmp_path / "small.toml"


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory) -> Path:
    """The folder of a finished study; tests must not change it."""
    place = tmp_path_factory.mktemp("study")
    (place / "tiny.toml").write_text(TINY_RECIPE)
    (place / "small.toml").write_text(TINY_STUDY)
    run_study(read_study(str(place / "small.toml")), place / "out", device="cpu")
    return place / "out"

"""DINOv2's features: against a network written out here, Pillow's resizing, and the authors' scaling of positions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.datasets import load_images
from ddpm_lab.evaluation import dinov2
from ddpm_lab.evaluation.dinov2 import DINOV2, dinov2_network, scaled
from ddpm_lab.evaluation.evaluate import evaluate
from tests.conftest import DINOV2_SIZE, random_dinov2
from tests.evaluation.test_features import pictures

WIDTH, DEPTH, PATCH, _ = DINOV2_SIZE


@pytest.fixture(scope="module")
def network(dinov2_weights):
    with pytest.warns(UserWarning, match="not the official DINOv2 file"):
        return dinov2_network(dinov2_weights)


def class_tokens(state, pixels):
    """The class token after the last normalisation, (B, d), of prepared pixels, (B, 3, 224, 224), in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    side = 224 // PATCH
    rows = (
        pixels.double()
        .view(-1, 3, side, PATCH, side, PATCH)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(len(pixels), side**2, -1)
    )
    projection = "embeddings.patch_embeddings.projection"
    patches = rows @ state[f"{projection}.weight"].flatten(1).T + state[f"{projection}.bias"]
    x = torch.cat([state["embeddings.cls_token"].expand(len(pixels), 1, -1), patches], 1)
    x = x + positions_by_hand(state["embeddings.position_embeddings"], side)
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        y = norm(f"{layer}.norm1", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{name}", y).unflatten(-1, (-1, 64)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        y = linear(f"{layer}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        x = x + state[f"{layer}.layer_scale1.lambda1"] * y
        y = linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x))
        y = linear(f"{layer}.mlp.fc2", y * (1 + torch.erf(y / 2**0.5)) / 2)
        x = x + state[f"{layer}.layer_scale2.lambda1"] * y
    return norm("layernorm", x)[:, 0]


def positions_by_hand(table, side):
    """Cubic convolution (Keys 1981, a = -3/4) at the places that a scale of (side + 0.1) / grid gives."""
    grid = round((table.shape[1] - 1) ** 0.5)

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(side, grid, dtype=table.dtype)
    for i in range(side):
        place = (i + 0.5) * grid / (side + 0.1) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[i, min(max(j, 0), grid - 1)] += weight(place - j)
    patches = torch.einsum("ia,jb,abd->ijd", matrix, matrix, table[0, 1:].view(grid, grid, -1))
    return torch.cat([table[0, :1], patches.flatten(0, 1)])


def test_features_are_those_of_the_network_written_out(dinov2_weights, network):
    images = pictures(3, 1)
    pixels = torch.stack([scaled(image) for image in images]).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = class_tokens(load_file(dinov2_weights), (pixels - mean) / std)
    features, logits = network(images)
    assert logits is None
    assert expected.std(0).mean() > 0.02, "the images matter"
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [28, 224, 300])
def test_images_are_scaled_as_pillow_scales_pictures(size):
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    assert torch.equal(scaled(image), torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_grey_images_are_colour_images_of_equal_planes(network):
    grey = pictures(2, 3, channels=1)
    assert torch.equal(network(grey)[0], network(grey.expand(-1, 3, -1, -1).contiguous())[0])


def test_the_position_table_of_the_right_size_stays_as_it_is():
    table = torch.randn(1, 1 + 16, 8)
    assert dinov2._positions(table, 4) is table
    other = dinov2._positions(torch.randn(1, 1 + 37**2, 8).double(), 16)
    assert other.shape == (1, 1 + 256, 8)


def test_the_distance_is_labelled_and_has_no_inception_score(network, tmp_path):
    images = load_images("digits", "test").images[:20]
    config = ScoringConfig(metrics=("fid", "is", "kid", "prdc", "mind"), bootstrap=0, kid_subsets=2, mind_directions=9)
    record = evaluate(images, "digits:test", network, config)
    assert record["fid_label"] == "FD-DINOv2, unofficial weights (n=20 against 360)"
    assert record["features"]["name"] == f"dinov2 (unofficial, sha256 {network.sha256[:16]})"
    assert (record["features"]["num_features"], record["features"]["num_classes"]) == (WIDTH, None)
    assert record["inception_score"] is None
    assert record["scoring"]["metrics"] == ("fid", "kid", "prdc", "mind")
    for name in ("fid", "kid", "precision", "coverage", "mind"):
        assert np.isfinite(record[name]["value"])
        assert np.isfinite(record["floor"][name])
    with pytest.raises(InputError, match=r"the Inception Score needs classes, and features dinov2 .* have none"):
        evaluate(images, None, network, ScoringConfig(metrics=("is",)))


def test_official_weights_are_known_by_their_hash(network, dinov2_weights, monkeypatch, recwarn):
    monkeypatch.setattr(dinov2, "DINOV2", dinov2.PublishedWeights("DINOv2", DINOV2.url, network.sha256, 1))
    official = dinov2_network(dinov2_weights)
    assert (official.name, official.distance) == ("dinov2", "FD-DINOv2")
    assert not [warning for warning in recwarn if "official" in str(warning.message)]


def test_the_message_for_absent_weights_has_name_size_hash_and_place(monkeypatch, tmp_path, capsys):
    import requests

    def unreachable(*args, **kwargs):
        raise requests.ConnectionError

    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", unreachable)
    assert run_command(["evaluate", "digits:test", "--reference", "digits:train", "--features", "dinov2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("model.safetensors", "1217522888 bytes", DINOV2.sha256, str(tmp_path), "facebook/dinov2-large",
                 "--dinov2-weights", "DDPM_DINOV2_WEIGHTS"):  # fmt: skip
        assert word in line


def without(name):
    return {key: tensor for key, tensor in random_dinov2().items() if key != name}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (without("embeddings.cls_token"), "another layout, first at embeddings.cls_token"),
        (without("encoder.layer.1.attention.attention.key.bias"), "another layout, first at encoder.layer.1"),
        (without("encoder.layer.0.mlp.fc1.weight"), "another layout, first at blocks.0.mlp.fc1.weight"),
        (random_dinov2() | {"head.weight": torch.zeros(2)}, "another layout, first at head.weight"),
        (random_dinov2() | {"layernorm.weight": torch.zeros(7)}, "another layout, first at norm.weight"),
        (random_dinov2() | {"embeddings.position_embeddings": torch.zeros(1, 9, WIDTH)}, "another layout"),
        (random_dinov2() | {"embeddings.cls_token": torch.zeros(1, 1, 100)}, "another layout"),
        ({"classifier.weight": torch.zeros(3, 3)}, "another layout"),
    ],
)
def test_weights_of_another_layout_are_refused(state, words, tmp_path):
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=words):
        dinov2_network(tmp_path / "other.safetensors")


def test_a_truncated_file_and_a_missing_library_are_told(dinov2_weights, tmp_path, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(dinov2_weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"truncated or no safetensors.* 5000 bytes"):
        dinov2_network(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"absent\.safetensors cannot be read: No such file"):
        dinov2_network(tmp_path / "absent.safetensors")
    monkeypatch.setattr(dinov2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ddpm-lab\[dinov2\]'"):
        dinov2_network(dinov2_weights)


@pytest.mark.filterwarnings("ignore:.*is not the official")
def test_one_pass_serves_several_networks(dinov2_weights, inception_weights, tmp_path, monkeypatch, capsys):
    """A table or a JSON line for each network, equal to what each gives alone; the pictures are read once."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(load_images("digits", "test").images[:12]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:02}.png")
    reads = []
    from ddpm_lab.data import image_stream

    read = image_stream._read_folder
    monkeypatch.setattr(image_stream, "_read_folder", lambda *args: (reads.append(1), read(*args))[1])
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DDPM_DINOV2_WEIGHTS", str(dinov2_weights))
    monkeypatch.setenv("DDPM_INCEPTION_WEIGHTS", str(inception_weights))
    settings = "--metrics kid,mind,is --bootstrap 0 --is-splits 2 --kid-subsets 2 --mind-directions 5 --device cpu"
    command = ["evaluate", str(folder), "--reference", str(folder), *settings.split(), "--json"]
    scores = tmp_path / "scores.jsonl"
    assert run_command([*command, "--features", "classifier", "inception", "dinov2", "--scores", str(scores)]) == 0
    lines = capsys.readouterr().out.splitlines()
    together = [json.loads(line) for line in lines]
    assert scores.read_text().splitlines() == lines
    assert [record["features"]["name"].split()[0] for record in together] == ["classifier", "inception", "dinov2"]
    assert [record["inception_score"] is None for record in together] == [False, False, True]
    num_reads = len(reads)
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "other"))
    for features, record in zip(("classifier", "dinov2"), (together[0], together[2]), strict=True):
        reads.clear()
        assert run_command([*command, "--features", features]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone | {"seconds": 0} == record | {"seconds": 0}
        assert len(reads) == num_reads, "one network reads as often as three"
    for more, words in (
        (["--features", "dinov2", "dinov2"], "one of them twice"),
        (["--features", "classifier", "--dinov2-weights", "x"], "--dinov2-weights is for --features dinov2"),
        (
            ["--features", "dinov2", "classifier", "--pairs", str(tmp_path / "p.png"), "--metrics", "memorisation"],
            "--pairs",
        ),
    ):
        assert run_command([*command, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line

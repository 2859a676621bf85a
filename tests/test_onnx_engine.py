"""ONNX Runtime computes what PyTorch computes, and its absence is no failure."""

import numpy as np
import pytest
import torch

from ddpm_lab import generation, onnx_engine
from ddpm_lab.cli import run_command
from ddpm_lab.config import SamplingConfig
from ddpm_lab.features import classifier_network, inception_network, module_network, onnx_features
from ddpm_lab.onnx_engine import OnnxNetwork, resolve_engine
from ddpm_lab.settings import InputError, RunError
from ddpm_lab.unet import UNet

needs_onnx = pytest.mark.skipif(
    any(onnx_engine.importlib.util.find_spec(p) is None for p in onnx_engine.PACKAGES), reason="the extra is absent"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache, monkeypatch):
    """One cache for all tests here, so that each graph is exported once."""
    monkeypatch.setenv("DDPM_CACHE_DIR", str(cache))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = (
        UNet(1, 8, (1, 2), 1, (0,), 4, norm_groups=2, patch_size=2, num_timesteps=500).eval().requires_grad_(False)
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def _example():
    return torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)


@needs_onnx
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_network_agrees_at_any_batch_size(network, batch):
    x_t, t = torch.randn(batch, 1, 8, 8), torch.randint(500, (batch,))
    expected = network(x_t, t)
    assert float(expected.abs().mean()) > 0.05
    torch.testing.assert_close(OnnxNetwork(network, _example(), "test")(x_t, t), expected, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_the_graph_is_exported_once_and_again_where_it_is_damaged(network, cache, monkeypatch):
    OnnxNetwork(network, _example(), "test")
    exported = []
    export = onnx_engine.export
    monkeypatch.setattr(onnx_engine, "export", lambda *given: exported.append(1) or export(*given))
    OnnxNetwork(network, _example(), "test")
    assert not exported
    for path in (cache / "onnx").glob("*.onnx"):
        path.write_bytes(path.read_bytes()[:1000])
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 250, 499])
    torch.testing.assert_close(OnnxNetwork(network, _example(), "test")(x_t, t), network(x_t, t), rtol=1e-4, atol=1e-4)
    assert exported == [1]
    OnnxNetwork(network, _example(), "test")
    assert exported == [1]


@needs_onnx
@pytest.mark.slow
def test_inception_agrees_resize_included(inception_weights):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="official"):
        ours = inception_network(inception_weights)
    other = onnx_features(ours, (3, 32, 32))
    for found, expected in zip(other(images), ours(images), strict=True):
        assert float(expected.std()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@needs_onnx
def test_features_agree_and_say_who_computed_them():
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    ours = classifier_network("digits")
    other = onnx_features(ours, (1, 8, 8))
    for found, expected in zip(other(images), ours(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "onnxruntime" in other.version
    assert other.key != ours.key


@needs_onnx
def test_sampling_gives_the_same_images(tiny_run, tmp_path):
    arrays = []
    for engine in ("torch", "onnx"):
        out = tmp_path / f"{engine}.npz"
        flags = ["--out", str(out), "--num-images", "3", "--num-steps", "4", "--engine", engine, "--device", "cpu"]
        assert run_command(["sample", str(tiny_run), *flags]) == 0
        arrays.append(np.load(out)["images"].astype(int))
    assert arrays[0].std() > 1
    assert np.abs(arrays[0] - arrays[1]).max() <= 1


def test_where_it_is_absent_pytorch_computes_and_the_user_is_told(monkeypatch):
    monkeypatch.setattr(onnx_engine, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.warns(UserWarning, match=r"needs .*no_such_package .*ddpm-lab\[onnx\].*PyTorch computes"):
        assert resolve_engine("onnx", torch.device("cpu")) == "torch"


@pytest.mark.filterwarnings("default:--engine onnx needs")
def test_the_command_says_so_once_and_before_the_work(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_engine, "PACKAGES", ("no_such_package",))
    told, generate = [], generation.generate

    def listen(*given, **settings):
        told.append(capsys.readouterr().err)
        return generate(*given, **settings)

    monkeypatch.setattr(generation, "generate", listen)
    flags = ["--out", str(tmp_path / "x.png"), "--num-images", "1", "--num-steps", "2", "--engine", "onnx"]
    assert run_command(["sample", str(tiny_run), *flags, "--device", "cpu"]) == 0
    assert told[0].count("PyTorch computes instead") == 1
    assert "PyTorch computes instead" not in capsys.readouterr().err


def test_a_module_from_python_is_refused_for_its_graph_could_be_out_of_date():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(InputError, match="come from a module in Python"):
        onnx_features(module_network(module), (1, 2, 2))


@needs_onnx
def test_what_cannot_be_exported_is_told_in_a_line(monkeypatch):
    def fail(*given):
        raise ValueError("a reason of the exporter's")

    monkeypatch.setattr(onnx_engine, "export", fail)
    with pytest.raises(RunError, match="cannot be exported to ONNX"):
        OnnxNetwork(torch.nn.Identity(), (torch.zeros(2, 3),), "another")


def test_it_is_refused_where_it_cannot_be():
    with pytest.raises(InputError, match="--engine onnx is for the CPU, not for meta"):
        resolve_engine("onnx", torch.device("meta"))
    with pytest.raises(InputError, match="computes in float32"):
        SamplingConfig(engine="onnx", precision="bf16")

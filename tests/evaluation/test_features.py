"""Feature networks, and scores over the FID network compared with torch-fidelity, on the same random weights."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_lab.core.device import uses_tf32
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.image_stream import tensor_stream
from ddpm_lab.evaluation import features
from ddpm_lab.evaluation.classifier import PACKAGED
from ddpm_lab.evaluation.evaluate import evaluate
from ddpm_lab.evaluation.features import INCEPTION, classifier_network, inception_network, module_network

OFFICIAL = os.environ.get("DDPM_INCEPTION_WEIGHTS")  # before the tests hide it from each other


def pictures(n, seed, contrast=255, channels=3):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=20, mode="bilinear") * contrast).to(torch.uint8)


class Uint8Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def inception(inception_weights):
    with pytest.warns(UserWarning, match="not the official Inception file"):
        return inception_network(inception_weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_scores_are_those_of_torch_fidelity(inception_weights):
    """End to end, resize included: Frechet distance where N > d, Inception Score, KID, precision and recall."""
    import torch_fidelity

    generated, real = pictures(70, 1), pictures(70, 2, contrast=200)
    with pytest.warns(UserWarning, match="not the official"):
        early = inception_network(inception_weights, layer="64")
    theirs = torch_fidelity.calculate_metrics(
        input1=Uint8Images(generated), input2=Uint8Images(real), cuda=False, verbose=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights),
        isc=True, fid=True, kid=True, prc=True, isc_splits=5, kid_subsets=10, kid_subset_size=40,
        feature_layer_fid="64", feature_layer_kid="64", feature_layer_prc="64", rng_seed=2020,
    )  # fmt: skip
    config = ScoringConfig(is_splits=5, kid_subsets=10, kid_subset_size=40, bootstrap=0)
    ours = evaluate(generated, reference_of(real), early, config)
    assert ours["fid"]["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["inception_score"]["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["kid"]["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    for name in ("precision", "recall"):
        assert ours[name]["value"] == pytest.approx(theirs[name], abs=1e-6)
        assert 0 < ours[name]["value"] < 1, "else it shows nothing"


def reference_of(images):
    from ddpm_lab.evaluation.reference import Reference

    stream = tensor_stream("real", images)
    return Reference("real", stream, None, stream.sha256)


@pytest.mark.slow
def test_fewer_images_than_features_have_a_closed_form(inception):
    """With N < d the root's trace is the nuclear norm of the images' products with each other, (N, M)."""
    a, b = (inception(pictures(n, n))[0].double() for n in (12, 15))
    record = evaluate(pictures(12, 12), reference_of(pictures(15, 15)), inception, ScoringConfig(metrics=("fid",)))
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    truth = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    truth -= 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert a.shape[1] == 2048
    assert record["fid"]["value"] == pytest.approx(float(truth), rel=1e-3)
    assert record["fid_label"] == "FID, unofficial weights (n=12 against 15)"
    assert record["features"]["name"].startswith("inception (unofficial, sha256 ")


def test_grey_images_are_colour_images_of_equal_planes(inception):
    grey = pictures(2, 3, channels=1)
    features, logits = inception(grey)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    torch.testing.assert_close(features, inception(grey.expand(-1, 3, -1, -1).contiguous())[0])


@pytest.mark.slow
def test_inception_score_of_cifar10_is_the_published_one(real_data_dir):
    """11.237 +- 0.095 on the training images, only with the official weights."""
    if not OFFICIAL:
        pytest.skip("needs the official weights: set DDPM_INCEPTION_WEIGHTS to their file")
    from ddpm_lab.data.image_stream import open_images

    network = inception_network(Path(OFFICIAL), "cuda" if torch.cuda.is_available() else "cpu")
    assert network.sha256 == INCEPTION.sha256
    record = evaluate(open_images("cifar10:train", real_data_dir), None, network, ScoringConfig(metrics=("is",)))
    assert record["inception_score"]["value"] == pytest.approx(11.237, abs=0.095)


def test_the_environment_names_the_weights(inception_weights, monkeypatch):
    monkeypatch.setenv("DDPM_INCEPTION_WEIGHTS", str(inception_weights))
    with pytest.warns(UserWarning, match="not the official"):
        assert inception_network().name.startswith("inception (unofficial, sha256 ")


def test_the_message_for_absent_weights_has_name_size_hash_and_place(monkeypatch, tmp_path):
    import requests

    def unreachable(*args, **kwargs):
        raise requests.ConnectionError

    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", unreachable)
    with pytest.raises(InputError) as raised:
        inception_network()
    for word in ("weights-inception-2015-12-05-6726825d.pth", "95628359 bytes", INCEPTION.sha256, str(tmp_path),
                 "--inception-weights", "DDPM_INCEPTION_WEIGHTS"):  # fmt: skip
        assert word in str(raised.value)


def test_any_module_is_a_feature_network():
    class Moments(torch.nn.Module):
        def forward(self, images):
            x = images.double().flatten(1)
            return torch.stack([x.mean(1), x.std(1)], 1)

    network = module_network(Moments(), "moments")
    record = evaluate(pictures(40, 1), reference_of(pictures(50, 2)), network, ScoringConfig(metrics=("fid", "kid")))
    assert record["fid_label"] == "FD-moments (n=40 against 50)"
    assert record["features"]["num_features"] == 2
    with pytest.raises(InputError, match="gives logits"):
        evaluate(pictures(40, 1), None, network, ScoringConfig(metrics=("is",)))
    with pytest.raises(InputError, match="must be uint8"):
        network(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="one row per image"):
        module_network(torch.nn.Flatten(0))(pictures(2, 1))


def test_modules_of_other_weights_have_other_names():
    class Linear(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images.float().flatten(1))

    hashes = {module_network(Linear(4, 2)).sha256 for _ in range(3)}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("dataset", "shape", "least"),
    [("digits", (1, 8, 8), 0.98), ("mnist", (1, 28, 28), 0.995), ("cifar10", (3, 32, 32), 0.9)],
)
def test_packaged_classifiers_have_the_accuracy_on_record(dataset, shape, least, request):
    from ddpm_lab.data.datasets import load_images

    data_dir = None if dataset == "digits" else request.getfixturevalue("real_data_dir")
    network = classifier_network(dataset)
    assert network.image_shape == shape
    assert network.details["test_accuracy"] >= least
    assert PACKAGED[dataset].stat().st_size <= 1.5e6
    test_set = load_images(dataset, "test", data_dir)
    images, labels = test_set.images[:2000], test_set.labels[:2000]  # the whole takes minutes on one core
    accuracy = float((network(images)[1].argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(network.details["test_accuracy"], abs=0.015)


def test_features_do_not_depend_on_the_batch():
    """A batch is not normalised by its own statistics."""
    network = classifier_network("digits")
    images = pictures(8, 1, channels=1)[:, :, :8, :8]
    together = network(images)[0]
    np.testing.assert_allclose(torch.cat([network(image[None])[0] for image in images]), together, atol=1e-4)


def test_two_threads_download_the_fid_network_once(tmp_path, monkeypatch):
    downloads = []

    def fetch(urls, path, verify, advice):
        downloads.append(path)
        time.sleep(0.2)
        path.write_bytes(b"weights")

    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(features, "download", fetch)
    both = [threading.Thread(target=features.INCEPTION.download) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(downloads) == 1
    assert features.INCEPTION.download().read_bytes() == b"weights"


def test_features_are_of_true_float32_whatever_the_caller_has_set():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    class Recorder(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 1), float(uses_tf32()))

    values, _ = module_network(Recorder())(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert values.tolist() == [[0.0], [0.0]]

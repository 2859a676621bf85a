"""Classifiers: augmentation, and that an interrupted training ends as one that was not interrupted."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ddpm_lab.core.errors import InputError
from ddpm_lab.evaluation import classifier
from ddpm_lab.evaluation.classifier import (
    SETTINGS,
    STATE,
    WEIGHTS,
    Classifier,
    augmented,
    learning_rate,
    load_classifier,
    train_classifier,
)


def test_shapes_and_size():
    for dataset, channels, size in (("mnist", 1, 28), ("cifar10", 3, 32), ("digits", 1, 8)):
        network = Classifier(channels, SETTINGS[dataset].widths)
        features, logits = network(torch.zeros(2, channels, size, size, dtype=torch.uint8))
        assert (features.shape, logits.shape) == ((2, SETTINGS[dataset].widths[-1]), (2, 10))
        assert 2 * sum(p.numel() for p in network.parameters()) < 1.5e6, "bytes in half precision"


def test_augmentation_shifts_and_flips_only():
    """With a border of zeros each image is the original, shifted by at most `shift` pixels, perhaps mirrored."""
    settings = replace(SETTINGS["digits"], shift=2, horizontal_flip=True)
    image = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 6, 6, 1)
    padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2))
    indices = torch.zeros(2000, dtype=torch.int64)
    batch = augmented(padded, indices, settings, torch.Generator().manual_seed(0))
    assert batch.shape == (2000, 1, 6, 6)
    augmentations = {image.numpy().tobytes() for image in batch}
    expected = set()
    for top in range(5):
        for left in range(5):
            window = padded[0, top : top + 6, left : left + 6, 0]
            expected |= {window.contiguous().numpy().tobytes(), window.flip(1).contiguous().numpy().tobytes()}
    assert augmentations == expected


def test_the_learning_rate_rises_and_falls_to_zero():
    settings = SETTINGS["mnist"]
    assert learning_rate(settings, 0.2) == pytest.approx(settings.learning_rate)
    assert learning_rate(settings, 0.1) == pytest.approx(settings.learning_rate / 2)
    assert learning_rate(settings, 1.0) == 0


def test_an_interrupted_training_ends_the_same(tmp_path, monkeypatch):
    whole = train_classifier("digits", tmp_path / "whole", num_epochs=3, device="cpu")
    train_epoch, epochs = classifier._Training.train_epoch, []

    def interrupted(self):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(self.epoch)
        return train_epoch(self)

    monkeypatch.setattr(classifier._Training, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier("digits", tmp_path / "parts", num_epochs=3, device="cpu")
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    monkeypatch.setattr(classifier._Training, "train_epoch", train_epoch)
    parts = train_classifier("digits", tmp_path / "parts", num_epochs=3, device="cpu")
    assert epochs == [0, 1]
    assert parts.sha256 == whole.sha256
    assert parts.meta == whole.meta
    assert parts.meta["test_accuracy"] > 0.5
    assert parts.meta["settings"]["num_epochs"] == 3
    with pytest.raises(InputError, match="other settings or images"):
        train_classifier("digits", tmp_path / "parts", num_epochs=3, seed=1, device="cpu")


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder of a classifier trained for one epoch; tests copy it."""
    folder = tmp_path_factory.mktemp("classifier")
    train_classifier("digits", folder, num_epochs=1, device="cpu")
    return folder


def test_damaged_files_are_refused(one_epoch, tmp_path):
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (b"", content[:1000], b"\0" * 2000, content[:-10]):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged, or not a classifier's"):
            load_classifier(tmp_path / WEIGHTS)
    (tmp_path / STATE).unlink()
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=r"without the training\.safetensors of its training"):
        train_classifier("digits", tmp_path, num_epochs=1, device="cpu")
    assert (tmp_path / WEIGHTS).read_bytes() == content
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(InputError, match="other settings"):
        train_classifier("digits", tmp_path, num_epochs=1, device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"widths": [16, 32, 48]}}, "another network"),
        ({"settings": {"widths": []}}, "does not describe one"),
        ({"test_accuracy": "high"}, "does not describe one"),
    ],
)
def test_a_header_of_another_shape_is_refused(one_epoch, tmp_path, change, words):
    content = (one_epoch / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["ddpm_lab"])
    meta |= change
    header["__metadata__"]["ddpm_lab"] = json.dumps(meta)
    changed = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(InputError, match=words):
        load_classifier(tmp_path / WEIGHTS)

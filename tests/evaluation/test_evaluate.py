"""Whole scores: records, references of every kind, caching and resuming, memorisation, and the command."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import SamplingConfig, load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import locked
from ddpm_lab.core.log import append_line, cut_lines, read_lines
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.datasets import load_images
from ddpm_lab.data.image_stream import ImageStream, chunk_size, open_images, tensor_stream
from ddpm_lab.evaluation import evaluate as evaluation
from ddpm_lab.evaluation import feature_store
from ddpm_lab.evaluation.evaluate import evaluate, generated_images
from ddpm_lab.evaluation.feature_store import features_of, features_of_each
from ddpm_lab.evaluation.features import classifier_network, module_network
from ddpm_lab.evaluation.metrics import statistics
from ddpm_lab.evaluation.neighbours import memorisation
from ddpm_lab.evaluation.record import Evaluation, ScoreRecord, Scores, TrainingRecord
from ddpm_lab.evaluation.reference import Reference, open_reference
from ddpm_lab.evaluation.score_table import score_table
from ddpm_lab.evaluation.scores import evaluate_source
from ddpm_lab.sampling import generation, output
from ddpm_lab.sampling.image_files import save_npz
from ddpm_lab.training.run import train
from tests.conftest import tree_hash
from tests.evaluation.test_record import assert_fits

ALL = ScoringConfig(metrics=("fid", "is", "kid", "prdc", "mind", "memorisation"), bootstrap=5, kid_subsets=3)


@pytest.fixture(scope="module")
def digits():
    return classifier_network("digits")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Pixels(torch.nn.Module):
    """Four pixels as features; counts its calls, and may fail at one of them."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.calls, self.fail_at = 0, fail_at

    def forward(self, images):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return images[:, 0, 3, 2:6].float() / 255, images.flatten(1).float()[:, :10] / 255


def cached(module):
    """A module whose features go into the cache, as those of the package's own networks do."""
    return replace(module_network(module, batch_size=100), persistent=True)


def values(record):
    return {name: record[name] and record[name]["value"] for name in Scores.__annotations__}


def test_a_record_says_all_its_numbers_depend_on(digits):
    record = evaluate(open_images("digits:test"), "digits:train", digits, ALL)
    assert_fits(json.loads(json.dumps(record, allow_nan=False)), Evaluation)
    for name in (
        "fid",
        "inception_score",
        "inception_score_whole",
        "kid",
        "mind",
        "precision",
        "recall",
        "density",
        "coverage",
    ):
        score = record[name]
        assert score["low"] <= score["value"] <= score["high"]
    assert record["fid_label"] == "FD-classifier (n=360 against 1,437)"
    assert record["reference"] == {
        "name": "digits:train", "dataset": "digits", "split": "train", "num_images": 1437,
        "sha256": open_images("digits:train").sha256,
    }  # fmt: skip
    assert {"name", "sha256", "library", "version", "num_features", "test_accuracy"} <= record["features"].keys()
    assert sum(record["classes"]["shares"]) == pytest.approx(1)
    assert record["floor"]["images"] == "digits:test"
    for name in Scores.__annotations__:  # the images are the floor's own
        assert record["floor"][name] == values(record)[name]


def test_real_images_are_near_and_noise_is_far(digits):
    noise = torch.randint(0, 256, (360, 1, 8, 8), dtype=torch.uint8)
    real, far = (
        evaluate(images, "digits:train", digits, ALL) for images in (load_images("digits", "test").images, noise)
    )
    assert far["fid"]["value"] > 20 * real["fid"]["value"]
    assert far["kid"]["value"] > 20 * abs(real["kid"]["value"])
    assert far["mind"]["value"] > 20 * real["mind"]["value"]
    assert far["precision"]["value"] < 0.5 < 0.8 < real["precision"]["value"]
    assert far["inception_score"]["value"] < real["inception_score"]["value"]


def test_every_kind_of_images_scores_the_same(digits, tmp_path):
    """Tensor, data set, .npz of either name, folder of PNGs; and as references."""
    images = load_images("digits", "test").images
    save_npz(tmp_path / "ours.npz", iter(images.split(50)), len(images))
    np.savez(tmp_path / "theirs.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "folder" / f"{i:04}.png")
    named = ["digits:test", *(str(tmp_path / name) for name in ("ours.npz", "theirs.npz", "folder"))]
    config = ScoringConfig(bootstrap=0)
    records = [evaluate(open_images(name), "digits:train", digits, config) for name in named]
    records += [evaluate(images, "digits:train", digits, config)]
    assert all(values(record) == values(records[0]) for record in records)
    training = load_images("digits", "train").images
    as_references = [values(evaluate(training, name, digits, config)) for name in named]
    assert all(scores == as_references[0] for scores in as_references)


def test_statistics_in_a_file_serve_as_reference(digits, tmp_path):
    """As others publish them: `mu` and `sigma`."""
    reference = statistics(digits(load_images("digits", "train").images)[0])
    np.savez(tmp_path / "digits.npz", mu=reference.mean.numpy(), sigma=reference.cov.numpy())
    config = ScoringConfig(metrics=("fid", "is"), bootstrap=0)
    record = evaluate(open_images("digits:test"), str(tmp_path / "digits.npz"), digits, config)
    other = evaluate(open_images("digits:test"), "digits:train", digits, config)
    assert record["fid"]["value"] == pytest.approx(other["fid"]["value"], rel=1e-6)
    assert record["floor"] is None
    assert record["reference"]["num_images"] is None


def test_folders_are_cropped_and_scaled_on_demand(tmp_path):
    for i in range(4):
        wide = np.zeros((20, 40, 3), np.uint8)
        wide[:, 10:30] = 40 * i + 50
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
    stream = open_images(str(tmp_path), image_size=8)
    assert (stream.num_images, stream.shape) == (4, (1, 8, 8)), "three equal planes are grey"
    (batch,) = stream.batches()
    assert [int(image.float().mean()) for image in batch] == [50, 90, 130, 170], "the middle, in the order of the names"
    with pytest.raises(InputError, match="--image-size"):
        open_images(str(tmp_path))


def test_features_are_computed_once_and_continued(cache):
    """Interrupted, they continue after the last whole chunk; complete, they are read; damaged, they are recomputed."""
    images = torch.randint(0, 256, (1700, 1, 8, 8), dtype=torch.uint8)
    stream = tensor_stream("noise", images)
    expected = images[:, 0, 3, 2:6].float() / 255
    with pytest.raises(KeyboardInterrupt):
        features_of(stream, cached(Pixels(fail_at=13)))
    second = Pixels()
    features = features_of(stream, cached(second))
    assert second.calls == 7, "1000 of 1700 existed"
    assert torch.equal(features.values, expected)
    assert features.logits is not None
    assert torch.equal(features.logits, images.flatten(1).float()[:, :10] / 255)
    third = Pixels()
    assert torch.equal(features_of(stream, cached(third)).values, expected)
    assert third.calls == 0
    torn = features.folder.with_name(".partial-" + features.folder.name)
    shutil.move(features.folder, torn)  # as if it was interrupted, and a crash had lost some logits
    os.truncate(torn / feature_store.LOGITS, 600 * 40)
    fourth = Pixels()
    assert torch.equal(features_of(stream, cached(fourth)).logits, features.logits)
    assert fourth.calls == 12, "500 of 1700 existed"
    for damage in (
        lambda f: os.truncate(f / feature_store.FEATURES, 100),
        lambda f: (f / "meta.json").write_text("[]"),
    ):
        damage(features.folder)
        assert torch.equal(features_of(stream, cached(third)).values, expected)


def test_networks_that_stopped_at_different_images_share_one_pass(cache):
    """One of them had 1,000 of 1,700 images, one none, and one is never kept."""
    images = torch.randint(0, 256, (1700, 1, 8, 8), dtype=torch.uint8)
    reads, stream = [], tensor_stream("noise", images)
    counted = replace(stream, read=lambda n: (reads.append(n), stream.read(n))[1])

    def network(name, persistent=True, fail_at=None):
        return replace(module_network(Pixels(fail_at), name), persistent=persistent)

    with pytest.raises(KeyboardInterrupt):
        features_of(counted, network("first", fail_at=13))
    reads.clear()
    networks = network("first"), network("second"), network("third", persistent=False)
    for features in features_of_each(counted, networks):
        assert torch.equal(features.values, images[:, 0, 3, 2:6].float() / 255)
        assert torch.equal(features.logits, images.flatten(1).float()[:, :10] / 255)
    assert [each.module.calls for each in networks] == [7, 17, 17]
    assert len(reads) == 1
    features_of_each(counted, networks[:2])
    assert [each.module.calls for each in networks] == [7, 17, 17]
    assert len(reads) == 1


def test_features_of_python_modules_are_never_kept(cache):
    """Their code is in no hash: two modules alike in name and weights may compute different things."""

    class Power(torch.nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def forward(self, images):
            return images[:, 0, 3, 2:6].float() ** self.k

    stream = open_images("digits:test")
    one, two = (features_of(stream, module_network(Power(k))) for k in (1, 2))
    assert torch.equal(one.values**2, two.values)
    assert one.statistics().num_images == 360
    assert not list((cache / "features").iterdir())


def test_other_images_or_weights_have_other_features(cache, digits):
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    changed = images.clone()
    changed[7, 0, 3, 3] ^= 1
    folders = {
        features_of(tensor_stream("a", x), n).folder for x in (images, changed) for n in (digits, cached(Pixels()))
    }
    assert len(folders) == 4
    assert features_of(tensor_stream("another name", images), digits).folder in folders


def test_statistics_of_a_reference_are_kept(cache, digits):
    features = features_of(open_images("digits:test"), digits)
    computed = features.statistics()
    kept = features.statistics()
    assert torch.equal(kept.factor, computed.factor)
    assert torch.equal(kept.cov, computed.cov)
    (features.folder / feature_store.STATISTICS).write_bytes(b"damaged")
    assert torch.equal(features.statistics().cov, computed.cov)


def test_copies_of_training_images_are_found(digits, tmp_path):
    """A generator that copies a third of its images: they lie nearer than any held-out image."""
    training, test = (load_images("digits", split).images for split in ("train", "test"))
    mixed = torch.cat([training[:50], test[:100]])
    record = evaluate(
        mixed, "digits:train", digits, ScoringConfig(metrics=("memorisation",)), pairs=tmp_path / "pairs.png"
    )
    memorised = record["memorisation"]
    assert 50 / 150 <= memorised["nearer_than_test"] <= 50 / 150 + 0.03
    assert 50 / 150 <= memorised["much_nearer"] <= 50 / 150 + 0.03
    assert all(i == j and distance < 1e-4 for i, j, distance in memorised["closest"])
    picture = np.asarray(Image.open(tmp_path / "pairs.png"))
    assert np.array_equal(picture[:56], picture[-56:]), "each above its neighbour, here the same image"


def test_memorisation_is_one_percent_without_copies():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(n, 3, generator=generator) for n in (4000, 2000, 4000)]
    sampled, training, held_out = draws
    memorised = memorisation(sampled, training, held_out)
    assert memorised["nearer_than_test"] == pytest.approx(0.01, abs=0.006)


@pytest.mark.parametrize(("num_images", "num_held_out"), [(300, 100), (1000, 1000)])
def test_a_perfect_generator_has_the_share_expected_19_times_in_20(num_images, num_held_out):
    """Also with few held-out images, whose 1 % quantile is uncertain."""
    generator, num_inside, shares = torch.Generator().manual_seed(0), 0, []
    training = torch.zeros(1, 1)  # one training image, so that a distance is a size
    for _ in range(400):
        sampled, held_out = (torch.rand(n, 1, generator=generator) for n in (num_images, num_held_out))
        memorised = memorisation(sampled, training.expand(2, 1), held_out)
        num_inside += memorised["expected_low"] <= memorised["nearer_than_test"] <= memorised["expected_high"]
        shares.append(memorised["nearer_than_test"])
    assert 0.92 <= num_inside / 400 <= 0.99
    assert np.mean(shares) == pytest.approx(memorised["expected"], rel=0.1)
    assert memorised["nearer_than_test_low"] <= memorised["nearer_than_test"] <= memorised["nearer_than_test_high"]


def test_sampling_into_a_folder_resumes(tiny_run, tmp_path, monkeypatch):
    """Also where one of the writing threads was behind the others, so that an image is missing among others."""
    trained = load(tiny_run, device="cpu")
    config = SamplingConfig(num_steps=2, batch_size=4)
    output.sample_to_folder(trained, tmp_path / "whole", 11, config)
    save = output.save_image

    def stop_at_the_sixth(path, image):
        if path.name == "00000005.png":
            raise KeyboardInterrupt
        save(path, image)

    monkeypatch.setattr(output, "save_image", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        output.sample_to_folder(trained, tmp_path / "parts", 11, config)
    monkeypatch.setattr(output, "save_image", save)
    assert sorted(path.stem for path in (tmp_path / "parts").glob("*.png"))[-2:] == ["00000006", "00000007"]
    assert output.sample_to_folder(trained, tmp_path / "parts", 7, config) == 5
    assert output.sample_to_folder(trained, tmp_path / "parts", 11, config) == 8
    assert tree_hash(tmp_path / "parts") == tree_hash(tmp_path / "whole")
    assert len(list((tmp_path / "parts").glob("*.png"))) == 11
    in_memory = torch.cat(list(generation.generate(trained, 11, config)))
    on_disk = torch.cat(list(open_images(str(tmp_path / "parts")).batches()))
    assert torch.equal(in_memory, on_disk)
    with pytest.raises(InputError, match="images of another seed"):
        output.sample_to_folder(trained, tmp_path / "parts", 11, SamplingConfig(num_steps=2, batch_size=4, seed=1))
    record = tmp_path / "parts" / "sampling.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"mood": None}))
    with pytest.raises(InputError, match="images of another mood;"):
        output.sample_to_folder(trained, tmp_path / "parts", 11, config)


def test_a_batch_is_written_while_the_next_is_sampled(tiny_run, tmp_path, monkeypatch):
    """Each of the threads holds its first image back until the second batch has been begun, and all write at once."""
    trained = load(tiny_run, device="cpu")
    saved, drawn, begun = output.save_image, generation.trajectory, threading.Event()
    together = threading.Barrier(output.WRITERS)

    def trajectory(trained, sampler, indices):
        if indices.start == 4:
            begun.set()
        return drawn(trained, sampler, indices)

    def save(path, image):
        assert begun.wait(10), "no second batch was begun meanwhile"
        together.wait(10)
        saved(path, image)

    monkeypatch.setattr(generation, "trajectory", trajectory)
    monkeypatch.setattr(output, "save_image", save)
    output.sample_to_folder(trained, tmp_path / "images", 8, SamplingConfig(num_steps=2, batch_size=4))
    assert len(list((tmp_path / "images").glob("*.png"))) == 8


def test_images_are_read_while_features_are_computed(cache):
    """The first features wait until the second batch of images is read; an error of reading is raised as usual."""
    second_read = threading.Event()

    class Waiting(torch.nn.Module):
        def forward(self, images):
            assert second_read.wait(10), "no second batch was read meanwhile"
            return images.flatten(1)

    def read(num_images):
        yield torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
        second_read.set()
        yield torch.ones(2, 1, 2, 2, dtype=torch.uint8)
        if num_images > 4:
            raise InputError("the third is damaged")

    network = module_network(Waiting(), "waiting")
    features = features_of(ImageStream("four", 4, (1, 2, 2), read), network)
    assert features.values[:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="the third is damaged"):
        features_of(ImageStream("six", 6, (1, 2, 2), read), network)


def test_samples_are_kept_for_the_next_score(tiny_run, cache):
    trained = load(tiny_run, device="cpu")
    config = SamplingConfig(num_steps=2, batch_size=8)
    first = generated_images(trained, 10, config)
    files = tree_hash(cache)
    more = generated_images(trained, 20, config)
    assert files.items() <= tree_hash(cache).items()
    assert torch.equal(torch.cat(list(first.batches())), torch.cat(list(more.batches()))[:10])
    assert generated_images(trained, 10, config).sha256 == first.sha256


def test_new_samples_are_scored_from_memory_and_equal_those_of_the_files(tiny_run, cache, monkeypatch):
    """The files are read only where a part of the images was there already, or where the memory would not hold all."""
    trained, config = load(tiny_run, device="cpu"), SamplingConfig(num_steps=2, batch_size=4)
    monkeypatch.setattr(evaluation, "open_images", None)
    sampled = generated_images(trained, 10, config)
    monkeypatch.undo()
    monkeypatch.setenv("DDPM_CACHE_DIR", str(cache))
    read = generated_images(trained, 10, config)
    assert (read.sha256, read.name, read.shape) == (sampled.sha256, sampled.name, sampled.shape)
    assert generated_images(trained, 14, config).num_images == 14
    monkeypatch.setattr(evaluation, "MOST_BYTES_IN_MEMORY", 10 * 64 - 1)
    monkeypatch.setattr(evaluation, "tensor_stream", None)
    assert generated_images(trained, 10, replace(config, seed=1)).num_images == 10


def test_samples_of_another_process_are_others(tiny_run, tmp_path, cache):
    """The same weights under another schedule, and equal settings, explicit and by default."""
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    record = json.loads((other / "config.json").read_text())
    record["config"]["diffusion"] |= {"schedule": "cosine", "rescale_betas": None}
    (other / "config.json").write_text(json.dumps(record))
    config = SamplingConfig(num_steps=2, batch_size=8)
    linear, cosine = (generated_images(load(path, device="cpu"), 8, config) for path in (tiny_run, other))
    assert linear.sha256 != cosine.sha256
    explicit = generated_images(load(tiny_run, device="cpu"), 8, replace(config, eta=0.0, spacing="uniform"))
    assert explicit.name == linear.name


def test_a_damaged_sample_in_the_cache_is_made_again(tiny_run, cache):
    trained, config = load(tiny_run, device="cpu"), SamplingConfig(num_steps=2, batch_size=4)
    sha256 = generated_images(trained, 10, config).sha256
    (picture,) = cache.rglob("00000005.png")
    picture.write_bytes(picture.read_bytes()[:40])
    assert generated_images(trained, 10, config).sha256 == sha256


def test_some_of_a_collection_are_drawn_at_random(tmp_path):
    """Sorted by class, the first ones would be of one class only; the draw is the same whatever holds the images."""
    digits_test = load_images("digits", "test")
    order = digits_test.labels.argsort()
    images, labels = digits_test.images[order], digits_test.labels[order]
    stream = tensor_stream("sorted", images)
    drawn = torch.cat(list(stream.draw(100).batches()))
    lookup = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert len({lookup[image.numpy().tobytes()] for image in drawn}) == 10
    assert len({image.numpy().tobytes() for image in drawn}) == 100
    long = tensor_stream("long", torch.arange(7000).remainder(251).to(torch.uint8).view(-1, 1, 1, 1))
    sizes = [len(batch) for batch in long.draw(1234).batches()]
    assert sizes == [500, 500, 234]
    assert stream.draw(360) is stream


def test_grey_images_saved_in_colour_are_grey(digits, tmp_path):
    images = load_images("digits", "test").images[:30]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).convert("RGB").save(tmp_path / f"{i:03}.png")
    stream = open_images(str(tmp_path), channels=1)
    assert torch.equal(torch.cat(list(stream.batches())), images)
    assert open_images(str(tmp_path)).shape == (1, 8, 8)
    assert open_images(str(tmp_path), channels=3).shape == (3, 8, 8)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "zzz.png")
    with pytest.raises(InputError, match=r"zzz\.png"):
        list(open_images(str(tmp_path), channels=1).batches())


def test_a_record_after_a_torn_line_is_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    append_line(path, {"step": 1, "seconds": 1.0})
    with path.open("a") as stream:
        stream.write('{"step": 2, "sec')
    append_line(path, {"step": 3, "seconds": 1.0})
    append_line(path, {"step": 4, "seconds": 1.0})
    assert [line["step"] for line in read_lines(path)] == [1, 3, 4]


def test_a_record_without_a_step_stays_when_a_run_resumes(tmp_path):
    """Such as that of real images, beside those of the run."""
    path = tmp_path / "scores.jsonl"
    for step in (1, None, 3):
        append_line(path, {"step": step, "seconds": 1.0})
    assert [line["step"] for line in cut_lines(path, 2)] == [1]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, None]


def test_a_record_that_cannot_be_written_is_in_the_message(tiny_run, tmp_path, capsys, cache, monkeypatch):
    def full(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_lab.evaluation.scores.append_line", full)
    shutil.copytree(tiny_run, tmp_path / "run")
    assert run_command(evaluate_command(tmp_path / "run", "--metrics", "fid")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line.partition("the record: ")[2])["num_images"] == 40


def test_large_images_are_read_a_few_at_a_time():
    assert chunk_size((3, 32, 32)) == 500
    assert chunk_size((3, 4096, 4096)) == 2
    images = torch.zeros(5, 3, 4096, 4096, dtype=torch.uint8)
    assert [len(batch) for batch in tensor_stream("large", images).batches()] == [2, 2, 1]


def evaluate_command(run, *more, num_images=40):
    settings = (
        f"--features classifier --num-steps 2 --batch-size 32 --device cpu --bootstrap 3 --num-images {num_images}"
    )
    return ["evaluate", str(run), *settings.split(), *more]


def test_the_command_prints_a_table_or_one_record(tiny_run, tmp_path, capsys, cache):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    assert run_command(evaluate_command(run)) == 0
    table = capsys.readouterr().out
    for words in ("FD-classifier (n=40 against 1,437)", "Inception Score, 10 splits", "seed 0",
                  "floor: 40 images of digits:test", "ddim, 2 of 1000 steps (rescaled betas)"):  # fmt: skip
        assert words in table
    assert run_command(evaluate_command(run, "--json", "--metrics", "fid,is")) == 0
    out = capsys.readouterr().out
    record = json.loads(out)
    assert len(out.splitlines()) == 1
    assert record["kid"] is None
    assert record["num_images"] == 40
    expected = {"step": 12, "weights": "ema", "sampler": "ddim", "num_steps": 2, "num_evaluations": 2, "seed": 0,
                "num_timesteps": 1000, "beta_convention": "rescaled"}  # fmt: skip
    assert expected.items() <= record.items()
    lines = read_lines(run / "scores.jsonl")
    assert [line["kid"] is None for line in lines] == [False, True]
    assert lines[1] == record
    assert_fits(record, ScoreRecord)
    assert values(lines[0])["fid"] == values(lines[1])["fid"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes(tiny_run, tmp_path, cache):
    """SIGKILL while it samples: the same command resumes and ends in the same numbers."""
    command = [sys.executable, "-m", "ddpm_lab", *evaluate_command(tiny_run, "--json", num_images=600)]
    command += ["--scores", str(tmp_path / "scores.jsonl")]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(cache.rglob("*.png"))) < 40:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    num_images = len(list(cache.rglob("*.png")))
    assert 40 <= num_images < 600
    stamps = {path: path.stat().st_mtime_ns for path in sorted(cache.rglob("0*.png"))[:32]}
    continued = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "none is sampled again"
    shutil.rmtree(cache)
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert values(json.loads(continued.stdout)) == values(json.loads(whole.stdout))


def test_a_floor_is_scored_once_per_setting(digits, monkeypatch):
    images, scored, scores = load_images("digits", "test").images, [], evaluation._scores
    monkeypatch.setattr(evaluation, "_floors", {})
    monkeypatch.setattr(evaluation, "_scores", lambda *args: (scored.append(1), scores(*args))[1])

    def floor(rows, network=digits, **settings):
        scoring = ScoringConfig(metrics=("fid", "kid"), kid_subsets=2, **settings)
        return evaluate(images[:rows], "digits:train", network, scoring)["floor"]

    first = floor(40, bootstrap=0)
    assert (len(scored), floor(40, bootstrap=3), len(scored)) == (2, first, 3)
    assert (floor(50, bootstrap=0)["num_images"], len(scored)) == (50, 5)  # of as many as there are samples
    assert (floor(40, bootstrap=0, kid_subset_size=20)["kid"] != first["kid"], len(scored)) == (True, 7)
    module = module_network(torch.nn.Flatten(), "pixels")  # whose code has no hash
    assert (floor(40, module), floor(40, module), len(scored))[2] == 11


def test_the_floor_of_a_folder_is_what_was_held_out_of_training(tmp_path, tiny_recipe, digits):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(load_images("digits").images[:100]):
        Image.fromarray(image[0].numpy()).save(pictures / f"{i:03}.png")
    config = load_recipe(str(tiny_recipe))
    config = replace(
        config,
        data=replace(config.data, dataset=str(pictures)),
        training=replace(config.training, num_steps=2),
        evaluation=replace(config.evaluation, score_every=2, score_images=20),
    )
    train(config, tmp_path / "run", device="cpu")
    (in_training,) = read_lines(tmp_path / "run" / "scores.jsonl")
    assert_fits(in_training, TrainingRecord)

    seen, held_out = (load_images(str(pictures), split).images for split in ("train", "test"))
    stream = tensor_stream("seen", seen)
    scoring = ScoringConfig(metrics=("fid", "kid", "prdc"), bootstrap=0, kid_subsets=3)
    alone = evaluate(held_out, Reference("seen", stream, None, stream.sha256), digits, scoring)
    assert alone["floor"] is None
    assert in_training["floor"]["fid"] == alone["fid"]["value"]

    source, sampling = str(tmp_path / "run"), SamplingConfig(num_steps=2)
    (record,) = evaluate_source(source, None, ["classifier"], 20, scoring, sampling, device="cpu")
    assert record["floor"]["num_images"] == len(held_out) == 5
    for name in ("fid", "kid", "precision", "coverage"):
        assert record["floor"][name] == alone[name]["value"]
    assert any(line.startswith("floor: 5 images of ") for line in score_table(record))
    older = {name: value for name, value in record.items() if name != "mind"}
    assert score_table(older) == score_table(record)
    with pytest.raises(InputError, match="needs 100 held-out images, and there are 5"):
        evaluate_source(
            source, None, ["classifier"], 20, ScoringConfig(metrics=("memorisation",)), sampling, device="cpu"
        )


def test_held_out_images_serve_as_a_test_split(digits):
    seen, held_out = (tensor_stream(split, load_images("digits", split).images) for split in ("train", "test"))
    images, scoring = load_images("digits").images[:60], ScoringConfig(metrics=("fid", "memorisation"), bootstrap=0)
    explicit = evaluate(images, Reference("seen", seen, None, seen.sha256, held_out), digits, scoring)
    named = evaluate(images, "digits:train", digits, scoring)
    assert explicit["memorisation"] == named["memorisation"]
    assert explicit["floor"]["fid"] == named["floor"]["fid"]
    few = tensor_stream("few", load_images("digits", "test").images[:3])
    assert Reference("seen", seen, None, seen.sha256, few).floor(60, None) is None


@pytest.mark.parametrize("reference", ["digits:train", "digits:test"])
def test_the_floor_is_the_split_that_is_not_the_reference(reference):
    opened = open_reference(reference)
    floor = opened.floor(100, None)
    assert floor is not None
    assert {floor.name, reference} == {"digits:train", "digits:test"}
    assert floor.num_images == 100
    whole = opened.floor(10_000, None)
    assert whole is not None
    assert whole.num_images == open_images(floor.name).num_images
    pool = [image.numpy().tobytes() for batch in whole.batches() for image in batch]
    drawn = [image.numpy().tobytes() for batch in floor.batches() for image in batch]
    assert set(drawn) <= set(pool)
    assert drawn != pool[:100]


def test_an_array_with_a_truncated_header_is_reported_in_one_line(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, ".ljust(118)
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(InputError, match=r"cut.npz is damaged: "):
        open_images(str(tmp_path / "cut.npz"))


def test_the_message_for_a_read_only_cache_names_its_variable(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"^DDPM_CACHE_DIR .* cannot be written: "):
        generated_images(load(tiny_run, device="cpu"), 4, SamplingConfig(num_steps=2))


def test_a_full_disk_is_no_input_error(tmp_path, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("filelock.FileLock.acquire", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path, "--out"):
        pass


def test_info_lists_the_scores(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    scored = {"step": 12, "seconds": 1.0, "fid_label": "FD-classifier (n=20)", "sampler": "ddim", "weights": "ema"}
    append_line(tmp_path / "run" / "scores.jsonl", scored | {"fid": {"value": 41.25}, "num_evaluations": 50})
    append_line(tmp_path / "run" / "scores.jsonl", scored | {"fid": None})
    assert run_command(["info", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scored")]
    assert lines == ["scored at step 12: FD-classifier (n=20) 41.25, ddim with 50 evaluations, ema weights"]

"""Images from a trained network: seeds that do not depend on the batch, files, and names of packaged weights."""

import copy
import dataclasses
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab import load
from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.evaluation.classifier import PACKAGED, load_classifier
from ddpm_lab.models.trained import packaged_names
from ddpm_lab.sampling import generation
from ddpm_lab.sampling.generation import ImageNoise, build_sampler, generate, trajectory
from ddpm_lab.sampling.image_files import image_grid, save_npz
from ddpm_lab.sampling.output import sample_to_file


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load(tiny_run, device="cpu")


def images(trained, num_images, **settings):
    return torch.cat(list(generate(trained, num_images, SamplingConfig(**settings))))


def test_a_loaded_model_is_called_as_documented(trained):
    out = trained.model(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
    assert out.shape == (2, 1, 8, 8)
    assert trained.schedule.num_timesteps == trained.config.diffusion.num_timesteps == 1000
    assert trained.step == 12
    raw = load(tiny_path := trained.name, weights="raw", device="cpu")
    assert not torch.equal(raw.model(torch.ones(1, 1, 8, 8), torch.tensor([5])),
                           trained.model(torch.ones(1, 1, 8, 8), torch.tensor([5])))  # fmt: skip
    assert load(f"{tiny_path}/checkpoints/step_00000008", device="cpu").step == 8
    assert load(tiny_path, checkpoint=8, device="cpu").step == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 5},
        {"num_steps": 5, "eta": 1.0},
        {"sampler": "ddpm", "num_steps": 4},
        {"sampler": "dpmpp", "num_steps": 4},
        {"sampler": "dpmpp", "num_steps": 4, "eta": 1.0},
        {"sampler": "ipndm", "num_steps": 5, "spacing": "karras"},
        {"sampler": "unipc", "num_steps": 5},
    ],
)
def test_an_image_does_not_depend_on_how_many_are_sampled(trained, settings):
    """Bit for bit at one batch size; across batch sizes, and for fewer images than a batch, by at most 1 of 255."""
    many = images(trained, 11, batch_size=4, **settings)
    assert many.shape == (11, 1, 8, 8)
    assert many.dtype == torch.uint8
    for number in (4, 6, 9):
        assert torch.equal(images(trained, number, batch_size=4, **settings), many[:number])
    for number in (1, 3):
        padded = torch.cat(list(generate(trained, number, SamplingConfig(batch_size=4, **settings), pad=True)))
        assert torch.equal(padded, many[:number])
        assert torch.equal(images(trained, number, batch_size=4, **settings),
                           images(trained, number, batch_size=number, **settings))  # fmt: skip
    for batch_size in (1, 3, 11):
        other = images(trained, 11, batch_size=batch_size, **settings)
        assert int((other.int() - many.int()).abs().max()) <= 1


@pytest.mark.parametrize(("number", "pad", "rows"), [(1, False, [1]), (1, True, [4]), (5, False, [4, 4])])
def test_no_more_rows_are_computed_than_needed(trained, monkeypatch, number, pad, rows):
    computed, forward = [], trained.model.forward
    monkeypatch.setattr(trained.model, "forward", lambda x_t, t: computed.append(len(x_t)) or forward(x_t, t))
    list(generate(trained, number, SamplingConfig(num_steps=1, batch_size=4), pad=pad))
    assert computed == rows


def test_bf16_samples_nearly_the_same_images(trained):
    exact = images(trained, 8, num_steps=5)
    zero = dataclasses.replace(trained, model=copy.deepcopy(trained.model))
    for parameter in zero.model.parameters():
        parameter.zero_()
    effect_of_the_network = float((images(zero, 8, num_steps=5).int() - exact.int()).abs().float().mean())
    for batch_size in (8, 3):
        rounded = images(trained, 8, num_steps=5, precision="bf16", batch_size=batch_size)
        difference = (rounded.int() - exact.int()).abs()
        assert 0 < float(difference.float().mean()) < effect_of_the_network / 4


def test_seeds_and_images_differ(trained):
    first, second = images(trained, 3, num_steps=2), images(trained, 3, num_steps=2, seed=1)
    assert len({image.numpy().tobytes() for image in [*first, *second]}) == 6


def test_noise_of_an_image_comes_from_its_seed_and_number():
    together = ImageNoise(7, range(3), (1, 4, 4), torch.device("cpu"))
    alone = ImageNoise(7, range(2, 3), (1, 4, 4), torch.device("cpu"))
    for step in (-1, 0, 1):
        assert torch.equal(together(step)[2:], alone(step))
    expected = np.random.default_rng(np.random.SeedSequence([7, 2])).standard_normal((1, 4, 4), dtype=np.float32)
    fresh = ImageNoise(7, range(2, 3), (1, 4, 4), torch.device("cpu"))
    assert np.array_equal(fresh(-1)[0].numpy(), expected)
    big = ImageNoise(0, range(100), (1, 32, 32), torch.device("cpu"))(-1)
    assert float(big.mean()) == pytest.approx(0, abs=0.01)
    assert float(big.std()) == pytest.approx(1, abs=0.01)


def noise_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


def test_noise_drawn_ahead_is_the_noise_of_each_generator():
    """In several threads, and in any number of calls, those that were not expected too."""
    count, shape = 3 * generation.IMAGES_PER_THREAD + 5, (1, 2, 3)
    generators = [np.random.default_rng(np.random.SeedSequence([3, i])) for i in range(count)]
    with ImageNoise(3, range(count), shape, torch.device("cpu"), num_draws=3) as noise:
        for step in range(5):
            expected = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
            assert np.array_equal(noise(step).numpy(), expected)
    assert noise_threads() == []


def test_one_noise_is_drawn_ahead_and_none_beyond_the_last(monkeypatch):
    drawn, times = generation._draw, []

    def draw(generators, noise):
        drawn(generators, noise)
        times.append(len(times))

    monkeypatch.setattr(generation, "_draw", draw)
    noise = ImageNoise(0, range(2), (1, 2, 2), torch.device("cpu"), num_draws=3)
    for calls, expected in ((1, 2), (2, 3), (3, 3)):
        noise(calls)
        wait_until(lambda expected=expected: len(times) >= expected)
        time.sleep(0.02)  # for one too many to come
        assert len(times) == expected, calls
    del noise
    wait_until(lambda: noise_threads() == [])


def wait_until(condition):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 10
        time.sleep(0.001)


@pytest.mark.parametrize("end", ["error", "interrupt", "abandoned"])
def test_no_thread_outlives_its_batch(trained, monkeypatch, end):
    sampler = build_sampler(trained, SamplingConfig(sampler="ddpm", num_steps=4, batch_size=2))
    drawn, draws = generation._draw, []

    def draw(generators, noise):
        draws.append(noise)
        if len(draws) == 3 and end == "error":
            raise MemoryError("no room")
        drawn(generators, noise)

    monkeypatch.setattr(generation, "_draw", draw)
    steps = trajectory(trained, sampler, range(2))
    next(steps)
    assert noise_threads() != []
    if end == "error":
        with pytest.raises(MemoryError, match="no room"):
            list(steps)
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt)
    else:
        del steps
    assert noise_threads() == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"eta": 0.0}, 1),
        ({"eta": 0.5}, 5),
        ({"sampler": "ddpm"}, 5),
        ({"sampler": "dpmpp"}, 1),
        ({"sampler": "dpmpp", "eta": 1.0}, 5),
        ({"sampler": "heun"}, 1),
    ],
)
def test_as_much_noise_is_drawn_as_the_sampler_takes(trained, monkeypatch, settings, expected):
    calls = []
    monkeypatch.setattr(generation, "_draw", lambda generators, noise: calls.append(noise.fill(0)))
    sampler = build_sampler(trained, SamplingConfig(num_steps=5, batch_size=2, **settings))
    list(trajectory(trained, sampler, range(2)))
    assert len(calls) == sampler.num_draws == expected


def test_every_step_is_reported(trained):
    counts = []
    list(generate(trained, 5, SamplingConfig(num_steps=3, batch_size=4), on_step=counts.append))
    assert counts == [4, 4, 4, 1, 1, 1]


def test_a_grid_and_an_array_hold_the_same_images(tiny_run, trained, tmp_path):
    settings = SamplingConfig(num_steps=2, batch_size=4)
    sample_to_file(str(tiny_run), tmp_path / "a.npz", 6, settings, device="cpu")
    sample_to_file(str(tiny_run), tmp_path / "a.png", 6, settings, device="cpu")
    with np.load(tmp_path / "a.npz") as archive:
        array = archive["images"]
    assert array.shape == (6, 8, 8, 1)
    assert array.dtype == np.uint8
    expected = images(trained, 6, num_steps=2, batch_size=4)
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), image_grid(expected, scale=7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_grid_by_hand():
    four = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    assert image_grid(four[:3], gap=1).tolist() == [[0, 255, 1], [255, 255, 255], [2, 255, 255]]
    assert image_grid(four, columns=4, gap=0, scale=2).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert image_grid(four.expand(4, 3, 1, 1)).shape == (4, 4, 3)


def test_arrays_are_written_batch_by_batch(tmp_path):
    """No batch is held while the next is made."""
    alive = []

    def batches():
        import gc
        import weakref

        for _ in range(4):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1
            batch = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    save_npz(tmp_path / "x.npz", batches(), 20)
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["images"].shape == (20, 4, 4, 3)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")

    def batches():
        yield torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_npz(path, batches(), 2)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_packaged_weights_sample_offline():
    """They are what the README promises: small, averaged, and of real digits."""
    assert packaged_names() == ["mnist", "cifar10"]
    trained = load("mnist", device="cpu")
    assert trained.image_shape == (1, 28, 28)
    assert trained.record["data"]["name"] == "mnist:train"
    assert (trained.folder / "ema.safetensors").stat().st_size <= 6_000_000
    drawn = images(trained, 4, num_steps=10, batch_size=4).float()
    ink = (drawn > 127).float().mean((1, 2, 3))  # of real digits: 0.03 to 0.35
    assert bool(((ink > 0.02) & (ink < 0.4)).all()), ink
    assert float((drawn[:, :, 0] < 30).float().mean()) > 0.95, "the upper border is black"


def test_packaged_objects_are_taken_for_their_class():
    """Ten images, one of each class, at the guidance that the weights name; real images: 92 %."""
    trained = load("cifar10", device="cpu")
    assert (trained.image_shape, trained.num_classes, trained.guidance) == ((3, 32, 32), 10, 2.0)
    assert (trained.folder / "ema.safetensors").stat().st_size <= 18_000_000
    drawn = images(trained, 10, num_steps=10, sampler="dpmpp")
    _, logits = load_classifier(PACKAGED["cifar10"]).network(drawn)
    assert int((logits.argmax(1) == torch.arange(10)).sum()) >= 7


def test_a_packaged_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch, tiny_run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "mnist")
    assert load("mnist", device="cpu").image_shape == (1, 28, 28)
    assert load("./mnist", device="cpu").image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "is not a run's"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda d: shutil.rmtree(d / "checkpoints"), "has no checkpoint yet"),
        (lambda d: edit(d, lambda r: r["config"]["model"].update(base_channels=33)), "multiple of 4"),
        (lambda d: edit(d, lambda r: r["config"]["model"].update(base_channels=64)), "belongs to another network"),
        (lambda d: edit(d, lambda r: r["config"]["diffusion"].update(num_timesteps="many")), "whole number"),
        (lambda d: edit(d, lambda r: r["config"].update(optimiser={})), "no group 'optimiser'"),
        (lambda d: edit(d, lambda r: r["data"].update(image_shape=[1, 8])), "is not a run's"),
        (lambda d: edit(d, lambda r: r["data"].update(image_shape=[1, 7, 7])), "multiple of 2"),
    ],
)
def test_broken_runs_are_refused(tiny_run, tmp_path, break_it, words):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    break_it(copy)
    with pytest.raises(InputError, match=words):
        load(copy, device="cpu")


def edit(run_dir, change):
    record = json.loads((run_dir / "config.json").read_text())
    change(record)
    (run_dir / "config.json").write_text(json.dumps(record))


def test_packaged_weights_may_name_their_guidance_scale():
    mnist = load("mnist", device="cpu")
    assert (mnist.guidance, build_sampler(mnist, SamplingConfig(num_steps=5)).config.guidance) == (1.0, 1.0)
    named = dataclasses.replace(mnist, record=mnist.record | {"guidance": 2.0})
    for guidance, used, evaluations in ((None, 2.0, 10), (1.0, 1.0, 5), (3.0, 3.0, 10)):
        sampler = build_sampler(named, SamplingConfig(num_steps=5, guidance=guidance))
        assert (sampler.config.guidance, sampler.num_evaluations) == (used, evaluations)

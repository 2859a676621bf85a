"""Class labels and guidance: which labels the network receives, which are dropped, and what guidance computes."""

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import SamplingConfig, load_recipe
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import load_images, to_uint8
from ddpm_lab.diffusion.guidance import classes_in_turn, drop_labels, guidance_label, guided, guided_timesteps
from ddpm_lab.diffusion.process import predict_x_0_eps
from ddpm_lab.diffusion.samplers import ddim_sample
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import checkpoint_path
from ddpm_lab.sampling.generation import build_sampler, generate
from ddpm_lab.training.loop import new_state, training_loop
from ddpm_lab.training.run import train
from tests.conftest import tree_hash

CLASSES = ["--model.num-classes", "10"]


@pytest.fixture(scope="module")
def labelled(tiny_recipe, tmp_path_factory):
    """A conditional run of the tiny recipe, with enough steps for the labels to have an effect."""
    run = tmp_path_factory.mktemp("runs") / "told"
    settings = ["--training.num-steps", "60", "--training.learning-rate", "5e-3", "--training.precision", "float32"]
    assert run_command(["train", str(tiny_recipe), "--run", str(run), "--device", "cpu", *CLASSES, *settings]) == 0
    return run


def images(source, num_images, **settings):
    trained = load(source, device="cpu")
    return torch.cat(list(generate(trained, num_images, SamplingConfig(num_steps=3, batch_size=4, **settings))))


def test_guidance_is_the_paper_s_formula_whatever_is_predicted():
    """eps = (1 + w) eps(x, c) - w eps(x), eq. 6, with guidance 1 + w, also for networks that predict x_0 or v."""
    generator = torch.Generator().manual_seed(0)
    x_t, eps_of = torch.randn(3, 1, 2, 2, generator=generator), torch.randn(5, 1, 2, 2, generator=generator)
    t, y, alpha_bar = torch.tensor([7, 8, 9]), torch.tensor([0, 2, 3]), 0.3
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    words = {
        "eps": lambda x, eps: eps,
        "x_0": lambda x, eps: (x - noise * eps) / signal,
        "v": lambda x, eps: signal * eps - noise * (x - noise * eps) / signal,
    }
    expected = 2.5 * eps_of[y] - 1.5 * eps_of[4]
    for prediction, say in words.items():
        calls = []

        def network(x, t, y=None, say=say, calls=calls):
            calls.append((len(x), t.tolist(), y.tolist()))
            return say(x, eps_of[y])

        output = guided(network, y, 4, 2.5)(x_t, t)
        _, eps = predict_x_0_eps(prediction, output, x_t, alpha_bar)
        torch.testing.assert_close(eps, expected, rtol=1e-5, atol=1e-5)
        assert calls == [(6, [7, 8, 9, 7, 8, 9], [0, 2, 3, 4, 4, 4])]
        assert torch.equal(guided(network, y, 4)(x_t, t), say(x_t, eps_of[y]))
        assert calls[1:] == [(3, [7, 8, 9], [0, 2, 3])], "guidance 1 takes one evaluation"


def test_a_guide_takes_the_place_of_the_network_without_a_class():
    """Autoguidance (arXiv:2406.02507, eq. 3): guide + w (network - guide), for the same images."""
    x_t, t, y = torch.randn(3, 1, 2, 2), torch.tensor([5, 5, 5]), torch.tensor([0, 2, 1])

    def network(x, t, y=None):
        return 3 * x if y is None else 2 * x + y.view(-1, 1, 1, 1)

    weak = guided(lambda x, t, y=None: -x + 0.5 * y.view(-1, 1, 1, 1), y, 3)
    full, weaker = 2 * x_t + y.view(-1, 1, 1, 1), -x_t + 0.5 * y.view(-1, 1, 1, 1)
    torch.testing.assert_close(guided(network, y, 3, 2.5, guide=weak)(x_t, t), weaker + 2.5 * (full - weaker))
    unconditional = guided(network, None, 0, 2.0, guide=weak)(x_t, t)
    torch.testing.assert_close(unconditional, weaker + 2 * (3 * x_t - weaker))
    scales = torch.tensor([1.0, 2.0, 0.5])
    each = guided(network, y, 3, scales, guide=weak)(x_t, t)
    torch.testing.assert_close(each, weaker + scales.view(-1, 1, 1, 1) * (full - weaker))


def test_guidance_acts_at_the_noise_levels_of_its_interval():
    schedule, calls = linear_schedule(100), []

    def network(x, t, y=None):
        calls.append(len(x))
        return torch.zeros_like(x) + y.view(-1, 1, 1, 1)

    interval = guided_timesteps(schedule, (0.5, 5.0))
    sigma = schedule.snr**-0.5
    assert [t in interval for t in range(100)] == [0.5 <= float(sigma[t]) <= 5 for t in range(100)]
    assert guided_timesteps(schedule, ()) == range(100)
    model = guided(network, torch.tensor([0]), 1, 3.0, timesteps=interval)
    outputs = [float(model(torch.zeros(1, 1, 1, 1), torch.tensor([t]))) for t in (interval.start - 1, interval.start)]
    assert outputs == [0, 1 + 3 * (0 - 1)]
    assert calls == [1, 2]
    with pytest.raises(InputError, match="contains no timestep; the noise levels are from"):
        guided_timesteps(schedule, (1e-9, 1e-8))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"sampler": "ddim", "num_steps": 10}, 20),
        ({"sampler": "heun", "num_steps": 4}, 14),
        ({"sampler": "ipndm", "num_steps": 5, "spacing": "karras"}, 10),
        ({"sampler": "unipc", "num_steps": 5, "guidance_interval": (0.5, 5.0)}, None),
        ({"sampler": "ddim", "num_steps": 10, "guidance_interval": (0.5, 5.0)}, None),
        ({"sampler": "heun", "num_steps": 4, "guidance_interval": (0.5, 5.0)}, None),
        ({"sampler": "dpmpp", "num_steps": 4, "singlestep": True, "guidance_interval": (0.1, 2.0)}, None),
    ],
)
def test_evaluations_are_counted_as_they_happen(labelled, monkeypatch, settings, count):
    """Those of the guide, too: the count of a record is what a batch of one image really asks for."""
    rows = []
    trained = load(labelled, device="cpu")
    real = UNet.forward

    def forward(self, x_t, t, y=None):
        rows.append(len(x_t))
        return real(self, x_t, t, y)

    monkeypatch.setattr(UNet, "forward", forward)
    for guide in (None, str(labelled / "averages" / "step_00000007")):
        rows.clear()
        config = SamplingConfig(**settings, guidance=2.0, guide=guide, batch_size=1)
        list(generate(trained, 1, config))
        assert sum(rows) == build_sampler(trained, config).num_evaluations
        assert count is None or sum(rows) == count


def test_a_guide_changes_images_and_is_recorded(labelled, tmp_path):
    """A network as its own guide changes nothing, an early average changes the images, and the record names it."""
    unguided = images(labelled, 4)
    assert torch.equal(images(labelled, 4, guidance=1.0), unguided)
    itself = images(labelled, 4, guidance=3.0, guide=str(labelled))
    assert int((itself.int() - unguided.int()).abs().max()) <= 1
    average = labelled / "averages" / "step_00000007"
    with_guide = images(labelled, 4, guidance=3.0, guide=str(average))
    assert int((with_guide.int() - unguided.int()).abs().max()) > 1
    folder = tmp_path / "images"
    command = [
        "sample",
        str(labelled),
        "--num-images",
        "4",
        "--num-steps",
        "3",
        "--guidance",
        "3",
        "--device",
        "cpu",
    ]
    assert run_command([*command, "--guide", str(average), "--batch-size", "4", "--out", str(folder)]) == 0
    identity = json.loads((folder / "sampling.json").read_text())
    assert identity["guide"] == load(average, device="cpu").weights_sha256
    assert run_command([*command, "--guide", str(labelled), "--batch-size", "4", "--out", str(folder)]) == 2
    scored = tmp_path / "scores.jsonl"
    scoring = ["--features", "classifier", "--metrics", "is", "--num-images", "20", "--scores", str(scored)]
    evaluating = [
        "evaluate",
        str(labelled),
        "--num-steps",
        "3",
        "--guidance",
        "3",
        "--guide",
        str(average),
        *scoring,
    ]
    assert run_command([*evaluating, "--guidance-interval", "0.1", "3", "--device", "cpu"]) == 0
    record = json.loads(scored.read_text())
    assert (record["guide"]["step"], record["guide"]["sha256"]) == (7, identity["guide"])
    assert record["guidance_interval"] == [0.1, 3.0]
    assert guidance_label(record) == f", guidance 3 by {average} at step 7 at noise levels 0.1 to 3"
    assert guidance_label({"guidance": 1.0}) == guidance_label({}) == ""


def test_a_guide_that_does_not_fit_is_refused(labelled, tiny_run, tmp_path):
    config = load(tiny_run, device="cpu").config
    other = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, num_timesteps=50))
    train(dataclasses.replace(other, training=dataclasses.replace(config.training, num_steps=1)), tmp_path / "short")
    for source, guide, words in (
        (labelled, "mnist", "in its image shape"),
        (labelled, tmp_path / "short", "in its number of timesteps"),
        (tiny_run, labelled, "in its number of classes"),
        (labelled, tmp_path / "nothing", "no model"),
    ):
        with pytest.raises(InputError, match=words):
            build_sampler(load(source, device="cpu"), SamplingConfig(guide=str(guide), guidance=2.0))
    for settings, words in (
        ({"guide": "x"}, "guide requires a guidance"),
        ({"guide": "x", "guidance": 1.0}, "guide requires a guidance"),
        ({"guidance_interval": (1.0,), "guidance": 2.0}, "two noise levels"),
        ({"guidance_interval": (2.0, 1.0), "guidance": 2.0}, "the lower one first"),
        ({"guidance_interval": (1.0, 2.0)}, "guidance_interval requires a guidance"),
    ):
        with pytest.raises(InputError, match=words):
            SamplingConfig(**settings)
    unconditional = build_sampler(load(tiny_run, device="cpu"), SamplingConfig(guide=str(tiny_run), guidance=2.0))
    assert unconditional.config.guidance == 2.0, "a network without classes can be guided, too"


def test_a_guided_graph_computes_what_pytorch_does(labelled, tmp_path):
    average = labelled / "averages" / "step_00000007"
    settings = ["--sampler", "ddim", "--num-steps", "4", "--guidance", "2", "--guidance-interval", "0.3", "20"]
    command = ["export", str(labelled), "--to", "onnx", "--out", str(tmp_path / "onnx"), *settings]
    assert run_command([*command, "--guide", str(average)]) == 0
    noise, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5, 9])
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "sampler.onnx")
    (result,) = session.run(None, {"noise": noise.numpy(), "y": y.numpy()})
    config = SamplingConfig(num_steps=4, guidance=2.0, guide=str(average), guidance_interval=(0.3, 20.0))
    for step in build_sampler(load(labelled, device="cpu"), config).steps(noise, None, y):
        x_0 = step.x_s
    expected = to_uint8(x_0).permute(0, 2, 3, 1).int()
    assert int((torch.from_numpy(result).int() - expected).abs().max()) <= 1
    assert f"by {average} at step 7 at noise levels 0.3 to 20" in (tmp_path / "onnx" / "README.md").read_text()


def test_a_perfect_network_samples_the_requested_class():
    """Data with one image per class: the exact network samples that image from any noise."""
    centres = torch.tensor([-0.6, 0.1, 0.8]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    schedule = linear_schedule()

    def network(x_t, t, y=None):
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return ((x_t - alpha_bar.sqrt() * centres[y]) / (1 - alpha_bar).sqrt()).float()

    y = torch.tensor([2, 0, 1, 2])
    result = ddim_sample(guided(network, y, 3), schedule, torch.randn(4, 1, 2, 2), 10)
    torch.testing.assert_close(result, centres[y], rtol=0, atol=1e-4)


def test_labels_are_dropped_with_the_given_probability():
    y = torch.arange(20_000) % 10
    kept = drop_labels(y, 10, 0.2, torch.Generator().manual_seed(0))
    assert set(kept[kept != y].tolist()) == {10}
    assert float((kept == 10).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(drop_labels(y, 10, 0.0, torch.Generator()), y)
    assert set(drop_labels(y, 10, 1.0, torch.Generator()).tolist()) == {10}


def test_images_take_the_classes_in_turn():
    assert classes_in_turn((), 3, range(2, 7)).tolist() == [2, 0, 1, 2, 0]
    assert classes_in_turn((7, 1), 10, range(1, 5)).tolist() == [1, 7, 1, 7]


def test_a_network_without_labels_gets_the_label_of_no_class():
    torch.manual_seed(0)
    model = UNet(1, 16, (1,), 1, (), norm_groups=4, num_classes=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_t, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 900])
    unconditional = model(x_t, t)
    assert torch.equal(unconditional, model(x_t, t, torch.tensor([3, 3])))
    one = model(x_t, t, torch.tensor([0, 3]))
    assert not torch.allclose(one[0], unconditional[0], atol=1e-3)
    torch.testing.assert_close(one[1], unconditional[1])
    with pytest.raises(InputError, match="is unconditional"):
        UNet(1, 16, (1,), 1, (), norm_groups=4)(x_t, t, torch.tensor([0, 0]))


def test_classes_change_nothing_else_that_is_random(tiny_recipe):
    """Timesteps, and losses at the first step, where the last layer is zero and nothing can depend on the class."""
    digits, first = load_images("digits"), []
    config = load_recipe(str(tiny_recipe))
    for num_classes in (None, 10):
        model = dataclasses.replace(config.model, num_classes=num_classes)
        state = new_state(build_unet(model, 1, 8, 1000), config.training)
        settings = dataclasses.replace(config, model=model)
        first.append(next(training_loop(state, linear_schedule(), digits.images, settings, digits.labels)))
    assert torch.equal(first[0].t, first[1].t)
    assert torch.equal(first[0].losses, first[1].losses)


def test_labels_are_those_of_the_images(tiny_recipe, monkeypatch):
    """The label that the network receives is that of its image, or no class."""
    digits = load_images("digits")
    seen = []
    config = load_recipe(str(tiny_recipe))
    data = dataclasses.replace(config.data, horizontal_flip=False)
    config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, num_classes=10))
    state = new_state(build_unet(config.model, 1, 8, 1000), config.training)
    real = state.model.forward

    def forward(x_t, t, y=None):
        seen.append((x_t, t, y))
        return real(x_t, t, y)

    monkeypatch.setattr(state.model, "forward", forward)
    schedule = linear_schedule()
    for _ in zip(range(12), training_loop(state, schedule, digits.images, config, digits.labels), strict=False):
        pass
    right, none, known = 0, 0, 0
    pixels = digits.images.flatten(1).float() / 127.5 - 1
    for x_t, t, y in seen:
        for image, step, label in zip(x_t.flatten(1), t, y, strict=True):
            if int(step) > 300:  # where there is less noise the nearest image is the one
                continue
            known += 1
            nearest = int((pixels * schedule.alpha_bar[step].sqrt() - image).square().sum(1).argmin())
            none += int(label) == 10
            right += int(label) == int(digits.labels[nearest])
    assert known > 20
    assert right + none >= known - 1
    assert right > 2 * none > 0


def test_resuming_with_classes_ends_in_the_same_weights(tiny_recipe, tmp_path):
    config = load_recipe(str(tiny_recipe))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=10))
    train(config, tmp_path / "whole", device="cpu")
    train(config, tmp_path / "parts", device="cpu")
    last = checkpoint_path(tmp_path / "parts", 12)
    before = tree_hash(last)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    train(config, tmp_path / "parts", device="cpu")
    assert tree_hash(last) == before == tree_hash(checkpoint_path(tmp_path / "whole", 12))


def test_an_image_depends_on_its_seed_number_and_class_alone(labelled):
    """Image i of a class is the same alone or in turn; guidance 0 ignores classes; labels change images."""
    in_turn = images(labelled, 12)
    assert torch.equal(images(labelled, 12, class_=tuple(range(10))), in_turn)
    sevens = images(labelled, 12, class_=(7,))
    assert torch.equal(sevens[7], in_turn[7])
    assert not torch.equal(sevens[8], in_turn[8])
    unconditional = images(labelled, 4, guidance=0.0)
    model = load(labelled, device="cpu").model
    assert not torch.equal(unconditional, images(labelled, 4, class_=(1,)))
    assert torch.equal(images(labelled, 4, guidance=1.0), in_turn[:4])
    assert not torch.equal(images(labelled, 4, guidance=3.0), in_turn[:4])
    assert model.num_classes == 10


def test_guidance_zero_is_the_unconditional_network(labelled):
    trained = load(labelled, device="cpu")
    from ddpm_lab.sampling.generation import ImageNoise

    x_T = ImageNoise(0, range(4), (1, 8, 8), torch.device("cpu"))(-1)
    expected = to_uint8(ddim_sample(trained.model, trained.schedule, x_T, 3))
    assert torch.equal(images(labelled, 4, guidance=0.0), expected)


def test_files_hold_the_classes(labelled, tmp_path):
    command = [
        "sample",
        str(labelled),
        "--num-images",
        "6",
        "--num-steps",
        "2",
        "--class",
        "3",
        "5",
        "--device",
        "cpu",
    ]
    assert run_command([*command, "--out", str(tmp_path / "images.npz")]) == 0
    arrays = np.load(tmp_path / "images.npz")
    assert arrays["labels"].tolist() == [3, 5, 3, 5, 3, 5]
    assert arrays["images"].shape == (6, 8, 8, 1)
    assert run_command([*command, "--out", str(tmp_path / "folder")]) == 0
    assert run_command([*command, "--guidance", "2", "--out", str(tmp_path / "folder")]) == 2, "another setting"


def test_a_score_says_how_many_images_have_the_requested_class(labelled, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    command = ["evaluate", str(labelled), "--num-images", "30", "--num-steps", "2", "--features", "classifier"]
    command += ["--metrics", "is", "--bootstrap", "0", "--guidance", "1.5", "--device", "cpu", "--scores"]
    assert run_command([*command, str(tmp_path / "scores.jsonl")]) == 0
    assert "are labelled as the class they were conditioned on" in capsys.readouterr().out
    record = json.loads((tmp_path / "scores.jsonl").read_text())
    assert (record["class"], record["guidance"]) == (None, 1.5)
    trained = load(labelled, device="cpu")
    sampled = torch.cat(list(generate(trained, 30, SamplingConfig(num_steps=2, guidance=1.5))))
    from ddpm_lab.evaluation.features import classifier_network

    _, logits = classifier_network("digits")(sampled)
    agreed = (logits.argmax(1) == torch.arange(30) % 10).double().mean()
    assert record["classes"]["as_asked"] == pytest.approx(float(agreed))


@pytest.mark.slow
def test_onnx_graphs_take_labels(labelled, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    command = [
        "export",
        str(labelled),
        "--to",
        "onnx",
        "--sampler",
        "ddim",
        "--num-steps",
        "3",
        "--out",
        str(out),
    ]
    assert run_command([*command, "--guidance", "2"]) == 0
    trained = load(labelled, device="cpu")
    x, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 9, 10, 4, 4])
    (output,) = onnxruntime.InferenceSession(out / "network.onnx").run(
        None, {"x_t": x.numpy(), "t": np.full(5, 500), "y": y.numpy()}
    )
    expected = trained.model(x, torch.full((5,), 500), y)
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=1e-4)
    (made,) = onnxruntime.InferenceSession(out / "sampler.onnx").run(None, {"noise": x.numpy(), "y": y.numpy()})
    model = guided(trained.model, y, 10, 2.0)
    expected = to_uint8(ddim_sample(model, trained.schedule, x, 3)).permute(0, 2, 3, 1).numpy()
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1
    assert "y = np.arange(4) % 10" in (out / "example.py").read_text()
    card = (out / "README.md").read_text()
    for words in ("`y` (B,) int64, the class in [0, 10) or 10 for none", "3 steps of ddim, guidance 2"):
        assert words in card
    assert "unconditional" not in card


def test_every_call_counts_as_an_evaluation(labelled):
    from ddpm_lab.sampling.generation import build_sampler

    trained = load(labelled, device="cpu")
    counts = {
        guidance: build_sampler(trained, SamplingConfig(num_steps=7, guidance=guidance)).num_evaluations
        for guidance in (None, 0.0, 1.0, 2.5)
    }
    assert counts == {None: 7, 0.0: 7, 1.0: 7, 2.5: 14}


def test_interpolations_and_reconstructions_take_labels(labelled):
    """The ends of an interpolation are the images that `sample` makes; real images are denoised as the class given."""
    from ddpm_lab.pictures.reverse import interpolate, reconstruct

    trained = load(labelled, device="cpu")
    settings = {"num_steps": 3, "batch_size": 8}
    between = interpolate(trained, SamplingConfig(**settings), 1, 3, 4)
    sampled = torch.cat(list(generate(trained, 3, SamplingConfig(**settings))))
    assert int((between[:, 0].int() - sampled.int()).abs().max()) <= 1
    seven, two = (interpolate(trained, SamplingConfig(class_=(k,), **settings), 1, 3, 4) for k in (7, 2))
    assert not torch.equal(seven, two)
    x_0 = load_images("digits").images[:4].float() / 127.5 - 1
    asked = [reconstruct(trained, SamplingConfig(class_=k, **settings), x_0, 600)[1] for k in ((), (3,), (5,))]
    assert not torch.equal(asked[1], asked[2])
    assert not torch.equal(asked[0], asked[1])
    with pytest.raises(InputError, match="--guidance requires --class"):
        reconstruct(trained, SamplingConfig(guidance=2.0, **settings), x_0, 600)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "digits", "--run", "RUN", "--model.num-classes", "9"], "num_classes must be 10 for digits, not 9"),
        (["train", "digits", "--run", "RUN", "--model.num-classes", "1"], "model.num_classes must be from 2"),
        (["train", "digits", "--run", "RUN", *CLASSES, "--training.class-dropout", "1.5"], "must be from 0 to 1"),
        (["sample", "TOLD", "--class", "10", "--out", "RUN.png"], "has the classes 0, 1, 2"),
        (["sample", "TOLD", "--class", "-1", "--out", "RUN.png"], "7, 8, 9, not -1"),
        (["sample", "TOLD", "--class", "one", "--out", "RUN.png"], "one"),
        (["sample", "TOLD", "--guidance", "-1", "--out", "RUN.png"], "guidance must be from 0 to 100"),
        (["sample", "TOLD", "--guidance", "0", "--class", "1", "--out", "RUN.png"], "guidance 0 ignores the class"),
        (["sample", "UNTOLD", "--class", "1", "--out", "RUN.png"], "was trained without classes"),
        (["sample", "UNTOLD", "--guidance", "2", "--out", "RUN.png"], "was trained without classes"),
        (["export", "TOLD", "--to", "diffusers", "--out", "RUN"], "passes no labels"),
        (["export", "TOLD", "--to", "onnx", "--guidance", "0", "--out", "RUN"], "guidance must be above 0"),
        (["export", "UNTOLD", "--to", "onnx", "--guidance", "2", "--out", "RUN"], "or give a --guide"),
    ],
)  # fmt: skip
def test_invalid_labels_and_guidance_are_refused(labelled, tiny_run, tmp_path, capsys, command, words):
    places = {
        "RUN": str(tmp_path / "run"),
        "RUN.png": str(tmp_path / "run.png"),
        "TOLD": str(labelled),
        "UNTOLD": str(tiny_run),
    }
    assert run_command([places.get(word, word) for word in command]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    assert words in err[0]
    assert not list(tmp_path.iterdir())


def test_a_network_without_class_dropout_is_not_evaluated_without_labels(tiny_recipe, tmp_path):
    """If no label is ever dropped, the embedding of no class keeps its random initial values."""
    always = [*CLASSES, "--training.class-dropout", "0", "--training.num-steps", "2", "--device", "cpu"]
    assert run_command(["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *always]) == 0
    trained = load(tmp_path / "run", device="cpu")
    for guidance in (0.0, 2.0):
        with pytest.raises(InputError, match=r"cannot sample without a class .*, so guidance must be 1"):
            build_sampler(trained, SamplingConfig(guidance=guidance))
    assert build_sampler(trained, SamplingConfig(guidance=1.0)).num_evaluations == 50
    # What begins from it has learnt no more; what begins from one that was told no classes has, for its own are 0.
    for name, source, able in (("told", tmp_path / "run", False), ("untold", tmp_path / "before", True)):
        if source.name == "before":
            assert run_command(["train", str(tiny_recipe), "--run", str(source), *always[2:]]) == 0
        begun = ["--run", str(tmp_path / name), "--from", str(source)]
        assert run_command(["train", str(tiny_recipe), *begun, *always]) == 0
        assert load(tmp_path / name, device="cpu").unconditional is able


def test_a_folder_of_pictures_has_no_classes(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for index in range(30):
        Image.new("L", (8, 8), index).save(tmp_path / "pictures" / f"{index}.png")
    command = [
        "train",
        "digits",
        "--data.dataset",
        str(tmp_path / "pictures"),
        *CLASSES,
        "--run",
        str(tmp_path / "run"),
    ]
    assert run_command(command) == 2
    assert "requires a data set with labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

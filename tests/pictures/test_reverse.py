"""The reverse process as shown: it ends in the very images that are sampled."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import to_uint8
from ddpm_lab.models.trained import load
from ddpm_lab.pictures.curves import norm_figure, read_runs, schedule_figure, state_norms, training_figure
from ddpm_lab.pictures.drawing import enlarged, rendered
from ddpm_lab.pictures.forward import forward_processes, random_images
from ddpm_lab.pictures.picture_settings import PictureConfig
from ddpm_lab.pictures.reverse import (
    interpolate,
    reconstruct,
    record_trajectory,
    reverse_frames,
    reverse_picture,
    show_interpolation,
    show_reconstruction,
    show_reverse,
)
from ddpm_lab.sampling.generation import generate


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load(tiny_run, device="cpu")


class PerfectDenoiser(torch.nn.Module):
    """A network of x_0 prediction that returns the true images, and records its timesteps."""

    def __init__(self, x_0):
        super().__init__()
        self.x_0 = torch.nn.Parameter(x_0, requires_grad=False)
        self.timesteps = []

    def forward(self, x_t, t):
        self.timesteps.append(int(t[0]))
        return self.x_0.expand_as(x_t)


def with_perfect_denoiser(trained, x_0):
    """The trained model with its network replaced by a perfect denoiser."""
    config = dataclasses.replace(
        trained.config, diffusion=dataclasses.replace(trained.config.diffusion, prediction="x_0")
    )
    return dataclasses.replace(trained, model=PerfectDenoiser(x_0), config=config)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(num_steps=6, batch_size=4),
        SamplingConfig(sampler="ddpm", num_steps=5, batch_size=4, seed=3),
        SamplingConfig(sampler="dpmpp", num_steps=4, eta=1.0, batch_size=4),
        SamplingConfig(sampler="heun", num_steps=3, batch_size=4),
        SamplingConfig(sampler="unipc", num_steps=4, batch_size=4),
        SamplingConfig(sampler="ipndm", num_steps=4, batch_size=8),
    ],
    ids=lambda config: config.sampler,
)
def test_a_trajectory_ends_in_the_sampled_images(trained, config):
    shown = record_trajectory(trained, config, 6, 4)  # six images are two batches
    images = torch.cat(list(generate(trained, 6, config)))
    assert torch.equal(shown.x_t[-1], images)
    assert torch.equal(shown.x_0_hat[-1], images)
    assert shown.x_t.shape == (4, 6, 1, 8, 8)
    assert (shown.timesteps[0], shown.timesteps[-1]) == (1000, 0)
    assert shown.timesteps == sorted(shown.timesteps, reverse=True)
    assert not torch.equal(shown.x_t[1], shown.x_0_hat[1])


def test_every_state_is_shown_beside_its_prediction(trained):
    x_0 = torch.rand(1, 1, 8, 8) * 2 - 1
    shown = record_trajectory(with_perfect_denoiser(trained, x_0), SamplingConfig(num_steps=5, batch_size=2), 2, 6)
    for predicted in shown.x_0_hat:
        assert torch.equal(predicted, to_uint8(x_0).expand(2, -1, -1, -1))
    assert shown.timesteps == [1000, 800, 600, 400, 200, 0]


def test_generators_of_different_lengths_go_in_step(trained):
    short = record_trajectory(trained, SamplingConfig(num_steps=2, batch_size=2), 2, 9)
    long = record_trajectory(trained, SamplingConfig(num_steps=8, batch_size=2), 2, 9)
    assert len(short.timesteps) == len(long.timesteps) == 9
    assert short.timesteps == [1000, 1000, 1000, 500, 500, 500, 0, 0, 0]
    frames = list(reverse_frames([short, long]))
    assert len(frames) == 9
    assert len({frame.shape for frame in frames}) == 1
    one = reverse_picture([short])
    assert reverse_picture([short, long]).shape[0] > 1.8 * one.shape[0]


def test_the_last_frame_shows_what_ddpm_sample_draws(trained, tmp_path):
    config = SamplingConfig(num_steps=4, batch_size=4)
    images = torch.cat(list(generate(trained, 2, config)))
    for name, settings in (("a.gif", {"hold": 0.5}), ("a.png", {"columns": 5})):
        show_reverse(tmp_path / name, [trained], config, num_images=2, settings=PictureConfig(scale=2, **settings))
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5
        film.seek(4)
        last = np.asarray(film.convert("RGB")).astype(int)
    shown = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    for image in images:
        wanted = enlarged(image, 2).astype(int)
        assert least_difference(shown, wanted) == 0
        assert least_difference(last, wanted) <= 8  # of a palette


def least_difference(picture, part):
    """How far a part is from where it fits a picture best: the largest difference of a pixel there."""
    windows = np.lib.stride_tricks.sliding_window_view(picture[:, :, 0], part.shape[:2])
    return np.abs(windows - part[:, :, 0]).max((2, 3)).min()


def test_an_interpolation_joins_the_images_of_two_seeds(trained):
    config = SamplingConfig(num_steps=4, seed=5, batch_size=6)
    images = interpolate(trained, config, 9, 2, 3)
    assert images.shape == (2, 3, 1, 8, 8)
    for place, seed in ((0, 5), (-1, 9)):
        ends = torch.cat(list(generate(trained, 2, dataclasses.replace(config, seed=seed))))
        assert (images[:, place].int() - ends.int()).abs().max() <= 1
    same = interpolate(trained, config, 5, 2, 3)
    assert (same[:, 0].int() - same[:, 1].int()).abs().max() <= 1
    for noisy in (SamplingConfig(sampler="ddpm"), SamplingConfig(eta=0.5), SamplingConfig(sampler="dpmpp", eta=1.0)):
        with pytest.raises(InputError, match="requires a deterministic sampler"):
            interpolate(trained, noisy, 9, 2, 3)


def test_noise_between_two_seeds_keeps_its_norm(trained):
    class Recorder(PerfectDenoiser):
        def forward(self, x_t, t):
            self.x_T = x_t.clone()
            return super().forward(x_t, t)

    spy = dataclasses.replace(trained, model=Recorder(torch.zeros(1, 1, 8, 8)))
    interpolate(spy, SamplingConfig(num_steps=1, batch_size=64), 9, 4, 11)
    norms = spy.model.x_T.flatten(1).norm(dim=1).view(4, 11)
    low, high = torch.minimum(norms[:, 0], norms[:, -1]), torch.maximum(norms[:, 0], norms[:, -1])
    assert bool((norms > 0.9 * low[:, None]).all())  # the straight line would fall to 0.7
    assert bool((norms < 1.1 * high[:, None]).all())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_what_is_denoised_starts_where_it_was_noised(trained, sampler):
    x_0 = torch.rand(1, 1, 8, 8) * 2 - 1
    model = with_perfect_denoiser(trained, x_0)
    x_t, denoised = reconstruct(model, SamplingConfig(sampler=sampler, num_steps=20, batch_size=4), x_0, 500)
    torch.testing.assert_close(denoised, x_0, rtol=0, atol=1e-5)
    assert model.model.timesteps[0] == 499
    assert len(model.model.timesteps) == 10  # its share of the twenty
    signal = trained.schedule.alpha_bar[499].sqrt()
    noise = (x_t - signal.float() * x_0) / (1 - trained.schedule.alpha_bar[499]).sqrt().float()
    assert float(noise.abs().mean()) == pytest.approx(0.8, abs=0.2)


def test_reconstruction_from_little_noise_is_nearly_the_image(trained):
    x_0 = random_images("digits", "test", 4, 0)
    near, far = (
        float((reconstruct(trained, SamplingConfig(num_steps=50), x_0, t)[1] - x_0).square().mean()) for t in (20, 1000)
    )
    assert near < 0.02 < far
    with pytest.raises(InputError, match="from 2 to the 1000"):
        reconstruct(trained, SamplingConfig(), x_0, 1001)


def test_every_kind_of_file_is_made(trained, tmp_path):
    sampling = SamplingConfig(num_steps=4, batch_size=4)
    for name in ("a.png", "a.gif", "a.mp4"):
        settings = PictureConfig(columns=3) if name == "a.png" else PictureConfig(frames=3, hold=0.1)
        show_reverse(tmp_path / name, [trained] * 2, sampling, settings=settings)
        assert (tmp_path / name).stat().st_size > 1000
        show_interpolation(tmp_path / f"i{name}", trained, sampling, 1, settings=settings)
        assert (tmp_path / f"i{name}").stat().st_size > 1000
    line = show_reconstruction(tmp_path / "r.png", trained, sampling, [10, 900])
    assert "from t = 10, " in line


def test_figures_are_drawn(tiny_run, trained):
    shapes = {
        "schedules": schedule_figure(forward_processes([50, 100], ["rescaled", "fixed", "cosine"])),
        "training": training_figure(read_runs([tiny_run])),
        "norms": norm_figure(state_norms(trained, SamplingConfig(num_steps=4, batch_size=8), 8)),
    }
    for name, figure in shapes.items():
        picture = rendered(figure)
        assert picture.shape[1] == 840, name
        assert (picture < 128).mean() > 0.002, name


def test_damaged_lines_of_a_log_are_not_drawn(tiny_run, tmp_path):
    """Found by scripts/fuzz.py."""
    lines = (tiny_run / "log.jsonl").read_text().splitlines()
    (tmp_path / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
    changes = [
        {"loss_by_t": None},
        {"loss_by_t": [1.0]},
        {"loss_by_t": ["x"] * 10},
        {"loss": "small"},
        {"images": None},
    ]
    damaged = [json.dumps(json.loads(lines[0]) | change) for change in changes]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, *damaged]) + "\n")
    (log,) = read_runs([tmp_path])
    assert log.lines == read_runs([tiny_run])[0].lines
    training_figure([log])


def test_noised_images_have_the_norm_of_theory(trained):
    norms = state_norms(trained, SamplingConfig(num_steps=4, batch_size=64), 64)
    measured = np.array([value for _, value in norms.noised])
    expected = np.array([norms.theory[t - 1] for t, _ in norms.noised])
    assert np.abs(measured / expected - 1).max() < 0.05
    assert [t for t, _ in norms.sampled] == [1000, 750, 500, 250, 0]
    half = with_perfect_denoiser(trained, torch.full((1, 1, 8, 8), 0.5))  # images of one grey
    shown = dict(state_norms(half, SamplingConfig(num_steps=4, batch_size=64), 64).sampled)
    assert shown[0] == pytest.approx(0.5)
    assert shown[500] == pytest.approx((1 - 0.75 * float(trained.schedule.alpha_bar[499])) ** 0.5, rel=0.02)


def test_a_picture_of_few_steps_has_a_column_for_each_state(trained, tmp_path):
    line = show_reverse(tmp_path / "a.png", [trained], SamplingConfig(num_steps=3, batch_size=4))
    assert "4 images in 4 states" in line


@pytest.mark.parametrize(("num_images", "rows"), [(2, {2}), (6, {4})])
def test_a_trajectory_of_few_images_computes_few_rows(trained, monkeypatch, num_images, rows):
    computed, forward = set(), trained.model.forward
    monkeypatch.setattr(trained.model, "forward", lambda x_t, t: computed.add(len(x_t)) or forward(x_t, t))
    record_trajectory(trained, SamplingConfig(num_steps=2, batch_size=4), num_images, 3)
    assert computed == rows


def test_pictures_of_a_folder_are_fitted_to_the_network(trained, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        Image.new("L", (20, 30), 40 * index).save(tmp_path / "pictures" / f"{index}.png")
    config, pictures = SamplingConfig(num_steps=3, batch_size=4), str(tmp_path / "pictures")
    line = show_reconstruction(tmp_path / "a.png", trained, config, [500], dataset=pictures)
    assert "from t = 500" in line


def test_an_imported_network_is_asked_what_it_was_trained_on(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["config"]["data"]["dataset"] = "unknown"
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    config, imported = SamplingConfig(num_steps=3), load(tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="give --dataset"):
        show_reconstruction(tmp_path / "a.png", imported, config, [500])
    with pytest.raises(InputError, match="ddpm import --dataset"):
        state_norms(imported, config, 4)

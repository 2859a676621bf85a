"""The forward process as shown: it begins with the image, ends in noise, and walks by the steps of the paper."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab.core.errors import InputError
from ddpm_lab.data.datasets import load_images, to_float, to_uint8
from ddpm_lab.diffusion.schedule import build_schedule, linear_schedule
from ddpm_lab.pictures.drawing import MARGIN, enlarged
from ddpm_lab.pictures.forward import (
    forward_frames,
    forward_picture,
    forward_processes,
    forward_states,
    noised_images,
    process_label,
    random_images,
    show_forward,
    shown_timesteps,
    snr_at,
)
from ddpm_lab.pictures.picture_settings import PictureConfig
from ddpm_lab.sampling.image_files import visible_scale


@pytest.fixture
def x_0():
    return to_float(load_images("digits").images[:64]).double()


@pytest.mark.parametrize("closed_form", [False, True])
def test_the_first_state_is_the_image_and_the_last_is_noise(x_0, closed_form):
    states = forward_states(linear_schedule(1000), x_0, [0, 500, 1000], closed_form=closed_form)
    assert torch.equal(states[0], x_0)
    last, n = states[-1], x_0.numel()
    assert abs(float(last.mean())) < 4 / n**0.5
    assert abs(float(last.var()) - 1) < 4 * (2 / n) ** 0.5
    correlation = torch.corrcoef(torch.stack([last.flatten(), x_0.flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / n**0.5


def test_the_walk_takes_the_steps_of_the_paper(x_0):
    schedule = linear_schedule(50)
    states = forward_states(schedule, x_0, range(51))
    noises = [
        (states[t] - schedule.alpha[t - 1].sqrt() * states[t - 1]) / schedule.beta[t - 1].sqrt() for t in range(1, 51)
    ]
    z, n = torch.stack(noises).flatten(1), x_0.numel()
    assert float(z.mean(1).abs().max()) < 5 / n**0.5
    assert float((z.var(1) - 1).abs().max()) < 5 * (2 / n) ** 0.5
    between = torch.corrcoef(z) - torch.eye(50)  # new noise at each step
    assert float(between.abs().max()) < 5 / n**0.5


def test_the_walk_is_the_same_however_many_states_are_shown(x_0):
    schedule = linear_schedule(100)
    every = forward_states(schedule, x_0, range(101), seed=3)
    some = forward_states(schedule, x_0, [0, 10, 70], seed=3)
    assert torch.equal(some, every[[0, 10, 70]])
    assert not torch.equal(some[1], forward_states(schedule, x_0, [0, 10, 70], seed=4)[1])


def test_jumps_share_one_noise(x_0):
    schedule = linear_schedule(100)
    shown = forward_states(schedule, x_0, [1, 40, 100], closed_form=True)
    eps = [
        (x_t - schedule.alpha_bar[t - 1].sqrt() * x_0) / (1 - schedule.alpha_bar[t - 1]).sqrt()
        for x_t, t in zip(shown, [1, 40, 100], strict=True)
    ]
    torch.testing.assert_close(eps[0], eps[1])
    torch.testing.assert_close(eps[1], eps[2])


def test_columns_run_from_the_image_to_the_end():
    schedule = linear_schedule(1000)
    assert shown_timesteps(schedule, 11) == list(range(0, 1001, 100))
    assert shown_timesteps(schedule, 1001) == list(range(1001))
    even = shown_timesteps(schedule, 9, "logsnr")
    assert (even[0], even[1], even[-1]) == (0, 1, 1000)
    gaps = np.diff([np.log(snr_at(schedule, t)) for t in even[1:]])
    assert np.ptp(gaps[1:]) < 0.2 * abs(gaps.mean())  # at the image one step is a whole gap
    for count in (1, 1002):
        with pytest.raises(InputError, match="columns must be from 2 to 1001"):
            shown_timesteps(schedule, count)


def test_both_conventions_and_three_lengths_are_shown():
    processes = forward_processes([500, 1000, 2000], ["rescaled", "fixed", "cosine"])
    assert [process_label(process) for process in processes][::4] == [
        "T = 500, linear, rescaled", "T = 1000, linear, fixed range", "T = 2000, cosine",
    ]  # fmt: skip
    ends = {process_label(process): snr_at(build_schedule(process), process.num_timesteps) for process in processes}
    assert ends["T = 500, linear, fixed range"] == pytest.approx(0.0797**2, rel=0.02)  # x_T is not noise
    with pytest.raises(InputError, match="more than 20"):
        forward_processes([20], ["rescaled"])


def test_a_picture_shows_the_states(x_0):
    images = x_0[:2]
    (process,) = forward_processes([100], ["rescaled"])
    picture = forward_picture([noised_images(process, images, 3)])
    scale = visible_scale(8)
    first = enlarged(to_uint8(images[0]), scale)
    corners = np.lib.stride_tricks.sliding_window_view(picture[:, :, 0], first.shape[:2])
    matches = (corners[:, : MARGIN * 8] == first[:, :, 0]).all((2, 3))
    assert matches.sum() == 1  # the clean image, exactly once, at the left


def test_films_have_the_frames_asked_for_and_begin_with_the_image(x_0):
    processes = forward_processes([50, 100], ["rescaled"])
    frames = list(forward_frames([noised_images(process, x_0[:2], 6) for process in processes]))
    assert len(frames) == 6
    assert len({frame.shape for frame in frames}) == 1
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(frames))  # the mark moves at least


def test_random_images_are_those_of_a_seed():
    a, b = random_images("digits", "test", 5, 0), random_images("digits", "test", 8, 0)
    assert torch.equal(a, b[:5])
    assert not torch.equal(a, random_images("digits", "test", 5, 1))
    with pytest.raises(InputError, match="from 1 to 64"):
        random_images("digits", "test", 65, 0)


def test_every_kind_of_file_is_made(tmp_path):
    processes = forward_processes([50], ["cosine"])
    for name in ("a.png", "a.gif", "a.mp4"):
        settings = PictureConfig(columns=4) if name == "a.png" else PictureConfig(frames=4, hold=0.1)
        line = show_forward(tmp_path / name, processes, "digits", num_images=2, settings=settings)
        assert line.startswith(f"{tmp_path / name}: 2 images of digits:test at 4 timesteps, T = 50, cosine")
        assert (tmp_path / name).stat().st_size > 1000


def test_a_folder_of_few_pictures_and_a_short_chain_are_shown_by_the_defaults(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / "pictures" / f"{index}.png")
    line = show_forward(tmp_path / "a.png", forward_processes([8], ["cosine"]), str(tmp_path / "pictures"))
    assert line.endswith(f"4 images of {tmp_path / 'pictures'}:train at 9 timesteps, T = 8, cosine, seed 0")
    with pytest.raises(InputError, match=r"num_images of 5 exceeds the 4 images of .*:train; give fewer"):
        show_forward(tmp_path / "b.png", forward_processes([8], ["cosine"]), str(tmp_path / "pictures"), num_images=5)

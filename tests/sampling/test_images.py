"""Images as a notebook takes them: as a grid, as arrays, in parts; and the call that samples them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_lab
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.errors import InputError
from ddpm_lab.sampling.image_files import image_grid
from ddpm_lab.sampling.images import Images


def shown(images):
    return np.asarray(Image.open(io.BytesIO(images._repr_png_())))


def test_images_show_themselves_as_the_grid():
    tensor = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert np.array_equal(shown(Images(tensor)), image_grid(tensor, scale=7))
    assert np.array_equal(shown(Images(tensor, columns=5, scale=1)), image_grid(tensor, 5))
    assert np.array_equal(shown(Images(tensor[:, :1])), image_grid(tensor[:, :1], scale=7))
    many = Images(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), scale=1)
    assert shown(many).shape == (16 * 4 - 2, 16 * 4 - 2)
    assert Images(tensor[:0])._repr_png_() is None
    assert repr(Images(tensor)) == "5 images of 3 x 8 x 8"


def test_images_are_arrays_and_come_in_parts():
    tensor = torch.randint(0, 256, (5, 1, 4, 6), dtype=torch.uint8)
    images = Images(tensor, columns=2)
    assert np.array_equal(np.asarray(images), tensor.numpy())
    assert np.asarray(images, np.float32).dtype == np.float32
    assert np.shares_memory(np.asarray(images), tensor.numpy())
    assert not np.shares_memory(np.array(images), tensor.numpy())
    chosen = [images[1:3], images[-1], images[tensor.sum((1, 2, 3)) > 0], images[[4, 0]]]
    expected = [tensor[1:3], tensor[-1:], tensor, tensor[[4, 0]]]
    for part, rows in zip(chosen, expected, strict=True):
        assert isinstance(part, Images)
        assert part.columns == 2
        assert torch.equal(part.tensor, rows)
    assert [len(image) for image in images] == [1] * 5
    with pytest.raises(IndexError):
        _ = images[5]


@pytest.mark.parametrize("tensor", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 2, 4, 4).byte(), torch.zeros(4, 4).byte()])
def test_other_tensors_are_no_images(tensor):
    with pytest.raises(InputError, match="images must be"):
        Images(tensor)


def test_one_call_samples_what_the_command_samples(tiny_run, tmp_path):
    flags = ["--num-images", "5", "--num-steps", "3", "--seed", "2", "--device", "cpu"]
    assert run_command(["sample", str(tiny_run), *flags, "--out", str(tmp_path / "a.npz")]) == 0
    images = ddpm_lab.sample(tiny_run, 5, device="cpu", num_steps=3, seed=2)
    expected = np.load(tmp_path / "a.npz")["images"].transpose(0, 3, 1, 2)
    assert np.array_equal(images, expected)
    trained = ddpm_lab.load(tiny_run, device="cpu")
    assert np.array_equal(ddpm_lab.sample(trained, 5, num_steps=3, seed=2), expected)


def test_a_class_is_given_alone_or_in_a_list():
    settings = {"num_steps": 1, "batch_size": 2, "device": "cpu"}
    seven, also = (ddpm_lab.sample("mnist", 2, class_=chosen, **settings) for chosen in (7, ["7", 7]))
    assert np.array_equal(seven, also)
    assert not np.array_equal(seven, ddpm_lab.sample("mnist", 2, class_="1", **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 3}, "no setting 'steps'; it has sampler, num_steps"),
        ({"num_steps": 1001}, "from 1 to the 1000"),
        ({"class_": "cat"}, "was trained without classes"),
        ({"num_images": 0}, "num_images must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_run, settings, words):
    with pytest.raises(InputError, match=words):
        ddpm_lab.sample(tiny_run, device="cpu", **settings)

"""Pictures and films: pixels stay whole, files hold the frames that were given, for as long as asked."""

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.pictures.drawing import GAP, LINE, MARGIN, enlarged, image_table, short_number, side_by_side, stacked
from ddpm_lab.pictures.film import check_output, save_film
from ddpm_lab.pictures.picture_settings import PictureConfig


def frames(count: int = 7, height: int = 33, width: int = 47, noisy: bool = False) -> list[np.ndarray]:
    """Grey frames of which every one differs, on white with a coloured mark."""
    pictures = []
    for i in range(count):
        picture = np.full((height, width, 3), 255, np.uint8)
        picture[8:24, 8:24] = 30 * i
        if noisy:  # white is one grey of many
            picture[8:24, 8:24] = np.random.default_rng(i).integers(0, 256, (16, 16, 1))
        picture[:4, 2 * i : 2 * i + 4] = (0, 114, 178)
        pictures.append(picture)
    return pictures


def ffmpeg(*arguments: str) -> subprocess.CompletedProcess:
    from imageio_ffmpeg import get_ffmpeg_exe

    return subprocess.run([get_ffmpeg_exe(), *arguments], capture_output=True)


def decoded(path: Path, height: int, width: int) -> np.ndarray:
    """The frames of an MP4, as a player would decode them."""
    raw = ffmpeg("-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def test_a_gif_has_the_frames_given_and_holds_the_last(tmp_path):
    save_film(tmp_path / "a.gif", frames(noisy=True), PictureConfig(fps=20, hold=1.5))
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (7, (47, 33), 0)
        durations = []
        for index, frame in enumerate(frames(noisy=True)):
            film.seek(index)
            durations.append(film.info["duration"])
            shown = np.asarray(film.convert("RGB")).astype(int)
            assert np.abs(shown - frame).max() <= 8
            assert (shown[28:] == 255).all()  # white stays white, on a white page
    assert durations == [50] * 6 + [1550]


def test_an_mp4_decodes_to_the_frames_given_and_repeats_the_last(tmp_path):
    save_film(tmp_path / "a.mp4", iter(frames()), PictureConfig(fps=10, hold=0.5))
    shown = decoded(tmp_path / "a.mp4", 34, 48)  # even, as the format asks
    assert len(shown) == 7 + 5
    for frame, given in zip(shown, frames() + [frames()[-1]] * 5, strict=True):
        assert np.abs(frame[10:22, 10:22].astype(int) - given[10:22, 10:22]).max() <= 6


def test_an_mp4_is_one_that_browsers_play(tmp_path):
    save_film(tmp_path / "a.mp4", frames(), PictureConfig())
    facts = ffmpeg("-i", str(tmp_path / "a.mp4")).stderr.decode()
    assert "Video: h264" in facts
    assert "yuv420p" in facts
    assert ", 48x34" in facts
    assert ", 20 fps" in facts
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # it plays before it is fetched whole


def test_films_that_fail_leave_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def torn():
        yield frames()[0]
        raise KeyboardInterrupt

    for ending, error in ((".mp4", KeyboardInterrupt), (".gif", KeyboardInterrupt)):
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"old")
        with pytest.raises(error):
            save_film(path, torn(), PictureConfig())
        assert path.read_bytes() == b"old"
    with pytest.raises(InputError, match="at least one frame"):
        save_film(path, [], PictureConfig())
    with pytest.raises(ValueError, match="the shape of the first"):
        save_film(path, [*frames(), frames(height=35)[0]], PictureConfig())
    with pytest.raises(InputError, match="must end in"):
        save_film(tmp_path / "a.avi", frames(), PictureConfig())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


@pytest.mark.parametrize("count", [7, 4000])  # it dies at the end, and while it is being fed
def test_an_encoder_that_fails_is_told_as_a_failed_run(tmp_path, monkeypatch, count):
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\nhead -c 5000 > /dev/null\necho 'No space left on device' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(RunError, match="No space left on device"):
        save_film(tmp_path / "a.mp4", itertools.islice(itertools.cycle(frames()), count), PictureConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_a_film_without_an_encoder_is_refused_before_the_work(tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", absent)
    with pytest.raises(InputError, match="mp4 needs ffmpeg"):
        check_output(tmp_path / "a.mp4", PictureConfig())
    check_output(tmp_path / "a.gif", PictureConfig())
    check_output(tmp_path / "a.png", PictureConfig(columns=5))


@pytest.mark.parametrize(
    "settings", [{"fps": 0}, {"fps": 51}, {"hold": -1.0}, {"hold": 61.0}, {"frames": 0}, {"frames": 1}]
)
def test_impossible_films_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        PictureConfig(**settings)


@pytest.mark.parametrize(("name", "setting", "default"), [("a.gif", "frames", 101), ("a.png", "columns", 11)])
def test_a_file_shows_at_most_the_available_states(name, setting, default):
    out = Path(name)
    assert PictureConfig().num_states(out, 1001) == default
    assert PictureConfig().num_states(out, 10) == 10
    assert PictureConfig(**{setting: 21}).num_states(out, 21) == 21
    with pytest.raises(InputError, match=f"{setting} must be from 2 to 21"):
        PictureConfig(**{setting: 22}).num_states(out, 21)


def test_enlarging_repeats_pixels():
    image = torch.randint(256, (3, 5, 4), dtype=torch.uint8)
    picture = enlarged(image, 3)
    assert picture.shape == (15, 12, 3)
    for dy in range(3):
        for dx in range(3):
            assert np.array_equal(picture[dy::3, dx::3], image.permute(1, 2, 0).numpy())
    grey = enlarged(image[:1], 1)
    assert np.array_equal(grey, np.repeat(image[0].numpy()[:, :, None], 3, axis=2))


def test_a_table_holds_every_image_at_its_place():
    images = torch.randint(256, (2, 3, 1, 4, 4), dtype=torch.uint8)
    plain = image_table(images, scale=2)
    titled = image_table(images, scale=2, title="a", captions=[("t", ["1", "2", "3"])])
    assert plain.shape == (2 * (8 + GAP), MARGIN + 3 * (8 + GAP) - GAP, 3)
    assert titled.shape[0] == plain.shape[0] + LINE + 4 + LINE
    for row in range(2):
        for column in range(3):
            y, x = row * (8 + GAP), MARGIN + column * (8 + GAP)
            assert np.array_equal(plain[y : y + 8, x : x + 8], enlarged(images[row, column], 2))
    assert (titled[-LINE:] < 128).any()  # the captions


def test_pictures_are_joined_without_loss():
    a, b = np.zeros((4, 6, 3), np.uint8), np.full((2, 3, 3), 7, np.uint8)
    side, stack = side_by_side([a, b], gap=1), stacked([a, b], gap=2)
    assert side.shape == (4, 10, 3)
    assert stack.shape == (8, 6, 3)
    assert np.array_equal(side[:2, 7:], b)
    assert np.array_equal(stack[6:, :3], b)
    assert (side[2:, 7:] == 255).all()


def test_numbers_are_short():
    values = [float("inf"), 12345.0, 310.2, 8.74, 0.0157, 3.97e-5]
    assert [short_number(v) for v in values] == ["∞", "12345", "310", "8.7", "0.016", "4e-05"]

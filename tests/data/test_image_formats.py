"""Pictures of strangers: named formats only, seen as a person sees them, nothing left out in silence."""

import contextlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.image_folder import open_folder
from ddpm_lab.data.image_formats import NAMED_FORMATS, as_seen, formats, open_picture
from ddpm_lab.data.image_stream import open_images
from ddpm_lab.evaluation.reference import open_reference

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
TRANSPARENT = ("RGBA", "LA", "P", "GIF", "WEBP", "tRNS")


def transparent(kind: str) -> bytes:
    """A 16 x 16 picture, black and opaque at the left, transparent (and black beneath) at the right."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :8, 3] = 255
    picture, content = Image.fromarray(ink), io.BytesIO()
    if kind == "LA":
        picture.convert("LA").save(content, "PNG")
    elif kind == "P":
        picture.quantize(4).save(content, "PNG")
    elif kind == "GIF":
        picture.save(content, "GIF")
    elif kind == "WEBP":
        picture.save(content, "WEBP", lossless=True)
    elif kind == "tRNS":
        grey = Image.fromarray(np.where(ink[..., 3] > 0, 0, 7).astype(np.uint8))
        grey.save(content, "PNG", transparency=7)
    else:
        picture.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(tmp_path, kind):
    """Everywhere: in folders that are trained on or scored, as in the studio."""
    from ddpm_lab.studio.forward import uploaded

    (tmp_path / f"a.{'png' if kind not in ('GIF', 'WEBP') else kind.lower()}").write_bytes(transparent(kind))
    seen = open_folder(tmp_path, None, "--size").read([0])
    assert seen.shape == (1, 1, 16, 16), "black and white is grey"
    assert (seen[0, 0, :, :7].max(), seen[0, 0, :, 9:].min()) == (0, 255)
    shown = np.asarray(uploaded(transparent(kind)))
    assert (shown[30, 10], shown[30, 60]) == (0, 255)


def test_only_named_formats_are_tried(tmp_path, monkeypatch, capsys):
    """Postscript under the name of a picture reaches no other plugin of Pillow, whatever command meets it."""
    from ddpm_lab.studio.forward import uploaded

    formats()
    tried = []
    for name, (factory, accept) in list(Image.OPEN.items()):
        if name not in NAMED_FORMATS:

            def spy(*arguments, name=name, factory=factory):
                tried.append(name)
                return factory(*arguments)

            monkeypatch.setitem(Image.OPEN, name, (spy, accept))
    with contextlib.suppress(OSError), Image.open(io.BytesIO(EPS)):
        pass
    assert tried, "so it is seen where nobody restrains Pillow"
    tried.clear()
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "pictures" / name).write_bytes(EPS)
    for command in (
        ["evaluate", str(tmp_path / "pictures"), "--reference", "digits:train", "--features", "classifier"],
        ["train", "digits", "--run", str(tmp_path / "run"), "--data.dataset", str(tmp_path / "pictures")],
        ["forward", "--dataset", str(tmp_path / "pictures"), "--out", str(tmp_path / "f.png")],
    ):
        assert run_command(command) == 2
        err = capsys.readouterr().err
        assert "2 of 2 files cannot be used" in err
        assert "a.png cannot be read: it is not a file of PNG, JPEG" in err
    with pytest.raises(InputError, match="it is not a file of PNG"):
        uploaded(EPS)
    assert tried == []


def test_formats_are_known_by_content_and_other_files_are_named(tmp_path, recwarn):
    """Whatever the ending; links are followed, not in circles; what is passed over is counted and named."""
    pixels = Image.fromarray(np.full((8, 8), 90, np.uint8))
    pixels.save(tmp_path / "a", "PNG")
    pixels.save(tmp_path / "b.dat", "TIFF")
    pixels.save(tmp_path / "c.pgm")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    pixels.save(tmp_path / "elsewhere" / "deep" / "d.png")
    (tmp_path / "set").mkdir()
    for name in ("a", "b.dat", "c.pgm"):
        (tmp_path / name).rename(tmp_path / "set" / name)
    (tmp_path / "set" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    for index in range(22):
        (tmp_path / "set" / f"notes{index:02d}.txt").write_text("no picture")
    found = open_folder(tmp_path / "set", None, "--size")
    assert [path.name for path in found.paths] == ["a", "b.dat", "c.pgm", "d.png"]
    (output,) = [str(one.message) for one in recwarn if "skipped in" in str(one.message)]
    assert "notes00.txt, notes01.txt" in output
    assert output.endswith("and 2 more")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "palette", "RGB"])
def test_grey_is_grey_whatever_the_format_holds_it_as(tmp_path, kind):
    """And one coloured picture, however late, makes the folder colour."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for index in range(3):
        if kind == "GIF":
            grey.convert("RGB").quantize(64).save(tmp_path / f"{index}.gif")
        elif kind == "WEBP":
            grey.save(tmp_path / f"{index}.webp", lossless=True)
        else:
            coloured = grey.convert("RGB")
            (coloured.quantize(64) if kind == "palette" else coloured).save(tmp_path / f"{index}.png")
    assert open_folder(tmp_path, None, "--size").mode == "L"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "z.png")
    assert open_folder(tmp_path, None, "--size").mode == "RGB"


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    Image.fromarray(np.array([[0, 30_000], [65_535, 257]], np.uint16)).save(tmp_path / "a.png")
    assert open_folder(tmp_path, None, "--size").read([0]).ravel().tolist() == [0, 117, 255, 1]
    with open_picture(tmp_path / "a.png", "a") as opened:
        assert as_seen(opened).mode == "L"


def save_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_npz_of_equal_planes_is_grey_as_a_folder_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    path = str(save_npz(tmp_path / "a.npz", images=pixels.repeat(3, axis=3)))
    expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    assert torch.equal(torch.cat(list(open_images(path).batches())), expected)
    assert torch.equal(torch.cat(list(open_images(path, channels=3).batches())), expected.expand(-1, 3, -1, -1))
    pixels = pixels.repeat(3, axis=3)
    pixels[4, 7, 7, 2] += 1
    path = str(save_npz(tmp_path / "b.npz", images=pixels))
    assert open_images(path).shape == (3, 8, 8)
    with pytest.raises(InputError, match="in colour, and grey images are required"):
        open_images(path, channels=1)
    path = str(save_npz(tmp_path / "c.npz", images=pixels[..., :1]))
    assert open_images(path, channels=3).shape == (3, 8, 8)


def test_arrays_in_fortran_order_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    path = str(save_npz(tmp_path / "a.npz", arr_0=np.asfortranarray(pixels)))
    found = torch.cat(list(open_images(path).take(600).batches()))
    assert torch.equal(found, torch.from_numpy(pixels[:600].transpose(0, 3, 1, 2).copy()))


def test_a_reference_batch_with_images_and_statistics_is_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    path = save_npz(tmp_path / "a.npz", arr_0=pixels, **statistics)
    reference = open_reference(str(path))
    assert (reference.images.num_images, reference.given) == (9, None)


def bomb(path: Path, fortran_order: bool = False, **arrays: tuple[tuple[int, ...], str]) -> Path:
    """An .npz of zeros whose headers are consistent, written without ever holding the arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, kind) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": kind, "fortran_order": fortran_order, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                left = int(np.prod(shape)) * np.dtype(kind).itemsize
                while left:
                    left -= stream.write(bytes(min(left, 2**24)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrays", "command", "words"),
    [
        ({"images": ((2, 16_000, 16_000, 1), "|u1")}, "images", "are the most"),
        ({"mu": ((12_000,), "<f8"), "sigma": ((12_000, 12_000), "<f8")}, "reference", "12000 features; at most 4096"),
        ({"mu": ((2**17,), "<f8"), "sigma": ((2,), "<f8")}, "reference", "must be (d,) and (d, d)"),
        ({"mu": ((3,), "|O"), "sigma": ((3, 3), "<f8")}, "reference", "cannot be|damaged|floating"),
    ],
    ids=["large images", "large sigma", "shapes that differ", "objects"],
)
def test_small_files_do_not_fill_the_memory(tmp_path, arrays, command, words):
    """Told from the header: the peak of a process that reads them is what it is for a sound file, to 200 MB."""
    path = bomb(tmp_path / "a.npz", **arrays)
    assert path.stat().st_size < 2_000_000
    output, memory = peak_memory(READERS[command], path)
    assert any(word in output for word in words.split("|")), output
    assert memory < 200


READERS = {
    "images": "from ddpm_lab.data.image_stream import open_images as read",
    "reference": "from ddpm_lab.evaluation.reference import open_reference as read",
    "batches": "from ddpm_lab.data.image_stream import open_images\n"
    "read = lambda name: [len(batch) for batch in open_images(name).batches()]",
    "inception": "from pathlib import Path\nfrom ddpm_lab.evaluation.features import inception_network\n"
    "read = lambda name: inception_network(Path(name))",
}


def peak_memory(reader: str, path: Path) -> tuple[str, int]:
    """What a process of its own prints that reads a file, and by how many MB that raises its peak memory.

    The peak is that of /proc: a process inherits `ru_maxrss` from the tests, whose memory would hide its own.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    program = (
        f"import re, sys\n{reader}\n"
        "def peak():\n    return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "try:\n    print(read(sys.argv[1]))\n"
        "except ValueError as error:\n    print(error)\n"
        "print((peak() - before) // 1024)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    *output, memory = done.stdout.splitlines()
    return " ".join(output), int(memory)


@pytest.mark.slow
def test_an_array_in_fortran_order_is_read_in_parts(tmp_path):
    """500 MB of pixels in half a MB of file."""
    path = bomb(tmp_path / "a.npz", fortran_order=True, images=((2_000, 512, 512, 1), "|u1"))
    output, memory = peak_memory(READERS["batches"], path)
    assert output == str([500] * 4)
    assert memory < 700


@pytest.mark.slow
def test_large_pictures_are_decoded_one_at_a_time(tmp_path):
    """Four transparent pictures of 36 million pixels, each of which takes some 700 MB to decode."""
    for name in "abcd":
        Image.new("RGBA", (6_000, 6_000)).save(tmp_path / f"{name}.png")
    reader = "import os\nos.cpu_count = lambda: 4\nfrom ddpm_lab.data.image_stream import open_images\n"
    output, memory = peak_memory(f"{reader}read = lambda name: open_images(name, image_size=32)", tmp_path)
    assert "num_images=4" in output
    assert memory < 1100


def test_weights_that_unpack_to_far_more_than_their_file_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data/0", "w") as stream:
        for _ in range(64):
            stream.write(bytes(2**24))
    output, memory = peak_memory(READERS["inception"], path)
    assert "no PyTorch file" in output
    assert memory < 300


def test_a_picture_too_large_to_decode_is_refused_by_its_header(tmp_path):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png has 9000 x 9000 pixels; 67,108,864 are the most"):
        open_folder(tmp_path, None, "--size")

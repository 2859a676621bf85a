"""Images from files: digits, official files in every compression, folders, and what is refused."""

import gzip
import hashlib
import http.server
import io
import lzma
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_lab.core import download, progress
from ddpm_lab.core.errors import InputError
from ddpm_lab.data import datasets as data
from ddpm_lab.data.datasets import load_images, to_float, to_uint8, training_batch
from ddpm_lab.data.image_folder import open_folder


def test_uint8_round_trips_through_float():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every)[[0, -1]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_digits_are_split_for_ever():
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.labels.shape == (1437,)
    assert train.images.dtype == torch.uint8
    assert int(train.images.max()) == 255
    assert train.sha256.startswith("975aa9bd2d7f2491")
    assert test.sha256.startswith("dd2fbba1fda39fbe")


def test_real_mnist(real_data_dir):
    train, test = load_images("mnist", "train", real_data_dir), load_images("mnist", "test", real_data_dir)
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert float(train.images.double().mean()) == pytest.approx(33.3184, abs=1e-4)
    assert float(test.images.double().std(correction=0)) == pytest.approx(79.1725, abs=1e-4)


def test_real_cifar10(real_data_dir):
    train = load_images("cifar10", "train", real_data_dir)
    assert train.images.shape == (50_000, 3, 32, 32)
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    means = train.images.transpose(0, 1).reshape(3, -1).double().mean(1) / 255
    assert means.tolist() == pytest.approx([0.491400, 0.482158, 0.446531], abs=1e-6)
    sky = train.images[train.labels == 0].double().mean((0, 2, 3))  # airplanes are blue: the planes are R, G, B
    assert float(sky[2]) > float(sky[1]) > float(sky[0])


@pytest.fixture
def small_mnist(monkeypatch) -> dict[str, bytes]:
    """Official files of three images, known to the module by their hashes; gives their contents."""
    pixels = np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).tobytes()
    contents = {"images": bytes([0, 0, 8, 3]) + bytes(12) + pixels, "labels": bytes(8) + bytes([7, 1, 2])}
    files = tuple(data.File(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items())
    for split in ("train", "test"):
        monkeypatch.setitem(data.OFFICIAL_FILES, ("mnist", split), files)
    return contents


def write_all(folder: Path, contents, ending, compress):
    (folder / "mnist").mkdir()
    for name, content in contents.items():
        (folder / "mnist" / (name + ending)).write_bytes(compress(content))


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)], ids=["plain", "gz", "xz"]
)
def test_every_compression_is_read(tmp_path, small_mnist, ending, compress):
    write_all(tmp_path, small_mnist, ending, compress)
    loaded = load_images("mnist", "train", tmp_path)
    assert loaded.images.flatten()[:4].tolist() == [0, 1, 2, 3]
    assert loaded.labels.tolist() == [7, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-9], lambda c: c[:40] + b"x" + c[41:], lambda c: b"", lambda c: b"<html>not found</html>"],
    ids=["truncated", "changed", "empty", "foreign"],
)
@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_damaged_files_are_named(tmp_path, small_mnist, damage, ending):
    write_all(tmp_path, small_mnist, ending, {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending])
    path = tmp_path / "mnist" / ("images" + ending)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"images{ending}.*delete it and fetch it again"):
        load_images("mnist", "train", tmp_path)


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; breaks off after `allowed` bytes; understands Range; records the requests."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    allowed = 10**9
    requests: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self):
        wanted = self.headers.get("Range")
        type(self).requests.append((self.path, wanted))
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.allowed])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    _Server.files, _Server.allowed, _Server.requests = {}, 10**9, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()
    running.server_close()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_fetching_verifies_and_is_done_once(tmp_path, small_mnist, server, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", (server + "gone/", server))
    _Server.files = {f"/{name}.gz": gzip.compress(content) for name, content in small_mnist.items()}
    assert len(load_images("mnist", "train", tmp_path)) == 3
    requests = len(_Server.requests)
    assert len(load_images("mnist", "test", tmp_path)) == 3
    assert len(_Server.requests) == requests
    assert visible(tmp_path / "mnist") == ["images.gz", "labels.gz"]


def test_fetching_what_is_not_the_file_leaves_nothing(tmp_path, small_mnist, server, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", (server,))
    _Server.files = {f"/{name}.gz": gzip.compress(b"something else") for name in small_mnist}
    with pytest.raises(InputError, match="does not hold the official images"):
        load_images("mnist", "train", tmp_path)
    assert visible(tmp_path / "mnist") == []


def test_a_mirror_with_other_content_is_skipped(tmp_path, small_mnist, server, monkeypatch):
    """A page that asks one to log in answers every address with success."""
    monkeypatch.setattr(data, "MNIST_MIRRORS", (server + "portal/", server))
    good = {f"/{name}.gz": gzip.compress(content) for name, content in small_mnist.items()}
    _Server.files = good | {f"/portal{path}": b"<html>please log in</html>" for path in good}
    assert len(load_images("mnist", "train", tmp_path)) == 3


def test_an_interrupted_download_is_continued(tmp_path, server):
    content = bytes(range(256)) * 1200
    _Server.files, _Server.allowed = {"/file": content}, 200_000
    path = tmp_path / "file"
    with pytest.raises(InputError, match=r"broke off|cannot be reached"):
        download.download([server + "file"], path, lambda p: None, "wait")
    kept = path.with_name("file.part").stat().st_size
    assert 0 < kept <= 200_000
    assert not path.exists()
    _Server.allowed = 10**9
    download.download([server + "file"], path, lambda p: None, "wait")
    assert path.read_bytes() == content
    assert _Server.requests[-1] == ("/file", f"bytes={kept}-")


def test_a_download_killed_before_it_got_its_name_is_whole(tmp_path, server):
    _Server.files = {"/file": b"all of it"}
    (tmp_path / "file.part").write_bytes(b"all of it")
    download.download([server + "file"], tmp_path / "file", lambda p: None, "wait")
    assert (tmp_path / "file").read_bytes() == b"all of it"
    (tmp_path / "file").rename(tmp_path / "other.unverified")  # or while it was verified
    download.download([server + "file"], tmp_path / "other", lambda p: None, "wait")
    assert [wanted for _, wanted in _Server.requests] == ["bytes=9-", "bytes=9-"]
    (tmp_path / "more.part").write_bytes(b"all of it, and more")
    with pytest.raises(InputError, match="does not belong to this file"):
        download.download([server + "file"], tmp_path / "more", lambda p: None, "wait")
    assert not (tmp_path / "more.part").exists()


@pytest.mark.parametrize("flaw", [-6, -3])  # in the checksum, in the length
def test_a_damaged_archive_is_refused(tmp_path, flaw):
    """Else it would be taken up again at every try."""
    content = np.random.default_rng(0).bytes(5000)
    file = data.File("test_batch.bin", len(content), hashlib.sha256(content).hexdigest())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    flawed = bytearray(archive.getvalue())
    flawed[flaw] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(flawed)
    absent = data.File("absent", 1, "")  # which is looked for to the end of the archive
    with pytest.raises(InputError, match="is not the official archive"):
        data._unpack(tmp_path / "a.tar.gz", [file, absent], tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(archive.getvalue())
    data._unpack(tmp_path / "a.tar.gz", [file], tmp_path)
    assert (tmp_path / "test_batch.bin").read_bytes() == content


@pytest.fixture
def small_cifar10(monkeypatch) -> dict[str, bytes]:
    """Official files of two pictures each, known to the module by their hashes; gives their contents."""
    contents = {
        f.name: bytes([i]) + bytes(3072) + bytes([i]) + bytes(range(256)) * 12
        for i, f in enumerate(data.OFFICIAL_FILES["cifar10", "train"] + data.OFFICIAL_FILES["cifar10", "test"])
    }
    for split in ("train", "test"):
        files = tuple(
            data.File(f.name, len(contents[f.name]), hashlib.sha256(contents[f.name]).hexdigest())
            for f in data.OFFICIAL_FILES["cifar10", split]
        )
        monkeypatch.setitem(data.OFFICIAL_FILES, ("cifar10", split), files)
    return contents


def cifar10_archive(path: Path, contents: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("place", ["cifar10/cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz"])
def test_the_archive_put_there_by_hand_is_unpacked_and_kept(tmp_path, small_cifar10, place):
    cifar10_archive(tmp_path / place, small_cifar10)
    assert load_images("cifar10", "train", tmp_path).images.shape == (10, 3, 32, 32)
    assert load_images("cifar10", "test", tmp_path).labels.tolist() == [5, 5]
    assert (tmp_path / place).is_file()


@pytest.mark.parametrize("place", ["cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."])
def test_files_are_found_where_the_archive_lays_them(tmp_path, small_cifar10, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, content in small_cifar10.items():
        (tmp_path / place / name).write_bytes(content)
    assert load_images("cifar10", "train", tmp_path).images.shape == (10, 3, 32, 32)
    assert "cifar10" in data.available_datasets(tmp_path)


def test_files_are_found_where_torchvision_lays_them(tmp_path, small_mnist):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, content in small_mnist.items():
        (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
        (tmp_path / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(content))
    assert len(load_images("mnist", "train", tmp_path)) == 3


def test_pickles_are_refused_with_the_reason(tmp_path, small_cifar10, server, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(data, "CIFAR10_ARCHIVE", f"{server}cifar-10-binary.tar.gz")
    with pytest.raises(InputError, match=r"cifar-10-batches-py holds pickles, which are not read, .*binary version"):
        load_images("cifar10", "train", tmp_path)


def test_another_data_set_with_the_same_names_is_not_to_be_deleted(tmp_path, small_mnist, monkeypatch):
    monkeypatch.setattr(data, "MNIST_NAMES", frozenset(small_mnist))
    small_mnist["images"] = small_mnist["images"][:-1] + b"x"
    write_all(tmp_path, small_mnist, "", bytes)
    with pytest.raises(
        InputError, match=r"images is not the file of MNIST: .* \(Fashion-MNIST, KMNIST\); name another"
    ) as raised:
        load_images("mnist", "train", tmp_path)
    assert "delete" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"REQUESTS_CA_BUNDLE": "/nonexistent"}, "this machine's settings: .*TLS CA certificate bundle"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "the proxy of HTTPS_PROXY refuses or cannot be reached"),
    ],
)
def test_wrong_network_settings_are_named(tmp_path, monkeypatch, settings, words):
    """And not as a folder that cannot be written, or with the advice to go online."""
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("https://mirror.invalid/",))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words) as raised:
        load_images("mnist", "train", tmp_path)
    assert "go online" not in str(raised.value)
    assert "cannot be written" not in str(raised.value)


def test_an_untrusted_certificate_is_named():
    assert "REQUESTS_CA_BUNDLE" in download._reason(download.requests.exceptions.SSLError("no"))


def test_a_progress_bar_shows_names_unchanged(capsys):
    """What stands in brackets is no style of the text."""
    with progress._bar("reading [/red]", 2, "images", 0) as advance:
        advance(2)
    assert "reading [/red]" in capsys.readouterr().err


def test_a_silent_server_is_given_up_in_time(tmp_path, monkeypatch):
    """A name look-up or a connection that hangs has no time-out of its own."""
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(download.requests, "get", lambda *a, **k: time.sleep(30))
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"no answer in time.*or wait"):
        download.download(["http://a.invalid/x", "http://b.invalid/x"], tmp_path / "x", lambda p: None, "wait")
    assert time.monotonic() - begun < 5


def save(folder: Path, name: str, size=(6, 6), mode="L", value=100) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)
    return path


def flip_a_bit_of_the_pixels(path: Path) -> None:
    """In the midst of the compressed pixels, with a checksum of the chunk that fits."""
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at], "big")
    content[at + 8] ^= 255
    content[at + 4 + length : at + 8 + length] = zlib.crc32(content[at : at + 4 + length]).to_bytes(4, "big")
    path.write_bytes(content)


def test_a_folder_is_a_data_set(tmp_path):
    for i in range(40):
        save(tmp_path, f"{i:02}.png", value=i)
    train, test = (load_images(str(tmp_path), split) for split in ("train", "test"))
    assert train.images.shape == (38, 1, 6, 6)
    values = sorted([*train.images[:, 0, 0, 0].tolist(), *test.images[:, 0, 0, 0].tolist()])
    assert values == list(range(40)), "every image is in one split, and in one only"


def test_hidden_files_are_skipped(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for hidden in (".ipynb_checkpoints/a.png", "below/.thumbnails/b.png", ".c.png"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3)).save(tmp_path / hidden)
    assert len(open_folder(tmp_path, None, "--size")) == 1


@pytest.mark.parametrize(("dataset", "size"), [("digits", 4), ("FOLDER", 0), ("FOLDER", -5), ("FOLDER", 10**9)])
def test_a_size_that_cannot_be_is_refused(tmp_path, dataset, size):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--size"):
        load_images(dataset.replace("FOLDER", str(tmp_path)), image_size=size, option="--size")


@pytest.mark.parametrize("red", range(4))
def test_one_colour_image_makes_the_folder_colour(tmp_path, red):
    """In both splits, whichever of them it is in."""
    for i in range(4):
        save(tmp_path, f"{i}.png", mode="RGB" if i == red else "L")
    assert [load_images(str(tmp_path), split).images.shape[1] for split in ("train", "test")] == [3, 3]


def test_images_are_cropped_to_the_centre_and_scaled(tmp_path):
    picture = np.zeros((8, 16), np.uint8)
    picture[:, 4:12] = 200
    for i in range(2):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    assert load_images(str(tmp_path), "train", image_size=4).images.unique().tolist() == [200]


@pytest.mark.parametrize(("orientation", "side"), [(1, "top"), (3, "bottom"), (6, "right"), (8, "left")])
def test_the_orientation_of_the_camera_is_applied(tmp_path, orientation, side):
    """The bright strip is at the top of the file's pixels, and elsewhere in the picture that is shown."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", exif=exif, quality=100)
    (image,) = load_images(str(tmp_path), "train", image_size=16).images[:, 0].float()
    strips = {"top": image[:4], "bottom": image[-4:], "left": image[:, :4], "right": image[:, -4:]}
    assert max(strips, key=lambda name: float(strips[name].mean())) == side
    for path in tmp_path.iterdir():  # what is damaged of the words about it is no part of the picture
        path.write_bytes(
            path.read_bytes().replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02").replace(b"MM\x00*", b"MM\x00\xff")
        )
    assert load_images(str(tmp_path), "train", image_size=16).images[0, 0, :4].float().mean() > 200


def test_a_data_set_is_described_by_its_pixels():
    pixels = load_images("digits").images.double()
    words = f"mean {pixels.mean():.4f}, standard deviation {pixels.std(correction=0):.4f}"
    assert words in data.describe("digits")[0]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: [p.unlink() for p in d.iterdir()], "holds no images"),
        (lambda d: (d / "b.png").write_bytes(b"\x89PNG broken"), r"b\.png cannot be read"),
        (lambda d: (d / "b.png").write_bytes((d / "a.png").read_bytes()[:45]), r"b\.png cannot be read"),
        (lambda d: flip_a_bit_of_the_pixels(save(d, "b.png")), r"b\.png cannot be read"),
        (lambda d: save(d, "b.png", (5, 5)), "--data.image-size"),
        (lambda d: [save(d, n, (5, 6)) for n in ("a.png", "b.png", "c.png")], "one square size"),
        (lambda d: Image.new("F", (6, 6)).save(d / "b.tif"), "floating-point numbers"),
        (
            lambda d: [(d / n).write_bytes(b"no") for n in ("a.png", "c.png")],
            "2 of 3 files cannot be used: image .*a.png",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, break_it, words):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path, name)
    break_it(tmp_path)
    with pytest.raises(InputError, match=words):
        _ = [load_images(str(tmp_path), split) for split in ("train", "test")]


def test_flips_mirror_about_half_and_depend_on_the_generator():
    images = torch.tensor([[0, 255]], dtype=torch.uint8).expand(1000, 1, 1, 2)
    indices = torch.arange(1000)
    draw = lambda seed, flip=True: training_batch(images, indices, flip, torch.Generator().manual_seed(seed))  # noqa: E731
    mirrored = float((draw(0)[:, 0, 0, 0] == 1).float().mean())
    assert 0.4 < mirrored < 0.6
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, False), to_float(images))


@pytest.mark.parametrize("dataset", ["", "imagenet", "/nowhere/at/all"])
def test_unknown_data_sets_are_refused(dataset, tmp_path):
    with pytest.raises(InputError):
        load_images(dataset or str(tmp_path))
    with pytest.raises(InputError, match="train or test"):
        load_images("digits", "validation")

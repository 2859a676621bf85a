"""Folders with a folder for each class: labels and names, as torchvision has them, and folders that have none."""

import os
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import printable
from ddpm_lab.data.datasets import CLASS_NAMES, load_images
from ddpm_lab.data.image_folder import open_folder
from ddpm_lab.data.image_stream import open_images


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def test_classes_are_those_of_torchvision(tmp_path):
    """Names, their order, and the class of each file, with deeper folders, links and odd names."""
    names = ("zebra", "Cat", "cat", "a b", "é", "10", "9", "--x", "b.png")
    for value, name in enumerate(names):
        for place in ("1.png", "deep/er/2.png", "a.png"):
            save(tmp_path / "set" / name / place, value)
    save(tmp_path / "elsewhere/1.png", 99)
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/notes.md").write_text("no image")
    theirs = TorchvisionFolder(str(tmp_path / "set"))
    with pytest.warns(UserWarning, match="skipped in"):
        ours = open_folder(tmp_path / "set", None, "--size")
    assert list(ours.classes.names) == theirs.classes
    labels = dict(zip(map(str, ours.paths), ours.classes.labels.tolist(), strict=True))
    assert labels == dict(theirs.samples)


def test_each_image_keeps_its_label_in_both_splits(tmp_path, monkeypatch):
    """Each pixel tells the class; the folder is named from within it, too."""
    for number, name in enumerate(("cat", "dog", "eel")):
        for index in range(20):
            save(tmp_path / name / f"{index}.png", 10 * number + index % 10)
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), "."):
        for split, count in (("train", 57), ("test", 3)):
            found = load_images(folder, split)
            assert len(found.labels) == count
            assert (found.images[:, 0, 0, 0] // 10).tolist() == found.labels.tolist()
            assert (found.class_names, found.unlabelled) == (("cat", "dog", "eel"), "")
    assert open_images(".").class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("files", "folders", "reason"),
    [
        (["a.png", "b.png"], [], "a.png lies in "),
        (["cat/a.png", "dog/b.png", "c.png"], [], "c.png lies in "),
        (["cat/a.png", "dog/b.png"], ["eel"], "eel holds no images"),
        (["cat/a.png", "dog/b.png"], ["cat/below"], ""),
        (["cat/a.png", "dog/b.png"], [".thumbnails"], ""),
        (["cat/a.png", "cat/below/b.png"], [], "lie in one folder, cat"),
    ],
)
def test_folders_without_classes_are_read_as_before_and_say_why(tmp_path, files, folders, reason):
    for name in files:
        save(tmp_path / name, 1)
    for name in folders:
        (tmp_path / name).mkdir()
    found = load_images(str(tmp_path))
    assert len(found) == len(files) - 1
    assert (found.labels is None) == (found.class_names is None) == bool(reason)
    assert reason in found.unlabelled
    if reason:
        with pytest.raises(InputError, match=reason):
            _ = open_folder(tmp_path, None, "--size").classes


def test_the_name_of_a_class_is_one_line_of_text(tmp_path):
    folders = ["tw\no", os.fsdecode(b"caf\xe9"), "naïve 猫"]
    for name in folders:
        try:
            save(tmp_path / name / "a.png", 1)
        except OSError:
            pytest.skip("this file system takes no such names")
    names = load_images(str(tmp_path)).class_names
    assert sorted(names) == sorted([r"tw\no", r"caf\udce9", "naïve 猫"])
    assert sorted(map(printable, folders)) == sorted(names)


def test_the_known_data_sets_have_names():
    found = load_images("digits")
    assert found.class_names == CLASS_NAMES["digits"] == tuple("0123456789")
    assert CLASS_NAMES["cifar10"][3] == "cat"

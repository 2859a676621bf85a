"""Training on a folder for each class, and sampling, scoring and drawing by the names of classes."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_lab import load
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import Config, ModelConfig, SamplingConfig
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.log import read_lines
from ddpm_lab.pictures.reverse import class_captions, describe_generator, record_trajectory, reverse_picture
from ddpm_lab.sampling.generation import build_sampler, open_guide
from tests.conftest import tree_hash

NAMES = ("cat", "dog", "red panda")
AUTO = ["--model.num-classes", "auto", "--training.num-steps", "2", "--device", "cpu"]


def make_folder(folder: Path, names=NAMES) -> Path:
    """Thirty grey pictures of 8x8, in a folder for each class."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    for index, picture in enumerate(pixels):
        path = folder / names[index % len(names)] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_recipe):
    """A class folder and a run on it, told to count the classes."""
    place = tmp_path_factory.mktemp("classes")
    make_folder(place / "pets")
    assert run_command(["train", str(tiny_recipe), "--run", str(place / "run"), *dataset(place / "pets"), *AUTO]) == 0
    return place


def dataset(folder):
    return ["--data.dataset", str(folder)]


def test_auto_of_a_folder_without_classes_is_an_unconditional_network(place, tiny_recipe, tmp_path, capsys):
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *dataset(place / "pets" / "cat"), *AUTO]
    assert run_command(command) == 0
    assert "without classes" in capsys.readouterr().out
    assert load(tmp_path / "run", device="cpu").num_classes == 0
    assert run_command(command) == 0  # and continues so


def test_the_run_holds_number_and_names(place, tiny_recipe, capsys):
    """And it continues with auto, with the number, and, if a folder was renamed, with the new name."""
    record = json.loads((place / "run/config.json").read_text())
    assert record["config"]["model"]["num_classes"] == 3
    assert record["data"]["class_names"] == list(NAMES)
    trained = load(place / "run", device="cpu")
    assert (trained.num_classes, trained.class_names) == (3, NAMES)
    command = ["train", str(tiny_recipe), "--run", str(place / "run"), *dataset(place / "pets"), *AUTO]
    before = tree_hash(place / "run")
    assert run_command(command) == 0
    assert run_command([*command[:-5], "3", *command[-4:]]) == 0
    assert tree_hash(place / "run") == before
    assert run_command(["info", str(place / "run")]) == 0
    assert "classes: cat, dog, red panda" in capsys.readouterr().out.splitlines()


def test_known_data_sets_count_their_classes(tiny_recipe, tmp_path, capsys):
    assert run_command(["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *AUTO]) == 0
    assert "10 classes: 0, 1, 2" in capsys.readouterr().out
    assert load(tmp_path / "run", device="cpu").config.model.num_classes == 10


def test_names_and_numbers_ask_for_the_same_images(place, capsys):
    """To the byte, also in a folder of samples that the other one continues, and the record says both."""
    sample = ["sample", str(place / "run"), "--num-images", "4", "--num-steps", "2", "--device", "cpu", "--class"]
    for out, chosen in (("a.npz", ("dog", "red panda")), ("b.npz", ("1", "2")), ("c.npz", ("red panda",))):
        assert run_command([*sample, *chosen, "--out", str(place / out)]) == 0
    a, b, c = ((place / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz"))
    assert a == b != c
    assert np.load(place / "a.npz")["labels"].tolist() == [1, 2, 1, 2]
    for chosen in ("dog", "1"):
        assert run_command([*sample, chosen, "--out", str(place / "samples")]) == 0
    assert "4 images (4 existed already)" in capsys.readouterr().out
    assert run_command([*sample, "0", "--out", str(place / "samples")]) == 2


def test_a_record_names_the_classes(place, tmp_path, capsys):
    """Its numbers of agreement are those of a classifier of the same classes alone; other classes are warned of."""
    scoring = [
        "--metrics",
        "is",
        "--features",
        "classifier",
        "--is-splits",
        "1",
        "--num-images",
        "20",
        "--bootstrap",
        "0",
    ]
    evaluate = ["evaluate", str(place / "run"), "--num-steps", "2", "--device", "cpu", *scoring]
    others = make_folder(tmp_path / "others", ("cat", "eel"))
    evaluate += ["--scores", str(tmp_path / "scores.jsonl")]
    for more in (["--class", "dog"], []):
        assert run_command([*evaluate, *more]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run_command([*evaluate, "--reference", str(others)]) == 0
    one, every, _ = read_lines(tmp_path / "scores.jsonl")
    assert (one["class"], one["class_names"]) == ([1], ["dog"])
    assert (every["class"], every["class_names"]) == (None, list(NAMES))
    assert "shares" in one["classes"]
    assert "as_asked" not in one["classes"]
    assert [line.rpartition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"warning: {others} lacks the classes dog, red panda",
        f"warning: {place / 'run'} lacks the classes eel",
    ]


def test_pictures_name_the_class_of_each_row(place):
    trained = load(place / "run", device="cpu")
    config = SamplingConfig(num_steps=2, batch_size=4)
    assert class_captions(trained, config, 4) == ["cat", "dog", "red panda", "cat"]
    assert class_captions(trained, dataclasses.replace(config, guidance=0.0), 4) == []
    chosen = dataclasses.replace(config, class_=("red panda", 1))
    assert describe_generator(trained, build_sampler(trained, chosen)).endswith("ddim, 2 steps, class red panda, dog")
    shown = record_trajectory(trained, config, 4, 3)
    unnamed = dataclasses.replace(shown, classes=())
    named, plain = reverse_picture([shown]), reverse_picture([unnamed])
    assert named.shape[0] == plain.shape[0]
    assert not np.array_equal(named[:, : plain.shape[1]], plain)
    names = ("x" * 250, r"tw\no", "猫", "$a_b$")
    record = trained.record | {"data": trained.record["data"] | {"class_names": names[:3]}}
    odd = dataclasses.replace(trained, record=record)
    assert reverse_picture([record_trajectory(odd, config, 3, 2)]).shape[1] < 600


def test_texts_are_names_first_and_numbers_where_no_name_is_one(place):
    trained = load(place / "run", device="cpu")

    def named(*names):
        return dataclasses.replace(trained, record={"data": {"class_names": names}})

    assert trained.class_numbers(("red panda", "0", 2)) == (2, 0, 2)
    years = named("1999", "2000", "1")
    assert years.class_numbers(("1", "1999", 1)) == (2, 0, 1)
    for wrong in ("0", "2", 3):
        with pytest.raises(InputError, match=f"has the classes 1999, 2000, 1, not {wrong}"):
            years.class_numbers((wrong,))
    assert named("a\nb", "c", "d").class_names[0] == r"a\nb"
    assert named("a\\nb", "c", "d").class_numbers(("a\nb",)) == (0,)
    assert named("a", "b").class_names == ("0", "1", "2")  # of another number of classes: not the names of these


def test_a_guide_of_other_classes_is_refused(place, tiny_recipe, tmp_path):
    make_folder(tmp_path / "pets", ("bat", "cat", "dog"))
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *dataset(tmp_path / "pets"), *AUTO]
    assert run_command(command) == 0
    trained = load(place / "run", device="cpu")
    with pytest.raises(InputError, match=r"differs from .* in its classes"):
        open_guide(trained, str(tmp_path / "run"))
    assert open_guide(trained, str(place / "run")).class_names == NAMES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: shutil.move(d / "cat/27.png", d / "dog/00.png"), "started with other labels"),
        (lambda d: shutil.move(d / "dog", d / "canine"), "started on other images"),
        (lambda d: shutil.move(d / "dog", d / "dogs"), "dogs"),
        (lambda d: (d / "eel").mkdir(), "eel holds no images; add some, or remove the folder"),
        (lambda d: shutil.copy(d / "cat/00.png", d / "00.png"), "00.png lies in"),
        (lambda d: [shutil.rmtree(d / name) for name in ("cat", "dog")], "lie in one folder, red panda"),
    ],
)
def test_classes_that_changed_are_noticed(place, tiny_recipe, tmp_path, capsys, change, words):
    """Nothing is lost; a class that has another name only is the same class."""
    shutil.copytree(place / "pets", tmp_path / "pets")
    shutil.copytree(place / "run", tmp_path / "run")
    before = tree_hash(tmp_path / "run")
    change(tmp_path / "pets")
    longer = [*AUTO[:3], "3", *AUTO[4:]]
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *dataset(tmp_path / "pets"), *longer]
    if words == "dogs":
        assert run_command(command) == 0
        assert load(tmp_path / "run", device="cpu").class_names == ("cat", "dogs", "red panda")
        return
    assert run_command(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert tree_hash(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train digits --run NEW --model.num-classes many", "must be a whole number or auto, not 'many'"),
        ("train digits --run NEW --data.dataset PETS/cat --model.num-classes 2", "00.png lies in"),
        ("train digits --run NEW --data.dataset PETS --model.num-classes 4", "must be 3 for"),
        ("sample RUN --class bird --out NEW.png", "has the classes cat, dog, red panda, not bird"),
        ("sample RUN --class 3 --out NEW.png", "has the classes cat, dog, red panda, not 3"),
        ("sample RUN --class=-1 --out NEW.png", "has the classes cat, dog, red panda, not -1"),
        ("sample RUN --class 1.5 --out NEW.png", "not 1.5"),
        ("reverse RUN --class bird --out NEW.png", "not bird"),
        ("evaluate RUN --features classifier --class bird", "not bird"),
        ("sample FALSE --out NEW.png", "data.class_names cannot be 3"),
        ("sample AUTO --out NEW.png", "model.num_classes is auto"),
    ],
)
def test_classes_that_are_not_are_refused(place, tmp_path, capsys, command, words):
    for name, change in (("FALSE", ("data", "class_names", 3)), ("AUTO", ("config", "model", {"num_classes": "auto"}))):
        if name in command:
            shutil.copytree(place / "run", tmp_path / name)
            record = json.loads((tmp_path / name / "config.json").read_text())
            group, field, value = change
            record[group][field] = value
            (tmp_path / name / "config.json").write_text(json.dumps(record))
    for word, path in (("PETS", place / "pets"), ("RUN", place / "run"), ("FALSE", tmp_path / "FALSE")):
        command = command.replace(word, str(path))
    command = command.replace("AUTO", str(tmp_path / "AUTO")).replace("NEW", str(tmp_path / "new"))
    assert run_command([*command.split(), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.glob("new*"))


def test_a_class_that_is_held_out_whole_is_refused(tiny_recipe, tmp_path, capsys):
    """Of twenty images the one that is held out is the same each time."""
    make_folder(tmp_path / "pets")
    from ddpm_lab.data.datasets import load_images

    for path in sorted((tmp_path / "pets").rglob("*.png"))[20:]:
        path.unlink()
    held_out = load_images(str(tmp_path / "pets"), "test").images[0, 0]
    (rare,) = [p for p in (tmp_path / "pets").rglob("*.png") if np.array_equal(np.asarray(Image.open(p)), held_out)]
    number = sorted((tmp_path / "pets").rglob("*.png")).index(rare)
    for index, path in enumerate(sorted((tmp_path / "pets").rglob("*.png"))):
        name = "b" if index == number else "a" if index < number else "c"
        path.parent.parent.joinpath(name).mkdir(exist_ok=True)
        shutil.move(path, path.parent.parent / name / f"{index:02}.png")
    for name in NAMES:
        shutil.rmtree(tmp_path / "pets" / name, ignore_errors=True)
    command = ["train", str(tiny_recipe), "--run", str(tmp_path / "run"), *dataset(tmp_path / "pets"), *AUTO]
    assert run_command(command) == 2
    assert "no image of the class b is left for training" in capsys.readouterr().err


def test_auto_needs_a_data_set():
    config = ModelConfig(num_classes="auto")
    assert Config.from_dict({"model": {"num_classes": "auto"}}).model == config
    with pytest.raises(InputError, match="is auto"):
        _ = config.class_count
    with pytest.raises(InputError, match="must be a whole number or auto or nothing, not 'all'"):
        ModelConfig(num_classes="all")

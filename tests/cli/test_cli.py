"""The command: what users type, and what they get where it cannot work."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as tensor_bytes

from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import RECIPES, SamplingConfig
from ddpm_lab.core.progress import progress
from ddpm_lab.models.trained import load
from ddpm_lab.sampling.output import sampling_identity
from ddpm_lab.studies.grid import STUDIES
from tests.conftest import TINY_RECIPE, tree_hash

BAD_TOML = {
    "torn.toml": "[training\nnum_steps = 3",
    "binary.toml": b"\xff\xfe\x00",
    "empty_name.toml": '[data]\ndataset = ""',
    "typo.toml": "[training]\nbatchsize = 3",
    "group.toml": "[trainer]\nx = 1",
    "nan.toml": "[training]\nlearning_rate = nan",
    "list.toml": "training = 3",
    "deep.toml": "x = " + "[" * 20_000,
    "fraction.toml": "[training]\nnum_steps = 2.5",
}
MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def place(tmp_path, tiny_run, monkeypatch) -> Path:
    """A folder with a run, damaged runs, recipes good and bad, images and files that must stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_DATA_DIR", str(tmp_path / "data"))
    shutil.copytree(tiny_run, "run")
    shutil.copytree(tiny_run, "torn")
    weights = Path("torn/checkpoints/step_00000012/ema.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    optimizer = Path("torn/checkpoints/step_00000012/optimizer.safetensors")
    optimizer.write_bytes(b"")
    shutil.copytree(tiny_run, "renamed")
    Path("renamed/checkpoints/step_00000012").rename("renamed/checkpoints/step_00000013")
    shutil.copytree(tiny_run, "flat", ignore=shutil.ignore_patterns("checkpoints"))
    Path("flat/checkpoints").touch()
    for folder in ("empty", "notes", "pictures", "data/mnist"):
        Path(folder).mkdir(parents=True)
    Path("notes/todo.txt").write_text("keep me")
    Path("old.png").write_bytes(b"an old picture")
    Path("a_file").write_text("x")
    Path("tiny.toml").write_text(TINY_RECIPE)
    for name, text in BAD_TOML.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    Image.new("L", (8, 8)).save("pictures/a.png")
    Path("pictures/b.png").write_bytes(b"not an image")
    Path("good").mkdir()
    for name in ("a", "b"):
        Image.new("L", (9, 9)).save(f"good/{name}.png")
    Path("colourful").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save("colourful/a.png")
    Image.new("RGB", (8, 8), (3, 3, 3)).save("colourful/b.png")
    Path("samples").mkdir()
    Path("samples/sampling.json").write_text(json.dumps(sampling_identity(load("run"), SamplingConfig())))
    _write_arrays()
    _write_weights()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in MNIST_NAMES:
        Path(f"data/mnist/{name}.gz").write_bytes(b"\x1f\x8b nonsense")
    return tmp_path


def _write_arrays() -> None:
    """Array files that hold something else than images or statistics that fit."""
    arrays = {
        "float": {"images": np.zeros((20, 8, 8, 1), np.float32)},
        "labels": {"labels": np.zeros(20, np.int64)},
        "oblong": {"images": np.zeros((20, 8, 9, 1), np.uint8)},
        "colour": {"images": np.tile(np.array([1, 2, 3], np.uint8), (20, 8, 8, 1))},
        "large": {"images": np.zeros((20, 9, 9, 1), np.uint8)},
        "one": {"images": np.zeros((1, 8, 8, 1), np.uint8)},
        "torn": {"images": np.random.default_rng(0).integers(0, 256, (99, 8, 8, 1)).astype(np.uint8)},
        "small": {"mu": np.zeros(5), "sigma": np.eye(5)},
        "mixed": {"mu": np.zeros(64), "sigma": np.eye(5)},
        "scalar": {"mu": np.float64(0), "sigma": np.eye(64)},
        "indefinite": {"mu": np.zeros(64), "sigma": np.eye(64) * -4 + 5},
        "none": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "crooked": {"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))},
    }
    for name, content in arrays.items():
        np.savez(f"{name}.npz", **content)
    Path("torn.npz").write_bytes(Path("torn.npz").read_bytes()[:3000])
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": (99, 8, 8, 1)})
    with zipfile.ZipFile("short.npz", "w") as archive:
        archive.writestr("images.npy", content.getvalue() + b"too short")


def _write_weights() -> None:
    """Files given for the FID network's weights that are not, and a training of a classifier."""
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    torch.save([1, 2], "list.pth")
    torch.save({0: torch.zeros(3)}, "numbered.pth")
    Path("strange.pth").write_bytes(b"GIF89a" + bytes(range(200)))
    torch.save({"code": subprocess.run}, "code.pth")
    Path("torn.pth").write_bytes(Path("other.pth").read_bytes()[:500])
    Path("empty.pth").touch()
    Path("trained").mkdir()
    meta = {"ddpm_lab": json.dumps({"epoch": 1, "identity": "of another"})}
    Path("trained/training.safetensors").write_bytes(tensor_bytes({"x": torch.zeros(1)}, meta))


TRAIN, SAMPLE = "train tiny.toml --run new --device cpu", "sample run --device cpu --out new.png"
EVALUATE = "evaluate {} --reference digits:train --features classifier --device cpu"
STATISTICS = "evaluate digits:test --reference {} --features classifier"
INCEPTION = "evaluate digits:test --reference digits:train --inception-weights {}"
DINOV2 = "evaluate digits:test --reference digits:train --features dinov2 --dinov2-weights {}"
TWO_NETWORKS = "evaluate digits:test --reference digits:train --features classifier {}"
FORWARD = "forward --dataset digits --out {}"
BAD_INPUTS = {
    "no such command": ("fly", "Unknown command"),
    "no such option": (TRAIN + " --training.lr 3", "Unknown option"),
    "missing argument": ("train", "RECIPE"),
    "missing value": ("train tiny.toml --run", "--run"),
    "no such recipe": ("train nothing --run new", "no recipe 'nothing'"),
    "recipe is a folder": ("train notes --run new", "no recipe 'notes'"),
    "recipe torn": ("train torn.toml --run new", "not a TOML file"),
    "recipe binary": ("train binary.toml --run new", "not a TOML file"),
    "recipe with a typo": ("train typo.toml --run new", "no setting 'batchsize'"),
    "recipe with an unknown group": ("train group.toml --run new", "no group 'trainer'"),
    "recipe with NaN": ("train nan.toml --run new", "finite number"),
    "recipe with no tables": ("train list.toml --run new", "table of settings"),
    "recipe with a fraction": ("train fraction.toml --run new", "whole number"),
    "recipe with no data set": ("train empty_name.toml --run new", "is empty"),
    "fraction for a count": (TRAIN + " --training.num-steps 2.5", "whole number"),
    "word for a number": (TRAIN + " --training.num-steps many", "whole number"),
    "unknown precision of training": (TRAIN + " --training.precision float16", "fp16"),
    "determinism by halves": (TRAIN + " --training.deterministic=partly", "deterministic"),
    "no steps": (TRAIN + " --training.num-steps 0", "at least 1"),
    "negative batch": (TRAIN + " --training.batch-size -4", "training.batch_size must be from 1 to 65536, not -4"),
    "astronomic batch": (TRAIN + " --training.batch-size 100000000000", "from 1 to 65536"),
    "astronomic count": (TRAIN + " --training.seed 99999999999999999999", "whole number"),
    "number beyond all": (TRAIN + " --training.learning-rate 1" + "0" * 400, "finite number"),
    "absurd width": (TRAIN + " --model.base-channels 3200000000000", "from 4 to 4096"),
    "a frequency shift of 2": (TRAIN + " --model.freq-shift 2", "model.freq_shift must be from 0 to 1, not 2"),
    "no epsilon": (TRAIN + " --model.norm-eps 0", "model.norm_eps must be above 0 and at most 1, not 0"),
    "one position": (TRAIN + " --model.num-positions 1", "from 2 to 10000"),
    "absurd patch": (TRAIN + " --model.patch-size 1000000000", "from 1 to 64"),
    "run with no name": ("train tiny.toml --run= --device cpu", "is empty"),
    "recipe too deep": ("train deep.toml --run new", "not a TOML file"),
    "data folder is a file": ("data cifar10 --data-dir a_file", "--data-dir"),
    "infinite rate": (TRAIN + " --training.learning-rate inf", "finite number"),
    "rate of zero": (TRAIN + " --training.learning-rate 0", "above 0"),
    "one timestep": (TRAIN + " --diffusion.num-timesteps 1", "from 2 to 10000"),
    "too few to rescale": (TRAIN + " --diffusion.num-timesteps 20", "no-rescale-betas"),
    "cosine with betas": (TRAIN + " --diffusion.schedule cosine --diffusion.rescale-betas", "does not apply"),
    "unknown schedule": (TRAIN + " --diffusion.schedule square", "linear"),
    "channels not of the groups": (TRAIN + " --model.base-channels 44", "of model.norm_groups (8)"),
    "too many levels": (TRAIN + " --model.channel-multipliers 1 1 1 1 1", "multiple of 16"),
    "level that is not": (TRAIN + " --model.attention-levels 7", "must be from 0 to 1"),
    "unknown device": ("train tiny.toml --run new --device tpu", "cpu"),
    "absent device": ("train tiny.toml --run new --device cuda", "not on this machine"),
    "run is a file": ("train tiny.toml --run a_file", "is a file"),
    "run is something else": ("train tiny.toml --run notes --device cpu", "it is not a run"),
    "run below a file": ("train tiny.toml --run a_file/new --device cpu", "cannot be written"),
    "run of another config": ("train tiny.toml --run run --device cpu --model.dropout 0", "model.dropout"),
    "run of fewer steps": ("train tiny.toml --run run --device cpu --training.num-steps 9", "num_steps cannot be 9"),
    "damaged checkpoint": ("train tiny.toml --run torn --device cpu --training.num-steps 20", "is damaged"),
    "checkpoint of another step": ("train tiny.toml --run renamed --device cpu --training.num-steps 20", "of step 12"),
    "checkpoints are a file": ("train tiny.toml --run flat --device cpu", "cannot be listed: Not a directory"),
    "damaged data": (TRAIN + " --data.dataset mnist", "is damaged"),
    "no such data": (TRAIN + " --data.dataset nothing", "no data set 'nothing'"),
    "folder without images": (TRAIN + " --data.dataset notes", "holds no images"),
    "folder with a bad image": (TRAIN + " --data.dataset pictures", "b.png"),
    "classes that are no number": (TRAIN + " --model.num-classes many", "must be a whole number or auto, not 'many'"),
    "classes of a folder that has none": (
        TRAIN + " --data.dataset good --model.num-classes 2",
        "requires a data set with labels; good has none: a.png lies in good itself",
    ),
    "class by name of a model without classes": (SAMPLE + " --class cat", "was trained without classes"),
    "size for a set that has one": (TRAIN + " --data.image-size 16", "has its own size"),
    "data of no such name": ("data imagenet", "mnist"),
    "damaged data shown": ("data mnist", "is damaged"),
    "no such model": ("sample nothing --out new.png", "no model 'nothing'"),
    "model is a file": ("sample a_file --out new.png", "no model 'a_file'"),
    "model is another folder": ("sample notes --out new.png", "holds no config.json"),
    "damaged weights": ("sample torn --device cpu --out new.png", "is damaged"),
    "no such checkpoint": (SAMPLE + " --checkpoint 5", "it has 8, 12"),
    "no images": (SAMPLE + " --num-images 0", "from 1 to"),
    "too many for a picture": (SAMPLE + " --num-images 999999", "in one picture"),
    "no sampling steps": (SAMPLE + " --num-steps 0", "at least 1"),
    "more steps than trained": (SAMPLE + " --num-steps 1001", "from 1 to the 1000"),
    "eta beyond 1": (SAMPLE + " --eta 2", "from 0 to 1"),
    "eta for ddpm": (SAMPLE + " --sampler ddpm --eta 0.5", "applies to ddim and dpmpp, not to ddpm"),
    "variance for ddim": (SAMPLE + " --variance beta", "applies to ddpm, not to ddim"),
    "eta for unipc": (SAMPLE + " --sampler unipc --eta 0.5", "applies to ddim and dpmpp, not to unipc"),
    "unknown spacing": (SAMPLE + " --spacing cubic", "karras"),
    "unknown sampler": (SAMPLE + " --sampler magic", "ddim"),
    "negative seed": (SAMPLE + " --seed -1", "at least 0"),
    "unknown ending": ("sample run --device cpu --out old.jpeg", ".png or .npz"),
    "out is a folder of something else": ("sample run --device cpu --out notes", "holds todo.txt"),
    "out is a folder of other samples": ("sample run --device cpu --out samples --seed 3", "of another seed"),
    "out in no folder": ("sample run --device cpu --out nowhere/a.png", "does not exist"),
    "out below a file": ("sample run --device cpu --out a_file/a.png", "does not exist"),
    "scores without a reference": ("evaluate digits:test --features classifier", "need a --reference"),
    "float images": (EVALUATE.format("float.npz"), "type float32"),
    "no images in the array file": (EVALUATE.format("labels.npz"), "must hold `images`"),
    "truncated array file": (EVALUATE.format("torn.npz"), "torn.npz"),
    "array shorter than it says": (EVALUATE.format("short.npz"), "not as long as its shape"),
    "oblong images": (EVALUATE.format("oblong.npz"), "must be square"),
    "colour against grey": (EVALUATE.format("colour.npz"), "holds images in colour, and grey images are required"),
    "images of another size": (EVALUATE.format("large.npz"), "images of grey 9x9"),
    "a folder of another size": (EVALUATE.format("good"), "images of grey 9x9"),
    "one image": (EVALUATE.format("one.npz"), "at least 2"),
    "an empty folder": (EVALUATE.format("empty"), "holds no images"),
    "a bad image among good ones": (EVALUATE.format("pictures"), "b.png"),
    "a file of something else": (EVALUATE.format("tiny.toml"), "neither an .npz nor a folder"),
    "no such images": (EVALUATE.format("nothing"), "no model or images 'nothing'"),
    "more images than there are": (EVALUATE.format("digits:test") + " --num-images 361", "from 1 to the 360"),
    "no images asked for": (EVALUATE.format("run") + " --num-images 0", "at least"),
    "a data set without its split": ("evaluate digits:test --reference digits", "digits:train or digits:test"),
    "a split that is not": ("evaluate digits:all --reference digits:train", "digits:train or digits:test"),
    "no such reference": ("evaluate digits:test --features classifier --reference nothing", "no images 'nothing'"),
    "statistics of another dimension": (STATISTICS.format("small.npz") + " --metrics fid", "of another network"),
    "statistics that are none": (STATISTICS.format("crooked.npz") + " --metrics fid", "must be symmetric"),
    "statistics with no dimension": (STATISTICS.format("scalar.npz") + " --metrics fid", "are no statistics"),
    "statistics of no covariance": (STATISTICS.format("indefinite.npz") + " --metrics fid", "an eigenvalue of -"),
    "a reference of one image": (STATISTICS.format("one.npz"), "too few images (1)"),
    "images of size 0": (EVALUATE.format("good") + " --image-size 0", "from 1 to 4096"),
    "colour images against grey": (EVALUATE.format("colourful") + " --metrics fid", "it is in colour"),
    "images with no name": ("evaluate '' --reference digits:train", "no model or images ''"),
    "Inception weights of strange bytes": (INCEPTION.format("strange.pth"), "truncated or no PyTorch file"),
    "Inception weights without names": (INCEPTION.format("numbered.pth"), "no table of tensors"),
    "statistics of two shapes": (STATISTICS.format("mixed.npz") + " --metrics fid", "are no statistics"),
    "statistics without images": (STATISTICS.format("small.npz"), "holds statistics only"),
    "truncated statistics": (STATISTICS.format("torn.npz") + " --metrics fid", "torn.npz"),
    "unknown metric": (EVALUATE.format("digits:test") + " --metrics fid,lpips", "'lpips'"),
    "no metric": (EVALUATE.format("digits:test") + " --metrics=", "not ''"),
    "more splits than images": (EVALUATE.format("digits:test") + " --num-images 9", "--is-splits of 10"),
    "a subset too large": (EVALUATE.format("digits:test") + " --kid-subset-size 361", "exceeds the 360"),
    "a subset of one": (EVALUATE.format("digits:test") + " --kid-subset-size 1", "from 2 to 10000"),
    "one resampling": (EVALUATE.format("digits:test") + " --bootstrap 1", "0 or at least 2"),
    "too few for neighbours": (EVALUATE.format("digits:test") + " --num-images 3 --metrics prdc", "at least 4"),
    "no such network": ("evaluate digits:test --reference digits:train --features nothing", "no classifier 'nothing'"),
    "weights of no classifier": ("evaluate digits:test --reference digits:train --features a_file", "not a classifier"),
    "no such Inception weights": (INCEPTION.format("nothing.pth"), "nothing.pth cannot be read"),
    "Inception weights are a folder": (INCEPTION.format("notes"), "notes cannot be read"),
    "truncated Inception weights": (INCEPTION.format("torn.pth"), "truncated or no PyTorch file"),
    "empty Inception weights": (INCEPTION.format("empty.pth"), "truncated or no PyTorch file"),
    "Inception weights that run code": (INCEPTION.format("code.pth"), "truncated or no PyTorch file"),
    "weights of another network": (INCEPTION.format("other.pth"), "of another layout"),
    "weights that are no table": (INCEPTION.format("list.pth"), "no table of tensors"),
    "no network": (EVALUATE.format("digits:test") + " --features=", "no classifier ''"),
    "one network twice": (TWO_NETWORKS.format("classifier"), "one of them twice"),
    "pairs of several networks": (
        TWO_NETWORKS.format("dinov2") + " --metrics memorisation --pairs a.png",
        "give one of --features",
    ),
    "no such DINOv2 weights": (DINOV2.format("nothing.safetensors"), "nothing.safetensors cannot be read"),
    "DINOv2 weights of strange bytes": (DINOV2.format("strange.pth"), "truncated or no safetensors file"),
    "DINOv2 weights of another network": (DINOV2.format("trained/training.safetensors"), "must be those of facebook"),
    "DINOv2 weights for another network": (EVALUATE.format("run") + " --dinov2-weights x", "for --features dinov2"),
    "no directions": (EVALUATE.format("digits:test") + " --metrics mind --mind-directions 0", "from 1 to 100000"),
    "memorisation of test images": (
        "evaluate digits:test --reference digits:test --features classifier --metrics memorisation",
        "training images",
    ),
    "pairs without memorisation": (EVALUATE.format("digits:test") + " --pairs pairs.png", "add it to --metrics"),
    "pairs in no picture": (EVALUATE.format("digits:test") + " --pairs pairs.txt", "must end in .png"),
    "scores in no lines": (EVALUATE.format("digits:test") + " --scores scores.json", "must end in .jsonl"),
    "checkpoint of images": (EVALUATE.format("digits:test") + " --checkpoint 8", "--checkpoint: for a model"),
    "weights that score nothing": (EVALUATE.format("run") + " --inception-weights x.pth", "for --features inception"),
    "a model against images of size 0": (
        "evaluate run --reference good --features classifier --device cpu --image-size 0",
        "from 1 to 4096",
    ),
    "a size for no folder": (EVALUATE.format("run") + " --image-size 4", "for folders of images, and there is none"),
    "an engine for no sampling": (EVALUATE.format("digits:test") + " --engine compile", "--engine: for a model"),
    "a reference with no name": ("evaluate digits:test --reference '' --features classifier", "no images ''"),
    "scores of too many images": (EVALUATE.format("run") + " --num-images 100000000000", "from 2 to 10000000"),
    "statistics of nothing": (STATISTICS.format("none.npz"), "no statistics"),
    "sampling of images": (
        EVALUATE.format("digits:test") + " --num-steps 10 --class 3 --weights raw",
        "--num-steps, --class, --weights: for a model, and digits:test holds images",
    ),
    "scores of a damaged run": ("evaluate torn --features classifier --device cpu", "is damaged"),
    "sampler that does not fit": (EVALUATE.format("run") + " --num-steps 1001", "from 1 to the 1000"),
    "classifier of no epochs": ("classifier digits --out new --num-epochs 0", "from 1 to 10000"),
    "classifier of a negative seed": ("classifier digits --out new --seed -1", "seed must be from 0"),
    "classifier in a file": ("classifier digits --out a_file", "is a file"),
    "classifier of another training": ("classifier digits --out trained --num-epochs 3", "other settings or images"),
    "scores too rare to be": (TRAIN + " --evaluation.score-images 3", "from 20 to 50000"),
    "eta with singlestep": (
        "sample run --out x.png --sampler dpmpp --eta 1 --singlestep",
        "eta above 0 cannot be combined with singlestep",
    ),
    "engine unknown": ("sample run --out x.png --engine jax", "jax"),
    "engine onnx, gone": ("sample run --out x.png --engine onnx", "onnx"),
    "precision unknown": ("sample run --out x.png --precision fp8", "fp8"),
    "export to nowhere": ("export run --to run", "give --out FOLDER, or --push USER/NAME"),
    "export of both weights": ("export run --to run --out new --weights raw", "averaged weights only"),
    "push to no name": ("export run --to run --push digits", "--push takes USER/NAME, not 'digits'"),
    "push to a revision": ("export run --to run --push me/digits@main", "--push takes USER/NAME"),
    "forward in no folder": (FORWARD.format("nowhere/a.png"), "does not exist"),
    "forward of another ending": (FORWARD.format("a.avi"), "must end in .png or .gif or .mp4"),
    "forward into a folder": (FORWARD.format("empty"), "must end in"),
    "forward of no frames": (FORWARD.format("a.gif") + " --frames 0", "frames must be from 2 to 10001"),
    "forward of too many frames": (FORWARD.format("a.mp4") + " --frames 1002", "from 2 to 1001"),
    "forward of too many columns": (FORWARD.format("a.png") + " --columns 1002", "from 2 to 1001"),
    "forward of one column": (FORWARD.format("a.png") + " --columns 1", "from 2 to 1001"),
    "forward of more columns than the shortest chain": (
        FORWARD.format("a.png") + " --num-timesteps 30 1000 --columns 40",
        "from 2 to 31",
    ),
    "forward of no images": (FORWARD.format("a.png") + " --num-images 0", "from 1 to 64"),
    "forward of a million images": (FORWARD.format("a.png") + " --num-images 1000000", "from 1 to 64"),
    "forward of more images than there are": ("forward --dataset good --num-images 9 --out a.png", "exceeds the 1"),
    "forward of no data set": ("forward --dataset nothing --out a.png", "nothing"),
    "forward of a chain that cannot be": (FORWARD.format("a.png") + " --num-timesteps 20", "more than 20"),
    "forward of a negative chain": (FORWARD.format("a.png") + " --num-timesteps -5", "from 2 to 10000"),
    "forward of unknown betas": (FORWARD.format("a.png") + " --betas sigmoid", "sigmoid"),
    "forward of no betas": (FORWARD.format("a.png") + " --betas", "betas"),
    "forward with unknown spacing": (FORWARD.format("a.png") + " --spacing quadratic", "quadratic"),
    "forward of a negative seed": (FORWARD.format("a.png") + " --seed -1", "seed must be from 0"),
    "forward of a giant seed": (FORWARD.format("a.png") + " --seed 99999999999999999999", "seed must be from 0"),
    "forward of digits of another size": (FORWARD.format("a.png") + " --image-size 4", "has its own size"),
    "forward of pictures of no size": ("forward --dataset good --image-size 0 --out a.png", "--image-size must be"),
    "frames of a picture": (FORWARD.format("a.png") + " --frames 9 --fps 5", "--frames, --fps cannot be used with"),
    "columns of a film": (FORWARD.format("a.gif") + " --columns 5", "--columns cannot be used with"),
    "hold of a picture": ("interpolate run --hold 5 --out a.png", "--hold cannot be used with"),
    "columns of a reverse film": ("reverse run --columns 5 --out a.mp4", "--columns cannot be used with"),
    "classifier of a giant seed": ("classifier digits --out new --seed 99999999999999999999", "seed must be from 0"),
    "forward too fast": (FORWARD.format("a.gif") + " --fps 51", "fps must be from 1 to 50"),
    "forward of giants": (FORWARD.format("a.png") + " --scale 1000", "scale must be from 1 to 16"),
    "forward held for ever": (FORWARD.format("a.gif") + " --hold 1e9", "hold must be from 0 to 60"),
    "reverse of nothing": ("reverse --out a.png", "name at least one model"),
    "reverse of no model": ("reverse run empty --out a.png", "holds no config.json"),
    "reverse of a damaged model": ("reverse torn --out a.png", "is damaged"),
    "reverse of another ending": ("reverse run --out a.txt", "must end in"),
    "reverse of too many columns": ("reverse run --num-steps 4 --columns 6 --out a.png", "from 2 to 5"),
    "samples in a new folder with a dot": (
        "sample run --out samples.v2/",
        "name of a new folder must contain no dot",
    ),
    "reverse of too many frames": ("reverse run --num-steps 4 --frames 6 --out a.gif", "from 2 to 5"),
    "reverse of no images": ("reverse run --num-images 0 --out a.png", "from 1 to 64"),
    "reverse of too many steps": ("reverse run --num-steps 1001 --out a.png", "from 1 to the 1000"),
    "interpolation with noise": ("interpolate run --sampler ddpm --out a.png", "requires a deterministic"),
    "interpolation of one image": ("interpolate run --columns 1 --out a.png", "from 2 to 101"),
    "interpolation to a negative seed": ("interpolate run --to-seed -1 --out a.png", "to_seed must be from 0"),
    "reconstruction of unnamed classes": (
        "reconstruct mnist --dataset good --guidance 2 --out a.png",
        "requires --class",
    ),
    "reconstruction beyond the chain": ("reconstruct run --timesteps 5 1001 --out a.png", "from 2 to the 1000"),
    "reconstruction from nothing": ("reconstruct run --timesteps 0 --out a.png", "from 2 to the 1000"),
    "reconstruction of other images": (
        "reconstruct run --dataset colourful --num-images 1 --out a.png",
        "run makes (1, 8, 8)",
    ),
    "reconstruction as a film": ("reconstruct run --out a.gif", "must end in .png"),
    "curves of no kind": ("curves losses --out a.png", "losses"),
    "curves of no run": ("curves training --out a.png", "name at least one run"),
    "curves of another folder": ("curves training notes --out a.png", "not a run folder"),
    "curves in no folder": ("curves training run --out nowhere/a.png", "does not exist"),
    "curves of a chain that cannot be": ("curves schedules --num-timesteps 1 --out a.png", "from 2 to 10000"),
    "norms of no model": ("curves norms nothing --out a.png", "no model"),
    "norms of no images": ("curves norms run --num-images 0 --out a.png", "from 1 to 64"),
    "info of nothing": ("info empty", "holds no config.json"),
    "study of nothing": ("study nothing --out new", "no study 'nothing'"),
    "study that is no TOML": ("study torn.toml --out new", "not a TOML file"),
    "study with an unknown setting": ("study group.toml --out new", "no setting 'trainer'"),
    "study of no recipe": ("study list.toml --out new", "no setting 'training'"),
    "study in a file": ("study digits --out a_file", "is a file"),
    "study in another folder": ("study digits --out notes", "holds todo.txt"),
    "study of a cell too many": ("study digits --out new --cell 6", "from 0 to 5"),
    "study of a negative cell": ("study digits --out new --cell -1", "from 0 to 5"),
    "report of another folder": ("report notes", "is not a study (no study.json), not a run"),
    "report of nothing": ("report nowhere", "is not a study (no study.json), not a run"),
    "demo in a file": ("demo --out a_file", "a_file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_exit_code_2_and_harms_nothing(place, capsys, name, record_property):
    arguments, words = BAD_INPUTS[name]
    before = tree_hash(place)
    code = run_command(shlex.split(arguments))
    lines = capsys.readouterr().err.splitlines()
    with capsys.disabled():
        if os.environ.get("SHOW_BAD_INPUTS"):
            print(f"\n{code} | ddpm {arguments} | {' / '.join(lines)}")
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    after = tree_hash(place)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if not path.endswith(".lock")]


def test_there_are_enough_bad_inputs():
    assert len(BAD_INPUTS) >= 25


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_one_may_not_write_are_refused(place, capsys):
    Path("empty").chmod(0o500)
    assert run_command(["train", "tiny.toml", "--run", "empty/run", "--device", "cpu"]) == 2
    assert run_command(["sample", "run", "--device", "cpu", "--out", "empty/a.png"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_train_sample_info_as_the_readme_says(place, capsys):
    assert run_command(["train", "tiny.toml", "--run", "new", "--device", "cpu", "--training.num-steps", "3"]) == 0
    assert (
        run_command(["sample", "new", "--num-images", "5", "--num-steps", "2", "--device", "cpu", "--out", "new.npz"])
        == 0
    )
    assert (
        run_command(["sample", "new", "--num-images", "5", "--num-steps", "2", "--device", "cpu", "--out", "old.png"])
        == 0
    )
    assert run_command(["info", "new"]) == 0
    out = capsys.readouterr().out
    assert "trained: new/checkpoints/step_00000003" in out
    assert "new.npz: 5 images of new at step 3 (ema), ddim, 2 of 1000 steps, seed 0" in out
    assert "trained 3 steps, 24 images seen of digits:train" in out
    with np.load("new.npz") as archive:
        assert archive["images"].shape == (5, 8, 8, 1)
    with Image.open("old.png") as picture:
        assert picture.size[0] > 100


def test_flags_override_the_recipe_and_the_recipe_the_defaults(place, capsys):
    command = (
        "train tiny.toml --run new --device cpu --training.num-steps 1 --training.seed 3 --model.channel-multipliers 1"
    )
    assert run_command(command.split()) == 0
    config = json.loads(Path("new/config.json").read_text())["config"]
    assert config["training"]["seed"] == 3
    assert config["model"]["channel_multipliers"] == [1]
    assert config["data"]["dataset"] == "digits"
    assert config["training"]["batch_size"] == 8
    assert config["diffusion"]["num_timesteps"] == 1000


def test_both_conventions_are_flags(place, capsys):
    for flag, expected in (("--diffusion.rescale-betas", True), ("--diffusion.no-rescale-betas", False)):
        command = (
            f"train tiny.toml --run {expected} --device cpu --training.num-steps 1 {flag} --diffusion.num-timesteps 500"
        )
        assert run_command(command.split()) == 0
        config = json.loads(Path(f"{expected}/config.json").read_text())["config"]
        assert config["diffusion"]["rescale_betas"] is expected


def test_short_chains_with_beta_warn_in_one_line(place):
    command = SAMPLE + " --num-images 1 --batch-size 1 --sampler ddpm --num-steps 3 --variance beta"
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_lab", *command.split()], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == [
        "warning: variance beta with 3 of 1000 steps leaves noise in the images; beta_tilde does not"
    ]


def test_a_warning_comes_before_the_work_and_never_beside_an_error(place):
    """A network that warns when built: refused for another reason it gives one line; trained, it warns first."""
    command = [sys.executable, "-m", "ddpm_lab", *TRAIN.split(), "--model.norm-groups", "32"]
    wrong = [word if word != "new" else "run" for word in command]
    refused = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: run run exists with model.norm_groups 8, not 32")
    trained = subprocess.run(
        [*command, "--training.num-steps", "1"], capture_output=True, text=True, check=True, timeout=60
    )
    assert trained.stderr.splitlines()[0].startswith("warning: model.norm_groups of 32 equals the channels of a level")


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["data"], ["train"], ["sample"], ["info"], ["study"], ["forward"], ["reverse"]]
)
def test_help_names_every_option_and_default(command, capsys):
    assert run_command([*command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Usage: ddpm" in text
    if command == ["train"]:
        assert "[default: 800000]" in text
        assert all(name in text for name in RECIPES)
        assert ".no-rescale-betas" in text
    if command == ["study"]:
        assert all(name in text for name in STUDIES)


def test_help_imports_nothing_heavy():
    """`ddpm --help` answers at once because torch, numpy and the like are imported inside commands."""
    code = "import sys; from ddpm_lab.cli.main import run_command; run_command(['--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "PIL", "sklearn", "safetensors", "requests"):
        assert f"'{heavy}'" not in out


def test_absent_data_is_an_error_in_time(tmp_path):
    """Without a network, or with one, the answer comes; here the mirrors' names lead nowhere."""
    code = (
        "from ddpm_lab.data import datasets; datasets.MNIST_MIRRORS = ('http://127.0.0.1:9/', 'http://mirror.invalid/');"
        f"from ddpm_lab.cli.main import main; main(['data', 'mnist', '--data-dir', {str(tmp_path)!r}])"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - begun < 20
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: train-images-idx3-ubyte.gz is not in")
    assert "127.0.0.1:9" in line
    assert "DDPM_DATA_DIR" in line


@pytest.mark.slow
def test_a_command_that_is_terminated_ends_as_by_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "ddpm_lab", "sample", "mnist", "--num-images", "100000", "--out", "many.npz"]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "sampling" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "error: interrupted"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_work_continues_when_nobody_reads_its_progress(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr("ddpm_lab.core.progress.PLAIN_INTERVAL_SECONDS", 0.0)
    with progress("counting", 3, "sheep") as advance:
        for _ in range(3):
            advance(1)
    assert run_command(["info", "nothing"]) == 2


def test_the_demo_is_the_study_of_digits(tmp_path, monkeypatch):
    from ddpm_lab.studies import study

    calls = []
    monkeypatch.setattr(study, "run_study", lambda *given, **more: calls.append((given, more)))
    assert run_command(["demo", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    (((found, out), more),) = calls
    assert (found.name, out, more["device"]) == ("digits", tmp_path / "demo", "cpu")

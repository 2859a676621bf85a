"""Damage every kind of file that ddpm-lab reads, at random, and check that each command ends with one clear line.

    python scripts/fuzz.py --minutes 60 --seed 0 [--only NAME ...] --out DIR

A try damages one file of a sound set, runs a command on it within this process, and expects exit code 0 or 1, or 2
with exactly one line that begins with `error: `. For any other result (an exception, a second line, another code) the
damaged file and the error are kept under DIR. Try number k of a seed is always the same.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_lab.cli.main import run_command
from ddpm_lab.data.datasets import load_images

RECIPE = """
[data]
dataset = "digits"
[model]
base_channels = 8
channel_multipliers = [1, 2]
num_blocks = 1
attention_levels = [1]
norm_groups = 4
[diffusion]
num_timesteps = 50
schedule = "cosine"
[training]
num_steps = 2
batch_size = 4
log_every = 1
[evaluation]
validation_images = 8
sample_images = 1
sample_steps = 1
"""
STUDY = """
recipe = "recipe.toml"
question = "Which?"
[grid]
num_timesteps = [50, 60]
[measures]
checkpoints = 1
images = 20
final_images = 20
samplers = ["ddim-5", "ddim-50"]
ancestral_images = 20
bound_images = 2
[settings.training]
num_steps = 2
batch_size = 4
"""
SECONDS = 20  # time limit of a try


@dataclass(frozen=True)
class Target:
    """A file to damage, below the sound set, and the command that reads it."""

    file: str
    command: list[str]
    damage: Callable[[random.Random, bytes], bytes]
    hashed: str = ""  # its name in the meta.json beside it, which is updated, so that the file reaches the parser


def any_bytes(rng: random.Random, content: bytes) -> bytes:
    """One to four changes: bits flipped, pieces removed, doubled, zeroed or inserted, or the end removed."""
    held = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(held) + 1)
        # the structure of a file is at its beginning
        at = min(at, rng.choice([16, 256, 4096, 1 << 40]))
        length = rng.choice([1, 2, 4, 8, 100, 1000])
        kind = rng.randrange(7)
        if kind == 0 and at < len(held):
            held[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del held[at : at + length]
        elif kind == 2:
            held[at:at] = held[at : at + length]
        elif kind == 3:
            held[at : at + length] = bytes(len(held[at : at + length]))
        elif kind == 4:
            held[at:at] = rng.randbytes(length)
        elif kind == 5:
            del held[at:]
        elif at < len(held):
            held[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"])
    return bytes(held)


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e308, 10**30, 2**63, float("nan"), float("inf"), "", "x", "inf", "cosine",
    [], [0], [1, 2, 3], {}, {"a": 1}, "../../..", "\x00", "ü", [[]], [None], "1e5",
]  # fmt: skip


def any_json(rng: random.Random, content: bytes) -> bytes:
    """A value of the tree changed, removed or inserted; or damaged bytes."""
    if rng.random() < 0.25:
        return any_bytes(rng, content)
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    row = rng.randrange(len(lines))
    tree = json.loads(lines[row])
    for _ in range(rng.randint(1, 3)):
        tree = _change(rng, tree)
    lines[row] = json.dumps(tree)
    return ("\n".join(lines) + "\n").encode()


def _change(rng: random.Random, tree: Any) -> Any:
    if rng.random() < 0.25 or not isinstance(tree, dict | list) or not tree:
        return rng.choice(ODD)
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        return [*tree[:at], _change(rng, tree[at]), *tree[at + 1 :]]
    name = rng.choice(sorted(tree))
    if rng.random() < 0.15:
        return {key: value for key, value in tree.items() if key != name}
    if rng.random() < 0.05:
        return tree | {rng.choice(["", "x", "seed"]): rng.choice(ODD)}
    return tree | {name: _change(rng, tree[name])}


def any_toml(rng: random.Random, content: bytes) -> bytes:
    """The value of a line changed, or a line doubled, removed or moved; or damaged bytes."""
    if rng.random() < 0.25:
        return any_bytes(rng, content)
    lines = content.decode().splitlines()
    for _ in range(rng.randint(1, 2)):
        row = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0:
            del lines[row]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[row])
        else:
            name = lines[row].partition("=")[0].strip() or "x"
            values = [
                "true",
                "0",
                "-1",
                "3",
                "1e400",
                "nan",
                '""',
                '"x"',
                "[]",
                "[1]",
                "[0, -1]",
                "{}",
                "1979-05-27",
                "7.5",
                '"v"',
                "[[2]]",
            ]
            lines[row] = f"{name} = {rng.choice(values)}"
    return "\n".join(lines).encode()


def any_header(rng: random.Random, content: bytes) -> bytes:
    """An .npz with another size, dtype, order or shape in the header of an array, consistent with its data or not."""
    with np.load(io.BytesIO(content)) as held:
        arrays = dict(held)
    chosen, packed = rng.choice(sorted(arrays)), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
            data = array.tobytes()
            if name == chosen:
                sides = [rng.choice([0, 1, 2, 3, 7, 300, 5000, 2**31, 2**62]) for _ in range(rng.randint(0, 5))]
                kept = [rng.choice([side, *sides]) if sides else side for side in array.shape]
                header["shape"] = tuple(rng.choice([sides, kept]))
                header["descr"] = rng.choice([array.dtype.str, "|u1", "<f8", "<f2", "|O", "<U9", "<M8[s]", "|V3"])
                header["fortran_order"] = rng.random() < 0.5
                size = int(np.prod([float(side) for side in header["shape"]])) if header["shape"] else 1
                if rng.random() < 0.5 and size < 2**26:
                    data = bytes(size * np.dtype(header["descr"]).itemsize)
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array_header_2_0(stream, header)
                stream.write(data)
    return packed.getvalue()


def save_other_formats(sound: Path, images: torch.Tensor) -> None:
    """Save pictures of every named format and mode, arrays of other projects, and an archive of CIFAR-10."""
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    for place, made in {
        "rgba/a.png": (colour, {}),
        "palette/a.png": (colour.convert("RGB").quantize(16), {"transparency": 3}),
        "gif/a.gif": (colour.convert("RGB").quantize(16), {}),
        "webp/a.webp": (colour, {"lossless": True}),
        "tiff/a.tif": (Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16)), {}),
        "jpeg/a.jpg": (colour.convert("RGB"), {}),
        "ppm/a.ppm": (colour.convert("RGB"), {}),
        "avif/a.avif": (colour.convert("RGB"), {}),
    }.items():
        (sound / "formats" / place).parent.mkdir(parents=True)
        made[0].save(sound / "formats" / place, **made[1])
        for index in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                (sound / "formats" / place).parent / f"{index}.png"
            )
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.savez(sound / "fortran.npz", images=np.asfortranarray(pixels))
    np.savez(sound / "batch.npz", arr_0=pixels, mu=np.zeros(64), sigma=np.eye(64))
    (sound / "data" / "cifar10").mkdir(parents=True, exist_ok=True)
    with tarfile.open(sound / "data" / "cifar10" / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 3073 * 4
            tar.addfile(member, io.BytesIO(bytes(member.size)))


def prepare(sound: Path) -> list[Target]:
    """Write one sound file of each kind; returns the files with the commands that read them."""
    (sound / "recipe.toml").write_text(RECIPE)
    (sound / "study.toml").write_text(STUDY)
    run, device = str(sound / "run"), ["--device", "cpu"]
    quietly(["train", str(sound / "recipe.toml"), "--run", run, *device])
    quietly(["study", str(sound / "study.toml"), "--out", str(sound / "study"), "--cell", "0", *device])
    samples = ["sample", "SOUND/run", "--num-images", "2", "--num-steps", "1", "--batch-size", "2", *device, "--out"]
    quietly([part.replace("SOUND", str(sound)) for part in [*samples, "SOUND/samples"]])
    images = load_images("digits", "test").images[:40]
    np.savez(sound / "images.npz", images=images.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(sound / "packed.npz", images=images.permute(0, 2, 3, 1).numpy())
    factor = np.random.default_rng(0).standard_normal((64, 64))
    np.savez(sound / "statistics.npz", mu=np.zeros(64), sigma=factor @ factor.T)
    (sound / "pictures").mkdir()
    for index, image in enumerate(images[:20]):
        Image.fromarray(image[0].numpy()).save(sound / "pictures" / f"{index:02d}.png")
    Image.fromarray(images[0, 0].numpy()).save(sound / "pictures" / "20.bmp")
    save_other_formats(sound, images)
    (sound / "data" / "mnist").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 60), ("t10k", 10)):  # not the official files, which their hash identifies
        head = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        held = head + bytes(count * 784)
        (sound / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(held, 1))
        labels = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(count)
        (sound / "data" / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    (sound / "classifier").mkdir()
    from ddpm_lab.evaluation.classifier import PACKAGED

    shutil.copy(PACKAGED["digits"], sound / "classifier" / "classifier.safetensors")

    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(sound / "pipeline")
    assert quietly(["sample", str(sound / "pipeline"), "--num-steps", "1", "--out", str(sound / "x.png")])[0] == 0
    labelled = [
        part.replace("SOUND", str(sound)) for part in ["train", "SOUND/recipe.toml", "--run", "SOUND/labelled", *device]
    ]
    assert quietly([*labelled, "--model.num-classes", "10"])[0] == 0
    plain = ["--diffusion.num-timesteps", "1000", "--diffusion.schedule", "linear", "--evaluation.score-every", "2"]
    plain += ["--evaluation.score-images", "20", "--evaluation.sample-steps", "2"]
    assert quietly([*labelled[:2], "--run", str(sound / "plain"), *device, *plain])[0] == 0
    export = ["export", "SOUND/plain", "--to", "diffusers", "--out", "SOUND/new"]
    assert quietly([part.replace("SOUND", str(sound)) for part in [*export[:-1], "SOUND/exported"]])[0] == 0
    fine_tuning = ["train", "SOUND/recipe.toml", "--run", "SOUND/new", "--from", "SOUND/run", *device]

    last = "run/checkpoints/step_00000002"
    score = ["--reference", "digits:train", "--features", "classifier", "--metrics", "fid", "is", *device]
    drawn = [*samples, "SOUND/x.png"]
    train = ["train", "SOUND/recipe.toml", "--run", "SOUND/run", *device]
    cell = "study/cells/T50-rescaled-seed0"
    taken = ["import", "SOUND/pipeline", "--run", "SOUND/new"]
    checkpoint = sound / "pipeline" / "checkpoint-500" / "unet_ema"
    shutil.copytree(sound / "pipeline" / "unet", checkpoint)
    shutil.copytree(sound / "run" / "checkpoints", sound / "run" / "averages", dirs_exist_ok=True)
    guided = [*drawn, "--guide", "SOUND/run/averages/step_00000002", "--guidance", "2"]
    of_average = ["sample", "SOUND/pipeline/checkpoint-500/unet_ema", "--num-steps", "1", "--num-images", "2", *device]
    of_average += ["--out", "SOUND/x.png"]
    shown = ["--num-images", "2", "--columns", "2", "--out", "SOUND/x.png"]
    formats = [
        Target(name, ["forward", "--dataset", f"SOUND/{Path(name).parent}", *shown], any_bytes)
        for name in sorted(str(path.relative_to(sound)) for path in (sound / "formats").glob("*/a.*"))
    ]
    reference = ["evaluate", "digits:test", "--reference", "SOUND/batch.npz", "--features", "classifier", *device]
    of_pipeline = ["sample", "SOUND/pipeline", "--num-images", "2", "--num-steps", "1", *device, "--out", "SOUND/x.png"]
    return [
        *formats,
        Target("fortran.npz", ["evaluate", "SOUND/fortran.npz", *score], any_bytes),
        Target("images.npz", ["evaluate", "SOUND/images.npz", *score], any_header),
        Target("fortran.npz", ["evaluate", "SOUND/fortran.npz", *score], any_header),
        Target("batch.npz", [*reference, "--metrics", "fid", "kid"], any_header),
        Target("statistics.npz", ["evaluate", "digits:test", "--reference", "SOUND/statistics.npz", "--features", "classifier", "--metrics", "fid", *device], any_header),
        Target("data/cifar10/cifar-10-binary.tar.gz", ["data", "cifar10", "--data-dir", "SOUND/data"], any_bytes),
        Target("pipeline/scheduler/scheduler_config.json", of_average, any_json),
        Target("run/averages/step_00000002/meta.json", guided, any_json),
        Target("run/averages/step_00000002/ema.safetensors", guided, any_bytes, "ema.safetensors"),
        Target("pipeline/model_index.json", taken, any_json),
        Target("pipeline/unet/config.json", taken, any_json),
        Target("pipeline/unet/config.json", of_pipeline, any_json),
        Target("pipeline/scheduler/scheduler_config.json", taken, any_json),
        Target("pipeline/unet/diffusion_pytorch_model.safetensors", of_pipeline, any_bytes),
        Target("labelled/config.json", ["sample", "SOUND/labelled", "--num-steps", "1", "--num-images", "2", "--class", "3", *device, "--out", "SOUND/x.png"], any_json),
        Target("plain/config.json", export, any_json),
        Target("plain/scores.jsonl", export, any_json),
        Target("plain/scores.jsonl", ["curves", "training", "SOUND/plain", "--out", "SOUND/x.png"], any_json),
        Target("run/config.json", fine_tuning, any_json),
        Target("recipe.toml", ["train", "SOUND/recipe.toml", "--run", "SOUND/new", *device], any_toml),
        Target("study.toml", ["study", "SOUND/study.toml", "--out", "SOUND/new", "--cell", "999"], any_toml),
        Target("run/config.json", drawn, any_json),
        Target("run/config.json", ["info", "SOUND/run"], any_json),
        Target("run/config.json", train, any_json),
        Target("run/log.jsonl", train, any_json),
        Target("run/log.jsonl", ["curves", "training", "SOUND/run", "--out", "SOUND/x.png"], any_json),
        Target(f"{last}/meta.json", drawn, any_json),
        Target(f"{last}/ema.safetensors", drawn, any_bytes),
        Target(f"{last}/ema.safetensors", drawn, any_bytes, "ema.safetensors"),
        Target(f"{last}/optimizer.safetensors", train, any_bytes, "optimizer.safetensors"),
        Target("samples/sampling.json", [*samples, "SOUND/samples"], any_json),
        Target("images.npz", ["evaluate", "SOUND/images.npz", *score], any_bytes),
        Target("packed.npz", ["evaluate", "SOUND/packed.npz", *score], any_bytes),
        Target("statistics.npz", ["evaluate", "digits:test", "--reference", "SOUND/statistics.npz", "--features", "classifier", "--metrics", "fid", *device], any_bytes),
        Target("pictures/07.png", ["evaluate", "SOUND/pictures", *score], any_bytes),
        Target("pictures/20.bmp", ["evaluate", "SOUND/pictures", *score], any_bytes),
        Target("data/mnist/train-images-idx3-ubyte.gz", ["data", "mnist", "--data-dir", "SOUND/data"], any_bytes),
        Target("data/mnist/train-labels-idx1-ubyte", ["data", "mnist", "--data-dir", "SOUND/data"], any_bytes),
        Target("classifier/classifier.safetensors", ["evaluate", "SOUND/images.npz", *score[:2], "--features", "SOUND/classifier", "--metrics", "fid", *device], any_bytes),
        Target("study/study.json", ["report", "SOUND/study"], any_json),
        Target(f"{cell}/measures.jsonl", ["report", "SOUND/study"], any_json),
        Target(f"{cell}/done.json", ["report", "SOUND/study"], any_json),
        Target(f"{cell}/config.json", ["report", "SOUND/study"], any_json),
        Target(f"{cell}/log.jsonl", ["report", "SOUND/study"], any_json),
        Target(f"{cell}/scores.jsonl", ["report", "SOUND/study"], any_json),
    ]  # fmt: skip


def quietly(command: list[str]) -> tuple[int, str]:
    """Run a command in this process; its exit code and its output on stderr."""
    output = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        code = run_command(command)
    return code, output.getvalue()


def attempt(target: Target, sound: Path, place: Path, rng: random.Random) -> tuple[str, str]:
    """One try: an empty text and the result if all is right, else a description of the fault and an empty text."""
    shutil.copytree(sound, place)
    path = place / target.file
    damaged = target.damage(rng, path.read_bytes())
    path.write_bytes(damaged)
    if target.hashed:
        import hashlib

        meta = json.loads((path.parent / "meta.json").read_text())
        meta["sha256"][target.hashed] = hashlib.sha256(damaged).hexdigest()
        (path.parent / "meta.json").write_text(json.dumps(meta))
    command = [part.replace("SOUND", str(place)) for part in target.command]

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError("too long")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        code, output = quietly(command)
    except TimeoutError:
        return "", "given up"
    except BaseException:
        return traceback.format_exc(), ""
    finally:
        signal.alarm(0)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if "too long" in output:
        return "", "given up"
    if code == 2 and (len(errors) != 1 or output.count("\n") != 1):
        return f"exit code 2 and not one line:\n{output}", ""
    if code not in (0, 1, 2) or "Traceback" in output:
        return f"exit code {code}:\n{output}", ""
    return "", f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the faults")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    ended: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as held:
        os.environ["DDPM_CACHE_DIR"] = f"{held}/cache"
        sound = Path(held) / "sound"
        sound.mkdir()
        targets = [t for t in prepare(sound) if not arguments.only or any(part in t.file for part in arguments.only)]
        for target in targets:
            code, output = quietly([part.replace("SOUND", str(sound)) for part in target.command])
            print(f"sound: {target.file}: exit code {code} {output.strip().splitlines()[-1:] or ''}", flush=True)
            shutil.rmtree(sound / "new", ignore_errors=True)
        until, number = time.monotonic() + 60 * arguments.minutes, 0
        while time.monotonic() < until:
            target = targets[number % len(targets)]
            place = Path(held) / "place"
            wrong, ending = attempt(target, sound, place, random.Random(f"{arguments.seed} {number}"))
            if wrong:
                last = wrong.strip().splitlines()[-1]
                key = f"{target.file}: {target.command[0]}: {last[:160]}"
                faults[key] += 1
                if faults[key] == 1:
                    kept = arguments.out / f"{Path(target.file).name}-{arguments.seed}-{number}"
                    shutil.rmtree(kept, ignore_errors=True)
                    kept.mkdir()
                    shutil.copy(place / target.file, kept)
                    (kept / "what.txt").write_text(f"{' '.join(target.command)}\n{wrong}")
                    print(f"FOUND {key}", flush=True)
            else:
                ended[f"{target.file}: {ending}"] += 1
            shutil.rmtree(place)
            number += 1
            if number % 500 == 0:
                print(f"{number} tries, {sum(faults.values())} faults of {len(faults)} kinds", flush=True)
    for name, count in sorted(ended.items()):
        print(f"{count:6d}  {name}")
    print(f"{number} tries of seed {arguments.seed}: {sum(faults.values())} faults of {len(faults)} kinds")
    for name, count in faults.most_common():
        print(f"{count:6d}  {name}")


if __name__ == "__main__":
    main()

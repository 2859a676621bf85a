"""Kill train, sample, evaluate and study at random moments, restart them, and compare the results.

    python scripts/kills.py --kills 50 --seed 0

Each command runs once undisturbed. Then it is killed (SIGKILL) and started again until it ends by itself, once or more. Its
result must equal that of the undisturbed command, byte for byte, or for scores number for number; if not, exit code 1.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = ["--model.base-channels", "8", "--model.channel-multipliers", "1", "2", "--model.attention-levels", "1"]
STEPS = ["--training.num-steps", "300", "--training.checkpoint-every", "7", "--device", "cpu"]
STEPS += ["--evaluation.score-every", "100", "--evaluation.score-images", "40"]
SCORED = ["--num-images", "400", "--features", "classifier", "--metrics", "fid", "is", "kid", "--seed", "1"]
STUDY = """
recipe = "digits"
question = "Which?"
[grid]
num_timesteps = [50, 60]
[measures]
checkpoints = 2
images = 40
final_images = 40
samplers = ["ddim-5", "ddim-50"]
ancestral_images = 20
bound_images = 4
[settings.training]
num_steps = 60
checkpoint_every = 5
[settings.model]
base_channels = 8
"""


def files(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of files, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)
    }


def record(path: Path) -> list[dict[str, Any]]:
    """The different scores of JSON lines, without entries that depend on time or place.

    `evaluate` appends a line at each call, so a call that is killed after it leaves an equal line.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scores = ("fid", "inception_score", "kid", "floor")
    found = [{name: line.get(name) for name in scores} | {"images": line["images"]["sha256"]} for line in lines]
    return [one for index, one in enumerate(found) if one not in found[:index]]


def results(path: Path) -> list[dict[str, Any]]:
    """Records of a study, without entries that depend on time or place."""
    volatile = {"seconds", "seconds_an_image", "seconds_an_evaluation", "source", "images"}
    return [{k: v for k, v in one.items() if k not in volatile} for one in json.loads(path.read_text())]


def commands(place: Path) -> dict[str, tuple[list[str], Callable[[], Any], list[Path]]]:
    """By name: the command, a function that returns its result, and the files to delete before a new start."""
    run, samples, scores, study = place / "run", place / "samples", place / "scores.jsonl", place / "study"
    (place / "study.toml").write_text(STUDY)
    sampled = ["--batch-size", "8", "--num-steps", "20", "--device", "cpu"]
    return {
        "train": (
            ["train", "digits", "--run", str(run), *STEPS, *TINY],
            lambda: files(run, "checkpoints/step_00000300/*") | {"scores": str(record(run / "scores.jsonl"))},
            [run],
        ),
        "sample": (
            ["sample", str(run), "--num-images", "300", "--out", str(samples), *sampled],
            lambda: files(samples, "*.png"),
            [samples],
        ),
        "evaluate": (
            ["evaluate", str(run), *SCORED, "--scores", str(scores), *sampled],
            lambda: record(scores),
            [scores, place / "cache"],
        ),
        "study": (
            ["study", str(place / "study.toml"), "--out", str(study), "--device", "cpu"],
            lambda: results(study / "results.json"),
            [study, place / "cache"],
        ),
    }


def start(command: list[str], cache: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DDPM_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "ddpm_lab", *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto", help="of training, such as fp16")
    parser.add_argument("--only", help="one of train, sample, evaluate, study; the others run undisturbed")
    arguments = parser.parse_args()
    STEPS.extend(["--training.precision", arguments.precision])
    rng = random.Random(arguments.seed)
    differences = kills = 0
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "one"), Path(folder, "other")
        undisturbed.mkdir()
        disturbed.mkdir()
        pairs = zip(commands(undisturbed).items(), commands(disturbed).values(), strict=True)
        for index, ((name, (command, result, _)), (killed_command, killed_result, outputs)) in enumerate(pairs):
            begin = time.monotonic()
            process = start(command, undisturbed / "cache")
            stderr = process.communicate()[1].decode()
            if process.returncode:
                sys.exit(f"{name}: the undisturbed one ended with {process.returncode}: {stderr}")
            seconds = time.monotonic() - begin
            quota, own_kills, ends = arguments.kills * (index + 1) // 4, 0, 0
            if arguments.only is not None:
                quota = arguments.kills if name == arguments.only else kills
            while True:
                process = start(killed_command, disturbed / "cache")
                after = rng.uniform(0, seconds) if kills < quota else None
                try:
                    stderr = process.communicate(timeout=after)[1].decode()
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills, own_kills = kills + 1, own_kills + 1
                    continue
                if process.returncode:
                    sys.exit(f"{name}: after {own_kills} kills it ended with {process.returncode}: {stderr}")
                ends += 1
                if result() != killed_result():
                    differences += 1
                    print(f"{name}: {result()}\nand after kills: {killed_result()}", flush=True)
                if kills >= quota:
                    break
                for path in outputs:  # start again from the beginning
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(
                f"{name}: {own_kills} kills, {ends} ends, undisturbed {seconds:.1f} s; {differences} differences so far",
                flush=True,
            )
    print(f"{kills} kills, {differences} differences")
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()

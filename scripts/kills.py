"""Kill train, sample, evaluate and study at random moments, again and again, and compare what comes out in the end.

    python scripts/kills.py --kills 50 --seed 0

Each command runs once undisturbed; then it is killed (SIGKILL) and started again until it ends by itself, once or more, and
what it made must equal what the undisturbed one made, byte for byte, or for scores number for number. Exit code 1 where it does not.
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
    """Different scores of JSON lines, without what the clock or the place decides.

    `evaluate` adds a line whenever it is called, so one killed after its line was written leaves another equal one.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scores = ("fid", "inception_score", "kid", "floor")
    found = [{name: line.get(name) for name in scores} | {"images": line["images"]["sha256"]} for line in lines]
    return [one for index, one in enumerate(found) if one not in found[:index]]


def results(path: Path) -> list[dict[str, Any]]:
    """Records of a study, without what the clock or the place decides."""
    volatile = {"seconds", "seconds_an_image", "seconds_an_evaluation", "source", "images"}
    return [{k: v for k, v in one.items() if k not in volatile} for one in json.loads(path.read_text())]


def commands(place: Path) -> dict[str, tuple[list[str], Callable[[], Any], list[Path]]]:
    """What is run in a folder of its own, what is compared, and what is removed to begin anew."""
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
    parser.add_argument("--only", help="one of train, sample, evaluate, study; what it needs runs undisturbed")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    wrong = kills = 0
    with tempfile.TemporaryDirectory() as held:
        undisturbed, disturbed = Path(held, "one"), Path(held, "other")
        undisturbed.mkdir()
        disturbed.mkdir()
        pairs = zip(commands(undisturbed).items(), commands(disturbed).values(), strict=True)
        for index, ((name, (command, made, _)), (again, made_again, outputs)) in enumerate(pairs):
            begun = time.monotonic()
            process = start(command, undisturbed / "cache")
            said = process.communicate()[1].decode()
            if process.returncode:
                sys.exit(f"{name}: the undisturbed one ended with {process.returncode}: {said}")
            lasted = time.monotonic() - begun
            quota, own, ended = given.kills * (index + 1) // 4, 0, 0
            if given.only is not None:
                quota = given.kills if name == given.only else kills
            while True:
                process = start(again, disturbed / "cache")
                after = chance.uniform(0, lasted) if kills < quota else None
                try:
                    said = process.communicate(timeout=after)[1].decode()
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills, own = kills + 1, own + 1
                    continue
                if process.returncode:
                    sys.exit(f"{name}: after {own} kills it ended with {process.returncode}: {said}")
                ended += 1
                if made() != made_again():
                    wrong += 1
                    print(f"{name}: {made()}\nand after kills: {made_again()}", flush=True)
                if kills >= quota:
                    break
                for path in outputs:  # once more from the beginning
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(
                f"{name}: {own} kills, {ended} ends, undisturbed {lasted:.1f} s; {wrong} differences so far", flush=True
            )
    print(f"{kills} kills, {wrong} differences")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

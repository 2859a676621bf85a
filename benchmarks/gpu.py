"""Everything there is to measure on a GPU, in one command that goes on where it was stopped.

    python -m benchmarks.gpu --out gpu/              # the paper's network and CIFAR-10: about 25 minutes of a fast GPU
    python -m benchmarks.gpu --out gpu/ --only training
    python -m benchmarks.gpu --out dry/ --dry-run    # the same parts on a CPU with 8x8 digits, to try them

Each part leaves gpu/PART.json; parts that are there are not measured again.

    equality    the network on the device against the CPU, compiled against not, bfloat16 against float32
    training    images/s of training steps: ours as `ddpm train` takes them, not compiled, with CUDA graphs, in
                float32; and diffusers' example in bfloat16 and float32. In turns, warm-up excluded
    train       `ddpm train` itself from the shell: images/s by its log, and the time of its checkpoints
    sampling    images/s of 20 evaluations by DPM-Solver++: plain, compiled, with CUDA graphs; then 50,000 images from
                the shell
    profile     where a training step's time goes, by kernel
    bench       `python -m benchmarks`, every case that fits
"""

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.contest import OURS, Contest, conditions, installed_peers, run_contest, table
from benchmarks.peers import diffusers_peer
from benchmarks.scaling import DDPM, cost_of
from ddpm_lab.core.config import Config, SamplingConfig, load_recipe
from ddpm_lab.core.device import autocast, resolve_device
from ddpm_lab.core.errors import RunError
from ddpm_lab.core.files import replace_atomically
from ddpm_lab.core.log import read_lines
from ddpm_lab.data.datasets import load_images
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling import generation
from ddpm_lab.training import loop as training
from ddpm_lab.training.loop import TrainingStep, new_state, training_loop

GRAPHS = functools.partial(torch.compile, dynamic=False, mode="reduce-overhead")  # with CUDA graphs


class Measurements:
    """The parts, on one device and recipe."""

    def __init__(self, out: Path, device: str, recipe: str, steps: int, images: int) -> None:
        self.out, self.on, self.recipe = out, resolve_device(device), recipe
        self.config: Config = load_recipe(recipe)
        self.steps, self.images = steps, images
        self.data = load_images(self.config.data.dataset).images.to(self.on)
        self.shape: tuple[int, int, int] = tuple(self.data.shape[1:])  # type: ignore[assignment]
        self.schedule = build_schedule(self.config.diffusion)

    def build(self, device: torch.device) -> UNet:
        torch.manual_seed(0)
        model = build_unet(self.config.model, self.shape[0], self.shape[1], self.schedule.num_timesteps)
        for parameter in model.parameters():  # as built, the last layer is zero, and everything equal
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        model = model.to(device)
        return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model

    def equality(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(16, *self.shape, generator=generator)
        t = torch.randint(self.schedule.num_timesteps, (16,), generator=generator)
        here = self.build(self.on).eval()
        with torch.no_grad():
            expected = self.build(torch.device("cpu")).eval()(x_t, t)
            x_t, t = x_t.to(self.on), t.to(self.on)
            outputs = {"device": here(x_t, t), "compiled": training.compiled(here)(x_t, t)}
            with autocast(self.on, torch.bfloat16):
                outputs["bfloat16"] = here(x_t, t)
        scale = float(expected.abs().max())
        return {
            "largest_output": scale,
            "largest_difference_from_cpu": {
                k: float((o.float().cpu() - expected).abs().max()) for k, o in outputs.items()
            },
        }

    def training(self) -> dict[str, Any]:
        batch = self.config.training.batch_size
        wait = torch.cuda.synchronize if self.on.type == "cuda" else lambda: None

        def ours(**settings: Any) -> Callable[[], object]:
            config = replace(self.config, training=replace(self.config.training, num_steps=10**9, **settings))
            loop = training_loop(new_state(self.build(self.on), config.training), self.schedule, self.data, config)
            return lambda: [next(loop) for _ in range(self.steps)]

        def graphs() -> Callable[[], object]:
            act = ours(compile="yes")

            def turn() -> list[TrainingStep]:
                before, training.compiled = training.compiled, GRAPHS  # type: ignore[assignment]
                try:
                    return act()  # type: ignore[return-value]
                finally:
                    training.compiled = before

            return turn

        def theirs(dtype: torch.dtype) -> Callable[[], object]:
            x_0 = training.to_float(self.data[:batch])
            step = diffusers_peer(self.build(self.on), self.shape, dtype, lambda: x_0).step
            return lambda: [step() for _ in range(self.steps)]

        contestants = {
            OURS: ours(),
            f"{OURS}, not compiled": ours(compile="no"),
            f"{OURS}, compiled": ours(compile="yes"),
            f"{OURS}, CUDA graphs": graphs(),
            f"{OURS}, float32": ours(precision="float32"),
        }
        if "diffusers" in installed_peers() and self.config.model.patch_size == 1:
            contestants["diffusers"] = theirs(torch.bfloat16)
            contestants["diffusers in float32, its default"] = theirs(torch.float32)
        record = run_contest(
            Contest(f"training, {self.recipe}", "images", batch * self.steps, contestants), 3, wait=wait
        )
        print("\n".join(table(record)), flush=True)
        return record | {"mebibytes": self._memory()}

    def train(self) -> dict[str, Any]:
        run, steps = self.out / "run", 6 * self.steps
        shutil.rmtree(run, ignore_errors=True)
        flags = {"num-steps": steps, "log-every": self.steps, "checkpoint-every": 2 * self.steps, "keep-checkpoints": 1}
        settings = [word for name, value in flags.items() for word in (f"--training.{name}", str(value))]
        cost = cost_of((*DDPM, "train", self.recipe, *settings, "--run", str(run), "--device", self.on.type))
        log = read_lines(run / "log.jsonl")
        assert checkpoint_steps(run) == [steps]
        return {
            "images_per_second": [line["images_per_second"] for line in log],
            "with_a_checkpoint": [line["step"] % (2 * self.steps) == 0 for line in log],
            "seconds": cost.seconds,
        }

    def sampling(self) -> dict[str, Any]:
        model = self.build(self.on).eval()
        trained = TrainedModel(self.recipe, self.config, model, self.schedule, self.shape, 0, "ema", self.out, {})
        wait = torch.cuda.synchronize if self.on.type == "cuda" else lambda: None
        size = min(500, self.images)

        def ours(engine: str) -> Callable[[], object]:
            sampling = SamplingConfig(
                sampler="dpmpp", num_steps=20, batch_size=size, precision="auto",
                engine="torch" if engine == "torch" else "compile",
            )  # fmt: skip
            before = generation.compiled
            if engine == "graphs":
                generation.compiled = GRAPHS  # type: ignore[assignment]
            task = generation.sampling_task(trained, sampling)
            task((0, size, size))  # the network is compiled at its first use
            generation.compiled = before
            return lambda: task((0, size, size))

        engines = {OURS: "torch", f"{OURS}, compiled": "compile", f"{OURS}, CUDA graphs": "graphs"}
        contestants = {name: ours(engine) for name, engine in engines.items()}
        record = run_contest(Contest("sampling, 20 evaluations", "images", size, contestants), 3, wait=wait)
        print("\n".join(table(record)), flush=True)
        run = self.out / "run"
        if not checkpoint_steps(run):
            raise RunError("sampling from the shell needs the part `train` first")
        for name in ("images.npz", "images"):
            shutil.rmtree(self.out / name, ignore_errors=True)
            flags = ("--num-images", str(self.images), "--sampler", "dpmpp", "--num-steps", "20", "--precision", "auto")
            flags += ("--engine", "compile", "--batch-size", str(size), "--device", self.on.type)
            cost = cost_of((*DDPM, "sample", str(run), *flags, "--out", str(self.out / name)))
            record[f"seconds_from_the_shell_into_{name}"] = cost.seconds
        shutil.rmtree(self.out / "images")
        (self.out / "images.npz").unlink()
        return record | {"mebibytes": self._memory()}

    def profile(self) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        loop = training_loop(
            new_state(self.build(self.on), self.config.training), self.schedule, self.data, self.config
        )
        for _ in range(5):
            next(loop)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.on.type == "cuda")
        with profile(activities=activities) as profiler:
            for _ in range(5):
                next(loop)
            if self.on.type == "cuda":
                torch.cuda.synchronize()
        of = "self_device_time_total" if self.on.type == "cuda" else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, of))
        whole = sum(getattr(event, of) for event in events)
        return {
            "milliseconds_a_step": whole / 5000,
            "kernels": [
                {"name": e.key, "share": getattr(e, of) / whole, "calls_a_step": e.count / 5} for e in events[:30]
            ],
        }

    def bench(self) -> dict[str, Any]:
        small = self.recipe == "digits"
        network = "digits" if small else "cifar10"
        chosen: tuple[cases.Case, ...] = ("evaluation", "training", "sampling", "input")
        chosen += () if small else ("statistics", "scoring", "scaling")
        batch = self.config.training.batch_size
        return cases.run_cases(chosen, network, 3, batch, self.on.type, say=lambda line: print(line, flush=True))

    def _memory(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if self.on.type == "cuda" else None


PARTS = ("equality", "training", "train", "sampling", "profile", "bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.dry_run:
        measured = Measurements(given.out, "cpu", "digits", steps=2, images=8)
    else:
        measured = Measurements(given.out, "cuda", "cifar10", steps=50, images=50_000)
    for part in given.only:
        path = given.out / f"{part}.json"
        if path.exists():
            print(f"{path} is there", flush=True)
            continue
        begun = time.monotonic()
        record = {"part": part, "recipe": measured.recipe, "conditions": conditions(measured.on)}
        record |= getattr(measured, part)()
        record["seconds_of_part"] = time.monotonic() - begun
        replace_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
        print(f"{path}: {record['seconds_of_part']:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""Everything there is to measure on a GPU, in one command that goes on where it was stopped.

    python -m benchmarks.gpu --out gpu/              # the paper's network and CIFAR-10: about 25 minutes of a fast GPU
    python -m benchmarks.gpu --out gpu/ --only training noise files profile      # the most important: minutes
    python -m benchmarks.gpu --out dry/ --dry-run    # the same parts on a CPU with 8x8 digits, to try them

Each part leaves gpu/PART.json; parts that are there are not measured again.

    equality    the network on the device against the CPU, compiled against not, bfloat16 against float32
    training    images/s of training steps: ours as `ddpm train` takes them, in float32 with and without TF32, bfloat16,
                float16, compiled, with CUDA graphs, channels last; and diffusers' example in bfloat16 and float32 (the
                aim: twice as fast as it). In turns, warm-up excluded
    train       `ddpm train` itself: images/s by its log, and the time of its checkpoints
    sampling    images/s of 20 evaluations by DPM-Solver++: plain, compiled, with CUDA graphs; then 50,000 images by
                `ddpm sample`
    noise       images/s of 20 steps of Algorithm 2 at batches of 64 and 1,024, noise drawn ahead and when asked for
    files       images/s into a folder of PNG files by 1, 4 and 8 threads, from a sampler that takes no time; and of
                scoring them from the files and from memory, up to the features
    scoring     FID and Inception Score beside torch-fidelity (dry run: features by the classifier)
    profile     where a training step's time goes, by kernel; profile-trace.json opens in ui.perfetto.dev
    bench       `python -m benchmarks`, every case that fits
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler writes of GPUs that are not there

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.contest import OURS, Contest, conditions, installed_peers, run_contest, table
from benchmarks.peers import diffusers_peer
from ddpm_lab.cli.main import run_command
from ddpm_lab.core.config import Config, Precision, SamplingConfig, load_recipe
from ddpm_lab.core.device import autocast, resolve_device
from ddpm_lab.core.errors import RunError
from ddpm_lab.core.files import replace_atomically
from ddpm_lab.core.log import read_lines
from ddpm_lab.data.datasets import load_images
from ddpm_lab.data.image_stream import open_images, tensor_stream
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.evaluation.feature_store import features_of
from ddpm_lab.evaluation.features import classifier_network
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling import generation, output
from ddpm_lab.training import loop as training
from ddpm_lab.training.loop import new_state, training_loop


@contextlib.contextmanager
def tf32(matmul: bool = True) -> Iterator[None]:
    """Within it, convolutions in float32 use TF32, as PyTorch's default is, and products too if `matmul`."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32, cudnn.allow_tf32 = matmul, True
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def within(
    context: Callable[[], contextlib.AbstractContextManager[Any]], act: Callable[[], object]
) -> Callable[[], object]:
    """The same act, each time in a context of its own."""

    def turn() -> object:
        with context():
            return act()

    return turn


class Measurements:
    """The parts, on one device and recipe."""

    def __init__(self, out: Path, device: str, recipe: str, steps: int, images: int, dry: bool) -> None:
        self.out, self.on, self.recipe, self.dry = out, resolve_device(device), recipe, dry
        self.config: Config = load_recipe(recipe)
        if dry:
            self.config = replace(self.config, training=replace(self.config.training, batch_size=4))
        self.steps, self.images, self.turns = steps, images, 1 if dry else 3
        settings = {"dynamic": False} | ({"backend": "eager"} if dry else {})  # a dry run only traces
        graphs = {} if dry else {"mode": "reduce-overhead"}
        self.compiled = functools.partial(torch.compile, **settings)
        self.graphs = functools.partial(torch.compile, **settings, **graphs)
        self.wait = torch.cuda.synchronize if self.on.type == "cuda" else lambda: None
        self.data = load_images(self.config.data.dataset).images.to(self.on)
        self.shape: tuple[int, int, int] = tuple(self.data.shape[1:])  # type: ignore[assignment]
        self.schedule = build_schedule(self.config.diffusion)

    def build(self, device: torch.device) -> UNet:
        torch.manual_seed(0)
        model = build_unet(self.config.model, self.shape[0], self.shape[1], self.schedule.num_timesteps)
        for parameter in model.parameters():  # as built, the last layer is zero, and everything equal
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(device)

    def contest(self, case: str, amount: int, contestants: dict[str, Callable[[], object]]) -> dict[str, Any]:
        failed = {}
        for name, act in list(contestants.items()):
            try:
                act()
            except Exception as error:  # such as a lack of memory or of a compiler; the others are measured
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                print(f"{name} failed: {failed[name]}", flush=True)
                del contestants[name]
        record = run_contest(Contest(case, "images", amount, contestants), self.turns, wait=self.wait)
        print("\n".join(table(record)), flush=True)
        return record | {"failed": failed}

    def trained(self) -> TrainedModel:
        model = self.build(self.on).eval()
        return TrainedModel(
            self.recipe, self.config, model, self.schedule, self.shape, 0, "ema", self.out, {"data": {}}
        )

    def equality(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(16, *self.shape, generator=generator)
        t = torch.randint(self.schedule.num_timesteps, (16,), generator=generator)
        here = self.build(self.on).eval()
        with torch.no_grad():
            expected = self.build(torch.device("cpu")).eval()(x_t, t)
            x_t, t = x_t.to(self.on), t.to(self.on)
            outputs = {"device": here(x_t, t), "compiled": self.compiled(here)(x_t, t)}
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

        def ours(memory_format: Any = torch.contiguous_format, **settings: Any) -> Callable[[], object]:
            config = replace(self.config, training=replace(self.config.training, num_steps=10**9, **settings))
            model = self.build(self.on).to(memory_format=memory_format)
            loop = training_loop(new_state(model, config.training), self.schedule, self.data, config)
            return lambda: [next(loop) for _ in range(self.steps)]

        def theirs(dtype: torch.dtype) -> Callable[[], object]:
            x_0 = training.to_float(self.data[:batch])
            step = diffusers_peer(self.build(self.on), self.shape, dtype, lambda: x_0).step
            return within(lambda: tf32(matmul=False), lambda: [step() for _ in range(self.steps)])

        def compiled_by(function: Callable[..., Any]) -> Callable[[], object]:  # the loop compiles at its first step
            return within(lambda: mock.patch.object(training, "compiled", function), ours(compile="yes"))

        precisions = [name for name in typing.get_args(Precision) if name != "auto"]
        contestants = {
            OURS: ours(),
            **{f"{OURS}, {name}": ours(precision=name) for name in precisions},
            f"{OURS}, float32 with TF32": within(tf32, ours(precision="float32")),
            f"{OURS}, channels last": ours(torch.channels_last),
            f"{OURS}, compiled": compiled_by(self.compiled),
            f"{OURS}, CUDA graphs": compiled_by(self.graphs),
        }
        if "diffusers" in installed_peers() and self.config.model.patch_size == 1:
            contestants["diffusers"] = theirs(torch.bfloat16)
            contestants["diffusers in float32, its default"] = theirs(torch.float32)
        record = self.contest(f"training, {self.recipe}", batch * self.steps, contestants)
        return record | {"mebibytes": self._memory()}

    def train(self) -> dict[str, Any]:
        run, steps = self.out / "run", 6 * self.steps
        shutil.rmtree(run, ignore_errors=True)
        flags = {
            "batch-size": self.config.training.batch_size,
            "num-steps": steps,
            "log-every": self.steps,
            "checkpoint-every": 2 * self.steps,
            "keep-checkpoints": 1,
        }
        settings = [word for name, value in flags.items() for word in (f"--training.{name}", str(value))]
        seconds = self._run("train", self.recipe, *settings, "--run", str(run))
        log = read_lines(run / "log.jsonl")
        assert checkpoint_steps(run) == [steps]
        return {
            "images_per_second": [line["images_per_second"] for line in log],
            "with_a_checkpoint": [line["step"] % (2 * self.steps) == 0 for line in log],
            "seconds": seconds,
        }

    def _run(self, *words: str) -> float:
        """Run a command of `ddpm` in this process; returns its seconds."""
        begun = time.monotonic()
        if code := run_command([*words, "--device", self.on.type]):
            raise RunError(f"ddpm {' '.join(words)} ended with exit code {code}")
        return time.monotonic() - begun

    def sampling(self) -> dict[str, Any]:
        trained, size = self.trained(), min(500, self.images)

        def ours(function: Callable[..., Any] | None) -> Callable[[], object]:
            engine = "torch" if function is None else "compile"
            sampling = SamplingConfig(sampler="dpmpp", num_steps=20, batch_size=size, precision="auto", engine=engine)
            with mock.patch.object(generation, "compiled", function):
                task = generation.sampling_task(trained, sampling)
                task((0, size, size))  # the network is compiled at its first use
            return lambda: task((0, size, size))

        contestants = {
            OURS: ours(None), f"{OURS}, compiled": ours(self.compiled), f"{OURS}, CUDA graphs": ours(self.graphs),
        }  # fmt: skip
        record = self.contest("sampling, 20 evaluations", size, contestants)
        run = self.out / "run"
        if not checkpoint_steps(run):
            raise RunError("`ddpm sample` needs the part `train` first")
        for name in ("images.npz", "images"):
            shutil.rmtree(self.out / name, ignore_errors=True)
            flags = ("--num-images", str(self.images), "--sampler", "dpmpp", "--num-steps", "20", "--precision", "auto")
            flags += ("--batch-size", str(size), "--out", str(self.out / name))
            record[f"seconds_of_ddpm_sample_into_{name}"] = self._run("sample", str(run), *flags)
        shutil.rmtree(self.out / "images")
        (self.out / "images.npz").unlink()
        return record | {"mebibytes": self._memory()}

    def noise(self) -> dict[str, Any]:
        trained, ahead = self.trained(), generation.ImageNoise

        def when_asked(*given: Any) -> generation.ImageNoise:
            return ahead(*given[:4])

        records = {}
        for size in (2, 4) if self.dry else (64, 1024):
            sampling = SamplingConfig(sampler="ddpm", num_steps=20, batch_size=size, precision="auto")
            task = generation.sampling_task(trained, sampling)
            contestants = {
                f"{OURS}, drawn ahead": functools.partial(task, (0, size, size)),
                f"{OURS}, drawn when asked for": within(
                    lambda: mock.patch.object(generation, "ImageNoise", when_asked),
                    functools.partial(task, (0, size, size)),
                ),
            }
            records[str(size)] = self.contest(f"20 steps of Algorithm 2, batches of {size}", size, contestants)
        return {"by_batch_size": records}

    def files(self) -> dict[str, Any]:
        trained, images = self.trained(), self.data[: self.images].cpu()
        folder, sampling = self.out / "files", SamplingConfig(batch_size=min(500, len(images)))

        def at_once(*_: object, begin: int, **given: object) -> Iterator[Tensor]:
            yield from torch.split(images[begin:], sampling.batch_size)

        def write(threads: int) -> Callable[[], object]:
            def act() -> None:
                shutil.rmtree(folder, ignore_errors=True)
                with mock.patch.multiple(output, WRITERS=threads, generate=at_once):
                    output.sample_to_folder(trained, folder, len(images), sampling)

            return act

        written = {f"{OURS}, {n} threads": write(n) for n in (output.WRITERS, 1, 8)}
        record = {"writing": self.contest("PNG files", len(images), written)}
        network = classifier_network(self.config.data.dataset, self.on)
        read = {
            "from memory": lambda: features_of(tensor_stream("sampled", images), network, keep=False),
            "from the files": lambda: features_of(
                open_images(str(folder), channels=self.shape[0]), network, keep=False
            ),
        }
        record["scoring"] = self.contest("features of the classifier", len(images), read)
        shutil.rmtree(folder)
        return record

    def scoring(self) -> dict[str, Any]:
        if self.dry:
            network = classifier_network("digits", self.on)
            stream = tensor_stream("images", self.data[: self.images])
            return self.contest("features", self.images, {OURS: lambda: features_of(stream, network, keep=False)})
        with cases.scoring_contest(self.on, 1000) as contest:
            record = run_contest(contest, self.turns, wait=self.wait)
        print("\n".join(table(record)), flush=True)
        return record

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
        profiler.export_chrome_trace(str(self.out / "profile-trace.json"))
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
        chosen: tuple[cases.Case, ...] = ("evaluation", "training", "sampling", "input")
        chosen += () if self.dry else ("statistics", "scaling")
        batch = self.config.training.batch_size
        return cases.run_cases(
            chosen, self.recipe, self.turns, batch, self.on.type, say=lambda line: print(line, flush=True)
        )

    def _memory(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if self.on.type == "cuda" else None


PARTS = ("equality", "training", "train", "sampling", "noise", "files", "scoring", "profile", "bench")


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.dry_run:
        measured = Measurements(given.out, "cpu", "digits", steps=1, images=8, dry=True)
    else:
        measured = Measurements(given.out, "cuda", "cifar10", steps=50, images=50_000, dry=False)
    failed = False
    for part in given.only:
        path = given.out / f"{part}.json"
        if path.exists():
            print(f"{path} is there", flush=True)
            continue
        begun = time.monotonic()
        record = {"part": part, "recipe": measured.recipe, "conditions": conditions(measured.on)}
        try:
            record |= getattr(measured, part)()
        except Exception:  # time on a GPU is short: the other parts are measured
            traceback.print_exc()
            failed = True
            continue
        record["seconds_of_part"] = time.monotonic() - begun
        replace_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
        print(f"{path}: {record['seconds_of_part']:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

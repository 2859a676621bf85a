"""What `python -m benchmarks` compares: each thing as we do it and as the peers' own examples and trainers do it.

A peer that is not installed is left out; what the peers do is in `peers`. diffusers' network has our very weights,
denoising-diffusion-pytorch's has another design and as nearly as many parameters as its width allows.
"""

import contextlib
import io
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.contest import (
    OURS,
    PEERS,
    Contest,
    conditions,
    evaluation_step,
    installed_peers,
    peak_table,
    run_contest,
    share_of_peak,
    table,
)
from benchmarks.peers import denoising_diffusion, denoising_images, denoising_peer, diffusers_images, diffusers_peer
from benchmarks.scaling import scaling
from ddpm_lab.core.config import RECIPES, Config, DataConfig, ModelConfig, TrainingConfig, load_recipe
from ddpm_lab.core.device import precision_of, resolve_device, resolve_precision
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.progress import progress
from ddpm_lab.data.datasets import to_uint8, training_batch
from ddpm_lab.data.image_stream import tensor_stream
from ddpm_lab.diffusion.samplers import ddim_sample
from ddpm_lab.diffusion.schedule import linear_schedule
from ddpm_lab.diffusion.unet import UNet, build_unet
from ddpm_lab.evaluation.feature_store import features_of
from ddpm_lab.evaluation.features import inception_network
from ddpm_lab.evaluation.metrics import frechet_distance, inception_score
from ddpm_lab.evaluation.metrics import statistics as feature_statistics
from ddpm_lab.models.diffusers_format import diffusers_network
from ddpm_lab.training.loop import batch_indices, new_state, training_loop

Case = Literal["evaluation", "training", "sampling", "statistics", "scoring", "input", "peak", "scaling"]
SMALL = "small"


@dataclass(frozen=True)
class Subject:
    """A network to measure, with the shape of its images and a batch size that suits it."""

    name: str
    config: ModelConfig
    image_shape: tuple[int, int, int]
    batch_size: int

    @property
    def levels(self) -> int:
        return len(self.config.channel_multipliers)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.build(torch.device("meta")).parameters())

    def build(self, device: torch.device) -> UNet:
        torch.manual_seed(0)
        with device if device.type == "meta" else contextlib.nullcontext():
            return build_unet(self.config, self.image_shape[0], self.image_shape[1], 1000).to(device)


def subject(name: str, batch_size: int | None = None) -> Subject:
    """`small` (1.7 M parameters, three levels, heads of 8 channels, 32x32), or a recipe: `cifar10` is Ho et al.'s.

    Raises:
        InputError: another name.
    """
    if name not in (SMALL, *RECIPES):
        raise InputError(f"--network must be {SMALL} or one of the recipes {', '.join(RECIPES)}, not {name!r}")
    if name == SMALL:
        config = ModelConfig(
            base_channels=32, channel_multipliers=(1, 2, 2), attention_levels=(1, 2), attention_head_channels=8,
            dropout=0.0, norm_groups=16,
        )  # fmt: skip
        return Subject(name, config, (3, 32, 32), batch_size or 32)
    recipe = load_recipe(name)
    shape = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits": (1, 8, 8)}[recipe.data.dataset]
    return Subject(name, recipe.model, shape, batch_size or (8 if name == "cifar10" else 128))


def run_cases(
    cases: Sequence[Case],
    network: str,
    repeats: int,
    batch_size: int | None,
    device: str,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Hold the contests and measure the share of the peak, telling each result as it comes.

    Args:
        cases: which; each network is also measured in bfloat16 where the device is fast at it. Of statistics and
            scoring there are three turns at most, for they take long.
        network: see `subject`.
        repeats: turns of each contestant.
        batch_size: images in an evaluation or step; None: one that suits the network.
        device: auto, cpu, cuda or mps.
        say: takes lines for a person.
    Returns:
        A record: conditions, network, contests, shares of the peak, scaling.
    Raises:
        InputError: a number out of range, an unknown network, a device that is not there.
    """
    given = (("repeats", repeats, 1000), ("batch-size", 1 if batch_size is None else batch_size, 65_536))
    for name, value, most in given:
        if not 1 <= value <= most:
            raise InputError(f"--{name} must be from 1 to {most}, not {value}")
    on = resolve_device(device)
    of = subject(network, batch_size)
    dtypes = list(dict.fromkeys((torch.float32, resolve_precision("auto", on))))
    record: dict[str, Any] = {
        "conditions": conditions(on),
        "network": {"name": of.name, "parameters": of.num_parameters, "image_shape": list(of.image_shape)},
        "contests": [],
        "peak": {},
        "scaling": [],
    }
    absent = [name for name in PEERS if name not in installed_peers()]
    say(f"{of.name}: {of.num_parameters:,} parameters, images of {' x '.join(map(str, of.image_shape))}; on {on}")
    if absent:
        say(f"not installed, and so left out: {', '.join(absent)} (pip install 'ddpm-lab[bench]')")

    if of.config.patch_size > 1:
        say("diffusers has no network on patches, and takes part in the input path only")

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(on.type, lambda: None)

    def meet(contest: Contest, turns: int = repeats) -> None:
        with progress(contest.case, (turns + 1) * len(contest.contestants), "turns") as advance:
            found = run_contest(contest, turns, lambda: advance(1), wait)
        record["contests"].append(found)
        say("\n".join(table(found)))

    for dtype in dtypes:
        if "evaluation" in cases:
            meet(evaluation_contest(of, on, dtype))
        if "training" in cases:
            meet(training_contest(of, on, dtype))
    if "sampling" in cases:
        meet(sampling_contest(of, on))
    if "statistics" in cases:
        meet(statistics_contest(), min(repeats, 3))
    if "scoring" in cases:
        with scoring_contest(on) as contest:
            meet(contest, min(repeats, 3))
    if "input" in cases:
        with input_contest(of, on) as contest:
            meet(contest)
    if "peak" in cases and on.type != "cpu":
        say("the share of the peak is measured on the CPU only")
    elif "peak" in cases:
        model, (x_t, t), dtype = of.build(on).eval(), _batch(of, on), dtypes[-1]
        steps = {
            "evaluation": evaluation_step(model, x_t, t, dtype),
            "training step": _our_step(of, on, dtype),
        }
        for what, step in steps.items():
            found = share_of_peak(model, x_t, t, dtype, step, training=what != "evaluation")
            record["peak"][what] = found
            say("\n".join(peak_table(f"{what}, {of.name}, {precision_of(dtype)}", found)))
    if "scaling" in cases:
        record["scaling"] = scaling(device, say)
    return record


def evaluation_contest(of: Subject, device: torch.device, dtype: torch.dtype) -> Contest:
    """One evaluation of the network for a batch."""
    x_t, t = _batch(of, device)
    model = of.build(device).eval()
    contestants = {OURS: evaluation_step(model, x_t, t, dtype)}
    for name, network in _peer_networks(of, model).items():
        contestants[name] = evaluation_step(network, x_t, t, dtype)
        if dtype != torch.float32:
            contestants[f"{name} in float32, its default"] = evaluation_step(network, x_t, t, torch.float32)
    return Contest(f"evaluation, {of.name}, {precision_of(dtype)}", "images", of.batch_size, contestants)


def training_contest(of: Subject, device: torch.device, dtype: torch.dtype) -> Contest:
    """One step: noising, loss, gradient, its norm clipped, optimiser, moving average."""
    contestants = {OURS: _our_step(of, device, dtype)}
    for name in _peers(of):
        contestants[name] = STEPS[name](of, device, dtype)
        if dtype != torch.float32:
            contestants[f"{name} in float32, its default"] = STEPS[name](of, device, torch.float32)
    return Contest(f"training step, {of.name}, {precision_of(dtype)}", "images", of.batch_size, contestants)


def sampling_contest(of: Subject, device: torch.device, num_images: int = 16, num_steps: int = 10) -> Contest:
    """Images from noise, uint8 at the end, by DDIM in float32."""
    model, schedule = of.build(device).eval(), linear_schedule(1000)
    noise = torch.randn(num_images, *of.image_shape, device=device)
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: to_uint8(ddim_sample(model, schedule, noise, num_steps))
    }
    if "diffusers" in _peers(of):
        theirs = diffusers_network(model, of.image_shape[1]).to(device)
        contestants["diffusers"] = lambda: diffusers_images(theirs, num_images, num_steps)
    if "denoising-diffusion-pytorch" in installed_peers():
        diffusion = denoising_diffusion(of.num_parameters, of.levels, of.image_shape, num_steps).to(device).eval()
        contestants["denoising-diffusion-pytorch"] = lambda: denoising_images(diffusion, num_images)
    return Contest(f"sampling, {of.name}, {num_steps} DDIM steps, float32", "images", num_images, contestants)


def statistics_contest(num_features: int = 2048, num_images: int = 4096) -> Contest:
    """Mean, covariance and Frechet distance from features of two sets, one of them known before."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    generator = torch.Generator().manual_seed(0)
    known, found = torch.randn(2, num_images, num_features, generator=generator)
    ours, theirs = feature_statistics(known), fid_features_to_statistics(known)
    ours.factor  # noqa: B018 - of the reference it is in the cache, and so not counted
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: frechet_distance(feature_statistics(found), ours),
        "torch-fidelity": lambda: fid_statistics_to_metric(fid_features_to_statistics(found), theirs, verbose=False),
    }
    return Contest(f"statistics and Frechet distance, {num_features} features", "images", num_images, contestants)


@contextlib.contextmanager
def scoring_contest(device: torch.device, num_images: int = 250) -> Iterator[Contest]:
    """FID and Inception Score of some images against as many others, from uint8 to numbers, nothing known before.

    The weights of Inception are random, for its speed does not depend on them.
    """
    import torch_fidelity
    from torch.utils.data import Subset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]  # which has no types
        def load_state_dict(self, *given: Any, **flags: Any) -> None:  # keeps the weights it was made with
            pass

    torch.manual_seed(0)
    sets: Any = torch.randint(256, (2, num_images, 3, 32, 32), dtype=torch.uint8)
    every = range(num_images)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.pth"
        torch.save(Untrained("untrained", ["2048"], empty).state_dict(), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that these are not the official weights
            network = inception_network(path, device)

        def ours() -> dict[str, float]:
            known, found = (features_of(tensor_stream(f"set {k}", s), network, keep=False) for k, s in enumerate(sets))
            assert found.logits is not None
            distance = frechet_distance(feature_statistics(found.values), feature_statistics(known.values))
            mean, _ = inception_score(found.logits)
            return {"frechet_inception_distance": distance, "inception_score_mean": mean}

        def theirs() -> dict[str, float]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its workers, more than there are cores
                metrics: dict[str, float] = torch_fidelity.calculate_metrics(
                    input1=Subset(sets[1], every), input2=Subset(sets[0], every), fid=True, isc=True,
                    cuda=device.type == "cuda", feature_extractor_weights_path=str(path), verbose=False,
                )  # fmt: skip
            return metrics

        contestants: dict[str, Callable[[], object]] = {OURS: ours, "torch-fidelity": theirs}
        yield Contest("scoring: FID and Inception Score by Inception", "images", 2 * num_images, contestants)


@contextlib.contextmanager
def input_contest(of: Subject, device: torch.device, batches: int = 10) -> Iterator[Contest]:
    """Batches from the data set in its usual form to x_0 in [-1, 1] on the device, mirrored at random."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    count, size = batches * of.batch_size, of.image_shape[1]
    images = torch.randint(256, (count, *of.image_shape), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]
    held, generator = images.to(device), torch.Generator(device).manual_seed(0)
    grey = (0.5,) * of.image_shape[0]
    transform = transforms.Compose([
        transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(grey, grey),
    ])  # fmt: skip

    class Pictures(Dataset[Tensor]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Tensor:
            transformed: Tensor = transform(pictures[index])
            return transformed

    def ours() -> None:
        for k in range(batches):
            indices = batch_indices(count, of.batch_size, 0, k).to(device)
            training_batch(held, indices, horizontal_flip=True, generator=generator)

    def read(loader: DataLoader[Tensor]) -> Callable[[], object]:
        endless = itertools.chain.from_iterable(itertools.repeat(loader))  # as training does, with its workers kept
        return lambda: [next(endless).to(device) for _ in range(batches)]

    loader = DataLoader(Pictures(), of.batch_size, shuffle=True)
    contestants = {OURS: ours, "diffusers (torchvision's transforms, as in its training example)": read(loader)}
    with tempfile.TemporaryDirectory() as folder:
        if "denoising-diffusion-pytorch" in installed_peers():
            from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset as Folder

            for index, picture in enumerate(pictures):
                picture.save(Path(folder) / f"{index}.png")
            theirs = Folder(folder, size, augment_horizontal_flip=True)
            workers = os.cpu_count() or 1  # as its Trainer has
            loader = DataLoader(theirs, of.batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
            contestants["denoising-diffusion-pytorch"] = read(loader)
        yield Contest(f"input path, {of.name}'s images", "images", count, contestants)


def _peers(of: Subject) -> list[str]:
    """Those that are installed and can express the network."""
    return [name for name in installed_peers() if name != "diffusers" or of.config.patch_size == 1]


def _batch(of: Subject, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(of.batch_size, *of.image_shape, generator=generator)
    return x_t.to(device), torch.randint(1000, (of.batch_size,), generator=generator).to(device)


def _our_step(of: Subject, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    config = Config(
        data=DataConfig(dataset="cifar10"),
        model=of.config,
        training=TrainingConfig(batch_size=of.batch_size, precision=precision_of(dtype)),
    )
    images = torch.randint(256, (512, *of.image_shape), dtype=torch.uint8).to(device)
    loop = training_loop(new_state(of.build(device), config.training), linear_schedule(1000), images, config)
    return lambda: float(next(loop).grad_norm)


def _diffusers_step(of: Subject, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x_0, _ = _batch(of, device)
    return diffusers_peer(of.build(device), of.image_shape, dtype, lambda: x_0).step


def _denoising_step(of: Subject, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x_0, _ = _batch(of, device)
    return denoising_peer(of.num_parameters, of.levels, of.image_shape, dtype, lambda: x_0).step


STEPS = {OURS: _our_step, "diffusers": _diffusers_step, "denoising-diffusion-pytorch": _denoising_step}


def _peer_networks(of: Subject, model: UNet) -> dict[str, nn.Module]:
    device = next(model.parameters()).device
    found: dict[str, nn.Module] = {}
    if "diffusers" in _peers(of):
        found["diffusers"] = diffusers_network(model, of.image_shape[1]).to(device)
    if "denoising-diffusion-pytorch" in installed_peers():
        diffusion = denoising_diffusion(of.num_parameters, of.levels, of.image_shape)
        found["denoising-diffusion-pytorch"] = diffusion.model.to(device).eval()
    return found

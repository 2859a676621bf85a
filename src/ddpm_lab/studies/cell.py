"""One cell of a study: its run, the measures after training, and pictures of its samples."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.device import deterministic_algorithms, resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import replace_atomically
from ddpm_lab.core.log import LOG, SCORES, append_line, read_lines
from ddpm_lab.core.progress import duration, progress
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.datasets import load_images, to_float
from ddpm_lab.diffusion.likelihood import variational_bound
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.evaluation.checks import check_scoring
from ddpm_lab.evaluation.evaluate import feature_network, generated_images
from ddpm_lab.evaluation.scores import own_reference, score_model
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.trained import TrainedModel, load, with_timesteps
from ddpm_lab.pictures.drawing import framed, image_table
from ddpm_lab.pictures.film import save_film
from ddpm_lab.pictures.forward import forward_frames, noised_images
from ddpm_lab.pictures.picture_settings import SHORT_FILM
from ddpm_lab.pictures.reverse import record_trajectory, reverse_frames
from ddpm_lab.sampling.generation import evaluations_of
from ddpm_lab.sampling.image_files import save_png, visible_scale
from ddpm_lab.studies.grid import HEADLINE, Cell, Study, cell_folder, parse_sampler
from ddpm_lab.studies.lease import Lease
from ddpm_lab.training.cost import evaluation_seconds, step_seconds
from ddpm_lab.training.loop import new_state
from ddpm_lab.training.run import train, versions, with_num_classes
from ddpm_lab.training.tracking import check_tracker

MEASURES = "measures.jsonl"
BOUND_DRAWN = 50  # timesteps of each image at which the bound is estimated
SHOWN = 16  # samples in a picture


def check_cell(study: Study, cell: Cell, device: str, data_dir: Path | None) -> None:
    """Refuse, before any work, a cell that could not be finished.

    Raises:
        InputError: no images, no feature network for them, too few images, no classes, or a tracker that is not
            installed.
    """
    config, measures, data = cell.config, study.measures, cell.config.data
    check_tracker(config.evaluation.tracker)
    training, held_out = (load_images(data.dataset, split, data_dir, data.image_size) for split in ("train", "test"))
    with_num_classes(config, training)
    if len(held_out.images) < 2:
        raise InputError(
            f"{data.dataset} has {len(held_out.images)} held-out image; the bound of the likelihood needs 2"
        )
    _, C, H, W = training.images.shape
    shape, reference = (C, H, W), own_reference(config, data_dir)
    network = feature_network(measures.features, shape, reference, str(resolve_device(device)))
    counts = {num_images for num_images, _, _ in planned_scores(study, cell).values()} | {measures.images}
    for count in sorted(counts):
        scoring = _scoring(count, ("fid", "is", "kid"))
        check_scoring("the samples of a cell", count, shape, reference, network, scoring)


def study_cost(study: Study, cells: Sequence[Cell], out: Path, device: str, data_dir: Path | None) -> list[str]:
    """Lines on the time that cells will take, from their missing steps and evaluations and a measured speed."""
    on = resolve_device(device)
    config = cells[0].config
    data = load_images(config.data.dataset, "train", data_dir, config.data.image_size)
    config = with_num_classes(config, data)
    shape = tuple(data.images.shape[1:])
    model = build_unet(config.model, shape[0], shape[1], config.diffusion.num_timesteps).to(on)
    state = new_state(model, config.training)
    with deterministic_algorithms(config.training.deterministic):  # as training will, from the first product on
        step = step_seconds(state, build_schedule(config.diffusion), shape, config, on)
    evaluation = evaluation_seconds(model.eval(), shape, config.training.precision, on)
    lines, total = [], 0.0
    for cell in cells:
        steps, evaluations = missing_work(study, cell, cell_folder(out, cell))
        training, scoring = step * steps, evaluation * evaluations
        total += training + scoring
        lines.append(f"  {cell.name}: about {duration(training)} of training, {duration(scoring)} of sampling to score")
    return [*lines, f"in all about {duration(total)} on {on}, by a speed measured just now"]


def missing_work(study: Study, cell: Cell, folder: Path) -> tuple[int, int]:
    """Training steps, and evaluations for scores, that a cell still needs."""
    num_steps, planned = cell.config.training.num_steps, planned_evaluations(study, cell)
    try:
        trained, measured = min(max(checkpoint_steps(folder), default=0), num_steps), _measured(folder, num_steps)
        scored = {line["step"] for line in read_lines(folder / SCORES) if line.get("by") == "training"}
    except (InputError, OSError):  # a damaged cell fails when it is computed, and must not stop others
        return num_steps, sum(planned.values())
    kept = sum(step <= trained for step in scored)  # later scores are repeated
    planned["while training"] -= planned["while training"] * kept // _scores_in_training(cell)
    return num_steps - trained, sum(count for key, count in planned.items() if key not in measured)


def _measured(folder: Path, step: int) -> set[Any]:
    """The keys of the measures that were taken at a step."""
    return {line.get("key") for line in read_lines(folder / MEASURES) if line["step"] == step}


def _scores_in_training(cell: Cell) -> int:
    return -(-cell.config.training.num_steps // cell.config.evaluation.score_every)


def planned_evaluations(study: Study, cell: Cell) -> dict[str, int]:
    """Network evaluations for each measure of a cell, one image at one timestep each."""
    measures = study.measures
    in_training = _scores_in_training(cell) * measures.images * cell.config.evaluation.sample_steps
    planned = {"while training": in_training, "bound": measures.bound_images * (BOUND_DRAWN + 1)}
    for key, (num_images, T, sampling) in planned_scores(study, cell).items():
        planned[key] = num_images * evaluations_of(sampling, sampling.num_steps or T)
    return planned


def planned_scores(study: Study, cell: Cell) -> dict[str, tuple[int, int, SamplingConfig]]:
    """The scores after training: number of images, length of chain to sample, and sampler, by the key of the measure.

    A network of continuous time is sampled as each chain by the headline's sampler only.
    """
    measures, training, T = study.measures, cell.config.training, cell.config.diffusion.num_timesteps
    if cell.sampled_as:
        headline = _sampling(cell, HEADLINE)
        return {f"{HEADLINE} as T={other}": (measures.final_images, other, headline) for other in cell.sampled_as}
    batch_size = min(64, measures.ancestral_images)  # a batch is padded to this size
    ancestral = SamplingConfig(sampler="ddpm", precision=training.precision, seed=training.seed, batch_size=batch_size)
    scores = {name: (measures.final_images, T, _sampling(cell, name)) for name in measures.samplers}
    return scores | {"ancestral": (measures.ancestral_images, T, ancestral)}


def _sampling(cell: Cell, name: str) -> SamplingConfig:
    """A sampler by its name; all cells of one training seed start from the same noise, each seed from its own."""
    training = cell.config.training
    return parse_sampler(name, precision=training.precision, seed=training.seed)


def _scoring(num_images: int, metrics: tuple[str, ...]) -> ScoringConfig:
    return ScoringConfig(metrics=metrics, is_splits=min(10, num_images // 10))


def _as_chain(trained: TrainedModel, T: int) -> TrainedModel:
    """A network to be sampled as a chain of T steps."""
    return trained if trained.schedule.num_timesteps == T else with_timesteps(trained, T)


def compute_cell(
    study: Study,
    cell: Cell,
    folder: Path,
    lease: Lease,
    *,
    device: str,
    data_dir: Path | None,
    say: Callable[[str], object],
) -> None:
    """Train a cell's run and measure it; work of an earlier call is not repeated.

    Raises:
        RunError: the lease is lost; and as `run.train`.
    """
    train(cell.config, folder, device=device, data_dir=data_dir, say=say)
    trained = load(folder, device=device)
    reference, on = own_reference(cell.config, data_dir), next(trained.model.parameters()).device
    network = feature_network(study.measures.features, trained.image_shape, reference, str(on))
    scores, done = planned_scores(study, cell), _measured(folder, trained.step)
    for key in ("speed", *scores, "bound"):
        lease.check()
        if key in done:
            continue
        begun = time.monotonic()
        measure: Mapping[str, Any]
        if key == "speed":
            measure = _speed(trained)
        elif key == "bound":
            measure = _bound(trained, study.measures.bound_images, data_dir)
        else:
            num_images, T, sampling = scores[key]
            metrics = ("is", "kid") if key == "ancestral" else ("fid", "is", "kid")  # too few images for a distance
            scoring = _scoring(num_images, metrics)
            measure = score_model(_as_chain(trained, T), num_images, sampling, reference, [network], scoring, data_dir)[
                0
            ]
        lease.check()
        record = {"key": key, "step": trained.step, **measure, "seconds": time.monotonic() - begun}
        append_line(folder / MEASURES, record)
        say(f"{cell.name}: {key}{_result(record)}, {duration(record['seconds'])}")
    _draw(study, cell, trained, folder, data_dir)
    lease.check()
    summary = _summary(cell, folder, trained.step, str(resolve_device(device)))
    replace_atomically(folder / "done.json", (json.dumps(summary, indent=2) + "\n").encode())


def _summary(cell: Cell, folder: Path, step: int, device: str) -> dict[str, Any]:
    """The content of done.json."""
    log = read_lines(folder / LOG)
    images = [0, *(line["images"] for line in log)]
    training = sum((b - a) / line["images_per_second"] for a, b, line in zip(images, images[1:], log, strict=False))
    return {
        "cell": cell.name,
        "label": cell.label,
        "seed": cell.config.training.seed,
        "step": step,
        "images": log[-1]["images"],
        "seconds_of_training": training,
        "seconds_of_scoring": sum(line["seconds"] for name in (SCORES, MEASURES) for line in read_lines(folder / name)),
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions(),
    }


def _result(record: dict[str, Any]) -> str:
    """The main number of a measure, for a message."""
    if record.get("fid") is not None:
        return f": {record['fid_label']} {record['fid']['value']:.3g}"
    if "bits_per_dimension" in record:
        return f": {record['bits_per_dimension']['value']:.3f} bits/dim"
    return ""


def _chain(trained: TrainedModel) -> dict[str, Any]:
    """The fields of a record that describe the chain."""
    diffusion = trained.config.diffusion
    return {name: getattr(diffusion, name) for name in ("num_timesteps", "schedule", "beta_convention")}


def _speed(trained: TrainedModel) -> dict[str, Any]:
    """The time of one network evaluation."""
    device = next(trained.model.parameters()).device
    seconds = evaluation_seconds(trained.model, trained.image_shape, trained.config.training.precision, device)
    threads = torch.get_num_threads()
    return {"seconds_an_evaluation": seconds, "rows": 64, "device": str(device), "threads": threads} | _chain(trained)


def _bound(trained: TrainedModel, num_images: int, data_dir: Path | None) -> dict[str, Any]:
    """The variational bound of held-out images, with its 95 % interval."""
    data, device = trained.config.data, next(trained.model.parameters()).device
    held_out = load_images(data.dataset, "test", data_dir, data.image_size)
    images, labels = held_out.images[:num_images], None
    if trained.num_classes and held_out.labels is not None:
        labels = held_out.labels[:num_images].to(device)
    with progress("bounding", len(images) * (BOUND_DRAWN + 1), "evaluations") as advance:
        bound = variational_bound(
            trained.model,
            trained.schedule,
            images.to(device),
            prediction=trained.config.diffusion.predicted,
            num_drawn=BOUND_DRAWN,
            labels=labels,
            on_batch=advance,
        )
    half = 1.96 * bound.standard_error
    interval = {"value": bound.value, "low": bound.value - half, "high": bound.value + half}
    record = {"bits_per_dimension": interval, **dataclasses.asdict(bound), "variance": "beta", "images": "test"}
    return record | _chain(trained)


def _draw(study: Study, cell: Cell, trained: TrainedModel, folder: Path, data_dir: Path | None) -> None:
    """Pictures of the first scored samples, by the headline's sampler and by all T steps, and films of both processes.

    Files that exist are kept.
    """
    scale, shown = visible_scale(trained.image_shape[1]), _as_chain(trained, cell.shown_as)
    scores = planned_scores(study, cell)
    for name, key in (("samples", cell.headline), ("ancestral", "ancestral")):
        if key in scores and not (folder / f"{name}.png").exists():
            num_images, _, sampling = scores[key]
            images = next(iter(generated_images(shown, num_images, sampling).take(SHOWN).batches()))
            table = image_table(images.reshape(2, SHOWN // 2, *images.shape[1:]), scale=scale)
            save_png(folder / f"{name}.png", framed(table))
    frames = SHORT_FILM.frames or 2
    if not (folder / "reverse.gif").exists():
        sampling = dataclasses.replace(_sampling(cell, HEADLINE), batch_size=4)
        trajectory = dataclasses.replace(record_trajectory(shown, sampling, 4, frames), label=cell.label)
        save_film(folder / "reverse.gif", reverse_frames([trajectory], scale), SHORT_FILM)
    if not (folder / "forward.gif").exists():
        data = load_images(cell.config.data.dataset, "test", data_dir, cell.config.data.image_size)
        noised = noised_images(shown.config.diffusion, to_float(data.images[:2]), frames)
        save_film(folder / "forward.gif", forward_frames([noised], scale), SHORT_FILM)

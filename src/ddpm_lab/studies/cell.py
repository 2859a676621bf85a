"""One cell of a study: its run, the measures at its end, and the pictures of its generator."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import replace_atomically
from ddpm_lab.core.log import SCORES, append_line, read_lines
from ddpm_lab.core.progress import duration, progress
from ddpm_lab.core.scoring_config import ScoringConfig
from ddpm_lab.data.datasets import load_images, to_float
from ddpm_lab.diffusion.likelihood import variational_bound
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.evaluation.evaluate import check_scoring, feature_network, generated_images
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
from ddpm_lab.training.run import conditional_labels, train, versions
from ddpm_lab.training.tracking import check_tracker

MEASURES = "measures.jsonl"
BOUND_DRAWN = 50
SHOWN = 16  # samples of the same seeds, side by side


def check_cell(study: Study, cell: Cell, device: str, data_dir: Path | None) -> None:
    """Refuse, before any work, what a cell would stumble over at its end.

    Raises:
        InputError: no images, no network for their features or too few of them, classes that they do not have, a
            tracker that is not installed.
    """
    config, plan = cell.config, study.measures
    check_tracker(config.evaluation.tracker)
    data = config.data
    training, held_out = (load_images(data.dataset, split, data_dir, data.image_size) for split in ("train", "test"))
    conditional_labels(config, training)
    if len(held_out.images) < 2:
        raise InputError(f"{data.dataset} has {len(held_out.images)} held-out image; a bound of likelihood needs 2")
    _, C, H, W = training.images.shape
    shape, reference = (C, H, W), own_reference(config, data_dir)
    network = feature_network(plan.features, shape, reference, None, str(resolve_device(device)))
    counts = {num_images for num_images, _, _ in _scored(study, cell).values()} | {plan.images}
    for count in sorted(counts):
        check_scoring("the samples of a cell", count, shape, reference, network, _scoring(("fid", "is", "kid"), count))


def study_cost(study: Study, cells: Sequence[Cell], out: Path, device: str, data_dir: Path | None) -> list[str]:
    """Lines on what is left of cells will cost, counted and measured before they start: training, scoring, in all."""
    on = resolve_device(device)
    config = cells[0].config
    data = load_images(config.data.dataset, "train", data_dir, config.data.image_size)
    shape = tuple(data.images.shape[1:])
    model = build_unet(config.model, shape[0], shape[1], config.diffusion.num_timesteps).to(on)
    state = new_state(model, config.training)
    step = step_seconds(state, build_schedule(config.diffusion), shape, config, on)
    each = evaluation_seconds(model.eval(), shape, config.training.precision, on)
    lines, total = [], 0.0
    for cell in cells:
        steps, evaluations = _left(study, cell, cell_folder(out, cell))
        training, scoring = step * steps, each * evaluations
        total += training + scoring
        lines.append(f"  {cell.name}: about {duration(training)} of training, {duration(scoring)} of sampling to score")
    return [*lines, f"in all about {duration(total)} on {on}, by a speed measured just now"]


def _left(study: Study, cell: Cell, folder: Path) -> tuple[int, int]:
    """Steps of training and evaluations for scores that a cell has not done yet."""
    num_steps, planned = cell.config.training.num_steps, planned_evaluations(study, cell)
    try:
        trained, measured = min(max(checkpoint_steps(folder), default=0), num_steps), _measured(folder, num_steps)
        scored = {line["step"] for line in read_lines(folder / SCORES) if line.get("by") == "training"}
    except (InputError, OSError):  # what cannot be read is told when its turn comes, and stops no other
        return num_steps, sum(planned.values())
    kept = sum(step <= trained for step in scored)  # later ones are taken again
    planned["while training"] -= planned["while training"] * kept // _scores_in_training(cell)
    return num_steps - trained, sum(count for key, count in planned.items() if key not in measured)


def _measured(folder: Path, step: int) -> set[Any]:
    """What was measured of the network at that step."""
    return {line.get("key") for line in read_lines(folder / MEASURES) if line["step"] == step}


def _scores_in_training(cell: Cell) -> int:
    return -(-cell.config.training.num_steps // cell.config.evaluation.score_every)


def planned_evaluations(study: Study, cell: Cell) -> dict[str, int]:
    """Evaluations of the network for each measure of a cell, in images times steps."""
    measures = study.measures
    evaluation = cell.config.evaluation
    planned = {"while training": _scores_in_training(cell) * measures.images * evaluation.sample_steps}
    for key, (num_images, _, sampling) in _scored(study, cell).items():
        num_steps = sampling.num_steps or cell.config.diffusion.num_timesteps
        planned[key] = num_images * evaluations_of(sampling, num_steps)
    planned["bound"] = measures.bound_images * (BOUND_DRAWN + 1)
    return planned


def _scored(study: Study, cell: Cell) -> dict[str, tuple[int, int | None, SamplingConfig]]:
    """What is sampled and scored at the end, by the measure's key: number of images, chain to sample it as, sampler.

    A network of continuous time is sampled as each chain by the headline's sampler alone.
    """
    measures = study.measures
    if cell.sampled_as:
        headline = _sampling(cell, HEADLINE)
        return {f"{HEADLINE} as T={T}": (measures.final_images, T, headline) for T in cell.sampled_as}
    scored: dict[str, tuple[int, int | None, SamplingConfig]] = {
        name: (measures.final_images, None, _sampling(cell, name)) for name in measures.samplers
    }
    few = min(64, measures.ancestral_images)  # rows beyond those wanted would be computed for nothing
    training = cell.config.training
    ancestral = SamplingConfig(sampler="ddpm", precision=training.precision, seed=training.seed, batch_size=few)
    return scored | {"ancestral": (measures.ancestral_images, None, ancestral)}


def _sampling(cell: Cell, name: str) -> SamplingConfig:
    """A sampler by its name; all lengths of one training seed start from the same noise, each seed from its own."""
    training = cell.config.training
    return dataclasses.replace(parse_sampler(name, training.precision), seed=training.seed)


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
    """Train a cell's run and measure it; what an earlier call has done is not done again.

    Raises:
        as `run.train`; RunError where the lease is lost.
    """
    train(cell.config, folder, device=device, data_dir=data_dir, say=say)
    trained = load(folder, device=device)
    done = _measured(folder, trained.step)
    for key, measure in _measures(study, cell, trained, data_dir).items():
        lease.check()
        if key in done:
            continue
        begun = time.monotonic()
        record = {"key": key, "step": trained.step, **measure()}
        lease.check()
        append_line(folder / MEASURES, record | {"seconds": time.monotonic() - begun})
        say(f"{cell.name}: {key}{_told(record)}, {duration(time.monotonic() - begun)}")
    _draw(study, cell, trained, folder, data_dir)
    lease.check()
    log, scores = read_lines(folder / "log.jsonl"), read_lines(folder / "scores.jsonl")
    scoring = sum(line["seconds"] for line in scores + read_lines(folder / MEASURES))
    seen = [0, *(line["images"] for line in log)]
    training = sum((b - a) / line["images_per_second"] for a, b, line in zip(seen, seen[1:], log, strict=False))
    summary = {
        "cell": cell.name,
        "label": cell.label,
        "seed": cell.config.training.seed,
        "step": trained.step,
        "images": log[-1]["images"],
        "seconds_of_training": training,
        "seconds_of_scoring": scoring,
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions(),
    }
    replace_atomically(folder / "done.json", (json.dumps(summary, indent=2) + "\n").encode())


def _told(record: dict[str, Any]) -> str:
    if record.get("fid") is not None:
        return f": {record['fid_label']} {record['fid']['value']:.3g}"
    if "bits_per_dimension" in record:
        return f": {record['bits_per_dimension']['value']:.3f} bits/dim"
    return ""


def _measures(
    study: Study, cell: Cell, trained: TrainedModel, data_dir: Path | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured at the end, each by a function that gives its record."""
    plan, data = study.measures, cell.config.data
    reference = own_reference(cell.config, data_dir)
    on = next(trained.model.parameters()).device
    network = feature_network(plan.features, trained.image_shape, reference, None, str(on))
    held_out = load_images(data.dataset, "test", data_dir, data.image_size)
    images, labels = held_out.images[: plan.bound_images], None
    if trained.num_classes and held_out.labels is not None:
        labels = held_out.labels[: plan.bound_images].to(on)
    diffusion = trained.config.diffusion
    chain = {name: getattr(diffusion, name) for name in ("num_timesteps", "schedule", "beta_convention")}

    def scores(model: TrainedModel, num_images: int, sampling: SamplingConfig, metrics: tuple[str, ...]) -> Any:
        scoring = _scoring(metrics, num_images)
        return lambda: score_model(model, num_images, sampling, reference, network, scoring, data_dir)

    def speed() -> dict[str, Any]:
        each = evaluation_seconds(trained.model, trained.image_shape, cell.config.training.precision, on)
        return {
            "seconds_an_evaluation": each,
            "rows": 64,
            "device": str(on),
            "threads": torch.get_num_threads(),
        } | chain

    def bound() -> dict[str, Any]:
        with progress("bounding", len(images) * (BOUND_DRAWN + 1), "evaluations") as advance:
            found = variational_bound(
                trained.model,
                trained.schedule,
                images.to(on),
                prediction=diffusion.predicted,
                num_drawn=BOUND_DRAWN,
                labels=labels,
                on_batch=advance,
            )
        half = 1.96 * found.standard_error
        value = {"value": found.value, "low": found.value - half, "high": found.value + half}
        return {"bits_per_dimension": value, **dataclasses.asdict(found), "variance": "beta", "images": "test"} | chain

    planned: dict[str, Callable[[], dict[str, Any]]] = {"speed": speed}
    for key, (num_images, T, sampling) in _scored(study, cell).items():
        model = trained if T is None else with_timesteps(trained, T)
        metrics = ("is", "kid") if key == "ancestral" else ("fid", "is", "kid")  # too few images for a distance
        planned[key] = scores(model, num_images, sampling, metrics)
    return planned | {"bound": bound}


def _scoring(metrics: tuple[str, ...], num_images: int) -> ScoringConfig:
    return ScoringConfig(metrics=metrics, is_splits=min(10, num_images // 10))


def _draw(study: Study, cell: Cell, trained: TrainedModel, folder: Path, data_dir: Path | None) -> None:
    """The first images of what was scored, by the headline's sampler and by all T steps, and a film of each process."""
    scale = visible_scale(trained.image_shape[1])
    shown = with_timesteps(trained, cell.shown_as) if cell.sampled_as else trained
    for key, (num_images, T, sampling) in _scored(study, cell).items():
        name = {HEADLINE: "samples", "ancestral": "ancestral"}.get(key.partition(" ")[0])
        if name is not None and T in (None, cell.shown_as) and not (folder / f"{name}.png").exists():
            model = trained if T is None else with_timesteps(trained, T)
            images = next(iter(generated_images(model, num_images, sampling).take(SHOWN).batches()))
            table = image_table(images.reshape(2, SHOWN // 2, *images.shape[1:]), scale=scale)
            save_png(folder / f"{name}.png", framed(table))
    if not (folder / "reverse.gif").exists():
        sampling = dataclasses.replace(_sampling(cell, HEADLINE), batch_size=4)
        trajectory = record_trajectory(shown, sampling, 4, SHORT_FILM.frames or 2)
        named = dataclasses.replace(trajectory, label=cell.label)
        save_film(folder / "reverse.gif", reverse_frames([named], scale), SHORT_FILM)
    if not (folder / "forward.gif").exists():
        data = load_images(cell.config.data.dataset, "test", data_dir, cell.config.data.image_size)
        noised = noised_images(shown.config.diffusion, to_float(data.images[:2]), SHORT_FILM.frames or 2)
        save_film(folder / "forward.gif", forward_frames([noised], scale), SHORT_FILM)

"""A run: a folder that training writes, continues and can always be continued from.

    config.json   log.jsonl   scores.jsonl   checkpoints/step_00010000/   samples/step_00010000.png

`train` opens the folder, and hands over to a session. Invariant: the newest checkpoint is whole, and the log ends at or
after it; on resume what is later is cut, and comes again.
"""

import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core import processes
from ddpm_lab.core.config import Config
from ddpm_lab.core.device import resolve_device, resolve_precision
from ddpm_lab.core.errors import InputError, RunError
from ddpm_lab.core.files import TEMPORARY_PREFIX, locked, replace_atomically
from ddpm_lab.core.log import LOG, SCORES, cut_lines
from ddpm_lab.data.datasets import ImageSet, load_images, pixel_deviation
from ddpm_lab.diffusion.process import input_scale
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.evaluation.scores import training_scorer
from ddpm_lab.models.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    last_step,
    load_kept,
    load_parameters,
    read_meta,
)
from ddpm_lab.models.trained import load, packaged_names, read_run_record
from ddpm_lab.training.cost import training_cost
from ddpm_lab.training.fine_tuning import begin_from
from ddpm_lab.training.loop import TrainingState, falling_from, is_compiled, new_state
from ddpm_lab.training.session import Session
from ddpm_lab.training.tracking import check_tracker

FREE_TO_CHANGE = {
    "data": ("dataset",),  # a folder may have moved; the hash of the images decides
    "training": ("num_steps", "compile", "log_every", "checkpoint_every", "keep_checkpoints"),
    "evaluation": None,
}


@processes.peer_failure_guard("the same command goes on from the newest checkpoint, with any number of processes")
def train(
    config: Config,
    run_dir: str | Path,
    *,
    start_from: str | Path | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Train a run to its last step, from its newest checkpoint where it has one.

    Args:
        config: what to train; it must agree with the run's, where there is one.
        run_dir: made where it does not exist.
        start_from: what `load` takes, whose averaged weights a new run begins with; None: random ones.
        device: auto, cpu, cuda or mps.
        data_dir: see `data.load_images`.
        say: takes a line of text for the user, now and then.
    Returns:
        The folder of the last checkpoint.
    Raises:
        InputError: data, device, model, source or run folder do not fit, or a batch that the processes cannot share;
            what existed is as it was.
        RunError: the loss or a gradient is not finite, the disk is full, or one of several processes ended; the newest
            checkpoint stays.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    on = resolve_device(device)
    if config.training.batch_size % processes.world_size():
        raise InputError(
            f"training.batch_size of {config.training.batch_size} is not a multiple of the "
            f"{processes.world_size()} processes"
        )
    processes.join(on)
    run_dir, start_from = Path(run_dir), None if start_from is None else str(start_from)
    check_tracker(config.evaluation.tracker)
    if processes.is_rank0():
        _check_folder(run_dir)
    training_set = load_images(config.data.dataset, "train", data_dir, config.data.image_size)
    held_out = load_images(config.data.dataset, "test", data_dir, config.data.image_size)
    channels, image_size = training_set.images.shape[1:3]
    labels = told_classes(config, training_set)
    labels = labels if labels is None else labels.to(on)
    config = _with_sigma_data(config, training_set)
    continued: list[int] = []
    if processes.is_rank0():
        config, continued = _as_begun(config, run_dir)
    config = _with_warmup(config, processes.broadcast_number(config.training.warmup_steps))
    schedule = build_schedule(config.diffusion)
    scale = input_scale(config.diffusion.predicted, schedule)
    torch.manual_seed(config.training.seed)
    model = build_unet(config.model, channels, image_size, config.diffusion.num_timesteps, scale).to(on)
    if on.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    state = new_state(model, config.training)
    state.begun = processes.broadcast_number(continued[-1] if continued else 0)
    record = _run_record(config, training_set, on)
    if continued:
        record["continued_at"] = continued
    before: dict[str, Any] = {}
    if processes.is_rank0():
        before = _check_agreement(run_dir, record, start_from)
        if start_from is not None and not checkpoint_steps(run_dir):
            record["from"] = begin_from(state, load(start_from, device="cpu"), config)
            _check_unchanged(run_dir, record["from"])
    # before the folder is written, for it may refuse
    scorer = training_scorer(config, training_set, held_out, data_dir, on)

    with locked(run_dir, "--run") if processes.is_rank0() else nullcontext():
        seconds = _open_run(run_dir, record, state, start_from) if processes.is_rank0() else 0.0
        _broadcast_state(state)
        if state.step >= config.training.num_steps:
            say(f"{run_dir} has all its {state.step} steps; give more --training.num-steps to go on")
        else:
            beginning = f"continues from step {state.step}" if state.step else "starts"
            beginning += f" from {start_from}" if start_from is not None and not state.step else ""
            if state.begun and state.step == state.begun:
                beginning += ", where its learning rate had fallen to 0 and begins anew,"
            say(f"{run_dir} {beginning}: {training_cost(config, state, schedule, training_set, on)}")
            if before:
                now = record["computed"]
                changed = ", ".join(f"{name} {now[name]} (was {was})" for name, was in before.items())
                say(f"from here with {changed}: the weights will not be, bit for bit, those of a run in one sitting")
        session = Session(config, run_dir, state, schedule, held_out, training_set, record, seconds, scorer)
        try:
            session.catch_up()
            if state.step < config.training.num_steps:
                session.run(training_set.images.to(on), labels)
        except OSError as error:
            raise RunError(
                f"{run_dir} cannot be written at step {state.step}: {error.strerror or error}; "
                f"the last checkpoint is of step {last_step(run_dir)}"
            ) from error
        finally:
            session.tracking.close()
    return checkpoint_path(run_dir, state.step)


def told_classes(config: Config, training_set: ImageSet) -> torch.Tensor | None:
    """The classes of the images, where the network is told them.

    Raises:
        InputError: the data set has none, or another number of them.
    """
    if config.model.num_classes is None:
        return None
    if training_set.labels is None:
        raise InputError(f"model.num_classes is for data sets with classes; {config.data.dataset} has none")
    there = int(training_set.labels.max()) + 1
    if config.model.num_classes != there:
        raise InputError(f"model.num_classes must be {there} for {config.data.dataset}, not {config.model.num_classes}")
    return training_set.labels


def _open_run(run_dir: Path, record: dict[str, Any], state: TrainingState, start_from: str | None) -> float:
    """Restore the newest checkpoint, and cut what was logged beyond it; returns the seconds of training so far."""
    _check_agreement(run_dir, record, start_from)
    steps = checkpoint_steps(run_dir)
    if steps:
        _restore(state, checkpoint_path(run_dir, steps[-1]), steps[-1])
    path, text = run_dir / "config.json", json.dumps(record, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_atomically(path, text.encode())
    logged = cut_lines(run_dir / LOG, state.step)
    cut_lines(run_dir / SCORES, state.step)
    return float(logged[-1]["seconds"]) if logged else 0.0


def _broadcast_state(state: TrainingState) -> None:
    """Give every process the leader's state, so that only the leader needs the run's folder."""
    state.step = processes.broadcast_number(state.step)
    if not processes.is_distributed():
        return
    processes.broadcast_tensors([*state.model.parameters(), *state.ema.parameters()])
    if state.step:
        if not processes.is_rank0():
            state.restore(state.step, {})
        processes.broadcast_tensors(state.kept().values())


def _restore(state: TrainingState, folder: Path, step: int) -> None:
    if read_meta(folder)["step"] != step:
        raise InputError(f"{folder} says in its meta.json that it is of step {read_meta(folder)['step']}")
    load_parameters(state.model, folder, "model.safetensors")
    load_parameters(state.ema, folder, "ema.safetensors")
    state.restore(step, load_kept(folder, state.kept_shapes()))


def _with_sigma_data(config: Config, training_set: ImageSet) -> Config:
    """The configuration with the deviation of the images in it, where the prediction asks for it."""
    diffusion = config.diffusion
    if diffusion.prediction != "edm" or diffusion.sigma_data is not None:
        return config
    measured = pixel_deviation(training_set.images)
    if measured == 0:
        raise InputError(f"the images of {training_set.name} are all of one grey; the prediction edm needs others")
    return replace(config, diffusion=replace(diffusion, sigma_data=measured))


def _with_warmup(config: Config, warmup_steps: int) -> Config:
    return replace(config, training=replace(config.training, warmup_steps=warmup_steps))


def _as_begun(config: Config, run_dir: Path) -> tuple[Config, list[int]]:
    """What a run that exists keeps of its beginning when it is given more steps.

    Returns:
        The configuration, with the warm-up of the run where that was cut to a shorter run; and the steps at which its
        learning rate, which had fallen to 0, began anew.
    """
    if not (run_dir / "config.json").exists():
        return config, []
    record, old, _ = read_run_record(run_dir / "config.json")
    new, steps = config.training, checkpoint_steps(run_dir)
    continued = list(record.get("continued_at", []))
    first_num_steps = record.get("first_num_steps") or old.training.num_steps
    if steps and new.warmup_steps > old.training.warmup_steps == first_num_steps:
        config = _with_warmup(config, old.training.warmup_steps)
    ended = bool(steps) and steps[-1] >= old.training.num_steps
    if ended and new.num_steps > old.training.num_steps and old.training.decay != "constant":
        continued.append(old.training.num_steps)
    return config, continued


def _check_num_steps(run_dir: Path, old: Config, new: Config, begun: int, steps: list[int]) -> None:
    """Refuse a number of steps by which the steps that are done would have been others."""
    reached, planned = steps[-1] if steps else 0, new.training.num_steps
    if planned < reached:
        raise InputError(
            f"run {run_dir} has {reached} steps already; training.num_steps cannot be fewer, as {planned} are"
        )
    if old.training.decay == "constant" or not steps or reached >= old.training.num_steps:
        return
    if falling_from(old.training, begun) < reached:
        raise InputError(
            f"the learning rate of run {run_dir} is falling to 0, at step {old.training.num_steps} "
            f"(training.decay {old.training.decay}); train it that far first, or take another --run"
        )
    if falling_from(new.training, begun) < reached:
        raise InputError(
            f"run {run_dir} is at step {reached}, and for {planned} steps its learning rate should have begun to fall "
            f"at step {falling_from(new.training, begun)}; give more --training.num-steps"
        )


def _run_record(config: Config, training_set: ImageSet, device: torch.device) -> dict[str, Any]:
    """What `config.json` holds."""
    dtype = resolve_precision(config.training.precision, device)
    return {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "first_num_steps": config.training.num_steps,
        "data": {
            "name": training_set.name,
            "num_images": len(training_set),
            "image_shape": list(training_set.images.shape[1:]),
            "sha256": training_set.sha256,
        },
        "versions": versions(),
        "computed": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processes": processes.world_size(),
            "compiled": is_compiled(config.training, device),
        },
    }


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    packages = ("ddpm-lab", "torch", "numpy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def _as_typed(name: str, value: Any) -> str:
    """What to type for a setting to have a value."""
    group, _, rest = name.replace("_", "-").partition(".")
    if value is None or value == []:
        return f"leave --{group}.{rest} out"
    if isinstance(value, bool):
        return f"give --{group}.{'' if value else 'no-'}{rest}"
    return f"give --{group}.{rest} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _check_folder(run_dir: Path) -> None:
    """Refuse a folder that is something else than a run, before anything is made in it."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run {run_dir} is a file; name a folder, new or of a run")
    if run_dir.is_dir() and not (run_dir / "config.json").exists():
        # What a run killed at its very start leaves behind is no stranger.
        names = (path.name for path in run_dir.iterdir())
        others = sorted(name for name in names if name != ".lock" and not name.startswith(TEMPORARY_PREFIX))
        if others:
            raise InputError(
                f"--run {run_dir} holds {others[0]} but no config.json: it is not a run; name another folder"
            )


def _same_source(one: str, other: str) -> bool:
    """Whether two names are of one model, however its path is written."""
    return one == other or (not {one, other} & set(packaged_names()) and Path(one).resolve() == Path(other).resolve())


def _check_unchanged(run_dir: Path, begun_from: dict[str, Any]) -> None:
    """Refuse to begin a run a second time, after a kill before its first checkpoint, from other weights."""
    if not (run_dir / "config.json").exists():
        return
    before = read_run_record(run_dir / "config.json")[0].get("from", {})
    if before.get("sha256") != begun_from["sha256"]:
        raise InputError(
            f"{begun_from['source']} has changed since run {run_dir} began from step {before.get('step')} of it; "
            "name another --run"
        )


def _check_agreement(run_dir: Path, record: dict[str, Any], start_from: str | None) -> dict[str, Any]:
    """Refuse settings, data or a beginning other than the run's, except where changing them is harmless.

    Args:
        record: the run's to be, to which what it was trained with before is added.
    Returns:
        Of what it was trained with so far, what is another now and may change bits: dtype, threads, and so on.
    """
    if not (run_dir / "config.json").exists():
        return {}
    old_record, old, _ = read_run_record(run_dir / "config.json")
    if "imported" in old_record:
        raise InputError(f"run {run_dir} was imported, without what its training needs; name another --run")
    begun_from, steps = old_record.get("from"), checkpoint_steps(run_dir)
    if start_from is not None and (begun_from is None or not _same_source(str(begun_from.get("source")), start_from)):
        began = "random weights" if begun_from is None else begun_from.get("source")
        raise InputError(f"run {run_dir} began from {began}, not from {start_from}; name another --run")
    if begun_from is not None and steps:
        record["from"] = begun_from
    elif begun_from is not None and start_from is None:
        raise InputError(f"run {run_dir} has no checkpoint yet; give --from {begun_from.get('source')} once more")
    new = Config.from_dict(record["config"])
    if new.training.num_steps != old.training.num_steps:
        _check_num_steps(run_dir, old, new, (old_record.get("continued_at") or [0])[-1], steps)
    if steps:
        record["first_num_steps"] = old_record.get("first_num_steps", 0)  # 0: of a run that kept no averages
    for group, values in new.to_dict().items():
        free = FREE_TO_CHANGE.get(group, ())
        for name, value in values.items():
            there = old.to_dict()[group][name]
            if value != there and free is not None and name not in free:
                raise InputError(
                    f"run {run_dir} exists with {group}.{name} {json.dumps(there)}, not {json.dumps(value)}; "
                    f"{_as_typed(f'{group}.{name}', there)}, or another --run"
                )
    before: dict[str, Any] = {}
    if steps:  # trained with the versions and in the dtype of then; those of now are added where it is trained further
        earlier = old_record.get("earlier_versions", [])
        then, now = ({**of.get("versions", {}), **of.get("computed", {})} for of in (old_record, record))
        if steps[-1] >= new.training.num_steps:
            record |= {name: old_record.get(name, {}) for name in ("versions", "computed")}
        elif then != now:
            earlier = [*earlier, then]
            before = {name: then[name] for name in record["computed"] if name in then and then[name] != now[name]}
        if earlier:
            record["earlier_versions"] = earlier
    if old_record["data"].get("sha256") != record["data"]["sha256"]:
        raise InputError(f"run {run_dir} was begun on other images than those of {record['data']['name']} now")
    return before

"""A run: a folder that training writes, continues and can always be continued from.

    config.json   log.jsonl   scores.jsonl   checkpoints/step_00010000/   samples/step_00010000.png

`train` opens the folder, and hands over to a session. Invariant: the newest checkpoint is whole, and the log ends at or
after it; on resume what is later is cut, and comes again.
"""

import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddpm_lab import processes
from ddpm_lab.checkpoint import (
    MOMENTS,
    checkpoint_path,
    checkpoint_steps,
    last_step,
    load_optimizer,
    load_parameters,
    read_meta,
    set_moments,
)
from ddpm_lab.config import Config
from ddpm_lab.cost import training_cost
from ddpm_lab.data import ImageSet, load_images
from ddpm_lab.files import TEMPORARY_PREFIX, locked, replace_atomically
from ddpm_lab.fine_tuning import begin_from
from ddpm_lab.log import cut_lines
from ddpm_lab.schedule import build_schedule
from ddpm_lab.scores import training_scorer
from ddpm_lab.session import LOG, SCORES, Session
from ddpm_lab.settings import InputError, RunError
from ddpm_lab.tracking import check_tracker
from ddpm_lab.trained import load, packaged_names, read_run_record
from ddpm_lab.training import TrainingState, new_state, resolve_device, resolve_precision
from ddpm_lab.unet import build_unet

FREE_TO_CHANGE = {
    "training": ("num_steps", "compile", "log_every", "checkpoint_every", "keep_checkpoints"),
    "evaluation": None,
}


@processes.watched("the same command goes on from the newest checkpoint, with any number of processes")
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
    if config.training.batch_size % processes.count():
        raise InputError(
            f"training.batch_size {config.training.batch_size} cannot be shared by {processes.count()} processes alike"
        )
    processes.join(on)
    run_dir, start_from = Path(run_dir), None if start_from is None else str(start_from)
    check_tracker(config.evaluation.tracker)
    if processes.lead():
        _check_folder(run_dir)
    training_set = load_images(config.data.dataset, "train", data_dir, config.data.image_size)
    held_out = load_images(config.data.dataset, "test", data_dir, config.data.image_size)
    channels, image_size = training_set.images.shape[1:3]
    labels = told_classes(config, training_set)
    labels = labels if labels is None else labels.to(on)
    schedule = build_schedule(config.diffusion)
    torch.manual_seed(config.training.seed)
    model = build_unet(config.model, channels, image_size, config.diffusion.num_timesteps).to(on)
    if on.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    state = new_state(model, config.training)
    record = _run_record(config, training_set, on)
    before = None
    if processes.lead():
        before = _check_agreement(run_dir, record, start_from)
        if start_from is not None and not checkpoint_steps(run_dir):
            record["from"] = begin_from(state, load(start_from, device="cpu"), config)
            _check_unchanged(run_dir, record["from"])
    # before the folder is written, for it may refuse
    scorer = training_scorer(config, training_set, held_out, data_dir, on)

    with locked(run_dir, "--run") if processes.lead() else nullcontext():
        seconds = _open_run(run_dir, record, state, start_from) if processes.lead() else 0.0
        _agree(state)
        if state.step >= config.training.num_steps:
            more = "give more --training.num-steps to go on"
            if config.training.decay != "constant":  # its rate has fallen to 0
                more = f"--from {run_dir} and another --run train it further"
            say(f"{run_dir} has all its {state.step} steps; {more}")
        else:
            beginning = f"continues from step {state.step}" if state.step else "starts"
            beginning += f" from {start_from}" if start_from is not None and not state.step else ""
            say(f"{run_dir} {beginning}: {training_cost(config, state, schedule, training_set, on)}")
            if before is not None:
                say(f"from here in {record['computed']['dtype']}; until here it was trained in {before}")
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


def _agree(state: TrainingState) -> None:
    """Give every process the leader's state, so that only the leader needs the run's folder."""
    state.step = processes.number_of_leader(state.step)
    if not processes.joined():
        return
    processes.as_leader([*state.model.parameters(), *state.ema.parameters()])
    if state.step:
        if not processes.lead():
            set_moments(state.optimizer, state.model, state.step, {})
        processes.as_leader(state.optimizer.state[p][m] for p in state.model.parameters() for m in MOMENTS)


def _restore(state: TrainingState, folder: Path, step: int) -> None:
    if read_meta(folder)["step"] != step:
        raise InputError(f"{folder} says in its meta.json that it is of step {read_meta(folder)['step']}")
    load_parameters(state.model, folder, "model.safetensors")
    load_parameters(state.ema, folder, "ema.safetensors")
    load_optimizer(state.optimizer, state.model, folder, step)
    state.step = step


def _run_record(config: Config, training_set: ImageSet, device: torch.device) -> dict[str, Any]:
    """What `config.json` holds."""
    dtype = resolve_precision(config.training.precision, device)
    return {
        "config": config.to_dict(),
        "seed": config.training.seed,
        "data": {
            "name": training_set.name,
            "num_images": len(training_set),
            "image_shape": list(training_set.images.shape[1:]),
            "sha256": training_set.sha256,
        },
        "versions": versions(),
        "computed": {"device": device.type, "dtype": str(dtype).removeprefix("torch.")},
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


def _check_agreement(run_dir: Path, record: dict[str, Any], start_from: str | None) -> str | None:
    """Refuse settings, data or a beginning other than the run's, except where changing them is harmless.

    Args:
        record: the run's to be, to which what it was trained with before is added.
    Returns:
        The dtype that it was trained in so far, where it goes on in another.
    """
    if not (run_dir / "config.json").exists():
        return None
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
        if old.training.decay != "constant":
            raise InputError(
                f"run {run_dir} was planned for {old.training.num_steps} steps, and its learning rate falls to 0 there "
                f"(training.decay {old.training.decay}); {new.training.num_steps} need another --run"
            )
        if steps and new.training.num_steps < steps[-1]:
            raise InputError(
                f"run {run_dir} has {steps[-1]} steps already; training.num_steps cannot be fewer, "
                f"as {new.training.num_steps} are"
            )
    for group, values in new.to_dict().items():
        free = FREE_TO_CHANGE.get(group, ())
        for name, value in values.items():
            there = old.to_dict()[group][name]
            if value != there and free is not None and name not in free:
                raise InputError(
                    f"run {run_dir} exists with {group}.{name} {json.dumps(there)}, not {json.dumps(value)}; "
                    f"{_as_typed(f'{group}.{name}', there)}, or another --run"
                )
    before = None
    if steps:  # trained with the versions and in the dtype of then; those of now are added where it is trained further
        earlier = old_record.get("earlier_versions", [])
        then, now = ({**of.get("versions", {}), **of.get("computed", {})} for of in (old_record, record))
        if steps[-1] >= new.training.num_steps:
            record |= {name: old_record.get(name, {}) for name in ("versions", "computed")}
        elif then != now:
            earlier = [*earlier, then]
            before = then.get("dtype") if then.get("dtype") != now["dtype"] else None
        if earlier:
            record["earlier_versions"] = earlier
    if old_record["data"].get("sha256") != record["data"]["sha256"]:
        raise InputError(f"run {run_dir} was begun on other images than those of {record['data']['name']} now")
    return before

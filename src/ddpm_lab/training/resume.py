"""Whether a run may continue: what its `config.json` says, what a command may change, and why it is refused."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpm_lab.core.config import Config
from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import TEMPORARY_PREFIX
from ddpm_lab.models.checkpoint import checkpoint_steps
from ddpm_lab.models.trained import packaged_names, read_run_record
from ddpm_lab.training.optimizer import decay_start

MAY_CHANGE = (  # settings that a resumed run may change
    "data.dataset",  # a folder may have moved; the hash of the images decides
    "training.num_steps", "training.compile", "training.deterministic", "training.log_every",
    "training.checkpoint_every", "training.keep_checkpoints", "evaluation.",
)  # fmt: skip


@dataclass(frozen=True)
class PreviousRun:
    """What a run's folder held when a command started on it.

    Attributes:
        record: its `config.json`.
        config: the configuration in it.
        steps: of its checkpoints, ascending.
        restarts: steps at which the schedule of its learning rate started again.
    """

    record: dict[str, Any]
    config: Config
    steps: list[int]
    restarts: list[int]


def read_previous(run_dir: Path) -> PreviousRun | None:
    """The run in a folder; None where there is none yet.

    Raises:
        InputError: a file, a folder that holds something else, an imported run, or a damaged `config.json`.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run {run_dir} is a file; name a run's folder or a new one")
    path = run_dir / "config.json"
    if path.exists():
        record, config, _ = read_run_record(path)
        if "imported" in record:
            raise InputError(f"run {run_dir} was imported and cannot be trained; name another --run")
        return PreviousRun(record, config, checkpoint_steps(run_dir), record.get("continued_at", []))
    if run_dir.is_dir():
        names = sorted(path.name for path in run_dir.iterdir())
        # A run that was killed before it wrote config.json leaves a lock and temporary files.
        others = [name for name in names if name != ".lock" and not name.startswith(TEMPORARY_PREFIX)]
        if others:
            raise InputError(
                f"--run {run_dir} holds {others[0]} but no config.json, so it is not a run; name another folder"
            )
    return None


def continue_schedule(previous: PreviousRun, config: Config) -> tuple[Config, list[int]]:
    """Fit the schedule of the learning rate to a run that gets more steps.

    Returns:
        The configuration, with the run's warm-up if that was cut to the number of steps the run started with; and the
        steps at which the schedule starts again, of which the run's last step is one if the rate fell to 0 there.
    """
    old, num_steps, restarts = previous.config.training, config.training.num_steps, previous.restarts
    first_num_steps = previous.record.get("first_num_steps") or old.num_steps
    if previous.steps and config.training.warmup_steps > old.warmup_steps == first_num_steps:
        config = replace(config, training=replace(config.training, warmup_steps=old.warmup_steps))
    if previous.steps and previous.steps[-1] >= old.num_steps and num_steps > old.num_steps and old.decay != "constant":
        restarts = [*restarts, old.num_steps]
    return config, restarts


def resume_record(run_dir: Path, record: dict[str, Any], start_from: str | None) -> dict[str, Any]:
    """Check that the run in a folder, if any, may continue, and add its past to the new `config.json`.

    Args:
        record: the new `config.json`, changed in place.
        start_from: the model whose weights the command starts with, if any.
    Returns:
        How the run computed until now (dtype, threads, and so on) where that changes: the old values.
    Raises:
        InputError: settings, data or initial weights differ where that matters; the message names the difference.
    """
    previous = read_previous(run_dir)
    if previous is None:
        return {}
    old, config = previous.record, Config.from_dict(record["config"])
    _check_source(run_dir, previous, record.get("from"), start_from)
    _check_num_steps(run_dir, previous, config)
    old_settings = flat_settings(previous.config)
    for name, value in flat_settings(config).items():
        if value != old_settings[name] and not name.startswith(MAY_CHANGE):
            raise InputError(
                f"run {run_dir} exists with {name} {json.dumps(old_settings[name])}, not {json.dumps(value)}; "
                f"{as_flag(name, old_settings[name])}, or name another --run"
            )
    if old["data"].get("sha256") != record["data"]["sha256"]:
        raise InputError(f"run {run_dir} was started on other images than {record['data']['name']} holds now")
    labels = record["data"].get("labels_sha256")
    if old["data"].get("labels_sha256", labels) != labels:
        raise InputError(f"run {run_dir} was started with other labels of {record['data']['name']}: images have moved")
    if not previous.steps:
        return {}

    if "from" in old:
        record["from"] = old["from"]
    record["first_num_steps"] = old.get("first_num_steps", 0)  # 0: a run that kept no averages
    earlier, changed = old.get("earlier_versions", []), {}
    before, now = ({**each.get("versions", {}), **each.get("computed", {})} for each in (old, record))
    if previous.steps[-1] >= config.training.num_steps:  # nothing will be computed
        record |= {name: old.get(name, {}) for name in ("versions", "computed")}
    elif before != now:
        earlier = [*earlier, before]
        changed = {name: before[name] for name in record["computed"] if name in before and before[name] != now[name]}
    if earlier:
        record["earlier_versions"] = earlier
    return changed


def _check_source(run_dir: Path, previous: PreviousRun, new: dict[str, Any] | None, start_from: str | None) -> None:
    """Refuse a command that starts from other weights than the run did.

    Args:
        new: what the new `config.json` says of those weights, once they are read.
        start_from: the model that they come from, as the command names it.
    """
    old = previous.record.get("from", {"source": "random weights"})
    source = old["source"]
    if start_from is not None and ("from" not in previous.record or not _is_same_model(source, start_from)):
        raise InputError(f"run {run_dir} started from {source}, not from {start_from}; name another --run")
    if "from" in previous.record and start_from is None and not previous.steps:
        raise InputError(f"run {run_dir} has no checkpoint yet; give --from {source} again")
    if new is not None and new["sha256"] != old.get("sha256"):
        raise InputError(
            f"{source} has changed since run {run_dir} started from step {old.get('step')} of it; name another --run"
        )


def _is_same_model(one: str, other: str) -> bool:
    """Whether two sources are one model; names of packaged weights are not paths."""
    return one == other or (not {one, other} & set(packaged_names()) and Path(one).resolve() == Path(other).resolve())


def _check_num_steps(run_dir: Path, previous: PreviousRun, config: Config) -> None:
    """Refuse a number of steps with which the steps done would have had another learning rate."""
    old, new = previous.config.training, config.training
    step, start = ([0, *previous.steps][-1], [0, *previous.restarts][-1])
    if new.num_steps < step:
        raise InputError(f"run {run_dir} has {step} steps already; training.num_steps cannot be {new.num_steps}")
    if new.num_steps == old.num_steps or old.decay == "constant" or step == 0 or step >= old.num_steps:
        return
    if decay_start(old, start) < step:
        raise InputError(
            f"the learning rate of run {run_dir} is falling to 0 at step {old.num_steps} (training.decay {old.decay}); "
            "train it to that step first, or name another --run"
        )
    if decay_start(new, start) < step:
        raise InputError(
            f"run {run_dir} is at step {step}; with {new.num_steps} steps its learning rate should have started to "
            f"fall at step {decay_start(new, start)}; give more --training.num-steps"
        )


def flat_settings(config: Config) -> dict[str, Any]:
    """All settings by their full names, such as training.num_steps."""
    return {f"{group}.{name}": value for group, values in config.to_dict().items() for name, value in values.items()}


def as_flag(name: str, value: Any) -> str:
    """How to give a setting a value on the command line."""
    flag = name.replace("_", "-")
    if value is None or value == []:
        return f"leave --{flag} out"
    if isinstance(value, bool):
        return f"give --{flag if value else flag.replace('.', '.no-')}"
    return f"give --{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"

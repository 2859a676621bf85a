"""Tuned samplers: the file `tuned.json` beside a network's weights, written by `ddpm tune`.

An entry holds the timesteps and coefficients of one sampler, and what it was tuned for: the weights (by their SHA-256),
the length of the chain, and the guidance. With anything else it is refused, for there its numbers mean nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.errors import InputError
from ddpm_lab.core.files import read_json, replace_atomically
from ddpm_lab.core.settings import fits
from ddpm_lab.diffusion.multistep import Multistep
from ddpm_lab.models.trained import TrainedModel

FILE = "tuned.json"
TYPES: dict[str, Any] = {
    "weights_sha256": str,
    "num_timesteps": int,
    "num_steps": int,
    "guidance": float,
    "guide_sha256": str | None,
    "guidance_interval": tuple[float, ...],
    "timesteps": tuple[float, ...],
    "state": tuple[float, ...],
}


@dataclass(frozen=True)
class TunedSampler:
    """A sampler that was tuned for a network.

    Attributes:
        solver: its timesteps and coefficients.
        guidance: the guidance scale that it was tuned for; 1 for none.
        guide_sha256: of the weights of the guide; None for classifier-free guidance, or none.
        guidance_interval: as in `SamplingConfig`.
        sha256: of the entry.
    """

    solver: Multistep
    guidance: float
    guide_sha256: str | None
    guidance_interval: tuple[float, ...]
    sha256: str

    def describe(self) -> str:
        """What it was tuned for, in words."""
        by = " with a guide" if self.guide_sha256 else ""
        interval = " at noise levels {:g} to {:g}".format(*self.guidance_interval) if self.guidance_interval else ""
        return f"{len(self.solver.timesteps)} steps, guidance {self.guidance:g}{by}{interval}"


def tuned_samplers(trained: TrainedModel) -> list[TunedSampler]:
    """The samplers that were tuned for a network, as it is; none if there is no file.

    Raises:
        InputError: the file is not one of `ddpm tune`, or is of other weights.
    """
    path = trained.folder / FILE
    if not path.is_file():
        return []
    found = []
    for entry in _entries(path):
        if entry["weights_sha256"] != trained.weights_sha256:
            raise InputError(f"{path} was tuned for other weights ({trained.weights} ones are loaded); tune again")
        if entry["num_timesteps"] == trained.schedule.num_timesteps:
            found.append(_read(path, entry))
    return found


def find_tuned(
    trained: TrainedModel,
    num_steps: int | None,
    guidance: float | None,
    guide_sha256: str | None,
    guidance_interval: tuple[float, ...],
) -> TunedSampler:
    """The tuned sampler for some settings.

    Args:
        num_steps: number of evaluations; None: the most that there is.
        guidance: the guidance scale; None: that of the sampler, if it needs no guide.
        guide_sha256, guidance_interval: as for `TunedSampler`; the interval is used only with a guidance scale.
    Raises:
        InputError: there is no such sampler; the message names those that exist.
    """
    samplers = tuned_samplers(trained)
    fitting = [
        sampler
        for sampler in samplers
        if num_steps in (None, len(sampler.solver.timesteps))
        and sampler.guide_sha256 == guide_sha256
        and guidance in (None, sampler.guidance)
        and (guidance is None or sampler.guidance_interval == guidance_interval)
    ]
    if fitting:
        return max(fitting, key=lambda sampler: len(sampler.solver.timesteps))
    there = "; ".join(sampler.describe() for sampler in samplers)
    wanted = f"{num_steps or 'any'} steps, guidance {'any' if guidance is None else f'{guidance:g}'}"
    raise InputError(
        f"{trained.name} has no sampler tuned for {wanted}" + (f"; it has: {there}" if there else "")
        + f"; `ddpm tune {trained.name}` makes one"
    )  # fmt: skip


def save_tuned(trained: TrainedModel, entry: dict[str, Any]) -> Path:
    """Add an entry to the file, in place of one for the same settings or for other weights; returns its path.

    Raises:
        InputError: the file is not one of `ddpm tune`.
        OSError: it cannot be written; the old file stays.
    """
    path = trained.folder / FILE
    same = ("num_timesteps", "num_steps", "guidance", "guide_sha256", "guidance_interval")
    others = [
        old
        for old in (_entries(path) if path.is_file() else [])
        if old["weights_sha256"] == trained.weights_sha256 and any(old[name] != entry[name] for name in same)
    ]
    samplers = sorted([*others, entry], key=lambda each: (each["guidance"], each["num_steps"]))
    replace_atomically(path, (json.dumps({"samplers": samplers}, indent=1) + "\n").encode())
    return path


def _entries(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    entries = content.get("samplers") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and _is_entry(entry) for entry in entries):
        raise InputError(f"{path} is not a file of `ddpm tune`; delete it, and tune again")
    return entries


def _is_entry(entry: dict[str, Any]) -> bool:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    rows = entry.get("images")
    return (
        all(fits(values.get(name), hint) for name, hint in TYPES.items())
        and isinstance(rows, list)
        and all(isinstance(row, list) and fits(tuple(row), tuple[float, ...]) for row in rows)
        and [len(row) for row in rows] == list(range(1, entry["num_steps"] + 1))
    )


def _read(path: Path, entry: dict[str, Any]) -> TunedSampler:
    N = entry["num_steps"]
    images = torch.zeros(N, N, dtype=torch.float64)
    for i, row in enumerate(entry["images"]):
        images[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    try:
        timesteps, state = (torch.tensor(entry[name], dtype=torch.float64) for name in ("timesteps", "state"))
        solver = Multistep(timesteps, state, images)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    sha256 = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return TunedSampler(
        solver, float(entry["guidance"]), entry["guide_sha256"], tuple(entry["guidance_interval"]), sha256
    )

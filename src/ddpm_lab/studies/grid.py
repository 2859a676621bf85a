"""What a study is: one recipe trained with chains of several lengths and both kinds of betas, and scored alike.

A study is a list of independent cells in a folder:

    study.json   results.json   results.csv   report.html
    cells/T500-rescaled-seed0/   a run, with measures.jsonl, pictures and films, and done.json
    cells/T500-rescaled-seed0.failed.json         why, where it failed
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from ddpm_lab.core.config import RECIPES, Config, Features, Precision, SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import read_json
from ddpm_lab.core.settings import Range, SettingsGroup, read_toml

STUDIES = {path.stem: path for path in sorted((Path(__file__).parent / "packaged").glob("*.toml"))}
HEADLINE = "ddim-50"  # the sampler of headlines: equal evaluations whatever T
CONTINUOUS = 10_000  # timesteps that stand for continuous time: a network of that chain is sampled as any other
DECIDED = {  # settings of a cell that a study does not take from its recipe, and what says them
    "diffusion": {"num_timesteps": "grid.num_timesteps", "schedule": "grid.betas", "rescale_betas": "grid.betas"},
    "training": {"seed": "grid.seeds"},
    "evaluation": {
        "score_every": "measures.checkpoints",
        "score_images": "measures.images",
        "score_features": "measures.features",
    },
}


@dataclass(frozen=True, kw_only=True)
class GridConfig(SettingsGroup):
    """Which cells."""

    num_timesteps: tuple[int, ...] = (500, 1000, 2000)
    """lengths T of the chain"""
    betas: tuple[Literal["rescaled", "fixed", "cosine"], ...] = ("rescaled", "fixed")
    """rescaled and fixed are one cell at T = 1000"""
    seeds: tuple[int, ...] = (0,)
    """of training"""
    continuous: bool = True
    """one more cell a seed: a network of 10,000 timesteps, rescaled (cosine, where that is what is compared), that is
    sampled as a chain of each other length"""

    @property
    def compared(self) -> Literal["rescaled", "fixed", "cosine"]:
        """The betas whose lengths are compared: the first that are one process at every T, else the fixed range."""
        return min(self.betas, key=lambda betas: betas == "fixed")

    def _check(self) -> None:
        for name in ("num_timesteps", "betas", "seeds"):
            values = getattr(self, name)
            require(len(values) > 0, f"grid.{name} is empty; name at least one")
            require(len(set(values)) == len(values), f"grid.{name} names one twice: {values}")


@dataclass(frozen=True, kw_only=True)
class MeasuresConfig(SettingsGroup):
    """When cells are scored, and how."""

    checkpoints: Annotated[int, Range(1)] = 6
    """scores in the course of training, evenly spaced, the last at its end"""
    images: Annotated[int, Range(20)] = 500
    """sampled for each of those, by DDIM with evaluation.sample_steps steps, 50 where the recipe does not say"""
    final_images: Annotated[int, Range(20)] = 1_000
    """sampled for each score at the end"""
    samplers: tuple[str, ...] = ("ddim-10", "ddim-20", "ddim-50", "ddim-100", "dpmpp-10", "dpmpp-20")
    """at the end: sampler and number of steps"""
    ancestral_images: Annotated[int, Range(20)] = 64
    """sampled with all T steps"""
    bound_images: Annotated[int, Range(2)] = 200
    """held-out ones whose bits per dimension are bounded"""
    features: Features = "classifier"
    """the network that scores are taken over"""

    def _check(self) -> None:
        require(HEADLINE in self.samplers, f"measures.samplers must name {HEADLINE}, by which cells are compared")
        for name in self.samplers:
            parse_sampler(name)


def parse_sampler(name: str, precision: Precision = "auto") -> SamplingConfig:
    """'ddim-50' as settings, of a network evaluated in that precision.

    Raises:
        InputError: another form, an unknown sampler, or an impossible number of steps.
    """
    sampler, _, steps = name.partition("-")
    require(steps.isdecimal(), f"measures.samplers are sampler and steps, as 'ddim-50', not {name!r}")
    values = {"sampler": sampler, "num_steps": int(steps), "precision": precision}
    return SamplingConfig.from_dict(values)


@dataclass(frozen=True)
class Cell:
    """One generator of a study.

    Attributes:
        index: from 0, what `--cell` takes.
        name: of its folder.
        config: of its run.
        sampled_as: lengths of chain to sample it as; none but its own where empty.
    """

    index: int
    name: str
    config: Config
    sampled_as: tuple[int, ...] = ()

    @property
    def shown_as(self) -> int:
        """The length of chain that pictures and tables show it as."""
        own = self.config.diffusion.num_timesteps
        return own if not self.sampled_as else 1000 if 1000 in self.sampled_as else self.sampled_as[0]

    @property
    def label(self) -> str:
        """What figures call it."""
        diffusion = self.config.diffusion
        if self.sampled_as:
            return f"continuous time, {diffusion.beta_convention}"
        if diffusion.schedule == "linear" and diffusion.num_timesteps == 1000:
            return "T = 1000"  # by either convention
        return f"T = {diffusion.num_timesteps}, {diffusion.beta_convention}"


@dataclass(frozen=True)
class Study:
    """A study, whole.

    Attributes:
        name: of the file it came from.
        question: what it asks.
        recipe: the base, with what the study changes in it.
        grid, measures: see there.
    """

    name: str
    question: str
    recipe: dict[str, Any]
    grid: GridConfig = field(default_factory=GridConfig)
    measures: MeasuresConfig = field(default_factory=MeasuresConfig)

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order they are run: seed by seed, so that each seed is a whole study."""
        cells: list[Cell] = []
        for seed in self.grid.seeds:
            seen = set()
            for betas in self.grid.betas:
                for T in self.grid.num_timesteps:
                    linear = betas != "cosine"
                    key = (T, "both" if linear and T == 1000 else betas)
                    if key not in seen:
                        seen.add(key)
                        kind = "" if key[1] == "both" else f"-{betas}"
                        config = self._config(T, seed, linear, betas != "fixed" or T == 1000)
                        cells.append(Cell(len(cells), f"T{T}{kind}-seed{seed}", config))
            if self.grid.continuous:
                config = self._config(CONTINUOUS, seed, self.grid.compared != "cosine", True)
                cells.append(Cell(len(cells), f"continuous-seed{seed}", config, self.grid.num_timesteps))
        return cells

    def _config(self, T: int, seed: int, linear: bool, rescale: bool) -> Config:
        values = {group: dict(settings) for group, settings in self.recipe.items()}
        chain = {"num_timesteps": T, "schedule": "linear" if linear else "cosine"}
        others = {k: v for k, v in values.get("diffusion", {}).items() if k != "rescale_betas"}
        values["diffusion"] = others | chain | ({"rescale_betas": rescale} if linear else {})
        values["training"] = values.get("training", {}) | {"seed": seed}
        num_steps = Config.from_dict(values).training.num_steps
        evaluation = {
            "score_every": -(-num_steps // self.measures.checkpoints),
            "score_images": self.measures.images,
            "score_features": self.measures.features,
        }
        values["evaluation"] = values.get("evaluation", {}) | evaluation
        return Config.from_dict(values)

    @property
    def precision(self) -> Precision:
        """In which its cells are trained and sampled; 'auto' is what each worker's device makes of it."""
        return Config.from_dict(self.recipe).training.precision

    def in_precision(self, precision: Precision) -> "Study":
        """The same, with that precision where its own is 'auto'."""
        if self.precision != "auto":
            return self
        training = self.recipe.get("training", {}) | {"precision": precision}
        return dataclasses.replace(self, recipe=self.recipe | {"training": training})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, settings resolved."""
        whole = {
            "name": self.name,
            "question": self.question,
            "recipe": self.recipe,
            "grid": dataclasses.asdict(self.grid),
            "measures": dataclasses.asdict(self.measures),
        }
        return dict(json.loads(json.dumps(whole)))


def read_study(name: str) -> Study:
    """A packaged study, or a TOML file.

    The file has `recipe`, a name or the path of one beside it; `question`; tables `grid` and `measures`; and under
    `settings` what it changes in the recipe.

    Raises:
        InputError: no such study, not TOML, or settings that cannot be.
    """
    path, values = read_toml("study", STUDIES, name)
    try:
        return _parse_study(path, values)
    except InputError as error:
        raise InputError(f"study {name}: {error}") from error


def _parse_study(path: Path, values: dict[str, Any]) -> Study:
    known = ("question", "recipe", "grid", "measures", "settings")
    for key in values:
        require(key in known, f"there is no setting {key!r}; it has {', '.join(known)}")
    recipe = values.get("recipe")
    question = values.get("question", "What do more diffusion steps buy?")
    require(isinstance(recipe, str) and recipe != "", "recipe must name a recipe")
    require(isinstance(question, str), "question must be a text")
    beside = path.parent / str(recipe)
    _, base = read_toml("recipe", RECIPES, str(beside) if beside.is_file() else str(recipe))
    Config.from_dict(base)  # a recipe stands on its own
    changes = values.get("settings", {})
    require(isinstance(changes, dict), "settings must be a table of the recipe's groups")
    for group, settings in changes.items():
        require(isinstance(settings, dict), f"settings.{group} must be a table")
        for name in settings:
            decided = DECIDED.get(group, {}).get(name)
            require(decided is None, f"settings.{group}.{name} is what {decided} decides; set that")
        base[group] = base.get(group, {}) | settings
    study = Study(
        path.stem,
        str(question),
        base,
        GridConfig.from_dict(values.get("grid", {})),
        MeasuresConfig.from_dict(values.get("measures", {})),
    )
    assert study.cells  # each is checked as it is made
    shortest = min(study.grid.num_timesteps)
    for name in study.measures.samplers:
        steps = parse_sampler(name).num_steps or 0
        require(steps <= shortest, f"measures.samplers: {name} has more steps than the shortest chain, {shortest}")
    return study


def difference(study: Study, begun: Study) -> str | None:
    """The first part in which a study is not one that was begun, but for a precision settled there; None: it is."""
    asked, there = study.in_precision(begun.precision).to_dict(), begun.in_precision("auto").to_dict()
    return next((key for key, value in asked.items() if there[key] != value), None)


def cell_folder(out: Path, cell: Cell) -> Path:
    """Where a cell lies in a study's folder."""
    return out / "cells" / cell.name


def is_done(out: Path, cell: Cell) -> bool:
    """Whether a cell was computed to its end."""
    return (cell_folder(out, cell) / "done.json").is_file()


def failure_path(out: Path, cell: Cell) -> Path:
    """The file that says why a cell failed."""
    return out / "cells" / f"{cell.name}.failed.json"


def open_study(out: Path) -> Study:
    """The study that a folder belongs to.

    Raises:
        InputError: it belongs to none.
    """
    if not (out / "study.json").is_file():
        raise InputError(f"{out} is not a study: it holds no study.json")
    values = read_json(out / "study.json")
    try:
        Config.from_dict(values["recipe"])
        study = Study(
            str(values["name"]),
            str(values["question"]),
            values["recipe"],
            GridConfig.from_dict(values["grid"]),
            MeasuresConfig.from_dict(values["measures"]),
        )
        assert study.cells
        return study
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{out / 'study.json'} is not what a study writes: {error}") from error

"""The definition of a study: one recipe, trained with chains of several lengths and betas, and scored alike.

A study is a list of independent cells in a folder:

    study.json   results.json   results.csv   report.html
    cells/T500-rescaled-seed0/   a run, with measures.jsonl, pictures and films, and done.json
    cells/T500-rescaled-seed0.failed.json         the error, where it failed
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ddpm_lab.core.config import RECIPES, Config, Features, Precision, SamplingConfig
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.core.files import read_json
from ddpm_lab.core.settings import Range, SettingsGroup, read_toml

STUDIES = {path.stem: path for path in sorted((Path(__file__).parent / "packaged").glob("*.toml"))}
HEADLINE = "ddim-50"  # the sampler by which cells are compared: equal evaluations for every T
CONTINUOUS = 10_000  # timesteps that stand for continuous time
SETTINGS = ("question", "recipe", "grid", "measures", "settings")  # of a study's file
SET_BY = {  # settings of a recipe that a study sets for each cell, by the setting of the study that decides them
    "diffusion.num_timesteps": "grid.num_timesteps",
    "diffusion.schedule": "grid.betas",
    "diffusion.rescale_betas": "grid.betas",
    "training.seed": "grid.seeds",
    "evaluation.score_every": "measures.checkpoints",
    "evaluation.score_images": "measures.images",
    "evaluation.score_features": "measures.features",
}


@dataclass(frozen=True, kw_only=True)
class GridConfig(SettingsGroup):
    """The cells of a study."""

    num_timesteps: tuple[int, ...] = (500, 1000, 2000)
    """lengths T of the chain"""
    betas: tuple[Literal["rescaled", "fixed", "cosine"], ...] = ("rescaled", "fixed")
    """rescaled and fixed are the same cell at T = 1000"""
    seeds: tuple[int, ...] = (0,)
    """of training"""
    continuous: bool = True
    """one more cell per seed: a network of 10,000 timesteps, with rescaled betas (cosine if those are compared), that
    is sampled as a chain of each other length"""

    @property
    def compared(self) -> str:
        """The convention whose lengths are compared, as records name it: the first with one process for every T, else
        'fixed range'."""
        return next((betas for betas in self.betas if betas != "fixed"), "fixed range")

    def _check(self) -> None:
        for name in ("num_timesteps", "betas", "seeds"):
            values = getattr(self, name)
            require(len(values) > 0, f"grid.{name} is empty; give at least one value")
            require(len(set(values)) == len(values), f"grid.{name} contains a value twice: {values}")


@dataclass(frozen=True, kw_only=True)
class MeasuresConfig(SettingsGroup):
    """How and when cells are scored."""

    checkpoints: Annotated[int, Range(1)] = 6
    """number of scores during training, evenly spaced, the last one at the end"""
    images: Annotated[int, Range(20)] = 500
    """sampled for each score during training, by DDIM with evaluation.sample_steps steps (default: 50)"""
    final_images: Annotated[int, Range(20)] = 1_000
    """sampled for each score after training"""
    samplers: tuple[str, ...] = ("ddim-10", "ddim-20", "ddim-50", "ddim-100", "dpmpp-10", "dpmpp-20")
    """after training: sampler and number of steps"""
    ancestral_images: Annotated[int, Range(20)] = 64
    """sampled with all T steps"""
    bound_images: Annotated[int, Range(2)] = 200
    """number of held-out images for the bound of the bits per dimension"""
    features: Features = "classifier"
    """feature network of the scores"""

    def _check(self) -> None:
        require(HEADLINE in self.samplers, f"measures.samplers must contain {HEADLINE}, by which cells are compared")
        for name in self.samplers:
            parse_sampler(name)


def parse_sampler(name: str, **settings: Any) -> SamplingConfig:
    """The settings of a sampler given as 'ddim-50', with other settings by name.

    Raises:
        InputError: another form, an unknown sampler, or an impossible number of steps.
    """
    sampler, _, steps = name.partition("-")
    require(steps.isdecimal(), f"measures.samplers: write sampler and number of steps as 'ddim-50', not {name!r}")
    return SamplingConfig.from_dict({"sampler": sampler, "num_steps": int(steps), **settings})


@dataclass(frozen=True)
class Cell:
    """One trained network of a study.

    Attributes:
        index: from 0, the value for `--cell`.
        name: of its folder.
        config: of its run.
        sampled_as: lengths of chain to sample it as; empty: only its own.
    """

    index: int
    name: str
    config: Config
    sampled_as: tuple[int, ...] = ()

    @property
    def shown_as(self) -> int:
        """The length of chain that represents it in pictures and tables."""
        if not self.sampled_as:
            return self.config.diffusion.num_timesteps
        return 1000 if 1000 in self.sampled_as else self.sampled_as[0]

    @property
    def headline(self) -> str:
        """The key of the measure by which it is compared."""
        return f"{HEADLINE} as T={self.shown_as}" if self.sampled_as else HEADLINE

    @property
    def label(self) -> str:
        """Its name in figures."""
        diffusion = self.config.diffusion
        if self.sampled_as:
            return f"continuous time, {diffusion.beta_convention}"
        if diffusion.schedule == "linear" and diffusion.num_timesteps == 1000:
            return "T = 1000"  # with either convention
        return f"T = {diffusion.num_timesteps}, {diffusion.beta_convention}"


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: of its file.
        question: the question that it answers.
        recipe: the recipe of all cells, with the changes of the study.
        grid: its cells.
        measures: how they are scored.
    """

    name: str
    question: str
    recipe: dict[str, Any]
    grid: GridConfig = field(default_factory=GridConfig)
    measures: MeasuresConfig = field(default_factory=MeasuresConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a study from parsed JSON or TOML, and check every cell.

        Raises:
            InputError: invalid settings.
            KeyError: no name, question or recipe.
        """
        Config.from_dict(values["recipe"])
        grid, measures = GridConfig.from_dict(values["grid"]), MeasuresConfig.from_dict(values["measures"])
        study = cls(str(values["name"]), str(values["question"]), values["recipe"], grid, measures)
        assert study.cells  # building a cell checks it
        return study

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells in the order in which they are computed: all cells of one seed, then those of the next."""
        cells: dict[str, Cell] = {}
        for seed in self.grid.seeds:
            for betas in self.grid.betas:
                for T in self.grid.num_timesteps:
                    both = T == 1000 and betas != "cosine"  # rescaled and fixed betas are equal there
                    name = f"T{T}-seed{seed}" if both else f"T{T}-{betas}-seed{seed}"
                    config = self._config(T, seed, "rescaled" if both else betas)
                    cells.setdefault(name, Cell(len(cells), name, config))
            if self.grid.continuous:
                name = f"continuous-seed{seed}"
                config = self._config(CONTINUOUS, seed, "cosine" if self.grid.compared == "cosine" else "rescaled")
                cells[name] = Cell(len(cells), name, config, self.grid.num_timesteps)
        return list(cells.values())

    def _config(self, T: int, seed: int, betas: str) -> Config:
        """The settings of a cell."""
        values = {group: dict(settings) for group, settings in self.recipe.items()}
        diffusion = values.setdefault("diffusion", {})
        diffusion.pop("rescale_betas", None)
        diffusion |= {"num_timesteps": T, "schedule": "cosine" if betas == "cosine" else "linear"}
        if betas != "cosine":
            diffusion["rescale_betas"] = betas == "rescaled"
        values.setdefault("training", {})["seed"] = seed
        num_steps = Config.from_dict(values).training.num_steps
        values.setdefault("evaluation", {}).update(
            score_every=-(-num_steps // self.measures.checkpoints),
            score_images=self.measures.images,
            score_features=self.measures.features,
        )
        return Config.from_dict(values)

    @property
    def precision(self) -> Precision:
        """Precision of training and sampling; 'auto' depends on the device of each worker."""
        return Config.from_dict(self.recipe).training.precision

    def in_precision(self, precision: Precision) -> Self:
        """The same study with that precision in place of 'auto'."""
        if self.precision != "auto":
            return self
        training = self.recipe.get("training", {}) | {"precision": precision}
        return dataclasses.replace(self, recipe=self.recipe | {"training": training})

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))


def read_study(name: str) -> Study:
    """Read a packaged study, or a TOML file.

    The file has `recipe`, a name or the path of a file beside it; `question`; tables `grid` and `measures`; and under
    `settings` changes to the recipe.

    Raises:
        InputError: no such study, not TOML, or invalid settings.
    """
    path, values = read_toml("study", STUDIES, name)
    try:
        return _parse_study(path, values)
    except InputError as error:
        raise InputError(f"study {name}: {error}") from error


def _parse_study(path: Path, values: dict[str, Any]) -> Study:
    for key in values:
        require(key in SETTINGS, f"there is no setting {key!r}; the settings are {', '.join(SETTINGS)}")
    recipe = values.get("recipe")
    question = values.get("question", "What do more diffusion steps buy?")
    changes = values.get("settings", {})
    require(isinstance(recipe, str) and recipe != "", "recipe must be the name or the path of a recipe")
    require(isinstance(question, str), "question must be a text")
    require(isinstance(changes, dict), "settings must be a table of the recipe's groups")
    beside = path.parent / str(recipe)
    _, base = read_toml("recipe", RECIPES, str(beside) if beside.is_file() else str(recipe))
    Config.from_dict(base)  # a recipe must be valid by itself
    for group, settings in changes.items():
        require(isinstance(settings, dict), f"settings.{group} must be a table")
        for name in settings:
            decided = SET_BY.get(f"{group}.{name}")
            require(decided is None, f"settings.{group}.{name} is set by {decided}; change that instead")
        base[group] = base.get(group, {}) | settings
    tables = {"grid": values.get("grid", {}), "measures": values.get("measures", {})}
    study = Study.from_dict({"name": path.stem, "question": question, "recipe": base} | tables)
    shortest = min(study.grid.num_timesteps)
    for name in study.measures.samplers:
        steps = parse_sampler(name).num_steps or 0
        require(steps <= shortest, f"measures.samplers: {name} has more steps than the shortest chain, {shortest}")
    return study


def difference(study: Study, begun: Study) -> str | None:
    """The first part in which a study differs from one that was begun, apart from the precision it was begun in."""
    new, old = study.in_precision(begun.precision).to_dict(), begun.in_precision("auto").to_dict()
    return next((key for key, value in new.items() if old[key] != value), None)


def cell_folder(out: Path, cell: Cell) -> Path:
    """The folder of a cell in the folder of a study."""
    return out / "cells" / cell.name


def is_done(out: Path, cell: Cell) -> bool:
    """Whether a cell is finished."""
    return (cell_folder(out, cell) / "done.json").is_file()


def failure_path(out: Path, cell: Cell) -> Path:
    """The file that holds the error of a failed cell."""
    return out / "cells" / f"{cell.name}.failed.json"


def open_study(out: Path) -> Study:
    """Read the study of a folder.

    Raises:
        InputError: the folder is not a study's.
    """
    path = out / "study.json"
    require(path.is_file(), f"{out} is not a study: it has no study.json")
    try:
        return Study.from_dict(read_json(path))
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{path} is not a valid study: {error}") from error

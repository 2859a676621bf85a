"""The README of an exported generator: what it is, how to use it, what it was trained on, what it scores."""

import json
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.log import read_lines
from ddpm_lab.core.progress import progress
from ddpm_lab.core.settings import fits
from ddpm_lab.data.datasets import DATASETS
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.score_table import class_count, floor_count
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling.generation import generate
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale

MEANING = {"eps": "the noise in x_t", "x_0": "the clean image", "v": "v of Salimans and Ho 2022"}
NUM_IMAGES = 16
FIELDS = {"sampler": str, "num_evaluations": int, "num_images": int, "fid_label": str}


def write_card(trained: TrainedModel, form: str, licence: str, loop: str, folder: Path) -> None:
    """Write README.md and the picture in it, samples.png.

    Args:
        form: 'diffusers' or 'onnx'.
        licence: of the weights.
        loop: what the sampler's graph does, in words.
    """
    from jinja2 import Environment, StrictUndefined

    sampling = SamplingConfig(sampler="dpmpp", num_steps=min(20, trained.schedule.num_timesteps), batch_size=NUM_IMAGES)
    with progress("sampling", NUM_IMAGES * (sampling.num_steps or 0), "steps") as advance:
        images = torch.cat(list(generate(trained, NUM_IMAGES, sampling, advance)))
    save_png(folder / "samples.png", image_grid(images, scale=visible_scale(trained.image_shape[1])))

    records = scores_of(trained)
    data, dataset = trained.record["data"], trained.config.data.dataset
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters |= {"guidance": guidance_label, "score": _score, "classes": _classes, "floor": _floor}
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    card = environment.from_string(text).render(
        form=form,
        licence=licence,
        title=Path(trained.name).resolve().name,
        dataset=dataset if dataset in DATASETS else None,
        shape=" x ".join(map(str, trained.image_shape)),
        shape_list=", ".join(map(str, trained.image_shape)),
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        sampling=f"{sampling.num_steps} steps of DPM-Solver++, seed {sampling.seed}",
        loop=loop,
        meaning=MEANING[trained.config.diffusion.prediction],
        config=trained.config,
        classes=trained.num_classes,
        data=_data(data) if data.get("name", UNKNOWN) != UNKNOWN else "not known",
        step=trained.step,
        weights=trained.weights,
        imported="imported" in trained.record or dataset == UNKNOWN,
        begun_from=trained.record.get("from"),
        sha256=trained.weights_sha256,
        settings=json.dumps(trained.config.to_dict(), indent=2),
        records=records,
        lines="\n".join(map(json.dumps, records)),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def scores_of(trained: TrainedModel) -> list[dict[str, Any]]:
    """The records in the run's scores.jsonl that are of these very weights, and whole."""
    if trained.run_dir is None:
        return []
    records = read_lines(trained.run_dir / "scores.jsonl")
    return [record for record in records if record.get("weights_sha256") == trained.weights_sha256 and _whole(record)]


def _whole(record: dict[str, Any]) -> bool:
    def score(value: object) -> bool:
        if not isinstance(value, dict):
            return value is None
        ends = [value.get("low"), value.get("high")]
        return fits(value.get("value"), float) and (ends == [None, None] or all(fits(end, float) for end in ends))

    floor = record.get("floor")
    return (
        all(isinstance(record.get(name), kind) for name, kind in FIELDS.items())
        and all(score(record.get(name)) for name in ("fid", "inception_score_whole"))
        and (floor is None or (isinstance(floor, dict) and fits(floor.get("num_images"), int)))
        and (floor is None or fits(floor.get("fid"), float | None))
    )


def _data(data: dict[str, Any]) -> str:
    known = [f"{data['name']}"]
    if isinstance(data.get("num_images"), int):
        known.append(f"{data['num_images']:,} images")
    if isinstance(data.get("sha256"), str):
        known.append(f"SHA-256 of the pixels `{data['sha256']}`")
    return ", ".join(known)


def _floor(record: dict[str, Any]) -> str:
    """What real images have, with their number where they are fewer."""
    floor = record.get("floor")
    if floor is None or floor.get("fid") is None:
        return ""
    fewer = floor_count(record)
    return f"{floor['fid']:.4g}" + (f" ({fewer})" if fewer else "")


def _classes(record: dict[str, Any]) -> str:
    """Over how many classes an Inception Score is, where it is none of the FID network."""
    classes = class_count(record)
    return f", {classes}" if classes and record.get("inception_score_whole") else ""


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    interval = f" ({score['low']:.4g} to {score['high']:.4g})" if score.get("low") is not None else ""
    return f"{score['value']:.4g}{interval}"

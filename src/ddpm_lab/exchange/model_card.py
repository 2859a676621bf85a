"""The README of an exported generator: what it is, how to use it, its training data and its scores."""

import json
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.core.config import SamplingConfig
from ddpm_lab.core.log import SCORES, read_lines
from ddpm_lab.core.progress import progress
from ddpm_lab.data.datasets import DATASETS
from ddpm_lab.diffusion.guidance import guidance_label
from ddpm_lab.evaluation.score_table import class_count, floor_count
from ddpm_lab.models.diffusers_format import UNKNOWN
from ddpm_lab.models.trained import TrainedModel
from ddpm_lab.sampling.generation import generate
from ddpm_lab.sampling.image_files import image_grid, save_png, visible_scale
from ddpm_lab.studies.record_reader import first_fault

MEANING = {
    "eps": "the noise in x_t",
    "x_0": "the clean image",
    "v": "v of Salimans and Ho 2022",
    "edm": "F of Karras et al. 2022",
}
NUM_IMAGES = 16
SCORE: dict[str, Any] = {"value": float, "low": float | None, "high": float | None}
SHOWN: dict[str, Any] = {
    "sampler": str,
    "num_evaluations": int,
    "num_images": int,
    "fid_label": str,
    "fid": SCORE,
    "inception_score_whole": SCORE,
    "floor": {"num_images": int, "fid": float | None},
}


def write_card(trained: TrainedModel, form: str, licence: str, loop: str, folder: Path, push_to: str | None) -> None:
    """Write README.md and its picture, samples.png.

    Args:
        form: 'diffusers', 'run' or 'onnx'.
        licence: of the weights.
        loop: the sampler's graph, in words; of diffusers, the class of the pipeline.
        push_to: the repository on the hub that the folder is for, if any.
    """
    from jinja2 import Environment, StrictUndefined

    sampling = SamplingConfig(sampler="dpmpp", num_steps=min(20, trained.schedule.num_timesteps), batch_size=NUM_IMAGES)
    with progress("sampling", NUM_IMAGES * (sampling.num_steps or 0), "steps") as advance:
        images = torch.cat(list(generate(trained, NUM_IMAGES, sampling, advance)))
    save_png(folder / "samples.png", image_grid(images, scale=visible_scale(trained.image_shape[1])))

    records, dataset = scores_of(trained), trained.config.data.dataset
    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.filters |= {"guidance": guidance_label, "class_count": class_count, "floor_count": floor_count}
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    card = environment.from_string(text).render(
        form=form,
        licence=licence,
        loop=loop,
        trained=trained,
        config=trained.config,
        title=Path(push_to or trained.name).resolve().name,
        place=push_to or ".",
        dataset=dataset if dataset in DATASETS else None,
        unknown=UNKNOWN,
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        sampling=f"{sampling.num_steps} steps of DPM-Solver++, seed {sampling.seed}",
        meaning=MEANING[trained.config.diffusion.prediction],
        settings=json.dumps(trained.config.to_dict(), indent=2),
        records=records,
        lines="\n".join(map(json.dumps, records)),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def scores_of(trained: TrainedModel) -> list[dict[str, Any]]:
    """The complete records of these weights in the run's scores.jsonl."""
    if trained.run_dir is None:
        return []
    records = read_lines(trained.run_dir / SCORES)
    return [record for record in records if record.get("weights_sha256") == trained.weights_sha256 and _whole(record)]


def _whole(record: dict[str, Any]) -> bool:
    """Whether a record has all that the card shows, with both ends of an interval or neither."""
    scores = [record[name] for name in ("fid", "inception_score_whole") if isinstance(record.get(name), dict)]
    paired = all((score.get("low") is None) == (score.get("high") is None) for score in scores)
    return paired and first_fault(record, SHOWN) is None

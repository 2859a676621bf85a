"""ddpm-lab: train, sample, see and score denoising diffusion models (Ho et al. 2020) on small images.

The names below are the public ones. Each is imported from its module when first asked for, so that `import ddpm_lab`
and `ddpm --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm_lab.core.config import Config as Config
    from ddpm_lab.core.config import SamplingConfig as SamplingConfig
    from ddpm_lab.core.config import load_recipe as load_recipe
    from ddpm_lab.core.errors import InputError as InputError
    from ddpm_lab.data.datasets import load_images as load_images
    from ddpm_lab.diffusion.guidance import guided as guided
    from ddpm_lab.diffusion.process import diffusion_loss as diffusion_loss
    from ddpm_lab.diffusion.process import q_sample as q_sample
    from ddpm_lab.diffusion.samplers import Step as Step
    from ddpm_lab.diffusion.samplers import ddim_sample as ddim_sample
    from ddpm_lab.diffusion.samplers import ddim_steps as ddim_steps
    from ddpm_lab.diffusion.samplers import ddpm_sample as ddpm_sample
    from ddpm_lab.diffusion.samplers import ddpm_steps as ddpm_steps
    from ddpm_lab.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from ddpm_lab.diffusion.schedule import cosine_schedule as cosine_schedule
    from ddpm_lab.diffusion.schedule import linear_schedule as linear_schedule
    from ddpm_lab.diffusion.solvers import dpmpp_sample as dpmpp_sample
    from ddpm_lab.diffusion.solvers import dpmpp_steps as dpmpp_steps
    from ddpm_lab.diffusion.solvers import heun_sample as heun_sample
    from ddpm_lab.diffusion.solvers import heun_steps as heun_steps
    from ddpm_lab.diffusion.solvers import ipndm_sample as ipndm_sample
    from ddpm_lab.diffusion.solvers import ipndm_steps as ipndm_steps
    from ddpm_lab.diffusion.solvers import unipc_sample as unipc_sample
    from ddpm_lab.diffusion.solvers import unipc_steps as unipc_steps
    from ddpm_lab.diffusion.unet import UNet as UNet
    from ddpm_lab.evaluation.evaluate import evaluate as evaluate
    from ddpm_lab.evaluation.metrics import frechet_distance as frechet_distance
    from ddpm_lab.evaluation.metrics import statistics as statistics
    from ddpm_lab.models.trained import load as load
    from ddpm_lab.pictures.notebook import curves as curves
    from ddpm_lab.pictures.notebook import film as film
    from ddpm_lab.sampling.generation import generate as generate
    from ddpm_lab.sampling.images import Images as Images
    from ddpm_lab.sampling.images import sample as sample
    from ddpm_lab.training.run import train as train

_MODULES = {
    "core.config": ("Config", "SamplingConfig", "load_recipe"),
    "data.datasets": ("load_images",),
    "diffusion.process": ("diffusion_loss", "q_sample"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.metrics": ("frechet_distance", "statistics"),
    "sampling.generation": ("generate",),
    "sampling.images": ("Images", "sample"),
    "pictures.notebook": ("curves", "film"),
    "diffusion.guidance": ("guided",),
    "training.run": ("train",),
    "models.trained": ("load",),
    "diffusion.samplers": ("Step", "ddim_sample", "ddim_steps", "ddpm_sample", "ddpm_steps"),
    "diffusion.solvers": (
        *("dpmpp_sample", "dpmpp_steps", "heun_sample", "heun_steps"),
        *("ipndm_sample", "ipndm_steps", "unipc_sample", "unipc_steps"),
    ),
    "core.errors": ("InputError",),
    "diffusion.schedule": ("NoiseSchedule", "cosine_schedule", "linear_schedule"),
    "diffusion.unet": ("UNet",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ddpm_lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"ddpm_lab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

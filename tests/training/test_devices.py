"""Devices other than CPU and CUDA, as far as a CPU can tell: nothing on them is float64, and no optimizer is fused.

The device `meta`, which computes shapes and dtypes only, stands for MPS, which has no float64.
"""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_lab.core.config import EDM, DiffusionConfig, ModelConfig, TrainingConfig
from ddpm_lab.data.datasets import to_float, to_uint8
from ddpm_lab.diffusion.process import denoising_losses, input_scale
from ddpm_lab.diffusion.schedule import build_schedule
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.sampling.generation import STEPS
from ddpm_lab.training.loop import NoiseLevelSampler
from ddpm_lab.training.optimizer import Optimizer

SMALL = ModelConfig(base_channels=16, channel_multipliers=(1, 2), num_blocks=1, norm_groups=4)


class NoFloat64(TorchDispatchMode):
    """Fails where an operation on `meta` has a result in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, func
        return result


def test_the_stand_in_refuses_float64():
    with NoFloat64(), pytest.raises(AssertionError):
        torch.zeros(1, dtype=torch.float64).to("meta")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", EDM(0.5)])
def test_training_and_sampling_have_no_float64_on_the_device(prediction, optimizer):
    schedule, config = build_schedule(DiffusionConfig()), TrainingConfig(optimizer=optimizer, weighting="min_snr")
    model = build_unet(SMALL, 3, 8, 1000, input_scale(prediction, schedule))
    with NoFloat64():
        model = model.to("meta")
        assert all(p.device.type == "meta" for p in model.parameters())
        x_0 = to_float(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta"))
        t = torch.zeros(2, dtype=torch.int64, device="meta")
        losses = denoising_losses(model, schedule, x_0, t, torch.randn_like(x_0), prediction)
        weights = NoiseLevelSampler(config, schedule, prediction).weights(t, None)
        torch.autograd.backward((weights * losses).mean())
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).dtype == torch.float32
        updates = Optimizer(model, config)
        updates.step(1e-3)
        assert not updates._adam.defaults["fused"]
        stochastic = {"noise": lambda step: torch.randn_like(x_0), "eta": 1.0}
        for steps in STEPS.values():
            taken = {name: stochastic[name] for name in inspect.signature(steps).parameters if name in stochastic}
            *_, last = steps(model, schedule, torch.randn_like(x_0), 3, prediction=prediction, **taken)
            assert to_uint8(last.x_s).dtype == torch.uint8

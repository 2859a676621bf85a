"""Optimizers, their learning rate, and the loss scale of float16.

Adam is for all parameters; or Muon for the hidden kernels and Adam for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) reads the momentum of a kernel as a matrix
(outputs x all else) and makes its singular values nearly equal, by Newton-Schulz iterations in bfloat16. Its step is
scaled to the root mean square of Adam's (arXiv:2502.16982, section 2.2), so that one learning rate serves both.
"""

import math

import torch
from torch import Tensor, nn

from ddpm_lab.core.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
MOMENTUM = "momentum"  # Muon's
FIRST_SCALE, LEAST_SCALE, GREATEST_SCALE = 2.0**16, 2.0**-8, 2.0**32  # of the loss in float16
STEPS_TO_GROW = 2000  # without an overflow, after which the scale doubles
NOT_HIDDEN = ("conv_in", "conv_out", "time_embedding", "class_embedding")  # nor are the blocks' `embedding` layers


def hidden_kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of convolutions and attention between the first and the last layer, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 4) and not name.startswith(NOT_HIDDEN) and ".embedding." not in name
    }


class Optimizer:
    """Updates the parameters of a network; its state can be saved and restored by parameter name."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self._model = model
        self._kernels = hidden_kernels(model) if config.optimizer == "muon" else {}
        self._others = {name: p for name, p in model.named_parameters() if name not in self._kernels}
        device = next(model.parameters()).device
        self._adam = torch.optim.Adam(
            self._others.values(),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            fused=device.type in ("cpu", "cuda"),
            foreach=False,
        )
        self._optimizers: list[torch.optim.Optimizer] = [self._adam]
        # Muon takes matrices: views of the kernels' memory, so that a step of the matrix is a step of the kernel.
        self._matrices = {name: nn.Parameter(_as_matrix(kernel.detach())) for name, kernel in self._kernels.items()}
        if self._matrices:
            self._muon = torch.optim.Muon(
                self._matrices.values(), config.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self._optimizers.append(self._muon)
        self._reset()

    def set_count(self, updates: int) -> None:
        """Set the number of updates that Adam's corrections of its moments assume."""
        for state in self._adam.state.values():
            state["step"].fill_(float(updates))

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self._model.zero_grad()

    def step(self, learning_rate: float) -> None:
        """Update the parameters by their gradients."""
        for name, matrix in self._matrices.items():
            gradient = self._kernels[name].grad
            assert gradient is not None
            matrix.grad = _as_matrix(gradient)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Moments and momenta by kind and parameter name, shaped like the parameter; views, not copies."""
        adam = {f"{m}.{name}": self._adam.state[p][m] for m in MOMENTS for name, p in self._others.items()}
        return adam | {
            f"{MOMENTUM}.{name}": _as_kernel(self._muon.state[matrix]["momentum_buffer"], self._kernels[name])
            for name, matrix in self._matrices.items()
        }

    def _reset(self) -> None:
        """Create the state: no updates, moments and momenta of zero."""
        zeros = [
            {"step": torch.tensor(0.0), **{m: torch.zeros_like(p) for m in MOMENTS}} for p in self._others.values()
        ]
        _set_state(self._adam, zeros)
        if self._matrices:
            _set_state(self._muon, [{"momentum_buffer": torch.zeros_like(m)} for m in self._matrices.values()])


class LossScale:
    """The factor of the loss in float16, where small gradients would else be 0 (Micikevicius et al. 2017,
    arXiv:1710.03740, section 3.2).

    Where a gradient overflows, the step is skipped and the factor halved; it doubles after STEPS_TO_GROW steps without.
    Its powers of two change no digit. (`torch.amp.GradScaler` decides for each optimizer by itself, so that Muon could
    skip a step and Adam not.)

    Attributes:
        scale: the factor, () float32 on the network's device.
        steps_since_change: steps since it last changed, () int64.
        skipped_steps: steps skipped so far, () int64.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(FIRST_SCALE, device=device)
        self.steps_since_change = torch.tensor(0, device=device)
        self.skipped_steps = torch.tensor(0, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name; not copies."""
        return dict(vars(self))

    def unscale(self, parameters: list[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / self.scale)

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step; `finite`: whether all gradients were finite, else the step was skipped."""
        self.steps_since_change += 1
        if not finite:
            self.skipped_steps += 1
            self.scale /= 2
        elif self.steps_since_change >= STEPS_TO_GROW:
            self.scale.mul_(2).clamp_(max=GREATEST_SCALE)
        else:
            return
        self.steps_since_change.zero_()


def _set_state(optimizer: torch.optim.Optimizer, states: list[dict[str, Tensor]]) -> None:
    """Give an optimizer a state for each of its parameters, in their order."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})


def _as_matrix(kernel: Tensor) -> Tensor:
    """The same memory as (outputs, all else): in both memory formats the outputs are the outermost dimension.

    The order of the columns depends on the format, and Muon does not depend on it.
    """
    columns = kernel[0].numel()
    return kernel.as_strided((len(kernel), columns), (columns, 1))


def _as_kernel(matrix: Tensor, kernel: Tensor) -> Tensor:
    """The inverse of `_as_matrix`: the memory of a matrix in the shape and format of a kernel."""
    return matrix.as_strided(kernel.shape, kernel.stride())


def decay_start(config: TrainingConfig, start: int = 0) -> int:
    """The step at which the learning rate starts to fall, if it does; `start` as in `learning_rate`."""
    after_warmup = config.num_steps - start - min(config.warmup_steps, config.num_steps - start)
    return config.num_steps - round(after_warmup * config.decay_share)


def learning_rate(config: TrainingConfig, k: int, start: int = 0) -> float:
    """The learning rate of step k = 0, 1, ...: a linear warm-up, then constant, then, with a decay, falling to 0.

    Args:
        start: the step at which this schedule starts; above 0 when a run is continued after its rate fell to 0.
    """
    warmup = min(config.warmup_steps, config.num_steps - start)
    if k - start < warmup:
        return config.learning_rate * (k - start + 1) / warmup
    fall = decay_start(config, start)
    if config.decay == "constant" or k < fall:
        return config.learning_rate
    share = (k - fall) / max(config.num_steps - fall, 1)
    return config.learning_rate * (1 - share if config.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)

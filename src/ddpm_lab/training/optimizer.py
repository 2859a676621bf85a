"""What changes the weights: Adam; or Muon for the hidden kernels, and Adam for all else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel, read as a matrix
(outputs x all else), and makes its singular values nearly equal before it steps, by Newton-Schulz iterations in
bfloat16. Its step is scaled to the root mean square of Adam's (arXiv:2502.16982, section 2.2), so that one learning
rate serves both.
"""

import torch
from torch import Tensor, nn

from ddpm_lab.core.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
MOMENTUM = "momentum"  # Muon's
OUTSIDE = (
    "conv_in",
    "conv_out",
    "time_embedding",
    "class_embedding",
)  # no hidden kernels, like the blocks' `embedding`


def hidden_kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of convolutions and attention between the first and the last layer, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 4) and not name.startswith(OUTSIDE) and ".embedding." not in name
    }


class Optimizer:
    """Steps of the parameters of a network, and what a checkpoint keeps to go on with them."""

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
        # Muon wants matrices: the same numbers seen as such, so that a step of the matrix is one of the kernel.
        self._matrices = {name: nn.Parameter(_as_matrix(kernel.detach())) for name, kernel in self._kernels.items()}
        self._muon = (
            torch.optim.Muon(
                self._matrices.values(), config.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            if self._matrices
            else None
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._model.zero_grad()

    def step(self, learning_rate: float) -> None:
        """Change the parameters by their gradients."""
        for optimizer in (self._adam, *([] if self._muon is None else [self._muon])):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        self._adam.step()
        if self._muon is not None:
            for name, matrix in self._matrices.items():
                gradient = self._kernels[name].grad
                assert gradient is not None
                matrix.grad = _as_matrix(gradient)
            self._muon.step()  # type: ignore[no-untyped-call]

    def tensors(self) -> dict[str, Tensor]:
        """Moments and momenta after at least one step, named by kind and parameter and shaped like it; no copies."""
        adam = {f"{m}.{name}": self._adam.state[p][m] for m in MOMENTS for name, p in self._others.items()}
        if self._muon is None:
            return adam
        buffers = {name: self._muon.state[matrix]["momentum_buffer"] for name, matrix in self._matrices.items()}
        return adam | {f"{MOMENTUM}.{name}": _as_kernel(held, self._kernels[name]) for name, held in buffers.items()}

    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of `tensors`, known before any step."""
        adam = {f"{m}.{name}": p.shape for m in MOMENTS for name, p in self._others.items()}
        return adam | {f"{MOMENTUM}.{name}": kernel.shape for name, kernel in self._kernels.items()}

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Take moments and momenta, zero where there are none, and Adam's count of steps."""
        state = {
            index: {
                "step": torch.tensor(float(step)),
                **{m: _like(parameter, tensors.get(f"{m}.{name}")) for m in MOMENTS},
            }
            for index, (name, parameter) in enumerate(self._others.items())
        }
        self._adam.load_state_dict({"state": state, "param_groups": self._adam.state_dict()["param_groups"]})
        if self._muon is not None:
            held = {
                index: {"momentum_buffer": _as_matrix(_like(kernel, tensors.get(f"{MOMENTUM}.{name}")))}
                for index, (name, kernel) in enumerate(self._kernels.items())
            }
            self._muon.load_state_dict({"state": held, "param_groups": self._muon.state_dict()["param_groups"]})


def _like(parameter: Tensor, held: Tensor | None) -> Tensor:
    return torch.zeros_like(parameter) if held is None else torch.empty_like(parameter).copy_(held)


def _channels_last(kernel: Tensor) -> bool:
    return kernel.ndim == 4 and not kernel.is_contiguous()


def _as_matrix(kernel: Tensor) -> Tensor:
    """The same memory as (outputs, all else); the order of columns means nothing to Muon."""
    return (kernel.permute(0, 2, 3, 1) if _channels_last(kernel) else kernel).flatten(1)


def _as_kernel(matrix: Tensor, kernel: Tensor) -> Tensor:
    """The inverse of `_as_matrix`."""
    if not _channels_last(kernel):
        return matrix.view(kernel.shape)
    outputs, inputs, height, width = kernel.shape
    return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)

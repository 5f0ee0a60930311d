"""Muon: momentum whose steps are orthogonal matrices.

Keller Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon; the length of the steps and the weight
decay from Liu et al., Muon is Scalable for LLM Training (arXiv:2502.16982). `torch.optim.Muon` takes 2-D weights alone;
this one takes kernels of convolutions too, does matrices of one shape together, and gives the other parameters AdamW's
steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from utils.devices import is_ampere_or_newer

# The published quintic: steepest at 0, it lifts small singular values soonest and leaves all near 1, not at it.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices [n, a, b] with singular values of about 1 (0.7 to 1.2) and the singular vectors of `matrices`.

    Newton-Schulz iterations, computed in `dtype`. Singular values below about a thousandth of the matrix's norm stay
    smaller; a matrix of zeros stays one.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups with `matrices` True, AdamW for the others, at one learning rate.

    A weight [a, ...] counts as the matrix [a, b], a kernel of a convolution as [out, in x height x width]. Its step is
    lr x 0.2 sqrt(max(a, b)) times an orthogonal matrix, whose elements are about as large as those of AdamW's steps.
    Weight decay is AdamW's: apart from the gradient, lr x weight_decay of the weight. All state is in tensors. A step
    that a gradient scaler says to leave out is undone on the device, which the host does not wait for; it takes a copy
    of the matrices and their momenta.
    """

    #: For torch.amp.GradScaler: it sets `grad_scale` and `found_inf` for the step, and does not read the latter itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        matrices: bool = True,
    ) -> None:
        """Raises ValueError when a group of matrices has a parameter of fewer than two dimensions."""
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "matrices": matrices})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["matrices"] and parameter.ndim < 2:
                    raise ValueError(f"Muon: a parameter of shape {tuple(parameter.shape)} is no matrix")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gradients there are; parameters without one rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Any = getattr(self, "grad_scale", None)
        found_inf: Any = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters and group["matrices"]:
                gradients, momenta = _gradients(parameters), self._states(parameters, "momentum_buffer")
                if grad_scale is not None:
                    gradients = list(torch._foreach_mul(gradients, grad_scale.reciprocal()))
                undo = [] if found_inf is None else [(tensor, tensor.clone()) for tensor in (*parameters, *momenta)]
                self._orthogonal_step(group, parameters, gradients, momenta)
                for tensor, before in undo:
                    tensor.copy_(torch.where(found_inf.bool(), before, tensor))
            elif parameters:
                self._adamw_step(group, parameters, grad_scale, found_inf)
        return loss

    def _orthogonal_step(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]
    ) -> None:
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        same_shape: dict[tuple[int, int], list[int]] = {}
        for i, parameter in enumerate(parameters):
            same_shape.setdefault((len(parameter), parameter[0].numel()), []).append(i)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for shape, members in same_shape.items():
            matrices = torch.stack([ahead[i].flatten(1) for i in members])
            # bfloat16 is published to be enough.
            steps = orthogonalise(matrices, torch.bfloat16 if is_ampere_or_newer(matrices.device) else torch.float32)
            length = group["lr"] * 0.2 * math.sqrt(max(shape))
            for i, step in zip(members, steps, strict=True):
                parameters[i].add_(step.reshape(parameters[i].shape), alpha=-length)

    def _adamw_step(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        for parameter in parameters:
            state, device = self.state[parameter], parameter.device
            # A restored one may be on the CPU.
            state["step"] = state["step"].to(device) if "step" in state else torch.zeros((), device=device)
        adamw(
            parameters,
            _gradients(parameters),
            self._states(parameters, "exp_avg"),
            self._states(parameters, "exp_avg_sq"),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _states(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """The tensors called `name` in the state of each parameter, zeros at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]

"""Muon that orthogonalises matrices of one shape together, to save kernel launches for small networks."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon


class StackedMuon(Muon):
    """`torch.optim.Muon` with stacked matrices: the same state, results equal within rounding.

    Sharded matrices are updated by torch's implementation.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(hasattr(p, "full_tensor") for group in self.param_groups for p in group["params"]):
            super().step()
            return loss
        for group in self.param_groups:
            self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for (rows, columns), indices in by_shape.items():
            updates_of_shape = orthogonalised(
                torch.stack([updates[i] for i in indices]), group["ns_coefficients"], group["ns_steps"], group["eps"]
            ).to(parameters[0].dtype)
            scale = lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_([parameters[i] for i in indices], list(updates_of_shape.unbind()), alpha=-scale)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Return matrices [n, rows, columns] orthogonalised by Newton-Schulz iteration, in bfloat16 (Jordan et al. 2024).

    With x scaled to norm 1 and (a, b, c) = coefficients, a step is x <- a x + (b G + c G G) x, where G = x x^T.
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

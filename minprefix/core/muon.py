"""Muon (Jordan et al. 2024), the optimiser of keys and values that are trained directly.

torch.optim.Muon takes single matrices; a prefix is a stack of them, one for the keys and one for the values of each
head of each layer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: quick, singular values come to 0.7 to 1.2, not to 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Updates by the momentum of the gradient, orthogonalised, so that all its singular directions get equal steps.

    params: stacks of matrices (..., P, D), each matrix orthogonalised by itself. lr: about the root mean square of an
    update's elements. weight_decay: decoupled, times lr. It keeps keys small: a prefix with large keys draws attention
    away from the input and copies unseen names worse (see weights/README.md).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = newton_schulz(p.grad.lerp(momentum, group["momentum"]))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction, alpha=group["lr"] * max(p.shape[-2:]) ** 0.5)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Matrices (..., P, D) with their singular values moved near 1 by Newton-Schulz iterations; zeros stay zeros."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x

"""Muon for the matrices and AdamW for the rest, both on fp32 masters of bf16 parameters.

Muon: Jordan et al. 2024; updates are scaled to AdamW's usual size as in arXiv 2502.16982, so that
one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly orthogonal matrices of the same row and column spaces; ``[n, rows, columns]``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class MuonAdamW:
    """Steps all parameters of ``model``; matrices inside the layers by Muon, the rest by AdamW.

    Args:
        weight_decay: decoupled decay of the matrices, times the learning rate.
    """

    def __init__(self, model: nn.Module, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        self._weight_decay, self._momentum = weight_decay, momentum
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        self._rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers." in name:
                shapes[parameter.shape].append(parameter)
            else:
                self._rest.append(parameter)
        # Matrices of one shape are stacked: a few large products instead of dozens of small ones.
        self._stacks = [
            (group, torch.stack([p.detach().float() for p in group])) for group in shapes.values()
        ]
        self._momenta = [torch.zeros_like(master) for _, master in self._stacks]
        self._rest_masters = [p.detach().float().clone() for p in self._rest]
        self._adamw = torch.optim.AdamW(
            self._rest_masters, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' ``grad`` at rate ``lr``; clears the gradients."""
        for (group, master), momentum in zip(self._stacks, self._momenta, strict=True):
            gradient = torch.stack([p.grad for p in group]).float()
            momentum.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(momentum, self._momentum))
            master.mul_(1 - lr * self._weight_decay)
            master.add_(update.float(), alpha=-0.2 * max(master.shape[1:]) ** 0.5 * lr)
            torch._foreach_copy_(group, list(master.unbind()))
        for parameter, master in zip(self._rest, self._rest_masters, strict=True):
            master.grad = parameter.grad.float()
        self._adamw.param_groups[0]["lr"] = lr
        self._adamw.step()
        torch._foreach_copy_(self._rest, self._rest_masters)
        for parameter in (*self._rest, *(p for group, _ in self._stacks for p in group)):
            parameter.grad = None

"""Muon for every weight that is a matrix or a convolution, AdamW for the rest.

Muon (Jordan et al., 2024) needs fewer steps on such networks. PyTorch's takes matrices only, so a convolution's weight
[out, in, t, h, w] is handed over as the matrix [out, in*t*h*w], sharing its memory.
"""

from __future__ import annotations

import torch
from torch import nn


class MatrixMuon(torch.optim.Muon):
    """Muon over weights of two or more dimensions."""

    def __init__(self, weights: list[nn.Parameter], **settings) -> None:
        self.weights = weights
        self.matrices = []
        for weight in weights:
            rows = _rows(weight.detach(), weight)
            # A view or an error: a copy would be trained in the weight's place.
            self.matrices.append(nn.Parameter(rows.view(len(rows), -1)))
        super().__init__(self.matrices, adjust_lr_fn="match_rms_adamw", **settings)

    def step(self, closure=None):
        """One update from the weights' gradients."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else _rows(weight.grad, weight).reshape(matrix.shape)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the weights' gradients."""
        for weight in self.weights:
            weight.grad = None


def _rows(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] with its dimensions in the order in which `weight` lies in memory."""
    return tensor if weight.is_contiguous() else tensor.movedim(1, -1)


def make_optimisers(
    module: nn.Module, chosen, *, matrix_rate: float, rate: float, weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """Muon for the parameters of two or more dimensions whose name `chosen` accepts, AdamW for the others."""
    matrices, rest = [], []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        (matrices if p.ndim in (2, 4, 5) and chosen(name) else rest).append(p)
    muon = MatrixMuon(matrices, lr=matrix_rate, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    for optimiser in (muon, adamw):
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return [muon, adamw]


def set_rate(optimisers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every rate to `scale` times its full value."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full_rate"] * scale

"""Root-mean-square layer norm (https://arxiv.org/abs/1910.07467), alone or after a residual add."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    Args:
        x: [..., size].
        weight: [size], in x's dtype.

    Returns:
        [..., size] in x's dtype.
    """
    return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then norm it: (rms_norm(x + residual), x + residual)."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


class RMSNorm(nn.Module):
    """Holds the weight [size] of a norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x [..., size]."""
        return rms_norm(x, self.weight, self.eps)

    def forward_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), each [num_tokens, size]."""
        return add_rms_norm(x, residual, self.weight, self.eps)

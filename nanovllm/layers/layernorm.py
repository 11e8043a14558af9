"""Root-mean-square layer norm (https://arxiv.org/abs/1910.07467), alone or after a residual add."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    Args:
        x: [..., size].
        weight: [size], in x's dtype.

    Returns:
        [..., size] in x's dtype.
    """
    return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, if there is one, then norm: (rms_norm(sum), sum).

    Args:
        x, residual: [num_tokens, size].
        weight: [size], in x's dtype.
    """
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps), total


class RMSNorm(nn.Module):
    """Holds the weight [size] of a norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.add_rms_norm = add_rms_norm
        if kernels.usable():
            from nanovllm.kernels.fused import add_rms_norm as kernel

            self.add_rms_norm = kernel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), each [num_tokens, size]."""
        return self.add_rms_norm(x, residual, self.weight, self.eps)

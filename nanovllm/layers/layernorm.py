"""Root-mean-square layer norm (https://arxiv.org/abs/1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels import kernel_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    Args:
        x: [..., size].
        weight: [size], in x's dtype.

    Returns:
        [..., size] in x's dtype.
    """
    return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """Holds the weight [size] of a norm; options: its device and dtype."""

    def __init__(self, size: int, eps: float, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **options), requires_grad=False)
        self.rms_norm = kernel_of(rms_norm, "fused", self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, size] -> [num_tokens, size]."""
        return self.rms_norm(x, self.weight, self.eps)

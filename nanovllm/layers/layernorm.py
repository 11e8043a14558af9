"""Root-mean-square layer norm (https://arxiv.org/abs/1910.07467)."""

from functools import cache
from typing import Any

import torch
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
    # F.rms_norm takes twice as long on a CPU, and numbers as operands longer than a tensor.
    exact = x.float()
    norm: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    square = torch.addcmul(_tensor_of(eps, x.device), norm, norm, value=1 / x.size(-1))
    return (exact * square.rsqrt_()).to(x.dtype).mul_(weight)


@cache
def _tensor_of(number: float, device: torch.device) -> Tensor:
    return torch.tensor(number, dtype=torch.float32, device=device)


class RMSNorm(nn.Module):
    """Holds the weight [size] of a norm; options: its device and dtype."""

    def __init__(self, size: int, eps: float, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **options), requires_grad=False)
        self.rms_norm = kernel_of(rms_norm, "fused", self.weight.device, size)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, size] -> [num_tokens, size]."""
        return self.rms_norm(x, self.weight, self.eps)

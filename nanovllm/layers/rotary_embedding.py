"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves rotated as in Qwen."""

import torch
from torch import Tensor, nn


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) by their position's angles, in float32.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos, sin: float32 [num_tokens, 1, head_dim / 2].

    Returns:
        [num_tokens, num_heads, head_dim] in x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),  # first * cos - second * sin
            torch.addcmul(second * cos, first, sin),  # second * cos + first * sin
        ),
        dim=-1,
    )
    return rotated.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Holds cos and sin of every position: float32 [max_positions, head_dim], cos | sin."""

    cos_sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        theta: float,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        # As transformers computes them: float32 throughout, and on the CPU, since one ulp of a
        # frequency is multiplied by the position.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, 1.0 / theta**exponents)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)

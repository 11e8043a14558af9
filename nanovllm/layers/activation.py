"""SiLU-gated activation of the MLP."""

import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels import kernel_of


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, for gate and up side by side.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size]; the gate half is overwritten.

    Returns:
        [num_tokens, intermediate_size], a view of the gate half.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


class SiluAndMul(nn.Module):
    """silu_and_mul, by a kernel where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.silu_and_mul = kernel_of(silu_and_mul, "fused")

    def forward(self, gate_up: Tensor) -> Tensor:
        """[num_tokens, 2 * intermediate_size] -> [num_tokens, intermediate_size]."""
        return self.silu_and_mul(gate_up)

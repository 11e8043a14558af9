"""SiLU-gated activation of the MLP."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, for gate and up side by side.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size]; the gate half is overwritten.

    Returns:
        [num_tokens, intermediate_size], a view of the gate half.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)

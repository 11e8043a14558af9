"""K and V in one byte an element: e4m3 numbers, and a scale for each head of each token.

A scale is the smallest power of two that takes the largest element of its row (head_dim elements)
to at most 448, e4m3's largest number. So a row has the same relative error whatever its size, and
nothing is calibrated. Multiplying by a power of two does not round: an element comes back with the
four significant bits of its e4m3 number in float32, in bfloat16, and in float16 too (but from
63,488 on, which rounds to 65,536). Attention can therefore be given rounded K and V in the model's
dtype, and finds the same numbers in the cache later.

Stored is its exponent as in float32, 127 for 1.0: the OCP's e8m0 (https://arxiv.org/abs/2310.10537).
A row of zeros has the smallest one, 1. A row that is not finite has 255, and is NaN as a whole.

Kernels' counterpart: nanovllm.kernels.kv_quantization.
"""

import torch
from torch import Tensor

# Of float32: where the exponent begins, and two that are not finite. 448 is 1.75 * 2^8.
MANTISSA_BITS = 23
INFINITY = 0x7F800000
NAN = 0x7FC00000
BEYOND_1_75 = 0x1FFFFF  # added to a mantissa of more than 1.75, carries into the exponent


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, each with its scale.

    Args:
        rows: [..., head_dim].

    Returns:
        uint8 [..., head_dim], the bytes of e4m3 numbers; uint8 [...], the scales' exponents.
    """
    numbers = rows.float()
    # As integers, magnitudes are in the same order, NaN the last.
    peaks = numbers.abs().view(torch.int32).amax(dim=-1)
    exponents = ((peaks + BEYOND_1_75) >> MANTISSA_BITS) - 8
    exponents = torch.where(peaks < INFINITY, exponents.clamp(min=1), 255)
    inverse = ((254 - exponents) << MANTISSA_BITS).view(torch.float32)
    values = (numbers * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.view(torch.uint8), exponents.to(torch.uint8)


def dequantize(values: Tensor, exponents: Tensor, out: Tensor) -> Tensor:
    """The numbers of `quantize`, written to `out` [..., head_dim] in its dtype."""
    bits = torch.where(exponents == 255, NAN, exponents.int() << MANTISSA_BITS)
    scales = bits.view(torch.float32).unsqueeze(-1)
    return torch.mul(values.view(torch.float8_e4m3fn).float(), scales, out=out)

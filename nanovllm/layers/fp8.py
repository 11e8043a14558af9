"""How a linear layer is computed whose weight is FP8, and by which of several ways.

Of few tokens reading the weight is all that takes time: it is converted in registers, and nothing
else is rounded. Of more, tokens are made FP8 too, each 128 numbers with a scale of their own, since
a tensor core multiplies those twice as fast.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers.products import (
    LinearInputs,
    ProductTable,
    few_tokens,
    finished,
    is_small,
    plain,
    small_batch,
)
from nanovllm.utils.quantization import BLOCK, E4M3, E4M3_MAX, Fp8Rows, Fp8Weight


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Tokens [num_tokens, size] as FP8, each 128 numbers with the scale that makes the largest 448.

    Zeros have a scale of 0. 128 divides size.
    """
    groups = x.float().unflatten(1, (-1, BLOCK))
    scales = groups.abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    values = groups / scales.masked_fill(scales == 0, 1.0)
    values = values.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).flatten(1)
    return Fp8Rows(values, scales.squeeze(-1).T.contiguous(), len(x), x.dtype)


def dequantized(inputs: LinearInputs, scales: Tensor) -> Tensor:
    """`plain`, with a weight that is made for it each time: what the others are compared with."""
    weight = Fp8Weight(inputs.weight, scales).dequantized(inputs.x.dtype)
    return plain(inputs._replace(weight=weight))


def converted(inputs: LinearInputs, scales: Tensor, counters: Tensor) -> Tensor:
    """The norm's launch and another; counters: from kernels.small_linear."""
    return small_batch(inputs, counters, scales)


def own_fp8(inputs: LinearInputs, scales: Tensor, counters: Tensor) -> Tensor:
    """Likewise two launches."""
    from nanovllm.kernels.small_linear import small_linear

    _, weight, act, bias, _, residual, out = inputs
    how = residual, act is not None, out, scales
    return small_linear(_quantized(inputs), weight, bias, counters, *how)


def torch_fp8(inputs: LinearInputs, scales: Tensor) -> Tensor | Fp8Rows:
    """PyTorch's product of blocks, between launches for what stands before and after it.

    What a gated layer gives is FP8, since it goes into another product.
    """
    from nanovllm.kernels.fp8_rows import silu_and_quantize

    x, weight, act, bias = inputs[:4]
    rows = _quantized(inputs, step=BLOCK)
    by_row, by_block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    how = rows.scales.T, by_row, scales.T, by_block
    y = F.scaled_mm(rows.values, weight.T, *how, output_dtype=x.dtype)
    if act is not None:
        return silu_and_quantize(y, len(rows))
    y = y[: len(rows)]
    return finished(inputs, y if bias is None else y.add_(bias))


def _quantized(inputs: LinearInputs, step: int = 1) -> Fp8Rows:
    """The tokens after their norm, the rows rounded up to a multiple of step."""
    from nanovllm.kernels.fp8_rows import quantize_rows

    x, norm = inputs.x, inputs.norm
    if isinstance(x, Fp8Rows):
        return x
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return quantize_rows(x, norm_weight, eps, step)


def is_kept(
    shape: Sequence[int], block: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """True if a weight of FP8 numbers is kept as such; else it is dequantised while it is loaded.

    That is where there are kernels for tokens of the dtype, and they are faster, as they are not in
    small layers.

    Args:
        shape: of a matrix, or a stack of them.
        block: the rows and the inputs that share a scale.
    """
    is_stack = len(shape) == 3
    is_large = is_stack or not is_small(shape)
    has_kernels = block[0] % 64 == 0 and block[1] >= (32 if is_stack else BLOCK)
    return kernels.multiplies_fp8(device) and dtype.itemsize == 2 and is_large and has_kernels


def fp8_table(
    weight: Fp8Weight, dtype: torch.dtype, is_gated: bool = False, has_bias: bool = False
) -> ProductTable:
    """As products.product_table, of a layer whose weight is FP8, for tokens of a dtype.

    To round tokens would be faster from 2 on; up to 16 the products that do not are near enough.
    """
    scales, device = weight.scales, weight.values.device
    if not kernels.multiplies_fp8(device) or (is_gated and has_bias):
        return {math.inf: partial(dequantized, scales=scales)}
    from nanovllm.kernels.small_linear import small_linear_counters

    counters = small_linear_counters(weight.shape[0], device)
    own = partial(own_fp8, scales=scales, counters=counters)
    most: ProductTable = {math.inf: own}
    if dtype == torch.bfloat16 and _has_torch_fp8(weight):
        # PyTorch's tiles of 128 outputs and 128 tokens are too few for a GPU in a narrow layer.
        is_wide = is_gated or weight.shape[0] >= 6144
        most = {} if is_wide else {256: own}
        most[math.inf] = partial(torch_fp8, scales=scales)
    return {
        1: partial(few_tokens, scales=scales),
        16: partial(converted, scales=scales, counters=counters),
        64: own,
        128: own,
        **most,
    }


def _has_torch_fp8(weight: Fp8Weight) -> bool:
    """True if PyTorch multiplies blocks of FP8 where this weight is: on Hopper, from CUDA 12.9."""
    from nanovllm.kernels.device import is_hopper

    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    is_whole = weight.block == (BLOCK, BLOCK) and weight.scales.size(1) % 4 == 0
    is_there = hasattr(F, "scaled_mm") and version >= (12, 9)
    return is_whole and is_there and is_hopper(weight.values.device)

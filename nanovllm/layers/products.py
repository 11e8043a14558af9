"""How a linear layer is computed, and by which of several ways for how many tokens.

A product takes what stands before and after the matrix product as well, and decides itself how
many launches that makes. `product_table` is the one place that tells which of them runs when.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.device import has_matrix_unit, multiplies_bfloat16, uses_onednn
from nanovllm.utils.quantization import Fp8Rows

T = TypeVar("T")


class LinearInputs(NamedTuple):
    """What a product is given: residual + (norm(x) @ weight.T + bias) is wanted.

    x: [num_tokens, input_size], FP8 only from a gated layer of FP8 weights. weight: [num_rows,
    input_size]. act: for a gated layer, what makes SiLU of the first half of the columns, times the
    second half, of the product. bias: [num_rows]. residual: [num_tokens, num_rows], may be
    overwritten. out: [num_tokens, num_rows], to be filled, which may be `residual`; not in a gated
    layer. None: there is none of it.
    """

    x: Tensor | Fp8Rows
    weight: Tensor
    act: Callable[[Tensor], Tensor] | None
    bias: Tensor | None
    norm: RMSNorm | None
    residual: Tensor | None
    out: Tensor | None

    def normed(self) -> Tensor:
        """x after its norm, in a launch of its own; of FP8, which has none, what it stands for."""
        if isinstance(self.x, Fp8Rows):
            return self.x.dequantized()
        return self.x if self.norm is None else self.norm(self.x)


Product = Callable[[LinearInputs], Tensor | Fp8Rows]
# By the most tokens that each product is for, in order; the last is for any number.
ProductTable = dict[float, Product]


def product_for(num_tokens: int, products: Mapping[float, T]) -> T:
    """The entry of a table by the most tokens that so many are for."""
    for most, product in products.items():  # faster than next(...), once for each layer
        if num_tokens <= most:
            return product
    raise AssertionError("the last is for any number")


def first_sizes(products: Mapping[float, object]) -> set[int]:
    """The fewest tokens that each entry of a table by the most tokens is for."""
    return {1, *(int(most) + 1 for most in products if most < math.inf)}


def plain(inputs: LinearInputs) -> Tensor:
    """PyTorch's product, its parts one after the other: what the others are compared with."""
    x, weight, bias, residual = inputs.normed(), inputs.weight, inputs.bias, inputs.residual
    out = residual if inputs.out is None else inputs.out
    if residual is not None and bias is None and x.is_cuda:  # in the product, and rounded once
        return torch.addmm(residual, x, weight.T, out=out)
    if residual is None and bias is None and out is not None:
        return torch.mm(x, weight.T, out=out)
    y = F.linear(x, weight, bias)
    return finished(inputs, y)


def finished(inputs: LinearInputs, y: Tensor) -> Tensor:
    """What stands after product and bias: activation or sum."""
    residual = inputs.residual
    out = residual if inputs.out is None else inputs.out
    if inputs.act is not None:
        y = inputs.act(y)
    if residual is not None:
        return torch.add(residual, y, out=out)
    return y if out is None else out.copy_(y)


def onednn(inputs: LinearInputs) -> Tensor:
    """oneDNN's product of a packed weight on a CPU, bias and sum within it.

    oneDNN generates code for each number of rows and keeps it, half a MB a layer's shape: numbers
    that occur are rounded up to few.
    """
    x, weight, bias, residual = inputs.normed(), inputs.weight, inputs.bias, inputs.residual
    num_tokens = x.size(0)
    num_missing = rounded_rows(num_tokens) - num_tokens
    if residual is not None and not num_missing:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    else:
        x = F.pad(x, (0, 0, 0, num_missing)) if num_missing else x
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:num_tokens]
        y = y if residual is None else residual.add_(y)
    if inputs.act is not None:
        y = inputs.act(y)
    return y if inputs.out is None else inputs.out.copy_(y)


def rounded_rows(num_rows: int) -> int:
    """The next of eight numbers from one power of two to the next; up to 16 all of them."""
    step = 1 << max((num_rows - 1).bit_length() - 4, 0)
    return -(-num_rows // step) * step


def by_panels(inputs: LinearInputs, linear: Callable[..., Tensor], num_out: int) -> Tensor:
    """The kernel in C, of a weight in panels: all in one launch."""
    x, weight, act, bias, norm, residual, out = inputs
    assert isinstance(x, Tensor)
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    out = residual if out is None else out
    return linear(x, weight, num_out, act is not None, bias, norm_weight, eps, residual, out)


def pack(weight: Tensor, is_gated: bool = False) -> Tensor:
    """A weight [num_rows, input_size] in the layout in which this machine multiplies fastest.

    Panels for the kernel in C, or oneDNN's layout; where neither can be had, or Triton's kernels
    can, the weight itself.
    """
    if kernels.usable(weight.device):
        return weight
    if _takes_panels(weight):
        from nanovllm.kernels.cpu import linear

        return linear.panels(weight, is_gated)
    return pack_for_onednn(weight)


def pack_for_onednn(weight: Tensor) -> Tensor:
    """A weight in the layout for `onednn`, where that can be had.

    Otherwise the weight itself: without oneDNN, in float16 on most processors, or where
    the caller has turned oneDNN off. The operators are private to torch: its public ones
    (torch.utils.mkldnn) take 1.6 times as long.
    """
    if not uses_onednn():
        return weight
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    except (AttributeError, RuntimeError):  # none in this torch; not for this device or dtype
        return weight
    return packed


def is_panels(weight: Tensor) -> bool:
    """True of a linear layer's weight that `pack` has made into panels."""
    return weight.dim() == 3


def _takes_panels(weight: Tensor) -> bool:
    """True if the kernel in C multiplies by a weight at least as fast as oneDNN.

    Of bfloat16, where its instructions are those that oneDNN would use, or there are none.
    """
    if not kernels.usable_on_cpu(weight.device, weight.size(1)):
        return False
    from nanovllm.kernels.cpu.linear import has_pairs

    if weight.dtype != torch.bfloat16 or not multiplies_bfloat16():
        return True
    return has_pairs() and not has_matrix_unit()


def few_tokens(inputs: LinearInputs, scales: Tensor | None = None) -> Tensor:
    """One launch; scales: of an FP8 weight, as in what follows."""
    from nanovllm.kernels.gemv import matvec

    x, weight, act, bias, norm, residual, out = inputs
    assert isinstance(x, Tensor)
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    how = residual, act is not None, out, scales
    return matvec(x, weight, bias, norm_weight, eps, *how)


def small_batch(inputs: LinearInputs, counters: Tensor, scales: Tensor | None = None) -> Tensor:
    """The norm's launch and another; counters: from kernels.small_linear."""
    from nanovllm.kernels.small_linear import small_linear

    _, weight, act, bias, _, residual, out = inputs
    how = residual, act is not None, out, scales
    return small_linear(inputs.normed(), weight, bias, counters, *how)


def gated_prefill(inputs: LinearInputs) -> Tensor:
    """The norm's launch and another, for a gated layer."""
    from nanovllm.kernels.gated_linear import gated_linear

    return gated_linear(inputs.normed(), inputs.weight)


def product_table(
    weight: Tensor,
    num_out: int,
    is_gated: bool = False,
    is_head: bool = False,
    has_bias: bool = False,
) -> ProductTable:
    """The products of a layer, by the GPU, shape and dtype of its weight [num_rows, input_size].

    Measured on an H100 against cuBLAS.

    Args:
        weight: or what `pack` has made of it.
        num_out: columns of the output.
        is_gated: gate over up; SiLU(gate) * up follows the matrix product.
        is_head: the output head.
        has_bias: which the kernels of gated layers have not.

    Returns:
        Of a kernel that is compiled differently for more tokens, each form has its entry.
    """
    if is_panels(weight):
        from nanovllm.kernels.cpu.linear import linear

        return {math.inf: partial(by_panels, linear=linear, num_out=num_out)}
    if weight.is_mkldnn:
        return {math.inf: onednn}
    if not kernels.usable(weight.device) or (is_gated and has_bias):
        return {math.inf: plain}
    from nanovllm.kernels.device import is_hopper
    from nanovllm.kernels.small_linear import TOKEN_BORDERS, small_linear_counters

    num_rows, input_size = weight.shape
    is_hopper_16_bit = weight.element_size() == 2 and is_hopper(weight.device)
    # Each further token is another pass over the weights in registers: from 3 on the next one is
    # faster, in large layers from 2 on.
    most_few = 2 if min(num_rows, input_size) <= 2048 else 1
    most_small = _most_small(weight, is_gated, is_head, was_measured=is_hopper_16_bit)
    table: ProductTable = dict.fromkeys(range(1, most_few + 1), few_tokens)
    small = partial(small_batch, counters=small_linear_counters(num_rows, weight.device))
    table |= {border: small for border in TOKEN_BORDERS if border <= most_small}
    # TMA, which loads tiles for gated_linear, wants rows that begin at multiples of 16 bytes.
    if is_gated and is_hopper_16_bit and num_rows % 16 == 0 and input_size % 8 == 0:
        return table | {2047: plain, math.inf: gated_prefill}
    return table | {math.inf: plain}


def is_small(shape: Sequence[int]) -> bool:
    """True for layers like Qwen3-0.6B's, or a quarter of Qwen3-8B's q, k and v."""
    return min(shape) <= 1536 and math.prod(shape) <= 6144 * 1024


def _most_small(weight: Tensor, is_gated: bool, is_head: bool, was_measured: bool) -> int:
    """Up to how many tokens small_linear is faster than cuBLAS.

    MAX_TOKENS in small layers: there a launch that overlaps with the ones before and after it is
    worth more than cuBLAS's better loop. Twice FEW_TOKENS in gated ones
    whose programs all run at once, since SiLU * up needs no launch of its own. Where nothing was
    measured FEW_TOKENS, but for the head: none.
    """
    from nanovllm.kernels.small_linear import FEW_TOKENS, H100_SMS, MAX_TOKENS

    if is_head or not was_measured:
        return 0 if is_head and not was_measured else FEW_TOKENS
    if is_small(weight.shape):
        return MAX_TOKENS
    num_programs = -(-len(weight) // 2 // 64) * 2  # of 64 tokens and 64 outputs
    at_once = is_gated and num_programs <= 3 * H100_SMS  # three fit an SM
    return 2 * FEW_TOKENS if at_once else FEW_TOKENS

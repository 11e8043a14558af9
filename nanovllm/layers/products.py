"""How a linear layer is computed, and by which of several ways for how many tokens.

A product takes what stands before and after the matrix product as well, and decides itself how
many launches that makes. `product_table` is the one place that tells which of them runs when.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm


class LinearInputs(NamedTuple):
    """What a product is given: act(norm(x) @ weight.T + bias), or residual + that, is wanted.

    x: [num_tokens, input_size]. weight: [num_rows, input_size]. bias: [num_rows]. norm, act: None:
    there is none. residual: [num_tokens, num_rows], may be overwritten; not with act. out:
    [num_tokens, num_rows], to be filled; only where nothing follows the matrix product.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: RMSNorm | None
    act: SiluAndMul | None
    residual: Tensor | None
    out: Tensor | None

    def normed(self) -> Tensor:
        """x after its norm, in a launch of its own."""
        return self.x if self.norm is None else self.norm(self.x)


Product = Callable[[LinearInputs], Tensor]


def plain(inputs: LinearInputs) -> Tensor:
    """PyTorch's product, its parts one after the other: what the others are compared with."""
    x, weight, bias, residual = inputs.normed(), inputs.weight, inputs.bias, inputs.residual
    if inputs.out is not None:
        return torch.mm(x, weight.T, out=inputs.out)
    if residual is None:
        y = F.linear(x, weight, bias)
        return y if inputs.act is None else inputs.act(y)
    if bias is None and x.is_cuda:  # within the matrix product, and rounded once
        return residual.addmm_(x, weight.T)
    return residual.add_(F.linear(x, weight, bias))


def few_tokens(inputs: LinearInputs) -> Tensor:
    """One launch."""
    from nanovllm.kernels.gemv import matvec

    x, weight, bias, norm, act, residual, out = inputs
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return matvec(x, weight, bias, norm_weight, eps, residual, gated=act is not None, out=out)


def small_batch(inputs: LinearInputs, counters: Tensor) -> Tensor:
    """The norm's launch and another; counters: from kernels.small_linear."""
    from nanovllm.kernels.small_linear import small_linear

    _, weight, bias, _, act, residual, out = inputs
    return small_linear(inputs.normed(), weight, bias, counters, residual, act is not None, out)


def gated_prefill(inputs: LinearInputs) -> Tensor:
    """The norm's launch and another, for a gated layer."""
    from nanovllm.kernels.gated_linear import gated_linear

    return gated_linear(inputs.normed(), inputs.weight)


class ProductTable:
    """The products of a layer by the most tokens that each is for; the last is for any number."""

    def __init__(self, products: Mapping[float, Product]) -> None:
        self.borders = sorted(products)
        self.products = [products[border] for border in self.borders]
        assert self.borders[-1] == math.inf

    def __getitem__(self, num_tokens: int) -> Product:
        return self.products[bisect_left(self.borders, num_tokens)]

    @property
    def first_sizes(self) -> list[int]:
        """The fewest tokens that each entry is for."""
        return [1, *(int(border) + 1 for border in self.borders[:-1])]


def product_table(weight: Tensor, is_gated: bool = False, is_head: bool = False) -> ProductTable:
    """The products of a layer, by the GPU, shape and dtype of its weight [num_rows, input_size].

    Measured on an H100 against cuBLAS. Of a kernel that is compiled differently for more tokens
    each form has its entry: who runs `first_sizes` has compiled them all.

    Args:
        is_gated: gate over up; SiLU(gate) * up follows the matrix product.
        is_head: the output head.
    """
    if not kernels.usable(weight.device):
        return ProductTable({math.inf: plain})
    from nanovllm.kernels.device import is_hopper
    from nanovllm.kernels.small_linear import TOKEN_BORDERS, small_linear_counters

    num_rows, input_size = weight.shape
    was_measured = weight.element_size() == 2 and is_hopper(weight.device)
    # Each further token is another pass over the weights in registers: from 3 on the next one is
    # faster, in large layers from 2 on.
    most_few = 2 if min(num_rows, input_size) <= 2048 else 1
    most_small = _most_small(weight, is_gated, is_head) if was_measured else 0 if is_head else 64
    table: dict[float, Product] = dict.fromkeys(range(1, most_few + 1), few_tokens)
    small = partial(small_batch, counters=small_linear_counters(num_rows, weight.device))
    table |= {border: small for border in TOKEN_BORDERS if border <= most_small}
    # TMA, which loads tiles for gated_linear, wants rows that begin at multiples of 16 bytes.
    if is_gated and was_measured and num_rows % 16 == 0 and input_size % 8 == 0:
        table |= {2047: plain, math.inf: gated_prefill}
    else:
        table[math.inf] = plain
    return ProductTable(table)


def _most_small(weight: Tensor, is_gated: bool, is_head: bool) -> int:
    """Up to how many tokens small_linear is faster than cuBLAS, where that was measured.

    256 in layers as small as those of Qwen3-0.6B: there a launch that overlaps with the ones before
    and after it is worth more than cuBLAS's better loop. 128 in gated ones whose programs all run
    at once, since SiLU * up needs no launch of its own.
    """
    from nanovllm.kernels.small_linear import H100_SMS

    if is_head:
        return 64
    if min(weight.shape) <= 1024 and weight.numel() <= 6144 * 1024:
        return 256
    num_programs = -(-len(weight) // 2 // 64) * 2  # of 64 tokens and 64 outputs
    at_once = is_gated and num_programs <= 3 * H100_SMS  # three fit an SM
    return 128 if at_once else 64

"""min-p, top-k and top-p without a sort. Twin: nanovllm.layers.filters.kept_threshold.

One program a row searches for the threshold: it guesses some logits, and one pass over the row says
how many tokens, or how much mass, lie above each. A row that filters nothing costs no pass at all,
so that the kernel stands in every decode graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import launch


@triton.jit
def _to_key(value, dtype: tl.constexpr):
    """An int64 that orders floats as they are ordered; neighbours in `dtype` differ by 1."""
    if dtype.primitive_bitwidth == 16:
        bits = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFF)
    else:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        return bits ^ ((bits >> 63) & 0x7FFFFFFF)


@triton.jit
def _from_key(key, dtype: tl.constexpr):
    """The float32 value of a key."""
    if dtype.primitive_bitwidth == 16:
        bits = key ^ ((key >> 63) & 0x7FFF)
        return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        bits = key ^ ((key >> 63) & 0x7FFFFFFF)
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load(logits, first, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    tokens = first + tl.arange(0, BLOCK)
    return tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _amounts(x, maximum, scale, BY_MASS: tl.constexpr):
    """What each token counts: 1, or its probability, the likeliest's being 1.

    NaN gives NaN, which no comparison lets through.
    """
    if BY_MASS:
        return tl.exp2((x - maximum) * scale)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _search(
    logits, low, high, target, maximum, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):  # fmt: skip
    """The largest key in low .. high for which the logits from there upwards amount to `target`.

    Those from low upwards do, and those above high do not. Each pass tries three keys, which leaves
    a quarter of the range.
    """
    dtype: tl.constexpr = logits.dtype.element_ty
    while low < high:
        span = high - low
        first = low + (span + 3) // 4
        second = low + (span + 1) // 2
        third = low + (3 * span + 3) // 4
        first_value = _from_key(first, dtype)
        second_value = _from_key(second, dtype)
        third_value = _from_key(third, dtype)
        first_sum = tl.zeros([BLOCK], tl.float32)
        second_sum = tl.zeros([BLOCK], tl.float32)
        third_sum = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=3):
            x = _load(logits, start, VOCAB, BLOCK)
            amounts = _amounts(x, maximum, scale, BY_MASS)
            first_sum += tl.where(x >= first_value, amounts, 0.0)
            second_sum += tl.where(x >= second_value, amounts, 0.0)
            third_sum += tl.where(x >= third_value, amounts, 0.0)
        # A sum of fewer of them is never larger, rounded or not: where one suffices, so do those
        # before it.
        suffices_first = tl.sum(first_sum, axis=0) >= target
        suffices_second = tl.sum(second_sum, axis=0) >= target
        suffices_third = tl.sum(third_sum, axis=0) >= target
        high = tl.where(suffices_third, high, third - 1)
        high = tl.where(suffices_second, high, second - 1)
        high = tl.where(suffices_first, high, first - 1)
        low = tl.where(suffices_first, first, low)
        low = tl.where(suffices_second, second, low)
        low = tl.where(suffices_third, third, low)
    return low


@triton.jit
def _kth_largest(values, k, high, dtype: tl.constexpr):
    """Key of the k-th largest of a block in registers; `high`: of the largest."""
    low = _to_key(tl.full([], float("-inf"), tl.float32), dtype)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.sum((values >= _from_key(middle, dtype)).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
    return low


@triton.jit
def _row_threshold(
    logits, temperature, top_k, top_p, min_p, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    dtype: tl.constexpr = logits.dtype.element_ty
    minus_infinity = tl.full([], float("-inf"), tl.float32)
    lane_maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=3):
        x = _load(logits, start, VOCAB, BLOCK)
        lane_maxima = tl.where(x > lane_maxima, x, lane_maxima)  # NaN never wins
    maximum = tl.max(lane_maxima, axis=0)
    highest = _to_key(maximum, dtype)
    lowest = _to_key(minus_infinity, dtype)
    maximum = tl.minimum(maximum, 3.4028234e38)
    threshold = minus_infinity
    if maximum > float("-inf"):
        # log2(e) / temperature, bounded so that no product with 0 or infinity is NaN.
        scale = tl.minimum(tl.maximum(1.4426950408889634 / temperature, 1e-37), 3.4028234e38)
        if min_p > 0:
            threshold = maximum + temperature * tl.log(min_p)
        if (top_k > 0) & (top_k < VOCAB):
            low = lowest
            if top_k <= BLOCK:
                # Of k lanes the maxima are as large, so at least k logits are.
                low = _kth_largest(lane_maxima, top_k, highest, dtype)
            target = top_k.to(tl.float32)
            key = _search(logits, low, highest, target, maximum, scale, VOCAB, BLOCK, False)
            threshold = tl.maximum(threshold, _from_key(key, dtype))
        if top_p < 1:
            sums = tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, VOCAB, BLOCK, num_stages=3):
                x = _load(logits, start, VOCAB, BLOCK)
                sums += tl.where(x >= threshold, _amounts(x, maximum, scale, True), 0.0)
            mass = tl.sum(sums, axis=0)
            # All tokens below this one together have no more than half of what top_p leaves out.
            bound = maximum + temperature * tl.log((1 - top_p) * mass / (2 * VOCAB))
            low = _to_key(tl.maximum(bound, threshold), dtype) - 1  # it may have been rounded up
            low = tl.minimum(tl.maximum(low, lowest), highest)
            target = top_p * mass
            key = _search(logits, low, highest, target, maximum, scale, VOCAB, BLOCK, True)
            threshold = tl.maximum(threshold, _from_key(key, dtype))
    return threshold


@triton.jit
def _threshold_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, out, row_stride, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    threshold = tl.full([], float("-inf"), tl.float32)
    has_filter = ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1) | (min_p > 0)
    if has_filter & (temperature > 0):
        logits += row.to(tl.int64) * row_stride
        threshold = _row_threshold(logits, temperature, top_k, top_p, min_p, VOCAB, BLOCK)
    tl.store(out + row, threshold)


def kept_threshold(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The smallest logit of each row that may be sampled; the likeliest token always may.

    Args:
        logits: [num_seqs, vocab_size], any float dtype; rows contiguous. NaN is never kept by a row
            that filters.
        temperatures: float32 [num_seqs], >= 0; rows at 0 are not filtered.
        top_ks, top_ps, min_ps: see nanovllm.layers.filters.Filters.

    Returns:
        float32 [num_seqs]: `out`, if given. A token is kept where logit >= threshold: -inf where
        nothing is filtered.
    """
    num_seqs, vocab_size = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty_like(temperatures) if out is None else out
    block = min(8192, triton.next_power_of_2(vocab_size))
    launch(
        _threshold_kernel, (num_seqs,), logits,
        logits, temperatures, top_ks, top_ps, min_ps, out, logits.stride(0), VOCAB=vocab_size,
        BLOCK=block, num_warps=32,
    )  # fmt: skip
    return out

"""Sampling in one pass over the logits. Twin: nanovllm.layers.sampler.sample.

argmax_i(logit_i + temperature * g_i) with g_i ~ Gumbel(0, 1) is distributed as
softmax(logits / temperature): no maximum, no sum and no division is needed first, and temperature 0
is the argmax. The noise is a hash of (seed, position, token id): the same wherever it is computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from nanovllm.kernels.device import num_sms
from nanovllm.kernels.launch import launch


@triton.jit
def _mix64(x):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _hash_bits(tokens, key):
    """32 random bits of (key uint64, token ids int32): the mixer lowbias32, keyed twice.

    A bijection of the token ids for each key.
    """
    x = tokens.to(tl.uint32) ^ key.to(tl.uint32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(bits, FAST: tl.constexpr):
    """-log(-log(1 - x)) float32, x = (bits + 1/2) / 2^32, to within 1e-5."""
    x = (bits.to(tl.float32) + 0.5) * 2.0**-32
    # Small x decide: there 1 - x is too coarse for a logarithm, and -log(1 - x) is a series.
    series = x * (1.0 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4 + x * (1 / 5)))))
    rest = tl.maximum(1.0 - x, 2.0**-33)
    if FAST:
        return -libdevice.fast_logf(tl.where(x < 2.0**-4, series, -libdevice.fast_logf(rest)))
    else:
        return -tl.log(tl.where(x < 2.0**-4, series, -tl.log(rest)))


@triton.jit(do_not_specialize=["chunk"])
def _sample_kernel(
    logits, temperatures, seeds, positions, thresholds, out, best_scores, best_ids, counters,
    row_stride, chunk, VOCAB: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    FIRST_ID: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for a chunk of a row's logits; the last of a row's programs compares them all."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperatures + row)
    # Above 1 the logits are divided instead, so that no product overflows.
    noise_scale = tl.minimum(temperature, 1.0)
    logit_scale = 1.0 / tl.maximum(temperature, 1.0)
    seed = tl.load(seeds + row).to(tl.uint64)
    position = tl.load(positions + row).to(tl.uint64)
    key = _mix64(_mix64(seed + 0x9E3779B97F4A7C15) ^ position)
    threshold = float("-inf")
    if thresholds is not None:
        threshold = tl.load(thresholds + row)
    logits += row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], VOCAB - 1, tl.int32)
    for first in tl.range(0, chunk, BLOCK):
        tokens = split * chunk + first + tl.arange(0, BLOCK)
        logit = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf")).to(tl.float32)
        score = logit
        if temperature > 0:
            ids = tokens if FIRST_ID is None else tokens + FIRST_ID
            score = logit * logit_scale + noise_scale * _gumbel(_hash_bits(ids, key), FAST)
        # Ties: the lower id stays; NaN never wins.
        better = (score > best) & (logit >= threshold)
        best = tl.where(better, score, best)
        best_id = tl.where(better, tokens, best_id)
    score = tl.max(best, axis=0)
    token = tl.min(tl.where(best == score, best_id, VOCAB - 1), axis=0)
    tl.store(best_scores + row * MAX_SPLITS + split, score)
    tl.store(best_ids + row * MAX_SPLITS + split, token)
    tl.debug_barrier()  # all threads have written before one of them counts
    if tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        tl.store(counters + row, 0)  # for the next launch
        splits = tl.arange(0, MAX_SPLITS)
        mask = splits < num_splits
        partials = row * MAX_SPLITS + splits
        scores = tl.load(
            best_scores + partials, mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        tokens = tl.load(best_ids + partials, mask=mask, other=VOCAB - 1, cache_modifier=".cg")
        score = tl.max(scores, axis=0)
        token = tl.min(tl.where(scores == score, tokens, VOCAB - 1), axis=0)
        found = token.to(tl.int64)
        if FIRST_ID is not None:  # its key: see nanovllm.layers.sampler
            bits = (score + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
            order = bits ^ ((bits >> 63) & 0x7FFFFFFF)
            found = (order << 32) | (0x7FFFFFFF - (found + FIRST_ID))
        tl.store(out + row, found)


class SampleWorkspace(NamedTuple):
    """The programs' best scores float32 and ids int32, and int32 counters (zero)."""

    scores: Tensor
    ids: Tensor
    counters: Tensor


MAX_SPLITS = 64


def sample_workspace(max_num_seqs: int, device: torch.device) -> SampleWorkspace:
    """A workspace for up to max_num_seqs rows; launches that may overlap must not share it."""
    size = max_num_seqs * MAX_SPLITS
    return SampleWorkspace(
        torch.empty(size, dtype=torch.float32, device=device),
        torch.empty(size, dtype=torch.int32, device=device),
        torch.zeros(max_num_seqs, dtype=torch.int32, device=device),
    )


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    thresholds: Tensor | None = None,
    out: Tensor | None = None,
    first_id: int | None = None,
    workspace: SampleWorkspace | None = None,
) -> Tensor:
    """Draw one id a row from softmax(logits / temperature); the likeliest where temperature is 0.

    Args:
        logits: [num_seqs, vocab_size], any float dtype; rows contiguous.
        temperatures: float32 [num_seqs], >= 0.
        seeds, positions: int64 [num_seqs]; the same pair draws the same noise.
        thresholds: float32 [num_seqs], only tokens with logits from there upwards are drawn.
        first_id: the token of the first logit, where these are a part of the vocabulary. Then keys
            are given, as by the twin.
        workspace: from sample_workspace; None allocates one, which costs a launch.

    Returns:
        int64 [num_seqs]: `out`, if given.
    """
    num_seqs, vocab_size = logits.shape
    device = logits.device
    assert logits.stride(1) == 1
    out = torch.empty(num_seqs, dtype=torch.int64, device=device) if out is None else out
    workspace = sample_workspace(num_seqs, device) if workspace is None else workspace
    block = min(2048, triton.next_power_of_2(vocab_size))
    per_row = triton.cdiv(4 * num_sms(device), max(num_seqs, 1))
    splits = min(MAX_SPLITS, triton.next_power_of_2(per_row), triton.cdiv(vocab_size, block))
    chunk = triton.cdiv(triton.cdiv(vocab_size, splits), block) * block
    launch(
        _sample_kernel, (num_seqs, splits), logits,
        logits, temperatures, seeds, positions, thresholds, out, *workspace, logits.stride(0),
        chunk, VOCAB=vocab_size, MAX_SPLITS=MAX_SPLITS, BLOCK=block, FIRST_ID=first_id,
        FAST=device.type == "cuda", num_warps=8,
    )  # fmt: skip
    return out

"""From logits to token ids.

argmax_i(logit_i + temperature * g_i) with g_i ~ Gumbel(0, 1) is distributed as
softmax(logits / temperature), and temperature 0 is the argmax: no maximum, sum or sort is needed.
The noise is a hash of (seed, position, token id): a request's tokens do not depend on what runs
beside it.
"""

import math

import torch
from torch import Tensor

# Noise for about this many logits is made at a time: it stays in a CPU's cache.
NUM_AT_A_TIME = 1 << 18
# Logits of a row whose maximum is found at a time.
PART_SIZE = 512


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    thresholds: Tensor | None = None,
    out: Tensor | None = None,
    first_id: int | None = None,
) -> Tensor:
    """Draw one id a row from softmax(logits / temperature); the likeliest where temperature is 0.

    Args:
        logits: [num_seqs, vocab_size], any float dtype.
        temperatures: float32 [num_seqs], >= 0.
        seeds, positions: int64 [num_seqs]; the same pair draws the same noise.
        thresholds: float32 [num_seqs], only tokens with logits from there upwards are drawn.
        first_id: the token of the first logit, where these are a part of the vocabulary. Then keys
            are given: of all parts' keys for a row, the largest holds the id (see ids_of).

    Returns:
        int64 [num_seqs]: `out`, if given.
    """
    ids = argmax(logits)
    best = None if first_id is None else logits.gather(1, ids[:, None])[:, 0].float()
    keys = _mix64(_mix64(seeds + _signed(0x9E3779B97F4A7C15, 64)) ^ positions)
    vocab_size = logits.size(1)
    for rows in temperatures.nonzero().flatten().split(max(1, NUM_AT_A_TIME // vocab_size)):
        if not len(rows):  # all are greedy
            break
        temperature = temperatures[rows, None]
        noise = _gumbel(_random_bits(keys[rows], first_id or 0, vocab_size))
        # Above 1 the logits are divided instead, so that no product overflows.
        scores = noise * temperature.clamp(max=1) + logits[rows] / temperature.clamp(min=1)
        if thresholds is not None:
            scores = scores.where(logits[rows] >= thresholds[rows, None], -math.inf)
        ids[rows] = found = argmax(scores)
        if best is not None:
            best[rows] = scores.gather(1, found[:, None])[:, 0]
    if first_id is not None and best is not None:
        ids = _keys_of(best, ids + first_id)
    return ids if out is None else out.copy_(ids)


# A key has a score's bits, so turned that keys are ordered as scores are, over 32 bits of which the
# smaller id of equal scores has the larger.
LARGEST_ID = (1 << 31) - 1


def _keys_of(scores: Tensor, ids: Tensor) -> Tensor:
    """float32 and int64 [n] -> int64 [n]. NaN is the largest."""
    scores = scores.where(scores == scores, math.inf)
    bits = (scores + 0.0).view(torch.int32).long()  # -0 is 0
    return ((bits ^ ((bits >> 63) & 0x7FFFFFFF)) << 32) | (LARGEST_ID - ids)


def ids_of(keys: Tensor, out: Tensor | None = None) -> Tensor:
    """The token ids in what `sample` gives for parts of a vocabulary: int64 [n], `out` if given."""
    return torch.bitwise_and(keys.bitwise_not(), LARGEST_ID, out=out)


def argmax(x: Tensor) -> Tensor:
    """The first of the largest of each row: [num_rows, size] -> int64 [num_rows].

    Of each part of a row the maximum first, since on a CPU torch finds a maximum by vectors, but
    where it is one by one: a tenth of the time.
    """
    num_rows, size = x.shape
    if num_rows == 0 or size < 2 * PART_SIZE:
        return x.argmax(dim=-1)
    num_whole = size // PART_SIZE
    largest = x[:, : num_whole * PART_SIZE].unflatten(1, (num_whole, PART_SIZE)).amax(dim=-1)
    if size % PART_SIZE:
        largest = torch.cat((largest, x[:, num_whole * PART_SIZE :].amax(dim=-1, keepdim=True)), 1)
    # The last part may be short: the part that ends there holds no larger one before it.
    starts = (largest.argmax(dim=-1, keepdim=True) * PART_SIZE).clamp_(max=size - PART_SIZE)
    part = x.gather(1, starts + torch.arange(PART_SIZE, device=x.device))
    ids: Tensor = starts[:, 0] + part.argmax(dim=-1)
    return ids


def _random_bits(keys: Tensor, first_id: int, size: int) -> Tensor:
    """32 random bits for each key, int64 [n], and each of `size` token ids: int32 [n, size].

    The mixer lowbias32, keyed twice: a bijection of the token ids for each key.
    """
    tokens = torch.arange(first_id, first_id + size, dtype=torch.int32, device=keys.device)
    low, high = keys.view(torch.int32).view(-1, 2, 1).unbind(1)  # little-endian
    x = tokens ^ low
    x = ((x ^ _shift(x, 16, 32)) * _signed(0x7FEB352D, 32)) ^ high
    x = (x ^ _shift(x, 15, 32)) * _signed(0x846CA68B, 32)
    return x ^ _shift(x, 16, 32)


def _gumbel(bits: Tensor) -> Tensor:
    """-log(-log(1 - x)), x = (bits + 1/2) / 2^32, float32, from int32 bits taken as unsigned."""
    x = ((bits.long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    # Small x decide: there 1 - x is too coarse for a logarithm, and -log(1 - x) is a series.
    series = x * (1.0 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4 + x * (1 / 5)))))
    rest = (1.0 - x).clamp_(min=2.0**-33)
    return torch.where(x < 2.0**-4, series, rest.log_().neg_()).log_().neg_()


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), int64 taken as unsigned."""
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def _shift(x: Tensor, bits: int, width: int) -> Tensor:
    """x >> bits without copies of the sign."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _signed(x: int, width: int) -> int:
    """The two's complement number with the same bits."""
    return x - (1 << width) if x >> (width - 1) else x

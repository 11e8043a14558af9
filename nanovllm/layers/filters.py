"""Which tokens may be sampled: min-p, top-k and top-p as one threshold a row.

Each of the three keeps the tokens from some logit upwards, and so do all of them together. The
order is that of vLLM: temperature, min-p, top-k, and top-p on what these have left. Tokens of equal
logits stay or go together.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Filters(NamedTuple):
    """What each row of a batch keeps; tensors [num_seqs].

    top_ks: int32, the so many likeliest; 0, or a number over the vocabulary's size, is all.
    top_ps: float32 in (0, 1], the likeliest up to this share of the mass; 1 is all.
    min_ps: float32 in [0, 1], those at least this share as likely as the likeliest; 0 is all.
    """

    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor


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
        logits: [num_seqs, vocab_size], any float dtype. NaN is never kept by a row that filters.
        temperatures: float32 [num_seqs], >= 0; rows at 0 are not filtered.
        top_ks, top_ps, min_ps: see Filters.

    Returns:
        float32 [num_seqs]: `out`, if given. A token is kept where logit >= threshold: -inf where
        nothing is filtered.
    """
    vocab_size = logits.size(1)
    thresholds = torch.empty_like(temperatures) if out is None else out
    thresholds.fill_(-math.inf)
    has_top_k = (top_ks > 0) & (top_ks < vocab_size)
    filters = (temperatures > 0) & (has_top_k | (top_ps < 1) | (min_ps > 0))
    for row in filters.nonzero().flatten().tolist():
        k = int(top_ks[row]) if has_top_k[row] else vocab_size
        thresholds[row] = _threshold(logits[row], temperatures[row], k, top_ps[row], min_ps[row])
    return thresholds


def _threshold(
    logits: Tensor, temperature: Tensor, top_k: int, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The threshold of one row [vocab_size]; top_k in 1 .. vocab_size."""
    values = logits.float().nan_to_num(nan=-math.inf, neginf=-math.inf)
    ranked = values.sort(descending=True).values
    if ranked[0] == -math.inf:
        return ranked[0]
    weights = ((ranked - ranked[0]) / temperature).exp()  # probabilities, the likeliest's being 1
    weights = weights[(weights >= min_p) & (ranked >= ranked[top_k - 1])]
    if top_p < 1:
        mass = weights.double().cumsum(dim=0)
        weights = weights[mass - weights < top_p * mass[-1]]  # mass - weights: of those before
    return ranked[max(len(weights), 1) - 1]  # a top_p next to 0 leaves the likeliest

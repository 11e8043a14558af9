"""A prefill from an FP8 cache, on a GPU: attention to copies of K and V in the model's dtype.

The copy rounds nothing, and attention of many queries costs far more; kernels would otherwise make
16 bits of the same bytes for every tile of queries.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.layers.torch_attention import AttentionInputs
from nanovllm.utils.context import Context
from nanovllm.utils.device import to_device

# That are copied at a time: 128 MiB for 8 heads of 128.
MOST_KEYS = 32_768


class Part(NamedTuple):
    """Neighbouring sequences of a prefill.

    rows: of their tokens in the step. block_tables: theirs. context: as of a step of these alone,
    whose keys lie in a row.
    """

    rows: slice
    block_tables: Tensor
    context: Context


def prefill_from_fp8(
    inputs: AttentionInputs, attend: Callable[[AttentionInputs, Tensor], Tensor]
) -> Tensor:
    """Prefill of some sequences at a time.

    The copies' memory has a size that depends on the longest sequence alone. So a dry run with
    the longest that may be shows the most that any step takes.

    Args:
        attend: writes attention to keys that lie in a row to the tensor given.
    """
    from nanovllm.kernels.fp8_attention import gather

    query, context, cache = inputs.query, inputs.context, inputs.k_cache
    k_scales, v_scales = inputs.k_scales, inputs.v_scales
    assert k_scales is not None and v_scales is not None
    memory = query.new_empty(2, _most_keys(context), *cache.shape[2:])
    out = torch.empty_like(query)
    for rows, tables, part in context.once(cut_sequences):
        key, value = memory[:, : sum(part.key_lens)]
        assert part.cu_seqlens_k is not None
        keys = tables, part.cu_seqlens_k, part.max_key_len
        gather(cache, inputs.v_cache, k_scales, v_scales, *keys, key, value)
        attend(inputs._replace(query=query[rows], key=key, value=value, context=part), out[rows])
    return out


def cut_sequences(context: Context) -> list[Part]:
    """A prefill from the cache, in parts of at most MOST_KEYS keys, or the longest sequence's."""
    starts, num_keys = [0], 0
    for index, length in enumerate(context.key_lens):
        if num_keys + length > _most_keys(context):
            starts.append(index)
            num_keys = 0
        num_keys += length
    ends = [*starts[1:], len(context.key_lens)]
    return [_part(context, slice(*limits)) for limits in zip(starts, ends, strict=True)]


def _most_keys(context: Context) -> int:
    return max(MOST_KEYS, context.max_key_len)


def _part(context: Context, seqs: slice) -> Part:
    def running_sum(lengths: list[int]) -> Tensor:
        return to_device([0, *accumulate(lengths)], torch.int32, context.slot_mapping.device)

    assert context.block_tables is not None
    query_lens, key_lens = context.query_lens[seqs], context.key_lens[seqs]
    first = sum(context.query_lens[: seqs.start])
    rows = slice(first, first + sum(query_lens))
    own = Context(
        is_prefill=True,
        slot_mapping=context.slot_mapping[rows],
        query_lens=query_lens,
        key_lens=key_lens,
        block_size=context.block_size,
        cu_seqlens_q=running_sum(query_lens),
        cu_seqlens_k=running_sum(key_lens),
    )
    # Cloned, since kernels are compiled for tensors whose address is a multiple of 16.
    return Part(rows, context.block_tables[seqs].clone(), own)

"""Attention in plain PyTorch: on a CPU, and wherever no other back end can be used.

The keys of many sequences are copied together, as long as the copies fit a CPU's cache, and then
attended to in one call: a call a sequence costs more, and products read what lies far apart in
memory slower than a copy does. Scores and sums are float32 whatever the cache holds.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.layers.kv_quantization import dequantize
from nanovllm.model_config import ModelConfig
from nanovllm.utils.context import Context
from nanovllm.utils.device import to_device

# Queries of a prefill that are computed at a time.
QUERY_ROWS = 128
# A decode takes sequences together up to so many elements of K, and so many of padding among them:
# what stays in a CPU's cache, and what costs as much as another call.
MOST_ELEMENTS = 1 << 20
MOST_PADDING = 1 << 17
# Places in a cache: int64 [num_tokens]; as a slice where they lie in a row, and nothing is copied.
Slots = slice | Tensor


class AttentionInputs(NamedTuple):
    """What a back end is given. With `context.block_tables`, keys come from the cache alone.

    query: [num_tokens, num_heads, head_dim]; key (None where the cache is read), value:
    [num_tokens, num_kv_heads, head_dim]; k_cache, v_cache: [num_blocks, block_size, num_kv_heads,
    head_dim], this step's K/V stored; of an FP8 cache bytes, with the exponents of their scales,
    uint8 [num_blocks, block_size, num_kv_heads] (see nanovllm.layers.kv_quantization).
    """

    query: Tensor
    key: Tensor | None
    value: Tensor
    k_cache: Tensor
    v_cache: Tensor
    scale: float
    context: Context
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


def torch_prefill(inputs: AttentionInputs) -> Tensor:
    """Prefill, sequence by sequence."""
    context = inputs.context
    out = torch.empty_like(inputs.query)
    end = 0
    for index, length in enumerate(context.query_lens):
        rows = slice(end, end := end + length)
        if context.block_tables is None:
            assert inputs.key is not None
            keys, values = inputs.key[rows], inputs.value[rows]
        else:
            slots = context.once(key_slots)[index]
            size = context.key_lens[index] * inputs.k_cache[0, 0].numel()
            keys, values = (
                _gather(cache, scales, slots, inputs.query.new_empty(size))
                for cache, scales in (
                    (inputs.k_cache, inputs.k_scales),
                    (inputs.v_cache, inputs.v_scales),
                )
            )
        _attend_causal(inputs.query[rows], keys, values, inputs.scale, out[rows])
    return out


def _attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
    """Attention of the last len(query) positions to all of key: [length, num_heads, head_dim].

    Some queries at a time, each with the keys up to its own position alone.
    """
    num_queries, num_keys, num_kv_heads = len(query), len(key), key.size(1)
    key, value = key.transpose(0, 1).float(), value.transpose(0, 1)
    for start in range(0, num_queries, QUERY_ROWS):
        # A K/V head has the queries of all heads that share it.
        rows = query[start : start + QUERY_ROWS].unflatten(1, (num_kv_heads, -1))
        q = (rows.float() * scale).permute(1, 2, 0, 3).flatten(1, 2)
        first = num_keys - num_queries + start
        end = first + len(rows)
        scores = (q @ key[:, :end].transpose(1, 2)).unflatten(1, (-1, len(rows)))
        limits = torch.arange(len(rows), device=query.device)
        scores[..., first:].masked_fill_(limits > limits[:, None], -torch.inf)
        shares = scores.softmax(dim=-1).to(value.dtype).flatten(1, 2)
        found = (shares @ value[:, :end]).unflatten(1, (-1, len(rows)))
        out[start : start + len(rows)] = found.permute(2, 0, 1, 3).flatten(1, 2)


class Workspace(NamedTuple):
    """What a decode copies keys to, where fresh memory each time would cost more than the copy.

    gathered: of the model's dtype; keys: float32; for as many keys as a decode takes together.
    key_size: num_kv_heads * head_dim.
    """

    gathered: Tensor
    keys: Tensor
    key_size: int


def torch_workspace(
    config: ModelConfig, max_num_seqs: int, max_model_len: int, options: dict[str, Any]
) -> Workspace:
    """For Backend.workspace."""
    key_size = config.num_kv_heads * config.head_dim
    size = max(MOST_ELEMENTS, max_model_len * key_size)
    keys = torch.empty(size, dtype=torch.float32, device=options["device"])
    return Workspace(torch.empty(size, **options), keys, key_size)


class DecodeBatch(NamedTuple):
    """Sequences that a decode takes together.

    rows: theirs in the step. slots: of their keys, [num_seqs * longest]; where one has fewer its
    first key's. mask: float32 [num_seqs, 1, 1, longest], is added to the scores: -inf where one
    has fewer, otherwise 0.
    """

    rows: slice
    slots: Slots
    mask: Tensor


def torch_decode(inputs: AttentionInputs) -> Tensor:
    """Decode, a few sequences at a time."""
    # A K/V head has the queries of all heads that share it.
    query = inputs.query.unflatten(1, (inputs.k_cache.size(2), -1))
    found = []
    for batch in inputs.context.once(decode_batches):
        attend = _attend_alone if batch.mask.size(0) == 1 else _attend_together
        found.append(attend(query[batch.rows], batch, inputs))
    return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1, 2)


def _attend_together(query: Tensor, batch: DecodeBatch, inputs: AttentionInputs) -> Tensor:
    """[num_seqs, num_kv_heads, num_sharing, head_dim], of short sequences."""

    def gather(cache: Tensor, scales: Tensor | None) -> Tensor:
        """float32 [num_seqs, num_kv_heads, num_keys, head_dim], each head's keys side by side."""
        gathered = _gather(cache, scales, batch.slots, workspace.gathered)
        gathered = gathered.unflatten(0, (query.size(0), -1))
        keys = workspace.keys[: gathered.numel()].view(gathered.transpose(1, 2).shape)
        return keys.copy_(gathered.transpose(1, 2))

    workspace: Workspace = inputs.context.decode_workspace
    keys = gather(inputs.k_cache, inputs.k_scales)
    scores = (query.float() * inputs.scale) @ keys.transpose(2, 3)
    shares = scores.add_(batch.mask).softmax(dim=-1)
    found: Tensor = shares @ gather(inputs.v_cache, inputs.v_scales)
    return found.to(query.dtype)


def _attend_alone(query: Tensor, batch: DecodeBatch, inputs: AttentionInputs) -> Tensor:
    """[1, num_kv_heads, num_sharing, head_dim], of a sequence so long that a call is little."""
    gathered, keys, _ = inputs.context.decode_workspace
    k = _gather(inputs.k_cache, inputs.k_scales, batch.slots, gathered)
    v = _gather(inputs.v_cache, inputs.v_scales, batch.slots, keys.view(query.dtype))
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    num_sharing = query.size(2)
    if num_sharing == 1:  # in 16 bits a CPU is several times as fast with two
        query = query.expand(-1, -1, 2, -1)
    if query.is_cpu:  # not F.scaled_dot_product_attention: a caller may have forbidden it this way
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        op = torch.ops.aten._scaled_dot_product_attention_math
    found: Tensor = op(query, k, v, scale=inputs.scale)[0]
    return found[:, :, :num_sharing]


def _gather(cache: Tensor, scales: Tensor | None, slots: Slots, memory: Tensor) -> Tensor:
    """[num_slots, num_kv_heads, head_dim] of the cache: a view, or in the memory given.

    In the memory's dtype, which is the cache's unless that is FP8.
    """
    rows = cache.flatten(0, 1)
    if scales is not None:
        values = rows[slots]
        out = memory[: values.numel()].view(values.shape)
        return dequantize(values, scales.flatten(0, 1)[slots], out=out)
    if isinstance(slots, slice):
        return rows[slots]
    shape = slots.size(0), *rows.shape[1:]
    out = memory[: math.prod(shape)].view(shape)
    return torch.index_select(rows, 0, slots, out=out)


def in_a_row(slots: np.ndarray) -> slice | None:
    """Slots [num_slots] that follow one another, as a slice."""
    if not len(slots) or (np.diff(slots) != 1).any():
        return None
    first = int(slots[0])
    return slice(first, first + len(slots))


def key_slots(context: Context) -> list[Slots]:
    """The slots of each sequence's keys, in order."""
    assert context.block_tables is not None
    tables, device = context.block_tables.cpu().numpy(), context.slot_mapping.device
    return [
        _placed(_slots(table, length, context.block_size), device)
        for table, length in zip(tables, context.key_lens, strict=True)
    ]


def _placed(slots: np.ndarray, device: torch.device) -> Slots:
    return in_a_row(slots) or to_device(slots, torch.int64, device)


def decode_batches(context: Context) -> list[DecodeBatch]:
    """Neighbours in the step, whose lengths are alike, since a decode lists the longest first."""
    assert context.block_tables is not None
    tables, device = context.block_tables.cpu().numpy(), context.slot_mapping.device
    lens = np.array(context.key_lens)
    batches = []
    for rows in _neighbours(context.key_lens, context.decode_workspace.key_size):
        longest = lens[rows].max()
        slots = _slots(tables[rows], longest, context.block_size)
        missing = np.arange(longest) >= lens[rows, None]
        found = np.where(missing, slots[:, :1], slots)
        mask = np.where(missing, -np.inf, 0.0)[:, None, None]
        places = _placed(found.ravel(), device)
        batches.append(DecodeBatch(rows, places, to_device(mask, torch.float32, device)))
    return batches


def _neighbours(lens: list[int], key_size: int) -> Iterator[slice]:
    """Rows to take together: little to read, and little padding up to the longest."""
    start = longest = total = 0
    for index, length in enumerate(lens):
        most, num_seqs = max(longest, length), index - start + 1
        num_keys, padding = most * num_seqs, most * num_seqs - total - length
        is_much = num_keys * key_size > MOST_ELEMENTS or padding * key_size > MOST_PADDING
        if num_seqs > 1 and is_much:
            yield slice(start, index)
            start, most, total = index, length, 0
        longest, total = most, total + length
    yield slice(start, len(lens))


def _slots(tables: np.ndarray, length: int, block_size: int) -> np.ndarray:
    """Where the first positions lie, by tables of blocks [..., width]: int64 [..., length]."""
    positions = np.arange(length)
    blocks = tables[..., positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size

"""Context: what attention and the head need to know about the step that is being computed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.utils.device import to_device

T = TypeVar("T")
QUERY_TILE = 128  # see cut_queries


@dataclass
class Context:
    """The layout of one step's tokens, handed down through the model's forward.

    Tensors lie on the model's device. The lists are the same numbers on the host, for code that
    loops over the sequences; a CUDA graph's context has none.

    Args:
        is_prefill: several tokens a sequence (True), or one (False).
        slot_mapping: int32 [num_tokens], where each token's K/V goes (block * block_size +
            offset), -1 = nowhere.
        query_lens: tokens of each sequence in this step.
        key_lens: tokens each sequence attends to: those before this step and its own.
        cu_seqlens_q: int32 [num_seqs + 1], running sum of query_lens. Prefill only.
        cu_seqlens_k: int32 [num_seqs + 1], running sum of key_lens. Prefill only.
        context_lens: int32 [num_seqs], key_lens. Decode only.
        block_tables: int32 [num_seqs, max blocks], -1 padded. Decode, and a prefill in which some
            sequence attends to keys of earlier steps.
        block_size: token positions in a block.
        positions: int64 [num_tokens], of each token in its sequence.
        logit_rows: int64 [num_sampled], the tokens to compute logits for; None = all.
        decode_workspace: scratch memory of the back end of attention (Backend.workspace).
    """

    is_prefill: bool
    slot_mapping: Tensor
    query_lens: list[int]
    key_lens: list[int]
    block_size: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    context_lens: Tensor | None = None
    block_tables: Tensor | None = None
    positions: Tensor | None = None
    logit_rows: Tensor | None = None
    decode_workspace: Any = None
    _made: dict[Callable[["Context"], Any], Any] = field(default_factory=dict, init=False)

    @cached_property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @cached_property
    def max_key_len(self) -> int:
        return max(self.key_lens)

    @cached_property
    def query_tiles(self) -> Tensor:
        """int32 [num_tiles, 6], from cut_queries: for kernels.hopper_attention, on CUDA."""
        tiles = cut_queries(self.query_lens, self.key_lens)
        return to_device(tiles, torch.int32, self.slot_mapping.device)

    def once(self, make: Callable[["Context"], T]) -> T:
        """make(self), made at the first call: what every layer of a step needs."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


def cut_queries(query_lens: list[int], key_lens: list[int]) -> np.ndarray:
    """A prefill's queries, cut into tiles of up to QUERY_TILE queries of one sequence.

    Tiles with the most keys come first, so that programs which take them in turn end together.

    Returns:
        int32 [num_tiles, 6]: the tile's first row in the step; its rows; the last key that its
        first row attends to (each row after it attends to one more); the sequence's keys; their
        first row, if all of the step's keys lie in a row; the sequence.
    """
    queries, keys = np.array(query_lens), np.array(key_lens)
    counts = -(-queries // QUERY_TILE)
    seqs = np.repeat(np.arange(len(queries)), counts)
    starts = QUERY_TILE * (np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts))
    rows = (np.cumsum(queries) - queries)[seqs] + starts
    num_rows = np.minimum(queries[seqs] - starts, QUERY_TILE)
    limits = (keys - queries)[seqs] + starts
    key_rows = (np.cumsum(keys) - keys)[seqs]
    tiles = np.stack([rows, num_rows, limits, keys[seqs], key_rows, seqs], axis=1)
    return tiles[np.argsort(-limits - num_rows, kind="stable")].astype(np.int32)

"""Token embedding and output head; each rank has those of a part of the vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels import kernel_of
from nanovllm.layers.linear import Linear
from nanovllm.utils.parallel import RankGroup


def embed(ids: Tensor, weight: Tensor, first_id: int | None = None) -> Tensor:
    """Embeddings: int64 [num_tokens] -> [num_tokens, hidden_size].

    Args:
        weight: [num_ids, hidden_size].
        first_id: the token whose embedding is the weight's first row, where it is a part of all:
            those of other tokens are zeros. None: there are no others.
    """
    if first_id is None:
        return F.embedding(ids, weight)
    rows = ids - first_id
    is_other = (rows < 0) | (rows >= len(weight))
    return F.embedding(rows.masked_fill(is_other, 0), weight).masked_fill_(is_other[:, None], 0)


def resolve_and_embed(
    sources: Tensor,
    sampled: Tensor,
    context_lens: Tensor,
    weight: Tensor,
    first_id: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings and positions of the tokens that a decode step is fed.

    Args:
        sources: int32 [num_seqs]: a row of `sampled`, or -1 - token id where the id is known.
        sampled: int64, the ids that the step before has sampled.
        context_lens: int32 [num_seqs], 0 for padding.
        weight, first_id: as for `embed`.

    Returns:
        [num_seqs, hidden_size] in weight's dtype (`out`, if given), and int64 [num_seqs], 0 for
        padding.
    """
    ids = torch.where(sources < 0, -1 - sources.long(), sampled[sources.clamp(min=0).long()])
    x = embed(ids, weight, first_id)
    return x if out is None else out.copy_(x), context_lens.clamp(min=1).long() - 1


class Embedding(nn.Module):
    """Holds this rank's token embeddings [vocab_size, hidden_size]; options: device, dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, group: RankGroup, **options: Any) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, **options)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.group = group
        self.first_id = group.rank * vocab_size if group.size > 1 else None
        self.resolve_and_embed = kernel_of(resolve_and_embed, "embedding", weight.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [num_tokens] -> [num_tokens, hidden_size]."""
        x = embed(input_ids, self.weight, self.first_id)
        out = self.group.output(len(x), x.size(1), x.dtype, is_first=True)
        return self.group.all_reduce(x if out is None else out.copy_(x))

    def resolve(
        self, sources: Tensor, sampled: Tensor, context_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and positions of a decode step: see resolve_and_embed."""
        hidden_size, dtype = self.weight.size(1), self.weight.dtype
        out = self.group.output(len(sources), hidden_size, dtype, is_first=True)
        inputs = sources, sampled, context_lens, self.weight, self.first_id, out
        x, positions = self.resolve_and_embed(*inputs)
        return self.group.all_reduce(x), positions


class LMHead(Linear):
    """The output head: the same layout as an embedding, so that a tied one shares its weight."""

    is_head = True

    def __init__(self, vocab_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, vocab_size, **options)

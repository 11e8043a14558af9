"""Token embedding and output head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear import Linear


def resolve_and_embed(
    sources: Tensor, sampled: Tensor, context_lens: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings and positions of the tokens that a decode step is fed.

    Args:
        sources: int32 [num_seqs]: a row of `sampled`, or -1 - token id where the id is known.
        sampled: int64, the ids that the step before has sampled.
        context_lens: int32 [num_seqs], 0 for padding.
        weight: [vocab_size, hidden_size].

    Returns:
        [num_seqs, hidden_size] in weight's dtype, and int64 [num_seqs], 0 for padding.
    """
    ids = torch.where(sources < 0, -1 - sources.long(), sampled[sources.clamp(min=0).long()])
    return F.embedding(ids, weight), context_lens.clamp(min=1).long() - 1


class Embedding(nn.Module):
    """Holds the token embeddings [vocab_size, hidden_size]; options: device, dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, **options)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [num_tokens] -> [num_tokens, hidden_size]."""
        return F.embedding(input_ids, self.weight)


class LMHead(Linear):
    """The output head: the same layout as an embedding, so that a tied one shares its weight."""

    is_head = True

    def __init__(self, vocab_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, vocab_size, **options)

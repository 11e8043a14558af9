"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves rotated as in Qwen."""

import math

import torch
from torch import Tensor, nn

from nanovllm.model_config import Rope
from nanovllm.utils.context import Context


def apply_rotary(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) by their position's angles, in float32.

    Args:
        x: [num_tokens, num_heads, head_dim].
        turns: from `turns_of`.

    Returns:
        [num_tokens, num_heads, head_dim] in x's dtype.
    """
    exact = x.float()
    cos, sin = turns
    swapped = exact.roll(x.size(-1) // 2, dims=-1)
    return swapped.mul_(sin).addcmul_(exact, cos).to(x.dtype)


def turns_of(cos_sin: Tensor) -> Tensor:
    """What each element of a head is multiplied by, and its partner, for tokens' rows of cos | sin.

    Args:
        cos_sin: float32 [num_tokens, head_dim].

    Returns:
        float32 [2, num_tokens, 1, head_dim]: cos | cos and -sin | sin.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


class RotaryEmbedding(nn.Module):
    """Holds cos and sin of every position: float32 [max_positions, head_dim], cos | sin."""

    cos_sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        rope: Rope,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        # As transformers computes them: float32 throughout, and on the CPU, since one ulp of a
        # frequency is multiplied by the position.
        positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies(head_dim, rope))
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)

    def turns(self, context: Context) -> Tensor:
        """For apply_rotary, of a step's tokens."""
        assert context.positions is not None
        return turns_of(self.cos_sin[context.positions])


def frequencies(head_dim: int, rope: Rope) -> Tensor:
    """By what angle each pair turns from one position to the next: float32 [head_dim / 2], CPU.

    linear: all pairs turn slower (https://kaiokendev.github.io/til#extending-context-to-8k).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    periods = rope.theta**exponents
    whole = 1.0 / periods
    if rope.kind == "yarn":
        kept = _yarn_kept(head_dim, rope)
        return 1.0 / (rope.factor * periods) * (1 - kept) + whole * kept
    if rope.kind == "llama3":
        kept = _llama3_kept(whole, rope)
        scaled = (1 - kept) * whole / rope.factor + kept * whole
        return torch.where(kept == 0, whole / rope.factor, scaled)
    return whole / rope.factor


def _yarn_kept(head_dim: int, rope: Rope) -> Tensor:
    """What share of each pair's frequency YaRN keeps, a line between two pairs' indices.

    Section 3.2 of https://arxiv.org/abs/2309.00071.
    """

    def index(turns: float) -> float:
        """Of the pair, a fraction, that turns so often over the original length."""
        period = rope.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(rope.theta))

    first, last = index(rope.fast_turns), index(rope.slow_turns)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0  # nothing is divided by 0
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def _llama3_kept(whole: Tensor, rope: Rope) -> Tensor:
    """The same for Llama 3.1, a line between numbers of turns.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py
    """
    turns = rope.original_length / (2 * math.pi / whole)
    line = (turns - rope.slow_turns) / (rope.fast_turns - rope.slow_turns)
    return line.clamp(0, 1)

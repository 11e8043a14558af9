"""A mixture of experts (https://arxiv.org/abs/1701.06538), as Qwen3-MoE has it.

A router gives each token a few of many small MLPs, and their outputs are added up by weight. What
is here is computed one expert after the other; for kernels see nanovllm.kernels.moe.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.model_config import ModelConfig


def route(logits: Tensor, num_chosen: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """The likeliest experts of each token, and their weights.

    Args:
        logits: [num_tokens, num_experts].
        num_chosen: experts a token.
        renormalized: the weights of those chosen add up to 1; else they are shares of all.

    Returns:
        float32 and int64 [num_tokens, num_chosen], the weightiest first.
    """
    weights, chosen = logits.float().softmax(dim=-1).topk(num_chosen, dim=-1)
    if renormalized:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def run_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor
) -> Tensor:
    """The weighted sum of the chosen experts' MLPs.

    Args:
        x: [num_tokens, hidden_size].
        gate_up: [num_experts, 2 * intermediate_size, hidden_size], gate over up.
        down: [num_experts, hidden_size, intermediate_size].
        weights, chosen: from route.

    Returns:
        [num_tokens, hidden_size] in x's dtype; added up in float32.
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    num_chosen = chosen.size(1)
    places = chosen.flatten().argsort(stable=True)  # of (token, choice), by expert
    counts = torch.bincount(chosen.flatten(), minlength=len(down)).tolist()
    for expert, those in enumerate(places.split(counts)):
        if len(those):
            tokens = those // num_chosen
            y = F.linear(silu_and_mul(F.linear(x[tokens], gate_up[expert])), down[expert])
            out.index_add_(0, tokens, y.float() * weights.flatten()[those, None])
    return out.to(x.dtype)


class ExpertWeights(nn.Module):
    """Those of all experts' MLPs, stacked; options: their device and dtype."""

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        super().__init__()
        assert config.experts is not None
        _, num_experts, _, size, _ = config.experts

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **options), requires_grad=False)

        self.gate_up = parameter(num_experts, 2 * size, config.hidden_size)
        self.down = parameter(num_experts, config.hidden_size, size)

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """("experts.0.gate_proj.weight", its part of gate_up) and so on."""
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            yield f"experts.{expert}.gate_proj.weight", gate
            yield f"experts.{expert}.up_proj.weight", up
            yield f"experts.{expert}.down_proj.weight", down


class MoE(nn.Module):
    """Router and experts of a layer; in the place of an MLP."""

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        super().__init__()
        assert config.experts is not None
        self.num_chosen = config.experts.num_chosen
        self.renormalized = config.experts.renormalized
        self.gate = Linear(config.hidden_size, config.experts.num_experts, **options)
        self.experts = ExpertWeights(config, **options)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [num_tokens, hidden_size], overwritten, -> x + experts of norm(x)."""
        y = norm(x)
        weights, chosen = route(self.gate(y), self.num_chosen, self.renormalized)
        return x.add_(run_experts(y, self.experts.gate_up, self.experts.down, weights, chosen))

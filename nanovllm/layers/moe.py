"""A mixture of experts (https://arxiv.org/abs/1701.06538), as Qwen3-MoE has it.

A router gives each token a few of many small MLPs, and their outputs are added up by weight. What
is here is computed one expert after the other; for kernels see nanovllm.kernels.moe.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.model_config import ModelConfig

# Up to how many tokens each reads the weights of its own experts, on a GPU. Measured on an H100.
MOST_FEW = 1


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
    exact = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros_like(x, dtype=exact)
    num_chosen = chosen.size(1)
    places = chosen.flatten().argsort(stable=True)  # of (token, choice), by expert
    counts = torch.bincount(chosen.flatten(), minlength=len(down)).tolist()
    for expert, those in enumerate(places.split(counts)):
        if len(those):
            tokens = those // num_chosen
            y = F.linear(silu_and_mul(F.linear(x[tokens], gate_up[expert])), down[expert])
            out.index_add_(0, tokens, y.to(exact) * weights.flatten()[those, None])
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
        # By the most tokens that each is for, as nanovllm.layers.products has it.
        self.products: dict[float, Callable[[Tensor, RMSNorm], Tensor]] = {math.inf: self._plain}
        if kernels.usable(self.experts.down.device):
            from nanovllm.kernels.moe import token_tile_borders

            borders = token_tile_borders(config.experts.num_experts, self.num_chosen)
            self.products = {MOST_FEW: self._few_tokens}
            self.products |= dict.fromkeys((*borders, math.inf), self._grouped)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [num_tokens, hidden_size], overwritten, -> x + experts of norm(x)."""
        return next(run for most, run in self.products.items() if len(x) <= most)(x, norm)

    def _plain(self, x: Tensor, norm: RMSNorm) -> Tensor:
        y = norm(x)
        weights, chosen = route(self.gate(y), self.num_chosen, self.renormalized)
        return x.add_(run_experts(y, self.experts.gate_up, self.experts.down, weights, chosen))

    def _few_tokens(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Four launches: the router, its choice, gate and up, down."""
        from nanovllm.kernels import moe

        routed = moe.route(self.gate(x, norm=norm), self.num_chosen, self.renormalized)
        weights = self.experts.gate_up, self.experts.down
        return moe.few_tokens_experts(x, norm.weight, norm.eps, *weights, *routed)

    def _grouped(self, x: Tensor, norm: RMSNorm) -> Tensor:
        from nanovllm.kernels.moe import grouped_experts

        y, weights = norm(x), (self.experts.gate_up, self.experts.down)
        return grouped_experts(y, x, *weights, self.gate(y), self.num_chosen, self.renormalized)

"""A mixture of experts (https://arxiv.org/abs/1701.06538), as Qwen3-MoE has it.

A router gives each token a few of many small MLPs, and their outputs are added up by weight. What
is here is computed one expert after the other; for kernels see nanovllm.kernels.moe.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.int4 import Int4Weight
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.layers.products import product_for
from nanovllm.layers.stored_weight import StoredWeight
from nanovllm.model_config import ModelConfig
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.quantization import Fp8Weight, Stored, Target, matrices, own_targets

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


# Matrices of all experts, one upon the other.
Stack = Tensor | Fp8Weight | Int4Weight


def run_experts(x: Tensor, gate_up: Stack, down: Stack, weights: Tensor, chosen: Tensor) -> Tensor:
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
    counts = torch.bincount(chosen.flatten(), minlength=down.shape[0]).tolist()
    for expert, those in enumerate(places.split(counts)):
        if len(those):
            tokens = those // num_chosen
            y = _linear(silu_and_mul(_linear(x[tokens], gate_up, expert)), down, expert)
            out.index_add_(0, tokens, y.to(exact) * weights.flatten()[those, None])
    return out.to(x.dtype)


def _linear(x: Tensor, stack: Stack, expert: int) -> Tensor:
    """x @ the expert's weight.T."""
    if isinstance(stack, Int4Weight):
        return stack[expert].linear(x)
    if isinstance(stack, Fp8Weight):
        matrix = Fp8Weight(stack.values[expert], stack.scales[expert])
        return F.linear(x, matrix.dequantized(x.dtype))
    return F.linear(x, stack[expert])


class GateUpWeight(StoredWeight):
    """[num_experts, 2 * intermediate_size, hidden_size], gate over up."""

    @property
    def row_step(self) -> int:
        return self.weight.size(-2) // 2


class ExpertWeights(nn.Module):
    """Those of all experts' MLPs; options: their device and dtype."""

    def __init__(self, config: ModelConfig, group: RankGroup, **options: Any) -> None:
        super().__init__()
        assert config.experts is not None
        _, num_experts, _, size, _ = config.experts
        self.gate_up = GateUpWeight(num_experts, 2 * size, config.hidden_size, **options)
        self.down = StoredWeight(num_experts, config.hidden_size, size, **options)
        self.down.group = group

    def shards(self) -> Iterator[tuple[str, Target]]:
        """("experts.0.gate_proj.weight", its part of gate_up) and so on."""
        stacks = own_targets(self.gate_up)["weight"], own_targets(self.down)["weight"]
        for expert, (gate_up, down) in enumerate(zip(*map(matrices, stacks), strict=True)):
            gate, up = gate_up.split([gate_up.shape[0] // 2] * 2)
            yield f"experts.{expert}.gate_proj.weight", gate
            yield f"experts.{expert}.up_proj.weight", up
            yield f"experts.{expert}.down_proj.weight", down


class ExpertInputs(NamedTuple):
    """What experts are given: residual + experts of norm(x) is wanted.

    x: [num_tokens, hidden_size]. residual: x itself, to be overwritten, or None: nothing is added.
    out: where the result goes; None: anywhere.
    """

    x: Tensor
    norm: RMSNorm
    residual: Tensor | None
    out: Tensor | None


class MoE(nn.Module):
    """Router and experts of a layer; in the place of an MLP."""

    def __init__(self, config: ModelConfig, group: RankGroup, **options: Any) -> None:
        super().__init__()
        assert config.experts is not None
        self.group = group
        self.num_chosen = config.experts.num_chosen
        self.renormalized = config.experts.renormalized
        self.gate = Linear(config.hidden_size, config.experts.num_experts, **options)
        self.experts = ExpertWeights(config, group, **options)
        # By the most tokens that each is for, as nanovllm.layers.products has it.
        self.products: dict[float, Callable[[ExpertInputs], Tensor]] = {math.inf: self._plain}
        if kernels.usable(self.experts.down.weight.device):
            from nanovllm.kernels.moe import token_tile_borders

            borders = token_tile_borders(config.experts.num_experts, self.num_chosen)
            self.products = {MOST_FEW: self._few_tokens}
            self.products |= dict.fromkeys((*borders, math.inf), self._grouped)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [num_tokens, hidden_size], overwritten, -> x + experts of norm(x).

        Every rank routes for itself, to the same experts, and has a part of each expert's MLP.
        """
        run = product_for(len(x), self.products)
        residual = x if self.group.rank == 0 else None
        out = self.group.output(len(x), x.size(1), x.dtype)
        return self.group.all_reduce(run(ExpertInputs(x, norm, residual, out)))

    def _plain(self, inputs: ExpertInputs) -> Tensor:
        x, norm, residual, out = inputs
        y = norm(x)
        weights, chosen = route(self.gate(y), self.num_chosen, self.renormalized)
        y = run_experts(y, self.experts.gate_up.stored, self.experts.down.stored, weights, chosen)
        y = y if residual is None else residual.add_(y)
        return y if out is None else out.copy_(y)

    def _weights(self) -> tuple[Stored, Stored]:
        """Of all experts, on a GPU, where none are int4."""
        gate_up, down = self.experts.gate_up.stored, self.experts.down.stored
        assert not isinstance(gate_up, Int4Weight) and not isinstance(down, Int4Weight)
        return gate_up, down

    def _few_tokens(self, inputs: ExpertInputs) -> Tensor:
        """Four launches: the router, its choice, gate and up, down."""
        from nanovllm.kernels import moe

        x, norm, residual, out = inputs
        routed = moe.route(self.gate(x, norm=norm), self.num_chosen, self.renormalized)
        weights = self._weights()
        normed = x, norm.weight, norm.eps
        return moe.few_tokens_experts(*normed, *weights, *routed, residual=residual, out=out)

    def _grouped(self, inputs: ExpertInputs) -> Tensor:
        from nanovllm.kernels.moe import grouped_experts

        x, norm, residual, out = inputs
        y = norm(x)
        weights = self._weights()
        routed = self.gate(y), self.num_chosen
        return grouped_experts(y, *weights, *routed, self.renormalized, residual, out)

"""Linear layers, one matrix product each, and which checkpoint tensors fill them."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.activation import SiluAndMul


class Linear(nn.Module):
    """y = x @ weight.T + bias, weight [output_size, input_size] in the default dtype and device."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None
        # Tokens, up to which a kernel is faster than cuBLAS. -1: none is, for no tokens either.
        self.max_small = -1
        if kernels.usable():
            from nanovllm.kernels.small_linear import small_linear_counters

            self.max_small = self._measured_max_small()
            self.counters = small_linear_counters(output_size)

    def _measured_max_small(self) -> int:
        """`max_small` where there are kernels."""
        from nanovllm.kernels.small_linear import max_tokens

        return max_tokens(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size].

        Args:
            residual: [num_tokens, output_size], what the output is added to. It may be overwritten:
                the result can be `residual` itself.
            out: where the output goes, contiguous. Not with a bias or a residual.
        """
        assert out is None or (residual is None and self.bias is None)
        if len(x) <= self.max_small:
            from nanovllm.kernels.small_linear import small_linear

            return small_linear(x, self.weight, self.bias, self.counters, residual, out=out)
        if out is not None:
            return torch.mm(x, self.weight.T, out=out)
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None and x.is_cuda:  # within the matrix product, and rounded once
            return residual.addmm_(x, self.weight.t())
        return residual.add_(F.linear(x, self.weight, self.bias))


class MergedLinear(Linear):
    """Several linear layers of one input as a single matrix product, their outputs side by side.

    Args:
        input_size: their common input.
        output_sizes: size of each by the name that it has in the checkpoint, in order.
    """

    def __init__(self, input_size: int, output_sizes: dict[str, int], bias: bool = False) -> None:
        super().__init__(input_size, sum(output_sizes.values()), bias)
        self.output_sizes = output_sizes

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """("q_proj.weight", its rows of the merged weight) and so on, biases too."""
        for name, parameter in self.named_parameters():
            parts = parameter.split(list(self.output_sizes.values()))
            for shard, part in zip(self.output_sizes, parts, strict=True):
                yield f"{shard}.{name}", part


class GatedLinear(MergedLinear):
    """SiLU(gate(x)) * up(x), the weights of gate_proj over those of up_proj.

    Args:
        input_size: of both.
        output_size: of each, and of their product.
    """

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, {"gate_proj": output_size, "up_proj": output_size})
        self.act = SiluAndMul()
        self.min_large: float = math.inf  # tokens from which on a kernel is faster
        if kernels.usable():
            from nanovllm.kernels.gated_linear import min_tokens

            self.min_large = min_tokens(self.weight)

    def _measured_max_small(self) -> int:
        from nanovllm.kernels.small_linear import max_tokens

        return max_tokens(self.weight, gated=True)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size]."""
        if len(x) <= self.max_small:
            from nanovllm.kernels.small_linear import small_linear

            return small_linear(x, self.weight, gated=True)
        if len(x) >= self.min_large:
            from nanovllm.kernels.gated_linear import gated_linear

            return gated_linear(x, self.weight)
        return self.act(super().forward(x))

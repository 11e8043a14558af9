"""Linear layers: one matrix product each, with the norm before it and the sum after it.

What is here says which weights a layer has and which checkpoint tensors fill them. How it is
computed depends on the number of tokens: see nanovllm.layers.products.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nanovllm.kernels import kernel_of
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.fp8 import fp8_table
from nanovllm.layers.int4 import Int4Weight, int4_table
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.products import LinearInputs, ProductTable, pack, product_for, product_table
from nanovllm.layers.stored_weight import StoredWeight
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.quantization import Fp8Rows, Fp8Weight, Target, own_targets


class Linear(StoredWeight):
    """y = norm(x) @ weight.T + bias, weight [output_size, input_size]; options: device, dtype."""

    is_gated: ClassVar[bool] = False
    is_head: ClassVar[bool] = False

    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, **options: Any
    ) -> None:
        super().__init__(output_size, input_size, **options)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(output_size, **options), requires_grad=False)
        self.act = kernel_of(silu_and_mul, "fused", self.weight.device) if self.is_gated else None
        self.products = self._product_table()

    def _product_table(self) -> ProductTable:
        weight = self.stored
        if isinstance(weight, Int4Weight):
            return int4_table(weight)
        if isinstance(weight, Fp8Weight):
            return fp8_table(weight, self.dtype, self.is_gated, self.bias is not None)
        num_out = self.own_shape[0] // (2 if self.is_gated else 1)
        how = self.is_gated, self.is_head, self.bias is not None
        return product_table(self.weight, num_out, *how)

    def pack(self) -> None:
        super().pack()
        is_dense = self.scales is None and not self.weight.is_mkldnn
        if is_dense and self.weight.shape == self.own_shape:
            packed = pack(self.weight, self.is_gated)
            if packed is not self.weight:
                self.replace(packed)

    def replace(self, weight: Tensor, scales: Tensor | None = None) -> None:
        super().replace(weight, scales)
        self.products = self._product_table()

    def forward(
        self,
        x: Tensor | Fp8Rows,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor | Fp8Rows:
        """[num_tokens, input_size] -> [num_tokens, output_size].

        FP8 goes only from a gated layer to the one after it: see layers.fp8.

        Args:
            residual: [num_tokens, output_size], what the output is added to. It may be overwritten:
                the result can be `residual` itself. Not for a gated layer.
            out: where the output goes, contiguous. Not for a gated layer.
            norm: what x goes through first.
        """
        assert not (self.is_gated and (residual is not None or out is not None))
        # len of a tensor takes several times as long as its shape
        product = product_for(x.shape[0], self.products)
        return product(LinearInputs(x, self.weight, self.act, self.bias, norm, residual, out))


class RowParallelLinear(Linear):
    """A linear layer of whose inputs each rank has a part, to be added up to the outputs.

    What else is added, bias and residual, rank 0 adds to its part.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        group: RankGroup,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(input_size, output_size, bias and group.rank == 0, **options)
        self.group = group

    def forward(
        self,
        x: Tensor | Fp8Rows,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        assert out is None
        out = self.group.output(x.shape[0], self.own_shape[0], x.dtype)
        residual = residual if self.group.rank == 0 else None
        y = super().forward(x, residual, out, norm)
        assert isinstance(y, Tensor)
        return self.group.all_reduce(y)


class MergedLinear(Linear):
    """Several linear layers of one input as a single matrix product, their outputs side by side.

    Args:
        input_size: their common input.
        output_sizes: size of each by the name that it has in the checkpoint, in order.
    """

    def __init__(
        self, input_size: int, output_sizes: dict[str, int], bias: bool = False, **options: Any
    ) -> None:
        super().__init__(input_size, sum(output_sizes.values()), bias, **options)
        self.output_sizes = output_sizes

    @property
    def row_step(self) -> int:
        return gcd(*self.output_sizes.values())

    def shards(self) -> Iterator[tuple[str, Target]]:
        """("q_proj.weight", its rows of the merged weight) and so on, biases too."""
        for name, target in own_targets(self).items():
            parts = target.split(list(self.output_sizes.values()))
            for shard, part in zip(self.output_sizes, parts, strict=True):
                yield f"{shard}.{name}", part


class GatedLinear(MergedLinear):
    """SiLU(gate(x)) * up(x), the weights of gate_proj over those of up_proj.

    Args:
        input_size: of both.
        output_size: of each, and of their product.
    """

    is_gated = True

    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, **options: Any
    ) -> None:
        sizes = {"gate_proj": output_size, "up_proj": output_size}
        super().__init__(input_size, sizes, bias, **options)

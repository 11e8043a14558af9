"""Linear layers: one matrix product each, with the norm before it and the sum after it.

What is here says which weights a layer has and which checkpoint tensors fill them. How it is
computed depends on the number of tokens: see nanovllm.layers.products.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.products import LinearInputs, product_table


class Linear(nn.Module):
    """act(norm(x) @ weight.T + bias), weight [output_size, input_size] in the default dtype.

    Args:
        act: what the product passes through; None: nothing.
    """

    is_head: ClassVar[bool] = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        act: SiluAndMul | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None
        self.act = act
        self.products = product_table(self.weight, act is not None, self.is_head)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """[num_tokens, input_size] -> [num_tokens, output_size].

        Args:
            norm: what x goes through first.
            residual: [num_tokens, output_size], what the output is added to. It may be overwritten:
                the result can be `residual` itself. Not with an activation.
            out: where the output goes, contiguous. Only where nothing follows the product: no
                bias, activation or residual.
        """
        assert residual is None or self.act is None
        assert out is None or (residual is None and self.bias is None and self.act is None)
        product = self.products[len(x)]
        return product(LinearInputs(x, self.weight, self.bias, norm, self.act, residual, out))


class MergedLinear(Linear):
    """Several linear layers of one input as a single matrix product, their outputs side by side.

    Args:
        input_size: their common input.
        output_sizes: size of each by the name that it has in the checkpoint, in order.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: dict[str, int],
        bias: bool = False,
        act: SiluAndMul | None = None,
    ) -> None:
        super().__init__(input_size, sum(output_sizes.values()), bias, act)
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
        sizes = {"gate_proj": output_size, "up_proj": output_size}
        super().__init__(input_size, sizes, act=SiluAndMul())

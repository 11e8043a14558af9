"""FP8 weights as Qwen stores them: e4m3 numbers, and a scale for each block of 128 x 128."""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128
# What a checkpoint calls the scales of a weight: its name, and this.
SCALES_SUFFIX = "_scale_inv"


class Fp8Weight(NamedTuple):
    """A matrix, or a stack of them: each value times its scale.

    values: e4m3 [..., num_rows, input_size]. scales: float32 [..., num_row_blocks,
    num_input_blocks], which divide the rows and the inputs evenly.
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def block(self) -> tuple[int, int]:
        """The rows and the inputs that share a scale."""
        pairs = zip(self.values.shape[-2:], self.scales.shape[-2:], strict=True)
        rows, inputs = (size // number for size, number in pairs)
        return rows, inputs

    @classmethod
    def empty(cls, *shape: int, row_step: int, device: torch.device) -> "Fp8Weight":
        """Memory for matrices [..., num_rows, input_size] to be filled from blocks of a checkpoint.

        Args:
            row_step: parts of the rows that are filled by themselves begin at multiples of it. A
                rank's parts of rows and inputs begin at multiples of their size.
        """
        *stack, num_rows, input_size = shape
        num_blocks = num_rows // gcd(BLOCK, row_step), input_size // gcd(BLOCK, input_size)
        scales = torch.empty(*stack, *num_blocks, dtype=torch.float32, device=device)
        return cls(torch.empty(shape, dtype=E4M3, device=device), scales)

    def split(self, sizes: Sequence[int]) -> "list[Fp8Weight]":
        """Parts of so many rows each, as views."""
        step = self.block[0]
        scales = self.scales.split([size // step for size in sizes], dim=-2)
        return list(map(Fp8Weight, self.values.split(list(sizes), dim=-2), scales))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[..., num_rows, input_size]."""
        rows, inputs = self.block
        scales = self.scales.repeat_interleave(rows, -2).repeat_interleave(inputs, -1)
        return scales.mul_(self.values.float()).to(dtype)

    def fill(self, values: Tensor, scales: Tensor, starts: Sequence[int]) -> None:
        """Take what is a part of a checkpoint's matrix.

        Args:
            values: e4m3, of this one's shape.
            scales: of the blocks of BLOCK x BLOCK that it lies in.
            starts: where in the first of these blocks it begins.
        """
        self.values.copy_(values)
        for dim, (start, step) in enumerate(zip(starts, self.block, strict=True)):
            places = torch.arange(self.scales.size(dim), device=scales.device) * step + start
            scales = scales.index_select(dim, places // BLOCK)
        self.scales.copy_(scales)


class WidePart(NamedTuple):
    """Memory [..., num_rows, width] for more of a checkpoint's matrix than a rank's part.

    start: the first of the matrix's inputs that it is for.
    """

    memory: Tensor
    start: int

    @property
    def shape(self) -> torch.Size:
        return self.memory.shape

    def split(self, sizes: Sequence[int]) -> "list[WidePart]":
        """Parts of so many rows each, as views."""
        return [WidePart(part, self.start) for part in self.memory.split(list(sizes), dim=-2)]


# What one tensor of a checkpoint fills.
Target = Tensor | Fp8Weight | WidePart


def num_blocks(size: int) -> int:
    """Blocks that a dimension is cut into; the last may be smaller."""
    return -(-size // BLOCK)


def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A matrix in blocks of BLOCK x BLOCK, each with the scale that makes its largest number 448.

    Args:
        weight: [num_rows, input_size].
        name: of the tensor, for the error.

    Returns:
        e4m3 [num_rows, input_size]; float32 [num_blocks(num_rows), num_blocks(input_size)], 0 for
        a block of zeros.

    Raises:
        ValueError: a number is infinite, or none.
    """
    num_rows, input_size = weight.shape
    padding = (0, -input_size % BLOCK, 0, -num_rows % BLOCK)
    blocks = F.pad(weight.float(), padding).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    if not largest.isfinite().all():
        raise ValueError(f"tensor {name!r} holds infinite numbers or NaN, which FP8 weights cannot")
    scales = largest / E4M3_MAX
    divisors = scales.masked_fill(scales == 0, 1.0)
    values = (blocks / divisors[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values.flatten(2, 3).flatten(0, 1)[:num_rows, :input_size], scales


def own_targets(module: nn.Module) -> dict[str, Target]:
    """A module's parameters by their names, a weight and its scales as one."""
    targets: dict[str, Target] = dict(module.named_parameters(recurse=False))
    scales = targets.pop("scales", None)
    if scales is not None:
        weight = targets["weight"]
        assert isinstance(weight, Tensor) and isinstance(scales, Tensor)
        targets["weight"] = Fp8Weight(weight, scales)
    first_input = getattr(module, "first_input", None)
    if first_input is not None:
        targets["weight"] = WidePart(module.get_parameter("weight"), first_input)
    return targets


def matrices(stack: Target) -> Sequence[Target]:
    """Those of a stack, as views."""
    if isinstance(stack, Fp8Weight):
        return list(map(Fp8Weight, stack.values, stack.scales))
    if isinstance(stack, WidePart):
        return [WidePart(memory, stack.start) for memory in stack.memory]
    return list(stack)

"""FP8 weights as Qwen stores them: e4m3 numbers, and a scale for each block of 128 x 128."""

from collections.abc import Sequence
from dataclasses import dataclass
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

    @staticmethod
    def block_of(shape: Sequence[int], row_step: int) -> tuple[int, int]:
        """The rows and the inputs that will share a scale: see `empty`."""
        return gcd(BLOCK, row_step), gcd(BLOCK, shape[-1])

    @classmethod
    def empty(cls, *shape: int, row_step: int, device: torch.device) -> "Fp8Weight":
        """Memory for matrices [..., num_rows, input_size] to be filled from blocks of a checkpoint.

        Args:
            row_step: parts of the rows that are filled by themselves begin at multiples of it. A
                rank's parts of rows and inputs begin at multiples of their size.
        """
        rows, inputs = cls.block_of(shape, row_step)
        num_blocks = *shape[:-2], shape[-2] // rows, shape[-1] // inputs
        scales = torch.empty(num_blocks, dtype=torch.float32, device=device)
        return cls(torch.empty(shape, dtype=E4M3, device=device), scales)

    def split(self, sizes: Sequence[int]) -> "list[Fp8Weight]":
        """Parts of so many rows each, as views."""
        step = self.block[0]
        scales = self.scales.split([size // step for size in sizes], dim=-2)
        return list(map(Fp8Weight, self.values.split(list(sizes), dim=-2), scales))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[..., num_rows, input_size]; of a stack one matrix at a time is float32."""
        rows, inputs = self.block
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        stacks = (each.reshape(-1, *each.shape[-2:]) for each in (self.values, self.scales, out))
        for values, scales, matrix in zip(*stacks, strict=True):
            blocks = values.float().unflatten(1, (-1, inputs)).unflatten(0, (-1, rows))
            matrix.copy_(blocks.mul_(scales[:, None, :, None]).flatten(2).flatten(0, 1))
        return out

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


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Tokens as FP8, each 128 numbers with a scale; behind them there may be rows of garbage.

    values: e4m3 [num_rows, size]. scales: float32 [size / 128, num_rows]. dtype: of what they stand
    for.
    """

    values: Tensor
    scales: Tensor
    num_tokens: int
    dtype: torch.dtype

    @classmethod
    def empty(cls, num_tokens: int, size: int, step: int, like: Tensor) -> "Fp8Rows":
        """Memory for tokens of another tensor's dtype; the rows are a multiple of step."""
        num_rows = -(-num_tokens // step) * step
        values = like.new_empty(num_rows, size, dtype=E4M3)
        scales = like.new_empty(size // BLOCK, num_rows, dtype=torch.float32)
        return cls(values, scales, num_tokens, like.dtype)

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_tokens, self.values.size(1)))

    def dequantized(self) -> Tensor:
        """[num_tokens, size]."""
        scales = self.scales.T.repeat_interleave(BLOCK, 1)
        return scales.mul_(self.values.float())[: self.num_tokens].to(self.dtype)


class Dequantized(NamedTuple):
    """A matrix, or a stack of them, that is filled with what FP8 numbers stand for.

    weight: [..., num_rows, input_size].
    """

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def split(self, sizes: Sequence[int]) -> "list[Dequantized]":
        """Parts of so many rows each, as views."""
        return list(map(Dequantized, self.weight.split(list(sizes), dim=-2)))

    def fill(self, values: Tensor, scales: Tensor, starts: Sequence[int]) -> None:
        """As Fp8Weight.fill."""
        device = self.weight.device
        part = Fp8Weight.empty(*self.shape, row_step=self.shape[-2], device=device)
        part.fill(values, scales, starts)
        self.weight.copy_(part.dequantized(self.weight.dtype))


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


# A weight, or a stack of them, as it is kept; and what one tensor of a checkpoint fills.
Stored = Tensor | Fp8Weight
Target = Stored | Dequantized | WidePart


def memory_of(target: Tensor | Dequantized | WidePart) -> Tensor:
    """The memory that a tensor's numbers are written to."""
    if isinstance(target, Tensor):
        return target
    return target.memory if isinstance(target, WidePart) else target.weight


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
    scales = largest / torch.full_like(largest, E4M3_MAX)  # by a number, a GPU divides inexactly
    divisors = scales.masked_fill(scales == 0, 1.0)
    values = (blocks / divisors[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values.flatten(2, 3).flatten(0, 1)[:num_rows, :input_size], scales


def own_targets(module: nn.Module) -> dict[str, Target]:
    """A module's parameters by their names, a weight and its scales as one.

    is_fp8, where a module has it, says whether its weight is FP8, or what FP8 numbers stand for.
    """
    parameters = dict(module.named_parameters(recurse=False))
    scales = parameters.pop("scales", None)
    targets: dict[str, Target] = {**parameters}
    if scales is not None:
        targets["weight"] = Fp8Weight(parameters["weight"], scales)
    elif getattr(module, "is_fp8", False):
        targets["weight"] = Dequantized(parameters["weight"])
    elif (first_input := getattr(module, "first_input", None)) is not None:
        targets["weight"] = WidePart(parameters["weight"], first_input)
    return targets


def matrices(stack: Target) -> Sequence[Target]:
    """Those of a stack, as views."""
    if isinstance(stack, Fp8Weight):
        return list(map(Fp8Weight, stack.values, stack.scales))
    if isinstance(stack, WidePart):
        return [WidePart(memory, stack.start) for memory in stack.memory]
    if isinstance(stack, Dequantized):
        return list(map(Dequantized, stack.weight))
    return list(stack)

"""Int4 weights on a CPU: 16 levels for each group of inputs, made while a model is loaded.

Torch has an operator that multiplies by them. It keeps a matrix in blocks of rows, within a block
input after input, two numbers a byte; which two depends on the processor's instructions, so nothing
here looks into a byte. All that it rests on is that blocks of 64 rows follow one another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (128, 64, 32)  # inputs that may share a scale, the best first; the operator takes no less
ROWS = 64  # whole blocks of rows: outputs are padded
LEVELS = 16
ZERO_CODE = 8
SHRINKS = (1.0,)
# Measured on two cores of an EPYC with avx512_bf16. The operator has no fast code for other dtypes.
MOST_FEW = 64
QUANTIZED_AT_ONCE = 1 << 22  # numbers, for which scratch memory is taken
DEQUANTIZED_AT_ONCE = 1 << 23


def require_int4(device: torch.device) -> None:
    """Raise ValueError if int4 weights cannot be had: but for the device it is torch's version."""
    if device.type != "cpu":
        raise ValueError(f"quantization='int4' needs a CPU, got device={str(device)!r}")
    for name in ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"):
        if not hasattr(torch.ops.aten, name):
            raise ValueError(
                f"quantization='int4' needs torch's operator aten::{name}, which torch "
                f"{torch.__version__} has not"
            )


class Groups(NamedTuple):
    """How the inputs of a matrix are grouped.

    size: inputs that share a scale. before, after: of a rank's part of a matrix, how many inputs
    that it has not are in groups with its first and its last ones.
    """

    size: int
    before: int = 0
    after: int = 0

    @classmethod
    def of(cls, input_size: int, rank: int = 0, num_ranks: int = 1) -> "Groups | None":
        """Those of a rank's part of the inputs, which are grouped as all of them would be.

        Args:
            input_size: of the part.

        Returns:
            None: no size divides all of the inputs.
        """
        size = next((size for size in GROUPS if input_size * num_ranks % size == 0), None)
        if size is None:
            return None
        start, end = rank * input_size, (rank + 1) * input_size
        return cls(size, start % size, -end % size)

    @property
    def num_others(self) -> int:
        """Inputs of other ranks in the groups of this one's."""
        return self.before + self.after


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A matrix, or a stack of them: (code - 8) * scale + zero.

    values: uint8 [..., num_padded_rows, input_size / 2], codes 0 to 15 in the operator's layout.
    scales: [..., num_groups, num_padded_rows, 2], scale and zero. Their numbers are bfloat16; their
    dtype is so where the operator is to take them, else float32. num_rows: without the padding.
    """

    values: Tensor
    scales: Tensor
    num_rows: int

    @property
    def group(self) -> int:
        return 2 * self.values.size(-1) // self.scales.size(-3)

    def __len__(self) -> int:
        """Of a stack."""
        return len(self.values)

    def __getitem__(self, index: int) -> "Int4Weight":
        """One of a stack, as a view."""
        return Int4Weight(self.values[index], self.scales[index], self.num_rows)

    @property
    def most_few(self) -> int:
        """The most tokens that `few` is for, which computes in float32, rather than `many`."""
        return MOST_FEW if self.scales.dtype == torch.bfloat16 else 0

    def linear(self, x: Tensor) -> Tensor:
        """x @ weight.T: [num_tokens, input_size] -> [num_tokens, num_rows]."""
        return self.few(x) if len(x) <= self.most_few else self.many(x)

    def few(self, x: Tensor) -> Tensor:
        """`linear` by the operator, bfloat16; it dequantises anew for every four tokens."""
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: Tensor = operator(x.contiguous(), self.values, self.group, self.scales)
        return y[:, : self.num_rows]

    def many(self, x: Tensor) -> Tensor:
        """`linear` by the dequantised weight, or one part of its rows after the other."""
        rows_at_once = max(ROWS, DEQUANTIZED_AT_ONCE // x.size(1) // ROWS * ROWS)
        if rows_at_once >= self.num_rows:
            return F.linear(x, self.dequantized(x.dtype))
        y = x.new_empty(len(x), self.num_rows)
        for start in range(0, self.num_rows, rows_at_once):
            end = min(start + rows_at_once, self.num_rows)
            y[:, start:end] = F.linear(x, self._rows(start, end).dequantized(x.dtype))
        return y

    def _rows(self, start: int, end: int) -> "Int4Weight":
        """Those of a matrix from a multiple of ROWS on."""
        padded = -(-end // ROWS) * ROWS
        return Int4Weight(self.values[start:padded], self.scales[:, start:padded], end - start)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[num_rows, input_size] of one matrix, a view.

        The operator does it, multiplying the identity by the weight. To make that few products, it
        is told that each 32 inputs of a block are a block of a matrix of 32 inputs, which in memory
        is the same.
        """
        num_padded, size = self.values.size(0), 2 * self.values.size(1)
        num_blocks, step = num_padded // ROWS, GROUPS[-1]
        in_steps = num_blocks, size // step, ROWS
        values = self.values.reshape(-1, step // 2)
        scales = self.scales.unflatten(1, (num_blocks, ROWS)).transpose(0, 1)
        scales = scales.repeat_interleave(self.group // step, dim=1)
        is_exact = dtype == self.scales.dtype == torch.bfloat16
        if is_exact:
            told = scales.reshape(1, -1, 2)
        else:
            told = torch.ones(1, len(values), 2, dtype=torch.bfloat16, device=values.device)
            told[..., 1] = 0
        identity = torch.eye(step, dtype=torch.bfloat16, device=values.device)
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        found = operator(identity, values, step, told).view(step, *in_steps)
        if not is_exact:
            found = torch.addcmul(scales[..., 1].float(), found.float(), scales[..., 0].float())
        weight = torch.empty(
            size // step, step, num_blocks, ROWS, dtype=dtype, device=values.device
        )
        weight.copy_(found.permute(2, 0, 1, 3))
        return weight.view(size, num_padded).T[: self.num_rows]


def packed(weight: Tensor, groups: Groups) -> "Int4Weight | Tensor":
    """A matrix [num_rows, before + input_size + after], or a stack of them, as Int4Weight.

    Returns:
        Where a rank's part begins or ends within 32 inputs, which the operator cannot have: the
        dequantised numbers of the part, as other ranks multiply by them.
    """
    *stack, num_rows, width = weight.shape
    own = slice(groups.before, width - groups.after)
    steps = (s for s in GROUPS if not (groups.size % s or own.start % s or own.stop % s))
    step = next(steps, None)
    if step is None:
        plain = weight.new_empty(*stack, num_rows, own.stop - own.start)
        for target, matrix in zip(_matrices(plain), _matrices(weight), strict=True):
            for start, codes, scales in _quantized(matrix, groups.size):
                wide = scales.repeat_interleave(groups.size, dim=1)[:, own].float()
                numbers = wide[..., 1].addcmul(codes[:, own] - float(ZERO_CODE), wide[..., 0])
                target[start : start + len(codes)] = numbers[: len(target) - start]
        return plain
    num_padded, size = -(-num_rows // ROWS) * ROWS, own.stop - own.start
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    values = torch.empty(*stack, num_padded, size // 2, dtype=torch.uint8, device=weight.device)
    shape = *stack, size // step, num_padded, 2
    all_scales = torch.empty(shape, dtype=dtype, device=weight.device)
    targets = _matrices(values), all_scales.flatten(0, -4) if stack else all_scales[None]
    for matrix, to_values, to_scales in zip(_matrices(weight), *targets, strict=True):
        for start, codes, scales in _quantized(matrix, groups.size):
            rows = slice(start, start + len(codes))
            codes = codes[:, own].to(torch.int32).contiguous()
            to_values[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            scales = scales.repeat_interleave(groups.size // step, dim=1)
            to_scales[:, rows] = scales[:, own.start // step : own.stop // step].transpose(0, 1)
    return Int4Weight(values, all_scales, num_rows)


def _matrices(stack: Tensor) -> Tensor:
    return stack.flatten(0, -3) if stack.dim() > 2 else stack[None]


def _quantized(weight: Tensor, group: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows of a matrix [num_rows, input_size], some at a time: the first one's index, and

    their codes, float32 [rows, input_size]; scales and zeros, bfloat16 [rows, num_groups, 2]. The
    last rows are padded with zeros.
    """
    num_rows, size = weight.shape
    rows_at_once = max(ROWS, QUANTIZED_AT_ONCE // size // ROWS * ROWS)
    for start in range(0, num_rows, rows_at_once):
        rows = weight[start : start + rows_at_once].float()
        grouped = F.pad(rows, (0, 0, 0, -len(rows) % ROWS)).unflatten(1, (-1, group))
        scales = _scales(grouped)
        codes = _codes(grouped, scales)
        yield start, codes.flatten(1), scales.to(torch.bfloat16)


def _scales(grouped: Tensor) -> Tensor:
    """Scale and zero of each group [..., size]: float32 [..., 2], of numbers that bfloat16 has."""
    low, high = grouped.aminmax(dim=-1)
    found, least = torch.empty(0), torch.empty(0)
    for shrink in SHRINKS:
        scale = high * (shrink / (LEVELS - 1)) - low * (shrink / (LEVELS - 1))
        middle = high / 2 + low / 2
        zero = middle + scale * (ZERO_CODE - (LEVELS - 1) / 2)
        tried = torch.stack((scale, zero), dim=-1).to(torch.bfloat16).float()
        if len(SHRINKS) == 1:
            return tried
        error = (_numbers(_codes(grouped, tried), tried) - grouped).square_().sum(dim=-1)
        if not len(found):
            found, least = tried, error
        is_better = error < least
        found = torch.where(is_better[..., None], tried, found)
        least = torch.where(is_better, error, least)
    return found


def _codes(grouped: Tensor, scales: Tensor) -> Tensor:
    """The nearest levels, as float32 0 to 15."""
    scale, zero = scales[..., None].unbind(-2)
    steps = (grouped - zero) / scale.masked_fill(scale == 0, 1.0)
    return steps.round_().add_(ZERO_CODE).clamp_(0, LEVELS - 1)


def _numbers(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes [..., size] of groups stand for."""
    scale, zero = scales[..., None].unbind(-2)
    return zero.addcmul(codes - ZERO_CODE, scale)

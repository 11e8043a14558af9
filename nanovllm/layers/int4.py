"""Int4 weights on a CPU: 16 levels for each group of inputs, made while a model is loaded.

Torch has an operator that multiplies by them. It keeps a matrix in blocks of rows, within a block
input after input, the codes of two rows a byte; which two depends on the processor's instructions.
The kernel in C, where it is usable, reads the same, and is faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers.products import LinearInputs, ProductTable, finished
from nanovllm.utils.device import has_matrix_unit, multiplies_bfloat16
from nanovllm.utils.memory import in_large_pages

OPERATORS = "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"
GROUPS = (128, 64, 32)  # inputs that may share a scale, the best first; the operator takes no less
ROWS = 64  # whole blocks on any machine: outputs are padded
LEVELS = 16
ZERO_CODE = 8
# The kernel's most tokens where oneDNN has AMX, several times as fast: from there on what
# dequantising costs is made good. Measured on eight cores of a Xeon: 512 tokens took 1.4 times as
# long by the kernel.
MOST_KERNEL_WITH_AMX = 256
KERNEL_LAYOUT = 64, True  # as `layout` gives it: the one that the kernel reads
# Measured on two cores of an EPYC with avx512_bf16. The operator has no fast code for other dtypes.
MOST_FEW = 64
QUANTIZED_AT_ONCE = 1 << 22  # numbers, for which scratch memory is taken
CODES_AT_ONCE = 1 << 20  # that are spread to two bytes each
DEQUANTIZED_AT_ONCE = 1 << 22  # 8 MiB of them stay in the cache till they are multiplied


def require_int4(device: torch.device) -> None:
    """Raise ValueError if int4 weights cannot be had: but for the device it is torch's version."""
    if device.type != "cpu":
        raise ValueError(f"quantization='int4' needs a CPU, got device={str(device)!r}")
    for name in OPERATORS:
        if not hasattr(torch.ops.aten, name):
            raise ValueError(
                f"quantization='int4' needs torch's operator aten::{name}, which torch "
                f"{torch.__version__} has not"
            )
    layout()


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

    @property
    def shape(self) -> torch.Size:
        *stack, _, half = self.values.shape
        return torch.Size((*stack, self.num_rows, 2 * half))

    def __getitem__(self, index: int) -> "Int4Weight":
        """One of a stack, as a view."""
        return Int4Weight(self.values[index], self.scales[index], self.num_rows)

    @property
    def most_few(self) -> int:
        """The most tokens that `few` is for, which computes in float32, rather than `many`."""
        return MOST_FEW if self.scales.dtype == torch.bfloat16 else 0

    @property
    def most_kernel(self) -> float:
        """The most tokens that the kernel is for: 0 where it cannot be had."""
        is_readable = self.scales.dtype == torch.bfloat16 and layout() == KERNEL_LAYOUT
        if not (is_readable and kernels.multiplies_int4(self.values.device)):
            return 0
        return MOST_KERNEL_WITH_AMX if has_matrix_unit() else math.inf

    def linear(self, x: Tensor) -> Tensor:
        """x @ weight.T: [num_tokens, input_size] -> [num_tokens, num_rows]."""
        if x.size(0) <= self.most_kernel:
            return self.by_kernel(x)
        return self.few(x) if x.size(0) <= self.most_few else self.many(x)

    def by_kernel(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """residual + (`linear` + bias) by the kernel in C, rounded once; to `out`, if given."""
        from nanovllm.kernels.cpu.int4 import int4_linear

        matrix = self.values, self.scales, self.num_rows
        return int4_linear(x.contiguous(), *matrix, bias, residual, out)

    def few(self, x: Tensor) -> Tensor:
        """`linear` by the operator, bfloat16; it dequantises anew for every four tokens."""
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: Tensor = operator(x.contiguous(), self.values, self.group, self.scales)
        return y[:, : self.num_rows]

    def many(self, x: Tensor) -> Tensor:
        """`linear` by the dequantised weight, or one part of its rows after the other."""
        if x.dtype == torch.bfloat16 and not multiplies_bfloat16():  # 60 times as slow as float32
            return self.many(x.float()).to(x.dtype)
        num_parts = -(-self.num_rows * x.size(1) // DEQUANTIZED_AT_ONCE)
        if num_parts <= 1:
            return x @ self.dequantized(x.dtype).T
        rows_at_once = -(-self.num_rows // num_parts // ROWS) * ROWS
        y = x.new_empty(len(x), self.num_rows)
        for start in range(0, self.num_rows, rows_at_once):
            end = min(start + rows_at_once, self.num_rows)
            y[:, start:end] = x @ self._rows(start, end).dequantized(x.dtype).T
        return y

    def _rows(self, start: int, end: int) -> "Int4Weight":
        """Those of a matrix from a multiple of ROWS on."""
        padded = -(-end // ROWS) * ROWS
        return Int4Weight(self.values[start:padded], self.scales[:, start:padded], end - start)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[num_rows, input_size] of one matrix, a view, its memory input after input.

        A code c in the last bits of bfloat16's 128 makes 128 + c.
        """
        block, is_in_halves = layout()
        num_padded, size, group = len(self.values), 2 * self.values.size(1), self.group
        pairs = self.values.view(num_padded // block, size, block // 2).transpose(0, 1)
        scales, zeros = self.scales.permute(2, 0, 1).float().contiguous()
        center, one = torch.full_like(scales[0], 128.0 + ZERO_CODE), torch.ones_like(scales[0])
        weight = torch.empty(size, num_padded, dtype=dtype, device=pairs.device)
        at_once = max(1, CODES_AT_ONCE // (num_padded * group)) * group  # whole groups of inputs
        order = (2, block // 2) if is_in_halves else (block // 2, 2)
        for start in range(0, size, at_once):
            both = pairs[start : start + at_once].to(torch.int16)
            codes = both.new_empty(*both.shape[:2], *order)
            first, second = codes.unbind(2 if is_in_halves else 3)
            torch.bitwise_and(both, 15, out=first)
            torch.bitwise_right_shift(both, 4, out=second)
            numbers = codes.bitwise_or_(0x4300).view(torch.bfloat16).view(len(both), num_padded)
            for inputs in range(0, len(both), group):
                index, part = (start + inputs) // group, slice(inputs, inputs + group)
                how = scales[index], zeros[index], center, one
                _scaled(numbers[part], *how, weight[start:][part])
        return weight.T[: self.num_rows]


def _scaled(
    numbers: Tensor, scale: Tensor, zero: Tensor, center: Tensor, one: Tensor, out: Tensor
) -> None:
    """(numbers - center) * scale + zero, in float32 and rounded once.

    Args:
        numbers: bfloat16 [num_inputs, num_rows]. scale, zero, center, one: float32 [num_rows].
        out: of the numbers' shape, to be filled.
    """
    if out.dtype == numbers.dtype:  # PyTorch's only way to do all that in one pass
        unused = scale.new_empty(0), scale.new_empty(0)
        how = scale, zero, center, one, False, 0.0, 0.0
        torch.native_batch_norm(numbers, *how, out=(out, *unused))
    else:
        out.copy_(torch.addcmul(zero, numbers.float() - center, scale))


@cache
def layout() -> tuple[int, bool]:
    """Which codes share a byte on this machine, found out by packing some.

    Returns:
        Rows of a block, and if byte j of an input holds those of rows j and j + half a block, the
        first in the lower bits; else of rows 2j and 2j + 1.

    Raises:
        ValueError: neither.
    """
    row = torch.arange(ROWS, dtype=torch.int32, device="cpu")[:, None]
    codes = torch.cat((row % LEVELS, row // LEVELS), dim=1)
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    for block in (64, 32, 16):
        blocks = codes.view(-1, block, codes.size(1)).transpose(1, 2)
        for is_in_halves in (True, False):
            first, second = (
                blocks.chunk(2, dim=2) if is_in_halves else (blocks[..., ::2], blocks[..., 1::2])
            )
            if torch.equal((first + LEVELS * second).flatten().to(torch.uint8), found):
                return block, is_in_halves
    raise ValueError(f"quantization='int4': torch {torch.__version__} packs int4 weights otherwise")


def packed(weight: Tensor, groups: Groups) -> Int4Weight | Tensor:
    """A matrix [num_rows, before + input_size + after], or a stack of them, as Int4Weight.

    Returns:
        Where a rank's part begins or ends within 32 inputs, which the operator cannot have: the
        dequantised numbers of the part, as other ranks multiply by theirs.
    """
    if weight.dim() == 2:
        one = _packed(weight, groups)
        if isinstance(one, Int4Weight):
            one = replace(one, values=in_large_pages(one.values))
        return one
    found = [_packed(matrix, groups) for matrix in weight]
    matrices = [matrix for matrix in found if isinstance(matrix, Int4Weight)]
    if not matrices:
        return torch.stack([matrix for matrix in found if isinstance(matrix, Tensor)])
    values, scales = ([getattr(m, name) for m in matrices] for name in ("values", "scales"))
    all_values = in_large_pages(torch.stack(values))
    return Int4Weight(all_values, torch.stack(scales), matrices[0].num_rows)


def _packed(weight: Tensor, groups: Groups) -> Int4Weight | Tensor:
    """packed of one matrix."""
    num_rows, width = weight.shape
    start, stop = groups.before, width - groups.after
    # Of a group that is cut each part has the scale of all of it: to the operator they are groups.
    whole = (s for s in GROUPS if not (groups.size % s or start % s or stop % s))
    step = next(whole, 1)
    values, all_scales = [], []
    rows_at_once = max(ROWS, QUANTIZED_AT_ONCE // width // ROWS * ROWS)
    for rows in weight.split(rows_at_once):
        rows = F.pad(rows.float(), (0, 0, 0, -len(rows) % ROWS))
        grouped = rows.unflatten(1, (-1, groups.size))
        scales = _scales(grouped)
        codes = _codes(grouped, scales).flatten(1)[:, start:stop]
        scales = scales.repeat_interleave(groups.size // step, dim=1)
        scales = scales[:, start // step : stop // step]
        if step == 1:
            values.append((scales[..., 1] + (codes - ZERO_CODE) * scales[..., 0]).to(weight.dtype))
            continue
        codes = codes.to(torch.int32).contiguous()
        values.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        all_scales.append(scales.transpose(0, 1))
    if step == 1:
        return torch.cat(values)[:num_rows].contiguous()
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    return Int4Weight(torch.cat(values), torch.cat(all_scales, dim=1).to(dtype), num_rows)


def _scales(grouped: Tensor) -> Tensor:
    """Scale and zero of each group [..., size]: float32 [..., 2], of numbers that bfloat16 has.

    The levels reach from the least number to the largest. Leaving out the outermost, where that
    lessens the squares of the errors, lessens these by a tenth, but the trained checkpoint's
    answers became no likelier: see docs/benchmarks.md.
    """
    low, high = grouped.aminmax(dim=-1)
    scale = high / (LEVELS - 1) - low / (LEVELS - 1)
    zero = low + ZERO_CODE * scale
    return torch.stack((scale, zero), dim=-1).to(torch.bfloat16).float()


def _codes(grouped: Tensor, scales: Tensor) -> Tensor:
    """The nearest levels, as float32 0 to 15."""
    scale, zero = scales[..., None].unbind(-2)
    steps = (grouped - zero) / scale.masked_fill(scale == 0, 1.0)
    return steps.round_().add_(ZERO_CODE).clamp_(0, LEVELS - 1)


# --- products


def int4_kernel(inputs: LinearInputs, weight: Int4Weight) -> Tensor:
    """The kernel in C, bias and sum within it."""
    out = inputs.residual if inputs.out is None else inputs.out
    y = weight.by_kernel(inputs.normed(), inputs.bias, inputs.residual, out)
    return y if inputs.act is None else inputs.act(y)


def int4_few(inputs: LinearInputs, weight: Int4Weight) -> Tensor:
    """Torch's product of int4 weights."""
    return _int4(inputs, weight.few)


def int4_many(inputs: LinearInputs, weight: Int4Weight) -> Tensor:
    """They are dequantised once, and multiplied as others are."""
    return _int4(inputs, weight.many)


def _int4(inputs: LinearInputs, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    y = multiply(inputs.normed())
    return finished(inputs, y if inputs.bias is None else y.add_(inputs.bias))


def int4_table(weight: Int4Weight) -> ProductTable:
    """As products.product_table, of a layer whose weight is int4."""
    table: ProductTable = {}
    if weight.most_kernel:
        table = {weight.most_kernel: partial(int4_kernel, weight=weight)}
    elif weight.most_few:
        table = {weight.most_few: partial(int4_few, weight=weight)}
    table.setdefault(math.inf, partial(int4_many, weight=weight))
    return table

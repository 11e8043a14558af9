"""Products of int4 weights. Twin: nanovllm.layers.int4."""

from torch import Tensor

from nanovllm.kernels.cpu.build import call, layout, library

# Tokens at a time, whose sums stay in the cache.
MOST_TOKENS = 512


def has_int4() -> bool:
    """True if int4_linear is there, which wants a processor that multiplies pairs of bfloat16."""
    return hasattr(library(), "int4_linear")


LINEAR = layout(
    pointer="x values scales bias residual out scratch",
    long="group_stride",
    integer="num_tokens num_rows num_out num_inputs group_size",
)


def int4_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    num_rows: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + (x @ weight.T + bias). Twin: nanovllm.layers.int4.Int4Weight.linear.

    Args:
        x: bfloat16 [num_tokens, num_inputs], contiguous.
        values: uint8 [num_padded_rows, num_inputs / 2], contiguous, of blocks of 64 rows; in each,
            input after input, a byte has the codes of rows j and j + 32.
        scales: bfloat16 [num_groups, num_padded_rows, 2], rows contiguous.
        bias: bfloat16 [num_rows].
        residual: bfloat16 [num_tokens, num_rows], contiguous.
        out: likewise, is filled; it may be `residual`.
    """
    num_groups, num_padded, _ = scales.shape
    num_tokens, num_inputs = x.shape
    out = x.new_empty(num_tokens, num_rows) if out is None else out
    rows = x, values, out, *(() if residual is None else (residual,))
    assert all(t.is_contiguous() for t in rows) and scales.stride()[1:] == (2, 1)
    sizes = num_padded, num_rows, num_inputs, num_inputs // num_groups
    # Pairs of inputs in another order, and totals of groups.
    scratch = x.new_empty(min(num_tokens, MOST_TOKENS) * (num_inputs + 2 * num_groups))
    for start in range(0, num_tokens, MOST_TOKENS):
        some = slice(start, start + MOST_TOKENS)
        more = None if residual is None else residual[some]
        tensors = x[some], values, scales, bias, more, out[some], scratch
        num = min(num_tokens - start, MOST_TOKENS)
        call("int4_linear", LINEAR, *tensors, scales.stride(0), num, *sizes)
    return out

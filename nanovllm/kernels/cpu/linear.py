"""Linear layers. Twin: nanovllm.layers.products.plain."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.cpu.build import DTYPES, call, layout, library
from nanovllm.utils.memory import in_large_pages


def has_pairs() -> bool:
    """True if the processor multiplies pairs of bfloat16, and kernels are compiled for that."""
    found = library()
    return found is not None and bool(found.linear_has_pairs())


def panels(weight: Tensor, is_gated: bool = False) -> Tensor:
    """A matrix in the order in which `linear` reads it.

    Args:
        weight: [num_rows, num_inputs].
        is_gated: gate over up. A panel has rows of both, so that each program finds a row's two.

    Returns:
        [num_panels, num_inputs, rows of a panel], the last panel filled with zeros. Of bfloat16 the
        order within a panel is another: pair of inputs after pair, each row's two side by side.
    """
    found = library()
    assert found is not None
    num_parts = 2 if is_gated else 1
    rows = found.linear_rows() // num_parts
    parts = weight.unflatten(0, (num_parts, -1))
    if num_missing := -parts.size(1) % rows:
        parts = F.pad(parts, (0, 0, 0, num_missing))
    ordered = parts.unflatten(1, (-1, rows)).transpose(0, 1).flatten(1, 2)
    if weight.dtype == torch.bfloat16:  # copied two at a time
        ordered = ordered.view(torch.int32)
    ordered = in_large_pages(ordered.transpose(1, 2))
    return ordered.view(weight.dtype).view(len(ordered), weight.size(1), -1)


LINEAR = layout(
    pointer="x panels bias norm_weight residual normed out",
    real="eps",
    integer="num_tokens num_out num_inputs is_gated dtype",
)


def linear(
    x: Tensor,
    panels: Tensor,
    num_out: int,
    is_gated: bool = False,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + (norm(x) @ weight.T + bias), or SiLU(gate) * up of that, rounded once.

    Twin: nanovllm.layers.products.plain.

    Args:
        x: [num_tokens, num_inputs], num_inputs a multiple of ROW_STEP.
        panels: from the function of that name, in x's dtype.
        num_out: columns of the output.
        bias: [num_out], of a gated layer [2 * num_out].
        norm_weight: [num_inputs], of the norm that x goes through; eps: its.
        residual: [num_tokens, num_out], contiguous.
        out: likewise, is filled; it may be `residual`.
    """
    x = x.contiguous()
    num_tokens, num_inputs = x.shape
    out = x.new_empty(num_tokens, num_out) if out is None else out
    normed = None if norm_weight is None else torch.empty_like(x)
    tensors = x, panels, bias, norm_weight, residual, normed, out
    assert all(t.is_contiguous() and t.dtype == x.dtype for t in tensors if t is not None)
    assert panels.size(1) == num_inputs
    sizes = num_tokens, num_out, num_inputs, is_gated, DTYPES[x.dtype]
    call("linear", LINEAR, *tensors, eps, *sizes)
    return out

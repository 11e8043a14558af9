"""The kernels for FP8 weights, against float64 of what the numbers stand for.

On a GPU as they are; without one `test_kernels.test_interpreted` runs this file too, in float16.
"""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    EPS,
    INTERPRETED,
    guarded,
    randn,
    runs_kernels,
    runs_on_hopper,
)
from torch import Tensor

from nanovllm import kernels
from nanovllm.layers import fp8
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm, rms_norm
from nanovllm.layers.linear import GatedLinear, Linear
from nanovllm.layers.moe import MoE
from nanovllm.layers.products import LinearInputs, ProductTable, first_sizes
from nanovllm.model_config import Experts, Quantization
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.quantization import E4M3, E4M3_MAX, Fp8Rows, Fp8Weight

pytest.importorskip("triton")

__all__ = ["guarded"]  # a fixture
Block = tuple[int, int]
HALF_DTYPES = [dtype for dtype in DTYPES if dtype.itemsize == 2]
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda dtype: str(dtype)[6:])
# The interpreter's, of NaN.
ignores_nan = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Of a number, and as much of the numbers' size: what is rounded on the way is rounded to the dtype.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# As much more of the numbers' size where both factors are FP8: a Hopper GPU's tensor cores keep
# about 13 bits of the sum of such products.
FP8_SUMS = 4e-3 if CUDA else 0.0


def assert_near(out: Tensor, exact: Tensor, factor: float = 1, sums: float = 0.0) -> None:
    """Each number is, as near as rounding on the way lets it be.

    Args:
        out, exact: [tokens, size]; a token's numbers are of one size.
        factor: for a longer way.
        sums: what the sums may err, of that size.
    """
    assert out.shape == exact.shape
    size = exact.square().mean(-1, keepdim=True).sqrt() + 1e-30
    errors = (out.double() - exact).abs()
    errors /= factor * (TOLERANCE[out.dtype] * (exact.abs() + size) + sums * size)
    assert errors.isfinite().all()
    assert errors.max() < 1, errors.max()


def fp8_weight(*shape: int, block: Block = (128, 128)) -> Fp8Weight:
    """Some numbers are the largest; of several blocks one is zeros, another has a scale of 0."""
    values = (100 * randn(*shape)).clamp_(-E4M3_MAX, E4M3_MAX)
    largest = torch.rand(shape, device=DEVICE)
    values[largest < 0.01] = E4M3_MAX
    values[largest < 0.005] = -E4M3_MAX
    num_blocks = *shape[:-2], shape[-2] // block[0], shape[-1] // block[1]
    scales = (0.5 + torch.rand(num_blocks, device=DEVICE)) / (100 * shape[-1] ** 0.5)
    if min(num_blocks[-2:]) > 1 or max(num_blocks[-2:]) > 2:
        values[..., : block[0], : block[1]] = 0
        scales[..., -1, -1] = 0
    return Fp8Weight(values.to(E4M3), scales)


def exact_weight(weight: Tensor | Fp8Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.double()
    rows, inputs = weight.block
    scales = weight.scales.double().repeat_interleave(rows, -2).repeat_interleave(inputs, -1)
    return weight.values.double() * scales


def exact_rows(rows: Fp8Rows) -> Tensor:
    scales = rows.scales.double().T.repeat_interleave(128, 1)
    return (rows.values.double() * scales)[: len(rows)]


def fp8_rows(num_tokens: int, size: int, dtype: torch.dtype, step: int = 1) -> Fp8Rows:
    """Of some tokens, one of them zeros, one large; behind them NaN."""
    x = randn(num_tokens, size, dtype=dtype)
    x[num_tokens // 3] *= 8
    x[num_tokens // 2, : 64 if num_tokens == 1 else size] = 0
    quantized = fp8.quantize_rows(x)
    rows = Fp8Rows.empty(num_tokens, size, step, x)
    rows.values.view(torch.uint8).fill_(0x7F)
    rows.scales.fill_(math.nan)
    rows.values[:num_tokens] = quantized.values
    rows.scales[:, :num_tokens] = quantized.scales
    return rows


@pytest.fixture(autouse=True)
def _exact_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter converts from and to e4m3 as a GPU does.

    By itself it loses a carry (127.9 becomes 64), rounds what is halfway up, and has no NaN.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    floats = {tl.float32: torch.float32, tl.float16: torch.float16}

    def converted(x: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float8e4nv and target in floats:
            values = torch.from_numpy(x.copy()).view(E4M3).to(floats[target])
            return values.numpy().reshape(x.shape)
        if target == tl.float8e4nv and source in floats:
            values = torch.from_numpy(x.copy()).to(E4M3)
            return values.view(torch.uint8).numpy().reshape(x.shape)
        return convert(x, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


# ---- quantising tokens


def assert_quantized(rows: Fp8Rows, x: Tensor, num_rows: int) -> None:
    """Each 128 numbers have their largest's scale, and are the nearest of e4m3.

    A GPU divides with an error of two of float32's last bits, which may turn what is halfway.
    """
    num_tokens, size = x.shape
    assert (len(rows), rows.dtype) == (num_tokens, x.dtype)
    assert rows.values.shape == (num_rows, size)
    assert rows.scales.shape == (size // 128, num_rows)
    expected = fp8.quantize_rows(x)
    values, scales = rows.values[:num_tokens], rows.scales[:, :num_tokens]
    if not CUDA:
        assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(scales, expected.scales)
        return
    torch.testing.assert_close(scales, expected.scales, rtol=5e-7, atol=0)
    divisors = scales.double().where(scales > 0, 1.0).T.repeat_interleave(128, 1)
    exact = x.double() / divisors
    step = 2.0 ** (exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((values.double() - exact).abs() <= step / 2 + 1e-6 * exact.abs()).all()


def edges(num_tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Groups of zeros, of the dtype's largest and small numbers, of carries and halves."""
    x = randn(num_tokens, size, dtype=dtype)
    x *= 2.0 ** torch.randint(-6, 7, (num_tokens, size), device=DEVICE)
    x[0] = 0
    groups = x.unflatten(1, (-1, 128))
    if num_tokens > 1:
        groups[1, ::2] = 0
        groups[1, 1::2, 5] = torch.finfo(dtype).max
        groups[-1, 0, 0] = 448  # so that the scale is 1
        groups[-1, 0, 1:] = torch.arange(127, device=DEVICE) * 0.125 + 112.0625
    return x


QUANTIZED = [(1, 128), (1, 4096), (3, 384), (16, 1792), (17, 640)] + (
    [(200, 4096), (257, 12_288), (1000, 25_600)] if CUDA else []
)


@runs_kernels
@half_dtypes
@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize(("num_tokens", "size"), QUANTIZED)
def test_rows_are_quantised(num_tokens: int, size: int, step: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels.fp8_rows import quantize_rows

    num_rows = -(-num_tokens // step) * step
    x = edges(num_tokens, size, dtype)
    assert_quantized(quantize_rows(x, step=step), x, num_rows)


@runs_kernels
@half_dtypes
@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize(("num_tokens", "size"), QUANTIZED)
def test_rows_are_quantised_after_their_norm(
    num_tokens: int, size: int, step: int, dtype: torch.dtype
) -> None:
    """What the norm gives may differ in its last bits, and then by a step of e4m3."""
    from nanovllm.kernels.fp8_rows import quantize_rows

    x, norm_weight = randn(num_tokens, size, dtype=dtype), 1 + randn(size, dtype=dtype) / 4
    x[0] *= 1e-3  # where eps counts
    rows = quantize_rows(x, norm_weight, EPS, step)
    assert len(rows.values) == -(-num_tokens // step) * step
    normed = rms_norm(x, norm_weight, EPS)
    expected = fp8.quantize_rows(normed)
    last_bit = torch.finfo(dtype).eps
    scales = rows.scales[:, :num_tokens]
    torch.testing.assert_close(scales, expected.scales, rtol=2.2 * last_bit, atol=0)
    steps = scales.T.repeat_interleave(128, 1) * 2.0**-9  # between the smallest numbers
    exact = normed.double()
    most = (exact.abs() / 16).maximum(steps / 2) + 3 * last_bit * exact.abs()
    assert ((exact_rows(rows) - exact).abs() <= most).all()
    is_other = rows.values[:num_tokens].float() != expected.values.float()
    assert is_other.float().mean() < 0.02 + 16 * last_bit


@runs_kernels
@half_dtypes
@ignores_nan
@pytest.mark.parametrize("num_behind", [0, 15])
@pytest.mark.parametrize(("num_tokens", "size"), QUANTIZED)
def test_what_a_gated_layer_gives_is_quantised(
    num_tokens: int, size: int, num_behind: int, dtype: torch.dtype
) -> None:
    from nanovllm.kernels.fp8_rows import silu_and_quantize
    from nanovllm.kernels.fused import silu_and_mul as own_silu_and_mul

    gate_up = randn(num_tokens + num_behind, 2 * size, dtype=dtype) * 3
    gate_up[num_tokens:] = math.nan
    gate_up[0] = 0
    gate_up[:, 40:50] *= 64
    rows = silu_and_quantize(gate_up, num_tokens)
    y = own_silu_and_mul(gate_up[:num_tokens].contiguous())
    assert_quantized(rows, y, num_tokens + num_behind)


# ---- linear layers

# Outputs, inputs, and what shares a scale. 14 and 5 groups of inputs no two parts divide evenly.
SHAPES = [(128, 256, (128, 128)), (64, 1792, (64, 128))]
if CUDA:
    SHAPES += [(192, 640, (64, 128)), (64, 12_288, (64, 128)), (1024, 3072, (128, 128))]
    SHAPES += [(6144, 4096, (128, 128))]
fp8_shapes = pytest.mark.parametrize(
    ("outputs", "inputs", "block"), SHAPES, ids=lambda size: str(size).replace(" ", "")
)


def check_product(
    product: Callable[..., Tensor],
    x: Tensor,
    shape: tuple[int, int],
    block: Block,
    dtype: torch.dtype,
    sums: float = 0.0,
) -> None:
    """Of a layer of (outputs, inputs): with nothing, bias, residual, into `out`, and gated.

    Args:
        product: of weight, bias, residual, gated, out, scales.
        x: exact, what it multiplies.
        sums: as of assert_near.
    """
    near = partial(assert_near, sums=sums)
    (outputs, _), num_tokens = shape, len(x)
    weight, bias = fp8_weight(*shape, block=block), randn(outputs, dtype=dtype)
    run = partial(product, weight.values, scales=weight.scales)
    residual = 4 * randn(num_tokens, outputs, dtype=dtype)
    exact = x @ exact_weight(weight).T
    out = torch.full_like(residual, math.nan)
    assert run(bias=bias, residual=residual, out=out) is out
    near(out, exact + bias.double() + residual.double())
    near(run(), exact)
    expected = residual.double() + exact
    assert run(residual=residual, out=residual) is residual  # in place
    near(residual, expected)
    gate_up = fp8_weight(2 * outputs, shape[1], block=block)
    run = partial(product, gate_up.values, scales=gate_up.scales)
    out.fill_(math.nan)
    run(gated=True, out=out)
    near(out, silu_and_mul(x @ exact_weight(gate_up).T))


@runs_kernels
@half_dtypes
@fp8_shapes
@pytest.mark.parametrize(
    ("num_tokens", "has_norm"), [(1, False), (2, True)] + ([(1, True), (2, False)] if CUDA else [])
)
def test_matvec(
    num_tokens: int,
    has_norm: bool,
    outputs: int,
    inputs: int,
    block: Block,
    dtype: torch.dtype,
) -> None:
    from nanovllm.kernels.gemv import matvec

    x, gain = randn(num_tokens, inputs, dtype=dtype), 1 + randn(inputs, dtype=dtype) / 4
    normed = rms_norm(x, gain, EPS) if has_norm else x
    norm = {"norm_weight": gain, "eps": EPS} if has_norm else {}
    product = partial(matvec, x, **norm)
    check_product(product, normed.double(), (outputs, inputs), block, dtype)


def counted(x: Tensor | Fp8Rows, outputs: int) -> tuple[Callable[..., Tensor], Tensor]:
    """small_linear of x, and the counters that it is given."""
    from nanovllm.kernels.small_linear import small_linear, small_linear_counters

    counters = small_linear_counters(2 * outputs, DEVICE)
    return partial(small_linear, x, counters=counters), counters


@runs_kernels
@half_dtypes
@fp8_shapes
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16] if CUDA else [1, 16])
def test_small_linear_of_up_to_16_tokens_rounds_none_of_them(
    num_tokens: int, outputs: int, inputs: int, block: Block, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, inputs, dtype=dtype)
    product, counters = counted(x, outputs)
    check_product(product, x.double(), (outputs, inputs), block, dtype)
    assert not counters.any()


# Token counts, outputs, inputs, what shares a scale, and whether tiles come by descriptors: tiles
# of 64 and of 128 tokens, and of 32 to 128 outputs; inputs in one part and, of 25 groups, in two.
FP8_LAYERS = [
    (num_tokens, 64, 256, (64, 128), num_tokens != 128) for num_tokens in (1, 65, 128, 129)
]
FP8_LAYERS += [(64, 64, 3200, (64, 128), True)]
if CUDA:
    FP8_LAYERS += [
        (num_tokens, *shape, tma)
        for tma in (True, False)
        for num_tokens in (1, 2, 16, 17, 64, 65, 128, 129, 200, 256, 257, 3000)
        for shape in SHAPES[1:]
    ]


@runs_kernels
@half_dtypes
@ignores_nan
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("num_tokens", "outputs", "inputs", "block", "tma"), FP8_LAYERS)
def test_small_linear_of_fp8_tokens(
    num_tokens: int,
    outputs: int,
    inputs: int,
    block: Block,
    tma: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever rows of garbage lie behind them, within a tile and without."""
    from nanovllm.kernels import small_linear

    if not small_linear.has_tma(DEVICE) and tma:
        pytest.skip("needs sm_90")
    monkeypatch.setattr(small_linear, "has_tma", lambda _: tma)
    step = 16 if num_tokens % 2 else 1
    rows = fp8_rows(num_tokens, inputs, dtype, step)
    product, counters = counted(rows, outputs)
    check_product(product, exact_rows(rows), (outputs, inputs), block, dtype, FP8_SUMS)
    assert not counters.any()


@runs_kernels
@half_dtypes
@ignores_nan
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("num_parts", "tma"), [(2, True), (4, False), (4, True)])
def test_inputs_in_parts_that_do_not_divide_them(
    tma: bool, num_parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 groups of 128: of four parts the last has two."""
    from nanovllm.kernels import small_linear

    if not small_linear.has_tma(DEVICE) and tma:
        pytest.skip("needs sm_90")
    plans = small_linear.fp8_rows_plan, small_linear.fp8_small_linear_plan

    def replaced(plan: Callable[..., Any], *args: Any) -> Any:
        return plan(*args)._replace(num_parts=num_parts, tma=tma)

    monkeypatch.setattr(small_linear, "fp8_rows_plan", partial(replaced, plans[0]))
    monkeypatch.setattr(small_linear, "fp8_small_linear_plan", partial(replaced, plans[1]))
    weight = fp8_weight(64, 14 * 128, block=(64, 128))
    for x in (randn(16, 14 * 128, dtype=dtype), fp8_rows(33, 14 * 128, dtype, 16)):
        product, counters = counted(x, 64)
        exact = exact_rows(x) if isinstance(x, Fp8Rows) else x.double()
        for _ in range(2):  # a launch leaves the counters ready for the next
            out = product(weight.values, scales=weight.scales)
            assert_near(out, exact @ exact_weight(weight).T, sums=FP8_SUMS)
        assert not counters.any()


@runs_kernels
@half_dtypes
def test_fp8_weights_round_where_16_bit_ones_do(dtype: torch.dtype) -> None:
    """After the matrix product, before what follows: else 2049 * 1 + 1 would be 2050."""
    from nanovllm.kernels.gemv import matvec

    most = 2 / torch.finfo(dtype).eps  # from there on every other integer
    x = torch.ones(2, 128, dtype=dtype, device=DEVICE)
    weight = fp8_weight(64, 128, block=(64, 128))
    weight.values.copy_(torch.zeros(64, 128))
    weight.scales.fill_(1.0)
    values = weight.values.float()
    values[:, :2] = torch.tensor([most / 8 if most < 2048 else 256, 1.0])
    x[:, 0] = most / float(values[0, 0])
    weight.values.copy_(values)
    residual = torch.ones(2, 64, dtype=dtype, device=DEVICE)
    expected = F.linear(x, exact_weight(weight).to(dtype)) + residual
    small, _ = counted(x, 64)
    for product in (partial(matvec, x), small):
        out = product(weight.values, residual=residual, scales=weight.scales)
        assert torch.equal(out, expected)


def product_inputs(x: Tensor | Fp8Rows, weight: Fp8Weight, **given: Any) -> LinearInputs:
    nothing = dict.fromkeys(LinearInputs._fields)
    return LinearInputs(**nothing | {"x": x, "weight": weight.values} | given)


@runs_on_hopper
@half_dtypes
@pytest.mark.parametrize("num_tokens", [1, 129, 257, 1000, 4096])
@pytest.mark.parametrize("shape", [(1024, 512), (6144, 4096), (4096, 12_288)], ids=str)
def test_the_product_of_torch(shape: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> None:
    """Also of tokens that 16 does not divide: behind them there is garbage."""
    from nanovllm.kernels.fp8_rows import quantize_rows

    weight, gate_up = fp8_weight(*shape), fp8_weight(2 * shape[1], shape[0])
    if not fp8._has_torch_fp8(weight):
        pytest.skip("needs CUDA 12.9")
    near = partial(assert_near, sums=FP8_SUMS)
    outputs, inputs = shape
    product = partial(fp8.torch_fp8, scales=weight.scales)
    rows, bias = fp8_rows(num_tokens, inputs, dtype, 16), randn(outputs, dtype=dtype)
    residual = 4 * randn(num_tokens, outputs, dtype=dtype)
    exact = exact_rows(rows) @ exact_weight(weight).T
    given = product_inputs(rows, weight)
    near(product(given), exact)
    out = torch.full_like(residual, math.nan)
    assert product(given._replace(out=out)) is out
    near(out, exact)
    out.fill_(math.nan)
    assert product(given._replace(out=out, bias=bias, residual=residual)) is out
    near(out, exact + bias.double() + residual.double())
    own = fp8.own_fp8(given, weight.scales, torch.zeros(1 << 16, dtype=torch.int32, device=DEVICE))
    near(product(given), own.double())
    expected = residual.double() + exact
    assert product(given._replace(residual=residual)) is residual
    near(residual, expected)
    # A gated layer before it.
    norm = RMSNorm(outputs, EPS, device=DEVICE, dtype=dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = randn(num_tokens, outputs, dtype=dtype)
    given = product_inputs(x, gate_up, norm=norm, act=silu_and_mul)
    between = fp8.torch_fp8(given, gate_up.scales)
    assert isinstance(between, Fp8Rows)
    assert (len(between), between.dtype) == (num_tokens, dtype)
    normed = exact_rows(quantize_rows(x, norm.weight, EPS))
    exact = silu_and_mul(normed @ exact_weight(gate_up).T)
    size = exact.unflatten(1, (-1, 128)).abs().amax(-1).repeat_interleave(128, 1)
    errors = (exact_rows(between) - exact).abs()
    factor = 1 / 16 + 4 * TOLERANCE[dtype]
    assert (errors <= factor * exact.abs() + (2.0**-10 / 448 + TOLERANCE[dtype]) * size).all()
    exact = exact_rows(between) @ exact_weight(weight).T
    near(product(product_inputs(between, weight)), exact)


def test_a_16_bit_layer_takes_what_a_gated_one_of_fp8_gives() -> None:
    """Of an MLP gate and up may be FP8, and down too small for it."""
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, layer = fp8.quantize_rows(x), Linear(256, 64, dtype=torch.bfloat16)
    layer.weight.data.normal_()
    assert torch.equal(layer(rows), layer(exact_rows(rows).bfloat16()))


# ---- experts

# Experts' intermediate size, and what shares a scale of gate and up, and of down; None: 16 bits.
EXPERTS = [
    (128, ((128, 128), (128, 128))),
    (192, ((64, 128), (128, 64))),
    (96, (None, (128, 32))),
]
NUM_EXPERTS, NUM_CHOSEN, HIDDEN_SIZE = 4, 2, 512 if CUDA else 128
# 16, 64 and 128 tokens are the most of a size of tile, or of two tiles.
MOE_TOKENS = [1, 2, 16, 17, 64, 65, 128, 129, 200, 256, 257]
if CUDA:
    MOE_CASES = [
        (*experts, num_tokens, routing)
        for experts in EXPERTS
        for num_tokens in MOE_TOKENS
        for routing in ("random", "one expert")
    ]
else:
    MOE_CASES = [(*EXPERTS[0], 17, "random"), (*EXPERTS[0], 65, "one expert")]
    MOE_CASES += [(*EXPERTS[0], 129, "random"), (*EXPERTS[1], 17, "random")]
    MOE_CASES += [(*EXPERTS[1], 129, "random"), (*EXPERTS[2], 65, "random")]


def expert_weight(*shape: int, block: Block | None, dtype: torch.dtype) -> Tensor | Fp8Weight:
    if block is not None:
        return fp8_weight(NUM_EXPERTS, *shape, block=block)
    return randn(NUM_EXPERTS, *shape, dtype=dtype) / shape[-1] ** 0.5


def spoil(weight: Tensor | Fp8Weight, experts: Tensor) -> None:
    """Those experts hold nothing but NaN."""
    if isinstance(weight, Tensor):
        weight[experts] = math.nan
    else:
        weight.values.view(torch.uint8)[experts] = 0x7F
        weight.scales[experts] = math.nan


def products_of_pairs(x: Tensor, weight: Tensor | Fp8Weight, chosen: Tensor) -> Tensor:
    """Exact: each (token, choice) pair's row of x times its expert's matrix."""
    matrices = exact_weight(weight)
    out = x.new_empty(len(x), matrices.size(1))
    for expert, matrix in enumerate(matrices):
        own = chosen.flatten() == expert
        out[own] = x[own] @ matrix.T
    return out


def logits_for(num_tokens: int, routing: str, dtype: torch.dtype) -> Tensor:
    """Nobody chooses the third expert."""
    logits = randn(num_tokens, NUM_EXPERTS, dtype=dtype)
    logits[:, 2] = -30
    if routing == "one expert":  # by all, and the first as the other one
        logits[:, 3] = 20
        logits[:, 0] = 10
    return logits


@runs_kernels
@half_dtypes
@ignores_nan
@pytest.mark.parametrize(("size", "blocks", "num_tokens", "routing"), MOE_CASES, ids=str)
def test_grouped_experts(
    size: int,
    blocks: tuple[Block | None, Block],
    num_tokens: int,
    routing: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In large tiles tokens are FP8 where 128 inputs share a scale: then those are multiplied."""
    from nanovllm.kernels import moe

    given: list[tuple[Tensor, Fp8Rows]] = []
    quantize_rows = moe.quantize_rows

    def recorded(x: Tensor) -> Fp8Rows:
        given.append((x.clone(), quantize_rows(x)))
        return given[-1][1]

    monkeypatch.setattr(moe, "quantize_rows", recorded)
    gate_up = expert_weight(2 * size, HIDDEN_SIZE, block=blocks[0], dtype=dtype)
    down = expert_weight(HIDDEN_SIZE, size, block=blocks[1], dtype=dtype)
    logits = logits_for(num_tokens, routing, dtype)
    weights, chosen = moe.route(logits, NUM_CHOSEN, True)  # of equals it takes the same again
    unused = torch.ones(NUM_EXPERTS, dtype=torch.bool, device=DEVICE)
    unused[chosen.flatten().long()] = False
    for weight in (gate_up, down):
        spoil(weight, unused)
    x, residual = (randn(num_tokens, HIDDEN_SIZE, dtype=dtype) for _ in range(2))
    out = torch.full_like(x, math.nan)
    args = x, gate_up, down, logits, NUM_CHOSEN, True
    assert moe.grouped_experts(*args, residual, out) is out

    is_large = moe.token_tile(num_tokens * NUM_CHOSEN, NUM_EXPERTS) >= 64
    are_fp8 = [is_large and block is not None and block[1] == 128 for block in blocks]
    assert len(given) == sum(are_fp8)
    rows = iter(given)
    exact = exact_rows(next(rows)[1]) if are_fp8[0] else x.double()
    exact = exact.repeat_interleave(NUM_CHOSEN, 0)
    exact = silu_and_mul(products_of_pairs(exact, gate_up, chosen))
    for y, quantized in rows:
        assert_near(y, exact, factor=2)
        exact = exact_rows(quantized)
    parts = products_of_pairs(exact, down, chosen).unflatten(0, (num_tokens, NUM_CHOSEN))
    expected = (parts * weights.double()[..., None]).sum(1)
    assert_near(out, residual.double() + expected, factor=3)
    if CUDA or num_tokens == 17:
        assert_near(moe.grouped_experts(*args, None), expected, factor=3)


@runs_kernels
@half_dtypes
@ignores_nan
@pytest.mark.parametrize("num_tokens", [1, 4] if CUDA else [1])
@pytest.mark.parametrize(("size", "blocks"), EXPERTS, ids=str)
def test_few_tokens_experts(
    size: int,
    blocks: tuple[Block | None, Block],
    num_tokens: int,
    dtype: torch.dtype,
) -> None:
    from nanovllm.kernels import moe

    gate_up = expert_weight(2 * size, HIDDEN_SIZE, block=blocks[0], dtype=dtype)
    down = expert_weight(HIDDEN_SIZE, size, block=blocks[1], dtype=dtype)
    routed = moe.route(logits_for(num_tokens, "random", dtype), NUM_CHOSEN, True)
    weights, chosen = routed
    unused = torch.ones(NUM_EXPERTS, dtype=torch.bool, device=DEVICE)
    unused[chosen.flatten().long()] = False
    for weight in (gate_up, down):
        spoil(weight, unused)
    x, gain = randn(num_tokens, HIDDEN_SIZE, dtype=dtype), randn(HIDDEN_SIZE, dtype=dtype)
    exact = rms_norm(x, gain, EPS).double().repeat_interleave(NUM_CHOSEN, 0)
    exact = silu_and_mul(products_of_pairs(exact, gate_up, chosen))
    parts = products_of_pairs(exact, down, chosen).unflatten(0, (num_tokens, NUM_CHOSEN))
    exact = (parts * weights.double()[..., None]).sum(1)
    out = torch.full_like(x, math.nan)
    assert moe.few_tokens_experts(x, gain, EPS, gate_up, down, *routed, x, out) is out
    assert_near(out, x.double() + exact, factor=3)
    if CUDA:
        out = moe.few_tokens_experts(x, gain, EPS, gate_up, down, *routed, None)
        assert_near(out, exact, factor=3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_outputs_past_32_bits() -> None:
    """More than 2^31 of them: the last ones are where they belong."""
    from nanovllm.kernels.small_linear import small_linear

    num_tokens, weight = 90_000, fp8_weight(24_576, 128)
    assert num_tokens * 24_576 > 2**31
    rows = fp8_rows(num_tokens, 128, torch.bfloat16)
    out = small_linear(rows, weight.values, scales=weight.scales)
    for part in (slice(0, 9), slice(num_tokens - 9, num_tokens)):
        assert_near(out[part], exact_rows(rows)[part] @ exact_weight(weight).T)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("num_tokens", [1, 3, 70, 5000])
def test_experts_past_32_bits(num_tokens: int) -> None:
    """More than 2^31 elements of weights, the last experts chosen."""
    from nanovllm.kernels import moe

    num_experts, hidden_size, size = 1400, 2048, 768
    shapes = (num_experts, 2 * size, hidden_size), (num_experts, hidden_size, size)
    stacks = [Fp8Weight.empty(*shape, row_step=128, device=DEVICE) for shape in shapes]
    assert all(stack.values.numel() > 2**31 for stack in stacks)
    last = [fp8_weight(4, *shape[1:]) for shape in shapes]
    for stack, part in zip(stacks, last, strict=True):
        stack.values.view(torch.uint8).fill_(0x7F)
        stack.scales.fill_(math.nan)
        stack.values[-4:], stack.scales[-4:] = part
    x, residual = (randn(num_tokens, hidden_size, dtype=torch.bfloat16) for _ in range(2))
    logits = torch.full((num_tokens, num_experts), -30.0, device=DEVICE, dtype=torch.bfloat16)
    logits[:, -4:] = randn(num_tokens, 4, dtype=torch.bfloat16)
    out = moe.grouped_experts(x, *stacks, logits, 2, True, residual)
    # The same kernels, of the last ones alone. Of fewer experts each has larger tiles.
    few = max(1, num_tokens * 4 // num_experts)
    for rows in range(0, num_tokens, few):
        part = slice(rows, rows + few)
        alone = moe.grouped_experts(x[part], *last, logits[part, -4:].contiguous(), 2, True, None)
        assert_near(out[part], residual[part].double() + alone.double())
        if rows >= 20:
            break
    if num_tokens <= 3:
        gain = randn(hidden_size, dtype=torch.bfloat16)
        routed = moe.route(logits, 2, True)
        out = moe.few_tokens_experts(x, gain, EPS, *stacks, *routed, None)
        own = routed[0], routed[1] - (num_experts - 4)
        alone = moe.few_tokens_experts(x, gain, EPS, *last, *own, None)
        assert torch.equal(out, alone)


# ---- which product when


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as an H100 with CUDA 12.9 has them, for weights that lie elsewhere."""
    from nanovllm.kernels import device

    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda *_: True)
    monkeypatch.setattr(device, "is_hopper", lambda _: True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")


META = torch.device("meta")
FEW, MANY = {1: "few_tokens", 16: "converted", 64: "own_fp8", 128: "own_fp8"}, "torch_fp8"


def names(table: ProductTable) -> dict[float, str]:
    assert list(table) == sorted(table)
    return {most: getattr(p, "func", p).__name__ for most, p in table.items()}


def table_of(
    *shape: int, row_step: int = 128, dtype: torch.dtype = torch.bfloat16, **kind: bool
) -> dict[float, str]:
    weight = Fp8Weight.empty(*shape, row_step=row_step, device=META)
    return names(fp8.fp8_table(weight, dtype, **kind))


@pytest.mark.usefixtures("hopper")
def test_many_tokens_are_multiplied_by_torch_on_hopper() -> None:
    narrow, wide = FEW | {256: "own_fp8", math.inf: MANY}, FEW | {math.inf: MANY}
    assert table_of(4096, 12_288) == table_of(6144 - 128, 4096) == narrow
    assert table_of(6144, 4096) == table_of(24_576, 4096, is_gated=True) == wide
    assert table_of(4096, 4096, has_bias=True) == narrow


@pytest.mark.usefixtures("hopper")
def test_elsewhere_they_are_multiplied_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.kernels import device

    own = FEW | {math.inf: "own_fp8"}
    assert table_of(6144, 4096 + 128) == own  # scales that torch wants in fours
    assert table_of(6144, 4096, row_step=64) == own
    assert table_of(6144, 4096, dtype=torch.float16) == own  # which torch's was not tried with
    for version in ("12.8", None):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "cuda", version)
            assert table_of(6144, 4096) == own
    monkeypatch.setattr(device, "is_hopper", lambda _: False)
    assert table_of(6144, 4096) == table_of(24_576, 4096, is_gated=True) == own


@pytest.mark.usefixtures("hopper")
def test_what_no_kernel_does_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {math.inf: "dequantized"}
    assert table_of(24_576, 4096, is_gated=True, has_bias=True) == alone
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda *_: False)
    assert table_of(6144, 4096) == table_of(24_576, 4096, is_gated=True) == alone


@pytest.mark.usefixtures("hopper")
def test_a_weight_is_kept_where_there_are_kernels_and_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_kept(
        *shape: int, block: Block = (128, 128), dtype: torch.dtype = torch.bfloat16
    ) -> bool:
        return fp8.is_kept(shape, block, dtype, META)

    assert is_kept(4096, 4096)
    assert is_kept(4096, 4096, dtype=torch.float16)
    assert not is_kept(4096, 4096, dtype=torch.float32)
    assert not is_kept(6144, 1024)  # small
    assert is_kept(6272, 1024)
    assert is_kept(4, 6144, 1024)  # of a stack no matrix is small
    for block in ((32, 128), (96, 128), (128, 64), (1, 1)):
        assert not is_kept(4096, 4096, block=block)
    assert is_kept(4096, 4096, block=(64, 128))
    assert is_kept(4, 96, 4096, block=(64, 32))
    assert not is_kept(4, 96, 4096, block=(32, 32))
    assert not is_kept(4, 96, 4096, block=(64, 16))
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda *_: False)
    assert not is_kept(4096, 4096)


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_gpus_that_multiply_fp8(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm.kernels import device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(device, "has_fp8", device.has_fp8.__wrapped__)  # which remembers nothing
    assert kernels.multiplies_fp8(torch.device("cuda")) == has
    assert not kernels.multiplies_fp8(torch.device("cpu"))


# ---- what is compiled before it is needed


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What has been launched, as far as each is compiled by itself. Nothing runs."""
    from nanovllm.kernels import fp8_rows, fused, gemv, moe, small_linear
    from nanovllm.kernels.launch import _kind

    found: set[Any] = set()

    def record(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
        free = {p.name for p in kernel.params if p.do_not_specialize}
        named = zip(kernel.arg_names, args, strict=False)
        kinds = (type(value) if name in free else _kind(value) for name, value in named)
        found.add((kernel.__name__, *kinds, *options.items()))

    for module in (fp8_rows, fused, gemv, moe, small_linear):
        monkeypatch.setattr(module, "launch", record)
    return found


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("row_step", [64, 128])
def test_the_outputs_of_a_tile_share_their_scales(
    row_step: int, gated: bool, launched: set[Any]
) -> None:
    from nanovllm.kernels.small_linear import small_linear

    weight = Fp8Weight.empty(2 * 4160, 512, row_step=row_step, device=META)
    x = torch.empty(16, 512, dtype=torch.bfloat16, device=META)
    tokens = [x, *(Fp8Rows.empty(num_tokens, 512, 1, x) for num_tokens in (1, 17, 65, 129, 999))]
    for own in tokens:
        small_linear(own, weight.values, gated=gated, scales=weight.scales)
    assert len(launched) >= 3
    for _, *arguments in launched:
        options = dict(pair for pair in arguments if isinstance(pair, tuple) and len(pair) == 2)
        assert options["SCALED_ROWS"] == row_step
        assert row_step % options["BLOCK_N"] == 0


def fake_scaled_mm(x: Tensor, weight: Tensor, *_: Any, output_dtype: torch.dtype) -> Tensor:
    return x.new_empty(len(x), weight.size(1), dtype=output_dtype)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("has_torch", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(6144, 4096), (4096, 4096), (4096, 12_288), (12_288, 4096), (2560, 9728), (2048, 6144),
     (6272, 1024), (1792, 3584), (151_936, 4096)],
)  # fmt: skip
def test_the_first_sizes_of_a_layer_launch_all_that_it_ever_does(
    outputs: int,
    inputs: int,
    has_torch: bool,
    launched: set[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what a gated layer before it gives, gated itself, with a bias, and without all of it."""
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm)
    monkeypatch.setattr(torch.version, "cuda", "12.9" if has_torch else "12.8")
    options = {"device": META, "dtype": torch.bfloat16}
    up, down = (GatedLinear(outputs, inputs, **options), Linear(inputs, outputs, **options))
    biased = Linear(inputs, outputs, bias=True, **options)
    layers = [up, down, biased]
    for layer in layers:
        shape = layer.weight.shape
        layer.replace(*Fp8Weight.empty(*shape, row_step=layer.row_step, device=META))
        assert len(layer.products) > 4
    norm = RMSNorm(inputs, EPS, **options)
    norms = norm, RMSNorm(outputs, EPS, **options)

    def forms(num_tokens: int) -> set[Any]:
        launched.clear()
        x = torch.empty(num_tokens, inputs, **options)
        residual = torch.empty(num_tokens, outputs, **options)
        biased(x, norm=norms[0])
        down(x, residual)
        down(up(residual, norm=norms[1]), residual)
        return set(launched)

    sizes = set().union(*(first_sizes(layer.products) for layer in layers))
    compiled = set().union(*map(forms, sizes))
    for num_tokens in (*range(1, 301), 1000, 4096, 4097):
        assert forms(num_tokens) <= compiled, num_tokens


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("size", "num_experts", "num_chosen"), [(768, 128, 8), (192, 8, 3)])
def test_the_first_sizes_of_experts_launch_all_that_they_ever_do(
    size: int, num_experts: int, num_chosen: int, launched: set[Any]
) -> None:
    options = {"device": META, "dtype": torch.bfloat16}
    experts = Experts(frozenset([0]), num_experts, num_chosen, size, True)
    config: Any = SimpleNamespace(hidden_size=2048, experts=experts)
    layer, norm = MoE(config, RankGroup(), **options), RMSNorm(2048, EPS, **options)
    for stack in (layer.experts.gate_up, layer.experts.down):
        stack.quantize(Quantization("fp8"))
        assert stack.scales is not None

    def forms(num_tokens: int) -> set[Any]:
        launched.clear()
        layer(torch.empty(num_tokens, 2048, **options), norm)
        routers = "_matvec_kernel", "_small_linear_kernel"  # which has entries of its own
        return {form for form in launched if form[0] not in routers}

    compiled = set().union(*map(forms, first_sizes(layer.products)))
    for num_tokens in (*range(1, 301), 512, 513, 1024, 1025, 5000):
        assert forms(num_tokens) <= compiled, num_tokens

"""The kernels in C: against their PyTorch twins and float64, and machines that cannot have them."""

import itertools
import logging
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, completions, load_tasks
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import multiplies_int4, usable_on_cpu
from nanovllm.kernels.cpu import attention, build, fused
from nanovllm.kernels.cpu.int4 import int4_linear
from nanovllm.kernels.cpu.linear import linear, panels
from nanovllm.kernels.cpu.sampler import sample as cpu_sample
from nanovllm.layers import sampler
from nanovllm.layers.attention import qk_norm_rope_store
from nanovllm.layers.int4 import Groups, Int4Weight, packed
from nanovllm.layers.kv_quantization import dequantize, quantize
from nanovllm.layers.layernorm import rms_norm

NAN, INF = math.nan, math.inf
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C compiler makes them here")


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of torch, and so of the kernels, as long as the test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(out: Tensor, reference: Tensor, terms: Tensor | None = None) -> bool:
    """Each element within the tolerance of out's dtype, of the largest of its row.

    terms: of what is summed up, the largest sum of magnitudes counts instead.
    """
    scale = (reference if terms is None else terms).double().abs().amax(dim=-1, keepdim=True)
    difference = (out.double() - reference.double()).abs()
    return bool((difference <= TOLERANCE[out.dtype] * scale).all())


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- norm, rotary embedding, store


@needs_kernels
@dtypes
@pytest.mark.parametrize("size", [32, 96, 1024, 4128])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 65])
def test_rms_norm(size: int, num_tokens: int, dtype: torch.dtype, num_threads: int) -> None:
    x = torch.randn(num_tokens, size) * 2.0 ** torch.randint(-12, 7, (num_tokens, 1))
    weight = torch.randn(size).to(dtype)
    x = x.to(dtype)
    before = x.clone()
    out = fused.rms_norm(x, weight, 1e-6)
    assert torch.equal(x, before)
    exact = x.double()
    exact = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert close(out, exact)
    assert close(out, rms_norm(x, weight, 1e-6))


@needs_kernels
@dtypes
def test_rms_norm_of_rows_of_zeros_and_of_numbers_that_are_none(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 64, dtype=dtype)
    x[1, 7], x[2, 63] = NAN, INF
    out = fused.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6)
    assert not out[0].any()
    assert out[1].isnan().all()
    assert out[2, 63].isnan()


@needs_kernels
def test_tensors_of_another_device_are_refused() -> None:
    """Their addresses are no memory of this process."""
    x = torch.empty(3, 64, device="meta")
    with pytest.raises(AssertionError):
        fused.rms_norm(x, x[0], 1e-6)


class Layer:
    """Arguments of qk_norm_rope_store: one token more than slots, which are NaN where nothing lies.

    kind: "auto", or "fp8".
    """

    def __init__(
        self, dtype: torch.dtype, head_dim: int, kind: str, num_tokens: int, has_norm: bool
    ) -> None:
        self.num_heads, self.num_kv_heads = 6, 2
        size = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        self.qkv = (torch.randn(num_tokens, size) * 3).to(dtype)
        norms = [torch.randn(head_dim).to(dtype) for _ in range(2)]
        self.norms = norms if has_norm else [None, None]
        angles = torch.randn(500, head_dim // 2)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.positions = torch.randint(500, (num_tokens,))
        slots = torch.randperm(7 * 16)[:num_tokens].int()
        slots[::5] = -1
        self.slots = slots
        shape = 7, 16, self.num_kv_heads
        self.caches = [torch.full((*shape, head_dim), NAN, dtype=dtype) for _ in range(2)]
        self.scales: list[Tensor] = []
        if kind == "fp8":
            self.caches = [torch.full((*shape, head_dim), 9, dtype=torch.uint8) for _ in range(2)]
            self.scales = [torch.full(shape, 9, dtype=torch.uint8) for _ in range(2)]

    def run(self, function: object) -> list[Tensor]:
        """q, k, v, caches, scales."""
        caches, scales = ([x.clone() for x in xs] for xs in (self.caches, self.scales))
        found = function(  # type: ignore[operator]
            self.qkv.clone(), *self.norms, 1e-6, self.cos_sin, self.positions, *caches, self.slots,
            self.num_heads, self.num_kv_heads, True, *scales,
        )  # fmt: skip
        return [*found, *caches, *scales]


@needs_kernels
@dtypes
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_qk_norm_rope_store(
    num_tokens: int, head_dim: int, has_norm: bool, dtype: torch.dtype, num_threads: int
) -> None:
    layer = Layer(dtype, head_dim, "auto", num_tokens, has_norm)
    found, expected = layer.run(fused.qk_norm_rope_store), layer.run(qk_norm_rope_store)
    for out, twin in zip(found, expected, strict=True):
        assert torch.equal(out.isnan(), twin.isnan())
        assert close(out.nan_to_num(), twin.nan_to_num())
    _, key, value, k_cache, v_cache = found
    assert torch.equal(value, layer.qkv.unflatten(1, (-1, head_dim))[:, -2:])
    stored = layer.slots >= 0
    for cache, rows in ((k_cache, key), (v_cache, value)):
        assert torch.equal(cache.flatten(0, 1)[layer.slots[stored].long()], rows[stored])


@needs_kernels
@dtypes
def test_without_a_pool_nothing_is_stored(dtype: torch.dtype) -> None:
    layer = Layer(dtype, 32, "auto", 3, has_norm=True)
    expected = layer.run(fused.qk_norm_rope_store)[:3]
    layer.caches = [torch.empty(0), torch.empty(0)]
    for out, with_pool in zip(layer.run(fused.qk_norm_rope_store), expected, strict=False):
        assert torch.equal(out, with_pool)


@needs_kernels
@dtypes
def test_an_fp8_cache_holds_what_the_twin_stores(dtype: torch.dtype) -> None:
    """Bit by bit, of numbers on both sides of every border that rounding has."""
    layer = Layer(dtype, 64, "fp8", 100, has_norm=False)
    layer.cos_sin = torch.cat((torch.ones(500, 32), torch.zeros(500, 32)), dim=1)
    all_bytes = torch.arange(256, dtype=torch.uint8)
    numbers = all_bytes.view(torch.float8_e4m3fn).float().nan_to_num(0)
    middles = (numbers[:126] + numbers[1:127]) / 2
    edges = torch.cat((numbers, middles, -middles, middles * 1.001, middles * 0.999))
    rows = edges[torch.randint(len(edges), layer.qkv.shape)]
    rows *= 2.0 ** torch.randint(-16, 7, (len(rows), 1))
    rows[1] = 0
    rows[2, -3] = INF
    rows[3, -200] = NAN
    # Below its normal numbers a processor's own rounding to bfloat16 gives 0.
    least = rows[4].sign() * 1.3 * 2.0**-120
    rows[4] = least if dtype == torch.bfloat16 else rows[4] * 2.0**-130
    layer.qkv = rows.to(dtype)
    found, expected = layer.run(fused.qk_norm_rope_store), layer.run(qk_norm_rope_store)
    is_nan = found[1].isnan()
    for out, twin in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(out.nan_to_num(7), twin.nan_to_num(7))
    for out, twin in zip(found[5:], expected[5:], strict=True):
        assert torch.equal(out, twin)
    for out, twin, scales in zip(found[3:5], expected[3:5], found[5:], strict=True):
        assert torch.equal(out[scales != 255], twin[scales != 255])
    assert is_nan.any(dim=-1).any()


# --- sampling


@needs_kernels
@dtypes
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 47, 1000, 151_936])
def test_sample(vocab_size: int, dtype: torch.dtype, num_threads: int) -> None:
    """The twin's ids and keys, ties and NaN among the logits too."""
    temperatures = torch.tensor([0, 0.3, 0.6, 1, 2.5, 1e-30, 1e4])
    num_rows = len(temperatures)
    for _ in range(3):
        logits = (torch.randn(num_rows, vocab_size + 9) * 3).to(dtype)[:, :vocab_size]
        logits[:, vocab_size // 2 :: 5] = logits.max()
        seeds = torch.randint(-(1 << 62), 1 << 62, (num_rows,))
        positions = torch.randint(1 << 31, (num_rows,))
        thresholds = logits.float().topk(min(9, vocab_size)).values[:, -1]
        rows = logits, temperatures, seeds, positions
        for how in ({}, {"thresholds": thresholds}):
            assert torch.equal(cpu_sample(*rows, **how), sampler.sample(*rows, **how))
        keys, expected = (f(*rows, first_id=7000) for f in (cpu_sample, sampler.sample))
        assert torch.equal(sampler.ids_of(keys), sampler.ids_of(expected))
        assert torch.equal(keys[:1], expected[:1])  # without noise, the scores are equal
        assert cpu_sample(*(x[:0] for x in rows)).shape == (0,)
        if vocab_size >= 32:
            logits[:, vocab_size - 3] = NAN
            greedy = [x[:1] for x in rows]
            kept = torch.tensor([-INF])
            assert cpu_sample(*greedy, thresholds=kept) == vocab_size - 3
            assert (cpu_sample(*rows) == vocab_size - 3).all()
            assert (sampler.sample(*rows) == vocab_size - 3).all()
            logits[:, vocab_size - 3] = -NAN  # its sign is no number's either
            keys, expected = (f(*rows, first_id=7) for f in (cpu_sample, sampler.sample))
            assert torch.equal(keys, expected)


# --- attention


class Decode:
    """Queries, and K and V in scattered blocks of a cache that is NaN elsewhere."""

    def __init__(
        self, lens: list[int], num_kv_heads: int, num_sharing: int, head_dim: int,
        dtype: torch.dtype, block_size: int = 16, fp8: bool = False,
    ) -> None:  # fmt: skip
        num_heads = num_kv_heads * num_sharing
        self.scale = head_dim**-0.5
        strided = torch.randn(len(lens), num_heads + 2 * num_kv_heads, head_dim).to(dtype) * 2
        self.query = strided[:, :num_heads]
        self.lens = int32(lens)
        counts = [-(-n // block_size) for n in lens]
        num_blocks = sum(counts) + 2
        blocks = (torch.randperm(num_blocks - 1) + 1).split([*counts, 1])
        width = max(counts) + 3
        self.tables = torch.full((len(lens), width), 1 << 30, dtype=torch.int32)
        shape = num_blocks, block_size, num_kv_heads, head_dim
        self.caches = [torch.full(shape, NAN, dtype=dtype) for _ in range(2)]
        self.rows = []
        for row, length in enumerate(lens):
            self.tables[row, : counts[row]] = blocks[row]
            positions = torch.arange(length)
            slots = blocks[row][positions // block_size] * block_size + positions % block_size
            keys = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for _ in range(2)]
            keys[1] *= 2.0 ** torch.randint(-9, 9, (length, num_kv_heads, 1))
            for cache, some in zip(self.caches, keys, strict=True):
                cache.flatten(0, 1)[slots] = some
            self.rows.append(keys)
        self.scales: list[Tensor] = []
        if fp8:
            stored = [quantize(cache) for cache in self.caches]
            self.caches = [values for values, _ in stored]
            self.scales = [scales for _, scales in stored]
            for keys in self.rows:
                for x in keys:
                    dequantize(*quantize(x), out=x)

    def run(self) -> Tensor:
        how = self.tables, self.lens, self.scale
        return attention.paged_decode(self.query, *self.caches, *how, *self.scales)

    def exact(self) -> Tensor:
        """float64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        for row, (keys, values) in enumerate(self.rows):
            num_sharing = self.query.size(1) // keys.size(1)
            k, v = (x.double().repeat_interleave(num_sharing, dim=1) for x in (keys, values))
            scores = torch.einsum("hd,khd->hk", self.query[row].double(), k) * self.scale
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), v)
        return out

    def prefill(self, row: int, query: Tensor, cached: bool = True) -> Tensor:
        """Of a sequence's last tokens; cached: of its keys in the cache, else of a row of them."""
        out = torch.full(query.shape, 7.0, dtype=query.dtype)
        keys, values = self.rows[row]
        if cached:
            how = len(keys), self.scale, out, self.tables[row], *self.scales
            attention.paged_prefill(query, *self.caches, *how)
        else:
            both = torch.cat((keys, values), dim=1)  # as in a merged projection
            parts = both.split(keys.size(1), dim=1)
            attention.paged_prefill(query, *parts, len(keys), self.scale, out)
        return out

    def exact_prefill(self, row: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """float64; and the same of the values' magnitudes."""
        keys, values = self.rows[row]
        num_sharing = query.size(1) // keys.size(1)
        k, v = (x.double().repeat_interleave(num_sharing, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query.double(), k) * self.scale
        last = torch.arange(len(query)) + len(keys) - len(query)
        scores.masked_fill_(torch.arange(len(keys)) > last[:, None], -INF)
        weights = scores.softmax(dim=-1)
        exact, terms = (torch.einsum("hqk,khd->qhd", weights, x) for x in (v, v.abs()))
        return exact, terms


shapes = pytest.mark.parametrize(
    ("num_kv_heads", "num_sharing", "head_dim", "block_size"),
    [(2, 1, 32, 1), (8, 2, 64, 16), (3, 3, 96, 33), (1, 7, 128, 256), (4, 8, 256, 16)],
)
LENS = [1, 15, 16, 17, 31, 32, 33, 64, 65, 300]


@needs_kernels
@dtypes
@pytest.mark.parametrize("fp8", [False, True], ids=["auto", "fp8"])
@shapes
def test_decode(
    num_kv_heads: int, num_sharing: int, head_dim: int, block_size: int, fp8: bool,
    dtype: torch.dtype, num_threads: int,
) -> None:  # fmt: skip
    for lens in (LENS, LENS[-1:]):  # many sequences, and one, whose heads are shared out
        case = Decode(lens, num_kv_heads, num_sharing, head_dim, dtype, block_size, fp8)
        out = case.run()
        assert out.is_contiguous()
        assert close(out, case.exact())


@needs_kernels
@dtypes
@pytest.mark.parametrize("fp8", [False, True], ids=["auto", "fp8"])
@shapes
def test_prefill(
    num_kv_heads: int, num_sharing: int, head_dim: int, block_size: int, fp8: bool,
    dtype: torch.dtype, num_threads: int,
) -> None:  # fmt: skip
    """Of all tokens of a sequence, and of its last ones; from a cache, and without."""
    lens = [1, 2, 24, 63, 64, 65, 300]
    case = Decode(lens, num_kv_heads, num_sharing, head_dim, dtype, block_size, fp8)
    num_heads = num_kv_heads * num_sharing
    for row, length in enumerate(lens):
        for num_queries in {1, min(length, 7), length}:
            strided = torch.randn(num_queries, num_heads + 3, head_dim).to(dtype) * 2
            query = strided[:, :num_heads]
            exact = case.exact_prefill(row, query)
            assert close(case.prefill(row, query), *exact)
            if not fp8:
                assert close(case.prefill(row, query, cached=False), *exact)


@needs_kernels
@dtypes
def test_a_prompts_tokens_see_none_after_them(dtype: torch.dtype) -> None:
    """And heads no other's: a token whose key is NaN, or whose value, reaches no one else."""
    case = Decode([200], 2, 2, 64, dtype)
    query = torch.randn(200, 4, 64).to(dtype)
    exact, terms = case.exact_prefill(0, query)
    for cached in (True, False):
        for which, first in ((0, 70), (0, 127), (0, 128), (1, 128), (1, 190)):
            slot = case.tables[0, first // 16] * 16 + first % 16
            places = case.caches[which].flatten(0, 1)[slot, 1], case.rows[0][which][first, 1]
            before = places[0].clone()
            for place in places:
                place.fill_(NAN)
            out = case.prefill(0, query, cached)
            assert out[first:, 2:].isnan().all()
            # A value that weighs nothing is multiplied all the same, if it is near.
            unreached = first if which == 0 else first - 6
            assert close(out[:unreached], exact[:unreached], terms[:unreached])
            assert close(out[:, :2], exact[:, :2], terms[:, :2])
            for place in places:
                place.copy_(before)


@needs_kernels
@dtypes
def test_a_sequence_without_keys_has_no_output(dtype: torch.dtype) -> None:
    case = Decode([0, 5, 0], 2, 2, 64, dtype)
    out = case.run()
    assert not out[0].any()
    assert not out[2].any()
    assert close(out[1], case.exact()[1])


@needs_kernels
@dtypes
def test_a_key_that_is_no_number_reaches_the_heads_that_read_it_alone(dtype: torch.dtype) -> None:
    for which, poison in ((0, NAN), (1, NAN), (1, INF), (0, INF)):
        case = Decode([40, 40], 2, 2, 64, dtype)
        case.query[:] = case.query.abs()
        block, offset = case.tables[0, 35 // 16], 35 % 16
        case.caches[which][block, offset, 1, 5] = poison
        out, exact = case.run(), case.exact()
        assert close(out[1], exact[1])
        assert close(out[0, :2], exact[0, :2])
        reached = out[0, 2:] if which == 0 else out[0, 2:, 5]
        assert not reached.isfinite().any()


@needs_kernels
@dtypes
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_scores_of_any_magnitude(head_dim: int, dtype: torch.dtype) -> None:
    """A key alone has all the weight, however large its score, and whatever rounding it had."""
    for _ in range(30):
        case = Decode([1], 2, 1, head_dim, dtype)
        largest = 100.0 if dtype == torch.float16 else 1e6
        case.query.mul_(largest)
        case.caches[0].mul_(largest)
        values = case.rows[0][1][0]
        assert torch.equal(case.run()[0], values)
        assert torch.equal(case.prefill(0, case.query)[0], values)


@needs_kernels
@dtypes
@pytest.mark.parametrize("length", [17, 257])
def test_keys_that_weigh_nothing_before_one_that_does(length: int, dtype: torch.dtype) -> None:
    """Of -inf, in tiles of their own: the peak of these is none."""
    case = Decode([length], 2, 1, 64, dtype)
    case.query.abs_()
    positions = torch.arange(length - 1)
    slots = case.tables[0, positions // 16] * 16 + positions % 16
    case.caches[0].flatten(0, 1)[slots] = -INF
    values = case.rows[0][1][-1]
    assert torch.equal(case.run()[0], values)
    assert torch.equal(case.prefill(0, case.query)[0], values)


@needs_kernels
def test_one_score_far_above_the_others_takes_all() -> None:
    """What came before it vanishes, and what comes after, whichever tile each is in."""
    for position in (0, 31, 32, 70, 99):
        case = Decode([100], 1, 1, 64, torch.float32)
        keys, values = case.rows[0]
        slot = case.tables[0, position // 16] * 16 + position % 16
        keys[position] = case.query[0] * 1e4
        case.caches[0].flatten(0, 1)[slot] = keys[position]
        assert torch.equal(case.run()[0], values[position])


@needs_kernels
def test_a_pool_of_more_than_2_to_the_31_elements() -> None:
    """Of which the machine need not have the memory: only what is written takes any."""
    num_blocks = (1 << 31) // (16 * 2 * 128) + 2
    pool = torch.empty(num_blocks, 16, 2, 128, dtype=torch.uint8)
    scales = torch.empty(num_blocks, 16, 2, dtype=torch.uint8)
    values, exponents = quantize(torch.randn(16, 2, 128))
    pool[-1], scales[-1] = values, exponents
    keys = dequantize(values, exponents, out=torch.empty(16, 2, 128)).double()
    query = torch.randn(1, 2, 128)
    out = attention.paged_decode(
        query, pool, pool, int32([[num_blocks - 1]]), int32([16]), 0.1, scales, scales
    )  # fmt: skip
    weights = (torch.einsum("hd,khd->hk", query[0].double(), keys) * 0.1).softmax(dim=-1)
    assert close(out[0], torch.einsum("hk,khd->hd", weights, keys))
    slot = int32([num_blocks * 16 - 2])
    qkv = torch.randn(1, 6 * 128)
    flat = torch.cat((torch.ones(1, 64), torch.zeros(1, 64)), dim=1)
    first = torch.zeros(1, dtype=torch.int64)
    rows = fused.qk_norm_rope_store(
        qkv, None, None, 0.0, flat, first, pool, pool, slot, 2, 2, True, scales, scales
    )  # fmt: skip
    stored = torch.empty(2, 128)
    dequantize(pool[-1, -2], scales[-1, -2], out=stored)
    assert torch.equal(stored, rows[2][0])


# --- linear layers

# Of a number, the most that rounding changes it by.
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
gates = pytest.mark.parametrize("is_gated", [False, True], ids=["", "gated"])


@needs_kernels
@dtypes
@gates
@pytest.mark.parametrize(
    ("num_out", "size"), [(1, 32), (64, 512), (5, 96), (200, 1056), (130, 544)]
)
def test_linear(
    num_out: int, size: int, is_gated: bool, dtype: torch.dtype, num_threads: int
) -> None:
    """Rounded once: within half a step of the product, and of what float32 adds up."""
    num_rows = num_out * (2 if is_gated else 1)
    weight = (torch.randn(num_rows, size) / math.sqrt(size)).to(dtype)
    matrix = panels(weight, is_gated), num_out, is_gated
    bias = torch.randn(num_rows).to(dtype)
    norm = {"norm_weight": torch.rand(size).to(dtype) + 0.5, "eps": 1e-6}
    ways = itertools.cycle(itertools.product([False, True], repeat=3))
    for num_tokens in (0, *range(1, 14), 127, 128, 129, 300):
        has_bias, has_norm, has_residual = next(ways)
        x = torch.randn(num_tokens, size).to(dtype)
        inputs = fused.rms_norm(x, *norm.values()) if has_norm else x
        exact = inputs.double() @ weight.double().T + (bias.double() if has_bias else 0)
        error = 2e-6 * (inputs.double().abs() @ weight.double().abs().T + 1)
        if is_gated:
            (gate, up), (gate_error, up_error) = exact.chunk(2, dim=1), error.chunk(2, dim=1)
            exact = F.silu(gate) * up
            error = gate_error * (up.abs() + 1) * 1.1 + up_error * (F.silu(gate).abs() + 1)
        more: dict[str, Any] = {"bias": bias} if has_bias else {}
        more |= norm if has_norm else {}
        if has_residual:
            more["residual"] = torch.randn(num_tokens, num_out).to(dtype)
            exact = exact + more["residual"].double()
        out = torch.full((num_tokens + 1, num_out), 7.0, dtype=dtype)
        for to in (None, out[:num_tokens], more.get("residual")):
            y = linear(x, *matrix, **more, out=to)
            assert to is None or y.data_ptr() == to.data_ptr()
            assert ((y.double() - exact).abs() <= exact.abs() * HALF_STEP[dtype] + error).all()
        assert (out[num_tokens] == 7.0).all()


@needs_kernels
@dtypes
@gates
def test_a_tokens_product_is_the_same_whatever_others_there_are(
    is_gated: bool, dtype: torch.dtype, num_threads: int
) -> None:
    matrix = panels(torch.randn(96, 1056).to(dtype), is_gated), 48 if is_gated else 96, is_gated
    x = torch.randn(300, 1056).to(dtype)
    all_at_once = linear(x, *matrix)
    for first, num_tokens in ((0, 1), (7, 5), (100, 13), (299, 1), (17, 200)):
        some = slice(first, first + num_tokens)
        assert torch.equal(linear(x[some], *matrix), all_at_once[some])


@needs_kernels
@dtypes
def test_numbers_that_are_none_stay_in_their_row(dtype: torch.dtype) -> None:
    """Whichever of a pair they are."""
    matrix = panels(torch.rand(8, 64).to(dtype) + 0.5), 8
    x = torch.ones(5, 64, dtype=dtype)
    x[0, 6], x[1, 7], x[2, 8], x[3, 9] = NAN, NAN, INF, -INF
    y = linear(x, *matrix)
    assert y[:2].isnan().all()
    assert (y[2] == INF).all()
    assert (y[3] == -INF).all()
    assert y[4].isfinite().all()


# --- int4 weights


@pytest.mark.skipif(
    not multiplies_int4(torch.device("cpu")), reason="no kernel for int4 on this machine"
)
@pytest.mark.parametrize("num_tokens", [0, *range(1, 20), 64, 511, 512, 513, 1031])
@pytest.mark.parametrize(("num_rows", "size"), [(64, 32), (5, 96), (200, 192), (128, 384)])
def test_int4_linear(num_rows: int, size: int, num_tokens: int, num_threads: int) -> None:
    """Rounded once: within half a step of bfloat16 of the product of the weight's own numbers."""
    groups = Groups.of(size)
    assert groups is not None
    weight = packed((torch.randn(num_rows, size) * 3).bfloat16(), groups)
    assert isinstance(weight, Int4Weight)
    matrix = weight.values, weight.scales, weight.num_rows
    exact_weight = weight.dequantized(torch.float32).double()
    x = torch.randn(num_tokens, size).bfloat16()
    residual, bias = torch.randn(num_tokens, num_rows).bfloat16(), torch.randn(num_rows).bfloat16()
    product = x.double() @ exact_weight.T
    size_of_terms = x.double().abs() @ exact_weight.abs().T + 8
    for more, exact in (
        ({}, product),
        ({"bias": bias}, product + bias.double()),
        ({"residual": residual.clone()}, product + residual.double()),
        ({"bias": bias, "residual": residual.clone()}, product + bias.double() + residual.double()),
    ):
        out = torch.full((num_tokens + 1, num_rows), 7.0, dtype=torch.bfloat16)
        for to in (None, out[:num_tokens], more.get("residual")):
            y = int4_linear(x, *matrix, **more, out=to)
            assert to is None or y.data_ptr() == to.data_ptr()
            assert ((y.double() - exact).abs() <= exact.abs() / 256 + 1e-5 * size_of_terms).all()
        assert (out[num_tokens] == 7.0).all()


# --- the engine


def answers(**options: Any) -> list[str]:
    """The trained checkpoint's, to some of each of its tasks."""
    tasks = load_tasks()
    samples = [sample for family in tasks.FAMILIES for sample in tasks.held_out(family, 3)]
    chats = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    params = SamplingParams(temperature=0, max_tokens=400)
    with LLM(str(TINY), device="cpu", dtype="float32", max_model_len=1024, **options) as llm:
        outputs = llm.chat(chats, params, use_tqdm=False)
    return [output["text"] for output in outputs]


@needs_kernels
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_the_engine_answers_as_it_does_without_them(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kv_cache_dtype": kv_cache_dtype, "kvcache_block_size": 16}
    with LLM(str(TINY), device="cpu", **options) as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.backend == "cpu"
    found = answers(**options)
    assert answers(**options, attention_backend="torch") == found
    monkeypatch.setattr(build, "library", lambda: None)
    assert answers(**options) == found


# --- machines that cannot have them


@pytest.fixture
def not_yet_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    hasty = ["-O0" if flag == "-O3" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", hasty)
    return tmp_path / "nanovllm"


def script(folder: Path, text: str) -> str:
    """A program of a shell's lines."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_kernels
def test_they_are_compiled_once(not_yet_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    [compiled] = not_yet_compiled.iterdir()  # and nothing else is left there
    before = compiled.stat().st_mtime_ns
    assert build.library() is not None
    assert compiled.stat().st_mtime_ns == before
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DCHANGED"))
    assert build.library() is not None
    assert len(list(not_yet_compiled.iterdir())) == 2


@needs_kernels
@pytest.mark.parametrize("size", [0, 3000])
def test_what_cannot_be_loaded_is_compiled_anew(size: int, not_yet_compiled: Path) -> None:
    assert build.library() is not None
    [compiled] = not_yet_compiled.iterdir()
    whole = compiled.read_bytes()
    compiled.unlink()  # it is mapped, and stays so
    compiled.write_bytes(whole[:size] if size == 0 else b"no library".ljust(size))
    assert build.library() is not None
    assert compiled.stat().st_size > size


def test_torchs_openmp_is_taken_whatever_its_path() -> None:
    own = Path(torch.__file__).parent / "lib/libgomp.so.1"
    line = "7f00-7f01 r--p 00000000 08:01 42                 {}\n"
    others = (
        line.format("/a b/libgomp-1.so.1"),
        line.format("/a/libgomp.txt"),
        "7f-80 rw-p 0 0:0 0\n",
    )
    assert build._openmp("".join((*others, line.format(own)))) == str(own)
    assert build._openmp("".join(others)) == "/a b/libgomp-1.so.1"
    with pytest.raises(RuntimeError, match="no OpenMP"):
        build._openmp("".join(others[1:]))


@pytest.mark.parametrize(
    "fault", ["none", "fails", "bytes", "quote", "missing", "folder", "garbage", "system"]
)
def test_where_they_cannot_be_compiled_the_twins_run(
    fault: str, not_yet_compiled: Path, tmp_path: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="nanovllm")
    monkeypatch.delenv("CC", raising=False)
    if fault == "none":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif fault == "fails":
        monkeypatch.setenv("CC", script(tmp_path, "echo cannot do that >&2; exit 3"))
    elif fault == "bytes":
        monkeypatch.setenv("CC", script(tmp_path, r"printf '\377\376 cannot do that' >&2; exit 1"))
    elif fault == "quote":
        monkeypatch.setenv("CC", 'gcc "')
    elif fault == "missing":
        monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    elif fault == "folder":
        not_yet_compiled.write_text("a file where the folder should be")
    elif fault == "garbage":
        monkeypatch.setenv("CC", script(tmp_path, 'for last; do :; done; echo garbage > "$last"'))
    else:
        monkeypatch.setattr(build.sys, "platform", "plan9")
    assert build.library() is None
    message = caplog.records[-1].getMessage()
    assert message.startswith("plain PyTorch on the CPU, without kernels in C: ")
    assert fault == "folder" or not list(not_yet_compiled.glob("*"))
    said = {"none": "no C compiler", "system": "plan9"} | dict.fromkeys(
        ("fails", "bytes"), "cannot do that"
    )
    assert said.get(fault, "") in message
    assert not usable_on_cpu(torch.device("cpu"), 64)
    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        assert len(completions(llm, [[1, 2, 3]], max_tokens=40)[0]) == 40
    with pytest.raises(ValueError, match="attention_backend='cpu' cannot be used"):
        LLM(str(tiny_model), device="cpu", attention_backend="cpu")


def test_rows_of_other_sizes_are_left_to_the_twins() -> None:
    assert not usable_on_cpu(torch.device("cpu"), 48)
    assert not usable_on_cpu(torch.device("meta"), 64)
    assert usable_on_cpu(torch.device("cpu"), 64) == (build.library() is not None)

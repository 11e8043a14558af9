"""The Triton kernels against PyTorch twins.

On a GPU the tests run as they are. Without one, `test_interpreted` runs this file and that of the
kernels for FP8 weights once more in a process where Triton interprets its kernels (float32 and
float16: the interpreter has no bf16 dot), and the launches are compiled for GPUs that need not be
there, to see that their tiles fit.
"""

import ast
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Command
from scipy import stats
from torch import Tensor

from nanovllm import kernels
from nanovllm.engine.batch_layout import dry_prefills
from nanovllm.layers import fp8_prefill
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import qk_norm_rope_store as twin_qk_norm_rope_store
from nanovllm.layers.attention import store_kvcache as twin_store_kvcache
from nanovllm.layers.embed_head import LMHead, resolve_and_embed
from nanovllm.layers.filters import Filters, kept_threshold
from nanovllm.layers.fp8_prefill import cut_sequences
from nanovllm.layers.kv_quantization import dequantize, quantize
from nanovllm.layers.layernorm import RMSNorm, rms_norm
from nanovllm.layers.linear import GatedLinear, Linear
from nanovllm.layers.moe import route as twin_route
from nanovllm.layers.moe import run_experts
from nanovllm.layers.products import (
    ProductTable,
    few_tokens,
    first_sizes,
    gated_prefill,
    plain,
    product_table,
    small_batch,
)
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary, turns_of
from nanovllm.layers.sampler import ids_of, sample
from nanovllm.layers.torch_attention import AttentionInputs
from nanovllm.layers.triton_attention import triton_prefill, triton_prefill_sizes
from nanovllm.model_config import Rope
from nanovllm.utils.context import Context, cut_queries
from nanovllm.utils.quantization import E4M3, Fp8Rows, Fp8Weight

pytest.importorskip("triton")

from nanovllm.kernels.all_reduce import Peers
from nanovllm.kernels.small_linear import small_linear_counters

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.bfloat16, torch.float16) if CUDA else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-6
ROPE = Rope("default", 1e6)


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that launches kernels: for a GPU, unless they are interpreted."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")(test))


def runs_on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that launches a Gluon kernel, which nothing interprets, on sm_90."""
    is_hopper = CUDA and torch.cuda.get_device_capability() == (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(not is_hopper, reason="needs sm_90")(test))


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


FP8_KERNELS = str(Path(__file__).with_name("test_fp8_kernels.py"))

if not (INTERPRETED or CUDA):

    @pytest.mark.beside(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, FP8_KERNELS),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    @pytest.mark.slow
    def test_interpreted(command: Command) -> None:
        """The tests below, interpreted, in another process: Triton reads the flag on import."""
        status, output = command.finish()
        assert status == 0, output[-6000:]


def error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, infinite if an element is NaN."""
    difference = (out.double() - reference.double()).norm() / reference.double().norm()
    return math.inf if difference.isnan() else difference.item()


def close(out: Tensor, reference: Tensor) -> bool:
    return error(out, reference) < TOLERANCE[out.dtype]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# ---- twins


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in float64, the last query at the last key: [length, heads, head_dim]."""
    repeats = query.size(1) // key.size(1)
    q = query.double()
    k, v = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q, k) * query.size(-1) ** -0.5
    rows = torch.arange(len(q), device=q.device) + len(k) - len(q)
    hidden = torch.arange(len(k), device=q.device) > rows[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def qk_norm_rope(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos_sin: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> list[Tensor]:
    """q, k, v [num_tokens, heads, head_dim] of a merged projection."""
    heads = qkv.unflatten(-1, (-1, cos_sin.size(1)))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if weights:
        q, k = rms_norm(q, weights[0], EPS), rms_norm(k, weights[1], EPS)
    turns = turns_of(cos_sin[positions])
    return [apply_rotary(q, turns), apply_rotary(k, turns), v]


# ---- attention


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


SHAPES = (
    [Shape(16, 8, 128, 256), Shape(14, 2, 80, 32), Shape(16, 2, 256, 16), Shape(8, 8, 64, 48)]
    if CUDA
    else [Shape(4, 2, 32, 64), Shape(3, 1, 48, 16)]
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))


class Cache:
    """A pool in which the sequences' K/V lie in blocks drawn at random, and NaN everywhere else."""

    def __init__(self, shape: Shape, lengths: list[int], dtype: torch.dtype) -> None:
        counts = [-(-length // shape.block_size) for length in lengths]
        pool = (sum(counts) + 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.k = torch.full(pool, math.nan, dtype=dtype, device=DEVICE)
        self.v = self.k.clone()
        blocks = torch.randperm(pool[0], device=DEVICE, dtype=torch.int32)[: sum(counts)]
        self.tables = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
        self.tables = self.tables.to(DEVICE)
        self.slots = []
        for row, own, length in zip(self.tables, blocks.split(counts), lengths, strict=True):
            row[: len(own)] = own
            offsets = torch.arange(shape.block_size, device=DEVICE)
            slots = (own.long()[:, None] * shape.block_size + offsets).flatten()[:length]
            self.slots.append(slots)
            for x in self.k, self.v:
                x.flatten(0, 1)[slots] = randn(length, *pool[2:], dtype=dtype)

    def keys_and_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        for slots in self.slots:
            yield self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots]

    def in_a_row(self) -> tuple[Tensor, ...]:
        """K and V of all sequences; rows with a stride, as views of a merged projection are."""
        merged = torch.cat([torch.cat(kv, dim=1) for kv in self.keys_and_values()])
        return merged.split(self.k.size(2), dim=1)


def decode_lengths(block_size: int) -> list[int]:
    """Lengths of sequences at the edges of blocks and tiles; 0 is padding."""
    edges = [1, block_size - 1, block_size, block_size + 1, 0]
    return edges + ([700, 4097, 5000] if CUDA else [150])


@runs_kernels
@dtypes
@shapes
@pytest.mark.parametrize("num_splits", [3, 40, None] if CUDA else [3])
def test_paged_decode(shape: Shape, dtype: torch.dtype, num_splits: int | None) -> None:
    from nanovllm.kernels import attention

    lengths = decode_lengths(shape.block_size)
    cache = Cache(shape, lengths, dtype)
    query = randn(len(lengths), shape.num_heads, shape.head_dim, dtype=dtype)
    out = torch.full_like(query, math.nan)
    plan = attention.DecodePlan(num_splits, 32, 32) if num_splits else None
    attention.paged_decode(
        query, cache.k, cache.v, cache.tables, int32(lengths), shape.head_dim**-0.5, out, plan=plan
    )
    for row, q, (k, v) in zip(out, query, cache.keys_and_values(), strict=True):
        if len(k):
            assert close(row, attend(q[None], k, v)[0]), len(k)
        else:
            assert not row.any()


@runs_kernels
def test_decode_leaves_its_workspace_ready_for_the_next_launch() -> None:
    from nanovllm.kernels import attention

    shape = SHAPES[0]
    workspace = attention.decode_workspace(4, shape.num_heads, shape.num_kv_heads, 128, DEVICE, 4)
    plan = attention.DecodePlan(4, 32, 32)
    for lengths in ([90, 33, 128, 1], [120], [64, 65]):
        cache = Cache(shape, lengths, DTYPES[0])
        query = randn(len(lengths), shape.num_heads, shape.head_dim, dtype=DTYPES[0])
        scale = shape.head_dim**-0.5
        out = attention.paged_decode(
            query, cache.k, cache.v, cache.tables, int32(lengths), scale, None, workspace, plan
        )
        refs = [attend(q[None], *kv) for q, kv in zip(query, cache.keys_and_values(), strict=True)]
        assert close(out, torch.cat(refs))
        assert not workspace.counters.any()


@runs_kernels
@dtypes
@shapes
@pytest.mark.parametrize("source", ["cache", "descriptors", "pointers"])
def test_paged_prefill(
    shape: Shape, dtype: torch.dtype, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys from the cache, or as the step's tensors, loaded as new GPUs do and as old ones do."""
    from nanovllm.kernels import attention

    cached = source == "cache"
    monkeypatch.setattr(attention, "has_tma", lambda _: source == "descriptors")
    block_size = shape.block_size
    queries = [1, block_size - 1, block_size, block_size + 1, 1000 if CUDA else 70]
    earlier = [40, 0, block_size, 1, 3100 if CUDA else 9] if cached else [0] * 5
    lengths = [a + b for a, b in zip(queries, earlier, strict=True)]
    cache = Cache(shape, lengths, dtype)
    query = randn(sum(queries), shape.num_heads, shape.head_dim, dtype=dtype)
    cu_q, cu_k = (int32([0, *x]).cumsum(0, dtype=torch.int32) for x in (queries, lengths))
    sequences = list(cache.keys_and_values())
    keys, values = (cache.k, cache.v) if cached else cache.in_a_row()
    out = attention.paged_prefill(
        query, keys, values, cu_q, cu_k, max(queries), shape.head_dim**-0.5,
        cache.tables if cached else None,
    )  # fmt: skip
    refs = [attend(q, *kv) for q, kv in zip(query.split(queries), sequences, strict=True)]
    assert close(out, torch.cat(refs))


@runs_kernels
@dtypes
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_prefill_keeps_one_sequences_nan_from_the_others(
    dtype: torch.dtype, tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of keys reach into the sequence that follows."""
    from nanovllm.kernels import attention

    monkeypatch.setattr(attention, "has_tma", lambda _: tma)
    lengths = [5, 70, 33]
    query, key, value = (randn(sum(lengths), 2, 32, dtype=dtype) for _ in range(3))
    key[5:75] = value[5:75] = math.nan
    limits = int32([0, *lengths]).cumsum(0, dtype=torch.int32)
    out = attention.paged_prefill(query, key, value, limits, limits, 70, 32**-0.5)
    for rows in slice(0, 5), slice(75, 108):
        assert close(out[rows], attend(query[rows], key[rows], value[rows]))


def query_tiles_of(queries: list[int], keys: list[int]) -> Tensor:
    return torch.from_numpy(cut_queries(queries, keys)).to(DEVICE)


@runs_on_hopper
@dtypes
@pytest.mark.parametrize(
    "shape", [Shape(16, 8, 128, 256), Shape(7, 1, 128, 128)], ids=lambda s: "-".join(map(str, s))
)
@pytest.mark.parametrize("cached", [True, False])
def test_hopper_prefill(shape: Shape, dtype: torch.dtype, cached: bool) -> None:
    """Lengths at the edges of tiles and of their halves; more tiles than programs."""
    from nanovllm.kernels.hopper_attention import hopper_prefill

    queries = [1, 63, 64, 65, 127, 128, 129, 255, 1000, 1024, 300]
    earlier = [40, 0, 256, 1, 3, 900, 128, 129, 3100, 1, 77] if cached else [0] * len(queries)
    lengths = [a + b for a, b in zip(queries, earlier, strict=True)]
    cache = Cache(shape, lengths, dtype)
    query = randn(sum(queries), shape.num_heads, 128, dtype=dtype)
    sequences = list(cache.keys_and_values())
    keys, values = (cache.k, cache.v) if cached else cache.in_a_row()
    refs = [attend(q, *kv) for q, kv in zip(query.split(queries), sequences, strict=True)]
    tables = cache.tables if cached else None
    for _ in range(2):
        out = hopper_prefill(
            query, keys, values, query_tiles_of(queries, lengths), 128**-0.5, tables
        )
        assert close(out, torch.cat(refs))
        for part, ref in zip(out.split(queries), refs, strict=True):
            assert close(part, ref)


@runs_on_hopper
@dtypes
def test_hopper_prefill_keeps_one_sequences_nan_from_the_others(dtype: torch.dtype) -> None:
    from nanovllm.kernels.hopper_attention import hopper_prefill

    lengths = [5, 70, 200, 133]
    query, key, value = (randn(sum(lengths), 2, 128, dtype=dtype) for _ in range(3))
    key[5:75] = value[5:75] = math.nan
    out = hopper_prefill(query, key, value, query_tiles_of(lengths, lengths), 128**-0.5)
    for rows in slice(0, 5), slice(75, 275), slice(275, 408):
        assert close(out[rows], attend(query[rows], key[rows], value[rows]))


def test_query_tiles_hold_every_query_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        queries = [rng.choice([1, 127, 128, 129, 1000]) for _ in range(rng.randint(1, 9))]
        keys = [length + rng.choice([0, 0, 1, 500]) for length in queries]
        tiles = cut_queries(queries, keys)
        assert tiles.dtype == np.int32
        seen = []
        for first, num_rows, limit, num_keys, key_row, seq in tiles.tolist():
            start = first - sum(queries[:seq])
            assert start % 128 == 0
            assert 0 < num_rows == min(128, queries[seq] - start)
            assert (num_keys, key_row) == (keys[seq], sum(keys[:seq]))
            assert limit == keys[seq] - queries[seq] + start
            seen.extend(range(first, first + num_rows))
        assert sorted(seen) == list(range(sum(queries)))
        last_keys = tiles[:, 2] + tiles[:, 1]
        assert (np.diff(last_keys) <= 0).all()


def test_parts_hold_every_sequence_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, and as many in each as keep within its keys."""
    monkeypatch.setattr(fp8_prefill, "MOST_KEYS", 1000)
    rng = random.Random(0)
    for _ in range(300):
        queries = [rng.choice([1, 127, 128, 300]) for _ in range(rng.randint(1, 20))]
        keys = [length + rng.choice([0, 0, 1, 500, 1200]) for length in queries]
        slots = torch.arange(sum(queries), dtype=torch.int32)
        tables = torch.arange(2 * len(keys), dtype=torch.int32).view(-1, 2)
        parts = cut_sequences(Context(True, slots, queries, keys, 16, block_tables=tables))
        most = max(1000, *keys)
        seen = [length for part in parts for length in part.context.key_lens]
        assert seen == keys
        assert torch.equal(torch.cat([part.block_tables for part in parts]), tables)
        end = 0
        for rows, _, part in parts:
            assert (rows.start, rows.stop) == (end, end + sum(part.query_lens))
            end = rows.stop
            assert torch.equal(part.slot_mapping, slots[rows])
            assert part.block_tables is None
            for lens, sums in (
                (part.query_lens, part.cu_seqlens_q),
                (part.key_lens, part.cu_seqlens_k),
            ):
                assert sums is not None
                assert sums.tolist() == [0, *accumulate(lens)]
        totals = [sum(part.key_lens) for _, _, part in parts]
        assert max(totals) <= most
        firsts = [part.key_lens[0] for _, _, part in parts[1:]]
        assert all(a + b > most for a, b in zip(totals, firsts, strict=False))


def test_hopper_prefill_is_used_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.kernels import hopper_attention

    def is_faster(
        lengths: list[int],
        block_size: int = 0,
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
    ) -> bool:
        query = torch.empty(sum(lengths), 16, head_dim, dtype=dtype)
        return hopper_attention.is_faster(query, lengths, block_size)

    monkeypatch.setattr(hopper_attention, "is_hopper", lambda _: True)
    assert is_faster([1024] * 4)
    assert is_faster([384] * 11, block_size=256)
    assert not is_faster([1000] * 4)
    assert not is_faster([300] * 20)
    assert not is_faster([1024] * 4, block_size=64)
    assert not is_faster([1024] * 4, head_dim=64)
    assert not is_faster([1024] * 4, dtype=torch.float32)
    monkeypatch.setattr(hopper_attention, "is_hopper", lambda _: False)
    assert not is_faster([1024] * 4)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_offsets_past_32_bits() -> None:
    from nanovllm.kernels import attention

    cache = torch.empty(8400, 256, 8, 128, dtype=torch.bfloat16, device=DEVICE)  # 2.2e9 elements
    cache[8390:].normal_()
    table = int32([8399, 8391, 8395])[None]
    keys = cache[table[0].long()].flatten(0, 1)[:600]
    query = randn(1, 16, 128, dtype=torch.bfloat16)
    ref = attend(query, keys, keys)
    lens = int32([600])
    assert close(attention.paged_decode(query, cache, cache, table, lens, 128**-0.5), ref)
    cu_q, cu_k = int32([0, 1]), int32([0, 600])
    out = attention.paged_prefill(query, cache, cache, cu_q, cu_k, 1, 128**-0.5, table)
    assert close(out, ref)
    if torch.cuda.get_device_capability() == (9, 0):
        from nanovllm.kernels.hopper_attention import hopper_prefill

        tiles = query_tiles_of([1], [600])
        assert close(hopper_prefill(query, cache, cache, tiles, 128**-0.5, table), ref)


# ---- an FP8 cache


# An FP8 cache's products are of float16: those of bfloat16 can be interpreted too.
FP8_CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What an FP8 decode may err by: a GPU's float32 exponentials and sums by a little more than 1e-6.
FP8_TOLERANCE = TOLERANCE | ({torch.float32: 3e-6} if CUDA else {})


class Fp8Cache(Cache):
    """In `pool` the same in FP8: bytes of K and V, and scales; in k and v, what that stands for.

    Rows are of many sizes, some are zeros; values are of those given (of base 2), in float16 their
    scales very small. Where nothing lies are NaN and infinite scales.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: list[int],
        dtype: torch.dtype,
        values: tuple[int, int] = (-14, -9),
    ) -> None:
        super().__init__(shape, lengths, dtype)
        for x, sizes in ((self.k, (-12, 2)), (self.v, values)):
            x *= 2.0 ** torch.randint(*sizes, (*x.shape[:-1], 1), device=DEVICE)
            x[:, 3::7] *= 0
        (k, k_scales), (v, v_scales) = quantize(self.k), quantize(self.v)
        assert 255 in k_scales
        assert 1 in v_scales
        self.pool = k, v
        self.scales: dict[str, Any] = {"k_scales": k_scales, "v_scales": v_scales}
        dequantize(k, k_scales, out=self.k)
        dequantize(v, v_scales, out=self.v)


@runs_kernels
@shapes
@pytest.mark.parametrize("dtype", FP8_CACHE_DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("converts", [True, False] if CUDA else [False])
def test_fp8_decode(
    shape: Shape, dtype: torch.dtype, converts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the GPU's instructions for FP8, and without them."""
    from nanovllm.kernels import attention

    if not converts:
        monkeypatch.setattr(attention, "has_fp8", lambda _: False)
    lengths = decode_lengths(shape.block_size)
    cache = Fp8Cache(shape, lengths, dtype)
    query = randn(len(lengths), shape.num_heads, shape.head_dim, dtype=dtype)
    scale = shape.head_dim**-0.5
    if dtype != torch.float16:  # whose rows need not fit into float16
        query, scale = query * 2.0**20, scale * 2.0**-20
    for num_splits in (3, 40, None) if CUDA else (1, 3):
        out = torch.full_like(query, math.nan)
        plan = attention.DecodePlan(num_splits, 32, 32) if num_splits else None
        attention.paged_decode(
            query, *cache.pool, cache.tables, int32(lengths), scale, out, plan=plan, **cache.scales
        )  # fmt: skip
        for row, q, (k, v) in zip(out, query, cache.keys_and_values(), strict=True):
            if len(k):
                ref = attend(q[None] * (scale * shape.head_dim**0.5), k, v)[0]
                assert error(row, ref) < FP8_TOLERANCE[dtype], len(k)
            else:
                assert not row.any()


@runs_kernels
@pytest.mark.parametrize("values", [(-128, -122), (-100, -80), (-90, 90), (60, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_fp8_decode_of_values_beyond_float16(dtype: torch.dtype, values: tuple[int, int]) -> None:
    """Weights are float16 there; the largest, with its value's scale, is 1. Queries are too."""
    from nanovllm.kernels import attention

    shape = SHAPES[0]
    lengths = [1, shape.block_size + 1, 150]
    cache = Fp8Cache(shape, lengths, dtype, values)
    query = randn(len(lengths), shape.num_heads, shape.head_dim, dtype=dtype)
    plan = None if CUDA else attention.DecodePlan(3, 32, 32)
    scale = 2.0**60 * shape.head_dim**-0.5
    out = attention.paged_decode(
        query * 2.0**-60, *cache.pool, cache.tables, int32(lengths), scale, plan=plan,
        **cache.scales,
    )  # fmt: skip
    assert out.isfinite().all()
    if values[0] < -110:  # too little to be right too
        return
    for row, q, (k, v) in zip(out, query, cache.keys_and_values(), strict=True):
        size = v.abs().max()
        assert error(row / size, attend(q[None], k, v / size)[0]) < FP8_TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@shapes
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_fp8_gather(shape: Shape, dtype: torch.dtype) -> None:
    """All rows equal the twin's, at the borders of blocks and tiles; nothing else is written."""
    from nanovllm.kernels import fp8_attention

    size = shape.block_size
    lengths = [1, size - 1, size, size + 1, 4 * size - 1, 64 // shape.num_kv_heads, 3, 200]
    cache = Fp8Cache(shape, lengths, dtype)
    for name, bits in zip(("k_scales", "v_scales"), cache.pool, strict=True):
        rows = fp8_edges(200, shape.head_dim, dtype)[: len(cache.slots[7])]
        stored, exponents = quantize(rows.unsqueeze(1).expand(-1, shape.num_kv_heads, -1))
        bits.flatten(0, 1)[cache.slots[7]] = stored
        cache.scales[name].flatten(0, 1)[cache.slots[7]] = exponents
        cache.scales[name].flatten(0, 1)[cache.slots[6][1]] = 255  # is part of a sequence, and NaN
    total = sum(lengths)
    found = torch.full((2, total + 5, *cache.k.shape[2:]), 7.0, dtype=dtype, device=DEVICE)
    limits = int32([0, *lengths]).cumsum(0, dtype=torch.int32)
    fp8_attention.gather(
        *cache.pool, *cache.scales.values(), cache.tables, limits, max(lengths), *found[:, :total]
    )
    slots = torch.cat(cache.slots)
    for rows, bits, scales in zip(found, cache.pool, cache.scales.values(), strict=True):
        held = (x.flatten(0, 1)[slots] for x in (bits, scales))
        expected = dequantize(*held, out=torch.empty_like(rows[:total]))
        assert torch.equal(rows[:total].nan_to_num(nan=-9e9), expected.nan_to_num(nan=-9e9))
        assert expected.isnan().flatten(1).any(1).sum() == 1
        assert (rows[total:] == 7).all()


@runs_kernels
@dtypes
@shapes
@pytest.mark.parametrize("most_keys", [1, 100, 10**6])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_fp8_prefill(
    shape: Shape, dtype: torch.dtype, most_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts: of a sequence each, of several, or in one. The result is bit for bit the same."""
    size = shape.block_size
    queries = [1, 9, size - 1, size + 1, 1, 2, 1000 if CUDA else 70, 3]
    earlier = [40, 0, 0, size, 33, 5, 3100 if CUDA else 9, 50]
    lengths = [a + b for a, b in zip(queries, earlier, strict=True)]
    cache = Fp8Cache(shape, lengths, dtype)
    query = randn(sum(queries), shape.num_heads, shape.head_dim, dtype=dtype)
    context = Context(
        is_prefill=True,
        slot_mapping=int32([-1] * sum(queries)),
        query_lens=queries,
        key_lens=lengths,
        block_size=size,
        block_tables=cache.tables,
    )
    scale = shape.head_dim**-0.5
    scales = cache.scales.values()
    inputs = AttentionInputs(query, None, query, *cache.pool, scale, context, *scales)
    parts = cut_sequences(context)
    assert len(parts) == 1
    whole = triton_prefill(inputs)
    refs = [
        attend(q, *kv) for q, kv in zip(query.split(queries), cache.keys_and_values(), strict=True)
    ]
    assert close(whole, torch.cat(refs))
    monkeypatch.setattr(fp8_prefill, "MOST_KEYS", most_keys)
    again = replace(context)
    num_parts = len(cut_sequences(again))
    assert num_parts == 1 if most_keys > 1000 else 1 < num_parts < len(queries)
    assert torch.equal(triton_prefill(inputs._replace(context=again)), whole)


@runs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_an_fp8_row_that_is_not_finite_stays_so() -> None:
    """It must not become numbers that look right."""
    from nanovllm.kernels import attention

    for name in ("k", "v"):
        cache = Fp8Cache(SHAPES[0], [40, 40], DTYPES[0])
        slot = int(cache.slots[0][4])
        cache.scales[f"{name}_scales"].flatten(0, 1)[slot] = 255
        query = randn(2, SHAPES[0].num_heads, SHAPES[0].head_dim, dtype=DTYPES[0])
        out = attention.paged_decode(
            query, *cache.pool, cache.tables, int32([40, 40]), 1.0, **cache.scales
        )
        assert not out[0].isfinite().any()
        assert out[1].isfinite().all()


def fp8_edges(num_rows: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of any bits that are finite, of zeros, and with peaks where the scale changes."""
    bits = torch.randint(256, (num_rows, head_dim * dtype.itemsize), dtype=torch.uint8)
    rows = bits.view(dtype)
    rows = torch.where(rows.isfinite(), rows, 0.0)
    peaks = torch.tensor([0.0, 1.0, 448.0, 449.0, 450.0, 512.0, 2.0**-20, 1e-30, 2.0**-126, 1e30])
    peaks = peaks.to(dtype)
    peaks = torch.where(peaks.isfinite(), peaks, 1.0)
    edges = (torch.randn(len(peaks), head_dim) / 8).to(dtype).clamp(-1, 1) * peaks[:, None]
    edges[:, 0] = peaks
    rows[: len(peaks)] = edges
    if dtype == torch.bfloat16:  # whose subnormals the interpreter does not know
        rows = torch.where(rows.abs() < 1e-37, 0.0, rows)
    return rows.to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@shapes
@pytest.mark.parametrize("write_key", [True, False])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what overflows
def test_fp8_stores_equal_their_twins_bit_for_bit(
    shape: Shape, dtype: torch.dtype, write_key: bool
) -> None:
    """At position 0 and without a norm keys are as they come, so that both round the same."""
    from nanovllm.kernels import fused, store_kvcache

    num_heads, num_kv_heads, head_dim, block_size = shape
    num_tokens = 64 if CUDA else 12
    width = num_heads + 2 * num_kv_heads
    qkv = fp8_edges(num_tokens * width, head_dim, dtype)
    qkv = qkv.view(num_tokens, width, head_dim).flip(0).flatten(1).contiguous()
    cos_sin = RotaryEmbedding(head_dim, 9, ROPE).cos_sin.to(DEVICE)
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    slots = torch.randperm(8 * block_size, device=DEVICE, dtype=torch.int32)[:num_tokens]
    slots[3] = -1

    def run(fuse: Callable[..., Any], store: Callable[..., Any]) -> list[Tensor]:
        values = [torch.full((8, block_size, num_kv_heads, head_dim), 9) for _ in range(4)]
        values += [torch.full((8, block_size, num_kv_heads), 9) for _ in range(4)]
        pools = [x.to(DEVICE, torch.uint8) for x in values]
        mine = qkv.clone()
        q, k, v = fuse(
            mine, None, None, EPS, cos_sin, positions, *pools[:2], slots, num_heads, num_kv_heads,
            write_key, *pools[4:6],
        )  # fmt: skip
        heads = qkv.clone().view(num_tokens, width, head_dim)
        _, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        store(key, value, *pools[2:4], slots, *pools[6:])
        if write_key:
            assert torch.equal(k, key)
            assert torch.equal(v, value)
            assert torch.equal(v, mine.view_as(heads)[:, -num_kv_heads:])
        return [q, key, value, *pools]

    ours = run(fused.qk_norm_rope_store, store_kvcache.store_kvcache)
    twins = run(twin_qk_norm_rope_store, twin_store_kvcache)
    for a, b in zip(ours, twins, strict=True):
        assert torch.equal(a, b)
    for scales in ours[-4:]:
        assert (scales != 9).flatten(2).all(2).sum() == num_tokens - 1


@runs_kernels
def test_fp8_gather_from_past_32_bits() -> None:
    """Main memory is taken only as it is written."""
    from nanovllm.kernels import fp8_attention

    num_blocks = 2**31 // (256 * 2 * 32) + 9
    cache = torch.empty(num_blocks, 256, 2, 32, dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(cache.shape[:-1], dtype=torch.uint8, device=DEVICE)
    table = int32([num_blocks - 1, num_blocks - 9, num_blocks - 5])[None]
    rows = randn(3, 256, 2, 32)
    cache[table[0].long()], scales[table[0].long()] = quantize(rows)
    found = torch.empty(2, 600, 2, 32, device=DEVICE)
    fp8_attention.gather(cache, cache, scales, scales, table, int32([0, 600]), 600, *found)
    keys = dequantize(*quantize(rows), out=rows).flatten(0, 1)[:600]
    assert torch.equal(found, keys.expand_as(found))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_fp8_offsets_past_32_bits() -> None:
    from nanovllm.kernels import attention

    cache = torch.empty(17_000, 256, 8, 128, dtype=torch.uint8, device=DEVICE)  # 4.5e9 bytes
    scales = torch.full(cache.shape[:-1], 127, dtype=torch.uint8, device=DEVICE)
    table = int32([16_999, 16_991, 16_995])[None]
    rows = randn(3, 256, 8, 128)
    cache[table[0].long()], scales[table[0].long()] = quantize(rows)
    keys = dequantize(*quantize(rows), out=rows).flatten(0, 1)[:600]
    query = randn(1, 16, 128, dtype=torch.bfloat16)
    ref = attend(query, keys, keys)
    lens, rest = int32([600]), {"k_scales": scales, "v_scales": scales}
    assert close(attention.paged_decode(query, cache, cache, table, lens, 128**-0.5, **rest), ref)


# ---- elementwise, sampling, matrix-vector products


@runs_kernels
@dtypes
@pytest.mark.parametrize("size", [96, 1024])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels import fused

    x, weight = randn(5, size, dtype=dtype), randn(size, dtype=dtype)
    assert close(fused.rms_norm(x, weight, EPS), rms_norm(x, weight, EPS))
    x *= 1e-3  # where eps counts
    assert close(fused.rms_norm(x, weight, EPS), rms_norm(x, weight, EPS))


@runs_kernels
@dtypes
def test_arguments_of_another_kind_launch_another_kernel(dtype: torch.dtype) -> None:
    """The same launch with other alignments and sizes: what was compiled for one fits no other."""
    from nanovllm.kernels import fused

    for size, skipped in ((64, 0), (64, 1), (64, 0), (40, 0), (40, 3), (64, 5)):
        x = randn(3 * 2 * size + skipped, dtype=dtype)[skipped:].view(3, 2 * size)
        assert close(fused.silu_and_mul(x), silu_and_mul(x.double()))


@runs_kernels
@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    from nanovllm.kernels import fused

    gate_up = 9 * randn(3, 2 * 1100, dtype=dtype)
    assert close(fused.silu_and_mul(gate_up), silu_and_mul(gate_up.clone()))


def test_an_empty_grid_launches_nothing() -> None:
    """CUDA would refuse it."""
    from nanovllm.kernels.launch import launch

    kernel = MagicMock()
    launch(kernel, (4, 0), torch.empty(1))
    assert not kernel.mock_calls


@runs_kernels
@dtypes
@shapes
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("num_tokens", "write_key"), [(3, True), (3, False), (64, False)])
def test_qk_norm_rope_store(
    shape: Shape, dtype: torch.dtype, norm: bool, num_tokens: int, write_key: bool
) -> None:
    from nanovllm.kernels import fused

    num_heads, num_kv_heads, head_dim, block_size = shape
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    qkv[0] *= 1e-3  # where eps counts
    weights = (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)) if norm else None
    cos_sin = RotaryEmbedding(head_dim, 99, ROPE).cos_sin.to(DEVICE)
    positions = torch.randint(0, 99, (num_tokens,), device=DEVICE)
    k_cache = torch.zeros(8, block_size, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    slots = torch.randperm(8 * block_size, device=DEVICE, dtype=torch.int32)[:num_tokens]
    slots[1] = -1
    expected = qk_norm_rope(qkv, weights, cos_sin, positions, num_heads, num_kv_heads)
    q, k, v = fused.qk_norm_rope_store(
        qkv, *(weights or (None, None)), EPS, cos_sin, positions, k_cache, v_cache, slots,
        num_heads, num_kv_heads, write_key=write_key,
    )  # fmt: skip
    assert (k is not None) == write_key
    stored = slots >= 0
    written = [cache.flatten(0, 1)[slots[stored].long()] for cache in (k_cache, v_cache)]
    for row in slice(0, 1), slice(1, None):
        assert close(q[row], expected[0][row])
        assert k is None or close(k[row], expected[1][row])
        assert close(written[0][row], expected[1][stored][row])
    assert torch.equal(written[1], v[stored])
    assert torch.equal(v, expected[2])
    for cache in (k_cache, v_cache):
        assert cache.flatten(1).any(1).sum() <= stored.sum()
        assert cache.flatten(0, 1).flatten(1).any(1).sum() == stored.sum()


@runs_kernels
def test_qk_norm_rope_store_without_a_cache() -> None:
    """None as well as an empty one, which a layer has until a pool is bound."""
    from nanovllm.kernels import fused

    qkv, cos_sin = randn(3, 8 * 64), RotaryEmbedding(64, 99, ROPE).cos_sin.to(DEVICE)
    positions, slots = torch.arange(3, device=DEVICE), torch.full((3,), 7, device=DEVICE).int()
    expected = qk_norm_rope(qkv, None, cos_sin, positions, 4, 2)
    for cache in (None, torch.empty(0, device=DEVICE)):
        outputs = fused.qk_norm_rope_store(
            qkv, None, None, EPS, cos_sin, positions, cache, cache, slots, 4, 2
        )
        for output, reference in zip(outputs, expected, strict=True):
            assert close(output, reference)


@runs_kernels
@dtypes
def test_sample_equals_its_twin(dtype: torch.dtype) -> None:
    from nanovllm.kernels import sampler

    num_seqs, vocab_size = (64, 151_936) if CUDA else (5, 5000)
    logits = 3 * randn(num_seqs, vocab_size, dtype=dtype)
    temperatures = torch.rand(num_seqs, device=DEVICE)
    temperatures[::3] = 0
    seeds = torch.randint(-(2**62), 2**62, (num_seqs,), device=DEVICE)
    positions = torch.randint(0, 40_000, (num_seqs,), device=DEVICE)
    ids = sampler.sample(logits, temperatures, seeds, positions)
    assert torch.equal(ids, sample(logits, temperatures, seeds, positions))
    assert torch.equal(ids[::3], logits[::3].float().argmax(-1))


@runs_kernels
def test_sample_at_the_extremes() -> None:
    from nanovllm.kernels import sampler

    logits = torch.zeros(5, 3000, device=DEVICE)
    logits[0, [7, 2500]] = 5.0  # a tie: the lowest id
    logits[1] = -math.inf
    logits[1, 1234] = 0.0
    logits[2] = math.nan  # still an id of the vocabulary
    logits[3, 99] = 1e-3
    logits[4, 99] = 3e38
    temperatures = torch.tensor([0.0, 1.0, 1.0, 1e-38, 2.0], device=DEVICE)
    zeros = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    ids = sampler.sample(logits, temperatures, zeros, zeros).tolist()
    assert ids[:2] == [7, 1234]
    assert 0 <= ids[2] < 3000
    assert ids[3:] == [99, 99]


def random_filters(num_seqs: int, vocab_size: int) -> Filters:
    """Every combination of the three, within eight rows."""
    rows = torch.arange(num_seqs, device=DEVICE)
    top_ks = torch.randint(1, min(60, vocab_size), (num_seqs,), device=DEVICE).int()
    top_ks[::16] = vocab_size // 2
    top_ps = torch.rand(num_seqs, device=DEVICE).clamp(min=1e-3)
    min_ps = 0.2 * torch.rand(num_seqs, device=DEVICE)
    return Filters(
        top_ks.where(rows % 2 == 0, 0),
        top_ps.where(rows // 2 % 2 == 0, 1.0),
        min_ps.where(rows // 4 % 2 == 0, 0.0),
    )


def mass_at_odds(logits: Tensor, temperatures: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The probability, float64 [num_seqs], of the tokens which one threshold keeps, one leaves."""
    values, first, second = logits.double(), first[:, None], second[:, None]
    probabilities = (values / temperatures[:, None]).softmax(dim=-1)
    return (probabilities * ((values >= first) != (values >= second))).sum(dim=-1)


@runs_kernels
@dtypes
@pytest.mark.parametrize("vocab_size", [7, 307, 50_000, 151_936] if CUDA else [7, 9000])
def test_kept_threshold_equals_its_twin(vocab_size: int, dtype: torch.dtype) -> None:
    """The same tokens, but for one at the border of top_p that rounding put on either side."""
    from nanovllm.kernels import filters

    torch.manual_seed(0)
    num_seqs = 64 if CUDA else 16
    logits = 3 * randn(num_seqs, vocab_size, dtype=dtype)
    temperatures = 0.3 + 1.5 * torch.rand(num_seqs, device=DEVICE)
    temperatures[5] = 0
    asked = random_filters(num_seqs, vocab_size)
    thresholds = filters.kept_threshold(logits, temperatures, *asked)
    expected = kept_threshold(logits, temperatures, *asked)
    is_plain = (expected == -math.inf).tolist()
    assert is_plain == [row % 8 == 7 or row == 5 for row in range(num_seqs)]
    exact = (asked.top_ps == 1) & (asked.min_ps == 0)
    assert torch.equal(thresholds[exact], expected[exact])
    temperatures[5] = 1
    assert (mass_at_odds(logits, temperatures, thresholds, expected) < 1e-4).all()


@runs_kernels
@dtypes
def test_kept_threshold_tells_neighbouring_floats_apart(dtype: torch.dtype) -> None:
    """Of floats with none between them, all as likely, row n keeps n + 1."""
    from nanovllm.kernels import filters

    size = 99 if CUDA else 9
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    one = torch.ones((), dtype=dtype, device=DEVICE).view(bits)
    ladder = -(one + torch.arange(size, device=DEVICE) - size // 2).to(bits).view(dtype)
    logits = ladder[torch.randperm(size)].expand(size, -1)
    numbers, ones = torch.arange(size, device=DEVICE), torch.ones(size, device=DEVICE)
    for top_ks, top_ps in (
        (numbers + 1, ones),
        (0 * numbers, (numbers + 0.5) / size),
        (numbers + 1, 0.9999 * ones),
    ):
        thresholds = filters.kept_threshold(logits, 1e6 * ones, top_ks.int(), top_ps, 0 * ones)
        assert torch.equal((logits >= thresholds[:, None]).sum(dim=-1), numbers + 1)


@runs_kernels
def test_kept_threshold_at_the_extremes() -> None:
    from nanovllm.kernels import filters

    logits = randn(9, 3000)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, ::2] = math.nan
    logits[3, 5:] = -math.inf
    logits[4, 7] = math.inf
    logits[5] = 1.5  # all tied
    logits[6] = 3e38 * logits[6] / logits[6].abs().max()
    logits[8, 2000:] = -math.inf
    temperatures = torch.tensor([1, 1, 1, 1e-44, 1, 1, 1e30, 1e-38, math.inf], device=DEVICE)
    for asked in ((10, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3), (2900, 0.9999, 1e-30)):
        top_k, top_p, min_p = (torch.full((9,), value, device=DEVICE) for value in asked)
        arguments = logits, temperatures, top_k.int(), top_p, min_p
        thresholds, expected = filters.kept_threshold(*arguments), kept_threshold(*arguments)
        likely = logits > -math.inf
        kept, twins = (
            (likely & (logits >= x[:, None])).sum(dim=-1) for x in (thresholds, expected)
        )
        assert ((kept - twins).abs() <= 2).all(), (asked, kept, twins)


@runs_kernels
@dtypes
def test_sample_leaves_out_what_lies_below_the_threshold(dtype: torch.dtype) -> None:
    from nanovllm.kernels import sampler

    logits = randn(8, 3000, dtype=dtype)
    temperatures = torch.linspace(0, 2, 8, device=DEVICE)
    numbers = torch.arange(8, device=DEVICE)
    thresholds = logits.float().topk(4).values.amin(dim=-1)
    thresholds[3] = -math.inf
    ids = sampler.sample(logits, temperatures, numbers, numbers, thresholds)
    assert torch.equal(ids, sample(logits, temperatures, numbers, numbers, thresholds))
    drawn = logits.gather(1, ids[:, None])[:, 0].float()
    assert (drawn >= thresholds).all()
    plain = sampler.sample(logits, temperatures, numbers, numbers)
    assert ids[3] == plain[3]
    assert not torch.equal(ids, plain)


# Likeliest first, and how many of them each filter keeps: counted by hand.
PROBABILITIES = [0.36, 0.2, 0.13, 0.09, 0.07, 0.05, 0.04, 0.03, 0.02, 0.01]
KEPT: list[tuple[int, float, float, int]] = [
    (4, 1.0, 0.0, 4),
    (0, 0.82, 0.0, 5),  # four have 0.78 and five 0.85
    (0, 1.0, 0.125, 6),  # from 0.045 upwards
    (8, 0.82, 0.125, 4),  # min_p leaves six, of 0.9; three have less than 0.738
    (5, 0.8, 0.04, 3),  # top_k leaves five, of 0.85; two have less than 0.68
]


@runs_kernels
@pytest.mark.parametrize(("top_k", "top_p", "min_p", "num_kept"), KEPT)
def test_draws_follow_the_filtered_distribution(
    top_k: int, top_p: float, min_p: float, num_kept: int
) -> None:
    """Chi-square of what the two kernels make together; what is left out never comes."""
    from nanovllm.kernels import filters, sampler

    num_draws, temperature, vocab_size = 100_000 if CUDA else 400, 0.5, 5000 if CUDA else 50
    places = torch.arange(len(PROBABILITIES), device=DEVICE) * (vocab_size // 10) + 3
    logits = torch.full((vocab_size,), -math.inf, dtype=DTYPES[0], device=DEVICE)
    logits[places] = (temperature * torch.tensor(PROBABILITIES).log()).to(logits)
    rows, numbers = logits.expand(num_draws, -1), torch.arange(num_draws, device=DEVICE)
    temperatures, top_ps, min_ps = (
        torch.full((num_draws,), value, device=DEVICE) for value in (temperature, top_p, min_p)
    )
    asked = torch.full_like(numbers, top_k).int(), top_ps, min_ps
    num_rows = num_draws if CUDA else 1  # interpreted, a row takes a tenth of a second
    thresholds = filters.kept_threshold(
        rows[:num_rows], temperatures[:num_rows], *(values[:num_rows] for values in asked)
    )
    thresholds = thresholds.expand(num_draws).contiguous()
    ids = sampler.sample(rows, temperatures, numbers, numbers, thresholds)
    counts = ids.bincount(minlength=vocab_size)[places[:num_kept]].double().cpu()
    assert counts.sum() == num_draws
    expected = (logits[places[:num_kept]].double() / temperature).softmax(dim=-1).cpu() * num_draws
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.001


@pytest.mark.parametrize("varies", ["seed", "position"])
def test_sampled_ids_are_distributed_as_the_softmax(varies: str) -> None:
    """Of the twin, which the kernel equals: frequencies within five standard deviations."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.045, 0.004, 0.001])
    count = 100_000
    numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seeds, positions = (numbers, zeros) if varies == "seed" else (zeros, numbers)
    temperatures = torch.full((count,), 0.5)
    ids = sample((0.5 * probabilities.log()).expand(count, -1), temperatures, seeds, positions)
    seen = torch.bincount(ids, minlength=6) / count
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((seen - probabilities).abs() < 5 * deviation).all()


# ---- experts


class MoeShape(NamedTuple):
    """num_experts, num_chosen, hidden_size, intermediate_size of an expert."""

    num_experts: int
    num_chosen: int
    hidden_size: int
    intermediate_size: int


MOE_SHAPES = [MoeShape(6, 2, 96, 40), MoeShape(5, 3, 72, 130), MoeShape(16, 1, 64, 64)]
if CUDA:
    MOE_SHAPES += [MoeShape(128, 8, 2048, 768), MoeShape(64, 8, 1030, 200), MoeShape(8, 8, 64, 24)]
moe_shapes = pytest.mark.parametrize("shape", MOE_SHAPES, ids=lambda s: "-".join(map(str, s)))
MOE_TOKENS = [1, 2, 4, 5, 33, 300] if CUDA else [1, 3, 33]


def expert_weights(shape: MoeShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_experts, _, hidden_size, size = shape
    gate_up = randn(num_experts, 2 * size, hidden_size, dtype=dtype) * hidden_size**-0.5
    return gate_up, randn(num_experts, hidden_size, size, dtype=dtype) * size**-0.5


@runs_kernels
@dtypes
@pytest.mark.parametrize("renormalized", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "num_chosen"), [(4, 1), (128, 8), (5, 5), (60, 4), (300, 7)]
)
def test_route_equals_its_twin(
    num_experts: int, num_chosen: int, renormalized: bool, dtype: torch.dtype
) -> None:
    from nanovllm.kernels import moe

    logits = randn(37, num_experts, dtype=dtype) * 3
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    pairs = torch.full((num_experts, 37), -1, dtype=torch.int32, device=DEVICE)
    weights, chosen = moe.route(logits, num_chosen, renormalized, moe.Buckets(counts, pairs))
    expected, _ = twin_route(logits, num_chosen, renormalized)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    # Of equals any may have been chosen, but none twice.
    assert all(len(set(row)) == num_chosen for row in chosen.tolist())
    shares = logits.float().softmax(dim=-1)
    shares = shares.gather(1, chosen.long())
    if renormalized:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(shares, weights, rtol=1e-5, atol=1e-6)
    for expert, count in enumerate(counts.tolist()):
        own = (chosen.flatten() == expert).nonzero().flatten().tolist()
        assert sorted(pairs[expert, :count].tolist()) == own
        assert (pairs[expert, count:] == -1).all()


@runs_kernels
def test_route_of_equal_and_of_bad_logits() -> None:
    """Of equals the first; of NaN and infinity whatever there is, but experts that exist."""
    from nanovllm.kernels import moe

    logits = randn(5, 12)
    logits[0] = 1.0
    logits[1] = -math.inf
    logits[2] = math.nan
    logits[3, 4] = math.inf
    logits[4, 7:9] = 9.0
    weights, chosen = moe.route(logits, 3, renormalized=True)
    assert chosen[0].tolist() == [0, 1, 2]
    assert torch.allclose(weights[0], torch.full_like(weights[0], 1 / 3))
    assert chosen[4, :2].tolist() == [7, 8]
    assert weights[1:4].isnan().all()
    logits[0, 5] = math.nan
    assert moe.route(logits, 3, renormalized=True)[0][0].isnan().all()
    assert ((chosen >= 0) & (chosen < 12)).all()


@runs_kernels
@dtypes
@moe_shapes
@pytest.mark.parametrize("num_tokens", MOE_TOKENS)
@pytest.mark.parametrize("routing", ["random", "one expert"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_experts_equal_their_twin(
    routing: str, num_tokens: int, shape: MoeShape, dtype: torch.dtype
) -> None:
    """Experts that nobody chooses hold NaN."""
    from nanovllm.kernels import moe

    gate_up, down = expert_weights(shape, dtype)
    logits = randn(num_tokens, shape.num_experts, dtype=dtype)
    if routing == "one expert":
        logits[:, shape.num_experts // 2] = 20.0
        logits[:, : shape.num_chosen - 1] = 10.0
    weights, chosen = twin_route(logits, shape.num_chosen, True)
    unused = torch.ones(shape.num_experts, dtype=torch.bool, device=DEVICE)
    unused[chosen.flatten()] = False
    gate_up[unused], down[unused] = math.nan, math.nan
    x, residual = (randn(num_tokens, shape.hidden_size, dtype=dtype) for _ in range(2))
    exact = run_experts(x.double(), gate_up.double(), down.double(), weights.double(), chosen)
    out = moe.grouped_experts(x, gate_up, down, logits, shape.num_chosen, True, residual)
    expected = residual.double() + exact
    assert close(out, expected)
    moe.grouped_experts(x, gate_up, down, logits, shape.num_chosen, True, residual, residual)
    assert close(residual, expected)
    out = torch.full_like(x, math.nan)
    moe.grouped_experts(x, gate_up, down, logits, shape.num_chosen, True, None, out)
    assert close(out, exact)
    if num_tokens <= 5:
        norm_weight = randn(shape.hidden_size, dtype=dtype)
        routed = moe.route(logits, shape.num_chosen, True)
        out = moe.few_tokens_experts(x, norm_weight, EPS, gate_up, down, *routed, x)
        normed = rms_norm(x, norm_weight, EPS).double()
        exact = run_experts(normed, gate_up.double(), down.double(), weights.double(), chosen)
        assert close(out, x.double() + exact)
        out = torch.full_like(x, math.nan)
        moe.few_tokens_experts(x, norm_weight, EPS, gate_up, down, *routed, None, out)
        assert close(out, exact)
        expected = x.double() + exact
        moe.few_tokens_experts(x, norm_weight, EPS, gate_up, down, *routed, x, x)
        assert close(x, expected)


@runs_kernels
@dtypes
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_places_of_a_bucket_that_hold_no_pair_are_not_used(
    num_tokens: int, dtype: torch.dtype
) -> None:
    """They name a row of their own here, which nothing may be written to."""
    from nanovllm.kernels import moe

    shape = MoeShape(6, 2, 96, 40)
    gate_up, _ = expert_weights(shape, dtype)
    num_pairs = num_tokens * 2
    counts = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    pairs = torch.full((6, num_tokens), num_pairs, dtype=torch.int32, device=DEVICE)
    buckets = moe.Buckets(counts, pairs)
    _, chosen = moe.route(randn(num_tokens, 6, dtype=dtype), 2, True, buckets)
    x = randn(num_tokens + 1, 96, dtype=dtype)
    out = torch.full((num_pairs + 1, 40), math.nan, dtype=dtype, device=DEVICE)
    moe._grouped_product(x, gate_up, None, buckets, out, 2, gated=True)
    assert out[-1].isnan().all()
    for pair, expert in enumerate(chosen.flatten().tolist()):
        exact = silu_and_mul(x[pair // 2].double() @ gate_up[expert].double().T)
        assert close(out[pair], exact)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_experts_of_any_number_of_tokens() -> None:
    """1 to 300, on memory that holds NaN."""
    from nanovllm.kernels import moe

    shape = MoeShape(32, 4, 256, 96)
    gate_up, down = expert_weights(shape, torch.bfloat16)
    exact_weights = gate_up.double(), down.double()
    for num_tokens in range(1, 301):
        x, residual = (randn(num_tokens, 256, dtype=torch.bfloat16) for _ in range(2))
        logits = randn(num_tokens, 32, dtype=torch.bfloat16)
        weights, chosen = twin_route(logits, 4, True)
        exact = run_experts(x.double(), *exact_weights, weights.double(), chosen)
        garbage = torch.full((1 << 20,), math.nan, device=DEVICE, dtype=torch.bfloat16)
        del garbage  # what is allocated next lies there
        out = moe.grouped_experts(x, gate_up, down, logits, 4, True, residual)
        assert close(out, residual.double() + exact), num_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("num_tokens", [1, 3, 70, 5000])
def test_experts_past_32_bits(num_tokens: int) -> None:
    """More than 2^31 elements of weights, the last experts chosen; and so many of outputs."""
    from nanovllm.kernels import moe

    num_experts, hidden_size, size = 720, 2048, 768
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    gate_up = torch.full((num_experts, 2 * size, hidden_size), math.nan, **options)
    down = torch.full((num_experts, hidden_size, size), math.nan, **options)
    assert gate_up.numel() > 2**31
    shape = MoeShape(4, 2, hidden_size, size)
    gate_up[-4:], down[-4:] = expert_weights(shape, torch.bfloat16)
    logits = torch.full((num_tokens, num_experts), -30.0, **options)
    logits[:, -4:] = randn(num_tokens, 4, dtype=torch.bfloat16)
    x, residual = (randn(num_tokens, hidden_size, dtype=torch.bfloat16) for _ in range(2))
    weights, chosen = twin_route(logits[:, -4:], 2, True)
    last = gate_up[-4:].float(), down[-4:].float()
    exact = run_experts(x.float(), *last, weights, chosen)
    out = moe.grouped_experts(x, gate_up, down, logits, 2, True, residual)
    assert close(out, residual.float() + exact)
    if num_tokens == 1:
        norm_weight = randn(hidden_size, dtype=torch.bfloat16)
        routed = moe.route(logits, 2, True)
        out = moe.few_tokens_experts(x, norm_weight, EPS, gate_up, down, *routed, x)
        exact = run_experts(rms_norm(x, norm_weight, EPS).float(), *last, weights, chosen)
        assert close(out, x.float() + exact)


def test_an_expert_without_tokens_costs_nothing_in_the_twin() -> None:
    shape = MoeShape(5, 2, 8, 4)
    gate_up, down = expert_weights(shape, torch.float32)
    weights, chosen = twin_route(randn(3, 5), 2, True)
    out = run_experts(randn(3, 8), gate_up, down, weights, chosen)
    assert out.shape == (3, 8)
    assert run_experts(randn(0, 8), gate_up, down, weights[:0], chosen[:0]).shape == (0, 8)


@runs_kernels
@dtypes
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_matvec(num_tokens: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels import gemv

    hidden, inner = (1024, 3072) if CUDA else (48, 40)
    x, residual = (randn(num_tokens, hidden, dtype=dtype) for _ in range(2))
    norm, bias = randn(hidden, dtype=dtype), randn(2 * inner, dtype=dtype)
    up = randn(2 * inner, hidden, dtype=dtype) * hidden**-0.5
    down = randn(hidden, inner, dtype=dtype) * inner**-0.5
    normed = rms_norm(x, norm, EPS).double()
    gate_up = F.linear(normed, up.double())
    out = gemv.matvec(x, up, bias, norm, EPS)
    assert close(out, gate_up + bias.double())
    activated = gemv.matvec(x, up, None, norm, EPS, gated=True)
    assert close(activated, silu_and_mul(gate_up.clone()))
    expected = residual.double() + F.linear(activated.double(), down.double())
    assert close(gemv.matvec(activated, down, residual=residual), expected)
    out = torch.full_like(residual, math.nan)
    assert gemv.matvec(activated, down, out=out) is out
    assert close(out, expected - residual.double())
    gemv.matvec(activated, down, residual=residual, out=residual)
    assert close(residual, expected)


@runs_kernels
@dtypes
def test_matvec_of_inputs_that_the_widest_tile_would_not_fill(dtype: torch.dtype) -> None:
    from nanovllm.kernels import gemv

    x, weight, residual = (randn(*size, dtype=dtype) for size in ((1, 1200), (8, 1200), (1, 8)))
    expected = residual.double() + F.linear(x.double(), weight.double())
    assert close(gemv.matvec(x, weight, residual=residual), expected)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted linear layer that touches memory outside its tensors fails."""
    from nanovllm.kernels import small_linear

    if not INTERPRETED:
        return
    from triton.runtime.interpreter import _interpreter

    tensors: list[Tensor] = []
    launch, load, store = small_linear.launch, _interpreter.load, _interpreter.store

    def recorded(*args: Any, **options: Any) -> None:
        bases = (getattr(argument, "base", argument) for argument in args)
        tensors[:] = [base for base in bases if isinstance(base, Tensor)]
        launch(*args, **options)

    def check(pointers: np.ndarray, mask: Any) -> None:
        touched = pointers[np.asarray(mask, dtype=bool)]
        first = np.array([[tensor.data_ptr()] for tensor in tensors], dtype=np.uint64)
        size = np.array([[tensor.nbytes] for tensor in tensors], dtype=np.uint64)
        assert (touched - first < size).any(0).all()

    def checked_load(pointers: np.ndarray, mask: Any, *args: Any) -> np.ndarray:
        check(pointers, mask)
        return load(pointers, mask, *args)

    def checked_store(pointers: np.ndarray, value: Any, mask: Any) -> None:
        check(pointers, mask)
        store(pointers, value, mask)

    monkeypatch.setattr(small_linear, "launch", recorded)
    monkeypatch.setattr(_interpreter, "load", checked_load)
    monkeypatch.setattr(_interpreter, "store", checked_store)


SMALL_LAYERS = [
    (outputs, inputs, num_tokens)
    for outputs, inputs in [(90, 400), (33, 250), (64, 1408), (4096 if CUDA else 96, 256)]
    for num_tokens in (1, 16, 21, 64, 100, 256)
]
# Rows so long that few tokens have them loaded by descriptors, too.
SMALL_LAYERS += [
    (outputs, 8200, num_tokens)
    for outputs in ((20, 10_000) if CUDA else (20,))
    for num_tokens in (16, 21, 64)
]


@runs_kernels
@dtypes
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("outputs", "inputs", "num_tokens"), SMALL_LAYERS)
def test_small_linear(outputs: int, inputs: int, num_tokens: int, dtype: torch.dtype) -> None:
    """Tiles that divide the weight and ones that do not; inputs in one part and in several.

    Rows of 250 no descriptor can load.
    """
    from nanovllm.kernels.small_linear import small_linear, small_linear_counters

    x, weight = randn(num_tokens, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    bias, counters = randn(outputs, dtype=dtype), small_linear_counters(outputs).to(DEVICE)
    residual = 30 * randn(num_tokens, outputs, dtype=dtype)
    exact = F.linear(x.double(), weight.double())
    for _ in range(2):  # a launch leaves the counters ready for the next
        assert close(small_linear(x, weight, bias, counters), exact + bias.double())
    assert close(small_linear(x, weight), exact)
    out = torch.full_like(residual, math.nan)
    assert small_linear(x, weight, out=out) is out
    assert close(out, exact)
    expected = exact + bias.double() + residual.double()
    assert close(small_linear(x, weight, bias, counters, residual), expected)
    small_linear(x, weight, bias, counters, residual, out=residual)
    assert close(residual, expected)
    if outputs % 2 == 0:
        x *= inputs**-0.5
        expected = silu_and_mul(F.linear(x.double(), weight.double()))
        assert close(small_linear(x, weight, gated=True), expected)


@runs_kernels
@dtypes
def test_small_linear_of_no_tokens(dtype: torch.dtype) -> None:
    """What the output head gets from a chunk that samples nothing."""
    from nanovllm.kernels.gemv import matvec
    from nanovllm.kernels.small_linear import small_linear

    x, weight = randn(0, 64, dtype=dtype), randn(600, 64, dtype=dtype)
    out = torch.empty(4, 600, dtype=dtype, device=DEVICE)
    for product in (small_linear, matvec):
        assert product(x, weight).shape == (0, 600)
        assert product(x, weight, out=out[:0]).shape == (0, 600)


def test_small_linear_plans_fit() -> None:
    """The memory of a program, and the counters of a layer, whatever its sizes."""
    from nanovllm.kernels.small_linear import small_linear_counters, small_linear_plan

    rng = random.Random(0)
    for _ in range(2000):
        num_tokens, gated = rng.randint(0, 256), rng.random() < 0.5
        inputs, outputs = (16 * rng.choice([1, 3, 40, 64, 96, 192, 256, 768]) for _ in range(2))
        shared_bytes = rng.choice(list(SHARED_BYTES.values())) // rng.choice([1, 2])
        descriptors = rng.random() < 0.5
        plan = small_linear_plan(num_tokens, inputs, outputs, gated, shared_bytes, descriptors)
        stage_bytes = 2 * plan.inputs * (plan.tokens + plan.outputs * (2 if gated else 1))
        assert 2 <= plan.num_stages <= shared_bytes // stage_bytes
        assert plan.tma == descriptors if num_tokens > 64 else descriptors or not plan.tma
        if plan.num_parts > 1:
            assert not gated
            assert plan.tokens >= num_tokens  # one tile of tokens
            assert -(-outputs // plan.outputs) <= len(small_linear_counters(outputs))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of products as an H100 has them, for weights that lie elsewhere."""
    from nanovllm.kernels import device

    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(device, "is_hopper", lambda _: True)


def products_of(*shape: int, dtype: torch.dtype = torch.bfloat16, **kind: bool) -> ProductTable:
    weight = torch.empty(*shape, dtype=dtype, device="meta")
    return product_table(weight, num_out=shape[0], **kind)


def most_tokens(table: ProductTable, function: Callable[..., Tensor]) -> float:
    """The most tokens that a product is for; 0 if it is for none."""
    return max((n for n, p in table.items() if getattr(p, "func", p) is function), default=0)


@pytest.mark.usefixtures("hopper")
def test_small_linear_is_used_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.kernels import device

    def max_tokens(*shape: int, gated: bool = False, dtype: torch.dtype = torch.bfloat16) -> float:
        return most_tokens(products_of(*shape, dtype=dtype, is_gated=gated), small_batch)

    layers_of_0_6b = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
    assert [max_tokens(*shape) for shape in layers_of_0_6b] == [256] * 4
    assert max_tokens(4096, 1024, dtype=torch.float32) == 64
    assert max_tokens(2048, 2048) == max_tokens(12288, 2048) == max_tokens(8192, 1024) == 64
    assert max_tokens(6144, 1024, gated=True) == 256
    assert max_tokens(24576, 4096, gated=True) == max_tokens(12288, 2048, gated=True) == 128
    assert max_tokens(34816, 5120, gated=True) == 64  # too many programs
    assert max_tokens(151_936, 1024) == 64
    shapes = {Linear: [(1024, 512), (2048, 2048)], GatedLinear: [(2048, 2048)], LMHead: [(900, 64)]}
    layers = [kind(*shape, dtype=torch.bfloat16) for kind in shapes for shape in shapes[kind]]
    assert [most_tokens(layer.products, small_batch) for layer in layers] == [256, 64, 128, 64]
    monkeypatch.setattr(device, "is_hopper", lambda _: False)
    assert max_tokens(4096, 1024) == 64
    assert most_tokens(products_of(151_936, 1024, is_head=True), small_batch) == 0


@pytest.mark.usefixtures("hopper")
def test_matvec_is_used_where_it_was_measured() -> None:
    for table in (
        products_of(4096, 1024),
        products_of(2048, 6144),
        products_of(99, 8, is_head=True),
    ):
        assert most_tokens(table, few_tokens) == 2
    for table in (products_of(24576, 4096, is_gated=True), products_of(2560, 9728)):
        assert most_tokens(table, few_tokens) == 1


@pytest.mark.usefixtures("hopper")
def test_a_table_has_an_entry_for_every_form_of_a_kernel() -> None:
    table = products_of(6144, 1024, is_gated=True)
    assert list(table) == sorted(table)
    assert first_sizes(table) == {1, 2, 3, 17, 65, 129, 193, 257, 2048}
    borders = {few_tokens: 2, small_batch: 256, plain: 2047, gated_prefill: math.inf}
    assert {product: most_tokens(table, product) for product in borders} == borders


def test_without_kernels_every_product_is_pytorchs() -> None:
    assert Linear(64, 64).products == {math.inf: plain}
    assert first_sizes(Linear(64, 64).products) == {1}


@runs_on_hopper
@dtypes
@pytest.mark.parametrize(
    ("num_tokens", "outputs", "inputs"),
    [(5000, 384, 1024), (2049, 200, 200), (1, 8, 8), (3000, 3072, 1024), (6000, 640, 320)],
)
def test_gated_linear(num_tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Tiles that divide the weight and ones that do not; more tiles than programs.

    5 tiles of inputs are no whole turn of the 4 stages.
    """
    from nanovllm.kernels.gated_linear import gated_linear

    x, weight = randn(num_tokens, inputs, dtype=dtype), randn(2 * outputs, inputs, dtype=dtype)
    x *= inputs**-0.5
    expected = silu_and_mul(F.linear(x.double(), weight.double()))
    for _ in range(2):
        assert close(gated_linear(x, weight), expected)


@pytest.mark.usefixtures("hopper")
def test_gated_linear_is_used_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.kernels import device

    def min_tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> float:
        table = products_of(*shape, dtype=dtype, is_gated=True)
        return max(first_sizes(table)) if table[math.inf] is gated_prefill else math.inf

    assert min_tokens(6144, 1024) == min_tokens(24576, 4096) == 2048
    assert min_tokens(6144, 1024, dtype=torch.float32) == math.inf
    assert min_tokens(6152, 1024) == min_tokens(6144, 1028) == math.inf  # TMA loads no such rows
    monkeypatch.setattr(device, "is_hopper", lambda _: False)
    assert min_tokens(6144, 1024) == math.inf


def rounding_case() -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a gate over it, with sums that float16 cannot hold."""
    x = torch.ones(3, 64, dtype=torch.float16, device=DEVICE)
    weight = 32 * torch.ones(32, 64, dtype=torch.float16, device=DEVICE)
    weight[:, 0] = 33  # 2049 in all
    gate = torch.zeros_like(weight)
    gate[:, 0] = 1
    return x, weight, torch.cat([gate, weight])


@runs_kernels
def test_small_linear_rounds_where_its_twins_do() -> None:
    """After the matrix product, before what follows."""
    from nanovllm.kernels.small_linear import small_linear

    x, weight, both = rounding_case()
    residual = torch.ones(3, 32, dtype=torch.float16, device=DEVICE)
    assert torch.equal(small_linear(x, weight, residual=residual), F.linear(x, weight) + residual)
    assert torch.equal(small_linear(x, both, gated=True), silu_and_mul(F.linear(x, both)))


@runs_on_hopper
def test_kernels_for_hopper_wait_for_what_the_kernel_before_writes() -> None:
    """Launched while it still runs. Inputs take turns, so that what is left of one shows."""
    from nanovllm.kernels import fused
    from nanovllm.kernels.gated_linear import gated_linear
    from nanovllm.kernels.hopper_attention import hopper_prefill

    lengths = [1024] * 8
    tiles, dtype = query_tiles_of(lengths, lengths), torch.bfloat16
    inputs = [randn(8192, 4096, dtype=dtype) for _ in range(2)]
    norm, weight = randn(1024, dtype=dtype), randn(512, 1024, dtype=dtype)
    cos_sin = RotaryEmbedding(128, 9000, ROPE).cos_sin.to(DEVICE)
    positions = torch.arange(8192, device=DEVICE)
    slots = torch.full((8192,), -1, dtype=torch.int32, device=DEVICE)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = fused.qk_norm_rope_store(
            x, norm[:128], norm[:128], EPS, cos_sin, positions, None, None, slots, 16, 8
        )
        out = hopper_prefill(q, k, v, tiles, 128**-0.5)
        x = x.view(-1, 1024)
        return out, gated_linear(fused.rms_norm(x, norm, EPS), weight)

    expected = []
    for x in inputs:
        torch.cuda.synchronize()
        expected.append(run(x))
    for turn in range(50):
        for out, reference in zip(run(inputs[turn % 2]), expected[turn % 2], strict=True):
            assert torch.equal(out, reference)


@runs_on_hopper
def test_gated_linear_rounds_where_its_twins_do() -> None:
    from nanovllm.kernels.gated_linear import gated_linear

    x, _, both = rounding_case()
    assert torch.equal(gated_linear(x, both), silu_and_mul(F.linear(x, both)))


@runs_kernels
@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64, 100])
def test_a_layer_fills_out_and_adds_to_its_residual_once(
    num_tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    """Whichever way it takes for so many tokens."""
    layer = Linear(96, 40, bias=bias, device=DEVICE, dtype=dtype)
    small = partial(small_batch, counters=small_linear_counters(40, DEVICE))
    layer.products = {2: few_tokens, 64: small, math.inf: plain}
    for parameter in layer.parameters():
        parameter.data.normal_()
    x, residual = randn(num_tokens, 96, dtype=dtype), 30 * randn(num_tokens, 40, dtype=dtype)
    exact = F.linear(x.double(), *(parameter.double() for parameter in layer.parameters()))
    if not bias:
        out = torch.full_like(residual, math.nan)
        assert layer(x, out=out) is out
        assert close(out, exact)
    norm = RMSNorm(96, EPS, device=DEVICE, dtype=dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    assert close(layer(rms_norm(x, norm.weight, EPS)), layer(x, norm=norm))
    expected = residual.double() + exact
    assert close(layer(x, residual.clone()), expected)
    assert layer(x, residual, out=residual) is residual
    assert close(residual, expected)


@runs_kernels
@dtypes
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 64, 65])
def test_every_product_does_what_the_plain_one_does(num_tokens: int, dtype: torch.dtype) -> None:
    """With and without a norm, gated and not; of no tokens too, as the head is asked for."""
    norm = RMSNorm(96, EPS, device=DEVICE, dtype=dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = randn(num_tokens, 96, dtype=dtype)
    for kind in (Linear, GatedLinear):
        layer = kind(96, 40, device=DEVICE, dtype=dtype)
        layer.weight.data.normal_(std=0.1)
        small = partial(small_batch, counters=small_linear_counters(80, DEVICE))
        for given in (None, norm):
            layer.products = {math.inf: plain}
            expected = layer(x, norm=given)
            layer.products = {2: few_tokens, 64: small, math.inf: plain}
            found = layer(x, norm=given)
            assert found.shape == expected.shape
            assert num_tokens == 0 or close(found, expected.double())


def test_a_layer_takes_the_product_that_its_table_has_for_so_many_tokens() -> None:
    taken: list[str] = []

    def product(name: str) -> Callable[..., Tensor]:
        return lambda inputs: taken.append(name) or plain(inputs)  # type: ignore[func-returns-value]

    layer = Linear(8, 8)
    layer.weight.data.normal_()
    layer.products = {2: product("few"), 64: product("small"), math.inf: product("many")}
    for num_tokens in (0, 1, 2, 3, 64, 65, 1000):
        layer(torch.randn(num_tokens, 8))
    assert taken == ["few"] * 3 + ["small"] * 2 + ["many"] * 2


def test_launches_of_other_descriptors_are_told_apart() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from nanovllm.kernels.launch import _kind

    x = torch.empty(64, 64)
    kinds = [
        _kind(TensorDescriptor.from_tensor(tensor, block))
        for tensor in (x, x.half())
        for block in ([32, 32], [32, 64])
    ]
    assert len(set(kinds)) == 4


def test_integers_are_told_apart_only_where_triton_does() -> None:
    from nanovllm.kernels.launch import _kind

    assert _kind(5) == _kind(7)
    assert _kind(16) == _kind(4096)
    assert len({_kind(number) for number in (1, 5, 16, 2**31 - 1, 2**31, -(2**31) - 1)}) == 5
    assert _kind(True) is True


@runs_on_hopper
def test_sizes_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches with other numbers of tokens, whose descriptors differ in shape only."""
    from nanovllm.kernels import launch
    from nanovllm.kernels.gated_linear import gated_linear

    weight = randn(2 * 264, 72, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "_compiled", {})
    for num_tokens in (16, 5, 300, 3000, 3001, 1600, 5):
        x = randn(num_tokens, 72, dtype=torch.bfloat16)
        expected = silu_and_mul(F.linear(x.double(), weight.double()))
        assert close(gated_linear(x, weight), expected)
    assert len(launch._compiled) == 2  # multiples of 16, and others


@pytest.mark.usefixtures("hopper")
def test_dry_prefills_reach_what_any_step_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.kernels import hopper_attention
    from nanovllm.kernels.small_linear import MAX_TOKENS, small_linear_plan

    rng = random.Random(0)
    sizes = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (896, 1152), (4864, 896)]

    @lru_cache(None)
    def kind(num_tokens: int) -> Any:
        """Which of the linear layers' kernels so many tokens take."""
        if num_tokens > MAX_TOKENS:
            return num_tokens >= 2048
        return min(num_tokens, 3), *(
            small_linear_plan(num_tokens, *size, gated, SHARED_BYTES[90], True)
            for size in sizes
            for gated in (False, True)
        )

    monkeypatch.setattr(hopper_attention, "is_hopper", lambda _: True)
    linear_sizes: set[int] = set()
    for inputs, outputs in sizes:
        for gated in (False, True):
            linear_sizes |= first_sizes(products_of(outputs, inputs, is_gated=gated))

    def attention(lengths: list[int]) -> str:
        """Which kernel attends."""
        query = torch.empty(sum(lengths), 1, 128, dtype=torch.bfloat16)
        if hopper_attention.is_faster(query, lengths, 256):
            return "hopper"
        return "long" if max(lengths) > 1024 else "short"

    for _ in range(2000):
        choices = [2, 20, 100, 300, 400, 1100, 1500, 3000, 9000]
        tokens, seqs, length = (rng.choice(choices) for _ in range(3))
        all_sizes = linear_sizes | triton_prefill_sizes(length)
        steps = dry_prefills(all_sizes, tokens, seqs, length)
        assert all(max(step) <= length and min(step) > 0 for step in steps)
        assert all(sum(step) <= min(tokens, seqs * length) for step in steps)
        assert all(len(step) <= seqs for step in steps)
        most = min(tokens, seqs * length)
        assert set(map(kind, range(1, most + 1))) <= {kind(sum(step)) for step in steps}
        compiled = set(map(attention, steps))
        for own in {min(length, tokens), rng.randint(1, min(length, tokens))}:
            count = rng.randint(1, max(1, min(seqs, tokens // own)))
            assert attention([own] * count) in compiled


@runs_kernels
@dtypes
def test_resolve_and_embed_equals_its_twin(dtype: torch.dtype) -> None:
    from nanovllm.kernels import embedding

    weight = randn(50, 1500, dtype=dtype)
    sampled = torch.tensor([40, 41, 42], device=DEVICE)
    inputs = int32([-1 - 7, 2, 0, -1]), sampled, int32([3, 1, 256, 0])
    out, positions = embedding.resolve_and_embed(*inputs, weight)
    expected, expected_positions = resolve_and_embed(*inputs, weight)
    assert torch.equal(out, expected)
    assert torch.equal(positions, expected_positions)


@runs_kernels
@dtypes
def test_embeddings_of_a_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    from nanovllm.kernels import embedding

    weight, sampled = randn(50, 1500, dtype=dtype), torch.tensor([120, 99], device=DEVICE)
    inputs = int32([-1 - 100, -1 - 149, -1 - 150, -1, 0, 1]), sampled, int32([1, 2, 3, 4, 5, 6])
    out = torch.full((6, 1500), math.nan, dtype=dtype, device=DEVICE)
    found, _ = embedding.resolve_and_embed(*inputs, weight, 100, out)
    expected = resolve_and_embed(*inputs, weight, 100)[0]
    assert found is out
    assert torch.equal(out, expected)
    assert out[[0, 1, 4]].any(dim=1).all()
    assert not out[[2, 3, 5]].any()


@runs_kernels
@dtypes
def test_keys_of_a_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    from nanovllm.kernels import sampler

    num_seqs, size = (64, 75_968) if CUDA else (6, 2500)
    logits = 3 * randn(num_seqs, 2 * size, dtype=dtype)
    logits[0] = logits[0].round()
    logits[1] = 0.0
    logits[1, :size] = -0.0
    temperatures = torch.rand(num_seqs, device=DEVICE)
    temperatures[:3] = 0
    numbers = torch.randint(-(2**62), 2**62, (2, num_seqs), device=DEVICE)
    parts = [part.contiguous() for part in logits.split(size, dim=1)]
    keys = [
        sampler.sample(part, temperatures, *numbers, first_id=n * size)
        for n, part in enumerate(parts)
    ]
    expected = sampler.sample(logits, temperatures, *numbers)
    assert torch.equal(ids_of(torch.stack(keys).amax(0)), expected)
    for n, part in enumerate(parts):
        twin = sample(part, temperatures, *numbers, first_id=n * size)
        assert torch.equal(ids_of(keys[n]), ids_of(twin))
        assert torch.equal(keys[n][:3], twin[:3])


# ---- sums over ranks: one after the other here, and none waits, since all have been there often


class RankMemory:
    """Memory for each rank's part, behind and before some padding; and how each rank sees it."""

    def __init__(self, parts: list[Tensor], padding: int = 64) -> None:
        from nanovllm.kernels.all_reduce import MAX_PROGRAMS

        size, count = parts[0].numel(), len(parts)
        self.memories = [x.new_full((2 * padding + size,), 77) for x in parts]
        self.places = [m[padding:-padding].view(parts[0].shape) for m in self.memories]
        for place, x in zip(self.places, parts, strict=True):
            place.copy_(x)
        self.meetings = torch.empty((count, MAX_PROGRAMS, count), dtype=torch.int64, device=DEVICE)
        buffers = torch.tensor([memory.data_ptr() for memory in self.memories], device=DEVICE)
        starts = torch.tensor([part.data_ptr() for part in self.meetings], device=DEVICE)
        counts = torch.zeros(count, MAX_PROGRAMS, dtype=torch.int64, device=DEVICE)
        self.peers = [Peers(buffers, starts, counts[rank], rank, count) for rank in range(count)]

    def on_all(self, run: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        """What each rank is given."""
        found = []
        for place, peers, memory in zip(self.places, self.peers, self.memories, strict=True):
            self.meetings.fill_(1 << 62)
            found.append(run(place, peers, memory.data_ptr(), **options))
        return found


def one_shot(place: Tensor, peers: Peers, base: int, **options: Any) -> Tensor:
    """Into padded memory."""
    from nanovllm.kernels import all_reduce

    memory = place.new_full((place.numel() + 128,), 77)
    out = memory[64:-64].view(place.shape)
    assert all_reduce.one_shot(place, peers, base, out, **options) is out
    assert (memory[:64] == 77).all()
    assert (memory[-64:] == 77).all()
    return out


@runs_kernels
@dtypes
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 8), (3, 1000), (9, 1224)], ids=str)
def test_sums_over_ranks(shape: tuple[int, int], num_ranks: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels import all_reduce

    parts = [randn(*shape, dtype=dtype) for _ in range(num_ranks)]
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    ranks = RankMemory(parts)
    for out in ranks.on_all(one_shot):
        assert torch.equal(out, total.to(dtype))
    for out in ranks.on_all(all_reduce.gather):
        assert torch.equal(out, torch.cat(parts, dim=1))
    for out, place in zip(ranks.on_all(all_reduce.two_shot), ranks.places, strict=True):
        assert out is place
    for place, memory in zip(ranks.places, ranks.memories, strict=True):
        assert torch.equal(place, total.to(dtype))
        assert (memory[:64] == 77).all()
        assert (memory[-64:] == 77).all()


@runs_kernels
def test_the_largest_of_the_ranks_keys() -> None:
    keys = [torch.randint(-(2**63), 2**63 - 1, (300,), device=DEVICE) for _ in range(3)]
    for out in RankMemory(keys).on_all(one_shot, maximum=True):
        assert torch.equal(out, torch.stack(keys).amax(0))


@runs_kernels
def test_programs_of_ranks_count_their_meetings() -> None:
    """Each tells all of them, in its own place, how many times it has been there."""
    ranks = RankMemory([randn(1, 64) for _ in range(3)])
    for _ in range(2):
        ranks.on_all(one_shot)
    far = 1 << 62
    assert ranks.meetings[:, 0].tolist() == [[far, far, 2]] * 3
    assert (ranks.meetings[:, 1:] == far).all()
    assert [peers.counts[:2].tolist() for peers in ranks.peers] == [[2, 0]] * 3


# ---- compiled for GPUs that are not here

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# The elementwise kernels need next to no shared memory: any one target shows that they compile.
LAUNCHES = [(90, "elementwise")]
LAUNCHES += [
    (sm, name)
    for sm in SHARED_BYTES
    for name in ("decode", "prefill", "FP8 cache", "linear", "experts", "all-reduce")
]
LAUNCHES += [(sm, name) for sm in (89, 90, 120) for name in ("FP8 linear", "FP8 experts")]


def fp8_pool(*shape: int) -> tuple[Tensor, Tensor]:
    """A cache and its scales."""
    return torch.empty(*shape, dtype=torch.uint8), torch.empty(*shape[:-1], dtype=torch.uint8)


def launch(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the launches of one kind, on tensors that no kernel will touch."""
    from nanovllm.kernels import (
        all_reduce,
        attention,
        embedding,
        filters,
        fp8_attention,
        fused,
        gated_linear,
        gemv,
        hopper_attention,
        moe,
        sampler,
        small_linear,
    )

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    shared_bytes = SHARED_BYTES[capability]
    for module in (moe, small_linear):
        monkeypatch.setattr(module, "has_tma", lambda _: capability >= 90)
        monkeypatch.setattr(module, "shared_memory", lambda _: shared_bytes)
    lens, tables = empty(4, dtype=torch.int32), empty(4, 5, dtype=torch.int32)
    longs, cos_sin = empty(4, dtype=torch.int64), empty(9, 128, dtype=torch.float32)
    cache = empty(9, 256, 8, 128)
    if name == "decode":
        kernels = {(p.tile, p.num_warps, p.num_stages): p for p in attention.DECODE_PLANS.values()}
        for plan in kernels.values():
            attention.paged_decode(empty(4, 16, 128), cache, cache, tables, lens, 1.0, plan=plan)
        wide = empty(9, 16, 2, 256)
        attention.paged_decode(empty(4, 16, 256), wide, wide, tables, lens, 1.0)
    elif name == "FP8 cache":
        monkeypatch.setattr(attention, "shared_memory", lambda _: shared_bytes)
        monkeypatch.setattr(attention, "has_fp8", lambda _: capability >= 89)
        fp8_plans = attention.FP8_DECODE_PLANS.values()
        plans = {(p.tile, p.num_warps, p.num_stages): p for p in fp8_plans}
        for dtype, head_dim in (
            *((torch.bfloat16, head_dim) for head_dim in (128, 256, 80)),
            (torch.float16, 128),
        ):
            fp8, scales = fp8_pool(9, 256, 8, head_dim)
            how = {"k_scales": scales, "v_scales": scales}
            q = empty(4, 16, head_dim, dtype=dtype)
            for plan in plans.values() if (dtype, head_dim) == (torch.bfloat16, 128) else (None,):
                attention.paged_decode(q, fp8, fp8, tables, lens, 1.0, plan=plan, **how)
            kv = empty(300, 8, head_dim, dtype=dtype)
            fp8_attention.gather(fp8, fp8, scales, scales, tables, lens, 300, kv, kv)
        fp8, scales = fp8_pool(9, 256, 8, 128)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x, stored = empty(4, 4096, dtype=dtype), (fp8, fp8, lens, 16, 8)
            for write_key in (True, False):
                fused.qk_norm_rope_store(
                    x, x[0], x[0], EPS, cos_sin, longs, *stored, write_key, scales, scales
                )
    elif name == "experts":
        gate_up, down = empty(128, 1536, 2048), empty(128, 2048, 768)
        x = empty(4, 2048)
        routed = moe.route(empty(4, 128), 8, True)
        moe.few_tokens_experts(x, x[0], EPS, gate_up, down, *routed, x)
        moe.few_tokens_experts(x, x[0], EPS, gate_up, down, *routed, None)
        for num_tokens in (5, 500, 3000):
            x = empty(num_tokens, 2048)
            moe.grouped_experts(x, gate_up, down, empty(num_tokens, 128), 8, True, x)
        full = (empty(*size, dtype=torch.float32) for size in ((4, 96, 64), (4, 64, 48)))
        x, logits = empty(9, 64, dtype=torch.float32), empty(9, 4, dtype=torch.float32)
        moe.grouped_experts(x, *full, logits, 2, True, x)
    elif name == "FP8 linear":
        launch_fp8_linear()
    elif name == "FP8 experts":
        launch_fp8_experts()
    elif name == "all-reduce":
        for num_ranks in (2, 4):
            peers = all_reduce.Peers(longs, longs, longs, 1, num_ranks)
            for x in (empty(2, 4096), empty(2, 4096, dtype=torch.float32)):
                all_reduce.one_shot(x, peers, x.data_ptr(), torch.empty_like(x))
                all_reduce.two_shot(x, peers, x.data_ptr())
                all_reduce.gather(x, peers, x.data_ptr())
            out = torch.empty_like(longs)
            all_reduce.one_shot(longs, peers, longs.data_ptr(), out, maximum=True)
    elif name == "prefill":
        monkeypatch.setattr(attention, "has_tma", lambda _: capability >= 90)
        monkeypatch.setattr(attention, "shared_memory", lambda _: shared_bytes)
        for head_dim, longest in ((128, 300), (256, 300), (128, 2000)):
            q, kv = empty(300, 16, head_dim), empty(300, 8, head_dim)
            cache = empty(9, 256, 8, head_dim)
            attention.paged_prefill(q, cache, cache, lens, lens, longest, 1.0, tables)
            if longest == 300:
                attention.paged_prefill(q, kv, kv, lens, lens, longest, 1.0)
        if capability == 90:
            q, kv, cache = empty(300, 16, 128), empty(300, 8, 128), empty(9, 256, 8, 128)
            tiles = empty(4, 6, dtype=torch.int32)
            hopper_attention.hopper_prefill(q, kv, kv, tiles, 1.0)
            hopper_attention.hopper_prefill(q, cache, cache, tiles, 1.0, tables)
    elif name == "elementwise":
        x = empty(4, 4096)
        fused.rms_norm(x, x[0], EPS)
        fused.silu_and_mul(x)
        embedding.resolve_and_embed(lens, longs, lens, x)
        embedding.resolve_and_embed(lens, longs, lens, x, 4)
        weight = empty(128)
        fused.qk_norm_rope_store(
            x, weight, weight, EPS, cos_sin, longs, cache, cache, lens, 16, 8, write_key=True
        )
        fused.qk_norm_rope_store(x, None, None, EPS, cos_sin, longs, None, None, lens, 16, 8)
        logits, floats = empty(4, 151_936), empty(4, dtype=torch.float32)
        sampler.sample(logits, floats, longs, longs)
        sampler.sample(logits, floats, longs, longs, floats)
        sampler.sample(logits, floats, longs, longs, first_id=151_936)
        filters.kept_threshold(logits, floats, lens, floats, floats)
    else:
        x = empty(2, 4096)
        gemv.matvec(x, empty(24576, 4096), None, x[0], EPS, gated=True)
        for num_tokens in (16, 64):
            small_linear.small_linear(empty(num_tokens, 4096), empty(4096, 4096))
            small_linear.small_linear(empty(num_tokens, 4096), empty(6144, 4096))
            small_linear.small_linear(empty(num_tokens, 1024), empty(151_936, 1024))
            small_linear.small_linear(empty(num_tokens, 3072), empty(1024, 3072))
        for num_tokens in (16, 64, 128):
            small_linear.small_linear(empty(num_tokens, 4096), empty(24576, 4096), gated=True)
        for num_tokens in (128, 192, 256) if capability >= 90 else ():
            small_linear.small_linear(empty(num_tokens, 1024), empty(4096, 1024))
            small_linear.small_linear(empty(num_tokens, 3072), empty(1024, 3072))
            small_linear.small_linear(empty(num_tokens, 1024), empty(6144, 1024), gated=True)
        for outputs, inputs in ((4096, 1024), (6144, 4096)):
            full = (empty(*size, dtype=torch.float32) for size in ((64, inputs), (outputs, inputs)))
            small_linear.small_linear(*full)
        if capability == 90:
            gated_linear.gated_linear(empty(3000, 1024), empty(6144, 1024))
        gemv.matvec(empty(1, 12288), empty(4096, 12288), residual=x[:1])


def launch_fp8_linear() -> None:
    from nanovllm.kernels import fp8_rows, gemv, small_linear

    x = torch.empty(200, 12_288, dtype=torch.bfloat16)
    fp8_rows.quantize_rows(x)
    fp8_rows.quantize_rows(x, x[0], EPS)
    fp8_rows.silu_and_quantize(x, 200)
    # The rows of a weight, its inputs, what shares a scale, whether it is gated.
    for outputs, inputs, row_step, gated in (
        (24_576, 4096, 128, True),
        (4096, 12_288, 128, False),
        (2432, 2560, 64, True),
        (4608, 2560, 64, False),
    ):
        weight = Fp8Weight.empty(outputs, inputs, row_step=row_step, device=torch.device("cpu"))
        how = {"gated": gated, "scales": weight.scales}
        x = torch.empty(16, inputs, dtype=torch.bfloat16 if row_step == 128 else torch.float16)
        gemv.matvec(x[:1], weight.values, None, x[0], EPS, **how)
        small_linear.small_linear(x, weight.values, **how)
        for num_tokens in (17, 65, 129) if row_step == 128 else (129,):
            rows = Fp8Rows.empty(num_tokens, inputs, 16, x)
            small_linear.small_linear(rows, weight.values, **how)


def launch_fp8_experts() -> None:
    from nanovllm.kernels import moe

    cpu = torch.device("cpu")
    # An expert's intermediate size (FP8 are its weights where blocks fit), and numbers of tokens.
    for size, counts in ((768, (1, 100, 300, 1000, 3000)), (192, (1000, 3000)), (96, (3000,))):
        gate_up: Tensor | Fp8Weight = Fp8Weight.empty(
            128, 2 * size, 2048, row_step=size, device=cpu
        )
        if size % 64:
            gate_up = torch.empty(128, 2 * size, 2048, dtype=torch.bfloat16)
        down = Fp8Weight.empty(128, 2048, size, row_step=2048, device=cpu)
        for num_tokens in counts:
            x = torch.empty(num_tokens, 2048, dtype=torch.bfloat16)
            logits = torch.empty(num_tokens, 128, dtype=torch.bfloat16)
            if num_tokens == 1:
                routed = moe.route(logits, 8, True)
                moe.few_tokens_experts(x, x[0], EPS, gate_up, down, *routed, x)
            else:
                moe.grouped_experts(x, gate_up, down, logits, 8, True, x)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize(("capability", "name"), LAUNCHES)
def test_every_launch_fits_the_gpu(
    capability: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction

    launches: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
        launches.append((kernel, values, options))

    def compiled(kernel: JITFunction, values: dict[str, Any], options: dict[str, Any]) -> Any:
        options["launch_pdl"] = values["PDL"] = capability >= 90
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            kind = "constexpr"
            if parameter.is_constexpr or value is None:
                constants[(index,)] = value
            elif isinstance(value, Tensor):
                kind = "*" + TRITON_TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif hasattr(value, "block_shape"):
                layout = f",{value.layout!r}" if kernel.is_gluon() else ""
                kind = f"tensordesc<{TRITON_TYPES[value.base.dtype]}{value.block_shape}{layout}>"
            else:
                kind = "fp32" if isinstance(value, float) else "i32"
                if kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
        source_class = GluonASTSource if kernel.is_gluon() else ASTSource
        source = source_class(kernel, signature, constants, attributes)
        return compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    parse, parsing = ast.parse, Lock()

    def parse_alone(*args: Any, **kwargs: Any) -> ast.AST:
        """Threads that parse at once disturb each other's recursion counter (CPython 3.11)."""
        with parsing:
            return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parse_alone)
    monkeypatch.setattr(JITFunction, "run", record)
    launch(name, capability, monkeypatch)
    assert launches
    with ThreadPoolExecutor() as pool:
        binaries = list(pool.map(compiled, *zip(*launches, strict=True)))
    for (kernel, values, _), binary in zip(launches, binaries, strict=True):
        assert binary.metadata.shared <= SHARED_BYTES[capability], (kernel, capability)
        ptx = binary.asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90), kernel
        if capability >= 90:
            order = [ptx.index(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents")]
            assert order == sorted(order), kernel
        if kernel.is_gluon():  # after the barriers are made, and after what TMA or wgmma reads next
            assert ptx.count("fence.proxy.async") == 2, kernel
        if capability >= 90 and any(hasattr(v, "block_shape") for v in values.values()):
            assert "cp.async.bulk.tensor" in ptx
        # Tiles come whole, or in vectors while others are computed with; never element by element.
        if name in ("decode", "prefill", "FP8 cache") or kernel.__name__ == "_small_linear_kernel":
            assert "ld.global.b16" not in ptx, (kernel, capability)


TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.int16: "i16",
    torch.uint8: "u8",
    E4M3: "fp8e4nv",
}

"""The parts: K/V storage, the tensors of a step, attention, norms, rotary embedding, kernels."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    CheckpointFactory,
    ModelSpec,
    completions,
    random_prompts,
    rope_options,
    watched,
)
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch_layout import BatchLayout
from nanovllm.engine.decode_graphs import graph_sizes
from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import usable_on_cpu
from nanovllm.kernels.cpu import linear as cpu_linear
from nanovllm.layers import products
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import (
    BACKENDS,
    Attention,
    store_kvcache,
)
from nanovllm.layers.embed_head import resolve_and_embed
from nanovllm.layers.layernorm import RMSNorm, rms_norm
from nanovllm.layers.linear import GatedLinear, Linear
from nanovllm.layers.products import is_panels, onednn, pack, pack_for_onednn, plain, rounded_rows
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary, turns_of
from nanovllm.layers.torch_attention import (
    QUERY_ROWS,
    AttentionInputs,
    torch_decode,
    torch_prefill,
    torch_workspace,
)
from nanovllm.model_config import ModelConfig, Rope, read_json
from nanovllm.utils.context import Context

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- store_kvcache ---------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "slots",
    [
        [0],
        [15, 16],
        [63, 0, 17],
        [-1],
        [-1, 5, -1, 63, -1],
        [7, 6, 5, 4],
        [],
    ],
    ids=str,
)
def test_store_kvcache_writes_each_token_to_its_slot_and_nothing_else(
    slots: list[int], dtype: torch.dtype
) -> None:
    qkv = torch.randn(len(slots), 8, 8).to(dtype)
    key, value = qkv[:, 4:6], qkv[:, 6:]  # views of the merged projection's output
    k_cache, v_cache = torch.full((2, 4, 16, 2, 8), NAN, dtype=dtype)
    store_kvcache(key, value, k_cache, v_cache, int32(slots))
    stored = {slot: token for token, slot in enumerate(slots) if slot >= 0}
    for slot in range(64):
        block, offset = divmod(slot, 16)
        if slot in stored:
            assert torch.equal(k_cache[block, offset], key[stored[slot]])
            assert torch.equal(v_cache[block, offset], value[stored[slot]])
        else:
            assert k_cache[block, offset].isnan().all()
            assert v_cache[block, offset].isnan().all()


# --- from scheduled sequences to tensors -----------------------------------------------------


BLOCK_SIZE = 16


@pytest.fixture
def layout() -> BatchLayout:
    return BatchLayout(BLOCK_SIZE, vocab_size=2000, device=torch.device("cpu"))


def scheduled(length: int, block_table: list[int], start: int | None = None) -> ScheduledSequence:
    """Tokens 1000, 1001, ... of which `start` (decode: the last one) to the end are computed."""
    tokens = list(range(1000, 1000 + length))
    seq = Sequence(tokens, SamplingParams(), max_total_tokens=10**6)
    seq.block_table = block_table
    return ScheduledSequence(seq, length - 1 if start is None else start, length, samples=True)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64])
def test_the_decode_slot_is_that_of_the_last_token(length: int, layout: BatchLayout) -> None:
    table = [7, 2, 9, 4][: -(-length // BLOCK_SIZE)]
    inputs, key_lens = layout.decode([scheduled(length, table)])
    context = inputs.context(BLOCK_SIZE, None, key_lens)
    slot = table[(length - 1) // BLOCK_SIZE] * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
    assert context.slot_mapping.tolist() == [slot]
    assert inputs.context_lens.tolist() == [length]
    assert inputs.sources.tolist() == [-1 - (1000 + length - 1)]


def test_a_decode_batch_has_one_token_a_sequence(layout: BatchLayout) -> None:
    items = [scheduled(16, [3]), scheduled(33, [5, 0, 8]), scheduled(17, [1, 6])]
    inputs, key_lens = layout.decode(items)
    context = inputs.context(BLOCK_SIZE, None, key_lens)
    assert not context.is_prefill
    assert inputs.sources.tolist() == [-1 - 1015, -1 - 1032, -1 - 1016]
    assert context.slot_mapping.tolist() == [3 * 16 + 15, 8 * 16 + 0, 6 * 16 + 0]
    assert context.context_lens is not None
    assert context.context_lens.tolist() == context.key_lens == [16, 33, 17]
    assert context.block_tables is not None
    assert context.block_tables.tolist() == [[3, -1, -1], [5, 0, 8], [1, 6, -1]]
    tensors = (inputs.sources, context.slot_mapping, context.context_lens, context.block_tables)
    assert {tensor.dtype for tensor in tensors} == {torch.int32}


def test_a_decode_is_fed_known_ids_or_those_that_the_step_before_sampled() -> None:
    weight = torch.randn(50, 8)
    sampled = torch.tensor([40, 41, 42])
    sources = int32([-1 - 7, 2, 0, -1])
    out, positions = resolve_and_embed(sources, sampled, int32([3, 1, 256, 0]), weight)
    assert torch.equal(out, weight[[7, 42, 40, 0]])
    assert positions.tolist() == [2, 0, 255, 0]


def test_a_prefill_without_cached_keys_needs_no_block_tables(layout: BatchLayout) -> None:
    items = [scheduled(18, [4, 1], start=0), scheduled(3, [0], start=0)]
    input_ids, context = layout.prefill(items)
    positions = context.positions
    assert positions is not None
    assert context.is_prefill
    assert context.block_tables is None
    assert input_ids.tolist() == [*range(1000, 1018), 1000, 1001, 1002]
    assert positions.tolist() == [*range(18), 0, 1, 2]
    assert context.slot_mapping.tolist() == [*range(64, 80), 16, 17, 0, 1, 2]
    assert context.cu_seqlens_q is not None
    assert context.cu_seqlens_k is not None
    assert context.cu_seqlens_q.tolist() == context.cu_seqlens_k.tolist() == [0, 18, 21]
    assert context.logit_rows is not None
    assert context.logit_rows.tolist() == [17, 20]


def test_a_prefill_with_cached_keys_counts_them_among_the_keys_alone(layout: BatchLayout) -> None:
    items = [scheduled(35, [4, 1, 7], start=16), scheduled(5, [2], start=0)]
    input_ids, context = layout.prefill(items)
    positions = context.positions
    assert positions is not None
    assert input_ids.tolist() == [*range(1016, 1035), *range(1000, 1005)]
    assert positions.tolist() == [*range(16, 35), *range(5)]
    assert context.slot_mapping.tolist() == [*range(16, 32), 112, 113, 114, *range(32, 37)]
    assert context.cu_seqlens_q is not None
    assert context.cu_seqlens_k is not None
    assert context.cu_seqlens_q.tolist() == [0, 19, 24]
    assert context.cu_seqlens_k.tolist() == [0, 35, 40]
    assert context.cu_seqlens_q.dtype == context.cu_seqlens_k.dtype == torch.int32
    assert (context.max_query_len, context.max_key_len) == (19, 35)
    assert context.block_tables is not None
    assert context.block_tables.tolist() == [[4, 1, 7], [2, -1, -1]]


def test_a_chunk_that_ends_within_the_prompt_has_no_row_of_logits(layout: BatchLayout) -> None:
    chunk = ScheduledSequence(scheduled(40, [4, 1, 7]).seq, 8, 20, samples=False)
    last = scheduled(5, [2], start=0)
    _, context = layout.prefill([chunk, last])
    positions = context.positions
    assert positions is not None
    assert positions.tolist() == [*range(8, 20), *range(5)]
    assert context.slot_mapping.tolist() == [*range(72, 80), *range(16, 20), *range(32, 37)]
    assert context.key_lens == [20, 5]
    assert context.logit_rows is not None
    assert context.logit_rows.tolist() == [16]


def test_the_last_layer_ends_with_the_rows_that_are_sampled(tiny_model: Path) -> None:
    """But it stores the K and V of all tokens. Rows of a chunk that samples nothing: none."""
    with LLM(str(tiny_model), max_num_batched_tokens=32) as llm:
        assert llm.model_runner is not None
        seen: list[tuple[int, int]] = []
        layers = llm.model_runner.model.model.layers
        for index in (len(layers) - 2, len(layers) - 1):
            layers[index].mlp.register_forward_hook(
                lambda _module, inputs, _out, index=index: seen.append((index, len(inputs[0])))
            )
        cache = llm.model_runner.kv_cache.fill_(math.nan)
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        prompts = random_prompts([5, 7, 40], vocab_size=300)
        llm.generate(prompts, params, use_tqdm=False)
        before_last, last = len(layers) - 2, len(layers) - 1
        assert seen == [(before_last, 32), (last, 2), (before_last, 20), (last, 1)]
        num_stored = (~cache[:, last].isnan().any(dim=-1)).sum(dim=(1, 2, 3))
        assert num_stored.tolist() == 2 * [52 * llm.config.model_config.num_kv_heads]


# --- what was never written is never read ----------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kvcache_block_size": 16},
        {"kvcache_block_size": 256},
        {"kvcache_block_size": 16, "max_num_batched_tokens": 33},
        {"kvcache_block_size": 16, "max_model_len": 128, "num_kvcache_blocks": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_kv_slots_that_hold_no_token_never_reach_a_result(
    poison: float, options: dict[str, int], tiny_model: Path
) -> None:
    [common] = random_prompts([70], ModelSpec.vocab_size)
    prompts = [common[:n] for n in (1, 15, 16, 17, 64, 70, 70)]
    with watched(tiny_model, **options) as (llm, spy):
        assert llm.model_runner is not None
        llm.model_runner.kv_cache.fill_(poison)
        outputs = completions(llm, prompts, max_tokens=20)
        assert all(row.isfinite().all() for rows in spy.logits.values() for row in rows.values())
    with watched(tiny_model) as (llm, _):
        assert completions(llm, prompts, max_tokens=20) == outputs


def test_a_step_writes_only_the_slots_of_its_tokens(tiny_model: Path) -> None:
    with watched(tiny_model, kvcache_block_size=16) as (llm, _):
        assert llm.model_runner is not None
        cache = llm.model_runner.kv_cache
        cache.fill_(NAN)
        completions(llm, [[1] * 17, [2] * 5], max_tokens=4)
        # 17 + 3 and 5 + 3 positions: the last token of a completion is not computed.
        written = ~cache.isnan().flatten(2, 3).flatten(3)  # [2, layers, slots, features]
        assert written.any(dim=-1).sum(dim=-1).tolist() == [[28, 28], [28, 28]]
        assert written.all(dim=-1).sum(dim=-1).tolist() == [[28, 28], [28, 28]]


# --- attention -------------------------------------------------------------------------------


def naive_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """In float64, head by head, query by query: the last len(query) positions of keys."""
    out = torch.empty(query.shape, dtype=torch.float64)
    group = query.size(1) // keys.size(1)
    for row in range(len(query)):
        num_visible = len(keys) - len(query) + row + 1
        for head in range(query.size(1)):
            k, v = (x[:num_visible, head // group].double() for x in (keys, values))
            weights = (k @ query[row, head].double() * scale).softmax(dim=0)
            out[row, head] = weights @ v
    return out


class PagedBatch:
    """Random Q, K and V of some sequences; K and V in the pages of a cache that is NaN elsewhere.

    Args:
        query_lens, key_lens: of each sequence; keys include those of the queries' own positions.
        scattered: blocks in random order, else each sequence's blocks in a row.
    """

    def __init__(
        self,
        query_lens: list[int],
        key_lens: list[int],
        num_heads: int = 4,
        num_kv_heads: int = 2,
        scattered: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        head_dim = 16
        self.keys, self.values = (
            [torch.randn(n, num_kv_heads, head_dim).to(dtype) for n in key_lens] for _ in range(2)
        )
        self.queries = [torch.randn(n, num_heads, head_dim).to(dtype) for n in query_lens]
        num_blocks = [-(-n // BLOCK_SIZE) for n in key_lens]
        ids = torch.randperm(sum(num_blocks)) if scattered else torch.arange(sum(num_blocks))
        tables = [part.tolist() for part in ids.split(num_blocks)]
        cache = torch.full((2, len(ids), BLOCK_SIZE, num_kv_heads, head_dim), NAN, dtype=dtype)
        for table, keys, values in zip(tables, self.keys, self.values, strict=True):
            for position in range(len(keys)):
                block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
                cache[:, block, offset] = torch.stack((keys[position], values[position]))
        width = max(num_blocks)
        self.inputs = AttentionInputs(
            query=torch.cat(self.queries),
            key=torch.cat([k[-n:] for k, n in zip(self.keys, query_lens, strict=True)]),
            value=torch.cat([v[-n:] for v, n in zip(self.values, query_lens, strict=True)]),
            k_cache=cache[0],
            v_cache=cache[1],
            scale=0.3,
            context=Context(
                is_prefill=True,
                slot_mapping=int32([]),
                query_lens=query_lens,
                key_lens=key_lens,
                block_size=BLOCK_SIZE,
                cu_seqlens_q=int32([0, *accumulate(query_lens)]),
                cu_seqlens_k=int32([0, *accumulate(key_lens)]),
                context_lens=int32(key_lens),
                block_tables=int32([table + [-1] * (width - len(table)) for table in tables]),
                decode_workspace=torch_workspace(
                    SimpleNamespace(num_kv_heads=num_kv_heads, head_dim=head_dim),
                    len(key_lens),
                    max(key_lens),
                    {"dtype": dtype, "device": "cpu"},
                ),
            ),
        )

    def check(self, out: Tensor) -> None:
        """Compare with the naive attention of each sequence on its own."""
        sequences = zip(self.queries, self.keys, self.values, strict=True)
        expected = torch.cat([naive_attention(*seq, scale=0.3) for seq in sequences])
        tolerance = 2 * TOLERANCE[out.dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


heads = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (8, 1)])


@heads
def test_prefill_attention_without_cached_keys(num_heads: int, num_kv_heads: int) -> None:
    lengths = [1, 17, 2, 64, 5]
    batch = PagedBatch(lengths, lengths, num_heads, num_kv_heads)
    context = replace(batch.inputs.context, block_tables=None)
    batch.check(torch_prefill(batch.inputs._replace(context=context)))


@heads
@pytest.mark.parametrize("scattered", [True, False])
def test_prefill_attention_with_cached_keys(
    scattered: bool, num_heads: int, num_kv_heads: int
) -> None:
    batch = PagedBatch(
        [1, 16, 20, 7, 1, 3], [17, 48, 37, 7, 1, 16], num_heads, num_kv_heads, scattered
    )
    batch.check(torch_prefill(batch.inputs))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_prefill_attention_with_more_queries_than_a_mask_holds(extra: int) -> None:
    num_queries = QUERY_ROWS + extra
    batch = PagedBatch([num_queries], [num_queries + 40], num_heads=1, num_kv_heads=1)
    batch.check(torch_prefill(batch.inputs))


@heads
@pytest.mark.parametrize("scattered", [True, False])
def test_decode_attention(scattered: bool, num_heads: int, num_kv_heads: int) -> None:
    lengths = [1, 15, 16, 17, 32, 33, 100]
    batch = PagedBatch([1] * 7, lengths, num_heads, num_kv_heads, scattered)
    context = replace(batch.inputs.context, is_prefill=False, cu_seqlens_q=None, cu_seqlens_k=None)
    batch.check(torch_decode(batch.inputs._replace(context=context)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    batch = PagedBatch([1, 20], [17, 37], dtype=dtype)
    batch.check(torch_prefill(batch.inputs))
    batch = PagedBatch([1, 1], [17, 37], dtype=dtype)
    batch.check(torch_decode(batch.inputs))


@pytest.mark.parametrize("norm", [True, False])
def test_the_attention_layer_norms_rotates_stores_and_attends(
    norm: bool, checkpoint: CheckpointFactory
) -> None:
    """From a merged projection: as its parts one after the other, K/V stored before it attends."""
    directory = checkpoint(ModelSpec(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16))
    config = ModelConfig.from_dict(read_json(directory / "config.json"))
    rotary_emb = RotaryEmbedding(16, max_positions=32, rope=Rope("default", 1e4))
    layer = Attention(config, BACKENDS["torch"], rotary_emb)
    assert layer.scale == 0.25
    batch = PagedBatch([5, 3], [5, 19])
    k_cache, v_cache = batch.inputs.k_cache, batch.inputs.v_cache
    tables = batch.inputs.context.block_tables
    assert tables is not None
    slots = [int(tables[0, 0]) * BLOCK_SIZE + n for n in range(5)]
    slots += [int(tables[1, 1]) * BLOCK_SIZE + n for n in range(3)]
    for cache in (k_cache, v_cache):
        cache.flatten(0, 1)[slots] = NAN
    layer.k_cache, layer.v_cache = k_cache.clone(), v_cache.clone()
    context = replace(batch.inputs.context, slot_mapping=int32(slots))
    positions = torch.tensor([0, 1, 2, 3, 4, 16, 17, 18])
    context.positions, cos_sin = positions, rotary_emb.cos_sin
    qkv = torch.randn(8, 8 * 16)
    weights = (torch.rand(16) + 0.5, torch.rand(16) + 0.5) if norm else (None, None)
    out = layer(qkv, weights, context)

    q, k, v = qkv.view(8, 8, 16).split([4, 2, 2], dim=1)
    if weights[0] is not None and weights[1] is not None:
        q, k = rms_norm(q, weights[0], layer.eps), rms_norm(k, weights[1], layer.eps)
    turns = turns_of(cos_sin[positions])
    q, k = apply_rotary(q, turns), apply_rotary(k, turns)
    store_kvcache(k, v, k_cache, v_cache, int32(slots))
    assert torch.equal(layer.k_cache.nan_to_num(), k_cache.nan_to_num())
    assert torch.equal(layer.v_cache.nan_to_num(), v_cache.nan_to_num())
    inputs = AttentionInputs(q, None, v, k_cache, v_cache, layer.scale, context)
    assert torch.equal(out, torch_prefill(inputs).flatten(1))


# --- norms, activation, rotary embedding -----------------------------------------------------


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


@dtypes
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm(dtype: torch.dtype, eps: float, scale: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 3, 48) * scale).to(dtype), torch.rand(48).to(dtype)
    before = x.clone()
    out = rms_norm(x, weight, eps)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(
        out.double(), naive_rms_norm(x, weight, eps), rtol=TOLERANCE[dtype], atol=1e-6
    )


@pytest.mark.parametrize("bias", [False, True])
def test_linear_adds_its_output_to_a_residual(bias: bool) -> None:
    layer = Linear(48, 32, bias=bias)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x, residual = torch.randn(5, 48), torch.randn(5, 32)
    expected = residual + layer(x)
    torch.testing.assert_close(layer(x, residual), expected)


def test_gated_linear() -> None:
    layer = GatedLinear(48, 32)
    layer.weight.data.normal_()
    x = torch.randn(5, 48)
    gate, up = layer.weight.double().chunk(2)
    expected = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@dtypes
def test_silu_and_mul(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(7, 64) * 3).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        silu_and_mul(gate_up).double(),
        gate * gate.sigmoid() * up,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {},
    {"rope_type": "linear", "factor": 2.5},
    YARN,
    YARN | {"beta_fast": 8.0, "beta_slow": 3.0},
    YARN | {"truncate": False, "attention_factor": 1.3},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    LLAMA3 | {"original_max_position_embeddings": 8192},
    LLAMA3 | {"original_max_position_embeddings": 512, "factor": 32.0},
]


@dtypes
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_embedding_is_that_of_transformers(
    dtype: torch.dtype, theta: float, scaling: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 255, 256, 1000, 40959])
    q, k = torch.randn(7, 4, 32).to(dtype), torch.randn(7, 2, 32).to(dtype)
    sizes = {"head_dim": 32, "max_position_embeddings": 40960}
    config = Qwen3Config(**sizes, **rope_options(theta, scaling))
    cos, sin = Qwen3RotaryEmbedding(config)(q.float(), positions[None])
    expected = apply_rotary_pos_emb(q.float(), k.float(), cos[0], sin[0], unsqueeze_dim=1)
    raw = config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    rotary = RotaryEmbedding(32, 40960, ModelConfig.from_dict(raw).rope)
    for x, want in zip((q, k), expected, strict=True):
        out = apply_rotary(x, turns_of(rotary.cos_sin[positions]))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rotary_angles_are_float32_whatever_the_default_dtype() -> None:
    expected = RotaryEmbedding(32, 4096, Rope("default", 1e6)).cos_sin
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = RotaryEmbedding(32, 4096, Rope("default", 1e6)).cos_sin
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- Triton kernels, interpreted -------------------------------------------------------------


INTERPRETED_STORE = """
import json
import torch
from nanovllm.kernels.store_kvcache import store_kvcache
from nanovllm.layers.attention import store_kvcache as twin

def run(dtype, num_kv_heads, head_dim, slots, is_view):
    torch.manual_seed(0)
    if is_view:  # of the merged projection's output, as the model hands them over
        qkv = torch.randn(len(slots), 4 * num_kv_heads, head_dim).to(dtype)
        _, key, value = qkv.split([2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    else:
        key, value = torch.randn(2, len(slots), num_kv_heads, head_dim).to(dtype)
    slot_mapping = torch.tensor(slots, dtype=torch.int32)
    caches = []
    for store in (store_kvcache, twin):
        k_cache, v_cache = torch.full((2, 4, 16, num_kv_heads, head_dim), 1234.5, dtype=dtype)
        store(key, value, k_cache, v_cache, slot_mapping)
        caches.append((k_cache, v_cache))
    return all(torch.equal(*pair) for pair in zip(*caches, strict=True))

dtypes = {"float32": torch.float32, "float16": torch.float16}
results = {}
for dtype in dtypes:
    for sizes in [(2, 8), (3, 24), (1, 128)]:
        for is_view in (True, False):
            for slots in [[0], [63, 15, 16], [-1, 5, -1, 62, -1], [-1], []]:
                case = f"{dtype} {sizes} {is_view} {slots}"
                results[case] = run(dtypes[dtype], *sizes, slots, is_view)
print(json.dumps(results))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no CUDA GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.slow
def test_the_interpreted_store_kvcache_kernel_does_what_its_twin_does() -> None:
    """A process of its own, since TRITON_INTERPRET counts when triton is imported."""
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED_STORE],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
    )
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    assert len(results) == 60
    assert [case for case, is_equal in results.items() if not is_equal] == []


# --- sizes of decode graphs ------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 100, 513])
def test_padding_is_under_32_rows_or_under_the_rows_themselves(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_seqs in range(1, max_num_seqs + 1):
        padded = min(size for size in sizes if size >= num_seqs)
        assert padded - num_seqs < max(32, num_seqs)


# --- packed weights --------------------------------------------------------------------------


def test_this_torch_packs_weights_for_onednn() -> None:
    """The operators are private to torch: a version that drops them has to be noticed."""
    weight = torch.randn(24, 40)
    packed = pack_for_onednn(weight)
    assert packed.is_mkldnn
    assert packed.shape == weight.shape
    assert torch.equal(packed.to_dense(), weight)


# The kernel in C takes rows of multiples of 32.
SIZES = pytest.mark.parametrize("size", [40, 64], ids=["onednn", "panels"])


def is_packed(weight: Tensor) -> bool:
    """As this machine multiplies fastest."""
    if usable_on_cpu(weight.device, weight.size(1)) and weight.dtype == torch.float32:
        return is_panels(weight)
    return is_panels(weight) or weight.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 16, 17, 18, 100, 300])
@SIZES
def test_a_packed_layer_gives_what_a_plain_one_gives(
    size: int, num_tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_tokens)
    options = {"dtype": dtype, "device": "cpu"}
    linear, gated = Linear(size, 24, bias, **options), GatedLinear(size, 24, **options)
    norm = RMSNorm(size, 1e-6, **options)
    for parameter in (*linear.parameters(), *gated.parameters(), norm.weight):
        parameter.data.copy_((torch.randn(parameter.shape) + 0.5) * (40 / size))
    x, residual = torch.randn(num_tokens, size).to(dtype), torch.randn(num_tokens, 24).to(dtype)

    def results() -> list[Tensor]:
        found = [
            linear(x),
            linear(x, norm=norm),
            linear(x, residual=residual.clone()),
            linear(x, residual=residual.clone(), norm=norm),
            gated(x),
            gated(x, norm=norm),
        ]
        if not bias:
            out = torch.full((num_tokens, 24), NAN, dtype=dtype)
            assert linear(x, out=out, norm=norm) is out
            found.append(out)
        return found

    expected = results()
    for layer in (linear, gated):
        layer.pack()
        assert is_packed(layer.weight)
        assert layer.products != {math.inf: plain}
        assert (layer.products == {math.inf: onednn}) == layer.weight.is_mkldnn
        weight = layer.weight
        layer.pack()  # changes nothing
        assert layer.weight is weight
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(results(), expected, rtol=tolerance, atol=16 * tolerance)


@SIZES
def test_a_layer_is_unpacked_to_be_filled_anew(size: int) -> None:
    layer = GatedLinear(size, 4)
    layer.weight.copy_(torch.randn(8, size))
    layer.pack()
    layer.unpack()
    assert layer.products == {math.inf: plain}
    for _, part in layer.shards():
        part.fill_(1 / size)
    layer.pack()
    expected = torch.full((2, 4), 64 / (1 + math.exp(-8)))
    torch.testing.assert_close(layer(torch.full((2, size), 8.0)), expected)


def test_bfloat16_goes_to_the_instructions_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's, unless oneDNN has others."""
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    has: dict[str, bool] = {}
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: has["any"])
    monkeypatch.setattr(products, "has_matrix_unit", lambda: has["tiles"])
    monkeypatch.setattr(cpu_linear, "has_pairs", lambda: has["pairs"])
    for has_any, tiles, pairs, kernel in (
        (False, False, False, True),
        (False, True, True, True),
        (True, False, False, False),
        (True, False, True, True),
        (True, True, True, False),
    ):
        has.update(any=has_any, tiles=tiles, pairs=pairs)
        is_kernels = kernel and usable_on_cpu(weight.device, 64)
        assert is_panels(pack(weight)) == is_kernels
        assert is_panels(pack(weight.float())) == usable_on_cpu(weight.device, 64)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_where_onednn_is_not_there_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 4)

    def missing(_: Tensor) -> Tensor:
        raise AttributeError("no attribute '_reorder_linear_weight'")

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
        assert pack(weight) is weight
    with torch.backends.mkldnn.flags(enabled=False):  # the caller wants to do without
        assert pack(weight) is weight


def test_rows_are_rounded_up_little_and_to_few_numbers() -> None:
    rounded = [rounded_rows(number) for number in range(16385)]
    assert rounded[:17] == [*range(17)]
    assert all(number <= more <= number * 9 / 8 for number, more in enumerate(rounded))
    assert len(set(rounded)) <= 100


def test_products_of_many_sizes_keep_little_memory() -> None:
    """oneDNN's code for a size is kept, here 1 MB; there are thousands of sizes."""
    layer = Linear(200, 320)
    layer.weight.zero_()
    layer.pack()

    def anonymous_mib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) >> 10

    before = anonymous_mib()
    for num_tokens in range(1, 600):
        layer(torch.zeros(num_tokens, 200))
    assert anonymous_mib() - before < 100


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_engine_on_a_cpu_holds_each_weight_once(
    tied: bool, checkpoint: CheckpointFactory
) -> None:
    """Packed; only a tied embedding stays beside its packed head."""
    spec = ModelSpec(tied=tied)
    with LLM(str(checkpoint(spec)), device="cpu") as llm:
        assert llm.model_runner is not None
        model = llm.model_runner.model
        matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        plain_ones = {name for name, p in matrices.items() if not is_packed(p)}
        assert plain_ones == {"model.embed_tokens.weight"}
        assert len(matrices) == 2 + 4 * spec.num_layers

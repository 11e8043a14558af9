"""An FP8 cache: how K and V are rounded, and that tokens do not depend on how they are computed."""

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TINY,
    CheckpointFactory,
    ModelSpec,
    Tally,
    completions,
    greedy,
    random_prompts,
    watched,
)
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.layers import attention
from nanovllm.layers.attention import qk_norm_rope_store, select_backend, store_kvcache
from nanovllm.layers.kv_quantization import dequantize, quantize
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.torch_attention import (
    AttentionInputs,
    torch_decode,
    torch_prefill,
    torch_workspace,
)
from nanovllm.model_config import Rope
from nanovllm.utils.context import Context

LARGEST = 448
NAN_BYTE, INFINITE_SCALE = 0x7F, 0xFF


def rounded(rows: Tensor) -> Tensor:
    """What an FP8 cache holds of rows, in their dtype."""
    return dequantize(*quantize(rows), out=torch.empty_like(rows))


def all_e4m3() -> Tensor:
    """float64 [253], ascending: every number but NaN."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return numbers[~numbers.isnan()].unique()


# --- rounding --------------------------------------------------------------------------------


def up(number: float) -> float:
    """The next float32."""
    return float(torch.tensor(number).nextafter(torch.tensor(math.inf)))


PEAKS = [
    *(2.0**k for k in (-149, -140, -127, -126, -117, -20, -1, 0, 1, 8, 9, 127)),
    *(448.0 * 2.0**k for k in (-134, -126, -20, -9, -1, 0, 1, 100, 119)),
    *(0.1, 1 / 3, 447.0, 449.0, 511.0, 3.4e38, 1e-38),
]


@pytest.mark.parametrize("peak", [x for peak in PEAKS for x in (peak, up(peak))])
def test_a_scale_is_the_smallest_power_of_two_that_its_row_fits(peak: float) -> None:
    row = torch.tensor([0.0, -peak, peak / 3])
    values, exponent = quantize(row)
    scale = Fraction(2) ** (int(exponent) - 127)
    assert 1 <= int(exponent) <= 247
    assert Fraction(peak) <= LARGEST * scale
    assert int(exponent) == 1 or Fraction(peak) > LARGEST * scale / 2
    assert values.view(torch.float8_e4m3fn).float().isfinite().all()


def test_numbers_are_rounded_to_the_nearest_ties_to_even() -> None:
    torch.manual_seed(0)
    numbers = all_e4m3()
    middles = (numbers[1:] + numbers[:-1]) / 2
    for exponent in (-30, 0, 5):
        x = torch.cat([numbers, middles, middles + 1e-7, torch.randn(5000) * 100])
        x = x.float().clamp(-LARGEST, LARGEST)
        x[0] = LARGEST  # the scale is 2^exponent
        found = rounded(x * 2.0**exponent).double() * 2.0**-exponent
        distances = (x.double()[:, None] - numbers).abs()
        assert torch.equal((found - x).abs(), distances.amin(1))
        # Of two that are as near, the one whose last bit is 0: e4m3's bytes are in their order.
        codes = found.to(torch.float8_e4m3fn).view(torch.uint8)
        is_tie = (distances == distances.amin(1, keepdim=True)).sum(1) == 2
        assert is_tie.sum() >= len(middles) - 2
        assert not (codes[is_tie] & 1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_the_cache_holds_needs_no_rounding_in_16_bits(dtype: torch.dtype) -> None:
    """Rows of any bits; in float16 below 63,488."""
    torch.manual_seed(0)
    rows = torch.randint(-(2**15), 2**15, (20_000, 16), dtype=torch.int16).view(dtype)
    rows = torch.where(rows.isfinite(), rows, 0.0)
    sizes = torch.rand(len(rows), 1).mul(20).exp2().to(dtype)  # also rows of alike numbers
    rows = torch.cat([rows, torch.randn(len(rows), 16).to(dtype) / sizes])
    if dtype == torch.float16:
        rows = rows.clamp(-63_456, 63_456)
    exact = dequantize(*quantize(rows), out=torch.empty(rows.shape))
    finite = exact.isfinite().all(1)  # bfloat16's largest rows round up to infinity
    assert finite.float().mean() > 0.9
    assert torch.equal(rounded(rows)[finite].float(), exact[finite])
    assert torch.equal(rounded(rounded(rows))[finite], rounded(rows)[finite])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    rows = torch.randn(4, 3, 8)
    rows[0, 1] = 0.0
    rows[1, 0, 2], rows[2, 2, 7], rows[3, 1, 0] = math.nan, math.inf, -math.inf
    values, exponents = quantize(rows)
    assert int(exponents[0, 1]) == 1
    assert not values[0, 1].any()
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[1, 0] = bad[2, 2] = bad[3, 1] = True
    assert torch.equal(exponents == INFINITE_SCALE, bad)
    assert torch.equal(rounded(rows).isnan().all(-1), bad)
    assert torch.equal(rounded(rows).isfinite().all(-1), ~bad)


def test_the_error_of_an_element_is_a_16th_of_it_or_a_2_to_the_18th_of_the_largest() -> None:
    rows = torch.randn(1000, 128).double() * torch.rand(1000, 1).mul(40).sub(20).exp2()
    error = (rounded(rows.float()).double() - rows).abs()
    largest = rows.abs().amax(1, keepdim=True)
    assert (error <= (rows.abs() / 16).maximum(largest * 2.0**-17)).all()


# --- the store -------------------------------------------------------------------------------


def fp8_pool(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, V and their scales, where nothing lies yet."""
    caches = torch.full((2, *shape), NAN_BYTE, dtype=torch.uint8)
    scales = torch.full((2, *shape[:-1]), INFINITE_SCALE, dtype=torch.uint8)
    return (*caches, *scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_is_given_what_its_cache_holds(dtype: torch.dtype) -> None:
    """And nothing is written but the slots of its tokens."""
    qkv = torch.randn(5, 8 * 16).to(dtype)
    cos_sin = RotaryEmbedding(16, 99, Rope("default", 1e4)).cos_sin
    positions, slots = torch.arange(5), torch.tensor([63, 0, -1, 17, 5], dtype=torch.int32)
    k_cache, v_cache, k_scales, v_scales = fp8_pool(4, 16, 2, 16)
    plain = torch.empty(0)
    exact = qk_norm_rope_store(
        qkv.clone(), None, None, 1e-6, cos_sin, positions, plain, plain, slots, 4, 2
    )
    q, k, v = qk_norm_rope_store(
        qkv, None, None, 1e-6, cos_sin, positions, k_cache, v_cache, slots, 4, 2, True, k_scales,
        v_scales,
    )  # fmt: skip
    assert k is not None
    assert exact[1] is not None
    assert torch.equal(q, exact[0])
    stored = slots >= 0
    for found, before, cache, scales in (
        (k, exact[1], k_cache, k_scales),
        (v, exact[2], v_cache, v_scales),
    ):
        assert torch.equal(found, rounded(before))
        assert not torch.equal(found, before)
        held = cache.flatten(0, 1), scales.flatten(0, 1)
        values, exponents = (x[slots[stored].long()] for x in held)
        assert torch.equal(dequantize(values, exponents, found[stored].clone()), found[stored])
        assert (held[1] != INFINITE_SCALE).all(1).sum() == stored.sum()
        assert (held[0] != NAN_BYTE).all(2).all(1).sum() == stored.sum()


# --- attention -------------------------------------------------------------------------------


def context_of(query_lens: list[int], key_lens: list[int], is_prefill: bool) -> Context:
    """Sequences whose blocks of 16 lie in a row, in a pool of 1,200 blocks."""
    counts = [-(-length // 16) for length in key_lens]
    ids = torch.randperm(1200, dtype=torch.int32).split([*counts, 1200 - sum(counts)])[:-1]
    tables = torch.full((len(ids), max(counts)), -1, dtype=torch.int32)
    for row, own in zip(tables, ids, strict=True):
        row[: len(own)] = own
    return Context(
        is_prefill=is_prefill,
        slot_mapping=torch.empty(0, dtype=torch.int32),
        query_lens=query_lens,
        key_lens=key_lens,
        block_size=16,
        block_tables=tables,
        decode_workspace=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_needle_among_16000_keys_is_found(dtype: torch.dtype) -> None:
    """One key is the query's; the others' scores are by 12 lower. Its value comes back rounded."""
    torch.manual_seed(0)
    num_keys, head_dim = 16_000, 64
    for needle in (0, 7_777, num_keys - 1):
        keys, values = torch.randn(2, num_keys, 2, head_dim)
        query = torch.randn(1, 4, head_dim)
        query[:, 1::2] = query[:, ::2]  # of both heads that share a key
        for head in range(2):
            keys[needle, head] = 4 * query[0, 2 * head]
        query, keys, values = (x.to(dtype) for x in (query, keys, values))
        for step in (torch_decode, torch_prefill):
            context = context_of([1], [num_keys], step is torch_prefill)
            sizes: Any = {"num_kv_heads": 2, "head_dim": head_dim}
            config = type("Config", (), sizes)
            options = {"dtype": dtype, "device": "cpu"}
            context.decode_workspace = torch_workspace(config, 1, num_keys, options)
            k_cache, v_cache, k_scales, v_scales = fp8_pool(1200, 16, 2, head_dim)
            assert context.block_tables is not None
            slots = (context.block_tables[0, :, None] * 16 + torch.arange(16)).flatten()
            store_kvcache(
                keys.clone(), values.clone(), k_cache, v_cache, slots[:num_keys].int(), k_scales,
                v_scales,
            )  # fmt: skip
            inputs = AttentionInputs(
                query, None, values[-1:], k_cache, v_cache, 0.5, context, k_scales, v_scales
            )
            expected = rounded(values)[needle].repeat_interleave(2, 0)
            error = (step(inputs)[0] - expected).abs().amax()
            assert error < 0.02 * expected.abs().amax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [40, 6000])
def test_attention_reads_the_cache_as_it_would_read_its_numbers(
    length: int, dtype: torch.dtype
) -> None:
    """A few sequences together, and one alone."""
    lengths = [length, 33, 16, 1]
    context = context_of([1] * 4, lengths, is_prefill=False)
    config: Any = type("Config", (), {"num_kv_heads": 2, "head_dim": 64})
    options = {"dtype": dtype, "device": "cpu"}
    keys, values = torch.randn(2, 1200 * 16, 2, 64).to(dtype)
    pool = fp8_pool(1200, 16, 2, 64)
    store_kvcache(keys, values, *pool[:2], torch.arange(1200 * 16).int(), *pool[2:])
    query = torch.randn(4, 6, 64).to(dtype)
    shape = 1200, 16, 2, 64
    for step in (torch_decode, torch_prefill):
        context.decode_workspace = torch_workspace(config, 4, length, options)
        rest = 0.125, context
        found = step(AttentionInputs(query, None, values, *pool[:2], *rest, *pool[2:]))
        numbers = keys.view(shape), values.view(shape)
        assert torch.equal(found, step(AttentionInputs(query, None, values, *numbers, *rest)))


# --- the engine ------------------------------------------------------------------------------


def sampled(seed: int, max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def run(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Every other one greedy."""
    params = [sampled(n) if n % 2 else greedy(24) for n in range(len(prompts))]
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


FP8: dict[str, Any] = {"kv_cache_dtype": "fp8", "kvcache_block_size": 16, "max_model_len": 160}


def test_tokens_do_not_depend_on_chunks_prefixes_preemption_or_the_batch(tiny_model: Path) -> None:
    """Attention to this step's own keys sees what later steps find of them in the cache."""
    common, other, *tails = random_prompts([100, 33, 1, 20, 90], ModelSpec.vocab_size)
    prompts = [common, other, common + tails[0], common + tails[1], other[:16] + tails[2], [5]]
    prompts += random_prompts([40, 50, 33, 17, 60, 10, 45, 20], ModelSpec.vocab_size, seed=1)
    with watched(tiny_model, **FP8) as (llm, _):
        expected = run(llm, prompts)
        assert llm.stats()["prefix_hit_rate"] > 0
        assert run(llm, prompts) == expected  # all prefixes are known
        for prompt, tokens in zip(prompts[::2], expected[::2], strict=True):
            llm.scheduler.start_over([])
            assert completions(llm, [prompt], 24) == [tokens]
    with watched(tiny_model, **FP8, max_num_batched_tokens=33) as (llm, _):
        assert run(llm, prompts) == expected
    with watched(tiny_model, **FP8, num_kvcache_blocks=12) as (llm, _):
        assert run(llm, prompts) == expected
        assert llm.stats()["num_preemptions"] > 0


def test_slots_that_hold_no_token_never_reach_a_result(tiny_model: Path) -> None:
    prompts = random_prompts([1, 15, 16, 17, 64, 70], ModelSpec.vocab_size)
    outputs = []
    for garbage in ((0, 1), (NAN_BYTE, INFINITE_SCALE)):
        with watched(tiny_model, **FP8, max_num_batched_tokens=33) as (llm, _):
            assert llm.model_runner is not None
            llm.model_runner.kv_cache.fill_(garbage[0])
            llm.model_runner.kv_scales.fill_(garbage[1])
            outputs.append(run(llm, prompts))
            held = (llm.model_runner.kv_scales != garbage[1]).all(-1).flatten(2).sum(-1)
            # The last token of a completion is not computed.
            assert (held == sum(len(prompt) + 23 for prompt in prompts)).all()
    assert outputs[0] == outputs[1]


def test_logits_are_close_to_those_of_an_exact_cache(tally: Tally) -> None:
    """Of the trained checkpoint, at the first token."""
    prompts = random_prompts([20, 60, 100], 300)
    rows: list[Tensor] = []
    for kind in ("auto", "fp8"):
        options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
        with watched(TINY, kv_cache_dtype=kind, **options) as (llm, spy):
            completions(llm, prompts, 1)
            rows.append(torch.stack([found[0] for _, found in sorted(spy.logits.items())]))
    error = float((rows[1] - rows[0]).norm() / rows[0].norm())
    tally.maximum("FP8 cache: logits error", error)
    assert 1e-4 < error < 0.05


def test_two_ranks_give_the_tokens_of_one(checkpoint: CheckpointFactory) -> None:
    model = checkpoint(ModelSpec(vocab_size=300, num_kv_heads=2))
    prompts = random_prompts([40, 7, 90], 300)
    outputs = []
    for size in (1, 2):
        options = FP8 | {"tensor_parallel_size": size, "max_num_batched_tokens": 50}
        with LLM(str(model), device="cpu", dtype="float32", max_num_seqs=4, **options) as llm:
            outputs.append(run(llm, prompts))
            assert llm.model_runner is not None
            assert llm.model_runner.kv_cache.dtype == torch.uint8
    assert outputs[0] == outputs[1]


def test_the_pool_counts_values_and_scales(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes hold nearly twice as many tokens as in bfloat16."""
    from nanovllm.engine import model_runner

    monkeypatch.setattr(model_runner, "cpu_pool_budget", lambda least: 1 << 20)
    caplog.set_level(logging.INFO, logger="nanovllm")
    num_blocks = {}
    for kind in ("auto", "fp8"):
        options = FP8 | {"kv_cache_dtype": kind, "dtype": "bfloat16", "max_num_seqs": 512}
        with watched(tiny_model, **options) as (llm, _):
            runner = llm.model_runner
            assert runner is not None
            num_blocks[kind] = runner.num_blocks
            assert (1 << 20) * 0.99 < runner.kv_cache.nbytes + runner.kv_scales.nbytes <= 1 << 20
            assert (runner.kv_scales.shape == runner.kv_cache.shape[:-1]) == (kind == "fp8")
    assert num_blocks["fp8"] == pytest.approx(num_blocks["auto"] * 2 * 32 / 33, abs=1)
    assert "on cpu (bfloat16, attention: " in caplog.text
    assert "on cpu (fp8, attention: " in caplog.text


def test_flash_attn_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "flash_attn" or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    case = torch.device("cuda", 0), torch.bfloat16, 256, 128
    assert select_backend("auto", *case) == "flash_attn"
    assert select_backend("auto", *case, fp8_cache=True) == "torch"
    with pytest.raises(ValueError, match=r"'flash_attn' cannot be used: .* FP8 cache"):
        select_backend("flash_attn", *case, fp8_cache=True)
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    assert select_backend("auto", *case, fp8_cache=True) == "triton"

"""Logits and greedy tokens are those of transformers, however the work is scheduled.

The models are random, and other ones in each run; NANOVLLM_TEST_SEED repeats a run.
"""

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    NEAR_TIE,
    CheckpointFactory,
    Comparison,
    ModelSpec,
    Reference,
    Tally,
    compare_run,
    completions,
    greedy,
    random_prompts,
    watched,
)

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow

RUN_SEED = os.environ["NANOVLLM_TEST_SEED"]
NUM_MODELS = 12
NUM_RELATIVES = 16  # 4 Llama, 2 Mistral, 4 with YaRN, 6 with experts
MAX_LOGITS_ERROR = 1e-5  # of the largest logit
BLOCK_EDGES = [1, 2, 15, 16, 17, 255, 256, 257, 511, 513]


def random_spec(index: int) -> ModelSpec:
    """Sizes at random; each kind of model comes up whatever the seed."""
    rng = random.Random(f"{RUN_SEED}-{index}")
    qwen2 = index % 4 == 3
    num_kv_heads, group = [(4, 1), (2, 2), (1, 4), (2, 4), (1, 8), (3, 1)][index % 6]
    num_heads = num_kv_heads * group
    head_dim = rng.choice([8, 16, 24, 32])
    # Every third model: the head size that follows from the others, elsewhere another one.
    sizes = [48, 64, 72, 80]
    hidden_size = (
        num_heads * head_dim
        if index % 3 == 0
        else rng.choice([size for size in sizes if size != num_heads * head_dim])
    )
    return ModelSpec(
        kind="Qwen2" if qwen2 else "Qwen3",
        vocab_size=rng.randint(200, 600),
        hidden_size=hidden_size,
        intermediate_size=rng.choice([56, 96, 130]),
        num_layers=rng.choice([1, 2, 3]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tied=index % 2 == 0,
        attention_bias=not qwen2 and index % 5 == 0,
        rope_theta=[1e4, 1e6, 500.0][index % 3],
        rms_norm_eps=[1e-6, 1e-5, 1e-3, 1e-2][rng.randrange(4) if index % 4 else 3],
        # Without a norm on q and k, larger weights make attention so sharp that rounding alone
        # reaches 1e-5, in transformers as here.
        initializer_range=1.2 / hidden_size**0.5 if qwen2 else rng.choice([0.2, 0.3, 0.4]),
        max_shard_size="60KB" if index % 4 in (1, 3) else "5GB",
        seed=rng.randrange(10**6),
    )


def random_relative(index: int) -> ModelSpec:
    """Another kind of model, or with scaled positions or experts; otherwise as random_spec."""
    rng = random.Random(f"{RUN_SEED}-relative-{index}")
    spec = random_spec(index)
    plain = {"attention_bias": False, "initializer_range": 1.2 / spec.hidden_size**0.5}
    yarn = {"rope_type": "yarn", "factor": rng.choice([2.0, 3.5, 4.0, 8.0])}
    yarn["original_max_position_embeddings"] = rng.choice([64, 128, 200])
    if index < 4:
        scaling: dict[str, Any] = [
            {},
            {"rope_type": "linear", "factor": rng.choice([2.0, 2.5])},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            {},
        ][index]
        more = {"mlp_bias": index in (0, 3)}
        return replaced(spec, scaling, more, kind="Llama", **plain | {"attention_bias": index < 2})
    if index < 6:
        more = {"sliding_window": [None, 800][index % 2]}
        return replaced(spec, {}, more, kind="Mistral", **plain)
    if index < 10:
        details: dict[str, Any] = [
            {},
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"attention_factor": 1.2, "truncate": False},
            {"mscale": 1.0, "mscale_all_dim": 0.8},
        ][index % 4]
        if index < 8:
            return replaced(spec, yarn | details, {}, kind="Qwen3")
        return replaced(spec, yarn | details, {}, kind="Qwen2", **plain)
    num_experts, num_chosen = [(4, 1), (8, 8), (64, 8), (16, 2), (5, 3), (32, 4)][index - 10]
    more = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "moe_intermediate_size": rng.choice([24, 40, 72]),
        "norm_topk_prob": index % 2 == 0,
        "mlp_only_layers": [0] if index == 13 else [],
        "decoder_sparse_step": 2 if index in (11, 14) else 1,
    }
    sharpness = plain["initializer_range"]
    return replaced(spec, {}, more, kind="Qwen3Moe", num_layers=3, initializer_range=sharpness)


def replaced(
    spec: ModelSpec, scaling: dict[str, Any], more: dict[str, Any], **changes: Any
) -> ModelSpec:
    """A spec with changes, and keys of rope_parameters and of config.json besides."""
    more = {key: tuple(value) if isinstance(value, list) else value for key, value in more.items()}
    return dataclasses.replace(
        spec, rope=tuple(scaling.items()), more=tuple(more.items()), **changes
    )


SPECS = [random_spec(index) for index in range(NUM_MODELS)]
RELATIVES = [random_relative(index) for index in range(NUM_RELATIVES)]

every_model = pytest.mark.parametrize("spec", SPECS + RELATIVES, ids=str)
some_models = pytest.mark.parametrize("spec", [*SPECS[:3], RELATIVES[2], RELATIVES[12]], ids=str)

ReferenceFactory = Callable[[Path], Reference]


@pytest.fixture(autouse=True)
def _print_seed() -> None:
    """Shown with a failure."""
    print(f"NANOVLLM_TEST_SEED={RUN_SEED}")


def ragged_prompts(spec: ModelSpec) -> list[list[int]]:
    """16 prompts of 1 to 700 tokens, lengths at and beside the ends of blocks among them."""
    rng = random.Random(spec.seed)
    lengths = [*BLOCK_EDGES, 700, *(rng.randint(3, 690) for _ in range(5))]
    rng.shuffle(lengths)
    return random_prompts(lengths, spec.vocab_size, spec.seed)


def record(tally: Tally, found: Comparison) -> None:
    tally.count("parity: tokens compared with transformers", found.num_positions)
    tally.count("parity: near-ties let pass", found.num_near_ties)
    tally.count("parity: positions behind a near-tie of two experts", found.num_near_routes)
    tally.maximum("parity: logits error, of the logits' scale", found.max_logits_error)
    assert found.max_logits_error < MAX_LOGITS_ERROR


@every_model
def test_logits_and_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(
    spec: ModelSpec, checkpoint: CheckpointFactory, reference: ReferenceFactory, tally: Tally
) -> None:
    model = checkpoint(spec)
    prompts = ragged_prompts(spec)
    with watched(model) as (llm, spy):
        outputs = completions(llm, prompts)
        assert [len(output) for output in outputs] == [64] * 16
        record(tally, compare_run(reference(model), spy, prompts, outputs))


@some_models
@pytest.mark.parametrize(
    "options",
    [
        {"kvcache_block_size": 16},
        {"kvcache_block_size": 256, "max_num_batched_tokens": 64},
        {"kvcache_block_size": 16, "max_num_batched_tokens": 64},
        {"kvcache_block_size": 48, "max_num_batched_tokens": 301, "max_num_seqs": 3},
        {"kvcache_block_size": 800, "max_num_seqs": 1},
    ],
    ids=str,
)
def test_scheduling_options_change_no_token(
    spec: ModelSpec,
    options: dict[str, int],
    checkpoint: CheckpointFactory,
    reference: ReferenceFactory,
    tally: Tally,
) -> None:
    model = checkpoint(spec)
    prompts = ragged_prompts(spec)
    with watched(model, **options) as (llm, spy):
        outputs = completions(llm, prompts)
        record(tally, compare_run(reference(model), spy, prompts, outputs))


@every_model
def test_preemption_changes_no_token(
    spec: ModelSpec, checkpoint: CheckpointFactory, reference: ReferenceFactory, tally: Tally
) -> None:
    model = checkpoint(spec)
    rng = random.Random(spec.seed)
    lengths = [1, 16, 33, 90, *(rng.randint(2, 60) for _ in range(12))]
    prompts = random_prompts(lengths, spec.vocab_size, spec.seed)
    pool = {"max_model_len": 160, "kvcache_block_size": 16, "num_kvcache_blocks": 20}
    with watched(model, **pool, max_num_batched_tokens=rng.choice([50, 500])) as (llm, spy):
        outputs = completions(llm, prompts)
        assert llm.scheduler.num_preemptions > 0
        tally.count("parity: preemptions", llm.scheduler.num_preemptions)
        print(f"{llm.scheduler.num_preemptions} preemptions")
        # A preempted sequence keeps its tokens: none is sampled a second time.
        assert sum(item.samples for batch in spy.batches for item in batch.items) == 16 * 64
        record(tally, compare_run(reference(model), spy, prompts, outputs))


@some_models
def test_prefixes_shared_within_a_batch_change_no_token(
    spec: ModelSpec, checkpoint: CheckpointFactory, reference: ReferenceFactory, tally: Tally
) -> None:
    model = checkpoint(spec)
    common, other, *tails = random_prompts([300, 33, 1, 20, 150], spec.vocab_size, spec.seed)
    prompts = [common, other, common, common + tails[0], common + tails[1], common[:144] + tails[2]]
    with watched(model, kvcache_block_size=16) as (llm, spy):
        outputs = completions(llm, prompts, max_tokens=24)
        cached = [seq.num_cached_tokens for _, seq in sorted(spy.seqs.items())]
        print(f"reused: {cached}")
        # At least the last token is computed: of 300 tokens, the first 18 blocks can be shared.
        assert cached == [0, 0, 288, 288, 288, 144]
        tally.count("parity: tokens reused, same batch", sum(cached))
        record(tally, compare_run(reference(model), spy, prompts, outputs))


@some_models
def test_equal_tokens_behind_different_prefixes_are_not_shared(
    spec: ModelSpec, checkpoint: CheckpointFactory, reference: ReferenceFactory, tally: Tally
) -> None:
    model = checkpoint(spec)
    a, b, tail = random_prompts([16, 16, 5], spec.vocab_size, spec.seed)
    prompts = [a + b + tail, b + tail, b + a + tail, a + a + b + tail]
    with watched(model, kvcache_block_size=16) as (llm, spy):
        outputs = completions(llm, prompts, max_tokens=24)
        cached = [seq.num_cached_tokens for _, seq in sorted(spy.seqs.items())]
        assert cached == [0, 0, 16, 16]
        record(tally, compare_run(reference(model), spy, prompts, outputs))


@some_models
@pytest.mark.parametrize("chunk", [64, 16384])
def test_prefixes_of_an_earlier_call_change_no_token(
    spec: ModelSpec,
    chunk: int,
    checkpoint: CheckpointFactory,
    reference: ReferenceFactory,
    tally: Tally,
) -> None:
    model = checkpoint(spec)
    first, question = random_prompts([200, 37], spec.vocab_size, spec.seed)
    with watched(model, kvcache_block_size=16, max_num_batched_tokens=chunk) as (llm, spy):
        [answer] = completions(llm, [first], max_tokens=40)
        record(tally, compare_run(reference(model), spy, [first], [answer]))
        # A conversation: the prompt and the answer of the turn before come again.
        prompts = [first + answer + question, first, first + question]
        outputs = completions(llm, prompts, max_tokens=24)
        cached = [seq.num_cached_tokens for _, seq in sorted(spy.seqs.items())][1:]
        print(f"reused: {cached}")
        # 239 tokens of the first turn were computed: all but the last one of the answer.
        assert cached == [224, 192, 192]
        tally.count("parity: tokens reused, earlier call", sum(cached))
        record(tally, compare_run(reference(model), spy, prompts, outputs))


def test_a_reused_prefix_is_not_computed_again(checkpoint: CheckpointFactory) -> None:
    [prompt] = random_prompts([320], SPECS[0].vocab_size)
    with watched(checkpoint(SPECS[0]), kvcache_block_size=16) as (llm, spy):
        completions(llm, [prompt, prompt], max_tokens=1)
        assert spy.num_prefill_tokens == 320 + 16
        completions(llm, [prompt], max_tokens=1)
        assert spy.num_prefill_tokens == 320 + 16 + 16


@some_models
def test_tokens_are_those_of_transformers_generate(
    spec: ModelSpec, checkpoint: CheckpointFactory, reference: ReferenceFactory
) -> None:
    model = checkpoint(spec)
    prompts = random_prompts([5, 40], spec.vocab_size, spec.seed)
    with LLM(str(model), device="cpu", max_model_len=100, max_num_seqs=4) as llm:
        outputs = completions(llm, prompts, max_tokens=32)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference(model).model.generate(
            torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
        expected = expected[0, len(prompt) :].tolist()
        same = next((n for n in range(32) if output[n] != expected[n]), 32)
        if same < 32:  # allowed where the two best logits are as good as equal
            best = reference(model).logits(prompt, output)[same].topk(2).values
            assert best[0] - best[1] < NEAR_TIE * best[0].abs()


@pytest.mark.parametrize(
    ("dtype", "max_error"), [("bfloat16", 0.1), ("float16", 0.01)], ids=["bfloat16", "float16"]
)
def test_half_precision_agrees_where_the_best_token_is_clear(
    dtype: str,
    max_error: float,
    checkpoint: CheckpointFactory,
    reference: ReferenceFactory,
    tally: Tally,
) -> None:
    """Clear: the float32 gap of the two best is over twice the error of the logits."""
    model = checkpoint(ModelSpec(num_layers=1, rms_norm_eps=1e-3, file_dtype=dtype))
    prompts = random_prompts([1, 16, 40, 130], ModelSpec.vocab_size)
    num_clear = num_positions = 0
    with watched(model, dtype=dtype, kvcache_block_size=16) as (llm, spy):
        outputs = completions(llm, prompts)
        seqs = [seq for _, seq in sorted(spy.seqs.items())]
        for prompt, output, seq in zip(prompts, outputs, seqs, strict=True):
            logits = reference(model).logits(prompt, output)
            rows = [spy.logits[seq.seq_id][n] for n in range(len(output))]
            error = (torch.stack(rows) - logits).abs().max()
            assert error < max_error * logits.abs().max()
            tally.maximum(f"parity: logits error in {dtype}", float(error / logits.abs().max()))
            best = logits.topk(2)
            is_clear = best.values[:, 0] - best.values[:, 1] > 2 * error
            is_equal = best.indices[:, 0] == torch.tensor(output)
            assert is_equal[is_clear].all()
            num_clear += int(is_clear.sum())
            num_positions += len(output)
    tally.count(f"parity: positions not clear in {dtype}", num_positions - num_clear)
    assert num_clear > num_positions / 2


def test_a_greedy_request_is_untouched_by_sampled_ones_beside_it(
    checkpoint: CheckpointFactory, reference: ReferenceFactory
) -> None:
    model = checkpoint(SPECS[1])
    prompts = random_prompts([20, 20, 20], SPECS[1].vocab_size)
    hot = SamplingParams(temperature=1.5, max_tokens=40, ignore_eos=True)
    with LLM(str(model), device="cpu", max_model_len=100, max_num_seqs=4) as llm:
        outputs = llm.generate(prompts, [hot, greedy(40), hot], use_tqdm=False)
    reference(model).compare(prompts[1], outputs[1]["token_ids"])

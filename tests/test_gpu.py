"""The engine on a CUDA GPU, against transformers on the same GPU."""

import importlib.util
import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    NEAR_TIE,
    TINY,
    CheckpointFactory,
    ModelSpec,
    Tally,
    completions,
    load_tasks,
    random_prompts,
)
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sampling import SamplingTensors
from nanovllm.layers import fp8
from nanovllm.layers.attention import BACKENDS as ATTENTION_BACKENDS
from nanovllm.layers.attention import AttentionInputs
from nanovllm.layers.attention import store_kvcache as store_kvcache_twin
from nanovllm.layers.filters import kept_threshold
from nanovllm.utils.context import Context

pytestmark = pytest.mark.gpu

MIB = 1 << 20
has_flash_attn = importlib.util.find_spec("flash_attn") is not None
BACKENDS = [
    pytest.param(
        "flash_attn", marks=pytest.mark.skipif(not has_flash_attn, reason="no flash-attn")
    ),
    "triton",
    "torch",
]
HALF_DTYPES = [torch.bfloat16, torch.float16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def engine(**options: Any) -> LLM:
    """The tiny checkpoint; few sizes of graphs, so that it starts quickly."""
    defaults = {"max_num_seqs": 64, "max_model_len": 1024, "gpu_memory_utilization": 0.15}
    return LLM(str(TINY), **(defaults | options))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """64 chat prompts of all families, fresh in every run."""
    tasks = load_tasks()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"prompts of seed {seed}")
    samples = [s for family in tasks.FAMILIES for s in tasks.held_out(family, 5, seed)][:64]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.prompt}], tokenize=False, add_generation_prompt=True
        )
        for sample in samples
    ]
    return [tokenizer.encode(text) for text in texts]


class GpuReference:
    """A checkpoint in transformers on the GPU, in float32 and in a half precision."""

    def __init__(self, dtype: torch.dtype, model: Path = TINY) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.exact = load(model, dtype=torch.float32).cuda().eval()
        self.rounded = load(model, dtype=dtype).cuda().eval()

    @torch.inference_mode()
    def logits(self, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
        """float32 [len(completion), vocab_size] by the exact and by the rounded model."""
        tokens = torch.tensor([(prompt + completion)[:-1]], device="cuda")
        keep = len(completion)
        return tuple(
            model(tokens, logits_to_keep=keep, use_cache=False).logits[0].float()
            for model in (self.exact, self.rounded)
        )


class TokenCounts(NamedTuple):
    """Of completions' positions: all, near-ties with another choice, and others with another."""

    num_positions: int
    num_near_ties: int
    num_others: int


def compare_tokens(
    reference: GpuReference,
    prompts: list[list[int]],
    outputs: list[list[int]],
    num_errors: float = 1,
) -> TokenCounts:
    """Whether each token is transformers' choice in the same precision, position by position.

    A near-tie: the float32 gap of the two choices is below the logits' error that rounding makes
    in transformers itself.

    Args:
        num_errors: how many such errors the gap may be.
    """
    num_positions = num_near_ties = num_others = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        exact, rounded = reference.logits(prompt, output)
        error = (rounded - exact).abs().max()
        chosen = torch.tensor(output, device="cuda")
        best = rounded.argmax(dim=-1)
        gaps = exact.gather(1, best[:, None])[:, 0] - exact.gather(1, chosen[:, None])[:, 0]
        differs = best != chosen
        is_near = gaps.abs() <= num_errors * error
        num_positions += len(output)
        num_near_ties += int((differs & is_near).sum())
        num_others += int((differs & ~is_near).sum())
    return TokenCounts(num_positions, num_near_ties, num_others)


def assert_equal_tokens(
    reference: GpuReference, prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[int, int]:
    """Each token is transformers' choice, but for near-ties. Returns the positions, and those."""
    found = compare_tokens(reference, prompts, outputs)
    assert found.num_others == 0
    return found.num_positions, found.num_near_ties


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_equal_transformers(
    prompts: list[list[int]], backend: str, dtype: torch.dtype, tally: Tally
) -> None:
    asked = prompts[:24] if backend == "torch" else prompts
    with engine(attention_backend=backend, dtype=name_of(dtype)) as llm:
        outputs = completions(llm, asked, max_tokens=100)
    positions, passed = assert_equal_tokens(GpuReference(dtype), asked, outputs)
    tally.count(f"GPU {backend} {name_of(dtype)}: positions compared", positions)
    tally.count(f"GPU {backend} {name_of(dtype)}: near-ties let pass", passed)


EXPERTS = (("num_experts", 16), ("num_experts_per_tok", 4), ("moe_intermediate_size", 96))
EXPERTS_BUT_IN_ONE = ModelSpec("Qwen3Moe", num_layers=3, more=(*EXPERTS, ("mlp_only_layers", (1,))))
YARN = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 128))
LLAMA3 = (
    *(("rope_type", "llama3"), ("factor", 8.0), ("original_max_position_embeddings", 128)),
    *(("low_freq_factor", 1.0), ("high_freq_factor", 4.0)),
)
RELATIVES = [
    ModelSpec("Qwen3Moe", num_layers=3, more=(*EXPERTS, ("norm_topk_prob", True))),
    EXPERTS_BUT_IN_ONE,
    ModelSpec("Qwen3", rope=YARN),
    ModelSpec("Llama", rope=LLAMA3, attention_bias=True, more=(("mlp_bias", True),), tied=True),
    ModelSpec("Mistral", num_kv_heads=4),
]
relatives = pytest.mark.parametrize(
    "spec", [replace(spec, initializer_range=0.15) for spec in RELATIVES], ids=str
)


@relatives
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_other_models_equal_transformers(
    spec: ModelSpec, dtype: torch.dtype, checkpoint: CheckpointFactory, tally: Tally
) -> None:
    """With graphs, and in chunks. Rounding alone may choose other experts now and then."""
    model = checkpoint(spec)
    reference = GpuReference(dtype, model)
    lengths = [1, 2, 16, 17, 60, 255, 256, 257, 400, 700, *range(20, 34)]
    asked = random_prompts(lengths, spec.vocab_size, seed=5)
    options = {"dtype": name_of(dtype), "max_model_len": 1024, "gpu_memory_utilization": 0.15}
    for special in ({}, {"enforce_eager": True, "max_num_batched_tokens": 300}):
        with LLM(str(model), max_num_seqs=len(asked), **options, **special) as llm:
            outputs = completions(llm, asked, max_tokens=60)
        found = compare_tokens(reference, asked, outputs)
        for what, number in zip(("positions", "near-ties", "others"), found, strict=True):
            tally.count(f"GPU {spec.kind} {name_of(dtype)}: {what}", number)
        assert found.num_others <= (found.num_positions // 200 if "Moe" in spec.kind else 0)


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["overlapped", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_depend_on_scheduling(
    prompts: list[list[int]], backend: str, enforce_eager: bool, tally: Tally
) -> None:
    """Chunks, prefix hits and preemption: each run against transformers, as above."""
    if backend == "torch" and not enforce_eager:
        pytest.skip("has no CUDA graphs")
    reference = GpuReference(torch.bfloat16)
    # A long common prefix, so that there are full blocks to share and chunks that see old keys.
    prefix = random_prompts([600], vocab_size=500, seed=1)[0]
    longer = [prefix[: 300 + 20 * i] + prompt for i, prompt in enumerate(prompts[:8])]
    options = {"attention_backend": backend, "dtype": "bfloat16", "enforce_eager": enforce_eager}
    for special, asked, max_tokens in (
        ({"max_num_batched_tokens": 64}, longer, 40),
        ({"max_num_seqs": 7}, longer, 40),
        ({"num_kvcache_blocks": 7}, prompts[:8], 600),
    ):
        with engine(**options, **special) as llm:
            outputs = completions(llm, asked, max_tokens=max_tokens)
            if "num_kvcache_blocks" in special:
                assert llm.scheduler.num_preemptions > 0
                tally.count("GPU: preemptions", llm.scheduler.num_preemptions)
        positions, passed = assert_equal_tokens(reference, asked, outputs)
        tally.count("GPU, scheduling: positions compared", positions)
        tally.count("GPU, scheduling: near-ties let pass", passed)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_fp8_cache(prompts: list[list[int]], dtype: torch.dtype, tally: Tally) -> None:
    """Graphs, single launches, chunks, preemption, and the torch back end give the same tokens.

    But where rounding decides: in 16 bits another shape may round K otherwise, and that can move it
    by one step of e4m3. Whatever lies in slots that nothing was written to, it is not read.
    """
    prefix = random_prompts([600], vocab_size=500, seed=1)[0]
    asked = [prefix[: 300 + 20 * i] + prompt for i, prompt in enumerate(prompts[:8])]
    asked += prompts[8:24]
    options = {"kv_cache_dtype": "fp8", "dtype": name_of(dtype)}
    outputs = []
    for special in (
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 64},
        {"num_kvcache_blocks": 12},
        {"attention_backend": "torch"},
        {"kv_cache_dtype": "auto"},
    ):
        with engine(**options | special) as llm:
            assert llm.model_runner is not None
            is_fp8 = "kv_cache_dtype" not in special
            llm.model_runner.kv_cache.fill_(0x7F if is_fp8 else float("nan"))
            llm.model_runner.kv_scales.fill_(0xFF)
            outputs.append(completions(llm, asked, max_tokens=40))
    for what, others in zip(
        ("eager", "chunks", "few blocks", "torch", "exact cache"), outputs[1:], strict=True
    ):
        same = sum(a == b for a, b in zip(outputs[0], others, strict=True))
        tally.count(f"GPU, FP8 cache {name_of(dtype)}: of 24, as with {what}", same)
        assert same >= (16 if what == "exact cache" else 21), what


@pytest.mark.usefixtures("clean_gpu")
def test_an_fp8_pool_holds_nearly_twice_as_many_tokens() -> None:
    num_blocks = []
    for kind in ("auto", "fp8"):
        with engine(kv_cache_dtype=kind, dtype="bfloat16", enforce_eager=True) as llm:
            assert llm.model_runner is not None
            num_blocks.append(llm.model_runner.num_blocks)
    assert num_blocks[1] > 1.85 * num_blocks[0]


def test_any_number_of_sequences_has_its_graph(prompts: list[list[int]]) -> None:
    """Also where max_num_seqs is no multiple of the captured sizes; padding changes nothing."""
    reference = GpuReference(torch.bfloat16)
    with engine(max_num_seqs=37, dtype="bfloat16") as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.runs_ahead
        for count in (1, 2, 3, 5, 8, 9, 17, 36, 37, 64):
            outputs = completions(llm, prompts[:count], max_tokens=20)
            assert_equal_tokens(reference, prompts[:count], outputs)


# What the filters keep is among the 15 likeliest, so that 20 log-probabilities tell what it is.
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_k": 15, "top_p": 0.8},
    {"top_k": 15, "min_p": 0.1},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.01},
]


def hot(count: int, filters: list[dict[str, Any]], logprobs: int | None) -> list[SamplingParams]:
    """Seeded requests of equal length, with every filter in turn."""
    common: dict[str, Any] = {"temperature": 2.0, "max_tokens": 40, "ignore_eos": True}
    return [
        SamplingParams(seed=i, logprobs=logprobs, **common, **filters[i % len(filters)])
        for i in range(count)
    ]


def sampled(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(prompts[: len(params)], params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["overlapped", "plain"])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_tokens_come_from_what_the_filters_keep(
    prompts: list[list[int]], count: int, enforce_eager: bool
) -> None:
    """Of each step's own logits, as far as the log-probabilities show them."""
    params = hot(count + 1, FILTERS, logprobs=20)[1:]
    with engine(dtype="bfloat16", enforce_eager=enforce_eager) as llm:
        outputs = llm.generate(prompts[:count], params, use_tqdm=False)
    for output, own in zip(outputs, params, strict=True):
        for token, logprobs in zip(output["token_ids"], output["logprobs"], strict=True):
            if not own.top_k:
                continue
            asked = (torch.tensor([value]) for value in (own.top_k, 1.001 * own.top_p, own.min_p))
            likeliest = torch.tensor([list(logprobs.values())])
            threshold = kept_threshold(likeliest, torch.tensor([own.temperature]), *asked)
            assert logprobs[token] >= threshold - 1e-3


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["overlapped", "plain"])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_logprobs_are_those_of_transformers(
    prompts: list[list[int]], count: int, enforce_eager: bool, tally: Tally
) -> None:
    """No further from float32 than twice what transformers is in the same precision."""
    reference = GpuReference(torch.bfloat16)
    params = hot(count, [{}, {"top_k": 5}], logprobs=5)
    with engine(dtype="bfloat16", enforce_eager=enforce_eager) as llm:
        outputs = llm.generate(prompts[:count], params, use_tqdm=False)
    error = rounding = 0.0
    for prompt, output in zip(prompts, outputs, strict=False):
        exact, rounded = (
            logits.log_softmax(dim=-1).cpu()
            for logits in reference.logits(prompt, output["token_ids"])
        )
        for row, logprobs in enumerate(output["logprobs"]):
            assert next(iter(logprobs)) == output["token_ids"][row]
            ids, values = list(logprobs), torch.tensor(list(logprobs.values()))
            error = max(error, float((values - exact[row, ids]).abs().max()))
            rounding = max(rounding, float((rounded[row, ids] - exact[row, ids]).abs().max()))
    tally.maximum("GPU bfloat16: error of logprobs", error)
    tally.maximum("GPU bfloat16: error of logprobs in transformers", rounding)
    assert error < 2 * rounding


def test_seeded_requests_repeat_and_do_not_see_their_neighbours_filters(
    prompts: list[list[int]],
) -> None:
    with engine(dtype="bfloat16") as llm:
        mixed = sampled(llm, prompts, hot(64, FILTERS, logprobs=None))
        assert sampled(llm, prompts, hot(64, FILTERS, logprobs=None)) == mixed
        assert sampled(llm, prompts, hot(64, FILTERS, logprobs=3)) == mixed
        plain = sampled(llm, prompts, hot(64, [{}], logprobs=None))
    assert plain[:: len(FILTERS)] == mixed[:: len(FILTERS)]
    assert plain != mixed


def test_seeds_repeat_across_batch_sizes_as_far_as_logits_do(
    prompts: list[list[int]], tally: Tally
) -> None:
    """In float32 always; in bfloat16 rounding may move a draw, and then what follows differs."""
    params = hot(64, FILTERS, logprobs=None)
    for dtype in ("float32", "bfloat16"):
        with engine(dtype=dtype) as llm:
            together = sampled(llm, prompts, params)
            num_equal = 0
            for first in range(0, 16, 4):
                apart = sampled(llm, prompts[first:], params[first : first + 4])
                pairs = zip(apart, together[first:], strict=False)
                num_equal += sum(one == other for one, other in pairs)
        tally.count(f"GPU {dtype}: of 16 seeded completions equal in another batch", num_equal)
        assert num_equal == 16 if dtype == "float32" else num_equal >= 4


def test_a_stop_id_seen_late_ends_the_request_there(prompts: list[list[int]]) -> None:
    """The overlapped loop computes one token more; it is not in the result."""
    with engine(enforce_eager=True) as plain, engine() as overlapped:
        params = SamplingParams(temperature=0.0, max_tokens=300)
        expected = plain.generate(prompts, params, use_tqdm=False)
        assert {output["finish_reason"] for output in expected} == {"stop"}
        assert overlapped.generate(prompts, params, use_tqdm=False) == expected
        blocks = overlapped.scheduler.block_manager
        assert blocks.num_free_blocks == blocks.num_blocks


LARGE_HEADS = ModelSpec(head_dim=128)
EVEN = ModelSpec(hidden_size=512, intermediate_size=1024, head_dim=128)
EVEN_EXPERTS = replace(
    EXPERTS_BUT_IN_ONE, hidden_size=512, intermediate_size=1024, head_dim=128,
    more=(*EXPERTS_BUT_IN_ONE.more, ("moe_intermediate_size", 256)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("max_num_seqs", "spec", "formats"),
    [
        (1, ModelSpec(), ()),
        (100, ModelSpec(), ()),
        (100, LARGE_HEADS, ()),
        (100, LARGE_HEADS, ("kv_cache_dtype",)),
        (100, EXPERTS_BUT_IN_ONE, ()),
        (300, EVEN, ("quantization",)),
        (300, EVEN_EXPERTS, ("quantization", "kv_cache_dtype")),
    ],
    ids=str,
)
def test_nothing_is_compiled_after_start_up(
    checkpoint: CheckpointFactory,
    max_num_seqs: int,
    spec: ModelSpec,
    formats: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever lengths and numbers of sequences come: the first run is as fast as the second."""
    from triton import knobs

    compiled: list[str] = []

    def listen(*, src: Any, **_: Any) -> None:
        compiled.append(src.name)

    model = checkpoint(replace(spec, max_position_embeddings=4096))
    options: dict[str, Any] = {"max_num_seqs": max_num_seqs, "gpu_memory_utilization": 0.15}
    options |= dict.fromkeys(formats, "fp8")
    monkeypatch.setattr(fp8, "is_small", lambda shape: False)  # what is quantised stays so
    with LLM(str(model), dtype="bfloat16", **options) as llm:
        knobs.compilation.listener = listen
        try:
            few = [[1], [1, 2, 3], [65] * 5, [130], [200], [17] * 99, [7] * 150, [7] * 280]
            # With 18,000 tokens the last prompt is computed in two chunks.
            for lengths in (*few, [700, 1, 64], [3000], [1100] * 9, [3000] * 6):
                prompts = random_prompts(lengths, vocab_size=300)
                completions(llm, prompts, max_tokens=3)
                completions(llm, [[*prompt, 1, 2] for prompt in prompts], max_tokens=3)
        finally:
            knobs.compilation.listener = None
    assert compiled == []


@pytest.mark.parametrize("head_dim", [32, 128])
def test_long_contexts_equal_transformers(checkpoint: CheckpointFactory, head_dim: int) -> None:
    """32,000 tokens, in two chunks: the error of the logits is that of the rounding."""
    spec = ModelSpec(head_dim=head_dim, max_position_embeddings=40_960)
    model = checkpoint(spec)
    prompt = random_prompts([32_000], spec.vocab_size)[0]
    options = {"dtype": "bfloat16", "max_model_len": 33_000, "gpu_memory_utilization": 0.15}
    logits: list[Tensor] = []
    with LLM(str(model), enforce_eager=True, **options) as llm:
        assert llm.model_runner is not None
        sample = llm.model_runner.sampler.sample

        def keep(found: Tensor, how: SamplingTensors) -> None:
            if len(found):  # a chunk samples nothing
                logits.append(found.float().clone())
            sample(found, how)

        llm.model_runner.sampler.sample = keep
        output = completions(llm, [prompt], max_tokens=16)[0]
    exact, rounded = GpuReference(torch.bfloat16, model).logits(prompt, output)
    found = torch.cat(logits)
    assert found.shape == exact.shape
    assert (found - exact).norm() < 1.5 * (rounded - exact).norm()
    with LLM(str(model), **options) as llm:
        assert completions(llm, [prompt], max_tokens=1)[0] == output[:1]


@pytest.mark.parametrize(
    "spec", [ModelSpec(), replace(RELATIVES[0], initializer_range=0.15)], ids=str
)
def test_float32_on_cuda_is_exact(checkpoint: CheckpointFactory, spec: ModelSpec) -> None:
    model = checkpoint(spec)
    prompts = random_prompts([1, 15, 16, 17, 255, 256, 257, 700], vocab_size=307, seed=3)
    exact = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()
    with LLM(str(model), dtype="float32", gpu_memory_utilization=0.15) as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.backend == "torch"
        outputs = completions(llm, prompts, max_tokens=64)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([(prompt + output)[:-1]], device="cuda")
        with torch.inference_mode():
            logits = exact(tokens, logits_to_keep=len(output)).logits[0]
        chosen = logits.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0]
        gaps = (logits.max(dim=-1).values - chosen) / logits.abs().max()
        assert gaps.max() < NEAR_TIE


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_cache_never_reaches_a_result(prompts: list[list[int]], backend: str) -> None:
    with engine(attention_backend=backend, gpu_memory_utilization=0.1) as llm:
        assert llm.model_runner is not None
        llm.model_runner.kv_cache.zero_()
        expected = completions(llm, prompts[:16], max_tokens=40)
        llm.scheduler.start_over([])
        llm.model_runner.kv_cache.fill_(float("nan"))
        assert completions(llm, prompts[:16], max_tokens=40) == expected


@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=name_of)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (2, 80), (8, 128)])
def test_store_kvcache_equals_its_twin(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    from nanovllm.kernels.store_kvcache import store_kvcache

    qkv = torch.randn(300, 5 * heads, head_dim, device="cuda", dtype=dtype)
    key, value = qkv[:, heads : 2 * heads], qkv[:, 3 * heads : 4 * heads]  # strided views
    slots = torch.randperm(40 * 16, device="cuda")[:300].int()
    slots[::7] = -1
    caches = torch.full((4, 40, 16, heads, head_dim), float("nan"), device="cuda", dtype=dtype)
    store_kvcache(key, value, caches[0], caches[1], slots)
    store_kvcache_twin(key, value, caches[2], caches[3], slots)
    bits = caches.view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert torch.equal(bits[:2], bits[2:])
    assert torch.isnan(caches[0]).any()


def test_store_kvcache_reaches_slots_past_2_to_the_31() -> None:
    from nanovllm.kernels.store_kvcache import store_kvcache

    num_blocks = (1 << 31) // (256 * 1024) + 2
    caches = torch.zeros(2, num_blocks, 256, 8, 128, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.float16)
    last = num_blocks * 256 - 1
    assert last * 1024 > 1 << 31
    slots = torch.tensor([last], device="cuda", dtype=torch.int32)
    store_kvcache(key, value, caches[0], caches[1], slots)
    assert torch.equal(caches[0, -1, -1], key[0])
    assert torch.equal(caches[1, -1, -1], value[0])


@pytest.mark.usefixtures("clean_gpu")
def test_pool_is_the_engines_share_of_the_gpu() -> None:
    """Whatever others hold: it limits what is free, but is not charged to the engine."""
    total = torch.cuda.get_device_properties(0).total_memory
    alone = engine(gpu_memory_utilization=0.3)
    assert alone.model_runner is not None
    size = alone.model_runner.kv_cache.nbytes
    assert 0.25 * total < size <= 0.3 * total
    alone.exit()
    someone_elses = torch.empty(int(0.4 * total), dtype=torch.uint8, device="cuda")
    beside = engine(gpu_memory_utilization=0.3)
    assert beside.model_runner is not None
    assert abs(beside.model_runner.kv_cache.nbytes - size) < 512 * MIB
    beside.exit()
    del someone_elses


@pytest.mark.usefixtures("clean_gpu")
def test_two_engines_share_a_gpu_by_halves(prompts: list[list[int]]) -> None:
    with (
        engine(gpu_memory_utilization=0.45) as first,
        engine(gpu_memory_utilization=0.45) as second,
    ):
        expected = completions(first, prompts[:8], max_tokens=40)
        assert completions(second, prompts[:8], max_tokens=40) == expected
        assert completions(first, prompts[:8], max_tokens=40) == expected


@pytest.mark.usefixtures("clean_gpu")
def test_exit_gives_the_memory_back(prompts: list[list[int]]) -> None:
    with engine(gpu_memory_utilization=0.5) as llm:  # what the process keeps: libraries
        completions(llm, prompts[:2], max_tokens=4)
    before = torch.cuda.memory_allocated()
    free_before, _ = torch.cuda.mem_get_info()
    llm = engine(gpu_memory_utilization=0.5)
    completions(llm, prompts[:2], max_tokens=4)
    llm.exit()
    assert torch.cuda.memory_allocated() == before
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 64 * MIB


def test_nearly_all_memory_can_be_used(checkpoint: CheckpointFactory) -> None:
    """gpu_memory_utilization=0.95 leaves room for the largest prefill."""
    model = checkpoint(ModelSpec(hidden_size=1024, intermediate_size=4096, vocab_size=32000))
    options = {"dtype": "bfloat16", "max_model_len": 1024}
    with LLM(str(model), gpu_memory_utilization=0.95, **options) as llm:
        prompts = random_prompts([1000] * 32, vocab_size=32000)
        assert all(len(output) == 3 for output in completions(llm, prompts, max_tokens=3))


@pytest.mark.skipif(not has_flash_attn, reason="no flash-attn")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [
        ([1, 1, 1, 1], [1, 255, 256, 257]),
        ([1] * 20, [10 + 50 * i for i in range(20)]),
        ([44, 20], [300, 276]),
        ([1, 1], [300, 276]),
        ([1, 20, 43], [301, 20, 555]),
    ],
    ids=["decode", "decode-ragged", "chunks", "chunks-of-one", "mixed"],
)
def test_flash_attn_equals_float64(
    query_lens: list[int], key_lens: list[int], head_dim: int, request: pytest.FixtureRequest
) -> None:
    """On the paged cache, blocks in random order; ||out - ref|| / ||ref|| of each sequence."""
    is_prefill = "decode" not in request.node.callspec.id
    num_heads, num_kv_heads = 8, 2
    blocks = torch.randperm(64).tolist()
    tables = [[blocks.pop() for _ in range(-(-length // 256))] for length in key_lens]
    width = max(map(len, tables))

    def on_gpu(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    context = Context(
        is_prefill=is_prefill,
        slot_mapping=on_gpu([]),
        query_lens=query_lens,
        key_lens=key_lens,
        block_size=256,
        cu_seqlens_q=on_gpu([0, *accumulate(query_lens)]),
        cu_seqlens_k=on_gpu([0, *accumulate(key_lens)]),
        context_lens=on_gpu(key_lens),
        block_tables=on_gpu([table + [-1] * (width - len(table)) for table in tables]),
    )
    cache = torch.randn(2, 64, 256, num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(sum(query_lens), num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    unused = torch.empty(0)
    inputs = AttentionInputs(query, unused, unused, *cache, head_dim**-0.5, context)
    flash = ATTENTION_BACKENDS["flash_attn"]
    found = (flash.prefill if is_prefill else flash.decode)(inputs).double().split(query_lens)

    for q, table, length, out in zip(query.split(query_lens), tables, key_lens, found, strict=True):
        k, v = cache[:, table].flatten(1, 2)[:, :length].double().transpose(1, 2)
        mask = torch.ones(len(q), length, device="cuda", dtype=torch.bool).tril(length - len(q))
        q = q.double().transpose(0, 1)
        ref = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(0, 1)
        assert (out - ref).norm() / ref.norm() < 5e-3


# --- streams and stop texts ------------------------------------------------------------------


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["overlapped", "plain"])
def test_streams_and_stop_texts_give_what_generate_gives(
    prompts: list[list[int]], enforce_eager: bool
) -> None:
    with engine(enforce_eager=enforce_eager) as llm:
        whole = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32), False)
        # From the middle of each text: it may begin and end within tokens.
        stops = [output["text"][5:8] or "never comes" for output in whole]
        params = [SamplingParams(temperature=0.0, max_tokens=32, stop=stop) for stop in stops]
        texts = [""] * len(prompts)
        for piece in llm.stream(prompts, params):
            texts[piece["index"]] += piece["text"]
        expected = [
            output["text"].split(stop)[0] for output, stop in zip(whole, stops, strict=True)
        ]
        assert texts == expected
        assert llm.stats()["num_used_blocks"] == 0

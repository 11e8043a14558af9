"""top_k, top_p, min_p and seed: what may be drawn, how often, and that nobody else notices."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, random_prompts
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm import LLM, SamplingParams
from nanovllm.layers.filters import kept_threshold
from nanovllm.layers.sampler import sample


def threshold_of(logits: Tensor, params: SamplingParams) -> float:
    """kept_threshold of one row [vocab_size]."""
    arguments = (
        torch.tensor([params.temperature], dtype=torch.float32),
        torch.tensor([params.top_k], dtype=torch.int32),
        torch.tensor([params.top_p]),
        torch.tensor([params.min_p]),
    )
    [threshold] = kept_threshold(logits[None], *arguments).tolist()
    return float(threshold)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """float64 [vocab_size] as transformers computes them, in the order in which vLLM filters.

    Of tokens of equal logits at the border of top_p transformers keeps some; here all stay.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    ids = torch.zeros(1, 0, dtype=torch.int64)
    kept = processors(ids, logits[None].double())[0] > -math.inf
    scores = logits.double() / params.temperature
    return scores.masked_fill(logits < logits[kept].min(), -math.inf).softmax(dim=-1)


def random_params(generator: torch.Generator, vocab_size: int) -> SamplingParams:
    """Any mix of the three filters, or none."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return SamplingParams(
        temperature=number(0.2, 3),
        top_k=int(number(1, 1.2 * vocab_size)) if number(0, 1) < 0.5 else 0,
        top_p=number(0.01, 1) if number(0, 1) < 0.5 else 1.0,
        min_p=number(0, 0.3) if number(0, 1) < 0.5 else 0.0,
    )


@pytest.mark.parametrize("has_ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 307, 5000])
def test_kept_tokens_and_their_probabilities_equal_transformers(
    vocab_size: int, has_ties: bool
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for _ in range(100):
        logits = 4 * torch.randn(vocab_size, generator=generator)
        if has_ties:
            logits = (2 * logits).round() / 2
        params = random_params(generator, vocab_size)
        expected = probabilities(logits, params)
        kept = logits >= threshold_of(logits, params)
        assert torch.equal(kept, expected > 0), params
        found = (logits / params.temperature).masked_fill(~kept, -math.inf).softmax(dim=-1)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("params", "num_kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 3}, 4),  # the third is tied with the fourth
        ({"top_k": 5}, 5),
        ({"top_k": 99}, 5),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.71}, 4),
        ({"top_p": 0.96}, 5),
        ({"top_p": 1e-50}, 1),
        ({"min_p": 0.74}, 2),
        ({"min_p": 0.76}, 1),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.1}, 5),
        # Of the first two, 4/7 and 3/7, the first is not enough; of all five it would be.
        ({"top_k": 2, "top_p": 0.58}, 2),
        ({"min_p": 0.7, "top_p": 0.58}, 2),
        ({"min_p": 0.7, "top_p": 0.57}, 1),
        ({"temperature": 0.5, "min_p": 0.6}, 1),  # its square root is 0.77
        ({"temperature": 2.0, "min_p": 0.6}, 2),
        ({"temperature": 0.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9}, 5),
    ],
    ids=str,
)
def test_what_each_filter_keeps(params: dict[str, Any], num_kept: int) -> None:
    logits = torch.tensor([0.125, 0.4, 0.05, 0.3, 0.125]).log()
    assert (logits >= threshold_of(logits, SamplingParams(**params))).sum() == num_kept


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_a_row_of_nothing_but_minus_infinity_keeps_all(filters: dict[str, Any]) -> None:
    logits = torch.full((5,), -math.inf)
    assert threshold_of(logits, SamplingParams(**filters)) == -math.inf


def test_rows_are_filtered_each_by_its_own() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows = [
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5, temperature=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0, top_k=3),
        SamplingParams(top_k=9, top_p=0.9, min_p=0.01, temperature=2),
    ]
    thresholds = kept_threshold(
        logits,
        torch.tensor([p.temperature for p in rows], dtype=torch.float32),
        torch.tensor([p.top_k for p in rows], dtype=torch.int32),
        torch.tensor([p.top_p for p in rows]),
        torch.tensor([p.min_p for p in rows]),
    )
    alone = [threshold_of(row, params) for row, params in zip(logits, rows, strict=True)]
    assert thresholds.tolist() == alone
    assert [value == -math.inf for value in alone] == [True, False, False, False, True, False]


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    """Chi-square; tokens that are left out never come."""
    logits = torch.linspace(-1.5, 2, 15)[torch.randperm(15)]
    params = SamplingParams(temperature=0.7, **filters)
    num_draws = 20_000
    ids = sample(
        logits.expand(num_draws, -1),
        torch.full((num_draws,), params.temperature),
        torch.arange(num_draws),
        torch.zeros(num_draws, dtype=torch.int64),
        torch.full((num_draws,), threshold_of(logits, params)),
    )
    counts, expected = ids.bincount(minlength=15), probabilities(logits, params) * num_draws
    assert 1 < (expected > 0).sum() < 15
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert stats.chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 0.001


# --- through the engine ----------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "kvcache_block_size": 16,
}
COMMON: dict[str, Any] = {"temperature": 8.0, "max_tokens": 25, "ignore_eos": True}
MIXED = [
    SamplingParams(seed=1, **COMMON),
    SamplingParams(seed=2, top_k=5, **COMMON),
    SamplingParams(seed=3, top_p=0.7, **COMMON),
    SamplingParams(seed=4, min_p=0.2, **COMMON),
    SamplingParams(seed=-(2**63), top_k=2**70, top_p=0.99, min_p=0.01, **COMMON),
    SamplingParams(seed=2**63 - 1, **COMMON | {"temperature": 0.0}),
    SamplingParams(seed=1, **COMMON),
]
PROMPTS = random_prompts([5, 20, 1, 33, 9, 16, 5], vocab_size=307, seed=5)


def tokens(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> list[list[int]]:
    """What each of MIXED gives with no other request in the engine."""
    with LLM(str(tiny_model), **OPTIONS) as llm:
        pairs = zip(PROMPTS, MIXED, strict=True)
        return [tokens(llm, [prompt], [params])[0] for prompt, params in pairs]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 7}, {"num_kvcache_blocks": 7}],
    ids=str,
)
def test_a_seeded_request_gives_the_same_tokens_beside_any_other(
    options: dict[str, int], alone: list[list[int]], tiny_model: Path
) -> None:
    with LLM(str(tiny_model), **OPTIONS | options) as llm:
        torch.manual_seed(0)
        assert tokens(llm, PROMPTS, MIXED) == alone
        backwards = tokens(llm, PROMPTS[::-1], MIXED[::-1])
        assert backwards == alone[::-1]
        assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in options)


def test_seeds_alone_decide_between_equal_requests(tiny_model: Path) -> None:
    params = [SamplingParams(seed=seed, **COMMON) for seed in (7, 8, 7, None, None)]
    with LLM(str(tiny_model), **OPTIONS) as llm:
        first, second, third, *others = tokens(llm, [PROMPTS[0]] * 5, params)
    assert first == third
    assert len({tuple(ids) for ids in (first, second, *others)}) == 4


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}], ids=str)
def test_a_filter_that_leaves_one_token_gives_the_greedy_tokens(
    filters: dict[str, Any], tiny_model: Path
) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        greedy = tokens(llm, PROMPTS, [SamplingParams(**COMMON | {"temperature": 0.0})] * 7)
        assert tokens(llm, PROMPTS, [SamplingParams(**COMMON, **filters)] * 7) == greedy


def test_tokens_come_from_what_the_filters_keep(checkpoint: CheckpointFactory) -> None:
    """Each token of a hot run, of prefill and decode, is one of its step's five likeliest."""
    model = checkpoint(ModelSpec())
    params = SamplingParams(top_k=5, logprobs=5, **COMMON)
    with LLM(str(model), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    drawn = set()
    for output in outputs:
        for token, logprobs in zip(output["token_ids"], output["logprobs"], strict=True):
            assert len(logprobs) == 5
            drawn.add(sorted(logprobs.values(), reverse=True).index(logprobs[token]))
    assert drawn == set(range(5))


def test_a_batch_without_filters_computes_no_threshold(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:

        def refuse(*_: object) -> Tensor:
            raise AssertionError("a threshold was computed")

        assert llm.model_runner is not None
        monkeypatch.setattr(llm.model_runner.sampler, "_kept_threshold", refuse)
        tokens(llm, PROMPTS[:2], [MIXED[0], MIXED[5]])
        with pytest.raises(AssertionError, match="threshold"):
            tokens(llm, PROMPTS[:2], MIXED[:2])

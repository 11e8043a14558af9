"""Log-probabilities: those of transformers' log_softmax, for each token of a completion."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, Reference, Tally, random_prompts, watched

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.logprobs import token_logprobs

ReferenceFactory = Callable[[Path], Reference]

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "kvcache_block_size": 16,
}
COMMON: dict[str, Any] = {"temperature": 3.0, "max_tokens": 30, "ignore_eos": True}
PREFIX, *PROMPTS = random_prompts([16, 1, 14, 4, 17, 9], vocab_size=307, seed=7)
PROMPTS = [*PROMPTS, PREFIX + PROMPTS[0], PREFIX + PROMPTS[1]]
PARAMS = [
    SamplingParams(logprobs=3, **COMMON),
    SamplingParams(**COMMON),
    SamplingParams(logprobs=0, **COMMON),
    SamplingParams(logprobs=20, top_k=9, top_p=0.9, min_p=0.01, **COMMON),
    SamplingParams(logprobs=1, **COMMON | {"temperature": 0.0}),
    SamplingParams(logprobs=3, seed=1, **COMMON),
    SamplingParams(logprobs=3, seed=1, **COMMON),
]


def largest_error(
    logprobs: list[dict[int, float]],
    num_likeliest: int,
    completion: list[int],
    logits: torch.Tensor,
) -> float:
    """Against the reference's logits [len(completion), vocab_size], the right tokens checked."""
    assert len(logprobs) == len(completion)
    error = 0.0
    for token, found, expected in zip(completion, logprobs, logits.log_softmax(-1), strict=True):
        ids = list(found)
        assert ids[0] == token
        assert all(type(value) is float for value in found.values())
        values = torch.tensor(list(found.values()))
        error = max(error, float((values - expected[ids]).abs().max()))
        # Two tokens that are nearly as likely may stand in either order.
        likeliest = expected.topk(num_likeliest)
        is_among = token in likeliest.indices.tolist()
        assert len(ids) == num_likeliest + (not is_among)
        others = values.sort(descending=True).values[:num_likeliest]
        if num_likeliest:
            error = max(error, float((others - likeliest.values).abs().max()))
        assert values[1:].tolist() == sorted(values[1:].tolist(), reverse=True)
    return error


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7}, {"num_kvcache_blocks": 6}, {"max_num_seqs": 2}],
    ids=str,
)
def test_logprobs_equal_those_of_transformers(
    options: dict[str, int],
    overlapped: bool,
    tiny_model: Path,
    reference: ReferenceFactory,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """Before temperature and filters; in chunks, after preemption and with shared prefixes too."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", overlapped)
    torch.manual_seed(0)
    with watched(tiny_model, **OPTIONS | options) as (llm, spy):
        llm.generate([PREFIX], SamplingParams(max_tokens=2), use_tqdm=False)  # to be shared
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in options)
    assert list(spy.seqs.values())[-1].num_cached_tokens == 16
    for prompt, params, output in zip(PROMPTS, PARAMS, outputs, strict=True):
        assert ("logprobs" in output) == (params.logprobs is not None)
        if params.logprobs is None:
            continue
        completion = output["token_ids"]
        logits = reference(tiny_model).logits(prompt, completion)
        error = largest_error(output["logprobs"], params.logprobs, completion, logits)
        tally.maximum("logprobs: error", error)
        assert error < 1e-4


def test_asking_for_logprobs_changes_no_token(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:

        def tokens(**options: Any) -> list[list[int]]:
            params = [SamplingParams(seed=i, **COMMON, **options) for i in range(len(PROMPTS))]
            return [out["token_ids"] for out in llm.generate(PROMPTS, params, use_tqdm=False)]

        assert tokens(logprobs=5) == tokens()


def test_a_small_vocabulary_has_fewer_likeliest_tokens_than_asked_for(
    checkpoint: CheckpointFactory,
) -> None:
    with LLM(str(checkpoint(ModelSpec(vocab_size=12))), **OPTIONS) as llm:
        params = SamplingParams(logprobs=20, max_tokens=3, ignore_eos=True)
        [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    for logprobs in output["logprobs"]:
        assert logprobs.keys() == set(range(12))
        assert sum(map(math.exp, logprobs.values())) == pytest.approx(1, abs=1e-5)


def test_token_logprobs_of_many_rows_in_half_precision() -> None:
    logits = 5 * torch.randn(100, 50).bfloat16()
    sampled, rows = torch.randint(50, (100,)), torch.randperm(100)[:70]
    ids, values = token_logprobs(logits, sampled, rows, 4)
    expected = logits.float().log_softmax(dim=-1)[rows]
    assert torch.equal(ids[:, 0], sampled[rows])
    assert torch.allclose(values, expected.gather(1, ids), atol=1e-5)
    assert torch.equal(values[:, 1:], values[:, 1:].sort(descending=True).values)
    assert torch.allclose(values[:, 1:], expected.topk(4).values, atol=1e-5)

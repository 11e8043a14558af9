"""LLM.stats: what the engine holds, and what it has done so far."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ModelSpec, completions, greedy, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 6,
}
NONE = {
    "num_waiting": 0,
    "num_running": 0,
    "num_free_blocks": 6,
    "num_used_blocks": 0,
    "prefix_hit_rate": 0.0,
    "num_preemptions": 0,
    "num_prompt_tokens": 0,
    "num_generated_tokens": 0,
}


def test_a_new_engine_has_done_nothing(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        assert llm.stats() == NONE


def test_requests_and_blocks_are_counted_as_they_are_now(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS, max_num_seqs=1) as llm:
        for prompt in random_prompts([20, 5], ModelSpec.vocab_size):
            llm.add_request(prompt, greedy(3))
        assert llm.stats() == NONE | {"num_waiting": 2}
        llm.step()
        assert llm.stats() == NONE | {
            "num_waiting": 1,
            "num_running": 1,
            "num_free_blocks": 4,
            "num_used_blocks": 2,
            "num_prompt_tokens": 20,
            "num_generated_tokens": 1,
        }
        while not llm.is_finished():
            llm.step()
        assert llm.stats() == NONE | {"num_prompt_tokens": 25, "num_generated_tokens": 6}


def test_the_prefix_hit_rate_is_the_share_of_prompt_tokens_that_were_reused(
    tiny_model: Path,
) -> None:
    [prompt] = random_prompts([40], ModelSpec.vocab_size)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        for _ in range(3):
            completions(llm, [prompt], max_tokens=2)
        stats = llm.stats()
    assert stats["num_prompt_tokens"] == 120
    assert stats["prefix_hit_rate"] == 2 * 32 / 120  # two full blocks, twice


def test_a_preempted_request_counts_its_tokens_once(tiny_model: Path) -> None:
    prompts = random_prompts([15, 15], ModelSpec.vocab_size)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        completions(llm, prompts, max_tokens=45)
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    assert stats["num_prompt_tokens"] == 30
    assert stats["num_generated_tokens"] == 90
    assert stats["prefix_hit_rate"] == 0.0


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_token_computed_beyond_the_end_is_not_counted(
    overlapped: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "runs_ahead", overlapped)
    prompts = random_prompts([15, 9], ModelSpec.vocab_size)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        stop = completions(llm, prompts[:1], max_tokens=20)[0][4]
    with LLM(str(tiny_model), **OPTIONS) as llm:
        params = [
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20, stop_token_ids=ids)
            for ids in ([stop], None)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        num_tokens = [len(output["token_ids"]) for output in outputs]
        assert num_tokens[0] <= 5
        assert llm.stats()["num_generated_tokens"] == sum(num_tokens)

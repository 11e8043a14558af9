"""What an engine tells of its work: LLM.stats, what it holds and has done; LLM.observers."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ModelSpec, completions, greedy, is_idle, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Launched
from nanovllm.engine.scheduler import Batch, Scheduler

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


# --- observers -------------------------------------------------------------------------------


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["plain", "overlapped"])
def test_observers_are_told_of_every_step_in_order(
    runs_ahead: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "runs_ahead", runs_ahead)
    seen: list[tuple[str, Batch | None]] = []
    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        llm.observers.append(lambda event, batch: seen.append((event, batch)))
        outputs = completions(llm, [[1, 2, 3]], max_tokens=3)
        observed = len(seen)
        llm.observers.clear()
        assert completions(llm, [[1, 2, 3]], max_tokens=3) == outputs
    assert len(seen) == observed
    events = [event for event, _ in seen]
    step = ["begin", "scheduled", "launched", "read", "processed"]
    assert events == (step[:3] + 3 * step if runs_ahead else 3 * step)
    batches = {name: [batch for event, batch in seen if event == name] for name in step}
    assert batches["begin"] == [None] * len(batches["begin"])
    launched = [batch for batch in batches["launched"] if batch is not None]
    assert [batch.is_prefill for batch in launched] == [True, False, False]
    assert batches["scheduled"] == batches["launched"]
    assert batches["read"] == batches["processed"] == launched


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["plain", "overlapped"])
def test_what_an_event_tells_is_true_when_it_is_told(
    runs_ahead: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "runs_ahead", runs_ahead)
    calls: list[str] = []
    for owner, name in (
        (Scheduler, "schedule"), (ModelRunner, "launch"), (Launched, "token_ids"),
        (Scheduler, "postprocess"),
    ):  # fmt: skip
        real = getattr(owner, name)

        def noted(*args: Any, real: Any = real, name: str = name) -> Any:
            result = real(*args)
            calls.append(name)
            return result

        monkeypatch.setattr(owner, name, noted)
    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        llm.observers.append(lambda event, batch: calls.append(event) if batch else None)
        completions(llm, [[1, 2, 3]], max_tokens=2)
    pairs = {"scheduled": "schedule", "launched": "launch", "read": "token_ids"}
    pairs["processed"] = "postprocess"
    for at, call in enumerate(calls):
        if call in pairs:
            assert calls[at - 1] == pairs[call]


def test_an_observer_may_take_itself_off_the_list(tiny_model: Path) -> None:
    seen: list[str] = []

    def once(event: str, _: Batch | None) -> None:
        llm.observers.remove(once)

    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        llm.observers += [once, lambda event, _: seen.append(event)]
        completions(llm, [[1]], max_tokens=1)
    assert seen == ["begin", "scheduled", "launched", "read", "processed"]


def test_an_observer_that_raises_ends_the_call_and_does_no_harm(tiny_model: Path) -> None:
    def refuse(event: str, _: Batch | None) -> None:
        if event == failing:
            raise KeyError(event)

    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        expected = completions(llm, [[1, 2, 3]], max_tokens=3)
        llm.observers.append(refuse)
        for failing in ("begin", "scheduled", "launched", "read", "processed"):
            with pytest.raises(KeyError, match=failing):
                completions(llm, [[1, 2, 3]], max_tokens=3)
            assert is_idle(llm)
        failing = ""
        assert completions(llm, [[1, 2, 3]], max_tokens=3) == expected

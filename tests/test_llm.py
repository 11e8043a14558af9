"""The public contract of LLM: what goes in, what comes out, what is refused."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    STOP_WORD,
    TINY,
    CheckpointFactory,
    ModelSpec,
    completions,
    edit_json,
    greedy,
    is_idle,
    random_prompts,
    save_tokenizer,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.progress import Progress
from nanovllm.models.qwen3 import Qwen3ForCausalLM

VOCAB_SIZE = ModelSpec.vocab_size
MAX_MODEL_LEN = 96
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "kvcache_block_size": 16,
}


@pytest.fixture(scope="module")
def shared_llm(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), **OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """An engine with a tokenizer ("w5" is id 5); idle before and after the test."""
    assert is_idle(shared_llm)
    yield shared_llm
    assert is_idle(shared_llm)


def run_to_end(llm: LLM) -> dict[int, list[int]]:
    """Step until all is done; the completions by request id."""
    results: dict[int, list[int]] = {}
    while not llm.is_finished():
        finished, _ = llm.step()
        for seq_id, token_ids in finished:
            assert seq_id not in results
            results[seq_id] = token_ids
    return results


# --- prompts and results ---------------------------------------------------------------------


def test_a_result_has_the_prompt_the_completion_and_how_it_ended(llm: LLM) -> None:
    [output] = llm.generate(["w5 w6 w7"], greedy(5), use_tqdm=False)
    assert output.keys() == {
        "text",
        "token_ids",
        "finish_reason",
        "stop_reason",
        "prompt_token_ids",
        "num_cached_tokens",
    }
    assert (output["prompt_token_ids"], output["num_cached_tokens"]) == ([5, 6, 7], 0)
    assert [type(token) for token in output["token_ids"]] == [int] * 5
    assert output["text"] == " ".join(f"w{token}" for token in output["token_ids"] if token)
    assert (output["finish_reason"], output["stop_reason"]) == ("length", None)


def test_texts_and_token_ids_are_prompts_of_equal_right(llm: LLM) -> None:
    by_text = llm.generate(["w5 w6", "w7"], greedy(6), use_tqdm=False)
    by_ids = llm.generate([[5, 6], [7]], greedy(6), use_tqdm=False)
    mixed = llm.generate(["w5 w6", [7]], greedy(6), use_tqdm=False)
    assert by_text == by_ids == mixed


@pytest.mark.parametrize("prompt", ["w5 w6", [5, 6], (5, 6), np.array([5, 6])], ids=repr)
def test_one_prompt_gives_a_list_of_one_result(prompt: Any, llm: LLM) -> None:
    expected = llm.generate([[5, 6]], greedy(6), use_tqdm=False)
    assert llm.generate(prompt, greedy(6), use_tqdm=False) == expected


def test_numpy_ints_are_token_ids(llm: LLM) -> None:
    expected = completions(llm, [[5, 6], [7]], max_tokens=6)
    ids = [[np.int64(5), np.int32(6)], [np.uint8(7)]]
    assert completions(llm, ids, max_tokens=6) == expected  # type: ignore[arg-type]
    output = llm.generate(ids, greedy(1), use_tqdm=False)[0]  # type: ignore[arg-type]
    assert set(map(type, output["prompt_token_ids"])) == {int}


def test_results_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Whatever order they finish in: the longest prompt with the fewest tokens comes first."""
    prompts = random_prompts([60, 1, 30, 2, 17], VOCAB_SIZE)
    max_tokens = [3, 30, 1, 20, 9]
    alone = [completions(llm, [p], n)[0] for p, n in zip(prompts, max_tokens, strict=True)]
    outputs = llm.generate(prompts, [greedy(n) for n in max_tokens], use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == alone


def test_more_prompts_than_run_at_a_time_are_all_served(llm: LLM) -> None:
    prompts = random_prompts([5] * 20, VOCAB_SIZE)
    assert completions(llm, prompts, 4) == [completions(llm, [p], 4)[0] for p in prompts]


@pytest.mark.parametrize("prompts", [[], ()], ids=repr)
@pytest.mark.parametrize("params", [None, greedy(), []], ids=str)
def test_no_prompts_give_no_results(prompts: Any, params: Any, llm: LLM) -> None:
    assert llm.generate(prompts, params, use_tqdm=False) == []


def test_prompts_are_not_changed(llm: LLM) -> None:
    prompts = [[5, 6, 7], [8]]
    completions(llm, prompts, max_tokens=4)
    assert prompts == [[5, 6, 7], [8]]


def test_without_sampling_params_the_defaults_hold(llm: LLM) -> None:
    [output] = llm.generate([[5, 6]], use_tqdm=False)
    assert 1 <= len(output["token_ids"]) <= 64
    assert output["finish_reason"] == "stop" or len(output["token_ids"]) == 64


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_as_many_sampling_params_as_prompts_are_needed(num_params: int, llm: LLM) -> None:
    with pytest.raises(ValueError, match=f"2 prompts, but {num_params} sampling_params"):
        llm.generate([[1], [2]], [greedy()] * num_params)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, [{"temperature": 1.0}], 0.7, "greedy"])
def test_sampling_params_of_another_type_are_refused(params: Any, llm: LLM) -> None:
    with pytest.raises((TypeError, ValueError), match="sampling_params"):
        llm.generate([[1]], params)


# --- when a request ends ---------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17])
def test_a_request_ends_at_max_tokens(max_tokens: int, llm: LLM) -> None:
    [output] = llm.generate([[5, 6]], greedy(max_tokens), use_tqdm=False)
    assert len(output["token_ids"]) == max_tokens
    assert output["finish_reason"] == "length"


@pytest.mark.parametrize("num_prompt_tokens", [1, 50, MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1])
def test_a_request_ends_when_it_fills_max_model_len(num_prompt_tokens: int, llm: LLM) -> None:
    [output] = llm.generate([[5] * num_prompt_tokens], greedy(1000), use_tqdm=False)
    assert len(output["token_ids"]) == MAX_MODEL_LEN - num_prompt_tokens
    assert output["finish_reason"] == "length"


PROMPT = [9, 8, 7]


def first_occurrence(tokens: list[int], at_least: int) -> int:
    """The first index from `at_least` on whose token has not come before."""
    return next(n for n in range(at_least, len(tokens)) if tokens[n] not in tokens[:n])


@pytest.fixture(scope="module")
def endless(text_model: Path) -> list[int]:
    """What greedy decoding makes of PROMPT if no token stops it."""
    with LLM(str(text_model), **OPTIONS) as llm:
        return completions(llm, [PROMPT], max_tokens=40)[0]


def test_a_request_ends_at_a_stop_id_which_is_the_last_token(
    text_model: Path, endless: list[int]
) -> None:
    stop = first_occurrence(endless, 5)
    with LLM(str(text_model), **OPTIONS, eos=endless[stop]) as llm:
        [output] = llm.generate([PROMPT], greedy(40, ignore_eos=False), use_tqdm=False)
        assert output["token_ids"] == endless[: stop + 1]
        assert output["finish_reason"] == "stop"
        assert is_idle(llm)


def test_a_stop_id_may_be_the_first_token(text_model: Path, endless: list[int]) -> None:
    with LLM(str(text_model), **OPTIONS, eos=endless[0]) as llm:
        [output] = llm.generate([PROMPT], greedy(40, ignore_eos=False), use_tqdm=False)
        assert output["token_ids"] == endless[:1]
        assert output["finish_reason"] == "stop"


def test_a_stop_id_as_the_last_token_allowed_counts_as_stop(
    text_model: Path, endless: list[int]
) -> None:
    stop = first_occurrence(endless, 5)
    with LLM(str(text_model), **OPTIONS, eos=endless[stop]) as llm:
        [output] = llm.generate([PROMPT], greedy(stop + 1, ignore_eos=False), use_tqdm=False)
        assert output["finish_reason"] == "stop"
        [output] = llm.generate([PROMPT], greedy(stop, ignore_eos=False), use_tqdm=False)
        assert output["finish_reason"] == "length"


def test_a_stop_id_in_the_prompt_stops_nothing(text_model: Path, endless: list[int]) -> None:
    with LLM(str(text_model), **OPTIONS, eos=PROMPT[-1]) as llm:
        [output] = llm.generate([PROMPT], greedy(4, ignore_eos=False), use_tqdm=False)
        assert output["token_ids"] == endless[:4]


def test_ignore_eos_goes_on_to_max_tokens(text_model: Path, endless: list[int]) -> None:
    stop = first_occurrence(endless, 5)
    with LLM(str(text_model), **OPTIONS, eos=endless[stop]) as llm:
        params = [greedy(40, ignore_eos=True), greedy(40, ignore_eos=False)]
        outputs = llm.generate([PROMPT, PROMPT], params, use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [40, stop + 1]
        assert [output["finish_reason"] for output in outputs] == ["length", "stop"]
        assert outputs[0]["token_ids"] == endless


@pytest.mark.parametrize(
    "source", ["tokenizer", "config.json", "generation_config.json", "generation_config.json list"]
)
def test_a_stop_id_may_come_from_each_of_the_three_files(
    source: str, text_model: Path, endless: list[int], tmp_path: Path
) -> None:
    stop = first_occurrence(endless, 5)
    others = [token for token in range(VOCAB_SIZE) if token not in endless]
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    ids = {"tokenizer": others[0], "config.json": others[1], "generation_config.json": others[2]}
    ids[source.removesuffix(" list")] = endless[stop]
    save_tokenizer(model_dir, VOCAB_SIZE, stop_id=ids["tokenizer"])
    edit_json(model_dir / "config.json", eos_token_id=ids["config.json"])
    in_list = [others[3], ids["generation_config.json"]]
    edit_json(
        model_dir / "generation_config.json",
        eos_token_id=in_list if source.endswith("list") else ids["generation_config.json"],
    )
    with LLM(str(model_dir), **OPTIONS) as llm:
        [output] = llm.generate([PROMPT], greedy(40, ignore_eos=False), use_tqdm=False)
        assert output["token_ids"] == endless[: stop + 1]
        assert output["finish_reason"] == "stop"
        assert llm.stop_ids >= set(ids.values())


@pytest.mark.parametrize(("in_config", "in_generation"), [(..., ...), (..., 7), (9, ...), (9, 7)])
def test_the_stop_id_of_a_class_of_models_is_for_those_that_name_none(
    in_config: Any, in_generation: Any, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """2 for Llama, as in transformers."""
    model_dir = shutil.copytree(checkpoint(ModelSpec("Llama")), tmp_path / "model")
    edit_json(model_dir / "config.json", eos_token_id=in_config)
    edit_json(model_dir / "generation_config.json", eos_token_id=in_generation)
    with LLM(str(model_dir), **OPTIONS) as llm:
        assert llm.stop_ids == ({in_config, in_generation} - {...} or {2})


def test_the_option_eos_stands_for_all_stop_ids(
    text_model: Path, endless: list[int], tmp_path: Path
) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    edit_json(model_dir / "config.json", eos_token_id=endless[0])
    stop = first_occurrence(endless, 5)
    with LLM(str(model_dir), **OPTIONS, eos=endless[stop]) as llm:
        [output] = llm.generate([PROMPT], greedy(40, ignore_eos=False), use_tqdm=False)
        assert output["token_ids"] == endless[: stop + 1]


def test_special_tokens_are_not_in_the_text(
    text_model: Path, endless: list[int], tmp_path: Path
) -> None:
    stop = first_occurrence(endless, 5)
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    save_tokenizer(model_dir, VOCAB_SIZE, stop_id=endless[stop])
    with LLM(str(model_dir), **OPTIONS) as llm:
        [output] = llm.generate([PROMPT], greedy(40, ignore_eos=False), use_tqdm=False)
        assert llm.tokenizer.convert_ids_to_tokens(output["token_ids"][-1]) == STOP_WORD
        assert output["text"] == " ".join(f"w{token}" for token in endless[:stop])


# --- prompts that are refused ----------------------------------------------------------------


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "1 to 95 tokens.*got 0"),
    ("", ValueError, "1 to 95 tokens.*got 0"),
    ([1] * MAX_MODEL_LEN, ValueError, "1 to 95 tokens.*got 96"),
    ("w1 " * MAX_MODEL_LEN, ValueError, "1 to 95 tokens.*got 96"),
    ([1] * 5000, ValueError, "1 to 95 tokens.*got 5000"),
    ([1, VOCAB_SIZE], ValueError, f"token id {VOCAB_SIZE} is outside.*0 to {VOCAB_SIZE - 1}"),
    ([-1, 1], ValueError, f"token id -1 is outside.*0 to {VOCAB_SIZE - 1}"),
    ([1, 10**30], ValueError, f"token id {10**30} is outside"),
    ([1, 2.0], TypeError, "ints, got 2.0"),
    ([1, True], TypeError, "ints, got True"),
    ([1, "w2"], TypeError, "ints, got 'w2'"),
    ([1, None], TypeError, "ints, got None"),
    ([1, [2]], TypeError, r"ints, got \[2\]"),
    ([1, np.float32(2)], TypeError, "ints, got np.float32"),
    (None, TypeError, "got None"),
    (5.5, TypeError, "got 5.5"),
    (b"w1", TypeError, "got b'w1'"),
    ({"prompt": "w1"}, TypeError, "got {'prompt': 'w1'}"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_refused(
    prompt: Any, error: type[Exception], message: str, llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        llm.add_request(prompt)


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_refused_before_any_prompt_of_its_call_is_queued(
    prompt: Any, error: type[Exception], message: str, llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        llm.generate([[1, 2], prompt, "w3"], greedy())
    assert is_idle(llm)


@pytest.mark.parametrize("prompts", [None, 5, b"w1", {"a": 1}, [None], [True, False]], ids=repr)
def test_prompts_of_another_type_are_refused(prompts: Any, llm: LLM) -> None:
    with pytest.raises(TypeError, match="got"):
        llm.generate(prompts)


def test_the_first_and_the_last_token_id_are_allowed(llm: LLM) -> None:
    assert len(completions(llm, [[0, VOCAB_SIZE - 1]], max_tokens=2)[0]) == 2


# --- without a tokenizer ---------------------------------------------------------------------


def test_a_directory_without_tokenizer_serves_token_ids(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        assert llm.tokenizer is None
        [output] = llm.generate([[5, 6]], greedy(4), use_tqdm=False)
        assert len(output["token_ids"]) == 4
        assert output["text"] == ""


def test_a_directory_without_tokenizer_refuses_text(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        with pytest.raises(ValueError, match=r"no tokenizer.*'w5 w6'"):
            llm.generate(["w5 w6"])
        assert is_idle(llm)


def test_the_tokenizer_is_the_one_that_its_file_describes(tmp_path: Path) -> None:
    """Whatever class the configuration names: it encodes and decodes as AutoTokenizer's does."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    edit_json(model / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    expected = transformers.AutoTokenizer.from_pretrained(model)
    with LLM(str(model), max_model_len=64, max_num_seqs=1) as llm:
        for text in ("Hello wörld", "你好 12345\t x\n\ny", "<|im_start|>user\n👩‍👩‍👧 don't"):
            ids = llm.tokenizer.encode(text)
            assert ids == expected.encode(text)
            assert llm.tokenizer.decode(ids) == expected.decode(ids) == text
        assert llm.tokenizer.eos_token_id == expected.eos_token_id
        messages = [{"role": "user", "content": "Hi"}]
        for tokenizer in (llm.tokenizer, expected):
            assert "user\nHi" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_broken_tokenizer_is_refused(text_model: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    (model_dir / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{model_dir}: the tokenizer")):
        LLM(str(model_dir), **OPTIONS)


# --- a loop of one's own ---------------------------------------------------------------------


def test_an_own_loop_gives_what_generate_gives(llm: LLM) -> None:
    prompts = random_prompts([3, 40, 17], VOCAB_SIZE)
    expected = completions(llm, prompts, max_tokens=10)
    seq_ids = [llm.add_request(prompt, greedy(10)) for prompt in prompts]
    assert len(set(seq_ids)) == 3
    assert not llm.is_finished()
    assert run_to_end(llm) == dict(zip(seq_ids, expected, strict=True))


def test_step_counts_prefill_tokens_up_and_decode_tokens_down(text_model: Path) -> None:
    with LLM(str(text_model), **OPTIONS) as llm:
        for prompt in random_prompts([3, 40, 17], VOCAB_SIZE):
            llm.add_request(prompt, greedy(10))
        counts = []
        while not llm.is_finished():
            counts.append(llm.step()[1])
        assert sum(count for count in counts if count > 0) == 3 + 40 + 17
        # The first token of a request comes from its prefill.
        assert -sum(count for count in counts if count < 0) == 3 * 9


def test_step_with_nothing_to_do_gives_nothing(llm: LLM) -> None:
    assert llm.is_finished()
    assert llm.step() == ([], 0)


def test_requests_may_come_while_others_run(llm: LLM) -> None:
    prompts = random_prompts([20, 33], VOCAB_SIZE)
    expected = completions(llm, prompts, max_tokens=12)
    results: dict[int, list[int]] = {}
    first = llm.add_request(prompts[0], greedy(12))
    for _ in range(4):
        results.update(llm.step()[0])
    second = llm.add_request(prompts[1], greedy(12))
    results |= run_to_end(llm)
    assert results == {first: expected[0], second: expected[1]}


def test_a_request_without_sampling_params_has_the_defaults(llm: LLM) -> None:
    seq_id = llm.add_request([5])
    assert 1 <= len(run_to_end(llm)[seq_id]) <= 64


def test_requests_that_finish_during_generate_are_given_out_by_a_later_step(llm: LLM) -> None:
    prompts = random_prompts([20, 33], VOCAB_SIZE)
    expected = completions(llm, prompts, max_tokens=12)
    early = llm.add_request(prompts[0], greedy(5))
    assert completions(llm, [prompts[1]], max_tokens=12) == [expected[1]]
    assert not llm.is_finished()
    finished, num_tokens = llm.step()
    assert finished == [(early, expected[0][:5])]
    assert num_tokens == 0
    assert llm.is_finished()


def test_requests_that_outlast_generate_go_on_after_it(llm: LLM) -> None:
    prompts = random_prompts([20, 33], VOCAB_SIZE)
    expected = completions(llm, prompts, max_tokens=12)
    late = llm.add_request(prompts[0], greedy(12))
    assert completions(llm, [prompts[1]], max_tokens=4) == [expected[1][:4]]
    assert run_to_end(llm) == {late: expected[0]}


def test_a_bad_call_leaves_the_requests_of_others_alone(llm: LLM) -> None:
    [expected] = completions(llm, [[5, 6]], max_tokens=12)
    seq_id = llm.add_request([5, 6], greedy(12))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.generate([[1], [-1]])
    assert run_to_end(llm) == {seq_id: expected}


# --- abort -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_an_aborted_request_is_gone_and_others_go_on(num_steps: int, llm: LLM) -> None:
    prompts = random_prompts([20, 33], VOCAB_SIZE)
    expected = completions(llm, prompts, max_tokens=12)
    aborted, kept = [llm.add_request(prompt, greedy(12)) for prompt in prompts]
    for _ in range(num_steps):
        llm.step()
    llm.abort_request(aborted)
    assert run_to_end(llm) == {kept: expected[1]}


def test_aborting_the_last_request_leaves_the_engine_finished(llm: LLM) -> None:
    seq_id = llm.add_request([5, 6], greedy(12))
    llm.step()
    llm.step()
    llm.abort_request(seq_id)
    while not llm.is_finished():  # a step under way may have to be read
        assert llm.step()[0] == []


def test_aborting_a_finished_or_unknown_request_does_nothing(llm: LLM) -> None:
    seq_id = llm.add_request([5, 6], greedy(2))
    assert len(run_to_end(llm)[seq_id]) == 2
    llm.abort_request(seq_id)
    llm.abort_request(10**9)


def test_the_result_of_a_finished_request_can_still_be_aborted(llm: LLM) -> None:
    """It finished inside a generate call and was not given out yet."""
    seq_id = llm.add_request([5, 6], greedy(2))
    completions(llm, [[7]], max_tokens=8)
    llm.abort_request(seq_id)
    assert llm.is_finished()
    assert llm.step() == ([], 0)


# --- the end of an engine, and several of them -----------------------------------------------


USES: dict[str, Callable[[LLM], Any]] = {
    "generate ids": lambda llm: llm.generate([[1]], use_tqdm=False),
    "generate text": lambda llm: llm.generate("w1"),
    "generate nothing": lambda llm: llm.generate([]),
    "stream": lambda llm: llm.stream([[1]]),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "w1"}]),
    "add_request": lambda llm: llm.add_request([1]),
    "abort_request": lambda llm: llm.abort_request(1),
    "step": lambda llm: llm.step(),
    "stats": lambda llm: llm.stats(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_an_engine_that_was_shut_down_says_so(use: Callable[[LLM], Any], text_model: Path) -> None:
    llm = LLM(str(text_model), **OPTIONS)
    llm.exit()
    with pytest.raises(RuntimeError, match="shut down"):
        use(llm)


def test_exit_may_come_twice_and_with_requests_under_way(text_model: Path) -> None:
    llm = LLM(str(text_model), **OPTIONS)
    llm.add_request([1, 2, 3])
    llm.step()
    llm.exit()
    llm.exit()
    assert llm.is_finished()


def test_the_end_of_a_with_block_shuts_the_engine_down(text_model: Path) -> None:
    with LLM(str(text_model), **OPTIONS) as llm:
        assert isinstance(llm, LLM)
        completions(llm, [[1]], max_tokens=1)
    with pytest.raises(RuntimeError, match="shut down"):
        llm.add_request([1])


def test_exit_gives_the_memory_back(text_model: Path) -> None:
    llm = LLM(str(text_model), **OPTIONS)
    assert llm.model_runner is not None
    held = [
        weakref.ref(llm.model_runner.kv_cache),
        weakref.ref(llm.model_runner.model.lm_head.weight),
    ]
    completions(llm, [[1]], max_tokens=3)
    llm.exit()
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_two_engines_in_one_process_do_not_disturb_each_other(
    text_model: Path, checkpoint: CheckpointFactory
) -> None:
    """Different models, dtypes and block sizes, stepped by turns."""
    prompts = random_prompts([40, 18, 3], VOCAB_SIZE)
    models = [
        (text_model, OPTIONS),
        (checkpoint(ModelSpec(kind="Qwen2")), {**OPTIONS, "kvcache_block_size": 32}),
    ]
    expected = []
    for model, options in models:
        with LLM(str(model), **options) as llm:
            expected.append(completions(llm, prompts, max_tokens=16))
    with (
        LLM(str(models[0][0]), **models[0][1]) as one,
        LLM(str(models[1][0]), **models[1][1]) as two,
    ):
        results: list[dict[int, list[int]]] = [{}, {}]
        for prompt in prompts:
            for llm in (one, two):
                llm.add_request(prompt, greedy(16))
        while not (one.is_finished() and two.is_finished()):
            for llm, found in zip((one, two), results, strict=True):
                found.update(llm.step()[0])
        assert [[found[i] for i in sorted(found)] for found in results] == expected
        one.exit()
        assert completions(two, prompts, max_tokens=16) == expected[1]


def torch_state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.initial_seed(),
    )


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_torchs_defaults_are_as_before(dtype: str, text_model: Path) -> None:
    before = torch_state()
    with LLM(str(text_model), **OPTIONS, dtype=dtype) as llm:
        assert torch_state() == before
        completions(llm, [[1, 2]], max_tokens=3)
        assert torch_state() == before
    assert torch_state() == before


def test_torchs_defaults_are_as_before_when_loading_fails(text_model: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    (model_dir / "model.safetensors").unlink()
    before = torch_state()
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(model_dir), **OPTIONS, dtype="bfloat16")
    assert torch_state() == before


def test_torchs_defaults_are_as_before_when_the_model_cannot_be_made(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Qwen3ForCausalLM, "__init__", out_of_memory)
    before = torch_state()
    with pytest.raises(ValueError, match="no memory for the weights"):
        LLM(str(text_model), **OPTIONS, dtype="bfloat16")
    try:
        assert torch_state() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_dtype_of_the_process_does_not_matter(text_model: Path) -> None:
    with LLM(str(text_model), **OPTIONS) as llm:
        expected = completions(llm, [[5, 6]], max_tokens=8)
    torch.set_default_dtype(torch.float64)
    try:
        with LLM(str(text_model), **OPTIONS) as llm:
            assert completions(llm, [[5, 6]], max_tokens=8) == expected
            params = SamplingParams(temperature=0.8, max_tokens=4)
            assert llm.generate([[5, 6]], params, use_tqdm=False)
    finally:
        torch.set_default_dtype(torch.float32)


# --- what is not needed ----------------------------------------------------------------------


WITHOUT_OPTIONAL_PACKAGES = """
import json, sys

# As if they were not installed: neither found nor imported. (torch itself looks for triton.)
sys.modules |= {"triton": None, "flash_attn": None}
import torch
torch.set_num_threads(1)
from nanovllm import LLM, SamplingParams

with LLM(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    print(json.dumps(llm.generate([[5, 6], [7]], params, use_tqdm=False)))
assert sys.modules["triton"] is None and sys.modules["flash_attn"] is None
"""


@pytest.mark.slow
def test_triton_and_flash_attn_are_not_needed_on_a_cpu(llm: LLM, text_model: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES, str(text_model), json.dumps(OPTIONS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert found.returncode == 0, found.stderr
    expected = llm.generate([[5, 6], [7]], greedy(8), use_tqdm=False)
    assert json.loads(found.stdout) == expected


# --- the progress bar ------------------------------------------------------------------------


def test_the_progress_bar_shows_prompts_done_and_both_speeds(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate([[5, 6], [7]], greedy(8), use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert re.search(r"Prefill=\d+tok/s", shown)
    assert re.search(r"Decode=\d+tok/s", shown)


def test_the_progress_bar_moves_while_no_prompt_is_done(
    text_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At tqdm's own interval, with the tokens so far."""
    with LLM(str(text_model), **OPTIONS) as llm:
        real = Progress.__init__

        def eager(self: Progress, *args: Any) -> None:
            real(self, *args)
            self.bar.mininterval = 0.0

        monkeypatch.setattr(Progress, "__init__", eager)
        llm.generate([[5, 6]], greedy(8), use_tqdm=True)
    shown = capsys.readouterr().err
    assert [int(n) for n in re.findall(r"0/1 .*?Tokens=(\d+)", shown)] == [*range(1, 9)]
    assert "Tokens=8" in shown


def test_what_takes_long_at_start_up_says_so(
    text_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="nanovllm"):
        LLM(str(text_model), **OPTIONS).exit()
    messages = [record.getMessage() for record in caplog.records if record.name == "nanovllm"]
    assert f"Loading {text_model} ..." in messages
    assert any(re.fullmatch(rf"Loading {text_model}: \d+\.\d s", message) for message in messages)


def test_without_progress_bar_nothing_is_printed(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate([[5, 6], [7]], greedy(8), use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_a_list_of_arrays_is_a_list_of_prompts(tiny_model: Path) -> None:
    prompts = [np.array([5, 6]), np.array([7])]
    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        arrays = llm.generate(prompts, greedy(3), use_tqdm=False)
        lists = llm.generate([[5, 6], [7]], greedy(3), use_tqdm=False)
        assert arrays == lists
        assert len(llm.generate(np.array([5, 6]), greedy(3), use_tqdm=False)) == 1
        with pytest.raises(TypeError, match="token ids must be ints"):
            llm.generate([[np.array([5])]], greedy(3), use_tqdm=False)


def test_no_step_is_left_under_way_when_the_last_request_stops(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapped, a stop id is seen when the next step is launched already."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", True)
    with LLM(str(tiny_model), device="cpu", max_model_len=64) as llm:
        (output,) = llm.generate([5, 6], greedy(8), use_tqdm=False)
        stop = output["token_ids"][3]
    with LLM(str(tiny_model), device="cpu", max_model_len=64, eos=stop) as llm:
        (output,) = llm.generate([5, 6], greedy(8, ignore_eos=False), use_tqdm=False)
        assert output["finish_reason"] == "stop"
        assert llm.is_finished()


# --- prompts and numbers in the forms that tokenizers, arrays and tables give ----------------


def test_what_a_tokenizer_gives_is_a_prompt(text_model: Path, llm: LLM) -> None:
    tokenizer = llm.tokenizer
    expected = completions(llm, [[5, 6]], max_tokens=4)
    for prompts in (
        tokenizer("w5 w6"),
        tokenizer(["w5 w6"]),
        tokenizer("w5 w6", return_tensors="pt"),
        [tokenizer("w5 w6")],
        {"input_ids": [5, 6]},
    ):
        assert completions(llm, prompts, max_tokens=4) == expected  # type: ignore[arg-type]
    seq_id = llm.add_request(tokenizer("w5 w6"), greedy(4))
    assert run_to_end(llm)[seq_id] == expected[0]


def test_padding_in_what_a_tokenizer_gives_is_left_out(llm: LLM) -> None:
    tokenizer, texts = llm.tokenizer, ["w5 w6 w7", "w5"]
    tokenizer.pad_token = "w9"
    expected = completions(llm, [[5, 6, 7], [5]], max_tokens=4)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for kind in (None, "pt", "np"):
            given = tokenizer(texts, padding=True, return_tensors=kind)
            assert completions(llm, given, max_tokens=4) == expected
    padded = tokenizer("w5", padding="max_length", max_length=4)
    assert completions(llm, [tokenizer("w5 w6 w7"), padded], max_tokens=4) == expected
    with pytest.raises(ValueError, match="2 entries, attention_mask 1"):
        llm.generate({"input_ids": [5, 6], "attention_mask": [1]})


@pytest.mark.parametrize("mapping", [{}, {"ids": [1]}, {1: 2}], ids=repr)
def test_another_mapping_is_no_prompt(mapping: Any, llm: LLM) -> None:
    with pytest.raises(TypeError, match="must be"):
        llm.generate(mapping)
    with pytest.raises(TypeError, match="must be"):
        llm.generate([[1], mapping])


@pytest.mark.parametrize(
    "prompt",
    [
        *(torch.tensor([True, False]), torch.tensor(True), torch.tensor([1.0])),
        *(np.array([True, False]), [True]),
    ],
    ids=repr,
)
def test_bools_and_floats_are_no_token_ids(prompt: Any, llm: LLM) -> None:
    with pytest.raises(TypeError):
        llm.generate(prompt)
    with pytest.raises(TypeError):
        llm.generate([[1], prompt])


def test_numbers_of_numpy_are_numbers(text_model: Path) -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), max_tokens=np.int64(3), seed=np.int32(7), top_k=np.uint8(5),
        top_p=np.float64(0.5), min_p=np.float16(0.25), stop_token_ids=[np.int64(9)],
        logprobs=np.int16(1),
    )  # fmt: skip
    plain = SamplingParams(
        temperature=0.5, max_tokens=3, seed=7, top_k=5, top_p=0.5, min_p=0.25, stop_token_ids=[9],
        logprobs=1,
    )  # fmt: skip
    assert params == plain
    assert repr(params) == repr(plain)
    options = {"max_model_len": np.int64(64), "max_num_seqs": np.int32(2)}
    with LLM(str(text_model), device="cpu", **options) as llm:
        assert type(llm.config.max_model_len) is int
        assert llm.generate([1], params, use_tqdm=False) == llm.generate([1], plain, use_tqdm=False)


@pytest.mark.parametrize("bad", [np.bool_(True), np.array([3]), torch.tensor(3), "3"], ids=repr)
def test_what_is_no_number_stays_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="max_tokens must be an int"):
        SamplingParams(max_tokens=bad)


def test_an_error_names_the_row(llm: LLM) -> None:
    prompts: list[Any] = [[1]] * 300
    prompts[217] = [10**6]
    with pytest.raises(ValueError, match=r"^prompt 217: token id 1000000 is outside"):
        llm.generate(prompts)
    with pytest.raises(TypeError, match=r"^prompt 1: token ids must be ints"):
        llm.stream([[1], ["x"]])
    with pytest.raises(TypeError, match=r"^prompt 2: sampling_params must be"):
        llm.generate([[1]] * 3, [greedy(1), greedy(1), None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^token id 1000000"):
        llm.generate([[10**6]])


def test_a_long_text_brings_no_warning_of_transformers(
    text_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    edit_json(model_dir / "tokenizer_config.json", model_max_length=4)
    transformers.utils.logging.enable_propagation()
    try:
        with LLM(str(model_dir), **OPTIONS) as llm:
            llm.generate("w1 w2 w3 w4 w5 w6", greedy(1), use_tqdm=False)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if r.name.startswith("transformers")]

"""When a request ends by its own stop texts and ids, and what its result then says."""

from typing import Any

import pytest
from conftest import TINY, ask, greedy, is_idle

from nanovllm import LLM, SamplingParams

QUESTION = "introduce yourself"
ANSWER = "I am tiny-qwen3, a very small language model that runs on nano-vLLM."
STOP_WORD = "<|im_end|>"


def answer(llm: LLM, **params: Any) -> dict[str, Any]:
    """The result for QUESTION, greedy."""
    params = {"temperature": 0.0, "max_tokens": None, **params}
    [output] = llm.generate([ask(llm, QUESTION)], SamplingParams(**params), use_tqdm=False)
    assert is_idle(llm)
    return output


@pytest.fixture(scope="module")
def whole(shared_trained_llm: LLM) -> dict[str, Any]:
    """What nothing stops but the model."""
    output = answer(shared_trained_llm)
    assert output["text"].startswith(ANSWER)
    return output


def ends(output: dict[str, Any]) -> tuple[str, str | int | None]:
    return output["finish_reason"], output["stop_reason"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("mall l", "I am tiny-qwen3, a very s"),  # begins and ends within tokens
        ("I", ""),
        ("I am", ""),
        (", a", "I am tiny-qwen3"),
        ("y", "I am tin"),
        (["vLLM", "very", "runs"], "I am tiny-qwen3, a "),
        (("model that", "el th"), "I am tiny-qwen3, a very small language mod"),
    ],
)
def test_a_stop_text_ends_a_request_and_is_not_in_its_text(
    stop: Any, text: str, whole: dict[str, Any], trained_llm: LLM
) -> None:
    output = answer(trained_llm, stop=stop)
    assert output["text"] == text
    assert output["finish_reason"] == "stop"
    assert whole["text"].startswith(text + output["stop_reason"])
    assert output["stop_reason"] in ([stop] if isinstance(stop, str) else stop)


def test_the_token_ids_end_with_the_token_that_completed_the_stop_text(
    whole: dict[str, Any], trained_llm: LLM
) -> None:
    token_ids = answer(trained_llm, stop="mall l")["token_ids"]
    assert token_ids == whole["token_ids"][: len(token_ids)]
    assert "mall l" in trained_llm.tokenizer.decode(token_ids)
    assert "mall l" not in trained_llm.tokenizer.decode(token_ids[:-1])


def test_a_stop_text_that_never_comes_changes_nothing(
    whole: dict[str, Any], trained_llm: LLM
) -> None:
    assert answer(trained_llm, stop=["vLLM!", "introduce"]) == whole


def test_a_stop_text_with_the_last_token_allowed_counts_as_stop(trained_llm: LLM) -> None:
    num_tokens = len(answer(trained_llm, stop="small")["token_ids"])
    assert ends(answer(trained_llm, stop="small", max_tokens=num_tokens)) == ("stop", "small")
    output = answer(trained_llm, stop="small", max_tokens=num_tokens - 1)
    assert ends(output) == ("length", None)
    assert output["text"] == trained_llm.tokenizer.decode(output["token_ids"])


def test_a_stop_text_within_a_character_that_stays_incomplete_is_found(trained_llm: LLM) -> None:
    """At the end, the rest of a character is text as well, and no stop text may be in it."""
    whole = trained_llm.generate(
        [[5]], SamplingParams(temperature=50.0, seed=7, max_tokens=40, ignore_eos=True), False
    )[0]
    first = whole["text"].index("\ufffd")
    params = SamplingParams(temperature=50.0, seed=7, max_tokens=40, ignore_eos=True, stop="\ufffd")
    [output] = trained_llm.generate([[5]], params, use_tqdm=False)
    assert output["text"] == whole["text"][:first]
    assert ends(output) == ("stop", "\ufffd")


def test_each_request_has_its_own_stop_texts(whole: dict[str, Any], trained_llm: LLM) -> None:
    stops: list[Any] = ["small", None, "I", ["runs", "language"], None]
    text = whole["text"]
    expected = [text.split("small")[0], text, "", text.split("language")[0], text]
    params = [SamplingParams(temperature=0.0, max_tokens=None, stop=stop) for stop in stops]
    prompts = [ask(trained_llm, QUESTION)] * len(stops)
    outputs = trained_llm.generate(prompts, params, use_tqdm=False)
    assert [output["text"] for output in outputs] == expected


def test_stop_texts_are_found_in_a_request_that_was_preempted() -> None:
    params = SamplingParams(temperature=0.0, stop="spell")
    with LLM(
        str(TINY),
        device="cpu",
        dtype="float32",
        max_model_len=48,
        kvcache_block_size=16,
        num_kvcache_blocks=4,
    ) as llm:
        outputs = llm.generate([ask(llm, QUESTION)] * 4, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] > 0
    texts = {output["text"] for output in outputs}
    assert texts == {ANSWER + " I can list primes, count, add, sort and "}


# --- stop ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_id_of_the_request_ends_it_and_stays(
    ignore_eos: bool, whole: dict[str, Any], trained_llm: LLM
) -> None:
    token_ids = whole["token_ids"][:5]
    stop_ids = [300, whole["token_ids"][7], token_ids[-1]]
    output = answer(trained_llm, stop_token_ids=stop_ids, ignore_eos=ignore_eos)
    assert output["token_ids"] == token_ids
    assert output["text"] == trained_llm.tokenizer.decode(token_ids[:-1])
    assert ends(output) == ("stop", token_ids[-1])


def test_the_models_own_stop_id_is_no_stop_reason(whole: dict[str, Any], trained_llm: LLM) -> None:
    eos = trained_llm.tokenizer.eos_token_id
    assert ends(whole) == ("stop", None)
    assert ends(answer(trained_llm, stop_token_ids=[eos])) == ("stop", None)


def test_the_models_own_stop_id_may_be_one_of_the_request(
    whole: dict[str, Any], trained_llm: LLM
) -> None:
    eos = trained_llm.tokenizer.eos_token_id
    output = answer(trained_llm, stop_token_ids=[eos], ignore_eos=True)
    assert ends(output) == ("stop", eos)
    assert output["token_ids"] == whole["token_ids"]


# --- the other ends, and special tokens ------------------------------------------------------


def test_without_max_tokens_a_request_fills_max_model_len(trained_llm: LLM) -> None:
    prompt = ask(trained_llm, QUESTION)
    [output] = trained_llm.generate([prompt], greedy(max_tokens=None), use_tqdm=False)
    assert len(prompt) + len(output["token_ids"]) == trained_llm.config.max_model_len
    assert ends(output) == ("length", None)


def test_special_tokens_are_in_the_text_if_asked_for(
    whole: dict[str, Any], trained_llm: LLM
) -> None:
    options = {"ignore_eos": True, "max_tokens": len(whole["token_ids"])}
    output = answer(trained_llm, skip_special_tokens=False, **options)
    assert output["text"] == whole["text"] + STOP_WORD
    assert output["token_ids"] == whole["token_ids"]


@pytest.mark.parametrize("stop_token_ids", [None, "fifth"])
def test_the_id_that_ends_a_request_has_no_text(
    stop_token_ids: str | None, whole: dict[str, Any], trained_llm: LLM
) -> None:
    """The model's own, special tokens shown or not, and one of the request; in streams too."""
    num_tokens = 5 if stop_token_ids else len(whole["token_ids"])
    ids = whole["token_ids"][:num_tokens]
    options = {"stop_token_ids": ids[-1:]} if stop_token_ids else {}
    expected = trained_llm.tokenizer.decode(ids[:-1])
    for skip in (True, False):
        params = SamplingParams(
            temperature=0.0, max_tokens=None, skip_special_tokens=skip, **options
        )
        [output] = trained_llm.generate(ask(trained_llm, QUESTION), params, use_tqdm=False)
        assert (output["text"], output["token_ids"]) == (expected, ids)
        pieces = list(trained_llm.stream(ask(trained_llm, QUESTION), params))
        assert "".join(piece["text"] for piece in pieces) == expected
        assert [i for piece in pieces for i in piece["token_ids"]] == ids
    # Its text completes no stop text either.
    last = trained_llm.tokenizer.decode(ids[-1:])
    assert answer(trained_llm, stop=expected[-2:] + last, **options)["text"] == expected


def test_a_special_token_may_be_a_stop_text_if_it_is_in_the_text(
    whole: dict[str, Any], trained_llm: LLM
) -> None:
    output = answer(trained_llm, skip_special_tokens=False, stop=STOP_WORD, ignore_eos=True)
    assert output["text"] == whole["text"]
    assert ends(output) == ("stop", STOP_WORD)
    assert ends(answer(trained_llm, skip_special_tokens=False, stop=STOP_WORD)) == ("stop", None)
    assert ends(answer(trained_llm, stop=STOP_WORD)) == ("stop", None)


def test_a_request_that_stops_by_ids_alone_is_not_decoded_as_it_goes(trained_llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, stop_token_ids=[3], max_tokens=2)
    trained_llm.add_request(ask(trained_llm, QUESTION), params)
    assert trained_llm.scheduler.waiting[0].detokenizer is None
    while not trained_llm.is_finished():
        trained_llm.step()

"""LLM.chat: conversations through the tokenizer's chat template."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import greedy, is_idle

from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
HELLO = [{"role": "user", "content": "introduce yourself"}]
LONGER = [
    {"role": "system", "content": "be brief"},
    *HELLO,
    {"role": "assistant", "content": "I am 你好 😀."},
    {"role": "user", "content": "list all prime numbers within 100"},
]


def render(llm: LLM, conversation: list[dict[str, str]], **options: Any) -> str:
    text: str = llm.tokenizer.apply_chat_template(
        conversation, tokenize=False, **{"add_generation_prompt": True, **options}
    )
    return text


def test_a_conversation_is_completed_as_its_rendered_text(trained_llm: LLM) -> None:
    expected = trained_llm.generate([render(trained_llm, LONGER)], GREEDY, use_tqdm=False)
    trained_llm.scheduler.start_over([])  # no prefix is known
    assert trained_llm.chat(LONGER, GREEDY, use_tqdm=False) == expected
    assert expected[0]["text"]


def test_a_list_of_conversations_gives_a_result_for_each(trained_llm: LLM) -> None:
    params = [GREEDY, SamplingParams(temperature=0.0, max_tokens=3)]
    found = trained_llm.chat([HELLO, LONGER], params, use_tqdm=False)
    alone = [
        trained_llm.chat(messages, one, use_tqdm=False)[0]
        for messages, one in zip([HELLO, LONGER], params, strict=True)
    ]
    assert [output["token_ids"] for output in found] == [output["token_ids"] for output in alone]
    assert [len(output["token_ids"]) for output in found] == [6, 3]


def test_no_conversations_give_no_results(trained_llm: LLM) -> None:
    assert trained_llm.chat([], GREEDY, use_tqdm=False) == []


def prompt_of(llm: LLM, messages: Any, **options: Any) -> str:
    """What a conversation was rendered to."""
    [output] = llm.chat(messages, GREEDY, use_tqdm=False, **options)
    text: str = llm.tokenizer.decode(output["prompt_token_ids"])
    return text


def test_the_answer_of_the_assistant_begins_unless_the_caller_says_else(trained_llm: LLM) -> None:
    whole = render(trained_llm, HELLO)
    assert prompt_of(trained_llm, HELLO) == whole
    without = prompt_of(trained_llm, HELLO, add_generation_prompt=False)
    assert without == whole.removesuffix("<|im_start|>assistant\n") != whole


def test_options_reach_the_template(trained_llm: LLM) -> None:
    template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ add_generation_prompt }}"
    options = {"chat_template": template, "enable_thinking": False}
    assert prompt_of(trained_llm, HELLO, **options) == "introduce yourself|False|True"


def test_an_assistant_that_calls_tools_may_say_nothing(trained_llm: LLM) -> None:
    messages = [*HELLO, {"role": "assistant", "tool_calls": [{"name": "add"}]}]
    template = "{{ messages[1].tool_calls[0].name }}"
    assert prompt_of(trained_llm, messages, chat_template=template) == "add"


def test_messages_are_not_changed(trained_llm: LLM) -> None:
    messages = [dict(message) for message in LONGER]
    trained_llm.chat(messages, GREEDY, use_tqdm=False)
    assert messages == LONGER


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "messages must be a list of dicts, got None"),
    ("hello", TypeError, "messages must be a list of dicts, got 'hello'"),
    ({"role": "user", "content": "a"}, TypeError, "messages must be a list of dicts, got {'role'"),
    (["hello"], TypeError, "a conversation must be a list of dicts, got 'hello'"),
    ([[]], ValueError, r"at least one message, got \[\]"),
    ([HELLO, []], ValueError, r"at least one message, got \[\]"),
    ([*HELLO, "hello"], TypeError, "a message must be a dict .*, got 'hello'"),
    ([HELLO, ["hello"]], TypeError, "a message must be a dict .*, got 'hello'"),
    ([{}], ValueError, "must have a 'role' that is a str, got {}"),
    ([{"role": 1, "content": "a"}], ValueError, "must have a 'role' that is a str, got {'role': 1"),
    ([{"role": "user"}], ValueError, "must have a 'content' that is a str, got {'role': 'user'}"),
    ([{"role": "user", "content": None}], ValueError, "must have a 'content' that is a str"),
    ([{"role": "user", "content": ["a"]}], ValueError, "must have a 'content' that is a str"),
    ([{"role": "user", "content": "\ud800"}], ValueError, "must be valid Unicode, got"),
    ([{"role": "user", "content": "a " * 200}], ValueError, "must have 1 to 127 tokens"),
]


@pytest.mark.parametrize(("messages", "error", "message"), REFUSED)
def test_malformed_conversations_are_refused(
    messages: Any, error: type[Exception], message: str, shared_trained_llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        shared_trained_llm.chat(messages, GREEDY, use_tqdm=False)
    assert is_idle(shared_trained_llm)


def test_a_conversation_that_the_template_refuses_is_told_why(shared_trained_llm: LLM) -> None:
    template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(ValueError, match=r"refuses .*'introduce yourself'.*must come first"):
        shared_trained_llm.chat(HELLO, GREEDY, chat_template=template)


def test_the_caller_cannot_choose_what_the_template_gives(shared_trained_llm: LLM) -> None:
    with pytest.raises(TypeError, match="tokenize"):
        shared_trained_llm.chat(HELLO, GREEDY, tokenize=True)


def test_without_a_tokenizer_there_is_no_chat(tiny_model: Path) -> None:
    with (
        LLM(str(tiny_model), device="cpu", max_model_len=32) as llm,
        pytest.raises(ValueError, match=r"no tokenizer, which chat\(\) needs"),
    ):
        llm.chat(HELLO)


def test_without_a_chat_template_one_must_be_given(text_model: Path) -> None:
    with LLM(str(text_model), device="cpu", max_model_len=32) as llm:
        with pytest.raises(ValueError, match="has no chat template: give one as chat_template="):
            llm.chat(HELLO)
        [output] = llm.chat(HELLO, GREEDY, use_tqdm=False, chat_template="w5 w6")
        assert output["prompt_token_ids"] == [5, 6]


def test_arrays_of_messages_are_conversations(trained_llm: LLM) -> None:
    """As Ray and Parquet give them."""
    messages = [{"role": "user", "content": "introduce yourself"}]
    [expected] = trained_llm.chat(messages, greedy(4), use_tqdm=False)
    array = np.array(messages, dtype=object)
    assert trained_llm.chat(array, greedy(4), use_tqdm=False) == [expected]
    both = np.empty(2, dtype=object)
    both[:] = [array, array]
    assert trained_llm.chat(both, greedy(4), use_tqdm=False) == [expected] * 2


def test_an_error_names_the_conversation(trained_llm: LLM) -> None:
    good = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=r"^conversation 2: a message must have a 'role'"):
        trained_llm.chat([good, good, [{"content": "x"}]])


NAMES = "stream enable_thinkin temperature tools documents truncation max_length return_tensors"


@pytest.mark.parametrize("name", NAMES.split())
def test_an_option_that_the_template_does_not_use_is_refused(
    name: str, shared_trained_llm: LLM
) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}x{% endif %}"
    with pytest.raises(TypeError, match=f"does not use '{name}'.*enable_thinking"):
        shared_trained_llm.chat(HELLO, GREEDY, chat_template=template, **{name: True})
    with pytest.raises(TypeError, match=f"does not use '{name}'"):
        shared_trained_llm.stream(HELLO, GREEDY, **{name: True})


def test_a_template_that_a_user_gives_the_tokenizer_is_used(trained_llm: LLM) -> None:
    tokenizer = trained_llm.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0].content }}!"
        assert prompt_of(trained_llm, HELLO) == "introduce yourself!"
    finally:
        tokenizer.chat_template = before


def test_a_template_with_tags_of_its_own_takes_any_option(trained_llm: LLM) -> None:
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ x }}"
    assert prompt_of(trained_llm, HELLO, chat_template=template, x=5) == "introduce yourself5"


@pytest.mark.parametrize(
    "messages", [HELLO, deque(HELLO), [HELLO, LONGER], np.array(HELLO, dtype=object)]
)
def test_conversations_stream_what_chat_gives(messages: Any, trained_llm: LLM) -> None:
    outputs = trained_llm.chat(messages, GREEDY, use_tqdm=False)
    texts = [""] * len(outputs)
    for piece in trained_llm.stream(messages, GREEDY):
        texts[piece["index"]] += piece["text"]
    assert texts == [output["text"] for output in outputs]


def test_a_conversation_streams_with_the_templates_options(trained_llm: LLM) -> None:
    [output] = trained_llm.chat(HELLO, GREEDY, use_tqdm=False, add_generation_prompt=False)
    pieces = trained_llm.stream(HELLO, GREEDY, add_generation_prompt=False)
    assert "".join(piece["text"] for piece in pieces) == output["text"]
    with pytest.raises(TypeError, match="only conversations take add_generation_prompt"):
        trained_llm.stream("hello", GREEDY, add_generation_prompt=False)

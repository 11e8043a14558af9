"""LLM.stream: the same results as generate, piece by piece, and nothing left behind."""

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ask, is_idle

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


GREEDY = greedy(12)
PARAMS = [
    SamplingParams(temperature=0.0, stop=["small l", "never"]),
    SamplingParams(temperature=50.0, max_tokens=30, seed=1, ignore_eos=True),  # any bytes
    SamplingParams(temperature=50.0, max_tokens=30, seed=2, skip_special_tokens=False),
    SamplingParams(temperature=0.0, max_tokens=5, logprobs=2),
    SamplingParams(temperature=0.0, stop_token_ids=[422], logprobs=0),
    SamplingParams(temperature=0.0, max_tokens=1),
]


def prompts_of(llm: LLM) -> list[list[int]]:
    return [ask(llm, "introduce yourself")] * len(PARAMS)


def joined(pieces: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the pieces of each prompt make together; each may end once, with its last piece."""
    found: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"text": "", "token_ids": [], "finish_reason": None}
    )
    for piece in pieces:
        whole = found[piece["index"]]
        assert whole["finish_reason"] is None, "something came after the end"
        whole["text"] += piece["text"]
        whole["token_ids"] += piece["token_ids"]
        if "logprobs" in piece:
            assert len(piece["logprobs"]) == len(piece["token_ids"])
            whole.setdefault("logprobs", []).extend(piece["logprobs"])
        whole["finish_reason"], whole["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    return [found[index] for index in sorted(found)]


def generated(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[dict[str, Any]]:
    """What generate gives, without what a stream does not tell."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        del output["prompt_token_ids"], output["num_cached_tokens"]
    return outputs


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Equal, and log-probabilities about so: batches of other sizes round otherwise."""
    for one, other in zip(found, expected, strict=True):
        for mine, its in zip(one.pop("logprobs", []), other.pop("logprobs", []), strict=True):
            assert mine == pytest.approx(its, abs=1e-4)
    return found == expected


# --- what comes ------------------------------------------------------------------------------


def test_the_pieces_are_what_generate_gives(trained_llm: LLM) -> None:
    """For more requests than run at a time, of all kinds."""
    prompts = prompts_of(trained_llm)
    expected = generated(trained_llm, prompts, PARAMS)
    assert [output["finish_reason"] for output in expected] == [
        "stop", "length", "length", "length", "stop", "length"
    ]  # fmt: skip
    assert same(joined(trained_llm.stream(prompts, PARAMS)), expected)


def test_tokens_come_one_by_one(trained_llm: LLM) -> None:
    pieces = list(trained_llm.stream(ask(trained_llm, "introduce yourself"), GREEDY))
    assert [len(piece["token_ids"]) for piece in pieces] == [1] * 12
    assert pieces[0].keys() == {"index", "text", "token_ids", "finish_reason", "stop_reason"}
    assert [piece["finish_reason"] for piece in pieces] == [None] * 11 + ["length"]
    assert {piece["index"] for piece in pieces} == {0}


def test_requests_advance_together(trained_llm: LLM) -> None:
    prompts = [ask(trained_llm, "introduce yourself")] * 3
    order = [piece["index"] for piece in trained_llm.stream(prompts, GREEDY)]
    assert order == [0, 1, 2] * 12


@pytest.mark.parametrize("prompts", [[], "introduce yourself", [[5, 6]], ["a", [5]]], ids=repr)
def test_prompts_have_all_forms_that_generate_takes(prompts: Any, trained_llm: LLM) -> None:
    expected = trained_llm.generate(prompts, GREEDY, use_tqdm=False)
    found = joined(trained_llm.stream(prompts, GREEDY))
    assert [output["text"] for output in found] == [output["text"] for output in expected]


def test_no_stop_text_ever_shows(trained_llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, stop="a very small model")
    text = ""
    for piece in trained_llm.stream(ask(trained_llm, "introduce yourself"), params):
        text += piece["text"]
        if piece["finish_reason"] is None:
            assert not text.endswith(("a very", "a very small"))  # held back: it may begin it
    assert text.startswith("I am tiny-qwen3, a very small language")


def test_without_a_tokenizer_the_text_is_empty(tiny_model: Path) -> None:
    with LLM(str(tiny_model), device="cpu", max_model_len=32) as llm:
        pieces = list(llm.stream([5, 6], greedy(3)))
        assert [piece["text"] for piece in pieces] == [""] * 3
        assert [len(piece["token_ids"]) for piece in pieces] == [1] * 3


# --- the call --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([[5], []], GREEDY, ValueError, "1 to 127 tokens"),
        ([[5], [512]], GREEDY, ValueError, "token id 512 is outside"),
        ([[5], [6]], [GREEDY], ValueError, "2 prompts, but 1 sampling_params"),
        (5, GREEDY, TypeError, "got 5"),
        ([[5]], 5, TypeError, "sampling_params must be"),
    ],
)
def test_a_bad_call_raises_before_anything_is_asked_for(
    prompts: Any, params: Any, error: type[Exception], message: str, trained_llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        trained_llm.stream(prompts, params)
    assert is_idle(trained_llm)


def test_nothing_is_queued_before_the_first_piece_is_asked_for(trained_llm: LLM) -> None:
    pieces = trained_llm.stream([[5], [6]], GREEDY)
    assert is_idle(trained_llm)
    next(pieces)
    assert not trained_llm.is_finished()
    pieces.close()  # type: ignore[attr-defined]


# --- leaving early ---------------------------------------------------------------------------


def leave_by_break(llm: LLM) -> None:
    for _ in llm.stream([[5], [6]] * 3, GREEDY):
        break


def leave_by_close(llm: LLM) -> None:
    pieces = llm.stream([[5], [6]] * 3, GREEDY)
    for _ in range(4):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]


def leave_by_an_exception(llm: LLM) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        for number, _ in enumerate(llm.stream([[5], [6]] * 3, GREEDY)):
            if number == 3:
                raise KeyboardInterrupt


def never_begin(llm: LLM) -> None:
    llm.stream([[5]], GREEDY)


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_close, leave_by_an_exception, never_begin]
)
def test_a_loop_that_is_left_aborts_its_requests_alone(
    leave: Callable[[LLM], None], trained_llm: LLM
) -> None:
    prompt = ask(trained_llm, "introduce yourself")
    expected = trained_llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"]
    other = trained_llm.add_request(prompt, GREEDY)
    trained_llm.step()
    leave(trained_llm)
    finished = []
    while not trained_llm.is_finished():
        finished += trained_llm.step()[0]
    assert finished == [(other, expected)]


class Forgotten:
    """Holds itself, so that only the garbage collector drops the stream."""

    def __init__(self, pieces: Iterator[dict[str, Any]]) -> None:
        self.pieces = pieces
        self.itself = self


@contextlib.contextmanager
def collecting_at(owner: type, name: str) -> Iterator[None]:
    """The garbage collector runs with the first call of a method, and at no other time."""
    real = getattr(owner, name)

    def collecting(*args: Any, **kwargs: Any) -> Any:
        patch.undo()  # once is enough
        gc.collect()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, collecting)
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("owner", "name", "is_broken_off"),
    [
        (BlockManager, "allocate", False),
        (BlockManager, "publish", False),
        (Scheduler, "_has_ended", True),
    ],
    ids=["while_scheduling", "while_publishing", "while_recovering"],
)
def test_the_garbage_collector_may_close_a_stream_in_the_middle_of_a_step(
    owner: type, name: str, is_broken_off: bool, trained_llm: LLM
) -> None:
    prompt = ask(trained_llm, "introduce yourself")
    [expected] = trained_llm.generate(prompt, GREEDY, use_tqdm=False)
    pieces = trained_llm.stream(prompt, greedy(60))
    next(pieces)
    if is_broken_off:
        recover_in_between(trained_llm)
    Forgotten(pieces)
    del pieces
    with collecting_at(owner, name):
        [output] = trained_llm.generate(prompt, GREEDY, use_tqdm=False)
    assert output["token_ids"] == expected["token_ids"]
    assert is_idle(trained_llm)


def test_a_stream_that_was_dropped_within_a_step_is_aborted_though_ctrl_c_comes_first(
    trained_llm: LLM,
) -> None:
    pieces = trained_llm.stream([5], GREEDY)
    next(pieces)
    interrupt = mock.patch.object(Scheduler, "abort", side_effect=KeyboardInterrupt)
    with interrupt, pytest.raises(KeyboardInterrupt):
        trained_llm._turns.take(pieces.close)
    assert trained_llm.step() == ([], 0)
    assert is_idle(trained_llm)


def test_a_request_that_is_aborted_by_its_id_ends_with_no_reason(trained_llm: LLM) -> None:
    pieces = trained_llm.stream([[5], [6]], GREEDY)
    next(pieces)
    trained_llm.abort_request(min(seq.seq_id for seq in trained_llm.scheduler.running))
    rest = list(pieces)
    assert {piece["index"] for piece in rest} == {1}
    assert rest[-1]["finish_reason"] == "length"


# --- using the engine in between -------------------------------------------------------------


def generate_in_between(llm: LLM) -> None:
    prompt = ask(llm, "introduce yourself")
    [output] = llm.generate(prompt, greedy(4), use_tqdm=False)
    assert output["text"] == "I am tiny-qwen"


def step_in_between(llm: LLM) -> None:
    """A loop of the caller's own is not given the requests of the stream."""
    request = llm.add_request([5, 6], greedy(3))
    for _ in range(100):
        if finished := llm.step()[0]:
            break
    assert [seq_id for seq_id, _ in finished] == [request]


def run_all_in_between(llm: LLM) -> None:
    """So the stream's own requests come to their end outside of it."""
    while not llm.is_finished():
        assert llm.step()[0] == []


def stream_in_between(llm: LLM) -> None:
    assert len(list(llm.stream([[5], [6]], greedy(3)))) == 6


def recover_in_between(llm: LLM) -> None:
    """A step of the caller's breaks off while it takes in what was sampled."""

    def broken(*_: object, **__: object) -> None:
        raise OSError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_has_ended", broken)
        with contextlib.suppress(OSError):
            llm.step()


@pytest.mark.parametrize(
    "use",
    [
        generate_in_between,
        step_in_between,
        run_all_in_between,
        stream_in_between,
        recover_in_between,
    ],
)
def test_in_between_the_engine_may_be_used(use: Callable[[LLM], None], trained_llm: LLM) -> None:
    prompts, params = prompts_of(trained_llm)[:5], PARAMS[:5]
    expected = generated(trained_llm, prompts, params)
    pieces = []
    for number, piece in enumerate(trained_llm.stream(prompts, params)):
        pieces.append(piece)
        if number % 7 == 0:
            use(trained_llm)
    assert same(joined(iter(pieces)), expected)


def test_the_end_is_told_if_the_step_that_brought_it_broke_off(trained_llm: LLM) -> None:
    """The last token is known then, but not yet that it is the last."""
    pieces = trained_llm.stream([5], greedy(2))
    found = [next(pieces)]
    for _ in range(2):
        recover_in_between(trained_llm)
    assert trained_llm.step() == ([], 0)
    found += pieces
    assert sum(len(piece["token_ids"]) for piece in found) == 2
    assert [piece["finish_reason"] for piece in found][-1] == "length"


def test_requests_of_others_run_along_and_keep_their_results(trained_llm: LLM) -> None:
    prompt = ask(trained_llm, "introduce yourself")
    expected = trained_llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"]
    other = trained_llm.add_request(prompt, GREEDY)
    assert len(joined(trained_llm.stream([prompt, prompt], GREEDY))) == 2
    finished = []
    while not trained_llm.is_finished():
        finished += trained_llm.step()[0]
    assert finished == [(other, expected)]


def test_a_stream_says_that_the_engine_was_shut_down(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), device="cpu", max_model_len=32)
    pieces = llm.stream([[5]], GREEDY)
    next(pieces)
    llm.exit()
    with pytest.raises(RuntimeError, match="shut down"):
        next(pieces)

"""One engine in many threads, in signal handlers, and in a process that forked."""

import copy
import gc
import os
import pickle
import random
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tally, completions, greedy, is_idle, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.progress import Progress
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence

pytestmark = pytest.mark.slow

VOCAB_SIZE = 307
MAX_TOKENS = 20


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(
    tiny_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """A small pool, so that requests preempt one another too; idle in the end."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", request.param)
    with LLM(
        str(tiny_model), device="cpu", max_model_len=96, kvcache_block_size=16,
        num_kvcache_blocks=40, max_num_seqs=8,
    ) as llm:  # fmt: skip
        yield llm
        assert is_idle(llm)


def in_threads(num_threads: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ... in a thread each, begun together; an exception of any is raised."""
    barrier = threading.Barrier(num_threads)

    def begin(index: int) -> Any:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(begin, range(num_threads)))


def prompts_for(num_threads: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return random_prompts([rng.randint(1, 60) for _ in range(num_threads)], VOCAB_SIZE, seed)


# --- many threads ----------------------------------------------------------------------------


def streamed(llm: LLM, prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    return [i for piece in llm.stream(prompt, greedy(max_tokens)) for i in piece["token_ids"]]


def generated(llm: LLM, prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    return completions(llm, [prompt], max_tokens)[0]


class Choosy:
    """A tokenizer that fails for some ids."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, bad_ids: set[int]) -> None:
        self.bad_ids = bad_ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        if self.bad_ids & set(token_ids):
            raise OverflowError("no such id")
        return "x" * len(token_ids)


def test_a_tokenizer_that_fails_ends_its_own_request_alone(llm: LLM) -> None:
    """Whoever made the step: and each time, so that nothing can be tried again."""
    prompts = prompts_for(8)
    expected = completions(llm, prompts, MAX_TOKENS)
    bad_ids = set().union(*expected[::2]) - set().union(*expected[1::2])
    assert all(bad_ids & set(ids) for ids in expected[::2])
    llm.tokenizer = Choosy(bad_ids)
    stopping = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, stop="y")

    def work(index: int) -> list[int]:
        if index % 4 < 2:
            return llm.generate([prompts[index]], stopping, use_tqdm=False)[0]["token_ids"]
        return [i for piece in llm.stream(prompts[index], stopping) for i in piece["token_ids"]]

    def outcome(index: int) -> object:
        try:
            return work(index)
        except OverflowError as error:
            return str(error)

    for _ in range(3):
        found = in_threads(8, outcome)
        assert found[::2] == ["no such id"] * 4
        assert found[1::2] == expected[1::2]
        assert is_idle(llm)
    ids = [llm.add_request(prompt, stopping) for prompt in prompts[:4]]
    finished, num_errors = {}, 0
    while not llm.is_finished():
        try:
            finished |= dict(llm.step()[0])
        except OverflowError:
            num_errors += 1
    assert num_errors == 2
    assert finished == {ids[1]: expected[1], ids[3]: expected[3]}


def test_a_device_that_fails_for_good_says_so_each_time(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an illegal access on a GPU, where synchronising fails too."""

    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    llm = LLM(str(tiny_model), device="cpu", max_model_len=96)
    for name in ("launch", "synchronize"):
        monkeypatch.setattr(ModelRunner, name, fail)
    for _ in range(2):
        for work in (generated, streamed):
            with pytest.raises(RuntimeError, match="the device is lost"):
                work(llm, [1, 2, 3])
    monkeypatch.undo()
    assert generated(llm, [1, 2, 3]) == streamed(llm, [1, 2, 3])
    llm.exit()


@pytest.mark.parametrize("use", [generated, streamed])
def test_what_threads_get_is_what_a_lone_request_gets(
    llm: LLM, use: Callable[[LLM, list[int]], list[int]]
) -> None:
    prompts = prompts_for(16)
    expected = [generated(llm, prompt) for prompt in prompts]
    for _ in range(3):
        assert in_threads(16, lambda index: use(llm, prompts[index])) == expected


def test_the_requests_of_all_threads_share_the_steps(llm: LLM) -> None:
    sizes: Counter[int] = Counter()

    def count(event: str, batch: Batch | None) -> None:
        if event == "scheduled" and batch is not None and not batch.is_prefill:
            sizes[len(batch.items)] += 1

    llm.observers.append(count)
    prompts = random_prompts([3] * 4, VOCAB_SIZE)
    in_threads(4, lambda index: generated(llm, prompts[index], 90))
    assert sum(sizes.values()) < 2 * 90  # one after the other, it would be 4 times as many


def test_loops_over_step_in_several_threads_are_given_each_result_once(llm: LLM) -> None:
    prompts = prompts_for(24)
    expected = [generated(llm, prompt) for prompt in prompts]

    def loop(index: int) -> tuple[list[int], list[tuple[int, list[int]]]]:
        own = prompts[index * 4 : index * 4 + 4]
        seq_ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in own]
        found = []
        while not llm.is_finished():
            found += llm.step()[0]
        return seq_ids, found

    results = in_threads(6, loop)
    prompt_of = dict(zip((i for ids, _ in results for i in ids), range(24), strict=True))
    found = [entry for _, entries in results for entry in entries]
    assert Counter(seq_id for seq_id, _ in found) == Counter(prompt_of.keys())
    assert all(ids == expected[prompt_of[seq_id]] for seq_id, ids in found)


def test_threads_may_come_and_go_as_they_like(llm: LLM) -> None:
    """generate, streams that are left or closed, aborts and loops beside one another."""
    prompts = prompts_for(12)
    expected = [generated(llm, prompt) for prompt in prompts]

    def act(index: int) -> None:
        rng = random.Random(index)
        for _ in range(6):
            at = rng.randrange(12)
            kind = rng.randrange(4)
            if kind == 0:
                assert generated(llm, prompts[at]) == expected[at]
            elif kind == 1:
                assert streamed(llm, prompts[at]) == expected[at]
            elif kind == 2:
                stop = rng.randrange(MAX_TOKENS)
                for number, _ in enumerate(llm.stream(prompts[at], greedy(MAX_TOKENS))):
                    if number == stop:
                        break
            else:
                llm.abort_request(llm.add_request(prompts[at], greedy(MAX_TOKENS)))

    in_threads(8, act)
    llm.step()  # a step under way may have to be read
    assert [generated(llm, prompt) for prompt in prompts] == expected


@pytest.mark.parametrize("name", ["schedule", "postprocess"])
def test_an_exception_in_one_thread_does_no_harm_to_the_others(
    llm: LLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever steps gets it; the requests of the others go on."""
    prompts = prompts_for(8)
    expected = [generated(llm, prompt) for prompt in prompts]
    real = getattr(Scheduler, name)
    calls = Counter[str]()

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        result = real(*args, **kwargs)
        if calls[name] in (4, 9):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Scheduler, name, faulty)

    def use(index: int) -> list[int] | None:
        try:
            return (generated if index % 2 else streamed)(llm, prompts[index])
        except KeyboardInterrupt:
            return None

    results = in_threads(8, use)
    assert results.count(None) == 2
    assert all(found in (None, own) for found, own in zip(results, expected, strict=True))


def test_a_stream_that_several_threads_ask_gives_each_piece_once(llm: LLM) -> None:
    prompts = prompts_for(6)
    expected = [generated(llm, prompt) for prompt in prompts]
    stream = llm.stream(prompts, greedy(MAX_TOKENS))
    found = [Counter[int]() for _ in prompts]

    def ask(_: int) -> None:
        for piece in stream:
            found[piece["index"]].update(piece["token_ids"])

    in_threads(4, ask)
    assert found == [Counter(ids) for ids in expected]


def test_a_handler_that_asks_the_stream_it_has_interrupted_is_refused(llm: LLM) -> None:
    """Also between steps, where it would wait for itself; and the stream ends, as by any error."""
    stream = llm.stream([1, 2, 3], greedy(MAX_TOKENS))
    next(stream)
    step_until = llm._step_until

    def interrupted(*args: Any) -> None:
        next(stream)
        step_until(*args)

    llm._step_until = interrupted  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="has interrupted"):
        next(stream)
    assert list(stream) == []


def test_no_thread_goes_on_stepping_for_what_is_not_there(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], greedy(MAX_TOKENS))
    next(stream)
    llm._step_until(lambda: llm.is_finished() and False)
    assert sum(len(piece["token_ids"]) for piece in stream) == MAX_TOKENS - 1


def test_a_stream_closed_as_it_begins_leaves_nothing(llm: LLM) -> None:
    """By another thread, between the look whether it is closed and the queuing."""
    stream = llm.stream([1, 2, 3], greedy(MAX_TOKENS))
    enqueue = llm._enqueue

    def late(*args: Any) -> None:
        ThreadPoolExecutor(1).submit(stream.close).result()
        enqueue(*args)

    llm._enqueue = late  # type: ignore[method-assign]
    assert list(stream) == []
    assert is_idle(llm)


def test_what_one_thread_does_to_the_tokenizer_is_nothing_to_another(trained_llm: LLM) -> None:
    text = "list all prime numbers within 100 " * 5
    [expected] = trained_llm.generate(text, greedy(1), use_tqdm=False)
    tokenizer, is_over = trained_llm.tokenizer, threading.Event()

    def truncate() -> None:
        while not is_over.is_set():
            tokenizer([text, "a"], truncation=True, max_length=5, padding=True)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(truncate)
        outputs = [trained_llm.generate(text, greedy(1), use_tqdm=False)[0] for _ in range(50)]
        is_over.set()
        other.result()
    assert all(output["prompt_token_ids"] == expected["prompt_token_ids"] for output in outputs)


def test_an_engine_that_is_dropped_is_freed_at_once(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), device="cpu", max_model_len=96)
    generated(llm, [1, 2, 3])
    list(llm.stream([1], greedy(2)))
    freed = weakref.ref(llm)
    gc.disable()
    try:
        del llm
        assert freed() is None
    finally:
        gc.enable()


def test_a_bar_is_drawn_while_another_thread_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is told of no tokens several times a second."""
    told = Counter[tuple[int, bool]]()
    real = Progress.count_step

    def count_step(self: Progress, num_tokens: int, seconds: float) -> None:
        told[threading.get_ident(), num_tokens == 0] += 1
        real(self, num_tokens, seconds)

    monkeypatch.setattr(Progress, "count_step", count_step)
    in_threads(2, lambda i: llm.generate([[1 + i] * 5], greedy(80), use_tqdm=False))
    assert any(was_waiting for _, was_waiting in told)


def test_a_request_aborted_by_another_thread_ends_its_call(llm: LLM) -> None:
    """What was generated until then is given, with no reason."""
    [prompt] = random_prompts([5], VOCAB_SIZE)
    expected = generated(llm, prompt, 80)
    is_done = threading.Event()

    def use(index: int) -> Any:
        while index == 0:
            [output] = llm.generate(prompt, greedy(80), use_tqdm=False)
            if output["finish_reason"] is None:
                is_done.set()
                return output
        while not is_done.is_set():
            for seq_id in list(llm._requests):
                llm.abort_request(seq_id)
        return None

    output, _ = in_threads(2, use)
    llm.step()  # a step under way may have to be read
    assert output["token_ids"] == expected[: len(output["token_ids"])]


def test_exit_in_another_thread_ends_every_call(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), device="cpu", max_model_len=96)
    begun = threading.Event()
    llm.observers.append(lambda *_: begun.set())

    def go_on(index: int) -> None:
        while True:
            (generated if index % 2 else streamed)(llm, [1, 2, 3] * index, 80)

    def use(index: int) -> None:
        if index == 0:
            assert begun.wait(30)
            llm.exit()
        else:
            with pytest.raises(RuntimeError, match="shut down"):
                go_on(index)

    in_threads(5, use)


def test_nobody_waits_long_for_news_that_is_there(
    llm: LLM, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps, published = 0, dict[int, int]()
    publish = Sequence.publish

    def stamp(seq: Sequence) -> None:
        published[seq.seq_id] = num_steps
        publish(seq)

    def count(event: str, _: Batch | None) -> None:
        nonlocal num_steps
        num_steps += event == "begin"

    monkeypatch.setattr(Sequence, "publish", stamp)
    llm.observers.append(count)
    prompts = prompts_for(8)

    def use(index: int) -> list[int]:
        if index == 0:
            generated(llm, prompts[0], 30)
            return []
        stream = llm.stream(prompts[index], greedy(30))
        # Steps since the news came that was taken, or a later one.
        return [num_steps - published[stream._seqs[0].seq_id] for _ in stream]

    waits = sorted(wait for waits in in_threads(8, use) for wait in waits)
    tally.maximum("threads: steps until news was taken", waits[-1])
    # But for a thread that had its news, and was put to sleep before it could look at the clock.
    assert waits[int(0.98 * len(waits))] <= 3


# --- signal handlers -------------------------------------------------------------------------


@contextmanager
def alarms(handler: Callable[[], None]) -> Iterator[None]:
    """A signal whose handler is called with the next steps' events, in the thread that steps."""
    previous = signal.signal(signal.SIGALRM, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)


def interrupting(llm: LLM, at: str, after: int, handler: Callable[[], None]) -> None:
    """Have `handler` called by a signal in the middle of a step, once."""
    seen = Counter[str]()

    def look(event: str, _: Batch | None) -> None:
        seen[event] += 1
        if event == at and seen[event] == after:
            signal.raise_signal(signal.SIGALRM)

    llm.observers.append(look)


EVENTS = pytest.mark.parametrize("at", ["begin", "scheduled", "launched", "processed"])


@EVENTS
def test_a_signal_handler_may_abort_and_add_requests(llm: LLM, at: str) -> None:
    prompts = prompts_for(3)
    expected = [generated(llm, prompt) for prompt in prompts]
    other = llm.add_request(prompts[1], greedy(MAX_TOKENS))
    seen: list[Any] = []

    def handler() -> None:
        llm.abort_request(other)
        seen.append(llm.add_request(prompts[2], greedy(MAX_TOKENS)))
        seen.append(llm.is_finished())
        seen.append(llm.stats()["num_running"])

    interrupting(llm, at, 5, handler)
    with alarms(handler):
        assert generated(llm, prompts[0]) == expected[0]
    added, was_finished, num_running = seen
    assert not was_finished
    assert num_running == 2  # as of the last step
    results = {}
    while not llm.is_finished():
        results |= llm.step()[0]
    assert results == {added: expected[2]}


@EVENTS
def test_a_signal_handler_may_close_a_stream(llm: LLM, at: str) -> None:
    prompts = prompts_for(2)
    expected = generated(llm, prompts[0])
    stream = llm.stream(prompts[1], greedy(MAX_TOKENS))
    next(stream)
    interrupting(llm, at, 3, stream.close)
    with alarms(stream.close):
        assert generated(llm, prompts[0]) == expected
    assert list(stream) == []


def test_a_signal_handler_may_close_the_stream_that_it_interrupts(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], greedy(MAX_TOKENS))
    interrupting(llm, "launched", 3, stream.close)
    with alarms(stream.close):
        assert len(list(stream)) < MAX_TOKENS
    llm.step()


def test_a_signal_handler_may_shut_the_engine_down(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), device="cpu", max_model_len=96)
    interrupting(llm, "launched", 3, llm.exit)
    with alarms(llm.exit), pytest.raises(RuntimeError, match="shut down"):
        generated(llm, [1, 2, 3])
    assert llm.model_runner is None
    assert llm.is_finished()


def test_what_a_signal_handler_asked_for_is_done_though_it_raises(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), device="cpu", max_model_len=96)

    def handler() -> None:
        llm.exit()
        raise KeyboardInterrupt

    interrupting(llm, "launched", 1, handler)
    llm.add_request([1, 2, 3])
    with alarms(handler), pytest.raises(KeyboardInterrupt):
        llm.step()
    assert llm.model_runner is None


@pytest.mark.parametrize(
    "use",
    [
        lambda llm, _: llm.generate([[1]], greedy(2), use_tqdm=False),
        lambda llm, _: llm.chat([{"role": "user", "content": "x"}]),
        lambda llm, _: llm.step(),
        lambda llm, stream: next(stream),
        lambda llm, _: next(llm.stream([1], greedy(2))),
    ],
    ids=["generate", "chat", "step", "next", "next of a new one"],
)
def test_a_signal_handler_that_would_have_to_step_is_refused_at_once(
    llm: LLM, use: Callable[[LLM, Any], object]
) -> None:
    expected = generated(llm, [1, 2, 3])
    stream = llm.stream([4], greedy(MAX_TOKENS))
    next(stream)
    refused: list[str] = []

    def handler() -> None:
        with pytest.raises(RuntimeError, match="interrupts a step") as caught:
            use(llm, stream)
        refused.append(str(caught.value))

    interrupting(llm, "launched", 3, handler)
    with alarms(handler):
        assert generated(llm, [1, 2, 3]) == expected
    assert len(refused) == 1
    assert len(list(stream)) >= 1  # it goes on
    llm.observers.clear()


def test_a_signal_at_any_time_may_abort(llm: LLM) -> None:
    """Between the steps too, and while the call waits for another thread's step."""
    prompts = prompts_for(4)
    expected = [generated(llm, prompt) for prompt in prompts]
    others: list[int] = []
    rng = random.Random(0)
    num_aborts = 0

    def handler() -> None:
        nonlocal num_aborts
        num_aborts += 1
        llm.abort_request(others.pop()) if others else None
        others.append(llm.add_request(prompts[3], greedy(MAX_TOKENS)))

    with alarms(handler), ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            beside = pool.submit(generated, llm, prompts[1])
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + 0.01 * rng.random(), 0.003)
            try:
                assert generated(llm, prompts[0]) == expected[0]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert beside.result() == expected[1]
    assert num_aborts > 20
    while not llm.is_finished():
        for _, ids in llm.step()[0]:
            assert ids == expected[3]


# --- other processes -------------------------------------------------------------------------


def test_an_engine_is_refused_in_a_process_that_forked(llm: LLM) -> None:
    expected = generated(llm, [1, 2, 3])
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = "no error"
        try:
            llm.generate([[1, 2, 3]], greedy(2), use_tqdm=False)
        except RuntimeError as error:
            message = str(error)
        llm.exit()
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "forked" in pipe.read()
    os.waitpid(pid, 0)
    assert generated(llm, [1, 2, 3]) == expected


@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_cannot_be_pickled_or_copied(llm: LLM, act: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        act(llm)
    with pytest.raises(TypeError, match="cannot be copied"):
        act(llm.stream([1], greedy(2)))


# --- torch's generator -----------------------------------------------------------------------


def test_only_requests_that_need_a_seed_draw_one(llm: LLM) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    llm.generate([[1], [2]], greedy(3), use_tqdm=False)
    llm.generate([[1]], SamplingParams(max_tokens=2, seed=5), use_tqdm=False)
    with pytest.raises(ValueError, match="prompt 1"):
        llm.generate([[1], []], SamplingParams(max_tokens=2), use_tqdm=False)
    assert torch.equal(torch.get_rng_state(), before)
    llm.generate([[1]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert not torch.equal(torch.get_rng_state(), before)

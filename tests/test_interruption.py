"""After an exception or Ctrl-C anywhere in a step, the engine is as if it had not happened.

Three kinds of faults are planted: an exception in the k-th call of one of the engine's parts, of
the tokenizer or of the caller's loop, before or after it has done its work; KeyboardInterrupt at
the k-th place where Python may raise it; and a signal at any time.
"""

import contextlib
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dis import opname
from itertools import count
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Tally
from tqdm import tqdm

from nanovllm import LLM, SamplingParams
from nanovllm.engine import (
    batch_layout,
    block_manager,
    detokenizer,
    llm_engine,
    model_runner,
    results,
    scheduler,
    sequence,
    turns,
)
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Launched
from nanovllm.engine.sampling import Sampler
from nanovllm.engine.scheduler import Scheduler
from nanovllm.models.qwen3 import Qwen3ForCausalLM

pytestmark = pytest.mark.slow

VOCAB_SIZE = 200
MAX_MODEL_LEN = 64

Completions = list[list[int]]


def make_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]


def greedy(max_tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=logprobs)


# Prompts in chunks, a shared block, growth into new blocks and, with so small a pool, preemption.
COMMON = make_prompt(0, 16)
OWN = [make_prompt(1, 15), make_prompt(2, 15), COMMON + make_prompt(3, 14), [5]]
OWN_PARAMS = [
    greedy(19),
    greedy(19, logprobs=2),
    greedy(3),
    SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True),  # its tokens are not compared
]
OTHERS = [COMMON + make_prompt(4, 2), make_prompt(5, 29), make_prompt(6, 3)]
OTHER_PARAMS = [greedy(4), greedy(5, logprobs=0), greedy(3, logprobs=1)]


class Expected(NamedTuple):
    """Completions of the greedy requests."""

    own: Completions
    others: Completions


class Fault(Exception):
    """What a planted fault raises."""


class Caller:
    """Who loops over `step` or over a stream, and may raise an exception there."""

    @staticmethod
    def look_at(result: object) -> None:
        """What the body of the loop does with what it is given."""


# --- the engine under test -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("tiny")
    Qwen3ForCausalLM(config).float().save_pretrained(path)
    return path


def make_llm(model_dir: Path, eos: int) -> LLM:
    return LLM(
        str(model_dir),
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        kvcache_block_size=16,
        num_kvcache_blocks=5,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        eos=eos,
    )


@pytest.fixture(scope="module")
def stop_id(model_dir: Path) -> int:
    """An id that one of the requests generates before its last token."""
    with make_llm(model_dir, eos=-1) as llm:
        (out,) = llm.generate([OTHERS[1]], OTHER_PARAMS[1], use_tqdm=False)
    return int(out["token_ids"][2])


@pytest.fixture(scope="module")
def expected(model_dir: Path, stop_id: int) -> Expected:
    """What each request gives when it is alone."""
    with make_llm(model_dir, stop_id) as llm:
        own, others = (
            [generate(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
            for prompts, params in ((OWN, OWN_PARAMS), (OTHERS, OTHER_PARAMS))
        )
    assert others[1][-1] == stop_id
    assert len(others[0]) == 4
    return Expected(own[:-1], others)


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(
    model_dir: Path, stop_id: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """An engine on the CPU, which can be told to launch each step before it reads the last."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", request.param)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_llm(model_dir, stop_id)
    torch.set_num_threads(num_threads)


def generate(
    llm: LLMEngine, prompts: Completions | list[str], params: list[SamplingParams]
) -> Completions:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        assert_aligned(output["token_ids"], output.get("logprobs"))
    return [output["token_ids"] for output in outputs]


def assert_aligned(completion: list[int], logprobs: list[dict[int, float]] | None) -> None:
    """Each token has its log-probabilities, its own first; greedy, so that it is the largest."""
    for token, found in zip(completion, logprobs or (), strict=logprobs is not None):
        assert next(iter(found)) == token
        assert found[token] == max(found.values())


def add_all(llm: LLM, prompts: Completions, params: list[SamplingParams]) -> list[int]:
    return [llm.add_request(p, s) for p, s in zip(prompts, params, strict=True)]


def finish(
    llm: LLM,
    seq_ids: list[int],
    passed_over: type[BaseException] | tuple[()] = (),
    may_be_left: Collection[int] = (),
) -> Completions:
    """The user's own loop, which may pass over exceptions.

    Args:
        llm: the engine.
        seq_ids: the requests whose completions are given.
        passed_over: the kind of exception.
        may_be_left: other requests that may end here too.
    """
    results: dict[int, list[int]] = {}
    seqs = llm._requests | {seq.seq_id: seq for seq in llm._finished}
    for _ in range(200):
        try:
            if llm.is_finished():
                break
            for seq_id, completion in llm.step()[0]:
                assert seq_id not in results, "reported twice"
                results[seq_id] = completion
            Caller.look_at(results)
        except passed_over:
            pass
    assert llm._in_flight is None
    assert set(seq_ids) <= results.keys() <= {*seq_ids, *may_be_left}
    for seq_id, completion in results.items():
        assert_aligned(completion, seqs[seq_id].logprobs)
    return [results[seq_id] for seq_id in seq_ids]


def add_every_request(llm: LLM) -> list[int]:
    return add_all(llm, OWN + OTHERS, OWN_PARAMS + OTHER_PARAMS)


def forget_prefixes(llm: LLM) -> None:
    """Empty the prefix cache, so that the same requests take the same steps again."""
    llm.scheduler.start_over([])


def assert_no_trace(llm: LLM) -> None:
    """No request is known, queued or reported late, and the pool is free."""
    manager = llm.scheduler.block_manager
    assert llm.is_finished()
    assert manager.num_free_blocks == manager.num_blocks
    assert llm.step() == ([], 0)


def assert_works(llm: LLM, expected: Expected) -> None:
    assert_no_trace(llm)
    assert generate(llm, OWN, OWN_PARAMS)[:-1] == expected.own
    assert_no_trace(llm)


@pytest.mark.parametrize("others", [False, True])
def test_the_requests_preempt_one_another_and_share_prefixes(llm: LLM, others: bool) -> None:
    """So that a fault can hit these as well."""
    seq_ids = add_every_request(llm) if others else add_all(llm, OWN, OWN_PARAMS)
    seqs = list(llm.scheduler.waiting)
    finish(llm, seq_ids)
    assert llm.scheduler.num_preemptions > 0
    assert any(seq.num_cached_tokens for seq in seqs) == others


@pytest.mark.parametrize("llm", [True], ids=["overlapped"], indirect=True)
def test_the_overlapped_engine_launches_a_step_before_it_reads_the_last(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a fault can hit it with one or two steps under way."""
    calls: list[str] = []

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, noted)

    note(ModelRunner, "launch")
    note(Launched, "token_ids")
    seq_ids = add_all(llm, OWN[:1], [greedy(3)])
    assert llm.step() == ([], 0)
    finish(llm, seq_ids)
    assert calls == ["launch", "launch", "token_ids", "launch", "token_ids", "token_ids"]


# --- faults at calls -------------------------------------------------------------------------

PARTS: list[tuple[Any, str]] = [
    (Scheduler, "add"),
    (tqdm, "update"),
    (Scheduler, "schedule"),
    (Scheduler, "postprocess"),
    (BlockManager, "allocate"),
    (BlockManager, "append_block"),
    (BlockManager, "publish"),
    (BlockManager, "deallocate"),
    (ModelRunner, "launch"),
    (Qwen3ForCausalLM, "forward"),
    (Sampler, "sample"),
    (Launched, "token_ids"),
]
STEP_PARTS: list[tuple[Any, str]] = [*PARTS[2:], (Caller, "look_at")]


def parametrize_parts(parts: list[tuple[Any, str]]) -> pytest.MarkDecorator:
    names = [f"{owner.__name__}.{name}" for owner, name in parts]
    return pytest.mark.parametrize(("owner", "name"), parts, ids=names)


@contextmanager
def fault_at_call(owner: Any, name: str, k: int, after: bool) -> Iterator[Counter[str]]:
    """Raise Fault in the k-th call (none if k is 0), before or after it has done its work."""
    real = getattr(owner, name)
    seen: Counter[str] = Counter()

    def faulty(*args: Any, **kwargs: Any) -> Any:
        seen["calls"] += 1
        is_faulty = seen["calls"] == k
        seen["faults"] += is_faulty
        if is_faulty and not after:
            raise Fault
        result = real(*args, **kwargs)
        if is_faulty:
            raise Fault
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, faulty)
        yield seen


Action = Callable[..., Counter[str]]
"""Does something with a fault planted at place k (nowhere if k is 0), and gives the counts."""


def random_places(action: Action, what: str, num_places: int, seed: str) -> list[int]:
    """Places where a fault can be planted in an action."""
    action(0)  # CPython 3.12.1 may trace nothing in a thread's first traced call
    num_all = action(0)[what]
    assert num_all > 1
    return random.Random(seed).sample(range(1, num_all + 1), min(num_places, num_all))


def each_fault(
    action: Action, num_places: int, name: str, what: str, tally: Tally
) -> Iterator[None]:
    """Run an action with an exception planted at random calls, one at a time; pause after each."""
    for index, k in enumerate(random_places(action, "calls", num_places, seed=name)):
        assert action(k, after=index % 2 == 0)["faults"] == 1
        tally.count(f"interruption: {what}")
        yield


def each_interrupt(
    action: Action, num_places: int, file: str, what: str, tally: Tally
) -> Iterator[None]:
    """Run an action with Ctrl-C at random places, one at a time; pause after each."""
    for k in random_places(action, "places", num_places, seed=Path(file).name):
        # In a run after an interrupted one CPython 3.14 may trace too little.
        assert any(action(k)["interrupts"] == 1 for _ in range(3))
        tally.count(f"interruption: {what}")
        yield


@parametrize_parts(PARTS)
def test_an_exception_in_generate_leaves_no_trace(
    llm: LLM, expected: Expected, owner: Any, name: str, tally: Tally
) -> None:
    def action(k: int, after: bool = False) -> Counter[str]:
        forget_prefixes(llm)
        with fault_at_call(owner, name, k, after) as seen, contextlib.suppress(Fault):
            generate(llm, OWN, OWN_PARAMS)
        return seen

    for _ in each_fault(action, 2, name, "exceptions in generate", tally):
        assert_works(llm, expected)


@parametrize_parts(PARTS)
def test_requests_queued_before_survive_an_exception_in_generate(
    llm: LLM, expected: Expected, owner: Any, name: str, tally: Tally
) -> None:
    def action(k: int, after: bool = False) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        with fault_at_call(owner, name, k, after) as seen, contextlib.suppress(Fault):
            generate(llm, OWN, OWN_PARAMS)
        assert finish(llm, seq_ids) == expected.others
        return seen

    for _ in each_fault(action, 2, name, "exceptions in generate beside others", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@parametrize_parts(STEP_PARTS)
def test_a_loop_over_step_goes_on_after_an_exception(
    llm: LLM, expected: Expected, owner: Any, name: str, tally: Tally
) -> None:
    def action(k: int, after: bool = False) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_every_request(llm)
        with fault_at_call(owner, name, k, after) as seen:
            completions = finish(llm, seq_ids, Fault)
        assert completions[: len(OWN) - 1] == expected.own
        assert completions[len(OWN) :] == expected.others
        return seen

    for _ in each_fault(action, 2, name, "exceptions in step", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Scheduler, "postprocess"), (BlockManager, "append_block"), (ModelRunner, "launch")],
)
def test_generate_may_follow_a_step_that_broke_off(
    llm: LLM, expected: Expected, owner: Any, name: str
) -> None:
    """What is queued then does not hide that the queues and blocks must be made anew."""

    def action(k: int, after: bool = False) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_every_request(llm)
        results: dict[int, list[int]] = {}
        with fault_at_call(owner, name, k, after) as seen, contextlib.suppress(Fault):
            while not llm.is_finished():
                results |= llm.step()[0]
        assert generate(llm, OWN, OWN_PARAMS)[:-1] == expected.own
        rest = [seq_id for seq_id in seq_ids if seq_id not in results]
        results |= zip(rest, finish(llm, rest), strict=True)
        completions = [results[seq_id] for seq_id in seq_ids]
        assert completions[: len(OWN) - 1] == expected.own
        assert completions[len(OWN) :] == expected.others
        return seen

    [k] = random_places(action, "calls", 1, seed=name)
    assert action(k)["faults"] == 1
    assert_no_trace(llm)


# --- Ctrl-C ----------------------------------------------------------------------------------

FILES = [
    str(module.__file__)
    for module in (
        llm_engine, scheduler, block_manager, sequence, turns, model_runner, batch_layout
    )
]  # fmt: skip
BOOKKEEPING = FILES[:5]
LOOK_FOR_SIGNALS = ("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


@contextmanager
def interrupt_at(k: int, *files: str) -> Iterator[Counter[str]]:
    """Raise KeyboardInterrupt at the k-th place (none if k is 0) in `files` where Ctrl-C may.

    Python looks for signals when a function begins, after a call and before a loop's next round.
    Places in `step` itself are left out: what it is about to give is lost with it.
    """
    seen: Counter[str] = Counter()

    def on_call(frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_filename not in files or code.co_name == "step":
            return None
        names = [opname[byte] for byte in code.co_code]
        last = -1

        def on_bytecode(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event != "opcode":
                return on_bytecode
            has_looked = last < 0 or names[last].startswith(LOOK_FOR_SIGNALS)
            last = frame.f_lasti
            if has_looked and names[last] != "PUSH_EXC_INFO":  # not after a call that raised
                seen["places"] += 1
                if seen["places"] == k:
                    seen["interrupts"] += 1
                    raise KeyboardInterrupt  # which also ends the tracing
            return on_bytecode

        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return on_bytecode

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield seen
    except KeyboardInterrupt as error:  # it would end the test run
        raise AssertionError("interrupted where the test does not expect it") from error
    finally:
        sys.settrace(previous)


each_file = pytest.mark.parametrize("file", FILES, ids=[Path(file).stem for file in FILES])


@each_file
def test_ctrl_c_in_generate_leaves_no_trace(
    llm: LLM, expected: Expected, file: str, tally: Tally
) -> None:
    def action(k: int) -> Counter[str]:
        forget_prefixes(llm)
        with interrupt_at(k, file) as seen, contextlib.suppress(KeyboardInterrupt):
            generate(llm, OWN, OWN_PARAMS)
        return seen

    for _ in each_interrupt(action, 4, file, "Ctrl-C in generate", tally):
        assert_works(llm, expected)


@each_file
def test_requests_queued_before_survive_ctrl_c_in_generate(
    llm: LLM, expected: Expected, file: str, tally: Tally
) -> None:
    def action(k: int) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        with interrupt_at(k, file) as seen, contextlib.suppress(KeyboardInterrupt):
            generate(llm, OWN, OWN_PARAMS)
        assert finish(llm, seq_ids) == expected.others
        return seen

    for _ in each_interrupt(action, 4, file, "Ctrl-C in generate beside others", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@each_file
def test_a_loop_over_step_goes_on_after_ctrl_c(
    llm: LLM, expected: Expected, file: str, tally: Tally
) -> None:
    def action(k: int) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_every_request(llm)
        with interrupt_at(k, file) as seen:
            completions = finish(llm, seq_ids, KeyboardInterrupt)
        assert completions[: len(OWN) - 1] == expected.own
        assert completions[len(OWN) :] == expected.others
        return seen

    for _ in each_interrupt(action, 4, file, "Ctrl-C in step", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


def test_ctrl_c_anywhere_in_a_step_in_which_requests_end_loses_none(
    llm: LLM, expected: Expected, tally: Tally
) -> None:
    for k in count(1):
        seq_ids = add_all(llm, OTHERS[::2], [greedy(1, logprobs=1)] * 2)
        with interrupt_at(k, *BOOKKEEPING) as seen:
            completions = finish(llm, seq_ids, KeyboardInterrupt)
        assert completions == [ids[:1] for ids in expected.others[::2]]
        assert_no_trace(llm)
        if not seen["interrupts"]:
            break
        tally.count("interruption: Ctrl-C in the last step")
    assert k > 100
    assert_works(llm, expected)


def test_ctrl_c_anywhere_in_a_generate_of_one_step(
    llm: LLM, expected: Expected, tally: Tally
) -> None:
    for k in count(1):
        seq_id = llm.add_request(OTHERS[2], greedy(1))
        with interrupt_at(k, *BOOKKEEPING) as seen, contextlib.suppress(KeyboardInterrupt):
            generate(llm, OWN[3:], [greedy(1)])
        assert finish(llm, [seq_id]) == [expected.others[2][:1]]
        assert_no_trace(llm)
        if not seen["interrupts"]:
            break
        tally.count("interruption: Ctrl-C in a generate of one step")
    assert k > 100
    assert_works(llm, expected)


@pytest.mark.parametrize("is_after_failure", [False, True], ids=["", "after_a_failed_step"])
def test_ctrl_c_anywhere_in_abort_request(
    llm: LLM, expected: Expected, is_after_failure: bool, tally: Tally
) -> None:
    """The request goes on or is gone; the others are not touched."""
    for k in count(1):
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        for _ in range(3):
            llm.step()
        if is_after_failure:
            with fault_at_call(ModelRunner, "launch", 1, after=True), pytest.raises(Fault):
                llm.step()
        with interrupt_at(k, *BOOKKEEPING) as seen, contextlib.suppress(KeyboardInterrupt):
            llm.abort_request(seq_ids[0])
        assert finish(llm, seq_ids[1:], may_be_left=seq_ids[:1]) == expected.others[1:]
        assert_no_trace(llm)
        if not seen["interrupts"]:
            break
        tally.count("interruption: Ctrl-C in abort_request")
    assert k > 10
    assert_works(llm, expected)


@pytest.mark.parametrize(
    ("owner", "name", "num_calls", "num_others"),
    [(ModelRunner, "launch", 2, 2), (tqdm, "update", 1, 1)],
    ids=["in_a_step", "after_a_step"],
)
def test_a_second_ctrl_c_while_generate_cleans_up_corrupts_nothing(
    llm: LLM,
    expected: Expected,
    owner: Any,
    name: str,
    num_calls: int,
    num_others: int,
    tally: Tally,
) -> None:
    """Some of its requests may be left; they come to their end, and the others come to theirs."""
    others, params = OTHERS[-num_others:], OTHER_PARAMS[-num_others:]
    clean_up = llm._abort
    num_interrupts, own_ids = 1, set[int]()
    for k in count(1):

        def interrupted_clean_up(seq_ids: set[int], k: int = k) -> None:
            nonlocal num_interrupts, own_ids
            own_ids = seq_ids
            assert len(llm._requests) > num_others, "the others are under way too"
            with interrupt_at(k, *BOOKKEEPING) as seen, contextlib.suppress(KeyboardInterrupt):
                clean_up(seq_ids)
            num_interrupts = seen["interrupts"]

        seq_ids = add_all(llm, others, params)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm, "_abort", interrupted_clean_up)
            with fault_at_call(owner, name, num_calls, after=True), pytest.raises(Fault):
                generate(llm, [[5], [6]], [greedy(1), greedy(3)])
        assert finish(llm, seq_ids, may_be_left=own_ids) == expected.others[-num_others:]
        assert_no_trace(llm)
        if not num_interrupts:
            break
        tally.count("interruption: Ctrl-C in the clean-up of generate")
    assert k > 10
    assert_works(llm, expected)


# --- streams and stop texts ------------------------------------------------------------------


class Words:
    """A tokenizer that writes id 5 as "w5 "."""

    all_special_ids: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"w{token_id} " for token_id in token_ids)


@pytest.fixture
def stopping(llm: LLM, expected: Expected) -> list[SamplingParams]:
    """Parameters for OWN, of which the first two end by a text that two tokens make."""
    llm.tokenizer = Words()
    texts = [f"{a} w{b}" for a, b in (ids[8:10] for ids in expected.own[:2])]
    return [
        *(SamplingParams(temperature=0.0, max_tokens=19, stop=text) for text in texts),
        *OWN_PARAMS[2:],
    ]


def stopped(expected: Expected) -> Completions:
    return [ids[:10] for ids in expected.own[:2]] + expected.own[2:]


def streamed(llm: LLM, params: list[SamplingParams]) -> Completions:
    completions: Completions = [[] for _ in OWN]
    for piece in llm.stream(OWN, params):
        completions[piece["index"]] += piece["token_ids"]
        Caller.look_at(piece)
    return completions


STREAM_PARTS = [*STEP_PARTS, (Detokenizer, "update"), (Words, "decode")]
STREAM_FILES = [str(m.__file__) for m in (llm_engine, scheduler, detokenizer, results)]


@parametrize_parts(STREAM_PARTS)
def test_an_exception_in_a_stream_leaves_no_trace_and_others_survive(
    llm: LLM,
    stopping: list[SamplingParams],
    expected: Expected,
    owner: Any,
    name: str,
    tally: Tally,
) -> None:
    def action(k: int, after: bool = False) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        with fault_at_call(owner, name, k, after) as seen, contextlib.suppress(Fault):
            assert streamed(llm, stopping)[:-1] == stopped(expected)
        assert finish(llm, seq_ids) == expected.others
        return seen

    for _ in each_fault(action, 2, name, "exceptions in a stream", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_an_exception_of_the_tokenizer_in_generate_leaves_no_trace_and_others_survive(
    llm: LLM, stopping: list[SamplingParams], expected: Expected, name: str, tally: Tally
) -> None:
    """While prompts are encoded, stop texts are looked for, or results are written out."""
    texts = [Words().decode(ids, skip_special_tokens=False) for ids in OWN]

    def action(k: int, after: bool = False) -> Counter[str]:
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        with fault_at_call(Words, name, k, after) as seen, contextlib.suppress(Fault):
            assert generate(llm, texts, stopping)[:-1] == stopped(expected)
        assert finish(llm, seq_ids) == expected.others
        return seen

    for _ in each_fault(action, 6, name, "exceptions of the tokenizer in generate", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@pytest.mark.parametrize("file", STREAM_FILES, ids=[Path(file).stem for file in STREAM_FILES])
def test_ctrl_c_in_a_stream_leaves_no_trace_and_others_survive(
    llm: LLM, stopping: list[SamplingParams], expected: Expected, file: str, tally: Tally
) -> None:
    def action(k: int) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_all(llm, OTHERS, OTHER_PARAMS)
        with interrupt_at(k, file) as seen, contextlib.suppress(KeyboardInterrupt):
            assert streamed(llm, stopping)[:-1] == stopped(expected)
        assert finish(llm, seq_ids) == expected.others
        return seen

    for _ in each_interrupt(action, 6, file, "Ctrl-C in a stream", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


@pytest.mark.parametrize("file", [FILES[1], STREAM_FILES[2]], ids=["scheduler", "detokenizer"])
def test_stop_texts_are_found_in_a_loop_that_goes_on_after_ctrl_c(
    llm: LLM, stopping: list[SamplingParams], expected: Expected, file: str, tally: Tally
) -> None:
    def action(k: int) -> Counter[str]:
        forget_prefixes(llm)
        seq_ids = add_all(llm, OWN, stopping)
        with interrupt_at(k, file) as seen:
            assert finish(llm, seq_ids, KeyboardInterrupt)[:-1] == stopped(expected)
        return seen

    for _ in each_interrupt(action, 8, file, "Ctrl-C in step with stop texts", tally):
        assert_no_trace(llm)
    assert_works(llm, expected)


# --- signals ---------------------------------------------------------------------------------


class Signal:
    """Sends SIGINT once, some time after an action has begun; Python raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.is_armed = False

    def send(self, number: int, frame: FrameType | None) -> None:
        """A little later if it would hit who measures coverage, and leave its lock taken."""
        if frame is not None and frame.f_globals.get("__name__", "").startswith("coverage."):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
        elif self.is_armed:
            signal.raise_signal(signal.SIGINT)

    def interrupts(self, action: Callable[[], object], delay: float) -> bool:
        """Whether the signal came before the action was done; `delay` > 0 is in seconds."""
        self.is_armed = True
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                action()
            finally:
                self.is_armed = False
        except KeyboardInterrupt:
            return True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False


@pytest.fixture
def sigint() -> Iterator[Signal]:
    sender = Signal()
    previous = signal.signal(signal.SIGALRM, sender.send)
    previous_sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield sender
    signal.signal(signal.SIGINT, previous_sigint)
    signal.signal(signal.SIGALRM, previous)


def generate_alone(llm: LLM, expected: Expected) -> None:
    assert generate(llm, OWN, OWN_PARAMS)[:-1] == expected.own


def stream_alone(llm: LLM, expected: Expected) -> None:
    assert streamed(llm, OWN_PARAMS)[:-1] == expected.own


def step_and_abort(llm: LLM, expected: Expected) -> None:
    """A loop over `step` whose requests are aborted if it is left."""
    seq_ids: list[int] = []
    try:
        seq_ids += add_all(llm, OWN, OWN_PARAMS)
        results: dict[int, list[int]] = {}
        while not llm.is_finished():
            results.update(llm.step()[0])
        assert [results[seq_id] for seq_id in seq_ids][:-1] == expected.own
    finally:
        for seq_id in {*seq_ids, *llm._requests}:  # the ids may not have come back
            llm.abort_request(seq_id)


@pytest.mark.parametrize("act", [generate_alone, stream_alone, step_and_abort])
def test_a_signal_at_any_time_leaves_no_trace(
    llm: LLM,
    expected: Expected,
    act: Callable[[LLM, Expected], None],
    sigint: Signal,
    tally: Tally,
) -> None:
    rng = random.Random(act.__name__)
    duration, num_interrupts = 1.0, 0
    for _ in range(100):
        forget_prefixes(llm)
        began = perf_counter()
        if sigint.interrupts(lambda: act(llm, expected), duration * rng.uniform(0.01, 1)):
            num_interrupts += 1
        else:
            duration = perf_counter() - began
        assert_works(llm, expected)
        if num_interrupts == 9:
            break
    assert num_interrupts == 9
    tally.count(f"interruption: SIGINT in {act.__name__}", num_interrupts)

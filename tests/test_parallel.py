"""Tensor parallelism: the tokens are those of one rank; and what becomes of ranks that fail."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import (
    NEAR_TIE,
    TINY,
    CheckpointFactory,
    ModelSpec,
    Reference,
    Tally,
    ask,
    edit_json,
    greedy,
    is_idle,
    random_prompts,
)
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import parallel_runner
from nanovllm.engine.batch_layout import BatchLayout
from nanovllm.engine.messages import pack_path, pack_step, unpack_path, unpack_step
from nanovllm.engine.parallel_runner import ParallelRunner
from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.layers import device_groups
from nanovllm.layers.attention import BACKENDS
from nanovllm.layers.device_groups import PeerGroup
from nanovllm.layers.embed_head import resolve_and_embed
from nanovllm.layers.sampler import _gumbel, _mix64, _random_bits, _signed, ids_of, sample
from nanovllm.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import checkpoint_shapes, checkpoint_targets, load_weights
from nanovllm.utils.parallel import FRAME, HostGroup, RankGroup

RUN_SEED = int(os.environ["NANOVLLM_TEST_SEED"])
ROOT = Path(__file__).parents[1]
ReferenceFactory = Callable[[Path], Reference]


def wide(kind: str, index: int, **options: Any) -> ModelSpec:
    """A random model whose sizes two ranks divide; heads, MLP and vocabulary also four."""
    rng = random.Random(f"{RUN_SEED}-{index}")
    sizes: dict[str, Any] = {
        "kind": kind,
        "vocab_size": 4 * rng.randint(60, 120),
        "hidden_size": rng.choice([48, 64, 72]),
        "intermediate_size": 4 * rng.randint(12, 30),
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": rng.choice([8, 16, 24]),
        "seed": rng.randrange(10**6),
    }
    if kind != "Qwen3":
        sizes["initializer_range"] = 1.2 / sizes["hidden_size"] ** 0.5
    return ModelSpec(**sizes | options)


def experts(num_experts: int, num_chosen: int, **more: Any) -> tuple[tuple[str, Any], ...]:
    more |= {"num_experts": num_experts, "num_experts_per_tok": num_chosen}
    return tuple(({"moe_intermediate_size": 40, "norm_topk_prob": True} | more).items())


SPECS = [
    wide("Qwen3", 0, tied=True, num_kv_heads=2),
    wide("Qwen3", 1, attention_bias=True, max_shard_size="60KB"),
    wide("Qwen2", 2, num_kv_heads=1, num_heads=2),
    wide("Llama", 3, attention_bias=True, more=(("mlp_bias", True),)),
    wide("Mistral", 4, tied=True, num_kv_heads=8, more=(("sliding_window", None),)),
    wide("Qwen3Moe", 5, more=experts(6, 2, mlp_only_layers=(0,)), num_layers=3),
]
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 300, "kvcache_block_size": 16,
    "max_num_seqs": 8, "max_num_batched_tokens": 128, "num_kvcache_blocks": 60,
}  # fmt: skip


def parallel(model: Path, num_ranks: int = 2, **options: Any) -> LLM:
    return LLM(str(model), **OPTIONS | {"tensor_parallel_size": num_ranks} | options)


@contextmanager
def pair(model: Path, num_ranks: int = 2, **options: Any) -> Iterator[tuple[LLM, LLM]]:
    """An engine of one rank, and one of several."""
    with (
        LLM(str(model), **OPTIONS | options) as one,
        parallel(model, num_ranks, **options) as several,
    ):
        yield one, several


def workers(llm: LLM) -> list["subprocess.Popen[bytes]"]:
    assert isinstance(llm.model_runner, ParallelRunner)
    return list(llm.model_runner._team.processes.values())


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """How long it took until something was so."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds
        time.sleep(0.01)
    return time.monotonic() - started


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


# --- the same tokens -------------------------------------------------------------------------


def scores(logits: Tensor, params: SamplingParams, first: int) -> Tensor:
    """What layers.sampler takes the argmax of, for a request's tokens: `first` is the position of
    the token before them."""
    if params.temperature == 0:
        return logits
    assert params.seed is not None
    keys = _mix64(torch.full((len(logits),), params.seed) + _signed(0x9E3779B97F4A7C15, 64))
    keys = _mix64(keys ^ torch.arange(first, first + len(logits)))
    return logits + params.temperature * _gumbel(_random_bits(keys, 0, logits.size(1)))


def check(
    reference: Reference, prompt: list[int], output: list[int], params: SamplingParams
) -> tuple[int, int]:
    """Check that each token has the best score, by transformers' logits; near ties may be lost.

    Returns how many tokens were compared, and how many such ties there were.
    """
    logits = reference.logits(prompt, output)
    known = ~logits[:, 0].isnan()
    found = scores(logits, params, len(prompt) - 1)[known]
    chosen = found.gather(1, torch.tensor(output)[known][:, None])[:, 0]
    gaps = (found.max(dim=1).values - chosen) / logits[known].abs().max()
    assert (gaps < NEAR_TIE).all(), gaps.max()
    return len(gaps), int((gaps > 0).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "num_ranks"), [*((spec, 2) for spec in SPECS), (SPECS[0], 4)])
def test_tokens_are_those_of_transformers_and_of_one_rank(
    spec: ModelSpec,
    num_ranks: int,
    checkpoint: CheckpointFactory,
    reference: ReferenceFactory,
    tally: Tally,
) -> None:
    """Greedy and sampled, in chunks, with prefix hits, preemption, filters, log-probabilities."""
    model = checkpoint(spec)
    prompts = random_prompts([1, 15, 17, 40, 200, 90, 33], spec.vocab_size, spec.seed)
    prompts.append(prompts[4][:64] + prompts[3])  # has a prefix of another
    hot = [
        SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True, seed=spec.seed + n)
        for n in range(len(prompts))
    ]
    plain = [greedy(40)] * len(prompts)
    with pair(model, num_ranks, num_kvcache_blocks=19) as (one, several):
        for params in (plain, hot):
            outputs = several.generate(prompts, params, use_tqdm=False)
            for prompt, output, how in zip(prompts, outputs, params, strict=True):
                numbers = check(reference(model), prompt, output["token_ids"], how)
                tally.count("parallel: tokens compared", numbers[0])
                tally.count("parallel: near ties let pass", numbers[1])
        stats = several.stats()
        assert stats["num_preemptions"] > 0
        assert stats["prefix_hit_rate"] > 0
        kept = [
            SamplingParams(
                temperature=0.8, max_tokens=6, ignore_eos=True, seed=n, logprobs=3, **options
            )
            for n, options in enumerate([{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {}] * 3)
        ][: len(prompts)]
        expected = one.generate(prompts, kept, use_tqdm=False)
        outputs = several.generate(prompts, kept, use_tqdm=False)
        for a, b in zip(expected, outputs, strict=True):
            assert a["token_ids"] == b["token_ids"]
            for entries, others in zip(a["logprobs"], b["logprobs"], strict=True):
                assert list(entries) == list(others)
                assert others == pytest.approx(entries, abs=1e-4)
        assert is_idle(several)


@pytest.fixture(scope="module")
def tiny_pair() -> Iterator[tuple[LLM, LLM]]:
    """The trained checkpoint."""
    with pair(TINY, max_model_len=500, num_kvcache_blocks=-1) as engines:
        yield engines


def test_texts_stops_streams_and_chats_are_the_same(tiny_pair: tuple[LLM, LLM]) -> None:
    one, two = tiny_pair
    params = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=["1", " a"]),
        SamplingParams(
            temperature=0.8, max_tokens=40, ignore_eos=True, seed=3, stop_token_ids=[65]
        ),
    ]
    prompts = ["What is 12 + 30?", "Sort the numbers 5 3 9.", "Say something."]
    expected = one.generate(prompts, params, use_tqdm=False)
    assert two.generate(prompts, params, use_tqdm=False) == expected
    texts = [""] * 3
    for news in two.stream(prompts, params):
        texts[news["index"]] += news["text"]
    assert texts == [output["text"] for output in expected]
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    assert two.chat(chat, params[0], use_tqdm=False) == one.chat(chat, params[0], use_tqdm=False)


def test_requests_may_come_and_go(tiny_pair: tuple[LLM, LLM]) -> None:
    """By add_request, abort_request, and a stream that is left."""
    one, two = tiny_pair
    expected = ask(one, "What is 7 + 8?")
    ids = [two.add_request("Count.", greedy(50)) for _ in range(3)]
    stream = two.stream("What is 1 + 1?", greedy(50))
    next(stream)
    two.step()
    two.abort_request(ids[1])
    stream.close()
    done: set[int] = set()
    while not two.is_finished():
        done.update(seq_id for seq_id, _ in two.step()[0])
    assert done == {ids[0], ids[2]}
    assert ask(two, "What is 7 + 8?") == expected
    assert is_idle(two)


def test_the_requests_of_several_threads(tiny_pair: tuple[LLM, LLM]) -> None:
    one, two = tiny_pair
    questions = [f"What is {n} + {2 * n}?" for n in range(6)]
    expected = [ask(one, question) for question in questions]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda question: ask(two, question), questions)) == expected


@pytest.mark.slow
def test_load_weights_reaches_every_rank(
    checkpoint: CheckpointFactory, reference: ReferenceFactory, tmp_path: Path
) -> None:
    first, second = (checkpoint(wide("Qwen3", 7, seed=seed, tied=True)) for seed in (1, 2))
    prompts = random_prompts([5, 40], wide("Qwen3", 7).vocab_size)
    with parallel(first) as llm:
        for model in (first, second, first):
            llm.load_weights(model)
            for prompt in prompts:
                output = llm.generate(prompt, greedy(20), use_tqdm=False)[0]["token_ids"]
                check(reference(model), prompt, output, greedy())
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "config.json").write_bytes((second / "config.json").read_bytes())
        (broken / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes()[:-9])
        with pytest.raises(ValueError, match="truncated or corrupt"):
            llm.load_weights(broken)
        output = llm.generate(prompts[0], greedy(20), use_tqdm=False)[0]["token_ids"]
        check(reference(first), prompts[0], output, greedy())


@pytest.mark.slow
def test_two_engines_at_once() -> None:
    """Each with its ranks; made and used in two threads."""

    def work(seed: int) -> list[list[int]]:
        with parallel(TINY) as llm:
            return [ask(llm, f"What is {seed} + {n}?") for n in range(5)]

    with LLM(str(TINY), **OPTIONS) as one:
        expected = [[ask(one, f"What is {seed} + {n}?") for n in range(5)] for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert list(pool.map(work, (1, 2))) == expected


SCRIPT = """
from nanovllm import LLM, SamplingParams
import logging
llm = LLM({model!r}, device="cpu", dtype="float32", max_model_len=200, tensor_parallel_size=2)
print(llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
      [0]["token_ids"])
"""


def expected_output() -> str:
    with LLM(str(TINY), device="cpu", dtype="float32", max_model_len=200) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        return f"{llm.generate([1, 2, 3], params, use_tqdm=False)[0]['token_ids']}\n"


def test_a_script_without_a_main_guard_from_standard_input(tmp_path: Path) -> None:
    """It shuts nothing down, and is in a directory with a module that must not be imported."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-P", "-"],
        input=SCRIPT.format(model=str(TINY)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected_output()


@pytest.mark.slow
def test_torchrun_on_two_machines_in_miniature(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(TINY)) + "print('only rank 0 is here')\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(rank), "--nproc-per-node", "1"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), str(script)),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert outputs == [expected_output() + "only rank 0 is here\n", ""]


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "num_ranks", "key"),
    [
        ({}, 3, "num_key_value_heads"),
        ({"num_key_value_heads": 1}, 8, "num_attention_heads"),
        ({"intermediate_size": 97}, 2, "intermediate_size"),
        ({"vocab_size": 307}, 2, "vocab_size"),
    ],
)
def test_what_the_ranks_do_not_divide_is_named(
    changes: dict[str, int], num_ranks: int, key: str
) -> None:
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 480, "hidden_size": 60,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16,
    }  # fmt: skip
    config = ModelConfig.from_dict(raw | changes)
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={num_ranks} .* {key} \("):
        config.split(num_ranks)


def test_experts_are_split_by_their_intermediate_size(tmp_path: Path) -> None:
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 480, "hidden_size": 60,
        "intermediate_size": 97, "moe_intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 5,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    part = ModelConfig.from_dict(raw).split(4)
    assert part.experts is not None
    assert (part.experts.intermediate_size, part.experts.num_experts) == (10, 5)
    assert (part.num_heads, part.num_kv_heads, part.vocab_size) == (1, 1, 120)
    with pytest.raises(ValueError, match="moe_intermediate_size"):
        ModelConfig.from_dict(raw | {"moe_intermediate_size": 42}).split(4)


def test_the_engine_refuses_at_the_door() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide"):
        parallel(TINY, 3)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            parallel(TINY, device="cuda")


LEAN = f"""
from nanovllm import LLM, SamplingParams
llm = LLM({str(TINY)!r}, device="cpu", dtype="float32", max_model_len=300, tensor_parallel_size=2)
"""


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT is heard even where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- ranks that fail -------------------------------------------------------------------------


def test_a_rank_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is the caller's, at once; nothing is left."""
    before = shared_files()
    options_of_all = parallel_runner._options_of_all

    def other_backend(*args: Any) -> dict[str, Any]:
        return options_of_all(*args) | {"attention_backend": "triton"}

    monkeypatch.setattr(parallel_runner, "_options_of_all", other_backend)
    with pytest.raises(ValueError, match="rank 1: attention_backend='triton' cannot be used"):
        parallel(TINY)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="rank 1 has ended with status 1"):
        parallel(TINY)
    monkeypatch.undo()
    with parallel(TINY) as llm:
        assert ask(llm, "What is 1 + 1?")
    assert shared_files() == before


def test_a_rank_that_is_killed_in_the_middle_of_a_step() -> None:
    before = shared_files()
    llm = parallel(TINY)
    process = workers(llm)[0]

    def kill(event: str, batch: Batch | None) -> None:
        if event == "scheduled" and llm.stats()["num_generated_tokens"] == 5:
            process.kill()

    llm.observers.append(kill)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
        llm.generate([1, 2, 3], greedy(300), use_tqdm=False)
    assert time.monotonic() - started < 5
    with pytest.raises(RuntimeError, match=r"has lost a rank .* make a new one"):
        llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    llm.exit()
    assert not is_running(process.pid)
    assert shared_files() == before


def test_a_rank_that_is_out_of_memory() -> None:
    llm = parallel(TINY, max_num_batched_tokens=16384, max_num_seqs=64, num_kvcache_blocks=2000)
    process = workers(llm)[0]
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (4 << 20)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    prompts = random_prompts([200] * 60, 500)
    with pytest.raises(MemoryError, match=r"(?s)rank 1: .*no memory for a step"):
        llm.generate(prompts, greedy(5), use_tqdm=False)
    llm.exit()
    assert not is_running(process.pid)


def test_an_error_on_rank_0_in_the_midst_of_a_step_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = parallel(TINY)
    process = workers(llm)[0]
    assert llm.model_runner is not None

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(llm.model_runner.model.lm_head, "forward", fail)
    with pytest.raises(OSError, match="planted"):
        llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    with pytest.raises(RuntimeError, match="has lost a rank"):
        llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    llm.exit()
    assert not is_running(process.pid)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_the_engine_right(tiny_pair: tuple[LLM, LLM]) -> None:
    one, two = tiny_pair
    expected = ask(one, "What is 5 + 6?")
    rng = random.Random(RUN_SEED)
    prompts = random_prompts([20] * 6, 500)
    num_interrupted = 0
    for _ in range(20):
        timer = threading.Timer(rng.uniform(0, 0.3), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            two.generate(prompts, greedy(200), use_tqdm=False)
        except KeyboardInterrupt:
            num_interrupted += 1
        timer.join()
        assert ask(two, "What is 5 + 6?") == expected
        assert is_idle(two)
    assert num_interrupted > 10


def test_ctrl_c_while_the_ranks_start() -> None:
    before, others = shared_files(), children()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()

    def start_again_and_again() -> None:
        for _ in range(10):
            parallel(TINY).exit()

    with pytest.raises(KeyboardInterrupt):
        start_again_and_again()
    wait_for(lambda: children() == others)
    assert shared_files() == before


def children() -> set[int]:
    """Processes that this thread has started, and that run."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids if is_running(int(pid))}


def test_no_process_outlives_a_caller_that_is_killed() -> None:
    before = shared_files()
    script = f"""
{LEAN}
print(llm.model_runner._team.processes[1].pid, flush=True)
while True:
    llm.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=200), use_tqdm=False)
"""
    caller = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    time.sleep(0.2)
    assert is_running(pid)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert wait_for(lambda: not is_running(pid)) < 5
    assert shared_files() == before


def test_an_engine_that_is_dropped_ends_its_ranks() -> None:
    llm = parallel(TINY)
    process = workers(llm)[0]
    del llm
    wait_for(lambda: not is_running(process.pid))


def test_ctrl_c_while_a_step_fails_on_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the step any more: the error must not be lost, the ranks are out of step."""
    llm = parallel(TINY)
    assert llm.model_runner is not None
    forward = llm.model_runner.model.lm_head.forward

    def fail(*_: Any, **__: Any) -> None:
        time.sleep(0.5)
        monkeypatch.setattr(llm.model_runner.model.lm_head, "forward", forward)
        raise OSError("planted")

    monkeypatch.setattr(llm.model_runner.model.lm_head, "forward", fail)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    with pytest.raises((OSError, RuntimeError), match="planted"):
        llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    llm.exit()


def test_exit_is_quiet_when_a_rank_has_gone_and_hides_no_error() -> None:
    def use(llm: LLM) -> None:
        with llm:
            workers(llm)[0].kill()
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="own"):
        use(parallel(TINY))
    llm = parallel(TINY)
    workers(llm)[0].kill()
    llm.exit()
    llm.exit()


def test_ctrl_c_in_exit_is_ctrl_c() -> None:
    for delay in (0.0, 0.05, 0.15):
        llm = parallel(TINY)
        process = workers(llm)[0]
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            llm.exit()
            timer.join()
        except KeyboardInterrupt:
            pass
        timer.join()
        llm.exit()
        wait_for(lambda process=process: not is_running(process.pid))  # type: ignore[misc]


def test_ctrl_c_before_anything_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    others, threads = children(), threading.active_count()
    begin = ParallelRunner._begin

    def interrupted(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ParallelRunner, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel(TINY)
    wait_for(lambda: children() == others)
    wait_for(lambda: threading.active_count() == threads)


@pytest.mark.slow
def test_forked_children_end_and_keep_nothing_alive() -> None:
    """One ends, one drops the engine, one shuts it down; one is there when the parent drops it."""
    script = f"""
import gc, os, sys, time
{LEAN}
for what in range(3):
    pid = os.fork()
    if pid == 0:
        if what == 1:
            del llm
            gc.collect()
        elif what == 2:
            llm.exit()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert llm.generate([1, 2, 3], SamplingParams(max_tokens=3), use_tqdm=False)
pid = os.fork()
if pid == 0:
    time.sleep(60)
started = time.monotonic()
del llm
assert time.monotonic() - started < 3
os.kill(pid, 9)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=240).returncode == 0


def test_a_process_that_is_one_of_one_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    with parallel(TINY) as llm:
        assert ask(llm, "What is 1 + 1?")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun has started 3 processes"):
        parallel(TINY)


# --- the parts -------------------------------------------------------------------------------


@contextmanager
def groups(size: int) -> Iterator[list[HostGroup]]:
    """The ranks of a group, to be used in a thread each."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        yield list(pool.map(lambda rank: HostGroup(store, rank, size, True), range(size)))


def on_all(ranks: list[HostGroup], work: Callable[[HostGroup], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_the_ranks_of_a_group_exchange(size: int) -> None:
    parts = torch.randn(size, 3, 5, generator=torch.Generator().manual_seed(size)).bfloat16()
    keys = torch.randint(-(2**62), 2**62, (size, 4))
    with groups(size) as ranks:
        for found in on_all(ranks, lambda group: group.all_reduce(parts[group.rank].clone())):
            assert torch.equal(found, parts.float().sum(0).bfloat16())
        for found in on_all(ranks, lambda group: group.all_gather(parts[group.rank])):
            assert torch.equal(found, torch.cat(list(parts), dim=1))
        for found in on_all(ranks, lambda group: group.all_reduce_max(keys[group.rank])):
            assert torch.equal(found, keys.amax(0))
        assert on_all(ranks, lambda group: group.least(7 - group.rank)) == [8 - size] * size


@pytest.mark.parametrize("length", [0, 1, FRAME - 3, FRAME - 2, FRAME - 1, FRAME, 5 * FRAME])
def test_messages_of_any_length_come_in_order(length: int) -> None:
    message = torch.arange(length)
    with groups(3) as ranks:

        def take_part(group: HostGroup) -> list[tuple[int, Tensor]]:
            if group.rank == 0:
                for kind in range(3):
                    group.tell(kind, message + kind)
                return []
            return [group.hear() for _ in range(3)]

        for heard in on_all(ranks, take_part)[1:]:
            for kind, (told, found) in enumerate(heard):
                assert told == kind
                assert torch.equal(found, message + kind)


def test_the_first_rank_that_fails_is_named() -> None:
    def work(group: HostGroup) -> Exception | None:
        def fail() -> None:
            if group.rank > 0:
                raise ValueError(f"bad \N{SNOWMAN} {group.rank}" + "x" * 5000)

        return group.first_error(fail)

    with groups(3) as ranks:
        errors = on_all(ranks, work)
        assert all(type(error) is ValueError for error in errors)
        assert str(errors[0]).startswith("rank 1: bad \N{SNOWMAN} 1x")
        assert str(errors[1]).startswith("bad \N{SNOWMAN} 1")
        assert on_all(ranks, lambda group: group.first_error(lambda: None)) == [None] * 3


def test_a_step_is_the_same_when_it_has_been_sent() -> None:
    """Known and unknown tokens, chunks, extreme parameters."""
    params = [
        SamplingParams(temperature=0.1 + 0.2, top_k=2**70, top_p=1e-9, min_p=1 / 3, logprobs=20),
        SamplingParams(temperature=0.0),
    ]
    items = []
    for n in range(5):
        seq = Sequence(list(range(100, 120 + n)), params[n % 2], 4096, seed=(-1) ** n * (2**63 - 1))
        seq.block_table = list(range(n, 2 * n))
        start = [0, 7, 19, 23, 24][n]
        items.append(ScheduledSequence(seq, start, [20, 9, 20, 24, 25][n], samples=n != 1))
    for is_prefill in (True, False):
        found = unpack_step(pack_step(Batch(is_prefill, items)))
        assert found.is_prefill == is_prefill
        for item, sent in zip(items, found.items, strict=True):
            assert sent.token_ids == item.token_ids
            assert (sent.start, sent.end, sent.samples) == (item.start, item.end, item.samples)
            for name in ("seq_id", "seed", "block_table"):
                assert getattr(sent.seq, name) == getattr(item.seq, name)
            for name in ("temperature", "top_p", "min_p", "logprobs"):
                assert getattr(sent.seq.params, name) == getattr(item.seq.params, name)
    assert found.items[0].seq.params.top_k > 2**31
    path = Path(os.fsdecode(b"/a b/\xff\xc3\xa9"))
    assert unpack_path(pack_path(path)) == path


@pytest.mark.parametrize("num_parts", [2, 3])
def test_the_largest_key_of_the_parts_is_the_whole_vocabularys_choice(num_parts: int) -> None:
    """Ties go to the smaller id, wherever they are; zeros of both signs are equal."""
    size, vocab_size = 50, 30 * num_parts
    logits = torch.randn(size, vocab_size, generator=torch.Generator().manual_seed(1))
    logits[:20] = logits[:20].round()  # many ties
    logits[20] = 0.0
    logits[20, :31] = -0.0
    logits[21] = -torch.inf
    logits[21, 40] = -3.0e38
    logits[22] = -1.0
    temperatures = torch.tensor([0.0, 0.7, 1.0, 3.0, 0.0] * 10)
    temperatures[:25] = 0
    seeds, positions = torch.arange(size) * 977 - 5000, torch.arange(size)
    expected = sample(logits, temperatures, seeds, positions)
    keys = [
        sample(part, temperatures, seeds, positions, first_id=n * 30)
        for n, part in enumerate(logits.split(30, dim=1))
    ]
    assert torch.equal(ids_of(torch.stack(keys).amax(0)), expected)


def test_embeddings_of_the_parts_add_up() -> None:
    weight = torch.randn(12, 5)
    sources = torch.tensor([-1, -12, 1, 0, -5, -6], dtype=torch.int32)
    inputs = sources, torch.tensor([11, 5]), torch.tensor([1, 2, 3, 4, 5, 0], dtype=torch.int32)
    whole, positions = resolve_and_embed(*inputs, weight)
    parts = []
    for n, part in enumerate(weight.split(4)):
        out = torch.full_like(whole, torch.nan)
        found, same = resolve_and_embed(*inputs, part, n * 4, out)
        assert found is out
        assert torch.equal(same, positions)
        parts.append(found)
    assert torch.equal(sum(parts), whole)


class FakePeerMemory:
    """In main memory: only this process sees it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        self.handle = bytes(64)

    def open(self, handle: bytes) -> int:
        return self.tensor.data_ptr()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_peers_have_room_for_what_they_exchange(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts do not overlap; no two sums running read the same small one, nor one what it writes."""
    monkeypatch.setattr(device_groups, "PeerMemory", FakePeerMemory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    store, rows, hidden = dist.HashStore(), 3000, 1024
    where = size, True, torch.device("cpu")
    with ThreadPoolExecutor(size) as pool:
        ranks = list(pool.map(lambda rank: PeerGroup(store, rank, *where), range(size)))
    on_all(ranks, lambda group: group.reserve(2 * rows * hidden, 9000))
    group = ranks[1]

    def span(tensor: Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        return start, start + tensor.nbytes

    largest = group.output(rows, hidden, torch.bfloat16)
    keys = group.keys_output(9000)
    assert (largest.shape, keys.shape) == ((rows, hidden), (9000,))
    small = group.most_one_shot // (2 * hidden)
    sums: list[tuple[Tensor, Tensor]] = []  # what each reads and writes

    def one_shot(x: Tensor, peers: Any, base: int, out: Tensor) -> Tensor:
        sums.append((x, out))
        return out

    monkeypatch.setattr("nanovllm.kernels.all_reduce.one_shot", one_shot)
    rng = random.Random(size)
    for _ in range(50):  # steps of one to three layers
        x = group.output(small, hidden, torch.bfloat16, is_first=True)
        for _ in range(1 + 2 * rng.randint(1, 3)):
            x = group.all_reduce(x)
            assert x is sums[-1][1]
            assert span(group.output(small, hidden, torch.bfloat16)) == span(x)  # it is added to
    assert all(span(x) != span(out) for x, out in sums)
    assert all(span(before) != span(x) for (before, _), (x, _) in pairwise(sums))
    parts = {span(part) for parts in sums for part in parts}
    assert len(parts) == 3
    assert group._meetings is not None
    spans = sorted([*parts, span(largest), span(keys), span(group._meetings)])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % 16 == 0 for start, _ in spans)
    part = group.output(5, hidden, torch.float32)
    assert (part.shape, part.data_ptr()) == ((5, hidden), x.data_ptr())


class FakeGroup(RankGroup):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class Meeting(RankGroup):
    """A rank in a thread of its own. Its sums go as PeerGroup's to where the next output will be.

    Args:
        parts: all ranks' last outputs.

    Without `memory`, three parts of it, each sum has memory of its own.
    """

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, parts: list[Tensor]
    ) -> None:
        self.rank, self.size = rank, size
        self.barrier, self.parts = barrier, parts
        self.memory: list[Tensor] = []

    def output(
        self, num_tokens: int, size: int, dtype: torch.dtype, is_first: bool = False
    ) -> Tensor | None:
        if not self.memory:
            return None
        if is_first:
            self.turn = 0
        return self.memory[self.turn][: num_tokens * size].view(num_tokens, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.parts[self.rank] = x
        self.barrier.wait()
        total = torch.stack(self.parts).sum(dim=0)
        self.barrier.wait()
        if not self.memory:
            return total
        x.fill_(torch.nan)  # whoever reads it now reads what another part may have become
        self.turn = 2 if self.turn == 1 else 1
        out = self.output(*x.shape, x.dtype)
        assert out is not None
        return out.copy_(total)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_write_where_what_they_add_to_is(
    spec: ModelSpec, checkpoint: CheckpointFactory
) -> None:
    size, lens = 2, [7, 1, 5]
    model_dir = checkpoint(spec)
    config = Config.from_options(str(model_dir), {"max_model_len": 32}).model_config
    whole = Qwen3ForCausalLM(config, BACKENDS["torch"], 32, device=torch.device("meta"))
    shapes = checkpoint_shapes(whole)
    layout = BatchLayout(16, config.vocab_size, torch.device("cpu"))
    ids = torch.randint(config.vocab_size, (sum(lens),), generator=torch.Generator().manual_seed(3))

    def logits(group: Meeting) -> Tensor:
        part = Qwen3ForCausalLM(config.split(size), BACKENDS["torch"], 32, group)
        load_weights(part, model_dir, shapes, group)
        _, context = layout.empty_prefill(lens)
        context.logit_rows = torch.tensor([6, 7, 12])
        return part(part.model.embed_tokens(ids), context)

    found = []
    for is_shared in (False, True):
        barrier, parts = threading.Barrier(size, timeout=60), [torch.empty(0)] * size
        groups = [Meeting(rank, size, barrier, parts) for rank in range(size)]
        for group in groups if is_shared else ():
            group.memory = list(torch.full((3, sum(lens) * config.hidden_size), torch.nan))
        with ThreadPoolExecutor(size) as pool:
            found.append(list(pool.map(logits, groups)))
    for expected, actual in zip(*found, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[5]], ids=str)
def test_the_parts_of_a_checkpoint_make_it_up(
    spec: ModelSpec, checkpoint: CheckpointFactory
) -> None:
    """Each number of the checkpoint is read by a rank; of few K/V heads each by several."""
    model_dir = checkpoint(spec)
    whole_config = Config.from_options(str(model_dir), {"max_model_len": 32}).model_config
    whole = Qwen3ForCausalLM(whole_config, BACKENDS["torch"], 32)
    load_weights(whole, model_dir)
    shapes, targets = checkpoint_shapes(whole), checkpoint_targets(whole)
    for size in (2, 4):
        parts = []
        for rank in range(size):
            group = FakeGroup(rank, size)
            part = Qwen3ForCausalLM(whole_config.split(size), BACKENDS["torch"], 32, group)
            for parameter in part.parameters():
                parameter.data.fill_(torch.nan)
            load_weights(part, model_dir, shapes, group)
            assert not any(parameter.isnan().any() for parameter in part.parameters())
            parts.append(checkpoint_targets(part))
        for name, tensor in targets.items():
            found = [part[name] for part in parts if name in part]
            if len(found) == 1:  # a bias that rank 0 adds
                assert name.endswith("bias")
            dims = [d for d in range(tensor.dim()) if found[0].size(d) != tensor.size(d)]
            if dims:
                step = size * found[0].size(dims[0]) // tensor.size(dims[0])
                assert torch.equal(torch.cat(found[::step], dim=dims[0]), tensor), name
            else:
                assert all(torch.equal(part, tensor) for part in found), name


def test_a_rank_adds_bias_and_residual_once(tmp_path: Path) -> None:
    """The sum over the ranks of what each adds to the stream is what one rank adds."""
    (tmp_path / "config.json").write_text("{}")
    edit_json(
        tmp_path / "config.json", architectures=["LlamaForCausalLM"], vocab_size=8, hidden_size=8,
        intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, attention_bias=True,
    )  # fmt: skip
    config = Config.from_options(str(tmp_path), {"load_format": "dummy"}).model_config
    models = [
        Qwen3ForCausalLM(config.split(2), BACKENDS["torch"], 8, FakeGroup(n, 2)) for n in (0, 1)
    ]
    assert [model.model.layers[0].self_attn.o_proj.bias is None for model in models] == [
        False,
        True,
    ]

"""The examples: what people wrap around an engine."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from conftest import TINY, Tally

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HELLO = [{"role": "user", "content": "introduce yourself"}]
PRIMES = [{"role": "user", "content": "list all prime numbers within 20"}]


def load_example(name: str) -> ModuleType:
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- chat.py ---------------------------------------------------------------------------------


def test_chat_answers_and_ends_with_an_empty_line() -> None:
    found = subprocess.run(
        [sys.executable, "examples/chat.py", "--temperature", "0"],
        input="introduce yourself\nlist all prime numbers within 20\n\n",
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    first, second, *_ = found.stdout.split("> ")[1:]
    assert first.startswith("I am tiny-qwen3")
    assert second.startswith("2, 3, 5, 7")


def test_chat_forgets_the_oldest_turns_when_the_history_is_full() -> None:
    chat = load_example("chat")
    with LLM(str(TINY), device="cpu", max_model_len=128, max_num_seqs=1) as llm:
        system = {"role": "system", "content": "be brief"}
        history = [system, *[*HELLO, {"role": "assistant", "content": "I am"}] * 8, *PRIMES]
        kept = chat.fitting(llm, history, max_tokens=64)
        assert kept[0] == system
        assert kept[-1] == PRIMES[0]
        assert kept[1]["role"] == "user"
        assert 3 < len(kept) < len(history)
        assert chat.fitting(llm, PRIMES, max_tokens=64) == PRIMES
        llm.chat(kept, SamplingParams(max_tokens=64), use_tqdm=False)


# --- server.py -------------------------------------------------------------------------------


class Running(NamedTuple):
    """A server in this process, and a client of it."""

    llm: LLM
    client: Any
    url: str


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    openai, uvicorn = pytest.importorskip("openai"), pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    llm = LLM(str(TINY), device="cpu", max_model_len=256, kvcache_block_size=16, max_num_seqs=32)
    app = load_example("server").Server(llm, "tiny").app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield Running(llm, openai.OpenAI(base_url=url, api_key="none", max_retries=0), url)
    server.should_exit = True
    thread.join()
    assert llm.model_runner is None, "it shuts the engine down"


def ask(running: Running, messages: Any = HELLO, **options: Any) -> Any:
    options = {"model": "tiny", "temperature": 0, "max_tokens": 64} | options
    return running.client.chat.completions.create(messages=messages, **options)


def test_the_model_is_listed(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == ["tiny"]


@pytest.mark.parametrize("messages", [HELLO, PRIMES])
def test_a_chat_is_what_the_engine_gives(messages: Any, running: Running) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    [expected] = running.llm.chat(messages, params, use_tqdm=False)
    answer = ask(running, messages)
    [choice] = answer.choices
    assert choice.message.content == expected["text"]
    assert choice.finish_reason == expected["finish_reason"]
    assert answer.usage.prompt_tokens == len(expected["prompt_token_ids"])
    assert answer.usage.completion_tokens == len(expected["token_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected["token_ids"])


def test_a_streamed_chat_is_the_same_in_pieces_with_usage(running: Running) -> None:
    whole = ask(running)
    chunks = list(ask(running, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(c.choices[0].delta.content for c in pieces) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in pieces if c.choices[0].finish_reason] == ["stop"]
    assert len(pieces) > 20
    assert last.usage == whole.usage
    assert last.choices == []


def test_stop_seed_and_logprobs(running: Running) -> None:
    text = ask(running).choices[0].message.content
    assert ask(running, stop=["small"]).choices[0].message.content == text.split("small")[0]
    hot = {"temperature": 2.0, "max_tokens": 12}
    first, again, other = (
        ask(running, seed=seed, **hot).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again != other
    answer = ask(running, logprobs=True, top_logprobs=3, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert text.startswith("".join(entry.token for entry in content))
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token


def test_completions_of_one_or_several_prompts(running: Running) -> None:
    create = running.client.completions.create
    options = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2)
    expected = running.llm.generate(["one", [5, 6]], params, use_tqdm=False)
    answer = create(prompt=["one", "two"], **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == expected[0]["text"]
    [choice] = create(prompt=[5, 6], logprobs=2, **options).choices
    assert choice.text == expected[1]["text"]
    values = [next(iter(top.values())) for top in expected[1]["logprobs"]]
    assert choice.logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    streamed = create(prompt="one", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0]["text"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "gpt-4"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, 400, "1 to 255 tokens"),
        ({"n": 2}, 400, "n: "),
        ({"top_logprobs": 50, "logprobs": True}, 400, "logprobs"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of"),
        ({"extra_body": {"chat_template_kwargs": {"thinking": 1}}}, 400, "does not use"),
    ],
    ids=str,
)
def test_a_bad_request_is_answered_as_the_api_has_it(
    options: dict[str, Any], status: int, message: str, running: Running
) -> None:
    import openai

    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message) as caught:
            ask(running, **{"messages": HELLO, "stream": stream} | options)
        assert caught.value.status_code == status
        assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_24_clients_at_a_time(running: Running, tally: Tally) -> None:
    expected = [ask(running, messages).choices[0].message.content for messages in (HELLO, PRIMES)]
    barrier = threading.Barrier(24)

    def client(index: int) -> tuple[str, float]:
        barrier.wait()
        begun, first = time.perf_counter(), 0.0
        text = ""
        for chunk in ask(running, (HELLO, PRIMES)[index % 2], stream=True):
            first = first or time.perf_counter() - begun
            text += chunk.choices[0].delta.content
        return text, first

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(client, range(24)))
    assert [text for text, _ in answers] == expected * 12
    tally.maximum("server: seconds to the first token, 24 clients", max(s for _, s in answers))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(stream: bool, running: Running) -> None:
    options = {"max_tokens": 240, "extra_body": {"ignore_eos": True}}
    if stream:
        answer = ask(running, stream=True, **options)
        next(iter(answer))
        answer.close()
    else:
        import openai

        with pytest.raises(openai.APITimeoutError):
            ask(running, timeout=0.1, **options)
    generated = running.llm.stats()["num_generated_tokens"]
    deadline = time.monotonic() + 20
    while running.llm.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.llm.stats()["num_running"] == 0
    assert running.llm.stats()["num_generated_tokens"] - generated < 200, "it was not aborted"
    assert ask(running, max_tokens=3).usage.completion_tokens == 3


def test_sigint_ends_the_server() -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/server.py", "--port", str(port), "--max-num-seqs", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "Uvicorn running" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(20) in (0, -signal.SIGINT), rest
    assert "Traceback" not in rest

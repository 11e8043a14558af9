"""The examples: what people wrap around an engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, TINY, Tally, load_example

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow

JSON = "application/json"
HELLO = [{"role": "user", "content": "introduce yourself"}]
PRIMES = [{"role": "user", "content": "list all prime numbers within 20"}]


@pytest.mark.parametrize("name", ["../example", "chat", "server", "batch"])
def test_a_model_that_cannot_be_loaded_ends_a_program_with_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("server", "batch"):
        pytest.importorskip({"server": "fastapi", "batch": "ray"}[name])
    program = f"{name.removeprefix('../')}.py"
    files = [str(tmp_path / file) for file in ("in.jsonl", "out.jsonl")] if name == "batch" else []
    monkeypatch.setattr(sys, "argv", [program, *files, "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as caught:
        load_example(name).main()
    message = caught.value.code
    assert isinstance(message, str), "Python prints it, and the exit status is 1"
    assert message.startswith(f"{program}: ")
    assert str(tmp_path / "none") in message
    assert "\n" not in message


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


def test_chat_drops_a_question_that_is_too_long_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = load_example("chat")
    questions = iter(["introduce yourself", "too long " * 2000, "introduce yourself", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    asked: list[Any] = []
    answer = chat.answer

    def record(llm: LLM, history: Any, params: SamplingParams) -> str:
        asked.append(history)
        text: str = answer(llm, history, params)
        return text

    monkeypatch.setattr(chat, "answer", record)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--temperature", "0", "--max-tokens", "8"])
    chat.main()
    first, said, *_ = capsys.readouterr().out.splitlines()
    assert said.startswith("[")
    assert "1 to 4095 tokens" in said
    assert asked[-1] == [*HELLO, {"role": "assistant", "content": first}, *HELLO]


# --- server.py -------------------------------------------------------------------------------


class Running(NamedTuple):
    """A server in this process, and a client of it."""

    llm: LLM
    client: Any
    url: str
    module: ModuleType


@contextmanager
def serving(**options: Any) -> Iterator[Running]:
    openai, uvicorn = pytest.importorskip("openai"), pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    llm = LLM(str(TINY), device="cpu", kvcache_block_size=16, **options)
    module = load_example("server")
    app = module.Server(llm, "tiny").app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    try:
        yield Running(llm, client, url, module)
    finally:
        server.should_exit = True
        thread.join()
    assert llm.model_runner is None, "it shuts the engine down"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(max_model_len=256, max_num_seqs=32) as found:
        yield found


def ask(running: Running, messages: Any = HELLO, **options: Any) -> Any:
    options = {"model": "tiny", "temperature": 0, "max_tokens": 64} | options
    return running.client.chat.completions.create(messages=messages, **options)


def complete(running: Running, prompt: Any = "one", **options: Any) -> Any:
    options = {"model": "tiny", "temperature": 0, "max_tokens": 5} | options
    return running.client.completions.create(prompt=prompt, **options)


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether something comes to be so."""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


def test_the_model_is_listed(running: Running) -> None:
    [model] = running.client.models.list()
    assert model.id == "tiny"
    assert running.client.models.retrieve("tiny") == model


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


def test_the_first_piece_of_a_streamed_chat_names_the_role(running: Running) -> None:
    chunks = ask(running, stream=True, max_tokens=4)
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None]


def test_null_stands_for_the_default(running: Running) -> None:
    names = "top_p n stream stream_options presence_penalty frequency_penalty logprobs stop seed"
    nothing = dict.fromkeys([*names.split(), "top_logprobs", "logit_bias", "tools", "user"])
    assert ask(running, extra_body=nothing).choices == ask(running).choices
    assert complete(running, max_tokens=None).usage.completion_tokens == 16


def test_values_that_change_nothing_are_taken(running: Running) -> None:
    harmless = {
        "n": 1, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True,
        "service_tier": "auto", "user": "me",
    }  # fmt: skip
    assert ask(running, extra_body=harmless).choices == ask(running).choices
    harmless = {"echo": False, "best_of": 1}
    assert complete(running, extra_body=harmless).choices == complete(running).choices


def test_a_content_may_come_in_parts(running: Running) -> None:
    parts = [{"type": "text", "text": text} for text in ("list all prime ", "numbers within 20")]
    answer = ask(running, [{"role": "user", "content": parts}])
    assert answer.choices == ask(running, PRIMES).choices


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


def test_bytes_of_all_tokens_make_the_message(running: Running) -> None:
    """Also where a token is part of a character, special (no text), or has a space before it."""
    hot = {"temperature": 5.0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    [choice] = ask(running, logprobs=True, seed=3, **hot).choices
    assert "\ufffd" in choice.message.content
    assert " " in choice.message.content
    assert "<|im_end|>" in {entry.token for entry in choice.logprobs.content}
    joined = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes)
    assert joined.decode(errors="replace") == choice.message.content


def test_bytes_without_a_byte_level_tokenizer_are_the_texts(running: Running) -> None:
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: "éà"[ids[0]], convert_ids_to_tokens=lambda token_id: "éà"[token_id]
    )
    llm: Any = SimpleNamespace(tokenizer=tokenizer)
    assert bytes(running.module.Server(llm, "words").bytes_of(1)) == "à".encode()


def test_of_tokens_with_the_same_text_the_sampled_one_keeps_its_log_probability(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those have that are part of a character: U+FFFD."""
    options = {"temperature": 5.0, "max_tokens": 9, "seed": 1, "logprobs": 3}
    params = SamplingParams(**options, ignore_eos=True)
    [expected] = running.llm.generate(["one"], params, use_tqdm=False)
    monkeypatch.setattr(running.module.Server, "text", lambda *_: "\ufffd")
    [choice] = complete(running, extra_body={"ignore_eos": True}, **options).choices
    pairs = zip(expected["token_ids"], expected["logprobs"], strict=True)
    values = pytest.approx([top[token_id] for token_id, top in pairs], abs=1e-4)
    assert choice.logprobs.token_logprobs == values
    assert [top["\ufffd"] for top in choice.logprobs.top_logprobs] == values


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
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ({"extra_body": {"best_of": 3}}, 400, "best_of"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"extra_body": {"guess": 1}}, 400, "guess"),
        ({"messages": [{"input_ids": [5, 6]}]}, 400, "role"),
        ({"messages": [{"role": "user", "input_ids": [5, 6]}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, '"text"'),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "a"}}}, 400, "chat_template"),
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


def test_an_empty_prompt_is_refused(running: Running) -> None:
    import openai

    for prompt in ([], "", [[]]):
        with pytest.raises(openai.BadRequestError, match="token"):
            complete(running, prompt)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/nothing", None, 404),
        ("/models/gpt-4", None, 404),
        ("/completions", None, 405),
        ("/completions", b"{", 400),
        ("/completions", b"[]", 400),
        ("/completions", b'{"model": "\xff"}', 400),
        ("/completions", b'{"\\ud83d": 1}', 400),
        ("/completions", b'{"model": "\\ud83d", "prompt": "a"}', 404),
        ("/completions", b"[" * 100_000 + b"]" * 100_000, 400),
    ],
)
def test_what_is_no_request_is_answered_as_the_api_has_it(
    path: str, body: bytes | None, status: int, running: Running
) -> None:
    request = urllib.request.Request(running.url + path, body, {"Content-Type": JSON})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == status
    assert json.load(caught.value)["error"]["type"] == "invalid_request_error"


def test_clients_beyond_the_most_are_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    monkeypatch.setattr(running.module, "MAX_CLIENTS", 1)
    with ask(running, stream=True, max_tokens=240, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        with pytest.raises(openai.APIStatusError, match="1 clients already") as caught:
            ask(running)
        assert caught.value.status_code == 503
        assert caught.value.body["type"] == "server_error"  # type: ignore[index]
    assert wait_for(lambda: running.llm.stats()["num_running"] == 0)
    assert ask(running).choices


def test_clients_that_wait_neither_hold_up_the_others_nor_stay_once_they_leave() -> None:
    with serving(max_model_len=2048, max_num_seqs=2) as running:
        stats = running.llm.stats
        options = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        streams = [ask(running, stream=True, **options) for _ in range(2)]
        rounds = [iter(stream) for stream in streams]
        for chunks in rounds:
            next(chunks)

        waiting = [HTTPConnection(running.url.split("/")[2]) for _ in range(6)]
        for index, connection in enumerate(waiting):
            body = {"model": "tiny", "messages": HELLO, "stream": index % 2 == 0}
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": JSON}
            )
        assert wait_for(lambda: stats()["num_waiting"] == 6)
        for _ in range(100):  # while all six wait
            for chunks in rounds:
                next(chunks)
        for connection in waiting:
            connection.close()
        assert wait_for(lambda: stats()["num_waiting"] == 0)
        assert stats()["num_running"] == 2, "they were to leave while they waited"
        for stream in streams:
            stream.close()
        assert wait_for(lambda: stats()["num_running"] == 0)
        assert stats()["num_generated_tokens"] < 3900, "they were not aborted"


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
    assert wait_for(lambda: running.llm.stats()["num_running"] == 0)
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

"""An HTTP server with OpenAI's API: /v1/models, /v1/chat/completions and /v1/completions.

Each request has a thread that asks its stream for the next piece; the requests of all threads
share the engine's steps. A client that goes away frees its request. What the API knows and this
server cannot do is refused, never ignored.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, get_type_hints
from uuid import uuid4

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, model_validator
from starlette.exceptions import HTTPException
from tokenizers.pre_tokenizers import ByteLevel

from nanovllm import LLM, SamplingParams
from nanovllm.config import Options
from nanovllm.engine.results import Stream

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
Json = dict[str, Any]

# Most requests at a time: each may need a thread, also while it waits for its turn in the engine.
MAX_CLIENTS = 1024

# Fields of the API with nothing behind them here: the values that change nothing, or ANY value.
ANY = None
HARMLESS: dict[str, list[Any] | None] = {
    "n": [1], "best_of": [1], "echo": [False], "suffix": [""], "logit_bias": [{}], "store": [False],
    "presence_penalty": [0], "frequency_penalty": [0], "response_format": [{"type": "text"}],
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False],
    "service_tier": ["auto", "default"], "modalities": [["text"]],
    "user": ANY, "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY,
}  # fmt: skip

# The byte that a character of a byte-level token stands for: itself up to 255; those after it are
# for the other bytes, in order.
ALPHABET = sorted(ByteLevel.alphabet())
BYTES = [ord(c) for c in ALPHABET if ord(c) < 256]
BYTE_OF = dict(zip(ALPHABET, BYTES + sorted({*range(256)} - {*BYTES}), strict=True))


def as_message(message: Json) -> Json:
    """A message as the engine takes it: its content, if it is a list of texts, joined."""
    # The engine would take one with "input_ids" for a tokenizer's output.
    if not isinstance(message.get("role"), str) or "input_ids" in message:
        raise ValueError(f"a message must have a role and no input_ids, got {message!r:.80}")
    if not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                known = '{"type": "text", "text": "..."}'
                raise ValueError(f"parts of a content must be {known}, got {part!r:.80}")
    return message | {"content": "".join(texts)}


class Body(BaseModel):
    """What both kinds of completions take; what is neither here nor harmless is refused."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: Json = {}

    @model_validator(mode="before")
    @classmethod
    def leave_out_what_changes_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = {name: value for name, value in given.items() if value is not None}
        for name in found.keys() & HARMLESS:
            value, allowed = found.pop(name), HARMLESS[name]
            if allowed is not ANY and value not in allowed:
                known = " or ".join(map(json.dumps, allowed))
                raise ValueError(f"{name}: only {known} is supported, got {value!r:.80}")
        return found

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        shared = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids")
        options = {name: getattr(self, name) for name in (*shared, "ignore_eos")}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **options)


class CompletionBody(Body):
    kind: ClassVar = ("text_completion", "text_completion", "cmpl")
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16  # the API's default
    logprobs: int | None = None

    def start(self, llm: LLM) -> Stream:
        if not self.prompt:
            raise ValueError(f"prompt must hold at least one token, got {self.prompt!r}")
        return llm.stream(self.prompt, self.params(self.max_tokens, self.logprobs))


class ChatBody(Body):
    kind: ClassVar = ("chat.completion", "chat.completion.chunk", "chatcmpl")
    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    chat_template_kwargs: Json = {}

    def start(self, llm: LLM) -> Stream:
        if not self.messages:
            raise ValueError("messages must hold at least one message")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if "chat_template" in self.chat_template_kwargs:  # a program, which might never end
            raise ValueError("chat_template_kwargs must not hold a chat_template")
        limit = self.max_completion_tokens
        max_tokens = self.max_tokens if limit is None else limit
        params = self.params(max_tokens, self.top_logprobs if self.logprobs else None)
        messages = [as_message(message) for message in self.messages]
        return llm.stream(messages, params, **self.chat_template_kwargs)


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="replace").decode()  # a client may send half a character
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status, headers)


async def refuse(request: Request, found: Exception) -> Response:
    """Any error, in the API's form."""
    if isinstance(found, RequestValidationError):
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found.errors())
        return error(400, "; ".join(problems))
    if isinstance(found, HTTPException):
        return error(found.status_code, found.detail, found.headers)
    return error(500, repr(found))


async def departure(request: Request) -> None:
    """Return when the client goes away, of a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Server:
    """Answers requests with one engine.

    Args:
        llm: the engine; it is shut down with the server.
        name: of the model, as clients are to call it.
    """

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm, self.name, self.started = llm, name, int(time.time())
        self.threads, self.num_clients = ThreadPoolExecutor(MAX_CLIENTS), 0
        self.app = FastAPI(title="nano-vLLM", lifespan=self.lifespan)
        for kind in (RequestValidationError, HTTPException, RuntimeError, Exception):
            self.app.exception_handler(kind)(refuse)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/models/{name:path}")(self.model)
        place = [Depends(self.place)]
        self.app.post("/v1/chat/completions", dependencies=place)(self.chat)
        self.app.post("/v1/completions", dependencies=place)(self.completions)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.llm.exit)

    async def place(self) -> AsyncIterator[None]:
        """Count a client until its answer has been sent, or it has gone."""
        if self.num_clients >= MAX_CLIENTS:
            raise HTTPException(503, f"there are {MAX_CLIENTS} clients already, try again later")
        self.num_clients += 1
        try:
            yield
        finally:
            self.num_clients -= 1

    async def models(self) -> Json:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> Json:
        if name != self.name:
            raise HTTPException(404, f"the model {name!r} does not exist, only {self.name!r}")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "nanovllm"}

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        def choice(piece: Json) -> Json:
            found: Json = {"text": piece["text"], "logprobs": None}
            if "logprobs" in piece:
                tops = piece["logprobs"]
                found["logprobs"] = {
                    "tokens": [self.text(next(iter(top))) for top in tops],
                    "token_logprobs": [next(iter(top.values())) for top in tops],
                    "top_logprobs": [self.by_text(top) for top in tops],
                }
            return found

        return await self.answer(body, request, choice)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        begun: set[int] = set()

        def choice(piece: Json) -> Json:
            role = {} if piece["index"] in begun else {"role": "assistant"}
            begun.add(piece["index"])
            message = role | {"content": piece["text"]}
            found: Json = {"delta" if body.stream else "message": message, "logprobs": None}
            if "logprobs" in piece:
                tokens = [self.token(top, body.top_logprobs) for top in piece["logprobs"]]
                found["logprobs"] = {"content": tokens}
            return found

        return await self.answer(body, request, choice)

    def text(self, token_id: int) -> str:
        return str(self.llm.tokenizer.decode([token_id]))

    def by_text(self, found: dict[int, float]) -> dict[str, float]:
        """Log-probabilities by text; of tokens with the same text the first one's stays."""
        by_text: dict[str, float] = {}
        for token_id, value in found.items():
            by_text.setdefault(self.text(token_id), value)
        return by_text

    def bytes_of(self, token_id: int) -> list[int]:
        """What a token adds to a message: perhaps part of a character; nothing if it is special."""
        tokenizer = self.llm.tokenizer
        text: str = tokenizer.decode([token_id], skip_special_tokens=True)
        characters = tokenizer.convert_ids_to_tokens(token_id) or ""
        found = bytes(BYTE_OF[c] for c in characters if c in BYTE_OF)
        # They differ for tokens that were added, and where the tokenizer is not byte-level.
        return list(found if found.decode(errors="replace") == text else text.encode())

    def token(self, found: dict[int, float], num_likeliest: int) -> Json:
        """A token's log-probability, and the likeliest tokens', as the chat API has them."""

        def entry(i: int) -> Json:
            return {"token": self.text(i), "logprob": found[i], "bytes": self.bytes_of(i)}

        likeliest = sorted(found, key=found.__getitem__, reverse=True)[:num_likeliest]
        return entry(next(iter(found))) | {"top_logprobs": [entry(i) for i in likeliest]}

    async def answer(
        self, body: CompletionBody | ChatBody, request: Request, choice: Callable[[Json], Json]
    ) -> Response:
        """Generate, and answer whole or in pieces."""
        await self.model(body.model)
        loop = asyncio.get_running_loop()
        try:
            stream = await loop.run_in_executor(self.threads, body.start, self.llm)
        except (TypeError, ValueError) as found:
            return error(400, str(found))
        kind, kind_of_chunk, prefix = body.kind
        head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": self.name}
        usage = {"prompt_tokens": stream.num_prompt_tokens, "completion_tokens": 0}

        async def pieces() -> AsyncIterator[Json]:
            gone = asyncio.ensure_future(departure(request))
            try:
                while True:
                    coming = loop.run_in_executor(self.threads, next, stream, None)
                    await asyncio.wait([coming, gone], return_when=asyncio.FIRST_COMPLETED)
                    if gone.done() or not (piece := coming.result()):
                        break
                    usage["completion_tokens"] += len(piece["token_ids"])
                    yield piece
            finally:
                coming.cancel()
                gone.cancel()
                stream.close()  # wakes the thread that waits for the next piece
            usage["total_tokens"] = sum(usage.values())

        def chosen(piece: Json) -> Json:
            ends = {"index": piece["index"], "finish_reason": piece["finish_reason"]}
            return choice(piece) | ends

        async def events() -> AsyncIterator[str]:
            chunk = head | {"object": kind_of_chunk}
            try:
                async for piece in pieces():
                    yield f"data: {json.dumps(chunk | {'choices': [chosen(piece)]})}\n\n"
                if body.stream_options.get("include_usage"):
                    yield f"data: {json.dumps(chunk | {'choices': [], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"
            except RuntimeError as found:  # the engine was shut down
                yield f"data: {bytes(error(500, str(found)).body).decode()}\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        whole: dict[int, Json] = {}
        async for piece in pieces():
            before = whole.setdefault(piece["index"], {"text": "", "index": piece["index"]})
            before["text"] += piece["text"]
            before["finish_reason"] = piece["finish_reason"]
            if "logprobs" in piece:
                before["logprobs"] = before.get("logprobs", []) + piece["logprobs"]
        choices = [chosen(whole[index]) for index in sorted(whole)]
        return JSONResponse(head | {"object": kind, "choices": choices, "usage": usage})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(TINY_CHECKPOINT), help="directory or Hub repo id")
    parser.add_argument("--name", help="what clients call the model (the last part of --model)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    group = parser.add_argument_group("engine options (see nanovllm.config.Config)")
    for name, kind in get_type_hints(Options).items():
        how: Json = {"action": "store_true"} if kind is bool else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = {name: value for name, value in vars(args).items() if name in get_type_hints(Options)}
    try:
        llm = LLM(args.model, **options)
    except (TypeError, ValueError) as found:
        sys.exit(f"server.py: {found}")
    server = Server(llm, args.name or Path(args.model).name)
    uvicorn.run(server.app, host=args.host, port=args.port, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()

"""An HTTP server with OpenAI's API: /v1/models, /v1/chat/completions and /v1/completions.

Each request has a thread that asks its stream for the next piece; the requests of all threads
share the engine's steps. A client that goes away frees its request.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, get_type_hints
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from nanovllm import LLM, SamplingParams
from nanovllm.config import Options

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
Json = dict[str, Any]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completions take; what is not here is refused."""

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
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    user: str | None = None

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        shared = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids")
        options = {name: getattr(self, name) for name in (*shared, "ignore_eos")}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **options)


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None


class ChatBody(Body):
    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: Json = {}


def error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status)


class Server:
    """Answers requests with one engine.

    Args:
        llm: the engine; it is shut down with the server.
        name: of the model, as clients are to call it.
    """

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm, self.name, self.started = llm, name, int(time.time())
        self.threads = ThreadPoolExecutor(llm.config.max_num_seqs)
        self.app = FastAPI(title="nano-vLLM", lifespan=self.lifespan)
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.completions)
        self.app.exception_handler(RequestValidationError)(self.refuse)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.llm.exit)

    async def refuse(self, _: Request, found: RequestValidationError) -> Response:
        problems = (f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in found.errors())
        return error(400, "; ".join(problems))

    async def models(self) -> Json:
        model = {"id": self.name, "object": "model", "created": self.started}
        return {"object": "list", "data": [model | {"owned_by": "nanovllm"}]}

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        def choice(piece: Json, is_delta: bool) -> Json:
            found: Json = {"text": piece["text"], "logprobs": None}
            if "logprobs" in piece:
                tops = [{self.text(i): v for i, v in top.items()} for top in piece["logprobs"]]
                found["logprobs"] = {
                    "tokens": [next(iter(top)) for top in tops],
                    "token_logprobs": [next(iter(top.values())) for top in tops],
                    "top_logprobs": tops,
                }
            return found

        max_tokens = 16 if body.max_tokens is None else body.max_tokens  # the API's default

        def start() -> Any:
            return self.llm.stream(body.prompt, body.params(max_tokens, body.logprobs))

        return await self.answer(body, request, start, choice, "text_completion", "cmpl")

    async def chat(self, body: ChatBody, request: Request) -> Response:
        def choice(piece: Json, is_delta: bool) -> Json:
            message = {"role": "assistant", "content": piece["text"]}
            found: Json = {"delta" if is_delta else "message": message, "logprobs": None}
            if "logprobs" in piece:
                count = body.top_logprobs or 0
                tokens = [self.token(top, count) for top in piece["logprobs"]]
                found["logprobs"] = {"content": tokens}
            return found

        def start() -> Any:
            if not body.messages:
                raise ValueError("messages must hold at least one message")
            limit = body.max_completion_tokens
            max_tokens = body.max_tokens if limit is None else limit
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
            params = body.params(max_tokens, logprobs)
            return self.llm.stream(body.messages, params, **body.chat_template_kwargs)

        return await self.answer(body, request, start, choice, "chat.completion", "chatcmpl")

    def text(self, token_id: int) -> str:
        return str(self.llm.tokenizer.decode([token_id]))

    def token(self, found: dict[int, float], num_likeliest: int) -> Json:
        """A token's log-probability, and the likeliest tokens', as the chat API has them."""

        def entry(token_id: int) -> Json:
            text = self.text(token_id)
            return {"token": text, "logprob": found[token_id], "bytes": list(text.encode())}

        likeliest = sorted(found, key=found.__getitem__, reverse=True)[:num_likeliest]
        return entry(next(iter(found))) | {"top_logprobs": [entry(i) for i in likeliest]}

    async def answer(
        self,
        body: Body,
        request: Request,
        start: Callable[[], Any],
        choice: Callable[[Json, bool], Json],
        kind: str,
        prefix: str,
    ) -> Response:
        """Generate, and answer whole or in pieces."""
        if body.model != self.name:
            return error(404, f"the model {body.model!r} does not exist, only {self.name!r}")
        loop = asyncio.get_running_loop()
        try:
            stream = await loop.run_in_executor(self.threads, start)
        except (TypeError, ValueError) as found:
            return error(400, str(found))
        head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": self.name}
        usage = {"prompt_tokens": stream.num_prompt_tokens, "completion_tokens": 0}

        async def pieces() -> AsyncIterator[Json]:
            try:
                while piece := await loop.run_in_executor(self.threads, next, stream, None):
                    usage["completion_tokens"] += len(piece["token_ids"])
                    yield piece
                    if await request.is_disconnected():
                        break
            finally:
                stream.close()
            usage["total_tokens"] = sum(usage.values())

        def chosen(piece: Json, is_delta: bool) -> Json:
            ends = {"index": piece["index"], "finish_reason": piece["finish_reason"]}
            return choice(piece, is_delta) | ends

        async def events() -> AsyncIterator[str]:
            chunk = head | {"object": kind + (".chunk" if kind == "chat.completion" else "")}
            try:
                async for piece in pieces():
                    yield f"data: {json.dumps(chunk | {'choices': [chosen(piece, True)]})}\n\n"
                if body.stream_options and body.stream_options.include_usage:
                    yield f"data: {json.dumps(chunk | {'choices': [], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"
            except RuntimeError as found:  # the engine was shut down
                yield f"data: {json.dumps(json.loads(error(500, str(found)).body))}\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        whole: dict[int, Json] = {}
        try:
            async for piece in pieces():
                before = whole.setdefault(piece["index"], {"text": "", "index": piece["index"]})
                before["text"] += piece["text"]
                before["finish_reason"] = piece["finish_reason"]
                if "logprobs" in piece:
                    before["logprobs"] = before.get("logprobs", []) + piece["logprobs"]
        except RuntimeError as found:
            return error(500, str(found))
        choices = [chosen(whole[index], False) for index in sorted(whole)]
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
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = {name: value for name, value in vars(args).items() if name in get_type_hints(Options)}
    llm = LLM(args.model, **options)
    server = Server(llm, args.name or Path(args.model).name)
    uvicorn.run(server.app, host=args.host, port=args.port, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()

"""What callers are given of a request: its result, or, in a stream, the pieces of it."""

from threading import RLock
from typing import TYPE_CHECKING, Any, NoReturn, NotRequired, TypedDict

from nanovllm.engine.sequence import News, Sequence

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine


class Result(TypedDict):
    """What `generate` and `chat` give of a request; logprobs only where asked for."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_token_ids: list[int]
    num_cached_tokens: int
    logprobs: NotRequired[list[dict[int, float]]]


class Piece(TypedDict):
    """What a stream gives of a request at a time; logprobs only where asked for."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: NotRequired[list[dict[int, float]]]


def result(seq: Sequence, tokenizer: Any | None) -> Result:
    """What `LLMEngine.generate` gives for a sequence that has ended; or its error is raised."""
    seq.raise_error()
    whole: Result = {
        "text": _text(seq, tokenizer),
        "token_ids": seq.completion_token_ids,
        "finish_reason": seq.finish_reason,
        "stop_reason": seq.stop_reason,
        "prompt_token_ids": seq.token_ids[: seq.num_prompt_tokens],
        "num_cached_tokens": seq.num_cached_tokens,
    }
    if seq.logprobs is not None:
        whole["logprobs"] = seq.logprobs
    return whole


def _text(seq: Sequence, tokenizer: Any | None) -> str:
    if seq.detokenizer is not None:
        return seq.detokenizer.text
    if tokenizer is None:
        return ""
    ids = seq.text_token_ids[seq.num_prompt_tokens :]
    text: str = tokenizer.decode(ids, skip_special_tokens=seq.params.skip_special_tokens)
    return text


class StreamedSequence:
    """Cuts the result of one request into pieces, as its tokens come.

    Args:
        index: of the prompt in its call.
        seq: one with a detokenizer, unless there is no tokenizer.
    """

    def __init__(self, index: int, seq: Sequence) -> None:
        self.index = index
        self.seq = seq
        self._given = News()

    @property
    def is_told_the_end(self) -> bool:
        """True once the caller knows the finish_reason."""
        return self._given.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """True while there is something that the caller has not been given."""
        news = self.seq.news
        return news.num_tokens > self._given.num_tokens or (
            news.finish_reason is not None and not self.is_told_the_end
        )

    def take_news(self) -> Piece:
        """The new tokens, text and log-probabilities, and how the request ended if it has.

        Raises what the tokenizer raised, if that ended it.
        """
        self.seq.raise_error()
        seq, news, given = self.seq, self.seq.news, self._given
        new, start = slice(given.num_tokens, news.num_tokens), seq.num_prompt_tokens
        detokenizer = seq.detokenizer
        piece: Piece = {
            "index": self.index,
            "text": detokenizer.text[given.num_chars : news.num_chars] if detokenizer else "",
            "token_ids": seq.token_ids[start + new.start : start + new.stop],
            "finish_reason": news.finish_reason,
            "stop_reason": news.stop_reason,
        }
        if seq.logprobs is not None:
            piece["logprobs"] = seq.logprobs[new]
        self._given = news
        return piece


class Stream:
    """An iterator over the pieces of some requests, as their tokens come.

    Nothing is queued before the first piece is asked for. Its requests are aborted when it is
    closed, from any thread, dropped or left by an exception. Several threads may ask it: each piece
    goes to one of them. `num_prompt_tokens`: of all its prompts.
    """

    _is_queued = False  # its requests are in the engine, or about to be
    _is_closed = False  # and must not get there any more
    _has_ended = False  # nor is any left there

    def __init__(self, engine: "LLMEngine", seqs: list[Sequence]) -> None:
        self._engine = engine
        self._seqs = seqs
        self.num_prompt_tokens = sum(seq.num_prompt_tokens for seq in seqs)
        self._left = [StreamedSequence(index, seq) for index, seq in enumerate(seqs)]
        self._round = iter(self._left)
        self._asking = RLock()  # its own thread does not wait for itself: see __next__
        self._is_asked = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream cannot be copied: its requests are its own")

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        """What is new of one request.

        Raises:
            RuntimeError: the engine was shut down, or this thread has interrupted a step of its
                own, or its own asking for a piece.
        """
        if self._is_closed:
            raise StopIteration
        self._engine._refuse_nested_steps()
        with self._asking:
            if self._is_asked:
                raise RuntimeError("a signal handler asks the stream that it has interrupted")
            if self._is_closed:  # meanwhile
                raise StopIteration
            self._is_asked = True
            try:
                piece = self._next_piece()
            except BaseException:
                self.close()
                raise
            finally:
                self._is_asked = False
            if piece is None:
                self._is_closed = self._has_ended = True
                raise StopIteration
            return piece

    def _next_piece(self) -> Piece | None:
        if not self._is_queued:
            self._is_queued = True
            self._engine._enqueue(self._seqs, lambda: not self._is_closed)
        while self._left:
            for stream in self._round:
                if stream.has_news:
                    return stream.take_news()
            # While the caller held a piece, any of them may have come to its end.
            self._left = [stream for stream in self._left if not stream.is_told_the_end]
            if self._left:
                self._engine._step_until(self._has_news)
            self._left = [s for s in self._left if s.has_news or self._engine._is_under_way(s.seq)]
            self._round = iter(self._left)
        return None

    def _has_news(self) -> bool:
        return any(s.has_news or not self._engine._is_under_way(s.seq) for s in self._left)

    def close(self) -> None:
        """Abort what has not ended. Within a step of this thread: when the step ends."""
        self._is_closed = True  # before it is asked whether they are queued: see _next_piece
        if self._is_queued and not self._has_ended:
            self._engine._abort({seq.seq_id for seq in self._seqs}, waits=False)
        self._has_ended = True

    def __del__(self) -> None:
        self.close()

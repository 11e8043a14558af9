"""Sequence: one request's tokens, how far they are computed, and the KV blocks that hold them."""

from enum import Enum, auto
from itertools import count
from typing import NamedTuple

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """WAITING (to be prefilled, or in the middle of it) -> RUNNING (decoding) -> FINISHED."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class News(NamedTuple):
    """How much of a completion may be given out: what the last finished step left.

    Another thread may read it at any time, and so much of the tokens, log-probabilities and text,
    since these only grow.
    """

    num_tokens: int = 0
    num_chars: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Sequence:
    """One request on its way through the engine.

    A token is *known* when its id is in `token_ids`, *unread* when the device has been told to
    sample it but its id has not been read back, and *computed* when its K/V is stored or a
    scheduled step will store it. The Scheduler moves the three counters, the BlockManager owns
    `block_table` and `block_hashes`; nobody else writes to them.

    Args:
        token_ids: the prompt, at least one id.
        params: how to sample and when to end.
        max_total_tokens: prompt and completion together never exceed this.
        seed: of the noise that its tokens are sampled with.
    """

    _ids = count()

    def __init__(
        self, token_ids: list[int], params: SamplingParams, max_total_tokens: int, seed: int = 0
    ) -> None:
        self.seq_id = next(Sequence._ids)
        self.status = SequenceStatus.WAITING
        self.params = params
        self.seed = seed
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.max_num_tokens = max_total_tokens
        if params.max_tokens is not None:
            self.max_num_tokens = min(max_total_tokens, len(token_ids) + params.max_tokens)
        self.num_unread_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the prompt: found in the prefix cache, not computed
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []  # chained hashes of the full blocks, as far as asked for
        # Of each known completion token, if asked for: its log-probability, then the likeliest's.
        self.logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self.finish_reason: str | None = None  # "stop" | "length"
        self.stop_reason: str | int | None = None  # the stop text or id of `params` that ended it
        self.is_ended_by_id = False  # by a stop id, the model's or one of `params`
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.detokenizer: Detokenizer | None = None  # only where text is needed as tokens come
        self.error: Exception | None = None  # the tokenizer's, which ended it
        self.is_awaited = False  # `generate` or a stream gives it out, not `step`
        self.is_streamed = False  # its tokens are given out one by one
        self.news = News()  # of a streamed one

    def __len__(self) -> int:
        """Number of tokens, known and unread."""
        return len(self.token_ids) + self.num_unread_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.name}, {self.num_prompt_tokens} prompt + "
            f"{self.num_completion_tokens} tokens, {self.num_computed_tokens} computed)"
        )

    @property
    def num_completion_tokens(self) -> int:
        """Number of generated tokens, known and unread."""
        return len(self) - self.num_prompt_tokens

    @property
    def num_known_completion_tokens(self) -> int:
        """Number of generated ids that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated ids that are known."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def text_token_ids(self) -> list[int]:
        """The known ids that have text: without the id that ended the request."""
        return self.token_ids[:-1] if self.is_ended_by_id else self.token_ids

    @property
    def is_at_length_limit(self) -> bool:
        """True once no further token may be sampled for this sequence."""
        return len(self) >= self.max_num_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int, logprobs: dict[int, float] | None = None) -> None:
        """Make the oldest unread token known; `logprobs` are given if the request asks for them."""
        assert self.num_unread_tokens > 0, "no token of this sequence is being sampled"
        self.num_unread_tokens -= 1
        if self.logprobs is not None:
            assert logprobs is not None, "this sequence wants log-probabilities"
            # Before the id: if Ctrl-C comes between the two, Scheduler.start_over drops the excess.
            self.logprobs.append(logprobs)
        self.token_ids.append(token_id)

    def raise_error(self) -> None:
        """Raise what the tokenizer raised when text was needed, if it did."""
        if self.error is not None:
            raise self.error

    def publish(self) -> None:
        """Let a stream give out what is known now."""
        num_chars = 0 if self.detokenizer is None else self.detokenizer.num_settled
        num_tokens = self.num_known_completion_tokens
        self.news = News(num_tokens, num_chars, self.finish_reason, self.stop_reason)

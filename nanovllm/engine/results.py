"""What callers are given of a request: its result, or, in a stream, the pieces of it."""

from typing import Any

from nanovllm.engine.sequence import Sequence


def result(seq: Sequence, tokenizer: Any | None) -> dict[str, Any]:
    """What `LLMEngine.generate` gives for a sequence that has ended."""
    whole: dict[str, Any] = {
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
    text: str = tokenizer.decode(
        seq.completion_token_ids, skip_special_tokens=seq.params.skip_special_tokens
    )
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
        self._num_tokens = 0  # of the completion, given so far
        self._num_chars = 0
        self.is_told_the_end = False  # the caller knows the finish_reason

    @property
    def has_news(self) -> bool:
        """True while there is something that the caller has not been given."""
        return self.seq.num_known_completion_tokens > self._num_tokens or (
            self.seq.finish_reason is not None and not self.is_told_the_end
        )

    def take_news(self) -> dict[str, Any]:
        """The new tokens, text and log-probabilities, and how the request ended if it has."""
        seq, first, end = self.seq, self._num_tokens, self.seq.num_known_completion_tokens
        news: dict[str, Any] = {
            "index": self.index,
            "text": self._take_text(),
            "token_ids": seq.token_ids[seq.num_prompt_tokens + first :],
            "finish_reason": seq.finish_reason,
            "stop_reason": seq.stop_reason,
        }
        if seq.logprobs is not None:
            news["logprobs"] = seq.logprobs[first:end]
        self._num_tokens, self.is_told_the_end = end, seq.finish_reason is not None
        return news

    def _take_text(self) -> str:
        detokenizer = self.seq.detokenizer
        if detokenizer is None:
            return ""
        text = detokenizer.text[self._num_chars : detokenizer.num_settled]
        self._num_chars += len(text)
        return text

"""Detokenizer: the text of one request while its tokens come, and the stop text in it."""

from typing import Any, NamedTuple

from nanovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what decoders put in the place of bytes that are no UTF-8
# A character has at most four bytes. So the last three characters of a text may still become
# another one, and a text decoded from the middle of a character on begins with at most three of
# them too many. One character stands for at most three bytes that are no UTF-8: 20 ids, of a byte
# or more each, always show a character between the two.
MAX_PARTIAL = 3
MIN_WINDOW = 20
MAX_WINDOW = 30
# A row of bytes shows nothing if it begins within a character: one of so many ids more does not.
MORE_IDS = range(4)


class _State(NamedTuple):
    """What is known after `num_tokens` tokens of the completion; replaced as a whole.

    `window` holds the last of their ids, and decodes to `done`, which is already in `text` (but for
    wrong characters where it begins within one), and then to what is held back.
    """

    num_tokens: int
    window: list[int]
    done: str
    num_unfinished: int  # ids since a row of bytes was readable last
    text: str
    stop: str | None
    is_final: bool


class Detokenizer:
    """Turns the completion of one request into text that only grows.

    A character that is not complete yet is held back until it is, or until the request has ended.
    The text of a request that has ended is that of `tokenizer.decode(completion ids)`, cut before
    the stop text. That holds for decoders where a token changes no text but an unfinished character
    before it, as Qwen's; and for those like Llama 2's, which make of a row of bytes nothing as long
    as its end is unfinished, if the row is finished at last. Each token is decoded with a few
    before it, since its text may depend on them (the space before a word, the bytes of a
    character): the cost of a token does not depend on how many have come.

    Args:
        tokenizer: a transformers tokenizer.
        params: stop texts, skip_special_tokens.
        num_prompt_tokens: where the completion begins.
        hidden_ids: ids that have no text if special tokens are skipped (find_hidden_ids).
    """

    def __init__(
        self,
        tokenizer: Any,
        params: SamplingParams,
        num_prompt_tokens: int,
        hidden_ids: frozenset[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = params.skip_special_tokens
        self.stops = tuple(params.stop or ())
        self.num_prompt_tokens = num_prompt_tokens
        self.hidden_ids = hidden_ids if params.skip_special_tokens else frozenset()
        self._max_stop_length = max(map(len, self.stops), default=0)
        self._state = _State(0, [], "", 0, "", None, False)

    @property
    def text(self) -> str:
        """The text so far, up to a stop text."""
        return self._state.text

    @property
    def num_settled(self) -> int:
        """Number of characters of `text` that will stay, whatever follows.

        The rest is the longest end of it that a stop text begins with.
        """
        state = self._state
        if state.is_final or state.stop is not None:
            return len(state.text)
        return len(state.text) - max((_overlap(state.text, stop) for stop in self.stops), default=0)

    def update(self, token_ids: list[int], is_final: bool) -> str | None:
        """Take in the tokens that have come since the last call; again with the same is no matter.

        Args:
            token_ids: prompt and completion of the sequence.
            is_final: no further token will come: nothing is held back.

        Returns:
            The stop text that ends the completion, or None: of several, the one that was complete
            first, so that it does not depend on where tokens begin.
        """
        state = self._state
        new_ids = token_ids[self.num_prompt_tokens + state.num_tokens :]
        if is_final and not new_ids and state.stop is None:
            state = self._advance(state, [], True)
        for index in range(len(new_ids)):  # one by one, as though they had come so
            if state.stop is None:
                is_last = index == len(new_ids) - 1
                state = self._advance(state, new_ids[index : index + 1], is_final and is_last)
        self._state = state
        return state.stop

    def _advance(self, state: _State, new_ids: list[int], is_final: bool) -> _State:
        window = state.window + [i for i in new_ids if i not in self.hidden_ids]
        decoded = self._decode(window)
        num_settled = len(state.done)
        num_done = max(num_settled, len(decoded) - (0 if is_final else _num_partial(decoded)))
        # A row of bytes whose beginning was readable becomes so again, if at all, with a character.
        num_unfinished = 0
        if decoded.endswith(REPLACEMENT) and not decoded.startswith(state.done):
            num_unfinished = state.num_unfinished + len(new_ids)
        is_unfinished = 0 < num_unfinished <= MAX_PARTIAL
        if is_unfinished and not is_final:
            num_done = num_settled
        text = state.text + decoded[num_settled:num_done]
        # A stop text that has just become complete ends in the new text.
        stop, end = self._find_stop(text, max(0, len(state.text) - self._max_stop_length + 1))
        done = decoded[:num_done] if num_done > num_settled else state.done
        if len(window) >= MAX_WINDOW and not is_unfinished:
            window, done = self._shorten(window, decoded, done)
        num_tokens = state.num_tokens + len(new_ids)
        return _State(num_tokens, window, done, num_unfinished, text[:end], stop, is_final)

    def _shorten(self, window: list[int], decoded: str, done: str) -> tuple[list[int], str]:
        """The last ids of a window and `done` for them, if their text shows where it begins."""
        for more in MORE_IDS:
            ids = window[-MIN_WINDOW - more :]
            tail = self._decode(ids)
            num_wrong = _num_wrong(tail)
            if len(tail) > num_wrong + _num_partial(tail) and decoded.endswith(tail[num_wrong:]):
                return ids, tail[: max(0, len(tail) - (len(decoded) - len(done)))]
        return window, done

    def _find_stop(self, text: str, start: int) -> tuple[str | None, int]:
        """The stop text that is complete first from `start` on, and where it begins.

        Of those complete at the same character it is the longest. (None, len(text)) if there is
        none.
        """
        found = [(at + len(s), at, s) for s in self.stops if (at := text.find(s, start)) >= 0]
        if not found:
            return None, len(text)
        _, at, stop = min(found)
        return stop, at

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)
        return text


def _num_partial(text: str) -> int:
    """How many of the last characters may become another one with the next token."""
    tail = text[-MAX_PARTIAL:]
    return len(tail) - len(tail.rstrip(REPLACEMENT))


def _num_wrong(text: str) -> int:
    """How many of the first characters may come from beginning in the middle of one."""
    head = text[:MAX_PARTIAL]
    return len(head) - len(head.lstrip(REPLACEMENT))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""SamplingParams: the per-request options."""

import math
import sys
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from numbers import Integral, Real
from typing import cast

MAX_LOGPROBS = 20
MAX_TEMPERATURE = 3.4028234663852886e38  # the largest float32


def require_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """The int that `value` is, also one of numpy's, with low <= value <= high.

    Raises:
        TypeError: `value` is no int, or a bool.
        ValueError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        allowed = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def require_float(name: str, value: object, low: float, high: float = math.inf) -> float:
    """The number that `value` is, also one of numpy's: finite, and low <= value <= high.

    Raises:
        TypeError: `value` is no number, or a bool.
        ValueError: `value` is out of range, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = int(value) if isinstance(value, int) else float(value)  # an int may be larger
    if not (-sys.float_info.max <= number <= sys.float_info.max and low <= number <= high):
        allowed = f">= {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be finite and {allowed}, got {value}")
    return number


def require_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _require_tuple(name: str, value: object, kind: str) -> tuple[object, ...]:
    """The entries of a list, tuple or array; () for None.

    Raises:
        TypeError: `value` is something else.
    """
    if value is None:
        return ()
    is_list = isinstance(value, ListLike) and not isinstance(value, (str, bytes))
    if not (is_list or getattr(value, "ndim", 0) == 1):
        raise TypeError(f"{name} must be a list of {kind}, or None, got {value!r:.80}")
    return tuple(cast(ListLike[object], value))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled, when it ends, and what its result holds.

    The distribution that tokens are drawn from: softmax(logits / temperature), cut by `min_p`, of
    which the `top_k` likeliest are left, of which, renormalised, the `top_p` share is left.

    Args:
        temperature: 0 to 3.4e38 (the largest float32). 0 takes the likeliest token (greedy);
            otherwise tokens are drawn from softmax(logits / temperature).
        max_tokens: >= 1, the most tokens to generate; None: as many as max_model_len allows.
        ignore_eos: go on after a stop id of the model (for benchmarks). `stop_token_ids` and `stop`
            end a request all the same.
        top_k: >= 1, draw from that many likeliest tokens; 0 or -1 (kept as 0): from all.
        top_p: 0 < top_p <= 1, draw from the fewest likeliest tokens whose probabilities add up to
            this; 1: from all.
        min_p: 0 to 1, draw from tokens at least this times as likely as the likeliest; 0: from all.
        seed: int64; the same seed draws the same tokens, whatever runs beside it, but for near ties
            in half precision, which rounding decides. None: a new one from torch's generator.
        stop: text or texts that end the request; `text` ends before the one that comes first, while
            `token_ids` keep the token that completed it. Kept as a tuple.
        stop_token_ids: further ids that end the request, also with `ignore_eos`. Kept as a tuple.
        logprobs: 0 to 20, give each token's log-probability and those of so many likeliest tokens,
            before temperature and filters; None: give none.
        skip_special_tokens: leave special tokens (<|im_end|>) out of `text`.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | ListLike[str] | None = None
    stop_token_ids: ListLike[int] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._set("temperature", require_float, low=0.0, high=MAX_TEMPERATURE)
        self._set("max_tokens", require_int, low=1)
        require_bool("ignore_eos", self.ignore_eos)
        self._set("top_k", require_int, low=-1)
        self._set("top_p", require_float, low=0.0, high=1.0)
        if self.top_p == 0:
            raise ValueError(f"top_p must be more than 0 and at most 1, got {self.top_p}")
        self._set("min_p", require_float, low=0.0, high=1.0)
        self._set("seed", require_int, low=-(2**63), high=2**63 - 1)
        self._set("logprobs", require_int, low=0, high=MAX_LOGPROBS)
        require_bool("skip_special_tokens", self.skip_special_tokens)
        # One form of each, so that equal parameters compare and hash as equal.
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "stop", self._stop_strings())
        object.__setattr__(self, "stop_token_ids", self._stop_token_ids())

    def _set(self, name: str, check: Callable[..., float], **limits: float) -> None:
        """Check a number, which may be None where the default is, and keep it as Python's own."""
        value = getattr(self, name)
        if value is not None or name not in ("max_tokens", "seed", "logprobs"):
            object.__setattr__(self, name, check(name, value, **limits))

    def _stop_strings(self) -> tuple[object, ...]:
        is_one = isinstance(self.stop, str)
        strings = (self.stop,) if is_one else _require_tuple("stop", self.stop, "texts, a text")
        for string in strings:
            if not isinstance(string, str):
                raise TypeError(f"stop must be a text or a list of texts, got {string!r:.80} in it")
            if not string:
                raise ValueError("a stop text must have at least one character, got ''")
        return strings

    def _stop_token_ids(self) -> tuple[int, ...]:
        token_ids = _require_tuple("stop_token_ids", self.stop_token_ids, "ints")
        return tuple(
            require_int("an id of stop_token_ids", token_id, low=0) for token_id in token_ids
        )

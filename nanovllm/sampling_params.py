"""SamplingParams: the per-request options."""

import math
import sys
from dataclasses import dataclass


def require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an int (no bool) with low <= value <= high.

    Raises:
        TypeError: `value` is no int.
        ValueError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def require_float(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise unless `value` is a finite int or float (no bool) with low <= value <= high.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is out of range, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (-sys.float_info.max <= value <= sys.float_info.max and low <= value <= high):
        allowed = f">= {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be finite and {allowed}, got {value}")


def require_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Args:
        temperature: >= 0. 0 takes the likeliest token (greedy); otherwise tokens are drawn from
            softmax(logits / temperature).
        max_tokens: >= 1, the most tokens to generate.
        ignore_eos: go on after a stop id, up to max_tokens (for benchmarks).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        require_float("temperature", self.temperature, low=0.0)
        require_int("max_tokens", self.max_tokens, low=1)
        require_bool("ignore_eos", self.ignore_eos)

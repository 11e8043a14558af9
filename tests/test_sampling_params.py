"""SamplingParams: the forms that are taken, and what is refused with which message."""

import math
from typing import Any

import numpy as np
import pytest

from nanovllm import SamplingParams


def test_the_defaults() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (1.0, 64, False)
    assert (params.top_k, params.top_p, params.min_p, params.seed) == (0, 1.0, 0.0, None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert (params.logprobs, params.skip_special_tokens) == (None, True)


def test_the_first_three_may_be_given_by_position() -> None:
    assert SamplingParams(0.5, 7, True) == SamplingParams(
        temperature=0.5, max_tokens=7, ignore_eos=True
    )


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0},
        {"max_tokens": None},
        {"max_tokens": 1},
        {"top_k": 1},
        {"top_k": 10**9},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1.0},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"logprobs": 20},
        {"skip_special_tokens": False},
    ],
    ids=str,
)
def test_every_value_of_the_range_is_taken(good: dict[str, Any]) -> None:
    [(name, value)] = good.items()
    assert getattr(SamplingParams(**good), name) == value


def test_top_k_of_minus_1_is_0() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_stop_strings_and_ids_are_kept_as_tuples() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["b", "a"]).stop == ("b", "a")
    assert SamplingParams(stop=[]).stop == ()
    assert SamplingParams(stop_token_ids=[3, 0]).stop_token_ids == (3, 0)
    assert SamplingParams(stop_token_ids=np.array([3, 0])).stop_token_ids == (3, 0)


def test_equal_parameters_hash_equally() -> None:
    one = SamplingParams(stop=["a"], stop_token_ids=[1], top_k=-1)
    two = SamplingParams(stop="a", stop_token_ids=(1,))
    assert one == two
    assert len({one, two}) == 1


def test_a_list_that_is_changed_later_changes_nothing() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop == ("a",)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"temperature": -0.1},
        ValueError,
        r"temperature must be finite and between 0 and 3.4.*, got -0.1",
    ),
    ({"temperature": 1e39}, ValueError, r"between 0 and 3.40282e\+38, got 1e\+39"),
    (
        {"temperature": math.nan},
        ValueError,
        r"temperature must be finite and between 0 and 3.4.*, got nan",
    ),
    (
        {"temperature": math.inf},
        ValueError,
        r"temperature must be finite and between 0 and 3.4.*, got inf",
    ),
    (
        {"temperature": -math.inf},
        ValueError,
        r"temperature must be finite and between 0 and 3.4.*, got -inf",
    ),
    ({"temperature": "1"}, TypeError, r"temperature must be a number, got '1'"),
    ({"temperature": None}, TypeError, r"temperature must be a number, got None"),
    ({"temperature": True}, TypeError, r"temperature must be a number, got True"),
    ({"max_tokens": 0}, ValueError, r"max_tokens must be >= 1, got 0"),
    ({"max_tokens": -1}, ValueError, r"max_tokens must be >= 1, got -1"),
    ({"max_tokens": math.inf}, TypeError, r"max_tokens must be an int, got inf"),
    ({"max_tokens": "10"}, TypeError, r"max_tokens must be an int, got '10'"),
    ({"max_tokens": 1.0}, TypeError, r"max_tokens must be an int, got 1.0"),
    ({"max_tokens": True}, TypeError, r"max_tokens must be an int, got True"),
    ({"ignore_eos": 1}, TypeError, r"ignore_eos must be True or False, got 1"),
    ({"ignore_eos": None}, TypeError, r"ignore_eos must be True or False, got None"),
    ({"top_k": -2}, ValueError, r"top_k must be >= -1, got -2"),
    ({"top_k": 5.0}, TypeError, r"top_k must be an int, got 5.0"),
    ({"top_k": True}, TypeError, r"top_k must be an int, got True"),
    ({"top_p": 0}, ValueError, r"top_p must be more than 0 and at most 1, got 0"),
    ({"top_p": 1.1}, ValueError, r"top_p must be finite and between 0 and 1, got 1.1"),
    ({"top_p": -0.5}, ValueError, r"top_p must be finite and between 0 and 1, got -0.5"),
    ({"top_p": math.nan}, ValueError, r"top_p must be finite and between 0 and 1, got nan"),
    ({"top_p": "0.9"}, TypeError, r"top_p must be a number, got '0.9'"),
    ({"min_p": -0.1}, ValueError, r"min_p must be finite and between 0 and 1, got -0.1"),
    ({"min_p": 1.01}, ValueError, r"min_p must be finite and between 0 and 1, got 1.01"),
    ({"min_p": math.nan}, ValueError, r"min_p must be finite and between 0 and 1, got nan"),
    ({"min_p": False}, TypeError, r"min_p must be a number, got False"),
    ({"seed": 2**63}, ValueError, rf"seed must be between .* and {2**63 - 1}, got {2**63}"),
    ({"seed": -(2**63) - 1}, ValueError, r"seed must be between -9223372036854775808 and"),
    ({"seed": 1.5}, TypeError, r"seed must be an int, got 1.5"),
    ({"seed": True}, TypeError, r"seed must be an int, got True"),
    ({"stop": ""}, ValueError, r"at least one character, got ''"),
    ({"stop": ["a", ""]}, ValueError, r"at least one character, got ''"),
    ({"stop": 5}, TypeError, r"stop must be a list of texts, a text, or None, got 5"),
    ({"stop": b"a"}, TypeError, r"stop must be a list of texts, a text, or None, got b'a'"),
    ({"stop": ["a", 5]}, TypeError, r"stop must be a text or a list of texts, got 5 in it"),
    ({"stop_token_ids": 5}, TypeError, r"stop_token_ids must be a list of ints, or None, got 5"),
    (
        {"stop_token_ids": "5"},
        TypeError,
        r"stop_token_ids must be a list of ints, or None, got '5'",
    ),
    ({"stop_token_ids": [-1]}, ValueError, r"stop_token_ids must be >= 0, got -1"),
    ({"stop_token_ids": [1.0]}, TypeError, r"stop_token_ids must be an int, got 1.0"),
    ({"stop_token_ids": [True]}, TypeError, r"stop_token_ids must be an int, got True"),
    ({"logprobs": -1}, ValueError, r"logprobs must be between 0 and 20, got -1"),
    ({"logprobs": 21}, ValueError, r"logprobs must be between 0 and 20, got 21"),
    ({"logprobs": True}, TypeError, r"logprobs must be an int, got True"),
    ({"skip_special_tokens": None}, TypeError, r"skip_special_tokens must be True or False, got"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"), REFUSED, ids=[f"{bad}" for bad, _, _ in REFUSED]
)
def test_bad_values_are_refused(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**bad)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="presence_penalty"):
        SamplingParams(presence_penalty=0.5)  # type: ignore[call-arg]

"""Bad input of every kind is refused with its value and what is allowed, and does no harm.

What each part refuses in detail stands in the tests of that part.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import (
    TINY,
    CheckpointFactory,
    ModelSpec,
    ask,
    edit_json,
    is_idle,
)
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
ANSWER = "I am tiny-qwen3, a very small"


@pytest.fixture
def llm(shared_trained_llm: LLM) -> LLM:
    return shared_trained_llm


def assert_unharmed(llm: LLM) -> None:
    assert is_idle(llm)
    [output] = llm.generate([ask(llm, "introduce yourself")], GREEDY, use_tqdm=False)
    assert output["text"] == ANSWER
    assert is_idle(llm)


# --- requests --------------------------------------------------------------------------------


def params(**values: Any) -> Callable[[LLM], Any]:
    return lambda llm: llm.generate([[5]], SamplingParams(**values), use_tqdm=False)


def prompt(value: Any) -> Callable[[LLM], Any]:
    """Behind a good one, which must not be queued either."""
    return lambda llm: llm.generate([[5], value], GREEDY, use_tqdm=False)


REQUESTS: list[tuple[str, Callable[[LLM], Any], type[Exception], str]] = [
    ("empty ids", prompt([]), ValueError, r"1 to 127 tokens \(max_model_len - 1\), got 0"),
    ("empty text", prompt(""), ValueError, "1 to 127 tokens .*, got 0"),
    ("long ids", prompt([5] * 128), ValueError, "1 to 127 tokens .*, got 128"),
    ("long text", prompt("7 " * 300), ValueError, "1 to 127 tokens .*, got 6"),
    ("id too large", prompt([5, 512]), ValueError, "token id 512 is outside .* 0 to 511"),
    ("negative id", prompt([-1]), ValueError, "token id -1 is outside .* 0 to 511"),
    ("float id", prompt([5.0]), TypeError, "token ids must be ints, got 5.0"),
    ("bool id", prompt([True]), TypeError, "token ids must be ints, got True"),
    ("text as id", prompt([5, "a"]), TypeError, "token ids must be ints, got 'a'"),
    ("no prompt", prompt(None), TypeError, "str or a list of token ids, got None"),
    ("bytes", prompt(b"a"), TypeError, "str or a list of token ids, got b'a'"),
    ("half a character", prompt("a\ud83d"), ValueError, r"valid Unicode, got 'a\\ud83d'"),
    ("no prompts", lambda llm: llm.generate(None), TypeError, "got None"),
    ("a dict", lambda llm: llm.generate({"prompt": "a"}), TypeError, "got {'prompt': 'a'}"),
    ("added", lambda llm: llm.add_request([]), ValueError, "1 to 127 tokens .*, got 0"),
    ("streamed", lambda llm: llm.stream([[5], []]), ValueError, "1 to 127 tokens .*, got 0"),
    ("chat", lambda llm: llm.chat([{"role": "user"}]), ValueError, "'content' that is a str, got"),
    (
        "fewer params",
        lambda llm: llm.generate([[5], [6]], [GREEDY]),
        ValueError,
        "2 prompts, but 1 sampling_params",
    ),
    (
        "more params",
        lambda llm: llm.stream([[5]], [GREEDY] * 2),
        ValueError,
        "1 prompts, but 2 sampling_params",
    ),
    (
        "params of another type",
        lambda llm: llm.generate([[5]], {"temperature": 1}),  # type: ignore[arg-type]
        TypeError,
        "sampling_params must be SamplingParams or a list of them, got {'temperature': 1}",
    ),
    (
        "params in a list for one request",
        lambda llm: llm.add_request([5], [GREEDY]),  # type: ignore[arg-type]
        TypeError,
        r"sampling_params must be SamplingParams, got \[Sampl",
    ),
    (
        "temperature",
        params(temperature=-1),
        ValueError,
        "temperature must be .*between 0 and 3.4.*, got -1",
    ),
    ("NaN", params(temperature=float("nan")), ValueError, "temperature must be finite.*got nan"),
    ("max_tokens", params(max_tokens=0), ValueError, "max_tokens must be >= 1, got 0"),
    ("ignore_eos", params(ignore_eos="no"), TypeError, "True or False, got 'no'"),
    ("top_k", params(top_k=-2), ValueError, "top_k must be >= -1, got -2"),
    ("top_p 0", params(top_p=0.0), ValueError, "top_p must be more than 0 .* 1, got 0.0"),
    ("top_p 2", params(top_p=2), ValueError, "top_p must be .* between 0 and 1, got 2"),
    ("min_p", params(min_p=1.5), ValueError, "min_p must be .* between 0 and 1, got 1.5"),
    ("seed", params(seed=2**64), ValueError, f"seed must be between .* got {2**64}"),
    ("seed type", params(seed="a"), TypeError, "seed must be an int, got 'a'"),
    ("stop", params(stop=""), ValueError, "at least one character, got ''"),
    ("stop type", params(stop=[5]), TypeError, "got 5 in it"),
    ("stop id", params(stop_token_ids=[512]), ValueError, "stop token id 512 .* 0 to 511"),
    ("stop id type", params(stop_token_ids=["a"]), TypeError, "stop_token_ids must be an int, got"),
    ("logprobs", params(logprobs=21), ValueError, "logprobs must be between 0 and 20, got 21"),
    ("unknown", params(best_of=2), TypeError, "best_of"),
    (
        "abort of no id",
        lambda llm: llm.abort_request("7"),  # type: ignore[arg-type]
        TypeError,
        "seq_id must be an int, got '7'",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS]
)
def test_a_bad_request_is_refused_and_the_next_is_answered(
    call: Callable[[LLM], Any], error: type[Exception], message: str, llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        call(llm)
    assert_unharmed(llm)


def test_a_bad_request_leaves_those_under_way_alone(llm: LLM) -> None:
    seq_id = llm.add_request(ask(llm, "introduce yourself"), GREEDY)
    llm.step()
    for _, call, error, _ in REQUESTS:
        with pytest.raises(error):
            call(llm)
    finished = []
    while not llm.is_finished():
        finished += llm.step()[0]
    [(found, token_ids)] = finished
    assert (found, llm.tokenizer.decode(token_ids)) == (seq_id, ANSWER)


# --- engines ---------------------------------------------------------------------------------


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_seqs": 5}, TypeError, "unknown option 'max_seqs'; did you mean 'max_num_seqs'"),
    ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be >= 1, got 0"),
    ({"max_num_seqs": 1.5}, TypeError, "max_num_seqs must be an int, got 1.5"),
    ({"max_num_batched_tokens": -5}, ValueError, "max_num_batched_tokens must be >= 1, got -5"),
    ({"max_model_len": 1}, ValueError, "max_model_len must be >= 2, got 1"),
    ({"max_model_len": "64"}, TypeError, "max_model_len must be an int, got '64'"),
    ({"gpu_memory_utilization": 1.1}, ValueError, "between 0 and 1, got 1.1"),
    ({"enforce_eager": None}, TypeError, "enforce_eager must be True or False, got None"),
    (
        {"tensor_parallel_size": 3},
        ValueError,
        "tensor_parallel_size=3 does not divide .* num_key_value_heads",
    ),
    ({"kvcache_block_size": 24}, ValueError, "a multiple of 16, got 24"),
    ({"num_kvcache_blocks": 0}, ValueError, r"-1 \(derived\) or >= 1, got 0"),
    ({"num_kvcache_blocks": 1}, ValueError, "too small .* max_model_len <= 256 would fit"),
    ({"eos": 512}, ValueError, "eos must be between -1 and 511, got 512"),
    ({"device": "tpu"}, ValueError, "device must be 'auto', 'cpu', 'cuda' .*, got 'tpu'"),
    ({"dtype": "int8"}, ValueError, "dtype must be one of .*, got 'int8'"),
    ({"attention_backend": "x"}, ValueError, "attention_backend must be one of .*, got 'x'"),
    ({"attention_backend": "flash_attn"}, ValueError, "'flash_attn' needs CUDA"),
    ({"kv_cache_dtype": "int8"}, ValueError, "kv_cache_dtype must be one of .*, got 'int8'"),
    ({"load_format": "gguf"}, ValueError, "load_format must be one of .*, got 'gguf'"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(r[0]) for r in OPTIONS])
def test_a_bad_option_is_refused_and_other_engines_go_on(
    options: dict[str, Any], error: type[Exception], message: str, llm: LLM
) -> None:
    with pytest.raises(error, match=message):
        LLM(str(TINY), **{"device": "cpu", **options})
    assert_unharmed(llm)


def remove(name: str) -> Callable[[Path], None]:
    return lambda model_dir: (model_dir / name).unlink()


def config(**changes: object) -> Callable[[Path], None]:
    return lambda model_dir: edit_json(model_dir / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model_dir: (model_dir / name).write_bytes(content)


def truncate(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def tensor(name: str, new_name: str | None) -> Callable[[Path], None]:
    """Rename a tensor, or remove it."""

    def change(model_dir: Path) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        taken = tensors.pop(name)
        if new_name is not None:
            tensors[new_name] = taken
        save_file(tensors, model_dir / "model.safetensors")

    return change


NORM = "model.norm.weight"
CHECKPOINTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no directory", shutil.rmtree, "model is no directory, and no Hub repo id either"),
    ("no config.json", remove("config.json"), "no config.json"),
    ("broken config.json", write("config.json", b"{"), "config.json cannot be read"),
    ("a list as config.json", write("config.json", b"[]"), "config.json holds no JSON object"),
    (
        "architecture",
        config(architectures=["MixtralForCausalLM"]),
        "'MixtralForCausalLM' is not supported, only Qwen3ForCausalLM, .* and MistralForCausalLM",
    ),
    ("no size", config(hidden_size=...), "config.json: no hidden_size"),
    ("impossible size", config(num_hidden_layers=0), "num_hidden_layers must be >= 1, got 0"),
    ("heads", config(num_key_value_heads=3), "is no multiple of num_key_value_heads"),
    ("activation", config(hidden_act="gelu"), "'gelu' is not implemented, only 'silu'"),
    ("rope", config(rope_parameters={"rope_type": "dynamic"}), "type 'dynamic' is not implemented"),
    (
        "windows",
        config(use_sliding_window=True, sliding_window=9, layer_types=None, max_window_layers=0),
        "sliding-window attention",
    ),
    (
        "quantisation",
        config(quantization_config={"quant_method": "awq"}),
        r"quantised checkpoints \('awq'\) are not implemented",
    ),
    ("dtype", config(dtype="int8"), "the checkpoint's dtype is 'int8', supported: float32"),
    ("no weights", remove("model.safetensors"), r"model holds no model.safetensors \(or shards"),
    ("truncated weights", truncate, "model.safetensors is missing, truncated or corrupt"),
    ("corrupt weights", write("model.safetensors", b"\xff" * 100), "truncated or corrupt"),
    ("missing tensor", tensor(NORM, None), f"no tensor fills 1 parameters: .*{NORM}"),
    ("unknown tensor", tensor(NORM, "other"), "has no parameter for tensor 'other'"),
    ("broken tokenizer", write("tokenizer.json", b"{"), "the tokenizer cannot be loaded"),
    (
        "broken generation_config.json",
        write("generation_config.json", b"{"),
        "generation_config.json cannot be read",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "message"), [r[1:] for r in CHECKPOINTS], ids=[r[0] for r in CHECKPOINTS]
)
def test_a_bad_checkpoint_is_refused_and_other_engines_go_on(
    spoil: Callable[[Path], object],
    message: str,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
    llm: LLM,
) -> None:
    model_dir = shutil.copytree(checkpoint(ModelSpec(tokenizer=True)), tmp_path / "model")
    spoil(model_dir)
    with pytest.raises(ValueError, match=message):
        LLM(str(model_dir), device="cpu", max_model_len=32)
    assert_unharmed(llm)


def test_a_bad_generation_config_is_refused(text_model: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ["a"]}), encoding="utf-8")
    with pytest.raises(TypeError, match="eos_token_id must be an int, got 'a'"):
        LLM(str(model_dir), device="cpu", max_model_len=32)


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{"), ("generation_config.json", '{"eos_token_id": ["a"]}')],
)
def test_what_is_found_bad_beside_the_model_gives_its_memory_back(
    file: str, content: str, text_model: Path, tmp_path: Path
) -> None:
    model_dir = shutil.copytree(text_model, tmp_path / "model")
    (model_dir / file).write_text(content, encoding="utf-8")
    with mock.patch.object(ModelRunner, "free") as free:
        with pytest.raises((TypeError, ValueError)):
            LLM(str(model_dir), device="cpu", max_model_len=32)
        free.assert_called_once_with()


def test_stop_texts_need_a_tokenizer(tiny_model: Path) -> None:
    with LLM(str(tiny_model), device="cpu", max_model_len=32) as llm:
        for call in (llm.generate, llm.stream, llm.add_request):
            with pytest.raises(ValueError, match=r"no tokenizer, which stop texts need.*'end'"):
                call([5], SamplingParams(stop="end"))
        assert is_idle(llm)
        assert llm.generate([5], SamplingParams(stop_token_ids=[7]), use_tqdm=False)

"""Options and config.json: what is allowed, what it means, what is refused and how."""

import json
import logging
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanovllm import LLM, SamplingParams
from nanovllm import config as config_module
from nanovllm.config import Config
from nanovllm.layers import attention
from nanovllm.layers.attention import select_backend
from nanovllm.model_config import ARCHITECTURES, ModelConfig, Rope, as_token_ids
from nanovllm.utils import memory
from nanovllm.utils.device import multiplies_bfloat16, resolve_device, resolve_dtype

EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 5000,
}

ConfigFactory = Callable[..., Path]


@pytest.fixture
def model_dir(tmp_path: Path) -> ConfigFactory:
    """model_dir(key=value, ...) -> a directory with config.json; ... (Ellipsis) removes a key."""

    def make(**changes: object) -> Path:
        raw = {key: value for key, value in (QWEN3 | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return tmp_path

    return make


def model_config(**changes: object) -> ModelConfig:
    raw = QWEN3 | changes
    return ModelConfig.from_dict({key: value for key, value in raw.items() if value is not ...})


def mentions(*parts: object) -> str:
    """A pattern that finds all of `parts`, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts)


# --- engine options --------------------------------------------------------------------------


def test_defaults_are_those_of_nano_vllm(model_dir: ConfigFactory) -> None:
    config = Config(str(model_dir()))
    assert config.max_num_batched_tokens == 16384
    assert config.max_num_seqs == 512
    assert config.max_model_len == 4096
    assert config.gpu_memory_utilization == 0.95
    assert config.enforce_eager is False
    assert config.kvcache_block_size == 256
    assert config.num_kvcache_blocks == -1
    assert config.eos == -1
    assert config.tensor_parallel_size == 1
    assert config.device == "auto"
    assert config.dtype == "auto"
    assert config.attention_backend == "auto"
    assert config.kv_cache_dtype == "auto"
    assert config.load_format == "auto"


BAD_OPTIONS: list[tuple[str, object, type[Exception], str]] = [
    ("max_num_batched_tokens", 0, ValueError, ">= 1"),
    ("max_num_batched_tokens", -5, ValueError, ">= 1"),
    ("max_num_batched_tokens", 1e4, TypeError, "int"),
    ("max_num_batched_tokens", True, TypeError, "int"),
    ("max_num_seqs", 0, ValueError, ">= 1"),
    ("max_num_seqs", "8", TypeError, "int"),
    ("max_num_seqs", None, TypeError, "int"),
    ("max_model_len", 1, ValueError, ">= 2"),
    ("max_model_len", -1, ValueError, ">= 2"),
    ("max_model_len", 100.0, TypeError, "int"),
    ("gpu_memory_utilization", 1.01, ValueError, "between 0 and 1"),
    ("gpu_memory_utilization", -0.1, ValueError, "between 0 and 1"),
    ("gpu_memory_utilization", float("nan"), ValueError, "between 0 and 1"),
    ("gpu_memory_utilization", float("inf"), ValueError, "between 0 and 1"),
    ("gpu_memory_utilization", "0.9", TypeError, "number"),
    ("gpu_memory_utilization", True, TypeError, "number"),
    ("enforce_eager", 1, TypeError, "True or False"),
    ("enforce_eager", "yes", TypeError, "True or False"),
    ("enforce_eager", None, TypeError, "True or False"),
    ("tensor_parallel_size", 0, ValueError, "1"),
    ("tensor_parallel_size", 2.0, TypeError, "int"),
    ("kvcache_block_size", 0, ValueError, "between 16 and"),
    ("kvcache_block_size", 8, ValueError, "between 16 and"),
    ("kvcache_block_size", 100, ValueError, "multiple of 16"),
    ("kvcache_block_size", 256.0, TypeError, "int"),
    ("num_kvcache_blocks", 0, ValueError, ">= 1"),
    ("num_kvcache_blocks", -2, ValueError, "-1"),
    ("num_kvcache_blocks", None, TypeError, "int"),
    ("eos", -2, ValueError, ">= -1"),
    ("eos", [1, 2], TypeError, "int"),
    ("device", "gpu", ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", "cuda:x", ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", "cuda:", ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", "cuda:00", ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", "cuda:-1", ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", None, ValueError, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("dtype", "float64", ValueError, "'float32', 'float16', 'bfloat16'"),
    ("dtype", torch.float16, ValueError, "'float32', 'float16', 'bfloat16'"),
    ("dtype", None, ValueError, "'float32', 'float16', 'bfloat16'"),
    ("attention_backend", "xformers", ValueError, "'torch'"),
    ("attention_backend", None, ValueError, "'flash_attn'"),
    ("kv_cache_dtype", "fp16", ValueError, "'auto', 'fp8'"),
    ("kv_cache_dtype", None, ValueError, "'auto', 'fp8'"),
    ("load_format", "pt", ValueError, "'auto', 'dummy'"),
    ("load_format", ["dummy"], ValueError, "'auto', 'dummy'"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), BAD_OPTIONS)
def test_a_bad_option_is_refused_with_its_value_and_what_is_allowed(
    name: str, value: object, error: type[Exception], allowed: str, model_dir: ConfigFactory
) -> None:
    shown = value if isinstance(value, (int, float)) else repr(value)
    with pytest.raises(error, match=mentions(name, shown, allowed)):
        LLM(str(model_dir()), **{name: value})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"device": "cpu"}, ["needs CUDA", "'cpu'"]),
        ({"dtype": "float32"}, ["float16 or bfloat16", "'float32'"]),
        ({"kvcache_block_size": 272}, ["multiple of 256", "272"]),
        ({"kv_cache_dtype": "fp8"}, ["cannot read an FP8 cache", "'fp8'"]),
    ],
    ids=str,
)
def test_options_that_contradict_flash_attn_are_refused(
    options: dict[str, Any], parts: list[str], model_dir: ConfigFactory
) -> None:
    with pytest.raises(ValueError, match=mentions("attention_backend='flash_attn'", *parts)):
        LLM(str(model_dir()), attention_backend="flash_attn", **options)


@pytest.mark.parametrize(
    ("option", "suggestion"),
    [
        ("max_model_length", "max_model_len"),
        ("kv_cache_block_size", "kvcache_block_size"),
        ("max_num_seq", "max_num_seqs"),
        ("enforce_eagre", "enforce_eager"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_is_like_it(
    option: str, suggestion: str, model_dir: ConfigFactory
) -> None:
    with pytest.raises(TypeError, match=mentions(repr(option), repr(suggestion))):
        LLM(str(model_dir()), **{option: 1})


def test_an_unknown_option_like_no_other_is_refused_with_all_there_are(
    model_dir: ConfigFactory,
) -> None:
    with pytest.raises(TypeError, match=mentions("'quux'", "max_num_seqs", "load_format")):
        LLM(str(model_dir()), quux=1)


@pytest.mark.parametrize("name", ["model_dir", "model_config"])
def test_what_is_derived_is_no_option(name: str, model_dir: ConfigFactory) -> None:
    with pytest.raises(TypeError, match=name):
        LLM(str(model_dir()), **{name: None})


# --- config.json of transformers 4 and 5 -----------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    ],
    ids=str,
)
def test_rope_theta_is_read_in_both_spellings(keys: dict[str, Any]) -> None:
    assert model_config(**keys).rope == Rope("default", 5e5)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_checkpoints_dtype_is_read_in_both_spellings(key: str, dtype: str) -> None:
    assert model_config(**{key: dtype}).dtype == dtype


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64", "int8"])
def test_a_checkpoint_in_another_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=mentions(dtype, "float32, float16, bfloat16")):
        model_config(torch_dtype=dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_config_json_leaves_out_have_the_defaults_of_transformers(
    architecture: str,
) -> None:
    """And those that are null have what null means there."""
    optional = {"head_dim", "max_position_embeddings", "num_key_value_heads"}
    sizes = {key: value for key, value in QWEN3.items() if key not in optional}
    sizes |= {"architectures": [architecture], "num_attention_heads": 32, "hidden_size": 512}
    for raw in (sizes, sizes | {"sliding_window": None, "eos_token_id": None}):
        config = ModelConfig.from_dict(raw)
        kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
        expected = kind(**raw)
        head_dim = getattr(expected, "head_dim", None) or 512 // 32
        assert config.head_dim == head_dim
        assert config.num_kv_heads == expected.num_key_value_heads
        assert config.max_position_embeddings == expected.max_position_embeddings
        assert config.rms_norm_eps == expected.rms_norm_eps
        rope = getattr(expected, "rope_parameters", None) or {"rope_theta": expected.rope_theta}
        assert config.rope == Rope("default", rope["rope_theta"])
        assert config.tie_word_embeddings == expected.tie_word_embeddings
        assert config.eos_token_ids == as_token_ids(expected.eos_token_id)
        assert config.sliding_window == getattr(expected, "sliding_window", None)
        biases = config.qkv_bias, config.output_bias, config.mlp_bias
        assert biases == (architecture == "Qwen2ForCausalLM", False, False)
        if config.experts is not None:
            _, num_experts, num_chosen, size, renormalized = config.experts
            assert len(config.experts.layers) == config.num_layers
            assert num_experts == expected.num_experts
            assert num_chosen == expected.num_experts_per_tok
            assert (size, renormalized) == (expected.moe_intermediate_size, expected.norm_topk_prob)


def test_heads_that_are_null_are_as_many_as_there_are_query_heads() -> None:
    assert model_config(num_key_value_heads=None).num_kv_heads == QWEN3["num_attention_heads"]


@pytest.mark.parametrize("key", sorted(set(QWEN3) - {"architectures", "max_position_embeddings"}))
def test_a_size_that_is_impossible_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=mentions(key, 0)):
        model_config(**{key: 0})


@pytest.mark.parametrize("value", [-1e-6, 0, float("nan")])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_constant_that_is_impossible_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=mentions(key, value)):
        model_config(**{key: value})


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_size_that_is_missing_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"^no {key}$"):
        model_config(**{key: ...})


def test_query_heads_that_cannot_share_kv_heads_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=mentions("num_key_value_heads", 4, 3)):
        model_config(num_key_value_heads=3)


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=mentions("head_dim", 17)):
        model_config(head_dim=17)


@pytest.mark.parametrize(
    ("eos_token_id", "expected"), [(None, set()), (7, {7}), ([7, 9], {7, 9}), (0, {0})], ids=str
)
def test_eos_token_id_may_be_one_id_or_a_list(
    eos_token_id: int | list[int] | None, expected: set[int]
) -> None:
    assert model_config(eos_token_id=eos_token_id).eos_token_ids == expected


def test_qwen2_has_qkv_biases_and_no_qk_norm() -> None:
    config = model_config(architectures=["Qwen2ForCausalLM"])
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, False)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_qwen3_has_qk_norm_and_biases_where_it_says_so(attention_bias: bool) -> None:
    config = model_config(attention_bias=attention_bias)
    assert config.qk_norm
    assert (config.qkv_bias, config.output_bias) == (attention_bias, attention_bias)


# --- what is not implemented -----------------------------------------------------------------


@pytest.mark.parametrize(
    "architectures",
    [
        ["MixtralForCausalLM"],
        ["Qwen3NextForCausalLM"],
        ["Qwen3VLForConditionalGeneration"],
        [],
        ...,
    ],
    ids=str,
)
def test_another_architecture_is_refused_with_the_supported_ones(
    architectures: object, model_dir: ConfigFactory
) -> None:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    *most, last = ARCHITECTURES
    with pytest.raises(ValueError, match=mentions(repr(name), f"{', '.join(most)} and {last}")):
        LLM(str(model_dir(architectures=architectures)))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD_ROPES: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"type": "dynamic", "factor": 4.0}, ("'dynamic'", "not implemented", "'yarn'")),
    ({"rope_type": "longrope", "factor": 4.0}, ("'longrope'", "not implemented", "'llama3'")),
    ({"rope_type": "mrope"}, ("'mrope'", "not implemented")),
    ({"rope_type": None}, ("None", "not implemented")),
    ({"partial_rotary_factor": 0.5}, ("partial_rotary", "not implemented")),
    ({"rope_type": "linear"}, ("no factor",)),
    ({"rope_type": "linear", "factor": 0.0}, ("factor", "> 0")),
    ({"rope_type": "linear", "factor": "2"}, ("factor", "'2'")),
    (YARN | {"original_max_position_embeddings": -1}, ("original_max_position_embeddings", -1)),
    (YARN | {"beta_fast": -1.0}, ("beta_fast", -1.0)),
    ({"rope_type": "llama3", "factor": 8.0}, ("no low_freq_factor",)),
    (LLAMA3 | {"low_freq_factor": 4.0}, ("low_freq_factor (4)", "below")),
    (YARN | {"rope_theta": 1.0}, ("rope_theta", 1, "yarn")),
    ({"full_attention": YARN}, ("differ by layer", "not implemented")),
]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("rope", "words"), BAD_ROPES, ids=str)
def test_a_rope_that_is_unknown_or_impossible_is_refused(
    key: str, rope: dict[str, Any], words: tuple[object, ...], model_dir: ConfigFactory
) -> None:
    with pytest.raises((TypeError, ValueError), match=mentions(*words)):
        LLM(str(model_dir(**{key: rope})))


@pytest.mark.parametrize(
    ("rope", "max_positions", "length", "factor"),
    [
        (YARN, 5000, 5000, 4.0),
        (YARN, 4000, 4000, 4.0),
        (YARN, 1000, 4000, 4.0),
        (YARN | {"original_max_position_embeddings": None}, 5000, 20000, 4.0),
        (YARN | {"factor": None}, 5000, 5000, 5.0),
        (LLAMA3, 5000, 5000, 8.0),
        ({"type": "linear", "factor": 3, "original_max_position_embeddings": 0.5}, 5000, 5000, 3.0),
    ],
    ids=str,
)
def test_the_longest_sequence_follows_from_the_rope(
    rope: dict[str, Any], max_positions: int, length: int, factor: float
) -> None:
    """transformers 4 knew it as rope_scaling, which wins as it does there."""
    for keys in ({"rope_parameters": rope}, {"rope_scaling": rope, "rope_parameters": {}}):
        config = model_config(max_position_embeddings=max_positions, **keys)
        assert config.max_position_embeddings == length
        assert config.rope.factor == factor


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_the_original_length_beside_the_rope_wins(rope: dict[str, Any]) -> None:
    """As in transformers."""
    keys = {"rope_parameters": rope, "original_max_position_embeddings": 3000}
    config = model_config(**keys)
    assert config.rope.original_length == 3000
    assert config.max_position_embeddings == (12000 if rope is YARN else 5000)


MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        (MISTRAL, 4096),
        (MISTRAL | {"sliding_window": 100}, 100),
        (MISTRAL | {"sliding_window": None}, None),
        (QWEN2 | {"sliding_window": 100, "max_window_layers": 1}, 100),
        (QWEN2 | {"sliding_window": 100, "max_window_layers": 2}, None),
        (QWEN2 | {"sliding_window": 100, "layer_types": ["full_attention"] * 2}, None),
        (QWEN2 | {"sliding_window": 100, "layer_types": ["sliding_attention"] * 2}, 100),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 100}, None),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64),
        # These know no layers without a window.
        (MISTRAL | {"sliding_window": 64, "max_window_layers": 9}, 64),
        (EXPERTS | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9}, 64),
        (
            EXPERTS
            | {"use_sliding_window": True, "sliding_window": 64}
            | {"layer_types": ["full_attention"] * 2},
            64,
        ),
    ],
    ids=str,
)
def test_a_sliding_window_limits_the_length(
    keys: dict[str, Any], window: int | None, model_dir: ConfigFactory
) -> None:
    """Up to it it changes nothing."""
    path = str(model_dir(num_hidden_layers=2, **keys))
    if window is None:
        assert Config(path).max_model_len == 4096
        return
    assert Config(path, max_model_len=window).model_config.sliding_window == window
    with pytest.raises(ValueError, match=mentions("sliding-window", window, window + 1)):
        Config(path, max_model_len=window + 1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer_types": ["sliding_attention"]}, ("sliding_attention", "no window")),
        ({"layer_types": ["linear_attention"]}, ("'linear_attention'", "not implemented")),
        ({"layer_types": "full_attention"}, ("layer_types", "list")),
        (QWEN2 | {"max_window_layers": -1}, ("max_window_layers", -1)),
        (EXPERTS | {"num_experts_per_tok": 5}, ("num_experts_per_tok (5)", "4")),
        (EXPERTS | {"num_experts": 0}, ("num_experts", 0)),
        (EXPERTS | {"num_local_experts": 3, "num_experts_per_tok": 4}, ("(4)", "3")),
        (EXPERTS | {"decoder_sparse_step": 0}, ("decoder_sparse_step", 0)),
        (EXPERTS | {"mlp_only_layers": 1}, ("mlp_only_layers", 1)),
    ],
    ids=str,
)
def test_layers_that_are_unknown_or_impossible_are_refused(
    keys: dict[str, Any], words: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=mentions(*words)):
        model_config(**keys)


def test_which_layers_have_experts() -> None:
    def layers(**keys: object) -> set[int]:
        found = model_config(**EXPERTS, num_hidden_layers=6, **keys).experts
        assert found is not None
        return set(found.layers)

    assert layers() == {0, 1, 2, 3, 4, 5}
    assert layers(decoder_sparse_step=2) == {1, 3, 5}
    assert layers(decoder_sparse_step=2, mlp_only_layers=[0, 3]) == {1, 5}
    assert layers(decoder_sparse_step=7) == set()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": "Qwen3ForCausalLM"}, "must be a list, got 'Qwen3ForCausalLM'"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "['Qwen3ForCausalLM'] is not supported"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object, got 'default'"),
        ({"rope_scaling": ["yarn"]}, "rope_scaling must be an object, got ['yarn']"),
        ({"quantization_config": "awq"}, "quantization_config must be an object, got 'awq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not implemented"),
    ],
    ids=str,
)
def test_a_key_that_cannot_be_read_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config(**keys)


def test_sliding_windows_that_are_off_are_no_matter() -> None:
    layer_types = ["full_attention"] * 2
    model_config(use_sliding_window=False, sliding_window=4096, layer_types=layer_types)


def test_quantised_checkpoints_are_refused(model_dir: ConfigFactory) -> None:
    config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=mentions("gptq", "not implemented")):
        LLM(str(model_dir(quantization_config=config)))


def test_another_activation_is_refused(model_dir: ConfigFactory) -> None:
    with pytest.raises(ValueError, match=mentions("'gelu'", "'silu'")):
        LLM(str(model_dir(hidden_act="gelu")))


# --- lengths and the KV pool -----------------------------------------------------------------


def dummy(model_dir: Path, **options: Any) -> LLM:
    options = {"device": "cpu", "load_format": "dummy", "max_num_seqs": 4} | options
    return LLM(str(model_dir), **options)


def num_blocks(llm: LLM) -> int:
    assert llm.model_runner is not None
    return llm.model_runner.num_blocks


def test_max_model_len_is_cut_to_the_models_with_a_warning(
    model_dir: ConfigFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        config = Config(str(model_dir(max_position_embeddings=1000)), max_model_len=2000)
    assert config.max_model_len == 1000
    [warning] = caplog.records
    assert warning.name == "nanovllm"
    assert re.search(mentions("max_model_len", 2000, 1000), warning.getMessage())


def test_max_model_len_of_the_models_own_length_gives_no_warning(
    model_dir: ConfigFactory, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(str(model_dir(max_position_embeddings=1000)), max_model_len=1000)
    assert config.max_model_len == 1000
    assert not caplog.records


def test_a_pool_too_small_for_one_sequence_is_refused_with_what_would_fit(
    model_dir: ConfigFactory,
) -> None:
    expected = mentions("3 blocks of 16", "max_model_len=49", "4 blocks", "max_model_len <= 48")
    with pytest.raises(ValueError, match=expected):
        dummy(model_dir(), max_model_len=49, kvcache_block_size=16, num_kvcache_blocks=3)


def test_a_pool_just_large_enough_for_one_sequence_is_taken(model_dir: ConfigFactory) -> None:
    options = {"max_model_len": 48, "kvcache_block_size": 16, "num_kvcache_blocks": 3}
    with dummy(model_dir(), **options) as llm:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        [output] = llm.generate([[1] * 20], params, use_tqdm=False)
        assert len(output["token_ids"]) == 28


def test_on_a_cpu_the_pool_is_what_the_largest_batch_needs(model_dir: ConfigFactory) -> None:
    with dummy(model_dir(), max_model_len=100, max_num_seqs=5, kvcache_block_size=16) as llm:
        assert num_blocks(llm) == 5 * 7
        assert llm.model_runner is not None
        assert list(llm.model_runner.kv_cache.shape) == [2, 2, 35, 16, 2, 16]


def test_on_a_cpu_the_pool_is_at_most_a_quarter_of_the_free_memory(
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4  # K and V, layers, positions, heads, head_dim, float32
    monkeypatch.setattr(memory, "free_cpu_memory", lambda: 4 * (20 * block_bytes) + 3)
    with dummy(model_dir(), max_model_len=100, max_num_seqs=5, kvcache_block_size=16) as llm:
        assert num_blocks(llm) == 20


def test_on_a_cpu_the_pool_is_at_most_4_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one sequence, which may take half of what is free."""
    monkeypatch.setattr(memory, "free_cpu_memory", lambda: 1 << 40)
    assert memory.cpu_pool_budget(least=4 << 30) == 4 << 30
    assert memory.cpu_pool_budget(least=5 << 30) == 5 << 30
    monkeypatch.setattr(memory, "free_cpu_memory", lambda: 8 << 30)
    assert memory.cpu_pool_budget(least=1 << 30) == 2 << 30
    assert memory.cpu_pool_budget(least=5 << 30) == 4 << 30


def test_too_little_free_memory_for_one_sequence_is_refused_with_what_would_fit(
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    monkeypatch.setattr(memory, "free_cpu_memory", lambda: 2 * (6 * block_bytes))
    expected = mentions("6 blocks of 16", "max_model_len=100", "7 blocks", "max_model_len <= 96")
    with pytest.raises(ValueError, match=expected):
        dummy(model_dir(), max_model_len=100, kvcache_block_size=16)


def test_the_free_memory_is_some_gibibytes_at_least() -> None:
    assert memory.free_cpu_memory() > 1 << 28


@pytest.mark.parametrize(
    ("pages", "expected"), [({"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}, 12288), ({}, 16 << 30)]
)
def test_the_free_memory_where_there_is_no_proc(
    pages: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the C library knows; or else enough for the largest pool."""

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr(memory, "open", refuse, raising=False)
    monkeypatch.setattr(memory.os, "sysconf", sysconf)
    assert memory.free_cpu_memory() == expected


def make_cgroup(root: Path, group: str, **files: object) -> None:
    directory = root / group
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n", encoding="ascii")


@pytest.mark.parametrize("is_v2", [True, False], ids=["v2", "v1"])
def test_the_limits_of_control_groups_count_less_what_is_used_of_them(
    is_v2: bool, tmp_path: Path
) -> None:
    """Files in the cache can be dropped. The groups around a group limit it too."""
    root, proc = tmp_path / "cgroup", tmp_path / "self"
    if is_v2:
        proc.write_text("0::/outer/inner\n", encoding="ascii")
        stat = "anon 5\ninactive_file 30"
        make_cgroup(root, "outer/inner", memory__max="max", memory__current=70, memory__stat=stat)
        make_cgroup(root, "outer", memory__max=1000, memory__current=700, memory__stat=stat)
    else:
        proc.write_text("5:devices:/x\n4:cpu,memory:/outer/inner\n0::/\n", encoding="ascii")
        stat = "cache 9\ntotal_inactive_file 30"
        files = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 700}
        make_cgroup(root / "memory", "outer", **files, memory__stat=stat)
    assert memory._cgroup_rooms(proc, root) == [330]


@pytest.mark.parametrize("left_out", ["memory__stat", "memory__current"])
def test_a_limit_counts_though_its_use_cannot_be_told(left_out: str, tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "self"
    proc.write_bytes("0::/gr\u00fcn".encode() + b"\xff\n")
    files = {"memory__max": 1000, "memory__current": 700, "memory__stat": "inactive_file 30"}
    make_cgroup(root, "", **{name: files[name] for name in files if name != left_out})
    assert memory._cgroup_rooms(proc, root) == [300 if left_out == "memory__stat" else 1000]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory._cgroup_rooms(tmp_path / "none", tmp_path) == []


def test_the_pool_keeps_to_the_limit_of_a_container(
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_cgroup_rooms", lambda: [4 << 20])
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    with dummy(model_dir(), max_model_len=100, kvcache_block_size=16, max_num_seqs=64) as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.num_blocks == (1 << 20) // block_bytes


@pytest.mark.parametrize("option", ["num_kvcache_blocks", "max_num_seqs"])
def test_an_option_that_asks_for_more_memory_than_there_is_is_refused(
    option: str, model_dir: ConfigFactory
) -> None:
    with pytest.raises(ValueError, match=mentions(f"{option}={10**11}", "free", "would fit")):
        dummy(model_dir(), **{option: 10**11})


def test_an_allocation_that_fails_names_the_options(
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_cpu_memory", lambda: 1 << 60)
    with pytest.raises(ValueError, match=mentions("num_kvcache_blocks", "max_num_seqs")):
        dummy(model_dir(), num_kvcache_blocks=10**12)


def test_a_step_that_finds_no_memory_names_the_options(
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dummy(model_dir(), max_model_len=100) as llm:
        assert llm.model_runner is not None
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        with monkeypatch.context() as patch:
            patch.setattr(llm.model_runner, "_launch_prefill", raising(error))
            with pytest.raises(MemoryError, match=mentions("3 tokens", "max_num_batched_tokens")):
                llm.generate([[1, 2, 3]], use_tqdm=False)
        assert len(llm.generate([[1, 2, 3]], use_tqdm=False)) == 1


@pytest.mark.parametrize("kind", [ValueError, MemoryError])
def test_an_error_that_only_speaks_of_memory_stays_as_it_is(kind: type[Exception]) -> None:
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=message), memory.memory_for("x", "y", kind):
        raise RuntimeError(message)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("index", ["9" * 25, "1000"])
def test_a_gpu_that_cannot_be_is_refused(index: str, model_dir: ConfigFactory) -> None:
    with pytest.raises(ValueError, match=f"cuda:{index}"):
        dummy(model_dir(), device=f"cuda:{index}")


def test_the_size_of_the_pool_is_logged_at_start_up(
    model_dir: ConfigFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        dummy(model_dir(), max_model_len=100, max_num_seqs=5, kvcache_block_size=16).exit()
    messages = [record.getMessage() for record in caplog.records if record.name == "nanovllm"]
    assert any("35 blocks of 16 tokens = 560 tokens" in message for message in messages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no CUDA GPU")
def test_cuda_without_a_gpu_is_refused(model_dir: ConfigFactory) -> None:
    with pytest.raises(ValueError, match=mentions("device='cuda'", "no CUDA GPU")):
        dummy(model_dir(), device="cuda")


@pytest.fixture
def two_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of GPUs before sm_80; the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))


@pytest.mark.usefixtures("two_old_gpus")
@pytest.mark.parametrize(
    ("option", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")]
)
def test_with_gpus_the_device_is_the_current_one_unless_asked_for_another(
    option: str, expected: str
) -> None:
    assert resolve_device(option) == torch.device(expected)


@pytest.mark.usefixtures("two_old_gpus")
def test_a_gpu_that_there_is_not_is_refused(model_dir: ConfigFactory) -> None:
    with pytest.raises(ValueError, match=mentions("device='cuda:2'", "2 GPUs")):
        dummy(model_dir(), device="cuda:2")


@pytest.mark.usefixtures("two_old_gpus")
@pytest.mark.parametrize(
    ("checkpoint", "is_old", "expected"),
    [
        ("bfloat16", True, torch.float16),
        ("bfloat16", False, torch.bfloat16),
        ("float16", True, torch.float16),
        ("float32", True, torch.float32),
    ],
)
def test_on_a_gpu_the_dtype_is_the_checkpoints_but_for_bfloat16_where_there_is_none(
    checkpoint: str, is_old: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_old:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert resolve_dtype("auto", checkpoint, torch.device("cuda", 1)) is expected


@pytest.mark.usefixtures("two_old_gpus")
@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "reason"),
    [
        ("flash_attn", torch.float32, 64, "the dtype is torch.float32, not float16 or bfloat16"),
        ("flash_attn", torch.float16, 64, "the GPU is older than sm_80"),
        ("flash_attn", torch.float16, 60, "head_dim 60 is no multiple of 8"),
        ("triton", torch.float32, 64, "the dtype is torch.float32, not float16 or bfloat16"),
        ("triton", torch.float16, 64, "the package triton is not installed"),
        ("triton", torch.float16, 24, "head_dim 24 is no multiple of 16 from 32"),
    ],
)
def test_a_back_end_that_a_gpu_cannot_run_is_refused_with_the_reason(
    backend: str, dtype: torch.dtype, head_dim: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=mentions(repr(backend), reason)):
        select_backend(backend, torch.device("cuda", 1), dtype, 256, head_dim)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), {"triton", "flash_attn"}, "triton"),
        ((9, 0), {"flash_attn"}, "flash_attn"),
        ((9, 0), set(), "torch"),
        ((7, 5), {"flash_attn"}, "torch"),
        ((7, 5), {"triton", "flash_attn"}, "triton"),
    ],
)
def test_auto_takes_the_fastest_back_end_that_a_gpu_can_run(
    capability: tuple[int, int],
    installed: set[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "find_spec", lambda name: name in installed or None)
    device = torch.device("cuda", 0)
    assert select_backend("auto", device, torch.float16, 256, head_dim=64) == expected
    assert select_backend(expected, device, torch.float16, 256, head_dim=64) == expected


@pytest.mark.parametrize(
    ("option", "checkpoint", "has_bfloat16", "expected"),
    [
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("auto", "float16", True, torch.float32),
        ("auto", "float32", True, torch.float32),
        ("float32", "bfloat16", True, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
        ("float16", "bfloat16", True, torch.float16),
    ],
)
def test_on_a_cpu_the_dtype_is_bfloat16_where_both_checkpoint_and_processor_have_it(
    option: str, checkpoint: str, has_bfloat16: bool, expected: torch.dtype,
    model_dir: ConfigFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = {"avx512_bf16": has_bfloat16, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    caplog.set_level(logging.INFO, logger="nanovllm")
    with dummy(model_dir(torch_dtype=checkpoint), dtype=option, max_model_len=32) as llm:
        assert llm.model_runner is not None
        assert {p.dtype for p in llm.model_runner.model.parameters()} == {expected}
        assert llm.model_runner.kv_cache.dtype == expected
    says_why = "this processor" in caplog.text or "the checkpoint's is" in caplog.text
    assert says_why == (option == "auto")


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_bfloat16_is_not_chosen_where_onednn_does_not_multiply_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ONEDNN_MAX_CPU_ISA=AVX2, or where the caller has turned it off."""
    found = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    for supported, enabled in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda s=supported: s)
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert multiplies_bfloat16() == (supported and enabled)


def test_every_back_end_is_an_option() -> None:
    assert set(config_module.ATTENTION_BACKENDS) == set(attention.BACKENDS)


@pytest.mark.usefixtures("two_old_gpus")
@pytest.mark.parametrize("backend", ["flash_attn", "triton"])
def test_the_largest_head_dim_is_256(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    case = torch.device("cuda", 1), torch.float16, 256
    assert select_backend(backend, *case, head_dim=256) == backend
    with pytest.raises(ValueError, match="head_dim 272"):
        select_backend(backend, *case, head_dim=272)


def test_only_pytorchs_attention_loops_on_the_host() -> None:
    assert [name for name, b in attention.BACKENDS.items() if b.loops_on_host] == ["torch"]


@pytest.mark.parametrize("has_bias", [False, True])
def test_qwen2_has_biases_on_q_k_and_v_alone(has_bias: bool) -> None:
    """Whatever attention_bias says."""
    config = model_config(architectures=["Qwen2ForCausalLM"], attention_bias=has_bias)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, False)


@pytest.mark.parametrize("num_rows", [1, 4097])
def test_a_copy_in_large_pages(num_rows: int) -> None:
    """Contiguous, on the CPU whatever the default device, and where it is large, so asked for."""
    x = torch.randn(513, num_rows, dtype=torch.bfloat16).T
    with torch.device("meta"):
        copy = memory.in_large_pages(x)
    assert copy.is_contiguous()
    assert torch.equal(copy, x)
    assert is_in_large_pages(copy) == (num_rows > 1 and hasattr(mmap, "MADV_HUGEPAGE"))


def test_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # refused, as there
    x = torch.randn(1024, 1024)
    copy = memory.in_large_pages(x)
    assert torch.equal(copy, x)
    assert copy.data_ptr() != x.data_ptr()
    assert not is_in_large_pages(copy)


def is_in_large_pages(x: torch.Tensor) -> bool:
    """If the kernel was asked for them, by the flags of the mapping that x lies in."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        return False
    within = False
    for line in maps.read_text(errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(found[1], 16) <= x.data_ptr() < int(found[2], 16)
        elif within and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False

"""Config: every engine option, validated once. ModelConfig: the sizes that config.json gives."""

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nanovllm.sampling_params import require_bool, require_float, require_int

logger = logging.getLogger("nanovllm")

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM")
DTYPES = ("float32", "float16", "bfloat16")
ATTENTION_BACKENDS = ("torch", "flash_attn", "triton")
BLOCK_SIZE_STEP = 16


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a dense Qwen3 or Qwen2 model, from a config.json of transformers 4 or 5."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: frozenset[int]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the keys of config.json; what they leave out has transformers' default.

        Raises:
            ValueError: an architecture, or a feature of one, that is not implemented; a missing
                or impossible size.
        """
        architectures = raw.get("architectures") or [None]
        if not isinstance(architectures, list):
            raise ValueError(f"config.json: architectures must be a list, got {architectures!r}")
        if architectures[0] not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"architecture {architectures[0]!r} is not supported, only "
                f"{' and '.join(SUPPORTED_ARCHITECTURES)}"
            )
        _refuse_unimplemented(raw)
        is_qwen3 = architectures[0] == "Qwen3ForCausalLM"
        num_heads = _size(raw, "num_attention_heads")
        num_kv_heads = _size(raw, "num_key_value_heads", default=num_heads)
        hidden_size = _size(raw, "hidden_size")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({num_heads}) is no multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        head_dim = _size(raw, "head_dim", default=128 if is_qwen3 else hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
        rope = raw.get("rope_parameters") or {}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise ValueError(f"the checkpoint's dtype is {dtype!r}, supported: {', '.join(DTYPES)}")
        return cls(
            architecture=architectures[0],
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(raw, "intermediate_size"),
            num_layers=_size(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_size(raw, "max_position_embeddings", default=32768),
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
            rope_theta=_positive(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("attention_bias", False)) if is_qwen3 else True,
            output_bias=bool(raw.get("attention_bias", False)) if is_qwen3 else False,
            qk_norm=is_qwen3,
            dtype=dtype,
            eos_token_ids=as_token_ids(raw.get("eos_token_id")),
        )


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json has no {key}")
    require_int(f"config.json: {key}", value, low=1)
    return int(value)


def _positive(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    require_float(f"config.json: {key}", value, low=0.0)
    if value == 0:
        raise ValueError(f"config.json: {key} must be > 0, got {value}")
    return float(value)


def _refuse_unimplemented(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for a feature that would change the results if it were ignored."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"activation {raw['hidden_act']!r} is not implemented, only 'silu'")
    if raw.get("partial_rotary_factor", 1) != 1:
        raise ValueError("a partial_rotary_factor is not implemented")
    for key in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"config.json: {key} must be an object, got {raw[key]!r}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope scaling of type {kind!r} ({key}) is not implemented")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"a partial_rotary_factor ({key}) is not implemented")
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("sliding-window attention (use_sliding_window) is not implemented")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"quantised checkpoints ({method!r}) are not implemented")


def as_token_ids(value: int | list[int] | None) -> frozenset[int]:
    """The ids of an `eos_token_id` entry, which may be absent, one id or a list.

    Raises:
        TypeError, ValueError: an entry of another kind.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        require_int("eos_token_id", token_id, low=0)
    return frozenset(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, no JSON, or no object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no model directory: it has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    return raw


@dataclass(slots=True)
class Config:
    """The options of one engine, named and defaulted as in nano-vllm, and what they resolve to.

    Args:
        model: a local directory with config.json and safetensors, or a Hub repo id.
        max_num_batched_tokens: most tokens in one prefill step; longer prompts go in chunks.
        max_num_seqs: most sequences that run at a time.
        max_model_len: most tokens of prompt and completion together; cut to the model's
            max_position_embeddings.
        gpu_memory_utilization: share of the GPU's memory that this engine may take, KV pool
            included. Not used on a CPU.
        enforce_eager: run every step kernel by kernel (no CUDA graphs).
        tensor_parallel_size: only 1 is implemented.
        kvcache_block_size: token positions in a KV block, a multiple of 16 (of 256 for flash_attn).
        num_kvcache_blocks: size of the KV pool; -1: as much as the memory allows.
        eos: the one id that ends a sequence; -1: those of the tokenizer, config.json and
            generation_config.json.
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "float16", "bfloat16".
        attention_backend: "auto" (the fastest one installed), "torch", "flash_attn" or "triton".
        load_format: "auto" (safetensors) or "dummy" (random weights, no checkpoint read).

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, options that
            contradict one another, or a model that is not supported.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.95
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    eos: int = -1
    device: str = "auto"
    dtype: str = "auto"
    attention_backend: str = "auto"
    load_format: str = "auto"
    model_dir: Path = field(init=False)
    model_config: ModelConfig = field(init=False)

    @classmethod
    def from_options(cls, model: str, options: Mapping[str, Any]) -> "Config":
        """Config(model, **options), with an error that names an unknown option and its like."""
        known = [entry.name for entry in fields(cls) if entry.init and entry.name != "model"]
        for name in options:
            if name not in known:
                like = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {like[0]!r}?" if like else f"; known: {', '.join(known)}"
                raise TypeError(f"unknown option {name!r}{hint}")
        return cls(model, **options)

    def __post_init__(self) -> None:
        self._check_options()
        self._check_combinations()
        # Here, since it pulls in the Hub client, which no bad option should have to wait for.
        from nanovllm.utils.loader import resolve_model_dir

        self.model_dir = resolve_model_dir(self.model, with_weights=self.load_format != "dummy")
        self.model_config = ModelConfig.from_dict(read_json(self.model_dir / "config.json"))
        require_int("eos", self.eos, low=-1, high=self.model_config.vocab_size - 1)
        limit = self.model_config.max_position_embeddings
        if self.max_model_len > limit:
            logger.warning("max_model_len %d cut to the model's %d", self.max_model_len, limit)
            self.max_model_len = limit
        self._check_pool()

    def _check_options(self) -> None:
        require_int("max_num_batched_tokens", self.max_num_batched_tokens, low=1)
        require_int("max_num_seqs", self.max_num_seqs, low=1)
        require_int("max_model_len", self.max_model_len, low=2)
        require_float("gpu_memory_utilization", self.gpu_memory_utilization, low=0.0, high=1.0)
        require_bool("enforce_eager", self.enforce_eager)
        require_int("tensor_parallel_size", self.tensor_parallel_size, low=1, high=1)
        require_int("kvcache_block_size", self.kvcache_block_size, low=BLOCK_SIZE_STEP)
        if self.kvcache_block_size % BLOCK_SIZE_STEP:
            raise ValueError(
                f"kvcache_block_size must be a multiple of {BLOCK_SIZE_STEP}, "
                f"got {self.kvcache_block_size}"
            )
        require_int("num_kvcache_blocks", self.num_kvcache_blocks, low=-1)
        if self.num_kvcache_blocks == 0:
            raise ValueError("num_kvcache_blocks must be -1 (derived) or >= 1, got 0")
        require_int("eos", self.eos, low=-1)
        if not isinstance(self.device, str) or not _is_device(self.device):
            raise ValueError(
                f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}"
            )
        _require_choice("dtype", self.dtype, ("auto", *DTYPES))
        _require_choice("attention_backend", self.attention_backend, ("auto", *ATTENTION_BACKENDS))
        _require_choice("load_format", self.load_format, ("auto", "dummy"))

    def _check_combinations(self) -> None:
        if self.attention_backend == "flash_attn":
            if self.device == "cpu":
                raise ValueError("attention_backend='flash_attn' needs CUDA, got device='cpu'")
            if self.dtype == "float32":
                raise ValueError(
                    "attention_backend='flash_attn' needs float16 or bfloat16, got dtype='float32'"
                )
            if self.kvcache_block_size % 256:
                raise ValueError(
                    "attention_backend='flash_attn' needs a kvcache_block_size that is a multiple "
                    f"of 256, got {self.kvcache_block_size}"
                )

    def _check_pool(self) -> None:
        if self.num_kvcache_blocks != -1:
            check_pool_size(self.num_kvcache_blocks, self.kvcache_block_size, self.max_model_len)


def check_pool_size(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Raise ValueError if a pool of `num_blocks` cannot hold one sequence of `max_model_len`."""
    if num_blocks * block_size < max_model_len:
        raise ValueError(
            f"a KV pool of {num_blocks} blocks of {block_size} tokens is too small for one "
            f"sequence of max_model_len={max_model_len}: that takes "
            f"{-(-max_model_len // block_size)} blocks; max_model_len <= {num_blocks * block_size} "
            "would fit"
        )


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _is_device(name: str) -> bool:
    kind, colon, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (
        kind == "cuda" and bool(colon) and index.isascii() and index.isdigit()
    )

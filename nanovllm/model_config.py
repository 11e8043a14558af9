"""ModelConfig: the sizes and the variants that a checkpoint's config.json gives."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.sampling_params import require_float, require_int

DTYPES = ("float32", "float16", "bfloat16")


class Architecture(NamedTuple):
    """What a class of transformers says of its checkpoints, beside their sizes.

    qk_norm: each head of q and k is normed. qkv_bias, output_bias: of the attention's projections;
    None: as config.json's attention_bias says. head_dim: where config.json has none; None:
    hidden_size / num_attention_heads.
    """

    qk_norm: bool
    qkv_bias: bool | None
    output_bias: bool | None
    head_dim: int | None


ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture(True, qkv_bias=None, output_bias=None, head_dim=128),
    "Qwen2ForCausalLM": Architecture(False, qkv_bias=True, output_bias=False, head_dim=None),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model and what it has, from a config.json of transformers 4 or 5."""

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
        name = _architecture_name(raw)
        architecture = ARCHITECTURES[name]
        _refuse_unimplemented(raw)
        num_heads = _size(raw, "num_attention_heads")
        num_kv_heads = _size(raw, "num_key_value_heads", default=num_heads)
        hidden_size = _size(raw, "hidden_size")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({num_heads}) is no multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        head_dim = _size(raw, "head_dim", architecture.head_dim or hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
        rope = raw.get("rope_parameters") or {}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise ValueError(f"the checkpoint's dtype is {dtype!r}, supported: {', '.join(DTYPES)}")
        has_bias = bool(raw.get("attention_bias", False))
        qkv_bias, output_bias = architecture.qkv_bias, architecture.output_bias
        return cls(
            architecture=name,
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
            qkv_bias=has_bias if qkv_bias is None else qkv_bias,
            output_bias=has_bias if output_bias is None else output_bias,
            qk_norm=architecture.qk_norm,
            dtype=dtype,
            eos_token_ids=as_token_ids(raw.get("eos_token_id")),
        )

    def differences(self, other: "ModelConfig") -> list[str]:
        """What keeps the weights of another configuration from fitting this one's model."""
        told_apart = {field.name for field in fields(self)} - {
            "dtype", "eos_token_ids", "max_position_embeddings",
        }  # fmt: skip
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in told_apart}
        return [f"{name} {a!r}, not {b!r}" for name, (a, b) in sorted(pairs.items()) if a != b]


def _architecture_name(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or [None]
    if not isinstance(names, list):
        raise ValueError(f"config.json: architectures must be a list, got {names!r}")
    if names[0] not in list(ARCHITECTURES):
        raise ValueError(
            f"architecture {names[0]!r} is not supported, only {' and '.join(ARCHITECTURES)}"
        )
    return str(names[0])


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


LFS_ADVICE = "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from"


def is_lfs_pointer(path: Path) -> bool:
    """True for what git puts in the place of a large file until it is fetched."""
    start = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(start)) == start


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
        if path.is_file() and is_lfs_pointer(path):
            raise ValueError(f"{path} {LFS_ADVICE}") from None
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    return raw

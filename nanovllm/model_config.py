"""ModelConfig: the sizes and the variants that a checkpoint's config.json gives."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.sampling_params import require_float, require_int

DTYPES = ("float32", "float16", "bfloat16")


class Architecture(NamedTuple):
    """What a class of transformers says of its checkpoints, beside their sizes.

    qkv_bias, output_bias: of the attention's projections. mlp_bias: of the MLP's. has_window: some
    layer attends to the last `sliding_window` positions only. Of these four each is known, or the
    key of config.json that says it. qk_norm: each head of q and k is normed. has_experts: MLPs are
    mixtures of experts. defaults: of what config.json may leave out.
    """

    defaults: dict[str, Any]
    qk_norm: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    has_window: bool | str = False
    has_experts: bool = False


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 32}
_QWEN_DENSE = {**_QWEN, "max_window_layers": 28}
_LLAMA = {"max_position_embeddings": 2048, "eos_token_id": 2}
_MISTRAL = {
    "max_position_embeddings": 131072, "eos_token_id": 2, "sliding_window": 4096,
    "num_key_value_heads": 8,
}  # fmt: skip
_QWEN_MOE = {
    "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "intermediate_size": 6144,
}  # fmt: skip

ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture(
        {**_QWEN_DENSE, "head_dim": 128},
        qk_norm=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_window="use_sliding_window",
    ),
    "Qwen3MoeForCausalLM": Architecture(
        {**_QWEN, **_QWEN_MOE},
        qk_norm=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_window="use_sliding_window",
        has_experts=True,
    ),
    "Qwen2ForCausalLM": Architecture(_QWEN_DENSE, qkv_bias=True, has_window="use_sliding_window"),
    "LlamaForCausalLM": Architecture(
        _LLAMA, qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "MistralForCausalLM": Architecture(_MISTRAL, has_window=True),
}


class Rope(NamedTuple):
    """How rotary embedding turns pairs of a head's elements: see layers.rotary_embedding.

    kind: of scaling. theta: the base. factor: how many times as long sequences become. The rest is
    for kinds that scale slowly turning pairs only: original_length: of the sequences before.
    slow_turns, fast_turns: pairs that turn less often over it are scaled whole, more often not at
    all. truncate: the borders between pairs are rounded outwards. attention_factor: cos and sin
    are multiplied by it.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_length: int = 0
    slow_turns: float = 0.0
    fast_turns: float = 0.0
    truncate: bool = True
    attention_factor: float = 1.0


class Experts(NamedTuple):
    """A mixture of experts: which layers have one, and its shape.

    layers: by index. num_chosen: of num_experts, for each token. intermediate_size: of an expert's
    MLP. renormalized: the weights of those chosen add up to 1.
    """

    layers: frozenset[int]
    num_experts: int
    num_chosen: int
    intermediate_size: int
    renormalized: bool


class Quantization(NamedTuple):
    """How the weights of the layers' matrix products are stored, but for routers.

    method: "fp8", see utils.quantization, or "int4", see layers.int4, which the head has too. kept:
    modules whose weights stay as they are. is_stored: the checkpoint holds FP8 weights; else they
    are quantised while they are loaded.
    """

    method: str
    kept: tuple[str, ...] = ()
    is_stored: bool = False

    @property
    def quantizes_head(self) -> bool:
        return self.method == "int4" and not self.keeps("lm_head")

    def __str__(self) -> str:
        how = "as stored" if self.is_stored else "while loading"
        kept = ", ".join(self.kept[:3]) + (", ..." if len(self.kept) > 3 else "")
        return f"{self.method} {how}" + (f" but for {kept}" if kept else "")

    def keeps(self, name: str) -> bool:
        """True if a module's weights stay as they are."""
        return any(
            name == kept or name.startswith(f"{kept}.") or name.endswith(kept) for kept in self.kept
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model and what it has, from a config.json of transformers 4 or 5.

    max_position_embeddings: the longest sequence. sliding_window: the fewest positions that some
    layer attends to, if it is not to all; sequences no longer than that are computed rightly.
    """

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
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    experts: Experts | None
    dtype: str
    eos_token_ids: frozenset[int]
    quantization: Quantization | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the keys of config.json; what they leave out has transformers' default.

        Raises:
            ValueError: an architecture, or a feature of one, that is not implemented; a missing
                or impossible size.
        """
        name = _architecture_name(raw)
        architecture = ARCHITECTURES[name]
        raw = {**architecture.defaults, **raw}
        _refuse_unimplemented(raw)
        num_heads = _size(raw, "num_attention_heads")
        num_kv_heads = _size(raw, "num_key_value_heads", default=num_heads)
        num_layers = _size(raw, "num_hidden_layers")
        hidden_size = _size(raw, "hidden_size")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({num_heads}) is no multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        head_dim = _size(raw, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise ValueError(f"the checkpoint's dtype is {dtype!r}, supported: {', '.join(DTYPES)}")
        length = _size(raw, "max_position_embeddings")
        rope = _rope(raw, length)
        if rope.kind == "yarn":
            length = max(length, int(rope.original_length * rope.factor))

        def says(key: bool | str) -> bool:
            return bool(raw.get(key, False)) if isinstance(key, str) else key

        has_window = says(architecture.has_window) and raw.get("sliding_window") is not None
        if not has_window and "sliding_attention" in (raw.get("layer_types") or []):
            raise ValueError("layer_types names sliding_attention, with no window")
        is_for_some = "max_window_layers" in architecture.defaults
        slides = has_window and (not is_for_some or _has_sliding_layers(raw, num_layers))
        return cls(
            architecture=name,
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=length,
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=says(architecture.qkv_bias),
            output_bias=says(architecture.output_bias),
            mlp_bias=says(architecture.mlp_bias),
            qk_norm=architecture.qk_norm,
            sliding_window=_size(raw, "sliding_window") if slides else None,
            experts=_experts(raw, num_layers) if architecture.has_experts else None,
            dtype=dtype,
            eos_token_ids=as_token_ids(raw.get("eos_token_id")),
            quantization=_quantization(raw),
        )

    @property
    def is_int4(self) -> bool:
        """True if the weights become int4."""
        return self.quantization is not None and self.quantization.method == "int4"

    def quantized(self, method: str) -> "ModelConfig":
        """The same model, its weights quantised; "auto": as the checkpoint has them."""
        if method in ("auto", None if self.quantization is None else self.quantization.method):
            return self
        if (found := self.quantization) is not None:
            return replace(self, quantization=found._replace(method=method))
        return replace(self, quantization=Quantization(method))

    def split(self, num_ranks: int) -> "ModelConfig":
        """The sizes of one rank's part of the model: of its heads, its MLP and its vocabulary.

        Of fewer K/V heads than ranks each stands on several.

        Raises:
            ValueError: a size that the number of ranks does not divide.
        """
        if num_ranks == 1:
            return self

        def part(key: str, size: int) -> int:
            if size % num_ranks:
                raise ValueError(
                    f"tensor_parallel_size={num_ranks} does not divide the model's {key} ({size})"
                )
            return size // num_ranks

        is_shared = num_ranks % self.num_kv_heads == 0
        num_kv_heads = 1 if is_shared else part("num_key_value_heads", self.num_kv_heads)
        experts = self.experts
        if experts is not None:
            size = part("moe_intermediate_size", experts.intermediate_size)
            experts = experts._replace(intermediate_size=size)
        has_mlp = experts is None or len(experts.layers) < self.num_layers
        return replace(
            self,
            vocab_size=part("vocab_size", self.vocab_size),
            num_heads=part("num_attention_heads", self.num_heads),
            num_kv_heads=num_kv_heads,
            intermediate_size=part("intermediate_size", self.intermediate_size)
            if has_mlp
            else self.intermediate_size,
            experts=experts,
        )

    def differences(self, other: "ModelConfig") -> list[str]:
        """What keeps the weights of another configuration from fitting this one's model."""
        told_apart = {field.name for field in fields(self)} - {
            "dtype", "eos_token_ids", "max_position_embeddings",
        }  # fmt: skip
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in told_apart}
        return [f"{name} {a}, not {b}" for name, (a, b) in sorted(pairs.items()) if a != b]


def _architecture_name(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or [None]
    if not isinstance(names, list):
        raise ValueError(f"architectures must be a list, got {names!r}")
    if names[0] not in list(ARCHITECTURES):
        *most, last = ARCHITECTURES
        raise ValueError(
            f"architecture {names[0]!r} is not supported, only {', '.join(most)} and {last}"
        )
    return str(names[0])


def _rope(raw: Mapping[str, Any], max_positions: int) -> Rope:
    """What rope_parameters says, which transformers 4 calls rope_scaling."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = _positive(found if "rope_theta" in found else raw, "rope_theta", 10000.0)
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ValueError(
            f"rope scaling of type {kind!r} is not implemented, only 'default', 'linear', 'yarn' "
            "and 'llama3'"
        )
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError("rope parameters that differ by layer are not implemented")
    if kind == "default":
        return Rope(kind, theta)
    if kind == "linear":
        return Rope(kind, theta, _positive(found, "factor"))
    key = "original_max_position_embeddings"
    original = _size(raw if raw.get(key) is not None else found, key, default=max_positions)
    # Where it is left out: as many times as the sequences have become longer.
    implied = max_positions / original if kind == "yarn" else None
    factor = _positive(found, "factor", implied)
    if kind == "llama3":
        slow = _positive(found, "low_freq_factor")
        fast = _positive(found, "high_freq_factor")
        if slow >= fast:
            raise ValueError(
                f"low_freq_factor ({slow:g}) must be below high_freq_factor ({fast:g})"
            )
        return Rope(kind, theta, factor, original, slow, fast)
    if theta == 1:
        raise ValueError("rope_theta must not be 1 with yarn")
    slow, fast = _positive(found, "beta_slow", 1.0), _positive(found, "beta_fast", 32.0)
    scales = [_positive(found, key, 0.0) for key in ("mscale", "mscale_all_dim") if found.get(key)]
    default = _yarn_scale(factor, 1.0)
    if len(scales) == 2:
        default = _yarn_scale(factor, scales[0]) / _yarn_scale(factor, scales[1])
    attention_factor = _positive(found, "attention_factor", default)
    truncate = bool(found.get("truncate", True))
    return Rope(kind, theta, factor, original, slow, fast, truncate, attention_factor)


def _yarn_scale(factor: float, scale: float) -> float:
    """By how much YaRN sharpens attention in longer sequences (https://arxiv.org/abs/2309.00071)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _has_sliding_layers(raw: Mapping[str, Any], num_layers: int) -> bool:
    """Of a model with a window in some layers only: in any? That is said in one of two ways."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        return "sliding_attention" in kinds
    require_int("max_window_layers", raw.get("max_window_layers"), low=0)
    return bool(raw["max_window_layers"] < num_layers)


def _experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    num_experts = _size(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts")
    num_chosen = _size(raw, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ValueError(
            f"num_experts_per_tok ({num_chosen}) is more than the {num_experts} "
            "experts that there are"
        )
    step, dense = _size(raw, "decoder_sparse_step"), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers must be a list, got {dense!r}")
    layers = {i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense}
    size = _size(raw, "moe_intermediate_size")
    renormalized = bool(raw.get("norm_topk_prob", False))
    return Experts(frozenset(layers), num_experts, num_chosen, size, renormalized)


def _quantization(raw: Mapping[str, Any]) -> Quantization | None:
    found = raw.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method")
    if method != "fp8":
        raise ValueError(
            f"quantised checkpoints ({method!r}) are not implemented, but for 'fp8' ones"
        )
    for key, wanted in (
        ("fmt", "e4m3"), ("weight_block_size", [128, 128]), ("activation_scheme", "dynamic"),
    ):  # fmt: skip
        if found.get(key, wanted if key == "fmt" else None) != wanted:
            raise ValueError(
                f"quantization_config with {key} {found.get(key)!r} is not implemented, only "
                f"{wanted!r}"
            )
    kept = found.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ValueError(f"modules_to_not_convert must be a list of names, got {kept!r}")
    return Quantization("fp8", tuple(sorted(kept)), is_stored=True)


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"no {key}")
    require_int(key, value, low=1)
    return int(value)


def _positive(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"no {key}")
    require_float(key, value, low=0.0)
    if value == 0:
        raise ValueError(f"{key} must be > 0, got {value}")
    return float(value)


def _refuse_unimplemented(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for a feature that would change the results if it were ignored."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"activation {raw['hidden_act']!r} is not implemented, only 'silu'")
    for key in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} must be an object, got {raw[key]!r}")
    for found in (raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}):
        if (found.get("partial_rotary_factor") or 1) != 1:
            raise ValueError("a partial_rotary_factor is not implemented")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layers of type {kind!r} are not implemented, only attention")


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

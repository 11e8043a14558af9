"""Config: every engine option, validated once."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import torch

from nanovllm.model_config import DTYPES, ModelConfig
from nanovllm.sampling_params import require_bool, require_float, require_int
from nanovllm.utils.device import resolve_dtype
from nanovllm.utils.loader import read_model_config, resolve_model_dir

logger = logging.getLogger("nanovllm")

QUANTIZATIONS = ("fp8", "int4")
ATTENTION_BACKENDS = ("torch", "cpu", "flash_attn", "triton")
KV_CACHE_DTYPES = ("auto", "fp8")
BLOCK_SIZE_STEP = 16
# The least and the most of each.
INT_OPTIONS: dict[str, tuple[int, int | None]] = {
    "max_num_batched_tokens": (1, None),
    "max_num_seqs": (1, None),
    "max_model_len": (2, None),
    "tensor_parallel_size": (1, None),
    "kvcache_block_size": (BLOCK_SIZE_STEP, 1 << 20),
    "num_kvcache_blocks": (-1, None),
    "eos": (-1, None),
}
FLASH_BLOCK_STEP = 256  # flash-attn's paged cache takes no others


class Options(TypedDict, total=False):
    """The options of an engine, for whoever checks types: what Config takes but for `model`."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float
    enforce_eager: bool
    tensor_parallel_size: int
    kvcache_block_size: int
    num_kvcache_blocks: int
    kv_cache_dtype: str
    eos: int
    device: str
    dtype: str
    attention_backend: str
    load_format: str
    quantization: str


@dataclass(slots=True)
class Config:
    """The options of one engine, named as in nano-vllm, and what they resolve to.

    Args:
        model: a local directory with config.json and safetensors, or a Hub repo id.
        max_num_batched_tokens: most tokens in one prefill step; longer prompts go in chunks.
        max_num_seqs: most sequences that run at a time.
        max_model_len: most tokens of prompt and completion together; cut to the model's
            longest sequence.
        gpu_memory_utilization: share of the GPU's memory that this engine may take, KV pool
            included. Not used on a CPU.
        enforce_eager: run every step kernel by kernel (no CUDA graphs).
        tensor_parallel_size: GPUs, or processes of a CPU, that share the model. It divides the
            model's heads, its MLPs' size and its vocabulary.
        kvcache_block_size: token positions in a KV block, a multiple of 16 (of 256 for flash_attn).
        num_kvcache_blocks: size of the KV pool; -1: as much as the memory allows, on a CPU what all
            sequences may take together, up to 4 GiB or a quarter of what is free, but for one.
        kv_cache_dtype: "auto" (the model's) or "fp8": K and V are rounded to e4m3 and take half of
            bfloat16's memory (see layers.kv_quantization). Not with flash_attn.
        eos: the one id that ends a sequence; -1: those of the tokenizer, config.json and
            generation_config.json.
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's; on a CPU bfloat16 if it is the checkpoint's and the
            processor multiplies in it, or the weights are int4, else float32), "float32",
            "float16", "bfloat16".
        attention_backend: "auto" (the fastest one that works), "torch", "cpu", "flash_attn" or
            "triton".
        load_format: "auto" (safetensors) or "dummy" (random weights, no checkpoint read).
        quantization: "auto" (weights as the checkpoint has them) or "fp8" (e4m3 numbers in blocks
            of 128 x 128 with a scale each, quantised while they are loaded) or "int4" (on a CPU:
            16 levels for each 128 inputs of an output, or 64 or 32; likewise).

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, options that
            contradict one another, or a model that is not supported.
    """

    model: str | Path
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.95
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    kv_cache_dtype: str = "auto"
    eos: int = -1
    device: str = "auto"
    dtype: str = "auto"
    attention_backend: str = "auto"
    load_format: str = "auto"
    quantization: str = "auto"
    model_dir: Path = field(init=False)
    model_config: ModelConfig = field(init=False)

    @classmethod
    def from_options(cls, model: str | Path, options: Mapping[str, Any]) -> "Config":
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
        self.model_dir = resolve_model_dir(self.model, with_weights=self.load_format != "dummy")
        self.model_config = self.read_model_config(self.model_dir)
        self.model_config.split(self.tensor_parallel_size)
        require_int("eos", self.eos, low=-1, high=self.model_config.vocab_size - 1)
        limit = self.model_config.max_position_embeddings
        if self.max_model_len > limit:
            logger.warning("max_model_len %d cut to the model's %d", self.max_model_len, limit)
            self.max_model_len = limit
        window = self.model_config.sliding_window
        if window is not None and self.max_model_len > window:
            raise ValueError(
                f"{self.model_dir}: sliding-window attention is not implemented; with a "
                f"max_model_len of at most the window's {window} positions (it is "
                f"{self.max_model_len}) the window changes nothing"
            )
        if self.num_kvcache_blocks != -1:
            check_pool_size(self.num_kvcache_blocks, self.kvcache_block_size, self.max_model_len)

    def read_model_config(self, model_dir: Path) -> ModelConfig:
        """That of a checkpoint, with what the options change.

        Raises:
            TypeError, ValueError: as utils.loader.read_model_config.
        """
        return read_model_config(model_dir).quantized(self.quantization)

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that every rank computes in on such a device."""
        model = self.model_config
        return resolve_dtype(self.dtype, model.dtype, device, model.is_int4)

    def _check_options(self) -> None:
        for name, (low, high) in INT_OPTIONS.items():
            setattr(self, name, require_int(name, getattr(self, name), low, high))
        self.gpu_memory_utilization = require_float(
            "gpu_memory_utilization", self.gpu_memory_utilization, low=0.0, high=1.0
        )
        require_bool("enforce_eager", self.enforce_eager)
        if self.kvcache_block_size % BLOCK_SIZE_STEP:
            raise ValueError(
                f"kvcache_block_size must be a multiple of {BLOCK_SIZE_STEP}, "
                f"got {self.kvcache_block_size}"
            )
        if self.num_kvcache_blocks == 0:
            raise ValueError("num_kvcache_blocks must be -1 (derived) or >= 1, got 0")
        if not isinstance(self.device, str) or not _is_device(self.device):
            raise ValueError(
                f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {self.device!r}"
            )
        _require_choice("dtype", self.dtype, ("auto", *DTYPES))
        _require_choice("attention_backend", self.attention_backend, ("auto", *ATTENTION_BACKENDS))
        _require_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _require_choice("load_format", self.load_format, ("auto", "dummy"))
        _require_choice("quantization", self.quantization, ("auto", *QUANTIZATIONS))

    def _check_combinations(self) -> None:
        if self.quantization == "int4" and self.device.startswith("cuda"):
            raise ValueError(f"quantization='int4' needs a CPU, got device={self.device!r}")
        if self.attention_backend == "flash_attn":
            if self.device == "cpu":
                raise ValueError("attention_backend='flash_attn' needs CUDA, got device='cpu'")
            if self.dtype == "float32":
                raise ValueError(
                    "attention_backend='flash_attn' needs float16 or bfloat16, got dtype='float32'"
                )
            if self.kv_cache_dtype == "fp8":
                raise ValueError(
                    "attention_backend='flash_attn' cannot read an FP8 cache, got "
                    "kv_cache_dtype='fp8'"
                )
            if self.kvcache_block_size % FLASH_BLOCK_STEP:
                raise ValueError(
                    "attention_backend='flash_attn' needs a kvcache_block_size that is a multiple "
                    f"of {FLASH_BLOCK_STEP}, got {self.kvcache_block_size}"
                )


def check_pool_size(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Raise ValueError if a pool of `num_blocks` is too small for one of `max_model_len`."""
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
        kind == "cuda" and bool(colon) and index.isdecimal() and index == str(int(index))
    )

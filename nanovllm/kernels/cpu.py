"""Kernels for a CPU: cpu.c, compiled once for the processor at hand, by the machine's C compiler.

Twins: nanovllm.layers.layernorm, .sampler, .attention (qk_norm_rope_store), .torch_attention
(both), .int4 (Int4Weight.linear). Where there is no compiler, or it cannot do this, the twins run.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("nanovllm")

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC")
# Rows have a multiple of so many elements: halves of a head, in vectors.
ROW_STEP = 32
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "rms_norm": (pointer, pointer, real, pointer, long, integer, integer, integer),
    "qk_norm_rope_store": (*(pointer,) * 4, long, pointer, integer, integer),
    "sample": (pointer, integer, integer),
    "paged_decode": (pointer, integer),
    "paged_prefill": (pointer, integer),
    "int4_linear": (*(pointer,) * 5, integer, integer),
}
# What int4_linear takes at a time, whose sums stay in the cache.
MOST_TOKENS = 512


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, and the log says why."""
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info(f"plain PyTorch on the CPU, without kernels in C: {error}")
        return None
    for name, signature in SIGNATURES.items():
        if hasattr(found, name):
            function = getattr(found, name)
            function.argtypes, function.restype = signature, None
    return found


def has_int4() -> bool:
    """True if int4_linear is there, which wants a processor that multiplies pairs of bfloat16."""
    return hasattr(library(), "int4_linear")


def _compiled() -> Path:
    """The shared library of this source and processor, made if there is none yet.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: it cannot be made.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"not on {sys.platform}")
    compiler = shlex.split(os.environ.get("CC", "")) or [_first_compiler()]
    maps = Path("/proc/self/maps").read_text()
    openmp = re.search(r"/\S*lib[gi]omp\S*\.so\S*", maps)
    if openmp is None:
        raise RuntimeError("torch has loaded no OpenMP that GCC's is compatible with")
    processor = re.findall(r"^(?:flags|Features|model name)\s*:.*", _cpuinfo(), re.M)[:2]
    what = (SOURCE.read_text(), FLAGS, compiler, openmp[0], platform.machine(), processor)
    name = f"cpu-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    if (folder / name).exists():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "cpu.o"), Path(scratch, "cpu.so")
        _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        # With torch's own OpenMP: another's threads would contend with torch's.
        _run([*compiler, "-shared", str(compiled), openmp[0], "-lm", "-o", str(linked)])
        return linked.replace(folder / name)  # whole at once, whoever else makes it


def _first_compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise RuntimeError("no C compiler is installed (CC, cc, gcc, clang)")


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[:400]}")


def _call(name: str, *args: Any) -> None:
    """A kernel, on as many threads as torch uses."""
    found = library()
    assert found is not None
    getattr(found, name)(*map(_address, args), torch.get_num_threads())


def _address(x: Any) -> Any:
    """Of a tensor; anything else as it is."""
    return x.data_ptr() if isinstance(x, Tensor) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Twin: nanovllm.layers.layernorm.rms_norm.

    Args:
        x: [..., size], contiguous.
        weight: [size], in x's dtype.
    """
    assert x.is_contiguous()
    out = torch.empty_like(x)
    size = x.size(-1)
    _call("rms_norm", x, weight, eps, out, x.numel() // size, size, DTYPES[x.dtype])
    return out


class _Layer(ctypes.Structure):
    """struct layer."""

    _fields_ = (
        *((name, pointer) for name in ("q_weight", "k_weight", "k_cache", "v_cache")),
        *((name, pointer) for name in ("k_scales", "v_scales")),
        ("eps", real),
        *((name, integer) for name in ("num_heads", "num_kv_heads", "head_dim")),
    )


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    write_key: bool = True,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Twin: nanovllm.layers.attention.qk_norm_rope_store.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; is overwritten
            with what is returned.
        cos_sin: float32 [max_positions, head_dim]. positions: int64 [num_tokens].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, or empty;
            of an FP8 cache uint8.
        slot_mapping: int32 [num_tokens].
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    caches = k_cache, v_cache, k_scales, v_scales
    assert qkv.is_contiguous() and all(x.is_contiguous() for x in caches if x is not None)
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    weights_and_caches = q_weight, k_weight, *(caches if k_cache.numel() else (None,) * 4)
    sizes = num_heads, num_kv_heads, heads.size(2)
    layer = _Layer(*map(_address, weights_and_caches), eps, *sizes)
    tokens = cos_sin, positions, slot_mapping, heads.size(0)
    _call("qk_norm_rope_store", qkv, *tokens, ctypes.byref(layer), DTYPES[qkv.dtype])
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)


class _Sampling(ctypes.Structure):
    """struct sampling."""

    _fields_ = (
        *((name, pointer) for name in ("logits", "temperatures", "thresholds", "seeds")),
        *((name, pointer) for name in ("positions", "out")),
        *((name, long) for name in ("stride", "first_id")),
        *((name, integer) for name in ("num_rows", "vocab_size")),
    )


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    thresholds: Tensor | None = None,
    out: Tensor | None = None,
    first_id: int | None = None,
) -> Tensor:
    """Twin: nanovllm.layers.sampler.sample.

    Args:
        logits: [num_seqs, vocab_size], rows contiguous.
        temperatures, thresholds: float32 [num_seqs]. seeds, positions: int64 [num_seqs].
    """
    if logits.size(1) < ROW_STEP:  # less than a vector
        logits = F.pad(logits, (0, ROW_STEP - logits.size(1)), value=-torch.inf)
    num_seqs, vocab_size = logits.shape
    out = seeds.new_empty(num_seqs) if out is None else out
    assert logits.stride(1) == 1 and out.is_contiguous()
    numbers = temperatures, thresholds, seeds, positions
    tensors = logits, *(None if x is None else x.contiguous() for x in numbers), out
    sizes = logits.stride(0), -1 if first_id is None else first_id, num_seqs, vocab_size
    what = _Sampling(*map(_address, tensors), *sizes)
    _call("sample", ctypes.byref(what), DTYPES[logits.dtype])
    return out


class _Decode(ctypes.Structure):
    """struct decode."""

    _fields_ = (
        *((name, pointer) for name in ("query", "k_cache", "v_cache", "k_scales", "v_scales")),
        *((name, pointer) for name in ("block_tables", "lens", "out")),
        ("scale", real),
        *((name, long) for name in ("query_stride", "table_stride")),
        *((name, integer) for name in ("num_seqs", "num_kv_heads", "num_sharing", "head_dim")),
        *((name, integer) for name in ("block_size", "dtype", "cache_dtype")),
    )


def paged_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence. Twin: nanovllm.layers.torch_attention.torch_decode.

    Args:
        query: [num_seqs, num_heads, head_dim], a sequence's heads side by side.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; of an FP8
            cache uint8.
        block_tables: int32 [num_seqs, max_blocks].
        context_lens: int32 [num_seqs], 0: the output is 0.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].

    Returns:
        [num_seqs, num_heads, head_dim], contiguous.
    """
    caches = k_cache, v_cache, k_scales, v_scales
    assert all(x.is_contiguous() for x in caches if x is not None)
    assert query.stride(2) == 1 and query.stride(1) == query.size(2)
    assert block_tables.stride(1) == 1 and context_lens.is_contiguous()
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = query.new_empty(query.shape)
    tensors = query, *caches, block_tables, context_lens, out
    step = _Decode(
        *map(_address, tensors),
        *(scale, query.stride(0), block_tables.stride(0)),
        *(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size),
        *(DTYPES[query.dtype], DTYPES[k_cache.dtype]),
    )
    _call("paged_decode", ctypes.byref(step))
    return out


class _Prefill(ctypes.Structure):
    """struct prefill."""

    _fields_ = (
        *((name, pointer) for name in ("query", "keys", "values", "k_scales", "v_scales")),
        *((name, pointer) for name in ("block_table", "out", "key_panels", "value_panels")),
        ("scale", real),
        *((name, long) for name in ("query_stride", "key_stride")),
        *((name, integer) for name in ("num_queries", "num_keys", "num_kv_heads", "num_sharing")),
        *((name, integer) for name in ("head_dim", "block_size", "dtype", "cache_dtype")),
    )


def paged_prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_keys: int,
    scale: float,
    out: Tensor,
    block_table: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Causal attention of a sequence's last tokens. Twin: that of torch_attention.torch_prefill.

    Args:
        query: [num_queries, num_heads, head_dim], a token's heads side by side.
        keys, values: [num_keys, num_kv_heads, head_dim], likewise and of one stride; with
            block_table a cache, [num_blocks, block_size, num_kv_heads, head_dim], contiguous, and
            uint8 if it is FP8.
        out: [num_queries, num_heads, head_dim], contiguous, is filled.
        block_table: int32 [at least as many blocks as num_keys take].
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.size(-2)
    key_stride, block_size = keys.stride(0), 0
    if block_table is not None:
        assert keys.is_contiguous() and values.is_contiguous() and block_table.stride(0) == 1
        key_stride, block_size = num_kv_heads * head_dim, keys.size(1)
    for x in (query, keys, values):
        assert x.stride(-1) == 1 and x.stride(-2) == head_dim
    assert out.is_contiguous() and keys.stride(0) == values.stride(0)
    # In whole blocks of 64, and columns of 64.
    num_padded = num_kv_heads * (num_keys + 63)
    panels = [
        torch.empty(num_padded * -(-head_dim // 64) * 64, dtype=torch.float32) for _ in range(2)
    ]
    tensors = query, keys, values, k_scales, v_scales, block_table, out, *panels
    sizes = num_queries, num_keys, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size
    dtypes = DTYPES[query.dtype], DTYPES[keys.dtype]
    step = _Prefill(*map(_address, tensors), scale, query.stride(0), key_stride, *sizes, *dtypes)
    _call("paged_prefill", ctypes.byref(step))


class _Int4(ctypes.Structure):
    """struct int4."""

    _fields_ = (
        *((name, pointer) for name in ("values", "scales", "bias")),
        ("group_stride", long),
        *((name, integer) for name in ("num_rows", "num_out", "num_inputs", "group_size")),
    )


def int4_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    num_rows: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + (x @ weight.T + bias). Twin: nanovllm.layers.int4.Int4Weight.linear.

    Args:
        x: bfloat16 [num_tokens, num_inputs], contiguous.
        values: uint8 [num_padded_rows, num_inputs / 2], contiguous, of blocks of 64 rows; in each,
            input after input, a byte has the codes of rows j and j + 32.
        scales: bfloat16 [num_groups, num_padded_rows, 2], rows contiguous.
        bias: bfloat16 [num_rows].
        residual: bfloat16 [num_tokens, num_rows], contiguous.
        out: likewise, is filled; it may be `residual`.
    """
    num_groups, num_padded, _ = scales.shape
    num_tokens, num_inputs = x.shape
    out = x.new_empty(num_tokens, num_rows) if out is None else out
    rows = x, values, out, *(() if residual is None else (residual,))
    assert all(t.is_contiguous() for t in rows) and scales.stride()[1:] == (2, 1)
    sizes = scales.stride(0), num_padded, num_rows, num_inputs, num_inputs // num_groups
    weight = ctypes.byref(_Int4(*map(_address, (values, scales, bias)), *sizes))
    # Pairs of inputs as they are read, and totals of groups.
    scratch = x.new_empty(min(num_tokens, MOST_TOKENS) * (num_inputs + 2 * num_groups))
    for start in range(0, num_tokens, MOST_TOKENS):
        some = slice(start, start + MOST_TOKENS)
        more = None if residual is None else residual[some]
        num = min(num_tokens - start, MOST_TOKENS)
        _call("int4_linear", weight, x[some], more, out[some], scratch, num)
    return out

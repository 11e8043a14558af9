"""Causal attention over the paged KV cache, and the back ends that compute it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.config import FLASH_BLOCK_STEP
from nanovllm.kernels import kernel_of, usable_on_cpu
from nanovllm.layers.cpu_attention import cpu_decode, cpu_prefill
from nanovllm.layers.flash_attention import flash_decode, flash_prefill
from nanovllm.layers.kv_quantization import dequantize, quantize
from nanovllm.layers.layernorm import rms_norm
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary, turns_of
from nanovllm.layers.torch_attention import (
    AttentionInputs,
    Slots,
    in_a_row,
    torch_decode,
    torch_prefill,
    torch_workspace,
)
from nanovllm.layers.triton_attention import (
    triton_decode,
    triton_prefill,
    triton_prefill_sizes,
    triton_workspace,
)
from nanovllm.model_config import ModelConfig
from nanovllm.utils.context import Context


def store_kvcache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Slots,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write each token's K and V to its slot.

    Of an FP8 cache, `key` and `value` are overwritten with what it can hold of them.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping: int32 [num_tokens], block * block_size + offset, -1 = nowhere; here also what
            stored_slots makes of it.
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].
    """
    if k_scales is not None and v_scales is not None:
        (k, k_exponents), (v, v_exponents) = quantize(key), quantize(value)
        store_kvcache(k, v, k_cache, v_cache, slot_mapping)
        store_kvcache(k_exponents, v_exponents, k_scales, v_scales, slot_mapping)
        dequantize(k, k_exponents, out=key)
        dequantize(v, v_exponents, out=value)
        return
    slots = stored_slots(slot_mapping)
    if isinstance(slots, Tensor) and slots.dtype == torch.int32:
        stored = slots >= 0
        key, value, slots = key[stored], value[stored], slots[stored].long()
    for cache, rows in ((k_cache.flatten(0, 1), key), (v_cache.flatten(0, 1), value)):
        if isinstance(slots, slice):
            cache[slots] = rows
        else:
            cache.index_copy_(0, slots, rows)


def stored_slots(slot_mapping: Slots) -> Slots:
    """A slot mapping as it is quick to write to: as a slice, if its slots lie in a row, else int64.

    With -1 among them it stays as it is.
    """
    if isinstance(slot_mapping, slice) or slot_mapping.dtype == torch.int64:
        return slot_mapping
    found = slot_mapping.cpu().numpy()
    if (found < 0).any():
        return slot_mapping
    return in_a_row(found) or slot_mapping.long()


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Slots,
    num_heads: int,
    num_kv_heads: int,
    write_key: bool = True,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What happens to a merged projection before attention: QK-norm, rotary embedding, store.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        q_weight, k_weight: [head_dim], or None: no norm.
        cos_sin: float32 [max_positions, head_dim], cos | sin.
        positions: int64 [num_tokens]; here also None: cos_sin is what turns_of makes of their rows.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; empty: nothing is
            stored.
        slot_mapping: int32 [num_tokens], -1 = nowhere; here also as for store_kvcache.
        write_key: K is wanted (a kernel need not write it out where attention reads the cache).
        k_scales, v_scales: of an FP8 cache, uint8 [num_blocks, block_size, num_kv_heads].

    Returns:
        q [num_tokens, num_heads, head_dim]; k and v [num_tokens, num_kv_heads, head_dim], rounded
        as an FP8 cache rounds them, where they are wanted: v within qkv, which is overwritten.
    """
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    num_qk = num_heads + num_kv_heads
    qk, v = heads[:, :num_qk], heads[:, num_qk:]
    if q_weight is not None and k_weight is not None:
        # Of q and k together: each operation less counts, where a step has few tokens.
        weights = q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)
        qk = rms_norm(qk, torch.cat(weights), eps)
    turns = cos_sin if positions is None else turns_of(cos_sin[positions])
    qk = apply_rotary(qk, turns)
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    if k_cache.numel():
        store_kvcache(k, v, k_cache, v_cache, slot_mapping, k_scales, v_scales)
    return q, k, v


class Backend(NamedTuple):
    """A pair of functions that compute attention [num_tokens, num_heads, head_dim].

    What a pair from a package needs: CUDA, 16-bit elements, a head_dim in `head_dims`, a block_size
    that is a multiple of `block_step`, a GPU of `min_capability`. The one for a CPU needs one and
    the library's kernels there, PyTorch's nothing.
    `loops_on_host`: a decode is no fixed sequence of launches, so that no CUDA graph can hold it.
    `prefill_sizes`: for a max_model_len, the numbers of tokens of steps that run all of its
    kernels, if their prompts are as long as may be.
    `workspace`: for a model, max_num_seqs, max_model_len, and the model's device and dtype: the
    scratch memory that a decode finds in its context.
    `reads_fp8`: the cache may be an FP8 one.
    """

    prefill: Callable[[AttentionInputs], Tensor]
    decode: Callable[[AttentionInputs], Tensor]
    package: str | None = None
    head_dims: range = range(0)
    block_step: int = 1
    min_capability: tuple[int, int] = (0, 0)
    loops_on_host: bool = False
    prefill_sizes: Callable[[int], set[int]] = lambda max_model_len: set()
    workspace: Callable[[ModelConfig, int, int, dict[str, Any]], Any] = lambda *_: None
    reads_fp8: bool = True
    is_for_cpu: bool = False


# The fastest first. Measured on an H100 with head_dim 128, against flash-attn 2.8.3: the Triton
# kernels take 0.4 to 1.0 of its time in decode, and 0.65 to 1.02 in prefill; the one for Hopper
# takes 0.7 to 1.0 of the time of Triton's where it is used.
BACKENDS = {
    "triton": Backend(
        triton_prefill,
        triton_decode,
        "triton",
        head_dims=range(32, 257, 16),
        prefill_sizes=triton_prefill_sizes,
        workspace=triton_workspace,
    ),
    "flash_attn": Backend(
        flash_prefill,
        flash_decode,
        "flash_attn",
        range(8, 257, 8),
        FLASH_BLOCK_STEP,
        (8, 0),
        reads_fp8=False,
    ),
    "cpu": Backend(cpu_prefill, cpu_decode, is_for_cpu=True),
    "torch": Backend(torch_prefill, torch_decode, loops_on_host=True, workspace=torch_workspace),
}


def select_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    fp8_cache: bool = False,
) -> str:
    """Name of the back end to use: the one requested, or the first that works here.

    Raises:
        ValueError: the requested back end is not installed or cannot work with these arguments.
    """
    case = device, dtype, block_size, head_dim, fp8_cache
    if requested == "auto":
        return next(name for name, backend in BACKENDS.items() if not _why_not(backend, *case))
    if reason := _why_not(BACKENDS[requested], *case):
        raise ValueError(f"attention_backend={requested!r} cannot be used: {reason}")
    return requested


def _why_not(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    fp8_cache: bool,
) -> str | None:
    """Why a back end cannot be used; None if it can."""
    package, dims = backend.package, backend.head_dims
    if backend.is_for_cpu and not usable_on_cpu(device, head_dim):
        if device.type != "cpu":
            return f"the device is {device}, not a CPU"
        return f"its kernels are not compiled, or not for a head_dim of {head_dim}"
    if package is None:
        return None
    if fp8_cache and not backend.reads_fp8:
        return "it cannot read an FP8 cache (kv_cache_dtype)"
    if block_size % backend.block_step:
        return f"kvcache_block_size {block_size} is no multiple of {backend.block_step}"
    if head_dim not in dims:
        return f"head_dim {head_dim} is no multiple of {dims.step} from {dims[0]} to {dims[-1]}"
    if device.type != "cuda":
        return f"the device is {device}, not CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype}, not float16 or bfloat16"
    if torch.cuda.get_device_capability(device) < backend.min_capability:
        return "the GPU is older than sm_{}{}".format(*backend.min_capability)
    return (
        None if find_spec(package) else f"the package {package.replace('_', '-')} is not installed"
    )


def _slots_of_step(context: Context) -> Slots:
    return stored_slots(context.slot_mapping)


class Attention(nn.Module):
    """From a layer's merged projection to its attention output; owns the layer's cache views.

    `k_cache` and `v_cache` are views of the pool that the ModelRunner binds once it is allocated;
    before that they are empty, and nothing is stored (while memory is measured). `k_scales` and
    `v_scales` belong to them where the pool is FP8.
    """

    def __init__(self, config: ModelConfig, backend: Backend, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.backend, self.rotary_emb = backend, rotary_emb
        self.k_cache = self.v_cache = torch.empty(0)
        self.k_scales: Tensor | None = None
        self.v_scales: Tensor | None = None
        device = rotary_emb.cos_sin.device
        self.qk_norm_rope_store = kernel_of(qk_norm_rope_store, "fused", device, config.head_dim)
        self.has_kernel = self.qk_norm_rope_store is not qk_norm_rope_store

    def forward(
        self, qkv: Tensor, norms: tuple[Tensor | None, Tensor | None], context: Context
    ) -> Tensor:
        """Norm and rotate q and k, store k and v, attend.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
            norms: weights [head_dim] of the norms of q and k, or None twice.

        Returns:
            [num_tokens, num_heads * head_dim].
        """
        cos_sin, positions = self.rotary_emb.cos_sin, context.positions
        slots: Slots = context.slot_mapping
        if not self.has_kernel:
            cos_sin, positions = context.once(self.rotary_emb.turns), None
            slots = context.once(_slots_of_step)
        query, key, value = self.qk_norm_rope_store(
            qkv,
            *norms,
            self.eps,
            cos_sin,
            positions,
            self.k_cache,
            self.v_cache,
            slots,
            self.num_heads,
            self.num_kv_heads,
            write_key=context.block_tables is None,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
        )
        attend = self.backend.prefill if context.is_prefill else self.backend.decode
        caches, scales = (self.k_cache, self.v_cache), (self.k_scales, self.v_scales)
        inputs = AttentionInputs(query, key, value, *caches, self.scale, context, *scales)
        return attend(inputs).flatten(1)

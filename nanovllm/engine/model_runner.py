"""ModelRunner: turns a scheduled batch into tensors, runs the model, gives back token ids."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import Config, check_pool_size
from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.layers.attention import BACKENDS, Attention, select_backend
from nanovllm.layers.sampler import sample
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.context import Context
from nanovllm.utils.loader import fill_random, load_weights
from nanovllm.utils.memory import CudaBudget, cpu_pool_budget

logger = logging.getLogger("nanovllm")


class ModelRunner:
    """Owns every tensor of an engine: the model's parameters and the KV pool.

    After construction the model is loaded, its memory measured and the pool allocated:
    `kv_cache` is [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim], and each
    attention layer has its part bound.

    Args:
        config: the engine's options.

    Raises:
        ValueError: a device, dtype or back end that this machine does not have; a checkpoint that
            does not fit the model; memory too small for one sequence of max_model_len.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.block_size = config.kvcache_block_size
        self.device = _resolve_device(config.device)
        self.dtype = _resolve_dtype(config.dtype, config.model_config.dtype, self.device)
        self.backend = select_backend(
            config.attention_backend,
            self.device,
            self.dtype,
            self.block_size,
            config.model_config.head_dim,
        )
        budget = CudaBudget(self.device) if self.device.type == "cuda" else None
        self.model = self._load_model()
        self.num_blocks = config.num_kvcache_blocks
        if self.num_blocks == -1:
            self.num_blocks = self._derive_num_blocks(budget)
        self.kv_cache = self._allocate_kv_cache()
        logger.info(
            "KV pool: %d blocks of %d tokens = %d tokens, %.2f GiB on %s (%s, attention: %s)",
            self.num_blocks,
            self.block_size,
            self.num_blocks * self.block_size,
            self.kv_cache.nbytes / 2**30,
            self.device,
            str(self.dtype).removeprefix("torch."),
            self.backend,
        )

    def run(self, batch: Batch) -> list[int]:
        """Compute a step: store the K/V of its tokens, and sample.

        Returns:
            The sampled id of each item that samples, in order.
        """
        items = batch.items
        prepare = self._prepare_prefill if batch.is_prefill else self._prepare_decode
        input_ids, positions, context = prepare(items)
        logits = self.model(input_ids, positions, context)
        return self._sample(logits, [item for item in items if item.samples])

    def free(self) -> None:
        """Give the memory back. The runner is of no use afterwards."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("kv_cache", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load_model(self) -> Qwen3ForCausalLM:
        with _construction(self.device, self.dtype):
            model = Qwen3ForCausalLM(
                self.config.model_config, BACKENDS[self.backend], self.config.max_model_len
            )
        if self.config.load_format == "dummy":
            fill_random(model)
        else:
            load_weights(model, self.config.model_dir)
        return model.eval()

    def _derive_num_blocks(self, budget: CudaBudget | None) -> int:
        """How many blocks the memory holds, at most what the largest batch could need on a CPU."""
        block_bytes = self._block_bytes()
        if budget is None:
            blocks_per_seq = -(-self.config.max_model_len // self.block_size)
            num_blocks = min(
                cpu_pool_budget() // block_bytes, self.config.max_num_seqs * blocks_per_seq
            )
        else:
            self._run_largest_prefill()
            pool_bytes = budget.pool_bytes(self.config.gpu_memory_utilization)
            num_blocks = max(0, pool_bytes) // block_bytes
        check_pool_size(num_blocks, self.block_size, self.config.max_model_len)
        return num_blocks

    def _block_bytes(self) -> int:
        model = self.config.model_config
        return (
            2 * model.num_layers * self.block_size * model.num_kv_heads * model.head_dim
            * self.dtype.itemsize
        )  # fmt: skip

    def _run_largest_prefill(self) -> None:
        """Run the step that takes the most memory, without a pool, so that its peak is known."""
        num_tokens = self.config.max_num_batched_tokens
        num_seqs = min(self.config.max_num_seqs, num_tokens)
        # As many sequences as may be (each has a row of logits), the first as long as may be.
        lengths = [1] * num_seqs
        for index in range(num_seqs):
            lengths[index] = min(self.config.max_model_len, num_tokens - sum(lengths) + 1)
        context = self._prefill_context(lengths, lengths, [-1] * sum(lengths))
        zeros = self._to_device([0] * sum(lengths), torch.int64)
        context.logit_rows = zeros[:num_seqs]
        logits = self.model(zeros, zeros, context)
        sample(logits, torch.ones(num_seqs, device=self.device))

    def _allocate_kv_cache(self) -> Tensor:
        model = self.config.model_config
        kv_cache = torch.empty(
            2, model.num_layers, self.num_blocks, self.block_size, model.num_kv_heads,
            model.head_dim, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, *kv_cache, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache
        return kv_cache

    def _prepare_prefill(self, items: list[ScheduledSequence]) -> tuple[Tensor, Tensor, Context]:
        """input_ids and positions, int64 [num_tokens], and the layout of a prefill step."""
        input_ids = chain.from_iterable(item.seq.token_ids[item.start : item.end] for item in items)
        positions = chain.from_iterable(range(item.start, item.end) for item in items)
        query_lens = [item.end - item.start for item in items]
        key_lens = [item.end for item in items]
        slots = chain.from_iterable(self._slots(item) for item in items)
        context = self._prefill_context(query_lens, key_lens, list(slots))
        if query_lens != key_lens:
            context.block_tables = self._block_tables(items)
        last_rows = [end - 1 for end in accumulate(query_lens)]
        rows = [row for row, item in zip(last_rows, items, strict=True) if item.samples]
        context.logit_rows = self._to_device(rows, torch.int64)
        return (
            self._to_device(list(input_ids), torch.int64),
            self._to_device(list(positions), torch.int64),
            context,
        )

    def _prefill_context(
        self, query_lens: list[int], key_lens: list[int], slots: list[int]
    ) -> Context:
        return Context(
            is_prefill=True,
            slot_mapping=self._to_device(slots, torch.int32),
            query_lens=query_lens,
            key_lens=key_lens,
            block_size=self.block_size,
            cu_seqlens_q=self._to_device([0, *accumulate(query_lens)], torch.int32),
            cu_seqlens_k=self._to_device([0, *accumulate(key_lens)], torch.int32),
        )

    def _prepare_decode(self, items: list[ScheduledSequence]) -> tuple[Tensor, Tensor, Context]:
        """input_ids and positions, int64 [num_seqs], and the layout of a decode step."""
        key_lens = [item.end for item in items]
        context = Context(
            is_prefill=False,
            slot_mapping=self._to_device([self._slot(item) for item in items], torch.int32),
            query_lens=[1] * len(items),
            key_lens=key_lens,
            block_size=self.block_size,
            context_lens=self._to_device(key_lens, torch.int32),
            block_tables=self._block_tables(items),
        )
        return (
            self._to_device([item.seq.token_ids[item.start] for item in items], torch.int64),
            self._to_device([item.start for item in items], torch.int64),
            context,
        )

    def _slot(self, item: ScheduledSequence) -> int:
        """The slot of a decoded token: it stands at position `start`."""
        block, offset = divmod(item.start, self.block_size)
        return item.seq.block_table[block] * self.block_size + offset

    def _slots(self, item: ScheduledSequence) -> Iterator[int]:
        """The slots of positions start .. end - 1."""
        position = item.start
        while position < item.end:
            block, offset = divmod(position, self.block_size)
            count = min(self.block_size - offset, item.end - position)
            first = item.seq.block_table[block] * self.block_size + offset
            yield from range(first, first + count)
            position += count

    def _block_tables(self, items: list[ScheduledSequence]) -> Tensor:
        """int32 [num_seqs, longest table], padded with -1."""
        tables = [item.seq.block_table for item in items]
        width = max(map(len, tables))
        return self._to_device(
            [table + [-1] * (width - len(table)) for table in tables], torch.int32
        )

    def _sample(self, logits: Tensor, items: list[ScheduledSequence]) -> list[int]:
        """Ids for the rows of logits [num_sampled, vocab_size], one row an item."""
        temperatures = [item.seq.params.temperature for item in items]
        if not any(temperatures):
            ids: list[int] = logits.argmax(dim=-1).tolist()
        else:
            ids = sample(logits, self._to_device(temperatures, torch.float32)).tolist()
        return ids

    def _to_device(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """A tensor of host numbers on the model's device."""
        return torch.tensor(values, dtype=dtype).to(self.device)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}, but torch finds no CUDA GPU")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={name!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def _resolve_dtype(requested: str, checkpoint: str, device: torch.device) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if requested != "auto":
        return dtypes[requested]
    if device.type == "cpu":
        return torch.float32
    if checkpoint == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return dtypes[checkpoint]


@contextmanager
def _construction(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New parameters are on `device` in `dtype` within; the process's defaults return after."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)

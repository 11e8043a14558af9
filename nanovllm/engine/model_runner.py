"""ModelRunner: turns a scheduled batch into tensors, runs the model, gives back token ids."""

import gc
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.config import Config, check_pool_size
from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.layers.attention import BACKENDS, Attention, select_backend
from nanovllm.layers.embed_head import resolve_and_embed
from nanovllm.layers.filters import Filters, kept_threshold
from nanovllm.layers.logprobs import token_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import MAX_LOGPROBS, SamplingParams
from nanovllm.utils.context import Context
from nanovllm.utils.decode_graphs import DecodeGraphs, DecodeRow, StepInputs, StepTensors
from nanovllm.utils.device import construction, resolve_device, resolve_dtype
from nanovllm.utils.loader import fill_random, load_weights
from nanovllm.utils.memory import CudaBudget, cpu_pool_budget
from nanovllm.utils.outputs import HostOutputs, TokenLogprobs

logger = logging.getLogger("nanovllm")


class Launched(NamedTuple):
    """A step on its way: its tensors are on the host once `done` has come.

    ids: int64 [num_sampled]. token_logprobs: None if no item asks for any.
    """

    batch: Batch
    ids: Tensor
    done: torch.cuda.Event | None
    token_logprobs: TokenLogprobs | None = None

    def token_ids(self) -> list[int]:
        """Wait for the step: the sampled id of each item that samples, in order."""
        if self.done is not None:
            self.done.synchronize()
        ids: list[int] = self.ids.tolist()
        return ids

    def logprobs(self) -> list[dict[int, float] | None] | None:
        """Likewise the log-probabilities by token id: the sampled one first, then the likeliest.

        None for an item that does not ask for them, and altogether if none does.
        """
        if self.token_logprobs is None:
            return None
        if self.done is not None:
            self.done.synchronize()
        return self.token_logprobs.by_row(len(self.ids))


class ModelRunner:
    """Owns every tensor of an engine: the model's parameters, the KV pool, the CUDA graphs.

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
        self.blocks_per_seq = -(-config.max_model_len // self.block_size)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, config.model_config.dtype, self.device)
        self.backend = select_backend(
            config.attention_backend,
            self.device,
            self.dtype,
            self.block_size,
            config.model_config.head_dim,
        )
        self._sampled_rows: dict[int, int] = {}  # of the step launched last, by seq_id
        with self._device_guard():
            budget = CudaBudget(self.device) if self.device.type == "cuda" else None
            self.model = self._load_model()
            self._allocate_step_memory()
            if kernels.usable(self.device):
                self._compile_kernels()
            self.graphs: DecodeGraphs | None = None
            self.num_blocks = config.num_kvcache_blocks
            if self.num_blocks == -1:
                self.num_blocks = self._derive_num_blocks(budget)
            self.kv_cache = self._bind_kv_cache(self.num_blocks)
            if self.device.type == "cuda":
                self._warm_up()
            if self._can_capture():
                self.graphs = self._make_graphs()
                self.graphs.capture(self.graphs.sizes)
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

    @property
    def runs_ahead(self) -> bool:
        """True if `launch` returns before the step is done, so that the next can be prepared."""
        return self.graphs is not None

    def launch(self, batch: Batch) -> Launched:
        """Start a step: store the K/V of its tokens, and sample.

        Its tokens may be ones that the step launched before it samples.

        Of two steps under way, the older one must be read before a third is launched.
        """
        sampling = [item for item in batch.items if item.samples]
        with self._device_guard():
            if batch.is_prefill:
                self._launch_prefill(batch.items, sampling)
            elif self.graphs is not None:
                self.graphs.launch([self._decode_row(item) for item in batch.items])
            else:
                self._launch_decode(batch.items)
            self._sampled_rows = {item.seq.seq_id: row for row, item in enumerate(sampling)}
            return self._read_later(batch, sampling)

    def new_seed(self) -> int:
        """A seed for a request; torch.manual_seed makes them repeatable."""
        return int(torch.randint(1 << 62, (), device="cpu").item())

    def synchronize(self) -> None:
        """Wait until every step that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give the memory back. The runner is of no use afterwards."""
        self.synchronize()
        for name in ("model", "kv_cache", "graphs", "sampled", "logits", "decode_workspace"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- setting up

    def _device_guard(self) -> AbstractContextManager[object]:
        """Launches within go to this engine's GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _load_model(self) -> Qwen3ForCausalLM:
        with construction(self.device, self.dtype):
            model = Qwen3ForCausalLM(
                self.config.model_config, BACKENDS[self.backend], self.config.max_model_len
            )
        if self.config.load_format == "dummy":
            fill_random(model)
        else:
            load_weights(model, self.config.model_dir)
        return model.eval()

    def _allocate_step_memory(self) -> None:
        """What steps are given from outside the model.

        Logits and sampled ids have one place for all graphs, so that what a replay has left there
        can be read; and the kernels their scratch.
        """
        size, model = self.config.max_num_seqs, self.config.model_config
        on_cuda = self.device.type == "cuda"
        self.sampled = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.logits = torch.empty(size, model.vocab_size, dtype=self.dtype, device=self.device)
        self.host_outputs = [HostOutputs(size, 1 + MAX_LOGPROBS, on_cuda) for _ in range(2)]
        self.embed, self.sample, self.decode_workspace = resolve_and_embed, sample, None
        self.kept_threshold = kept_threshold
        if kernels.usable(self.device):
            from nanovllm.kernels.attention import decode_workspace
            from nanovllm.kernels.embedding import resolve_and_embed as embed_kernel
            from nanovllm.kernels.filters import kept_threshold as threshold_kernel
            from nanovllm.kernels.sampler import sample as sample_kernel
            from nanovllm.kernels.sampler import sample_workspace

            workspace = sample_workspace(size, self.device)
            self.embed, self.sample = embed_kernel, partial(sample_kernel, workspace=workspace)
            self.kept_threshold = threshold_kernel
            self.decode_workspace = decode_workspace(
                size, model.num_heads, model.num_kv_heads, model.head_dim, self.device
            )

    def _derive_num_blocks(self, budget: CudaBudget | None) -> int:
        """How many blocks the memory holds, at most what the largest batch could need on a CPU."""
        block_bytes = self._block_bytes()
        if budget is None:
            num_blocks = min(
                cpu_pool_budget() // block_bytes, self.config.max_num_seqs * self.blocks_per_seq
            )
        else:
            self._bind_kv_cache(1)
            self._run_largest_prefill()
            graph_bytes = budget.growth_of(self._capture_largest) if self._can_capture() else 0
            pool_bytes = budget.pool_bytes(self.config.gpu_memory_utilization, graph_bytes)
            num_blocks = max(0, pool_bytes) // block_bytes
        check_pool_size(num_blocks, self.block_size, self.config.max_model_len)
        return num_blocks

    def _block_bytes(self) -> int:
        model = self.config.model_config
        return (
            2 * model.num_layers * self.block_size * model.num_kv_heads * model.head_dim
            * self.dtype.itemsize
        )  # fmt: skip

    def _bind_kv_cache(self, num_blocks: int) -> Tensor:
        """A pool of num_blocks, each layer's part bound to its attention."""
        model = self.config.model_config
        kv_cache = torch.empty(
            2, model.num_layers, num_blocks, self.block_size, model.num_kv_heads, model.head_dim,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, *kv_cache, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache
        return kv_cache

    def _run_largest_prefill(self) -> None:
        """Run the step that takes the most memory, so that its peak is known; nothing is stored."""
        num_tokens = self.config.max_num_batched_tokens
        num_seqs = min(self.config.max_num_seqs, num_tokens)
        # As many sequences as may be (each has a row of logits), the first as long as may be.
        lengths = [1] * num_seqs
        for index in range(num_seqs):
            lengths[index] = min(self.config.max_model_len, num_tokens - sum(lengths) + 1)
        self._run_empty_prefill(lengths, from_cache=False)

    def _compile_kernels(self) -> None:
        """Compile every kernel that a step of any size launches, so that no later step has to."""
        from nanovllm.kernels.launch import compiling_ahead

        config = self.config
        self._bind_kv_cache(1)
        # Attention that loops over the sequences is no kernel of ours: there fewer sizes differ.
        limit = config.max_num_seqs
        if BACKENDS[self.backend].loops_on_host:
            limit = min(limit, 64)
        inputs = StepInputs(limit, self.blocks_per_seq, self.device)
        layers = self.model.model.layers
        # All launch the same, but for the last one (see Qwen3Model.forward).
        self.model.model.layers = nn.ModuleList([layers[0], layers[-1]])
        with compiling_ahead(self.device):
            for lengths in kernels.dry_prefills(
                config.max_num_batched_tokens, limit, config.max_model_len
            ):
                for from_cache in (False, True):
                    self._run_empty_prefill(lengths, from_cache)
            for size in {min(1 << n, limit) for n in range(limit.bit_length() + 1)}:
                tensors = inputs.tensors(size)
                context = tensors.context(self.block_size, self.decode_workspace, [1] * size)
                self._decode_step(tensors, context)
        self.model.model.layers = layers

    def _warm_up(self) -> None:
        """Run small prefills, so that what PyTorch loads when it is first used is there."""
        for lengths in ([2], [64] * min(2, self.config.max_num_seqs)):
            for from_cache in (False, True):
                self._run_empty_prefill(lengths, from_cache)
        torch.cuda.synchronize(self.device)

    def _run_empty_prefill(self, lengths: list[int], from_cache: bool) -> None:
        """A prefill of zeros that stores nothing; from_cache: it attends to the first block."""
        context = self._prefill_context(lengths, lengths, np.full(sum(lengths), -1))
        if from_cache:
            width = -(-max(lengths) // self.block_size)
            context.block_tables = self._to_device([[0] * width] * len(lengths), torch.int32)
        zeros = self._to_device([0] * sum(lengths), torch.int64)
        rows = zeros[: len(lengths)]
        context.logit_rows = rows
        logits = self.model(zeros, zeros, context, out=self.logits[: len(rows)])
        halves = torch.full_like(rows, 0.5, dtype=torch.float32)
        for filters in (None, Filters(torch.ones_like(rows, dtype=torch.int32), halves, halves)):
            self._sample(logits, halves, rows, rows, filters)
        token_logprobs(logits, self.sampled, rows, min(MAX_LOGPROBS, logits.size(1)))

    # --- CUDA graphs

    def _can_capture(self) -> bool:
        """True if a decode step is a fixed sequence of launches, and wanted as a graph."""
        return (
            kernels.usable(self.device)
            and not BACKENDS[self.backend].loops_on_host
            and not self.config.enforce_eager
        )

    def _make_graphs(self) -> DecodeGraphs:
        return DecodeGraphs(
            self._decode_step,
            self.config.max_num_seqs,
            self.blocks_per_seq,
            self.block_size,
            self.device,
            self.decode_workspace,
        )

    def _capture_largest(self) -> DecodeGraphs:
        """The largest graph, to see what graphs take: smaller ones share its memory."""
        graphs = self._make_graphs()
        graphs.capture(graphs.sizes[-1:])
        return graphs

    def _decode_step(self, inputs: StepTensors, context: Context) -> None:
        """From token ids, or references to them, to sampled token ids: what a graph captures."""
        x, positions = self.embed(
            inputs.sources, self.sampled, inputs.context_lens, self.model.model.embed_tokens.weight
        )
        logits = self.model.decode(x, positions, context, out=self.logits[: len(x)])
        self._sample(logits, inputs.temperatures, inputs.seeds, positions, inputs.filters)

    def _sample(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        filters: Filters | None,
    ) -> None:
        """Fill `sampled`; the arguments have a row for each sequence that samples."""
        thresholds = None
        if filters is not None:
            thresholds = self.kept_threshold(logits, temperatures, *filters)
        out = self.sampled[: len(logits)]
        self.sample(logits, temperatures, seeds, positions, thresholds, out=out)

    def _decode_row(self, item: ScheduledSequence) -> DecodeRow:
        seq = item.seq
        if item.start < len(seq.token_ids):
            source = -1 - seq.token_ids[item.start]
        else:
            source = self._sampled_rows[seq.seq_id]
        return DecodeRow(
            source,
            self._slot(item),
            item.end,
            seq.block_table,
            seq.params.temperature,
            seq.seed,
            self._top_k(seq.params),
            seq.params.top_p,
            seq.params.min_p,
        )

    def _top_k(self, params: SamplingParams) -> int:
        """As a number that fits in int32; 0 if it keeps all."""
        return params.top_k if params.top_k < self.config.model_config.vocab_size else 0

    # --- one step

    def _launch_prefill(
        self, items: list[ScheduledSequence], sampling: list[ScheduledSequence]
    ) -> None:
        input_ids, positions, context = self._prepare_prefill(items)
        logits = self.model(input_ids, positions, context, out=self.logits[: len(sampling)])
        self._sample(
            logits,
            self._to_device([item.seq.params.temperature for item in sampling], torch.float32),
            self._to_device([item.seq.seed for item in sampling], torch.int64),
            self._to_device([item.end - 1 for item in sampling], torch.int64),
            self._filters(sampling),
        )

    def _launch_decode(self, items: list[ScheduledSequence]) -> None:
        self._decode_step(*self._prepare_decode(items))

    def _filters(self, items: list[ScheduledSequence]) -> Filters | None:
        """What each item keeps to sample from; None if all keep everything."""
        params = [item.seq.params for item in items]
        if not any(p.top_k or p.top_p < 1 or p.min_p for p in params):
            return None
        return Filters(
            self._to_device([self._top_k(p) for p in params], torch.int32),
            self._to_device([p.top_p for p in params], torch.float32),
            self._to_device([p.min_p for p in params], torch.float32),
        )

    def _read_later(self, batch: Batch, sampling: list[ScheduledSequence]) -> Launched:
        """Start the copy of what was sampled to the host; two sets of memory take turns."""
        host = self.host_outputs[0]
        self.host_outputs.reverse()
        ids = host.copy_ids(self.sampled[: len(sampling)])
        logprobs = None
        if asked := self._asked_logprobs(sampling):
            rows = self._to_device(list(asked), torch.int64)
            found = token_logprobs(self.logits, self.sampled, rows, max(asked.values()))
            logprobs = host.copy_logprobs(asked, *found)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.current_stream().record_event()
        return Launched(batch, ids, done, logprobs)

    def _asked_logprobs(self, sampling: list[ScheduledSequence]) -> dict[int, int]:
        """The rows that ask for log-probabilities, and for how many likeliest tokens."""
        return {
            row: min(item.seq.params.logprobs, self.config.model_config.vocab_size)
            for row, item in enumerate(sampling)
            if item.seq.params.logprobs is not None
        }

    def _prepare_prefill(self, items: list[ScheduledSequence]) -> tuple[Tensor, Tensor, Context]:
        """input_ids and positions, int64 [num_tokens], and the layout of a prefill step."""
        input_ids = [np.array(item.seq.token_ids[item.start : item.end]) for item in items]
        positions = [np.arange(item.start, item.end) for item in items]
        query_lens = [item.end - item.start for item in items]
        key_lens = [item.end for item in items]
        slots = np.concatenate([self._slots(item) for item in items])
        context = self._prefill_context(query_lens, key_lens, slots)
        if query_lens != key_lens:
            context.block_tables = self._block_tables(items)
        last_rows = [end - 1 for end in accumulate(query_lens)]
        rows = [row for row, item in zip(last_rows, items, strict=True) if item.samples]
        context.logit_rows = self._to_device(rows, torch.int64)
        return (
            self._to_device(np.concatenate(input_ids), torch.int64),
            self._to_device(np.concatenate(positions), torch.int64),
            context,
        )

    def _prefill_context(
        self, query_lens: list[int], key_lens: list[int], slots: np.ndarray
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

    def _prepare_decode(self, items: list[ScheduledSequence]) -> tuple[StepTensors, Context]:
        """The inputs of a decode step and their layout."""
        rows = [self._decode_row(item) for item in items]
        inputs = StepTensors(
            sources=self._to_device([row.source for row in rows], torch.int32),
            slot_mapping=self._to_device([row.slot for row in rows], torch.int32),
            context_lens=self._to_device([row.context_len for row in rows], torch.int32),
            block_tables=self._block_tables(items),
            temperatures=self._to_device([row.temperature for row in rows], torch.float32),
            seeds=self._to_device([row.seed for row in rows], torch.int64),
            filters=self._filters(items),
        )
        key_lens = [row.context_len for row in rows]
        return inputs, inputs.context(self.block_size, self.decode_workspace, key_lens)

    def _slot(self, item: ScheduledSequence) -> int:
        """The slot of a decoded token: it stands at position `start`."""
        block, offset = divmod(item.start, self.block_size)
        return item.seq.block_table[block] * self.block_size + offset

    def _slots(self, item: ScheduledSequence) -> np.ndarray:
        """The slots of positions start .. end - 1."""
        positions = np.arange(item.start, item.end)
        blocks = np.array(item.seq.block_table)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def _block_tables(self, items: list[ScheduledSequence]) -> Tensor:
        """int32 [num_seqs, longest table], padded with -1."""
        tables = [item.seq.block_table for item in items]
        width = max(map(len, tables))
        return self._to_device(
            [table + [-1] * (width - len(table)) for table in tables], torch.int32
        )

    def _to_device(self, values: list[Any] | np.ndarray, dtype: torch.dtype) -> Tensor:
        """A tensor of host numbers on the model's device; from pinned memory no copy waits."""
        if isinstance(values, np.ndarray):
            tensor = torch.from_numpy(values).to(dtype)
        else:
            tensor = torch.tensor(values, dtype=dtype, device="cpu")
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

"""ModelRunner: runs the model on a scheduled batch, and gives back token ids."""

import gc
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.config import Config, check_pool_size
from nanovllm.engine.batch_layout import BatchLayout, dry_prefills, has_filters
from nanovllm.engine.decode_graphs import DecodeGraphs, StepInputs, StepTensors
from nanovllm.engine.outputs import HostOutputs, Launched
from nanovllm.engine.sampling import Sampler, SamplingTensors
from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.layers.attention import BACKENDS, Attention, select_backend
from nanovllm.layers.filters import Filters
from nanovllm.layers.int4 import require_int4
from nanovllm.layers.linear import Linear
from nanovllm.layers.logprobs import ROWS_AT_A_TIME
from nanovllm.layers.moe import MoE
from nanovllm.layers.products import first_sizes
from nanovllm.layers.stored_weight import notes, pack
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils.device import own_modes, resolve_device, to_device
from nanovllm.utils.loader import (
    check_checkpoint,
    checkpoint_shapes,
    errors_name,
    fill_random,
    load_weights,
)
from nanovllm.utils.memory import (
    CudaBudget,
    cpu_pool_budget,
    memory_for,
    require_memory,
    return_freed_memory,
)
from nanovllm.utils.parallel import RankGroup
from nanovllm.utils.timer import logged

logger = logging.getLogger("nanovllm")
_building = Lock()


class ModelRunner:
    """Owns every tensor of an engine, or one rank's: parameters, KV pool, CUDA graphs.

    After construction the model is loaded, its memory measured and the pool allocated:
    `kv_cache` is [2, num_layers, num_blocks, block_size, num_kv_heads, head_dim], with `kv_scales`
    uint8 [2, num_layers, num_blocks, block_size, num_kv_heads] if it is FP8 (else empty), and each
    attention layer has its part bound.

    Args:
        config: the engine's options.
        group: of the ranks that share the model; each does the same as all others.

    Raises:
        ValueError: a device, dtype or back end that this machine does not have; a checkpoint that
            does not fit the model; memory too small for one sequence of max_model_len.
    """

    def __init__(self, config: Config, group: RankGroup | None = None) -> None:
        self.config = config
        self.group = RankGroup() if group is None else group
        self.part = model = config.model_config.split(self.group.size)
        self.block_size = config.kvcache_block_size
        self.blocks_per_seq = -(-config.max_model_len // self.block_size)
        self.device = resolve_device(config.device)
        if model.is_int4:
            require_int4(self.device)
        self.dtype = config.resolve_dtype(self.device)
        self.is_fp8_cache = config.kv_cache_dtype == "fp8"
        case = self.device, self.dtype, self.block_size, model.head_dim, self.is_fp8_cache
        self.backend = select_backend(config.attention_backend, *case)
        self.layout = BatchLayout(self.block_size, config.model_config.vocab_size, self.device)
        # Of a GPU one engine at a time: what it takes shows in the process's memory.
        alone = _building if self.device.type == "cuda" else nullcontext()
        with alone, own_modes(self.device, inference=False):
            self.group.reserve(self._exchanged_bytes(), config.max_num_seqs)
            budget = CudaBudget(self.device) if self.device.type == "cuda" else None
            with memory_for("the weights", "the model is too large for what is free"):
                self.model = self._load_model()
            with memory_for("the logits of a step", "give a smaller max_num_seqs"):
                self._allocate_step_memory()
            if kernels.usable(self.device):
                with logged("Compiling kernels"):
                    self._compile_kernels()
            self.graphs: DecodeGraphs | None = None
            self.num_blocks = config.num_kvcache_blocks
            if self.num_blocks == -1:
                self.num_blocks = self._derive_num_blocks(budget)
            else:
                block_bytes = self._bind_kv_cache(1)
                require_memory("num_kvcache_blocks", self.num_blocks, block_bytes, self.device)
                self.group.least(self.num_blocks)  # all of them have as much
            pool_bytes = self._bind_kv_cache(self.num_blocks)
            if self.device.type == "cuda":
                self._warm_up()
            if self._can_capture():
                self.graphs = self._make_graphs()
                with logged(f"Capturing {len(self.graphs.sizes)} CUDA graphs"):
                    self.graphs.capture(self.graphs.sizes)
        self.group.least(0)  # no rank begins before all are ready
        element = "fp8" if self.is_fp8_cache else str(self.dtype).removeprefix("torch.")
        taken = ", taken as it fills" if self.device.type == "cpu" else ""
        logger.info(
            f"KV pool: {self.num_blocks} blocks of {self.block_size} tokens = "
            f"{self.num_blocks * self.block_size} tokens, {pool_bytes / 2**30:.2f} GiB{taken} on "
            f"{self.device} ({element}, attention: {self.backend})"
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
        memory = memory_for(
            f"a step of {batch.num_tokens} tokens",
            "give a smaller max_num_batched_tokens or max_num_seqs",
            MemoryError,
        )
        with own_modes(self.device, inference=True), memory:
            if batch.is_prefill:
                self._launch_prefill(batch.items, sampling)
            elif self.graphs is not None:
                self.graphs.launch(self.layout.decode_rows(batch.items))
            else:
                self._decode_step(*self.layout.decode(batch.items))
            self._sample_filtered(sampling)
            self.layout.remember_sampled(sampling)
            return self._read_later(batch, sampling)

    def check_weights(self, model_dir: Path) -> None:
        """Raise ValueError, as utils.loader.check_checkpoint, for what load_weights refuses."""
        check_checkpoint(self._shapes, self.model.tie_word_embeddings, model_dir)

    def load_weights(self, model_dir: Path) -> None:
        """Fill the model from another checkpoint. On a GPU its memory, and so the graphs, stay.

        Raises:
            ValueError: as utils.loader.load_weights; some of the parameters may be filled.
        """
        self.synchronize()
        with own_modes(self.device, inference=False):
            self.model.unpack()
            self._fill(self.model, model_dir)
        return_freed_memory()

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
        for name in ("model", "kv_cache", "kv_scales", "graphs", "sampler", "decode_workspace"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- setting up

    def _exchanged_bytes(self) -> int:
        """The most that is summed over the ranks, or gathered, at a time."""
        num_tokens = max(self.config.max_num_batched_tokens, self.config.max_num_seqs)
        most = max(num_tokens * self.part.hidden_size, ROWS_AT_A_TIME * self.part.vocab_size)
        return most * self.dtype.itemsize

    def _load_model(self) -> Qwen3ForCausalLM:
        config, backend = self.config, BACKENDS[self.backend]
        how = backend, config.max_model_len, self.group
        with errors_name(config.model_dir):
            model = Qwen3ForCausalLM(self.part, *how, device=self.device, dtype=self.dtype)
        whole = model
        if self.group.size > 1:
            whole = Qwen3ForCausalLM(config.model_config, backend, 1, device=torch.device("meta"))
        quantization = self.part.quantization
        self._shapes = checkpoint_shapes(whole, quantization is not None and quantization.is_stored)
        with logged(f"Loading {config.model_dir}"):
            if config.load_format == "dummy":
                fill_random(model)
                model.pack()
            else:
                self._fill(model, config.model_dir)
        return_freed_memory()
        for note in notes(model) if self.group.rank == 0 else ():
            logger.info(note)
        return model.eval()

    def _fill(self, model: Qwen3ForCausalLM, model_dir: Path) -> None:
        """From a checkpoint, each module packed as soon as all of it is there."""
        load_weights(model, model_dir, self._shapes, self.group, pack, self.part.is_int4)
        model.pack()

    def _allocate_step_memory(self) -> None:
        """What steps are given from outside the model: a place for logits and ids, scratch."""
        size, model = self.config.max_num_seqs, self.part
        row_bytes = model.vocab_size * self.dtype.itemsize + 16 * (2 + MAX_LOGPROBS)
        require_memory("max_num_seqs", size, row_bytes, self.device)
        on_cuda = self.device.type == "cuda"
        self.sampler = Sampler(size, model.vocab_size, self.group, self.device, self.dtype)
        self.host_outputs = [HostOutputs(size, 1 + MAX_LOGPROBS, on_cuda) for _ in range(2)]
        limits = size, self.config.max_model_len, {"device": self.device, "dtype": self.dtype}
        self.decode_workspace = BACKENDS[self.backend].workspace(model, *limits)

    def _derive_num_blocks(self, budget: CudaBudget | None) -> int:
        """How many blocks the memory holds, at most what the largest batch could need on a CPU."""
        block_bytes = self._bind_kv_cache(1)
        if budget is None:
            largest = self.config.max_num_seqs * self.blocks_per_seq
            budget_bytes = cpu_pool_budget(least=self.blocks_per_seq * block_bytes)
            num_blocks = min(budget_bytes // block_bytes, largest)
        else:
            self._run_largest_prefill()
            later_bytes = budget.growth_of(self._capture_largest) if self._can_capture() else 0
            later_bytes += self.group.nbytes
            pool_bytes = budget.pool_bytes(self.config.gpu_memory_utilization, later_bytes)
            num_blocks = max(0, pool_bytes) // block_bytes
        num_blocks = self.group.least(num_blocks)
        check_pool_size(num_blocks, self.block_size, self.config.max_model_len)
        return num_blocks

    def _bind_kv_cache(self, num_blocks: int) -> int:
        """Make a pool of num_blocks, bind each layer's part to its attention; returns its bytes."""
        model = self.part
        shape = 2, model.num_layers, num_blocks, self.block_size, model.num_kv_heads, model.head_dim
        what = f"a KV pool of {num_blocks} blocks of {self.block_size} tokens"
        with memory_for(
            what,
            "give a smaller num_kvcache_blocks or kvcache_block_size, or max_num_seqs and "
            "max_model_len, of which it is derived on a CPU, or gpu_memory_utilization",
        ):
            dtype = torch.uint8 if self.is_fp8_cache else self.dtype
            kv_cache = torch.empty(shape, dtype=dtype, device=self.device)
            size = shape[:-1] if self.is_fp8_cache else (0,)
            kv_scales = torch.empty(size, dtype=torch.uint8, device=self.device)
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, *kv_cache, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache
        if self.is_fp8_cache:
            for layer, k_scales, v_scales in zip(layers, *kv_scales, strict=True):
                layer.k_scales, layer.v_scales = k_scales, v_scales
        self.kv_cache, self.kv_scales = kv_cache, kv_scales
        return kv_cache.nbytes + kv_scales.nbytes

    def _run_largest_prefill(self) -> None:
        """Run the step that takes the most memory, so that its peak is known; nothing is stored."""
        num_tokens = self.config.max_num_batched_tokens
        num_seqs = min(self.config.max_num_seqs, num_tokens)
        # As many sequences as may be (each has a row of logits), the first as long as may be.
        lengths = [1] * num_seqs
        for index in range(num_seqs):
            lengths[index] = min(self.config.max_model_len, num_tokens - sum(lengths) + 1)
        self._run_empty_prefill(lengths)
        if self.is_fp8_cache:  # from which as many keys as a sequence may have are copied
            self._run_empty_prefill(lengths, [self.config.max_model_len, *lengths[1:]])

    def _compile_kernels(self) -> None:
        """Compile every kernel that a step of any size launches, so that no later step has to."""
        from nanovllm.kernels.launch import compiling_ahead

        config, backend = self.config, BACKENDS[self.backend]
        num_seqs, max_model_len = config.max_num_seqs, config.max_model_len
        inputs = StepInputs(num_seqs, self.blocks_per_seq, self.device)
        self._bind_kv_cache(1)
        layers = self.model.model.layers
        # Those with a like MLP launch the same, but for the last one (see Qwen3Model.forward).
        kinds = {type(layer.mlp): layer for layer in layers[:-1]}
        self.model.model.layers = nn.ModuleList([*kinds.values(), layers[-1]])
        modules = self.model.modules()
        tables = [module.products for module in modules if isinstance(module, (Linear, MoE))]
        sizes: set[int] = set().union(*(first_sizes(table) for table in tables))
        # A decode has as many tokens as sequences: the linear layers are no others.
        limits = max(config.max_num_batched_tokens, num_seqs), num_seqs, max_model_len
        prefills = dry_prefills(sizes | backend.prefill_sizes(max_model_len), *limits)
        # Each plan of decode attention is for four times as many sequences as the one before.
        decodes = sizes | {1 << n for n in range(num_seqs.bit_length())} | {num_seqs}
        if backend.loops_on_host:  # its attention is no kernel, and the head differs up to 64 rows
            decodes = {size for size in decodes if size <= 65}
        with compiling_ahead(self.device):
            for lengths in prefills:
                for key_lens in (None, lengths):
                    self._run_empty_prefill(lengths, key_lens)
            for size in {min(size, num_seqs) for size in decodes}:
                self._decode_step(inputs.tensors(size), [1] * size)
        self.model.model.layers = layers

    def _warm_up(self) -> None:
        """Run small prefills, so that what PyTorch loads when it is first used is there."""
        for lengths in ([2], [64] * min(2, self.config.max_num_seqs)):
            for key_lens in (None, lengths):
                self._run_empty_prefill(lengths, key_lens)
        torch.cuda.synchronize(self.device)

    def _run_empty_prefill(self, lengths: list[int], key_lens: list[int] | None = None) -> None:
        """A prefill of zeros that stores nothing; with key_lens, it attends to the first block."""
        input_ids, context = self.layout.empty_prefill(lengths, key_lens)
        x = self.model.model.embed_tokens(input_ids)
        logits = self.model(x, context, out=self.sampler.logits[: len(lengths)])
        zeros = input_ids[: len(lengths)]
        halves = torch.full_like(zeros, 0.5, dtype=torch.float32)
        filters = Filters(torch.ones_like(zeros, dtype=torch.int32), halves, halves)
        how = SamplingTensors(halves, zeros, zeros, filters)
        self.sampler.sample(logits, how._replace(filters=None))
        if self.group.size == 1:
            self.sampler.sample(logits, how)
        else:
            self.sampler.sample_filtered(zeros, how)
        self.sampler.sampled.zero_()  # garbage, where kernels are only compiled
        self.sampler.logprobs(zeros, min(MAX_LOGPROBS, logits.size(1)))

    # --- CUDA graphs

    def _can_capture(self) -> bool:
        """True if a decode step is a fixed sequence of launches, and wanted as a graph."""
        return (
            kernels.usable(self.device)
            and not BACKENDS[self.backend].loops_on_host
            and not self.config.enforce_eager
        )

    def _make_graphs(self) -> DecodeGraphs:
        step = partial(self._decode_step, key_lens=[])
        return DecodeGraphs(step, self.config.max_num_seqs, self.blocks_per_seq, self.device)

    def _capture_largest(self) -> DecodeGraphs:
        """The largest graph, to see what graphs take: smaller ones share its memory."""
        graphs = self._make_graphs()
        graphs.capture(graphs.sizes[-1:])
        return graphs

    def _decode_step(self, inputs: StepTensors, key_lens: list[int]) -> None:
        """From token ids, or references to them, to sampled token ids: what a graph captures.

        Args:
            key_lens: inputs.context_lens on the host; empty in a graph, which has other ones.
        """
        context = inputs.context(self.block_size, self.decode_workspace, key_lens)
        sources, sampled = inputs.sources, self.sampler.sampled
        x, positions = self.model.model.embed_tokens.resolve(sources, sampled, inputs.context_lens)
        context.positions = positions
        logits = self.model(x, context, out=self.sampler.logits[: len(x)])
        how = SamplingTensors(inputs.temperatures, inputs.seeds, positions, inputs.filters)
        self.sampler.sample(logits, how)

    # --- one step

    def _launch_prefill(
        self, items: list[ScheduledSequence], sampling: list[ScheduledSequence]
    ) -> None:
        input_ids, context = self.layout.prefill(items)
        x = self.model.model.embed_tokens(input_ids)
        logits = self.model(x, context, out=self.sampler.logits[: len(sampling)])
        self.sampler.sample(logits, self.layout.sampling(sampling))

    def _sample_filtered(self, sampling: list[ScheduledSequence]) -> None:
        """What the sampler leaves for later where ranks share the vocabulary."""
        if self.group.size == 1:
            return
        rows = [row for row, item in enumerate(sampling) if has_filters(item.seq.params)]
        if rows:
            how = self.layout.sampling([sampling[row] for row in rows])
            self.sampler.sample_filtered(to_device(rows, torch.int64, self.device), how)

    def _read_later(self, batch: Batch, sampling: list[ScheduledSequence]) -> Launched:
        """Start the copy of what was sampled to the host; two sets of memory take turns."""
        host = self.host_outputs[0]
        self.host_outputs.reverse()
        ids = host.copy_ids(self.sampler.sampled[: len(sampling)])
        logprobs = None
        if asked := self._asked_logprobs(sampling):
            rows = to_device(list(asked), torch.int64, self.device)
            found = self.sampler.logprobs(rows, max(asked.values()))
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

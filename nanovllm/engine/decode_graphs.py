"""DecodeGraphs: a decode step as one CUDA graph, from token ids to sampled token ids."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.layers.filters import Filters
from nanovllm.utils.context import Context

# int32: source, slot, context length, top_k. The bits of float32: temperature, top_p, min_p.
# And seed, an int64 in two.
NUM_FIELDS = 9


class DecodeRow(NamedTuple):
    """What one sequence gives to a decode step.

    source: a row of the ids that the step before sampled, or -1 - token id where the id is known.
    slot: where the token's K/V goes. context_len: its position + 1.
    """

    source: int
    slot: int
    context_len: int
    block_table: list[int]
    temperature: float
    seed: int
    top_k: int
    top_p: float
    min_p: float


class StepInputs:
    """The inputs of a decode step in fixed memory: a packed int32 [fields, rows] and block tables.

    Args:
        max_num_seqs: rows.
        max_blocks: longest block table.
        device: a CUDA device, or "cpu" for the pinned twin that is copied from.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device | str) -> None:
        rows = -(-max_num_seqs // 32) * 32  # every field begins at a multiple of 128 bytes
        self.fields, self.block_tables = (
            torch.zeros(size, dtype=torch.int32, device=device, pin_memory=str(device) == "cpu")
            for size in ((NUM_FIELDS, rows), (max_num_seqs, max_blocks))
        )

    def tensors(self, num_seqs: int) -> "StepTensors":
        """Views of the first rows."""
        sources, slots, context_lens, top_ks = self.fields[:4, :num_seqs]
        temperatures, top_ps, min_ps = self.fields[4:7, :num_seqs].view(torch.float32)
        seeds = self.fields[7:].flatten().view(torch.int64)
        return StepTensors(
            sources=sources,
            slot_mapping=slots,
            context_lens=context_lens,
            block_tables=self.block_tables[:num_seqs],
            temperatures=temperatures,
            seeds=seeds[:num_seqs],
            filters=Filters(top_ks, top_ps, min_ps),
        )


class StepTensors(NamedTuple):
    """A decode step's inputs: int32 [num_seqs], but temperatures float32 and seeds int64.

    block_tables: int32 [num_seqs, max_blocks]. filters: None if no sequence has any. See DecodeRow.
    """

    sources: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    block_tables: Tensor
    temperatures: Tensor
    seeds: Tensor
    filters: Filters | None

    def context(self, block_size: int, workspace: Any, key_lens: list[int]) -> Context:
        """The step's layout; key_lens: context_lens on the host, empty if unknown there."""
        return Context(
            is_prefill=False,
            slot_mapping=self.slot_mapping,
            query_lens=[1] * len(key_lens),
            key_lens=key_lens,
            block_size=block_size,
            context_lens=self.context_lens,
            block_tables=self.block_tables,
            decode_workspace=workspace,
        )


class Staging:
    """Pinned host memory that one step's inputs are written to and copied from."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self.inputs = StepInputs(max_num_seqs, max_blocks, "cpu")
        self.fields = self.inputs.fields.numpy()
        self.floats = self.inputs.fields[4:7].view(torch.float32).numpy()
        self.seeds = self.inputs.fields[7:].flatten().view(torch.int64).numpy()
        self.block_tables = self.inputs.block_tables.numpy()
        self.copied = torch.cuda.Event()

    def write(self, rows: list[DecodeRow], num_padded: int) -> None:
        """Write the rows, then padding up to num_padded: no slot, context length 0."""
        self.copied.synchronize()  # the copy of two steps ago has long been made
        count = len(rows)
        columns = zip(*rows, strict=True)
        sources, slots, context_lens, tables, temperatures, seeds, top_ks, top_ps, min_ps = columns
        self.fields[:4, :count] = np.array((sources, slots, context_lens, top_ks), dtype=np.int32)
        self.floats[:, :count] = temperatures, top_ps, min_ps
        self.seeds[:count] = seeds
        for row, table in zip(self.block_tables, tables, strict=False):
            row[: len(table)] = table
        padding = slice(count, num_padded)
        self.fields[0, padding] = -1
        self.fields[1, padding] = -1
        self.fields[2, padding] = 0
        self.floats[0, padding] = 0  # such rows are not filtered

    def copy_to(self, target: StepInputs, num_seqs: int) -> None:
        """Start the copy of the first rows to the device."""
        target.fields.copy_(self.inputs.fields, non_blocking=True)
        tables = self.inputs.block_tables[:num_seqs]
        target.block_tables[:num_seqs].copy_(tables, non_blocking=True)
        self.copied.record()


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture; a step is padded to the next one.

    Others are left out because they gain nothing: on an H100, with the shapes of Qwen3-0.6B and 8B,
    matrix products of nearly all sizes in between take as long as those of the next one.
    """
    sizes = [1, 2, 4, 8, 16, 48, *range(64, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Captures a decode step for every size in graph_sizes, and replays them.

    Two sets of pinned memory take turns, so that the inputs of the next step can be written while
    this one's are still being copied.

    Args:
        step: computes a decode step with a fixed sequence of launches, and leaves the sampled ids
            where the next step's `sources` point to.
        max_num_seqs, max_blocks: the largest step.
        device: a CUDA device.
    """

    def __init__(
        self,
        step: Callable[[StepTensors], object],
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self.step = step
        self.sizes = graph_sizes(max_num_seqs)
        self.inputs = StepInputs(max_num_seqs, max_blocks, device)
        self.staging = [Staging(max_num_seqs, max_blocks) for _ in range(2)]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, sizes: list[int]) -> None:
        """Capture graphs, the largest first: the smaller ones then need no memory of their own."""
        self.inputs.fields[0] = -1
        self.inputs.fields[1] = -1
        for size in sorted(sizes, reverse=True):
            tensors = self.inputs.tensors(size)
            self.step(tensors)  # compiles and loads what cannot be while capturing
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                self.step(tensors)
            self.graphs[size] = graph

    def launch(self, rows: list[DecodeRow]) -> None:
        """Start the step of these rows."""
        size = next(size for size in self.sizes if size >= len(rows))
        staging = self.staging[0]
        self.staging.reverse()
        staging.write(rows, size)
        staging.copy_to(self.inputs, size)
        self.graphs[size].replay()

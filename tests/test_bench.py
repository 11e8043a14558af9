"""bench.py runs, and its floor counts what a run must read and compute."""

import json
import random
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, random_prompts, watched

from nanovllm import SamplingParams
from nanovllm.layers import stored_weight
from nanovllm.layers.moe import MoE, route

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402

MACHINE = bench.Machine(read_bytes_per_s=1e9, flops_per_s=1e10)
FLOAT32 = 4


def test_bench_prints_throughput_and_share_of_the_floor(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.Machine, "measure", lambda *_: MACHINE)
    sizes = "--num-seqs 4 --input-len 20 --output-len 8 --max-model-len 64 --repeat 2 --profile"
    argv = ["bench.py", "--device", "cpu", "--model", str(tiny_model), *sizes.split()]
    figures = tmp_path / "figures.jsonl"
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(figures)])
    bench.main()
    printed = capsys.readouterr().out
    recorded = [json.loads(line) for line in figures.read_text().splitlines()]
    assert len(recorded) == 2
    for run in recorded:
        assert (run["num_seqs"], run["input_len"], run["output_len"]) == (4, [20, 20], [8, 8])
        assert f"Throughput: {run['tok_s']:.2f}tok/s" in printed
        assert f"reached: {run['floor_share']:.1%}" in printed
    assert len(re.findall(r"Total: 32tok, Time: [\d.]+s, Throughput: [\d.]+tok/s", printed)) == 3
    assert len(re.findall(r"7 decode steps, 1 prefill steps.*reached: [\d.]+%", printed)) == 3
    # Before the first run, a prompt of 20 tokens was completed up to 64.
    assert re.findall(r"num_generated_tokens (\d+)", printed) == ["76", "108", "140"]
    assert len(re.findall(r"Stats so far: num_waiting 0, .*prefix_hit_rate 0\.\d+, ", printed)) == 3
    assert re.search(r"linear layers +[\d.]+s +\d+ calls", printed)


def test_the_floor_counts_the_experts_that_are_read(checkpoint: CheckpointFactory) -> None:
    """As their expectation: over some steps that is what there is."""
    more = (("num_experts", 12), ("num_experts_per_tok", 3), ("moe_intermediate_size", 24))
    spec = ModelSpec("Qwen3Moe", num_layers=3, more=(*more, ("mlp_only_layers", (1,))))
    bytes_a_layer: list[int] = []
    with watched(checkpoint(spec)) as (llm, _):
        shares = bench.expert_shares(llm, random.Random(0))
        assert [round(float(share.sum()), 6) for share in shares] == [3.0, 3.0]
        assert llm.model_runner is not None
        layers = [llm.model_runner.model.model.layers[index].mlp for index in (0, 2)]

        def count(layer: MoE, logits: torch.Tensor) -> None:
            _, chosen = route(logits, layer.num_chosen, layer.renormalized)
            num_bytes = layer.experts.gate_up.weight[0].nbytes + layer.experts.down.weight[0].nbytes
            bytes_a_layer.append(len(chosen.unique()) * num_bytes)

        for layer in layers:
            layer.gate.register_forward_hook(lambda _, __, out, layer=layer: count(layer, out))
        for prompt in random_prompts([9] * 5, spec.vocab_size):
            llm.add_request(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        llm.step()
        bytes_a_layer.clear()
        floor = bench.Floor(llm, MACHINE, shares)
        llm.observers.append(floor.observe)
        while not llm.is_finished():
            llm.step()
        rest = floor.num_decode_steps * floor.weight_bytes / MACHINE.read_bytes_per_s
        expected = floor.weights_s - rest
        assert sum(bytes_a_layer) / MACHINE.read_bytes_per_s == pytest.approx(expected, rel=0.1)
        config = llm.config.model_config
        dense = 2 * config.hidden_size * config.num_heads * config.head_dim
        dense += 2 * config.hidden_size * config.num_kv_heads * config.head_dim
        sparse = config.hidden_size * (12 + 3 * 3 * 24)
        mlp = 3 * config.hidden_size * config.intermediate_size
        assert floor.flops_per_token == 2 * (3 * dense + 2 * sparse + mlp)


@pytest.mark.parametrize("dense", [(), (0,), (1,), (0, 1)], ids=str)
def test_the_floor_of_a_last_layer_with_and_without_experts(
    dense: tuple[int, ...], checkpoint: CheckpointFactory
) -> None:
    """A chunk that nothing is sampled from needs K and V of the last layer, and no head."""
    more = (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 24))
    model = checkpoint(ModelSpec("Qwen3Moe", more=(*more, ("mlp_only_layers", dense))))
    with watched(model, max_num_batched_tokens=8) as (llm, _):
        floor = bench.Floor(llm, MACHINE, bench.expert_shares(llm, random.Random(0)))
        config = llm.config.model_config
        size = config.hidden_size
        attention = 2 * size * config.num_heads * config.head_dim
        mlp = 3 * size * (config.intermediate_size if 1 in dense else 2 * 24)
        router = 0 if 1 in dense else 4 * size
        assert floor.flops_per_last == 2 * (attention + mlp + router)
        read = attention + (mlp if 1 in dense else router) + config.vocab_size * size
        assert floor.last_bytes == FLOAT32 * read


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
@pytest.mark.parametrize("is_kept", [True, False], ids=["FP8", "dequantised"])
def test_of_fp8_weights_the_bytes_are_those_that_are_stored(
    is_kept: bool, kind: str, checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 96))
    model = checkpoint(ModelSpec(kind, more=more if kind == "Qwen3Moe" else ()))
    shares = [torch.full((4,), 0.5)] * 2 if kind == "Qwen3Moe" else []
    with watched(model) as (llm, _):
        plain = bench.Floor(llm, MACHINE, shares)
    if is_kept:  # as on a GPU that has kernels for them
        monkeypatch.setattr(stored_weight, "is_kept", lambda *_: True)
    with watched(model, quantization="fp8") as (llm, _):
        floor = bench.Floor(llm, MACHINE, shares)
        config, layers = llm.config.model_config, llm.model_runner.model.model.layers
    assert floor.flops_per_token == plain.flops_per_token
    assert floor.flops_per_last == plain.flops_per_last
    if not is_kept:
        assert (floor.weight_bytes, floor.last_bytes, floor.expert_bytes) == (
            plain.weight_bytes, plain.last_bytes, plain.expert_bytes
        )  # fmt: skip
        return
    assert layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn

    def saved(*shapes: tuple[int, int, int, int]) -> int:
        """By weights of so many rows and inputs, in blocks of so many."""
        return sum(
            3 * m * n - FLOAT32 * (m // rows) * (n // inputs) for m, n, rows, inputs in shapes
        )

    size, width = config.hidden_size, config.num_kv_heads * config.head_dim
    q_size, mlp = 2 * width, config.intermediate_size
    attention = [(q_size, size, 64, 64), (size, q_size, 64, 128)]
    gated = [(2 * mlp, size, 32, 64), (size, mlp, 64, 32)]
    dense = gated if kind == "Qwen3" else []
    assert plain.weight_bytes - floor.weight_bytes == 2 * saved(
        *attention, (2 * width, size, 64, 64), *dense
    )
    assert plain.last_bytes - floor.last_bytes == saved(*attention, *dense)
    assert plain.expert_bytes - floor.expert_bytes == (saved(*gated) if kind == "Qwen3Moe" else 0)


@pytest.mark.parametrize("tied", [True, False])
def test_decode_floor_is_weights_and_keys_and_values(
    checkpoint: CheckpointFactory, tied: bool
) -> None:
    """The output head is read as a whole; of an input embedding only rows are, tied or not."""
    spec = ModelSpec(tied=tied)
    lengths = [5, 40]
    with watched(checkpoint(spec)) as (llm, _):
        assert llm.model_runner is not None
        layers = sum(p.numel() for p in llm.model_runner.model.model.layers.parameters())
        floor = bench.Floor(llm, MACHINE)
        for prompt in random_prompts(lengths, spec.vocab_size):
            llm.add_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        floor.count(llm.scheduler.schedule())  # prefill
        for seq in llm.scheduler.running:
            seq.append_token(1)
        floor.count(llm.scheduler.schedule())  # the first decode: each has one token more
    read = layers + spec.hidden_size + spec.vocab_size * spec.hidden_size
    assert floor.weights_s == pytest.approx(read * FLOAT32 / 1e9)
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * FLOAT32
    assert floor.kv_s == pytest.approx((sum(lengths) + len(lengths)) * token_bytes / 1e9)


def test_shared_blocks_count_once(tiny_model: Path) -> None:
    with watched(tiny_model, kvcache_block_size=16) as (llm, _):
        floor = bench.Floor(llm, MACHINE)
        tables = [[0, 1, 2], [0, 1, 3], [4]]
        items = [
            SimpleNamespace(seq=SimpleNamespace(block_table=table), end=end)
            for table, end in zip(tables, [40, 45, 10], strict=True)
        ]
        # 32 shared tokens, then 8, 13 and 10 of their own.
        assert floor._distinct_tokens(SimpleNamespace(items=items)) == 32 + 8 + 13 + 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_floor_of_an_fp8_cache_is_its_values_and_their_scales(
    dtype: str, tiny_model: Path
) -> None:
    with watched(tiny_model, kv_cache_dtype="fp8", dtype=dtype) as (llm, _):
        config = llm.config.model_config
        rows = 2 * config.num_layers * config.num_kv_heads
        assert bench.Floor(llm, MACHINE).token_bytes == rows * (config.head_dim + 1)


def floor_of_two_chunks(model: Path, machine: bench.Machine) -> tuple[bench.Floor, float]:
    """Of a prompt of 10 tokens, whose second chunk samples; and prefill_s of the first chunk."""
    with watched(model, max_num_batched_tokens=6) as (llm, _):
        floor = bench.Floor(llm, machine)
        llm.add_request(random_prompts([10], ModelSpec().vocab_size)[0])
        floor.count(llm.scheduler.schedule())
        first_chunk_s = floor.prefill_s
        floor.count(llm.scheduler.schedule())
    return floor, first_chunk_s


def test_prefill_floor_is_arithmetic(tiny_model: Path) -> None:
    """Only the token that is sampled from goes through the whole model."""
    spec = ModelSpec()
    machine = bench.Machine(read_bytes_per_s=1e30, flops_per_s=1.0)
    floor, _ = floor_of_two_chunks(tiny_model, machine)
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    kv_proj = spec.hidden_size * 2 * kv_size
    per_layer = kv_proj + spec.hidden_size * (2 * q_size + 3 * spec.intermediate_size)
    before_last = 10 * (spec.num_layers - 1) * per_layer
    linear = 2 * (before_last + 10 * kv_proj + per_layer - kv_proj)
    attention = 4 * q_size * ((10 * 11 / 2) * (spec.num_layers - 1) + 10)
    assert floor.prefill_s == linear + attention + 2 * spec.vocab_size * spec.hidden_size
    assert floor.linear_s == 2 * 10 * per_layer * spec.num_layers


def test_prefill_floor_of_few_tokens_is_the_weights_they_need(tiny_model: Path) -> None:
    """A chunk that samples nothing ends with the last layer's keys and values."""
    spec = ModelSpec()
    machine = bench.Machine(read_bytes_per_s=1.0, flops_per_s=1e30)
    floor, first_chunk_s = floor_of_two_chunks(tiny_model, machine)
    q_size = spec.num_heads * spec.head_dim
    rest = spec.hidden_size * (2 * q_size + 3 * spec.intermediate_size + spec.vocab_size)
    assert floor.prefill_s == first_chunk_s + floor.weight_bytes
    assert first_chunk_s == floor.weight_bytes - rest * FLOAT32


def test_busy_time_counts_what_overlaps_once() -> None:
    spans = [(5.0, 6.0), (1.0, 3.0), (2.0, 2.5), (2.9, 4.0), (6.0, 7.0)]
    assert bench.busy_time(spans) == (pytest.approx(5.0), 6.0)


def test_bench_runs_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no CUDA GPU")
def test_bench_without_the_gpu_it_is_to_use_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="device='cuda', but torch finds no CUDA GPU"):
        bench.main()


def test_the_floor_counts_each_step_once(tiny_model: Path) -> None:
    with watched(tiny_model) as (llm, spy):
        floor = bench.Floor(llm, MACHINE)
        llm.observers.append(floor.observe)
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert (floor.num_prefill_steps, floor.num_decode_steps) == (1, 3)
    assert len(spy.batches) == 4

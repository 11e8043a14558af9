"""Tensor parallelism on CUDA GPUs, against transformers; and ranks that fail there."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TINY,
    CheckpointFactory,
    ModelSpec,
    Tally,
    ask,
    completions,
    random_prompts,
    save_dequantized,
    save_fp8,
)
from test_gpu import GpuReference, compare_tokens, name_of
from test_parallel import experts, is_running, shared_files, wide, workers

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Batch
from nanovllm.layers.device_groups import NcclGroup, PeerGroup

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA GPUs"),
]
SIZES = [
    pytest.param(n, marks=pytest.mark.skipif(n > NUM_GPUS, reason=f"needs {n}")) for n in (2, 4)
]
SPECS = [
    wide("Qwen3", 0, tied=True, num_kv_heads=2, head_dim=32),
    wide("Llama", 3, attention_bias=True, head_dim=32, more=(("mlp_bias", True),)),
    wide("Qwen3Moe", 5, more=experts(16, 4), head_dim=32, initializer_range=0.15),
]

# The engine's logits have errors as transformers' have, and those of each rank's rounded sums.
NUM_ERRORS = 2


def engine(model: Path = TINY, size: int = 2, **options: Any) -> LLM:
    defaults = {"max_num_seqs": 32, "max_model_len": 1024, "gpu_memory_utilization": 0.15}
    return LLM(str(model), tensor_parallel_size=size, **defaults | options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tokens_are_those_of_transformers(
    spec: ModelSpec, dtype: torch.dtype, size: int, checkpoint: CheckpointFactory, tally: Tally
) -> None:
    """With graphs, and in chunks without. Rounding alone may choose other experts now and then."""
    model = checkpoint(spec)
    reference = GpuReference(dtype, model)
    lengths = [1, 2, 16, 17, 60, 255, 256, 257, 400, 700, *range(20, 34)]
    prompts = random_prompts(lengths, spec.vocab_size, seed=5)
    for special in ({}, {"enforce_eager": True, "max_num_batched_tokens": 300}):
        with engine(model, size, dtype=name_of(dtype), **special) as llm:
            assert llm.model_runner is not None
            assert isinstance(llm.model_runner.group, PeerGroup)
            outputs = completions(llm, prompts, max_tokens=60)
        found = compare_tokens(reference, prompts, outputs, NUM_ERRORS)
        for what, number in zip(("positions", "near-ties", "others"), found, strict=True):
            tally.count(f"{size} GPUs {spec.kind} {name_of(dtype)}: {what}", number)
        assert found.num_others <= (found.num_positions // 100 if "Moe" in spec.kind else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_ranks_that_share_fp8_weights_choose_the_tokens_of_transformers(
    spec: ModelSpec, size: int, checkpoint: CheckpointFactory, tmp_path: Path, tally: Tally
) -> None:
    """In steps of up to 16 tokens, in which activations are not rounded to e4m3."""
    model = save_fp8(checkpoint(spec), tmp_path / "fp8")
    reference = GpuReference(torch.bfloat16, save_dequantized(model, tmp_path / "plain"))
    prompts = random_prompts([1, 2, 16, 17, 60, *range(20, 34)], spec.vocab_size, seed=5)
    few = {"max_num_batched_tokens": 16, "max_num_seqs": 16}
    with engine(model, size, dtype="bfloat16", **few) as llm:
        outputs = completions(llm, prompts, max_tokens=60)
    found = compare_tokens(reference, prompts, outputs, NUM_ERRORS)
    for what, number in zip(("positions", "near-ties", "others"), found, strict=True):
        tally.count(f"{size} GPUs FP8 {spec.kind}: {what}", number)
    assert found.num_others <= (found.num_positions // 100 if "Moe" in spec.kind else 0)


@pytest.mark.parametrize("size", SIZES)
def test_sampled_filtered_and_measured_tokens_are_those_of_one_gpu(
    size: int, checkpoint: CheckpointFactory
) -> None:
    """In float32, where rounding changes next to nothing."""
    model = checkpoint(SPECS[0])
    prompts = random_prompts([3, 40, 300] * 4, SPECS[0].vocab_size, seed=1)
    params = [
        SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True, seed=n, **options)
        for n, options in enumerate([{}, {"top_k": 5, "logprobs": 3}, {"top_p": 0.7}] * 4)
    ]
    with engine(model, 1, dtype="float32") as one, engine(model, size, dtype="float32") as several:
        expected = one.generate(prompts, params, use_tqdm=False)
        outputs = several.generate(prompts, params, use_tqdm=False)
    same = [a["token_ids"] == b["token_ids"] for a, b in zip(expected, outputs, strict=True)]
    assert sum(same) >= len(same) - 1
    for a, b in zip(expected, outputs, strict=True):
        if a["token_ids"] == b["token_ids"] and "logprobs" in a:
            for entries, others in zip(a["logprobs"], b["logprobs"], strict=True):
                assert others == pytest.approx(entries, abs=1e-3)


def test_without_peer_memory_by_nccl(
    monkeypatch: pytest.MonkeyPatch, checkpoint: CheckpointFactory
) -> None:
    with engine(dtype="float32") as llm:
        expected = [ask(llm, f"What is {n} + 5?") for n in range(5)]
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with engine(dtype="float32") as llm:
        assert llm.model_runner is not None
        assert isinstance(llm.model_runner.group, NcclGroup)
        assert [ask(llm, f"What is {n} + 5?") for n in range(5)] == expected


@pytest.mark.parametrize("nccl", [False, True], ids=["peers", "nccl"])
def test_a_rank_that_is_killed_in_the_middle_of_a_step(
    nccl: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While rank 0's GPU waits for it. Where peers meet, the GPU is of use again."""
    before = shared_files()
    if nccl:
        monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    llm = engine()
    process = workers(llm)[0]
    killed = 0.0

    def kill(event: str, batch: Batch | None) -> None:
        nonlocal killed
        if event == "scheduled" and llm.stats()["num_generated_tokens"] > 20 and not killed:
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()

    llm.observers.append(kill)
    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
        llm.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=900, ignore_eos=True), False)
    seconds = time.monotonic() - killed
    llm.exit()
    assert not is_running(process.pid)
    assert shared_files() == before
    with capfd.disabled():
        print(f"\n{'nccl' if nccl else 'peers'}: raised {seconds:.2f} s after the kill")
    assert seconds < 5
    if not nccl:
        with engine() as llm:
            assert ask(llm, "What is 1 + 1?")


def test_more_ranks_than_gpus() -> None:
    size = 1 << NUM_GPUS.bit_length()
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"GPUs up to cuda:{size - 1}, but there are {NUM_GPUS}"):
        LLM(str(TINY), tensor_parallel_size=size, device="cuda")
    assert time.monotonic() - started < 5


def test_a_rank_whose_gpu_is_full() -> None:
    free, _ = torch.cuda.mem_get_info(1)
    filled = torch.empty(free - (300 << 20), dtype=torch.uint8, device="cuda:1")
    started = time.monotonic()
    with pytest.raises((ValueError, RuntimeError), match=r"rank 1|KV pool"):
        engine()
    assert time.monotonic() - started < 60
    del filled
    torch.cuda.empty_cache()
    with engine() as llm:
        assert ask(llm, "What is 1 + 1?")


def test_ctrl_c_at_any_moment_leaves_the_engine_right() -> None:
    rng = random.Random(os.getpid())
    prompts = random_prompts([20] * 6, 500)
    num_interrupted = 0
    with engine() as llm:
        expected = ask(llm, "What is 5 + 6?")
        for _ in range(20):
            timer = threading.Timer(rng.uniform(0, 0.2), os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                params = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)
                llm.generate(prompts, params, use_tqdm=False)
            except KeyboardInterrupt:
                num_interrupted += 1
            timer.join()
            assert ask(llm, "What is 5 + 6?") == expected
    assert num_interrupted > 10


def test_load_weights_reaches_every_rank(checkpoint: CheckpointFactory) -> None:
    first, second = (checkpoint(wide("Qwen3", 7, seed=seed, head_dim=32)) for seed in (1, 2))
    prompts = random_prompts([5, 40], wide("Qwen3", 7).vocab_size)
    expected = []
    for model in (first, second):
        with engine(model, 1, dtype="float32") as llm:
            expected.append(completions(llm, prompts, 20))
    with engine(first, dtype="float32") as llm:
        for turn in (0, 1, 0):
            llm.load_weights((first, second)[turn])
            assert completions(llm, prompts, 20) == expected[turn]

"""LLM.load_weights and reset_prefix_cache: a training loop's next checkpoint in the same engine."""

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, completions, greedy, is_idle, random_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner
from nanovllm.utils import loader

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_model_len": 96, "max_num_seqs": 4, "kvcache_block_size": 16
}  # fmt: skip
EXPERTS = (("num_experts", 6), ("num_experts_per_tok", 2), ("moe_intermediate_size", 40))
PROMPTS = random_prompts([50, 17, 33], 300)
PARAMS = [greedy(8), SamplingParams(seed=3, max_tokens=8, logprobs=3, temperature=0.7), greedy(4)]


def use(llm: LLM) -> tuple[list[list[int]], Any, "Rounded"]:
    """Tokens, and log-probabilities as far as rounding lets them be compared."""
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    logprobs = outputs[1]["logprobs"]
    values = [value for found in logprobs for value in found.values()]
    ids = [list(found) for found in logprobs]
    return [output["token_ids"] for output in outputs], ids, Rounded(values)


class Rounded:
    """Numbers that are equal if they are nearly so."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rounded) and self.values == pytest.approx(other.values, abs=1e-4)


@pytest.fixture(params=["untied", "tied", "Qwen2", "Llama", "Qwen3Moe"])
def models(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape, the second in shards."""
    kind = request.param if request.param[0].isupper() else "Qwen3"
    options: dict[str, Any] = {"tied": request.param == "tied", "kind": kind}
    if kind == "Qwen3Moe":
        options["more"] = EXPERTS
    first = checkpoint(ModelSpec(**options))
    return first, checkpoint(ModelSpec(**options, seed=9, max_shard_size="100KB"))


@pytest.fixture
def llm(models: tuple[Path, Path]) -> Iterator[LLM]:
    with LLM(str(models[0]), **OPTIONS) as llm:
        yield llm


def test_new_weights_give_what_a_fresh_engine_gives(llm: LLM, models: tuple[Path, Path]) -> None:
    """With a warm prefix cache, and back again."""
    first = use(llm)
    assert use(llm) == first
    assert llm.stats()["prefix_hit_rate"] > 0
    llm.load_weights(models[1])
    with LLM(str(models[1]), **OPTIONS) as fresh:
        second = use(fresh)
    assert second[0] != first[0]
    assert use(llm) == second
    llm.load_weights(str(models[0]))
    assert use(llm) == first
    assert is_idle(llm)


def test_reset_prefix_cache_forgets_all_prompts(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        for reset, num_cached in ((False, 0), (False, 48), (True, 0), (False, 48)):
            if reset:
                llm.reset_prefix_cache()
            [output, *_] = llm.generate(PROMPTS, greedy(2), use_tqdm=False)
            assert output["num_cached_tokens"] == num_cached


def test_reset_prefix_cache_does_no_harm_to_requests_under_way(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        expected = completions(llm, PROMPTS, 20)
        seq_ids = [llm.add_request(prompt, greedy(20)) for prompt in PROMPTS]
        results: dict[int, list[int]] = {}
        while not llm.is_finished():
            results |= llm.step()[0]
            llm.reset_prefix_cache()
        assert [results[seq_id] for seq_id in seq_ids] == expected
        assert llm.scheduler.block_manager.num_used_blocks == 0


def test_running_requests_are_refused(llm: LLM, models: tuple[Path, Path]) -> None:
    expected = completions(llm, [PROMPTS[0]], 6)
    seq_id = llm.add_request(PROMPTS[0], greedy(6))
    llm.step()
    with pytest.raises(RuntimeError, match="1 requests are under way"):
        llm.load_weights(models[1])
    results: dict[int, list[int]] = {}
    while not llm.is_finished():
        results |= llm.step()[0]
    assert results == {seq_id: expected[0]}
    assert llm.scheduler.num_preemptions == 0
    llm.load_weights(models[1])


def test_another_shape_is_refused_and_the_old_weights_stay(
    llm: LLM, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    expected = use(llm)
    other = checkpoint(ModelSpec(num_layers=3, rope_theta=5e5))
    with pytest.raises(
        ValueError, match=r"num_layers 2, not 3, .*rope .*theta=10000\.0.*, not .*theta=5000"
    ):
        llm.load_weights(other)
    with pytest.raises(ValueError, match=r"config\.json"):
        llm.load_weights(tmp_path)
    assert use(llm) == expected


@pytest.mark.parametrize("fault", ["truncated", "absent", "another shape", "unknown tensor"])
def test_a_checkpoint_whose_files_do_not_fit_leaves_the_weights_as_they_were(
    fault: str, llm: LLM, models: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = use(llm)
    broken = shutil.copytree(models[1], tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    last = broken / sorted(set(index["weight_map"].values()))[-1]
    tensors = load_file(last)
    name = sorted(tensors)[0]
    if fault == "another shape":
        tensors[name] = torch.zeros(3)
    tensors["model.x"] = torch.zeros(3)
    save_file(tensors, last)
    if fault == "truncated":
        last.write_bytes(last.read_bytes()[:-1])
    elif fault == "absent":
        last.unlink()
    with pytest.raises(ValueError, match=r"truncated|missing|has shape|no parameter"):
        llm.load_weights(broken)
    assert use(llm) == expected


def test_after_a_load_that_failed_halfway_only_a_load_helps(
    llm: LLM, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = use(llm)
    read, numbers = loader._read, count()

    def failing(*args: Any) -> Tensor:
        if next(numbers) == 7:
            raise ValueError("the disk is gone")
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "check_checkpoint", lambda *_: None)
        patch.setattr(loader, "check_checkpoint", lambda *_: None)
        patch.setattr(loader, "_read", failing)
        with pytest.raises(ValueError, match="disk is gone"):
            llm.load_weights(models[1])
    for attempt in (
        lambda: use(llm),
        lambda: llm.add_request([1]),
        lambda: next(llm.stream([1])),
        llm.step,
    ):
        with pytest.raises(RuntimeError, match="load_weights failed"):
            attempt()
    llm.reset_prefix_cache()
    llm.load_weights(models[0])
    assert use(llm) == expected
    assert is_idle(llm)

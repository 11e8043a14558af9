"""Engines do not depend on what torch is told around them, and leave it as it was."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, completions, random_prompts
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 4}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "sdpa": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "nothing": nullcontext,
}
PROMPTS = random_prompts([5, 40, 3], 300)
HOT = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=5, seed=1, logprobs=2)


def use(llm: LLM) -> Any:
    return completions(llm, PROMPTS, 8), llm.generate(PROMPTS, HOT, use_tqdm=False)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Any:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        return use(llm)


@pytest.mark.parametrize("stepped_in", MODES)
@pytest.mark.parametrize("made_in", MODES)
def test_the_modes_around_an_engine_do_not_matter(
    made_in: str, stepped_in: str, tiny_model: Path, expected: Any
) -> None:
    with MODES[made_in]():
        llm = LLM(str(tiny_model), **OPTIONS)
    with MODES[stepped_in]():
        found = use(llm)
    assert use(llm) == expected  # and outside of all
    with llm:
        assert found == expected


@pytest.mark.parametrize("loaded_in", MODES)
def test_the_modes_around_load_weights_do_not_matter(
    loaded_in: str, tiny_model: Path, expected: Any, checkpoint: CheckpointFactory
) -> None:
    other = checkpoint(ModelSpec(seed=77))
    with LLM(str(other), **OPTIONS) as llm:
        with MODES[loaded_in]():
            llm.load_weights(tiny_model)
        assert use(llm) == expected


def test_parameters_can_be_written_to_whatever_they_were_made_in(tiny_model: Path) -> None:
    with torch.inference_mode():
        llm = LLM(str(tiny_model), **OPTIONS)
    with llm:
        assert llm.model_runner is not None
        for parameter in llm.model_runner.model.parameters():
            parameter.mul_(1.0)
        llm.model_runner.kv_cache.zero_()


def test_engines_made_in_threads_have_their_own_dtypes(tiny_model: Path) -> None:
    """30 of them, in 4 threads, used as soon as they are there."""
    names = ("float32", "bfloat16", "float16")
    expected = {}
    for name in names:
        with LLM(str(tiny_model), **OPTIONS, dtype=name) as llm:
            expected[name] = completions(llm, PROMPTS, 4)

    def make(index: int) -> None:
        name = names[index % 3]
        with LLM(str(tiny_model), **OPTIONS, dtype=name) as llm:
            assert llm.model_runner is not None
            dtype = getattr(torch, name)
            assert {p.dtype for p in llm.model_runner.model.parameters()} == {dtype}
            assert llm.model_runner.kv_cache.dtype == dtype
            assert completions(llm, PROMPTS, 4) == expected[name]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(30)))
    assert torch.get_default_dtype() == torch.float32


def test_what_torch_is_told_meanwhile_in_another_thread_does_not_matter(
    tiny_model: Path, expected: Any
) -> None:
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            with ExitStack() as stack:
                for mode in ("inference_mode", "autocast", "device"):
                    stack.enter_context(MODES[mode]())

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(3):
            with LLM(str(tiny_model), **OPTIONS) as llm:
                assert use(llm) == expected
    finally:
        stop.set()
        thread.join()


def test_tokenizers_are_loaded_in_several_threads_at_once(text_model: Path) -> None:
    def make(_: int) -> Any:
        with LLM(str(text_model), **OPTIONS) as llm:
            return llm.tokenizer.encode("w5 w6")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(8))) == [[5, 6]] * 8

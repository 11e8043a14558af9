"""The shipped checkpoint answers what its README says, through the engine, on a CPU."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY, load_tasks

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NUM_SEEDS = 20
NUM_INSTANCES = 12  # of each family here; the README's figures are on 100


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return load_tasks()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(TINY), device="cpu", max_model_len=1024) as llm:
        yield llm


def answers(llm: LLM, questions: list[str], temperature: float = 0.0) -> list[str]:
    """The assistant's answers."""
    prompts = [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    params = SamplingParams(temperature=temperature, max_tokens=400)
    return [output["text"] for output in llm.generate(prompts, params, use_tqdm=False)]


def test_the_examples_are_right_greedily(llm: LLM, tasks: ModuleType) -> None:
    questions = [sample.prompt for sample in tasks.EXAMPLES]
    assert questions == ["introduce yourself", "list all prime numbers within 100"]
    assert answers(llm, questions) == [sample.answer for sample in tasks.EXAMPLES]


def test_the_examples_are_right_when_sampled(llm: LLM, tasks: ModuleType) -> None:
    """At the example's temperature, for every one of 20 seeds."""
    questions = [sample.prompt for sample in tasks.EXAMPLES] * NUM_SEEDS
    torch.manual_seed(0)
    expected = [sample.answer for sample in tasks.EXAMPLES] * NUM_SEEDS
    assert answers(llm, questions, temperature=0.6) == expected


def test_held_out_tasks_are_solved(llm: LLM, tasks: ModuleType) -> None:
    """Nine of ten in every family, on instances that training never saw."""
    samples = {family: tasks.held_out(family, NUM_INSTANCES) for family in tasks.FAMILIES}
    asked = [sample for group in samples.values() for sample in group]
    given = dict(
        zip(
            (sample.prompt for sample in asked),
            answers(llm, [sample.prompt for sample in asked]),
            strict=True,
        )
    )
    for family, group in samples.items():
        num_right = sum(given[sample.prompt] == sample.answer for sample in group)
        assert num_right >= 0.9 * len(group), f"{family}: {num_right} of {len(group)}"


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir() if path.is_file()) <= 8 << 20


def test_example_prints_both_answers(
    tasks: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["example.py"])
    runpy.run_path(str(ROOT / "example.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for sample in tasks.EXAMPLES:
        assert f"{sample.prompt}<|im_end|>" in printed
        assert f"Completion: {sample.answer!r}" in printed

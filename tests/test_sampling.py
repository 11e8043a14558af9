"""From logits to tokens: the distribution at a temperature, the argmax at temperature 0."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Reference, completions, greedy
from scipy import stats
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu.sampler import sample as cpu_sample
from nanovllm.layers import sampler

NUM_DRAWS = 20_000
ReferenceFactory = Callable[[Path], Reference]


def sample(logits: Tensor, temperatures: Tensor) -> Tensor:
    """One id a row, each row with a seed of its own."""
    seeds = torch.randint(1 << 62, (len(logits),))
    return sampler.sample(logits, temperatures, seeds, torch.zeros_like(seeds))


@pytest.fixture(params=["twin", "cpu"])
def which_sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sample` is PyTorch's, or the kernel in C."""
    if request.param == "cpu":
        if build.library() is None:
            pytest.skip("no C compiler makes the kernels here")
        monkeypatch.setattr(sampler, "sample", cpu_sample)


each_sampler = pytest.mark.usefixtures("which_sampler")


def temperatures(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def draw(logits: Tensor, temperature: float, num_draws: int = NUM_DRAWS) -> Tensor:
    """How often each token comes [vocab_size]."""
    rows = logits.expand(num_draws, -1)
    ids = sample(rows, torch.full((num_draws,), temperature))
    assert ids.shape == (num_draws,)
    assert ids.dtype == torch.int64
    return ids.bincount(minlength=len(logits))


def p_value(counts: Tensor, logits: Tensor, temperature: float) -> float:
    """Chi-square: how likely counts like these are under softmax(logits / temperature)."""
    expected = (logits.double() / temperature).softmax(dim=0) * counts.sum()
    return float(stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue)


# Each of the tokens is expected over ten times in 20,000 draws at any temperature below.
LOGITS = torch.tensor(
    [0.5, -1.5, 2.0, -0.25, 1.25, 0.0, 1.75, -1.0, 0.75, -0.5, 1.0, -1.25, 1.5, 0.25, -0.75]
)


@each_sampler
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    counts = draw(LOGITS, temperature)
    assert p_value(counts, LOGITS, temperature) > 0.001


def test_the_chi_square_test_would_notice_another_temperature() -> None:
    torch.manual_seed(0)
    assert p_value(draw(LOGITS, 0.75), LOGITS, 0.7) < 0.001


@each_sampler
def test_each_row_has_its_own_temperature() -> None:
    torch.manual_seed(0)
    half = NUM_DRAWS // 2
    logits = LOGITS.expand(NUM_DRAWS, -1)
    ids = sample(logits, temperatures(0.7, 2.5).repeat(half))
    for row, temperature in enumerate((0.7, 2.5)):
        counts = ids[row::2].bincount(minlength=len(LOGITS))
        assert p_value(counts, LOGITS, temperature) > 0.001


@each_sampler
def test_rows_are_drawn_independently() -> None:
    torch.manual_seed(0)
    ids = sample(torch.zeros(NUM_DRAWS, 4), torch.ones(NUM_DRAWS))
    pairs = (ids[::2] * 4 + ids[1::2]).bincount(minlength=16)
    assert float(stats.chisquare(pairs.double().numpy()).pvalue) > 0.001


@each_sampler
def test_temperature_0_is_the_argmax_beside_rows_that_are_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000, 50)
    ids = sample(logits, temperatures(0.0, 1.0).repeat(500))
    assert torch.equal(ids[::2], logits[::2].argmax(dim=-1))
    assert (ids[1::2] != logits[1::2].argmax(dim=-1)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [-1, 0, 1, 7, sampler.PART_SIZE - 1])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_argmax_is_the_first_of_the_largest(num_parts: int, extra: int, dtype: torch.dtype) -> None:
    """With many ties, and with the largest at the borders of parts."""
    size = num_parts * sampler.PART_SIZE + extra
    torch.manual_seed(size)
    x = torch.randint(0, 3, (40, size)).to(dtype)
    borders = [n * sampler.PART_SIZE + d for n in range(num_parts + 1) for d in (-1, 0, 1)]
    for row, column in enumerate(c for c in borders if 0 <= c < size):
        x[row, column] = 9
        x[row, column + 1 :: 3] = 9
    x[-1] = -math.inf
    expected = torch.tensor([row.tolist().index(row.max()) for row in x])
    assert torch.equal(sampler.argmax(x), expected)


@each_sampler
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 1e-60])
def test_a_tiny_temperature_is_the_argmax(temperature: float) -> None:
    torch.manual_seed(0)
    # Distinct by 0.1 at least, so that e^(-0.1 / temperature) is no chance worth mentioning.
    logits = torch.stack([torch.randperm(50) * 0.1 for _ in range(500)])
    ids = sample(logits, temperatures(temperature).expand(500))
    assert torch.equal(ids, logits.argmax(dim=-1))


@each_sampler
@pytest.mark.parametrize("temperature", [1e6, 1e30, 3e38])
def test_a_huge_temperature_is_uniform(temperature: float) -> None:
    torch.manual_seed(0)
    counts = draw(LOGITS, temperature)
    assert float(stats.chisquare(counts.double().numpy()).pvalue) > 0.001


@each_sampler
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.7, 1.0, 100.0])
def test_tokens_at_minus_infinity_never_come(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.full((1000, 20), -math.inf)
    logits[:, 3] = 1.0
    logits[:, 7] = 1.5
    ids = sample(logits, torch.full((1000,), temperature))
    assert set(ids.tolist()) <= {3, 7}
    assert set(ids.tolist()) == ({3, 7} if temperature >= 0.7 else {7})


@each_sampler
def test_one_token_alone_always_comes() -> None:
    logits = torch.full((1000, 20), -math.inf)
    logits[:, 19] = -1e30
    assert (sample(logits, torch.ones(1000)) == 19).all()


@each_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_drawn_from_as_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = LOGITS.to(dtype)
    assert p_value(draw(logits, 0.7), logits, 0.7) > 0.001
    ids = sample(logits[None], temperatures(0.0))
    assert ids.item() == logits.argmax()


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_logits_are_not_changed(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 50).to(dtype)
    before = logits.clone()
    sample(logits, temperatures(0.0, 0.5, 1.0, 2.0))
    assert torch.equal(logits, before)


@each_sampler
def test_noise_depends_on_seed_position_and_token_alone() -> None:
    """A row's draw does not depend on its neighbours, and another position draws anew."""
    torch.manual_seed(0)
    logits = torch.randn(200, 50)
    ones, seeds = torch.ones(200), torch.randint(1 << 62, (200,))
    positions = torch.arange(200)
    ids = sampler.sample(logits, ones, seeds, positions)
    order = torch.randperm(200)
    shuffled = sampler.sample(logits[order], ones, seeds[order], positions[order])
    assert torch.equal(shuffled, ids[order])
    assert not torch.equal(sampler.sample(logits, ones, seeds, positions + 1), ids)
    assert not torch.equal(sampler.sample(logits, ones, seeds + 1, positions), ids)


@each_sampler
@pytest.mark.parametrize("varies", ["seeds", "positions"])
def test_neighbouring_seeds_and_positions_draw_independently(varies: str) -> None:
    """The tokens of one request, or of requests whose seeds follow one another."""
    counting, constant = torch.arange(NUM_DRAWS), torch.full((NUM_DRAWS,), 12345)
    seeds, positions = (counting, constant) if varies == "seeds" else (constant, counting)
    logits, ones = torch.zeros(NUM_DRAWS, 4), torch.ones(NUM_DRAWS)
    ids = sampler.sample(logits, ones, seeds, positions)
    for first, second in ((ids[::2], ids[1::2]), (ids[: NUM_DRAWS // 2], ids[NUM_DRAWS // 2 :])):
        pairs = (first * 4 + second).bincount(minlength=16)
        assert float(stats.chisquare(pairs.double().numpy()).pvalue) > 0.001


@each_sampler
def test_large_logits_do_not_overflow() -> None:
    torch.manual_seed(0)
    shifted = LOGITS + 1e4
    assert p_value(draw(shifted, 0.7), shifted, 0.7) > 0.001


# --- through the engine ----------------------------------------------------------------------


OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 64,
    "kvcache_block_size": 16,
}


def test_a_seed_of_torchs_generator_repeats_a_call(tiny_model: Path) -> None:
    prompts = [[5, 6, 7], [8], [9] * 20]
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    with LLM(str(tiny_model), **OPTIONS) as llm:

        def run(seed: int) -> list[list[int]]:
            torch.manual_seed(seed)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [output["token_ids"] for output in outputs]

        assert run(1) == run(1)
        assert run(1) != run(2)


def test_equal_prompts_are_drawn_for_independently(tiny_model: Path) -> None:
    params = SamplingParams(temperature=5.0, max_tokens=20, ignore_eos=True)
    torch.manual_seed(0)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        outputs = llm.generate([[5, 6, 7]] * 8, params, use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [4.0, 12.0])
def test_the_engines_tokens_follow_the_models_softmax_at_the_temperature(
    temperature: float, tiny_model: Path, reference: ReferenceFactory
) -> None:
    """The first token after a prompt, many times; rare tokens are counted together."""
    prompt, num_draws = [5, 6, 7], 3000
    params = SamplingParams(temperature=temperature, max_tokens=1, ignore_eos=True)
    torch.manual_seed(0)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        outputs = llm.generate([prompt] * num_draws, params, use_tqdm=False)
    found = Counter(output["token_ids"][0] for output in outputs)
    logits = reference(tiny_model).logits(prompt, [0])[0].double()
    expected = (logits / temperature).softmax(dim=0) * num_draws
    common = (expected >= 10).nonzero().flatten().tolist()
    assert len(common) > 5
    observed = [found[token] for token in common]
    likely = [float(expected[token]) for token in common]
    observed.append(num_draws - sum(observed))
    likely.append(num_draws - sum(likely))
    assert float(stats.chisquare(observed, likely).pvalue) > 0.001


def test_a_tiny_temperature_gives_the_greedy_tokens(tiny_model: Path) -> None:
    prompts = [[5, 6, 7], [8]]
    params = SamplingParams(temperature=1e-30, max_tokens=20, ignore_eos=True)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        expected = completions(llm, prompts, max_tokens=20)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected


def test_each_request_has_its_own_temperature(tiny_model: Path) -> None:
    prompts = [[5, 6, 7]] * 12
    hot = SamplingParams(temperature=8.0, max_tokens=20, ignore_eos=True)
    torch.manual_seed(0)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        [expected] = completions(llm, prompts[:1], max_tokens=20)
        outputs = llm.generate(prompts, [greedy(20), hot] * 6, use_tqdm=False)
    is_greedy = [output["token_ids"] == expected for output in outputs]
    assert is_greedy == [True, False] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"kvcache_block_size": 32, "max_num_batched_tokens": 7},
        {"max_num_seqs": 2},
        {"num_kvcache_blocks": 5},
    ],
    ids=str,
)
def test_sampled_tokens_do_not_depend_on_how_they_were_scheduled(
    options: dict[str, int], tiny_model: Path
) -> None:
    prompts = [[5, 6, 7], [8], [9] * 20, [5, 6, 7], [10] * 16]
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)

    def run(**options: Any) -> list[list[int]]:
        with LLM(str(tiny_model), **OPTIONS | options) as llm:
            torch.manual_seed(0)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in options)
            return [output["token_ids"] for output in outputs]

    assert run(**options) == run()

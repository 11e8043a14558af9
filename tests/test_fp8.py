"""FP8 weights: numbers and blocks, checkpoints in Qwen's format, and quantisation while loading.

Models are random, and other ones in each run; NANOVLLM_TEST_SEED repeats a run.
"""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    IS_V5,
    ROOT,
    CheckpointFactory,
    ModelSpec,
    Reference,
    Tally,
    compare_run,
    completions,
    edit_json,
    is_idle,
    random_prompts,
    save_dequantized,
    save_fp8,
    save_tensors,
    tensors_of,
    watched,
)
from safetensors.torch import load_file, save_file
from test_gpu import (
    HALF_DTYPES,
    GpuReference,
    compare_tokens,
    name_of,
)
from test_parallel import FakeGroup, parallel
from test_parity import MAX_LOGITS_ERROR, RUN_SEED
from torch import Tensor, nn

from nanovllm import LLM, kernels
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers import fp8, stored_weight
from nanovllm.layers.attention import BACKENDS
from nanovllm.model_config import ModelConfig, Quantization, read_json
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils import loader
from nanovllm.utils.loader import (
    checkpoint_shapes,
    checkpoint_targets,
    fill_random,
    load_weights,
)
from nanovllm.utils.quantization import E4M3, Dequantized, Fp8Weight, quantize

E4M3_NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
E4M3_NUMBERS = E4M3_NUMBERS[E4M3_NUMBERS.isfinite()].unique()
NUM_TOKENS = 16  # of a completion, where nothing else is said
Fp8Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def fp8_checkpoint(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Fp8Factory:
    """fp8_checkpoint(spec, ...) -> save_fp8 of a checkpoint, made once a run."""
    made: dict[Any, Path] = {}

    def make(spec: ModelSpec, kept: tuple[str, ...] = (), in_shards: bool = False) -> Path:
        key = spec, kept, in_shards
        if key not in made:
            target = tmp_path_factory.mktemp("fp8") / "model"
            made[key] = save_fp8(checkpoint(spec), target, kept, in_shards)
        return made[key]

    return make


# --- quantize --------------------------------------------------------------------------------


def spread(scales: Tensor, num_rows: int, input_size: int) -> Tensor:
    """The scale of each number, float64."""
    blocks = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return blocks[:num_rows, :input_size]


def check_quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each number is the nearest that e4m3 has to what float64 says, as far as float32 tells."""
    values, scales = quantize(weight, "w")
    num_rows, input_size = weight.shape
    assert (values.dtype, scales.dtype) == (E4M3, torch.float32)
    assert values.shape == weight.shape
    assert scales.shape == (-(-num_rows // 128), -(-input_size // 128))
    for row in range(scales.size(0)):
        for column in range(scales.size(1)):
            part = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            largest = weight[part].double().abs().max()
            assert scales[row, column].double() == pytest.approx(float(largest / 448), rel=1e-6)
            largest_value = values[part].float().abs().max()
            assert largest_value == (448 if largest > 0 else 0)
    scale_of = spread(scales, num_rows, input_size)
    exact = weight.double() / scale_of.where(scale_of > 0, 1.0)
    errors = (values.double() - exact).abs()
    places = torch.searchsorted(E4M3_NUMBERS, exact).clamp(1, len(E4M3_NUMBERS) - 1)
    around = torch.stack([E4M3_NUMBERS[places - 1], E4M3_NUMBERS[places]])
    nearest = (around - exact).abs().amin(dim=0)
    assert (errors <= nearest + 1e-6 * exact.abs()).all()
    return values, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (127, 129), (200, 77), (3, 300)])
def test_numbers_are_rounded_to_the_nearest_and_the_largest_of_a_block_is_448(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator)
    weight *= 10 ** torch.randn(shape, generator=generator)  # e4m3's subnormals among them
    values, scales = check_quantized(weight.to(dtype))
    back = Fp8Weight.empty(*shape, row_step=shape[0], device=weight.device)
    back.fill(values, scales, [0, 0])
    expected = values.double() * spread(scales, *shape)
    torch.testing.assert_close(back.dequantized(torch.float32), expected.float(), rtol=0, atol=0)


def test_each_number_of_e4m3_stays_itself() -> None:
    positive = E4M3_NUMBERS[E4M3_NUMBERS >= 0].float()
    numbers = torch.stack([positive, -positive])
    for scale in (1.0, 2.0**-20, 2.0**60):
        values, scales = check_quantized(numbers * scale)
        assert (scales == scale).all()
        assert torch.equal(values.float(), numbers)


def test_blocks_of_zeros_tiny_and_huge_ones() -> None:
    weight = torch.randn(130, 4 * 128, generator=torch.Generator().manual_seed(0))
    for block, factor in enumerate((0.0, 1e-30, 1e30, 1.0)):
        weight[:, 128 * block : 128 * block + 128] *= factor
    weight[128:, 384:] = 0
    _, scales = check_quantized(weight)
    assert (scales == 0).tolist() == [[True, False, False, False], [True, False, False, True]]
    smallest, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    check_quantized(torch.tensor([[largest, -largest, 1.0]]))
    values, scales = quantize(torch.tensor([[smallest, -smallest / 2, 1e-45]]), "w")
    assert (values.double() * scales.double()).tolist()[0] == pytest.approx(
        [smallest, -smallest / 2, 0], rel=1e-4
    )


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (129, 2), (5, 199)])
def test_what_is_not_finite_is_refused_by_name(wrong: float, place: tuple[int, int]) -> None:
    weight = torch.randn(130, 200)
    weight[place] = wrong
    with pytest.raises(ValueError, match=r"'model\.x\.weight' holds infinite numbers or NaN"):
        quantize(weight, "model.x.weight")


# --- Fp8Weight -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "row_step", "block"),
    [
        ((256, 384), 128, (128, 128)),
        ((256, 384), 64, (64, 128)),
        ((192, 96), 192, (64, 32)),
        ((200, 77), 100, (4, 1)),
        ((3, 256, 96), 128, (128, 32)),
    ],
)
def test_blocks_divide_the_parts_that_are_filled(
    shape: tuple[int, ...], row_step: int, block: tuple[int, int]
) -> None:
    weight = Fp8Weight.empty(*shape, row_step=row_step, device=torch.device("cpu"))
    assert weight.block == block
    assert weight.shape == shape
    *stack, num_rows, input_size = shape
    assert weight.scales.shape == (*stack, num_rows // block[0], input_size // block[1])


def test_parts_are_views_filled_from_where_they_lie_in_a_checkpoints_blocks() -> None:
    """Rows 96-191 and inputs 80-159 of one matrix over rows 0-95 and inputs 160-239 of another."""
    generator = torch.Generator().manual_seed(1)
    whole = [quantize(torch.randn(300, 240, generator=generator), "w") for _ in range(2)]
    weight = Fp8Weight.empty(192, 80, row_step=96, device=torch.device("cpu"))
    first, second = weight.split([96, 96])
    (values, scales), (other_values, other_scales) = whole
    first.fill(values[96:192, 80:160], scales[:2], [96, 80])
    second.fill(other_values[:96, 160:240], other_scales[:1, 1:], [0, 32])
    exact = [v.float() * spread(s, 300, 240).float() for v, s in whole]
    expected = torch.cat([exact[0][96:192, 80:160], exact[1][:96, 160:240]])
    assert torch.equal(weight.dequantized(torch.float32), expected)
    assert torch.equal(weight.dequantized(torch.bfloat16), expected.bfloat16())


def test_a_stack_is_dequantised_matrix_by_matrix() -> None:
    stack = Fp8Weight.empty(3, 64, 96, row_step=32, device=torch.device("cpu"))
    matrices = [torch.randn(64, 96, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for number, matrix in enumerate(matrices):
        part = Fp8Weight(stack.values[number], stack.scales[number])
        part.fill(*quantize(matrix, "w"), [0, 0])
        expected = part.dequantized(torch.float32)
        assert torch.equal(stack.dequantized(torch.float32)[number], expected)
        assert (expected - matrix).abs().max() < matrix.abs().max() / 16


# --- against transformers --------------------------------------------------------------------

KINDS = ["Qwen3", "Qwen2", "Llama", "Mistral", "Qwen3Moe", "Qwen3", "Qwen3Moe"]


def random_spec(index: int, is_divisible: bool) -> ModelSpec:
    """Some sizes over 128; is_divisible: 128 divides all that blocks cut."""
    rng = random.Random(f"{RUN_SEED}-fp8-{index}-{is_divisible}")
    kind = KINDS[index]
    heads = [(4, 4, 32), (8, 4, 32), (4, 2, 64), (2, 1, 128)] if is_divisible else [
        (3, 1, 24), (4, 2, 40), (8, 2, 18), (6, 3, 50),
    ]  # fmt: skip
    num_heads, num_kv_heads, head_dim = rng.choice(heads)
    hidden_size = rng.choice([128, 256]) if is_divisible else rng.randint(100, 280)
    # What transformers asks for; its grouped product wants multiples of 16 bytes.
    hidden_size -= hidden_size % {"Llama": num_heads, "Qwen3Moe": 4}.get(kind, 1)
    more: dict[str, Any] = {}
    if kind == "Qwen3Moe":
        size = rng.choice([128, 256]) if is_divisible else 4 * rng.randint(25, 70)
        more = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": size}
        more |= {"norm_topk_prob": index % 2 == 0, "mlp_only_layers": (0,) if index > 4 else ()}
    if kind == "Mistral":
        more = {"sliding_window": None}
    return ModelSpec(
        kind=kind,
        vocab_size=rng.randint(200, 400),
        hidden_size=hidden_size,
        intermediate_size=rng.choice([128, 256, 384]) if is_divisible else rng.randint(100, 300),
        num_layers=rng.choice([1, 2]) if index != 6 else 2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tied=(index + is_divisible) % 2 == 0,
        attention_bias=kind == "Llama",
        rms_norm_eps=1e-5,
        initializer_range=(2.4 if kind == "Qwen3" else 1.2) / hidden_size**0.5,
        file_dtype=["float32", "bfloat16", "float16"][index % 3],
        max_shard_size="200KB" if index % 3 == 1 else "5GB",
        seed=rng.randrange(10**6),
        more=tuple(more.items()),
    )


DIVISIBLE = [random_spec(index, True) for index in range(len(KINDS))]
CUT = [random_spec(index, False) for index in range(len(KINDS))]


@pytest.fixture(autouse=True)
def _print_seed() -> None:
    """Shown with a failure."""
    print(f"NANOVLLM_TEST_SEED={RUN_SEED}")


def prompts_for(spec: ModelSpec) -> list[list[int]]:
    return random_prompts([1, 15, 16, 40, 90], spec.vocab_size, spec.seed)


def check_parity(
    model: Path, reference: Reference, spec: ModelSpec, tally: Tally, **options: Any
) -> None:
    """Logits and greedy tokens of an engine are the reference's."""
    prompts = prompts_for(spec)
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8} | options
    with watched(model, kvcache_block_size=16, **options) as (llm, spy):
        outputs = completions(llm, prompts, NUM_TOKENS)
        found = compare_run(reference, spy, prompts, outputs)
    tally.count("FP8: tokens compared with transformers", found.num_positions)
    tally.count("FP8: near-ties let pass", found.num_near_ties)
    tally.count("FP8: positions behind a near-tie of two experts", found.num_near_routes)
    tally.maximum("FP8: logits error, of the logits' scale", found.max_logits_error)
    assert found.max_logits_error < MAX_LOGITS_ERROR


@pytest.mark.slow
@pytest.mark.skipif(not IS_V5, reason="transformers 4 reads FP8 checkpoints on GPUs only")
@pytest.mark.parametrize("spec", DIVISIBLE, ids=str)
def test_an_fp8_checkpoint_is_what_transformers_reads_from_it(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, tally: Tally
) -> None:
    model = fp8_checkpoint(spec, in_shards=spec.tied)
    reference = Reference(model)
    reference.model.float()  # what is not quantised it leaves in the checkpoint's dtype
    check_parity(model, reference, spec, tally)


@pytest.mark.slow
@pytest.mark.parametrize("spec", CUT, ids=str)
def test_blocks_that_are_cut_at_the_edges_stand_for_what_their_scales_say(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    """Against transformers on the checkpoint that the test itself has dequantised."""
    model = fp8_checkpoint(spec, in_shards=spec.tied)
    plain = save_dequantized(model, tmp_path / "plain")
    check_parity(model, Reference(plain), spec, tally)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_may_be_half_as_long(
    dtype: torch.dtype, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    """As in Qwen's own checkpoints."""
    spec = CUT[0]
    tensors = tensors_of(fp8_checkpoint(spec))
    scales = {name: t.to(dtype) for name, t in tensors.items() if name.endswith("_scale_inv")}
    files = {"model.safetensors": tensors | scales}
    model = save_tensors(fp8_checkpoint(spec), tmp_path / "model", files)
    check_parity(model, Reference(save_dequantized(model, tmp_path / "plain")), spec, tally)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CUT[0], DIVISIBLE[4], CUT[6]], ids=str)
def test_an_fp8_checkpoint_differs_from_what_it_was_made_of(
    spec: ModelSpec, checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory, tally: Tally
) -> None:
    """Or else the tests above would compare nothing."""
    with pytest.raises(AssertionError):
        check_parity(fp8_checkpoint(spec), Reference(checkpoint(spec)), spec, tally)


KEPT = ("o_proj", "mlp.down_proj", "model.layers.1.self_attn")


@pytest.mark.slow
def test_modules_that_were_not_converted_stay_as_they_are(
    checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    spec = ModelSpec(hidden_size=150, intermediate_size=200)
    model = fp8_checkpoint(spec)
    tensors, plain = tensors_of(model), tensors_of(checkpoint(spec))
    names = [name for name in tensors if name.endswith("_scale_inv")]
    kept = [name for name in names if "o_proj" in name or "down_proj" in name or "1.self_" in name]
    assert 0 < len(kept) < len(names)
    for name in kept:
        del tensors[name]
        tensors[name.removesuffix("_scale_inv")] = plain[name.removesuffix("_scale_inv")]
    mixed = save_tensors(model, tmp_path / "mixed", {"model.safetensors": tensors})
    config = read_json(mixed / "config.json")["quantization_config"]
    for names in (list(KEPT), [*KEPT, "model.norm", "model.layers.0.input_layernorm", "lm_head"]):
        edit_json(
            mixed / "config.json", quantization_config=config | {"modules_to_not_convert": names}
        )
        reference = Reference(save_dequantized(mixed, tmp_path / f"plain-{len(names)}"))
        check_parity(mixed, reference, spec, tally)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "dtype"), [(CUT[0], "bfloat16"), (DIVISIBLE[6], "float16")], ids=str
)
def test_half_precision_stays_near_the_float32_of_the_same_numbers(
    spec: ModelSpec, dtype: str, fp8_checkpoint: Fp8Factory, tmp_path: Path
) -> None:
    """Tokens are those of the plain checkpoint of the dequantised numbers, in the same dtype."""
    model = fp8_checkpoint(spec)
    plain = save_dequantized(model, tmp_path / "plain")
    found = []
    for path in (model, plain):
        with watched(path, dtype=dtype, max_model_len=128, max_num_seqs=8) as (llm, _):
            found.append(completions(llm, prompts_for(spec), max_tokens=16))
    assert found[0] == found[1]


def keep_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights stay FP8 on a CPU, as on a GPU that has kernels for them."""
    monkeypatch.setattr(stored_weight, "is_kept", lambda *_: True)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CUT[1], CUT[2], DIVISIBLE[3]], ids=str)
def test_weights_that_stay_fp8_give_the_tokens_of_dequantised_ones(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """By the product that is the twin of the kernels'."""
    model = fp8_checkpoint(spec, in_shards=spec.tied)
    expected = tokens(model, spec)
    keep_fp8(monkeypatch)
    with watched(model, **OPTIONS) as (llm, _):
        assert weights_of(llm)["model.layers.0.mlp.down_proj.weight"].dtype == E4M3
        assert completions(llm, prompts_for(spec), NUM_TOKENS) == expected


# --- scheduling ------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_prefixes_and_preemption_change_no_token(
    fp8_checkpoint: Fp8Factory, tmp_path: Path
) -> None:
    spec = CUT[6]
    model = fp8_checkpoint(spec)
    reference = Reference(save_dequantized(model, tmp_path / "plain"))
    common, *tails = random_prompts([60, 5, 30, 17, 2, 40, 9, 33], spec.vocab_size, spec.seed)
    prompts = [common, *(common[:48] + tail for tail in tails), common]
    options = {"max_num_batched_tokens": 50, "kvcache_block_size": 16, "num_kvcache_blocks": 20}
    with watched(model, dtype="float32", max_model_len=160, **options) as (llm, spy):
        outputs = completions(llm, prompts, max_tokens=60)
        assert llm.scheduler.num_preemptions > 0
        assert any(seq.num_cached_tokens for seq in spy.seqs.values())
        assert compare_run(reference, spy, prompts, outputs).max_logits_error < MAX_LOGITS_ERROR
        assert is_idle(llm)


# --- quantised while loading -----------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8,
    "kvcache_block_size": 16,
}  # fmt: skip


def tokens(model: Path, spec: ModelSpec, **options: Any) -> list[list[int]]:
    with LLM(str(model), **OPTIONS | options) as llm:
        return completions(llm, prompts_for(spec), NUM_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*CUT[:4], CUT[6], DIVISIBLE[4]], ids=str)
def test_a_plain_checkpoint_is_quantised_as_its_fp8_one_was(
    spec: ModelSpec, checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory
) -> None:
    expected = tokens(fp8_checkpoint(spec, in_shards=spec.tied), spec)
    assert tokens(checkpoint(spec), spec, quantization="fp8") == expected


def test_asking_for_fp8_where_the_checkpoint_is_so_changes_nothing(
    fp8_checkpoint: Fp8Factory,
) -> None:
    spec = CUT[5]
    model = fp8_checkpoint(spec)
    assert tokens(model, spec, quantization="fp8") == tokens(model, spec)


def weights_of(llm: LLM) -> dict[str, Tensor]:
    assert isinstance(llm.model_runner, ModelRunner)
    named = llm.model_runner.model.named_parameters()
    return {name: p.to_dense() if p.is_mkldnn else p.clone() for name, p in named}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CUT[1], CUT[6]], ids=str)
@pytest.mark.parametrize("is_stored", [True, False], ids=["FP8 checkpoints", "quantised"])
def test_weights_are_changed_for_others_of_the_same_kind(
    spec: ModelSpec, is_stored: bool, checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory
) -> None:
    others = replace(spec, seed=spec.seed + 1)
    make: Fp8Factory = fp8_checkpoint if is_stored else checkpoint
    quantization = "auto" if is_stored else "fp8"
    second = tokens(make(others), spec, quantization=quantization)
    with LLM(str(make(spec)), **OPTIONS, quantization=quantization) as llm:
        first = completions(llm, prompts_for(spec), NUM_TOKENS)
        assert first != second
        for model, expected in ((others, second), (spec, first)):
            llm.load_weights(make(model))
            assert completions(llm, prompts_for(spec), NUM_TOKENS) == expected


def test_dequantised_weights_lie_where_they_lay_after_a_load(
    checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory
) -> None:
    """CUDA graphs have them there. Those of experts, since a CPU packs the others anew."""
    spec = CUT[6]
    for model, options in ((fp8_checkpoint(spec), {}), (checkpoint(spec), {"quantization": "fp8"})):
        with LLM(str(model), **OPTIONS | options) as llm:
            assert isinstance(llm.model_runner, ModelRunner)
            experts = llm.model_runner.model.model.layers[1].mlp.experts
            before = [weight.data_ptr() for weight in experts.parameters()]
            assert {weight.dtype for weight in experts.parameters()} == {torch.float32}
            llm.load_weights(model)
            assert [weight.data_ptr() for weight in experts.parameters()] == before


def test_weights_of_another_kind_are_refused_and_the_old_ones_stay(
    checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory
) -> None:
    spec = CUT[0]
    plain, stored = checkpoint(spec), fp8_checkpoint(spec)
    for model, other, options, words in (
        (stored, plain, {}, "quantization fp8 as stored but for lm_head, not None"),
        (stored, plain, {"quantization": "fp8"}, "fp8 as stored but for lm_head, not fp8 while"),
        (plain, stored, {}, "quantization None, not fp8 as stored but for lm_head"),
        (plain, stored, {"quantization": "fp8"}, "fp8 while loading, not fp8 as stored but for"),
    ):
        with LLM(str(model), **OPTIONS | options) as llm:
            expected = completions(llm, prompts_for(spec), max_tokens=4)
            with pytest.raises(ValueError, match=words):
                llm.load_weights(other)
            assert completions(llm, prompts_for(spec), max_tokens=4) == expected


@pytest.mark.slow
@pytest.mark.parametrize("is_stored", [True, False], ids=["FP8 checkpoints", "quantised"])
@pytest.mark.parametrize("fault", ["the disk", "NaN"])
def test_after_a_load_that_failed_halfway_only_a_load_helps(
    fault: str,
    is_stored: bool,
    checkpoint: CheckpointFactory,
    fp8_checkpoint: Fp8Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault == "NaN" and is_stored:
        pytest.skip("of scales and e4m3 numbers, as of plain weights, none is looked at")
    spec = CUT[6]
    model = (fp8_checkpoint if is_stored else checkpoint)(spec)
    options = OPTIONS | ({} if is_stored else {"quantization": "fp8"})
    read, num_read = loader._read, 0

    def failing(*args: Any) -> Tensor:
        nonlocal num_read
        num_read += 1
        if num_read == 12:
            raise ValueError("the disk is gone")
        return read(*args)

    broken = shutil.copytree(model, tmp_path / "broken")
    if fault == "NaN":
        tensors = tensors_of(broken)
        tensors["model.layers.1.mlp.experts.1.up_proj.weight"][-1, -1] = torch.nan
        save_file(tensors, broken / "model.safetensors")
    with LLM(str(model), **options) as llm:
        expected = completions(llm, prompts_for(spec), max_tokens=8)
        with monkeypatch.context() as patch:
            if fault == "the disk":
                patch.setattr(loader, "_read", failing)
            with pytest.raises(ValueError, match=r"disk is gone|layers\.1\.mlp\.experts\.1\.up"):
                llm.load_weights(broken)
        with pytest.raises(RuntimeError, match="load_weights failed"):
            completions(llm, prompts_for(spec))
        llm.load_weights(model)
        assert completions(llm, prompts_for(spec), max_tokens=8) == expected


def test_dummy_weights_are_finite_and_as_large_as_others(
    fp8_checkpoint: Fp8Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a number is drawn that is larger than any in e4m3: one in 200,000 is."""
    spec = DIVISIBLE[4]
    shutil.copy(fp8_checkpoint(spec) / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", hidden_size=512, intermediate_size=1024)
    config = ModelConfig.from_dict(read_json(tmp_path / "config.json"))
    with monkeypatch.context() as patch:
        keep_fp8(patch)
        model = Qwen3ForCausalLM(config, BACKENDS["torch"], max_positions=32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    fill_random(model)
    num_fp8 = 0
    for name, parameter in model.named_parameters():
        assert parameter.float().isfinite().all(), name
        num_fp8 += parameter.numel() * (parameter.dtype == E4M3)
    assert num_fp8 > 1e6
    with LLM(str(tmp_path), **OPTIONS, load_format="dummy") as llm:
        for name, weight in weights_of(llm).items():
            if weight.dim() > 1:  # but for the zeros that panels are filled up with
                assert 0.015 < float(weight[weight != 0].std()) < 0.025, name
        assert len(completions(llm, [[1, 2, 3]], max_tokens=20)[0]) == 20


@pytest.mark.slow
def test_the_trained_checkpoint_answers_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script whose figures for 100 tasks of each family are in docs/benchmarks.md."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import quality

    common = {"device": "cpu", "dtype": "float32", "max_model_len": 512}
    rows = quality.measure(2, {"quantization": "fp8"}, common)
    quality.print_table(rows)
    print(capsys.readouterr().out)
    assert rows["all"].num_tasks == 2 * 14
    assert rows["all"].num_right >= rows["all"].num_right_plain - 1
    assert 1e-8 < rows["all"].kl_mean < 1e-5
    assert rows["all"].kl_max < 0.02


# --- parts of a model ------------------------------------------------------------------------


def split_spec(kind: str, **options: Any) -> ModelSpec:
    """Sizes that four ranks divide, and cut blocks in doing so."""
    rng = random.Random(f"{RUN_SEED}-fp8-split-{kind}")
    sizes: dict[str, Any] = {
        "kind": kind, "vocab_size": 4 * rng.randint(50, 90), "hidden_size": 8 * rng.randint(17, 30),
        "intermediate_size": 4 * rng.randint(40, 70), "num_heads": 8, "seed": rng.randrange(10**6),
        "num_kv_heads": rng.choice([2, 4]), "head_dim": rng.choice([18, 24, 40]),
    }  # fmt: skip
    return ModelSpec(**sizes | options, initializer_range=1.2 / sizes["hidden_size"] ** 0.5)


EXPERTS = (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 184))
SPLIT = [
    split_spec("Qwen3", num_layers=1),
    split_spec("Llama", num_layers=1, attention_bias=True, more=(("mlp_bias", True),)),
    split_spec("Qwen3Moe", more=(*EXPERTS, ("mlp_only_layers", (0,)))),
]


def read(model_dir: Path, config: ModelConfig, group: FakeGroup) -> Qwen3ForCausalLM:
    """A rank's part of a model."""
    assert config.quantization is not None
    whole = Qwen3ForCausalLM(config, BACKENDS["torch"], 1, device=torch.device("meta"))
    part = Qwen3ForCausalLM(config.split(group.size), BACKENDS["torch"], 32, group)
    for parameter in part.parameters():
        parameter.data.fill_(torch.nan)
    load_weights(part, model_dir, checkpoint_shapes(whole, config.quantization.is_stored), group)
    return part


def numbers_of(model: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """What a checkpoint's tensors stand for, as the model holds them."""
    numbers = {}
    for name, target in checkpoint_targets(model).items():
        if isinstance(target, Fp8Weight):
            numbers[name] = target.dequantized(torch.float32)
        else:
            numbers[name] = target.weight if isinstance(target, Dequantized) else target
    return numbers


@pytest.mark.parametrize("spec", SPLIT, ids=str)
@pytest.mark.parametrize("is_stored", [True, False], ids=["FP8 checkpoint", "quantised"])
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "dequantised"])
def test_a_ranks_part_has_the_scales_of_whole_blocks(
    spec: ModelSpec,
    is_stored: bool,
    is_kept: bool,
    checkpoint: CheckpointFactory,
    fp8_checkpoint: Fp8Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts of two and of four ranks make up the whole, number by number."""
    if is_kept:
        keep_fp8(monkeypatch)
    stored = fp8_checkpoint(spec, in_shards=True)
    model_dir = stored if is_stored else checkpoint(spec)
    config = ModelConfig.from_dict(read_json(model_dir / "config.json")).quantized("fp8")
    numbers = numbers_of(read(model_dir, config, FakeGroup(0, 1)))
    tensors = tensors_of(stored)
    num_fp8 = 0
    for name, found in numbers.items():
        expected = tensors[name].float()
        if f"{name}_scale_inv" in tensors:
            num_fp8 += 1
            expected *= spread(tensors[f"{name}_scale_inv"], *expected.shape).float()
        assert torch.equal(found, expected), name
    assert num_fp8 > 6
    for size in (2, 4):
        groups = [FakeGroup(rank, size) for rank in range(size)]
        parts = [numbers_of(read(model_dir, config, group)) for group in groups]
        for name, expected in numbers.items():
            found = [part[name] for part in parts if name in part]
            dims = [d for d in range(expected.dim()) if found[0].size(d) != expected.size(d)]
            if dims:
                step = size * found[0].size(dims[0]) // expected.size(dims[0])
                assert torch.equal(torch.cat(found[::step], dim=dims[0]), expected), name
            else:
                assert all(torch.equal(part, expected) for part in found), name


@pytest.mark.slow
def test_two_ranks_choose_the_tokens_of_one(fp8_checkpoint: Fp8Factory) -> None:
    spec = SPLIT[2]
    model = fp8_checkpoint(spec)
    expected = tokens(model, spec)
    with parallel(model) as llm:
        assert completions(llm, prompts_for(spec), NUM_TOKENS) == expected
        llm.load_weights(model)
        assert completions(llm, prompts_for(spec), NUM_TOKENS) == expected


# --- what is refused -------------------------------------------------------------------------

SMALL = ModelSpec(num_layers=1, hidden_size=130, intermediate_size=140)
SMALL_MOE = ModelSpec("Qwen3Moe", num_layers=1, hidden_size=64, more=EXPERTS)


def refused(model_dir: Path, *parts: str, **options: Any) -> None:
    """LLM raises ValueError, and its message names all of `parts`, and the model at most once."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        LLM(str(model_dir), **OPTIONS | options)
    said = str(error.value)
    assert said.count(str(model_dir)) <= 1
    for part in parts:
        assert part in said


@pytest.fixture
def copied(fp8_checkpoint: Fp8Factory, tmp_path: Path) -> Fp8Factory:
    """An FP8 checkpoint that the test may spoil."""
    return lambda spec: shutil.copytree(fp8_checkpoint(spec), tmp_path / "model")


def rewrite(model_dir: Path, **changes: Tensor | None) -> None:
    """Set tensors of a checkpoint of one file, or remove them (None)."""
    tensors = load_file(model_dir / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, model_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"quant_method": name}, (repr(name), "not implemented", "fp8")) for name in (
            "awq", "gptq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", None, ["fp8"]
        )),
        ({"fmt": "e5m2"}, ("fmt 'e5m2'", "only 'e4m3'")),
        ({"weight_block_size": [64, 128]}, ("weight_block_size [64, 128]", "only [128, 128]")),
        ({"weight_block_size": None}, ("weight_block_size None", "only [128, 128]")),
        ({"weight_block_size": ...}, ("weight_block_size None", "only [128, 128]")),
        ({"activation_scheme": "static"}, ("activation_scheme 'static'", "only 'dynamic'")),
        ({"modules_to_not_convert": "lm_head"}, ("modules_to_not_convert must be a list",)),
        ({"modules_to_not_convert": {"a": 1}}, ("modules_to_not_convert must be a list",)),
        ({"modules_to_not_convert": [1]}, ("modules_to_not_convert must be a list", "[1]")),
    ],
    ids=str,
)  # fmt: skip
def test_other_quantisation_is_refused(
    changes: dict[str, object], words: tuple[str, ...], copied: Fp8Factory
) -> None:
    model_dir = copied(SMALL)
    config = read_json(model_dir / "config.json")["quantization_config"] | changes
    config = {key: value for key, value in config.items() if value is not ...}
    edit_json(model_dir / "config.json", quantization_config=config)
    refused(model_dir, str(model_dir / "config.json"), *words)


@pytest.mark.parametrize("nothing", [None, {}, ...], ids=["null", "{}", "absent"])
def test_where_nothing_is_said_weights_are_plain(
    nothing: object, checkpoint: CheckpointFactory, copied: Fp8Factory
) -> None:
    model_dir = shutil.copytree(checkpoint(SMALL), copied(SMALL) / "plain")
    edit_json(model_dir / "config.json", quantization_config=nothing)
    assert ModelConfig.from_dict(read_json(model_dir / "config.json")).quantization is None
    LLM(str(model_dir), **OPTIONS).exit()


@pytest.mark.parametrize("wrong", ["fp8", ["fp8"], True, 8], ids=repr)
def test_a_quantization_config_that_is_no_object_is_refused(
    wrong: object, copied: Fp8Factory
) -> None:
    model_dir = copied(SMALL)
    edit_json(model_dir / "config.json", quantization_config=wrong)
    refused(model_dir, "quantization_config must be an object", repr(wrong))


@pytest.mark.parametrize("quantization", ["FP8", "int8", "", None, True, "awq"], ids=repr)
def test_an_unknown_quantization_option_is_refused(quantization: object, tiny_model: Path) -> None:
    refused(tiny_model, "quantization must be one of 'auto', 'fp8'", quantization=quantization)


NAME = "model.layers.0.mlp.down_proj.weight"
SCALES = f"{NAME}_scale_inv"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({SCALES: None}, ("no tensor fills 1", SCALES)),
        ({SCALES: torch.ones(2, 1)}, (SCALES, "[2, 1]", "[2, 2]")),
        ({SCALES: torch.ones(())}, (SCALES, "[]", "[2, 2]")),
        ({SCALES: torch.ones(4)}, (SCALES, "[4]", "[2, 2]")),
        ({SCALES: torch.ones(2, 2).to(torch.int32)}, (SCALES, "I32")),
        ({SCALES: torch.ones(2, 2).to(torch.float8_e8m0fnu)}, (SCALES, "F8_E8M0")),
        ({NAME: None}, ("no tensor fills 1", NAME)),
        ({NAME: torch.ones(130, 140)}, (NAME, "F32", "F8_E4M3")),
        ({NAME: torch.ones(130, 140).bfloat16()}, (NAME, "BF16", "F8_E4M3")),
        ({NAME: torch.ones(130, 140).to(torch.int8)}, (NAME, "I8", "F8_E4M3")),
        ({NAME: torch.ones(130, 140).to(torch.float8_e5m2)}, (NAME, "F8_E5M2", "F8_E4M3")),
        ({NAME: torch.ones(130, 141).to(E4M3)}, (NAME, "[130, 141]", "[130, 140]")),
        ({"model.norm.weight_scale_inv": torch.ones(2)}, ("model.norm.weight_scale_inv", "scales")),
        ({"lm_head.weight_scale_inv": torch.ones(3, 2)}, ("lm_head.weight_scale_inv", "scales")),
        ({"lm_head.weight": torch.ones(307, 130).to(E4M3)}, ("lm_head.weight", "F8_E4M3")),
        ({"model.embed_tokens.weight": torch.ones(307, 130).to(E4M3)}, ("embed_tokens", "F8_E4M3")),
        ({"model.norm.weight": torch.ones(130).to(E4M3)}, ("model.norm.weight", "F8_E4M3")),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], words: tuple[str, ...], copied: Fp8Factory
) -> None:
    model_dir = copied(SMALL)
    rewrite(model_dir, **changes)
    refused(model_dir, str(model_dir), *words)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(wrong: float, copied: Fp8Factory) -> None:
    model_dir = copied(SMALL)
    rewrite(model_dir, **{SCALES: torch.tensor([[1.0, wrong], [1.0, 1.0]])})
    refused(model_dir, SCALES, "infinite")


def test_a_quantised_router_is_refused(copied: Fp8Factory) -> None:
    model_dir = copied(SMALL_MOE)
    router = "model.layers.0.mlp.gate.weight"
    values, scales = quantize(tensors_of(model_dir)[router], router)
    rewrite(model_dir, **{router: values.contiguous(), f"{router}_scale_inv": scales})
    refused(model_dir, str(model_dir), router)


def test_fp8_tensors_that_the_configuration_says_nothing_of_are_refused(
    copied: Fp8Factory,
) -> None:
    model_dir = copied(SMALL)
    edit_json(model_dir / "config.json", quantization_config=...)
    refused(model_dir, str(model_dir), "F8_E4M3", "quantization_config")
    refused(model_dir, str(model_dir), "F8_E4M3", "quantization_config", quantization="fp8")


def test_plain_tensors_that_the_configuration_says_to_be_fp8_are_refused(
    checkpoint: CheckpointFactory, copied: Fp8Factory
) -> None:
    model_dir = copied(SMALL)
    shutil.copy(checkpoint(SMALL) / "model.safetensors", model_dir)
    refused(model_dir, str(model_dir), "is F32", "F8_E4M3", "modules_to_not_convert")


@pytest.mark.parametrize(
    ("spec", "kept", "words"),
    [
        (SMALL, ["k_proj"], ("k_proj", "q_proj")),
        (SMALL, ["q_proj", "v_proj"], ("q_proj", "k_proj")),
        (SMALL, ["model.layers.0.mlp.gate_proj"], ("gate_proj", "up_proj")),
        (SMALL_MOE, ["experts.3.down_proj"], ("experts.3.down_proj", "experts.0")),
        (SMALL_MOE, ["gate_proj"], ("gate_proj", "experts.0.down_proj")),
    ],
    ids=str,
)
def test_parts_of_a_merged_weight_that_are_to_be_kept_are_refused(
    spec: ModelSpec, kept: list[str], words: tuple[str, ...], copied: Fp8Factory
) -> None:
    model_dir = copied(spec)
    config = read_json(model_dir / "config.json")["quantization_config"]
    edit_json(
        model_dir / "config.json", quantization_config=config | {"modules_to_not_convert": kept}
    )
    refused(model_dir, f"{model_dir}: modules_to_not_convert names", *words)


def test_what_cannot_be_quantised_while_loading_is_named(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    model_dir = shutil.copytree(checkpoint(SMALL), tmp_path / "model")
    weight = tensors_of(model_dir)[NAME]
    weight[3, 5] = torch.inf
    rewrite(model_dir, **{NAME: weight})
    refused(model_dir, repr(NAME), "infinite", quantization="fp8")


def test_which_modules_are_kept() -> None:
    """As transformers has it: a module, what is in it, and what ends so."""
    kept = Quantization("fp8", ("lm_head", "model.layers.1", "mlp.down_proj"), True)
    for name, expected in {
        "model.layers.1.self_attn.q_proj": True, "model.layers.11.self_attn.q_proj": False,
        "model.layers.0.mlp.down_proj": True, "model.layers.0.mlp.up_proj": False,
        "model.layers.1": True, "lm_head": True,
    }.items():  # fmt: skip
        assert kept.keeps(name) == expected, name


# --- on a GPU --------------------------------------------------------------------------------

# Each routes 8 of 16 experts, or has sizes that blocks, and tiles of kernels, do not divide.
MORE = (("num_experts", 16), ("num_experts_per_tok", 8), ("moe_intermediate_size", 128))
MORE_CUT = (*MORE[:2], ("moe_intermediate_size", 88), ("mlp_only_layers", (1,)))
ON_GPU = [
    ModelSpec(hidden_size=512, intermediate_size=1024, head_dim=64, seed=1),
    ModelSpec("Qwen2", hidden_size=200, intermediate_size=328, num_heads=5, num_kv_heads=5, seed=2),
    ModelSpec("Llama", hidden_size=384, intermediate_size=640, tied=True, seed=3),
    ModelSpec("Qwen3Moe", hidden_size=256, num_layers=3, more=(*MORE, ("norm_topk_prob", True))),
    ModelSpec("Qwen3Moe", hidden_size=168, num_layers=3, more=MORE_CUT),
]  # fmt: skip
ON_GPU = [replace(spec, initializer_range=1.2 / spec.hidden_size**0.5) for spec in ON_GPU]
GPU_OPTIONS: dict[str, Any] = {
    "max_num_seqs": 32, "max_model_len": 1024, "gpu_memory_utilization": 0.15
}  # fmt: skip
on_gpu = pytest.mark.gpu
gpu_specs = pytest.mark.parametrize("spec", ON_GPU, ids=str)


@pytest.fixture
def keeps_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as a test's are kept as FP8 too."""
    monkeypatch.setattr(fp8, "is_small", lambda shape: False)


def round_activations(model: nn.Module) -> None:
    """What the layers' products are fed, as FP8 tensor cores take it: e4m3, a scale a 128 inputs.

    Of experts, of which transformers has no layers, only what goes into gate and up.
    """

    def rounded(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        size = x.size(-1)
        blocks = F.pad(x.float(), (0, -size % 128)).unflatten(-1, (-1, 128))
        scales = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
        blocks = (blocks / scales).clamp(-448, 448).to(E4M3).float() * scales
        return blocks.flatten(-2)[..., :size].to(x.dtype), *rest

    for name, module in model.named_modules():
        is_product = isinstance(module, nn.Linear) and not name.endswith(("mlp.gate", "lm_head"))
        if is_product or name.endswith("mlp.experts"):
            module.register_forward_pre_hook(rounded)


def logits_of(llm: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[list[Any], Tensor]:
    """Completions, and the logits of all of their tokens, step by step, of an eager engine."""
    assert isinstance(llm.model_runner, ModelRunner)
    found: list[Tensor] = []
    handle = llm.model_runner.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: found.append(logits.float().clone())
    )
    outputs = completions(llm, prompts, max_tokens)
    handle.remove()
    return outputs, torch.cat([rows for rows in found if len(rows)])


def keeps_fp8() -> bool:
    return kernels.multiplies_fp8(torch.device("cuda"))


@on_gpu
@gpu_specs
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_tokens_of_short_prompts_equal_transformers(
    spec: ModelSpec, dtype: torch.dtype, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    """With graphs, and up to 16 tokens at a time: there weights alone are rounded, tokens not."""
    model = fp8_checkpoint(spec)
    reference = GpuReference(dtype, save_dequantized(model, tmp_path / "plain"))
    asked = random_prompts([1, 2, 16, 17, 60, 63, 64, *range(20, 34)], spec.vocab_size, seed=5)
    options = GPU_OPTIONS | {"dtype": name_of(dtype), "max_num_batched_tokens": 16}
    options |= {"max_num_seqs": 16}
    for special in ({}, {"enforce_eager": True, "max_num_seqs": 5}):
        with LLM(str(model), **options | special) as llm:
            assert isinstance(llm.model_runner, ModelRunner)
            weight = llm.model_runner.model.model.layers[0].self_attn.o_proj.weight
            is_whole = not (weight.size(0) % 128 or weight.size(1) % 128)
            assert weight.dtype == (E4M3 if keeps_fp8() and is_whole else dtype)
            outputs = completions(llm, asked, max_tokens=60)
        found = compare_tokens(reference, asked, outputs)
        for what, number in zip(("positions", "near-ties", "others"), found, strict=True):
            tally.count(f"GPU FP8 {spec.kind} {name_of(dtype)}: {what}", number)
        # Rounding alone may choose other experts now and then.
        assert found.num_others <= (found.num_positions // 100 if "Moe" in spec.kind else 0)


@on_gpu
@gpu_specs
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_long_prefills_err_no_more_than_fp8_activations_make_transformers_err(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    """At once, and in chunks of which some are short."""
    model = fp8_checkpoint(spec)
    reference = GpuReference(torch.bfloat16, save_dequantized(model, tmp_path / "plain"))
    round_activations(reference.rounded)
    [prompt] = random_prompts([900], spec.vocab_size, seed=6)
    options = GPU_OPTIONS | {"dtype": "bfloat16", "enforce_eager": True}
    for chunk in (1024, 290):
        with LLM(str(model), max_num_batched_tokens=chunk, **options) as llm:
            [output], logits = logits_of(llm, [prompt], max_tokens=40)
        exact, rounded = reference.logits(prompt, output)
        assert logits.shape == exact.shape
        error = float((logits - exact).norm() / exact.norm())
        tally.maximum(f"GPU FP8 {spec.kind}: logits error after 900 tokens", error)
        allowed = float((rounded - exact).norm() / exact.norm())
        tally.maximum(f"GPU FP8 {spec.kind}: that of transformers, activations in e4m3", allowed)
        assert error < (3 if "Moe" in spec.kind else 1.5) * allowed


@on_gpu
@gpu_specs
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_tokens_are_mostly_those_of_an_engine_of_the_dequantised_weights(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, tmp_path: Path, tally: Tally
) -> None:
    """One after the other, by teacher forcing; with graphs. Rounding alone decides the others."""
    model = fp8_checkpoint(spec)
    plain = save_dequantized(model, tmp_path / "plain")
    asked = random_prompts([40, 7, 33, 60, 18, 2, 50, 21], spec.vocab_size, seed=7)
    options = GPU_OPTIONS | {"dtype": "bfloat16"}
    with LLM(str(plain), **options) as llm:
        expected = completions(llm, asked, max_tokens=24)
    forced = [
        prompt + output[:end]
        for prompt, output in zip(asked, expected, strict=True)
        for end in range(24)
    ]
    with LLM(str(model), **options) as llm:
        found = [token for [token] in completions(llm, forced, max_tokens=1)]
    wanted = [token for output in expected for token in output]
    num_equal = sum(a == b for a, b in zip(found, wanted, strict=True))
    tally.count(f"GPU FP8 {spec.kind}: of {len(wanted)} tokens those of bf16", num_equal)
    assert num_equal > 0.75 * len(wanted)


@on_gpu
@pytest.mark.parametrize("spec", [ON_GPU[0], ON_GPU[1], ON_GPU[3]], ids=str)
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_quantising_while_loading_gives_what_the_fp8_checkpoint_gives(
    spec: ModelSpec, checkpoint: CheckpointFactory, fp8_checkpoint: Fp8Factory
) -> None:
    asked = random_prompts([40, 7, 200, 33], spec.vocab_size, seed=8)
    found = []
    for model, quantization in ((fp8_checkpoint(spec), "auto"), (checkpoint(spec), "fp8")):
        with LLM(str(model), **GPU_OPTIONS, quantization=quantization, dtype="bfloat16") as llm:
            found.append(completions(llm, asked, max_tokens=40))
    assert found[0] == found[1]


@on_gpu
@pytest.mark.parametrize("has_kernels", [True, False], ids=["FP8", "dequantised"])
@pytest.mark.parametrize("spec", [ON_GPU[0], ON_GPU[3]], ids=str)
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_graphs_read_the_weights_that_were_loaded_last(
    spec: ModelSpec,
    has_kernels: bool,
    fp8_checkpoint: Fp8Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where weights are dequantised, as on an A100."""
    if not has_kernels:
        monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: False)
    first, second = fp8_checkpoint(spec), fp8_checkpoint(replace(spec, seed=spec.seed + 1))
    asked = random_prompts([40, 7, 33], spec.vocab_size, seed=9)
    options = GPU_OPTIONS | {"dtype": "bfloat16"}
    with LLM(str(second), **options) as llm:
        expected = completions(llm, asked, max_tokens=30)
    with LLM(str(first), **options) as llm:
        assert isinstance(llm.model_runner, ModelRunner)
        assert llm.model_runner.runs_ahead
        before = completions(llm, asked, max_tokens=30)
        llm.load_weights(second)
        assert before != expected
        assert completions(llm, asked, max_tokens=30) == expected
        llm.load_weights(first)
        assert completions(llm, asked, max_tokens=30) == before


@on_gpu
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_prefixes_chunks_and_preemption_on_a_gpu(
    fp8_checkpoint: Fp8Factory, tmp_path: Path
) -> None:
    """The reference does not round what goes into a product to FP8, as chunks of prompts do."""
    spec = ON_GPU[0]
    model = fp8_checkpoint(spec)
    reference = GpuReference(torch.bfloat16, save_dequantized(model, tmp_path / "plain"))
    common, *tails = random_prompts([60, 5, 30, 17, 2, 40, 9, 33], spec.vocab_size, spec.seed)
    prompts = [common, *(common[:48] + tail for tail in tails)]
    options = {"max_num_batched_tokens": 50, "kvcache_block_size": 16, "num_kvcache_blocks": 20}
    options |= {"max_model_len": 160}
    with LLM(str(model), **GPU_OPTIONS | options, dtype="bfloat16") as llm:
        outputs = completions(llm, prompts, max_tokens=60)
        assert llm.scheduler.num_preemptions > 0
        assert llm.stats()["prefix_hit_rate"] > 0
    found = compare_tokens(reference, prompts, outputs)
    assert found.num_others < 0.04 * found.num_positions


@on_gpu
@pytest.mark.parametrize("spec", [ON_GPU[0], ON_GPU[4]], ids=str)
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_float32_on_a_gpu_multiplies_with_the_exact_dequantised_weights(
    spec: ModelSpec, fp8_checkpoint: Fp8Factory, tmp_path: Path
) -> None:
    model = fp8_checkpoint(spec)
    reference = GpuReference(torch.float32, save_dequantized(model, tmp_path / "plain"))
    [prompt] = random_prompts([200], spec.vocab_size, seed=10)
    with LLM(str(model), **GPU_OPTIONS, dtype="float32", enforce_eager=True) as llm:
        [output], logits = logits_of(llm, [prompt], max_tokens=20)
    exact, _ = reference.logits(prompt, output)
    assert (logits - exact).abs().max() < 2 * MAX_LOGITS_ERROR * exact.abs().max()


@on_gpu
@pytest.mark.usefixtures("clean_gpu", "keeps_small")
def test_random_fp8_weights_on_a_gpu(fp8_checkpoint: Fp8Factory) -> None:
    for spec in (ON_GPU[0], ON_GPU[3]):
        with LLM(str(fp8_checkpoint(spec)), **GPU_OPTIONS, load_format="dummy") as llm:
            for name, weight in weights_of(llm).items():
                assert weight.float().isfinite().all(), name
            assert len(completions(llm, [[1, 2, 3]], max_tokens=20)[0]) == 20

"""quantization="int4": torch's operator and dequantised products, and engines made of them."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TINY,
    CheckpointFactory,
    ModelSpec,
    completions,
    edit_json,
    load_tasks,
    random_prompts,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.config import Config
from nanovllm.layers import int4
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import qk_norm_rope_store
from nanovllm.layers.int4 import Groups, Int4Weight, packed
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedLinear, Linear, RowParallelLinear
from nanovllm.model_config import Quantization
from nanovllm.utils import quantization
from nanovllm.utils.parallel import RankGroup

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench

INT4 = Quantization("int4")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
SIZES = [(128, 256), (70, 192), (5, 96), (200, 32), (64, 384)]
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 96, "max_num_seqs": 4,
    "kvcache_block_size": 16, "quantization": "int4",
}  # fmt: skip
EXPERTS = (("num_experts", 6), ("num_experts_per_tok", 2), ("moe_intermediate_size", 96))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(weight: Tensor, group: int) -> Tensor:
    """What int4 makes of a matrix, float32: computed from its definition alone."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    scale = (high / 15 - low / 15).bfloat16().float()
    zero = (low + 8 * (high / 15 - low / 15)).bfloat16().float()
    steps = torch.where(scale > 0, (grouped - zero) / scale, grouped - zero)
    return ((steps.round() + 8).clamp(0, 15).sub(8) * scale + zero).flatten(1)


def int4_of(weight: Tensor) -> Int4Weight:
    groups = Groups.of(weight.size(-1))
    assert groups is not None
    found = packed(weight, groups)
    assert isinstance(found, Int4Weight)
    return found


def layer_of(kind: type[Linear], weight: Tensor, **options: Any) -> Linear:
    """A layer with this weight, and a random bias if it has one, packed as int4."""
    num_rows = len(weight) // 2 if kind is GatedLinear else len(weight)
    sizes: list[Any] = [weight.size(1), num_rows]
    if kind is RowParallelLinear:
        sizes.append(RankGroup())
    layer = kind(*sizes, dtype=weight.dtype, device="cpu", **options)
    layer.quantize(INT4)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(randn(len(weight), seed=5))
    layer.pack()
    return layer


def relative_error(y: Tensor, exact: Tensor) -> float:
    assert y.shape == exact.shape
    return float((y.double() - exact).abs().max() / exact.abs().max())


# --- weights


@dtypes
@pytest.mark.parametrize(("num_rows", "size"), SIZES)
def test_a_weight_is_the_nearest_of_16_levels(num_rows: int, size: int, dtype: torch.dtype) -> None:
    weight = randn(num_rows, size).to(dtype)
    found = int4_of(weight)
    group = next(group for group in (128, 64, 32) if size % group == 0)
    assert found.group == group
    assert found.values.shape == (-(-num_rows // 64) * 64, size // 2)
    expected = levels(weight, group)
    assert found.dequantized(torch.float32).sub(expected).abs().max() < 1e-6
    rounded = found.dequantized(torch.bfloat16)
    assert rounded.float().sub(expected).abs().le(expected.abs() / 256 + 1e-6).all()
    step = (weight.float().amax() - weight.float().amin()) / 15
    assert weight.float().sub(expected).abs().max() < 0.6 * step


def test_zeros_and_constants_stay() -> None:
    """A block of each, and one of a single number among zeros."""
    weight = torch.zeros(16, 256)
    weight[:, 128:] = 0.375
    weight[3, 5], weight[4, 200], weight[5, 0] = 1.5, -2.0, 3e-38
    found = int4_of(weight).dequantized(torch.float32)
    others = torch.ones(16, dtype=torch.bool)
    others[3:6] = False
    assert torch.equal(found[others], weight[others])
    assert found[3, 5] == pytest.approx(1.5, rel=0.01)
    assert found[4, 200] == pytest.approx(-2.0, rel=0.02)
    assert found.isfinite().all()


def test_many_rows_are_quantised_and_dequantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = randn(300, 128), randn(70, 128, seed=1)
    whole = int4_of(weight)
    monkeypatch.setattr(int4, "QUANTIZED_AT_ONCE", 1)
    monkeypatch.setattr(int4, "DEQUANTIZED_AT_ONCE", 100 * 128)
    parts = int4_of(weight)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)
    exact = x.double() @ whole.dequantized(torch.float64).T
    assert relative_error(parts.many(x), exact) < 1e-6


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [128, 192, 384, 576, 768])
def test_parts_of_ranks_are_quantised_as_the_whole(size: int, num_ranks: int) -> None:
    """Also where a part cuts a group; in steps too small for the operator it is dequantised."""
    if size % num_ranks:
        pytest.skip("no such split")
    weight, part = randn(20, size), size // num_ranks
    weight[3] = 0.0
    whole = Groups.of(size)
    assert whole is not None
    expected = levels(weight, whole.size)
    for rank in range(num_ranks):
        groups = Groups.of(part, rank, num_ranks)
        assert groups is not None
        start, end = rank * part, (rank + 1) * part
        wide = weight[:, start - groups.before : end + groups.after]
        found = packed(wide, groups)
        assert isinstance(found, Int4Weight) == (part % 32 == 0)
        if isinstance(found, Int4Weight):
            found = found.dequantized(torch.float32)
        assert found.sub(expected[:, start:end]).abs().max() < 1e-6


# --- products


@pytest.fixture(params=["kernel", "amx", "torch"])
def has_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is the kernel in C, which layers of bfloat16 then have; for few tokens only."""
    monkeypatch.setattr(int4, "has_matrix_unit", lambda: request.param == "amx")
    if request.param == "torch":
        monkeypatch.setattr(kernels, "multiplies_int4", lambda _: False)
    elif not kernels.multiplies_int4(torch.device("cpu")):
        pytest.skip("no kernel for int4 on this machine")
    return bool(request.param != "torch")


@dtypes
@pytest.mark.parametrize(("num_rows", "size"), SIZES)
def test_products_are_those_of_the_dequantised_weight(
    num_rows: int, size: int, dtype: torch.dtype, has_kernel: bool
) -> None:
    """Around the number of tokens from which on the weight is dequantised, and for none."""
    layer = layer_of(Linear, randn(num_rows, size).to(dtype))
    border = int4.MOST_KERNEL_WITH_AMX if int4.has_matrix_unit() else float("inf")
    border = border if has_kernel else int4.MOST_FEW
    assert set(layer.products) == {
        border if dtype == torch.bfloat16 else float("inf"),
        float("inf"),
    }
    exact_weight = levels(randn(num_rows, size).to(dtype), layer.int4.size).double()
    few, many = int4.MOST_FEW, int4.MOST_KERNEL_WITH_AMX
    for num_tokens in (0, 1, 2, 3, 4, 5, 17, few, few + 1, 130, many, many + 1):
        x = randn(num_tokens, size, seed=num_tokens).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (num_tokens, num_rows)
        if num_tokens:
            assert relative_error(y, x.double() @ exact_weight.T) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [3, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("what", ["norm", "residual", "out", "both", "gated"])
@dtypes
def test_what_stands_around_a_product(
    num_tokens: int, has_bias: bool, what: str, dtype: torch.dtype, has_kernel: bool
) -> None:
    weight = randn(72, 96).to(dtype)
    kind = GatedLinear if what == "gated" else RowParallelLinear if what == "residual" else Linear
    layer = layer_of(kind, weight, bias=has_bias)
    x = randn(num_tokens, 96, seed=1).to(dtype)
    residual = randn(num_tokens, 72, seed=2).to(dtype)
    exact = x.double()
    arguments: dict[str, Any] = {}
    if what == "norm":
        norm = RMSNorm(96, 1e-6, dtype=dtype, device="cpu")
        norm.weight.copy_(randn(96, seed=3).abs() + 0.5)
        arguments["norm"] = norm
        exact = norm(x).double()
    exact = exact @ levels(weight, 32).double().T
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    if what == "gated":
        exact = silu_and_mul(exact)
    if what in ("residual", "both"):
        exact = exact + residual.double()
        arguments["residual"] = residual.clone()
    if what in ("out", "both"):
        arguments["out"] = torch.empty(num_tokens, 72, dtype=dtype)
    y = layer(x, **arguments)
    assert relative_error(y, exact) < 2 * TOLERANCE[dtype]
    if "out" in arguments:
        assert y.data_ptr() == arguments["out"].data_ptr()


def test_without_bfloat16_instructions_many_tokens_are_multiplied_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = randn(70, 96).bfloat16(), randn(100, 96).bfloat16()
    layer, exact = layer_of(Linear, weight), x.double() @ levels(weight, 32).double().T
    monkeypatch.setattr(kernels, "multiplies_int4", lambda _: False)
    monkeypatch.setattr(int4, "multiplies_bfloat16", lambda: False)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # Rounded once: the numbers of the weight were not.
    assert y.double().sub(exact).abs().le(exact.abs() / 256 + 1e-4).all()


@pytest.mark.parametrize("num_rows", [160, 96])
def test_a_projection_whose_rows_are_padded_can_be_attended_to(
    num_rows: int, has_kernel: bool
) -> None:
    """An odd number of heads of 32: what the product gives is a part of wider rows, or not."""
    num_heads = num_rows // 32 - 2
    qkv = layer_of(Linear, randn(num_rows, 64).bfloat16())(randn(3, 64, seed=1).bfloat16())
    cos_sin, positions, empty = randn(9, 32), torch.arange(3), torch.empty(0)
    store = kernels.kernel_of(qk_norm_rope_store, "fused", torch.device("cpu"), 32)
    how = None, None, 0.0, cos_sin, positions, empty, empty, positions.int(), num_heads, 1
    expected = qk_norm_rope_store(qkv.clone(), *how)
    found = store(qkv, *how)
    for out, twin in zip(found, expected, strict=True):
        assert relative_error(out, twin.double()) < TOLERANCE[torch.bfloat16]


def test_a_layer_can_be_filled_again() -> None:
    layer = layer_of(Linear, randn(70, 64))
    first = layer(randn(2, 64))
    assert layer.weight.dtype == torch.uint8
    layer.pack()  # changes nothing
    layer.unpack()
    assert layer.weight.shape == (70, 64)
    assert layer.scales is None
    layer.weight.copy_(randn(70, 64, seed=9))
    layer.pack()
    second = layer(randn(2, 64))
    layer.unpack()
    layer.weight.copy_(randn(70, 64))
    layer.pack()
    assert torch.equal(layer(randn(2, 64)), first)
    assert not torch.equal(second, first)


# --- engines


@pytest.fixture(scope="session")
def dequantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """dequantized(checkpoint) -> another one of the numbers that int4 makes of its weights."""

    def make(model: Path) -> Path:
        directory = tmp_path_factory.mktemp("dequantized") / "model"
        shutil.copytree(model, directory)
        tensors = load_file(model / "model.safetensors")
        config = json.loads((model / "config.json").read_text())
        if config["tie_word_embeddings"]:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            edit_json(directory / "config.json", tie_word_embeddings=False)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and "embed_tokens" not in name and ".mlp.gate." not in name:
                size = tensor.size(1)
                group = next((group for group in (128, 64, 32) if size % group == 0), None)
                tensors[name] = tensor.float() if group is None else levels(tensor, group)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return make


SPECS = {
    "untied": ModelSpec(),
    "tied": ModelSpec(tied=True, hidden_size=128, intermediate_size=160),
    "odd vocabulary, biases": ModelSpec(vocab_size=301, attention_bias=True, hidden_size=192),
    "no group fits the MLP": ModelSpec(intermediate_size=100),
    "Qwen2": ModelSpec(kind="Qwen2", hidden_size=96, num_heads=3, num_kv_heads=1),
    "experts": ModelSpec(kind="Qwen3Moe", more=EXPERTS),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_tokens_are_those_of_the_dequantised_weights(
    spec: ModelSpec, checkpoint: CheckpointFactory, dequantized: Callable[[Path], Path]
) -> None:
    """With chunks, preemption and shared prefixes."""
    model = checkpoint(spec)
    shared = random_prompts([40], spec.vocab_size, seed=1)[0]
    prompts = random_prompts([12, 15, 9, 40], spec.vocab_size)
    prompts += [shared, shared[:35] + prompts[0][:9]]
    with LLM(str(dequantized(model)), **(OPTIONS | {"quantization": "auto"})) as llm:
        expected = completions(llm, prompts, max_tokens=40)
    with LLM(str(model), **OPTIONS, num_kvcache_blocks=8, max_num_batched_tokens=25) as llm:
        assert completions(llm, prompts, max_tokens=40) == expected
        assert completions(llm, prompts, max_tokens=40) == expected
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    assert stats["prefix_hit_rate"] > 0


def stored(llm: LLM) -> dict[str, torch.dtype]:
    assert llm.model_runner is not None
    named = llm.model_runner.model.named_parameters()
    return {name: parameter.dtype for name, parameter in named if name.endswith("weight")}


def test_all_but_routers_norms_and_the_embedding_is_int4(checkpoint: CheckpointFactory) -> None:
    with LLM(str(checkpoint(SPECS["experts"])), **OPTIONS) as llm:
        found = stored(llm)
    plain = {name for name, dtype in found.items() if dtype != torch.uint8}
    assert "lm_head.weight" not in plain
    assert "model.embed_tokens.weight" in plain
    assert all(
        "norm" in n or n.endswith((".mlp.gate.weight", "embed_tokens.weight")) for n in plain
    )
    assert sum("experts" in name for name in found.keys() - plain) == 2 * 2


def test_a_tied_head_is_packed_beside_the_embedding(checkpoint: CheckpointFactory) -> None:
    with LLM(str(checkpoint(SPECS["tied"])), **OPTIONS) as llm:
        found = stored(llm)
    assert found["lm_head.weight"] == torch.uint8
    assert found["model.embed_tokens.weight"] == torch.float32


def test_layers_that_no_group_fits_are_told_of(
    checkpoint: CheckpointFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nanovllm")
    with LLM(str(checkpoint(SPECS["no group fits the MLP"])), **OPTIONS) as llm:
        found = stored(llm)
    told = [r.message for r in caplog.records if "not int4" in r.message]
    num_layers = SPECS["no group fits the MLP"].num_layers
    assert len(told) == 1
    assert told[0].startswith(f"{num_layers} weights are not int4")
    assert "model.layers.0.mlp.down_proj" in told[0]
    assert found["model.layers.0.mlp.down_proj.weight"] == torch.float32
    assert found["model.layers.0.mlp.gate_up_proj.weight"] == torch.uint8


@pytest.mark.parametrize("name", ["untied", "tied", "experts"])
def test_new_weights_give_what_a_fresh_engine_gives(
    name: str, checkpoint: CheckpointFactory
) -> None:
    first, second = (checkpoint(replace(SPECS[name], seed=seed)) for seed in (0, 9))
    prompts = random_prompts([30, 9], 300)
    with LLM(str(second), **OPTIONS) as llm:
        expected = completions(llm, prompts, max_tokens=8)
    with LLM(str(first), **OPTIONS) as llm:
        before = completions(llm, prompts, max_tokens=8)
        llm.load_weights(second)
        assert completions(llm, prompts, max_tokens=8) == expected != before
        llm.load_weights(first)
        assert completions(llm, prompts, max_tokens=8) == before


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            ModelSpec(tied=True, hidden_size=96, intermediate_size=192, vocab_size=300),
            id="cut groups",
        ),
        pytest.param(
            ModelSpec(
                kind="Qwen3Moe",
                vocab_size=300,
                more=(*EXPERTS[:2], ("moe_intermediate_size", 192)),
            ),
            id="experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ModelSpec(intermediate_size=32, head_dim=16, num_heads=4, vocab_size=300),
            id="parts that no group fits",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_give_the_same_tokens(
    spec: ModelSpec, checkpoint: CheckpointFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights whose parts are not int4 are told of."""
    caplog.set_level("INFO", "nanovllm")
    model, prompts = checkpoint(spec), random_prompts([30, 9], spec.vocab_size)
    with LLM(str(model), **OPTIONS) as llm:
        expected = completions(llm, prompts, max_tokens=12)
    assert "not int4" not in caplog.text
    with LLM(str(model), **OPTIONS, tensor_parallel_size=2) as llm:
        assert completions(llm, prompts, max_tokens=12) == expected
    assert ("not int4" in caplog.text) == (spec.intermediate_size == 32)


def test_ranks_compute_in_one_dtype_where_none_is_given(checkpoint: CheckpointFactory) -> None:
    """bfloat16, though the checkpoint's is float32."""
    options = {key: value for key, value in OPTIONS.items() if key != "dtype"}
    model = checkpoint(ModelSpec(vocab_size=308))
    with LLM(str(model), **options, tensor_parallel_size=2) as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.dtype == torch.bfloat16
        assert len(completions(llm, [[1, 2, 3]], max_tokens=3)[0]) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
def test_numbers_that_are_not_finite_are_refused(
    value: float, kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint(SPECS[kind]), model)
    tensors = load_file(model / "model.safetensors")
    names = {
        "untied": "model.layers.1.mlp.up_proj.weight",
        "tied": "model.embed_tokens.weight",
        "experts": "model.layers.0.mlp.experts.4.down_proj.weight",
    }
    tensors[names[kind]][3, 7] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match="holds infinite numbers or NaN") as caught:
        LLM(str(model), **OPTIONS)
    assert str(caught.value).startswith(f"{model}: tensor '{names[kind]}' ")


def test_fp8_weights_of_a_checkpoint_become_int4(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """But for the head, which it keeps; ranks are refused that would cut a group."""
    spec = ModelSpec(hidden_size=256, intermediate_size=384, vocab_size=300)
    stored_fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    for directory in (stored_fp8, plain):
        shutil.copytree(checkpoint(spec), directory)
    tensors = load_file(plain / "model.safetensors")
    numbers = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        values, scales = quantization.quantize(tensors[name], name)
        tensors |= {name: values.contiguous(), name + quantization.SCALES_SUFFIX: scales}
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        numbers[name] = values.float() * wide[: values.size(0), : values.size(1)]
    save_file(tensors, stored_fp8 / "model.safetensors")
    save_file(numbers, plain / "model.safetensors")
    how = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    edit_json(stored_fp8 / "config.json", quantization_config=how)
    prompts = random_prompts([30, 9], 300)
    with LLM(str(plain), **OPTIONS) as llm:
        expected = stored(llm)
        assert llm.model_runner is not None
        weights = dict(llm.model_runner.model.named_parameters())
    with LLM(str(stored_fp8), **OPTIONS) as llm:
        assert stored(llm) == expected | {"lm_head.weight": torch.float32}
        assert llm.model_runner is not None
        for name, parameter in llm.model_runner.model.named_parameters():
            if "lm_head" not in name and not parameter.is_mkldnn:
                assert torch.equal(parameter, weights[name]), name
        before = completions(llm, prompts, max_tokens=8)
        llm.load_weights(stored_fp8)
        assert completions(llm, prompts, max_tokens=8) == before
    message = f"{stored_fp8}: .* 2 ranks cut a group of 128 of 128 inputs"
    with pytest.raises(ValueError, match=message):
        LLM(str(stored_fp8), **OPTIONS, tensor_parallel_size=2)


def test_the_floor_counts_the_bytes_that_are_stored(checkpoint: CheckpointFactory) -> None:
    machine = bench.Machine(read_bytes_per_s=1e9, flops_per_s=1e10)
    floors = {}
    for kind in ("auto", "int4"):
        options = OPTIONS | {"dtype": "bfloat16", "quantization": kind}
        with LLM(str(checkpoint(SPECS["experts"])), **options) as llm:
            floors[kind] = bench.Floor(llm, machine)
            assert llm.model_runner is not None
            named = dict(llm.model_runner.model.named_parameters())
    same = ("flops_per_token", "flops_per_last", "flops_per_logits", "token_bytes")
    for name in same:
        assert getattr(floors["int4"], name) == getattr(floors["auto"], name)
    nbytes = {n: p.nbytes for n, p in named.items() if "experts" not in n and "embed" not in n}
    # A router's 6 rows are bfloat16, however many a panel has.
    nbytes |= {name: 6 * 64 * 2 for name in nbytes if name.endswith("mlp.gate.weight")}
    assert floors["int4"].weight_bytes == sum(nbytes.values())
    # 307 rows of the head are 320, of 64 inputs each, in one group.
    assert nbytes["lm_head.weight"] + nbytes["lm_head.scales"] == 320 * (64 // 2 + 4)
    # 6 experts: gate and up 2 * 96 rows of 64 inputs, down 64 rows of 96 in three groups.
    assert floors["int4"].expert_bytes == 192 * (32 + 4) + 64 * (48 + 3 * 4)


def test_it_is_for_cpus(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="quantization='int4' needs a CPU, got device='cuda'"):
        Config(tiny_model, device="cuda", quantization="int4")
    with pytest.raises(ValueError, match="quantization='int4' needs a CPU, got device='cuda:1'"):
        int4.require_int4(torch.device("cuda:1"))


def test_a_torch_without_the_operators_is_told_of(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "OPERATORS", ("_weight_int4pack_mm_for_cpu", "_no_such_operator"))
    with pytest.raises(ValueError, match="needs torch's operator aten::_no_such_operator"):
        LLM(str(tiny_model), **OPTIONS)


def test_auto_computes_in_bfloat16(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **(OPTIONS | {"dtype": "auto"})) as llm:
        assert llm.model_runner is not None
        assert llm.model_runner.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_trained_checkpoint_keeps_its_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out tasks: float32 weights beside int4 ones."""
    tasks = load_tasks()
    samples = [s for family in tasks.FAMILIES for s in tasks.held_out(family, 40)]
    chats = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    params = SamplingParams(temperature=0.0, max_tokens=400, logprobs=0)
    right, probability = {}, {}
    for kind in ("auto", "int4"):
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 1024}
        with LLM(str(TINY), **options, quantization=kind) as llm:
            outputs = llm.chat(chats, params, use_tqdm=False)
        pairs = zip(outputs, samples, strict=True)
        right[kind] = sum(output["text"] == sample.answer for output, sample in pairs)
        sums = [sum(max(d.values()) for d in output["logprobs"]) for output in outputs]
        probability[kind] = torch.tensor(sums).exp().mean().item()
    with capsys.disabled():
        print(f"\nright of {len(samples)}: {right}; probability of the answer: {probability}")
    assert right["int4"] >= right["auto"] - 0.02 * len(samples)
    assert probability["int4"] > probability["auto"] - 0.01

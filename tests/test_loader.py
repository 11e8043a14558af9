"""Checkpoints: which files are read, what they fill, and what is wrong with a bad one."""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import CheckpointFactory, ModelSpec, completions, edit_json, tensors_of
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm import LLM
from nanovllm.layers.attention import BACKENDS
from nanovllm.layers.linear import Linear
from nanovllm.model_config import ModelConfig, read_json
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import fill_random, load_weights, resolve_model_dir

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED = ModelSpec(tied=True)
SHARDED = ModelSpec(max_shard_size="100KB")


def load(model_dir: Path) -> Qwen3ForCausalLM:
    """The model, its parameters NaN until something fills them."""
    config = ModelConfig.from_dict(read_json(model_dir / "config.json"))
    model = Qwen3ForCausalLM(config, BACKENDS["torch"], max_positions=32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_weights(model, model_dir)
    return model


def rewrite(model_dir: Path, **changes: Tensor | None) -> None:
    """Set tensors of a checkpoint of one file, or remove them (None)."""
    tensors = load_file(model_dir / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, model_dir / WEIGHTS)


CopyFactory = Callable[[ModelSpec], Path]


@pytest.fixture
def copied(checkpoint: CheckpointFactory, tmp_path: Path) -> CopyFactory:
    """copied(spec) -> a checkpoint that the test may spoil."""
    return lambda spec: shutil.copytree(checkpoint(spec), tmp_path / "model")


# --- what is filled --------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ModelSpec(), TIED, SHARDED], ids=str)
def test_what_a_filled_module_replaces_is_freed_at_once(
    spec: ModelSpec, checkpoint: CheckpointFactory
) -> None:
    """So that a model is never held twice, plain and packed."""
    model_dir = checkpoint(spec)
    config = ModelConfig.from_dict(read_json(model_dir / "config.json"))
    model = Qwen3ForCausalLM(config, BACKENDS["torch"], max_positions=32)
    linears = [part for part in model.modules() if isinstance(part, Linear)]
    if spec.tied:
        linears.remove(model.lm_head)
    weights = {part: weakref.ref(part.weight) for part in linears}
    left = set(weights)

    def replace(module: nn.Module) -> None:
        for part in left.intersection(module.modules()):
            part.replace(torch.empty(0))
            assert weights[part]() is None
            left.remove(part)

    load_weights(model, model_dir, on_filled=replace)
    assert not left


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(),
        SHARDED,
        TIED,
        ModelSpec(attention_bias=True),
        ModelSpec(kind="Qwen2"),
        ModelSpec(kind="Qwen2", tied=True, max_shard_size="50KB"),
    ],
    ids=str,
)
def test_every_tensor_of_the_checkpoint_is_where_it_belongs(
    spec: ModelSpec, checkpoint: CheckpointFactory
) -> None:
    tensors = tensors_of(checkpoint(spec))
    parameters = dict(load(checkpoint(spec)).named_parameters())
    merged = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    num_compared = 0
    for name, parameter in parameters.items():
        layer = name.split(".")[-2]
        names = [name.replace(layer, part) for part in merged.get(layer, [layer])]
        torch.testing.assert_close(
            parameter, torch.cat([tensors[n] for n in names]), rtol=0, atol=0
        )
        num_compared += len(names)
    assert num_compared == len(tensors)


def test_a_sharded_checkpoint_lies_in_several_files(checkpoint: CheckpointFactory) -> None:
    shards = list(checkpoint(SHARDED).glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (checkpoint(SHARDED) / WEIGHTS).exists()


def test_shards_without_an_index_are_read_too(copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    expected = load(model_dir).state_dict()
    (model_dir / INDEX).unlink()
    found = load(model_dir).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_with_an_index_only_the_files_it_names_are_read(copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    save_file({"left.over": torch.zeros(1)}, model_dir / "model-old.safetensors")
    load(model_dir)


@pytest.mark.parametrize("file_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_converted_to_the_parameters_dtype(
    file_dtype: str, dtype: torch.dtype, checkpoint: CheckpointFactory
) -> None:
    model_dir = checkpoint(ModelSpec(num_layers=1, file_dtype=file_dtype))
    tensors = tensors_of(model_dir)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, file_dtype)}
    config = ModelConfig.from_dict(read_json(model_dir / "config.json"))
    assert config.dtype == file_dtype
    model = Qwen3ForCausalLM(config, BACKENDS["torch"], max_positions=32).to(dtype)
    load_weights(model, model_dir)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.dtype == dtype
    assert torch.equal(weight, tensors["model.layers.0.mlp.down_proj.weight"].to(dtype))


# --- tied heads ------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding(checkpoint: CheckpointFactory) -> None:
    assert "lm_head.weight" not in tensors_of(checkpoint(TIED))
    model = load(checkpoint(TIED))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_tied_head_may_stand_in_the_file_if_it_is_equal(copied: CopyFactory) -> None:
    model_dir = copied(TIED)
    embedding = tensors_of(model_dir)["model.embed_tokens.weight"]
    rewrite(model_dir, **{"lm_head.weight": embedding.clone()})
    assert torch.equal(load(model_dir).lm_head.weight, embedding)


def test_a_tied_weight_may_stand_under_the_heads_name_alone(copied: CopyFactory) -> None:
    model_dir = copied(TIED)
    embedding = tensors_of(model_dir)["model.embed_tokens.weight"]
    rewrite(model_dir, **{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    model = load(model_dir)
    assert torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_a_tied_weight_must_stand_under_one_of_its_names(copied: CopyFactory) -> None:
    model_dir = copied(TIED)
    rewrite(model_dir, **{"model.embed_tokens.weight": None})
    with pytest.raises(ValueError, match=r"no tensor fills 2 parameters: model\.embed_tokens"):
        load(model_dir)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(TIED)
    head = tensors_of(model_dir)["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    rewrite(model_dir, **{"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        load(model_dir)
    weight = tensors_of(model_dir)["model.embed_tokens.weight"]
    weight[3, 1] = torch.nan  # which is not equal to itself
    rewrite(model_dir, **{"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()})
    load(model_dir)


def test_an_untied_head_has_its_own_weight(checkpoint: CheckpointFactory) -> None:
    model = load(checkpoint(ModelSpec()))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_untied_head_must_be_in_the_file(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    rewrite(model_dir, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r"no tensor fills 1 parameters: lm_head\.weight"):
        load(model_dir)


# --- what is wrong with a checkpoint ---------------------------------------------------------


def refused(model_dir: Path, *parts: str) -> None:
    """LLM raises ValueError, and its message names all of `parts`."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        LLM(str(model_dir), device="cpu", max_model_len=32, max_num_seqs=1)
    for part in parts:
        assert part in str(error.value)


def test_a_directory_without_weights_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    (model_dir / WEIGHTS).unlink()
    refused(model_dir, str(model_dir), "model.safetensors")


def test_a_directory_without_config_json_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    (model_dir / "config.json").unlink()
    refused(model_dir, str(model_dir), "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00"], ids=repr)
def test_a_broken_config_json_is_refused(text: str, copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    (model_dir / "config.json").write_text(text, encoding="utf-8")
    refused(model_dir, str(model_dir / "config.json"))


def test_model_safetensors_is_the_checkpoint_whatever_lies_beside_it(copied: CopyFactory) -> None:
    """As in transformers: neither another file nor shards with their index are read."""
    model_dir = copied(ModelSpec())
    expected = load(model_dir).state_dict()
    others = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(model_dir).items()}
    save_file(others, model_dir / "model-2.safetensors")
    save_file(others, model_dir / "model_old.safetensors")
    weight_map = dict.fromkeys(others, "model-2.safetensors")
    (model_dir / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    found = load(model_dir).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_tensor_that_comes_twice_is_refused(with_index: bool, copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    if not with_index:
        (model_dir / INDEX).unlink()
    first, second = sorted(model_dir.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refused(model_dir, str(model_dir), repr(name), "twice")


def test_rotary_frequencies_of_old_exports_are_passed_over(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    expected = load(model_dir).state_dict()
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    rewrite(model_dir, **{name: torch.ones(16) for name in names})
    found = load(model_dir).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_refused_with_what_to_do(name: str, copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec(tokenizer=True))
    (model_dir / name).write_text(LFS_POINTER, encoding="utf-8")
    refused(model_dir, str(model_dir / name), "git lfs pull")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("adapter_config.json", "LoRA adapter"),
        ("model-Q4_K_M.gguf", "GGUF"),
        ("pytorch_model.bin", "safetensors"),
    ],
)
@pytest.mark.parametrize("kept", [[], ["config.json"]], ids=["alone", "with config.json"])
def test_what_is_no_checkpoint_is_named(
    name: str, advice: str, kept: list[str], copied: CopyFactory
) -> None:
    model_dir = copied(ModelSpec())
    for entry in list(model_dir.iterdir()):
        if entry.name not in kept:
            entry.unlink()
    (model_dir / name).write_text("{}", encoding="utf-8")
    refused(model_dir, str(model_dir), advice)


@pytest.mark.parametrize(
    ("name", "advice"), [("m.gguf", "GGUF"), (WEIGHTS, "give the directory"), ("x.txt", "file")]
)
def test_a_file_is_no_model(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("", encoding="utf-8")
    refused(tmp_path / name, str(tmp_path / name), advice)


@pytest.mark.parametrize("model", ["~nobody-of-this-name/models", "a" * 300])
def test_a_name_that_cannot_be_a_path_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=model[:9]):
        LLM(model)


def test_a_missing_shard_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    shard = sorted(model_dir.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(model_dir, shard.name, INDEX)


def test_a_broken_index_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    (model_dir / INDEX).write_text("{", encoding="utf-8")
    refused(model_dir, INDEX)


@pytest.mark.parametrize("weight_map", [{}, ...], ids=["empty", "absent"])
def test_an_index_that_names_no_file_is_refused(weight_map: object, copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    edit_json(model_dir / INDEX, weight_map=weight_map)
    refused(model_dir, str(model_dir))


@pytest.mark.parametrize("kept", [0, 4, 200, -1], ids="{} bytes kept".format)
def test_a_truncated_file_is_refused(kept: int, copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    path = model_dir / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(model_dir, str(path), "truncated")


@pytest.mark.parametrize("start", [b"\xff" * 8, b"\x08\0\0\0\0\0\0\0garbage!"], ids=repr)
def test_a_corrupt_header_is_refused(start: bytes, copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    path = model_dir / WEIGHTS
    path.write_bytes(start + path.read_bytes()[len(start) :])
    refused(model_dir, str(path), "corrupt")


def test_one_broken_shard_is_named(copied: CopyFactory) -> None:
    model_dir = copied(SHARDED)
    shard = sorted(model_dir.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(model_dir, str(shard))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", [64, 65]),
        ("model.layers.0.mlp.up_proj.weight", [95, 64]),
        ("model.layers.0.self_attn.q_norm.weight", [1]),
        ("model.embed_tokens.weight", [306, 64]),
        ("model.norm.weight", [1, 64]),
    ],
)
def test_a_wrong_shape_is_refused(name: str, shape: list[int], copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    expected = list(load_file(model_dir / WEIGHTS)[name].shape)
    rewrite(model_dir, **{name: torch.zeros(shape)})
    refused(model_dir, name, str(shape), str(expected))


def test_a_tensor_of_integers_is_refused_as_quantised(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(model_dir / WEIGHTS)[name]
    rewrite(model_dir, **{name: weight.to(torch.int8)})
    refused(model_dir, name, "is I8", "quantised checkpoints are not implemented")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.qkv_proj.weight",
        "score.weight",
    ],
)
def test_a_tensor_that_the_model_has_no_parameter_for_is_refused(
    name: str, copied: CopyFactory
) -> None:
    model_dir = copied(ModelSpec())
    rewrite(model_dir, **{name: torch.zeros(1)})
    refused(model_dir, name)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ],
)
def test_a_parameter_that_no_tensor_fills_is_refused(name: str, copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    rewrite(model_dir, **{name: None})
    refused(model_dir, name)


def test_a_missing_bias_is_refused(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec(kind="Qwen2"))
    rewrite(model_dir, **{"model.layers.0.self_attn.v_proj.bias": None})
    refused(model_dir, "model.layers.0.self_attn.v_proj.bias")


def test_more_layers_than_the_checkpoint_has_are_refused(copied: CopyFactory) -> None:
    model_dir = copied(ModelSpec())
    edit_json(model_dir / "config.json", num_hidden_layers=3, layer_types=...)
    refused(model_dir, "model.layers.2.", "no tensor fills 11 parameters")


EXPERTS = (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 24))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts.3.up_proj.weight": None}, ("no tensor fills 1", "experts.3.up_proj")),
        ({"gate.weight": torch.zeros(5, 64)}, ("gate.weight", "[5, 64]", "[4, 64]")),
        ({"experts.4.up_proj.weight": torch.zeros(24, 64)}, ("no parameter", "experts.4")),
        ({"experts.down_proj": torch.zeros(4, 64, 24)}, ("experts.down_proj", "one by one")),
    ],
    ids=str,
)
def test_experts_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], words: tuple[str, ...], copied: CopyFactory
) -> None:
    model_dir = copied(ModelSpec("Qwen3Moe", more=EXPERTS))
    rewrite(model_dir, **{f"model.layers.1.mlp.{name}": new for name, new in changes.items()})
    refused(model_dir, *words)


# --- where a model is found ------------------------------------------------------------------


def test_a_file_instead_of_a_directory_is_refused(tiny_model: Path) -> None:
    refused(tiny_model / WEIGHTS, str(tiny_model / WEIGHTS), "is a file")


@pytest.mark.parametrize("model", ["no/such/directory", "/no/such", "two--dashes", "no-such-repo"])
def test_what_is_neither_directory_nor_known_repo_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{model} is no directory")):
        LLM(model)


@pytest.mark.parametrize("model", [None, 3, b"model", ["model"]], ids=repr)
def test_a_model_that_is_no_path_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(model))):
        LLM(model)  # type: ignore[arg-type]


def test_a_path_object_is_taken_for_a_directory(tiny_model: Path) -> None:
    assert resolve_model_dir(tiny_model) == tiny_model


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub client, which is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_hub_cache(source: Path, hub_cache: Path, repo_id: str) -> Path:
    """Lay a checkpoint out as the Hub client keeps a downloaded repo: its snapshot's directory."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("spec", [ModelSpec(), SHARDED], ids=str)
def test_a_repo_id_is_taken_from_the_hub_cache_when_offline(
    spec: ModelSpec, checkpoint: CheckpointFactory, hub_cache: Path
) -> None:
    put_in_hub_cache(checkpoint(spec), hub_cache, "someone/Tiny-Qwen3")
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 2}
    with LLM("someone/Tiny-Qwen3", **options) as llm:
        from_hub = completions(llm, [[5, 6, 7]], max_tokens=8)
    with LLM(str(checkpoint(spec)), **options) as llm:
        assert completions(llm, [[5, 6, 7]], max_tokens=8) == from_hub


def test_a_repo_whose_weights_are_not_in_the_cache_is_refused(
    tiny_model: Path, hub_cache: Path
) -> None:
    snapshot = put_in_hub_cache(tiny_model, hub_cache, "someone/Tiny-Qwen3")
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        LLM("someone/Tiny-Qwen3")


def test_a_repo_that_is_not_in_the_cache_is_refused_when_offline(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match="someone/Other is no directory, and as a Hub repo"):
        LLM("someone/Other")


@pytest.mark.parametrize("with_weights", [True, False])
def test_only_the_files_of_a_repo_that_are_needed_are_fetched(
    with_weights: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model_dir("someone/Tiny-Qwen3", with_weights) == tmp_path
    [(repo_id, patterns)] = asked
    assert repo_id == "someone/Tiny-Qwen3"
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    small += ["vocab.json", "merges.txt", "chat_template.jinja"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", INDEX]
    others = ["pytorch_model.bin", "README.md", "model.onnx", "original/consolidated.pth"]
    fetched = set(filter_repo_objects(small + weights + others, allow_patterns=patterns))
    assert fetched == set(small + weights if with_weights else small)


# --- random weights --------------------------------------------------------------------------


def test_dummy_weights_need_only_config_json(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 2}
    with LLM(str(tmp_path), load_format="dummy", **options) as llm:
        assert len(completions(llm, [[1, 2, 3]], max_tokens=20)[0]) == 20


@pytest.mark.parametrize("spec", [ModelSpec(), TIED, ModelSpec(kind="Qwen2")], ids=str)
def test_dummy_weights_are_finite_and_not_all_alike(
    spec: ModelSpec, checkpoint: CheckpointFactory
) -> None:
    config = ModelConfig.from_dict(read_json(checkpoint(spec) / "config.json"))
    model = Qwen3ForCausalLM(config, BACKENDS["torch"], max_positions=32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    fill_random(model)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.dim() == 1 or parameter.std() > 0.01, name


def test_an_index_written_by_hand_is_enough(copied: CopyFactory) -> None:
    """Two files by any name, found through the index alone."""
    model_dir = copied(ModelSpec())
    tensors = load_file(model_dir / WEIGHTS)
    (model_dir / WEIGHTS).unlink()
    weight_map = {name: f"{'ab'[len(name) % 2]}.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, model_dir / file)
    (model_dir / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert torch.equal(load(model_dir).lm_head.weight, tensors["lm_head.weight"])

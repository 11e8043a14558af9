"""Every kernel that a step launches was compiled at start-up, whatever the options.

On a CPU, with a runner that believes it has kernels: launches are written down instead of made.
(On a GPU, tests/test_gpu.py listens to the compiler.)
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from nanovllm import kernels
from nanovllm.config import Config
from nanovllm.engine import model_runner
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Batch, ScheduledSequence
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import device, launch
from nanovllm.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no CUDA GPU"),
]


class Machine(NamedTuple):
    """What the kernels believe of the GPU, and which back end attends."""

    is_hopper: bool
    shared_bytes: int
    backend: str


H100 = Machine(True, 227 * 1024, "triton")
OTHER = Machine(False, 99 * 1024, "triton")
Form = tuple[Any, ...]


@pytest.fixture
def launched(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """What has been launched since the list was last cleared: kernel, kinds of arguments."""
    forms: list[Form] = []

    def note(kernel: Any, grid: tuple[int, ...], on: Any, *args: Any, **options: Any) -> None:
        if 0 in grid:
            return
        unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
        kinds = []
        for name, argument in zip(kernel.arg_names, args, strict=False):
            is_number = type(argument) in (int, float)
            known = name not in unspecialised and type(argument) is int
            kinds.append(launch._kind(argument) if known or not is_number else type(argument))
        forms.append((kernel.fn.__name__, *map(str, kinds), *map(str, options.items())))

    @contextmanager
    def nothing_compiled(_: torch.device) -> Iterator[None]:
        yield

    beliefs = {
        "is_hopper": lambda _: machine.is_hopper,
        "has_tma": lambda _: machine.is_hopper,
        "has_pdl": lambda _: machine.is_hopper,
        "shared_memory": lambda _: machine.shared_bytes,
        "launch": note,
    }
    monkeypatch.setattr(kernels, "usable", lambda _: True)
    monkeypatch.setattr(launch, "compiling_ahead", nothing_compiled)
    monkeypatch.setattr(model_runner, "select_backend", lambda *_: machine.backend)
    modules = [importlib.import_module(f"{kernels.__name__}.{module.name}")
               for module in pkgutil.iter_modules(kernels.__path__)]  # fmt: skip
    for module in modules:
        for name, belief in beliefs.items():
            if hasattr(module, name) and module is not launch:
                monkeypatch.setattr(module, name, belief)
    zeros = torch.zeros

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", unpinned)
    assert device.is_hopper(torch.device("cpu")) == machine.is_hopper
    return forms


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "num_hidden_layers": 4, "mlp_only_layers": [1],
}  # fmt: skip


def make_runner(
    directory: Path, head_dim: int, model: dict[str, Any], **options: Any
) -> ModelRunner:
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 50_000,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(raw | model), encoding="utf-8")
    options = {"dtype": "bfloat16", "device": "cpu", "num_kvcache_blocks": 256} | options
    options["enforce_eager"] = True  # no graph is captured, which would launch the same
    return ModelRunner(Config.from_options(str(directory), {"load_format": "dummy", **options}))


def steps(config: Config) -> Iterator[tuple[str, Batch]]:
    """Decodes and prefills of many sizes, within the limits of the options."""

    def item(start: int, end: int, samples: bool = True, **params: Any) -> ScheduledSequence:
        params = {"max_tokens": None, "temperature": 0.5} | params
        seq = Sequence([1] * end, SamplingParams(**params), config.max_model_len)
        seq.block_table = [0] * (-(-end // config.kvcache_block_size) + 1)
        return ScheduledSequence(seq, start, end, samples)

    borders = {1, 2, 16, 64, 128, 192, 256, 1024, 2047, 4095, 5000}
    sizes = sorted({size + more for size in borders for more in (0, 1)})
    length = min(5, config.max_model_len - 1)
    for size in sizes:
        if size <= config.max_num_seqs:
            yield f"decode {size}", Batch(False, [item(length - 1, length)] * size)
            hot = item(length - 1, length, top_p=0.5)
            yield f"decode {size}, filtered", Batch(False, [hot] * size)
    for size in sizes:
        if size > config.max_num_batched_tokens:
            continue
        for count in (1, 2, 3, 17, 70):
            own = size // count
            if count > config.max_num_seqs or not 1 <= own < config.max_model_len:
                continue
            yield f"prefill {count} x {own}", Batch(True, [item(0, own)] * count)
            yield f"chunk {count} x {own}", Batch(True, [item(0, own, samples=False)])
            if own + 16 < config.max_model_len:
                cached = Batch(True, [item(16, 16 + own)] * count)
                yield f"prefill {count} x {own}, cached", cached


CASES: list[tuple[Machine, dict[str, Any]]] = [
    (H100, {}),
    (OTHER, {}),
    (H100, {"max_num_batched_tokens": 4100, "max_model_len": 1100, "max_num_seqs": 200}),
    (H100, {"max_model_len": 3, "max_num_seqs": 1}),
    (H100, {"max_num_batched_tokens": 100, "kvcache_block_size": 16}),
    (H100, {"model": EXPERTS}),
    (H100, {"kv_cache_dtype": "fp8"}),
    (OTHER, {"kv_cache_dtype": "fp8", "dtype": "float16"}),
    (OTHER, {"model": EXPERTS, "max_num_seqs": 9}),
    (H100._replace(backend="torch"), {"max_num_batched_tokens": 64, "max_num_seqs": 300}),
    (H100._replace(backend="torch"), {"max_model_len": 30}),
    (OTHER._replace(backend="torch"), {"dtype": "float32", "max_num_batched_tokens": 32}),
]


@pytest.mark.parametrize(("machine", "options"), CASES, ids=str)
def test_what_a_step_launches_was_compiled(
    machine: Machine, options: dict[str, Any], launched: list[Form], tmp_path: Path
) -> None:
    head_dim = 128 if machine.backend == "triton" else 32
    model = options.get("model", {})
    runner = make_runner(tmp_path, head_dim, **{"model": {}} | options)
    assert len(runner.model.model.layers) == model.get("num_hidden_layers", 2)
    compiled = set(launched)
    assert len(compiled) > 15
    missing: dict[Form, str] = {}
    for name, batch in steps(runner.config):
        launched.clear()
        runner.launch(batch)
        missing |= dict.fromkeys(set(launched) - compiled, name)
    assert not missing


def test_kernels_are_loaded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By several engines at once too: triton 3.6 mixes up what two threads load."""

    class Kernel:
        src = metadata = None
        num_loading = most_loading = num_loaded = 0

        @property
        def run(self) -> None:
            Kernel.num_loading += 1
            Kernel.most_loading = max(Kernel.most_loading, Kernel.num_loading)
            sleep(0.002)
            Kernel.num_loading -= 1
            Kernel.num_loaded += 1

    def start(_: int) -> None:
        with launch.compiling_ahead(torch.device("cuda", 0)):
            asked_for = launch._asked_for.get()
            assert asked_for is not None
            asked_for += [kernel for kernel in [Kernel() for _ in range(10)] for _ in range(2)]

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    assert Kernel.num_loaded == 40
    assert Kernel.most_loading == 1

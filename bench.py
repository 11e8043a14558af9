"""Measure throughput, and how close it comes to what the machine's memory and arithmetic allow.

By default 256 requests of 100-1024 random tokens in and out with the shape of Qwen3-0.6B on a GPU,
and a small workload with the tiny checkpoint on a CPU.
"""

import argparse
import json
import logging
import math
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm import LLM, SamplingParams
from nanovllm.config import KV_CACHE_DTYPES, QUANTIZATIONS
from nanovllm.engine.scheduler import Batch
from nanovllm.layers.linear import Linear
from nanovllm.layers.moe import ExpertWeights, MoE, route
from nanovllm.layers.products import is_panels, pack_for_onednn
from nanovllm.layers.stored_weight import StoredWeight
from nanovllm.model_config import ModelConfig
from nanovllm.utils.device import resolve_device, resolve_dtype
from nanovllm.utils.loader import read_model_config, resolve_model_dir
from nanovllm.utils.memory import in_large_pages
from nanovllm.utils.timer import Timer

ASSETS = Path(__file__).parent / "assets"
GIB = 1 << 30


def parse_args() -> argparse.Namespace:
    """The command line; sizes that are left out depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="a checkpoint: directory or Hub repo id")
    model.add_argument("--dummy", help="a directory with config.json: random weights of that shape")
    parser.add_argument("--num-seqs", type=int, help="requests (256; on a CPU 32)")
    parser.add_argument("--min-input-len", type=int, help="shortest prompt (100; on a CPU 16)")
    parser.add_argument("--max-input-len", type=int, help="longest prompt (1024; on a CPU 256)")
    parser.add_argument("--min-output-len", type=int, help="shortest output (100; on a CPU 16)")
    parser.add_argument("--max-output-len", type=int, help="longest output (1024; on a CPU 256)")
    parser.add_argument("--input-len", type=int, help="all prompts of this length")
    parser.add_argument("--output-len", type=int, help="all outputs of this length")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1, help="runs, each with new random prompts")
    parser.add_argument(
        "--profile", action="store_true", help="one more run that shows where the time goes"
    )
    parser.add_argument("--json", type=Path, help="a file to which each run adds a line of figures")
    engine = parser.add_argument_group("engine options (see nanovllm.config.Config)")
    engine.add_argument("--device", default="auto")
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--attention-backend", default="auto")
    engine.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    engine.add_argument("--enforce-eager", action="store_true")
    engine.add_argument("--max-model-len", type=int, default=4096)
    engine.add_argument("--max-num-seqs", type=int, default=512)
    engine.add_argument("--max-num-batched-tokens", type=int, default=16384)
    engine.add_argument("--kvcache-block-size", type=int, default=256)
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.95)
    engine.add_argument("--tensor-parallel-size", type=int, default=1)
    engine.add_argument("--quantization", default="auto", choices=("auto", *QUANTIZATIONS))
    args = parser.parse_args()

    has_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    if args.model is None and args.dummy is None:
        if has_gpu:
            args.dummy = str(ASSETS / "qwen3-0.6b")
        else:
            args.model = str(ASSETS / "tiny-qwen3")
    args.num_seqs = args.num_seqs or (256 if has_gpu else 32)
    for kind in ("input", "output"):
        fixed = getattr(args, f"{kind}_len")
        low = fixed or getattr(args, f"min_{kind}_len") or (100 if has_gpu else 16)
        high = fixed or getattr(args, f"max_{kind}_len") or (1024 if has_gpu else 256)
        setattr(args, f"min_{kind}_len", low)
        setattr(args, f"max_{kind}_len", max(low, high))
    return args


@dataclass(frozen=True)
class Machine:
    """What the device was measured to do."""

    read_bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """Read bandwidth (the better of a pure read and a copy) and matrix rate, run eagerly."""
        num_bytes, size = (4 * GIB, 8192) if device.type == "cuda" else (GIB, 2048)
        machine = cls(_read_bandwidth(device, num_bytes), _matrix_rate(device, dtype, size))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the engine finds the memory free
        return machine


def _read_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second over a buffer of `num_bytes`: read, or read and written, what is faster."""
    source = torch.randn(num_bytes // 4, device=device)
    if device.type == "cpu":
        source = in_large_pages(source)  # as weights lie
    target = torch.empty_like(source)
    read_s = seconds(device, lambda: source.sum())
    copy_s = seconds(device, lambda: target.copy_(source))
    return max(num_bytes / read_s, 2 * num_bytes / copy_s)


def _matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square matrix product.

    On a CPU of a packed matrix: the better of the engine's product and oneDNN's.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if device.type == "cpu":
        ours, onednn = (Linear(size, size, device=device, dtype=dtype) for _ in range(2))
        for layer in (ours, onednn):
            layer.weight.copy_(b)
        ours.pack()
        onednn.replace(pack_for_onednn(onednn.weight))
        ways = [lambda: ours(a), lambda: onednn(a)]
    return 2 * size**3 / min(seconds(device, way) for way in ways)


def seconds(device: torch.device, function: Callable[[], object], rounds: int = 10) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(rounds + 2):
        timer = Timer(device)
        with timer.region("call"):
            function()
        times.append(timer.totals()["call"][0])
    return median(times[2:])


class Floor:
    """Adds up the least time that the scheduled steps can take on a machine.

    A decode step must read the weights once and the K/V of its sequences, blocks that several of
    them share once. A prefill step must do the arithmetic of its tokens, or read the weights,
    whichever takes longer. Tokens that nothing is sampled from need only K and V of the last layer.

    Of a layer's experts those are read that some token chooses: as many as are to be expected, by
    how often each is chosen.

    Args:
        expert_shares: from expert_shares.
    """

    def __init__(self, llm: LLM, machine: Machine, expert_shares: Sequence[Tensor] = ()) -> None:
        assert llm.model_runner is not None
        self.machine = machine
        # Where ranks share the model, each at the same time has its part to read and to compute.
        self.part: ModelConfig = llm.model_runner.part
        self.block_size = llm.config.kvcache_block_size
        model = llm.model_runner.model
        stored = llm.model_runner.kv_cache, llm.model_runner.kv_scales
        embedding = model.model.embed_tokens.weight
        config, layers = self.part, model.model.layers
        experts = [
            p for part in layers.modules() if isinstance(part, ExpertWeights)
            for p in part.parameters()
        ]  # fmt: skip
        # Of an input embedding whose memory is not the output head's too, only rows are read.
        self.weight_bytes = num_bytes(model.parameters()) - num_bytes(experts)
        self.weight_bytes -= sum(padding_bytes(p) for p in model.modules() if isinstance(p, Linear))
        if model.lm_head.weight is not embedding:
            self.weight_bytes -= embedding.nbytes
        self.token_bytes = sum(x[:, :, 0, 0].nbytes for x in stored if x.numel())
        self.expert_shares = expert_shares
        self.expert_bytes = num_chosen = 0
        if config.experts is not None:
            num_experts = config.experts.num_experts * len(config.experts.layers)
            self.expert_bytes = num_bytes(experts) // max(1, num_experts)
            num_chosen = config.experts.num_chosen

        def weights(module: nn.Module) -> tuple[int, int]:
            """Those that a token is multiplied with: outside experts, and of the chosen ones."""
            parts = (part for part in module.modules() if isinstance(part, StoredWeight))
            shapes = [part.own_shape for part in parts]
            dense = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
            one_each = sum(math.prod(shape[1:]) for shape in shapes if len(shape) == 3)
            return dense, num_chosen * one_each

        self.flops_per_token = 2 * sum(weights(layers))

        # Beyond K and V in the last layer.
        kv_rows = 2 * config.num_kv_heads * config.head_dim
        dense, sparse = weights(layers[-1])
        dense -= kv_rows * config.hidden_size
        self.flops_per_last = 2 * (dense + sparse)
        self.flops_per_logits = 2 * embedding.numel()
        # Weights that only tokens which are sampled from pass through: the last layer's, the head.
        # Its experts count as those of a layer, by number of sequences: see _touched_experts.
        linears = [part for part in layers[-1].modules() if isinstance(part, Linear)]
        qkv_proj = layers[-1].self_attn.qkv_proj
        self.last_bytes = sum(map(matrix_bytes, linears))
        self.last_bytes -= matrix_bytes(qkv_proj) * kv_rows // qkv_proj.own_shape[0]
        self.last_bytes += matrix_bytes(model.lm_head)
        self.last_has_experts = bool(sparse)
        self.weights_s = self.kv_s = self.prefill_s = self.linear_s = 0.0
        self.num_decode_steps = self.num_prefill_steps = 0

    def observe(self, event: str, batch: Batch | None) -> None:
        """For LLM.observers."""
        if event == "scheduled":
            self.count(batch)

    def count(self, batch: Batch | None) -> None:
        """Add a step, right after it was scheduled."""
        if batch is None:
            return
        weight_bytes = self.weight_bytes + self._touched_experts(batch) * self.expert_bytes
        if not _samples(batch):
            weight_bytes -= self.last_bytes
        weights_s = weight_bytes / self.machine.read_bytes_per_s
        if batch.is_prefill:
            self.num_prefill_steps += 1
            self.prefill_s += max(weights_s, self._flops(batch) / self.machine.flops_per_s)
            self.linear_s += self._linear_flops(batch) / self.machine.flops_per_s
        else:
            self.num_decode_steps += 1
            self.weights_s += weights_s
            kv_bytes = self.token_bytes * self._distinct_tokens(batch)
            self.kv_s += kv_bytes / self.machine.read_bytes_per_s

    def _touched_experts(self, batch: Batch) -> float:
        """Experts of all layers that a step's tokens choose, as their expectation.

        Of a prefill, as though each sequence had one token: the least that there can be.
        """
        num_seqs, layers = len(batch.items), self.expert_shares
        if self.last_has_experts and not _samples(batch):
            layers = layers[:-1]
        return sum(expected_experts(shares, num_seqs) for shares in layers)

    def _linear_flops(self, batch: Batch) -> int:
        """Arithmetic of a prefill step's linear layers, were the last layer computed in full."""
        return batch.num_tokens * self.flops_per_token

    def _flops(self, batch: Batch) -> int:
        """Arithmetic that a prefill step needs: linear layers, causal attention, logits."""
        config = self.part
        ends = [item.end for item in batch.items if item.samples]
        linear = self._linear_flops(batch)
        linear -= (batch.num_tokens - len(ends)) * self.flops_per_last
        # Query i attends to i + 1 keys; two products of head_dim per head, query and key.
        pairs = sum(
            (item.start + 1 + item.end) * (item.end - item.start) / 2 for item in batch.items
        )
        pairs = pairs * (config.num_layers - 1) + sum(ends)
        attention = 4 * pairs * config.num_heads * config.head_dim
        return int(linear + attention + len(ends) * self.flops_per_logits)

    def _distinct_tokens(self, batch: Batch) -> int:
        """Tokens whose K/V a decode step reads. Blocks that are shared are full ones."""
        tables = [item.seq.block_table for item in batch.items]
        num_blocks = sum(map(len, tables))
        num_shared = num_blocks - len(set(chain.from_iterable(tables)))
        return sum(item.end for item in batch.items) - num_shared * self.block_size

    @property
    def total_s(self) -> float:
        return self.weights_s + self.kv_s + self.prefill_s

    def report(self, elapsed_s: float) -> str:
        """What share of the floor a run of `elapsed_s` seconds reached, and what it consists of."""
        return (
            f"Floor: {self.total_s:.3f}s (K/V {self.kv_s:.3f}s + weights {self.weights_s:.3f}s "
            f"in {self.num_decode_steps} decode steps, {self.num_prefill_steps} prefill steps "
            f"{self.prefill_s:.3f}s) "
            f"at {self.machine.read_bytes_per_s / 1e9:.1f} GB/s and "
            f"{self.machine.flops_per_s / 1e12:.2f} TFLOP/s measured here; "
            f"reached: {self.total_s / elapsed_s:.1%}\n"
            f"Linear layers of the prefill steps, every token through all of them: "
            f"{self.linear_s:.3f}s = {self.linear_s / elapsed_s:.1%}"
        )


def num_bytes(parameters: Iterable[Tensor]) -> int:
    """That are read, if all of them are."""
    return sum(parameter.nbytes for parameter in parameters)


def matrix_bytes(layer: Linear) -> int:
    """Of its weight and its scales."""
    stored = num_bytes(p for name, p in layer.named_parameters() if name != "bias")
    return stored - padding_bytes(layer)


def padding_bytes(layer: Linear) -> int:
    """Of rows that a layer's panels are filled up with."""
    if not is_panels(layer.weight):
        return 0
    return (layer.weight.numel() - layer.own_shape.numel()) * layer.dtype.itemsize


def _samples(batch: Batch) -> bool:
    return any(item.samples for item in batch.items)


def expected_experts(shares: Tensor, num_tokens: int) -> float:
    """Experts of a layer that one of so many tokens chooses, if each is chosen by such a share."""
    return float((1 - (1 - shares) ** num_tokens).sum())


def expert_shares(llm: LLM, rng: random.Random) -> list[Tensor]:
    """What share of random prompts' last tokens choose each expert: [num_experts] a layer with any.

    Tokens of one sequence choose much the same experts in a model of random weights, those of
    different ones do not: and a decode step has tokens of different ones.
    """
    assert llm.model_runner is not None
    decoder, config = llm.model_runner.model.model, llm.config
    layers = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, MoE)]
    if not layers:
        return []
    num_seqs = min(256, config.max_num_seqs, max(1, config.max_num_batched_tokens // 8))
    length = min(64, config.max_num_batched_tokens // num_seqs, config.max_model_len - 1)
    counts = [torch.zeros(layer.gate.own_shape[0]) for layer in layers]

    def count(index: int, logits: Tensor) -> None:
        layer = layers[index]
        # The model's last layer is given these tokens alone.
        is_last = layer is decoder.layers[-1].mlp
        logits = logits if is_last else logits[length - 1 :: length]
        _, chosen = route(logits, layer.num_chosen, layer.renormalized)
        counts[index] += chosen.flatten().cpu().bincount(minlength=logits.size(1))

    handles = [
        layer.gate.register_forward_hook(lambda _, __, out, index=index: count(index, out))
        for index, layer in enumerate(layers)
    ]
    vocab_size = config.model_config.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(num_seqs)]
    llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    for handle in handles:
        handle.remove()
    return [found / num_seqs for found in counts]


# What has just been done when an engine's observers are told of an event.
PHASES = {
    "scheduled": "schedule",
    "launched": "launch",
    "read": "wait for the ids",
    "processed": "postprocess",
}


def watch(llm: LLM) -> tuple[Timer, Timer]:
    """Time the engine's phases (wall clock) and the model's parts (device) from now on.

    Decode steps that run as CUDA graphs do not pass through the model's parts.
    """
    assert llm.model_runner is not None
    phases, parts = Timer(), Timer(llm.model_runner.device)
    last = perf_counter()

    def observe(event: str, _: Batch | None) -> None:
        nonlocal last
        now = perf_counter()
        if event in PHASES:
            phases.add(PHASES[event], now - last)
        last = now

    llm.observers.append(observe)
    names = {
        "Attention": "attention and K/V store",
        "Linear": "linear layers",
        "MergedLinear": "linear layers",
        "RowParallelLinear": "linear layers, with their sum over the ranks",
        "GatedLinear": "linear layers and activation",
        "MoE": "experts",
        "RMSNorm": "norms, counted there too",
        "LMHead": "output head",
        "Embedding": "embedding",
        "Qwen3Model": "all layers",
    }
    for module in llm.model_runner.model.modules():
        if name := names.get(type(module).__name__):
            module.forward = parts.wrap(name, module.forward)
    return phases, parts


def print_kernels(run: Callable[[], None]) -> None:
    """Call `run`, and print how long the GPU was busy and which kernels took its time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            by_name.setdefault(event.name, []).append(spans[-1][1] - spans[-1][0])
    busy, total = busy_time(spans)
    print(
        f"GPU busy {busy / 1e6:.3f}s of {total / 1e6:.3f}s, idle {1 - busy / total:.1%} (profiled)"
    )
    for name, times in sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:12]:
        print(f"  {name[:48]:<48} {sum(times) / 1e6:9.3f}s {len(times):9d} launches")


def busy_time(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How long any of the (start, end) was under way, and the time from the first to the last."""
    busy, last = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy, last - min(spans)[0]


def print_profile(title: str, timer: Timer) -> None:
    """A line a region: seconds in all, calls, microseconds a call."""
    print(title)
    for name, (total_s, count) in timer.totals().items():
        print(f"  {name:<30} {total_s:9.3f}s {count:9d} calls {total_s / count * 1e6:10.1f}us")


def run_once(
    llm: LLM,
    machine: Machine,
    args: argparse.Namespace,
    rng: random.Random,
    shares: list[Tensor],
) -> dict[str, Any]:
    """Generate from new random prompts, print the figures and give them back."""
    vocab_size = llm.config.model_config.vocab_size
    prompts = [
        [
            rng.randrange(vocab_size)
            for _ in range(rng.randint(args.min_input_len, args.max_input_len))
        ]
        for _ in range(args.num_seqs)
    ]
    params = [
        SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            ignore_eos=True,
            max_tokens=rng.randint(args.min_output_len, args.max_output_len),
        )
        for _ in range(args.num_seqs)
    ]
    floor = Floor(llm, machine, shares)
    llm.observers.append(floor.observe)
    started = perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=args.device == "cpu")
    elapsed_s = perf_counter() - started
    llm.observers.remove(floor.observe)

    total = sum(len(output["token_ids"]) for output in outputs)
    assert total == sum(p.max_tokens for p in params), "some output has not its full length"
    print(f"Total: {total}tok, Time: {elapsed_s:.2f}s, Throughput: {total / elapsed_s:.2f}tok/s")
    num_input = sum(map(len, prompts))
    print(f"Prompts: {num_input}tok, {num_input / elapsed_s:.2f}tok/s")
    print(floor.report(elapsed_s))
    stats = (f"{name} {round(value, 3)}" for name, value in llm.stats().items())
    print(f"Stats so far: {', '.join(stats)}", flush=True)
    return {
        "tok_s": round(total / elapsed_s, 2),
        "prompt_tok_s": round(num_input / elapsed_s, 2),
        "floor_share": floor.total_s / elapsed_s,
        "linear_share": floor.linear_s / elapsed_s,
        "read_gb_s": round(machine.read_bytes_per_s / 1e9, 2),
        "tflop_s": round(machine.flops_per_s / 1e12, 3),
    }


def description(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what: the same for all runs of a command."""
    assert llm.model_runner is not None
    device, quantization = llm.model_runner.device, llm.model_runner.part.quantization
    on_cuda = device.type == "cuda"
    return {
        "engine": "nano-vLLM",
        "model": Path(args.dummy or args.model).name,
        "num_seqs": args.num_seqs,
        "input_len": [args.min_input_len, args.max_input_len],
        "output_len": [args.min_output_len, args.max_output_len],
        "dtype": str(llm.model_runner.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else quantization.method,
        "kv_cache_dtype": llm.config.kv_cache_dtype,
        "device": torch.cuda.get_device_name(device) if on_cuda else processor(),
        "ranks": llm.config.tensor_parallel_size,
        "threads": None if on_cuda else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": f"{date.today()}",
    }


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    args = parse_args()
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        raise SystemExit(f"bench.py: {error}") from None
    logging.basicConfig(format="%(message)s")
    model_dir = resolve_model_dir(args.dummy or args.model, with_weights=args.dummy is None)
    model = read_model_config(model_dir).quantized(args.quantization)
    dtype = resolve_dtype(args.dtype, model.dtype, device, model.is_int4)
    logging.getLogger("nanovllm").setLevel(logging.INFO)
    machine = Machine.measure(device, dtype)
    started = perf_counter()
    llm = LLM(
        args.dummy or args.model,
        load_format="dummy" if args.dummy else "auto",
        device=args.device,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.enforce_eager,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kvcache_block_size=args.kvcache_block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
        quantization=args.quantization,
    )
    assert llm.model_runner is not None
    print(
        f"{args.dummy or args.model} on {args.device}, attention: {llm.model_runner.backend}, "
        f"{llm.model_runner.num_blocks} blocks; ready after {perf_counter() - started:.1f}s"
    )
    rng = random.Random(args.seed)
    llm.generate([[0] * args.min_input_len], SamplingParams(ignore_eos=True), use_tqdm=False)
    shares = expert_shares(llm, random.Random(args.seed))
    if shares:
        sizes = [expected_experts(share, args.num_seqs) for share in shares]
        print(
            f"Experts: {sum(sizes) / len(sizes):.1f} of {len(shares[0])} a layer are expected in a "
            f"step of {args.num_seqs} tokens, by how often each was chosen"
        )
    for _ in range(args.repeat):
        figures = run_once(llm, machine, args, rng, shares)
        if args.json is not None:
            with args.json.open("a") as file:
                print(json.dumps(description(llm, args) | figures), file=file)
    timers = watch(llm) if args.profile else ()
    if args.profile and device.type == "cuda":
        print_kernels(lambda: run_once(llm, machine, args, rng, shares))
    elif args.profile:
        run_once(llm, machine, args, rng, shares)
    for title, timer in zip(("Phases (wall clock)", "Model (device)"), timers, strict=False):
        print_profile(title, timer)
    llm.exit()


if __name__ == "__main__":
    main()

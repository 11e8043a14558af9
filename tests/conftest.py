"""What the tests share: small random checkpoints, transformers as the reference, a spy, a tally."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import secrets

# Of the random models; set here, so that processes that share a run of the tests have the same.
os.environ.setdefault("NANOVLLM_TEST_SEED", str(secrets.randbelow(10**6)))

import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.utils.quantization import quantize

# The models are so small that a second thread gains nothing, and where the cores are shared the
# threads' waiting for one another makes it 60 times slower.
torch.set_num_threads(1)

transformers.utils.logging.disable_progress_bar()

IS_V5 = int(transformers.__version__.split(".")[0]) >= 5  # and not 4

# Two logits closer than this share of the logits' scale may swap places by rounding alone.
NEAR_TIE = 1e-5
NEAR_ROUTE = 2e-6  # and two logits of a router, where what they decide on is tiny
ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-qwen3"  # the trained checkpoint
STOP_WORD = "<|im_end|>"


# --- hooks -----------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip themselves where there is no CUDA GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


class Tally:
    """Facts that the tests measured, printed at the end of the run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.maxima: dict[str, float] = {}

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount

    def maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(value, self.maxima.get(name, value))


TALLY_KEY = pytest.StashKey[Tally]()


class Command:
    """A process that runs from the repository's root, beside the tests; `finish` waits for it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            arguments,
            cwd=Path(__file__).parents[1],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # Somebody has to read, or else the process would wait when the pipe is full.
        self._output = ThreadPoolExecutor(1).submit(lambda: self.process.communicate()[0])

    def finish(self) -> tuple[int, str]:
        """Its exit status and all that it wrote."""
        output = self._output.result()
        return self.process.returncode, output


COMMANDS_KEY = pytest.StashKey[dict[str, Command]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start what tests marked `beside` will wait for: it takes long, and the tests one core.

    Where several processes share the tests (pytest-xdist), it begins with the test.
    """
    is_shared = hasattr(session.config, "workerinput") or session.config.option.collectonly
    for item in () if is_shared else session.items:
        _command_of(item)
    # Every engine that is shut down collects garbage: a third of a second with all that was
    # imported until here to look at.
    gc.collect()
    gc.freeze()


def _command_of(item: Any) -> Command | None:
    """The process of a test marked `beside`. Tests with the same mark share one."""
    if (mark := item.get_closest_marker("beside")) is None:
        return None
    commands = item.config.stash[COMMANDS_KEY]
    if str(mark) not in commands:
        commands[str(mark)] = Command(*mark.args, **mark.kwargs)
    return commands[str(mark)]


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Command:
    """The process of a test marked `beside`."""
    found = _command_of(request.node)
    assert found is not None
    return found


def pytest_unconfigure(config: pytest.Config) -> None:
    for command in config.stash[COMMANDS_KEY].values():
        command.process.kill()
        command.finish()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", action="store_true", help="print what the tests measured")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY_KEY] = Tally()
    config.stash[COMMANDS_KEY] = {}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tally = config.stash[TALLY_KEY]
    if not config.getoption("--measured"):
        return
    if tally.counts or tally.maxima:
        terminalreporter.section("measured")
    for name, amount in sorted(tally.counts.items()):
        terminalreporter.write_line(f"{name}: {amount}")
    for name, value in sorted(tally.maxima.items()):
        terminalreporter.write_line(f"{name}: at most {value:.2e}")


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[TALLY_KEY]


def load_tasks() -> ModuleType:
    """The task generator beside the trained checkpoint, whose folder is no package."""
    spec = importlib.util.spec_from_file_location("tiny_tasks", TINY / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_tasks"] = module
    spec.loader.exec_module(module)
    return module


def load_example(name: str) -> ModuleType:
    """One of examples/, or ../example."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- checkpoints -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """A small random model. Weights are so large that its logits are sharp."""

    kind: str = "Qwen3"  # of transformers, without "ForCausalLM"
    vocab_size: int = 307
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    tied: bool = False
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.3
    file_dtype: str = "float32"
    max_shard_size: str = "5GB"
    tokenizer: bool = False
    seed: int = 0
    rope: tuple[tuple[str, Any], ...] = ()  # of rope_parameters, but for the base
    more: tuple[tuple[str, Any], ...] = ()  # of config.json

    def __str__(self) -> str:
        """For a test's id: enough to make the same model again."""
        return "-".join(
            (
                self.kind.lower(),
                f"L{self.num_layers}",
                f"v{self.vocab_size}",
                f"h{self.hidden_size}x{self.intermediate_size}",
                f"heads{self.num_heads}:{self.num_kv_heads}x{self.head_dim}",
                "tied" if self.tied else "untied",
                *(["bias"] if self.attention_bias else []),
                *(["sharded"] if self.max_shard_size != "5GB" else []),
                f"theta{self.rope_theta:g}",
                f"eps{self.rms_norm_eps:g}",
                f"std{self.initializer_range:.2g}",
                f"seed{self.seed}",
                *(f"{key}={value}" for key, value in (*self.rope, *self.more)),
            )
        )


def rope_options(theta: float, scaling: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary embedding and its scaling, as this transformers is told it."""
    if not IS_V5:
        return {"rope_theta": theta, "rope_scaling": scaling or None}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


def make_hf_model(spec: ModelSpec) -> nn.Module:
    """The model in transformers, float32; norms and biases random too, so that none can be lost."""
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tied,
        **rope_options(spec.rope_theta, dict(spec.rope)),
        "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.initializer_range,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if spec.kind != "Qwen2":
        sizes["attention_bias"] = spec.attention_bias
    torch.manual_seed(spec.seed)
    sizes |= {key: list(v) if isinstance(v, tuple) else v for key, v in spec.more}
    config = getattr(transformers, f"{spec.kind}Config")(**sizes)
    model: nn.Module = getattr(transformers, f"{spec.kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save_tokenizer(directory: Path, vocab_size: int, stop_id: int = 0) -> None:
    """A tokenizer of one word an id: "w0", "w1" and so on, but STOP_WORD, the eos, at stop_id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [STOP_WORD if i == stop_id else f"w{i}" for i in range(vocab_size)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=STOP_WORD, unk_token=words[-1]
    ).save_pretrained(directory)


def save_checkpoint(spec: ModelSpec, directory: Path) -> Path:
    """Write the model in the usual format."""
    model = make_hf_model(spec).to(getattr(torch, spec.file_dtype))
    model.save_pretrained(directory, max_shard_size=spec.max_shard_size)
    if spec.tokenizer:
        save_tokenizer(directory, spec.vocab_size)
    return directory


CheckpointFactory = Callable[[ModelSpec], Path]

FP8_CONFIG = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}  # fmt: skip


def tensors_of(model_dir: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint's files."""
    tensors: dict[str, Tensor] = {}
    for path in model_dir.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def save_tensors(source: Path, target: Path, files: dict[str, dict[str, Tensor]]) -> Path:
    """A copy of a checkpoint with other tensors: by the name of their file, several of an index."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    for file, tensors in files.items():
        save_file(tensors, target / file)
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (target / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return target


def save_fp8(source: Path, target: Path, kept: Iterable[str] = (), in_shards: bool = False) -> Path:
    """A checkpoint as Qwen publishes its FP8 ones: the layers' weights in blocks, but for routers.

    Args:
        kept: names of modules, or their ends, that are not quantised.
        in_shards: in two files, and the scales not in that of their weight.
    """
    tensors = tensors_of(source)
    files: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        file, other = number % 2 * in_shards, (number + 1) % 2 * in_shards
        module = name.removesuffix(".weight")
        is_layers = name.startswith("model.layers.") and tensor.dim() == 2
        if is_layers and not module.endswith((".mlp.gate", *kept)):
            tensor, files[other][f"{name}_scale_inv"] = quantize(tensor, name)
        files[file][name] = tensor.contiguous()
    names = [f"model-{number}-of-2.safetensors" for number in (1, 2)]
    save_tensors(
        source,
        target,
        dict(zip(names if in_shards else ["model.safetensors"], files, strict=False)),
    )
    kept = ["lm_head", *kept]
    edit_json(
        target / "config.json", quantization_config={**FP8_CONFIG, "modules_to_not_convert": kept}
    )
    return target


def save_dequantized(source: Path, target: Path) -> Path:
    """What an FP8 checkpoint stands for, as a plain one in float32."""
    tensors = tensors_of(source)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = tensors[name.removesuffix("_scale_inv")].float()
        blocks = tensors.pop(name).repeat_interleave(128, 0).repeat_interleave(128, 1)
        scales = blocks[: weight.size(0), : weight.size(1)]
        tensors[name.removesuffix("_scale_inv")] = weight * scales
    save_tensors(source, target, {"model.safetensors": tensors})
    edit_json(target / "config.json", quantization_config=...)
    return target


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """checkpoint(spec) -> its directory, made once a run: copy it before you change it."""
    made: dict[ModelSpec, Path] = {}

    def make(spec: ModelSpec) -> Path:
        if spec not in made:
            made[spec] = save_checkpoint(spec, tmp_path_factory.mktemp("checkpoint"))
        return made[spec]

    return make


@pytest.fixture(scope="session")
def tiny_model(checkpoint: CheckpointFactory) -> Path:
    """A checkpoint with no tokenizer."""
    return checkpoint(ModelSpec())


@pytest.fixture(scope="session")
def text_model(checkpoint: CheckpointFactory) -> Path:
    """A checkpoint with a tokenizer of one word an id."""
    return checkpoint(ModelSpec(tokenizer=True))


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; those set to ... (Ellipsis) are removed."""
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in raw.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


# --- the trained checkpoint, shared ----------------------------------------------------------


def is_idle(llm: LLM) -> bool:
    """No request is known, and every block is free."""
    scheduler = llm.scheduler
    is_empty = not scheduler.has_unfinished and scheduler.block_manager.num_used_blocks == 0
    return llm.is_finished() and is_empty


def ask(llm: LLM, question: str) -> list[int]:
    """The prompt that asks the trained checkpoint a question."""
    text: str = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    token_ids: list[int] = llm.tokenizer.encode(text)
    return token_ids


@pytest.fixture(scope="session")
def shared_trained_llm() -> Iterator[LLM]:
    with LLM(
        str(TINY),
        device="cpu",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=3,
        kvcache_block_size=16,
    ) as llm:
        yield llm


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def trained_llm(
    shared_trained_llm: LLM, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """An engine of the trained checkpoint; idle before and after, with no prefix known."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", request.param)
    shared_trained_llm.scheduler.start_over([])
    yield shared_trained_llm
    assert is_idle(shared_trained_llm)


@pytest.fixture
def clean_gpu() -> Iterator[None]:
    """Nothing of an earlier test on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


# --- the engine, watched ---------------------------------------------------------------------


class Spy:
    """Watches an engine at work.

    logits[seq_id][n]: the row [vocab_size], float32, from which completion token n was taken.
    seqs[seq_id]: every sequence that was scheduled. batches: every step, in order.
    """

    def __init__(self, llm: LLM) -> None:
        self.logits: dict[int, dict[int, Tensor]] = {}
        self.seqs: dict[int, Sequence] = {}
        self.batches: list[Batch] = []
        self._to_run: list[Batch] = []
        llm.observers.append(self._watch_step)
        assert llm.model_runner is not None
        llm.model_runner.model.lm_head.register_forward_hook(self._watch_logits)

    def _watch_step(self, event: str, batch: Batch | None) -> None:
        if event == "scheduled" and batch is not None:
            self.batches.append(batch)
            self._to_run.append(batch)
            self.seqs.update((item.seq.seq_id, item.seq) for item in batch.items)

    def _watch_logits(self, _module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        items = [item for item in self._to_run.pop(0).items if item.samples]
        for item, row in zip(items, logits, strict=True):
            index = item.end - item.seq.num_prompt_tokens
            self.logits.setdefault(item.seq.seq_id, {})[index] = row.float().cpu().clone()

    @property
    def num_prefill_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches if batch.is_prefill)


@contextmanager
def watched(model: Path, **options: Any) -> Iterator[tuple[LLM, Spy]]:
    """An engine on the CPU, and a spy on it."""
    options = {"device": "cpu", "max_model_len": 800, "max_num_seqs": 64} | options
    with LLM(str(model), **options) as llm:
        yield llm, Spy(llm)


def greedy(max_tokens: int | None = 64, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def completions(llm: LLM, prompts: list[list[int]], max_tokens: int = 64) -> list[list[int]]:
    """Greedy completions, stop ids ignored."""
    outputs = llm.generate(prompts, greedy(max_tokens), use_tqdm=False)
    return [output["token_ids"] for output in outputs]


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


# --- the reference ---------------------------------------------------------------------------


@dataclass
class Comparison:
    """How completions compare with the reference, over all their positions."""

    num_positions: int = 0
    num_near_ties: int = 0
    num_near_routes: int = 0  # positions not compared: an expert was chosen by rounding alone
    max_logits_error: float = 0.0  # of the logits' scale


class Reference:
    """The same checkpoint in transformers, fed whole sequences, without a KV cache.

    One forward pass over prompt and completion tells what it would have said at each position, so
    comparing with greedy decoding costs no decoding. Logits are kept, since the same completion
    comes back from every way of scheduling.
    """

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(model, **{"dtype" if IS_V5 else "torch_dtype": dtype}).eval()
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._route_gaps: list[Tensor] = []
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._watch_router)

    def _watch_router(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """By how much the last expert chosen is ahead of the next one, for each token."""
        logits = output[0] if isinstance(output, tuple) else output
        num_chosen = self.model.config.num_experts_per_tok
        if num_chosen < logits.size(-1):
            best = logits.flatten(0, -2).topk(num_chosen + 1).values
            self._route_gaps.append((best[:, -2] - best[:, -1]) / logits.abs().max())

    def logits(self, prompt: list[int], completion: list[int]) -> Tensor:
        """float32 [len(completion), vocab_size]: row n is what completion token n is taken from.

        NaN where the reference cannot tell: see Comparison.num_near_routes.
        """
        tokens = tuple(prompt + completion)[:-1]
        if tokens not in self._logits:
            self._route_gaps.clear()
            with torch.inference_mode():
                output = self.model(
                    torch.tensor([tokens]), logits_to_keep=len(completion), use_cache=False
                )
            logits = output.logits[0].float().clone()
            if self._route_gaps:
                # From there on rounding alone may have led to other experts, here or there.
                near = torch.stack(self._route_gaps).amin(0) < NEAR_ROUTE
                logits[near.cumsum(0)[-len(logits) :] > 0] = torch.nan
            self._logits[tokens] = logits
        return self._logits[tokens]

    def compare(self, prompt: list[int], completion: list[int]) -> Comparison:
        """Check by teacher forcing that each token of a completion is the reference's choice.

        A token may lose to the best one by less than NEAR_TIE of the logits' scale: the answer
        says how many positions were let pass so. The logits' error is left at 0.

        Raises:
            AssertionError: a token is not the reference's choice.
        """
        logits = self.logits(prompt, completion)
        num_near_routes = int(logits[:, 0].isnan().sum())
        logits = logits[: len(logits) - num_near_routes]
        completion = completion[: len(logits)]
        if not completion:
            return Comparison(num_near_routes=num_near_routes)
        scale = logits.abs().max()
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        gaps = (logits.max(dim=-1).values - chosen) / scale
        wrong = (gaps >= NEAR_TIE).nonzero().flatten().tolist()
        assert not wrong, (
            f"prompt of {len(prompt)} tokens: {len(wrong)} of {len(completion)} tokens are not the "
            f"reference's, first token {wrong[0]}: {completion[wrong[0]]} instead of "
            f"{int(logits[wrong[0]].argmax())}, gap {gaps[wrong[0]]:.1e} of the logits' scale"
        )
        return Comparison(len(completion), int((gaps > 0).sum()), num_near_routes)

    def logits_error(self, prompt: list[int], completion: list[int], rows: list[Tensor]) -> float:
        """Largest error of the engine's logits, as a share of the largest logit."""
        logits = self.logits(prompt, completion)
        assert len(rows) == len(completion)
        known = ~logits[:, 0].isnan()
        if not known.any():
            return 0.0
        errors = (torch.stack(rows)[known] - logits[known]).abs().max()
        return float(errors / logits[known].abs().max())


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    """reference(directory) -> the checkpoint in transformers, loaded once a run."""
    return cache(Reference)


def compare_run(
    reference: Reference, spy: Spy, prompts: list[list[int]], outputs: list[list[int]]
) -> Comparison:
    """Compare all sequences of one `generate` call: tokens, and each token's logits."""
    total = Comparison()
    seqs = sorted(spy.seqs.values(), key=lambda seq: seq.seq_id)[-len(prompts) :]
    for prompt, output, seq in zip(prompts, outputs, seqs, strict=True):
        assert seq.token_ids == prompt + output
        found = reference.compare(prompt, output)
        rows = [spy.logits[seq.seq_id][n] for n in range(len(output))]
        total.num_positions += found.num_positions
        total.num_near_ties += found.num_near_ties
        total.num_near_routes += found.num_near_routes
        error = reference.logits_error(prompt, output, rows)
        total.max_logits_error = max(total.max_logits_error, error)
    return total

"""What engine options cost: a checkpoint's answers and logits with them, beside those without.

    python docs/quality.py quantization=fp8

The checkpoint is the tiny one, the questions are its held-out tasks: see assets/tiny-qwen3. Both
engines answer greedily. Logits are compared at each token up to the first that differs, since until
there both have seen the same: by the Kullback-Leibler divergence from the plain engine's
probabilities to the other's, in nats.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-qwen3"
sys.path[:0] = [str(ROOT), str(TINY)]

import tasks  # noqa: E402

from nanovllm import LLM, SamplingParams  # noqa: E402
from nanovllm.engine.model_runner import ModelRunner  # noqa: E402
from nanovllm.engine.scheduler import Batch  # noqa: E402


class Answer(NamedTuple):
    """An engine's; logits: [len(token_ids), vocab_size], what each token was taken from."""

    text: str
    token_ids: list[int]
    logits: Tensor


@dataclass
class Row:
    """Of a family of tasks, or of all. kl_sum, kl_max: over the tokens that were compared."""

    num_tasks: int = 0
    num_right_plain: int = 0
    num_right: int = 0
    num_changed: int = 0
    num_tokens: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0

    def add(self, expected: str, plain: Answer, other: Answer) -> None:
        divergences = kl_divergences(plain, other)
        self.num_tasks += 1
        self.num_right_plain += plain.text == expected
        self.num_right += other.text == expected
        self.num_changed += plain.token_ids != other.token_ids
        self.num_tokens += len(divergences)
        self.kl_sum += float(divergences.sum())
        self.kl_max = max(self.kl_max, float(divergences.max()))

    @property
    def kl_mean(self) -> float:
        return self.kl_sum / max(1, self.num_tokens)


@dataclass
class Recorder:
    """Keeps the logits of every token that an eager engine samples, by sequence."""

    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)

    def watch(self, llm: LLM) -> None:
        assert isinstance(llm.model_runner, ModelRunner)
        llm.observers.append(self._see_step)
        llm.model_runner.model.lm_head.register_forward_hook(self._see_logits)

    def _see_step(self, event: str, batch: Batch | None) -> None:
        if event == "scheduled" and batch is not None:
            self.batches.append(batch)

    def _see_logits(self, _module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        sampling = [item.seq for item in self.batches.pop(0).items if item.samples]
        for seq, row in zip(sampling, logits.float().cpu(), strict=True):
            self.rows.setdefault(seq.seq_id, []).append(row.clone())


def answers(model: Path, questions: Iterable[str], **options: Any) -> list[Answer]:
    """What an engine with these options says, and from which logits."""
    with LLM(str(model), enforce_eager=True, **options) as llm:
        recorder = Recorder()
        recorder.watch(llm)
        chats = [[{"role": "user", "content": question}] for question in questions]
        prompts = [
            llm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        params = SamplingParams(temperature=0.0, max_tokens=400)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    rows = [torch.stack(rows) for _, rows in sorted(recorder.rows.items())]
    return [
        Answer(output["text"], output["token_ids"], logits)
        for output, logits in zip(outputs, rows, strict=True)
    ]


def kl_divergences(plain: Answer, other: Answer) -> Tensor:
    """float64 [num_tokens], up to the first token that differs."""
    pairs = enumerate(zip(plain.token_ids, other.token_ids, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), None)
    num_tokens = min(len(plain.token_ids), len(other.token_ids)) if same is None else same + 1
    p, q = (a.logits[:num_tokens].double().log_softmax(dim=-1) for a in (plain, other))
    return (p.exp() * (p - q)).sum(dim=-1)


def measure(
    num_tasks: int, options: dict[str, Any], common: dict[str, Any], model: Path = TINY
) -> dict[str, Row]:
    """A row a family, and one of all; common: options of both engines."""
    families = {"memorised": list(tasks.MEMORISED)[:num_tasks]}
    families |= {name: tasks.held_out(name, num_tasks) for name in tasks.FAMILIES}
    asked = [(name, sample) for name, samples in families.items() for sample in samples]
    questions = [sample.prompt for _, sample in asked]
    plain = answers(model, questions, **common)
    other = answers(model, questions, **common | options)
    rows = {name: Row() for name in [*families, "all"]}
    for (name, sample), *pair in zip(asked, plain, other, strict=True):
        for row in (rows[name], rows["all"]):
            row.add(sample.answer, *pair)
    return rows


def print_table(rows: dict[str, Row]) -> None:
    print("| tasks | number | right, plain | right | answers changed | tokens | KL, mean | most |")
    print("| --- " * 8 + "|")
    for name, row in rows.items():
        counts = f"{row.num_tasks} | {row.num_right_plain} | {row.num_right} | {row.num_changed}"
        print(f"| {name} | {counts} | {row.num_tokens} | {row.kl_mean:.1e} | {row.kl_max:.1e} |")


def parse_option(text: str) -> tuple[str, Any]:
    """name=value, the value as in JSON or else a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", nargs="+", type=parse_option, help="name=value of an engine")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of both engines")
    parser.add_argument("--count", type=int, default=100, help="tasks of each family")
    parser.add_argument("--model", type=Path, default=TINY, help="trained on the same tasks")
    args = parser.parse_args()
    common = {"device": args.device, "dtype": args.dtype, "max_model_len": 1024}
    print_table(measure(args.count, dict(args.options), common, args.model))


if __name__ == "__main__":
    main()

"""Completes the prompts or conversations of a file, with one or many engines, on Ray Data.

IN is a JSONL or Parquet file. A row has a "prompt" (text or token ids) or "messages" (a
conversation), and may have "sampling_params" that go before the command line's. OUT has the same
rows in the same order, with "text", "token_ids" and "finish_reason" besides, or with an "error"
in their place: line n of it is of line n of IN. OUT is a file of the same kind, or a directory,
which is what a name without a suffix means: then the results stay in parts.

Whatever ends a run, the same command goes on where it broke off: finished parts are kept. Each
row has a seed of its own, so that one that is computed again gives the same tokens.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_type_hints
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.exceptions import RayError
from tqdm import tqdm
from xxhash import xxh3_128

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config, Options
from nanovllm.engine.inputs import as_chat_prompts, as_prompt_ids, check_params
from nanovllm.sampling_params import require_int

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
Json = dict[str, Any]

# Parts that an engine has at a time: while the last rows of one end, those of the next fill the
# steps (2,000 prompts in parts of 50, two workers on two cores: 3,750 tok/s instead of 2,550).
PARTS_PER_ENGINE = 2
PARTS_PER_ROW_GROUP = 64  # of OUT: small ones make it slow to read
# Workers that a part may bring down, before it is believed to be the cause.
MAX_DEATHS = 3
# Ray holds nothing here but numbers of parts, and would take a third of the memory.
OBJECT_STORE_BYTES = 100 << 20
KEPT = "Finished parts are kept: the same command goes on where this one ended."

SAMPLING = {
    "temperature": float, "max_tokens": int, "top_k": int, "top_p": float, "min_p": float,
    "seed": int, "stop": str,
}  # fmt: skip
# Options of the engine that change results by more than rounding.
ENGINE_OPTIONS_OF_RESULTS = (
    "max_model_len", "eos", "dtype", "kv_cache_dtype", "load_format", "quantization",
)  # fmt: skip
RESULT = pa.schema(
    {
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "error": pa.string(),
    }
)


class Part(NamedTuple):
    """Rows that are computed together and written to a file of their own."""

    number: int
    first_row: int
    num_rows: int
    offset: int  # of its first byte, in JSONL


class Jsonl:
    """Lines of JSON. One that is none keeps its place, as {"line": ..., "error": ...}."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def parts(self, size: int) -> Iterator[Part]:
        with self.path.open("rb") as file:
            number = offset = 0
            while lines := [len(line) for line in islice(file, size)]:
                yield Part(number, number * size, len(lines), offset)
                number, offset = number + 1, offset + sum(lines)

    def rows(self, part: Part) -> list[Json]:
        with self.path.open("rb") as file:
            file.seek(part.offset)
            return [self.row(line) for line in islice(file, part.num_rows)]

    @staticmethod
    def row(line: bytes) -> Json:
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError(f"a row must be an object, got {found!r:.80}")
            if taken := found.keys() & set(RESULT.names):
                raise ValueError(f"a row must not have {sorted(taken)}, which results are called")
        except (ValueError, RecursionError) as error:
            return {"line": line.decode(errors="replace").rstrip("\r\n"), "error": str(error)}
        return found

    def write(self, file: BinaryIO, part: Part, results: list[Json]) -> None:
        for row, result in zip(self.rows(part), results, strict=True):
            file.write(json.dumps(row | result).encode() + b"\n")

    def join(self, paths: list[Path], file: BinaryIO) -> None:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)


class Parquet:
    """A Parquet file. All of its columns are kept; those of results that a row lacks are null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self.schema = file.schema_arrow
        self.group_starts = list(accumulate(sizes, initial=0))
        self.last_read: tuple[int, pa.Table] | None = None
        names = self.schema.names
        if taken := set(names) & set(RESULT.names):
            raise ValueError(f"{path} has columns {sorted(taken)}, which results are called")
        if not {"prompt", "messages"} & set(names):
            raise ValueError(f"{path} must have a column prompt or messages, it has {names}")

    def parts(self, size: int) -> Iterator[Part]:
        num_rows = self.group_starts[-1]
        for number, first in enumerate(range(0, num_rows, size)):
            yield Part(number, first, min(size, num_rows - first), 0)

    def table(self, part: Part) -> pa.Table:
        end, pieces = part.first_row + part.num_rows, []
        for group, (start, stop) in enumerate(pairwise(self.group_starts)):
            first, last = max(part.first_row, start), min(end, stop)
            if first < last:
                pieces.append(self.row_group(group).slice(first - start, last - first))
        return pa.concat_tables(pieces)

    def row_group(self, group: int) -> pa.Table:
        """A row group, kept for the next part: it may hold many."""
        last_read = self.last_read  # another thread may set it meanwhile
        if last_read is None or last_read[0] != group:
            with pq.ParquetFile(self.path) as file:
                last_read = self.last_read = group, file.read_row_group(group)
        return last_read[1]

    def rows(self, part: Part) -> list[Json]:
        table = self.table(part)
        return [self.row(table.slice(i, 1)) for i in range(part.num_rows)]

    @staticmethod
    def row(table: pa.Table) -> Json:
        try:
            [found] = table.to_pylist()
        except ValueError as error:  # a text that is no UTF-8
            return {"error": str(error)}
        return found

    def write(self, file: BinaryIO, part: Part, results: list[Json]) -> None:
        table, columns = self.table(part), pa.Table.from_pylist(results, RESULT).columns
        for field, column in zip(RESULT, columns, strict=True):
            table = table.append_column(field, column)
        pq.write_table(table, file)

    def join(self, paths: list[Path], file: BinaryIO) -> None:
        schema = pa.schema([*self.schema, *RESULT], self.schema.metadata)
        with pq.ParquetWriter(file, schema) as writer:
            for i in range(0, len(paths), PARTS_PER_ROW_GROUP):
                group = paths[i : i + PARTS_PER_ROW_GROUP]
                tables = [pq.read_table(path, partitioning=None) for path in group]
                writer.write_table(pa.concat_tables(tables))


FORMATS: dict[str, type[Jsonl] | type[Parquet]] = {".jsonl": Jsonl, ".parquet": Parquet}


@dataclass(frozen=True)
class Job:
    """What is to be done, as every worker is told it."""

    source: Path
    directory: Path  # of the parts
    model: str
    engine: Json
    sampling: Json

    def data(self) -> Jsonl | Parquet:
        return FORMATS[self.source.suffix](self.source)

    def path(self, part: Part) -> Path:
        return self.directory / f"part-{part.number:06}{self.source.suffix}"

    @property
    def unfinished(self) -> Path:
        """The directory of files that are being written."""
        return self.directory / "_unfinished"

    @contextmanager
    def whole_file(self, path: Path) -> Iterator[BinaryIO]:
        """A file that has its name only once it is whole and on the disk."""
        unfinished = self.unfinished / f"{path.name}.{uuid4().hex}"
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def params(self, row: Json, number: int) -> SamplingParams:
        """The parameters of a row: its own, then the command line's; its seed by its number."""
        own = row.get("sampling_params") or {}
        known = {field.name for field in fields(SamplingParams)} - {"logprobs"}
        if not isinstance(own, dict) or own.keys() - known:
            allowed = ", ".join(sorted(known))
            raise ValueError(f"sampling_params must be an object of {allowed}, got {own!r:.80}")
        seed = (self.sampling["seed"] + number) % 2**63
        own = {name: value for name, value in own.items() if value is not None}
        return SamplingParams(**(self.sampling | {"seed": seed} | own))


class Worker:
    """An engine in an actor of Ray's, which completes parts; it may be called from two threads."""

    def __init__(self, job: Job) -> None:
        self.job, self.data, self.failure = job, job.data(), ""
        try:
            self.llm = LLM(job.model, **job.engine)
        except Exception as error:
            self.failure = repr(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Complete the part that is the batch's one row, and count what it took."""
        part = Part(**{name: int(column[0]) for name, column in batch.items()})
        # Only a worker that was killed leaves its unfinished file.
        num_deaths = len(list(self.job.unfinished.glob(f"{self.job.path(part).name}.*")))
        results: list[Json] = []
        # What is raised here, Ray would show in pages, and what is raised above in a loop.
        try:
            if not self.failure:
                results = self.complete_part(part, num_deaths)
        except Exception as error:
            self.failure = repr(error)
        return {
            "failure": [self.failure],
            "num_deaths": [num_deaths],
            "num_rows": [len(results)],
            "num_tokens": [sum(len(result.get("token_ids", ())) for result in results)],
            "num_errors": [sum("error" in result for result in results)],
        }

    def complete_part(self, part: Part, num_deaths: int) -> list[Json]:
        if num_deaths >= MAX_DEATHS:
            last_row = part.first_row + part.num_rows - 1
            raise RuntimeError(
                f"{num_deaths} workers died over the rows {part.first_row} to {last_row}, most "
                "likely for want of memory: fewer workers, or a smaller --max-num-seqs or "
                "--max-model-len, take less"
            )
        with self.job.whole_file(self.job.path(part)) as file:
            results = self.complete(self.data.rows(part), part.first_row)
            self.data.write(file, part, results)
        return results

    def complete(self, rows: list[Json], first_row: int) -> list[Json]:
        """The results of rows, of bad ones their error."""
        results: dict[int, Json] = {}
        requests: dict[int, tuple[list[int], SamplingParams]] = {}
        for index, row in enumerate(rows):
            try:
                requests[index] = self.request(row, first_row + index)
            except (TypeError, ValueError) as error:
                results[index] = {"error": str(error)}
        prompts, params = [ids for ids, _ in requests.values()], [p for _, p in requests.values()]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for index, output in zip(requests, outputs, strict=True):
            results[index] = {name: output[name] for name in RESULT.names if name in output}
        return [results[index] for index in range(len(rows))]

    def request(self, row: Json, number: int) -> tuple[list[int], SamplingParams]:
        """A row's prompt and parameters, checked.

        Raises:
            TypeError, ValueError: what the engine would refuse, and with it all the other rows.
        """
        if "error" in row:
            raise ValueError(row["error"])
        config, tokenizer = self.llm.config, self.llm.tokenizer
        params = self.job.params(row, number)
        check_params(params, config, tokenizer)
        prompt, messages = row.get("prompt"), row.get("messages")
        if (prompt is None) == (messages is None):
            raise ValueError("a row must have either a prompt or messages")
        if messages is not None:
            if not isinstance(messages, list):
                raise TypeError(f"messages must be a list, got {messages!r:.80}")
            [prompt] = as_chat_prompts([messages], config, tokenizer, tokenizer, {})
        return as_prompt_ids(prompt, config, tokenizer), params


def begin(job: Job, part_size: int) -> None:
    """Make the directory of parts, or see that it is of the same job.

    Raises:
        ValueError: it was begun with another input or other options.
    """
    with job.source.open("rb") as file:
        digest = hashlib.file_digest(file, xxh3_128).hexdigest()
    asked = {
        "input": digest,
        "part_size": part_size,
        "model": job.model,
        **{name: job.engine.get(name) for name in ENGINE_OPTIONS_OF_RESULTS},
        **job.sampling,
    }
    manifest = job.directory / "_manifest"
    if manifest.exists():
        before = json.loads(manifest.read_text(encoding="utf-8"))
        for name, value in asked.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{job.directory} was begun with {name} {before.get(name)!r}, and this is "
                    f"{value!r}: its parts cannot be used; remove it, or name another OUT"
                )
    elif any(job.directory.glob("[!_]*")):
        raise ValueError(f"{job.directory} holds something else: name another OUT")
    shutil.rmtree(job.unfinished, ignore_errors=True)
    job.unfinished.mkdir(parents=True, exist_ok=True)
    with job.whole_file(manifest) as file:
        file.write(json.dumps(asked, indent=1).encode())


@contextmanager
def silence() -> Iterator[None]:
    """Throw away what is written to stderr, also by libraries."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def running_ray(address: str | None) -> Iterator[None]:
    """Join a cluster, or start a Ray for this process alone, which ends with it.

    Ray's messages stay in its log files: what goes wrong is raised besides.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: Json = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if not address:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        with silence():  # here it says that it will say nothing
            ray.init(address or "local", **options)
        try:
            yield
        finally:
            ray.shutdown()


def worker_options(num_workers: int | None, engine: Json) -> Json:
    """How map_batches is to start the workers: how many, and what each reserves.

    A worker reserves its GPUs if Ray knows of any and the engine is not told to use the CPU.

    Raises:
        ValueError: there are too few GPUs, on which Ray would wait for more.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_cpus = sum(node.get("CPU", 0) for node in nodes)
    has_gpus = engine.get("device") != "cpu" and any(node.get("GPU") for node in nodes)
    gpus_each = engine.get("tensor_parallel_size", 1) if has_gpus else 0
    # The GPUs of a worker are on one node.
    room = sum(int(node.get("GPU", 0)) // gpus_each for node in nodes) if has_gpus else 0
    num_workers = num_workers or max(1, room)
    if has_gpus and num_workers > room:
        raise ValueError(
            f"workers of {gpus_each} GPUs: Ray has room for {room}, {num_workers} are asked for"
        )
    # Where all CPUs are reserved nothing else of Ray's would ever run.
    cpus_each = min(0.5, num_cpus / 2 / num_workers)
    num_threads = os.environ.get("OMP_NUM_THREADS", max(1, int(num_cpus // num_workers)))
    return {
        "compute": ray.data.ActorPoolStrategy(
            size=num_workers,
            max_tasks_in_flight_per_actor=PARTS_PER_ENGINE,
            max_concurrent_calls_per_actor=PARTS_PER_ENGINE,
            enable_true_multi_threading=True,
        ),
        "num_cpus": cpus_each,
        "num_gpus": gpus_each or None,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(num_threads)}},
    }


def compute(job: Job, parts: list[Part], is_done: list[bool], options: Json) -> None:
    """Have the workers compute the parts that are missing, and show how far they are."""
    todo = [part for part, done in zip(parts, is_done, strict=True) if not done]
    dataset = ray.data.from_items([part._asdict() for part in todo], override_num_blocks=len(todo))
    results = dataset.map_batches(Worker, fn_constructor_args=[job], batch_size=1, **options)
    num_rows = sum(part.num_rows for part in parts)
    num_todo = sum(part.num_rows for part in todo)
    num_tokens = num_errors = num_deaths = 0
    started = time.monotonic()
    with tqdm(total=num_rows, initial=num_rows - num_todo, unit=" rows") as bar:
        for result in results.iter_rows():
            if result["failure"]:
                raise RuntimeError(f"a worker failed: {result['failure']}")
            num_tokens += result["num_tokens"]
            num_errors += result["num_errors"]
            num_deaths += result["num_deaths"]
            speed = num_tokens / (time.monotonic() - started)
            deaths = f", {num_deaths} parts begun again: a worker died" if num_deaths else ""
            bar.set_postfix_str(f"{speed:.0f} tok/s, {num_errors} errors{deaths}")
            bar.update(result["num_rows"])


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path)
    parser.add_argument("--model", default=str(TINY_CHECKPOINT), help="directory or Hub repo id")
    parser.add_argument("--workers", type=int, help="engines (as many as GPUs allow, or 1)")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="of a Ray cluster, or auto: the one on this machine",
    )
    parser.add_argument(
        "--part-size", type=int, default=128, help="rows that are computed and kept together (128)"
    )
    group = parser.add_argument_group("sampling (see SamplingParams)")
    defaults = {field.name: field.default for field in fields(SamplingParams)} | {"seed": 0}
    for name, kind in SAMPLING.items():
        how: Json = {"type": kind, "default": defaults[name]}
        group.add_argument(f"--{name.replace('_', '-')}", **how)
    group = parser.add_argument_group("engine options (see nanovllm.config.Config)")
    for name, kind in get_type_hints(Options).items():
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    return parser.parse_args(arguments)


def make_job(args: argparse.Namespace) -> Job:
    """The job that the command line asks for; paths are made absolute for workers elsewhere.

    Raises:
        OSError, TypeError, ValueError: it cannot be done.
    """
    source, output = args.input.resolve(), args.output.resolve()
    if source.suffix not in FORMATS or output.suffix not in ("", source.suffix):
        raise ValueError(
            "IN must be .jsonl or .parquet, and OUT the same or a directory (a name without a "
            f"suffix), got {args.input} and {args.output}"
        )
    if output.suffix and output.exists():
        raise ValueError(f"{args.output} exists: remove it to have it computed anew")
    require_int("part-size", args.part_size, low=1)
    if args.workers is not None:
        require_int("workers", args.workers, low=1)
    options = {name: value for name, value in vars(args).items() if name in get_type_hints(Options)}
    is_directory = Path(args.model).is_dir()
    model = str(Path(args.model).resolve()) if is_directory else args.model
    Config.from_options(model, options)  # refuses here what every worker would
    directory = output.with_name(f"{output.name}.parts") if output.suffix else output
    job = Job(source, directory, model, options, {name: getattr(args, name) for name in SAMPLING})
    job.params({}, 0)
    return job


def main() -> None:
    args = parse_args()
    try:
        job = make_job(args)
        data = job.data()
        begin(job, args.part_size)
        parts = list(data.parts(args.part_size))
        is_done = [job.path(part).exists() for part in parts]
        if not all(is_done):
            with running_ray(args.address):
                compute(job, parts, is_done, worker_options(args.workers, job.engine))
        paths = [job.path(part) for part in parts]
        if args.output.suffix:
            with job.whole_file(args.output.resolve()) as file:
                data.join(paths, file)
        shutil.rmtree(job.directory if args.output.suffix else job.unfinished, ignore_errors=True)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"batch.py: {error}")
    except (RuntimeError, RayError) as error:
        sys.exit(f"batch.py: {error}\n{KEPT}")
    except KeyboardInterrupt:
        print(f"batch.py: interrupted\n{KEPT}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()

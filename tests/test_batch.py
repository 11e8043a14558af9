"""examples/batch.py: a file of prompts on Ray Data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
import torch
from conftest import ROOT, TINY, load_example

from nanovllm import LLM, SamplingParams

if torch.cuda.is_available():  # machines to test GPUs on may lack it; the others may not
    pytest.importorskip("ray")
import pyarrow as pa
import pyarrow.parquet as pq

Json = dict[str, Any]
ENGINE: Json = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
RESULTS = ("text", "token_ids", "finish_reason")
BAD_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "a " * 400}, "1 to 255 tokens"),
    ({"prompt": ""}, "1 to 255 tokens"),
    ({"prompt": []}, "1 to 255 tokens"),
    ({"prompt": 5}, "must be a str or a list of token ids"),
    ({"prompt": [1, "two"]}, "token ids must be ints"),
    ({"prompt": [512]}, "outside the vocabulary"),
    ({"prompt": "\ud83d"}, "valid Unicode"),
    ({}, "either a prompt or messages"),
    ({"prompt": None}, "either a prompt or messages"),
    ({"prompt": "one", "messages": []}, "either a prompt or messages"),
    ({"messages": []}, "at least one message"),
    ({"messages": {"role": "user", "content": "one"}}, "must be a list"),
    ({"messages": [{"content": "one"}]}, "'role'"),
    ({"prompt": "one", "sampling_params": {"temperature": -1}}, "temperature"),
    ({"prompt": "one", "sampling_params": {"temprature": 1}}, "temprature"),
    ({"prompt": "one", "sampling_params": {"logprobs": 1}}, "logprobs"),
    ({"prompt": "one", "sampling_params": "hot"}, "must be an object"),
    ({"prompt": "one", "sampling_params": {"stop_token_ids": [512]}}, "outside the vocabulary"),
    ({"prompt": "one", "text": "two"}, "must not have ['text']"),
    (b"", "Expecting value"),
    (b'{"prompt": "one"', "Expecting ',' delimiter"),
    (b'"one"', "must be an object"),
    (b'{"prompt": "\xff"}', "invalid start byte"),
    (b"[" * 100_000, "recursion"),
]


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    return load_example("batch")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(TINY), **ENGINE) as llm:
        yield llm


def some_rows(count: int) -> list[Json]:
    """Prompts and conversations, with columns of their own."""
    rows: list[Json] = []
    for number in range(count):
        if number % 3:
            text = f"list all prime numbers within {20 + number}"
            rows.append({"id": f"é{number}", "messages": [{"role": "user", "content": text}]})
        else:
            rows.append({"prompt": f"count from {number} to", "id": f"é{number}"})
    return rows


def expected(llm: LLM, rows: list[Json], **params: Any) -> list[Json]:
    """The rows with the engine's results, each with the seed of its number."""
    own = [SamplingParams(**{"seed": number} | params) for number in range(len(rows))]
    prompts = [
        llm.tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, tokenize=False
        )
        if "messages" in row
        else row["prompt"]
        for row in rows
    ]
    results = llm.generate(prompts, own, use_tqdm=False)
    return [
        row | {name: result[name] for name in RESULTS}
        for row, result in zip(rows, results, strict=True)
    ]


def write_lines(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_lines(*paths: Path) -> list[Json]:
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def finished_parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*"))


def make_job(batch: ModuleType, source: Path, directory: Path, **options: Any) -> Any:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments += [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    return batch.make_job(batch.parse_args([str(source), str(directory), *arguments]))


def complete_here(batch: ModuleType, job: Any, part_size: int = 4) -> list[Json]:
    """Have one worker, in this process, complete all parts: what it says of them."""
    batch.begin(job, part_size)
    worker = batch.Worker(job)
    parts = job.data().parts(part_size)
    said = [worker({name: [value] for name, value in part._asdict().items()}) for part in parts]
    worker.llm.exit()
    return said


# --- without Ray -------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [b"\n", b""], ids=["line", "no-line"])
def test_parts_of_lines_hold_each_once(last: bytes, batch: ModuleType, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "é" * n} for n in range(10)])
    source.write_bytes(source.read_bytes().removesuffix(b"\n") + last)
    data = batch.Jsonl(source)
    parts = list(data.parts(4))
    assert [(part.number, part.first_row, part.num_rows) for part in parts] == [
        (0, 0, 4), (1, 4, 4), (2, 8, 2),
    ]  # fmt: skip
    assert [len(row["prompt"]) for part in reversed(parts) for row in data.rows(part)] == [
        8, 9, 4, 5, 6, 7, 0, 1, 2, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("group", [1, 3, 4, 100])
def test_parts_of_a_table_hold_each_row_once(group: int, batch: ModuleType, tmp_path: Path) -> None:
    table = pa.table({"prompt": [str(number) for number in range(10)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=group)
    data = batch.Parquet(tmp_path / "in.parquet")
    parts = list(data.parts(4))
    assert [part.num_rows for part in parts] == [4, 4, 2]
    found = [int(row["prompt"]) for part in reversed(parts) for row in data.rows(part)]
    assert found == [8, 9, 4, 5, 6, 7, 0, 1, 2, 3]


def test_a_bad_row_gets_an_error_in_its_place_and_spoils_no_other(
    batch: ModuleType, llm: LLM, tmp_path: Path
) -> None:
    bad = [row for row, _ in BAD_ROWS]
    good = some_rows(len(bad))
    mixed = [row for pair in zip(bad, good, strict=True) for row in pair]
    source = write_lines(tmp_path / "in.jsonl", mixed)
    job = make_job(batch, source, tmp_path / "out", max_tokens=5)
    said = complete_here(batch, job, part_size=50)
    assert sum(entry["num_errors"][0] for entry in said) == len(bad)
    found = read_lines(*finished_parts(job.directory))
    assert len(found) == 2 * len(bad)
    for (row, message), result in zip(BAD_ROWS, found[::2], strict=True):
        assert message in result["error"]
        assert not result.keys() & set(RESULTS)
        if isinstance(row, dict) and "text" not in row:
            assert row.items() <= result.items()
        else:
            assert "line" in result
    rows = [row for row in good for _ in range(2)]  # the bad ones' places count for the seeds
    assert found[1::2] == expected(llm, rows, max_tokens=5)[1::2]


def test_a_rows_own_parameters_go_before_the_command_lines(
    batch: ModuleType, llm: LLM, tmp_path: Path
) -> None:
    own: list[Json] = [{}, {"max_tokens": 3}, {"seed": 7, "temperature": None}, {"stop": ["4"]}]
    rows = [{"prompt": "count from 1 to 9: 1, 2", "sampling_params": params} for params in own]
    source = write_lines(tmp_path / "in.jsonl", rows)
    job = make_job(batch, source, tmp_path / "out", temperature=2.5, max_tokens=9, seed=100)
    complete_here(batch, job)
    for number, result in enumerate(read_lines(*finished_parts(job.directory))):
        given = {name: value for name, value in own[number].items() if value is not None}
        params = {"temperature": 2.5, "max_tokens": 9, "seed": 100 + number} | given
        [output] = llm.generate([rows[number]["prompt"]], SamplingParams(**params), use_tqdm=False)
        assert result["token_ids"] == output["token_ids"]


def test_columns_of_a_table_are_kept_and_results_have_types(
    batch: ModuleType, llm: LLM, tmp_path: Path
) -> None:
    texts = ["count from 1 to", None, "a " * 400, "spell tomato", b"\xff"]
    table = pa.table(
        {
            "id": pa.array([1, 2, 3, 4, 5], pa.uint8()),
            "prompt": pa.array(texts, pa.binary()).view(pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    job = make_job(batch, tmp_path / "in.parquet", tmp_path / "out.parquet", max_tokens=5)
    complete_here(batch, job, part_size=3)
    with job.whole_file(tmp_path / "out.parquet") as file:
        job.data().join(finished_parts(job.directory), file)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema == pa.schema([*table.schema, *batch.RESULT])
    assert found.select(table.schema.names).equals(table)
    rows = found.drop_columns("prompt").to_pylist()
    for number in (0, 3):
        params = SamplingParams(max_tokens=5, seed=number)
        [output] = llm.generate([texts[number]], params, use_tqdm=False)
        result = {name: output[name] for name in RESULTS}
        assert rows[number] == {"id": number + 1, "error": None} | result
    for number, message in ((1, "either"), (2, "1 to 255 tokens"), (4, "utf-8")):
        assert message in rows[number]["error"]
        assert [rows[number][name] for name in RESULTS] == [None, None, None]


def test_a_table_that_cannot_be_answered_is_refused(batch: ModuleType, tmp_path: Path) -> None:
    for name in ("text", "question"):
        pq.write_table(pa.table({name: ["one"], "id": [1]}), tmp_path / "in.parquet")
        with pytest.raises(ValueError, match=name):
            batch.Parquet(tmp_path / "in.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_rows_give_an_empty_file(
    kind: str, batch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    if kind == "jsonl":
        source.touch()
    else:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), source)
    monkeypatch.setattr(sys, "argv", ["batch.py", str(source), str(output), "--device=cpu"])
    batch.main()
    assert output.exists()
    assert sorted(tmp_path.iterdir()) == sorted([source, output])
    if kind == "parquet":
        assert pq.read_table(output).num_rows == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"stop": "x"}, "stop"),
        ({"max_tokens": 7}, "max_tokens"),
        ({"load_format": "dummy"}, "load_format"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    ],
    ids=str,
)
def test_parts_that_were_begun_otherwise_are_refused(
    changes: Json, name: str, batch: ModuleType, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    for _ in range(2):
        batch.begin(make_job(batch, source, tmp_path / "out"), 4)
    (tmp_path / "out" / "part-000000.jsonl").touch()
    with pytest.raises(ValueError, match=f"was begun with {name} "):
        batch.begin(make_job(batch, source, tmp_path / "out", **changes), 4)
    with pytest.raises(ValueError, match="was begun with part_size 4, and this is 5"):
        batch.begin(make_job(batch, source, tmp_path / "out"), 5)
    write_lines(source, some_rows(4))
    with pytest.raises(ValueError, match="was begun with input "):
        batch.begin(make_job(batch, source, tmp_path / "out"), 4)
    assert len(finished_parts(tmp_path / "out")) == 1


def test_what_is_in_the_way_is_left_alone(batch: ModuleType, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    other = write_lines(tmp_path / "other.jsonl", [])
    with pytest.raises(ValueError, match=r"other\.jsonl exists"):
        make_job(batch, source, other)
    with pytest.raises(ValueError, match="something else"):
        batch.begin(make_job(batch, source, tmp_path), 4)
    with pytest.raises(ValueError, match="OUT the same"):
        make_job(batch, source, tmp_path / "out.parquet")


def test_a_file_has_its_name_only_once_it_is_whole(batch: ModuleType, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    job = make_job(batch, source, tmp_path / "out")
    batch.begin(job, 4)
    path = job.directory / "part-000000.jsonl"

    def break_off() -> None:
        with job.whole_file(path) as file:
            file.write(b"half")
            file.flush()
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert not finished_parts(job.directory)
    assert not list(job.unfinished.iterdir())


def test_rows_that_bring_down_worker_after_worker_end_the_run(
    batch: ModuleType, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    job = make_job(batch, source, tmp_path / "out")
    batch.begin(job, 2)
    worker = batch.Worker(job)
    _, part = job.data().parts(2)
    for death in range(3):
        (job.unfinished / f"{job.path(part).name}.{death}").touch()
    said = worker({name: [value] for name, value in part._asdict().items()})
    worker.llm.exit()
    assert "3 workers died over the rows 2 to 2" in said["failure"][0]
    assert said["num_deaths"] == [3]


def test_a_worker_that_fails_says_why(batch: ModuleType, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
    job = make_job(batch, source, tmp_path / "out", model=model)
    batch.begin(job, 4)
    [part] = job.data().parts(4)
    said = batch.Worker(job)({name: [value] for name, value in part._asdict().items()})
    assert "model.safetensors" in said["failure"][0]
    assert not finished_parts(job.directory)


@pytest.mark.parametrize("raised", [RuntimeError("a worker failed"), KeyboardInterrupt()], ids=repr)
def test_whatever_ends_a_run_it_says_how_to_go_on(
    raised: BaseException,
    batch: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*_: object) -> None:
        raise raised

    source = write_lines(tmp_path / "in.jsonl", some_rows(3))
    monkeypatch.setattr(batch, "running_ray", nullcontext)
    monkeypatch.setattr(batch, "worker_options", lambda *_: {})
    monkeypatch.setattr(batch, "compute", end)
    monkeypatch.setattr(sys, "argv", ["batch.py", str(source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        batch.main()
    said = f"{caught.value.code}{capsys.readouterr().err}"
    assert "batch.py: a worker failed\n" in said or "130batch.py: interrupted\n" in said
    assert "the same command goes on" in said


@pytest.mark.parametrize(
    ("nodes", "workers", "engine", "expected"),
    [
        ([{"CPU": 2}], None, {}, (1, 0.5, None, "2")),
        ([{"CPU": 2}], 2, {}, (2, 0.5, None, "1")),
        ([{"CPU": 1}], 4, {}, (4, 0.125, None, "1")),
        ([{"CPU": 4}, {"CPU": 30, "GPU": 3}] * 2, None, {}, (6, 0.5, 1, "11")),
        ([{"CPU": 34, "GPU": 3}] * 2, None, {"tensor_parallel_size": 2}, (2, 0.5, 2, "34")),
        ([{"CPU": 64, "GPU": 8}], 3, {}, (3, 0.5, 1, "21")),
        ([{"CPU": 64, "GPU": 8}], None, {"device": "cpu"}, (1, 0.5, None, "64")),
    ],
)
def test_workers_reserve_gpus_where_there_are_any_and_leave_cpus_free(
    nodes: list[dict[str, float]],
    workers: int | None,
    engine: Json,
    expected: tuple[int, float, int | None, str],
    batch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    has = [{"Alive": True, "Resources": node} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 100, "GPU": 100}}
    monkeypatch.setattr(batch.ray, "nodes", lambda: [*has, gone])
    found = batch.worker_options(workers, engine)
    num_threads = found["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]
    num_workers = found["compute"].min_size
    assert (num_workers, found["num_cpus"], found["num_gpus"], num_threads) == expected


def test_more_gpus_than_there_are_are_refused(
    batch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8, "GPU": 2}}] * 2
    monkeypatch.setattr(batch.ray, "nodes", lambda: nodes)
    for workers, size, room in ((5, 1, 4), (3, 2, 2), (None, 4, 0)):
        with pytest.raises(ValueError, match=f"has room for {room}"):
            batch.worker_options(workers, {"tensor_parallel_size": size})


# --- with Ray ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """For processes with Ray, whose files go with the tests. Its sockets need a short path."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex * 2}
    yield os.environ | token | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": directory}
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A Ray of two CPUs that a run can join, started beside what does not need it yet."""
    program = """if True:
        import os, ray
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
        print("address", ray.get_runtime_context().gcs_address, flush=True)
        input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    lines = (line for line in process.stdout if line.startswith("address "))
    yield next(lines).split()[1]
    process.communicate("\n", timeout=120)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """start(IN, OUT, *options) -> batch.py with two workers, from another directory."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
        command = [sys.executable, str(ROOT / "examples" / "batch.py"), "--workers=2", *options]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=tmp_path, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # also what Ray leaves where its driver is killed
        process.communicate()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_ended(start: Start, request: Any, tmp_path: Path) -> None:
    """By itself until it is killed; then on a Ray that it joins."""
    rows = some_rows(48)
    write_lines(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out"
    options = ("in.jsonl", "out", "--part-size=3", "--max-tokens=40", "--temperature=1.5")
    first = start(*options)
    address = request.getfixturevalue("address")
    deadline = time.monotonic() + 60
    while len(finished_parts(output)) < 4:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    kept = {path.name: path.stat().st_ino for path in finished_parts(output)}
    assert len(kept) < 16, "it was not half done"
    resumed = start(*options, "--address", address)
    out, err = resumed.communicate(timeout=240)
    assert (resumed.returncode, out) == (0, ""), err
    parts = finished_parts(output)
    assert kept.items() <= {path.name: path.stat().st_ino for path in parts}.items()
    assert sorted(path.name for path in output.iterdir()) == [
        "_manifest", *(f"part-{number:06}.jsonl" for number in range(16)),
    ]  # fmt: skip
    with LLM(str(TINY), **ENGINE) as llm:
        assert read_lines(*parts) == expected(llm, rows, max_tokens=40, temperature=1.5)


@pytest.mark.slow
def test_a_table_goes_in_and_a_table_comes_out(
    start: Start, address: str, llm: LLM, tmp_path: Path
) -> None:
    """Token ids and conversations, in one file, in order, with nothing left beside it."""
    chat = [{"role": "user", "content": "introduce yourself"}]
    prompts = [[number + 5, 9, 14] for number in range(20)]
    table = pa.table(
        {"prompt": [*prompts, None], "messages": [*[None] * 20, chat], "id": list(range(21))}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    process = start("in.parquet", "out.parquet", "--address", address, "--part-size=4")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, ""), err
    assert "21/21" in err
    assert {path.name for path in tmp_path.iterdir()} == {"in.parquet", "out.parquet"}
    rows: list[Json] = [*({"prompt": ids} for ids in prompts), {"messages": chat}]
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in found] == list(range(21))
    wanted = expected(llm, rows)
    assert [[row[name] for name in RESULTS] for row in found] == [
        [row[name] for name in RESULTS] for row in wanted
    ]

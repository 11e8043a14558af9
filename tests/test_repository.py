"""What the repository promises: commands that work, one version, lint and types."""

import ast
import inspect
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tokenize
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import Command

import nanovllm

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_ci_runs_the_readmes_test_command() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith("-m pytest -n 2 --dist worksteal")
    assert f"```bash\n{command}\n```" in (ROOT / "README.md").read_text()


def test_readme_names_every_option_and_default() -> None:
    from dataclasses import fields

    from nanovllm import SamplingParams
    from nanovllm.config import Config

    readme = (ROOT / "README.md").read_text().replace('"', "")
    for field in [*fields(SamplingParams), *fields(Config)]:
        if field.init and field.name != "model":
            default = field.default if isinstance(field.default, str) else f"{field.default}"
            row = rf"\| `{field.name}` \| `?{re.escape(default)}`? \|"
            assert re.search(row, readme), f"{field.name} = {default}"


def test_readme_names_every_method_with_its_arguments() -> None:
    from nanovllm import LLM

    readme = (ROOT / "README.md").read_text()
    for name, method in inspect.getmembers(LLM, inspect.isfunction):
        if not name.startswith("_"):
            _, *parameters = inspect.signature(method).parameters.values()
            arguments = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
            assert f"| `{name}({arguments})` |" in readme, f"{name}({arguments})"


def test_readme_names_every_field_of_results_and_statistics(tiny_model: Path) -> None:
    from nanovllm import LLM, SamplingParams

    readme = (ROOT / "README.md").read_text()
    params = SamplingParams(max_tokens=1, logprobs=0)
    with LLM(str(tiny_model), device="cpu", max_model_len=32) as llm:
        [result] = llm.generate([5], params, use_tqdm=False)
        [piece] = llm.stream([5], params)
        for name in [*result, *piece, *llm.stats()]:
            assert f"`{name}`" in readme, name


def headings(page: Path) -> set[str]:
    """A page's headings as links name them."""
    names = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in names}


def test_readme_counts_the_lines_of_code() -> None:
    """To a twentieth, in the table of what to read; and says their sum."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \d+ \| (`.*`) \| (\d+) \|", text, re.M)
    assert len(rows) == 10
    for names, stated in rows:
        folder, *files = re.findall(r"`([^`]+)`", names)
        if not folder.endswith("/"):
            folder, files = "", [folder, *files]
        paths = [ROOT / "nanovllm" / folder / f"{name.removesuffix('.py')}.py" for name in files]
        assert sum(map(lines_of_code, paths)) == pytest.approx(int(stated), rel=0.05), names
    assert f"request, {sum(int(stated) for _, stated in rows):,} lines:" in text


def lines_of_code(path: Path) -> int:
    """Without comments, empty lines and docstrings."""
    source = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {n for t in tokens if t.type not in blank for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_links_lead_to_files_and_headings() -> None:
    pattern = r"\]\((?!https?:)([^)#]*)#?([^)]*)\)"
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target, heading in re.findall(pattern, page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(path), f"{page.name}: {target}#{heading}"


def test_pictures_are_what_the_script_draws_from_the_recorded_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw

    for name, drawing in draw.pictures().items():
        assert (ROOT / "docs" / name).read_text() == drawing, "python docs/draw.py draws them anew"
        assert f"(docs/{name})" in (ROOT / "README.md").read_text()


def test_lint_and_format() -> None:
    for arguments in (["check"], ["format", "--check"]):
        result = run(sys.executable, "-m", "ruff", *arguments, ".")
        assert result.returncode == 0, result.stdout


USERS_SCRIPT = ROOT / "tests" / "typed_script.py"
# One process for both: two that fill an empty cache at once make mypy crash.
type_checked = pytest.mark.beside(
    sys.executable, "-m", "mypy", str(ROOT / "nanovllm"), str(USERS_SCRIPT)
)


@type_checked
def test_the_package_passes_strict_type_checks(command: Command) -> None:
    _, output = command.finish()
    assert re.search(r"errors? in 1 file \(checked \d\d+ source files\)", output), output
    assert set(re.findall(r"^(.*?):\d+: error", output, re.M)) == {"tests/typed_script.py"}, output


@type_checked
def test_a_users_type_checker_finds_mistakes_and_nothing_else(command: Command) -> None:
    _, output = command.finish()
    errors = re.findall(r"typed_script\.py:(\d+): error: (.*)", output)
    lines = enumerate(USERS_SCRIPT.read_text().splitlines(), 1)
    expected = {n: line.split("# finds: ")[1] for n, line in lines if "# finds: " in line}
    assert [int(number) for number, _ in errors] == list(expected), output
    assert all(expected[int(number)] in message for number, message in errors), output


def test_the_types_of_the_options_are_those_of_config() -> None:
    from dataclasses import fields
    from typing import get_type_hints

    from nanovllm.config import Config, Options

    options = {field.name for field in fields(Config) if field.init and field.name != "model"}
    hints = get_type_hints(Config)
    assert get_type_hints(Options) == {name: hints[name] for name in options}


def test_imports_point_down() -> None:
    """The contracts of pyproject.toml: a module imports only what stands before it."""
    check = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"
    result = run(sys.executable, "-c", check)
    assert result.returncode == 0, result.stdout


def test_requirements_satisfy_what_the_package_claims() -> None:
    """Every pin lies in the range that pyproject.toml gives, and none is missing."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [ROOT / "requirements.txt", ROOT / "requirements-test.txt"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    optional = project["optional-dependencies"]
    extras = [*optional["server"], *optional["ray"], *optional["test"]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name == "nanovllm":
            continue
        assert requirement.specifier.contains(versions[requirement.name]), requirement


@pytest.mark.slow
def test_the_source_distribution_holds_all_that_is_needed_to_test_it(tmp_path: Path) -> None:
    """Whatever git keeps."""
    source = tmp_path / "source"
    tracked = run("git", "ls-files").stdout.splitlines()
    if not tracked:
        pytest.skip("no git checkout")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    command = [sys.executable, "-c", build]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert set(tracked) <= names


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files beside what it builds
    shutil.copytree(ROOT / "nanovllm", source / "nanovllm")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w"]
    result = run(sys.executable, *command, str(tmp_path), str(source))
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"nanovllm-{nanovllm.__version__}-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    package = (ROOT / "nanovllm").rglob("*.*")
    sources = {str(p.relative_to(ROOT)) for p in package if p.suffix in (".py", ".c", ".h")}
    assert sources | {"nanovllm/py.typed"} <= names
    assert not any(name.startswith(("tests/", "assets/")) for name in names)

"""Kernels in C, compiled once for the processor at hand by the machine's C compiler.

Where there is no compiler, or it cannot do this, there are none, and the PyTorch twins run.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("nanovllm")

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC")
# Rows have a multiple of so many elements: halves of a head, in vectors.
ROW_STEP = 32
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


def layout(pointer: str = "", long: str = "", real: str = "", integer: str = "") -> struct.Struct:
    """Of a C struct whose members are, in this order, pointers, int64s, floats and ints."""
    groups = pointer, long, real, integer
    return struct.Struct("".join(c * len(g.split()) for c, g in zip("Pqfi", groups, strict=True)))


def call(kernel: str, kind: struct.Struct, *members: Any) -> None:
    """Run a kernel, on as many threads as torch uses.

    Args:
        kind: what it is handed a pointer to. members: of that, in order; a tensor as its address.
    """
    found = library()
    assert found is not None
    getattr(found, kernel)(kind.pack(*map(_value, members)), torch.get_num_threads())


def _value(member: Any) -> Any:
    if not isinstance(member, Tensor):
        return 0 if member is None else member
    assert member.is_cpu
    return member.data_ptr()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, and the log says why."""
    try:
        return _compiled()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.info(f"plain PyTorch on the CPU, without kernels in C: {error}")
        return None


def _compiled() -> ctypes.CDLL:
    """The shared library of these sources and this processor, made if there is none yet.

    Raises:
        RuntimeError, OSError, ValueError, subprocess.SubprocessError: it cannot be made.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"not on {sys.platform}")
    compiler = shlex.split(os.environ.get("CC", "")) or [_first_compiler()]
    openmp = _openmp(Path("/proc/self/maps").read_text(errors="replace"))
    sources = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.[ch]"))}
    what = sources, FLAGS, compiler, openmp, _processor()
    name = f"cpu-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    if (folder / name).exists():
        with suppress(OSError):  # what cannot be loaded is made anew
            return ctypes.CDLL(str(folder / name))
    logger.info("Compiling the kernels for this CPU, once: it takes some seconds")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = {FOLDER / name: f"{scratch}/{name}.o" for name in sources if name.endswith(".c")}
        _run(*([*compiler, *FLAGS, "-c", str(c), "-o", o] for c, o in files.items()))
        linked = Path(scratch, name)
        # With torch's own OpenMP: another's threads would contend with torch's.
        _run([*compiler, "-shared", *files.values(), openmp, "-lm", "-o", str(linked)])
        found = ctypes.CDLL(str(linked))
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        linked.replace(folder / name)  # whole at once, whoever else makes it
        return found


def _openmp(maps: str) -> str:
    """The OpenMP that GCC's is compatible with and torch has loaded, by a process's maps."""
    mapped = (Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines())
    found = [path for path in mapped if re.match(r"lib[gi]omp.*\.so", path.name)]
    own = Path(torch.__file__).parent
    found.sort(key=lambda path: own not in path.parents and path.parent.name != "torch.libs")
    if not found:
        raise RuntimeError("torch has loaded no OpenMP that GCC's is compatible with")
    return str(found[0])


def _first_compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise RuntimeError("no C compiler is installed (CC, cc, gcc, clang)")


def _processor() -> list[str]:
    """What decides which instructions there are."""
    text = Path("/proc/cpuinfo").read_text()
    first = re.findall(r"^(?:flags|Features|model name)\s*:.*", text, re.M)[:2]
    return [platform.machine(), *first]


def _run(*commands: list[str]) -> None:
    """All at once; none is left running.

    Raises:
        RuntimeError, OSError, subprocess.SubprocessError: one cannot be run, or fails.
    """
    running = [
        subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for c in commands
    ]
    try:
        for process, command in zip(running, commands, strict=True):
            _, errors = process.communicate(timeout=120)
            if process.returncode:
                said = errors.decode(errors="replace")[:400]
                raise RuntimeError(f"{shlex.join(command)} failed: {said}")
    finally:
        for process in running:
            process.kill()
            process.communicate()

"""``effcompile doctor``: is everything here that the back end needs, and if not, what to do."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Literal
from unittest import mock

from rich.console import Console
from rich.table import Table
from rich.text import Text

TESTED_TORCH = (2, 13)
NEEDED_DISK = 1 << 30

PROBE = """\
#include <ATen/cpu/vec/vec.h>
extern "C" long probe() {
  auto x = at::vec::Vectorized<float>(1.5f);
  float y[at::vec::Vectorized<float>::size()];
  (x + x).store(y);
  return long(y[0]);
}
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, what was found, and what to do about it."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    todo: str = ""


def versions() -> Iterator[Check]:
    """Python and the two libraries that everything is built on."""
    import torch

    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    todo = "" if number <= TESTED_TORCH else f"newer than {'.'.join(map(str, TESTED_TORCH))}, with which this is tested"
    yield Check("torch", "warn" if todo else "ok", torch.__version__, todo)
    try:
        yield Check("transformers", "ok", importlib.metadata.version("transformers"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("transformers", "fail", "not installed", "pip install effcompile")


def backend() -> Iterator[Check]:
    """Whether ``torch.compile(backend="effcompile")`` will find the back end."""
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="effcompile")
    if not found:
        yield Check("back end", "fail", "entry point torch_dynamo_backends is missing", "pip install -e . (again)")
        return
    try:
        next(iter(found)).load()
    except Exception as error:
        yield Check("back end", "fail", f"{type(error).__name__}: {error}", "pip install -e . (again)")
    else:
        yield Check("back end", "ok", "registered; needs no import")


def processor() -> Iterator[Check]:
    """The vector instructions that CPU kernels are built for."""
    import torch

    name = torch.backends.cpu.get_cpu_capability()
    slow = name in ("DEFAULT", "NO AVX")
    todo = "CPU kernels will run without vector instructions" if slow else ""
    yield Check("CPU", "warn" if slow else "ok", f"{name}, {torch.get_num_threads()} threads", todo)


def compiler() -> Iterator[Check]:
    """A C++ compiler that builds, and the result runs: a real build in a folder of its own."""
    from effcompile.lowering import toolchain

    todo = "install g++ (apt-get install g++) or set CXX to a C++17 compiler; until then the slow reference bodies run"
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        try:
            probe = ctypes.CDLL(str(toolchain.build("doctor", PROBE))).probe
        except (toolchain.BuildError, OSError) as error:
            yield Check("C++ compiler", "fail", str(error), todo)
            return
        right = probe() == 3
    if right:
        from torch._inductor.cpp_builder import get_cpp_compiler

        yield Check("C++ compiler", "ok", f"{get_cpp_compiler()}: a test build compiles and runs")
    else:
        yield Check("C++ compiler", "fail", "a test build gives wrong numbers", todo)


def gpu() -> Iterator[Check]:
    """Triton and a device for it; neither is needed on a CPU."""
    import torch

    device = torch.cuda.is_available()
    try:
        found = f"Triton {importlib.metadata.version('triton')}"
        state: Literal["ok", "warn", "fail"] = "ok"
    except importlib.metadata.PackageNotFoundError:
        found, state = "Triton is not installed", "fail" if device else "ok"
    yield Check("Triton", state, found, "pip install triton" if state == "fail" else "")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device else []
    yield Check("GPU", "ok", ", ".join(names) or "none; kernels are C++ for the CPU")


def caches() -> Iterator[Check]:
    """Where compiled code is kept, and whether there is room."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Check(
            "cache folder", "fail", f"{folder}: {error.strerror}", "set TORCHINDUCTOR_CACHE_DIR to a writable folder"
        )
        return
    free = shutil.disk_usage(folder).free
    todo = "" if free >= NEEDED_DISK else "make room, or set TORCHINDUCTOR_CACHE_DIR to another disk"
    yield Check("cache folder", "warn" if todo else "ok", f"{folder}, {free / 1e9:.0f} GB free", todo)


def demo_model() -> Iterator[Check]:
    """The weights of ``effcompile demo``; nothing else needs them."""
    from effcompile import smollm2

    try:
        yield Check("demo model", "ok", str(smollm2.gguf_file()))
    except smollm2.ModelMissingError as missing:
        yield Check("demo model", "warn", "not installed (only the demo needs it)", str(missing))


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (versions, backend, processor, compiler, gpu, caches, demo_model)


def run() -> list[Check]:
    """All checks. One that breaks is reported as failed, and the others still run."""
    results: list[Check] = []
    for check in CHECKS:
        try:
            results += check()
        except Exception as error:
            results.append(Check(check.__name__, "fail", f"{type(error).__name__}: {error}", "please report this"))
    return results


def main() -> int:
    """Print all checks; 0, or 1 if one failed."""
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    console = Console()
    with console.status("building a test kernel") if sys.stdout.isatty() else mock.MagicMock():
        results = run()
    table = Table.grid(padding=(0, 2))
    for check in results:
        color = colors[check.state]
        table.add_row(Text(check.state, color), check.name, Text(check.found, overflow="fold"))
        if check.todo:
            table.add_row("", "", Text(check.todo, color))
    console.print(table)
    return int(any(check.state == "fail" for check in results))

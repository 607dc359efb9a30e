"""Builds and loads one generated C++ file with Inductor's toolchain, cached across processes by content.

A build lives in ``<Inductor's cache>/effcompile/cpp/<key>/<name>.cpp`` and ``.so``, where the key covers the source,
the headers of :mod:`effcompile.kernels.cpp`, the torch version, the compiler settings and the CPU's capabilities. A
warm start loads the library without asking for a compiler at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """No library could be built; the text says why in one line."""


@functools.cache
def headers_digest() -> str:
    """Digest of all headers that generated files may include."""
    digest = hashlib.sha256()
    for path in sorted(headers_dir().glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def headers_dir() -> Path:
    """The folder of the kernel headers, as installed."""
    import effcompile.kernels.cpp as package

    return Path(next(iter(package.__path__)))


@functools.cache
def machine() -> str:
    """What code for ``-march=native`` depends on: torch, the CPU and its capabilities."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    known = sorted(capabilities().items()) if callable(capabilities) else []
    return repr((torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), known))


def settings() -> str:
    """The settings of Inductor that change the compiler or its flags."""
    from torch._inductor import config

    names = ("cxx", "march", "simdlen", "enable_unsafe_math_opt_flag", "enable_floating_point_contract_flag")
    return repr([getattr(config.cpp, name, None) for name in names] + [os.environ.get("CXX")])


def folder(source: str) -> Path:
    """Where the build of ``source`` lives, whether it exists or not."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    parts = "\0".join((source, headers_digest(), machine(), settings()))
    return Path(cache_dir()) / "effcompile" / "cpp" / hashlib.sha256(parts.encode()).hexdigest()[:24]


def build(name: str, source: str) -> Path:
    """The path of the shared library of ``source``, built if it is not there yet.

    Raises
    ------
    BuildError
        If there is no compiler, or it fails.
    """
    where = folder(source)
    library = where / f"{name}.so"
    if library.exists():
        return library
    from torch.utils._filelock import FileLock

    where.mkdir(parents=True, exist_ok=True)
    with FileLock(str(where / "lock"), timeout=600):
        if not library.exists():
            text = where / f"{name}.cpp"
            text.write_text(source)
            # Built under another name and moved, so that no process ever loads half a file.
            os.replace(_compile(f"{name}.{os.getpid()}", text), library)
    return library


def _compile(name: str, source: Path) -> str:
    try:
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        options = CppTorchOptions(
            vec_isa=pick_vec_isa(),
            include_pytorch=True,
            warning_all=False,
            # -g0: debug lines would be most of the file. -w: warnings here are about headers of torch.
            extra_flags=[f"-I{headers_dir()}", "-g0", "-w"],
        )
        builder = CppBuilder(name, str(source), options, str(source.parent))
        builder.build()
        return str(builder.get_target_file_path())
    except Exception as error:  # InvalidCxxCompiler, CppCompileError, OSError: the user needs one line, not a type
        lines = str(error).splitlines() or [""]
        first = next((line for line in lines if "error: " in line), lines[0])
        raise BuildError(f"{type(error).__name__}: {first.strip()[:300]}") from error


def load(library: Path) -> ctypes.CDLL:
    """The library, loaded into this process."""
    return ctypes.CDLL(str(library))

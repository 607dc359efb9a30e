"""Builds and loads one generated C++ file with Inductor's toolchain, cached across processes by content.

A build lives in ``<Inductor's cache>/effcompile/cpp/<key>/<name>.cpp`` and ``.so``, where the key covers the source,
the headers of :mod:`effcompile.kernels.cpp`, the torch version, the compiler settings and the CPU's capabilities. A
warm start loads the library without asking for a compiler at all.

Half of a build is reading the headers of ATen. :func:`precompile` keeps them as the compiler sees them, which takes
longer than the few builds of a model and 120 MB, and so is for those who build dozens of programs, such as our tests.
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


def _header() -> Path:
    """The header that :func:`precompile` prepares; in one place for all cache folders, as Inductor has it."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    parts = "\0".join((headers_digest(), machine(), settings()))
    key = hashlib.sha256(parts.encode()).hexdigest()[:24]
    return Path(default_cache_dir()) / "effcompile" / "headers" / key / "parts.h"


def _prepared(header: Path) -> Path | None:
    """What the compiler has made of ``header``, if that is there: gcc's name for it, or clang's."""
    made = (header.with_name(header.name + suffix) for suffix in (".gch", ".pch"))
    return next((path for path in made if path.exists()), None)


def precompile() -> Path:
    """Prepare the headers that all builds on this machine begin with, if that is not done yet; where it is.

    Builds that find it take half the time. The code is the same: where it cannot be used, the headers are read.
    Raises :class:`BuildError`.
    """
    from torch.utils._filelock import FileLock

    header = _header()
    header.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(header.parent / "lock"), timeout=600):
        found = _prepared(header)
        if found is None:
            header.write_text(f'#include "{headers_dir() / "vec.h"}"\n')
            made = Path(_compile(f"{header}.{os.getpid()}", header, precompiling=True))
            found = header.with_name(header.name + made.suffix)
            os.replace(made, found)
    return found


def _compile(name: str, source: Path, *, precompiling: bool = False) -> str:
    if precompiling or not _prepared(_header()):
        return _run(name, source, precompiling=precompiling)
    try:
        return _run(name, source, f"-include {_header()}")
    except BuildError:  # clang takes what another version of it prepared for an error; gcc reads the header itself
        return _run(name, source)


def _run(name: str, source: Path, *more: str, precompiling: bool = False) -> str:
    try:
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        # -g0: debug lines would be most of the file. -w: warnings here are about headers of torch.
        flags = [f"-I{headers_dir()}", "-g0", "-w", *more]
        options = CppTorchOptions(
            vec_isa=pick_vec_isa(),
            include_pytorch=True,
            warning_all=False,
            extra_flags=flags,
            precompiling=precompiling,
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

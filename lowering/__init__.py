"""Lowerings: importing this package registers the launchers of every operator that has generated kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import effcompile.kernels
from effcompile.kernels.program import OperatorProgram, Program, StoreProgram
from effcompile.lowering import (  # noqa: F401
    cpp,
    cpp_blocks,
    cpp_ffn,
    cpp_linear,
    cpp_low_rank,
    cpp_pages,
    cpp_weights,
    triton,
    triton_blocks,
    triton_ffn,
    triton_low_rank,
    triton_weights,
)

_LIBRARIES = {
    operator: library
    for library in (cpp_ffn.LIBRARY, cpp_linear.LIBRARY, cpp_low_rank.LIBRARY, cpp_weights.LIBRARY)
    for operator in library.entries
}


def prebuild(programs: Iterable[Program | StoreProgram], device_type: str) -> None:
    """Start building kernels while the rest of the graph compiles.

    Only C++ is built ahead; Triton builds at first launch.
    """
    if device_type == "cpu":
        cpp.prebuild(programs)


def written(program: OperatorProgram, device_type: str) -> tuple[str, str]:
    """The file of an operator's kernels, ``""`` if it is not built yet, and its text."""
    if device_type == "cpu":
        return _LIBRARIES[program.operator].written(program.dtype)
    if program.operator == "quantized_linear":
        return triton_weights.written(program.dtype)
    if program.operator == "low_rank_linear":
        return triton_low_rank.written(program.dtype)
    return triton_ffn.written(program.operator, program.dtype)


def refusal(program: Program | StoreProgram, device_type: str) -> str | None:
    """Why a device of this type has no generated kernel for ``program``; None where that is not known to be so."""
    if device_type == "cpu":
        return cpp.refusal(program)
    if device_type != "cuda":
        return f"no kernels are generated for {device_type!r}"
    if program.form.value_latent:
        return "no GPU kernel sums latents of values"
    return triton.refusal(program)


@functools.cache
def sources() -> tuple[str, ...]:
    """All files that decide what an operator computes, for cache keys."""
    folders = [Path(__file__).parent, *(Path(p) for p in effcompile.kernels.__path__)]
    return tuple(sorted(str(f) for folder in folders for ending in ("*.py", "*.h") for f in folder.rglob(ending)))

"""What launchers of operators share whose Triton kernels are written by hand: the kernels, and sums in parts."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import DTYPES
from effcompile.lowering.triton import WAVES
from effcompile.lowering.triton import multiprocessors as multiprocessors
from effcompile.lowering.triton_build import Built
from effcompile.lowering.triton_side import Vendor

LEAST_SPLIT, MAX_SPLITS = 64, 64
"""Rows of a weight that a split has at least, and splits at most: their sums are written and read again."""


class Cut(NamedTuple):
    """The sizes of a kernel's tiles: rows, columns, steps of the sum; warps, and stages of the pipeline of loads."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """The arguments of a launch."""
        names = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


def vendor() -> Vendor:
    """Whose GPUs this PyTorch was built for."""
    return "hip" if torch.version.hip else "cuda"


def precision_of(dtype: torch.dtype, who: Vendor) -> str:
    """How operands are multiplied: fp32 as three tf32 products on NVIDIA, in its own matrix units on AMD."""
    return "tf32x3" if dtype is torch.float32 and who == "cuda" else "ieee"


@functools.cache
def kernel(where: str, name: str, dtype: torch.dtype) -> Built:
    """A kernel, for one dtype: a build that fails for one says nothing about another."""
    if dtype not in DTYPES:
        raise KernelUnavailable(f"an operator in {dtype} ({', '.join(map(str, DTYPES))} have kernels)")
    try:
        module = importlib.import_module(f"effcompile.kernels.triton.{where}")
    except ImportError as error:
        raise KernelUnavailable("Triton is not installed") from error
    return Built(name, str(module.__file__), module, None, 0)


def check(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raise ``KernelUnavailable`` for a tensor that is not contiguous or of another dtype; copying it would cost more
    than a kernel gains."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_contiguous()):
            strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
            raise KernelUnavailable(f"{name} {tuple(tensor.shape)} in {tensor.dtype}{strides}, and not in {dtype}")


def power(count: int) -> int:
    """``count`` rounded up to a power of two."""
    return 1 << (max(count, 1) - 1).bit_length()


def splits(length: int, blocks: int, depth: int, device: torch.device, limit: int = MAX_SPLITS) -> tuple[int, int]:
    """At most ``limit`` splits of a sum over ``length`` rows, of ``blocks`` programs each, and the rows of one."""
    wanted = WAVES * multiprocessors(device) // blocks
    count = max(1, min(wanted, length // LEAST_SPLIT, limit))
    each = max(1, -(-length // (count * depth))) * depth
    return -(-length // each), each


def add_up(
    parts: Tensor, out: Tensor, count: int, steps: tuple[int, int], bias: Tensor | None, first: Tensor | None = None,
    chosen: Tensor | None = None, groups: int = 0,
) -> Tensor:  # fmt: skip
    """Write rows ``out``, each the sum of its ``count`` parts, and return it.

    ``steps`` are the numbers from one part to the next and from one row to the next.
    """
    rows, size = out.shape
    kernel("ffn", "add_up", out.dtype).launch(
        "", rows * -(-size // 128), parts, *(parts if t is None else t for t in (chosen, first, bias)), out, count,
        groups, size, *steps, LISTED=chosen is not None, FIRST=first is not None, BIASED=bias is not None,
        PARTS=min(power(count), 64), COLUMNS=128, num_warps=4,
    )  # fmt: skip
    return out

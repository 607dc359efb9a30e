"""What tests of Triton kernels share: the child process with the interpreter, and the error budget of attention."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch
from test_triton_kernels import attend, largest_score
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def in_the_interpreter(file: str, *options: str) -> None:
    """Run a test file in a child process: the interpreter is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file, *options]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:]
    assert " passed" in child.stdout


def assert_within_budget(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, **parts: Any
) -> None:
    """Twice what PyTorch in the model's dtype loses, plus one rounding of the result and those of scores in fp32.

    ``key`` and ``value`` are those that attention reads, dequantised; ``seen`` is bool ``[B or 1, H or 1, T, S]``.
    """
    dtype = query.dtype
    assert out.dtype == dtype
    assert out.is_contiguous()
    best, best_lse = attend(query.double(), key.double(), value.double(), seen, scale, torch.float64, **parts)
    low, low_lse = attend(query, key, value, seen, scale, dtype, **parts)
    blind = best_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert out[blind].eq(0).all()
    rounding = torch.finfo(dtype).eps * best.abs().max()
    # Scores are summed, scaled to base 2 and shifted: each rounding moves a weight by as much of it; parts have more.
    shifting = (8 if parts else 3) * 2.0**-24 * largest_score(query, key, scale) * value.double().abs().max()
    assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding + shifting
    # The lse is fp32, whatever the dtype: what summing D products in fp32 may lose is added.
    summing = query.shape[3] * 2.0**-23 * scale * (query.double().abs().amax() * key.double().abs().amax())
    difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
    assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6

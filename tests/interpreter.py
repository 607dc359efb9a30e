"""Triton's interpreter for tests: it is chosen when Triton is imported, so a file's kernels run in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is such a child: tests of kernels are there, all others are in its parent."""


def interpreted(file: str, *, now: bool = True) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two tests for ``file`` to hold, which run it once more, interpreted: its fast tests, and its slow ones.

    The first is fast if ``now``; where the child takes long it belongs to the slow set as well.
    """

    def run(*options: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        child = subprocess.run(
            [*command, *options], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout[-6000:]
        assert " passed" in child.stdout

    def fast() -> None:
        run()

    @pytest.mark.slow
    def slow() -> None:
        run("-m", "slow")

    fast = fast if now else pytest.mark.slow(fast)
    fast.__test__ = slow.__test__ = not INTERPRETED  # type: ignore[attr-defined]
    return fast, slow

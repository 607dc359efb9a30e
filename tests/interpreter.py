"""Triton's interpreter for tests: it is chosen when Triton is imported, so a file's kernels run in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is such a child: tests of kernels are there, all others are in its parent."""


def interpreted(file: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two tests for ``file`` to hold, which run it once more, interpreted: most of it, and its exhaustive tests.

    The interpreter takes long: the first belongs to the slow set.
    """

    def run(*options: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        child = subprocess.run(
            [*command, *options], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout[-6000:]
        assert " passed" in child.stdout

    @pytest.mark.slow
    def most() -> None:
        run("-m", "not exhaustive")

    @pytest.mark.exhaustive
    def rest() -> None:
        run("-m", "exhaustive")

    most.__test__ = rest.__test__ = not INTERPRETED  # type: ignore[attr-defined]
    return most, rest

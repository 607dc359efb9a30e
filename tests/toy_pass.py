"""A pass for tests of what holds for every pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

from effcompile.passes import base
from effcompile.passes.base import Pass


@dataclasses.dataclass(frozen=True)
class Toy(Pass):
    """Does nothing."""

    bits: int = 4
    name: ClassVar[str] = "toy"


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Within this context the registry holds only ``toy``."""
    with mock.patch.dict(base.REGISTRY, {"toy": f"{__name__}:Toy"}, clear=True):
        yield

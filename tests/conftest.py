"""What every test shares: no network, and the same random numbers each time."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same seed before each test, and no compiled code left over from the one before."""
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; decorate a ``copy.deepcopy`` of the model, never this one."""
    from effcompile import smollm2 as home

    return home.load()

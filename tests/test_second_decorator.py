"""A second pass on a module takes effect, also where code compiled for the first alone would fit."""

from __future__ import annotations

import types
from typing import Any

import torch

import effcompile as ec
from effcompile.passes.options import PREFIX
from models import NanoGPT


def keys(gm: Any) -> set[str]:
    """The passes that decorators name in a graph."""
    return {key.removeprefix(PREFIX) for node in gm.graph.nodes for key in node.meta.get("custom") or {}}


def test_a_second_pass_is_another_graph() -> None:
    ids = torch.zeros(1, 20, dtype=torch.int64)
    graphs: list[set[str]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(keys(gm))
        return gm.forward

    first = ec.streaming()(NanoGPT("sdpa"))
    both = ec.xattention()(ec.streaming()(NanoGPT("sdpa")))
    for model in (first, both, first):
        model.compile(backend=backend)
        model(ids)
    ec.xattention()(first)
    first(ids)
    assert graphs == [{"streaming"}, {"streaming", "xattention"}]


def test_also_on_an_instance_with_a_forward_of_its_own() -> None:
    graphs: list[set[str]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(keys(gm))
        return gm.forward

    own = NanoGPT("sdpa")
    own.forward = types.MethodType(lambda self, ids: NanoGPT.forward(self, ids), own)  # type: ignore[method-assign]
    for decorate in (ec.streaming(), ec.xattention()):
        decorate(own)
        own.compile(backend=backend)
        own(torch.zeros(1, 20, dtype=torch.int64))
    assert graphs == [{"streaming"}, {"streaming", "xattention"}]

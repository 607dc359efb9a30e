"""Sparse methods on a GPU, as far as that can be seen without one: nothing waits for the device, and sites are taken.

The meta device stands for it: its tensors have no data, so that what asks for a number, such as ``item()``, a branch on
a tensor or a shape that depends on data, is an error. Copies from the host, which wait too, are looked for here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sparse_methods import FAMILY
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile import lowering
from effcompile.kernels import block_ops
from effcompile.passes import base

COPYING = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that make a tensor of numbers: on a device by a copy, which ends before they return."""


class OnDevice(TorchDispatchMode):
    """Notes operations with a tensor that is not on the device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self.found += [f"{func} of {sorted(places)}"] if places - {"meta"} else []
        return out


class NoCopies(TorchFunctionMode):
    """Notes tensors that are made of numbers of the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in COPYING and not isinstance(args[func is Tensor.new_tensor], Tensor)
        listed = func is Tensor.__getitem__ and any(isinstance(i, list) for i in (args[1], *_several(args[1])))
        self.found += [f"{func} of {args}"] if made or listed else []
        return func(*args, **(kwargs or {}))


def _several(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else ()


def waits(call: Callable[[], Any]) -> list[str]:
    found: list[str] = []
    with NoCopies(found), OnDevice(found):
        call()
    return found


def test_what_would_wait_is_noticed() -> None:
    x = torch.empty(3, device="meta")
    for bad in (
        lambda: torch.as_tensor(0.5, device="meta") + x,
        lambda: x.new_tensor([1.0]) * x,
        lambda: x + torch.ones(3).to("meta"),
        lambda: x[[0, 1]],
        lambda: x[:, None][[0, 1], 0],
    ):
        assert waits(bad)
    assert waits(lambda: torch.where(x > 0, x, 0)[:2] * 2 + torch.full((), 2, device="meta")) == []
    for bad in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu()):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"meta tensor|nonzero"):
            bad()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_choosing_blocks_does_not_wait(name: str, padded: bool) -> None:
    """The whole operator, policy and lists: with the defaults, at the limit, and below the least length."""
    cls = base.get(name)
    options: dict[str, Any]
    query, key = (torch.empty(2, h, 3000, 64, device="meta", dtype=torch.bfloat16) for h in (8, 2))
    mask = torch.empty(2, 3000, device="meta", dtype=torch.bool) if padded else None
    moved = torch.empty(2, 2, 3000, device="meta", dtype=torch.int64)
    more = {"key_positions": moved} if cls.reorders else {}
    for options in ({}, dict(cls.limit), {"min_length": 10**6}):
        method = block_ops.method_text(name, dataclasses.asdict(cls(**{"min_length": 0} | options)))
        choose = functools.partial(block_ops._select_blocks, query, key, mask, method, 0.125, **more)
        assert waits(choose) == []
        assert [tuple(x.shape) for x in choose()] == [(2, 8, 24), (2, 8, 24, 24)] * 2


@pytest.mark.parametrize("kernels", [True, False])
def test_a_site_is_taken_where_a_kernel_is(
    kernels: bool, no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model on the meta device, which has the GPU's kernels here, or none; the compiled model does not wait."""
    if kernels:
        refusal = lowering.refusal
        monkeypatch.setattr(lowering, "refusal", lambda program, _: refusal(program, "cuda"))
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60, head_dim=64)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
        ids, mask = torch.zeros(2, 300, dtype=torch.int64), torch.ones(2, 300, dtype=torch.int64)
    ec.xattention(min_length=64)(model)
    with torch.no_grad():
        torch.compile(model, backend="effcompile")(ids, attention_mask=mask, use_cache=False)
    found = [(d.action, d.reason and d.reason.text) for d in ec.inspect(model).decisions]
    assert found == [("rewritten", None) if kernels else ("left", "no kernels are generated for 'meta'")]
    if not kernels:
        return
    (graph,) = no_inductor
    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    assert waits(lambda: graph(*(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs))) == []

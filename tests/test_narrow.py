"""Computing a part of a graph: where positions come from, and which linears and attentions get smaller with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flap_heads import keeping, planned
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.patterns.narrow import Kept, serving, viewed

B, T, H, G, E = 2, 12, 9, 3, 4


class Attention(nn.Module):
    """A hand-written layer: how it is written is a word of ``spelling``."""

    def __init__(self, spelling: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.embed = nn.Embedding(128, 32)
        self.q, self.k, self.v = nn.Linear(32, H * E), nn.Linear(32, G * E), nn.Linear(32, G * E)
        self.qkv = nn.Linear(32, (H + 2 * G) * E)
        self.gate, self.norm = nn.Linear(32, H * E), nn.LayerNorm(E)
        self.out = nn.Linear(H * E, 32)
        self.register_buffer("slope", torch.randn(1, H, 1, 1))
        self.register_buffer("store", torch.zeros(B, G, T, E))

    def forward(self, ids: Tensor) -> Any:
        x, how = self.embed(ids), self.spelling
        b, t, _ = x.shape
        if "fused" in how:
            q, k, v = self.qkv(x).split([H * E, G * E, G * E], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.unflatten(-1, (H, E)) if "unflatten" in how else q.view(b, t, H, E)
        q, k, v = q.transpose(1, 2), k.view(b, t, G, E).permute(0, 2, 1, 3), v.view(b, t, G, E).transpose(1, 2)
        if "norm" in how:
            q, k = self.norm(q), F.rms_norm(k, (E,))
        if "written" in how:
            self.store.copy_(k)
            k = self.store.transpose(2, 3)
            self.store.mul_(2)  # what is made of the store before is a view of it
            k = k.transpose(2, 3)
        distance = torch.arange(t)[None] - torch.arange(t)[:, None]
        mask = (self.slope * distance).masked_fill(distance > 0, -math.inf)
        if "arithmetic" in how:
            k, v = k.repeat_interleave(H // G, 1), v[:, :, None].expand(b, G, H // G, t, E).reshape(b, H, t, E)
            y = (q @ k.transpose(2, 3) / E**0.5 + mask).softmax(-1) @ v
        else:
            mask = mask if "slopes" in how else mask[:, :1]
            if "expanded" in how:
                k, v = (y[:, :, None].expand(b, G, H // G, t, E).reshape(b, H, t, E) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2) if "flatten" in how else y.transpose(1, 2).reshape(b, t, H * E)
        if "gated" in how:
            y = y * torch.sigmoid(self.gate(x))
        if "mixed" in how:
            y = y.view(b, t, H, E).transpose(2, 3).reshape(b, t, H * E)
        y = self.out(y) if "addmm" not in how else torch.addmm(self.out.bias, y.view(-1, H * E), self.out.weight.t())
        y = x + y.view(b, t, -1)
        return (y, q) if "returned" in how else y


def plan_of(model: nn.Module, kept: list[int]) -> ec.Plan:
    ids = torch.randint(0, 128, (B, T))
    return keeping(ec.calibrate(model, [ids], [ec.flap(0.4, heads=True)], progress=False), kept)


def oracle(model: Attention, ids: Tensor, kept: list[int]) -> Any:
    """The eager model with the columns of the other heads zero, and the bias."""
    stays = torch.zeros(H, E)
    stays[kept] = 1
    weight, bias = model.out.weight.data.clone(), model.out.bias.data.clone()
    model.out.weight.data *= stays.flatten()
    model.out.bias.data += 0.1
    try:
        return model(ids)
    finally:
        model.out.weight.data.copy_(weight)
        model.out.bias.data.copy_(bias)


GROUPS, QUERIES, EVEN = [0, 1, 2, 6, 7, 8], [0, 2, 3, 5, 8], [1, 4, 7]


@pytest.mark.parametrize(
    ("spelling", "kept", "rows"),
    [
        ("", GROUPS, {"q": 6, "k": 2, "v": 2}),
        ("slopes norm unflatten flatten", GROUPS, {"q": 6, "k": 2, "v": 2}),
        ("slopes norm", QUERIES, {"q": 5, "k": 3, "v": 3}),
        ("slopes addmm", EVEN, {"q": 3, "k": 3, "v": 3}),
        ("arithmetic norm", GROUPS, {"q": 6, "k": 3, "v": 2}),
        ("arithmetic", QUERIES, {"q": 5, "k": 3, "v": 3}),
        ("expanded slopes", [0, 5, 7], {"q": 3, "k": 3, "v": 3}),
        ("gated", GROUPS, {"q": 6, "k": 2, "v": 2, "gate": 6}),
        ("written", GROUPS, {"q": 6, "k": 3, "v": 2}),
        ("written returned slopes", QUERIES, {"q": 9, "k": 3, "v": 3}),
        ("fused", GROUPS, {"qkv": H + 2 * G}),
    ],
)
def test_what_is_computed(spelling: str, kept: list[int], rows: dict[str, int], no_inductor: list[Any]) -> None:
    model, ids = Attention(spelling), torch.randint(0, 128, (B, T))
    plan = plan_of(model, kept)
    told = planned(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(told(ids), oracle(model, ids, kept), rtol=1e-5, atol=1e-5)
    graph = no_inductor[-1].graph
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    made = sorted(node.meta["val"].shape[-1] // E for node in linears)
    assert made == sorted([*rows.values(), 32 // E])
    (output,) = [node for node in linears if node.meta["val"].shape[-1] == 32]
    assert output.args[0].meta["val"].shape[-1] == len(kept) * E
    (attention,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default) or [
        None
    ]
    if attention is not None:
        assert attention.meta["val"].shape[1] == len(kept)


def test_heads_that_are_mixed_stay(no_inductor: list[Any]) -> None:
    """Channels of all heads in turn: no head of the linear's input is a head of attention."""
    model = ec.flap(0.4, heads=True)(Attention("mixed"))
    ids = torch.randint(0, 128, (B, T))
    with pytest.raises(ec.CalibrationError, match="no site that can be calibrated: no-output-projection"):
        ec.calibrate(model, [ids], [ec.flap(0.4, heads=True)], progress=False)
    model.compile(backend="effcompile")
    with torch.no_grad():
        model(ids)
    (row,) = [d for d in ec.inspect(model).decisions if d.kind == "heads"]
    assert row.reason is not None
    assert row.reason.code == "no-output-projection"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_positions_through_views(data: st.DataObject) -> None:
    """What a view's positions hold is what the positions that are found hold, whatever the sizes."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    total = math.prod(sizes)
    other, left = [], total
    while left > 1 or data.draw(st.booleans()):
        factor = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        other.append(factor)
        left //= factor
        if len(other) > 6:
            other.append(left)
            break
    before, after = tuple(sizes), tuple(other) or (1,)
    if math.prod(after) != total:
        return
    dim = data.draw(st.integers(0, len(after) - 1))
    index = data.draw(st.sets(st.integers(0, after[dim] - 1), min_size=1))
    kept = Kept(dim, tuple(sorted(index)))
    found = viewed(before, after, kept)
    x = torch.arange(total)
    expected = x.view(after).index_select(dim, torch.tensor(kept.index)).flatten()
    if found is not None:
        got = x.view(before).index_select(found.dim, torch.tensor(found.index)).flatten()
        assert torch.equal(got, expected)
    else:  # what is narrowed has more than one position, and all of them are always found
        assert len(index) < after[dim] or after[dim] == 1


def test_positions_that_are_found() -> None:
    assert viewed((2, 5, 24), (2, 5, 6, 4), Kept(2, (1, 3))) == Kept(2, (4, 5, 6, 7, 12, 13, 14, 15))
    assert viewed((2, 6, 5, 4), (2, 30, 4), Kept(1, tuple(range(5, 10)))) == Kept(1, (1,))
    assert viewed((2, 5, 6, 4), (10, 24), Kept(1, (0, 1, 2, 3))) == Kept(2, (0,))
    assert viewed((2, 5, 6, 4), (10, 24), Kept(1, (0, 1, 2))) is None
    assert serving((0, 1, 2, 6, 7, 8), 3) == (0, 2)
    assert serving((0, 1, 6, 7), 3) == (0, 0, 2, 2)

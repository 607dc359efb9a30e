"""Sites that no pass takes yet: feed-forward blocks, mixtures of experts, heads, linears; and how they are reported."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from effcompile.passes import backend, report
from effcompile.passes.report import inspect
from effcompile.patterns.attention import find_attention
from effcompile.patterns.ffn import find_feed_forward
from effcompile.patterns.layers import find_layers
from effcompile.patterns.linear import find_heads, find_linears
from effcompile.patterns.moe import find_experts


def graph(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """A normalised graph of ``function``."""
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*(torch.randn(s) for s in shapes))


X, UP, DOWN, WIDE = (2, 3, 8), (32, 8), (8, 32), (8, 64)


def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down)


def squared(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 2, down)


def by_addmm(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    flat = torch.addmm(torch.ones(32), x.view(-1, 8), up.t()).view(2, 3, 32)
    return torch.addmm(torch.ones(8), F.silu(flat).view(-1, 32), down.t()).view(2, 3, 8)


def by_matmul(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.relu(x @ up.T) @ down.T


def gated(x: Tensor, up: Tensor, down: Tensor, gate: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def fused(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, both).chunk(2, -1)
    return F.linear(up * F.silu(gate), down)


@pytest.mark.parametrize(
    ("function", "shapes", "is_gated"),
    [
        (plain, (X, UP, DOWN), False),
        (squared, (X, UP, DOWN), False),
        (by_addmm, (X, UP, DOWN), False),
        (by_matmul, (X, UP, DOWN), False),
        (gated, (X, UP, DOWN, UP), True),
        (fused, (X, (64, 8), DOWN), True),
    ],
)
def test_feed_forward(function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], is_gated: bool) -> None:
    (site,) = find_feed_forward(graph(function, *shapes))
    assert site.gated == is_gated
    assert len(site.ups) == (2 if function is gated else 1)
    assert site.down not in site.ups


def no_activation(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up) * 2, down)


def of_two_inputs(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, up)) * F.linear(x + 1, up), down)


def gated_attention(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    mixed = F.linear(x, up).softmax(1)
    return F.linear(F.sigmoid(F.linear(x, up)) * mixed, down)


def of_two_activations(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.relu(x @ (up * x.mean()).T) @ down.T


def to_another_width(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down[:5])


@pytest.mark.parametrize(
    "function", [no_activation, of_two_inputs, gated_attention, of_two_activations, to_another_width]
)
def test_what_is_no_feed_forward(function: Callable[..., Tensor]) -> None:
    assert not find_feed_forward(graph(function, X, UP, DOWN))


def by_groups(x: Tensor, router: Tensor) -> Tensor:
    scores = F.linear(x.view(-1, 8), router).sigmoid()
    groups = (scores + 1).view(-1, 4, 8).topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
    return (scores + groups.sum(-1, keepdim=True)).topk(6, dim=-1)[0]


def best_rows(x: Tensor, router: Tensor) -> Tensor:
    return x.topk(3, -1)[0]


def test_experts() -> None:
    (site,) = find_experts(graph(by_groups, X, (32, 8)))
    assert (site.experts, site.chosen) == (32, 6)
    assert not find_experts(graph(best_rows, X, (32, 8)))


def test_heads() -> None:
    def capped(x: Tensor, head: Tensor) -> Tensor:
        return 30 * torch.tanh(F.linear(x[:, -1:], head) / 30)

    def used_within(x: Tensor, head: Tensor) -> Tensor:
        logits = F.linear(x, head)
        return logits + logits.sum()

    assert len(find_heads(graph(capped, X, (50, 8)))) == 1
    assert not find_heads(graph(used_within, X, (50, 8)))
    assert not find_heads(graph(capped, X, (8, 8)))
    assert len(find_linears(graph(gated, X, UP, DOWN, UP))) == 3


def attended(x: Tensor, o: Tensor) -> Tensor:
    return F.linear(F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1), o)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,))


def in_sequence(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = x + attended(normed(x), o)
    return plain(normed(x), up, down) + x


def side_by_side(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return attended(normed(x), o) + plain(normed(x), up, down) + x


def side_by_side_from_the_left(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + attended(normed(x), o) + plain(normed(x), up, down)


def norm_after(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = normed(x + attended(x, o))
    return normed(x + normed(plain(x, up, down)) * 0.3)


def two_attentions(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = x + attended(normed(x), o)
    return in_sequence(x, o, up, down)


@pytest.mark.parametrize(
    ("function", "attentions"),
    [(in_sequence, 1), (side_by_side, 1), (side_by_side_from_the_left, 1), (norm_after, 1), (two_attentions, 2)],
)
def test_layers(function: Callable[..., Tensor], attentions: int) -> None:
    def stack(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
        for _ in range(3):
            x = function(x, o, up, down)
        return normed(x)

    gm = graph(stack, X, (8, 8), UP, DOWN)
    layers = find_layers(gm, find_attention(gm), find_feed_forward(gm))
    assert [(len(layer.attentions), len(layer.blocks)) for layer in layers] == [(attentions, 1)] * 3
    assert all(layer.anchor.target is torch.ops.aten.add.Tensor for layer in layers)
    assert all(max(p.anchor for p in (*one.attentions, *one.blocks)) < one.anchor for one in layers)


def without_attention_in_the_stream(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = attended(normed(x), o)
    return plain(normed(x), up, down) + x


def without_blocks_in_the_stream(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return plain(normed(x + attended(normed(x), o)), up, down)


def with_another_stream(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = x + attended(normed(x), o)
    return plain(normed(x), up, down) + up[:3]


def attention_alone(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + attended(normed(x), o)


def block_first(x: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return attention_alone(x + plain(normed(x), up, down), o, up, down)


@pytest.mark.parametrize(
    "function",
    [
        without_attention_in_the_stream,
        without_blocks_in_the_stream,
        with_another_stream,
        attention_alone,
        block_first,
    ],
)
def test_what_is_no_layer(function: Callable[..., Tensor]) -> None:
    gm = graph(function, X, (8, 8), UP, DOWN)
    assert len(find_attention(gm)) == 1
    assert not find_layers(gm, find_attention(gm), find_feed_forward(gm))


def test_they_are_one_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x))) + F.scaled_dot_product_attention(x, x, x)

    report._graphs.clear()
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    model = Block()
    model.compile(backend="effcompile")
    with torch.no_grad():
        model(torch.randn(1, 2, 3, 8))
    seen = inspect(model)
    assert [site.kind for site in seen.sites] == ["attention", "ffn", "linear", "linear"]
    assert [site.index for site in seen.sites] == [0, 1, 2, 3]
    assert {site.module for site in seen.sites if site.kind == "linear"} == {"up", "down"}
    assert len(seen.decisions) == 1
    assert "0 of 1 site rewritten" in seen.summary
    assert str(seen).count("no pass takes: 1 ffn, 2 linear") == 1
    (one,) = json.loads(seen.to_json())["graphs"]
    assert [other["kind"] for other in one["others"]] == ["ffn", "linear", "linear"]

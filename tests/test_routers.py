"""Routers of mixtures of experts: found, described, and refused where they are none that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import IDS, MIXTURES, logits_of
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import effcompile as ec
from effcompile.kernels.reason import Reason
from effcompile.patterns.router import Router, RouterSite, find_routers

X, ROWS = (5, 7, 16), (8, 16)


def routers(function: Callable[..., Any], *more: Tensor) -> list[RouterSite]:
    """What is found in a graph of ``function`` of tokens and a router's rows, the first result weighing the tokens."""

    def whole(x: Tensor, rows: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        first, *others = function(x, rows, *more)
        return x.unsqueeze(-1) * first.unsqueeze(-2), *others

    return found(whole, torch.randn(X), torch.randn(ROWS), *more)


def found(function: Callable[..., Any], *given: Tensor) -> list[RouterSite]:
    gm: fx.GraphModule = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*given)
    return find_routers(gm)


SLOW = {"qwen3-moe", "olmoe"}
"""Spelled as in another row."""


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MIXTURES])
def test_every_router_is_found_and_described(name: str, no_inductor: list[Any]) -> None:
    """One graph, every router in it, each described as its authors wrote it; and nothing is rewritten."""
    mixture = MIXTURES[name]
    model = mixture.make(3)
    expected = logits_of(model)
    model.compile(backend="effcompile", fullgraph=True)
    assert torch.equal(logits_of(model), expected)
    assert len(no_inductor) == 1
    seen = ec.inspect(model)
    sites = [site for site in seen.sites if site.kind == "router"]
    assert [site.detail for site in sites] == [str(mixture.router)] * mixture.routers
    assert len({site.module for site in sites}) == mixture.routers
    assert str(mixture.router) in str(seen).replace("\n", " ")


def switch(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = F.softmax(x @ rows.T, -1).topk(1)
    return value, index


def temperature(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = F.linear(x, rows).topk(2)
    return torch.softmax(value / 1.0, -1).bfloat16(), index


def all_of_them(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, rows).softmax(-1).topk(8)


def all_of_them_normalised(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = F.linear(x, rows).softmax(-1).topk(8)
    return value / value.sum(-1, keepdim=True), index


def by_hand(x: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid((F.linear(x, rows) + bias).float())
    index = torch.topk(scores, 3, sorted=False)[1]
    return 0.5 * scores.gather(-1, index), index


def in_place(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = torch.topk(F.linear(x, rows).softmax(-1), 3)
    value.div_(value.sum(-1, keepdim=True) + 1e-20).mul_(3)
    return value, index


def in_two_dtypes(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, index = F.linear(x, rows).softmax(-1).topk(3)
    return value, value.bfloat16(), index


def scattered(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = F.linear(x, rows).topk(3)
    return torch.zeros(5, 7, 8).scatter(-1, index, value.softmax(-1)), index


def weighed_by_a_vector(x: Tensor, rows: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """Behind the router: as that of whoever reads the weights."""
    value, index = F.linear(x, rows).softmax(-1).topk(3)
    return value * each[index], index


@pytest.mark.parametrize(
    ("function", "more", "expected"),
    [
        (switch, (), Router(8, 1, "softmax", "all", False)),
        (temperature, (), Router(8, 2, "softmax", "chosen", True)),
        (all_of_them, (), Router(8, 8, "softmax", "all", False)),
        (all_of_them_normalised, (), Router(8, 8, "softmax", "all", True)),
        (by_hand, (8,), Router(8, 3, "sigmoid", "all", False, 0.5, "logits")),
        (in_place, (), Router(8, 3, "softmax", "all", True, 3.0)),
        (weighed_by_a_vector, (8,), Router(8, 3, "softmax", "all", False)),
        (in_two_dtypes, (), Router(8, 3, "softmax", "all", False)),
        (scattered, (), Router(8, 3, "softmax", "chosen", True)),
    ],
)
def test_spellings(function: Callable[..., Any], more: tuple[int, ...], expected: Router) -> None:
    (site,) = routers(function, *map(torch.randn, more))
    assert site.router == expected


def halved(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return (0.5 * F.linear(x, rows)).softmax(-1).topk(3)


def clamped(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, rows).clamp(-1, 1).softmax(-1).topk(3)


def worst(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(F.linear(x, rows).softmax(-1), 3, largest=False)


def across_tokens(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, rows).softmax(-1).topk(7, dim=1)


def over_tokens(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, rows).softmax(1).topk(3)


def squared(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value, index = F.linear(x, rows).softmax(-1).topk(3)
    return value * value, index


def of_other_slots(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(x, rows).softmax(-1)
    return scores.topk(3, sorted=False)[0], (scores * scores.new_ones(8).cumsum(0)).topk(3)[1]


def of_two_vectors(x: Tensor, rows: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    return (F.linear(x, rows) + one).softmax(-1).add(two).topk(3)


def numbers_alone(x: Tensor, rows: Tensor) -> tuple[Tensor]:
    return (F.linear(x, rows).topk(3)[1],)


def weights_alone(x: Tensor, rows: Tensor) -> tuple[Tensor]:
    return (F.linear(x, rows).softmax(-1).topk(3)[0],)


def both_weights(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    value, index = F.linear(x, rows).softmax(-1).topk(3)
    return value, value / value.sum(-1, keepdim=True), index


def not_dense(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The other experts get a little."""
    scores = F.linear(x, rows).sigmoid()
    index = scores.topk(3)[1]
    return torch.full_like(scores, 1e-3).scatter(-1, index, scores.gather(-1, index)), index


@pytest.mark.parametrize(
    ("function", "more"),
    [
        *((f, ()) for f in (worst, across_tokens, over_tokens, squared, of_other_slots, numbers_alone, weights_alone)),
        *((f, ()) for f in (both_weights, not_dense, halved, clamped)),
        (of_two_vectors, (8, 8)),
    ],
)
def test_what_is_no_router_that_is_known(function: Callable[..., Any], more: tuple[int, ...]) -> None:
    sites = routers(function, *map(torch.randn, more))
    assert sites
    for site in sites:
        assert isinstance(site.router, Reason)
        assert site.router.code == "unknown-router"


def sampled(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Drawing one of the three most likely tokens: spelled as a router is, and nothing of the kind."""
    scores, tokens = F.linear(x, head).topk(3)
    drawn = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1)
    return x * 2, tokens.flatten(0, 1).gather(-1, drawn)


def test_a_sampler_is_no_router() -> None:
    (site,) = found(sampled, torch.randn(X), torch.randn(ROWS))
    assert isinstance(site.router, Reason)
    assert site.router.code == "not-experts"


def test_equal_routers_are_tried_once(monkeypatch: pytest.MonkeyPatch, no_inductor: list[Any]) -> None:
    """Trying takes longer than finding, and a model has many layers; another spelling is tried by itself."""
    from effcompile.patterns import router

    monkeypatch.setattr(router, "_known", {})
    tried: list[RouterSite] = []
    once = router._Trial.result
    monkeypatch.setattr(router._Trial, "result", lambda self: tried.append(self.site) or once(self))
    for name in ("mixtral", "olmoe"):
        model = MIXTURES[name].make(3)
        model.compile(backend="effcompile")
        logits_of(model, IDS)
    assert len(tried) == 2

"""Mixtures in which a slot of weight 0 still tells: they keep every expert, and the report says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import EXPERTS, IDS, Gathered, Written, logits_of
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec


class Mixture(Gathered):
    """The experts of :class:`Gathered`, for weights and choices that come from elsewhere."""

    def run(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """``[tokens, slots, 32]``, of ``rows`` ``[tokens, slots, 32]``."""
        hidden = F.silu(torch.einsum("tai,taoi->tao", rows, self.up[chosen]))
        return torch.einsum("tao,taio->tai", hidden, self.down[chosen])

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts."""
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), chosen


class WeighedInputs(Mixture):
    """As Llama 4 weighs what experts read."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        weights, chosen = self.choose(rows)
        return self.run(rows[:, None] * weights[..., None], chosen).sum(1).view(x.shape)


class WithBias(Mixture):
    """The same, with a bias of each expert: of an expert that reads zeros, the bias stays."""

    def __init__(self, top_k: int) -> None:
        super().__init__(top_k)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 32))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        weights, chosen = self.choose(rows)
        out = self.run(rows[:, None] * weights[..., None], chosen) + self.bias[chosen]
        return out.sum(1).view(x.shape)


class BiasBefore(WithBias):
    """A bias that is weighed as the rest is."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        weights, chosen = self.choose(rows)
        out = (self.run(rows[:, None].expand(-1, self.top_k, -1), chosen) + self.bias[chosen]) * weights[..., None]
        return out.sum(1).view(x.shape)


class Ranked(Mixture):
    """Experts with room for five tokens each, the first ones that come."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        weights, chosen = self.choose(rows)
        experts, order = chosen.flatten().sort(stable=True)
        first = torch.searchsorted(experts.contiguous(), torch.arange(EXPERTS))
        rank = torch.arange(experts.numel()) - first[experts]
        weights = weights * (torch.empty_like(rank).scatter(0, order, rank) < 5).view(weights.shape)
        return (self.run(rows[:, None].expand(-1, self.top_k, -1), chosen) * weights[..., None]).sum(1).view(x.shape)


class Counted(Mixture):
    """The same room, as a running count."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 32)
        weights, chosen = self.choose(rows)
        taken = F.one_hot(chosen.flatten(), EXPERTS)
        place = (taken.cumsum(0) * taken).sum(-1)
        weights = weights * (place <= 5).view(weights.shape)
        return (self.run(rows[:, None].expand(-1, self.top_k, -1), chosen) * weights[..., None]).sum(1).view(x.shape)


def compiled(mixture: Any) -> tuple[nn.Module, nn.Module]:
    """A model of four experts a token that is asked for two, and one that takes two, on the same weights."""
    torch.manual_seed(3)
    model, two = Written(mixture, 4).eval(), Written(mixture, 2).eval()
    two.load_state_dict(model.state_dict())
    model.compile(backend="effcompile", options={"reroute": {"top_k": 2}})
    return model, two


@pytest.mark.parametrize("mixture", [WithBias, Ranked, Counted])
def test_what_a_slot_of_weight_0_still_changes(mixture: Any, no_inductor: list[Any]) -> None:
    model, _ = compiled(mixture)
    plain = Written(mixture, 4).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, IDS), logits_of(plain, IDS))
    assert {d.reason.code for d in ec.inspect(model).decisions if d.reason} == {"slots-not-weighed"}


@pytest.mark.parametrize("mixture", [Gathered, WeighedInputs, BiasBefore])
def test_what_it_does_not(mixture: Any, no_inductor: list[Any]) -> None:
    model, two = compiled(mixture)
    expected = logits_of(two, IDS)
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert [d.action for d in ec.inspect(model).decisions if d.kind == "router"] == ["rewritten"] * 2

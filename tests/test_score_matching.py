"""Score parts in graphs: each spelling is rewritten with its operands, what only looks like one is left, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effcompile import lowering
from effcompile.kernels import cost, ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate
from effcompile.passes import backend, report
from effcompile.passes.report import Decision

B, H, G, D, CAPACITY = 2, 4, 2, 16, 64
DENSE = KVForm(16, 16)
LOWEST = torch.finfo(torch.float32).min
Spelling = Callable[["Step", Tensor, Tensor, Tensor, Tensor], Tensor]


class Step(nn.Module):
    """One layer over a store: appends, loads, and attends as ``spelling(self, q, k, v, keep)`` does."""

    def __init__(self, spelling: Spelling, form: KVForm) -> None:
        super().__init__()
        self.spelling, self.form = spelling, form.name
        for kind, letter in (("key", "k"), ("value", "v")):
            for i, (shape, dtype) in enumerate(form.buffers(kind, B, G, CAPACITY, D, torch.float32)):  # type: ignore[arg-type]
                self.register_buffer(f"{letter}{i}", torch.zeros(shape, dtype=dtype))
        self.register_buffer("length", torch.tensor(0))
        self.sinks = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 3.0]))
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1, H + 1))
        self.temperature = nn.Parameter(torch.tensor([0.5, 1.5, -1.0, 2.0]).view(H, 1, 1))
        self.relative = nn.Parameter(torch.randn(1, H, 1, CAPACITY))

    def forward(self, q: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        """Attention of ``q`` ``[B, H, T, D]``; ``padding`` ``[B, CAPACITY]`` hides keys."""
        state = [getattr(self, f"{letter}{i}", None) for letter in "kv" for i in range(3)]
        count = key.shape[2]
        position = self.length + torch.arange(count)[:, None]
        keep = (torch.arange(CAPACITY) <= position) & padding[:, None, None, :]
        torch.ops.effcompile.kv_store(*state, self.length, key, value, self.form)
        k, v = torch.ops.effcompile.kv_load(*state, self.length + count, self.form)
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        out = self.spelling(self, q, k, v, keep)
        self.length.add_(count)
        return out


def decide(spelling: Spelling, monkeypatch: pytest.MonkeyPatch, form: KVForm = DENSE, sites: int = 1) -> list[Decision]:
    """The decisions about a spelling in three compiled calls, which are compared with eager ones."""
    report._graphs.clear()
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    monkeypatch.setattr(lowering, "prebuild", lambda programs, device: None)
    torch.manual_seed(0)
    model = Step(spelling, form)
    padding = torch.ones(B, CAPACITY, dtype=torch.bool)
    padding[0, :3] = False
    calls = [(torch.randn(B, H, n, D), torch.randn(B, G, n, D), torch.randn(B, G, n, D), padding) for n in (20, 3, 1)]
    with torch.no_grad(), ops.reference_only():
        expected = [model(*call) for call in calls]
        model.length.zero_()
        model.compile(backend="effcompile", dynamic=False)
        got = [model(*call) for call in calls]
    # The first three queries of a row see no key: nan or a mean in eager code, 0 in ours.
    got[0][0, :, :3] = expected[0][0, :, :3] = 0
    torch.testing.assert_close(got, expected)
    found = [d for graph in report.graphs_of(model) for d in graph.decisions]
    assert len(found) == len(calls) * sites
    return found


def additive(keep: Tensor, lowest: float = LOWEST) -> Tensor:
    return torch.where(keep, 0.0, lowest)


def weighed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def cap(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Gemma 2."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.7
    scores = torch.tanh(scores / 2.5) * 2.5
    return weighed(scores + additive(keep), v)


def cap_of_two_numbers(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = -3.0 * torch.tanh((q * 0.2) @ k.mT)
    return weighed(scores.masked_fill(~keep, float("-inf")), v)


def sink(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """gpt-oss."""
    scores = q @ k.mT * 0.25 + additive(keep)
    column = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return nn.functional.dropout(scores.softmax(-1)[..., :-1], 0.1, False) @ v


def sink_of_one_number(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A softmax whose denominator has one more."""
    scores = q @ k.mT * 0.25 + additive(keep)
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ v


def sink_unflattened(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.where(keep, q @ k.mT * 0.25, float("-inf"))
    column = (
        (self.sinks * 2).view(2, 2).unflatten(1, (2, 1))[None].flatten(1, 2)[..., None].expand(*scores.shape[:3], 1)
    )
    return torch.cat([scores, column], 3).softmax(-1)[:, :, :, :-1] @ v


def alibi(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Bloom: folded heads, the bias and both factors in one call."""
    batch, heads, count, size = q.shape
    bias = (self.slopes[:, None, None] * torch.arange(CAPACITY)).repeat(batch, 1, 1)
    q, k, v = q.reshape(-1, count, size), k.reshape(-1, CAPACITY, size).transpose(-1, -2), v.reshape(-1, CAPACITY, size)
    scores = torch.baddbmm(bias, q, k, beta=0.5, alpha=0.25).view(batch, heads, count, -1) + additive(keep)
    weights = scores.softmax(-1).view(batch * heads, count, -1)
    return torch.bmm(weights, v).view(batch, heads, count, size)


def folded_and_then_scaled(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    bias = (self.slopes.bfloat16()[:, None, None] * torch.arange(CAPACITY)).repeat(batch, 1, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias.float(), q, k.mT).view(batch, heads, count, -1) * 0.25 + additive(keep)
    return (scores.softmax(-1).view(batch * heads, count, -1) @ v).view(batch, heads, count, size)


def folded(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, count, CAPACITY) * 0.25 + additive(keep)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v).view(batch, heads, count, size)


def scaled_bias(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Falcon: the bias is scaled with the scores."""
    return weighed((q @ k.mT + self.relative) * 0.25 + additive(keep), v)


def scaled_in_place(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT + self.relative
    scores *= 0.25
    return weighed(scores + additive(keep), v)


def bias_and_mask_in_sdpa(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """T5: position bias and mask are added once."""
    return nn.functional.scaled_dot_product_attention(q, k, v, self.relative + additive(keep), scale=1.0)


def filled_bias_in_sdpa(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Falcon: a bias with the mask written into it."""
    mask = torch.masked_fill(self.relative / 4, additive(keep) < -1, LOWEST)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def two_biases(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """MPT: three dimensions, and a mask put over it; and a bias of each query."""
    by_query = torch.arange(q.shape[2])[:, None] * self.relative[0, 0] * 0.1
    scores = q @ k.mT * 0.25 + self.slopes[:, None, None] * torch.arange(1 - CAPACITY, 1) + by_query
    return weighed(scores.masked_fill(~keep, LOWEST), v)


def by_head(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return weighed((q @ k.mT) * self.temperature * 0.25 + additive(keep), v)


def by_query(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q.abs().sum(-1, keepdim=True) * (q @ k.mT) / (self.length + 10)
    return weighed(scores + additive(keep), v)


def everything(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT / self.temperature.exp() / 4) * 4 + self.relative + additive(keep, float("-inf"))
    column = self.sinks.view(1, H, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


TAKEN = [
    (cap, "cap"),
    (cap_of_two_numbers, "cap"),
    (sink, "sink"),
    (sink_of_one_number, "sink"),
    (sink_unflattened, "sink"),
    (alibi, "bias"),
    (folded_and_then_scaled, "bias"),
    (folded, ""),
    (scaled_bias, "bias"),
    (scaled_in_place, "bias"),
    (bias_and_mask_in_sdpa, "bias"),
    (filled_bias_in_sdpa, "bias"),
    (two_biases, "bias"),
    (by_head, ""),
    (by_query, ""),
    (everything, "cap_bias_sink"),
]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(("spelling", "parts"), TAKEN, ids=lambda x: getattr(x, "__name__", x))
def test_taken(spelling: Spelling, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in decide(spelling, monkeypatch):
        assert found.action == "rewritten", found.reason
        assert found.form.partition("causal_pad")[2].strip("_") == parts


@pytest.mark.parametrize(
    ("spelling", "own", "sinks"),
    [
        (cap, None, False),
        (alibi, (True, True, False), False),
        (two_biases, (False, True, True), False),
        (everything, (False, True, False), True),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_operands_count_in_the_cost(
    spelling: Spelling, own: tuple[bool, bool, bool] | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = decide(spelling, monkeypatch)[1]
    rule = Predicate(key_mask=True)
    expected = cost.attend(DENSE, rule, 4) + cost.score_operands(rule, own, sinks)
    assert found.after == expected


def test_taken_on_packed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in decide(everything, monkeypatch, KVForm(4, 4, 16, 0)):
        assert found.action == "rewritten"


def masked_before_scaling(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return weighed((q @ k.mT + additive(keep)) * 0.25, v)


def a_mask_from_outside(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return weighed(q @ k.mT * 0.25 + additive(keep).sin().asin(), v)


def a_bias_that_changes(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = self.relative * 2
    out = weighed(q @ k.mT * 0.25 + bias + additive(keep), v)
    bias.zero_()
    return out + bias.sum()


def a_factor_that_changes(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    factor = self.temperature * 2
    out = weighed(q @ k.mT * factor + additive(keep), v)
    factor.zero_()
    return out + factor.sum()


def scaled_twice_in_place(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT
    half = scores.mul_(0.25)
    scores.mul_(2)
    return weighed(half + additive(keep), v)


def sinks_that_change(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    sinks = self.sinks * 2
    scores = q @ k.mT * 0.25 + additive(keep)
    out = torch.cat([scores, sinks.view(1, H, 1, 1).expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1] @ v
    sinks.zero_()
    return out + sinks.sum()


def sinks_that_change_after_a_copy(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    sinks = self.sinks * 2
    column = sinks.clone().view(1, H, 1, 1)
    sinks.zero_()
    scores = q @ k.mT * 0.25 + additive(keep)
    return torch.cat([scores, column.expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1] @ v


def sinks_of_groups(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """One for two heads: a view of them is no vector of heads."""
    scores = q @ k.mT * 0.25 + additive(keep)
    column = self.sinks[:2].view(1, 2, 1, 1).repeat_interleave(2, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize(
    ("spelling", "code"),
    [
        (masked_before_scaling, "mask-scaled"),
        (a_mask_from_outside, "additive-bias"),
        (a_bias_that_changes, "mask-mutated"),
        (a_factor_that_changes, "attention-arithmetic"),
        (scaled_twice_in_place, "attention-arithmetic"),
        (sinks_that_change, "sinks"),
        (sinks_that_change_after_a_copy, "sinks"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_left(spelling: Spelling, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in decide(spelling, monkeypatch):
        assert found.reason is not None
        assert (found.action, found.reason.code) == ("left", code)
        assert "test_score_matching.py" in found.source


def test_sinks_of_groups_are_not_misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of it, the result is the eager one (which ``decide`` compares)."""
    decide(sinks_of_groups, monkeypatch)


def test_an_operand_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attentions that share a bias share its conversion to fp32."""

    def twice(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        bias = self.relative.bfloat16()
        first, second = (weighed(x @ k.mT * 0.25 + bias + additive(keep), v) for x in (q, q + 1))
        return first + second

    made = []
    whole = backend._clean

    def watch(gm: torch.fx.GraphModule, replaced: Any) -> None:
        whole(gm, replaced)
        calls = gm.graph.find_nodes(op="call_function", target=torch.ops.effcompile.attend.default)
        made.append([call.kwargs["bias"] for call in calls])

    monkeypatch.setattr(backend, "_clean", watch)
    decide(twice, monkeypatch, sites=2)
    assert len(made) == 3
    for first, second in made:
        assert first is second

"""``ec.Rewire``: routers adapted to a context, and nothing else of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixtures import IDS, MIXTURES, logits_of
from torch import Tensor, nn

import effcompile as ec

CONTEXT = IDS[:1]


def adapted(name: str, **options: Any) -> nn.Module:
    model = ec.reroute(adapt=True, **options)(MIXTURES[name].make(3))
    model.compile(backend="effcompile")
    return model


def loss_of(model: nn.Module, ids: Tensor = CONTEXT) -> float:
    return float(nn.functional.cross_entropy(logits_of(model, ids)[0, :-1], ids[0, 1:]))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek-v3", "mixtral")]


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", ["masked", *SLOW])
def test_the_loss_of_the_context_falls_and_nothing_else_changes(name: str, no_inductor: list[Any]) -> None:
    model = adapted(name)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain = logits_of(MIXTURES[name].make(3))
    assert torch.equal(logits_of(model), plain)
    with ec.Rewire(model, lr=1e-3) as rewire:
        assert torch.equal(logits_of(model), plain)
        losses = rewire(CONTEXT)
        assert len(losses) == 5
        assert losses[0] == pytest.approx(loss_of(MIXTURES[name].make(3)), abs=1e-5)
        now = loss_of(model)
        assert sorted([*losses, now], reverse=True) == [*losses, now]
        assert now < losses[0]
        assert len(rewire.vectors) == MIXTURES[name].routers
        assert all(vector.any() for vector in rewire.vectors.values())
        # A longer context goes on from there.
        longer = torch.cat([CONTEXT, IDS[1:2, :4]], 1)
        now = loss_of(model, longer)
        assert rewire({"input_ids": longer})[0] == pytest.approx(now, abs=1e-5)
    assert torch.equal(logits_of(model), plain)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def by_hand() -> tuple[nn.Module, list[Tensor], float]:
    """The model whose routers have a bias, the gradients of these biases, and the loss."""
    model = MIXTURES["gathered"].make(3)
    loss = nn.functional.cross_entropy(model(CONTEXT)[0, :-1], CONTEXT[0, 1:])
    biases = [mix.gate.bias for mix in model.mix]
    return model, list(torch.autograd.grad(loss, biases)), float(loss.detach())


def test_a_step_is_one_down_the_gradient_and_lies_in_the_logits(no_inductor: list[Any]) -> None:
    eager, grads, loss = by_hand()
    model = adapted("gathered")
    logits_of(model)
    rewire = ec.Rewire(model, steps=1, lr=0.5)
    assert rewire(CONTEXT) == [pytest.approx(loss, abs=1e-6)]
    vectors = rewire.vectors
    assert list(vectors) == ["mix.0.gate", "mix.1.gate"]
    for vector, grad in zip(vectors.values(), grads, strict=True):
        torch.testing.assert_close(vector, -0.5 * grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        for mix, vector in zip(eager.mix, vectors.values(), strict=True):
            mix.gate.bias += vector
    expected = logits_of(eager, IDS)
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (expected - logits_of(MIXTURES["gathered"].make(3), IDS)).abs().max() > 1e-4 * expected.abs().max()
    # Another model has vectors of its own, also where it shares the compiled code.
    other = adapted("gathered")
    assert torch.equal(logits_of(other, IDS), logits_of(MIXTURES["gathered"].make(3), IDS))
    assert torch.equal(logits_of(model, IDS), logits_of(model, IDS))
    rewire.reset()
    assert torch.equal(logits_of(model, IDS), logits_of(other, IDS))


def test_layers(no_inductor: list[Any]) -> None:
    """The layer of most or least confidence alone; and both, the gradient times confidence over its mean."""
    _, grads, _ = by_hand()
    model = adapted("gathered")
    logits_of(model)
    found = []
    for prefer in ("high", "low"):
        with ec.Rewire(model, steps=1, lr=1.0, layers="hard", share=0.5, prefer=prefer) as rewire:
            rewire(CONTEXT)
            found.append([bool(vector.any()) for vector in rewire.vectors.values()])
    assert found in ([[True, False], [False, True]], [[False, True], [True, False]])
    with ec.Rewire(model, steps=1, lr=1.0, layers="soft") as rewire:
        rewire(CONTEXT)
        factors = [float((-v / g).median()) for v, g in zip(rewire.vectors.values(), grads, strict=True)]
    assert sum(factors) == pytest.approx(2, rel=1e-4)
    assert (factors[0] > factors[1]) == found[0][0]


def test_no_steps_and_no_length(no_inductor: list[Any]) -> None:
    model = adapted("gathered", count=True)
    plain = logits_of(model)
    assert ec.Rewire(model, steps=0)(CONTEXT) == []
    assert len(ec.Rewire(model, lr=0.0)(CONTEXT)) == 5
    assert torch.equal(logits_of(model), plain)
    # What adapts does not count.
    assert {int(count.sum()) for count in ec.expert_counts(model).values()} == {2 * 3 * IDS.numel()}


def test_what_it_says(no_inductor: list[Any]) -> None:
    model = adapted("gathered")
    with pytest.raises(ec.RewireError, match=r"\(3, 21\); give one context"):
        ec.Rewire(model)(IDS)
    with pytest.raises(ec.RewireError, match=r"\(1, 1\); give one context"):
        ec.Rewire(model)(CONTEXT[:, :1])
    for wrong in ({"steps": -1}, {"lr": -0.1}, {"share": 0.0}, {"optimizer": "lion"}, {"layers": "none"}):
        with pytest.raises(ec.RewireError):
            ec.Rewire(model, **wrong)
    plain = MIXTURES["gathered"].make(3)
    with pytest.raises(ec.RewireError, match=r"decorate it with ec\.reroute\(adapt=True\)"):
        ec.Rewire(plain)(CONTEXT)
    plain.compile(backend="effcompile", options={"reroute": {"adapt": True}})
    logits_of(plain)
    assert len(ec.Rewire(plain)(CONTEXT)) == 5
    with pytest.raises(ec.RewireError, match="call the model once before"):
        ec.Rewire(adapted("gathered"))(CONTEXT)
    fewer = adapted("gathered", top_k=1)
    logits_of(fewer)
    with pytest.raises(ec.RewireError, match="adapt without top_k and threshold"):
        ec.Rewire(fewer)(CONTEXT)


def test_routers_of_some_layers(no_inductor: list[Any]) -> None:
    """Those that compiled code does not adapt stay as they are in the loss, too."""
    model = MIXTURES["gathered"].make(3)
    ec.reroute(adapt=True)(model.mix[0])
    model.compile(backend="effcompile")
    logits_of(model)
    rewire = ec.Rewire(model, steps=2, lr=0.5)
    first, second = rewire(CONTEXT)
    assert list(rewire.vectors) == ["mix.0.gate"]
    assert first == pytest.approx(loss_of(MIXTURES["gathered"].make(3)), abs=1e-5)
    again = ec.Rewire(model, steps=1, lr=0.0)
    assert again(CONTEXT)[0] == pytest.approx(loss_of(model), abs=1e-5)
    assert second < first


def test_weights_that_are_replaced(no_inductor: list[Any]) -> None:
    model = adapted("gathered")
    logits_of(model)
    rewire = ec.Rewire(model, steps=1, lr=0.5)
    rewire(CONTEXT)
    model.load_state_dict({name: 0.5 * t for name, t in model.state_dict().items()}, assign=True)
    now = loss_of(model)
    assert rewire(CONTEXT)[0] == pytest.approx(now, abs=1e-5)
    assert all(vector.any() for vector in rewire.vectors.values())

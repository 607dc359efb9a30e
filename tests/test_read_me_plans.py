"""Calibrating ``ec.read_me``: masks and routers, what is refused, and what stays dense and why."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from test_read_me import (
    IDS,
    SMALL,
    close,
    domains,
    model_of,
    plan_of,
    planned,
    read,
    reasons,
    router_in,
    with_record,
)
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels.token_router import ROUTE_TOKENS, TENSORS
from effcompile.passes.options import OptionError
from effcompile.passes.read_me import ROUTER
from effcompile.runtime.plan import Plan, PlanError, Record


@pytest.mark.slow
def test_masks_are_the_largest_on_average() -> None:
    """As hooks on the eager model see them; each domain's lose less on its own new text than another's."""
    model = model_of()
    plan = ec.calibrate(model, domains(4, 4), [ec.read_me(0.5, **SMALL)], progress=False)
    middles: dict[str, list[Tensor]] = {}
    for name, module in (watched := copy.deepcopy(model)).named_modules():
        if name.endswith("down_proj"):
            key = name.removesuffix(".down_proj")
            module.register_forward_pre_hook(lambda m, given, key=key: middles.setdefault(key, []).append(given[0]))

    def seen(text: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for own in text.values():
            middles.clear()
            for ids in own:
                read(watched, ids)
            for name, parts in middles.items():
                found.setdefault(name, []).append(torch.cat(parts).flatten(0, 1).double())
        return found

    assert plan.made["domains"] == ["low", "high"]
    new = seen(domains(4, 4, first=1))
    for name, sizes in seen(domains(4, 4)).items():
        record = plan.get(name, "read_me")
        assert record is not None
        masks = record.tensors["masks"]
        for mask, rows in zip(masks, sizes, strict=True):
            mean = rows.abs().mean(0)
            assert int(mask.sum()) == 48
            assert mean[mask].min() >= mean[~mask].max()
        assert record.numbers["shared"] == float((masks[0] & masks[1]).float().mean()) < 0.5
        down = model.get_submodule(name).down_proj.weight.detach().double()
        lost = [[float(((x * ~mask) @ down.t()).norm() / (x @ down.t()).norm()) for mask in masks] for x in new[name]]
        assert lost[0][0] < 0.95 * lost[0][1]
        assert lost[1][1] < 0.95 * lost[1][0]
        assert record.numbers["error"] < record.numbers["error of other experts"]


@pytest.mark.slow
def test_the_router_learns_which_vocabulary_a_text_is_of() -> None:
    """On text that was held out it comes nearer to the experts that tokens would take than any constant."""
    model = model_of()
    options: dict[str, Any] = {**SMALL, "window": 24, "batch": 8, "lr": 5e-3}
    text = domains(8, 12)
    plan = ec.calibrate(model, text, [ec.read_me(**{**options, "steps": 60})], progress=False)
    said = router_in(plan).numbers
    assert said["kl"] < 0.9 * min(said["kl constant"], said["kl before"])
    assert said["agreement"] > said["agreement constant"] + 0.1
    again = ec.calibrate(model, text, [ec.read_me(**{**options, "steps": 60})], progress=False)
    assert again.text == plan.text
    taken = {}
    for name, own in domains(1, 1, first=2).items():
        weights = [router_in(plan).tensors[n] for n in TENSORS]
        fresh = [torch.zeros(8, 24, 24), torch.zeros(8, 24, 24), torch.zeros(8, 24) > 0, torch.zeros(3).long()]
        taken[name] = ROUTE_TOKENS(own[0], None, weights, *fresh, torch.tensor(0), 2).float().mean()
    assert taken["low"] + 0.5 < taken["high"]


@pytest.mark.slow
def test_training_goes_on() -> None:
    """A router of no step becomes what calibrating makes of it in as many; what stays, stays."""
    model, text = model_of(), domains(4, 12)
    options: dict[str, Any] = {**SMALL, "window": 24, "batch": 8, "lr": 5e-3}
    first = ec.calibrate(model, text, [ec.read_me(**{**options, "steps": 0})], progress=False)
    before = router_in(first)
    every = [ids for own in text.values() for ids in own]
    plan = ec.train_router(model, first, every, steps=20, lr=5e-3, progress=False)
    said = router_in(plan)
    at_once = router_in(ec.calibrate(model, text, [ec.read_me(**{**options, "steps": 20})], progress=False))
    for name in TENSORS:
        assert torch.equal(said.tensors[name], at_once.tensors[name]), name
    assert said.numbers["kl"] == at_once.numbers["kl"] < before.numbers["kl"]
    assert [r.text for r in plan if r is not said] == [r.text for r in first if r is not before]
    assert plan.diff(first)


@pytest.mark.slow
def test_training_meets_new_ids() -> None:
    """Ids that were not there before get rows of their own, and the others keep theirs."""
    model, text = model_of(), domains(4, 12)
    options: dict[str, Any] = {**SMALL, "window": 24, "batch": 8, "lr": 5e-3}
    few = {name: [ids.where(ids % 4 != 0, ids + 1) for ids in own] for name, own in text.items()}
    first = ec.calibrate(model, few, [ec.read_me(**{**options, "steps": 0})], progress=False)
    before = router_in(first)
    assert before.numbers["kl"] == pytest.approx(before.numbers["kl before"], rel=0.05)
    plan = ec.train_router(
        model, first, [ids for own in text.values() for ids in own], steps=20, lr=5e-3, progress=False
    )
    said = router_in(plan)
    rows, old = said.tensors["rows"], before.tensors["rows"]
    known = old < old.max()
    assert torch.equal(rows[known], old[known])
    assert int(known.sum()) < 100 < len(rows.unique())
    assert len(said.tensors["embedding"]) == int(rows.max()) + 1
    fresh = [torch.zeros(8, 24, 24), torch.zeros(8, 24, 24), torch.zeros(8, 24) > 0, torch.zeros(3).long()]
    weights = [said.tensors[n] for n in TENSORS]
    assert ROUTE_TOKENS(IDS, None, weights, *fresh, torch.tensor(0), 2).shape == (66, 1)
    with pytest.raises(PlanError, match="the plan has no router"):
        ec.train_router(model, with_record(plan, without=ROUTER), [IDS])
    with pytest.raises(ec.CalibrationError, match="batches is empty"):
        ec.train_router(model, plan, [])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 3] += 1
    with pytest.raises(PlanError, match="the embedding is not that"):
        ec.train_router(other, plan, [IDS], progress=False)


@pytest.mark.slow
def test_padding_does_not_count() -> None:
    """Padded batches give the plan that their rows give alone."""
    text = domains(3, 1)
    masks, padded = {}, {}
    for name, (ids,) in text.items():
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        masks[name] = mask
        position = (mask.cumsum(1) - 1).clamp(min=0)
        padded[name] = [
            {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask, "position_ids": position},
            {"input_ids": ids[:1], "attention_mask": torch.zeros_like(mask[:1])},
        ]
    alone = {name: [ids[:1, 9:], ids[1:]] for name, (ids,) in text.items()}
    method = ec.read_me(0.5, **SMALL)
    one, two = (ec.calibrate(model_of(), given, [method], progress=False) for given in (alone, padded))
    for ours, theirs in zip(one, two, strict=True):
        for name, t in ours.tensors.items():
            torch.testing.assert_close(t, theirs.tensors[name], rtol=1e-4, atol=1e-5)
    assert one.made["tokens"] == two.made["tokens"] == 126


@pytest.mark.slow
def test_other_methods_take_all_domains(no_inductor: list[Any]) -> None:
    text = domains()
    every = [batch for own in text.values() for batch in own]
    together = ec.calibrate(model_of(), text, [ec.flap(0.5), ec.read_me(**SMALL)], progress=False)
    assert [r.method for r in together] == ["flap"] * 2 + ["read_me"] * 3
    alone = ec.calibrate(model_of(), every, [ec.flap(0.5)], progress=False)
    assert [r.text for r in together if r.method == "flap"] == [r.text for r in alone]
    assert ec.calibrate(model_of(), {"all": every}, [ec.flap(0.5)], progress=False).text == alone.text


def refused(model: Any, given: Any, said: str) -> None:
    with pytest.raises(ec.CalibrationError, match=said):
        ec.calibrate(model, given, [ec.read_me(**SMALL)], progress=False)


def test_domains_and_options_are_checked() -> None:
    model, text = model_of(), domains()
    embedded = {name: [{"inputs_embeds": torch.randn(2, 9, 128)}] for name in text}
    for given, said in (
        (text["low"], "read_me makes an expert for each of two or more domains; give a mapping"),
        ({"low": text["low"]}, "two or more domains"),
        ({"low": text["low"], "high": text["high"][0]}, "the domain 'high' is Tensor, not a list"),
        ({"low": text["low"], "high": []}, "the domain 'high' has no batches"),
        (embedded, "read_me needs token ids"),
    ):
        refused(model, given, said)
    with pytest.raises(ec.CalibrationError, match="the mapping of domains is empty"):
        ec.calibrate(model, {}, [ec.flap()], progress=False)
    for wrong, said in (
        ({"remain": 0.0}, "remain=0.0; expected a share"), ({"dim": 20, "heads": 3}, "dim=20; expected heads=3"),
        ({"steps": -1}, "steps=-1"), ({"lr": 0.0}, "lr=0.0"), ({"window": 0}, "window=0; expected 1 or more"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            ec.read_me(**wrong)


@pytest.mark.slow
def test_text_that_cannot_be_used() -> None:
    model, text = model_of(), domains()
    hidden = {"low": text["low"], "high": [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}]}
    refused(model, hidden, r"model\.layers\.0\.mlp: no row of the domains \[1\]")
    nan = copy.deepcopy(model)
    nan.model.layers[1].mlp.up_proj.weight.data[0] = torch.nan
    refused(nan, text, r"activations of model\.layers\.1\.mlp hold NaN")


@pytest.mark.exhaustive
def test_plans_that_do_not_fit(no_inductor: list[Any]) -> None:
    model, plan = model_of(), plan_of()
    router, first = router_in(plan), next(iter(plan))
    third = torch.cat([first.tensors["masks"], first.tensors["masks"][:1]])
    uneven = first.tensors["masks"].clone()
    uneven[0, int(uneven[0].nonzero()[0])] = False

    def changed(record: Record, **tensors: Tensor) -> Plan:
        return with_record(plan, dataclasses.replace(record, tensors={**record.tensors, **tensors}))

    for given, said in (
        (changed(first, masks=third), "masks of 3 domains, and the router at .* knows 2"),
        (changed(first, masks=uneven), "masks should be bool, of two or more domains, with 48 neurons each"),
        (changed(router, head=torch.zeros(2, 5)), "head of the router is"),
        (changed(router, qkv=router.tensors["qkv"] * torch.nan), "qkv holds NaN"),
    ):
        with pytest.raises(Exception, match=said) as told:
            read(planned(model, given), IDS)
        assert "PlanError" in str(told.value)
    for name in ("model.embed_tokens", "model.layers.0.mlp.up_proj"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(name).weight[5, 3] += 1
        with pytest.raises(Exception, match=r"is not that which|are not those that the plan"):
            read(planned(other, plan), IDS)
    later = planned(model, plan)
    read(later, IDS)
    with torch.no_grad():
        later.model.embed_tokens.weight[5, 3] += 1
    with pytest.raises(Exception, match=r"model\.embed_tokens: its weights are not those"):
        read(later, IDS)


class Twice(nn.Module):
    """Looks other ids up in the same embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model_of())

    def forward(self, input_ids: Tensor) -> Tensor:
        more: Tensor = self.inner.model.embed_tokens(input_ids.flip(1))
        out: Tensor = self.inner(input_ids, use_cache=False).logits
        return out + more.mean()


@pytest.mark.slow
def test_a_plan_without_its_router(no_inductor: list[Any]) -> None:
    model = model_of()
    fast = planned(model, with_record(plan_of(), without=ROUTER))
    close(read(fast, IDS), read(model, IDS))
    assert reasons(fast) == {"no-router"}


@pytest.mark.slow
def test_embeddings_instead_of_ids(no_inductor: list[Any]) -> None:
    model = model_of()
    fast = planned(model, plan_of())
    with torch.no_grad():
        got = fast(inputs_embeds=model.model.embed_tokens(IDS), use_cache=False).logits
    close(got, read(model, IDS))
    assert reasons(fast) == {"no-token-ids"}


@pytest.mark.slow
def test_one_block_alone(no_inductor: list[Any]) -> None:
    fast = planned(model_of(), with_record(plan_of(), without="layers.0"))
    read(fast, IDS)
    done = [d.module for d in ec.inspect(fast).decisions if d.kind == "ffn" and d.action == "rewritten"]
    assert done == ["model.layers.1.mlp"]


@pytest.mark.slow
def test_gradients_and_large_batches(no_inductor: list[Any]) -> None:
    fast = planned(model_of(), plan_of())
    fast(IDS, use_cache=False)
    assert reasons(fast) == {"gradients"}
    read(fast, IDS[:1].expand(9, -1))
    assert reasons(fast) == {"gradients", "batch-too-large"}


@pytest.mark.slow
def test_decorated_without_a_plan(no_inductor: list[Any]) -> None:
    decorated = ec.read_me()(copy.deepcopy(model_of()))
    decorated.compile(backend="effcompile")
    read(decorated, IDS)
    assert reasons(decorated) == {"no-plan"}


@pytest.mark.slow
def test_ids_that_are_looked_up_in_two_places(no_inductor: list[Any]) -> None:
    model = Twice().eval()
    fast = planned(model, ec.calibrate(model, domains(), [ec.read_me(**SMALL)], progress=False))
    with torch.no_grad():
        fast(IDS)
    assert reasons(fast) == {"no-token-ids"}

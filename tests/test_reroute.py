"""``ec.reroute``: fewer experts for a token, beside models that take as few themselves; and counts of their use."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from mixtures import IDS, MIXTURES, logits_of
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels.router_ops import COUNT_EXPERTS, REROUTE
from effcompile.passes.options import OptionError

TOKENS, SLOTS, EXPERTS = 63, 5, 11


def brute(
    values: Tensor, weights: Tensor, top_k: int, threshold: float, normalised: bool
) -> tuple[list[list[float]], list[list[bool]]]:
    """Token by token in Python, in fp64: the weights, and which slots are used."""
    found, kept = [], []
    for value, weight in zip(values.tolist(), weights.double().tolist()):
        first = sorted(range(len(value)), key=lambda n: -value[n])[:top_k]
        total, reached, used = sum(weight[n] for n in first), 0.0, []
        for slot in sorted(first, key=lambda n: -weight[n]):
            if used and threshold < 1 and reached >= threshold * total:
                break
            used.append(slot)
            reached += weight[slot]
        factor = sum(weight) / sum(weight[n] for n in used) if normalised and len(used) < len(weight) else 1
        found.append([weight[n] * factor if n in used else 0.0 for n in range(len(weight))])
        kept.append([n in used for n in range(len(weight))])
    return found, kept


def answer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a router with a bias for choosing gives, in no order: values, indices, weights."""
    scores = torch.randn(TOKENS, EXPERTS).sigmoid()
    values, indices = (scores + torch.randn(EXPERTS)).topk(SLOTS)
    order = torch.rand(TOKENS, SLOTS).argsort(-1)
    indices = indices.gather(-1, order)
    return values.gather(-1, order), indices, (2.5 * scores.gather(-1, indices)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("top_k", "threshold"), [(SLOTS, 1.0), (3, 1.0), (1, 1.0), (SLOTS, 0.6), (4, 0.37), (2, 0.01)])
def test_the_operator(top_k: int, threshold: float, normalised: bool, dtype: torch.dtype) -> None:
    values, indices, weights = answer(dtype)
    got, left, used = REROUTE(values, indices, weights, top_k, threshold, normalised, False)
    expected, kept = brute(values, weights, top_k, threshold, normalised)
    assert used.tolist() == kept
    assert left.dtype is dtype
    # One rounding to the dtype, and a few in fp32.
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(left.double(), torch.tensor(expected, dtype=torch.float64), rtol=bound, atol=0)
    assert torch.equal(got, indices)
    again, same, _ = REROUTE(values, indices, weights, top_k, threshold, normalised, True)
    assert torch.equal(same, left)
    assert torch.equal(again[used], indices[used])
    best = indices.gather(-1, left.argmax(-1, keepdim=True)).expand_as(indices)
    assert torch.equal(again[~used], best[~used])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
def test_nothing_left_out_is_bit_by_bit(normalised: bool, dtype: torch.dtype) -> None:
    """Also of weights that are all 0, or no numbers; and in order, values need not be given."""
    _, indices, weights = answer(dtype)
    weights[0], weights[1, 2] = 0, torch.nan
    for threshold in (1.0, 1 - 1e-9):  # the second looks at the weights, and reaches them with the last one only
        got, left, used = REROUTE(None, indices, weights, SLOTS, threshold, normalised, True)
        rows = slice(0, None) if threshold == 1 else slice(1, None)  # of weights 0, one expert is enough
        torch.testing.assert_close(left[rows], weights[rows], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[rows], indices[rows])
        assert used[rows].all()
    one, left, used = REROUTE(None, indices, weights, SLOTS, 0.5, normalised, True)
    assert used[0].tolist() == [True] + [False] * (SLOTS - 1)
    assert torch.equal(left[0], weights[0])
    assert (one[0] == indices[0, 0]).all()


def test_in_order_of_the_choice() -> None:
    values, indices, weights = answer(torch.float32)
    order = values.argsort(-1, descending=True)
    sorted_ = [t.gather(-1, order) for t in (values, indices, weights)]
    for given in (sorted_[0], None):
        _, left, _ = REROUTE(given, *sorted_[1:], 2, 0.9, True, False)
        _, plain, _ = REROUTE(values, indices, weights, 2, 0.9, True, False)
        torch.testing.assert_close(left, plain.gather(-1, order))


def test_opcheck() -> None:
    values, indices, weights = answer(torch.float32)
    torch.library.opcheck(REROUTE, (values, indices, weights, 2, 0.8, True, True))
    torch.library.opcheck(COUNT_EXPERTS, (torch.zeros(EXPERTS, dtype=torch.int64), indices, values > 0.5))
    assert COUNT_EXPERTS._schema.is_mutable
    with pytest.raises(ValueError, match="different slots"):
        REROUTE(values, indices[:, :2], weights, 2, 1.0, True, True)
    with pytest.raises(ValueError, match="top_k=6 of 5 slots"):
        REROUTE(values, indices, weights, 6, 1.0, True, True)


@pytest.mark.parametrize("normalised", [False, True])
def test_gradients(normalised: bool) -> None:
    """Those of the weights that are left, also where the operator is traced."""
    values, indices, weights = answer(torch.float64)
    weights = weights[:7].requires_grad_()

    def left(w: Tensor) -> Tensor:
        out: Tensor = REROUTE(values[:7], indices[:7], w, 4, 0.6, normalised, True)[1]
        return out

    assert torch.autograd.gradcheck(left, (weights,))
    (expected,) = torch.autograd.grad(left(weights).square().sum(), weights)
    traced = torch.compile(left, backend="aot_eager")
    (got,) = torch.autograd.grad(traced(weights).square().sum(), weights)
    torch.testing.assert_close(got, expected)


def test_counting_operator() -> None:
    counts = torch.arange(EXPERTS)
    indices, used = torch.randint(EXPERTS, (7, 9, 4)), torch.rand(7, 9, 4) > 0.4
    COUNT_EXPERTS(counts, indices, used)
    COUNT_EXPERTS(counts, indices, None)
    expected = torch.arange(EXPERTS) + sum(
        torch.bincount(i.flatten(), minlength=EXPERTS) for i in (indices[used], indices)
    )
    assert torch.equal(counts, expected)


def rerouted(model: nn.Module, **options: Any) -> nn.Module:
    """A compiled copy on the same weights."""
    made = ec.reroute(**options)(copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}))
    made.compile(backend="effcompile")
    return made


FAST = {("deepseek-v3", 2), ("llama4", 1), ("mixtral", 1), ("gathered", 1), ("masked", 2)}
"""Each kind of router, and each way to read one; the others are slow."""
FEWER = [
    pytest.param(name, top_k, marks=[pytest.mark.slow] * ((name, top_k) not in FAST))
    for name in MIXTURES
    for top_k in (1, 2)
]


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(("name", "top_k"), FEWER)
def test_fewer_experts_are_those_of_a_model_that_takes_fewer(name: str, top_k: int, no_inductor: list[Any]) -> None:
    mixture = MIXTURES[name]
    more, fewer = mixture.make(3), mixture.make(top_k)
    fewer.load_state_dict(more.state_dict())
    fast = rerouted(more, top_k=top_k)
    expected, got = logits_of(fewer), logits_of(fast)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (logits_of(more) - expected).abs().max() > 1e-3 * expected.abs().max()
    rows = [d for d in ec.inspect(fast).decisions if d.kind == "router"]
    assert [(d.action, d.form, d.detail) for d in rows] == [
        ("rewritten", f"reroute top {top_k} of 3", str(mixture.router))
    ] * mixture.routers
    made = [n for gm in no_inductor for n in gm.graph.find_nodes(op="call_function", target=REROUTE)]
    assert [n.args[6] for n in made] == [mixture.repeats] * mixture.routers


@pytest.mark.slow
def test_experts_in_a_loop_are_out_of_sight(no_inductor: list[Any]) -> None:
    """transformers' eager experts break the graph behind the router: what its answer is for cannot be seen."""
    model = MIXTURES["qwen3-moe"].make(3)
    model.set_experts_implementation("eager")
    fast = rerouted(model, top_k=1)
    assert torch.equal(logits_of(fast), logits_of(model))
    codes = [d.reason.code for d in ec.inspect(fast).decisions if d.kind == "router" and d.reason is not None]
    assert codes
    assert set(codes) == {"not-experts"}


@pytest.mark.slow
def test_batched_experts(no_inductor: list[Any]) -> None:
    """The slots that are left out are harmless there too."""
    more, fewer = MIXTURES["qwen3-moe"].make(3), MIXTURES["qwen3-moe"].make(1)
    fewer.load_state_dict(more.state_dict())
    more.set_experts_implementation("batched_mm")
    got, expected = logits_of(rerouted(more, top_k=1)), logits_of(fewer)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class Chosen:
    """The answers of a model's routers, changed by a threshold in Python."""

    def __init__(self, model: nn.Module, threshold: float, normalised: bool) -> None:
        self.used: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(self.hook(name, threshold, normalised))

    def hook(self, name: str, threshold: float, normalised: bool) -> Any:
        def changed(module: nn.Module, given: Any, out: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, weights, indices = out
            found, kept = brute(weights, weights, weights.shape[-1], threshold, normalised)
            count = torch.bincount(indices[torch.tensor(kept)], minlength=logits.shape[-1])
            self.used[name] = self.used.get(name, 0) + count
            return logits, torch.tensor(found).to(weights), indices

        return changed


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "qwen2-moe")), "deepseek-v3"]
)
def test_threshold_and_counts(name: str, no_inductor: list[Any]) -> None:
    """A threshold is that of a router changed by hand; what is counted is what is used, in prompts and in steps."""
    model = MIXTURES[name].make(3)
    fast = rerouted(model, threshold=0.7, count=True)
    plain = copy.deepcopy(model)
    watch = Chosen(plain, 0.7, MIXTURES[name].router.normalised)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(fast.generate(IDS, **greedy), plain.generate(IDS, **greedy))
    counts = ec.expert_counts(fast)
    assert {k: v.tolist() for k, v in counts.items()} == {k: v.tolist() for k, v in watch.used.items()}
    # Between one expert of each token and all three.
    tokens = IDS.shape[0] * (IDS.shape[1] + 4)
    assert all(tokens < int(v.sum()) < 3 * tokens for v in counts.values())
    assert list(fast.state_dict()) == list(model.state_dict())
    watch.used.clear()
    for count in counts.values():
        count.zero_()
    got, expected = logits_of(fast), logits_of(plain)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert {k: v.tolist() for k, v in ec.expert_counts(fast).items()} == {k: v.tolist() for k, v in watch.used.items()}


def test_counting_alone_changes_no_bit_and_inspect_counts_nothing(no_inductor: list[Any]) -> None:
    model = MIXTURES["olmoe"].make(3)
    fast = rerouted(model, count=True)
    assert ec.expert_counts(fast) == {}
    assert torch.equal(logits_of(fast), logits_of(model))
    before = {name: count.clone() for name, count in ec.expert_counts(fast).items()}
    assert [int(count.sum()) for count in before.values()] == [3 * IDS.numel()] * 2
    ec.inspect(fast, IDS)
    ec.inspect(fast, IDS[:, :5], use_cache=False)
    assert all(torch.equal(count, before[name]) for name, count in ec.expert_counts(fast).items())


def test_copies_and_layers_that_share_code_count_for_themselves(no_inductor: list[Any]) -> None:
    model = MIXTURES["mixtral"].make(3)
    fast = ec.reroute(count=True)(model)
    fast.compile(backend="effcompile")
    other = copy.deepcopy(fast)
    other.compile(backend="effcompile")
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.gate.weight.neg_()
    for _ in range(2):
        logits_of(fast)
    logits_of(other)
    ours, theirs = ec.expert_counts(fast), ec.expert_counts(other)
    assert {int(c.sum()) for c in ours.values()} == {6 * IDS.numel()}
    assert {int(c.sum()) for c in theirs.values()} == {3 * IDS.numel()}
    first, second = (c["model.layers.0.mlp.gate"] for c in (ours, theirs))
    assert not torch.equal(first, 2 * second)
    # Each layer by itself: one graph serves all of them.
    layers = MIXTURES["mixtral"].make(3)
    for layer in layers.model.layers:
        ec.reroute(count=True)(layer.mlp)
        layer.mlp.compile(backend="effcompile")
    graphs = len(no_inductor)
    logits_of(layers)
    assert len(no_inductor) == graphs + 1
    whole = ec.reroute(count=True)(copy.deepcopy(MIXTURES["mixtral"].make(3)))
    whole.compile(backend="effcompile")
    logits_of(whole)
    expected = ec.expert_counts(whole)
    assert len(expected) == 2
    assert all(torch.equal(count, expected[name]) for name, count in ec.expert_counts(layers).items())
    assert len(ec.expert_counts(layers)) == 2


@pytest.mark.exhaustive
def test_through_inductor() -> None:
    """Prompts of two lengths: the counts are written by generated code."""
    model = MIXTURES["mixtral"].make(3)
    fewer = MIXTURES["mixtral"].make(2)
    fewer.load_state_dict(model.state_dict())
    fast = ec.reroute(top_k=2, count=True)(model)
    fast.compile(backend="effcompile", dynamic=True)
    total = 0
    for length in (21, 9):
        got, expected = logits_of(fast, IDS[:, :length]), logits_of(fewer, IDS[:, :length])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        total += 2 * 3 * length
        assert [int(count.sum()) for count in ec.expert_counts(fast).values()] == [total] * 2


@pytest.mark.exhaustive
def test_layers_with_one_router_count_together() -> None:
    """AOTAutograd, which traces the graph for Inductor, takes no tensor under two names."""
    model = MIXTURES["mixtral"].make(3)
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    expected = logits_of(model)
    fast = ec.reroute(count=True, adapt=True)(model)
    fast.compile(backend="effcompile")
    torch.testing.assert_close(logits_of(fast), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    (count,) = ec.expert_counts(fast).values()
    assert int(count.sum()) == 2 * 3 * IDS.numel()


def test_what_it_says(no_inductor: list[Any]) -> None:
    model = MIXTURES["mixtral"].make(3)
    wrong = rerouted(model, top_k=4)
    with pytest.raises(Exception, match=re.escape("model.layers.0.mlp.gate gives 3 of 8 experts")) as raised:
        logits_of(wrong)
    assert isinstance(raised.value.__cause__ or raised.value, OptionError) or "OptionError" in str(raised.value)
    same = rerouted(model, top_k=3)
    assert torch.equal(logits_of(same), logits_of(model))
    (reason,) = {d.reason.code for d in ec.inspect(same).decisions if d.kind == "router" and d.reason is not None}
    assert reason == "nothing-to-do"
    with pytest.raises(OptionError, match="top_k=0"):
        ec.reroute(top_k=0)
    with pytest.raises(OptionError, match="threshold=0"):
        ec.reroute(threshold=0.0)
    one = copy.deepcopy(model)
    one.compile(backend="effcompile", options={"rules": {"model.layers.1": {"reroute": {"top_k": 1}}}})
    logits_of(one)
    told = {d.module: d.action for d in ec.inspect(one).decisions if d.kind == "router"}
    assert told == {"model.layers.1.mlp.gate": "rewritten"}


class Put(nn.Module):
    """Writes the weights into a row for all experts: of two slots with one expert, the last would stay."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x).softmax(-1).topk(4)
        rows = torch.arange(x.shape[0])[:, None].expand_as(indices)
        return torch.zeros(x.shape[0], 8).index_put((rows, indices), weights).unsqueeze(-1) * x.unsqueeze(1).sign()


def test_slots_that_are_left_out_are_harmless_where_experts_must_differ(no_inductor: list[Any]) -> None:
    model, x = Put(), torch.randn(9, 16)
    with torch.no_grad():
        got, full = rerouted(model, top_k=2)(x), model(x)
    second = full.abs().topk(2, dim=1).values[:, 1:]
    assert torch.equal(got, full.where(full.abs() >= second, 0))


class Early(nn.Module):
    """Looks at the choice before the weights are there."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = self.gate(x).softmax(-1).topk(2)
        seen = nn.functional.one_hot(indices, 8).sum()
        weights = values / values.sum(-1, keepdim=True)
        return weights.unsqueeze(-1) * x.unsqueeze(-2) * seen, indices


def test_a_choice_that_is_read_early_stays(no_inductor: list[Any]) -> None:
    model, x = Early(), torch.randn(9, 16)
    fast = rerouted(model, top_k=1)
    with torch.no_grad():
        assert torch.equal(fast(x)[1], model(x)[1])
    (one,) = [d for d in ec.inspect(fast).decisions if d.kind == "router"]
    assert one.reason is not None
    assert one.reason.code == "read-early"

"""Inputs left out of what another method leaves of a block: ``wina`` and ``teal`` on ``flap`` and on ``carve_moe``."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_plans import block_of, planned, replace
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.kernels import ffn_ops
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.carve_moe import CarveMoE
from effcompile.runtime.plan import digest
from models import MODELS


class Mlp(nn.Module):
    """A block, gated or with biases."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 96, bias=False) if gated else None
        self.up, self.down = (nn.Linear(*sizes, bias=not gated) for sizes in ((32, 96), (96, 32)))

    def forward(self, x: Tensor) -> Tensor:
        middle = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(middle)
        return out

    @property
    def block(self) -> FeedForward:
        gate = None if self.gate is None else self.gate.weight
        biases = self.up.bias, None, self.down.bias
        return FeedForward(self.up.weight, self.down.weight.t(), gate, "gelu" if gate is None else "silu", *biases)


class Small(nn.Module):
    """Blocks and nothing else, which takes little time to compile."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.layers = nn.ModuleList(Mlp(gated) for _ in range(2))
        for p in self.layers.parameters():
            p.data.mul_(4 if p.ndim == 2 else 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (32,)))
        out: Tensor = self.head(x)
        return out


def model_of(architecture: str = "gated") -> Any:
    own = architecture in ("gated", "plain")
    return Small(architecture == "gated").eval() if own else MODELS[architecture]("sdpa")


def weights(module: Any, architecture: str = "gated") -> FeedForward:
    return module.block if isinstance(module, Mlp) else block_of(module, architecture)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids) if isinstance(model, Small) else model(ids, use_cache=False).logits
    assert isinstance(out, Tensor)
    return out


LINEARS = {
    "gated": {"gate": "gate", "up": "up", "down": "down"},
    "plain": {"up": "up", "down": "down"},
    "llama": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "gpt2": {"up": "c_fc", "down": "c_proj"},
    "opt": {"up": "fc1", "down": "fc2"},
}
CARVED = {"shared": 2, "active": 3, "experts": 8}


def texts() -> list[Tensor]:
    return [torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(2)]


def on(model: nn.Module, plan: ec.Plan, *methods: Any) -> ec.Plan:
    return ec.calibrate(model, texts(), methods, on=plan, progress=False)


_plans: dict[Any, ec.Plan] = {}
"""Models of one name have one set of weights in each test, for which such a plan was made."""


def made(model: nn.Module, below: Any, above: Any = None) -> tuple[ec.Plan, ec.Plan]:
    """The plan of a method, and that with another on it."""
    # The last parameter of many is a norm of ones.
    key: Any = tuple(map(digest, model.parameters())), below.options
    if key not in _plans:
        _plans[key] = ec.calibrate(model, texts(), [below], progress=False)
    plan = both = _plans[key]
    if above is not None:
        key += (above.options,)
        both = _plans[key] = _plans[key] if key in _plans else on(model, plan, above)
    return plan, both


def without(plan: ec.Plan, method: str) -> ec.Plan:
    return ec.Plan({(r.module, r.method): r for r in plan if r.method != method})


def by_hand(model: nn.Module, architecture: str, plan: ec.Plan, above: str) -> nn.Module:
    """The eager model with hooks: neurons that are cut, the bias, and small inputs of each linear set to 0."""
    found = copy.deepcopy(model)
    for flap in [r for r in plan if r.method == "flap"]:
        top = plan.get(flap.module, above)
        assert top is not None
        block, kept = weights(model.get_submodule(flap.module), architecture), flap.tensors["kept"].long()
        rows = {"gate": block.gate, "up": block.up, "down": block.down.t()}
        for role, name in LINEARS[architecture].items():
            weight = rows[role]
            assert weight is not None
            used = weight[:, kept] if role == "down" else weight[kept]
            norms = used.float().norm(dim=0) if above == "wina" else torch.ones(used.shape[1])
            if role == "down":
                norms = torch.full((block.width,), -math.inf).index_put((kept,), norms)
            limit = top.tensors["thresholds"][["gate", "up", "down"].index(role)]

            def before(_: Any, args: Any, norms: Tensor = norms, limit: Tensor = limit) -> Any:
                return (args[0].masked_fill(args[0].float().abs() * norms <= limit, 0),)

            linear = found.get_submodule(f"{flap.module}.{name}".strip("."))
            linear.register_forward_pre_hook(before)
            if role == "down":
                gone = torch.ones(block.width, dtype=torch.bool).index_fill(0, kept, False)
                linear.register_forward_pre_hook(lambda _, args, gone=gone: (args[0].masked_fill(gone, 0),))
                linear.register_forward_hook(lambda _, args, out, b=flap.tensors["bias"]: out + b.to(out))
    return found


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(
    ("architecture", "method", "dtype"),
    [
        ("gated", "wina", torch.float32),
        pytest.param("plain", "teal", torch.float32, marks=pytest.mark.slow),
        pytest.param("gated", "teal", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("llama", "wina", torch.float32, marks=pytest.mark.slow),
        pytest.param("gpt2", "wina", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("opt", "wina", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_both_are_what_hooks_on_the_eager_model_say(
    architecture: str, method: str, dtype: torch.dtype, no_inductor: list[Any], no_fallback: None
) -> None:
    """Steps of one token to eight, and prompts."""
    model = model_of(architecture).to(dtype)
    plan, both = made(model, ec.flap(0.3, round_to=1), getattr(ec, method)(0.4))
    assert len(both) == 2 * len(plan) == 4
    expected, told = by_hand(model, architecture, both, method), planned(model, both)
    for rows in (*range(1, 9), 17) if architecture == "plain" else (1, 3, 8, 17):
        ids = texts()[0][:1, :rows]
        got, wanted, dense = logits(told, ids), logits(expected, ids), logits(model, ids)
        if dtype is torch.float32:
            torch.testing.assert_close(got, wanted, rtol=5e-5, atol=5e-5)
        assert (got - wanted).float().norm() < 0.2 * (dense - wanted).float().norm()


@pytest.mark.slow
@pytest.mark.parametrize("below", [ec.flap(0.3, round_to=1), ec.carve_moe(**CARVED)], ids=lambda m: m.options.name)
def test_none_left_out_on_top_is_the_method_below(below: Any, no_inductor: list[Any]) -> None:
    model = model_of()
    plan, both = made(model, below, ec.wina(0.0))
    for ids in (texts()[0], texts()[0][:1, :1]):
        got, wanted = logits(planned(model, both), ids), logits(planned(model, plan), ids)
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
        assert not torch.allclose(wanted, logits(model, ids), atol=1e-2)
    for r in plan:
        one = both.get(r.module, "wina")
        assert one is not None
        assert one.numbers["error"] == pytest.approx(_again(model, r, below, plan), rel=1e-3)


def _again(model: nn.Module, record: Any, below: Any, plan: ec.Plan) -> float:
    """The error of a block whose input is what earlier blocks of the plan give."""
    seen: list[Tensor] = []
    eager = copy.deepcopy(model)
    for r in plan:
        form = below.options.approximate(weights(model.get_submodule(r.module)), r)
        block = eager.get_submodule(r.module)
        if r.module == record.module:
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
            kept = form
        replace(block, "gated", form)
    for ids in texts():
        logits(eager, ids)
    rows = torch.cat(seen)
    wanted = weights(model.get_submodule(record.module))(rows)
    return float((kept(rows) - wanted).norm() / wanted.norm())


def test_on_a_method_that_removes_nothing_it_is_itself(no_inductor: list[Any]) -> None:
    """The same thresholds, and bit for bit the same model."""
    model = model_of()
    _, both = made(model, ec.flap(0.0), ec.wina(0.4))
    alone = ec.calibrate(model, texts(), [ec.wina(0.4)], progress=False)
    for record in alone:
        one = both.get(record.module, "wina")
        assert one is not None
        torch.testing.assert_close(one.tensors["thresholds"], record.tensors["thresholds"], rtol=1e-5, atol=0)
    for ids in (texts()[0], texts()[0][:1, :3]):
        assert torch.equal(logits(planned(model, both), ids), logits(planned(model, alone), ids))


@pytest.mark.parametrize("method", ["wina", pytest.param("teal", marks=pytest.mark.slow)])
def test_thresholds_are_of_the_neurons_that_stay(method: str) -> None:
    """As many of their numbers are small as were asked for, in the model that the method below has made smaller."""
    model = model_of()
    _, both = made(model, ec.flap(0.8, round_to=1), getattr(ec, method)(0.4))
    whole = ec.calibrate(model, texts(), [getattr(ec, method)(0.4)], progress=False)
    flap, seen = copy.deepcopy(model), {}
    for r in [r for r in both if r.method == "flap"]:
        block = weights(model.get_submodule(r.module))
        small = ec.flap(0.8, round_to=1).options.leaves(block, r)  # type: ignore[attr-defined]
        found: dict[str, Any] = {"up": [], "down": []}

        def run(x: Tensor, small: FeedForward = small, found: dict[str, Any] = found) -> Tensor:
            found["up"].append(x), found["down"].append(small.middle(x))
            return small(x)

        replace(flap.get_submodule(r.module), "gated", run)
        seen[r.module] = small, found
    for ids in texts():
        logits(flap, ids)
    shares = []
    for n, (module, (small, found)) in enumerate(seen.items()):
        up, down = (torch.cat(found[part]) for part in ("up", "down"))
        norms = (small.up.norm(dim=0), small.down.norm(dim=1)) if method == "wina" else (1, 1)
        for plan in (both, whole):
            record = plan.get(module, method)
            assert record is not None
            _, second, third = record.tensors["thresholds"]
            got = [((x.abs() * c) <= t).float().mean() for x, c, t in zip((up, down), norms, (second, third))]
            shares.append([float(x) for x in got])
        assert shares[2 * n] == pytest.approx([0.4, 0.4], abs=0.01)
    assert max(abs(x - 0.4) for one in shares[1::2] for x in one) > 0.03


@pytest.mark.slow
def test_hidden_tokens_do_not_count() -> None:
    model = model_of()
    ids = texts()[0]
    for below in (ec.flap(0.3, round_to=1), ec.carve_moe(**CARVED)):
        plan, _ = made(model, below)
        padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
        one, two = (ec.calibrate(model, [b], [ec.wina(0.4)], on=plan, progress=False) for b in (ids, padded))
        assert one.made["on top"]["tokens"] == two.made["on top"]["tokens"] == 48
        for a, b in zip(one, two, strict=True):
            for name, t in a.tensors.items():
                torch.testing.assert_close(t, b.tensors[name], rtol=6e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"allocation": "greedy"}, {"transform": True}], ids=str)
def test_shares_and_rotations_on_neurons_that_stay(options: dict[str, Any], no_inductor: list[Any]) -> None:
    model = model_of()
    method = ec.wina(0.4, **options)
    _, both = made(model, ec.flap(0.3, round_to=1), method)
    expected = copy.deepcopy(model)
    for r in [r for r in both if r.method == "flap"]:
        top = both.get(r.module, "wina")
        assert top is not None
        small = ec.flap().options.leaves(weights(model.get_submodule(r.module)), r)  # type: ignore[attr-defined]
        replace(expected.get_submodule(r.module), "gated", method.options.approximate(small, top))  # type: ignore[attr-defined]
    ids = texts()[0]
    torch.testing.assert_close(logits(planned(model, both), ids), logits(expected, ids), rtol=5e-5, atol=5e-5)


def carved_by_hand(block: FeedForward, method: CarveMoE, plan: ec.Plan, module: str, above: str) -> Any:
    """For each token: which groups it takes, which of their neurons say enough, and the sum of these."""
    record, top = plan.get(module, "carve_moe"), plan.get(module, above)
    assert record is not None
    assert top is not None
    order, width = record.tensors["order"].long(), block.width // method.experts
    choose = method.routed_form(block, record)
    norms = block.down.float().norm(dim=1) if above == "wina" else torch.ones(block.width)

    def run(x: Tensor) -> Tensor:
        hidden, (_, chosen) = block.middle(x), choose(x)
        assert chosen is not None
        out = []
        for row, groups in zip(hidden, chosen.tolist(), strict=True):
            used = torch.zeros(block.width, dtype=torch.bool)
            used[order[: method.shared * width]] = True
            for g in groups:
                used[order[(method.shared + g) * width : (method.shared + g + 1) * width]] = g >= 0
            used &= row.float().abs() * norms > top.tensors["thresholds"][2]
            out.append(row.where(used, 0) @ block.down + (0 if block.down_bias is None else block.down_bias))
        return torch.stack(out)

    return run


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    ("architecture", "method", "dtype"),
    [
        ("gated", "wina", torch.float32),
        pytest.param("plain", "teal", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gpt2", "teal", torch.float32, marks=pytest.mark.slow),
        pytest.param("phi3", "wina", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_of_chosen_neurons_small_ones_are_left_out(
    architecture: str, method: str, dtype: torch.dtype, no_inductor: list[Any], no_fallback: None
) -> None:
    model = model_of(architecture).to(dtype)
    below = ec.carve_moe(**CARVED)
    plan, both = made(model, below, getattr(ec, method)(0.6))
    last = list(plan)[-1]
    only = ec.Plan({key: r for r in both if (key := (r.module, r.method))[0] == last.module})
    expected = copy.deepcopy(model)
    block, options = weights(model.get_submodule(last.module), architecture), below.options
    assert isinstance(options, CarveMoE)
    replace(
        expected.get_submodule(last.module), architecture, carved_by_hand(block, options, both, last.module, method)
    )
    told, carved = planned(model, only), planned(model, without(only, method))
    for rows in (1, 2, 8, 9, 24):
        ids = texts()[0][:1, :rows]
        got, wanted, before = logits(told, ids), logits(expected, ids), logits(carved, ids)
        if dtype is torch.float32:
            torch.testing.assert_close(got, wanted, rtol=5e-5, atol=5e-5)
        assert (got - wanted).float().norm() < 0.2 * (before - wanted).float().norm()


def test_thresholds_of_chosen_neurons() -> None:
    """Of the neurons that tokens use, as many are small as were asked for; those that nobody chose do not count."""
    model = model_of()
    below = ec.carve_moe(1, 2, 8)
    plan, both = made(model, below, ec.teal(0.4))
    first = next(iter(plan))
    top, block, method = (
        both.get(first.module, "teal"),
        weights(model.get_submodule(first.module)),
        below.options,
    )
    assert isinstance(method, CarveMoE)
    assert top is not None
    assert set(top.numbers) == {"sparsity", "sparsity_down", "error", "cosine"}
    seen: list[Tensor] = []
    hook = model.get_submodule(first.module).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    for ids in texts():
        logits(model, ids)
    hook.remove()
    rows = torch.cat(seen)
    _, chosen = method.routed_form(block, first)(rows)
    assert chosen is not None
    hidden = method.carved(block, first).middle(rows).abs()
    group = torch.arange(block.width).div(12, rounding_mode="floor") - 1
    used = (group < 0) | (chosen[:, :, None] == group).any(1)
    assert used.sum() == rows.shape[0] * 36
    assert float((hidden[used] <= top.tensors["thresholds"][2]).float().mean()) == pytest.approx(0.4, abs=0.01)


@pytest.mark.slow
def test_experts_that_are_all_shared_are_a_smaller_block(no_inductor: list[Any]) -> None:
    model = model_of()
    _, both = made(model, ec.carve_moe(5, 0, 8, bias=True), ec.wina(0.4))
    told = planned(model, both)
    logits(told, texts()[0])
    forms = {d.form for d in ec.inspect(told).decisions if d.action == "rewritten"}
    assert forms == {"carve_moe S5A0E8, wina 40%"}
    for r in both:
        assert len(r.on) == (r.method == "wina")


def test_which_neurons_tokens_use() -> None:
    method = CarveMoE(1, 2, 4)
    used = method.used(torch.tensor([[2, -1], [0, 1], [1, 1]], dtype=torch.int32), 8)
    wanted = [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]]
    assert used.tolist() == [[bool(x) for x in row] for row in wanted]
    assert ffn_ops.factors(torch.tensor([[-1]], dtype=torch.int32), None, 1, 3)[0].sum() == 0

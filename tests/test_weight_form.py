"""Few bits as an attribute of other forms: factors, narrower blocks and heads, and linears with adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from few_bits import (
    FOUR,
    SIZE,
    STEP,
    WIDTH,
    Hidden,
    Net,
    X,
    by_hand,
    compiled,
    factored,
    factors,
    narrower,
    rows_of,
    run,
    told,
    with_factors,
    with_neurons,
)
from test_adapters import Chain, adapted
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.passes.flap import Flap
from effcompile.passes.low_rank import LowRank
from effcompile.passes.weight_form import DENSE, WeightForm
from effcompile.runtime.plan import Record, digest
from models import MODELS

CASES = [
    (4, 32, False, 40),
    (3, 24, True, 7),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 32, True, 64), (2, 8, False, 20))),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "rank"), CASES)
def test_both_factors_are_rounded(
    bits: int, group: int, symmetric: bool, rank: int, no_inductor: list[Any], no_fallback: None
) -> None:
    """Ranks and widths that neither groups nor blocks of outputs divide, with bias and mean, prompt and step."""
    model, few = Net(), {"bits": bits, "group": group, "symmetric": symmetric}
    plan = factors(model, rank)
    ours = compiled(model, plan, few)
    plain = with_factors(model, plan, lambda w: by_hand(w, bits, group, symmetric))
    for x in (X, X[STEP, STEP]):
        torch.testing.assert_close(run(ours, x), run(plain, x), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(run(with_factors(model, plan, lambda w: w)), run(ours), atol=1e-3 * 2 ** (8 - bits) / 16)
    text = str(no_inductor[-1].graph)
    assert text.count("effcompile.quantized_linear") == 5  # two of the six factors read one tensor
    assert "low_rank_linear" not in text
    assert "aten.linear" not in text


def test_bf16_loses_no_more_than_the_same_products_do(no_inductor: list[Any], no_fallback: None) -> None:
    model = Net().bfloat16()
    thin, small, x = factors(model, 48), narrower(model), X.bfloat16()
    for plan, plain in (
        (thin, with_factors(model, thin, by_hand)),
        (small, with_neurons(model, small, lambda w, _: by_hand(w)).bfloat16()),
    ):
        exact = run(_double(plain), x.double())
        error, lost = (run(m, x).double() - exact for m in (compiled(model, plan), plain))
        assert error.abs().max() <= 2 * lost.abs().max() + torch.finfo(torch.bfloat16).eps


def _double(model: nn.Module) -> nn.Module:
    """In fp64 on the same numbers; factors are multiplied by as they are."""
    made = copy.deepcopy(model).double()
    for name, linear in made.named_modules():
        if isinstance(linear, nn.Linear) and "forward" in vars(linear):
            defaults: Any = model.get_submodule(name).forward.__defaults__
            record = defaults[1]
            linear.forward = lambda x, linear=linear, record=record: factored(
                x, linear, record, lambda w: by_hand(w).double()
            )
    return made


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_narrower_block_is_rounded(fused: bool, no_inductor: list[Any], no_fallback: None) -> None:
    model = Net(fused=fused)
    plan = narrower(model)
    ours, plain = compiled(model, plan), with_neurons(model, plan, lambda w, _: by_hand(w))
    for x in (X, X[STEP, STEP]):
        torch.testing.assert_close(run(ours, x), run(plain, x), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(run(with_neurons(model, plan)), run(ours), atol=1e-2)
    assert str(no_inductor[-1].graph).count("effcompile.quantized_linear") == 2  # gate and up, and down
    names = {"gate_up", "down"} if fused else {"gate", "up", "down"}
    wanted = "taken: flap stands here, and keeps its weights in w4g32"
    assert told(ours) == {f"layers.0.{name}": [wanted] for name in names}


def test_rules_hold_for_each_linear_of_a_form(no_inductor: list[Any]) -> None:
    """Other bits, and none, inside one block; what was prepared for one choice is not found for another."""
    model = Net()
    plan = narrower(model)
    bits = {"gate": 4, "up": 4, "down": 8}, {"gate": 4, "up": 8, "down": 8}, {"gate": 8, "up": 16, "down": 4}
    alive, forms = [], []
    for chosen in bits:
        rules = {f"layers.*.{role}": {"quantize_weights": {"bits": n}} for role, n in chosen.items()}
        ours = compiled(model, plan, None, rules=rules)
        plain = with_neurons(
            model, plan, lambda w, role, chosen=chosen: w if chosen[role] == 16 else by_hand(w, chosen[role])
        )
        torch.testing.assert_close(run(ours), run(plain), rtol=1e-4, atol=2e-5)
        alive.append(ours)
        forms.append(rows_of(ours, "ffn")["layers.0"].form)
    assert forms == [
        "flap 69 neurons, w4g32 and w8g32",
        "flap 69 neurons, w4g32 and w8g32",
        "flap 69 neurons, w8g32 and dense and w4g32",
    ]
    assert told(alive[2])["layers.0.up"] == ["nothing-to-do: with 16 bits weights stay as they are"]
    off = compiled(model, factors(model), rules={"layers.0.up": {"quantize_weights": False}})
    run(off)
    assert told(off)["layers.0.up"][0] == "low_rank whitened 40 of 64"
    assert told(off)["layers.0.gate"][0] == "low_rank whitened 40 of 64, w4g32"


def test_sixteen_bits_are_the_form_itself(no_inductor: list[Any]) -> None:
    model = Net()
    for plan in (factors(model), narrower(model)):
        out = run(same := compiled(model, plan, {"bits": 16}))
        assert {row[-1] for row in told(same).values()} == {"nothing-to-do: with 16 bits weights stay as they are"}
        assert torch.equal(out, run(compiled(model, plan, None)))
        assert str(no_inductor[-1].graph) == str(no_inductor[-2].graph)


def test_the_report_counts_what_is_packed(no_inductor: list[Any]) -> None:
    model = Net()
    ours = compiled(model, factors(model, 48), verify=True)
    run(ours, X[STEP, STEP])
    first, second = (d for d in ec.inspect(ours).decisions if d.module == "layers.0.down")
    assert first.form == "low_rank whitened 48 of 64, w4g32"
    assert first.kernels == ("quantized_linear_f32",)
    assert first.error > 0
    assert str(second.reason).startswith("taken: low_rank stands here, and keeps its weights in w4g32")
    ends = 4 * (WIDTH + SIZE) + 4 * SIZE  # with the bias
    assert first.bytes_before == 4 * WIDTH * SIZE + ends
    # Each group has 16 bytes of codes and 4 of scale and zero: 4 of them in a row of 104, 2 in one of 48.
    assert first.bytes_after == 20 * (48 * 4 + 64 * 2) + ends
    assert first.flops_after == 4 * 48 * (WIDTH + SIZE)
    assert {k.name for k in ec.inspect(ours).kernels} == {"quantized_linear_f32"}
    ours = compiled(model, narrower(model))
    run(ours, X[STEP, STEP])
    row = rows_of(ours, "ffn")["layers.0"]
    assert row.form == "flap 69 neurons, w4g32"
    assert row.bytes_after == 20 * (2 * 80 * 2 + 64 * 3) + 2 * 4 * SIZE
    assert row.kernels == ("quantized_linear_f32",)


def budgeted(plan: ec.Plan) -> ec.Plan:
    """The same records, as a plan with a budget has them."""
    options = json.loads(LowRank(ratio=0.7).text)
    return ec.Plan({(r.module, r.method): dataclasses.replace(r, options=options) for r in plan})


def test_break_even_is_of_packed_bytes(no_inductor: list[Any]) -> None:
    """Factors that are less to read in fp32 and not in four bits: the weight itself is rounded in their place."""
    model = Hidden(nn.Linear(64, 64))
    for rank, even in ((24, True), (24, False), (16, True)):
        plan = budgeted(factors(model, rank)) if even else factors(model, rank)
        ours = compiled(model, plan)
        out = run(ours)
        record = next(iter(plan))
        if (rank, even) == (24, True):
            assert told(ours)["layer"] == [
                "break-even: in w4g32 factors of rank 24 would have 2,560 bytes, and the weight 2,560",
                "w4g32 rtn",
            ]
            wanted = F.linear(X, by_hand(model.layer.weight.detach()), model.layer.bias.detach())
        else:
            assert told(ours)["layer"][0] == f"low_rank whitened {rank} of 64, w4g32"
            wanted = factored(X, model.layer, record, by_hand).detach()
        torch.testing.assert_close(out, model.rest(wanted), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["flexround", pytest.param("cbq", marks=pytest.mark.slow)])
def test_learned_rounding_is_of_the_weight_alone(method: str, no_inductor: list[Any]) -> None:
    model = Net()
    for plan, form in ((factors(model), "effcompile.low_rank_linear"), (narrower(model), "torch.ops.aten.linear")):
        ours = compiled(model, plan, FOUR | {"method": method})
        out = run(ours)
        assert str(no_inductor[-1].graph).count(form) == 3
        for lines in told(ours).values():
            assert lines[-1].startswith(f"learned-rounding: {method} has learned codes of the weight as it was")
        assert torch.equal(out, run(compiled(model, plan, None)))


def test_what_is_not_a_linear_alone_stays_and_says_so(no_inductor: list[Any]) -> None:
    """Single entries beside factors, matrices that layers share, and factors that fp16 scales cannot say."""
    model = Hidden(nn.Linear(64, 48, bias=False))
    sparse = {"values": torch.ones(2), "columns": torch.tensor([3, 60], dtype=torch.int16)}
    sparse |= {"starts": torch.cat([torch.zeros(1), torch.full((48,), 2.0)]).int()}
    tiny = next(iter(factors(model))).tensors
    small = {"up": tiny["up"] * 1e-6, "down": tiny["down"] * 1e6}
    shared = {"atoms": torch.randn(2, 48, 64), "coefficients": torch.tensor([0.5, 2.0])}
    masa: dict[str, Any] = {"method": "masa", "rank": None, "break_even": True}
    for options, tensors, reason in (
        ({"residual": 0.1}, sparse, "not-supported: single entries are read in one call"),
        ({}, small, "range: its weights reach"),
        (masa | {"materialize": False}, shared, "not-supported: layers share matrices"),
        (masa, shared, "taken: low_rank stands here, and keeps its weights in w4g32"),
    ):
        (record,) = factors(model, shift=False)
        told_of = LowRank(**{"rank": 40, "break_even": False} | options).text
        own = dict(record.tensors) | tensors if "atoms" not in tensors else tensors
        plan = ec.Plan({("layer", "low_rank"): dataclasses.replace(record, tensors=own, options=json.loads(told_of))})
        ours = compiled(model, plan)
        out = run(ours)
        assert told(ours)["layer"][-1].startswith(reason)
        if "taken" in reason:
            weight = by_hand(torch.einsum("s,smn->mn", shared["coefficients"], shared["atoms"]))
            torch.testing.assert_close(out, model.rest(F.linear(X, weight)).detach(), rtol=1e-4, atol=2e-5)
        else:
            assert torch.equal(out, run(compiled(model, plan, None)))


def test_heads_and_fp64_stay(no_inductor: list[Any]) -> None:
    """A factored head is in few bits if heads are asked for, here and there."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.inner, self.head = nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 96)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(ids)).tanh())

    model, ids = Headed(), torch.arange(12).view(2, 6)
    plan = factors(model, head=True)
    for head in (False, True):
        ours = compiled(model, plan, FOUR | {"head": head})
        out = run(ours, ids)
        plain = with_factors(model, plan, by_hand)
        if not head:
            record = plan.get("head", "low_rank")
            plain.head.forward = lambda x, record=record: factored(x, model.head, record, lambda w: w)
        torch.testing.assert_close(out, run(plain, ids), rtol=1e-4, atol=2e-5)
        assert told(ours)["head"][-1].startswith("taken" if head else "head: ")
    wide = model.double()
    ours = compiled(wide, plan := factors(wide, head=True))
    torch.testing.assert_close(run(ours, ids), run(with_factors(wide, plan, lambda w: w), ids))
    assert told(ours)["inner"][-1] == "not-supported: its weights are torch.float64"


@torch.no_grad()
def test_adapters_beside_a_rounded_linear(no_inductor: list[Any], no_fallback: None) -> None:
    """Kept, they are added as they are, with low_rank or without it; folded, the sum is what is rounded."""
    two = {"one": (4, 2.0), "two": (6, 0.5)}
    model = adapted(Chain(nn.Linear(64, 48)), ("layer",), two)
    base = model.layer.base_layer
    plain = copy.deepcopy(model)
    plain.layer.base_layer.weight = nn.Parameter(by_hand(base.weight))
    halves = [f"layer.lora_{side}.{name}" for name in two for side in "AB"]
    ours = compiled(model)
    torch.testing.assert_close(ours(X), plain(X), rtol=1e-4, atol=2e-5)
    assert {code.split(":")[0] for name in halves for code in told(ours)[name]} == {"adapter"}
    assert told(ours)["layer.base_layer"] == ["w4g32 rtn"]
    ours = compiled(model, low_rank={"adapters": "keep"})
    torch.testing.assert_close(ours(X), plain(X), rtol=1e-4, atol=2e-5)
    assert [told(ours)[name][0] for name in halves[::2]] == ["low_rank adapter 4", "low_rank adapter 6"]
    plan = factors(model, 32, only="base_layer")
    ours = compiled(model, plan)
    torch.testing.assert_close(ours(X), with_factors(model, plan, by_hand)(X), rtol=1e-4, atol=2e-5)
    ours = compiled(model, low_rank={"adapters": "fold"})
    weight = base.weight.double()
    for name, (_, scale) in two.items():
        weight = weight + model.layer.lora_B[name].weight.double() @ model.layer.lora_A[name].weight.double() * scale
    wanted = F.linear(X, by_hand(weight.float()), base.bias).sigmoid()
    torch.testing.assert_close(ours(X), wanted, rtol=1e-4, atol=2e-5)
    assert told(ours)["layer.base_layer"][0] == "low_rank dense with 2 folded, w4g32"


@torch.no_grad()
def test_adapters_leave_where_factors_do_not_pay(no_inductor: list[Any]) -> None:
    """Folded into factors; and into the weight, where that has no more packed bytes than factors would have."""
    model = adapted(Chain(nn.Linear(64, 64)), ("layer",), {"one": (4, 2.0)})
    layer, base = model.layer, model.layer.base_layer
    down, up = layer.lora_A["one"].weight, layer.lora_B["one"].weight
    own = {"linear": base.weight, "bias": base.bias}
    own |= {"adapter 0 * 2.0: down": down, "adapter 0 * 2.0: up": up}
    for rank, form in ((16, "low_rank whitened 16 of 64 with 1 folded"), (24, "low_rank dense with 1 folded")):
        (record,) = factors(model, rank, only="base_layer")
        options = json.loads(LowRank(ratio=0.7, adapters="fold").text)
        parameters = {role: digest(t) for role, t in own.items()}
        record = dataclasses.replace(record, options=options, parameters=parameters)
        ours = compiled(model, ec.Plan({(record.module, record.method): record}))
        sums = by_hand((base.weight.double() + up.double() @ down.double() * 2.0).float())
        wanted = factored(X, base, record, by_hand) if rank == 16 else F.linear(X, sums, base.bias)
        torch.testing.assert_close(ours(X), wanted.sigmoid(), rtol=1e-4, atol=2e-5)
        assert told(ours)["layer.base_layer"][0] == f"{form}, w4g32"


@pytest.mark.slow
@torch.no_grad()
def test_fewer_heads_in_few_bits(no_inductor: list[Any], no_fallback: None) -> None:
    """Rows of queries, keys and values, and columns of the output projection; a prompt with a cache, and a step."""
    model = MODELS["llama"]("sdpa")
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    options, records, heads = json.loads(Flap(0.4, heads=True).text), {}, torch.tensor([2, 3])
    plain = copy.deepcopy(model)
    for n, layer in enumerate(plain.model.layers):
        attention: Any = layer.self_attn
        path = f"model.layers.{n}.self_attn.o_proj"
        tensors = {"heads": heads.int(), "bias": torch.linspace(-1, 1, 128)}
        own = {"output": digest(attention.o_proj.weight)}
        records[path, "flap"] = Record(path, "flap", options, own, {"heads": 2.0, "of": 4.0}, tensors)
        kept = (heads[:, None] * 32 + torch.arange(32)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(by_hand(linear.weight))
        some = by_hand(attention.o_proj.weight[:, kept])
        attention.o_proj.weight = nn.Parameter(torch.zeros(128, 128).index_copy(1, kept, some))
        attention.o_proj.bias = nn.Parameter(tensors["bias"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight = nn.Parameter(by_hand(linear.weight))
    ours, whole = compiled(model, ec.Plan(records)), plain(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids, use_cache=False).logits, whole, rtol=2e-4, atol=2e-4)
    row = rows_of(ours, "heads")["model.layers.0.self_attn.o_proj"]
    assert row.form == "flap 2 of 4 heads, w4g32"
    tokens, ends = ids.numel(), 4 * (3 * 128 + 64 + 2 * 32 + 64 + 128)
    assert row.bytes_after == 20 * 4 * (64 + 32 + 32) + 20 * 2 * 128 + 4 * 128 + tokens * ends
    assert set(told(ours)["model.layers.0.self_attn.q_proj"]) == {
        "taken: flap stands here, and keeps its weights in w4g32"
    }
    cache = ours(ids[:, :-1]).past_key_values
    step = ours(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(step, whole[:, -1:], rtol=2e-4, atol=2e-4)


def test_files_changes_and_discarding(no_inductor: list[Any], tmp_path: Any) -> None:
    """A saved plan gives the same; a weight that is written to is told; without the originals all goes on."""
    model = Net(2, bias=False)
    plans = {"factors": factors(model), "neurons": narrower(model)}
    for name, plan in plans.items():
        own = copy.deepcopy(model)
        plan.save(tmp_path / name)
        expected = run(compiled(own, plan))
        ours = compiled(own, tmp_path / name)
        assert torch.equal(run(ours), expected)
        done = ec.discard_parameters(ours)
        assert sorted(done.names) == sorted(n for n, _ in model.named_parameters())
        assert torch.equal(run(ours), expected)
        # A graph for another shape finds what was prepared, and other bits do not.
        torch.testing.assert_close(run(ours, X[STEP, STEP]), expected[STEP, STEP], rtol=1e-5, atol=1e-6)
        torch._dynamo.reset()
        assert torch.equal(run(ours), expected)
        other = compiled(own, plan, {"bits": 8})
        with pytest.raises(Exception, match="preparing weights in another way than before reads"):
            run(other)
        own = copy.deepcopy(model)
        ours = compiled(own, plan)
        run(ours)
        with torch.no_grad():
            own.layers[1].down.weight[0, 0] += 1
        with pytest.raises(ec.PlanError, match=r"layers\.1.*: its weights are not those"):
            run(ours)


def test_factors_that_are_no_factors(no_inductor: list[Any]) -> None:
    """A plan that was edited badly is told as without few bits, before anything is rounded."""
    model = Hidden(nn.Linear(64, 48))
    (record,) = factors(model)
    for name, tensor, said in (("down", None, "no tensor 'down'"), ("up", torch.full((48, 40), torch.nan), "NaN")):
        tensors = {n: t for n, t in ({**record.tensors, name: tensor}).items() if t is not None}
        bad = dataclasses.replace(record, tensors=tensors)
        with pytest.raises(Exception, match=said):
            run(compiled(model, ec.Plan({("layer", "low_rank"): bad})))


def test_a_form_by_itself() -> None:
    """What it is called, what it takes, and that 16 bits are the tensor itself."""
    assert (DENSE.text, WeightForm(4).text, WeightForm(3, 64, True).text) == ("dense", "w4g32", "w3g64 symmetric")
    weight = torch.randn(33, 70)
    assert DENSE.tensors("up", weight)["up"] is weight
    for form in (WeightForm(4), WeightForm(3, 24, True), WeightForm(8, 8)):
        packed = form.tensors("up", weight)
        assert sum(t.nbytes for t in packed.values()) == form.nbytes(33, 70, 4)
        assert form.change(33, 70, 4).bytes == form.nbytes(33, 70, 4) - weight.nbytes


@pytest.mark.slow
def test_through_inductor(no_fallback: None) -> None:
    """Factors in one layer, fewer neurons in the other: a prompt, and steps of one row."""
    model = Net(2)
    thin, narrow = factors(model, only="layers.0"), [r for r in narrower(model) if r.module == "layers.1"]
    plan = ec.Plan({(r.module, r.method): r for r in (*thin, *narrow)})
    ours = compiled(model, plan)
    plain = with_factors(model, thin, by_hand)
    part = Net(2)
    part.load_state_dict(model.state_dict())
    small = with_neurons(part, narrower(part), lambda w, _: by_hand(w))
    plain.layers[1] = small.layers[1]
    for x in (X, X[STEP, STEP], X[STEP, STEP] + 1):
        torch.testing.assert_close(run(ours, x), run(plain, x), rtol=1e-4, atol=2e-5)
    forms = {d.form for d in ec.inspect(ours).decisions if d.action == "rewritten"}
    assert forms == {"low_rank whitened 40 of 64, w4g32", "flap 69 neurons, w4g32"}

"""Removing heads of attention: which, what is put back, and that what is left of the model computes just that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_plans import planned
from torch import Tensor, nn
from transformers import StaticCache

import effcompile as ec
from effcompile.kernels.ffn import FeedForward
from effcompile.kernels.heads import Heads
from effcompile.passes.feed_forward import Calibrated, CalibratedHeads
from effcompile.passes.flap import Flap
from effcompile.passes.heads import approximate, kept_of
from effcompile.runtime.plan import Record, digest
from effcompile.runtime.statistics import Moments, Rows, Samples
from models import MODELS, _hf

GROUPED: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
"""9 query heads over 3 of keys and values, of 16 channels each: 144, where the hidden size is 72."""
MAKE = {**MODELS, "grouped": _hf("Llama", **GROUPED, attention_bias=True)}


def batches() -> list[Tensor]:
    return [torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(2)]


def heads_only(plan: ec.Plan) -> ec.Plan:
    return ec.Plan({(r.module, r.method): r for r in plan if "heads" in r.tensors}, plan.made)


def keeping(plan: ec.Plan, *kept: list[int]) -> ec.Plan:
    """The records of heads, with these that stay, and a bias that tells."""
    records = list(heads_only(plan))
    chosen = [
        dataclasses.replace(
            r,
            tensors={"heads": torch.tensor(k, dtype=torch.int32), "bias": torch.full_like(r.tensors["bias"], 0.1)},
        )
        for r, k in zip(records, kept, strict=True)
    ]
    return ec.Plan({(r.module, r.method): r for r in chosen}, plan.made)


def masked(model: nn.Module, plan: ec.Plan) -> nn.Module:
    """The oracle: the eager model, whose output projections read zeros of the removed heads, with the bias added."""
    made = copy.deepcopy(model)
    for record in heads_only(plan):
        linear = made.get_submodule(record.module.partition("#")[0])
        width = linear.weight.shape[0 if type(linear).__name__ == "Conv1D" else 1]
        size = width // int(record.numbers["of"])
        stays = torch.zeros(width // size, size)
        stays[record.tensors["heads"].long()] = 1

        def before(_: Any, args: Any, stays: Tensor = stays) -> Any:
            return (args[0] * stays.flatten().to(args[0]),)

        def after(_: Any, args: Any, out: Tensor, bias: Tensor = record.tensors["bias"]) -> Tensor:
            return out + bias.to(out)

        linear.register_forward_pre_hook(before)
        linear.register_forward_hook(after)
    return made


def calls(graph: Any, target: Any) -> list[Any]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


@pytest.mark.one_in(4, rest="exhaustive")
@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *((name, "query") for name in MAKE if name not in ("qwen2", "mistral")),  # written as llama
        *((name, "group") for name in ("llama", "gpt2", "grouped")),
    ],
)
def test_smaller_model_is_the_masked_one(name: str, unit: Any, no_inductor: list[Any]) -> None:
    """Groups and query heads; a call without a cache, and a prompt and a step with one."""
    model = MAKE[name]("sdpa")
    plan = heads_only(ec.calibrate(model, batches(), [ec.flap(0.45, heads=True, unit=unit)], progress=False))
    ids = batches()[0]
    assert len(plan) == 2
    assert {1e-3 < r.numbers["error"] < 1 for r in plan if r.numbers["heads"] < r.numbers["of"]} == {True}
    expected, told = masked(model, plan), planned(model, plan)
    whole = expected(ids, use_cache=False).logits
    torch.testing.assert_close(told(ids, use_cache=False).logits, whole, rtol=5e-5, atol=5e-5)
    assert not torch.allclose(whole, model(ids).logits, atol=1e-2)
    cache = told(ids[:, :-1]).past_key_values
    step = told(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(step, whole[:, -1:], rtol=5e-5, atol=5e-5)


def site_of(rows: Tensor, down: Tensor, heads: int, groups: int, bias: Tensor | None = None) -> CalibratedHeads:
    """Heads whose output projection has read ``rows``; each head owns as many weights as in a layer."""
    block = Heads(down, bias, heads, groups, 2 * down.numel() // heads, 2 * down.numel() // heads)
    moments = Moments("middle")
    moments.update(Rows(rows, rows, block))
    return CalibratedHeads("attn", block, {}, {"middle": moments}, Samples(8))


def lost(site: CalibratedHeads, rows: Tensor, tensors: dict[str, Tensor]) -> float:
    """Mean square of what the output projection loses over all rows."""
    record = Record("attn", "flap", {}, {}, {}, tensors)
    return float((approximate(site.block, record)(rows) - site.block(rows)).square().sum(1).mean())


def bias_of(site: CalibratedHeads, kept: list[int]) -> dict[str, Tensor]:
    """What FLAP puts back if these heads stay."""
    gone = torch.tensor([h for h in range(site.block.heads) if h not in kept], dtype=torch.long)
    bias = Flap(heads=True)._bias(site, site.block.channels(gone))
    return {"heads": torch.tensor(kept, dtype=torch.int32), "bias": bias}


@pytest.fixture
def rows() -> Tensor:
    """What 6 heads of 4 channels say: of different size, away from 0."""
    return (torch.randn(300, 24) + 2 * torch.randn(24)) * torch.rand(24)


@pytest.mark.parametrize("seed", range(20))
def test_bias_never_loses_more(seed: int, rows: Tensor) -> None:
    """For any heads: the mean is the best constant, so with it the mean square is at most that without it."""
    generator = torch.Generator().manual_seed(seed)
    site = site_of(rows, torch.randn(24, 10, generator=generator), 6, 3, torch.randn(10))
    kept = sorted(torch.randperm(6, generator=generator)[: seed % 6].tolist())
    own = bias_of(site, kept)
    without = {**own, "bias": torch.zeros(10)}
    assert lost(site, rows, own) < lost(site, rows, without)


def test_a_single_channel_loses_its_variance_times_its_weights(rows: Tensor) -> None:
    """The score of WIFV is the error: heads of one channel, one of them removed."""
    site = site_of(rows.double(), torch.randn(24, 10, dtype=torch.float64), 24, 24)
    scores = Flap(heads=True)._scores(site)
    for head in range(24):
        own = bias_of(site, [h for h in range(24) if h != head])
        assert lost(site, rows.double(), own) == pytest.approx(float(scores[head]), rel=1e-4)
        variance = rows[:, head].double().var(correction=0)
        assert float(scores[head]) == pytest.approx(float(variance * site.block.down[head].square().sum()), rel=1e-9)


def test_constant_heads_go_first_and_cost_nothing(rows: Tensor) -> None:
    rows[:, 8:12] = torch.tensor([3.0, -1.0, 0.0, 0.5])
    site = site_of(rows, torch.randn(24, 10), 6, 6, torch.randn(10))
    (found,) = Flap(1 / 6, heads=True).calibrate_all([], [site])[1]
    assert found.tensors["heads"].tolist() == [0, 1, 3, 4, 5]
    assert lost(site, rows, dict(found.tensors)) < 1e-10
    assert lost(site, rows, {**found.tensors, "bias": torch.zeros(10)}) > 1


def test_less_is_lost_than_by_chance(rows: Tensor) -> None:
    site = site_of(rows, torch.randn(24, 10), 6, 6)
    (found,) = Flap(0.5, heads=True).calibrate_all([], [site])[1]
    generator = torch.Generator().manual_seed(0)
    chance = [sorted(torch.randperm(6, generator=generator)[:3].tolist()) for _ in range(20)]
    ours = lost(site, rows, dict(found.tensors))
    assert ours < sum(lost(site, rows, bias_of(site, kept)) for kept in chance) / 20


@pytest.mark.parametrize("unit", ["group", "query"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.55, 0.9, 1.0])
def test_share_that_is_kept(ratio: float, unit: Any) -> None:
    """Over heads and neurons of layers of other widths: within one unit of the share that was asked for."""
    torch.manual_seed(int(100 * ratio))
    heads = [site_of(torch.randn(50, 24) * torch.rand(24), torch.randn(24, 16), 6, 2) for _ in range(3)]
    blocks = []
    for width in (40, 56):
        block = FeedForward(torch.randn(width, 16), torch.randn(width, 16), torch.randn(width, 16), "silu")
        x = torch.randn(50, 16)
        moments = Moments("middle")
        moments.update(Rows(x, block.middle(x), block))
        blocks.append(Calibrated("mlp", block, {}, {"middle": moments}, Samples(8)))
    method = Flap(ratio, heads=True, unit=unit, round_to=1)
    found, kept = method.calibrate_all(blocks, heads)
    query, key = heads[0].block.query, heads[0].block.key
    units = [len(f.tensors["heads"]) // (3 if unit == "group" else 1) for f in kept]
    each = 3 * query + key if unit == "group" else query
    number = 6 if unit == "query" else 2
    gone = (96 - sum(f.tensors["kept"].numel() for f in found)) * 3 * 16 + (3 * number - sum(units)) * each
    owned = 96 * 3 * 16 + 3 * number * each
    whole = 96 * 3 * 16 + 3 * (6 * query + 2 * key)  # keys and values are there, if no query head owns them
    assert abs(gone - min(ratio * whole, owned)) <= each
    if unit == "group":
        for f in kept:
            assert f.tensors["heads"].view(-1, 3)[:, 0].remainder(3).eq(0).all()
            assert f.tensors["heads"].view(-1, 3).diff(dim=1).eq(1).all()
    if ratio in (0.0, 1.0):
        assert {len(f.tensors["heads"]) for f in kept} == {6 * int(1 - ratio)}


def test_scores_are_those_of_the_official_code(rows: Tensor) -> None:
    """Squared, standardised over the channels of the layer, and then the mean of each head (AL-AM of ``prune.py``)."""
    down = torch.randn(24, 10)
    scores = Flap(heads=True, unit="query")._units(site_of(rows, down, 6, 3))
    variance = rows.double().var(0, correction=0)
    squared = (variance * down.double().square().sum(1)) ** 2
    standard = (squared - squared.mean()) / squared.std()
    torch.testing.assert_close(scores, standard.view(6, 4).mean(1))
    torch.testing.assert_close(Flap(heads=True)._units(site_of(rows, down, 6, 3)), standard.view(3, 8).mean(1))


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, ec.Plan]:
    """The model of 9 and 3 heads, and a plan in which a group stays of the first layer and nothing of the second."""
    model = MAKE["grouped"]("sdpa")
    plan = ec.calibrate(model, batches()[:1], [ec.flap(0.4, heads=True)], progress=False)
    return model, keeping(plan, [3, 4, 5], [])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-2), pytest.param(torch.float32, 5e-5, marks=pytest.mark.slow)]
)
def test_padding_half_precision_and_no_head_at_all(
    dtype: torch.dtype, tolerance: float, grouped: tuple[nn.Module, ec.Plan], no_inductor: list[Any]
) -> None:
    """Left padding beside no padding, a prompt and a step; a layer without heads is a constant."""
    model, plan = grouped
    ids, mask = batches()[1], torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    own = copy.deepcopy(model).to(dtype)
    narrow = fitting(own, plan)
    expected, told = masked(own, narrow), planned(own, narrow)
    whole = expected(ids, attention_mask=mask, use_cache=False).logits
    out = told(ids[:, :-1], attention_mask=mask[:, :-1])
    step = told(ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits
    got, seen = torch.cat([out.logits, step], 1), mask.bool()
    torch.testing.assert_close(got[seen], whole[seen], rtol=tolerance, atol=tolerance)
    assert {d.form for d in ec.inspect(told).decisions if d.kind == "heads"} == {
        "flap 3 of 9 heads",
        "flap 0 of 9 heads",
    }


def fitting(model: nn.Module, plan: ec.Plan) -> ec.Plan:
    """A plan of a model of the same weights in another dtype: the digests are those of these."""
    records = []
    for r in plan:
        linear = model.get_submodule(r.module)
        own = {"output": digest(linear.weight)} | ({} if linear.bias is None else {"output_bias": digest(linear.bias)})
        records.append(dataclasses.replace(r, parameters=own))
    return ec.Plan({(r.module, r.method): r for r in records}, plan.made)


@pytest.mark.slow
@torch.no_grad()
def test_report_and_weights(grouped: tuple[nn.Module, ec.Plan], no_inductor: list[Any]) -> None:
    """Heads by layer with their bytes and FLOPs; other weights are refused, before and after compiling."""
    model, plan = grouped
    ids = batches()[0]
    told = planned(model, plan, rules={"model.layers.0.self_attn": {"low_rank": {}}})
    told(ids, use_cache=False)
    report = ec.inspect(told)
    rows = {d.module: d for d in report.decisions if d.kind == "heads"}
    first = rows["model.layers.0.self_attn.o_proj"]
    size, tokens, kept = 72, ids.numel(), 3 * 16
    # q, k, v and o, with their biases; of the group that stays: 3 query heads and one of keys and values.
    assert first.flops_before == 2 * tokens * size * (144 + 48 + 48 + 144)
    assert first.flops_after == 2 * tokens * size * (48 + 16 + 16 + 48)
    weights = (48 + 16 + 16) * (size + 1) + kept * size + size
    through = tokens * (3 * size + 48 + 16 + 16 + kept + size)
    assert first.bytes_after == 4 * (weights + through)
    assert rows["model.layers.1.self_attn.o_proj"].flops_after == 0
    assert first.form == "flap 3 of 9 heads"
    taken = {d.module for d in report.decisions if d.reason is not None and d.reason.code == "taken"}
    assert taken == {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    told.model.layers[0].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(Exception, match=r"layers\.0\.self_attn\.o_proj: its weights are not those"):
        told(ids, use_cache=False)
    model.model.layers[0].self_attn.k_proj.weight.div_(2)
    for name, role in (("o", "output"), ("v", "value")):
        other = copy.deepcopy(model)
        getattr(other.model.layers[1].self_attn, f"{name}_proj").weight[3, 5] += 1
        torch._dynamo.reset()
        with pytest.raises(Exception, match=rf"layers\.1\.self_attn\.o_proj: the {role} weights are not those"):
            planned(other, plan)(ids)


OFF = {"model.layers.1": {"flap": False}}


def codes(model: nn.Module) -> list[str]:
    """The reasons why the newest graph left heads as they are."""
    return [d.reason.code for d in ec.inspect(model).graphs[-1].decisions if d.kind == "heads" and d.reason]


def dict_of(plan: ec.Plan) -> dict[tuple[str, str], Record]:
    return {(r.module, r.method): r for r in plan}


@pytest.mark.slow
@torch.no_grad()
def test_plans_by_hand(grouped: tuple[nn.Module, ec.Plan], no_inductor: list[Any]) -> None:
    """Heads that are not there are an error; all heads, a rule, and gradients leave the layer."""
    model, plan = grouped
    ids = batches()[0]
    for kept in ([3, 4, 9], [4, 3], [3, 3], [-1]):
        first = next(iter(keeping(plan, kept, [0])))
        with pytest.raises(ec.PlanError, match=r"o_proj: heads are \[.*\]; expected some of 0 to 8"):
            kept_of(first, 9)
    every = keeping(plan, [*range(9)], [0])
    moved = planned(model, every, rules=OFF)(ids).logits
    torch._dynamo.reset()
    first = next(iter(every))
    still = dataclasses.replace(first, tensors={**first.tensors, "bias": torch.zeros(72)})
    told = planned(model, ec.Plan({**dict_of(every), (first.module, "flap"): still}), rules=OFF)
    torch.testing.assert_close(told(ids).logits, model(ids).logits)
    assert not torch.allclose(moved, model(ids).logits, atol=1e-2)
    assert codes(told) == ["nothing-to-do", "switched-off"]
    with torch.enable_grad():
        told = planned(model, plan)
        told(ids)
    assert codes(told) == ["gradients"] * 2


@pytest.mark.slow
def test_padding_does_not_count() -> None:
    """A padded batch gives the heads and the bias that its rows give alone."""
    model = MAKE["grouped"]("sdpa")
    rows = [torch.randint(0, 128, (1, n)) for n in (12, 20)]
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 20 - row.shape[1] :] = row
        mask[i, 20 - row.shape[1] :] = 1
    place = (mask.cumsum(1) - 1).clamp(min=0)
    together = [{"input_ids": ids, "attention_mask": mask, "position_ids": place}]
    one, two = (ec.calibrate(model, given, [ec.flap(0.4, heads=True)], progress=False) for given in (rows, together))
    for a, b in zip(one, two, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        for name, t in a.tensors.items():
            torch.testing.assert_close(t, b.tensors[name], rtol=1e-4, atol=1e-4)


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda _: None,
    "static": lambda told: StaticCache(told.config, max_cache_len=16),
    "ours": lambda told: ec.Cache(told, key_bits=16, value_bits=16),
}


@pytest.mark.one_in(5, rest="exhaustive")
@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("unit", ["group", "query"])
def test_steps(unit: Any, cache: Any, no_inductor: list[Any]) -> None:
    """Each step's logits are those of the whole text, when lengths have become symbols, too; with FLAP's neurons."""
    model = MAKE["grouped"]("sdpa")
    plan = ec.calibrate(model, batches(), [ec.flap(0.4, heads=True, unit=unit)], progress=False)
    told, ids = planned(model, plan), batches()[0]
    whole = masked(planned_blocks(model, plan), plan)(ids, use_cache=False).logits
    cache, begin = CACHES[cache](told), 0
    for end in (9, 10, 11, 12, 13):
        out = told(ids[:, begin:end], past_key_values=cache)
        torch.testing.assert_close(out.logits, whole[:, begin:end], rtol=5e-5, atol=5e-5)
        cache, begin = out.past_key_values, end
    for graph in ec.inspect(told).graphs:
        done = [d.kind for d in graph.decisions if d.action == "rewritten" and d.kind != "attention"]
        assert done == ["ffn", "ffn", "heads", "heads"]


@pytest.mark.slow
@torch.no_grad()
def test_places_without_heads_are_told(
    grouped: tuple[nn.Module, ec.Plan], no_inductor: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A plan that speaks of a module of the graph, where nothing is that it speaks of."""
    model, plan = grouped
    first, second = plan
    key = dataclasses.replace(first, module="model.layers.0.self_attn.k_proj")
    told = planned(model, ec.Plan({(r.module, r.method): r for r in (key, second)}, plan.made))
    told(batches()[0])
    (note,) = ec.inspect(told).graphs[-1].unmatched
    assert note.startswith("plan: flap at model.layers.0.self_attn.k_proj: not applied in this graph")
    assert note in caplog.text
    torch._dynamo.reset()
    told = planned(model, plan)
    told(batches()[0])
    assert ec.inspect(told).graphs[-1].unmatched == ()


@pytest.mark.exhaustive
@pytest.mark.parametrize("cache", ["dynamic", "ours"])
def test_generate_is_a_whole_recompute(cache: str, monkeypatch: Any, tmp_path: Any) -> None:
    """Through Inductor: each token is the one that the whole text gives before it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = MAKE["grouped"]("sdpa")
    model.generation_config.eos_token_id = None
    plan = ec.calibrate(model, batches(), [ec.flap(0.4, heads=True)], progress=False)
    told, ids = planned(model, plan), batches()[0][:, :9]
    given = {"past_key_values": ec.Cache(told, key_bits=16, value_bits=16)} if cache == "ours" else {}
    with torch.no_grad():
        out = told.generate(ids, max_new_tokens=4, do_sample=False, **given)
        again = masked(planned_blocks(model, plan), plan)(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], again[:, ids.shape[1] - 1 : -1])
    done = {d.kind for d in ec.inspect(told).decisions if d.action == "rewritten"}
    assert {"heads", "ffn"} <= done


def planned_blocks(model: nn.Module, plan: ec.Plan) -> nn.Module:
    """An eager copy whose feed-forward blocks are those of the plan."""
    made = copy.deepcopy(model)
    for r in plan:
        if "kept" not in r.tensors:
            continue
        m = made.get_submodule(r.module)
        kept = r.tensors["kept"].long()
        block = FeedForward(m.up_proj.weight, m.down_proj.weight.t(), m.gate_proj.weight, "silu").neurons(kept)
        bias = r.tensors["bias"]
        m.forward = lambda x, block=block, bias=bias: block(x.flatten(0, -2)).view(x.shape) + bias
    return made

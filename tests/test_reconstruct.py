"""Rounding that is learned on data: begins at round to nearest, loses less, and is applied by a plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels import weight_ops
from effcompile.kernels.weight_ops import Packed, dequantize, round_to_nearest
from effcompile.passes.reconstruct import ENDS, ROUNDINGS, FlexRound, LowRank, Rounding, Text, reconstruct
from models import GQA, MODELS, NanoGPT, _hf

IDS = [torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(4)]
OPTIONS: dict[str, Any] = {"bits": 3, "group": 32, "iterations": 40, "lr": 3e-3}


def pass_of(method: str, **other: Any) -> Any:
    return ec.quantize_weights(**OPTIONS | {"method": method} | other)


def logits(model: nn.Module, ids: Tensor = IDS[0]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def told(model: nn.Module, plan: Any, **options: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.compile(backend="effcompile", options={"plan": plan, **options})
    return twin


def stored(model: nn.Module, plan: Any) -> nn.Module:
    """The model with what the records of a plan give back in the place of its weights."""
    twin = copy.deepcopy(model)
    for record in plan:
        module = twin.get_submodule(record.module)
        flipped = type(module).__name__ == "Conv1D"
        shape = module.weight.t().shape if flipped else module.weight.shape
        packed = Packed(record.tensors["codes"], record.tensors["scales"], record.tensors.get("zeros"))
        made = dequantize(packed, *shape, OPTIONS["bits"]).to(module.weight.dtype)
        module.weight = nn.Parameter(made.t() if flipped else made)
    return twin


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ROUNDINGS.values(), ids=ROUNDINGS)
def test_it_begins_at_round_to_nearest(kind: type[Rounding], symmetric: bool) -> None:
    weight = torch.randn(21, 83)
    weight[3] = 0.25
    one = kind(weight, 3, 40, symmetric)
    nearest = weight_ops.pack(*round_to_nearest(weight, 3, 40, symmetric), 3)
    wanted = dequantize(nearest, 21, 83, 3)
    torch.testing.assert_close(dequantize(one.packed(), 21, 83, 3), wanted, rtol=2**-10, atol=2**-12)
    torch.testing.assert_close(one.weight(), wanted, rtol=2**-10, atol=2**-9)


def ranges(one: Rounding) -> tuple[Tensor, Tensor]:
    """The first and the last number of each group."""
    step = one.log_step.detach().exp()
    return -one.zero * step, (one.levels - one.zero) * step


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ROUNDINGS.values(), ids=ROUNDINGS)
def test_ranges_are_clipped_where_outputs_lose_least(kind: type[Rounding], symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(21, 83)
    moments = torch.rand(83) ** 4
    moments[60:70] = 0.0
    weight[3] = 0.25
    one, whole = kind(weight, 3, 40, symmetric, moments), kind(weight, 3, 40, symmetric)
    (low, high), (least, largest) = ranges(one), ranges(whole)
    assert bool((low >= least - 1e-5).all() and (high <= largest + 1e-5).all())
    far, farther = (
        ((dequantize(r.packed(), 21, 83, 3) - weight).square() * moments).sum(1).sqrt() for r in (one, whole)
    )
    assert bool((far <= farther * 1.01 + 1e-3).all())
    assert far.mean() < 0.9 * farther.mean()
    assert bool((one.log_step[3] == whole.log_step[3]).all())  # nothing to clip
    torch.testing.assert_close(dequantize(one.packed(), 21, 83, 3), one.weight().detach(), rtol=2**-9, atol=2**-8)
    # All pairs of ends, of one group, by hand.
    row, size = weight[5, :40], largest[5, 0] - least[5, 0]
    lost = {}
    for a in ENDS:
        for b in [a] if symmetric else ENDS:
            first, step = least[5, 0] + a * size, size * (1 - a - b) / 7
            zero = 4.0 if symmetric else -first / step
            codes = (row / step + zero).round().clamp(0, 7)
            lost[a, b] = float((((codes - zero) * step - row).square() * moments[:40]).sum())
    a, b = min(lost, key=lambda ends: lost[ends])
    assert float(one.log_step[5, 0].detach().exp()) == pytest.approx(float(size) * (1 - a - b) / 7, rel=1e-4)


def test_an_input_that_is_never_read_counts_for_nothing() -> None:
    weight = torch.linspace(-1, 1, 8).repeat(3, 8)  # on codes, each of them
    weight[1:, 5] = 1.6
    moments = torch.ones(64)
    moments[5] = 0.0
    unread = LowRank(weight, 3, 64, False, moments)
    nothing = LowRank(weight, 3, 64, False, 0 * moments)
    moments[5] = 1000.0
    heavy = LowRank(weight, 3, 64, False, moments)
    step = 2 / 7
    far = 2.6 / 7
    steps = [one.log_step.detach().exp().flatten().tolist() for one in (unread, heavy, nothing)]
    assert steps[0] == pytest.approx([step, step, step], rel=0.02)
    assert steps[1] == pytest.approx([step, far, far], rel=0.02)
    assert steps[2] == pytest.approx([step, far, far], rel=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_of_what_linears_of_the_original_read(masked: bool) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)])
    keep = torch.rand(2, 20) > 0.5 if masked else None
    texts = [Text(x, x, [((), {})] * 3, keep) for x in torch.randn(3, 2, 20, 8).unbind()]
    wanted, x = [], torch.stack([t.x for t in texts])
    kept = (slice(None), slice(None), slice(None)) if keep is None else (slice(None), keep)
    with torch.no_grad():
        for layer in layers:
            inner = layer[1](layer[0](x))
            wanted += [x[kept].flatten(0, -2).square().mean(0), inner[kept].flatten(0, -2).square().mean(0)]
            x = layer[2](inner)
    seen: list[Tensor] = []

    def make(weight: Tensor, moments: Tensor | None) -> Rounding:
        assert moments is not None
        seen.append(moments)
        return LowRank(weight, 3, 8, False, moments)

    reconstruct(
        layers, "layers", texts, make, window=2, iterations=2, lr=1e-2, crossed=True, clipped=True, shown=lambda x: x
    )
    assert len(seen) == 6
    for found, one in zip(seen, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-6)


def test_who_clips(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    lost = {}
    for method in ROUNDINGS:
        for clip in (None, False, True):
            options = {"iterations": 0} | ({} if clip is None else {"clip": clip})
            plan = ec.calibrate(model, IDS, [pass_of(method, **options)], progress=False)
            lost[method, clip] = sum(r.numbers["error"] for r in plan)
    assert lost["cbq", None] == lost["cbq", True]
    assert lost["flexround", None] == lost["flexround", False]
    for method in ROUNDINGS:
        assert lost[method, True] < 0.95 * lost[method, False]


def test_what_stands_is_chosen_behind_the_window() -> None:
    """A layer that is worse by itself and better behind the next one is kept as it was learned."""
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2)])
    with torch.no_grad():
        layers[1][0].weight.zero_()
        layers[1][0].weight[:, 0] = 1.0  # reads the first channel only

    class Far(Rounding):
        """Learned codes that keep the first output and ruin the others."""

        def codes(self, step: Tensor) -> Tensor:
            wide = (self.rows / step + self.zero).round()
            return torch.cat([wide[:1], torch.zeros_like(wide[1:])])

    texts = [Text(x, x, [((), {})] * 2, None) for x in torch.randn(3, 1, 20, 8).unbind()]
    seen = []

    def make(weight: Tensor, _: Tensor | None) -> Rounding:
        seen.append((Far if not seen else FlexRound)(weight, 8, 8, False))
        return seen[-1]

    found = reconstruct(
        layers, "layers", texts, make, window=2, iterations=0, lr=1e-3, crossed=False, clipped=False, shown=lambda x: x
    )
    assert [one.module for one in found] == ["layers.0.0", "layers.1.0"]
    assert torch.equal(found[0].packed.codes, seen[0].packed().codes)
    assert found[0].numbers["error"] <= found[0].numbers["error_nearest"]
    alone = [Text(t.x[..., :8], t.x[..., :8], t.calls, None) for t in texts]
    seen.clear()
    short = reconstruct(
        layers, "layers", alone, make, window=1, iterations=0, lr=1e-3, crossed=False, clipped=False, shown=lambda x: x
    )
    assert not torch.equal(short[0].packed.codes, seen[0].packed().codes)


@pytest.mark.parametrize("kind", ROUNDINGS.values(), ids=ROUNDINGS)
def test_every_number_that_is_learned_has_a_gradient_and_moves_codes(kind: type[Rounding]) -> None:
    one = kind(torch.randn(16, 64), 3, 32, False)
    before = one.packed().codes
    x, target = torch.randn(40, 64), torch.randn(40, 16)
    optimiser = torch.optim.Adam(one.learned, 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        (x @ one.weight().t() - target).square().mean().backward()
        optimiser.step()
    assert all(t.grad is not None and t.grad.any() for t in one.learned)
    assert not torch.equal(one.packed().codes, before)
    # What is optimised is what is stored, up to fp16: the step is rounded, and the zero.
    largest = one.log_step.exp().max() * 8 * 2**-10 + one.zero.abs().max() * one.log_step.exp().max() * 2**-10
    got = dequantize(one.packed(), 16, 64, 3)
    assert (got - one.weight()).abs().max() <= largest


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_layers_lose_less_and_a_plan_applies_it(
    name: str, method: str, no_inductor: list[Any], tmp_path: Path, no_fallback: None
) -> None:
    model = MODELS[name]("sdpa")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    plan = ec.calibrate(model, IDS, [pass_of(method)], progress=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    errors = [(r.numbers["error"], r.numbers["error_nearest"]) for r in plan]
    assert all(0 < error <= nearest for error, nearest in errors)
    assert sum(e for e, _ in errors) < 0.9 * sum(n for _, n in errors)
    plan.save(tmp_path)
    ours = told(model, tmp_path)
    torch.testing.assert_close(logits(ours), logits(stored(model, plan)), rtol=1e-4, atol=1e-4)
    rows = [d for d in ec.inspect(ours).decisions if d.kind == "linear"]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert len(plan) == len(rows) == len(linears) - 1
    assert {d.form for d in rows} == {f"w3g32 {method}"}


@pytest.mark.slow
def test_no_steps_are_round_to_nearest(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, IDS, [pass_of("flexround", iterations=0)], progress=False)
    plain = copy.deepcopy(model)
    plain.compile(backend="effcompile", options={"quantize_weights": {"bits": 3, "group": 32}})
    torch.testing.assert_close(logits(told(model, plan)), logits(plain), rtol=1e-2, atol=1e-2)


def test_the_same_again() -> None:
    model, plan = MODELS["llama"]("sdpa"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        plan.append(ec.calibrate(model, IDS, [pass_of("cbq", iterations=3)], progress=False).text)
    assert plan[0] == plan[1]


def test_a_window_that_is_wider_than_the_model(no_inductor: list[Any]) -> None:
    model = _hf("Llama", **GQA | {"num_hidden_layers": 1})("sdpa")
    plan = ec.calibrate(model, IDS, [pass_of("cbq")], progress=False)
    assert len(plan) == 7


def test_padding_does_not_count() -> None:
    model = MODELS["llama"]("sdpa")
    row = IDS[0][:1]
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.nn.functional.pad(row, (6, 0), value=3)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    batches: list[Any] = [row, {"input_ids": padded, "attention_mask": mask, "position_ids": position}]
    alone, together = (
        ec.calibrate(model, [one], [pass_of("flexround", iterations=0)], progress=False) for one in batches
    )
    for one, two in zip(alone, together, strict=True):
        assert one.numbers["error_nearest"] == pytest.approx(two.numbers["error_nearest"], rel=1e-3)


def test_without_a_plan_with_other_options_and_for_other_weights(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    bare = copy.deepcopy(model)
    bare.compile(backend="effcompile", options={"quantize_weights": OPTIONS | {"method": "cbq"}})
    logits(bare)
    left = {d.reason.code for d in ec.inspect(bare).decisions if d.kind == "linear" and d.reason}
    assert left == {"no-plan", "head"}
    plan = ec.calibrate(model, IDS[:1], [pass_of("flexround", iterations=1)], progress=False)
    other = {"rules": {"model.layers.0": {"quantize_weights": {"bits": 4, "method": "cbq"}}}}
    twin = told(model, plan, **other)
    logits(twin)
    rows = {d.module: d for d in ec.inspect(twin).decisions if d.kind == "linear"}
    assert {d.reason.code if d.reason else "" for m, d in rows.items() if "layers.0" in m} == {"other-options"}
    assert {d.action for m, d in rows.items() if "layers.1" in m} == {"rewritten"}
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(Exception, match=r"quantize_weights at model\.layers\.1\.mlp\.up_proj: the linear weights are"):
        logits(told(changed, plan))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: ec.calibrate(m, [], [pass_of("cbq")]), ec.CalibrationError, "batches is empty"),
        (lambda m: ec.calibrate(m, IDS, [ec.quantize_weights()]), TypeError, "is not calibrated"),
        (lambda m: ec.calibrate(NanoGPT(), IDS, [pass_of("cbq")]), ec.CalibrationError, "one after another"),
        (lambda m: ec.calibrate(nn.Linear(8, 8), [torch.ones(1, 8)], [pass_of("cbq")]), ec.CalibrationError, "no list"),
        (lambda m: pass_of("cbq", iterations=-1), ec.OptionError, "expected 0 or more"),
        (lambda m: pass_of("rtn", clip=False), ec.OptionError, "clip=False needs data"),
    ],
)
def test_what_cannot_be_calibrated(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(MODELS["llama"]("sdpa"))


@pytest.mark.exhaustive
def test_on_a_real_model_learned_rounding_loses_less(smollm2: tuple[Any, Any]) -> None:
    """3 bits in groups of 64: perplexity on other text than was learned on, beside round to nearest."""
    from effcompile import smollm2 as home

    model, tokenizer = smollm2
    text = home.topics(tokenizer)
    given = list(text[0, 40_000 : 40_000 + 8 * 256].view(8, 1, 256))
    first, _ = home.TOPICS
    measured = text[:, first : first + 2048].split(1024, 1)
    found = {}
    # No steps of FlexRound are round to nearest.
    for name, iterations in (("flexround", 0), ("flexround", 20), ("cbq", 20)):
        chosen = ec.quantize_weights(bits=3, group=64, method=name, iterations=iterations)
        twin = stored(model, ec.calibrate(model, given, [chosen], progress=False))
        losses = [
            torch.nn.functional.cross_entropy(logits(twin, part)[0, :-1].float(), part[0, 1:]) for part in measured
        ]
        found[name if iterations else "rtn"] = float(torch.stack(losses).mean().exp())
    print(found)
    assert found["flexround"] < found["rtn"]
    assert found["cbq"] < found["rtn"]

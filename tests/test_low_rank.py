"""Linears of low rank, from calibration to compiled code: what factors lose, where they stand, and what stays dense."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec
from effcompile.passes import calibrate_linear
from models import MODELS

SQUARE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
}
"""Of every linear the smaller side is 64."""


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SQUARE | config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return made


def phi3() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SQUARE)).eval()


BATCHES = [torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(2)]
ROWS = [torch.ones(40, 64)]
UNIFORM: dict[str, Any] = {"planner": "uniform", "round_to": 1}


def calibrated(model: nn.Module, batches: Any = BATCHES, **options: Any) -> ec.Plan:
    return ec.calibrate(model, batches, [ec.low_rank(**UNIFORM | options)], progress=False)


def planned(model: nn.Module, plan: Any, **options: Any) -> nn.Module:
    """The model compiled with a plan, on the same weights."""
    made = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    made.compile(backend="effcompile", options={"plan": plan, **options})
    return made


def factored(model: nn.Module, plan: ec.Plan) -> nn.Module:
    """An eager copy whose linears have the products of the factors as their weights."""
    made = copy.deepcopy(model)
    for record in plan:
        linear: Any = made.get_submodule(record.module)
        if "up" not in record.tensors:
            continue
        t = record.tensors
        weight = t["up"] @ t["down"]
        linear.weight = nn.Parameter(weight.t() if hasattr(linear, "nf") else weight)
        if "shift" in t:
            linear.bias = nn.Parameter(t["shift"] + (0 if linear.bias is None else linear.bias.detach()))
    return made


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids, use_cache=False).logits
    return out


def decisions(model: nn.Module) -> dict[str, Any]:
    return {d.module: d for d in ec.inspect(model).decisions if d.kind == "linear"}


def codes(model: nn.Module) -> dict[str, str]:
    return {name: d.reason.code if d.reason else d.action for name, d in decisions(model).items()}


@pytest.fixture(scope="module")
def half() -> tuple[nn.Module, ec.Plan]:
    """A model, and a plan that keeps half of each linear."""
    model = llama()
    return model, calibrated(model, ratio=0.5)


def gpt2() -> nn.Module:
    return MODELS["gpt2"]("sdpa")


FULL = [(llama, 64, "whitened"), (gpt2, 128, "asvd")]
EVERY = [
    (made, rank, how) for made, rank in ((llama, 64), (phi3, 64), (gpt2, 128)) for how in ("svd", "asvd", "whitened")
]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(
    ("made", "rank", "method"),
    [*FULL, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in FULL)],
)
def test_full_rank_is_eager(made: Any, rank: int, method: str, no_inductor: list[Any]) -> None:
    """Fused and transposed weights, with biases and without."""
    model = made()
    plan = calibrated(model, method=method, rank=rank, break_even=False)
    told = planned(model, plan)
    torch.testing.assert_close(logits(told, BATCHES[0]), logits(model, BATCHES[0]), rtol=5e-5, atol=5e-5)
    found = codes(told)
    assert set(found.values()) == {"rewritten"}
    assert len(found) == len(plan) == sum(len(record.tensors) >= 2 for record in plan)


@pytest.mark.parametrize(
    ("made", "bias"),
    [(gpt2, True), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((gpt2, False), (llama, True)))],
)
def test_what_runs_is_what_the_factors_say(made: Any, bias: bool, no_inductor: list[Any]) -> None:
    model = made()
    plan = calibrated(model, ratio=0.5, bias=bias)
    assert all(("shift" in record.tensors) is bias for record in plan)
    ids = BATCHES[0][:, :17]
    wanted = logits(factored(model, plan), ids)
    torch.testing.assert_close(logits(planned(model, plan), ids), wanted, rtol=5e-5, atol=5e-5)
    assert not torch.allclose(wanted, logits(model, ids), atol=1e-2)


def test_all_of_it_is_the_model_itself(no_inductor: list[Any]) -> None:
    model = llama()
    told = planned(model, calibrated(model, ratio=1.0))
    assert torch.equal(logits(told, BATCHES[0]), logits(model, BATCHES[0]))
    assert set(codes(told).values()) == {"kept-dense"}


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prompt_and_steps(inductor: bool, half: tuple[nn.Module, ec.Plan], request: pytest.FixtureRequest) -> None:
    """Steps run the kernel; each token they give is the one that the whole text gives before it."""
    model, plan = half
    if not inductor:
        request.getfixturevalue("no_inductor")
    told, ids = planned(model, plan), BATCHES[0][:, :9]
    with torch.no_grad():
        out = told.generate(ids, max_new_tokens=4, do_sample=False)
    wanted = logits(factored(model, plan), out).argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], wanted[:, ids.shape[1] - 1 : -1])
    report = ec.inspect(told)
    assert {d.rule for d in report.decisions if d.kind == "linear" and d.action == "rewritten"} == {"plan"}
    assert [kernel.name for kernel in report.kernels] == ["low_rank_linear_f32"]
    assert "low_rank.h" in report.kernels[0].source
    # Half of the parameters, but for the bias and the rounding of ranks.
    row = next(d for d in report.decisions if d.module.endswith("q_proj") and d.action == "rewritten")
    assert row.flops_after == pytest.approx(0.5 * row.flops_before, rel=0.08)


def test_sensitivity_and_the_other_planners(no_inductor: list[Any]) -> None:
    """One pass over the data for all; each keeps to the budget, and the records say what was measured."""
    from effcompile.passes.calibrate_linear import each_linear

    model = llama()
    names = ("sensitivity", "energy", "lorc", "uniform")
    methods = [ec.low_rank(planner=name, round_to=4, ratio=0.6).options for name in names]
    plans = dict(zip(names, each_linear(model, BATCHES, methods, progress=False), strict=True))
    whole = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    for plan in plans.values():
        assert 0.5 * whole < sum(record.numbers["parameters"] for record in plan) <= 0.6 * whole
        assert all(record.numbers["rank"] % 4 == 0 for record in plan if record.tensors)
    measured = [record.numbers["kl"] for record in plans["sensitivity"] if record.tensors]
    assert measured
    assert min(measured) > 0
    # What is measured is the divergence with one linear factored: of the whole, each is a part.
    one = next(record for record in plans["uniform"] if record.module.endswith("layers.1.mlp.down_proj"))
    ids = BATCHES[0][:1]
    with torch.no_grad():
        theirs = logits(model, ids)[0].log_softmax(-1)
        ours = logits(factored(model, ec.Plan({(one.module, one.method): one})), ids)[0].log_softmax(-1)
    divergence = float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))
    again = {record.module: record for record in plans["sensitivity"]}[one.module].numbers
    # A square of what the outputs lose, near the model's own weights.
    assert again["kl"] / again["error"] ** 2 == pytest.approx(divergence / one.numbers["error"] ** 2, rel=0.02)


def test_files_other_weights_and_a_change_later(
    half: tuple[nn.Module, ec.Plan], tmp_path: Path, no_inductor: list[Any]
) -> None:
    model, plan = half
    plan.save(tmp_path)
    assert not plan.diff(ec.Plan.load(tmp_path))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    told = planned(model, tmp_path)
    assert torch.equal(logits(told, BATCHES[0]), logits(planned(model, plan), BATCHES[0]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    other = copy.deepcopy(model)
    compiled = planned(other, plan)
    logits(compiled, BATCHES[0])
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[3, 5] += 1
    with pytest.raises(ec.PlanError, match=r"model\.layers\.1\.self_attn\.k_proj: its weights are not those"):
        logits(compiled, BATCHES[0])
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"low_rank at model\.layers\.1\.self_attn\.k_proj: the linear weights"):
        logits(planned(other, plan), BATCHES[0])


def test_rules_and_other_methods(half: tuple[nn.Module, ec.Plan], no_inductor: list[Any]) -> None:
    """Switched off for a part, other options for another; the linears of a block that a method takes are taken."""
    model, plan = half
    teal = ec.calibrate(model, BATCHES, [ec.teal(0.4)], progress=False)
    both = ec.Plan({(r.module, r.method): r for r in (*plan, *teal)})
    rules = {
        "model.layers.0.self_attn": {"low_rank": False},
        "model.layers.1.self_attn.q_proj": {"low_rank": {"ratio": 0.7}},
    }
    told = planned(model, both, rules=rules)
    logits(told, BATCHES[0])
    found = codes(told)
    assert found["model.layers.0.self_attn.q_proj"] == "switched-off"
    assert found["model.layers.1.self_attn.q_proj"] == "other-options"
    assert found["model.layers.1.self_attn.k_proj"] == "rewritten"
    assert {found[f"model.layers.{n}.mlp.{p}_proj"] for n in (0, 1) for p in ("up", "gate", "down")} == {"taken"}


def test_asked_for_without_a_plan_or_without_no_grad(half: tuple[nn.Module, ec.Plan], no_inductor: list[Any]) -> None:
    model, plan = half
    bare = ec.low_rank()(copy.deepcopy(model))
    bare.compile(backend="effcompile")
    logits(bare, BATCHES[0])
    assert set(codes(bare).values()) == {"head", "no-plan"}
    assert codes(bare)["lm_head"] == "head"
    told = planned(model, plan)
    told(BATCHES[0], use_cache=False)
    assert set(codes(told).values()) == {"gradients"}


def test_break_even_says_both_numbers(no_inductor: list[Any]) -> None:
    model = llama()
    told = planned(model, calibrated(model, rank=36, bias=False))
    logits(told, BATCHES[0])
    found = decisions(told)
    left = found["model.layers.0.self_attn.q_proj"].reason
    assert left.code == "break-even"
    assert left.text == "factors of rank 36 would have 4,608 parameters, and the weight has 4,096"
    assert found["model.layers.0.mlp.up_proj"].action == "rewritten"


class Tied(nn.Module):
    """Two linears on one weight, beside one of its own; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 32)
        self.one, self.two, self.own = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return F.linear(self.own(self.two(self.one(x).relu())), self.embed.weight)


def test_tied_weights_stay_and_say_so(no_inductor: list[Any]) -> None:
    model = Tied().eval()
    plan = calibrated(model, ratio=0.5, head=True)
    assert [record.module for record in plan] == ["own"]
    told = planned(model, plan, low_rank={"head": True})
    with torch.no_grad():
        told(BATCHES[0])
    found = decisions(told)
    assert "in two: that stays" in found["one"].reason.text
    assert "in one: that stays" in found["two"].reason.text
    assert "embedding in embed" in found[""].reason.text
    assert found["own"].action == "rewritten"
    assert len(plan.made["left"]) == 3


class Wrapped(nn.Parameter):
    """A weight as libraries that quantise have them: a tensor of a class of its own."""


class Packed(nn.Linear):
    """A linear whose product is another operator's, as bitsandbytes has them."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1)


def test_quantised_layers_of_other_libraries_are_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.packed, self.wrapped = nn.Linear(32, 32), Packed(32, 32), nn.Linear(32, 32)
            self.wrapped.weight = Wrapped(self.wrapped.weight.detach())

        def forward(self, x: Tensor) -> Tensor:
            return self.wrapped(self.packed(self.plain(x)).relu()).tanh()

    model = Mixed()
    assert type(model.wrapped.weight) is not nn.Parameter
    plan = calibrated(model, [torch.randn(50, 32)], ratio=0.5)
    assert [record.module for record in plan] == ["plain"]
    left = {name: text for text, names in plan.made["left"].items() for name in names}
    assert "no linear was seen there; quantised layers of other libraries" in left["packed"]
    assert "Wrapped, of another library" in left["wrapped"]


@pytest.mark.slow
def test_adapters_stay_beside_the_factors(no_inductor: list[Any]) -> None:
    """A linear with LoRA is three linears: the wide one is factored, the thin ones are of low rank already."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.base_layer = nn.Linear(64, 64)
            self.lora_A, self.lora_B = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))).tanh()

    model, x = Lora().eval(), torch.randn(60, 64)
    plan = calibrated(model, [x], rank=8, round_to=8)
    told = planned(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(told(x), factored(model, plan)(x))
    assert codes(told) == {"base_layer": "rewritten", "lora_A": "rewritten"}


@pytest.mark.slow
def test_half_precision(no_inductor: list[Any]) -> None:
    model = llama().bfloat16()
    plan = calibrated(model, ratio=0.7)
    assert {t.dtype for record in plan for t in record.tensors.values()} == {torch.bfloat16}
    told, wide = planned(model, plan), factored(model, plan).double()
    exact = logits(wide, BATCHES[0])
    lost = (logits(factored(model, plan), BATCHES[0]).double() - exact).norm()
    assert (logits(told, BATCHES[0]).double() - exact).norm() < 1.5 * lost


@pytest.mark.slow
def test_hidden_tokens_do_not_count() -> None:
    model = llama()
    ids = BATCHES[0][:1]
    mask = torch.ones_like(ids)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    hidden = torch.cat([torch.zeros(1, 9, dtype=torch.long), mask], 1)
    position = (hidden.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": padded, "attention_mask": hidden, "position_ids": position}
    one, two = calibrated(model, [ids], ratio=0.5), calibrated(model, [given], ratio=0.5)
    for a, b in zip(one, two, strict=True):
        assert a.numbers["error"] == pytest.approx(b.numbers["error"], rel=1e-4)


class NoTokens(nn.Module):
    """Rows in, rows out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: ec.low_rank(ratio=0.0), ec.OptionError, "above 0"),
        (lambda: ec.low_rank(ratio=1.2), ec.OptionError, "at most 1"),
        (lambda: ec.low_rank(rank=0), ec.OptionError, "1 or more"),
        (lambda: ec.low_rank(method="pca"), ec.OptionError, "'svd' | 'asvd'"),
        (lambda: ec.low_rank(planner="best"), ec.OptionError, "'sensitivity' |"),
        (lambda: ec.low_rank(damping=-1.0), ec.OptionError, "0 or more"),
        (lambda: ec.low_rank(round_to=0), ec.OptionError, "1 or more"),
        (lambda: ec.low_rank(break_even=False), ec.OptionError, "give rank"),
        (lambda: calibrated(llama(), rank=65), ec.CalibrationError, r"layers\.0\.self_attn\.q_proj has at most 64"),
        (lambda: calibrated(llama(), ratio=0.001), ec.CalibrationError, "the smallest ranks keep"),
        (lambda: calibrated(nn.Tanh(), [torch.ones(2, 4)]), ec.CalibrationError, "no linear was found"),
        (lambda: calibrated(NoTokens(), ROWS, planner="sensitivity"), ec.CalibrationError, "no logits"),
        (lambda: calibrated(llama(), []), ec.CalibrationError, "batches is empty"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("|", r"\|")):
        call()


def test_activations_that_are_no_numbers() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(ec.CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj reads hold NaN"):
        calibrated(model)


@pytest.mark.slow
def test_a_plan_that_was_edited_badly(half: tuple[nn.Module, ec.Plan], no_inductor: list[Any]) -> None:
    model, plan = half
    record = plan.get("model.layers.0.mlp.up_proj", "low_rank")
    assert record is not None
    record = ec.Plan({(record.module, record.method): record}).get(record.module, "low_rank")
    for name, tensor, said in (
        ("down", record.tensors["down"][1:], "down has shape"),
        ("up", record.tensors["up"][1:], "up has shape"),
        ("up", record.tensors["up"] * torch.nan, "NaN or infinity"),
    ):
        bad = dataclasses.replace(record, tensors={**record.tensors, name: tensor})
        with pytest.raises(Exception, match=said):
            logits(planned(model, ec.Plan({(bad.module, bad.method): bad})), BATCHES[0])


@pytest.mark.slow
def test_routers_are_not_touched(no_inductor: list[Any]) -> None:
    from mixtures import MIXTURES

    model = MIXTURES["mixtral"].make(2)
    ids = BATCHES[0] % model.config.vocab_size
    plan = calibrated(model, [ids], ratio=0.7)
    told = planned(model, plan)
    logits(told, ids)
    routers = {f"model.layers.{n}.mlp.gate" for n in range(model.config.num_hidden_layers)}
    (left,) = [set(names) for text, names in plan.made["left"].items() if "scores experts" in text]
    assert left == routers
    done = {d.module for d in ec.inspect(told).decisions if d.kind == "linear" and d.action == "rewritten"}
    assert done
    assert not done & routers


@pytest.mark.parametrize("text", [slice(0, 700), slice(900, 1000)])
def test_the_probe_ends_in_the_text(text: slice) -> None:
    """Whichever side padding is on: the last tokens are those that are measured."""
    mask = torch.zeros(2, 1000, dtype=torch.long)
    mask[0, text] = 1
    ids = torch.arange(1000).expand(2, -1)
    found = calibrate_linear._start_of({"input_ids": ids, "attention_mask": mask})
    assert found["input_ids"].shape == (1, 512)
    assert found["input_ids"][0, -1] == text.stop - 1
    assert found["attention_mask"][0, -1]
    assert calibrate_linear._start_of({"input_ids": ids})["input_ids"].tolist() == [list(range(512))]

"""Calibrating, and what plans do: forms in the place of feed-forward blocks, files, other weights, and bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import effcompile as ec
from effcompile.cli import app
from effcompile.kernels.ffn import FeedForward
from effcompile.passes import base
from effcompile.passes.backend import effcompile as backend
from effcompile.runtime.statistics import Magnitudes, Moments, Rows, Samples, TopMarkers
from models import MODELS

SETTINGS: dict[str, dict[str, Any]] = {
    "carve_moe": {"shared": 2, "active": 3, "experts": 8},
    "flap": {"ratio": 0.25, "round_to": 1},
    "teal": {"sparsity": 0.4},
    "wina": {"sparsity": 0.4},
}
"""Every method that is calibrated, at a setting that is not exact."""
GATED = ("llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "opt")))
"""Gated, fused, and two without a gate; linears in three spellings."""


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(2)]


def planned(model: nn.Module, plan: ec.Plan, **options: Any) -> nn.Module:
    """The model compiled with a plan, on the same weights."""
    made = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    made.compile(backend="effcompile", options={"plan": plan, **options})
    return made


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids, use_cache=False).logits
    return out


def pass_of(name: str, **options: Any) -> Any:
    return getattr(ec, name)(**options)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("architecture", GATED)
@pytest.mark.parametrize("method", SETTINGS)
def test_limit_is_eager(method: str, architecture: str, batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS[architecture]("sdpa")
    plan = ec.calibrate(model, batches, [pass_of(method, **base.get(method).limit)], progress=False)
    assert len(plan) == 2
    ids = batches[0][:, :17]
    torch.testing.assert_close(logits(planned(model, plan), ids), logits(model, ids), rtol=2e-5, atol=2e-5)
    assert sum(t.startswith("effcompile_weight") for t in dict(no_inductor[0].named_parameters()))
    assert all(record.numbers["error"] < 1e-5 for record in plan)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("architecture", GATED)
@pytest.mark.parametrize("method", SETTINGS)
def test_form_is_what_the_reference_says(
    method: str, architecture: str, batches: list[Tensor], no_inductor: list[Any]
) -> None:
    """The last block alone is rewritten: then its input is that of the dense model."""
    model = MODELS[architecture]("sdpa")
    chosen = pass_of(method, **SETTINGS[method])
    plan = ec.calibrate(model, batches, [chosen], progress=False)
    last = list(plan)[-1]
    only = ec.Plan({(last.module, last.method): last})
    ids = batches[0]
    expected = copy.deepcopy(model)
    block = block_of(model.get_submodule(last.module), architecture)
    approximate = chosen.options.approximate(block, last)
    replace(expected.get_submodule(last.module), architecture, approximate)
    assert 1e-4 < last.numbers["error"] < 1
    torch.testing.assert_close(logits(planned(model, only), ids), logits(expected, ids), rtol=3e-5, atol=3e-5)
    assert not torch.allclose(logits(expected, ids), logits(model, ids), atol=1e-3)


def block_of(module: Any, architecture: str) -> FeedForward:
    """A block's weights, read from the modules: what the matcher must find by itself."""
    m = module
    if architecture == "llama":
        return FeedForward(m.up_proj.weight, m.down_proj.weight.t(), m.gate_proj.weight, "silu")
    if architecture == "phi3":
        gate, up = m.gate_up_proj.weight.chunk(2)
        return FeedForward(up, m.down_proj.weight.t(), gate, "silu")
    if architecture == "gpt2":
        one, two = m.c_fc, m.c_proj
        return FeedForward(one.weight.t(), two.weight, None, "gelu_tanh", one.bias, None, two.bias)
    one, two = m.fc1, m.fc2
    return FeedForward(one.weight, two.weight.t(), None, "relu", one.bias, None, two.bias)


def replace(module: Any, architecture: str, run: Any) -> None:
    """Let ``run`` be the block of a module."""

    def whole(x: Tensor) -> Tensor:
        return run(x.flatten(0, -2)).view(x.shape)

    if architecture == "opt":
        module.fc1, module.activation_fn, module.fc2 = nn.Identity(), nn.Identity(), Whole(whole)
    else:
        module.forward = whole


class Whole(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(x)
        return out


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_through_inductor_prompt_and_steps(method: str, batches: list[Tensor]) -> None:
    """One plan, prompts and steps: ``generate`` gives what a second compiled copy gives, and weights are made once."""
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [pass_of(method, **SETTINGS[method])], progress=False)
    ids = batches[0][:, :9]
    told = planned(model, plan)
    with torch.no_grad():
        out = told.generate(ids, max_new_tokens=4, do_sample=False)
        again = told(out, use_cache=False).logits.argmax(-1)
    # Each token that a step gave is the one that the whole text gives before it.
    assert torch.equal(out[:, ids.shape[1] :], again[:, ids.shape[1] - 1 : -1])
    report = ec.inspect(told)
    rows = [d for d in report.decisions if d.kind == "ffn"]
    assert rows
    assert {d.action for d in rows} == {"rewritten"}
    assert {d.rule for d in rows} == {"plan"}


def test_state_dict_stays(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = ec.calibrate(model, batches, [ec.carve_moe(2, 3, 8)], progress=False)
    logits(planned(model, plan), batches[0])
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("method", SETTINGS)
def test_files(method: str, batches: list[Tensor], tmp_path: Path, no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [pass_of(method, **SETTINGS[method])], progress=False)
    plan.save(tmp_path / "plan")
    again = ec.Plan.load(tmp_path / "plan")
    assert again.text == plan.text
    assert again.made == plan.made
    assert not plan.diff(again)
    one, two = (logits(planned(model, p), batches[0]) for p in (plan, tmp_path / "plan"))
    assert torch.equal(one, two)


def test_edited_by_hand(batches: list[Tensor], tmp_path: Path, no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.flap(0.5)], progress=False)
    plan.save(tmp_path)
    content = json.loads((tmp_path / "plan.json").read_text())
    gone = content["records"].pop(0)["module"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    told = planned(model, ec.Plan.load(tmp_path))
    logits(told, batches[0])
    done = [d.module for d in ec.inspect(told).decisions if d.kind == "ffn" and d.action == "rewritten"]
    assert done == [r.module for r in plan if r.module != gone]


def test_other_weights_are_refused(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.teal(0.4)], progress=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(Exception, match=r"teal at model\.layers\.1\.mlp: the up weights are not those"):
        logits(planned(other, plan), batches[0])


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_weights_that_change_later(how: str, batches: list[Tensor], no_inductor: list[Any]) -> None:
    """Equal ones may come in their place, others not: the compiled code has prepared ones of its own."""
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.teal(0.4)], progress=False)
    told = planned(model, plan)
    expected = logits(told, batches[0])
    linear = told.model.layers[0].mlp.down_proj
    for factor in (1.0, 2.0):
        with torch.no_grad():
            if how == "written":
                linear.weight.mul_(factor)
            else:
                linear.weight = nn.Parameter(linear.weight * factor)
        if factor == 1:
            assert torch.equal(logits(told, batches[0]), expected)
            continue
        with pytest.raises(Exception, match=r"model\.layers\.0\.mlp: (its|the down) weights are not those"):
            logits(told, batches[0])


def test_a_copy_of_the_model(batches: list[Tensor], no_inductor: list[Any]) -> None:
    """Its weights are equal ones, in other places; Dynamo may give it the same code."""
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.carve_moe(2, 3, 8)], progress=False)
    expected = logits(planned(model, plan), batches[0])
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(logits(planned(twin, plan), batches[0]), expected)


def test_rows_that_a_view_folds_between_the_linears(no_inductor: list[Any]) -> None:
    class Folded(Flat):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            middle = F.relu(x.flatten(0, 1) @ self.up[0].T)
            return middle.view(*x.shape[:2], -1) @ self.down[0].T

    model, ids = Folded(1), torch.randint(0, 128, (2, 24))
    told = planned(model, ec.calibrate(model, [ids], [ec.flap(0.25)], progress=False))
    with torch.no_grad():
        assert torch.equal(told(ids), model(ids))
    (row,) = [d for d in ec.inspect(told).decisions if d.kind == "ffn"]
    assert row.reason is not None
    assert "folds or unfolds its rows" in row.reason.text


def test_rule_with_other_options_stays(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.teal(0.4)], progress=False)
    told = planned(model, plan, rules={"model.layers.0.mlp": {"teal": {"sparsity": 0.5}}})
    logits(told, batches[0])
    rows = {d.module: d for d in ec.inspect(told).decisions if d.kind == "ffn"}
    left = rows["model.layers.0.mlp"].reason
    assert left is not None
    assert left.code == "other-options"
    assert rows["model.layers.1.mlp"].action == "rewritten"


def test_off_by_rule(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.teal(0.4)], progress=False)
    told = planned(model, plan, rules={"model.layers.*": {"teal": False}})
    assert torch.equal(logits(told, batches[0]), logits(model, batches[0]))
    assert {d.reason.code for d in ec.inspect(told).decisions if d.kind == "ffn" and d.reason} == {"switched-off"}


def test_decorated_without_a_plan(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = ec.flap(0.5)(MODELS["llama"]("sdpa"))
    model.compile(backend="effcompile")
    logits(model, batches[0])
    assert {d.reason.code for d in ec.inspect(model).decisions if d.kind == "ffn" and d.reason} == {"no-plan"}


def test_gradients_stay(batches: list[Tensor], no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, batches, [ec.flap(0.5)], progress=False)
    told = planned(model, plan)
    told(batches[0], use_cache=False)
    assert {d.reason.code for d in ec.inspect(told).decisions if d.kind == "ffn" and d.reason} == {"gradients"}


def test_padding_does_not_count() -> None:
    """A padded batch gives the plan that its rows give alone."""
    model = MODELS["llama"]("sdpa")
    rows = [torch.randint(0, 128, (1, n)) for n in (12, 20)]
    padded = torch.zeros(2, 20, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, 20 - row.shape[1] :] = row
        mask[i, 20 - row.shape[1] :] = 1
    alone = ec.calibrate(model, rows, [ec.flap(0.5), ec.wina(0.5)], progress=False)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    together = ec.calibrate(
        model,
        [{"input_ids": padded, "attention_mask": mask, "position_ids": position}],
        [ec.flap(0.5), ec.wina(0.5)],
        progress=False,
    )
    for one, two in zip(alone, together, strict=True):
        for name, t in one.tensors.items():
            torch.testing.assert_close(t, two.tensors[name], rtol=1e-4, atol=1e-4)
    assert alone.made["tokens"] == together.made["tokens"] == 32


class Flat(nn.Module):
    """Hand-written: the blocks of all layers in one module, where paths do not tell them apart."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 32)
        self.up = nn.ParameterList(torch.randn(64, 32) * 0.3 for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(32, 64) * 0.3 for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + F.relu(x @ up.T) @ down.T
        return x


@pytest.mark.parametrize("method", SETTINGS)
def test_plain_pytorch(method: str, no_inductor: list[Any]) -> None:
    """A model that is not of transformers, called with a tensor: three blocks in one module are three records."""
    model, ids = Flat(), torch.randint(0, 128, (2, 24))
    plan = ec.calibrate(model, [ids], [pass_of(method, **base.get(method).limit)], progress=False)
    assert [record.module for record in plan] == ["", "#1", "#2"]
    told = planned(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(told(ids), model(ids), rtol=5e-5, atol=5e-5)
    rows = [d for d in ec.inspect(told).decisions if d.kind == "ffn"]
    assert [d.action for d in rows] == ["rewritten"] * 3


def test_model_is_not_changed(batches: list[Tensor]) -> None:
    model = ec.compress_kv()(MODELS["llama"]("sdpa")).train()
    keys = set(vars(model))
    ec.calibrate(model, batches, [ec.flap()], progress=False)
    assert model.training
    assert set(vars(model)) == keys
    assert ec.options_of(model)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda m, b: ec.calibrate(m, [], [ec.flap()]), ec.CalibrationError, "batches is empty"),
        (lambda m, b: ec.calibrate(m, b, []), TypeError, "passes is empty"),
        (lambda m, b: ec.calibrate(m, b, [ec.compress_kv()]), TypeError, "is not calibrated"),
        (lambda m, b: ec.calibrate(m, b, [ec.carve_moe(experts=7)]), ec.CalibrationError, "do not divide.*near are"),
        (lambda m, b: ec.calibrate(m, [b[0][:1, :5]], [ec.carve_moe()]), ec.CalibrationError, "5 tokens.*too few"),
        (lambda m, b: ec.calibrate(nn.Linear(4, 4), [torch.ones(2, 4)], [ec.flap()]), ec.CalibrationError, "no site"),
        (lambda m, b: ec.flap(ratio=1.5), ec.OptionError, "a share from 0 to 1"),
        (lambda m, b: ec.teal(sparsity=1.0), ec.OptionError, "below 1"),
        (lambda m, b: ec.carve_moe(shared=9), ec.OptionError, "expected 0 to all"),
        (lambda m, b: ec.carve_moe(active=6), ec.OptionError, "5 experts are routed"),
        (lambda m, b: backend(None, [], options={"plan": 3}), ec.OptionError, "give an effcompile.Plan"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], told: str, batches: list[Tensor]) -> None:
    with pytest.raises(error, match=told):
        call(MODELS["llama"]("sdpa"), batches)


def test_activations_that_are_no_numbers(batches: list[Tensor]) -> None:
    model = MODELS["llama"]("sdpa")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(ec.CalibrationError, match=r"model\.layers\.1\.mlp hold NaN"):
        ec.calibrate(model, batches, [ec.flap()], progress=False)


def test_broken_files(batches: list[Tensor], tmp_path: Path) -> None:
    plan = ec.calibrate(MODELS["llama"]("sdpa"), batches, [ec.flap(0.5)], progress=False)
    plan.save(tmp_path)
    good = (tmp_path / "plan.json").read_text()
    for text, told in (
        ("{", "not a plan"),
        ("[]", "not a plan of effcompile"),
        (good.replace('"version": 1', '"version": 9'), "version 9"),
        (good.replace('"kept"', '"keep"'), "keep of flap at model.layers.0.mlp are not there"),
        (good.replace("model.layers.1.mlp", "model.layers.0.mlp"), "two records of flap"),
        (good.replace('"options"', '"option"'), "cannot be read"),
    ):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ec.PlanError, match=told):
            ec.Plan.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        ec.Plan.load(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text(good)
    (tmp_path / "plan.safetensors").write_bytes(b"nothing")
    with pytest.raises(ec.PlanError, match="not a plan"):
        ec.Plan.load(tmp_path)


def test_command_line(batches: list[Tensor], tmp_path: Path) -> None:
    model = MODELS["llama"]("sdpa")
    for ratio in (0.25, 0.5):
        ec.calibrate(model, batches, [ec.flap(ratio)], progress=False).save(tmp_path / str(ratio))
    run = CliRunner().invoke
    shown = run(app, ["plan", "show", str(tmp_path / "0.5"), "--json"])
    assert shown.exit_code == 0
    assert len(json.loads(shown.stdout)["records"]) == 2
    assert "model.layers.0.mlp" in run(app, ["plan", "show", str(tmp_path / "0.5")]).stdout
    assert run(app, ["plan", "diff", str(tmp_path / "0.5"), str(tmp_path / "0.5")]).exit_code == 0
    differing = run(app, ["plan", "diff", str(tmp_path / "0.25"), str(tmp_path / "0.5")])
    assert differing.exit_code == 1
    assert "flap at model.layers.0.mlp: options: ratio: 0.25 -> 0.5" in differing.stdout
    assert run(app, ["plan", "show", str(tmp_path)]).exit_code == 2


def rows_of(x: Tensor, block: FeedForward) -> Rows:
    return Rows(x, block.middle(x), block)


@pytest.fixture
def block() -> FeedForward:
    return FeedForward(torch.randn(32, 8), torch.randn(32, 8), torch.randn(32, 8), "silu")


def test_statistics_in_parts_are_those_of_the_whole(block: FeedForward) -> None:
    x = torch.randn(500, 8) * 3 + 100  # far from 0, where sums of squares lose digits
    around = torch.randn(500, 8)
    moments, magnitudes, markers = Moments("input"), Magnitudes("input"), TopMarkers(5)
    sizes = [1, 99, 300, 100]
    for part, other in zip(x.split(sizes), around.split(sizes), strict=True):
        moments.update(rows_of(part, block))
        markers.update(rows_of(part, block))
        magnitudes.update(rows_of(other, block))
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(moments.variance, x.double().var(0, correction=0))
    middle = block.middle(x)
    assert torch.equal(markers.indices.long(), middle.abs().topk(5, -1).indices)
    for share in (0.1, 0.5, 0.9):
        dropped = (around.abs() <= magnitudes.quantile(share)).float().mean()
        assert abs(float(dropped) - share) < 0.005
    assert magnitudes.quantile(0) == 0


def test_magnitudes_of_zeros_and_scales(block: FeedForward) -> None:
    x = torch.randn(1000, 8).where(torch.rand(1000, 8) < 0.3, torch.tensor(0.0))
    scale = torch.rand(8) + 0.1
    statistic = Magnitudes("input", scale)
    statistic.update(rows_of(x, block))
    assert ((x.abs() * scale) <= statistic.quantile(0.6)).float().mean() == pytest.approx(0.7, abs=0.03)
    assert ((x.abs() * scale) <= statistic.quantile(0.9)).float().mean() == pytest.approx(0.9, abs=0.01)


def test_samples_are_even(block: FeedForward) -> None:
    kept = Samples(16)
    for n in range(40):
        kept.update(rows_of(torch.full((10, 8), float(n)), block))
    values = kept.input[:, 0]
    assert 16 <= values.numel() <= 32
    assert torch.equal(values, values.sort().values)
    assert values.diff().max() <= 3


def test_what_is_kept_stays_where_it_is(block: FeedForward) -> None:
    """From before the first batch on: new tensors between those of a batch would cut its room into pieces."""
    moments, magnitudes, markers, samples = Moments("middle"), Magnitudes("input"), TopMarkers(5), Samples(16)
    every: list[Any] = [moments, magnitudes, markers, samples]
    for one in every:
        one.prepare(block)
    kept = [t for one in every for t in vars(one).values() if isinstance(t, torch.Tensor)]
    places = [t.data_ptr() for t in kept]
    for _ in range(20):
        for one in every:
            one.update(rows_of(torch.randn(50, 8), block))
    assert len(kept) == 5
    assert [t.data_ptr() for one in every for t in vars(one).values() if isinstance(t, torch.Tensor)] == places

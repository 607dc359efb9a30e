"""What a report says of feed-forward blocks: bytes and FLOPs, dense beside rewritten, and the kernels by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plans import SETTINGS, logits, pass_of, planned

import effcompile as ec
from effcompile import lowering
from effcompile.kernels import ffn_cost
from effcompile.kernels.program import OperatorProgram
from models import MODELS

KERNELS = {
    "carve_moe": ("route_f32", "grouped_ffn_f32"),
    "flap": (),
    "teal": ("column_ffn_f32",),
    "wina": ("column_ffn_f32",),
}


def reported(method: str, batch: int, tokens: int) -> tuple[Any, Any, Any]:
    """The model, its plan, and the report of a call."""
    model = MODELS["llama"]("sdpa")
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    plan = ec.calibrate(model, [ids], [pass_of(method, **SETTINGS[method])], progress=False)
    made = planned(model, plan)
    logits(made, ids[:batch, :tokens])
    return model, plan, ec.inspect(made)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    ("method", "batch", "tokens"),
    [("carve_moe", 1, 1), ("carve_moe", 2, 17), ("teal", 1, 1), ("wina", 2, 17), ("flap", 2, 17)],
)
@pytest.mark.usefixtures("no_inductor")
def test_bytes_and_flops_of_a_block(method: str, batch: int, tokens: int) -> None:
    model, plan, report = reported(method, batch, tokens)
    mlp, count = model.model.layers[0].mlp, batch * tokens
    size, neurons = model.config.hidden_size, model.config.intermediate_size
    ends = 2 * count * size * 4
    record, decisions = next(iter(plan)), [d for d in report.decisions if d.kind == "ffn"]
    assert [d.action for d in decisions] == ["rewritten"] * 2
    d = decisions[0]
    assert d.bytes_before == sum(weight.nbytes for weight in mlp.parameters()) + ends
    assert d.flops_before == 2 * count * 3 * size * neurons
    if method == "flap":
        kept = record.tensors["kept"].numel()
        assert (d.bytes_after, d.flops_after) == (3 * kept * size * 4 + ends, 6 * count * kept * size)
    elif method == "carve_moe":
        width, active = neurons // 8, 3 if count == 1 else 6
        router = ffn_cost.route(count, size, 6, 3)
        assert d.bytes_after == 3 * size * (2 + active) * width * 4 + ends + count * 3 * 8 + router.bytes
        assert d.flops_after == 6 * count * size * 5 * width + router.flops
    else:
        first, last = (math.ceil(n * (1 - 0.4**count)) for n in (size, neurons))
        read = 2 * first * neurons + last * size
        assert (d.bytes_after, d.flops_after) == (read * 4 + ends + 12, 2 * count * read)
    assert d.kernels == KERNELS[method]
    assert [k.name for k in report.kernels] == list(KERNELS[method])
    assert all("effcompile/kernels/cpp" in k.source for k in report.kernels)
    assert "Bytes and FLOPs of one site" in str(report)


@pytest.mark.usefixtures("no_inductor")
def test_sizes_that_change_stay_open() -> None:
    """One graph for every number of tokens: the formula has it as a letter, and numbers are those of the first call."""
    model = MODELS["llama"]("sdpa")
    ids = torch.randint(0, 128, (2, 24))
    plan = ec.calibrate(model, [ids], [pass_of("flap", **SETTINGS["flap"])], progress=False)
    made = planned(model, plan)
    torch._dynamo.mark_dynamic(ids, 1)
    logits(made, ids)
    d = next(d for d in ec.inspect(made).decisions if d.kind == "ffn")
    assert dict(d.sizes) == {"B": 2, "T": 24}
    assert d.fixed == "B"
    assert f"{2 * 2 * model.config.hidden_size * 4}*T" in d.formula("before", "bytes")


@pytest.mark.parametrize("operator", ["grouped_ffn", "route", "column_linear", "column_ffn"])
def test_kernels_are_files_with_a_text(operator: str) -> None:
    path, text = lowering.written(OperatorProgram(operator, torch.bfloat16), "cuda")
    assert Path(path).read_text() == text
    kernels = {"route": "route_tokens", "grouped_ffn": "grouped_hidden"}
    assert f"def {kernels.get(operator, 'column_product')}(" in text
    _, text = lowering.written(OperatorProgram(operator, torch.bfloat16), "cpu")
    assert f"int64_t {operator}(" in text
    assert lowering.written(OperatorProgram(operator, torch.float64), "cpu") == ("", "")
    assert OperatorProgram(operator, torch.float64).name == f"{operator}_torch.float64"

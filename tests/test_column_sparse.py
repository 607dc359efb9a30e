"""Column-sparse products and FFNs: reference bodies and kernels against fp64, limits, and what is not touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import pairwise
from test_ffn_ops import DTYPES, INF, NAN, OPS, within

from effcompile.kernels import ops
from effcompile.kernels.ffn import ACTIVATIONS
from effcompile.lowering.cpp_ffn import WITH_KERNELS


def exact_columns(x, weight_t, threshold, scale, bias):
    """In fp64, with channels chosen in fp32 as the contract says; and the largest sum of terms, without signs."""
    size = x.float().abs() * (1 if scale is None else scale)
    picked = x.double().where(~(size <= threshold), 0)
    out = picked @ weight_t.double() + (0 if bias is None else bias.double())
    return out, float((picked.abs() @ weight_t.double().abs()).max())


COLUMNS = pairwise(
    rows=[1, 2, 3, 5, 7, 8, 9, 40],
    shape=[(64, 48), (33, 130), (500, 1), (7, 65)],
    dtype=DTYPES,
    scaled=[False, True],
    biased=[False, True],
    quantile=[0.0, 0.4, 0.9],
)


@pytest.mark.parametrize("case", COLUMNS, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_column_linear_against_the_reference(case):
    (inputs, outputs), dtype = case["shape"], case["dtype"]
    x, weight_t = torch.randn(case["rows"], inputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
    scale = torch.rand(inputs) if case["scaled"] else None
    bias = torch.randn(outputs).to(dtype) if case["biased"] else None
    threshold = (x.float().abs() * (1 if scale is None else scale)).quantile(case["quantile"])
    exact, terms = exact_columns(x, weight_t, threshold, scale, bias)
    with ops.reference_only():
        reference = OPS.column_linear(x, weight_t, threshold, scale=scale, bias=bias)
    got = OPS.column_linear(x, weight_t, threshold, scale=scale, bias=bias)
    assert got.dtype == dtype
    within(got, reference, exact, terms, dtype)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.usefixtures("no_fallback")
def test_thresholds_at_the_limits(rows):
    x, weight_t, bias = torch.randn(rows, 65), torch.randn(65, 40), torch.randn(40)
    dense = F.linear(x, weight_t.t(), bias)
    for threshold in (-1.0, 0.0):
        torch.testing.assert_close(OPS.column_linear(x, weight_t, torch.tensor(threshold), bias=bias), dense)
    nothing = OPS.column_linear(x, weight_t, torch.tensor(INF), bias=bias)
    assert torch.equal(nothing, bias.expand(rows, -1))
    x[0, 3] = NAN
    for threshold in (0.5, INF):
        got = OPS.column_linear(x, weight_t, torch.tensor([threshold]), bias=bias)
        assert got.isnan().any(1).tolist() == [True] + [False] * (rows - 1)
        assert got[0].isnan().all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.usefixtures("no_fallback")
def test_columns_that_nobody_keeps_are_not_touched(rows):
    x, weight_t = torch.randn(rows, 65), torch.randn(65, 40)
    x[:, ::3] = 0.01
    expected = OPS.column_linear(x, weight_t, torch.tensor(0.1))
    weight_t[::3] = NAN
    assert torch.equal(OPS.column_linear(x, weight_t, torch.tensor(0.1)), expected)


FFNS = pairwise(
    rows=[1, 2, 5, 8, 9],
    shape=[(64, 160), (33, 70), (20, 13)],
    dtype=DTYPES,
    activation=list(WITH_KERNELS),
    gated=[True, False],
    scaled=[False, True],
    biased=[False, True],
    quantile=[0.0, 0.5, 0.9],
)


@pytest.mark.parametrize("case", FFNS, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_column_ffn_against_the_reference(case):
    (size, neurons), dtype, act = case["shape"], case["dtype"], ACTIVATIONS[case["activation"]]
    x = torch.randn(case["rows"], size).to(dtype)
    gate, up = ((torch.randn(size, neurons) / size**0.5).to(dtype) for _ in range(2))
    gate, down = gate if case["gated"] else None, torch.randn(neurons, size).to(dtype)
    scales = [torch.rand(n) + 0.5 if case["scaled"] else None for n in (size, size, neurons)]
    biases = [torch.randn(n).to(dtype) if case["biased"] else None for n in (neurons, neurons, size)]
    thresholds = [float((x.float().abs() * (1 if s is None else s)).quantile(case["quantile"])) for s in scales[:2]]
    gated, up_out = (
        None if w is None else exact_columns(x, w, t, s, b)[0]
        for w, t, s, b in zip((gate, up), thresholds, scales, biases)
    )
    hidden = act(up_out) if gated is None else act(gated) * up_out
    hidden_size = hidden.abs() * (1 if scales[2] is None else scales[2].double())
    # A rounding in the middle may decide about a neuron: the last threshold lies where there is most room beside it.
    ordered = hidden_size.flatten().sort()[0]
    first, last = int(case["quantile"] * 0.8 * len(ordered)), int((case["quantile"] * 0.8 + 0.2) * len(ordered)) - 1
    at = first + int((ordered[first + 1 : last + 1] - ordered[first:last]).argmax()) if case["quantile"] else 0
    thresholds.append(float(ordered[at : at + 2].mean()) if case["quantile"] else -1.0)
    keep = hidden_size > thresholds[2]
    exact = hidden.where(keep, 0) @ down.double() + (0 if biases[2] is None else biases[2].double())
    terms = float((hidden.where(keep, 0).abs() @ down.double().abs()).max())
    names = [f"{name}_{what}" for what in ("scale", "bias") for name in ("gate", "up", "down")]
    given = (x, gate, up, down, torch.tensor(thresholds), case["activation"]), dict(zip(names, scales + biases))
    with ops.reference_only():
        reference = OPS.column_ffn(*given[0], **given[1])
    within(OPS.column_ffn(*given[0], **given[1]), reference, exact, terms, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("no_fallback")
def test_column_ffn_is_three_column_linears(rows):
    x, thresholds = torch.randn(rows, 96), torch.tensor([0.5, 0.7, 0.2])
    gate, up, down = torch.randn(96, 200) / 10, torch.randn(96, 200) / 10, torch.randn(200, 96)
    scale, bias = torch.rand(200), torch.randn(96)
    hidden = F.silu(OPS.column_linear(x, gate, thresholds[0])) * OPS.column_linear(x, up, thresholds[1])
    expected = OPS.column_linear(hidden, down, thresholds[2], scale=scale, bias=bias)
    got = OPS.column_ffn(x, gate, up, down, thresholds, "silu", down_scale=scale, down_bias=bias)
    torch.testing.assert_close(got, expected)
    x[0, 0] = NAN
    got = OPS.column_ffn(x, gate, up, down, thresholds + INF, "silu")
    assert got.isnan().all(1).tolist() == [True] + [False] * (rows - 1)

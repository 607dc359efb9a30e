"""Grouped FFNs of which a threshold leaves out neurons: against fp64, limits, and rows that are not read."""

from __future__ import annotations

import pytest
import torch
from pairs import pairwise
from test_ffn_ops import DTYPES, INF, NAN, OPS, Grouped, within

from effcompile.kernels import ffn_ops, ops
from effcompile.kernels.ffn import ACTIVATIONS
from effcompile.lowering import triton_ffn
from effcompile.lowering.cpp_ffn import WITH_KERNELS


def call(case, activation="silu", threshold=None, scale=None, **other):
    given = {name: getattr(case, name) for name in ("x", "gate", "up", "down_t", "chosen", "weights")} | other
    limit = None if threshold is None else torch.tensor([threshold])
    sizes = case.shared, case.width, activation
    return OPS.grouped_ffn(*given.values(), *sizes, **case.biases, threshold=limit, down_scale=scale)


def hidden(case, activation):
    """What every neuron says, fp64 ``[tokens, neurons]``."""
    gate, up, x = (None if t is None else t.double() for t in (case.gate, case.up, case.x))
    biases = {name: 0 if t is None else t.double() for name, t in case.biases.items()}
    first = None if gate is None else x @ gate.t() + biases["gate_bias"]
    return ffn_ops.middle(x @ up.t() + biases["up_bias"], first, activation)


def gap(sizes, share):
    """A number below which a ``share`` of ``sizes`` lies, where there is most room beside it: no rounding decides."""
    ordered = sizes.flatten().sort()[0]
    first, last = int(0.8 * share * len(ordered)), int((0.8 * share + 0.2) * len(ordered)) - 1
    at = first + int((ordered[first + 1 : last + 1] - ordered[first:last]).argmax())
    return float(ordered[at : at + 2].mean())


CASES = pairwise(
    rows=[1, 2, 5, 8, 9, 33, 64, 65],
    size=[64, 33],
    layout=[(16, 8, 6, 3), (0, 5, 7, 2), (9, 1, 40, 20), (300, 140, 3, 2)],
    dtype=DTYPES,
    activation=list(WITH_KERNELS),
    gated=[True, False],
    biases=[False, True],
    alike=[1, 0],
    scaled=[True, False],
    share=[0.2, 0.9],
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_against_fp64(case):
    made = Grouped(
        case["rows"], case["size"], *case["layout"], case["gated"], case["biases"], case["dtype"], case["alike"]
    )
    said, tokens = hidden(made, case["activation"]), case["rows"]
    scale = torch.rand(said.shape[1]) + 0.5 if case["scaled"] else None
    size = said.abs() * (1 if scale is None else scale.double())
    limit = gap(size, case["share"])
    used, total = ffn_ops.factors(made.chosen, made.weights, tokens, made.groups)
    factor = torch.cat([torch.ones(tokens, made.shared), (used * total).repeat_interleave(made.width, 1)], 1).double()
    counted, bias = said.where(size > limit, 0) * factor, made.biases["down_bias"]
    exact = counted @ made.down_t.double() + (0 if bias is None else bias.double())
    terms = float((counted.abs() @ made.down_t.double().abs()).max())
    with ops.reference_only():
        reference = call(made, case["activation"], limit, scale)
    within(call(made, case["activation"], limit, scale), reference, exact, terms, case["dtype"])


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.usefixtures("no_fallback")
def test_limits(rows):
    """Nothing is left out, or everything but NaN; twice the same group is left out twice."""
    case = Grouped(rows, 40, 10, 24, 5, 3, biases=True)
    torch.testing.assert_close(call(case, threshold=-1.0), call(case))
    bias = case.biases["down_bias"]
    torch.testing.assert_close(call(case, threshold=INF), bias.expand(rows, -1))
    case.chosen[:] = 3
    limit = gap(hidden(case, "silu").abs(), 0.5)
    with ops.reference_only():
        reference = call(case, threshold=limit)
    torch.testing.assert_close(call(case, threshold=limit), reference)
    case.x[0, 0] = NAN
    assert call(case, threshold=INF).isnan().all(1).tolist() == [True] + [False] * (rows - 1)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("alike", [1, 0])
@pytest.mark.usefixtures("no_fallback")
def test_rows_of_down_that_no_token_keeps_are_not_read(rows, alike):
    case = Grouped(rows, 40, 300, 24, 5, 3, alike=alike)
    size = hidden(case, "silu").abs()
    limit = gap(size, 0.9)
    expected = call(case, threshold=limit)
    unread = ~(size > limit).any(0)
    assert unread.sum() > 5
    case.down_t[unread] = NAN
    assert torch.equal(call(case, threshold=limit), expected)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"threshold": torch.zeros(2)}, "threshold has 2 elements"),
        ({"down_scale": torch.ones(100)}, "down_scale is for a threshold"),
        ({"threshold": torch.zeros(1), "down_scale": torch.ones(99)}, r"down_scale is \(99,\)"),
    ],
)
def test_arguments_that_do_not_fit(other, text):
    case = Grouped(2, 8, 10, 30, 3, 2)
    with pytest.raises(ValueError, match=text):
        OPS.grouped_ffn(case.x, case.gate, case.up, case.down_t, None, None, 10, 30, "silu", **other)


def test_other_activations_run_the_reference_body():
    case = Grouped(3, 16, 10, 30, 3, 2)
    for activation in set(ACTIVATIONS) - set(WITH_KERNELS):
        with ops.reference_only():
            reference = call(case, activation, 0.3)
        assert torch.equal(call(case, activation, 0.3), reference)


def test_gpus_have_no_kernel_for_it():
    """Before anything is launched, so that the reference body runs."""
    case = Grouped(3, 16, 16, 16, 3, 2)
    arguments = case.x, case.gate, case.up, case.down_t, case.chosen, case.weights, case.shared, case.width, "silu"
    with pytest.raises(ops.KernelUnavailable, match="a threshold leaves out"):
        triton_ffn.grouped_ffn(*arguments, threshold=torch.zeros(1))

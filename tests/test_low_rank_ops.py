"""The linear of low rank: reference body against fp64, kernel against reference body, buffers that end at a page."""

from __future__ import annotations

import sys

import pytest
import torch
from pairs import pairwise
from torch.nn import functional as F

from effcompile.kernels import low_rank_ops, ops
from effcompile.lowering import cpp_low_rank
from effcompile.passes.residual import to_rows

low_rank = torch.ops.effcompile.low_rank_linear
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(rows, inputs, rank, outputs, bias=True, dtype=torch.float32):
    shapes = (rows, inputs), (rank, inputs), (outputs, rank), (outputs,)
    scales = 1, inputs**-0.5, max(rank, 1) ** -0.5, 1
    x, down, up, b = ((torch.randn(s) * scale).to(dtype) for s, scale in zip(shapes, scales))
    return x, down, up, b if bias else None


def exact(x, down, up, bias):
    """In fp64, with the largest sum of absolute values of a result's terms."""
    x, down, up = x.double(), down.double(), up.double()
    shift = 0 if bias is None else bias.double()
    terms = (x.abs() @ down.abs().t()) @ up.abs().t()
    return (x @ down.t()) @ up.t() + shift, float(terms.max()) if terms.numel() else 0.0


def within(got, reference, wanted, terms, dtype):
    """At most twice what the reference loses, one rounding of the result and one of its terms."""
    assert got.dtype == dtype
    assert got.is_contiguous()
    budget = torch.finfo(dtype).eps * wanted.abs().max() + torch.finfo(torch.float32).eps * terms
    error, lost = ((t.double() - wanted).abs().max() for t in (got, reference))
    assert error <= 2 * lost + budget


CASES = pairwise(
    rows=[1, 2, 3, 4, 5, 6, 7, 8, 9, 65],
    inputs=[64, 33, 1, 500],
    rank=[1, 7, 8, 63],
    outputs=[1, 65, 96],
    bias=[True, False],
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_kernel_against_the_reference(case):
    given = made(**case)
    wanted, terms = exact(*given)
    with ops.reference_only():
        reference = low_rank(*given)
    within(low_rank(*given), reference, wanted, terms, case["dtype"])


def test_reference_is_two_products():
    given = [t.double() for t in made(5, 17, 6, 9)]
    torch.testing.assert_close(low_rank_ops.low_rank_reference(*given), exact(*given)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("no_fallback")
def test_threads_leading_dimensions_and_strides(monkeypatch):
    """Large enough for several threads; ``x`` ``[2, 3, n]`` and not contiguous."""
    monkeypatch.setattr(cpp_low_rank, "SINGLE", 0)
    before = torch.get_num_threads()
    x, down, up, bias = made(6, 200, 40, 77)
    x = x.view(3, 2, 200).transpose(0, 1)
    wanted = low_rank_ops.low_rank_reference(x, down, up, bias)
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            got = low_rank(x, down, up, bias)
            assert got.shape == (2, 3, 77)
            torch.testing.assert_close(got, wanted)
    finally:
        torch.set_num_threads(before)


def test_without_rows_or_rank():
    x, down, up, bias = made(3, 8, 0, 5)
    assert torch.equal(low_rank(x, down, up, bias), bias.expand(3, 5))
    assert low_rank(x[:0], down, up, bias).shape == (0, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    torch.library.opcheck(low_rank, made(3, 16, 4, 9, bias))


@pytest.mark.parametrize(
    ("which", "shape", "said"),
    [
        (0, (3, 15), "do not fit"),
        (1, (5, 16), "do not fit"),
        (2, (9, 4, 1), "do not fit"),
        (3, (8,), r"should be \(9,\)"),
    ],
)
@pytest.mark.parametrize("rows", [3, 30])
def test_shapes_that_do_not_fit(which, shape, said, rows):
    given = list(made(rows, 16, 4, 9))
    given[which] = torch.zeros((rows, shape[1]) if which == 0 else shape)
    with pytest.raises(ValueError, match=said):
        low_rank(*given)


def test_other_dtypes_run_the_reference():
    given = [t.double() for t in made(2, 16, 4, 9)]
    ops._warned.clear()
    with pytest.warns(UserWarning, match=r"reference body.*float64"):
        got = low_rank(*given)
    torch.testing.assert_close(got, low_rank_ops.low_rank_reference(*given))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("no_fallback")
def test_nothing_is_read_behind_the_buffers(dtype):
    from test_cpp_bounds import Fence

    for rows, inputs, rank, outputs in ((1, 33, 7, 9), (8, 65, 17, 3), (3, 1, 1, 1)):
        fence, given = Fence(), made(rows, inputs, rank, outputs, dtype=dtype)
        got = low_rank(*map(fence, given))
        residual, _ = sparse(outputs, inputs, dtype)
        with_residual = low_rank(*map(fence, (*given, *residual)))
        wanted = low_rank_ops.low_rank_reference(*given, *residual)
        torch.testing.assert_close(with_residual, wanted, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(got, low_rank_ops.low_rank_reference(*given), rtol=2e-2, atol=2e-2)


def test_cost_is_what_is_read_and_computed():
    x, down, up, bias = made(3, 48, 8, 32)
    found = low_rank_ops.low_rank_cost(3, 32, 48, 8, itemsize=4, bias=True)
    assert found.bytes == sum(t.nbytes for t in (x, down, up, bias)) + 3 * 32 * 4
    assert found.flops == 2 * 3 * (8 * 48 + 8 * 32)
    dense = low_rank_ops.linear_cost(3, 32, 48, itemsize=4, bias=False)
    assert (dense.bytes, dense.flops) == (4 * (32 * 48 + 3 * 80), 2 * 3 * 32 * 48)
    # At break-even both read as much.
    assert low_rank_ops.breaks_even(32, 48) * (32 + 48) == 32 * 48


def sparse(outputs, inputs, dtype=torch.float32, density=0.2):
    """A residual with an empty row, a full one and, with several, rows between, and the matrix that it is."""
    matrix = torch.randn(outputs, inputs) * (torch.rand(outputs, inputs) < density)
    matrix[0] = torch.randn(inputs)
    if outputs > 1:
        matrix[-1] = 0
    matrix = matrix.to(dtype)
    return to_rows(matrix.double(), dtype), matrix


RESIDUALS = pairwise(
    rows=[1, 2, 7, 8, 9], inputs=[1, 33, 500], rank=[1, 8], outputs=[1, 65, 96], bias=[True, False], dtype=DTYPES
)


@pytest.mark.parametrize("case", RESIDUALS, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_residual_against_the_reference_and_fp64(case, monkeypatch):
    if case["rank"] == 8:
        monkeypatch.setattr(cpp_low_rank, "SINGLE", 0)
    given = made(**case)
    residual, matrix = sparse(case["outputs"], case["inputs"], case["dtype"])
    assert residual[1].dtype == torch.int16
    wanted, terms = exact(*given)
    wanted = wanted + given[0].double() @ matrix.double().t()
    terms += float((given[0].double().abs() @ matrix.double().abs().t()).max())
    with ops.reference_only():
        reference = low_rank(*given, *residual)
    within(low_rank(*given, *residual), reference, wanted, terms, case["dtype"])


@pytest.mark.usefixtures("no_fallback")
def test_residual_of_many_inputs_and_of_no_entries():
    """Columns beyond 16 bits, and lists that are empty."""
    x, down, up, bias = made(2, 40000, 2, 3)
    residual, matrix = sparse(3, 40000, density=0.001)
    assert residual[1].dtype == torch.int32
    assert int(residual[1].max()) > 1 << 15
    wanted = F.linear(x.double(), up.double() @ down.double() + matrix.double(), bias.double())
    torch.testing.assert_close(low_rank(x, down, up, bias, *residual).double(), wanted, rtol=0, atol=2e-3)
    empty = to_rows(torch.zeros(3, 40000), torch.float32)
    for rows in (2, 30):
        given = (torch.randn(rows, 40000), down, up, bias)
        assert torch.equal(low_rank(*given, *empty), low_rank(*given))


def test_residual_opcheck_and_cost():
    given = made(3, 16, 4, 9)
    residual, _ = sparse(9, 16)
    torch.library.opcheck(low_rank, (*given, *residual))
    found = low_rank_ops.low_rank_cost(3, 9, 16, 4, itemsize=4, bias=True, entries=residual[0].numel())
    assert found.bytes == sum(t.nbytes for t in (*given, *residual)) + 3 * 9 * 4
    assert found.flops == 2 * 3 * (4 * 25 + residual[0].numel())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v, c, s: (v, c, None), "given together"),
        (lambda v, c, s: (v[1:], c, s), "do not fit"),
        (lambda v, c, s: (v, c, s[1:]), "do not fit"),
        (lambda v, c, s: (v, c.int(), s), r"columns are torch\.int32"),
        (lambda v, c, s: (v, c, s.long()), r"starts torch\.int64"),
    ],
)
@pytest.mark.parametrize("rows", [3, 30])
def test_residuals_that_do_not_fit(change, said, rows):
    with pytest.raises(ValueError, match=said):
        low_rank(*made(rows, 16, 4, 9), *change(*sparse(9, 16)[0]))

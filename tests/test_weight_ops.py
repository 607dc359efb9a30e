"""Linears with weights in few bits: packing and reference body against fp64, kernels against the reference body."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import pairwise

from effcompile.kernels import ops
from effcompile.kernels.weight_ops import BITS, Packed, dequantize, grouped, pack, round_to_nearest
from effcompile.lowering import cpp_weights

OP = torch.ops.effcompile.quantized_linear
DTYPES = [torch.float32, torch.bfloat16]


def test_the_kernels_are_what_is_tested():
    assert ops._launchers["quantized_linear", "cpu"] is cpp_weights.quantized_linear


def made(outputs, inputs, bits, group, symmetric=False, scale=0.05):
    """A weight, and the same in few bits."""
    weight = torch.randn(outputs, inputs) * scale
    return weight, pack(*round_to_nearest(weight, bits, group, symmetric), bits)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_packed_is_code_times_scale_plus_zero(bits, symmetric):
    weight = torch.randn(21, 83)
    codes, scales, zeros = round_to_nearest(weight, bits, 40, symmetric)
    assert codes.shape == (21, 3, 40)
    assert int(codes.max()) < 2**bits
    zero = -(2 ** (bits - 1)) * scales.double() if zeros is None else zeros.double()
    plain = (codes.double() * scales.double() + zero).flatten(1)[:, :83]
    packed = pack(codes, scales, zeros, bits)
    got = dequantize(packed, 21, 83, bits)
    # One rounding of the product and one of the sum.
    torch.testing.assert_close(got.double(), plain, rtol=0, atol=float(2 * 2**-23 * plain.abs().max() * 2))
    assert packed.codes.numel() == 2 * 16 * 3 * 40 * bits // 8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_half_a_step_off(bits, symmetric):
    weight, packed = made(32, 100, bits, 40, symmetric)
    error = grouped((dequantize(packed, 32, 100, bits) - weight).abs(), 40)
    step = packed.scales.float().permute(0, 2, 1).reshape(32, -1, 1)[..., : error.shape[1], :]
    wide = grouped(weight, 40)
    # The zero is rounded to fp16, and so is the step, of which there are 2^bits.
    slack = 2**-11 * wide.abs().amax(2, keepdim=True) + 2**-11 * 2**bits * step
    assert (error <= 0.5 * step + slack).all()


def test_groups_that_hold_one_number_and_groups_of_zeros():
    weight = torch.full((16, 32), 0.25)
    weight[3], weight[5, :16] = 0, -2
    for symmetric in (False, True):
        packed = pack(*round_to_nearest(weight, 4, 16, symmetric), 4)
        got = dequantize(packed, 16, 32, 4)
        if symmetric:
            assert not got[3].any()
            assert got.isfinite().all()
        else:
            assert torch.equal(got, weight)


def budget(x, packed, outputs, bits, group, bias, dtype):
    """The result in fp64, and what one independent computation may lose of it.

    Twice what the reference body loses, one rounding of the result, and one of a result's terms, of which the kernel
    adds up codes and zeros by themselves.
    """
    weight = dequantize(packed, outputs, x.shape[-1], bits).double()
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    with ops.reference_only():
        reference = OP(x, *packed, bias, outputs, bits, group)
    apart = packed.scales.double().abs() * 2**bits + (0 if packed.zeros is None else packed.zeros.double().abs())
    wide = apart.permute(0, 2, 1).flatten(0, 1)[:outputs].repeat_interleave(group, 1)[:, : x.shape[-1]]
    terms = (x.double().abs() @ wide.t()).max()
    rounding = torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * terms
    return exact, 2 * (reference.double() - exact).abs().max() + rounding


CASES = pairwise(
    rows=[1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 65],
    size=[(64, 64), (192, 576), (63, 65), (1, 500), (49, 16), (33, 1)],
    bits=list(BITS),
    group=[8, 32, 64, 128],
    symmetric=[False, True],
    biased=[False, True],
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_kernel_against_fp64(case):
    (outputs, inputs), bits, group, dtype = case["size"], case["bits"], case["group"], case["dtype"]
    _, packed = made(outputs, inputs, bits, group, case["symmetric"])
    x = torch.randn(case["rows"], inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if case["biased"] else None
    exact, allowed = budget(x, packed, outputs, bits, group, bias, dtype)
    got = OP(x, *packed, bias, outputs, bits, group)
    assert got.dtype == dtype
    assert got.shape == (case["rows"], outputs)
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.usefixtures("no_fallback")
def test_rows_are_independent_and_threads_share_the_work(rows):
    _, packed = made(300, 260, 4, 32)
    x = torch.randn(rows, 260)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            together = OP(x, *packed, None, 300, 4, 32)
            for row in {0, rows // 2, rows - 1}:
                torch.testing.assert_close(OP(x[row : row + 1], *packed, None, 300, 4, 32), together[row : row + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.usefixtures("no_fallback")
def test_nan_stays_in_its_row_and_what_is_missing_counts_for_nothing(rows):
    _, packed = made(20, 36, 3, 32)
    expected = OP(x := torch.randn(rows, 36), *packed, None, 20, 3, 32)
    codes, scales = packed.codes.clone(), packed.scales.clone()
    scales[1, :, 4:] = float("nan")  # outputs 20 to 31
    assert torch.equal(OP(x, codes, scales, packed.zeros, None, 20, 3, 32), expected)
    x[1, 5] = float("nan")
    assert OP(x, *packed, None, 20, 3, 32).isnan().any(1).nonzero().tolist() == [[1]]


@pytest.mark.parametrize("group", [32, 40, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("no_fallback")
def test_a_row_of_numbers_of_all_sizes(bits, group):
    """A kernel for one row may multiply by whole numbers, of which each group has its own step."""
    _, packed = made(50, 300, bits, group)
    sizes = 10.0 ** torch.randint(-12, 12, (2, 300))
    sizes[1] = 10.0 ** torch.randint(-12, 12, (8,)).repeat_interleave(40)[:300]
    for x in (torch.randn(2, 300) * sizes).split(1):
        exact, allowed = budget(x, packed, 50, bits, group, None, torch.float32)
        assert (OP(x, *packed, None, 50, bits, group).double() - exact).abs().max() <= allowed
    # Of all of a group's inputs alike, the largest codes among them, sums are the largest there are.
    for x in (torch.full((1, 300), 3.0), -torch.full((1, 300), 1.0)):
        same = pack(*round_to_nearest(torch.ones(50, 300).cumsum(1), bits, group, False), bits)
        exact, allowed = budget(x, same, 50, bits, group, None, torch.float32)
        assert (OP(x, *same, None, 50, bits, group).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("no_fallback")
def test_a_row_with_one_large_number_that_does_not_count(bits):
    """As hidden states have them; what the others give keeps its digits."""
    weight = torch.randn(64, 64)
    weight[:, 5] = 0
    packed = pack(*round_to_nearest(weight, bits, 64, True), bits)
    x = torch.randn(1, 64)
    x[:, 5] = 3000
    wide = dequantize(packed, 64, 64, bits).double()
    size = x.double().abs() @ wide.abs().t()
    error = (OP(x, *packed, None, 64, bits, 64).double() - x.double() @ wide.t()).abs() / size
    assert error.max() < 1e-6


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e-36, 1e-44, 3e38, 0.0])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.usefixtures("no_fallback")
def test_a_row_with_odd_numbers(odd, alone):
    """In one group of it, beside others or nothing else."""
    _, packed = made(50, 300, 4, 32)
    x = torch.zeros(1, 300) if alone else torch.randn(1, 300)
    x[:, 70] = odd
    if abs(odd) < 1:
        x[:, 64:96] = odd * torch.randn(32)
    got = OP(x, *packed, None, 50, 4, 32)
    if not abs(odd) < float("inf"):
        assert not got.isfinite().any()
        return
    with ops.reference_only():
        expected = OP(x, *packed, None, 50, 4, 32)
    # The smallest numbers have few digits.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=max(1e-6 * float(x.abs().max()), 1e-40))


@pytest.mark.usefixtures("no_fallback")
def test_inputs_that_are_not_contiguous_and_more_dimensions():
    _, packed = made(48, 64, 4, 32)
    x = torch.randn(4, 2, 64).transpose(0, 1)
    got = OP(x, *packed, None, 48, 4, 32)
    assert got.shape == (2, 4, 48)
    torch.testing.assert_close(got, F.linear(x, dequantize(packed, 48, 64, 4)))


def test_no_rows_and_dtypes_without_a_kernel():
    _, packed = made(48, 64, 4, 32)
    assert OP(torch.randn(0, 64), *packed, None, 48, 4, 32).shape == (0, 48)
    with pytest.warns(UserWarning, match="float64"):
        assert OP(torch.randn(1, 64).double(), *packed, None, 48, 4, 32).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 5}, "bits is 5; there are 8, 4, 3, 2"),
        ({"group": 33}, "multiple of 2"),
        ({"group": 64}, "packed is"),
        ({"outputs": 49}, "packed is"),
        ({"scales": torch.ones(3, 2, 16)}, "scales is torch.float32"),
        ({"zeros": torch.ones(3, 1, 16).half()}, "zeros is"),
        ({"bias": torch.ones(47)}, "bias is"),
        ({"x": torch.randn(1, 65)}, "packed is"),
    ],
)
def test_arguments_that_do_not_fit(change, text):
    _, packed = made(48, 64, 4, 32)
    given = {"x": torch.randn(1, 64), "packed": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    given |= {"bias": None, "outputs": 48, "bits": 4, "group": 32} | change
    with pytest.raises(ValueError, match=text):
        OP(*given.values())


@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(symmetric):
    _, packed = made(48, 70, 4, 32, symmetric)
    torch.library.opcheck(OP, (torch.randn(1, 2, 70), *packed, torch.randn(48), 48, 4, 32))


def test_bytes():
    _, packed = made(64, 128, 4, 32)
    assert Packed(*packed).nbytes == 64 * 128 // 2 + 2 * 64 * 4 * 2

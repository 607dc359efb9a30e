"""Triton kernels of FFNs that read a part of their weights: in the interpreter against fp64, compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from pairs import pairwise
from test_column_sparse import exact_columns
from test_ffn_ops import Grouped, exact_route, within

from effcompile.kernels import ffn_ops
from effcompile.lowering import triton_ffn
from effcompile.lowering.triton_aot import resources
from effcompile.lowering.triton_build import vendor_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:]
    assert " passed" in child.stdout


test_in_the_interpreter.__test__ = not INTERPRETED

if INTERPRETED:
    ids = {"ids": lambda c: "-".join(str(v).replace("torch.", "") for v in c.values())}

    GROUPED = pairwise(
        rows=[1, 5, 33, 90],
        size=[64, 33],
        layout=[(16, 16, 5, 2), (0, 24, 3, 3), (9, 40, 2, 1)],
        dtype=DTYPES,
        activation=list(ffn_ops.ACTIVATIONS),
        gated=[True, False],
        biases=[False, True],
        alike=[1, 0],
        weighted=[True, False],
    )

    @pytest.mark.parametrize("case", GROUPED, **ids)
    def test_grouped(case):
        made = Grouped(
            case["rows"], case["size"], *case["layout"], case["gated"], case["biases"], case["dtype"], case["alike"]
        )
        other = {} if case["weighted"] else {"weights": None}
        if not case["weighted"]:
            made.weights = torch.ones_like(made.weights)
        exact, terms = made.loop(case["activation"])
        reference = made.call(ffn_ops.grouped_reference, case["activation"], **other)
        got = made.call(triton_ffn.grouped_ffn, case["activation"], **other)
        assert got.dtype == case["dtype"]
        within(got, reference, exact, terms, case["dtype"])

    @pytest.mark.parametrize("rows", [2, 90])
    def test_weights_that_nobody_chose_are_not_touched(rows):
        case = Grouped(rows, 48, 16, 16, 5, 2)
        case.chosen = case.chosen.where(case.chosen != 3, 1)
        expected = case.call(triton_ffn.grouped_ffn)
        for matrix in (case.gate, case.up, case.down_t):
            matrix[16 + 3 * 16 : 16 + 4 * 16] = NAN
        assert torch.equal(case.call(triton_ffn.grouped_ffn), expected)
        # A group that is not there is no group, wherever an error would have to wait for the device.
        case.chosen[case.chosen < 0] = 7
        assert torch.equal(case.call(triton_ffn.grouped_ffn), expected)

    ROUTES = pairwise(
        rows=[1, 5],
        size=[64, 33],
        groups=[(14, 6), (5, 5), (17, 1)],
        score=list(ffn_ops.SCORES),
        weigh=list(ffn_ops.WEIGHTS),
        gated=[True, False],
        choice_bias=[False, True],
        logit_bias=[False, True],
        limited=[False, True],
        dtype=[torch.float32, torch.bfloat16],
    )

    @pytest.mark.parametrize("case", ROUTES, **ids)
    def test_route(case):
        size, (groups, top_k), dtype = case["size"], case["groups"], case["dtype"]
        x = torch.randn(case["rows"], size).to(dtype)
        gate, up = ((torch.randn(groups, size) / size**0.5).to(dtype) for _ in range(2))
        up = up if case["gated"] else None
        bias, logit = (torch.randn(groups) / 9 if case[name] else None for name in ("choice_bias", "logit_bias"))
        more = {"choice_bias": bias, "logit_bias": logit, "scale": torch.randn(groups)}
        threshold = {"softmax": 0.13, "abs_softmax": 0.13, "sigmoid": 0.55, "abs": 0.3}[case["score"]]
        threshold = threshold if case["limited"] else None
        head = x, gate, up, top_k, case["score"], case["weigh"]
        exact = exact_route(*head, *more.values(), threshold)
        chosen, weights, counts = triton_ffn.route(*head, **more, threshold=threshold)
        assert torch.equal(chosen.long(), exact[0])
        assert torch.equal(counts.long(), exact[2])
        torch.testing.assert_close(weights.double(), exact[1], rtol=1e-5, atol=1e-6)

    def test_route_with_ties_and_nan():
        x, gate = torch.randn(2, 16), torch.randn(1, 16).expand(6, 16).contiguous()
        x[1] = 0
        chosen, weights, counts = triton_ffn.route(x, gate, None, 3, "softmax", "score")
        assert chosen.tolist() == [[0, 1, 2]] * 2
        assert counts.tolist() == [2, 2, 2, 0, 0, 0]
        torch.testing.assert_close(weights, torch.full((2, 3), 1 / 6))
        bias = torch.zeros(6)
        bias[4] = NAN
        chosen, _, _ = triton_ffn.route(x, gate, None, 3, "softmax", "unit", choice_bias=bias, threshold=0.5)
        assert chosen.tolist() == [[4, -1, -1]] * 2

    COLUMNS = pairwise(
        rows=[1, 3, 8],
        shape=[(64, 48), (33, 130), (600, 65)],
        dtype=DTYPES,
        scaled=[False, True],
        biased=[False, True],
        quantile=[0.0, 0.4, 0.9],
    )

    @pytest.mark.parametrize("case", COLUMNS, **ids)
    def test_columns(case):
        (inputs, outputs), dtype = case["shape"], case["dtype"]
        x, weight_t = torch.randn(case["rows"], inputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
        scale = torch.rand(inputs) if case["scaled"] else None
        bias = torch.randn(outputs).to(dtype) if case["biased"] else None
        threshold = (x.float().abs() * (1 if scale is None else scale)).quantile(case["quantile"])
        exact, terms = exact_columns(x, weight_t, threshold, scale, bias)
        reference = ffn_ops.column_linear_reference(x, weight_t, threshold, scale, bias)
        got = triton_ffn.column_linear(x, weight_t, threshold, scale=scale, bias=bias)
        assert got.dtype == dtype
        within(got, reference, exact, terms, dtype)

    def test_columns_that_nobody_keeps_are_not_touched_and_nan_stays():
        x, weight_t = torch.randn(2, 65), torch.randn(65, 40)
        x[:, ::3] = 0.01
        expected = triton_ffn.column_linear(x, weight_t, torch.tensor(0.1))
        weight_t[::3] = NAN
        assert torch.equal(triton_ffn.column_linear(x, weight_t, torch.tensor(0.1)), expected)
        x[1, 4] = NAN
        assert triton_ffn.column_linear(x, weight_t, torch.tensor(INF)).isnan().all(1).tolist() == [False, True]

    def test_column_ffn():
        x, thresholds = torch.randn(3, 64), torch.tensor([0.5, 0.7, 0.2])
        given = (x, torch.randn(64, 96) / 8, torch.randn(64, 96) / 8, torch.randn(96, 64), thresholds, "silu")
        torch.testing.assert_close(triton_ffn.column_ffn(*given), ffn_ops.column_ffn_reference(*given))


@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_hold_every_slot_once(rows):
    chosen = torch.randint(-1, 7, (60, 3), dtype=torch.int32)
    chosen[chosen == 2] = 4
    tiles = triton_ffn.tiles_of(chosen, 7, rows)
    seen = []
    for group, first, count in zip(*(t.tolist() for t in (tiles.group, tiles.first, tiles.rows))):
        if group >= 0:
            slots = tiles.order[first : first + count]
            assert 0 < count <= rows
            assert (chosen.flatten()[slots] == group).all()
            seen += slots.tolist()
    assert sorted(seen) == (chosen.flatten() >= 0).nonzero().flatten().tolist()
    nobody = triton_ffn.tiles_of(torch.full((4, 2), -1, dtype=torch.int32), 7, rows)
    assert (nobody.group == -1).all()


def test_what_has_no_kernel_is_declined():
    case = Grouped(2, 16, 4, 4, 3, 2)
    with pytest.raises(ffn_ops.ops.KernelUnavailable, match="groups of 4 neurons"):
        case.call(triton_ffn.grouped_ffn)
    with pytest.raises(ffn_ops.ops.KernelUnavailable, match="one program ranks 256"):
        triton_ffn.route(torch.zeros(1, 16), torch.zeros(300, 16), None, 2, "softmax", "score")


SIGNATURES = {
    "grouped_hidden": {
        "GATED": True, "BIASED": True, "ACT": "silu", "PRECISION": "ieee", "ROWS": 64, "COLUMNS": 64, "DEPTH": 32,
    },
    "grouped_down": {"PRECISION": "ieee", "ROWS": 64, "COLUMNS": 64, "DEPTH": 32},
    "column_product": {"SCALED": True, "ROWS": 1, "DEPTH": 16, "COLUMNS": 64},
    "route_token": {
        "GATED": True, "CHOICE": True, "LOGIT": True, "SCALED": True, "LIMITED": True, "ACT": "silu",
        "SCORE": "abs_softmax", "WEIGH": "unit", "SLOTS": 6, "ALL": 8, "GROUPS": 16, "DEPTH": 128,
    },
}  # fmt: skip
MODEL = {"x", "gate", "up", "gate_bias", "up_bias", "hidden", "down", "weight"}
FLOATS = {"weights", "scale", "choice_bias", "logit_bias", "out"}
INTS = {"order", "tile_group", "tile_first", "tile_rows", "chosen", "counts"}


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_compiles_ahead_of_time(name, chip):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from effcompile.kernels.triton import ffn

    kernel, constants = getattr(ffn, name), SIGNATURES[name]
    types = {}
    for argument in kernel.arg_names:
        pointer = "*bf16" if argument in MODEL else "*fp32" if argument in FLOATS else "*i32"
        types[argument] = pointer if argument in MODEL | FLOATS | INTS else "i32"
    types |= {c: "constexpr" for c in constants}
    if "threshold" in types:
        types["threshold"] = "*fp32" if name == "column_product" else "fp32"
    target = GPUTarget("hip", chip, 64) if vendor_of(chip) == "hip" else GPUTarget("cuda", int(chip[3:]), 32)
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a][0] == "*"}
    binary = triton.compile(ASTSource(kernel, types, constants, aligned), target=target, options={"num_warps": 4})
    used = resources(binary)
    print(name, chip, used)
    assert used["spilled"] == 0
    assert used["shared"] <= 64 * 1024
    if name.startswith("grouped"):
        text = binary.asm.get("ptx") or binary.asm["amdgcn"]
        assert re.search(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", text)


test_compiles_ahead_of_time.__test__ = not INTERPRETED

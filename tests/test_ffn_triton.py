"""Triton kernels of FFNs that read a part of their weights: in the interpreter against fp64, compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts. In it the
launchers for GPUs serve CPUs, so that the tests of the operators (``test_ffn_ops.py``, ``test_column_sparse.py``) are
theirs too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_column_sparse as columns
import test_ffn_ops as conformance
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_ffn_ops import INF, NAN, OPS, Grouped
from test_triton_aot import SHARED
from torch import Tensor
from triton_calls import INSTRUCTION

from effcompile.kernels import ffn_ops, ops
from effcompile.kernels.ffn import ACTIVATIONS
from effcompile.lowering import triton_ffn, triton_operators
from effcompile.lowering.triton_aot import noted, resources

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(v).replace("torch.", "") for v in case.values())


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)

AXES = {"dtype": DTYPES, "activation": list(ACTIVATIONS), "gated": [True, False], "biases": [False, True]}
SIZE = {"size": [64, 33, 1]}
GROUPED = pairwise(
    rows=[2, 3, 20], **SIZE, layout=[(16, 16, 5, 2), (0, 24, 3, 3), (9, 40, 2, 1)], **AXES, alike=[1],
    weighted=[True, False],
)  # fmt: skip
MORE_GROUPED = [case | {"rows": rows} for rows in (40, 64) for case in GROUPED]
LISTED = pairwise(
    rows=[1, 3, 16, 17], **SIZE, layout=[(16, 8, 6, 3), (0, 5, 7, 2), (9, 1, 200, 150), (3, 40, 3, 3)], **AXES,
    alike=[0], weighted=[True, False],
)  # fmt: skip
# Groups of about 66 tokens: the larger tiles. The last group is of no token.
PREFILL = pairwise(
    rows=[200], **SIZE, layout=[(16, 72, 6, 2), (0, 40, 3, 1)], dtype=[torch.bfloat16, torch.float32],
    activation=["silu"], gated=[True, False], biases=[True], alike=[1], weighted=[True, False],
)  # fmt: skip
CROWDED = PREFILL[0] | {"size": 33, "layout": (16, 72, 6, 2), "dtype": torch.bfloat16, "gated": True, "weighted": True}
ROUTES = pairwise(
    rows=[1, 5, 70], size=[64, 33], groups=[(14, 6), (5, 5), (17, 1)], score=list(ffn_ops.SCORES),
    weigh=list(ffn_ops.WEIGHTS), gated=[True, False], choice_bias=[False, True], logit_bias=[False, True],
    limited=[False, True], dtype=[torch.float32, torch.bfloat16],
)  # fmt: skip
COLUMNS = pairwise(
    rows=[1, 3, 8], shape=[(64, 48), (33, 130), (300, 1), (7, 65)], dtype=DTYPES, scaled=[False, True],
    biased=[False, True], quantile=[0.0, 0.4, 0.9],
)  # fmt: skip
FFNS = pairwise(
    rows=[1, 2, 8], shape=[(64, 160), (200, 70), (20, 13)], dtype=[torch.float32, torch.bfloat16],
    activation=list(ACTIVATIONS), gated=[True, False], scaled=[False, True], biased=[False, True],
    quantile=[0.0, 0.5, 0.9],
)  # fmt: skip


@pytest.mark.usefixtures("no_fallback")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def launchers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The launchers for GPUs in the place of those for CPUs."""
        for name in ("grouped_ffn", "route", "column_linear", "column_ffn"):
            monkeypatch.setitem(ops._launchers, (name, "cpu"), getattr(triton_ffn, name))

    @pytest.mark.parametrize("case", [*GROUPED, *LISTED], ids=name_of)
    def test_grouped(self, case: dict[str, Any]) -> None:
        conformance.test_grouped_kernel_against_the_reference(case)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_GROUPED, ids=name_of)
    def test_more_grouped(self, case: dict[str, Any]) -> None:
        conformance.test_grouped_kernel_against_the_reference(case)

    @pytest.mark.parametrize("case", [CROWDED, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in PREFILL)],
                             ids=name_of)  # fmt: skip
    def test_many_tokens_and_a_group_of_none(self, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        class Crowded(Grouped):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                last = self.groups - 1
                self.chosen = self.chosen.where(self.chosen != last, -1)

        monkeypatch.setattr(conformance, "Grouped", Crowded)
        conformance.test_grouped_kernel_against_the_reference(case)

    @pytest.mark.parametrize(("rows", "alike"), [(2, 1), (3, 0), (20, 0)])
    def test_weights_that_nobody_chose_are_not_touched(self, rows: int, alike: int) -> None:
        case = Grouped(rows, 48, 16, 16, 5, 2, alike=alike)
        case.chosen = case.chosen.where(case.chosen != 3, 1)
        expected = case.call(OPS.grouped_ffn)
        for matrix in (case.gate, case.up, case.down_t):
            matrix[16 + 3 * 16 : 16 + 4 * 16] = NAN
        assert torch.equal(case.call(OPS.grouped_ffn), expected)
        case.chosen[0, 0] = 3
        assert case.call(OPS.grouped_ffn)[0].isnan().all()

    @pytest.mark.parametrize(("rows", "alike"), [(20, 1), (1, 0), (3, 0), (20, 0)])
    @pytest.mark.parametrize("group", [5, 10**9])
    def test_a_group_that_is_not_there_is_nan(self, rows: int, alike: int, group: int) -> None:
        """And nothing outside the weights is read: the interpreter would end with a fault."""
        case = Grouped(rows, 48, 16, 16, 5, 2, alike=alike, biases=True)
        expected = case.call(OPS.grouped_ffn)
        assert not expected.isnan().any()
        case.chosen[-1, 1] = group
        got = case.call(OPS.grouped_ffn)
        wrong = torch.arange(rows) == rows - 1 if alike else torch.ones(rows, dtype=torch.bool)
        assert got[wrong].isnan().all()
        assert torch.equal(got[~wrong], expected[~wrong])

    @pytest.mark.parametrize(("rows", "alike"), [(3, 1), (3, 0)])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_nan_stays_in_its_row(self, rows: int, alike: int, activation: str) -> None:
        case = Grouped(rows, 48, 8, 16, 4, 2, gated=activation != "relu", alike=alike)
        case.x[1, 5] = NAN
        assert case.call(OPS.grouped_ffn, activation).isnan().any(1).nonzero().tolist() == [[1]]

    @pytest.mark.parametrize(("rows", "alike"), [(1, 0), (17, 0), (3, 1)])
    def test_unused_slots_and_no_slots(self, rows: int, alike: int) -> None:
        case = Grouped(rows, 48, 32, 16, 3, 2, biases=True, alike=alike)
        shared = case.call(ffn_ops.grouped_reference, chosen=None, weights=None)
        none = torch.empty(rows if alike else 1, 0, dtype=torch.int32)
        # What is not chosen is not multiplied by 0, either.
        case.up[32:] = INF
        unused = torch.full_like(case.chosen, -1)
        for chosen, weights in ((None, None), (unused, case.weights), (none, None)):
            torch.testing.assert_close(case.call(OPS.grouped_ffn, chosen=chosen, weights=weights), shared)
        case.shared, case.width = 0, 16
        nothing = case.call(OPS.grouped_ffn, chosen=unused)
        assert torch.equal(nothing, case.biases["down_bias"].expand(rows, -1))
        if alike:
            unused = unused[:0]
        assert case.call(OPS.grouped_ffn, x=case.x[:0], chosen=unused, weights=None).shape == (0, 48)

    @pytest.mark.parametrize(("rows", "alike"), [(3, 1), (1, 0), (20, 0)])
    def test_a_group_that_is_listed_twice_counts_twice(self, rows: int, alike: int) -> None:
        case = Grouped(rows, 48, 16, 16, 4, 2, alike=alike)
        twice = torch.full_like(case.chosen, 2)
        once, doubled = twice.clone(), torch.full_like(case.weights, 2)
        once[:, 1] = -1
        expected = case.call(OPS.grouped_ffn, chosen=once, weights=doubled)
        torch.testing.assert_close(case.call(OPS.grouped_ffn, chosen=twice, weights=doubled / 2), expected)

    def test_slots_in_many_blocks_are_sorted(self) -> None:
        chosen = torch.randint(-1, 7, (900, 3), dtype=torch.int32)
        chosen[chosen == 2] = 4
        order, bounds = torch.full((2700,), -1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        sort = triton_operators.kernel("ffn", "sort_slots", torch.float32)
        sort.launch("", 7, chosen, order, bounds, 2700, 7, BLOCK=1024)
        flat = chosen.flatten()
        expected = [(flat == group).nonzero().flatten() for group in range(7)]
        assert bounds.tolist() == [0, *torch.tensor([len(e) for e in expected]).cumsum(0).tolist()]
        assert order[: bounds[-1]].tolist() == torch.cat(expected).tolist()
        assert (order[bounds[-1] :] == -1).all()

    @pytest.mark.parametrize("rows", [1, 3, 20])
    def test_nothing_is_written_outside_of_tensors(self, rows: int) -> None:
        """Programs run one after another here, so that rows of others which one overwrites would not be noticed."""
        case = Grouped(rows, 33, 9, 17, 3, 2, biases=True)
        case.chosen[0] = torch.tensor([2, -1])
        with noted("sm_90") as launches:
            case.call(triton_ffn.grouped_ffn)
            triton_ffn.route(case.x, case.gate[:3], case.up[:3], 2, "softmax", "score")
            turned = case.gate.t().contiguous(), case.up.t().contiguous(), case.down_t
            triton_ffn.column_ffn(case.x[:5], *turned, torch.zeros(3), "silu", **case.biases)
        assert len(launches) == 9 - (rows == 1)
        buffers: dict[int, Tensor] = {}

        def guarded(given: Any) -> Any:
            if not isinstance(given, Tensor):
                return given
            if id(given) not in buffers:
                buffers[id(given)] = torch.cat([given.flatten(), torch.full((2000,), 77, dtype=given.dtype)])
            return buffers[id(given)][: given.numel()].view(given.shape)

        for launch in launches:
            launch.kernel[(launch.grid,)](*map(guarded, launch.args), **launch.options)
            assert all((buffer[-2000:] == 77).all() for buffer in buffers.values()), launch.kernel

    @pytest.mark.parametrize("case", ROUTES, ids=name_of)
    def test_route(self, case: dict[str, Any]) -> None:
        conformance.test_route_against_a_loop_in_fp64(case, "kernel")

    def test_route_with_ties_and_nan(self) -> None:
        conformance.test_route_with_ties_and_nan("kernel")
        # NaN comes first whatever its sign; without a scale the weight is 1 whatever the score is; -0 is 0.
        bias = torch.zeros(6)
        bias[2], bias[4] = INF, torch.tensor(NAN).copysign(torch.tensor(-1.0))
        chosen, _, _ = OPS.route(torch.ones(1, 2), torch.ones(6, 2), None, 3, "softmax", "unit", choice_bias=bias)
        assert chosen.tolist() == [[4, 2, 0]]
        x, gate = torch.tensor([[NAN, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, -0.0], [0.0, 0.0], [0.0, -1e-40]])
        chosen, weights, _ = OPS.route(x, gate, None, 2, "abs", "unit")
        assert weights.tolist() == [[1, 1], [1, 1]]
        assert chosen[0].tolist() == [0, 1]
        bias = torch.tensor([-0.0, 0.0, -INF])
        assert OPS.route(x[1:], gate * 0, None, 3, "abs", "score", choice_bias=bias)[0].tolist() == [[0, 1, 2]]

    def test_large_logits_of_a_router(self) -> None:
        given = (torch.full((1, 16), 1000.0), torch.randn(5, 16), None, 4, "softmax", "score")
        got, expected = OPS.route(*given)[1], ffn_ops.route_reference(*given)[1]
        torch.testing.assert_close(got, expected)
        assert got.isfinite().all()

    @pytest.mark.parametrize("limit", [0.0, INF, -INF])
    def test_thresholds_of_a_router(self, limit: float) -> None:
        given = (torch.randn(3, 16), torch.randn(5, 16), None, 4, "abs", "normalized")
        got, expected = (run(*given, threshold=limit) for run in (OPS.route, ffn_ops.route_reference))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert (got[0] < 0).all() == (limit == INF)

    @pytest.mark.parametrize("case", COLUMNS, ids=name_of)
    def test_columns(self, case: dict[str, Any]) -> None:
        columns.test_column_linear_against_the_reference(case)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_columns_at_the_limits(self, rows: int) -> None:
        columns.test_thresholds_at_the_limits(rows)
        columns.test_columns_that_nobody_keeps_are_not_touched(rows)
        columns.test_column_ffn_is_three_column_linears(rows)

    @pytest.mark.parametrize("case", FFNS, ids=name_of)
    def test_column_ffn(self, case: dict[str, Any]) -> None:
        columns.test_column_ffn_against_the_reference(case)

    @pytest.mark.parametrize("tokens", [1, 3, 20])
    def test_checks_of_the_benchmark(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that ``benchmarks/gpu.py`` runs on a GPU."""
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import gpu_ffn

        found = [gpu_ffn.check_grouped(gpu_ffn.Shape("", 50, 9, 17, 3, 2), tokens, torch.bfloat16, "cpu")]
        found.append(gpu_ffn.check_route(tokens, torch.bfloat16, "cpu"))
        if tokens <= ffn_ops.COLUMN_ROWS:
            found.append(gpu_ffn.check_columns(tokens, torch.float32, "cpu"))
        assert all(row["ok"] for row in found), found

    def test_opcheck(self) -> None:
        def opcheck(*args: Any) -> None:
            torch.library.opcheck(*args, test_utils=("test_schema", "test_faketensor"))

        case = Grouped(3, 16, 16, 16, 3, 2, biases=True)
        given = (case.x, case.gate, case.up, case.down_t, case.chosen, case.weights, 16, 16, "silu")
        opcheck(OPS.grouped_ffn, given, case.biases)
        router = (case.x, torch.randn(3, 16), torch.randn(3, 16), 2, "softmax", "unit")
        opcheck(OPS.route, router, {"scale": torch.randn(3)})
        x, thresholds = torch.randn(2, 3, 16), torch.tensor([0.1, 0.2, 0.3])
        opcheck(OPS.column_linear, (x, torch.randn(16, 24), thresholds[0]), {"bias": torch.randn(24)})
        weights = torch.randn(16, 24), torch.randn(16, 24), torch.randn(24, 16)
        opcheck(OPS.column_ffn, (x, *weights, thresholds, "silu"), {"down_scale": torch.rand(24)})


def ffn(shape: str, rows: int, dtype: torch.dtype) -> None:
    """A call of each operator at the sizes of a model, on ``meta``: what is noted is what a GPU would be given."""
    size, neurons, shared, groups, slots = SHAPES[shape]
    width = (neurons - shared) // groups

    def new(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=of, device="meta")

    x, gate, up, down = new(rows, size), *(new(neurons, size) for _ in range(3))
    chosen, weights, _ = triton_ffn.route(x, new(groups, size), new(groups, size), slots, "abs_softmax", "unit")
    triton_ffn.grouped_ffn(x, gate, up, down, chosen, weights, shared, width, "silu")
    if rows <= ffn_ops.COLUMN_ROWS:
        turned = (new(size, neurons), new(size, neurons), down)
        scales = {"gate_scale": new(size, of=torch.float32), "down_scale": new(neurons, of=torch.float32)}
        triton_ffn.column_ffn(x, *turned, new(3, of=torch.float32), "silu", **scales)


# Channels, neurons, shared ones, groups, and those of a token.
SHAPES = {
    "smollm2": (576, 1536, 576, 5, 3),
    "llama-3-8b": (4096, 14336, 5376, 5, 3),
    "mixtral": (4096, 8 * 14336, 0, 8, 2),
    "deepseek-v3": (7168, 257 * 2048, 2048, 256, 8),
}
AHEAD = [("mixtral", 1, torch.bfloat16, "sm_90"), ("mixtral", 64, torch.bfloat16, "sm_90")]
MORE_AHEAD = pairwise(
    shape=list(SHAPES), rows=[1, 8, 64, 300, 4096], dtype=[torch.bfloat16, torch.float32],
    chip=["sm_80", "sm_90", "sm_100", "gfx942"],
)  # fmt: skip
MORE_AHEAD += [
    {"shape": "mixtral", "rows": rows, "dtype": torch.bfloat16, "chip": chip}
    for rows in (1, 64, 4096)
    for chip in ("sm_90", "sm_100", "gfx942")
]


class TestAhead:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(("shape", "rows", "dtype", "chip"), AHEAD)
    def test_fits_a_chip(self, shape: str, rows: int, dtype: torch.dtype, chip: str) -> None:
        with noted(chip) as launches:
            ffn(shape, rows, dtype)
        # A router; three with one list, or four with a list for each token; four of column-sparse products of a few.
        assert len(launches) == 1 + (3 if rows == 1 else 4) + (4 if rows <= ffn_ops.COLUMN_ROWS else 0)
        for launch in launches:
            binary = launch.compile(chip)
            used = resources(binary)
            name = launch.kernel.__name__
            print(shape, rows, dtype, chip, name, launch.grid, used)
            assert used["spilled"] == 0
            assert used["shared"] <= SHARED[chip]
            if name.startswith("grouped"):
                assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
                few = launch.options["ROWS"] < 64 and chip != "gfx942"
                # Loads run ahead of the products.
                assert chip == "gfx942" or "cp.async.wait_group" in assembly
                assert ("mma.sync" if few else INSTRUCTION.get(chip, "mma.sync")) in assembly

    def test_nan_passes_through_relu(self) -> None:
        """An instruction for the maximum of two numbers takes the one that is not NaN."""
        with noted("sm_90") as launches:
            x, w = torch.empty(1, 64, device="meta"), torch.empty(64, 64, device="meta")
            triton_ffn.grouped_ffn(x, None, w, w, None, None, 64, 1, "relu")
        assert "max.f32" not in launches[0].compile("sm_90").asm["ptx"]

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_AHEAD, ids=name_of)
    def test_fits_more(self, case: dict[str, Any]) -> None:
        self.test_fits_a_chip(**case)

    def test_what_has_no_kernel_is_declined(self) -> None:
        case = Grouped(2, 16, 4, 4, 3, 2)

        def declined(said: str, call: Any = triton_ffn.grouped_ffn, **other: Any) -> None:
            with pytest.raises(ops.KernelUnavailable, match=said):
                case.call(call, **other)

        declined("groups of 4 neurons")
        declined("up .* with strides", up=case.up.t().contiguous().t())
        declined("down_bias .* in torch.float64", down_bias=torch.zeros(16).double())
        declined("weights .* in torch.bfloat16", weights=case.weights.bfloat16())
        declined("an FFN that has none", gate=None, up=case.up[:4], down_t=case.down_t[:4])
        declined(r"operator in torch\.float64", dtype=torch.float64, chosen=case.chosen[:1], weights=None)
        with pytest.raises(ops.KernelUnavailable, match="one program ranks 256"):
            triton_ffn.route(torch.zeros(1, 16), torch.zeros(300, 16), None, 2, "softmax", "score")
        with pytest.raises(ValueError, match=r"up_bias is \(3,\)"):
            case.call(triton_ffn.grouped_ffn, up_bias=torch.zeros(3))

    def test_every_operator_is_launched_on_gpus(self) -> None:
        for name in ("grouped_ffn", "route", "column_linear", "column_ffn"):
            assert ops._launchers[name, "cuda"] is getattr(triton_ffn, name)

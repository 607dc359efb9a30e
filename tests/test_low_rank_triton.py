"""Triton kernels of linears of low rank: in the interpreter against fp64, compiled ahead of time.

As in ``test_ffn_triton.py`` the first test starts a child process for the interpreter, in which the launcher for GPUs
serves CPUs: the tests of the operator (``test_low_rank_ops.py``) are its tests too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_low_rank_ops as conformance
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_ffn_triton import name_of
from test_low_rank_ops import low_rank, made, sparse
from test_triton_aot import CHIPS, SHARED
from test_weights_triton import guarded
from triton_calls import INSTRUCTION

from effcompile.kernels import ops
from effcompile.lowering import triton_low_rank, triton_operators
from effcompile.lowering.triton_aot import noted, resources

test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)

CASES = pairwise(
    rows=[1, 3, 8, 16, 33], inputs=[64, 33, 1, 600], rank=[1, 16, 48, 63], outputs=[1, 65, 96], bias=[True, False],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)  # fmt: skip
MORE = [case | {"rows": rows} for rows in (1, 16, 70, 150) for case in CASES]


@pytest.mark.usefixtures("no_fallback")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def launchers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The launcher for GPUs in the place of that for CPUs, with as many multiprocessors as make some splits."""
        monkeypatch.setitem(ops._launchers, ("low_rank_linear", "cpu"), triton_low_rank.low_rank_linear)
        monkeypatch.setattr(triton_operators, "multiprocessors", lambda device: 3)

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_against_fp64(self, case: dict[str, Any]) -> None:
        conformance.test_kernel_against_the_reference(case)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE, ids=name_of)
    def test_more_against_fp64(self, case: dict[str, Any]) -> None:
        conformance.test_kernel_against_the_reference(case)

    @pytest.mark.parametrize("rows", [1, 5, 70])
    def test_programs_that_share_the_work(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Splits of ``down``, and parts of the outputs of a tile."""
        given, found = made(rows, 400, 20, 300), []
        for count in (0, 8):
            monkeypatch.setattr(triton_operators, "multiprocessors", lambda device, n=count: max(1, n))
            found.append(low_rank(*given))
        torch.testing.assert_close(found[0], found[1])
        conformance.within(found[1], conformance.low_rank_ops.low_rank_reference(*given), *conformance.exact(*given),
                           torch.float32)  # fmt: skip

    @pytest.mark.parametrize("rows", [2, 40])
    def test_nan_stays_in_its_row(self, rows: int) -> None:
        x, *rest = made(rows, 70, 20, 33)
        x[1, 5] = float("nan")
        assert low_rank(x, *rest).isnan().any(1).nonzero().tolist() == [[1]]

    def test_other_shapes_and_nothing(self) -> None:
        conformance.test_without_rows_or_rank()
        x, down, up, bias = made(6, 40, 8, 17)
        x = x.view(3, 2, 40).transpose(0, 1)
        torch.testing.assert_close(low_rank(x, down, up, bias), x @ (up @ down).t() + bias, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rows", [1, 3, 70])
    def test_nothing_is_written_outside_of_tensors(self, rows: int) -> None:
        """Programs run one after another here, so that rows of others which one overwrites would not be noticed."""
        with noted("sm_90") as launches:
            low_rank(*made(rows, 300, 20, 33))
        assert len(launches) == (2 if rows <= triton_low_rank.FEW_ROWS else 1)
        guarded(launches)

    @pytest.mark.parametrize("tokens", [1, 3, 40])
    def test_checks_of_the_benchmark(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that ``benchmarks/gpu.py`` runs on a GPU."""
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import gpu_weights

        row = gpu_weights.check_low_rank(70, 100, 20, tokens, torch.bfloat16, "cpu")
        assert row["ok"], row

    def test_opcheck(self) -> None:
        torch.library.opcheck(low_rank, made(3, 16, 4, 9), test_utils=("test_schema", "test_faketensor"))


# Outputs and inputs.
SHAPES = {"llama-3-8b up": (14336, 4096), "llama-3-8b o": (4096, 4096), "odd": (1000, 999)}
AHEAD = [
    {"shape": "llama-3-8b up", "rows": rows, "rank": rank, "dtype": torch.bfloat16, "chip": "sm_90"}
    for rows, rank in [(1, 512), (8, 512), (4096, 16), (4096, 256)]
]
MORE_AHEAD = AHEAD[::2] + pairwise(
    shape=list(SHAPES), rows=[1, 8, 4096], rank=[1, 16, 64, 128, 256, 1000],
    dtype=[torch.bfloat16, torch.float16, torch.float32], chip=CHIPS,
)  # fmt: skip
MORE_AHEAD += [
    AHEAD[0] | {"rows": rows, "rank": rank, "chip": chip}
    for rows, rank in [(1, 512), (8, 512), (4096, 16), (4096, 64), (4096, 128), (4096, 256)]
    for chip in CHIPS
]


def launches_of(case: dict[str, Any]) -> list[Any]:
    """What a chip with 132 multiprocessors would be given."""
    (outputs, inputs), rank = SHAPES[case["shape"]], case["rank"]
    with torch.device("meta"), noted(case["chip"]) as launches:
        shapes = (case["rows"], inputs), (rank, inputs), (outputs, rank), (outputs,)
        triton_low_rank.low_rank_linear(*(torch.empty(s, dtype=case["dtype"]) for s in shapes))
    return launches


class TestAhead:
    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def _many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_operators, "multiprocessors", lambda device: 132)

    @pytest.mark.parametrize("case", AHEAD[1::2], ids=name_of)
    def test_fits_a_chip(self, case: dict[str, Any]) -> None:
        rows, chip, dtype, launches = case["rows"], case["chip"], case["dtype"], launches_of(case)
        few, held = rows <= triton_low_rank.FEW_ROWS, case["rank"] <= triton_low_rank.CHAIN_RANK[dtype.itemsize]
        assert [launch.kernel.__name__ for launch in launches] == (["few_down", "few_up"] if few else ["chain"] * held)
        for launch in launches:
            binary = launch.compile(chip)
            used = resources(binary)
            print(*case.values(), launch.kernel.__name__, launch.grid, used)
            assert used["shared"] <= SHARED[chip]
            # As elsewhere a few bytes where the assembler stays at 128 registers to make room for another program.
            assert used["spilled"] <= (16 if used["registers"] == 128 and chip != "gfx942" else 0)
            if rows > 1 and dtype is not torch.float32:
                assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
                small = few and chip != "gfx942"
                assert ("mma.sync" if small else INSTRUCTION.get(chip, "mma.sync")) in assembly

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_AHEAD, ids=name_of)
    def test_fits_more(self, case: dict[str, Any]) -> None:
        self.test_fits_a_chip(case)

    def test_rows_that_would_not_fill_a_gpu(self) -> None:
        """Tiles are shared by programs, up to so many; of fewer rows the library multiplies."""
        grids = {rows: [launch.grid for launch in launches_of(AHEAD[2] | {"rows": rows})] for rows in (17, 2112, 8448)}
        assert grids == {17: [], 2112: [33 * 4], 8448: [132]}

    def test_what_has_no_kernel_is_declined(self) -> None:
        x, down, up, bias = made(2, 16, 4, 9)

        def declined(said: str, *given: Any) -> None:
            with pytest.raises(ops.KernelUnavailable, match=said):
                triton_low_rank.low_rank_linear(*given)

        declined("a sparse residual", x, down, up, bias, *sparse(9, 16)[0])
        declined("up .* with strides", x, down, up.t().contiguous().t(), bias)
        declined("down .* in torch.bfloat16", x, down.bfloat16(), up, bias)
        declined(r"operator in torch\.float64", *(t.double() for t in (x, down, up, bias)))
        with pytest.raises(ValueError, match="do not fit"):
            triton_low_rank.low_rank_linear(x[:, 1:], down, up, bias)

    def test_it_is_launched_on_gpus(self) -> None:
        assert ops._launchers["low_rank_linear", "cuda"] is triton_low_rank.low_rank_linear
        path, text = triton_low_rank.written(torch.bfloat16)
        assert Path(path).read_text() == text

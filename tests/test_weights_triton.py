"""Triton kernels of linears with weights in few bits: in the interpreter against fp64, compiled ahead of time.

As in ``test_ffn_triton.py`` the first test starts a child process for the interpreter, in which the launcher for GPUs
serves CPUs: the tests of the operator (``test_weight_ops.py``) are its tests too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_weight_ops as conformance
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_ffn_triton import name_of
from test_triton_aot import CHIPS, SHARED
from test_weight_ops import OP, made
from torch import Tensor
from triton_calls import INSTRUCTION

from effcompile.kernels import ops, weight_ops
from effcompile.kernels.form import word
from effcompile.kernels.weight_ops import BITS
from effcompile.lowering import triton_operators, triton_weights
from effcompile.lowering.triton_aot import noted, resources

test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)

CASES = pairwise(
    rows=[1, 3, 8, 16, 33], size=[(64, 64), (63, 65), (1, 400), (130, 200), (33, 1)], bits=list(BITS),
    group=[8, 24, 32, 40, 128], symmetric=[False, True], biased=[False, True],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)  # fmt: skip
MORE = CASES[1::2] + [case | {"rows": rows} for rows in (1, 70, 150) for case in CASES]


def guarded(launches: list[Any]) -> None:
    """Run what was noted with 77s behind every tensor, which have to be there afterwards."""
    buffers: dict[int, Tensor] = {}

    def fenced(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        if id(given) not in buffers:
            buffers[id(given)] = torch.cat([given.flatten(), torch.full((2000,), 77, dtype=given.dtype)])
        return buffers[id(given)][: given.numel()].view(given.shape)

    for launch in launches:
        launch.kernel[(launch.grid,)](*map(fenced, launch.args), **launch.options)
        assert all((buffer[-2000:] == 77).all() for buffer in buffers.values()), launch.kernel


@pytest.mark.usefixtures("no_fallback")
class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def launchers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The launcher for GPUs in the place of that for CPUs, with as many multiprocessors as make some splits."""
        monkeypatch.setitem(ops._launchers, ("quantized_linear", "cpu"), triton_weights.quantized_linear)
        monkeypatch.setattr(triton_operators, "multiprocessors", lambda device: 6)

    @pytest.mark.parametrize("case", CASES[::2], ids=name_of)
    def test_against_fp64(self, case: dict[str, Any]) -> None:
        conformance.test_kernel_against_fp64(case)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE, ids=name_of)
    def test_more_against_fp64(self, case: dict[str, Any]) -> None:
        conformance.test_kernel_against_fp64(case)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_whole_sums_and_sums_in_parts(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A split ends within a group, where runs are shorter, or holds several."""
        _, packed = made(70, 400, 4, 40)
        x = torch.randn(rows, 400)
        found = []
        for count in (0, 100):
            monkeypatch.setattr(triton_operators, "multiprocessors", lambda device, n=count: n)
            with noted("sm_90") as launches:
                OP(x, *packed, None, 70, 4, 40)
            assert len(launches) == 1 + (count > 0)
            found.append(OP(x, *packed, None, 70, 4, 40))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])

    @pytest.mark.parametrize("case", CASES[::8], ids=name_of)
    def test_a_weight_that_is_written_out(self, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """As for many rows; it is what the reference multiplies by, bit for bit."""
        monkeypatch.setattr(triton_weights, "WRITTEN_ROWS", 0)
        conformance.test_kernel_against_fp64(case)
        (outputs, inputs), bits, group = case["size"], case["bits"], case["group"]
        _, packed = made(outputs, inputs, bits, group, case["symmetric"])
        got = OP(torch.eye(inputs), *packed, None, outputs, bits, group)
        assert torch.equal(got.t(), weight_ops.dequantize(packed, outputs, inputs, bits))

    @pytest.mark.parametrize("rows", [1, 2, 30])
    def test_nan_stays_in_its_row(self, rows: int) -> None:
        if rows > 1:
            conformance.test_nan_stays_in_its_row_and_what_is_missing_counts_for_nothing(rows)
        _, packed = made(20, 36, 3, 32)
        scales = packed.scales.clone()
        scales[1, :, 4:] = float("nan")  # outputs 20 to 31
        x = torch.randn(rows, 36)
        expected = OP(x, *packed, None, 20, 3, 32)
        assert torch.equal(OP(x, packed.codes, scales, packed.zeros, None, 20, 3, 32), expected)

    def test_inputs_of_other_shapes(self) -> None:
        conformance.test_inputs_that_are_not_contiguous_and_more_dimensions()
        _, packed = made(48, 64, 4, 32)
        assert OP(torch.randn(0, 64), *packed, None, 48, 4, 32).shape == (0, 48)

    @pytest.mark.parametrize(("rows", "bits"), [(1, 4), (3, 3), (40, 8), (140, 2), (0, 4)])
    def test_nothing_is_written_outside_of_tensors(self, rows: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Programs run one after another here, so that rows of others which one overwrites would not be noticed."""
        if not rows:
            rows = 3
            monkeypatch.setattr(triton_weights, "WRITTEN_ROWS", 0)
        _, packed = made(41, 130, bits, 24)
        with noted("sm_90") as launches:
            OP(torch.randn(rows, 130), *packed, torch.randn(41), 41, bits, 24)
        guarded(launches)

    @pytest.mark.parametrize("tokens", [1, 20])
    def test_checks_of_the_benchmark(self, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that ``benchmarks/gpu.py`` runs on a GPU."""
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import gpu_weights

        found = [gpu_weights.check_quantized(70, 200, bits, 32, tokens, torch.bfloat16, "cpu") for bits in (4, 3)]
        assert all(row["ok"] for row in found), found

    def test_opcheck(self) -> None:
        _, packed = made(48, 70, 4, 32)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(OP, (torch.randn(1, 2, 70), *packed, torch.randn(48), 48, 4, 32), test_utils=tests)


# Outputs and inputs.
SHAPES = {"llama-3-8b up": (14336, 4096), "llama-3-8b down": (4096, 14336), "odd": (1000, 999)}
AHEAD = [
    {"shape": "llama-3-8b up", "rows": rows, "bits": bits, "group": 32, "symmetric": False, "dtype": torch.bfloat16,
     "chip": "sm_90"}
    for rows, bits in [(1, 4), (8, 4), (512, 4), (2048, 3)]
]  # fmt: skip
MORE_AHEAD = AHEAD[2:] + pairwise(
    shape=list(SHAPES), rows=[1, 8, 20, 64, 512, 2048], bits=list(BITS), group=[8, 32, 40, 128],
    symmetric=[False, True], dtype=[torch.bfloat16, torch.float16, torch.float32], chip=CHIPS,
)  # fmt: skip
MORE_AHEAD += [
    AHEAD[0] | {"rows": rows, "bits": bits, "chip": chip}
    for rows in (1, 8, 512)
    for bits in BITS
    for chip in CHIPS
]  # fmt: skip


def launches_of(case: dict[str, Any]) -> list[Any]:
    """What a chip with 132 multiprocessors would be given."""
    (outputs, inputs), bits, group = SHAPES[case["shape"]], case["bits"], case["group"]
    blocks, groups = -(-outputs // 16), -(-inputs // group)
    with torch.device("meta"), noted(case["chip"]) as launches:
        packed = torch.empty(blocks, groups, group * bits // 8, 16, dtype=torch.uint8)
        scales = torch.empty(blocks, groups, 16, dtype=torch.float16)
        zeros = None if case["symmetric"] else scales.clone()
        x, bias = torch.empty(case["rows"], inputs, dtype=case["dtype"]), torch.empty(outputs, dtype=case["dtype"])
        triton_weights.quantized_linear(x, packed, scales, zeros, bias, outputs, bits, group)
    return launches


class TestAhead:
    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def _many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_operators, "multiprocessors", lambda device: 132)

    @pytest.mark.parametrize("case", AHEAD[:2], ids=name_of)
    def test_fits_a_chip(self, case: dict[str, Any]) -> None:
        rows, chip, launches = case["rows"], case["chip"], launches_of(case)
        assert len(launches) == 1 + (not launches[0].options.get("WHOLE", True))
        for launch in launches:
            binary = launch.compile(chip)
            used = resources(binary)
            print(*case.values(), launch.kernel.__name__, launch.grid, used)
            assert used["shared"] <= SHARED[chip]
            # As elsewhere a few bytes where the assembler stays at 128 registers to make room for another program, and
            # with groups of 8, whose scales are one for a word or two of a tile.
            few = used["registers"] == 128 or case["group"] == 8
            assert used["spilled"] <= (16 if few and chip != "gfx942" else 0)
        binary = launches[0].compile(chip)
        assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
        if 1 < rows <= triton_weights.WRITTEN_ROWS and case["dtype"] is not torch.float32:
            few = launches[0].options["ROWS"] < 64 and chip != "gfx942"
            assert ("mma.sync" if few else INSTRUCTION.get(chip, "mma.sync")) in assembly
            # Loads run ahead of the products.
            assert chip == "gfx942" or "cp.async.wait_group" in assembly
        elif rows == 1 and chip != "gfx942":
            # Neighbouring words of codes are read by neighbouring threads, and nothing is exchanged in the loop.
            assert used["shared"] <= 4096

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_AHEAD, ids=name_of)
    def test_fits_more(self, case: dict[str, Any]) -> None:
        self.test_fits_a_chip(case)

    def test_sums_are_split_where_there_are_few_programs(self) -> None:
        few = AHEAD[0] | {"shape": "llama-3-8b down"}
        assert next(launch.grid for launch in launches_of(few)) == 64 * 8
        assert [launch.grid for launch in launches_of(few | {"rows": 512})] == [32 * 4]
        for bits in BITS:
            (launch, *_) = launches_of(few | {"bits": bits, "group": 40})
            options = launch.options
            # Every split holds whole tiles, and all of them together every run.
            assert launch.args[-1] * options["HEIGHT"] % options["DEPTH"] == 0
            runs = -(-14336 // 40) * (40 // word(bits)[0] // options["HEIGHT"])
            splits = launch.grid // 64
            assert (splits - 1) * launch.args[-1] < runs <= splits * launch.args[-1]

    def test_what_has_no_kernel_is_declined(self) -> None:
        _, packed = made(48, 64, 4, 32)
        x = torch.randn(1, 64)

        def declined(said: str, x: Tensor = x, codes: Tensor = packed.codes) -> None:
            with pytest.raises(ops.KernelUnavailable, match=said):
                triton_weights.quantized_linear(x, codes, packed.scales, packed.zeros, None, 48, 4, 32)

        declined(r"operator in torch\.float64", x.double())
        declined("packed weight with strides", codes=packed.codes.mT.contiguous().mT)
        with pytest.raises(ValueError, match="bits is 5"):
            triton_weights.quantized_linear(x, *packed, None, 48, 5, 32)

    def test_it_is_launched_on_gpus(self) -> None:
        assert ops._launchers["quantized_linear", "cuda"] is triton_weights.quantized_linear
        path, text = triton_weights.written(torch.bfloat16)
        assert Path(path).read_text() == text
        assert weight_ops.LANES == 16, "the kernel has it as a number"

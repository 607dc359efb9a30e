"""Triton kernels over block lists: in the interpreter against fp64, and compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_block_lists import Call
from test_triton_aot import SHARED
from test_triton_kernels import attend, name_of
from torch import Tensor
from triton_calls import assert_within_budget, fits

from effcompile import lowering as all_lowerings
from effcompile.kernels import block_ops, blocks, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import triton as lowering
from effcompile.lowering import triton_blocks
from effcompile.lowering.triton_build import build

DENSE = KVForm(16, 16)
AXES: dict[str, list[Any]] = {
    "sizes": [(64, 64), (80, 80), (96, 64), (128, 128), (64, 256)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "rule": ["causal", "window", "pad"],
    "shared": [False, True],
    "groups": [2, 1],
}
CASES = pairwise(**AXES, block=[64, 48], tokens=[(150, 150), (65, 150)], ratio=[1, 3], batch=[1, 2])
MORE_CASES = pairwise(
    **AXES, block=[128, 64, 48, 16], tokens=[(1, 1), (65, 65), (150, 150), (90, 233), (3, 200), (128, 256)],
    ratio=[1, 3, 4], batch=[1, 2],
)  # fmt: skip
PLAIN: dict[str, Any] = {"tokens": (150, 150), "sizes": (64, 64), "dtype": torch.float16, "block": 64, "ratio": 2,
                         "batch": 1, "rule": "causal", "shared": False, "groups": 1}  # fmt: skip


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


def made(case: dict[str, Any], density: float = 0.3) -> Call:
    queries, keys = case["tokens"]
    window = 40 if case["rule"] == "window" else -1
    how = {"density": density, "dtype": case["dtype"], "pad": case["rule"] == "pad", "window": window}
    with ops.reference_only():
        return Call(case["groups"] * case["ratio"], case["groups"], queries, keys, case["sizes"], DENSE, case["block"],
                    **how, shared=case["shared"], batch=case["batch"])  # fmt: skip


def launch(call: Call) -> tuple[Tensor, Tensor]:
    lists = block_ops.of(call.lists)
    return triton_blocks.attend_blocks(call.query, *call.state, torch.tensor(call.keys), call.mask, *lists, *call.rest)


def seen_by(call: Call) -> Tensor:
    """The map of tokens of the call's lists and rules."""
    key, position = torch.arange(call.keys), torch.arange(call.keys - call.queries, call.keys)[:, None]
    seen = blocks.tokens(call.lists.keep(), call.queries, call.keys, call.block) & (key <= position)
    if call.rest[3] >= 0:
        seen = seen & (key > position - call.rest[3])
    return seen if call.mask is None else seen & call.mask[:, None, None, : call.keys]


class TestInterpreted:
    """Error budget as that of the dense kernels: twice what PyTorch in the model's dtype loses, plus one rounding."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        call = made(case)
        self.check(call, *launch(call))

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_CASES, ids=name_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case)

    @staticmethod
    def check(call: Call, out: Tensor, lse: Tensor) -> None:
        assert_within_budget(out, lse, call.query, call.key, call.value, seen_by(call), call.rest[1])

    def test_every_pair_is_counted_once(self) -> None:
        """Values that tell keys apart: with equal scores the output is the share of each key, and no key has two."""
        keys, block = 100, 32
        keep = blocks.possible(keys, keys, block)
        listed = blocks.lists(keep[None, None], blocks.whole(keys, keys, block), block)
        zero, value = torch.zeros(1, 1, keys, 64), torch.eye(keys)[None, None]
        out, _ = triton_blocks.attend_blocks(zero, zero, None, None, value, None, None, torch.tensor(keys), None,
                                        *block_ops.of(listed), DENSE.name, 1.0, True, -1)  # fmt: skip
        share = torch.ones(keys, keys).tril() / torch.arange(1, keys + 1)[:, None]
        torch.testing.assert_close(out[0, 0], share, rtol=1e-6, atol=1e-8)

    def test_all_blocks_are_dense_attention(self) -> None:
        call = made(PLAIN | {"tokens": (65, 150), "dtype": torch.float32}, density=2.0)
        out, lse = launch(call)
        wanted, wanted_lse = lowering.attend(call.query, *call.state, torch.tensor(call.keys), None, *call.rest)
        torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-6)

    def test_full_blocks_are_not_tested_and_a_cut_one_is(self) -> None:
        """Full blocks of the future are seen; of the last one, which the end cuts short, no key that is not there."""
        call = made(PLAIN | {"dtype": torch.float32})
        keep = torch.ones(3, 3, dtype=torch.bool)
        call.lists = blocks.lists(keep[None, None], keep[None, None], 64)
        out, _ = launch(call)
        seen = blocks.tokens(keep, 150, 150, 64)
        seen[:, 128:] = torch.ones(150, 150, dtype=torch.bool).tril()[:, 128:]
        wanted, _ = attend(call.query, call.key, call.value, seen, call.rest[1], torch.float32)
        torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)

    def test_a_cut_block_that_is_not_last_is_nan(self) -> None:
        """Full lists ascend; one that does not would have keys counted that are not there."""
        call = made(PLAIN)
        keep = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        call.lists = blocks.lists(keep, keep, 64)
        assert call.lists.full_kv_indices is not None
        call.lists.full_kv_indices[0, 0, 1] = torch.tensor([0, 2, 1])
        out, _ = launch(call)
        assert out[:, :, 64:128].isnan().all()
        assert not out[:, :, :64].isnan().any()

    def test_no_block_is_no_key(self) -> None:
        call = made(PLAIN)
        call.lists = blocks.lists(torch.zeros(1, 1, 3, 3, dtype=torch.bool), None, 64)
        out, lse = launch(call)
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()

    @pytest.mark.parametrize("kind", ["kv", "full_kv"])
    def test_rows_of_a_wrong_list_are_nan(self, kind: str) -> None:
        """And no others; memory far from the tensors is not read (the interpreter would end with a fault)."""
        call = made(PLAIN | {"ratio": 3})
        right, right_lse = launch(call)
        counts, indices = (getattr(call.lists, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        wrong = [(0, 0, 3), (0, 1, 10**9), (0, 2, -1), (1, 0, -(10**9))]
        for head, row, number in wrong:
            counts[0, head, row], indices[0, head, row, 0] = 1, number
        counts[0, 2, 0], counts[0, 2, 1] = 4, -1
        out, lse = launch(call)
        rows = torch.zeros(1, 3, 150, dtype=torch.bool)
        for head, row in [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]:
            rows[0, head, 64 * row : 64 * row + 64] = True
        assert out[rows].isnan().all()
        assert lse[rows].isnan().all()
        assert torch.equal(out[~rows], right[~rows])
        assert torch.equal(lse[~rows], right_lse[~rows])

    def test_lists_that_end_before_the_keys_are_nan(self) -> None:
        call = made(PLAIN)
        good = call.lists
        assert good.full_kv_indices is not None
        call.lists = blocks.BlockLists(good.kv_num_blocks, good.kv_indices[..., :2], good.full_kv_num_blocks,
                                       good.full_kv_indices[..., :2], 64)  # fmt: skip
        assert launch(call)[0].isnan().all()

    def test_lists_of_other_shapes(self) -> None:
        call = made(PLAIN)
        good = call.lists
        for change, error, said in (
            ({"kv_num_blocks": good.kv_num_blocks.long()}, BlockError, "int32"),
            ({"block": 32}, BlockError, "5 rows"),
            ({"kv_num_blocks": good.kv_num_blocks[:, :1]}, ops.KernelUnavailable, "different shapes"),
        ):
            call.lists = dataclasses.replace(good, **change)
            with pytest.raises(error, match=said):
                launch(call)

    def test_what_has_no_kernel_is_declined(self) -> None:
        call = made(PLAIN)
        lists = block_ops.of(call.lists)
        args = (call.query, *call.state, torch.tensor(call.keys), None, *lists, *call.rest)
        with pytest.raises(ops.KernelUnavailable, match="with key_position, token_mask"):
            triton_blocks.attend_blocks(*args, token_mask=call.query, key_position=call.query)
        for changes, said in (
            ({0: call.query[:, :1].expand(2, -1, -1, -1)}, "1 query heads and batch 2"),
            ({8: torch.ones(1, 149, dtype=torch.bool)}, "a key mask of"),
        ):
            with pytest.raises(ops.KernelUnavailable, match=said):
                triton_blocks.attend_blocks(*(changes.get(i, x) for i, x in enumerate(args)))


def program(
    size: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16, rule: Predicate | None = None
) -> Program:
    return Program("prefill", DENSE, rule or Predicate(), dtype, 4, *size, blocks=True)


AHEAD = [
    (program(), "sm_90", 128),
    (program((64, 64), rule=Predicate(key_mask=True)), "sm_90", 64),
    (program((80, 128)), "sm_80", 128),
]
AHEAD_AXES = {
    "chip": ["sm_90", "sm_80", "sm_100", "gfx942"],
    "size": [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "rule": [Predicate(), Predicate(window=4096), Predicate(key_mask=True)],
    "block": [128, 64, 48, 16],
}
MORE_AHEAD = [(program(c["size"], c["dtype"], c["rule"]), c["chip"], c["block"]) for c in pairwise(**AHEAD_AXES)]


class TestAhead:
    __test__ = not INTERPRETED

    test_fits_a_chip = fits(AHEAD)
    test_fits_more = pytest.mark.exhaustive(fits(MORE_AHEAD))

    def test_what_is_refused_for_gpus(self) -> None:
        def refused(**changes: Any) -> str | None:
            return all_lowerings.refusal(dataclasses.replace(program(), **changes), "cuda")

        assert refused() is None
        assert refused(predicate=Predicate(True, 100, True), key_size=80, value_size=256, ratio=7) is None
        assert refused(form=KVForm(4, 4)) is None
        assert "block lists with the parts of" in str(refused(predicate=Predicate(segments=True)))
        assert "channels" in str(refused(key_size=300))
        assert "'mps'" in str(all_lowerings.refusal(program(), "mps"))

    def test_tiles_fill_blocks(self) -> None:
        for chip in SHARED:
            cut = build(program(), chip).blocks
            assert cut is not None
            for block in range(16, 513, 16):
                made = cut.within(block)
                assert block % made.rows == 0
                assert block % made.tile == 0
                assert min(made.rows, made.tile) >= 16

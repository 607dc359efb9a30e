"""Triton kernels over block lists: in the interpreter against fp64, and compiled ahead of time.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from pairs import pairwise
from test_block_lists import Call
from test_triton_kernels import attend, largest_score, name_of
from torch import Tensor

from effcompile import lowering as all_lowerings
from effcompile.kernels import block_ops, blocks, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.lowering import triton as lowering
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_build import build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DENSE = KVForm(16, 16)
CASES = [
    case
    for case in pairwise(
        sizes=[(64, 64), (80, 80), (96, 64), (128, 128), (64, 256)],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
        block=[128, 64, 48, 16],
        tokens=[(1, 1), (65, 65), (300, 300), (150, 333), (3, 200), (128, 256)],
        ratio=[1, 3, 4],
        batch=[1, 2],
        rule=["causal", "window", "pad"],
        shared=[False, True],
    )
]


def in_the_interpreter(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += options
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:]
    assert " passed" in child.stdout


def test_in_the_interpreter() -> None:
    in_the_interpreter()


test_in_the_interpreter.__test__ = not INTERPRETED  # type: ignore[attr-defined]


def made(case: dict[str, Any], density: float = 0.3) -> Call:
    queries, keys = case["tokens"]
    window = 40 if case["rule"] == "window" else -1
    how = {"density": density, "dtype": case["dtype"], "pad": case["rule"] == "pad", "window": window}
    with ops.reference_only():
        return Call(2 * case["ratio"], 2, queries, keys, case["sizes"], DENSE, case["block"], **how,
                    shared=case["shared"], batch=case["batch"])  # fmt: skip


def launch(call: Call) -> tuple[Tensor, Tensor]:
    lists = block_ops.of(call.lists)
    return lowering.attend_blocks(call.query, *call.state, torch.tensor(call.keys), call.mask, *lists, *call.rest)


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

    @staticmethod
    def check(call: Call, out: Tensor, lse: Tensor) -> None:
        query, key, value, scale, dtype = call.query, call.key, call.value, call.rest[1], call.query.dtype
        assert out.dtype == dtype
        assert out.is_contiguous()
        seen = seen_by(call)
        best, best_lse = attend(query.double(), key.double(), value.double(), seen, scale, torch.float64)
        low, low_lse = attend(query, key, value, seen, scale, dtype)
        blind = best_lse.isinf()
        assert torch.equal(lse.isinf(), blind)
        assert out[blind].eq(0).all()
        rounding = torch.finfo(dtype).eps * best.abs().max()
        # Scores are summed, scaled to base 2 and shifted in fp32: each rounding moves a weight by as much of it.
        shifting = 3 * 2.0**-24 * largest_score(query, key, scale) * value.double().abs().max()
        assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding + shifting
        # The lse is fp32, whatever the dtype: what summing D products in fp32 may lose is added.
        summing = query.shape[3] * 2.0**-23 * scale * (query.double().abs().amax() * key.double().abs().amax())
        difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
        assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6

    def test_every_pair_is_counted_once(self) -> None:
        """Values that tell keys apart: with equal scores the output is the share of each key, and no key has two."""
        keys, block = 200, 64
        keep = blocks.possible(keys, keys, block)
        listed = blocks.lists(keep[None, None], blocks.whole(keys, keys, block), block)
        zero, value = torch.zeros(1, 1, keys, 64), torch.eye(200)[None, None]
        out, _ = lowering.attend_blocks(zero, zero, None, None, value, None, None, torch.tensor(keys), None,
                                        *block_ops.of(listed), DENSE.name, 1.0, True, -1)  # fmt: skip
        share = torch.ones(keys, keys).tril() / torch.arange(1, keys + 1)[:, None]
        torch.testing.assert_close(out[0, 0], share, rtol=1e-6, atol=1e-8)

    def test_all_blocks_are_dense_attention(self) -> None:
        call = made({"tokens": (150, 333), "sizes": (64, 64), "dtype": torch.float32, "block": 64, "ratio": 3,
                     "batch": 2, "rule": "causal", "shared": False}, density=2.0)  # fmt: skip
        out, lse = launch(call)
        wanted, wanted_lse = lowering.attend(call.query, *call.state, torch.tensor(call.keys), None, *call.rest)
        torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-6)

    def test_full_blocks_are_not_tested_and_a_cut_one_is(self) -> None:
        """Full blocks of the future are seen; of the last one, which the end cuts short, no key that is not there."""
        call = made(PLAIN)
        keep = torch.ones(5, 5, dtype=torch.bool)
        call.lists = blocks.lists(keep[None, None], keep[None, None], 64)
        out, _ = launch(call)
        seen = blocks.tokens(keep, 300, 300, 64)
        seen[:, 256:] = torch.ones(300, 300, dtype=torch.bool).tril()[:, 256:]
        wanted, _ = attend(call.query, call.key, call.value, seen, call.rest[1], torch.float32)
        torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)

    def test_no_block_is_no_key(self) -> None:
        call = made(PLAIN)
        call.lists = blocks.lists(torch.zeros(1, 1, 5, 5, dtype=torch.bool), None, 64)
        out, lse = launch(call)
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()

    @pytest.mark.parametrize("wrong", [5, 10**9, -1, -(10**9)])
    @pytest.mark.parametrize("kind", ["kv_indices", "full_kv_indices", "kv_num_blocks", "full_kv_num_blocks"])
    def test_rows_of_a_wrong_list_are_nan(self, kind: str, wrong: int) -> None:
        """And no others; memory around the tensors is never read (the interpreter would end with a fault)."""
        call = made(PLAIN | {"ratio": 2})
        right, right_lse = launch(call)
        if "num" in kind:
            getattr(call.lists, kind)[1, 2, 3] = wrong + (wrong == 5)
        else:
            getattr(call.lists, kind)[1, 2, 3, 0] = wrong
            getattr(call.lists, kind.replace("indices", "num_blocks"))[1, 2, 3].clamp_(min=1)
        out, lse = launch(call)
        rows = torch.zeros(2, 4, 300, dtype=torch.bool)
        rows[1, 2, 192:256] = True
        assert out[rows].isnan().all()
        assert lse[rows].isnan().all()
        assert torch.equal(out[~rows], right[~rows])
        assert torch.equal(lse[~rows], right_lse[~rows])

    def test_lists_that_end_before_the_keys_are_nan(self) -> None:
        call = made(PLAIN)
        good = call.lists
        assert good.full_kv_indices is not None
        call.lists = blocks.BlockLists(good.kv_num_blocks, good.kv_indices[..., :4], good.full_kv_num_blocks,
                                       good.full_kv_indices[..., :4], 64)  # fmt: skip
        assert launch(call)[0].isnan().all()

    def test_lists_of_other_shapes(self) -> None:
        call = made(PLAIN)
        good = call.lists
        for change, error, said in (
            ({"kv_num_blocks": good.kv_num_blocks.long()}, BlockError, "int32"),
            ({"block": 32}, BlockError, "10 rows"),
            ({"kv_num_blocks": good.kv_num_blocks[:, :1]}, ops.KernelUnavailable, "different shapes"),
        ):
            call.lists = blocks.dataclasses.replace(good, **change)
            with pytest.raises(error, match=said):
                launch(call)

    def test_what_has_no_kernel_is_declined(self) -> None:
        call = made(PLAIN)
        lists = block_ops.of(call.lists)
        args = (call.query, *call.state, torch.tensor(call.keys), None, *lists, *call.rest)
        with pytest.raises(ops.KernelUnavailable, match="with key_position, token_mask"):
            lowering.attend_blocks(*args, token_mask=call.query, key_position=call.query)
        form = KVForm(4, 4)
        with ops.reference_only():
            packed = Call(4, 2, 300, 300, (64, 64), form, 64)
        with pytest.raises(ops.KernelUnavailable, match=form.name):
            launch(packed)


PLAIN: dict[str, Any] = {"tokens": (300, 300), "sizes": (64, 64), "dtype": torch.float32, "block": 64, "ratio": 1,
                         "batch": 2, "rule": "causal", "shared": False}  # fmt: skip

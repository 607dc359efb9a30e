"""Triton kernels over block lists of a store in few bits, of which the newest tokens are not packed.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from test_block_parts import PARTS, values
from test_block_triton import seen_by
from test_list_parts_triton import (
    ALL,
    BF16,
    F32,
    PLAIN,
    check,
    check_state,
    id_of,
    launch,
    made,
    program,
    spread,
    state,
)
from test_ranges import pairs, some
from triton_calls import fits

from effcompile import lowering
from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate
from effcompile.lowering import triton

test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


PACKED = [
    (PLAIN | {"heads": (4, 2), "tokens": (20, 220), "form": KVForm(4, 4, 32, 96)}, False),
    (PLAIN | {"tokens": (70, 203), "size": 80, "dtype": BF16, "block": 64, "form": KVForm(8, 16, 32, 32), "pad": True,
              "heads": (2, 2)}, True),
    (PLAIN | {"tokens": (33, 140), "dtype": torch.float16, "block": 48, "form": KVForm(16, 8, 16, 0)}, False),
]  # fmt: skip
MORE_PACKED = [
    (PLAIN | {"heads": heads, "tokens": (100, 333), "dtype": dtype, "block": block, "form": form} | more, every)
    for form, block, dtype, heads, more, every in (
        (KVForm(4, 4), 128, BF16, (3, 1), {}, False),
        (KVForm(4, 4, 16, 0), 48, BF16, (2, 2), {"window": 90}, True),
        (KVForm(3, 2, 32, 64), 64, F32, (4, 2), {}, False),
        (KVForm("fp8", "fp8"), 64, BF16, (2, 2), {"pad": True}, False),
        (KVForm(8, 8, 64, 64), 128, torch.float16, (2, 1), {"size": 128}, True),
        (KVForm(4, 4, 32, 32, "token", "channel"), 96, BF16, (2, 1), {}, False),
    )
]


class TestPacked:
    """Blocks of a store in few bits, of which the newest tokens are not packed."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "parts"), PACKED, ids=id_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], parts: bool) -> None:
        call = made(**case)
        more = values(call, PARTS["all"], (1, 1, 1), extra=-call.keys % 128) if parts else {}
        check(call, seen_by(call), *launch(call, **more), **more)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("case", "parts"), MORE_PACKED, ids=id_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], parts: bool) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, parts)

    def test_every_block_is_dense_attention(self) -> None:
        """With full blocks among the packed and the newest, one that holds both, and one that the end cuts short."""
        call = made(**PLAIN | {"tokens": (20, 110), "form": KVForm(8, 4, 16, 48), "dtype": BF16, "density": 2.0})
        assert call.lists.full_kv_num_blocks is not None
        assert call.lists.full_kv_num_blocks.eq(2).all()
        out, lse = launch(call)
        wanted, wanted_lse = triton.attend(call.query, *call.state, torch.tensor(110), None, *call.rest)
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-4)

    def test_the_other_operands(self) -> None:
        """Ranges, a mask of pairs, queries elsewhere and a state: what is packed makes no difference to these."""
        call = made(**PLAIN | {"tokens": (40, 110), "form": KVForm(8, 4, 16, 32)})
        seen, given = spread(call), some(2, 2, 40, 110)
        allowed, stands = torch.rand(1, 2, 40, 128) < 0.7, torch.randint(0, 130, (2, 1, 40))
        before = state(call, F32)
        more = {"ranges": given, "allowed": allowed, "query_positions": stands}
        found = launch(call, **more, before_out=before[0], before_lse=before[1])
        seen = seen & pairs(given, 110) & allowed[..., :110] & (torch.arange(110) <= stands[..., None])
        check_state(call, seen, found, before)

    @pytest.mark.parametrize("kind", ["kv", "full_kv"])
    def test_lists_that_do_not_ascend_are_nan(self, kind: str) -> None:
        """Where a block with newest tokens stands before one without, whose tokens would be left out."""
        call = made(**PLAIN | {"tokens": (64, 160), "form": KVForm(8, 8, 16, 48)})
        counts, indices = (getattr(call.lists, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        right = launch(call)
        counts[0, 1, 0], indices[0, 1, 0, :2] = 2, torch.tensor([3, 0])
        counts[1, 0, 0], indices[1, 0, 0, 0] = 1, -1
        counts[1, 1, 1], indices[1, 1, 1, 0] = 1, 5
        bad = torch.zeros(2, 2, 64, dtype=torch.bool)
        bad[0, 1, :32], bad[1, 0, :32], bad[1, 1, 32:] = True, True, True
        out, lse = launch(call)
        assert torch.equal(out.isnan().all(-1), bad)
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(out[~bad], right[0][~bad])

    def test_what_has_no_kernel_is_declined(self) -> None:
        call = made(**PLAIN | {"tokens": (40, 110), "form": KVForm(4, 4), "block": 48})
        with pytest.raises(ops.KernelUnavailable, match="blocks of 48 tokens, which do not hold whole groups of 32"):
            launch(call)
        call = made(**PLAIN | {"tokens": (40, 128), "form": KVForm(4, 4)})
        with pytest.raises(ops.KernelUnavailable, match="with the parts of attend_blocks_pos_k4v4"):
            launch(call, key_positions=torch.arange(128)[None, None])


AHEAD = [(program(form=KVForm(4, 4)), "sm_90", 128)]
FORMS = [KVForm(4, 4), KVForm(8, 8), KVForm(8, 16), KVForm(3, 2, 32, 64)]
KINDS: list[tuple[KVForm, dict[str, Any]]] = [(form, {}) for form in FORMS]
KINDS += [
    (KVForm(4, 4), {"score": ALL, "before": True}),
    (KVForm(4, 4), {"ranges": True, "predicate": Predicate(key_mask=True)}),
]
MORE_AHEAD = [
    (program(form=form, key_size=size, value_size=size, **more), chip, 128)
    for form, more in KINDS
    for chip in ("sm_90", "sm_100", "gfx942")
    for size in (64, 128)
]


class TestAhead:
    __test__ = not INTERPRETED

    test_fits_a_chip = fits(AHEAD)
    test_fits_more = pytest.mark.exhaustive(fits(MORE_AHEAD))

    def test_what_is_refused_for_gpus(self) -> None:
        for form in FORMS:
            assert lowering.refusal(program(form=form), "cuda") is None
        assert "groups of 48" in str(lowering.refusal(program(form=KVForm(4, 4, 48, 48)), "cuda"))
        for refused in ({"columns": True}, {"positions": True}, {"form": KVForm(4, 4, rope="pre")}):
            more = {"form": KVForm(4, 4)} | refused
            assert "with the parts of" in str(lowering.refusal(program(**more), "cuda"))

"""The Triton kernel over pages: keys before RoPE, lists and masks that rows of a batch share; ahead of time.

``test_list_triton.py`` has the rest of that kernel. As in ``test_triton_kernels.py`` the interpreter needs a child
process, which the first test starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_list_triton
import torch
from interpreter import INTERPRETED, interpreted
from test_rope_triton import table_of
from test_triton_kernels import empty, name_of, tokens
from triton_calls import assert_within_budget

from effcompile import lowering as all_lowerings
from effcompile.kernels import attention, blocks, ops, pages, quantize
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import triton, triton_blocks

DENSE, F32, F16, BF16 = KVForm(16, 16), torch.float32, torch.float16, torch.bfloat16
BATCH, GROUPS = 3, 2

test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


def case(
    form: KVForm, size: int, dtype: torch.dtype, page: int, length: int, ratio: int, **more: Any
) -> dict[str, Any]:
    """One query; ``lead``: for how many batch entries and key/value heads there are lists; ``rotary``: channels."""
    plain = {"queries": 1, "lead": (BATCH, GROUPS), "masks": 0, "rotary": size if form.pre else 0}
    return {"form": form, "size": size, "dtype": dtype, "page": page, "length": length, "ratio": ratio} | plain | more


CASES = [
    case(DENSE, 64, F32, 16, 150, 2, lead=(1, GROUPS), masks=1),
    case(KVForm(8, 4, 32, 32), 64, BF16, 32, 139, 1, lead=(1, 1), masks=BATCH),
    case(KVForm(4, 4, 32, 32, rope="pre"), 64, BF16, 32, 141, 3, masks=BATCH),
    case(KVForm(8, 16, 16, 0, rope="pre_adjacent"), 64, F32, 48, 130, 1, queries=2, lead=(1, GROUPS), rotary=32),
]
MORE_CASES = [
    case(form, size, dtype, page, length, ratio, **more)
    for form, size, dtype, page, length, ratio, more in (
        (DENSE, 80, BF16, 48, 333, 4, {"lead": (1, 1), "queries": 3}),
        (KVForm("fp8", "fp8"), 64, F16, 64, 257, 2, {"lead": (1, GROUPS), "masks": 1}),
        (KVForm(4, 4, rope="pre"), 128, F16, 64, 400, 4, {"lead": (1, 1), "masks": 1}),
        (KVForm(2, 2, rope="pre"), 128, BF16, 32, 65, 1, {"rotary": 64}),
        (KVForm(3, 2, 32, 64, rope="pre"), 64, F32, 96, 300, 2, {"lead": (BATCH, 1)}),
        (KVForm(8, 8, 16, 32, rope="pre"), 80, BF16, 16, 31, 3, {"rotary": 32, "masks": BATCH}),
        (KVForm(3, 4, 16, 0, rope="pre_adjacent"), 64, F16, 32, 333, 2, {"queries": 2, "lead": (BATCH, 1)}),
    )
]


class TestPages:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "splits"), [(CASES[0], 1), (CASES[1], 3), (CASES[2], 3), (CASES[3], 1)])
    def test_within_twice_the_loss_of_the_dtype(
        self, case: dict[str, Any], splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With an odd last page that everybody visits, and padding on the left of which one row has nothing else."""
        monkeypatch.setattr(triton, "splits_for", lambda heads, capacity, _: splits)
        form, size, n, page = (case[name] for name in ("form", "size", "length", "page"))
        capacity = (n // form.group + 4) * form.group
        state = empty(form, BATCH, GROUPS, capacity, (size, size), case["dtype"])
        key, value = (tokens(BATCH, n, GROUPS, size, case["dtype"], seed) for seed in (0, 1))
        table = table_of(BATCH, capacity, case["rotary"], n) if form.pre else None
        with ops.reference_only():
            torch.ops.effcompile.kv_store(*state, torch.tensor(0), key, value, form.name, table=table)
        query = tokens(BATCH, case["queries"], GROUPS * case["ratio"], size, case["dtype"], 2)
        hidden = torch.tensor([9, 0, n])[: case["masks"], None]
        mask = torch.arange(capacity) >= hidden if case["masks"] else None
        listed, counts, chosen = self.lists(case["lead"], blocks.count_blocks(n, page))
        scale = size**-0.5 / 6
        out, lse = triton_blocks.attend_pages(
            query, *state, torch.tensor(n), mask, listed, counts, page, form.name, scale, table=table
        )
        keys, values = ops.split_state(tuple(state))
        k, v = quantize.load_side(keys, n, form, "key", table), quantize.load_side(values, n, form, "value")
        seen = chosen.repeat_interleave(page, 2)[:, :, None, :n].expand(BATCH, GROUPS, 1, n)
        rule = Predicate(key_mask=mask is not None)
        seen = seen.repeat_interleave(case["ratio"], 1) & attention.allowed(rule, case["queries"], n, mask, k.device)
        assert seen.any(-1).all(1).all(-1).tolist() == [True, True, case["masks"] < BATCH]
        assert_within_budget(out, lse, query, k, v, seen, scale)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("case", CASES + MORE_CASES, ids=name_of)
    def test_more(self, case: dict[str, Any], splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, splits, monkeypatch)

    @staticmethod
    def lists(lead: tuple[int, int], total: int) -> tuple[torch.Tensor, ...]:
        """Random lists and their counts, different for each row and head that has one, and the same as bool."""
        chosen = torch.rand(*lead, total, generator=torch.Generator().manual_seed(4)) < 0.5
        chosen[..., -1] = True
        return *pages.take(torch.where(chosen, 0.0, -torch.inf), total), chosen


AHEAD = [
    (chip, form, 32)
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942")
    for form in (KVForm(2, 2, rope="pre"), KVForm(4, 4, rope="pre"), KVForm(8, 4, rope="pre_adjacent"))
]


@pytest.mark.exhaustive
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(("chip", "form", "page"), AHEAD, ids=lambda v: getattr(v, "name", str(v)))
def test_keys_before_rope_fit_a_chip(chip: str, form: KVForm, page: int) -> None:
    program = Program("decode", form, Predicate(), BF16, 4, 128, 128, rotary=128, blocks=True)
    assert all_lowerings.refusal(program, "cuda") is None
    test_list_triton.TestAhead().test_pages_fit_a_chip(program, chip, page)

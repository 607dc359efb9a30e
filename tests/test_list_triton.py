"""Triton kernels over lists with columns, key positions or a given mask, and over pages; compiled ahead of time too.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_columns import Call
from test_triton_aot import CHIPS, SHARED
from test_triton_kernels import divides, empty, name_of, reference_store, tokens
from torch import Tensor
from triton_calls import assert_within_budget, fits

from effcompile import lowering as all_lowerings
from effcompile.kernels import attention, block_ops, blocks, columns, ops, pages, quantize
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.lowering import triton, triton_blocks
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_build import build

DENSE = KVForm(16, 16)


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


def launch(call: Call, **changes: Any) -> tuple[Tensor, Tensor]:
    """The call of ``test_columns.py`` in Triton."""
    args = (call.query, call.key, None, None, call.value, None, None, torch.tensor(call.keys), call.mask)
    rest = (DENSE.name, call.size**-0.5, True, call.window)
    return triton_blocks.attend_blocks(*args, *block_ops.of(call.lists), *rest, **{**call.extra, **changes})


SIZES: dict[str, list[Any]] = {
    "size": [64, 80, 128], "dtype": [torch.bfloat16, torch.float16, torch.float32], "block": [64, 48, 32],
    "heads": [(4, 2), (3, 1), (2, 2)], "rule": ["causal", "window", "pad"],
}  # fmt: skip
CASES = [
    {"size": 64, "dtype": torch.float32, "block": 32, "heads": (2, 1), "rule": "causal", "tokens": (70, 101),
     "span": 2, "shared": False, "permuted": False},
    {"size": 80, "dtype": torch.bfloat16, "block": 48, "heads": (2, 2), "rule": "pad", "tokens": (65, 65),
     "span": 1, "shared": True, "permuted": False},
    {"size": 80, "dtype": torch.bfloat16, "block": 64, "heads": (2, 1), "rule": "pad", "tokens": (70, 150),
     "span": 1, "shared": False, "permuted": True},
]  # fmt: skip
MORE_CASES = pairwise(
    **SIZES, tokens=[(1, 1), (65, 65), (150, 150), (90, 233), (3, 200)], span=[1, 2, 5], shared=[False, True],
    permuted=[False, True],
)  # fmt: skip


def made(case: dict[str, Any]) -> Call:
    (heads, groups), (queries, keys) = case["heads"], case["tokens"]
    rule = {"pad": case["rule"] == "pad", "window": 70 if case["rule"] == "window" else -1}
    if keys < 10:
        rule["pad"] = False
    call = Call(heads, groups, queries, keys, case["size"], case["block"], case["span"], case["dtype"],
                shared=case["shared"], permuted=case["permuted"], **rule)  # fmt: skip
    # Heads of values have a size of their own.
    call.value = torch.randn(2, groups, keys, case["size"] + 16).to(case["dtype"])
    return call


PLAIN = CASES[0]


class TestListed:
    """Columns and key positions."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        call = made(case)
        seen = call.seen
        assert_within_budget(*launch(call), call.query, call.key, call.value, seen, call.size**-0.5)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_CASES, ids=name_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case)

    def test_every_key_in_single_columns_is_dense_attention(self) -> None:
        """The diagonal in blocks, everything before it key by key: each pair counts once."""
        call = made(PLAIN | {"tokens": (70, 70)})
        call.lists = blocks.lists(blocks.own(70, 70, 32)[None, None], None, 32)
        before = torch.arange(70) < torch.arange(3)[:, None] * 32
        single, counts = columns.gathered(torch.arange(70), before[None, None])
        out, _ = launch(call, columns=single, column_counts=counts, span=1)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)

    def test_rows_of_wrong_columns_are_nan(self) -> None:
        """And no others, each for its own reason; a full block is searched as a partial one."""
        call = made(PLAIN | {"tokens": (160, 160), "span": 1})
        own = blocks.own(160, 160, 32)
        listed = (own | (torch.arange(5)[:, None] > 3) & (torch.arange(5) == 1))[None, None]
        call.lists = blocks.lists(listed, blocks.whole(160, 160, 32), 32)
        single, counts = torch.full((2, 2, 5, 160), -7, dtype=torch.int32), torch.full((2, 2, 5), 2, dtype=torch.int32)
        single[..., :2] = torch.tensor([5, 66], dtype=torch.int32)
        counts[:, :, :3] = 0
        right, right_lse = launch(call, columns=single, column_counts=counts, span=1)
        assert right.isfinite().all()
        wrong = {
            (0, 0, 3): (1, 160), (0, 0, 4): (0, -1), (0, 1, 3): (1, 5), (0, 1, 4): (1, 3),
            (1, 0, 3): (1, 3 * 32 + 7), (1, 0, 4): (1, 32 + 31),  # in a partial block, and in a full one
        }  # fmt: skip
        for row, (place, number) in wrong.items():
            single[(*row, place)] = number
        counts[1, 1, 3], counts[1, 1, 0] = 161, -1
        out, lse = launch(call, columns=single, column_counts=counts, span=1)
        bad = torch.zeros(2, 2, 160, dtype=torch.bool)
        for entry, head, row in [*wrong, (1, 1, 3), (1, 1, 0)]:
            bad[entry, head, 32 * row : 32 * row + 32] = True
        assert torch.equal(out.isnan().all(-1), bad)
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(out[~bad], right[~bad])
        assert torch.equal(lse[~bad], right_lse[~bad])

    def test_lists_of_blocks_that_do_not_ascend_are_nan_beside_columns(self) -> None:
        """A column would be searched for in them, whether there is one or not."""
        call = made(PLAIN)
        call.extra["column_counts"][0, 0] = 0
        assert launch(call)[0].isfinite().all()
        call.lists.kv_indices[0, 0, 2, :2] = torch.tensor([2, 1])
        call.lists.kv_num_blocks[0, 0, 2] = 2
        out, _ = launch(call)
        assert out[0, 0, 64:].isnan().all()
        assert out[0, 0, :64].isfinite().all()

    @pytest.mark.parametrize(("dtype", "far"), [(torch.int32, 2**31 - 1), (torch.int64, 2**32 + 1)])
    def test_rows_that_test_a_token_that_is_not_there_are_nan(self, dtype: torch.dtype, far: int) -> None:
        """Those from the block of its slot on, of the heads that share the keys."""
        call = made(PLAIN | {"tokens": (100, 100), "heads": (2, 2), "permuted": True})
        call.lists = blocks.lists(torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), None, 32)
        order = torch.arange(100, dtype=dtype).expand(2, 2, -1).clone()
        right, _ = launch(call, key_positions=order)
        order[0, 0, 70], order[0, 1, 40], order[1, 0, 99] = 100, -1, far
        out, lse = launch(call, key_positions=order)
        bad = torch.zeros(2, 2, 100, dtype=torch.bool)
        bad[0, 0, 64:], bad[0, 1, 32:], bad[1, 0, 96:] = True, True, True
        assert torch.equal(out.isnan().all(-1), bad)
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(out[~bad], right[~bad])

    def test_slots_without_a_token_are_nan(self) -> None:
        call = made(PLAIN | {"permuted": True})
        order = torch.arange(call.keys)[None, None]
        assert launch(call, key_positions=order)[0].isfinite().all()
        call.keys -= 1
        assert launch(call, key_positions=order)[0].isnan().all()

    def test_what_has_no_kernel_is_declined(self) -> None:
        call = made(PLAIN | {"tokens": (70, 70), "permuted": True})
        for positions in (torch.arange(69)[None, None], torch.arange(70), torch.zeros(1, 1, 70)):
            with pytest.raises(ops.KernelUnavailable, match="key positions of"):
                launch(call, key_positions=positions)
        with pytest.raises(BlockError, match=r"for \(3, 1\) batch entries"):
            launch(call, key_positions=torch.arange(70).expand(3, 1, -1))
        call = made(PLAIN)
        single, counts = (call.extra[name].repeat(1, 3, *[1] * n) for name, n in (("columns", 2), ("column_counts", 1)))
        for changes, said in (
            ({"columns": call.extra["columns"].long()}, "int32"),
            ({"span": 1}, "not 3 lists"),
            ({"columns": single, "column_counts": counts}, r"for \(2, 6\) batch entries"),
        ):
            with pytest.raises(BlockError, match=said):
                launch(call, **changes)
        with pytest.raises(ops.KernelUnavailable, match="a mask of"):
            launch(call, columns=None, column_counts=None, allowed=torch.ones(1, 1, 70, 100, dtype=torch.bool))


GIVEN = [
    {"lead": (2, 1), "heads": (2, 1), "tokens": (100, 100), "size": 64, "dtype": torch.float32, "block": 64,
     "causal": False},
    {"lead": (1, 2), "heads": (2, 2), "tokens": (65, 130), "size": 80, "dtype": torch.bfloat16, "block": 48,
     "causal": True},
]  # fmt: skip


@pytest.mark.parametrize("case", GIVEN, ids=name_of)
def test_given_mask(case: dict[str, Any]) -> None:
    """The lists of the mask, which may have more keys than there are, and causality besides."""
    (heads, groups), (queries, keys), causal = case["heads"], case["tokens"], case["causal"]
    mask = torch.rand(*case["lead"], queries, keys) < 0.4
    mask[..., :70, :64], mask[..., -20:, 64:], mask[..., 5, :] = True, False, False
    some, every = blocks.of_mask(mask, case["block"])
    lists = blocks.lists(some, every & (not causal), case["block"])
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    query, *sides = (tokens(2, *shape, case["size"], case["dtype"], seed) for seed, shape in enumerate(shapes))
    key, value = (x.contiguous() for x in sides)
    wide, scale = torch.nn.functional.pad(mask, (0, 3), value=True), case["size"] ** -0.5 / 6
    args = (query, key, None, None, value, None, None, torch.tensor(keys), None, *block_ops.of(lists), DENSE.name)
    out, lse = triton_blocks.attend_blocks(*args, scale, causal, -1, allowed=wide)
    seen = mask & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]) if causal else mask
    assert_within_budget(out, lse, query, key, value, seen, scale)
    # In another order in memory, as a model may make it.
    again, _ = triton_blocks.attend_blocks(*args, scale, causal, -1, allowed=wide.mT.contiguous().mT)
    assert torch.equal(out, again)


test_given_mask.__test__ = INTERPRETED  # type: ignore[attr-defined]


PAGED = [
    {"form": form, "sizes": sizes, "dtype": dtype, "page": page, "length": length, "ratio": ratio, "queries": queries,
     "shared": shared, "masked": masked}
    for form, sizes, dtype, page, length, ratio, queries, shared, masked in (
        (DENSE, (64, 64), torch.float32, 16, 300, 3, 1, False, False),
        (DENSE, (80, 96), torch.bfloat16, 48, 433, 1, 2, True, True),
        (KVForm(4, 4), (64, 64), torch.bfloat16, 32, 500, 4, 1, False, True),
        (KVForm(8, 4, 16, 32), (96, 64), torch.float16, 64, 333, 3, 3, False, False),
        (KVForm(3, 2, 32, 0, "token"), (64, 64), torch.float32, 32, 300, 3, 1, True, False),
        (KVForm(16, "fp8", 32, 64), (64, 96), torch.float16, 96, 450, 4, 1, False, False),
        (KVForm(8, 16, 32, 32), (64, 64), torch.bfloat16, 128, 257, 2, 1, False, True),
    )
]  # fmt: skip
MORE_PAGED = [
    case
    for case in pairwise(
        form=[DENSE, KVForm(8, 8, 32, 32), KVForm(4, 4), KVForm(4, 4, 16, 0), KVForm(3, 3, 32, 64), KVForm(2, 16),
              KVForm("fp8", "fp8"), KVForm(4, 4, 32, 32, "token", "channel")],
        sizes=[(64, 64), (96, 64), (128, 128)], dtype=[torch.bfloat16, torch.float16, torch.float32],
        page=[32, 64, 96], length=[1, 31, 65, 320], ratio=[1, 4], queries=[1, 4], shared=[False, True],
        masked=[False, True],
    )
    if case["queries"] <= case["length"] and divides(case["form"], case["sizes"])
]  # fmt: skip


class Paged:
    """A store, queries for its last tokens, and random lists of pages for each head."""

    def __init__(self, case: dict[str, Any], density: float = 0.4) -> None:
        self.form, sizes, dtype, length = case["form"], case["sizes"], case["dtype"], case["length"]
        capacity = (length // self.form.group + 4) * self.form.group
        self.state = empty(self.form, 2, 2, capacity, sizes, dtype)
        key, value = (tokens(2, length, 2, size, dtype, seed) for seed, size in enumerate(sizes))
        reference_store(*self.state, torch.tensor(0), key, value, self.form.name)
        self.query = tokens(2, case["queries"], 2 * case["ratio"], sizes[0], dtype, 2)
        self.mask = torch.rand(2, capacity) > 0.3 if case["masked"] else None
        self.length, self.page, self.scale = length, case["page"], sizes[0] ** -0.5 / 6
        scores = torch.rand(2, 1 if case["shared"] else 2, blocks.count_blocks(length, self.page))
        scores[scores > density] = -torch.inf
        listed, self.counts = pages.take(scores, 10**6)
        # What lies behind a count is not read.
        self.listed = torch.where(torch.arange(listed.shape[2]) < self.counts[..., None], listed, 10**6).int()

    def launch(self) -> tuple[Tensor, Tensor]:
        rest = (self.listed, self.counts, self.page, self.form.name, self.scale)
        return triton_blocks.attend_pages(self.query, *self.state, torch.tensor(self.length), self.mask, *rest)

    def check(self, out: Tensor, lse: Tensor) -> None:
        keys, values = ops.split_state(tuple(self.state))
        n, queries = self.length, self.query.shape[2]
        key, value = (quantize.load_side(s, n, self.form, kind) for s, kind in ((keys, "key"), (values, "value")))
        visited = blocks.visited(self.counts, self.listed, blocks.count_blocks(n, self.page))
        visited = visited.repeat_interleave(self.page, 2)[:, :, None, :n]
        if visited.shape[1] == 2:
            visited = visited.repeat_interleave(self.query.shape[1] // 2, 1)
        rule = Predicate(key_mask=self.mask is not None)
        seen = attention.allowed(rule, queries, n, self.mask, key.device) & visited
        assert_within_budget(out, lse, self.query, key, value, seen, self.scale)


class TestPaged:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def split(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lists in three parts, which is no power of two, if a test does not say otherwise."""
        splits = request.node.callspec.params.get("splits", 3) if hasattr(request.node, "callspec") else 3
        monkeypatch.setattr(triton, "splits_for", lambda heads, capacity, _: splits)

    @pytest.mark.parametrize(("case", "splits"), [(PAGED[0], 1), (PAGED[1], 3), (PAGED[2], 3), (PAGED[3], 1)])
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], splits: int) -> None:
        call = Paged(case)
        call.check(*call.launch())

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(
        ("case", "splits"),
        list(zip(PAGED[4:] + MORE_PAGED, itertools.cycle([1, 3]))),
        ids=lambda v: name_of(v) if isinstance(v, dict) else str(v),
    )
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], splits: int) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, splits)

    def test_a_list_of_all_pages_is_decoding(self) -> None:
        call = Paged(PAGED[3] | {"dtype": torch.float32, "length": 150}, density=2.0)
        rest = (torch.tensor(call.length), call.mask, call.form.name, call.scale, True, -1)
        for ours, wanted in zip(call.launch(), triton.attend(call.query, *call.state, *rest), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)

    def test_no_page_is_no_key(self) -> None:
        call = Paged(PAGED[2], density=0)
        out, lse = call.launch()
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()

    @pytest.mark.parametrize("case", [PAGED[0] | {"length": 75}, PAGED[3] | {"length": 310}], ids=name_of)
    def test_heads_of_a_wrong_list_are_nan(self, case: dict[str, Any]) -> None:
        """And no others: pages that are not there, twice, or not in order, and counts that cannot be."""
        call, ratio = Paged(case, density=2.0), case["ratio"]
        right, right_lse = call.launch()
        total, good, counts = call.listed.shape[2], call.listed, call.counts
        assert total == 5
        for numbers in (((4, 5), (1, 0), (0, -1)), ((2, 4), (4, 10**9), (3, -(10**9)))):
            call.listed = good.clone()
            for (entry, head), (place, number) in zip(((0, 0), (0, 1), (1, 0)), numbers, strict=True):
                call.listed[entry, head, place] = number
            self.only_the_last(call, right, right_lse, ratio)
        call.listed, call.counts = good, counts.clone()
        call.counts[0, 0], call.counts[0, 1], call.counts[1, 0] = 6, -1, 10**9
        self.only_the_last(call, right, right_lse, ratio)

    @staticmethod
    def only_the_last(call: Paged, right: Tensor, right_lse: Tensor, ratio: int) -> None:
        """The list of the last head is right."""
        out, lse = call.launch()
        good = torch.zeros(lse.shape, dtype=torch.bool)
        good[1, ratio:] = True
        assert out[~good].isnan().all()
        assert lse[~good].isnan().all()
        assert torch.equal(out[good], right[good])
        assert torch.equal(lse[good], right_lse[good])

    def test_what_has_no_kernel_is_declined(self) -> None:
        call = Paged(PAGED[2])
        for changes, said in (
            ({"page": 16}, "pages of 16 tokens, which do not hold whole groups of 32"),
            ({"query": call.query.repeat(1, 1, 5, 1)}, "5 queries of 4 heads"),
            ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "a key mask of"),
        ):
            changed = copy.copy(call)
            vars(changed).update(changes)
            with pytest.raises(ops.KernelUnavailable, match=said):
                changed.launch()
        call.listed = call.listed.long()
        with pytest.raises(BlockError, match="int32"):
            call.launch()


def program(**changes: Any) -> Program:
    plain = Program("prefill", DENSE, Predicate(), torch.bfloat16, 4, 128, 128, blocks=True)
    return dataclasses.replace(plain, **changes)


COLUMNS, POSITIONS = program(columns=True), program(positions=True)
GIVEN_MASK = program(given=True, predicate=Predicate(False))
PADDED = Predicate(key_mask=True)
AHEAD = [(COLUMNS, "sm_90", 128), (POSITIONS, "sm_80", 128), (GIVEN_MASK, "gfx942", 64)]
MORE_AHEAD = [
    (dataclasses.replace(p, key_size=size[0], value_size=size[1], dtype=dtype, **rule), case["chip"], block)
    for case in pairwise(
        chip=CHIPS,
        kind=[(COLUMNS, {}), (COLUMNS, {"predicate": PADDED}), (POSITIONS, {"predicate": PADDED}), (GIVEN_MASK, {})],
        shape=[((128, 128), torch.bfloat16, 128), ((64, 64), torch.float16, 64), ((80, 96), torch.bfloat16, 48),
               ((256, 256), torch.bfloat16, 128), ((64, 64), torch.float32, 128)],
    )
    for (p, rule), (size, dtype, block) in [(case["kind"], case["shape"])]
]  # fmt: skip
PAGES_AHEAD = [
    (program(phase="decode", form=KVForm(4, 4)), "sm_90", 32),
    (program(phase="decode", form=KVForm(8, 4), predicate=PADDED), "gfx942", 32),
]
MORE_PAGES = [
    (program(phase="decode", form=form, dtype=dtype, predicate=rule), case["chip"], page)
    for case in pairwise(
        chip=CHIPS,
        store=[(DENSE, 16), (DENSE, 128), (KVForm(4, 4), 32), (KVForm(4, 4), 128), (KVForm(8, 8), 32),
               (KVForm(3, 2, 16, 32), 64), (KVForm("fp8", 8), 32)],
        kind=[(torch.bfloat16, Predicate()), (torch.float16, PADDED)],
    )
    for (form, page), (dtype, rule) in [(case["store"], case["kind"])]
]  # fmt: skip


class TestAhead:
    __test__ = not INTERPRETED

    test_fits_a_chip = fits(AHEAD)
    test_fits_more = pytest.mark.exhaustive(fits(MORE_AHEAD))

    @pytest.mark.parametrize(("program", "chip", "page"), PAGES_AHEAD, ids=lambda v: getattr(v, "name", str(v)))
    def test_pages_fit_a_chip(self, program: Program, chip: str, page: int) -> None:
        built = build(program, chip)
        assert built.blocks is not None
        sizes = triton_blocks.page_tiles(built.blocks, page, program.form)
        binary = compile_ahead(built, program, chip, sizes | {"SPLITS": 16})
        used = resources(binary)
        print(program.name, chip, page, sizes, used)
        assert 2 * used["shared"] <= SHARED[chip]
        # As for decoding, a few where the assembler makes room for another program.
        assert used["spilled"] <= 16
        assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
        assert ("v_mfma" if chip == "gfx942" else "mma.sync") in assembly
        assert chip == "gfx942" or "cp.async.wait_group" in assembly
        merged = compile_ahead(built, program, chip, {"SPLITS": 16, "PADDED": 16}, "merge_")
        assert resources(merged)["spilled"] == 0

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("program", "chip", "page"), MORE_PAGES, ids=lambda v: getattr(v, "name", str(v)))
    def test_more_pages_fit(self, program: Program, chip: str, page: int) -> None:
        self.test_pages_fit_a_chip(program, chip, page)

    def test_what_is_refused_for_gpus(self) -> None:
        for served in (COLUMNS, POSITIONS, GIVEN_MASK, *(p for p, _, _ in PAGES_AHEAD)):
            assert all_lowerings.refusal(served, "cuda") is None
        packed = program(form=KVForm(4, 4), columns=True)
        segments = program(predicate=Predicate(segments=True))
        paged = program(phase="decode", predicate=Predicate(window=9))
        for refused in (packed, segments, paged):
            assert "with the parts of" in str(all_lowerings.refusal(refused, "cuda"))
        assert "groups of 48" in str(all_lowerings.refusal(program(phase="decode", form=KVForm(4, 4, 48, 48)), "cuda"))

    @pytest.mark.parametrize("part", ["columns", "positions", "given"])
    def test_a_part_adds_to_the_plain_program(self, part: str) -> None:
        """What is generated without a part has nothing of it; with it, every line but those it changes stands there."""

        def lines(of: Program) -> list[str]:
            return Path(build(of, "sm_90").path).read_text().replace(of.name, "attend").splitlines()

        plain, more = lines(program()), lines(program(**{part: True}))
        word = {"columns": "column_", "positions": "token_of", "given": "allowed"}[part]
        assert any(word in line for line in more)
        assert not any(word in line for line in plain)
        gone = [line for line in plain if line not in more]
        assert len(gone) <= 8
        assert len(more) > len(plain)

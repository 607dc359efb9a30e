"""Triton kernels over block lists with what a call may bring besides.

Parts of a score, queries that stand elsewhere, ranges, and a state to begin with.

As in ``test_triton_kernels.py`` the interpreter needs a child process, which the first test starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from test_block_lists import Call
from test_block_parts import PARTS, values
from test_block_triton import seen_by
from test_columns import Call as Listed
from test_query_positions import seen_at
from test_ranges import pairs, some
from test_triton_kernels import attend, largest_score, name_of
from torch import Tensor
from triton_calls import assert_within_budget, fits

from effcompile import lowering, merge_state
from effcompile.kernels import block_ops, blocks, columns, ops, quantize, ranges
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.lowering import triton_blocks

DENSE = KVForm(16, 16)
F32, BF16 = torch.float32, torch.bfloat16


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


def id_of(value: Any) -> str:
    return name_of(value) if isinstance(value, dict) else str(value)


def made(
    heads: tuple[int, int], tokens: tuple[int, int], size: int, dtype: torch.dtype, block: int, **more: Any
) -> Call:
    """A call for two entries of a batch, with heads of values of another size than those of keys."""
    more = {"form": DENSE, "sizes": (size, 96 if size == 80 else size)} | more
    with ops.reference_only():
        call = Call(*heads, *tokens, block=block, dtype=dtype, **more)
    # What attention reads.
    sides, form = ops.split_state(tuple(call.state)), KVForm.parse(call.rest[0])
    call.key, call.value = (quantize.load_side(s, tokens[1], form, k) for s, k in zip(sides, ("key", "value")))
    return call


def launch(call: Call, **more: Any) -> tuple[Tensor, Tensor]:
    head = (call.query, *call.state, torch.tensor(call.keys), call.mask, *block_ops.of(call.lists), *call.rest)
    return triton_blocks.attend_blocks(*head, **more)


def check(call: Call, seen: Tensor, out: Tensor, lse: Tensor, **parts: Any) -> None:
    assert_within_budget(out, lse, call.query, call.key, call.value, seen, call.rest[1], **parts)


PLAIN: dict[str, Any] = {"heads": (2, 1), "tokens": (70, 101), "size": 64, "dtype": F32, "block": 32}
SCORED = [
    (PLAIN, "all", (1, 1, 1)),
    (PLAIN | {"heads": (2, 2), "tokens": (65, 65), "size": 80, "dtype": BF16, "block": 48, "pad": True}, "all",
     (0, 1, 0)),
]  # fmt: skip
MORE_SCORED = [
    (PLAIN | {"heads": heads, "size": size, "dtype": dtype, "block": block} | more, parts, lead)
    for (heads, size, dtype, block, more), lead in zip(
        (
            ((3, 1), 64, BF16, 64, {}),
            ((2, 2), 128, F32, 48, {"window": 20}),
            ((4, 2), 80, torch.float16, 32, {"pad": True}),
        ),
        ((0, 0, 0), (1, 0, 1), (0, 1, 0)),
    )
    for parts in PARTS
]  # fmt: skip


class TestScores:
    """A soft cap, a bias and sinks, also beside single keys and for keys in another order."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "parts", "lead"), SCORED, ids=id_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], parts: str, lead: Any) -> None:
        call = made(**case)
        more = values(call, PARTS[parts], lead, extra=-call.keys % 128 + 3)
        check(call, seen_by(call), *launch(call, **more), **more)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("case", "parts", "lead"), MORE_SCORED, ids=id_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], parts: str, lead: Any) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, parts, lead)

    @pytest.mark.parametrize("permuted", [False, True])
    def test_beside_other_choices(self, permuted: bool) -> None:
        """A bias has a number for each token: it is looked up where a column is, or by what a slot holds."""
        call = Listed(4, 2, 64, 64, 64, 16, pad=False, permuted=permuted)
        more = values(call, PARTS["all"], (1, 1, 1), extra=0)  # type: ignore[arg-type]
        if permuted:
            # Blocks that need no test too: a bias is added in them as well.
            first = [torch.cat([torch.randperm(16), 16 + torch.randperm(48)]) for _ in range(4)]
            order = call.extra["key_positions"] = torch.stack(first).view(2, 2, 64)
            some, every = columns.blocks_at(order, 64, 16, 4)
            assert every.any()
            keep = call.lists.keep() & some
            call.lists = blocks.lists(keep, every, 16)
            slots = order.expand(2, 2, -1).repeat_interleave(2, 1)[:, :, None]
            call.seen = blocks.tokens(keep, 64, 64, 16) & (slots <= torch.arange(64)[:, None])
        head = (call.query, call.key, None, None, call.value, None, None, torch.tensor(64), None)
        rest = (*block_ops.of(call.lists), DENSE.name, 0.125, True, -1)
        out, lse = triton_blocks.attend_blocks(*head, *rest, **call.extra, **more)
        if permuted:
            more["bias"] = columns.bias_at(more["bias"], call.extra["key_positions"], call.query.shape, 2)
        assert_within_budget(out, lse, call.query, call.key, call.value, call.seen, 0.125, **more)

    def test_a_key_bias_with_a_scale_for_each_head(self) -> None:
        """Heads that nobody steers are as they were, bit by bit."""
        call = made(**PLAIN | {"heads": (3, 1)})
        steered = launch(call, bias=torch.randn(2, 1, 1, 128) * torch.tensor([0.0, 2, 0])[None, :, None, None])[0]
        same = (steered == launch(call)[0]).flatten(2).all(2)
        assert same.tolist() == [[True, False, True]] * 2

    def test_rows_without_keys_and_of_a_wrong_list(self) -> None:
        """A row without keys is 0 and its sink; a wrong list is not hidden by a sink."""
        call = made(**PLAIN)
        sinks = torch.tensor([0.5, -3.0])
        call.lists.kv_num_blocks[:], call.lists.full_kv_num_blocks[:] = 0, 0  # type: ignore[index]
        call.lists.kv_num_blocks[1, 0, 1] = -1
        out, lse = launch(call, sinks=sinks)
        bad = torch.zeros(2, 2, 70, dtype=torch.bool)
        bad[1, 0, 32:64] = True
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(out.isnan().all(-1), bad)
        assert not out[~bad].any()
        torch.testing.assert_close(lse[~bad], sinks[:, None].expand(2, 2, 70)[~bad], rtol=1e-6, atol=0)

    def test_what_does_not_fit_is_declined(self) -> None:
        call = made(**PLAIN)
        for more, said in (
            ({"bias": torch.zeros(2, 1, 1, 127)}, "a bias of"),
            ({"bias": torch.zeros(3, 1, 1, 128)}, "a bias of"),
            ({"sinks": torch.zeros(3)}, "sinks of"),
        ):
            with pytest.raises(ops.KernelUnavailable, match=said):
                launch(call, **more)


def spread(call: Call) -> Tensor:
    """Lists with more blocks than causality of the last queries has; returns the map of tokens."""
    keep = call.lists.keep() | (torch.rand(call.lists.keep().shape) < 0.5)
    call.lists = blocks.lists(keep, None, call.block)
    return blocks.tokens(keep, call.queries, call.keys, call.block)


LOW = -(2**31)
MOVED = [
    (PLAIN, False, 0),
    (PLAIN | {"heads": (2, 2), "tokens": (33, 128), "size": 80, "dtype": BF16, "block": 48, "pad": True}, True, 0),
    (PLAIN | {"tokens": (33, 128), "window": 20}, True, LOW),
]
MORE_MOVED = [
    (PLAIN | {"heads": (4, 2), "tokens": (100, 128), "size": 64, "dtype": BF16, "block": 64, "window": 40}, keys, 0)
    for keys in (False, True)
]  # fmt: skip


class TestMoved:
    """Queries, and keys too, that stand elsewhere than their places in the call say."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "keys", "low"), MOVED, ids=id_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], keys: bool, low: int) -> None:
        """Positions are shared, before every key and behind all; with keys they may be any numbers of 32 bits."""
        call = made(**case)
        (batch, heads, queries, _), groups = call.query.shape, call.key.shape[1]
        seen, slots = spread(call), torch.arange(call.keys)[None, None]
        stands = torch.randint(-3, call.keys + 40, (1 if keys else batch, heads, queries)) + low
        more: dict[str, Any] = {"query_positions": stands}
        if keys:
            slots = torch.randint(0, call.keys, (batch, groups, call.keys), dtype=torch.int32) + low
            more["key_positions"] = slots
        seen = seen & seen_at(call, slots.long(), stands)
        assert not seen.any(-1).all()
        out, lse = launch(call, **more)
        check(call, seen, out, lse)
        narrow = launch(call, **more | {"query_positions": stands.int()})
        assert torch.equal(out, narrow[0])

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("case", "keys", "low"), MORE_MOVED, ids=id_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], keys: bool, low: int) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, keys, low)

    def test_the_order_of_queries_says_nothing(self) -> None:
        """With every block and column listed, rows that are turned around are the same rows."""
        call = made(**PLAIN | {"tokens": (64, 128)})
        keep = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
        keep[..., 1] = True
        call.lists = blocks.lists(keep, None, 32)
        single, counts = columns.gathered(torch.arange(128), (torch.arange(128) // 32 != 1).expand(1, 1, 2, -1))
        more = {"columns": single, "column_counts": counts}
        wanted = launch(call, **more)
        call.query = call.query.flip(2)
        found = launch(call, **more, query_positions=torch.arange(127, 63, -1)[None, None])
        torch.testing.assert_close([x.flip(2) for x in found], list(wanted), rtol=0, atol=2e-6)

    def test_what_is_looked_up_by_token_needs_one(self) -> None:
        """Keys at other numbers than those of tokens have no bias: their rows are NaN, and without one they are not."""
        call = made(**PLAIN | {"tokens": (33, 128)})
        spread(call)
        call.lists.kv_num_blocks[:], call.lists.kv_indices[..., 0] = 1, 3
        call.lists.kv_num_blocks[1] = 0
        at = {"key_positions": torch.arange(128)[None, None] + 1, "query_positions": torch.arange(96, 129)[None, None]}
        assert launch(call, **at)[0].isfinite().all()
        out, lse = launch(call, **at, bias=torch.zeros(1, 1, 1, 128))
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1].isfinite().all()

    def test_what_does_not_fit_is_declined(self) -> None:
        call, good = made(**PLAIN), torch.arange(70)[None, None]
        for wrong in (good[..., 1:], good[0], good.float()):
            with pytest.raises(ops.KernelUnavailable, match="query positions of"):
                launch(call, query_positions=wrong)
        with pytest.raises(BlockError, match=r"for \(3, 1\) batch entries"):
            launch(call, query_positions=good.expand(3, 1, -1))


def check_state(
    call: Call, seen: Tensor, found: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], **parts: Any
) -> None:
    """As ``assert_within_budget``, of both states together."""
    (out, lse), dtype, scale = found, call.query.dtype, call.rest[1]
    assert out.dtype == dtype
    wide = attend(call.query.double(), call.key.double(), call.value.double(), seen, scale, torch.float64, **parts)
    best_lse = torch.logaddexp(wide[1], before[1].double())
    shares = [(one[1].double() - best_lse).exp().nan_to_num(0)[..., None] for one in (wide, before)]
    best = wide[0] * shares[0] + before[0].double() * shares[1]
    low, low_lse = merge_state(*attend(call.query, call.key, call.value, seen, scale, dtype, **parts), *before)
    blind = best_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert out[blind].eq(0).all()
    given = before[1].double().masked_fill(before[1].isinf(), 0)
    high = max(largest_score(call.query, call.key, scale), given.abs().max())
    size = max(call.value.double().abs().max(), before[0].double().abs().max())
    rounding = torch.finfo(dtype).eps * best.abs().max() + 8 * 2.0**-24 * high * size
    assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding
    difference, lost = ((x - best_lse).masked_fill(blind, 0).abs().max() for x in (lse, low_lse))
    assert difference <= 2 * lost + 8 * 2.0**-24 * high + 1e-6


def state(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of attention to other keys, about as heavy as these; rows 3 to 9 saw none, and rows 40 on hold all mass."""
    out, lse = torch.randn(*call.query.shape[:3], call.value.shape[3]), torch.randn(call.query.shape[:3]) + 2
    out[:, :, 3:10], lse[:, :, 3:10] = 0, -torch.inf
    lse[:, :, 40:] += 200
    return out.to(dtype), lse


class TestBefore:
    """The result of attention to other keys, taken in at the end."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "dtype"), [(PLAIN, F32), (SCORED[1][0], BF16), (SCORED[1][0], F32)], ids=id_of)
    def test_both_together(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        call = made(**case)
        before = state(call, dtype)
        found = launch(call, before_out=before[0].mT.contiguous().mT, before_lse=before[1])
        check_state(call, seen_by(call), found, before)

    def test_a_sink_counts_once(self) -> None:
        call = made(**PLAIN)
        before, sinks = state(call, F32), torch.tensor([3.0, 4.0])
        found = launch(call, before_out=before[0], before_lse=before[1], sinks=sinks)
        check_state(call, seen_by(call), found, before, sinks=sinks)

    def test_rows_that_only_one_side_sees(self) -> None:
        """A row with an empty list is what was given, bit by bit; nothing given is nothing, whatever stands there."""
        call = made(**PLAIN)
        out, lse = state(call, F32)
        plain = launch(call)
        found = launch(call, before_out=torch.full_like(out, torch.nan), before_lse=torch.full_like(lse, -torch.inf))
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])
        call.lists.kv_num_blocks[:], call.lists.full_kv_num_blocks[:] = 0, 0  # type: ignore[index]
        found = launch(call, before_out=out, before_lse=lse)
        assert torch.equal(found[0], out)
        torch.testing.assert_close(found[1], lse, rtol=2**-22, atol=0)

    def test_what_is_not_a_number_is_not_hidden(self) -> None:
        """Neither a wrong list nor a state of NaN, and each in its own rows."""
        call = made(**PLAIN)
        out, lse = state(call, F32)
        lse[0, 1, 5] = torch.nan
        call.lists.kv_num_blocks[1, 0, 1] = -1
        bad = torch.zeros(2, 2, 70, dtype=torch.bool)
        bad[0, 1, 5], bad[1, 0, 32:64] = True, True
        found = launch(call, before_out=out, before_lse=lse)
        assert torch.equal(found[1].isnan(), bad)
        assert torch.equal(found[0].isnan().all(-1), bad)


RANGED = [
    (PLAIN, (2, 2), True),
    (PLAIN | {"heads": (2, 2), "tokens": (65, 65), "size": 80, "dtype": BF16, "block": 48, "pad": True}, (1, 1), False),
]  # fmt: skip
MORE_RANGED = [
    (PLAIN | {"heads": (3, 1), "tokens": (100, 150), "size": size, "dtype": dtype, "block": 64}, (2, 3), causal)
    for size, dtype, causal in ((64, BF16, True), (128, torch.float16, False), (64, F32, False))
]


class TestRanges:
    """Ranges of keys for each query, in partial blocks."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("case", "lead", "causal"), RANGED, ids=id_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], lead: Any, causal: bool) -> None:
        call = made(**case)
        call.rest = (*call.rest[:2], causal, -1)
        given = some(*lead, call.queries, call.keys)
        given[:, :, 32:64] = torch.tensor([[0, call.keys], [0, 0], [0, 0], [0, 0]])  # whole blocks
        call.lists = ranges.lists(given, call.keys, call.block, causal=causal, tested=call.mask is not None)
        seen = pairs(given, call.keys)
        assert not seen.any(-1).all()
        if causal:
            seen = seen & (torch.arange(call.keys) <= torch.arange(call.keys - call.queries, call.keys)[:, None])
        if call.mask is not None:
            seen = seen & call.mask[:, None, None, : call.keys]
        check(call, seen, *launch(call, ranges=given))

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("case", "lead", "causal"), MORE_RANGED, ids=id_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any], lead: Any, causal: bool) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case, lead, causal)

    def test_none_at_all(self) -> None:
        """Without any no key of a partial block is seen."""
        call = made(**PLAIN)
        spread(call)
        out, lse = launch(call, ranges=torch.zeros(1, 1, 70, 0, 2, dtype=torch.int32))
        assert not out.any()
        assert lse.eq(-torch.inf).all()

    def test_rows_beside_wrong_ranges_are_nan(self) -> None:
        """Those that are computed together, and no others, each for its own reason: first rows, and last ones."""
        call = made(**PLAIN | {"heads": (4, 2)})
        spread(call)
        given = ranges.window(70, 101, 20, 3).expand(2, 4, -1, -1, -1).clone()
        right = launch(call, ranges=given)
        wrong = {
            (0, 0, 0): [[50, 3], [2, 1]], (0, 1, 40): [[2, 8], [9, 1]], (0, 2, 69): [[2, 8], [100, 2]],
            (0, 3, 5): [[-1, 8], [49, 1]], (1, 0, 33): [[2, 8], [20, -1]], (1, 1, 1): [[2, 8], [20, 2**31 - 1]],
        }  # fmt: skip
        bad = torch.zeros(2, 4, 70, dtype=torch.bool)
        for (entry, head, row), found in wrong.items():
            given[entry, head, row] = torch.tensor(found)
            bad[entry, head, row // 32 * 32 : row // 32 * 32 + 32] = True
        out, lse = launch(call, ranges=given)
        assert torch.equal(out.isnan().all(-1), bad)
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(out[~bad], right[0][~bad])

    def test_what_does_not_fit_is_declined(self) -> None:
        call, good = made(**PLAIN), ranges.window(70, 101, 20, 3)
        for wrong in (good[:, :, 1:], good.long(), good[..., :1], good.expand(3, -1, -1, -1, -1)):
            with pytest.raises(BlockError, match="ranges are"):
                launch(call, ranges=wrong)


def program(**changes: Any) -> Program:
    plain = {"phase": "prefill", "form": DENSE, "predicate": Predicate(), "dtype": BF16, "ratio": 4, "blocks": True}
    return Program(**plain | {"key_size": 128, "value_size": 128} | changes)


ALL = ScoreParts(True, True, True)
AHEAD = [(program(score=ALL), "sm_90", 128)]
KINDS: list[dict[str, Any]] = [{"score": ALL}, {"score": ALL, "columns": True}, {"score": ALL, "positions": True}]
KINDS += [
    {"moved": True},
    {"moved": True, "positions": True, "predicate": Predicate(window=4096)},
    {"before": True},
    {"before": True, "score": ALL},
    {"ranges": True},
    {"ranges": True, "given": True},
]
MORE_AHEAD = [
    (program(key_size=size, value_size=size, **kind), chip, 128)
    for kind in KINDS
    for chip in ("sm_90", "sm_100", "gfx942")
    for size in (64, 128)
]


class TestAhead:
    __test__ = not INTERPRETED

    test_fits_a_chip = fits(AHEAD)
    test_fits_more = pytest.mark.exhaustive(fits(MORE_AHEAD))

    def test_what_is_refused_for_gpus(self) -> None:
        for kind in KINDS:
            assert lowering.refusal(program(**kind), "cuda") is None
        for both in ({"columns": True, "given": True}, {"positions": True, "ranges": True}):
            assert "with the parts of" in str(lowering.refusal(program(**both), "cuda"))

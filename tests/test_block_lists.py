"""Block lists, their operators against a plain mask, and the C++ kernel against the reference and fp64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from effcompile.kernels import block_ops, blocks, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

ATTEND = torch.ops.effcompile.attend_blocks.default
DENSE = torch.ops.effcompile.attend.default
STORE = torch.ops.effcompile.kv_store.default


pytestmark = pytest.mark.usefixtures("no_fallback")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_lists_say_what_the_map_says(seed: int, rows: int, columns: int) -> None:
    torch.manual_seed(seed)
    keep = torch.rand(2, 3, rows, columns) < torch.rand(2, 3, 1, 1)
    counts, indices = blocks.compact(keep)
    for b, h, row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(rows)):
        assert indices[b, h, row, : counts[b, h, row]].tolist() == keep[b, h, row].nonzero().flatten().tolist()
    indices = torch.where(torch.arange(columns) < counts[..., None], indices, 10**6)  # what lies behind is not read
    assert torch.equal(blocks.visited(counts, indices), keep)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(0, 70), st.sampled_from([16, 32]), st.booleans())
def test_what_the_predicate_lets_through(queries: int, before: int, block: int, causal: bool) -> None:
    """Against the map of tokens, for cut blocks and queries that do not begin at a multiple of a block."""
    keys = queries + before
    pairs = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        pairs = torch.arange(keys) <= torch.arange(before, keys)[:, None]
    rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
    any_pair, every_pair = (torch.zeros(rows, columns, dtype=torch.bool) for _ in range(2))
    owned = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            tile = pairs[i * block : (i + 1) * block, j * block : (j + 1) * block]
            any_pair[i, j], cut = tile.any(), tile.shape[1] < block
            every_pair[i, j] = tile.all() and not cut
            positions = range(before + i * block, min(keys, before + (i + 1) * block))
            owned[i, j] = any(p // block == j for p in positions)
    assert torch.equal(blocks.possible(queries, keys, block, causal=causal), any_pair)
    assert not (blocks.whole(queries, keys, block, causal=causal) & ~every_pair).any()
    if queries % block == 0:
        assert torch.equal(blocks.whole(queries, keys, block, causal=causal), every_pair)
    assert torch.equal(blocks.own(queries, keys, block), owned)


def test_lists_of_a_block_mask_of_pytorch() -> None:
    """Its blocks, and attention over them, are those of its mask where that is causality and whole blocks."""
    torch.manual_seed(0)
    count, block = 300, 64
    chosen = torch.rand(5, 5) < 0.4

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (chosen[q // block, k // block] | (q // block == k // block))

    theirs = create_block_mask(mask, None, None, count, count, device="cpu", BLOCK_SIZE=block)
    made = blocks.from_block_mask(theirs, count, count)
    expected = (chosen | torch.eye(5, dtype=torch.bool)) & blocks.possible(count, count, block)
    assert torch.equal(made.keep()[0, 0], expected)
    query, key, value = (torch.randn(2, heads, count, 64) for heads in (4, 2, 2))
    out, _ = ATTEND(query, key, None, None, value, None, None, torch.tensor(count), None, *block_ops.of(made),
                    KVForm(16, 16).name, 0.125, True, -1)  # fmt: skip
    seen = blocks.tokens(expected, count, count, block) & torch.ones(count, count).tril().bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
    with pytest.raises(BlockError, match="this call has 299, 300"):
        blocks.from_block_mask(theirs, 299, 300)
    oblong = create_block_mask(mask, None, None, count, count, device="cpu", BLOCK_SIZE=(64, 32))
    with pytest.raises(BlockError, match="64 queries and 32 keys"):
        blocks.from_block_mask(oblong, count, count)


class Call:
    """A store, queries for its last tokens, and random blocks with the diagonal."""

    def __init__(
        self,
        heads: int,
        groups: int,
        queries: int,
        keys: int,
        sizes: tuple[int, int],
        form: KVForm,
        block: int,
        *,
        density: float = 0.3,
        dtype: torch.dtype = torch.float32,
        pad: bool = False,
        window: int = -1,
        shared: bool = False,
        batch: int = 2,
    ) -> None:
        torch.manual_seed(heads * queries + keys)
        capacity = blocks.count_blocks(keys, 128) * 128
        self.state: list[Tensor | None] = []
        for kind, size in zip(("key", "value"), sizes, strict=True):
            made = form.buffers(kind, batch, groups, capacity, size, dtype)  # type: ignore[arg-type]
            self.state += [torch.zeros(s, dtype=d) for s, d in made] + [None] * (3 - len(made))
        self.key, self.value = (torch.randn(batch, groups, keys, size).to(dtype) for size in sizes)
        STORE(*self.state, torch.tensor(0), self.key, self.value, form.name)
        self.query = torch.randn(batch, queries, heads, sizes[0]).to(dtype).transpose(1, 2)
        self.mask = None
        if pad:
            self.mask = torch.ones(batch, capacity, dtype=torch.bool)
            self.mask[0, : keys // 3] = False
        rows, columns = blocks.count_blocks(queries, block), blocks.count_blocks(keys, block)
        keep = torch.rand(1 if shared else batch, 1 if shared else heads, rows, columns) < density
        keep = (keep | blocks.own(queries, keys, block)) & blocks.possible(queries, keys, block)
        full = None if pad or window >= 0 else blocks.whole(queries, keys, block)
        self.lists = blocks.lists(keep, full, block)
        self.rest: tuple[Any, ...] = (form.name, sizes[0] ** -0.5, True, window)
        self.keys, self.queries, self.block = keys, queries, block

    def attend(self) -> tuple[Tensor, Tensor]:
        lists = block_ops.of(self.lists)
        return ATTEND(self.query, *self.state, torch.tensor(self.keys), self.mask, *lists, *self.rest)  # type: ignore[no-any-return]


FORMS = [KVForm(16, 16), KVForm(4, 4), KVForm(8, 4, 32, 0), KVForm(3, 2)]
CALLS = {
    "gqa, cut blocks": {"heads": 6, "groups": 2, "queries": 300, "keys": 300, "sizes": (64, 64), "form": FORMS[0]},
    "padding": {"heads": 3, "groups": 1, "queries": 300, "keys": 300, "sizes": (64, 64), "form": FORMS[0], "pad": True},
    "chunk on packed": {"heads": 6, "groups": 2, "queries": 150, "keys": 333, "sizes": (64, 96), "form": FORMS[1]},
    "bf16, small blocks": {
        "heads": 8, "groups": 1, "queries": 150, "keys": 333, "sizes": (80, 80), "form": FORMS[0], "block": 32,
        "dtype": torch.bfloat16,
    },
    "window, no residual": {
        "heads": 4, "groups": 4, "queries": 257, "keys": 500, "sizes": (128, 128), "form": FORMS[2], "window": 200,
    },
    "3 and 2 bits, one list for all": {
        "heads": 7, "groups": 1, "queries": 200, "keys": 400, "sizes": (64, 64), "form": FORMS[3], "shared": True,
    },
    "few queries": {"heads": 4, "groups": 2, "queries": 3, "keys": 700, "sizes": (64, 64), "form": FORMS[1]},
}  # fmt: skip
FEW = {name: CALLS[name] for name in list(CALLS)[:4]}
"""Those that differ most, for tests that take each with many other things."""


@pytest.mark.parametrize("name", CALLS)
def test_kernel_and_reference_and_fp64(name: str) -> None:
    call = Call(**{"block": 128, **CALLS[name]})
    out, lse = call.attend()
    with ops.reference_only():
        reference, reference_lse = call.attend()
        key, value = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])
    seen = blocks.tokens(call.lists.keep(), call.queries, call.keys, call.block)
    position = torch.arange(call.keys - call.queries, call.keys)[:, None]
    seen = seen & (torch.arange(call.keys) <= position)
    if call.rest[3] >= 0:
        seen = seen & (torch.arange(call.keys) > position - call.rest[3])
    if call.mask is not None:
        seen = seen & call.mask[:, None, None, : call.keys]
    ratio = call.query.shape[1] // key.shape[1]
    wide = [x[:, :, : call.keys].double().repeat_interleave(ratio, 1) for x in (key, value)]
    scores = (call.query.double() @ wide[0].mT * call.rest[1]).masked_fill(~seen, -torch.inf)
    truth, truth_lse = scores.softmax(-1).nan_to_num(0) @ wide[1], scores.logsumexp(-1)
    visible = seen.any(-1).expand(truth_lse.shape)
    assert torch.equal(lse.isfinite(), visible)
    assert torch.equal(reference_lse.isfinite(), visible)
    assert not out[~visible].any()
    for ours, theirs, exact in ((out, reference, truth), (lse[visible], reference_lse[visible], truth_lse[visible])):
        lost = (theirs.double() - exact).abs().max()
        # Twice what the reference loses, and two roundings of the largest value.
        budget = 2 * lost + torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= budget


def test_full_lists_are_dense_attention() -> None:
    call = Call(6, 2, 300, 300, (64, 64), KVForm(16, 16), 128, density=2.0)
    out, lse = call.attend()
    wanted, wanted_lse = DENSE(call.query, *call.state, torch.tensor(300), None, *call.rest)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-6)


def test_every_pair_is_counted_once() -> None:
    """Values that tell keys apart: with equal scores the output is the share of each key, and no key has two."""
    keys, block = 200, 64
    keep = blocks.possible(keys, keys, block)
    made = blocks.lists(keep[None, None], blocks.whole(keys, keys, block), block)
    value = torch.eye(200)[None, None]
    zero = torch.zeros(1, 1, keys, 64)
    out, _ = ATTEND(zero, zero, None, None, value, None, None, torch.tensor(keys), None, *block_ops.of(made),
                    KVForm(16, 16).name, 1.0, True, -1)  # fmt: skip
    share = torch.ones(keys, keys).tril() / torch.arange(1, keys + 1)[:, None]
    torch.testing.assert_close(out[0, 0], share, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_lists_that_do_not_fit_are_refused(reference: bool) -> None:
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 128)
    good = call.lists
    call.lists = blocks.BlockLists(good.kv_num_blocks[..., :2], good.kv_indices[..., :2, :], None, None, 128)
    with (
        ops.reference_only() if reference else contextlib.nullcontext(),
        pytest.raises(BlockError, match="3 rows of up to 3 blocks"),
    ):
        call.attend()


def test_a_block_that_is_not_there_is_refused() -> None:
    call = Call(4, 2, 300, 300, (64, 64), KVForm(16, 16), 128)
    call.lists.kv_indices[0, 0, 0, 0] = 3
    with pytest.raises(BlockError, match="not there"):
        call.attend()


def test_operators_keep_torchs_contract() -> None:
    call = Call(4, 2, 150, 150, (64, 64), KVForm(16, 16), 64)
    args = (call.query, *call.state, torch.tensor(150), call.mask, *block_ops.of(call.lists), *call.rest)
    torch.library.opcheck(ATTEND, args)
    from effcompile.passes.xattention import XAttention

    method = block_ops.method_text("xattention", {"block_size": 64, "min_length": 0, "stride": 16, "threshold": 0.5})
    assert XAttention.name == "xattention"
    torch.library.opcheck(torch.ops.effcompile.select_blocks.default, (call.query, call.key, call.mask, method, 0.125))

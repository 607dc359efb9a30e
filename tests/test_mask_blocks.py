"""Blocks of a given mask, and attention under it: operators against a plain mask, the kernel against both and fp64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.kernels import block_ops, blocks, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)

ATTEND = torch.ops.effcompile.attend_blocks.default
LISTS = torch.ops.effcompile.mask_blocks.default
STORE = torch.ops.effcompile.kv_store.default

pytestmark = pytest.mark.usefixtures("no_fallback")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.sampled_from([16, 32]))
def test_lists_of_a_mask_are_those_of_its_tiles(seed: int, queries: int, keys: int, block: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(2, 1, queries, keys) < 0.5
    for tile in (mask[:, :, :block, :block], mask[:, :, block:, :block], mask[..., block:]):
        tile.copy_(tile if torch.rand(()) < 0.4 else torch.rand(()) < 0.5)
    num, idx, full_num, full_idx = LISTS(mask, block)
    partial, full = blocks.visited(num, idx), blocks.visited(full_num, full_idx)
    assert partial.shape == (2, 1, blocks.count_blocks(queries, block), blocks.count_blocks(keys, block))
    for b, _, i, j in torch.cartesian_prod(*map(torch.arange, partial.shape)):
        tile = mask[b, 0, i * block : (i + 1) * block, j * block : (j + 1) * block]
        whole = bool(tile.all()) and tile.shape[1] == block
        assert bool(full[b, 0, i, j]) == whole
        assert bool(partial[b, 0, i, j]) == (bool(tile.any()) and not whole)


CASES: dict[str, dict[str, Any]] = {
    "one mask for all heads": {},
    "a mask for each head, none for a row": {"shape": (1, 6), "blind": True},
    "odd heads in bf16, small blocks": {"size": 80, "dtype": torch.bfloat16, "block": 16, "blind": True},
    "a chunk on a packed store, with padding": {
        "keys": 333, "form": KVForm(4, 4), "pad": True, "block": 128, "causal": True, "shape": (2, 1),
    },
    "one token": {"queries": 1, "keys": 1},
}  # fmt: skip


class Call:
    """Attention under a mask of some full and some empty tiles, with single pairs between."""

    def __init__(
        self,
        queries: int = 300,
        keys: int = 300,
        size: int = 64,
        form: KVForm = KVForm(16, 16),  # noqa: B008
        block: int = 64,
        dtype: torch.dtype = torch.float32,
        shape: tuple[int, int] = (2, 1),
        *,
        causal: bool = False,
        pad: bool = False,
        blind: bool = False,
    ) -> None:
        capacity = blocks.count_blocks(keys, 128) * 128
        self.state: list[Tensor | None] = []
        for kind in ("key", "value"):
            made = form.buffers(kind, 2, 2, capacity, size, dtype)  # type: ignore[arg-type]
            self.state += [torch.zeros(s, dtype=d) for s, d in made] + [None] * (3 - len(made))
        key, value = (torch.randn(2, 2, keys, size).to(dtype) for _ in range(2))
        STORE(*self.state, torch.tensor(0), key, value, form.name)
        self.query = torch.randn(2, queries, 6, size).to(dtype).transpose(1, 2)
        chosen = torch.rand(*shape, blocks.count_blocks(queries, 48), blocks.count_blocks(keys, 48))
        dense = (chosen * 3).floor() / 2  # 0, a half and 1
        share = dense.repeat_interleave(48, 2).repeat_interleave(48, 3)[:, :, :queries, :keys]
        self.allowed = torch.rand(share.shape) < share
        self.allowed |= torch.eye(queries, keys, dtype=torch.bool)
        if blind:
            self.allowed[:, :, 7] = False
        self.mask = None
        if pad:
            self.mask = torch.ones(2, capacity, dtype=torch.bool)
            self.mask[0, : keys // 3] = False
        self.lists = LISTS(self.allowed, block)
        if pad or causal:  # then no block is full
            self.lists = block_ops.of(blocks.lists(blocks.of_mask(self.allowed, block)[0], None, block))[:4]
        self.rest = (block, form.name, size**-0.5, causal, -1)
        self.keys = keys

    def attend(self) -> tuple[Tensor, Tensor]:
        length = torch.tensor(self.keys)
        lists: Any = (self.query, *self.state, length, self.mask, *self.lists, *self.rest)
        return ATTEND(*lists, allowed=self.allowed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_and_fp64(name: str) -> None:
    call = Call(**CASES[name])
    out, lse = call.attend()
    with ops.reference_only():
        reference, reference_lse = call.attend()
        key, value = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[1])
    seen = call.allowed.expand(2, 6, -1, -1)
    if call.rest[3]:
        seen = seen.tril(call.keys - seen.shape[2])
    if call.mask is not None:
        seen = seen & call.mask[:, None, None, : call.keys]
    wide = [x[:, :, : call.keys].double().repeat_interleave(3, 1) for x in (key, value)]
    scores = (call.query.double() @ wide[0].mT * call.rest[2]).masked_fill(~seen, -torch.inf)
    truth, truth_lse = scores.softmax(-1).nan_to_num(0) @ wide[1], scores.logsumexp(-1)
    visible = seen.any(-1)
    assert bool(visible.all()) == (not CASES[name].get("blind") and call.mask is None)
    assert torch.equal(lse.isfinite(), visible)
    assert torch.equal(reference_lse.isfinite(), visible)
    assert not out[~visible].any()
    for ours, theirs, exact in ((out, reference, truth), (lse[visible], reference_lse[visible], truth_lse[visible])):
        lost = (theirs.double() - exact).abs().max()
        # Sums of a few hundred products in fp32, rounded once: a reference that loses more means something else.
        assert lost <= 16 * torch.finfo(ours.dtype).eps * exact.abs().max()
        # Twice what the reference loses, and two roundings of the largest value.
        budget = 2 * lost + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "wrong", [lambda m: m[..., :-1], lambda m: m[:, :, 1:], lambda m: m.repeat(1, 3, 1, 1), lambda m: m.float()]
)
def test_a_mask_that_does_not_fit_is_refused(wrong: Any, reference: bool) -> None:
    call = Call(queries=100, keys=100)
    call.allowed = wrong(call.allowed)
    with (
        ops.reference_only() if reference else contextlib.nullcontext(),
        pytest.raises(BlockError, match="expected bool of"),
    ):
        call.attend()


def test_operators_keep_torchs_contract() -> None:
    call = Call(queries=100, keys=100)
    torch.library.opcheck(LISTS, (call.allowed, 64))
    args = (call.query, *call.state, torch.tensor(100), None, *call.lists, *call.rest)
    torch.library.opcheck(ATTEND, args, {"allowed": call.allowed})

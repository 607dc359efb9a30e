"""Choosing pages by what a cache keeps beside them, on a GPU as far as can be seen without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from test_block_devices import waits
from test_list_devices import meta
from torch import bool as boolean
from torch import int64

from effcompile.kernels import block_ops, page_ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.pages import Kept
from effcompile.passes import base


@pytest.mark.parametrize("kept", ["bounds", "moments"])
def test_keeping_waits_and_choosing_does_not(kept: Kept) -> None:
    """What asks for the length is ``bound_store``: so a cache that was not made on a CPU keeps nothing."""
    form, room, buffer = KVForm(16, 16), meta(2, 2, 2048, 64), meta(2, 2, 2048 // 16, 2, 64)
    made: Any = base.get("quest")(**{"token_budget": 512, "rank_by": kept})
    method = block_ops.method_text("quest", dataclasses.asdict(made.for_store(form)))
    length, mask = meta(dtype=int64), meta(2, 2048, dtype=boolean)
    call = (meta(2, 8, 1, 64), room, None, None, length, mask, method, form.name, 0.125)
    assert waits(lambda: page_ops._select_pages(*call, bounds=buffer)) == []
    with pytest.raises(RuntimeError, match="item"):
        page_ops._bound_store(buffer, room, length, meta(2, 2, 1, 64), 16, kept)

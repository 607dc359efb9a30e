"""``effcompile::select_columns`` and ``effcompile::order_keys``: choices that are more than blocks.

As :mod:`effcompile.kernels.block_ops`: an operator runs the policy of its ``method``, which a pass has registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import block_ops, ops

ops.library.define(
    "select_columns(Tensor query, Tensor key, Tensor? key_mask, str method, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
ops.library.define("order_keys(Tensor query, Tensor key, Tensor? key_mask, str method, float scale) -> Tensor")

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _select_columns(query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float) -> Lists:
    # The policy of kind "columns" gives blocks, as one of kind "blocks" does, columns and their counts.
    policy, options = block_ops.policy_of(method, "columns")
    keep, columns, counts = policy(query, key, scale=scale, key_mask=key_mask, **options)
    lead = query.shape[:2]
    columns, counts = (x.expand(*lead, *x.shape[2:]).contiguous() for x in (columns, counts))
    return *block_ops.as_results(keep, query, key, key_mask, options["block_size"]), columns, counts


def _fake_select_columns(query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float) -> Lists:
    # The policy of kind "room" gives the number of lists and their length, for so many queries and keys.
    room, options = block_ops.policy_of(method, "room")
    lists, width = room(query.shape[2], key.shape[2], **options)
    return (
        *block_ops.fake_results(query, key, options["block_size"]),
        query.new_empty(*query.shape[:2], lists, width, dtype=torch.int32),
        query.new_empty(*query.shape[:2], lists, dtype=torch.int32),
    )


def _order_keys(query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float) -> Tensor:
    # The policy of kind "order" gives the tokens in the order in which their keys are to lie: int64 [B, G, S].
    policy, options = block_ops.policy_of(method, "order")
    order: Tensor = policy(query, key, scale=scale, key_mask=key_mask, **options)
    return order.contiguous()


def _fake_order_keys(query: Tensor, key: Tensor, key_mask: Tensor | None, method: str, scale: float) -> Tensor:
    return key.new_empty(key.shape[:3], dtype=torch.int64)


for _name, _body, _fake in (
    ("select_columns", _select_columns, _fake_select_columns),
    ("order_keys", _order_keys, _fake_order_keys),
):
    ops.library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=ops.library)

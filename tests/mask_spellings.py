"""Masks spelled in very many ways: a predicate of ours, written as models and people write it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from mask_graphs import Build, aten, kept, predicted
from torch import Tensor, fx

from effcompile.kernels.reason import Reason
from effcompile.patterns.masks import Mask, Term, recover_all

LOWEST = torch.finfo(torch.float32).min


class Spelling:
    """A predicate written in one of very many ways, on random sizes and data."""

    def __init__(self, seed: int, batch: int = 0, queries: int = 0, keys: int = 0) -> None:
        r = self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.build = Build()
        self.batch, self.queries = batch or r.randint(1, 3), queries or r.choice((1, 2, 3, 5))
        self.keys = keys or r.randint(max(2, self.queries), 8)
        self.flat = r.random() < 0.2
        self.offset: fx.Node | int = r.choice((0, 0, r.randint(0, 3)))
        if r.random() < 0.4:
            given = torch.tensor(r.randint(0, 4), dtype=r.choice((torch.int64, torch.int64, torch.int32)))
            self.offset = self.build.input(given)
        i, j = (self.call(aten.arange.default, n) for n in (self.queries, self.keys))
        self.i, self.j = (i, self.moved(j)) if self.flat else (self.four(i, 2), self.four(self.moved(j), 3))
        if self.flat:
            self.i = self.call(aten.unsqueeze.default, self.i, 1)
        self.q = self.added(self.i, self.offset)
        self.constant = isinstance(self.offset, int)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.build.call(op, *args, **kwargs)

    def one_of(self, *ways: Callable[[], fx.Node]) -> fx.Node:
        return self.random.choice(ways)()

    def four(self, x: fx.Node, dim: int) -> fx.Node:
        """A vector along one of four dimensions."""

        def by_steps() -> fx.Node:
            y = x
            for d in range(4):
                y = y if d == dim else self.call(aten.unsqueeze.default, y, d)
            return y

        sizes = [1] * 4
        sizes[dim] = x.meta["val"].numel()
        return self.one_of(by_steps, lambda: self.call(aten.view.default, x, sizes))

    def moved(self, j: fx.Node) -> fx.Node:
        """Keys, perhaps through steps that change nothing."""
        return self.one_of(
            lambda: j,
            lambda: self.call(aten.add.Tensor, j, 0),
            lambda: self.call(aten.to.dtype, j, torch.int64),
            lambda: self.call(aten.sub.Tensor, self.call(aten.arange.start, 2, self.keys + 2), 2),
            lambda: self.call(aten.slice.Tensor, self.call(aten.arange.default, self.keys + 3), 0, 0, self.keys),
        )

    def added(self, x: fx.Node, offset: fx.Node | int) -> fx.Node:
        if isinstance(offset, fx.Node):
            ways = [
                lambda: offset,
                lambda: self.call(aten.to.dtype, offset, torch.int64),
                lambda: self.call(aten.add.Tensor, offset, 0),
                lambda: self.call(aten.clone.default, self.call(aten.view.default, offset, [1])),
            ]
            offset = self.one_of(*(ways if offset.meta["val"].dtype == torch.int64 else ways[1:2]))
        return self.call(aten.add.Tensor, x, offset)

    def causal(self) -> fx.Node:
        i, j, q, call = self.i, self.j, self.q, self.call
        after = lambda: call(aten.add.Tensor, q, 1)  # noqa: E731
        gap = lambda: call(aten.sub.Tensor, j, q)  # noqa: E731
        ways = [
            lambda: call(aten.le.Tensor, j, q),
            lambda: call(aten.ge.Tensor, q, j),
            lambda: call(aten.lt.Tensor, j, after()),
            lambda: call(aten.gt.Tensor, after(), j),
            lambda: call(aten.bitwise_not.default, call(aten.gt.Tensor, j, q)),
            lambda: call(aten.logical_not.default, call(aten.lt.Tensor, q, j)),
            lambda: call(aten.lt.Scalar, gap(), 1),
            lambda: call(aten.le.Scalar, gap(), 0),
            lambda: call(aten.ge.Scalar, call(aten.neg.default, gap()), 0),
            lambda: call(aten.gt.Scalar, call(aten.mul.Tensor, gap(), -2), -2),
            lambda: call(aten.eq.Tensor, call(aten.minimum.default, j, q), j),
            lambda: call(aten.le.Tensor, call(aten.sub.Tensor, j, i), call(aten.sub.Tensor, q, i)),
        ]
        if self.constant:
            ones = call(
                aten.ones.default, [self.queries, self.keys], dtype=self.random.choice((torch.bool, torch.int64))
            )
            ways += 2 * [
                lambda: call(aten.to.dtype, call(aten.tril.default, ones, self.offset), torch.bool),
                lambda: call(aten.eq.Scalar, call(aten.triu.default, ones, int(self.offset) + 1), 0),
                lambda: call(aten.ne.Scalar, call(aten.tril_.default, call(aten.clone.default, ones), self.offset), 0),
            ]
        return self.one_of(*ways)

    def windowed(self, width: int) -> fx.Node:
        j, q, call = self.j, self.q, self.call
        start = lambda: call(aten.sub.Tensor, q, width)  # noqa: E731
        ways = [
            lambda: call(aten.gt.Tensor, j, start()),
            lambda: call(aten.lt.Tensor, start(), j),
            lambda: call(aten.ge.Tensor, j, call(aten.add.Tensor, start(), 1)),
            lambda: call(aten.lt.Scalar, call(aten.sub.Tensor, q, j), width),
            lambda: call(aten.bitwise_not.default, call(aten.le.Tensor, j, start())),
            lambda: call(aten.bitwise_xor.Scalar, call(aten.le.Tensor, j, start()), True),
        ]
        return self.one_of(*ways)

    def padded(self) -> fx.Node:
        """A ``[B, S]`` tensor read at (row, key); made longer, or cut, so that its length fits."""
        b, s, r, call = self.batch, self.keys, self.random, self.call
        dtype = r.choice((torch.bool, torch.int64, torch.float32, torch.uint8))
        length = r.choice((s, s, s + 2, s - 1))
        pad = self.build.input(torch.randint(0, 2, (b, length)).to(dtype))
        if length < s:
            pad = call(aten.constant_pad_nd.default, pad, [0, s - length], r.choice((0, 1)))
        ways = [
            lambda x: call(aten.ne.Scalar, x, 0),
            lambda x: call(aten.to.dtype, x, torch.bool),
            lambda x: call(aten.logical_not.default, call(aten.eq.Scalar, x, 0)),
        ]
        truth = r.choice(ways)
        if self.flat:
            # Rows need their dimension: [B, 1, 1, S] beside [T, S].
            return truth(call(aten.view.default, call(aten.slice.Tensor, pad, 1, 0, s), [b, 1, 1, s]))
        rows = self.four(call(aten.arange.default, b), 0)

        def sliced() -> fx.Node:
            x = call(aten.slice.Tensor, pad, 1, 0, s)
            return call(aten.unsqueeze.default, call(aten.unsqueeze.default, x, 1), 1)

        return self.one_of(
            lambda: truth(call(aten.index.Tensor, pad, [rows, self.j])),
            lambda: call(aten.index.Tensor, truth(pad), [rows, self.j]),
            lambda: truth(sliced()),
            lambda: truth(call(aten.expand.default, sliced(), [b, 1, self.queries, s])),
        )

    def both(self, a: fx.Node, b: fx.Node) -> fx.Node:
        call = self.call
        no = lambda x: call(aten.bitwise_not.default, x)  # noqa: E731
        return self.one_of(
            lambda: call(aten.bitwise_and.Tensor, a, b),
            lambda: call(aten.__and__.Tensor, b, a),
            lambda: call(aten.logical_and.default, a, b),
            lambda: call(aten.mul.Tensor, a, b),
            lambda: call(aten.where.ScalarOther, a, b, False),
            lambda: no(call(aten.bitwise_or.Tensor, no(a), no(b))),
            lambda: call(aten.masked_fill.Scalar, call(aten.mul.Tensor, a, call(aten.ones_like.default, b)), no(b), 0),
        )

    def additive(self, mask: fx.Node) -> fx.Node:
        call, low = self.call, self.random.choice((LOWEST, float("-inf")))
        flipped = lambda: call(aten.rsub.Scalar, call(aten.to.dtype, mask, torch.float32), 1.0)  # noqa: E731
        zeros = lambda: call(aten.zeros.default, mask.meta["val"].shape)  # noqa: E731
        ways = [
            lambda: call(aten.where.ScalarOther, mask, call(aten.zeros.default, []), low),
            lambda: call(aten.where.ScalarSelf, call(aten.logical_not.default, mask), low, zeros()),
            lambda: call(aten.masked_fill.Scalar, zeros(), call(aten.eq.Scalar, mask, 0), low),
            lambda: call(aten.masked_fill_.Scalar, zeros(), call(aten.bitwise_not.default, mask), low),
            lambda: call(aten.mul.Tensor, flipped(), LOWEST),
        ]
        return self.one_of(*ways)

    def mask(self) -> fx.Node:
        r, parts = self.random, []
        chosen = [r.random() < p for p in (0.8, 0.4, 0.5)]
        if chosen[0]:
            parts.append(self.causal())
        if chosen[1]:
            parts.append(self.windowed(r.randint(1, 4)))
        if chosen[2]:
            parts.append(self.padded())
        if not parts or r.random() < 0.2:
            parts.append(self.call(aten.new_ones.default, self.j, [], dtype=torch.bool))
        r.shuffle(parts)
        mask = parts[0]
        for part in parts[1:]:
            mask = self.both(mask, part)
        if r.random() < 0.3 and mask.meta["val"].ndim == 4:
            mask = self.call(aten.expand.default, mask, [self.batch, r.choice((1, 2)), self.queries, self.keys])
        return mask

    def recovered(self, *terms: fx.Node | Term) -> Mask | Reason:
        return recover_all(terms, is_causal=False, query_length=self.queries, key_length=self.keys)

    def says(self, mask: Mask) -> Tensor:
        return predicted(mask, self.build.held, self.batch, self.queries, self.keys)

    def truly(self, term: fx.Node) -> Tensor:
        return kept(self.build.held[term], self.batch, self.queries, self.keys)

    def check(self, got: Mask | Reason, keep: Tensor) -> None:
        """A mask must be right everywhere; a reason needs none."""
        if isinstance(got, Mask):
            said = self.says(got)[:, None].expand_as(keep)
            assert torch.equal(keep, said), f"{got}\n{self.build.graph}"

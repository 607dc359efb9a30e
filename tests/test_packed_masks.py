"""Packed sequences and prefixes: proved from graphs, in the reference body, in the C++ kernels, and rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpp_calls import BASE, assert_within_budget, check_attend
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_graphs import aten
from mask_spellings import Spelling
from test_score_matching import DENSE, LOWEST, Step, additive, decide, weighed
from test_score_parts import Scored, exact
from torch import Tensor, fx, nn

from effcompile import lowering
from effcompile.kernels import attention, ops, quantize
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.kernels.reason import Reason
from effcompile.lowering import cpp
from effcompile.passes import backend, report
from effcompile.patterns.masks import Mask

pytestmark = pytest.mark.usefixtures("no_fallback", "build_ahead")


class Ruled(Spelling):
    """Spellings of ``segment[b, q] == segment[b, j]`` and of ``j < prefix[b]``."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        while self.flat or self.queries == 1:
            seed += 10_007
            super().__init__(seed)
        self.rows = self.four(self.call(aten.arange.default, self.batch), 0)

    def segments(self, rows: int = 0) -> fx.Node:
        return self.build.input(torch.randint(0, 3, (rows or self.batch, self.keys + 9)))

    def at(self, segments: fx.Node, place: fx.Node) -> fx.Node:
        return self.call(aten.index.Tensor, segments, [self.rows, place])

    def same(self, segments: fx.Node, more: int = 0, other: fx.Node | None = None) -> fx.Node:
        call = self.call
        q = call(aten.add.Tensor, self.q, more) if more else self.q
        own, seen = self.at(segments, q), self.at(other or segments, self.j)
        if not more and self.constant and self.random.random() < 0.5:
            first = int(self.offset)
            cut = call(aten.slice.Tensor, segments, 1, first, first + self.queries)
            own = call(aten.unsqueeze.default, call(aten.unsqueeze.default, cut, 1), -1)
        return self.one_of(
            lambda: call(aten.eq.Tensor, own, seen),
            lambda: call(aten.eq.Tensor, seen, own),
            lambda: call(aten.logical_not.default, call(aten.ne.Tensor, own, seen)),
            lambda: call(aten.eq.Scalar, call(aten.sub.Tensor, own, seen), 0),
            lambda: call(aten.bitwise_and.Tensor, call(aten.le.Tensor, own, seen), call(aten.ge.Tensor, own, seen)),
        )

    def before(self) -> fx.Node:
        """``j < prefix``: a number, one for all, or one for each row."""
        call, number = self.call, self.random.randint(1, self.keys - 1)
        each = self.build.input(torch.randint(0, self.keys + 2, (self.batch,)))
        one = self.build.input(torch.tensor(number))
        tall = lambda: call(aten.view.default, each, [self.batch, 1, 1, 1])  # noqa: E731
        return self.one_of(
            lambda: call(aten.lt.Scalar, self.j, number),
            lambda: call(aten.lt.Tensor, self.j, one),
            lambda: call(aten.lt.Tensor, self.j, tall()),
            lambda: call(aten.gt.Tensor, call(aten.index.Tensor, each, [self.rows]), self.j),
            lambda: call(aten.le.Tensor, self.j, call(aten.add.Tensor, tall(), 1)),
        )

    def either(self, a: fx.Node, b: fx.Node) -> fx.Node:
        call = self.call
        return self.one_of(
            lambda: call(aten.bitwise_or.Tensor, a, b),
            lambda: call(aten.logical_or.default, b, a),
            lambda: call(aten.where.ScalarSelf, a, True, b),
        )


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**20), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_any_spelling_is_recovered_exactly(seed: int, packed: bool, prefix: bool, padded: bool, floats: bool) -> None:
    s = Ruled(seed)
    mask = s.causal()
    if prefix:
        mask = s.either(mask, s.before())
    if packed:
        mask = s.both(mask, s.same(s.segments(s.random.choice((s.batch, s.batch)))))
    if padded:
        mask = s.both(mask, s.padded())
    keep = s.truly(mask)
    got = s.recovered(s.additive(mask) if floats else mask)
    if isinstance(got, Reason):
        # A padding tensor that is too short; segments read at a place that may be negative, which is another place; a
        # prefix beyond all queries.
        assert padded or (packed and not s.constant) or (prefix and got.code == "mask-not-affine"), got
        return
    s.check(got, keep)
    # The sizes may make a rule say nothing; it is never said where it was not asked for.
    assert got.predicate.segments <= packed
    assert got.predicate.prefix <= prefix


def other_offset(s: Ruled) -> fx.Node:
    return s.same(s.segments(), more=1)


def two_tensors(s: Ruled) -> fx.Node:
    return s.same(s.segments(), other=s.segments())


def packed_twice(s: Ruled) -> fx.Node:
    return s.both(s.same(s.segments()), s.same(s.segments()))


def same_or_later(s: Ruled) -> fx.Node:
    ids = s.segments()
    return s.call(aten.le.Tensor, s.at(ids, s.j), s.at(ids, s.q))


def behind_a_window(s: Ruled) -> fx.Node:
    return s.either(s.windowed(2), s.before())


def by_query(s: Ruled) -> fx.Node:
    lengths = s.call(aten.view.default, s.build.input(torch.randint(0, 5, (s.queries,))), [1, 1, s.queries, 1])
    return s.either(s.causal(), s.call(aten.lt.Tensor, s.j, lengths))


def by_float(s: Ruled) -> fx.Node:
    return s.either(s.causal(), s.call(aten.lt.Tensor, s.j, s.build.input(torch.tensor(2.5))))


def from_the_end(s: Ruled) -> fx.Node:
    return s.either(s.causal(), s.call(aten.ge.Scalar, s.j, 2))


def of_the_first_row(s: Ruled) -> fx.Node:
    ids = s.segments()
    first = s.call(aten.index.Tensor, ids, [s.call(aten.zeros_like.default, s.rows), s.q])
    return s.call(aten.eq.Tensor, first, s.at(ids, s.j))


def in_a_window(s: Ruled) -> fx.Node:
    return s.both(s.either(s.causal(), s.before()), s.windowed(2))


MISSES = [
    of_the_first_row,
    in_a_window,
    other_offset,
    two_tensors,
    packed_twice,
    same_or_later,
    behind_a_window,
    by_query,
    by_float,
    from_the_end,
]


@pytest.mark.parametrize("miss", MISSES, ids=lambda f: f.__name__)
def test_near_misses_are_never_a_wrong_mask(miss: Callable[[Ruled], fx.Node]) -> None:
    for seed in range(25):
        s = Ruled(seed)
        alone = miss(s)
        for mask in (alone, s.both(s.causal(), alone)):
            s.check(s.recovered(mask), s.truly(mask))


def test_what_changes_later_is_no_operand() -> None:
    for write in (True, False):
        s = Ruled(3)
        ids = s.segments()
        mask = s.both(s.causal(), s.same(ids))
        if write:
            s.call(aten.fill_.Scalar, ids, 1)
        assert isinstance(s.recovered(mask), Reason if write else Mask)


# Reference and C++

SEG, PRE = Predicate(segments=True), Predicate(prefix=True)
PROGRAMS = [
    dataclasses.replace(BASE, predicate=SEG),
    Program("prefill", KVForm(4, 4, 16, 0), PRE, torch.bfloat16, 3, 64, 64),
    Program("prefill", DENSE, Predicate(True, None, True, True, True), torch.float32, 1, 72, 80),
    Program(
        "decode", KVForm(8, 3), Predicate(window=40, segments=True), torch.float32, 4, 64, 64, ScoreParts(bias=True)
    ),
    dataclasses.replace(BASE, predicate=PRE),
]


def test_the_rule_is_the_reference() -> None:
    """One pair at a time."""
    ids, first = torch.randint(0, 3, (2, 12)), torch.tensor([0, 7])
    for predicate in (SEG, PRE, Predicate(True, None, False, True, True)):
        given = ids if predicate.segments else None, first if predicate.prefix else None
        keep = attention.allowed(predicate, 4, 9, None, ids.device, *given)
        for b in range(2):
            for i in range(4):
                for j in range(9):
                    seen = j <= 5 + i or (predicate.prefix and j < int(first[b]))
                    seen = seen and (not predicate.segments or bool(ids[b, j] == ids[b, 5 + i]))
                    assert bool(keep[b % keep.shape[0], 0, i, j]) == seen


class Apart(Scored):
    """A call with segments and a prefix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = self.program.predicate
        if rule.segments:
            ids = (torch.arange(self.length + 5) // 29).expand(self.batch, -1).clone()
            ids[-1, ::3] = 7  # sequences need not be contiguous
            self.values["segments"] = ids[:1] if self.length % 2 else ids
        if rule.prefix:
            self.values["prefix"] = torch.tensor([self.length // 2, 3])[: self.batch]

    def check(self) -> None:
        p, rule = self.program, self.program.predicate
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        values = dict(self.values)
        given = values.pop("segments", None), values.pop("prefix", None)
        keep = attention.allowed(rule, self.queries, self.length, self.mask, self.query.device, *given)
        keys, held = ops.split_state(tuple(self.state))
        k, v = (quantize.load_side(s, self.length, p.form, kind) for s, kind in ((keys, "key"), (held, "value")))
        keep = keep.expand(self.batch, -1, -1, -1)[:, 0]
        truth, truth_lse = exact(self.query, k, v, keep, self.scale, **values)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert_within_budget(out, reference, truth, what)
        assert_within_budget(lse, reference_lse, truth_lse, f"lse of {what}", roundings=2)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_cpp(program: Program) -> None:
    check_attend(program, (1, 65, 500), Apart)


def test_refusals() -> None:
    program = PROGRAMS[0]
    assert lowering.refusal(program, "cpu") is None
    call = Apart(program, 65, 1)
    args = (call.query, *call.state, torch.tensor(65), None, program.form.name, 1.0, True, -1)
    for wrong in ({"segments": torch.zeros(2, 64, dtype=torch.int64)}, {"prefix": torch.zeros(3, dtype=torch.int64)}):
        with pytest.raises(ops.KernelUnavailable, match=r"(segments|a prefix) of"):
            cpp.attend(*args, **wrong)


# In graphs


def packed(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Segments are read at the queries' positions, of which the graph does not say that they are not negative."""
    segments = (self.relative[0, :2, 0] * 1e3).int() % 3
    position = self.length + torch.arange(q.shape[2])
    same = segments[:, position][:, None, :, None] == segments[:, None, None, :]
    return weighed(q @ k.mT * 0.25 + additive(keep & same), v)


def behind_a_prefix(self: Step, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    position, key = self.length + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return weighed(q @ k.mT * 0.25 + additive((key <= position) | (key < 5)), v)


@pytest.mark.parametrize(("spelling", "code"), [(packed, "mask-unknown"), (behind_a_prefix, "mask-prefix")])
def test_left(spelling: Any, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prefix it is not known that it ends within the store; with one query it cannot be told from causality."""
    codes = [d.reason.code if d.reason else d.form for d in decide(spelling, monkeypatch)]
    assert codes[:2] == [code] * 2
    assert codes[2] in (code, "mask-alternatives", "mask-unknown")


class Fresh(nn.Module):
    """A first call: it stores, and attends to what it was given, as ``rule(queries, keys, ids)`` allows."""

    def __init__(self, rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.eye(16))
        for letter in "kv":
            self.register_buffer(letter, torch.zeros(2, 4, 64, 16))
        self.register_buffer("length", torch.tensor(0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """Attention; ``ids`` ``[B, T]`` says what a token belongs to, or where it stands."""
        key = k @ self.weight
        torch.ops.effcompile.kv_store(self.k, None, None, self.v, None, None, self.length, key, v, DENSE.name)
        j = torch.arange(key.shape[2])
        keep = self.rule(torch.arange(q.shape[2])[:, None], j, ids)
        return nn.functional.scaled_dot_product_attention(q, key, v, torch.where(keep, 0.0, LOWEST))


def packed_rows(i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
    return (j <= i) & (ids[:, None, :, None] == ids[:, None, None, :])


def packed_by_positions(i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
    """As transformers finds them: a new sequence begins where positions do not go on."""
    segments = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    rows = torch.arange(ids.shape[0])[:, None, None, None]
    return (j <= i) & (segments[rows, i[None, None]] == segments[rows, j[None, None, None]])


def prefix_by_row(i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
    return (j <= i) | (j < ids.amin(1)[:, None, None, None])


def prefix_of_seven(i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
    return (j <= i) | (j < 7)


@pytest.mark.parametrize(
    ("rule", "form"),
    [(packed_rows, "seg"), (packed_by_positions, "seg"), (prefix_by_row, "pre"), (prefix_of_seven, "pre")],
)
def test_the_first_call(rule: Callable[..., Tensor], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report._graphs.clear()
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    model = Fresh(rule)
    ids = torch.cat([torch.arange(4, 15), torch.arange(22)])[None].repeat(2, 1)
    ids[1] = torch.arange(33)
    if form == "pre":
        ids += torch.tensor([[5], [30]])
    given = (*(torch.randn(2, 4, 33, 16) for _ in range(3)), ids)
    with torch.no_grad():
        expected = model(*given)
        model.length.zero_()
        model.compile(backend="effcompile")
        torch.testing.assert_close(model(*given), expected)
    (found,) = report.inspect(model).decisions
    assert found.action == "rewritten", found.reason
    assert found.form.endswith(f"causal_{form}")

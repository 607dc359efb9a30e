"""Mask recovery is sound: what is recovered equals the mask everywhere, and what is not one of ours is left alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_graphs import Build, Soup, aten, kept, number, predicted
from mask_spellings import Spelling
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.kernels.program import Predicate
from effcompile.kernels.reason import Reason
from effcompile.patterns import masks, walk
from effcompile.patterns.elements import Elements
from effcompile.patterns.index_algebra import Domain
from effcompile.patterns.masks import Mask, Term, recover
from effcompile.patterns.storage import Writes

SEEDS = st.integers(0, 2**40)
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=500, **QUICK)
@given(SEEDS)
def test_any_spelling_is_recovered_exactly(seed: int) -> None:
    s = Spelling(seed)
    mask = s.mask()
    if s.random.random() < 0.4:
        mask = s.additive(mask)
    got, keep = s.recovered(mask), s.truly(mask)
    s.check(got, keep)
    if isinstance(got, Reason):
        assert got.code == "mask-empty", f"{got}\n{s.build.graph}"
        assert not keep.any()


def _in_one_row(s: Spelling, mask: fx.Node) -> fx.Node:
    at = s.call(aten.eq.Scalar, s.i, s.random.randrange(s.queries))
    here = s.call(aten.logical_and.default, at, s.call(aten.eq.Scalar, s.j, s.random.randrange(s.keys)))
    return s.call(aten.bitwise_xor.Tensor, mask, here)


def _per_head(s: Spelling, mask: fx.Node) -> fx.Node:
    heads = s.four(s.call(aten.arange.default, 2), 1)
    return s.call(aten.logical_and.default, mask, s.call(aten.gt.Scalar, s.call(aten.add.Tensor, s.j, heads), 0))


def _data(s: Spelling, mask: fx.Node) -> fx.Node:
    noise = s.build.input(torch.randint(0, 2, (s.queries, s.keys)))
    return s.call(aten.logical_and.default, mask, s.call(aten.ne.Scalar, noise, 0))


def _prefix(s: Spelling, mask: fx.Node) -> fx.Node:
    return s.call(aten.logical_or.default, mask, s.call(aten.lt.Scalar, s.j, s.random.randint(1, s.keys)))


def _suffix(s: Spelling, mask: fx.Node) -> fx.Node:
    return s.call(aten.logical_or.default, mask, s.call(aten.ge.Scalar, s.j, s.keys - 1))


def _data_prefix(s: Spelling, mask: fx.Node) -> fx.Node:
    prefix = s.build.input(torch.tensor(s.random.randint(0, s.keys)))
    return s.call(aten.logical_or.default, mask, s.call(aten.lt.Tensor, s.j, prefix))


def _row_lengths(s: Spelling, mask: fx.Node) -> fx.Node:
    lengths = s.four(s.build.input(torch.randint(0, s.keys + 1, (s.batch,))), 0)
    compare = s.random.choice((aten.le.Tensor, aten.lt.Tensor))
    return s.call(aten.logical_and.default, mask, s.call(compare, s.j, lengths))


def _positions(s: Spelling, mask: fx.Node) -> fx.Node:
    positions = s.build.input(torch.randint(0, s.keys, (s.queries,)))
    positions = s.call(aten.unsqueeze.default, positions, 1)
    return s.call(aten.logical_and.default, mask, s.call(aten.le.Tensor, s.j, positions))


def _shifted_padding(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch, s.keys + 1)).bool())
    rows = s.four(s.call(aten.arange.default, s.batch), 0)
    read = s.call(aten.index.Tensor, pad, [rows, s.call(aten.add.Tensor, s.j, 1)])
    return s.call(aten.logical_and.default, mask, read)


def _padding_at_the_query(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch, s.queries)).bool())
    rows = s.four(s.call(aten.arange.default, s.batch), 0)
    return s.call(aten.logical_and.default, mask, s.call(aten.index.Tensor, pad, [rows, s.i]))


def _one_row_for_all(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch + 1, s.keys)).bool())
    return s.call(aten.logical_and.default, mask, s.call(aten.slice.Tensor, pad, 0, 0, 1))


def _first_row_for_all(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch + 1, s.keys)).bool())
    row = s.call(aten.zeros.default, [1, 1, 1, 1], dtype=torch.int64)
    return s.call(aten.logical_and.default, mask, s.call(aten.index.Tensor, pad, [row, s.j]))


def _more_rows(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch + 1, s.keys)).bool())
    rows = s.four(s.call(aten.arange.default, s.batch), 0)
    return s.call(aten.logical_and.default, mask, s.call(aten.index.Tensor, pad, [rows, s.j]))


def _rows_reversed(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch, s.keys)).bool())
    rows = s.call(aten.rsub.Scalar, s.four(s.call(aten.arange.default, s.batch), 0), s.batch - 1)
    return s.call(aten.logical_and.default, mask, s.call(aten.index.Tensor, pad, [rows, s.j]))


def _inverted_padding(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.build.input(torch.randint(0, 2, (s.batch, 1, 1, s.keys)).bool())
    return s.call(aten.logical_and.default, mask, s.call(aten.logical_not.default, pad))


def _padding_equals_one(s: Spelling, mask: fx.Node) -> fx.Node:
    pad = s.call(aten.view.default, s.build.input(torch.randint(0, 3, (s.batch, s.keys))), [s.batch, 1, 1, s.keys])
    return s.call(aten.logical_and.default, mask, s.call(aten.eq.Scalar, pad, 1))


def _second_padding(s: Spelling, mask: fx.Node) -> fx.Node:
    return s.call(aten.logical_and.default, mask, s.call(aten.logical_and.default, s.padded(), s.padded()))


def _transposed(s: Spelling, mask: fx.Node) -> fx.Node:
    return s.call(aten.ge.Tensor, s.j, s.q)


def _other_offset(s: Spelling, mask: fx.Node) -> fx.Node:
    other = s.call(aten.le.Tensor, s.j, s.call(aten.add.Tensor, s.i, s.build.input(torch.tensor(1))))
    return s.call(aten.logical_and.default, mask, other)


def _chunks(s: Spelling, mask: fx.Node) -> fx.Node:
    halves = (s.call(aten.floor_divide.default, x, 2) for x in (s.j, s.q))
    return s.call(aten.logical_and.default, mask, s.call(aten.eq.Tensor, *halves))


def _documents(s: Spelling, mask: fx.Node) -> fx.Node:
    ids = s.build.input(torch.randint(0, 2, (s.batch, s.keys)))
    rows = s.four(s.call(aten.arange.default, s.batch), 0)
    pair = (s.call(aten.index.Tensor, ids, [rows, s.call(aten.clamp.default, x, 0, s.keys - 1)]) for x in (s.i, s.j))
    return s.call(aten.logical_and.default, mask, s.call(aten.eq.Tensor, *pair))


def _strided(s: Spelling, mask: fx.Node) -> fx.Node:
    return s.call(aten.logical_and.default, mask, s.call(aten.le.Tensor, s.call(aten.mul.Tensor, s.j, 2), s.q))


def _written_later(s: Spelling, mask: fx.Node) -> fx.Node:
    """The mask as it is read in the end: a view of it has been written to."""
    heads = mask.meta["val"].shape[1] if mask.meta["val"].ndim == 4 else 1
    whole = s.call(aten.expand.default, mask, [s.batch, heads, s.queries, s.keys])
    mask = s.call(aten.clone.default, whole)
    s.call(aten.fill_.Scalar, s.call(aten.select.int, mask, -1, s.random.randrange(s.keys)), s.random.random() < 0.5)
    s.build.held[mask] = mask.meta["val"].clone()
    return mask


def _offset_written_before(s: Spelling, mask: fx.Node) -> fx.Node:
    """A length is counted up between two reads; the second sees another value than the node had when made."""
    length = s.build.input(torch.tensor(s.random.randint(0, 3)))
    s.call(aten.add_.Tensor, length, s.queries)
    return s.call(aten.logical_and.default, mask, s.call(aten.le.Tensor, s.j, s.call(aten.add.Tensor, s.i, length)))


NEAR = [
    _in_one_row, _per_head, _data, _prefix, _suffix, _data_prefix, _row_lengths, _shifted_padding,
    _padding_at_the_query, _positions, _one_row_for_all, _first_row_for_all, _more_rows, _rows_reversed,
    _inverted_padding, _padding_equals_one, _second_padding, _transposed, _other_offset, _chunks, _documents,
    _strided, _written_later, _offset_written_before,
]  # fmt: skip


@pytest.mark.parametrize("change", NEAR, ids=[c.__name__.strip("_") for c in NEAR])
@settings(max_examples=40, **QUICK)
@given(SEEDS)
def test_near_misses_are_never_a_wrong_mask(change: Callable[[Spelling, fx.Node], fx.Node], seed: int) -> None:
    """On tiny sizes some happen to be a mask of ours after all; then it must be that one."""
    s = Spelling(seed)
    mask = change(s, s.mask())
    if s.random.random() < 0.3 and change is not _written_later:
        mask = s.additive(mask)
    s.check(s.recovered(mask), s.truly(mask))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_in_one_row, "mask-alternatives"),
        (_per_head, "mask-per-head"),
        (_data, "mask-unknown"),
        (_suffix, "mask-alternatives"),
        (_row_lengths, "mask-unknown"),
        (_shifted_padding, "mask-unknown"),
        (_padding_at_the_query, "mask-unknown"),
        (_positions, "mask-unknown"),
        (_first_row_for_all, "mask-unknown"),
        (_more_rows, "mask-unknown"),
        (_rows_reversed, "mask-unknown"),
        (_inverted_padding, "mask-unknown"),
        (_padding_equals_one, "mask-unknown"),
        (_second_padding, "mask-two-paddings"),
        (_transposed, None),
        (_other_offset, "mask-offsets-differ"),
        (_chunks, "mask-unknown"),
        (_documents, "mask-unknown"),
        (_strided, "mask-not-affine"),
        (_written_later, "mask-mutated"),
        (_offset_written_before, "mask-unknown"),
    ],
)
def test_near_misses_have_their_reasons(change: Callable[[Spelling, fx.Node], fx.Node], code: str | None) -> None:
    s = Spelling(7, batch=2, queries=6, keys=9)
    s.flat = False
    mask = change(s, s.call(aten.le.Tensor, s.j, s.call(aten.add.Tensor, s.i, 3)))
    got = s.recovered(mask)
    if code is None:
        assert isinstance(got, Mask)
        assert not got.predicate.causal
        s.check(got, s.truly(mask))
    else:
        assert isinstance(got, Reason), got
        assert got.code == code, got


@pytest.mark.parametrize("value", [-1e9, -10000.0, 1.0, 0.5, float("inf"), torch.finfo(torch.float16).min])
def test_additive_masks_need_zero_and_the_lowest(value: float) -> None:
    s = Spelling(3, queries=4, keys=9)
    mask = s.call(aten.where.ScalarOther, s.causal(), s.call(aten.zeros.default, []), value)
    got = s.recovered(mask)
    assert isinstance(got, Reason)
    assert got.code == "mask-values"


def test_a_write_to_an_expanded_tensor_is_not_followed() -> None:
    """All rows are one row in memory: writing a triangle to them leaves what the last write left."""
    s = Spelling(2, batch=1, queries=3, keys=3)
    row = s.call(aten.ones.default, [3], dtype=torch.bool)
    mask = s.call(aten.tril_.default, s.call(aten.expand.default, row, [3, 3]))
    got = s.recovered(mask)
    assert isinstance(got, Reason), got


def test_a_constant_that_the_graph_writes_to_is_none() -> None:
    s = Spelling(2, batch=1, queries=3, keys=3)
    table = s.build.input(torch.ones(3, 3, dtype=torch.bool).tril())
    lengths = {"query_length": 3, "key_length": 3}
    constants = {table: s.build.held[table]}
    mask = s.call(aten.clone.default, table)
    assert recover(mask, is_causal=False, constants=constants, **lengths) == Mask(Predicate())
    s.call(aten.logical_not_.default, table)
    got = recover(mask, is_causal=False, constants=constants, **lengths)
    assert isinstance(got, Reason)
    assert got.code == "mask-unknown"


def test_a_padding_tensor_is_long_enough() -> None:
    """The last key is excluded beside a shorter tensor: true of that tensor, but it has no element for every key."""
    s = Spelling(2, batch=2, queries=1, keys=6)
    pad = s.call(aten.view.default, s.build.input(torch.ones(2, 5, dtype=torch.bool)), [2, 1, 1, 5])
    pad = s.call(aten.constant_pad_nd.default, pad, [0, 1], True)
    mask = s.call(aten.bitwise_and.Tensor, pad, s.call(aten.lt.Scalar, s.call(aten.arange.default, 6), 5))
    got = s.recovered(mask)
    assert isinstance(got, Reason), got


def test_an_offset_for_each_row_is_none() -> None:
    s = Spelling(2, batch=2, queries=1, keys=6)
    lengths = s.call(aten.view.default, s.build.input(torch.tensor([2, 4])), [2, 1, 1, 1])
    got = s.recovered(s.call(aten.le.Tensor, s.call(aten.arange.default, 6), lengths))
    assert isinstance(got, Reason)
    assert got.code == "mask-unknown"


def test_a_row_of_one_batch_keeps_its_triangle() -> None:
    """With one row and one query the whole mask is a [1, S] tensor; what is known of it besides is kept."""
    build = Build()
    offset, pad = build.input(torch.tensor(3)), build.input(torch.tensor([[1, 0, 1, 1, 1, 1]]))
    keys = build.call(aten.unsqueeze.default, build.call(aten.arange.default, 6), 0)
    visible = build.call(aten.le.Tensor, keys, offset)
    mask = build.call(aten.bitwise_and.Tensor, visible, build.call(aten.ne.Scalar, pad, 0))
    got = recover(mask, is_causal=False, query_length=1, key_length=6)
    assert isinstance(got, Mask), got
    assert (got.predicate, got.offset) == (Predicate(key_mask=True), offset)
    assert predicted(got, build.held, 1, 1, 6).tolist() == [[[True, False, True, True, False, False]]]


def test_layers_share_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question is proved once; another length, term or flag is another question with its own answer."""
    s = Spelling(5, batch=2, queries=4, keys=6)
    mask, other = s.additive(s.causal()), s.call(aten.bitwise_not.default, s.padded())
    asked: list[tuple[tuple[fx.Node | Term, ...], bool, int]] = [
        ((mask,), False, s.keys),
        ((mask, Term(other, dropped=True)), False, s.keys),
        ((mask, Term(other, dropped=False)), False, s.keys),
        ((mask,), False, s.keys + 1),
        ((mask,), True, s.keys),
        ((), True, s.keys),
    ]
    alone = [
        masks.recover_all(terms, is_causal=flag, query_length=s.queries, key_length=keys) for terms, flag, keys in asked
    ]
    calls: list[Any] = []
    whole = masks.recover_all
    monkeypatch.setattr(masks, "recover_all", lambda *a, **k: calls.append(a) or whole(*a, **k))
    proofs = masks.Proofs(s.build.graph, {})
    for _layer in range(3):
        shared = [
            proofs.mask(terms, is_causal=flag, query_length=s.queries, key_length=keys) for terms, flag, keys in asked
        ]
        assert shared == alone
    assert len(calls) == len(asked)


def test_the_first_write_is_found_through_views() -> None:
    build = Build()
    held, other = build.input(torch.zeros(4)), build.input(torch.zeros(4))
    view = build.call(aten.view.default, held, [2, 2])
    build.call(aten.add_.Tensor, other, held)
    summed = build.call(aten.add.Tensor, held, 1)
    first = build.call(aten.mul_.Tensor, build.call(aten.select.int, view, 0, 1), 2)
    build.call(aten.add_.Tensor, held, 1)
    build.call(aten.add_.Tensor, summed, 1)
    for node in (held, view, first):
        assert walk.first_mutation(node) is first
    assert walk.first_mutation(build.call(aten.mul.Tensor, held, 2)) is None


def test_several_terms_are_a_conjunction() -> None:
    s = Spelling(5, batch=2, queries=4, keys=6)
    first, second = s.additive(s.causal()), s.call(aten.bitwise_not.default, s.padded())
    got = s.recovered(first, Term(second, dropped=True))
    assert isinstance(got, Mask)
    assert (got.predicate.causal, got.predicate.key_mask) == (True, True)
    s.check(got, s.truly(first) & ~s.truly(second))


def test_flag_and_none() -> None:
    both = {"query_length": 5, "key_length": 5}
    assert recover(None, is_causal=False, **both) == Mask(Predicate(causal=False))
    assert recover(None, is_causal=True, **both) == Mask(Predicate(causal=True), 0)
    # With one query at key 0, causal leaves one key of five: it does not mean "see all".
    assert recover(None, is_causal=True, query_length=1, key_length=5) == Mask(Predicate(causal=True), 0)
    assert recover(None, is_causal=True, query_length=1, key_length=1) == Mask(Predicate(causal=False))
    s = Spelling(1)
    got = recover(s.causal(), is_causal=True, query_length=s.queries, key_length=s.keys)
    assert isinstance(got, Reason)
    assert got.code == "mask-and-causal"


def _aligned_at_the_end(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    return torch.arange(s)[None] <= torch.arange(s - t, s)[:, None]


def _aligned_triangle(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    return torch.full((t, s), float("-inf")).triu(s - t + 1)


def _cached_and_fresh(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    fresh = torch.ones(t, t, dtype=torch.bool).tril()
    return torch.cat([torch.ones(t, s - t, dtype=torch.bool), fresh], 1)


def _by_offset(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    q, k = torch.arange(t)[:, None] + off, torch.arange(s)
    return (k <= q) & (k > q - 3) & pad[:, None, None, :].bool()


def _padded_to_length(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    rows = torch.arange(pad.shape[0])[:, None, None, None]
    longer = torch.nn.functional.pad(pad[:, :t].bool(), (0, s - t))
    return longer[rows, torch.arange(s)] & (torch.arange(s) <= torch.arange(t)[:, None])


def _packed(x: Tensor, pad: Tensor, off: Tensor) -> Tensor:
    t, s = x.shape[1], pad.shape[1]
    ids = (torch.diff(torch.arange(s), prepend=torch.arange(s)[:1] - 1) != 1).cumsum(-1)
    return (ids[:t, None] == ids) & (torch.arange(s) <= torch.arange(t)[:, None])


@pytest.mark.parametrize(
    ("spelled", "predicate"),
    [
        (_aligned_at_the_end, Predicate()),
        (_aligned_triangle, Predicate()),
        (_cached_and_fresh, Predicate()),
        (_by_offset, Predicate(True, 3, True)),
        (_padded_to_length, Predicate(True, None, True)),
        (_packed, Predicate()),
    ],
)
def test_symbolic_sizes(spelled: Callable[[Tensor, Tensor, Tensor], Tensor], predicate: Predicate) -> None:
    """One proof holds for all sizes: the traced graph is run on others."""

    def inputs(b: int, t: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(b, t), torch.randint(0, 2, (b, s)), torch.tensor(2)

    graph = make_fx(spelled, tracing_mode="symbolic", pre_dispatch=True)(*inputs(3, 5, 8))
    x, pad, _ = graph.graph.find_nodes(op="placeholder")
    (sizes_t, sizes_s) = (n.meta["val"].shape[1] for n in (x, pad))
    env = x.meta["val"].fake_mode.shape_env
    taken = len(env.guards)
    term = graph.graph.output_node().args[0]
    got = recover(term, is_causal=False, query_length=sizes_t, key_length=sizes_s)
    assert isinstance(got, Mask), got
    assert got.predicate == predicate
    assert len(env.guards) == taken
    for b, t, s in ((2, 3, 7), (4, 6, 9), (3, 8, 9)):
        run = Record(graph)
        keep = kept(run.run(*inputs(b, t, s)), b, t, s)
        offset = got.offset
        if isinstance(offset, torch.SymInt):
            offset = int(offset.node.expr.subs({sizes_t.node.expr: t, sizes_s.node.expr: s}))
        said = predicted(dataclasses.replace(got, offset=offset), run.held, b, t, s)
        assert torch.equal(keep, said[:, None].expand_as(keep)), (b, t, s)


class Record(fx.Interpreter):
    """Runs a graph and keeps what every node held when it was made."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.held: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.held[n] = result.clone()
        return result


@settings(max_examples=120, **QUICK)
@given(SEEDS)
def test_elements_are_what_tensors_hold(seed: int) -> None:
    """Random operations in random order: elements of all kinds of tensors, and every mask found by chance."""
    soup = Soup(seed)
    for _ in range(14):
        soup.step()
    held, r = soup.build.held, soup.random
    constants = {soup.constant: held[soup.constant]}
    for node in r.sample(soup.pool, min(len(soup.pool), 12)):
        sizes = held[node].shape
        domain = Domain(None)
        index = tuple(domain.variable(f"v{k}", sympy.Integer(n)) for k, n in enumerate(sizes))
        row = index[0] if index else sympy.S.Zero
        key = index[-1] if index else domain.variable("j", sympy.S.One)
        element = Elements(domain, Writes(soup.build.graph), constants, (row, key)).at(node, index)
        points = list(itertools.product(*map(range, sizes)))
        for point in r.sample(points, min(len(points), 12)):
            given_point = dict(zip(index, map(sympy.Integer, point)))
            said, true = number(element, given_point, domain, held), held[node][point].item()
            assert said == true or (said != said and true != true), f"{node}{point}: {element}\n{soup.build.graph}"
        if len(sizes) < 2:
            continue
        lengths = {"query_length": sizes[-2], "key_length": sizes[-1]}
        got = recover(node, is_causal=False, constants=constants, **lengths)
        if isinstance(got, Mask):
            batch = sizes[0] if len(sizes) == 4 else 1
            keep = kept(held[node], batch, sizes[-2], sizes[-1])
            assert torch.equal(keep, predicted(got, held, batch, sizes[-2], sizes[-1])[:, None].expand_as(keep)), got

"""Prompts with structure: the invariants of BlockRank and Graph-KV, in eager mode, where the layout is the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import effcompile as ec
from effcompile.lowering import cpp_blocks  # noqa: F401  (registers the launcher)
from effcompile.passes.layout import ids_of
from models import MODELS

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 5e-5}
ATTEND = torch.ops.effcompile.attend_blocks.default


def ids(count: int, seed: int = 0) -> list[int]:
    found: list[int] = torch.randint(1, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return MODELS["llama"]("sdpa")


def logits(model: nn.Module, layout: ec.Layout) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**layout.inputs, use_cache=False).logits
    return found


def of_chunk(layout: ec.Layout, what: Tensor, number: int) -> Tensor:
    """The rows of ``[B, T, ...]`` that belong to one chunk of a single prompt."""
    return what[0, layout.chunks[0] == number]


# The mask and the positions, pair by pair.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 3))
def test_blockrank_mask_and_positions(lengths: list[int], more: int) -> None:
    texts = [ids(n, seed) for seed, n in enumerate(lengths)]
    layout = ec.blockrank_layout(texts[0], texts[1:-1], texts[-1], offset=20 + more)
    flat = [(block, at) for block, text in enumerate(texts) for at in range(len(text))]
    assert layout.input_ids[0].tolist() == [texts[block][at] for block, at in flat]
    starts = [0, *(lengths[0] for _ in lengths[1:-1]), 20 + more]
    assert layout.position_ids[0].tolist() == [starts[block] + at for block, at in flat]
    last = len(lengths) - 1
    for i, (block, at) in enumerate(flat):
        for j, (other, there) in enumerate(flat):
            causal = other == block and there <= at
            whole = other < block and (other == 0 or block == last)
            assert bool(layout.attention_mask[0, 0, i, j]) == (causal or whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_graph_kv_mask_and_positions(data: Any) -> None:
    count = data.draw(st.integers(1, 4))
    texts = [ids(data.draw(st.integers(1, 7)), seed) for seed in range(count)]
    edges = data.draw(st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), max_size=6))
    prefix, query = ids(data.draw(st.integers(0, 3)), 8), ids(3, 9)
    everything, see = data.draw(st.booleans()), data.draw(st.booleans())
    layout = ec.graph_kv_layout(
        texts, edges, query, prefix=prefix, sources=range(count) if everything else None, see_prefix=see
    )
    targets = sorted({t for _, t in edges})
    alone = [c for c in range(count) if everything or c not in targets or any(s == c for s, _ in edges)]
    runs = [("prefix", 0, prefix)] * bool(prefix)
    runs += [("source", c, texts[c]) for c in alone]
    runs += [("target", c, texts[c]) for c in targets] + [("query", 0, query)]
    flat = [(kind, c, at, token) for kind, c, text in runs for at, token in enumerate(text)]
    assert layout.input_ids[0].tolist() == [token for *_, token in flat]
    span = max(map(len, texts))
    starts = {"prefix": 0, "source": len(prefix), "target": len(prefix) + span}
    starts["query"] = len(prefix) + span * (2 if targets else 1)
    assert layout.position_ids[0].tolist() == [starts[kind] + at for kind, _, at, _ in flat]
    for i, (kind, c, at, _) in enumerate(flat):
        for j, (other, d, there, _) in enumerate(flat):
            own = (kind, c) == (other, d) and there <= at
            seen = {
                "prefix": False,
                "source": see and other == "prefix",
                "target": (other == "source" and (d, c) in edges) or (see and other == "prefix"),
                "query": other != "query",
            }
            assert bool(layout.attention_mask[0, 0, i, j]) == (own or seen[kind])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ec.blockrank_layout(ids(9), [ids(5), []], ids(3)), "no tokens"),
        (lambda: ec.blockrank_layout(ids(9), [ids(12)], ids(3), offset=20), "position 20"),
        (lambda: ec.blockrank_layout(torch.tensor([ids(9)]), [], ids(3)), "one dimension"),
        (lambda: ec.blockrank_layout([0.5, 1.5], [], ids(3)), "integers"),
        (lambda: ec.graph_kv_layout([ids(3)], [(0, 1)], ids(3)), "0 to 0"),
        (lambda: ec.graph_kv_layout([ids(3), ids(4)], [(0, 1)], ids(3), length=3), "4 tokens"),
        (lambda: ec.graph_kv_layout([ids(3), ids(4)], [(0, 1)], ids(3), sources=[1]), r"begin at \[0\]"),
        (lambda: ec.Layout.of([ec.Chunk(ids(3), 0, [0])]), "earlier"),
        (lambda: ec.Layout.of([]), "at least one"),
        (lambda: ec.blockrank_scores(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4),
                                     ec.blockrank_layout(ids(4), [], ids(5)), 1.0), "no documents"),
    ],
)  # fmt: skip
def test_wrong_layouts(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# What the model makes of them. An unmodified model in eager mode: the layout is the method.


DOCUMENTS = [ids(n, n) for n in (31, 17, 40)]


def ranking(order: tuple[int, ...] = (0, 1, 2), documents: list[list[int]] = DOCUMENTS) -> ec.Layout:
    return ec.blockrank_layout(ids(21), [documents[i] for i in order], ids(11, 1), offset=100)


def sequential(layout: ec.Layout) -> ec.Layout:
    """The same with the positions of an ordinary prompt: what must fail."""
    rows = torch.arange(layout.input_ids.shape[1])[None]
    return ec.Layout(layout.input_ids, rows, layout.attention_mask, layout.chunks, layout.counts)


def test_the_order_of_documents_does_not_matter(llama: nn.Module) -> None:
    order = (2, 0, 1)
    for change, same in ((lambda x: x, True), (sequential, False)):
        one, other = change(ranking()), change(ranking(order))
        before, after = logits(llama, one), logits(llama, other)
        pairs = [(1 + document, 1 + place) for place, document in enumerate(order)] + [(4, 4)]
        for old, new in pairs:
            a, b = of_chunk(one, before, old), of_chunk(other, after, new)
            assert torch.allclose(a, b, **CLOSE) == same


def test_a_document_is_not_felt_by_another(llama: nn.Module) -> None:
    changed = [DOCUMENTS[0], ids(17, 99), DOCUMENTS[2]]
    before, after = logits(llama, ranking()), logits(llama, ranking(documents=changed))
    for number, same in ((0, True), (1, True), (2, False), (3, True), (4, False)):
        assert torch.equal(of_chunk(ranking(), before, number), of_chunk(ranking(), after, number)) == same


def test_without_documents_it_is_causal_attention_at_shifted_positions(llama: nn.Module) -> None:
    layout = ec.blockrank_layout(ids(21), [], ids(11, 1), offset=100)
    with torch.no_grad():
        # A mask that hides nothing: without one transformers takes the gap in positions for two packed prompts.
        seen = torch.ones_like(layout.input_ids)
        plain = llama(layout.input_ids, seen, layout.position_ids, use_cache=False).logits
        unmoved = llama(layout.input_ids, use_cache=False).logits
    torch.testing.assert_close(logits(llama, layout), plain, **CLOSE)
    assert not torch.allclose(plain, unmoved, **CLOSE)


def test_chunks_without_edges_are_alone(llama: nn.Module) -> None:
    layout = ec.graph_kv_layout(DOCUMENTS, [], ids(11, 1), prefix=ids(5, 2))
    together = logits(llama, layout)
    for number, text in enumerate([ids(5, 2), *DOCUMENTS]):
        alone = logits(llama, ec.Layout.of([ec.Chunk(text, 0)]))[0]
        torch.testing.assert_close(of_chunk(layout, together, number), alone, **CLOSE)


def test_one_source_and_one_target_are_a_plain_prompt(llama: nn.Module) -> None:
    layout = ec.graph_kv_layout([ids(31), ids(31, 1)], [(0, 1)], ids(11, 2))
    with torch.no_grad():
        plain = llama(layout.input_ids, use_cache=False).logits
    torch.testing.assert_close(logits(llama, layout), plain, **CLOSE)


def test_the_order_of_sources_does_not_matter(llama: nn.Module) -> None:
    a, b, c = DOCUMENTS
    for change, same in ((lambda x: x, True), (sequential, False)):
        one = change(ec.graph_kv_layout([a, b, c], [(0, 2), (1, 2)], ids(11, 1)))
        other = change(ec.graph_kv_layout([b, a, c], [(0, 2), (1, 2)], ids(11, 1)))
        before, after = logits(llama, one), logits(llama, other)
        for number in (2, 3):
            x, y = of_chunk(one, before, number), of_chunk(other, after, number)
            assert torch.allclose(x, y, **CLOSE) == same


def test_a_source_is_not_felt_where_no_edge_leads(llama: nn.Module) -> None:
    """0 -> 1 -> 2 in one round: chunk 2 sees chunk 1 as it is alone, and nothing of chunk 0."""
    edges, (a, b, c) = [(0, 1), (1, 2)], DOCUMENTS
    one, other = (ec.graph_kv_layout([x, b, c], edges, ids(11, 1)) for x in (a, ids(31, 77)))
    before, after = logits(llama, one), logits(llama, other)
    for number, same in ((0, False), (1, True), (2, False), (3, True), (4, False)):  # sources 0, 1; targets 1, 2
        assert torch.equal(of_chunk(one, before, number), of_chunk(other, after, number)) == same


def test_one_softmax_is_the_merge_of_a_softmax_for_each_source() -> None:
    layout = ec.graph_kv_layout(DOCUMENTS, [(0, 2), (1, 2)], ids(5, 1))
    mask, count = layout.attention_mask, layout.input_ids.shape[1]
    query, key, value = (torch.randn(1, h, count, 64) for h in (6, 2, 2))

    def attend(allowed: Tensor) -> tuple[Tensor, Tensor]:
        lists = torch.ops.effcompile.mask_blocks.default(allowed, 16)
        state = key, None, None, value, None, None, torch.tensor(count), None
        found: tuple[Tensor, Tensor] = ATTEND(
            query, *state, *lists, 16, "k16v16g32r128", 0.2, False, -1, allowed=allowed
        )
        return found

    whole, lse = attend(mask)
    parts = [attend(mask & (layout.chunks == number)[:, None, None]) for number in range(4)]
    weights = torch.stack([part for _, part in parts]).softmax(0)
    merged = sum(share[..., None] * out for share, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.stack([part for _, part in parts]).logsumexp(0), lse, rtol=0, atol=2e-6)


def test_rows_of_a_batch_are_as_if_alone_and_padding_feeds_nothing(llama: nn.Module) -> None:
    one, other = ranking(), ec.graph_kv_layout(DOCUMENTS[:2], [(1, 0)], ids(9, 3))
    both, marked = ec.Layout.batch([one, other]), ec.Layout.batch([one, other], pad_id=55)
    found = logits(llama, both)
    short = both.input_ids.shape[1] - other.input_ids.shape[1]
    assert short > 0
    torch.testing.assert_close(found[0], logits(llama, one)[0], **CLOSE)
    torch.testing.assert_close(found[1, short:], logits(llama, other)[0], **CLOSE)
    again = logits(llama, marked)
    assert torch.equal(again[1, short:], found[1, short:])
    assert not torch.equal(again[1, :short], found[1, :short])


# Scores of documents.


class Captured(TorchFunctionMode):
    """Queries and keys of every SDPA call in an eager run."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def pairs(model: nn.Module, layout: ec.Layout) -> list[tuple[Tensor, Tensor]]:
    with Captured() as seen:
        logits(model, layout)
    return seen.pairs


def test_scores_of_documents(llama: nn.Module) -> None:
    layout, scale = ranking(), 32**-0.5
    query, key = pairs(llama, layout)[1]
    scores = ec.blockrank_scores(query, key, layout, scale)
    torch.testing.assert_close(scores.sum(1), torch.ones(1))
    # In words: a softmax over the tokens of all documents for each head and signal token, summed and averaged.
    wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    products = (query[0, :, -2:] @ wide[0].mT * scale)[..., (layout.chunks[0] > 0) & (layout.chunks[0] < 4)]
    shares = products.softmax(-1).mean((0, 1)).split([len(text) for text in DOCUMENTS])
    torch.testing.assert_close(scores[0], torch.stack([x.sum() for x in shares]))
    order = (2, 0, 1)
    moved = ec.blockrank_scores(*pairs(llama, ranking(order))[1], ranking(order), scale)
    torch.testing.assert_close(moved, scores[:, list(order)], rtol=1e-4, atol=1e-5)
    assert scores.std() > 1e-2
    # A batch with fewer documents in a row, and the last rows of the queries alone.
    both = ec.Layout.batch([ranking((1,)), layout])
    query, key = pairs(llama, both)[1]
    found = ec.blockrank_scores(query[:, :, -16:], key, both, scale)
    torch.testing.assert_close(found[1:], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], torch.tensor([1.0, 0.0, 0.0]))


def test_layers_behind_the_scored_one_need_not_run(llama: nn.Module) -> None:
    whole = pairs(llama, ranking())
    layers, llama.model.layers = llama.model.layers, llama.model.layers[:1]
    try:
        (first,) = pairs(llama, ranking())
    finally:
        llama.model.layers = layers
    scores = [ec.blockrank_scores(*pair, ranking(), 32**-0.5) for pair in (whole[0], first)]
    assert len(whole) == 2
    assert torch.equal(*scores)


def test_ids() -> None:
    assert ids_of(torch.tensor([3, 4], dtype=torch.int32)).dtype == torch.int64
    assert ids_of(()).tolist() == []


@pytest.mark.exhaustive
def test_inductor_takes_layouts_of_any_length(llama: nn.Module) -> None:
    """The operators in a graph of Inductor's with symbolic sizes; the passes are tested without it."""
    fast = ec.blockrank()(MODELS["llama"]("sdpa"))
    fast.compile(backend="effcompile", dynamic=True)
    for layout in (ranking(), ranking((1, 0)), ec.Layout.batch([ranking(), ranking((2, 1))])):
        torch.testing.assert_close(logits(fast, layout), logits(llama, layout), **CLOSE)
    assert {d.form.partition("_attend")[0] for d in ec.inspect(fast).decisions} == {"blockrank"}

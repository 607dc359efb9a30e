"""Methods whose choice is more than blocks: what their operators visit, and what each card says can be checked."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, Union

import pytest
import torch
from test_sparse_methods import heads, keep_of, llama, official, pairs_of  # noqa: F401  (a fixture)
from torch import Tensor, fx
from transformers import LlamaForCausalLM

import effcompile as ec
from effcompile.kernels import block_ops, blocks, columns, estimate, ops
from effcompile.passes import base
from effcompile.passes.anchor_attention import AnchorAttention
from effcompile.passes.pbs_attn import PBSAttn, in_order
from effcompile.passes.sites import DENSE
from effcompile.passes.sparse_columns import SparseColumns
from effcompile.passes.sparse_prefill import SparsePrefill
from effcompile.passes.vertical_slash import PROBED, VerticalSlash, crossed, strongest

ATTEND = torch.ops.effcompile.attend_blocks.default
SELECT = torch.ops.effcompile.select_columns.default
METHODS = {
    "vertical_slash": {"vertical": 60, "slash": 70},
    "anchor_attention": {"theta": 1.0, "step": 3},
    "pbs_attn": {"threshold": 0.5, "segment": 128},
}


def attention(method: SparsePrefill, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    """What the rewrite puts at a site, run as a graph: attention of ``rest``, a query, values and a mask."""
    graph = fx.Graph()
    q, k, asking, value, mask, length = map(graph.placeholder, ("q", "k", "asking", "value", "mask", "length"))
    for node, tensor in ((q, query), (k, key), (value, rest[1])):
        node.meta["val"] = tensor
    hidden = None if rest[2] is None else mask
    site: Any = SimpleNamespace(query=q, key=k, value=value, scale=query.shape[3] ** -0.5)
    state, lists, more = method.operands(graph, site, (k, None, None, value, None, None), hidden)
    args = (asking, *state, length, hidden, *lists, method.block_size, DENSE.name, site.scale, True, -1)
    graph.output(graph.call_function(ATTEND, args, more))
    out: Tensor = fx.GraphModule({}, graph)(query, key, *rest, torch.tensor(key.shape[2]))[0]
    return out


def asking(batch: int, count: int, length: int, size: int, block: int) -> Tensor:
    """Queries that have something in common with the others of their block, so that its mean is near to them."""
    common = heads(batch, count, -(-length // block), size, seed=2).repeat_interleave(block, 2)[:, :, :length]
    return heads(batch, count, length, size) + 2 * common


def picked(method: SparseColumns, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """The columns of each list: bool ``[B, H, nR, S]``."""
    _, made, counts = method.pick(query, key, query.shape[3] ** -0.5, mask)
    return columns.listed(made, counts, key.shape[2])


def causal(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]


@pytest.mark.parametrize(
    ("case", "queries", "padding"),
    [("chosen", 333, 0), ("chosen", 333, 77), ("chosen", 200, 0), ("limit", 333, 77), ("short", 200, 77)],
)
@pytest.mark.parametrize("name", METHODS)
def test_each_pair_counts_once(name: str, case: str, queries: int, padding: int) -> None:
    """With equal scores and values that tell keys apart, the output is each key's share: what was chosen, once each."""
    keys = 333
    options: dict[str, Any] = dict(base.get(name).limit) if case == "limit" else METHODS[name]
    method: Any = base.get(name)(block_size=32, min_length=keys + 1 if case == "short" else 0, **options)
    query, key = asking(2, 4, queries, 32, 32), heads(2, 2, keys, 32, seed=1)
    mask = None
    if padding:
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[0, :padding] = False
        mask[1, 100:103] = False
    value = torch.eye(keys).expand(2, 2, -1, -1).contiguous()
    with ops.reference_only():
        share = attention(method, query, key, torch.zeros_like(query), value, mask)
    pairs = causal(queries, keys).expand(2, 4, -1, -1)
    if case == "chosen":
        pairs = pairs_of(method, query, key, mask)
        assert 0.1 < pairs.sum() / (4 * 2 * causal(queries, keys).sum()) < 0.9
    if mask is not None:
        pairs = pairs & mask[:, None, None]
    count = share * pairs.sum(-1, keepdim=True)
    torch.testing.assert_close(count, pairs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_padding_moves_a_choice(name: str) -> None:
    """Padding of whole super-blocks, and logits so far apart that some weights are 0, as those of hidden keys are."""
    query, key = asking(1, 4, 500, 16, 32) * 10, heads(1, 2, 500, 16, seed=1)
    method: Any = base.get(name)(block_size=32, **METHODS[name])
    padded = [torch.cat([heads(1, x.shape[1], 96, 16, seed=5), x], 2) for x in (query, key)]
    mask = torch.arange(596)[None] >= 96
    alone, moved = pairs_of(method, query, key), pairs_of(method, *padded, mask)
    assert torch.equal(moved[:, :, 96:, 96:], alone)
    if isinstance(method, SparseColumns):
        found = picked(method, *padded, mask)
        assert found.any()
        assert not found[..., :96].any()


@pytest.mark.parametrize("name", METHODS)
def test_what_hidden_tokens_hold_does_not_matter(name: str) -> None:
    """Padding in front, and holes: other queries and keys there leave every other token's choice as it was."""
    method: Any = base.get(name)(block_size=32, **METHODS[name])
    mask = torch.rand(2, 500) < 0.8
    mask[0, :40], mask[1, 200:300] = False, False
    seen = []
    for seed in (2, 3):
        query, key = asking(2, 4, 500, 16, 32), heads(2, 2, 500, 16, seed=1)
        query, key = (torch.where(mask[:, None, :, None], x, heads(*x.shape, seed=seed) * 9) for x in (query, key))
        pairs = pairs_of(method, query, key, mask)
        seen.append(pairs & mask[:, None, None] & mask[:, None, :, None])
    assert torch.equal(*seen)
    assert 0.05 < seen[0].float().mean() < 0.3


@pytest.mark.parametrize("name", METHODS)
def test_a_fixed_choice_is_causal(name: str) -> None:
    """Other keys and values from token 200 on change nothing before it, to the bit; the choice itself looks ahead."""
    method: Any = base.get(name)(block_size=64, min_length=0, **METHODS[name])
    query, key = heads(2, 4, 300, 64), heads(2, 2, 300, 64, seed=1)
    out = []
    for seed in (2, 3):
        k, v = heads(2, 2, 300, 64, seed=4), heads(2, 2, 300, 64, seed=5)
        k[:, :, 200:], v[:, :, 200:] = heads(2, 2, 100, 64, seed=seed), heads(2, 2, 100, 64, seed=seed + 5)
        if isinstance(method, SparseColumns):
            keep, made, counts = method.pick(query, key, 0.125, None)
            extra: dict[str, Any] = {"columns": made, "column_counts": counts, "span": method.span}
            full = blocks.whole(300, 300, 64)
        else:
            order = method.order(query, key, 0.125, None)
            keep, extra = method.choose(query, key, 0.125, None), {"key_positions": order}
            k, v, full = in_order(k, order), in_order(v, order), columns.blocks_at(order, 300, 64, 4)[1]
        lists = block_ops.of(blocks.lists(keep, full, 64))
        args = (query, k, None, None, v, None, None, torch.tensor(300), None, *lists, DENSE.name, 0.125, True, -1)
        out.append(ATTEND(*args, **extra)[0])
    assert torch.equal(out[0][:, :, :200], out[1][:, :, :200])
    assert not torch.equal(out[0][:, :, 200:], out[1][:, :, 200:])


def test_lists_of_columns_follow_the_length_in_one_graph() -> None:
    """Lengths on both sides of the option: one graph with symbolic sizes, no guard on which is the smaller."""
    method = VerticalSlash(block_size=64, min_length=100, vertical=300, slash=64).method
    graphs = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def lists(query: Tensor, key: Tensor) -> Any:
        return SELECT(query, key, None, method, 0.125)

    for length in (500, 200, 70):
        query, key = heads(1, 4, length, 64), heads(1, 2, length, 64, seed=1)
        for ours, theirs in zip(lists(query, key), SELECT(query, key, None, method, 0.125), strict=True):
            assert torch.equal(ours, theirs)
        assert ours.shape[2] == -(-length // 64)
    assert len(graphs) == 1


def test_operators_keep_torchs_contract() -> None:
    query, key = heads(2, 4, 150, 16), heads(2, 2, 150, 16, seed=1)
    for method in (VerticalSlash(64, 0, 60, 70), AnchorAttention(64, 0, 1.0, 1)):
        torch.library.opcheck(SELECT, (query, key, None, method.method, 0.25))
    args = (query, key, None, PBSAttn(64, 0, 0.5, 64).method, 0.25)
    torch.library.opcheck(torch.ops.effcompile.order_keys.default, args)
    order = torch.ops.effcompile.order_keys.default(*args)
    torch.library.opcheck(torch.ops.effcompile.select_blocks.default, args, {"key_positions": order})


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    "name", ["vertical_slash", pytest.param("anchor_attention", marks=pytest.mark.slow), "pbs_attn"]
)
def test_prompts_of_several_lengths(name: str, llama: LlamaForCausalLM, no_inductor: list[Any]) -> None:  # noqa: F811
    """At the limit the model is the model, in graphs whose sizes become symbols, with padding and without."""
    try:
        ec.sparse_attention(name, min_length=64, block_size=32, **base.get(name).limit)(llama)
        compiled = torch.compile(llama, backend="effcompile")
        for length, padding in ((300, 0), (333, 50), (401, 50)):
            ids = torch.randint(0, 60, (2, length))
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
            with torch.no_grad():
                out, expected = (m(ids, attention_mask=mask, use_cache=False).logits for m in (compiled, llama))
            torch.testing.assert_close(out[1], expected[1], rtol=0, atol=2e-5)
            torch.testing.assert_close(out[0, padding:], expected[0, padding:], rtol=0, atol=2e-5)
        forms = [d.form for d in ec.inspect(llama).decisions if d.action == "rewritten"]
    finally:
        ec.remove(llama)
    assert forms
    assert all(form.startswith(name) for form in forms)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vertical_slash", {"vertical": -1}, "0 or more"),
        ("anchor_attention", {"theta": math.nan}, "expected a number"),
        ("anchor_attention", {"step": 0}, "at least 1 block"),
        ("pbs_attn", {"threshold": 1.1}, "0 to 1"),
        ("pbs_attn", {"segment": 200}, "no multiple of block_size=128"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ec.OptionError, match=said):
        ec.sparse_attention(name, **options)


# Vertical-slash.


def test_vertical_slash_is_its_definition() -> None:
    """Against loops: the columns and distances with the largest sums, and blocks that a distance crosses."""
    (queries, keys), block = (150, 210), 32
    query, key = heads(1, 2, queries, 16) * 2, heads(1, 1, keys, 16, seed=1)
    method = VerticalSlash(block_size=block, vertical=45, slash=120)
    weights = (query[0] @ key[0, 0].T * 0.25).masked_fill(~causal(queries, keys), -torch.inf).softmax(-1)[:, -PROBED:]
    pairs = torch.zeros(2, queries, keys, dtype=torch.bool)
    for h in range(2):
        sums = weights[h].sum(0).tolist()
        columns_ = sorted(range(keys), key=lambda c: (c >= 30, c if c < 30 else -sums[c]))[:45]
        far = [0.0] * keys
        for row in range(PROBED):
            for c in range(keys - PROBED + row + 1):
                far[keys - PROBED + row - c] += weights[h, row, c].item()
        near = sorted(range(keys), key=lambda d: (d >= 100, d if d < 100 else -far[d]))[:120]
        for start in range(0, queries, block):
            mine = range(start, min(queries, start + block))
            for begin in range(0, keys, block):
                distances = {keys - queries + i - j for i in mine for j in range(begin, min(keys, begin + block))}
                if begin == 0 or distances & {0, *near}:
                    pairs[h, mine.start : mine.stop, begin : begin + block] = True
            pairs[h, mine.start : mine.stop, columns_] = True
    assert torch.equal(pairs_of(method, query, key)[0], pairs & causal(queries, keys))
    # No list names keys behind its last query: they would be gathered and hidden.
    last = (keys - queries + (torch.arange(5) + 1) * block - 1).clamp(max=keys - 1)
    assert not (picked(method, query, key)[0] & (torch.arange(keys) > last[:, None])).any()


def test_blocks_that_a_distance_crosses() -> None:
    """Against loops, with few distances, so that one at either end of a block's range is often the only one."""
    for queries, keys in ((50, 83), (83, 83), (64, 64)):
        slash = torch.rand(40, keys) < 0.02
        found = crossed(slash, queries, keys, 16)
        for i in range(found.shape[1]):
            for j in range(found.shape[2]):
                mine = range(keys - queries + i * 16, keys - queries + min(queries, i * 16 + 16))
                theirs = range(j * 16, min(keys, j * 16 + 16))
                distances = sorted({q - k for q in mine for k in theirs if q >= k})
                assert torch.equal(found[:, i, j], slash[:, distances].any(-1))


def test_every_column_is_every_pair() -> None:
    query, key = heads(2, 4, 300, 32), heads(2, 2, 300, 32, seed=1)
    method = VerticalSlash(block_size=64, vertical=300, slash=1)
    assert torch.equal(pairs_of(method, query, key), causal(300, 300).expand(2, 4, -1, -1))
    assert method.pick(query, key, 0.2, None).keep.sum((2, 3)).tolist() == [[9] * 4] * 2


def test_vertical_slash_is_the_official_choice() -> None:
    """The columns and the distances that its kernel is given."""
    path = "minference/modules/minference_forward.py"
    first = "def gather_last_q_vertical_slash_topk_v4", "def apply_rotary_pos_emb_single"
    source = official("microsoft/MInference", path, "def sum_all_diagonal_matrix", "def gather")
    source += official("microsoft/MInference", path, *first)
    given: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, vertical: Tensor, slash: Tensor) -> None:
        given.extend((vertical, slash))

    names: dict[str, Any] = {"torch": torch, "math": math, "vertical_slash_sparse_attention": kernel}
    names |= {"streaming_forward": None, "LAST_Q_MASK": torch.ones(64, 64).tril().bool()[None, None]}
    exec(source, names)
    pattern = {0: ("vertical_and_slash", 100, 300, 1)}
    self = SimpleNamespace(head_dim=64, best_pattern=pattern, config=SimpleNamespace(to_dict=dict))
    query, key = heads(1, 1, 1000, 64) * 2, heads(1, 1, 1000, 64, seed=1)
    names["gather_last_q_vertical_slash_topk_v4"](self, query, key, key, 0)
    vertical, slash = strongest(query, key, 0.125, None, 100, 300)
    assert vertical.flatten().tolist() == sorted(given[0].flatten().tolist())
    assert slash[0, 0].nonzero().flatten().tolist() == sorted(given[1].flatten().tolist())


# AnchorAttention's card.


@pytest.mark.parametrize("hidden", [(), (*range(40), *range(150, 230))])
def test_anchor_attention_is_its_definition(hidden: tuple[int, ...]) -> None:
    """Against loops over super-blocks, for lengths that are whole numbers of nothing, and with hidden tokens."""
    length, block, step, theta = 301, 32, 2, 1.5
    query, key = asking(1, 2, length, 16, block), heads(1, 1, length, 16, seed=1)
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, list(hidden)] = False
    method = AnchorAttention(block_size=block, theta=theta, step=step)
    found = picked(method, query, key, mask if hidden else None)
    first = block if hidden else 0  # where the first block with a token begins
    for h in range(2):
        logits = query[0, h] @ key[0, 0].T * 0.25
        for g in range(-(-length // (step * block))):
            begin, wanted = g * step * block, torch.zeros(length, dtype=torch.bool)
            for start in range(begin, min(length, begin + step * block), block):
                rows = [i for i in range(start, min(length, start + block)) if mask[0, i]]
                near = [j for j in range(length) if (first <= j < first + block or j >= begin) and mask[0, j]]
                top = [max(logits[i, j].item() for j in near if j <= i) for i in rows]
                if rows:
                    wanted[:begin] |= logits[rows].mean(0)[:begin] + theta >= sum(top) / len(top)
            wanted[first : first + block] = False
            assert torch.equal(found[0, h, g], wanted & mask[0])
    assert 0.01 < found[:, :, -1].float().mean() < 0.5


@pytest.mark.parametrize("theta", [0.5, 3.0])
def test_anchor_attention_is_the_official_choice(theta: float) -> None:
    """Given our anchors; but for the block before each window, which it forgets."""
    path = "anchor_attn/src/ops/get_mask_test.py"
    source = official("yuzhouzhang9/Anchor-Attention", path, "def get_mask_block", "def get_q_mask_test")
    names: dict[str, Any] = {"torch": torch, "time": __import__("time"), "print": lambda *_: None}
    exec(source.replace("torch.cuda.synchronize()", "pass"), names)
    length, block, step = 1024, 32, 4
    query, key = asking(1, 3, length, 64, block), heads(1, 3, length, 64, seed=1)
    logits = query @ key.mT * 0.125
    at = torch.arange(length)
    near = (at < block) | (at >= at[:, None] // (step * block) * step * block)
    anchors = logits.masked_fill(~(near & causal(length, length)), -torch.inf).amax(-1)
    made, counts = names["get_mask_block"](
        query, key, anchors, block, block, step, theta, 1, 3, length, 64, 0.125, "cpu", False
    )
    ours = picked(AnchorAttention(block_size=block, theta=theta, step=step), query, key)
    theirs = columns.listed(made, counts[..., 0], length)
    for g in range(1, length // (step * block)):
        end = g * step * block - block
        assert torch.equal(ours[:, :, g, :end], theirs[:, :, g, :end])
        assert not theirs[:, :, g, end:].any()
    assert 0.01 < ours[:, :, -1].float().mean() < 0.9


def test_a_key_that_one_block_seeks_is_read_by_its_super_block() -> None:
    query, key = heads(1, 2, 1024, 32) * 0.2, heads(1, 1, 1024, 32, seed=1)
    direction = torch.nn.functional.normalize(heads(32, seed=2), dim=0)
    other = torch.nn.functional.normalize(heads(32, seed=3), dim=0)
    query, key[:, :, 0] = query + 8 * other, 12 * other  # all are drawn to the first
    query[:, 1, 704:768] += 8 * direction
    key[:, :, 300] = 12 * direction
    found = picked(AnchorAttention(block_size=64, theta=2.0, step=4), query, key)
    assert found[0, 1, :, 300].tolist() == [False, False, True, False]  # queries 512 to 768, of which the last seek it
    for g in range(4):
        assert not found[:, :, g, g * 256 :].any()
        assert not found[:, :, g, :64].any()


def test_what_is_dropped_is_further_than_theta_from_the_anchor() -> None:
    """Queries that are constant in a block: the bound of the paper; and a larger theta keeps more."""
    theta = 2.0
    query = heads(1, 2, 16, 32).repeat_interleave(32, 2) * 3
    key = heads(1, 2, 512, 32, seed=1)
    thetas = -math.inf, 1.0, theta, math.inf
    order = [picked(AnchorAttention(block_size=32, theta=t, step=4), query, key) for t in thetas]
    logits = query @ key.mT * 32**-0.5
    seen = pairs_of(AnchorAttention(block_size=32, theta=theta, step=4), query, key)
    largest = logits.masked_fill(~(seen & causal(512, 512)), -torch.inf).amax(-1)
    dropped = causal(512, 512) & ~seen
    anchor = largest.unflatten(2, (16, 32)).mean(3).repeat_interleave(32, 2)
    assert dropped.any()
    assert (logits < anchor[..., None] - theta + 1e-4)[dropped].all()
    assert not order[0].any()
    for less, more in itertools.pairwise(order):
        assert not (less & ~more).any()
        assert more.sum() > less.sum()
    assert order[-1][0, 0, -1].sum() == 512 - 128 - 32


def test_slabs_and_shared_masks_do_not_change_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = asking(2, 4, 500, 16, 32), heads(2, 2, 500, 16, seed=1)
    mask = torch.ones(1, 500, dtype=torch.bool)
    mask[:, :100] = False
    method = AnchorAttention(block_size=32, theta=1.5, step=2)
    whole = picked(method, query, key, mask)
    assert whole.any()
    assert torch.equal(picked(method, query, key, mask.expand(2, -1)), whole)
    monkeypatch.setattr(estimate, "SLAB", 30_000)
    assert torch.equal(picked(method, query, key, mask), whole)


# PBS-Attn's card.


def test_keys_move_within_whole_segments() -> None:
    query, key = heads(2, 4, 1000, 32) * 2, heads(2, 2, 1000, 32, seed=1)
    order = PBSAttn(block_size=64, segment=256).order(query, key, 0.2, None)
    assert torch.equal(order.sort(-1).values, torch.arange(1000).expand(2, 2, -1))
    assert torch.equal(order // 256, (torch.arange(1000) // 256).expand(2, 2, -1))
    assert torch.equal(order[..., 768:], torch.arange(768, 1000).expand(2, 2, -1))
    logits = query[:, :, -64:] @ key[:, :, :768].repeat_interleave(2, 1).mT * 0.2
    score = logits.softmax(-1).mean(2).unflatten(1, (2, 2)).mean(2)
    falling = score.gather(2, order[..., :768]).unflatten(2, (3, 256))
    assert (falling.diff(dim=-1) <= 1e-9).all()


def test_hidden_keys_are_not_seen_in_another_order() -> None:
    """Holes in the mask: their slots are the same for all heads, and what was hidden is what is hidden."""
    query, key = heads(2, 4, 500, 32) * 400, heads(2, 2, 500, 32, seed=1)  # some weigh nothing, as hidden ones do
    mask = torch.rand(2, 500) < 0.7
    order = PBSAttn(block_size=32, segment=128).order(query, key, 0.2, mask)
    slots = mask[:, None].expand(2, 2, -1).gather(2, order)
    assert torch.equal(slots[:, 0], slots[:, 1])
    assert torch.equal(order.sort(-1).values, torch.arange(500).expand(2, 2, -1))


def test_segments_of_a_block_are_pooled_blocks() -> None:
    """No key changes its block: the choice is that of pooled products in the keys' own order, with the diagonal."""
    query, key = heads(1, 2, 512, 32) * 4, heads(1, 2, 512, 32, seed=1)
    keep = keep_of(PBSAttn(block_size=64, segment=64, threshold=0.6), query, key)
    means = [x.unflatten(2, (8, 64)).mean(3) for x in (query, key)]
    weights = (means[0] @ means[1].mT * 32**-0.5).masked_fill(~torch.ones(8, 8).tril(-1).bool(), -torch.inf).softmax(-1)
    for h in range(2):
        for row in range(8):
            taken, held = {0, row}, 0.0
            for c in weights[0, h, row].argsort(descending=True).tolist() if row else []:
                if held >= 0.6:
                    break
                taken.add(c)
                held += weights[0, h, row, c].item()
            assert set(keep[0, h, row].nonzero().flatten().tolist()) == taken


def test_heavy_keys_gather_in_few_blocks() -> None:
    """Sixty keys that the last queries seek, far apart: what holds 0.9 of the attention takes fewer blocks."""
    query, key = heads(1, 1, 4096, 64) * 0.3, heads(1, 1, 4096, 64, seed=1) * 0.3
    direction = torch.nn.functional.normalize(heads(64, seed=2), dim=0)
    query += 5 * direction
    key[:, :, torch.randperm(4096, generator=torch.Generator().manual_seed(3))[:60]] += 12 * direction
    needed = {}
    for segment in (128, 256, 1024):
        method = PBSAttn(segment=segment)
        order = method.order(query, key, 0.125, None)
        weights = estimate.probe(query, in_order(key, order), scale=0.125, rows=128, causal=False)
        mass = estimate.block_sums(weights.mean(2), 128).sort(-1, descending=True).values
        needed[segment] = int((mass.cumsum(-1) < 0.9).sum()) + 1
    assert needed[1024] < needed[256] < needed[128]


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_pbs_attn_is_the_official_choice(threshold: float) -> None:
    """Order and blocks, for a key/value head to each query head, where rows do not stop short of the threshold.

    Blocks of its own segment in which no query of a block sees a key are in its map, and hidden in its kernel.
    """
    names: dict[str, Any] = {"torch": torch, "math": math, "F": torch.nn.functional, "Union": Union}
    for path, first, last in (
        ("utils.py", "def block_pooled_attn", None),
        ("permute_states.py", "def last_block_attn_sorting", "def apply_permutation"),
        ("pbs.py", "def first_token_mask", "def permuted_block_sparse_attn_fwd"),
    ):
        exec(official("xinghaow99/pbs-attn", f"pbs_attn/src/{path}", first, last), names)
    length, segment, block = 1152, 256, 128
    # What all queries and some blocks of keys have in common is what pooled products tell.
    drawn = heads(2, 3, length // block, 1, seed=2).repeat_interleave(block, 2)
    query, key = heads(2, 3, length, 64) + 0.8, heads(2, 3, length, 64, seed=1) + 0.6 * drawn
    moved, index = names["last_block_attn_sorting"](query, key, block, segment)
    method = PBSAttn(block_size=block, segment=segment, threshold=threshold)
    order = method.order(query, key, 0.125, None)
    assert torch.equal(order, index)
    assert torch.equal(in_order(key, order), moved)
    same = torch.arange(length).expand(2, 3, -1)
    _, chosen, own = names["permuted_block_selection"](query, moved, same, index, block, segment, threshold)
    allowed, _ = columns.blocks_at(order, length, block, 3)
    ours = method.choose(query, key, 0.125, None)
    assert torch.equal(ours, (chosen | own) & allowed)
    assert not torch.equal(ours, allowed)


def test_a_cut_last_block_is_pooled_over_its_queries() -> None:
    """Zeros behind the end would make its logits small and its choice broad: it is that of a whole block."""
    query, key = heads(1, 1, 1, 32).expand(1, 1, 512, 32) * 8, heads(1, 1, 512, 32, seed=1)
    method = PBSAttn(block_size=64, segment=64, threshold=0.5)
    cut = keep_of(method, query[:, :, :460], key[:, :, :460])
    assert torch.equal(cut[0, 0, 7, :7], keep_of(method, query, key)[0, 0, 7, :7])

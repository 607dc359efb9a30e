"""Sparse prefill methods: what every one must do, and what each card says can be checked.

A method joins the first part by being registered: ``FAMILY`` is read from the registry.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile.kernels import blocks, columns, estimate, select
from effcompile.passes import base
from effcompile.passes.flexprefill import FlexPrefill, diagonals
from effcompile.passes.pbs_attn import PBSAttn
from effcompile.passes.proxyattn import ProxyAttn, needed
from effcompile.passes.sparse_columns import SparseColumns
from effcompile.passes.sparse_prefill import SparsePrefill, bounds
from effcompile.passes.streaming import Streaming
from effcompile.passes.xattention import XAttention

FAMILY = [name for name in base.REGISTRY if issubclass(base.get(name), SparsePrefill)]
LEAST: dict[str, dict[str, Any]] = {
    "xattention": {"threshold": 0.0},
    "flexprefill": {"gamma": 0.0, "tau": 0.0, "min_budget": 0},
    "proxyattn": {"gamma": 0.0, "min_budget": 0},
    "streaming": {"window": 1, "sink": 1},
    "vertical_slash": {"vertical": 0, "slash": 0},
    "anchor_attention": {"theta": -1e30, "step": 1},
    "pbs_attn": {"threshold": 0.0, "segment": 64},
}
"""Options at which a method visits the sink and the diagonal, and as little else as it can."""


def heads(*shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape)


def pairs_of(method: SparsePrefill, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """The pairs of tokens that a method visits, without its least length: bool ``[B, H, T, S]``, causal ones only."""
    (batch, groups, keys), (heads_, queries) = key.shape[:3], query.shape[1:3]
    scale, block = query.shape[-1] ** -0.5, method.block_size
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    if isinstance(method, SparseColumns):
        keep, made, counts = method.pick(query, key, scale, mask)
        single = columns.listed(made, counts, keys).repeat_interleave(method.span * block, 2)[:, :, :queries]
        inside = blocks.tokens(keep, queries, keys, block)
        assert not (single & inside).any()
        return (inside | single) & seen
    keep = method.choose(query, key, scale, mask)
    if isinstance(method, PBSAttn):
        order = method.order(query, key, scale, mask).repeat_interleave(heads_ // groups, 1)[:, :, None]
        slots = blocks.tokens(keep, queries, keys, block)
        return slots.gather(3, order.argsort(-1).expand(batch, heads_, queries, -1)) & seen
    return blocks.tokens(keep.expand(batch, heads_, -1, -1), queries, keys, block) & seen


def keep_of(method: SparsePrefill, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """The blocks that a method visits whole, without its least length."""
    block, (queries, keys) = method.block_size, (query.shape[2], key.shape[2])
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    missing = seen & ~pairs_of(method, query, key, mask).expand(query.shape[0], query.shape[1], -1, -1)
    short = (0, -keys % block, 0, -queries % block)
    tiles = torch.nn.functional.pad(missing, short).unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    return ~tiles.any(-1).any(-2) & blocks.possible(queries, keys, block)


def build(name: str, **options: Any) -> SparsePrefill:
    return base.get(name)(**options)  # type: ignore[return-value]


# What every method must do.


def test_every_method_says_its_least() -> None:
    assert set(LEAST) == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (300, 811), (1024, 1024)])
def test_limit_visits_everything_and_least_the_forced_set(name: str, queries: int, keys: int) -> None:
    query, key = heads(2, 4, queries, 32), heads(2, 2, keys, 32, seed=1)
    allowed, forced = bounds(query, key, None, 64)
    limit = build(name, block_size=64, **base.get(name).limit)
    assert torch.equal(keep_of(limit, query, key), allowed.expand(2, 4, -1, -1))
    least = keep_of(build(name, block_size=64, **LEAST[name]), query, key)
    assert (least | ~forced).all()
    assert not (least & ~allowed).any()
    extra = (least & ~forced).float().sum() / (allowed & ~forced).expand_as(least).sum()
    # FlexPrefill takes a column and a diagonal at the least, and these may be others than the forced ones.
    assert extra <= (0.1 if name == "flexprefill" else 0)


@pytest.mark.parametrize("name", FAMILY)
def test_each_row_of_a_batch_is_chosen_as_if_alone(name: str) -> None:
    """Left padding by whole blocks too: the padded row has the blocks of the bare one, moved."""
    query, key = heads(2, 4, 640, 32), heads(2, 2, 640, 32, seed=1)
    method = build(name, block_size=64)
    both = keep_of(method, query, key)
    for row in range(2):
        assert torch.equal(both[row : row + 1], keep_of(method, query[row : row + 1], key[row : row + 1]))
    padded = [torch.cat([heads(1, x.shape[1], 128, 32, seed=5), x[:1]], 2) for x in (query, key)]
    mask = torch.ones(1, 768, dtype=torch.bool)
    mask[:, :128] = False
    moved = keep_of(method, *padded, mask)[:, :, 2:, 2:]
    assert torch.equal(moved, both[:1])


NEEDLE: dict[str, dict[str, Any]] = {
    "xattention": {"threshold": 0.5},
    "flexprefill": {"gamma": 0.5, "min_budget": 192},
    "proxyattn": {"gamma": 0.5, "min_budget": 192},
    "vertical_slash": {"vertical": 160, "slash": 1},
    "anchor_attention": {"theta": 3.0, "step": 1},
    "pbs_attn": {"threshold": 0.5},
}


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "streaming"])
def test_a_planted_needle_is_kept(name: str) -> None:
    """One block of keys to which every later query is drawn. (Streaming drops it: the next test.)"""
    query, key = heads(1, 4, 1024, 32) * 0.3, heads(1, 2, 1024, 32, seed=1)
    direction = torch.nn.functional.normalize(heads(32, seed=2), dim=0)
    query += 6 * direction
    key[:, :, 320:384] += 6 * direction
    keep = keep_of(build(name, block_size=64, **NEEDLE[name]), query, key)
    assert keep[:, :, 6:, 5].all()
    assert keep.float().mean() < 0.35


def test_streaming_drops_a_needle() -> None:
    keep = keep_of(Streaming(block_size=64, window=128, sink=64), heads(1, 2, 1024, 32), heads(1, 2, 1024, 32))
    assert not keep[:, :, 8:, 5].any()


@pytest.mark.parametrize("name", FAMILY)
def test_nan_in_the_prompt_does_not_drop_blocks_in_silence(name: str) -> None:
    query, key = heads(1, 2, 512, 32), heads(1, 1, 512, 32, seed=1)
    query[:, :, 500] = torch.nan
    keep = keep_of(build(name, block_size=64, **LEAST[name]), query, key)
    allowed, forced = bounds(query, key, None, 64)
    assert (keep | ~forced).all()
    assert not (keep & ~allowed).any()
    if name != "streaming":
        assert torch.equal(keep[0, :, -1], allowed[-1].expand(2, -1))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60, max_position_embeddings=1024)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FAMILY)
def test_a_model_at_the_limit_is_the_model(name: str, llama: LlamaForCausalLM, request: pytest.FixtureRequest) -> None:
    """Compiled, with padding, prefill through the method and decode through a compressed cache, on one cache.

    To Inductor the methods differ by the name of an operator: it compiles the first.
    """
    torch._dynamo.reset()
    if name != FAMILY[0]:
        request.getfixturevalue("no_inductor")
    ids = torch.randint(0, 60, (2, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :77] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
           "return_dict_in_generate": True}  # fmt: skip
    expected = llama.generate(ids, **how)
    try:
        ec.sparse_attention(name, min_length=64, block_size=64, **base.get(name).limit)(llama)
        ec.compress_kv(key_bits=16, value_bits=16)(llama)
        llama.compile(backend="effcompile")
        out = llama.generate(ids, **how)
        found = ec.inspect(llama)
    finally:
        ec.remove(llama)
        llama._compiled_call_impl = None
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    forms = [d.form for d in found.decisions if d.action == "rewritten"]
    assert sum(form.startswith(name) for form in forms) == 2
    assert len(forms) == 4


# Selectors.


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.999), st.integers(1, 8))
def test_cumulative_is_the_smallest_cover(seed: int, share: float, columns: int) -> None:
    """Against a loop: forced blocks first, then the heaviest until the mass before a block reaches the share."""
    torch.manual_seed(seed)
    scores = torch.rand(1, 1, 3, columns).double().float()
    possible, forced = torch.rand(3, columns) < 0.8, torch.rand(3, columns) < 0.2
    keep = select.cumulative(scores, share, possible, forced & possible)
    for row in range(3):
        mine = [c for c in range(columns) if possible[row, c]]
        order = sorted(mine, key=lambda c: (not forced[row, c], -scores[0, 0, row, c].item(), c))
        total, held, taken = sum(scores[0, 0, row, c].double() for c in mine), 0.0, set()
        for c in order:
            if forced[row, c] or held < share * total:
                taken.add(c)
                held += scores[0, 0, row, c].double()
        assert {c for c in range(columns) if keep[0, 0, row, c]} == taken


def test_a_share_of_one_is_everything_even_where_sums_stop_short() -> None:
    """The published selectors lose rows here: sums of floats end at 0.9999."""
    scores = torch.rand(1, 1, 500, 60).softmax(-1) * 1e-3
    scores[..., ::7] = 0  # blocks without any mass are blocks too
    possible = torch.ones(500, 60, dtype=torch.bool)
    nothing = torch.zeros((), dtype=torch.bool)
    assert select.cumulative(scores, 1.0, possible, nothing).all()
    assert select.global_cumulative(scores, 1.0, possible, nothing).all()


def test_ties_go_to_the_lower_block() -> None:
    possible, nothing = torch.ones(1, 6, dtype=torch.bool), torch.zeros((), dtype=torch.bool)
    keep = select.top_k(torch.ones(1, 1, 1, 6), 2, possible, nothing)
    assert keep.flatten().tolist() == [True, True, False, False, False, False]


# Estimators.


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_a_fold_is_the_sum_of_an_antidiagonal(stride: int) -> None:
    """Two blocks of one fold each: their softmax tells the difference of the folds' products."""
    query, key = heads(1, 1, 2 * stride, 8), heads(1, 1, 2 * stride, 8, seed=1)
    scores = estimate.pooled(query, key, scale=0.3, block=stride, stride=stride)
    logits = query[0, 0] @ key[0, 0].T * 0.3
    sums = [logits[stride:, c : c + stride].flip(1).diagonal().sum() / stride for c in (0, stride)]
    torch.testing.assert_close(scores[0, 0, 1], torch.stack(sums).softmax(0), rtol=1e-5, atol=1e-6)


def test_stride_one_is_the_exact_mass_of_a_block() -> None:
    query, key = heads(2, 4, 200, 16), heads(2, 2, 333, 16, seed=1)
    scores = estimate.pooled(query, key, scale=0.25, block=64, stride=1)
    logits = query @ key.repeat_interleave(2, 1).mT * 0.25
    seen = torch.arange(333) <= torch.arange(133, 333)[:, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = torch.nn.functional.pad(weights, (0, 51, 0, 56)).unflatten(3, (6, 64)).unflatten(2, (4, 64))
    torch.testing.assert_close(scores, weights.sum((3, 5)), rtol=1e-5, atol=1e-5)


def test_slabs_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = heads(1, 3, 500, 16), heads(1, 1, 500, 16, seed=1)
    mask = torch.ones(1, 500, dtype=torch.bool)
    mask[:, :100] = False
    for fold, stride in (("antidiagonal", 8), ("first", 4), ("mean", 64)):
        how: dict[str, Any] = {"scale": 0.25, "block": 64, "stride": stride, "fold": fold, "key_mask": mask}
        whole = estimate.pooled(query, key, **how)
        with monkeypatch.context() as patch:
            patch.setattr(estimate, "SLAB", 1)
            torch.testing.assert_close(estimate.pooled(query, key, **how), whole, rtol=1e-6, atol=1e-7)


def test_diagonals() -> None:
    weights = heads(2, 5, 9)
    for end in range(9):
        wanted = sum(weights[:, 4 - back, end - back] for back in range(5) if end - back >= 0)
        torch.testing.assert_close(diagonals(weights)[:, end], wanted)


# XAttention's card.


def test_xattention_with_threshold_0_is_sink_and_diagonal() -> None:
    keep = keep_of(XAttention(threshold=0.0), heads(1, 2, 1024, 64), heads(1, 2, 1024, 64, seed=1))
    assert keep.sum((2, 3)).tolist() == [[15, 15]]


def test_xattention_dilutes_a_lone_key() -> None:
    """Its documented failure: the logit of one heavy key is divided by the stride before the softmax."""
    query, key = heads(1, 1, 1024, 32) * 0.2, heads(1, 1, 1024, 32, seed=1) * 0.2
    query[..., 0] += 4
    key[:, :, 400, 0] = 14
    share = {}
    for stride in (1, 4, 64):
        scores = estimate.pooled(query, key, scale=32**-0.5, block=64, stride=stride)
        share[stride] = (scores[0, 0, 8:, 6] / scores[0, 0, 8:].sum(-1)).min()
    assert share[1] > 0.9
    assert share[4] < 0.2
    assert share[64] < 0.13


# FlexPrefill's card.


def test_flexprefill_keeps_a_vertical_and_a_slash() -> None:
    length, block = 1024, 64
    query, key = heads(1, 2, length, 64) * 0.1, heads(1, 2, length, 64, seed=1) * 0.1
    query[:, 0, :, 0] += 6
    key[:, 0, 5 * block : 6 * block, 0] += 6
    code = torch.randn(length // block, 64).repeat_interleave(block, 0)
    query[:, 1] += 1.5 * code
    key[:, 1] += 1.5 * code.roll(-3 * block, 0)  # query block r looks at key block r - 3
    keep = keep_of(FlexPrefill(block_size=block, gamma=0.6, tau=0.0, min_budget=3 * block), query, key)
    assert keep[0, 0, 5:, 5].all()
    assert keep.float().mean() < 0.3
    assert all(keep[0, 1, row, row - 3] for row in range(3, 16))


def test_flexprefill_sees_that_pooling_is_right() -> None:
    """Queries and keys that are constant in a block: pooled products are exact, so every head is query-aware."""
    query, key = (heads(1, 2, 16, 32, seed=s).repeat_interleave(64, 2) * 3 for s in (0, 1))
    aware = keep_of(FlexPrefill(block_size=64, gamma=0.9, tau=0.1, min_budget=0), query, key)
    never = keep_of(FlexPrefill(block_size=64, gamma=0.9, tau=0.0, min_budget=0), query, key)
    always = keep_of(FlexPrefill(block_size=64, gamma=0.9, tau=2.0, min_budget=0), query, key)
    assert torch.equal(aware, always)
    assert not torch.equal(aware, never)


# ProxyAttn's card.


def test_proxyattn_of_equal_heads_is_each_head() -> None:
    query, key = heads(1, 1, 512, 32).expand(1, 4, -1, -1), heads(1, 1, 512, 32, seed=1).expand(1, 2, -1, -1)
    shared = ProxyAttn(block_size=64, gamma=0.5, stride=1, min_budget=0)
    keep = keep_of(shared, query, key)
    assert torch.equal(keep, keep_of(shared, query[:, :1], key[:, :1]).expand(1, 4, -1, -1))
    weights = (query[0, 0] @ key[0, 0].T * 32**-0.5).masked_fill(~torch.ones(512, 512).tril().bool(), -torch.inf)
    best = weights.softmax(-1).unflatten(1, (8, 64)).unflatten(0, (8, 64)).amax((1, 3))
    scores = estimate.pooled(query[:, :1], key[:, :1], scale=32**-0.5, block=64, stride=1, fold="first", pool="max")
    torch.testing.assert_close(scores[0, 0], best, rtol=1e-5, atol=1e-7)


def test_proxyattn_gives_a_sharp_head_fewer_blocks() -> None:
    query, key = heads(1, 1, 1024, 32), heads(1, 1, 1024, 32, seed=1)
    both = torch.cat([query * 6, query * 0.1], 1)
    share = needed(both, key, 32**-0.5, None, 64, 0.9)
    assert share[0, 0] < share[0, 1]
    keep = keep_of(ProxyAttn(block_size=64, gamma=0.9, min_budget=0), both, key)
    assert keep[0, 0].sum() < keep[0, 1].sum()
    # One ranking: the sharp head's blocks are a prefix of the flat one's.
    assert not (keep[0, 0] & ~keep[0, 1]).any()


def test_proxyattn_loses_what_one_head_alone_looks_for() -> None:
    """Its documented weakness: averaging over heads divides the logit of a needle that a single head seeks."""
    query, key = heads(1, 8, 1024, 32), heads(1, 8, 1024, 32, seed=1)
    kept = {}
    for seekers in (1, 8):
        q, k = query.clone(), key.clone()
        q[:, :seekers, :, 0] += 5
        k[:, :seekers, 320:384, 0] += 5
        weights = estimate.probe(q, k, scale=32**-0.5, rows=64)
        assert weights[0, 0, :, 320:384].sum(-1).mean() > 0.7  # the head itself looks nowhere else
        kept[seekers] = keep_of(ProxyAttn(block_size=64, gamma=0.5, min_budget=192), q, k)[0, 0, 8:, 5]
    assert kept[8].all()
    assert not kept[1].all()


# Wrong options, and sites that a method cannot serve.


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("xattention", {"threshold": 1.5}, "0 to 1"),
        ("xattention", {"stride": 24}, "does not divide"),
        ("xattention", {"block_size": 100}, "multiple of 16"),
        ("flexprefill", {"gamma": -0.1}, "0 to 1"),
        ("flexprefill", {"tau": -1.0}, "0 or more"),
        ("proxyattn", {"proxy_heads": 0}, "expected 1"),
        ("streaming", {"window": 0}, "at least 1"),
        ("nonsense", {}, "xattention"),
        ("compress_kv", {}, "xattention"),
        ("xattention", {"treshold": 0.9}, "threshold"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ec.OptionError, match=said):
        ec.sparse_attention(name, **options)


@pytest.mark.parametrize(
    ("options", "length", "code"),
    [({"min_length": 400}, 300, "short-prompt"), ({"min_length": 0, "proxy_heads": 3}, 300, "not-supported")],
)
def test_reasons(
    options: dict[str, Any], length: int, code: str, llama: LlamaForCausalLM, no_inductor: list[Any]
) -> None:
    torch._dynamo.reset()
    ids = torch.randint(0, 60, (1, length))
    try:
        ec.sparse_attention("proxyattn", **options)(llama)
        with torch.no_grad():
            out = torch.compile(llama, backend="effcompile")(ids, use_cache=False).logits
        found = ec.inspect(llama)
    finally:
        ec.remove(llama)
    with torch.no_grad():
        torch.testing.assert_close(out, llama(ids, use_cache=False).logits, rtol=0, atol=2e-5)
    assert {d.reason.code for d in found.decisions if d.reason is not None} == {code}


# The official code, where there is a copy: EFFCOMPILE_ORACLES names a folder with clones or bare mirrors of it.


def official(repository: str, path: str, first: str, last: str | None) -> str:
    """The part of a file of the official repository from ``first`` up to ``last``. Skips, loudly, without a copy."""
    folder = os.environ.get("EFFCOMPILE_ORACLES")
    if not folder:
        pytest.skip(f"EFFCOMPILE_ORACLES is not set: no copy of {repository} to compare with")
    found = [
        p for p in (Path(folder) / repository, Path(folder) / f"{repository.replace('/', '+')}/repo") if p.exists()
    ]
    if not found:
        pytest.skip(f"{folder} has no copy of {repository} to compare with")
    text = subprocess.run(
        ["git", "-C", str(found[0]), "show", f"HEAD:{path}"], capture_output=True, text=True, check=True
    )
    source = text.stdout.replace('"cuda"', '"cpu"')
    start = source.index(first)
    return source[start : source.index(last, start) if last else None]


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_xattention_is_the_official_choice(stride: int, threshold: float) -> None:
    """Scores everywhere; blocks beyond its first chunk, where its selection forgets the sink and takes some more.

    A length that is no multiple of the chunk: without padding its mask hides everything.
    """
    parts = "xattn/src/utils.py", "def find_blocks_chunked", None
    names: dict[str, Any] = {"torch": torch, "math": __import__("math"), "F": torch.nn.functional}
    exec(official("mit-han-lab/x-attention", *parts), names)
    parts = "xattn/src/Xattention.py", "def xattn_estimate", "def Xattention_prefill"
    exec(official("mit-han-lab/x-attention", *parts), names)
    query, key = heads(1, 3, 3000, 64) * 2, heads(1, 3, 3000, 64, seed=1)
    sums, theirs = names["xattn_estimate"](
        query, key, 128, stride, threshold=threshold, chunk_size=1024, use_triton=False
    )
    scores = estimate.pooled(query, key, scale=0.125, block=128, stride=stride)
    torch.testing.assert_close(scores, sums[:, :, :24, :24], rtol=1e-4, atol=1e-5)
    ours = keep_of(XAttention(threshold=threshold, stride=stride), query, key)
    assert torch.equal(ours[:, :, 8:], theirs[:, :, 8:24, :24])
    assert not (ours[:, :, :8] & ~theirs[:, :, :8, :24]).any()


@pytest.mark.parametrize("tau", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_flexprefill_is_the_official_choice(tau: float, gamma: float) -> None:
    """All blocks but one: that which crosses a query-aware head's budget, which the official code drops."""
    path = "flex_prefill/ops/flex_prefill_attention.py"
    source = official("bytedance/FlexPrefill", path, "def torch_bhn_sumpool", "from transformers.utils")

    def mean(x: Tensor, block: int) -> Tensor:
        return x.unflatten(1, (-1, block)).mean(2)

    names = {"torch": torch, "math": __import__("math"), "triton_bnhd_pool": mean}
    names["rearrange"] = lambda x, _: x.flatten(1, 2)
    exec(source, names)  # type: ignore[arg-type]
    query, key = heads(1, 2048, 4, 64), heads(1, 2048, 2, 64, seed=1)
    query[:, :, 0] *= 3
    key[:, 512:600] *= 2
    theirs = names["get_active_blocks"](query, key, None, 128, gamma, 1, 10**9, tau)  # type: ignore[operator]
    ours = keep_of(FlexPrefill(gamma=gamma, tau=tau, min_budget=1), query.transpose(1, 2), key.transpose(1, 2))
    for h in range(4):
        wanted = torch.zeros(256, dtype=torch.bool)
        wanted[theirs[0][h]] = True
        wanted = wanted.view(16, 16).tril()
        assert not (wanted & ~ours[0, h]).any()
        assert (ours[0, h] & ~wanted).sum() <= 1

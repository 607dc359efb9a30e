"""Quest and DELTA: what their papers say can be checked, and models that decode through them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from cpp_calls import fresh, poisoned
from stores import dequantised
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import effcompile as ec
from effcompile.kernels import ops, pages
from effcompile.kernels.block_ops import method_text
from effcompile.kernels.blocks import count_blocks
from effcompile.kernels.form import KVForm
from effcompile.passes import backend
from effcompile.passes.backend_options import parse
from effcompile.passes.delta import Delta
from effcompile.passes.paged_decode import PagedDecode
from effcompile.passes.quest import Quest
from effcompile.patterns.attention import find_attention
from effcompile.patterns.normalize import normalize

STORE = torch.ops.effcompile.kv_store.default
SELECT = torch.ops.effcompile.select_pages.default
SIZE, GROUPS, RATIO = 32, 2, 3


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """As ``generate`` decodes: with gradients wanted every site is left for that reason."""
    with torch.no_grad():
        yield


class Step:
    """A store of a prompt in which everything behind its length is NaN, and the query of its last token."""

    def __init__(self, form: KVForm, length: int, *, batch: int = 2, hidden: int = 0, key: Tensor | None = None,
                 query: Tensor | None = None) -> None:  # fmt: skip
        self.form, self.length, capacity = form, length, count_blocks(length + 100, form.group) * form.group
        self.key = fresh(batch, GROUPS, length, SIZE, torch.float32) if key is None else key
        self.query = fresh(batch, GROUPS * RATIO, 1, SIZE, torch.float32) if query is None else query
        self.state = poisoned(form, batch, GROUPS, capacity, (SIZE, SIZE), torch.float32)
        with ops.reference_only():
            STORE(*self.state, torch.tensor(0), self.key, self.key, form.name)
        self.mask = None
        if hidden:
            self.mask = torch.ones(batch, capacity, dtype=torch.bool)
            self.mask[0, :hidden] = False

    def mass(self, page: int) -> Tensor:
        """What attention to all keys says of pages."""
        args = (self.query, *self.state, torch.tensor(self.length), self.mask, page, self.form.name, SIZE**-0.5)
        with ops.reference_only():
            return torch.ops.effcompile.attend_mass(*args)[2]  # type: ignore[no-any-return]

    def select(self, method: PagedDecode) -> list[list[list[int]]]:
        """The pages that each head of each row is given."""
        method = method.for_store(self.form)
        text = method_text(method.name, dataclasses.asdict(method))
        listed, counts = SELECT(self.query, *self.state[:3], torch.tensor(self.length), self.mask, text, self.form.name,
                                SIZE**-0.5, mass=self.mass(method.page) if method.shared else None)  # fmt: skip
        assert listed.dtype == counts.dtype == torch.int32
        return [
            [row[:n].tolist() for row, n in zip(rows, ns, strict=True)] for rows, ns in zip(listed, counts, strict=True)
        ]

    def seen(self, page: int = 32) -> pages.Step:
        keys, length = ops.split_state(tuple(self.state))[0], torch.tensor(self.length)
        return pages.Step(self.query, keys, length, self.mask, self.form, SIZE**-0.5, self.mass(page))

    def logits(self) -> Tensor:
        """``[B, H, S]`` in fp64, hidden keys -inf."""
        keys, _ = ops.split_state(tuple(self.state))
        key = dequantised(keys, self.length, self.form, "key").repeat_interleave(RATIO, 1)
        scores = (self.query.double() @ key.mT)[:, :, 0] * SIZE**-0.5
        return scores if self.mask is None else scores.masked_fill(~self.mask[:, None, : self.length], -torch.inf)


PACKED = [KVForm(8, 8, 16, 32), KVForm(4, 4), KVForm(3, 2, 32, 0), KVForm(2, 4, 16, 16)]
METHODS: dict[str, Any] = {
    "quest": lambda budget: Quest(token_budget=budget, skip_layers=0),
    "delta": lambda budget: Delta(token_budget=budget, recency=48),
}


# Both.


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("form", PACKED, ids=lambda form: form.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 31, 200, 501, 1024])
def test_lists_have_the_budget_and_the_newest_tokens(method: str, form: KVForm, length: int) -> None:
    step, page = Step(form, length), max(16, form.group)
    made = METHODS[method](320)
    total = count_blocks(length, page)
    oldest = min(form.packed(length), length - 1) // page if method == "quest" else total - count_blocks(48, page)
    for row in step.select(made):
        assert len(row) == (GROUPS if method == "quest" else 1)
        for listed in row:
            assert listed == sorted(set(listed))
            assert len(listed) == min(320 // page, total)
            assert set(range(max(0, oldest), total)) <= set(listed)


@pytest.mark.parametrize("method", METHODS)
def test_rows_choose_as_if_alone_also_behind_padding(method: str) -> None:
    form = KVForm(4, 4, 16, 16)
    step = Step(form, 400, hidden=96)
    both, made = step.select(METHODS[method](128)), METHODS[method](128)
    alone = Step(form, 400, batch=1, key=step.key[1:], query=step.query[1:])
    assert alone.select(made) == both[1:]
    bare = Step(form, 304, batch=1, key=step.key[:1, :, 96:], query=step.query[:1])
    assert [[[page + 6 for page in head] for head in row] for row in bare.select(made)] == both[:1]
    hidden = Step(form, 400, hidden=390)
    assert all(head == [24] for head in hidden.select(made)[0])  # what no query may see is not listed


@pytest.mark.parametrize("method", METHODS)
def test_a_step_knows_nothing_of_others(method: str) -> None:
    """Neither of the step before, nor of a longer sequence that the store held before it."""
    form = KVForm(4, 4)
    made, step = METHODS[method](160), Step(form, 300)
    first = step.select(made)
    used = Step(form, 390)
    used.select(made)
    with ops.reference_only():
        STORE(*used.state, torch.tensor(0), step.key, step.key, form.name)
    used.length, used.query, used.key = 300, step.query, step.key
    assert used.select(made) == first
    scores = [made.for_store(form).scores(x.seen())[..., :10] for x in (used, step)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    before = [None if t is None else t.clone() for t in step.state]
    step.select(METHODS[method](256))
    assert all(a is None or torch.equal(a.isnan(), b.isnan()) for a, b in zip(before, step.state, strict=True))
    assert step.select(made) == first


def test_operators_keep_torchs_contract() -> None:
    step = Step(KVForm(4, 4), 300, hidden=50)
    for made in (Quest(token_budget=256, page_size=32), Delta(token_budget=256, page_size=32)):
        text = method_text(made.name, dataclasses.asdict(made))
        args = (step.query, *step.state[:3], torch.tensor(300), step.mask, text, step.form.name, 0.2)
        torch.library.opcheck(SELECT, args, {"mass": step.mass(32)})


# Quest.


@pytest.mark.parametrize("page", [1, 2, 3])
@pytest.mark.parametrize("form", PACKED, ids=lambda form: form.name)
def test_no_key_of_a_page_scores_more_than_its_bound(form: KVForm, page: int) -> None:
    """For the keys as they are read back; and it is the bound of their box, not a looser one."""
    step, page = Step(form, 777), page * form.group
    bound = pages.bounds(step.seen(), page).flatten(1, 2)
    logits, stop = step.logits(), form.packed(777) // page * page
    keys, _ = ops.split_state(tuple(step.state))
    key = dequantised(keys, 777, form, "key")[:, :, :stop].unflatten(2, (-1, page)).repeat_interleave(RATIO, 1)
    query = step.query.double().unsqueeze(3) * SIZE**-0.5
    box = torch.maximum(query * key.amin(3, keepdim=True), query * key.amax(3, keepdim=True))[:, :, :, 0].sum(-1)
    bound = bound[:, :, : stop // page].double()
    rounding = 1e-5 * bound.abs().max()
    assert (logits[:, :, :stop].unflatten(2, (-1, page)).amax(3) <= bound + rounding).all()
    # The ends of a group are codes 0 and 2^bits - 1, up to the rounding of its scale and zero.
    assert (bound - box).abs().max() <= (0.02 if form.key_bits == 8 else 1e-4) * bound.abs().max()


def test_quest_takes_the_pages_of_the_largest_bounds() -> None:
    """By a loop; of query heads that share keys, each bound relative to all ranked pages."""
    form = KVForm(4, 4, 16, 32)
    step = Step(form, 600)
    bound = pages.bounds(step.seen(), 16)
    stop = form.packed(600) // 16
    for b, row in enumerate(step.select(Quest(token_budget=256, sink=0))):
        for g, listed in enumerate(row):
            share = bound[b, g, :, :stop].double().log_softmax(-1).amax(0)
            best = sorted(range(stop), key=lambda i: (-share[i].item(), i))[: 16 - (38 - stop)]
            assert listed == sorted([*best, *range(stop, 38)])


def test_quest_keeps_a_needle() -> None:
    """A key that one query head seeks, in one page of many, and the other heads do not."""
    key, query = torch.randn(1, GROUPS, 1000, SIZE), 0.1 * torch.randn(1, GROUPS * RATIO, 1, SIZE)
    key[:, 0, 333, 0] += 20
    query[:, 1, :, 0] += 5
    first, _ = Step(KVForm(4, 4), 1000, batch=1, key=key, query=query).select(Quest(token_budget=224))[0]
    assert 333 // 32 in first
    assert len(first) == 7


def test_pages_that_cannot_be_ranked_are_kept() -> None:
    key = torch.randn(2, GROUPS, 1000, SIZE)
    key[0, 1, 70] = torch.nan
    found = Step(KVForm(4, 4), 1000, key=key).select(Quest(token_budget=224))
    assert 2 in found[0][1]
    assert all(len(listed) == 7 for row in found for listed in row)


# DELTA.


@pytest.mark.parametrize("form", [KVForm(16, 16), KVForm(4, 4)], ids=lambda form: form.name)
def test_mass_is_the_softmax_of_the_best_head(form: KVForm) -> None:
    step = Step(form, 333, hidden=100)
    weights = step.logits().softmax(-1)
    found = step.mass(16)
    for b in range(2):
        for page in range(count_blocks(333, 16)):
            tokens = range(page * 16, min(333, page * 16 + 16))
            assert abs(found[b, 0, page] - sum(weights[b, :, t].max() for t in tokens)) < 1e-5
    assert not found[:, :, 21:].any()
    assert ((found.sum(-1) > 1) & (found.sum(-1) < GROUPS * RATIO)).all()


def test_delta_takes_the_pages_of_the_largest_mass() -> None:
    step = Step(KVForm(16, 16), 600)
    mass = step.mass(16)[:, 0]
    for b, (listed,) in enumerate(step.select(Delta(token_budget=256, recency=64))):
        best = sorted(range(34), key=lambda i: (-mass[b, i].item(), i))[:12]
        assert listed == sorted([*best, 34, 35, 36, 37])


def test_equal_pages_give_the_earlier_ones() -> None:
    step = Step(KVForm(16, 16), 600, query=torch.zeros(2, GROUPS * RATIO, 1, SIZE))
    assert step.select(Delta(token_budget=160, recency=64)) == [[[0, 1, 2, 3, 4, 5, 34, 35, 36, 37]]] * 2


def test_delta_keeps_what_one_head_alone_looks_for() -> None:
    """The reason for the largest over heads: a mean would leave the needle behind pages that all heads like a little.

    One head gives most of its weight to one old token; the others look at some pages with small weights each.
    """
    key, query = 0.01 * torch.randn(1, GROUPS, 1000, SIZE), torch.zeros(1, GROUPS * RATIO, 1, SIZE)
    key[:, 0, 333, 0] += 20
    query[:, 1, :, 0] += 2.2
    key[:, :, 400:700, 1] += 20
    query[..., 1] += 2.2
    query[:, 1, :, 1] = 0
    step = Step(KVForm(16, 16), 1000, batch=1, key=key, query=query)
    weights = step.logits().softmax(-1)[0]
    assert weights[1, 333] > 0.6
    mean = torch.nn.functional.pad(weights.mean(0), (0, 8)).unflatten(0, (-1, 16)).sum(-1)
    made = Delta(token_budget=112, recency=16)
    assert mean.topk(6).indices.max() < 100
    assert 333 // 16 in step.select(made)[0][0]


def test_full_layers() -> None:
    assert Delta().full(28) == (0, 1, 2, 14, 22)
    assert Delta().full(30) == (0, 1, 2, 15, 23)
    assert Delta().full(4) == (0, 1, 2, 3)
    assert Delta().full(2) == (0, 1)
    assert Delta(full_cache_layers=(22, 0, 1)).full(28) == (0, 1, 22)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ec.quest(token_budget=0), "at least one token"),
        (lambda: ec.quest(page_size=24), "multiple of 16"),
        (lambda: ec.quest(skip_layers=-1), "0 or more"),
        (lambda: ec.delta(recency=0), "1 to token_budget=1024"),
        (lambda: ec.delta(recency=2048), "1 to token_budget=1024"),
        (lambda: ec.delta(full_cache_layers=(-1,)), "from 0 on"),
        (lambda: ec.delta(full_cache_layers=("0",)), "takes"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ec.OptionError, match=text):
        make()


# Models.

IDS = torch.randint(1, 60, (2, 333), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[0, :70] = 0
GREEDY = {"attention_mask": PADDED, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True,
          "return_dict_in_generate": True}  # fmt: skip


def llama(attention: str = "sdpa", layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"hidden_size": 96, "num_hidden_layers": layers, "intermediate_size": 64, "vocab_size": 60}
    config = LlamaConfig(**sizes, **heads, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # nearly uniform attention would hide a wrong list
    return model


def generated(*decorators: Any, layers: int = 4, **how: Any) -> tuple[Any, list[Any]]:
    """What a decorated model generates, and what was decided about its graph that decodes."""
    model = llama(layers=layers)
    for decorator in decorators:
        decorator(model)
    model.compile(backend="effcompile")
    out = model.generate(IDS, **{**GREEDY, **how})
    return out, [d for d in ec.inspect(model).decisions if dict(d.sizes)["T"] == 1]


@pytest.mark.slow
def test_a_budget_for_all_tokens_is_the_model(no_inductor: Any, no_fallback: None) -> None:
    """Less than the cache has room for, so that lists are made. Runs begin elsewhere, so logits are not bit for bit."""
    store = ec.compress_kv(residual=32)
    wanted, _ = generated(store, layers=3)
    budget = {"token_budget": 384, "min_length": 0}
    for name, method in {"delta": ec.delta(**budget, full_cache_layers=(0,)), "quest": ec.quest(**budget)}.items():
        found, decided = generated(store, method, layers=3)
        assert sum("attend_pages" in d.form for d in decided) == (2 if name == "delta" else 1)
        assert torch.equal(found.sequences, wanted.sequences)
        for ours, theirs in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


class ByHand:
    """DELTA in an eager model: dense attention with a mask of tokens, from the pages of the layers that select."""

    def __init__(self, full: tuple[int, ...], budget: int, recency: int) -> None:
        self.full, self.budget, self.recency = full, budget, recency
        self.pages: list[set[int]] = []

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
                 **_: Any) -> tuple[Tensor, None]:  # fmt: skip
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        layer, keys = module.layer_idx, key.shape[2]
        logits = query @ key.mT * scaling
        logits = logits.masked_fill(~(torch.ones(query.shape[2], keys).tril(keys - query.shape[2]).bool()), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if query.shape[2] == 1 and layer not in self.full:
            for row, listed in enumerate(self.pages):
                gone = torch.tensor([t // 16 not in listed for t in range(keys)])
                logits[row] = logits[row].masked_fill(gone, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0)
        if query.shape[2] == 1 and layer in self.full and layer + 1 not in self.full:
            best = weights[:, :, 0].amax(1)
            self.pages = [self.choose(row, mask[n, 0, 0]) for n, row in enumerate(best)]  # type: ignore[index]
        return (weights @ value).transpose(1, 2), None

    def choose(self, best: Tensor, seen: Tensor) -> set[int]:
        total = count_blocks(len(best), 16)
        there = [i for i in range(total) if seen[i * 16 : i * 16 + 16].any()]
        worth = {i: float(best[i * 16 : i * 16 + 16].sum()) for i in there}
        near = [i for i in there if i >= total - self.recency // 16]
        rest = sorted((i for i in there if i not in near), key=lambda i: (-worth[i], i))
        return {*near, *rest[: self.budget // 16 - len(near)]}


@pytest.fixture
def by_hand() -> Iterator[str]:
    AttentionInterface.register("delta_by_hand", ByHand((0, 2), 128, 32))
    AttentionMaskInterface.register("delta_by_hand", sdpa_mask)
    yield "delta_by_hand"
    del AttentionInterface._global_mapping["delta_by_hand"], AttentionMaskInterface._global_mapping["delta_by_hand"]


@pytest.mark.slow
def test_delta_is_what_its_description_says(by_hand: str, no_inductor: Any, no_fallback: None) -> None:
    """In a padded batch with grouped heads, over some tokens: an eager model that masks by hand."""
    wanted, dense = llama(by_hand).generate(IDS, **GREEDY), llama().generate(IDS, **GREEDY)
    method = ec.delta(token_budget=128, recency=32, full_cache_layers=(0, 2))
    found, _ = generated(ec.compress_kv(key_bits=16, value_bits=16), method)
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (found.logits[1] - dense.logits[1]).abs().max() > 1e-2


@pytest.fixture(scope="module")
def decoding() -> Any:
    """The graph in which a model decodes over a cache of 16 bits, with room for 512 tokens, as passes get it."""
    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(normalize(gm, inputs))
        return gm.forward

    model = ec.compress_kv(key_bits=16, value_bits=16)(llama())
    model.compile(backend=backend)
    model.generate(IDS, **{**GREEDY, "max_new_tokens": 2})
    return graphs[-1]


def decided_on(graph: Any, forms: str | list[str], **options: Any) -> list[dict[str, Any]]:
    """What is decided for each layer, by the method's name, if the stores have these forms."""
    made = copy.deepcopy(graph)
    loads = made.graph.find_nodes(op="call_function", target=torch.ops.effcompile.kv_load.default)
    for load, form in zip(loads, [forms] * len(loads) if isinstance(forms, str) else forms, strict=True):
        load.update_arg(7, form)
    methods = {k: v if k == "rules" else {"min_length": 0, **v} for k, v in options.items()}
    decisions, _ = backend._rewrite(made, parse(methods), find_attention(made))
    made.graph.lint()
    name = next(iter(options))
    return [
        {"compress_kv" if d.rule.startswith("decorator") else name: d for d in decisions if d.site == layer}
        for layer in range(len(loads))
    ]


P, W = "k4v4g32r32", "k16v16g32r32"
REASONS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "budget": (P, "quest", {"token_budget": 512}, ["budget-covers-cache"] * 4),
    "tail": (P, "quest", {"token_budget": 96}, ["dense-layer"] * 2 + ["budget-too-small"] * 2),
    "just enough": (P, "quest", {"token_budget": 160}, ["dense-layer"] * 2 + [""] * 2),
    "16 bits": (W, "quest", {"token_budget": 256, "skip_layers": 0}, ["no-page-bounds"] * 4),
    "per token": (f"{P}kt", "quest", {"token_budget": 256, "skip_layers": 3}, ["dense-layer"] * 3 + ["no-page-bounds"]),
    "fp8": ("kfp8v4g32r32", "quest", {"token_budget": 256, "skip_layers": 0}, ["no-page-bounds"] * 4),
    "page": (P, "delta", {"token_budget": 256, "page_size": 48}, ["page-size"] * 4),
    "few layers": (W, "delta", {"token_budget": 256}, ["dense-layer"] * 4),
    "no such": (W, "delta", {"token_budget": 256, "full_cache_layers": (0, 4)}, ["no-such-layer"] * 4),
    "none before": (W, "delta", {"token_budget": 256, "full_cache_layers": (1,)}, ["no-selection", "", "", ""]),
    "two in a row": (W, "delta", {"token_budget": 256, "full_cache_layers": (0, 1)}, ["dense-layer", "", "", ""]),
    "last": (W, "delta", {"token_budget": 256, "full_cache_layers": (0, 3)}, ["", "", "", "dense-layer"]),
    "short": (W, "delta", {"token_budget": 256, "min_length": None}, ["short-cache"] * 4),
    "long enough": (P, "quest", {"token_budget": 256, "min_length": 512}, ["dense-layer"] * 2 + [""] * 2),
    "nothing selects": (W, "delta", {"token_budget": 256, "full_cache_layers": ()}, ["no-selection"] * 4),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_a_layer_reads_everything(name: str, decoding: Any) -> None:
    """By layer; '' where it does not. Such a layer attends to the whole cache as without the method."""
    form, method, options, wanted = REASONS[name]
    for layer, code in zip(decided_on(decoding, form, **{method: options}), wanted, strict=True):
        made = layer[method]
        assert (made.reason.code if made.reason else "") == code
        assert layer["compress_kv"].form.startswith("attend_decode") if code else made.form.startswith(method)
        assert not code or made.reason.source.count("modeling_llama.py")


def test_the_report_counts_the_tokens_of_the_budget(decoding: Any) -> None:
    """Of 512 tokens 128: keys and values of 2 heads of 32 in fp32, and what there is besides, once each."""
    found = decided_on(decoding, W, delta={"token_budget": 128, "full_cache_layers": (0,)})
    everything, some = (layer["delta"].bytes_after for layer in found[:2])
    a_token = 2 * 2 * 2 * 32 * 4 + 2  # of both rows, which have a mask each
    assert everything - some == (512 - 128) * a_token


def test_keys_before_rope_have_no_bounds(decoding: Any) -> None:
    site, form = find_attention(decoding)[0], KVForm.parse(f"{P}pre")
    made = Quest(token_budget=256, skip_layers=0).for_store(form).serve(site, site.load, form)
    assert made.code == "no-page-bounds"


def test_the_nearest_earlier_layer_selects(decoding: Any) -> None:
    """And only one with the same options: a rule that changes them for a layer leaves that layer without a list."""
    made = copy.deepcopy(decoding)
    choice = {"token_budget": 256, "min_length": 0, "full_cache_layers": (0, 2)}
    backend._rewrite(made, parse({"delta": choice}), find_attention(made))
    lists = made.graph.find_nodes(op="call_function", target=SELECT)
    readers = made.graph.find_nodes(op="call_function", target=torch.ops.effcompile.attend_pages.default)
    assert [[n.args[0] for n in (r.args[9], r.args[10])] for r in readers] == [[made_by, made_by] for made_by in lists]
    rules = {"rules": {"model.layers.3": {"delta": {**choice, "token_budget": 128}}}}
    last = decided_on(decoding, W, delta=choice, **rules)[3]["delta"]
    assert last.reason.code == "no-selection"


@pytest.mark.parametrize(("page", "codes"), [(32, [""] * 4), (None, ["", "page-size", "page-size", ""])])
def test_a_list_serves_stores_of_other_forms(decoding: Any, page: int | None, codes: list[str]) -> None:
    """A layer in few bits reads the pages that one in 16 bits chose, if they hold whole groups of it."""
    choice = {"token_budget": 256, "full_cache_layers": (0,), "page_size": page}
    found = decided_on(decoding, [W, P, "k8v4g32r0", W], delta=choice)
    assert [layer["delta"].reason.code if layer["delta"].reason else "" for layer in found] == codes


@pytest.mark.slow
def test_without_a_cache_or_in_a_prompt(no_inductor: Any) -> None:
    model = ec.quest()(llama(layers=1))
    model.compile(backend="effcompile")
    model(IDS[:1, :9], use_cache=False)
    assert {d.reason.code for d in ec.inspect(model).decisions} == {"no-compressed-cache"}
    cache = ec.Cache(model, capacity=2048)
    for tokens in (9, 3):
        model(IDS[:1, :tokens], past_key_values=cache)
    mine = [d for d in ec.inspect(model).decisions if "quest" in str(d.reason)]
    assert [d.reason.code for d in mine if d.reason] == ["prompt"] * 2


def test_scores_that_are_changed_are_left(no_inductor: Any) -> None:
    model = ARCHITECTURES["bloom"].make()
    ec.compress_kv(key_bits=16, value_bits=16)(ec.delta(token_budget=64, recency=16, full_cache_layers=(0,))(model))
    model.compile(backend="effcompile")
    model.generate(IDS[:1, :200], max_new_tokens=2, do_sample=False)
    codes = [d.reason.code for d in ec.inspect(model).decisions if dict(d.sizes)["T"] == 1 and d.reason]
    assert "not-supported" in codes

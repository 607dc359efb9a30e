"""A cache of keys before RoPE: against the model, compiled, between calls, and where it must refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from test_lifecycle import hybrid
from test_rope import GREEDY, IDS, PRE, model_of

import effcompile as ec
from effcompile.kernels import cost
from effcompile.kernels.form import KVForm
from effcompile.runtime.cache import CacheError

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


# --- a cache ----------------------------------------------------------------------------------------------------------


def padded(count, hidden=21):
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[0, :hidden] = 0
    return mask


def loaded(cache):
    """Everything in a cache, read densely."""
    found = []
    for layer in cache.compressed:
        table = {} if layer.angles is None else {"table": cache.angles.table}
        found += torch.ops.effcompile.kv_load(*layer.state, cache.length, layer.form_name, **table)
    return found


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def fill(model, cache, count, at=0, rows=IDS):
    """Read ``count`` tokens into a cache as a call of the model does; the first row is padded on the left."""
    mask = padded(at + count).index_select(0, torch.zeros(len(rows), dtype=torch.int64))
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, at:]
    positions = positions + torch.arange(len(rows))[:, None]
    with torch.no_grad():
        model(rows[:, at : at + count], attention_mask=mask, position_ids=positions, past_key_values=cache)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "cohere", "glm", "yarn"])
def test_nothing_packed_is_the_model_itself(name):
    """A residual larger than the text: the table is kept and no key is packed."""
    model = model_of(name)
    expected = model.generate(IDS, attention_mask=padded(300), **GREEDY)
    ec.compress_kv(**PRE | {"residual": 512})(model)
    assert torch.equal(model.generate(IDS, attention_mask=padded(300), **GREEDY), expected)


def test_layers_with_a_window_and_beams():
    """Layers that transformers caches are no matter of ours, and beams repeat and reorder the rows of the table."""
    model = hybrid()
    expected = model.generate(IDS, num_beams=3, **GREEDY)
    ec.compress_kv(**PRE | {"residual": 512})(model)
    assert torch.equal(model.generate(IDS, num_beams=3, **GREEDY), expected)
    cache = ec.Cache(model, **PRE)
    assert [getattr(layer, "angles", None) is cache.angles for layer in cache.layers] == [False, True, False, True]
    assert cache.angles.first == 1


@pytest.mark.parametrize("name", ["llama", "neox", "cohere", "yarn"])
def test_eight_bits_are_near_the_model(name):
    """All packed but the newest: a rotation by wrong angles would not be near anything."""
    model = model_of(name)
    kwargs = {"attention_mask": padded(300), "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    expected = torch.stack(model.generate(IDS, **kwargs).logits)
    got = {}
    for how in ("post", "pre"):
        ec.compress_kv(key_bits=8, value_bits=8, residual=0, rope=how)(model)
        got[how] = torch.stack(model.generate(IDS, **kwargs).logits)
    # The first token comes from a first call, which packs nothing that it reads.
    error = {how: float((x[:2] - expected[:2]).abs().max()) for how, x in got.items()}
    assert error["pre"] <= 3 * error["post"] + 1e-3
    assert not torch.equal(got["pre"], got["post"])


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "cohere"])
def test_compiled_generates_as_eager(name, no_inductor):
    model = model_of(name)
    ec.compress_kv(**PRE)(model)
    expected = model.generate(IDS, attention_mask=padded(300), **GREEDY)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(IDS, attention_mask=padded(300), **GREEDY), expected)
    rewritten = [d for d in ec.inspect(model).decisions if d.action == "rewritten" and "decode" in d.form]
    rotation = "_rot8" if name == "neox" else f"_rot{64 if name == 'qwen3' else 32}"
    assert len(rewritten) == 2
    assert all("pre" in d.form and d.form.endswith(rotation) for d in rewritten)


def test_one_decode_graph_and_no_recompiles(no_inductor):
    from torch._dynamo.utils import counters

    model = ec.compress_kv(**PRE)(model_of("llama"))
    model.compile(backend="effcompile", fullgraph=True)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        model.generate(IDS, **GREEDY)
    assert len(no_inductor) == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.generate(IDS, **GREEDY | {"max_new_tokens": 40})
    assert len(no_inductor) == 2
    assert not counters["graph_break"]
    stores = [n for n in no_inductor[-1].graph.nodes if "rope_store" in str(n.target)]
    assert len(stores) == 1, "the table is written once for all layers"


@pytest.mark.slow
def test_through_inductor():
    """The table is an input that the graph writes to once and then reads: nothing may be moved across."""
    model = ec.compress_kv(**PRE)(model_of("llama"))
    expected = model.generate(IDS, attention_mask=padded(300), **GREEDY | {"max_new_tokens": 40})
    model.compile(backend="effcompile")
    got = model.generate(IDS, attention_mask=padded(300), **GREEDY | {"max_new_tokens": 40})
    assert torch.equal(got, expected)


def test_rows_are_repeated_selected_and_reordered():
    model = model_of("llama")
    cache = ec.Cache(model, 512, **PRE)
    fill(model, cache, 150)
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([3, 0])), [1, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [0, 0]),
    ):
        change(cache)
        afresh = ec.Cache(model, 512, **PRE)
        fill(model, afresh, 150)
        afresh.batch_select_indices(torch.tensor(rows))
        assert equal(loaded(cache), loaded(afresh))
        assert torch.equal(cache.angles.table, afresh.angles.table)
        assert cache.angles.table._dynamo_static_input_type == "unguarded"
        assert cache.nbytes == afresh.nbytes
    single = ec.Cache(model, 512, **PRE)
    mask = padded(150)[:1]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(IDS[:1, :150], attention_mask=mask, position_ids=positions, past_key_values=single)
    for ours, theirs in zip(loaded(cache), loaded(single)):
        # Rows of another batch size: products are summed in another order before they are quantised.
        step = float(theirs.abs().max()) / 3
        assert float((ours[:1] - theirs).abs().mean()) < 0.01 * step


@pytest.mark.parametrize("count", [9, 60])
def test_removed_tokens_were_never_there(count):
    """With a record also over packed groups; what comes next is rotated back by its own angles."""
    model = model_of("llama")
    cache, afresh = ec.Cache(model, 512, **PRE), ec.Cache(model, 512, **PRE)
    fill(model, cache, 150)
    cache.activate_past_recording()
    fill(model, cache, count, at=150)
    cache.crop(-count)
    fill(model, afresh, 150)
    assert equal(loaded(cache), loaded(afresh))
    for each in (cache, afresh):
        fill(model, each, 70, at=150)
    assert equal(loaded(cache), loaded(afresh))


def test_copies_and_growth():
    model = model_of("llama")
    cache, large = ec.Cache(model, **PRE), ec.Cache(model, 1024, **PRE)
    rows = torch.cat([IDS, IDS], 1)
    for each in (cache, large):
        fill(model, each, 500, rows=rows)
    other = copy.deepcopy(cache)
    assert other.angles is not cache.angles
    assert all(layer.angles is other.angles for layer in other.compressed)
    before = [x.clone() for x in loaded(other)]
    for each in (cache, large):
        fill(model, each, 40, at=500, rows=rows)
    assert cache.capacity == 1024
    assert equal(loaded(cache), loaded(large))
    assert equal(loaded(other), before)
    fill(model, other, 40, at=500, rows=rows)
    assert equal(loaded(other), loaded(cache))


def test_a_reset_cache_takes_another_batch():
    model = model_of("llama")
    cache, afresh = ec.Cache(model, 512, **PRE), ec.Cache(model, 512, **PRE)
    fill(model, cache, 150)
    cache.reset()
    three = torch.cat([IDS, IDS[:1] + 1])
    for each in (cache, afresh):
        fill(model, each, 100, rows=three)
    assert equal(loaded(cache), loaded(afresh))
    assert cache.angles.table.shape[0] == 3


def test_bytes_are_the_allocated_ones():
    model = model_of("neox")
    cache = ec.Cache(model, 512, batch_size=3, **PRE)
    allocated = sum(b.untyped_storage().nbytes() for layer in cache.compressed for b in layer.buffers()) + 8
    table = cache.angles.table.untyped_storage().nbytes()
    assert table == 3 * 512 * 8 * 2 == cost.at(cost.table(8), B=3, C=512)
    assert cache.nbytes == allocated + table


def test_cost_of_the_angles():
    from effcompile.kernels.program import Predicate

    sizes = {"B": 2, "H": 6, "G": 2, "T": 1, "S": 300, "C": 512, "D": 64, "E": 64}
    pre, post = (KVForm(2, 2, 32, 32, rope=how) for how in ("pre", "post"))
    for ours, theirs in (
        (cost.attend(pre, Predicate(), 4, 16), cost.attend(post, Predicate(), 4)),
        (cost.unfused(pre, 4, 1, 16), cost.unfused(post, 4)),
    ):
        ours, theirs = ours.at(**sizes), theirs.at(**sizes)
        packed = pre.packed(300)
        assert ours.bytes - theirs.bytes == 2 * packed * 16 * 2
        assert ours.flops - theirs.flops == 2 * 2 * packed * 16 * 3
    wide = sizes | {"T": 290}
    ours, theirs = cost.store(pre, 4, 16).at(**wide), cost.store(post, 4).at(**wide)
    assert ours.bytes - theirs.bytes == 2 * packed * 16 * 2


def test_the_report_counts_the_table_once(no_inductor):
    model = ec.compress_kv(**PRE)(model_of("llama"))
    model.compile(backend="effcompile")
    with torch.no_grad():
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    decode = [d for d in ec.inspect(model).decisions if "decode" in d.form]
    assert sum(d.cache[0] for d in decode) + decode[0].table_bytes + 8 == cache.nbytes


# --- errors -----------------------------------------------------------------------------------------------------------


def test_angles_of_one_call_never_serve_another():
    model = model_of("llama")
    cache = ec.Cache(model, 512, **PRE)
    fill(model, cache, 100)
    assert all(layer.given is None for layer in cache.compressed)
    before = [x.clone() for x in loaded(cache)]
    key = torch.randn(2, 2, 1, 32)
    with pytest.raises(CacheError, match=r"layer 0: no cos and sin .* rope='post'"):
        cache.update(key, key, 0)
    assert equal(loaded(cache), before)
    # A call that fails between the hook and the store leaves nothing behind for the next.
    cache.compressed[0].given = (torch.ones(1, 1, 32), torch.zeros(1, 1, 32))
    cache.prepare(2, 1, torch.float32)
    assert cache.compressed[0].given is None


def test_after_remove_the_hooks_are_gone_and_the_cache_says_so():
    model = ec.compress_kv(**PRE)(model_of("llama"))
    cache = ec.Cache(model, 512, **PRE)
    assert all(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    ec.remove(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad(), pytest.raises(CacheError, match=r"after ec.remove"):
        model(IDS, past_key_values=cache)
    assert not any(b.any() for layer in cache.compressed for b in layer.buffers())


def test_a_copy_of_a_decorated_model_has_hooks_of_its_own():
    model = ec.compress_kv(**PRE)(model_of("llama"))
    expected = model.generate(IDS, **GREEDY)
    other = copy.deepcopy(model)
    ec.remove(model)
    assert torch.equal(other.generate(IDS, **GREEDY), expected)
    ec.remove(other)
    assert not any(m._forward_pre_hooks for m in other.modules())


def test_angles_of_another_shape_are_refused():
    model = model_of("llama")
    cache = ec.Cache(model, 512, **PRE)
    key = torch.randn(2, 2, 3, 32)
    for shape in ((1, 4, 32), (3, 3, 32), (1, 3, 16)):
        cache.compressed[0].given = (torch.ones(shape), torch.zeros(shape))
        with pytest.raises(CacheError, match="cos and sin have shapes"):
            cache.update(key, key, 0)

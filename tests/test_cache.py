"""The cache and the hooks that hand it to a model, eagerly: what is stored, what is refused, what is left alone."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

import effcompile as ec
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError
from effcompile.runtime.cache import CacheError, GradientError, bucket
from models import MODELS

IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def llama():
    return MODELS["llama"]("sdpa")


pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


def rows_of_forward(model, ids, chunks, **kwargs):
    """Logits of ``ids`` given in chunks on one cache."""
    cache, out, at = kwargs.pop("past_key_values", None), [], 0
    with torch.no_grad():
        for count in chunks:
            result = model(ids[:, at : at + count], past_key_values=cache, use_cache=True, **kwargs)
            cache, at = result.past_key_values, at + count
            out.append(result.logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_generate_as_without(name):
    model = MODELS[name]("sdpa")
    plain = model.generate(IDS, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    out = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, ec.Cache)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_left_padding_generates_as_without(name):
    model = MODELS[name]("sdpa")
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    plain = model.generate(IDS, attention_mask=mask, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY), plain)


def test_forward_makes_the_cache_and_a_given_one_wins(llama):
    ec.compress_kv(key_bits=8, value_bits=4)(llama)
    with torch.no_grad():
        made = llama(IDS).past_key_values
        assert isinstance(made, ec.Cache)
        assert {layer.form_name for layer in made.compressed} == {"k8v4g32r128"}
        own = DynamicCache(config=llama.config)
        assert llama(IDS, past_key_values=own).past_key_values is own
        mine = ec.Cache(llama, 1024, key_bits=4, value_bits=8)
        assert llama(IDS, past_key_values=mine).past_key_values is mine
        assert llama(IDS, use_cache=False).past_key_values is None
        # The decorator decides the form also of a cache that the user makes: it stands on the model itself.
        assert mine.compressed[0].form_name == "k8v4g32r128"


def test_forms_by_layer_deepest_wins(llama):
    ec.compress_kv(key_bits=4, value_bits=4)(llama)
    ec.compress_kv(key_bits=8, value_bits=8)(llama.model.layers[1])
    ec.compress_kv(key_bits=16, value_bits=8)(llama.model.layers[1].self_attn)
    assert [layer.form_name for layer in ec.Cache(llama).compressed] == ["k4v4g32r128", "k16v8g32r128"]


def test_chunks_equal_one_by_one_exactly_in_the_store(llama):
    """The store is a pure function of keys and values; these come from 16-bit attention, so only rounding differs."""
    ec.compress_kv(key_bits=16, value_bits=16)(llama)
    whole, _ = rows_of_forward(llama, IDS, [300])
    for chunks in ([1] * 5 + [295], [100, 100, 100], [299, 1]):
        parts, cache = rows_of_forward(llama, IDS, chunks)
        assert cache.tokens == 300
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=2e-5)


def test_two_turns_and_reset_on_one_cache(llama):
    plain = llama.generate(IDS, **GREEDY)
    longer = torch.cat([plain, IDS[:, :50]], 1)
    expected = llama.generate(longer, **GREEDY)
    cache = ec.Cache(llama, key_bits=16, value_bits=16)
    assert torch.equal(llama.generate(IDS, past_key_values=cache, **GREEDY), plain)
    assert torch.equal(llama.generate(longer, past_key_values=cache, **GREEDY), expected)
    addresses = [b.data_ptr() for layer in cache.compressed for b in layer.buffers()]
    cache.reset()
    assert cache.tokens == 0
    assert torch.equal(llama.generate(IDS, past_key_values=cache, **GREEDY), plain)
    assert [b.data_ptr() for layer in cache.compressed for b in layer.buffers()] == addresses


def test_capacity_buckets():
    assert [bucket(n) for n in (0, 1, 512, 513, 8192, 8193, 20000)] == [512, 512, 512, 1024, 8192, 16384, 32768]


def test_capacity_exceeded_is_refused_before_anything_is_written(llama):
    cache = ec.Cache(llama, 512)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        before = [b.clone() for layer in cache.compressed for b in layer.buffers()]
        with pytest.raises(CapacityError, match="capacity is 512"):
            llama(IDS, past_key_values=cache)
    assert cache.tokens == 300
    assert all(torch.equal(a, b) for a, b in zip(before, [b for la in cache.compressed for b in la.buffers()]))


def test_without_a_capacity_it_grows_and_keeps_everything(llama):
    growing, fixed = ec.Cache(llama), ec.Cache(llama, 2048)
    for cache in (growing, fixed):
        out, _ = rows_of_forward(llama, torch.cat([IDS, IDS, IDS], 1), [300, 300, 300], past_key_values=cache)
    assert growing.capacity == 1024
    again, _ = rows_of_forward(llama, torch.cat([IDS, IDS, IDS], 1), [300, 300, 300], past_key_values=ec.Cache(llama))
    assert torch.equal(out, again)


def test_bytes_are_those_of_the_buffers(llama):
    with torch.no_grad():
        cache = llama(IDS, past_key_values=ec.Cache(llama, 1024, key_bits=8, value_bits=4)).past_key_values
    form = KVForm(8, 4)
    assert cache.nbytes == 2 * form.nbytes(2, 2, 1024, 32, 32, torch.float32) + 8
    storages = {
        b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for la in cache.compressed for b in la.buffers()
    }
    assert cache.nbytes == sum(storages.values()) + 8, "two buffers share a storage, or bytes are not counted"


def test_another_models_cache(llama):
    other = MODELS["llama"]("sdpa")
    with torch.no_grad(), pytest.raises(CacheError, match="another model"):
        llama(IDS, past_key_values=ec.Cache(other), use_cache=True) if ec.compress_kv()(llama) else None


def test_changed_batch(llama):
    ec.compress_kv()(llama)
    with torch.no_grad():
        cache = llama(IDS).past_key_values
        with pytest.raises(CacheError, match="batch of 2 and this call has 1"):
            llama(IDS[:1], past_key_values=cache)
        cache.reset()
        assert llama(IDS[:1], past_key_values=cache).past_key_values.tokens == 300


def test_changed_dtype(llama):
    ec.compress_kv()(llama)
    with torch.no_grad():
        cache = llama(IDS).past_key_values
        llama.bfloat16()
        with pytest.raises(CacheError, match=r"float32 and the model gives keys in torch\.bfloat16"):
            llama(IDS, past_key_values=cache)


def test_gradients_keep_the_models_cache_and_say_so(llama):
    ec.compress_kv()(llama)
    with pytest.warns(UserWarning, match="gradients are enabled"):
        out = llama(IDS)
    assert not isinstance(out.past_key_values, ec.Cache)
    out.logits.sum().backward()
    with pytest.raises(GradientError, match="layer 0"):
        llama(IDS, past_key_values=ec.Cache(llama))


def test_bits_not_offered_name_the_choices(llama):
    with pytest.raises(ValueError, match="16, 8, 4, 3, 2"):
        ec.compress_kv(key_bits=5)
    with pytest.raises(ValueError, match="16, 8, 4, 3, 2"):
        ec.Cache(llama, value_bits=1)
    with pytest.raises(CacheError, match="capacity=0"):
        ec.Cache(llama, 0)


def test_deepcopy_uses_its_own_weights_and_remove_undoes(llama):
    signature = inspect.signature(llama.forward)
    ec.compress_kv()(llama)
    assert inspect.signature(llama.forward) == signature
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        out = twin(IDS)
        assert (out.logits == 0).all()
        assert isinstance(out.past_key_values, ec.Cache)
        assert out.past_key_values.belongs_to(twin)
        ec.remove(twin)
        assert not isinstance(twin(IDS).past_key_values, ec.Cache)
        assert isinstance(llama(IDS).past_key_values, ec.Cache), "undoing the copy reached the original"
    ec.remove(llama)
    assert "forward" not in vars(llama)
    assert not llama._forward_pre_hooks
    assert "generate" not in vars(llama)
    assert "_prepare_cache_for_generation" not in vars(llama)


def test_sliding_layers_keep_their_own_cache():
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, use_sliding_window=True, sliding_window=64, max_window_layers=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    plain = model.generate(IDS, **GREEDY)
    cache = ec.Cache(model, key_bits=16, value_bits=16)
    assert [type(layer).__name__ for layer in cache.layers] == ["CompressedLayer"] * 2 + [
        "StaticSlidingWindowLayer"
    ] * 2
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), plain)


def test_beams_reorder_the_store(llama):
    plain = llama.generate(IDS, num_beams=3, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(llama)
    assert torch.equal(llama.generate(IDS, num_beams=3, **GREEDY), plain)


def test_eager_generate_is_told_once(llama):
    ec.compress_kv()(llama)
    with pytest.warns(UserWarning, match=r"model\.compile\(backend"):
        llama.generate(IDS, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.generate(IDS, **GREEDY)


def test_a_call_that_failed_half_way_is_not_continued(llama):
    ec.compress_kv()(llama)
    with torch.no_grad():
        whole = llama(IDS).logits
        cache = ec.Cache(llama, 1024)
        handle = llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(IDS, past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheError, match="half way"):
            llama(IDS, past_key_values=cache)
        cache.reset()
        assert torch.equal(llama(IDS, past_key_values=cache).logits, whole)


def test_a_call_that_failed_before_the_first_layer_changes_nothing(llama):
    ec.compress_kv()(llama)
    with torch.no_grad():
        cache = ec.Cache(llama, 1024)
        with pytest.raises(IndexError):
            llama(IDS + 1000, past_key_values=cache)
        assert torch.equal(llama(IDS, past_key_values=cache).logits, llama(IDS).logits)


def test_a_sliding_window_longer_than_the_first_capacity_is_kept():
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, use_sliding_window=True, sliding_window=700, max_window_layers=1,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.cat([IDS, IDS, IDS], 1)
    plain, _ = rows_of_forward(model, ids, [600, 1, 200])
    ours, _ = rows_of_forward(model, ids, [600, 1, 200], past_key_values=ec.Cache(model, key_bits=16, value_bits=16))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["T5", "GPTNeo"])
@pytest.mark.parametrize("how", ["a cache of one's own", "decorated"])
def test_models_that_cannot_use_a_fixed_cache_are_refused(kind, how):
    import transformers

    if kind == "T5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=128)
        model = transformers.T5ForConditionalGeneration(config).eval()
    else:
        config = transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, vocab_size=128, attention_types=[[["global", "local"], 1]]
        )
        model = transformers.GPTNeoForCausalLM(config).eval()
    inputs = {"input_ids": IDS}
    if kind == "T5":
        inputs = {"encoder_outputs": (torch.zeros(2, 5, 32),), "decoder_input_ids": IDS}
    use = ec.Cache if how != "decorated" else lambda m: ec.compress_kv()(m)(**inputs)
    with torch.no_grad(), pytest.raises(CacheError, match=r"encoder-decoder|fixed size"):
        use(model)


def test_opt_with_a_mask_and_no_positions_is_refused_where_it_would_be_wrong():
    model = ec.compress_kv(key_bits=16, value_bits=16)(MODELS["opt"]("sdpa"))
    mask = torch.ones(2, 41, dtype=torch.long)
    with torch.no_grad():
        cache = model(IDS[:, :40], attention_mask=mask[:, :40]).past_key_values
        with pytest.raises(CacheError, match="position_ids"):
            model(IDS[:, 40:41], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("outer", [True, False], ids=["model", "inner model"])
def test_a_failed_call_is_noticed_whichever_model_was_called(llama, outer):
    """The model within may be called by itself: its calls are counted, and a failed one is not continued."""
    ec.compress_kv()(llama)
    with torch.no_grad():
        cache = ec.Cache(llama, 512)
        llama.model(IDS[:, :200], past_key_values=cache)
        handle = llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (llama if outer else llama.model)(IDS[:, :9], past_key_values=cache)
        handle.remove()
        for model in (llama.model, llama):
            with pytest.raises(CacheError, match="half way"):
                model(IDS[:, :9], past_key_values=cache)
        cache.reset()
        llama.model(IDS, past_key_values=cache)
        with pytest.raises(CapacityError, match="300 tokens are cached and 300 more"):
            llama.model(IDS, past_key_values=cache)


def test_the_model_within_gets_the_same_care(llama):
    """Padding, positions and the store of ``model.model`` are those of the whole model's call."""
    ec.compress_kv(key_bits=8, value_bits=4)(llama)
    mask = torch.ones_like(IDS)
    mask[0, :37] = 0
    caches = [ec.Cache(llama, 512), ec.Cache(llama, 512)]
    with torch.no_grad():
        for at in (slice(0, 280), slice(280, 281), slice(281, 300)):
            seen = mask[:, : at.stop]
            whole = llama(IDS[:, at], attention_mask=seen, past_key_values=caches[0]).logits
            inner = llama.model(IDS[:, at], attention_mask=seen, past_key_values=caches[1]).last_hidden_state
            assert torch.equal(llama.lm_head(inner), whole)
    for one, other in zip(*(cache.compressed for cache in caches)):
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers()))


def test_an_update_without_a_hook_is_counted(llama):
    cache = ec.Cache(llama, 512)
    keys = torch.randn(2, 2, 500, 32)
    for index in range(2):
        cache.update(keys, keys, index)
    assert cache.tokens == 500
    with torch.no_grad(), pytest.raises(CapacityError, match="500 tokens are cached"):
        llama(IDS, past_key_values=cache)

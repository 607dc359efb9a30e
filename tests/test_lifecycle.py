"""What happens to a cache between calls: another batch, removed tokens, copies, layers that are not ours.

The oracle is always another way to the same state: a store that was filled afresh, or the model without compression.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import effcompile as ec
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError
from effcompile.runtime.cache import CacheError
from models import MODELS

IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
SHORT = {"group_size": 32, "residual": 32}


@pytest.fixture
def llama():
    return MODELS["llama"]("sdpa")


pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


def hybrid(window=48):
    """Sliding and full layers in turn, the sliding one first."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=128, sliding_window=window, max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def buffers(cache):
    return [buffer for layer in cache.compressed for buffer in layer.buffers()]


def loaded(cache):
    """Everything in a cache, read densely: keys and values of each layer, ``[B, G, C, D]``."""
    return [
        x
        for layer in cache.compressed
        for x in torch.ops.effcompile.kv_load(*layer.state, cache.length, layer.form_name)
    ]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def fill(cache, keys, at=0):
    """Append random keys ``[B, G, T, D]`` to every layer, other ones to each, as a call of a model would."""
    cache.prepare(keys.shape[0], keys.shape[2], keys.dtype)
    for index in range(len(cache.layers)):
        cache.update(keys * (index + 1), keys - index, index)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(4, 4), (8, 16), (16, 16)])
def test_repeated_and_selected_rows_are_those_that_were_stored(llama, bits):
    """Codes and all: the buffers equal those of a cache that was given the repeated keys from the start."""
    options = {"key_bits": bits[0], "value_bits": bits[1], **SHORT}
    keys = torch.randn(2, 2, 150, 32)
    cache, afresh = ec.Cache(llama, 512, **options), ec.Cache(llama, 512, **options)
    fill(cache, keys)
    cache.batch_repeat_interleave(3)
    fill(afresh, keys.repeat_interleave(3, 0))
    assert equal(buffers(cache), buffers(afresh))
    cache.batch_select_indices(torch.tensor([5, 0, -2]))
    rows = keys.repeat_interleave(3, 0)[[5, 0, 4]]
    afresh = ec.Cache(llama, 512, **options)
    fill(afresh, rows)
    assert equal(buffers(cache), buffers(afresh))
    assert cache.tokens == 150
    assert cache.nbytes == afresh.nbytes
    assert all(b.is_contiguous() and b._dynamo_static_input_type == "unguarded" for b in buffers(cache))
    # What comes next packs on from there.
    for each in (cache, afresh):
        fill(each, rows[:, :, :77] + 1)
    assert equal(buffers(cache), buffers(afresh))


def test_a_bool_mask_selects_rows(llama):
    cache, afresh = ec.Cache(llama, 512), ec.Cache(llama, 512)
    keys = torch.randn(3, 2, 40, 32)
    fill(cache, keys)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    fill(afresh, keys[[0, 2]])
    assert equal(buffers(cache), buffers(afresh))


def test_one_prompt_read_once_serves_several_continuations(llama):
    prompt = IDS[:1, :200]
    expected = llama.generate(prompt.expand(4, -1), num_beams=4, **GREEDY)
    cache = ec.Cache(llama, 512, key_bits=16, value_bits=16)
    with torch.no_grad():
        llama(prompt[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(4)
    assert torch.equal(llama.generate(prompt, past_key_values=cache, num_beams=4, **GREEDY), expected[:1])


def test_after_a_change_the_new_batch_is_checked(llama):
    cache = ec.Cache(llama, 512)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(CacheError, match=r"batch of 4 and this call has 2; .*batch_repeat_interleave"):
            llama(IDS[:, :1], past_key_values=cache)
        assert llama(IDS[:, :1].repeat(2, 1), past_key_values=cache).past_key_values.tokens == 301


@pytest.mark.parametrize("repeats", [0, -1, 2.0, True])
def test_repeats_that_are_no_count_are_refused(llama, repeats):
    with pytest.raises(CacheError, match="positive number of repeats"):
        ec.Cache(llama, 512).batch_repeat_interleave(repeats)


@pytest.mark.parametrize("rows", [[2], [-3], [], [0.5], [[0]], [True]])
def test_rows_that_are_not_there_are_refused(llama, rows):
    cache = ec.Cache(llama, 512)
    fill(cache, torch.randn(2, 2, 40, 32))
    before = [b.clone() for b in buffers(cache)]
    with pytest.raises(CacheError, match="row number of a batch of 2"):
        cache.batch_select_indices(torch.tensor(rows))
    assert equal(buffers(cache), before)


@pytest.mark.parametrize("beams", [[0], [0, 1, 1]])
def test_another_number_of_beams_is_refused(llama, beams):
    """One index would otherwise be spread over all rows, in silence."""
    cache = ec.Cache(llama, 512)
    fill(cache, torch.randn(2, 2, 40, 32))
    before = [b.clone() for b in buffers(cache)]
    with pytest.raises(CacheError, match="number of beams cannot change"):
        cache.reorder_cache(torch.tensor(beams))
    assert equal(buffers(cache), before)


def test_beams_reorder_packed_groups_as_they_are(llama):
    keys, order = torch.randn(4, 2, 150, 32), torch.tensor([3, 3, 0, 1])
    cache, afresh = ec.Cache(llama, 512, **SHORT), ec.Cache(llama, 512, **SHORT)
    fill(cache, keys)
    addresses = [b.data_ptr() for b in buffers(cache)]
    cache.reorder_cache(order)
    fill(afresh, keys[order])
    assert equal(buffers(cache), buffers(afresh))
    assert [b.data_ptr() for b in buffers(cache)] == addresses


def test_four_beams_equal_recomputing_from_scratch(llama):
    expected = llama.generate(IDS[:, :90], num_beams=4, use_cache=False, **GREEDY)
    ec.compress_kv(key_bits=16, value_bits=16)(llama)
    assert torch.equal(llama.generate(IDS[:, :90], num_beams=4, **GREEDY), expected)


# --- removing tokens --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(5, rest="exhaustive")
@pytest.mark.parametrize("residual", [0, 32])
@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_what_can_be_removed_can_be_removed_exactly(llama, residual, chunk):
    """Every length around a group's edge, every number of tokens: a store that never saw them, or a refusal."""
    options = {"key_bits": 4, "value_bits": 8, "group_size": 16, "residual": residual}
    keys, more = torch.randn(1, 2, 90, 32), torch.randn(1, 2, 40, 32)
    refused = 0
    for length in range(44, 84, 1 if chunk == 200 else 5):
        full = ec.Cache(llama, 512, **options)
        for part in keys[:, :, :length].split(chunk, dim=2):
            fill(full, part)
        for count in range(1, length):
            cropped = copy.deepcopy(full)
            if count > full.removable:
                refused += 1
                with pytest.raises(CacheError, match=f"the newest {full.removable} can be removed"):
                    cropped.crop(-count)
                assert cropped.tokens == length
                break
            cropped.crop(-count)
            assert cropped.tokens == cropped.call.sent == length - count
            afresh = ec.Cache(llama, 512, **options)
            fill(afresh, keys[:, :, : length - count])
            assert equal(loaded(cropped), loaded(afresh))
            for each in (cropped, afresh):
                fill(each, more)
            assert equal(loaded(cropped), loaded(afresh))
    assert refused


@pytest.mark.parametrize(("length", "removable"), [(40, 40), (64, 64), (65, 1), (95, 31), (96, 32), (97, 1)])
def test_how_many_can_be_removed(llama, length, removable):
    cache = ec.Cache(llama, 512, **SHORT)
    assert cache.removable == 0
    fill(cache, torch.randn(1, 2, length, 32))
    assert cache.removable == removable
    assert not cache.is_croppable
    dense = ec.Cache(llama, 512, key_bits=16, value_bits=16)
    fill(dense, torch.randn(1, 2, length, 32))
    assert dense.removable == length
    assert dense.is_croppable


def test_what_was_taken_over_stays_lost_when_tokens_go(llama):
    """Token 96 took the slot of token 32; a length of 96 could shrink by a group, had it never been longer."""
    keys = torch.randn(1, 2, 97, 32)
    cache, always = ec.Cache(llama, 512, **SHORT), ec.Cache(llama, 512, **SHORT)
    fill(cache, keys)
    cache.crop(-1)
    fill(always, keys[:, :, :96])
    assert (cache.removable, always.removable) == (0, 32)
    with pytest.raises(CacheError, match="newest 0 can be removed"):
        cache.crop(-1)
    for each in (cache, always):
        fill(each, keys[:, :, :70])
    assert equal(loaded(cache), loaded(always))
    assert cache.removable == always.removable == 6


def test_crop_of_sixteen_bits_equals_never_seen(llama):
    cache = ec.Cache(llama, 512, key_bits=16, value_bits=16)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        cache.crop(torch.tensor(-120))
        got = llama(IDS[:, 180:181], past_key_values=cache).logits
        torch.testing.assert_close(got, llama(IDS[:, :181]).logits[:, -1:], rtol=1e-4, atol=2e-5)
        cache.crop(-1)
        with pytest.raises(CapacityError, match="180 tokens are cached and 400 more"):
            llama(IDS.repeat(1, 2)[:, :400], past_key_values=cache)


def test_removing_everything_starts_again(llama):
    cache = ec.Cache(llama, 512)
    with torch.no_grad():
        whole = llama(IDS, past_key_values=cache).logits
        cache.crop(-300)
        assert cache.tokens == 0
        assert torch.equal(llama(IDS, past_key_values=cache).logits, whole)


def test_crops_that_make_no_sense_are_refused(llama):
    cache = ec.Cache(llama, 512, key_bits=16, value_bits=16)
    fill(cache, torch.randn(1, 2, 40, 32))
    cache.crop(0)
    with pytest.raises(CacheError, match="expected a negative number"):
        cache.crop(10)
    with pytest.raises(CacheError, match="only 40 tokens"):
        cache.crop(-41)
    with pytest.raises(CacheError, match=r"call crop\(\) of the cache"):
        cache.layers[0].crop(-1)
    assert cache.tokens == 40


def test_a_failed_call_is_not_cropped_repeated_or_selected(llama):
    cache = ec.Cache(llama, 512, key_bits=16, value_bits=16)
    fill(cache, torch.randn(1, 2, 40, 32))
    cache.prepare(1, 3, torch.float32)
    for change in (
        lambda: cache.crop(-1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(CacheError, match="half way"):
            change()


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_a_copied_prompt_continues_the_same_way_twice(llama, bits):
    prompt = IDS[:, :200]
    cache = ec.Cache(llama, 512, key_bits=bits, value_bits=bits, **SHORT)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
    before = [b.clone() for b in buffers(cache)]
    outs = [llama.generate(IDS[:, :204], past_key_values=copy.deepcopy(cache), **GREEDY) for _ in range(2)]
    assert torch.equal(*outs)
    assert equal(buffers(cache), before), "a copy wrote into the original"
    assert cache.tokens == 200
    # The original, and the one without any copying, go on alike.
    assert torch.equal(llama.generate(IDS[:, :204], past_key_values=cache, **GREEDY), outs[0])
    if bits == 16:
        assert torch.equal(llama.generate(IDS[:, :204], **GREEDY), outs[0])


def test_a_copy_is_of_one_piece(llama):
    cache = ec.Cache(llama, 512)
    fill(cache, torch.randn(2, 2, 40, 32))
    twin = copy.deepcopy(cache)
    assert not {b.data_ptr() for b in buffers(cache)} & {b.data_ptr() for b in buffers(twin)}
    assert twin.belongs_to(llama)
    assert twin.config is cache.config
    assert twin.length is not cache.length
    assert twin.call is not cache.call
    assert all(layer.length is twin.length and layer.call is twin.call for layer in twin.compressed)
    assert all(b._dynamo_static_input_type == "unguarded" for b in (*buffers(twin), twin.length))
    assert twin.nbytes == cache.nbytes


def test_a_cache_made_under_inference_mode_can_be_used_outside(llama):
    with torch.inference_mode():
        cache = ec.Cache(llama)
        whole = llama(IDS, past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        cache = copy.deepcopy(cache)
    with torch.no_grad():
        cache.batch_select_indices(torch.tensor([0, 2]))
        llama(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(llama(IDS, past_key_values=cache).logits, whole)


# --- layers that are not ours -----------------------------------------------------------------------------------------


def test_rows_of_sliding_layers_follow():
    """Another batch, other rows, a reset with another batch: the mixed cache agrees with the model without one."""
    model = hybrid()
    ids = IDS[:, :100]
    cache = ec.Cache(model, 512, key_bits=16, value_bits=16)
    assert [type(layer).__name__ for layer in cache.layers] == ["StaticSlidingWindowLayer", "CompressedLayer"] * 2

    def agrees(cache, seen, new):
        got = model(new, past_key_values=cache).logits
        expected = model(torch.cat([seen, new], 1)).logits[:, -new.shape[1] :]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)

    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        agrees(cache, ids.repeat_interleave(2, 0), IDS[:, 100:103].repeat(2, 1))
        agrees(twin, ids, IDS[:, 100:101])
        rows = torch.tensor([3, 1, 1])
        cache.batch_select_indices(rows)
        seen = torch.cat([ids.repeat_interleave(2, 0), IDS[:, 100:103].repeat(2, 1)], 1)[rows]
        agrees(cache, seen, IDS[:1, 9:10].repeat(3, 1))
        order = torch.tensor([2, 0, 0])
        addresses = [layer.keys.data_ptr() for layer in cache.layers[::2]]
        cache.reorder_cache(order)
        assert [layer.keys.data_ptr() for layer in cache.layers[::2]] == addresses
        agrees(cache, torch.cat([seen, IDS[:1, 9:10].repeat(3, 1)], 1)[order], IDS[:1, 20:21].repeat(3, 1))
        cache.reset()
        agrees(cache, ids[:1, :0], ids[:1])
        agrees(cache, ids[:1], IDS[:1, 100:101])


def test_a_hybrid_model_generates_as_without():
    model = hybrid()
    fast = ec.compress_kv(key_bits=16, value_bits=16)(copy.deepcopy(model))
    for count, beams in ((40, 1), (100, 1), (40, 3)):
        how = {**GREEDY, "max_new_tokens": 12, "num_beams": beams}
        assert torch.equal(fast.generate(IDS[:, :count], **how), model.generate(IDS[:, :count], **how))


def test_sliding_layers_are_not_cropped():
    model = hybrid()
    cache = ec.Cache(model, 512, key_bits=16, value_bits=16)
    with torch.no_grad():
        whole = model(IDS[:, :60], past_key_values=cache).logits
        assert cache.removable == 0
        assert not cache.is_croppable
        with pytest.raises(CacheError, match=r"layers \[0, 2\] keep transformers' StaticSlidingWindowLayer"):
            cache.crop(-1)
        cache.crop(-60)
        assert torch.equal(model(IDS[:, :60], past_key_values=cache).logits, whole)


def test_layers_whose_rows_cannot_change_say_so(llama):
    cache = ec.Cache(llama, 512)
    fill(cache, torch.randn(1, 2, 40, 32))
    cache.layers[1] = transformers.cache_utils.LinearAttentionLayer()
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(CacheError, match="layer 1 keeps transformers' LinearAttentionLayer"):
            change()


def test_an_empty_cache_has_no_rows(llama):
    """As in transformers: what is done to the rows of an empty cache is done to nothing, and the next call decides."""
    cache = ec.Cache(llama, 512, batch_size=2)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([7]))
    cache.reorder_cache(torch.tensor([1]))
    assert cache.nbytes == 2 * KVForm(4, 4).nbytes(2, 2, 512, 32, 32, torch.float32) + 8
    fill(cache, torch.randn(5, 2, 40, 32))
    assert cache.nbytes == 2 * KVForm(4, 4).nbytes(5, 2, 512, 32, 32, torch.float32) + 8

"""Packing and the store's reference bodies: a plain model of the cache must be met exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import plain

from effcompile.kernels import ops, quantize
from effcompile.kernels.form import BITS, FormError, KVForm, packed_length, word


def make_state(form: KVForm, batch: int = 2, heads: int = 2, capacity: int = 512, size: int = 64, dtype=torch.float32):
    """Buffers of one layer, full of poison, and a length of 0."""
    state = []
    for kind in ("key", "value"):
        made = [torch.empty(s, dtype=d) for s, d in form.buffers(kind, batch, heads, capacity, size, dtype)]
        for tensor in made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0xAB)
        state += made + [None] * (3 - len(made))
    return state, torch.zeros((), dtype=torch.int64)


def append(state, length, key, value, form):
    torch.ops.effcompile.kv_store(*state, length, key, value, form.name)
    length.add_(key.shape[2])


@given(st.integers(0, 5000), st.integers(0, 300), st.sampled_from([16, 32, 64]), st.integers(0, 8))
def test_packed_length_is_a_pure_monotone_function(length, more, group, residual_groups):
    residual = residual_groups * group
    packed = packed_length(length, group, residual)
    assert packed % group == 0
    assert 0 <= packed <= max(0, length - residual)
    assert length - packed < residual + group or packed == 0
    assert packed_length(length + more, group, residual) >= packed


PACKED = [bits for bits in BITS if bits != 16]


@given(st.sampled_from(PACKED), st.integers(1, 12), st.integers(-3, -1), st.integers(0, 2**31))
def test_a_word_holds_channels_that_lie_apart(bits, words, dim, seed):
    """The layout by its definition, one code and one bit at a time; no bit is left over, and unpack inverts pack."""
    channels, length = word(bits)
    assert channels * bits == 8 * length
    codes = torch.randint(2**bits, (words * channels, 3), generator=torch.Generator().manual_seed(seed)).byte()
    expected = torch.zeros(words * length, 3, dtype=torch.uint8)
    for channel, r in ((c, c % words) for c in range(len(codes))):
        for bit in range(bits):
            at = channel // words * bits + bit
            expected[r + at // 8 * words] |= (codes[channel] >> bit & 1) << at % 8
    # The same along any dimension: a third one of size 1 is put in so that the channels are at `dim`.
    codes, expected = (x[:, :, None].movedim(0, dim) for x in (codes, expected))
    packed = quantize.pack(codes, bits, dim)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, expected)
    assert torch.equal(quantize.unpack(packed, bits, dim), codes)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("dim", [2, 3])
def test_pack_inverts_and_error_is_half_a_step(bits, dim):
    x = torch.randn(3, 2, 32, 64) * torch.logspace(-4, 3, 64)
    codes, scale, zero = quantize.quantize(x, bits, dim)
    assert torch.equal(quantize.unpack(quantize.pack(codes, bits, 3), bits, 3), codes)
    back = quantize.dequantize(codes, scale, zero)
    # Half a step, and what fp16 can lose: the zero by half a unit in its last place (2**-11 of the group's end), the
    # scale by as much of the range (at most twice the end), or by half the smallest subnormal at every level.
    ends = x.abs().amax(dim, keepdim=True)
    bound = scale.float() / 2 + ends * (2**-11 + 2 * 2**-11) + 2**bits * 2**-25 + 2**-24
    assert ((back - x).abs() <= bound).all()


def test_constant_group_is_kept_to_fp16():
    x = torch.full((1, 1, 32, 4), 3.25)
    codes, scale, zero = quantize.quantize(x, 4, 2)
    assert (codes == 0).all()
    assert (scale == 0).all()
    assert torch.equal(quantize.dequantize(codes, scale, zero), x)


FORMS = [KVForm(4, 4), KVForm(8, 4, 32, 0), KVForm(16, 8, 32, 32), KVForm(4, 16, 16, 64)]
FORMS += [KVForm(2, 2, 32, 32), KVForm(3, 3, 16, 0), KVForm(2, 3, 64, 0), KVForm(3, 4)]
FORMS += [KVForm(4, 3, 32, 32, "token", "channel"), KVForm("fp8", "fp8", 16, 0), KVForm(2, "fp8", 32, 0, "token")]
FORMS += [KVForm("fp8", 8, 16, 32, "token", "channel"), KVForm(16, "fp8", 32, 64, value_axis="channel")]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.sampled_from(FORMS), st.integers(0, 2**31))
def test_store_equals_plain_model_whatever_the_chunks(chunks, form, seed):
    """The plain model: all tokens in a list, groups quantised from it by the definition, the rest as given."""
    torch.manual_seed(seed)
    state, length = make_state(form, batch=1, heads=2, capacity=1024)
    total = sum(chunks)
    key, value = torch.randn(1, 2, total, 64), torch.randn(1, 2, total, 64)
    with ops.reference_only():
        at = 0
        for count in chunks:
            append(state, length, key[:, :, at : at + count], value[:, :, at : at + count], form)
            at += count
        loaded = torch.ops.effcompile.kv_load(*state, length, form.name)
    for kind, given_, got in (("key", key, loaded[0]), ("value", value, loaded[1])):
        expected = plain(given_, form, kind)
        assert torch.equal(got[:, :, :total], expected)
        assert (got[:, :, total:] == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_bytes_are_the_allocated_ones(form):
    for dtype in (torch.float32, torch.bfloat16):
        state, _ = make_state(form, 3, 5, 1024, 64, dtype)
        allocated = sum(t.untyped_storage().nbytes() for t in state if t is not None)
        assert form.nbytes(3, 5, 1024, 64, 64, dtype) == allocated


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"key_bits": 5}, "key_bits=5"),
        ({"value_bits": 32}, "16, 8, 4, 3, 2, or 'fp8'"),
        ({"key_bits": "fp4"}, "'fp4' is not offered"),
        ({"key_axis": "head"}, "key_axis='head' is not offered; choose 'channel' or 'token'"),
        ({"value_axis": 1}, "value_axis=1"),
        ({"key_bits": True}, "not offered"),
        ({"group": 24}, "multiple of 16"),
        ({"residual": 100}, "multiple of group_size=32"),
        ({"residual": -32}, "whole groups"),
    ],
)
def test_forms_that_cannot_be_built(arguments, words):
    with pytest.raises(FormError, match=words):
        KVForm(**arguments)


def test_group_that_does_not_divide_the_head():
    with pytest.raises(FormError, match="80 channels do not divide into groups of 32"):
        KVForm(4, 4).buffers("value", 1, 1, 512, 80, torch.float32)
    assert KVForm(4, 4, 16, 128).buffers("value", 1, 1, 512, 80, torch.float32)


@pytest.mark.parametrize(("bits", "size"), [(4, 17), (3, 20), (2, 18)])
def test_heads_that_hold_no_whole_words(bits, size):
    with pytest.raises(FormError, match=f"{size} channels cannot be packed . at a time, as {bits} bits"):
        KVForm(bits, 16).check_head("key", size)


@pytest.mark.parametrize("bits", PACKED)
def test_codes_take_their_bits_and_no_more(bits):
    for kind in ("key", "value"):
        shape, dtype = KVForm(bits, bits).buffers(kind, 1, 1, 512, 64, torch.float32)[0]
        assert 8 * torch.Size(shape).numel() * dtype.itemsize == 512 * 64 * bits


def test_names_round_trip():
    for k in BITS:
        for v in BITS:
            form = KVForm(k, v, 64, 128)
            assert KVForm.parse(form.name) == form
    with pytest.raises(FormError, match="not the name of a form"):
        KVForm.parse("k4")


@pytest.mark.one_in(5, rest="exhaustive")
@pytest.mark.parametrize(
    "form",
    [*FORMS[::2], KVForm(16, 16), *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[1::2])],
    ids=lambda f: f.name,
)
def test_opcheck(form):
    state, length = make_state(form)
    torch.manual_seed(0)
    for tensor in state:
        if tensor is not None:
            tensor.zero_()
    key, value = torch.randn(2, 2, 150, 64), torch.randn(2, 2, 150, 64)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.effcompile.kv_store, (*state, length, key, value, form.name))
        append(state, length, key, value, form)
        torch.library.opcheck(torch.ops.effcompile.kv_load, (*state, length, form.name))
        mask = torch.ones(2, 512, dtype=torch.bool)
        mask[0, :7] = False
        args = (torch.randn(2, 6, 3, 64), *state, length, mask, form.name, 0.125, True, -1)
        torch.library.opcheck(torch.ops.effcompile.attend, args)


def test_capacity_is_checked_before_anything_is_written():
    form = KVForm(4, 4)
    state, length = make_state(form, capacity=512)
    append(state, length, torch.randn(2, 2, 500, 64), torch.randn(2, 2, 500, 64), form)
    before = [t.clone() for t in state if t is not None]
    with pytest.raises(ops.CapacityError, match="512"):
        append(state, length, torch.randn(2, 2, 13, 64), torch.randn(2, 2, 13, 64), form)
    for old, new in zip(before, [t for t in state if t is not None]):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    assert length == 500

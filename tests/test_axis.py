"""Scales along either axis, and fp8: the reference bodies against the definition, number by number."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import E4M3, dequantised, e4m3, element, plain
from test_quantize import append, make_state

from effcompile.kernels import attention, ops, quantize
from effcompile.kernels.form import BITS, FormError, Kind, KVForm

KINDS: tuple[Kind, Kind] = ("key", "value")
AXES = ("channel", "token")
PACKED = [bits for bits in (*BITS, "fp8") if bits != 16]
EVERY = [KVForm(bits, bits, 16, 16, axis, axis) for bits, axis in itertools.product(PACKED, AXES)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with channels of very different size, a constant and a zero channel."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-2, 2, shape[-1])
    x[..., 1], x[..., 2] = 0.75, 0
    return x


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("total", [15, 32, 71])
def test_every_number_lies_where_the_form_says(form: KVForm, total: int) -> None:
    """Appended in odd chunks; each packed number is found in the bytes one bit at a time, in plain Python."""
    key, value = numbers(2, 1, total, 32, seed=1), numbers(2, 1, total, 32, seed=2)
    state, length = make_state(form, 2, 1, 96, 32)
    with ops.reference_only():
        for at in range(0, total, 7):
            append(state, length, key[:, :, at : at + 7], value[:, :, at : at + 7], form)
        loaded = torch.ops.effcompile.kv_load(*state, length, form.name)
    for kind, side, got, new in zip(KINDS, (state[:3], state[3:]), loaded, (key, value)):
        assert got.shape == (2, 1, 96, 32)
        assert torch.equal(got[:, :, :total], plain(new, form, kind))
        assert not got[:, :, total:].any()
        wide = dequantised(side, total, form, kind)
        for row, token, channel in itertools.product(range(2), range(form.packed(total)), range(32)):
            assert wide[row, 0, token, channel] == element(side, row, 0, token, channel, form, kind)
        # In fp32 a product and a sum are rounded once each.
        ends = wide.abs() + side_steps(side, total, form, kind)
        assert ((got[:, :, :total].double() - wide).abs() <= 2 * 2.0**-24 * ends).all()


def side_steps(side: list[torch.Tensor], total: int, form: KVForm, kind: Kind) -> torch.Tensor:
    """What the largest product in the store can be: a rounding is a part of that, where the sum cancels."""
    return (2 ** form.bits(kind) if not form.fp8(kind) else 0) * side[1][:, :, :, :1].double().nan_to_num().amax()


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
def test_error_is_bounded_by_the_steps(form: KVForm) -> None:
    """Against the numbers that were given, in fp64: half a step and what fp16 scales and zeros can lose."""
    x = numbers(1, 2, 64, 32).double()
    for kind in KINDS:
        at = 2 if form.axis(kind) == "channel" else 3
        groups = x.unflatten(at, (-1, form.group))
        ends = groups.abs().amax(at + 1, keepdim=True)
        if form.fp8(kind):
            # Three bits of mantissa: half a unit is 2**-4 of a number, and 2**-10 of a scale below the normal ones.
            # What the scale's own rounding leaves beyond 448 is lost too.
            step = ends / 448
            bound = torch.maximum(groups.abs() * 2**-4, step * 2**-10) * (1 + 2**-10) + ends * 2**-11 + 449 * 2.0**-25
        else:
            step = (groups.amax(at + 1, keepdim=True) - groups.amin(at + 1, keepdim=True)) / (2 ** form.bits(kind) - 1)
            bound = step / 2 + ends * 3 * 2.0**-11 + 2 ** form.bits(kind) * 2.0**-25 + 2.0**-24
        with_none_left = KVForm(form.key_bits, form.value_bits, form.group, 0, form.key_axis, form.value_axis)
        error = (plain(x.float(), with_none_left, kind).double() - x).abs()
        assert (error <= bound.expand_as(groups).flatten(at, at + 1)).all()


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
def test_no_room_is_said_before_anything_is_written(form: KVForm) -> None:
    state, length = make_state(form, 1, 1, 96, 32)
    with ops.reference_only():
        append(state, length, numbers(1, 1, 95, 32), numbers(1, 1, 95, 32), form)
        with pytest.raises(
            ops.CapacityError, match="95 tokens are cached and 2 more were given, but the capacity is 96"
        ):
            append(state, length, numbers(1, 1, 2, 32), numbers(1, 1, 2, 32), form)


@settings(deadline=None, max_examples=300)
@given(st.floats(-460, 460, width=32))
def test_a_code_is_the_nearest_number(x: float) -> None:
    """Round to nearest, ties to the even code, saturating; against a search among all numbers there are."""
    codes, scale = quantize.quantize_fp8(torch.tensor([448.0, x]), 0)
    assert float(scale) in (1.0, torch.tensor(abs(x) / 448).half().item())
    aim = min(448.0, max(-448.0, float(torch.tensor(x) / scale.float())))
    found, distance = int(codes[1]), (E4M3 - aim).abs().nan_to_num(1e9)
    assert abs(e4m3(found) - aim) == distance.min()
    if (distance == distance.min()).sum() > 1:  # a tie, or the two zeros
        assert found % 2 == 0


def test_every_e4m3_number_comes_back() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    for scale in (1.0, 0.25, 3.0):
        x = (E4M3[codes.long()] * scale).float()
        found, step = quantize.quantize_fp8(x, 0)
        assert torch.equal(found, codes)
        assert torch.equal(quantize.dequantize(found, step), x)


def test_fp8_of_nan_infinity_and_small_groups() -> None:
    """A NaN takes its group with it and no other, as with integers; an infinity saturates; codes are never NaN."""
    x = torch.ones(6, 16)
    x[0, 3], x[1, 4], x[2, 5], x[3], x[4] = float("nan"), float("inf"), float("-inf"), 0, 1e-9
    codes, scale = quantize.quantize_fp8(x, 1)
    back = quantize.dequantize(codes, scale)
    assert not ((codes & 127) == 127).any()
    assert back[0].isnan().all()
    assert back[1:].isfinite().all()
    assert back[1, 4] == 448 * quantize.FP16_MAX == -back[2, 5]
    assert (back[3:5] == 0).all()
    assert ((back[5] - 1).abs() <= 2**-11).all()  # the scale in fp16


@pytest.mark.parametrize("axes", list(itertools.product(AXES, AXES)), ids="-".join)
@pytest.mark.parametrize("bits", [(4, 4), ("fp8", 2), (3, "fp8"), (8, 16)], ids=str)
def test_attention_over_the_store_in_fp64(axes: Any, bits: Any) -> None:
    """GQA, padding and a tail: the reference body of ``attend`` against fp64 over what the store holds."""
    form, total = KVForm(*bits, 16, 16, *axes), 71
    key, value = numbers(2, 2, total, 32, seed=1) / 50, numbers(2, 2, total, 32, seed=2)
    state, length = make_state(form, 2, 2, 96, 32)
    query, mask = torch.randn(2, 6, 3, 32), torch.ones(2, 96, dtype=torch.bool)
    mask[0, :9] = False
    with ops.reference_only():
        append(state, length, key, value, form)
        out, lse = torch.ops.effcompile.attend(query, *state, length, mask, form.name, 0.2, True, -1)
    sides = ops.split_state(tuple(state))
    k, v = (dequantised(side, total, form, kind) for side, kind in zip(sides, KINDS))
    score = query.double() @ k.repeat_interleave(3, 1).mT * 0.2
    keep = attention.allowed(ops.Predicate(True, None, True), 3, total, mask, query.device)
    score = score.masked_fill(~keep, float("-inf"))
    expected = score.softmax(-1) @ v.repeat_interleave(3, 1)
    # Sums of 32 products in fp32, twice, and the stores' own two roundings.
    assert (out - expected).abs().max() <= 64 * 2.0**-23 * v.abs().max() * max(
        1.0, float(score[keep.expand_as(score)].abs().max())
    )
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_names_tell_axes_and_fp8() -> None:
    for key, value, a, b in itertools.product((*BITS, "fp8"), (*BITS, "fp8"), AXES, AXES):
        form = KVForm(key, value, 32, 64, a, b)  # type: ignore[arg-type]
        assert KVForm.parse(form.name) == form
        assert form.name.isidentifier()
    assert KVForm("fp8", "fp8").name == "kfp8vfp8g32r128"
    assert KVForm(4, 4, key_axis="channel", value_axis="token").name == "k4v4g32r128"
    assert KVForm(4, 4, key_axis="token", value_axis="channel").name == "k4v4g32r128ktvc"
    assert KVForm(16, 4, key_axis="token") == KVForm(16, 4)  # an unquantised side has no axis
    for wrong in ("k4v4g32r128vckt", "kfp4v4g32r128", "k4v4g32r128t"):
        with pytest.raises(FormError, match="not the name of a form"):
            KVForm.parse(wrong)


def test_heads_must_hold_groups_of_channels() -> None:
    with pytest.raises(FormError, match=r"key heads of 80 channels do not divide into .* 32.*key_axis='channel'"):
        KVForm(4, 16, key_axis="token").check_head("key", 80)
    KVForm(16, 4, value_axis="channel").check_head("value", 80)


def test_fp8_needs_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(FormError, match=r"value_bits='fp8' needs torch\.float8_e4m3fn"):
        KVForm(8, "fp8")


def test_fp8_takes_a_byte_and_no_zero() -> None:
    """8.5 bits a number in groups of 32, where integers of 8 bits take 9."""
    for axis in AXES:
        form, whole = KVForm("fp8", 16, 32, 0, axis), KVForm(16, 16).nbytes(1, 1, 512, 0, 64, torch.float32)
        packed = form.nbytes(1, 1, 512, 64, 64, torch.float32) - whole - form.slots * 64 * 4
        assert packed * 8 == 512 * 64 * 8.5

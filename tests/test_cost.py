"""The cost formulas against what is allocated, and against counting."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.kernels import attention, cost
from effcompile.kernels.form import BITS, KVForm
from effcompile.kernels.program import Predicate

forms = st.builds(
    lambda k, v, g, r, *axes: KVForm(k, v, g, g * r, *axes),
    st.sampled_from([*BITS, "fp8"]),
    st.sampled_from([*BITS, "fp8"]),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 5),
    st.sampled_from(["channel", "token"]),
    st.sampled_from(["token", "channel"]),
)
predicates = st.builds(Predicate, st.booleans(), st.none() | st.integers(1, 50), st.booleans())


@settings(deadline=None, max_examples=80)
@given(forms, st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.sampled_from([2, 4]))
def test_allocation_equals_the_bytes_of_the_buffers(
    form: KVForm, batch: int, heads: int, groups: int, blocks: int, itemsize: int
) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    key_size, value_size, capacity = 48 if form.key_axis == "channel" else 64, 64 * blocks, 64 * groups
    formula = cost.at(cost.allocation(form, itemsize), B=batch, G=heads, C=capacity, D=key_size, E=value_size)
    assert formula == form.nbytes(batch, heads, capacity, key_size, value_size, dtype)
    buffers = [
        torch.empty(shape, dtype=kind, device="meta")
        for side, size in (("key", key_size), ("value", value_size))
        for shape, kind in form.buffers(side, batch, heads, capacity, size, dtype)  # type: ignore[arg-type]
    ]
    assert formula == sum(buffer.untyped_storage().nbytes() for buffer in buffers)


@settings(deadline=None, max_examples=100)
@given(predicates, st.integers(1, 40), st.integers(0, 60))
def test_pairs_and_tokens_are_what_the_mask_lets_through(predicate: Predicate, queries: int, before: int) -> None:
    length = queries + before
    keep = attention.allowed(predicate, queries, length, None, torch.device("cpu"))
    assert cost.at(cost.pairs(predicate), T=queries, S=length) == int(keep.sum())
    if predicate.causal:
        seen = int(keep[0, 0].any(0).sum())
        assert cost.at(cost.tokens_read(predicate), T=queries, S=length) == seen


@settings(deadline=None, max_examples=60)
@given(forms, st.integers(0, 400))
def test_packed_length_is_the_one_of_the_form(form: KVForm, length: int) -> None:
    assert cost.at(cost.packed_length(form, length)) == form.packed(length)


def _read_by_hand(form: KVForm, length: int, size: int, itemsize: int) -> int:
    total, packed = 0, form.packed(length)
    for bits in (form.key_bits, form.value_bits):
        if bits == 16:
            total += length * size * itemsize
        else:
            width, scale = (8, 2) if bits == "fp8" else (bits, 4)
            total += packed * size * width // 8 + packed * size // form.group * scale
            total += (length - packed) * size * itemsize
    return total


@settings(deadline=None, max_examples=60)
@given(forms, st.integers(1, 600), st.integers(1, 16))
def test_attend_moves_the_store_once(form: KVForm, length: int, queries: int) -> None:
    queries = min(queries, length)
    sizes: dict[str, Any] = {"B": 2, "H": 6, "G": 2, "T": queries, "S": length, "C": 1024, "D": 64, "E": 64}
    ends = 2 * 6 * queries * (64 * 4 + 64 * 4 + 4)
    found = cost.attend(form, Predicate(), 4).at(**sizes)
    assert found.bytes == ends + 2 * 2 * _read_by_hand(form, length, 64, 4)
    packed = form.packed(length)
    unpacked = sum(2 * 2 * 2 * packed * 64 for bits in (form.key_bits, form.value_bits) if bits != 16)
    assert found.flops == 2 * 6 * (queries * length - queries * (queries - 1) // 2) * 256 + unpacked


def test_sixteen_bits_cost_what_dense_costs_but_for_lse() -> None:
    sizes = {"B": 1, "H": 9, "G": 3, "T": 1, "S": 7000, "C": 7168, "D": 64, "E": 64}
    ours = cost.attend(KVForm(16, 16), Predicate(), 4).at(**sizes)
    base = cost.dense(Predicate(), 4).at(**sizes)
    assert ours.bytes - base.bytes == 9 * 4
    assert ours.flops == base.flops


def test_a_window_reads_only_the_window() -> None:
    sizes = {"B": 1, "H": 8, "G": 2, "T": 1, "C": 8192, "D": 64, "E": 64}
    windowed = cost.attend(KVForm(), Predicate(window=512), 2)
    assert windowed.at(S=8000, **sizes).bytes == windowed.at(S=4160, **sizes).bytes  # 8000 and 4160 agree modulo 32
    assert windowed.at(S=300, **sizes) == cost.attend(KVForm(), Predicate(), 2).at(S=300, **sizes)


def test_a_window_reads_the_scales_of_groups_that_it_cuts_where_they_are_of_channels() -> None:
    sizes: dict[str, Any] = {"B": 1, "H": 2, "G": 2, "T": 1, "C": 64, "S": 64, "D": 64, "E": 64}
    channel, token = (
        cost.attend(KVForm(4, 16, 32, 0, axis), Predicate(window=40), 2).at(**sizes).bytes
        for axis in ("channel", "token")
    )
    assert channel - token == 2 * (2 * 64 - 40 * 2) * 4  # two groups a channel, but two a token for 40 tokens


@pytest.mark.parametrize("own", [(True, True, False), (False, True, True), (False, False, False)])
def test_operands_of_scores_are_read_once(own: tuple[bool, bool, bool]) -> None:
    shape = [n if yes else 1 for n, yes in zip((2, 6, 3), own)]
    bias, sinks = torch.empty(*shape, 50), torch.empty(6)
    found = cost.score_operands(Predicate(), own, True).at(B=2, H=6, T=3, S=50)
    assert found == cost.Cost(bias.nbytes + sinks.nbytes, 0)
    assert cost.score_operands(Predicate(), None, False) == cost.Cost(0, 0)


def test_unfused_pays_for_the_capacity_and_fused_does_not() -> None:
    sizes = {"B": 1, "H": 9, "G": 3, "T": 1, "S": 500, "D": 64, "E": 64}
    before = cost.unfused(KVForm(), 4)
    after = cost.attend(KVForm(), Predicate(), 4)
    assert before.at(C=8192, **sizes).bytes > 20 * after.at(C=8192, **sizes).bytes
    assert after.at(C=8192, **sizes) == after.at(C=512, **sizes)


@settings(deadline=None, max_examples=40)
@given(forms, st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_chunks_quantise_each_token_once(form: KVForm, chunks: list[int]) -> None:
    """However a prompt is cut, the FLOPs of quantising add up to the same."""
    total = sum(chunks)
    sizes: dict[str, Any] = {"B": 1, "G": 2, "C": 2048, "D": 64, "E": 64}
    length, flops = 0, 0
    for chunk in chunks:
        length += chunk
        flops += cost.store(form, 2).at(T=chunk, S=length, **sizes).flops
    assert flops == cost.store(form, 2).at(T=total, S=total, **sizes).flops


def test_sizes_may_stay_open() -> None:
    open_length = cost.attend(KVForm(16, 16), Predicate(), 2).at(B=1, H=8, G=2, T=1, C=512, D=64, E=64)
    assert open_length.bytes.free_symbols == {cost.S}
    assert open_length.at(S=100).bytes == 2 * 100 * 128 * 2 + 8 * (256 + 4)
    with pytest.raises(TypeError, match="no sizes"):
        open_length.at(L=3)


def test_sums() -> None:
    one = cost.Cost(cost.B, cost.T)
    assert (one + one).at(B=2, T=3) == cost.Cost(4, 6)


def test_examples() -> None:
    assert doctest.testmod(importlib.import_module("effcompile.kernels.cost")).failed == 0

"""C++ kernels against the reference bodies, against fp64, and against everything that could go wrong around them."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch
from cpp_calls import (
    BASE,
    LENGTHS,
    STORE,
    Call,
    assert_same,
    check_attend,
    check_other_instructions,
    check_store_and_load,
    copy,
    fresh,
    poisoned,
)
from pairs import pairwise

from effcompile.kernels import ops
from effcompile.kernels.form import BITS, KVForm
from effcompile.kernels.program import DTYPES, Predicate, Program
from effcompile.lowering import cpp, toolchain

pytestmark = pytest.mark.usefixtures("no_fallback", "build_ahead")


def program_of(row: dict[str, Any]) -> Program:
    """A legal program from a row of the cover: values are packed in groups that divide the head."""
    key_size, value_size, group = row["sizes"]
    window, pad = row["predicate"]
    form = KVForm(row["key_bits"], row["value_bits"], group, row["residual"] * group)
    predicate = Predicate(row["causal"], window, pad)
    return Program(row["phase"], form, predicate, row["dtype"], row["ratio"], key_size, value_size)


FACTORS: dict[str, tuple[Any, ...]] = {
    "sizes": ((64, 64, 32), (128, 128, 32), (80, 96, 16), (72, 80, 16)),
    "ratio": (3, 1, 8),
    "key_bits": (4, 8, 16, 3, 2),
    "value_bits": (4, 8, 16, 3, 2),
    "dtype": tuple(DTYPES),
    "predicate": ((None, False), (40, False), (None, True), (40, True)),
    "residual": (4, 0),
    "phase": ("decode", "prefill"),
    "causal": (True, False),
}
MORE_SIZES = {
    "sizes": ((256, 256, 64), (16, 32, 32), (96, 48, 48), (200, 240, 16)),
    "ratio": (4, 7, 1),
    "key_bits": (4, 16, 3),
    "value_bits": (8, 16, 2),
}
PROGRAMS = list(dict.fromkeys(program_of(row) for row in pairwise(**FACTORS)))
MORE = list(dict.fromkeys(program_of(row) for row in pairwise(**FACTORS | MORE_SIZES)))
ALL = [*PROGRAMS, *(pytest.param(program, marks=pytest.mark.exhaustive) for program in MORE)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_attend(program: Program) -> None:
    check_attend(program)


@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_store_and_load(program: Program) -> None:
    check_store_and_load(program)


LONG = [dataclasses.replace(BASE, form=form) for form in (KVForm(), KVForm(16, 16), KVForm(8, 4))]


@pytest.mark.parametrize("program", LONG, ids=lambda p: p.name)
def test_split_over_threads(program: Program) -> None:
    """Many parts merged by lse, by one thread and by two."""
    call = Call(program, 5000, 1, batch=1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            call.check()
    finally:
        torch.set_num_threads(before)


# Phases and dtypes in turn: pairs of one of them with each kind of numbers are in the cover above.
MIXES = [
    Program(phase, KVForm(*mix), Predicate(), dtype, 3, 64, 64)
    for mix, phase, dtype in zip(
        itertools.product(BITS, repeat=2), itertools.cycle(("decode", "prefill")), itertools.cycle(DTYPES)
    )
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", MIXES, ids=lambda p: p.name)
def test_attend_every_mix(program: Program) -> None:
    check_attend(program, (*LENGTHS, 1111))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("width", [256, 1], ids=["avx2", "no vectors"])
def test_other_instruction_sets(width: int) -> None:
    programs = [
        BASE,
        Program("prefill", KVForm(8, 4, 16, 0), Predicate(), torch.bfloat16, 2, 72, 80),
        Program("decode", KVForm(2, 3, 32, 0), Predicate(), torch.float32, 3, 64, 64),
        Program("prefill", KVForm(3, 2, 16, 0), Predicate(), torch.bfloat16, 2, 72, 80),
    ]
    check_other_instructions(programs, width)


def test_extreme_values_are_stored_as_the_reference_stores_them() -> None:
    form = KVForm(4, 4, 32, 0)
    key, value = fresh(1, 1, 64, 64, torch.float32), fresh(1, 1, 64, 64, torch.float32)
    key[0, 0, 3, 0], key[0, 0, 4, 1], key[0, 0, 5, 2] = float("nan"), float("inf"), float("-inf")
    key[0, 0, :, 3], key[0, 0, :, 4] = 1e38, torch.linspace(-1e38, 1e38, 64)
    key[0, 0, :, 5], key[0, 0, :, 6] = 0.25, torch.linspace(0, 1e-9, 64)
    value[0, 0, 7, :32], value[0, 0, 8, 40], value[0, 0, 9, 33] = 7.0, float("inf"), float("nan")
    ours, theirs = (poisoned(form, 1, 1, 64, (64, 64), torch.float32) for _ in range(2))
    STORE(*ours, torch.tensor(0), key, value, form.name)
    with ops.reference_only():
        STORE(*theirs, torch.tensor(0), key, value, form.name)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(1), b.nan_to_num(1))


def test_a_nan_key_is_not_hidden() -> None:
    call = Call(dataclasses.replace(BASE, form=KVForm(16, 16)), 65, 1)
    assert call.state[0] is not None
    call.state[0][1, 1, 7] = float("nan")
    out, lse = call.attend()
    assert out[1, 3:].isnan().all()
    assert lse[1, 3:].isnan().all()
    assert out[0].isfinite().all()


def test_any_strides() -> None:
    """Transposed views are read in place; a strided last dimension works too."""
    call = Call(BASE, 65, 1)
    whole = call.attend()
    strided = torch.empty(*call.query.shape, 2)[..., 0].copy_(call.query)
    call.query = strided
    assert all(torch.equal(a, b) for a, b in zip(call.attend(), whole, strict=True))
    again = copy(call.state)
    key = torch.empty(*call.key.shape, 2)[..., 0].copy_(call.key)
    STORE(*again, torch.tensor(0), key, call.value.contiguous(), BASE.form.name)
    assert_same(again, call.state)


def test_a_mask_for_one_serves_the_batch() -> None:
    program = dataclasses.replace(BASE, predicate=Predicate(key_mask=True))
    call = Call(program, 65, 1)
    assert call.mask is not None
    call.mask = call.mask[:1]
    one = call.attend()
    call.mask = call.mask.expand(call.batch, -1)
    assert all(torch.equal(a, b) for a, b in zip(one, call.attend(), strict=True))


@pytest.mark.parametrize("form", [KVForm(), KVForm(16, 16), KVForm(4, 16)], ids=lambda f: f.name)
def test_no_room_writes_nothing(form: KVForm) -> None:
    state = poisoned(form, 1, 2, 96, (64, 64), torch.float32)
    key = fresh(1, 2, 97, 64, torch.float32)
    STORE(*state, torch.tensor(0), key[:, :, :90], key[:, :, :90], form.name)
    before = copy(state)
    with pytest.raises(ops.CapacityError, match="90 tokens are cached and 7 more were given, but the capacity is 96"):
        STORE(*state, torch.tensor(90), key[:, :, 90:], key[:, :, 90:], form.name)
    assert_same(state, before)


def test_nothing_is_read_beyond_the_capacity() -> None:
    call = Call(BASE, 65, 1)
    call.length = 10_000
    with pytest.raises(ops.CapacityError, match="10000"):
        call.attend()


def assert_falls_back_once(match: str) -> None:
    state = poisoned(KVForm(16, 16), 1, 1, 64, (64, 64), torch.float32)
    key = fresh(1, 1, 9, 64, torch.float32)
    with pytest.warns(UserWarning, match=match) as caught:
        STORE(*state, torch.tensor(0), key, key, KVForm(16, 16).name)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STORE(*state, torch.tensor(0), key, key, KVForm(16, 16).name)
    assert state[0] is not None
    assert torch.equal(state[0][:, :, :9], key)


@pytest.mark.usefixtures("bare")
def test_without_a_compiler_the_reference_runs() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/no/such/compiler",)}), warnings.catch_warnings():
        warnings.simplefilter("default")
        assert_falls_back_once("could not be built")


@pytest.mark.usefixtures("bare")
def test_when_a_build_fails_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "source", lambda program: "#error on purpose\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert_falls_back_once("could not be built: .*on purpose")


def test_what_has_no_kernel_says_why() -> None:
    assert "heads of 20 channels" in str(cpp.refusal(dataclasses.replace(BASE, key_size=20)))
    assert "float64" in str(cpp.refusal(dataclasses.replace(BASE, dtype=torch.float64)))
    assert "do not divide into groups" in str(cpp.refusal(dataclasses.replace(BASE, value_size=80)))
    assert cpp.refusal(BASE) is None


@pytest.mark.usefixtures("bare")
def test_a_build_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, or here after everything in memory is forgotten; without asking for a compiler."""
    first = cpp.kernel(BASE)
    assert [(k.program.name, k.source_path) for k in cpp.kernels()] == [(BASE.name, first.source_path)]
    cpp.clear()

    def refuse(name: str, source: Any) -> str:
        raise AssertionError("compiled twice")

    monkeypatch.setattr(toolchain, "_compile", refuse)
    assert cpp.kernel(BASE).library_path == first.library_path
    with open(first.source_path) as text:
        assert text.read() == cpp.source(BASE)


def test_source() -> None:
    """The generated text, as a reader of the report sees it."""
    assert (
        cpp.source(Program("decode", KVForm(4, 8), Predicate(window=512), torch.bfloat16, 3, 64, 128))
        == """\
// attend_decode_k4v8g32r128_d64e128_h3_bf16_causal_w512
// Generated by effcompile/lowering/cpp.py; the parts are in effcompile/kernels/cpp.
#include "decode.h"

namespace {
struct P {
  using scalar = c10::BFloat16;
  static constexpr int key_bits = 4;
  static constexpr int value_bits = 8;
  static constexpr int64_t group = 32;
  static constexpr int64_t residual = 128;
  static constexpr int64_t key_size = 64;
  static constexpr int64_t value_size = 128;
  static constexpr int64_t rotary = 0;
  static constexpr int64_t latent = 0;
  static constexpr int64_t value_latent = 0;
  static constexpr bool adjacent = false;
  static constexpr int ratio = 3;
  static constexpr bool normed = false;
  static constexpr bool causal = true;
  static constexpr int64_t window = 512;
  static constexpr bool key_mask = false;
};
}  // namespace

extern "C" int64_t attend(const ec::AttendArgs* args) { return ec::decode<P>(*args); }
"""
    )

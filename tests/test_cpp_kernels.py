"""C++ kernels against the reference bodies, against fp64, and against everything that could go wrong around them."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stores import dequantised
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.form import BITS, KVForm
from effcompile.kernels.program import DECODE_ROWS, DTYPES, Predicate, Program, StoreProgram
from effcompile.lowering import cpp, toolchain

STORE, LOAD, ATTEND = (getattr(torch.ops.effcompile, name).default for name in ("kv_store", "kv_load", "attend"))
LENGTHS = (1, 63, 65, 500)

State = list[Tensor | None]


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows such that every two values of two factors meet in at least one of them; greedy, the same each time."""
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    rows = []
    while missing:
        row: dict[str, Any] = dict(min(missing, key=repr))
        for name in names:
            if name not in row:
                gain = {
                    x: sum(
                        pair in missing for o, y in row.items() for pair in (((o, y), (name, x)), ((name, x), (o, y)))
                    )
                    for x in factors[name]
                }
                row[name] = max(factors[name], key=lambda x: gain[x])
        missing -= {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}
        rows.append(row)
    return rows


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
MORE_SIZES = {"sizes": ((256, 256, 64), (16, 32, 32), (96, 48, 48), (200, 240, 16)), "ratio": (4, 7, 1)}
PROGRAMS = list(dict.fromkeys(program_of(row) for row in pairwise(FACTORS)))
MORE = list(dict.fromkeys(program_of(row) for row in pairwise(FACTORS | MORE_SIZES)))
ALL = [*PROGRAMS, *(pytest.param(program, marks=pytest.mark.slow) for program in MORE)]


def store_of(program: Program) -> StoreProgram:
    return StoreProgram(program.form, program.dtype, program.key_size, program.value_size)


@pytest.fixture(scope="module", autouse=True)
def _build_ahead(request: pytest.FixtureRequest) -> None:
    """All programs of the selected tests build in the background while the first tests run."""
    chosen = [item.callspec.params.get("program") for item in request.session.items if hasattr(item, "callspec")]
    cpp.prebuild(p for program in chosen if isinstance(program, Program) for p in (program, store_of(program)))


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """A kernel that is missing where one is expected fails the test instead of being replaced by the reference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its PyTorch reference body")
        yield


@pytest.fixture
def forgetful() -> Iterator[None]:
    """No kernel in memory, neither before the test nor after it."""
    cpp.clear()
    yield
    cpp.clear()


@pytest.fixture
def bare(forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """An empty cache folder, no kernel in memory, and nothing warned about yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "_warned", set())


def poisoned(form: KVForm, batch: int, heads: int, capacity: int, sizes: tuple[int, int], dtype: torch.dtype) -> State:
    """Six buffers full of NaN (255 for codes): whatever is read before it is written shows."""
    state: State = []
    for kind, size in zip(("key", "value"), sizes, strict=True):
        made: State = [
            torch.full(shape, 255 if kind_dtype == torch.uint8 else float("nan"), dtype=kind_dtype)
            for shape, kind_dtype in form.buffers(kind, batch, heads, capacity, size, dtype)  # type: ignore[arg-type]
        ]
        state += made + [None] * (3 - len(made))
    return state


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit pattern, so that NaN equals NaN and 0 differs from -0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(ours: State, theirs: State) -> None:
    for name, a, b in zip(("k0", "k1", "k2", "v0", "v1", "v2"), ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(bits(a), bits(b)), f"{name} differs in {int((bits(a) != bits(b)).sum())} places"


def copy(state: State) -> State:
    return [None if t is None else t.clone() for t in state]


def fresh(batch: int, groups: int, tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Keys or values ``[B, G, T, D]`` as models give them: a view of ``[B, T, G, D]``, with an offset per channel."""
    return (torch.randn(batch, tokens, groups, size) + 2 * torch.randn(size)).to(dtype).transpose(1, 2)


def exact(
    query: Tensor, state: State, length: int, mask: Tensor | None, form: KVForm, scale: float, p: Predicate
) -> Any:
    """Attention over the store in fp64, one batch entry and head at a time: written apart from the reference body."""
    keys, values = ops.split_state(tuple(state))
    k, v = dequantised(keys, length, form, "key"), dequantised(values, length, form, "value")
    batch, heads, queries, _ = query.shape
    ratio = heads // k.shape[1]
    hidden = torch.zeros(batch, queries, length, dtype=torch.bool)
    for t in range(queries):
        position = length - queries + t
        if p.window is not None:
            hidden[:, t, : max(0, position - p.window + 1)] = True
        if p.causal:
            hidden[:, t, position + 1 :] = True
    if mask is not None:
        hidden |= ~mask[:, None, :length]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), float("-inf"), dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        s = (query[b, h].double() @ k[b, h // ratio].T * scale).masked_fill(hidden[b], float("-inf"))
        lse[b, h] = s.logsumexp(-1)
        out[b, h] = s.softmax(-1).nan_to_num(0) @ v[b, h // ratio]
    return out, lse


def assert_within_budget(ours: Tensor, reference: Tensor, truth: Tensor, what: str, roundings: int = 1) -> None:
    """At most twice what the reference loses against fp64, plus a number of roundings in the result's dtype.

    An lse has two, one of the largest score and one of the sum with its logarithm; of one query the reference may by
    luck lose next to nothing.
    """
    seen = truth.isfinite()
    assert torch.equal(ours.isfinite(), seen), what
    if bool(seen.any()):
        truth = truth[seen]
        error = (ours[seen].double() - truth).abs().max()
        lost = (reference[seen].double() - truth).abs().max()
        budget = 2 * lost + roundings * torch.finfo(ours.dtype).eps / 2 * truth.abs().max()
        assert error <= budget, f"{what}: {error:.3g} > {budget:.3g} (the reference loses {lost:.3g})"


@dataclasses.dataclass
class Call:
    """One attention call: a store with ``length`` tokens in it and queries for the last of them."""

    program: Program
    length: int
    queries: int
    batch: int = 2
    groups: int = 2

    def __post_init__(self) -> None:
        p = self.program
        capacity = (self.length // p.form.group + 2) * p.form.group
        self.state = poisoned(p.form, self.batch, self.groups, capacity, (p.key_size, p.value_size), p.dtype)
        self.key = fresh(self.batch, self.groups, self.length, p.key_size, p.dtype)
        self.value = fresh(self.batch, self.groups, self.length, p.value_size, p.dtype)
        STORE(*self.state, torch.tensor(0), self.key, self.value, p.form.name)
        self.query = fresh(self.batch, self.groups * p.ratio, self.queries, p.key_size, p.dtype)
        self.mask = None
        if p.predicate.key_mask:
            # Left padding in the first entry, a hole in the last; beyond the length the mask says True on purpose.
            self.mask = torch.ones(self.batch, capacity, dtype=torch.bool)
            self.mask[0, : self.length // 3] = False
            self.mask[-1, self.length // 2 : self.length // 2 + 2] = False

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        return ATTEND(  # type: ignore[no-any-return]
            self.query,
            *self.state,
            torch.tensor(self.length),
            self.mask,
            p.form.name,
            self.scale,
            p.predicate.causal,
            window,
        )

    @property
    def scale(self) -> float:
        return float(self.program.key_size**-0.5)

    def check(self) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        truth = exact(self.query, self.state, self.length, self.mask, p.form, self.scale, p.predicate)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert_within_budget(out, reference, truth[0], what)
        assert_within_budget(lse, reference_lse, truth[1], f"lse of {what}", roundings=2)
        assert not out[truth[1].isinf()].any(), what


def queries_for(program: Program, length: int) -> list[int]:
    """One row and the most rows that fit the phase, for each length."""
    most = DECODE_ROWS // program.ratio
    counts = (1, most) if program.phase == "decode" else (most + 1, min(length, 70))
    return sorted({n for n in counts if Program.phase_for(n, program.ratio) == program.phase and n <= length})


@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_attend(program: Program) -> None:
    for length in LENGTHS:
        for queries in queries_for(program, length):
            Call(program, length, queries).check()


@pytest.mark.parametrize("program", ALL, ids=lambda p: p.name)
def test_store_and_load(program: Program) -> None:
    """Bit for bit: whole, in pieces, and one by one; and read back."""
    form, sizes, dtype = program.form, (program.key_size, program.value_size), program.dtype
    length = 2 * form.slots + 37
    capacity = (length // form.group + 1) * form.group
    key, value = (fresh(2, 2, length, size, dtype) for size in sizes)
    expected = poisoned(form, 2, 2, capacity, sizes, dtype)
    with ops.reference_only():
        STORE(*expected, torch.tensor(0), key, value, form.name)
    for pieces in ([length], [1, 63, length - 64], [form.group] * (length // form.group), [1] * length):
        state = poisoned(form, 2, 2, capacity, sizes, dtype)
        done = 0
        for n in [*pieces, length - sum(pieces)]:
            STORE(*state, torch.tensor(done), key[:, :, done : done + n], value[:, :, done : done + n], form.name)
            done += n
        assert_same(state, expected)
    for n in (0, 1, form.residual, form.slots, length):
        if form.packed(n) == form.packed(length) or form.dense:  # earlier groups are gone from the ring
            with ops.reference_only():
                theirs = LOAD(*expected, torch.tensor(n), form.name)
            for ours, wanted in zip(LOAD(*expected, torch.tensor(n), form.name), theirs, strict=True):
                assert torch.equal(bits(ours), bits(wanted))


BASE = Program("decode", KVForm(), Predicate(), torch.float32, 3, 64, 64)
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


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product(BITS, repeat=2)))
def test_attend_every_mix(phase: Any, dtype: torch.dtype, key_bits: int, value_bits: int) -> None:
    program = Program(phase, KVForm(key_bits, value_bits), Predicate(), dtype, 3, 64, 64)
    for length in (*LENGTHS, 1111):
        for queries in queries_for(program, length):
            Call(program, length, queries).check()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("width", [256, 1], ids=["avx2", "no vectors"])
def test_other_instruction_sets(width: int) -> None:
    """The parts are written for any vector width: AVX2, and at::vec without intrinsics in place of other CPUs."""
    from torch._inductor import config

    if width == 256 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    with config.patch({"cpp.simdlen": width}):
        programs = [
            BASE,
            Program("prefill", KVForm(8, 4, 16, 0), Predicate(), torch.bfloat16, 2, 72, 80),
            Program("decode", KVForm(2, 3, 32, 0), Predicate(), torch.float32, 3, 64, 64),
            Program("prefill", KVForm(3, 2, 16, 0), Predicate(), torch.bfloat16, 2, 72, 80),
        ]
        cpp.prebuild(p for program in programs for p in (program, store_of(program)))
        for program in programs:
            for length in (65, 500):
                for queries in queries_for(program, length):
                    Call(program, length, queries).check()
            test_store_and_load(program)


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
  static constexpr bool adjacent = false;
  static constexpr int ratio = 3;
  static constexpr bool causal = true;
  static constexpr int64_t window = 512;
  static constexpr bool key_mask = false;
};
}  // namespace

extern "C" int64_t attend(const ec::AttendArgs* args) { return ec::decode<P>(*args); }
"""
    )

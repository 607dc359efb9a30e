"""Score parts: soft cap, bias and sinks. The reference body against fp64, and the C++ kernels against both."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cpp_calls import BASE, Call, assert_within_budget, check_attend, fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairwise
from stores import dequantised
from torch import Tensor

from effcompile.kernels import attention, ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.lowering import cpp

CAP, BIAS, SINK = ScoreParts(softcap=True), ScoreParts(bias=True), ScoreParts(sinks=True)
ALL = ScoreParts(True, True, True)

pytestmark = pytest.mark.usefixtures("no_fallback", "build_ahead")


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in fp64, spelled as the models do: the sink is a column of its own, cut off after the softmax.

    Keys ``[B, G, S, D]``, ``keep`` ``[B, T, S]``; one batch entry and head at a time. A row whose softmax is nan, which
    has neither key nor sink, is 0.
    """
    batch, heads, queries, _ = query.shape
    ratio, length = heads // key.shape[1], key.shape[2]
    out = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        s = query[b, h].double() @ key[b, h // ratio].double().T * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias.double()[b % bias.shape[0], h % bias.shape[1], :, :length]
        s = torch.where(keep[b], s, float("-inf"))
        if sinks is not None:
            s = torch.cat([s, sinks[h].double().expand(queries, 1)], 1)
        lse[b, h] = s.logsumexp(1)
        out[b, h] = s.softmax(1).nan_to_num(0)[:, :length] @ value[b, h // ratio].double()
    return out, lse


def operands(parts: ScoreParts, shape: tuple[int, int, int, int], dtype: torch.dtype, spread: float = 1.0) -> Any:
    """Values of the parts for a bias of ``shape``, and sinks for its heads; a cap that bends the scores."""
    made: dict[str, Any] = {}
    if parts.softcap:
        made["softcap"] = 1.5 * spread
    if parts.bias:
        made["bias"] = (torch.randn(shape) * 2 * spread).to(dtype)
    return made


def visible(p: Predicate, queries: int, length: int, mask: Tensor | None, batch: int) -> Tensor:
    """Bool ``[B, T, S]``, one query at a time: written apart from the reference body."""
    keep = torch.ones(batch, queries, length, dtype=torch.bool)
    for t in range(queries):
        position = length - queries + t
        if p.window is not None:
            keep[:, t, : max(0, position - p.window + 1)] = False
        if p.causal:
            keep[:, t, position + 1 :] = False
    return keep if mask is None else keep & mask[:, None, :length]


BROADCAST = [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0)]
"""Which of batch, heads and queries a bias has (1) or is the same for (0)."""


@settings(deadline=None, max_examples=60)
@given(
    parts=st.builds(ScoreParts, st.booleans(), st.booleans(), st.booleans()),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9)),
    given=st.sampled_from(BROADCAST),
    spread=st.sampled_from([0.1, 1.0, 20.0]),
    causal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_reference_is_the_formula(
    parts: ScoreParts, sizes: tuple[int, ...], given: tuple[int, ...], spread: float, causal: bool, seed: int
) -> None:
    """In fp64 the reference differs from the models' spelling by fp32 roundings: of the largest score, and of sums."""
    batch, groups, ratio, queries, more = sizes
    torch.manual_seed(seed)
    heads, length = groups * ratio, queries + more
    query, key, value = (
        torch.randn(batch, n, t, 16) for n, t in ((heads, queries), (groups, length), (groups, length))
    )
    shape = tuple(n if on else 1 for n, on in zip((batch, heads, queries), given))
    values = operands(parts, (*shape, length + 3), torch.float32, spread)
    if parts.sinks:
        values["sinks"] = torch.randn(heads) * 3 * spread
    predicate = Predicate(causal)
    mask = torch.rand(batch, length) > 0.3
    keep = attention.allowed(predicate, queries, length, mask, query.device)
    out, lse = attention.attend(query, key, value, keep, spread, **values)
    wanted, wanted_lse = exact(query, key, value, visible(predicate, queries, length, mask, batch), spread, **values)
    blind = wanted_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    # fp32 roundings: 16 of the sum over channels, and 8 of what follows, of the largest numbers that meet there.
    largest = spread * 16 * query.abs().amax() * key.abs().amax() + 8 * spread + lse[~blind].abs().sum()
    error = (16 + 8) * 2**-24 * float(largest)
    torch.testing.assert_close(lse[~blind].double(), wanted_lse[~blind], rtol=0, atol=error)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2 * error * float(value.abs().max()) + 1e-6)
    assert not out[blind].any()


def test_a_row_that_sees_no_key_is_its_sink() -> None:
    keep = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16)
    sinks = torch.tensor([1.0, -2.0, 0.0, float("-inf")])
    out, lse = attention.attend(q, k, k, keep, 1.0, sinks=sinks)
    assert not out.any()
    assert torch.equal(lse, sinks[None, :, None].expand(2, 4, 3))


# C++

FACTORS: dict[str, tuple[Any, ...]] = {
    "score": (CAP, BIAS, SINK, ALL, ScoreParts(True, False, True)),
    "phase": ("decode", "prefill"),
    "form": (KVForm(4, 4, 16, 0), KVForm(16, 16), KVForm(3, 8, 16, 32)),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "rule": (Predicate(), Predicate(window=40, key_mask=True), Predicate(False, None, True)),
    "ratio": (1, 3, 4),
    "sizes": ((64, 64), (72, 80)),
}


def program_of(row: dict[str, Any]) -> Program:
    return Program(
        row["phase"], row["form"], row["rule"], row["dtype"], row["ratio"], *row["sizes"], score=row["score"]
    )


PROGRAMS = [program_of(row) for row in pairwise(**FACTORS)]
CASES = [pytest.param(p, marks=[pytest.mark.slow] * (i >= 6)) for i, p in enumerate(PROGRAMS)]


class Scored(Call):
    """A call with values for the parts of its program."""

    def __post_init__(self) -> None:
        super().__post_init__()
        p, heads = self.program, self.groups * self.program.ratio
        given = BROADCAST[self.length % len(BROADCAST)]
        shape = tuple(n if on else 1 for n, on in zip((self.batch, heads, self.queries), given))
        dtype = torch.float32 if self.length % 2 else p.dtype
        self.values = operands(p.score, (*shape, self.length + 7), dtype)
        if p.score.sinks:
            self.values["sinks"] = torch.linspace(-2, 4, heads).to(p.dtype)

    def attend(self) -> tuple[Tensor, Tensor]:
        p = self.program
        window = -1 if p.predicate.window is None else p.predicate.window
        head = (self.query, *self.state, torch.tensor(self.length), self.mask)
        rest = (p.form.name, self.scale, p.predicate.causal, window)
        made: tuple[Tensor, Tensor] = torch.ops.effcompile.attend.default(*head, *rest, **self.values)
        return made

    def check(self) -> None:
        p = self.program
        out, lse = self.attend()
        with ops.reference_only():
            reference, reference_lse = self.attend()
        sides = ops.split_state(tuple(self.state))
        key, value = (dequantised(s, self.length, p.form, kind) for s, kind in zip(sides, ("key", "value")))  # type: ignore[arg-type]
        keep = visible(p.predicate, self.queries, self.length, self.mask, self.batch)
        truth, truth_lse = exact(self.query, key, value, keep, self.scale, **self.values)
        what = f"{p.name}, {self.queries} queries on {self.length} keys"
        assert_within_budget(out, reference, truth, what)
        assert_within_budget(lse, reference_lse, truth_lse, f"lse of {what}", roundings=2)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("program", CASES, ids=lambda p: p.name)
def test_cpp(program: Program) -> None:
    check_attend(program, call=Scored)


def test_cpp_merges_parts_with_a_sink() -> None:
    """Many parts by two threads: the sink counts once."""
    program = dataclasses.replace(BASE, score=ALL)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Scored(program, 5000, 1, batch=1).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4, float("-inf")])
def test_cpp_sinks_of_any_size(sink: float) -> None:
    """A sink that takes everything leaves 0, one that takes nothing is as none; and where no key is seen."""
    call = Scored(dataclasses.replace(BASE, form=KVForm(16, 16), score=SINK), 65, 1)
    call.values["sinks"] = torch.full((6,), sink)
    for length in (65, 0):
        call.length = length
        out, lse = call.attend()
        with ops.reference_only():
            wanted, wanted_lse = call.attend()
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)


def test_cpp_a_bias_that_hides() -> None:
    """-inf and the lowest number, as masks in models have them; and a row of nothing else."""
    call = Scored(dataclasses.replace(BASE, form=KVForm(16, 16), score=BIAS), 65, 2)
    bias = torch.zeros(2, 1, 2, 65)
    bias[0, :, 0, :40], bias[1, :, 1] = float("-inf"), float("-inf")
    bias[1, :, 0, :30] = torch.finfo(torch.float32).min
    call.values["bias"] = bias
    out, lse = call.attend()
    with ops.reference_only():
        wanted, wanted_lse = call.attend()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)
    assert not out[1, :, 1].any()
    assert lse[1, :, 1].eq(float("-inf")).all()


def test_cpp_declines_operands_that_do_not_fit() -> None:
    for score, wrong, text in (
        (SINK, {"sinks": torch.zeros(5)}, r"sinks of \(5,\) for 6 heads"),
        (BIAS, {"bias": torch.zeros(2, 1, 1, 64)}, r"a bias of \(2, 1, 1, 64\)"),
        (BIAS, {"bias": torch.zeros(6, 1, 65)}, r"a bias of \(6, 1, 65\)"),
    ):
        call = Scored(dataclasses.replace(BASE, form=KVForm(16, 16), score=score), 65, 1)
        args = (call.query, *call.state, torch.tensor(65), None, "k16v16g32r128", 1.0, True, -1)
        with pytest.raises(ops.KernelUnavailable, match=text):
            cpp.attend(*args, **wrong)


def test_names_and_source() -> None:
    """Parts are in the name and in the source; a program without them has neither."""
    program = dataclasses.replace(BASE, score=ALL)
    assert program.name == BASE.name + "_cap_bias_sink"
    assert "bool softcap = true, bias = true, sinks = true, segments = false, prefix = false;" in cpp.source(program)
    assert "score" not in cpp.source(BASE)


def test_any_layout_of_a_bias() -> None:
    """Expanded, transposed, or in the model's dtype: the same numbers."""
    call = Scored(dataclasses.replace(BASE, form=KVForm(16, 16), score=BIAS), 65, 2)
    narrow = fresh(2, 6, 70, 2, torch.bfloat16).transpose(2, 3)
    call.values["bias"] = narrow.float().contiguous()
    wanted = call.attend()
    for other in (narrow, narrow.float(), narrow.float()[..., :65]):
        call.values["bias"] = other
        assert all(torch.equal(a, b) for a, b in zip(call.attend(), wanted))
    call.values["bias"] = narrow.float()[:1, :1].expand(2, 6, 2, 70)
    same = call.attend()
    call.values["bias"] = narrow.float()[:1, :1]
    assert all(torch.equal(a, b) for a, b in zip(call.attend(), same))

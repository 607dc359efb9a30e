"""Packed sequences and prefixes in the Triton attention programs: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from test_triton_aot import CHIPS, check
from test_triton_kernels import divides, empty, name_of, reference_store, tokens
from triton_calls import assert_within_budget

from effcompile import lowering as all_lowerings
from effcompile.kernels import attention, ops, quantize
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.lowering import triton as lowering
from effcompile.lowering.triton_build import build

SEG, PRE = Predicate(segments=True), Predicate(prefix=True)
BOTH = Predicate(key_mask=True, segments=True, prefix=True)
AXES: dict[str, list[Any]] = {
    "rule": [SEG, PRE, BOTH, Predicate(window=40, segments=True), Predicate(causal=False, segments=True)],
    "form": [KVForm(16, 16), KVForm(4, 4, 32, 32), KVForm(8, 3, 32, 0)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "queries": [1, 3, 70],
    "length": [75, 300],
}
FEWER = {"form": AXES["form"][:2], "dtype": AXES["dtype"][::2], "queries": [1, 70]}
CASES = pairwise(**AXES | FEWER, sizes=[(64, 64)], ratio=[3], bias=[False])
MORE_CASES = [
    case
    for case in pairwise(**AXES | {"length": [70, 200, 300]}, sizes=[(64, 64), (80, 96), (128, 128)], ratio=[1, 4],
                         bias=[False, True])
    if divides(case["form"], case["sizes"])
]  # fmt: skip


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def few_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lowering, "splits_for", lambda heads, capacity, _: max(1, min(3, capacity // 128)))

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        form, sizes, dtype, rule = case["form"], case["sizes"], case["dtype"], case["rule"]
        queries, length, heads = case["queries"], case["length"], 2 * case["ratio"]
        capacity = (length // form.group + 4) * form.group
        state = empty(form, 2, 2, capacity, sizes, dtype)
        key, value = (tokens(2, length, 2, size, dtype, seed) for seed, size in enumerate(sizes))
        reference_store(*state, torch.tensor(0), key, value, form.name)
        query = tokens(2, queries, heads, sizes[0], dtype, 2)
        mask = torch.rand(2, capacity) > 0.3 if rule.key_mask else None
        ids, first, scale = None, None, sizes[0] ** -0.5 / 6
        if rule.segments:
            # Numbers that differ only beyond 32 bits, a sequence in pieces, one row for all if the length is odd.
            ids = (torch.arange(capacity) // 29 * 2**40).expand(2, -1).clone()
            ids[-1, ::3] = 7
            ids = ids[:1] if length % 2 else ids
        if rule.prefix:
            first = torch.tensor([length // 2, 2**40] if queries > 1 else [length // 3, -5])
        parts = {"bias": torch.randn(1, heads, 1, capacity)} if case["bias"] else {}
        window = -1 if rule.window is None else rule.window
        args = (query, *state, torch.tensor(length), mask, form.name, scale, rule.causal, window)
        out, lse = lowering.attend(*args, **parts, segments=ids, prefix=first)
        keys, values = ops.split_state(tuple(state))
        k, v = (quantize.load_side(s, length, form, kind) for s, kind in ((keys, "key"), (values, "value")))
        seen = attention.allowed(rule, queries, length, mask, query.device, ids, first)
        assert_within_budget(out, lse, query, k, v, seen, scale, **parts)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_CASES, ids=name_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, Any]) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case)

    def test_operands_that_do_not_fit(self) -> None:
        state = empty(KVForm(16, 16), 2, 2, 64, (64, 64), torch.float32)
        args = (torch.zeros(2, 4, 1, 64), *state, torch.tensor(3), None, "k16v16g32r128", 1.0, True)
        for wrong in ({"segments": torch.zeros(2, 63)}, {"segments": torch.zeros(3, 64)}, {"prefix": torch.zeros(3)}):
            with pytest.raises(ops.KernelUnavailable, match=r"(segments|a prefix) of"):
                lowering.attend(*args, -1, **wrong)
        with pytest.raises(ops.KernelUnavailable, match="a prefix and a window"):
            lowering.attend(*args, 9, prefix=torch.zeros(1))


def program(**parts: Any) -> Program:
    return Program(**{"phase": "prefill", "form": KVForm(4, 4), "predicate": BOTH, "dtype": torch.bfloat16, "ratio": 4,
                      "key_size": 128, "value_size": 128} | parts)  # fmt: skip


AHEAD = [(program(predicate=SEG), "sm_90"), (program(form=KVForm(16, 16), predicate=PRE), "sm_80")]
MORE_AHEAD = [(program(phase="decode"), "sm_90"), (program(form=KVForm(16, 16)), "gfx942")]
MORE_AHEAD += [
    (program(phase=c["phase"], form=c["form"], predicate=c["rule"], dtype=c["dtype"], score=c["score"]), c["chip"])
    for c in pairwise(
        chip=CHIPS, phase=["decode", "prefill"], rule=[SEG, PRE, BOTH], form=[KVForm(16, 16), KVForm(4, 4)],
        dtype=[torch.bfloat16, torch.float32], score=[ScoreParts(), ScoreParts(True, False, True)],
    )
]  # fmt: skip


class TestAhead:
    __test__ = not INTERPRETED

    @pytest.mark.parametrize(("program", "chip"), AHEAD, ids=lambda v: getattr(v, "name", str(v)))
    def test_fits_a_chip(self, program: Program, chip: str) -> None:
        check(program, chip)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("program", "chip"), MORE_AHEAD, ids=lambda v: getattr(v, "name", str(v)))
    def test_fits_more(self, program: Program, chip: str) -> None:
        check(program, chip)

    @pytest.mark.parametrize("phase", ["decode", "prefill"])
    def test_only_these_rules_ask_for_them(self, phase: str) -> None:
        def text(rule: Predicate) -> str:
            return Path(build(program(phase=phase, predicate=rule), "sm_90").path).read_text()

        for rule, word in ((SEG, "segments"), (PRE, "prefix")):
            assert word in text(rule)
            assert word not in text(Predicate(key_mask=True))
            assert all_lowerings.refusal(program(predicate=rule), "cuda") is None
        assert "a prefix and a window" in str(
            all_lowerings.refusal(program(predicate=Predicate(True, 9, prefix=True)), "cuda")
        )

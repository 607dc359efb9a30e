"""Operators that fix neurons by the prompt: votes counted in Python beside them, choices, and what is forgotten."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile.kernels import ops
from effcompile.kernels.core_ops import CHOOSE_CORE, CORE_LIST, CORE_VOTES, votes_reference
from effcompile.lowering import cpp_ffn


def brute(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> list[list[int]]:
    """Votes, token by token."""
    said = hidden.double().reshape(rows, -1, hidden.shape[-1])
    votes = [[0] * hidden.shape[-1] for _ in range(rows)]
    for row, tokens in enumerate(said.tolist()):
        for place, token in enumerate(tokens):
            if counted is not None and not counted[row % counted.shape[0], place]:
                continue
            size = [abs(x) if magnitude else x for x in token]
            positive = [n for n, x in enumerate(size) if x > 0]
            for n in sorted(positive, key=lambda n: (-size[n], n))[: int(alpha * len(positive))]:
                votes[row][n] += 1
    return votes


def said_of(rows: int, tokens: int, neurons: int, dtype: torch.dtype) -> Tensor:
    """Numbers that tie and vanish often, some not finite."""
    hidden = torch.randn(rows, tokens, neurons)
    coarse = (2 * hidden[:, ::2]).round() / 2
    hidden[:, ::2] = coarse
    if neurons > 3:
        hidden[0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
        hidden[-1, -1] = -hidden[-1, -1].abs()
    return hidden.to(dtype)


CASES = [
    (rows, tokens, neurons, counted)
    for rows, tokens, neurons in ((1, 1, 1), (1, 5, 63), (2, 9, 96), (3, 7, 65), (2, 3, 500))
    for counted in ("all", "some", "shared")
]


def counted_of(kind: str, rows: int, tokens: int) -> Tensor | None:
    return None if kind == "all" else torch.rand(rows if kind == "some" else 1, tokens) > 0.3


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_votes(alpha: float, dtype: torch.dtype) -> None:
    for rows, tokens, neurons, kind in CASES:
        hidden, counted = said_of(rows, tokens, neurons, dtype), counted_of(kind, rows, tokens)
        for magnitude in (False, True):
            expected = brute(hidden, counted, rows, alpha, magnitude)
            for run in (CORE_VOTES, votes_reference):
                for shape in (hidden, hidden.flatten(0, 1)):
                    got = run(shape, counted, rows, alpha, magnitude)
                    assert got.dtype is torch.int32
                    assert got.tolist() == expected


def test_a_share_of_a_count_is_that_of_python() -> None:
    """0.7 of 10 is 7, which a product in fp32 misses, and 0.29 of 100 is 28, which one that is rounded misses."""
    for alpha, positive in ((0.7, 10), (0.29, 100)):
        hidden = torch.ones(1, 1, 128)
        hidden[..., positive:] = -1
        expected = int(alpha * positive)
        for run in (CORE_VOTES, votes_reference):
            assert int(run(hidden, None, 1, alpha, False).sum()) == expected


def test_it_is_launched_on_cpus() -> None:
    assert ops._launchers["core_votes", "cpu"] is cpp_ffn.core_votes


@pytest.mark.usefixtures("no_fallback")
def test_threads_share_the_tokens() -> None:
    hidden = said_of(3, 41, 130, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = CORE_VOTES(hidden, None, 3, 0.4, False)
    finally:
        torch.set_num_threads(before)
    assert got.tolist() == brute(hidden, None, 3, 0.4, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(5, 4), None, 2, 0.4, False), "5 tokens, which are not those of 2 texts"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3), 2, 0.4, False), r"should be bool \[B or 1, T\]"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 4).bool(), 2, 0.4, False), r"should be \(2, 3\)"),
        ((torch.zeros(2, 3, 4), None, 2, 1.5, False), r"alpha is 1\.5"),
    ],
)
def test_what_does_not_fit_is_told(given: Any, said: str) -> None:
    for run in (CORE_VOTES, votes_reference):
        with pytest.raises(ValueError, match=said):
            run(*given)


def state(rows: int = 3, neurons: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return *(torch.zeros(rows, neurons, dtype=torch.int32) for _ in range(2)), torch.zeros(2, dtype=torch.int64)


def at(place: int) -> Tensor:
    return torch.tensor(place)


def test_a_text_begins_and_goes_on() -> None:
    votes, core, text = state()
    votes.fill_(9)
    new = torch.tensor([[0, 2, 1, 2, 0, 2], [0, 0, 0, 0, 0, 3]], dtype=torch.int32)
    CHOOSE_CORE(votes, core, text, new, at(0), 3, 3)
    # What was there before a text is gone; of those without votes the first are kept.
    assert votes.tolist() == [*new.tolist(), [9] * 6]
    assert core.tolist() == [[1, 3, 5, -1, -1, -1], [0, 1, 5, -1, -1, -1], [0] * 6]
    assert text.tolist() == [3, 2]
    more = torch.tensor([[5, 0, 2, 0, 0, 0], [0, 0, 0, 1, 1, 0]], dtype=torch.int32)
    CHOOSE_CORE(votes, core, text, more, at(3), 2, 3)
    assert votes[:2].tolist() == (new + more).tolist()
    assert core[:2].tolist() == [[0, 1, 2, -1, -1, -1], [3, 4, 5, -1, -1, -1]]
    assert text.tolist() == [5, 2]
    for place in (5, 6):
        assert torch.equal(CORE_LIST(text, core, at(place), 2), core[:2])
        assert text.tolist() == [place + 1, 2]


EVERYTHING = [list(range(6))]


@pytest.mark.parametrize(("place", "rows"), [(6, 2), (4, 2), (0, 2), (5, 1), (5, 3)])
def test_another_text_is_not_taken_for_this_one(place: int, rows: int) -> None:
    """A place not reached, or passed, or as many rows as another batch has: all neurons, until a text begins."""
    votes, core, text = state()
    CHOOSE_CORE(votes, core, text, torch.ones(2, 6, dtype=torch.int32), at(0), 5, 2)
    assert CORE_LIST(text, core, at(place), rows).tolist() == EVERYTHING * rows
    for later in range(place + 1, place + 9):
        assert CORE_LIST(text, core, at(later), rows).tolist() == EVERYTHING * rows
    CHOOSE_CORE(votes, core, text, torch.ones(2, 6, dtype=torch.int32), at(0), 5, 2)
    assert CORE_LIST(text, core, at(5), 2).tolist() == [[0, 1, -1, -1, -1, -1]] * 2


@pytest.mark.parametrize(("place", "rows"), [(6, 2), (4, 2), (5, 1)])
def test_tokens_whose_beginning_was_not_seen_choose_nothing(place: int, rows: int) -> None:
    votes, core, text = state()
    one = torch.ones(rows, 6, dtype=torch.int32)
    CHOOSE_CORE(votes, core, text, one, at(7), 3, 2)  # nothing was seen at all
    assert CORE_LIST(text, core, at(10), rows).tolist() == EVERYTHING * rows
    CHOOSE_CORE(votes, core, text, torch.ones(2, 6, dtype=torch.int32), at(0), 5, 2)
    CHOOSE_CORE(votes, core, text, one, at(place), 3, 2)
    assert CORE_LIST(text, core, at(place + 3), rows).tolist() == EVERYTHING * rows


def test_opcheck() -> None:
    hidden, counted = torch.randn(2, 5, 6), torch.rand(2, 5) > 0.5
    torch.library.opcheck(CORE_VOTES, (hidden, counted, 2, 0.4, True))
    votes, core, text = state()
    torch.library.opcheck(CHOOSE_CORE, (votes, core, text, votes[:2] + 1, at(0), 5, 2))
    torch.library.opcheck(CORE_LIST, (text, core, at(5), 2))
    for op, written in ((CHOOSE_CORE, ["votes", "core", "text"]), (CORE_LIST, ["text"])):
        assert [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write] == written

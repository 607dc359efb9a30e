"""The router of token ids: beside the same block written token by token in fp64; chunks, steps, and what it forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile.kernels.token_router import ROUTE_TOKENS, TENSORS, check_router

SIZE, HEADS, HIDDEN, IDS, EXPERTS = 24, 2, 20, 40, 8


def router_of(seed: int = 0, experts: int = EXPERTS) -> dict[str, Tensor]:
    """Random tensors, large enough for attention to matter; ids 30 and up share a row."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding": (31, SIZE), "norm": (SIZE,), "qkv": (3 * SIZE, SIZE), "out": (SIZE, SIZE), "ffn_norm": (SIZE,),
        "gate_up": (2 * HIDDEN, SIZE), "down": (SIZE, HIDDEN), "head_norm": (SIZE,), "head": (experts, SIZE),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=g) * (1 if len(shape) == 1 else 0.5) for name, shape in shapes.items()}
    return made | {"rows": torch.arange(IDS, dtype=torch.int32).clamp(max=30)}


def brute(
    ids: Tensor, counted: Tensor | None, router: Mapping[str, Tensor], heads: int, window: int, first: int = 0
) -> Tensor:
    """Logits ``[B, T, E]`` in fp64, one token after another: each sees those before it that count, and itself.

    ``first`` is the place of the first token.
    """
    w = {name: t.double() if t.is_floating_point() else t for name, t in router.items()}
    size = w["embedding"].shape[1] // heads

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * scale

    def turn(x: Tensor, place: int) -> Tensor:
        out = x.clone()
        for i in range(size // 2):
            angle = place * 10_000.0 ** (-2 * i / size)
            a, b = x[i], x[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    said = torch.zeros(*ids.shape, w["head"].shape[0], dtype=torch.float64)
    for row, text in enumerate(ids.tolist()):
        kept: list[tuple[int, list[Tensor], list[Tensor]]] = []
        for place, token in enumerate(text):
            x = w["embedding"][w["rows"][token]]
            query, key, val = (w["qkv"] @ norm(x, w["norm"])).chunk(3)
            keys = [turn(k, first + place) for k in key.split(size)]
            kept.append((place, keys, list(val.split(size))))
            near = [
                entry for entry in kept
                if place - entry[0] < window
                and (entry[0] == place or counted is None or bool(counted[row % len(counted), entry[0]]))
            ]  # fmt: skip
            heard = []
            for head, part in enumerate(query.split(size)):
                scores = torch.stack([turn(part, first + place) @ k[head] for _, k, _ in near]) / math.sqrt(size)
                heard.append(scores.softmax(0) @ torch.stack([v[head] for _, _, v in near]))
            x = x + w["out"] @ torch.cat(heard)
            gate, up = (w["gate_up"] @ norm(x, w["ffn_norm"])).chunk(2)
            x = x + w["down"] @ (gate * torch.sigmoid(gate) * up)
            said[row, place] = w["head"] @ norm(x, w["head_norm"])
    return said


class Text:
    """The operator with a state of its own."""

    def __init__(self, window: int, texts: int = 3, seed: int = 0) -> None:
        self.router = router_of(seed)
        self.keys, self.values = (torch.zeros(texts, window, SIZE) for _ in range(2))
        self.seen, self.text = torch.zeros(texts, window, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)

    def __call__(self, ids: Tensor, at: int, counted: Tensor | None = None) -> list[int]:
        state = self.keys, self.values, self.seen, self.text
        made = ROUTE_TOKENS(ids, counted, [self.router[n] for n in TENSORS], *state, torch.tensor(at), HEADS)
        assert made.dtype is torch.int32
        assert made.shape == (ids.numel(), 1)
        found: list[int] = made[:, 0].tolist()
        return found


def expected(ids: Tensor, counted: Tensor | None, window: int, first: int = 0) -> Tensor:
    """The experts ``[B, T]``; the texts are such that none is near a tie."""
    said = brute(ids, counted, router_of(), HEADS, window, first)
    best = said.sort(-1).values
    assert (best[..., -1] - best[..., -2]).min() > 1e-4
    assert len(said.argmax(-1).unique()) > 3
    return said.argmax(-1)


def texts(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, IDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["all", "left", "shared", "holes"])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_it_is_the_block_token_by_token(window: int, kind: str) -> None:
    """As a whole, in chunks of any length, and in steps; longer than the window, and shorter."""
    ids, counted = texts(2, 23), torch.ones(2, 23, dtype=torch.bool)
    counted[0, :9] = False
    if kind == "shared":
        counted = counted[:1]
    elif kind == "holes":
        counted[1, torch.tensor([0, 4, 5, 17])] = False
    given = None if kind == "all" else counted
    wanted = expected(ids, given, window)
    for sizes in ((23,), (9, 14), (1, 2, 20), (20, 1, 1, 1), (1,) * 23):
        text, place = Text(window), 0
        for part, mask in zip(ids.split(sizes, 1), counted.split(sizes, 1), strict=True):
            got = text(part, place, None if given is None else mask)
            assert got == wanted[:, place : place + part.shape[1]].flatten().tolist()
            place += part.shape[1]
        assert text.text.tolist() == [23, 2, 0]


def test_a_text_in_one_row_of_more_room() -> None:
    """Rows of the state that are not used stay, and a text that begins sees nothing of the one before."""
    ids, text = texts(1, 12), Text(5, texts=3)
    text.keys[1:] = text.values[1:] = 7
    wanted = expected(ids, None, 5).flatten().tolist()
    for _ in range(2):
        assert text(ids, 0) == wanted
    assert bool((text.keys[1:] == 7).all() and (text.values[1:] == 7).all())
    assert not bool(text.seen[1:].any())


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(("place", "rows"), [(9, 2), (7, 2), (8, 1), (8, 3)])
def test_another_text_is_not_taken_for_this_one(place: int, rows: int, tokens: int) -> None:
    """A place not reached, or passed, or another number of texts: the call's own tokens alone, and it is counted."""
    before, after = texts(2, 8), texts(rows, 16, 2)
    text = Text(64)
    text(before, 0)
    wanted = brute(after, None, router_of(), HEADS, 64, place).argmax(-1)
    assert text(after[:, :tokens], place) == wanted[:, :tokens].flatten().tolist()
    assert text.text.tolist() == [place + tokens, rows, 1]
    # What follows goes on with these.
    assert text(after[:, tokens:], place + tokens) == wanted[:, tokens:].flatten().tolist()
    assert text.text.tolist() == [place + 16, rows, 1]
    # And what was before would have told.
    other = brute(torch.cat([before[:1], after[:1]], 1), None, router_of(), HEADS, 64)[0, 8:].argmax(-1)
    assert other.tolist() != wanted[0].tolist()


@pytest.mark.slow
def test_any_size_is_one_program() -> None:
    """Sizes that are symbols."""
    compiled = torch.compile(ROUTE_TOKENS, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows, tokens in ((2, 23), (3, 7)):
            text, ids = Text(5), texts(rows, tokens)
            state = text.keys, text.values, text.seen, text.text
            got = compiled(ids, None, [text.router[n] for n in TENSORS], *state, torch.tensor(0), HEADS)
            assert got[:, 0].tolist() == brute(ids, None, router_of(), HEADS, 5).argmax(-1).flatten().tolist()


def test_opcheck() -> None:
    text = Text(5)
    for ids in (texts(2, 7), texts(2, 1)):
        state = text.keys, text.values, text.seen, text.text
        counted = torch.rand(ids.shape) > 0.5
        torch.library.opcheck(
            ROUTE_TOKENS, (ids, counted, [text.router[n] for n in TENSORS], *state, torch.tensor(0), HEADS),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    written = [a.name for a in ROUTE_TOKENS._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["keys", "values", "seen", "text"]


def test_what_does_not_fit_is_told() -> None:
    assert check_router(router_of(), HEADS) == EXPERTS
    for change, said in (
        ({"head": torch.zeros(3, 5)}, r"head of the router is \(3, 5\), and should be \(3, 24\)"),
        ({"qkv": torch.zeros(24, 24)}, r"qkv of the router is"),
        ({"rows": torch.full((IDS,), 31, dtype=torch.int32)}, "from 0 to 30"),
        ({"rows": torch.zeros(IDS)}, r"should be int32 \[V\]"),
    ):
        with pytest.raises(ValueError, match=said):
            check_router({**router_of(), **change}, HEADS)
    with pytest.raises(ValueError, match="24 channels does not have 5 heads"):
        check_router(router_of(), 5)
    without: dict[str, Any] = {name: t for name, t in router_of().items() if name != "down"}
    with pytest.raises(ValueError, match="the router has no down"):
        check_router(without, HEADS)

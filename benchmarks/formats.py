"""What few bits cost, for each pair of widths: the distance to the dense model with every token quantised.

Keys with their rotary embedding, and keys before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from common import Measured, say, shared
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache

from effcompile import smollm2
from effcompile.runtime.cache import Cache

CHUNK = 256
"""Tokens a call: whole groups, so that with no residual a call attends to packed keys only, its own among them."""
LENGTH = 1024
"""Tokens of one text: that of the reference table."""
BITS = ((8, 8), ("fp8", "fp8"), (8, 4), (4, 8), (4, 4), (3, 3), (4, 2), (2, 4), (2, 2))
"""Key and value bits that are measured."""
AXES = {
    "K8V8, keys per token": {"key_bits": 8, "value_bits": 8, "key_axis": "token"},
    "K4V4, keys per token": {"key_bits": 4, "value_bits": 4, "key_axis": "token"},
    "K4V4, values per channel": {"key_bits": 4, "value_bits": 4, "value_axis": "channel"},
}
"""Scales along the other axis, as options of a cache."""
REFERENCE = {
    "K8V8": 35.00,
    "K8V4": 35.22,
    "K4V8": 35.28,
    "K4V4": 35.78,
    "K3V3": 37.76,
    "K8V8 before RoPE": 34.99,
    "K8V4 before RoPE": 35.19,
    "K4V8 before RoPE": 35.50,
    "K4V4 before RoPE": 35.60,
    "K3V3 before RoPE": 37.51,
}
"""Perplexities of a plain PyTorch simulation of these forms on the same model and another text, 35.00 when dense."""


@dataclasses.dataclass
class Distance:
    """Sums over the tokens of a text: KL divergence from dense, surprise (both in nats), and same first choices."""

    kl: float = 0.0
    nats: float = 0.0
    same: int = 0
    count: int = 0

    def add(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> None:
        """Take in ``[T, V]`` log probabilities of ours and of the dense model for the tokens ``targets`` ``[T]``."""
        self.kl += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        self.nats += float(cross_entropy(ours, targets, reduction="sum"))
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.count += len(targets)

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(self.nats / self.count)


def log_probabilities(model: Any, cache: Any, text: Tensor) -> Iterator[Tensor]:
    """``[T, V]`` fp32 of the next token, for each call of :data:`CHUNK` tokens of ``text`` ``[1, T]``."""
    with torch.no_grad():
        for piece in text.split(CHUNK, 1):
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            yield logits[0].float().log_softmax(-1)


def distance(model: Any, cache: Any, text: Tensor, dense: list[Tensor], found: Distance) -> None:
    """Add how far the model with ``cache`` is from ``dense``, what :func:`log_probabilities` gave with a dense cache.

    The first call reads what it was given, unquantised, so it is left out, and so is the token after the last.
    """
    for index, (ours, theirs) in enumerate(zip(log_probabilities(model, cache, text), dense)):
        start = index * CHUNK
        targets = text[0, start + 1 : start + 1 + len(ours)]
        if index:
            found.add(ours[: len(targets)], theirs[: len(targets)], targets)


def run(quick: bool = False) -> list[Measured]:
    """KL, perplexity and agreement for each of :data:`BITS`, and the orders that the papers expect.

    KVTuner (section 4): keys need bits more than values. KVQuant (section 3.2): before RoPE keys need fewer of them.
    """
    model, tokenizer = shared()
    first, last = smollm2.TOPICS
    texts = smollm2.topics(tokenizer)[:, first : first + LENGTH if quick else last].split(LENGTH, 1)
    say(f"formats, {len(texts)} texts of {LENGTH} tokens: dense")
    dense = [list(log_probabilities(model, DynamicCache(config=model.config), text)) for text in texts]
    rows, kl, perplexity = [], {}, {}
    pairs = {f"K{k}V{v}".replace("fp8", "F8"): {"key_bits": k, "value_bits": v} for k, v in ((16, 16), *BITS)}
    before = {f"{name} before RoPE": form | {"rope": "pre"} for name, form in pairs.items() if name != "K16V16"}
    for name, form in (pairs | AXES | before).items():
        say(f"formats: {name}")
        found = Distance()
        for text, theirs in zip(texts, dense):
            distance(model, Cache(model, LENGTH, **form, residual=0), text, theirs, found)
        kl[name] = found.kl / found.count
        perplexity[name] = found.perplexity
        note = f"perplexity {perplexity[name]:.2f}, same first choice {found.same / found.count:.1%}"
        rows.append(Measured(f"{name}, KL to dense", 1e3 * found.kl / found.count, " mnat", note=note))
    # In 16 bits every token is what it was, so that is the dense perplexity of the same tokens.
    for name, expected in REFERENCE.items():
        away = 100 * abs(perplexity[name] / perplexity["K16V16"] / (expected / 35.00) - 1)
        rows.append(Measured(f"{name}: perplexity over dense, away from the reference", away, " %", 3.0, False))
    orders = [("K8V4", "K4V8"), ("K4V2", "K2V4"), ("K8V8", "K4V4"), ("K4V4", "K3V3"), ("K3V3", "K2V2")]
    orders += [("KF8VF8", "K4V4"), ("K4V4", "K4V4, keys per token")]
    orders += [("K3V3 before RoPE", "K3V3"), ("K2V2 before RoPE", "K2V2")]
    for better, worse in orders:
        rows.append(Measured(f"KL, {worse} over {better}", kl[worse] / kl[better], " x", 1.0))
    return rows

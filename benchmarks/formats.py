"""What few bits cost, for each pair of widths: the distance to the dense model with every token quantised.

Keys with their rotary embedding, and keys before it.
"""

from __future__ import annotations

import dataclasses
import itertools
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
BITS = ((8, 8), (8, 4), (4, 8), (4, 4), (3, 3), (4, 2), (2, 4), (2, 2))
"""Key and value bits that are measured."""


@dataclasses.dataclass
class Distance:
    """Sums over the tokens of a text: KL divergence from dense, surprise (both in nats), and same first choices."""

    kl: float = 0.0
    nats: float = 0.0
    same: int = 0
    count: int = 0


def log_probabilities(model: Any, cache: Any, text: Tensor) -> Iterator[Tensor]:
    """``[T, V]`` fp32 of the next token, for each call of :data:`CHUNK` tokens of ``text`` ``[1, T]``."""
    with torch.no_grad():
        for piece in text.split(CHUNK, 1):
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            yield logits[0].float().log_softmax(-1)


def distance(model: Any, cache: Any, text: Tensor, dense: list[Tensor]) -> Distance:
    """How far the model with ``cache`` is from ``dense``, what :func:`log_probabilities` gave with a dense cache.

    The first call reads what it was given, unquantised, so it is left out, and so is the token after the last.
    """
    found = Distance()
    for index, (ours, theirs) in enumerate(zip(log_probabilities(model, cache, text), dense)):
        start = index * CHUNK
        targets = text[0, start + 1 : start + 1 + len(ours)]
        ours, theirs = ours[: len(targets)], theirs[: len(targets)]
        if index == 0:
            continue
        found.kl += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        found.nats += float(cross_entropy(ours, targets, reduction="sum"))
        found.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        found.count += len(targets)
    return found


def run(quick: bool = False) -> list[Measured]:
    """KL, perplexity and agreement for each of :data:`BITS`, and the orders that the papers expect.

    KVTuner (section 4): keys need bits more than values. KVQuant (section 3.2): before RoPE keys need fewer of them.
    """
    model, tokenizer = shared()
    first, last = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + 1024 if quick else last]
    say(f"formats, {text.shape[1]} tokens: dense")
    dense = list(log_probabilities(model, DynamicCache(config=model.config), text))
    rows, kl = [], {}
    for (key_bits, value_bits), rope in (((16, 16), "post"), *itertools.product(BITS, ("post", "pre"))):
        name = f"K{key_bits}V{value_bits}" + (" before RoPE" if rope == "pre" else "")
        say(f"formats: {name}")
        cache = Cache(model, text.shape[1], key_bits=key_bits, value_bits=value_bits, residual=0, rope=rope)
        found = distance(model, cache, text, dense)
        kl[key_bits, value_bits, rope] = found.kl / found.count
        note = f"perplexity {math.exp(found.nats / found.count):.2f}, same first choice {found.same / found.count:.1%}"
        rows.append(Measured(f"{name}, KL to dense", 1e3 * found.kl / found.count, " mnat", note=note))
    for better, worse in (((8, 4), (4, 8)), ((4, 2), (2, 4)), ((8, 8), (4, 4)), ((4, 4), (3, 3)), ((3, 3), (2, 2))):
        what = "K{}V{} over K{}V{}".format(*worse, *better)
        rows.append(Measured(f"KL, {what}", kl[*worse, "post"] / kl[*better, "post"], " x", 1.0))
    for bits in ((3, 3), (2, 2)):
        what = "K{}V{} after RoPE over before it".format(*bits)
        rows.append(Measured(f"KL, {what}", kl[*bits, "post"] / kl[*bits, "pre"], " x", 1.0))
    return rows

"""What choosing pages loses: perplexity, KL and best tokens against attention to all keys, by masks.

``python benchmarks/page_choices.py [--first N] [--places N] [--steps N]``. The steps of a place in the text are one
call of an eager model in 32 bits, in which each token has lists of its own, made by the methods' own scores; so many
settings can be tried in the time that one takes token by token. DELTA's layers are placed by what a text before all
others keeps.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Measured, console, say, shared, table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from effcompile import smollm2
from effcompile.kernels import blocks, pages
from effcompile.kernels.form import KVForm
from effcompile.passes.delta import Delta, placement
from effcompile.passes.paged_decode import PagedDecode
from effcompile.passes.quest import Quest

DENSE, PAGE = KVForm(16, 16, 16, 0), pages.PAGE
Method = PagedDecode | None


class Masked:
    """Attention of one row in which each of the newest tokens sees the pages that ``method`` chooses for it."""

    def __init__(self, method: Method = None, own: bool = False) -> None:
        self.method, self.own = None if method is None else method.for_store(DENSE), own
        self.keep: Tensor | None = None
        self.shares: list[Tensor] = []
        """Of each layer the mass of pages, fp32 ``[T, H, nP]``, while nothing is chosen."""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        new, tokens, groups = query.shape[2], key.shape[2], key.shape[1]
        lengths = torch.arange(tokens - new + 1, tokens + 1)
        logits = query[0].unflatten(0, (groups, -1)) @ key[0, :, None].mT * scaling  # [G, R, T, S]
        logits.masked_fill_(torch.arange(tokens) >= lengths[:, None], -torch.inf)
        method, layer, count = self.method, module.layer_idx, module.config.num_hidden_layers
        keep = None
        if isinstance(method, Quest) and layer >= method.skip_layers:
            keep = self.choose(query, key, lengths, scaling, logits)
        elif isinstance(method, Delta) and layer not in method.full(count):
            keep = self.keep
        weights = logits.softmax(-1)
        if method is None:
            self.shares.append(self.paged(weights).flatten(0, 1).transpose(0, 1))
        if isinstance(method, Delta) and layer in method.full(count):
            self.keep = self.choose(query, key, lengths, scaling, logits)
        if keep is not None:
            seen = keep.transpose(0, 1).unsqueeze(1).repeat_interleave(PAGE, -1)[..., :tokens]
            weights = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
        out = (weights @ value[0, :, None]).flatten(0, 1)
        return out.transpose(0, 1)[None], None

    def choose(self, query: Tensor, key: Tensor, lengths: Tensor, scaling: float, logits: Tensor) -> Tensor:
        """Which pages each token sees, bool ``[T, G or 1, nP]``: tokens stand for rows of a batch."""
        assert self.method is not None
        padded = F.pad(key, (0, 0, 0, -key.shape[2] % PAGE))
        units = padded.unflatten(2, (-1, PAGE))
        kind = self.method.rank_by if isinstance(self.method, Quest) else "bounds"
        bounds = pages.summarise(units, kind).expand(len(lengths), -1, -1, -1, -1)
        best = logits.softmax(-1).amax(1 if self.own else (0, 1))
        mass = self.paged(best).reshape(-1, len(lengths), units.shape[2]).transpose(0, 1)
        rows, length = query[0].transpose(0, 1).unsqueeze(2), lengths[:, None, None]
        step = pages.Step(rows, [padded], length, None, DENSE, scaling, mass, bounds)
        scores = self.method.scores(step)
        if self.own:
            scores = torch.where(scores.isinf(), scores, mass)
        return self.listed(scores, self.method.count)

    @staticmethod
    def listed(scores: Tensor, count: int) -> Tensor:
        """Scores as the pages that are taken."""
        listed, counts = pages.take(scores, count)
        return blocks.visited(counts, listed, scores.shape[-1])

    @staticmethod
    def paged(weights: Tensor) -> Tensor:
        """The last axis, tokens, summed in pages."""
        return F.pad(weights, (0, -weights.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1)


def read(ids: Tensor, steps: int) -> Any:
    """Keys and values of all but the last tokens."""
    model = shared()[0]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(ids[:, : -steps - 1], use_cache=True, logits_to_keep=1).past_key_values


def decoded(ids: Tensor, steps: int, prompt: Any, attention: Masked) -> Tensor:
    """Logarithms of probabilities of what follows each of the last tokens."""
    model = shared()[0]
    AttentionInterface.register("pages_by_masks", attention)
    AttentionMaskInterface.register("pages_by_masks", sdpa_mask)
    model.set_attn_implementation("pages_by_masks")
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, index)
    with torch.no_grad():
        logits = model(ids[:, -steps - 1 : -1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)


def calibrated(ids: Tensor, steps: int, method: Delta, counts: Iterator[int] | range) -> dict[int, tuple[int, ...]]:
    """Placements of so many full layers each, by what layers keep with each other's pages of this text."""
    attention = Masked()
    decoded(ids, steps, read(ids, steps), attention)
    made = method.for_store(DENSE)
    lengths = torch.arange(ids.shape[1] - steps, ids.shape[1])[:, None, None]
    capacity = torch.empty(1, 1, attention.shares[0].shape[-1] * PAGE, 1)
    kept = torch.zeros(len(attention.shares), len(attention.shares))
    for chooser, shares in enumerate(attention.shares):
        # The largest share of a page over heads, for the sum of the largest over heads of its tokens.
        step = pages.Step(shares, [capacity], lengths, None, DENSE, 1.0, shares.amax(1, keepdim=True))
        keep = Masked.listed(made.scores(step), made.count)
        for layer in range(chooser + 1, len(kept)):
            kept[chooser, layer] = (attention.shares[layer] * keep).sum(-1).mean()
    return {count: placement(kept, count) for count in counts}


def choices(places: int, steps: int, tokens: int = 7000, begin: int = 20_000) -> list[Measured]:
    """Rows for each setting: loss with its standard error over places, KL, best tokens, and the share of keys read.

    Places are 16,000 tokens apart, from ``begin`` on.
    """
    text, layers = smollm2.topics(shared()[1]), shared()[0].config.num_hidden_layers
    full = calibrated(text[:, : tokens + 1], steps, Delta(token_budget=768), range(3, 6))
    say(f"placements: {full}")
    settings: dict[str, Masked] = {
        "all keys": Masked(),
        "quest, as in the paper": Masked(Quest(token_budget=992, sink=0)),
        "quest": Masked(Quest(token_budget=992)),
        "quest, skip_layers=1": Masked(Quest(token_budget=1168, skip_layers=1)),
        "best pages, skip_layers=1": Masked(Quest(token_budget=1168, skip_layers=1), own=True),
        "quest, radius=0.5, skip_layers=0": Masked(Quest(token_budget=1392, radius=0.5, skip_layers=0)),
        **{
            f"quest by moments, {n} deviations": Masked(
                Quest(token_budget=1392, skip_layers=0, rank_by="moments", deviations=n)
            )
            for n in (0, 1, 1.5, 1.8, 2.1, 2.5)
        },
        "delta": Masked(Delta()),
        **{
            f"delta, {full[n]}, {budget}": Masked(Delta(token_budget=budget, full_cache_layers=full[n]))
            for n, budget in ((3, 768), (4, 528), (3, 1392), (5, 1392))
        },
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in settings}
    for place in range(places):
        first = begin + 16_000 * place
        ids = text[:, first : first + tokens + 1]
        prompt, target, plain = read(ids, steps), ids[0, -steps:], torch.zeros(0)
        for name, attention in settings.items():
            attention.shares.clear()
            made = decoded(ids, steps, prompt, attention)
            plain = made if name == "all keys" else plain
            more = F.nll_loss(made, target) - (F.nll_loss(plain, target) if name != "all keys" else 0)
            kl = (plain.exp() * (plain - made)).sum(-1).mean()
            same = (plain.argmax(-1) == made.argmax(-1)).float().mean()
            found[name].append((float(more), float(kl), float(same)))
            say(f"  at {first}, {name}: {float(more):+.4f} nats, KL {float(kl):.4f}")
    rows = []
    for name, results in found.items():
        more, kl, same = (statistics.mean(column) for column in zip(*results))
        if name == "all keys":
            rows.append(Measured(f"{name}: perplexity", math.exp(more), note=f"{places} places of {steps} tokens"))
            continue
        error = statistics.stdev(r[0] for r in results) / places**0.5 if places > 1 else math.nan
        method: Any = settings[name].method
        dense = method.skip_layers if isinstance(method, Quest) else len(method.full(layers))
        share = (dense * tokens + (layers - dense) * method.count * PAGE) / layers / tokens
        note = f"error {100 * error:.2f}, KL {kl:.4f}, same best {same:.3f}, keys {share:.2f}"
        rows.append(Measured(f"{name}: loss", 100 * math.expm1(more), " %", 1.0, False, note))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=20_000, help="where the first place begins")
    parser.add_argument("--places", type=int, default=6)
    parser.add_argument("--steps", type=int, default=128)
    chosen = parser.parse_args()
    console.print(table("What choosing pages loses", choices(chosen.places, chosen.steps, begin=chosen.first)))

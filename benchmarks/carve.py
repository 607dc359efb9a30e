"""Feed-forward blocks that do less: what each method loses at each sparsity, beside a static mask of equal width.

What a prompt chooses is measured on what follows it, token by token, and so is the static mask there.

Calibrated on ``pydoc_data.topics`` from token 40,000 on, 8 texts of 2,048 tokens; measured on other tokens of it.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from typing import Any

import torch
from common import EAGER, INDUCTOR_STATIC, OURS_16, Measured, Side, ratio_of_rounds, say, shared, spread
from decode import rounds_of
from formats import Distance
from sparse import _without_inductor
from torch import Tensor

import effcompile as ec
from effcompile import smollm2
from effcompile.passes.calibrate import each

CALIBRATION, SEQUENCES, LENGTH = 40_000, 8, 2048
"""First token, number of texts, tokens of each."""
MEASURED = 1024
"""Tokens of each text that is measured on."""
PROMPT, FOLLOWING = 512, 256
"""Tokens of a prompt that chooses neurons, and of what follows it."""
STATIC = "static mask"
ENERGY: dict[str, Any] = {"grouping": "energy", "router": "fitted", "bias": True}
"""Carved by what neurons write, and not as in the paper."""
SETTINGS: dict[str, Any] = {
    f"{STATIC}, 25 %": ec.flap(0.25, metric="WIFN", structure="UL-UM", bias=False),
    "flap 25 %, no bias": ec.flap(0.25, bias=False),
    "flap 25 %": ec.flap(0.25),
    "carve_moe S3A3E8": ec.carve_moe(3, 3, 8),
    "carve_moe S3A3E8, threshold": ec.carve_moe(3, 3, 8, routing="threshold"),
    "carve_moe S3A3E8, raw": ec.carve_moe(3, 3, 8, profile="raw", router="raw"),
    "carve_moe S3A3E8, energy": ec.carve_moe(3, 3, 8, **ENERGY),
    "carve_moe S3A3E8, energy, threshold": ec.carve_moe(3, 3, 8, routing="threshold", **ENERGY),
    "teal 25 %": ec.teal(0.25),
    "wina 25 %": ec.wina(0.25),
    "teal 25 %, greedy": ec.teal(0.25, "greedy"),
    "wina 25 %, greedy": ec.wina(0.25, "greedy"),
    f"{STATIC}, 50 %": ec.flap(0.5, metric="WIFN", structure="UL-UM", bias=False),
    "flap 50 %": ec.flap(0.5),
    "carve_moe S2A2E8": ec.carve_moe(2, 2, 8),
    "carve_moe S2A2E8, energy": ec.carve_moe(2, 2, 8, **ENERGY),
    "teal 50 %": ec.teal(0.5),
    "wina 50 %": ec.wina(0.5),
    "teal 50 %, greedy": ec.teal(0.5, "greedy"),
    "wina 50 %, greedy": ec.wina(0.5, "greedy"),
    "wina 50 %, rotated": ec.wina(0.5, transform=True),
    "carve_moe S1A1E8": ec.carve_moe(1, 1, 8),
    "carve_moe S1A1E8, energy": ec.carve_moe(1, 1, 8, **ENERGY),
}
"""What is calibrated, all in one pass over the text; each has a plan of its own."""
COMPARED = (
    ("flap 25 %", "flap 25 %, no bias"),
    ("flap 25 %", f"{STATIC}, 25 %"),
    ("carve_moe S3A3E8", f"{STATIC}, 25 %"),
    ("carve_moe S3A3E8, energy", f"{STATIC}, 25 %"),
    ("carve_moe S3A3E8, energy", "flap 25 %"),
    ("carve_moe S3A3E8, energy", "carve_moe S3A3E8"),
    ("carve_moe S2A2E8, energy", f"{STATIC}, 50 %"),
    ("carve_moe S2A2E8, energy", "flap 50 %"),
    ("carve_moe S3A3E8, threshold", "carve_moe S3A3E8"),
    ("carve_moe S3A3E8, energy, threshold", "carve_moe S3A3E8, energy"),
    ("wina 25 %", "teal 25 %"),
    ("wina 50 %", "teal 50 %"),
    ("teal 50 %, greedy", "teal 50 %"),
    ("wina 50 %, greedy", "wina 50 %"),
    ("carve_moe S3A3E8", "carve_moe S2A2E8"),
    ("carve_moe S2A2E8", "carve_moe S1A1E8"),
    ("carve_moe S3A3E8, energy", "carve_moe S2A2E8, energy"),
    ("carve_moe S2A2E8, energy", "carve_moe S1A1E8, energy"),
)
"""Settings of which the first should lose no more than the second."""
HEADS: dict[str, Any] = {
    "flap, neurons": ec.flap(0.25),
    "flap, neurons and heads by group": ec.flap(0.1875, heads=True),
    "flap, neurons and query heads": ec.flap(0.1875, heads=True, unit="query"),
}
"""With and without heads, at one number of weights that go: blocks hold three quarters of a layer's on this model."""
BOTH = "wina 25 % on flap 12.5 %"
STACKED: dict[str, Any] = {"flap 12.5 %": ec.flap(0.125), "wina 25 %": ec.wina(0.25), "wina 34 %": ec.wina(0.34375)}
"""Beside :data:`BOTH`, which reads 65.6 % of the weights of the blocks, as the last of these does."""
GOALS = {
    "teal 25 %": 4.0,
    "wina 25 %": 4.0,
    "carve_moe S3A3E8": 45.0,
    "carve_moe S3A3E8, energy": 45.0,
    "flap 25 %": 45.0,
}


def batches(sequences: int = SEQUENCES, length: int = LENGTH) -> list[Tensor]:
    """The texts that are calibrated on."""
    text = smollm2.topics(shared()[1])[0, CALIBRATION : CALIBRATION + sequences * length]
    return list(text.view(sequences, 1, length))


def texts(tokens: int) -> list[Tensor]:
    """The texts that are measured on."""
    first, _ = smollm2.TOPICS
    return list(smollm2.topics(shared()[1])[:, first : first + tokens].split(MEASURED, 1))


@torch.no_grad()
def log_probabilities(model: Any, text: Tensor) -> Tensor:
    """``[T - 1, V]`` of the next token."""
    found: Tensor = model(text, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return found


def damage(model: Any, dense: list[Tensor], measured: list[Tensor]) -> Distance:
    """How far a model is from ``dense``."""
    found = Distance()
    for text, theirs in zip(measured, dense, strict=True):
        found.add(log_probabilities(model, text), theirs, text[0, 1:])
    return found


def speed(quick: bool = False) -> list[Measured]:
    """Milliseconds a token behind 512, with about half of the neurons or of the inputs, beside dense."""
    methods = {name: SETTINGS[name] for name in ("flap 50 %", "carve_moe S2A2E8", "wina 50 %")}
    say("carve: calibrating")
    plans = each(shared()[0], batches(1, 1024), [decorator.options for decorator in methods.values()])
    sides = [Side(name, "effcompile", bits=(16, 16), plan=plan) for name, plan in zip(methods, plans, strict=True)]
    stock = [EAGER, INDUCTOR_STATIC]
    medians = rounds_of([*stock, OURS_16, *sides], 512, 1, 2 if quick else 7, 6 if quick else 12)
    rows = [Measured(f"{n}, 512 tokens", statistics.median(t), " ms", note=spread(t)) for n, t in medians.items()]
    best = min((medians[side.name] for side in stock), key=statistics.median)
    for side in (OURS_16, *sides):
        ratios = spread([a / b for a, b in zip(best, medians[side.name])])
        goal = 1.25 if side.plan else None
        value = ratio_of_rounds(best, medians[side.name])
        rows.append(Measured(f"{side.name}: over the better of eager and Inductor", value, "x", goal, note=ratios))
        if side.plan:
            own = ratio_of_rounds(medians[OURS_16.name], medians[side.name])
            rows.append(Measured(f"{side.name}: over our dense blocks", own, "x"))
    return rows


def heads(quick: bool = False) -> list[Measured]:
    """The same with heads of attention removed besides neurons (:data:`HEADS`)."""
    return _lost(HEADS, quick)[0]


def stacked(quick: bool = False) -> list[Measured]:
    """The same with inputs left out of what is left of a block (:data:`BOTH`)."""
    return _lost(STACKED, quick, {BOTH: ("flap 12.5 %", ec.wina(0.25))})[0]


def _share(model: Any, plan: ec.Plan) -> float:
    """Of the weights of blocks and attention that a plan removes, keys and values with the last of their queries."""
    c = model.config
    size, ratio = c.hidden_size // c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
    attention = 2 * c.hidden_size * size * (c.num_attention_heads + c.num_key_value_heads)
    gone = 0
    for record in plan:
        if "heads" in record.tensors:
            kept = record.tensors["heads"]
            gone += attention - 2 * c.hidden_size * size * (len(kept) + len((kept // ratio).unique()))
        else:
            gone += 3 * c.hidden_size * (c.intermediate_size - len(record.tensors["kept"]))
    return gone / (c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size))


def loss(quick: bool = False) -> list[Measured]:
    """Perplexity, KL, agreement and the error of the blocks, for each of :data:`SETTINGS`."""
    rows, found = _lost(SETTINGS, quick)
    for better, worse in COMPARED:
        rows.append(Measured(f"KL, {worse} over {better}", found[worse].kl / found[better].kl, " x", 1.0))
    return rows


def _lost(
    settings: dict[str, Any], quick: bool, on: dict[str, Any] | None = None
) -> tuple[list[Measured], dict[str, Distance]]:
    """What each of some settings loses, all calibrated in one pass over the text; and those that stand ``on`` one."""
    model, measured = shared()[0], texts(1024 if quick else 4096)
    given = batches(2, 1024) if quick else batches()
    dense = [log_probabilities(model, text) for text in measured]
    plain = damage(model, dense, measured).perplexity
    rows, found = [Measured("dense: perplexity", plain)], {}
    say("carve: calibrating")
    plans = each(model, given, [decorator.options for decorator in settings.values()])
    named = dict(zip(settings, plans, strict=True))
    named |= {name: ec.calibrate(model, given, [top], on=named[below]) for name, (below, top) in (on or {}).items()}
    for name, plan in named.items():
        say(f"carve: {name}")
        with _without_inductor():
            told = Side(name, "effcompile", plan=plan).model()
            one = damage(told, dense, measured)
            done = [d for d in ec.inspect(told).decisions if d.kind == "ffn" and d.action == "rewritten"]
        if len(done) % model.config.num_hidden_layers or not done:
            raise AssertionError(f"{name} is at {len(done)} of {model.config.num_hidden_layers} blocks")
        own = [record for record in plan if record.on or name not in (on or {})]
        error = sum(record.numbers["error"] for record in own) / len(own)
        found[name] = one
        removed = f", {_share(model, plan):.1%} of the weights removed" if settings is HEADS else ""
        note = (
            f"perplexity {one.perplexity:.2f}, KL {one.kl / one.count:.3f}, same first choice "
            f"{one.same / one.count:.1%}, error of a block {error:.3f}" + removed
        )
        value, goal = 100 * (one.perplexity / plain - 1), GOALS.get(name)
        rows.append(Measured(f"{name}: perplexity over dense", value, " %", goal, at_least=False, note=note))
    return rows, found


RECOVERED = ("carve_moe S3A3E8, energy", "carve_moe S3A3E8")
"""Settings whose routers are trained; the first alone if it is to be quick."""


def recovery(quick: bool = False) -> list[Measured]:
    """What carved experts lose before and after :func:`effcompile.recover`, on text that is in neither."""
    model, measured = shared()[0], texts(512 if quick else 4096)
    dense = [log_probabilities(model, text) for text in measured]
    plain = damage(model, dense, measured).perplexity
    rows = [Measured("dense: perplexity", plain)]
    say("carve: calibrating")
    names = RECOVERED[:1] if quick else RECOVERED
    plans = each(model, batches(1, 1024) if quick else batches(), [SETTINGS[name].options for name in names])
    trained = batches(8, 256) if quick else batches(64, 512)
    for name, plan in zip(names, plans, strict=True):
        say(f"carve: {name}, recovered in {len(trained)} steps")
        after = ec.recover(model, plan, trained, lr=0.02, progress=False)
        for word, one in (("", plan), (", recovered", after)):
            with _without_inductor():
                found = damage(Side(name, "effcompile", plan=one).model(), dense, measured)
            note = f"perplexity {found.perplexity:.2f}, KL {found.kl / found.count:.3f}"
            if word:
                loads = [sum(r.numbers[f"load_{when}"] for r in after) / len(after) for when in ("before", "after")]
                told = after.made["recovered"]
                note += f"; largest load over the mean {loads[0]:.2f} -> {loads[1]:.2f}; {told['seconds']} s"
                note += f"; loss on its first text {told['loss'][0]:.3f} -> {told['loss'][1]:.3f}"
            rows.append(
                Measured(f"{name}{word}: perplexity over dense", 100 * (found.perplexity / plain - 1), " %", note=note)
            )
    return rows


CHOSEN: dict[str, dict[str, Any]] = {
    "20 %": {"beta": 0.2},
    "40 %": {"beta": 0.4},
    "40 %, code's alpha": {"beta": 0.4, "alpha": 0.2},
    "40 %, by size": {"beta": 0.4, "score": "magnitude"},
    "40 %, all blocks": {"beta": 0.4, "start": 0.0, "end": 1.0},
    "60 %": {"beta": 0.6},
    "60 %, by size": {"beta": 0.6, "score": "magnitude"},
    "80 %": {"beta": 0.8},
    "80 %, by size": {"beta": 0.8, "score": "magnitude"},
}
"""Settings of CoreInfer, by the share of neurons that is kept in the blocks that are rewritten."""


def _masked(beta: float, given: list[Tensor], modules: set[str]) -> ec.Plan:
    """A static mask that keeps the share ``beta`` of the neurons in these modules."""
    method = ec.flap(1 - beta, metric="WIFN", structure="UL-UM", round_to=1, bias=False).options
    (plan,) = each(shared()[0], given, [method])
    return ec.Plan({(r.module, r.method): r for r in plan if r.module in modules})


@torch.no_grad()
def chosen(quick: bool = False) -> list[Measured]:
    """What is lost behind a prompt that chooses the neurons: perplexity, KL and agreement, beside a static mask."""
    from transformers import DynamicCache

    model = shared()[0]
    following = 64 if quick else FOLLOWING
    read = [text[:, : PROMPT + following] for text in texts(2048 if quick else 4096)]
    prompts = []
    for text in read:
        cache = DynamicCache(config=model.config)
        model(text[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        prompts.append(cache)

    def after(told: Any, text: Tensor, cache: Any, step: int) -> Tensor:
        """``[T, V]`` of the tokens behind the prompt, ``step`` at a time."""
        pieces = text[:, PROMPT:-1].split(step, 1)
        logits = [told(piece, past_key_values=cache).logits[0].float() for piece in pieces]
        return torch.cat(logits).log_softmax(-1)

    dense = [after(model, text, copy.deepcopy(cache), FOLLOWING) for text, cache in zip(read, prompts)]
    plain = Distance()
    for text, theirs in zip(read, dense):
        plain.add(theirs, theirs, text[0, PROMPT + 1 :])
    rows = [Measured(f"dense, behind {PROMPT} tokens: perplexity", plain.perplexity)]

    def told(name: str, found: Distance) -> None:
        note = (
            f"perplexity {found.perplexity:.2f}, KL {found.kl / found.count:.3f}, same first choice "
            f"{found.same / found.count:.1%}, {found.count} tokens behind prompts of {PROMPT}"
        )
        rows.append(
            Measured(f"{name}: perplexity over dense", 100 * (found.perplexity / plain.perplexity - 1), " %", note=note)
        )

    masks: dict[tuple[float, int], Distance] = {}
    for name, options in CHOSEN.items():
        say(f"carve: coreinfer {name}")
        ours = Distance()
        with _without_inductor():
            fast = ec.coreinfer(**options)(Side(name).model())
            fast.compile(backend="effcompile")
            for text, theirs in zip(read, dense):
                cache = DynamicCache(config=model.config)
                fast(text[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
                ours.add(after(fast, text, cache, 1), theirs, text[0, PROMPT + 1 :])
            modules = {block.removesuffix(".down_proj") for block in ec.core_neurons(fast)}
            kept = {core.shape[1] for core in ec.core_neurons(fast).values()}
        width = model.config.intermediate_size
        if not modules or kept != {int(options["beta"] * width)}:
            raise AssertionError(f"coreinfer {name}: {len(modules)} blocks keep {kept} of {width} neurons")
        told(f"coreinfer {name}", ours)
        size = options["beta"], len(modules)
        if size in masks:
            continue
        say(f"carve: {STATIC}, {size[0]:.0%} of {size[1]} blocks")
        plan, masks[size] = _masked(size[0], batches(2, 1024) if quick else batches(), modules), Distance()
        with _without_inductor():
            other = dataclasses.replace(EAGER, name=STATIC, backend="effcompile", plan=plan).model()
            for text, cache, theirs in zip(read, prompts, dense):
                found = after(other, text, copy.deepcopy(cache), FOLLOWING)
                masks[size].add(found, theirs, text[0, PROMPT + 1 :])
            done = [d for d in ec.inspect(other).decisions if d.kind == "ffn" and d.action == "rewritten"]
        if len(done) % len(modules) or not done:
            raise AssertionError(f"the static mask is at {len(done)} blocks, and should be at {len(modules)}")
        told(f"{STATIC}, {size[0]:.0%} of {size[1]} blocks", masks[size])
    return rows

"""Factored linears and caches of SmolLM2: quality against bytes and time, as a table and a drawing.

python examples/low_rank.py [ratio [tokens [picture]]]      0.8 8192 low_rank.png, if nothing is said

The drawing needs matplotlib.
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import effcompile as ec
from effcompile import measure, smollm2

CALIBRATION, LENGTH = 40_000, 1024
"""Where the calibration text begins, far from the text that is measured on; tokens of each part of it."""
PROSE, CHUNK, PROMPT, TOKENS = 1024, 256, 512, 24
"""Tokens that are measured on, and in a call; of a prompt, and after it."""


def perplexity(model, cache, tokenizer) -> float:
    """Of a text that goes through the cache. The first call reads what it was given, and so does not count."""
    first, _ = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + PROSE]
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits[0].float() for piece in text.split(CHUNK, 1)]
    logits = torch.cat(pieces)[CHUNK:-1]
    return torch.nn.functional.cross_entropy(logits, text[0, CHUNK + 1 :]).exp().item()


def megabytes(model, cache) -> float:
    """What a step reads of linears, as the report has it, and what the full cache takes."""
    graphs = [graph for graph in ec.inspect(model).graphs if graph.label == "decode"]
    done = [d for d in graphs[-1].decisions if d.kind == "linear" and d.action == "rewritten"] if graphs else []
    linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    saved = sum((d.bytes_before or 0) - (d.bytes_after or 0) for d in done)
    if isinstance(cache, ec.Cache):
        return (linears - saved + cache.nbytes) / 1e6
    return (linears - saved + sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)) / 1e6


def ranks_of(plan: ec.Plan) -> Table:
    """A row for each layer: the rank of each linear, ``-`` for one that stays dense."""
    kinds = list(dict.fromkeys(record.module.rsplit(".", 1)[1] for record in plan))
    table = Table("layer", *kinds, title="ranks")
    layers: dict[str, dict[str, str]] = {}
    for record in plan:
        path, kind = record.module.rsplit(".", 1)
        rank = f"{record.numbers['rank']:.0f}" if record.tensors else "-"
        layers.setdefault(path.split(".")[2], {})[kind] = rank
    for layer, ranks in layers.items():
        table.add_row(layer, *(ranks.get(kind, "") for kind in kinds))
    return table


def draw(rows: dict[str, tuple[float, float, float]], path: str) -> None:
    """Perplexity against megabytes, and against milliseconds a token."""
    import matplotlib.pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axes, which, label in zip(sides, (1, 2), ("MB that a step reads", "ms a token")):
        for name, row in rows.items():
            axes.scatter(row[which], row[0], label=name)
        axes.set(xlabel=label, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    sides[0].set_ylabel("perplexity")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=140)


def main(ratio: float = 0.8, tokens: int = 8192, path: str = "low_rank.png") -> None:
    """Calibrate plans; print the ranks of one, and what each variant loses, reads and takes."""
    console = Console()
    if importlib.util.find_spec("matplotlib") is None:
        console.print("matplotlib is not installed (pip install matplotlib): a table, and no picture")
        path = ""
    if path and Path(path).exists():
        raise SystemExit(f"{path} is there already; name another file, or move it.")
    model, tokenizer = smollm2.load()
    prompt = smollm2.passkey(tokenizer, PROMPT, smollm2.DEPTHS[1])
    texts = list(smollm2.topics(tokenizer)[0, CALIBRATION : CALIBRATION + tokens].view(-1, 1, LENGTH))
    methods = {
        f"uniform {ratio:g}": ec.low_rank(ratio=ratio, planner="uniform"),
        f"sensitivity {ratio:g}": ec.low_rank(ratio=ratio),
        f"sensitivity {(1 + ratio) / 2:g}": ec.low_rank(ratio=(1 + ratio) / 2),
    }
    started = time.perf_counter()
    plans = {name: ec.calibrate(model, texts, [method]) for name, method in methods.items()}
    seconds = time.perf_counter() - started
    latent = {"latent": 128, "key_bits": 8, "value_bits": 4}
    ways = {"dense": ({}, {}), **{name: ({"plan": plan}, {}) for name, plan in plans.items()}}
    ways["latent keys, V4"] = ({}, latent)
    last = list(plans)[-1]
    ways[f"{last}, latent keys, V4"] = ({"plan": plans[last]}, latent)
    ways["weights in 4 bits"] = ({"quantize_weights": {"bits": 4, "group": 32}}, {})
    rows = {}
    for name, (options, form) in ways.items():
        torch._dynamo.reset()
        model.compile(backend="effcompile", options=options)
        full = ec.Cache(model, PROSE, **form, residual=0) if form else DynamicCache(config=model.config)
        lost = perplexity(model, full, tokenizer)
        step = ec.Cache(model, PROMPT + TOKENS + 8, **(form or {"key_bits": 16, "value_bits": 16}))
        measure.generate(model, prompt, 4, past_key_values=step)  # compiles
        step.reset()
        run = measure.generate(model, prompt, TOKENS, past_key_values=step)
        rows[name] = lost, megabytes(model, full), run.milliseconds
    table = Table("", "perplexity", "MB a step", "ms a token", title=f"{len(plans)} plans in {seconds:.0f} s")
    for name, (lost, size, milliseconds) in rows.items():
        table.add_row(name, f"{lost:.2f}", f"{size:.0f}", f"{milliseconds:.1f}")
    console.print(ranks_of(plans[f"sensitivity {ratio:g}"]))
    console.print(table)
    if path:
        draw(rows, path)
        console.print(f"drawn: {path}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]), *sys.argv[3:4])

"""Where a planner of ranks spends: the rank of every linear of SmolLM2, and what the model loses, beside uniform ranks.

python examples/low_rank.py [ratio [tokens]]      0.8 8192, if nothing is said
"""

import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import effcompile as ec
from effcompile import smollm2

CALIBRATION, LENGTH = 40_000, 1024
"""Where the calibration text begins, far from the text that is measured on; tokens of each part of it."""
PROSE = 1024


def nats(model, tokenizer) -> float:
    """Loss of a text, a token."""
    first, _ = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + PROSE]
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, text[0, 1:]).item()


def picture(plan: ec.Plan) -> Table:
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


def main(ratio: float = 0.8, tokens: int = 8192) -> None:
    """Calibrate a plan for two planners; print the ranks of one, and the losses of both."""
    model, tokenizer = smollm2.load()
    texts = smollm2.topics(tokenizer)[0, CALIBRATION : CALIBRATION + tokens].view(-1, 1, LENGTH)
    dense = nats(model, tokenizer)
    table = Table("planner", "seconds", "kept", "loss", "growth", title=f"dense: loss {dense:.3f} a token")
    for planner in ("uniform", "sensitivity"):
        started = time.perf_counter()
        plan = ec.calibrate(model, list(texts), [ec.low_rank(ratio=ratio, planner=planner)])
        seconds = time.perf_counter() - started
        kept = sum(r.numbers["parameters"] for r in plan) / sum(r.numbers["dense"] for r in plan)
        torch._dynamo.reset()
        model.compile(backend="effcompile", options={"plan": plan})
        loss = nats(model, tokenizer)
        model._compiled_call_impl = None
        table.add_row(planner, f"{seconds:.0f}", f"{kept:.3f}", f"{loss:.3f}", f"{loss - dense:.3f}")
    console = Console()
    console.print(picture(plan))
    console.print(table)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))

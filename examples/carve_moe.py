"""A dense model's feed-forward blocks carved into experts, two ways, beside dense and a static mask of equal width.

python examples/carve_moe.py [shared active experts]      3 3 8, if nothing is said
"""

import math
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import effcompile as ec
from effcompile import measure, smollm2

CALIBRATION, SEQUENCES, LENGTH = 40_000, 8, 2048
"""Where the calibration text begins, and how much of it: far from the text that is measured on."""
PROSE, PROMPT, TOKENS = 1024, 512, 24


def row(name: str, model, tokenizer) -> list[str]:
    """Perplexity of a text, and milliseconds a token behind a prompt of 512."""
    first, _ = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + PROSE]
    prompt = smollm2.passkey(tokenizer, PROMPT, smollm2.DEPTHS[1])
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, :-1].float()
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, text[0, 1:]).item())
    measure.generate(model, prompt, 4)  # compiles
    run = measure.generate(model, prompt, TOKENS)
    answer = tokenizer.decode(run.new_tokens[0, :4]).strip()
    return [name, f"{perplexity:.2f}", f"{run.milliseconds:.1f}", f"{1e3 / run.milliseconds:.1f}", answer]


def main(shared: int = 3, active: int = 3, experts: int = 8) -> None:
    """Calibrate a plan for each way, and print a row for it."""
    model, tokenizer = smollm2.load()
    texts = smollm2.topics(tokenizer)[0, CALIBRATION : CALIBRATION + SEQUENCES * LENGTH].view(SEQUENCES, 1, LENGTH)
    removed = 1 - (shared + active) / experts
    ways = {
        "as the paper does": ec.carve_moe(shared, active, experts),
        "by energy": ec.carve_moe(shared, active, experts, grouping="energy", router="fitted", bias=True),
        # The honest baseline: as many neurons, the same ones for every token, by size alone.
        "static mask": ec.flap(removed, metric="WIFN", structure="UL-UM", bias=False),
    }
    started = time.perf_counter()
    plans = {way: ec.calibrate(model, list(texts), [method]) for way, method in ways.items()}
    seconds = time.perf_counter() - started
    name = f"S{shared}A{active}E{experts}"
    table = Table(title=f"{name}: {1 - removed:.0%} of the neurons a token; three plans in {seconds:.0f} s")
    for column in ("", "perplexity", "ms a token", "tokens/s", "answer"):
        table.add_column(column, no_wrap=True)
    table.add_row(*row("eager", model, tokenizer))
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    for side, plan in {"effcompile, dense": None, **plans}.items():
        torch._dynamo.reset()
        model.compile(backend="effcompile", options={"plan": plan})
        table.add_row(*row(side, model, tokenizer))
    Console().print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

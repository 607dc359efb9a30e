"""A long prompt through chosen blocks of keys, beside dense: milliseconds, density, kept mass, answer, perplexity.

python examples/long_prompt.py [tokens] [method]      7000 and xattention, if nothing is said
"""

import math
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

import effcompile as ec
from effcompile import measure, smollm2

SETTINGS = {"xattention": {"threshold": 0.98}}
"""Where the paper's defaults are not the ones to begin with on a model of this size."""
PROSE = 4096
"""Tokens of natural text that perplexity is taken of."""


def row(name: str, model, tokenizer, tokens: int) -> list[str]:
    """Read a prompt of so many tokens with a pass key in it, and a natural text as one prompt."""
    prompt = smollm2.passkey(tokenizer, tokens, smollm2.DEPTHS[1])
    measure.generate(model, prompt, 2)  # compiles, and verifies
    run = measure.generate(model, prompt, 8)
    first, _ = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + min(tokens, PROSE)]
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, :-1].float()
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, text[0, 1:]).item())
    # The first graph is the prompt's; the text makes another.
    sites = [d for d in ec.inspect(model).decisions if d.density is not None]
    sites = [d for d in sites if d.graph == sites[0].graph]
    shares = ["1", "1"]
    if sites:
        shares = [f"{statistics.mean(getattr(d, what) for d in sites):.3f}" for what in ("density", "kept")]
    answer = tokenizer.decode(run.new_tokens[0]).strip()
    return [name, f"{1e3 * run.first:,.0f}", *shares, answer, f"{perplexity:.2f}"]


def main(tokens: int = 7000, method: str = "xattention") -> None:
    """Print the two rows, and what was done at which layer."""
    table = Table()
    for column in ("", "prompt, ms", "density", "kept mass", "answer", "perplexity"):
        table.add_column(column, no_wrap=True)
    model, tokenizer = smollm2.load()
    table.add_row(*row("eager", model, tokenizer, tokens))
    options = SETTINGS.get(method, {})
    table.title = f"{tokens} tokens; {method} {options or 'as in the paper'}"
    ec.sparse_attention(method, min_length=min(2048, tokens // 2), **options)(model)
    model.compile(backend="effcompile", options={"verify": True})
    table.add_row(*row(method, model, tokenizer, tokens))
    Console().print(table)
    print(ec.inspect(model))


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))

"""``effcompile demo``: one real model, one long prompt, three ways to run it, side by side."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from effcompile import smollm2
from effcompile.kernels.form import BITS

KEY = 71432
"""The pass key that the model has to find."""

DEPTH = 3 / 8
"""Where in the prompt it is hidden."""

PERPLEXITY_CONTEXT, PERPLEXITY_TOKENS = 832, 1024
"""Perplexity is taken on the last 192 of 1,024 tokens of prose, each read through the cache in a step of its own.

The whole slice of :data:`effcompile.smollm2.TOPICS` is measured in ``benchmarks/``.
"""

NEW_TOKENS = 24
"""Tokens generated after the prompt: the answer, and enough steps for a median."""

OK, WRONG_ANSWER, NOTHING_REWRITTEN, UNAVAILABLE = 0, 1, 2, 3
"""Exit codes."""


@dataclasses.dataclass
class Row:
    """What one way of running the model gave."""

    name: str
    prefill_seconds: float
    token_milliseconds: float
    cache_mib: float
    perplexity: float
    answer: str
    correct: bool
    compile_seconds: float


def parse_bits(text: str) -> tuple[int, int]:
    """Key and value bits from ``4`` or ``8,4``.

    >>> parse_bits("4"), parse_bits("8,4")
    ((4, 4), (8, 4))
    """
    try:
        bits = [int(part) for part in text.split(",")]
    except ValueError:
        bits = []
    if len(bits) not in (1, 2) or not set(bits) <= set(BITS):
        raise ValueError(
            f"bits={text!r}: expected one of {', '.join(map(str, BITS))}, or two for keys and values, such as 8,4."
        )
    return bits[0], bits[-1]


def main(tokens: int = 7000, bits: str = "4", skip_inductor: bool = False, as_json: bool = False) -> int:
    """Run the demo, print its table, and return an exit code.

    Parameters
    ----------
    tokens
        Length of the prompt, 300 to 8,000. 7,000 takes minutes, nearly all of it in reading the prompt.
    bits
        Of keys and values: ``"4"``, or ``"8,4"`` for keys in 8 and values in 4.
    skip_inductor
        Leave out the comparison with ``torch.compile``'s own back end.
    as_json
        Print one JSON object on standard output instead of the table; progress goes to standard error.

    Returns
    -------
    int
        0; 1 if an answer was wrong; 2 if no site was rewritten; 3 if something that the demo needs is not there.
    """
    console = Console(stderr=as_json)
    try:
        key_bits, value_bits = parse_bits(bits)
        if not 300 <= tokens <= 8000:
            raise ValueError(f"tokens={tokens}: the model reads 8,192 tokens; choose 300 to 8,000.")
        with console.status("loading SmolLM2-135M-Instruct (the first time it is converted, which takes seconds)"):
            smollm2.folder()
    except (ValueError, smollm2.ModelMissingError) as problem:
        Console(stderr=True).print(f"[red]{problem}", highlight=False)
        return UNAVAILABLE
    return _run(console, tokens, key_bits, value_bits, skip_inductor, as_json)


def _run(console: Console, tokens: int, key_bits: int, value_bits: int, skip_inductor: bool, as_json: bool) -> int:
    import effcompile as ec
    from effcompile import measure

    compressed = ec.compress_kv(key_bits=key_bits, value_bits=value_bits)

    def ours(model: Any) -> dict[str, Any]:
        compressed(model)
        model.compile(backend="effcompile")
        return {}

    def inductor(model: Any) -> dict[str, Any]:
        model.compile()
        return {"cache_implementation": "static"}

    fast = f"effcompile K{key_bits}V{value_bits}"
    sides: dict[str, Callable[[Any], dict[str, Any]]] = {"eager": lambda model: {}, "Inductor": inductor, fast: ours}
    if skip_inductor:
        del sides["Inductor"]

    with console.status("starting torch.compile"):
        measure.warm_up()
    rows: list[Row] = []
    report: Any = None
    for name, prepare in sides.items():
        row, model = _side(console, name, prepare, tokens)
        rows.append(row)
        if name == fast:
            report = ec.inspect(model)
        del model
        gc.collect()

    sites = [_sites(graph) for graph in report.graphs]
    if as_json:
        content = {
            "model": "SmolLM2-135M-Instruct",
            "prompt_tokens": tokens,
            "key": KEY,
            "rows": [dataclasses.asdict(row) for row in rows],
            "graphs": sites,
        }
        json.dump(content, sys.stdout, indent=2)
        print()
    else:
        console.print(_table(rows, tokens))
        for graph in sites:
            console.print(
                "{graph}: {rewritten} of {sites} attention sites rewritten{why}".format(**graph), highlight=False
            )
    if not any(site.rewritten for site in report.sites):
        console.print("[red]No attention site was rewritten; the report says why:")
        console.print(report)
        return NOTHING_REWRITTEN
    wrong = [row.name for row in rows if not row.correct]
    if wrong:
        console.print(f"[red]Wrong answer from {', '.join(wrong)}: the pass key is {KEY}.")
        return WRONG_ANSWER
    return OK


def _side(console: Console, name: str, prepare: Callable[[Any], dict[str, Any]], tokens: int) -> tuple[Row, Any]:
    import torch

    from effcompile import measure

    torch._dynamo.reset()
    model, tokenizer = smollm2.load()
    options = prepare(model)
    prompt = smollm2.passkey(tokenizer, tokens, DEPTH, KEY)
    began = time.perf_counter()
    with console.status(f"{name}: reading {prompt.shape[1]} tokens and generating {NEW_TOKENS}"):
        run = measure.generate(model, prompt, NEW_TOKENS, **options)
    mib = measure.cache_nbytes(run.cache) / measure.MIB
    with console.status(f"{name}: perplexity"):
        # The same buffers again, so that nothing is compiled for another capacity.
        cache = run.cache
        if options or hasattr(cache, "nbytes"):
            cache.reset()
        else:
            cache = type(cache)(config=model.config)
        text = smollm2.topics(tokenizer)[:, smollm2.TOPICS[0] :][:, :PERPLEXITY_TOKENS]
        perplexity = measure.stepwise_perplexity(model, text, PERPLEXITY_CONTEXT, cache)
    said = " ".join(str(tokenizer.decode(run.new_tokens[0, :6])).split())
    row = Row(
        name=name,
        prefill_seconds=run.first,
        token_milliseconds=run.milliseconds,
        cache_mib=mib,
        perplexity=perplexity,
        answer=said,
        correct=smollm2.answers(tokenizer, run.new_tokens[0], KEY),
        compile_seconds=run.compiling,
    )
    console.print(f"{name}: done in {time.perf_counter() - began:.0f} s", highlight=False, style="dim")
    return row, model


def _sites(graph: Any) -> dict[str, Any]:
    """How many sites of one compiled graph were rewritten, and why the others were not."""
    left = sorted({d.reason.text for d in graph.decisions if d.reason is not None})
    return {
        "graph": graph.label,
        "sites": len({d.site for d in graph.decisions}),
        "rewritten": len({d.site for d in graph.decisions if d.action == "rewritten"}),
        "why": f"; the others: {'; '.join(left)}" if left else "",
    }


def _table(rows: list[Row], tokens: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        title=f"SmolLM2-135M-Instruct, fp32, a prompt of about {tokens:,} tokens, {os.cpu_count()} cores",
        caption=f"Perplexity: {PERPLEXITY_TOKENS - PERPLEXITY_CONTEXT} tokens of prose after {PERPLEXITY_CONTEXT}, "
        f"each through the cache. The hidden pass key is {KEY}. Compiling is not part of prefill.",
    )
    table.add_column("", no_wrap=True)
    for heading in ("prefill\ns", "ms a\ntoken", "cache\nMiB", "perplexity", "compiling\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for row in rows:
        numbers = (row.prefill_seconds, row.token_milliseconds, row.cache_mib, row.perplexity, row.compile_seconds)
        shown = [f"{n:.2f}" if n is row.perplexity else f"{n:.1f}" for n in numbers if not math.isnan(n)]
        mark = "[green]" if row.correct else "[red]"
        table.add_row(row.name, *shown, f"{mark}{row.answer}")
    return table

"""One line for each architecture: what is found and rewritten, what is equal to eager, and the time of a decode step.

``python benchmarks/architectures.py`` prints the table and writes ``results/architectures.md``; ``--ratio`` measures
the last column too, which compiles every model twice and wants a machine that does nothing else; names choose rows, and
then nothing is written. The models are tiny and random: the ratio says what a step costs beside stock Inductor with a
static cache where there is next to nothing to compute, and nothing about a real model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import architectures as models
from architectures import ARCHITECTURES, IDS, Outcome
from common import HERE, machine, say

WARM, ROUNDS, CAPACITY = 4, 41, 512
COLUMNS = (
    "architecture",
    "prefill: found / present, rewritten",
    "decode: found / present, rewritten",
    "error",
    "generate",
    "padded rows",
    "decode ratio",
)


class StockFails(Exception):
    """Inductor does not compile the undecorated model with a static cache, so there is nothing to compare with."""


def decode_ratio(name: str) -> tuple[float, float, float]:
    """Stock Inductor's time of a decode step over ours with 16 bits: median, least and most of neighbours in time."""
    import effcompile as ec

    entry = ARCHITECTURES[name]
    torch._dynamo.reset()
    plain = entry.make()
    ours = ec.compress_kv(key_bits=16, value_bits=16)(copy.deepcopy(plain))
    plain.compile()
    ours.compile(backend="effcompile")
    try:
        stock = _stepper(plain, _static(plain), entry)
        stock(0)
    except Exception as error:
        raise StockFails(f"stock fails: {type(error).__name__}") from error
    steps = [stock, _stepper(ours, ec.Cache(ours, CAPACITY), entry)]
    times: list[list[float]] = [[], []]
    for number in range(WARM + ROUNDS):
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[side](number)
            times[side].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*(side[WARM:] for side in times), strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _static(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=CAPACITY)


def _stepper(model: Any, cache: Any, entry: models.Architecture) -> Callable[[int], None]:
    """A prefill now, and a function that makes one step."""
    inputs = entry.inputs()

    @torch.no_grad()
    def step(number: int) -> None:
        model(input_ids=IDS[:, number % 40][:, None], past_key_values=cache, **models.more(inputs, number))

    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return step


def line(name: str, outcome: Outcome, ratio: str) -> str:
    """One row of the table."""
    facts = outcome.facts

    def phase(which: str) -> str:
        told = facts.get(which)
        if told is None:
            return ""
        left = ", ".join(f"{n} {code}" for code, n in told["left"].items())
        return f"{told['found']} / {facts['present']}, {told['rewritten']}" + (f" ({left})" if left else "")

    same = {None: "", True: "equal", False: "**different**"}[outcome.generate]
    refused = " (refused)" if "refused" in facts else ""
    cells = [name + refused, phase("prefill"), phase("decode"), f"{outcome.error:.0e}", same, facts.get("padded", "")]
    return f"| {' | '.join(cells)} | {ratio} |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows; all if none is given")
    parser.add_argument("--ratio", action="store_true", help="measure the time of a decode step")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, ratios = [], {}
    for name in given.names or ARCHITECTURES:
        say(name)
        try:
            outcome = models.measure(name)
        except Exception as error:
            rows.append(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | | | | | |")
            continue
        if given.ratio and ARCHITECTURES[name].cached and "refused" not in outcome.facts:
            try:
                ratios[name] = "{:.2f} ({:.2f} to {:.2f})".format(*decode_ratio(name))
            except StockFails as error:
                ratios[name] = str(error)
            except Exception as error:
                ratios[name] = f"{type(error).__name__}"
                say(f"{name}: {error}")
        rows.append(line(name, outcome, ratios.get(name, "")))
    shown = machine()
    versions = [f"{name} {shown[name]}" for name in ("torch", "transformers", "python")]
    text = "\n".join(
        [
            "# Architectures",
            "",
            "By `python benchmarks/architectures.py`: tiny random models, undecorated in eager against decorated with",
            "16 bits and compiled. *Error* is the largest difference of logits over the largest logit. *Padded rows*:",
            "a left-padded batch of two generates what each row alone does; *as eager* where the model does not.",
            "*Decode ratio* (`--ratio`): stock Inductor's time of one step with a static cache over ours, median of",
            "neighbours in time, with the least and the most. These models are a thousandth of a real one, so it shows",
            "what a call costs beside its kernels; `results/cpu.md` has a real one.",
            "" if ratios else "It is empty here: it has not been measured.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            ", ".join([shown["cpu"], f"{shown['threads']} threads", *versions, shown["date"]]),
            "",
        ]
    )
    print(text)
    if not given.names:
        (HERE / "results" / "architectures.md").write_text(text)


if __name__ == "__main__":
    main()

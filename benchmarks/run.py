"""All measurements in one command: tables on the terminal, JSON and Markdown in ``benchmarks/results/``.

python benchmarks/run.py                       everything (about an hour on two cores)
python benchmarks/run.py --only decode,bytes   some sections
python benchmarks/run.py --quick               short lengths and few rounds, to see that it runs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import calibration
import carve
import decode
import formats
import latents
import low_rank
import paged
import peers
import picture
import prefill
import quality
import sparse
import steady
import weights
from common import HERE, Measured, console, machine, markdown, say, table

Section = Callable[[bool], list[Measured]]

SECTIONS: dict[str, tuple[str, Section]] = {
    "bytes": ("Bytes of the cache", quality.cache_bytes),
    "decode": ("Whole decode", decode.run),
    "perplexity": ("Perplexity", quality.perplexity),
    "formats": ("Few bits, nothing left unquantised", formats.run),
    "latents": ("Keys as latents", latents.run),
    "passkey": ("Pass keys", quality.passkey),
    "prefill": ("Prefill", prefill.run),
    "lists": ("Attention over block lists", sparse.lists),
    "choices": ("What methods choose", sparse.choices),
    "crossover": ("From which length methods gain", sparse.crossover),
    "loss": ("What methods lose", sparse.loss),
    "thresholds": ("Thresholds by layer", sparse.thresholds),
    "pages": ("Decoding over pages", paged.run),
    "prompt": ("A long prompt, sparse", sparse.prompt),
    "carve": ("Feed-forward blocks that do less", carve.loss),
    "calibrate": ("What calibrating costs", calibration.run),
    "carve-recover": ("Carved experts: routers that are trained", carve.recovery),
    "carve-heads": ("Neurons and heads removed", carve.heads),
    "carve-stacked": ("Inputs left out of what is left of a block", carve.stacked),
    "carve-prompt": ("Neurons chosen by the prompt", carve.chosen),
    "carve-speed": ("Feed-forward blocks that do less: decoding", carve.speed),
    "weights": ("Weights in few bits", weights.loss),
    "weights-speed": ("Weights in few bits: decoding", weights.speed),
    "low-rank": ("Linears of low rank", low_rank.loss),
    "low-rank-residual": ("Linears of low rank: what a residual gains", low_rank.residual),
    "low-rank-speed": ("Linears of low rank: decoding", low_rank.speed),
    "picture": ("Perplexity against bytes", picture.run),
    "compile": ("Cold compile", steady.compile_share),
    "steps": ("Many steps", steady.steps),
    "peers": ("What else a user could pick", peers.run),
}


def kernels(quick: bool) -> int:
    """The kernel rows, which have a program of their own."""
    program = HERE / "cpu_kernels.py"
    if not program.exists():
        say("cpu_kernels.py is not there; no kernel rows")
        return 0
    written = [] if quick else ["--json", str(HERE / "results" / "cpu_kernels.json")]
    return subprocess.run([sys.executable, program.name, *written], cwd=HERE).returncode


def main() -> int:
    """Run the chosen sections; 1 if a goal was missed, 2 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join([*SECTIONS, "kernels"]), help="sections, with commas between")
    parser.add_argument("--quick", action="store_true", help="short lengths and few rounds; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu", help="where to write, without a suffix")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    unknown = [name for name in names if name not in SECTIONS and name != "kernels"]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join([*SECTIONS, 'kernels'])}")

    found: dict[str, list[Measured]] = {}
    failed = []
    for name in names:
        if name == "kernels":
            if kernels(chosen.quick):
                failed.append(name)
            continue
        title, section = SECTIONS[name]
        began = time.perf_counter()
        try:
            found[name] = section(chosen.quick)
        except Exception:
            console.print_exception()
            failed.append(name)
            continue
        console.print(table(title, found[name]))
        say(f"{name}: {time.perf_counter() - began:.0f} s")
        if not chosen.quick:
            write(chosen.out, found)
            if name == "picture":
                picture.draw(found[name], chosen.out.with_name("perplexity_bytes.png"))

    missed = [row for rows in found.values() for row in rows if row.met is False]
    for row in missed:
        console.print(f"[red]missed: {row.what}: {row.value:.4g}{row.unit}")
    for name in failed:
        console.print(f"[red]failed: {name}")
    return 2 if failed else int(bool(missed))


def write(out: Path, found: dict[str, list[Measured]]) -> None:
    """Write what was found; sections that were measured before and not now are kept, with their own machine line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    target = out.with_suffix(".json")
    sections = json.loads(target.read_text())["sections"] if target.exists() else {}
    for name, rows in found.items():
        measured = [{**dataclasses.asdict(row), "met": row.met} for row in rows]
        sections[name] = {"machine": machine(), "rows": measured}
    ordered = {name: sections[name] for name in SECTIONS if name in sections}
    target.write_text(json.dumps({"sections": ordered}, indent=1) + "\n")
    lines = ["# Measured", "", "By `python benchmarks/run.py`. What each number is: [README](../README.md).", ""]
    for name in SECTIONS:
        if name not in sections:
            continue
        rows = [Measured(**{k: v for k, v in row.items() if k != "met"}) for row in sections[name]["rows"]]
        where = sections[name]["machine"]
        lines += [markdown(SECTIONS[name][0], rows)]
        lines += [f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['date']}", ""]
    out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Reading a long prompt: seconds and peak memory. Each side in a process of its own; the processes take turns.

``python benchmarks/prefill.py SIDE`` is such a process: a JSON request a line on standard input, an answer a line.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from common import (
    EAGER,
    INDUCTOR_STATIC,
    K4V4,
    OURS_16,
    SIDES,
    Measured,
    Worker,
    ratio_of_rounds,
    reset_peak,
    say,
    serve,
    shared,
    spread,
    status_kib,
)


def worker(name: str) -> None:
    """Answer ``{"tokens": n}`` with seconds and memory of one prefill of ``n`` tokens, cache included."""
    from effcompile import measure, smollm2

    side = SIDES[name]
    model, tokenizer = side.model(), shared()[1]
    options: dict[str, Any] = {"cache_implementation": "static"} if side.static else {}

    def prefill(tokens: int) -> dict[str, Any]:
        prompt = smollm2.passkey(tokenizer, tokens, smollm2.DEPTHS[1])
        reset_peak()
        before = status_kib("VmRSS")
        run = measure.generate(model, prompt, 1, **options)
        peak = status_kib("VmHWM")
        return {
            "seconds": run.first,
            "compiling": run.compiling,
            "peak_mib": peak / 1024,
            "more_mib": (peak - before) / 1024,
            "tokens": prompt.shape[1],
        }

    serve(prefill)


def run(quick: bool = False) -> list[Measured]:
    """Prefill rows: seconds against eager, and the peak of memory during a prefill after the one that compiled."""
    tokens, rounds = (1500, 2) if quick else (7000, 4)
    sides = [EAGER, INDUCTOR_STATIC, OURS_16, K4V4]
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks: dict[str, list[float]] = {side.name: [] for side in sides}
    more: dict[str, list[float]] = {side.name: [] for side in sides}
    workers = {side.name: Worker("prefill.py", side.name) for side in sides}
    try:
        for name, process in workers.items():
            say(f"prefill, warm-up: {name}")
            process.ask(tokens=tokens)
        for turn in range(rounds):
            for name in list(workers) if turn % 2 else list(workers)[::-1]:
                answer = workers[name].ask(tokens=tokens)
                seconds[name].append(answer["seconds"])
                peaks[name].append(answer["peak_mib"])
                more[name].append(answer["more_mib"])
                say(f"  round {turn + 1}: {name} {answer['seconds']:.1f} s, peak {answer['peak_mib']:.0f} MiB")
    finally:
        for process in workers.values():
            process.close()
    rows = [
        Measured(f"prefill of {tokens}, {name}", statistics.median(times), " s", note=spread(times))
        for name, times in seconds.items()
    ]
    for side in (OURS_16, K4V4):
        value = ratio_of_rounds(seconds[EAGER.name], seconds[side.name])
        rows.append(Measured(f"prefill of {tokens}, {side.name} against eager", value, "x", 0.95))
    for name in seconds:
        note = f"{max(more[name]):.0f} MiB more than before the call"
        rows.append(Measured(f"peak memory, {name}", max(peaks[name]), " MiB", note=note))
    share = max(more[K4V4.name]) / max(more[EAGER.name])
    rows.append(Measured("memory that a prefill adds, K4V4 against eager", share, "x", 1.0, at_least=False))
    return rows


if __name__ == "__main__":
    worker(sys.argv[1])

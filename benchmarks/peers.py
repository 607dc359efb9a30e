"""What else a user could pick: quantised caches of transformers, kvpress, OpenVINO GenAI, each in its own environment.

``python benchmarks/peers.py --setup`` makes those environments under ``build/peers`` (about a gigabyte, some minutes).
A peer that is not installed is left out, and said so.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from common import HERE, Measured, Worker, console, ratio_of_rounds, say, shared, spread

from effcompile import smollm2

ENVIRONMENTS = HERE.parent / "build" / "peers"
OURS = "effcompile K4V4"
FEW = "effcompile K4V4, linears in 4 bits, head in 8"
PEERS = {
    "eager": None,
    OURS: None,
    FEW: None,
    "quanto 4 bits": "quantized",
    "hqq 4 bits": "quantized",
    "kvpress SnapKV 0.5": "kvpress",
    "openvino-genai": "openvino",
}
"""Name, and the environment that it runs in; None is this one."""


def python_of(environment: str | None) -> Path:
    """The interpreter of an environment, there or not."""
    return Path(sys.executable) if environment is None else ENVIRONMENTS / environment / "bin" / "python"


def setup() -> None:
    """Make the environments that are not there yet."""
    for name in sorted({name for name in PEERS.values() if name}):
        python = python_of(name)
        if not python.exists():
            say(f"environment {name}")
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENTS / name)], check=True)
        requirements = HERE / "requirements" / f"{name}.txt"
        say(f"installing {requirements.name}")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)


def installed() -> Iterable[str]:
    """The peers that can run; says how to get the others."""
    for name, environment in PEERS.items():
        if python_of(environment).exists():
            yield name
        else:
            say(f"{name} is left out, it has no environment; make it with: python benchmarks/peers.py --setup")


def run(quick: bool = False) -> list[Measured]:
    """Seconds of prefill, milliseconds a token and bytes of each peer; answers are shown, right or wrong."""
    lengths, rounds = ((1500,), 1) if quick else ((512, 7000), 3)
    _, tokenizer = shared()
    texts = {n: smollm2.passkey(tokenizer, n, smollm2.DEPTHS[1])[0].tolist() for n in lengths}
    workers: dict[str, Worker] = {}
    times: dict[tuple[str, int], list[float]] = {}
    last: dict[tuple[str, int], dict[str, float]] = {}
    answers: dict[tuple[str, int], str] = {}
    try:
        for name in installed():
            where = (str(smollm2.folder()), str(smollm2.gguf_file()))
            workers[name] = Worker("peer_worker.py", name, *where, python=str(python_of(PEERS[name])))
            say(f"peers, warm-up: {name}")
            try:
                said = {n: workers[name].ask(ids=ids, new=8)["ids"] for n, ids in texts.items()}
            except (RuntimeError, BrokenPipeError) as problem:
                console.print(f"[yellow]{name} is left out: {problem}")
                workers.pop(name).close()
                continue
            answers |= {(name, n): str(tokenizer.decode(ids)).strip() for n, ids in said.items()}
            times |= {(name, n): [] for n in lengths}
        for n in lengths:
            for turn in range(rounds):
                for name in list(workers) if turn % 2 else list(workers)[::-1]:
                    last[name, n] = answer = workers[name].ask(ids=texts[n], new=24)
                    times[name, n].append(answer["milliseconds"])
                    say(f"  {n} tokens, round {turn + 1}: {name} {answer['milliseconds']:.1f} ms")
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for (name, n), medians in times.items():
        ours, found = times.get((OURS, n)), last[name, n]
        slower = f"{ratio_of_rounds(medians, ours):.2f} times {OURS}; " if ours else ""
        size = f", cache {found['bytes'] / 2**20:.0f} MiB" if found["bytes"] else ""
        note = f"{spread(medians)}; {slower}prefill {found['prefill']:.1f} s{size}; said: {answers[name, n][:24]}"
        rows.append(Measured(f"{name}, {n} tokens", statistics.median(medians), " ms", note=note))
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["--setup"]:
        setup()
    else:
        sys.exit("peers.py --setup makes the environments; run.py --only peers measures")

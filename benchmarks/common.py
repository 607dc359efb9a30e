"""What every benchmark shares: the sides, how a claim is written down, tables, and worker processes."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effcompile import smollm2

HERE = Path(__file__).parent
console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Side:
    """One way of running the model: which compiler, which cache."""

    name: str
    backend: str | None = None
    static: bool = False
    dynamic: bool | None = None
    bits: tuple[int, int] | None = None
    sparse: tuple[str, tuple[tuple[str, Any], ...]] | None = None
    """A sparse method, and its options."""
    group: int = 32
    plan: Any = None
    """A plan to compile with."""
    weights: tuple[tuple[str, Any], ...] = ()
    """Options of ``quantize_weights``; and ``head_bits``, where the head has bits of its own."""

    def model(self) -> Any:
        """A model of this side. All share one set of weights, so that many can be held at a time."""
        original, _ = shared()
        tensors = [*original.parameters(), *original.buffers()]
        model = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
        if self.bits:
            import effcompile as ec

            ec.compress_kv(key_bits=self.bits[0], value_bits=self.bits[1], group_size=self.group)(model)
        if self.sparse:
            import effcompile as ec

            ec.sparse_attention(self.sparse[0], **dict(self.sparse[1]))(model)
        if self.weights:
            import effcompile as ec

            options = dict(self.weights)
            head = options.pop("head_bits", None)
            ec.quantize_weights(**options)(model)
            if head:
                ec.quantize_weights(**options | {"bits": head, "head": True})(model.lm_head)
        if self.backend:
            options = {} if self.plan is None else {"options": {"plan": self.plan}}
            model.compile(backend=self.backend, dynamic=self.dynamic, **options)
        return model

    def cache(self, model: Any, tokens: int) -> Any:
        """An empty cache with room for ``tokens`` tokens a row."""
        from transformers import DynamicCache, StaticCache

        if self.bits:
            import effcompile as ec

            bits = {"key_bits": self.bits[0], "value_bits": self.bits[1], "group_size": self.group}
            return ec.Cache(model, capacity=tokens, **bits)
        if self.static:
            return StaticCache(config=model.config, max_cache_len=tokens)
        return DynamicCache(config=model.config)


EAGER = Side("eager")
INDUCTOR_DYNAMIC = Side("Inductor dynamic", "inductor", dynamic=True)
INDUCTOR_STATIC = Side("Inductor static", "inductor", static=True)
OURS_16 = Side("effcompile 16 bits", "effcompile", bits=(16, 16))
K8V8 = Side("effcompile K8V8", "effcompile", bits=(8, 8))
K4V4 = Side("effcompile K4V4", "effcompile", bits=(4, 4))
SPARSE = Side(
    "effcompile xattention .98",
    "effcompile",
    bits=(16, 16),
    sparse=("xattention", (("threshold", 0.98),)),
)
SIDES = {side.name: side for side in (EAGER, INDUCTOR_DYNAMIC, INDUCTOR_STATIC, OURS_16, K8V8, K4V4, SPARSE)}


@functools.cache
def shared() -> tuple[Any, Any]:
    """The model and tokenizer that all sides share."""
    return smollm2.load()


def fill(cache: Any, dense: Any, batch: int) -> None:
    """Put the keys and values of a dense cache of one row into an empty cache of ``batch`` equal rows.

    Goes through the cache's own ``update``, as a model would, so one prefill serves many sides.
    """
    if hasattr(cache, "prepare"):
        cache.prepare(batch, dense.get_seq_length(), dense.layers[0].keys.dtype)
    for index, layer in enumerate(dense.layers):
        keys, values = (x.expand(batch, -1, -1, -1).contiguous() for x in (layer.keys, layer.values))
        cache.update(keys, values, index)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number. ``goal`` is None where the number is only shown."""

    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def ratio_of_rounds(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds of the ratio of two neighbours in time."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def spread(values: list[float], unit: str = "") -> str:
    """Least and most of several rounds, for a note."""
    return f"{min(values):.4g} to {max(values):.4g}{unit} in {len(values)} rounds"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import transformers

    import effcompile

    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "effcompile": getattr(effcompile, "__version__", ""),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(section: str, rows: Iterable[Measured]) -> Table:
    """The rows as a person reads them."""
    shown = Table(title=section, title_justify="left", title_style="bold")
    shown.add_column("measure")
    for heading in ("value", "goal"):
        shown.add_column(heading, justify="right")
    shown.add_column("note", style="dim")
    for row in rows:
        sign = "at least" if row.at_least else "at most"
        goal = "" if row.goal is None else f"{sign} {row.goal:g}{row.unit}"
        style = {True: "green", False: "red", None: ""}[row.met]
        shown.add_row(row.what, f"{row.value:.4g}{row.unit}", goal, row.note, style=style)
    return shown


def markdown(section: str, rows: Iterable[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = [f"### {section}", "", "| measure | value | goal | note |", "|---|---:|---:|---|"]
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        goal = "" if row.goal is None else f"{sign} {row.goal:g}{row.unit} {'✓' if row.met else '✗'}"
        lines.append(f"| {row.what} | {row.value:.4g}{row.unit} | {goal} | {row.note} |")
    return "\n".join(lines) + "\n"


class Worker:
    """A process of its own that answers one JSON line for each JSON line, so that sides can take turns."""

    def __init__(self, *command: str, python: str = sys.executable, env: dict[str, str] | None = None) -> None:
        self.name = " ".join(Path(part).name for part in command)
        quiet = {**(env or os.environ), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet, cwd=HERE
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises RuntimeError if the process died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            # Libraries also print; an answer is a JSON object.
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(handle: Any) -> None:
    """The other end of :class:`Worker`: call ``handle(**request)`` for each line of standard input."""
    for line in sys.stdin:
        print(json.dumps(handle(**json.loads(line))), flush=True)


def status_kib(name: str) -> int:
    """A line of ``/proc/self/status`` such as ``VmRSS`` or ``VmHWM``, in KiB; 0 where there is none."""
    found = next((line for line in _lines("/proc/self/status") if line.startswith(name + ":")), None)
    return int(found.split()[1]) if found else 0


def reset_peak() -> None:
    """Let ``VmHWM`` start again from the memory in use now (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as problem:
        console.print(f"[yellow]the peak of memory cannot be reset here ({problem}); it covers the whole process")


def say(text: str) -> None:
    """One line of progress, with the time."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')} {text}", highlight=False)

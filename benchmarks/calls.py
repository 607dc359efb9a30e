"""What a call of an operator costs besides its kernel: through Python, and kept (``lowering/cpp_replay.py``).

``python benchmarks/calls.py`` prints microseconds of one thread's time, medians of 40 interleaved rounds, for kernels
that have next to nothing to do: an empty cache, and weights of 48 x 64. In a model the code of a call has left the
caches since the last layer, so that either way takes longer there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Measured, console, table

import effcompile as ec  # noqa: F401  (the operators)
from effcompile.kernels import ops, weight_ops
from effcompile.kernels.form import KVForm
from effcompile.lowering import cpp_replay

ROUNDS, CALLS = 40, 50


def calls() -> dict[str, Callable[[], Any]]:
    """Operators as a step of decoding calls them, for 9 query and 3 key/value heads of 64."""
    named, form = torch.ops.effcompile, KVForm(16, 16).name
    length, query = torch.tensor(0), torch.randn(1, 1, 9, 64).transpose(1, 2)
    state = [torch.zeros(1, 3, 512, 64), None, None, torch.zeros(1, 3, 512, 64), None, None]
    new = torch.randn(1, 1, 3, 64).transpose(1, 2)
    x, weight = torch.randn(1, 1, 64), torch.randn(48, 64)
    packed = weight_ops.pack(*weight_ops.round_to_nearest(weight, 4, 32, False), 4)
    factors = torch.randn(8, 64), torch.randn(48, 8)
    return {
        "attend": lambda: named.attend.default(query, *state, length, None, form, 0.125, True, -1),
        "kv_store": lambda: named.kv_store.default(*state, length, new, new, form),
        "quantized_linear": lambda: named.quantized_linear.default(x, *packed, None, 48, 4, 32),
        "low_rank_linear": lambda: named.low_rank_linear.default(x, *factors, None),
        "linear": lambda: named.linear.default(x, weight, None),
    }


def microseconds(call: Callable[[], Any], python: bool) -> float:
    """One call, of :data:`CALLS`."""
    ops.replay_state.held += python
    try:
        call()
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        return (time.thread_time() - start) / CALLS * 1e6
    finally:
        ops.replay_state.held -= python


def run() -> list[Measured]:
    """Every operator. Raises RuntimeError where the library cannot be built."""
    if not cpp_replay.wait():
        raise RuntimeError("kernels/cpp/replay.h could not be built; is there a C++ compiler?")
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for name, call in calls().items():
            call()
            times = [(microseconds(call, True), microseconds(call, False)) for _ in range(ROUNDS)]
            python, kept = (statistics.median(side) for side in zip(*times, strict=True))
            rows.append(Measured(name, kept, " us", note=f"through Python {python:.1f} us"))
    return rows


if __name__ == "__main__":
    console.print(table("A call besides its kernel", run()))

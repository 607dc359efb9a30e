"""What calibrating costs: seconds, and memory beside the model, each method in a process of its own.

``python benchmarks/calibration.py METHOD [TEXTS]`` is that process; ``run.py --only calibrate`` starts them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import Measured, say

from effcompile import smollm2

METHODS = ("flap", "carve_moe", "teal", "wina")


def resident(what: str) -> int:
    """Bytes of this process in memory, now (``VmRSS``) or at most since :func:`forget` (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status: this is measured on Linux.")


def forget() -> None:
    """Let the largest size be that of now."""
    Path("/proc/self/clear_refs").write_text("5")


def one(name: str, texts: int) -> None:
    """Calibrate once and print what it took."""
    import carve
    import torch
    from common import shared

    import effcompile as ec

    before = resident("VmRSS")
    model = shared()[0]
    size = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
    given = carve.batches(texts)
    with torch.no_grad():  # libraries start, and every page of the weights is there
        model(given[0][:, :8], use_cache=False)
    loaded = resident("VmRSS")
    forget()
    plan = ec.calibrate(model, given, [getattr(ec, name)()], progress=False)
    peak = resident("VmHWM")
    found = {"seconds": plan.made["seconds"], "size": size, "loaded": loaded - before, "peak": peak - before}
    print(json.dumps(found | {"sites": len(list(plan))}))


def run(quick: bool = False) -> list[Measured]:
    """Rows of each method: seconds, and the largest memory with the model over the model's bytes."""
    texts = 1 if quick else 8
    rows = []
    smollm2.folder()  # the first process would convert the weights, and have more in memory for it
    for name in METHODS:
        say(f"calibrate: {name}")
        command = [sys.executable, __file__, name, str(texts)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        note = f"{texts} x 2,048 tokens, {found['sites']} blocks"
        rows.append(Measured(f"{name}: calibrated in", found["seconds"], " s", 300.0, False, note))
        peak, loaded, size = (found[what] / 2**20 for what in ("peak", "loaded", "size"))
        note = f"{peak:.0f} MiB; {loaded:.0f} before, weights {size:.0f}"
        rows.append(Measured(f"{name}: memory over the model", peak / size, "x", 2.0, False, note))
    return rows


if __name__ == "__main__":
    one(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8)

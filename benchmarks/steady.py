"""What does not show in a token's time: our share of a cold compile, recompilation and memory over many steps.

``python benchmarks/steady.py TASK`` is the process in which a task is measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from common import K4V4, Measured, Worker, say, serve, shared, status_kib


def cold(tokens: int) -> dict[str, Any]:
    """Compile prefill and decode with nothing on disk; seconds in all, and seconds of ours."""
    import effcompile as ec
    from effcompile import measure, smollm2

    measure.warm_up()
    model, tokenizer = K4V4.model(), shared()[1]
    run = measure.generate(model, smollm2.passkey(tokenizer, tokens, 0.5), 3)
    report = ec.inspect(model)
    steps: dict[str, float] = {}
    for graph in report.graphs:
        for step, seconds in graph.seconds.items():
            steps[step] = steps.get(step, 0.0) + seconds
    return {"compiling": run.compiling, "graphs": len(report.graphs), "steps": steps}


def long_run(steps: int) -> dict[str, Any]:
    """Generate ``steps`` tokens in one call, counting graphs and watching memory."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    from effcompile import smollm2

    class Watch(StoppingCriteria):
        """Notes resident memory and the number of compiled graphs at every hundredth token."""

        def __init__(self) -> None:
            self.step = 0
            self.seen: list[tuple[int, int, int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.step += 1
            if self.step % 100 == 0 or self.step == 3:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                self.seen.append((self.step, graphs, status_kib("VmRSS")))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    model, tokenizer = K4V4.model(), shared()[1]
    prompt = smollm2.passkey(tokenizer, 300, 0.5)
    watch = Watch()
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    return {"seen": watch.seen}


def compile_share(quick: bool = False) -> list[Measured]:
    """Our own share of a cold compile."""
    say("cold compile")
    with tempfile.TemporaryDirectory() as empty:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty}
        with Worker("steady.py", "cold", env=env) as process:
            answer = process.ask(tokens=300)
    own = sum(seconds for step, seconds in answer["steps"].items() if step != "inductor")
    note = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in answer["steps"].items())
    return [
        Measured("cold compile, prefill and decode", answer["compiling"], " s", note=f"{answer['graphs']} graphs"),
        Measured("own share of it", 100 * own / answer["compiling"], " %", 10, at_least=False, note=note),
    ]


def steps(quick: bool = False) -> list[Measured]:
    """Graphs and host memory over many steps."""
    count = 300 if quick else 2000
    say(f"{count} steps")
    with Worker("steady.py", "long_run") as process:
        seen = process.ask(steps=count)["seen"]
    graphs = [row[1] for row in seen]
    # The first hundreds of steps fill allocator caches; growth is what comes after.
    later = [row for row in seen if row[0] >= count // 4]
    growth = (later[-1][2] - later[0][2]) / 1024
    return [
        Measured(f"graphs after 3 of {count} steps", graphs[0], "", 2, at_least=False),
        Measured(f"recompilations in {count} steps after that", graphs[-1] - graphs[0], "", 0, at_least=False),
        Measured(f"host memory, from step {later[0][0]} to {later[-1][0]}", growth, " MiB more", 8, at_least=False),
    ]


if __name__ == "__main__":
    serve({"cold": cold, "long_run": long_run}[sys.argv[1]])

"""One way of generating after a long prompt, as a process: a JSON request a line, an answer a line.

``python peer_worker.py NAME MODEL_FOLDER GGUF_FILE``, run with the Python of the environment that has the package; only
eager and effcompile need effcompile to be installed there.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Handler = Callable[[list[int], int], Answer]
Quantized = tuple[str, dict[str, Any]]


def shared_measure() -> Any:
    """``effcompile/measure.py`` as a file: the same stamps in every environment, installed or not."""
    spec = importlib.util.spec_from_file_location("measure", Path(__file__).parents[1] / "effcompile" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


def nested_bytes(thing: Any) -> int:
    """Bytes of all tensors in a value: containers, and tensor subclasses by their parts."""
    import torch

    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            return sum(nested_bytes(getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
        return int(thing.nbytes)
    if isinstance(thing, dict):
        return sum(map(nested_bytes, thing.values()))
    if isinstance(thing, list | tuple):
        return sum(map(nested_bytes, thing))
    return 0


def dense_model(folder: str) -> Any:
    """The converted model, in eager."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def hugging(
    folder: str, bits: tuple[int, int] | None = None, quantized: Quantized | None = None, weights: bool = False
) -> Handler:
    """``generate`` of transformers: eager, decorated by effcompile, or with a quantised cache of transformers."""
    import torch

    measure = shared_measure()
    model = dense_model(folder)
    if bits:
        import effcompile as ec

        ec.compress_kv(key_bits=bits[0], value_bits=bits[1])(model)
        if weights:
            ec.quantize_weights(bits=4, group=32)(model)
            ec.quantize_weights(bits=8, group=32, head=True)(model.lm_head)
        model.compile(backend="effcompile")

    def ask(ids: list[int], new: int) -> Answer:
        options: dict[str, Any] = {}
        if quantized:
            from transformers.cache_utils import QuantizedCache

            options["past_key_values"] = QuantizedCache(quantized[0], model.config, **quantized[1])
        run = measure.generate(model, torch.tensor([ids]), new, **options)
        cache = run.cache
        size = cache.nbytes if hasattr(cache, "nbytes") else sum(nested_bytes(vars(layer)) for layer in cache.layers)
        return {
            "prefill": run.first,
            "milliseconds": run.milliseconds,
            "slowest": 1000 * max(run.gaps),
            "bytes": size,
            "ids": run.new_tokens[0].tolist(),
        }

    return ask


def kvpress(folder: str, ratio: float) -> Handler:
    """SnapKV of kvpress, used as its documentation does: the context is compressed before the question is known."""
    import torch
    from kvpress import SnapKVPress
    from transformers import DynamicCache

    model = dense_model(folder)
    press = SnapKVPress(compression_ratio=ratio)
    question = 11

    def ask(ids: list[int], new: int) -> Answer:
        cache, stamps, said = DynamicCache(), [time.perf_counter()], []
        with torch.no_grad():
            with press(model):
                model.model(torch.tensor([ids[:-question]]), past_key_values=cache)
            step, position = torch.tensor([ids[-question:]]), len(ids) - question
            for _ in range(new):
                # Positions go on from the whole context, not from what is left of it.
                positions = torch.arange(position, position + step.shape[1])[None]
                logits = model(step, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
                position += step.shape[1]
                step = logits[:, -1:].argmax(-1)
                said.append(int(step))
                stamps.append(time.perf_counter())
        gaps = [after - before for before, after in itertools.pairwise(stamps[1:])]
        return {
            "prefill": stamps[1] - stamps[0],
            "milliseconds": 1000 * statistics.median(gaps),
            "slowest": 1000 * max(gaps),
            "bytes": sum(nested_bytes(vars(layer)) for layer in cache.layers),
            "ids": said,
        }

    return ask


def openvino(gguf: str) -> Handler:
    """OpenVINO GenAI on the GGUF itself, weights in 4 bits."""
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    # Else the second round would find the first one's prompt, and measure no prefill at all.
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 8192
    pipeline = openvino_genai.LLMPipeline(gguf, "CPU", scheduler_config=scheduler)
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True
    config.apply_chat_template = False

    def ask(ids: list[int], new: int) -> Answer:
        config.max_new_tokens = new
        config.min_new_tokens = new
        tokens = openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        result = pipeline.generate(tokens, config)
        # Stamps in milliseconds, one for each token.
        times = list(result.perf_metrics.raw_metrics.m_new_token_times)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return {
            "prefill": result.perf_metrics.get_ttft().mean / 1000,
            "milliseconds": statistics.median(gaps),
            "slowest": max(gaps),
            "bytes": 0,
            "ids": [int(token) for token in result.tokens[0]],
        }

    return ask


def main(name: str, folder: str, gguf: str) -> None:
    """Answer requests until standard input ends."""
    makers: dict[str, Callable[[], Handler]] = {
        "eager": lambda: hugging(folder),
        "effcompile K4V4": lambda: hugging(folder, bits=(4, 4)),
        "effcompile K4V4, linears in 4 bits, head in 8": lambda: hugging(folder, bits=(4, 4), weights=True),
        "quanto 4 bits": lambda: hugging(folder, quantized=("quanto", {"nbits": 4})),
        "hqq 4 bits": lambda: hugging(folder, quantized=("hqq", {"nbits": 4, "axis_key": 0, "axis_value": 0})),
        "kvpress SnapKV 0.5": lambda: kvpress(folder, 0.5),
        "openvino-genai": lambda: openvino(gguf),
    }
    ask = makers[name]()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(ask(request["ids"], request["new"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])

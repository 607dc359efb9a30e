"""How the demo and the benchmarks measure: token times, compile times, cache bytes, perplexity. One definition each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

MIB = 1024 * 1024


class TokenStamps(StoppingCriteria):
    """Takes the time after every token of one ``generate`` call, and never stops it.

    Two runs of a prefill differ by more than a token takes, so token times are never got by subtracting runs.
    """

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time; ask for no stop."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Teacher(LogitsProcessor):
    """Makes ``generate`` write a given text, and adds up how unlikely the model found each of its tokens."""

    def __init__(self, text: Tensor) -> None:
        self.text = text
        self.nats: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Score the next token of the text, then allow only that one."""
        target = self.text[:, input_ids.shape[1]]
        surprise = torch.nn.functional.cross_entropy(scores.float(), target, reduction="mean")
        self.nats.append(float(surprise))
        return torch.full_like(scores, float("-inf")).scatter_(1, target[:, None], 0.0)


@dataclasses.dataclass
class CompileClock:
    """Seconds that ``torch.compile`` spent, and how often it compiled."""

    seconds: float = 0.0
    count: int = 0
    _began: float = 0.0

    def _start(self, *args: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *args: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.count += 1


@contextlib.contextmanager
def compile_clock() -> Iterator[CompileClock]:
    """Within this context every compilation is timed by Dynamo's own callbacks."""
    from torch._dynamo.callback import callback_handler

    clock = CompileClock()
    callback_handler.register_start_callback(clock._start)
    callback_handler.register_end_callback(clock._end)
    try:
        yield clock
    finally:
        callback_handler.remove_start_callback(clock._start)
        callback_handler.remove_end_callback(clock._end)


def warm_up() -> None:
    """Let ``torch.compile`` import and start what it needs, seconds which belong to no model. Once per process."""
    torch.compile(lambda x: (2 * x).sin().sum())(torch.ones(64))


@dataclasses.dataclass
class Generation:
    """What one ``generate`` call gave and how long each part took."""

    new_tokens: Tensor
    cache: Any
    first: float
    """Seconds to the first token without compiling: the prefill."""
    compiling: float
    """Seconds spent compiling."""
    gaps: list[float]
    """Seconds between consecutive tokens."""

    @property
    def milliseconds(self) -> float:
        """The median time of a token after the first; the compilation of the decode step does not move a median."""
        return 1000 * statistics.median(self.gaps) if self.gaps else math.nan


def generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Generation:
    """Greedy ``model.generate`` of exactly ``new_tokens`` tokens, timed inside the one call."""
    stamps = TokenStamps()
    first = 0.0

    class FirstToken(StoppingCriteria):
        """Notes how much of the time to the first token was compilation."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            nonlocal first
            if len(stamps.stamps) == 2:
                first = stamps.stamps[1] - stamps.stamps[0] - clock.seconds
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    with compile_clock() as clock, torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([stamps, FirstToken()]),
            **options,
        )
    times = stamps.stamps
    gaps = [after - before for before, after in itertools.pairwise(times[1:])]
    return Generation(out.sequences[:, ids.shape[1] :], out.past_key_values, first, clock.seconds, gaps)


def cache_nbytes(cache: Any) -> int:
    """Bytes of all buffers of a transformers cache: what is allocated, used or not."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                total += value.nbytes
    return total


def stepwise_perplexity(model: Any, text: Tensor, context: int, cache: Any) -> float:
    """Perplexity of ``text[:, context:]``, token by token through ``generate`` and its cache.

    The context is read without compiled code, so that the measurement adds no graph for its length; every token after
    it goes through the same decode step as a user's. ``cache`` must be empty and big enough.
    """
    common: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "past_key_values": cache}
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            teacher = Teacher(text)
            model.generate(
                text[:, :context], max_new_tokens=1, logits_processor=LogitsProcessorList([teacher]), **common
            )
        steps = text.shape[1] - context - 1
        rest = Teacher(text)
        start = text[:, : context + 1]
        mask = torch.ones_like(start)
        model.generate(
            start,
            attention_mask=mask,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList([rest]),
            **common,
        )
    nats = teacher.nats + rest.nats
    return math.exp(sum(nats) / len(nats))


def chunked_perplexity(model: Any, text: Tensor, cache: Any, chunk: int) -> float:
    """Perplexity of ``text`` ``[1, T]``, teacher-forced through ``cache`` in calls of ``chunk`` tokens.

    Each call stores its tokens first and attends to the store, so a token sees a few more packed keys than it would one
    by one: with a compressed cache this is the stricter of the two.
    """
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, text.shape[1], chunk):
            piece = text[:, start : start + chunk]
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            targets = text[0, start + 1 : start + 1 + piece.shape[1]]
            nats += float(
                torch.nn.functional.cross_entropy(logits[0, : len(targets)].float(), targets, reduction="sum")
            )
            count += len(targets)
    return math.exp(nats / count)

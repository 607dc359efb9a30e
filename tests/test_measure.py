"""The measuring itself: token stamps, teacher forcing, compile times, bytes. Against computing it directly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from effcompile import measure
from models import MODELS


@pytest.fixture
def llama() -> Any:
    return MODELS["llama"]("sdpa")


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 128, (1, 65))


def nats(model: Any, text: torch.Tensor) -> torch.Tensor:
    """The surprise at each token from the second on, by one forward call without a cache."""
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="none")


def test_generate_stamps_every_token(llama: Any, text: torch.Tensor) -> None:
    run = measure.generate(llama, text, 9)
    assert run.new_tokens.shape == (1, 9)
    assert len(run.gaps) == 8
    assert run.first > 0
    assert run.compiling == 0
    assert min(run.gaps) <= run.milliseconds / 1000 <= max(run.gaps)
    with torch.no_grad():
        again = llama.generate(text, do_sample=False, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(run.new_tokens, again[:, 65:])


def test_compiling_is_timed_and_is_no_part_of_the_first_token(llama: Any, text: torch.Tensor) -> None:
    llama.compile(backend="aot_eager")
    run = measure.generate(llama, text, 3)
    again = measure.generate(llama, text, 3)
    assert run.compiling > 0
    assert again.compiling == 0
    assert 0 < run.first < run.first + run.compiling


def test_stepwise_perplexity_is_that_of_one_forward_call(llama: Any, text: torch.Tensor) -> None:
    found = measure.stepwise_perplexity(llama, text, 40, DynamicCache(config=llama.config))
    # Tokens 40 to 64 are scored, the first of them from the context alone.
    torch.testing.assert_close(found, math.exp(nats(llama, text)[39:].mean()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_chunked_perplexity_is_that_of_one_forward_call(llama: Any, text: torch.Tensor, chunk: int) -> None:
    found = measure.chunked_perplexity(llama, text, DynamicCache(config=llama.config), chunk)
    torch.testing.assert_close(found, math.exp(nats(llama, text).mean()), rtol=1e-4, atol=0)


def test_bytes_of_a_cache_of_transformers(llama: Any, text: torch.Tensor) -> None:
    size = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, channels, bytes
    dynamic = DynamicCache(config=llama.config)
    static = StaticCache(config=llama.config, max_cache_len=100)
    with torch.no_grad():
        llama(text, past_key_values=dynamic)
        llama(text, past_key_values=static)
    assert measure.cache_nbytes(dynamic) == 65 * size
    assert 100 * size <= measure.cache_nbytes(static) <= 100 * size + 64  # and its counters

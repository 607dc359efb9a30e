"""What compression costs: bytes of the cache, perplexity, pass keys."""

from __future__ import annotations

import torch
from common import EAGER, K4V4, K8V8, OURS_16, Measured, Side, say, shared

from effcompile import measure, smollm2

CHUNK = 32
"""Tokens a call when a text is read through the cache: fewer than the residual, so every call reads packed keys."""


def cache_bytes(quick: bool = False) -> list[Measured]:
    """Bytes allocated for 7,000 tokens, tail and spare capacity included, against the same tokens in bf16."""
    length = 7000
    model = K4V4.model()
    config = model.config
    cache = K4V4.cache(model, length)
    cache.prepare(1, length, torch.float32)
    size = config.head_dim * config.num_key_value_heads * config.num_hidden_layers
    dense = 2 * length * size * torch.bfloat16.itemsize
    allocated = sum(buffer.nbytes for layer in cache.compressed for buffer in layer.buffers()) + cache.length.nbytes
    if cache.nbytes != allocated:
        raise AssertionError(f"cache.nbytes says {cache.nbytes}, but {allocated} bytes are allocated")
    note = f"capacity {cache.capacity:,}, residual {cache.compressed[0].form.residual} in fp32"
    return [
        Measured("bf16, 7,000 tokens", dense / measure.MIB, " MiB"),
        Measured("K4V4, 7,000 tokens", cache.nbytes / measure.MIB, " MiB", note=note),
        Measured("K4V4 against bf16", cache.nbytes / dense, "", 0.37, at_least=False, note=note),
    ]


def perplexity(quick: bool = False) -> list[Measured]:
    """Perplexity of ``pydoc_data.topics``, tokens 20,000 to 24,096, read through the cache."""
    _, tokenizer = shared()
    first, last = smollm2.TOPICS
    text = smollm2.topics(tokenizer)[:, first : first + 512 if quick else last]
    found = {}
    for side in (EAGER, OURS_16, K8V8, K4V4):
        torch._dynamo.reset()
        say(f"perplexity of {text.shape[1]} tokens: {side.name}")
        model = side.model()
        found[side] = measure.chunked_perplexity(model, text, side.cache(model, text.shape[1]), CHUNK)
    goals = {OURS_16: 0.05, K8V8: 1.0, K4V4: 3.0}
    dense = found[EAGER]
    rows = [Measured(f"perplexity, {side.name}", value, note=f"{CHUNK} tokens a call") for side, value in found.items()]
    rows += [
        Measured(f"{side.name} against dense", 100 * (found[side] / dense - 1), " %", goal, at_least=False)
        for side, goal in goals.items()
    ]
    return rows


def passkeys(side: Side, lengths: tuple[int, ...]) -> list[Measured]:
    """How many of four pass keys, at four depths, ``generate`` finds at each length."""
    torch._dynamo.reset()
    _, tokenizer = shared()
    model = side.model()
    # One cache for all prompts: another capacity would be another compilation.
    cache = side.cache(model, max(lengths) + 16)
    rows = []
    for length in lengths:
        right, said = 0, []
        for number, depth in enumerate(smollm2.DEPTHS):
            key = 10_000 + 17_389 * (number + 1)
            prompt = smollm2.passkey(tokenizer, length, depth, key)
            cache.reset()
            new = measure.generate(model, prompt, 8, past_key_values=cache).new_tokens[0]
            right += smollm2.answers(tokenizer, new, key)
            said.append(str(tokenizer.decode(new[:6])).strip())
        say(f"pass keys at {length}, {side.name}: {right} of 4")
        note = "" if right == 4 else "said: " + " | ".join(said)
        rows.append(Measured(f"pass keys at {length}, {side.name}", right, " of 4", 4, note=note))
    return rows


def passkey(quick: bool = False) -> list[Measured]:
    """Pass keys with the cache in 8 and in 4 bits."""
    lengths = smollm2.LENGTHS[:2] if quick else smollm2.LENGTHS
    return [*passkeys(K8V8, lengths), *passkeys(K4V4, lengths)]

"""Tiny random models of the architectures that the tests walk, made from their configs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
GQA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def _hf(name: str, **config: object) -> Callable[[str], nn.Module]:
    def make(attention: str = "sdpa") -> nn.Module:
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
        made = cls(getattr(transformers, f"{name}Config")(**config, attn_implementation=attention)).eval()
        # Random weights of the default size give nearly uniform attention, which would hide a wrong mask or scale.
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)
        return made

    return make


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "llama": _hf("Llama", **GQA),
    "qwen2": _hf("Qwen2", **GQA),
    "qwen3": _hf("Qwen3", **GQA, head_dim=64),
    "mistral": _hf("Mistral", **GQA, sliding_window=None),
    "phi3": _hf("Phi3", **GQA, pad_token_id=0),
    "gpt2": _hf("GPT2", n_embd=128, n_layer=2, n_head=4, n_positions=2048, vocab_size=128),
    "neox": _hf("GPTNeoX", **SIZES, num_attention_heads=4, max_position_embeddings=2048),
    "opt": _hf(
        "OPT",
        hidden_size=128,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=2048,
        word_embed_proj_dim=128,
    ),
}
"""Architectures with a transformers cache, by test id."""


class NanoGPT(nn.Module):
    """A hand-written decoder without any cache: attention in arithmetic, with a buffer for the mask."""

    def __init__(self, spelling: str = "arithmetic", width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.heads = spelling, heads
        self.embed = nn.Embedding(128, width)
        self.attn = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, c = x.shape
        for attn, proj in zip(self.attn, self.proj):
            q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in attn(x).split(c, dim=2))
            if self.spelling == "sdpa":
                y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
                weights = weights.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
                y = nn.functional.softmax(weights, dim=-1) @ v
            x = x + proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x @ self.embed.weight.T


class Count(TorchFunctionMode):
    """Counts attention in an eager run: calls of SDPA and of softmax. The oracle for the number of sites."""

    def __init__(self) -> None:
        self.sdpa = self.softmax = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.sdpa += func is nn.functional.scaled_dot_product_attention
        self.softmax += func in (nn.functional.softmax, torch.softmax, Tensor.softmax)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Count]:
    """Count the attention of everything that runs eagerly in this context."""
    mode = Count()
    with mode:
        yield mode

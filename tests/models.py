"""Tiny random models of the architectures that the tests walk, made from their configs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

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


_SOFTMAX = {nn.functional.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
_WHOLE = {
    nn.functional.scaled_dot_product_attention,
    nn.functional.multi_head_attention_forward,
    torch._native_multi_head_attention,
}
_SAME = {
    nn.functional.dropout, Tensor.to, Tensor.type_as, Tensor.float, Tensor.contiguous, Tensor.view, Tensor.reshape,
    Tensor.__getitem__, Tensor.unsqueeze,
}  # fmt: skip


class Count(TorchFunctionMode):
    """Counts attention in an eager run. The oracle for the number of sites.

    Attributes
    ----------
    sdpa, softmax
        Calls of the two.
    attention
        Calls of SDPA, of torch's whole multi-head attention (inside which this mode is off) and of an attention
        operator from elsewhere, and each softmax whose result, through dropout, casts, views and slices, is a factor of
        a matrix product; a router's softmax is not.
    linear
        Calls of ``linear`` and ``addmm``, and products with a matrix.
    """

    def __init__(self) -> None:
        self.sdpa = self.softmax = self.attention = self.linear = 0
        # The tensors themselves: an id alone would be given to another tensor once the first is gone.
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.sdpa += func is nn.functional.scaled_dot_product_attention
        self.softmax += func in _SOFTMAX
        matrix = func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and args[1].ndim == 2
        self.linear += func in (nn.functional.linear, torch.addmm) or matrix
        whole = func in _WHOLE or "flash_attn" in str(func)
        flat = [x for a in args for x in (a if isinstance(a, (list, tuple)) else [a])]
        weights = [x for x in flat if id(x) in self._weights]
        self.attention += whole or (func in _PRODUCTS and bool(weights))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and (func in _SOFTMAX or (func in _SAME and weights)):
            self._weights[id(out)] = out
        return out


@contextmanager
def counted() -> Iterator[Count]:
    """Count the attention of everything that runs eagerly in this context."""
    from transformers.integrations import flex_attention

    mode, flex = Count(), flex_attention.compile_friendly_flex_attention

    def counting(*args: object, **kwargs: object) -> object:
        # transformers compiles it even in an eager model, out of the mode's sight.
        mode.attention += 1
        return flex(*args, **kwargs)

    with mode, mock.patch.object(flex_attention, "compile_friendly_flex_attention", counting):
        yield mode

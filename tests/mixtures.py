"""Tiny mixtures of experts, each with what its router does as its authors wrote it down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effcompile.patterns.router import Router

VOCABULARY, EXPERTS = 96, 8
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": EXPERTS,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}


class Written(nn.Module):
    """A decoder of one's own, around a mixture: averages over the text so far in the place of attention."""

    def __init__(self, mixture: Callable[[int], nn.Module], top_k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.mix = nn.ModuleList(mixture(top_k) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(input_ids)
        for mix in self.mix:
            x = x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
            x = x + mix(self.norm(x))
        return x @ self.embed.weight.T


class Gathered(nn.Module):
    """Looks up the matrices of the chosen experts, and sums over the slots."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(32, EXPERTS)
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 24, 32)), nn.Parameter(torch.randn(EXPERTS, 32, 24))

    def forward(self, x: Tensor) -> Tensor:
        """The mixture, ``[B, T, 32]``."""
        rows = x.view(-1, 32)
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        hidden = F.silu(torch.einsum("ti,taoi->tao", rows, self.up[chosen]))
        out = torch.einsum("tao,taio->tai", hidden, self.down[chosen])
        return torch.einsum("tai,ta->ti", out, weights).view(x.shape)


class Masked(nn.Module):
    """Runs every expert on every token, and weighs them by masked scores; a vector of its own helps to choose."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router, self.balance = nn.Parameter(torch.randn(32, EXPERTS)), nn.Parameter(torch.randn(EXPERTS))
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 32, 24)), nn.Parameter(torch.randn(EXPERTS, 24, 32))

    def forward(self, x: Tensor) -> Tensor:
        """The mixture, ``[B, T, 32]``."""
        scores = torch.sigmoid(x @ self.router)
        chosen = (scores + 0.2 * self.balance).topk(self.top_k, dim=-1, sorted=False).indices
        kept = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        weights = scores * kept
        weights = 1.5 * weights / (weights.sum(-1, keepdim=True) + 1e-9)
        hidden = F.gelu(torch.einsum("bti,eio->bteo", x, self.up))
        return torch.einsum("bteo,eoi,bte->bti", hidden, self.down, weights)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A model by the number of experts of a token, how many routers it has, and what each does with 3 of 8."""

    make: Callable[[int], nn.Module]
    router: Router
    routers: int = 2
    dense: bool = False
    repeats: bool = True
    """Whether what reads the choice may be told the same expert twice."""


def _filled(model: nn.Module) -> nn.Module:
    """Numbers everywhere: zeros and equal ones would hide which vector is added where."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "norm" not in name and "inv_freq" not in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def _hf(kind: str, count: str = "num_experts", config: str = "", **settings: Any) -> Callable[[int], nn.Module]:
    def make(top_k: int) -> nn.Module:
        import transformers

        given = {**SIZES, count: EXPERTS, "num_experts_per_tok": top_k, **settings}
        cls = getattr(transformers, f"{kind}ForCausalLM")
        return _filled(cls(getattr(transformers, f"{config or kind}Config")(**given)))

    return make


def _own(mixture: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda top_k: _filled(Written(mixture, top_k))


_SMALL = {"moe_intermediate_size": 16}
MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture(_hf("Mixtral", "num_local_experts"), Router(8, 3, "softmax", "all", True)),
    "qwen2-moe": Mixture(
        _hf("Qwen2Moe", shared_expert_intermediate_size=16, norm_topk_prob=False, **_SMALL),
        Router(8, 3, "softmax", "all", False),
    ),
    "qwen3-moe": Mixture(
        _hf("Qwen3Moe", head_dim=16, norm_topk_prob=True, **_SMALL), Router(8, 3, "softmax", "all", True)
    ),
    "olmoe": Mixture(_hf("Olmoe", norm_topk_prob=False), Router(8, 3, "softmax", "all", False)),
    "granite-moe": Mixture(_hf("GraniteMoe", "num_local_experts"), Router(8, 3, "softmax", "chosen", True)),
    "gpt-oss": Mixture(
        _hf("GptOss", "num_local_experts", head_dim=16, sliding_window=16), Router(8, 3, "softmax", "chosen", True)
    ),
    "deepseek-v2": Mixture(
        _hf("DeepseekV2", topk_method="group_limited_greedy", **_DEEPSEEK),
        Router(8, 3, "softmax", "all", False, 2.5, "", 4, 2, "max"),
        routers=1,
    ),
    "deepseek-v3": Mixture(
        _hf("DeepseekV3", norm_topk_prob=True, **_DEEPSEEK),
        Router(8, 3, "sigmoid", "all", True, 2.5, "choice", 4, 2, "top2"),
        routers=1,
    ),
    "llama4": Mixture(
        _hf(
            "Llama4", "num_local_experts", "Llama4Text", head_dim=16, intermediate_size_mlp=24, attention_chunk_size=16
        ),
        Router(8, 3, "sigmoid", "chosen", False),
        dense=True,
        repeats=False,
    ),
    "gathered": Mixture(_own(Gathered), Router(8, 3, "softmax", "all", True)),
    "masked": Mixture(_own(Masked), Router(8, 3, "sigmoid", "all", True, 1.5, "choice"), dense=True, repeats=False),
}
"""Every mixture by its test id."""
IDS = torch.randint(3, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(2))


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """What a model says, without a cache."""
    with torch.no_grad():
        out: Any = model(ids) if isinstance(model, Written) else model(ids, use_cache=False)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found

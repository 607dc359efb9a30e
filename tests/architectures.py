"""One tiny random model of each architecture, and what the back end does with it.

``python tests/architectures.py --write`` writes ``tests/golden/architectures.json`` anew, and ``--write NAME ...`` only
those rows; without ``--write`` the rows are printed. The numbers in it are facts about a release of transformers, so a
changed file is to be read and not just committed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import effcompile as ec
from effcompile.passes import backend, report
from effcompile.runtime.cache import CacheError
from models import NanoGPT, counted

GOLDEN = Path(__file__).parent / "golden" / "architectures.json"
VOCABULARY, TOKENS, STEPS = 96, 40, 4
IDS = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model, what to call it with, whether it keeps keys and values between calls."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = lambda: {"input_ids": IDS}
    cached: bool = True


def _scaled(model: nn.Module) -> nn.Module:
    """Random weights of the default size give nearly uniform attention, which would hide a wrong mask or scale."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def _hf(
    kind: str, attention: str | None = None, cls: str = "ForCausalLM", config: str = "", **settings: Any
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, f"{config or kind}Config")(**settings)
        if attention is not None:
            made._attn_implementation = attention
        return _scaled(getattr(transformers, kind + cls)(made))

    return make


class EinsumAttention(nn.Module):
    """Attention in two einsums, on layouts that are never transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(input_ids)
        batch, tokens, width = x.shape
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = qkv(x).view(batch, tokens, 3, 4, 16).unbind(2)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(16)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            x = x + out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width))
        return x @ self.embed.weight.T


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``, with the weights asked for or not."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.attention = nn.ModuleList(nn.MultiheadAttention(64, 4, batch_first=True) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(input_ids)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for attention in self.attention:
            x = x + attention(x, x, x, attn_mask=future, need_weights=self.weights)[0]
        return x @ self.embed.weight.T


@torch.library.custom_op("effcompile_tests::flash_attn_func", mutates_args=())
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a hub kernel looks like to a compiler: an operator it knows nothing about."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).contiguous()


@flash_attn_func.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q)


class FlashGPT(nn.Module):
    """A decoder whose attention is an operator from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(input_ids)
        for qkv in self.qkv:
            q, k, v = qkv(x).view(*x.shape[:2], 3, 4, 16).unbind(2)
            x = x + flash_attn_func(q, k, v, True).flatten(2)
        return x @ self.embed.weight.T


def _own(cls: Callable[..., nn.Module], *args: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return _scaled(cls(*args))

    return make


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def _placed() -> Inputs:
    positions = torch.arange(TOKENS).expand(len(IDS), -1)
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": positions}


def _sound() -> Inputs:
    features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(2))
    return {"input_features": features, "decoder_input_ids": IDS[:, :12]}


_DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
_BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
_GEMMA = {**GQA, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_hf("Llama", **GQA)),
    "llama-eager": Architecture(_hf("Llama", "eager", **GQA)),
    "llama-flex": Architecture(_hf("Llama", "flex_attention", **GQA), cached=False),
    "qwen2": Architecture(_hf("Qwen2", **GQA)),
    "qwen3": Architecture(_hf("Qwen3", **GQA, head_dim=32)),
    "gemma2": Architecture(_hf("Gemma2", **_GEMMA)),
    "gemma3": Architecture(
        _hf(
            "Gemma3",
            config="Gemma3Text",
            **_GEMMA | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        )
    ),
    "phi3": Architecture(_hf("Phi3", **GQA)),
    "gpt2": Architecture(_hf("GPT2", cls="LMHeadModel", **_GPTJ)),
    "gpt-neox": Architecture(_hf("GPTNeoX", **SIZES)),
    "gpt-j": Architecture(_hf("GPTJ", **_GPTJ, rotary_dim=8)),
    # Without a mask and positions, which generate gives it, it reads the cache's length as a number.
    "opt": Architecture(_hf("OPT", **SIZES, ffn_dim=96, word_embed_proj_dim=64), _placed),
    "bloom": Architecture(_hf("Bloom", **_BLOOM)),
    "falcon": Architecture(_hf("Falcon", **SIZES, num_kv_heads=2, new_decoder_architecture=True)),
    # Without a mask, as in generate, it makes one of as many columns as there are tokens; ours has all of them.
    "falcon-alibi": Architecture(
        _hf("Falcon", **SIZES, alibi=True, multi_query=False),
        lambda: {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    ),
    "mixtral": Architecture(_hf("Mixtral", **GQA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": Architecture(_hf("Qwen3Moe", **GQA, **EXPERTS, head_dim=16, num_experts=4)),
    "gpt-oss": Architecture(
        _hf("GptOss", **GQA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    ),
    "cohere": Architecture(_hf("Cohere", **GQA)),
    "olmo2": Architecture(_hf("Olmo2", **GQA)),
    "stablelm": Architecture(_hf("StableLm", **GQA)),
    "granite": Architecture(_hf("Granite", **GQA, attention_multiplier=0.1)),
    "smollm3": Architecture(_hf("SmolLM3", **GQA)),
    "llama4": Architecture(
        _hf(
            "Llama4",
            config="Llama4Text",
            **GQA | {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size_mlp": 96, "attention_chunk_size": 16},
            num_local_experts=4,
        )
    ),
    "deepseek-v3": Architecture(_hf("DeepseekV3", **_DEEPSEEK)),
    "bert": Architecture(_hf("Bert", cls="ForMaskedLM", **SIZES), cached=False),
    "vit": Architecture(
        _hf("ViT", cls="Model", **{k: SIZES[k] for k in list(SIZES)[:4]}, image_size=16, patch_size=4), _pixels, False
    ),
    "t5-encoder": Architecture(_hf("T5Encoder", cls="Model", config="T5", **_T5), cached=False),
    "whisper": Architecture(_hf("Whisper", cls="ForConditionalGeneration", **_WHISPER), _sound, cached=False),
    "nanogpt": Architecture(_own(NanoGPT, "arithmetic"), lambda: {"ids": IDS}, False),
    "nanogpt-sdpa": Architecture(_own(NanoGPT, "sdpa"), lambda: {"ids": IDS}, False),
    "einsum": Architecture(_own(EinsumAttention), cached=False),
    "torch-mha": Architecture(_own(TorchAttention), cached=False),
    "torch-mha-weights": Architecture(_own(TorchAttention, True), cached=False),
    "flash-operator": Architecture(_own(FlashGPT), cached=False),
}
"""Every architecture by its test id."""


def _logits(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found: Tensor = out.logits if "logits" in out else out[0]
    return found


def more(inputs: Inputs, step: int) -> Inputs:
    """What a step after the prompt is given beside its token, as the prompt was."""
    given = {}
    if "attention_mask" in inputs:
        given["attention_mask"] = torch.ones(len(IDS), TOKENS + step + 1, dtype=torch.long)
    if "position_ids" in inputs:
        given["position_ids"] = torch.full((len(IDS), 1), TOKENS + step)
    return given


def _run(model: nn.Module, inputs: Inputs, cached: bool) -> tuple[list[Tensor], int]:
    """Logits of one call on the inputs and of some steps after it, and how many graphs the first call made."""
    with torch.no_grad():
        out = model(**inputs)
        graphs = len(report.graphs_of(model))
        found = [_logits(out)]
        for step in range(STEPS if cached else 0):
            out = model(input_ids=IDS[:, step : step + 1], past_key_values=out.past_key_values, **more(inputs, step))
            found.append(_logits(out))
    return found, graphs


_FEED_FORWARD: tuple[set[str], ...] = (
    {"gate_proj", "up_proj", "down_proj"},
    {"gate_up_proj", "down_proj"},
    {"dense_h_to_4h", "dense_4h_to_h"},
    {"c_fc", "c_proj"},
    {"fc_in", "fc_out"},
    {"fc1", "fc2"},
    {"wi", "wo"},
    {"intermediate", "output"},
)
"""What authors call the linears of a feed-forward block: only here, to count blocks in another way than the finder."""


def _parts(model: nn.Module) -> dict[str, int]:
    """Feed-forward blocks, mixtures, heads and layers of an eager model, by what its modules are called."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    children = [{name for name, child in m.named_children()} for m in model.modules()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        "ffn": sum(any(names <= own for names in _FEED_FORWARD) for own in children),
        "moe": sum("experts" in own for own in children),
        "layer": sum(isinstance(m, GradientCheckpointingLayer) for m in model.modules()),
        # The hand-written ones multiply by their embedding.
        "lm-head": int(head is not None or hasattr(model, "embed")),
    }


def _told(graphs: list[Any]) -> dict[str, Any]:
    """Sites by what became of them: ``rewritten``, or the code of the reason."""
    sites = [d for graph in graphs for d in graph.decisions if d.kind == "attention"]
    notes = [graph.note.code for graph in graphs if graph.note is not None]
    told: dict[str, Any] = {
        "found": len(sites),
        "rewritten": sum(d.action == "rewritten" for d in sites),
        "left": dict(sorted(Counter(d.reason.code for d in sites if d.reason is not None).items())),
    }
    others = Counter(d.kind for graph in graphs for d in graph.others)
    return told | {"others": dict(sorted(others.items()))} | ({"notes": notes} if notes else {})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is the same on every machine (``facts``), and the largest difference from the eager model's logits."""

    facts: dict[str, Any]
    error: float
    seconds: float = 0.0


def measure(name: str) -> Outcome:
    """Compile one architecture at the limit of the method, 16 bits, and compare it with itself undecorated and eager.

    The rewritten graphs run operator by operator: what is looked at is the graph, not Inductor.
    """
    start = time.perf_counter()
    entry = ARCHITECTURES[name]
    model, inputs = entry.make(), entry.inputs()
    torch._dynamo.reset()
    report._graphs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), counted() as count:
            model(**inputs)
        facts: dict[str, Any] = {"present": count.attention, "parts": _parts(model) | {"linear": count.linear}}
        expected, _ = _run(model, inputs, entry.cached)
        fast, cached, options = copy.deepcopy(model), entry.cached, {}
        if cached:
            ec.compress_kv(key_bits=16, value_bits=16)(fast)
            try:
                with torch.no_grad():
                    fast(**inputs)
            except CacheError as error:
                facts["refused"] = str(error).split(";")[0]
                ec.remove(fast)
        if not cached or "refused" in facts:
            options = {"options": {"compress_kv": {"key_bits": 16, "value_bits": 16}}}
        fast.compile(backend="effcompile", **options)
        with mock.patch.object(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward):
            got, first = _run(fast, inputs, cached)
            graphs = report.graphs_of(fast)
            facts["prefill"] = _told(graphs[:first])
            if cached:
                facts["decode"] = _told(graphs[first:])
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected))
            if cached:
                facts["padded"] = _padded(fast, model)
    return Outcome(facts, error, time.perf_counter() - start)


def _padded(fast: nn.Module, model: nn.Module) -> str:
    """Whether a left-padded batch of two generates what each row alone does on the undecorated eager model.

    ``as eager`` where that model itself does not; ``different`` is a fault of ours.
    """
    short = 23
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :-short], mask[0, :-short] = 0, 0
    got = fast.generate(ids, attention_mask=mask, **GREEDY)[:, TOKENS:]
    alone = [model.generate(row[None], **GREEDY)[0, -got.shape[1] :] for row in (IDS[0, -short:], IDS[1])]
    if torch.equal(got, torch.stack(alone)):
        return "equal"
    eager = model.generate(ids, attention_mask=mask, **GREEDY)[:, TOKENS:]
    return "as eager" if torch.equal(got, eager) else "different"


def golden() -> dict[str, Any]:
    """The facts as they were last written."""
    read: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return read


def main() -> None:
    """Print rows, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows; all if none is given")
    parser.add_argument("--write", action="store_true", help="write the golden file")
    given = parser.parse_args()
    facts = golden()
    for name in given.names or ARCHITECTURES:
        try:
            outcome = measure(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:400]}", file=sys.stderr, flush=True)
            continue
        facts[name] = outcome.facts
        print(f"{name:18} {outcome.seconds:5.1f} s error {outcome.error:.1e} {json.dumps(outcome.facts)}", flush=True)
    if given.write:
        GOLDEN.parent.mkdir(exist_ok=True)
        ordered = {name: facts[name] for name in ARCHITECTURES if name in facts}
        GOLDEN.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()

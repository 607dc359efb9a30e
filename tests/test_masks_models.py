"""Masks of real models: what Hugging Face's own mask functions emit, captured and recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from effcompile.kernels.program import Predicate
from effcompile.kernels.reason import Reason
from effcompile.patterns.masks import Mask, Term, recover, recover_all
from effcompile.patterns.normalize import normalize
from effcompile.patterns.walk import arguments, is_call, shape, strip_casts

aten = torch.ops.aten
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": HEADS,
    "Mistral": {**HEADS, "sliding_window": 5},
    "Qwen3": {**HEADS, "head_dim": 16},
    "Gemma2": {**HEADS, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 2},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 64},
    "GPTNeoX": {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
}
CAUSAL = Predicate(causal=True)
PADDED = Predicate(causal=True, key_mask=True)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(name: str, attention: str) -> nn.Module:
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name], attn_implementation=attention)
    made = cls(config).eval()
    assert isinstance(made, nn.Module)
    return made


def masks(run: Callable[[Any], Any], target: Any, dynamic: bool = False) -> list[Mask | Reason]:
    """Compile ``target`` with a back end that recovers every mask it sees, and ``run`` it."""
    found: list[Mask | Reason] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graph = normalize(gm, inputs)
        assert isinstance(graph, fx.GraphModule), graph
        before = len(guards())
        for node in graph.graph.nodes:
            if is_call(node, aten.scaled_dot_product_attention):
                args = arguments(node)
                lengths = {"query_length": shape(args["query"])[2], "key_length": shape(args["key"])[2]}
                found.append(recover(args["attn_mask"], is_causal=args["is_causal"], **lengths))
            elif is_call(node, aten.softmax.int):
                scores = strip_casts(node.args[0])
                lengths = {"query_length": shape(node)[2], "key_length": shape(node)[3]}
                if is_call(scores, aten.masked_fill.Scalar):
                    term = Term(scores.args[1], dropped=True)
                    data = {n: b for n in graph.graph.find_nodes(op="placeholder") if (b := buffer(n)) is not None}
                    found.append(recover_all([term], is_causal=False, constants=data, **lengths))
                else:
                    assert is_call(scores, aten.add.Tensor)
                    found.append(recover(scores.args[1], is_causal=False, **lengths))
        assert len(guards()) == before, "recovering a mask added a guard"
        return gm.forward

    def guards() -> Any:
        context = torch._guards.TracingContext.get()
        assert context.fake_mode is not None
        return context.fake_mode.shape_env.guards

    def buffer(node: fx.Node) -> Tensor | None:
        source = getattr(node, "_dynamo_source", None)
        return dict(target.named_buffers()).get("bias") if source is not None and "bias" in source.name else None

    with torch.no_grad():
        run(torch.compile(target, backend=backend, dynamic=dynamic))
    assert found
    return found


def is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


IDS = torch.arange(14).reshape(2, 7)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("Gemma2", "Mistral")])
def test_padded_prefill_is_causal_and_padding(name: str, attention: str) -> None:
    (mask,) = masks(lambda m: m(IDS, attention_mask=torch.ones_like(IDS), use_cache=False), model(name, attention))
    assert isinstance(mask, Mask), mask
    assert (mask.predicate, mask.offset, mask.finite) == (PADDED, 0, attention == "eager")
    assert is_input(mask.padding)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_prefill_without_padding_is_causal_though_packed_sequences_are_looked_for(dynamic: bool) -> None:
    """The graph compares running sums of differences of positions; they are proved to be constant."""
    assert masks(lambda m: m(IDS, use_cache=False), model("Llama", "sdpa"), dynamic) == [Mask(CAUSAL)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sliding_window(dynamic: bool) -> None:
    (mask,) = masks(
        lambda m: m(IDS, attention_mask=torch.ones_like(IDS), use_cache=False), model("Mistral", "sdpa"), dynamic
    )
    assert isinstance(mask, Mask), mask
    assert (mask.predicate, mask.offset) == (Predicate(causal=True, window=5, key_mask=True), 0)


def test_layers_of_one_model_have_their_own_masks() -> None:
    found = masks(lambda m: m(IDS, use_cache=False), model("Gemma2", "eager"))
    assert found == [Mask(Predicate(causal=True, window=5), finite=True), Mask(CAUSAL, finite=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache(attention: str) -> None:
    """Prefill and decode of one cache: the query's offset becomes the node of the cache's length."""
    made = model("Llama", attention)
    cache = transformers.StaticCache(config=made.config, max_cache_len=16)
    (prefill,) = masks(lambda m: m(IDS, past_key_values=cache, use_cache=True), made)
    assert prefill == Mask(CAUSAL, finite=attention == "eager")
    (decode,) = masks(lambda m: m(IDS[:, :1], past_key_values=cache, use_cache=True), made)
    assert isinstance(decode, Mask), decode
    assert decode.predicate == CAUSAL
    assert is_input(decode.offset)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_static_cache_with_padding(dynamic: bool) -> None:
    """A mask shorter than the cache is padded in the graph, and that node is the padding."""
    made = model("Llama", "sdpa")
    cache = transformers.StaticCache(config=made.config, max_cache_len=16)
    (prefill,) = masks(lambda m: m(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache), made, dynamic)
    assert isinstance(prefill, Mask), prefill
    assert (prefill.predicate, prefill.offset) == (PADDED, 0)
    assert is_call(prefill.padding, aten.pad, aten.constant_pad_nd)
    full = torch.ones(2, 16, dtype=torch.long)
    (decode,) = masks(lambda m: m(IDS[:, :1], attention_mask=full, past_key_values=cache), made, dynamic)
    assert isinstance(decode, Mask), decode
    assert decode.predicate == PADDED
    assert is_input(decode.offset)
    assert is_input(decode.padding)


def test_dynamic_cache_with_symbolic_lengths() -> None:
    """The offset is the symbolic number of cached tokens."""
    made = model("Llama", "sdpa")
    cache = transformers.DynamicCache(config=made.config)
    with torch.no_grad():
        made(IDS, past_key_values=cache)
    (mask,) = masks(lambda m: m(IDS, attention_mask=torch.ones(2, 14), past_key_values=cache), made, dynamic=True)
    assert isinstance(mask, Mask), mask
    assert mask.predicate == PADDED
    assert isinstance(mask.offset, torch.SymInt)


def test_packed_sequences_stay_an_operand() -> None:
    """Positions given as data may start anew in the middle: nothing can be proved."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    (reason,) = masks(lambda m: m(IDS, position_ids=positions, use_cache=False), model("Llama", "sdpa"))
    assert isinstance(reason, Reason)
    assert reason.code == "mask-unknown"
    assert "modeling_llama.py" in reason.source


def test_prepared_mask_stays_an_operand() -> None:
    """A 4-D mask that comes in as an input says nothing about its values."""
    ready = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    (reason,) = masks(lambda m: m(IDS, attention_mask=ready, use_cache=False), model("Llama", "sdpa"))
    assert isinstance(reason, Reason)
    assert reason.code == "mask-unknown"


class Buffer(nn.Module):
    """The buffer of the first GPTs."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", table[None, None])

    def forward(self, x: Tensor) -> Tensor:
        scores = x[:, None] @ x[:, None].transpose(-1, -2)
        t = x.shape[1]
        return scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (torch.ones(32, 32).tril(), CAUSAL),
        (torch.ones(32, 32).tril().triu(-3), Predicate(causal=True, window=4)),
        (torch.ones(32, 32).tril().fill_diagonal_(0).index_fill_(0, torch.tensor(0), 1), None),
    ],
    ids=["triangle", "band", "neither"],
)
def test_buffer_with_real_data(table: Tensor, expected: Predicate | None, dynamic: bool) -> None:
    (mask,) = masks(lambda m: m(torch.randn(2, 7, 4)), Buffer(table), dynamic)
    if expected is None:
        assert isinstance(mask, Reason)
        assert mask.code == "mask-unknown"
    else:
        assert mask == Mask(expected)

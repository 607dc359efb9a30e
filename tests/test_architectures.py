"""Many architectures: attention counted on the eager model, what became of it, and the limit case against eager.

The golden file is written by ``python tests/architectures.py --write``. A change of it is to be read: a site that is
no longer found or rewritten is a slow-down that nobody would see otherwise.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, golden, measure

import effcompile as ec

FAST = ("llama", "gemma2", "gpt2", "bloom", "gpt-oss", "deepseek-v3", "vit", "nanogpt", "torch-mha")
"""Attention of each kind: with groups, soft caps, one fused linear, ALiBi, sinks, latents, both ways, and by hand."""
SLOW = (
    "llama-eager",
    "llama-flex",
    "gemma3",
    "phi3",
    "gpt-j",
    "opt",
    "falcon-alibi",
    "mixtral",
    "llama4",
    "t5-encoder",
    "whisper",
    "einsum",
    "torch-mha-weights",
    "flash-operator",
)
"""Written in other ways. The attention of those that are left is spelled as in one of these or of the fast ones."""
UNSEEN = {
    "llama-flex": {"ffn", "layer", "lm-head", "linear"},  # the graph with the layers is not normalised
    "torch-mha": {"linear"},  # its linears run inside one call, where nothing is counted
    "torch-mha-weights": {"linear"},
}
"""Parts that cannot be compared, by architecture."""
BUDGET = 1e-5
"""Of the largest logit. fp32 sums in another order lose about 1e-6 in these models; one wrong key loses 1e-2."""


def set_of(name: str) -> list[pytest.MarkDecorator]:
    """The set of tests that an architecture is in."""
    return [] if name in FAST else [pytest.mark.slow if name in SLOW else pytest.mark.exhaustive]


def test_the_golden_file_has_every_architecture_and_no_other() -> None:
    assert list(golden()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=set_of(n)) for n in ARCHITECTURES])
def test_architecture(name: str) -> None:
    """Found == present in each phase, all of it rewritten or left for a typed reason, and the result is eager's."""
    outcome, entry = measure(name), ARCHITECTURES[name]
    assert outcome.facts == golden()[name]
    assert outcome.error < BUDGET
    assert outcome.facts.get("padded") == ("equal" if entry.cached else None)
    for phase in ("prefill", "decode") if entry.cached else ("prefill",):
        told = outcome.facts[phase]
        assert told["found"] == outcome.facts["present"]
        for kind, number in outcome.facts["parts"].items():
            if kind not in UNSEEN.get(name, ()):
                assert told["others"].get(kind, 0) == number, kind
        assert told["rewritten"] + sum(told["left"].values()) == told["found"]


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ec.CacheError, match="encoder-decoder"):
        ec.Cache(ARCHITECTURES["whisper"].make())


class Shifted(torch.nn.Module):
    """A part whose code makes a tensor of numbers, as the caches of transformers' sliding layers do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) + torch.tensor([1, 2]).sum()


@pytest.mark.one_in(4, rest="exhaustive")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "gemma3", "llama4", "mixtral"])
def test_architecture_through_inductor(name: str) -> None:
    """The other tests run graphs operator by operator; these have something in them that AOTAutograd has to digest."""
    entry = ARCHITECTURES[name]
    model = entry.make()
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**entry.inputs(), **greedy)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(**entry.inputs(), **greedy), expected)
    assert any(d.action == "rewritten" for g in ec.inspect(model).graphs if g.label == "decode" for d in g.decisions)


@pytest.mark.slow
def test_a_tensor_of_numbers_in_the_models_code() -> None:
    """Through Inductor: to AOTAutograd it is a tensor that came from nowhere."""
    model = ARCHITECTURES["llama"].make()
    model.model.norm = Shifted(model.model.norm)
    ids = ARCHITECTURES["llama"].inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        ec.compress_kv(key_bits=16, value_bits=16)(model)
        model.compile(backend="effcompile")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=5e-5)
    assert any(d.action == "rewritten" for d in ec.inspect(model).decisions)

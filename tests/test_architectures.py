"""Many architectures: attention counted on the eager model, what became of it, and the limit case against eager.

The golden file is written by ``python tests/architectures.py --write``. A change of it is to be read: a site that is
no longer found or rewritten is a slow-down that nobody would see otherwise.
"""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, golden, measure

import effcompile as ec

# Their attention is spelled as in another row or in test_backend.py.
SLOW = {
    *(
        "llama-flex",
        "qwen2",
        "qwen3",
        "phi3",
        "gpt2",
        "opt",
        "gpt-neox",
        "cohere",
        "olmo2",
        "stablelm",
        "smollm3",
        "qwen3-moe",
    ),
}
NO_DECODE_GRAPH = {"opt"}
"""Its own code reads the cache's length as a number, which breaks the graph in every layer."""
UNSEEN = {
    "llama-flex": {"ffn", "lm-head", "linear"},  # the graph with the layers is not normalised
    "torch-mha": {"linear"},  # its linears run inside one call, where nothing is counted
    "torch-mha-weights": {"linear"},
}
"""Parts that cannot be compared, by architecture."""
BUDGET = 1e-5
"""Of the largest logit. fp32 sums in another order lose about 1e-6 in these models; one wrong key loses 1e-2."""


def test_the_golden_file_has_every_architecture_and_no_other() -> None:
    assert list(golden()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ARCHITECTURES])
def test_architecture(name: str) -> None:
    """Found == present in each phase, all of it rewritten or left for a typed reason, and the result is eager's."""
    outcome, entry = measure(name), ARCHITECTURES[name]
    assert outcome.facts == golden()[name]
    assert outcome.error < BUDGET
    assert outcome.generate is (True if entry.cached else None)
    for phase in ("prefill", "decode") if entry.cached else ("prefill",):
        told = outcome.facts[phase]
        missing = phase == "decode" and name in NO_DECODE_GRAPH
        assert told["found"] == (0 if missing else outcome.facts["present"])
        for kind, number in outcome.facts["parts"].items():
            if not missing and kind not in UNSEEN.get(name, ()):
                assert told["others"].get(kind, 0) == number, kind
        assert told["rewritten"] + sum(told["left"].values()) == told["found"]


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ec.CacheError, match="encoder-decoder"):
        ec.Cache(ARCHITECTURES["whisper"].make())

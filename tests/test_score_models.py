"""Models with a soft cap, sinks and ALiBi: padded batches and few bits, compiled against eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, GREEDY
from test_score_matching import CAPACITY, DENSE, B, D, G, H, Step, everything
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels.form import KVForm
from effcompile.passes import report

IDS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(4))
LEFT = torch.arange(40)[None, :] >= torch.tensor([0, 7, 25])[:, None]
NAMES = ["gemma2", "gpt-oss", "bloom", "falcon-alibi"]
PARTS = {"gemma2": "cap", "gpt-oss": "sink", "bloom": "bias", "falcon-alibi": "bias"}


def some(names: list[str], *fast: str) -> list[Any]:
    """All names; those that are not ``fast`` are slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: nn.Module, mask: Tensor | None, steps: int = 3) -> list[Tensor]:
    """Of a padded prompt, and of some tokens after it, which are padding in rows without any token."""
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=None if mask is None else mask.long())
        found = [out.logits]
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.any(1, keepdim=True)], 1)
            cache, ids = out.past_key_values, IDS[:, step : step + 1]
            given = None if mask is None else mask.long()
            out = model(input_ids=ids, attention_mask=given, past_key_values=cache)
            found.append(out.logits)
    return found


def rewritten(model: nn.Module) -> list[str]:
    """The forms of the sites that were rewritten in steps of one token."""
    sites = [d for g in report.graphs_of(model) if g.label == "decode" for d in g.decisions]
    return [d.form for d in sites if d.action == "rewritten"]


def difference(got: list[Tensor], expected: list[Tensor], seen: Tensor) -> float:
    """Of the largest logit, where ``seen`` ``[B, T]`` holds in the prompt and everywhere after it."""
    worst = []
    for i, (a, b) in enumerate(zip(got, expected)):
        a, b = (a[seen], b[seen]) if i == 0 else (a, b)
        worst.append(float((a - b).abs().max() / b.abs().max()))
    return max(worst)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", some(NAMES, "gemma2", "bloom"))
def test_a_padded_batch(name: str) -> None:
    """At 16 bits it is the eager model, logits and tokens."""
    model = ARCHITECTURES[name].make()
    fast = copy.deepcopy(model)
    ec.compress_kv(key_bits=16, value_bits=16)(fast)
    fast.compile(backend="effcompile")
    assert difference(logits(fast, LEFT), logits(model, LEFT), LEFT) < 1e-5
    assert rewritten(fast)
    assert all(form.endswith(f"causal_pad_{PARTS[name]}") for form in rewritten(fast))
    more = {"attention_mask": LEFT.long()} | GREEDY
    assert torch.equal(fast.generate(IDS, **more), model.generate(IDS, **more))


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", some(NAMES, "gpt-oss"))
def test_four_bits_compiled_is_four_bits_eager(name: str) -> None:
    model = ARCHITECTURES[name].make()
    ec.compress_kv(key_bits=4, value_bits=4, group_size=16, residual=0)(model)
    expected = logits(model, LEFT)
    model.compile(backend="effcompile")
    assert difference(logits(model, LEFT), expected, LEFT) < 1e-5
    assert rewritten(model)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", some([*NAMES, "llama", "llama-eager"], "bloom", "llama-eager"))
def test_a_row_of_padding_alone(name: str) -> None:
    """A row that sees no key has no meaning; the others are as they are without it, and none is nan in ours."""
    model = ARCHITECTURES[name].make()
    mask = LEFT.clone()
    mask[1] = False
    expected = logits(model, mask)
    fast = copy.deepcopy(model)
    ec.compress_kv(key_bits=16, value_bits=16)(fast)
    fast.compile(backend="effcompile")
    got = logits(fast, mask)
    seen, rows = mask.clone(), [0, 2]
    for i, (a, b) in enumerate(zip(got, expected)):
        assert a.isfinite().all()
        where = seen if i == 0 else torch.tensor(rows)
        assert float((a[where] - b[where]).abs().max() / b[where].abs().max()) < 1e-5
    assert rewritten(fast)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("bits", [16, 4])
def test_falcon_needs_no_mask(bits: int) -> None:
    """It makes its ALiBi from the padding mask; without one it gets the mask that hides nothing."""
    model = ARCHITECTURES["falcon-alibi"].make()
    fast = copy.deepcopy(model)
    ec.compress_kv(key_bits=bits, value_bits=bits, group_size=16, residual=0)(fast)
    everywhere = torch.ones_like(LEFT)
    expected = logits(model, None) if bits == 16 else logits(fast, everywhere)
    assert difference(logits(fast, None), expected, everywhere) < 1e-5
    fast.compile(backend="effcompile")
    assert difference(logits(fast, None), expected, everywhere) < 1e-5
    assert rewritten(fast)


@pytest.mark.parametrize(
    "form", [KVForm(4, 4, 16, 0), pytest.param(DENSE, marks=pytest.mark.slow)], ids=lambda f: f.name
)
def test_inductor_takes_the_operands(form: KVForm) -> None:
    """Compiled for real, with the C++ kernels: all parts and a factor, prompt and steps."""
    torch.manual_seed(0)
    model = Step(everything, form)
    padding = torch.ones(B, CAPACITY, dtype=torch.bool)
    padding[0, :1] = False
    calls = [(torch.randn(B, H, n, D), torch.randn(B, G, n, D), torch.randn(B, G, n, D), padding) for n in (20, 1, 1)]
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        model.length.zero_()
        model.compile(backend="effcompile", dynamic=False)
        got = [model(*call) for call in calls]
    got[0][0, :, :1] = expected[0][0, :, :1] = 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert rewritten(model)

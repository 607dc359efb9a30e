"""Attention that is left: each missing part has its reason, nothing is passed over, and what is none is not listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from effcompile.passes import backend, report
from effcompile.passes.report import Decision, inspect


class Attention(nn.Module):
    """A function of queries, keys and values as a module, so that its graphs are found by its parameter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.eye(16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The function, of keys that went through a linear."""
        return self.function(q, k @ self.weight, v)


def decisions(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """The decisions about ``function``, whose compiled result is compared with the eager one."""
    report._graphs.clear()
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    model = Attention(function).eval()
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    with torch.no_grad():
        expected = model(q, k, v)
        model.compile(backend="effcompile")
        torch.testing.assert_close(model(q, k, v), expected)
    return list(inspect(model).decisions)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / 4


def two_caps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (5 * torch.tanh(torch.tanh(_scores(q, k)) / 5)).softmax(-1) @ v


def sinks_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q.new_ones(2, 4, 7, 1), _scores(q, k)], -1).softmax(-1)[..., 1:] @ v


def sinks_by_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def sinks_by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many queries as heads."""
    column = q[0, 0, :4, 0].sin().view(1, 1, 4, 1).expand(2, 4, 4, 1)
    return torch.cat([_scores(q[:, :, :4], k), column], -1).softmax(-1)[..., :-1] @ v


def sinks_of_more_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    column = q[0, 0, :, 0].sin()[:4].view(1, 4, 1, 1).expand(2, 4, 7, 1)
    return torch.cat([_scores(q, k), column], -1).softmax(-1)[..., :-1] @ v


def sinks_and_the_first_key_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q.new_ones(2, 4, 7, 1)], -1).softmax(-1)[..., 1:] @ v


def sinks_and_a_key_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q.new_ones(2, 4, 7, 1)], -1).softmax(-1)[..., :-2] @ v[:, :, :-1]


def two_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q.new_ones(2, 4, 7, 2)], -1).softmax(-1)[..., :-2] @ v


def sinks_with_a_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_scores(q, k), q.new_ones(2, 4, 7, 1)], -1).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def capped_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(torch.cat([_scores(q, k), q.new_ones(2, 4, 7, 1)], -1)).softmax(-1)[..., :-1] @ v


def without_the_last_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]


def folded_by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.arange(9.0).expand(8, 1, 9)
    return torch.baddbmm(bias, q, k.mT, alpha=0.25).view(2, 4, 7, 9).softmax(-1).view(8, 7, 9) @ v


def folded_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of another number than the weights are viewed with."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).view(4, 2, 7, 9).softmax(-1).view(8, 7, 9), v).view(4, 2, 7, 16)


def mask_before_a_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(_scores(q, k) + torch.arange(9.0)).softmax(-1) @ v


def weighted_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q, k) * torch.arange(9.0)).softmax(-1) @ v


def broadcast_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q[:1], k[:1]) * q[:, :, :1, :1]).softmax(-1) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = _scores(q, k).softmax(-1)
    return weights @ v, weights.mean(1)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.transpose(-1, -2)).softmax(-2).transpose(-1, -2) @ v


def weights_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q, k).softmax(-1) * torch.ones(2, 4, 7, 9)) @ v


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v)


def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made: Tensor = torch.utils.checkpoint.checkpoint(
        nn.functional.scaled_dot_product_attention, q, k, v, use_reentrant=False
    )
    return made


@torch.library.custom_op("effcompile_tests::elsewhere", mutates_args=())
def elsewhere(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """An attention kernel that returns its log-sum-exp as well."""
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), q.sum(-1)


@elsewhere.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.sum(-1)


def hub_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = elsewhere(q, k, v, False)[0]
    return out


def atens_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (two_caps, "soft-cap"),
        (sinks_first, "sinks"),
        (sinks_by_query, "sinks"),
        (sinks_by_position, "sinks"),
        (sinks_of_more_heads, "sinks"),
        (sinks_and_the_first_key_cut, "sinks"),
        (sinks_and_a_key_cut, "sinks"),
        (two_sinks, "sinks"),
        (sinks_with_a_value, "sinks"),
        (capped_sinks, "sinks"),
        (without_the_last_key, "attention-arithmetic"),
        (folded_by_baddbmm, "folded-heads"),
        (folded_otherwise, "folded-heads"),
        (mask_before_a_cap, "attention-arithmetic"),
        (weighted_keys, "attention-arithmetic"),
        (broadcast_scores, "attention-arithmetic"),
        (folded, "folded-heads"),
        (einsum, "einsum"),
        (with_weights, "weights-used"),
        (keys_first, "attention-arithmetic"),
        (weights_by_head, "attention-arithmetic"),
        (flex, "flex-attention"),
        (nested, "higher-order-op"),
        (hub_kernel, "foreign-kernel"),
        (atens_own, "foreign-kernel"),
    ],
)
def test_what_is_missing_is_named(function: Callable[..., Any], code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = decisions(function, monkeypatch)
    assert found.reason is not None
    assert found.reason.code == code
    assert (found.action, found.kind) == ("left", "attention")
    assert found.reason.text
    assert "test_attention_reasons.py" in found.source
    if code not in ("foreign-kernel", "attention-arithmetic"):
        assert dict(found.sizes) == {"T": 4 if function is sinks_by_position else 7}


def router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights of the best two of nine experts, and a classifier's probabilities: softmaxes, and no attention."""
    best, which = (q @ k[0, 0].T).softmax(-1).topk(2, -1)
    return best.sum(-1) + which.sum(-1) + (q @ k[0, 0].T).softmax(-1).sum(-1)


def shaped_like_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three tensors of one shape into one: an operation of torch's, which is no attention."""
    return torch.addcmul(k, k, v)


@pytest.mark.parametrize("function", [router, shaped_like_attention])
def test_what_is_no_attention_is_not_listed(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not decisions(function, monkeypatch)


@pytest.mark.parametrize("subtract", [False, True])
def test_a_softmax_may_be_shifted_by_its_maximum(subtract: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same softmax, so the site is an attention like any other."""

    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)
        other = scores if subtract else scores + torch.arange(9.0)
        return (scores - other.amax(-1, keepdim=True)).softmax(-1) @ v

    (found,) = decisions(shifted, monkeypatch)
    assert found.reason is not None
    assert found.reason.code == ("not-asked" if subtract else "attention-arithmetic")

"""Factors of one linear: what cutting loses, in which order methods lose it, and second moments without a root."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effcompile.passes.factors import damped_root, spectrum
from effcompile.passes.residual import low_rank_and_sparse, split
from effcompile.runtime.second_moment import SecondMoment


@pytest.fixture(scope="module")
def seen() -> tuple[Tensor, SecondMoment, Tensor]:
    """A weight, what it reads (correlated, and far from 0), and the rows themselves."""
    torch.manual_seed(0)
    rows = torch.randn(900, 40) @ torch.randn(40, 40) * torch.logspace(0, -2, 40) + torch.randn(40)
    inputs = SecondMoment(40)
    for part in rows.split([1, 299, 600]):
        inputs.update(part)
    return torch.randn(56, 40), inputs, rows


def of(seen: Any, method: Any, mean: bool = False, damping: float = 0.0) -> Any:
    return spectrum(seen[0], seen[1], method, alpha=0.5, damping=damping, mean=mean)


def test_second_moment_in_parts_is_that_of_the_whole(seen: Any) -> None:
    _, inputs, rows = seen
    x = rows.double()
    torch.testing.assert_close(inputs.moment, x.t() @ x / 900)
    torch.testing.assert_close(inputs.covariance, x.t().cov(correction=0))
    torch.testing.assert_close(inputs.mean, x.mean(0))
    torch.testing.assert_close(inputs.size, x.abs().mean(0))


@pytest.mark.parametrize("rank", [1, 13, 39, 40])
def test_eckart_young(seen: Any, rank: int) -> None:
    """The error of the weight under plain SVD is the tail of its spectrum."""
    weight = seen[0].double()
    found = of(seen, "svd").factors(rank)
    lost = weight - found["up"].double() @ found["down"].double()
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close(lost.square().sum(), tail, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("method", ["svd", "asvd", "whitened"])
def test_what_is_said_to_be_lost_is_lost(seen: Any, method: str, mean: bool) -> None:
    weight, _, rows = seen
    found = of(seen, method, mean)
    for rank in (1, 13, 33):
        made = found.factors(rank)
        wanted = rows @ weight.t()
        lost = wanted - F.linear(F.linear(rows, made["down"]), made["up"], made.get("shift"))
        assert float(lost.square().sum(1).mean()) == pytest.approx(found.tail(rank), rel=1e-3)
        around = wanted - wanted.mean(0) if mean else wanted
        assert found.error(rank) == pytest.approx(float(lost.norm() / around.norm()), rel=1e-3)
        if mean:
            assert float(lost.mean(0).norm()) < 1e-3 * float(lost.norm(dim=1).mean())


def test_order_of_the_methods_and_of_the_bias(seen: Any) -> None:
    """Whitened is best for the outputs at every rank, and its error is the tail of the whitened spectrum."""
    weight, inputs, _ = seen
    plain, asvd, whitened, with_bias = (
        of(seen, *given) for given in (("svd",), ("asvd",), ("whitened",), ("whitened", True))
    )
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(inputs.moment)).square()
    for rank in range(1, 40):
        assert whitened.tail(rank) <= asvd.tail(rank) * (1 + 1e-6)
        assert whitened.tail(rank) <= plain.tail(rank) * (1 + 1e-6)
        assert with_bias.tail(rank) <= whitened.tail(rank) * (1 + 1e-6)
        assert whitened.tail(rank) == pytest.approx(float(values[rank:].sum()), rel=1e-4, abs=1e-6)
    assert asvd.tail(20) < plain.tail(20)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("what", ["few rows", "dead channels", "all zero", "bf16"])
def test_second_moments_without_a_root(what: str, damping: float) -> None:
    """Damped until there is one; at full rank the weight comes back whatever the inputs were."""
    rows = torch.randn(5 if what == "few rows" else 200, 24)
    rows = rows * (torch.arange(24) % 3 > 0) if what == "dead channels" else rows
    rows = torch.zeros_like(rows) if what == "all zero" else rows
    rows = rows.bfloat16() if what == "bf16" else rows
    inputs, weight = SecondMoment(24), torch.randn(32, 24).to(rows.dtype)
    inputs.update(rows)
    for method in ("svd", "asvd", "whitened"):
        for mean in (False, True):
            found = of((weight, inputs), method, mean, damping)
            made = found.factors(24)
            assert made["up"].dtype == rows.dtype
            atol = 1e-4 if rows.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(made["up"].float() @ made["down"].float(), weight.float(), rtol=0, atol=atol)
            assert torch.isfinite(found.lost).all()
    if what in ("few rows", "dead channels"):
        assert found.damping > 0
    with pytest.raises(ValueError, match="NaN or infinity"):
        damped_root(torch.full((3, 3), torch.nan), 0.0)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("method", ["svd", "asvd", "whitened"])
def test_sparse_residual(seen: Any, method: Any, mean: bool) -> None:
    """At equal bytes; what is said to be lost is lost; with as many entries as the weight has nothing is."""
    weight, inputs, rows = seen
    how: dict[str, Any] = {"alpha": 0.5, "damping": 0.0}
    planned = 20
    rank, entries = split(planned, 0.3, 56, 40, 4, 1)
    assert entries * 6 + 57 * 4 + rank * 96 * 4 <= planned * 96 * 4 < entries * 6 + 57 * 4 + (rank + 1) * 96 * 4
    made, lost, error = low_rank_and_sparse(weight, inputs, rank, entries, mean=mean, metric=method, **how)
    assert made["values"].numel() == entries
    kernel = torch.ops.effcompile.low_rank_linear
    names = ("down", "up", "shift", "values", "columns", "starts")
    left = rows @ weight.t() - kernel(rows, *(made.get(name) for name in names))
    assert float(left.square().sum(1).mean()) == pytest.approx(lost, rel=1e-3)
    wanted = rows @ weight.t()
    around = wanted - wanted.mean(0) if mean else wanted
    assert error == pytest.approx(float(left.norm() / around.norm()), rel=1e-3)
    _, lost, _ = low_rank_and_sparse(weight, inputs, 4, weight.numel(), mean=mean, metric=method, **how)
    assert lost < 1e-9


def test_a_residual_keeps_what_factors_cannot(seen: Any) -> None:
    """A weight of rank 3 with 50 single entries comes back as those, in turns that each lose less."""
    _, inputs, _ = seen
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(56, 3, generator=generator) @ torch.randn(3, 40, generator=generator)).flatten()
    places = torch.randperm(weight.numel(), generator=generator)[:50]
    weight[places] += 5
    weight = weight.view(56, 40)
    for method, most in (("svd", 1e-5), ("asvd", 1e-5), ("whitened", 0.05)):
        how: dict[str, Any] = {"alpha": 0.5, "damping": 0.0, "mean": False, "metric": method}
        errors = [low_rank_and_sparse(weight, inputs, 3, 50, steps=steps, **how)[2] for steps in (0, 4, 20)]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] < most
        # More than as many bytes of factors.
        assert errors[1] < 0.5 * of((weight, inputs), method).error(5)


def test_split_without_room_for_a_residual() -> None:
    assert split(16, 0.3, 64, 64, 4, 16) == (16, 0)
    assert split(32, 0.5, 64, 64, 2, 16) == (16, (16 * 128 * 2 - 4 * 65) // 4)

"""Gradients through a choice, summed over everything that could have been drawn and compared with autograd's."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import effcompile as ec
from effcompile.kernels.gradients import ReinMaxFunction, SparseMixerFunction

E = 5
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: 1 + 2 * x,
    "quadratic": lambda x: 1 + 2 * x - 3 * x.square(),
    "cubic": lambda x: x - 2 * x.square() + 3 * x.pow(3),
    "quartic": lambda x: x.pow(4),
}


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def expected_reinmax(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """What ReinMax gives on average: over all draws, each with its probability."""
    total = torch.zeros_like(logits)
    for e, p in enumerate(logits.detach().softmax(-1)):
        one_hot, _ = ec.reinmax(logits, sample=torch.tensor(e))
        total += p * gradient(loss(one_hot), logits)
    return total


@pytest.mark.parametrize("phi", PHI)
def test_reinmax_is_exact_to_second_order(phi: str) -> None:
    """``f(D) = phi(a D)``: a straight line through the gradient is not enough, a parabola is, and more is too much."""
    a = doubles(E, seed=1)
    errors = []
    for seed in range(20):
        logits = doubles(E, seed=seed).requires_grad_()
        exact = gradient((logits.softmax(-1) * PHI[phi](a)).sum(), logits)
        errors.append(float((expected_reinmax(logits, lambda d: PHI[phi](a @ d)) - exact).norm() / exact.norm()))
    if phi in ("linear", "quadratic"):
        assert max(errors) < 1e-12
    else:
        assert min(errors) > 1e-3


def test_reinmax_of_any_quadratic_form() -> None:
    """Also one that does not factor, where the gradient at one expert knows of the others."""
    m, logits = doubles(E, E), doubles(E, seed=1).requires_grad_()
    exact = gradient((logits.softmax(-1) * m.diagonal()).sum(), logits)
    torch.testing.assert_close(expected_reinmax(logits, lambda d: d @ m @ d), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_reinmax_of_a_batch(tau: float) -> None:
    """The probabilities have the gradient of a softmax; rows do not mix; what is drawn has its ones where it is."""
    logits = doubles(2, 3, E).requires_grad_()
    sample = torch.randint(0, E, (2, 3))
    one_hot, p = ec.reinmax(logits, tau, sample=sample)
    assert torch.equal(one_hot.argmax(-1), sample)
    assert torch.equal(one_hot.sum(-1), torch.ones_like(one_hot[..., 0]))
    weight = doubles(2, 3, E, seed=1)
    torch.testing.assert_close(
        gradient((p * weight).sum(), logits), gradient((logits.softmax(-1) * weight).sum(), logits)
    )
    one_hot, _ = ec.reinmax(logits, tau, sample=sample)
    whole = gradient((one_hot * weight).sum(), logits)
    for i, j in itertools.product(range(2), range(3)):
        row = logits[i, j].detach().requires_grad_()
        alone, _ = ec.reinmax(row, tau, sample=sample[i, j])
        torch.testing.assert_close(whole[i, j], gradient((alone * weight[i, j]).sum(), row))
    # A cooler look moves less.
    assert tau == 1 or not torch.allclose(
        whole, gradient((ec.reinmax(logits, sample=sample)[0] * weight).sum(), logits)
    )


def outcomes(p: Tensor, order: int) -> list[tuple[int, bool, float]]:
    """Expert, whether the coin says whole, and the chance of both."""
    chance = {2: 0.5, 3: 0.25}[order]
    return [(e, coin, float(p[e]) * (chance if coin else 1 - chance)) for e in range(len(p)) for coin in (True, False)]


def expected_sparsemixer(
    logits: Tensor, order: int, losses: Callable[[int, Tensor], Tensor], without: int = -1
) -> Tensor:
    """What SparseMixer gives on average over draws and coins; ``without`` what one expert gives to that."""
    total = torch.zeros_like(logits)
    for e, coin, chance in outcomes(logits.detach().softmax(-1), order):
        if e != without:
            # No jitter hides nothing here.
            sample, multiplier = ec.sparsemixer(
                logits, jitter=torch.inf, order=order, sample=torch.tensor([e]), whole=torch.tensor([coin])
            )
            assert sample.item() == e
            total += chance * gradient(losses(e, multiplier[0]), logits)
    return total


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("phi", PHI)
def test_sparsemixer_is_exact_to_its_order(phi: str, order: int) -> None:
    """The expert ``e`` gives ``a[e]`` and the loss is ``phi``; the most likely one is of first order and left out.

    Order 2 adds the gradient of the multiplier itself, order 3 does not; what is judged against is no output at all.
    """
    a = doubles(E, seed=1)
    errors = []
    for seed in range(20):
        logits = doubles(E, seed=seed).requires_grad_()
        most = int(logits.argmax())
        found = expected_sparsemixer(logits, order, lambda e, m: PHI[phi](m * a[e]), most)
        p = logits.softmax(-1)
        gains = PHI[phi](p.detach() * a) - PHI[phi](torch.zeros_like(a))
        others = torch.arange(E) != most
        own = PHI[phi](p * a) * p.detach() if order == 2 else torch.zeros_like(p)
        exact = gradient((p * gains + own)[others].sum(), logits)
        errors.append(float((found - exact).norm() / exact.norm()))
    if phi in {2: ("linear", "quadratic"), 3: ("linear", "quadratic", "cubic")}[order]:
        assert max(errors) < 1e-12
    else:
        assert min(errors) > 1e-4


def test_sparsemixer_of_a_linear_loss_is_exact_for_all() -> None:
    """The most likely expert with the others: the gradient of the expected loss, choice and multiplier together."""
    a, logits = doubles(E, seed=1), doubles(E, seed=2).requires_grad_()
    p = logits.softmax(-1)
    exact = gradient((p * (1 + 2 * p * a)).sum(), logits)
    found = expected_sparsemixer(logits, 2, lambda e, m: 1 + 2 * m * a[e])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [2, 3])
def test_sparsemixer_draws(order: int) -> None:
    """As often as the probabilities within reach of the jitter say, and nothing beyond; whole as often as it should."""
    logits = torch.tensor([2.0, 1.9, 1.7, 1.0]).repeat(40_000, 1).requires_grad_()
    sample, multiplier = ec.sparsemixer(logits, order=order, generator=torch.Generator().manual_seed(0))
    p = torch.tensor([2.0, 1.9, 1.7, -torch.inf]).softmax(-1)
    share = torch.bincount(sample.flatten(), minlength=4) / len(sample)
    torch.testing.assert_close(share, p, rtol=0, atol=0.01)
    assert share[3] == 0
    whole = multiplier.detach()[:, 0] / p[sample[:, 0]]
    assert torch.allclose(whole[sample[:, 0] == 0], torch.tensor(1.0))
    others = whole[sample[:, 0] != 0]
    assert float((others > 0.9).float().mean()) == pytest.approx({2: 0.5, 3: 0.25}[order], abs=0.02)
    assert float(others.min()) == pytest.approx({2: 1 / 2, 3: 1 / 3}[order], rel=1e-5)
    grad = gradient(multiplier.sum(), logits)
    assert not grad[:, 3].any()
    assert grad[:, :3].any(0).all()


def test_sparsemixer_takes_more_than_one() -> None:
    """The second is drawn as the first would be without the first, and evaluation takes the largest."""
    logits = doubles(7, E).requires_grad_()
    first, second = torch.randint(0, E - 1, (2, 7))
    second += second >= first
    chosen = torch.stack([first, second], -1)
    sample, multiplier = ec.sparsemixer(
        logits, top_k=2, sample=chosen, whole=torch.ones(7, 2, dtype=torch.bool), jitter=9
    )
    assert torch.equal(sample, chosen)
    rest = logits.scatter(-1, first[:, None], -torch.inf)
    torch.testing.assert_close(multiplier[:, 0], logits.softmax(-1).gather(1, first[:, None])[:, 0])
    torch.testing.assert_close(multiplier[:, 1], rest.softmax(-1).gather(1, second[:, None])[:, 0])
    top, p = ec.sparsemixer(logits, top_k=3, training=False, jitter=9)
    assert torch.equal(top, logits.topk(3).indices)
    torch.testing.assert_close(p[:, 0], logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 7, E).to(dtype).requires_grad_()
    one_hot, p = ec.reinmax(logits)
    sample, multiplier = ec.sparsemixer(logits)
    assert {one_hot.dtype, p.dtype, multiplier.dtype} == {dtype}
    assert (sample.dtype, sample.shape, multiplier.shape) == (torch.int64, (3, 7, 1), (3, 7, 1))
    assert gradient((one_hot[..., 0] + multiplier[..., 0]).sum(), logits).dtype is dtype


def test_functions_against_finite_differences() -> None:
    """Where they are ordinary derivatives: ReinMax's probabilities, and a multiplier with neither share nor gain."""
    logits = doubles(4, E).requires_grad_()
    sample = torch.randint(0, E, (4,))
    assert torch.autograd.gradcheck(lambda z: ReinMaxFunction.apply(z, sample, 1.0)[1], logits)
    assert torch.autograd.gradcheck(lambda m: SparseMixerFunction.apply(m, torch.ones(4, E), 1.0), logits)


def test_a_router_learns_what_is_best() -> None:
    """Compiled without a break: of four experts one is right, and each estimator finds it."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def mixed(logits: Tensor, target: Tensor) -> Tensor:
        sample, multiplier = ec.sparsemixer(logits, jitter=9.0)
        return (multiplier[..., 0] * (sample[..., 0] == target) - 1).square().mean()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def drawn(logits: Tensor, target: Tensor) -> Tensor:
        one_hot, _ = ec.reinmax(logits)
        return (1 - one_hot.gather(-1, target.unsqueeze(-1))).square().mean()

    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 4)).argmax(-1)
    for loss in (mixed, drawn):
        router = torch.nn.Linear(16, 4)
        torch.nn.init.zeros_(router.weight)
        optimiser = torch.optim.Adam(router.parameters(), 0.05)
        for _ in range(150):
            optimiser.zero_grad()
            loss(router(x), target).backward()
            optimiser.step()
        assert float((router(x).argmax(-1) == target).float().mean()) > 0.8


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda z: ec.reinmax(z, 0.5), "tau=0.5; expected 1 or more"),
        (
            lambda z: ec.reinmax(z, sample=torch.zeros(2, 1, dtype=torch.long)),
            r"sample is \(2, 1\), and should be \(2,\)",
        ),
        (lambda z: ec.sparsemixer(z, order=1), "order=1"),
        (lambda z: ec.sparsemixer(z, top_k=9), "top_k=9"),
        (lambda z: ec.sparsemixer(z, jitter=-1), "jitter=-1"),
        (
            lambda z: ec.sparsemixer(z, whole=torch.ones(2, dtype=torch.bool)),
            r"whole is \(2,\), and should be \(2, 1\)",
        ),
    ],
)
def test_what_is_not_possible(call: Callable[[Tensor], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(torch.zeros(2, E))

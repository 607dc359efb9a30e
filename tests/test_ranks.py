"""Planners of ranks: within the budget, as good as trying everything, and what they say where nothing fits."""

from __future__ import annotations

import itertools

import pytest
import torch

from effcompile.passes.ranks import PLANNERS, UNITS, Item, _unit, bytes_of, cost, largest


def item(outputs, inputs, seed, *, bias=0, sensitivity=1.0, log_condition=1.0):
    values = torch.rand(min(outputs, inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lost = values.sort(descending=True).values ** 4
    return Item(outputs * inputs, outputs + inputs, bias, lost, sensitivity, log_condition)


ITEMS = [item(48, 48, 0, sensitivity=3.0), item(16, 48, 1, bias=16), item(96, 48, 2, sensitivity=0.2), item(48, 96, 3)]
WHOLE = sum(one.dense for one in ITEMS)


def loss(items, ranks):
    return sum(i.sensitivity * float(i.lost[r:].sum()) for i, r in zip(items, ranks, strict=True) if r is not None)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", PLANNERS)
def test_budget_is_met_and_used(name, ratio):
    ranks = PLANNERS[name](ITEMS, ratio * WHOLE, 4)
    spent = cost(ITEMS, ranks)
    assert spent <= ratio * WHOLE
    # What is left would not pay for one more step everywhere.
    assert spent > ratio * WHOLE - sum(4 * one.each for one in ITEMS) - max(one.dense for one in ITEMS) * 0.2
    for one, rank in zip(ITEMS, ranks, strict=True):
        assert rank is None or (rank % 4 == 0 and one.cost(rank) < one.dense)


@pytest.mark.parametrize("name", PLANNERS)
def test_all_of_it_stays_dense(name):
    assert PLANNERS[name](ITEMS, WHOLE, 4) == [None] * len(ITEMS)


@pytest.mark.parametrize("name", PLANNERS)
def test_too_small_a_budget_is_told(name):
    with pytest.raises(ValueError, match=r"the smallest ranks keep 0\.\d+ of these linears, and 0\.010 are asked for"):
        PLANNERS[name](ITEMS, 0.01 * WHOLE, 8)


@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_is_as_good_as_trying_everything(seed, ratio):
    items = [item(24, 24, seed, sensitivity=2.0), item(8, 24, seed + 10, bias=8), item(24, 16, seed + 20)]
    budget = ratio * sum(one.dense for one in items)
    ranks = PLANNERS["sensitivity"](items, budget, 2)
    every = itertools.product(*([None, *one.grid(2)] for one in items))
    best = min(loss(items, choice) for choice in every if cost(items, choice) <= budget)
    assert loss(items, ranks) == pytest.approx(best, rel=1e-12)
    assert loss(items, ranks) <= min(
        loss(items, PLANNERS[name](items, budget, 2)) for name in ("uniform", "energy", "lorc")
    )


def test_costs_that_are_rounded_stay_within_the_budget():
    """Without a common divisor the budget is counted in parts, and prices are rounded up."""
    items = [item(47, 53, seed, sensitivity=1.0 + seed) for seed in range(6)]
    items = [Item(i.dense * 1e5 + 1, i.each * 1e5, 7.5, i.lost, i.sensitivity) for i in items]
    budget = 0.7 * sum(one.dense for one in items)
    assert _unit([c for one in items for c in (one.dense, one.cost(1))], budget) == budget / UNITS
    ranks = PLANNERS["sensitivity"](items, budget, 1)
    assert 0.99 * budget < cost(items, ranks) <= budget


def test_uniform_keeps_the_same_share_and_energy_the_same_energy():
    ranks = PLANNERS["uniform"](ITEMS, 0.5 * WHOLE, 1)
    shares = [one.cost(rank) / one.dense for one, rank in zip(ITEMS, ranks, strict=True)]
    # Each within a unit of its rank, and of its bias.
    assert all(0 <= 0.5 - share < (2 * one.each) / one.dense for one, share in zip(ITEMS, shares, strict=True))
    ranks = PLANNERS["energy"](ITEMS, 0.5 * WHOLE, 1)
    kept = [float(one.lost[:r].sum() / one.lost.sum()) for one, r in zip(ITEMS, ranks, strict=True)]
    assert max(kept) - min(kept) < 0.05


def test_lorc_keeps_less_and_less():
    """Of equal linears: cumulative products of condition numbers fall with depth, and so do ranks."""
    items = [item(64, 64, 0, log_condition=1.0 + 0.1 * n) for n in range(8)]
    budget = 0.6 * sum(one.dense for one in items)
    ranks = [64 if r is None else r for one, r in zip(items, PLANNERS["lorc"](items, budget, 1))]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]
    tight = PLANNERS["lorc"](items, 0.3 * sum(one.dense for one in items), 1)
    assert tight[-1] == 1


def test_nothing_fits_where_factors_always_cost_more():
    small = item(4, 4, 0)
    assert small.grid(2) == []
    assert PLANNERS["uniform"]([small, ITEMS[0]], 0.9 * (16 + ITEMS[0].dense), 2)[0] is None


def test_largest_of_a_family():
    ranks = largest([ITEMS[0]], ITEMS[0].cost(10), lambda x: [int(1 + x * 40)])
    assert ranks == [10]


def test_bytes_as_people_write_them():
    for text, wanted in (("300MB", 3e8), ("2 GiB", 2**31), ("1.5kB", 1500), ("12", 12), (7, 7), ("64KiB", 1 << 16)):
        assert bytes_of(text) == wanted
    for wrong in ("MB", "-3MB", "3 XB", "0MB", True, -1, 0, "3iB"):
        with pytest.raises(ValueError, match="expected 'parameters', 'bytes', or a number of bytes"):
            bytes_of(wrong)

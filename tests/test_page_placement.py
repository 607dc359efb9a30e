"""Where DELTA's layers of full attention stand: the best placement, against trying all."""

from __future__ import annotations

import itertools

import pytest
import torch

from effcompile.passes.delta import Delta, placement


def lost(kept: torch.Tensor, full: tuple[int, ...]) -> float:
    """What the layers that are not full lose with the pages of the nearest full layer before them."""
    total = 0.0
    for layer in range(len(kept)):
        if layer not in full:
            chooser = max(i for i in full if i < layer)
            total += 1 - float(kept[chooser, layer].double())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_no_other_placement_keeps_more(seed: int, count: int) -> None:
    kept = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    kept.masked_fill_(torch.ones(8, 8).tril().bool(), torch.nan)  # which mean nothing
    found = placement(kept, count)
    others = [(0, *rest) for rest in itertools.combinations(range(1, 8), count - 1)]
    assert found in others
    assert lost(kept, found) == pytest.approx(min(lost(kept, full) for full in others), abs=1e-9)
    assert Delta(full_cache_layers=found).full(8) == found


def test_equal_placements_and_wrong_sizes() -> None:
    assert placement(torch.ones(5, 5), 5) == (0, 1, 2, 3, 4)
    for kept, count in ((torch.ones(3, 4), 1), (torch.ones(3, 3), 0), (torch.ones(3, 3), 4)):
        with pytest.raises(ValueError, match="1 to L layers"):
            placement(kept, count)

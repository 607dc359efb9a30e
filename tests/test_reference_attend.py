"""The reference body of ``attend`` reads a long prompt in pieces: the same result, without all scores at once."""

from __future__ import annotations

import pytest
import torch

from effcompile.kernels import attention, ops
from effcompile.kernels.form import KVForm


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [-1, 17])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("queries", "length"), [(65, 100), (100, 100), (1, 77)])
def test_pieces(
    queries: int, length: int, padded: bool, window: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = []
    for kind in ("key", "value"):
        (shape, dtype), *_ = KVForm(16, 16).buffers(kind, 2, 2, 128, 32, torch.float32)  # type: ignore[arg-type]
        state += [torch.randn(shape, dtype=dtype), None, None]
    query, mask = torch.randn(2, 4, queries, 32), torch.ones(2, 128, dtype=torch.bool)
    mask[0, :23] = False
    args = (query, *state, torch.tensor(length), mask if padded else None, "k16v16g32r128", 0.2, causal, window)
    sizes: list[int] = []
    body = attention.attend

    def watched(q: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * key.shape[2])
        return body(q, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend", watched)
    with ops.reference_only():
        whole = torch.ops.effcompile.attend(*args)
        assert len(sizes) == 1
        sizes.clear()
        monkeypatch.setattr(ops, "SCORES", 7 * 2 * 4 * length)
        pieces = torch.ops.effcompile.attend(*args)
    assert len(sizes) == max(1, -(-queries // 7))
    assert max(sizes) <= ops.SCORES
    # One row sums the same products; only their order may differ with the shape of a product.
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert all(x.is_contiguous() for x in pieces)

"""Keys and values as low-rank latents: what a side of a store holds with ``latent=r``, and how it is rebuilt.

The keys of all ``G`` heads before their norm and their rotary embedding are one linear map of the hidden state, ``k =
W x + b`` with ``W`` ``[G*D, d]``. With the first ``r`` left singular vectors ``U`` ``[G*D, r]`` of ``W``, the map of
rank ``r`` that is nearest to ``W`` is ``U (U^T W)`` (Eckart and Young, 1936). The store keeps the latents ``c = (U^T W)
x``, ``r`` numbers a token for all heads, and attention rebuilds ``U c + b`` before it meets the query. The rotary
embedding stands between the two, so ``U`` cannot be folded into the query: keys are rebuilt, then normed where the
model does that, then rotated by the angles of their tokens.

One operand carries all of that, ``up`` ``[G, D, r + 2]`` fp32: ``up[..., :r]`` is ``U`` by heads, ``up[..., r]`` the
bias, and ``up[..., r + 1]`` the weight of the norm, which is there if ``eps`` is a number.

Rebuilt keys are rounded to the model's dtype, as its own are.

Values have latents of their own with ``value_latent=r``, and nothing between them and the sum over tokens: ``sum_t p_t
(U c_t + b) = U (sum_t p_t c_t) + b sum_t p_t``. So attention sums latents, the same for all heads, and their
up-projection comes once for each query, behind the softmax. The last sum is 1 but where a sink takes mass. Their
operand ``value_up`` ``[G, r + 1, E]`` fp32 holds ``U^T`` by heads and the bias as one more row, which meets that sum.

Source: LoRC (Zhang et al., 2024, arXiv 2410.03111), the low-rank K and V projections and their use before RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import quantize, rope
from effcompile.kernels.form import KVForm

BESIDES = 2
"""Columns of ``up`` behind those of ``U``: the bias, and the weight of the norm."""
FOR_DECODING = "many queries and latents: these are multiplied out once, densely, and not for each tile of queries"
"""Why no program but that of decoding reads latents."""


def rank_of(up: Tensor | None) -> int:
    """``r``, the channels of a key's latent; 0 without an operand."""
    return 0 if up is None else up.shape[2] - BESIDES


def value_rank_of(value_up: Tensor | None) -> int:
    """``r``, the channels of a value's latent; 0 without an operand."""
    return 0 if value_up is None else value_up.shape[1] - 1


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U`` ``[G*D, r]``, orthonormal, and ``U^T W`` ``[r, d]`` of a weight ``[G*D, d]``, both fp64.

    Channels come in the order of falling singular values, so scales of a channel differ and those of a token do not.
    The left singular vectors are eigenvectors of ``W W^T``: the side ``G*D`` is the short one, and fp64 leaves enough
    of a squared condition number to span any rank.
    """
    wide = weight.detach().double()
    basis = torch.linalg.eigh(wide @ wide.mT)[1].flip(1)[:, :rank]
    return basis, basis.mT @ wide


def operand(basis: Tensor, heads: int, bias: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """``up`` fp32 of ``U`` ``[G*D, r]``, a bias ``[G*D]`` and the weight of a norm ``[D]``."""
    size = basis.shape[0] // heads
    zero = basis.new_zeros(heads, size)
    columns = [zero if bias is None else bias.detach().to(basis).view(heads, size)]
    columns.append(zero if norm is None else norm.detach().to(basis).expand(heads, size))
    return torch.cat([basis.view(heads, size, -1), torch.stack(columns, 2)], 2).float()


def value_operand(basis: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """``value_up`` fp32 of ``U`` ``[G*E, r]`` and a bias ``[G*E]``."""
    row = basis.new_zeros(basis.shape[0]) if bias is None else bias.detach().to(basis)
    return torch.cat([basis, row[:, None]], 1).view(heads, -1, basis.shape[1] + 1).mT.float().contiguous()


def rebuild_values(latents: Tensor, value_up: Tensor) -> Tensor:
    """Values ``[B, G, S, E]`` fp32 of the latents ``[B, 1, S, r]``."""
    held = latents[:, 0].float()
    return torch.einsum("bsr,gre->bgse", torch.cat([held, torch.ones_like(held[..., :1])], 2), value_up)


def rebuild(latents: Tensor, up: Tensor, eps: float | None, table: Tensor | None, kind: str) -> Tensor:
    """Keys ``[B, G, S, D]`` fp32 of the latents ``[B, 1, S, r]`` of tokens 0 to ``S``.

    ``table`` holds their angles (:mod:`effcompile.kernels.rope`), ``kind`` says what they turn; without one keys are
    not rotated. Norms are those of the root mean square of a head (Zhang and Sennrich, 2019).
    """
    rank, tokens = rank_of(up), latents.shape[2]
    keys = torch.einsum("bsr,gdr->bgsd", latents[:, 0].float(), up[..., :rank]) + up[:, None, :, rank]
    if eps is not None:
        keys = keys * (keys.square().mean(-1, keepdim=True) + eps).rsqrt() * up[:, None, :, rank + 1]
    if table is None:
        return keys
    cos, sin = (x[:, :, :tokens] for x in rope.angles(table, 0, -(-tokens // rope.RUN) * rope.RUN))
    return rope.rotate(keys, cos, sin, kind)


def load(
    keys: list[Tensor],
    values: list[Tensor],
    length: Tensor,
    form: KVForm,
    up: Tensor | None,
    eps: float | None,
    value_up: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All keys ``[B, G, C, D]`` and values ``[B, G, C, E]`` that a store with latents stands for, 0 from ``length`` on.

    In its dtype. The length stays on its device.
    """
    if up is None:
        key = quantize.load_room(keys, length, form, "key", table)
    else:
        key = rebuild(quantize.load_room(keys, length, form.buffered, "key"), up, eps, table, form.rope)
    value = quantize.load_room(values, length, form, "value")
    value = value if value_up is None else rebuild_values(value, value_up)
    seen = torch.arange(key.shape[2], device=key.device)[:, None] < length
    # A new tensor where nothing was rebuilt: what is loaded is no view of the store.
    return tuple(torch.where(seen, x, 0).to(side[-1].dtype).contiguous() for x, side in ((key, keys), (value, values)))  # type: ignore[return-value]

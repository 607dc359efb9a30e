"""Keys as low-rank latents: what the key side of a store holds with ``latent=r``, and how keys are rebuilt from it.

The keys of all ``G`` heads before their norm and their rotary embedding are one linear map of the hidden state, ``k =
W x + b`` with ``W`` ``[G*D, d]``. With the first ``r`` left singular vectors ``U`` ``[G*D, r]`` of ``W``, the map of
rank ``r`` that is nearest to ``W`` is ``U (U^T W)`` (Eckart and Young, 1936). The store keeps the latents ``c = (U^T W)
x``, ``r`` numbers a token for all heads, and attention rebuilds ``U c + b`` before it meets the query. The rotary
embedding stands between the two, so ``U`` cannot be folded into the query: keys are rebuilt, then normed where the
model does that, then rotated by the angles of their tokens.

One operand carries all of that, ``up`` ``[G, D, r + 2]`` fp32: ``up[..., :r]`` is ``U`` by heads, ``up[..., r]`` the
bias, and ``up[..., r + 1]`` the weight of the norm, which is there if ``eps`` is a number.

Rebuilt keys are rounded to the model's dtype, as its own are.

Source: LoRC (Zhang et al., 2024, arXiv 2410.03111), the low-rank K projection and its use before RoPE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import quantize, rope
from effcompile.kernels.form import KVForm

BESIDES = 2
"""Columns of ``up`` behind those of ``U``: the bias, and the weight of the norm."""
FOR_DECODING = "many queries and latents: their keys are rebuilt once, densely, and not for each tile of queries"
"""Why no program but that of decoding reads latents."""


def rank_of(up: Tensor) -> int:
    """``r``, the channels of a latent."""
    return up.shape[2] - BESIDES


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


def keys_of(
    state: list[Tensor], length: Tensor, form: KVForm, up: Tensor, eps: float | None, table: Tensor | None
) -> Tensor:
    """All keys ``[B, G, C, D]`` that the key side of a store stands for, in its dtype, 0 from ``length`` on.

    The length stays on its device.
    """
    keys = rebuild(quantize.load_room(state, length, form.buffered, "key"), up, eps, table, form.rope)
    seen = torch.arange(keys.shape[2], device=keys.device) < length
    return torch.where(seen[:, None], keys, 0).to(state[-1].dtype).contiguous()

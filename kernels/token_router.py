"""A router that reads token ids: one causal transformer block, which decides for each token once, before any layer.

After Read-ME (Cai et al., NeurIPS 2024, section 3.2): an embedding of its own, RMSNorm, attention with RoPE, SwiGLU.

Shapes: ``B`` texts, of which ``T`` tokens are in this call; ``V`` token ids; ``E`` experts; ``C`` channels in ``h``
heads; ``W`` tokens that a token sees, itself included; ``R`` texts that there is room for. All numbers are fp32,
whatever the model's dtype, since a rounding decides which expert is taken.

A router is a list of tensors in the order of :data:`TENSORS`: ``rows`` int32 ``[V]``, the row of each id in
``embedding`` ``[rows, C]``, where ids may share one; ``qkv`` ``[3 C, C]``, ``out`` ``[C, C]``, ``gate_up``
``[2 H, C]``, ``down`` ``[C, H]``, ``head`` ``[E, C]``; and three norms ``[C]``.

State, written in place: ``keys`` and ``values`` ``[R, W, C]``, where the token at place ``p`` is in slot ``p % W``;
``seen`` bool ``[R, W]``, which slots hold a token of the text; ``text`` int64 ``[3]``, the place of the next token, the
number of texts, and how many calls stood elsewhere than at the next place or the beginning. All begin as zeros.

``route_tokens(ids, counted, router, keys, values, seen, text, at, heads) -> chosen``
    The expert of each token of ``ids`` ``[B, T]``: int32 ``[B * T, 1]``, as ``grouped_ffn`` takes it. ``at`` is int64
    0-d: the place of the call's first token in its texts. Tokens that are not ``counted`` (bool ``[B or 1, T]``) are
    not seen by others. A call that does not go on with the text that is known sees its own tokens alone, never those
    of another text.

The body is traced into the graph in which it stands. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.kernels import ops

TENSORS = ("rows", "embedding", "norm", "qkv", "out", "ffn_norm", "gate_up", "down", "head_norm", "head")
BASE = 10_000.0
"""Of RoPE."""

ops.library.define(
    "route_tokens(Tensor ids, Tensor? counted, Tensor[] router, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) seen, "
    "Tensor(d!) text, Tensor at, int heads) -> Tensor"
)


def check_router(router: Mapping[str, Tensor], heads: int) -> int:
    """The number of experts. Raises ``ValueError`` if the tensors of a router do not fit each other."""
    if missing := [name for name in TENSORS if name not in router]:
        raise ValueError(f"the router has no {', '.join(missing)}.")
    (rows, size), hidden = router["embedding"].shape, router["down"].shape[-1]
    experts = router["head"].shape[0]
    if size % (2 * heads):
        raise ValueError(f"a router of {size} channels does not have {heads} heads of an even size.")
    shapes = {
        "norm": (size,), "qkv": (3 * size, size), "out": (size, size), "ffn_norm": (size,),
        "gate_up": (2 * hidden, size), "down": (size, hidden), "head_norm": (size,), "head": (experts, size),
    }  # fmt: skip
    for name, shape in shapes.items():
        if tuple(router[name].shape) != shape:
            raise ValueError(f"{name} of the router is {tuple(router[name].shape)}, and should be {shape}.")
    places = router["rows"]
    if places.dim() != 1 or places.dtype is not torch.int32 or not bool(((places >= 0) & (places < rows)).all()):
        raise ValueError(f"rows of the router should be int32 [V], from 0 to {rows - 1}.")
    return int(experts)


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """RoPE: ``x`` ``[B, h, T, D]`` at the places ``[T]``."""
    half = x.shape[-1] // 2
    rates = BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = place.to(torch.float32)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def logits(
    ids: Tensor,
    router: Sequence[Tensor],
    heads: int,
    place: Tensor,
    allowed: Tensor,
    past: Sequence[Tensor] = (),
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the router says of ``ids`` ``[B, T]`` at the places ``[T]``: ``[B, T, E]``; and its keys and values.

    ``past`` are keys and values ``[B, h, P, C / h]`` from before; ``allowed`` bool ``[B or 1, T, P + T]`` says which of
    them and of the call's own a token sees, at least one.
    """
    rows, embedding, norm, qkv, out, ffn_norm, gate_up, down, head_norm, head = router
    size = (embedding.shape[1],)
    x = F.embedding(rows[ids], embedding)
    split = linear(F.rms_norm(x, size, norm, 1e-6), qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = rotated(split[0], place), rotated(split[1], place), split[2]
    keys, values = (torch.cat([old, own], 2) for old, own in zip(past, (key, value))) if past else (key, value)
    y = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed[:, None])
    x = x + linear(y.transpose(1, 2).flatten(2), out)
    gate, up = linear(F.rms_norm(x, size, ffn_norm, 1e-6), gate_up).chunk(2, -1)
    x = x + linear(F.silu(gate) * up, down)
    return linear(F.rms_norm(x, size, head_norm, 1e-6), head), key, value


def route_tokens(
    ids: Tensor,
    counted: Tensor | None,
    router: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    text: Tensor,
    at: Tensor,
    heads: int,
) -> Tensor:
    """The meaning of ``route_tokens``."""
    (texts, tokens), window, device = ids.shape, keys.shape[1], ids.device
    goes_on = (text[0] == at) & (text[1] == texts)
    place, slot = at + torch.arange(tokens, device=device), torch.arange(window, device=device)
    # The newest place before the call that each slot can hold; negative where the text is shorter.
    held = at - 1 - (at - 1 - slot) % window
    before = seen[:texts] & goes_on & (held >= 0)
    own = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted.expand(texts, tokens)
    all_places = torch.cat([held, place])
    distance = place[:, None] - all_places
    near = (distance >= 0) & (distance < window)
    # A token always sees itself: one that does not count would otherwise see nothing, which is NaN.
    allowed = (torch.cat([before, own], 1)[:, None] & near) | (distance == 0)
    past = [t[:texts].unflatten(-1, (heads, -1)).transpose(1, 2) for t in (keys, values)]
    said, *made = logits(ids, router, heads, place, allowed, past, _product(ids))
    following = at + tokens
    # What each slot holds behind the call, and where among the call's tokens that is.
    newest = following - 1 - (following - 1 - slot) % window
    new, index = newest >= at, (newest - at).clamp(min=0)
    for state, own_heads in ((keys, made[0]), (values, made[1])):
        added = own_heads.transpose(1, 2).flatten(2)
        if isinstance(tokens, int) and tokens == 1:
            # One slot, and not all of the state: Inductor writes it in place.
            state.index_put_((torch.arange(texts, device=device), at % window), added[:, 0])
        else:
            state[:texts].copy_(added.index_select(1, index).where(new[:, None], state[:texts]))
    seen[:texts].copy_(own.index_select(1, index).where(new, before))
    elsewhere = text[2] + ((at != 0) & ~goes_on)
    text.copy_(torch.stack([following, torch.full_like(following, texts), elsewhere]))
    return said.argmax(-1).to(torch.int32).reshape(-1, 1)


def _product(ids: Tensor) -> Any:
    """The matrix product for so many tokens: a few are limited by the reading of the weights."""
    texts, tokens = ids.shape
    few = isinstance(texts, int) and isinstance(tokens, int) and texts * tokens <= ops.LINEAR_ROWS
    if not few or ids.device.type != "cpu":
        return F.linear
    return lambda x, weight: torch.ops.effcompile.linear.default(x, weight, None)


ops.library.impl("route_tokens", route_tokens, "CompositeImplicitAutograd")
ROUTE_TOKENS = torch.ops.effcompile.route_tokens.default

"""Operators that fix the neurons of a feed-forward block by the prompt: votes of its tokens, the choice, and its use.

Shapes: ``B`` texts, of which ``T`` tokens are in this call; ``F`` neurons; ``R`` texts that there is room for. ``at``
is int64 0-d: the place of the call's first token in its texts. State, written in place: ``votes`` and ``core`` int32
``[R, F]``; ``text`` int64 ``[2]``, the place of the next token and the number of texts, 0 if there is none. All begin
as zeros.

``core_votes(hidden, counted, rows, alpha, magnitude) -> votes``
    How many tokens of each text have a neuron among their core neurons: int32 ``[B, F]``, ``B = rows``. ``hidden``, all
    ``B * T`` tokens by ``F``, is what the down projection reads. The core neurons of a token are the
    ``floor(alpha * n)`` largest of its ``n`` positive ones (``magnitude``: by their size, of those that are not 0), the
    lower index where they tie; NaN is none. Tokens that are not ``counted`` (bool ``[B or 1, T]``) do not vote.

``choose_core(votes, core, text, new, at, tokens, keep) -> ()``
    Adds the votes ``new`` ``[B, F]`` of ``tokens`` tokens to those of the text that they go on with, or begins one
    where ``at`` is 0, and chooses ``keep`` neurons of most votes, the lower index where they tie: each row of ``core``
    lists them in order, and then -1. Tokens that neither begin a text nor go on with the one that is known leave none.

``core_list(text, core, at, rows) -> chosen``
    The neurons of one more token of each text: int32 ``[B, F]``, negative where a slot is unused, as ``grouped_ffn``
    takes it. All neurons if the token does not go on with the text that is known, which is then forgotten.

The bodies of the last two are traced into the graph in which they stand. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcompile.kernels import ops

ops.library.define("core_votes(Tensor hidden, Tensor? counted, SymInt rows, float alpha, bool magnitude) -> Tensor")
ops.library.define(
    "choose_core(Tensor(a!) votes, Tensor(b!) core, Tensor(c!) text, Tensor new, Tensor at, SymInt tokens, int keep) "
    "-> ()"
)
ops.library.define("core_list(Tensor(a!) text, Tensor core, Tensor at, SymInt rows) -> Tensor")


def check_votes(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float) -> None:
    """Raise ``ValueError`` if arguments of ``core_votes`` do not fit each other."""
    tokens = hidden.numel() // hidden.shape[-1]
    if rows < 1 or tokens % rows:
        raise ValueError(f"hidden {tuple(hidden.shape)} has {tokens} tokens, which are not those of {rows} texts.")
    if counted is not None:
        if counted.dtype is not torch.bool or counted.dim() != 2:
            raise ValueError(f"counted is {counted.dtype} {tuple(counted.shape)}, and should be bool [B or 1, T].")
        if counted.shape[0] not in (1, rows) or counted.shape[1] != tokens // rows:
            raise ValueError(f"counted is {tuple(counted.shape)}, and should be {(rows, tokens // rows)}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is a share, from 0 to 1.")


def votes_reference(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> Tensor:
    """The meaning of ``core_votes``."""
    check_votes(hidden, counted, rows, alpha)
    said = hidden.reshape(rows, -1, hidden.shape[-1])
    said = said.abs() if magnitude else said
    positive = said > 0
    # The product in fp64, as Python has it: a share of a count may be whole.
    limit = (alpha * positive.sum(-1, keepdim=True).double()).floor()
    order = said.where(positive, 0).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(said.shape[-1], device=said.device).expand_as(order)
    core = torch.zeros_like(positive).scatter(-1, order, rank < limit)
    if counted is not None:
        core = core & counted.unsqueeze(-1)
    return core.sum(1, dtype=torch.int32)


def _votes(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> Tensor:
    try:
        found: Tensor = ops.launch("core_votes", hidden.device.type, hidden, counted, rows, alpha, magnitude)
        return found
    except ops.KernelUnavailable:
        return votes_reference(hidden, counted, rows, alpha, magnitude)


def _fake_votes(hidden: Tensor, counted: Tensor | None, rows: int, alpha: float, magnitude: bool) -> Tensor:
    return hidden.new_empty((rows, hidden.shape[-1]), dtype=torch.int32)


def _goes_on(text: Tensor, at: Tensor, rows: int) -> Tensor:
    """Whether the tokens at ``at`` are the next ones of the texts that are known: bool, 0-d."""
    return (text[0] == at) & (text[1] == rows)


def _move(text: Tensor, following: Tensor, known: Tensor, rows: int) -> None:
    text.copy_(torch.stack([following, torch.full_like(following, rows).where(known, 0)]))


def choose_core(votes: Tensor, core: Tensor, text: Tensor, new: Tensor, at: Tensor, tokens: int, keep: int) -> None:
    """The meaning of ``choose_core``."""
    rows, neurons = new.shape
    begins = at == 0
    known = begins | _goes_on(text, at, rows)
    own = votes[:rows]
    total = new + own.where(~begins, 0)
    own.copy_(total)
    most = total.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    listed = most.sort(-1).values.to(torch.int32)
    # Not a pad, which would fix the number of texts where it is a symbol.
    core[:rows].copy_(torch.cat([listed, listed.new_full((rows, neurons - keep), -1)], 1))
    _move(text, at + tokens, known, rows)


def core_list(text: Tensor, core: Tensor, at: Tensor, rows: int) -> Tensor:
    """The meaning of ``core_list``."""
    known = _goes_on(text, at, rows)
    everything = torch.arange(core.shape[1], dtype=torch.int32, device=core.device)
    chosen = core[:rows].where(known, everything)
    _move(text, at + 1, known, rows)
    return chosen


ops.library.impl("core_votes", _votes, "CompositeExplicitAutograd")
torch.library.register_fake("effcompile::core_votes", _fake_votes, lib=ops.library)
ops.library.impl("choose_core", choose_core, "CompositeImplicitAutograd")
ops.library.impl("core_list", core_list, "CompositeImplicitAutograd")
CORE_VOTES, CHOOSE_CORE, CORE_LIST = (
    getattr(torch.ops.effcompile, name).default for name in ("core_votes", "choose_core", "core_list")
)

"""One attention layer's store, and what the host knows of the call that fills it."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import cache_utils

from effcompile.kernels import page_ops, pages  # noqa: F401  (registers bound_store)
from effcompile.kernels.form import Kind, KVForm

if TYPE_CHECKING:
    from effcompile.runtime.latent import Factor
    from effcompile.runtime.rope import Angles


class CacheError(ValueError):
    """A cache that does not fit the call: another model's, another batch, another shape, dtype or device."""


class GradientError(RuntimeError):
    """Gradients were asked for through a compressed cache, which has none."""


def lasting() -> contextlib.AbstractContextManager[Any]:
    """A context for making tensors that outlive a call: one made under ``inference_mode`` could not change outside."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def change_rows(layer: Any, take: Callable[[Tensor], Tensor]) -> None:
    """Give one of transformers' layers of fixed size the rows that ``take`` makes of its keys and values."""
    if not layer.is_initialized:
        return
    with lasting():
        layer.keys, layer.values = take(layer.keys), take(layer.values)
    layer.batch_size = layer.keys.shape[0]
    for buffer in (layer.keys, layer.values):
        torch._dynamo.mark_static_address(buffer)


REACH = 256
"""Tokens that a recording layer can take back at least, however small its ring: more than assistants propose."""


@dataclasses.dataclass
class Entry:
    """Whether a call was prepared and nothing is stored yet.

    Then the hook of a model within the called one has nothing to do. An object of its own: of two writes to one object
    with a higher-order operator (flex attention) between them, Dynamo replays only the first.
    """

    open: bool = False


@dataclasses.dataclass
class Call:
    """What the host knows of the call in progress: one object, shared by a cache and its layers.

    Attributes
    ----------
    open
        The call was prepared, and its last layer has not stored yet. If it still is when the next call begins, the
        call failed: some stores may hold its tokens and some not.
    entry
        Whether its first layer has not stored yet either.
    count
        Tokens that the call appends; None where that is not known.
    sent
        Tokens sent to the cache in all; None after an ``update`` that no hook prepared. On an accelerator reading the
        length would wait for the device.
    """

    open: bool = False
    entry: Entry = dataclasses.field(default_factory=Entry)
    count: int | None = None
    sent: int | None = 0


class CompressedLayer(cache_utils.CacheLayerMixin):
    """One layer's store. Buffers and their shapes are those of :class:`~effcompile.kernels.form.KVForm`.

    Attributes
    ----------
    state
        The six buffers in operator order, ``None`` where a dense side needs fewer.
    length
        Tokens in the store, int64 0-d, one tensor shared by all layers of a cache.
    fresh
        True until the first ``update``: that call attends to what it was given.
    held_from
        The ring holds no token before this one; only removing tokens makes it more than what follows from the length.
    record_past
        New tokens leave in :attr:`log` what they took over, so that they can be removed again.
    log
        For each packed side ``[B, G, L, D]``: what the slots of the newest ``L`` tokens held before them.
    angles
        The cache's table of angles, where keys are kept before RoPE.
    kept
        What is kept of the keys in every ``unit`` tokens, ``"bounds"`` or ``"moments"``, where a method for decoding
        asks for it; else None.
    bounds
        The buffer with that (:func:`effcompile.kernels.pages.store_bounds`), or None.
    given
        cos and sin of the call in progress, from the hook on this layer's attention to the ``update`` that takes them.
    factor, value_factor
        Where keys, or values, are kept as latents, what makes those.
    hidden
        For these the hidden states of the call in progress, as above.
    """

    is_compileable = True
    is_sliding = False

    def __init__(
        self,
        form: KVForm,
        capacity: int,
        length: Tensor,
        call: Call,
        index: int,
        ends: tuple[int, int],
        angles: Angles | None = None,
        kept: pages.Kept | None = None,
        factors: Mapping[Kind, Factor] = types.MappingProxyType({}),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.form = form
        self.form_name = form.name
        self.capacity = capacity
        self.length = length
        self.call = call
        self.index = index
        self.first, self.last = index == ends[0], index == ends[1]
        self.fresh = True
        self.state: tuple[Tensor | None, ...] = ()
        self.is_croppable = form.dense  # any number of tokens can be removed
        self.record_past = False
        self.held_from = 0
        self.log: list[Tensor] = []
        self.overrun: tuple[Tensor, Tensor] | None = None
        self.angles = angles
        self.given: Any = None
        self.factor, self.value_factor = factors.get("key"), factors.get("value")
        self.hidden: Tensor | None = None
        self.kept, self.unit = kept, pages.unit_of(form)
        self.bounds: Tensor | None = None

    def allocate(self, batch: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype) -> None:
        """Make the buffers, zeroed, at addresses that stay. Raises ``FormError`` if the head size does not divide."""
        state: list[Tensor | None] = []
        with lasting():
            for kind, size in (("key", key_size), ("value", value_size)):
                shapes = self.form.buffers(kind, batch, heads, self.capacity, size, dtype)  # type: ignore[arg-type]
                buffers: list[Tensor | None] = [torch.zeros(s, dtype=d, device=self.length.device) for s, d in shapes]
                state += buffers + [None] * (3 - len(buffers))
            # Keeping them asks for the length, for which a GPU would have to be waited: quest says so there.
            if self.kept is not None and self.length.device.type == "cpu":
                shape = batch, heads, self.capacity // self.unit, 2, key_size
                self.bounds = torch.zeros(shape, dtype=dtype, device=self.length.device)
        self.state = tuple(state)
        self.shape = (batch, heads, key_size, value_size)
        self.dtype, self.device = dtype, self.length.device
        self.is_initialized = True
        self.mark()

    def mark(self) -> None:
        """Say that the buffers keep their addresses; inside a graph that cannot be said."""
        if not torch.compiler.is_compiling():
            for buffer in self.buffers():
                torch._dynamo.mark_static_address(buffer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate from the first keys and values, where the config did not tell their shape."""
        batch, heads, _, key_size = key_states.shape
        self.allocate(batch, heads, key_size, value_states.shape[3], key_states.dtype)

    @property
    def rebuilds(self) -> dict[str, Any]:
        """What operators make keys and values of latents with; of the factors, so that a copied cache shares it."""
        made = (factor.rebuilds for factor in (self.factor, self.value_factor) if factor is not None)
        return {name: given for one in made for name, given in one.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and, while it records, of the log."""
        held = [*self.log, *(self.overrun or ())]
        return sum(b.numel() * b.element_size() for b in self.buffers()) + sum(
            int(x.untyped_storage().nbytes()) for x in held
        )

    def buffers(self) -> list[Tensor]:
        """The buffers that exist."""
        return [t for t in (*self.state, self.bounds) if t is not None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``[B, G, T, D]`` and values ``[B, G, T, E]``; return what this call attends to.

        That is the arguments on an empty cache, else the store: ``[B, G, C, D]`` and ``[B, G, C, E]``, zero past the
        length.

        Raises
        ------
        CacheError
            If the shape, dtype or device is not the one this layer was made for.
        GradientError
            If the keys or values require gradients.
        CapacityError
            If they do not fit; nothing has been written.
        """
        given, self.given = self.given, None  # those of one call never serve another
        hidden, self.hidden = self.hidden, None
        if not self.is_initialized or (self.fresh and self._mismatch(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        if problem := self._mismatch(key_states, value_states):
            raise CacheError(f"layer {self.index}: {problem}")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise GradientError(
                f"layer {self.index}: gradients are needed here, and a compressed cache has none. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or with use_cache=False."
            )
        count = key_states.shape[2]
        # Only eagerly: inside a graph the number would be guarded, and a graph is compiled for its tokens anyway.
        if not torch.compiler.is_compiling() and self.call.open and self.call.count not in (None, count):
            raise CacheError(
                f"layer {self.index}: the call has {self.call.count} tokens and the model made {count} keys, probably "
                "from a padding mask as long as the cache; pass position_ids as well."
            )
        if self.first:
            self.call.entry.open = False
        # Equal, except under autocast: there rotated keys are in fp32 and values are not, and the store takes both.
        key, value = (
            given.to(self.dtype) if factor is None else self._latents(factor, hidden, count)
            for given, factor in ((key_states, self.factor), (value_states, self.value_factor))
        )
        stored = key, value
        if self.record_past and count > self.form.slots:
            # More than the ring holds: tokens of this call take over from others of it, which no buffer will have had.
            over = slice(max(0, count - self.form.slots - self.reach), count - self.form.slots)
            self.overrun = stored[0][:, :, over].clone(), stored[1][:, :, over].clone()
        table = {}
        if self.angles is not None:
            table["table"] = self.angles.write(self.index, self.length, given, key_states.shape[0], count)
        if self.bounds is not None:
            rows = self.state[0] if self.state[2] is None else self.state[2]
            torch.ops.effcompile.bound_store(self.bounds, rows, self.length, stored[0], self.unit, self.kept)
        # Latents are stored as they come; only what becomes keys is turned.
        torch.ops.effcompile.kv_store(
            *self.state, self.length, *stored, self.form_name, **({} if self.factor else table)
        )
        if self.fresh:
            result = key_states, value_states
        else:
            total = self.length + count
            result = torch.ops.effcompile.kv_load(*self.state, total, self.form_name, **table, **self.rebuilds)
        if self.last:
            self.length.add_(count)
            if not self.call.open:
                self.call.sent = None
            self.call.open = False
        self.fresh = False
        return result

    def _latents(self, factor: Factor, hidden: Tensor | None, count: int) -> Tensor:
        """The latents ``[B, 1, T, r]`` of this call's hidden states, in the dtype of the store.

        Raises :class:`CacheError` if none were handed on for this call, or others.
        """
        expected = (self.shape[0], count, factor.down.shape[1])
        if hidden is None or hidden.shape != expected:
            got = "none have" if hidden is None else f"those of shape {tuple(hidden.shape)} have"
            raise CacheError(
                f"layer {self.index}: {factor.asked} needs the hidden states {expected} of this call, and {got} "
                "reached the cache. Call the model that the cache was made for (not after ec.remove), or use "
                f"{factor.asked.partition('=')[0]}=0 here."
            )
        return factor.latents(hidden).to(self.dtype)

    def _mismatch(self, key: Tensor, value: Tensor) -> str:
        """What is wrong with the shape, dtype or device of new keys and values, or ''."""
        batch, heads, key_size, value_size = self.shape
        if key.shape[0] != batch:
            return (
                f"the cache holds a batch of {batch} and this call has {key.shape[0]}; make a new cache, or change "
                "this one with batch_repeat_interleave(n) or batch_select_indices(rows)."
            )
        found = (key.shape[1], key.shape[3], value.shape[3])
        if found != (heads, key_size, value_size):
            return (
                f"the cache was made for {heads} heads of {key_size} and {value_size} channels, and the model gives "
                f"{found[0]} of {found[1]} and {found[2]}; make the cache with the model that uses it."
            )
        if any(x.dtype != self.dtype and not self._widens(x) for x in (key, value)):
            return (
                f"the cache was made for {self.dtype} and the model gives keys in {key.dtype} and values in "
                f"{value.dtype}; make a new cache."
            )
        if key.device != self.device:
            return f"the cache lives on {self.device} and the model's keys on {key.device}; make a new cache."
        return ""

    def _widens(self, x: Tensor) -> bool:
        """Whether autocast made ``x`` narrower than the store, which holds it exactly."""
        return torch.is_autocast_enabled(x.device.type) and torch.promote_types(x.dtype, self.dtype) == self.dtype

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset for the mask: the fresh keys on an empty cache, else the capacity."""
        return (query_length if self.fresh else self.capacity), 0

    def get_seq_length(self) -> int:
        """Tokens in the store: 0 when empty, else a 0-d tensor (transformers adds it to an arange).

        A tensor of its own: a mask that is computed late, within attention (flex), must not see the last layer count
        this call's tokens.
        """
        return 0 if self.fresh else cast(int, self.length.clone())

    def get_max_length(self) -> int:
        """The capacity in tokens."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; buffers and addresses stay."""
        self.fresh = True
        self.length.zero_()
        self.held_from = 0
        self.given = self.hidden = None
        self.forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Permute the batch in place, codes and all, without dequantising; ``beam_idx`` has one row number per row.

        Raises :class:`CacheError` if it has more or fewer: buffers of another batch would be other buffers. An empty
        store has no rows to permute.
        """
        if self.fresh:
            return
        if beam_idx.shape != (self.shape[0],):
            raise CacheError(
                f"the cache holds a batch of {self.shape[0]} and is asked to reorder it by indices of shape "
                f"{tuple(beam_idx.shape)}; the number of beams cannot change there. batch_select_indices(rows) and "
                "batch_repeat_interleave(n) change the batch."
            )
        self.forget()
        for buffer in self.buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def change_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Move to the rows that ``take`` makes of each buffer ``[B, ...]``: codes and all, without dequantising.

        An empty store has none; its next call decides.
        """
        self.forget()
        if self.fresh:
            return
        with lasting():
            self.state = tuple(None if buffer is None else take(buffer) for buffer in self.state)
            self.bounds = None if self.bounds is None else take(self.bounds)
        self.shape = (self.buffers()[0].shape[0], *self.shape[1:])
        self.mark()

    def removable(self, length: int) -> int:
        """The most tokens ``k`` such that ``length`` tokens can be shortened by any number up to ``k``.

        Write ``P(x)`` for the tokens packed at length ``x``, ``n`` for ``length`` and ``m`` for the shorter length. A
        store of ``m`` tokens needs two things. *Groups* ``[0, P(m))`` packed from the original values: they are, since
        ``P(m) <= P(n)`` and a group is packed once, from the originals, whatever follows it. *Tail* ``[P(m), m)`` in
        the ring, since appending packs from there. Token ``p`` is written to slot ``p % W`` when it comes and only
        ``p + W`` takes it over, so after ``n`` tokens the ring holds those from ``low = n - W`` on; after tokens were
        removed it holds no more than before, so ``low`` stays at least what it was then (:attr:`held_from`). So ``m``
        will do if and only if ``P(m) >= low``, or there is no tail, ``P(m) = m``.

        ``P`` never falls, so the shortest such ``m`` bounds them all: 0 where ``low <= 0``, else, with ``P(m) = g *
        floor((m - r) / g)``, it is ``m = r + g * ceil(low / g)``. Where nothing was removed before, that leaves the
        newest ``(n - r) mod g`` tokens, and ``g`` where that is 0.

        With a :attr:`log` the newest ``L`` tokens can be removed first, which leaves the ring as it was before them,
        and then as many as for ``n - L``.
        """
        if self.form.dense:
            return length
        low = self._low(length - self._logged())
        return length - (self.form.residual - -low // self.form.group * self.form.group if low > 0 else 0)

    def _low(self, length: int) -> int:
        """The oldest token in the ring of a store of ``length`` tokens that nothing can be taken back from."""
        return max(self.held_from, length - self.form.slots)

    def _logged(self) -> int:
        """``L``, the newest tokens that the log can take back."""
        self._settle()
        return self.log[0].shape[2] if self.log else 0

    @property
    def reach(self) -> int:
        """Tokens that the log goes back to, at most."""
        return max(self.form.slots, REACH)

    def activate_past_recording(self) -> None:
        """Record from the next call on what new tokens take over; transformers asks for it before it removes tokens."""
        self.record_past = not self.form.dense

    def _tails(self) -> list[Tensor]:
        return [tail for tail in (self.state[2], self.state[5]) if tail is not None] if self.is_initialized else []

    def record(self, length: int, count: int) -> None:
        """Before a call that appends ``count`` tokens to ``length``: note what the slots hold that they will take."""
        if not self.record_past:
            return
        self._settle()
        slots = torch.arange(length, length + min(count, self.form.slots), device=self.length.device) % self.form.slots
        self._note([tail[:, :, slots] for tail in self._tails()])

    def _settle(self) -> None:
        """Move what a long call has noted of itself to the log."""
        if self.overrun is not None:
            self._note([x for x, tail in zip(self.overrun, (self.state[2], self.state[5])) if tail is not None])
            self.overrun = None

    def _note(self, held: list[Tensor]) -> None:
        """Append to the log, of which only the newest ``reach`` tokens stay."""
        old = self.log or [x[:, :, :0] for x in held]
        start = [max(0, a.shape[2] - max(0, self.reach - b.shape[2])) for a, b in zip(old, held)]
        with lasting():
            self.log = [torch.cat([a[:, :, at:], b], 2) for a, b, at in zip(old, held, start)]

    def forget(self) -> None:
        """Drop the log, which describes other tokens than those that are here now."""
        self.log, self.overrun = [], None

    def undo(self, length: int, count: int) -> None:
        """Put back what the newest ``count`` of ``length`` tokens took over, as far as the log goes."""
        logged = self._logged()
        if count > logged:
            self.held_from = self._low(length - logged)
        count = min(count, logged)
        if not count:
            return
        # A slot that was taken more than once gets back what the first of the removed tokens found there.
        first, some = length - count, min(count, self.form.slots)
        slots = torch.arange(first, first + some, device=self.length.device) % self.form.slots
        for tail, log in zip(self._tails(), self.log):
            tail[:, :, slots] = log[:, :, logged - count : logged - count + some]
        self.log = [log[:, :, : logged - count] for log in self.log]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused for one layer alone: the length belongs to all of them. ``Cache.crop`` removes tokens."""
        raise CacheError("one layer of a compressed cache cannot be cropped by itself; call crop() of the cache.")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, as ``Cache.batch_repeat_interleave`` does for all layers."""
        self.change_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, as ``Cache.batch_select_indices`` does for all layers."""
        self.change_rows(lambda buffer: buffer[indices.to(buffer.device)])

    def grow(self, capacity: int) -> None:
        """Move to larger buffers, keeping all tokens."""
        old = (*self.state, self.bounds)
        self.capacity = capacity
        if not self.is_initialized:
            return
        batch, heads, key_size, value_size = self.shape
        self.allocate(batch, heads, key_size, value_size, self.dtype)
        for before, after in zip(old, (*self.state, self.bounds)):
            if before is not None and after is not None:
                after[:, :, : before.shape[2]] = before

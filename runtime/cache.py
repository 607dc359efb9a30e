"""The cache: one store per attention layer, as a ``transformers`` Cache.

``update()`` emits ``effcompile::kv_store``, which writes, and hands back ``effcompile::kv_load``, the whole store read
densely, so any attention works on it; the back end fuses the load into the attention that follows. The first call on an
empty cache attends to the fresh keys and values, later calls to the store.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import cache_utils

from effcompile.kernels import ops
from effcompile.kernels.form import Axis, Bits, KVForm
from effcompile.runtime import latent as latents
from effcompile.runtime.layer import CacheError, Call, CompressedLayer, GradientError, change_rows, lasting
from effcompile.runtime.rope import Angles, learn
from effcompile.runtime.rules import Rules, check, parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Cache", "CacheError", "CompressedLayer", "GradientError", "bucket"]

STEP = 512
"""Capacity comes in multiples of this up to ``LINEAR_UNTIL``, then in powers of two: few capacities, few recompiles."""
LINEAR_UNTIL = 8192
FIXED = (cache_utils.StaticLayer, cache_utils.StaticSlidingWindowLayer)
"""Layers of transformers that are keys and values of fixed size and no more; by exact type, as those below are more."""


def bucket(tokens: int) -> int:
    """The capacity used for at least ``tokens`` tokens.

    >>> bucket(1), bucket(7064), bucket(8193)
    (512, 7168, 16384)
    """
    if tokens <= LINEAR_UNTIL:
        return max(1, -(-tokens // STEP)) * STEP
    return int(1 << (tokens - 1).bit_length())


def refuse(model: PreTrainedModel) -> None:
    """Raise :class:`CacheError` for models that do not work with keys longer than the tokens."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise CacheError(
            f"{name} is an encoder-decoder model, whose two caches are not served; ec.remove(model) undoes it."
        )
    if getattr(model, "_can_compile_fullgraph", True) is False:
        raise CacheError(
            f"{name} does not work with a cache of fixed size (transformers says so: _can_compile_fullgraph is False), "
            "so it cannot use a compressed one; ec.remove(model) undoes the decoration."
        )


def _full(layers: Sequence[Any]) -> list[int]:
    """The layers of full attention among those that transformers would make."""
    return [i for i, layer in enumerate(layers) if type(layer) is cache_utils.StaticLayer]


def compressible(model: PreTrainedModel) -> list[int]:
    """The layers of ``model`` that a :class:`Cache` compresses."""
    config = model.config.get_text_config(decoder=True)
    return _full(cache_utils.StaticCache(config=config, max_cache_len=LINEAR_UNTIL).layers)


class Cache(cache_utils.Cache):
    """A compressed key/value cache for ``model``: pass it as ``past_key_values``.

    Layers whose ``config.layer_types`` is not full attention keep the cache that transformers gives them.
    Making a cache attaches the hooks it needs to the model (capacity check, padding mask); :func:`effcompile.remove`
    takes them off.

    Parameters
    ----------
    model
        The transformers model that will use the cache.
    capacity
        Tokens per row, rounded up to a bucket (multiples of 512 up to 8192, then powers of two). ``None``: grows as
        needed.
    key_bits, value_bits, group_size, residual, key_axis, value_axis, rope, latent, value_latent
        As in :class:`~effcompile.kernels.form.KVForm`. A decorator on the model or a sub-module beats these.
    rules
        Other values of these for some layers: a pattern of module paths and what differs there, such as
        ``{"model.layers.[0-3]": {"key_bits": 8}}``. The deepest match wins, of equally deep ones the last.
    batch_size
        Rows, if the buffers are to be allocated now; else the first call decides.

    Raises
    ------
    FormError
        Bits not offered, a group that does not divide, or a rule that names no layer.
    CacheError
        A model without a transformers config, or one with no full-attention layer; with ``rope="pre"`` also one whose
        rotary embedding could not be shown, and with ``latent`` one whose key projection could not; with
        ``value_latent`` also one that was not fitted.

    Examples
    --------
    >>> cache = Cache(model, capacity=4096, key_bits=8, value_bits=4)      # doctest: +SKIP
    >>> model.generate(ids, past_key_values=cache)                         # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int | None = None,
        *,
        key_bits: Bits = 4,
        value_bits: Bits = 4,
        group_size: int = 32,
        residual: int = 128,
        key_axis: Axis = "channel",
        value_axis: Axis = "token",
        rope: str = "post",
        latent: int | float = 0,
        value_latent: int | float = 0,
        rules: Rules = None,
        batch_size: int | None = None,
    ) -> None:
        from effcompile.runtime import adapter

        if not hasattr(model, "config"):
            raise CacheError(f"{type(model).__name__} has no transformers config; ec.Cache serves transformers models.")
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise CacheError(f"capacity={capacity!r}: expected a positive number of tokens, or None to grow as needed.")
        self.config = model.config.get_text_config(decoder=True)
        self.growing = capacity is None
        self.capacity = bucket(capacity or 1)
        device = next(model.parameters()).device
        with lasting():
            self.length = torch.zeros((), dtype=torch.int64, device=device)
        torch._dynamo.mark_static_address(self.length)
        self.call = Call()
        self._recorded: int | None = None  # the length up to which the layers' logs go
        bits, axes = (key_bits, value_bits), (key_axis, value_axis)
        default = KVForm(*bits, group_size, residual, *axes, rope, latent, value_latent)
        refuse(model)
        # Layers that stay transformers' own do not grow with ours, so their window must fit from the start.
        window = max(getattr(self.config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
        layers = cache_utils.StaticCache(config=self.config, max_cache_len=max(self.capacity, window)).layers
        full = _full(layers)
        if not full:
            raise CacheError(f"{type(model).__name__} has no full-attention layer, so there is nothing to compress.")
        chosen = parse(rules, default)
        check(chosen, model, full)
        forms = latents.planned(model, adapter.layer_forms(model, default, len(layers), chosen), full)
        # Where no program reads pages, nobody would read their bounds, and noting them would wait for the device.
        bounded = adapter.bounded_layers(model, full) if device.type == "cpu" else {}
        # Latents are made before RoPE as well.
        learned = learn(model, [i for i in full if forms[i].pre or forms[i].latent])
        factors = latents.factors(model, {i: forms[i] for i in full})
        keyed = [i for i in full if forms[i].latent]
        if keyed and (both := [i for i in full if forms[i].pre and not forms[i].latent]):
            raise CacheError(
                f"layers {both} keep keys before RoPE and layers {keyed} keep latents, whose angles "
                "are kept in fp32; use rope='post' beside latents."
            )
        self.angles = Angles.of(learned, self.capacity, device, torch.float32 if keyed else torch.float16)
        for i in full:
            form = dataclasses.replace(forms[i], rope=learned[i].rope) if i in learned else forms[i]
            angles, ends = self.angles if form.pre else None, (full[0], full[-1])
            kept = bounded.get(i)
            if form.latents or (kept == "bounds" and form.bounds_keys):
                kept = None
            layers[i] = CompressedLayer(form, self.capacity, self.length, self.call, i, ends, angles, kept, factors[i])
        super().__init__(layers=layers)
        self._model = weakref.ref(model)
        adapter.attach_hooks(model)
        turned = {i for i, how in learned.items() if how.rope != "post"}
        adapter.attach_angles(model, [i for i in full if factors[i] or i in turned])
        if batch_size is not None:
            self._allocate(batch_size, next(model.parameters()).dtype)

    @property
    def compressed(self) -> Sequence[CompressedLayer]:
        """The layers that this cache compresses."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def _fixed(self) -> list[Any]:
        """The layers of transformers' own whose rows can be changed here."""
        return [layer for layer in self.layers if type(layer) in FIXED]

    @property
    def nbytes(self) -> int:
        """Bytes of all that the compressed layers have allocated, of the table of angles, and of the length."""
        shared = self.length.element_size() + (0 if self.angles is None else self.angles.nbytes)
        return sum(layer.nbytes for layer in self.compressed) + shared

    @property
    def tokens(self) -> int:
        """Tokens in the cache, on the host."""
        return 0 if self.compressed[0].fresh else int(self.length)

    def belongs_to(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` is, or contains, or lies within, the model this cache was made for."""
        owner = self._model()
        return owner is not None and (
            owner is model or any(m is model for m in owner.modules()) or any(m is owner for m in model.modules())
        )

    def prepare(self, batch: int, count: int, dtype: torch.dtype) -> None:
        """Before a call that appends ``count`` tokens: allocate if needed, check batch and capacity, or grow.

        Runs on the host, outside any graph, before anything is written.

        Raises
        ------
        CapacityError
            If the tokens do not fit in the capacity that the user gave.
        CacheError
            If the batch changed.
        """
        layers = self.compressed
        if self.call.open:
            if not all(layer.fresh for layer in layers):
                self._check_whole()
            # The very first call failed: what it wrote lies past an empty store's end.
            self.reset()
        self._check_rows(batch)
        for layer in layers:
            if problem := latents.outdated(layer):
                raise CacheError(problem)
        seen = self.call.sent
        if seen is None or self.length.device.type == "cpu" or seen + count > self.capacity:
            seen = self.tokens
        if seen + count > self.capacity:
            if not self.growing:
                raise ops.CapacityError(
                    f"{seen} tokens are cached and {count} more were given, but the capacity is {self.capacity}; make "
                    "the cache with a larger capacity, or with capacity=None to let it grow."
                )
            self.reserve(seen + count)
        self._allocate(batch, dtype)
        self._drop_old_logs(seen)
        if any(layer.record_past for layer in layers):
            for layer in layers:
                layer.record(seen, count)
            self._recorded = seen + count
        for layer in layers:
            layer.given = layer.hidden = None  # of a call that failed
        self.call.open = self.call.entry.open = True
        self.call.count, self.call.sent = count or None, seen + count

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in all; what is cached stays. Does nothing if they fit already."""
        if tokens <= self.capacity:
            return
        self.capacity = bucket(tokens)
        for layer in self.compressed:
            layer.grow(self.capacity)
        if self.angles is not None:
            self.angles.grow(self.capacity)

    def _allocate(self, batch: int, dtype: torch.dtype) -> None:
        """Make the buffers that are missing, where the config tells the heads; else the first ``update`` does."""
        heads = getattr(self.config, "num_key_value_heads", None) or getattr(self.config, "num_attention_heads", None)
        width = getattr(self.config, "hidden_size", None)
        size = getattr(self.config, "head_dim", None) or (
            width // self.config.num_attention_heads if width and heads else None
        )
        for layer in self.compressed:
            if layer.is_initialized and layer.shape[0] != batch:
                layer.allocate(batch, *layer.shape[1:], layer.dtype)
            elif not layer.is_initialized and heads and size:
                layer.allocate(batch, heads, size, size, dtype)
        if self.angles is not None:
            self.angles.allocate(batch)
        for fixed in self._fixed:
            # Only an empty cache gets here with another batch; these layers then allocate again by themselves.
            if fixed.is_initialized and fixed.batch_size != batch:
                fixed.is_initialized = False

    def reset(self) -> None:
        """Forget all tokens; buffers, addresses and compiled code stay valid."""
        super().reset()  # type: ignore[no-untyped-call]
        self.call.open = self.call.entry.open = False
        self.call.sent = 0

    def _check_rows(self, batch: int) -> None:
        """Raise :class:`CacheError` if there are tokens of another batch."""
        for layer in self.compressed:
            if layer.is_initialized and not layer.fresh and layer.shape[0] != batch:
                raise CacheError(
                    f"the cache holds a batch of {layer.shape[0]} and this call has {batch}; make a new cache for it, "
                    "or change this one with batch_repeat_interleave(n) or batch_select_indices(rows)."
                )

    def _check_whole(self) -> None:
        """Raise :class:`CacheError` if the last call began and did not end."""
        if self.call.open:
            raise CacheError(
                "the last call on this cache failed half way, so its layers differ; call reset() and start again."
            )

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Permute the rows in place, codes and all: ``beam_idx`` ``[B]`` says which row each row becomes.

        Raises :class:`CacheError` if it has more or fewer indices than there are rows. An empty cache has none.
        """
        if self.compressed[0].fresh:
            return
        for layer in self.compressed:  # first, since they check the number of rows
            layer.reorder_cache(beam_idx)
        if self.angles is not None:
            self.angles.reorder(beam_idx)
        for fixed in self._fixed:
            # In place: transformers' own way makes new tensors, which are no static addresses.
            for buffer in (fixed.keys, fixed.values) if fixed.is_initialized else ():
                buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))
        for other in self.layers:
            if not isinstance(other, CompressedLayer) and type(other) not in FIXED:
                other.reorder_cache(beam_idx)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, row by row: a prompt read once then serves several continuations.

        The buffers are new ones, so ``nbytes`` grows with the batch; nothing is dequantised. Raises
        :class:`CacheError` if ``repeats`` is not a positive number, or for a layer whose rows cannot be changed.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise CacheError(f"batch_repeat_interleave({repeats!r}): expected a positive number of repeats.")
        self._change_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order and as often as they are named, or where a bool mask is true.

        The buffers are new ones; nothing is dequantised. Raises :class:`CacheError` if no row is left, if a row does
        not exist, or for a layer whose rows cannot be changed.
        """
        rows = torch.as_tensor(indices).detach().cpu()
        held = [layer.shape[0] for layer in self.compressed if not layer.fresh]
        if rows.ndim == 1 and rows.dtype == torch.bool and held and rows.shape[0] == held[0]:
            rows = rows.nonzero().flatten()
        good = rows.ndim == 1 and rows.numel() > 0 and not rows.is_floating_point() and rows.dtype != torch.bool
        if not good or (held and not bool(((rows >= -held[0]) & (rows < held[0])).all())):
            raise CacheError(
                f"batch_select_indices({indices!r}): expected at least one row number of a batch of "
                f"{held[0] if held else '?'}, or a bool mask over it."
            )
        self._change_rows(lambda buffer: buffer[rows.to(buffer.device)])

    def _change_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Give every layer the rows that ``take`` makes of a buffer; all layers, or none with a :class:`CacheError`.

        Nothing happens to an empty cache, whose batch the next call decides.
        """
        if self.compressed[0].fresh:
            return
        self._check_whole()
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, CompressedLayer | cache_utils.DummyLayer) and type(layer) not in FIXED:
                raise CacheError(
                    f"layer {index} keeps transformers' {type(layer).__name__}, whose batch cannot be changed; make a "
                    "new cache for the other batch."
                )
        for ours in self.compressed:
            ours.change_rows(take)
        if self.angles is not None:
            self.angles.change_rows(take)
        for fixed in self._fixed:
            change_rows(fixed, take)

    @property
    def removable(self) -> int:
        """The most tokens that :meth:`crop` can remove now; it can remove any number up to this, and all of them.

        With 16 bits that is every token. Packed groups are lossy and cannot be taken apart, so otherwise it is what no
        group has been packed over: all up to ``residual + group_size`` tokens, and between 1 and ``group_size`` beyond.
        After :meth:`activate_past_recording` it is also what was appended since, up to 256 tokens or more.
        """
        length = self._seen()
        self._drop_old_logs(length)
        if self.uncroppable:
            return 0
        return min(layer.removable(length) for layer in self.compressed)

    @property
    def uncroppable(self) -> str:
        """Which layers are transformers' own and forget what leaves their window, in words; '' if there are none."""
        ours = (CompressedLayer, cache_utils.DummyLayer)
        theirs = [i for i, layer in enumerate(self.layers) if not isinstance(layer, ours)]
        return f"layers {theirs} keep transformers' {type(self.layers[theirs[0]]).__name__}" if theirs else ""

    def activate_past_recording(self) -> None:
        """From the next call on note what new tokens take over, so that they can be removed: see :attr:`removable`."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def stop_recording(self) -> None:
        """Undo :meth:`activate_past_recording`, and free what was noted."""
        for layer in self.compressed:
            layer.record_past = False
            layer.forget()

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: ``crop(-3)`` removes three, as everywhere in transformers; ``crop(0)`` none.

        What remains is what it would be if the removed tokens had never come. Removing all is :meth:`reset`.

        Raises
        ------
        CacheError
            If the number is positive, exceeds the tokens, or reaches into packed groups (see :attr:`removable`), and
            if a layer keeps a window of transformers' own. Nothing has changed then.
        """
        count = -int(tokens_to_remove)
        if count == 0:
            return
        self._check_whole()
        length = self._seen()
        if count < 0:
            raise CacheError(
                f"crop({-count}): expected a negative number, -k to remove k tokens; to keep k of the {length} tokens "
                f"write crop(k - {length})."
            )
        if count > length:
            raise CacheError(f"crop({-count}): the cache has only {length} tokens.")
        if count == length:
            self.reset()
            return
        if theirs := self.uncroppable:
            raise CacheError(
                f"crop({-count}): {theirs}, which forgets what leaves its window; start again from reset(), or from a "
                "copy.deepcopy made before."
            )
        if count > self.removable:
            raise CacheError(
                f"crop({-count}): of the {length} tokens the newest {self.removable} can be removed now; older ones "
                "lie in packed groups, which cannot be taken apart. Start again from reset() or from a copy.deepcopy "
                "made before, call activate_past_recording() before tokens that may go, or use key_bits=value_bits=16."
            )
        for layer in self.compressed:
            layer.undo(length, count)
        self.length.sub_(count)
        self.call.sent = self._recorded = length - count

    def _drop_old_logs(self, length: int) -> None:
        """Forget what the layers noted of other tokens than the ``length`` that are here."""
        if self._recorded != length or self.call.sent is None:
            for layer in self.compressed:
                layer.forget()

    def _seen(self) -> int:
        """Tokens in the cache, without waiting for a device where the host knows the number."""
        seen = self.call.sent
        return self.tokens if seen is None or self.length.device.type == "cpu" else seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """An independent copy for the same model, for continuing one prompt in several ways.

        Buffers, length and counts are the copy's own, and shared by its layers as they are here; model and config are
        the same objects.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.config)] = self.config
        with lasting():
            new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        torch._dynamo.mark_static_address(new.length)
        for layer in new.compressed:
            layer.mark()
        if new.angles is not None and new.angles.table is not None:
            torch._dynamo.mark_static_address(new.angles.table)
        for fixed in new._fixed:
            for tensor in (fixed.keys, fixed.values, fixed.cumulative_length) if fixed.is_initialized else ():
                torch._dynamo.mark_static_address(tensor)
        return new

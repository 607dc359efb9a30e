"""The cache: one store per attention layer, as a ``transformers`` Cache.

``update()`` emits ``effcompile::kv_store``, which writes, and hands back ``effcompile::kv_load``, the whole store read
densely, so any attention works on it; the back end fuses the load into the attention that follows. The first call on an
empty cache attends to the fresh keys and values, later calls to the store.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import cache_utils

from effcompile.kernels import ops
from effcompile.kernels.form import KVForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 512
"""Capacity comes in multiples of this up to ``LINEAR_UNTIL``, then in powers of two: few capacities, few recompiles."""
LINEAR_UNTIL = 8192


class CacheError(ValueError):
    """A cache that does not fit the call: another model's, another batch, another shape, dtype or device."""


class GradientError(RuntimeError):
    """Gradients were asked for through a compressed cache, which has none."""


def bucket(tokens: int) -> int:
    """The capacity used for at least ``tokens`` tokens.

    >>> bucket(1), bucket(7064), bucket(8193)
    (512, 7168, 16384)
    """
    if tokens <= LINEAR_UNTIL:
        return max(1, -(-tokens // STEP)) * STEP
    return int(1 << (tokens - 1).bit_length())


def _refuse(model: PreTrainedModel) -> None:
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


@dataclasses.dataclass
class Call:
    """What the host knows of the call in progress: one object, shared by a cache and its layers.

    Attributes
    ----------
    open
        The call was prepared, and its last layer has not stored yet. If it still is when the next call begins, the
        call failed: some stores may hold its tokens and some not.
    inside
        The call was prepared and nothing is stored yet, so the hook of a model within the called one has nothing to
        do.
    count
        Tokens that the call appends; None where that is not known.
    sent
        Tokens sent to the cache in all; None after an ``update`` that no hook prepared. On an accelerator reading the
        length would wait for the device.
    """

    open: bool = False
    inside: bool = False
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
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(
        self, form: KVForm, capacity: int, length: Tensor, call: Call, index: int, ends: tuple[int, int]
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

    def allocate(self, batch: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype) -> None:
        """Make the buffers, zeroed, at addresses that stay. Raises ``FormError`` if the head size does not divide."""
        state: list[Tensor | None] = []
        for kind, size in (("key", key_size), ("value", value_size)):
            shapes = self.form.buffers(kind, batch, heads, self.capacity, size, dtype)  # type: ignore[arg-type]
            buffers: list[Tensor | None] = [torch.zeros(s, dtype=d, device=self.length.device) for s, d in shapes]
            state += buffers + [None] * (3 - len(buffers))
        self.state = tuple(state)
        self.shape = (batch, heads, key_size, value_size)
        self.dtype, self.device = dtype, self.length.device
        self.is_initialized = True
        if not torch.compiler.is_compiling():
            for buffer in self.buffers():
                torch._dynamo.mark_static_address(buffer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate from the first keys and values, where the config did not tell their shape."""
        batch, heads, _, key_size = key_states.shape
        self.allocate(batch, heads, key_size, value_states.shape[3], key_states.dtype)

    def buffers(self) -> list[Tensor]:
        """The buffers that exist."""
        return [t for t in self.state if t is not None]

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
            self.call.inside = False
        # Equal, except under autocast: there rotated keys are in fp32 and values are not, and the store takes both.
        stored = key_states.to(self.dtype), value_states.to(self.dtype)
        torch.ops.effcompile.kv_store(*self.state, self.length, *stored, self.form_name)
        if self.fresh:
            result = key_states, value_states
        else:
            result = torch.ops.effcompile.kv_load(*self.state, self.length + count, self.form_name)
        if self.last:
            self.length.add_(count)
            if not self.call.open:
                self.call.sent = None
            self.call.open = False
        self.fresh = False
        return result

    def _mismatch(self, key: Tensor, value: Tensor) -> str:
        """What is wrong with the shape, dtype or device of new keys and values, or ''."""
        batch, heads, key_size, value_size = self.shape
        if key.shape[0] != batch:
            return (
                f"the cache holds a batch of {batch} and this call has {key.shape[0]}; make a new cache, or call "
                "reset() and keep the batch."
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
        """Tokens in the store: 0 when empty, else the 0-d tensor (transformers adds it to an arange)."""
        return 0 if self.fresh else cast(int, self.length)

    def get_max_length(self) -> int:
        """The capacity in tokens."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; buffers and addresses stay."""
        self.fresh = True
        self.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the batch, codes and all, without dequantising."""
        for buffer in self.buffers():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: packed groups cannot be un-packed without loss."""
        raise CacheError(
            "a compressed cache cannot be cropped; start again from reset(), or use key_bits=value_bits=16."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the batch of a cache with fixed buffers does not change."""
        raise CacheError("a compressed cache keeps its batch; make one with the expanded batch instead.")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the batch of a cache with fixed buffers does not change."""
        raise CacheError("a compressed cache keeps its batch; make one with the selected batch instead.")

    def grow(self, capacity: int) -> None:
        """Move to larger buffers, keeping all tokens."""
        old = self.state
        self.capacity = capacity
        if not self.is_initialized:
            return
        batch, heads, key_size, value_size = self.shape
        self.allocate(batch, heads, key_size, value_size, self.dtype)
        for before, after in zip(old, self.state):
            if before is not None and after is not None:
                after[:, :, : before.shape[2]] = before


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
    key_bits, value_bits, group_size, residual
        As in :class:`~effcompile.kernels.form.KVForm`. A decorator on the model or a sub-module beats these.
    batch_size
        Rows, if the buffers are to be allocated now; else the first call decides.

    Raises
    ------
    FormError
        Bits not offered, or a group that does not divide.
    CacheError
        A model without a transformers config, or one with no full-attention layer.

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
        key_bits: int = 4,
        value_bits: int = 4,
        group_size: int = 32,
        residual: int = 128,
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
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        torch._dynamo.mark_static_address(self.length)
        self.call = Call()
        default = KVForm(key_bits, value_bits, group_size, residual)
        _refuse(model)
        # Layers that stay transformers' own do not grow with ours, so their window must fit from the start.
        window = max(getattr(self.config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
        layers = cache_utils.StaticCache(config=self.config, max_cache_len=max(self.capacity, window)).layers
        full = [i for i, layer in enumerate(layers) if type(layer) is cache_utils.StaticLayer]
        if not full:
            raise CacheError(f"{type(model).__name__} has no full-attention layer, so there is nothing to compress.")
        forms = adapter.layer_forms(model, default, len(layers))
        for i in full:
            layers[i] = CompressedLayer(forms[i], self.capacity, self.length, self.call, i, (full[0], full[-1]))
        super().__init__(layers=layers)
        self._model = weakref.ref(model)
        adapter.attach_hooks(model)
        if batch_size is not None:
            self._allocate(batch_size, next(model.parameters()).dtype)

    @property
    def compressed(self) -> Sequence[CompressedLayer]:
        """The layers that this cache compresses."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated buffers of the compressed layers, and of the length."""
        buffers = [self.length] + [b for layer in self.compressed for b in layer.buffers()]
        return sum(b.numel() * b.element_size() for b in buffers)

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
                raise CacheError(
                    "the last call on this cache failed half way, so its layers differ; call reset() and start again."
                )
            # The very first call failed: what it wrote lies past an empty store's end.
            self.reset()
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
        self.call.open = self.call.inside = True
        self.call.count, self.call.sent = count or None, seen + count

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in all; what is cached stays. Does nothing if they fit already."""
        if tokens <= self.capacity:
            return
        self.capacity = bucket(tokens)
        for layer in self.compressed:
            layer.grow(self.capacity)

    def _allocate(self, batch: int, dtype: torch.dtype) -> None:
        """Make the buffers that are missing, where the config tells the heads; else the first ``update`` does.

        Raises :class:`CacheError` if there are tokens of another batch.
        """
        heads = getattr(self.config, "num_key_value_heads", None) or getattr(self.config, "num_attention_heads", None)
        width = getattr(self.config, "hidden_size", None)
        size = getattr(self.config, "head_dim", None) or (
            width // self.config.num_attention_heads if width and heads else None
        )
        for layer in self.compressed:
            if layer.is_initialized and layer.shape[0] != batch:
                if not layer.fresh:
                    raise CacheError(
                        f"the cache holds a batch of {layer.shape[0]} and this call has {batch}; make a new cache for "
                        "it."
                    )
                layer.allocate(batch, *layer.shape[1:], layer.dtype)
            elif not layer.is_initialized and heads and size:
                layer.allocate(batch, heads, size, size, dtype)

    def reset(self) -> None:
        """Forget all tokens; buffers, addresses and compiled code stay valid."""
        super().reset()  # type: ignore[no-untyped-call]
        self.call.open = self.call.inside = False
        self.call.sent = 0

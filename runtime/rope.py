"""Keys before RoPE at run time: what a model's rotary embedding does, shown by trying it, and the cache's angles.

A cache is handed rotated keys and no angles. The attention modules get them (``position_embeddings``), so a pre-hook
there hands them on. How they are applied no config says for sure: by halves or interleaved, to how many channels, from
a table of one or two columns a pair, in which layers at all, before or after a norm. So it is tried: :func:`learn` runs
the model once on a few tokens and gives every attention its input twice, once with its own angles and once with angles
of 0, and looks at the keys that reach the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from effcompile.kernels import rope
from effcompile.runtime import discarded
from effcompile.runtime.adapter import angles_in, attention_modules
from effcompile.runtime.layer import CacheError, lasting

TOKENS = 8
"""Tokens that the model is tried on: positions 0 to 7, and the fastest pair turns by one radian a token."""

WHAT_TO_DO = "use rope='post' and no latent here (compress_kv on this layer's attention, or for the whole cache)"


class _Seen(Exception):
    """Leaves an attention module when its keys and values have been seen."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.states = key, value


class _Recorder(cache_utils.DynamicCache):
    """A cache that takes no keys: it shows them to the one who asked."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Seen(key_states, value_states)


@dataclasses.dataclass(frozen=True)
class Learned:
    """How one layer rotates its keys.

    Attributes
    ----------
    rope
        Which channels are pairs, as in :data:`~effcompile.kernels.form.ROPE`; ``"post"`` where nothing is rotated.
    rotary
        ``r``, how many of the first channels are rotated.
    width
        Columns of the model's cos and sin, ``r`` or ``r/2``.
    step
        Columns from one pair to the next: 1 if the first ``r/2`` are the pairs'.
    source
        Equal for layers that were given the same cos and sin, the same tensors.
    """

    rope: str
    rotary: int = 0
    width: int = 0
    step: int = 1
    source: int = 0


_learned: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.WeakSet[nn.Module], dict[int, Learned]]]
_learned = weakref.WeakKeyDictionary()
"""For each model what was learned of all its layers, and the attention modules of which that is true."""


def learn(model: nn.Module, layers: list[int]) -> dict[int, Learned]:
    """How ``layers`` of ``model`` rotate their keys; tried once as long as its attentions stay the same modules.

    Raises
    ------
    CacheError
        For a layer whose rotation could not be shown; the error names it and says why.
    """
    modules, found = _learned.get(model, (weakref.WeakSet(), {}))
    same = all(module in modules for _, _, module in attention_modules(model, layers))
    if same and found.keys() >= set(layers):
        return {index: found[index] for index in layers}
    answers = _try(model, layers)
    for index, answer in answers.items():
        if isinstance(answer, str):
            raise CacheError(
                f"layer {index}: rope='pre' and latent need to know how its keys are rotated, and {answer}; "
                f"{WHAT_TO_DO}."
            )
    found = {index: answer for index, answer in answers.items() if isinstance(answer, Learned)}
    _learned[model] = weakref.WeakSet(module for _, _, module in attention_modules(model, layers)), found
    return dict(found)


def _try(model: nn.Module, layers: list[int]) -> dict[int, Learned | str]:
    """How every attention of ``layers`` rotates, or why that is not known."""
    sources: list[Any] = []

    def look(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Learned | str:
        if given is None:
            return f"{path} is not given position_embeddings=(cos, sin)"
        return _look(module, path, args, kwargs, given, sources)

    found: dict[int, Learned | str] = try_attentions(model, layers, look)
    return found


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def try_attentions(model: nn.Module, layers: list[int], asked: Callable[..., Any]) -> dict[int, Any]:
    """Run the model on a few tokens, and ask about every attention of ``layers`` as it is called.

    ``asked`` gets the module, its path, its arguments, and what of these are the angles; a string that it returns says
    why nothing is known.
    """
    discarded.refuse(model, "a cache with rope='pre' or latent tries the model, which")
    modules = list(attention_modules(model, layers))
    answers: dict[int, Any] = {
        i: f"no module with layer_idx {i} was called with position_embeddings=(cos, sin)" for i in layers
    }
    handles = []
    for index, path, module in modules:

        def look(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index, path: str = path
        ) -> None:
            answers[index] = asked(module, path, args, kwargs, angles_in(args, kwargs))

        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    device = next(model.parameters()).device
    try:
        with lasting(), torch.no_grad():
            ids = torch.arange(TOKENS, device=device)[None] + 1
            # Not a call of the module: the hooks of a compressed cache stand there, and it is none.
            decoder.forward(input_ids=ids, use_cache=True, past_key_values=cache_utils.DynamicCache(config=config))
    except Exception as error:  # any model may fail in any way here; then nothing is known of the layers behind
        unseen = f"{type(decoder).__name__} could not be tried on {TOKENS} tokens ({type(error).__name__}: {error})"
        seen = {i for i in layers if not str(answers[i]).startswith("no module")}
        answers |= {i: unseen for i in layers if i not in seen}
    finally:
        for handle in handles:
            handle.remove()
    return answers


def states_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], swaps: Sequence[tuple[Any, Any]]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Keys and values that an attention gives to its cache for these arguments with some swapped; or None, None."""

    def swap(value: Any) -> Any:
        if isinstance(value, cache_utils.Cache):
            return _Recorder()
        return next((new for old, new in swaps if value is old), value)

    with contextlib.suppress(TypeError, AttributeError):
        try:
            module.forward(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})
        except _Seen as seen:
            return seen.states
    return None, None


def _look(
    module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any, sources: list[Any]
) -> Learned | str:
    """How one attention rotates, from its arguments in a call; or why that is not known."""
    if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)):
        return f"the position_embeddings of {path} are not (cos, sin)"
    cos, sin = given
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[:2] != (1, TOKENS) or cos.is_complex():
        return f"{path} is given cos and sin of shapes {tuple(cos.shape)} and {tuple(sin.shape)}, not [1, T, r]"
    turned, _ = states_of(module, args, kwargs, ())
    plain, _ = states_of(module, args, kwargs, [(given, (torch.ones_like(cos), torch.zeros_like(sin)))])
    if turned is None or plain is None or turned.ndim != 4 or turned.shape != plain.shape or turned.shape[2] != TOKENS:
        return f"{path} did not give its keys to the cache in a trial call"
    if not bool(plain.any()) or not bool(sin.any()):
        return f"the keys or angles that {path} gives are all zero"
    if torch.equal(turned, plain):
        return Learned("post")
    place = next((i for i, held in enumerate(sources) if held[0] is cos and held[1] is sin), None)
    if place is None:
        place = len(sources)
        sources.append((cos, sin))
    # Products and a sum of numbers up to the largest key, each rounded; another rotation is off by that key itself.
    bound = 8 * torch.finfo(turned.dtype).eps * float(plain.abs().max()) * max(1.0, float(cos.abs().max()))
    width, size = cos.shape[2], plain.shape[3]
    for rotary, step, kind in itertools.product((width, 2 * width), (1, 2), ("pre", "pre_adjacent")):
        if rotary > size or rotary % 2 or (step == 2 and rotary != width):
            continue
        c, s = (x[:, None, :, ::step][..., : rotary // 2].float() for x in (cos, sin))
        if float((rope.rotate(plain.float(), c, s, kind) - turned.float()).abs().max()) <= bound:
            if float((c * c + s * s).min()) < 0.01:
                return f"the cos and sin that {path} is given cannot be rotated back (both nearly 0)"
            return Learned(kind, rotary, width, step, place)
    return f"what {path} does with cos and sin is no rotation of its keys' first channels, by halves or interleaved"


class Angles:
    """The table of angles of one cache, shared by its layers of keys before RoPE.

    Attributes
    ----------
    rotary, width, step
        As in :class:`Learned`.
    table
        ``[B, C/16, 2, r/2, 16]`` (:mod:`effcompile.kernels.rope`), or None before it is known how many rows. In fp16;
        in fp32 for keys that are made of latents, which were never turned back by the same rounded numbers.
    first
        The layer that writes it.
    """

    def __init__(self, learned: Learned, capacity: int, first: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rotary, self.width, self.step = learned.rotary, learned.width, learned.step
        self.capacity, self.first, self.device, self.dtype = capacity, first, device, dtype
        self.table: Tensor | None = None

    @classmethod
    def of(
        cls, learned: dict[int, Learned], capacity: int, device: torch.device, dtype: torch.dtype = torch.float16
    ) -> Angles | None:
        """The table for the layers that rotate, or None if none does. Raises :class:`CacheError` if they differ."""
        turning = {index: how for index, how in learned.items() if how.rope != "post"}
        if not turning:
            return None
        first = min(turning)
        for index, how in turning.items():
            if dataclasses.replace(how, rope="") != dataclasses.replace(turning[first], rope=""):
                raise CacheError(
                    f"layers {first} and {index} rotate their keys by other angles, and a cache keeps one table of "
                    f"angles for all layers that need one; {WHAT_TO_DO}."
                )
        return cls(turning[first], capacity, first, device, dtype)

    def allocate(self, batch: int) -> None:
        """Make the table for ``batch`` rows, unless it is there; zeroed, at an address that stays."""
        if self.table is not None and self.table.shape[0] == batch:
            return
        with lasting():
            shape = rope.table_shape(batch, self.capacity, self.rotary)
            self.put(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def put(self, table: Tensor) -> None:
        """Have another table from now on."""
        self.table = table
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(table)

    def grow(self, capacity: int) -> None:
        """Move to a larger table, keeping all tokens."""
        old, self.capacity, self.table = self.table, capacity, None
        if old is not None:
            self.allocate(old.shape[0])
            self.table[:, : old.shape[1]] = old  # type: ignore[index]

    def reorder(self, rows: Tensor) -> None:
        """Permute the rows in place."""
        if self.table is not None:
            self.table.copy_(self.table.index_select(0, rows.to(self.table.device)))

    def change_rows(self, take: Any) -> None:
        """Move to the rows that ``take`` makes of the table."""
        if self.table is not None:
            with lasting():
                self.put(take(self.table))

    def write(self, index: int, length: Tensor, given: Any, batch: int, count: int) -> Tensor:
        """The table for the ``update`` of layer ``index``; the first layer puts the angles of ``count`` tokens in.

        Raises :class:`CacheError`, having written nothing, if no angles were handed on for this call, or others.
        """
        if given is None:
            raise CacheError(
                f"layer {index}: no cos and sin have reached the cache in this call, and it needs them. Call "
                f"the model that the cache was made for (not after ec.remove), or {WHAT_TO_DO}."
            )
        cos, sin = given
        if cos.shape[0] not in (1, batch) or cos.shape[1:] != (count, self.width) or cos.shape != sin.shape:
            raise CacheError(
                f"layer {index}: cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)} for {count} tokens "
                f"of a batch of {batch}, not [1 or {batch}, {count}, {self.width}]; {WHAT_TO_DO}."
            )
        self.allocate(batch)
        table = self.table
        assert table is not None
        if index == self.first:
            one = [x[:, :, :: self.step][..., : self.rotary // 2] for x in (cos, sin)]
            torch.ops.effcompile.rope_store(table, length, *one)
        return table

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return 0 if self.table is None else self.table.numel() * self.table.element_size()

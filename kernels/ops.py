"""The ``effcompile::`` operators: schemas, fake kernels, reference bodies, and the table of launchers.

An operator *means* its reference body. :mod:`effcompile.lowering` registers launchers, which run a generated kernel for
the same arguments or decline; a declined call runs the reference body. State is explicit: every buffer is an argument.

``state`` below stands for six tensors: ``k0, k1, k2, v0, v1, v2``, a dense side using only the first of its three
(:mod:`effcompile.kernels.form`). ``length`` is an int64 0-d tensor on the same device. ``table`` holds the angles of
all tokens (:mod:`effcompile.kernels.rope`); forms of keys before RoPE need it, others take none. ``rope_store`` writes
the angles of new tokens, once for all layers, before their ``kv_store``. Forms of latents need ``up``, and ``eps`` if
keys are normed, to make keys of what the buffers hold (:mod:`effcompile.kernels.latent`), and ``value_up`` to make
values; the key, or value, that ``kv_store`` takes there is the latents ``[B, 1, T, r]`` themselves, and latents of keys
need no table.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effcompile.kernels import attention, latent, quantize, rope
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate

log = logging.getLogger(__name__)

library = torch.library.Library("effcompile", "DEF")

_STATE = ", ".join(f"Tensor{{}} {s}{i}" if i == 0 else f"Tensor{{}}? {s}{i}" for s in "kv" for i in range(3))
_MUTATED = _STATE.format(*(f"({c}!)" for c in "abcdef"))
READ = _STATE.format(*[""] * 6)

library.define(f"kv_store({_MUTATED}, Tensor length, Tensor key, Tensor value, str form, *, Tensor? table=None) -> ()")
library.define(
    f"kv_load({READ}, Tensor length, str form, *, Tensor? table=None, Tensor? up=None, float? eps=None, "
    "Tensor? value_up=None) -> (Tensor, Tensor)"
)
library.define(
    f"attend(Tensor query, {READ}, Tensor length, Tensor? key_mask, str form, float scale, bool causal, int window, "
    "*, Tensor? table=None, float? softcap=None, Tensor? bias=None, Tensor? sinks=None, "
    "Tensor? segments=None, Tensor? prefix=None, Tensor? up=None, float? eps=None, Tensor? value_up=None) "
    "-> (Tensor, Tensor)"
)
library.define("rope_store(Tensor(a!) table, Tensor length, Tensor cos, Tensor sin) -> ()")
library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")

LINEAR_ROWS = 8
"""Rows up to which ``effcompile::linear`` is used: there reading the weights is all that counts."""

SCORES = 1 << 26
"""Scores that the reference body of ``attend`` makes at a time, at least one row of them: 256 MiB."""

Launcher = Callable[..., Any]


class ReplayState(ctypes.Structure):
    """What :mod:`effcompile.lowering.cpp_replay` has to know at each call: ``State`` in kernels/cpp/replay.h."""

    _fields_ = (("held", ctypes.c_int64), ("launchers", ctypes.c_int64))


replay_state = ReplayState()
"""``held`` above 0: no call goes past its Python body. ``launchers`` is another number after each change of them."""


class _Launchers(dict[tuple[str, str], Launcher]):
    """Launchers by operator and device type: a call that one of them has decided is not another's."""

    def __setitem__(self, key: tuple[str, str], launcher: Launcher) -> None:
        super().__setitem__(key, launcher)
        replay_state.launchers += 1

    def __delitem__(self, key: tuple[str, str]) -> None:
        super().__delitem__(key)
        replay_state.launchers += 1


_launchers = _Launchers()
_reference_only = False


class KernelUnavailable(Exception):
    """Raised by a launcher that has no kernel for these arguments; the text says why."""


class CapacityError(IndexError):
    """More tokens than the cache has room for. Nothing has been written."""


def register_launcher(op: str, device_type: str, launcher: Launcher) -> None:
    """Let ``launcher`` serve operator ``op`` (such as ``"attend"``) on ``device_type``.

    The launcher gets the operator's arguments and returns its results, or raises :class:`KernelUnavailable`.
    """
    _launchers[op, device_type] = launcher


def is_launcher(op: str, device_type: str, launcher: Launcher) -> bool:
    """Whether it is ``launcher`` that serves operator ``op`` on ``device_type``."""
    return _launchers.get((op, device_type)) is launcher


def has_launcher(op: str, device_type: str) -> bool:
    """Whether operator ``op`` has a launcher on ``device_type``: without one its reference body runs there."""
    return (op, device_type) in _launchers


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Within this context every operator runs its reference body: the oracle for tests and for ``verify``."""
    global _reference_only
    before, _reference_only = _reference_only, True
    replay_state.held += 1
    try:
        yield
    finally:
        replay_state.held -= 1
        _reference_only = before


_warned: set[str] = set()


def launch(op: str, device_type: str, *args: Any, **extra: Any) -> Any:
    """Run the launcher of ``op``, or raise :class:`KernelUnavailable`; a reason is warned about once."""
    launcher = None if _reference_only else _launchers.get((op, device_type))
    if launcher is None:
        raise KernelUnavailable(f"no kernels are registered for {device_type!r}")
    try:
        return launcher(*args, **{name: given for name, given in extra.items() if given is not None})
    except KernelUnavailable as why:
        _warn(op, why)
        raise


def _warn(op: str, why: KernelUnavailable) -> None:
    if str(why) not in _warned:
        _warned.add(str(why))
        warnings.warn(f"effcompile::{op} runs its PyTorch reference body (slow, same result): {why}", stacklevel=4)


def _check_device(op: str, name: str, device_type: str) -> None:
    """Raise :class:`KernelUnavailable` where no launcher knows of latents of values."""
    if device_type != "cpu" and KVForm.parse(name).value_latent:
        why = KernelUnavailable(f"no kernel for {device_type!r} reads or writes latents of values ({name})")
        if not _reference_only:
            _warn(op, why)
        raise why


def split_state(state: tuple[Tensor | None, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The six state arguments as two lists without the absent ones: keys, values."""
    keys, values = state[:3], state[3:]
    return [t for t in keys if t is not None], [t for t in values if t is not None]


def capacity_of(keys: list[Tensor], form: KVForm) -> int:
    """Tokens that fit, from the key side's first buffer."""
    return keys[0].shape[2] * form.span("key")


def _check_table(
    name: str, table: Tensor | None, up: Tensor | None = None, value_up: Tensor | None = None, loads: bool = True
) -> KVForm:
    """The form ``name``. Raises ``ValueError`` if it needs a table and there is none, or the other way round.

    The same for what makes keys and values of latents, which is for what ``loads`` only.
    """
    form = KVForm.parse(name)
    turns = form.pre and (loads or not form.latent)
    if turns != (table is not None):
        raise ValueError(f"the form {name} {'needs a' if turns else 'takes no'} table of angles.")
    given = {"key": up, "value": value_up}
    for kind, rank in (("key", latent.rank_of(up)), ("value", latent.value_rank_of(value_up))):
        wanted, found = form.rank(kind) if loads else 0, given[kind]  # type: ignore[arg-type]
        if rank != wanted or (found is not None) != (wanted > 0):
            got = "none" if found is None else f"one of {tuple(found.shape)}"
            what = "latents" if kind == "key" else "latents of values"
            raise ValueError(f"the form {name} needs {'an' if wanted else 'no'} up-projection of {what}, not {got}.")
    return form


def _read(
    state: tuple[Any, ...],
    n: int,
    form: KVForm,
    table: Tensor | None,
    up: Tensor | None,
    eps: float | None,
    value_up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The first ``n`` keys and values, dequantised and rebuilt: ``[B, G, n, D]`` and ``[B, G, n, E]``."""
    keys, values = split_state(state)
    value = quantize.load_side(values, n, form, "value")
    value = value if value_up is None else latent.rebuild_values(value, value_up)
    if up is None:
        return quantize.load_side(keys, n, form, "key", table), value
    latents = quantize.load_side(keys, n, form.buffered, "key")
    return latent.rebuild(latents, up, eps, table, form.rope).to(keys[-1].dtype), value


def _kv_store(*args: Any, table: Tensor | None = None) -> None:
    *state, length, key, value, name = args
    try:
        _check_device("kv_store", name, key.device.type)
        launch("kv_store", key.device.type, *args, table=table)
        return
    except KernelUnavailable:
        form = _check_table(name, table, loads=False).buffered
        keys, values = split_state(tuple(state))
        n = int(length)
        if n + key.shape[2] > capacity_of(keys, form):
            raise CapacityError(
                f"{n} tokens are cached and {key.shape[2]} more were given, but the capacity is "
                f"{capacity_of(keys, form)}; make the cache with a larger capacity."
            ) from None
        quantize.store_side(keys, n, key, form, "key", table)
        quantize.store_side(values, n, value, form, "value")


def _kv_load(
    *args: Any,
    table: Tensor | None = None,
    up: Tensor | None = None,
    eps: float | None = None,
    value_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    *state, length, name = args
    # Products that PyTorch has kernels for, and nothing is read back to the host.
    if up is not None or value_up is not None:
        form = _check_table(name, table, up, value_up)
        return latent.load(*split_state(tuple(state)), length, form, up, eps, value_up, table)
    try:
        result: tuple[Tensor, Tensor] = launch("kv_load", state[0].device.type, *args, table=table)
        return result
    except KernelUnavailable:
        form = _check_table(name, table)
        sides = split_state(tuple(state))
        n, outs = int(length), _empty_dense(state, form)
        for out, side, kind in zip(outs, sides, ("key", "value")):
            out[:, :, :n] = quantize.load_side(side, n, form, kind, table)  # type: ignore[arg-type]
            out[:, :, n:] = 0
        return outs


def _attend(
    query: Tensor,
    *args: Any,
    table: Tensor | None = None,
    up: Tensor | None = None,
    eps: float | None = None,
    value_up: Tensor | None = None,
    **parts: Any,
) -> tuple[Tensor, Tensor]:
    *state, length, key_mask, name, scale, causal, window = args
    more = {"table": table, "up": up, "eps": eps, "value_up": value_up}
    try:
        _check_device("attend", name, query.device.type)
        result: tuple[Tensor, Tensor] = launch("attend", query.device.type, query, *args, **more, **parts)
        return result
    except KernelUnavailable:
        form, n = _check_table(name, table, up, value_up), int(length)
        segments, prefix = parts.pop("segments", None), parts.pop("prefix", None)
        rules = key_mask is not None, segments is not None, prefix is not None
        predicate = Predicate(causal, window if window >= 0 else None, *rules)
        key, value = _read(tuple(state), n, form, table, up, eps, value_up)
        # Some queries at a time, as all scores of a long prompt would not fit in memory; rows do not depend on others.
        rows, bias = max(1, SCORES // max(1, query.shape[0] * query.shape[1] * n)), parts.get("bias")
        # For causal queries the last of them is the end of the store; a prefix may lie behind it.
        total, cut = query.shape[2], causal and prefix is None
        outs = []
        for start in range(0, max(1, total), rows):
            some = query[:, :, start : start + rows]
            end = n - total + start + some.shape[2] if cut else n
            count = some.shape[2] if cut else total
            keep = attention.allowed(predicate, count, end, key_mask, query.device, segments, prefix)
            if not cut:
                keep = keep[:, :, start : start + rows]
            if bias is not None and bias.shape[2] != 1:
                parts["bias"] = bias[:, :, start : start + rows]
            outs.append(attention.attend(some, key[:, :, :end], value[:, :, :end], keep, scale, **parts))
        return torch.cat([out for out, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)


def _rope_store(table: Tensor, length: Tensor, cos: Tensor, sin: Tensor) -> None:
    # A few small operations of PyTorch for all layers together, on every device: no kernel of ours would gain.
    capacity = table.shape[1] * rope.RUN
    if table.device.type == "cpu" and int(length) + cos.shape[1] > capacity:
        raise CapacityError(
            f"{int(length)} tokens are cached and {cos.shape[1]} more were given, but the capacity is {capacity}; make "
            "the cache with a larger capacity."
        )
    rope.write(table, length, cos, sin)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        result: Tensor = launch("linear", x.device.type, x, weight, bias)
        return result
    except KernelUnavailable:
        return torch.nn.functional.linear(x, weight, bias).contiguous()


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _empty_dense(
    state: Any, form: KVForm, up: Tensor | None = None, value_up: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Uninitialised dense keys and values ``[B, G, C, D]`` in the model's dtype."""
    k0, _, k_tail, v0, _, v_tail = state
    key_like = k0 if form.key_bits == 16 else k_tail
    value_like = v0 if form.value_bits == 16 else v_tail
    capacity = k0.shape[2] * form.span("key")
    batch = k0.shape[0]
    key_heads, key_size = (k0.shape[1], key_like.shape[3]) if up is None else up.shape[:2]
    heads, value_size = (v0.shape[1], value_like.shape[3]) if value_up is None else value_up.shape[::2]
    return (
        key_like.new_empty(batch, key_heads, capacity, key_size),
        value_like.new_empty(batch, heads, capacity, value_size),
    )


def _fake_kv_load(
    *args: Any, up: Tensor | None = None, value_up: Tensor | None = None, **others: Any
) -> tuple[Tensor, Tensor]:
    *state, _length, name = args
    return _empty_dense(state, KVForm.parse(name), up, value_up)


def _fake_attend(query: Tensor, *args: Any, value_up: Tensor | None = None, **extra: Any) -> tuple[Tensor, Tensor]:
    *state, _length, _mask, name, _scale, _causal, _window = args
    value = state[3] if KVForm.parse(name).value_bits == 16 else state[5]
    batch, heads, rows = query.shape[:3]
    return (
        query.new_empty(batch, heads, rows, value.shape[3] if value_up is None else value_up.shape[2]),
        query.new_empty(batch, heads, rows, dtype=torch.float32),
    )


for _name, _body, _fake in (
    ("kv_store", _kv_store, lambda *args, table=None: None),
    ("rope_store", _rope_store, lambda *args: None),
    ("kv_load", _kv_load, _fake_kv_load),
    ("attend", _attend, _fake_attend),
    ("linear", _linear, _fake_linear),
):
    library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effcompile::{_name}", _fake, lib=library)

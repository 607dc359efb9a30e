"""Parameters whose memory was given back: what they are now, and what refuses to use them.

A discarded parameter keeps its object, shape, strides, dtype and device, since guards of compiled code look at these.
Its memory is a range of addresses on which a few megabytes of NaN are mapped over and over, private and writable: who
reads it gets NaN and never a wrong number, and who writes to it, as ``load_state_dict`` does, gets memory again.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from effcompile.runtime.plan import version_of

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What bytes of ones make NaN of."""

_BLOCK = 4 << 20
"""Bytes of NaN that there really are. The kernel has a limit of 65,530 mappings, so they are not fewer."""

SMALLEST = mmap.PAGESIZE
"""Bytes of a parameter below which no memory can be given back."""

_RELOAD = "load the model again"


class DiscardError(RuntimeError):
    """What was asked for needs parameters that were discarded, or memory cannot be given back here."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A parameter as it was discarded, and what was made of it before, which must not be lost."""

    name: str
    version: int
    dtype: torch.dtype
    address: int
    before: int
    bytes: int
    prepared: tuple[Tensor, ...]


_entries: Any = WeakTensorKeyDictionary()
_owners: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Modules with the names under which they held discarded parameters."""


def _entry(tensor: Tensor) -> _Entry | None:
    """What is known of a parameter that is discarded; None if it never was, or if all of it was written again."""
    entry: _Entry | None = _entries.get(tensor)
    if entry is None:
        return None
    # Values are looked at only where something happened: reading all of them would map every page.
    first = tensor.detach()[(0,) * tensor.ndim]
    unchanged = tensor.data_ptr() == entry.address and version_of(tensor) == entry.version
    if (unchanged and bool(first.isnan())) or _has_nan(tensor):
        return entry
    _entries.pop(tensor)
    return None


def _has_nan(tensor: Tensor) -> bool:
    # Without a tensor of booleans as large: the least value is NaN if one is.
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(tensor.detach().amin().isnan())


def name_of(tensor: Tensor) -> str | None:
    """The name of a discarded parameter in the model that it was discarded of; None for any other tensor."""
    entry = _entry(tensor)
    return None if entry is None else entry.name


def address_of(tensor: Tensor) -> int:
    """``data_ptr()``, of a discarded parameter the one that it had: the same for as long as its values are meant."""
    entry: _Entry | None = _entries.get(tensor)
    return entry.before if entry is not None and entry.address == tensor.data_ptr() else tensor.data_ptr()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """How many bytes of these tensors were given back."""
    found = {id(t): entry.bytes for t in tensors if (entry := _entry(t)) is not None}
    return sum(found.values())


def refuse(module: nn.Module, what: str) -> None:
    """Raise :class:`DiscardError` if a parameter of ``module`` is discarded; ``what`` begins the sentence."""
    names = [name for name, t in module.named_parameters() if t in _entries and _entry(t) is not None]
    if names:
        raise DiscardError(f"{what} reads {_list(names)}, which ec.discard_parameters dropped; {_RELOAD}.")


def refuse_reads(tensors: Iterable[Tensor], what: str) -> None:
    """As :func:`refuse`, for tensors."""
    if names := list(dict.fromkeys(name for t in tensors if (name := name_of(t)) is not None)):
        raise DiscardError(f"{what} reads {_list(names)}, which ec.discard_parameters dropped; {_RELOAD}.")


def refuse_moved(tensors: Iterable[Tensor], what: str) -> None:
    """Raise :class:`DiscardError` if a discarded parameter was cast, moved or in part written to since."""
    for tensor in tensors:
        entry = _entry(tensor)
        if entry is not None and (entry.address, entry.version) != (tensor.data_ptr(), version_of(tensor)):
            raise DiscardError(
                f"{what} is about {entry.name}, which ec.discard_parameters dropped as {entry.dtype} and which was "
                f"cast, moved or in part written to since; {_RELOAD}."
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def guard(module: nn.Module, own: Iterable[str] = ()) -> None:
    """``state_dict`` of ``module`` raises while a parameter in it is discarded; ``own`` are those that it holds."""
    if module not in _owners:
        _owners[module] = set()
        module.register_state_dict_pre_hook(_before_state_dict)
    _owners[module].update(own)


def discard(owners: Iterable[tuple[nn.Module, str]], name: str, parameter: Tensor, prepared: Iterable[Tensor]) -> int:
    """Give the memory of a parameter back, as far as nothing else has a view of it; returns its bytes.

    Parameters
    ----------
    owners
        The modules that hold it, each with its own name for it: their ``state_dict`` raises from now on.
    name
        What errors call it.
    prepared
        What was made of it: kept for as long as the parameter lives, since it cannot be made again.
    """
    size = parameter.numel() * parameter.element_size()
    old = parameter.data
    begin = old.data_ptr()
    parameter.data = nan_like(parameter)
    now = parameter.data_ptr()
    entry = _Entry(name, version_of(parameter), parameter.dtype, now, begin, size, tuple(prepared))
    _entries[parameter] = entry
    # On the object, as copying and pickling look there first; a copy would be one of NaN.
    weak = weakref.ref(parameter)
    for method in ("__deepcopy__", "__reduce_ex__"):
        setattr(parameter, method, functools.partial(_copied, weak, method))
    for module, own in owners:
        guard(module, [own])
    if not old.untyped_storage().resizable():
        _page_out(begin, size)
    return size


def _copied(weak: weakref.ref[Tensor], method: str, argument: Any) -> Any:
    """``parameter.__deepcopy__(memo)`` and ``parameter.__reduce_ex__(protocol)``."""
    parameter = weak()
    assert parameter is not None  # it is being copied
    name = name_of(parameter)
    if name is not None:
        raise DiscardError(
            f"{name} was dropped by ec.discard_parameters, so it cannot be copied or saved; {_RELOAD}, and copy or "
            "save that."
        )
    for own in ("__deepcopy__", "__reduce_ex__"):
        vars(parameter).pop(own, None)
    return getattr(parameter, method)(argument)


def _before_state_dict(module: nn.Module, prefix: str, _: bool) -> None:
    """Refuse to hand out NaN; a parameter that was loaded again is handed out."""
    gone = [name for name, t in module.named_parameters(prefix.rstrip(".")) if t in _entries and _entry(t) is not None]
    for name in sorted(_owners.get(module, ())):
        tensor = module._parameters.get(name)
        # Another object in its place may be a copy of it, as `Module.to` makes of some.
        if tensor is not None and tensor not in _entries and _has_nan(tensor):
            gone.append(prefix + name)
    if gone:
        raise DiscardError(
            f"{_list(gone)}: dropped by ec.discard_parameters, so that this model has no whole state_dict and cannot "
            f"be saved; {_RELOAD}, or load_state_dict into this one."
        )


def nan_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype whose values are NaN, and which takes no memory until it is read.

    Raises :class:`DiscardError` where memory cannot be mapped so.
    """
    check_system()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    length = -(-span * tensor.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    # Python's mapping reserves the range and gives it back once the last tensor on it is gone, with what is mapped on
    # it since.
    held = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    made = torch.frombuffer(held, dtype=tensor.dtype, count=span)
    begin, file = made.data_ptr(), _nan_file()
    for place in range(begin, begin + length, _BLOCK):
        _map_fixed(place, min(_BLOCK, begin + length - place), file)
    return made.as_strided(tensor.shape, tensor.stride())


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10
_MADV_PAGEOUT = 21


def check_system() -> None:
    """Raise :class:`DiscardError` where the kernel is not Linux."""
    if not sys.platform.startswith("linux"):
        raise DiscardError(f"ec.discard_parameters needs Linux's way of mapping memory; this is {sys.platform}.")


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


@functools.cache
def _nan_file() -> int:
    """A file in memory, all bits of which are one: NaN in every dtype of :data:`FLOATS`."""
    file = os.memfd_create("effcompile_nan", os.MFD_CLOEXEC)
    block = b"\xff" * _BLOCK
    if os.write(file, block) != _BLOCK:
        raise DiscardError(f"{_BLOCK} bytes of memory could not be written.")
    return file


def _map_fixed(place: int, length: int, file: int) -> None:
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED | _NORESERVE
    if _libc().mmap(place, length, protection, flags, file, 0) != place:
        number = ctypes.get_errno()
        hint = "; raise vm.max_map_count" if number == errno.ENOMEM else ""
        raise DiscardError(f"{length} bytes could not be mapped: {os.strerror(number)}{hint}.")


def _page_out(begin: int, length: int) -> None:
    """Ask the kernel to forget pages of a checkpoint that is mapped: its other tensors keep the mapping alive.

    It reads them again if somebody needs them, so nothing is lost where a view of them is left.
    """
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _libc().madvise(first, last - first, _MADV_PAGEOUT)


def trim() -> None:
    """Hand what the allocator keeps for later back to the system, as far as it can do that."""
    with contextlib.suppress(AttributeError):
        _libc().malloc_trim(0)

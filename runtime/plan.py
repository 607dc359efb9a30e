"""Plans: what calibration found for each site, as a folder with a JSON of decisions and tensors in safetensors.

A plan holds one :class:`Record` for each site and pass. It belongs to the weights that it was made from: a record names
the parameters it is about and a digest of each, and is refused for others. Loading never calibrates again. The JSON
can be edited by hand: take a record out, and its site is left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT, VERSION = "effcompile-plan", 1
_JSON, _TENSORS = "plan.json", "plan.safetensors"


class PlanError(ValueError):
    """A plan that cannot be read, does not fit its own tensors, or is for other weights; says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What a plan says of one site for one pass.

    Parameters
    ----------
    module
        Path of the site's module in the model that was calibrated.
    method
        Name of the pass.
    options
        The options with which the record was made, or was fitted.
    parameters
        Name and digest of each parameter that the record is about.
    numbers
        What was measured while calibrating, such as ``error``: for people, not used when the plan is applied.
    tensors
        What the pass needs, such as a permutation.
    on
        Of a record that stands on another one of its module, and not on the module's own weights: the method of that,
        and its :attr:`identity`. Empty for others.
    """

    module: str
    method: str
    options: Mapping[str, Any]
    parameters: Mapping[str, str]
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    on: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor ``name``, which has this shape (-1 for any size). Raises :class:`PlanError` otherwise."""
        found = self.tensors.get(name)
        where = f"plan: {self.method} at {self.module}"
        if found is None:
            raise PlanError(f"{where}: no tensor {name!r}; calibrate again.")
        if found.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, found.shape)):
            raise PlanError(f"{where}: {name} has shape {tuple(found.shape)}; expected {shape}. Calibrate again.")
        if found.is_floating_point() and not found.isfinite().all():
            raise PlanError(f"{where}: {name} holds NaN or infinity; calibrate again.")
        return found

    @property
    def text(self) -> str:
        """Canonical JSON of the record, its tensors as digests: equal records give equal text in every process."""
        return json.dumps(self._told, sort_keys=True)

    @property
    def identity(self) -> str:
        """A digest of what the record does to its site, without what was measured: 32 hexadecimal digits."""
        text = json.dumps(self._told | {"numbers": {}}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def _told(self) -> dict[str, Any]:
        return _plain(self) | {"tensors": {name: digest(t) for name, t in sorted(self.tensors.items())}}


class Plan:
    """Decisions for each site of one model, made by :func:`effcompile.calibrate`.

    ``torch.compile(model, backend="effcompile", options={"plan": plan})`` applies it. ``made`` says when and from what
    it was made.
    """

    def __init__(self, records: Mapping[tuple[str, str], Record], made: Mapping[str, Any] | None = None) -> None:
        self._records = dict(records)
        self.made = dict(made or {})

    def get(self, module: str, method: str) -> Record | None:
        """The record of a pass for the site in ``module``, if there is one."""
        return self._records.get((module, method))

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        methods = ", ".join(sorted({record.method for record in self})) or "nothing"
        return f"<Plan: {methods} at {len({record.module for record in self})} sites>"

    @property
    def text(self) -> str:
        """Canonical JSON, for cache keys: equal plans give equal text in every process."""
        return json.dumps([record.text for record in self])

    def diff(self, other: Plan) -> list[str]:
        """What is different in ``other``, a sentence each; empty if nothing is."""
        lines = []
        for key in dict.fromkeys([*self._records, *other._records]):
            one, two = self._records.get(key), other._records.get(key)
            where = f"{key[1]} at {key[0]}"
            if one is None or two is None:
                lines.append(f"{where}: only in the {'second' if one is None else 'first'}")
            elif one.text != two.text:
                old, new = json.loads(one.text), json.loads(two.text)
                for part in {**old, **new}:
                    sides = [plain.get(part, {}) for plain in (old, new)]
                    if not all(isinstance(side, dict) for side in sides):
                        continue
                    for name in {**sides[0], **sides[1]}:
                        if sides[0].get(name) == sides[1].get(name):
                            continue
                        lines.append(
                            f"{where}: {part}: {name}: {_side(one, old, part, name)} -> {_side(two, new, part, name)}"
                        )
        return lines

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` to ``folder``, which is made. Each file replaces its like whole.

        Raises ``OSError`` if that cannot be done.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        places: dict[int, str] = {}
        records = []
        for r in self:
            plain, shared = _plain(r), {}
            for name, t in r.tensors.items():
                key = f"{r.module}/{r.method}/{name}"
                # What several records hold is written once.
                if (first := places.setdefault(id(t), key)) != key:
                    shared[name] = first
                else:
                    tensors[key] = t.detach().cpu().contiguous().clone()
            records.append(plain | ({"shared": shared} if shared else {}))
        content = {"format": FORMAT, "version": VERSION, "made": self.made, "records": records}
        # The tensors first: a JSON without them would be a plan that cannot be read.
        _replace(place / _TENSORS, lambda path: save_file(tensors, path))
        _replace(place / _JSON, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", "utf-8"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote. Raises :class:`PlanError` for what is no plan, and ``FileNotFoundError``."""
        place = Path(folder)
        try:
            content = json.loads((place / _JSON).read_text("utf-8"))
            tensors = load_file(place / _TENSORS)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise PlanError(f"{place}: not a plan: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise PlanError(f"{place / _JSON}: not a plan of effcompile (no 'format': {FORMAT!r}).")
        if content.get("version") != VERSION:
            raise PlanError(
                f"{place / _JSON}: version {content.get('version')!r} of the format; this release reads {VERSION}. "
                "Calibrate again."
            )
        records: dict[tuple[str, str], Record] = {}
        for entry in content.get("records", ()):
            record = _record(entry, tensors, place)
            if (record.module, record.method) in records:
                raise PlanError(f"{place / _JSON}: two records of {record.method} at {record.module}.")
            records[record.module, record.method] = record
        return cls(records, content.get("made"))


def _side(record: Record, plain: Mapping[str, Any], part: str, name: str) -> str:
    """One side of a difference: numbers as they are, tensors and weights by the beginning of their digest."""
    found = plain.get(part, {}).get(name)
    if found is None:
        return "nothing"
    return f"{found[:8]}..." if part in ("tensors", "parameters", "on") else repr(found)


def _plain(record: Record) -> dict[str, Any]:
    """A record in JSON's types, its tensors as their names."""
    return {
        "module": record.module,
        "method": record.method,
        "options": dict(record.options),
        "parameters": dict(record.parameters),
        "numbers": {name: x if math.isfinite(x) else str(x) for name, x in record.numbers.items()},
        "tensors": sorted(record.tensors),
        **({"on": dict(record.on)} if record.on else {}),
    }


def _record(entry: Any, tensors: Mapping[str, Tensor], place: Path) -> Record:
    try:
        module, method = entry["module"], entry["method"]
        numbers = {name: float(x) for name, x in entry["numbers"].items()}
        names = list(entry["tensors"])
        options, parameters = dict(entry["options"]), dict(entry["parameters"])
        shared = dict(entry.get("shared", ()))
        on = {str(name): str(text) for name, text in dict(entry.get("on", ())).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{place / _JSON}: a record that cannot be read ({error!r}): {str(entry)[:120]}.") from None
    keys = {name: shared.get(name, f"{module}/{method}/{name}") for name in names}
    missing = [name for name in names if keys[name] not in tensors]
    if missing:
        raise PlanError(f"{place / _TENSORS}: {', '.join(missing)} of {method} at {module} are not there.")
    own = {name: tensors[key] for name, key in keys.items()}
    return Record(module, method, options, parameters, numbers, own, on)


def _replace(path: Path, write: Any) -> None:
    """Write a file beside ``path`` and put it in its place, so that a reader sees the old one or the new one."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


_digests: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
"""By identity, with the version of the tensor that it is of: a big model is read once."""


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes: 32 hexadecimal digits."""
    version = version_of(tensor)
    kept = _digests.get(id(tensor))
    if kept is not None and kept[0]() is tensor and kept[1] == version:
        return kept[2]
    own = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    plain = tensor.detach().cpu().contiguous()
    own.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    found = own.hexdigest()
    key = id(tensor)
    _digests[key] = (weakref.ref(tensor, lambda _: _digests.pop(key, None)), version, found)
    return found


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to, as PyTorch counts it; 0 for tensors of ``inference_mode``, not counted."""
    return 0 if tensor.is_inference() else tensor._version

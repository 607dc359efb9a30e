"""What a pass is, and the registry from which options, decorators, command line, docs and tests derive.

A pass is a frozen dataclass whose fields are its options, with the names and defaults of the paper. Adding one is a
file in this folder and one line in :data:`REGISTRY`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from effcompile.kernels.reason import Reason

REGISTRY: dict[str, str] = {
    "anchor_attention": "effcompile.passes.anchor_attention:AnchorAttention",
    "blockrank": "effcompile.passes.blockrank:BlockRank",
    "delta": "effcompile.passes.delta:Delta",
    "flexprefill": "effcompile.passes.flexprefill:FlexPrefill",
    "graph_kv": "effcompile.passes.graph_kv:GraphKV",
    "pbs_attn": "effcompile.passes.pbs_attn:PBSAttn",
    "proxyattn": "effcompile.passes.proxyattn:ProxyAttn",
    "quest": "effcompile.passes.quest:Quest",
    "sliding_window": "effcompile.passes.sliding_window:SlidingWindow",
    "streaming": "effcompile.passes.streaming:Streaming",
    "vertical_slash": "effcompile.passes.vertical_slash:VerticalSlash",
    "xattention": "effcompile.passes.xattention:XAttention",
    "compress_kv": "effcompile.passes.compress_kv:CompressKV",
    "carve_moe": "effcompile.passes.carve_moe:CarveMoE",
    "coreinfer": "effcompile.passes.coreinfer:CoreInfer",
    "flap": "effcompile.passes.flap:Flap",
    "low_rank": "effcompile.passes.low_rank:LowRank",
    "quantize_weights": "effcompile.passes.quantize_weights:QuantizeWeights",
    "read_me": "effcompile.passes.read_me:ReadMe",
    "reroute": "effcompile.passes.reroute:Reroute",
    "teal": "effcompile.passes.teal:Teal",
    "wina": "effcompile.passes.wina:Wina",
}
"""Every pass: its name, and where its class is. A class is imported when it is first asked for."""

Target = Literal["class", "instance", "method", "function"]
"""What a decorator can be put on."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One method: its options as fields, and what it does to a site.

    On entry to :meth:`match` the graph is valid and normalised, and a pass never changes it: it answers with a value.
    The driver rewrites, verifies, times and counts. A subclass is a frozen dataclass which checks its values in
    ``__post_init__`` (raising ``ValueError``), so that an impossible choice cannot be built.
    """

    name: ClassVar[str]
    """The word for this pass everywhere: option key, decorator, file, test id."""
    paper: ClassVar[str]
    """Title, authors, venue, and the sections that were followed."""
    summary: ClassVar[str]
    """One line for tables."""
    phases: ClassVar[tuple[str, ...]]
    """Where it works: ``("prefill", "decode")`` or one of them."""
    site_kind: ClassVar[str] = "attention"
    """The kind of sites it is asked about."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other kinds, of which it takes sites where its options say so (:meth:`takes`)."""
    beside: ClassVar[str] = ""
    """Behind the reason for a site that another method has taken: what to do to have both."""
    limit: ClassVar[Mapping[str, Any]] = {}
    """The option values at which the pass is exact; the conformance test compares with eager there."""

    elsewhere: ClassVar[Mapping[Target, str]] = {
        "method": "Put it above the class, or on an instance: model = MyModel(); decorate(model).",
        "function": "Write the function as the forward of a torch.nn.Module, and decorate that.",
    }
    """What a decorator of this pass cannot stand on, and what to do instead, as a sentence."""

    def match(self, site: Any) -> Any:
        """The form this pass gives to ``site``, or the :class:`~effcompile.kernels.reason.Reason` why it does not."""
        return Reason("pass-without-match", f"{type(self).__name__} does not say which sites it takes.")

    def takes(self, kind: str) -> bool:
        """Whether these options are about sites of a kind, one of those named above."""
        return kind == self.site_kind

    def check(self, module: nn.Module) -> None:
        """Called before a decorator changes anything: raises ``ValueError`` if these options do not fit ``module``."""

    def on_decorate(self, module: nn.Module) -> None:
        """Called when a decorator puts these options on ``module``; attaches what must live outside the graph."""

    def on_remove(self, module: nn.Module) -> None:
        """Called when these options leave ``module``; undoes :meth:`on_decorate`, if there is anything to undo."""

    @classmethod
    def is_common(cls, module: str) -> bool:
        """Whether a record of a plan under the name ``module`` is for all sites, and of none itself."""
        return False

    @property
    def text(self) -> str:
        """The options as canonical JSON: equal options give equal text in every process."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in dataclasses.asdict(self).items())})"


def get(name: str) -> type[Pass]:
    """The class of the pass ``name``. Raises ``KeyError`` for a name that is not registered."""
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def fields_of(cls: type[Pass]) -> dict[str, tuple[Any, Any]]:
    """The options of a pass in order: name -> (type, default)."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}


def accepts(value: object, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type; a bool is not an int, an int is a float.

    >>> accepts(4, int), accepts(True, int), accepts(1, float), accepts(None, int | None), accepts("4", int)
    (True, False, True, True, False)
    """
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return any(accepts(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(accepts(item, typing.get_args(hint)[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A type as a user would write it: ``int``, ``int | None``, ``'key' | 'value'``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if part is type(None) else type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (Mapping, tuple):
        return "dict" if typing.get_origin(hint) is Mapping else "tuple"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)

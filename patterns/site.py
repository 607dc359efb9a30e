"""What every kind of site has: a node to name it by, and from that a module and a line."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import fx

from effcompile.patterns.walk import module_path, source_line


@dataclasses.dataclass
class Site:
    """A place in a graph where a method could act. ``anchor`` is the node that the search began at."""

    kind: ClassVar[str]
    """The word for this kind in reports."""

    anchor: fx.Node
    record: Any = dataclasses.field(default=None, init=False, compare=False)
    """What the user's plan says of this site for the pass that is being asked."""
    plan: Any = dataclasses.field(default=None, init=False, compare=False)
    """The whole plan, for a pass whose sites share a record."""
    few_bits: Any = dataclasses.field(default=None, init=False, compare=False)
    """Asks in which bits the linears of a form are kept (:func:`effcompile.passes.weight_form.asked`)."""

    @property
    def module(self) -> str:
        """Path of the module that the site was traced in."""
        return module_path(self.anchor)

    @property
    def label(self) -> str:
        """What a plan calls the site: its module, and a number if that holds several."""
        return self.module

    @property
    def source(self) -> str:
        """The user's line."""
        return source_line(self.anchor)

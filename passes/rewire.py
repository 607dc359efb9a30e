"""Routers that are adapted to a context while a text is written: one vector for each, added to its logits.

Paper: Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert models (arXiv
2510.14853). No code is published: the optimiser, the share of layers, and that confidence is a mean over tokens are
choices made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from effcompile.kernels.reason import Reason
from effcompile.passes.batches import call
from effcompile.passes.calibrate import _shared_copy
from effcompile.passes.options import PREFIX, annotations_of, read_annotation
from effcompile.passes.report import graphs_of
from effcompile.patterns.normalize import normalize
from effcompile.patterns.router import Router, RouterSite, find_routers
from effcompile.runtime import discarded
from effcompile.runtime.router_state import has_state, state_of, states


class RewireError(ValueError):
    """A model without routers that can be adapted, or a context that cannot be adapted to; the text says which."""


@dataclasses.dataclass
class Rewire:
    """Adapts the routers of a model to a context, again and again while it grows.

    The model is one that ``ec.reroute(adapt=True)`` compiles: its graphs add to the logits of each router a vector,
    zeros at first. A call with the context so far takes ``steps`` steps down the loss of its own tokens, each given
    those before it, with respect to these vectors alone; the next call goes on from there. No parameter is touched.
    The loss is computed on a copy of the model that shares its weights and runs with gradients, so memory for a
    training step on the context is needed. At the end of a ``with`` block, or with :meth:`reset`, they are zeros.

    Parameters
    ----------
    model
        The compiled model, or the module of which a part is compiled.
    steps, lr
        Steps of each call, and how far each goes; the paper's.
    optimizer
        ``"sgd"`` or ``"adam"``; without state from call to call.
    layers
        ``"all"``; ``"hard"``: in each step only the ``share`` of the layers of most confidence; ``"soft"``: gradients
        times confidence over its mean.
    share
        Of the layers, for ``"hard"``.
    prefer
        The paper's confidence is minus the mean logarithm of the chosen experts' probabilities, which *grows* as a
        router gets less certain. ``"high"`` follows its formula, ``"low"`` its word.

    Notes
    -----
    The paper adapts after the prompt and then every 128 tokens. One context at a time: the vectors are the same for all
    rows of a batch.

    Raises
    ------
    RewireError
        For options out of range.
    """

    model: nn.Module
    steps: int = 5
    lr: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    layers: Literal["all", "hard", "soft"] = "all"
    share: float = 0.5
    prefer: Literal["high", "low"] = "high"

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.lr >= 0 or not 0 < self.share <= 1:
            raise RewireError(f"steps={self.steps!r}, lr={self.lr!r}, share={self.share!r}: out of range.")
        if self.optimizer not in _OPTIMIZERS or self.layers not in ("all", "hard", "soft"):
            raise RewireError(f"optimizer={self.optimizer!r}, layers={self.layers!r}: unknown.")
        if self.prefer not in ("high", "low"):
            raise RewireError(f"prefer={self.prefer!r}; expected 'high' or 'low'.")
        self.model = getattr(self.model, "_orig_mod", self.model)
        self._copy: nn.Module | None = None
        self._copied: list[Tensor] = []
        self._watch = _Watch()

    def __enter__(self) -> Rewire:
        self.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def reset(self) -> None:
        """All vectors are zeros again."""
        with torch.no_grad():
            for vector in states("vector", self.model).values():
                vector.zero_()

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Router -> fp32 ``[experts]``: what is added to its logits."""
        return {name: vector.detach() for name, vector in states("vector", self.model).items()}

    def __call__(self, context: Any) -> list[float]:
        """Adapt to ``context``: ``input_ids`` ``[1, T]``, or a dictionary of the model's arguments with them.

        Returns
        -------
        list
            The loss before each step.

        Raises
        ------
        RewireError
            For a batch of several contexts, one of fewer than two tokens, a loss that is no number, a model without
            routers that can be adapted or that was not called yet, or one whose routers give fewer experts besides.
        """
        discarded.refuse(self.model, "ec.Rewire")
        given = dict(context) if hasattr(context, "keys") else {"input_ids": context}
        ids, mask = given["input_ids"], given.get("attention_mask")
        if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < 2:
            raise RewireError(f"input_ids is {tuple(ids.shape)}; give one context of two tokens or more, [1, T].")
        if self.steps == 0:
            return []
        if not self._is_read():
            raise RewireError(
                f"no code of {type(self.model).__name__} reads the vectors; decorate it with ec.reroute(adapt=True), "
                "or ask for that in options= and call the compiled model once."
            )
        if not states("vector", self.model):
            raise RewireError(
                f"no code of {type(self.model).__name__} reads the vectors yet; call the model once before."
            )
        if fewer := [f for f in self._forms() if "adapted" in f and ("top" in f or "threshold" in f)]:
            raise RewireError(
                f"a router has the form {fewer[0]!r}; the loss is that of all experts that the model takes, so adapt "
                "without top_k and threshold."
            )
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self._copy is None or [*map(id, tensors)] != [*map(id, self._copied)]:
            self._copy, self._copied = _shared_copy(self.model).eval(), tensors
            self._copy.compile(backend=self._watch)
        self._watch.seen.clear()
        optimizer, losses = None, []
        for _ in range(self.steps):
            with torch.enable_grad():
                out = call(self._copy, given, logits_to_keep=0)
                loss = _loss(out if isinstance(out, Tensor) else out.logits, ids, mask)
            seen = list(self._watch.seen.values())
            if not seen:
                raise RewireError(f"no router of {type(self.model).__name__} can be adapted: {self._watch.why()}.")
            if not loss.isfinite():
                raise RewireError(f"the loss on this context is {float(loss.detach())}.")
            losses.append(float(loss.detach()))
            vectors = [router.vector for router in seen]
            grads = torch.autograd.grad(loss, vectors, allow_unused=True, materialize_grads=True)
            optimizer = optimizer or _OPTIMIZERS[self.optimizer](vectors, lr=self.lr)
            for router, grad, factor in zip(seen, grads, self._factors(seen), strict=True):
                router.vector.grad = grad * factor
            optimizer.step()
        with torch.no_grad():
            for router in self._watch.seen.values():
                router.state.copy_(router.vector)
        return losses

    def _is_read(self) -> bool:
        """Whether a decorator asks for the vectors, or compiled code has them."""
        asked = (annotations_of(module).get(f"{PREFIX}reroute") for module in self.model.modules())
        if any(text is not None and getattr(read_annotation("reroute", text)[0], "adapt", False) for text in asked):
            return True
        return any("adapted" in form for form in self._forms())

    def _forms(self) -> list[str]:
        return [d.form for graph in graphs_of(self.model) for d in graph.decisions]

    def _factors(self, seen: Sequence[_Seen]) -> Sequence[float]:
        confidence = [float(router.confidence) for router in seen] if self.layers != "all" else []
        if self.layers == "soft":
            mean = sum(confidence) / len(confidence)
            return [c / mean if mean else 1.0 for c in confidence]
        if self.layers == "hard":
            order = sorted(range(len(seen)), key=confidence.__getitem__, reverse=self.prefer == "high")
            chosen = set(order[: math.ceil(self.share * len(seen))])
            return [float(n in chosen) for n in range(len(seen))]
        return [1.0] * len(seen)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def _loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean cross-entropy of each token that is not hidden, given those before it."""
    targets = ids[:, 1:].to(logits.device)
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:].to(targets.device) == 0, -100)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


@dataclasses.dataclass(eq=False)
class _Seen:
    """A router in one forward: the vector that gradients are for, where it is kept, and how sure the router was."""

    state: Tensor
    vector: Tensor
    confidence: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(math.nan))


class _Watch:
    """The back end of the copy: runs graphs as they are, with the vectors added."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}
        self.reasons: set[str] = set()

    def why(self) -> str:
        return "; ".join(sorted(self.reasons)[:3]) or "none was found"

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = normalize(gm, inputs)
        if isinstance(graph, Reason):
            self.reasons.add(str(graph))
            return gm.forward
        sites = find_routers(graph)
        self.reasons |= {str(site.router) for site in sites if isinstance(site.router, Reason)}
        return _Shifting(graph, [s for s in sites if isinstance(s.router, Router) and s.weight is not None], self).run


class _Shifting(fx.Interpreter):
    """Runs a graph node by node, and adds to the logits of its routers."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[RouterSite], watch: _Watch) -> None:
        # All values stay until the end: a router's weight is looked up behind its last use.
        super().__init__(gm, garbage_collect_values=False)
        self.logits = {site.anchor: site for site in sites}
        self.chosen = {site.indices: site for site in sites}
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.logits:
            rows = self.logits[n].weight
            assert rows is not None
            weight = self.env[rows]
            if not has_state("vector", weight):
                return result  # a router that compiled code leaves alone
            state = state_of("vector", weight, result.shape[-1])
            if id(weight) not in self.watch.seen:
                self.watch.seen[id(weight)] = _Seen(state, state.detach().clone().requires_grad_())
            return result + self.watch.seen[id(weight)].vector.to(result.dtype)
        if n in self.chosen:
            site = self.chosen[n]
            assert isinstance(site.router, Router)
            assert site.weight is not None
            if id(self.env[site.weight]) not in self.watch.seen:
                return result
            logits = self.env[site.anchor].detach().float()
            p = logits.softmax(-1) if site.router.score == "softmax" else logits.sigmoid()
            self.watch.seen[id(self.env[site.weight])].confidence = -p.gather(-1, result).log().mean()
        return result

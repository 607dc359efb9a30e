"""Bring a Dynamo graph to one vocabulary: pre-dispatch ATen, with its metadata and input facts.

At this level an operation has one spelling (a method, an operator and a functional all become one overload), while
``linear``, ``matmul``, ``softmax`` and ``scaled_dot_product_attention`` are still whole, mutations stay, and autograd
has not been applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import Source, TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from effcompile.kernels.reason import Reason


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule | Reason:
    """A new pre-dispatch ATen graph that computes what ``gm`` computes; ``gm`` is not changed.

    Keeps node metadata (module stack, annotations, source lines), and on every placeholder the facts that Dynamo put
    there, without which AOTAutograd would lose duplicate and static inputs.

    Returns
    -------
    GraphModule or Reason
        A typed reason (``not-normalised``, ``higher-order-op``) when the graph cannot be brought to this form; the
        caller then compiles the original.
    """
    nested = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and _is_graph(gm, str(n.target))]
    if nested:
        return Reason(
            "higher-order-op",
            f"the graph holds nested regions ({', '.join(nested[:3])}): checkpointing or control flow around the "
            "layers. It is compiled without rewriting; disable gradient checkpointing for inference.",
        )

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*args)

    try:
        mode = _fake_mode(inputs)
        fakes = _fake_inputs(mode, inputs)
        # Under the mode, so that tensors which the graph itself makes (arange, ones) are fake too.
        with mode:
            traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    except Exception as error:
        return Reason("not-normalised", f"re-tracing to ATen failed: {type(error).__name__}: {error}")
    before, after = (g.graph.find_nodes(op="placeholder") for g in (gm, traced))
    if len(before) != len(after):
        return Reason("not-normalised", f"re-tracing changed the inputs from {len(before)} to {len(after)}")
    for old, new in zip(before, after):
        for key, value in old.meta.items():
            new.meta.setdefault(key, value)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    traced.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        # AOTAutograd wants to know where every tensor of a graph comes from. ``torch.tensor([1])`` in a model's code is
        # a call in Dynamo's graph, and a constant in this one: it comes from nowhere, and no guard is made of it.
        known: dict[str, Source] = vars(gm)["_param_name_to_source"]
        made = {str(n.target) for n in traced.graph.find_nodes(op="get_attr")} - known.keys()
        vars(traced)["_param_name_to_source"] = known | {name: ConstantSource(name) for name in made}
    return traced


def _is_graph(gm: fx.GraphModule, target: str) -> bool:
    return isinstance(gm._modules.get(target.split(".")[0]), fx.GraphModule)


def _fake_mode(inputs: Sequence[Any]) -> FakeTensorMode:
    """The mode AOTAutograd will use: Dynamo makes a new one after tracing, so metadata of the old one is not reused."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None) or FakeTensorMode()


def _fake_inputs(mode: FakeTensorMode, inputs: Sequence[Any]) -> list[Any]:
    """The inputs as fake tensors of ``mode``, with Dynamo's symbols for their sizes."""
    context = TracingContext.try_get()
    fakes = []
    for x in inputs:
        if not isinstance(x, Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is mode):
            fakes.append(x)
            continue
        symbolic = context.tensor_to_context.get(x) if context is not None else None
        source = getattr(symbolic, "tensor_source", None)
        fakes.append(mode.from_tensor(x, static_shapes=symbolic is None, symbolic_context=symbolic, source=source))
    return fakes

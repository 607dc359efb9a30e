"""A torch.compile back end that rewrites transformers into efficient forms, and says what it did and why.

>>> import effcompile as ec
>>> model = ec.compress_kv(key_bits=4, value_bits=4)(model)      # doctest: +SKIP
>>> model.compile(backend="effcompile")                          # doctest: +SKIP
>>> model.generate(ids)                                          # doctest: +SKIP
>>> print(ec.inspect(model))                                     # doctest: +SKIP

Names are imported when they are first used: ``import effcompile`` alone loads neither torch nor transformers, and torch
itself may import this package for ``TORCH_LOGS`` before it is ready.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effcompile.kernels.attention import merge_state
    from effcompile.kernels.form import FormError
    from effcompile.kernels.gradients import reinmax, sparsemixer
    from effcompile.kernels.ops import CapacityError
    from effcompile.passes.anchor_attention import AnchorAttention
    from effcompile.passes.batches import CalibrationError
    from effcompile.passes.blockrank import BlockRank, blockrank_layout, blockrank_scores
    from effcompile.passes.calibrate import calibrate
    from effcompile.passes.calibrate_read_me import train_router
    from effcompile.passes.carve_moe import CarveMoE
    from effcompile.passes.compress_kv import CompressKV
    from effcompile.passes.coreinfer import CoreInfer
    from effcompile.passes.delta import Delta
    from effcompile.passes.discard import Discarded, discard_parameters
    from effcompile.passes.fit_latents import fit_latents
    from effcompile.passes.flap import Flap
    from effcompile.passes.flexprefill import FlexPrefill
    from effcompile.passes.graph_kv import GraphKV, graph_kv_layout
    from effcompile.passes.layout import Chunk, Layout
    from effcompile.passes.low_rank import LowRank
    from effcompile.passes.options import (
        DecorationError,
        OptionError,
        decorator,
        options_of,
        remove,
        sparse_attention,
    )
    from effcompile.passes.pbs_attn import PBSAttn
    from effcompile.passes.proxyattn import ProxyAttn
    from effcompile.passes.quantize_weights import QuantizeWeights
    from effcompile.passes.quest import Quest
    from effcompile.passes.read_me import ReadMe
    from effcompile.passes.recover import recover
    from effcompile.passes.report import InspectError, Report, inspect
    from effcompile.passes.reroute import Reroute
    from effcompile.passes.rewire import Rewire, RewireError
    from effcompile.passes.sliding_window import SlidingWindow
    from effcompile.passes.streaming import Streaming
    from effcompile.passes.teal import Teal
    from effcompile.passes.vertical_slash import VerticalSlash
    from effcompile.passes.wina import Wina
    from effcompile.passes.xattention import XAttention
    from effcompile.runtime.cache import Cache, CacheError, GradientError
    from effcompile.runtime.core_state import core_neurons, forget_core_neurons
    from effcompile.runtime.discarded import DiscardError
    from effcompile.runtime.plan import Plan, PlanError
    from effcompile.runtime.routed_text import forget_routed_text, routed_text
    from effcompile.runtime.router_state import expert_counts

    anchor_attention = decorator(AnchorAttention)
    blockrank = decorator(BlockRank)
    carve_moe = decorator(CarveMoE)
    compress_kv = decorator(CompressKV)
    coreinfer = decorator(CoreInfer)
    delta = decorator(Delta)
    flap = decorator(Flap)
    flexprefill = decorator(FlexPrefill)
    graph_kv = decorator(GraphKV)
    low_rank = decorator(LowRank)
    pbs_attn = decorator(PBSAttn)
    proxyattn = decorator(ProxyAttn)
    quantize_weights = decorator(QuantizeWeights)
    quest = decorator(Quest)
    read_me = decorator(ReadMe)
    reroute = decorator(Reroute)
    sliding_window = decorator(SlidingWindow)
    streaming = decorator(Streaming)
    teal = decorator(Teal)
    vertical_slash = decorator(VerticalSlash)
    wina = decorator(Wina)
    xattention = decorator(XAttention)
    __version__: str
else:
    # Where each name is. Decorators are not listed: they come from the registry of passes.
    _HOMES = {
        "Cache": "runtime.cache",
        "CacheError": "runtime.cache",
        "CalibrationError": "passes.batches",
        "CapacityError": "kernels.ops",
        "Chunk": "passes.layout",
        "DecorationError": "passes.options",
        "DiscardError": "runtime.discarded",
        "Discarded": "passes.discard",
        "FormError": "kernels.form",
        "GradientError": "runtime.cache",
        "InspectError": "passes.report",
        "Layout": "passes.layout",
        "OptionError": "passes.options",
        "Plan": "runtime.plan",
        "PlanError": "runtime.plan",
        "Report": "passes.report",
        "Rewire": "passes.rewire",
        "RewireError": "passes.rewire",
        "blockrank_layout": "passes.blockrank",
        "blockrank_scores": "passes.blockrank",
        "calibrate": "passes.calibrate",
        "core_neurons": "runtime.core_state",
        "discard_parameters": "passes.discard",
        "expert_counts": "runtime.router_state",
        "fit_latents": "passes.fit_latents",
        "forget_core_neurons": "runtime.core_state",
        "forget_routed_text": "runtime.routed_text",
        "graph_kv_layout": "passes.graph_kv",
        "inspect": "passes.report",
        "merge_state": "kernels.attention",
        "options_of": "passes.options",
        "reinmax": "kernels.gradients",
        "recover": "passes.recover",
        "remove": "passes.options",
        "routed_text": "runtime.routed_text",
        "sparse_attention": "passes.options",
        "sparsemixer": "kernels.gradients",
        "train_router": "passes.calibrate_read_me",
    }

    def __getattr__(name):
        import importlib

        if name == "__version__":
            import importlib.metadata

            found = importlib.metadata.version("effcompile")
        elif name in _HOMES:
            found = getattr(importlib.import_module(f"effcompile.{_HOMES[name]}"), name)
        elif not name.startswith("_") and name in importlib.import_module("effcompile.passes.base").REGISTRY:
            found = importlib.import_module("effcompile.passes.options").decorator_of(name)
        else:
            raise AttributeError(f"module 'effcompile' has no attribute {name!r}; it offers {', '.join(__all__)}.")
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "Cache",
    "CacheError",
    "CalibrationError",
    "CapacityError",
    "Chunk",
    "DecorationError",
    "DiscardError",
    "Discarded",
    "FormError",
    "GradientError",
    "InspectError",
    "Layout",
    "OptionError",
    "Plan",
    "PlanError",
    "Report",
    "Rewire",
    "RewireError",
    "__version__",
    "anchor_attention",
    "blockrank",
    "blockrank_layout",
    "blockrank_scores",
    "calibrate",
    "carve_moe",
    "compress_kv",
    "core_neurons",
    "coreinfer",
    "delta",
    "discard_parameters",
    "expert_counts",
    "fit_latents",
    "flap",
    "flexprefill",
    "forget_core_neurons",
    "forget_routed_text",
    "graph_kv",
    "graph_kv_layout",
    "inspect",
    "low_rank",
    "merge_state",
    "options_of",
    "pbs_attn",
    "proxyattn",
    "quantize_weights",
    "quest",
    "read_me",
    "recover",
    "reinmax",
    "remove",
    "reroute",
    "routed_text",
    "sliding_window",
    "sparse_attention",
    "sparsemixer",
    "streaming",
    "teal",
    "train_router",
    "vertical_slash",
    "wina",
    "xattention",
]

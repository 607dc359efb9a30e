"""``ec.recover``: train the routers of a carved model for a few steps, and nothing else.

Each routed group gets a scale ``u``, and a bias ``b`` on its choice: the groups of largest ``p + b`` are taken, and
what group ``i`` writes counts ``1 + p_i u_i``. Scales follow the gradient of the model's own loss; biases follow no
gradient, but move against the load after each step, so that groups are used alike.

Papers: Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis (Pei et al., ACL 2026, arXiv 2502.04416),
section 3.3; the biases are those of Auxiliary-Loss-Free Load Balancing (Wang et al., 2024, arXiv 2408.15664).

The model that is trained is a copy on the same weights, compiled with a back end of its own: where the plan has a
form, the graph runs that form's reference body, which has gradients. So what can be rewritten can be recovered.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effcompile.kernels.ffn import FeedForward
from effcompile.passes.batches import CalibrationError, call, mask_of, shown
from effcompile.passes.calibrate_on import Form, Standing, inner
from effcompile.passes.carve_moe import CarveMoE
from effcompile.passes.feed_forward import check_weights
from effcompile.passes.options import remove
from effcompile.passes.stack import Stack, standing
from effcompile.runtime.plan import Plan, Record


def recover(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    gamma: float = 1e-3,
    progress: bool = True,
) -> Plan:
    """Train scales and biases of the routers that ``carve_moe`` made, and return a plan with them.

    Parameters
    ----------
    model
        The model that was calibrated, a causal language model. It is not changed: its parameters are neither trained
        nor given gradients.
    plan
        Of :func:`effcompile.calibrate`. Other methods for feed-forward blocks stand in it as they are, while forms of
        other kinds (attention, low rank, few bits) are not run while training. A plan that was recovered goes on
        from where it is.
    batches
        Each ``input_ids`` ``[B, T]``, or keyword arguments of the model with them; a step for each. Tokens that an
        ``attention_mask`` ``[B, T]`` hides are neither learned nor counted.
    epochs
        How often to go through ``batches``.
    lr
        Of Adam, for the scales.
    gamma
        What a bias moves by after each step: down where a group had more tokens than the mean, up where fewer.
    progress
        Show a bar on the error output.

    Returns
    -------
    Plan
        Records of routed blocks have ``scale`` and ``choice_bias`` besides, fp32 ``[routed]``, and the largest load
        over the mean on the first batch, ``load_before`` and ``load_after``. ``made["recovered"]`` has the steps and
        the loss on the first batch before and after them. ``error`` and ``cosine`` stay those of calibration.

    Raises
    ------
    CalibrationError
        Without batches or without a routed block, for logits or a loss that cannot be used.
    PlanError
        If the plan is for other weights, or its tensors do not fit its options.
    """
    texts = list(batches)
    if not texts or epochs < 1:
        raise CalibrationError("recover(...): batches is empty, or epochs below 1; give some text.")
    if not (lr >= 0 and gamma >= 0):
        raise CalibrationError(f"recover(...): lr={lr!r}, gamma={gamma!r}; expected 0 or more.")
    if torch.is_inference_mode_enabled():
        raise CalibrationError("recover(...): there are no gradients inside torch.inference_mode; call it outside.")
    model, started = getattr(model, "_orig_mod", model), time.time()
    watch = _Surrogate(plan)
    copied = _frozen_copy(model).eval()
    torch._dynamo.reset()
    copied.compile(backend=watch)
    try:
        with torch.enable_grad():
            losses = _train(copied, watch, texts, epochs, lr, gamma, progress)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise inner(error) from None
    finally:
        torch._dynamo.reset()
    records = {(r.module, r.method): r for r in plan}
    records |= {(b.record.module, b.record.method): b.recovered() for b in watch.sites.values()}
    told = {"steps": epochs * len(texts), "seconds": round(time.time() - started, 1), "loss": losses}
    return Plan(records, {**plan.made, "recovered": told})


def _train(
    copied: nn.Module, watch: _Surrogate, texts: list[Any], epochs: int, lr: float, gamma: float, progress: bool
) -> list[float]:
    """All steps; returns the loss on the first batch before and after them."""
    first = _loss(copied, texts[0], watch)
    blocks: list[_Routed] = list(watch.sites.values())
    if not blocks:
        reasons = sorted({str(reason) for reason in watch.reasons}) or ["the plan has no record of carve_moe that fits"]
        raise CalibrationError(f"recover(...): no routed block: {'; '.join(reasons[:3])}.")
    for block in blocks:
        block.before = block.imbalance
    optimizer = torch.optim.Adam([block.scale for block in blocks], lr=lr, betas=(0.9, 0.95))
    before = float(first.detach())
    for step, batch in enumerate(shown(texts * epochs, progress)):
        loss = first if step == 0 else _loss(copied, batch, watch)
        if not loss.isfinite():
            raise CalibrationError(f"recover(...): the loss of step {step + 1} is {float(loss.detach())}.")
        scales = [block.scale for block in blocks]
        grads = torch.autograd.grad(loss, scales, allow_unused=True, materialize_grads=True)
        for scale, grad in zip(scales, grads, strict=True):
            scale.grad = grad
        optimizer.step()
        for block in blocks:
            block.balance(gamma)
    with torch.no_grad():
        after = float(_loss(copied, texts[0], watch))
    return [before, after]


def _loss(copied: nn.Module, batch: Any, watch: _Surrogate) -> Tensor:
    """Mean cross-entropy of each token that is not hidden, given those before it; and the loads of the blocks."""
    given = dict(batch) if hasattr(batch, "keys") else {"input_ids": batch}
    ids, mask = given.get("input_ids"), mask_of(batch)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        raise CalibrationError("recover(...): a batch without input_ids [B, T] of two tokens or more.")
    for block in watch.sites.values():
        block.load.zero_()
    watch.keep = None if mask is None else mask.flatten()
    out = call(copied, batch, logits_to_keep=0)
    logits: Any = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.ndim != 3:
        raise CalibrationError("recover(...): the model gives no logits [B, T, V] of its input_ids.")
    targets = ids[:, 1:].to(logits.device)
    if mask is not None:
        # Neither what is hidden, nor what follows a hidden token: in front of a text that is padding.
        mask = mask.to(targets.device)
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def _frozen_copy(model: nn.Module) -> nn.Module:
    """The model on the same storage, without decorators, with parameters that ask for no gradients."""
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    copied._compiled_call_impl = None
    return remove(copied)


@dataclasses.dataclass(eq=False)
class _Routed:
    """The router of one block while it is trained: ``scale``, ``bias`` and ``load`` are ``[routed]``."""

    record: Record
    threshold: bool
    scale: Tensor
    bias: Tensor
    load: Tensor
    before: float = 1.0

    @classmethod
    def of(cls, record: Record, method: CarveMoE, device: torch.device) -> _Routed:
        """Zeros, or what an earlier recovery found."""
        scale, bias = (
            (record.tensor(name, method.routed) if name in record.tensors else torch.zeros(method.routed))
            .to(device, torch.float32, copy=True)
            .detach()
            for name in ("scale", "choice_bias")
        )
        load = torch.zeros(method.routed, dtype=torch.int64, device=device)
        return cls(record, method.routing == "threshold", scale.requires_grad_(), bias, load)

    @property
    def live(self) -> Record:
        """The record with the tensors that are trained."""
        own = {"scale": self.scale, "choice_bias": self.bias}
        return dataclasses.replace(self.record, tensors={**self.record.tensors, **own})

    @property
    def imbalance(self) -> float:
        """The largest load over the mean; 1 where all are equal."""
        return float(self.load.max() / self.load.double().mean().clamp(min=1e-9))

    def see(self, chosen: Tensor) -> None:
        """Count the groups that rows have taken."""
        self.load += torch.bincount(chosen[chosen >= 0].long(), minlength=self.load.numel())

    def balance(self, gamma: float) -> None:
        """Move the biases against the load."""
        load = self.load.double()
        step = (load.mean() - load).sign().float()
        if self.threshold:
            # A constant for all, which no top-k sees, would let more or fewer groups above the threshold.
            step = step - step.mean()
        self.bias += gamma * step

    def recovered(self) -> Record:
        """What the plan says from now on."""
        tensors = {name: t.detach().cpu().clone() for name, t in self.live.tensors.items()}
        numbers = {**self.record.numbers, "load_before": self.before, "load_after": self.imbalance}
        return dataclasses.replace(self.record, tensors=tensors, numbers=numbers)


class _Surrogate(Standing):
    """Trains and counts what is routed."""

    kind = "carved feed-forward block"

    def form(self, module: str, block: FeedForward, own: dict[str, Tensor]) -> Form | None:
        """The form of the plan; a routed one is trained and counted."""
        found = standing(self.plan, module)
        if found is None:
            return None
        below = found.below if isinstance(found, Stack) else found
        check_weights(below.record, own)
        routed = below.routed
        if isinstance(found, Stack):
            if routed is not None:
                raise CalibrationError(
                    f"recover(...): {found.above.name} at {module} was calibrated on {below.method.name} as it is now. "
                    f"Take the records of {found.above.name} out, recover, and calibrate it again with on=plan."
                )
            check_weights(found.record, own)
            return found.approximate(block)
        if routed is None:
            return below.method.approximate(block, below.record)
        if module not in self.sites:
            self.sites[module] = _Routed.of(below.record, routed, block.up.device)
        trained: _Routed = self.sites[module]
        run = routed.routed_form(block, trained.live)

        def form(x: Tensor) -> Tensor:
            out, chosen = run(x)
            assert chosen is not None
            same = self.keep is not None and self.keep.numel() == chosen.shape[0]
            trained.see(chosen[self.keep.to(chosen.device)] if self.keep is not None and same else chosen)
            return out

        return form

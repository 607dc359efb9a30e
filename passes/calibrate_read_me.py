"""Calibrating ``ec.read_me``: masks from each domain of text, then a router that learns which domain a token is like.

Two passes over the text. The first adds up the size of each neuron in each domain, of which masks are made. The second
sees the same tokens again, and counts for each how many of its own largest neurons are in each mask: what the router is
trained to say (section 3.2 of the paper, with the experts fixed).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from effcompile.kernels import token_router
from effcompile.kernels.ffn import FeedForward
from effcompile.passes.backend_options import clean_path
from effcompile.passes.batches import CalibrationError, mask_of, shown
from effcompile.passes.calibrate import SAMPLES, Looking, _shared, _Site, _Watch, check_seen, plan_of, run_one, watching
from effcompile.passes.feed_forward import Calibrated, check_weights
from effcompile.passes.options import build
from effcompile.passes.read_me import ROUTER, ReadMe, lookups, router_of
from effcompile.patterns.walk import module_path, operand
from effcompile.runtime.plan import Plan, PlanError, Record, digest
from effcompile.runtime.statistics import Block, DomainSizes, Samples

DECAY, EVERY = 0.8, 100
"""The factor on the rate of learning, and the steps after which it holds once more."""
HELD = 8
"""Of so many pieces of text one is held out, to measure the router on."""


def domains_of(batches: Any, least: int) -> dict[str, list[Any]]:
    """The batches of each domain. Raises :class:`CalibrationError` for what is no mapping of ``least`` or more."""
    how = 'give a mapping, such as {"code": batches, "prose": batches}'
    if not isinstance(batches, Mapping) or len(batches) < least:
        raise CalibrationError(
            f"calibrate(...): read_me makes an expert for each of two or more domains; {how}."
            if least > 1
            else f"calibrate(...): the mapping of domains is empty; {how}."
        )
    found = {}
    for name, own in batches.items():
        if isinstance(own, Tensor) or not isinstance(own, Iterable) or isinstance(own, str | Mapping):
            raise CalibrationError(
                f"calibrate(...): the domain {name!r} is {type(own).__name__}, not a list of batches; {how}."
            )
        found[str(name)] = list(own)
        if not found[str(name)]:
            raise CalibrationError(f"calibrate(...): the domain {name!r} has no batches; give some text.")
    return found


@dataclasses.dataclass(eq=False)
class _DomainSite(_Site):
    """A block, which in the second pass counts what tokens have in common with each mask."""

    watch: Any = None
    masks: Tensor | None = None

    def see_middle(self, rows: Tensor) -> None:
        """Statistics, or overlaps once there are masks."""
        if self.masks is None:
            super().see_middle(rows)
            return
        self.given = None
        kept = int(self.masks[0].sum())
        for part, size in enumerate(rows.abs().split(1024)):
            largest = torch.zeros_like(size).scatter_(1, size.topk(kept, dim=-1).indices, 1)
            self.watch.overlap(self.module, part * 1024, rows.shape[0], largest.float() @ self.masks.float().t())


class _DomainWatch(_Watch):
    """Looks at blocks, and at the place where token ids are looked up."""

    def __init__(self, method: ReadMe) -> None:
        super().__init__([method])
        self.domain = 0
        self.ids: Tensor | None = None
        self.embeddings: dict[str, Tensor] = {}
        """Lookups that had the token ids of every batch so far, by their modules."""
        self.seen: set[str] | None = None
        self.overlaps: dict[str, Tensor] = {}
        self.planned: Plan | None = None
        """Where masks are known before the first batch."""

    def look(self, graph: fx.GraphModule) -> Looking:
        """Blocks as all methods do, and lookups."""
        looking, places = super().look(graph), {}
        for node, weight in lookups(graph.graph):
            name = clean_path(module_path(node))
            self.embeddings.setdefault(name, weight)
            places[node] = name
        return _Reading(looking.module, looking.looked_at, looking.weights, self, places)

    def _site(self, module: str, block: Block, own: Mapping[str, Tensor]) -> _Site:
        assert isinstance(block, FeedForward)  # no heads were asked for
        if module not in self.sites:
            statistics = [method.statistics(block) for method in self.methods]
            parameters = {role: digest(t) for role, t in own.items()}
            site = _DomainSite(module, block, parameters, Samples(SAMPLES), _shared(statistics), watch=self)
            _sizes(site).domain = self.domain
            self.sites[module] = site
            for one in site.collected:
                one.prepare(block)
            record = None if self.planned is None else self.planned.get(module, ReadMe.name)
            if record is not None:
                check_weights(record, own)
                site.masks = record.tensor("masks", -1, block.width).to(block.up.device)
        found: _Site = self.sites[module]
        return found

    def overlap(self, module: str, first: int, rows: int, counts: Tensor) -> None:
        """Take in what the tokens from ``first`` on, of ``rows``, have in common with each mask of a block."""
        if module not in self.overlaps:
            self.overlaps[module] = counts.new_zeros(rows, counts.shape[1])
        self.overlaps[module][first : first + counts.shape[0]] = counts

    def begin(self, domain: int) -> None:
        """What comes is of this domain."""
        self.domain = domain
        for site in self.sites.values():
            _sizes(site).domain = domain


def _sizes(site: Any) -> DomainSizes:
    found = site.statistics[0]["sizes"]
    assert isinstance(found, DomainSizes)
    return found


class _Reading(Looking):
    """Runs a graph, and sees which lookups are of the batch's token ids."""

    def __init__(
        self, gm: Any, looked_at: Any, weights: Any, watch: _DomainWatch, places: Mapping[fx.Node, str]
    ) -> None:
        super().__init__(gm, looked_at, weights, watch)
        self.places, self.reader = places, watch

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        if n in self.places and self.reader.ids is not None:
            given, ids = self.env[operand(n, 1)], self.reader.ids
            if given.shape == ids.shape and torch.equal(given.cpu(), ids.cpu()):
                assert self.reader.seen is not None
                self.reader.seen.add(self.places[n])
        return super().run_node(n)


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """The tokens of one text that count ``[T]``, and what they have in common with each mask ``[T, E]``."""

    ids: Tensor
    overlap: Tensor


def each_read_me(
    model: nn.Module, domains: Mapping[str, Sequence[Any]], method: ReadMe, *, progress: bool = True
) -> Plan:
    """A plan with the masks of each block, and a router."""
    started = time.time()
    model = getattr(model, "_orig_mod", model)
    watch = _DomainWatch(method)
    with watching(model, watch) as copied:
        tokens, common = 0, None
        for number, own in enumerate(domains.values()):
            watch.begin(number)
            for batch in shown(own, progress):
                found, seen = _called(copied, batch, watch)
                tokens += found
                common = seen if common is None else common & seen
        check_seen(tokens, watch)
        if not common:
            raise CalibrationError(
                "calibrate(...): read_me needs a model that looks its token ids up in a parameter, in the graph that "
                "is captured; no such place was found. Batches are token ids and no embeddings."
            )
        module = next(name for name in watch.embeddings if name in common)
        weight = watch.embeddings[module]
        sites = watch.wanted(0)[0]
        records = _records(method, sites, list(domains))
        for record in records:
            watch.sites[record.module].masks = record.tensors["masks"].to(weight.device)
        every = [batch for own in domains.values() for batch in own]
        texts = _overlaps(copied, watch, every, progress)
    router, numbers = fit(texts, method, weight.shape[0], functools.partial(shown, progress=progress))
    options = json.loads(method.text)
    records.append(Record(module + ROUTER, method.name, options, {"embedding": digest(weight)}, numbers, router))
    plan = plan_of(records, model, tokens, started)
    plan.made["domains"] = list(domains)
    return plan


def train_router(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Tensor | Mapping[str, Any]] | Mapping[str, Iterable[Tensor | Mapping[str, Any]]],
    *,
    steps: int = 100,
    lr: float = 5e-4,
    progress: bool = True,
) -> Plan:
    """Go on training the router of a plan of :func:`effcompile.read_me`, on any text.

    Parameters
    ----------
    model, batches, progress
        As in :func:`effcompile.calibrate`. Which domain a text is of plays no part, so no mapping is needed.
    plan
        It is not changed.
    steps, lr
        As in :func:`effcompile.read_me`.

    Returns
    -------
    Plan
        With another router; what its record says was measured is of every eighth piece of this text.

    Raises
    ------
    CalibrationError
        Without batches, or where they are no token ids.
    PlanError
        For a plan without a router, or of other weights.
    """
    router = router_of(plan)
    if router is None:
        raise PlanError("train_router(...): the plan has no router; calibrate ec.read_me first.")
    method = build(ReadMe, router.options, f"plan: {router.method} at {router.module}")
    assert isinstance(method, ReadMe)
    changed = dataclasses.replace(method, steps=steps, lr=lr)
    domains = domains_of(batches, 1) if isinstance(batches, Mapping) else {"": list(batches)}
    every = [batch for own in domains.values() for batch in own]
    watch = _DomainWatch(method)
    watch.planned = plan
    with watching(getattr(model, "_orig_mod", model), watch) as copied:
        texts = _overlaps(copied, watch, every, progress)
    if not texts:
        raise CalibrationError(
            "train_router(...): batches is empty, or no block of the plan reads them; give some text."
        )
    module = router.module.removesuffix(ROUTER)
    if module not in watch.embeddings or digest(watch.embeddings[module]) != router.parameters.get("embedding"):
        raise PlanError(f"plan: {router.method} at {module}: the embedding is not that which the plan was made from.")
    bar = functools.partial(shown, progress=progress)
    tensors, numbers = fit(texts, changed, watch.embeddings[module].shape[0], bar, router.tensors)
    record = dataclasses.replace(router, numbers=numbers, tensors=tensors)
    return Plan({(r.module, r.method): record if r is router else r for r in plan}, plan.made)


def _overlaps(copied: nn.Module, watch: _DomainWatch, batches: Sequence[Any], progress: bool) -> list[Read]:
    """The second pass: each text, with what its tokens have in common with the masks."""
    texts = []
    for batch in shown(batches, progress):
        watch.overlaps = {}
        _called(copied, batch, watch)
        texts += _texts(batch, watch.overlaps)
    return texts


def _called(copied: nn.Module, batch: Any, watch: _DomainWatch) -> tuple[int, set[str]]:
    """One batch through the model: the tokens that count, and the modules that looked its ids up."""
    watch.ids, watch.seen = _ids(batch), set()
    tokens = run_one(copied, batch, watch)
    return tokens, watch.seen


def _ids(batch: Any) -> Tensor:
    """The token ids of a batch, ``[B, T]``."""
    given = batch.get("input_ids") if hasattr(batch, "keys") else batch
    if not isinstance(given, Tensor) or given.ndim != 2 or given.is_floating_point():
        raise CalibrationError("calibrate(...): read_me needs token ids [B, T]: input_ids, or a tensor of integers.")
    return given


def _texts(batch: Any, overlaps: Mapping[str, Tensor]) -> list[Read]:
    """Each row of a batch without what its mask hides; overlaps are the mean over blocks."""
    ids, mask = _ids(batch), mask_of(batch)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    lengths = mask.sum(1).tolist()
    for module, counts in overlaps.items():
        if counts.shape[0] != sum(lengths):
            raise CalibrationError(
                f"calibrate(...): {module} reads {counts.shape[0]} rows, and the batch has {sum(lengths)} tokens; "
                "read_me is for models whose blocks read each token once."
            )
    if not overlaps:
        return []
    mean = torch.stack(list(overlaps.values())).mean(0).cpu()
    shown = ids[mask.to(ids.device)].cpu()
    return [Read(*both) for both in zip(shown.split(lengths), mean.split(lengths)) if both[0].numel()]


def _records(method: ReadMe, sites: Sequence[Calibrated], domains: Sequence[str]) -> list[Record]:
    """Masks, and the error of each block on rows of each domain with its own expert, and with another's."""
    try:
        found = method.calibrate(sites)
    except ValueError as error:
        raise CalibrationError(f"calibrate(...): {method}: {error}") from None
    records = []
    for site, one in zip(sites, found, strict=True):
        record = Record(site.module, method.name, json.loads(method.text), site.parameters, {}, dict(one.tensors))
        sizes = site.statistics["sizes"]
        assert isinstance(sizes, DomainSizes)
        errors: dict[str, float] = {}
        cosines, others = [], []
        for number, domain in enumerate(domains):
            x = sizes.inputs[number].input
            wanted = site.block(x).float()
            for expert in range(len(domains)):
                got = method.approximate(site.block, record, expert)(x).float()
                lost = float((got - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
                if expert == number:
                    errors[f"error {domain}"] = lost
                    cosines.append(float(F.cosine_similarity(got, wanted, dim=-1).mean()))
                else:
                    others.append(lost)
        numbers = {
            "error": sum(errors.values()) / len(errors), "cosine": sum(cosines) / len(cosines),
            "error of other experts": sum(others) / len(others), **one.numbers, **errors,
        }  # fmt: skip
        records.append(dataclasses.replace(record, numbers=numbers))
    return records


def pieces(texts: Sequence[Read], window: int, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Runs of at most ``window`` tokens, and the experts they should take: softmax of the overlaps."""
    found = []
    for text in texts:
        target = (text.overlap.double() / temperature).softmax(-1).float()
        found += list(zip(text.ids.long().split(window), target.split(window)))
    return found


def fit(
    texts: Sequence[Read],
    method: ReadMe,
    vocabulary: int,
    shown: Any = lambda x: x,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A router trained on texts, from ``start`` if there is one: its tensors, and what it says of held out pieces.

    Numbers: ``kl``, of the target to the router; ``kl constant``, to the mean target, which is what a router that
    looks at nothing can reach; ``agreement``, the share of tokens for which it takes the best expert, and ``agreement
    constant`` of the expert that is best most often; ``kl before`` training. Of fewer than 8 pieces none is held out.
    """
    generator = torch.Generator().manual_seed(method.seed)
    found = pieces(texts, method.window, method.temperature)
    mixed = [found[n] for n in torch.randperm(len(found), generator=generator)]
    held, trained = mixed[: len(mixed) // HELD], mixed[len(mixed) // HELD :]
    seen = torch.cat([ids for ids, _ in trained]).unique()
    experts = trained[0][1].shape[1]
    router = _start(method, seen, vocabulary, experts) if start is None else _with_rows(start, seen)
    measured = functools.partial(_measure, router, method, held or trained)
    mean = torch.cat([target for _, target in trained]).mean(0)
    numbers = {"kl before": measured()["kl"]} | _constant(mean, held or trained)
    learned = [router[name].requires_grad_() for name in token_router.TENSORS if name != "rows"]
    optimizer = torch.optim.AdamW(learned, lr=method.lr, weight_decay=0.01)
    queue: list[int] = []
    with torch.enable_grad():
        for step in shown(range(method.steps)):
            while len(queue) < min(method.batch, len(trained)):
                queue += torch.randperm(len(trained), generator=generator).tolist()
            chosen = [trained[queue.pop(0)] for _ in range(min(method.batch, len(trained)))]
            for group in optimizer.param_groups:
                group["lr"] = method.lr * DECAY ** (step // EVERY)
            loss, _, tokens = _loss(router, method, chosen)
            if not loss.isfinite():
                raise CalibrationError(
                    f"calibrate(...): {method}: the router's loss is not finite; choose a smaller lr."
                )
            optimizer.zero_grad()
            (loss / tokens).backward()
            optimizer.step()
    router = {name: t.detach() for name, t in router.items()}
    # What no text held says what the mean of the others does.
    router["embedding"][-1] = router["embedding"][:-1].mean(0)
    return router, numbers | _measure(router, method, held or trained)


def _start(method: ReadMe, seen: Tensor, vocabulary: int, experts: int) -> dict[str, Tensor]:
    """A router before training. Ids that are ``seen`` have rows of their own, and the others one together."""
    size, hidden = method.dim, method.hidden
    generator = torch.Generator().manual_seed(method.seed)
    shapes = {
        "embedding": (seen.numel() + 1, size), "qkv": (3 * size, size), "out": (size, size),
        "gate_up": (2 * hidden, size), "down": (size, hidden), "head": (experts, size),
    }  # fmt: skip
    router = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    router |= {name: torch.ones(size) for name in ("norm", "ffn_norm", "head_norm")}
    rows = torch.full((vocabulary,), seen.numel(), dtype=torch.int32)
    rows[seen] = torch.arange(seen.numel(), dtype=torch.int32)
    return router | {"rows": rows}


def _with_rows(router: Mapping[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """A copy of a router in which ids that are ``seen`` have rows of their own."""
    rows, embedding = router["rows"].clone(), router["embedding"]
    shared = embedding.shape[0] - 1
    new = seen[rows[seen] == shared]
    rows[rows == shared] += new.numel()
    rows[new] = torch.arange(shared, shared + new.numel(), dtype=torch.int32)
    more = embedding[-1:].expand(new.numel(), -1)
    copied = {name: t.clone() for name, t in router.items()}
    return copied | {"rows": rows, "embedding": torch.cat([embedding[:-1], more, embedding[-1:]])}


def _loss(
    router: Mapping[str, Tensor], method: ReadMe, chosen: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, int]:
    """The sums of KL and of tokens whose best expert is taken, over pieces side by side; and the count of tokens."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in chosen], batch_first=True)
    target = nn.utils.rnn.pad_sequence([target for _, target in chosen], batch_first=True)
    lengths = torch.tensor([ids.numel() for ids, _ in chosen])
    place = torch.arange(ids.shape[1])
    real = place < lengths[:, None]
    allowed = (place[:, None] >= place)[None]  # padding stands behind the text, where nothing sees it
    said, _, _ = token_router.logits(ids, [router[n] for n in token_router.TENSORS], method.heads, place, allowed)
    kl = F.kl_div(said.log_softmax(-1), target, reduction="none").sum(-1)
    right = (said.argmax(-1) == target.argmax(-1)) & real
    return kl[real].sum(), right.sum(), int(lengths.sum())


@torch.no_grad()
def _measure(router: Mapping[str, Tensor], method: ReadMe, chosen: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """KL and agreement on pieces."""
    parts = [chosen[n : n + method.batch] for n in range(0, len(chosen), method.batch)]
    kl, right, tokens = (sum(float(x) for x in column) for column in zip(*(_loss(router, method, p) for p in parts)))
    return {"kl": kl / tokens, "agreement": right / tokens}


def _constant(mean: Tensor, chosen: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The same of one that says ``mean`` for every token."""
    target = torch.cat([target for _, target in chosen])
    kl = F.kl_div(mean.log().expand_as(target), target, reduction="batchmean")
    share = (target.argmax(-1) == mean.argmax()).float().mean()
    return {"kl constant": float(kl), "agreement constant": float(share)} if math.isfinite(float(kl)) else {}

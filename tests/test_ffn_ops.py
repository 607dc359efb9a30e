"""FFNs that read a part of their weights: reference bodies against loops in fp64, kernels against reference bodies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import pairwise
from torch._dynamo.testing import CompileCounterWithBackend

from effcompile.kernels import ffn_cost, ffn_ops, ops
from effcompile.kernels.ffn import ACTIVATIONS
from effcompile.lowering import cpp_ffn
from effcompile.lowering.cpp_ffn import WITH_KERNELS

OPS = torch.ops.effcompile
DTYPES = [torch.float32, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


def within(got, reference, exact, terms, dtype):
    """Whether ``got`` loses at most twice what the reference does, one rounding of the result and one of its terms."""
    rounding = torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * terms
    error, lost = (got.double() - exact).abs().max(), (reference.double() - exact).abs().max()
    assert error <= 2 * lost + rounding, f"{error:.3g} is more than 2 * {lost:.3g} + {rounding:.3g}"


class Grouped:
    """Weights of a grouped FFN, and a choice of groups."""

    def __init__(
        self, rows, size, shared, width, groups, slots, gated=True, biases=False, dtype=torch.float32, alike=1
    ):
        neurons, dtype = shared + groups * width, dtype or torch.float32
        self.shared, self.width, self.groups = shared, width, groups
        self.x = torch.randn(rows, size).to(dtype)
        self.gate = (torch.randn(neurons, size) / size**0.5).to(dtype) if gated else None
        self.up, self.down_t = ((torch.randn(neurons, size) / size**0.5).to(dtype) for _ in range(2))
        order = torch.rand(rows if alike else 1, groups).argsort(-1)[:, :slots]
        self.chosen = order.where(torch.rand(order.shape) < 0.8, -1).to(torch.int32)
        self.weights = 1 + torch.rand(order.shape)
        shapes = {"gate_bias": neurons, "up_bias": neurons, "down_bias": size}
        self.biases = {
            name: torch.randn(n).to(dtype) if biases and (gated or name != "gate_bias") else None
            for name, n in shapes.items()
        }

    def call(self, operator, activation="silu", dtype=None, **other):
        def cast(t):
            return t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype)

        given = {"x": self.x, "gate": self.gate, "up": self.up, "down_t": self.down_t, "chosen": self.chosen}
        given |= {"weights": self.weights} | self.biases | other
        x, gate, up, down_t, chosen, weights, *biases = map(cast, given.values())
        sizes = self.shared, self.width, activation
        return operator(x, gate, up, down_t, chosen, weights, *sizes, **dict(zip(self.biases, biases)))

    def loop(self, activation="silu"):
        """Token by token and group by group in fp64, and the largest sum of absolute values of a result's terms."""
        act = ACTIVATIONS[activation]
        gate, up, down, x = (None if t is None else t.double() for t in (self.gate, self.up, self.down_t, self.x))
        sizes = {"gate_bias": len(up), "up_bias": len(up), "down_bias": x.shape[1]}
        bias = {k: x.new_zeros(sizes[k]) if b is None else b.double() for k, b in self.biases.items()}
        out, terms = torch.zeros_like(x), 0.0
        for token, row in enumerate(x):
            picked = self.chosen[token if len(self.chosen) > 1 else 0].tolist()
            weights = self.weights[token if len(self.weights) > 1 else 0].tolist()
            parts = [(slice(0, self.shared), 1.0)]
            for group, weight in zip(picked, weights):
                first = self.shared + group * self.width
                parts += [(slice(first, first + self.width), weight)] if group >= 0 else []
            out[token] += bias["down_bias"]
            total = torch.zeros_like(row)
            for n, weight in parts:
                h = up[n] @ row + bias["up_bias"][n]
                h = weight * (act(h) if gate is None else act(gate[n] @ row + bias["gate_bias"][n]) * h)
                out[token] += h @ down[n]
                total += h.abs() @ down[n].abs()
            terms = max(terms, float(total.max()))
        return out, terms


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "biases", "alike"), [(True, False, 1), (False, True, 1), (True, True, 0)])
def test_grouped_reference_is_the_loop_over_groups(activation, gated, biases, alike):
    case = Grouped(5, 17, 6, 3, 7, 3, gated, biases, alike=alike)
    case.chosen[0] = -1
    exact, _ = case.loop(activation)
    got = case.call(ffn_ops.grouped_reference, activation, torch.float64)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


CASES = pairwise(
    rows=[1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 65, 130],
    size=[64, 33, 1],
    layout=[(16, 8, 6, 3), (0, 5, 7, 2), (9, 1, 40, 20), (3, 24, 3, 3)],
    dtype=DTYPES,
    activation=list(WITH_KERNELS),
    gated=[True, False],
    biases=[False, True],
    alike=[1, 0],
    weighted=[True, False],
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.usefixtures("no_fallback")
def test_grouped_kernel_against_the_reference(case):
    made = Grouped(
        case["rows"], case["size"], *case["layout"], case["gated"], case["biases"], case["dtype"], case["alike"]
    )
    other = {} if case["weighted"] else {"weights": None}
    if not case["weighted"]:
        made.weights = torch.ones_like(made.weights)
    exact, terms = made.loop(case["activation"])
    with ops.reference_only():
        reference = made.call(OPS.grouped_ffn, case["activation"], **other)
    within(made.call(OPS.grouped_ffn, case["activation"], **other), reference, exact, terms, case["dtype"])


@pytest.mark.parametrize("rows", [1, 5, 64, 65])
@pytest.mark.usefixtures("no_fallback")
def test_rows_of_a_batch_are_independent(rows):
    case = Grouped(rows, 40, 8, 12, 6, 2)
    together = case.call(OPS.grouped_ffn)
    for token in {0, rows // 2, rows - 1}:
        one = slice(token, token + 1)
        alone = case.call(OPS.grouped_ffn, x=case.x[one], chosen=case.chosen[one], weights=case.weights[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.usefixtures("no_fallback")
def test_all_groups_are_the_dense_ffn_in_any_order_of_neurons(rows):
    case = Grouped(rows, 48, 10, 5, 6, 6)
    case.weights.fill_(1)
    case.chosen = torch.rand(rows, 6).argsort(-1).to(torch.int32)
    dense = F.linear(F.silu(F.linear(case.x, case.gate)) * F.linear(case.x, case.up), case.down_t.t())
    order = torch.randperm(40)
    moved = {name: getattr(case, name)[order] for name in ("gate", "up", "down_t")}
    torch.testing.assert_close(case.call(OPS.grouped_ffn), dense)
    torch.testing.assert_close(case.call(OPS.grouped_ffn, **moved), dense)


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.usefixtures("no_fallback")
def test_weights_that_nobody_chose_are_not_touched(rows):
    case = Grouped(rows, 48, 8, 16, 5, 2)
    case.chosen = case.chosen.where(case.chosen != 3, 1)
    expected = case.call(OPS.grouped_ffn)
    for matrix in (case.gate, case.up, case.down_t):
        matrix[8 + 3 * 16 : 8 + 4 * 16] = NAN
    assert torch.equal(case.call(OPS.grouped_ffn), expected)
    case.chosen[0, 0] = 3
    assert case.call(OPS.grouped_ffn)[0].isnan().all()


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.usefixtures("no_fallback")
def test_shared_neurons_alone_and_nothing_at_all(rows):
    case = Grouped(rows, 48, 24, 12, 4, 2, biases=True)
    part = [t[:24] for t in (case.gate, case.up, case.biases["gate_bias"], case.biases["up_bias"])]
    hidden = F.silu(F.linear(case.x, part[0], part[2])) * F.linear(case.x, part[1], part[3])
    expected = F.linear(hidden, case.down_t[:24].t(), case.biases["down_bias"])
    unused = torch.full_like(case.chosen, -1)
    torch.testing.assert_close(case.call(OPS.grouped_ffn, chosen=None, weights=None), expected)
    torch.testing.assert_close(case.call(OPS.grouped_ffn, chosen=unused), expected)
    case.shared, case.width = 0, 24
    nothing = case.call(OPS.grouped_ffn, chosen=unused)
    assert torch.equal(nothing, case.biases["down_bias"].expand(rows, -1))


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("activation", WITH_KERNELS)
@pytest.mark.usefixtures("no_fallback")
def test_nan_stays_in_its_row(rows, activation):
    case = Grouped(rows, 48, 8, 12, 4, 2, gated=activation != "relu")
    case.x[1, 5] = NAN
    assert case.call(OPS.grouped_ffn, activation).isnan().any(1).nonzero().tolist() == [[1]]


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.usefixtures("no_fallback")
def test_a_group_that_is_listed_twice_counts_twice(rows):
    case = Grouped(rows, 48, 8, 12, 4, 2)
    twice = torch.tensor([[2, 2]], dtype=torch.int32).expand(rows, 2)
    once = torch.tensor([[2, -1]], dtype=torch.int32).expand(rows, 2)
    doubled = torch.full((rows, 2), 2.0)
    expected = case.call(OPS.grouped_ffn, chosen=once, weights=doubled)
    torch.testing.assert_close(case.call(OPS.grouped_ffn, chosen=twice, weights=doubled / 2), expected)


@pytest.mark.parametrize("rows", [1, 3, 33, 70])
@pytest.mark.usefixtures("no_fallback")
def test_threads_share_out_the_work(rows):
    case = Grouped(rows, 70, 24, 20, 6, 3, biases=True)
    thresholds = torch.tensor([0.5, 0.4, 0.1])
    gate_t, up_t = case.gate.t().contiguous(), case.up.t().contiguous()
    router = torch.randn(2, 40, 70)

    def everything():
        few = case.x[:8]
        return (
            case.call(OPS.grouped_ffn),
            OPS.column_linear(few, gate_t, thresholds[0]),
            OPS.column_ffn(few, gate_t, up_t, case.down_t, thresholds, "silu", **case.biases),
            *OPS.route(case.x, *router, 3, "softmax", "score"),
        )

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0]):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rows", [1, 70])
def test_groups_that_are_not_there(rows):
    case = Grouped(rows, 16, 4, 4, 3, 2)
    case.chosen[-1, 0] = 3
    with pytest.raises(IndexError, match="there are 3"):
        case.call(OPS.grouped_ffn)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"activation": "swish"}, "'swish' is unknown; there are silu"),
        ({"up": torch.zeros(17, 16)}, "pad the last group"),
        ({"down_t": torch.zeros(16, 15)}, "down_t is"),
        ({"chosen": torch.zeros(3, 2, dtype=torch.int32)}, "chosen is"),
        ({"chosen": torch.zeros(2, 2)}, "chosen is"),
        ({"chosen": None}, "none are given"),
        ({"weights": torch.zeros(2, 3)}, "weights is"),
        ({"up_bias": torch.zeros(15)}, "up_bias is"),
    ],
)
def test_arguments_that_do_not_fit(other, text):
    case = Grouped(2, 16, 4, 4, 3, 2)
    with pytest.raises(ValueError, match=text):
        case.call(OPS.grouped_ffn, **other)


def test_weights_that_would_have_to_be_copied_are_declined():
    case = Grouped(2, 16, 4, 4, 3, 2)
    expected = case.call(OPS.grouped_ffn)
    with pytest.warns(UserWarning, match="with strides"):
        got = case.call(OPS.grouped_ffn, down_t=case.down_t.t().contiguous().t())
    torch.testing.assert_close(got, expected)


def exact_route(x, gate, up, top_k, score, weigh, choice_bias, logit_bias, scale, threshold):
    """Token by token in fp64: chosen, weights, counts."""
    rows, counts = [], [0] * len(gate)
    for row in x.double():
        logits = gate.double() @ row
        if up is not None:
            logits = F.silu(logits) * (up.double() @ row)
        logits = logits + logit_bias if logit_bias is not None else logits
        logits = logits.abs() if "abs" in score else logits
        p = torch.softmax(logits, 0) if "softmax" in score else torch.sigmoid(logits) if score == "sigmoid" else logits
        rank = (p if choice_bias is None else p + choice_bias).tolist()
        order = sorted(range(len(gate)), key=lambda g: (-rank[g], g))[:top_k]
        used = [g for g in order if threshold is None or rank[g] > threshold]
        total = sum(p[g] for g in used)
        unit = torch.ones_like(p) if scale is None else 1 + p * scale
        of = {"score": p, "normalized": p / total, "unit": unit}[weigh]
        free = top_k - len(used)
        rows.append((used + [-1] * free, [float(of[g]) for g in used] + [0.0] * free))
        for g in used:
            counts[g] += 1
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]).double(), torch.tensor(counts)


ROUTES = pairwise(
    rows=[1, 2, 5, 8, 9, 65],
    size=[64, 33],
    groups=[(14, 6), (5, 5), (17, 1)],
    score=list(ffn_ops.SCORES),
    weigh=list(ffn_ops.WEIGHTS),
    gated=[True, False],
    choice_bias=[False, True],
    logit_bias=[False, True],
    limited=[False, True],
    dtype=[torch.float32, torch.bfloat16],
)


@pytest.mark.parametrize("case", ROUTES, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c.values()))
@pytest.mark.parametrize("way", ["reference", "kernel"])
@pytest.mark.usefixtures("no_fallback")
def test_route_against_a_loop_in_fp64(case, way):
    size, (groups, top_k), dtype = case["size"], case["groups"], case["dtype"]
    x = torch.randn(case["rows"], size).to(dtype)
    gate, up = ((torch.randn(groups, size) / size**0.5).to(dtype) for _ in range(2))
    up = up if case["gated"] else None
    bias, logit = (torch.randn(groups) / 9 if case[name] else None for name in ("choice_bias", "logit_bias"))
    more = {"choice_bias": bias, "logit_bias": logit, "scale": torch.randn(groups)}
    head = x, gate, up, top_k, case["score"], case["weigh"]
    # Half-way between two scores that occur, so that no rounding decides.
    p = ffn_ops.route_reference(x.double(), gate, up, groups, case["score"], "score", bias, logit)
    ranked = torch.stack([r + (0 if bias is None else bias[c.long()]) for c, r in zip(p[0], p[1])]).flatten().sort()[0]
    threshold = float(ranked[len(ranked) // 2 - 1 : len(ranked) // 2 + 1].mean()) if case["limited"] else None
    exact = exact_route(*head, *more.values(), threshold)
    operator = OPS.route if way == "kernel" else ffn_ops.route_reference
    chosen, weights, counts = operator(*head, **more, threshold=threshold)
    assert torch.equal(chosen.long(), exact[0])
    assert torch.equal(counts.long(), exact[2])
    torch.testing.assert_close(weights.double(), exact[1], rtol=1e-5, atol=1e-6)
    assert (chosen.dtype, weights.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)


@pytest.mark.parametrize("way", ["reference", "kernel"])
def test_route_with_ties_and_nan(way):
    operator = OPS.route if way == "kernel" else ffn_ops.route_reference
    x, gate = torch.randn(3, 16), torch.randn(1, 16).expand(6, 16).contiguous()
    x[1] = 0
    x[2, 3] = NAN
    chosen, weights, counts = operator(x, gate, None, 3, "softmax", "score")
    assert chosen.tolist() == [[0, 1, 2]] * 3
    assert counts.tolist() == [3, 3, 3, 0, 0, 0]
    torch.testing.assert_close(weights[:2], torch.full((2, 3), 1 / 6))
    assert weights[2].isnan().all()
    # One group that is NaN by itself comes first, and no threshold stops it.
    bias = torch.zeros(6)
    bias[4] = NAN
    chosen, _, _ = operator(x[:1], gate, None, 3, "softmax", "unit", choice_bias=bias, threshold=0.5)
    assert chosen.tolist() == [[4, -1, -1]]


@pytest.mark.parametrize(
    ("other", "text"),
    [({"top_k": 4}, "there are 3"), ({"score": "max"}, "there are softmax"), ({"weigh": "p"}, "there are score")],
)
def test_route_arguments_that_do_not_fit(other, text):
    given = {"top_k": 2, "score": "softmax", "weigh": "score"} | other
    with pytest.raises(ValueError, match=text):
        OPS.route(torch.randn(2, 8), torch.randn(3, 8), None, *given.values())


def test_opcheck():
    case = Grouped(3, 16, 4, 4, 3, 2, biases=True)
    given = (case.x, case.gate, case.up, case.down_t, case.chosen, case.weights, 4, 4, "silu")
    torch.library.opcheck(OPS.grouped_ffn, given, case.biases)
    bias = torch.randn(3)
    torch.library.opcheck(
        OPS.route, (case.x, torch.randn(3, 16), torch.randn(3, 16), 2, "softmax", "unit"), {"choice_bias": bias}
    )
    x, thresholds = torch.randn(2, 3, 16), torch.tensor([0.1, 0.2, 0.3])
    torch.library.opcheck(OPS.column_linear, (x, torch.randn(16, 24), thresholds[0]), {"bias": torch.randn(24)})
    weights = torch.randn(16, 24), torch.randn(16, 24), torch.randn(24, 16)
    torch.library.opcheck(OPS.column_ffn, (x, *weights, thresholds, "silu"), {"down_scale": torch.rand(24)})


def test_a_graph_serves_every_number_of_tokens():
    case = Grouped(1, 32, 8, 8, 4, 2)

    def ffn(x):
        chosen, weights, _ = OPS.route(x, case.gate[:4].contiguous(), None, 2, "softmax", "normalized")
        return OPS.grouped_ffn(x, case.gate, case.up, case.down_t, chosen, weights, 8, 8, "silu")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 70):
        x = torch.randn(2, rows, 32)
        torch.testing.assert_close(compiled(x), ffn(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("library", [cpp_ffn.LIBRARY, cpp_ffn.MANY], ids=lambda library: library.name)
def test_sources_name_what_they_are(library):
    text = library.source(torch.bfloat16)
    assert text.startswith(f"// {library.name}_bfloat16\n")
    assert text.count('extern "C"') == text.count("<c10::BFloat16>") == len(library.entries)


def test_costs_count_the_bytes_that_are_there():
    case = Grouped(3, 40, 8, 12, 5, 2)
    case.chosen = torch.tensor([[0, 1], [1, 4], [4, -1]], dtype=torch.int32)
    uses, active = 5, 3
    touched = sum(t[: 8 + active * 12].nbytes for t in (case.gate, case.up, case.down_t))
    counted = ffn_cost.grouped_ffn(3, 40, shared=8, width=12, active=active, uses=uses)
    assert counted.bytes == touched + 2 * case.x.nbytes + uses * 8
    assert counted.flops == 2 * 3 * 40 * (3 * 8 + uses * 12)
    weight, x = torch.empty(64, 48), torch.empty(2, 64)
    none, half, full = (ffn_cost.column_linear(2, 64, 48, kept=k) for k in (0, 32, 64))
    assert full.bytes - none.bytes == weight.nbytes == 2 * (half.bytes - none.bytes)
    assert none.bytes == x.nbytes + 2 * 48 * 4 + 4
    three = ffn_cost.column_ffn(2, 64, 48, kept=(32, 16, 24))
    assert three.bytes == (48 * 48 + 24 * 64) * 4 + 2 * x.nbytes + 12
    router = ffn_cost.route(2, 64, 6, 2)
    assert router.bytes == 2 * torch.empty(6, 64).nbytes + x.nbytes + 2 * 2 * 8 + 6 * 4
    assert ffn_cost.groups_used(6, 6, 1) == 6

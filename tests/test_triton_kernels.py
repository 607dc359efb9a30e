"""Generated Triton kernels against the reference bodies, in Triton's interpreter, on the CPU.

The interpreter is chosen when Triton is imported, so these tests run in a child process with TRITON_INTERPRET=1; the
one test that pytest sees here starts it. ``TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py`` shows each case.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED, interpreted
from pairs import pairwise
from stores import fp8_edges
from torch import Tensor

from effcompile.kernels import attention, ops, quantize
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, ScoreParts
from effcompile.lowering import triton as lowering

if INTERPRETED:
    import triton
    import triton.language as tl

    from effcompile.kernels.triton.softmax import tanh

    @triton.jit
    def tanh_kernel(x, y, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(y + at, tanh(tl.load(x + at)))


State = list[Tensor | None]


test_in_the_interpreter, test_more_in_the_interpreter = interpreted(__file__)


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few splits, not a power of two, over the small capacities of these tests."""
    monkeypatch.setattr(lowering, "splits_for", lambda heads, capacity, _: max(1, min(3, capacity // 128)))


def empty(form: KVForm, batch: int, heads: int, capacity: int, sizes: tuple[int, int], dtype: torch.dtype) -> State:
    """The six state arguments, poisoned: NaN, and codes of ones."""
    state: State = []
    for kind, size in zip(("key", "value"), sizes):
        buffers = form.buffers(kind, batch, heads, capacity, size, dtype)  # type: ignore[arg-type]
        side: State = [
            torch.full(shape, float("nan") if kind_dtype.is_floating_point else 255, dtype=kind_dtype)
            for shape, kind_dtype in buffers
        ]
        state += side + [None] * (3 - len(side))
    return state


def assert_same(a: State, b: State) -> None:
    for name, x, y in zip(("k0", "k1", "k2", "v0", "v1", "v2"), a, b):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


def tokens(batch: int, count: int, heads: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """``[B, heads, T, size]`` with the strides a model gives: tokens outside heads. Some channels are outliers."""
    x = torch.randn(batch, count, heads, size, generator=torch.Generator().manual_seed(seed))
    x[..., ::7] *= 6
    return x.to(dtype).transpose(1, 2)


def store(op: object, state: State, key: Tensor, value: Tensor, form: KVForm, steps: list[int]) -> None:
    at = 0
    for step in steps:
        op(*state, torch.tensor(at), key[:, :, at : at + step], value[:, :, at : at + step], form.name)  # type: ignore[operator]
        at += step


def reference_store(*args: object) -> None:
    with ops.reference_only():
        torch.ops.effcompile.kv_store(*args)


FORMS = [
    KVForm(16, 16),
    KVForm(8, 8, 32, 32),
    KVForm(4, 4),
    KVForm(4, 4, 16, 0),
    KVForm(8, 4, 16, 32),
    KVForm(4, 16, 32, 64),
    KVForm(16, 8, 32, 0),
    KVForm(2, 2),
    KVForm(3, 3, 32, 0),
    KVForm(3, 2, 16, 32),
]
SIZES = [(64, 64), (80, 80), (96, 64), (128, 128), (64, 96), (256, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    case
    for case in pairwise(
        form=FORMS,
        sizes=SIZES,
        dtype=DTYPES,
        queries=[1, 3, 17, 63],
        length=[1, 63, 65, 300],
        ratio=[1, 3, 4],
        batch=[1, 2],
        window=[None, 40],
        masked=[False, True],
        causal=[True, True, False],
    )
    if case["queries"] <= case["length"]
]


OTHER_FORMS = [
    KVForm("fp8", "fp8", 32, 32),
    KVForm(4, 4, 32, 32, "token", "channel"),
    KVForm("fp8", 3, 16, 0, "token", "channel"),
    KVForm(3, "fp8", 32, 0, "token", "channel"),
    KVForm(8, 2, 16, 16, "channel", "channel"),
    KVForm(2, 8, 16, 0, "token"),
]
"""Scales along the other axis, and fp8."""
OTHER_SIZES = [(64, 64), (96, 80), (64, 64), (96, 80), (64, 64), (96, 32)]
OTHER_CASES = [
    {"form": form, "sizes": sizes, "dtype": dtype, "queries": queries, "length": 65, "ratio": 3, "batch": 2,
     "window": window, "masked": masked, "causal": True}
    for form, sizes, dtype, queries, window, masked in zip(
        OTHER_FORMS, OTHER_SIZES, DTYPES * 2, [1, 17, 3] * 2, [None, None, 40] * 2, [False, True] * 3
    )
]  # fmt: skip
MORE_CASES = pairwise(
    form=OTHER_FORMS, sizes=[(64, 64), (96, 32)], dtype=DTYPES, queries=[1, 3, 17], length=[65, 200], ratio=[1, 3],
    batch=[2], window=[None, 40], masked=[False, True], causal=[True, False],
)  # fmt: skip
CASES += OTHER_CASES
PARTS = [
    case
    for case in pairwise(
        score=[ScoreParts(True), ScoreParts(False, True), ScoreParts(False, False, True), ScoreParts(True, True, True)],
        form=[KVForm(16, 16), KVForm(4, 4, 16, 0), KVForm(3, 8, 32, 32)],
        sizes=[(64, 64), (80, 96)],
        dtype=DTYPES,
        queries=[1, 17],
        length=[63, 300],
        ratio=[1, 3],
        shape=[(1, 1, 1), (0, 1, 0), (1, 0, 1)],
        window=[None, 40],
        masked=[False, True],
    )
]
"""Of ``shape``: whether a bias has batch, heads and queries of its own."""


def divides(form: KVForm, sizes: tuple[int, int]) -> bool:
    return form.value_bits == 16 or form.value_axis == "channel" or sizes[1] % form.group == 0


def name_of(case: dict[str, object]) -> str:
    return "-".join(str(getattr(v, "name", v)).replace("torch.", "") for v in case.values())


class TestAttend:
    """Error budget: against fp64, at most twice what PyTorch in the model's dtype loses, plus one rounding."""

    __test__ = INTERPRETED

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_CASES, ids=name_of)
    def test_more_within_twice_the_loss_of_the_dtype(self, case: dict[str, object]) -> None:
        self.test_within_twice_the_loss_of_the_dtype(case)

    @pytest.mark.one_in(3, rest="exhaustive")
    @pytest.mark.parametrize("case", [c for c in CASES if divides(c["form"], c["sizes"])], ids=name_of)
    def test_within_twice_the_loss_of_the_dtype(self, case: dict[str, object]) -> None:
        form, sizes, dtype = case["form"], case["sizes"], case["dtype"]
        batch, ratio, queries, length = case["batch"], case["ratio"], case["queries"], case["length"]
        groups, capacity = 2, (length // form.group + 4) * form.group
        state = empty(form, batch, groups, capacity, sizes, dtype)
        key, value = (tokens(batch, length, groups, size, dtype, seed) for seed, size in enumerate(sizes))
        reference_store(*state, torch.tensor(0), key, value, form.name)
        query = tokens(batch, queries, groups * ratio, sizes[0], dtype, 2)
        mask = None
        if case["masked"]:
            mask = torch.rand(batch, capacity, generator=torch.Generator().manual_seed(3)) > 0.3
        scale, window = sizes[0] ** -0.5 / 6, case["window"]
        predicate = Predicate(case["causal"], window, mask is not None)
        out, lse = lowering.attend(
            query,
            *state,
            torch.tensor(length),
            mask,
            form.name,
            scale,
            predicate.causal,
            -1 if window is None else window,
        )
        assert out.dtype == dtype
        assert out.is_contiguous()

        keys, values = ops.split_state(tuple(state))
        k, v = (quantize.load_side(s, length, form, kind) for s, kind in ((keys, "key"), (values, "value")))
        keep = attention.allowed(predicate, queries, length, mask, query.device)
        best, best_lse = attend(query.double(), k.double(), v.double(), keep, scale, torch.float64)
        low, low_lse = attend(query, k, v, keep, scale, dtype)
        blind = best_lse.isinf()
        assert torch.equal(lse.isinf(), blind)
        assert out[blind].eq(0).all()
        rounding = torch.finfo(dtype).eps * best.abs().max()
        # Scores are summed, scaled to base 2 and shifted in fp32: each rounding moves a weight by as much of it.
        shifting = 3 * 2.0**-24 * largest_score(query, k, scale) * v.abs().max()
        assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding + shifting

        # The lse is fp32, whatever the dtype: what summing D products in fp32 may lose is added.
        summing = sizes[0] * 2.0**-23 * scale * (query.double().abs().amax() * k.double().abs().amax())
        difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
        assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6

    @pytest.mark.one_in(3, rest="exhaustive")
    @pytest.mark.parametrize("case", [c for c in PARTS if divides(c["form"], c["sizes"])], ids=name_of)
    def test_score_parts(self, case: dict[str, object]) -> None:
        """The same budget; scores of either sign, well beyond the cap and near 0."""
        form, sizes, dtype, score = case["form"], case["sizes"], case["dtype"], case["score"]
        batch, ratio, queries, length, groups = 2, case["ratio"], case["queries"], case["length"], 2
        capacity, heads = (length // form.group + 4) * form.group, groups * ratio
        state = empty(form, batch, groups, capacity, sizes, dtype)
        key, value = (tokens(batch, length, groups, size, dtype, seed) for seed, size in enumerate(sizes))
        reference_store(*state, torch.tensor(0), key, value, form.name)
        query = tokens(batch, queries, heads, sizes[0], dtype, 2)
        random = torch.Generator().manual_seed(3)
        mask = torch.rand(batch, capacity, generator=random) > 0.3 if case["masked"] else None
        scale, window, parts = sizes[0] ** -0.5 / 6, case["window"], {}
        if score.softcap:
            parts["softcap"] = 0.7
        if score.bias:
            shape = [n if own else 1 for n, own in zip((batch, heads, queries), case["shape"])]
            parts["bias"] = torch.randn(*shape, capacity, generator=random) * 2
        if score.sinks:
            parts["sinks"] = torch.linspace(-2, 4, heads).to(dtype)
        predicate = Predicate(True, window, mask is not None)
        out, lse = lowering.attend(
            query, *state, torch.tensor(length), mask, form.name, scale, True, -1 if window is None else window, **parts
        )
        keys, values = ops.split_state(tuple(state))
        k, v = (quantize.load_side(s, length, form, kind) for s, kind in ((keys, "key"), (values, "value")))
        keep = attention.allowed(predicate, queries, length, mask, query.device)
        best, best_lse = attend(query.double(), k.double(), v.double(), keep, scale, torch.float64, **parts)
        low, low_lse = attend(query, k, v, keep, scale, dtype, **parts)
        rounding = torch.finfo(dtype).eps * best.abs().max()
        # As above; a capped score has three roundings more, and a bias is scaled to base 2 and added: two.
        largest = largest_score(query, k, scale) + (parts["bias"].abs().max() if score.bias else 0)
        shifting = 8 * 2.0**-24 * largest * v.abs().max()
        assert (out.double() - best).abs().max() <= 2 * (low.double() - best).abs().max() + rounding + shifting
        blind = best_lse.isinf()
        assert torch.equal(lse.isinf(), blind)
        summing = sizes[0] * 2.0**-23 * scale * (query.double().abs().amax() * k.double().abs().amax())
        difference = (lse - best_lse).masked_fill(blind, 0).abs().max()
        assert difference <= 2 * (low_lse - best_lse).masked_fill(blind, 0).abs().max() + summing + 1e-6

    def test_tanh(self) -> None:
        """Within four units in the last place, near 0 and far from it; what is infinite is 1."""
        sizes = torch.logspace(-30, 2, 2046, dtype=torch.float64).float()
        x = torch.cat([sizes, -sizes, torch.tensor([0.0, 0.5, float("inf"), float("-inf")])])
        y = torch.empty_like(x)
        tanh_kernel[(1,)](x, y, 4096)
        exact = x.double().tanh()
        assert ((y.double() - exact).abs() <= 4 * 2.0**-24 * exact.abs()).all()

    @pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4, float("-inf")])
    def test_sinks_of_any_size(self, sink: float) -> None:
        """In one part and in several, with keys and without: one that takes all leaves 0, and -inf takes nothing."""
        form = KVForm(16, 16)
        for queries, capacity, length in ((1, 64, 50), (1, 512, 300), (20, 512, 300), (1, 512, 0)):
            state = empty(form, 1, 2, capacity, (64, 64), torch.float32)
            key, value = (tokens(1, length, 2, 64, torch.float32, seed) for seed in (0, 1))
            reference_store(*state, torch.tensor(0), key, value, form.name)
            args = (tokens(1, queries, 4, 64, torch.float32, 2), *state, torch.tensor(length), None, form.name, 0.01)
            sinks = torch.full((4,), sink)
            out, lse = lowering.attend(*args, True, -1, sinks=sinks)
            with ops.reference_only():
                wanted, wanted_lse = torch.ops.effcompile.attend(*args, True, -1, sinks=sinks)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-5)

    def test_operands_that_do_not_fit(self) -> None:
        state = empty(KVForm(16, 16), 1, 2, 64, (64, 64), torch.float32)
        args = (torch.zeros(1, 4, 1, 64), *state, torch.tensor(3), None, "k16v16g32r128", 1.0, True, -1)
        for wrong in ({"bias": torch.zeros(1, 4, 1, 63)}, {"bias": torch.zeros(4, 1, 64)}, {"sinks": torch.zeros(2)}):
            with pytest.raises(ops.KernelUnavailable, match=r"(a bias|sinks) of"):
                lowering.attend(*args, **wrong)

    def test_empty_store_and_no_visible_key(self) -> None:
        form = KVForm(4, 4)
        state = empty(form, 1, 1, 128, (64, 64), torch.bfloat16)
        for queries in (1, 40):
            query = tokens(1, queries, 1, 64, torch.bfloat16, 0)
            out, lse = lowering.attend(query, *state, torch.tensor(0), None, form.name, 1.0, True, -1)
            assert out.eq(0).all()
            assert torch.equal(lse, torch.full_like(lse, float("-inf")))

    @pytest.mark.parametrize("form", [KVForm(16, 16), KVForm(4, 4, 32, 32)], ids=lambda f: f.name)
    def test_decode_and_prefill_agree(self, form: KVForm) -> None:
        """The last rows of a prefill are what decode of those rows gives, to the rounding of fp32."""
        state = empty(form, 1, 2, 512, (64, 64), torch.float32)
        key, value = (tokens(1, 300, 2, 64, torch.float32, seed) for seed in (0, 1))
        reference_store(*state, torch.tensor(0), key, value, form.name)
        query = tokens(1, 40, 4, 64, torch.float32, 2)
        args = (*state, torch.tensor(300), None, form.name, 0.05, True, -1)
        many, _ = lowering.attend(query, *args)
        few, _ = lowering.attend(query[:, :, -2:], *args)
        torch.testing.assert_close(many[:, :, -2:], few, rtol=1e-5, atol=1e-5)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with every operand rounded to ``dtype`` and sums in fp32 (fp64 for fp64): PyTorch's usual precision."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ratio = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype).to(wide) for x in (query, key, value))
    k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    score = q @ k.mT * scale
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    if bias is not None:
        score = score + bias[..., : k.shape[2]].to(wide)
    score = score.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.to(wide)[:, None, None].expand(*score.shape[:3], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    return (weight.to(dtype).to(wide) @ v).to(dtype), lse


def largest_score(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The largest magnitude of ``q @ k * scale``."""
    ratio = query.shape[1] // key.shape[1]
    return (query.double() @ key.double().repeat_interleave(ratio, 1).mT).abs().max() * scale


STORE_CASES = [
    case
    for case in pairwise(
        form=[*FORMS, KVForm(4, 4, 32, 0)], sizes=SIZES, dtype=DTYPES, length=[1, 65, 200], batch=[1, 2]
    )
    if divides(case["form"], case["sizes"])
]
STORE_CASES += [{k: case[k] for k in ("form", "sizes", "dtype", "length", "batch")} for case in OTHER_CASES]
MORE_STORE_CASES = pairwise(form=OTHER_FORMS, sizes=[(64, 64), (96, 32)], dtype=DTYPES, length=[65, 200], batch=[2])


class TestStore:
    """Bits equal: codes, scales, tails, and every byte that is not to be written."""

    __test__ = INTERPRETED

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("case", MORE_STORE_CASES, ids=name_of)
    def test_more_bit_identical(self, case: dict[str, object]) -> None:
        self.test_bit_identical(case)

    @pytest.mark.one_in(3, rest="exhaustive")
    @pytest.mark.parametrize("case", STORE_CASES, ids=name_of)
    def test_bit_identical(self, case: dict[str, object]) -> None:
        form, sizes, dtype, length, batch = (case[k] for k in ("form", "sizes", "dtype", "length", "batch"))
        key, value = (tokens(batch, length, 2, size, dtype, seed) for seed, size in enumerate(sizes))
        key[:, :, :, 3] = 0.5  # a constant channel: scale 0
        steps = [length] if length < 3 else [length // 2, 1, length - length // 2 - 1]
        states = [empty(form, batch, 2, 256, sizes, dtype) for _ in range(2)]
        store(reference_store, states[0], key, value, form, steps)
        store(lowering.kv_store, states[1], key, value, form, steps)
        assert_same(*states)
        with ops.reference_only():
            expected = torch.ops.effcompile.kv_load(*states[0], torch.tensor(length), form.name)
        for x, y in zip(expected, lowering.kv_load(*states[1], torch.tensor(length), form.name)):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("form", [KVForm(4, 8, 16, 0), KVForm("fp8", "fp8", 16, 0)], ids=lambda f: f.name)
    def test_nan_and_infinity(self, form: KVForm) -> None:
        x = tokens(1, 32, 1, 32, torch.float32, 0)
        x[0, 0, 3, 4], x[0, 0, 20, 5], x[0, 0, 21, 31] = float("nan"), float("inf"), float("-inf")
        x[0, 0, :, 9], x[0, 0, 30] = -0.0, 1e38
        states = [empty(form, 1, 1, 32, (32, 32), torch.float32) for _ in range(2)]
        store(reference_store, states[0], x, x, form, [32])
        store(lowering.kv_store, states[1], x, x, form, [32])
        assert_same(*states)

    def test_numbers_on_every_edge_of_fp8(self) -> None:
        form, x = KVForm("fp8", "fp8", 32, 0, "token", "token"), fp8_edges()
        states = [empty(form, 1, 1, 64, (32, 32), torch.float32) for _ in range(2)]
        store(reference_store, states[0], x, x, form, [64])
        store(lowering.kv_store, states[1], x, x, form, [64])
        assert_same(*states)
        with ops.reference_only():
            expected, _ = torch.ops.effcompile.kv_load(*states[0], torch.tensor(64), form.name)
        for found in lowering.kv_load(*states[1], torch.tensor(64), form.name):
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))

    @pytest.mark.parametrize("form", [KVForm(4, 4, 16, 0), KVForm(8, 4, 16, 16)], ids=lambda f: f.name)
    def test_one_by_one_is_one_call(self, form: KVForm) -> None:
        key, value = (tokens(1, 50, 1, 32, torch.bfloat16, seed) for seed in (0, 1))
        states = [empty(form, 1, 1, 64, (32, 32), torch.bfloat16) for _ in range(2)]
        store(lowering.kv_store, states[0], key, value, form, [50])
        store(lowering.kv_store, states[1], key, value, form, [1] * 50)
        packed = form.packed(50)
        loads = [lowering.kv_load(*state, torch.tensor(50), form.name) for state in states]
        assert packed > 0
        for x, y in zip(*loads):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("form", [KVForm(16, 16), KVForm(4, 8, 16, 0)], ids=lambda f: f.name)
    @pytest.mark.parametrize("count", [1, 40])
    def test_writes_stop_at_the_capacity(self, form: KVForm, count: int) -> None:
        """A length at the end of the buffers writes nothing outside them: every buffer lies between two guards."""
        plain = empty(form, 1, 1, 64, (32, 32), torch.float32)
        flat = [None if t is None else torch.full((t.numel() + 8192,), 7, dtype=t.dtype) for t in plain]
        state = [None if t is None else f[4096:-4096].view(t.shape) for t, f in zip(plain, flat)]
        for length in (40, 63, 64, 80):
            new = tokens(1, count, 1, 32, torch.float32, 0)
            lowering.kv_store(*state, torch.tensor(length), new, new, form.name)
        for f in flat:
            if f is not None:
                assert f[:4096].eq(7).all()
                assert f[-4096:].eq(7).all()

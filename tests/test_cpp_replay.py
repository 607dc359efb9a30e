"""Calls of operators that do not go through Python: the same results, and only where the decision cannot be another."""

from __future__ import annotations

import concurrent.futures
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_value_latent_kernels import PROGRAMS, ValueCall
from torch import Tensor

from effcompile.kernels import ops, weight_ops
from effcompile.kernels.form import KVForm
from effcompile.kernels.ops import CapacityError
from effcompile.lowering import cpp_replay

OPS = torch.ops.effcompile
GROUPS, HEADS, SIZE, CAPACITY = 2, 6, 64, 256
FORMS = [KVForm(16, 16).name, KVForm(4, 4).name]

Call = tuple[Any, list[Any], dict[str, Any]]


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    if not cpp_replay.wait():  # a test before may have done without a compiler
        cpp_replay._building.cache_clear()
        cpp_replay._installed.clear()
        assert cpp_replay.wait()
    assert all(map(cpp_replay.install, ("attend", "kv_store", "quantized_linear", "low_rank_linear", "linear")))
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def stored(
    form: str, tokens: int, dtype: torch.dtype, capacity: int = CAPACITY, seed: int = 0
) -> tuple[list[Any], Any]:
    """The six buffers with random tokens in them, and the length."""
    generator, parsed, state = torch.Generator().manual_seed(seed), KVForm.parse(form), []
    for kind in ("key", "value"):
        shapes = parsed.buffers(kind, 1, GROUPS, capacity, SIZE, dtype)  # type: ignore[arg-type]
        made = [torch.zeros(shape, dtype=kind_dtype) for shape, kind_dtype in shapes]
        state += made + [None] * (3 - len(made))
    key, value = (torch.randn(1, GROUPS, tokens, SIZE, generator=generator).to(dtype) for _ in "kv")
    with ops.reference_only():
        OPS.kv_store(*state, torch.tensor(0), key, value, form)
    return state, torch.tensor(tokens)


def attention(form: str = FORMS[0], tokens: int = 200, dtype: torch.dtype = torch.float32, **more: Any) -> Call:
    seed = more.pop("seed", 0)
    state, length = stored(form, tokens, dtype, seed=seed)
    query = torch.randn(1, HEADS, 1, SIZE, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    mask, scale = more.pop("mask", None), more.pop("scale", 0.125)
    return OPS.attend.default, [query, *state, length, mask, form, scale, True, -1], more


def parts(bias: int = CAPACITY, segments: int = CAPACITY) -> dict[str, Any]:
    """Everything that a score goes through, and rules that compare data, for so many columns."""
    first = torch.arange(segments)[None] < 100
    return {
        "softcap": 20.0,
        "bias": torch.randn(1, HEADS, 1, bias),
        "sinks": torch.randn(HEADS),
        "segments": first.long(),
        "prefix": torch.randint(200, (1,)),
    }


def latents(seed: int = 0) -> Call:
    """Attention over latents of keys and of values, with a table and a mask: all addresses there are."""
    torch.manual_seed(seed)
    made = ValueCall(PROGRAMS[0], 200, 1)
    assert made.mask is not None
    mask = torch.nn.functional.pad(made.mask, (0, 256 - made.mask.shape[1]))
    return OPS.attend.default, [
        made.query, *made.state, torch.tensor(200), mask, made.program.form.name, made.scale, False, -1,
    ], made.more  # fmt: skip


def storing(form: str = FORMS[0], tokens: int = 200, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    state, length = stored(form, tokens, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    key, value = (torch.randn(1, GROUPS, 1, SIZE, generator=generator).to(dtype) for _ in "kv")
    return OPS.kv_store.default, [*state, length, key, value, form], {}


def quantized(
    bits: int = 4, group: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32, rows: int = 2, seed: int = 0
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(rows, 64, generator=generator).to(dtype)
    packed = weight_ops.pack(*weight_ops.round_to_nearest(weight, bits, group, False), bits)
    added = torch.randn(48, generator=generator).to(dtype) if bias else None
    return OPS.quantized_linear.default, [x, *packed, added, 48, bits, group], {}


def low_rank(residual: bool = True, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    x, down, up, bias, values = (torch.randn(n, generator=generator) for n in ((2, 64), (8, 64), (48, 8), (48,), (96,)))
    columns = torch.randint(64, (96,), generator=generator, dtype=torch.int16)
    lists = [values, columns, torch.arange(0, 98, 2, dtype=torch.int32)] if residual else []
    return OPS.low_rank_linear.default, [x, down, up, bias, *lists], {}


def linear(seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return OPS.linear.default, [torch.randn(n, generator=generator) for n in ((2, 64), (48, 64), (48,))], {}


def copied(call: Call) -> Call:
    op, args, more = call
    return op, [a.clone() if isinstance(a, Tensor) else a for a in args], more


def run(call: Call) -> tuple[bool, list[Tensor]]:
    """Whether the call went past Python, and its results with what it may have written."""
    op, args, more = call
    name = op._schema.name.removeprefix("effcompile::")
    before = cpp_replay.replayed(name)
    out = op(*args, **more)
    results = [out] if isinstance(out, Tensor) else list(out or ())
    return cpp_replay.replayed(name) > before, results + [a for a in args if isinstance(a, Tensor)]


def through_python(call: Call) -> list[Tensor]:
    ops.replay_state.held += 1
    try:
        done, results = run(call)
    finally:
        ops.replay_state.held -= 1
    assert not done
    return results


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_not_shared(first: Call, second: Call) -> None:
    """What serves ``first`` does not serve ``second``, which then has its own."""
    run(copied(first))
    assert run(copied(first))[0]
    expected = through_python(copied(second))
    done, results = run(copied(second))
    assert not done
    assert_equal(results, expected)
    done, results = run(copied(second))
    assert done
    assert_equal(results, expected)


CALLS: dict[str, Callable[..., Call]] = {
    **{f"attend-{form}": lambda form=form, **more: attention(form, **more) for form in FORMS},
    **{f"kv_store-{form}": lambda form=form, **more: storing(form, **more) for form in FORMS},
    "attend-mask": lambda seed=0: attention(mask=torch.arange(CAPACITY)[None] % 3 != seed, seed=seed),
    "attend-parts": lambda seed=0: attention(**parts(), seed=seed),
    "attend-latents": latents,
    "quantized_linear": quantized,
    "quantized_linear-fp16": lambda **more: quantized(3, 64, bias=False, dtype=torch.float16, **more),
    "low_rank_linear": low_rank,
    "low_rank_linear-plain": lambda **more: low_rank(residual=False, **more),
    "linear": linear,
}  # fmt: skip


def listed(cases: dict[str, Any], slow: str) -> list[Any]:
    """The cases, of which ``slow`` is one that builds a program for itself."""
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name == slow)) for name, case in cases.items()]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("make", listed(CALLS, slow="attend-parts"))
def test_later_calls_with_other_tensors(make: Callable[..., Call]) -> None:
    """The second of two equal calls does without Python, with other addresses and other values."""
    assert not run(make())[0]
    for seed in (1, 2):
        call = make(seed=seed)
        expected = through_python(copied(call))
        done, results = run(call)
        assert done
        assert_equal(results, expected)


OTHERS: dict[str, tuple[Callable[[], Call], Callable[[], Call]]] = {
    "dtype": (quantized, lambda: quantized(dtype=torch.bfloat16)),
    # Dense sides have no groups and no tail: the buffers are the same.
    "form": (attention, lambda: attention(KVForm(16, 16, 16).name)),
    "scale": (attention, lambda: attention(scale=0.25)),
    "mask": (attention, lambda: attention(mask=torch.arange(CAPACITY)[None] > 40)),
    "rows": (quantized, lambda: quantized(rows=3)),
    "bits": (quantized, lambda: quantized(8)),
    "bias": (quantized, lambda: quantized(bias=False)),
    "residual": (low_rank, lambda: low_rank(residual=False)),
}


@pytest.mark.parametrize("pair", listed(OTHERS, slow="form"))
def test_another_fact_is_another_call(pair: tuple[Callable[[], Call], Callable[[], Call]]) -> None:
    first, second = pair
    assert_not_shared(first(), second())


def test_other_strides_are_another_call() -> None:
    """Queries as models give them: the heads of a token side by side."""
    op, (_, *args), more = attention()
    four = torch.randn(1, HEADS, 4, SIZE)
    across = torch.empty(1, 4, HEADS, SIZE).transpose(1, 2).copy_(four)
    run((op, [four, *args], more))
    assert run((op, [four, *args], more))[0]
    expected = through_python((op, [across, *args], more))
    for wanted in (False, True):
        done, results = run((op, [across, *args], more))
        assert done == wanted
        assert_equal(results, expected)


def test_another_number_of_threads_is_another_call() -> None:
    for call in (attention(FORMS[1]), quantized()):
        torch.set_num_threads(1)
        run(call)
        assert run(call)[0]
        torch.set_num_threads(2)
        assert not run(call)[0]
        assert run(call)[0]
        torch.set_num_threads(1)
        assert run(call)[0]


def test_the_length_is_read_at_each_call() -> None:
    op, args, more = attention(FORMS[1])
    run((op, args, more))
    for tokens in (1, 130, 200):
        args[7].fill_(tokens)
        expected = through_python((op, args, more))
        done, results = run((op, args, more))
        assert done
        assert_equal(results, expected)


def test_what_had_to_be_copied_is_not_kept() -> None:
    x, weight = torch.randn(2, 64), torch.randn(64, 48).t()
    for _ in range(3):
        done, (got, *_) = run((OPS.linear.default, [x, weight, None], {}))
        assert not done
        torch.testing.assert_close(got, torch.nn.functional.linear(x, weight))
    op, (query, *args), more = attention()
    wide = torch.stack([query, query], 4)[..., 0]
    for _ in range(3):
        assert not run((op, [wide, *args], more))[0]


def test_what_was_compared_with_the_length_is_not_kept() -> None:
    """A mask that ends before the store is enough for some lengths only."""
    call = attention(mask=torch.ones(1, 200, dtype=torch.bool))
    for _ in range(3):
        assert not run(call)[0]
    call[1][7].fill_(201)
    with pytest.warns(UserWarning, match="a key mask of"), pytest.raises(RuntimeError):
        run(call)


@pytest.mark.slow
def test_nor_are_other_operands_that_end_before_the_store() -> None:
    for more in (parts(bias=200), parts(segments=200)):
        call = attention(**more)
        for _ in range(3):
            assert not run(call)[0]


@pytest.mark.parametrize("form", FORMS)
def test_beyond_the_capacity(form: str) -> None:
    store, read = storing(form), attention(form)
    for call in (store, read):
        run(call)
        assert run(copied(call))[0]
    args = store[1]
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    args[6].fill_(CAPACITY)
    before[-3].fill_(CAPACITY)
    with pytest.raises(CapacityError, match=f"{CAPACITY} tokens are cached and 1 more were given"):
        run(store)
    assert_equal([a for a in args if isinstance(a, Tensor)], before)
    read[1][7].fill_(CAPACITY + 1)
    with pytest.raises(CapacityError, match="is not within the capacity"):
        run(read)


def test_reference_only_holds_in_spite_of_a_plan() -> None:
    call = quantized()
    run(call)
    assert run(call)[0]
    with ops.reference_only():
        with ops.reference_only():
            assert not run(call)[0]
        done, (got, *_) = run(call)
        assert not done
        assert torch.equal(got, weight_ops.reference(*call[1]))
    assert run(call)[0]


def test_another_launcher_gets_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    call, ours, seen = quantized(), ops._launchers["quantized_linear", "cpu"], []

    def watched(*args: Any) -> Any:
        seen.append(args)
        return ours(*args)

    run(call)
    assert run(call)[0]
    with monkeypatch.context() as patch:
        patch.setitem(ops._launchers, ("quantized_linear", "cpu"), watched)
        for _ in range(3):
            assert not run(call)[0]
        assert len(seen) == 3
    assert not run(call)[0]
    assert run(call)[0]
    with monkeypatch.context() as patch:
        patch.delitem(ops._launchers, ("quantized_linear", "cpu"))
        assert not run(call)[0]


def test_errors_stay_what_they_are() -> None:
    op, args, more = quantized()
    run((op, args, more))
    with pytest.raises(ValueError, match="scales is torch\\.float32"):
        op(args[0], args[1], args[2].float(), *args[3:])
    with pytest.raises(ValueError, match="bits is 5"):
        op(*args[:6], 5, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run((op, args, more))[0]


def test_threads_call_beside_each_other() -> None:
    calls = [quantized(bits, group, seed=seed) for bits in (4, 8) for group in (32, 64) for seed in range(3)]
    expected = [through_python(call) for call in calls]
    start = threading.Barrier(4)

    def work(_: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                for call, wanted in zip(calls, expected, strict=True):
                    assert torch.equal(call[0](*call[1]), wanted[0])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert all(run(call)[0] for call in calls)


def test_what_pytorch_asks_of_an_operator() -> None:
    for call in (quantized(), storing(FORMS[1]), attention(FORMS[1])):
        run(call)
        assert run(call)[0]
        torch.library.opcheck(call[0], tuple(call[1]), call[2])


def test_inference_mode_and_gradients() -> None:
    op, args, more = quantized()
    run((op, args, more))
    with torch.inference_mode():
        done, (got, *_) = run((op, args, more))
        assert done
        assert got.is_inference()
    done, (got, *_) = run((op, args, more))
    assert done
    assert not got.is_inference()
    assert not got.requires_grad


def test_without_the_library_python_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
    failed.set_exception(RuntimeError("no compiler"))
    monkeypatch.setattr(cpp_replay, "_building", lambda: failed)
    monkeypatch.setattr(cpp_replay, "_installed", {})
    assert not cpp_replay.wait()
    call = quantized()
    for _ in range(3):
        done, (got, *_) = run(call)
        assert not done
        torch.testing.assert_close(got, weight_ops.reference(*call[1]))
    assert cpp_replay._installed == {"quantized_linear": 0}

"""Keys as latents: the factors, and the operators against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile as ec
from effcompile.kernels import latent, ops, rope
from effcompile.kernels.form import FormError, KVForm


@pytest.mark.parametrize("rank", [16, 48, 96])
def test_factors_are_the_nearest_of_their_rank(rank: int) -> None:
    """Eckart and Young: what is lost is the squares of the singular values that were dropped."""
    weight = torch.randn(96, 160) * torch.linspace(0.1, 2, 160)
    basis, down = latent.factorise(weight, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-12)
    values = torch.linalg.svdvals(weight.double())
    lost = (weight.double() - basis @ down).square().sum()
    torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(down.square().sum(1), values[:rank].square(), rtol=1e-9, atol=1e-9)


class Case:
    """A store of latents with keys of ``G`` heads behind them, and what makes keys of them."""

    def __init__(
        self, form: KVForm, tokens: int = 77, norm: bool = False, rotary: int = 32, dtype: Any = torch.float32
    ):
        torch.manual_seed(3)
        self.form, self.tokens, self.heads, self.size = form, tokens, 3, 32
        basis = torch.linalg.qr(torch.randn(self.heads * self.size, form.latent, dtype=torch.float64))[0]
        weight = torch.rand(self.size) + 0.5 if norm else None
        self.up = latent.operand(basis, self.heads, torch.randn(self.heads * self.size), weight)
        self.eps = 1e-5 if norm else None
        self.table = None
        if form.pre:
            self.table = torch.full(rope.table_shape(2, 128, rotary), float("nan"))
            angle = 30 * torch.rand(2, tokens, rotary // 2)
            torch.ops.effcompile.rope_store(self.table, torch.tensor(0), angle.cos(), angle.sin())
        self.state: list[Tensor | None] = []
        for kind in ("key", "value"):
            shapes = form.buffers(kind, 2, self.heads, 128, self.size, dtype)  # type: ignore[arg-type]
            made = [torch.full(s, 255 if d == torch.uint8 else float("nan"), dtype=d) for s, d in shapes]
            self.state += [*made, *[None] * (3 - len(made))]
        self.latents = torch.randn(2, 1, tokens, form.latent).to(dtype)
        self.values = torch.randn(2, self.heads, tokens, self.size).to(dtype)
        self.query = torch.randn(2, 6, 5, self.size).to(dtype)
        self.length = torch.tensor(tokens)
        torch.ops.effcompile.kv_store(*self.state, torch.tensor(0), self.latents, self.values, form.name)

    @property
    def more(self) -> dict[str, Any]:
        found = {"table": self.table, "up": self.up, "eps": self.eps}
        return {name: given for name, given in found.items() if given is not None}

    def keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values in fp64, token by token and head by head, from what the buffers hold."""
        plain = self.form.buffered
        with ops.reference_only():
            held, values = torch.ops.effcompile.kv_load(*self.state, self.length, plain.name)
        out = torch.zeros(2, self.heads, self.tokens, self.size, dtype=torch.float64)
        rank = self.form.latent
        for b in range(2):
            for t in range(self.tokens):
                for g in range(self.heads):
                    key = self.up[g, :, :rank].double() @ held[b, 0, t].double() + self.up[g, :, rank].double()
                    if self.eps is not None:
                        key = key / (key.square().mean() + self.eps).sqrt() * self.up[g, :, rank + 1].double()
                    if self.table is not None:
                        half = self.table.shape[3]
                        cos, sin = self.table[b, t // 16, :, :, t % 16].double().unbind(0)
                        first = slice(0, half) if self.form.rope == "pre" else slice(0, 2 * half, 2)
                        second = slice(half, 2 * half) if self.form.rope == "pre" else slice(1, 2 * half, 2)
                        z = torch.complex(key[first], key[second]) * torch.complex(cos, sin)
                        key = key.clone()
                        key[first], key[second] = z.real, z.imag
                    out[b, g, t] = key
        return out, values[:, :, : self.tokens].double()


CASES = [
    (KVForm(16, 16, latent=48, rope="pre"), {}),
    (KVForm(8, 4, 32, 32, latent=96, rope="pre"), {"norm": True}),
    (KVForm(4, 16, 16, 0, latent=16, rope="pre_adjacent"), {"rotary": 16}),
    (KVForm(3, 3, 16, 16, "token", latent=32, rope="pre"), {"tokens": 65}),
    (KVForm("fp8", 8, 32, 0, latent=64), {"norm": True}),
]


@pytest.mark.parametrize(("form", "options"), CASES, ids=lambda x: x.name if isinstance(x, KVForm) else "")
def test_rebuilding_is_that_of_fp64(form: KVForm, options: dict[str, Any]) -> None:
    case = Case(form, **options)
    expected, values = case.keys()
    key, value = torch.ops.effcompile.kv_load(*case.state, case.length, form.name, **case.more)
    # Products over r latents, a norm and a rotation, rounded one after the other, of numbers up to the largest.
    bound = (form.latent + 16) * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert key.shape == (2, 3, 128, 32)
    assert float((key[:, :, : case.tokens] - expected).abs().max()) <= bound
    assert torch.equal(value[:, :, : case.tokens].double(), values)
    assert not key[:, :, case.tokens :].any()
    assert not value[:, :, case.tokens :].any()


@pytest.mark.parametrize(("form", "options"), CASES, ids=lambda x: x.name if isinstance(x, KVForm) else "")
def test_attention_is_that_of_fp64(form: KVForm, options: dict[str, Any]) -> None:
    case = Case(form, **options)
    key, value = case.keys()
    mask = torch.ones(2, 128, dtype=torch.bool)
    mask[0, :9] = False
    with ops.reference_only():
        out, lse = torch.ops.effcompile.attend(
            case.query, *case.state, case.length, mask, form.name, 0.2, True, 40, **case.more
        )
    n = case.tokens
    position, token = torch.arange(n - 5, n)[:, None], torch.arange(n)
    seen = (token <= position) & (token > position - 40) & mask[:, None, None, :n]
    scores = case.query.double() @ key.repeat_interleave(2, 1).mT * 0.2
    scores = scores.masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ value.repeat_interleave(2, 1), rtol=0, atol=1e-5)


def test_folding_through_a_rotation_is_wrong() -> None:
    """Without a rotation the up-projection folds into the query; with one, this would be another attention."""
    for form in (KVForm(16, 16, latent=96), KVForm(16, 16, latent=96, rope="pre")):
        case = Case(form)
        key, _ = case.keys()
        right = case.query.double() @ key.repeat_interleave(2, 1).mT
        up = case.up.double().repeat_interleave(2, 0)
        folded = torch.einsum("bhtd,hdr->bhtr", case.query.double(), up[..., :96])
        constant = torch.einsum("bhtd,hd->bht", case.query.double(), up[..., 96])
        wrong = folded @ case.latents.double().mT + constant.unsqueeze(-1)
        if form.pre:
            assert float((wrong - right).abs().mean()) > 0.5 * float(right.abs().mean())
        else:
            torch.testing.assert_close(wrong, right, rtol=0, atol=1e-9)


def test_opcheck() -> None:
    case = Case(KVForm(8, 4, 32, 32, latent=48, rope="pre"), norm=True)
    name, length = case.form.name, case.length
    more = torch.randn(2, 1, 3, 48), torch.randn(2, 3, 3, 32)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.effcompile.kv_store, (*case.state, length, *more, name))
        torch.library.opcheck(torch.ops.effcompile.kv_load, (*case.state, length, name), case.more)
        args = (case.query, *case.state, length, None, name, 0.125, True, -1)
        torch.library.opcheck(torch.ops.effcompile.attend, args, case.more)
        with ops.reference_only():
            with pytest.raises(ValueError, match="needs an up-projection of latents, not none"):
                torch.ops.effcompile.kv_load(*case.state, length, name, table=case.table)
            with pytest.raises(ValueError, match=r"not one of \(3, 32, 49\)"):
                torch.ops.effcompile.kv_load(*case.state, length, name, table=case.table, up=case.up[..., 1:])
            with pytest.raises(ValueError, match="needs no up-projection"):
                torch.ops.effcompile.kv_load(*case.state, length, case.form.buffered.name, up=case.up)
            with pytest.raises(ValueError, match="takes no table"):
                torch.ops.effcompile.kv_store(*case.state, length, *more, name, table=case.table)


def test_names_and_forms() -> None:
    for form in (KVForm(latent=16), KVForm("fp8", 2, 64, 64, "token", latent=128, rope="pre_adjacent")):
        assert KVForm.parse(form.name) == form
        assert KVForm.of_options(form.options) == form
    assert KVForm(16, 16, latent=64, rope="pre").buffered == KVForm(16, 16)
    for wrong in (8, 100, -16, True, 16.0, "16"):
        with pytest.raises(FormError, match=r"latent=.* multiple of 16"):
            KVForm(latent=wrong)  # type: ignore[arg-type]
    with pytest.raises(FormError, match="key heads of 48 channels do not divide into groups of 32"):
        KVForm(4, 4, key_axis="token", latent=48)
    with pytest.raises(ec.OptionError, match="latent='all'"):
        ec.compress_kv(latent="all")(torch.nn.Linear(1, 1))

"""What calibration meets beside plain text: masks that hide everything, decoders, shared code, plans of before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16, dtype=dtype)
        self.up, self.down = nn.Linear(16, 64, dtype=dtype), nn.Linear(64, 16, dtype=dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(F.silu(self.up(self.embed(input_ids))))


def batch(seen: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 64))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if seen else torch.zeros_like(ids)}


@pytest.mark.parametrize("method", [ec.flap(0.25), ec.teal(), ec.wina(), ec.carve_moe()], ids=lambda m: m.options.name)
def test_a_batch_that_is_hidden_does_not_count(method: Any) -> None:
    model, given = Block().eval(), [batch(), batch(), batch()]
    plain = ec.calibrate(model, given, [method], progress=False)
    hidden = ec.calibrate(model, [batch(False), *given[:2], batch(False), given[2]], [method], progress=False)
    for one, other in zip(plain, hidden, strict=True):
        assert one.numbers == other.numbers
        assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_blocks_in_bf16_with_biases() -> None:
    model = Block(torch.bfloat16).eval()
    plan = ec.calibrate(model, [batch() for _ in range(3)], [ec.carve_moe()], progress=False)
    assert [record.module for record in plan] == [""]


def test_a_plan_from_before_an_option(tmp_path: Path, no_inductor: list[Any]) -> None:
    model, given = Block().eval(), [batch() for _ in range(3)]
    ec.calibrate(model, given, [ec.carve_moe()], progress=False).save(tmp_path)
    text = json.loads((tmp_path / "plan.json").read_text())
    for record in text["records"]:
        del record["options"]["grouping"], record["options"]["bias"]
    (tmp_path / "plan.json").write_text(json.dumps(text))
    model.compile(backend="effcompile", options={"plan": str(tmp_path)})
    with torch.no_grad():
        model(**given[0])
    assert [d.action for d in ec.inspect(model).decisions if d.kind == "ffn"] == ["rewritten"]


def test_the_mask_of_an_encoder_hides_nothing_of_its_decoder() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 32, (4, 64))
    # Four rows would be too few for experts of 8 neurons.
    given = {"input_ids": ids, "attention_mask": (torch.arange(64) < 1).long().expand(4, -1), "decoder_input_ids": ids}
    plan = ec.calibrate(model, [given], [ec.carve_moe()], progress=False)
    assert len(list(plan)) == 2


class Layered(nn.Module):
    """Two layers that share code, since each of them breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Broken() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.relu(self.up(x)))
        torch._dynamo.graph_break()
        return x.tanh()


def test_layers_that_share_code_are_not_mixed_up() -> None:
    with pytest.raises(ec.CalibrationError, match="with the weights of another module"):
        ec.calibrate(Layered().eval(), [torch.randn(128, 8)], [ec.teal()], progress=False)

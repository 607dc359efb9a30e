"""Every generated Triton kernel, compiled ahead of time for four chips, with no GPU: it builds, within its budget.

Registers, spills and shared memory are read from the binary, the matrix instruction from the assembly. The fast set
is a pairwise cover; ``-m exhaustive`` compiles more.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pairwise

from effcompile.kernels import ops
from effcompile.kernels.form import BITS, KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts, StoreProgram
from effcompile.lowering import triton as lowering
from effcompile.lowering.triton_aot import compile_ahead, resources
from effcompile.lowering.triton_build import blocks_for, build, vendor_of
from effcompile.lowering.triton_source import attend_source

CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
FORMS = [
    KVForm(16, 16),
    KVForm(8, 8),
    KVForm(4, 4),
    KVForm(8, 4, 16, 32),
    KVForm(4, 16),
    KVForm(16, 8),
    KVForm(4, 4, 64, 64),
    KVForm(3, 3),
    KVForm(2, 2),
    KVForm(3, 2, 16, 32),
]


def spill_budget(program: Program, chip: str, registers: int) -> int:
    """Bytes a thread may spill: none for heads up to 128 in 16-bit types.

    Exceptions, where a tile cannot be smaller than 32 keys and one group: larger heads, groups longer than the usual
    tile, fp32 models (three tf32 products), and prefill with 8 or 3 bits on sm_80, which keeps operands in registers
    (3 bits: the eight codes of a word; keys before RoPE: two registers). And decode
    where the assembler stays at 168 or 128 registers by itself, so that a third or fourth program fits into a
    multiprocessor, and spills a few for it: how many differs from one release of it to the next.
    """
    wide = max(program.key_size, program.value_size) > 128
    if program.dtype == torch.float32:
        return 1024 if wide else 320
    if wide or program.form.group > 32:
        return 256
    if program.form.latent:
        return 16  # beside the sums of attention those of the product that rebuilds a tile
    packed_8 = 8 in (program.form.key_bits, program.form.value_bits)
    if program.phase == "prefill":
        if program.rotary and chip == "sm_80" and not packed_8:
            return 16
        packed_3 = 3 in (program.form.key_bits, program.form.value_bits)
        return 64 if (packed_8 or packed_3) and chip == "sm_80" else 0
    fits_more = chip != "gfx942" and registers in (128, 168)
    return (64 if packed_8 and chip == "sm_100" else 16) if fits_more else 0


def check(program: Program, chip: str) -> dict[str, int]:
    built = build(program, chip)
    splits = {"SPLITS": 16} if program.phase == "decode" else {}
    binary = compile_ahead(built, program, chip, splits)
    used = resources(binary)
    print(program.name, chip, used)
    assert used["shared"] <= SHARED[chip]
    assert used["spilled"] <= spill_budget(program, chip, used["registers"])
    if (
        program.phase == "decode"
        and program.dtype != torch.float32
        and max(program.key_size, program.value_size) <= 128
        and not program.form.latent  # eight warps that have all the registers
    ):
        assert 2 * used["shared"] <= SHARED[chip] or vendor_of(chip) == "hip"
    if program.dtype != torch.float32:
        assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
        instruction = {
            "sm_90": "wgmma.mma_async" if program.phase == "prefill" else "mma.sync",
            "sm_100": "tcgen05.mma" if program.phase == "prefill" else "mma.sync",
            "gfx942": "v_mfma",
        }.get(chip, "mma.sync")
        assert instruction in assembly
        if vendor_of(chip) == "cuda" and program.form.key_bits not in (16, "fp8"):
            assert "fma.rn.f16x2" in assembly, "packed keys are not dequantised two at a time"
            assert "cvt.rn.f32.u8" not in assembly
    return used


AXES: dict[str, list[Any]] = {
    "chip": CHIPS,
    "phase": ["decode", "prefill"],
    "form": FORMS,
    "size": [(128, 128), (64, 64), (80, 80), (96, 128), (256, 256)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "predicate": [Predicate(), Predicate(window=4096), Predicate(key_mask=True), Predicate(causal=False)],
    "ratio": [4, 1, 3],
}


def variants(**axes: list[Any]) -> list[tuple[Program, str]]:
    """Legal cases of a pairwise cover: programs and chips."""
    chosen = []
    for case in pairwise(**axes):
        form, (key_size, value_size) = case["form"], case["size"]
        if form.value_bits != 16 and value_size % form.group:
            form = dataclasses.replace(form, group=16)
        if form.value_bits == 3 and value_size % 32:
            form = dataclasses.replace(form, value_bits=2)
        arguments = (case["phase"], form, case["predicate"], case["dtype"], case["ratio"], key_size, value_size)
        chosen.append((Program(*arguments), case["chip"]))
    return chosen


def name_of(variant: Any) -> str:
    return getattr(variant, "name", str(variant))


FAST = variants(
    chip=CHIPS, phase=["decode", "prefill"], form=FORMS[:4], size=[(128, 128), (80, 80), (256, 256)],
    dtype=[torch.bfloat16, torch.float16], predicate=[Predicate(), Predicate(window=4096, key_mask=True)], ratio=[4],
)  # fmt: skip
FAST += [
    (Program(phase, KVForm(bits, bits), Predicate(), torch.bfloat16, 4, 128, 128), "sm_90")
    for phase in ("decode", "prefill")
    for bits in BITS
]
FAST += [
    (Program("prefill", KVForm(3, 2), Predicate(), torch.bfloat16, 4, 128, 128), "gfx942"),
    (Program("prefill", KVForm(3, 3), Predicate(), torch.float16, 4, 128, 128), "sm_80"),
    (Program("decode", KVForm(2, 3), Predicate(key_mask=True), torch.float16, 3, 80, 96), "sm_100"),
]
OTHER_FORMS = [KVForm("fp8", "fp8"), *(KVForm(*bits, 32, 128, "token", "channel") for bits in [(4, 4), (8, 8), (3, 2)])]
OTHER = [
    (Program(c["phase"], c["form"], Predicate(), torch.bfloat16, 4, 128, 128), c["chip"])
    for c in pairwise(form=OTHER_FORMS, chip=CHIPS, phase=["decode", "prefill"])
]
FAST += [
    (Program(phase, form, Predicate(), torch.bfloat16, 4, 128, 128), "sm_90")
    for phase, form in (("decode", OTHER_FORMS[0]), ("prefill", OTHER_FORMS[1]))
]
SCORED = {
    "chip": CHIPS,
    "phase": ["decode", "prefill"],
    "score": [ScoreParts(True), ScoreParts(False, True), ScoreParts(False, False, True), ScoreParts(True, True, True)],
    "form": [KVForm(4, 4), KVForm(16, 16), KVForm(8, 3)],
    "dtype": [torch.bfloat16, torch.float32],
}
PARTS = [
    (Program(c["phase"], c["form"], Predicate(), c["dtype"], 4, 128, 128, score=c["score"]), c["chip"])
    for c in pairwise(**SCORED)
]
FAST += PARTS[:3]
MORE = [variant for variant in [*variants(**AXES), *OTHER, *PARTS[3:]] if variant not in FAST]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(("program", "chip"), FAST, ids=name_of)
def test_attend(program: Program, chip: str) -> None:
    check(program, chip)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("program", "chip"), MORE, ids=name_of)
def test_attend_more(program: Program, chip: str) -> None:
    check(program, chip)


STORES = [
    (StoreProgram(form, dtype, 128, 96), chip)
    for form, dtype, chip in zip(FORMS[:4], [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16], CHIPS)
]
STORES += [
    (StoreProgram(KVForm(3, 2), torch.bfloat16, 128, 96), "sm_90"),
    (StoreProgram(KVForm(2, 3), torch.float16, 80, 96), "gfx942"),
    (StoreProgram(KVForm("fp8", 4, 32, 128, "token", "channel"), torch.bfloat16, 128, 96), "sm_90"),
]


@pytest.mark.parametrize(("program", "chip"), STORES, ids=name_of)
def test_store_and_load(program: StoreProgram, chip: str) -> None:
    built = build(program, chip)
    pack = not program.form.dense
    for binary in (
        compile_ahead(built, program, chip, {"QUANTIZE": pack, "APPEND": True}),
        compile_ahead(built, program, chip, {"TILE": built.block}, "load_"),
    ):
        used = resources(binary)
        assert used["spilled"] <= 16, "more than four registers"
        assert used["shared"] <= SHARED[chip]
        if pack and "ptx" in binary.asm and "QUANTIZE" in binary.src.fn.arg_names:
            assert "div.rn.f32" in binary.asm["ptx"], "codes need IEEE division to agree with the reference"
            # min.f32 and max.f32 pass over NaN.
            assert re.search(r"setp\.(neu|nan)\.b?f\d", binary.asm["ptx"]), "NaN becomes a number"


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_merge(chip: str) -> None:
    program = Program("decode", KVForm(4, 4), Predicate(), torch.bfloat16, 4, 128, 128)
    binary = compile_ahead(build(program, chip), program, chip, {"SPLITS": 66, "PADDED": 128}, "merge_")
    assert resources(binary)["spilled"] == 0


def test_generated_text() -> None:
    """A module is one program: named after it, importable, and the same text each time."""
    program = Program("decode", KVForm(4, 4), Predicate(), torch.bfloat16, 4, 128, 128)
    built = build(program, "sm_90")
    text = Path(built.path).read_text()
    assert text.startswith(f'"""{program.name}: ')
    assert f"def {program.name}(" in text
    assert "keys_4(k0, k1, start, stop, 128, 64, 32, TILE, tl.float16, True)" in text
    assert attend_source(program, blocks_for(program, "sm_90"), "cuda") == text
    assert (
        "True)" not in attend_source(program, blocks_for(program, "gfx942"), "hip").split("keys_4(k0")[1].split("\n")[0]
    )


def declined(**changes: Any) -> str:
    """Why the launcher refuses a call that would be fine without ``changes``."""
    form, size = changes.get("form", KVForm(4, 4)), changes.get("size", 96)
    state: list[Any] = []
    for kind in ("key", "value"):
        buffers = form.buffers(kind, 1, 2, 6 * form.group, size, torch.float16)
        state += [torch.zeros(shape, dtype=dtype) for shape, dtype in buffers]
    if "state" in changes:
        state = changes["state"](state)
    query = torch.zeros(1, changes.get("heads", 4), 1, size, dtype=changes.get("dtype", torch.float16))
    with pytest.raises(ops.KernelUnavailable) as why:
        lowering.attend(query, *state, torch.tensor(1), None, form.name, 1.0, True, -1)
    return str(why.value)


def test_declined_with_a_reason() -> None:
    assert "groups of 48" in declined(form=KVForm(4, 4, 48, 48))
    assert "value heads of 80 channels in 3 bits" in declined(form=KVForm(4, 3, 16, 0), size=80)
    assert "key heads of 80 channels in 3 bits per token" in declined(form=KVForm(3, 4, 16, 0, "token"), size=80)
    assert "queries are torch.float32" in declined(dtype=torch.float32)
    assert "3 query heads" in declined(heads=3)
    assert "not contiguous" in declined(state=lambda s: [s[0].mT, *s[1:]])


def test_a_failed_build_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure is raised with the program's name; the kernel is not tried again."""
    built = build(Program("decode", KVForm(4, 4), Predicate(), torch.float16, 2, 64, 64), "sm_90")
    tried = []

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            tried.append(grid)
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(built, "failure", None)
    monkeypatch.setattr(built.module, built.name, Broken())
    for _ in range(2):
        with pytest.raises(ops.KernelUnavailable, match=f"Triton cannot build {built.name}"):
            built.launch("", 1, torch.zeros(1))
    assert len(tried) == 1


def test_splits_depend_on_shapes_alone() -> None:
    assert lowering.splits_for(8, 32768, 132) == 66
    assert lowering.splits_for(512, 32768, 132) == 1
    assert lowering.splits_for(8, 300, 132) == 1

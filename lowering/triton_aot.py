"""Generated kernels compiled ahead of time, with no GPU: what a chip would get, and what it costs there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from effcompile.kernels.program import Program, StoreProgram
from effcompile.lowering import triton_operators
from effcompile.lowering.triton_build import Built, vendor_of
from effcompile.lowering.triton_latent import factor_dtype

OPERANDS = {
    "length": "*i64",
    "key_mask": "*i1",
    "scale": "fp32",
    "softcap": "fp32",
    "bias": "*fp32",
    "sinks": "*fp32",
    "table": "*fp16",
    "kv_num": "*i32",
    "kv_idx": "*i32",
    "full_num": "*i32",
    "full_idx": "*i32",
    "column_num": "*i32",
    "column_idx": "*i32",
    "wrong": "*i8",
    "token_of": "*i64",
    "stands": "*i64",
    "ranges": "*i32",
    "allowed": "*i1",
    "segments": "*i64",
    "prefix": "*i64",
    "pages": "*i32",
    "page_num": "*i32",
    "up": "*fp32",
    "eps": "fp32",
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MORE_TYPES = TYPES | {torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}


def signature(kernel: Any, program: Program | StoreProgram, constants: dict[str, Any]) -> dict[str, str]:
    """Triton's type of every argument of a generated kernel, from its name."""
    kind, form = TYPES[program.dtype], program.form
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("query", "out", "key", "value", "before_out"):
            types[name] = f"*{kind}"
        elif name == "basis":
            types[name] = f"*{TYPES[factor_dtype(form, program.dtype)]}"
        elif name in ("lse", "part_out", "part_lse", "before_lse") or (name == "table" and form.latent):
            types[name] = "*fp32"
        elif re.fullmatch(r"[kv]\d", name):
            bits = form.key_bits if name[0] == "k" else form.value_bits
            types[name] = f"*{kind}" if bits == 16 or name[1] == "2" else ("*u8", "*fp16")[int(name[1])]
        else:
            types[name] = OPERANDS.get(name, "i32")
    return types


def compile_ahead(
    built: Built,
    program: Program | StoreProgram,
    chip: str,
    constants: dict[str, Any],
    prefix: str = "",
    warps: int | None = None,
) -> Any:
    """Compile kernel ``{prefix}{name}`` of a built program for ``chip``, as for tensors that PyTorch allocated.

    ``warps`` are those of a store, where they are more than Triton's four.
    """
    kernel = getattr(built.module, prefix + built.name)
    types = signature(kernel, program, constants)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if (types[name].startswith("*") and name != "length") or re.search("_(batch|head|token)$", name)
    }
    cut = built.blocks if built.blocks is None or "BLOCK" not in constants else built.blocks.within(constants["BLOCK"])
    options = {} if cut is None or prefix else {"num_warps": cut.warps, "num_stages": cut.stages}
    options |= {} if warps is None else {"num_warps": warps}
    return _compile(kernel, types, constants, aligned, chip, options)


def _compile(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: dict[Any, Any], chip: str, options: Any
) -> Any:
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    target = GPUTarget("hip", chip, 64) if vendor_of(chip) == "hip" else GPUTarget("cuda", int(chip[3:]), 32)
    binary = triton.compile(ASTSource(kernel, types, constants, aligned), target=target, options=options)
    if re.search(r"^\s*trap;", binary.asm.get("ptx", ""), re.MULTILINE):
        # That is how Triton reports, among others, sums that do not fit into tensor memory: at run time.
        raise RuntimeError(f"Triton made a trap of {kernel.__name__} for {chip} with {constants}")
    return binary


class Launch(NamedTuple):
    """A launch that was noted and not done: the kernel, its grid, its arguments, its constants and options."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, chip: str) -> Any:
        """What ``chip`` would run for just these arguments, as for tensors that PyTorch allocated."""
        names, constants = self.kernel.arg_names, {k: v for k, v in self.options.items() if k in self.kernel.arg_names}
        fixed = {p.name for p in self.kernel.params if p.do_not_specialize}
        types, aligned = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, given) in enumerate(zip(names, self.args, strict=False)):
            if isinstance(given, torch.Tensor):
                types[name] = "*" + MORE_TYPES[given.dtype]
            elif isinstance(given, int) and given == 1 and name not in fixed:
                types[name], constants[name] = "constexpr", 1
            else:
                types[name] = "fp32" if isinstance(given, float) else "i32"
            if isinstance(given, torch.Tensor) or (isinstance(given, int) and given % 16 == 0 and name not in fixed):
                aligned[i,] = [["tt.divisibility", 16]]
        options = {k: v for k, v in self.options.items() if k not in names}
        return _compile(self.kernel, {name: types[name] for name in names}, constants, aligned, chip, options)


@contextlib.contextmanager
def noted(chip: str) -> Iterator[list[Launch]]:
    """Within this context launches are noted and not done, as on ``chip``: with tensors on ``meta`` a call is free."""
    found: list[Launch] = []

    def note(built: Built, kernel: str, grid: int, *args: Any, **options: Any) -> None:
        found.append(Launch(getattr(built.module, kernel + built.name), grid, args, options))

    before = Built.launch, triton_operators.vendor
    Built.launch, triton_operators.vendor = note, lambda: vendor_of(chip)  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        Built.launch, triton_operators.vendor = before  # type: ignore[method-assign]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} is not in the compiler's report")
    return int(found[1])


def resources(binary: Any) -> dict[str, int]:
    """Registers of a thread, bytes on a thread's stack (spills, and frames of called functions), shared bytes."""
    import triton

    shared = int(binary.metadata.shared)
    if "cubin" not in binary.asm:
        text = binary.asm["amdgcn"]
        spilled = 4 * _number(r"\.vgpr_spill_count: *(\d+)", text)
        return {"registers": _number(r"\.vgpr_count: *(\d+)", text), "spilled": spilled, "shared": shared}
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"registers": _number(r"REG:(\d+)", text), "spilled": _number(r"STACK:(\d+)", text), "shared": shared}

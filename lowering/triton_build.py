"""Generated Triton source to kernels: block sizes, the module files, and the table of built programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import types
from typing import Any

import torch

from effcompile.kernels.ops import KernelUnavailable
from effcompile.kernels.program import Program, StoreProgram
from effcompile.lowering.triton_latent import sides_of
from effcompile.lowering.triton_side import Blocks, Vendor
from effcompile.lowering.triton_source import attend_source
from effcompile.lowering.triton_store import store_block, store_source

FOLDER = "effcompile"
"""Generated modules live in this folder of Inductor's cache directory."""


def chip_of(device: torch.device) -> str:
    """The chip's name in Triton's words, such as ``sm_90`` or ``gfx942``; ``sm_90`` where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def vendor_of(chip: str) -> Vendor:
    """Whose instructions a chip runs."""
    return "hip" if chip.startswith("gfx") else "cuda"


def blocks_for(program: Program, chip: str) -> Blocks:
    """Block sizes of an attention program on a chip.

    Chosen from ahead-of-time builds: no spills for 16-bit types and heads up to 128, and two decode programs in one
    multiprocessor's shared memory; ``tests/test_triton_aot.py`` holds the budgets. A tile holds whole key groups.
    """
    keys, values = sides_of(program, vendor_of(chip))
    wide, single = max(program.key_size, program.value_size) > 128, program.dtype == torch.float32
    packed = (keys.bits != 16) + (values.bits != 16)
    warpgroups = chip in ("sm_90", "sm_100", "sm_103")
    looked_up, several = program.positions and program.score.bias, max(keys.parts, values.parts) > 1
    if program.form.latent:
        # A tile of keys is the sum of a product here, beside the latents and rows of the factor that make it: eight
        # warps hold one of 64. Those of gfx942 have half the registers each, and in fp32 three products take turns.
        few = single or vendor_of(chip) == "hip"
        blocks = Blocks(16, 32 if few or wide else 64, 32, warps=4 if few else 8, stages=2)
    elif program.phase == "decode":
        # Keys before RoPE are in registers twice, with their angles: half a tile.
        tile = 32 if single or (wide and not packed) else 64 if wide or packed < 2 or program.rotary else 128
        ring = 32 if wide or single else 64
        # Tiles of pages come by addresses of their own, which a pipeline of gfx942 keeps beside them.
        listed = program.blocks and vendor_of(chip) == "hip"
        stages = 2 if single or listed or (packed and not warpgroups) else 3
        blocks = Blocks(16, tile, ring, warps=8 if wide and single else 4, stages=stages)
    elif single:
        blocks = Blocks(32, 32, 32, warps=8 if wide else 4, stages=1)
    elif wide:
        blocks = Blocks(128 if warpgroups else 64, 32, 32, warps=8, stages=2)
    elif warpgroups:
        # Single keys, and keys in another order, take addresses or tokens for each key, and a bias one for each pair:
        # sm_100 has no registers left, and no chip for keys with both, or for what lies in ranges.
        listed = program.columns or program.positions or (program.blocks and program.score.bias)
        tile = 32 if (listed and chip != "sm_90") or program.ranges or looked_up else 64
        blocks = Blocks(128, tile, 64, warps=8, stages=2 if packed else 3)
    elif packed and vendor_of(chip) == "hip" and (several or program.rotary or program.blocks):
        # Eight warps have half the registers each, which does not hold what a word of several codes becomes, nor keys
        # before RoPE with their angles, nor addresses of listed tiles.
        blocks = Blocks(64, 32, 32, warps=4, stages=2)
    elif packed:
        blocks = Blocks(128, 32, 32, warps=8, stages=2)
    else:
        # Of listed blocks every tile has an address of its own, and packed sequences and prefixes have numbers besides:
        # for these sm_80 has no registers left.
        rule = program.predicate
        more = program.blocks or rule.segments or rule.prefix
        tile = 32 if (more and vendor_of(chip) == "cuda") or looked_up else 64
        blocks = Blocks(64, tile, 64, warps=4, stages=2)
    if not packed:
        return blocks
    return dataclasses.replace(blocks, tile=max(blocks.tile, program.form.group))


def write_module(name: str, source: str) -> str:
    """Write ``source`` to a file named by its content, once, and return the path. Safe beside other processes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # imports all of Inductor: seconds

    folder = os.path.join(cache_dir(), FOLDER)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}.py")
    if not os.path.exists(path):
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(temporary, path)
    return path


def import_module(path: str) -> types.ModuleType:
    """Import a generated file under its own name: Triton, and torch's artefacts, find a kernel by module and file."""
    name = "effcompile_generated." + os.path.basename(path)[:-3]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclasses.dataclass
class Built:
    """A generated module and how to launch it; ``failure`` is set by the first build that fails, and final."""

    name: str
    path: str
    module: types.ModuleType
    blocks: Blocks | None
    block: int
    failure: str | None = None

    def launch(self, kernel: str, grid: int, *args: Any, **options: Any) -> None:
        """Run kernel ``{kernel}{name}`` on a grid of one axis, on the device of the first tensor of ``args``.

        Raises
        ------
        KernelUnavailable
            If Triton cannot build it for this device; later launches of this program are refused with the same text.
        """
        if self.failure is not None:
            raise KernelUnavailable(self.failure)
        if grid == 0:
            return
        device = args[0].device
        try:
            # Triton launches on the current device, whatever the tensors say.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                getattr(self.module, kernel + self.name)[(grid,)](*args, **options)
        except Exception as error:
            if not _is_build_failure(error):
                raise
            last = str(error).strip().splitlines()
            self.failure = f"Triton cannot build {self.name}: {last[-1] if last else type(error).__name__}"
            raise KernelUnavailable(self.failure) from error


def _is_build_failure(error: Exception) -> bool:
    from triton.compiler.errors import CompilationError  # type: ignore[import-untyped]
    from triton.errors import TritonError  # type: ignore[import-untyped]

    return isinstance(error, (CompilationError, TritonError)) or "PassManager" in str(error)


@functools.cache
def build(program: Program | StoreProgram, chip: str) -> Built:
    """The kernels of a program, generated and imported once per process; Triton compiles them at the first launch.

    Raises
    ------
    KernelUnavailable
        If Triton is not installed, or the program has no kernel.
    """
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise KernelUnavailable("Triton is not installed") from error
    vendor = vendor_of(chip)
    if isinstance(program, Program):
        blocks = blocks_for(program, chip)
        source, block = attend_source(program, blocks, vendor), blocks.rows
    else:
        blocks, block, source = None, store_block(program), store_source(program, vendor)
    path = write_module(program.name, source)
    return Built(program.name, path, import_module(path), blocks, block)

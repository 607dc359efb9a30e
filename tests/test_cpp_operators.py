"""Libraries of C++ kernels that launchers of operators share."""

import pytest
import torch

from effcompile.kernels.ops import KernelUnavailable
from effcompile.lowering import _LIBRARIES, toolchain
from effcompile.lowering.cpp_operators import SCALARS, Library, pointer


def test_a_build_that_failed_is_not_begun_again(monkeypatch):
    asked = []

    def build(name, source):
        asked.append(name)
        raise toolchain.BuildError("no compiler")

    monkeypatch.setattr(toolchain, "build", build)
    library = Library("none", "nothing", ("none.h",), {"none": "NoArgs"})
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match="no compiler"):
            library.entry("none", torch.float32)
    with pytest.raises(KernelUnavailable, match="no compiler"):
        library.entry("none", torch.bfloat16)
    assert asked == ["none_float32", "none_bfloat16"]


def test_a_dtype_without_kernels_is_named_and_nothing_is_built(monkeypatch):
    monkeypatch.setattr(toolchain, "build", lambda *_: pytest.fail("built"))
    library = Library("one", "an FFN", ("one.h",), {"one": "OneArgs"}, (torch.float32,))
    with pytest.raises(KernelUnavailable, match=r"an FFN in torch.bfloat16 \(torch.float32 have C\+\+ kernels\)"):
        library.entry("one", torch.bfloat16)
    assert library.written(torch.bfloat16) == ("", "")


@pytest.mark.parametrize("dtype", SCALARS, ids=str)
@pytest.mark.parametrize("operator", _LIBRARIES)
def test_every_operator_has_its_text_before_it_is_built(operator, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    library = _LIBRARIES[operator]
    path, text = library.written(dtype)
    assert not path
    assert bool(text) == (dtype in library.dtypes)
    if text:
        call = f"{{ return ec::{operator}<{SCALARS[dtype]}>(*args); }}"
        assert text.count(call) == 1
        file = toolchain.folder(text) / f"{library.name_of(dtype)}.cpp"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        assert library.written(dtype) == (str(file), text)


def test_a_weight_is_not_copied():
    weight = torch.randn(4, 6)
    assert pointer(None, torch.float32) == 0
    assert pointer(weight, torch.float32) == weight.data_ptr()
    for refused in (weight.t(), weight.bfloat16()):
        with pytest.raises(KernelUnavailable, match=r"where torch\.float32 is expected"):
            pointer(refused, torch.float32)

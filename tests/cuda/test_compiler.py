"""Every kernel is compiled for the oldest and the newest architecture; NVRTC needs no GPU. Warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expertstream import DeviceError
from expertstream.cuda import compiler
from expertstream.cuda.compiler import ARCHITECTURES, SOURCES, compile_kernels, kernel_parameters

FORMATS = [
    {"BITS": bits, "GROUP": group, "CODES": codes, "DTYPE": dtype, "PLANES": planes}
    for bits, group, codes, dtype in [(4, 64, 1, 1), (8, 64, 1, 1), (4, 32, 3, 4), (2, 32, 2, 2), (2, 128, 1, 1), (8, 128, 2, 0), (4, 32, 2, 2)]
    for planes in (1, 2)
]  # fmt: skip
KERNELS = [
    ("rows.cu", {}),
    ("exchange.cu", {}),
    *(("products.cu", macros) for macros in FORMATS),
    *(("attention.cu", {"HEAD_DIM": d, "KV_DTYPE": kept}) for d, kept in [(64, 0), (128, 1), (256, 1), (256, 3), (40, 3)]),
    *(("delta.cu", {"KEY_DIM": dk, "VALUE_DIM": dv}) for dk, dv in [(128, 128), (24, 40)]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "expertstream" / "cuda"


@pytest.mark.parametrize("capability", [ARCHITECTURES[0], ARCHITECTURES[-1], 120])
@pytest.mark.parametrize(
    "name, macros", KERNELS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_kernels_compile(name: str, macros: dict[str, int], capability: int) -> None:
    code = compile_kernels(name, macros, capability)
    # Code of the card itself, or text that the driver of a newer one compiles.
    assert code.startswith(b"\x7fELF") if capability != 120 else b".target sm_90" in code


def test_every_kernel_file_is_tried() -> None:
    assert {path.name for path in SOURCES.glob("*.cu")} == {name for name, _ in KERNELS}
    for name, _ in KERNELS:
        text = (SOURCES / name).read_text()
        assert len(kernel_parameters(name)) == text.count("__global__"), "a kernel whose declaration is not understood"


def test_code_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernels("rows.cu", {}, 90)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(compiler, "_nvrtc", lambda *_: pytest.fail("compiled again"))
    assert compile_kernels("rows.cu", {}, 90) == first
    monkeypatch.setattr(compiler, "_nvrtc", lambda *_: b"other")
    with monkeypatch.context() as newer:
        newer.setattr(compiler, "nvrtc_version", lambda: "99")
        assert compile_kernels("rows.cu", {}, 90) == b"other"
    ptx = [compile_kernels("rows.cu", {}, 120, driver) for driver in ("580.1", "590.2", "580.1")]
    assert ptx == [b"other"] * 3 and len(list(cache.iterdir())) == 4  # one for each driver
    assert compile_kernels("rows.cu", {"X": 1}, 90) == b"other" and compile_kernels("rows.cu", {}, 75) == b"other"
    cache.chmod(0o500)
    try:
        assert compile_kernels("rows.cu", {"X": 2}, 90) == b"other"  # a cache that cannot be written is done without
    finally:
        cache.chmod(0o700)


def test_old_cards_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"compute capability 6\.1; at least 7\.5 is needed"):
        compile_kernels("rows.cu", {}, 61)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"install expertstream\[cuda\]"):
        compile_kernels("rows.cu", {}, 90)


def test_a_source_that_does_not_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("oops", 'extern "C" __global__ void f(int* x) { int unused; }'):
        monkeypatch.setattr(compiler, "source_of", lambda name, text=text: text)
        with pytest.raises(DeviceError, match=r"rows.cu cannot be compiled: (?s:.*)(error|warning)"):
            compile_kernels("rows.cu", {}, 75)

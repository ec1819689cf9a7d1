"""Compiles the kernels with NVRTC, and caches the result by source, options, architecture and NVRTC's version. Cards newer than NVRTC knows
get PTX, which their driver compiles; it is cached by the driver's version too.

A source file is compiled once for each set of macros: the format of a matrix, the size of a head. NVRTC needs no GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import DeviceError
from ..user_files import cache_folder

__all__ = ["ARCHITECTURES", "SOURCES", "compile_kernels", "kernel_parameters", "nvrtc_version", "source_of"]

SOURCES = Path(__file__).parent / "kernels"
# Compute capabilities that code is made for; a newer card gets PTX for the last one, which its driver compiles.
ARCHITECTURES = (75, 80, 86, 89, 90)
# No contraction: fma is where the source says so, as on the CPU. Division and square root are IEEE's by default.
_OPTIONS = ("--std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([\w, ]+\)\s+)?(\w+)\(([^)]*)\)')

# Numbers, and the records of common.cuh and exchange.cu.
_CODES = {"int": "i4x", "float": "f4x", "i64": "q", "const Places": "28Q", "const Sum": "6Q", "const Mailbox": "9Q"}


@cache
def source_of(name: str) -> str:
    """The text of a file in kernels/ with its includes in place, each once."""
    seen: set[str] = set()

    def text(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        return _INCLUDE.sub(lambda match: text(match[1]), (SOURCES / file).read_text(encoding="utf-8"))

    return text(name)


@cache
def kernel_parameters(name: str) -> dict[str, tuple[str, ...]]:
    """The kernels of a file and the formats of their parameters for struct.pack, each in whole 8 bytes: Q an address, q, i, f a number."""
    found = {}
    for kernel, parameters in _KERNEL.findall(source_of(name)):
        codes = []
        for parameter in parameters.split(","):
            kind = parameter.strip().rsplit(" ", 1)[0]
            codes.append("Q" if "*" in parameter else _CODES[kind])
        found[kernel] = tuple(codes)
    return found


@cache
def nvrtc_version() -> str:
    """The version of NVRTC's package, "" if it is not installed."""
    try:
        return version("nvidia-cuda-nvrtc-cu12")
    except PackageNotFoundError:
        return ""


def compile_kernels(name: str, macros: Mapping[str, int], capability: int, driver: str = "") -> bytes:
    """Code for a card of this compute capability (90 for 9.0); driver: its version. Raises DeviceError."""
    arch = max((a for a in ARCHITECTURES if a <= capability), default=0)
    if arch == 0:
        raise DeviceError(
            f"this card has compute capability {capability / 10:.1f}; at least {ARCHITECTURES[0] / 10:.1f} is needed"
        )
    # Code for one architecture runs on later ones of the same generation; other cards get PTX.
    kind = "sm" if capability // 10 == arch // 10 else "compute"
    options = [*_OPTIONS, f"--gpu-architecture={kind}_{arch}", *(f"-D{k}={v}" for k, v in sorted(macros.items()))]
    source = source_of(name)
    parts = source, options, nvrtc_version(), driver if kind == "compute" else ""
    key = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    file = cache_folder() / "cuda" / f"{Path(name).stem}-{arch}-{key}"
    try:
        return file.read_bytes()
    except OSError:
        pass
    code = _nvrtc(name, source, options, kind == "sm")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_bytes(code)
        partial.replace(file)
    except OSError:
        pass  # it is compiled again next time
    return code


def _nvrtc(name: str, source: str, options: list[str], binary: bool) -> bytes:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise DeviceError("the GPU's kernels cannot be compiled: install expertstream[cuda]") from None

    def checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise DeviceError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result[0])[1].decode()}")
        return result[1] if len(result) > 1 else None

    try:
        program = checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    except RuntimeError as error:  # the library is missing
        raise DeviceError(f"the GPU's kernels cannot be compiled ({error}); install expertstream[cuda]") from None
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.rstrip(b"\0 \n").decode(errors="replace")
    if int(status) != 0 or "warning" in text:
        raise DeviceError(f"{name} cannot be compiled: {text}")
    size, read = (
        (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if binary else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    code: bytes = b" " * checked(size(program))
    checked(read(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code

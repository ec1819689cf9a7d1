"""Fails if a kernel translation unit has a weak symbol. Run by `make native-test`.

An inline function of an AVX-512 file that is not inlined becomes a weak symbol, and the linker may keep that copy for everybody:
the program then dies on machines without AVX-512. So each file is compiled as it ships, and `nm` must show none.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compile_flags() -> dict[str, list[str]]:
    """Source → its own options, from CMakeLists.txt, so that there is one list."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = {}
    for name, options in re.findall(
        r'set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS\s+"([^"]*)"\)', text
    ):
        found[name] = options.split(";")
    return found


def main() -> int:
    flags = compile_flags()
    sources = ["native/kernels/scalar.cpp"]
    if platform.machine() in ("x86_64", "AMD64"):
        sources += ["native/kernels/avx2.cpp", "native/kernels/avx2_vnni.cpp", "native/kernels/avx512_vnni.cpp"]
    elif platform.machine() in ("aarch64", "arm64"):
        sources += ["native/kernels/neon.cpp", "native/kernels/neon_dot.cpp"]
    assert {source for source in sources if "avx" in source or "dot" in source} <= set(flags), flags
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            target = Path(folder) / (Path(source).stem + ".o")
            command = [
                "c++",
                "-std=c++20",
                "-O3",
                "-ffp-contract=off",
                "-fPIC",
                "-Isrc/expertstream/cuda/kernels",
                *flags.get(source, []),
                "-c",
                source,
                "-o",
                str(target),
            ]
            subprocess.run(command, cwd=ROOT, check=True)
            symbols = subprocess.run(["nm", str(target)], check=True, capture_output=True, text=True).stdout
            weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
            if weak:
                failed = True
                print(f"{source}: weak symbols (compiled by {shlex.join(command)}):", *weak, sep="\n  ")
    print("no weak symbols in kernel objects" if not failed else "weak symbols found")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

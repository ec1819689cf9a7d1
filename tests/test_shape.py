"""The shape of the project: which way imports point, how long files are, what is public, and that the docs say what is so."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

import expertstream

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "expertstream"
NATIVE = ROOT / "native"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the others; `errors`, `config` and `files` may be imported by all.
ARROWS = {
    "cli": {"bench", "chat", "cuda", "server", "checkpoint", "convert", "engine", "experts", "machine", "models", "responses", "sampling", "summary"},
    "bench": {
        "batch", "cuda", "engine", "generate", "models", "layers", "experts", "checkpoint", "kv_cache", "ops", "formats", "machine", "_native",
    },
    "chat": {"engine"},
    "server": {"batch", "engine", "formats", "generate", "kv_cache", "ops", "responses", "sampling"},
    "convert": {"models", "checkpoint", "formats", "ops"},
    "summary": {"kv_cache", "models", "experts", "checkpoint", "machine"},
    "engine": {
        "sampling", "session", "models", "experts", "layers", "checkpoint", "ops", "machine", "kv_cache", "prefix_cache", "responses",
        "cuda", "_native",
    },
    "session": {"engine", "formats", "generate", "kv_cache", "prefix_cache", "responses", "sampling", "state_file"},
    "prefix_cache": {"formats", "kv_cache", "state_file"},
    "state_file": set(),
    "responses": {"experts"},
    "generate": {"kv_cache", "ops", "sampling"},
    "models": {"layers", "formats", "checkpoint", "kv_cache"},
    "layers": {"batch", "checkpoint", "formats", "kv_cache", "ops"},
    "ops": {"batch", "cuda", "formats", "kv_cache", "_native"},
    "cuda": {"batch", "formats", "kv_cache", "_native"},
    "experts": {"checkpoint", "formats", "ops", "_native"},
    "checkpoint": {"formats", "ops"},
    "sampling": {"ops"},
    "kv_cache": {"formats"},
    "batch": {"formats", "kv_cache"},
    "formats": set(),
    "text": {"formats"},
    "machine": set(),
    "config": {"machine"},
    "units": set(),
    "user_files": set(),
    "errors": set(),
    "files": set(),
    "__main__": {"cli"},
    "__init__": {"engine", "responses", "sampling", "session"},
}  # fmt: skip
# Below everything: what any part may import.
GROUND = {"errors", "config", "files", "units", "user_files", "text", "__version__"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """First components, within the package, of everything a module imports, wherever in the file."""
    package = ("expertstream", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names] if module == ("expertstream",) else [module]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        found |= {name[1] for name in names if name[0] == "expertstream" and len(name) > 1}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    allowed = ARROWS[part] | GROUND | {part}
    assert imported_parts(path) <= allowed, f"{path} imports {imported_parts(path) - allowed}"


def test_native_parts_do_not_know_each_other() -> None:
    for path in (NATIVE / "io").iterdir():
        assert not re.search(r'#include "(\.\./)?(kernels|ops|thread_pool)', path.read_text()), path
        assert "expert" not in re.sub(r"namespace expertstream|expertstream::", "", path.read_text()).replace(
            "no experts", ""
        ), path
    for path in (NATIVE / "kernels").iterdir():
        assert not re.search(r'#include ".*(io/|ops|thread_pool)', path.read_text()), path
    bindings = {NATIVE / "bindings.cpp", NATIVE / "bindings.h"}
    assert {p for p in NATIVE.rglob("*.*") if "nanobind" in p.read_text()} == bindings


def test_environment_is_read_in_one_place() -> None:
    readers = {p.name for p in MODULES if re.search(r"os\.environ(?!\.setdefault)|getenv", p.read_text())}
    assert readers == {"config.py", "user_files.py"}


def test_files_can_be_read_at_a_sitting() -> None:
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *NATIVE.rglob("*.cpp"), *NATIVE.rglob("*.h")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > 500} == {}
    long = [name for name, n in lengths.items() if n > 350]
    assert len(long) <= len(lengths) // 8, long


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module docstring"
    if path.name == "__main__.py" or (
        path.name == "__init__.py" and not any(isinstance(n, ast.ClassDef | ast.FunctionDef) for n in tree.body)
    ):
        return
    name = ".".join(("expertstream", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        value = getattr(module, public)
        if callable(value) and getattr(value, "__module__", "").startswith("expertstream"):
            written = value.__doc__ or ""
            assert written and not written.startswith(f"{public}("), public  # @dataclass writes a signature


def test_the_public_interface() -> None:
    assert all(hasattr(expertstream, name) for name in expertstream.__all__)
    assert set(expertstream.__all__) <= set(dir(expertstream))
    with pytest.raises(AttributeError):
        expertstream.nonsense  # noqa: B018
    assert {"LLM", "Session", "SamplingParams", "GenerationResponse"} <= set(expertstream.__all__)


def test_the_installed_package_is_tested() -> None:
    assert PACKAGE not in Path(expertstream.__file__).resolve().parents


def test_help_and_docs_are_one() -> None:
    document = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["document"]
    assert (ROOT / "docs" / "cli.md").read_text() == document(), "run `make docs`"


def test_links_in_documents_lead_somewhere() -> None:
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "training").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_python_examples_in_the_readme_run() -> None:
    """Every ```python block of README.md, as it stands, on the embedded model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readmes_figures_are_the_committed_ones() -> None:
    from benchmarks.vs_llama_cpp import read_rows, table

    rows = read_rows(ROOT / "benchmarks" / "results" / "vs_llama_cpp.csv")
    assert table(rows) in (ROOT / "README.md").read_text(), "python -m benchmarks.vs_llama_cpp --table"
    assert len({row["round"] for row in rows}) >= 3


def test_the_embedded_model_is_small_enough() -> None:
    folder = PACKAGE / "embedded"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 40_000_000
    assert "Apache-2.0" in (folder / "MODEL_CARD.md").read_text()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3_5MoeForCausalLM"]


def test_versions_agree() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and version[1] == expertstream.__version__
    assert f"## {expertstream.__version__}" in (ROOT / "CHANGELOG.md").read_text()

"""Fetches what tests need and is not part of this project, from source packages on PyPI into build/fixtures: chat templates that models
really have (of llama-cpp-python; they belong to the models' authors), and the official JSON-Schema-Test-Suite (of jsonschema).

Tests that use them are skipped where they could not be fetched.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "fixtures"
TEMPLATES, SUITE = FOLDER / "templates", FOLDER / "json-schema-test-suite"
# Package → what is wanted of it: the part of the path before it, the ending, and where it goes.
WANTED = {
    "llama-cpp-python==0.3.36": ("/llama.cpp/models/templates/", ".jinja", TEMPLATES),
    "jsonschema==4.26.0": ("/json/tests/draft2020-12/", ".json", SUITE),
}


def fetch(package: str, before: str, ending: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-binary", ":all:", "--dest", place, package], check=True)
        (archive,) = Path(place).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                _, found, name = member.name.partition(before)
                file = tar.extractfile(member) if found and name.endswith(ending) else None
                if file is not None and ".." not in name:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(file.read())


if __name__ == "__main__":
    for package, wanted in WANTED.items():
        try:
            fetch(package, *wanted)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            print(f"{package} could not be fetched, tests that need it are skipped: {error}", file=sys.stderr)

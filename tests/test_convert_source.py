"""A conversion is of one source: what changes meanwhile, and what is not its own, is told and left alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from expertstream import ConvertError
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.cli import main
from expertstream.convert import convert


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("when", [0.2, 0.6, 0.999])
def test_a_source_that_changes_meanwhile_is_no_pack(hf_folder: Path, tmp_path: Path, quiet: bool, when: float) -> None:
    """quiet: the file keeps its size and its time, as some ways to copy do."""
    source, done = tmp_path / "source", []
    shutil.copytree(hf_folder, source)
    file = source / "model.safetensors"

    def overwrite(count: int, total: int) -> None:
        if count < when * total or done:
            return
        done.append(count)
        before = file.stat()
        with file.open("r+b") as opened:
            opened.seek(before.st_size // 2)
            opened.write(bytes(before.st_size - before.st_size // 2))
        if quiet:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(ConvertError, match="the source changed during the conversion; remove") as caught:
        convert(source, tmp_path / "pack", BitPolicy(), threads=1, progress=overwrite)
    assert done and not (tmp_path / "pack").exists() and caught.value.exit_code == 7
    with pytest.raises(ConvertError, match="started from another source"):  # nor by trying again
        convert(source, tmp_path / "pack", BitPolicy(), threads=1)


def test_a_folder_with_other_files_is_not_written_to(hf_folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "pack.partial"
    work.mkdir()
    (work / "thesis.tmp").write_text("years of work")
    with pytest.raises(ConvertError, match=r"contains 'thesis\.tmp', which no conversion writes; move it away"):
        convert(hf_folder, tmp_path / "pack", BitPolicy(), threads=1)
    assert (work / "thesis.tmp").read_text() == "years of work"


def test_synth_removes_no_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "m.partial"
    work.mkdir()
    (work / "thesis").write_text("years of work")
    assert main(["synth", "qwen3.5-35b-a3b", str(tmp_path / "m"), "--layers", "1"]) == 2
    assert "exists and was not made by synth; move it away" in capsys.readouterr().err
    assert (work / "thesis").exists()

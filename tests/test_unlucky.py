"""Limits, links, odd file systems and odd names: each is one clear line and an exit code, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM, BudgetError, ConvertError, UsageError
from expertstream.bench import traces
from expertstream.bench.traces import load_trace
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.cli import main
from expertstream.convert import convert
from expertstream.engine import embedded_model
from expertstream.text.visible import LineFormatter, one_line

EVIL = "a\x1b]0;title\x07\r\nb\x9b31m\u202ec\u2028d"


def test_one_line_is_one_line() -> None:
    shown = one_line(EVIL)
    assert shown.isprintable() and shown.startswith("a�]0;title�") and " b" in shown
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (EVIL,), None)
    assert LineFormatter().format(record) == f"expertstream: {shown}"


@pytest.mark.parametrize(
    "command", [["inspect"], ["run"], ["convert"], ["run", "--chat"], ["plan"], ["bench", "decode"]]
)
def test_no_name_commands_a_terminal(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    more = {"convert": [str(tmp_path / "out")], "run": ["hello"]}.get(command[0], [])
    for config in ("", "{", json.dumps({"model_type": EVIL}), json.dumps({"architectures": [EVIL]})):
        (folder / "config.json").write_text(config)
        assert main([*command, str(folder), *more]) != 0
        seen = capsys.readouterr()
        assert seen.err.count("\n") == 1 and (seen.out + seen.err).replace("\n", "").isprintable()


def test_tensors_and_shards_with_such_names(
    tmp_path: Path, mlx_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mlx_folder, folder)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    index.write_text(json.dumps({"weight_map": {**names, EVIL: f"{EVIL}.safetensors"}}))
    assert main(["inspect", str(folder)]) == 3
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1 and (seen.out + seen.err).replace("\n", "").isprintable()


def test_a_message_of_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a\x1b[2Jb\\nc') }}")
    assert main(["run", "--chat", str(folder), "hi", "--memory", "24MiB", "--context", "256", "--quiet"]) == 6
    err = capsys.readouterr().err
    assert err == "expertstream: the chat template failed: a�[2Jb c\n"


def test_json_has_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "--json", "--memory", "24MiB", "--context", "256", "--max-tokens", "1", "a\x9bb\x7fc"]) == 0
    out = capsys.readouterr().out
    assert out.strip("\n").isprintable() and "a\x9bb\x7fc" in json.loads(out)["prompt"]


def test_o_direct_that_is_refused_at_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems do, which take it when a file is opened."""
    real, asked = os.preadv, []

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            asked.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    with LLM(memory="24MiB", context_length=256) as llm:
        expected = [p.token for p in llm.generate("Once", max_tokens=5, temperature=0.0)]
    open_files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "preadv", refuse)
    with LLM(memory="24MiB", context_length=256) as llm:
        assert asked and not llm.experts.store.direct and "buffered" in llm.describe()
        assert [p.token for p in llm.generate("Once", max_tokens=5, temperature=0.0)] == expected
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_model_that_is_not_closed_releases_its_files_when_it_is_collected(tmp_path: Path) -> None:
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    llm = LLM(memory="24MiB", context_length=256, prefix_cache_bytes=1 << 20, reader="pread")
    llm.keep_prefixes(tmp_path, 1 << 20)
    list(llm.generate("Once", max_tokens=2))
    del llm
    gc.collect()
    end = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_more_threads_than_processors_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "expertstream"), LLM(memory="150MiB", context_length=256, threads=300):
        assert "300 threads are more than the" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "expertstream"), LLM(memory="24MiB", context_length=256, threads=1):
        assert not caplog.text


@pytest.mark.parametrize("mebibytes", [60, 195, 230, 300, 400, 600])
def test_little_address_space_gives_exit_code_5(mebibytes: int) -> None:
    """At every point where it may end: libraries, threads, slots."""

    run = [sys.executable, "-m", "expertstream", "run", "--memory", "300MiB", "--max-tokens", "1", "Once"]
    limited = ["sh", "-c", f'ulimit -v {mebibytes << 10}; exec "$@"', "sh", *run]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 5) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "ulimit -v" in done.stderr, done.stderr


def test_threads_that_cannot_be_started_give_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(BudgetError, match="reading threads cannot be started"):
        monkeypatch.setattr(
            "expertstream._native.pread_reader",
            lambda *_: (_ for _ in ()).throw(RuntimeError("Resource temporarily unavailable")),
        )
        LLM(memory="24MiB", context_length=256, reader="pread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert main(["chat", "--memory", "24MiB", "--context", "256"]) == 5
    assert "a thread cannot be started" in capsys.readouterr().err


def test_ctrl_c_while_modules_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Interrupt:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'expertstream.cli': raise KeyboardInterrupt\nsys.meta_path.insert(0, Interrupt())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "expertstream", "inspect"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and done.stderr == "expertstream: interrupted\n"


def test_a_destination_that_is_a_dangling_link_is_told_before_the_work(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConvertError, match="is a broken link"):
        convert(hf_folder, tmp_path / "out", BitPolicy(4, 64, 8, False), 1)
    assert main(["synth", "small", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "nowhere").exists()


def test_links_are_not_copied_out_of_their_folder(tmp_path: Path, hf_folder: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"key": "value"}')
    source = tmp_path / "source"
    shutil.copytree(hf_folder, source)
    (source / "README.md").symlink_to(secret)
    with pytest.raises(ConvertError, match=r"README.md: is a link to .*secret, outside"):
        convert(source, tmp_path / "out", BitPolicy(4, 64, 8, False), 1)
    assert not (tmp_path / "out.partial").exists()
    (source / "README.md").unlink()
    (source / "NOTES").write_text("inside")
    (source / "README.md").symlink_to("NOTES")
    convert(source, tmp_path / "out", BitPolicy(4, 64, 8, False), 1)
    assert (tmp_path / "out" / "README.md").read_text() == "inside" and not (
        tmp_path / "out" / "README.md"
    ).is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_converted(tmp_path: Path, hf_folder: Path) -> None:
    """Its files are links to blobs beside the snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(hf_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    convert(snapshot, tmp_path / "out", BitPolicy(4, 64, 8, False), 1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf_folder / "tokenizer.json").read_bytes()


def test_sparse_files_take_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "expertstream.json"):
        os.truncate(folder / name, 1 << 40)
        code = main(["run", "--chat", "--quiet", "--memory", "24MiB", "--context", "256", str(folder), "hi"])
        assert code in (3, 6) and "larger than" in capsys.readouterr().err
        shutil.copy(embedded_model() / name, folder / name)


@pytest.mark.parametrize("bomb", ["size", "header", "objects", "version", "pickle"])
def test_a_trace_that_is_a_bomb_is_refused(tmp_path: Path, bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_BYTES", 10 << 20)
    file = tmp_path / "x.npz"
    experts = np.zeros((2, 2, 2), np.uint8)
    np.savez(file, experts=experts, starts=np.zeros(1, np.int64))
    header = {"descr": "|u1", "fortran_order": False, "shape": (11 << 20, 1, 1) if bomb == "size" else (1 << 40, 2, 2)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("experts.npy", "w") as out:
        if bomb in ("header", "size"):
            np.lib.format.write_array_header_1_0(out, header)
            for _ in range(11 if bomb == "size" else 0):
                out.write(bytes(1 << 20))
        elif bomb == "objects":
            np.lib.format.write_array(out, np.array([{}], object))
        elif bomb == "version":
            out.write(b"\x93NUMPY\x09\x09")
        else:
            out.write(b"\x80\x04N.")
    with pytest.raises(UsageError, match="not a routing trace"):
        load_trace(file)


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="POSIX")
def test_without_a_home_the_error_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert main(["chat", "--sessions"]) == 2
    assert "no home folder; set HOME" in capsys.readouterr().err
    LLM(memory="24MiB", context_length=256).close()


def test_a_prompt_on_which_the_tokenizer_would_panic_is_too_long(tmp_path: Path) -> None:
    """The library's own words about a panic, which nobody can catch, are not seen either."""
    done = subprocess.run(
        [sys.executable, "-m", "expertstream", "run", "--memory", "24MiB", "--context", "256", "-"],
        input=" " * 10_500_000, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 6 and "panic" not in done.stderr and "the context has room for 255" in done.stderr
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "expertstream", "chat", "--memory", "24MiB", "--context", "256"],
        input="a" + " " * 10_500_000 + "b\nhi\n", capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "panic" not in done.stderr and done.stderr.count("the context has room for") == 1
    assert done.stdout.strip()

"""The command line as a user meets it: separate processes, real output, one line for each mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertstream import cli
from expertstream.responses import GenerationResponse, GenerationStats
from expertstream.session import Session

SMALL = ["--memory", "40MiB", "--context", "256"]


def run(
    *arguments: str, stdin: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [str(Path(sys.executable).parent / "expertstream"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **(env or {})}, timeout=120)


def test_run_prints_text_and_a_footer() -> None:
    result = run("run", *SMALL, "--max-tokens", "12", "--seed", "1", "Once upon a time")
    assert result.returncode == 0 and len(result.stdout.decode()) > 20
    err = result.stderr.decode()
    for part in (
        "[memory 40.0 MiB: trunk",
        "experts cached",
        "residency slots",
        "hit rate",
        "evictions",
        "reads in flight",
        "tokens/s",
        "waited",
        "seed 1",
    ):
        assert part in err
    quiet = run("run", *SMALL, "--max-tokens", "12", "--seed", "1", "--quiet", "Once upon a time")
    assert quiet.stdout == result.stdout and quiet.stderr == b""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_shown_what_a_pipe_is_given(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say anything: an escape sequence must not set the window's title."""

    class Out(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    def evil(*_: object) -> Iterator[GenerationResponse]:
        yield GenerationResponse("a\x1b]0;title\x07b\x9b2Jc\td\ne\r\nf", 1, None, "stop", GenerationStats(1))

    monkeypatch.setattr(Session, "generate", evil)
    monkeypatch.setattr(sys, "stdout", out := Out())
    assert cli.main(["run", *SMALL, "--quiet", "Once"]) == 0
    shown = "a\ufffd]0;title\ufffdb\ufffd2Jc\td\ne\nf\n"
    assert out.getvalue() == (shown if terminal else "a\x1b]0;title\x07b\x9b2Jc\td\ne\r\nf\n")


def test_stats_are_printed_for_each_layer() -> None:
    err = run("run", *SMALL, "--max-tokens", "4", "--stats", "Once").stderr.decode().splitlines()
    header = next(i for i, line in enumerate(err) if line.startswith("layer "))
    assert len(err) - header - 1 == 12
    # Four tokens a layer and the prompt's, four experts each at most.
    assert all(sum(map(int, line.split()[1:3])) >= 12 for line in err[header + 1 :])


def test_json_output() -> None:
    out = json.loads(
        run("run", *SMALL, "--json", "--max-tokens", "5", "--temperature", "0", "--logprobs", "2", "Once").stdout
    )
    assert len(out["tokens"]) == 5 and len(out["logprobs"]) == 5 and out["finish_reason"] == "length"
    assert out["memory"]["budget_bytes"] == 40 << 20 and out["stats"]["decode_experts"]["hits"] >= 0
    assert len(out["stats"]["layers"]) == 12
    assert out["reader"]["name"] in ("io_uring", "pread")


def test_the_prompt_may_come_from_standard_input() -> None:
    a = run("run", *SMALL, "--temperature", "0", "--max-tokens", "5", "--quiet", "-", stdin=b"Once upon a time")
    b = run("run", *SMALL, "--temperature", "0", "--max-tokens", "5", "--quiet", "Once upon a time")
    assert a.returncode == 0 and a.stdout == b.stdout


def test_chat_and_system_prompt() -> None:
    result = run("run", *SMALL, "--chat", "--system", "Be brief.", "--json", "--max-tokens", "5", "Hello")
    prompt = json.loads(result.stdout)["prompt"]
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == turns + "<think>\n\n</think>\n\n"


def test_lossy_runs_say_so() -> None:
    assert (
        "LOSSY: 2 of 4 experts per token"
        in run("run", *SMALL, "--experts-per-token", "2", "--max-tokens", "3", "Once").stderr.decode()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["dance"], 2, "invalid choice: 'dance'"),
        (["run"], 2, "give a prompt"),
        (["run", "a", "b", "c"], 2, "give a prompt"),
        (["run", "--temperature", "hot", "x"], 2, "invalid float value: 'hot'"),
        (["run", "--temperature", "-1", "x"], 2, "--temperature must be a number from 0 to 100"),
        (["run", "--memory", "lots", "x"], 2, "'lots' is not a size"),
        (["run", "--isa", "sse9", *SMALL, "x"], 2, "unknown instruction set 'sse9'; use one of scalar"),
        (["run", "--system", "x", "y"], 2, "--system needs --chat"),
        (["run", "--logprobs", "1", "y"], 2, "--logprobs needs --json"),
        (["run", "--experts-per-token", "9", "x"], 2, "--experts-per-token"),
        (["run", "--context", "9999999", "x"], 2, "--context must be at most 8192"),
        (["run", "/no/such/model", "x"], 3, "/no/such/model: no such folder"),
        (["inspect", "/no/such/model"], 3, "/no/such/model: no such folder"),
        (["run", "--memory", "1MiB", "x"], 5, "this model needs at least"),
        (["run", ""], 6, "the prompt is empty"),
        (["run", *SMALL, "word " * 300], 6, "--context 3"),
        (["run", "--seed", "-1", "x"], 2, "--seed must be an integer"),
        (["run", "--max-tokens", "0", "x"], 2, "--max-tokens must be an integer from 1"),
        (
            ["run", "--top-k", "-1", "/no/such/model", "x"],
            2,
            "--top-k must be an integer",
        ),  # told before a model is looked for
        (["inspect", "--", "x"], 2, "unrecognized arguments: x"),
        (["run", "--budget", "1MiB", "x"], 2, "unrecognized arguments: --budget (see expertstream run --help)"),
        (["inspect", "x" * 300], 3, "File name too long"),
        (["convert", "/no/such/model", "x" * 300], 7, "File name too long"),
        (["convert", "/no/such/model", "/tmp/never"], 3, "/no/such/model: no such folder"),
    ],
)
def test_mistakes_get_one_line_and_an_exit_code(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    err = result.stderr.decode().strip().splitlines()
    assert result.returncode == code, err
    assert err[-1].startswith("expertstream: ") and message in err[-1]
    assert not any("Traceback" in line for line in err) and result.stdout == b""


def test_environment() -> None:
    assert run("run", *SMALL, "--max-tokens", "1", "x", env={"EXPERTSTREAM_ISA": "scalar"}).returncode == 0
    wrong = run("run", *SMALL, "--max-tokens", "1", "x", env={"EXPERTSTREAM_ISA": "mmx"})
    assert wrong.returncode == 2 and b"unknown instruction set 'mmx'" in wrong.stderr
    one = run("run", *SMALL, "--max-tokens", "1", "x", env={"EXPERTSTREAM_THREADS": "1"})
    assert b"1 threads" in one.stderr


@pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff\xfe"])
def test_prompts_that_are_not_utf8(prompt: bytes) -> None:
    for result in (run("run", *SMALL, "-", stdin=prompt), run("run", *SMALL, os.fsdecode(prompt))):
        assert result.returncode == 6 and b"not valid UTF-8" in result.stderr


def test_a_damaged_checkpoint_is_named(pack_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pack_folder, tmp_path / "x"))
    file = folder / "experts-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("run", str(folder), "--memory", "64MiB", "--context", "128", "hello")
    assert result.returncode == 3 and f"{file}: truncated".encode() in result.stderr
    data = bytearray((pack_folder / file.name).read_bytes())
    for at in range(4096 + 100, len(data), 4096):
        data[at] ^= 1
    file.write_bytes(data)
    result = run("run", str(folder), "--memory", "64MiB", "--context", "128", "!")
    assert result.returncode == 4 and b"layer 1, expert" in result.stderr and b"checksum mismatch" in result.stderr


def test_another_models_tokenizer_is_named(pack_folder: Path) -> None:
    result = run("run", str(pack_folder), "--memory", "64MiB", "--context", "128", "hello")
    assert result.returncode == 3 and b"tokenizer.json has token" in result.stderr and b"Traceback" not in result.stderr


def test_ctrl_c_ends_with_the_text_so_far_and_its_statistics() -> None:
    command = [
        str(Path(sys.executable).parent / "expertstream"),
        "run",
        "--memory",
        "40MiB",
        "--max-tokens",
        "8000",
        "--context",
        "8192",
        "--temperature",
        "50",
        "--seed",
        "3",  # a text that does not end by itself for thousands of tokens
        "Once",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    first = process.stdout.read(40)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and len(first + out) >= 40
    assert b"interrupted" in err and b"hit rate" in err and b"Traceback" not in err


def test_a_prompt_may_begin_with_a_dash() -> None:
    out = json.loads(run("run", *SMALL, "--json", "--max-tokens", "1", "--", "-- no, -thanks").stdout)
    assert out["prompt"] == "-- no, -thanks"


def test_a_forgotten_prompt_is_noticed(pack_folder: Path) -> None:
    result = run("run", str(pack_folder))
    assert result.returncode == 2 and b"is a checkpoint folder; give a prompt after it" in result.stderr


def test_output_that_cannot_be_written_is_one_line() -> None:
    for arguments in (
        ["inspect"],
        ["run", *SMALL, "--max-tokens", "3", "Once"],
        ["run", *SMALL, "--json", "--max-tokens", "3", "Once"],
    ):
        command = [str(Path(sys.executable).parent / "expertstream"), *arguments]
        with open("/dev/full", "wb") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1 and b"No space left" in result.stderr and b"Traceback" not in result.stderr


def test_a_closed_standard_input_is_named() -> None:
    command = f"{Path(sys.executable).parent / 'expertstream'} run {' '.join(SMALL)} - <&-"
    result = subprocess.run(command, shell=True, capture_output=True)
    assert result.returncode == 6 and b"which is closed" in result.stderr


def test_any_text_can_be_printed_in_any_locale() -> None:
    result = run("run", *SMALL, "--json", "--max-tokens", "2", "é 🦊", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert result.returncode == 0 and json.loads(result.stdout)["prompt"] == "é 🦊"


def test_a_read_that_fails_keeps_the_text_so_far(
    pack_folder: Path, capsys: pytest.CaptureFixture[str], faults: None
) -> None:
    from expertstream import _native

    for arguments in (["--json"], []):
        _native.set_fault(60, 1, 5)
        code = cli.main(
            [
                "run",
                "--memory",
                "20MiB",
                "--context",
                "256",
                "--temperature",
                "0",
                "--max-tokens",
                "60",
                *arguments,
                "Once",
            ]
        )
        captured = capsys.readouterr()
        assert code == 4
        if arguments:
            out = json.loads(captured.out)
            assert out["text"] and "read failed" in out["error"]
        else:
            assert (
                captured.out.strip()
                and captured.err.splitlines()[-1].startswith("expertstream: ")
                and "read failed" in captured.err
            )


def test_a_closed_pipe_is_no_traceback() -> None:
    result = subprocess.run(
        f"{Path(sys.executable).parent / 'expertstream'} run {' '.join(SMALL)} --max-tokens 200 --temperature 1 Once | head -c 5",
        shell=True,
        capture_output=True,
    )
    assert len(result.stdout) == 5 and b"Traceback" not in result.stderr


def test_inspect() -> None:
    text = run("inspect").stdout.decode()
    for part in (
        "qwen3_5_moe_text",
        "48 per layer, 4 used per token",
        "4-bit affine, groups of 64",
        "this machine",
        "skipped",
    ):
        assert part in text
    summary = json.loads(run("inspect", "--json").stdout)
    assert summary["parameters_total"] == 53_733_804
    # Active: everything but the experts that a token does not use, 44 of 48 in each of 12 layers.
    assert summary["parameters_total"] - summary["parameters_active"] == 12 * 44 * 3 * 64 * 384
    assert summary["bytes_per_token"] == summary["trunk_bytes"] + 12 * 4 * summary["bytes_per_expert"]


def test_inspect_names_what_it_skips(mlx_folder: Path) -> None:
    assert "1 tensors of vision" in run("inspect", str(mlx_folder)).stdout.decode()


def test_convert_says_what_it_did(hf_folder: Path, tmp_path: Path) -> None:
    result = run("convert", str(hf_folder), str(tmp_path / "pack"), "--bits", "4", "--trunk-bits", "8")
    assert result.returncode == 0 and result.stdout.decode() == f"{tmp_path / 'pack'}: done\n"
    again = run("convert", str(hf_folder), str(tmp_path / "pack"))
    assert again.returncode == 7 and b"already exists" in again.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("expertstream 0.")


def test_keywords_of_the_api_become_options() -> None:
    from expertstream.cli.options import as_options

    for message, shown in {
        "set memory=499MiB or less": "set --memory 499MiB or less",
        "context_length must be at most 5; got 6": "--context must be at most 5; got 6",
        "beyond_trained_context=True allows more": "--beyond-trained-context allows more",
        "use reader=pread": "use --reader pread",
        "top_k must be an integer": "--top-k must be an integer",
        "hidden_size must be an integer; x=y": "hidden_size must be an integer; x=y",
        "the file must memory must": "the file must memory must",
    }.items():
        assert as_options(message) == shown

"""The project's reason: a model four times larger than the memory there is, and the same text whoever keeps its experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.control_group import ControlGroupError, memory_group, peak_bytes, run_inside
from expertstream.bench.geometry import geometry_config
from expertstream.bench.synth import write_synthetic


def test_a_model_four_times_its_memory_limit(tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    size = write_synthetic(folder, geometry_config("small", 8))
    limit = size // 4 // 4096 * 4096
    texts = []
    for residency in ("slots", "os"):
        command = [
            str(Path(sys.executable).parent / "expertstream"), "run", str(folder), "Once upon a time", "--json", "--residency", residency,
            "--max-tokens", "64", "--temperature", "1", "--seed", "1", "--context", "512",
        ]  # fmt: skip
        try:
            with memory_group(limit) as group:
                result = run_inside(group, command, timeout=300)
                peak = peak_bytes(group)
        except ControlGroupError as error:
            # Making a control group takes root; CI runs as root.
            assert os.geteuid() != 0 or not os.access("/sys/fs/cgroup", os.W_OK), error
            pytest.skip(f"no control group can be made here: {error}")
        assert result.returncode == 0, result.stderr
        out = json.loads(result.stdout)
        assert len(out["tokens"]) == 64 and out["memory"]["residency"] == residency
        assert peak <= limit
        assert out["stats"]["decode_experts"]["misses"] > 0 or residency == "os"
        texts.append(out["tokens"])
    assert texts[0] == texts[1]


def test_another_process_takes_memory_while_we_decode(tmp_path: Path) -> None:
    """In a control group that holds both: slots are given back, nobody is killed, the text stays the same."""
    folder = tmp_path / "synthetic"
    size = write_synthetic(folder, geometry_config("small", 8))
    limit = size // 4096 * 4096
    script = (
        "import json, sys, time\n"
        "from expertstream import LLM\n"
        "with LLM(sys.argv[1], context_length=512) as llm:\n"
        "    tokens = []\n"
        "    planned = llm.experts.tier.planned\n"
        "    for piece in llm.generate('Once upon a time', max_tokens=300, temperature=1, seed=1):\n"
        "        tokens.append(piece.token)\n"
        "        if len(tokens) == 20:\n"
        "            print('ready', flush=True)\n"
        "        if len(tokens) > 20:\n"
        "            time.sleep(0.01)\n"
        "    print(json.dumps({'tokens': tokens, 'planned': planned, 'least': llm.experts.tier.least, 'kept': llm.experts.tier.cached}))\n"
    )
    # Takes memory step by step, as programs do.
    hog = "import sys, time\nsys.stdin.readline()\nheld = []\nfor _ in range(30):\n    held.append(bytearray(b'x') * (5 << 20))\n    time.sleep(0.05)\ntime.sleep(60)"
    results = []
    for pressed in (False, True):
        try:
            with memory_group(limit) as group:
                inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c"]
                ours = subprocess.Popen([*inside, script, str(folder)], stdout=subprocess.PIPE, text=True)
                other = subprocess.Popen([*inside, hog], stdin=subprocess.PIPE, text=True)
                try:
                    assert ours.stdout is not None and ours.stdout.readline() == "ready\n"
                    if pressed:
                        assert other.stdin is not None
                        other.stdin.write("\n")
                        other.stdin.flush()
                    out, _ = ours.communicate(timeout=120)
                    assert other.poll() is None, "the other process was killed"
                finally:
                    for process in (ours, other):
                        process.kill()
                        process.communicate()
        except ControlGroupError as error:
            assert os.geteuid() != 0 or not os.access("/sys/fs/cgroup", os.W_OK), error
            pytest.skip(f"no control group can be made here: {error}")
        assert ours.returncode == 0
        results.append(json.loads(out))
    assert results[0]["tokens"] == results[1]["tokens"] and len(results[0]["tokens"]) == 300
    assert results[0]["least"] == results[0]["planned"] and results[1]["least"] < results[1]["planned"]


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_a_slow_disk_only_takes_longer(pack_folder: Path, tmp_path: Path, reader: str) -> None:
    """A control group that lets 2 MiB a second pass: the wait is counted, the text is the same."""
    groups = Path("/sys/fs/cgroup/blkio")
    script = (
        "import json, sys\n"
        "import numpy as np\n"
        "from expertstream import LLM\n"
        "with LLM(sys.argv[1], memory='6MiB', context_length=256, reader=sys.argv[2]) as llm:\n"
        "    cache, tokens = llm.session().cache, [5]\n"
        "    for _ in range(12):\n"
        "        tokens.append(int(llm.model(np.array(tokens[-1:]), cache)[0].argmax()))\n"
        "    e = llm.experts.stats.total()\n"
        "    print(json.dumps([tokens, e.stall_seconds, e.bytes_read, llm.experts.store.direct]))\n"
    )
    command = [sys.executable, "-c", script, str(pack_folder), reader]
    free = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    group = groups / f"expertstream-{os.getpid()}"
    device = os.stat(pack_folder).st_dev
    try:
        group.mkdir()
        # The limit is of whole disks, not of partitions.
        disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        number = (disk if (disk / "queue").exists() else disk.parent).joinpath("dev").read_text().strip()
        (group / "blkio.throttle.read_bps_device").write_text(f"{number} {2 << 20}")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"reads cannot be throttled here: {error}")
    try:
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
        slow = json.loads(subprocess.run(inside, capture_output=True, text=True, check=True, timeout=120).stdout)
    finally:
        group.rmdir()
    assert slow[0] == free[0] and slow[2] > 0
    if slow[3]:  # what the page cache gives is not throttled
        assert slow[1] > free[1]

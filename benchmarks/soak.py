"""Soak test: a server under mixed requests for a long time. Memory and descriptors must not grow, and no request may fail.

    python -m benchmarks.soak --minutes 30

Starts `expertstream serve` with the embedded model (or MODEL), sends it all kinds of requests from several clients at once: short and
long, streamed and not, for three APIs, with functions and schemas, some that are refused, some whose clients hang up midway. After each
tenth of the time it prints requests, failures, resident memory and open descriptors. The exit code is 1 if a request failed that should
have succeeded, or if after the first tenth memory grew by more than a fifth plus 64 MiB, or descriptors by more than 16.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

TOOL = {
    "name": "get_weather", "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
WORDS = ["a", "rabbit", "found", "the", "key", "near", "an", "old", "tree", "and", "asked", "its", "friend", "what", "it", "could", "open"]  # fmt: skip


class Soak:
    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self.url, self.end, self.seed = url, time.monotonic() + seconds, seed
        self.sent: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self, number: int) -> None:
        """One client's requests, until the time is up."""
        chance = random.Random(self.seed * 1000 + number)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.end:
                kind = chance.choice((self.chat, self.messages, self.responses, self.leaves, self.refused, self.looks))
                self.sent[kind.__name__] += 1
                try:
                    kind(client, chance)
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def text(self, chance: random.Random) -> str:
        return " ".join(chance.choices(WORDS, k=chance.choice((5, 40, 400))))

    def post(self, client: httpx.Client, path: str, body: dict[str, Any], expected: int = 200) -> None:
        answer = client.post(path, json=body)
        # 429 is valid too: the queue is full.
        assert answer.status_code in (expected, 429), f"{path}: {answer.status_code}: {answer.text[:300]}"

    def chat(self, client: httpx.Client, chance: random.Random) -> None:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": self.text(chance)}], "max_tokens": chance.choice((1, 16, 64)),
            "stream": chance.random() < 0.5, "seed": 1, "n": chance.choice((1, 1, 2)),
        }  # fmt: skip
        if chance.random() < 0.3:
            body["tools"] = [{"type": "function", "function": TOOL}]
        elif chance.random() < 0.3:
            body["response_format"] = {"type": "json_object"}
        self.post(client, "/v1/chat/completions", body)

    def messages(self, client: httpx.Client, chance: random.Random) -> None:
        body = {
            "messages": [{"role": "user", "content": self.text(chance)}],
            "max_tokens": 16,
            "stream": chance.random() < 0.5,
        }
        self.post(client, "/v1/messages", body)

    def responses(self, client: httpx.Client, chance: random.Random) -> None:
        self.post(client, "/v1/responses", {"input": self.text(chance), "max_output_tokens": 16})

    def leaves(self, client: httpx.Client, chance: random.Random) -> None:
        """A client that hangs up in the middle of a response."""
        body = {"messages": [{"role": "user", "content": self.text(chance)}], "max_tokens": 500, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for _ in answer.iter_bytes():
                if chance.random() < 0.3:
                    return

    def refused(self, client: httpx.Client, chance: random.Random) -> None:
        body = chance.choice(
            (
                {"messages": "no"},
                {"messages": [], "max_tokens": -1},
                {"messages": [{"role": "user", "content": "x" * 200_000}]},
            )
        )
        self.post(client, "/v1/chat/completions", body, 400)

    def looks(self, client: httpx.Client, chance: random.Random) -> None:
        path = chance.choice(("/health", "/metrics", "/status", "/v1/models"))
        assert client.get(path).status_code == 200, path


def held(process: int) -> tuple[int, int]:
    """Resident bytes and open descriptors."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024, len(os.listdir(f"/proc/{process}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description="mixed requests for a long time; memory and descriptors must not grow")
    parser.add_argument("model", nargs="?", help="a checkpoint folder (the embedded model)")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="duration (30)")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="concurrent clients (6)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed of the requests (1)")
    options = parser.parse_args()
    command = [sys.executable, "-m", "expertstream", "serve", *([options.model] if options.model else [])]
    command += ["--port", "0", "--memory", "400MiB", "--context", "2048"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        url = ""
        for line in server.stdout:
            if found := re.search(r"http://\S+", line):
                url = found[0]
                break
        if not url:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            return 1
        soak = Soak(url, options.minutes * 60, options.seed)
        clients = [threading.Thread(target=soak.run, args=(n,)) for n in range(options.clients)]
        for client in clients:
            client.start()
        print(f"{'minutes':>7} {'requests':>8} {'failures':>8} {'resident MiB':>12} {'descriptors':>11}")
        samples = []
        for part in range(1, 11):
            time.sleep(max(0.0, soak.end - options.minutes * 60 * (1 - part / 10) - time.monotonic()))
            samples.append(held(server.pid))
            memory, files = samples[-1]
            requests = sum(soak.sent.values())
            print(
                f"{options.minutes * part / 10:7.1f} {requests:8} {len(soak.failures):8} {memory / 2**20:12.0f} {files:11}",
                flush=True,
            )
        for client in clients:
            client.join()
        server.terminate()
        code = server.wait(60)
    print(
        "; ".join(f"{count} {name}" for name, count in sorted(soak.sent.items())),
        f"; the server exited with {code}",
        sep="",
    )
    for failure in soak.failures[:10]:
        print(failure, file=sys.stderr)
    (first_memory, first_files), (last_memory, last_files) = samples[0], samples[-1]
    grown = last_memory > first_memory * 1.2 + (64 << 20) or last_files > first_files + 16
    if grown:
        print("memory or descriptors grew", file=sys.stderr)
    return 1 if soak.failures or grown or code not in (0, -signal.SIGTERM) else 0


if __name__ == "__main__":
    sys.exit(main())

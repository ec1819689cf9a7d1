"""The command serve."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ..config import API_KEY, api_key, parse_bytes
from ..errors import UsageError
from ..experts.budget import for_conversations
from ..files import read_text
from ..machine import available_bytes
from ..options import ENGINE_OPTIONS, add_engine_options
from ..visible import one_line

__all__ = ["add_serve"]


def add_serve(commands: Any, style: dict[str, Any]) -> None:
    """Adds serve to the command line's subcommands; the engine's options are those of run."""
    serve = commands.add_parser(
        "serve",
        usage="expertstream serve [OPTIONS] [MODEL]",
        help="answer over HTTP as OpenAI's and Anthropic's APIs do",
        description=(
            "Serves /v1/chat/completions, /v1/completions, /v1/responses and /v1/models as OpenAI's API does,\n"
            "/v1/messages as Anthropic's does, /health, /metrics for Prometheus, and a status page at /. With no MODEL\n"
            "the small embedded model answers. Needs the packages of `pip install 'expertstream[server]'`."
        ),
        **style,
    )
    serve.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1); others need a key"
    )
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="(8080; 0 takes a free one)")
    serve.add_argument("--name", metavar="NAME", help="what clients call the model (the folder's name)")
    serve.add_argument(
        "--alias", metavar="NAME", nargs="+", action="extend", help="further names that the model answers to"
    )
    serve.add_argument("--any-model", action="store_true", help="answer to every model name")
    serve.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        nargs="+",
        action="extend",
        help="web pages that may use the server, such as http://localhost:3000",
    )
    serve.add_argument(
        "--strict-requests",
        action="store_true",
        help="refuse unknown fields (they are ignored, with a warning in the log)",
    )
    serve.add_argument(
        "--parse-control-tokens",
        action="store_true",
        help="let the text of messages contain control tokens such as <|im_end|> (they are plain text)",
    )
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"a key that clients must send; or in the environment, {API_KEY}",
    )
    serve.add_argument(
        "--parallel", type=int, default=4, metavar="N", help="texts that take turns, each with a context in memory (4)"
    )
    serve.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait; more are told 429 (32)"
    )
    serve.add_argument(
        "--timeout",
        type=float,
        default=3600,
        metavar="S",
        help="seconds that an answer may take, waiting included (3600)",
    )
    reuse = serve.add_argument_group("reuse of what was computed of earlier prompts (changes speed, never the text)")
    reuse.add_argument(
        "--cache-memory", metavar="SIZE", help="of the memory budget (an eighth, at most 4GiB; 0 for none)"
    )
    reuse.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep it here too, for the next start")
    reuse.add_argument("--cache-disk", default="16GiB", metavar="SIZE", help="at most so much in --cache-dir (16GiB)")
    add_engine_options(serve)
    serve.set_defaults(function=_serve)


def _key(options: argparse.Namespace) -> str:
    if options.api_key_file is None:
        return api_key()
    try:
        key = read_text(options.api_key_file, 64 << 10).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{options.api_key_file}: cannot be read: {error}") from None
    if not key:
        raise UsageError(f"{options.api_key_file}: no key in it")
    return str(key)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _origin(given: str) -> str:
    """Raises UsageError."""
    if given != "*" and not re.fullmatch(r"https?://[^/\s]+", given):
        raise UsageError(f"--cors-origin must be like http://localhost:3000, without a path, or *; got {given!r}")
    return given


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address, but does not listen yet: a mistake is told before a model is loaded, and nobody is kept waiting
    while it is. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise UsageError(f"{host}, port {port}: {error.strerror}; take another with --port or --host") from None
    return found


@contextlib.contextmanager
def _access_log_on_stderr() -> Iterator[None]:
    """Prints the access log, and nothing else, for as long as the server runs."""
    access, handler = logging.getLogger("expertstream.access"), logging.StreamHandler()
    before = access.level, access.propagate
    access.setLevel(logging.INFO)
    access.propagate = False
    access.addHandler(handler)
    try:
        yield
    finally:
        access.removeHandler(handler)
        access.setLevel(before[0])
        access.propagate = before[1]


def _serve(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from .app import ServerSettings, create_app
        from .protocol import Protocol, raise_file_limit
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("expertstream"):
            raise
        raise UsageError(f"serve needs the package {error.name}: pip install 'expertstream[server]'") from None
    from ..engine import LLM

    key = _key(options)
    if not _is_local(options.host) and not key:
        raise UsageError(f"{options.host} can be reached by others: give a key with --api-key-file or in {API_KEY}")
    for name, least, most in (("port", 0, 65535), ("queue", 0, 10_000), ("parallel", 1, 256), ("timeout", 1, 1e9)):
        if not least <= getattr(options, name) <= most:
            raise UsageError(f"--{name} is from {least} to {most:g}, not {getattr(options, name)}")
    if options.model is None and options.alias and Path(options.alias[-1]).is_dir():
        raise UsageError(f"--alias {options.alias[-1]}: that is a folder; give MODEL before --alias")
    origins = tuple(_origin(origin) for origin in options.cors_origin or ())
    given = {name: getattr(options, name) for name in ENGINE_OPTIONS}
    given |= for_conversations(parse_bytes(options.memory) if options.memory else None, available_bytes())
    if options.cache_memory is not None:
        given["prefix_cache_bytes"] = parse_bytes(options.cache_memory)
    disk = parse_bytes(options.cache_disk) if options.cache_dir is not None else 0
    given["sequences"] = options.parallel
    with (
        _access_log_on_stderr(),
        contextlib.closing(_bound(options.host, options.port)) as listener,
        LLM(options.model, **given) as llm,
    ):
        if options.cache_dir is not None:
            llm.keep_prefixes(options.cache_dir, disk)
        llm.sampling_params()  # a generation_config.json that cannot be used is told now
        settings = ServerSettings(
            name=options.name or llm.path.resolve().name,
            aliases=tuple(dict.fromkeys(options.alias or ())),
            any_model=options.any_model,
            cors_origins=origins,
            strict_requests=options.strict_requests,
            parse_control_tokens=options.parse_control_tokens,
            key=key,
            parallel=options.parallel,
            most_waiting=options.queue,
            seconds=options.timeout,
            only_local=_is_local(options.host) and not key,
            host=options.host,
        )
        print(f"[{llm.describe()}{f'; lossy: {llm.lossy}' if llm.lossy else ''}]", flush=True)
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"{one_line(settings.name)} answers at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        Protocol.max_connections = raise_file_limit()
        config = uvicorn.Config(
            create_app(llm, settings),
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(settings.shutdown_seconds),
            server_header=False,
            http=Protocol,
            backlog=128,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 << 10,
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if self.should_exit:  # asked twice: whatever is under way, without its threads' last words
                    print("expertstream: ended at once", file=sys.stderr, flush=True)
                    os._exit(130)
                patience = f"answers have {settings.shutdown_seconds:g} seconds to end; once more ends at once"
                print(f"expertstream: ending; {patience}", file=sys.stderr, flush=True)
                super().handle_exit(sig, frame)

        server = Server(config)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is ended, not how it fails
            server.run(sockets=[listener])
        return 0 if server.started else 1

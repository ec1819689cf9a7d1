"""LiteLLM's routes to both APIs: a tool's round trip at once and as a stream; an answer of a form; the proxy's configuration."""

import json
from typing import Any

import litellm
import recipe
import yaml
from pydantic import BaseModel


class City(BaseModel):
    name: str
    population: int


TOOL = {
    "type": "function",
    "function": {
        "name": "read_file", "description": "Read a file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}  # fmt: skip


def ask(route: dict[str, Any], stream: bool) -> tuple[str, int]:
    """What it says in the end, and how many pieces that came in."""
    messages: list[Any] = [{"role": "user", "content": "What is the secret word of notes.txt?"}]
    pieces = 0
    for _ in range(3):
        answer = litellm.completion(**route, messages=messages, tools=[TOOL], stream=stream, num_retries=0)
        if stream:
            chunks = list(answer)
            pieces += len(chunks)
            answer = litellm.stream_chunk_builder(chunks, messages=messages)
        message = answer.choices[0].message
        messages.append(message.model_dump())
        if not message.tool_calls:
            return message.content, pieces
        for call in message.tool_calls:
            with open(json.loads(call.function.arguments)["path"], encoding="utf-8") as file:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": file.read()})
    raise AssertionError(messages)


hello = [{"role": "user", "content": "Say hello."}]
found: dict[str, Any] = {"hello": recipe.answer.choices[0].message.content}
for name, route in (("chat", recipe.chat), ("messages", recipe.messages)):
    text, _ = ask(route, stream=False)
    streamed, pieces = ask(route, stream=True)
    city = litellm.completion(
        **route, messages=[{"role": "user", "content": "Describe Paris as a City."}], response_format=City
    )
    found[name] = {
        "text": text, "streamed": streamed, "pieces": pieces, "city": json.loads(city.choices[0].message.content),
    }  # fmt: skip
with open("config.yaml", encoding="utf-8") as file:
    router = litellm.Router(**yaml.safe_load(file))
found["proxy"] = router.completion("local", messages=hello).choices[0].message.content
print(json.dumps(found))

"""Each of LangChain's three models: a tool's round trip at once and as a stream, and an answer of a form."""

import json
from typing import Any

import recipe
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel


class City(BaseModel):
    name: str
    population: int


@tool
def read_file(path: str) -> str:
    """Read a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def ask(model: Any, stream: bool) -> tuple[str, int]:
    """What it says in the end, and how many pieces that came in."""
    model, messages, pieces = model.bind_tools([read_file]), [HumanMessage("What is the secret word of notes.txt?")], 0
    for _ in range(3):
        answer = None
        for piece in model.stream(messages) if stream else [model.invoke(messages)]:
            answer = piece if answer is None else answer + piece
            pieces += 1
        assert answer is not None and answer.usage_metadata["input_tokens"] > 0
        messages.append(answer)
        if not answer.tool_calls:
            return answer.text, pieces
        messages += [read_file.invoke(call) for call in answer.tool_calls]
    raise AssertionError(messages)


found = {}
for name, model in (("chat", recipe.model), ("responses", recipe.responses), ("claude", recipe.claude)):
    text, _ = ask(model, stream=False)
    streamed, pieces = ask(model, stream=True)
    city = model.with_structured_output(City).invoke("Describe Paris as a City.")
    found[name] = {"text": text, "streamed": streamed, "pieces": pieces, "city": city.model_dump()}
print(json.dumps(found))

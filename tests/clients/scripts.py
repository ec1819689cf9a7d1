"""What the model writes: decided by the prompt as the template rendered it, so that a client's messages have to arrive in it."""

from __future__ import annotations

import re
from collections.abc import Callable

from expertstream.text.control import ChatPrompt

from ..server.scripted import Written

__all__ = ["SECRET", "call", "is_whole", "round_trip", "say", "tool_results"]

SECRET = "marmalade-4711"
_SECRET = re.compile(r"secret word is ([\w-]+)")
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


def call(function: str, /, **arguments: str) -> str:
    """A call of a function, as the template asks for."""
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={function}>\n{parameters}</function>\n</tool_call>"


def is_whole(prompt: str) -> bool:
    """Whether this is a prompt to its end: a script also sees the parts in which it is read."""
    return prompt.endswith(("<think>\n", "</think>\n\n"))


def say(prompt: str, written: str) -> Written:
    """The answer, after a thought where the client wanted one."""
    return ChatPrompt(("A thought.\n</think>\n\n" + written if prompt.endswith("<think>\n") else written,))


def tool_results(prompt: str) -> list[str]:
    return _RESULT.findall(prompt)


def round_trip(function: str, /, **arguments: str) -> Callable[[str], Written]:
    """Calls the function; when there is a result, tells the secret word that is in it. Where the function is not offered (clients also
    ask for titles) it says something else."""

    def write(prompt: str) -> Written:
        results = tool_results(prompt)
        if results:
            found = _SECRET.search(results[-1])
            return say(
                prompt, f"The word is {found[1]}, says the file." if found else f"No secret in {results[-1][:300]}"
            )
        return say(prompt, call(function, **arguments) if f'"name": "{function}"' in prompt else "A secret word")

    return write

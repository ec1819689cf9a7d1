"""Conversations as text. `chat_template.jinja` is the format; `segments` writes the same text with a mark on what is learned.

A document is {"c": category, "m": messages, "tools": optional schemas}; messages are as in the OpenAI API: role, content,
tool_calls [{"name", "arguments"}], reasoning_content. The category "text" has one message, which is written as it is.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["SPECIALS", "SPLIT", "Document", "segments"]

Document = dict[str, Any]
# The family's control tokens, so that its own templates and parsers work with this tokenizer too.
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>", "<|audio_pad|>",
]  # fmt: skip
# The family's pre-tokenizer: contractions, words with their marks, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_INSTRUCTIONS = (
    "</tools>\n\nA call looks like this, with one block for each parameter:\n<tool_call>\n<function=NAME>\n"
    "<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _calls(message: Document) -> str:
    blocks = [
        f"<tool_call>\n<function={call['name']}>\n"
        + "".join(f"<parameter={k}>\n{_value(v)}\n</parameter>\n" for k, v in call["arguments"].items())
        + "</function>\n</tool_call>"
        for call in message.get("tool_calls") or []
    ]
    return ("\n\n" if blocks and message.get("content") else "") + "\n".join(blocks)


def segments(doc: Document) -> list[tuple[str, bool]]:
    """The document as pieces of text, each learned or only read. Their concatenation is what the template writes.

    Learned is what the assistant says, and all of a document that is text. A piece that an engine would be given as the
    end of a prompt ends there, so that its tokens are those that it meets later.
    """
    messages = doc["m"]
    if doc["c"] == "text":
        return [(messages[0]["content"] + "<|endoftext|>", True)]
    tools = doc.get("tools")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    head = ""
    if tools:
        listed = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in tools)
        head = "<|im_start|>system\n# Tools\n\nThese functions can be called:\n<tools>\n" + listed + _INSTRUCTIONS
        head += ("\n\n" + system if system else "") + "<|im_end|>\n"
    elif system:
        head = f"<|im_start|>system\n{system}<|im_end|>\n"
    query = max(i for i, m in enumerate(messages) if m["role"] == "user")
    out: list[tuple[str, bool]] = [(head, False)] if head else []
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            out.append((f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif role == "tool":
            first = messages[i - 1]["role"] != "tool"
            last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            text = ("<|im_start|>user" if first else "") + f"\n<tool_response>\n{message['content']}\n</tool_response>"
            out.append((text + ("<|im_end|>\n" if last else ""), False))
        elif role == "assistant":
            answer = (message.get("content") or "") + _calls(message) + "<|im_end|>\n"
            start = "<|im_start|>assistant\n"
            if i <= query:
                out += [(start, False), (answer, True)]
            elif doc.get("think"):  # asked to reason, if only to find that there is nothing to reason about
                out.append((start + "<think>\n", False))
                out.append((f"{message.get('reasoning_content') or ''}\n</think>\n\n{answer}", True))
            else:
                out += [(start + "<think>\n\n</think>\n\n", False), (answer, True)]
    return out

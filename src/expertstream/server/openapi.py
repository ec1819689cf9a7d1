"""The OpenAPI document, made from what requests are checked against."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .anthropic import CountRequest, MessagesRequest
from .openai import ChatRequest, CompletionRequest
from .responses import ResponsesRequest

__all__ = ["document"]

_REFUSALS = {
    "400": "what is wrong with the request",
    "401": "no key, or a wrong one",
    "404": "no such model",
    "408": "the body took too long",
    "413": "too large",
    "415": "not JSON",
    "429": "too many are waiting",
    "503": "stopping",
    "504": "the answer took longer than an answer may",
}


def document(name: str) -> dict[str, Any]:
    """Of a server whose model is called `name`."""
    kinds: list[type[BaseModel]] = [ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest]
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    answer = {"description": "the answer", "content": {"application/json": {}, "text/event-stream": {}}}
    refusals = {
        status: {"description": text, "content": {"application/json": {}}} for status, text in _REFUSALS.items()
    }

    def post(kind: type[BaseModel], summary: str) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {"200": answer, **refusals}}}

    def get(summary: str, media: str = "application/json", **more: Any) -> dict[str, Any]:
        found = {"description": summary, "content": {media: {}}}
        denied = {status: refusals[status] for status in ("401", "404", "503")}
        return {"get": {"summary": summary, "responses": {"200": found, **denied}, **more}}

    path = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "expertstream", "version": "1", "description": f"The model here is called {name}."},
        "paths": {
            "/v1/chat/completions": post(ChatRequest, "A chat's answer, as OpenAI's API gives it"),
            "/v1/completions": post(CompletionRequest, "A text's continuation, as OpenAI's API gives it"),
            "/v1/responses": post(ResponsesRequest, "A response, as OpenAI's newer API gives it, without state"),
            "/v1/messages": post(MessagesRequest, "A message, as Anthropic's API gives it"),
            "/v1/messages/count_tokens": post(CountRequest, "How many tokens a message would be"),
            "/v1/models": get("The models here"),
            "/v1/models/{name}": get("One of them", parameters=[path]),
            "/health": get("Whether requests are answered"),
            "/metrics": get("Prometheus metrics", "text/plain"),
            "/status": get("The status page's numbers"),
        },
        "components": {"schemas": schemas["$defs"]},
    }

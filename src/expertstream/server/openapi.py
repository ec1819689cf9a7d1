"""The OpenAPI document, generated from the classes that validate requests."""

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
    "401": "the API key is missing or wrong",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "the queue is full",
    "503": "the server is shutting down",
    "504": "the answer exceeded the time limit",
}


def document(name: str) -> dict[str, Any]:
    """The document of a server whose model is called `name`."""
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
        "info": {"title": "expertstream", "version": "1", "description": f"This server's model is called {name}."},
        "paths": {
            "/v1/chat/completions": post(ChatRequest, "Chat completion, as in OpenAI's API"),
            "/v1/completions": post(CompletionRequest, "Text completion, as in OpenAI's API"),
            "/v1/responses": post(ResponsesRequest, "Response, as in OpenAI's newer API, without state"),
            "/v1/messages": post(MessagesRequest, "Message, as in Anthropic's API"),
            "/v1/messages/count_tokens": post(CountRequest, "Number of tokens in a request for a message"),
            "/v1/models": get("The models of this server"),
            "/v1/models/{name}": get("One model", parameters=[path]),
            "/health": get("Whether requests are answered"),
            "/metrics": get("Prometheus metrics", "text/plain"),
            "/status": get("The status page's numbers"),
        },
        "components": {"schemas": schemas["$defs"]},
    }

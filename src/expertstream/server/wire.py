"""The rules of request bodies in all APIs: null means absent, and every field is honoured, ignored or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RequestError

__all__ = ["Wire", "check_part", "ignored", "parse_request", "refused"]

_HARMLESS: tuple[Any, ...] = ([], {}, "", False, 0)


class Wire(BaseModel):
    """A JSON object. Undeclared fields are stored separately: parse_request() reports them."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def ignored(why: str, warn: bool = False) -> Any:
    """A field that is accepted but has no effect; `why` is shown in the table in docs/serving.md. warn: log it, since the client does not
    get what it asks for."""
    effect = "ignored, with a warning in the log" if warn else "ignored"
    return Field(default=None, json_schema_extra={"x-effect": effect, "x-why": why})


def refused(why: str) -> Any:
    """A field that is refused unless it is empty or false."""
    return Field(default=None, json_schema_extra={"x-effect": "refused", "x-why": why})


Request = TypeVar("Request", bound=Wire)


def parse_request(kind: type[Request], body: bytes) -> tuple[Request, list[str], list[str]]:
    """The request, the names of unknown fields such as "messages.mood", and warnings about other fields. Raises RequestError that names the
    field."""
    try:
        try:
            request = kind.model_validate_json(body)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid" or b"\\u" not in body:
                raise
            request = kind.model_validate(_without_halves(body))
    except ValidationError as error:
        raise RequestError(_message(error, "")) from None
    except RecursionError:
        raise RequestError("body: too deeply nested") from None
    unknown, warnings = dict[str, None](), dict[str, None]()
    for path, name, value, effect, why in _fields(request, ""):
        # Without indices, so that each field is named only once.
        plain = ".".join(part for part in f"{path}{name}".split(".") if not part.isdigit())
        if effect == "refused" and value not in _HARMLESS:
            raise RequestError(f"{path}{name} is not supported: {why}")
        if effect == "unknown":
            unknown[plain] = None
        elif effect.endswith("log") and value not in _HARMLESS:
            warnings[f"{plain} is ignored: {why}"] = None
    return request, list(unknown), list(warnings)


def _without_halves(body: bytes) -> Any:
    """JSON in which lone surrogates, from clients that cut a text inside a character, become U+FFFD. Raises RequestError."""
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)
    except ValueError as error:
        raise RequestError(f"body: Invalid JSON: {error}") from None
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def check_part(kind: type[Request], value: Any, where: str) -> Request:
    """Validates a part of a request separately. Raises RequestError that names the field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise RequestError(_message(error, where)) from None


def _message(error: ValidationError, where: str) -> str:
    # For a union, the deepest error is that of the alternative that was meant.
    first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
    names = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "constrained-"))]
    return f"{'.'.join([*([where] if where else []), *names]) or 'body'}: {first['msg']}"


def _fields(model: Wire, path: str) -> Iterator[tuple[str, str, Any, str, str]]:
    """(path of the object, name, value, effect, why) of the fields that are not simply honoured, at every depth."""
    for name in sorted(model.model_fields_set):
        info = type(model).model_fields.get(name)
        if info is None:
            yield path, name, None, "unknown", ""
            continue
        value = getattr(model, name)
        extra = info.json_schema_extra
        if isinstance(extra, dict) and "x-effect" in extra:
            yield path, info.alias or name, value, str(extra["x-effect"]), str(extra["x-why"])
        for i, part in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(part, Wire):
                yield from _fields(part, f"{path}{info.alias or name}." + ("" if i is None else f"{i}."))

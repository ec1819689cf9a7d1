"""A schema is held exactly, or it is said what is not: whatever a grammar allows is an instance of the schema that a client sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream.text.grammar import json_rule
from expertstream.text.schema import UnsupportedSchemaError, normalize


class Bytes:
    """A tokenizer whose tokens are the bytes."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([i]) for i in range(256)), b"<eos>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257, eos_token=256, slices=[])


def matcher(schema: dict[str, Any]) -> llguidance.LLMatcher:
    return llguidance.LLMatcher(TOKENIZER, json_rule("start", schema), log_level=0)


def accepts(guide: llguidance.LLMatcher, text: str) -> bool:
    try:
        tokens = list(text.encode())
    except UnicodeEncodeError:
        return False
    copy = guide.deep_copy()
    return bool(copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting())


def walk(guide: llguidance.LLMatcher, choose: Callable[[int], int], most: int = 4000) -> str | None:
    """A random text of a grammar, which closes what it has begun the sooner the longer it is; None if it does not come to an end."""
    assert not guide.is_error(), guide.get_error()
    said = bytearray()
    while not guide.is_stopped() and len(said) < most:
        bits = np.unpackbits(np.frombuffer(guide.compute_bitmask(), np.uint8), bitorder="little")[:257]
        tokens = np.flatnonzero(bits).tolist()
        closers = [t for t in tokens if t in (256, *b'"]}\n<')]
        if closers and len(said) > 40:
            tokens = closers if 256 not in closers else [256]
        plain = [t for t in tokens if t == 256 or 32 <= t < 127] or tokens
        token = plain[choose(len(plain))]
        assert guide.consume_token(token), guide.get_error()
        if token == 256:
            break
        said.append(token)
    return said.decode() if guide.is_accepting() or guide.is_stopped() else None


SCALARS: st.SearchStrategy[Any] = st.sampled_from(
    [
        {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"type": "number", "minimum": 0.5, "maximum": 2},
        {"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^[ab]{1,4}$"}, {"enum": ["a", 1, None, 2.5]}, {"const": "k"},
        {"type": ["string", "null"]}, {"type": "integer", "exclusiveMinimum": 3, "maximum": 40}, {"type": "integer", "multipleOf": 7, "minimum": -21},
        {"$ref": "#/$defs/leaf"}, True, {"minimum": 3, "type": "number"}, {"type": "string", "not": {"enum": ["a", "b"]}},
    ]
)  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
    required = st.lists(st.sampled_from(["a", "b", "d"]), unique=True, max_size=2)
    rest = st.one_of(
        st.just({}), st.just({"additionalProperties": False}), st.builds(lambda s: {"additionalProperties": s}, inner)
    )
    counts = st.sampled_from([{}, {}, {"minProperties": 1}, {"maxProperties": 2}, {"minProperties": 2}])
    return st.builds(
        lambda p, r, a, c: {"type": "object", "properties": p, "required": r, **a, **c},
        properties,
        required,
        rest,
        counts,
    )


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    extra = st.sampled_from(
        [{}, {"minItems": 1}, {"maxItems": 2}, {"uniqueItems": True}, {"contains": {"type": "integer"}}]
    )
    return st.builds(lambda s, e: {"type": "array", "items": s, **e}, inner, extra)


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.builds(
        lambda key, parts: {key: parts}, st.sampled_from(["anyOf", "oneOf", "allOf"]), several
    ) | st.builds(lambda test, then, other: {"if": test, "then": then, "else": other}, inner, inner, inner)


SCHEMAS = st.recursive(SCALARS, lambda inner: objects(inner) | arrays(inner) | combined(inner), max_leaves=6)


@settings(deadline=None)
@given(SCHEMAS, st.data())
def test_whatever_a_grammar_allows_fits_the_schema(schema: Any, data: st.DataObject) -> None:
    whole = {"$defs": {"leaf": {"enum": ["x", "y"]}}, **(schema if isinstance(schema, dict) else {})}
    try:
        found = normalize(whole, exact=True)
    except UnsupportedSchemaError:
        return
    assert found.dropped == ()
    guide = matcher(found.schema)
    if "Unsatisfiable" in guide.get_error():  # a pattern and lengths that contradict each other
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(3):
        text = walk(guide.deep_copy(), lambda n: int(rng.integers(n)))
        if text is not None:
            jsonschema.validate(json.loads(text), whole)


@pytest.mark.parametrize(
    ("schema", "refused", "allowed"),
    [
        ({"oneOf": [{"not": {"type": "integer"}}, {"type": "number"}]}, ["1.5"], ['"a"']),
        ({"oneOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}], "type": "object"}, ['{"a": 1, "b": 2}', "{}"], ['{"a": 1}', '{"b": 2}']),
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}}} for k in "ab"]}, ["{}"], ['{"k": "a"}', '{"k": "b"}']),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"a": {}}}], "type": "object"}, ['{"b": 1}'], ['{"a": 1}']),
        ({"patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "string"}}, "required": ["ab", "ba"], "type": "object"}, ['{"ab": "x", "ba": "x"}'], ['{"ab": 1, "ba": "x", "a": 2}']),
        ({"type": "array", "items": {"enum": list("abcdefgh")}, "uniqueItems": True, "minItems": 2}, ['["a"]', '["a", "a"]'], ['["a", "h"]', '["a", "c", "d", "e", "h"]']),
    ],
)  # fmt: skip
def test_what_is_narrowed(schema: Any, refused: list[str], allowed: list[str]) -> None:
    guide = matcher(normalize(schema, exact=True).schema)
    assert not guide.is_error(), guide.get_error()
    assert [text for text in refused if accepts(guide, text)] == []
    assert [text for text in allowed if not accepts(guide, text)] == []


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (DEEP, "#: a schema must be at most 32 levels deep"),
        ({"enum": ["x" * 70_000]}, "#: a schema must be at most 64 KiB"),
        ({"type": "nonsense"}, '#: type: "nonsense" is not a type or a list of types'),
        (
            {"properties": {"a/b": {"$ref": "#/nowhere"}}},
            "#/properties/a~1b: \\$ref: the reference #/nowhere does not point to anything",
        ),
        ({"type": "string", "pattern": "(("}, "#: pattern: "),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "#: no value fits"),
        ({"not": {}}, "#: no value fits"),
        (False, "#: no value fits"),
        ({"$ref": "#"}, "#: \\$ref: refers to itself"),
        ({"type": "integer", "exclusiveMinimum": True}, "#: exclusiveMinimum: must be a number"),
        (
            {"type": "array", "items": {"$ref": "#"}, "minItems": 3},
            "every value that fits the schema would be infinite",
        ),
        ({"required": "a"}, "#: required: must be a list"),
        ({"maxLength": -1}, "#: maxLength: must be a whole number of at least 0"),
        ({"multipleOf": 0}, "#: multipleOf: must be greater than 0"),
        ({"properties": {"a": 3}}, "#: properties: a schema must be an object or a boolean"),
        ([], "#: root: a schema must be an object or a boolean"),
        ({"const": float("nan")}, "#: not valid JSON"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, message: str, exact: bool) -> None:
    with pytest.raises(UnsupportedSchemaError, match=message):
        normalize(schema, exact=exact)


@settings(deadline=None)
@given(st.data())
def test_numbers_keep_their_bounds(data: st.DataObject) -> None:
    bound = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6).map(lambda x: round(x, 4)))
    keys = data.draw(
        st.lists(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), unique=True)
    )
    schema = {"type": data.draw(st.sampled_from(["number", "integer"])), **{key: data.draw(bound) for key in keys}}
    try:
        guide = matcher(normalize(schema, exact=True).schema)
    except UnsupportedSchemaError:
        return
    near = [schema[key] + step for key in keys for step in (-1, -0.001, 0, 0.001, 1)]
    for number in [*near, data.draw(bound)]:
        text = f"{Decimal(str(number)):f}"
        if accepts(guide, text):
            jsonschema.validate(number, schema)
    assert not guide.is_error()


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.001}, ["0.0005"], ["0", "0.0", "-0", "0.001"]),
        ({"exclusiveMinimum": 0, "maximum": 0.1}, ["0.05", "0.1"], ["0", "0.0", "-0"]),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ["-0.1", "-0.5"], ["0", "-0", "-0.0"]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ["1.2"], ["1", "1.0", "1.5"]),
        ({"exclusiveMinimum": 2, "exclusiveMaximum": 2.001}, ["2.0005"], ["2", "2.001"]),
        ({"exclusiveMinimum": 0}, ["0.5", "3"], ["0", "0.0", "-0"]),
        ({"type": "integer", "multipleOf": 0.5}, ["2", "-3"], ["0.5", "2.5"]),
    ],
)
def test_open_bounds_stay_open(schema: dict[str, Any], valid: list[str], invalid: list[str]) -> None:
    guide = matcher(normalize({"type": "number", **schema}, exact=True).schema)
    assert [text for text in valid if not accepts(guide, text)] == []
    assert [text for text in invalid if accepts(guide, text)] == []


@pytest.mark.parametrize("form", [["date"], {}, [None], 3, None, "no such format"])
def test_a_format_of_any_kind_is_only_an_annotation(form: Any) -> None:
    assert accepts(matcher(normalize({"type": "string", "format": form}, exact=True).schema), '"x"')

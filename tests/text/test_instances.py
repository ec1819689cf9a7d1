"""Whether a value is an instance of a schema, and where references lead."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream.text.instances import matches, resolve

from .test_schema import SCHEMAS


@settings(deadline=None)
@given(
    SCHEMAS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 50) | st.sampled_from(["a", "x", "k", 2.5, 1.0]),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("abd"), x, max_size=3),
    ),
)
def test_whether_a_value_fits_is_what_jsonschema_says(schema: Any, value: Any) -> None:
    whole = {"$defs": {"leaf": {"enum": ["x", "y"]}}, **(schema if isinstance(schema, dict) else {})}
    assert matches(value, whole, whole) == jsonschema.Draft202012Validator(whole).is_valid(value)


def test_where_references_lead() -> None:
    root = {"$id": "r", "$defs": {"a/b": {"$anchor": "x", "c~d": [True]}}}
    assert resolve("#/$defs/a~1b", root) is resolve("#x", root) is root["$defs"]["a/b"]  # type: ignore[index]
    assert resolve("#/%24defs/a~1b/c~0d/0", root) is True and resolve("r", root) is root
    for nowhere in ("#/x", "#y", "#/$defs/a~1b/c~0d/1"):
        with pytest.raises(LookupError):
            resolve(nowhere, root)
    with pytest.raises(NotImplementedError):
        resolve("http://elsewhere", root)

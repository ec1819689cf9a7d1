"""Headers: whatever a file holds, the answer is tensors or one CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from expertstream import CheckpointError
from expertstream.checkpoint.safetensors import header_bytes, read_header, read_tensor

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1, 2], np.uint32),
        "empty": np.zeros((0, 4), np.float16),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    tensors = read_header(tmp_path / "x.safetensors")
    assert set(tensors) == set(arrays)
    assert tensors["a"].shape == (2, 3) and tensors["a"].dtype == "F32"
    assert read_tensor(tensors["a"]).view(np.float32).tolist() == list(range(6))
    assert read_tensor(tensors["a"], 4, 12).view(np.float32).tolist() == [1, 2]


@pytest.mark.parametrize("aligned", [True, False])
def test_the_library_reads_our_headers(tmp_path: Path, aligned: bool) -> None:
    data = np.arange(10, dtype=np.uint8)
    header = header_bytes({"x": ("U8", (2, 3), 6), "y": ("U8", (4,), 4)}, {"k": "v"}, aligned)
    assert not aligned or len(header) % 4096 == 0
    (tmp_path / "x.safetensors").write_bytes(header + data.tobytes())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["x"].tolist() == [[0, 1, 2], [3, 4, 5]] and loaded["y"].tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"", None, "truncated|not JSON"),
        ({}, 1 << 60, "its length is 1152921504606846976 bytes"),
        (b"not json", None, "not JSON"),
        (b"[" * 100000, None, "not JSON"),
        ([1], None, "not a JSON object"),
        ({"a": 3}, None, "tensor a: must have dtype"),
        ({"a": entry("Q4")}, None, "unknown dtype 'Q4'"),
        ({"a": entry(shape=(-1,))}, None, "invalid shape"),
        ({"a": entry(shape=(True,))}, None, "invalid shape"),
        ({"a": entry(offsets=(0,))}, None, "invalid data_offsets"),
        ({"a": entry(offsets=(-8, 0))}, None, "invalid data_offsets"),
        ({"a": entry(offsets=(8, 0))}, None, "data_offsets give -8"),
        ({"a": entry(shape=(3,))}, None, "is 12 bytes, but data_offsets give 8"),
        ({"a": entry(shape=(1 << 40, 1 << 40), offsets=(0, 1 << 82))}, None, "out of range"),
        ({"a": entry(offsets=(8, 16))}, None, "out of range"),
        ({"a": entry(), "b": entry()}, None, "tensors a and b overlap"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: Any, length: int | None, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(8), length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="truncated: 4 bytes"):
        read_header(tmp_path / "short")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, bytes(8))
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="tensor a: the file ends too early"):
        read_tensor(info)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 1 << 62), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 1 << 62), max_size=3) | json_values,
    },
)


@quick
@given(header=st.dictionaries(st.text(max_size=6), entries | json_values, max_size=5), data=st.binary(max_size=64))
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    for info in tensors.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= size
        assert read_tensor(info).shape == (info.nbytes,)


@quick
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)

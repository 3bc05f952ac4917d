"""Strict parsing of safetensors headers, and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, read_header, read_json, write_header
from vllm_gemma4q.errors import InputError


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="U8", shape=(2,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randint(-128, 127, (7,), dtype=torch.int8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    read = read_header(path)
    content = path.read_bytes()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape)
        stored = content[read[name].start : read[name].end]
        assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.dictionaries(
        st.text(min_size=1).filter(str.isprintable),
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=3)),
    )
)
def test_written_headers_read_back(tmp_path_factory, wanted):
    wanted.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    tensors = [(name, dtype, tuple(shape)) for name, (dtype, shape) in wanted.items()]
    sizes = [torch.Size(shape).numel() * DTYPE_BYTES[dtype] for _, dtype, shape in tensors]
    header = write_header(tensors)
    path.write_bytes(header + bytes(sum(sizes)))
    assert len(header) % 8 == 0
    read = read_header(path)
    assert {(name, info.dtype, info.shape) for name, info in read.items()} == set(tensors)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 7, "truncated or not safetensors"),
        (b"\xff" * 64, "truncated or not safetensors"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated or not safetensors"),
    ],
)
def test_not_safetensors(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'"text"', b"", "expected an object"),
        (b'{"a":{},"a":{}}', b"", "duplicate key 'a'"),
        ({"a": entry() | {"extra": 1}}, b"12", "tensor a: header entry must have exactly"),
        ({"a": entry(dtype="Q4")}, b"12", "tensor a: dtype 'Q4' is unknown"),
        ({"a": entry(shape=(-2,))}, b"12", "non-negative integers"),
        ({"a": entry(shape=(True, 2))}, b"12", "non-negative integers"),
        ({"a": entry(dtype="BF16")}, b"12", "tensor a: got 2 bytes, expected 4 for BF16"),
        ({"a": entry(shape=(2**40,))}, b"12", "tensor a: got 2 bytes, expected 1099511627776"),
        ({"a": entry(), "b": entry(offsets=(1, 3))}, b"123", "tensor b: overlaps"),
        ({"a": entry(), "b": entry()}, b"12", "tensor b: overlaps"),
        ({"a": entry(), "b": entry(offsets=(3, 5))}, b"12345", "tensor b: leaves a hole"),
        ({"a": entry()}, b"1", "truncated: file has"),
        ({"a": entry()}, b"123", "trailing bytes"),
    ],
)
def test_bad_headers_are_named(tmp_path, header, data, message):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_json_with_a_repeated_key_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(InputError, match=r"config.json: not valid JSON: duplicate key 'c'"):
        read_json(path)

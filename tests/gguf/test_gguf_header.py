"""Reading GGUF headers: agreement with the gguf package, and what is refused."""

import struct
import time

import pytest
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, block_size
from gguf import GGUFReader
from gguf_files import BF16, F32, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_mixed.errors import InputError
from gguf_mixed.header import FIXED_BYTES, MAX_NAME_BYTES, pad, read_header, without_trailing_ones

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15)
NUMBERS = st.integers(0, 2**32 - 1) | st.floats(width=32, allow_nan=False) | st.booleans()
VALUES = NUMBERS | st.text(max_size=20) | st.lists(st.integers(0, 9), min_size=1) | st.lists(st.text(), min_size=1)
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(QUANTIZABLE_TYPES), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    min_size=1,
)


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="a.weight", shape=(4, 2), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(*parts, version=3, tensors=0, keys=0, data=32, alignment=32):
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return header + bytes(-len(header) % alignment + data)


def read_bytes(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return read_header(path)


@settings(deadline=None, max_examples=60)
@given(TENSORS, st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from([None, 8, 64]))
def test_agrees_with_the_gguf_package(tmp_path_factory, tensors, metadata, alignment):
    metadata.pop("general.architecture", None)
    metadata.pop("general.alignment", None)
    listed = [(name, (shape[0] * block_size(qtype), *shape[1:]), qtype) for name, (qtype, shape) in tensors.items()]
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf", listed, metadata, alignment=alignment)
    header, package = read_header(path), GGUFReader(path)
    assert [entry.name for entry in header.tensors] == [entry.name for entry in package.tensors]
    for entry, other in zip(header.tensors, package.tensors, strict=True):
        assert entry.qtype == other.tensor_type
        assert entry.shape == without_trailing_ones(tuple(int(size) for size in other.shape))
        assert (entry.start, entry.n_bytes) == (other.data_offset, other.n_bytes)
    assert header.alignment == (alignment or 32)
    for key in metadata:
        value = package.fields[key].contents()
        assert header.get(key) == (tuple(value) if isinstance(value, list) else value)


def test_long_arrays_are_measured_and_not_kept(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", [("a", (1,), F32)], {"tokens": ["ab"] * 5000, "scores": [1.0] * 5000})
    entry = read_header(path).metadata
    assert entry["tokens"].value is entry["scores"].value is None
    assert entry["tokens"].written_bytes == 8 + 6 + 4 + 12 + 5000 * (8 + 2)
    assert entry["scores"].written_bytes == 8 + 6 + 4 + 12 + 5000 * 4


def test_strings_are_copied_up_to_their_first_zero_byte(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", [("a", (1,), F32)], {"key": "ab\0cd"})
    entry = read_header(path).metadata["key"]
    assert (entry.value, entry.written_bytes) == ("ab\0cd", 8 + 3 + 4 + 8 + 2)


def test_the_weights_are_not_read(tmp_path):
    """A file of a terabyte, of which only the header is on disk."""
    path = write_gguf(tmp_path / "x.gguf", [("a.weight", (2**20, 2**19), BF16)])
    assert path.stat().st_size > 2**40 > 2**20 > path.stat().st_blocks * 512
    started = time.perf_counter()
    assert read_header(path).tensors[0].n_bytes == 2**40
    assert time.perf_counter() - started < 1


def test_a_file_that_ends_after_its_header_is_marked(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", [("a.weight", (64, 4), F32)])
    header = read_header(whole)
    beginning = tmp_path / "beginning.gguf"
    beginning.write_bytes(whole.read_bytes()[: header.data_start])
    assert not header.header_only
    assert read_header(beginning).header_only
    assert read_header(beginning).tensors == header.tensors


def test_every_other_cut_is_an_error(tmp_path):
    metadata = {"a": 1, "b": "text", "c": [1, 2], "d": ["x", "y"]}
    content = write_gguf(tmp_path / "x.gguf", [("a.weight", (8, 4), F32)], metadata).read_bytes()
    accepted = []
    for length in range(len(content)):
        try:
            accepted.append((length, read_bytes(tmp_path, content[:length]).header_only))
        except InputError as error:
            assert "truncated" in str(error) or "not a GGUF" in str(error)
    data_start = len(content) - 128
    lengths = [length for length, header_only in accepted if header_only]
    assert len(lengths) == len(accepted)
    assert lengths == list(range(lengths[0], data_start + 1))
    assert data_start - 32 < lengths[0]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_an_input_error_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("gguf")
    metadata = {"general.alignment": 32, "b": "text", "c": [1, 2], "d": ["x", "y"]}
    content = bytearray(
        write_gguf(folder / "x.gguf", [("a.weight", (8, 4), F32), ("b", (3,), F32)], metadata).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 161))] = data.draw(st.integers(0, 255))
    try:
        read_bytes(folder, bytes(content))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF", "truncated: 4 bytes, a GGUF header has at least 24"),
        (gguf(version=1), "version 1, expected 2 or 3"),
        (gguf(version=3 << 24), "big-endian file"),
        (gguf(tensors=2**63), "9223372036854775808 tensors cannot fit in the 40 bytes left"),
        (gguf(keys=2**64 - 1), "18446744073709551615 metadata keys cannot fit"),
        (gguf(string("a") + struct.pack("<I", 99), keys=1), "key 'a': value of unknown kind 99"),
        (gguf(string("") + struct.pack("<II", 4, 1), keys=1), "a metadata key is empty"),
        (gguf(string(b"\xff") + struct.pack("<II", 4, 1), keys=1), "a metadata key is not UTF-8"),
        (gguf(struct.pack("<Q", 2**64 - 1), keys=1), "truncated: a metadata key needs 18446744073709551615 bytes"),
        (gguf(*[string("a") + struct.pack("<II", 4, 1)] * 2, keys=2), "duplicate key 'a'"),
        (gguf(string("a") + struct.pack("<IIQ", 9, 4, 2**60), keys=1), "truncated: key 'a' needs 4611686018427387904"),
        (gguf(string("a") + struct.pack("<IIQ", 9, 8, 2**60), keys=1), "1152921504606846976 strings in key 'a' cannot"),
        (gguf(string("a") + struct.pack("<IIQ", 9, 9, 1), keys=1), "arrays of arrays"),
        (gguf(string("general.alignment") + struct.pack("<II", 4, 48), keys=1), "general.alignment is 48"),
        (gguf(string("general.alignment") + struct.pack("<II", 4, 0), keys=1), "general.alignment is 0"),
        (gguf(string("general.alignment") + struct.pack("<IQ", 10, 32), keys=1), "expected a power of two (UINT32)"),
        (gguf(tensor(), tensor(offset=32), tensors=2), "duplicate tensor a.weight"),
        (gguf(tensor(name="a" * 64), tensors=1), f"name of 64 bytes, ggml allows {MAX_NAME_BYTES}"),
        (gguf(tensor(name="a\0b"), tensors=1), "holds a zero byte"),
        (gguf(tensor(shape=(1,) * 5), tensors=1), "5 dimensions, ggml allows 4"),
        (gguf(tensor(shape=(2**32, 2**32)), tensors=1), "holds 18446744073709551616 weights"),
        (gguf(tensor(shape=(2**63, 2)), tensors=1), "holds 18446744073709551616 weights"),
        (gguf(tensor(shape=(4, 0)), tensors=1), "holds 0 weights"),
        (gguf(tensor(kind=4), tensors=1), "type 4 is unknown"),
        (gguf(tensor(kind=2), tensors=1), "rows of 4, Q4_0 needs a multiple of 32"),
        (gguf(tensor(offset=32), tensors=1), "data at offset 32, expected 0"),
        (gguf(tensor(), tensor(name="b", offset=64), tensors=2), "tensor b: data at offset 64, expected 32"),
        (gguf(tensor(), tensor(name="b"), tensors=2), "tensor b: data at offset 0, expected 32"),
        (gguf(tensor(shape=(4, 3)), tensors=1), "truncated: tensor a.weight ends at byte"),
        (gguf(tensor(shape=(2**40,)), tensors=1), "truncated: tensor a.weight ends at byte"),
    ],
)
def test_refused(tmp_path, content, message):
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read_bytes(tmp_path, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="nothing.gguf: cannot be read: No such file"):
        read_header(tmp_path / "nothing.gguf")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


@given(st.integers(0, 10**12), st.sampled_from([1, 8, 32, 4096]))
def test_padding(size, alignment):
    assert size <= pad(size, alignment) < size + alignment
    assert pad(size, alignment) % alignment == 0


def test_an_empty_model_is_as_long_as_its_fixed_part(tmp_path):
    assert read_bytes(tmp_path, gguf(data=0)[:FIXED_BYTES]).tensors == ()

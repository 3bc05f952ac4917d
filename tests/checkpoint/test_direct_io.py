"""Reading and writing past the page cache: the same bytes at any offset, length and file system."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_gemma4q.checkpoint.direct_io import DirectReader, DirectWriter, aligned_buffer, fits
from vllm_gemma4q.checkpoint.hashing import HashingReader
from vllm_gemma4q.errors import InputError

CONTENT = bytes(range(251)) * 400  # 100,400 bytes: no multiple of any block size
# A disk, and memory, where older kernels refuse direct access.
FOLDERS = [None, Path("/dev/shm")]


@pytest.fixture(params=[folder for folder in FOLDERS if folder is None or os.access(folder, os.W_OK)], ids=str)
def file(request, tmp_path):
    path = (request.param or tmp_path) / f"direct-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(first=st.integers(0, len(CONTENT)), second=st.integers(0, len(CONTENT)))
def test_any_range_is_read(file, first, second):
    if not file.exists():
        file.write_bytes(CONTENT)
    start, stop = sorted((first, second))
    reader = DirectReader(file)
    assert reader.size == len(CONTENT)
    assert bytes(reader.read(start, stop, aligned_buffer(stop - start))) == CONTENT[start:stop]
    reader.close()


def test_reading_past_the_end_is_refused(file):
    file.write_bytes(CONTENT)
    reader = DirectReader(file)
    with pytest.raises(InputError, match="truncated while it was read, at byte 100400"):
        reader.read(90_000, 110_000, aligned_buffer(20_000))
    reader.close()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(sizes=st.lists(st.integers(0, 6 << 20), max_size=4))
def test_any_pieces_are_written(file, sizes):
    pieces = [os.urandom(size) for size in sizes]
    writer = DirectWriter(file)
    for piece in pieces:
        writer.write(piece)
    writer.sync()
    writer.close()
    assert file.read_bytes() == b"".join(pieces)


def test_hash_covers_what_is_skipped_and_counts_nothing_twice(tmp_path):
    content = os.urandom(5_000_003)
    (tmp_path / "file").write_bytes(content)
    reader = HashingReader(tmp_path / "file")
    buffer = aligned_buffer(1000)
    for start, stop in [(10, 900), (3_000_001, 3_000_777), (3_000_500, 3_001_000), (10, 500)]:
        assert bytes(reader.read(start, stop, buffer)) == content[start:stop]
    assert reader.finish() == hashlib.sha256(content).hexdigest()
    reader.close()


def test_buffers_say_what_fits():
    buffer = aligned_buffer(5000)
    assert fits(5000, buffer)
    assert not fits(len(buffer), buffer)

"""SHA-256 of files while they stream by."""

import hashlib
import mmap
from pathlib import Path

from vllm_gemma4q.checkpoint.direct_io import DirectReader, DirectWriter, aligned_buffer

_GAP_BYTES = 1 << 20


class HashingReader:
    """A source file, read in ranges and hashed on the way; what is skipped is read for the hash alone.

    Ranges come in the order of the file, or again: each byte counts once.
    """

    def __init__(self, path: Path):
        self._reader = DirectReader(path)
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._skipped = aligned_buffer(_GAP_BYTES)

    def read(self, start: int, stop: int, buffer: mmap.mmap) -> memoryview:
        """The bytes from `start` to `stop`, in `buffer`."""
        self._hash_up_to(start)
        data = self._reader.read(start, stop, buffer)
        if stop > self._hashed:
            self._sha256.update(data[self._hashed - start :])
            self._hashed = stop
        return data

    def finish(self) -> str:
        """SHA-256 of the whole file."""
        self._hash_up_to(self._reader.size)
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._reader.close()

    def _hash_up_to(self, position: int) -> None:
        while self._hashed < position:
            stop = min(self._hashed + _GAP_BYTES, position)
            self._sha256.update(self._reader.read(self._hashed, stop, self._skipped))
            self._hashed = stop


class HashingWriter:
    """A file being written, with the SHA-256 of what has been written so far."""

    def __init__(self, writer: DirectWriter):
        self._writer = writer
        self.n_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        self._writer.write(data)
        self.n_bytes += len(data)

"""Files read and written once, past the page cache where the file system allows it (O_DIRECT), through it elsewhere.

A stream gains nothing from the page cache and pays for it. Measured on the machine of
benchmarks/results/quantize_int8.json: 0.7 s of CPU a gigabyte read cold and 0.3 to 3 s a gigabyte written and
synced, against 0.04 s and 0.02 s without it. Nor does a quantization then push a served model out of memory.

The kernel wants addresses, offsets and lengths in multiples of a block for this, hence buffers from mmap, reads that
start and end a little outside what is asked for, and a last piece of a file that goes the ordinary way.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from vllm_gemma4q.errors import InputError, reading

_ALIGNMENT = 4096
_WRITE_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_buffer(size: int) -> mmap.mmap:
    """Memory for a read of `size` bytes at any offset."""
    return mmap.mmap(-1, _round_up(size) + _ALIGNMENT)


def fits(size: int, buffer: mmap.mmap) -> bool:
    """Whether a buffer is large enough for a read of `size` bytes at any offset."""
    return _round_up(size) + _ALIGNMENT <= len(buffer)


class DirectReader:
    """A file to be read in ranges."""

    def __init__(self, path: Path):
        self._path = path
        with reading(path):
            self._descriptor = _open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int, buffer: mmap.mmap) -> memoryview:
        """The bytes from `start` to `stop`, somewhere in `buffer` (of `aligned_buffer(stop - start)` or larger).

        Raises:
            InputError: the file ends before `stop`; ReadError: the system refuses.
        """
        with reading(self._path):
            return self._read(start, stop, buffer)

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, start: int, stop: int, buffer: mmap.mmap) -> memoryview:
        lead = start % _ALIGNMENT
        begin, wanted = start - lead, stop - start + lead
        view = memoryview(buffer)[: _round_up(wanted)]
        filled = 0
        while filled < wanted:
            try:
                count = os.preadv(self._descriptor, [view[filled:]], begin + filled)
            except OSError as error:
                _leave_direct(self._descriptor, error)
                continue
            if count == 0:
                raise InputError(f"{self._path.name}: truncated while it was read, at byte {begin + filled}")
            filled += count
        return view[lead:wanted]


class DirectWriter:
    """A new file, written from its start to its end."""

    def __init__(self, path: Path):
        self._descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._buffer = mmap.mmap(-1, _WRITE_BYTES)
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            count = min(len(data), _WRITE_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _WRITE_BYTES:
                self._empty_buffer()

    def sync(self) -> None:
        """Returns when all bytes are on the disk; nothing can be written after it."""
        _clear_direct(self._descriptor)
        self._empty_buffer()
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
        self._buffer.close()

    def _empty_buffer(self) -> None:
        written = 0
        with memoryview(self._buffer) as view:
            while written < self._filled:
                try:
                    written += os.write(self._descriptor, view[written : self._filled])
                except OSError as error:
                    _leave_direct(self._descriptor, error)
        self._filled = 0


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _leave_direct(descriptor: int, error: OSError) -> None:
    """Go on through the page cache where the file system refuses direct access, or a length; re-raise all else."""
    if error.errno != errno.EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT:
        raise error
    _clear_direct(descriptor)


def _clear_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

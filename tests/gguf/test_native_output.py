"""What C code prints does not reach the program's output."""

import subprocess
import sys

PROGRAM = """
import ctypes
from gguf_mixed.native_output import native_output_discarded

libc = ctypes.CDLL(None)
libc.puts(b"before")
print("said")
try:
    with native_output_discarded():
        libc.puts(b"C")
        print("Python")
        raise ValueError
except ValueError:
    print("after")
libc.puts(b"at the end")
"""


def test_only_the_block_is_discarded():
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert sorted(finished.stdout.splitlines()) == ["after", "at the end", "before", "said"]

"""Keeping what compiled libraries print out of a program's own output, which may be one JSON document.

HiGHS, as scipy 1.17 brings it, prints a line of its debugging (`HighsMipSolverData::transformNewIntegerFeasibleSolution
tmpSolver.run();`) on standard output now and then, whatever its options say.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_output_discarded() -> Iterator[None]:
    """Discard what is written to the process's standard output, from Python too, until the block is left.

    Of the whole process: not for blocks during which another thread prints.
    """
    libc = ctypes.CDLL(None)  # the process itself: of its C library, whichever that is
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        sys.stdout.flush()
        libc.fflush(None)  # C keeps a buffer of its own, which would come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

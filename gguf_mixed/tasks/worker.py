"""A worker process: carries out what comes through a pipe, one task at a time, and ends with the other end of the pipe.

In:   pickled (function, task)
Out:  ("done", work so far) now and then, ("outcome", Outcome) in the end
"""

import os
import pickle
import queue
import threading
import traceback
from multiprocessing.connection import Connection

from gguf_mixed.tasks.base import Outcome, attempt


def main(descriptor: int) -> None:
    """Work until the pipe is closed, which it is when the process that holds its other end dies, however it does."""
    pipe: Connection[object, object] = Connection(descriptor)
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, received), daemon=True).start()
    while True:
        pipe.send(("outcome", _carry_out(received.get(), pipe)))


def _receive(pipe: "Connection[object, object]", received: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            received.put(pipe.recv_bytes())
    except (EOFError, OSError):
        # In the middle of a task, too: nobody waits for it.
        os._exit(1)


def _carry_out(message: bytes, pipe: "Connection[object, object]") -> Outcome:
    try:
        function, task = pickle.loads(message)
    except Exception:
        return Outcome(raised=RuntimeError(f"a worker cannot read its task:\n{traceback.format_exc()}"))
    return attempt(function, task, lambda done: pipe.send(("done", done)))

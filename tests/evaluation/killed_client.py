"""Start a program as the measured code does, say which processes it has, and wait to be killed.

python killed_client.py HOW COMMAND..       HOW: spawn, thread (one that has ended since), run_tool, serve
"""

import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path

from gguf_mixed.llama_cpp import run_tool
from gguf_mixed.tether import spawn
from vllm_gemma4q.evaluation.server import serve


def say(line):
    print(line, flush=True)


def start(stack, command):
    stack.enter_context(spawn(command))


how, command = sys.argv[1], sys.argv[2:]
with contextlib.ExitStack() as stack:
    if how == "spawn":
        start(stack, command)
    elif how == "thread":
        thread = threading.Thread(target=start, args=(stack, command))
        thread.start()
        thread.join()
        time.sleep(0.5)  # what is sent when the thread ends would have come
        say("thread ended")
    elif how == "run_tool":
        run_tool(command, say)
    elif how == "serve":
        log = Path(tempfile.mkdtemp()) / "vllm.log"
        stack.enter_context(serve(Path(command[0]), ("--enforce-eager", "--max-model-len", "128"), log))
        say("serving")
    time.sleep(600)

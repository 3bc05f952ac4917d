"""Run `gemma4q ARGUMENTS..` and kill this very process when the Nth block of a conversion has been consumed."""

import os
import signal
import sys
from itertools import count

import vllm_gemma4q.checkpoint.convert as engine
from vllm_gemma4q.cli import main

kill_at, sys.argv = int(sys.argv[1]), ["gemma4q", *sys.argv[2:]]
blocks, rewrite = count(1), engine.rewrite


def killed_rewrite(shards, run, progress, *others):
    def consumed(n_bytes):
        if next(blocks) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        progress(n_bytes)

    return rewrite(shards, run, consumed, *others)


engine.rewrite = killed_rewrite
main()

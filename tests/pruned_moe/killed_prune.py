"""Run `gemma4q ARGUMENTS..` in child processes that kill themselves at the given reports of progress, one after the
other, and a last time to its end.

    python killed_prune.py KILL_AT,KILL_AT,.. ARGUMENTS..

Each goes on with what the one before left. Children are forked before any tensor is made, so that importing torch and
transformers is paid for once.
"""

import os
import signal
import sys
from itertools import count

import torch

from vllm_gemma4q.calibration import decoder  # noqa: F401
from vllm_gemma4q.cli import main
from vllm_gemma4q.commands import prune_model, prune_writing

kill_at = [int(number) for number in sys.argv[1].split(",")]
sys.argv = ["gemma4q", *sys.argv[2:]]
reports = count(1)


def counting(bar, kill):
    """A bar that kills this process when bars have been updated so often."""

    def made(*arguments):
        made_bar = bar(*arguments)
        update = made_bar.update

        def updated(amount):
            if next(reports) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(amount)

        made_bar.update = updated
        return made_bar

    return made


def child(kill):
    torch.set_num_threads(1)
    prune_model._token_bar = counting(prune_model._token_bar, kill)
    prune_writing.byte_bar = counting(prune_writing.byte_bar, kill)
    main()


for kill in [*kill_at, 0]:
    process = os.fork()
    if not process:
        try:
            child(kill)
        except SystemExit as end:
            assert not end.code, end
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status == (signal.SIGKILL if kill else 0), (kill, status)

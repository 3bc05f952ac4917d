"""Calibrate in a child process that kills itself when it has reported progress KILL_AT times; again, until it ends.

    python killed_calibration.py KIND TEXT TARGET WORK FISHER LIMIT KILL_AT..

Each number is for one child; the next goes on with what that one left. Prints how often the last one, which is not
killed, reported. Children are forked before any tensor is made, so that importing torch is paid for once.
"""

import os
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from calibration_runs import calibration

from vllm_gemma4q.calibration.calibrate import calibrate

kind, (text, target, work, fisher) = sys.argv[1], map(Path, sys.argv[2:6])
limit, *kill_at = map(int, sys.argv[6:])


def child(kill: int) -> None:
    torch.set_num_threads(1)
    reports = count(1)

    def progress(tokens: int) -> None:
        if next(reports) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    run = replace(calibration(kind, text, limit=limit), passes=2, seed=3)
    assert calibrate(run, target, work, fisher, progress)
    print(next(reports) - 1, flush=True)


for kill in [*kill_at, 0]:
    process = os.fork()
    if not process:
        child(kill)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status == (signal.SIGKILL if kill else 0), status

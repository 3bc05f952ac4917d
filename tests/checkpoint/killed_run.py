"""Quantize SRC to DST and kill this very process when the Nth block has been consumed (0: never)."""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.quark_int8 import quantize

sys.modules["vllm_gemma4q.checkpoint.rewrite"].BLOCK_BYTES = 1 << 16
source, target, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
blocks = count(1)


def progress(n_bytes: int) -> None:
    if next(blocks) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


convert(quantize.plan(open_checkpoint(source), max_shard_bytes=60_000), target, ["test"], progress)
print(next(blocks) - 1)

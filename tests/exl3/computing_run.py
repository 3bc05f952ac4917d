"""Convert SRC to DST by steps that compute, and kill this very process at the Nth report of progress (0: never).

python computing_run.py SRC DST N      every matrix of SRC becomes its column sums; prints the number of reports
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.checkpoint.steps import Computed, OutputTensor, Step


def column_sums(rows, progress):
    total = torch.zeros(rows.shape[1])
    for part in rows.split(len(rows) // 2):
        total += part.float().sum(dim=0)
        progress(part.nbytes)
    return Computed([total], {f"{rows.shape[0]} rows": float(total.double().sum())})


def plan(source, compute=column_sums):
    """Matrices are groups of two; `vector` is copied."""
    steps = []
    for index, tensor in enumerate(source.tensors.values()):
        if len(tensor.shape) == 2:
            sums = OutputTensor(f"{tensor.name}.sums", "F32", tensor.shape[1:])
            steps.append(Step(tensor, (sums,), compute=compute, group=str(index // 2)))
        else:
            steps.append(Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),)))
    return Conversion("test", source, steps, {}, {}, conclude=lambda notes: {"sums": notes})


def main():
    kill_at, reports = int(sys.argv[3]), count(1)

    def progress(n_bytes):
        if next(reports) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(plan(open_checkpoint(sys.argv[1])), Path(sys.argv[2]), ["test"], progress)
    print(next(reports) - 1)


if __name__ == "__main__":
    main()

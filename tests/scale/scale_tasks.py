"""Tasks that workers can import."""

import os
import signal
import time
from functools import partial

import torch

from gguf_mixed.errors import InputError
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.steps import Computed, OutputTensor, Step

PAUSE = 3  # seconds


class Stubborn(Exception):
    def __reduce__(self):
        raise TypeError("never")


def square(number, attempt):
    attempt.progress(number)
    return number * number


def square_but_three(number, attempt):
    if number == 3:
        raise InputError("task 3: got three, expected another")
    return square(number, attempt)


def deadly_five(number, attempt):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def stubborn(number, attempt):
    raise Stubborn("got no pickle")


def node_after_a_while(number, attempt):
    time.sleep(0.5)
    return node()


def node():
    import ray

    return ray.get_runtime_context().get_node_id()


def matrices():
    return {f"matrix_{rows}": torch.randn(rows, 24).bfloat16() for rows in range(10, 20)}


def plan(source, began=None):
    """Column sums, a shard each; with a folder, slowly, and noting there which node began which."""
    steps = []
    for tensor in source.tensors.values():
        sums = OutputTensor(f"{tensor.name}.sums", "F32", tensor.shape[1:])
        steps.append(Step(tensor, (sums,), compute=partial(column_sums, began), group=tensor.name))
    return Conversion("test", source, steps, {}, {})


def column_sums(began, rows, progress):
    if began is not None:
        (began / f"{node()}.{len(rows)}.{os.getpid()}").touch()
        time.sleep(PAUSE)
    progress(rows.nbytes)
    return Computed([rows.float().sum(dim=0)], {})

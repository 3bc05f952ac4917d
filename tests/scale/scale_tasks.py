"""Tasks that workers can import."""

import os
import signal

from gguf_mixed.errors import InputError


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

"""What every way of carrying out tasks has in common: the interface, an attempt at a task, what may become of it."""

import pickle
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from gguf_mixed.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Progress = Callable[[int], object]

# Of one task, before it is taken to be what kills them.
ATTEMPTS = 4
_REPORT_SECONDS = 0.2


class TaskLost(InputError):
    """Workers died over a task, or there are none left: what is finished is good, and the run can be resumed."""


@dataclass(frozen=True)
class Attempt:
    """One try at one task.

    Attributes:
        name: no other attempt, of whatever run, has it; fit for the name of a file.
        progress: to be called with what was done since the last call, in the task's own unit.
    """

    name: str
    progress: Progress


class Executor(Protocol):
    """A way of carrying out tasks."""

    def run(
        self, function: Callable[[Task, Attempt], Result], tasks: Iterable[Task], progress: Progress
    ) -> Generator[tuple[int, Result], None, None]:
        """Yield each task's place among the tasks and its result, as they come.

        Args:
            function: of a module that workers can import.
            tasks: are taken one by one, not long before there is somebody for them.
            progress: called with what tasks report, and with less than nothing for an attempt that was lost.

        Raises:
            TaskLost: workers died over one task `ATTEMPTS` times.
            Exception: what a task raised. No task is running any more when this is over, however it ends.
        """

    def on_each_machine(self, function: Callable[[Task], Result], argument: Task) -> dict[str, Result]:
        """What a function returns on each machine but this one, by the machine's name.

        Raises:
            TaskLost: one does not answer, or cannot import the function.
        """


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt that did not die: a result, or what was raised."""

    result: Any = None
    raised: BaseException | None = None

    def get(self) -> Any:
        if self.raised is not None:
            raise self.raised
        return self.result


def attempt(function: Callable[[Any, Attempt], Any], task: Any, report: Progress) -> Outcome:
    """Carry out a task in this process.

    Args:
        report: called now and then with all that this attempt has done so far.
    """
    done, reported = 0, time.monotonic()

    def progress(count: int) -> None:
        nonlocal done, reported
        done += count
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            report(done)

    try:
        result = function(task, Attempt(uuid4().hex, progress))
        report(done)
        return Outcome(result)
    except Exception as error:
        return Outcome(raised=_portable(error))


def _portable(error: Exception) -> Exception:
    """The same error, or its text where it cannot be sent to another process; with where it was raised."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In a worker:\n{text}")
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, type(error))
        return error
    except Exception:
        return RuntimeError(f"in a worker:\n{text}")


class Ledger:
    """The sum of what attempts have done, of each task the latest one."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._done: dict[int, int] = {}

    def note(self, place: int, done: int) -> None:
        """A task's attempt has come so far; 0 when it is lost."""
        change = done - self._done.get(place, 0)
        self._done[place] = done
        if change:
            self._progress(change)

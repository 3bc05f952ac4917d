"""Tasks in threads of this process: for functions that leave Python's lock, as calls of compiled libraries do."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from uuid import uuid4

from gguf_mixed.tasks.base import Attempt, Progress, Result, Task

_WAITING_PER_THREAD = 2


class Threads:
    """See `Executor`. Results come in the order of tasks; `progress` is called from several threads."""

    def __init__(self, count: int):
        self._count = count

    def run(
        self, function: Callable[[Task, Attempt], Result], tasks: Iterable[Task], progress: Progress
    ) -> Generator[tuple[int, Result], None, None]:
        waiting: deque[tuple[int, Future[Result]]] = deque()
        pool = ThreadPoolExecutor(self._count)
        try:
            for place, task in enumerate(tasks):
                waiting.append((place, pool.submit(function, task, Attempt(uuid4().hex, progress))))
                if len(waiting) >= _WAITING_PER_THREAD * self._count:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def on_each_machine(self, function: Callable[[Task], Result], argument: Task) -> dict[str, Result]:
        return {}

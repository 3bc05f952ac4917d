"""Tasks that need nothing of each other, carried out by threads, by processes of this machine, or by a Ray cluster.

A task is an argument of a module's function. Its result may come in any order and is the same wherever it is made; what
a task writes lies where every worker and the caller see it. Workers that die are replaced, and their tasks done again.
"""

from gguf_mixed.tasks.base import Attempt, Executor, Progress, TaskLost
from gguf_mixed.tasks.threads import Threads
from gguf_mixed.tasks.where import Where, executor

__all__ = ["Attempt", "Executor", "Progress", "TaskLost", "Threads", "Where", "executor"]

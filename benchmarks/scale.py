"""How much faster is EXL3 by two workers, and by a Ray cluster, than by one process?

    .venv/bin/python benchmarks/scale.py [--loaded] [--layers 4]

One checkpoint with `--layers` layers of a few million weights, no Hessians, 2 bits. In turn, with the same cores:

- one process;
- `Where(workers=2)`: two processes, each with half of the cores;
- Ray: a cluster of one node, started before the clock, with two tasks at once.

Bytes must be equal. Each time is that of the whole conversion, workers' start included; the search's compilation, which
every new process pays for once, is measured alone. Results go to benchmarks/results/.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import result_file  # noqa: E402
import torch  # noqa: E402
from gemma4q_kernels.exl3 import quantize_linear  # noqa: E402
from synthetic import small_config, write_checkpoint  # noqa: E402

from gguf_mixed.tasks import Where, executor  # noqa: E402
from gguf_mixed.tasks.processes import cores  # noqa: E402
from vllm_gemma4q.checkpoint import open_checkpoint  # noqa: E402
from vllm_gemma4q.checkpoint.convert import convert  # noqa: E402
from vllm_gemma4q.exl3.quantize import Options, plan  # noqa: E402

CONTESTANTS = {
    "one process": Where(),
    "two workers": Where(workers=2),
    "Ray, two at once": Where(workers=2, ray="local"),
}


def write_source(folder: Path, layers: int) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers, "head_dim": 64}
    text = {**sizes, "layer_types": ["sliding_attention"] * layers}
    return write_checkpoint(folder, small_config(**text))


def run_once(source: Path, target: Path, where: Where) -> tuple[dict[str, float], dict[str, bytes]]:
    """Seconds, and the files that were written."""
    started = time.perf_counter()
    with executor(where) as workers:
        ready = time.perf_counter()
        conversion = plan(open_checkpoint(source), Options(2, 16), None)
        assert convert(conversion, target, ["benchmark"], lambda _: None, workers=workers)
        written = time.perf_counter()
    seconds = {"seconds": written - ready, "seconds_to_connect": ready - started}
    return seconds, {path.name: path.read_bytes() for path in target.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--loaded", action="store_true", help="other work runs on the machine: say so in the result")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "scale.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    quantize_linear(torch.randn(128, 128), None, 2)
    compilation = time.perf_counter() - started
    table: dict[str, Any] = {}
    files: list[dict[str, bytes]] = []
    with tempfile.TemporaryDirectory() as work:
        source = write_source(Path(work) / "source", arguments.layers)
        for name, where in CONTESTANTS.items():
            seconds, written = run_once(source, Path(work) / name.replace(" ", "-"), where)
            table[name] = {key: round(value, 2) for key, value in seconds.items()}
            files.append(written)
            print(f"{name}: {table[name]}", flush=True)
        source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert all(written == files[0] for written in files), "bytes differ"
    one = table["one process"]["seconds"]
    result = {
        **result_file.on_this_cpu(arguments.loaded, "numba", "ray"),
        "cores": cores(),
        "layers": arguments.layers,
        "source_bytes": source_bytes,
        "seconds_of_first_compilation": round(compilation, 2),
        "runs": table,
        "speed over one process": {name: round(one / row["seconds"], 2) for name, row in table.items()},
        "same_bytes": True,
    }
    result_file.write(arguments.output, result)
    print(result["speed over one process"])


if __name__ == "__main__":
    main()

"""How much memory and time `gemma4q calibrate` takes, beside the whole model in transformers and its offload to disk.

    .venv/bin/python benchmarks/calibration_cost.py [--layers 5] [--samples 2 6] [--length 1024] [--threads 2]

One checkpoint with the layer sizes of Gemma 4 31B (the default: 5 GB) and random weights, tokens of the small models'
text. Each contestant is a process of its own, run with two numbers of samples: the difference is what samples take,
without what it takes to start and to read the weights.

- calibrate: `gemma4q calibrate`, activations in memory; spilled: the same with 1 MB of them;
- whole:     the model in transformers, all in memory, nothing recorded;
- offload:   the same with its layers on disk (accelerate), read again for each sample.

Goals: peak memory of calibrate under 1.5 x one layer + the limit + 600 MB; time a token at most 1.3 x whole.
Peak memory and time are the operating system's figures. Results go to benchmarks/results/.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from peak_memory import measure  # noqa: E402
from synthetic import CONFIG_31B, write_checkpoint  # noqa: E402

from vllm_gemma4q.architecture import parse_text_architecture  # noqa: E402

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LIMIT, SPILLED_LIMIT = 500_000_000, 1_000_000
ALLOWED_LAYERS, ALLOWED_BYTES, ALLOWED_TIME = 1.5, 600_000_000, 1.3
WHOLE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from vllm_gemma4q.calibration.texts import load_samples
source, text, n_samples, length, offload = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
ids = load_samples(source, [text], n_samples, length).ids
options = {}
if offload:
    places = {f"model.layers.{index}": "disk" for index in range(int(sys.argv[6]))}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": offload}
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options).eval()
with torch.no_grad():
    for sample in ids:
        model.model(input_ids=torch.tensor([list(sample)]), use_cache=False)
"""


def checkpoint_config(n_layers: int) -> dict[str, Any]:
    """Text only: layers of the 31B, the last one full, and a small vocabulary."""
    return {
        **CONFIG_31B["text_config"],
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": n_layers,
        "layer_types": ["sliding_attention"] * (n_layers - 1) + ["full_attention"],
        "vocab_size": 16384,
    }


def write_source(folder: Path, n_layers: int) -> None:
    from small_gemma4 import corpus

    write_checkpoint(folder, checkpoint_config(n_layers), shards=n_layers)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples" / "small_gemma4" / "dense" / name, folder)
    folder.with_name("text.txt").write_text("\n\n".join(corpus.training_sections()))


def layer_bytes(config: dict[str, Any]) -> int:
    """The largest layer's weights in BF16."""
    architecture = parse_text_architecture(config)
    sizes = [0] * len(architecture.layers)
    for name, shape in architecture.shapes():
        if ".layers." in name:
            sizes[int(name.split(".layers.")[1].split(".")[0])] += 2 * math.prod(shape)
    return max(sizes)


def contestants(folder: Path, n_layers: int) -> dict[str, Any]:
    """Command of each for a number of samples and a length."""
    source, text = folder / "source", folder / "text.txt"
    gemma4q = str(Path(sys.executable).with_name("gemma4q"))

    def calibrate(limit: str) -> Any:
        def command(samples: int, length: int) -> list[str]:
            options = ["--samples", samples, "--max-length", length, "--activations-limit", limit]
            return [gemma4q, "calibrate", source, folder / "statistics", "--text", text, *options]

        return command

    def whole(offload: str) -> Any:
        return lambda samples, length: [sys.executable, "-c", WHOLE, source, text, samples, length, offload, n_layers]

    return {
        "calibrate": calibrate(str(LIMIT)),
        "spilled": calibrate(str(SPILLED_LIMIT)),
        "whole": whole(""),
        "offload": whole(str(folder / "offload")),
    }


def run(folder: Path, n_layers: int, samples: list[int], length: int) -> dict[str, Any]:
    """Seconds, peak and seconds a token of each contestant."""
    table: dict[str, Any] = {}
    for name, command in contestants(folder, n_layers).items():
        usages = []
        for count in samples:
            usages.append(measure([str(argument) for argument in command(count, length)]))
            for path in (folder / "statistics", folder / "offload"):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
            print(f"{name}, {count} samples: {usages[-1]}", flush=True)
        tokens = (samples[1] - samples[0]) * length
        table[name] = {
            "runs": [asdict(usage) for usage in usages],
            "peak_bytes": max(usage.peak_bytes for usage in usages),
            "ms_per_token": round(1000 * (usages[1].seconds - usages[0].seconds) / tokens, 3),
            "cpu_ms_per_token": round(1000 * (usages[1].cpu_seconds - usages[0].cpu_seconds) / tokens, 3),
        }
    return table


def judge(table: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Figures beside their goals."""
    layer = layer_bytes(config)
    result = {}
    for name, limit in (("calibrate", LIMIT), ("spilled", SPILLED_LIMIT)):
        allowed = round(ALLOWED_LAYERS * layer + limit + ALLOWED_BYTES)
        result[f"{name}: peak"] = {"bytes": table[name]["peak_bytes"], "allowed": allowed}
        for what in ("ms_per_token", "cpu_ms_per_token"):
            ratio = round(table[name][what] / table["whole"][what], 3)
            result[f"{name}: {what} over whole"] = {"ratio": ratio, "allowed": ALLOWED_TIME}
    return {"layer_bytes": layer, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder for about three times the model's size")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibration.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    config = checkpoint_config(arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        folder = Path(work)
        # In a process of its own: a child's peak memory counts what its parent held when it was forked.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_source, args=(folder / "source", arguments.layers)
        )
        writer.start()
        writer.join()
        source_bytes = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors"))
        table = run(folder, arguments.layers, arguments.samples, arguments.length)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": arguments.threads, "system": platform.system()},
        "versions": {name: metadata.version(name) for name in ("vllm-gemma4q", "torch", "transformers", "accelerate")},
        "source_bytes": source_bytes,
        "samples": arguments.samples,
        "length": arguments.length,
        "contestants": table,
        "goals": judge(table, config),
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["goals"], indent=2))


if __name__ == "__main__":
    main()

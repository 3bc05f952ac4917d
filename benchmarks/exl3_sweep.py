"""EXL3 at several rates on a small trained model: perplexity and divergence from the original, served by vLLM.

    .venv/bin/python benchmarks/exl3_sweep.py [--model dense|moe] [--bits 3 4 6] [--work FOLDER]

Calibrates with Hessians on text that the model was trained on, then runs `gemma4q sweep` on text that it was not.
About 10 minutes on two cores; with --work it goes on where it stopped. Results go to
benchmarks/results/exl3_sweep[_moe].json, the plot beside it.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from small_gemma4 import corpus, held_out  # noqa: E402

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
SAMPLES, LENGTH, CONTEXT = 128, 512, 256


def gemma4q(*arguments: object) -> str:
    """Standard output of a command."""
    command = [str(GEMMA4Q), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(model: Path, bits: list[float], work: Path, plot: Path) -> dict[str, object]:
    """Calibrate, sweep, and keep the plot."""
    work.mkdir(parents=True, exist_ok=True)
    texts = {"train": corpus.training_sections(), "held_out": held_out.natural_text()}
    for name, sections in texts.items():
        (work / f"{name}.txt").write_text("\n\n".join(sections), encoding="utf-8")
    statistics = work / "statistics.safetensors"
    size = ["--samples", SAMPLES, "--max-length", LENGTH]
    gemma4q("calibrate", model, statistics, "--text", work / "train.txt", *size, "--hessians")
    rates = [argument for rate in bits for argument in ("--bits", rate)]
    engine = ["--context", CONTEXT, "--dtype", "float32", "--json"]
    text = work / "held_out.txt"
    output = gemma4q("sweep", model, work / "sweep", "--statistics", statistics, "--text", text, *rates, *engine)
    shutil.copy(work / "sweep" / "sweep.png", plot)
    results: dict[str, object] = json.loads(output)
    return {**results, "source": str(model.relative_to(ROOT))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 3.5, 4, 5, 6, 8])
    parser.add_argument("--work", type=Path, help="keep checkpoints here; a temporary folder")
    arguments = parser.parse_args()
    name = "exl3_sweep" if arguments.model == "dense" else f"exl3_sweep_{arguments.model}"
    output = ROOT / "benchmarks" / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        model = ROOT / "examples" / "small_gemma4" / arguments.model
        results = run(model, arguments.bits, work, output.with_suffix(".png"))
    output.write_text(json.dumps({"date": datetime.date.today().isoformat(), **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The GGUF part of the demo: one plan a size, against llama-quantize's own mixes at that size.

Each step is a command that is printed as a user would type it: llama.cpp's conversion, importance matrix, Fisher
information, then `gguf-mixed sweep`, which plans, quantizes, verifies and measures, and last the file to keep. The
matrix and the sensitivity come from the part of a Python manual that the small model was trained on, divergence from
the part held out.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from small_gemma4 import corpus, held_out

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import cache_folder, find_tool

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
BUILD = Path(__file__).resolve().parents[1] / "environment" / "build_llama_cpp.py"
MIXES = ("q4_k_m", "q3_k_m")
KEPT = f"optimal@{MIXES[0]}"
CONTEXT, IMATRIX_CHUNKS, CHUNKS = 128, 200, 48
PASSES, PASS_TOKENS = 32, 256
# Threads of llama.cpp wait for each other by spinning: on a model of a few megabytes that costs more than it brings.
ONE_THREAD_BELOW_BYTES = 100e6
# Fisher: weights in F32, twice BF16, the gradient of one tensor, activations.
FISHER_MEMORY = 3.0


class StepError(Exception):
    """A step that failed, in one line."""


class Steps:
    """Runs commands, prints each, and keeps them with the seconds they took."""

    def __init__(self, log: Path) -> None:
        self.done: list[dict] = []
        self._log = log
        log.write_text("")

    def run(self, title: str, command: list[object], shown: bool = False) -> None:
        """Run a command.

        Args:
            title: what it is for.
            command: program and arguments; `gguf-mixed` is that of the running Python.
            shown: leave its output on the screen; else it goes to the log.

        Raises:
            StepError: it fails, with the last line it printed.
        """
        words = [str(part) for part in command]
        print(f"GGUF [{len(self.done) + 1}] {title}\n  $ {shlex.join(words)}", flush=True)
        if words[0] == "gguf-mixed":
            words[:1] = [sys.executable, "-m", "gguf_mixed.cli"]
        started = time.perf_counter()
        finished = subprocess.run(
            words, stdout=None if shown else subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        with self._log.open("a") as log:
            log.write(f"$ {shlex.join(words)}\n{finished.stdout or ''}{finished.stderr}\n")
        if finished.returncode:
            lines = [line for line in (finished.stdout or "").splitlines() + finished.stderr.splitlines() if line]
            reason = lines[-1].removeprefix("error: ") if lines else f"exit {finished.returncode}"
            raise StepError(f"{title}: {reason} (see {self._log})")
        seconds = round(time.perf_counter() - started, 1)
        self.done.append({"step": title, "command": shlex.join(map(str, command)), "seconds": seconds})


def run(model: Path, output: Path) -> dict:
    """Make a GGUF of `model` in `output`/NAME-gguf, and measure it beside stock mixes of its size.

    Raises:
        StepError: llama.cpp cannot be built, or a step fails.
    """
    folder = output / f"{model.resolve().name}-gguf"
    shutil.rmtree(folder / "sweep", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    ensure_llama_cpp()
    calibration, evaluation = write_texts(folder)
    bf16, imatrix, sweep = folder / "model-bf16.gguf", folder / "imatrix.gguf", folder / "sweep"
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    threads = ["--threads", 1] if weights < ONE_THREAD_BELOW_BYTES else []
    sized = ["--context", CONTEXT, *threads]
    steps = Steps(output / "gguf.log")
    steps.run("Converting with llama.cpp", [
        sys.executable, converter(), model, "--outtype", "bf16", "--outfile", bf16,
    ])  # fmt: skip
    steps.run("Importance matrix", [
        "gguf-mixed", "compute-imatrix", bf16, "-o", imatrix, "--text", calibration, "--chunks", IMATRIX_CHUNKS, *sized,
    ])  # fmt: skip
    sensitivity: object = "role-prior"
    if weights * FISHER_MEMORY < memory_bytes():
        sensitivity = folder / "fisher.safetensors"
        steps.run("Sensitivity of every tensor, by backward passes", [
            "gguf-mixed", "fisher", bf16, "-o", sensitivity, "--checkpoint", model, "--text", calibration, "--raw",
            "--passes", PASSES, "--length", PASS_TOKENS, *threads,
        ])  # fmt: skip
    else:
        print("  Too little memory for backward passes: sensitivity is a prior, not measured on this model")
    steps.run("Planning, quantizing, verifying and measuring", [
        "gguf-mixed", "sweep", bf16, sweep, "--imatrix", imatrix, "--sensitivity", sensitivity, "--text", evaluation,
        "--chunks", CHUNKS, *sized, "--bpw", "none", "--tiers", ",".join(f"{mix},optimal@{mix}" for mix in MIXES),
    ], shown=True)  # fmt: skip
    table, kept = sweep / f"{KEPT}.txt", folder / f"model-{KEPT}.gguf"
    steps.run("Writing the one to keep", [
        "gguf-mixed", "quantize", bf16, kept, "--overrides", table, "--imatrix", imatrix, "--overwrite", *threads,
    ])  # fmt: skip
    steps.run("Comparing it with its plan", ["gguf-mixed", "verify", kept, table])
    results = json.loads((sweep / "results.json").read_text())
    return {
        "model": str(model),
        "gguf": str(kept),
        "file_bytes": kept.stat().st_size,
        "plot": str(sweep / "plot.png"),
        "sensitivity": str(sensitivity),
        "comparisons": [compare(results, mix) for mix in MIXES],
        "steps": steps.done,
        "results": results,
    }


def compare(results: dict, mix: str) -> dict:
    """One size: the stock mix and ours."""
    tiers = {entry["name"]: entry for entry in results["tiers"]}
    stock, ours = tiers[f"stock-{mix}"], tiers[f"optimal@{mix}"]
    return {
        "mix": mix.upper(),
        "stock_bytes": stock["file_bytes"],
        "our_bytes": ours["file_bytes"],
        "stock_kld": stock["measured"]["mean_kld"],
        "our_kld": ours["measured"]["mean_kld"],
        "ratio": ours["measured"]["mean_kld"] / stock["measured"]["mean_kld"],
    }


def ensure_llama_cpp() -> None:
    """Build llama.cpp where its programs or its conversion script are missing."""
    try:
        for tool in TOOLS:
            find_tool(tool)
        if converter().exists():
            return
    except InputError:
        pass
    print("GGUF [0] Building llama.cpp once, about 6 minutes on two cores", flush=True)
    finished = subprocess.run([sys.executable, BUILD], capture_output=True, text=True, errors="replace")
    if finished.returncode:
        lines = (finished.stdout + finished.stderr).strip().splitlines()
        raise StepError(f"building llama.cpp: {lines[-1] if lines else f'exit {finished.returncode}'}")


def converter() -> Path:
    """The conversion script of the sources that are built."""
    return cache_folder() / "source" / "convert_hf_to_gguf.py"


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Files of text to calibrate and to measure on, without a section in common."""
    calibration, evaluation = folder / "calibration.txt", folder / "held-out.txt"
    calibration.write_text("\n\n".join(corpus.training_sections()), encoding="utf-8")
    evaluation.write_text("\n\n".join(held_out.natural_text()), encoding="utf-8")
    return calibration, evaluation


def memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def show(report: dict) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for item in report["comparisons"]:
        console.print(
            f"At the size of {item['mix']} ({item['stock_bytes']:,} bytes, ours {item['our_bytes']:,}): mean KLD "
            f"{item['stock_kld']:.2g} nats stock, {item['our_kld']:.2g} ours: {item['ratio']:.2f} of it"
        )
    console.print(f"GGUF: {report['gguf']}", markup=False)
    console.print(f"Plot: {report['plot']}", markup=False)

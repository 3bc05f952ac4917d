"""At equal file size, how much closer to the reference is our allocation than llama.cpp's mixes and published recipes?

    .venv/bin/python benchmarks/gguf_allocation.py [--models 270m dense moe] [--work DIR]
        [--calibration FILE --evaluation FILE]

For each model: an importance matrix and the Fisher information from calibration text, the reference's predictions on
other text, then for each rival (stock mixes, the published rank rule, a ContribDynamic tier) the file that
llama-quantize writes for it, and for ours two more of the same size: with the rival's type for the embeddings, and free
in it. All use one importance matrix. Mean and 99th percentile of the divergence and the share of equal top tokens are
llama-perplexity's. Planning is timed as the command a user types, on an empty cache, beside llama-quantize writing the
file planned.

Models: Gemma 3 270M from a package index (see gemma3_270m.py), and the two small trained Gemma 4 of examples/. The 270M
is measured on WikiText-2's raw test split, its first 45% for calibration and its last 45% for evaluation, which have to
be given where ../shared/data does not have it. Every measured file is kept as a line in WORK/<model>/results.json, so
that a run that was stopped goes on; the results go to benchmarks/results/gguf_allocation.json and .png.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import gemma3_270m
from gemma4q_kernels.ggml import type_name

from gguf_mixed.allocation import Measuring, error_table
from gguf_mixed.imatrix_compute import compute_imatrix
from gguf_mixed.llama_cpp import cache_folder, find_tool
from gguf_mixed.measure import Sampling
from gguf_mixed.overrides import override_table
from gguf_mixed.perplexity import divergence, write_base
from gguf_mixed.quantize import Job, build_command, partial_path, run_and_verify
from gguf_mixed.recipes import Material, find_recipe
from gguf_mixed.recipes.optimal import Budget, optimal
from gguf_mixed.solver import Constraints
from gguf_mixed.sources import find_sensitivity
from gguf_mixed.tensors import RequestedTypes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gguf_allocation.json"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2_test.raw"
sys.path.insert(0, str(ROOT / "examples"))

EMBEDDINGS = "token_embd.weight"
RIVALS = ("stock-iq3_m", "stock-q3_k_m", "stock-iq4_xs", "stock-q4_k_m", "rank15-legacy", "rank15", "cd-q4_k_m")
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Subject:
    """A model to measure on.

    Attributes:
        reference: makes the GGUF in F32, given a folder to work in.
        texts: calibration and evaluation text, from the command line's two files where given.
        checkpoint: the Hugging Face folder, None where transformers loads the GGUF itself.
        context, chunks, imatrix_chunks: of llama.cpp's programs; length, passes: of the Fisher information.
        raw: calibrate on plain text: the model has no chat format, or is not measured in it.
        threads: of llama.cpp; its threads wait by spinning, which small models do not repay.
    """

    reference: Callable[[Path], Path]
    texts: Callable[[Path | None, Path | None], tuple[str, str]]
    checkpoint: Path | None
    context: int
    chunks: int
    imatrix_chunks: int
    length: int
    passes: int
    raw: bool
    threads: int


def wikitext(calibration: Path | None, evaluation: Path | None) -> tuple[str, str]:
    if calibration and evaluation:
        return calibration.read_text(encoding="utf-8"), evaluation.read_text(encoding="utf-8")
    if not WIKITEXT.exists():
        sys.exit("error: --calibration FILE and --evaluation FILE are needed for the 270m model")
    text = WIKITEXT.read_text(encoding="utf-8")
    # At headings, so that no article is in both.
    return text[: text.index("\n = ", len(text) * 45 // 100)], text[text.index("\n = ", len(text) * 55 // 100) :]


def small_texts(calibration: Path | None, evaluation: Path | None) -> tuple[str, str]:
    from small_gemma4 import corpus, held_out

    return "\n\n".join(corpus.training_sections()), "\n\n".join(held_out.natural_text())


def convert_small(kind: str) -> Callable[[Path], Path]:
    def convert(work: Path) -> Path:
        path = work / f"{kind}.gguf"
        script = cache_folder() / "source" / "convert_hf_to_gguf.py"
        if not path.exists():
            folder = ROOT / "examples" / "small_gemma4" / kind
            command = [sys.executable, script, folder, "--outtype", "f32", "--outfile", path]
            subprocess.run(command, check=True, capture_output=True)
        return path

    return convert


def small(kind: str) -> Subject:
    folder = ROOT / "examples" / "small_gemma4" / kind
    return Subject(convert_small(kind), small_texts, folder, 128, 64, 256, 192, 128, raw=True, threads=1)


SUBJECTS = {
    "270m": Subject(
        lambda work: gemma3_270m.reference(), wikitext, None, 512, 16, 48, 512, 16, raw=True, threads=THREADS
    ),
    "dense": small("dense"),
    "moe": small("moe"),
}


class Bench:
    """One model's files, and its results so far."""

    def __init__(self, name: str, subject: Subject, work: Path, texts: tuple[str, str]) -> None:
        self.name, self.subject, self.work = name, subject, work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self._store = self.work / "results.json"
        self.results: dict[str, dict] = json.loads(self._store.read_text()) if self._store.exists() else {}
        self.model = subject.reference(self.work)
        self.calibration, self.evaluation = self.work / "calibration.txt", self.work / "evaluation.txt"
        self.calibration.write_text(texts[0], encoding="utf-8")
        self.evaluation.write_text(texts[1], encoding="utf-8")
        self.imatrix, self.fisher = self.work / "imatrix.gguf", self.work / "fisher.safetensors"
        self.base = self.work / "base.kld"

    def prepare(self) -> None:
        """Importance matrix, Fisher information and the reference's predictions, where they are not there yet."""
        subject = self.subject
        if not self.imatrix.exists():
            self._timed("imatrix_seconds", lambda: compute_imatrix(
                find_tool("llama-imatrix"), self.model, self.calibration, self.imatrix,
                chunks=subject.imatrix_chunks, context=subject.context, threads=subject.threads, process_output=True,
            ))  # fmt: skip
        if not self.fisher.exists():
            command = ["fisher", self.model, "-o", self.fisher, "--text", self.calibration]
            command += ["--passes", subject.passes, "--length", subject.length, "--threads", subject.threads]
            command += ["--raw"] if subject.raw else []
            command += ["--checkpoint", subject.checkpoint] if subject.checkpoint else []
            self._timed("fisher_seconds", lambda: gguf_mixed(*command))
        if not self.base.exists():
            tool = find_tool("llama-perplexity")
            options = {"chunks": subject.chunks, "context": subject.context, "threads": subject.threads}
            write_base(tool, self.model, self.evaluation, self.base, **options)

    def run(self) -> None:
        material = Material.read(self.model, self.imatrix)
        sensitivity = find_sensitivity(str(self.fisher), material.inventory)
        how = Measuring(Sampling(), self.subject.threads, self.work / "errors.jsonl", progress=sys.stderr.isatty())
        table = error_table(material, sensitivity, how=how)
        for rival in RIVALS:
            choice = find_recipe(rival)(material)
            size = self.measure(rival, material, choice.types)["bytes"]
            embeddings = material.inventory.tensors[EMBEDDINGS].written_type(choice.types[EMBEDDINGS])
            for label, constraints in (
                (f"ours at {rival}, embeddings {type_name(embeddings)}", Constraints(pins={EMBEDDINGS: embeddings})),
                (f"ours at {rival}, embeddings free", Constraints()),
            ):
                ours = optimal(material, table, Budget(file_bytes=size), constraints)
                self.measure(label, material, ours.types, sum(ours.errors.values()))
                self._compare(rival, label)
        if "planning" not in self.results:
            self._time_planning()

    def measure(self, label: str, material: Material, types: RequestedTypes, predicted: float | None = None) -> dict:
        """Write a file and compare it with the reference, unless that was done before."""
        if label in self.results:
            return self.results[label]
        job = Job(material.inventory, override_table(material.inventory, types), material.imatrix, self.imatrix)
        output, listed = self.work / "candidate.gguf", self.work / "candidate.txt"
        listed.write_text(job.table.text)
        command = build_command(
            find_tool("llama-quantize"), job, listed, partial_path(output), threads=self.subject.threads
        )
        started = time.perf_counter()
        if differences := run_and_verify(job, command, output, lambda line: None):
            sys.exit(f"error: {label}: {differences[0]}")
        seconds = time.perf_counter() - started
        found = divergence(find_tool("llama-perplexity"), output, self.base, threads=self.subject.threads)
        self._keep(label, {
            "bytes": output.stat().st_size, "bpw": job.bpw, "predicted_kld": predicted, "mean_kld": found.mean_kld,
            "mean_kld_error": found.mean_kld_error, "p99_kld": found.p99_kld, "same_top": found.same_top,
            "quantize_seconds": seconds,
        })  # fmt: skip
        output.unlink()
        print(f"{self.name}: {label}: {job.bpw:.3f} bpw, KLD {found.mean_kld:.4f}, p99 {found.p99_kld:.3f}, "
              f"same top {found.same_top:.1%}", flush=True)  # fmt: skip
        return self.results[label]

    def _compare(self, rival: str, label: str) -> None:
        theirs, ours = self.results[rival], self.results[label]
        ratio, size = ours["mean_kld"] / theirs["mean_kld"], ours["bytes"] / theirs["bytes"]
        self._keep(label, {**ours, "rival": rival, "kld_ratio": ratio, "size_ratio": size})
        print(f"{self.name}: {label}: {ratio:.3f} x the divergence at {size:.4f} x the size", flush=True)

    def _time_planning(self) -> None:
        """`gguf-mixed plan` on an empty cache beside llama-quantize writing what it planned, three times in turn."""
        cache, listed, output = self.work / "timed.jsonl", self.work / "timed.txt", self.work / "timed.gguf"
        bpw, threads = self.results["stock-q4_k_m"]["bpw"], ("--threads", self.subject.threads)
        given = ("--imatrix", self.imatrix, *threads)
        plan = ("plan", self.model, "--recipe", "optimal", "--bpw", bpw, "--sensitivity", self.fisher, "--cache", cache)
        write = ("quantize", self.model, output, "--overrides", listed, "--overwrite")
        plans, writes = [], []
        for _ in range(3):
            cache.unlink(missing_ok=True)
            plans.append(timed(lambda: gguf_mixed(*plan, "-o", listed, *given)))
            writes.append(timed(lambda: gguf_mixed(*write, *given)))
        output.unlink()
        found = {
            f"{what}_{unit}": statistics.median(each[index] for each in runs)
            for what, runs in (("plan", plans), ("quantize", writes))
            for index, unit in enumerate(("seconds", "cpu_seconds"))
        }
        found["ratio"] = found["plan_seconds"] / found["quantize_seconds"]
        found["cpu_ratio"] = found["plan_cpu_seconds"] / found["quantize_cpu_seconds"]
        self._keep("planning", found)
        print(f"{self.name}: planning: {found}", flush=True)

    def _timed(self, label: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        self._keep(label, {"seconds": time.perf_counter() - started})

    def _keep(self, label: str, values: Mapping[str, object]) -> None:
        self.results[label] = dict(values)
        partial = self._store.with_name("results.json.partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self._store)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of processors in the processes that `work` waits for."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, used


def gguf_mixed(*arguments: object) -> None:
    command = [sys.executable, "-m", "gguf_mixed.cli", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)


def machine() -> dict[str, object]:
    names = ("vllm-gemma4q", "torch", "transformers", "gguf")
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"processor": processor, "threads": THREADS, "versions": {name: metadata.version(name) for name in names}}


def plot(results: Mapping[str, Mapping[str, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        rivals = {label: found[label] for label in RIVALS if label in found}
        for label, point in rivals.items():
            axis.plot(point["bpw"], point["mean_kld"], "o", color="tab:gray")
            axis.annotate(
                label, (point["bpw"], point["mean_kld"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
        for kind, mark, color in (("embeddings as theirs", "s", "tab:blue"), ("embeddings free", "^", "tab:green")):
            ours = [
                point
                for label, point in found.items()
                if label.startswith("ours") and label.endswith("free") == (kind == "embeddings free")
            ]
            ours.sort(key=lambda point: point["bpw"])
            axis.plot([p["bpw"] for p in ours], [p["mean_kld"] for p in ours], mark, color=color, label=f"ours, {kind}")
        axis.set(title=name, xlabel="bits a weight", ylabel="mean KLD to the reference, nats", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--work", type=Path, default=cache_folder().with_name("gguf_allocation"))
    parser.add_argument("--calibration", type=Path, help="text for the 270m model")
    parser.add_argument("--evaluation", type=Path, help="other text for it")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.models:
        subject = SUBJECTS[name]
        bench = Bench(name, subject, arguments.work, subject.texts(arguments.calibration, arguments.evaluation))
        bench.prepare()
        bench.run()
        results[name] = {
            "settings": {key: value for key, value in asdict(subject).items() if isinstance(value, int)},
            **bench.results,
        }
    report = {"date": datetime.date.today().isoformat(), **machine(), "models": results}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    plot(results, RESULTS.with_suffix(".png"))
    print(RESULTS)


if __name__ == "__main__":
    main()

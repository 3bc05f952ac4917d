# ruff: noqa: E402
"""The commands that write, each on something so small that an unbroken run takes about a second or less."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from crash_runs import Case

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / name) for name in ("gguf", "compare", "restore", "exl3", "evaluation")]
import prune_models
from compare_files import CACHE, text_results
from compare_files import write_gguf as write_compared
from damage import change_quantization, load, quantize_towers, store
from exl3_runs import FULL, tiny_config
from gsm8k_server import write_questions
from llama_quantize import imatrix_of, small_model
from made_statistics import write_for
from quantize_runs import T
from safetensors.torch import save_file
from small_models import convert as convert_to_gguf
from small_models import quantize as quantize_gguf
from synthetic import small_config, write_checkpoint, write_json

from gguf_mixed.fisher import Fisher, Marginals, write_fisher
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.overrides import override_table
from gguf_mixed.quantize import Job
from gguf_mixed.sidecar import describe, write_plan
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.convert import convert
from vllm_gemma4q.fp8_static import quantize as fp8_static
from vllm_gemma4q.quark_int8 import quantize as quark_int8

EXAMPLES = TESTS.parent / "examples" / "small_gemma4"
LAYERS = 3
SHARDS = ("--max-shard-size", "60kB")
# Names of all cases: tests are collected before there are inputs.
CASES = (
    "calibrate",
    "calibrate --hessians --fisher",
    "quantize quark-int8",
    "quantize fp8-static",
    "quantize exl3",
    "restore",
    "prune",
    "prune with refit",
    "card",
    "compare --plot",
    "report",
    "vram --plot",
    "evaluate gsm8k",
    "plan",
    "quantize by ggml",
    "quantize by llama-quantize",
    "prune a GGUF",
    "imatrix --write",
    "weigh-imatrix",
    "sweep",
    "gemma4q sweep",
    "prune --drop-map-output",
    "compute-imatrix",
    "fisher",
    "divergence --base",
    "sweep --text",
)
# Those that have no file of their own, or whose workers go on while they are stopped.
ONLY_KILLED = (
    "quantize --workers",
    "plan --workers",
    "prune --evaluate",
    "evaluate perplexity",
    "evaluate divergence",
    "evaluate divergence by vLLM",
)
TEXT = "A layer reads what the layer before it wrote, and nothing else.\n" * 40


def write_inputs(folder: Path) -> Path:
    """All that the cases read."""
    import numpy as np

    write_checkpoint(folder / "base", small_config(**CACHE), shards=2)
    write_for(folder / "base", folder / "statistics")
    base = open_checkpoint(folder / "base")
    assert convert(fp8_static.plan(base, folder / "statistics"), folder / "fp8", ["test"], lambda _: None)
    assert convert(quark_int8.plan(base), folder / "int8", ["test"], lambda _: None)
    shutil.copytree(folder / "fp8", folder / "damaged")
    tensors = load(folder / "damaged")
    quantize_towers(tensors)
    store(folder / "damaged", tensors)
    change_quantization(folder / "damaged", ignored_layers=["lm_head"])
    write_checkpoint(folder / "tiny", tiny_config(FULL))
    for path in (EXAMPLES / "dense").glob("*token*"):
        shutil.copy(path, folder / "tiny")
    write_first_layers(EXAMPLES / "dense", folder / "dense")
    write_checkpoint(folder / "mixture", small_config(moe=True))
    write_json(folder / "drop.json", {str(layer): [layer, 3] for layer in range(3)})
    write_compared(folder / "small-Q8_0.gguf", small_config(**CACHE)["text_config"], "Q8_0")
    text_results(folder / "results.json", [folder / "base", folder / "int8", folder / "small-Q8_0.gguf"])
    (folder / "text.txt").write_text(TEXT)
    write_questions(folder / "questions.jsonl", 40)
    write_questions(folder / "shots.jsonl", 9, first=100)

    (folder / "gguf").mkdir()
    inventory = read_inventory(small_model(folder / "gguf"))
    imatrix = imatrix_of(inventory)
    write_imatrix(imatrix, folder / "gguf" / "imatrix.gguf")
    table = override_table(inventory, dict.fromkeys(imatrix.entries, T.Q4_K))
    job = Job(inventory, table, imatrix, folder / "gguf" / "imatrix.gguf")
    write_plan(folder / "table.txt", table, describe(job, table.types, "test", {}, "none"))
    marginals = {
        name: Marginals(
            np.ones((*entry.sums.shape[:1], inventory.tensors[name].shape[1]), np.float32), entry.sums + np.float32(1)
        )
        for name, entry in imatrix.entries.items()
    }
    write_fisher(folder / "fisher.safetensors", Fisher(marginals, 10))
    (folder / "mixture-gguf").mkdir()
    prune_models.model(folder / "mixture-gguf")
    prune_models.drop_map(folder / "mixture-gguf")
    mixture = read_inventory(folder / "mixture-gguf" / "model.gguf")
    write_imatrix(imatrix_of(mixture), folder / "mixture-gguf" / "imatrix.gguf")
    write_json(folder / "refit.json", {str(layer): [1, 4] for layer in range(LAYERS)})
    return folder


def write_first_layers(source: Path, target: Path) -> None:
    """Half of the layers of a trained checkpoint, with its tokenizer."""
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    beyond = tuple(f"model.language_model.layers.{layer}." for layer in range(LAYERS, len(text["layer_types"])))
    text |= {"num_hidden_layers": LAYERS, "layer_types": text["layer_types"][:LAYERS]}
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_json(target / "config.json", config)
    kept = {name: tensor for name, tensor in load(source).items() if not name.startswith(beyond)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def write_converted(folder: Path) -> None:
    """What llama.cpp's programs run: needs them."""
    convert_to_gguf(folder / "dense", folder / "dense.gguf")
    quantize_gguf(find_tool("llama-quantize"), folder / "dense.gguf", "Q4_0")


def cases(made: Path, url: str) -> list[Case]:
    """Those of `CASES` and `ONLY_KILLED`; some run llama.cpp's own programs, see `write_converted`."""

    def gemma4q(name: str, *arguments: object, **options: Any) -> Case:
        return Case(name, "gemma4q", arguments, **options)

    def gguf_mixed(name: str, *arguments: object, **options: Any) -> Case:
        return Case(name, "gguf-mixed", arguments, **options)

    text = ("--text", made / "text.txt", "--samples", 2, "--max-length", 32)
    dense, converted = made / "dense", made / "dense.gguf"
    calibrate = (dense, "stats.safetensors", *text)
    one_text = ("--text", made / "text.txt")
    compared_text = (*one_text, "--chunks", 4, "--context", 64)
    evaluated = (*one_text, "--chunks", 1, "--context", 64)
    transformers = ("--engine", "transformers", "--framing", "raw")
    model, imatrix = made / "gguf" / "model.gguf", made / "gguf" / "imatrix.gguf"
    few = ("--types", "Q4_K,Q8_0", "--rows", 4, "--threads", 1, "--cache", "errors.jsonl")
    planned = ("plan", model, "--recipe", "optimal", "--bpw", 7, "--imatrix", imatrix, "-o", "table.txt", *few)
    compared = (made / "int8", made / "small-Q8_0.gguf", made / "base", "--result", made / "results.json")
    gsm8k = ("--questions", made / "questions.jsonl", "--shots", made / "shots.jsonl", "--num-shots", 1)
    refit = ("--drop-map", made / "refit.json", *text)
    at_random = ("--recipe", "random", "--keep")
    quantize = ("quantize", made / "base", "target", "--scheme")
    return [
        gemma4q("calibrate", "calibrate", *calibrate, work=["stats.safetensors.work"]),
        gemma4q(
            "calibrate --hessians --fisher", "calibrate", *calibrate, "--hessians", "--fisher", "fisher.safetensors",
            "--fisher-samples", 1, "--activations-limit", "1kB", "--work", "work", work=["work"],
        ),
        gemma4q("quantize quark-int8", *quantize, "quark-int8", *SHARDS),
        gemma4q("quantize fp8-static", *quantize, "fp8-static", "--statistics", made / "statistics", *SHARDS),
        gemma4q(
            "quantize exl3", "quantize", made / "tiny", "target", "--scheme", "exl3", "--bits", 4, "--head-bits", 16,
            "--no-hessian", *SHARDS, in_a_row=10,
        ),
        gemma4q("restore", "restore", made / "damaged", made / "base", "target", *SHARDS),
        gemma4q("prune", "prune", made / "mixture", "target", "--drop-map", made / "drop.json", *SHARDS),
        gemma4q("prune with refit", "prune", EXAMPLES / "moe", "target", *refit, "--work", "work", work=["work"]),
        gemma4q("card", "card", made / "int8", "--beside", compared[1], *compared[3:], "-o", "card.md"),
        gemma4q("compare --plot", "compare", *compared, "--plot", "plot.png", replaced=["plot.png"]),
        gemma4q("report", "report", made / "int8", "-o", "page.html", replaced=["page.html"]),
        gemma4q("vram --plot", "vram", made / "int8", "--plot", "plot.png", replaced=["plot.png"]),
        gemma4q(
            "evaluate gsm8k", "evaluate", "gsm8k", "--url", url, *gsm8k, "--concurrency", 1, "--results",
            "results.jsonl", grows=["results.jsonl"],
        ),
        gguf_mixed(
            "plan", *planned, grows=["errors.jsonl"], replaced=["table.txt", "table.txt.json"],
        ),
        gguf_mixed(
            "quantize by ggml", "quantize", model, "out.gguf", "--overrides", made / "table.txt", "--imatrix", imatrix,
            "--engine", "ggml", "--threads", 1, "--overwrite", replaced=["out.gguf"],
        ),
        gguf_mixed(
            "quantize by llama-quantize", "quantize", model, "out.gguf", "--overrides", made / "table.txt", "--imatrix",
            imatrix, "--engine", "llama-quantize", "--threads", 1, "--overwrite", replaced=["out.gguf"],
        ),
        gguf_mixed(
            "prune a GGUF", "prune", made / "mixture-gguf" / "model.gguf", "out.gguf", "--drop-map",
            made / "mixture-gguf" / "drop.json", "--imatrix", made / "mixture-gguf" / "imatrix.gguf",
            "--imatrix-output", "imatrix.gguf", "--overwrite", replaced=["out.gguf", "imatrix.gguf"],
        ),
        gguf_mixed("imatrix --write", "imatrix", imatrix, "--write", "out.gguf", replaced=["out.gguf"]),
        gguf_mixed(
            "weigh-imatrix", "weigh-imatrix", imatrix, made / "fisher.safetensors", "-o", "out.gguf",
            replaced=["out.gguf"],
        ),
        gguf_mixed(
            "sweep", "sweep", model, "folder", "--bpw", "7,8", "--tiers", "none", "--imatrix", imatrix, *few,
            grows=["errors.jsonl"], rewritten=["folder/results.json"],
        ),
        gemma4q(
            "gemma4q sweep", "sweep", made / "tiny", "folder", "--bits", 4, "--head-bits", 16, "--no-hessian",
            *evaluated, "--framing", "raw", rewritten=["folder/results.json"],
            work=["folder/engine.log"],
        ),
        gemma4q(
            "prune --drop-map-output", "prune", made / "mixture", "target", *at_random, 3, "--drop-map-output",
            "drop.json", "--plot", "plot.png", *SHARDS, replaced=["plot.png", "drop.json", "drop.summary.json"],
        ),
        gguf_mixed(
            "compute-imatrix", "compute-imatrix", converted, "-o", "out.gguf", *one_text, "--chunks", 2, "--context",
            32, "--threads", 1, replaced=["out.gguf"],
        ),
        gguf_mixed(
            "fisher", "fisher", converted, "-o", "out.safetensors", *one_text, "--checkpoint", dense, "--passes", 1,
            "--length", 32, "--threads", 1, replaced=["out.safetensors"],
        ),
        gguf_mixed(
            "divergence --base", "divergence", converted, made / "dense-Q4_0.gguf", *compared_text, "--threads", 1,
            "--base", "base.kld",
        ),
        gguf_mixed(
            "sweep --text", "sweep", converted, "folder", "--bpw", "9", "--tiers", "uniform-q4_0", *few[2:],
            *compared_text, "--engine", "ggml", "--base", "base.kld", "--keep", "--types", "Q8_0,Q4_0",
            grows=["errors.jsonl"], rewritten=["folder/results.json"],
        ),
        gemma4q("quantize --workers", *quantize, "quark-int8", *SHARDS, "--workers", 2),
        gguf_mixed(
            "plan --workers", *planned, "--workers", 2, unordered=["errors.jsonl"],
            replaced=["table.txt", "table.txt.json"],
        ),
        gemma4q(
            "prune --evaluate", "prune", EXAMPLES / "moe", "--evaluate", made / "text.txt", *at_random, 12, *one_text,
            "--samples", 1, "--max-length", 32, "--activations-limit", "1kB",
        ),
        gemma4q("evaluate perplexity", "evaluate", "perplexity", converted, dense, *evaluated, *transformers),
        gemma4q(
            "evaluate divergence", "evaluate", "divergence", dense, converted, *compared_text, *transformers, "--work",
            ".",
        ),
        gemma4q("evaluate divergence by vLLM", "evaluate", "divergence", dense, dense, *evaluated),
    ]  # fmt: skip

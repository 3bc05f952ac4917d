"""Checkpoints of every scheme, what engines answer about them, and how far two engines' answers are apart."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from small_gemma4 import corpus, held_out  # noqa: E402

from vllm_gemma4q.calibration.texts import load_tokenizer  # noqa: E402

MODELS = ROOT / "examples" / "small_gemma4"
CHECKS = Path(__file__).with_name("engine_checks.py")
GEMMA4Q = Path(sys.executable).with_name("gemma4q")
# Mean KLD in nats from the same checkpoint under the locked version: another version's kernels add in another order.
SAME = 0.005


@dataclass(frozen=True)
class Judged:
    """One checkpoint in one version.

    Attributes:
        verdict: "equal", "differs" or "fails".
        mean_kld: from the same checkpoint under the locked version, nats; None where it fails.
        same_answers: chats whose greedy tokens are the same, of how many.
        error: what was raised.
    """

    verdict: str
    mean_kld: float | None = None
    same_answers: tuple[int, int] | None = None
    error: str | None = None


def make_checkpoints(work: Path) -> dict[str, Path]:
    """The small models in every scheme, by name; those that are there already are taken as they are."""
    text = work / "train.txt"
    text.write_text("\n\n".join(corpus.training_sections()), encoding="utf-8")
    folders = {}
    for model in ("dense", "moe"):
        source, statistics = MODELS / model, work / f"{model}-statistics.safetensors"
        if not statistics.exists():
            _gemma4q(
                "calibrate", source, statistics, "--text", text, "--samples", 32, "--max-length", 256, "--hessians"
            )
        folders[f"{model} bf16"] = source
        for name, options in _schemes(statistics).items():
            folders[f"{model} {name}"] = work / f"{model}-{name}"
            _gemma4q("quantize", source, folders[f"{model} {name}"], *options)
    pruned = folders["moe pruned"] = work / "moe-pruned"
    if not pruned.exists():
        drops = work / "drop_map.json"
        drops.write_text(json.dumps(_uneven_drops()))
        _gemma4q("prune", MODELS / "moe", pruned, "--drop-map", drops)
    return folders


def _schemes(statistics: Path) -> dict[str, tuple[object, ...]]:
    return {
        "quark-int8": ("--scheme", "quark-int8"),
        "fp8-static": ("--scheme", "fp8-static", "--statistics", statistics),
        "exl3": ("--scheme", "exl3", "--bits", 4, "--statistics", statistics),
    }


def _uneven_drops() -> dict[str, list[int]]:
    """Another number of experts in each layer, as the published maps are written."""
    layers = json.loads((MODELS / "moe" / "config.json").read_text())["text_config"]["num_hidden_layers"]
    return {str(layer): list(range(1 + 2 * layer)) for layer in range(layers)}


def _gemma4q(*arguments: object) -> None:
    subprocess.run([str(GEMMA4Q), *map(str, arguments)], check=True, capture_output=True)


def questions() -> dict[str, list[list[int]]]:
    """Token ids of four held-out texts, and of eight chats whose answer is one learned word."""
    tokenizer = load_tokenizer(MODELS / "dense")
    chats = [chat[:-1] for chat in held_out.conversations(64) if _is_fact(chat)]
    return {
        "texts": [tokenizer(text).input_ids[:160] for text in held_out.natural_text()[:4]],
        "chats": [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
            for chat in chats[:8]
        ],
    }


def _is_fact(chat: list[dict[str, Any]]) -> bool:
    """Arithmetic and long answers end in near-ties, which any other rounding flips."""
    return not re.search(r"\d", chat[-2]["content"]) and " " not in chat[-1]["content"]


def serve_all(python: Path, checkpoints: Mapping[str, Path], work: Path) -> dict[str, Any]:
    """What the vLLM beside `python` answers, as `engine_checks.py` describes it."""
    work.mkdir(parents=True, exist_ok=True)
    asked = {"checkpoints": {name: str(folder) for name, folder in checkpoints.items()}, **questions()}
    requests, answers = work / "requests.json", work / "answers.npz"
    requests.write_text(json.dumps(asked))
    subprocess.run([str(python), str(CHECKS), str(requests), str(answers)], check=True, cwd=work)
    with np.load(answers) as arrays:
        return dict(arrays)


def judge(reference: Mapping[str, Any], got: Mapping[str, Any], name: str) -> Judged:
    """One checkpoint's answers beside those of the locked version."""
    if f"{name}/error" in got:
        return Judged("fails", error=str(got[f"{name}/error"]))
    p, q = (answers[f"{name}/logprobs"].astype(np.float64) for answers in (reference, got))
    with np.errstate(invalid="ignore"):
        kld = float(np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(axis=1).mean())
    pairs = list(zip(*(json.loads(str(answers[f"{name}/tokens"])) for answers in (reference, got)), strict=True))
    same = sum(one == other for one, other in pairs)
    verdict = "equal" if same == len(pairs) and kld <= SAME else "differs"
    return Judged(verdict, round(kld, 6), (same, len(pairs)))

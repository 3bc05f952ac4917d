"""Which experts should go? Divergence of the small mixture after every recipe of `gemma4q prune`, at 25% and at 50%.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/pruning.py

Texts are of four classes: a Python manual, and chats about numbers, about words and facts, and over several turns. The
recipes and the refit see training text, cut and put into the chat template as the command does by default; divergence
(mean KLD in nats over the whole vocabulary from the unpruned model, all in float32) is measured on held-out text: half
of it manual and half chats framed the same way, and apart from that chats as they really are, a sample each. Intervals
are 95%, by sample; those of ratios are paired. Random choices are many, and shown with their range. What these leave
out is that other training text chooses other experts: so the contenders are also judged over several draws of it.

Knobs (shared boost, soft transfer, fewer experts a token) are judged the same way, before a refit and with one.
Goal: at 25%, the default at most 0.8 times the divergence of v3 and of REAP. Results go to benchmarks/results/.
"""

import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from pruning_plot import plot  # noqa: E402
from pruning_texts import MODEL, TOKENS, distinct_chats, training_sections, write_texts  # noqa: E402
from small_gemma4 import batches, corpus  # noqa: E402

from gguf_mixed.drop_map import RetainedExperts  # noqa: E402
from vllm_gemma4q.calibration.calibrate import Calibration, calibrate  # noqa: E402
from vllm_gemma4q.calibration.decoder import Decoder  # noqa: E402
from vllm_gemma4q.calibration.statistics import Array, read_statistics  # noqa: E402
from vllm_gemma4q.calibration.texts import Samples, load_samples  # noqa: E402
from vllm_gemma4q.checkpoint import open_checkpoint  # noqa: E402
from vllm_gemma4q.commands.model import Device, Dtype  # noqa: E402
from vllm_gemma4q.commands.prune_model import REFIT, PrunedModel, Text  # noqa: E402
from vllm_gemma4q.pruned_moe.choose import DEFAULT, QUOTA, RANDOM, Chooser  # noqa: E402
from vllm_gemma4q.pruned_moe.judge import CONFIDENCE, judge  # noqa: E402
from vllm_gemma4q.pruned_moe.knobs import Options  # noqa: E402
from vllm_gemma4q.pruned_moe.scores import RECIPES  # noqa: E402
from vllm_gemma4q.pruned_moe.streams import Variant  # noqa: E402
from vllm_gemma4q.pruned_moe.weight_scores import WEIGHT_RECIPES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
KEEPS = {"25%": 12, "50%": 8}  # of 16
NAMES = (*RECIPES, QUOTA, *WEIGHT_RECIPES)
SEEDS = 8
SPREAD = f"{DEFAULT}, spread"
REFITTED = (DEFAULT, SPREAD, "v3", "reap")
CONTENDERS = ("v3", "v4", "v5-coder", "reap", "contribution", "easy-ep", "probability", "quota")
DRAWS = 5
LENGTH, SAMPLES = 96, 78  # to calibrate, to refit and to judge
REFIT_SAMPLES = (24, 54, 108, 210)
REAL_CHATS = 40  # of each class
KNOBS = {
    "shared boost 1.2": Options(shared_boost=1.2),
    "soft transfer 0.3": Options(soft_transfer=0.3),
    "top_k 3": Options(top_k=3),
}
LIMIT = 4 << 30
GOAL = 0.8


@dataclass
class Bench:
    """Texts, statistics and what is judged.

    Attributes:
        work: an empty folder.
        draw: which of the training text.
    """

    work: Path
    draw: int = 0

    def __post_init__(self) -> None:
        self.source = open_checkpoint(MODEL)
        self.decoder = Decoder(self.source, torch.float32)
        self.work.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        seen, unseen = distinct_chats(False, self.draw), distinct_chats(True)
        self.training = write_texts(self.work / "training", training_sections(self.draw), seen, TOKENS[False])
        held_out = write_texts(self.work / "held-out", corpus.held_out_sections(), unseen, TOKENS[True])
        self.held_out = self.samples(held_out)
        real = [chat for group in unseen.values() for chat in group[:REAL_CHATS]]
        self.real = [batches.encode_chat(chat, tokenizer)[0] for chat in real]

    def samples(self, paths: list[Path], count: int = SAMPLES) -> Samples:
        return load_samples(MODEL, paths, count, LENGTH)

    @cached_property
    def statistics(self) -> Any:
        path = self.work / "statistics.safetensors"
        calibrate(Calibration(self.decoder, self.samples(self.training), LENGTH, LIMIT), path, self.work / "calibrate")
        return read_statistics(path)

    def level(self, keep: int) -> dict[str, Any]:
        """Every figure of one number of experts."""
        candidates = {f"{RANDOM} {seed}": self._chooser(keep, seed).uniform(RANDOM) for seed in range(SEEDS)}
        candidates |= self._candidates(keep)
        variants = {name: Variant(retained) for name, retained in candidates.items()}
        variants |= {name + REFIT: self._refitted(candidates[name]) for name in REFITTED}
        more = {f"refit {count}": self._refitted(candidates[DEFAULT], count) for count in REFIT_SAMPLES}
        for name, options in KNOBS.items():
            more[name] = Variant(candidates[DEFAULT], options=options)
            more[name + REFIT] = self._refitted(candidates[DEFAULT], options=options)
        found = Judged(self, {**variants, **more})
        return {
            "experts": keep,
            "spread": list(candidates[SPREAD].counts),
            "recipes": {name: found.row(name) for name in variants if not name.startswith(RANDOM)},
            RANDOM: found.random(),
            "refit by tokens": {
                self.samples(self.training, count).n_tokens: found.row(f"refit {count}") for count in REFIT_SAMPLES
            },
            "knobs": {name + refit: found.knob(name, refit) for name in KNOBS for refit in ("", REFIT)},
        }

    def contenders(self, keep: int) -> dict[str, float]:
        """Divergence over v3's, of what was chosen and refitted on this draw of text."""
        candidates = self._candidates(keep)
        variants = {name: Variant(candidates[name]) for name in (*CONTENDERS, SPREAD)}
        variants |= {name + REFIT: self._refitted(candidates[name]) for name in REFITTED}
        found = judge(self.decoder, self.held_out.ids, variants, LIMIT)
        return {name: verdict.mean / found["v3"].mean for name, verdict in found.items()}

    def _candidates(self, keep: int) -> dict[str, RetainedExperts]:
        chooser, run = self._chooser(keep), Text(SAMPLES, LENGTH, False, Device.CPU, Dtype.FLOAT32, LIMIT)
        spread = PrunedModel(self.source, run, self.training).spread(chooser, DEFAULT)
        return {**{name: chooser.uniform(name) for name in NAMES}, SPREAD: spread}

    def _chooser(self, keep: int, seed: int = 0) -> Chooser:
        return Chooser(self.source, self.statistics, keep, seed=seed)

    def _refitted(self, retained: RetainedExperts, count: int = SAMPLES, options: Options | None = None) -> Variant:
        run, chosen = Text(count, LENGTH, False, Device.CPU, Dtype.FLOAT32, LIMIT), options or Options()
        folder = Path(tempfile.mkdtemp(prefix="refit-", dir=self.work))
        weights = PrunedModel(self.source, run, self.training, chosen).refit(retained, folder)
        return Variant(retained, weights.tensors, chosen)


class Judged:
    """Verdicts of all candidates, on framed text and on real chats."""

    def __init__(self, bench: Bench, variants: Mapping[str, Variant]):
        self.framed = judge(bench.decoder, bench.held_out.ids, variants, LIMIT)
        self.real = judge(bench.decoder, bench.real, variants, LIMIT)
        self._is_manual = np.array(bench.held_out.texts) == 0

    def row(self, name: str) -> dict[str, Any]:
        """All figures of a candidate."""
        verdict = self.framed[name]
        return {
            **verdict.to_json(),
            "manual": mean_of(verdict.by_sample[self._is_manual]),
            "chats": mean_of(verdict.by_sample[~self._is_manual]),
            "real chats": mean_of(self.real[name].by_sample),
            **{f"over {other}": ratio(verdict.by_sample, self.framed[other].by_sample) for other in ("v3", "reap")},
        }

    def knob(self, name: str, refit: str) -> dict[str, Any]:
        """A knob beside the same prune, refitted or not, without it."""
        without = self.framed[DEFAULT + refit]
        return {**self.row(name + refit), "over none": ratio(self.framed[name + refit].by_sample, without.by_sample)}

    def random(self) -> dict[str, Any]:
        """Mean and range over seeds."""
        rows = [self.row(f"{RANDOM} {seed}") for seed in range(SEEDS)]
        means = [row["mean_kld"] for row in rows]
        parts = {key: float(np.mean([row[key]["mean"] for row in rows])) for key in ("manual", "chats", "real chats")}
        return {"mean_kld": float(np.mean(means)), "lowest": min(means), "highest": max(means), "seeds": SEEDS, **parts}


def mean_of(by_sample: Array) -> dict[str, float]:
    """Mean, and half the width of its 95% interval."""
    width = CONFIDENCE * float(by_sample.std(ddof=1)) / len(by_sample) ** 0.5
    return {"mean": float(by_sample.mean()), "half_width": width}


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.log(values).mean()))


def ratio(mine: Array, other: Array) -> dict[str, float]:
    """Of two means over the same samples, with its 95% interval (delta method)."""
    found = float(mine.mean() / other.mean())
    spread = float((mine - found * other).std(ddof=1)) / len(mine) ** 0.5
    return {"ratio": found, "half_width": CONFIDENCE * spread / float(other.mean())}


def over_draws(work: Path) -> dict[str, dict[str, Any]]:
    """By level and contender: divergence over v3's, the geometric mean over draws and each."""
    found: dict[str, list[dict[str, float]]] = {label: [] for label in KEEPS}
    for draw in range(DRAWS):
        bench = Bench(work / f"draw-{draw}", draw)
        for label, keep in KEEPS.items():
            found[label].append(bench.contenders(keep))
    table: dict[str, dict[str, Any]] = {}
    for label, rows in found.items():
        print(f"\n{label} of the experts go: over v3, geometric mean and range of {DRAWS} draws of training text")
        each = {name: [row[name] for row in rows] for name in rows[0]}
        table[label] = {name: {"mean": geometric_mean(values), "each": values} for name, values in each.items()}
        for name, row in sorted(table[label].items(), key=lambda item: item[1]["mean"]):
            print(f"{name:32} {row['mean']:.3f}, {min(row['each']):.3f} to {max(row['each']):.3f}", flush=True)
    return table


def goals(level: Mapping[str, Any], draws: Mapping[str, Any]) -> dict[str, Any]:
    """The default, with and without refit, beside what it has to beat: here, and over all draws."""
    return {
        f"{name} over {other}": {
            **level["recipes"][name][f"over {other}"],
            "over draws": draws[name]["mean"] / draws[other]["mean"],
            "allowed": GOAL,
        }
        for name in (DEFAULT + REFIT, DEFAULT)
        for other in ("v3", "reap")
    }


def shown(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.3f}+-{found['half_width']:.3f}"


def show(label: str, level: Mapping[str, Any]) -> None:
    print(f"\n{label} of the experts go, {level['experts']} stay; spread: {level['spread']}")
    for name, row in sorted(level["recipes"].items(), key=lambda item: item[1]["mean_kld"]):
        parts = "  ".join(f"{key} {row[key]['mean']:.4f}" for key in ("manual", "chats", "real chats"))
        found = f"{row['mean_kld']:.4f}+-{row['half_width']:.4f}  {parts}"
        print(f"{name:32} {found}  {shown(row['over v3'])} of v3  {shown(row['over reap'])} of reap")
    row = level[RANDOM]
    print(f"{RANDOM:32} {row['mean_kld']:.4f}, {row['lowest']:.4f} to {row['highest']:.4f}")
    for tokens, row in level["refit by tokens"].items():
        print(f"refit on {tokens} tokens: {row['mean_kld']:.4f}+-{row['half_width']:.4f}")
    for name, row in level["knobs"].items():
        print(f"{name:32} {row['mean_kld']:.4f}, {shown(row['over none'])} of none")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work) / "all")
        levels: dict[str, dict[str, Any]] = {}
        for label, keep in KEEPS.items():
            levels[label] = bench.level(keep)
            show(label, levels[label])
        draws = over_draws(Path(work))
        document = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.machine(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "vllm-gemma4q")},
            "default": DEFAULT,
            "calibration": {"samples": SAMPLES, "tokens": bench.samples(bench.training).n_tokens, "length": LENGTH},
            "judged": {
                "samples": len(bench.held_out.ids),
                "positions": bench.held_out.n_tokens,
                "real chats": len(bench.real),
                "their positions": sum(map(len, bench.real)),
            },
            "knobs": {name: asdict(options) for name, options in KNOBS.items()},
            "goals": {label: goals(level, draws[label]) for label, level in levels.items()},
            "over v3, by draw of training text": draws,
            "levels": levels,
        }
    print(json.dumps(document["goals"], indent=1))
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    plot(levels, RESULTS.with_suffix(".png"), GOAL)


if __name__ == "__main__":
    main()

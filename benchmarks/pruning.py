"""Which experts should go? Divergence of the small mixture after every recipe of `gemma4q prune`, at 25% and at 50%.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/pruning.py

Texts are of four classes: a Python manual, and chats about numbers, about words and facts, and over several turns. The
recipes and the refit see training text, cut and put into the chat template as the command does by default; divergence
(mean KLD in nats over the whole vocabulary from the unpruned model, all in float32) is measured on held-out text: half
of it manual and half chats framed the same way, and apart from that chats as they really are, a sample each. Intervals
are 95%, by sample; those of ratios are paired. Random choices are many, and shown with their range.

Knobs (shared boost, soft transfer, fewer experts a token) are judged in transformers, on checkpoints that were written.
Goal: at 25%, the default at most 0.8 times the divergence of v3 and of REAP. Results go to benchmarks/results/.
"""

import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from small_gemma4 import batches, chats, corpus  # noqa: E402

from gguf_mixed.drop_map import RetainedExperts  # noqa: E402
from vllm_gemma4q.calibration.calibrate import Calibration, calibrate  # noqa: E402
from vllm_gemma4q.calibration.decoder import Decoder  # noqa: E402
from vllm_gemma4q.calibration.statistics import Array, read_statistics  # noqa: E402
from vllm_gemma4q.calibration.texts import Samples, load_samples  # noqa: E402
from vllm_gemma4q.checkpoint import open_checkpoint  # noqa: E402
from vllm_gemma4q.checkpoint.convert import convert  # noqa: E402
from vllm_gemma4q.commands.model import Device, Dtype  # noqa: E402
from vllm_gemma4q.commands.prune_model import PrunedModel, Text  # noqa: E402
from vllm_gemma4q.pruned_moe.choose import DEFAULT, QUOTA, RANDOM, Chooser  # noqa: E402
from vllm_gemma4q.pruned_moe.judge import CONFIDENCE, Verdict, judge  # noqa: E402
from vllm_gemma4q.pruned_moe.knobs import Options  # noqa: E402
from vllm_gemma4q.pruned_moe.prune import plan  # noqa: E402
from vllm_gemma4q.pruned_moe.scores import RECIPES  # noqa: E402
from vllm_gemma4q.pruned_moe.streams import Variant  # noqa: E402
from vllm_gemma4q.pruned_moe.weight_scores import WEIGHT_RECIPES  # noqa: E402

MODEL = ROOT / "examples" / "small_gemma4" / "moe"
RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
KEEPS = {"25%": 12, "50%": 8}  # of 16
NAMES = (*RECIPES, QUOTA, *WEIGHT_RECIPES)
SEEDS = 8
TOPICS = {
    "numbers": {"arithmetic", "comparison", "counting"},
    "knowledge": {"words", "facts", "system", "calendar"},
    "turns": {"recall"},
}
CHATS = {True: 2000, False: 14000}  # drawn, held out or not; fewer are distinct
TOKENS = {True: 1200, False: 6800}  # of each class of chats: of one, no more are held out
LENGTH, SAMPLES = 96, 78  # to calibrate, to refit and to judge
REFIT_SAMPLES = (24, 54, 108, 210, 420)
REAL_CHATS = 40  # of each class
KNOBS = {
    "shared boost 1.2": Options(shared_boost=1.2),
    "soft transfer 0.3": Options(soft_transfer=0.3),
    "top_k 3": Options(top_k=3),
}
AS_WRITTEN = "none"
SAME = 1e-4  # nats a position, of the mask in `judge` and of the checkpoint in transformers
LIMIT = 4 << 30
GOAL = 0.8


def chat_text(chat: chats.Chat) -> str:
    return "\n".join(message["content"] for message in chat.messages)


def distinct_chats(held_out: bool, count: int) -> dict[str, list[chats.Chat]]:
    """By class, the chats that differ among `count` of one split."""
    found: dict[str, dict[str, chats.Chat]] = {name: {} for name in TOPICS}
    for chat in islice(chats.generate(seed=2, held_out=held_out), count):
        for name, topics in TOPICS.items():
            if chat.topic in topics:
                found[name][repr(chat.messages)] = chat
    return {name: list(group.values()) for name, group in found.items()}


def write_texts(
    folder: Path, sections: Sequence[str], groups: Mapping[str, Sequence[chats.Chat]], tokens: int
) -> list[Path]:
    """One file a class: so many tokens of each kind of chats, and of the manual, the first, as many as of all chats."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {"manual": "\n\n".join(sections)}
    texts |= {name: "\n\n".join(map(chat_text, group)) for name, group in groups.items()}
    folder.mkdir()
    for name, text in texts.items():
        ids, size = tokenizer.encode(text, add_special_tokens=False), tokens * (1 if name in groups else len(groups))
        assert len(ids) >= size, (name, len(ids))
        (folder / f"{name}.txt").write_text(tokenizer.decode(ids[:size]), encoding="utf-8")
    return [folder / f"{name}.txt" for name in texts]


@dataclass
class Bench:
    """Texts, statistics and what is judged.

    Attributes:
        work: an empty folder.
    """

    work: Path

    def __post_init__(self) -> None:
        self.source = open_checkpoint(MODEL)
        self.decoder = Decoder(self.source, torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        seen, unseen = (distinct_chats(held_out, CHATS[held_out]) for held_out in (False, True))
        self.training = write_texts(self.work / "training", corpus.training_sections(), seen, TOKENS[False])
        held_out = write_texts(self.work / "held-out", corpus.held_out_sections(), unseen, TOKENS[True])
        self.held_out = self.samples(held_out)
        self.real = [
            batches.encode_chat(chat, tokenizer)[0] for group in unseen.values() for chat in group[:REAL_CHATS]
        ]

    def samples(self, paths: list[Path], count: int = SAMPLES) -> Samples:
        return load_samples(MODEL, paths, count, LENGTH)

    def pruned_model(self, count: int = SAMPLES) -> PrunedModel:
        run = Text(count, LENGTH, False, Device.CPU, Dtype.FLOAT32, LIMIT)
        return PrunedModel(self.source, run, self.training)

    @cached_property
    def statistics(self) -> Any:
        path = self.work / "statistics.safetensors"
        calibrate(Calibration(self.decoder, self.samples(self.training), LENGTH, LIMIT), path, self.work / "calibrate")
        return read_statistics(path)

    def level(self, keep: int) -> dict[str, Any]:
        """Every figure of one number of experts."""
        candidates = {f"{RANDOM} {seed}": self._chooser(keep, seed).uniform(RANDOM) for seed in range(SEEDS)}
        chooser, model = self._chooser(keep), self.pruned_model()
        candidates |= {name: chooser.uniform(name) for name in NAMES}
        candidates[f"{DEFAULT}, spread"] = model.spread(chooser, DEFAULT)
        variants = {name: Variant(retained) for name, retained in candidates.items()}
        for name in (DEFAULT, f"{DEFAULT}, spread", "v3", "reap", f"{RANDOM} 0"):
            variants[f"{name} + refit"] = self._refitted(candidates[name], keep)
        sweep = {}
        for count in REFIT_SAMPLES:
            sweep[f"refit {count}"] = self._refitted(candidates[DEFAULT], keep, count)
        found = Judged(self, {**variants, **sweep})
        return {
            "experts": keep,
            "spread": list(candidates[f"{DEFAULT}, spread"].counts),
            "recipes": {name: found.row(name) for name in variants if name.removeprefix(f"{RANDOM} ") == name},
            RANDOM: found.random(),
            "random 0 + refit": found.row(f"{RANDOM} 0 + refit"),
            "refit by tokens": {
                self.samples(self.training, count).n_tokens: found.row(f"refit {count}") for count in REFIT_SAMPLES
            },
            "knobs": self._knobs(candidates[DEFAULT], keep, found.framed[DEFAULT]),
        }

    def _chooser(self, keep: int, seed: int = 0) -> Chooser:
        return Chooser(self.source, self.statistics, keep, seed=seed)

    def _refitted(self, retained: RetainedExperts, keep: int, count: int = SAMPLES) -> Variant:
        folder = Path(tempfile.mkdtemp(prefix=f"refit-{keep}-", dir=self.work))
        return Variant(retained, self.pruned_model(count).refit(retained, folder).tensors)

    def _knobs(self, retained: RetainedExperts, keep: int, judged: Verdict) -> dict[str, Any]:
        """Divergence of written checkpoints; the one without a knob must be what masking the router gave."""
        ids = self.held_out.ids
        expected = log_probabilities(MODEL, ids)
        found = {}
        for name, options in {AS_WRITTEN: Options(), **KNOBS}.items():
            target = self.work / f"{keep} experts, {name}"
            convert(plan(self.source, retained, options), target, ["benchmarks/pruning.py"], lambda n_bytes: None)
            got = log_probabilities(target, ids)
            found[name] = np.array([divergence(*pair) for pair in zip(expected, got, strict=True)])
        assert float(np.abs(found[AS_WRITTEN] - judged.by_sample).max()) < SAME
        return {
            name: {**mean_of(by_sample), "over none": ratio(by_sample, found[AS_WRITTEN])}
            for name, by_sample in found.items()
        }


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


def ratio(mine: Array, other: Array) -> dict[str, float]:
    """Of two means over the same samples, with its 95% interval (delta method)."""
    found = float(mine.mean() / other.mean())
    spread = float((mine - found * other).std(ddof=1)) / len(mine) ** 0.5
    return {"ratio": found, "half_width": CONFIDENCE * spread / float(other.mean())}


@torch.no_grad()
def log_probabilities(folder: Path, samples: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of a checkpoint in transformers: float64 [tokens, vocabulary] of each sample."""
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1) for ids in samples]


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KLD in nats of two tables of log-probabilities [tokens, vocabulary]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def goals(level: Mapping[str, Any]) -> dict[str, Any]:
    """The default, with and without refit, beside what it has to beat."""
    rows = {name: level["recipes"][name] for name in (f"{DEFAULT} + refit", DEFAULT)}
    return {
        f"{name} over {other}": {**row[f"over {other}"], "allowed": GOAL}
        for name, row in rows.items()
        for other in ("v3", "reap")
    }


def show(label: str, level: Mapping[str, Any]) -> None:
    print(f"\n{label} of the experts go, {level['experts']} stay; spread: {level['spread']}")
    for name, row in sorted(level["recipes"].items(), key=lambda item: item[1]["mean_kld"]):
        parts = "  ".join(f"{key} {row[key]['mean']:.4f}" for key in ("manual", "chats", "real chats"))
        over = "  ".join(
            f"{row[f'over {other}']['ratio']:.3f}+-{row[f'over {other}']['half_width']:.3f} of {other}"
            for other in ("v3", "reap")
        )
        print(f"{name:32} {row['mean_kld']:.4f}+-{row['half_width']:.4f}  {parts}  {over}")
    row = level[RANDOM]
    print(f"{RANDOM:32} {row['mean_kld']:.4f}, {row['lowest']:.4f} to {row['highest']:.4f}")
    for tokens, row in level["refit by tokens"].items():
        print(f"refit on {tokens} tokens: {row['mean_kld']:.4f}+-{row['half_width']:.4f}")
    for name, row in level["knobs"].items():
        over = row["over none"]
        print(f"{name:20} {row['mean']:.4f}, {over['ratio']:.3f}+-{over['half_width']:.3f} of none")


def plot(levels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars with intervals, the best on top; for random choices, their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (label, level) in zip(figure.subplots(1, len(levels)), levels.items(), strict=True):
        bars = {name: (row["mean_kld"], row["half_width"], row["half_width"]) for name, row in level["recipes"].items()}
        mean, low, high = (level[RANDOM][key] for key in ("mean_kld", "lowest", "highest"))
        bars[f"{RANDOM}, {SEEDS} seeds (range)"] = (mean, mean - low, high - mean)
        names = sorted(bars, key=lambda name: -bars[name][0])
        colors = ["tab:green" if "refit" in name else "tab:gray" if RANDOM in name else "tab:blue" for name in names]
        means, below, above = zip(*(bars[name] for name in names), strict=True)
        axes.barh(names, means, xerr=(below, above), color=colors, capsize=2)
        allowed = GOAL * min(level["recipes"][other]["mean_kld"] for other in ("v3", "reap"))
        axes.axvline(allowed, color="black", linestyle="--", linewidth=1, label=f"{GOAL} x the better of v3, reap")
        axes.set(title=f"{label} of the experts dropped", xlabel="mean KLD from the unpruned model, nats")
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        levels = {label: bench.level(keep) for label, keep in KEEPS.items()}
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
            "seconds": round(time.perf_counter() - started),
            "goals": {label: goals(level) for label, level in levels.items()},
            "levels": levels,
        }
    for label, level in levels.items():
        show(label, level)
    print(json.dumps(document["goals"], indent=1))
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    plot(levels, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""What `gemma4q prune` prints: scores by layer, verdicts on candidates, and what became of the checkpoint."""

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.calibration.statistics import Array

if TYPE_CHECKING:
    from vllm_gemma4q.pruned_moe.judge import Verdict


def scores_report(recipe: str, scores: Array, retained: RetainedExperts, shared: Mapping[str, float]) -> dict[str, Any]:
    """All scores, what they keep, and what other recipes would drop, too."""
    return {
        "recipe": recipe,
        "scores": scores.tolist(),
        "kept": [list(kept) for kept in retained.kept],
        "overlap": dict(shared),
    }


def print_scores(report: Mapping[str, Any]) -> None:
    """A line a layer: the range of scores, where the cut lies, and which experts go."""
    table = Table(title=f"scores: {report['recipe']}")
    for heading in ("layer", "largest", "last kept", "first dropped", "smallest", "dropped"):
        table.add_column(heading, justify="left" if heading == "dropped" else "right")
    for layer, (scores, kept) in enumerate(zip(report["scores"], report["kept"], strict=True)):
        values = np.array(scores)
        gone = sorted(set(range(len(values))) - set(kept))
        first = f"{values[gone].max():.4g}" if gone else ""
        cells = [f"{values.max():.4g}", f"{values[kept].min():.4g}", first, f"{values.min():.4g}"]
        table.add_row(str(layer), *cells, " ".join(map(str, gone)))
    Console().print(table)
    for name, share in report["overlap"].items():
        if name != report["recipe"]:
            print(f"{name} drops {share:.0%} of these experts, too")


def print_verdicts(verdicts: "Mapping[str, Verdict]", retained: RetainedExperts, as_json: bool) -> None:
    """A line a candidate, least divergence first."""
    if as_json:
        found = {name: verdict.to_json() for name, verdict in verdicts.items()}
        print(json.dumps({"kept_per_layer": list(retained.counts), "candidates": found}))
        return
    table = Table(title="divergence from the unpruned model, nats", box=SIMPLE_HEAD, show_edge=False)
    for heading in ("candidate", "mean", "95% interval", "median", "p99", "same top"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right", no_wrap=True)
    for name, verdict in sorted(verdicts.items(), key=lambda item: item[1].mean):
        found = verdict.to_json()
        low, high = max(verdict.mean - verdict.half_width, 0), verdict.mean + verdict.half_width
        cells = [f"{verdict.mean:.4f}", f"{low:.4f}..{high:.4f}", f"{found['median_kld']:.4f}"]
        table.add_row(name, *cells, f"{found['p99_kld']:.3f}", f"{verdict.same_top:.1%}")
    Console().print(table)
    positions = len(next(iter(verdicts.values())).kld)
    print(f"{positions:,} positions, whole vocabulary; the interval treats samples, not positions, as independent.")


def print_plan(report: Mapping[str, Any], dry_run: bool) -> None:
    """Parameters and bytes by role, and what to do next."""
    table = Table(title=f"{report['source']} -> pruned")
    table.add_column("role")
    for heading in ("parameters", "after", "bytes", "after"):
        table.add_column(heading, justify="right")
    for role, row in report["roles"].items():
        counts = [f"{row[f'parameters_{when}']:,}" for when in ("before", "after")]
        table.add_row(role, *counts, *(decimal(row[f"bytes_{when}"]) for when in ("before", "after")))
    Console().print(table)
    before, after = report["experts"]["before"], report["experts"]["after"]
    mean = sum(after) / len(after)
    left = f"{after[0]}" if len(set(after)) == 1 else f"{min(after)} to {max(after)}, {mean:.1f} on average,"
    how = "refitted" if report["refit"] else "bit for bit as they were"
    print(f"{len(after)} layers keep {left} of {before} experts, {how}.")
    if dry_run:
        print("Nothing was written (--dry-run).")
    elif report["written"]:
        print(f"Wrote {report['target']}. Serve it: vllm serve {shlex.quote(report['target'])}")
    else:
        print(f"{report['target']} is already complete: nothing to do.")

"""`gemma4q prune SRC DST --statistics STATS --keep 98`"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf_mixed.atomic_file import check_place
from gguf_mixed.commands.output import AsJson
from gguf_mixed.drop_map import RetainedExperts, read_drop_map, write_drop_map
from gguf_mixed.sweep_plot import require_matplotlib
from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.commands.model import Device, Dtype
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.commands.prune_model import PrunedModel, Text
from vllm_gemma4q.commands.prune_report import print_plan, print_scores, print_verdicts, scores_report
from vllm_gemma4q.commands.prune_writing import Writing, check_places, work_folder
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.choose import DEFAULT, NAMES, Chooser, overlaps
from vllm_gemma4q.pruned_moe.knobs import Options
from vllm_gemma4q.pruned_moe.mixture import mixture_of
from vllm_gemma4q.pruned_moe.plot import plot_scores
from vllm_gemma4q.pruned_moe.weight_scores import WEIGHT_RECIPES, expert_bytes
from vllm_gemma4q.sizes import parse_size


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Gemma 4 MoE checkpoint: BF16, or INT8 or FP8.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="Output folder: absent, empty, or left unfinished.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="STATS", help="What gemma4q calibrate wrote for SRC, or what it is made of.")
    ] = None,
    keep: Annotated[int | None, typer.Option(metavar="N", help="Experts a layer that stay.")] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME", help=f"How experts are scored: {', '.join(NAMES)}.")] = DEFAULT,
    drop_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of dropped experts by layer, instead of a recipe.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="UTF-8 text to run the model on: for the refit, and --spread. Repeatable."),
    ] = None,
    refit: Annotated[
        bool, typer.Option(help="With --text: move down_proj of the experts that stay by least squares.")
    ] = True,
    spread: Annotated[
        bool, typer.Option("--spread", help="With --text: N on average, more where dropping costs more.")
    ] = False,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Compare recipes on this held-out text, and write nothing. Repeatable."),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --evaluate: against these.  [default: all]")
    ] = None,
    scores_only: Annotated[bool, typer.Option("--scores-only", help="Print the scores, and write nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also a picture of the scores.")] = None,
    drop_map_output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the choice as a drop map, with its summary.")
    ] = None,
    class_weight: Annotated[
        list[str] | None, typer.Option(metavar="TEXT=W", help="v5-coder: how much a calibrated text counts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random scores.")] = 0,
    shared_boost: Annotated[
        float, typer.Option(help="Multiply the dense MLP's share, at post_feedforward_layernorm_1.")
    ] = 1.0,
    soft_transfer: Annotated[
        float, typer.Option(help="Add this share of dropped router rows to their 3 nearest.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Experts a token from now on.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of --text, and of --evaluate.")] = 64,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample, at most.")] = 1024,
    raw: Annotated[bool, typer.Option("--raw", help="Plain text instead of the model's chat template.")] = False,
    device: Annotated[Device, typer.Option(help="Where to run the model.")] = Device.CPU,
    dtype: Annotated[
        Dtype, typer.Option(help="What to compute in; auto: what the weights are stored in.")
    ] = Dtype.AUTO,
    activations_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Activations that --evaluate and --spread keep in memory.")
    ] = "4GiB",
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the refit; DST.work where not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write no checkpoint.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, such as 5GB, 500MB or 2GiB.")
    ] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Drop experts of a mixture, file to file: the ones that calibration says matter least. Run it again to resume."""
    _check_names(recipe, *(compare or []))
    from_recipe: dict[str, Any] = {
        "--statistics": statistics,
        "--spread": spread,
        "--scores-only": scores_only,
        "--plot": plot,
    }
    from_recipe |= {"--compare": compare, "--class-weight": class_weight}
    _check_choice(drop_map, keep, [name for name, given in from_recipe.items() if given])
    _check_task(target, bool(text), spread, scores_only, bool(evaluate), bool(compare))
    options = Options(shared_boost, soft_transfer, top_k)
    checkpoint = open_checkpoint(source)
    _check_outputs(plot, drop_map_output)
    if target is not None and not dry_run and not (target / MANIFEST).is_file():
        check_places(checkpoint, target, *[work or work_folder(target)] * bool(refit and text))
    chooser = None
    if drop_map is None:
        assert keep is not None
        found = None if statistics is None else read_statistics(statistics)
        chooser = Chooser(checkpoint, found, keep, _weights(class_weight or []), seed, top_k)
        _read_weights(chooser, recipe, *(compare or (chooser.available if evaluate else ())))
    provenance = _provenance(chooser, recipe, drop_map, statistics, spread)
    if scores_only:
        assert chooser is not None
        _scores(chooser, recipe, plot, drop_map_output, as_json, provenance)
        return
    run = Text(samples, max_length, raw, device, dtype, parse_size(activations_limit))
    model = PrunedModel(checkpoint, run, text or [], options)
    retained = _retained(checkpoint, drop_map, chooser, recipe, model if spread else None, top_k)
    if evaluate:
        name = recipe + ", spread" if spread else recipe
        candidates = {name if drop_map is None else drop_map.name: retained}
        for name in compare or ([] if chooser is None else chooser.available):
            assert chooser is not None
            candidates.setdefault(name, chooser.uniform(name))
        verdicts = model.judge(evaluate, candidates, refit and bool(text), work)
        print_verdicts(verdicts, retained, as_json)
    if plot is not None and chooser is not None:
        plot_scores(plot, recipe, chooser.scores(recipe), retained)
    if drop_map_output is not None:
        write_drop_map(drop_map_output, retained, {**provenance, "overlap": _overlaps(chooser, retained)})
    if evaluate or target is None:
        return
    job = Writing(checkpoint, retained, options, parse_size(max_shard_size))
    folder = work or work_folder(target)
    if refit and text:
        conversion, written = job.refitted(target, folder, model, provenance, dry_run)
    else:
        conversion, written = job.plain(target, provenance, dry_run)
    report = {
        "source": str(source),
        "target": str(target),
        "experts": conversion.details["experts"],
        "refit": bool(refit and text),
        "roles": conversion.summary,
        "written": written,
    }
    print(json.dumps(report)) if as_json else print_plan(report, dry_run)


def _check_outputs(plot: Path | None, drop_map_output: Path | None) -> None:
    """What is written at the end: looked at before recipes run the model for hours."""
    if plot is not None:
        require_matplotlib()
    for path in (plot, drop_map_output):
        if path is not None:
            check_place(path)


def _check_names(*recipes: str) -> None:
    for name in recipes:
        if name not in NAMES:
            raise InputError(f"recipe {name}: expected one of {', '.join(NAMES)}")


def _check_choice(drop_map: Path | None, keep: int | None, from_recipe: list[str]) -> None:
    """Experts are chosen in one way, and options that belong to the other are not ignored."""
    if (drop_map is None) == (keep is None):
        raise InputError("expected either --keep N, with --statistics STATS, or --drop-map FILE")
    if drop_map is not None and from_recipe:
        raise InputError(f"--drop-map: got also {', '.join(from_recipe)}, which recipes take")


def _check_task(
    target: Path | None, has_text: bool, spread: bool, scores_only: bool, is_judged: bool, has_others: bool
) -> None:
    """Options that contradict each other or need another one: one clear line, before anything is read."""
    if scores_only and (has_text or is_judged):
        raise InputError(
            "--scores-only: got also --text, --spread or --evaluate, which run the model, expected neither"
        )
    if spread and not has_text:
        raise InputError("--spread: --text is missing: what a layer loses is measured on it")
    if has_others and not is_judged:
        raise InputError("--compare: --evaluate is missing: the text to compare on")
    if target is None and not (scores_only or is_judged):
        raise InputError("DST is missing: expected an output folder, or --scores-only, or --evaluate FILE")
    if target is not None and (scores_only or is_judged):
        raise InputError(f"DST: got {target}, expected none: --scores-only and --evaluate write no checkpoint")


def _read_weights(chooser: Chooser, *recipes: str) -> None:
    """What recipes from weights need, with a bar: of a large model it takes minutes."""
    if WEIGHT_RECIPES.keys() & set(recipes):
        with byte_bar(expert_bytes(chooser.source), "weights") as bar:
            chooser.read_weights(bar.update)


def _weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for item in given:
        name, separator, value = item.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            separator = ""
        if not (separator and 0 <= weights[name] < math.inf):
            raise InputError(f"--class-weight: got {item}, expected TEXT=W, such as code.txt=2")
    return weights


def _retained(
    checkpoint: Checkpoint,
    drop_map: Path | None,
    chooser: Chooser | None,
    recipe: str,
    model: PrunedModel | None,
    top_k: int | None,
) -> RetainedExperts:
    if chooser is None:
        assert drop_map is not None
        architecture, num_experts, as_it_is = mixture_of(checkpoint.config)
        return read_drop_map(drop_map, num_experts, len(architecture.layers), top_k or as_it_is)
    return chooser.uniform(recipe) if model is None else model.spread(chooser, recipe)


def _scores(
    chooser: Chooser,
    recipe: str,
    plot: Path | None,
    drop_map_output: Path | None,
    as_json: bool,
    provenance: Mapping[str, Any],
) -> None:
    scores, retained = chooser.scores(recipe), chooser.uniform(recipe)
    if plot is not None:
        plot_scores(plot, recipe, scores, retained)
    shared = _overlaps(chooser, retained)
    if drop_map_output is not None:
        write_drop_map(drop_map_output, retained, {**provenance, "overlap": shared})
    report = scores_report(recipe, scores, retained, shared)
    print(json.dumps(report)) if as_json else print_scores(report)


def _overlaps(chooser: Chooser | None, retained: RetainedExperts) -> dict[str, float]:
    return {} if chooser is None else overlaps(retained, {name: chooser.uniform(name) for name in chooser.at_hand})


def _provenance(
    chooser: Chooser | None, recipe: str, drop_map: Path | None, statistics: Path | None, spread: bool
) -> dict[str, Any]:
    if chooser is None:
        return {"drop_map": drop_map.name if drop_map else None}
    found = {"recipe": recipe, "keep": chooser.keep, "spread": spread, "seed": chooser.seed}
    if chooser.statistics is None or statistics is None:
        return found
    return {**found, "class_weights": dict(chooser.class_weights), "statistics": dict(chooser.statistics.details)}

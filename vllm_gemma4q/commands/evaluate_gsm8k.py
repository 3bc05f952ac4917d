"""`gemma4q evaluate gsm8k`"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from gguf_mixed.commands.output import AsJson
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:  # scipy and openai, which only this command needs
    from vllm_gemma4q.evaluation.gsm8k.compare import Paired
    from vllm_gemma4q.evaluation.gsm8k.results import Results
    from vllm_gemma4q.evaluation.gsm8k.run import Protocol, Target

_NO_TARGET = (
    "expected CKPT or --url, or neither and two finished result files to compare: "
    "--results (EVAL_QUANT_JSON) and --baseline (EVAL_BASELINE_JSON)"
)


def command(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CKPT]", help="Checkpoint folder, served with vLLM for the run.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A running server instead: http://HOST:PORT/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Of the server's models; its only one.")] = None,
    serve_flag: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="For vllm serve: --serve-flag=--dtype=float32. Repeatable.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="EVAL_QUANT_JSON", help="A line a question; resumed when it exists."),
    ] = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE", help="GSM8K's test split, JSON lines.")] = None,
    shots: Annotated[Path | None, typer.Option(metavar="FILE", help="GSM8K's training split, JSON lines.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="EVAL_BASELINE_JSON", help="Results of the unquantized model to compare."),
    ] = None,
    n_shots: Annotated[int, typer.Option("--num-shots", min=0, help="Worked examples before each question.")] = 8,
    seed: Annotated[int | None, typer.Option(help="Draw the shots, instead of the first of their file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in flight.")] = 32,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that finds no server, or an overloaded one.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="For a reply, queueing included.")] = 1800,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what the engine of CKPT prints.")] = None,
    as_json: AsJson = False,
) -> None:
    """GSM8K over the chat API, few-shot and greedy: accuracy as lm-eval scores it, against a baseline's in pairs."""
    if checkpoint is None and url is None and questions is None and shots is None:
        found = _finished(results, baseline)
    else:
        if results is None:
            raise InputError("--results: missing, expected a file for the replies")
        protocol = _protocol(questions, shots, n_shots, seed, limit, max_tokens)
        if baseline is not None and not _same(baseline, results):
            _check_baseline(baseline, protocol)
        if url is not None:
            log = log or Path(os.devnull)  # no engine is started that could print
        found = _run(
            protocol, _target(checkpoint, url, model, serve_flag or [], (retries, timeout)), results, concurrency, log
        )
    compared = None if baseline is None or _same(baseline, found.path) else _compared(baseline, found)
    _show(found, baseline, compared, as_json)


def _finished(results: Path | None, baseline: Path | None) -> "Results":
    from vllm_gemma4q.evaluation.gsm8k.results import read_results

    if results is None or baseline is None:
        raise InputError(_NO_TARGET)
    if _same(baseline, results):
        raise InputError(f"--baseline: got {baseline} as for --results, expected the results of another model")
    found = read_results(results)
    found.check_complete()
    return found


def _protocol(
    questions: Path | None, shots: Path | None, n_shots: int, seed: int | None, limit: int | None, max_tokens: int
) -> "Protocol":
    _check_installed()
    from vllm_gemma4q.evaluation.gsm8k import questions as files
    from vllm_gemma4q.evaluation.gsm8k.prompt import choose_shots
    from vllm_gemma4q.evaluation.gsm8k.run import Protocol

    missing = [name for name, path in (("--questions", questions), ("--shots", shots)) if path is None]
    if questions is None or (shots is None and n_shots):
        raise InputError(f"{', '.join(missing)}: missing: {files.HOW_TO_GET}")
    asked = files.first(files.read_questions(questions), limit, questions)
    pool = [] if shots is None else files.read_questions(shots)
    return Protocol(asked, choose_shots(pool, n_shots, seed, asked), max_tokens)


def _check_installed() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise InputError("openai: not installed: pip install 'vllm-gemma4q[evaluate]'") from error


def _target(
    checkpoint: Path | None, url: str | None, model: str | None, flags: list[str], patience: tuple[int, float]
) -> "Target":
    from vllm_gemma4q.evaluation.gsm8k.client import Patience
    from vllm_gemma4q.evaluation.gsm8k.run import checkpoint_folder, running_server

    if (checkpoint is None) == (url is None):
        raise InputError(f"{'--url: got also CKPT' if url else 'CKPT: missing'}, {_NO_TARGET}")
    if url is not None:
        if flags:
            raise InputError("--serve-flag: got also --url, expected CKPT: a running server has its flags")
        return running_server(url, model, Patience(*patience))
    if model is not None:
        raise InputError("--model: got also CKPT, expected --url: a served checkpoint is the only model")
    assert checkpoint is not None
    return checkpoint_folder(checkpoint, flags, Patience(*patience))


def _check_baseline(baseline: Path, protocol: "Protocol") -> None:
    """Before hours are spent on questions that cannot be paired."""
    from vllm_gemma4q.evaluation.gsm8k.compare import check_comparable
    from vllm_gemma4q.evaluation.gsm8k.results import read_results

    found = read_results(baseline)
    check_comparable(found.identity, protocol.to_json(), str(baseline))
    found.check_complete()


def _run(protocol: "Protocol", target: "Target", path: Path, concurrency: int, log: Path | None) -> "Results":
    from vllm_gemma4q.commands.evaluate import engine_log
    from vllm_gemma4q.evaluation.gsm8k.run import run

    with (
        engine_log(log) as output,
        tqdm(total=len(protocol.questions), desc="gsm8k", unit="question", disable=not sys.stderr.isatty()) as bar,
    ):
        return run(protocol, target, path, concurrency, output, lambda n: bar.update(n - bar.n))


def _same(one: Path, other: Path) -> bool:
    """A run that is itself the baseline of the environment is compared with nothing."""
    return one.resolve() == other.resolve()


def _compared(baseline: Path, found: "Results") -> "dict[str, Paired]":
    from vllm_gemma4q.evaluation.gsm8k.answers import Parse
    from vllm_gemma4q.evaluation.gsm8k.compare import compare
    from vllm_gemma4q.evaluation.gsm8k.results import read_results

    before = read_results(baseline)
    return {str(parse): compare(before, found, parse) for parse in Parse}


def _show(found: "Results", baseline: Path | None, compared: "dict[str, Paired] | None", as_json: bool) -> None:
    from vllm_gemma4q.evaluation.gsm8k.report import report

    document = report(found)
    if compared is not None:
        pairs = {parse: pair.to_json() for parse, pair in compared.items()}
        document["comparison"] = {"baseline": str(baseline), **pairs}
    if as_json:
        print(json.dumps(document))
        return
    from vllm_gemma4q.commands.evaluate_report import console_width

    console = Console(width=console_width(), highlight=False, markup=False)
    console.print(_table(document))
    if document["strict"]["error"]:
        console.print("Errors are not part of the accuracy; run the same command again to ask these questions again.")
    for parse, pair in (compared or {}).items():
        console.print(_sentence(parse, pair, str(baseline)), soft_wrap=True)


def _table(document: dict[str, Any]) -> Table:
    table = Table("gsm8k", "accuracy", "95% interval", "correct", "wrong", "truncated", "empty", "error")
    for parse in ("strict", "flexible"):
        score = document[parse]
        counts = (f"{score[key]:,}" for key in ("correct", "wrong", "truncated", "empty", "error"))
        if score["accuracy"] is None:
            table.add_row(parse, "-", "-", *counts)
            continue
        low, high = score["interval"]
        table.add_row(parse, f"{score['accuracy']:.2%}", f"{low:.2%} to {high:.2%}", *counts)
    return table


def _sentence(parse: str, pair: "Paired", baseline: str) -> str:
    if pair.difference is None or pair.interval is None:
        return f"{parse} against {baseline}: no question with two replies"
    low, high = (f"{100 * bound:+.2f}" for bound in pair.interval)
    return (
        f"{parse} against {baseline}: {100 * pair.difference:+.2f} points (95%: {low} to {high}), {pair.lost} lost and "
        f"{pair.gained} gained of {pair.pairs:,}, McNemar's exact p = {pair.p_value:.3g}"
    )
